//! One of ONNX's node tests: compiled the ordinary way, run with both plans, compared as the suite compares.
#![allow(dead_code, reason = "the example that packs tests for a GPU uses the readers alone")]
use pavage::{
    CompileOptions, Device, Options, Source, compile,
    frontend::onnx::{
        self,
        values::{self, Kind, Ports, Value},
    },
    ir::{DType, NodeKind, Scalar, Tensor, TensorType, eval},
    runtime,
};
use std::{
    collections::BTreeMap,
    fmt::Display,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The plans that must be right.
pub(crate) const PLANS: [&str; 2] = ["fused", "unfused"];

/// How one test went.
pub(crate) struct Verdict {
    /// Why it does not pass, in one line; `None` when both plans are right.
    pub(crate) failure: Option<String>,
    /// The same of the graph as the reference evaluator computes it.
    pub(crate) evaluator: Option<String>,
    /// What compiling both plans took; `None` when there is no artifact.
    pub(crate) compile: Option<Duration>,
}

/// Outputs may differ from the expected values by `absolute + relative * |expected|`.
#[derive(Clone, Copy)]
pub(crate) struct Tolerance {
    pub(crate) relative: f64,
    pub(crate) absolute: f64,
}

impl Tolerance {
    /// What the test says of itself.
    pub(crate) fn of(folder: &Path) -> Result<Tolerance, String> {
        let text = std::fs::read_to_string(folder.join("meta.json")).map_err(say)?;
        let meta: serde_json::Value = serde_json::from_str(&text).map_err(say)?;
        let number = |key: &str| meta[key].as_f64().ok_or_else(|| format!("meta.json has no {key}"));
        Ok(Tolerance { relative: number("rtol")?, absolute: number("atol")? })
    }

    /// Compares as the suite does: dtype and shape are equal, elements close, NaN is NaN.
    fn compare(self, got: &Tensor, want: &Tensor) -> Result<(), String> {
        if got.ty() != want.ty() {
            return Err(format!("is {}, should be {}", got.ty(), want.ty()));
        }
        // Two steps of bfloat16, as in the suite's own runner.
        let relative = if want.dtype() == DType::BF16 { self.relative.max(1.0 / 64.0) } else { self.relative };
        let near = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= self.absolute + relative * b.abs();
        let (got, want) = (got.to_f64(), want.to_f64());
        let far: Vec<usize> = (0..got.len()).filter(|i| !near(got[*i], want[*i])).collect();
        match far.first() {
            None => Ok(()),
            Some(i) => Err(format!("[{i}] is {}, should be {} ({} of {} are wrong)", got[*i], want[*i], far.len(), got.len())),
        }
    }
}

/// Values by the name of their port.
pub(crate) type Values = BTreeMap<String, Value>;

/// Inputs and expected outputs.
pub(crate) struct DataSet {
    pub(crate) inputs: Values,
    pub(crate) outputs: Values,
}

pub(crate) fn say(e: impl Display) -> String {
    let text = e.to_string();
    let mut lines: Vec<&str> = text.lines().map(str::trim).collect();
    // An error may list many things, a line each, under a heading.
    if lines.len() > 1 && lines[0].ends_with(':') {
        lines.remove(0);
    }
    lines.join("; ")
}

pub(crate) fn data_sets(folder: &Path, ports: &Ports) -> Result<Vec<DataSet>, String> {
    let read = |set: &Path, what: &str, ports: &[(String, Kind)]| -> Result<Values, String> {
        let mut all = Values::new();
        for (i, (name, kind)) in ports.iter().enumerate() {
            let path = set.join(format!("{what}_{i}.pb"));
            let bytes = std::fs::read(&path).map_err(|e| format!("data: {what} `{name}`: {e}"))?;
            all.insert(name.clone(), values::value(&bytes, kind).map_err(|e| format!("data: {what} `{name}`: {}", say(e)))?);
        }
        Ok(all)
    };
    let folders: Vec<PathBuf> = (0..).map(|i| folder.join(format!("test_data_set_{i}"))).take_while(|p| p.exists()).collect();
    if folders.is_empty() {
        return Err("data: there is none".into());
    }
    folders.iter().map(|set| Ok(DataSet { inputs: read(set, "input", &ports.inputs)?, outputs: read(set, "output", &ports.outputs)? })).collect()
}

/// The dtype of a port, and its extents as far as they are known.
type PortType = (DType, Vec<Option<usize>>);

/// The tensor that an input or output of the graph is. Here is the place where sequences and optionals meet the ports
/// that stand for them in a graph: `x.data` and `x.shapes`, `x.present`.
pub(crate) fn at_port(values: &Values, port: &str, (dtype, extents): &PortType) -> Result<Tensor, String> {
    if let Some(Value::Tensor(t)) = values.get(port) {
        return Ok(t.clone());
    }
    let known = |base: &str| values.get(base).ok_or_else(|| format!("data: the suite has no value for `{port}`"));
    let list = |base: &str| match known(base)? {
        Value::Sequence(list) => Ok(list.clone()),
        Value::Nothing => Ok(vec![]),
        Value::Tensor(_) => Err(format!("data: `{base}` is no sequence")),
    };
    if let Some(base) = port.strip_suffix(".present") {
        let there = !matches!(known(base)?, Value::Nothing);
        return Ok(Tensor::scalar(DType::Bool, Scalar::B(there)));
    }
    if let Some(base) = port.strip_suffix(".data") {
        let elements: Vec<Scalar> = list(base)?.iter().flat_map(|t| (0..t.count()).map(|i| t.get(i)).collect::<Vec<_>>()).collect();
        return Ok(Tensor::from_scalars(*dtype, [elements.len()], elements));
    }
    if let Some(base) = port.strip_suffix(".shapes") {
        let list = list(base)?;
        let rank = list.first().map_or(extents.get(1).copied().flatten().unwrap_or(0), |t| t.shape().len());
        let rows: Vec<i64> = list.iter().flat_map(|t| t.shape().iter().map(|n| *n as i64)).collect();
        return Tensor::new(DType::I64, [list.len(), rank], rows.iter().flat_map(|n| n.to_le_bytes()).collect()).map_err(say);
    }
    // A tensor that is not there: any will do.
    known(port)?;
    let shape: Vec<usize> = extents.iter().map(|n| n.unwrap_or(1)).collect();
    let n: usize = shape.iter().product();
    Ok(Tensor::from_scalars(*dtype, shape, (0..n).map(|_| Scalar::I(0))))
}

/// The name in the model of a port of its graph.
pub(crate) fn base(port: &str) -> &str {
    [".present", ".data", ".shapes"].iter().find_map(|end| port.strip_suffix(end)).unwrap_or(port)
}

/// Compares outputs, given by name, with all that the test expects.
fn compare(tolerance: Tolerance, got: &[(String, Tensor)], set: &DataSet) -> Result<(), String> {
    for (name, got) in got {
        let like = (got.dtype(), got.shape().iter().map(|n| Some(*n)).collect());
        tolerance.compare(got, &at_port(&set.outputs, name, &like)?).map_err(|e| format!("wrong: `{name}` {e}"))?;
    }
    match set.outputs.keys().find(|name| got.iter().all(|(n, _)| n != *name && base(n) != *name)) {
        Some(name) => Err(format!("wrong: there is no output `{name}`")),
        None => Ok(()),
    }
}

fn evaluated(model: &Path, tolerance: Tolerance, sets: &[DataSet]) -> Result<(), String> {
    let graph = onnx::load(model, &onnx::Options::default()).map_err(|e| format!("import: {}", say(e)))?.graph;
    for set in sets {
        let names = graph.inputs().iter().filter_map(|id| match &graph[*id].kind {
            NodeKind::Input(name) => Some((name, graph.ty((*id).into()))),
            _ => None,
        });
        let like = |ty: &TensorType| (ty.dtype, ty.shape.iter().map(|d| d.as_const().map(|n| n as usize)).collect());
        let inputs = names.map(|(name, ty)| at_port(&set.inputs, name, &like(ty))).collect::<Result<Vec<_>, _>>()?;
        let outputs = eval::eval(&graph, &inputs).map_err(|e| format!("evaluation: {}", say(e)))?;
        let named: Vec<(String, Tensor)> = graph.outputs.iter().map(|o| o.name.clone()).zip(outputs).collect();
        compare(tolerance, &named, set)?;
    }
    Ok(())
}

pub(crate) fn to_runtime(t: &Tensor) -> Result<runtime::Tensor, String> {
    let dtype = pavage_codegen::wire::dtype(t.dtype()).ok_or("data: no such dtype at run time")?;
    runtime::Tensor::from_bytes(dtype, t.shape(), t.bytes()).map_err(say)
}

pub(crate) fn dtype_of(dtype: runtime::DType) -> Result<DType, String> {
    DType::ALL.iter().copied().find(|d| pavage_codegen::wire::dtype(*d) == Some(dtype)).ok_or_else(|| "data: no such dtype".into())
}

fn from_runtime(t: &runtime::Tensor) -> Result<Tensor, String> {
    Tensor::new(dtype_of(t.dtype())?, t.shape(), t.bytes().to_vec()).map_err(say)
}

fn run_plan(artifact: &runtime::Artifact, plan: &str, tolerance: Tolerance, sets: &[DataSet]) -> Result<(), String> {
    let options = Options { plan: plan.into(), threads: 1, ..Options::default() };
    let mut session = artifact.session(Device::Cpu, options).map_err(|e| format!("session: {}", say(e)))?;
    for set in sets {
        let given = artifact.inputs().iter().map(|p| {
            let like = (dtype_of(p.dtype)?, p.dims.iter().map(|d| d.as_const().map(|n| n as usize)).collect());
            Ok((p.name.clone(), to_runtime(&at_port(&set.inputs, &p.name, &like)?)?))
        });
        let given = given.collect::<Result<Vec<_>, String>>()?;
        let feed: Vec<(&str, &runtime::Tensor)> = given.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let outputs = session.run(&feed).map_err(|e| format!("run: {}", say(e)))?;
        let named = outputs.iter().map(|(name, t)| Ok((name.to_string(), from_runtime(t)?))).collect::<Result<Vec<_>, String>>()?;
        compare(tolerance, &named, set)?;
    }
    Ok(())
}

/// Runs the test in a folder: `model.onnx`, `meta.json`, and `test_data_set_N` with its `input_I.pb` and `output_I.pb`.
pub(crate) fn run(folder: &Path) -> Verdict {
    let mut verdict = Verdict { failure: None, evaluator: None, compile: None };
    let model = folder.join("model.onnx");
    let read = || -> Result<_, String> {
        let ports = values::ports(&std::fs::read(&model).map_err(say)?).map_err(say)?;
        Ok((Tolerance::of(folder)?, data_sets(folder, &ports)?))
    };
    let (tolerance, sets) = match read() {
        Ok(read) => read,
        Err(e) => {
            verdict.failure = Some(e);
            return verdict;
        }
    };
    let start = Instant::now();
    let options = CompileOptions { plans: PLANS.map(String::from).into(), threads: 1, ..CompileOptions::default() };
    let compiled = compile(Source::Path(&model), &options);
    verdict.compile = compiled.is_ok().then(|| start.elapsed());
    let ran = compiled.map_err(|e| format!("compile: {}", say(e))).and_then(|compiled| {
        let artifact = compiled.open().map_err(say)?;
        PLANS.iter().try_for_each(|plan| run_plan(&artifact, plan, tolerance, &sets).map_err(|e| format!("{plan}: {e}")))
    });
    verdict.failure = ran.err();
    verdict.evaluator = evaluated(&model, tolerance, &sets).err();
    verdict
}
