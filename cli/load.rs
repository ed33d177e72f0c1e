//! A model or an artifact from the command line, ready to run.
use super::progress::{Bar, Dumps};
use super::{Failure, cache, remark};
use clap::Args;
use pavage::{Artifact, CompileOptions, Device, OptLevel, Options, ShapeArg, Source, compile, runtime};
use std::path::{Path, PathBuf};

/// What `run` and `bench` share: the model and how to compile it if it is not compiled yet.
#[derive(Args, Clone)]
pub(crate) struct ModelArgs {
    /// A model (.onnx, .ir) or an artifact (.pav). A model is compiled for the device and kept in
    /// the cache folder.
    pub(crate) model: PathBuf,
    /// Where to run: cpu, cuda:N or null.
    #[arg(long, default_value = "cpu")]
    pub(crate) device: Device,
    /// CPU threads; 0 for one a core.
    #[arg(long, default_value_t = 0)]
    pub(crate) threads: usize,
    /// Code for this target (x86-64-v3, sm_80); otherwise the best that the device runs.
    #[arg(long)]
    pub(crate) target: Option<String>,
    /// Fix a size (batch=1) or an input's shape (x=1x3x224x224) when compiling.
    #[arg(long = "shape", value_name = "NAME=SIZE")]
    pub(crate) shapes: Vec<ShapeArg>,
    /// Leave all sizes to run time, instead of compiling for those of the inputs.
    #[arg(long)]
    pub(crate) dynamic: bool,
    /// How much work the optimiser does.
    #[arg(short = 'O', default_value = "2", value_parser = opt_level)]
    pub(crate) opt_level: OptLevel,
    /// Says what always holds: there is no fallback, work without a kernel is an error.
    #[arg(long)]
    pub(crate) deny_fallback: bool,
    /// Compile even when the cache has it.
    #[arg(long)]
    pub(crate) no_cache: bool,
}

/// `-O` as it is typed.
pub(crate) fn opt_level(s: &str) -> Result<OptLevel, String> {
    match s {
        "0" => Ok(OptLevel::O0),
        "1" => Ok(OptLevel::O1),
        "2" => Ok(OptLevel::O2),
        "3" => Ok(OptLevel::O3),
        _ => Err("levels are 0, 1, 2 and 3".into()),
    }
}

/// Whether a file is an artifact: by its first bytes, or because it is called so.
pub(crate) fn is_artifact(path: &Path) -> Result<bool, Failure> {
    use std::io::Read;
    let fail = |e: std::io::Error| Failure::usage(format!("cannot read {}: {e}", path.display()));
    let mut file = std::fs::File::open(path).map_err(fail)?;
    if file.metadata().map_err(fail)?.is_dir() {
        return Err(Failure::usage(format!("{} is a folder", path.display())));
    }
    let mut head = Vec::new();
    file.by_ref().take(6).read_to_end(&mut head).map_err(fail)?;
    Ok(head == b"PAVAGE" || path.extension().is_some_and(|e| e == "pav"))
}

impl ModelArgs {
    /// Opens the artifact, compiling the model first if it is one. `shapes` are those of the
    /// inputs at hand.
    pub(crate) fn open(&self, shapes: Vec<ShapeArg>) -> Result<Artifact, Failure> {
        if is_artifact(&self.model)? {
            if let Some(shape) = self.shapes.first() {
                return Err(Failure::usage(format!("--shape {shape}: {} is compiled already; give the model itself", self.model.display())));
            }
            return Ok(Artifact::open(&self.model)?);
        }
        let mut all = self.shapes.clone();
        // IR text says its sizes itself.
        if !self.dynamic && self.model.extension().is_none_or(|e| e != "ir") {
            let given = |name: &str| self.shapes.iter().any(|s| matches!(s, ShapeArg::Input { name: n, .. } if n == name));
            all.extend(shapes.into_iter().filter(|s| match s {
                ShapeArg::Input { name, .. } | ShapeArg::Size { name, .. } => !given(name),
            }));
        }
        match self.compile_for(all.clone()) {
            // A branch that is not taken may not type-check at the sizes at hand.
            Err(e) if e.code == 2 && all.len() > self.shapes.len() => {
                remark(format!("sizes stay open: at the inputs' own, {}", e.message));
                self.compile_for(self.shapes.clone())
            }
            done => done,
        }
    }

    fn compile_for(&self, all: Vec<ShapeArg>) -> Result<Artifact, Failure> {
        let options = CompileOptions {
            targets: vec![self.compile_target()?],
            shapes: all,
            opt_level: self.opt_level,
            threads: self.threads,
            ..CompileOptions::default()
        };
        let place = if self.no_cache { None } else { cache::place(&self.model, &options.flags()) };
        if let Some(place) = &place
            && let Ok(artifact) = Artifact::open(place)
        {
            return Ok(artifact);
        }
        let bar = Bar::new(Dumps::Stderr);
        let compiled = compile(Source::Path(&self.model), &CompileOptions { progress: Some(&bar), ..options });
        bar.finish();
        let compiled = compiled?;
        compiled.notes.iter().for_each(remark);
        if let Some(place) = place {
            let kept = place.parent().map_or(Ok(()), std::fs::create_dir_all);
            match kept.map_err(|e| e.to_string()).and_then(|()| compiled.save(&place).map_err(|e| e.to_string())) {
                Ok(()) => return Ok(Artifact::open(&place)?),
                Err(e) => remark(format!("not kept in the cache: {e}")),
            }
        }
        Ok(compiled.open()?)
    }

    /// The target to compile for.
    fn compile_target(&self) -> Result<String, Failure> {
        if let Some(target) = &self.target {
            return Ok(target.clone());
        }
        match self.device {
            Device::Cuda(n) => gpu_target(n),
            _ => Ok("native".into()),
        }
    }

    /// How to make a session for this plan.
    pub(crate) fn session_options(&self, plan: &str) -> Options {
        Options { plan: plan.into(), threads: self.threads, target: self.target.clone().filter(|t| t != "native"), ..Options::default() }
    }
}

/// The target that suits a GPU: the newest that it runs.
pub(crate) fn gpu_target(ordinal: u32) -> Result<String, Failure> {
    let gpus = Device::gpus();
    let Some(gpu) = gpus.get(ordinal as usize) else {
        let have = if gpus.is_empty() { "no GPU here".into() } else { gpus.join("; ") };
        return Err(runtime::Error::NoGpu(format!("cuda:{ordinal} asked for, found {have}")).into());
    };
    // As `Device::gpus` words it: `NVIDIA H200, sm_90, 139 GiB`.
    let arch = gpu.split(", ").find(|part| part.starts_with("sm_")).unwrap_or("sm_80");
    Ok(if arch == "sm_90" { "sm_90a".into() } else { "sm_80".into() })
}
