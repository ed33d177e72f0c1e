//! Which crate may depend on which, and where each outside library has its home.
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A crate's folder and the crates of ours that it may know.
const ARROWS: [(&str, &[&str]); 6] = [
    ("ir", &[]),
    ("runtime", &[]),
    ("frontend", &["pavage-ir"]),
    ("passes", &["pavage-ir"]),
    ("codegen", &["pavage-ir", "pavage-runtime"]),
    (".", &["pavage-codegen", "pavage-frontend", "pavage-ir", "pavage-passes", "pavage-runtime"]),
];

/// A library as sources name it, and the paths that may.
const HOMES: [(&str, &[&str]); 9] = [
    ("petgraph", &["ir/src/graph.rs"]),
    ("egg", &["passes/src/eqsat", "passes/src/rules"]),
    ("good_lp", &["passes/src/eqsat/ilp.rs"]),
    ("melior", &["codegen/src/mlir.rs", "codegen/src/mlir/"]),
    ("mlir_sys", &["codegen/src/mlir.rs", "codegen/src/mlir/"]),
    ("inkwell", &["codegen/src/llvm.rs", "codegen/src/llvm/"]),
    ("llvm_sys", &["codegen/src/llvm.rs", "codegen/src/llvm/", "codegen/src/mlir.rs"]),
    ("cudarc", &["runtime/src/cuda"]),
    ("onnx_protobuf", &["frontend/src/onnx", "frontend/tests"]),
];

/// Crates that must not be in a deployed program, by prefix.
const NOT_IN_RUNTIME: [&str; 9] = ["llvm-sys", "inkwell", "melior", "mlir-sys", "egg", "petgraph", "onnx-protobuf", "pavage-ir", "pavage-codegen"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Names of our crates in a manifest's dependency tables, those of tests included.
fn our_dependencies(manifest: &str) -> BTreeSet<String> {
    let mut table = "";
    let mut found = BTreeSet::new();
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            table = line;
        } else if table.ends_with("dependencies]")
            && !table.contains("workspace")
            && let Some(name) = line.split(['.', '=', ' ']).next()
            && name.starts_with("pavage-")
        {
            found.insert(name.to_string());
        }
    }
    found
}

fn rust_files(folder: &Path, into: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for path in entries.flatten().map(|e| e.path()) {
        if path.is_dir() {
            rust_files(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// Whether a line of code names the library: as the first segment of a path.
fn names(line: &str, library: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    code.match_indices(library).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = &code[at + library.len()..];
        let starts = before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != '"' && c != ':') || code[..at].ends_with(" ::");
        starts && (after.starts_with("::") || (code.trim_start().starts_with("use ") && after.starts_with(';')))
    })
}

#[test]
fn crates_know_only_whom_they_may() {
    let mut strays = Vec::new();
    for (folder, allowed) in ARROWS {
        let manifest = std::fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
        for name in our_dependencies(&manifest) {
            if !allowed.contains(&name.as_str()) {
                strays.push(format!("{folder} depends on {name}"));
            }
        }
    }
    assert!(strays.is_empty(), "{}", strays.join("\n"));
}

#[test]
fn outside_libraries_stay_in_their_homes() {
    let mut files = Vec::new();
    for folder in ["ir", "frontend", "passes", "codegen", "runtime", "cli"] {
        rust_files(&root().join(folder), &mut files);
    }
    files.extend([root().join("lib.rs"), root().join("main.rs"), root().join("compile.rs")]);
    files.sort();
    let mut strays = Vec::new();
    for file in files {
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        let place = file.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
        for (library, homes) in HOMES {
            if homes.iter().any(|home| place.starts_with(home)) {
                continue;
            }
            for (i, line) in text.lines().enumerate().filter(|(_, line)| names(line, library)) {
                strays.push(format!("{place}:{}: {library} lives in {}: {line}", i + 1, homes[0]));
            }
        }
    }
    assert!(strays.is_empty(), "{}", strays.join("\n"));
}

#[test]
fn the_runtime_reaches_no_compiler() {
    let tree = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "-p", "pavage-runtime", "-e", "normal,build"])
        .args(["--all-features", "--prefix", "none", "--format", "{p}"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let tree = String::from_utf8(tree.stdout).unwrap();
    assert!(tree.starts_with("pavage-runtime "), "unexpected: {tree}");
    let strays: BTreeSet<&str> = tree.lines().filter_map(|line| line.split(' ').next()).filter(|name| NOT_IN_RUNTIME.contains(name)).collect();
    assert!(strays.is_empty(), "the runtime depends on {strays:?}");
}

#[test]
fn files_stay_readable() {
    let mut files = Vec::new();
    for folder in ["ir", "frontend", "passes", "codegen", "runtime", "cli", "tests"] {
        rust_files(&root().join(folder), &mut files);
    }
    let long: Vec<String> = files
        .iter()
        .filter_map(|f| Some((f, std::fs::read_to_string(f).ok()?.lines().count())))
        .filter(|(_, lines)| *lines > 900)
        .map(|(f, lines)| format!("{}: {lines} lines", f.display()))
        .collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}
