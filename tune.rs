//! Tuning: the kernels of the chosen plan are measured on the device at hand, each with the schedules of its family; what
//! was measured stands before what was predicted, and the plan is chosen again, until it has no kernel left to measure or is predicted
//! to gain nothing by those it has.
//!
//! Kernels are measured where they run: plans that differ in schedules alone take turns on the same inputs, and of every
//! launch the fastest run counts. A change must be beyond the noise, which is how far two halves of the runs disagree.
use crate::{
    Artifact, Device, Error, Options, Session, Source, Tensor, TuneLock,
    bisect::{Site, pair},
    compile::{Members, Planned, code, costs as costs_with, plan, predicted_for},
    options::CompileOptions,
};
use pavage_codegen::{
    choices::{Choice, choices, signatures},
    emit::{self, Tuned},
    kernels::ArgFacts,
    targets::Target,
};
use pavage_ir::{Region, Schedule, program::Program};
use pavage_passes::eqsat::cost::{self, Costs};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// Schedules tried of one kernel at most.
const MOST_SCHEDULES: usize = 8;
/// Times that the plan is chosen again at most.
const MOST_ROUNDS: usize = 6;
/// A plan that is chosen again must be predicted to take less than this share of the time of the one before: what it costs to
/// measure new kernels has to be worth it.
const PLAN_GAIN: f64 = 0.995;
/// A schedule must take less than this share of the time of what stands, beyond the noise.
const GAIN: f64 = 0.98;
/// So must a plan, in both halves of the runs.
const WHOLE_GAIN: f64 = 0.99;
/// Runs of each variant at least.
const LEAST_RUNS: usize = 12;

/// What to tune, and where.
#[derive(Clone, Copy)]
pub struct Tuning<'a> {
    /// The model.
    pub model: Source<'a>,
    /// How it is compiled: one target, which the device runs.
    pub options: &'a CompileOptions<'a>,
    /// Where it is measured.
    pub device: Device,
    /// Threads and the like.
    pub run: &'a Options,
    /// Inputs, by name.
    pub inputs: &'a [(String, Tensor)],
    /// How long a round measures at least.
    pub effort: Duration,
}

/// A kernel that another schedule suits better.
#[derive(Clone, Debug)]
pub struct Change {
    /// The kernel's name.
    pub kernel: String,
    /// What the schedule is kept under.
    pub signature: String,
    /// The schedule that the family gives first.
    pub before: Schedule,
    /// The one that was faster.
    pub after: Schedule,
    /// Nanoseconds of one launch with each.
    pub ns: (f64, f64),
}

/// What tuning came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What to compile with.
    pub lock: TuneLock,
    /// Distinct kernels that were measured.
    pub kernels: usize,
    /// Times that the plan was chosen.
    pub rounds: usize,
    /// Kernels of which another schedule was taken.
    pub changes: Vec<Change>,
    /// Nanoseconds of one run: untuned, and with the lock.
    pub ns: (f64, f64),
    /// What a user should know.
    pub notes: Vec<String>,
}

/// What is known of a kernel.
struct Known {
    region: u64,
    name: String,
    /// Fastest launch with the schedule taken.
    ns: f64,
    predicted_ns: f64,
    schedule: Option<Schedule>,
}

