//! `pavage compile`: a model to an artifact.
use super::inputs::Given;
use super::load::opt_level;
use super::progress::{Bar, Dumps};
use super::{Done, Failure, npy, remark, say, say_json, text};
use clap::ValueEnum;
use pavage::bisect::{Finding, Suspect, bisect};
use pavage::passes::precision::{
    Storage,
    quantise::{Method, Symmetry},
};
use pavage::precision::{LayerReport, MaxError, PrecisionOptions, PrecisionReport, Sample, Wanted};
use pavage::{Artifact, CompileOptions, Device, Emit, Expected, OptLevel, Options, ShapeArg, Source, TuneLock, Verify, compile};
use serde_json::json;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// `pavage compile`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The model: ONNX, or IR text (.ir).
    model: PathBuf,
    /// Where the artifact goes; the model's name with .pav by default. With --emit: where the text goes.
    #[arg(short, long)]
    output: Option<PathBuf>,
    /// native, x86-64-v3, x86-64-v4, sm_80, sm_90a. Repeat it for an artifact that runs on several.
    #[arg(long = "target", value_delimiter = ',', default_value = "native")]
    targets: Vec<String>,
    /// Fix a size (batch=1) or an input's shape (x=1x3x224x224). Others are left to run time.
    #[arg(long = "shape", value_name = "NAME=SIZE")]
    shapes: Vec<ShapeArg>,
    /// What a size that stays open is expected to be (past=511): plans are chosen for it, and right for every other; 64 where
    /// nothing is said.
    #[arg(long = "expect", value_name = "NAME=SIZE")]
    expected: Vec<Expected>,
    /// Plans to make.
    #[arg(long, value_delimiter = ',', default_value = "fused,unfused")]
    plans: Vec<String>,
    /// How much work the optimiser does.
    #[arg(short = 'O', default_value = "2", value_parser = opt_level)]
    opt_level: OptLevel,
    /// Print the graph after a pass, or after all.
    #[arg(long, value_name = "PASS|all", value_delimiter = ',')]
    dump_after: Vec<String>,
    /// Write these dumps to numbered files in a folder.
    #[arg(long, value_name = "FOLDER", requires = "dump_after")]
    dump_dir: Option<PathBuf>,
    /// Print a stage instead of writing an artifact.
    #[arg(long)]
    emit: Option<EmitArg>,
    #[command(flatten)]
    precision: PrecisionArgs,
    /// Check each fused kernel against the reference evaluator, on random data.
    #[arg(long)]
    verify: bool,
    /// Check each launch of each plan on these inputs too (keys NAME or in:NAME), on this machine's CPU.
    #[arg(long, value_name = "FILE.npz", requires = "verify", conflicts_with = "emit")]
    verify_inputs: Option<PathBuf>,
    /// Says what always holds: there is no fallback, work without a kernel is an error.
    #[arg(long)]
    deny_fallback: bool,
    /// Use what `pavage tune` measured: it needs no device.
    #[arg(long, value_name = "FILE")]
    tune_lock: Option<PathBuf>,
    /// Threads of the compiler; 0 for one a core. The artifact does not depend on it.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// `--precision` and what goes with it.
#[derive(clap::Args)]
#[group(skip)]
struct PrecisionArgs {
    /// f32 (as the model says), f16, bf16, w8, w4 (weights stored so), int8 (products of integers), auto (the best of each layer).
    /// Layers that would not gain stay as they are.
    #[arg(long, default_value = "f32")]
    precision: Wanted,
    /// How far outputs may move on the samples: one minus the cosine, or the share of rows whose largest element changes.
    #[arg(long, value_name = "cos=X|top1=P%")]
    max_error: Option<MaxError>,
    /// Samples to calibrate with: npz files with keys NAME or in:NAME.
    #[arg(long, value_name = "FOLDER")]
    calib: Option<PathBuf>,
    /// How ranges of activations are found.
    #[arg(long, default_value = "minmax", value_parser = method)]
    calib_method: Method,
    /// Weights that share a scale: 32, 64 or 128 of a channel; by default a channel of 8 bits, 32 of 4 bits.
    #[arg(long, value_parser = group)]
    group: Option<usize>,
    /// Give groups of weights zero points.
    #[arg(long)]
    asymmetric: bool,
}

