//! Classic machine learning: scaling, encoding, linear models, and what classifiers share.
use super::{linear, norm, reduce};
use crate::onnx::{
    build::{Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{DType, Dim, Op, Scalar, ScalarFn, Tensor, attr::ReduceFn};

/// What is done to scores at the end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transform {
    None,
    Logistic,
    Softmax,
    SoftmaxZero,
    Probit,
}

impl Transform {
    pub(crate) fn read(cx: &Cx) -> Res<Self> {
        Ok(match cx.text("post_transform", "NONE")?.as_str() {
            "NONE" => Transform::None,
            "LOGISTIC" => Transform::Logistic,
            "SOFTMAX" => Transform::Softmax,
            "SOFTMAX_ZERO" => Transform::SoftmaxZero,
            "PROBIT" => Transform::Probit,
            other => return invalid(format!("post_transform `{other}`")),
        })
    }

    /// Scores `[n, classes]` transformed.
    pub(crate) fn apply(self, cx: &mut Cx, x: Val) -> Res<Val> {
        match self {
            Transform::None => Ok(x),
            Transform::Logistic => cx.map(ScalarFn::Sigmoid, &[x]),
            Transform::Softmax => norm::softmax_over(cx, x, &[1]),
            Transform::SoftmaxZero => softmax_zero(cx, x),
            Transform::Probit => probit(cx, x),
        }
    }
}

/// Softmax in which scores of 0 stay 0.
fn softmax_zero(cx: &mut Cx, x: Val) -> Res<Val> {
    let top = reduce::reduce(cx, ReduceFn::Max, x, &[1])?;
    let shifted = cx.pointwise(ScalarFn::Sub, &[x, top])?;
    let e = cx.map(ScalarFn::Exp, &[shifted])?;
    let size = cx.map(ScalarFn::Abs, &[x])?;
    let counts = cx.with_number(ScalarFn::Gt, size, 1e-7)?;
    let zero = cx.scalar(DType::F32, 0.0);
    let e = cx.pointwise(ScalarFn::Select, &[counts, e, zero])?;
    let sum = reduce::reduce(cx, ReduceFn::Sum, e, &[1])?;
    cx.pointwise(ScalarFn::Div, &[e, sum])
}

/// `sqrt(2) * erfinv(2 x - 1)`, the inverse by Winitzki's formula as other runtimes have it.
fn probit(cx: &mut Cx, x: Val) -> Res<Val> {
    let y = cx.with_number(ScalarFn::Mul, x, 2.0)?;
    let y = cx.with_number(ScalarFn::Sub, y, 1.0)?;
    let square = cx.map(ScalarFn::Mul, &[y, y])?;
    let rest = cx.map(ScalarFn::Neg, &[square])?;
    let rest = cx.with_number(ScalarFn::Add, rest, 1.0)?;
    let log = cx.map(ScalarFn::Log, &[rest])?;
    let half = cx.with_number(ScalarFn::Mul, log, 0.5)?;
    let v = cx.with_number(ScalarFn::Add, half, 2.0 / (std::f64::consts::PI * 0.147))?;
    let w = cx.with_number(ScalarFn::Mul, log, 1.0 / 0.147)?;
    let v2 = cx.map(ScalarFn::Mul, &[v, v])?;
    let inner = cx.map(ScalarFn::Sub, &[v2, w])?;
    let inner = cx.map(ScalarFn::Sqrt, &[inner])?;
    let inner = cx.map(ScalarFn::Sub, &[inner, v])?;
    let size = cx.map(ScalarFn::Sqrt, &[inner])?;
    let sign = cx.map(ScalarFn::Sign, &[y])?;
    let out = cx.map(ScalarFn::Mul, &[sign, size])?;
    cx.with_number(ScalarFn::Mul, out, std::f64::consts::SQRT_2)
}

/// Scores plus base values: one a target, or one for a single target.
pub(crate) fn add_base(cx: &mut Cx, scores: Val, base: &[f64], targets: i64) -> Res<Val> {
    if base.is_empty() || base.iter().all(|v| *v == 0.0) {
        return Ok(scores);
    }
    if base.len() as i64 != targets {
        return invalid(format!("{} base values for {targets} targets", base.len()));
    }
    let base = cx.constant(Tensor::from_scalars(DType::F32, [base.len()], base.iter().map(|v| Scalar::F(*v))));
    cx.pointwise(ScalarFn::Add, &[scores, base])
}

/// The labels of a classifier's classes.
pub(crate) enum Labels {
    Ints(Vec<i64>),
    /// Text: the output that would hold it is left out.
    Strings(usize),
}

impl Labels {
    pub(crate) fn read(cx: &Cx, ints: &str, strings: &str) -> Res<Self> {
        if let Some(v) = cx.ints_opt(ints)?
            && !v.is_empty()
        {
            return Ok(Labels::Ints(v.to_vec()));
        }
        match cx.strings(strings)? {
            Some(v) if !v.is_empty() => Ok(Labels::Strings(v.len())),
            _ => invalid("no class labels"),
        }
    }

    pub(crate) fn count(&self) -> usize {
        match self {
            Labels::Ints(v) => v.len(),
            Labels::Strings(n) => *n,
        }
    }

    /// The label of the highest score of each row.
    pub(crate) fn of_best(&self, cx: &mut Cx, scores: Val) -> Res<Val> {
        let Labels::Ints(labels) = self else { return Ok(cx.strings_value()) };
        let best = cx.emit(Op::ArgReduce { f: ReduceFn::Max, axis: 1, last: false }, &[scores])?;
        let best = reduce::drop_axes(cx, best, &[1])?;
        if labels.iter().enumerate().all(|(i, l)| i as i64 == *l) {
            return Ok(best);
        }
        let table = cx.ints(labels);
        cx.emit(Op::Gather { axis: 0 }, &[table, best])
    }

    /// The second label where a test holds, else the first.
    pub(crate) fn of_two(&self, cx: &mut Cx, yes: Val) -> Res<Val> {
        match self {
            Labels::Ints(labels) if labels.len() == 2 => {
                let (no_label, yes_label) = (cx.scalar(DType::I64, labels[0] as f64), cx.scalar(DType::I64, labels[1] as f64));
                cx.pointwise(ScalarFn::Select, &[yes, yes_label, no_label])
            }
            Labels::Ints(labels) => invalid(format!("{} labels for two classes", labels.len())),
            Labels::Strings(_) => Ok(cx.strings_value()),
        }
    }
}

fn f32_arg(cx: &mut Cx) -> Res<Val> {
    let x = cx.arg(0)?;
    cx.cast(x, DType::F32)
}

/// A row of attribute values along the last axis; one value stands for all.
fn row(cx: &mut Cx, values: &[f32]) -> Val {
    match values {
        [v] => cx.scalar(DType::F32, f64::from(*v)),
        values => cx.constant(Tensor::from_f32([values.len()], values)),
    }
}

pub(crate) fn scaler(cx: &mut Cx) -> Res<Vec<Val>> {
    let mut x = f32_arg(cx)?;
    for (name, f) in [("offset", ScalarFn::Sub), ("scale", ScalarFn::Mul)] {
        if let Some(values) = cx.floats(name)?
            && !values.is_empty()
        {
            let values = row(cx, values);
            x = cx.pointwise(f, &[x, values])?;
        }
    }
    Ok(vec![x])
}

/// Columns of the last axis.
pub(crate) fn array_feature_extractor(cx: &mut Cx) -> Res<Vec<Val>> {
    let (mut x, y) = (cx.arg(0)?, cx.arg(1)?);
    if cx.rank(x) < 2 {
        let n = cx.ty(x).count();
        x = cx.reshape(x, vec![Dim::one(), n])?;
    }
    let n = cx.ty(y).count();
    let y = cx.reshape(y, vec![n])?;
    let axis = cx.rank(x) - 1;
    Ok(vec![cx.emit(Op::Gather { axis }, &[x, y])?])
}

/// A map from labels to probabilities is what it maps to: the tensor of probabilities, in label order.
pub(crate) fn zip_map(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let note = format!("gives the probabilities that ZipMap `{}` would turn into maps as one tensor, classes in label order", cx.name);
    cx.notes.insert(note);
    Ok(vec![x])
}

pub(crate) fn normalizer(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = f32_arg(cx)?;
    let Some(axis) = cx.rank(x).checked_sub(1) else { return invalid("a scalar") };
    let size = cx.map(ScalarFn::Abs, &[x])?;
    let norm = match cx.text("norm", "MAX")?.as_str() {
        // The largest element, not the largest magnitude.
        "MAX" => reduce::reduce(cx, ReduceFn::Max, x, &[axis])?,
        "L1" => reduce::reduce(cx, ReduceFn::Sum, size, &[axis])?,
        "L2" => {
            let square = cx.map(ScalarFn::Mul, &[x, x])?;
            let sum = reduce::reduce(cx, ReduceFn::Sum, square, &[axis])?;
            cx.map(ScalarFn::Sqrt, &[sum])?
        }
        other => return invalid(format!("norm `{other}`")),
    };
    let zero = cx.with_number(ScalarFn::Eq, norm, 0.0)?;
    let one = cx.scalar(DType::F32, 1.0);
    let norm = cx.pointwise(ScalarFn::Select, &[zero, one, norm])?;
    Ok(vec![cx.pointwise(ScalarFn::Div, &[x, norm])?])
}

pub(crate) fn binarizer(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, threshold) = (cx.arg(0)?, cx.float("threshold", 0.0)?);
    let above = cx.with_number(ScalarFn::Gt, x, threshold)?;
    let dtype = cx.dtype(x);
    Ok(vec![cx.cast(above, dtype)?])
}

