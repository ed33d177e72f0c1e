//! Run many small tests from one packed folder, in processes of their own: what crashes, hangs or spoils a device is one
//! failure. Holds no compiler.
//!
//! ```text
//! nodes FOLDER DEVICE RESULTS.jsonl [WORKERS [PART/PARTS]]
//! ```
//!
//! `FOLDER` holds `nodes.jsonl`, a line a test, and `nodes.bin`, where the lines point into: artifact, inputs, expected
//! outputs (`examples/pack_nodes.rs` of the compiler writes them). A line of results is `{"name", "plan", "failure"}`; the
//! failure is null where every output is within the test's own tolerance.
use pavage_runtime::{Artifact, DType, Device, Options, Tensor};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    error::Error,
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

/// A test that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(30);

type Fallible<T> = Result<T, Box<dyn Error>>;

fn main() -> Fallible<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["worker", folder, device] => work(Path::new(folder), device.parse()?),
        [folder, device, results, rest @ ..] => {
            let workers = rest.first().map_or(Ok(8), |n| n.parse())?;
            let part = rest.get(1).copied().unwrap_or("1/1");
            let part = part.split_once('/').and_then(|(part, parts)| Some((part.parse().ok()?, parts.parse().ok()?)));
            let part = part.filter(|(part, parts)| (1..=*parts).contains(part)).ok_or("a part is PART/PARTS, as 1/2")?;
            run_all(folder, device, Path::new(results), workers, part)
        }
        _ => Err("usage: nodes FOLDER DEVICE RESULTS.jsonl [WORKERS [PART/PARTS]]".into()),
    }
}

fn tests(folder: &Path) -> Fallible<Vec<Value>> {
    let text = fs::read_to_string(folder.join("nodes.jsonl"))?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

// ---- the process that hands out tests ----

struct Worker {
    child: Child,
    answers: mpsc::Receiver<String>,
    start: [String; 2],
}

impl Worker {
    fn start(folder: &str, device: &str) -> Fallible<Worker> {
        let start = [folder.to_owned(), device.to_owned()];
        let mut child =
            Command::new(std::env::current_exe()?).arg("worker").args(&start).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let (send, answers) = mpsc::channel();
        let out = BufReader::new(child.stdout.take().ok_or("a pipe")?);
        std::thread::spawn(move || out.lines().map_while(Result::ok).take_while(|line| send.send(line.clone()).is_ok()).for_each(drop));
        Ok(Worker { child, answers, start })
    }

    /// How a plan of a test went. After a failure of the device the process is replaced.
    fn run(&mut self, test: usize, plan: &str) -> Fallible<Option<String>> {
        let sent = match self.child.stdin.as_mut() {
            Some(input) => writeln!(input, "{test} {plan}").and_then(|()| input.flush()).is_ok(),
            None => false,
        };
        let answer = if sent { self.answers.recv_timeout(LIMIT) } else { Err(mpsc::RecvTimeoutError::Disconnected) };
        let failure = match answer {
            Ok(line) => serde_json::from_str::<Option<String>>(&line)?,
            Err(mpsc::RecvTimeoutError::Timeout) => Some(format!("hangs: no answer in {} s", LIMIT.as_secs())),
            Err(mpsc::RecvTimeoutError::Disconnected) => Some("crash".to_owned()),
        };
        let spoilt = failure.as_ref().is_some_and(|f| ["hangs", "crash", "run:", "session:"].iter().any(|s| f.starts_with(s)));
        if spoilt {
            self.child.kill().ok();
            self.child.wait()?;
            let [folder, device] = self.start.clone();
            *self = Worker::start(&folder, &device)?;
        }
        Ok(failure)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Every test, or every so many-th of them, which is one part of so many.
fn run_all(folder: &str, device: &str, results: &Path, workers: usize, (part, parts): (usize, usize)) -> Fallible<()> {
    let tests: Vec<Value> = tests(Path::new(folder))?;
    let mut work = vec![];
    for (i, test) in tests.iter().enumerate().skip(part - 1).step_by(parts) {
        for plan in test["plans"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            work.push((i, plan.to_owned()));
        }
    }
    let (next, file) = (AtomicUsize::new(0), Mutex::new(fs::File::create(results)?));
    let outcomes: Mutex<BTreeMap<(String, String), Option<String>>> = Mutex::default();
    let note = |name: &str, plan: &str, failure: Option<String>| {
        if let (Ok(mut file), Ok(mut all)) = (file.lock(), outcomes.lock()) {
            writeln!(file, "{}", json!({ "name": name, "plan": plan, "failure": failure })).ok();
            all.insert((name.to_owned(), plan.to_owned()), failure);
        }
    };
    for test in tests.iter().skip(part - 1).step_by(parts) {
        if let (Some(name), Some(why)) = (test["name"].as_str(), test["failure"].as_str()) {
            note(name, "compile", Some(why.to_owned()));
        }
    }
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                let Ok(mut worker) = Worker::start(folder, device) else { return };
                while let Some((test, plan)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let failure = worker.run(*test, plan).unwrap_or_else(|e| Some(format!("runner: {e}")));
                    note(tests[*test]["name"].as_str().unwrap_or_default(), plan, failure);
                }
            });
        }
    });
    let all = outcomes.into_inner()?;
    let mut by_test: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for ((name, plan), failure) in &all {
        let said = by_test.entry(name).or_default();
        said.extend(failure.as_ref().map(|f| format!("{plan}: {f}")));
    }
    for (name, said) in &by_test {
        if let Some(first) = said.first() {
            println!("{name:60} {}", first.chars().take(150).collect::<String>());
        }
    }
    let failed = by_test.values().filter(|said| !said.is_empty()).count();
    println!("ONNX node tests on {device}: {} passed, {failed} failed", by_test.len() - failed);
    Ok(())
}