fn method(name: &str) -> Result<Method, String> {
    let all = Method::ALL.map(Method::name).join(", ");
    Method::ALL.into_iter().find(|m| m.name() == name).ok_or_else(|| format!("`{name}`: a method is one of {all}"))
}

fn group(size: &str) -> Result<usize, String> {
    size.parse().ok().filter(|n| [32, 64, 128].contains(n)).ok_or_else(|| format!("`{size}`: a group is 32, 64 or 128"))
}

impl PrecisionArgs {
    fn read(&self) -> Result<PrecisionOptions, Failure> {
        if self.precision == Wanted::Model && (self.max_error.is_some() || self.calib.is_some()) {
            return Err(Failure::usage("--max-error and --calib say nothing without --precision"));
        }
        let samples = self.calib.as_ref().map_or(Ok(vec![]), |folder| samples(folder))?;
        let symmetry = if self.asymmetric { Symmetry::Asymmetric } else { Symmetry::Symmetric };
        let storage = Storage { group: self.group, symmetry };
        Ok(PrecisionOptions { wanted: self.precision, storage, method: self.calib_method, max_error: self.max_error, samples })
    }
}

/// The archives of a folder, by name.
fn samples(folder: &Path) -> Result<Vec<Sample>, Failure> {
    let unreadable = |e: std::io::Error| Failure::usage(format!("--calib {}: {e}", folder.display()));
    let entries = std::fs::read_dir(folder).map_err(unreadable)?.collect::<Result<Vec<_>, _>>().map_err(unreadable)?;
    let mut paths: Vec<PathBuf> = entries.into_iter().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "npz")).collect();
    paths.sort();
    if paths.is_empty() {
        return Err(Failure::usage(format!("--calib {}: no npz files there; each is to hold the model's inputs under keys NAME or in:NAME", folder.display())));
    }
    let read = |path: &PathBuf| {
        let arrays = npy::read_npz(path)?.into_iter().filter(|(k, _)| !k.starts_with("out:"));
        let inputs = arrays.map(|(k, v)| (k.strip_prefix("in:").map_or(k.clone(), str::to_string), v)).collect();
        Ok(Sample { name: path.display().to_string(), inputs })
    };
    paths.iter().map(read).collect()
}

/// What became of each layer.
fn print(report: &PrecisionReport) {
    if report.layers.is_empty() {
        return;
    }
    let line = |l: &LayerReport| {
        let error = l.error.map_or_else(|| "-".into(), |e| format!("{e:.1e}"));
        let gain = if l.gain_ns > 0.0 { format!("{} of {}", text::time(l.gain_ns), text::time(l.predicted_ns)) } else { "-".into() };
        format!("{:<4} {:<5} {gain:<22} {error:<8} {}{}{}", l.device, l.precision.name(), l.layer, if l.why.is_empty() { "" } else { ": " }, l.why)
    };
    report.notes.iter().for_each(remark);
    say(format!("{:<4} {:<5} {:<22} {:<8} layer", "on", "in", "predicted to save", "error"));
    report.layers.iter().for_each(|l| say(line(l)));
    report.moved.iter().for_each(|(device, moved)| say(format!("outputs for {device} on the samples, against f32: {moved}")));
}

/// The report as JSON.
fn to_json(report: &PrecisionReport) -> serde_json::Value {
    let layer = |l: &LayerReport| {
        json!({
            "device": l.device, "layer": l.layer, "precision": l.precision.name(), "predicted_ns": l.predicted_ns.round(),
            "gain_ns": l.gain_ns.round(), "error": l.error, "why": l.why,
        })
    };
    let moved = report.moved.iter().map(|(device, m)| json!({"device": device, "cos": m.cos, "top1": m.top1}));
    json!({"layers": report.layers.iter().map(layer).collect::<Vec<_>>(), "outputs": moved.collect::<Vec<_>>(), "notes": report.notes})
}

/// `--emit`
#[derive(Clone, Copy, ValueEnum)]
enum EmitArg {
    /// The graph, as IR text.
    Ir,
    /// MLIR of each kernel.
    Mlir,
    /// LLVM IR of each kernel.
    Llvm,
    /// Assembly of the CPU code.
    Asm,
    /// PTX of the GPU code.
    Ptx,
}

