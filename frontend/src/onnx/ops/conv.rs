//! Convolutions and pools.
use super::reduce;
use crate::onnx::{
    build::{Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{
    DType, Dim, Op, Scalar, ScalarFn, Tensor,
    attr::{Layout, PadMode, PoolFn, ReduceFn},
};

/// A sliding window over the spatial axes of `x`.
pub(super) struct Window {
    pub(super) x: Val,
    pub(super) kernel: Vec<usize>,
    pub(super) strides: Vec<usize>,
    pub(super) dilations: Vec<usize>,
    pub(super) lo: Vec<i64>,
    pub(super) hi: Vec<i64>,
}

fn positive(values: Vec<i64>, what: &str) -> Res<Vec<usize>> {
    values.into_iter().map(|v| if (1..=1 << 24).contains(&v) { Ok(v as usize) } else { invalid(format!("{what} {v}")) }).collect()
}

/// Read strides, dilations and padding. `outside` is what stands in the padding when it must be written out because
/// it depends on a size that is not known.
pub(super) fn window(cx: &mut Cx, x: Val, kernel: Vec<i64>, outside: Option<f64>) -> Res<Window> {
    let n = kernel.len();
    if cx.rank(x) != n + 2 {
        return invalid(format!("a window of {n} axes over {}", cx.ty(x)));
    }
    let kernel = positive(kernel, "kernel extent")?;
    let strides = positive(cx.ints_of("strides", n, 1)?, "stride")?;
    let dilations = positive(cx.ints_of("dilations", n, 1)?, "dilation")?;
    let (mut lo, mut hi) = (vec![0i64; n], vec![0i64; n]);
    let mut x = x;
    let auto = cx.text("auto_pad", "NOTSET")?;
    match auto.as_str() {
        "NOTSET" | "" => {
            let pads = cx.ints_of("pads", 2 * n, 0)?;
            if pads.iter().any(|p| p.abs() > 1 << 24) {
                return invalid(format!("pads {pads:?}"));
            }
            lo.copy_from_slice(&pads[..n]);
            hi.copy_from_slice(&pads[n..]);
        }
        "VALID" => {}
        "SAME_UPPER" | "SAME_LOWER" => {
            let upper = auto == "SAME_UPPER";
            let shape = cx.shape(x);
            let mut written = vec![(Dim::ZERO, Dim::ZERO); n + 2];
            for i in 0..n {
                let reach = (dilations[i] * (kernel[i] - 1) + 1) as i64;
                let (extent, stride) = (&shape[i + 2], Dim::from(strides[i]));
                let total = ((extent.ceil_div(&stride) - Dim::one()) * stride + Dim::from(reach) - extent.clone()).larger(&Dim::ZERO);
                let small = total.div(&Dim::from(2i64));
                let large = total.clone() - small.clone();
                let (first, second) = if upper { (small, large) } else { (large, small) };
                match (first.as_const(), second.as_const()) {
                    (Some(a), Some(b)) => (lo[i], hi[i]) = (a, b),
                    _ => written[i + 2] = (first, second),
                }
            }
            if written.iter().any(|w| !w.0.is(0) || !w.1.is(0)) {
                let Some(outside) = outside else { return missing("auto_pad over an extent that is not known, for a pool that must know its padding") };
                let value = cx.scalar_like(x, outside);
                let (lo, hi) = written.into_iter().unzip();
                x = cx.emit(Op::Pad { lo, hi, mode: PadMode::Constant }, &[x, value])?;
            }
        }
        other => return invalid(format!("auto_pad `{other}`")),
    }
    Ok(Window { x, kernel, strides, dilations, lo, hi })
}

fn spatial(cx: &Cx, w: Val) -> Res<Vec<i64>> {
    match cx.shape(w).get(2..).map(|s| s.iter().map(Dim::as_const).collect::<Option<Vec<_>>>()) {
        Some(Some(kernel)) => Ok(kernel),
        Some(None) => missing("kernels whose extents are not known"),
        None => invalid(format!("a kernel of type {}", cx.ty(w))),
    }
}

/// `y + bias` along axis 1.
fn add_bias(cx: &mut Cx, y: Val, bias: Option<Val>) -> Res<Val> {
    let Some(bias) = bias else { return Ok(y) };
    let mut shape = vec![Dim::one(); cx.rank(y)];
    shape[1] = cx.shape(y)[1].clone();
    let bias = cx.reshape(bias, shape)?;
    cx.pointwise(ScalarFn::Add, &[y, bias])
}

/// `x` with as many channels as the kernel takes.
fn match_channels(cx: &mut Cx, x: Val, channels: Dim) -> Res<Val> {
    let mut shape = cx.shape(x);
    if shape.len() < 2 {
        return invalid(format!("a convolution over {}", cx.ty(x)));
    }
    shape[1] = cx.same_extent(&channels, &shape[1])?;
    cx.with_shape(x, shape)
}

fn groups(cx: &Cx) -> Res<usize> {
    match cx.int("group", 1)? {
        g @ 1..=0xff_ffff => Ok(g as usize),
        g => invalid(format!("{g} groups")),
    }
}

/// The convolution of operands already read, without bias.
fn correlate(cx: &mut Cx, x: Val, w: Val) -> Res<Val> {
    let kernel = match cx.ints_opt("kernel_shape")? {
        Some(k) => k.to_vec(),
        None => spatial(cx, w)?,
    };
    if kernel != spatial(cx, w)? {
        return invalid(format!("kernel_shape {kernel:?} and a kernel of type {}", cx.ty(w)));
    }
    let groups = groups(cx)?;
    let channels = cx.shape(w)[1].clone() * Dim::from(groups);
    let x = match_channels(cx, x, channels)?;
    let Window { x, strides, dilations, lo, hi, .. } = window(cx, x, kernel, Some(0.0))?;
    cx.emit(Op::Conv { strides, dilations, lo, hi, groups, layout: Layout::ChannelsFirst }, &[x, w])
}

pub(crate) fn conv(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, w) = (cx.arg(0)?, cx.arg(1)?);
    let y = correlate(cx, x, w)?;
    let bias = cx.opt(2);
    Ok(vec![add_bias(cx, y, bias)?])
}

/// An operand of bytes with its zero point taken off, as i16 where there is one; `axis` is the one a vector of zero points runs along.
pub(crate) fn centred(cx: &mut Cx, x: Val, zero: Option<Val>, axis: usize) -> Res<Val> {
    let Some(zero) = zero.filter(|z| !cx.tensor(*z).is_some_and(|t| t.to_i64().iter().all(|v| *v == 0))) else { return Ok(x) };
    // A difference of bytes takes nine bits.
    let x = cx.cast(x, DType::I16)?;
    let mut zero = cx.cast(zero, DType::I16)?;
    if cx.rank(zero) == 1 {
        let mut shape = vec![Dim::one(); cx.rank(x)];
        let Some(at) = shape.get_mut(axis) else { return invalid(format!("zero points of type {} for {}", cx.ty(zero), cx.ty(x))) };
        *at = cx.ty(zero).count();
        zero = cx.reshape(zero, shape)?;
    }
    cx.pointwise(ScalarFn::Sub, &[x, zero])
}

pub(crate) fn conv_integer(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, w) = (cx.arg(0)?, cx.arg(1)?);
    let (zx, zw) = (cx.opt(2), cx.opt(3));
    let x = centred(cx, x, zx, 1)?;
    let w = centred(cx, w, zw, 0)?;
    Ok(vec![correlate(cx, x, w)?])
}

