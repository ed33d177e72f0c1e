//! `pavage run`: a model or an artifact, once.
use super::difference::{self, Difference};
use super::inputs::{self, Given};
use super::load::ModelArgs;
use super::{Done, Failure, npy, remark, say, say_json, text};
use pavage::Tensor;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;

/// `pavage run`
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    inputs: inputs::Args,
    /// Absolute tolerance of the comparison.
    #[arg(long, default_value_t = 1e-4)]
    atol: f64,
    /// Relative tolerance of the comparison.
    #[arg(long, default_value_t = 1e-3)]
    rtol: f64,
    /// Which plan: fused or unfused.
    #[arg(long, default_value = "fused")]
    plan: String,
    /// Write the outputs to an archive.
    #[arg(long, value_name = "FILE.npz")]
    save: Option<PathBuf>,
    /// Random inputs.
    #[arg(long, conflicts_with_all = ["inputs", "case", "single"])]
    random: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// `pavage run`
pub(crate) fn main(args: &Args) -> Done {
    let given = Given::read(&args.inputs)?;
    let artifact = args.model.open(given.shapes())?;
    let inputs = if args.random { inputs::random(&artifact, 1)? } else { given.resolve(&artifact)? };
    let mut session = artifact.session(args.model.device, args.model.session_options(&args.plan))?;
    let feeds: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let start = Instant::now();
    let outputs = session.run(&feeds)?;
    let took = start.elapsed();
    for line in session.take_log() {
        remark(line);
    }
    if let Some(path) = &args.save {
        npy::write_npz(path, outputs.iter())?;
    }
    let differences: Vec<Difference> = given.expected.iter().map(|(name, want)| Difference::of(name, outputs.get(name), want, args.atol, args.rtol)).collect();
    let ok = differences.iter().all(Difference::ok);

    if args.json {
        let describe = |(name, t): (&str, &Tensor)| json!({"name": name, "dtype": t.dtype().name(), "shape": t.shape()});
        say_json(&json!({
            "device": args.model.device.to_string(), "plan": args.plan, "target": session.plan().target,
            "ms": took.as_secs_f64() * 1e3, "notes": session.notes(),
            "outputs": outputs.iter().map(describe).collect::<Vec<_>>(),
            "compared": differences.iter().map(Difference::to_json).collect::<Vec<_>>(), "ok": ok,
        }));
    } else {
        session.notes().iter().for_each(remark);
        if differences.is_empty() {
            let rows = outputs.iter().map(|(name, t)| vec![name.into(), t.dtype().to_string(), text::shape(t.shape()), summary(t)]);
            say(text::table(&["output", "type", "shape", ""], rows));
        } else {
            say(difference::table(&differences));
        }
        remark(format!("{} plan on {}, first run {}", args.plan, args.model.device, text::time(took.as_nanos() as f64)));
    }
    if ok {
        return Ok(());
    }
    let bad = differences.iter().filter(|d| !d.ok()).count();
    Err(Failure::verification(format!("{bad} of {} beyond atol {:e}, rtol {:e}", text::count(differences.len(), "output"), args.atol, args.rtol)))
}

/// A few elements, and the range of all.
fn summary(tensor: &Tensor) -> String {
    let (mut low, mut high, mut head, mut n) = (f64::INFINITY, f64::NEG_INFINITY, Vec::new(), 0);
    for x in npy::numbers(tensor) {
        if n < 4 {
            head.push(format!("{}", (x * 1e5).round() / 1e5));
        }
        (low, high, n) = (low.min(x), high.max(x), n + 1);
    }
    match n {
        0 => "empty".into(),
        1..=4 => head.join(", "),
        _ => format!("{}, ... in {low:.4}..{high:.4}", head.join(", ")),
    }
}
