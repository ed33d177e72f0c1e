//! Control flow: ops with nested graphs.
use super::{demand, extent_is, length_is, result, scalar_of};
use crate::{
    DType, Dim, Graph, Tensor, TensorType,
    dim::{Atom, Sym},
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

pub(crate) fn eval_if(_args: EvalArgs) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_loop(_args: EvalArgs, _0: &usize, _1: &Sym) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_scan(_args: EvalArgs, _0: &usize, _1: &usize, _2: &[bool], _3: &[bool]) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