/// Operands: x, its scale and zero point, w, its scale and zero point, y's scale and zero point, bias.
pub(crate) fn qlinear_conv(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let zx = cx.opt(2);
    let x = centred(cx, x, zx, 1)?;
    let w = cx.arg(3)?;
    let zw = cx.opt(5);
    let w = centred(cx, w, zw, 0)?;
    let y = correlate(cx, x, w)?;
    let bias = cx.opt(8);
    let y = add_bias(cx, y, bias)?;
    let (sx, mut sw, sy) = (cx.arg(1)?, cx.arg(4)?, cx.arg(6)?);
    if cx.rank(sw) == 1 {
        let mut shape = vec![Dim::one(); cx.rank(y)];
        shape[1] = cx.shape(sw)[0].clone();
        sw = cx.reshape(sw, shape)?;
    }
    let zy = cx.arg(7)?;
    let scale = cx.pointwise(ScalarFn::Mul, &[sx, sw])?;
    let scale = cx.pointwise(ScalarFn::Div, &[scale, sy])?;
    Ok(vec![super::quant::requantize(cx, y, scale, zy)?])
}

pub(crate) fn conv_transpose(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, w) = (cx.arg(0)?, cx.arg(1)?);
    let kernel = spatial(cx, w)?;
    let n = kernel.len();
    let x = match_channels(cx, x, cx.shape(w)[0].clone())?;
    if cx.rank(x) != n + 2 {
        return invalid(format!("a kernel of {n} axes over {}", cx.ty(x)));
    }
    let strides = positive(cx.ints_of("strides", n, 1)?, "stride")?;
    let dilations = positive(cx.ints_of("dilations", n, 1)?, "dilation")?;
    let extra = cx.ints_of("output_padding", n, 0)?;
    let (mut lo, mut hi) = (vec![0; n], vec![0; n]);
    let auto = cx.text("auto_pad", "NOTSET")?;
    let shape = cx.shape(x);
    let reach = |i: usize| (dilations[i] as i64) * (kernel[i] - 1) + 1;
    let target = match cx.ints_opt("output_shape")? {
        // Some exporters list batch and channels too.
        Some(s) if s.len() == n || s.len() == n + 2 => Some(s[s.len() - n..].iter().map(|v| Dim::from(*v)).collect::<Vec<_>>()),
        Some(s) => return invalid(format!("output_shape {s:?}")),
        None if auto.starts_with("SAME") => Some((0..n).map(|i| shape[i + 2].clone() * Dim::from(strides[i])).collect()),
        None => None,
    };
    if let Some(target) = target {
        for i in 0..n {
            let full = (shape[i + 2].clone() - Dim::one()) * Dim::from(strides[i]) + Dim::from(extra[i] + reach(i));
            let Some(total) = (full - target[i].clone()).as_const() else { return missing("an output shape that the input's does not decide") };
            // A target beyond the full extent is reached by negative pads: zeros at the end.
            let small = total.div_euclid(2);
            (lo[i], hi[i]) = if auto == "SAME_UPPER" { (small, total - small) } else { (total - small, small) };
        }
    } else if auto != "VALID" {
        let pads = cx.ints_of("pads", 2 * n, 0)?;
        lo.copy_from_slice(&pads[..n]);
        hi.copy_from_slice(&pads[n..]);
    }
    if extra.iter().chain(&lo).chain(&hi).any(|v| v.abs() > 1 << 24) || extra.iter().any(|v| *v < 0) {
        return invalid(format!("output_padding {extra:?}, pads {lo:?} {hi:?}"));
    }
    let extra = extra.into_iter().map(|v| v as usize).collect();
    let groups = groups(cx)?;
    let y = cx.emit(Op::ConvTranspose { strides, dilations, lo, hi, extra, groups, layout: Layout::ChannelsFirst }, &[x, w])?;
    let bias = cx.opt(2);
    Ok(vec![add_bias(cx, y, bias)?])
}

