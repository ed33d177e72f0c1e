//! Attention whose memory is a matrix: one step for each token, in f32.
use crate::onnx::{
    build::{Builder, Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{DType, Dim, Op, Scalar, ScalarFn::*, Tensor, TensorType, attr::Sizes};

/// One step over a state `[b, h, e, d]`. Inputs: q `[b, h, g, e]`, k `[b, h, 1, e]`, v `[b, h, 1, d]`, then as the rule has
/// them the decay as a factor, `[b, h, e or 1, 1]`, and the rate of update, `[b, h or 1, 1, 1]`.
fn step(b: &mut Builder, mut state: Val, [q, k, v]: [Val; 3], decay: Option<Val>, rate: Option<Val>) -> Res<[Val; 2]> {
    if let Some(decay) = decay {
        state = b.pointwise(Mul, &[state, decay])?;
    }
    let mut v = v;
    if let Some(rate) = rate {
        let known = b.emit(Op::MatMul { out: DType::F32 }, &[k, state])?;
        let news = b.map(Sub, &[v, known])?;
        v = b.pointwise(Mul, &[rate, news])?;
    }
    let column = b.transpose(k, &[0, 1, 3, 2])?;
    let outer = b.pointwise(Mul, &[column, v])?;
    state = b.map(Add, &[state, outer])?;
    Ok([state, b.emit(Op::MatMul { out: DType::F32 }, &[q, state])?])
}

/// Operands: queries, keys, values, all `[b, t, heads * depth]`, the state before, the logarithm of the decay, the rate of update.
pub(crate) fn linear_attention(cx: &mut Cx) -> Res<Vec<Val>> {
    let (q, k, v) = (cx.arg(0)?, cx.arg(1)?, cx.arg(2)?);
    let (heads, groups) = (cx.int("q_num_heads", 0)?, cx.int("kv_num_heads", 0)?);
    if heads < 1 || groups < 1 || heads % groups != 0 {
        return invalid(format!("{heads} query heads, {groups} key heads"));
    }
    let rule = cx.text("update_rule", "gated_delta")?;
    let (gated, delta) = match rule.as_str() {
        "linear" => (false, false),
        "gated" => (true, false),
        "delta" => (false, true),
        "gated_delta" => (true, true),
        other => return invalid(format!("update_rule `{other}`")),
    };
    let (decay, rate) = (cx.opt(4), cx.opt(5));
    if decay.is_some() != gated || rate.is_some() != delta {
        return invalid(format!("the operands `decay` and `beta` do not fit the rule `{rule}`"));
    }
    let dtype = cx.dtype(q);
    let (qs, vs) = (cx.shape(q), cx.shape(v));
    if [q, k, v].iter().any(|x| cx.rank(*x) != 3) {
        return invalid(format!("q, k and v are {}, {} and {}", cx.ty(q), cx.ty(k), cx.ty(v)));
    }
    let (batch, steps) = (qs[0].clone(), qs[1].clone());
    let (h, g) = (Dim::from(groups), Dim::from(heads / groups));
    let (e, d) = (qs[2].div(&Dim::from(heads)), vs[2].div(&h));
    // Steps first, in f32.
    let lay = |cx: &mut Cx, x: Val, rest: [Dim; 3]| -> Res<Val> {
        let x = cx.cast(x, DType::F32)?;
        let [a, b, c] = rest;
        let x = cx.reshape(x, vec![batch.clone(), steps.clone(), a, b, c])?;
        cx.transpose(x, &[1, 0, 2, 3, 4])
    };
    let one = Dim::one;
    let mut scanned =
        vec![lay(cx, q, [h.clone(), g.clone(), e.clone()])?, lay(cx, k, [h.clone(), one(), e.clone()])?, lay(cx, v, [h.clone(), one(), d.clone()])?];
    if let Some(decay) = decay {
        let width = cx.shape(decay).last().cloned().unwrap_or(one());
        let each = if width == h { one() } else { e.clone() };
        let decay = lay(cx, decay, [h.clone(), each, one()])?;
        scanned.push(cx.map(Exp, &[decay])?);
    }
    if let Some(rate) = rate {
        let width = cx.shape(rate).last().cloned().unwrap_or(one());
        if !width.is(1) && width != h {
            return invalid(format!("an update rate of type {}", cx.ty(rate)));
        }
        scanned.push(lay(cx, rate, [width, one(), one()])?);
    }
    let shape = vec![batch.clone(), h.clone(), e.clone(), d.clone()];
    let (state, kept) = match cx.opt(3) {
        Some(v) => (cx.cast(v, DType::F32)?, cx.dtype(v)),
        None => {
            let zero = cx.scalar(DType::F32, 0.0);
            (cx.broadcast_to(zero, &shape)?, dtype)
        }
    };
    let state = cx.with_shape(state, shape)?;
    let scale = match (cx.float("scale", 0.0)?, e.as_const()) {
        (0.0, Some(e)) if e > 0 => 1.0 / (e as f64).sqrt(),
        (0.0, _) => return missing(format!("a scale made of a depth of {e}")),
        (scale, _) => scale,
    };
    let apply = |b: &mut Builder, state: Val, of: &[Val]| {
        let decay = of.get(3).copied().filter(|_| gated);
        let rate = of.get(if gated { 4 } else { 3 }).copied().filter(|_| delta);
        step(b, state, [of[0], of[1], of[2]], decay, rate)
    };
    let drop_first = |b: &Builder, v: Val| b.shape(v)[1..].to_vec();
    let [state, y] = if steps.is(1) {
        let now = scanned.iter().map(|v| drop_first(cx, *v)).collect::<Vec<_>>();
        let now = scanned.iter().zip(now).map(|(v, shape)| cx.reshape(*v, shape)).collect::<Res<Vec<_>>>()?;
        apply(cx, state, &now)?
    } else {
        let number = |dtype| TensorType { dtype, shape: vec![] };
        let types = [number(DType::I64), number(DType::Bool), cx.ty(state).clone()];
        let owner = cx.name.clone();
        let frame = cx.nested("step", &owner, &types, |b, vals| {
            let now = scanned.iter().map(|v| b.emit(Op::Gather { axis: 0 }, &[*v, vals[0]])).collect::<Res<Vec<_>>>()?;
            let [state, y] = apply(b, vals[2], &now)?;
            Ok(vec![vals[1], state, y])
        })?;
        let (count, go) = (cx.known_dims(DType::I64, &[], vec![steps.clone()]), cx.constant(Tensor::scalar(DType::Bool, Scalar::B(true))));
        let mut operands = vec![count, go, state];
        operands.extend(&frame.captures);
        let trips = cx.data_symbol(&owner, None);
        let out = cx.emit_all(Op::Loop { carried: 1, trips, sizes: Sizes::default() }, &operands, vec![frame.graph])?;
        [out[0], out[1]]
    };
    // `[t, b, h, g, d]` as `[b, t, h * g * d]`.
    let y = cx.with_number(Mul, y, scale)?;
    let y = cx.reshape(y, vec![steps.clone(), batch.clone(), h * g * d.clone()])?;
    let y = cx.transpose(y, &[1, 0, 2])?;
    Ok(vec![cx.cast(y, dtype)?, cx.cast(state, kept)?])
}
