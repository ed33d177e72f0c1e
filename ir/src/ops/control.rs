//! Control flow: ops with nested graphs.
use super::{
    demand,
    elements::{fits, move_element, raw},
    length_is, result, scalar_of,
};
use crate::{
    Binding, DType, Dim, Graph, Op, Scalar, Tensor, TensorType,
    attr::Sizes,
    dim::{Atom, Sym},
    eval::eval_graph,
    op::{EvalArgs, TypeArgs},
};
use std::{collections::BTreeSet, sync::Arc};

/// The body at `index`, once it takes inputs of these dtypes and ranks.
fn body<'a>(bodies: &'a [Graph], index: usize, inputs: &[&TensorType]) -> Result<&'a Graph, String> {
    let body = bodies.get(index).ok_or_else(|| format!("body {index} is missing"))?;
    let got = body.inputs().len();
    demand(got == inputs.len(), || format!("@{} takes {got} inputs, gets {}", body.name, inputs.len()))?;
    for (i, (id, given)) in body.inputs().iter().zip(inputs).enumerate() {
        let declared = &body[*id].types[0];
        let alike = declared.dtype == given.dtype && declared.rank() == given.rank();
        demand(alike, || format!("input {i} of @{} is {declared}, gets {given}", body.name))?;
    }
    Ok(body)
}

/// Declared inputs of a body that must have exactly the given types.
fn takes(body: &Graph, inputs: &[&TensorType], which: std::ops::Range<usize>) -> Result<(), String> {
    for i in which {
        let declared = &body[body.inputs()[i]].types[0];
        demand(declared == inputs[i], || format!("input {i} of @{} is {declared}, gets {}", body.name, inputs[i]))?;
    }
    Ok(())
}

fn output_types(body: &Graph) -> Vec<TensorType> {
    body.outputs.iter().map(|o| body.ty(o.value).clone()).collect()
}

/// The symbols that results take for extents that are known only when they are there.
struct Fresh<'a>(std::slice::Iter<'a, Sym>);

impl Fresh<'_> {
    fn next(&mut self, why: impl FnOnce() -> String) -> Result<Dim, String> {
        self.0.next().map(|s| Dim::from(Atom::Sym(s.clone()))).ok_or_else(why)
    }

    fn done(mut self) -> Result<(), String> {
        demand(self.0.next().is_none(), || "defines sizes that no result has".into())
    }
}

pub(crate) fn infer_if(args: TypeArgs, sizes: &Sizes) -> Result<Vec<TensorType>, String> {
    scalar_of("the condition", args.types[0], DType::Bool)?;
    length_is("bodies", args.bodies.len(), 2)?;
    let captures = &args.types[1..];
    let mut given = vec![];
    for index in 0..2 {
        let body = body(args.bodies, index, captures)?;
        takes(body, captures, 0..captures.len())?;
        given.push(output_types(body));
    }
    let (yes, no) = (&given[0], &given[1]);
    demand(yes.len() == no.len(), || format!("the bodies give {} and {} results", yes.len(), no.len()))?;
    let mut fresh = Fresh(sizes.0.iter());
    let mut out = vec![];
    for (i, (a, b)) in yes.iter().zip(no).enumerate() {
        let differ = || format!("result {i} is {a} of @{} and {b} of @{}", args.bodies[0].name, args.bodies[1].name);
        demand(a.dtype == b.dtype && a.rank() == b.rank(), differ)?;
        let shape = a.shape.iter().zip(&b.shape).map(|(x, y)| if x == y { Ok(x.clone()) } else { fresh.next(differ) });
        out.push(result(a.dtype, shape.collect::<Result<_, _>>()?)?);
    }
    fresh.done()?;
    Ok(out)
}

pub(crate) fn infer_loop(args: TypeArgs, carried: &usize, trips: &Sym, sizes: &Sizes) -> Result<Vec<TensorType>, String> {
    scalar_of("the trip count", args.types[0], DType::I64)?;
    scalar_of("the condition", args.types[1], DType::Bool)?;
    length_is("bodies", args.bodies.len(), 1)?;
    let values = &args.types[2..];
    demand(*carried <= values.len(), || format!("{carried} carried values among {} operands", values.len()))?;
    let body = body(args.bodies, 0, args.types)?;
    takes(body, args.types, 0..2)?;
    takes(body, args.types, 2 + carried..args.types.len())?;
    let given = output_types(body);
    demand(given.first() == Some(args.types[1]), || format!("@{} gives no condition", body.name))?;
    demand(given.len() > *carried, || format!("@{} gives {} results, carries {carried} values", body.name, given.len()))?;
    let mut inner: BTreeSet<Arc<str>> = body.definers().into_keys().collect();
    let mut fresh = Fresh(sizes.0.iter());
    let mut out = vec![];
    for (i, ty) in values[..*carried].iter().enumerate() {
        let (declared, next) = (&body[body.inputs()[2 + i]].types[0], &given[1 + i]);
        let differ = || format!("carried value {i} is {ty}, declared {declared}, but @{} gives {next}", body.name);
        demand(next.dtype == ty.dtype && next.rank() == ty.rank(), differ)?;
        let mut shape = vec![];
        for ((now, declared), next) in ty.shape.iter().zip(&declared.shape).zip(&next.shape) {
            if declared == now {
                demand(next == now, differ)?;
                shape.push(now.clone());
                continue;
            }
            // A size of the body's own.
            let own = declared.symbols().into_iter().next().filter(|s| *declared == Dim::from(Atom::Sym(s.clone())));
            inner.insert(own.ok_or_else(differ)?.name);
            shape.push(fresh.next(differ)?);
        }
        out.push(result(ty.dtype, shape)?);
    }
    let trips = Dim::from(Atom::Sym(trips.clone()));
    for (i, ty) in given[1 + carried..].iter().enumerate() {
        let mut shape = vec![trips.clone()];
        for d in &ty.shape {
            let known = d.symbols().iter().all(|s| !inner.contains(&s.name));
            shape.push(if known { d.clone() } else { fresh.next(|| format!("scanned value {i} is {ty}, whose sizes only @{} knows", body.name))? });
        }
        out.push(result(ty.dtype, shape)?);
    }
    fresh.done()?;
    Ok(out)
}

