//! A differential fuzzer: random small ONNX graphs, compiled and run with both plans, against the reference evaluator.
//!
//! `PAVAGE_FUZZ=20000` says how many graphs (300 by default), `PAVAGE_FUZZ_FROM=7` where the seeds begin; a seed is always
//! the same graph. `PAVAGE_FUZZ_OUT=FOLDER` keeps every graph with its inputs and our outputs, laid out as ONNX lays out its
//! node tests: `scripts/fuzz_onnxruntime.py FOLDER` compares those with onnxruntime. What the fuzzer finds becomes a case in
//! tests/cases/run.
mod graph;
mod layers;
mod ops;
#[path = "../support/mod.rs"]
mod support;
#[path = "../support/workers.rs"]
mod workers;

use graph::Case;
use pavage::{
    CompileOptions, Device, Error, Options, Source, compile,
    frontend::onnx,
    ir::{DType, Graph, NodeKind, Tensor, eval},
    runtime,
};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};
use workers::say;

/// Graphs that `./x test` runs.
const USUAL: u64 = 300;

/// How a graph went.
enum Outcome {
    /// Both plans agree with the evaluator.
    Right,
    /// It does not import or has no kernels, as the message says; this is no difference.
    Refused(String),
    /// A difference, or an internal error.
    Wrong(String),
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn one_line(e: impl std::fmt::Display) -> String {
    e.to_string().lines().map(str::trim).collect::<Vec<_>>().join("; ")
}

fn evaluate(graph: &Graph, case: &Case) -> Result<Vec<Tensor>, String> {
    let find = |id: &pavage::ir::NodeId| match &graph[*id].kind {
        NodeKind::Input(name) => case.inputs.iter().find(|(n, _)| n == name).map(|(_, t)| t.clone()),
        _ => None,
    };
    let inputs = graph.inputs().iter().map(find).collect::<Option<Vec<_>>>().ok_or("an input has no value")?;
    eval::eval(graph, &inputs).map_err(|e| e.to_string())
}

fn agree(got: &Tensor, want: &Tensor, slack: f64) -> Result<(), String> {
    if got.ty() != want.ty() {
        return Err(format!("is {}, should be {}", got.ty(), want.ty()));
    }
    let near = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan()) || (want.dtype().is_float() && (a - b).abs() <= slack);
    let (got, want) = (got.to_f64(), want.to_f64());
    match (0..got.len()).find(|i| !near(got[*i], want[*i])) {
        Some(i) => Err(format!("[{i}] is {}, should be {}", got[i], want[i])),
        None => Ok(()),
    }
}

/// How far outputs may be from the evaluator's: by the coarsest type in the graph and the largest value in it.
fn slack(case: &Case) -> Result<f64, String> {
    let open = onnx::load_bytes(&case.open, &onnx::Options::default()).map_err(one_line)?;
    let values = evaluate(&open.graph, case)?;
    let floats = values.iter().filter(|t| t.dtype().is_float()).flat_map(Tensor::to_f64);
    let largest = floats.chain([1.0]).filter(|x| x.is_finite()).fold(0.0, |m: f64, x| m.max(x.abs()));
    Ok(largest
        * match case.coarsest {
            Some(DType::F16) => 1e-2,
            Some(DType::F32) => 1e-4,
            _ => 1e-9,
        })
}

fn save(case: &Case, seed: u64, outputs: &[(String, Tensor)], slack: f64) {
    let Some(root) = std::env::var_os("PAVAGE_FUZZ_OUT") else { return };
    let folder = Path::new(&root).join(format!("random_{seed:06}"));
    let data = folder.join("test_data_set_0");
    std::fs::create_dir_all(&data).unwrap();
    std::fs::write(folder.join("model.onnx"), &case.model).unwrap();
    std::fs::write(folder.join("meta.json"), json!({"rtol": 0.0, "atol": slack, "seed": seed}).to_string()).unwrap();
    for (what, values) in [("input", &case.inputs[..]), ("output", outputs)] {
        for (i, (name, t)) in values.iter().enumerate() {
            std::fs::write(data.join(format!("{what}_{i}.pb")), graph::tensor(name, t).0).unwrap();
        }
    }
}

fn run(seed: u64) -> (Outcome, Vec<String>) {
    let case = graph::generate(seed);
    let outcome = attempt(&case, seed).unwrap_or_else(Outcome::Wrong);
    (outcome, case.ops)
}

