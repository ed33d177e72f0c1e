//! Jobs in processes of their own, one a core: what panics, crashes or hangs is that job's failure and nobody else's.
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

/// Set for the processes that do jobs.
const WORKER: &str = "PAVAGE_TEST_WORKER";
/// A job that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// Prints past the capture of the test harness.
pub(crate) fn say(line: &str) {
    writeln!(std::io::stdout().lock(), "{line}").ok();
}

/// What a test named `worker` does: in a process started by [`run_all`], the jobs whose names it reads, an answer each.
pub(crate) fn serve(job: impl Fn(&str) -> Value + std::panic::RefUnwindSafe) {
    if std::env::var_os(WORKER).is_none() {
        return;
    }
    for name in std::io::stdin().lines().map_while(Result::ok) {
        let answer = std::panic::catch_unwind(|| job(&name)).unwrap_or_else(|e| {
            let text = e.downcast_ref::<String>().cloned().or_else(|| e.downcast_ref::<&str>().map(|s| s.to_string()));
            json!({ "panic": text.unwrap_or_default().lines().collect::<Vec<_>>().join("; ") })
        });
        say(&answer.to_string());
    }
}

/// A process that does jobs.
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
            // What a main thread has.
            .env("RUST_MIN_STACK", "8388608")
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

    /// The answer; a process that gave none is replaced, and what became of it is the error.
    fn run(&mut self, name: &str) -> Result<Value, String> {
        let input = self.child.stdin.as_mut().unwrap();
        let sent = writeln!(input, "{name}").and_then(|()| input.flush());
        let answer = sent.map_err(|_| mpsc::RecvTimeoutError::Disconnected).and_then(|()| self.answers.recv_timeout(LIMIT));
        let hangs = match answer {
            Ok(line) => {
                let answer: Value = serde_json::from_str(&line).unwrap();
                return answer["panic"].as_str().map_or(Ok(answer.clone()), |text| Err(format!("panic: {text}")));
            }
            Err(e) => e == mpsc::RecvTimeoutError::Timeout,
        };
        self.child.kill().ok();
        let status = self.child.wait().map(|s| s.to_string()).unwrap_or_default();
        *self = Worker::start();
        Err(if hangs { format!("hangs: no answer in {} s", LIMIT.as_secs()) } else { format!("crash: {status}") })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Does all jobs, as many at a time as there are cores. This program must have a test `worker` that calls [`serve`].
pub(crate) fn run_all(names: &[String]) -> BTreeMap<String, Result<Value, String>> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from).min(names.len());
    let next = AtomicUsize::new(0);
    let answers = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                let mut worker = Worker::start();
                while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let answer = worker.run(name);
                    answers.lock().unwrap().insert(name.clone(), answer);
                }
            });
        }
    });
    answers.into_inner().unwrap()
}
