//! Ensembles of decision trees.
use super::{
    demand,
    elements::{Num, out, store},
    float, integer, rank_is, result, same_shape,
};
use crate::{
    DType, Dim, Tensor, TensorType,
    attr::Aggregate,
    op::{EvalArgs, TypeArgs},
};

const OPERANDS: [&str; 10] = ["x", "feature", "mode", "threshold", "yes", "no", "missing", "roots", "target", "weight"];

pub(crate) fn infer(args: TypeArgs, targets: &usize, _aggregate: &Aggregate) -> Result<Vec<TensorType>, String> {
    let x = args.types[0];
    rank_is("x", x, 2)?;
    demand(matches!(x.dtype, DType::F32 | DType::F64), || format!("x must hold f32 or f64, got {x}"))?;
    for (name, ty) in OPERANDS.into_iter().zip(args.types).skip(1) {
        rank_is(name, ty, 1)?;
        match name {
            "threshold" | "weight" => float(name, ty)?,
            _ => integer(name, ty)?,
        }
    }
    for (name, ty) in OPERANDS.into_iter().zip(args.types).take(7).skip(2) {
        same_shape(&args.types[1].shape, &ty.shape).map_err(|e| format!("`feature` and `{name}`: {e}"))?;
    }
    same_shape(&args.types[8].shape, &args.types[9].shape).map_err(|e| format!("`target` and `weight`: {e}"))?;
    Ok(vec![result(x.dtype, vec![x.shape[0].clone(), Dim::from(*targets)])?])
}

/// The leaf value of `mode`.
const LEAF: i64 = 6;

pub(crate) fn eval(args: EvalArgs, targets: &usize, aggregate: &Aggregate) -> Result<Vec<Tensor>, String> {
    let (x, (dtype, shape)) = (args.tensors[0], out(&args, 0)?);
    let ints = |i: usize| i64::load(args.tensors[i]);
    let (feature, mode, yes, no, missing, roots, target) = (ints(1), ints(2), ints(4), ints(5), ints(6), ints(7), ints(8));
    let (threshold, weight) = (args.tensors[3].to_f64(), args.tensors[9].to_f64());
    let (rows, features) = (x.shape()[0], x.shape()[1]);
    let values = x.to_f64();
    let inside = |what: &str, v: i64, n: usize| usize::try_from(v).ok().filter(|v| *v < n).ok_or_else(|| format!("{what} {v} is not below {n}"));

    let mut sums = vec![0.0; rows * targets];
    let mut named = vec![false; rows * targets];
    for row in 0..rows {
        for root in &roots {
            let mut node = inside("node", *root, mode.len())?;
            let mut steps = 0;
            while mode[node] != LEAF {
                let v = values[row * features + inside("feature", feature[node], features)?];
                let t = threshold[node];
                let holds = match mode[node] {
                    _ if v.is_nan() && missing[node] == 1 => true,
                    0 => v <= t,
                    1 => v < t,
                    2 => v >= t,
                    3 => v > t,
                    4 => v == t,
                    5 => v != t,
                    m => return Err(format!("mode {m} of node {node} is not in 0..=6")),
                };
                node = inside("node", if holds { yes[node] } else { no[node] }, mode.len())?;
                steps += 1;
                demand(steps <= mode.len(), || format!("the tree at node {root} has a cycle"))?;
            }
            for leaf in yes[node]..no[node] {
                let leaf = inside("leaf weight", leaf, weight.len())?;
                let to = row * targets + inside("target", target[leaf], *targets)?;
                let w = weight[leaf];
                sums[to] = match aggregate {
                    Aggregate::Min if named[to] => sums[to].smaller(w),
                    Aggregate::Max if named[to] => sums[to].larger(w),
                    Aggregate::Min | Aggregate::Max => w,
                    Aggregate::Sum | Aggregate::Mean => sums[to] + w,
                };
                named[to] = true;
            }
        }
    }
    if *aggregate == Aggregate::Mean && !roots.is_empty() {
        sums.iter_mut().for_each(|v| *v /= roots.len() as f64);
    }
    Ok(vec![store(dtype, shape, &sums)?])
}
