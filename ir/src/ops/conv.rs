//! Convolution and its gradient by the input.
use super::{
    demand,
    elements::{self, Num, out, store},
    factors, length_is,
    matmul::axpy,
    number, rank_is, result,
};
use crate::{
    DType, Dim, Tensor, TensorType,
    attr::Layout,
    op::{EvalArgs, TypeArgs},
};

/// Where an image's channel and first spatial axis stand.
pub(super) fn image_axes(rank: usize, layout: Layout) -> (usize, usize) {
    match layout {
        Layout::ChannelsFirst => (1, 2),
        Layout::ChannelsLast => (rank - 1, 1),
    }
}

/// Elements that a kernel of `kernel` elements spans.
pub(super) fn span(kernel: &Dim, dilation: usize) -> Dim {
    (kernel.clone() - Dim::one()) * Dim::from(dilation) + Dim::one()
}

/// Fails unless windows over `spatial` axes are described by one positive entry each.
pub(super) fn check_windows(spatial: usize, strides: &[usize], dilations: &[usize], lo: &[i64], hi: &[i64]) -> Result<(), String> {
    length_is("strides", strides.len(), spatial)?;
    length_is("dilations", dilations.len(), spatial)?;
    length_is("lo", lo.len(), spatial)?;
    length_is("hi", hi.len(), spatial)?;
    for (what, v) in strides.iter().map(|v| ("stride", *v)).chain(dilations.iter().map(|v| ("dilation", *v))) {
        demand((1..=LIMIT as usize).contains(&v), || format!("{what} {v} is not in 1..={LIMIT}"))?;
    }
    for v in lo.iter().chain(hi) {
        demand((-LIMIT..=LIMIT).contains(v), || format!("padding {v} is beyond {LIMIT}"))?;
    }
    Ok(())
}

/// The largest stride, dilation and padding, so that extents computed with them do not overflow.
pub(super) const LIMIT: i64 = 1 << 31;

/// Result dtype: that of the operands, `i32` for narrower integers.
fn out_dtype(dtype: DType) -> DType {
    if dtype.is_int() && dtype.bits() < 32 { DType::I32 } else { dtype }
}

fn divides(groups: usize, what: &str, channels: &Dim) -> Result<(), String> {
    match channels.as_const() {
        Some(c) => demand(c.rem_euclid(groups as i64) == 0, || format!("{c} {what} channels do not split into {groups} groups")),
        None => Ok(()),
    }
}

fn check(x: &TensorType, w: &TensorType, groups: usize) -> Result<usize, String> {
    number("x", x)?;
    factors(x, w)?;
    demand(x.rank() >= 3, || format!("x must have a batch, a channel and spatial axes, got {x}"))?;
    rank_is("w", w, x.rank())?;
    demand((1..=LIMIT as usize).contains(&groups), || format!("{groups} groups"))?;
    Ok(x.rank() - 2)
}

pub(crate) fn infer(
    args: TypeArgs,
    strides: &[usize],
    dilations: &[usize],
    lo: &[i64],
    hi: &[i64],
    groups: &usize,
    layout: &Layout,
) -> Result<Vec<TensorType>, String> {
    let (x, w) = (args.types[0], args.types[1]);
    let spatial = check(x, w, *groups)?;
    check_windows(spatial, strides, dilations, lo, hi)?;
    let (channel, first) = image_axes(x.rank(), *layout);
    let channels = &x.shape[channel];
    let expected = w.shape[1].clone() * Dim::from(*groups);
    demand(*channels == expected, || format!("x has {channels} channels, w takes {expected} ({} in each of {groups} groups)", w.shape[1]))?;
    divides(*groups, "output", &w.shape[0])?;
    let mut shape = x.shape.clone();
    shape[channel] = w.shape[0].clone();
    for i in 0..spatial {
        let padded = x.shape[first + i].clone() + Dim::from(lo[i]) + Dim::from(hi[i]);
        let span = span(&w.shape[2 + i], dilations[i]);
        let room = padded.clone() - span.clone();
        demand(room.as_const().is_none_or(|v| v >= 0), || format!("spatial axis {i}: the kernel spans {span}, the padded input has {padded}"))?;
        shape[first + i] = room.div(&Dim::from(strides[i])) + Dim::one();
    }
    Ok(vec![result(out_dtype(x.dtype), shape)?])
}