/// Tunes a model.
pub fn tune(tuning: &Tuning) -> Result<Outcome, Error> {
    let [name] = tuning.options.targets.as_slice() else { return Err(Error::Request("tuning is for one target".into())) };
    let target = Target::parse(name).map_err(|e| Error::Request(e.to_string()))?;
    let mut lock = TuneLock::new(&target);
    let mut log = Log::default();
    let mut notes = Vec::new();
    let mut rounds = 0;
    let mut before: Option<Vec<Region>> = None;
    loop {
        let options = CompileOptions { tune: (rounds > 0).then(|| lock.clone()), ..fused(tuning.options) };
        let planned = plan(tuning.model, &options, Members::Drop)?;
        let costs_now = costs_with(&target, &options);
        let regions = regions(&planned.targets[0].1);
        let total = |of: &[Region]| of.iter().map(|r| cost::predict(r, &costs_now)).sum::<f64>();
        if before.as_ref().is_some_and(|before| total(&regions) >= PLAN_GAIN * total(before)) {
            break;
        }
        before = Some(regions);
        let mut fresh = choices(&planned.targets[0].1, &target, MOST_SCHEDULES);
        fresh.retain(|c| !log.known.contains_key(&c.signature));
        if fresh.is_empty() {
            break;
        }
        if rounds == MOST_ROUNDS {
            notes.push(format!("{} kernels of the last plan were not measured: it changed {rounds} times", fresh.len()));
            break;
        }
        rounds += 1;
        measure(tuning, &planned, &options, fresh, &mut log)?;
        lock.set(schedules(&log.known), costs(&log.known), scale(&log.known));
    }
    let Log { known, mut changes } = log;
    // Schedules alone, and schedules with a plan chosen by measured times: what is faster as a whole is kept.
    let none = TuneLock::new(&target);
    let mut plain = none.clone();
    plain.set(schedules(&known), BTreeMap::new(), 1.0);
    let mut tried = Vec::new();
    for lock in [none, plain, lock] {
        let options = CompileOptions { tune: Some(lock.clone()), ..fused(tuning.options) };
        let planned = plan(tuning.model, &options, Members::Drop)?;
        let session = Variant::new(tuning, &planned, &options, None)?.session;
        tried.push((lock, signatures(&planned.targets[0].1), session));
    }
    let times = whole(tried.iter_mut().map(|(_, _, session)| session).collect(), tuning)?;
    let least = |i: usize| times[i][0].min(times[i][1]);
    let better = |i: &usize| times[*i].iter().zip(&times[0]).all(|(new, old)| *new < WHOLE_GAIN * old);
    let best = [2, 1].into_iter().filter(better).min_by(|a, b| least(*a).total_cmp(&least(*b))).unwrap_or(0);
    if best == 0 {
        changes.clear();
        notes.push("nothing that was tried is faster as a whole: the lock changes nothing".into());
    }
    let (mut lock, used, _) = tried.swap_remove(best);
    lock.keep(&used);
    changes.retain(|c: &Change| used.contains(&c.signature));
    changes.sort_by(|a, b| (b.ns.0 - b.ns.1).total_cmp(&(a.ns.0 - a.ns.1)));
    Ok(Outcome { lock, kernels: known.len(), rounds, changes, ns: (least(0), least(best)), notes })
}

/// The kernels of programs, each as often as it stands there.
fn regions(programs: &[Program]) -> Vec<Region> {
    programs.iter().flat_map(|p| p.body.regions()).map(|(region, _)| region.clone()).collect()
}

fn fused<'a>(options: &CompileOptions<'a>) -> CompileOptions<'a> {
    CompileOptions { plans: vec!["fused".into()], progress: None, tune: None, ..options.clone() }
}

/// A plan with certain schedules, loaded.
struct Variant {
    session: Session,
    /// Signature of the kernel with this symbol.
    signatures: BTreeMap<String, String>,
    /// Fastest run of each launch, in each half of the rounds.
    fastest: Vec<[f64; 2]>,
    /// Symbol of each launch.
    launches: Vec<String>,
}

