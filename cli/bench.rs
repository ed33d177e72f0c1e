//! `pavage bench`: how fast a model is, and what fusion bought.
use super::inputs::{self, Given};
use super::load::{ModelArgs, is_artifact};
use super::{Done, Failure, remark, residual, say, say_json, text};
use pavage::runtime::plan::{Kernel, KernelId};
use pavage::runtime::{DeviceBuffer, Outputs};
use pavage::{Artifact, Session, ShapeArg, Tensor};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// `pavage bench`
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    inputs: inputs::Args,
    /// Which plan: fused or unfused.
    #[arg(long, default_value = "fused")]
    plan: String,
    /// Time plans in turn, on the same data; of two, show what each kernel of the first saves.
    #[arg(long, value_name = "PLAN,PLAN,...", value_delimiter = ',', num_args = 1, conflicts_with = "plan")]
    ab: Vec<String>,
    /// Show each kernel's predicted and measured time. Predictions are for one core: on a CPU this runs on one thread
    /// unless --threads says otherwise.
    #[arg(long, conflicts_with_all = ["ab", "quiet"])]
    residual: bool,
    /// Warm up for this long first (milliseconds).
    #[arg(long, default_value_t = 200)]
    warm_up: u64,
    /// Measure for at least this long (seconds).
    #[arg(long, default_value_t = 3.0)]
    duration: f64,
    /// Measure at least this many runs.
    #[arg(long, default_value_t = 10)]
    iterations: usize,
    /// On a GPU, count the copies of inputs and outputs too. Otherwise they stay in its memory.
    #[arg(long)]
    copies: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Print little; the last line is the median in milliseconds.
    #[arg(long, short)]
    quiet: bool,
}

/// How long to measure.
pub(crate) struct Effort {
    /// Before anything counts.
    pub(crate) warm_up: Duration,
    /// At least this long.
    pub(crate) duration: Duration,
    /// At least this many runs.
    pub(crate) iterations: usize,
}

/// Where a GPU's inputs and outputs are while it is timed.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Keep {
    /// In host memory: copies count.
    OnHost,
    /// In the session's memory, where that is another.
    OnDevice,
}

/// Times of runs in nanoseconds, sorted.
pub(crate) struct Times(Vec<f64>);

impl Times {
    fn new(mut ns: Vec<f64>) -> Self {
        ns.sort_by(f64::total_cmp);
        Times(ns)
    }

    /// The time that this share of runs kept within, interpolated.
    fn percentile(&self, share: f64) -> f64 {
        let at = share * self.0.len().saturating_sub(1) as f64;
        let below = self.0.get(at.floor() as usize).copied().unwrap_or(f64::NAN);
        let above = self.0.get(at.ceil() as usize).copied().unwrap_or(below);
        below + (above - below) * at.fract()
    }

    /// Half of the runs were faster.
    pub(crate) fn median(&self) -> f64 {
        self.percentile(0.5)
    }

    fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    fn to_json(&self, plan: &str) -> Value {
        let ms = |ns: f64| ns / 1e6;
        json!({
            "plan": plan, "runs": self.0.len(), "p50_ms": ms(self.median()), "p90_ms": ms(self.percentile(0.9)),
            "p99_ms": ms(self.percentile(0.99)), "mean_ms": ms(self.mean()), "min_ms": ms(self.percentile(0.0)),
            "runs_per_second": 1e9 / self.mean(),
        })
    }

    fn row(&self, plan: &str) -> Vec<String> {
        let mut row = vec![plan.to_string(), self.0.len().to_string()];
        row.extend([0.5, 0.9, 0.99].map(|p| text::time(self.percentile(p))));
        row.extend([text::time(self.mean()), format!("{:.1}", 1e9 / self.mean())]);
        row
    }
}

const HEAD: [&str; 7] = ["plan", "runs#", "p50#", "p90#", "p99#", "mean#", "runs/s#"];

/// A table of plans and their times.
pub(crate) fn times_table(rows: &[(&str, &Times)]) -> String {
    text::table(&HEAD, rows.iter().map(|(plan, times)| times.row(plan)))
}

/// A session with its inputs and outputs where they are to be.
struct Runner<'a> {
    session: &'a mut Session,
    outputs: Outputs,
    /// The inputs in the session's memory, if they are kept there.
    uploaded: Vec<DeviceBuffer>,
}

