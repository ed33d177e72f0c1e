//! Support vector machines of `ai.onnx.ml`.
use super::{
    linear,
    ml::{Labels, Transform},
    reduce, view,
};
use crate::onnx::{
    build::{Builder, Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{
    DType, Dim, Graph, Op, Scalar, ScalarFn, Tensor, TensorType,
    attr::{ReduceFn, Sizes},
};

/// What stands for the product of a row and a support vector.
enum Kernel {
    Linear,
    Poly,
    Rbf,
    Sigmoid,
}

/// The kernel and its parameters: factor, summand, exponent.
struct Measure {
    kernel: Kernel,
    gamma: f64,
    coef: f64,
    degree: f64,
}

fn matrix(rows: usize, columns: usize, values: &[f32]) -> Tensor {
    Tensor::from_f32([rows, columns], values)
}

impl Measure {
    fn read(cx: &Cx) -> Res<Self> {
        let kernel = match cx.text("kernel_type", "LINEAR")?.as_str() {
            "LINEAR" => Kernel::Linear,
            "POLY" => Kernel::Poly,
            "RBF" => Kernel::Rbf,
            "SIGMOID" => Kernel::Sigmoid,
            other => return invalid(format!("kernel_type `{other}`")),
        };
        let [gamma, coef, degree] = match cx.floats("kernel_params")? {
            Some([a, b, c, ..]) => [*a, *b, *c].map(f64::from),
            Some([]) | None => [0.0; 3],
            Some(other) => return invalid(format!("{} kernel_params", other.len())),
        };
        Ok(Self { kernel, gamma, coef, degree })
    }

    /// `[n, vectors]` of rows `x[n, features]` and vectors `[vectors, features]`.
    fn apply(&self, cx: &mut Cx, x: Val, vectors: usize, values: &[f32]) -> Res<Val> {
        let Some(features) = values.len().checked_div(vectors).filter(|f| f * vectors == values.len()) else {
            return invalid(format!("{} numbers for {vectors} support vectors", values.len()));
        };
        let sv = cx.constant(matrix(vectors, features, values));
        if let Kernel::Rbf = self.kernel {
            let rows = cx.shape(x)[0].clone();
            let x = cx.reshape(x, vec![rows, Dim::one(), Dim::from(features)])?;
            let d = cx.pointwise(ScalarFn::Sub, &[x, sv])?;
            let square = cx.map(ScalarFn::Mul, &[d, d])?;
            let sum = reduce::reduce(cx, ReduceFn::Sum, square, &[2])?;
            let sum = reduce::drop_axes(cx, sum, &[2])?;
            let scaled = cx.with_number(ScalarFn::Mul, sum, -self.gamma)?;
            return cx.map(ScalarFn::Exp, &[scaled]);
        }
        let sv = cx.transpose(sv, &[1, 0])?;
        let product = linear::matmul(cx, x, sv, DType::F32)?;
        if let Kernel::Linear = self.kernel {
            return Ok(product);
        }
        let v = cx.with_number(ScalarFn::Mul, product, self.gamma)?;
        let v = cx.with_number(ScalarFn::Add, v, self.coef)?;
        match self.kernel {
            Kernel::Sigmoid => cx.map(ScalarFn::Tanh, &[v]),
            // Whole powers of negative numbers have a sign.
            _ if self.degree.fract() == 0.0 && (1.0..=16.0).contains(&self.degree) => {
                let mut power = v;
                for _ in 1..self.degree as usize {
                    power = cx.map(ScalarFn::Mul, &[power, v])?;
                }
                Ok(power)
            }
            _ => cx.with_number(ScalarFn::Pow, v, self.degree),
        }
    }
}

fn rows(cx: &mut Cx) -> Res<Val> {
    let x = cx.arg(0)?;
    let x = cx.cast(x, DType::F32)?;
    match cx.rank(x) {
        1 => cx.as_row(x),
        2 => Ok(x),
        _ => invalid(format!("features of type {}", cx.ty(x))),
    }
}

fn numbers<'m>(cx: &Cx<'_, 'm>, name: &str) -> Res<&'m [f32]> {
    Ok(cx.floats(name)?.unwrap_or(&[]))
}

pub(crate) fn regressor(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = rows(cx)?;
    let (coefficients, rho) = (numbers(cx, "coefficients")?, numbers(cx, "rho")?);
    if rho.is_empty() || coefficients.is_empty() {
        return invalid("no coefficients, or no rho");
    }
    let n = coefficients.len();
    let supports = cx.int("n_supports", 0)?;
    let (features, weights) = if supports > 0 {
        if supports as usize != n {
            return invalid(format!("{n} coefficients of {supports} support vectors"));
        }
        let measure = Measure::read(cx)?;
        (measure.apply(cx, x, n, numbers(cx, "support_vectors")?)?, coefficients)
    } else {
        (x, coefficients)
    };
    let w = cx.constant(matrix(n, 1, weights));
    let mut y = linear::matmul(cx, features, w, DType::F32)?;
    y = cx.with_number(ScalarFn::Add, y, f64::from(rho[0]))?;
    if cx.flag("one_class", false)? {
        let inlier = cx.with_number(ScalarFn::Gt, y, 0.0)?;
        let (one, minus) = (cx.scalar(DType::F32, 1.0), cx.scalar(DType::F32, -1.0));
        y = cx.pointwise(ScalarFn::Select, &[inlier, one, minus])?;
    }
    let transform = Transform::read(cx)?;
    Ok(vec![transform.apply(cx, y)?])
}

/// Pairs of classes, in the order of their scores.
fn pairs(classes: usize) -> impl Iterator<Item = (usize, usize)> + Clone {
    (0..classes).flat_map(move |i| (i + 1..classes).map(move |j| (i, j)))
}

pub(crate) fn classifier(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = rows(cx)?;
    let labels = Labels::read(cx, "classlabels_ints", "classlabels_strings")?;
    let classes = labels.count();
    let (coefficients, rho) = (numbers(cx, "coefficients")?, numbers(cx, "rho")?);
    let per_class = cx.ints_opt("vectors_per_class")?.unwrap_or(&[]);
    let transform = Transform::read(cx)?;
    if rho.is_empty() || coefficients.is_empty() || classes > 1 << 10 {
        return invalid("no coefficients, or no rho");
    }
    let total: i64 = per_class.iter().map(|v| (*v).clamp(0, 1 << 32)).sum();
    let positive = coefficients.iter().all(|c| *c >= 0.0);
    if total == 0 {
        // No support vectors: one row of coefficients a class.
        let features = coefficients.len() / classes;
        if features * classes != coefficients.len() {
            return invalid(format!("{} coefficients for {classes} classes", coefficients.len()));
        }
        let w = cx.constant(matrix(classes, features, coefficients));
        let w = cx.transpose(w, &[1, 0])?;
        let y = linear::matmul(cx, x, w, DType::F32)?;
        let scores = cx.with_number(ScalarFn::Add, y, f64::from(rho[0]))?;
        if classes == 1 {
            return missing("a machine of one class without support vectors");
        }
        let label = labels.of_best(cx, scores)?;
        return Ok(vec![label, transform.apply(cx, scores)?]);
    }
    let vectors = total as usize;
    let scores_count = classes * classes.saturating_sub(1) / 2;
    if per_class.len() != classes || rho.len() < scores_count || classes < 2 || coefficients.len() != (classes - 1) * vectors {
        return invalid(format!("{} coefficients for {vectors} support vectors of {classes} classes", coefficients.len()));
    }
    let measure = Measure::read(cx)?;
    let kernels = measure.apply(cx, x, vectors, numbers(cx, "support_vectors")?)?;
    // Each score sums over the vectors of its two classes.
    let starts: Vec<usize> = (0..classes).map(|i| per_class[..i].iter().sum::<i64>() as usize).collect();
    let mut weights = vec![0.0f32; vectors * scores_count];
    for (e, (i, j)) in pairs(classes).enumerate() {
        for (class, row) in [(i, j - 1), (j, i)] {
            for v in starts[class]..starts[class] + per_class[class] as usize {
                weights[v * scores_count + e] = coefficients[row * vectors + v];
            }
        }
    }
    let weights = cx.constant(matrix(vectors, scores_count, &weights));
    let y = linear::matmul(cx, kernels, weights, DType::F32)?;
    let rho = cx.constant(Tensor::from_f32([scores_count], &rho[..scores_count]));
    let scores = cx.pointwise(ScalarFn::Add, &[y, rho])?;
    let votes = votes(cx, scores, classes)?;
    let (a, b) = (numbers(cx, "prob_a")?, numbers(cx, "prob_b")?);
    let label = if classes == 2 && positive && a.is_empty() {
        // Every row has a vote: weights without a sign always choose the second label.
        let any = cx.with_number(ScalarFn::Ge, votes, 0.0)?;
        let first = cx.slice_axis(any, 1, Dim::ZERO, Dim::one())?;
        let first = reduce::drop_axes(cx, first, &[1])?;
        labels.of_two(cx, first)?
    } else {
        labels.of_best(cx, votes)?
    };
    if !a.is_empty() {
        if a.len() < scores_count || b.len() < scores_count {
            return invalid(format!("{} and {} parameters for {scores_count} probabilities", a.len(), b.len()));
        }
        let p = probabilities(cx, scores, classes, &a[..scores_count], &b[..scores_count])?;
        return Ok(vec![label, transform.apply(cx, p)?]);
    }
    if classes > 2 {
        return Ok(vec![label, transform.apply(cx, scores)?]);
    }
    let minus = cx.map(ScalarFn::Neg, &[scores])?;
    let both = view::concat_along(cx, &[minus, scores], 1)?;
    Ok(vec![label, transform.apply(cx, both)?])
}

/// How many of its pairs each class wins, `[n, classes]`.
fn votes(cx: &mut Cx, scores: Val, classes: usize) -> Res<Val> {
    let n = pairs(classes).count();
    let (mut first, mut second) = (vec![0.0f32; n * classes], vec![0.0f32; n * classes]);
    for (e, (i, j)) in pairs(classes).enumerate() {
        first[e * classes + i] = 1.0;
        second[e * classes + j] = 1.0;
    }
    let won = cx.with_number(ScalarFn::Gt, scores, 0.0)?;
    let lost = cx.map(ScalarFn::Not, &[won])?;
    let mut sum = None;
    for (hit, place) in [(won, first), (lost, second)] {
        let hit = cx.cast(hit, DType::F32)?;
        let place = cx.constant(matrix(n, classes, &place));
        let part = linear::matmul(cx, hit, place, DType::F32)?;
        sum = Some(match sum {
            Some(sum) => cx.map(ScalarFn::Add, &[sum, part])?,
            None => part,
        });
    }
    sum.map_or_else(|| invalid("no classes"), Ok)
}

/// Probabilities of classes that fit those of pairs best (Wu, Lin, Weng 2004), by the iteration of libsvm: rows that
/// have converged stay as they are while others go on.
fn probabilities(cx: &mut Cx, scores: Val, classes: usize, a: &[f32], b: &[f32]) -> Res<Val> {
    let (a, b) = (cx.constant(Tensor::from_f32([a.len()], a)), cx.constant(Tensor::from_f32([b.len()], b)));
    let v = cx.pointwise(ScalarFn::Mul, &[scores, a])?;
    let v = cx.pointwise(ScalarFn::Add, &[v, b])?;
    let v = cx.map(ScalarFn::Neg, &[v])?;
    let p = cx.map(ScalarFn::Sigmoid, &[v])?;
    let p = cx.with_number(ScalarFn::Max, p, 1e-7)?;
    let p = cx.with_number(ScalarFn::Min, p, 1.0 - 1e-7)?;
    let p = cx.cast(p, DType::F64)?;
    // R[t, s], the probability of t where it is t or s; the diagonal is 0.
    let n = pairs(classes).count();
    let (mut upper, mut lower) = (vec![0.0; n * classes * classes], vec![0.0; n * classes * classes]);
    for (e, (i, j)) in pairs(classes).enumerate() {
        upper[e * classes * classes + i * classes + j] = 1.0;
        lower[e * classes * classes + j * classes + i] = 1.0;
    }
    let place = |cx: &mut Cx, p: Val, values: Vec<f64>| {
        let to = Tensor::from_scalars(DType::F64, [n, classes * classes], values.into_iter().map(Scalar::F));
        let to = cx.constant(to);
        linear::matmul(cx, p, to, DType::F64)
    };
    let count = cx.shape(scores)[0].clone();
    let minus = cx.map(ScalarFn::Neg, &[p])?;
    let rest = cx.with_number(ScalarFn::Add, minus, 1.0)?;
    let (r, s) = (place(cx, p, upper)?, place(cx, rest, lower)?);
    let r = cx.map(ScalarFn::Add, &[r, s])?;
    let square = vec![count.clone(), Dim::from(classes), Dim::from(classes)];
    let r = cx.reshape(r, square.clone())?;
    // Q[t, t] = sum of R[s, t]^2, Q[t, s] = -R[s, t] R[t, s].
    let turned = cx.transpose(r, &[0, 2, 1])?;
    let products = cx.map(ScalarFn::Mul, &[r, turned])?;
    let off = cx.map(ScalarFn::Neg, &[products])?;
    let squares = cx.map(ScalarFn::Mul, &[turned, turned])?;
    let sums = reduce::reduce(cx, ReduceFn::Sum, squares, &[2])?;
    let row = cx.emit(Op::Iota { dtype: DType::I64, shape: square.clone(), axis: 1 }, &[])?;
    let column = cx.emit(Op::Iota { dtype: DType::I64, shape: square, axis: 2 }, &[])?;
    let on = cx.map(ScalarFn::Eq, &[row, column])?;
    let q = cx.pointwise(ScalarFn::Select, &[on, sums, off])?;
    let even = cx.scalar(DType::F64, 1.0 / classes as f64);
    let start = cx.broadcast_to(even, &[count, Dim::from(classes)])?;
    let p = iterate(cx, q, start, classes)?;
    cx.cast(p, DType::F32)
}

/// The loop over sweeps: `q[n, k, k]`, `p[n, k]`, both f64.
fn iterate(cx: &mut Cx, q: Val, start: Val, classes: usize) -> Res<Val> {
    let (ty, most) = (cx.ty(start).clone(), classes.max(100));
    let scalar = |dtype| TensorType { dtype, shape: vec![] };
    cx.enter(Graph::new("sweep"));
    cx.input("i", scalar(DType::I64));
    cx.input("go", scalar(DType::Bool));
    let p = cx.input("p", ty);
    let body = sweep(cx, q, p, classes).and_then(|vals| vals.into_iter().map(|v| cx.value(v)).collect::<Res<Vec<_>>>());
    let name = cx.name.clone();
    cx.imp.attribute(&name);
    let mut frame = cx.leave();
    for (value, name) in body?.into_iter().zip(["go", "p"]) {
        frame.graph.output(name, value);
    }
    let trip = cx.scalar(DType::I64, most as f64);
    let go = cx.constant(Tensor::scalar(DType::Bool, Scalar::B(true)));
    let trips = cx.data_symbol(&name, Some(most as i64));
    let mut args = vec![trip, go, start];
    args.extend(&frame.captures);
    Ok(cx.emit_all(Op::Loop { carried: 1, trips, sizes: Sizes::default() }, &args, vec![frame.graph])?[0])
}

/// One sweep: whether any row went on, and the probabilities after it.
fn sweep(b: &mut Builder, q: Val, start: Val, classes: usize) -> Res<Vec<Val>> {
    let tall = |b: &mut Builder, p: Val| {
        let mut shape = b.shape(p);
        shape.push(Dim::one());
        b.reshape(p, shape)
    };
    let column = tall(b, start)?;
    let qp = linear::matmul(b, q, column, DType::F64)?;
    let mut qp = reduce::drop_axes(b, qp, &[2])?;
    let dot = |b: &mut Builder, x: Val, y: Val| {
        let product = b.map(ScalarFn::Mul, &[x, y])?;
        reduce::reduce(b, ReduceFn::Sum, product, &[1])
    };
    let mut pqp = dot(b, start, qp)?;
    let error = b.pointwise(ScalarFn::Sub, &[qp, pqp])?;
    let error = b.map(ScalarFn::Abs, &[error])?;
    let error = reduce::reduce(b, ReduceFn::Max, error, &[1])?;
    let active = b.with_number(ScalarFn::Ge, error, 0.005 / classes as f64)?;
    let mut p = start;
    let shape = b.shape(p);
    for t in 0..classes {
        let row = b.slice_axis(q, 1, Dim::from(t), Dim::one())?;
        let row = reduce::drop_axes(b, row, &[1])?;
        let diagonal = b.slice_axis(row, 1, Dim::from(t), Dim::one())?;
        let own = b.slice_axis(qp, 1, Dim::from(t), Dim::one())?;
        let gap = b.map(ScalarFn::Sub, &[pqp, own])?;
        let step = b.map(ScalarFn::Div, &[gap, diagonal])?;
        let grown = b.with_number(ScalarFn::Add, step, 1.0)?;
        // p Q p after the step.
        let twice = b.with_number(ScalarFn::Mul, own, 2.0)?;
        let change = b.map(ScalarFn::Mul, &[step, diagonal])?;
        let change = b.map(ScalarFn::Add, &[change, twice])?;
        let change = b.map(ScalarFn::Mul, &[change, step])?;
        let area = b.map(ScalarFn::Mul, &[grown, grown])?;
        let sum = b.map(ScalarFn::Add, &[pqp, change])?;
        pqp = b.map(ScalarFn::Div, &[sum, area])?;
        let class = b.emit(Op::Iota { dtype: DType::I64, shape: shape.clone(), axis: 1 }, &[])?;
        let here = b.with_number(ScalarFn::Eq, class, t as f64)?;
        let moved = b.pointwise(ScalarFn::Add, &[p, step])?;
        let moved = b.map(ScalarFn::Select, &[here, moved, p])?;
        p = b.pointwise(ScalarFn::Div, &[moved, grown])?;
        let along = b.pointwise(ScalarFn::Mul, &[row, step])?;
        let along = b.map(ScalarFn::Add, &[qp, along])?;
        qp = b.pointwise(ScalarFn::Div, &[along, grown])?;
    }
    let p = b.pointwise(ScalarFn::Select, &[active, p, start])?;
    let rows = b.cast(active, DType::I32)?;
    let any = reduce::reduce(b, ReduceFn::Max, rows, &[0, 1])?;
    let any = b.with_number(ScalarFn::Gt, any, 0.0)?;
    Ok(vec![b.reshape(any, vec![])?, p])
}