fn attempt(case: &Case, seed: u64) -> Result<Outcome, String> {
    let model = match onnx::load_bytes(&case.model, &onnx::Options::default()) {
        Ok(model) => model,
        Err(e) => return Ok(Outcome::Refused(format!("import: {}", one_line(e)))),
    };
    let want = evaluate(&model.graph, case);
    let slack = match (&want, slack(case)) {
        (Ok(_), Err(e)) => return Ok(Outcome::Refused(format!("with all values as outputs: {e}"))),
        (_, slack) => slack.unwrap_or_default(),
    };
    if let Ok(want) = &want {
        let named: Vec<(String, Tensor)> = model.graph.outputs.iter().map(|o| o.name.clone()).zip(want.iter().cloned()).collect();
        save(case, seed, &named, slack);
    }
    let compiled = match compile(Source::Onnx(&case.model), &CompileOptions { threads: 1, ..CompileOptions::default() }) {
        Ok(compiled) => compiled,
        Err(Error::Unsupported(e)) => return Ok(Outcome::Refused(format!("kernels: {}", one_line(e)))),
        Err(e) => return Err(format!("compile: {}", one_line(e))),
    };
    let artifact = compiled.open().map_err(one_line)?;
    for plan in ["fused", "unfused"] {
        let mut session = artifact.session(Device::Cpu, Options { plan: plan.into(), threads: 1, ..Options::default() }).map_err(one_line)?;
        let given = case.inputs.iter().map(|(name, t)| {
            let dtype = pavage_codegen::wire::dtype(t.dtype()).ok_or("no such dtype")?;
            Ok((name.as_str(), runtime::Tensor::from_bytes(dtype, t.shape(), t.bytes()).map_err(one_line)?))
        });
        let given = given.collect::<Result<Vec<_>, String>>()?;
        let asked: BTreeSet<&str> = artifact.inputs().iter().map(|p| p.name.as_str()).collect();
        let feed: Vec<(&str, &runtime::Tensor)> = given.iter().filter(|(n, _)| asked.contains(n)).map(|(n, t)| (*n, t)).collect();
        let (outputs, want) = match (session.run(&feed), &want) {
            (Ok(outputs), Ok(want)) => (outputs, want),
            // Sizes that the import takes to be what they are not in this run.
            (Err(e), Err(_)) => return Ok(Outcome::Refused(format!("run: {}", one_line(e)))),
            (Ok(_), Err(e)) => return Err(format!("{plan}: runs, and the evaluator does not: {e}")),
            (Err(e), Ok(_)) => return Err(format!("{plan}: run: {}", one_line(e))),
        };
        for ((name, got), want) in outputs.iter().zip(want) {
            let got = Tensor::new(want.dtype(), got.shape(), got.bytes().to_vec()).map_err(one_line)?;
            agree(&got, want, slack).map_err(|e| format!("{plan}: `{name}` {e}"))?;
        }
    }
    Ok(Outcome::Right)
}

/// One of the processes that do the work.
#[test]
fn worker() {
    workers::serve(|seed| {
        let (outcome, ops) = run(seed.parse().unwrap());
        match outcome {
            Outcome::Right => json!({ "ops": ops }),
            Outcome::Refused(why) => json!({ "ops": ops, "refused": why }),
            Outcome::Wrong(why) => json!({ "ops": ops, "wrong": why }),
        }
    });
}

#[test]
fn random_graphs_compute_what_they_mean() {
    let (count, from) = (number("PAVAGE_FUZZ", USUAL), number("PAVAGE_FUZZ_FROM", 0));
    let seeds: Vec<String> = (from..from + count).map(|s| s.to_string()).collect();
    let (mut right, mut refused, mut wrong) = (0, BTreeMap::<String, Vec<String>>::new(), vec![]);
    let mut ops = BTreeSet::new();
    for (seed, answer) in workers::run_all(&seeds) {
        let answer = answer.unwrap_or_else(|why| json!({ "wrong": why }));
        if let Some(why) = answer["wrong"].as_str() {
            let used: Vec<&str> = answer["ops"].as_array().into_iter().flatten().filter_map(|o| o.as_str()).collect();
            wrong.push(format!("seed {seed} ({}): {why}", used.join(" ")));
        } else if let Some(why) = answer["refused"].as_str() {
            refused.entry(why.chars().filter(|c| !c.is_ascii_digit()).take(100).collect()).or_default().push(seed);
        } else {
            right += 1;
            ops.extend(answer["ops"].as_array().into_iter().flatten().filter_map(|o| o.as_str().map(String::from)));
        }
    }
    for (why, seeds) in &refused {
        say(&format!("refused {} times, seed {} first: {why}", seeds.len(), seeds[0]));
    }
    let refused: usize = refused.values().map(Vec::len).sum();
    say(&format!("random graphs: {right} right, {refused} refused, {} wrong; {} operators", wrong.len(), ops.len()));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(10 * right >= 9 * seeds.len(), "too many graphs are refused");
}
