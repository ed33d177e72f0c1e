//! Control flow: bodies become nested graphs, and what they read of outer graphs becomes operands.
use super::sequence::{self, Layout};
use crate::onnx::{
    build::{Builder, Res, Val, invalid, missing},
    cx::Cx,
    import::Finish,
};
use onnx_protobuf::GraphProto;
use pavage_ir::{DType, Dim, Op, Scalar, ScalarFn, Tensor, TensorType, attr::Sizes, dim::Atom};
use std::collections::BTreeSet;

pub(crate) fn branch(cx: &mut Cx) -> Res<Vec<Val>> {
    let cond = cx.arg(0)?;
    let (yes, no) = (cx.graph_attr("then_branch")?, cx.graph_attr("else_branch")?);
    if let Some(known) = cx.tensor(cond).filter(|t| t.count() == 1).map(|t| t.get(0).b()) {
        return cx.imp.inline_body(if known { yes } else { no });
    }
    let cond = cx.reshape(cond, vec![])?;
    // What the results are made of, once both branches said so.
    let mut layouts: Option<Vec<Layout>> = None;
    let none = &mut |_: &mut Builder, vals: Vec<Val>| Ok(vals);
    let (then, types, other, others) = loop {
        let mut said: Vec<Vec<Layout>> = vec![];
        let mut finish = |b: &mut Builder, vals: Vec<Val>| -> Res<Vec<Val>> {
            let own: Vec<Layout> = vals.iter().map(|v| sequence::layout(b, *v)).collect();
            let target = layouts.as_ref().unwrap_or(&own);
            if target.len() != vals.len() {
                return invalid(format!("the branches give {} and {} results", target.len(), vals.len()));
            }
            let mut flat = vec![];
            for (v, layout) in vals.into_iter().zip(target) {
                flat.extend(sequence::flatten(b, v, layout)?);
            }
            said.push(own);
            Ok(flat)
        };
        let (then, types) = cx.imp.body(yes, "then", (&[], none), &[], &mut finish)?;
        let (other, others) = cx.imp.body(no, "else", (&[], none), &then.captures, &mut finish)?;
        if said[0].len() != said[1].len() {
            return invalid(format!("the branches give {} and {} results", said[0].len(), said[1].len()));
        }
        let joined = said[0].iter().zip(&said[1]).map(|(a, b)| a.join(b)).collect::<Res<Vec<_>>>()?;
        let settled = layouts.is_some() || said[0] == said[1];
        layouts = Some(joined);
        if settled {
            break (then, types, other, others);
        }
    };
    let layouts = layouts.unwrap_or_default();
    if let Some((a, b)) = cx.equation_of(cond)
        && let ([ty], [other]) = (types.as_slice(), others.as_slice())
        && (a.is(1) || b.is(1))
        && let Some(axis) = other.shape.iter().position(|d| *d == a || *d == b)
        && [&other.shape[..axis], &other.shape[axis + 1..]].concat() == ty.shape
    {
        // The other branch keeps an axis that this one squeezes away when it is 1. Then no one type fits both, and
        // the sizes are taken to be as the condition asks; the squeeze itself checks that when run.
        return cx.imp.inline_body(yes);
    }
    let mut then = then;
    // Both bodies take the captures of both.
    for (i, v) in other.captures.iter().enumerate().skip(then.captures.len()) {
        let ty = cx.ty(*v).clone();
        then.graph.input(format!("capture{i}"), ty);
    }
    let mut sizes = vec![];
    let name = cx.name.clone();
    for (a, b) in types.iter().zip(&others) {
        if a.dtype != b.dtype {
            return invalid(format!("the branches give {a} and {b}"));
        }
        if a.rank() != b.rank() {
            return missing(format!("branches that give different ranks: {a} and {b}"));
        }
        for _ in a.shape.iter().zip(&b.shape).filter(|(x, y)| x != y) {
            sizes.push(cx.data_symbol(&name, None));
        }
    }
    let mut args = vec![cond];
    args.extend(&other.captures);
    let out = cx.emit_all(Op::If { sizes: Sizes(sizes) }, &args, vec![then.graph, other.graph])?;
    let mut parts = out.into_iter();
    layouts.iter().map(|layout| sequence::unflatten(cx, layout, &mut parts)).collect()
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
    let carried: Vec<Val> = (2..cx.inputs.len()).map(|i| cx.any(i)).collect::<Res<_>>()?;
    let mut formals = |_: &mut Builder, given: &[Val], values: Vec<Val>| -> Res<Vec<Val>> { Ok([&given[..2], &values].concat()) };
    let mut results = |b: &mut Builder, mut vals: Vec<Val>| -> Res<Vec<Val>> {
        match vals.first() {
            Some(cond) => vals[0] = b.reshape(*cond, vec![])?,
            None => return invalid("the body gives no condition"),
        }
        Ok(vals)
    };
    looped(cx, body, [trip, cond], &carried, &mut formals, &mut results)
}

