//! What to compile and how.
use crate::{
    Artifact, Error, TuneLock,
    precision::{PrecisionOptions, PrecisionReport},
};
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

/// Where a model comes from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A file: ONNX, or IR text when it is called `*.ir`. External weights are read from its folder.
    Path(&'a Path),
    /// An ONNX file in memory.
    Onnx(&'a [u8]),
    /// A graph in IR text.
    Ir(&'a str),
}

/// How much work the optimiser does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum OptLevel {
    /// Only what every plan needs.
    O0,
    /// Folding and plain passes.
    O1,
    /// Rules and fusion.
    #[default]
    O2,
    /// The same with larger search limits.
    O3,
}

/// A stage to print instead of an artifact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emit {
    /// The graph after the passes, as IR text.
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

/// Whether to check each kernel against the reference evaluator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Do not.
    #[default]
    Skip,
    /// Replay each fused kernel on random data; a disagreement is an error.
    Replay,
}

/// A size that is fixed at compile time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShapeArg {
    /// A named size: `batch=1`.
    Size {
        /// The size's name in the model.
        name: String,
        /// Its value.
        value: i64,
    },
    /// The shape of an input: `x=1x3x224x224`, or `x=[5]`.
    Input {
        /// The input's name.
        name: String,
        /// Its extents.
        dims: Vec<i64>,
    },
}

impl FromStr for ShapeArg {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let help = || format!("`{s}`: a shape is NAME=2x3x224 or NAME=[2,3,224], a size NAME=8");
        let (name, value) = s.rsplit_once('=').or_else(|| s.rsplit_once(':')).ok_or_else(help)?;
        let number = |text: &str| match text.trim().parse::<i64>() {
            Ok(n) if n >= 0 => Ok(n),
            _ => Err(help()),
        };
        let name = name.to_string();
        if let Some(inner) = value.strip_prefix('[').and_then(|v| v.strip_suffix(']')) {
            let parts = inner.split([',', 'x']).filter(|p| !p.trim().is_empty());
            return Ok(ShapeArg::Input { name, dims: parts.map(number).collect::<Result<_, _>>()? });
        }
        if value.contains('x') {
            let dims = value.split('x').map(number).collect::<Result<_, _>>()?;
            return Ok(ShapeArg::Input { name, dims });
        }
        Ok(ShapeArg::Size { name, value: number(value)? })
    }
}

impl fmt::Display for ShapeArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ShapeArg::Size { name, value } => write!(f, "{name}={value}"),
            ShapeArg::Input { name, dims } => {
                let dims: Vec<String> = dims.iter().map(|d| d.to_string()).collect();
                write!(f, "{name}=[{}]", dims.join(","))
            }
        }
    }
}

/// A size that is left to run time, and what it is expected to be: what plans are chosen for. They are right for every other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// The size's name, as `pavage inspect` prints it.
    pub name: String,
    /// Its value, at least 1.
    pub value: i64,
}

impl FromStr for Expected {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let found = s.rsplit_once('=').and_then(|(name, value)| Some((name, value.trim().parse::<i64>().ok()?)));
        match found {
            Some((name, value)) if !name.is_empty() && value > 0 => Ok(Expected { name: name.into(), value }),
            _ => Err(format!("`{s}`: an expected size is NAME=512")),
        }
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.value)
    }
}

/// Hears what a compilation is doing.
pub trait Progress: Sync {
    /// A stage has done `done` of `total` steps; `total` is 0 when it is not known.
    fn stage(&self, stage: &str, done: usize, total: usize);

    /// The graph after a pass that [`CompileOptions::dump_after`] names, as IR text.
    fn dump(&self, pass: &str, text: &str);
}

/// How to compile.
#[derive(Clone)]
pub struct CompileOptions<'a> {
    /// `native`, `x86-64-v3`, `x86-64-v4`, `sm_80`, `sm_90a`: code for each goes into the artifact.
    pub targets: Vec<String>,
    /// Sizes that are fixed; all others are left to run time.
    pub shapes: Vec<ShapeArg>,
    /// What sizes that stay open are expected to be; others are taken as 64 where a plan is chosen.
    pub expected: Vec<Expected>,
    /// `fused`, `unfused`.
    pub plans: Vec<String>,
    /// How much work the optimiser does.
    pub opt_level: OptLevel,
    /// Passes whose result [`Progress::dump`] gets; `all` for each.
    pub dump_after: Vec<String>,
    /// A stage to print instead of an artifact.
    pub emit: Option<Emit>,
    /// In what precision layers are stored and computed.
    pub precision: PrecisionOptions,
    /// Whether to check the kernels.
    pub verify: Verify,
    /// What `pavage tune` measured for one of the targets.
    pub tune: Option<TuneLock>,
    /// Threads of the compiler; 0 for one a core. The result does not depend on it.
    pub threads: usize,
    /// Who hears of it.
    pub progress: Option<&'a dyn Progress>,
}

impl Default for CompileOptions<'_> {
    fn default() -> Self {
        CompileOptions {
            targets: vec!["native".into()],
            shapes: Vec::new(),
            expected: Vec::new(),
            plans: vec!["fused".into(), "unfused".into()],
            opt_level: OptLevel::default(),
            dump_after: Vec::new(),
            emit: None,
            precision: PrecisionOptions::default(),
            verify: Verify::default(),
            tune: None,
            threads: 0,
            progress: None,
        }
    }
}