fn pool(cx: &mut Cx, x: Val, f: PoolFn, outside: Option<f64>) -> Res<Val> {
    let Some(kernel) = cx.ints_opt("kernel_shape")? else { return invalid("kernel_shape is missing") };
    let Window { x, kernel, strides, dilations, lo, hi } = window(cx, x, kernel.to_vec(), outside)?;
    let ceil = cx.flag("ceil_mode", false)?;
    cx.emit(Op::Pool { f, kernel, strides, dilations, lo, hi, ceil, layout: Layout::ChannelsFirst }, &[x])
}

pub(super) fn max_pool_values(cx: &mut Cx) -> Res<Val> {
    let x = cx.arg(0)?;
    let dtype = cx.dtype(x);
    let least = if dtype.is_float() { f64::NEG_INFINITY } else { dtype.int_range().0 as f64 };
    pool(cx, x, PoolFn::Max, Some(least))
}

pub(crate) fn max_pool(cx: &mut Cx) -> Res<Vec<Val>> {
    if cx.wants(1) { super::unpool::max_pool_with_positions(cx) } else { Ok(vec![max_pool_values(cx)?]) }
}

pub(crate) fn average_pool(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let padded = cx.flag("count_include_pad", false)?;
    let (f, outside) = if padded { (PoolFn::MeanPadded, Some(0.0)) } else { (PoolFn::Mean, None) };
    Ok(vec![pool(cx, x, f, outside)?])
}

/// `(sum |x|^p)^(1/p)` over windows.
pub(crate) fn lp_pool(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let p = cx.int("p", 2)? as f64;
    let x = power(cx, x, p)?;
    let sum = pool(cx, x, PoolFn::Sum, Some(0.0))?;
    Ok(vec![root(cx, sum, p)?])
}

fn power(cx: &mut Cx, x: Val, p: f64) -> Res<Val> {
    if p == 2.0 {
        return cx.map(ScalarFn::Mul, &[x, x]);
    }
    let x = cx.map(ScalarFn::Abs, &[x])?;
    if p == 1.0 { Ok(x) } else { cx.with_number(ScalarFn::Pow, x, p) }
}

