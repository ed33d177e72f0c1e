//! `pavage compare`: a compiled model against the reference evaluator or expected outputs, and the kernel to blame.
use super::difference::{self, Difference};
use super::inputs::{self, Given};
use super::load::{ModelArgs, is_artifact};
use super::{Done, Failure, npy, remark, say, say_json, text};
use pavage::bisect::{self, Culprit, Finding, Suspect, Twin};
use pavage::runtime::Outputs;
use pavage::{Artifact, CompileOptions, Source, Tensor};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// `pavage compare`
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    inputs: inputs::Args,
    /// What is right: `evaluator`, or an archive with inputs under in:NAME and outputs under out:NAME.
    #[arg(long = "ref", value_name = "evaluator|FILE.npz")]
    reference: String,
    /// An artifact that was compiled from the model, to be compared instead of one compiled now.
    #[arg(long, value_name = "FILE.pav", conflicts_with_all = ["shapes", "dynamic"])]
    artifact: Option<PathBuf>,
    /// Which plan: fused or unfused.
    #[arg(long, default_value = "fused")]
    plan: String,
    /// Beyond tolerance: find the first kernel to blame, and prove it by swapping it.
    #[arg(long)]
    bisect: bool,
    /// Where the culprit's ops go as a model of their own; a case for it goes next to it (.npz).
    #[arg(long, value_name = "FILE.ir", default_value = "culprit.ir")]
    reproducer: PathBuf,
    /// Absolute tolerance.
    #[arg(long, default_value_t = 1e-4)]
    atol: f64,
    /// Relative tolerance.
    #[arg(long, default_value_t = 1e-3)]
    rtol: f64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Args {
    /// The artifact to compare.
    fn open(&self, given: &Given) -> Result<Artifact, Failure> {
        match &self.artifact {
            Some(path) => Ok(Artifact::open(path)?),
            None => self.model.open(given.shapes()),
        }
    }

    /// What is expected of each output, by name.
    fn expected(&self, given: Given, artifact: &Artifact, inputs: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>, Failure> {
        if self.reference != "evaluator" {
            return Ok(given.expected.into_iter().collect());
        }
        let shapes = CompileOptions::from_flags(&artifact.manifest().flags)?.shapes;
        Ok(bisect::reference(Source::Path(&self.model.model), &shapes, inputs)?)
    }
}

/// `pavage compare`
pub(crate) fn main(args: &Args) -> Done {
    let is_model = !is_artifact(&args.model.model)?;
    if !is_model && (args.reference == "evaluator" || args.bisect) {
        return Err(Failure::usage("the reference evaluator runs models: give the model, and the artifact with --artifact"));
    }
    let given = if args.reference == "evaluator" { Given::read(&args.inputs)? } else { Given::case(Path::new(&args.reference))? };
    let artifact = args.open(&given)?;
    let inputs = if given.is_empty() { inputs::random(&artifact, 1)? } else { given.resolve(&artifact)? };
    let expected = args.expected(given, &artifact, &inputs)?;
    let differences = |outputs: &Outputs| -> Vec<Difference> {
        expected.iter().map(|(name, want)| Difference::of(name, outputs.get(name), want, args.atol, args.rtol)).collect()
    };

    let options = args.model.session_options(&args.plan);
    let feeds: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut session = artifact.session(args.model.device, options.clone())?;
    let outputs = session.run(&feeds)?;
    let target = session.plan().target.clone();
    drop(session);
    let found = differences(&outputs);
    let ok = found.iter().all(Difference::ok);
    let mut finding = None;
    if args.bisect && !ok {
        let accepts = |outputs: &Outputs| differences(outputs).iter().all(Difference::ok);
        let suspect = Suspect {
            model: Source::Path(&args.model.model),
            artifact: &artifact,
            device: args.model.device,
            options: &options,
            inputs: &inputs,
            accepts: &accepts,
        };
        finding = Some(bisect::bisect(&suspect)?);
    }
    let written = match &finding {
        Some(Finding::Kernel(culprit)) => write_reproducer(culprit, &args.reproducer)?,
        _ => None,
    };
    if args.json {
        say_json(&json!({
            "ok": ok, "reference": args.reference, "device": args.model.device.to_string(), "plan": args.plan, "target": target,
            "compared": found.iter().map(Difference::to_json).collect::<Vec<_>>(),
            "bisect": finding.as_ref().map(|f| finding_json(f, written.as_ref())),
        }));
    } else {
        say(difference::table(&found));
        finding.iter().for_each(|f| tell(f, written.as_ref()));
        remark(format!("{} plan for {target} on {} against {}", args.plan, args.model.device, args.reference));
    }
    if ok {
        return Ok(());
    }
    let bad = found.iter().filter(|d| !d.ok()).count();
    Err(Failure::verification(format!("{bad} of {} beyond atol {:e}, rtol {:e}", text::count(found.len(), "output"), args.atol, args.rtol)))
}

/// Files of a reproducer: the graph and its case.
struct Written {
    graph: PathBuf,
    case: PathBuf,
}

fn write_reproducer(culprit: &Culprit, path: &Path) -> Result<Option<Written>, Failure> {
    let Some(r) = &culprit.reproducer else { return Ok(None) };
    std::fs::write(path, &r.graph).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
    let case = path.with_extension("npz");
    let named = |prefix: &'static str, list: &[(String, Tensor)]| -> Vec<(String, Tensor)> {
        list.iter().map(|(name, t)| (format!("{prefix}:{name}"), t.clone())).collect()
    };
    let arrays = [named("in", &r.inputs), named("out", &r.outputs)].concat();
    npy::write_npz(&case, arrays.iter().map(|(n, t)| (n.as_str(), t)))?;
    Ok(Some(Written { graph: path.into(), case }))
}