impl<'a> Runner<'a> {
    fn new(session: &'a mut Session, feeds: &[(&str, &Tensor)], keep: Keep) -> Result<Self, Failure> {
        let on_gpu = keep == Keep::OnDevice && session.plan().kernels.iter().any(|k| k.gpu.is_some());
        let uploaded = if on_gpu { feeds.iter().map(|(_, t)| session.upload(t)).collect::<Result<_, _>>()? } else { Vec::new() };
        Ok(Runner { outputs: session.new_outputs()?, session, uploaded })
    }

    /// Runs once; nanoseconds.
    fn run(&mut self, feeds: &[(&str, &Tensor)]) -> Result<f64, Failure> {
        if self.uploaded.is_empty() {
            let start = Instant::now();
            self.session.run_into(feeds, &mut self.outputs)?;
            return Ok(start.elapsed().as_nanos() as f64);
        }
        let resident: Vec<(&str, &DeviceBuffer)> = feeds.iter().map(|(name, _)| *name).zip(&self.uploaded).collect();
        let start = Instant::now();
        self.session.run_resident(&resident)?;
        Ok(start.elapsed().as_nanos() as f64)
    }
}

/// Runs the sessions in turn, each once a round and in alternating order, so that a drift of the
/// machine hits all alike.
pub(crate) fn measure(sessions: &mut [Session], feeds: &[(&str, &Tensor)], effort: &Effort, keep: Keep) -> Result<Vec<Times>, Failure> {
    let mut runners = sessions.iter_mut().map(|s| Runner::new(s, feeds, keep)).collect::<Result<Vec<_>, _>>()?;
    let warm = Instant::now();
    loop {
        for runner in &mut runners {
            runner.run(feeds)?;
        }
        if warm.elapsed() >= effort.warm_up {
            break;
        }
    }
    let mut ns = vec![Vec::new(); runners.len()];
    let start = Instant::now();
    let mut rounds = 0;
    while rounds < effort.iterations || start.elapsed() < effort.duration {
        for turn in 0..runners.len() {
            let i = if rounds % 2 == 0 { turn } else { runners.len() - 1 - turn };
            ns[i].push(runners[i].run(feeds)?);
        }
        rounds += 1;
    }
    Ok(ns.into_iter().map(Times::new).collect())
}

/// One launch of a plan in one run: which kernel, its median time, the memory it moves.
struct Launch<'a> {
    kernel: &'a Kernel,
    ns: f64,
    bytes: f64,
}

/// Times each launch of a plan over a few runs.
fn launches<'a>(session: &mut Session, kernels: &'a [Kernel], feeds: &[(&str, &Tensor)]) -> Result<Vec<Launch<'a>>, Failure> {
    let mut out = session.new_outputs()?;
    let mut rounds: Vec<Vec<(KernelId, f64)>> = Vec::new();
    let start = Instant::now();
    while rounds.len() < 5 || (rounds.len() < 50 && start.elapsed() < Duration::from_millis(500)) {
        let times = session.run_timed(feeds, &mut out)?;
        rounds.push(times.iter().map(|t| (t.kernel, t.ns)).collect());
    }
    let sizes = session.sizes().to_vec();
    let launch = |(i, (id, _)): (usize, &(KernelId, f64))| {
        let kernel = kernels.get(id.index())?;
        let ns = Times::new(rounds.iter().filter_map(|r| Some(r.get(i)?.1)).collect()).median();
        let p = &kernel.provenance;
        let bytes = [&p.bytes_read, &p.bytes_written].map(|b| b.eval(&sizes).unwrap_or(0) as f64);
        Some(Launch { kernel, ns, bytes: bytes[0] + bytes[1] })
    };
    Ok(rounds[0].iter().enumerate().filter_map(launch).collect())
}

/// Each launch of each plan as JSON: the kernel, what it does, its schedule (the last of its rules), measured and predicted.
fn launches_json(sessions: &mut [Session], feeds: &[(&str, &Tensor)]) -> Result<Vec<Value>, Failure> {
    let mut plans = Vec::new();
    for session in sessions {
        let kernels = session.plan().kernels.clone();
        let times = launches(session, &kernels, feeds)?;
        plans.push(times.iter().map(launch_json).collect());
    }
    Ok(plans)
}

