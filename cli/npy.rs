//! `.npy` and `.npz` files. numpy has no bf16, f8, f4 or integers of less than a byte: floats travel as f32, integers
//! as bytes.
use super::Failure;
use npyz::npz::{NpzArchive, NpzWriter};
use npyz::{DType as NpyType, Endianness, NpyHeader, Order, TypeChar, WriteOptions, WriterBuilder};
use pavage::Tensor;
use pavage::runtime::DType;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Cursor, Read, Write};
use std::path::Path;

/// Reads one array.
pub(crate) fn read_npy(path: &Path) -> Result<Tensor, Failure> {
    let fail = |why: String| Failure::usage(format!("{}: {why}", path.display()));
    let file = File::open(path).map_err(|e| fail(e.to_string()))?;
    read(BufReader::new(file)).map_err(fail)
}

/// Reads all arrays of an archive, by name.
pub(crate) fn read_npz(path: &Path) -> Result<BTreeMap<String, Tensor>, Failure> {
    let fail = |why: String| Failure::usage(format!("{}: {why}", path.display()));
    let bytes = std::fs::read(path).map_err(|e| fail(e.to_string()))?;
    parse_npz(&bytes).map_err(fail)
}

/// The arrays of an archive in memory, by name.
pub(crate) fn parse_npz(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>, String> {
    let mut archive = NpzArchive::new(Cursor::new(bytes)).map_err(|e| e.to_string())?;
    let names: Vec<String> = archive.array_names().map(str::to_string).collect();
    let mut arrays = BTreeMap::new();
    for name in names {
        let array = archive.by_name(&name).map_err(|e| format!("`{name}`: {e}"))?;
        let Some(array) = array else { continue };
        let header = array.header().clone();
        let tensor = read_data(&header, array.into_inner());
        arrays.insert(name.clone(), tensor.map_err(|e| format!("`{name}`: {e}"))?);
    }
    Ok(arrays)
}

fn read(mut from: impl Read) -> Result<Tensor, String> {
    let header = NpyHeader::from_reader(&mut from).map_err(|e| e.to_string())?;
    read_data(&header, from)
}

fn read_data(header: &NpyHeader, from: impl Read) -> Result<Tensor, String> {
    let (dtype, endianness) = match header.dtype() {
        NpyType::Plain(t) => {
            let dtype = match (t.type_char(), t.size_field()) {
                (TypeChar::Float, 8) => DType::F64,
                (TypeChar::Float, 4) => DType::F32,
                (TypeChar::Float, 2) => DType::F16,
                (TypeChar::Int, 8) => DType::I64,
                (TypeChar::Int, 4) => DType::I32,
                (TypeChar::Int, 2) => DType::I16,
                (TypeChar::Int, 1) => DType::I8,
                (TypeChar::Uint, 8) => DType::U64,
                (TypeChar::Uint, 4) => DType::U32,
                (TypeChar::Uint, 2) => DType::U16,
                (TypeChar::Uint, 1) => DType::U8,
                (TypeChar::Bool, 1) => DType::Bool,
                _ => return Err(format!("no model takes arrays of type {t}")),
            };
            (dtype, t.endianness())
        }
        other => return Err(format!("no model takes arrays of type {}", other.descr())),
    };
    let shape: Vec<usize> = header.shape().iter().map(|d| usize::try_from(*d)).collect::<Result<_, _>>().map_err(|e| e.to_string())?;
    let len = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).and_then(|n| dtype.bytes(n)).ok_or("its shape does not fit in memory")?;
    // Grows as it is read: a header may claim more than the file has.
    let mut bytes = Vec::new();
    from.take(len as u64).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    if bytes.len() != len {
        return Err(format!("the data ends after {} of {len} bytes", bytes.len()));
    }
    let width = dtype.bits() / 8;
    if endianness == Endianness::Big && width > 1 {
        bytes.chunks_exact_mut(width).for_each(<[u8]>::reverse);
    }
    if header.order() == Order::Fortran {
        bytes = from_fortran(&bytes, &shape, width);
    }
    if dtype == DType::Bool {
        bytes.iter_mut().for_each(|b| *b = u8::from(*b != 0));
    }
    Tensor::from_bytes(dtype, &shape, &bytes).map_err(|e| e.to_string())
}

