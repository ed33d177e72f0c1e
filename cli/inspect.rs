//! `pavage inspect`: what an artifact or a model holds.
use super::load::is_artifact;
use super::{Done, check, say, say_json, text};
use pavage::Artifact;
use pavage::runtime::SegmentKind;
use pavage::runtime::plan::{Manifest, Plan};
use serde_json::json;
use std::path::PathBuf;

/// `pavage inspect`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// An artifact (.pav) or a model.
    file: PathBuf,
    /// List the kernels of each plan, of the plans of this name, or of those for this target.
    #[arg(long, value_name = "PLAN|TARGET", num_args = 0..=1, default_missing_value = "")]
    kernels: Option<String>,
    /// Check every checksum.
    #[arg(long)]
    verify: bool,
    /// Print JSON: the whole manifest.
    #[arg(long)]
    json: bool,
}

/// `pavage inspect`
pub(crate) fn main(args: &Args) -> Done {
    if !is_artifact(&args.file)? {
        return check::describe(&args.file, args.json);
    }
    let artifact = Artifact::open(&args.file)?;
    if args.verify {
        artifact.verify()?;
    }
    let manifest = artifact.manifest();
    if args.json {
        let segment = |s: &pavage::runtime::Segment| json!({"kind": format!("{:?}", s.kind).to_lowercase(), "offset": s.offset, "bytes": s.len});
        say_json(&json!({
            "file": args.file.display().to_string(), "bytes": artifact.len(), "manifest": manifest,
            "segments": artifact.segments().iter().map(segment).collect::<Vec<_>>(),
        }));
        return Ok(());
    }
    let bytes_of = |kind: SegmentKind| -> u64 { artifact.segments().iter().filter(|s| s.kind == kind).map(|s| s.len).sum() };
    let style = text::BOLD;
    say(format!(
        "{style}{}{style:#}: {} (weights {}, code {}, manifest {})",
        args.file.display(),
        text::bytes(artifact.len() as f64),
        text::bytes(bytes_of(SegmentKind::Weights) as f64),
        text::bytes(bytes_of(SegmentKind::Code) as f64),
        text::bytes(bytes_of(SegmentKind::Manifest) as f64),
    ));
    let from = if manifest.input_hash.is_empty() { "no file" } else { &manifest.input_hash };
    say(format!("made by {} from {from}, flags: {}", manifest.producer, manifest.flags.join(" ")));
    if args.verify {
        say("all checksums match");
    }
    ports(manifest);
    let rows = manifest.plans.iter().map(|p| plan_row(&artifact, p));
    let head = ["plan", "target", "kernels#", "launches#", "code#", "predicted#"];
    say(text::table(&head, rows));
    if let Some(which) = &args.kernels {
        for plan in &manifest.plans {
            if which.is_empty() || *which == plan.name || *which == plan.target {
                kernels(manifest, plan);
            }
        }
    }
    Ok(())
}

fn ports(manifest: &Manifest) {
    for (what, ports) in [("input ", &manifest.inputs), ("output", &manifest.outputs)] {
        for port in ports {
            say(format!("{what} {}", text::port(port, &manifest.symbols)));
        }
    }
    for symbol in &manifest.symbols {
        let most = if symbol.max == i64::MAX { "any".into() } else { symbol.max.to_string() };
        say(format!("size   {}: {} to {most}", symbol.name, symbol.min));
    }
    for guard in &manifest.guards {
        say(format!("guard  {}", guard.message));
    }
}

fn plan_row(artifact: &Artifact, plan: &Plan) -> Vec<String> {
    let manifest = artifact.manifest();
    let code = [Some(plan.code), plan.cubin].into_iter().flatten();
    let code: u64 = code.filter_map(|c| artifact.segments().get(manifest.codes.get(c as usize)?.segment as usize)).map(|s| s.len).sum();
    vec![
        plan.name.clone(),
        plan.target.clone(),
        plan.kernels.len().to_string(),
        plan.body.launched().len().to_string(),
        text::bytes(code as f64),
        if plan.predicted_ns > 0.0 { text::time(plan.predicted_ns) } else { "-".into() },
    ]
}

fn kernels(manifest: &Manifest, plan: &Plan) {
    let names: Vec<&str> = manifest.symbols.iter().map(|s| s.name.as_str()).collect();
    let size = |d: &pavage::runtime::DimExpr| match d.as_const() {
        Some(n) => text::bytes(n as f64),
        None => d.with_names(&names).to_string(),
    };
    let rows = plan.kernels.iter().map(|k| {
        let p = &k.provenance;
        vec![k.name.clone(), p.members.join(" "), p.sources.join(" "), size(&p.bytes_read), size(&p.bytes_written), p.rules.join(" ")]
    });
    say(format!("{} for {}:", plan.name, plan.target));
    say(text::table(&["kernel", "does", "nodes", "reads#", "writes#", "rules"], rows));
}
