//! Gathers and scatters.
use crate::onnx::{
    build::{Res, Val, invalid},
    cx::Cx,
};
use pavage_ir::{Dim, Op, attr::ScatterFn};

pub(crate) fn gather(cx: &mut Cx) -> Res<Vec<Val>> {
    let (data, indices) = (cx.arg(0)?, cx.arg(1)?);
    let axis = cx.axis(cx.int("axis", 0)?, cx.rank(data))?;
    // One known index is a slice, which costs nothing.
    if let Some([at]) = cx.dims(indices).as_deref()
        && let Some(at) = at.as_const()
        && cx.rank(indices) <= 1
    {
        let extent = cx.shape(data)[axis].clone();
        let start = if at < 0 { extent.clone() + Dim::from(at) } else { Dim::from(at) };
        if extent.as_const().is_some_and(|n| !(-n..n).contains(&at)) {
            return invalid(format!("index {at} on an axis of extent {extent}"));
        }
        let one = cx.slice_axis(data, axis, start, Dim::one())?;
        return Ok(vec![if cx.rank(indices) == 0 { super::reduce::drop_axes(cx, one, &[axis])? } else { one }]);
    }
    Ok(vec![cx.emit(Op::Gather { axis }, &[data, indices])?])
}

pub(crate) fn gather_elements(cx: &mut Cx) -> Res<Vec<Val>> {
    let (data, indices) = (cx.arg(0)?, cx.arg(1)?);
    let axis = cx.axis(cx.int("axis", 0)?, cx.rank(data))?;
    Ok(vec![cx.emit(Op::GatherElements { axis }, &[data, indices])?])
}

pub(crate) fn gather_nd(cx: &mut Cx) -> Res<Vec<Val>> {
    let (data, indices) = (cx.arg(0)?, cx.arg(1)?);
    let batch = cx.int("batch_dims", 0)?;
    let (mut shape, own) = (cx.shape(indices), cx.shape(data));
    let batch = match usize::try_from(batch) {
        Ok(batch) if batch < shape.len() && batch <= own.len() => batch,
        _ => return invalid(format!("{batch} batch axes")),
    };
    for i in 0..batch {
        shape[i] = cx.same_extent(&own[i], &shape[i])?;
        if shape[i] != own[i] {
            return invalid(format!("batch extents {} and {} differ", own[i], shape[i]));
        }
    }
    let indices = cx.with_shape(indices, shape)?;
    Ok(vec![cx.emit(Op::GatherNd { batch }, &[data, indices])?])
}

fn combine(cx: &Cx) -> Res<ScatterFn> {
    Ok(match cx.text("reduction", "none")?.as_str() {
        "none" => ScatterFn::Replace,
        "add" => ScatterFn::Add,
        "mul" => ScatterFn::Mul,
        "max" => ScatterFn::Max,
        "min" => ScatterFn::Min,
        other => return invalid(format!("reduction `{other}`")),
    })
}

pub(crate) fn scatter_elements(cx: &mut Cx) -> Res<Vec<Val>> {
    let [data, indices, updates] = [cx.arg(0)?, cx.arg(1)?, cx.arg(2)?];
    let axis = cx.axis(cx.int("axis", 0)?, cx.rank(data))?;
    let f = combine(cx)?;
    let (a, b) = (cx.shape(indices), cx.shape(updates));
    if a.len() != b.len() {
        return invalid(format!("indices {} and updates {}", cx.ty(indices), cx.ty(updates)));
    }
    let shape: Vec<Dim> = a.iter().zip(&b).map(|(a, b)| cx.same_extent(a, b)).collect::<Res<_>>()?;
    let (indices, updates) = (cx.with_shape(indices, shape.clone())?, cx.with_shape(updates, shape)?);
    Ok(vec![cx.emit(Op::ScatterElements { axis, f }, &[data, indices, updates])?])
}

pub(crate) fn scatter_nd(cx: &mut Cx) -> Res<Vec<Val>> {
    let [data, indices, updates] = [cx.arg(0)?, cx.arg(1)?, cx.arg(2)?];
    let f = combine(cx)?;
    let (own, at) = (cx.shape(data), cx.shape(indices));
    let depth = at.last().and_then(Dim::as_const).and_then(|d| usize::try_from(d).ok()).filter(|d| *d <= own.len());
    let Some(depth) = depth else { return invalid(format!("indices of type {} into {}", cx.ty(indices), cx.ty(data))) };
    let shape: Vec<Dim> = at[..at.len() - 1].iter().chain(&own[depth..]).cloned().collect();
    let given = cx.shape(updates);
    if given.len() != shape.len() {
        return invalid(format!("updates of type {}", cx.ty(updates)));
    }
    for (a, b) in shape.iter().zip(&given) {
        cx.same_extent(a, b)?;
    }
    let updates = cx.with_shape(updates, shape)?;
    Ok(vec![cx.emit(Op::ScatterNd { f }, &[data, indices, updates])?])
}