pub(crate) fn imputer(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let dtype = cx.dtype(x);
    let (hole, values) = if dtype.is_float() {
        let Some(values) = cx.floats("imputed_value_floats")? else { return invalid("no imputed values") };
        let replaced = cx.float("replaced_value_float", 0.0)?;
        let hole = if replaced.is_nan() { cx.map(ScalarFn::IsNan, &[x])? } else { cx.with_number(ScalarFn::Eq, x, replaced)? };
        let values = row(cx, values);
        (hole, cx.cast(values, dtype)?)
    } else {
        let Some(values) = cx.ints_opt("imputed_value_int64s")? else { return invalid("no imputed values") };
        let replaced = cx.int("replaced_value_int64", 0)?;
        let hole = cx.with_number(ScalarFn::Eq, x, replaced as f64)?;
        let values = if let [v] = values { cx.scalar(DType::I64, *v as f64) } else { cx.ints(values) };
        (hole, cx.cast(values, dtype)?)
    };
    Ok(vec![cx.pointwise(ScalarFn::Select, &[hole, values, x])?])
}

/// `x · coefficientsᵀ + intercepts`, one row of coefficients a target.
fn scores(cx: &mut Cx, x: Val, coefficients: &[f32], intercepts: &[f32], targets: usize) -> Res<Val> {
    if targets == 0 || coefficients.is_empty() || !coefficients.len().is_multiple_of(targets) {
        return invalid(format!("{} coefficients for {targets} targets", coefficients.len()));
    }
    let features = coefficients.len() / targets;
    let x = if cx.rank(x) == 1 { cx.as_row(x)? } else { x };
    let w = cx.constant(Tensor::from_f32([targets, features], coefficients));
    let w = cx.transpose(w, &[1, 0])?;
    let y = linear::matmul(cx, x, w, DType::F32)?;
    if intercepts.is_empty() {
        return Ok(y);
    }
    let b = row(cx, intercepts);
    cx.pointwise(ScalarFn::Add, &[y, b])
}

