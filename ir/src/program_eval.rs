//! What a program means: its regions evaluated one after another on host tensors.
//!
//! Slow, and exact to [`crate::region_eval`]; for checking passes and kernels on small inputs.
use crate::{
    Binding, DType, Graph, Scalar, Tensor, TensorType,
    dim::Atom,
    program::{Body, BufId, BufferKind, Program, Step},
    region::RegionOutput,
    region_eval::eval_region,
};

/// Run `program` on `inputs`, the types of `graph`'s inputs binding size symbols.
pub fn eval_program(program: &Program, graph: &Graph, inputs: &[Tensor]) -> Result<Vec<Tensor>, String> {
    let mut binding = Binding::default();
    for (&id, t) in graph.inputs().iter().zip(inputs) {
        let ty = graph.ty(id.into());
        for (d, &n) in ty.shape.iter().zip(t.shape()) {
            if let [(atoms, 1)] = d.terms()
                && let [Atom::Sym(s)] = atoms.as_slice()
            {
                binding.0.insert(s.name.clone(), n as i64);
            }
        }
    }
    run(&program.body, inputs, &[], &mut binding)
}

/// Buffers of the bodies around, innermost last.
type Frames<'a> = &'a [&'a [Option<Tensor>]];

fn run(body: &Body, inputs: &[Tensor], outer: Frames, binding: &mut Binding) -> Result<Vec<Tensor>, String> {
    let mut bufs: Vec<Option<Tensor>> = vec![None; body.buffers.len()];
    for (i, b) in body.inputs.iter().enumerate() {
        if let Some(t) = inputs.get(i) {
            define(&body.buffers[b.index()].ty, t, binding);
        }
        bufs[b.index()] = inputs.get(i).cloned();
    }
    for step in &body.steps {
        match step {
            Step::Run { region, args, outputs, .. } => {
                let args = args.iter().map(|b| get(body, &bufs, outer, *b, binding)).collect::<Result<Vec<_>, _>>()?;
                // A region may write part of a tensor that earlier steps have begun.
                let begun = |(b, out): (&BufId, &RegionOutput)| bufs[b.index()].clone().map_or_else(|| zeros(&out.ty, binding), Ok);
                let begun = outputs.iter().zip(&region.outputs).map(begun).collect::<Result<Vec<_>, _>>()?;
                let results = eval_region(region, &args, binding, Some(&begun)).map_err(|e| format!("{}: {e}", region.name))?;
                outputs.iter().zip(results).for_each(|(b, t)| bufs[b.index()] = Some(t));
            }
            Step::Copy { from, to } => bufs[to.index()] = Some(get(body, &bufs, outer, *from, binding)?),
            Step::Bind { buffer, sym } => {
                let t = get(body, &bufs, outer, *buffer, binding)?;
                binding.0.insert(sym.name.clone(), t.get(0).i() as i64);
            }
            Step::If { cond, then_body, else_body, outputs } => {
                let branch = if get(body, &bufs, outer, *cond, binding)?.get(0).b() { then_body } else { else_body };
                let frames: Vec<&[Option<Tensor>]> = outer.iter().copied().chain([bufs.as_slice()]).collect();
                let results = run(branch, &[], &frames, &mut binding.clone())?;
                for (b, t) in outputs.iter().zip(results) {
                    define(&body.buffers[b.index()].ty, &t, binding);
                    bufs[b.index()] = Some(t);
                }
            }
            Step::Loop { trip, cond, body: inner, carried, outputs } => {
                let limit = get(body, &bufs, outer, *trip, binding)?.get(0).i();
                let mut go = get(body, &bufs, outer, *cond, binding)?.get(0).b();
                let mut values = carried.iter().map(|b| get(body, &bufs, outer, *b, binding)).collect::<Result<Vec<_>, _>>()?;
                let mut scanned: Vec<Vec<Tensor>> = vec![vec![]; outputs.len() - carried.len()];
                let mut i = 0i128;
                while go && (limit < 0 || i < limit) {
                    let mut ins = vec![Tensor::scalar(DType::I64, Scalar::I(i)), Tensor::scalar(DType::Bool, Scalar::B(go))];
                    ins.extend(values.iter().cloned());
                    let frames: Vec<&[Option<Tensor>]> = outer.iter().copied().chain([bufs.as_slice()]).collect();
                    let mut out = run(inner, &ins, &frames, &mut binding.clone())?.into_iter();
                    go = out.next().is_some_and(|t| t.get(0).b());
                    values = out.by_ref().take(values.len()).collect();
                    scanned.iter_mut().zip(out).for_each(|(s, t)| s.push(t));
                    i += 1;
                }
                for (b, t) in outputs.iter().zip(values.into_iter().map(Ok).chain(scanned.into_iter().map(stack))) {
                    let t = t?;
                    define(&body.buffers[b.index()].ty, &t, binding);
                    bufs[b.index()] = Some(t);
                }
            }
        }
    }
    body.outputs.iter().map(|b| get(body, &bufs, outer, *b, binding)).collect()
}

/// Sizes that a value of nested bodies defines by its shape.
fn define(ty: &TensorType, t: &Tensor, binding: &mut Binding) {
    for (d, n) in ty.shape.iter().zip(t.shape()) {
        if let [(atoms, 1)] = d.terms()
            && let [Atom::Sym(s)] = atoms.as_slice()
        {
            binding.0.entry(s.name.clone()).or_insert(*n as i64);
        }
    }
}

fn extents(ty: &TensorType, binding: &Binding) -> Result<Vec<usize>, String> {
    ty.shape.iter().map(|d| d.eval(binding).and_then(|v| usize::try_from(v).ok()).ok_or_else(|| format!("size {d} has no value"))).collect()
}

/// A tensor that nothing has written yet.
fn zeros(ty: &TensorType, binding: &Binding) -> Result<Tensor, String> {
    let shape = extents(ty, binding)?;
    let bytes = vec![0; ty.dtype.bytes(shape.iter().product())];
    Tensor::new(ty.dtype, shape, bytes).map_err(|e| e.to_string())
}

fn stack(parts: Vec<Tensor>) -> Result<Tensor, String> {
    let first = parts.first().ok_or("a loop without iterations scanned nothing")?;
    let shape: Vec<usize> = [parts.len()].into_iter().chain(first.shape().iter().copied()).collect();
    let bytes = parts.iter().flat_map(|t| t.bytes().to_vec()).collect();
    Tensor::new(first.dtype(), shape, bytes).map_err(|e| e.to_string())
}

fn get(body: &Body, bufs: &[Option<Tensor>], outer: Frames, b: BufId, binding: &Binding) -> Result<Tensor, String> {
    if let Some(t) = &bufs[b.index()] {
        return Ok(t.clone());
    }
    let buffer = &body.buffers[b.index()];
    match &buffer.kind {
        BufferKind::Const(t) => Ok(t.clone()),
        BufferKind::View(of) => get(body, bufs, outer, *of, binding)?.reshaped(extents(&buffer.ty, binding)?).map_err(|e| e.to_string()),
        BufferKind::Captured(of) => {
            let (here, rest) = outer.split_last().ok_or("nothing to capture from")?;
            here[of.index()].clone().ok_or_else(|| format!("captured buffer {} is empty ({} frames around)", of.0, rest.len()))
        }
        BufferKind::Input(_) | BufferKind::Output(_) | BufferKind::Temp => Err(format!("buffer {} is read before it is written", b.0)),
    }
}
