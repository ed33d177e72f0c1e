//! Everything a reader relies on, checked when an artifact is opened and before it is written:
//! every index names something, every size is defined before it is used, every tensor lies in
//! its segment. What a session does afterwards cannot go out of bounds of the manifest.
use crate::analysis;
use crate::artifact::{Segment, SegmentKind, TENSOR_ALIGN};
use crate::plan::{CodeKind, GpuLaunch, Kernel, Manifest, Plan, TensorData, TensorEntry};
use crate::{DimExpr, Error};

pub(crate) fn manifest(manifest: &Manifest, segments: &[Segment]) -> Result<(), Error> {
    check(manifest, segments).map_err(Error::Damaged)
}

fn need(holds: bool, message: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(message()) }
}

fn check(manifest: &Manifest, segments: &[Segment]) -> Result<(), String> {
    let has = |index: u32, kind| segments.get(index as usize).is_some_and(|s| s.kind == kind);
    for code in &manifest.codes {
        need(has(code.segment, SegmentKind::Code), || format!("code for {}: segment {} is no code", code.target, code.segment))?;
    }
    for tensor in &manifest.tensors {
        check_tensor(tensor, segments).map_err(|e| format!("tensor `{}`: {e}", tensor.name))?;
    }
    for symbol in &manifest.symbols {
        need(symbol.min <= symbol.max, || format!("symbol `{}` has an empty range", symbol.name))?;
    }
    unique("input", manifest.inputs.iter().map(|p| &p.name))?;
    unique("output", manifest.outputs.iter().map(|p| &p.name))?;
    let known = |e: &DimExpr| symbols_exist(e, manifest);
    for port in manifest.inputs.iter().chain(&manifest.outputs) {
        port.dims.iter().try_for_each(known).map_err(|e| format!("`{}`: {e}", port.name))?;
    }
    for guard in &manifest.guards {
        known(&guard.expr)?;
        guard_is_about_inputs(&guard.expr, manifest)?;
    }
    for plan in &manifest.plans {
        check_plan(manifest, plan).map_err(|e| format!("plan `{}` for {}: {e}", plan.name, plan.target))?;
    }
    Ok(())
}

fn unique<'a>(what: &str, names: impl Iterator<Item = &'a String>) -> Result<(), String> {
    let mut seen = std::collections::BTreeSet::new();
    for name in names {
        need(seen.insert(name), || format!("two {what}s are called `{name}`"))?;
    }
    Ok(())
}

fn symbols_exist(expr: &DimExpr, manifest: &Manifest) -> Result<(), String> {
    match expr.symbols().last() {
        Some(s) if *s as usize >= manifest.symbols.len() => Err(format!("no symbol {s}")),
        _ => Ok(()),
    }
}

fn guard_is_about_inputs(expr: &DimExpr, manifest: &Manifest) -> Result<(), String> {
    let from_input = |s: &u32| manifest.inputs.iter().flat_map(|p| &p.dims).any(|d| d.linear().is_some_and(|(t, ..)| t == *s));
    need(expr.symbols().iter().all(from_input), || format!("guard `{expr}` is about a size that no input defines"))
}

fn check_tensor(tensor: &TensorEntry, segments: &[Segment]) -> Result<(), String> {
    let count = tensor.shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
    let expected = count.and_then(|n| usize::try_from(n).ok()).and_then(|n| tensor.dtype.bytes(n)).ok_or("its shape overflows")? as u64;
    let len = match &tensor.data {
        TensorData::Embedded { segment, offset, len } => {
            let home = segments.get(*segment as usize).filter(|s| s.kind == SegmentKind::Weights);
            let home = home.ok_or_else(|| format!("segment {segment} holds no weights"))?;
            let inside = offset.checked_add(*len).is_some_and(|end| end <= home.len);
            need(inside, || format!("{offset}+{len} lies beyond {} bytes", home.len))?;
            need(offset.is_multiple_of(TENSOR_ALIGN as u64), || format!("offset {offset} is no multiple of {TENSOR_ALIGN}"))?;
            len
        }
        TensorData::External { offset, len, .. } => {
            need(offset.checked_add(*len).is_some(), || "its range overflows".into())?;
            len
        }
    };
    need(*len == expected, || format!("{len} bytes, its shape has {expected}"))
}

fn check_plan(manifest: &Manifest, plan: &Plan) -> Result<(), String> {
    let code = manifest.codes.get(plan.code as usize).ok_or_else(|| format!("no code {}", plan.code))?;
    need(code.target == plan.target, || format!("its code is for {}", code.target))?;
    if let Some(cubin) = plan.cubin {
        let is_cubin = manifest.codes.get(cubin as usize).map(|c| c.kind) == Some(CodeKind::Cubin);
        need(is_cubin, || format!("code {cubin} is no cubin"))?;
    }
    need(plan.predicted_ns.is_finite(), || "predicted time is not finite".into())?;
    for kernel in &plan.kernels {
        check_kernel(manifest, kernel).map_err(|e| format!("kernel `{}`: {e}", kernel.name))?;
    }
    analysis::analyse(manifest, plan).map(|_| ())
}

fn check_kernel(manifest: &Manifest, kernel: &Kernel) -> Result<(), String> {
    let p = &kernel.provenance;
    for expr in [&p.flops, &p.bytes_read, &p.bytes_written] {
        symbols_exist(expr, manifest)?;
    }
    need(p.predicted_ns.is_finite(), || "predicted time is not finite".into())?;
    need(kernel.n_args < 1 << 16 && kernel.n_dims < 1 << 16, || "too many arguments".into())?;
    need(!kernel.symbol.contains('\0'), || "its symbol holds a zero byte".into())?;
    kernel.gpu.as_ref().map_or(Ok(()), |gpu| check_gpu(kernel, gpu))
}

fn check_gpu(kernel: &Kernel, gpu: &GpuLaunch) -> Result<(), String> {
    let product = |sizes: &[u32; 3]| sizes.iter().map(|n| u64::from(*n)).product::<u64>();
    // No factor may pass 65535, so that the products cannot wrap.
    let small = |sizes: &[u32; 3]| sizes.iter().all(|n| *n < 1 << 16);
    need(small(&gpu.block) && (1..=1024).contains(&product(&gpu.block)), || format!("a block of {:?} threads", gpu.block))?;
    need(small(&gpu.cluster) && (1..=16).contains(&product(&gpu.cluster)), || format!("a cluster of {:?} blocks", gpu.cluster))?;
    for map in &gpu.tensor_maps {
        let rank = map.dims.len();
        let fits = map.arg < kernel.n_args
            && (1..=5).contains(&rank)
            && map.strides.len() == rank - 1
            && map.box_dims.len() == rank
            && map.box_dims.iter().all(|n| (1..=256).contains(n))
            && (map.element_strides.is_empty() || map.element_strides.len() == rank);
        need(fits, || format!("tensor map {map:?} does not hold together"))?;
    }
    Ok(())
}