impl CompileOptions<'_> {
    /// The flags that decide what the artifact holds, as one would type them. They are kept in it.
    pub fn flags(&self) -> Vec<String> {
        let mut flags: Vec<String> = self.targets.iter().map(|t| format!("--target={t}")).collect();
        flags.extend(self.shapes.iter().map(|s| format!("--shape={s}")));
        flags.extend(self.expected.iter().map(|e| format!("--expect={e}")));
        flags.push(format!("--plans={}", self.plans.join(",")));
        flags.push(format!("-{:?}", self.opt_level));
        flags.extend(self.precision.flags());
        flags.extend(self.tune.iter().map(|lock| format!("--tune-lock={}", lock.hash())));
        flags
    }
}

impl CompileOptions<'_> {
    /// What an artifact was compiled with, from the flags that it keeps: the inverse of [`CompileOptions::flags`]. What
    /// those do not name has its default.
    pub fn from_flags(flags: &[String]) -> Result<Self, Error> {
        let mut options = CompileOptions { targets: Vec::new(), ..CompileOptions::default() };
        for flag in flags {
            let unknown = || Error::Request(format!("the artifact was compiled with `{flag}`, which this version does not know"));
            if let Some(target) = flag.strip_prefix("--target=") {
                options.targets.push(target.into());
            } else if let Some(shape) = flag.strip_prefix("--shape=") {
                options.shapes.push(shape.parse().map_err(Error::Request)?);
            } else if let Some(expected) = flag.strip_prefix("--expect=") {
                options.expected.push(expected.parse().map_err(Error::Request)?);
            } else if let Some(plans) = flag.strip_prefix("--plans=") {
                options.plans = plans.split(',').map(str::to_string).collect();
            } else if flag.starts_with("--tune-lock=") {
                return Err(Error::Request("the artifact was compiled with a tune.lock, whose contents it does not hold".into()));
            } else if !options.precision.take(flag).map_err(Error::Request)? {
                options.opt_level = match flag.as_str() {
                    "-O0" => OptLevel::O0,
                    "-O1" => OptLevel::O1,
                    "-O2" => OptLevel::O2,
                    "-O3" => OptLevel::O3,
                    _ => return Err(unknown()),
                };
            }
        }
        Ok(options)
    }
}

/// A compiled model.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The artifact, as its file's bytes; empty when a stage was to be printed instead.
    pub artifact: Vec<u8>,
    /// The text of the stage that [`CompileOptions::emit`] names.
    pub emitted: String,
    /// What a user should know: sizes assumed, work without a kernel, limits hit.
    pub notes: Vec<String>,
    /// What `--precision` did to each layer.
    pub precision: PrecisionReport,
    /// What finding each plan took; targets of one kind share theirs.
    pub planning: Vec<Planning>,
}

/// The time that the search for a plan's kernels took.
#[derive(Clone, Debug)]
pub struct Planning {
    /// The plan's name.
    pub plan: String,
    /// The first target that it is for.
    pub target: String,
    /// How long it took. Nothing in the artifact depends on it.
    pub took: Duration,
}

impl Compiled {
    /// Opens the artifact where it is, in memory.
    pub fn open(&self) -> Result<Artifact, Error> {
        Ok(Artifact::from_bytes(&self.artifact)?)
    }

    /// Writes the artifact: complete or, on an error, not at all.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        write_whole(path, &self.artifact).map_err(|source| pavage_runtime::Error::Io { path: path.into(), source }.into())
    }
}

/// Writes a file under another name, then renames it.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(name);
    let done = std::fs::write(&part, bytes).and_then(|()| std::fs::rename(&part, path));
    if done.is_err() {
        std::fs::remove_file(&part).ok();
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_back_from_flags() {
        let options = CompileOptions {
            targets: vec!["x86-64-v3".into(), "sm_80".into()],
            shapes: vec!["x=[1,3,8]".parse().unwrap(), "batch=4".parse().unwrap()],
            expected: vec!["past=511".parse().unwrap()],
            plans: vec!["fused".into()],
            opt_level: OptLevel::O1,
            ..CompileOptions::default()
        };
        let back = CompileOptions::from_flags(&options.flags()).unwrap();
        assert_eq!(back.flags(), options.flags());
        assert!(CompileOptions::from_flags(&["--nonesuch".into()]).is_err());
    }

    #[test]
    fn shapes_are_read_as_they_are_printed() {
        let input = |name: &str, dims: &[i64]| ShapeArg::Input { name: name.into(), dims: dims.into() };
        assert_eq!("x=1x3x8".parse(), Ok(input("x", &[1, 3, 8])));
        assert_eq!("x:1x3".parse(), Ok(input("x", &[1, 3])));
        assert_eq!("in:0=[5]".parse(), Ok(input("in:0", &[5])));
        assert_eq!("sr=[]".parse(), Ok(input("sr", &[])));
        assert_eq!("batch=4".parse(), Ok(ShapeArg::Size { name: "batch".into(), value: 4 }));
        for bad in ["", "x", "x=", "x=1xx2", "x=-1", "x=[1,b]", "x=99999999999999999999"] {
            assert!(bad.parse::<ShapeArg>().is_err(), "{bad}");
        }
        for bad in ["", "past", "past=", "=4", "past=0", "past=-1", "past=2x3"] {
            assert!(bad.parse::<Expected>().is_err(), "{bad}");
        }
        for good in ["x=[1,3,8]", "batch=4", "sr=[]"] {
            assert_eq!(good.parse::<ShapeArg>().unwrap().to_string(), good);
        }
    }
}
