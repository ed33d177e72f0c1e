//! Attention of operator sets 23 and later, and the parts that its relatives share. Scores, masks and softmax are spelled
//! out in one form, which the `attention` rule of the passes knows.
use super::{linear::matmul, norm::softmax_over, reduce::reduce, view::concat_along};
use crate::onnx::{
    build::{Builder, Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{
    DType, Dim, Op, Scalar,
    ScalarFn::*,
    Tensor,
    attr::{PadMode, ReduceFn},
};

/// `[batch, sequence, heads * depth]` as `[batch, heads, sequence, depth]`.
pub(crate) fn split_heads(b: &mut Builder, x: Val, heads: &Dim) -> Res<Val> {
    let shape = b.shape(x);
    let [n, s, width] = shape.as_slice() else { return invalid(format!("heads are packed in a value of three axes, got {}", b.ty(x))) };
    if heads.is(0) || width.modulo(heads).as_const().is_some_and(|r| r != 0) {
        return invalid(format!("{heads} heads in a width of {width}"));
    }
    let split = b.reshape(x, vec![n.clone(), s.clone(), heads.clone(), width.div(heads)])?;
    b.transpose(split, &[0, 2, 1, 3])
}

/// The inverse of [`split_heads`].
pub(crate) fn join_heads(b: &mut Builder, x: Val) -> Res<Val> {
    let x = b.transpose(x, &[0, 2, 1, 3])?;
    let shape = b.shape(x);
    b.reshape(x, vec![shape[0].clone(), shape[1].clone(), shape[2].clone() * shape[3].clone()])
}

/// Keys or values `[b, groups, t, d]` repeated for `heads` query heads: each serves heads that follow one another.
pub(crate) fn repeat_heads(b: &mut Builder, x: Val, heads: &Dim) -> Res<Val> {
    let shape = b.shape(x);
    if shape[1] == *heads {
        return Ok(x);
    }
    let (Some(n), Some(own)) = (heads.as_const(), shape[1].as_const()) else {
        return missing(format!("{heads} query heads over {} key heads", shape[1]));
    };
    if own < 1 || n % own != 0 {
        return invalid(format!("{n} query heads over {own} key heads"));
    }
    let mut apart = shape.clone();
    apart.insert(2, Dim::one());
    let mut wide = apart.clone();
    wide[2] = Dim::from(n / own);
    let x = b.reshape(x, apart)?;
    let x = b.emit(Op::Broadcast { shape: wide }, &[x])?;
    b.reshape(x, vec![shape[0].clone(), heads.clone(), shape[2].clone(), shape[3].clone()])
}

/// What hides keys from queries; everything broadcasts to `[batch, heads, queries, keys]`.
#[derive(Default)]
pub(crate) struct Mask {
    /// Keys are seen where all of these (bool) hold.
    pub(crate) allowed: Option<Val>,
    /// Added to the scores.
    pub(crate) added: Option<Val>,
    /// Whether a query may see no key at all; its result is zero.
    pub(crate) may_hide_all: bool,
}

impl Mask {
    /// Hide keys where `seen` does not hold.
    pub(crate) fn only(&mut self, b: &mut Builder, seen: Val) -> Res<()> {
        self.allowed = Some(match self.allowed {
            Some(other) => b.pointwise(And, &[other, seen])?,
            None => seen,
        });
        Ok(())
    }

    /// Let query `i` see key `j` only where `low <= j - i - offset <= high`, bounds left out being infinite. `offset`, i64,
    /// broadcasts to `[batch, 1, 1, 1]`.
    pub(crate) fn band(&mut self, b: &mut Builder, queries: &Dim, keys: &Dim, offset: Val, low: Option<i64>, high: Option<i64>) -> Res<()> {
        let line = |b: &mut Builder, shape: Vec<Dim>, axis| b.emit(Op::Iota { dtype: DType::I64, shape, axis }, &[]);
        let rows = line(b, vec![queries.clone(), Dim::one()], 0)?;
        let columns = line(b, vec![Dim::one(), keys.clone()], 1)?;
        let at = b.pointwise(Add, &[rows, offset])?;
        for (bound, test) in [(low, Ge), (high, Le)] {
            if let Some(bound) = bound {
                let edge = if bound == 0 { at } else { b.with_number(Add, at, bound as f64)? };
                let seen = b.pointwise(test, &[columns, edge])?;
                self.only(b, seen)?;
            }
        }
        Ok(())
    }

    /// One value to add to the scores, of `dtype`: minus infinity where a key is hidden.
    fn bias(&self, b: &mut Builder, dtype: DType) -> Res<Option<Val>> {
        let added = match self.added {
            Some(v) => Some(b.cast(v, dtype)?),
            None => None,
        };
        let Some(allowed) = self.allowed else { return Ok(added) };
        let seen = added.unwrap_or_else(|| b.scalar(dtype, 0.0));
        let hidden = b.scalar(dtype, f64::NEG_INFINITY);
        Ok(Some(b.pointwise(Select, &[allowed, seen, hidden])?))
    }
}

/// How scores are made of products.
pub(crate) struct Rule {
    pub(crate) scale: f64,
    /// Scores become `cap * tanh(score / cap)`; 0 leaves them.
    pub(crate) softcap: f64,
    /// Scores are held in this dtype. If it is narrower than f32, q and k take half of the scale each, so that products stay small.
    pub(crate) scores: DType,
    /// The softmax is computed in this dtype.
    pub(crate) precision: DType,
}

/// Every stage of one attention.
pub(crate) struct Stages {
    /// Scaled products, after the cap, and with the mask, all `[b, h, s, t]`.
    pub(crate) raw: Val,
    pub(crate) capped: Val,
    pub(crate) masked: Val,
    pub(crate) probabilities: Val,
    /// `[b, h, s, d]`.
    pub(crate) y: Val,
}

/// `softmax(scale * q k^T + mask) v` over `q[b, h, s, e]`, `k[b, g, t, e]`, `v[b, g, t, d]`, where g divides h. Products are
/// summed in f32 at least.
pub(crate) fn attend(b: &mut Builder, [q, k, v]: [Val; 3], mask: &Mask, rule: &Rule) -> Res<Stages> {
    let dtype = b.dtype(q);
    if [q, k, v].iter().any(|x| b.rank(*x) != 4) || b.dtype(k) != dtype || b.dtype(v) != dtype || !dtype.is_float() {
        return invalid(format!("attention over {}, {} and {}", b.ty(q), b.ty(k), b.ty(v)));
    }
    let (qs, ks, vs) = (b.shape(q), b.shape(k), b.shape(v));
    let (batch, heads) = (qs[0].clone(), qs[1].clone());
    let depth = b.same_extent(&qs[3], &ks[3])?;
    let keys = b.same_extent(&ks[2], &vs[2])?;
    let groups = b.same_extent(&ks[1], &vs[1])?;
    for other in [&ks[0], &vs[0]] {
        b.same_extent(&batch, other)?;
    }
    let k = b.with_shape(k, vec![batch.clone(), groups.clone(), keys.clone(), depth.clone()])?;
    let v = b.with_shape(v, vec![batch.clone(), groups, keys.clone(), vs[3].clone()])?;
    let q = b.with_shape(q, vec![batch.clone(), heads.clone(), qs[2].clone(), depth])?;
    let (k, v) = (repeat_heads(b, k, &heads)?, repeat_heads(b, v, &heads)?);
    let turned = b.transpose(k, &[0, 1, 3, 2])?;
    let scaled = |b: &mut Builder, v: Val, scale: f64| if scale == 1.0 { Ok(v) } else { b.with_number(Mul, v, scale) };
    let work = rule.scores;
    let raw = if work.bits() < 32 && rule.scale > 0.0 {
        let root = rule.scale.sqrt();
        let (q, turned) = (scaled(b, q, root)?, scaled(b, turned, root)?);
        b.emit(Op::MatMul { out: work }, &[q, turned])?
    } else {
        let product = b.emit(Op::MatMul { out: work }, &[q, turned])?;
        scaled(b, product, rule.scale)?
    };
    let mut capped = raw;
    if rule.softcap > 0.0 {
        capped = b.with_number(Div, capped, rule.softcap)?;
        capped = b.map(Tanh, &[capped])?;
        capped = b.with_number(Mul, capped, rule.softcap)?;
    }
    let (mut masked, mut blind) = (capped, None);
    let shape = vec![batch, heads, qs[2].clone(), keys];
    if let Some(bias) = mask.bias(b, dtype)? {
        if mask.may_hide_all {
            let last = b.rank(bias).checked_sub(1).filter(|_| b.shape(bias).last() == shape.last());
            let Some(last) = last else { return invalid(format!("a mask of type {}", b.ty(bias))) };
            let top = reduce(b, ReduceFn::Max, bias, &[last])?;
            blind = Some(b.with_number(Eq, top, f64::NEG_INFINITY)?);
        }
        let bias = b.broadcast_to(bias, &shape)?;
        let bias = b.cast(bias, work)?;
        masked = b.map(Add, &[capped, bias])?;
    }
    // A row of minus infinities is all NaN here; its results are replaced below.
    let scores = b.cast(masked, rule.precision)?;
    let p = softmax_over(b, scores, &[3])?;
    let mut p = b.cast(p, dtype)?;
    let mut y = b.emit(Op::MatMul { out: dtype }, &[p, v])?;
    if let Some(blind) = blind {
        let zero = b.scalar(dtype, 0.0);
        p = b.pointwise(Select, &[blind, zero, p])?;
        y = b.pointwise(Select, &[blind, zero, y])?;
    }
    Ok(Stages { raw, capped, masked, probabilities: p, y })
}

/// The default dtype of a softmax: f32 for anything narrower.
pub(crate) fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// `1 / sqrt(depth)`, or the scale that is given.
pub(crate) fn scale_of(cx: &Cx, depth: &Dim) -> Res<f64> {
    match (cx.has("scale"), depth.as_const()) {
        (true, _) => cx.float("scale", 1.0),
        (false, Some(depth)) if depth > 0 => Ok(1.0 / (depth as f64).sqrt()),
        _ => missing(format!("a scale made of a depth of {depth}")),
    }
}

/// New keys or values after those of earlier steps, along axis 2.
pub(crate) fn append(b: &mut Builder, past: Option<Val>, new: Val) -> Res<Val> {
    match past {
        Some(past) if b.rank(past) == 4 && b.dtype(past) == b.dtype(new) => concat_along(b, &[past, new], 2),
        Some(past) => invalid(format!("a cache of type {} before {}", b.ty(past), b.ty(new))),
        None => Ok(new),
    }
}

/// The mask operand for `keys` keys: what it leaves out at the end is hidden.
fn given_mask(cx: &mut Cx, mask: Val, keys: &Dim) -> Res<Val> {
    let mut shape = cx.shape(mask);
    let Some(own) = shape.last().cloned() else { return invalid("a mask without axes") };
    let gap = keys.clone() - own;
    if gap.is(0) {
        return Ok(mask);
    }
    let last = shape.len() - 1;
    if !gap.is_nonneg() {
        shape[last] = cx.same_extent(keys, &shape[last])?;
        return cx.with_shape(mask, shape);
    }
    let outside = match cx.dtype(mask) {
        DType::Bool => cx.constant(Tensor::scalar(DType::Bool, Scalar::B(false))),
        dtype => cx.scalar(dtype, f64::NEG_INFINITY),
    };
    let mut hi = vec![Dim::ZERO; shape.len()];
    hi[last] = gap;
    let lo = vec![Dim::ZERO; shape.len()];
    cx.emit(Op::Pad { lo, hi, mode: PadMode::Constant }, &[mask, outside])
}

/// A window bound: -1 is none.
fn bound(cx: &Cx, name: &str) -> Res<Option<i64>> {
    match cx.int(name, -1)? {
        -1 => Ok(None),
        n @ 0..=0x7fff_ffff => Ok(Some(n)),
        n => invalid(format!("{name} is {n}")),
    }
}

/// Operands: q, k, v, mask, past keys, past values, valid keys of each sample.
pub(crate) fn attention(cx: &mut Cx) -> Res<Vec<Val>> {
    let [mut q, mut k, mut v] = [cx.arg(0)?, cx.arg(1)?, cx.arg(2)?];
    let packed = cx.rank(q) == 3;
    if packed {
        let (Some(heads), Some(groups)) = (cx.int_opt("q_num_heads")?, cx.int_opt("kv_num_heads")?) else {
            return invalid("operands of three axes need `q_num_heads` and `kv_num_heads`");
        };
        if heads < 1 || groups < 1 {
            return invalid(format!("{heads} query heads, {groups} key heads"));
        }
        let (heads, groups) = (Dim::from(heads), Dim::from(groups));
        [q, k, v] = [split_heads(cx, q, &heads)?, split_heads(cx, k, &groups)?, split_heads(cx, v, &groups)?];
    }
    if [q, k, v].iter().any(|x| cx.rank(*x) != 4) {
        return invalid(format!("q, k and v are {}, {} and {}", cx.ty(q), cx.ty(k), cx.ty(v)));
    }
    let dtype = cx.dtype(q);
    if cx.dtype(k) != dtype || cx.dtype(v) != dtype {
        return missing(format!("values of {} beside queries of {dtype}", cx.dtype(v)));
    }
    let (past_key, past_value, lengths) = (cx.opt(4), cx.opt(5), cx.opt(6));
    if past_key.is_some() != past_value.is_some() || past_key.is_some() && lengths.is_some() {
        return invalid("past keys and values come together, and without `nonpad_kv_seqlen`");
    }
    let past = past_key.map_or(Dim::ZERO, |p| cx.shape(p).get(2).cloned().unwrap_or(Dim::ZERO));
    let (k, v) = (append(cx, past_key, k)?, append(cx, past_value, v)?);
    let (queries, keys) = (cx.shape(q)[2].clone(), cx.shape(k)[2].clone());

    let mut mask = Mask::default();
    if let Some(given) = cx.opt(3) {
        let given = given_mask(cx, given, &keys)?;
        if cx.dtype(given) == DType::Bool {
            mask.only(cx, given)?;
        } else {
            mask.added = Some(given);
        }
        mask.may_hide_all = true;
    }
    let lengths = match lengths {
        Some(v) => {
            let v = cx.cast(v, DType::I64)?;
            let batch = cx.shape(q)[0].clone();
            Some(cx.reshape(v, vec![batch, Dim::one(), Dim::one(), Dim::one()])?)
        }
        None => None,
    };
    // Position of the first query among the keys.
    let offset = match lengths {
        Some(lengths) => {
            let count = cx.known_dims(DType::I64, &[], vec![queries.clone()]);
            cx.pointwise(Sub, &[lengths, count])?
        }
        None => cx.known_dims(DType::I64, &[], vec![past]),
    };
    let (left, right) = (bound(cx, "left_window_size")?, bound(cx, "right_window_size")?);
    let causal = cx.flag("is_causal", false)?;
    let high = if causal { Some(0) } else { right };
    if left.is_some() || high.is_some() {
        mask.band(cx, &queries, &keys, offset, left.map(|n| -n), high)?;
        mask.may_hide_all |= left.is_some();
    }
    if let Some(lengths) = lengths {
        let columns = cx.emit(Op::Iota { dtype: DType::I64, shape: vec![keys.clone()], axis: 0 }, &[])?;
        let seen = cx.pointwise(Lt, &[columns, lengths])?;
        mask.only(cx, seen)?;
        mask.may_hide_all = true;
    }

    let depth = cx.shape(q)[3].clone();
    let precision = cx.dtype_attr("softmax_precision")?.unwrap_or(dtype);
    if !precision.is_float() {
        return invalid(format!("a softmax in {precision}"));
    }
    let rule = Rule { scale: scale_of(cx, &depth)?, softcap: cx.float("softcap", 0.0)?, scores: dtype, precision };
    let stages = attend(cx, [q, k, v], &mask, &rule)?;
    let shown = match cx.int("qk_matmul_output_mode", 0)? {
        0 => stages.raw,
        1 => stages.capped,
        2 => stages.masked,
        3 => stages.probabilities,
        mode => return invalid(format!("qk_matmul_output_mode is {mode}")),
    };
    let shown = cx.cast(shown, dtype)?;
    let y = if packed { join_heads(cx, stages.y)? } else { stages.y };
    Ok(vec![y, k, v, shown])
}

/// Attention whose scores and probabilities the model's own graphs change.
pub(crate) fn flex_attention(cx: &mut Cx) -> Res<Vec<Val>> {
    let [q, k, v] = [cx.arg(0)?, cx.arg(1)?, cx.arg(2)?];
    if [q, k, v].iter().any(|x| cx.rank(*x) != 4) {
        return invalid(format!("q, k and v are {}, {} and {}", cx.ty(q), cx.ty(k), cx.ty(v)));
    }
    let dtype = cx.dtype(q);
    let heads = cx.shape(q)[1].clone();
    let (k, v) = (repeat_heads(cx, k, &heads)?, repeat_heads(cx, v, &heads)?);
    let work = cx.dtype_attr("softmax_precision")?.unwrap_or(wide(dtype));
    if !work.is_float() {
        return invalid(format!("a softmax in {work}"));
    }
    let depth = cx.shape(q)[3].clone();
    let scale = scale_of(cx, &depth)?;
    let turned = cx.transpose(k, &[0, 1, 3, 2])?;
    let product = matmul(cx, q, turned, wide(dtype))?;
    let product = cx.with_number(Mul, product, scale)?;
    let scores = cx.cast(product, work)?;
    let scores = modified(cx, "score_mod", scores)?;
    let p = softmax_over(cx, scores, &[3])?;
    let p = modified(cx, "prob_mod", p)?;
    let v = cx.cast(v, work)?;
    let y = matmul(cx, p, v, work)?;
    Ok(vec![cx.cast(y, dtype)?])
}

/// What the graph of an attribute, if it is given, makes of a value of the same type.
fn modified(cx: &mut Cx, name: &str, v: Val) -> Res<Val> {
    if !cx.has(name) {
        return Ok(v);
    }
    let graph = cx.graph_attr(name)?;
    let ty = cx.ty(v).clone();
    match cx.imp.inline_with(graph, &[v])?.as_slice() {
        [out] if *cx.ty(*out) == ty => Ok(*out),
        [out] => invalid(format!("`{name}` turns {ty} into {}", cx.ty(*out))),
        outs => invalid(format!("`{name}` gives {} results", outs.len())),
    }
}
