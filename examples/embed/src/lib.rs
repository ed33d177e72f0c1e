//! What the programs here share: cases in `.npz` archives, and outputs as numbers.
use npyz::npz::NpzArchive;
use pavage_runtime::{DType, Tensor};
use std::{
    error::Error,
    io::{Read, Seek},
};

/// The elements of an output; an error for dtypes that are not compared.
pub fn values(t: &Tensor) -> Result<Vec<f64>, Box<dyn Error>> {
    Ok(match t.dtype() {
        DType::F32 => t.as_slice::<f32>()?.iter().map(|v| f64::from(*v)).collect(),
        DType::F16 => t.as_slice::<half::f16>()?.iter().map(|v| v.to_f64()).collect(),
        DType::F64 => t.as_slice::<f64>()?.to_vec(),
        DType::I64 => t.as_slice::<i64>()?.iter().map(|v| *v as f64).collect(),
        DType::I32 => t.as_slice::<i32>()?.iter().map(|v| f64::from(*v)).collect(),
        DType::I8 => t.as_slice::<i8>()?.iter().map(|v| f64::from(*v)).collect(),
        DType::U8 => t.as_slice::<u8>()?.iter().map(|v| f64::from(*v)).collect(),
        other => return Err(format!("outputs of dtype {other} are not compared").into()),
    })
}

/// An array of the archive, in row-major order.
pub fn read<R: Read + Seek>(archive: &mut NpzArchive<R>, name: &str) -> Result<Tensor, Box<dyn Error>> {
    let file = archive.by_name(name)?.ok_or_else(|| format!("the archive has no `{name}`"))?;
    let shape: Vec<usize> = file.shape().iter().map(|d| *d as usize).collect();
    Ok(match file.dtype().descr().trim_matches('\'') {
        "<f4" => Tensor::from_slice(&shape, &file.into_vec::<f32>()?)?,
        "<f2" => Tensor::from_slice(&shape, &file.into_vec::<half::f16>()?)?,
        "<f8" => Tensor::from_slice(&shape, &file.into_vec::<f64>()?)?,
        "<i8" => Tensor::from_slice(&shape, &file.into_vec::<i64>()?)?,
        "<i4" => Tensor::from_slice(&shape, &file.into_vec::<i32>()?)?,
        "|i1" => Tensor::from_slice(&shape, &file.into_vec::<i8>()?)?,
        "|u1" => Tensor::from_slice(&shape, &file.into_vec::<u8>()?)?,
        other => return Err(format!("`{name}` has element type {other}, which this example does not read").into()),
    })
}