pub(crate) fn linear_regressor(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = f32_arg(cx)?;
    let targets = usize::try_from(cx.int("targets", 1)?).unwrap_or(0);
    let y = scores(cx, x, cx.floats("coefficients")?.unwrap_or(&[]), cx.floats("intercepts")?.unwrap_or(&[]), targets)?;
    let transform = Transform::read(cx)?;
    Ok(vec![transform.apply(cx, y)?])
}

pub(crate) fn linear_classifier(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = f32_arg(cx)?;
    let labels = Labels::read(cx, "classlabels_ints", "classlabels_strings")?;
    let intercepts = cx.floats("intercepts")?.unwrap_or(&[]);
    let targets = if intercepts.is_empty() { labels.count() } else { intercepts.len() };
    let transform = Transform::read(cx)?;
    if targets == 1 && labels.count() == 2 && transform != Transform::Probit {
        return linear_of_two(cx, x, &labels, transform);
    }
    if targets != labels.count() {
        return missing(format!("{targets} rows of coefficients for {} classes", labels.count()));
    }
    let y = scores(cx, x, cx.floats("coefficients")?.unwrap_or(&[]), intercepts, targets)?;
    let label = labels.of_best(cx, y)?;
    Ok(vec![label, transform.apply(cx, y)?])
}

