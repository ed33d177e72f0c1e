//! Attention and rotary embedding of com.microsoft, as onnxruntime computes them: scores in f32.
use super::{
    attention::{Mask, Rule, append, attend, join_heads, scale_of, split_heads},
    linear::matmul,
    rotary::{Pairs, rotate},
    view::concat_along,
};
use crate::onnx::{
    build::{Builder, Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{
    DType, Dim, Op,
    ScalarFn::*,
    attr::{PadMode, ScatterFn},
};

/// Refuse operands and attributes that change the result and are not read.
fn refuse(cx: &Cx, operands: &[(usize, &str)], flags: &[&str]) -> Res<()> {
    if let Some((_, what)) = operands.iter().find(|(i, _)| cx.opt(*i).is_some()) {
        return missing(format!("the operand `{what}`"));
    }
    for name in flags {
        if cx.flag(name, false)? {
            return missing(format!("the attribute `{name}`"));
        }
    }
    Ok(())
}

fn heads_of(cx: &Cx, name: &str) -> Res<Dim> {
    match cx.int(name, 0)? {
        n @ 1..=0xffff => Ok(Dim::from(n)),
        n => invalid(format!("{name} is {n}")),
    }
}

/// What `mask_index` or `key_padding_mask` adds to scores, in `dtype`: `mask_filter_value` where a key is padding. Its forms: `[b, t]` and `[b, s, t]`,
/// 0 at padding; `[b]`, how many keys come first; `[2 b]`, where they end, then where they begin.
fn padding(cx: &mut Cx, mask: Val, dtype: DType, batch: &Dim, keys: &Dim) -> Res<Val> {
    let mut shape = cx.shape(mask);
    let one = Dim::one;
    let seen = match shape.len() {
        1 => {
            let columns = cx.emit(Op::Iota { dtype: DType::I64, shape: vec![keys.clone()], axis: 0 }, &[])?;
            let mask = cx.cast(mask, DType::I64)?;
            let bound = |cx: &mut Cx, start: Dim, test| -> Res<Val> {
                let part = cx.slice_axis(mask, 0, start, batch.clone())?;
                let part = cx.reshape(part, vec![batch.clone(), one(), one(), one()])?;
                cx.pointwise(test, &[columns, part])
            };
            let before = bound(cx, Dim::ZERO, Lt)?;
            if shape[0] == *batch {
                before
            } else if shape[0] == batch.clone() * Dim::from(2i64) {
                let after = bound(cx, batch.clone(), Ge)?;
                cx.pointwise(And, &[before, after])?
            } else {
                return missing(format!("a mask of type {}", cx.ty(mask)));
            }
        }
        2 | 3 => {
            let last = shape.len() - 1;
            shape[last] = cx.same_extent(keys, &shape[last])?;
            let mask = cx.with_shape(mask, shape.clone())?;
            shape.insert(1, one());
            if last == 1 {
                shape.insert(1, one());
            }
            let mask = cx.reshape(mask, shape)?;
            cx.with_number(Gt, mask, 0.0)?
        }
        _ => return missing(format!("a mask of type {}", cx.ty(mask))),
    };
    let filter = cx.float("mask_filter_value", -10000.0)?;
    let (open, closed) = (cx.scalar(dtype, 0.0), cx.scalar(dtype, filter));
    cx.pointwise(Select, &[seen, open, closed])
}

/// One attention without caches of its own: masks and scale as the attributes say, y as `[b, s, h * d]`.
fn plain(cx: &mut Cx, [q, k, v]: [Val; 3], keep: Option<Val>, bias: Option<Val>, past: &Dim) -> Res<Val> {
    let (dtype, qs, keys) = (cx.dtype(q), cx.shape(q), cx.shape(k)[2].clone());
    let mut mask = Mask::default();
    if let Some(keep) = keep {
        mask.added = Some(padding(cx, keep, dtype, &qs[0], &keys)?);
    }
    if let Some(bias) = bias {
        let bias = cx.cast(bias, dtype)?;
        mask.added = Some(match mask.added {
            Some(other) => cx.pointwise(Add, &[other, bias])?,
            None => bias,
        });
    }
    if cx.flag("unidirectional", false)? {
        let offset = cx.known_dims(DType::I64, &[], vec![past.clone()]);
        mask.band(cx, &qs[2], &keys, offset, None, Some(0))?;
    }
    let scale = given_scale(cx, &qs[3])?;
    let rule = Rule { scale, softcap: 0.0, scores: DType::F32, precision: DType::F32 };
    let stages = attend(cx, [q, k, v], &mask, &rule)?;
    join_heads(cx, stages.y)
}

/// A scale of 0 is none.
fn given_scale(cx: &Cx, depth: &Dim) -> Res<f64> {
    match (cx.float("scale", 0.0)?, depth.as_const()) {
        (0.0, Some(depth)) if depth > 0 => Ok(1.0 / (depth as f64).sqrt()),
        _ => scale_of(cx, depth),
    }
}

/// Columns `start..start + width` of the last axis.
fn columns(b: &mut Builder, x: Val, start: &Dim, width: &Dim) -> Res<Val> {
    let axis = b.rank(x).saturating_sub(1);
    b.slice_axis(x, axis, start.clone(), width.clone())
}

/// `Attention`: operands x `[b, s, i]`, weights `[i, q + k + v]`, bias, mask, past `[2, b, h, t, d]`, added scores.
pub(crate) fn attention(cx: &mut Cx) -> Res<Vec<Val>> {
    refuse(cx, &[(6, "past_sequence_length")], &["do_rotary", "past_present_share_buffer"])?;
    let (x, w) = (cx.arg(0)?, cx.arg(1)?);
    let heads = heads_of(cx, "num_heads")?;
    if cx.rank(x) != 3 || cx.rank(w) != 2 {
        return invalid(format!("x is {}, the weights are {}", cx.ty(x), cx.ty(w)));
    }
    let dtype = cx.dtype(x);
    let mut all = matmul(cx, x, w, dtype)?;
    if let Some(bias) = cx.opt(2) {
        all = cx.pointwise(Add, &[all, bias])?;
    }
    let widths: Vec<Dim> = match cx.ints_opt("qkv_hidden_sizes")? {
        Some(&[q, k, v]) => [q, k, v].into_iter().map(Dim::from).collect(),
        Some(other) => return invalid(format!("qkv_hidden_sizes {other:?}")),
        None => vec![cx.shape(w)[1].div(&Dim::from(3i64)); 3],
    };
    let mut at = Dim::ZERO;
    let mut parts = vec![];
    for width in &widths {
        let part = columns(cx, all, &at, width)?;
        parts.push(split_heads(cx, part, &heads)?);
        at = at + width.clone();
    }
    let [q, mut k, mut v] = [parts[0], parts[1], parts[2]];
    let mut past_len = Dim::ZERO;
    if let Some(past) = cx.opt(4) {
        let shape = cx.shape(past);
        if shape.len() != 5 {
            return invalid(format!("past is {}", cx.ty(past)));
        }
        past_len = shape[3].clone();
        let one = |cx: &mut Cx, i: i64| -> Res<Val> {
            let half = cx.slice_axis(past, 0, Dim::from(i), Dim::one())?;
            cx.reshape(half, shape[1..].to_vec())
        };
        let (pk, pv) = (one(cx, 0)?, one(cx, 1)?);
        (k, v) = (append(cx, Some(pk), k)?, append(cx, Some(pv), v)?);
    }
    let (keep, bias) = (cx.opt(3), cx.opt(5));
    let y = plain(cx, [q, k, v], keep, bias, &past_len)?;
    if !cx.wants(1) {
        return Ok(vec![y]);
    }
    let stack = |cx: &mut Cx, x: Val| {
        let mut shape = cx.shape(x);
        shape.insert(0, Dim::one());
        cx.reshape(x, shape)
    };
    let (k, v) = (stack(cx, k)?, stack(cx, v)?);
    let present = concat_along(cx, &[k, v], 0)?;
    Ok(vec![y, present])
}

/// Parts of a value `[b, s, h, n, d]` that packs n values, each as `[b, h, s, d]`.
fn unpack(cx: &mut Cx, x: Val, n: i64) -> Res<Vec<Val>> {
    let shape = cx.shape(x);
    if shape.len() != 5 || !shape[3].is(n) {
        return invalid(format!("{n} packed values of type {}", cx.ty(x)));
    }
    let part = |i| {
        let part = cx.slice_axis(x, 3, Dim::from(i), Dim::one())?;
        let part = cx.reshape(part, vec![shape[0].clone(), shape[1].clone(), shape[2].clone(), shape[4].clone()])?;
        cx.transpose(part, &[0, 2, 1, 3])
    };
    (0..n).map(part).collect()
}

/// `MultiHeadAttention`: operands q, k, v, bias, padding, added scores, past keys, past values. Keys and values also come packed with
/// each other or with q, or in heads already.
pub(crate) fn multi_head_attention(cx: &mut Cx) -> Res<Vec<Val>> {
    refuse(cx, &[(8, "past_sequence_length"), (9, "cache_indirection")], &[])?;
    if cx.wants(3) {
        return missing("the scores of MultiHeadAttention");
    }
    let heads = heads_of(cx, "num_heads")?;
    let q = cx.arg(0)?;
    let (key, value, mut bias) = (cx.opt(1), cx.opt(2), cx.opt(3));
    let mut at = Dim::ZERO;
    // A part of the bias goes with each operand that is still packed by width.
    let mut head = |cx: &mut Cx, x: Val| -> Res<Val> {
        let width = cx.shape(x)[2].clone();
        let mut x = x;
        if let Some(bias) = bias {
            let part = columns(cx, bias, &at, &width)?;
            x = cx.pointwise(Add, &[x, part])?;
        }
        at = at.clone() + width;
        split_heads(cx, x, &heads)
    };
    let [q, k, v] = match (key, value) {
        (None, None) if cx.rank(q) == 5 && bias.is_none() => {
            let parts = unpack(cx, q, 3)?;
            [parts[0], parts[1], parts[2]]
        }
        (Some(k), None) if cx.rank(q) == 3 && cx.rank(k) == 5 && bias.is_none() => {
            let parts = unpack(cx, k, 2)?;
            [head(cx, q)?, parts[0], parts[1]]
        }
        (Some(k), Some(v)) if [q, k, v].iter().all(|x| cx.rank(*x) == 3) => [head(cx, q)?, head(cx, k)?, head(cx, v)?],
        (Some(k), Some(v)) if cx.rank(q) == 3 && cx.rank(k) == 4 && cx.rank(v) == 4 => {
            if let Some(all) = bias {
                // Only the query's part is read.
                let width = cx.shape(q)[2].clone();
                bias = Some(columns(cx, all, &Dim::ZERO, &width)?);
            }
            let mut q = q;
            if let Some(bias) = bias {
                q = cx.pointwise(Add, &[q, bias])?;
            }
            [split_heads(cx, q, &heads)?, k, v]
        }
        _ => return missing(format!("queries of type {} with keys and values as they are", cx.ty(q))),
    };
    let (past_key, past_value) = (cx.opt(6), cx.opt(7));
    if past_key.is_some() != past_value.is_some() {
        return invalid("past keys and values come together");
    }
    let past = past_key.map_or(Dim::ZERO, |p| cx.shape(p).get(2).cloned().unwrap_or(Dim::ZERO));
    let (k, v) = (append(cx, past_key, k)?, append(cx, past_value, v)?);
    let (keep, added) = (cx.opt(4), cx.opt(5));
    let y = plain(cx, [q, k, v], keep, added, &past)?;
    Ok(vec![y, k, v])
}

/// `RotaryEmbedding`: operands x, positions `[b, s]` or the first of them, cosines, sines.
pub(crate) fn rotary_embedding(cx: &mut Cx) -> Res<Vec<Val>> {
    refuse(cx, &[], &["is_packed_batching"])?;
    let (x, positions, cos, sin) = (cx.arg(0)?, cx.arg(1)?, cx.arg(2)?, cx.arg(3)?);
    if cx.float("scale", 1.0)? != 1.0 {
        return missing("the attribute `scale`");
    }
    if cx.rank(cos) != 2 || cx.rank(sin) != 2 || cx.shape(cos)[1].is(0) {
        return invalid(format!("cosines {} and sines {}", cx.ty(cos), cx.ty(sin)));
    }
    let packed = cx.rank(x) == 3;
    let heads = if packed {
        let heads = match cx.int("num_heads", 0)? {
            0 => cx.shape(x)[2].div(&(cx.shape(cos)[1].clone() * Dim::from(2i64))),
            n => Dim::from(n),
        };
        split_heads(cx, x, &heads)?
    } else {
        x
    };
    if cx.rank(heads) != 4 {
        return invalid(format!("x is {}", cx.ty(x)));
    }
    let shape = cx.shape(heads);
    let positions = if cx.rank(positions) == 2 {
        positions
    } else {
        let first = cx.cast(positions, DType::I64)?;
        let first = cx.reshape(first, vec![Dim::one(), Dim::one()])?;
        let steps = cx.emit(Op::Iota { dtype: DType::I64, shape: vec![shape[0].clone(), shape[2].clone()], axis: 1 }, &[])?;
        cx.pointwise(Add, &[steps, first])?
    };
    let pairs = pairs_of(cx, "interleaved")?;
    let y = turn(cx, heads, [cos, sin], positions, pairs)?;
    Ok(vec![if packed { join_heads(cx, y)? } else { y }])
}

fn pairs_of(cx: &Cx, name: &str) -> Res<Pairs> {
    Ok(if cx.flag(name, false)? { Pairs::Neighbours } else { Pairs::Halves })
}

/// `x[b, h, s, d]` turned by the angles of its positions `[b, s]`.
fn turn(cx: &mut Cx, x: Val, tables: [Val; 2], positions: Val, pairs: Pairs) -> Res<Val> {
    let mut found = vec![];
    for table in tables {
        let rows = cx.emit(Op::Gather { axis: 0 }, &[table, positions])?;
        let mut shape = cx.shape(rows);
        shape.insert(1, Dim::one());
        found.push(cx.reshape(rows, shape)?);
    }
    rotate(cx, x, found[0], found[1], pairs)
}

/// `GroupQueryAttention`: operands q, k, v, past keys, past values, the last valid position of each sample, the length of the cache after
/// this step, cosines, sines, positions, added scores.
pub(crate) fn group_query_attention(cx: &mut Cx) -> Res<Vec<Val>> {
    refuse(cx, &[(11, "head_sink")], &["smooth_softmax", "kv_cache_bit_width", "qk_output"])?;
    if cx.wants(3) {
        return missing("the scores of GroupQueryAttention");
    }
    let (heads, groups) = (heads_of(cx, "num_heads")?, heads_of(cx, "kv_num_heads")?);
    let x = cx.arg(0)?;
    if cx.rank(x) != 3 {
        return invalid(format!("q is {}", cx.ty(x)));
    }
    let [q, k, v] = match (cx.opt(1), cx.opt(2)) {
        (Some(k), Some(v)) => [x, k, v],
        (None, None) => {
            let depth = cx.shape(x)[2].div(&(heads.clone() + groups.clone() * Dim::from(2i64)));
            let (wide, narrow) = (heads.clone() * depth.clone(), groups.clone() * depth);
            let rest = wide.clone() + narrow.clone();
            [columns(cx, x, &Dim::ZERO, &wide)?, columns(cx, x, &wide, &narrow)?, columns(cx, x, &rest, &narrow)?]
        }
        _ => return invalid("keys and values come together"),
    };
    let [mut q, mut k, v] = [split_heads(cx, q, &heads)?, split_heads(cx, k, &groups)?, split_heads(cx, v, &groups)?];
    let (batch, steps) = (cx.shape(q)[0].clone(), cx.shape(q)[2].clone());
    // Keys of earlier steps, one number a sample: `[b, 1, 1, 1]`.
    let last = cx.arg(5)?;
    let last = cx.cast(last, DType::I64)?;
    let last = cx.reshape(last, vec![batch.clone(), Dim::one(), Dim::one(), Dim::one()])?;
    let new = cx.known_dims(DType::I64, &[], vec![steps.clone() - Dim::one()]);
    let past = cx.pointwise(Sub, &[last, new])?;
    let past = cx.with_number(Max, past, 0.0)?;
    if cx.flag("do_rotary", false)? {
        let tables = [cx.arg(7)?, cx.arg(8)?];
        let positions = match cx.opt(9) {
            Some(v) => v,
            None => {
                let rows = cx.emit(Op::Iota { dtype: DType::I64, shape: vec![batch.clone(), steps.clone()], axis: 1 }, &[])?;
                let past = cx.reshape(past, vec![batch.clone(), Dim::one()])?;
                cx.pointwise(Add, &[rows, past])?
            }
        };
        let pairs = pairs_of(cx, "rotary_interleaved")?;
        (q, k) = (turn(cx, q, tables, positions, pairs)?, turn(cx, k, tables, positions, pairs)?);
    }
    let total = cx.arg(6)?;
    let name = cx.name.clone();
    let total = cx.size(total, &name)?;
    let (past_key, past_value) = (cx.opt(3), cx.opt(4));
    if past_key.is_some() != past_value.is_some() {
        return invalid("past keys and values come together");
    }
    let (k, v) = (store(cx, past_key, k, past, &total)?, store(cx, past_value, v, past, &total)?);
    let keys = cx.shape(k)[2].clone();
    let mut mask = Mask::default();
    if let Some(bias) = cx.opt(10) {
        let mut shape = cx.shape(bias);
        let Some(axis) = shape.len().checked_sub(1) else { return invalid("added scores without axes") };
        let gap = keys.clone() - shape[axis].clone();
        let dtype = cx.dtype(q);
        let mut bias = cx.cast(bias, dtype)?;
        if !gap.is(0) && gap.is_nonneg() {
            let (zero, lo) = (cx.scalar(dtype, 0.0), vec![Dim::ZERO; shape.len()]);
            let mut hi = lo.clone();
            hi[axis] = gap;
            shape[axis] = keys.clone();
            bias = cx.emit(Op::Pad { lo, hi, mode: PadMode::Constant }, &[bias, zero])?;
        }
        mask.added = Some(bias);
    }
    let window = match cx.int("local_window_size", -1)? {
        -1 => None,
        n @ 1..=0x7fff_ffff => Some(1 - n),
        n => return invalid(format!("local_window_size is {n}")),
    };
    mask.band(cx, &steps, &keys, past, window, Some(0))?;
    // Queries that are padding see what the others do.
    let columns = cx.emit(Op::Iota { dtype: DType::I64, shape: vec![keys], axis: 0 }, &[])?;
    let valid = cx.pointwise(Le, &[columns, last])?;
    mask.only(cx, valid)?;
    let depth = cx.shape(q)[3].clone();
    let rule = Rule { scale: given_scale(cx, &depth)?, softcap: cx.float("softcap", 0.0)?, scores: DType::F32, precision: DType::F32 };
    let stages = attend(cx, [q, k, v], &mask, &rule)?;
    Ok(vec![join_heads(cx, stages.y)?, k, v])
}

/// New keys or values `[b, g, s, d]` in a cache, from the position `at[b, 1, 1, 1]` on. The cache grows to `total` if it is shorter.
fn store(cx: &mut Cx, cache: Option<Val>, new: Val, at: Val, total: &Dim) -> Res<Val> {
    let shape = cx.shape(new);
    let Some(cache) = cache else {
        // The first step fills the cache.
        let mut shape = shape;
        shape[2] = cx.same_extent(total, &shape[2])?;
        return cx.with_shape(new, shape);
    };
    if cx.rank(cache) != 4 || cx.dtype(cache) != cx.dtype(new) {
        return missing(format!("a cache of type {} for {}", cx.ty(cache), cx.ty(new)));
    }
    let own = cx.shape(cache)[2].clone();
    if shape[0].is(1) && own.clone() + shape[2].clone() == *total {
        // One sample, whose cache is full.
        return concat_along(cx, &[cache, new], 2);
    }
    let mut full = shape.clone();
    full[2] = own.clone();
    let mut cache = cx.with_shape(cache, full)?;
    let gap = own.larger(total) - own;
    if !gap.is(0) {
        let zero = cx.scalar_like(new, 0.0);
        let hi = vec![Dim::ZERO, Dim::ZERO, gap, Dim::ZERO];
        cache = cx.emit(Op::Pad { lo: vec![Dim::ZERO; 4], hi, mode: PadMode::Constant }, &[cache, zero])?;
    }
    let rows = cx.emit(Op::Iota { dtype: DType::I64, shape, axis: 2 }, &[])?;
    let rows = cx.pointwise(Add, &[rows, at])?;
    cx.emit(Op::ScatterElements { axis: 2, f: ScatterFn::Replace }, &[cache, rows, new])
}
