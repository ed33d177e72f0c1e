//! The node tests of the ONNX project, by the ordinary path: imported, compiled for this CPU, run fused and unfused.
//!
//! `PAVAGE_NODES` names the folder that `./x nodes` fills (default: target/nodes). `tests/onnx_excluded.txt` lists the tests
//! that do not pass, with the reason; the run fails when another one does not pass, and when one of these does.
//! `PAVAGE_NODES_FILTER=part` runs the tests with that part in their name (several parts: `a,b`) and prints how each went;
//! `PAVAGE_NODES_THIRD=1` runs a third, always the same; `BLESS=1` rewrites the list, as far as tests were run.
//!
//! Tests run in processes of their own, one a core: what crashes or hangs is one failure.
#[path = "support/nodes.rs"]
mod nodes;

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

/// Set for the processes that run tests.
const WORKER: &str = "PAVAGE_NODES_WORKER";
/// A test that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(120);
/// Longest reason that the list keeps.
const REASON: usize = 200;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn folder() -> PathBuf {
    std::env::var_os("PAVAGE_NODES").map_or_else(|| repository().join("target/nodes"), PathBuf::from)
}

/// Prints past the capture of the test harness.
fn say(line: &str) {
    writeln!(std::io::stdout().lock(), "{line}").ok();
}

/// How a test went, from the process that ran it.
struct Outcome {
    failure: Option<String>,
    evaluator: Option<String>,
    compile: Option<f64>,
}

impl Outcome {
    fn failed(why: String) -> Outcome {
        Outcome { failure: Some(why), evaluator: None, compile: None }
    }
}

/// A process that runs the tests whose names it reads, and answers with a line of JSON each.
struct Worker {
    child: Child,
    answers: mpsc::Receiver<String>,
}

impl Worker {
    fn start() -> Worker {
        let program = std::env::current_exe().unwrap();
        let mut child = Command::new(program)
            .args(["worker", "--exact", "--nocapture"])
            .env(WORKER, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (send, answers) = mpsc::channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            let answers = out.lines().map_while(Result::ok).filter(|line| line.starts_with('{'));
            answers.take_while(|line| send.send(line.clone()).is_ok()).for_each(drop);
        });
        Worker { child, answers }
    }

    /// The outcome of a test; a process that did not answer is replaced.
    fn run(&mut self, name: &str) -> Outcome {
        let input = self.child.stdin.as_mut().unwrap();
        let sent = writeln!(input, "{name}").and_then(|()| input.flush());
        let answer = sent.map_err(|_| mpsc::RecvTimeoutError::Disconnected).and_then(|()| self.answers.recv_timeout(LIMIT));
        let why = match answer {
            Ok(line) => {
                let v: serde_json::Value = serde_json::from_str(&line).unwrap();
                let text = |key: &str| v[key].as_str().map(String::from);
                return Outcome { failure: text("failure"), evaluator: text("evaluator"), compile: v["compile_ms"].as_f64() };
            }
            Err(mpsc::RecvTimeoutError::Timeout) => format!("hangs: no answer in {} s", LIMIT.as_secs()),
            Err(mpsc::RecvTimeoutError::Disconnected) => "crash".into(),
        };
        self.child.kill().ok();
        let status = self.child.wait().map(|s| s.to_string()).unwrap_or_default();
        *self = Worker::start();
        Outcome::failed(if why == "crash" { format!("crash: {status}") } else { why })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// One of the processes; a test of its own name, so that this program can start itself.
#[test]
fn worker() {
    if std::env::var_os(WORKER).is_none() {
        return;
    }
    let root = folder();
    for name in std::io::stdin().lines().map_while(Result::ok) {
        let panicked = |e: Box<dyn std::any::Any + Send>| {
            let text = e.downcast_ref::<String>().cloned().or_else(|| e.downcast_ref::<&str>().map(|s| s.to_string()));
            let failure = format!("panic: {}", text.unwrap_or_default().lines().collect::<Vec<_>>().join("; "));
            nodes::Verdict { failure: Some(failure), evaluator: None, compile: None }
        };
        let v = std::panic::catch_unwind(|| nodes::run(&root.join(&name))).unwrap_or_else(panicked);
        let ms = v.compile.map(|t| t.as_secs_f64() * 1e3);
        say(&serde_json::json!({ "failure": v.failure, "evaluator": v.evaluator, "compile_ms": ms }).to_string());
    }
}

/// Runs tests, as many at a time as there are cores.
fn run_all(names: &[String]) -> BTreeMap<String, Outcome> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from).min(names.len());
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                let mut worker = Worker::start();
                while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = worker.run(name);
                    outcomes.lock().unwrap().insert(name.clone(), outcome);
                }
            });
        }
    });
    outcomes.into_inner().unwrap()
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
