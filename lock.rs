//! `tune.lock`: what was measured on a device, for compiling without it.
//!
//! Text, a fact a line, sorted: times that stand before predictions (`cost`) and schedules that stand before the first of
//! their family (`schedule`). The head says which version wrote it for what; the last line is a hash of all before it.
use crate::Error;
use pavage_codegen::{emit::Tuned, targets::Target};
use pavage_ir::Schedule;
use pavage_passes::eqsat::cost::Measured;
use pavage_runtime::content_hash;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
    sync::Arc,
};

/// Version of the format and of the program: schedules and predictions may mean something else in another.
const HEAD: &str = concat!("pavage tune.lock 1 of ", env!("CARGO_PKG_VERSION"));

/// What `pavage tune` measured for one target.
#[derive(Clone, Debug, PartialEq)]
pub struct TuneLock {
    target: String,
    /// The CPU that a `native` target is; empty for others.
    cpu: String,
    features: String,
    /// What predictions are multiplied by.
    scale: f64,
    /// Nanoseconds and a name for people, by region.
    costs: BTreeMap<u64, (f64, String)>,
    schedules: Tuned,
}

impl TuneLock {
    /// Nothing measured yet.
    pub(crate) fn new(target: &Target) -> Self {
        let (cpu, features) = identity(target);
        TuneLock { target: target.name().into(), cpu, features, scale: 1.0, costs: BTreeMap::new(), schedules: Tuned::new() }
    }

    /// Reads a lock file.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::Request(format!("cannot read {}: {e}", path.display())))?;
        Self::parse(&text).map_err(|why| Error::Request(format!("{}: {why}", path.display())))
    }

    /// Writes the file: complete or, on an error, not at all.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        crate::options::write_whole(path, self.to_string().as_bytes()).map_err(|source| pavage_runtime::Error::Io { path: path.into(), source }.into())
    }

    /// Reads what [`TuneLock`] prints. The error says what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut lines = text.lines();
        let head = lines.next().unwrap_or_default();
        if !head.starts_with("pavage tune.lock ") {
            return Err("this is no tune.lock".into());
        }
        if head != HEAD {
            return Err(format!("`{head}` was written by another version, this one needs `{HEAD}`: tune again"));
        }
        let damaged = || "the file is damaged: tune again".to_string();
        let body = text.trim_end().rsplit_once('\n').filter(|(body, end)| *end == end_line(&format!("{body}\n")));
        let body = body.ok_or_else(damaged)?.0;
        let mut lock =
            TuneLock { target: String::new(), cpu: String::new(), features: String::new(), scale: 1.0, costs: BTreeMap::new(), schedules: Tuned::new() };
        for line in body.lines().skip(1) {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "target" => lock.target = rest.into(),
                "cpu" => lock.cpu = rest.into(),
                "features" => lock.features = rest.into(),
                "scale" => lock.scale = rest.parse().map_err(|_| damaged())?,
                "cost" => {
                    let mut words = rest.splitn(3, ' ');
                    let region = words.next().and_then(|w| u64::from_str_radix(w, 16).ok()).ok_or_else(damaged)?;
                    let ns = words.next().and_then(|w| w.parse().ok()).filter(|ns: &f64| ns.is_finite() && *ns > 0.0).ok_or_else(damaged)?;
                    lock.costs.insert(region, (ns, words.next().unwrap_or_default().into()));
                }
                "schedule" => {
                    let (signature, schedule) = rest.split_once(' ').ok_or_else(damaged)?;
                    lock.schedules.insert(signature.into(), schedule.parse::<Schedule>().map_err(|_| damaged())?);
                }
                _ => return Err(damaged()),
            }
        }
        Ok(lock)
    }

    /// The target it was measured for.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// A hash of its contents, hex.
    pub fn hash(&self) -> String {
        content_hash(self.to_string().as_bytes())
    }

    /// Schedules by kernel.
    pub(crate) fn schedules(&self) -> &Tuned {
        &self.schedules
    }

    /// The measured times, if there are any.
    pub(crate) fn measured(&self) -> Option<Arc<Measured>> {
        let ns = self.costs.iter().map(|(region, (ns, _))| (*region, *ns)).collect();
        (!self.costs.is_empty()).then(|| Arc::new(Measured { ns, scale: self.scale }))
    }

    /// Takes over schedules, and measured times with what they say of predictions.
    pub(crate) fn set(&mut self, schedules: Tuned, costs: BTreeMap<u64, (f64, String)>, scale: f64) {
        // What is printed is what counts.
        let rounded = |ns: f64| format!("{ns:.1}").parse().unwrap_or(ns);
        self.scale = format!("{scale:.4}").parse().unwrap_or(scale);
        self.costs = costs.into_iter().map(|(region, (ns, name))| (region, (rounded(ns), name))).collect();
        self.schedules = schedules;
    }

    /// Drops the schedules of all other kernels.
    pub(crate) fn keep(&mut self, signatures: &BTreeSet<String>) {
        self.schedules.retain(|signature, _| signatures.contains(signature));
    }

    /// Whether it is of one of these targets, on this CPU if that is `native`.
    pub(crate) fn fits(&self, targets: &[Target]) -> Result<(), Error> {
        let Some(target) = targets.iter().find(|t| t.name() == self.target) else {
            let names: Vec<&str> = targets.iter().map(Target::name).collect();
            return Err(Error::Request(format!("tune.lock is of target {}, not of {}", self.target, names.join(", "))));
        };
        let (cpu, features) = identity(target);
        if (&cpu, &features) == (&self.cpu, &self.features) {
            return Ok(());
        }
        let what = if cpu == self.cpu { "of other features".to_string() } else { format!("named {}, and this is {cpu}", self.cpu) };
        Err(Error::Request(format!("tune.lock is of a CPU {what}: tune again here")))
    }
}