/// Column-major to row-major.
fn from_fortran(bytes: &[u8], shape: &[usize], width: usize) -> Vec<u8> {
    let mut out = vec![0; bytes.len()];
    let mut index = vec![0usize; shape.len()];
    for target in out.chunks_exact_mut(width) {
        let at = index.iter().zip(shape).rev().fold(0, |at, (i, d)| at * d + i);
        target.copy_from_slice(&bytes[at * width..][..width]);
        for (i, d) in index.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < *d {
                break;
            }
            *i = 0;
        }
    }
    out
}

/// Writes tensors to an archive.
pub(crate) fn write_npz<'a>(path: &Path, tensors: impl Iterator<Item = (&'a str, &'a Tensor)>) -> Result<(), Failure> {
    let fail = |e: std::io::Error| Failure::usage(format!("{}: {e}", path.display()));
    let mut npz = NpzWriter::new(BufWriter::new(File::create(path).map_err(fail)?));
    for (name, tensor) in tensors {
        let zip = npz.zip_writer();
        let options = npyz::zip::write::FileOptions::default()
            .compression_method(npyz::zip::CompressionMethod::Stored)
            .last_modified_time(npyz::zip::DateTime::default());
        zip.start_file(npyz::npz::file_name_from_array_name(name), options).map_err(|e| fail(e.into()))?;
        write(tensor, zip).map_err(fail)?;
    }
    npz.zip_writer().finish().map_err(|e| fail(e.into()))?.flush().map_err(fail)
}

fn write(tensor: &Tensor, to: &mut dyn Write) -> std::io::Result<()> {
    let (descr, bytes): (&str, Vec<u8>) = match tensor.dtype() {
        DType::F64 => ("<f8", tensor.bytes().into()),
        DType::F32 => ("<f4", tensor.bytes().into()),
        DType::F16 => ("<f2", tensor.bytes().into()),
        DType::I64 => ("<i8", tensor.bytes().into()),
        DType::I32 => ("<i4", tensor.bytes().into()),
        DType::I16 => ("<i2", tensor.bytes().into()),
        DType::I8 => ("|i1", tensor.bytes().into()),
        DType::U64 => ("<u8", tensor.bytes().into()),
        DType::U32 => ("<u4", tensor.bytes().into()),
        DType::U16 => ("<u2", tensor.bytes().into()),
        DType::U8 => ("|u1", tensor.bytes().into()),
        DType::Bool => ("|b1", tensor.bytes().into()),
        DType::I4 | DType::I2 => ("|i1", numbers(tensor).map(|x| x as i8 as u8).collect()),
        DType::U4 | DType::U2 => ("|u1", numbers(tensor).map(|x| x as u8).collect()),
        DType::BF16 | DType::F8E4M3 | DType::F8E5M2 | DType::F8E4M3Fnuz | DType::F8E5M2Fnuz | DType::F8E8M0 | DType::F4E2M1 => {
            ("<f4", numbers(tensor).flat_map(|x| (x as f32).to_le_bytes()).collect())
        }
    };
    let dtype = NpyType::new_scalar(descr.parse().map_err(std::io::Error::other)?);
    let shape: Vec<u64> = tensor.shape().iter().map(|d| *d as u64).collect();
    WriteOptions::new_header_only().dtype(dtype).shape(&shape).writer(&mut *to).write_header_only()?;
    to.write_all(&bytes)
}

