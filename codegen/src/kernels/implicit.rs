//! Convolutions as contractions: pixels are rows, output channels columns, and the taps times the channels of a group are
//! contracted. Nothing is copied: the contraction's operands are the convolution's, at coordinates computed from row and
//! contracted index, guarded where the window hangs over the edge.
use super::gemm_cpu::plain_load;
use super::rewrite::{copy, outputs, within};
use super::{
    ArgFacts, Pack,
    pack::{Cells, Walk},
};
use pavage_ir::{DType, Dim, Expr, ExprId, Heart, Region, Scalar, ScalarFn, TensorType, attr::Layout};

/// A region whose heart is a contraction, and how its constants are packed.
pub(super) struct Product {
    /// The region; arguments are those of the original, packed ones with their packed shape.
    pub(super) region: Region,
    /// Arguments to pack.
    pub(super) packs: Vec<(usize, Pack)>,
}

/// `region` as a contraction, if it is one or a convolution.
pub(super) fn product(region: &Region, facts: &ArgFacts) -> Option<Product> {
    match &region.heart {
        Heart::Contract { .. } => Some(contraction(region, facts)),
        Heart::Conv { .. } => convolution(region, facts),
        _ => None,
    }
}

/// A contraction as it is; constant bytes on the right come as `[n][k]`.
fn contraction(from: &Region, facts: &ArgFacts) -> Product {
    let mut region = from.clone();
    let packs = turned(from, facts).map_or(vec![], |(load, arg, walk)| {
        let p = from.space.len();
        let batch = walk.batch.iter().map(|(n, _)| Dim::from(*n as i64));
        let shape = batch.chain([walk.n.0, walk.k[0].0].map(|n| Dim::from(n as i64))).collect();
        let at = plain_load(from, load, p + 1).map_or(vec![], |(_, at)| at.strides);
        let index = (0..p - 2).filter(|i| !at[*i].is(0)).chain([p - 1, p]).map(Dim::axis).collect();
        let dtype = region.args[arg].dtype;
        region.args[arg] = TensorType { dtype, shape };
        region.exprs[load.0 as usize].0 = Expr::Load { arg: arg as u32, index, guard: None };
        vec![(arg, Pack::Walk(walk))]
    });
    Product { region, packs }
}

/// The load of a right operand of constant bytes that does not run along the contracted axis, its argument, and how that is turned round.
fn turned(from: &Region, facts: &ArgFacts) -> Option<(ExprId, usize, Walk)> {
    let Heart::Contract { k, rhs, acc: DType::I32, .. } = &from.heart else { return None };
    let p = from.space.len();
    let (arg, at) = plain_load(from, *rhs, p + 1)?;
    let loads: Vec<usize> = (0..from.exprs.len()).filter(|i| matches!(from.exprs[*i].0, Expr::Load { arg: a, .. } if a as usize == arg)).collect();
    let ([load], dtype) = (loads.as_slice(), from.args[arg].dtype) else { return None };
    facts.constant(arg)?;
    if p < 2 || dtype.bits() != 8 || at.strides[p].is(1) || !at.strides[p - 2].is(0) {
        return None;
    }
    let size = |d: &Dim| d.as_const().and_then(|n| usize::try_from(n).ok());
    let strided = |axis: usize, extent: &Dim| Some((size(extent)?, at.strides[axis].as_const()?));
    let batch = (0..p - 2).filter(|i| !at.strides[*i].is(0)).map(|i| strided(i, &from.space[i])).collect::<Option<_>>()?;
    let (n, k) = (strided(p - 1, &from.space[p - 1])?, vec![strided(p, k)?]);
    let walk = Walk { batch, n, k, start: at.rest.as_const()?, width: 1, group: 1, dtype, cells: Cells::Whole };
    Some((ExprId(*load as u32), arg, walk))
}

