//! `TensorProto` to [`Tensor`]: payloads stay in the mapped file.
use super::wire;
use crate::{Error, files::map_file};
use memmap2::Mmap;
use onnx_protobuf::TensorProto;
use pavage_ir::{DType, Tensor, tensor::count_of};
use std::{
    cell::RefCell,
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

/// Why a tensor was not read.
pub(crate) enum Unread {
    /// It holds strings, which live outside graphs.
    Text,
    /// Its element type is one that Pavage lacks.
    Dtype(String),
    /// The file is wrong.
    Wrong(Error),
}

/// The dtype of an ONNX element type code.
pub(crate) fn dtype_of(code: i32) -> Result<DType, String> {
    Ok(match code {
        1 => DType::F32,
        2 => DType::U8,
        3 => DType::I8,
        4 => DType::U16,
        5 => DType::I16,
        6 => DType::I32,
        7 => DType::I64,
        8 => DType::Str,
        9 => DType::Bool,
        10 => DType::F16,
        11 => DType::F64,
        12 => DType::U32,
        13 => DType::U64,
        16 => DType::BF16,
        17 => DType::F8E4M3,
        18 => DType::F8E4M3Fnuz,
        19 => DType::F8E5M2,
        20 => DType::F8E5M2Fnuz,
        21 => DType::U4,
        22 => DType::I4,
        23 => DType::F4E2M1,
        24 => DType::F8E8M0,
        25 => DType::U2,
        26 => DType::I2,
        0 => return Err("element type is not given".into()),
        14 => return Err("complex64 elements".into()),
        15 => return Err("complex128 elements".into()),
        code => return Err(format!("unknown element type {code}")),
    })
}

/// The model file and the files beside it that hold tensors.
pub(crate) struct Files {
    map: Arc<Mmap>,
    folder: Option<PathBuf>,
    external: RefCell<BTreeMap<PathBuf, Arc<Mmap>>>,
}

impl Files {
    /// `folder` is where external data may be; `None` forbids it.
    pub(crate) fn new(map: Arc<Mmap>, folder: Option<PathBuf>) -> Self {
        Self { map, folder, external: RefCell::default() }
    }

    /// The tensor, its bytes shared with the file where the format allows.
    pub(crate) fn tensor(&self, proto: &TensorProto) -> Result<Tensor, Unread> {
        match dtype_of(proto.data_type) {
            Ok(DType::Str) => Err(Unread::Text),
            Ok(dtype) => self.numbers(proto, dtype).map_err(Unread::Wrong),
            Err(what) => Err(Unread::Dtype(what)),
        }
    }

    fn numbers(&self, proto: &TensorProto, dtype: DType) -> Result<Tensor, Error> {
        let bad = |reason: String| Error::Tensor { tensor: proto.name.clone(), reason };
        let shape: Option<Vec<usize>> = proto.dims.iter().map(|d| usize::try_from(*d).ok()).collect();
        let shape = shape.ok_or_else(|| bad(format!("negative extent in {:?}", proto.dims)))?;
        let count = count_of(&shape).ok_or_else(|| bad(format!("shape {shape:?} has too many elements")))?;
        if proto.segment.is_some() {
            return Err(bad("stored in segments".into()));
        }
        if proto.data_location.value() == 1 {
            return self.external(proto, dtype, shape);
        }
        if let Some(range) = wire::payload(proto) {
            return Tensor::mapped(dtype, shape, self.map.clone(), range).map_err(|e| bad(e.to_string()));
        }
        // Models have lost theirs to the mapped file; a tensor in a file of its own has not.
        let mut bytes = proto.raw_data.clone();
        let ints = |bytes: &mut Vec<u8>, width: usize| proto.int32_data.iter().for_each(|v| bytes.extend(&v.to_le_bytes()[..width]));
        match dtype {
            _ if !bytes.is_empty() => {}
            DType::F32 => proto.float_data.iter().for_each(|v| bytes.extend(v.to_le_bytes())),
            DType::F64 => proto.double_data.iter().for_each(|v| bytes.extend(v.to_le_bytes())),
            DType::I64 => proto.int64_data.iter().for_each(|v| bytes.extend(v.to_le_bytes())),
            DType::U64 => proto.uint64_data.iter().for_each(|v| bytes.extend(v.to_le_bytes())),
            DType::U32 => proto.uint64_data.iter().for_each(|v| bytes.extend((*v as u32).to_le_bytes())),
            DType::I32 => ints(&mut bytes, 4),
            DType::I16 | DType::U16 | DType::F16 | DType::BF16 => ints(&mut bytes, 2),
            DType::Str => {}
            // Elements narrower than a byte come a byte of them to an entry.
            _ => ints(&mut bytes, 1),
        }
        if bytes.is_empty() && count > 0 {
            return Err(bad(format!("{dtype}{shape:?} has no data in the file")));
        }
        Tensor::new(dtype, shape, bytes).map_err(|e| bad(e.to_string()))
    }

    fn external(&self, proto: &TensorProto, dtype: DType, shape: Vec<usize>) -> Result<Tensor, Error> {
        let find = |key: &str| proto.external_data.iter().find(|e| e.key == key).map(|e| e.value.as_str());
        let location = find("location").unwrap_or("");
        let bad = |reason: String| Error::ExternalData { tensor: proto.name.clone(), location: location.into(), reason };
        let number = |key: &str| match find(key) {
            Some(text) => text.trim().parse::<usize>().map(Some).map_err(|_| bad(format!("has {key} `{text}`, not a byte count"))),
            None => Ok(None),
        };
        let map = self.open(location).map_err(&bad)?;
        let offset = number("offset")?.unwrap_or(0);
        // The tensor says how long it is; a stated length must agree, and neither may pass the file's end.
        let count = count_of(&shape).ok_or_else(|| bad(format!("has too many elements: {shape:?}")))?;
        let length = number("length")?.unwrap_or(dtype.bytes(count));
        let end = offset.checked_add(length).filter(|end| *end <= map.len());
        let end = end.ok_or_else(|| bad(format!("has {} bytes, and the tensor is at {offset} with {length}", map.len())))?;
        Tensor::mapped(dtype, shape, map, offset..end).map_err(|e| bad(format!("does not fit: {e}")))
    }

    fn open(&self, location: &str) -> Result<Arc<Mmap>, String> {
        let folder = self.folder.as_ref().ok_or("is not allowed here: the model has no folder")?;
        let relative = Path::new(location);
        if location.is_empty() {
            return Err("has no location".into());
        }
        if relative.is_absolute() || location.starts_with(['/', '\\']) {
            return Err("is an absolute path".into());
        }
        if !relative.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir)) {
            return Err("leaves the model's folder".into());
        }
        let root = folder.canonicalize().map_err(|e| format!("has no readable folder: {e}"))?;
        let path = root.join(relative).canonicalize().map_err(|e| format!("cannot be read: {e}"))?;
        if !path.starts_with(&root) {
            return Err("leaves the model's folder through a symlink".into());
        }
        if let Some(map) = self.external.borrow().get(&path) {
            return Ok(map.clone());
        }
        let map = map_file(&path).map_err(|e| format!("cannot be read: {e}"))?;
        self.external.borrow_mut().insert(path, map.clone());
        Ok(map)
    }
}