fn launch_json(l: &Launch) -> Value {
    let p = &l.kernel.provenance;
    json!({ "kernel": l.kernel.name, "does": p.members, "rules": p.rules, "us": l.ns / 1e3, "predicted_us": p.predicted_ns / 1e3 })
}

/// What a fused kernel saves over the kernels that do its work one by one.
pub(crate) struct Saving {
    name: String,
    members: Vec<String>,
    fused_ns: f64,
    unfused_ns: f64,
    bytes_removed: f64,
    launches_removed: i64,
}

/// For each launch of the first plan, what the launches of the second that do the same work cost.
/// A launch of the second belongs to the one that shares most source nodes with it.
pub(crate) fn savings(sessions: &mut [Session], feeds: &[(&str, &Tensor)]) -> Result<Vec<Saving>, Failure> {
    let [a, b] = sessions else { return Ok(Vec::new()) };
    let (a_kernels, b_kernels) = (a.plan().kernels.clone(), b.plan().kernels.clone());
    let fused = launches(a, &a_kernels, feeds)?;
    let unfused = launches(b, &b_kernels, feeds)?;
    let mut all: Vec<Saving> = fused
        .iter()
        .map(|l| Saving {
            name: l.kernel.name.clone(),
            members: l.kernel.provenance.members.clone(),
            fused_ns: l.ns,
            unfused_ns: 0.0,
            bytes_removed: -l.bytes,
            launches_removed: -1,
        })
        .collect();
    let mut elsewhere = 0;
    for l in &unfused {
        let sources = &l.kernel.provenance.sources;
        let shared = |f: &Launch| f.kernel.provenance.sources.iter().filter(|s| sources.contains(s)).count();
        // Of equals the last: a tail is fused into what comes before it.
        match fused.iter().map(shared).enumerate().filter(|(_, n)| *n > 0).max_by_key(|(_, n)| *n) {
            Some((i, _)) => {
                all[i].unfused_ns += l.ns;
                all[i].bytes_removed += l.bytes;
                all[i].launches_removed += 1;
            }
            None => elsewhere += 1,
        }
    }
    if elsewhere > 0 {
        all.push(Saving {
            name: "(folded away)".into(),
            members: Vec::new(),
            fused_ns: 0.0,
            unfused_ns: unfused.iter().map(|l| l.ns).sum::<f64>() - all.iter().map(|s| s.unfused_ns).sum::<f64>(),
            bytes_removed: 0.0,
            launches_removed: elsewhere,
        });
    }
    Ok(all)
}

/// The savings as a table, the dearest kernels first, at most `most` of them; the last line sums all.
pub(crate) fn savings_table(savings: &[Saving], most: usize) -> String {
    let mut order: Vec<&Saving> = savings.iter().collect();
    order.sort_by(|a, b| b.unfused_ns.max(b.fused_ns).total_cmp(&a.unfused_ns.max(a.fused_ns)));
    let row = |name: &str, members: String, all: &[&Saving]| {
        let sum = |f: fn(&Saving) -> f64| all.iter().map(|s| f(s)).sum::<f64>();
        vec![
            name.to_string(),
            members,
            text::time(sum(|s| s.unfused_ns)),
            text::time(sum(|s| s.fused_ns)),
            text::bytes(sum(|s| s.bytes_removed)),
            all.iter().map(|s| s.launches_removed).sum::<i64>().to_string(),
        ]
    };
    let mut rows: Vec<_> = order.iter().take(most).map(|s| row(&s.name, s.members.join(" "), &[s])).collect();
    if let Some(rest) = order.get(most..).filter(|r| !r.is_empty()) {
        rows.push(row(&format!("{} more", rest.len()), String::new(), rest));
    }
    rows.push(row("all", String::new(), &order));
    let head = ["fused kernel", "does", "unfused#", "fused#", "bytes removed#", "launches removed#"];
    text::table(&head, rows)
}

