//! Quantised operators of com.microsoft: integers become floats, the plain operator works on those, and its result is rounded back.
use super::{conv, quant::saturate, rnn, view::concat_along};
use crate::onnx::{
    build::{Builder, Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{
    DType, Dim, Scalar,
    ScalarFn::{self, *},
    Tensor,
};

/// `(x - zero) * scale` in f32, both one number.
fn dequantized(cx: &mut Cx, x: Val, scale: Val, zero: Option<Val>) -> Res<Val> {
    let mut y = cx.cast(x, DType::F32)?;
    if let Some(zero) = zero {
        let zero = cx.cast(zero, DType::F32)?;
        let zero = one_number(cx, zero)?;
        y = cx.pointwise(Sub, &[y, zero])?;
    }
    let scale = one_number(cx, scale)?;
    cx.pointwise(Mul, &[y, scale])
}

fn one_number(b: &mut Builder, v: Val) -> Res<Val> {
    if b.ty(v).count().is(1) { b.reshape(v, vec![]) } else { missing(format!("a scale or zero point of type {}", b.ty(v))) }
}

/// `x / scale + zero`, rounded to `dtype`.
fn quantized(cx: &mut Cx, x: Val, scale: Val, zero: Option<Val>, dtype: DType) -> Res<Val> {
    let scale = one_number(cx, scale)?;
    let y = cx.pointwise(Div, &[x, scale])?;
    let zero = match zero {
        Some(zero) => Some(one_number(cx, zero)?),
        None => None,
    };
    saturate(cx, y, zero, dtype)
}

/// `QLinearAdd` and `QLinearMul`: operands a, its scale and zero point, b and its, the result's.
pub(crate) fn binary(cx: &mut Cx, f: ScalarFn) -> Res<Vec<Val>> {
    let (a, b) = (cx.arg(0)?, cx.arg(3)?);
    let dtype = cx.dtype(a);
    let (sa, sb, sc) = (cx.arg(1)?, cx.arg(4)?, cx.arg(6)?);
    let (za, zb, zc) = (cx.opt(2), cx.opt(5), cx.opt(7));
    let (a, b) = (dequantized(cx, a, sa, za)?, dequantized(cx, b, sb, zb)?);
    let y = cx.pointwise(f, &[a, b])?;
    Ok(vec![quantized(cx, y, sc, zc, dtype)?])
}

/// A function of one value. Operands: x, its scale and zero point, the result's.
fn unary(cx: &mut Cx, f: impl FnOnce(&mut Cx, Val) -> Res<Val>) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let dtype = cx.dtype(x);
    let (sx, sy) = (cx.arg(1)?, cx.arg(3)?);
    let (zx, zy) = (cx.opt(2), cx.opt(4));
    let x = dequantized(cx, x, sx, zx)?;
    let y = f(cx, x)?;
    Ok(vec![quantized(cx, y, sy, zy, dtype)?])
}

pub(crate) fn sigmoid(cx: &mut Cx) -> Res<Vec<Val>> {
    unary(cx, |cx, x| cx.map(Sigmoid, &[x]))
}

pub(crate) fn leaky_relu(cx: &mut Cx) -> Res<Vec<Val>> {
    unary(cx, super::activation::leaky_relu)
}

pub(crate) fn global_average_pool(cx: &mut Cx) -> Res<Vec<Val>> {
    let last = cx.flag("channels_last", false)?;
    unary(cx, |cx, x| {
        let rank = cx.rank(x);
        if rank < 3 {
            return invalid(format!("a pool over {}", cx.ty(x)));
        }
        let axes: Vec<usize> = if last { (1..rank - 1).collect() } else { (2..rank).collect() };
        super::reduce::mean(cx, x, &axes)
    })
}

/// `QLinearConcat`: operands the result's scale and zero point, then each value with its own.
pub(crate) fn concat(cx: &mut Cx) -> Res<Vec<Val>> {
    let (scale, zero) = (cx.arg(0)?, cx.arg(1)?);
    let dtype = cx.dtype(zero);
    let n = (cx.inputs.len() - 2) / 3;
    if n == 0 || cx.inputs.len() != 2 + 3 * n {
        return invalid(format!("{} operands", cx.inputs.len()));
    }
    let mut parts = vec![];
    for i in 0..n {
        let (x, own, at) = (cx.arg(2 + 3 * i)?, cx.arg(3 + 3 * i)?, cx.opt(4 + 3 * i));
        parts.push(dequantized(cx, x, own, at)?);
    }
    let axis = cx.axis(cx.int("axis", 0)?, cx.rank(parts[0]))?;
    let y = concat_along(cx, &parts, axis)?;
    Ok(vec![quantized(cx, y, scale, Some(zero), dtype)?])
}

/// `MaxPool` with channels last.
pub(crate) fn nhwc_max_pool(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let rank = cx.rank(x);
    if rank < 3 {
        return invalid(format!("a pool over {}", cx.ty(x)));
    }
    let first: Vec<usize> = [0, rank - 1].into_iter().chain(1..rank - 1).collect();
    let last: Vec<usize> = std::iter::once(0).chain(2..rank).chain([1]).collect();
    cx.inputs[0] = Some(cx.transpose(x, &first)?);
    let y = conv::max_pool(cx)?;
    Ok(vec![cx.transpose(y[0], &last)?])
}

/// `DynamicQuantizeLSTM`: an LSTM whose weights are integers, `[d, inputs, 4 h]`, with a scale for each direction or each column. The
/// activations stay floats, so that results differ from an integer product's by what rounding them would lose.
pub(crate) fn lstm(cx: &mut Cx) -> Res<Vec<Val>> {
    for (weights, scale, zero) in [(1, 8, 9), (2, 10, 11)] {
        let w = cx.arg(weights)?;
        let mut y = cx.cast(w, DType::F32)?;
        for (operand, f) in [(cx.arg(zero)?, Sub), (cx.arg(scale)?, Mul)] {
            let operand = cx.cast(operand, DType::F32)?;
            let mut shape = cx.shape(operand);
            match shape.len() {
                0 => {}
                1 => shape.extend([Dim::one(), Dim::one()]),
                2 => shape.insert(1, Dim::one()),
                _ => return invalid(format!("a scale of type {}", cx.ty(operand))),
            }
            let operand = cx.reshape(operand, shape)?;
            y = cx.pointwise(f, &[y, operand])?;
        }
        cx.inputs[weights] = Some(cx.transpose(y, &[0, 2, 1])?);
    }
    cx.inputs.truncate(8);
    rnn::lstm(cx)
}

/// Integers of `bits` bits, packed in `rows` times `bytes` bytes from the lowest bit up, as `[rows, count]` numbers in f32.
fn unpack(cx: &mut Cx, packed: Val, bits: i64, [rows, bytes, count]: [i64; 3]) -> Res<Val> {
    let d = |v: i64| Dim::from(v);
    if cx.ty(packed).count() != d(rows * bytes) {
        return invalid(format!("{rows} rows of {bytes} bytes in a tensor of type {}", cx.ty(packed)));
    }
    let full = bytes * (8 / bits);
    let nibbles = match cx.tensor(packed) {
        // Constant nibbles stay nibbles.
        Some(t) if bits == 4 => Tensor::new(DType::U4, vec![rows as usize, full as usize], t.bytes().to_vec()).ok(),
        _ => None,
    };
    let values = if let Some(t) = nibbles {
        let t = cx.constant(t);
        cx.cast(t, DType::F32)?
    } else if bits == 8 {
        let packed = cx.reshape(packed, vec![d(rows), d(bytes)])?;
        cx.cast(packed, DType::F32)?
    } else {
        let packed = cx.reshape(packed, vec![d(rows), d(bytes), d(1)])?;
        let shifts: Vec<Scalar> = (0..8 / bits).map(|i| Scalar::I((i * bits).into())).collect();
        let shifts = cx.constant(Tensor::from_scalars(DType::U8, [shifts.len()], shifts));
        let moved = cx.pointwise(Shr, &[packed, shifts])?;
        let low = cx.with_number(And, moved, ((1 << bits) - 1) as f64)?;
        let low = cx.reshape(low, vec![d(rows), d(full)])?;
        cx.cast(low, DType::F32)?
    };
    if full == count { Ok(values) } else { cx.slice_axis(values, 1, Dim::ZERO, d(count)) }
}

/// `MatMulNBits`: `a b^T` where b, `[n, blocks, bytes]`, has `bits` bits an element and a scale and zero point for each block along k.
pub(crate) fn matmul_nbits(cx: &mut Cx) -> Res<Vec<Val>> {
    if cx.opt(4).is_some() {
        return missing("the operand `g_idx`");
    }
    let (k, n, bits, block) = (cx.int("K", 0)?, cx.int("N", 0)?, cx.int("bits", 4)?, cx.int("block_size", 0)?);
    let sane = 1..=1 << 24;
    if !sane.contains(&k) || !sane.contains(&n) || ![2, 4, 8].contains(&bits) || !sane.contains(&block) || block * bits % 8 != 0 {
        return invalid(format!("K={k} N={n} bits={bits} block_size={block}"));
    }
    let blocks = (k + block - 1) / block;
    let (a, b, scales) = (cx.arg(0)?, cx.arg(1)?, cx.arg(2)?);
    if cx.dtype(b) != DType::U8 {
        return missing(format!("weights of type {}", cx.ty(b)));
    }
    let dtype = cx.dtype(a);
    let d = |v: i64| Dim::from(v);
    let b = unpack(cx, b, bits, [n, blocks * block * bits / 8, blocks * block])?;
    let b = cx.reshape(b, vec![d(n), d(blocks), d(block)])?;
    let column = [d(n), d(blocks), d(1)];
    let zero = match cx.opt(3) {
        Some(zero) if cx.dtype(zero) == DType::U8 => unpack(cx, zero, bits, [n, (blocks * bits + 7) / 8, blocks])?,
        Some(zero) => cx.cast(zero, DType::F32)?,
        None => cx.scalar(DType::F32, (1 << (bits - 1)) as f64),
    };
    let zero = if cx.rank(zero) == 0 { zero } else { cx.reshape(zero, column.to_vec())? };
    let scales = cx.cast(scales, DType::F32)?;
    let scales = cx.reshape(scales, column.to_vec())?;
    let b = cx.pointwise(Sub, &[b, zero])?;
    let b = cx.pointwise(Mul, &[b, scales])?;
    let b = cx.reshape(b, vec![d(n), d(blocks * block)])?;
    let b = cx.slice_axis(b, 1, Dim::ZERO, d(k))?;
    let b = cx.transpose(b, &[1, 0])?;
    let b = cx.cast(b, dtype)?;
    let mut y = super::linear::matmul(cx, a, b, dtype)?;
    if let Some(bias) = cx.opt(5) {
        y = cx.pointwise(Add, &[y, bias])?;
    }
    Ok(vec![y])
}
