//! `pavage doctor`: what is installed, and what this machine can run.
use super::{Done, cache, say, say_json, text};
use pavage::Device;
use pavage::runtime::{KNOWN_FEATURES, has_feature, host_level};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `pavage doctor`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A thing to look for.
struct Finding {
    what: &'static str,
    /// Where or which; none when it is missing.
    found: Option<String>,
    /// What lacks without it.
    without: &'static str,
}

/// `pavage doctor`
pub(crate) fn main(args: &Args) -> Done {
    let gpus = Device::gpus();
    let features: Vec<&str> = KNOWN_FEATURES.iter().copied().filter(|f| has_feature(f) == Some(true)).collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let folder = cache::folder();
    let kept = folder.as_deref().map_or((0, 0), size_of);
    let findings = [
        tool("ld.lld", "PAVAGE_LLD", &["/usr/lib/llvm-22/bin/ld.lld", "ld.lld-22", "ld.lld"], "nothing can be compiled for CPUs"),
        tool("ptxas", "PAVAGE_PTXAS", &["ptxas", "/usr/local/cuda/bin/ptxas"], "PTX is left to the driver; tests of it do not run"),
        Finding { what: "CUDA driver", found: (!gpus.is_empty()).then(|| text::count(gpus.len(), "GPU")), without: "the cuda device is not to be had" },
    ];
    if args.json {
        let finding = |f: &Finding| (f.what.to_string(), json!(f.found));
        say_json(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cpu": {"name": cache::cpu_name(), "level": host_level(), "features": features, "threads": cores},
            "gpus": gpus, "tools": findings.iter().map(finding).collect::<serde_json::Map<_, _>>(),
            "cache": {"folder": folder, "artifacts": kept.0, "bytes": kept.1},
        }));
        return Ok(());
    }
    let line = |what: &str, value: &str| say(format!("{what:<12} {value}"));
    line("pavage", env!("CARGO_PKG_VERSION"));
    line("CPU", &format!("{}, {}, {}", cache::cpu_name(), host_level(), text::count(cores, "thread")));
    line("", &features.join(" "));
    for gpu in &gpus {
        line("GPU", gpu);
    }
    for f in &findings {
        match &f.found {
            Some(found) => line(f.what, found),
            None => line(f.what, &format!("not found: {}", f.without)),
        }
    }
    let cached = folder.map_or("no home folder: nothing is cached".into(), |f| {
        format!("{} ({}, {})", f.display(), text::count(kept.0, "artifact"), text::bytes(kept.1 as f64))
    });
    line("cache", &cached);
    Ok(())
}

/// Looks for a program: where the variable says, else in these places or on the path.
fn tool(what: &'static str, variable: &str, places: &[&str], without: &'static str) -> Finding {
    let named = std::env::var_os(variable).map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = |name: &&str| {
        let mut all = std::env::split_paths(&path).map(|p| p.join(name));
        if name.starts_with('/') { Some(PathBuf::from(name)).filter(|p| p.is_file()) } else { all.find(|p| p.is_file()) }
    };
    let found = named.filter(|p| p.is_file()).or_else(|| places.iter().find_map(on_path));
    Finding { what, found: found.map(|p| format!("{} ({})", p.display(), version(&p))), without }
}

/// The line in which a program says its version.
fn version(program: &Path) -> String {
    let out = Command::new(program).arg("--version").output();
    let text = out.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let said = |l: &&str| l.contains("release") || l.contains("LLD") || l.contains("version");
    text.lines().find(said).unwrap_or("does not say its version").trim().to_string()
}

/// Files in a folder, and their bytes.
fn size_of(folder: &Path) -> (usize, u64) {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|e| e.metadata().ok()).filter(|m| m.is_file()).fold((0, 0), |(n, b), m| (n + 1, b + m.len()))
}
