//! `pavage opt`: named passes on IR text.
use super::{Done, Failure, say, say_json, text};
use pavage::ir;
use pavage::passes::{self, Ctx, PASSES, PIPELINE};
use serde_json::json;
use std::io::Read;
use std::path::PathBuf;

/// `pavage opt`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// IR text, or a model (.onnx); standard input when missing or `-`.
    file: Option<PathBuf>,
    /// Passes in the order to run; all, in the order of a compilation, when missing.
    #[arg(long, value_delimiter = ',')]
    passes: Option<Vec<String>>,
    /// Print every constant whole, so that the text can be read again.
    #[arg(long)]
    full: bool,
    /// List the passes.
    #[arg(long)]
    list: bool,
    /// Print the graph after a pass, or after all, to standard error.
    #[arg(long, value_name = "PASS|all", value_delimiter = ',')]
    dump_after: Vec<String>,
    /// Print JSON (of --list).
    #[arg(long, requires = "list")]
    json: bool,
}

/// `pavage opt`
pub(crate) fn main(args: &Args) -> Done {
    if args.list {
        if args.json {
            let pass = |p: &passes::Pass| json!({"name": p.name, "about": p.about});
            say_json(&json!({"passes": PASSES.iter().map(pass).collect::<Vec<_>>(), "pipeline": PIPELINE}));
        } else {
            say(text::table(&["pass", ""], PASSES.iter().map(|p| vec![p.name.into(), p.about.into()])));
            say(format!("a compilation runs {}", PIPELINE.join(", ")));
        }
        return Ok(());
    }
    let mut graph = match args.file.as_deref() {
        Some(path) if path.as_os_str() != "-" => super::check::import(path, &[])?.graph,
        _ => {
            let mut source = String::new();
            std::io::stdin().read_to_string(&mut source).map_err(|e| Failure::usage(format!("standard input: {e}")))?;
            pavage::import(pavage::Source::Ir(&source), &[])?.graph
        }
    };
    let ctx = Ctx { dump_after: args.dump_after.clone(), ..Ctx::default() };
    let names: Vec<&str> = match &args.passes {
        Some(names) => names.iter().map(String::as_str).filter(|n| !n.is_empty()).collect(),
        None => PIPELINE.to_vec(),
    };
    let done = passes::run(&mut graph, &ctx, &names);
    for (pass, dump) in ctx.dumps.borrow().iter() {
        eprintln!("// after {pass}\n{dump}");
    }
    done.map_err(|e| Failure::from(pavage::Error::from(e)))?;
    say(if args.full { ir::text::print_full(&graph) } else { ir::text::print(&graph) });
    Ok(())
}