fn proof(culprit: &Culprit) -> String {
    let twin = match culprit.twin {
        Twin::Unfused => "the same ops unfused",
        Twin::Evaluator => "the evaluator's results",
    };
    let others = if culprit.others.is_empty() { "something else is wrong too".into() } else { format!("others are off too: {}", culprit.others.join(", ")) };
    let outcome = if culprit.healed { "the outputs are right".to_string() } else { format!("the outputs are still off; {others}") };
    format!("with {twin} in its place {outcome}")
}

fn tell(finding: &Finding, written: Option<&Written>) {
    let culprit = match finding {
        Finding::Plan => return say("every kernel computes what its region says: the plan itself differs from the model"),
        Finding::Rounding => return say("every kernel is within its tolerance: many small differences add up"),
        Finding::Kernel(culprit) => culprit,
    };
    let style = text::BOLD;
    say(format!("first kernel that is off: {style}{}{style:#}, launch {} of the plan", culprit.kernel, culprit.place));
    say(format!("  it does {} from {}", culprit.members.join(" "), culprit.sources.join(", ")));
    say(format!("  {}", culprit.difference));
    say(format!("  {}", proof(culprit)));
    if let (Some(files), Some(r)) = (written, &culprit.reproducer) {
        say(format!("  reproducer: pavage compare {} --ref {}", files.graph.display(), files.case.display()));
        say(match &r.anew {
            Some(why) => format!("  compiled anew it is off too: {why}"),
            None => "  compiled anew it is right: the artifact is damaged, or another version made it".into(),
        });
    }
}

fn finding_json(finding: &Finding, written: Option<&Written>) -> Value {
    let culprit = match finding {
        Finding::Plan => return json!({"found": "plan"}),
        Finding::Rounding => return json!({"found": "rounding"}),
        Finding::Kernel(culprit) => culprit,
    };
    json!({
        "found": "kernel", "kernel": culprit.kernel, "launch": culprit.place, "does": culprit.members, "nodes": culprit.sources,
        "rules": culprit.rules, "difference": culprit.difference, "healed": culprit.healed, "others": culprit.others,
        "twin": match culprit.twin { Twin::Unfused => "unfused", Twin::Evaluator => "evaluator" },
        "reproducer": written.map(|w| w.graph.display().to_string()), "case": written.map(|w| w.case.display().to_string()),
        "anew": culprit.reproducer.as_ref().map(|r| r.anew.clone().unwrap_or_else(|| "right".into())),
    })
}
