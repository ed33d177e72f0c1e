//! The node tests of the ONNX project, by the ordinary path: imported, compiled for this CPU, run fused and unfused.
//!
//! `PAVAGE_NODES` names the folder that `./x nodes` fills (default: target/nodes). `tests/onnx_excluded.txt` lists the tests
//! that do not pass, with the reason; the run fails when another one does not pass, and when one of these does.
//! `PAVAGE_NODES_FILTER=part` runs the tests with that part in their name (several parts: `a,b`) and prints how each went;
//! `PAVAGE_NODES_THIRD=1` runs a third, always the same; `BLESS=1` rewrites the list, as far as tests were run.
//!
//! Tests run in processes of their own, one a core: what crashes or hangs is one failure.
#[path = "support/coverage.rs"]
mod coverage;
#[path = "support/nodes.rs"]
mod nodes;
#[path = "support/workers.rs"]
mod workers;

use std::{
    collections::BTreeMap,
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};
use workers::say;

/// Longest reason that the list keeps.
const REASON: usize = 200;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn folder() -> PathBuf {
    std::env::var_os("PAVAGE_NODES").map_or_else(|| repository().join("target/nodes"), PathBuf::from)
}

/// How a test went, from the process that ran it.
struct Outcome {
    failure: Option<String>,
    evaluator: Option<String>,
    compile: Option<f64>,
}

/// One of the processes; a test of its own name, so that this program can start itself.
#[test]
fn worker() {
    let root = folder();
    workers::serve(|name| {
        let v = nodes::run(&root.join(name));
        let ms = v.compile.map(|t| t.as_secs_f64() * 1e3);
        serde_json::json!({ "failure": v.failure, "evaluator": v.evaluator, "compile_ms": ms })
    });
}

fn run_all(names: &[String]) -> BTreeMap<String, Outcome> {
    let outcome = |answer: Result<serde_json::Value, String>| match answer {
        Ok(v) => {
            let text = |key: &str| v[key].as_str().map(String::from);
            Outcome { failure: text("failure"), evaluator: text("evaluator"), compile: v["compile_ms"].as_f64() }
        }
        Err(why) => Outcome { failure: Some(why.clone()), evaluator: Some(why), compile: None },
    };
    workers::run_all(names).into_iter().map(|(name, answer)| (name, outcome(answer))).collect()
}

/// The fixed third: by FNV-1a of the name.
fn in_third(name: &str) -> bool {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    hash.is_multiple_of(3)
}

/// The tests to run, sorted; none where the suite is not there and may be missing.
fn selected(filter: Option<&str>) -> Vec<String> {
    let root = folder();
    let Ok(entries) = std::fs::read_dir(&root) else {
        let offline = std::env::var_os("PAVAGE_OFFLINE").is_some();
        assert!(offline, "{} is missing: run ./x nodes, or ./x test --offline", root.display());
        if let Some(path) = std::env::var_os("PAVAGE_NOT_RUN") {
            let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
            writeln!(file, "the ONNX node tests: not fetched").unwrap();
        }
        return vec![];
    };
    let parts: Vec<&str> = filter.map(|f| f.split(',').collect()).unwrap_or_default();
    let third = std::env::var_os("PAVAGE_NODES_THIRD").is_some();
    let wanted = |name: &String| (parts.is_empty() || parts.iter().any(|p| name.contains(p))) && (!third || in_third(name));
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|n| root.join(n).join("model.onnx").exists() && wanted(n)).collect();
    names.sort();
    names
}

fn excluded() -> PathBuf {
    repository().join("tests/onnx_excluded.txt")
}

/// The list of tests that do not pass: name and reason.
fn read_excluded() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(excluded()).unwrap_or_default();
    text.lines().filter_map(|line| line.split_once('\t')).map(|(name, why)| (name.into(), why.into())).collect()
}

fn bless(outcomes: &BTreeMap<String, Outcome>, mut listed: BTreeMap<String, String>) {
    for (name, outcome) in outcomes {
        match &outcome.failure {
            Some(why) => listed.insert(name.clone(), why.replace('\t', " ").chars().take(REASON).collect()),
            None => listed.remove(name),
        };
    }
    let text: String = listed.iter().map(|(name, why)| format!("{name}\t{why}\n")).collect();
    std::fs::write(excluded(), text).unwrap();
}

#[test]
fn node_tests() {
    let filter = std::env::var("PAVAGE_NODES_FILTER").ok().filter(|f| !f.is_empty());
    let names = selected(filter.as_deref());
    let start = Instant::now();
    let outcomes = run_all(&names);
    let listed = read_excluded();
    let mut strays = vec![];
    for (name, o) in &outcomes {
        let verdict = o.failure.as_deref().unwrap_or("ok");
        if filter.is_some() {
            let evaluator = o.evaluator.as_deref().filter(|e| *e != verdict).map_or(String::new(), |e| format!("; by the evaluator: {e}"));
            say(&format!("{name}: {verdict}{evaluator}"));
        }
        match (&o.failure, listed.contains_key(name)) {
            (Some(why), false) => strays.push(format!("{name}: {why}")),
            (None, true) => strays.push(format!("{name}: passes; take it off the list")),
            _ => {}
        }
    }
    let failed = outcomes.values().filter(|o| o.failure.is_some()).count();
    let evaluated = outcomes.values().filter(|o| o.evaluator.is_none() && !o.failure.as_ref().is_some_and(|f| f.starts_with("data"))).count();
    let mut times: Vec<(f64, &String)> = outcomes.iter().filter_map(|(name, o)| Some((o.compile?, name))).collect();
    times.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mean = times.iter().map(|t| t.0).sum::<f64>() / times.len().max(1) as f64;
    let slowest: Vec<String> = times.iter().take(5).map(|(ms, name)| format!("{name} {ms:.0}")).collect();
    say(&format!("{evaluated} right by the evaluator; {} compiled, {mean:.0} ms each; slowest: {}", times.len(), slowest.join(", ")));
    say(&format!("ONNX node tests in {:.0} s: {} passed, {failed} failed", start.elapsed().as_secs_f64(), outcomes.len() - failed));
    if std::env::var_os("BLESS").is_some() {
        return bless(&outcomes, listed);
    }
    assert!(strays.is_empty(), "against tests/onnx_excluded.txt:\n{}", strays.join("\n"));
}

fn operators() -> PathBuf {
    repository().join("docs/ops.md")
}

/// The table of operators as it should be.
fn table() -> String {
    let names = |list: &str| {
        let text = std::fs::read_to_string(repository().join(list)).unwrap_or_default();
        text.lines().filter_map(|line| line.split_once('\t')).map(|(name, _)| name.to_string()).collect()
    };
    coverage::table(&folder(), &names("tests/onnx_excluded.txt"), &names("tests/onnx_excluded_cuda.txt"))
}

/// docs/ops.md has the operators that are read, and what the lists of failing tests say of them. `BLESS=1` rewrites it.
#[test]
fn the_table_of_operators_is_true() {
    let bless = std::env::var_os("BLESS").is_some() && folder().exists();
    if bless {
        std::fs::create_dir_all(repository().join("docs")).unwrap();
        std::fs::write(operators(), table()).unwrap();
    }
    let found = std::fs::read_to_string(operators()).unwrap_or_default();
    let mut rows = coverage::registered(&found);
    rows.sort();
    let help = "docs/ops.md is out of date: BLESS=1 cargo test --test onnx the_table";
    assert!(rows == coverage::registry(), "{help}");
    assert!(!folder().exists() || found == table(), "{help}");
}
