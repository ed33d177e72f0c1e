//! Narrow numbers that stand for floats.
use super::{
    demand,
    elements::{out, store},
    result,
};
use crate::{
    DType, Dim, Tensor, TensorType,
    op::{EvalArgs, TypeArgs},
};

pub(crate) fn infer(args: TypeArgs, blocks: &[usize]) -> Result<Vec<TensorType>, String> {
    let x = args.types[0];
    let narrow = x.dtype.is_int() && x.dtype.bits() <= 8 || x.dtype.is_float() && x.dtype.bits() <= 16;
    demand(narrow, || format!("x must be integers of up to 8 bits or floats of up to 16, got {x}"))?;
    if args.types.len() == 1 {
        demand(blocks.is_empty(), || format!("blocks {blocks:?} without a scale"))?;
    } else {
        demand(blocks.len() == x.rank() && !blocks.contains(&0), || format!("one block of at least 1 an axis of {x}, got {blocks:?}"))?;
    }
    for (what, ty) in ["scale", "zero"].iter().zip(&args.types[1..]) {
        let shape: Vec<Dim> = x.shape.iter().zip(blocks).map(|(n, b)| n.ceil_div(&Dim::from(*b))).collect();
        demand(ty.shape == shape, || format!("{what} of {x} in blocks {blocks:?} is {ty}"))?;
    }
    if let [_, scale, rest @ ..] = args.types {
        demand(scale.dtype.is_float(), || format!("the scale must be floats, got {scale}"))?;
        demand(rest.iter().all(|z| z.dtype.is_float() || z.dtype.is_int()), || "the zero point must be numbers".into())?;
    }
    Ok(vec![result(DType::F32, x.shape.clone())?])
}

pub(crate) fn eval(args: EvalArgs, blocks: &[usize]) -> Result<Vec<Tensor>, String> {
    let (dtype, shape) = out(&args, 0)?;
    let x = args.tensors[0];
    let mut values = x.to_f64();
    let (scale, zero) = (args.tensors.get(1).map(|t| t.to_f64()), args.tensors.get(2).map(|t| t.to_f64()));
    if let Some(scale) = scale {
        for (i, v) in values.iter_mut().enumerate() {
            let (mut rest, mut at, mut stride) = (i, 0, 1);
            for (n, b) in shape.iter().zip(blocks).rev() {
                at += rest % n / b * stride;
                rest /= n;
                stride *= n.div_ceil(*b);
            }
            // Each step is rounded, as in the model's own arithmetic.
            let centred = zero.as_ref().map_or(*v as f32, |z| *v as f32 - z[at] as f32);
            *v = f64::from(centred * scale[at] as f32);
        }
    }
    Ok(vec![store(dtype, shape, &values)?])
}
