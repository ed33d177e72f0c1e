//! Attention: type rule and reference evaluator.
use crate::{
    Real, Scalar, Tensor, TensorType,
    op::{EvalArgs, TypeArgs},
};

pub(crate) fn infer(args: TypeArgs, _scale: &Real) -> Result<Vec<TensorType>, String> {
    let (q, k, v) = (args.types[0], args.types[1], args.types[2]);
    let rank = q.rank();
    if rank < 2 || k.rank() != rank || v.rank() != rank {
        return Err(format!("q, k and v need one rank of at least 2, got {q}, {k}, {v}"));
    }
    if !q.dtype.is_float() || k.dtype != q.dtype || v.dtype != q.dtype {
        return Err(format!("q, k and v need one float dtype, got {}, {}, {}", q.dtype, k.dtype, v.dtype));
    }
    let (s, t) = (&q.shape[rank - 2], &k.shape[rank - 2]);
    for axis in 0..rank - 2 {
        if q.shape[axis] != k.shape[axis] || q.shape[axis] != v.shape[axis] {
            return Err(format!("axis {axis}: extents differ: {}, {} and {}", q.shape[axis], k.shape[axis], v.shape[axis]));
        }
    }
    if q.shape[rank - 1] != k.shape[rank - 1] {
        return Err(format!("q and k have depths {} and {}", q.shape[rank - 1], k.shape[rank - 1]));
    }
    if v.shape[rank - 2] != *t {
        return Err(format!("k has {t} rows, v {}", v.shape[rank - 2]));
    }
    if let Some(mask) = args.types.get(3) {
        let want: Vec<_> = q.shape[..rank - 2].iter().chain([s, t]).cloned().collect();
        if mask.shape != want || mask.dtype != q.dtype {
            return Err(format!("the mask is {mask}, expected {}", TensorType { dtype: q.dtype, shape: want }));
        }
    }
    let mut shape = q.shape.clone();
    shape[rank - 1] = v.shape[rank - 1].clone();
    Ok(vec![TensorType { dtype: q.dtype, shape }])
}

/// Scores, their exponentials and sums in f64, rounded once.
pub(crate) fn eval(args: EvalArgs, scale: &Real) -> Result<Vec<Tensor>, String> {
    let [q, k, v] = [args.tensors[0], args.tensors[1], args.tensors[2]];
    let rank = q.shape().len();
    let (s, e) = (q.shape()[rank - 2], q.shape()[rank - 1]);
    let (t, d) = (k.shape()[rank - 2], v.shape()[rank - 1]);
    let batch: usize = q.shape()[..rank - 2].iter().product();
    let (qs, ks, vs) = (q.to_f64(), k.to_f64(), v.to_f64());
    let mask = args.tensors.get(3).map(|m| m.to_f64());
    let mut out = Vec::with_capacity(batch * s * d);
    let mut scores = vec![0.0; t];
    for b in 0..batch {
        for i in 0..s {
            let row = &qs[(b * s + i) * e..][..e];
            for (j, score) in scores.iter_mut().enumerate() {
                let key = &ks[(b * t + j) * e..][..e];
                let dot: f64 = row.iter().zip(key).map(|(x, y)| x * y).sum();
                *score = dot * scale.get() + mask.as_ref().map_or(0.0, |m| m[(b * s + i) * t + j]);
            }
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let mut sums = vec![0.0; d];
            let mut total = 0.0;
            for (j, score) in scores.iter().enumerate() {
                let p = libm::exp(score - top);
                total += p;
                let value = &vs[(b * t + j) * d..][..d];
                sums.iter_mut().zip(value).for_each(|(o, x)| *o += p * x);
            }
            out.extend(sums.into_iter().map(|x| Scalar::F(x / total)));
        }
    }
    let mut shape = q.shape().to_vec();
    shape[rank - 1] = d;
    Ok(vec![Tensor::from_scalars(q.dtype(), shape, out)])
}
