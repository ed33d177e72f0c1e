//! Cases compiled and run on the CPU, fused and unfused, against the evaluator on random data.
use super::{cases, read};
use pavage::{
    CompileOptions, Device, Options, Source, compile,
    ir::{self, DType, Graph, Scalar, Tensor, dim::Atom, eval, text},
    runtime,
};
use std::path::Path;

/// Values of the run-time sizes, in turn: one artifact serves all.
const SIZES: [i64; 3] = [3, 5, 17];

fn random(graph: &Graph, size: i64, seed: u64) -> Vec<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let env = |a: &Atom| matches!(a, Atom::Sym(_)).then_some(size);
    let mut tensor = |id: &ir::NodeId| {
        let ty = graph.ty((*id).into());
        let shape: Vec<usize> = ty.shape.iter().map(|d| d.eval(&env).unwrap() as usize).collect();
        let n: usize = shape.iter().product();
        let value = |x: f64| match ty.dtype {
            d if d.is_float() => Scalar::F(4.0 * x - 2.0),
            DType::Bool => Scalar::B(x < 0.5),
            // Sequence lengths are the only i32 vectors: they stay within the shortest sequence.
            DType::I32 if ty.rank() == 1 => Scalar::I((x * 3.0) as i128 + 1),
            _ => Scalar::I((x * 9.0) as i128 - 3),
        };
        Tensor::from_scalars(ty.dtype, shape, (0..n).map(|_| value(next())))
    };
    graph.inputs().iter().map(&mut tensor).collect()
}

fn to_runtime(t: &Tensor) -> runtime::Tensor {
    let dtype = pavage_codegen::wire::dtype(t.dtype()).unwrap();
    runtime::Tensor::from_bytes(dtype, t.shape(), t.bytes()).unwrap()
}

/// How far a float may be from the evaluator's, relative to its size and absolutely.
fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F16 { 4e-3 } else { 2e-5 }
}

fn agree(got: &runtime::Tensor, want: &Tensor) -> Result<(), String> {
    let got = Tensor::new(want.dtype(), got.shape(), got.bytes().to_vec()).map_err(|e| e.to_string())?;
    if got.shape() != want.shape() {
        return Err(format!("shape {:?}, want {:?}", got.shape(), want.shape()));
    }
    let t = tolerance(want.dtype());
    for i in 0..want.count() {
        let (g, w) = (got.get(i), want.get(i));
        let fine = match (g, w) {
            (Scalar::F(g), Scalar::F(w)) => g == w || (g.is_nan() && w.is_nan()) || (g - w).abs() <= t * (1.0 + w.abs()),
            _ => g == w,
        };
        if !fine {
            return Err(format!("element {i} is {g:?}, want {w:?}"));
        }
    }
    Ok(())
}

/// Every disagreement of one case.
fn failures(path: &Path) -> Vec<String> {
    let name = path.file_stem().unwrap().to_string_lossy().into_owned();
    let (_, graph) = read(path);
    let source = text::print_full(&graph);
    let compiled = match compile(Source::Ir(&source), &CompileOptions::default()) {
        Ok(compiled) => compiled,
        Err(e) => return vec![format!("{name}: {e}")],
    };
    let artifact = compiled.open().unwrap();
    let names: Vec<String> = artifact.inputs().iter().map(|p| p.name.clone()).collect();
    let mut failed = vec![];
    for plan in ["fused", "unfused"] {
        let options = |plan: &str| Options { plan: plan.into(), threads: 2, ..Options::default() };
        let mut session = artifact.session(Device::Cpu, options(plan)).unwrap();
        let mut null = artifact.session(Device::Null, options(plan)).unwrap();
        for (seed, size) in SIZES.into_iter().enumerate() {
            let inputs = random(&graph, size, seed as u64 + 1);
            let want = eval::eval(&graph, &inputs).unwrap_or_else(|e| panic!("{name}: {e}"));
            let given: Vec<runtime::Tensor> = inputs.iter().map(to_runtime).collect();
            let feed: Vec<(&str, &runtime::Tensor)> = names.iter().map(String::as_str).zip(&given).collect();
            match session.run(&feed) {
                Err(e) => failed.push(format!("{name}, {plan}, size {size}: {e}")),
                Ok(outputs) => {
                    for ((key, got), want) in outputs.iter().zip(&want) {
                        if let Err(e) = agree(got, want) {
                            failed.push(format!("{name}, {plan}, size {size}, output {key}: {e}"));
                        }
                    }
                }
            }
            // The null device computes nothing, but goes the same way: what it launches must fit its buffers.
            let outputs = null.run(&feed).map_err(|e| failed.push(format!("{name}, {plan} on null: {e}")));
            let launches = null.take_log().iter().filter(|l| l.starts_with("launch")).count();
            if outputs.is_ok() && launches == 0 {
                failed.push(format!("{name}, {plan}: the null device launched nothing"));
            }
        }
    }
    failed
}

fn all(folder: &str) {
    let failed: Vec<String> = cases(folder).iter().flat_map(|path| failures(path)).collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn optimised_graphs_run_right() {
    all("optimize");
}

#[test]
fn ops_run_right() {
    all("run");
}
