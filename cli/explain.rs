//! `pavage explain`: why a plan is what it is.
use super::load::is_artifact;
use super::{Done, Failure, say, say_json, text};
use pavage::Artifact;
use pavage::runtime::plan::{Explanation, Kernel, Plan};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// `pavage explain`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// An artifact (.pav).
    artifact: PathBuf,
    /// The plan.
    #[arg(long, default_value = "fused")]
    plan: String,
    /// The target, where the artifact holds several; the first otherwise.
    #[arg(long)]
    target: Option<String>,
    /// One kernel: its name, its name in code, or its number. Otherwise all, dearest first.
    #[arg(long, value_name = "K")]
    kernel: Option<String>,
    /// Two nodes of the model: why they are not one kernel.
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with = "kernel")]
    why_not: Vec<String>,
    /// Another artifact: what differs in the same plan of that one.
    #[arg(long, value_name = "OTHER", conflicts_with_all = ["kernel", "why_not"])]
    diff: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A kernel and why it is so.
struct Explained {
    number: usize,
    kernel: Kernel,
    why: Explanation,
    /// How often a run of the plan launches it, bodies of loops counted once.
    launches: usize,
}

/// The kernels of the plan that was asked for.
fn read(path: &Path, args: &Args) -> Result<Vec<Explained>, Failure> {
    if !is_artifact(path)? {
        return Err(Failure::usage(format!("{} is no artifact; `pavage compile` makes one", path.display())));
    }
    let artifact = Artifact::open(path)?;
    let all = artifact.explanations()?;
    let wanted = |p: &&(usize, &Plan)| p.1.name == args.plan && args.target.as_ref().is_none_or(|t| p.1.target == *t);
    let plans: Vec<(usize, &Plan)> = artifact.manifest().plans.iter().enumerate().collect();
    let Some((at, plan)) = plans.iter().find(wanted) else {
        let have: Vec<String> = plans.iter().map(|(_, p)| format!("{} for {}", p.name, p.target)).collect();
        return Err(Failure::usage(format!("{} has no such plan; it has {}", path.display(), have.join(", "))));
    };
    let Some(why) = all.get(*at).filter(|why| why.len() == plan.kernels.len()) else {
        return Err(Failure::model(format!("{} does not say why; compile the model again", path.display())));
    };
    let launched = plan.body.launched();
    let explained = |(number, (kernel, why)): (usize, (&Kernel, &Explanation))| Explained {
        number,
        kernel: kernel.clone(),
        why: why.clone(),
        launches: launched.iter().filter(|k| k.index() == number).count(),
    };
    Ok(plan.kernels.iter().zip(why).enumerate().map(explained).collect())
}

impl Explained {
    fn is(&self, name: &str) -> bool {
        self.kernel.name == name || self.kernel.symbol == name || self.number.to_string() == name
    }

    fn does(&self, node: &str) -> bool {
        self.kernel.provenance.sources.iter().any(|s| s == node)
    }

    /// Predicted nanoseconds of all its launches.
    fn total_ns(&self) -> f64 {
        self.launches as f64 * self.why.total_ns
    }

    fn to_json(&self) -> Value {
        let p = &self.kernel.provenance;
        json!({ "number": self.number, "kernel": self.kernel.name, "symbol": self.kernel.symbol, "launches": self.launches, "nodes": p.sources, "does": p.members, "rules": p.rules, "why": self.why })
    }

    /// Everything there is to say.
    fn lines(&self) -> String {
        let (p, why, style) = (&self.kernel.provenance, &self.why, text::BOLD);
        let mut out = format!("{style}{} {}{style:#} ({})\n", self.number, self.kernel.name, self.kernel.symbol);
        let mut line = |head: &str, what: String| out += &format!("  {head:<10} {what}\n");
        if self.launches != 1 {
            line("launches", self.launches.to_string());
        }
        line("nodes", p.sources.join(", "));
        line("does", p.members.join(" "));
        line("rules", if p.rules.is_empty() { "none".into() } else { p.rules.join(", ") });
        why.passes.iter().for_each(|c| line("pass", c.clone()));
        why.chain.iter().for_each(|c| line("chain", c.clone()));
        let [total, launch, arithmetic, memory] = [why.total_ns, why.launch_ns, why.arithmetic_ns, why.memory_ns].map(text::time);
        line("predicted", format!("{total}: launch {launch}, arithmetic {arithmetic}, memory {memory} (the two overlap)"));
        match &why.runner_up {
            Some((what, ns)) => line("runner-up", format!("{what}, {} dearer", text::time(*ns))),
            None => line("runner-up", "none: there is no other way to this result".into()),
        }
        why.apart.iter().for_each(|(producer, reason)| line("apart", format!("from {producer}: {reason}")));
        out
    }
}

/// Why two nodes are not one kernel; or which they share.
fn why_not(kernels: &[Explained], a: &str, b: &str) -> Result<Vec<String>, Failure> {
    let of = |node: &str| -> Result<Vec<&Explained>, Failure> {
        let found: Vec<&Explained> = kernels.iter().filter(|k| k.does(node)).collect();
        if found.is_empty() {
            return Err(Failure::usage(format!("no kernel does the work of `{node}`: it is no node of the model, or it was folded away")));
        }
        Ok(found)
    };
    let (with_a, with_b) = (of(a)?, of(b)?);
    if let Some(both) = with_a.iter().find(|k| k.does(b)) {
        return Ok(vec![format!("{a} and {b} are one kernel: {} {}", both.number, both.kernel.name)]);
    }
    let mut found = vec![];
    for (from, to) in with_a.iter().flat_map(|x| with_b.iter().map(move |y| (x, y))).flat_map(|(x, y)| [(x, y), (y, x)]) {
        for (_, reason) in to.why.apart.iter().filter(|(producer, _)| *producer == from.kernel.name) {
            found.push(format!("{} {} reads {} {}: {reason}", to.number, to.kernel.name, from.number, from.kernel.name));
        }
    }
    if found.is_empty() {
        let names = |of: &[&Explained]| of.iter().map(|k| format!("{} {}", k.number, k.kernel.name)).collect::<Vec<_>>().join(", ");
        found.push(format!(
            "{a} is in {}, {b} in {}: neither reads a result of the other at first hand, so one kernel would save nothing",
            names(&with_a),
            names(&with_b)
        ));
    }
    found.dedup();
    Ok(found)
}