/// The artifact of a model and its inputs: those given, else random ones.
pub(super) fn prepare(model: &ModelArgs, inputs: &inputs::Args) -> Result<(Artifact, Vec<(String, Tensor)>), Failure> {
    let given = Given::read(inputs)?;
    if !given.is_empty() {
        let artifact = model.open(given.shapes())?;
        let inputs = given.resolve(&artifact)?;
        return Ok((artifact, inputs));
    }
    let mut open = Vec::new();
    if !is_artifact(&model.model)? && !model.dynamic {
        open = open_sizes(model)?;
    }
    if !open.is_empty() {
        let names: Vec<&str> = open.iter().map(String::as_str).collect();
        remark(format!("sizes taken as 1: {}; fix others with --shape or give --inputs", names.join(", ")));
    }
    let ones = open.into_iter().map(|name| ShapeArg::Size { name, value: 1 }).collect();
    let artifact = model.open(ones)?;
    let inputs = inputs::random(&artifact, 1)?;
    Ok((artifact, inputs))
}

/// Names of the sizes that a model's inputs leave open.
fn open_sizes(model: &ModelArgs) -> Result<Vec<String>, Failure> {
    let graph = super::check::import(&model.model, &model.shapes)?.graph;
    let mut names = Vec::new();
    for (_, ty) in super::check::inputs(&graph) {
        for sym in ty.shape.iter().flat_map(|d| d.symbols()) {
            let name = sym.name.to_string();
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    Ok(names)
}

/// `pavage bench`
pub(crate) fn main(args: &Args) -> Done {
    let plans = if args.ab.is_empty() { vec![args.plan.clone()] } else { args.ab.clone() };
    let (artifact, inputs) = prepare(&args.model, &args.inputs)?;
    let feeds: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let effort = Effort {
        warm_up: Duration::from_millis(args.warm_up),
        duration: Duration::try_from_secs_f64(args.duration).map_err(|e| Failure::usage(format!("--duration {}: {e}", args.duration)))?,
        iterations: args.iterations.max(1),
    };
    if args.residual {
        return residual::show(&artifact, &args.model, &args.plan, &feeds, &effort, args.json);
    }
    let mut sessions = plans.iter().map(|plan| artifact.session(args.model.device, args.model.session_options(plan))).collect::<Result<Vec<_>, _>>()?;
    let keep = if args.copies { Keep::OnHost } else { Keep::OnDevice };
    let times = measure(&mut sessions, &feeds, &effort, keep)?;
    let savings = savings(&mut sessions, &feeds)?;
    let target = sessions[0].plan().target.clone();

    if args.json {
        let launches = launches_json(&mut sessions, &feeds)?;
        let per_kernel = savings.iter().map(|s| {
            json!({
                "kernel": s.name, "does": s.members, "unfused_us": s.unfused_ns / 1e3, "fused_us": s.fused_ns / 1e3,
                "bytes_removed": s.bytes_removed, "launches_removed": s.launches_removed,
            })
        });
        let sizes = inputs.iter().map(|(n, t)| (n.clone(), json!({"dtype": t.dtype().name(), "shape": t.shape()})));
        say_json(&json!({
            "device": args.model.device.to_string(), "target": target, "threads": args.model.threads,
            "inputs": sizes.collect::<serde_json::Map<_, _>>(), "arena_bytes": sessions[0].arena_bytes(),
            "plans": plans.iter().zip(&times).map(|(p, t)| t.to_json(p)).collect::<Vec<_>>(),
            "kernels": per_kernel.collect::<Vec<_>>(), "launches": launches,
        }));
    } else if !args.quiet {
        let shapes: Vec<String> = inputs.iter().map(|(n, t)| format!("{n}: {}{}", t.dtype(), text::shape(t.shape()))).collect();
        say(format!("{} on {} ({target})", shapes.join(", "), args.model.device));
        sessions[0].notes().iter().for_each(remark);
        let rows: Vec<(&str, &Times)> = plans.iter().map(String::as_str).zip(&times).collect();
        say(times_table(&rows));
        if let [a, b] = times.as_slice() {
            say(format!("{} is {:.2}x as fast as {}", plans[0], b.median() / a.median(), plans[1]));
            say(savings_table(&savings, 20));
        }
    }
    if args.quiet {
        say(format!("{:.6}", times[0].median() / 1e6));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_interpolate() {
        let times = Times::new(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((times.median(), times.percentile(0.0), times.percentile(1.0)), (2.5, 1.0, 4.0));
        assert_eq!(Times::new(vec![7.0]).percentile(0.99), 7.0);
    }
}