fn convolution(from: &Region, facts: &ArgFacts) -> Option<Product> {
    let Heart::Conv { window, groups, x, input, w, weights, acc } = &from.heart else { return None };
    let rank = input.len();
    let spatial = rank.checked_sub(2)?;
    let (channel, first) = if window.layout == Layout::ChannelsLast { (rank - 1, 1) } else { (1, 2) };
    let taps: Vec<i64> = weights[2..].iter().map(Dim::as_const).collect::<Option<_>>()?;
    // The channels of one group, in and out.
    let (c, o) = (weights[1].as_const()?, weights[0].as_const()? / *groups as i64);
    let pixels: Dim = from.space[first..first + spatial].iter().cloned().product();
    let rows = from.space[0].clone() * pixels;
    let k = taps.iter().product::<i64>() * c;
    let mut space = vec![rows, Dim::from(o)];
    if *groups > 1 {
        space.insert(0, Dim::from(*groups));
    }
    let p = space.len();
    let mut extents = space.clone();
    extents.push(Dim::from(k));
    let group = if *groups > 1 { Dim::axis(0) } else { Dim::ZERO };
    // The convolution's output coordinates.
    let mut old = vec![Dim::ZERO; rank];
    let mut rest = Dim::axis(p - 2);
    for axis in (first..first + spatial).rev() {
        old[axis] = rest.mod_in(&from.space[axis], &extents);
        rest = rest.div_in(&from.space[axis], &extents);
    }
    old[0] = rest;
    old[channel] = group.clone() * Dim::from(o) + Dim::axis(p - 1);

    let mut out = Region::new(from.name.clone(), space);
    out.args.clone_from(&from.args);
    // Where a contracted index stands: channels are innermost where they lie side by side.
    let at_k = Dim::axis(p);
    let (tap_of, channel_of) = if window.layout == Layout::ChannelsLast {
        (at_k.div_in(&Dim::from(c), &extents), at_k.mod_in(&Dim::from(c), &extents))
    } else {
        let all = Dim::from(taps.iter().product::<i64>());
        (at_k.mod_in(&all, &extents), at_k.div_in(&all, &extents))
    };
    let mut tap_at = vec![Dim::ZERO; spatial];
    let mut rest = tap_of;
    for i in (0..spatial).rev() {
        tap_at[i] = rest.mod_in(&Dim::from(taps[i]), &extents);
        rest = if i == 0 { Dim::ZERO } else { rest.div_in(&Dim::from(taps[i]), &extents) };
    }
    let mut inside = None;
    let mut at = old.clone();
    for i in 0..spatial {
        let place = old[first + i].clone() * Dim::from(window.strides[i]) + tap_at[i].clone() * Dim::from(window.dilations[i]) - Dim::from(window.lo[i]);
        inside = within(&mut out, inside, &place, &input[first + i], &extents);
        at[first + i] = place;
    }
    at[channel] = group.clone() * Dim::from(c) + channel_of.clone();
    let lhs = copy(from, &mut out, *x, &at, inside);
    let lhs = only_inside(&mut out, inside, lhs);

    let mut packs = vec![];
    let rhs = match packing(from, *w, facts, *groups, o, c, &taps, window.layout) {
        Some((arg, walk)) => {
            let dtype = from.args[arg].dtype;
            let (shape, index) = if walk.width == 1 {
                (vec![Dim::from(*groups), Dim::from(o), Dim::from(k)], vec![group, Dim::axis(p - 1), at_k])
            } else {
                (vec![Dim::from(*groups), Dim::from(k), Dim::from(o)], vec![group, at_k, Dim::axis(p - 1)])
            };
            out.args[arg] = TensorType { dtype, shape };
            packs.push((arg, Pack::Walk(walk)));
            let load = out.push(Expr::Load { arg: arg as u32, index, guard: None }, dtype);
            let want = from.dtype(*w);
            if dtype == want { load } else { out.push(Expr::Cast(load), want) }
        }
        None => {
            let index: Vec<Dim> = [old[channel].clone(), channel_of].into_iter().chain(tap_at).collect();
            copy(from, &mut out, *w, &index, None)
        }
    };
    outputs(from, &mut out, &old);
    out.heart = Heart::Contract { k: Dim::from(k), lhs, rhs, acc: *acc };
    Some(Product { region: out, packs })
}

/// How constant weights are laid out as `[group][k][o]`, or `[group][o][k]` where the columns are odd or of bytes.
#[expect(clippy::too_many_arguments, reason = "the sizes of one convolution")]
fn packing(from: &Region, w: ExprId, facts: &ArgFacts, groups: usize, o: i64, c: i64, taps: &[i64], layout: Layout) -> Option<(usize, Walk)> {
    let (arg, at) = plain_load(from, w, taps.len() + 2)?;
    let loads = from.exprs.iter().filter(|(e, _)| matches!(e, Expr::Load { arg: a, .. } if *a as usize == arg)).count();
    facts.constant(arg)?;
    let dtype = from.args[arg].dtype;
    if loads != 1 || dtype.bits() < 8 {
        return None;
    }
    let strides: Vec<i64> = at.strides.iter().map(Dim::as_const).collect::<Option<_>>()?;
    let channels = (usize::try_from(c).ok()?, strides[1]);
    let mut k: Vec<(usize, i64)> = taps.iter().zip(&strides[2..]).map(|(n, s)| (*n as usize, *s)).collect();
    if layout == Layout::ChannelsLast {
        k.push(channels)
    } else {
        k.insert(0, channels)
    }
    let all: i64 = taps.iter().product::<i64>() * c;
    // The matrix units take bytes along the contracted axis only.
    let bytes = matches!(from.heart, Heart::Conv { acc: DType::I32, .. }) && dtype.bits() == 8;
    let width = if bytes || o % 8 != 0 && all % 8 == 0 && dtype.bits() == 16 { 1 } else { usize::try_from(o).ok()? };
    let walk = Walk {
        batch: vec![(groups, strides[0] * o)],
        n: (usize::try_from(o).ok()?, strides[0]),
        k,
        start: at.rest.as_const()?,
        width,
        group: 1,
        dtype,
        cells: Cells::Whole,
    };
    Some((arg, walk))
}

/// The operand, 0 outside. A guarded load is that already.
fn only_inside(out: &mut Region, inside: Option<ExprId>, v: ExprId) -> ExprId {
    let Some(inside) = inside else { return v };
    if matches!(out.expr(v), Expr::Load { guard: Some(g), .. } if *g == inside) {
        return v;
    }
    let dtype = out.dtype(v);
    let zero = out.constant(Scalar::I(0), dtype);
    out.push(Expr::Call(ScalarFn::Select, vec![inside, v, zero]), dtype)
}