/// The elements as f64; integers beyond 2^53 are rounded.
pub(crate) fn numbers(tensor: &Tensor) -> impl Iterator<Item = f64> + '_ {
    let dtype = tensor.dtype();
    let n: usize = tensor.shape().iter().product();
    let bytes = tensor.bytes();
    let width = dtype.bits() / 8;
    (0..n).map(move |i| {
        let at = |w: usize| &bytes[i * w..(i + 1) * w];
        macro_rules! le {
            ($T:ty) => {
                <$T>::from_le_bytes(at(width).try_into().unwrap_or_default())
            };
        }
        match dtype {
            DType::F64 => le!(f64),
            DType::F32 => le!(f32).into(),
            DType::F16 => half::f16::from_bits(le!(u16)).into(),
            DType::BF16 => half::bf16::from_bits(le!(u16)).into(),
            DType::I64 => le!(i64) as f64,
            DType::I32 => le!(i32).into(),
            DType::I16 => le!(i16).into(),
            DType::I8 => (bytes[i] as i8).into(),
            DType::U64 => le!(u64) as f64,
            DType::U32 => le!(u32).into(),
            DType::U16 => le!(u16).into(),
            DType::U8 | DType::Bool => bytes[i].into(),
            _ => narrow(bytes, dtype, i),
        }
    })
}

/// An element of at most 8 bits, as the compiler reads it.
fn narrow(bytes: &[u8], dtype: DType, i: usize) -> f64 {
    dtype.name().parse().map_or(f64::NAN, |same| pavage_ir::tensor::read(bytes, same, i).f())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(text: &str) -> Vec<u8> {
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes
    }

    #[test]
    fn arrays_are_read_back_as_written() {
        let path = std::env::temp_dir().join(format!("pavage-npy-{}.npz", std::process::id()));
        let a = Tensor::from_slice(&[2, 3], &[1.5f32, -2.0, 3.0, 4.0, f32::NAN, 6.0]).unwrap();
        let b = Tensor::from_slice(&[], &[-7i64]).unwrap();
        let c = Tensor::from_bytes(DType::Bool, &[2], &[1, 0]).unwrap();
        let d = Tensor::from_bytes(DType::F16, &[1], &half::f16::from_f32(0.5).to_le_bytes()).unwrap();
        let all = [("a", &a), ("in:b", &b), ("c/0", &c), ("d", &d)];
        assert!(write_npz(&path, all.into_iter()).is_ok());
        let Ok(back) = read_npz(&path) else { panic!("unreadable") };
        std::fs::remove_file(&path).ok();
        assert_eq!(back.len(), all.len());
        for (name, tensor) in all {
            let found = &back[name];
            assert_eq!((found.dtype(), found.shape(), found.bytes()), (tensor.dtype(), tensor.shape(), tensor.bytes()));
        }
    }

    #[test]
    fn column_major_and_big_endian_arrays_are_understood() {
        let mut bytes = header("{'descr': '>i2', 'fortran_order': True, 'shape': (2, 3), }\n");
        bytes.extend([1i16, 4, 2, 5, 3, 6].iter().flat_map(|x| x.to_be_bytes()));
        let Ok(tensor) = read(bytes.as_slice()) else { panic!("unreadable") };
        assert_eq!(tensor.as_slice::<i16>().unwrap(), [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn lying_headers_are_refused() {
        let huge = header("{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000, 2), }\n");
        assert!(read(huge.as_slice()).is_err_and(|e| e.contains("ends after 0")));
        let text = header("{'descr': '<U4', 'fortran_order': False, 'shape': (1,), }\n");
        assert!(read(text.as_slice()).is_err_and(|e| e.contains("no model takes")));
        assert!(read(&b"\x93NUMPY"[..]).is_err());
    }

    #[test]
    fn small_floats_have_their_values() {
        assert_eq!([0x38, 0x7e, 0x01].map(|code| narrow(&[code], DType::F8E4M3, 0)), [1.0, 448.0, 2f64.powi(-9)]);
        assert_eq!([0x3c, 0x7b, 0xfc].map(|code| narrow(&[code], DType::F8E5M2, 0)), [1.0, 57344.0, f64::NEG_INFINITY]);
        assert_eq!([0, 1, 2, 3].map(|i| narrow(&[0b11_10_01_00], DType::I2, i)), [0.0, 1.0, -2.0, -1.0]);
    }
}