fn root(cx: &mut Cx, x: Val, p: f64) -> Res<Val> {
    if p == 1.0 {
        Ok(x)
    } else if p == 2.0 {
        cx.map(ScalarFn::Sqrt, &[x])
    } else {
        cx.with_number(ScalarFn::Pow, x, 1.0 / p)
    }
}

fn spatial_axes(cx: &Cx, x: Val) -> Res<Vec<usize>> {
    if cx.rank(x) < 2 {
        return invalid(format!("a pool over {}", cx.ty(x)));
    }
    Ok((2..cx.rank(x)).collect())
}

pub(crate) fn global_average_pool(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let axes = spatial_axes(cx, x)?;
    Ok(vec![reduce::mean(cx, x, &axes)?])
}

pub(crate) fn global_max_pool(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let axes = spatial_axes(cx, x)?;
    Ok(vec![reduce::reduce(cx, ReduceFn::Max, x, &axes)?])
}

pub(crate) fn global_lp_pool(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let p = cx.int("p", 2)? as f64;
    let axes = spatial_axes(cx, x)?;
    let x = power(cx, x, p)?;
    let sum = reduce::reduce(cx, ReduceFn::Sum, x, &axes)?;
    Ok(vec![root(cx, sum, p)?])
}

/// Local response normalisation: a window of squares along the channel axis.
pub(crate) fn lrn(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let (alpha, beta, bias) = (cx.float("alpha", 1e-4)?, cx.float("beta", 0.75)?, cx.float("bias", 1.0)?);
    let size = cx.int("size", 0)?;
    if cx.rank(x) < 2 || !(1..=1 << 20).contains(&size) {
        return invalid(format!("size {size} over {}", cx.ty(x)));
    }
    let shape = cx.shape(x);
    let square = cx.map(ScalarFn::Mul, &[x, x])?;
    let rest: Dim = shape[2..].iter().cloned().product();
    let image = cx.reshape(square, vec![shape[0].clone(), Dim::one(), shape[1].clone(), rest])?;
    let lo = (size - 1) / 2;
    let op = Op::Pool {
        f: PoolFn::MeanPadded,
        kernel: vec![size as usize, 1],
        strides: vec![1, 1],
        dilations: vec![1, 1],
        lo: vec![lo, 0],
        hi: vec![size - 1 - lo, 0],
        ceil: false,
        layout: Layout::ChannelsFirst,
    };
    let mean = cx.emit(op, &[image])?;
    let mean = cx.reshape(mean, shape)?;
    let base = cx.with_number(ScalarFn::Mul, mean, alpha)?;
    let base = cx.with_number(ScalarFn::Add, base, bias)?;
    let scale = cx.with_number(ScalarFn::Pow, base, beta)?;
    Ok(vec![cx.map(ScalarFn::Div, &[x, scale])?])
}

/// Inference leaves the input as it is, and so does a ratio of 0; the mask, if read, is all true.
pub(crate) fn dropout(cx: &mut Cx) -> Res<Vec<Val>> {
    let mut x = cx.arg(0)?;
    if let Some(training) = cx.opt(2) {
        let ratio = match cx.opt(1) {
            Some(ratio) => ratio,
            None => cx.scalar(DType::F32, 0.5),
        };
        let drops = cx.with_number(ScalarFn::Ne, ratio, 0.0)?;
        let random = cx.pointwise(ScalarFn::And, &[training, drops])?;
        match cx.tensor(random) {
            Some(t) if t.count() == 1 && !t.get(0).b() => {}
            Some(_) => return missing("training mode: nothing is dropped at random"),
            // A run that would drop elements fails.
            None => {
                let none = super::signal::bounded_size(cx, random, 0, Some(0))?;
                let shape = cx.shape(x);
                let count = cx.ty(x).count();
                let flat = cx.reshape(x, vec![count.clone()])?;
                let checked = cx.slice_axis(flat, 0, none, count)?;
                x = cx.reshape(checked, shape)?;
                let note = format!("fails where Dropout `{}` is to drop elements", cx.name);
                cx.notes.insert(note);
            }
        }
    }
    let mut out = vec![x];
    if cx.wants(1) {
        let shape = cx.shape(x);
        let yes = cx.constant(Tensor::scalar(DType::Bool, Scalar::B(true)));
        out.push(cx.broadcast_to(yes, &shape)?);
    }
    Ok(out)
}