/// What a body's declared inputs are, of the iteration, the condition and the carried values.
type Formals<'a> = dyn FnMut(&mut Builder, &[Val], Vec<Val>) -> Res<Vec<Val>> + 'a;

/// Where a carried extent changes from one iteration to the next: which tensor, which axis.
type Moving = BTreeSet<(usize, usize)>;

/// A loop over a body: `results` turns what it gives into the condition, the carried values and the scanned ones.
fn looped<'m>(
    cx: &mut Cx<'_, 'm>,
    body: &'m GraphProto,
    [trip, cond]: [Val; 2],
    carried: &[Val],
    formals: &mut Formals,
    results: &mut Finish,
) -> Res<Vec<Val>> {
    let name = cx.name.clone();
    let layouts: Vec<Layout> = carried.iter().map(|v| sequence::layout(cx, *v)).collect();
    let mut first = vec![];
    for (v, layout) in carried.iter().zip(&layouts) {
        first.extend(sequence::flatten(cx, *v, layout)?);
    }
    let given: Vec<TensorType> = first.iter().map(|v| cx.ty(*v).clone()).collect();
    let mut moving = Moving::new();
    let frame = loop {
        let mut inputs = vec![TensorType { dtype: DType::I64, shape: vec![] }, TensorType { dtype: DType::Bool, shape: vec![] }];
        for (i, ty) in given.iter().enumerate() {
            let mut ty = ty.clone();
            for (axis, d) in ty.shape.iter_mut().enumerate().filter(|(axis, _)| moving.contains(&(i, *axis))) {
                *d = Dim::from(Atom::Sym(cx.data_symbol(&format!("{name}_{i}_{axis}"), None)));
            }
            inputs.push(ty);
        }
        let mut more = moving.clone();
        let mut enter = |b: &mut Builder, given: Vec<Val>| -> Res<Vec<Val>> {
            let mut parts = given[2..].iter().copied();
            let values = layouts.iter().map(|layout| sequence::unflatten(b, layout, &mut parts)).collect::<Res<Vec<_>>>()?;
            formals(b, &given[..2], values)
        };
        let mut finish = |b: &mut Builder, vals: Vec<Val>| -> Res<Vec<Val>> {
            let vals = results(b, vals)?;
            if vals.len() < 1 + layouts.len() {
                return invalid(format!("the body gives {} results, at least {} are needed", vals.len(), 1 + layouts.len()));
            }
            let mut flat = vec![vals[0]];
            for (v, layout) in vals[1..].iter().zip(&layouts) {
                let own = sequence::layout(b, *v);
                if own != *layout {
                    return missing(format!("a carried value that is {layout:?} first and {own:?} then"));
                }
                flat.extend(sequence::flatten(b, *v, layout)?);
            }
            for (i, (v, ty)) in flat[1..].iter().zip(&given).enumerate() {
                let own = b.ty(*v);
                if own.rank() != ty.rank() {
                    return missing(format!("a carried value that changes its shape from {ty} to {own}"));
                }
                more.extend((0..ty.rank()).filter(|axis| own.shape[*axis] != ty.shape[*axis]).map(|axis| (i, axis)));
            }
            flat.extend(&vals[1 + layouts.len()..]);
            Ok(flat)
        };
        let (frame, _) = cx.imp.body(body, "body", (&inputs, &mut enter), &[], &mut finish)?;
        if more == moving {
            break (frame, inputs);
        }
        moving = more;
    };
    let (frame, inputs) = frame;
    // Sizes that only the body knows: of carried values that change, and of what it scans.
    let mut inner: BTreeSet<String> = frame.graph.definers().into_keys().map(|s| s.to_string()).collect();
    for (i, axis) in &moving {
        inner.extend(inputs[2 + i].shape[*axis].symbols().iter().map(|s| s.name.to_string()));
    }
    let scanned = frame.graph.outputs[1 + given.len()..].iter().flat_map(|o| frame.graph.ty(o.value).shape.clone());
    let unknown = scanned.filter(|d| d.symbols().iter().any(|s| inner.contains(s.name.as_ref()))).count();
    let trips = cx.data_symbol(&name, None);
    let sizes = (0..moving.len() + unknown).map(|_| cx.data_symbol(&name, None)).collect();
    let mut args = vec![trip, cond];
    args.extend(&first);
    args.extend(&frame.captures);
    let out = cx.emit_all(Op::Loop { carried: first.len(), trips, sizes: Sizes(sizes) }, &args, vec![frame.graph])?;
    let mut parts = out[..first.len()].iter().copied();
    let mut all = layouts.iter().map(|layout| sequence::unflatten(cx, layout, &mut parts)).collect::<Res<Vec<_>>>()?;
    all.extend(&out[first.len()..]);
    Ok(all)
}

