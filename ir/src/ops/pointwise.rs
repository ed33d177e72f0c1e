//! Pointwise ops and `cast`.
use super::{
    demand,
    elements::{Num, out, store},
    result, same_shape,
};
use crate::{
    DType, Scalar, ScalarFn, Tensor, TensorType,
    op::{EvalArgs, TypeArgs},
};

pub(crate) fn infer(args: TypeArgs, f: ScalarFn) -> Result<Vec<TensorType>, String> {
    let dtypes: Vec<DType> = args.types.iter().map(|t| t.dtype).collect();
    let dtype = f.infer(&dtypes)?;
    demand(!dtypes.contains(&DType::Str), || "strings have no arithmetic or order here".into())?;
    args.types.windows(2).try_for_each(|pair| same_shape(&pair[0].shape, &pair[1].shape))?;
    Ok(vec![result(dtype, args.types[0].shape.clone())?])
}

/// The functions that whole models spend their time in, as plain closures that agree with [`ScalarFn::eval`]
/// before rounding.
fn fast(f: ScalarFn) -> Option<fn(f64, f64) -> f64> {
    Some(match f {
        ScalarFn::Add => |a, b| a + b,
        ScalarFn::Sub => |a, b| a - b,
        ScalarFn::Mul => |a, b| a * b,
        ScalarFn::Div => |a, b| a / b,
        ScalarFn::Max => Num::larger,
        ScalarFn::Min => Num::smaller,
        _ => return None,
    })
}

pub(crate) fn eval(args: EvalArgs, f: ScalarFn) -> Result<Vec<Tensor>, String> {
    let (dtype, shape) = out(&args, 0)?;
    if let (Some(f), DType::F32) = (fast(f), dtype) {
        let (a, b) = (args.tensors[0].to_f64(), args.tensors[1].to_f64());
        let values: Vec<f64> = a.iter().zip(&b).map(|(a, b)| f(*a, *b)).collect();
        return Ok(vec![store(dtype, shape, &values)?]);
    }
    // The type that arithmetic happens in: that of the last operand, for `select` too.
    let domain = args.tensors[args.tensors.len() - 1].dtype();
    let mut operands = vec![Scalar::I(0); args.tensors.len()];
    let n = args.tensors[0].count();
    let values = (0..n).map(|i| {
        operands.iter_mut().zip(args.tensors).for_each(|(v, t)| *v = t.get(i));
        f.eval(domain, &operands)
    });
    Ok(vec![Tensor::from_scalars(dtype, shape, values)])
}

pub(crate) fn infer_cast(args: TypeArgs, to: &DType) -> Result<Vec<TensorType>, String> {
    let from = args.types[0].dtype;
    demand(from != DType::Str && *to != DType::Str, || format!("cannot convert {from} to {to}"))?;
    Ok(vec![result(*to, args.types[0].shape.clone())?])
}

pub(crate) fn eval_cast(args: EvalArgs, to: &DType) -> Result<Vec<Tensor>, String> {
    let (_, shape) = out(&args, 0)?;
    let x = args.tensors[0];
    if x.dtype() == *to {
        return Ok(vec![x.clone()]);
    }
    Ok(vec![Tensor::from_scalars(*to, shape, (0..x.count()).map(|i| x.get(i)))])
}

pub(crate) fn infer_bitcast(args: TypeArgs, to: &DType) -> Result<Vec<TensorType>, String> {
    let from = args.types[0].dtype;
    let bits = |d: DType| if matches!(d, DType::Str | DType::Bool) { None } else { Some(d.bits()) };
    demand(bits(from).is_some() && bits(from) == bits(*to), || format!("cannot take the bits of {from} for {to}"))?;
    Ok(vec![result(*to, args.types[0].shape.clone())?])
}

pub(crate) fn eval_bitcast(args: EvalArgs, to: &DType) -> Result<Vec<Tensor>, String> {
    let (_, shape) = out(&args, 0)?;
    Tensor::new(*to, shape, args.tensors[0].bytes().to_vec()).map(|t| vec![t]).map_err(|e| e.to_string())
}
