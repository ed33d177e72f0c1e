//! Cases as text: `optimize/*.ir` show what becomes of a graph, `run/*.ir` and they too are compiled and run.
//!
//! A new case is a new file. `INSTA_UPDATE=always` rewrites the snapshots, `BLESS=1` the stages in ARCHITECTURE.md.
mod architecture;
mod optimize;
mod ranges;
mod run;

use pavage::ir::{Graph, text};
use std::path::{Path, PathBuf};

/// The repository.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The graphs of a folder, by name.
fn cases(folder: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join("tests/cases").join(folder)).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "ir")).collect();
    files.sort();
    files
}

fn read(path: &Path) -> (String, Graph) {
    let source = std::fs::read_to_string(path).unwrap();
    let graph = text::parse(&source, &|_| None).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    pavage::ir::verify(&graph).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(text::print(&text::parse(&text::print_full(&graph), &|_| None).unwrap()), text::print(&graph), "{} prints and parses", path.display());
    (source, graph)
}