/// Launches by what they do: how many, and their predicted time.
fn census(kernels: &[Explained]) -> BTreeMap<String, (i64, f64)> {
    let mut all: BTreeMap<String, (i64, f64)> = BTreeMap::new();
    for k in kernels {
        let entry = all.entry(k.kernel.provenance.members.join(" ")).or_default();
        *entry = (entry.0 + k.launches as i64, entry.1 + k.total_ns());
    }
    all
}

fn diff(args: &Args, ours: &[Explained], other: &Path) -> Done {
    let theirs = read(other, args)?;
    let (a, b) = (census(ours), census(&theirs));
    let sum = |of: &[Explained]| of.iter().map(Explained::total_ns).sum::<f64>();
    let launches = |of: &[Explained]| of.iter().map(|k| k.launches).sum::<usize>();
    let mut rows: Vec<(String, i64, i64, f64)> = vec![];
    for does in a.keys().chain(b.keys().filter(|k| !a.contains_key(*k))) {
        let (x, y) = (a.get(does).copied().unwrap_or_default(), b.get(does).copied().unwrap_or_default());
        if x.0 != y.0 {
            rows.push((does.clone(), x.0, y.0, y.1 - x.1));
        }
    }
    if args.json {
        let rows = rows.iter().map(|(does, x, y, ns)| json!({"does": does, "here": x, "there": y, "ns": ns}));
        say_json(&json!({"launches": [launches(ours), launches(&theirs)], "predicted_ns": [sum(ours), sum(&theirs)], "differ": rows.collect::<Vec<_>>()}));
        return Ok(());
    }
    say(format!(
        "{} launches, predicted {}; in {}: {}, {}",
        launches(ours),
        text::time(sum(ours)),
        other.display(),
        launches(&theirs),
        text::time(sum(&theirs))
    ));
    let row = |(does, x, y, ns): (String, i64, i64, f64)| {
        vec![does, x.to_string(), y.to_string(), format!("{}{}", if ns < 0.0 { "-" } else { "+" }, text::time(ns.abs()))]
    };
    if rows.is_empty() {
        say("the same kernels");
    } else {
        say(text::table(&["does", "here#", "there#", "predicted#"], rows.into_iter().map(row)));
    }
    Ok(())
}

/// Most kernels that a message lists.
const MOST: usize = 12;

/// What to say when no kernel has this name: those whose names or nodes contain it, else some of all.
fn no_kernel(kernels: &[Explained], name: &str) -> String {
    let near = |k: &&Explained| k.kernel.name.contains(name) || k.kernel.provenance.sources.iter().any(|s| s.contains(name));
    let mut like: Vec<&Explained> = kernels.iter().filter(near).collect();
    if like.is_empty() {
        like = kernels.iter().collect();
    }
    let some: Vec<String> = like.iter().take(MOST).map(|k| format!("{} {}", k.number, k.kernel.name)).collect();
    let rest = if like.len() > MOST { format!(" and {} more", like.len() - MOST) } else { String::new() };
    format!("no kernel is called `{name}`; there are {}{rest}", some.join(", "))
}

/// `pavage explain`
pub(crate) fn main(args: &Args) -> Done {
    let mut kernels = read(&args.artifact, args)?;
    if let Some(other) = &args.diff {
        return diff(args, &kernels, other);
    }
    if let [a, b] = args.why_not.as_slice() {
        let reasons = why_not(&kernels, a, b)?;
        if args.json {
            say_json(&json!({"a": a, "b": b, "reasons": reasons}));
        } else {
            reasons.iter().for_each(say);
        }
        return Ok(());
    }
    if let Some(name) = &args.kernel {
        if !kernels.iter().any(|k| k.is(name)) {
            return Err(Failure::usage(no_kernel(&kernels, name)));
        }
        kernels.retain(|k| k.is(name));
    }
    if args.json {
        say_json(&json!(kernels.iter().map(Explained::to_json).collect::<Vec<_>>()));
        return Ok(());
    }
    if args.kernel.is_none() {
        kernels.sort_by(|a, b| b.total_ns().total_cmp(&a.total_ns()).then(a.number.cmp(&b.number)));
        let (launches, ns) = kernels.iter().fold((0, 0.0), |(n, ns), k| (n + k.launches, ns + k.total_ns()));
        let flags = Artifact::open(&args.artifact)?.manifest().flags.clone();
        let expected: Vec<&str> = flags.iter().filter_map(|f| f.strip_prefix("--expect=")).collect();
        let at = if expected.is_empty() { String::new() } else { format!(" at {}", expected.join(", ")) };
        say(format!("{}, {launches} launches, predicted {}{at}\n", text::count(kernels.len(), "kernel"), text::time(ns)));
    }
    say(kernels.iter().map(Explained::lines).collect::<Vec<_>>().join("\n"));
    Ok(())
}
