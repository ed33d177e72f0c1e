//! Matrix products.
use crate::onnx::{
    build::{Builder, Res, Val, invalid},
    cx::Cx,
};
use pavage_ir::{DType, Dim, Op, ScalarFn};

/// NumPy's `matmul`, accumulating into `out`.
pub(crate) fn matmul(b: &mut Builder, x: Val, y: Val, out: DType) -> Res<Val> {
    let (rx, ry) = (b.rank(x), b.rank(y));
    if rx == 0 || ry == 0 {
        return invalid("matrix product of a scalar");
    }
    // Vectors become a row or a column, whose axis goes again at the end.
    let mut sx = b.shape(x);
    let mut sy = b.shape(y);
    if rx == 1 {
        sx.insert(0, Dim::one());
    }
    if ry == 1 {
        sy.push(Dim::one());
    }
    let (nx, ny) = (sx.len(), sy.len());
    let (m, n) = (sx[nx - 2].clone(), sy[ny - 1].clone());
    let k = b.same_extent(&sx[nx - 1], &sy[ny - 2])?;
    sx[nx - 1] = k.clone();
    sy[ny - 2] = k.clone();
    let mut result;
    let value = if sy[..ny - 2].iter().all(|d| d.is(1)) {
        // One right-hand matrix: all rows of the left are rows of one product.
        let rows: Dim = sx[..nx - 1].iter().cloned().product();
        let x = b.reshape(x, vec![rows, k.clone()])?;
        let y = b.reshape(y, vec![k, n.clone()])?;
        result = vec![Dim::one(); ny.saturating_sub(nx)];
        result.extend_from_slice(&sx[..nx - 2]);
        b.emit(Op::MatMul { out }, &[x, y])?
    } else {
        result = b.common_shape(&[sx[..nx - 2].to_vec(), sy[..ny - 2].to_vec()])?;
        let full = |last: [&Dim; 2]| result.iter().chain(last).cloned().collect::<Vec<_>>();
        let (wx, wy) = (full([&m, &k]), full([&k, &n]));
        let x = b.reshape(x, sx)?;
        let y = b.reshape(y, sy)?;
        let x = b.broadcast_to(x, &wx)?;
        let y = b.broadcast_to(y, &wy)?;
        b.emit(Op::MatMul { out }, &[x, y])?
    };
    if rx > 1 {
        result.push(m);
    }
    if ry > 1 {
        result.push(n);
    }
    b.reshape(value, result)
}

pub(crate) fn convert(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, y) = (cx.arg(0)?, cx.arg(1)?);
    let out = cx.dtype(x);
    Ok(vec![matmul(cx, x, y, out)?])
}

pub(crate) fn gemm(cx: &mut Cx) -> Res<Vec<Val>> {
    let (mut a, mut b) = (cx.arg(0)?, cx.arg(1)?);
    if cx.rank(a) != 2 || cx.rank(b) != 2 {
        return invalid(format!("Gemm of {} and {}", cx.ty(a), cx.ty(b)));
    }
    if cx.flag("transA", false)? {
        a = cx.transpose(a, &[1, 0])?;
    }
    if cx.flag("transB", false)? {
        b = cx.transpose(b, &[1, 0])?;
    }
    let (alpha, beta) = (cx.float("alpha", 1.0)?, cx.float("beta", 1.0)?);
    let out = cx.dtype(a);
    let mut y = matmul(cx, a, b, out)?;
    if alpha != 1.0 {
        y = cx.with_number(ScalarFn::Mul, y, alpha)?;
    }
    if let Some(mut c) = cx.opt(2)
        && beta != 0.0
    {
        if beta != 1.0 {
            c = cx.with_number(ScalarFn::Mul, c, beta)?;
        }
        let shape = cx.shape(y);
        let c = cx.broadcast_to(c, &shape)?;
        y = cx.map(ScalarFn::Add, &[y, c])?;
    }
    Ok(vec![y])
}
