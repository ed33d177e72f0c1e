//! Control flow: bodies become nested graphs, and what they read of outer graphs becomes operands.
use crate::onnx::{
    build::{Builder, Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{DType, Dim, Graph, Op, Scalar, ScalarFn, Tensor, TensorType};

pub(crate) fn branch(cx: &mut Cx) -> Res<Vec<Val>> {
    let cond = cx.arg(0)?;
    let (yes, no) = (cx.graph_attr("then_branch")?, cx.graph_attr("else_branch")?);
    if let Some(known) = cx.tensor(cond).filter(|t| t.count() == 1).map(|t| t.get(0).b()) {
        return cx.imp.inline_body(if known { yes } else { no });
    }
    let cond = cx.reshape(cond, vec![])?;
    let (mut then, types) = cx.imp.body(yes, "then", &[], &[], &mut |_, vals| Ok(vals))?;
    if let Some((a, b)) = cx.equation_of(cond) {
        // Does the other branch keep an axis that this one squeezes away when it is 1? Then no one type fits both, and
        // the sizes are taken to be as the condition asks; the squeeze itself checks that when run.
        let (_, others) = cx.imp.body(no, "else", &[], &then.captures, &mut |_, vals| Ok(vals))?;
        if let ([ty], [other]) = (types.as_slice(), others.as_slice())
            && (a.is(1) || b.is(1))
            && let Some(axis) = other.shape.iter().position(|d| *d == a || *d == b)
            && [&other.shape[..axis], &other.shape[axis + 1..]].concat() == ty.shape
        {
            return cx.imp.inline_body(yes);
        }
    }
    let mut finish = |b: &mut Builder, vals: Vec<Val>| -> Res<Vec<Val>> {
        if vals.len() != types.len() {
            return invalid(format!("the branches give {} and {} results", types.len(), vals.len()));
        }
        vals.into_iter().zip(&types).map(|(v, ty)| alike(b, v, ty)).collect()
    };
    let (other, _) = cx.imp.body(no, "else", &[], &then.captures, &mut finish)?;
    // Both bodies take the captures of both.
    for (i, v) in other.captures.iter().enumerate().skip(then.captures.len()) {
        let ty = cx.ty(*v).clone();
        then.graph.input(format!("capture{i}"), ty);
    }
    let mut args = vec![cond];
    args.extend(&other.captures);
    cx.emit_all(Op::If {}, &args, vec![then.graph, other.graph])
}

/// A value of one branch as the type that the other branch gives.
fn alike(b: &mut Builder, v: Val, ty: &TensorType) -> Res<Val> {
    let own = b.ty(v).clone();
    if own.dtype != ty.dtype {
        return invalid(format!("the branches give {ty} and {own}"));
    }
    if own.rank() != ty.rank() {
        return missing(format!("branches that give different ranks: {ty} and {own}"));
    }
    for (x, y) in ty.shape.iter().zip(&own.shape) {
        if let (Some(_), Some(_)) = (x.as_const(), y.as_const())
            && x != y
        {
            return missing(format!("branches that give different shapes: {ty} and {own}"));
        }
        b.same_extent(x, y)?;
    }
    b.with_shape(v, ty.shape.clone())
}

pub(crate) fn repeat(cx: &mut Cx) -> Res<Vec<Val>> {
    let body = cx.graph_attr("body")?;
    let trip = match cx.opt(0) {
        Some(v) => {
            let v = cx.cast(v, DType::I64)?;
            let v = cx.reshape(v, vec![])?;
            // A negative count of ONNX is none; one of the op `loop` is without limit.
            cx.with_number(ScalarFn::Max, v, 0.0)?
        }
        None => cx.scalar(DType::I64, -1.0),
    };
    let cond = match cx.opt(1) {
        Some(v) => cx.reshape(v, vec![])?,
        None => cx.constant(Tensor::scalar(DType::Bool, Scalar::B(true))),
    };
    let carried: Vec<Val> = (2..cx.inputs.len()).map(|i| cx.arg(i)).collect::<Res<_>>()?;
    let mut inputs = vec![TensorType { dtype: DType::I64, shape: vec![] }, TensorType { dtype: DType::Bool, shape: vec![] }];
    inputs.extend(carried.iter().map(|v| cx.ty(*v).clone()));
    let kept = inputs[1..].to_vec();
    let mut finish = |b: &mut Builder, mut vals: Vec<Val>| -> Res<Vec<Val>> {
        if vals.len() < kept.len() {
            return invalid(format!("the body gives {} results, at least {} are needed", vals.len(), kept.len()));
        }
        vals[0] = b.reshape(vals[0], vec![])?;
        keep(b, &mut vals, &kept)?;
        Ok(vals)
    };
    let (frame, _) = cx.imp.body(body, "body", &inputs, &[], &mut finish)?;
    let name = cx.name.clone();
    let trips = cx.data_symbol(&name, None);
    let mut args = vec![trip, cond];
    args.extend(&carried);
    args.extend(&frame.captures);
    cx.emit_all(Op::Loop { carried: carried.len(), trips }, &args, vec![frame.graph])
}

/// The first results of a body are the next iteration's values: they keep their types.
fn keep(b: &mut Builder, vals: &mut [Val], types: &[TensorType]) -> Res<()> {
    for (v, ty) in vals.iter_mut().zip(types) {
        let own = b.ty(*v).clone();
        if own.dtype != ty.dtype {
            return invalid(format!("a carried value is {ty} first and {own} then"));
        }
        if own.shape != ty.shape {
            let same_rank = own.rank() == ty.rank();
            let differs = same_rank && own.shape.iter().zip(&ty.shape).any(|(a, b)| a != b && (a.clone() - b.clone()).as_const().is_some());
            if !same_rank || differs {
                return missing(format!("a carried value that changes its shape from {ty} to {own}"));
            }
            for (x, y) in ty.shape.iter().zip(&own.shape) {
                b.same_extent(x, y)?;
            }
            *v = b.with_shape(*v, ty.shape.clone())?;
        }
    }
    Ok(())
}

pub(crate) fn scan(cx: &mut Cx) -> Res<Vec<Val>> {
    let body = cx.graph_attr("body")?;
    if cx.since < 9 {
        return missing("the batched form it had in operator set 8");
    }
    let args = cx.args()?;
    let scanned = match usize::try_from(cx.int("num_scan_inputs", 0)?) {
        Ok(n) if (1..=args.len()).contains(&n) => n,
        _ => return invalid("num_scan_inputs"),
    };
    let carried = args.len() - scanned;
    let outputs = body.output.len().saturating_sub(carried);
    let directions = |name: &str, n: usize| -> Res<Vec<bool>> { Ok(cx.ints_of(name, n, 0)?.iter().map(|d| *d != 0).collect()) };
    let (reverse_in, reverse_out) = (directions("scan_input_directions", scanned)?, directions("scan_output_directions", outputs)?);
    let (axes_in, axes_out) = (cx.ints_of("scan_input_axes", scanned, 0)?, cx.ints_of("scan_output_axes", outputs, 0)?);
    // The scanned axis goes first.
    let mut operands = args[..carried].to_vec();
    let mut inputs: Vec<TensorType> = operands.iter().map(|v| cx.ty(*v).clone()).collect();
    let mut steps: Option<Dim> = None;
    for (v, axis) in args[carried..].iter().zip(&axes_in) {
        let rank = cx.rank(*v);
        let axis = cx.axis(*axis, rank)?;
        let perm: Vec<usize> = std::iter::once(axis).chain((0..rank).filter(|i| *i != axis)).collect();
        let mut v = cx.transpose(*v, &perm)?;
        let mut shape = cx.shape(v);
        let extent = match &steps {
            Some(steps) => cx.same_extent(steps, &shape[0])?,
            None => shape[0].clone(),
        };
        shape[0] = extent.clone();
        steps = Some(extent);
        v = cx.with_shape(v, shape.clone())?;
        inputs.push(TensorType { dtype: cx.dtype(v), shape: shape[1..].to_vec() });
        operands.push(v);
    }
    let kept = inputs[..carried].to_vec();
    let mut finish = |b: &mut Builder, mut vals: Vec<Val>| -> Res<Vec<Val>> {
        if vals.len() < kept.len() {
            return invalid(format!("the body gives {} results, at least {} are needed", vals.len(), kept.len()));
        }
        keep(b, &mut vals, &kept)?;
        Ok(vals)
    };
    let (frame, _) = cx.imp.body(body, "body", &inputs, &[], &mut finish)?;
    operands.extend(&frame.captures);
    let mut out = cx.emit_all(Op::Scan { carried, scanned, reverse_in, reverse_out }, &operands, vec![frame.graph])?;
    for (v, axis) in out[carried..].iter_mut().zip(&axes_out) {
        let rank = cx.rank(*v);
        let axis = cx.axis(*axis, rank)?;
        let mut perm: Vec<usize> = (1..rank).collect();
        perm.insert(axis, 0);
        *v = cx.transpose(*v, &perm)?;
    }
    Ok(out)
}

/// What one iteration computes: the next condition, then the next carried values.
type Iteration<'a> = dyn FnMut(&mut Builder, Val, &[Val]) -> Res<Vec<Val>> + 'a;

impl Cx<'_, '_> {
    /// A loop over carried values, at most `trip` times (an i64 scalar) and while the condition holds; `body` gets the
    /// iteration.
    pub(crate) fn repeat(&mut self, trip: Val, cond: Val, carried: &[Val], body: &mut Iteration) -> Res<Vec<Val>> {
        let name = self.name.clone();
        self.enter(Graph::new("body"));
        let i = self.input("iteration", TensorType { dtype: DType::I64, shape: vec![] });
        self.input("condition", TensorType { dtype: DType::Bool, shape: vec![] });
        let values: Vec<Val> = carried
            .iter()
            .enumerate()
            .map(|(k, v)| {
                let ty = self.ty(*v).clone();
                self.input(&format!("carried{k}"), ty)
            })
            .collect();
        let results = body(self, i, &values).and_then(|vals| vals.into_iter().map(|v| self.value(v)).collect::<Res<Vec<_>>>());
        self.imp.attribute(&name);
        let mut frame = self.leave();
        for (k, value) in results?.into_iter().enumerate() {
            frame.graph.output(format!("out{k}"), value);
        }
        let trips = self.data_symbol(&name, None);
        let mut args = vec![trip, cond];
        args.extend(carried);
        args.extend(&frame.captures);
        self.emit_all(Op::Loop { carried: carried.len(), trips }, &args, vec![frame.graph])
    }
}