pub(crate) fn scan(cx: &mut Cx) -> Res<Vec<Val>> {
    let body = cx.graph_attr("body")?;
    if cx.since < 9 {
        return batched_scan(cx, body);
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
    let mut operands = vec![];
    for (v, axis) in args[carried..].iter().zip(&axes_in) {
        let rank = cx.rank(*v);
        let axis = cx.axis(*axis, rank)?;
        let perm: Vec<usize> = std::iter::once(axis).chain((0..rank).filter(|i| *i != axis)).collect();
        operands.push(cx.transpose(*v, &perm)?);
    }
    let mut out = scan_first(cx, body, &args[..carried], &operands, &reverse_in, &reverse_out)?;
    for (v, axis) in out[carried..].iter_mut().zip(&axes_out) {
        let rank = cx.rank(*v);
        let axis = cx.axis(*axis, rank)?;
        let mut perm: Vec<usize> = (1..rank).collect();
        perm.insert(axis, 0);
        *v = cx.transpose(*v, &perm)?;
    }
    Ok(out)
}

/// A scan along the first axes, as a loop over their elements.
fn scan_first<'m>(cx: &mut Cx<'_, 'm>, body: &'m GraphProto, states: &[Val], scanned: &[Val], reverse_in: &[bool], reverse_out: &[bool]) -> Res<Vec<Val>> {
    let mut steps = match scanned.first().map(|v| cx.shape(*v)) {
        Some(shape) if !shape.is_empty() => shape[0].clone(),
        _ => return invalid("a scanned input is a scalar"),
    };
    for v in &scanned[1..] {
        let Some(extent) = cx.shape(*v).first().cloned() else { return invalid("a scanned input is a scalar") };
        steps = cx.same_extent(&steps, &extent)?;
    }
    let last = cx.known_dims(DType::I64, &[], vec![steps.clone() - Dim::one()]);
    let trip = cx.known_dims(DType::I64, &[], vec![steps.clone()]);
    let cond = cx.constant(Tensor::scalar(DType::Bool, Scalar::B(true)));
    let mut formals = |b: &mut Builder, given: &[Val], mut values: Vec<Val>| -> Res<Vec<Val>> {
        for (v, reverse) in scanned.iter().zip(reverse_in) {
            let i = if *reverse { b.map(ScalarFn::Sub, &[last, given[0]])? } else { given[0] };
            values.push(b.emit(Op::Gather { axis: 0 }, &[*v, i])?);
        }
        Ok(values)
    };
    let mut results = |b: &mut Builder, vals: Vec<Val>| -> Res<Vec<Val>> {
        let go = b.constant(Tensor::scalar(DType::Bool, Scalar::B(true)));
        Ok(std::iter::once(go).chain(vals).collect())
    };
    let mut out = looped(cx, body, [trip, cond], states, &mut formals, &mut results)?;
    if out.len() != states.len() + reverse_out.len() {
        return invalid(format!("the body gives {} results", out.len()));
    }
    for (v, reverse) in out[states.len()..].iter_mut().zip(reverse_out) {
        // As many steps as the scanned inputs have elements.
        let mut shape = cx.shape(*v);
        shape[0] = steps.clone();
        *v = cx.with_shape(*v, shape.clone())?;
        if *reverse {
            let (mut starts, mut stride) = (vec![Dim::ZERO; shape.len()], vec![1; shape.len()]);
            (starts[0], stride[0]) = (steps.clone() - Dim::one(), -1);
            *v = cx.emit(Op::Slice { starts, sizes: shape, steps: stride }, &[*v])?;
        }
    }
    Ok(out)
}

/// Most examples of a batch that the oldest form of `Scan` is repeated for.
const BATCH: i64 = 64;

