//! A convolution with windows of 3x3 by tiles: see [`crate::winograd`].
use super::{
    demand,
    elements::{out, store},
    extent_is, float, length_is, rank_is, result,
};
use crate::{
    Dim, Tensor, TensorType,
    op::{EvalArgs, TypeArgs},
    winograd::{Transforms, WINDOW, both_ways},
};

fn transforms(m: usize) -> Result<&'static Transforms, String> {
    Transforms::of(m).ok_or_else(|| format!("there are no transforms for tiles of {m}, only of 2 and 4"))
}

/// Tiles of `m` along each of `h` and `w`.
fn tiles(m: usize, h: &Dim, w: &Dim) -> [Dim; 2] {
    [h, w].map(|n| n.ceil_div(&Dim::from(m)))
}

pub(crate) fn infer_input(args: TypeArgs, m: &usize, lo: &[i64], hi: &[i64]) -> Result<Vec<TensorType>, String> {
    let (t, x) = (transforms(*m)?, args.types[0]);
    float("x", x)?;
    rank_is("x", x, 4)?;
    length_is("lo", lo.len(), 2)?;
    length_is("hi", hi.len(), 2)?;
    demand(lo.iter().chain(hi).all(|p| (0..WINDOW as i64).contains(p)), || format!("padding {lo:?} {hi:?} is not below {WINDOW}"))?;
    let out = |i: usize| x.shape[1 + i].clone() + Dim::from(lo[i] + hi[i] + 1 - WINDOW as i64);
    demand((0..2).all(|i| out(i).as_const().is_none_or(|n| n >= 1)), || format!("no window fits into {x}"))?;
    let [down, across] = tiles(*m, &out(0), &out(1));
    let count = x.shape[0].clone() * down * across;
    Ok(vec![result(x.dtype, vec![Dim::from(t.side() * t.side()), count, x.shape[3].clone()])?])
}

pub(crate) fn eval_input(args: EvalArgs, m: &usize, lo: &[i64], hi: &[i64]) -> Result<Vec<Tensor>, String> {
    let (t, x) = (transforms(*m)?, args.tensors[0]);
    let (dtype, shape) = out(&args, 0)?;
    let [n, h, w, c] = x.shape() else { return Err("x has four axes".into()) };
    let side = t.side();
    let sizes = [(h, 0), (w, 1)].map(|(n, i)| (*n as i64 + lo[i] + hi[i] + 1 - WINDOW as i64) as usize);
    let [down, across] = sizes.map(|n| n.div_ceil(*m));
    let (from, mut to) = (x.to_f64(), vec![0.0; shape.iter().product()]);
    let mut d = vec![0.0; side * side];
    for tile in 0..n * down * across {
        let (image, top, left) = (tile / (down * across), tile / across % down * m, tile % across * m);
        for channel in 0..*c {
            for (at, d) in d.iter_mut().enumerate() {
                let place = |first: usize, step: usize, lo: i64, n: usize| usize::try_from((first + step) as i64 - lo).ok().filter(|p| *p < n);
                let (y, x) = (place(top, at / side, lo[0], *h), place(left, at % side, lo[1], *w));
                *d = y.zip(x).map_or(0.0, |(y, x)| from[((image * h + y) * w + x) * c + channel]);
            }
            for (element, v) in both_ways(t.input, &d).into_iter().enumerate() {
                to[(element * shape[1] + tile) * c + channel] = v;
            }
        }
    }
    Ok(vec![store(dtype, shape, &to)?])
}

pub(crate) fn infer_filter(args: TypeArgs, m: &usize) -> Result<Vec<TensorType>, String> {
    let (t, w) = (transforms(*m)?, args.types[0]);
    float("w", w)?;
    rank_is("w", w, 4)?;
    demand(w.shape[2..].iter().all(|n| n.is(WINDOW as i64)), || format!("windows must be {WINDOW}x{WINDOW}, got {w}"))?;
    Ok(vec![result(w.dtype, vec![Dim::from(t.side() * t.side()), w.shape[1].clone(), w.shape[0].clone()])?])
}

pub(crate) fn eval_filter(args: EvalArgs, m: &usize) -> Result<Vec<Tensor>, String> {
    let (t, w) = (transforms(*m)?, args.tensors[0]);
    let (dtype, shape) = out(&args, 0)?;
    let (from, mut to) = (w.to_f64(), vec![0.0; shape.iter().product()]);
    let (c, o) = (shape[1], shape[2]);
    for (window, g) in from.chunks_exact(WINDOW * WINDOW).enumerate() {
        for (element, v) in both_ways(t.filter, g).into_iter().enumerate() {
            to[(element * c + window % c) * o + window / c] = v;
        }
    }
    Ok(vec![store(dtype, shape, &to)?])
}

pub(crate) fn infer_output(args: TypeArgs, m: &usize, shape: &[Dim]) -> Result<Vec<TensorType>, String> {
    let (t, x) = (transforms(*m)?, args.types[0]);
    float("x", x)?;
    rank_is("x", x, 3)?;
    length_is("shape", shape.len(), 4)?;
    let [down, across] = tiles(*m, &shape[1], &shape[2]);
    extent_is("elements of a tile", &x.shape[0], &Dim::from(t.side() * t.side()))?;
    extent_is("tiles", &x.shape[1], &(shape[0].clone() * down * across))?;
    extent_is("channels", &x.shape[2], &shape[3])?;
    Ok(vec![result(x.dtype, shape.to_vec())?])
}

pub(crate) fn eval_output(args: EvalArgs, m: &usize, _shape: &[Dim]) -> Result<Vec<Tensor>, String> {
    let (t, x) = (transforms(*m)?, args.tensors[0]);
    let (dtype, shape) = out(&args, 0)?;
    let [n, h, w, c] = shape[..] else { return Err("the result has four axes".into()) };
    let (count, [down, across]) = (x.shape()[1], [h, w].map(|n| n.div_ceil(*m)));
    let (from, mut to) = (x.to_f64(), vec![0.0; n * h * w * c]);
    for tile in 0..n * down * across {
        let (image, top, left) = (tile / (down * across), tile / across % down * m, tile % across * m);
        for channel in 0..c {
            let products: Vec<f64> = (0..x.shape()[0]).map(|element| from[(element * count + tile) * c + channel]).collect();
            for (at, v) in both_ways(t.output, &products).into_iter().enumerate() {
                let (y, x) = (top + at / m, left + at % m);
                if y < h && x < w {
                    to[((image * h + y) * w + x) * c + channel] = v;
                }
            }
        }
    }
    Ok(vec![store(dtype, shape, &to)?])
}