/// Runs control flow with the sizes that hold around it; `None` for any other op.
pub(crate) fn run(op: &Op, args: EvalArgs, binding: &Binding) -> Option<Result<Vec<Tensor>, String>> {
    match op {
        Op::If { .. } => Some(run_if(args, binding)),
        Op::Loop { carried, .. } => Some(run_loop(args, *carried, binding)),
        _ => None,
    }
}

pub(crate) fn eval_if(args: EvalArgs, _sizes: &Sizes) -> Result<Vec<Tensor>, String> {
    run_if(args, &Binding::default())
}

pub(crate) fn eval_loop(args: EvalArgs, carried: &usize, _trips: &Sym, _sizes: &Sizes) -> Result<Vec<Tensor>, String> {
    run_loop(args, *carried, &Binding::default())
}

/// Most steps of one loop: more is taken for one that does not end.
const MAX_STEPS: usize = 1 << 26;

fn scalar_operand(args: &EvalArgs, i: usize, what: &str, dtype: DType) -> Result<Scalar, String> {
    let t = args.tensors.get(i).ok_or_else(|| format!("{what} is missing"))?;
    scalar_of(what, &t.ty(), dtype)?;
    Ok(t.get(0))
}

fn only_body<'a>(args: &EvalArgs<'a>) -> Result<&'a Graph, String> {
    args.bodies.first().ok_or_else(|| "the body is missing".to_string())
}

/// A body sees the sizes around it; those it defines itself end with it.
fn call(body: &Graph, inputs: &[Tensor], binding: &Binding) -> Result<Vec<Tensor>, String> {
    eval_graph(body, inputs, &mut binding.clone()).map_err(|e| e.to_string())
}

fn run_if(args: EvalArgs, binding: &Binding) -> Result<Vec<Tensor>, String> {
    let which = usize::from(!scalar_operand(&args, 0, "the condition", DType::Bool)?.b());
    let body = args.bodies.get(which).ok_or("a body is missing")?;
    let captures: Vec<Tensor> = args.tensors[1..].iter().map(|t| (*t).clone()).collect();
    call(body, &captures, binding)
}

fn run_loop(args: EvalArgs, carried: usize, binding: &Binding) -> Result<Vec<Tensor>, String> {
    let limit = scalar_operand(&args, 0, "the trip count", DType::I64)?.i();
    let mut go = scalar_operand(&args, 1, "the condition", DType::Bool)?;
    let body = only_body(&args)?;
    let scanned = body.outputs.len().checked_sub(1 + carried).ok_or("the body gives too few results")?;
    let values = &args.tensors[2..];
    let mut state: Vec<Tensor> = values.get(..carried).ok_or("carried values are missing")?.iter().map(|t| (*t).clone()).collect();
    let mut slices: Vec<Vec<Tensor>> = vec![vec![]; scanned];
    let mut step = 0usize;
    while go.b() && (limit < 0 || (step as i128) < limit) {
        demand(step < MAX_STEPS, || format!("more than {MAX_STEPS} steps"))?;
        let mut inputs = vec![Tensor::from_i64([], &[step as i64]), Tensor::scalar(DType::Bool, go)];
        inputs.append(&mut state);
        inputs.extend(values[carried..].iter().map(|t| (*t).clone()));
        let mut given = call(body, &inputs, binding)?.into_iter();
        let cond = given.next().ok_or("the body gives no condition")?;
        scalar_of("the condition", &cond.ty(), DType::Bool)?;
        go = cond.get(0);
        state = given.by_ref().take(carried).collect();
        slices.iter_mut().zip(given).for_each(|(all, t)| all.push(t));
        step += 1;
    }
    for (output, all) in body.outputs[1 + carried..].iter().zip(slices) {
        state.push(stack(body.ty(output.value), binding, &all)?);
    }
    Ok(state)
}

/// Tensors of one type on a new first axis; without any, sizes that only they would tell are 0.
fn stack(ty: &TensorType, binding: &Binding, slices: &[Tensor]) -> Result<Tensor, String> {
    let shape: Vec<usize> = match slices.first() {
        Some(t) => t.shape().to_vec(),
        None => ty.shape.iter().map(|d| d.eval(binding).and_then(|n| usize::try_from(n).ok()).unwrap_or(0)).collect(),
    };
    demand(slices.iter().all(|t| t.shape() == shape), || "steps give results of different shapes".into())?;
    let n: usize = shape.iter().product();
    let shape: Vec<usize> = std::iter::once(slices.len()).chain(shape).collect();
    let mut bytes = vec![0u8; ty.dtype.bytes(fits(ty.dtype, &shape)?)];
    for (s, t) in slices.iter().enumerate() {
        (0..n).for_each(|i| move_element(&mut bytes, s * n + i, t.bytes(), i, ty.dtype));
    }
    raw(ty.dtype, shape, bytes)
}
