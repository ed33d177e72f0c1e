//! Control flow: ops with nested graphs.
use super::{
    demand,
    elements::{fits, move_element, pick, raw},
    extent_is, length_is, result, scalar_of,
};
use crate::{
    Binding, DType, Dim, Graph, Op, Scalar, Tensor, TensorType,
    dim::{Atom, Sym},
    eval::eval_graph,
    op::{EvalArgs, TypeArgs},
};

/// The body at `index`, once it takes inputs of exactly these types.
fn body<'a>(bodies: &'a [Graph], index: usize, inputs: &[TensorType]) -> Result<&'a Graph, String> {
    let body = bodies.get(index).ok_or_else(|| format!("body {index} is missing"))?;
    let got = body.inputs().len();
    demand(got == inputs.len(), || format!("@{} takes {got} inputs, gets {}", body.name, inputs.len()))?;
    for (i, (id, expected)) in body.inputs().iter().zip(inputs).enumerate() {
        let declared = &body[*id].types[0];
        demand(declared == expected, || format!("input {i} of @{} is {declared}, gets {expected}", body.name))?;
    }
    Ok(body)
}

fn output_types(body: &Graph) -> Vec<TensorType> {
    body.outputs.iter().map(|o| body.ty(o.value).clone()).collect()
}

fn keeps(body: &Graph, what: &str, given: &TensorType, got: Option<&TensorType>) -> Result<(), String> {
    let shown = got.map_or_else(|| "nothing".to_string(), TensorType::to_string);
    demand(got == Some(given), || format!("{what} is {given}, but @{} gives {shown}", body.name))
}

fn stacked(extent: &Dim, ty: &TensorType) -> Result<TensorType, String> {
    result(ty.dtype, std::iter::once(extent).chain(&ty.shape).cloned().collect())
}

pub(crate) fn infer_if(args: TypeArgs) -> Result<Vec<TensorType>, String> {
    scalar_of("the condition", args.types[0], DType::Bool)?;
    length_is("bodies", args.bodies.len(), 2)?;
    let captures: Vec<TensorType> = args.types[1..].iter().map(|t| (*t).clone()).collect();
    let yes = output_types(body(args.bodies, 0, &captures)?);
    let no = output_types(body(args.bodies, 1, &captures)?);
    demand(yes.len() == no.len(), || format!("the bodies give {} and {} results", yes.len(), no.len()))?;
    for (i, (a, b)) in yes.iter().zip(&no).enumerate() {
        demand(a == b, || format!("result {i} is {a} of @{} and {b} of @{}", args.bodies[0].name, args.bodies[1].name))?;
    }
    Ok(yes)
}

pub(crate) fn infer_loop(args: TypeArgs, carried: &usize, trips: &Sym) -> Result<Vec<TensorType>, String> {
    scalar_of("the trip count", args.types[0], DType::I64)?;
    scalar_of("the condition", args.types[1], DType::Bool)?;
    length_is("bodies", args.bodies.len(), 1)?;
    let values = &args.types[2..];
    demand(*carried <= values.len(), || format!("{carried} carried values among {} operands", values.len()))?;
    let inputs: Vec<TensorType> = args.types.iter().map(|t| (*t).clone()).collect();
    let body = body(args.bodies, 0, &inputs)?;
    let given = output_types(body);
    keeps(body, "the condition", args.types[1], given.first())?;
    for (i, ty) in values[..*carried].iter().enumerate() {
        keeps(body, &format!("carried value {i}"), ty, given.get(1 + i))?;
    }
    let trips = Dim::from(Atom::Sym(trips.clone()));
    let mut out = given[1..=*carried].to_vec();
    for ty in &given[1 + carried..] {
        out.push(stacked(&trips, ty)?);
    }
    Ok(out)
}

pub(crate) fn infer_scan(args: TypeArgs, carried: &usize, scanned: &usize, reverse_in: &[bool], reverse_out: &[bool]) -> Result<Vec<TensorType>, String> {
    length_is("bodies", args.bodies.len(), 1)?;
    demand(*scanned >= 1, || "scans no input".into())?;
    demand(carried.checked_add(*scanned).is_some_and(|n| n <= args.types.len()), || {
        format!("{carried} states and {scanned} inputs among {} operands", args.types.len())
    })?;
    length_is("reverse_in", reverse_in.len(), *scanned)?;
    let mut inputs: Vec<TensorType> = args.types.iter().map(|t| (*t).clone()).collect();
    let mut steps: Option<Dim> = None;
    for (i, ty) in inputs[*carried..carried + scanned].iter_mut().enumerate() {
        demand(ty.rank() >= 1, || format!("scanned input {i} is a scalar"))?;
        let extent = ty.shape.remove(0);
        if let Some(steps) = &steps {
            extent_is(&format!("first axis of scanned input {i}"), &extent, steps)?;
        }
        steps = Some(extent);
    }
    let steps = steps.unwrap_or_default();
    let body = body(args.bodies, 0, &inputs)?;
    let given = output_types(body);
    for (i, ty) in inputs[..*carried].iter().enumerate() {
        keeps(body, &format!("state {i}"), ty, given.get(i))?;
    }
    length_is("reverse_out", reverse_out.len(), given.len() - carried)?;
    let mut out = given[..*carried].to_vec();
    for ty in &given[*carried..] {
        out.push(stacked(&steps, ty)?);
    }
    Ok(out)
}

