//! Every dependency may be used under a licence that `deny.toml` allows.
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

/// What `deny.toml` says: the licences allowed to all, and `(crate, licence)` exceptions.
struct Policy {
    allow: BTreeSet<String>,
    exceptions: BTreeSet<(String, String)>,
}

/// The quoted strings in a piece of TOML.
fn quoted(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split('"').skip(1).step_by(2).map(str::to_string)
}

fn policy(toml: &str) -> Policy {
    let list = toml.split("allow = [").nth(1).and_then(|t| t.split(']').next()).unwrap_or_default();
    let mut exceptions = BTreeSet::new();
    for table in toml.split("[[licenses.").skip(1) {
        let table = table.split("\n[").next().unwrap_or_default();
        let field = |name: &str| {
            let line = table.lines().find(|l| l.starts_with(name))?;
            quoted(line).next()
        };
        if let (Some(name), Some(licence)) = (field("name"), field("allow").or(field("expression"))) {
            exceptions.insert((name, licence));
        }
    }
    Policy { allow: quoted(list).collect(), exceptions }
}

impl Policy {
    /// Whether an SPDX expression is satisfied: `OR` (or `/`) needs one side, `AND` both.
    fn allows(&self, krate: &str, expression: &str) -> bool {
        let expression = expression.replace('/', " OR ");
        // Every expression in use is a conjunction of (possibly parenthesised) alternatives, or
        // alternatives alone.
        let parts: Vec<&str> = expression.split(" AND ").collect();
        parts.iter().all(|part| {
            part.trim_matches(['(', ')', ' ']).split(" OR ").any(|licence| {
                let licence = licence.trim_matches(['(', ')', ' ']);
                self.allow.contains(licence) || self.exceptions.contains(&(krate.into(), licence.into()))
            })
        })
    }
}

fn metadata() -> Value {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn every_dependency_has_an_allowed_licence() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let policy = policy(&std::fs::read_to_string(root.join("deny.toml")).unwrap());
    assert!(policy.allow.contains("MIT") && !policy.allow.contains("MPL-2.0"));
    let third_party = std::fs::read_to_string(root.join("THIRD-PARTY.md")).unwrap();
    let metadata = metadata();
    let used: BTreeSet<&str> = metadata["resolve"]["nodes"].as_array().unwrap().iter().filter_map(|node| node["id"].as_str()).collect();
    assert!(used.len() > 50, "cargo metadata lists {} packages", used.len());
    let mut problems = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        if package["source"].is_null() || !used.contains(package["id"].as_str().unwrap()) {
            continue;
        }
        let licence = package["license"].as_str();
        let clarified = || policy.exceptions.iter().any(|(k, l)| k == name && policy.allow.contains(l));
        if !licence.map_or_else(clarified, |l| policy.allows(name, l)) {
            problems.push(format!("{name}: {}", licence.unwrap_or("no licence named")));
        }
        let copyleft = licence.is_some_and(|l| l.contains("MPL") && !l.contains(" OR "));
        if copyleft && !third_party.contains(&format!("**{name}**")) {
            problems.push(format!("{name} is under {} and THIRD-PARTY.md is silent", licence.unwrap()));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
