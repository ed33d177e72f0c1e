//! The `pavage` binary: `cli/` has one file a verb.
mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
