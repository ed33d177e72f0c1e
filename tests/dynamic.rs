//! Models whose axes, bounds, counts and results data decides (`scripts/dynamic_cases.py` wrote them): compiled once, run on
//! several sizes and values, against the evaluator.
mod support;

use pavage::{
    CompileOptions, Device, Options, Source, compile,
    frontend::onnx,
    ir::{DType, Graph, NodeKind, Scalar, Tensor, eval},
    runtime,
};
use support::root;

/// Numbers, the same on every run.
struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    fn below(&mut self, n: usize) -> i64 {
        (self.unit() * n as f64) as i64
    }

    fn floats(&mut self, shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        Tensor::from_scalars(DType::F32, shape, (0..n).map(|_| Scalar::F(self.unit())).collect::<Vec<_>>())
    }

    fn ints(&mut self, n: usize, least: i64, count: usize) -> Tensor {
        Tensor::from_i64([n], &(0..n).map(|_| least + self.below(count)).collect::<Vec<_>>())
    }

    /// Different axes of a value with three, some of them counted from the end.
    fn axes(&mut self, count: usize) -> Tensor {
        let first = self.below(3);
        let axes: Vec<i64> = (0..count as i64).map(|i| (first + i) % 3 - 3 * self.below(2)).collect();
        Tensor::from_i64([count], &axes)
    }
}

fn int(v: i64) -> Tensor {
    Tensor::from_i64([], &[v])
}

fn float(v: f64) -> Tensor {
    Tensor::scalar(DType::F32, Scalar::F(v))
}

/// An input by its name, for one size of the others.
fn input(r: &mut Random, model: &str, name: &str, n: usize) -> Tensor {
    match (model, name) {
        ("grow" | "branch", "x") => r.floats(&[n]),
        ("parts", "x") => r.floats(&[2, n]),
        (_, "x") => r.floats(&[n, 3, n + 1]),
        ("reduce_1_keep" | "reduce_1_drop", "axes") => r.axes(1),
        (_, "axes") => r.axes(2),
        (_, "axis") => int(r.below(6) - 3),
        (_, "starts" | "ends") => r.ints(2, -(n as i64) - 2, 2 * n + 4),
        (_, "steps") => Tensor::from_i64([2], &[1 + r.below(3), -1 - r.below(2)]),
        (_, "pads") => r.ints(4, -1, 4),
        (_, "scales") => Tensor::from_f32([3], &[1.0, 1.0 + r.unit() as f32, 0.5 + r.unit() as f32]),
        (_, "k") => r.ints(n, -2, 5),
        (_, "boxes") => r.floats(&[2, n, 4]),
        (_, "scores") => r.floats(&[2, 2, n]),
        (_, "most") => int(1 + r.below(n)),
        (_, "iou") => float(0.2),
        (_, "score") => float(0.3),
        (_, "trip") => int(r.below(4)),
        (_, "c") => Tensor::scalar(DType::Bool, Scalar::B(r.unit() < 0.5)),
        (_, "keep") => Tensor::from_scalars(DType::Bool, [n], (0..n).map(|_| Scalar::B(r.unit() < 0.5)).collect::<Vec<_>>()),
        (_, "each") => int(1 + r.below(n)),
        (_, "at") => int(-r.below(2)),
        _ => panic!("{model} has an input {name}"),
    }
}

fn to_runtime(t: &Tensor) -> runtime::Tensor {
    runtime::Tensor::from_bytes(pavage_codegen::wire::dtype(t.dtype()).unwrap(), t.shape(), t.bytes()).unwrap()
}

fn agree(got: &runtime::Tensor, want: &Tensor) -> Result<(), String> {
    let got = Tensor::new(want.dtype(), got.shape(), got.bytes().to_vec()).map_err(|e| e.to_string())?;
    if got.shape() != want.shape() {
        return Err(format!("shape {:?}, should be {:?}", got.shape(), want.shape()));
    }
    let (a, b) = (got.to_f64(), want.to_f64());
    match (0..a.len()).find(|i| (a[*i] - b[*i]).abs() > 1e-5 * (1.0 + b[*i].abs())) {
        Some(i) => Err(format!("element {i} is {}, should be {}", a[i], b[i])),
        None => Ok(()),
    }
}

fn names(graph: &Graph) -> Vec<String> {
    let name = |kind: &NodeKind| if let NodeKind::Input(name) = kind { name.clone() } else { String::new() };
    graph.inputs().iter().map(|id| name(&graph[*id].kind)).collect()
}

fn failures(model: &str) -> Vec<String> {
    let path = root().join(format!("tests/dynamic/{model}.onnx"));
    let graph = match onnx::load(&path, &onnx::Options::default()) {
        Ok(model) => model.graph,
        Err(e) => return vec![format!("{model}: {e}")],
    };
    let compiled = match compile(Source::Path(&path), &CompileOptions::default()) {
        Ok(compiled) => compiled,
        Err(e) => return vec![format!("{model}: {e}")],
    };
    let artifact = compiled.open().unwrap();
    let names = names(&graph);
    let mut failed = vec![];
    for plan in ["fused", "unfused"] {
        let mut session = artifact.session(Device::Cpu, Options { plan: plan.into(), threads: 2, ..Options::default() }).unwrap();
        for (seed, n) in [3usize, 5, 2, 8].into_iter().enumerate() {
            let mut r = Random((seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let inputs: Vec<Tensor> = names.iter().map(|name| input(&mut r, model, name, n)).collect();
            let given: Vec<runtime::Tensor> = inputs.iter().map(to_runtime).collect();
            let feed: Vec<(&str, &runtime::Tensor)> = names.iter().map(String::as_str).zip(&given).collect();
            let shown = || inputs.iter().skip(1).map(|t| format!("{:?}", t.to_f64())).collect::<Vec<_>>().join(" ");
            match (eval::eval(&graph, &inputs), session.run(&feed)) {
                (Ok(want), Ok(got)) => {
                    for ((key, got), want) in got.iter().zip(&want) {
                        if let Err(e) = agree(got, want) {
                            failed.push(format!("{model}, {plan}, size {n}, {key}: {e} ({})", shown()));
                        }
                    }
                }
                // What one refuses the other refuses.
                (Err(_), Err(_)) => {}
                (Err(e), Ok(_)) => failed.push(format!("{model}, {plan}, size {n}: only the evaluator refuses: {e} ({})", shown())),
                (Ok(_), Err(e)) => failed.push(format!("{model}, {plan}, size {n}: {e} ({})", shown())),
            }
        }
    }
    failed
}

#[test]
fn one_artifact_serves_all_axes_bounds_and_lengths() {
    let folder = root().join("tests/dynamic");
    let mut models: Vec<String> =
        std::fs::read_dir(&folder).unwrap().filter_map(|e| e.unwrap().file_name().into_string().unwrap().strip_suffix(".onnx").map(str::to_string)).collect();
    models.sort();
    assert!(models.len() >= 13, "{} models", models.len());
    let failed: Vec<String> = models.iter().flat_map(|m| failures(m)).collect();
    assert!(failed.is_empty(), "{} failures:\n{}", failed.len(), failed.join("\n"));
}
