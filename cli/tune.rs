//! `pavage tune`: measure the kernels of a model here, and keep what is best in a lock file.
use super::bench;
use super::inputs;
use super::load::{ModelArgs, is_artifact};
use super::{Done, Failure, remark, say, say_json, text};
use pavage::tune::{Change, Tuning, tune};
use pavage::{CompileOptions, Source};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

/// `pavage tune`
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    inputs: inputs::Args,
    /// Where the lock file goes.
    #[arg(short, long, default_value = "tune.lock")]
    output: PathBuf,
    /// Measure for at least this long each time that the plan changed (seconds).
    #[arg(long, default_value_t = 5.0)]
    duration: f64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// `pavage tune`
pub(crate) fn main(args: &Args) -> Done {
    if is_artifact(&args.model.model)? {
        return Err(Failure::usage("an artifact is compiled already: give the model"));
    }
    let effort = Duration::try_from_secs_f64(args.duration).map_err(|e| Failure::usage(format!("--duration {}: {e}", args.duration)))?;
    // The sizes that the inputs at hand have are those that are tuned for.
    let (artifact, inputs) = bench::prepare(&args.model, &args.inputs)?;
    let options = CompileOptions { threads: args.model.threads, ..CompileOptions::from_flags(&artifact.manifest().flags)? };
    let run = args.model.session_options("fused");
    let tuned = tune(&Tuning { model: Source::Path(&args.model.model), options: &options, device: args.model.device, run: &run, inputs: &inputs, effort })?;
    tuned.lock.save(&args.output)?;
    let (before, after) = tuned.ns;
    if args.json {
        let change = |c: &Change| {
            json!({
                "kernel": c.kernel, "before": c.before.to_string(), "after": c.after.to_string(), "before_us": c.ns.0 / 1e3, "after_us": c.ns.1 / 1e3,
            })
        };
        say_json(&json!({
            "lock": args.output.display().to_string(), "target": tuned.lock.target(), "kernels": tuned.kernels, "rounds": tuned.rounds,
            "changes": tuned.changes.iter().map(change).collect::<Vec<_>>(), "before_ms": before / 1e6, "after_ms": after / 1e6, "notes": tuned.notes,
        }));
        return Ok(());
    }
    tuned.notes.iter().for_each(remark);
    let row = |c: &Change| vec![c.kernel.clone(), c.before.to_string(), c.after.to_string(), text::time(c.ns.0), text::time(c.ns.1)];
    if !tuned.changes.is_empty() {
        say(text::table(&["kernel", "schedule", "becomes", "before#", "after#"], tuned.changes.iter().map(row)));
    }
    let style = text::BOLD;
    say(format!(
        "{style}{}{style:#}: {} measured, the plan chosen {}; one run takes {}, took {}",
        args.output.display(),
        text::count(tuned.kernels, "kernel"),
        text::count(tuned.rounds, "time"),
        text::time(after),
        text::time(before),
    ));
    let shapes: Vec<String> = options.shapes.iter().map(|s| format!(" --shape {s}")).collect();
    say(format!("pavage compile {}{} --tune-lock {}", args.model.model.display(), shapes.concat(), args.output.display()));
    Ok(())
}
