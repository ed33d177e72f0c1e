//! safetensors files: named tensors in one mapped file.
use crate::{
    Error,
    files::{map_bytes, map_file},
};
use memmap2::Mmap;
use pavage_ir::{DType, Tensor};
use safetensors::{Dtype, SafeTensors};
use std::{collections::BTreeMap, path::Path, sync::Arc};

/// The tensors of a file by name. Their bytes stay in the mapped file.
///
/// Fails on a header that is longer than the file or over 100 MB, on tensors that overlap, leave gaps or pass the
/// file's end, and on dtypes that Pavage does not have.
pub fn load(path: &Path) -> Result<BTreeMap<String, Tensor>, Error> {
    let map = map_file(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let len = map.len();
    tensors(map, len)
}

/// [`load`] for a file held in memory.
pub fn load_bytes(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>, Error> {
    let map = map_bytes(bytes).map_err(|source| Error::Read { path: "memory".into(), source })?;
    tensors(map, bytes.len())
}

fn tensors(map: Arc<Mmap>, len: usize) -> Result<BTreeMap<String, Tensor>, Error> {
    let format = |reason: String| Error::Format { format: "safetensors", reason };
    let (header, metadata) = SafeTensors::read_metadata(&map[..len]).map_err(|e| format(e.to_string()))?;
    // Data follows the eight bytes of the header's length and the header.
    let start = header + 8;
    let mut out = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let bad = |reason: String| Error::Tensor { tensor: name.clone(), reason };
        let dtype = dtype_of(info.dtype).ok_or_else(|| bad(format!("{:?} elements", info.dtype)))?;
        let range = start + info.data_offsets.0..start + info.data_offsets.1;
        let tensor = Tensor::mapped(dtype, info.shape.clone(), map.clone(), range).map_err(|e| bad(e.to_string()))?;
        out.insert(name, tensor);
    }
    Ok(out)
}

fn dtype_of(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::BOOL => DType::Bool,
        Dtype::U8 => DType::U8,
        Dtype::I8 => DType::I8,
        Dtype::F8_E5M2 => DType::F8E5M2,
        Dtype::F8_E4M3 => DType::F8E4M3,
        Dtype::I16 => DType::I16,
        Dtype::U16 => DType::U16,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I32 => DType::I32,
        Dtype::U32 => DType::U32,
        Dtype::F32 => DType::F32,
        Dtype::F64 => DType::F64,
        Dtype::I64 => DType::I64,
        Dtype::U64 => DType::U64,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        bytes.extend(data);
        bytes
    }

    #[test]
    fn tensors_are_read_by_name() {
        let header =
            r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F16","shape":[2],"data_offsets":[8,12]},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}"#;
        let data: Vec<u8> = [1.5f32, -2.25].iter().flat_map(|v| v.to_le_bytes()).chain([0x00, 0x3c, 0x00, 0xc0]).collect();
        let tensors = load_bytes(&file(header, &data)).unwrap();
        assert_eq!(tensors.keys().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(tensors["a"], Tensor::from_f32([1, 2], &[1.5, -2.25]));
        assert_eq!(tensors["b"].to_f64(), [1.0, -2.0]);
    }

    #[test]
    fn broken_files_are_refused() {
        let whole = file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, &[0; 8]);
        for end in 0..whole.len() {
            assert!(load_bytes(&whole[..end]).is_err(), "cut at {end}");
        }
        for header in [
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4000000000]}}"#,
            r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#,
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
            r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}"#,
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
            r#"{"a":{"dtype":"X9","shape":[2],"data_offsets":[0,8]}}"#,
        ] {
            assert!(load_bytes(&file(header, &[0; 8])).is_err(), "{header}");
        }
        let mut long = u64::MAX.to_le_bytes().to_vec();
        long.extend([b'{'; 16]);
        assert!(load_bytes(&long).is_err());
    }
}