#[allow(clippy::too_many_arguments)] // One parameter an attribute of the row.
pub(crate) fn infer_transpose(
    args: TypeArgs,
    strides: &[usize],
    dilations: &[usize],
    lo: &[i64],
    hi: &[i64],
    extra: &[usize],
    groups: &usize,
    layout: &Layout,
) -> Result<Vec<TensorType>, String> {
    let (x, w) = (args.types[0], args.types[1]);
    let spatial = check(x, w, *groups)?;
    check_windows(spatial, strides, dilations, lo, hi)?;
    length_is("extra", extra.len(), spatial)?;
    demand(extra.iter().all(|e| *e <= LIMIT as usize), || format!("extra {extra:?} is beyond {LIMIT}"))?;
    let (channel, first) = image_axes(x.rank(), *layout);
    demand(x.shape[channel] == w.shape[0], || format!("x has {} channels, w takes {}", x.shape[channel], w.shape[0]))?;
    divides(*groups, "input", &w.shape[0])?;
    let mut shape = x.shape.clone();
    shape[channel] = w.shape[1].clone() * Dim::from(*groups);
    for i in 0..spatial {
        let spread = (x.shape[first + i].clone() - Dim::one()) * Dim::from(strides[i]) + span(&w.shape[2 + i], dilations[i]);
        shape[first + i] = spread + Dim::from(extra[i]) - Dim::from(lo[i]) - Dim::from(hi[i]);
    }
    Ok(vec![result(out_dtype(x.dtype), shape)?])
}

/// A stretch of elements that one kernel tap connects: `len` neighbours from `dense` on, and as many from
/// `spread` on, a stride apart.
struct Run {
    dense: usize,
    spread: usize,
    len: usize,
}

/// What connects the two sides of a convolution, for one channel pair.
struct Taps {
    /// Runs of each kernel element, in row-major order.
    runs: Vec<Vec<Run>>,
    stride: usize,
}

/// Position `i` of the dense side meets `i * stride + k * dilation - lo` of the spread side.
fn taps(dense: &[usize], spread: &[usize], kernel: &[usize], window: &Window) -> Taps {
    let Window { strides, dilations, lo } = window;
    let last = dense.len() - 1;
    let (dense_steps, spread_steps) = (elements::strides(dense), elements::strides(spread));
    let meet = |axis: usize, i: usize, k: usize| {
        let at = i as i128 * strides[axis] as i128 + k as i128 * dilations[axis] as i128 - i128::from(lo[axis]);
        usize::try_from(at).ok().filter(|at| *at < spread[axis])
    };
    let mut runs = vec![];
    let positions = |shape: &[usize]| {
        let steps = elements::strides(shape);
        let shape = shape.to_vec();
        (0..shape.iter().product::<usize>()).map(move |p| shape.iter().zip(&steps).map(|(n, s)| p / s % n).collect::<Vec<_>>())
    };
    for k in positions(kernel) {
        let mut of_tap: Vec<Run> = vec![];
        for row in positions(&dense[..last]) {
            let at: Option<usize> = row.iter().enumerate().map(|(axis, &i)| Some(meet(axis, i, k[axis])? * spread_steps[axis])).sum();
            let Some(at) = at else { continue };
            let base: usize = row.iter().zip(&dense_steps).map(|(i, s)| i * s).sum();
            let mut inside = (0..dense[last]).filter_map(|i| Some((i, meet(last, i, k[last])?)));
            let Some((first, from)) = inside.next() else { continue };
            let len = 1 + inside.count();
            let run = Run { dense: base + first, spread: at + from, len };
            match of_tap.last_mut() {
                // Whole rows side by side are one run.
                Some(p) if strides[last] == 1 && p.dense + p.len == run.dense && p.spread + p.len == run.spread => p.len += len,
                _ => of_tap.push(run),
            }
        }
        runs.push(of_tap);
    }
    Taps { runs, stride: strides[last] }
}

/// Both sides of a convolution as `[n, c, spatial...]` and what it takes to sum over them.
struct Sides<'a, T> {
    x: Vec<T>,
    w: Vec<T>,
    batch: usize,
    groups: usize,
    x_spatial: Vec<usize>,
    out_spatial: Vec<usize>,
    kernel: &'a [usize],
    shape: Vec<usize>,
    dtype: DType,
}

fn sides<'a, T: Num>(args: &EvalArgs<'a>, groups: usize, layout: Layout) -> Result<Sides<'a, T>, String> {
    let (x, w, (dtype, shape)) = (args.tensors[0], args.tensors[1], out(args, 0)?);
    let (_, first) = image_axes(shape.len(), layout);
    let spatial = first..first + shape.len() - 2;
    let (x_spatial, out_spatial) = (x.shape()[spatial.clone()].to_vec(), shape[spatial].to_vec());
    let values = channels_first(T::load(x), x.shape(), layout);
    Ok(Sides { x: values, w: T::load(w), batch: shape[0], groups, x_spatial, out_spatial, kernel: &w.shape()[2..], shape, dtype })
}

/// Elements of an image in the order `[n, c, spatial...]`.
fn channels_first<T: Num>(values: Vec<T>, shape: &[usize], layout: Layout) -> Vec<T> {
    match layout {
        Layout::ChannelsFirst => values,
        Layout::ChannelsLast => swap(&values, shape[1..shape.len() - 1].iter().product(), shape[shape.len() - 1]),
    }
}

/// `[n, a, b]` as `[n, b, a]`.
fn swap<T: Num>(values: &[T], a: usize, b: usize) -> Vec<T> {
    values.chunks_exact((a * b).max(1)).flat_map(|plane| (0..b).flat_map(move |j| (0..a).map(move |i| plane[i * b + j]))).collect()
}