/// Runs control flow with the sizes that hold around it; `None` for any other op.
pub(crate) fn run(op: &Op, args: EvalArgs, binding: &Binding) -> Option<Result<Vec<Tensor>, String>> {
    match op {
        Op::If {} => Some(run_if(args, binding)),
        Op::Loop { carried, .. } => Some(run_loop(args, *carried, binding)),
        Op::Scan { carried, scanned, reverse_in, reverse_out } => Some(run_scan(args, *carried, *scanned, reverse_in, reverse_out, binding)),
        _ => None,
    }
}

pub(crate) fn eval_if(args: EvalArgs) -> Result<Vec<Tensor>, String> {
    run_if(args, &Binding::default())
}

pub(crate) fn eval_loop(args: EvalArgs, carried: &usize, _trips: &Sym) -> Result<Vec<Tensor>, String> {
    run_loop(args, *carried, &Binding::default())
}

pub(crate) fn eval_scan(args: EvalArgs, carried: &usize, scanned: &usize, reverse_in: &[bool], reverse_out: &[bool]) -> Result<Vec<Tensor>, String> {
    run_scan(args, *carried, *scanned, reverse_in, reverse_out, &Binding::default())
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
        state.push(stack(&body.ty(output.value).bind(binding), &all)?);
    }
    Ok(state)
}

fn run_scan(args: EvalArgs, carried: usize, scanned: usize, reverse_in: &[bool], reverse_out: &[bool], binding: &Binding) -> Result<Vec<Tensor>, String> {
    let body = only_body(&args)?;
    let outputs = body.outputs.len().checked_sub(carried).ok_or("the body gives too few results")?;
    demand(reverse_in.len() == scanned && reverse_out.len() == outputs, || "a direction is missing".into())?;
    let end = carried.checked_add(scanned).filter(|n| *n <= args.tensors.len() && scanned > 0).ok_or("scanned inputs are missing")?;
    let inputs = &args.tensors[carried..end];
    let steps = inputs[0].shape().first().copied().ok_or("a scanned input is a scalar")?;
    demand(inputs.iter().all(|t| t.shape().first() == Some(&steps)), || "scanned inputs have different extents".into())?;
    let mut state: Vec<Tensor> = args.tensors[..carried].iter().map(|t| (*t).clone()).collect();
    let mut slices: Vec<Vec<Tensor>> = vec![vec![]; outputs];
    for step in 0..steps {
        let mut operands = std::mem::take(&mut state);
        for (x, reverse) in inputs.iter().zip(reverse_in) {
            operands.push(slice(x, if *reverse { steps - 1 - step } else { step })?);
        }
        operands.extend(args.tensors[end..].iter().map(|t| (*t).clone()));
        let mut given = call(body, &operands, binding)?.into_iter();
        state = given.by_ref().take(carried).collect();
        slices.iter_mut().zip(given).for_each(|(all, t)| all.push(t));
    }
    for ((output, mut all), reverse) in body.outputs[carried..].iter().zip(slices).zip(reverse_out) {
        if *reverse {
            all.reverse();
        }
        state.push(stack(&body.ty(output.value).bind(binding), &all)?);
    }
    Ok(state)
}

/// Element `i` along the first axis.
fn slice(x: &Tensor, i: usize) -> Result<Tensor, String> {
    let shape = x.shape()[1..].to_vec();
    let n: usize = shape.iter().product();
    pick(x, shape, i * n..(i + 1) * n)
}

/// Tensors of one type on a new first axis.
fn stack(ty: &TensorType, slices: &[Tensor]) -> Result<Tensor, String> {
    let shape = match slices.first() {
        Some(t) => t.shape().to_vec(),
        None => ty.const_shape().ok_or_else(|| format!("the size of {ty} is unknown after no step"))?,
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