impl Variant {
    /// Compiles the fused program, with `schedules` in the place of what `options` say of schedules.
    fn new(tuning: &Tuning, planned: &Planned, options: &CompileOptions, schedules: Option<Tuned>) -> Result<Variant, Error> {
        let (target, programs) = &planned.targets[0];
        let mut request = planned.request(options, String::new(), &|_, _| 0.0);
        if let Some(schedules) = schedules {
            request.tuned = [(target.name().to_string(), schedules)].into();
        }
        let run = Options { plan: "fused".into(), ..tuning.run.clone() };
        let session = Artifact::from_bytes(&code(&request)?)?.session(tuning.device, run)?;
        let wired = session.plan().clone();
        let mut sites: Vec<Site> = Vec::new();
        pair(&programs[0].body, &wired.body, &wired.kernels, &[], &mut sites)?;
        let signature = |s: &Site| emit::signature(s.region, &ArgFacts { constants: s.constants.clone() });
        let signatures = sites.iter().map(|s| (s.kernel.symbol.clone(), signature(s))).collect();
        Ok(Variant { session, signatures, fastest: Vec::new(), launches: Vec::new() })
    }

    /// Runs once, and notes the launches that were the fastest of this half.
    fn run(&mut self, feeds: &[(&str, &Tensor)], half: usize) -> Result<(), Error> {
        let mut outputs = self.session.new_outputs()?;
        let times = self.session.run_timed(feeds, &mut outputs)?;
        if self.launches.len() != times.len() {
            let kernels = &self.session.plan().kernels;
            self.launches = times.iter().filter_map(|t| Some(kernels.get(t.kernel.index())?.symbol.clone())).collect();
            self.fastest = vec![[f64::INFINITY; 2]; times.len()];
        }
        self.fastest.iter_mut().zip(&times).for_each(|(least, t)| least[half] = least[half].min(t.ns));
        Ok(())
    }

    /// Mean over the launches of each kernel, by signature, in each half.
    fn kernels(&self) -> BTreeMap<&str, [f64; 2]> {
        let mut sums: BTreeMap<&str, ([f64; 2], f64)> = BTreeMap::new();
        for (symbol, ns) in self.launches.iter().zip(&self.fastest) {
            let Some(signature) = self.signatures.get(symbol) else { continue };
            let (sum, n) = sums.entry(signature).or_default();
            (0..2).for_each(|half| sum[half] += ns[half]);
            *n += 1.0;
        }
        sums.into_iter().map(|(signature, (sum, n))| (signature, sum.map(|s| s / n))).collect()
    }
}

/// Measures the fresh kernels of a plan with all of their schedules.
fn measure(tuning: &Tuning, planned: &Planned, options: &CompileOptions, fresh: Vec<Choice>, log: &mut Log) -> Result<(), Error> {
    let most = fresh.iter().map(|c| c.schedules.len()).max().unwrap_or(1).max(1);
    let pick = |c: &Choice, v: usize| c.schedules.get(v % c.schedules.len().max(1)).cloned();
    let mut variants = Vec::new();
    for v in 0..most {
        let mut chosen = schedules(&log.known);
        chosen.extend(fresh.iter().filter_map(|c| Some((c.signature.clone(), pick(c, v)?))));
        variants.push(Variant::new(tuning, planned, options, Some(chosen))?);
    }
    let feeds: Vec<(&str, &Tensor)> = tuning.inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let start = Instant::now();
    let mut rounds = 0;
    while rounds < LEAST_RUNS || start.elapsed() < tuning.effort {
        for turn in 0..most {
            let v = if rounds % 4 < 2 { turn } else { most - 1 - turn };
            variants[v].run(&feeds, rounds % 2)?;
        }
        rounds += 1;
    }
    let costs = predicted_for(&planned.targets[0].0, options);
    let times: Vec<BTreeMap<&str, [f64; 2]>> = variants.iter().map(Variant::kernels).collect();
    for choice in &fresh {
        // A kernel with few schedules ran with each of them in several variants.
        let mut of: Vec<[f64; 2]> = vec![[f64::INFINITY; 2]; choice.schedules.len()];
        for (v, kernels) in times.iter().enumerate() {
            if let (Some(ns), false) = (kernels.get(choice.signature.as_str()), of.is_empty()) {
                let least = &mut of[v % choice.schedules.len()];
                (0..2).for_each(|half| least[half] = least[half].min(ns[half]));
            }
        }
        log.settle(choice, &of, &costs);
    }
    Ok(())
}