/// Two classes by the sign of one score.
fn linear_of_two(cx: &mut Cx, x: Val, labels: &Labels, transform: Transform) -> Res<Vec<Val>> {
    let s = scores(cx, x, cx.floats("coefficients")?.unwrap_or(&[]), cx.floats("intercepts")?.unwrap_or(&[]), 1)?;
    let yes = cx.with_number(ScalarFn::Gt, s, 0.0)?;
    let yes = reduce::drop_axes(cx, yes, &[1])?;
    let label = labels.of_two(cx, yes)?;
    let minus = cx.map(ScalarFn::Neg, &[s])?;
    let (first, second) = if transform == Transform::Logistic {
        (cx.map(ScalarFn::Sigmoid, &[minus])?, cx.map(ScalarFn::Sigmoid, &[s])?)
    } else {
        (cx.with_number(ScalarFn::Add, minus, 1.0)?, s)
    };
    Ok(vec![label, super::view::concat_along(cx, &[first, second], 1)?])
}

pub(crate) fn feature_vectorizer(cx: &mut Cx) -> Res<Vec<Val>> {
    let mut parts = vec![];
    for v in cx.args()? {
        let v = cx.cast(v, DType::F32)?;
        parts.push(if cx.rank(v) == 1 { cx.as_row(v)? } else { v });
    }
    if parts.is_empty() || parts.iter().any(|v| cx.rank(*v) != 2) {
        return invalid("operands are matrices");
    }
    Ok(vec![super::view::concat_along(cx, &parts, 1)?])
}

/// One-hot over listed integers; what is not listed gives zeros.
pub(crate) fn one_hot_encoder(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let Some(categories) = cx.ints_opt("cats_int64s")? else { return missing("categories that are strings") };
    if !cx.flag("zeros", true)? {
        return missing("`zeros=0`, an error on what is not listed");
    }
    let x = cx.cast(x, DType::I64)?;
    let mut shape = cx.shape(x);
    shape.push(Dim::one());
    let x = cx.reshape(x, shape)?;
    let categories = cx.ints(categories);
    let hit = cx.pointwise(ScalarFn::Eq, &[x, categories])?;
    Ok(vec![cx.cast(hit, DType::F32)?])
}

/// A table from numbers to numbers.
pub(crate) fn label_encoder(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let list = |cx: &Cx, what: &str| -> Res<Option<Tensor>> {
        if let Some(v) = cx.ints_opt(&format!("{what}_int64s"))? {
            return Ok(Some(Tensor::from_i64([v.len()], v)));
        }
        if let Some(v) = cx.floats(&format!("{what}_floats"))? {
            return Ok(Some(Tensor::from_f32([v.len()], v)));
        }
        if cx.has(&format!("{what}_tensor")) { cx.tensor_attr(&format!("{what}_tensor")) } else { Ok(None) }
    };
    let (Some(keys), Some(values)) = (list(cx, "keys")?, list(cx, "values")?) else { return missing("labels that are strings") };
    if keys.count() != values.count() || keys.dtype() != cx.dtype(x) || keys.count() > 1 << 12 {
        return invalid(format!("keys {} and values {} for {}", keys.ty(), values.ty(), cx.ty(x)));
    }
    let to = values.dtype();
    let default = match cx.tensor_attr("default_tensor")? {
        Some(t) if t.count() == 1 => t.get(0),
        Some(_) => return invalid("default_tensor has one element"),
        None if to.is_float() => Scalar::F(cx.float("default_float", -0.0)?),
        None => Scalar::I(cx.int("default_int64", -1)?.into()),
    };
    // From the last key to the first, so that the first match wins.
    let mut out = cx.constant(Tensor::scalar(to, default));
    let shape = cx.shape(x);
    out = cx.broadcast_to(out, &shape)?;
    for i in (0..keys.count()).rev() {
        let key = keys.get(i);
        let hit = match key {
            Scalar::F(v) if v.is_nan() => cx.map(ScalarFn::IsNan, &[x])?,
            key => {
                let key = cx.constant(Tensor::scalar(keys.dtype(), key));
                cx.pointwise(ScalarFn::Eq, &[x, key])?
            }
        };
        let value = cx.constant(Tensor::scalar(to, values.get(i)));
        out = cx.pointwise(ScalarFn::Select, &[hit, value, out])?;
    }
    Ok(vec![out])
}