impl From<EmitArg> for Emit {
    fn from(arg: EmitArg) -> Self {
        match arg {
            EmitArg::Ir => Emit::Ir,
            EmitArg::Mlir => Emit::Mlir,
            EmitArg::Llvm => Emit::Llvm,
            EmitArg::Asm => Emit::Asm,
            EmitArg::Ptx => Emit::Ptx,
        }
    }
}

/// `pavage compile`
pub(crate) fn main(args: &Args) -> Done {
    let precision = args.precision.read()?;
    let dumps = args.dump_dir.clone().map_or(Dumps::Stderr, Dumps::Folder);
    let bar = Bar::new(dumps);
    let start = Instant::now();
    let compiled = compile(
        Source::Path(&args.model),
        &CompileOptions {
            targets: args.targets.clone(),
            shapes: args.shapes.clone(),
            expected: args.expected.clone(),
            plans: args.plans.clone(),
            opt_level: args.opt_level,
            dump_after: args.dump_after.clone(),
            emit: args.emit.map(Emit::from),
            precision,
            verify: if args.verify { Verify::Replay } else { Verify::Skip },
            tune: args.tune_lock.as_deref().map(TuneLock::read).transpose()?,
            threads: args.threads,
            progress: Some(&bar),
        },
    );
    if let Some(problem) = bar.finish() {
        return Err(Failure::usage(problem));
    }
    let compiled = compiled?;
    let took = start.elapsed();
    if args.emit.is_some() {
        let Some(path) = &args.output else {
            say(&compiled.emitted);
            return Ok(());
        };
        return std::fs::write(path, &compiled.emitted).map_err(|e| Failure::usage(format!("{}: {e}", path.display())));
    }
    let output = args.output.clone().unwrap_or_else(|| args.model.with_extension("pav"));
    compiled.save(&output)?;
    let artifact = compiled.open()?;
    let plans: Vec<_> = artifact.manifest().plans.iter().collect();
    if let Some(inputs) = &args.verify_inputs {
        verify_on(&args.model, &artifact, &Given::archive(inputs)?)?;
    }
    // Targets differ in kernels rarely; a plan that is the same for all is said once.
    let counts: BTreeSet<String> = plans.iter().map(|p| format!("{} ({})", p.name, text::count(p.kernels.len(), "kernel"))).collect();
    if args.json {
        let plan =
            |p: &&pavage::runtime::plan::Plan| json!({"name": p.name, "target": p.target, "kernels": p.kernels.len(), "predicted_ms": p.predicted_ns / 1e6});
        let planning = compiled.planning.iter().map(|p| json!({"plan": p.plan, "target": p.target, "seconds": p.took.as_secs_f64()}));
        say_json(&json!({
            "artifact": output.display().to_string(), "bytes": compiled.artifact.len(), "seconds": took.as_secs_f64(),
            "plans": plans.iter().map(plan).collect::<Vec<_>>(), "planning": planning.collect::<Vec<_>>(), "notes": compiled.notes, "verified": args.verify,
            "precision": to_json(&compiled.precision),
        }));
        return Ok(());
    }
    compiled.notes.iter().for_each(remark);
    print(&compiled.precision);
    let style = text::BOLD;
    say(format!(
        "{style}{}{style:#}: {}, {} for {}, in {}",
        output.display(),
        text::bytes(compiled.artifact.len() as f64),
        counts.into_iter().collect::<Vec<_>>().join(", "),
        args.targets.join(", "),
        text::time(took.as_nanos() as f64),
    ));
    Ok(())
}

/// Every launch of each plan that this machine's CPU runs, on the user's inputs, against the reference evaluator.
fn verify_on(model: &Path, artifact: &Artifact, given: &Given) -> Done {
    let inputs = given.resolve(artifact)?;
    let names: BTreeSet<&str> = artifact.manifest().plans.iter().map(|p| p.name.as_str()).collect();
    for name in names {
        let options = Options { plan: name.into(), ..Options::default() };
        let suspect = Suspect { model: Source::Path(model), artifact, device: Device::Cpu, options: &options, inputs: &inputs, accepts: &|_| true };
        if let Finding::Kernel(culprit) = bisect(&suspect)? {
            let nodes = culprit.sources.join(", ");
            return Err(Failure::verification(format!("plan `{name}`, kernel `{}` (from {nodes}): {}", culprit.kernel, culprit.difference)));
        }
    }
    Ok(())
}
