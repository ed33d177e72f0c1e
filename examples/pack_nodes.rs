//! Compile ONNX's node tests for a GPU and pack them, data included, for `examples/embed`'s program `nodes`, which runs them
//! where the GPU is.
//!
//! ```text
//! pack_nodes SUITE FOLDER [TARGET [PLAN...]]      default: sm_90a, fused and unfused
//! ```
//!
//! `SUITE` holds a folder a test (`tests/onnx.rs` says where it comes from). A line of `FOLDER/nodes.jsonl` is a test: its
//! tolerances, and where in `FOLDER/nodes.bin` its artifact and data are, or why it was not compiled. Tests compile in processes
//! of their own, so that one that brings the compiler down costs no other.
#[path = "../tests/support/nodes.rs"]
mod nodes;

use pavage::{CompileOptions, Source, compile, frontend::onnx::values, runtime::plan::Port};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Fallible<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [mark, suite, parts, target, plans, names @ ..] = args.as_slice()
        && mark == "--part"
    {
        return part(Path::new(suite), Path::new(parts), target, plans, names);
    }
    let [suite, folder, rest @ ..] = args.as_slice() else { return Err("usage: pack_nodes SUITE FOLDER [TARGET [PLAN...]]".into()) };
    let target = rest.first().map_or("sm_90a", String::as_str);
    let plans = if rest.len() > 1 { rest[1..].join(",") } else { nodes::PLANS.join(",") };
    let parts = Path::new(folder).join("parts");
    fs::remove_dir_all(&parts).ok();
    fs::create_dir_all(&parts)?;
    let mut names: Vec<String> = fs::read_dir(suite)?.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
    names.retain(|n| Path::new(suite).join(n).join("model.onnx").exists());
    names.sort();
    compile_all(suite, &parts, target, &plans, &names)?;

    let (mut lines, mut pool) = (fs::File::create(Path::new(folder).join("nodes.jsonl"))?, fs::File::create(Path::new(folder).join("nodes.bin"))?);
    let (mut at, mut compiled) = (0, 0);
    for name in &names {
        let (line, bytes) =
            read_part(&parts, name).unwrap_or_else(|| (serde_json::json!({ "name": name, "failure": "compile: the compiler crashed" }), vec![]));
        writeln!(lines, "{}", moved(line, at))?;
        pool.write_all(&bytes)?;
        at += bytes.len();
        compiled += usize::from(!bytes.is_empty());
    }
    fs::remove_dir_all(&parts)?;
    println!("{compiled} of {} tests compiled for {target}, {:.1} MB", names.len(), at as f64 / 1e6);
    Ok(())
}

/// Compile in as many processes as there are cores, a few tests each time.
fn compile_all(suite: &str, parts: &Path, target: &str, plans: &str, names: &[String]) -> Fallible<()> {
    let program = std::env::current_exe()?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (next, chunks) = (AtomicUsize::new(0), names.chunks(40).collect::<Vec<_>>());
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut left = chunk.to_vec();
                    // A process that crashes leaves a test undone: go on behind it.
                    while !left.is_empty() {
                        let done = Command::new(&program).arg("--part").arg(suite).arg(parts).args([target, plans]).args(&left).status();
                        if done.is_ok_and(|s| s.success()) {
                            break;
                        }
                        let first_undone = left.iter().position(|n| read_part(parts, n).is_none());
                        left = first_undone.map_or(vec![], |i| left[i + 1..].to_vec());
                    }
                }
            });
        }
    });
    Ok(())
}

fn files(parts: &Path, name: &str) -> [PathBuf; 2] {
    [parts.join(format!("{name}.json")), parts.join(format!("{name}.bin"))]
}

fn read_part(parts: &Path, name: &str) -> Option<(serde_json::Value, Vec<u8>)> {
    let [line, bytes] = files(parts, name);
    Some((serde_json::from_str(&fs::read_to_string(line).ok()?).ok()?, fs::read(bytes).ok()?))
}

fn part(suite: &Path, parts: &Path, target: &str, plans: &str, names: &[String]) -> Fallible<()> {
    let plans: Vec<String> = plans.split(',').map(String::from).collect();
    for name in names {
        let mut pool = vec![];
        let packed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pack(name, &suite.join(name), target, &plans, &mut pool)));
        let line = match packed {
            Ok(Ok(line)) => line,
            Ok(Err(why)) => serde_json::json!({ "name": name, "failure": why }),
            Err(_) => serde_json::json!({ "name": name, "failure": "compile: the compiler panicked" }),
        };
        if line["artifact"].is_null() {
            pool.clear();
        }
        let [at, bytes] = files(parts, name);
        fs::write(bytes, pool)?;
        fs::write(at, line.to_string())?;
    }
    Ok(())
}

/// A test's line; what it points to is appended to `pool`.
fn pack(name: &str, folder: &Path, target: &str, plans: &[String], pool: &mut Vec<u8>) -> Result<serde_json::Value, String> {
    let model = folder.join("model.onnx");
    let ports = values::ports(&fs::read(&model).map_err(nodes::say)?).map_err(nodes::say)?;
    let (tolerance, sets) = (nodes::Tolerance::of(folder)?, nodes::data_sets(folder, &ports)?);
    let options = CompileOptions { targets: vec![target.into()], plans: plans.to_vec(), threads: 1, ..CompileOptions::default() };
    let compiled = compile(Source::Path(&model), &options).map_err(|e| format!("compile: {}", nodes::say(e)))?;
    let artifact = compiled.open().map_err(nodes::say)?;
    for set in &sets {
        if let Some(name) = set.outputs.keys().find(|name| artifact.outputs().iter().all(|p| nodes::base(&p.name) != *name && p.name != **name)) {
            return Err(format!("wrong: there is no output `{name}`"));
        }
    }
    let mut put = |bytes: &[u8]| {
        pool.extend(bytes);
        serde_json::json!([pool.len() - bytes.len(), bytes.len()])
    };
    let at = put(&compiled.artifact);
    let mut tensors = |ports: &[Port], values: &nodes::Values| -> Result<Vec<serde_json::Value>, String> {
        let one = |p: &Port| {
            let like = (nodes::dtype_of(p.dtype)?, p.dims.iter().map(|d| d.as_const().map(|n| n as usize)).collect());
            let t = nodes::to_runtime(&nodes::at_port(values, &p.name, &like)?)?;
            Ok(serde_json::json!({ "name": p.name, "dtype": t.dtype().name(), "shape": t.shape(), "at": put(t.bytes()) }))
        };
        ports.iter().map(one).collect()
    };
    let mut packed = vec![];
    for set in &sets {
        packed.push(serde_json::json!({ "inputs": tensors(artifact.inputs(), &set.inputs)?, "outputs": tensors(artifact.outputs(), &set.outputs)? }));
    }
    Ok(serde_json::json!({ "name": name, "rtol": tolerance.relative, "atol": tolerance.absolute, "plans": plans, "artifact": at, "sets": packed }))
}

/// A line that points into a pool in which its own begins at `by`.
fn moved(mut line: serde_json::Value, by: usize) -> serde_json::Value {
    fn shift(v: &mut serde_json::Value, by: usize) {
        if let Some(at) = v[0].as_u64() {
            v[0] = (at as usize + by).into();
        }
    }
    if !line["artifact"].is_null() {
        shift(&mut line["artifact"], by);
    }
    for set in line["sets"].as_array_mut().into_iter().flatten() {
        for side in ["inputs", "outputs"] {
            set[side].as_array_mut().into_iter().flatten().for_each(|t| shift(&mut t["at"], by));
        }
    }
    line
}