/// What a target's code depends on beyond its name.
fn identity(target: &Target) -> (String, String) {
    match target {
        Target::Cpu(cpu) if target.name() == "native" => {
            let mut has: Vec<&str> = cpu.llvm_features.split(',').filter(|f| f.starts_with('+')).collect();
            has.sort_unstable();
            (cpu.llvm_cpu.clone(), has.join(","))
        }
        _ => (String::new(), String::new()),
    }
}

fn end_line(body: &str) -> String {
    format!("end {}", content_hash(body.as_bytes()))
}

impl fmt::Display for TuneLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut body = format!("{HEAD}\ntarget {}\ncpu {}\nfeatures {}\nscale {:.4}\n", self.target, self.cpu, self.features, self.scale);
        for (region, (ns, name)) in &self.costs {
            body += &format!("cost {region:016x} {ns:.1} {name}\n");
        }
        for (signature, schedule) in &self.schedules {
            body += &format!("schedule {signature} {schedule}\n");
        }
        writeln!(f, "{body}{}", end_line(&body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> TuneLock {
        let mut lock = TuneLock::new(&Target::parse("x86-64-v3").unwrap());
        let schedules = [("0123456789abcdef-cv".to_string(), Schedule::new("gemm_cpu", &[("nv", 2), ("mc", 0)]))];
        lock.set(schedules.into(), [(7, (1234.5678, "conv_add".into()))].into(), 1.5);
        lock
    }

    #[test]
    fn a_lock_reads_back_as_it_prints() {
        let lock = sample();
        assert_eq!(TuneLock::parse(&lock.to_string()), Ok(lock.clone()));
        assert_eq!(lock.measured().unwrap().ns[&7], 1234.6);
    }

    #[test]
    fn damage_and_strangers_are_told_apart() {
        let text = sample().to_string();
        let why = |text: &str| TuneLock::parse(text).unwrap_err();
        assert!(why("hello").contains("no tune.lock"));
        assert!(why(&text.replace("lock 1 of", "lock 9 of")).contains("another version"));
        for damaged in [text.replace("nv=2", "nv=3"), text.replace("1234.6", "1"), text[..text.len() - 9].to_string(), text.lines().next().unwrap().to_string()]
        {
            assert!(why(&damaged).contains("damaged"), "{damaged}");
        }
    }

    #[test]
    fn another_target_is_refused() {
        let lock = sample();
        let parse = |name: &str| Target::parse(name).unwrap();
        assert!(lock.fits(&[parse("sm_80"), parse("x86-64-v3")]).is_ok());
        assert!(lock.fits(&[parse("sm_80")]).unwrap_err().to_string().contains("x86-64-v3, not of sm_80"));
        let native = TuneLock { target: "native".into(), cpu: "i386".into(), ..lock };
        assert!(native.fits(&[parse("native")]).unwrap_err().to_string().contains("i386"));
    }
}