// ---- the process that runs them ----

fn work(folder: &Path, device: Device) -> Fallible<()> {
    let (tests, pool) = (tests(folder)?, Pool { folder: folder.to_owned(), bytes: fs::read(folder.join("nodes.bin"))? });
    for line in std::io::stdin().lines() {
        let line = line?;
        let (test, plan) = line.split_once(' ').ok_or("expected TEST PLAN")?;
        let failure = run(&pool, &tests[test.parse::<usize>()?], device, plan).err();
        println!("{}", json!(failure));
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// What the lines point into.
struct Pool {
    folder: PathBuf,
    bytes: Vec<u8>,
}

impl Pool {
    fn bytes(&self, at: &Value) -> Result<&[u8], String> {
        let number = |i: usize| at[i].as_u64().map(|n| n as usize);
        let range = number(0).zip(number(1)).and_then(|(from, len)| self.bytes.get(from..from + len));
        range.ok_or_else(|| format!("{} is damaged", self.folder.display()))
    }

    /// Tensors by name.
    fn tensors(&self, list: &Value) -> Result<Vec<(String, Tensor)>, String> {
        let one = |v: &Value| {
            let shape: Vec<usize> = v["shape"].as_array().into_iter().flatten().filter_map(|d| d.as_u64().map(|d| d as usize)).collect();
            let dtype: DType = v["dtype"].as_str().unwrap_or_default().parse()?;
            let tensor = Tensor::from_bytes(dtype, &shape, self.bytes(&v["at"])?).map_err(|e| e.to_string())?;
            Ok((v["name"].as_str().unwrap_or_default().to_owned(), tensor))
        };
        list.as_array().into_iter().flatten().map(one).collect()
    }
}

fn run(pool: &Pool, test: &Value, device: Device, plan: &str) -> Result<(), String> {
    let artifact = Artifact::from_bytes(pool.bytes(&test["artifact"])?).map_err(|e| format!("artifact: {e}"))?;
    let options = Options { plan: plan.into(), threads: 1, ..Options::default() };
    let mut session = artifact.session(device, options).map_err(|e| format!("session: {e}"))?;
    let (relative, absolute) = (test["rtol"].as_f64().unwrap_or(0.0), test["atol"].as_f64().unwrap_or(0.0));
    for set in test["sets"].as_array().into_iter().flatten() {
        let inputs = pool.tensors(&set["inputs"])?;
        let feed: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        // Twice: the second time from what was set up for these shapes.
        for _ in 0..2 {
            let outputs = session.run(&feed).map_err(|e| format!("run: {e}"))?;
            for (name, want) in pool.tensors(&set["outputs"])? {
                let got = outputs.get(&name).ok_or_else(|| format!("wrong: there is no output `{name}`"))?;
                compare(got, &want, relative, absolute).map_err(|e| format!("wrong: `{name}` {e}"))?;
            }
        }
    }
    Ok(())
}

/// Dtype and shape are equal, elements close, NaN is NaN.
fn compare(got: &Tensor, want: &Tensor, relative: f64, absolute: f64) -> Result<(), String> {
    if got.dtype() != want.dtype() || got.shape() != want.shape() {
        return Err(format!("is {}{:?}, should be {}{:?}", got.dtype(), got.shape(), want.dtype(), want.shape()));
    }
    // Two steps of bfloat16, as in the suite's own runner.
    let relative = if want.dtype() == DType::BF16 { relative.max(1.0 / 64.0) } else { relative };
    let near = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= absolute + relative * b.abs();
    let (got, want) = (values(got), values(want));
    let far: Vec<usize> = (0..got.len()).filter(|i| !near(got[*i], want[*i])).collect();
    match far.first() {
        None => Ok(()),
        Some(i) => Err(format!("[{i}] is {}, should be {} ({} of {} are wrong)", got[*i], want[*i], far.len(), got.len())),
    }
}

/// The elements of a tensor.
fn values(t: &Tensor) -> Vec<f64> {
    let (bits, bytes) = (t.dtype().bits(), t.bytes());
    let count: usize = t.shape().iter().product();
    let one = |i: usize| {
        let mut raw = [0u8; 8];
        if bits < 8 {
            let per = 8 / bits;
            raw[0] = bytes[i / per] >> (bits * (i % per)) & ((1 << bits) - 1);
        } else {
            raw[..bits / 8].copy_from_slice(&bytes[i * bits / 8..][..bits / 8]);
        }
        let (word, spare) = (u64::from_le_bytes(raw), 64 - bits as u32);
        match t.dtype() {
            DType::F64 => f64::from_bits(word),
            DType::F32 => f64::from(f32::from_bits(word as u32)),
            DType::F16 => half::f16::from_bits(word as u16).to_f64(),
            DType::BF16 => half::bf16::from_bits(word as u16).to_f64(),
            DType::F8E4M3 => float8(word as u8, 3, 7),
            DType::F8E5M2 => float8(word as u8, 2, 15),
            DType::F8E4M3Fnuz => unsigned_zero(word as u8, 3, 8),
            DType::F8E5M2Fnuz => unsigned_zero(word as u8, 2, 16),
            DType::F8E8M0 if word == 255 => f64::NAN,
            DType::F8E8M0 => f64::powi(2.0, word as i32 - 127),
            DType::F4E2M1 => finite((word & 8) != 0, (word & 7) as i32, 1, 1),
            DType::I64 | DType::I32 | DType::I16 | DType::I8 | DType::I4 | DType::I2 => (((word << spare) as i64) >> spare) as f64,
            _ => word as f64,
        }
    };
    (0..count).map(one).collect()
}

/// An 8-bit float; only the one with two bits of mantissa has infinities.
fn float8(code: u8, mantissa: u32, bias: i32) -> f64 {
    let (negative, body) = (code & 0x80 != 0, i32::from(code & 0x7f));
    match mantissa {
        2 if body == 0x7c => f64::INFINITY.copysign(if negative { -1.0 } else { 1.0 }),
        2 if body > 0x7c => f64::NAN,
        3 if body == 0x7f => f64::NAN,
        _ => finite(negative, body, mantissa, bias),
    }
}

/// An 8-bit float whose negative zero is its NaN.
fn unsigned_zero(code: u8, mantissa: u32, bias: i32) -> f64 {
    if code == 0x80 { f64::NAN } else { finite(code & 0x80 != 0, i32::from(code & 0x7f), mantissa, bias) }
}

/// Exponent and mantissa as a number.
fn finite(negative: bool, body: i32, mantissa: u32, bias: i32) -> f64 {
    let (exponent, part) = (body >> mantissa, body & ((1 << mantissa) - 1));
    let (whole, exponent) = if exponent == 0 { (part, 1) } else { (part + (1 << mantissa), exponent) };
    let value = f64::from(whole) * f64::powi(2.0, exponent - bias - mantissa as i32);
    if negative { -value } else { value }
}