fn finish<T: Num>(sides: Sides<T>, acc: Vec<T>, layout: Layout) -> Result<Vec<Tensor>, String> {
    let plane = sides.out_spatial.iter().product();
    let values = match layout {
        Layout::ChannelsFirst => acc,
        Layout::ChannelsLast => swap(&acc, sides.shape[sides.shape.len() - 1], plane),
    };
    Ok(vec![store(sides.dtype, sides.shape, &values)?])
}

pub(crate) fn eval(
    args: EvalArgs,
    strides: &[usize],
    dilations: &[usize],
    lo: &[i64],
    _hi: &[i64],
    groups: &usize,
    layout: &Layout,
) -> Result<Vec<Tensor>, String> {
    let window = Window { strides, dilations, lo };
    if args.tensors[0].dtype().is_float() {
        gather(sides::<f64>(&args, *groups, *layout)?, &window, *layout)
    } else {
        gather(sides::<i64>(&args, *groups, *layout)?, &window, *layout)
    }
}

#[allow(clippy::too_many_arguments)] // One parameter an attribute of the row.
pub(crate) fn eval_transpose(
    args: EvalArgs,
    strides: &[usize],
    dilations: &[usize],
    lo: &[i64],
    _hi: &[i64],
    _extra: &[usize],
    groups: &usize,
    layout: &Layout,
) -> Result<Vec<Tensor>, String> {
    let window = Window { strides, dilations, lo };
    if args.tensors[0].dtype().is_float() {
        scatter(sides::<f64>(&args, *groups, *layout)?, &window, *layout)
    } else {
        scatter(sides::<i64>(&args, *groups, *layout)?, &window, *layout)
    }
}

/// How the windows lie.
struct Window<'a> {
    strides: &'a [usize],
    dilations: &'a [usize],
    lo: &'a [i64],
}

/// A convolution: the dense side is the output, each element of which gathers from its window.
fn gather<T: Num>(s: Sides<T>, window: &Window, layout: Layout) -> Result<Vec<Tensor>, String> {
    let taps = taps(&s.out_spatial, &s.x_spatial, s.kernel, window);
    accumulate(
        s,
        &taps,
        layout,
        |_, _, o, c, inputs| o * inputs + c,
        |to, from, w, run| {
            let (to, from) = (&mut to[run.dense..run.dense + run.len], &from[run.spread..]);
            if taps.stride == 1 {
                axpy(to, w, from);
            } else {
                to.iter_mut().zip(from.iter().step_by(taps.stride)).for_each(|(to, from)| *to = to.add(w.mul(*from)));
            }
        },
    )
}

/// The gradient by the input: the dense side is the operand, each element of which scatters over its window.
fn scatter<T: Num>(s: Sides<T>, window: &Window, layout: Layout) -> Result<Vec<Tensor>, String> {
    let taps = taps(&s.x_spatial, &s.out_spatial, s.kernel, window);
    let weights = |group: usize, per_group: usize, o: usize, c: usize, inputs: usize| (group * inputs + c) * per_group + o % per_group;
    accumulate(s, &taps, layout, weights, |to, from, w, run| {
        let from = &from[run.dense..run.dense + run.len];
        to[run.spread..].iter_mut().step_by(taps.stride).zip(from).for_each(|(to, from)| *to = to.add(w.mul(*from)));
    })
}

/// Adds up the products of every output plane with the input planes of its group. `weights` is the kernel's place for
/// (group, outputs a group, output, input of the group, inputs a group); `add` adds one run of a kernel element.
fn accumulate<T: Num>(
    s: Sides<T>,
    taps: &Taps,
    layout: Layout,
    weights: impl Fn(usize, usize, usize, usize, usize) -> usize,
    add: impl Fn(&mut [T], &[T], T, &Run),
) -> Result<Vec<Tensor>, String> {
    let (x_plane, out_plane): (usize, usize) = (s.x_spatial.iter().product(), s.out_spatial.iter().product());
    let mut acc = vec![T::ZERO; s.shape.iter().product()];
    if !acc.is_empty() && !s.x.is_empty() && !s.w.is_empty() {
        let outputs = acc.len() / out_plane / s.batch;
        let (per_group, inputs) = (outputs / s.groups, s.x.len() / x_plane / s.batch / s.groups);
        for (p, to) in acc.chunks_exact_mut(out_plane).enumerate() {
            let (n, o) = (p / outputs, p % outputs);
            let group = o / per_group;
            for c in 0..inputs {
                let plane = ((n * s.groups + group) * inputs + c) * x_plane;
                let from = &s.x[plane..plane + x_plane];
                let elements = &s.w[weights(group, per_group, o, c, inputs) * taps.runs.len()..];
                for (w, runs) in elements.iter().zip(&taps.runs) {
                    runs.iter().for_each(|run| add(to, from, *w, run));
                }
            }
        }
    }
    finish(s, acc, layout)
}
