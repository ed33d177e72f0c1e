//! Attention: type rule and reference evaluator.
use crate::{
    DType, Dim, Real, Scalar, Tensor, TensorType,
    op::{EvalArgs, TypeArgs},
};
use std::ops::Range;

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
    let (q, k, v) = (args.tensors[0], args.tensors[1], args.tensors[2]);
    let rank = q.shape().len();
    let keys = 0..k.shape()[rank - 2];
    let found = rows(args, scale, std::slice::from_ref(&keys), &mut |r| r.sums.iter().map(|x| x / r.total).collect());
    let mut shape = q.shape().to_vec();
    shape[rank - 1] = v.shape()[rank - 1];
    Ok(vec![Tensor::from_scalars(q.dtype(), shape, found.into_iter().map(Scalar::F))])
}

pub(crate) fn infer_parts(args: TypeArgs, scale: &Real, part: &Dim) -> Result<Vec<TensorType>, String> {
    if part.as_const().is_some_and(|n| n < 1) {
        return Err(format!("a part of {part} keys"));
    }
    let mut types = infer(args, scale)?;
    let ty = &mut types[0];
    let rank = ty.rank();
    ty.dtype = partial(ty.dtype);
    ty.shape[rank - 1] = ty.shape[rank - 1].clone() + Dim::from(2i64);
    ty.shape.insert(rank - 2, args.types[1].shape[rank - 2].ceil_div(part));
    Ok(types)
}

/// The dtype of the results of parts.
pub(crate) fn partial(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// As [`eval`], a part of the keys at a time.
pub(crate) fn eval_parts(args: EvalArgs, scale: &Real, part: &Dim) -> Result<Vec<Tensor>, String> {
    let shape = args.results[0].const_shape().ok_or("its extents are not known")?;
    let part = part.as_const().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0).ok_or_else(|| format!("a part of {part} keys"))?;
    let [outer @ .., parts, s, width] = shape.as_slice() else { return Err("its result has too few axes".into()) };
    let keys = args.tensors[1].shape()[outer.len()];
    let runs: Vec<Range<usize>> = (0..keys).step_by(part).map(|first| first..(first + part).min(keys)).collect();
    let found = rows(args, scale, &runs, &mut |r| {
        let shown = |x: f64| if r.hidden { 0.0 } else { x };
        r.sums.iter().map(|x| shown(*x)).chain([r.top, shown(r.total)]).collect()
    });
    // Found row by row; here a part is outside of the rows.
    let mut out = vec![Scalar::F(0.0); found.len()];
    for (at, v) in found.into_iter().enumerate() {
        let (p, row) = (at / width % parts, at / width / parts);
        out[((row / s * parts + p) * s + row % s) * width + at % width] = Scalar::F(v);
    }
    Ok(vec![Tensor::from_scalars(args.results[0].dtype, shape.clone(), out)])
}

/// A row over a run of keys.
struct Row {
    /// Largest score; NaN if any is.
    top: f64,
    /// Whether every score is minus infinity.
    hidden: bool,
    /// Sums of values, weighted by the exponentials of how far their scores are below the largest.
    sums: Vec<f64>,
    /// Sum of these weights.
    total: f64,
}

/// The numbers that `finish` makes of each row over each run of keys: rows in order, runs innermost.
fn rows(args: EvalArgs, scale: &Real, runs: &[Range<usize>], finish: &mut dyn FnMut(&Row) -> Vec<f64>) -> Vec<f64> {
    let [q, k, v] = [args.tensors[0], args.tensors[1], args.tensors[2]];
    let rank = q.shape().len();
    let (s, e) = (q.shape()[rank - 2], q.shape()[rank - 1]);
    let (t, d) = (k.shape()[rank - 2], v.shape()[rank - 1]);
    let batch: usize = q.shape()[..rank - 2].iter().product();
    let (qs, ks, vs) = (q.to_f64(), k.to_f64(), v.to_f64());
    let mask = args.tensors.get(3).map(|m| m.to_f64());
    let mut out = vec![];
    let mut scores = vec![0.0; t];
    for b in 0..batch {
        for i in 0..s {
            let row = &qs[(b * s + i) * e..][..e];
            for (j, score) in scores.iter_mut().enumerate() {
                let key = &ks[(b * t + j) * e..][..e];
                let dot: f64 = row.iter().zip(key).map(|(x, y)| x * y).sum();
                *score = dot * scale.get() + mask.as_ref().map_or(0.0, |m| m[(b * s + i) * t + j]);
            }
            for run in runs {
                let scores = &scores[run.clone()];
                let top = scores.iter().fold(f64::NEG_INFINITY, |top, x| if *x > top || x.is_nan() { *x } else { top });
                let (mut sums, mut total) = (vec![0.0; d], 0.0);
                for (j, score) in run.clone().zip(scores) {
                    let p = libm::exp(score - top);
                    total += p;
                    let value = &vs[(b * t + j) * d..][..d];
                    sums.iter_mut().zip(value).for_each(|(o, x)| *o += p * x);
                }
                out.extend(finish(&Row { top, hidden: scores.iter().all(|x| *x == f64::NEG_INFINITY), sums, total }));
            }
        }
    }
    out
}