/// What was measured so far.
#[derive(Default)]
struct Log {
    known: BTreeMap<String, Known>,
    changes: Vec<Change>,
}

impl Log {
    /// Decides on the schedule of a kernel, given the fastest launches with each, in each half.
    fn settle(&mut self, choice: &Choice, of: &[[f64; 2]], costs: &Costs) {
        let least = |t: &[f64; 2]| t[0].min(t[1]);
        let region = &choice.region;
        let mut known = Known { region: region.signature(), name: region.name.clone(), ns: 0.0, predicted_ns: cost::time(region, costs), schedule: None };
        let first = of.first().filter(|t| least(t).is_finite());
        if let Some(first) = first {
            let best = (0..of.len()).min_by(|a, b| least(&of[*a]).total_cmp(&least(&of[*b]))).unwrap_or(0);
            known.ns = least(first);
            let noise = |t: &[f64; 2]| (t[0] - t[1]).abs();
            if least(&of[best]) + noise(first).max(noise(&of[best])) < GAIN * least(first) {
                let (before, after) = (choice.schedules[0].clone(), choice.schedules[best].clone());
                known.ns = least(&of[best]);
                known.schedule = Some(after.clone());
                self.changes.push(Change { kernel: region.name.clone(), signature: choice.signature.clone(), before, after, ns: (least(first), known.ns) });
            } else {
                known.schedule = Some(choice.schedules[0].clone());
            }
        }
        self.known.insert(choice.signature.clone(), known);
    }
}

/// The schedules taken, by signature.
fn schedules(known: &BTreeMap<String, Known>) -> Tuned {
    known.iter().filter_map(|(signature, k)| Some((signature.clone(), k.schedule.clone()?))).collect()
}

/// Measured times by region. What ran in no branch that was taken has none.
fn costs(known: &BTreeMap<String, Known>) -> BTreeMap<u64, (f64, String)> {
    let mut costs: BTreeMap<u64, (f64, String)> = BTreeMap::new();
    for k in known.values().filter(|k| k.ns > 0.0) {
        let entry = costs.entry(k.region).or_insert((k.ns, k.name.clone()));
        // The same region, once with constants and once without: the slower counts.
        entry.0 = entry.0.max(k.ns);
    }
    costs
}

/// Measured over predicted, in the middle.
fn scale(known: &BTreeMap<String, Known>) -> f64 {
    let mut ratios: Vec<f64> = known.values().filter(|k| k.ns > 0.0 && k.predicted_ns > 0.0).map(|k| k.ns / k.predicted_ns).collect();
    ratios.sort_by(f64::total_cmp);
    ratios.get(ratios.len() / 2).copied().unwrap_or(1.0)
}

/// Fastest run of each session as a whole, in each half of the rounds.
fn whole(mut sessions: Vec<&mut Session>, tuning: &Tuning) -> Result<Vec<[f64; 2]>, Error> {
    let feeds: Vec<(&str, &Tensor)> = tuning.inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut fastest = vec![[f64::INFINITY; 2]; sessions.len()];
    let mut outputs = sessions.iter().map(|s| s.new_outputs()).collect::<Result<Vec<_>, _>>()?;
    let start = Instant::now();
    let mut rounds = 0;
    while rounds < LEAST_RUNS || start.elapsed() < tuning.effort {
        for turn in 0..sessions.len() {
            let i = if rounds % 4 < 2 { turn } else { sessions.len() - 1 - turn };
            let from = Instant::now();
            sessions[i].run_into(&feeds, &mut outputs[i])?;
            let least = &mut fastest[i][rounds % 2];
            *least = least.min(from.elapsed().as_nanos() as f64);
        }
        rounds += 1;
    }
    Ok(fastest)
}
