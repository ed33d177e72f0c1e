//! The command line: one file a verb. This file has what they share: the verbs' table, how results
//! are printed, and what an exit code means.
mod bench;
mod cache;
mod check;
mod compare;
mod compile;
mod demo;
mod difference;
mod doctor;
mod explain;
mod inputs;
mod inspect;
mod load;
mod npy;
mod opt;
mod progress;
mod residual;
mod run;
mod text;
mod tune;

use clap::{Parser, Subcommand};
use std::io::Write;
use std::process::ExitCode;

/// Compiles ML models ahead of time and runs them.
///
/// Exit codes: 0 success, 1 usage or input, 2 the model or artifact, 3 results out of tolerance,
/// 4 the device.
#[derive(Parser)]
#[command(name = "pavage", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Compile a model to an artifact.
    Compile(compile::Args),
    /// Run a model or an artifact.
    Run(run::Args),
    /// Time a model or an artifact.
    Bench(bench::Args),
    /// Measure the kernels of a model on this device and keep what is best in a lock file.
    Tune(tune::Args),
    /// Compare a compiled model with the reference evaluator or with expected outputs.
    Compare(compare::Args),
    /// Show what an artifact or a model holds.
    Inspect(inspect::Args),
    /// Say why each kernel of an artifact is what it is, or why two nodes are not one kernel.
    Explain(explain::Args),
    /// List everything a model needs that Pavage lacks.
    Check(check::Args),
    /// Run named passes on IR text.
    Opt(opt::Args),
    /// Compile a small digit classifier, run it, and show what fusion bought.
    Demo(demo::Args),
    /// Show what is installed and what this machine can run.
    Doctor(doctor::Args),
}

/// Why a verb stopped: the message for people and the exit code for programs.
pub(crate) struct Failure {
    code: i32,
    message: String,
}

impl Failure {
    /// The request makes no sense: exit code 1.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Failure { code: 1, message: message.into() }
    }

    /// The model is at fault: exit code 2.
    pub(crate) fn model(message: impl Into<String>) -> Self {
        Failure { code: 2, message: message.into() }
    }

    /// Results are out of tolerance: exit code 3.
    pub(crate) fn verification(message: impl Into<String>) -> Self {
        Failure { code: 3, message: message.into() }
    }
}

impl From<pavage::Error> for Failure {
    fn from(e: pavage::Error) -> Self {
        Failure { code: e.exit_code(), message: e.to_string() }
    }
}

impl From<pavage::runtime::Error> for Failure {
    fn from(e: pavage::runtime::Error) -> Self {
        Failure { code: e.exit_code(), message: e.to_string() }
    }
}

impl From<pavage::frontend::Error> for Failure {
    fn from(e: pavage::frontend::Error) -> Self {
        pavage::Error::from(e).into()
    }
}

/// What a verb gives back.
pub(crate) type Done = Result<(), Failure>;

/// Writes to standard output. A reader that went away (`pavage ... | head`) ends the program.
pub(crate) fn say(text: impl AsRef<str>) {
    let mut out = anstream::stdout().lock();
    let text = text.as_ref();
    let newline = if text.ends_with('\n') { "" } else { "\n" };
    if write!(out, "{text}{newline}").and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// Writes a remark to standard error.
pub(crate) fn remark(text: impl AsRef<str>) {
    let style = text::DIM;
    writeln!(anstream::stderr(), "{style}{}{style:#}", text.as_ref()).ok();
}

/// Writes JSON to standard output.
pub(crate) fn say_json(value: &serde_json::Value) {
    say(serde_json::to_string_pretty(value).unwrap_or_default());
}

/// The program.
pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            e.print().ok();
            return ExitCode::from(u8::from(e.use_stderr()));
        }
    };
    let done = match cli.verb {
        Verb::Compile(args) => compile::main(&args),
        Verb::Run(args) => run::main(&args),
        Verb::Bench(args) => bench::main(&args),
        Verb::Tune(args) => tune::main(&args),
        Verb::Compare(args) => compare::main(&args),
        Verb::Inspect(args) => inspect::main(&args),
        Verb::Explain(args) => explain::main(&args),
        Verb::Check(args) => check::main(&args),
        Verb::Opt(args) => opt::main(&args),
        Verb::Demo(args) => demo::main(&args),
        Verb::Doctor(args) => doctor::main(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { code, message }) => {
            let style = text::ERROR;
            writeln!(anstream::stderr(), "{style}error:{style:#} {message}").ok();
            ExitCode::from(code as u8)
        }
    }
}
