//! Sizes as data, and tensors made from sizes.
use crate::onnx::{
    build::{DIMS_LIMIT, Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{DType, Dim, Op, Scalar, ScalarFn, Tensor};

pub(crate) fn shape(cx: &mut Cx) -> Res<Vec<Val>> {
    let shape = {
        let x = cx.arg(0)?;
        cx.shape(x)
    };
    let rank = shape.len() as i64;
    let at = |v: i64| (if v < 0 { v + rank } else { v }).clamp(0, rank) as usize;
    let (start, end) = (at(cx.int("start", 0)?), at(cx.int("end", rank)?));
    let part = shape.get(start..end.max(start)).unwrap_or(&[]).to_vec();
    let n = part.len();
    Ok(vec![cx.known_dims(DType::I64, &[n], part)])
}

pub(crate) fn size(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let count = cx.ty(x).count();
    Ok(vec![cx.known_dims(DType::I64, &[], vec![count])])
}

pub(crate) fn constant(cx: &mut Cx) -> Res<Vec<Val>> {
    let tensor = if cx.has("value") {
        cx.tensor_attr("value")?
    } else if cx.has("value_float") {
        Some(Tensor::from_f32([], &[cx.float("value_float", 0.0)? as f32]))
    } else if cx.has("value_int") {
        Some(Tensor::from_i64([], &[cx.int("value_int", 0)?]))
    } else if let Some(v) = cx.floats("value_floats")? {
        Some(Tensor::from_f32([v.len()], v))
    } else if let Some(v) = cx.ints_opt("value_ints")? {
        Some(Tensor::from_i64([v.len()], v))
    } else {
        let what = ["value_string", "value_strings", "sparse_value"].into_iter().find(|a| cx.has(a));
        return match what {
            Some(what) => missing(format!("constants given as `{what}`")),
            None => invalid("no value is given"),
        };
    };
    match tensor {
        Some(t) => Ok(vec![cx.constant(t)]),
        None => invalid("no value is given"),
    }
}

pub(crate) fn constant_of_shape(cx: &mut Cx) -> Res<Vec<Val>> {
    let shape = cx.arg(0)?;
    let name = cx.name.clone();
    let shape = cx.sizes(shape, &name)?;
    if shape.iter().any(|d| d.as_const().is_some_and(|v| v < 0)) {
        return invalid("a negative extent");
    }
    let value = match cx.tensor_attr("value")? {
        Some(t) if t.count() == 1 => Tensor::scalar(t.dtype(), t.get(0)),
        Some(t) => return invalid(format!("a value of type {}", t.ty())),
        None => Tensor::from_f32([], &[0.0]),
    };
    let value = cx.constant(value);
    Ok(vec![cx.broadcast_to(value, &shape)?])
}

pub(crate) fn range(cx: &mut Cx) -> Res<Vec<Val>> {
    let [start, limit, delta] = [cx.arg(0)?, cx.arg(1)?, cx.arg(2)?];
    let dtype = cx.dtype(start);
    let name = cx.name.clone();
    let count = match (cx.dims(start), cx.dims(limit), cx.dims(delta)) {
        (Some(a), Some(b), Some(d)) => {
            let ([a], [b], [d]) = (a.as_slice(), b.as_slice(), d.as_slice()) else { return invalid("operands are scalars") };
            match d.as_const() {
                Some(0) => return invalid("a delta of 0"),
                Some(d) if d > 0 => Some((b.clone() - a.clone()).larger(&Dim::ZERO).ceil_div(&Dim::from(d))),
                Some(d) => Some((a.clone() - b.clone()).larger(&Dim::ZERO).ceil_div(&Dim::from(-d))),
                None => None,
            }
        }
        _ => match (cx.tensor(start), cx.tensor(limit), cx.tensor(delta)) {
            (Some(a), Some(b), Some(d)) if a.count() == 1 && b.count() == 1 && d.count() == 1 => {
                let n = ((b.get(0).f() - a.get(0).f()) / d.get(0).f()).ceil();
                if !n.is_finite() || n > 1e9 {
                    return invalid(format!("a range of {n} elements"));
                }
                Some(Dim::from(n.max(0.0) as i64))
            }
            _ => None,
        },
    };
    if let (Some(n), [Some(a), _, Some(d)]) = (count.as_ref().and_then(Dim::as_const), [start, limit, delta].map(|v| cx.tensor(v).map(|t| t.get(0))))
        && n <= DIMS_LIMIT as i64
        && dtype.is_int()
    {
        return Ok(vec![cx.constant(Tensor::from_scalars(dtype, [n as usize], (0..n).map(|i| Scalar::I(a.i() + i128::from(i) * d.i()))))]);
    }
    let count = match count {
        Some(n) => n,
        None => {
            // ceil((limit - start) / delta), in f64, when run.
            let wide = |cx: &mut Cx, v: Val| cx.cast(v, DType::F64).and_then(|v| cx.reshape(v, vec![]));
            let (a, b, d) = (wide(cx, start)?, wide(cx, limit)?, wide(cx, delta)?);
            let gap = cx.map(ScalarFn::Sub, &[b, a])?;
            let n = cx.map(ScalarFn::Div, &[gap, d])?;
            let n = cx.map(ScalarFn::Ceil, &[n])?;
            let n = cx.with_number(ScalarFn::Max, n, 0.0)?;
            let n = cx.cast(n, DType::I64)?;
            cx.size(n, &name)?
        }
    };
    // Short lists of numbers, axes above all, are known.
    if let (Some(n @ 0..=16), Some([start]), Some([delta])) = (count.as_const(), cx.dims(start).as_deref(), cx.dims(delta).as_deref())
        && let (Some(start), Some(delta)) = (start.as_const(), delta.as_const())
    {
        let values = (0..n).map(|i| Dim::from(start + i * delta)).collect();
        return Ok(vec![cx.known_dims(dtype, &[n as usize], values)]);
    }
    let steps = cx.emit(Op::Iota { dtype, shape: vec![count], axis: 0 }, &[])?;
    let (start, delta) = (cx.reshape(start, vec![])?, cx.reshape(delta, vec![])?);
    let one = cx.dims(delta).is_some_and(|d| d[0].is(1));
    let scaled = if one { steps } else { cx.pointwise(ScalarFn::Mul, &[steps, delta])? };
    let zero = cx.dims(start).is_some_and(|d| d[0].is(0));
    Ok(vec![if zero { scaled } else { cx.pointwise(ScalarFn::Add, &[scaled, start])? }])
}

/// Row and column numbers of a matrix, as i64.
fn positions(cx: &mut Cx, shape: &[Dim]) -> Res<(Val, Val)> {
    let mut axis = |axis| cx.emit(Op::Iota { dtype: DType::I64, shape: shape.to_vec(), axis }, &[]);
    Ok((axis(0)?, axis(1)?))
}

pub(crate) fn eye_like(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let dtype = cx.dtype_attr("dtype")?.unwrap_or(cx.dtype(x));
    let shape = cx.shape(x);
    if shape.len() != 2 {
        return invalid(format!("a matrix is needed, got {}", cx.ty(x)));
    }
    let (rows, columns) = positions(cx, &shape)?;
    let k = cx.int("k", 0)?;
    let shifted = cx.with_number(ScalarFn::Add, rows, k as f64)?;
    let hit = cx.map(ScalarFn::Eq, &[columns, shifted])?;
    Ok(vec![cx.cast(hit, dtype)?])
}

pub(crate) fn trilu(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let shape = cx.shape(x);
    let rank = shape.len();
    if rank < 2 {
        return invalid(format!("a matrix is needed, got {}", cx.ty(x)));
    }
    let (rows, columns) = positions(cx, &shape[rank - 2..])?;
    let distance = cx.map(ScalarFn::Sub, &[columns, rows])?;
    let k = match cx.opt(1) {
        Some(k) => cx.reshape(k, vec![])?,
        None => cx.scalar(DType::I64, 0.0),
    };
    let test = if cx.flag("upper", true)? { ScalarFn::Ge } else { ScalarFn::Le };
    let keep = cx.pointwise(test, &[distance, k])?;
    let dtype = cx.dtype(x);
    let zero = if dtype == DType::Bool { cx.constant(Tensor::scalar(dtype, Scalar::B(false))) } else { cx.scalar(dtype, 0.0) };
    Ok(vec![cx.pointwise(ScalarFn::Select, &[keep, x, zero])?])
}

pub(crate) fn one_hot(cx: &mut Cx) -> Res<Vec<Val>> {
    let (indices, depth, values) = (cx.arg(0)?, cx.arg(1)?, cx.arg(2)?);
    let name = cx.name.clone();
    let depth = match cx.tensor(depth) {
        Some(t) if t.count() == 1 => Dim::from(t.get(0).i() as i64),
        _ => cx.size(depth, &name)?,
    };
    let rank = cx.rank(indices) + 1;
    let axis = cx.axis(cx.int("axis", -1)?, rank)?;
    let mut shape = cx.shape(indices);
    shape.insert(axis, Dim::one());
    let indices = cx.cast(indices, DType::I64)?;
    let extent = cx.known_dims(DType::I64, &[], vec![depth.clone()]);
    let wrapped = cx.pointwise(ScalarFn::Add, &[indices, extent])?;
    let negative = cx.with_number(ScalarFn::Lt, indices, 0.0)?;
    let indices = cx.map(ScalarFn::Select, &[negative, wrapped, indices])?;
    let indices = cx.reshape(indices, shape.clone())?;
    shape[axis] = depth;
    let classes = cx.emit(Op::Iota { dtype: DType::I64, shape, axis }, &[])?;
    let hit = cx.pointwise(ScalarFn::Eq, &[classes, indices])?;
    let off = cx.slice_axis(values, 0, Dim::ZERO, Dim::one())?;
    let on = cx.slice_axis(values, 0, Dim::one(), Dim::one())?;
    let (off, on) = (cx.reshape(off, vec![])?, cx.reshape(on, vec![])?);
    Ok(vec![cx.pointwise(ScalarFn::Select, &[hit, on, off])?])
}

pub(crate) fn non_zero(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let name = cx.name.clone();
    let sym = cx.data_symbol(&name, None);
    // A scalar counts as a vector of one.
    let x = if cx.rank(x) == 0 { cx.reshape(x, vec![Dim::one()])? } else { x };
    Ok(vec![cx.emit(Op::NonZero { sym }, &[x])?])
}