/// The form of operator set 8: every operand has a batch axis first, the scanned axis second.
fn batched_scan<'m>(cx: &mut Cx<'_, 'm>, body: &'m GraphProto) -> Res<Vec<Val>> {
    if cx.opt(0).is_some() {
        return missing("sequence lengths of Scan");
    }
    let args: Vec<Val> = (1..cx.inputs.len()).map(|i| cx.arg(i)).collect::<Res<_>>()?;
    let scanned = match usize::try_from(cx.int("num_scan_inputs", 0)?) {
        Ok(n) if (1..=args.len()).contains(&n) => n,
        _ => return invalid("num_scan_inputs"),
    };
    let carried = args.len() - scanned;
    let reverse: Vec<bool> = cx.ints_of("directions", scanned, 0)?.iter().map(|d| *d != 0).collect();
    let forward = vec![false; body.output.len().saturating_sub(carried)];
    let batch = match cx.shape(args[carried]).first().and_then(Dim::as_const) {
        Some(n @ 1..=BATCH) => n,
        _ => return missing(format!("the form it had in operator set 8, but for 1 to {BATCH} examples")),
    };
    let mut all: Vec<Vec<Val>> = vec![];
    for i in 0..batch {
        let mut own = vec![];
        for v in &args {
            let one = cx.slice_axis(*v, 0, Dim::from(i), Dim::one())?;
            own.push(super::reduce::drop_axes(cx, one, &[0])?);
        }
        let out = scan_first(cx, body, &own[..carried], &own[carried..], &reverse, &forward)?;
        all.resize(out.len(), vec![]);
        for (parts, v) in all.iter_mut().zip(out) {
            let mut shape = cx.shape(v);
            shape.insert(0, Dim::one());
            parts.push(cx.reshape(v, shape)?);
        }
    }
    all.iter().map(|parts| super::view::concat_along(cx, parts, 0)).collect()
}

/// One iteration for each element of the first sequence; tensors among the operands go into all of them.
pub(crate) fn sequence_map(cx: &mut Cx) -> Res<Vec<Val>> {
    let body = cx.graph_attr("body")?;
    let inputs: Vec<Val> = (0..cx.inputs.len()).map(|i| cx.any(i)).collect::<Res<_>>()?;
    let Some(first) = inputs.first() else { return invalid("no operands") };
    let trip = sequence::count_of(cx, *first)?;
    let cond = cx.constant(Tensor::scalar(DType::Bool, Scalar::B(true)));
    let name = cx.name.clone();
    // The element types of what it gives are those that the body declares.
    let mut carried = vec![];
    for output in &body.output {
        carried.push(sequence::empty_like(cx, &output.type_)?);
    }
    let mut before: Vec<Val> = vec![];
    let slots = std::cell::RefCell::new(&mut before);
    let mut formals = |b: &mut Builder, given: &[Val], values: Vec<Val>| -> Res<Vec<Val>> {
        **slots.borrow_mut() = values;
        inputs.iter().map(|v| if b.composite(*v).is_some() { sequence::element_at(b, *v, given[0], &name) } else { Ok(*v) }).collect()
    };
    let mut results = |b: &mut Builder, vals: Vec<Val>| -> Res<Vec<Val>> {
        let go = b.constant(Tensor::scalar(DType::Bool, Scalar::B(true)));
        let mut out = vec![go];
        for (seq, v) in slots.borrow().iter().zip(vals) {
            out.push(sequence::append(b, *seq, v)?);
        }
        Ok(out)
    };
    looped(cx, body, [trip, cond], &carried, &mut formals, &mut results)
}

/// What one iteration computes: the next condition, then the next carried values.
type Iteration<'a> = dyn FnMut(&mut Builder, Val, &[Val]) -> Res<Vec<Val>> + 'a;

impl Cx<'_, '_> {
    /// A loop over carried values, at most `trip` times (an i64 scalar) and while the condition holds; `body` gets the
    /// iteration.
    pub(crate) fn repeat(&mut self, trip: Val, cond: Val, carried: &[Val], body: &mut Iteration) -> Res<Vec<Val>> {
        let name = self.name.clone();
        let mut inputs = vec![TensorType { dtype: DType::I64, shape: vec![] }, TensorType { dtype: DType::Bool, shape: vec![] }];
        inputs.extend(carried.iter().map(|v| self.ty(*v).clone()));
        let frame = self.nested("body", &name, &inputs, |b, given| body(b, given[0], &given[2..]))?;
        let trips = self.data_symbol(&name, None);
        let mut args = vec![trip, cond];
        args.extend(carried);
        args.extend(&frame.captures);
        self.emit_all(Op::Loop { carried: carried.len(), trips, sizes: Sizes::default() }, &args, vec![frame.graph])
    }
}
