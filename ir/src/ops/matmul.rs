//! Matrix product.
use super::{
    demand,
    elements::{Num, out, store},
    extent_is, factors, number, rank_is, result,
};
use crate::{
    DType, Tensor, TensorType,
    op::{EvalArgs, TypeArgs},
};

pub(crate) fn infer(args: TypeArgs, out: &DType) -> Result<Vec<TensorType>, String> {
    let (a, b) = (args.types[0], args.types[1]);
    number("a", a)?;
    factors(a, b)?;
    demand(a.rank() >= 2, || format!("a must have rank 2 or more, got {a}"))?;
    rank_is("b", b, a.rank())?;
    demand(a.dtype.is_float() == out.is_float() && a.dtype.is_int() == out.is_int(), || format!("a product of {} cannot be {out}", a.dtype))?;
    let r = a.rank();
    for i in 0..r - 2 {
        extent_is(&format!("batch axis {i}"), &b.shape[i], &a.shape[i])?;
    }
    demand(a.shape[r - 1] == b.shape[r - 2], || format!("inner extents differ: {} in {a} and {} in {b}", a.shape[r - 1], b.shape[r - 2]))?;
    let mut shape = a.shape.clone();
    shape[r - 1] = b.shape[r - 1].clone();
    Ok(vec![result(*out, shape)?])
}

pub(crate) fn eval(args: EvalArgs, _out: &DType) -> Result<Vec<Tensor>, String> {
    if args.tensors[0].dtype().is_float() { product::<f64>(&args) } else { product::<i64>(&args) }
}

fn product<T: Num>(args: &EvalArgs) -> Result<Vec<Tensor>, String> {
    let (a, b, (dtype, shape)) = (args.tensors[0], args.tensors[1], out(args, 0)?);
    let r = a.shape().len();
    let (m, k, n) = (a.shape()[r - 2], a.shape()[r - 1], b.shape()[r - 1]);
    let (a, b) = (T::load(a), T::load(b));
    let mut acc = vec![T::ZERO; shape.iter().product()];
    if k > 0 && n > 0 {
        for (row, to) in acc.chunks_exact_mut(n).enumerate() {
            let (batch, a) = (row / m, &a[row * k..(row + 1) * k]);
            for (v, from) in a.iter().zip(b[batch * k * n..].chunks_exact(n)) {
                axpy(to, *v, from);
            }
        }
    }
    Ok(vec![store(dtype, shape, &acc)?])
}

/// `to += scale * from`.
pub(super) fn axpy<T: Num>(to: &mut [T], scale: T, from: &[T]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = to.add(scale.mul(*from));
    }
}
