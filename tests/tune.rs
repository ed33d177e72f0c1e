//! `pavage tune` and what is compiled with its lock file.
mod support;

use pavage::passes::{
    Ctx, PIPELINE, build,
    eqsat::{self, cost},
};
use pavage_codegen::{choices::choices, targets::Target};
use std::path::Path;
use support::{folder, pavage, root};

const DIGITS: &str = "examples/models/digits.onnx";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_lock_decides_and_the_same_lock_gives_the_same_bytes() {
    let dir = folder("tune");
    let lock = dir.join("tune.lock");
    let report = pavage(["tune", DIGITS, "--shape", "n=4", "--duration", "0.2", "-o", text(&lock), "--json"]).exits(0).json();
    assert!(report["kernels"].as_u64().unwrap() >= 3, "{report}");
    assert!(report["after_ms"].as_f64().unwrap() <= report["before_ms"].as_f64().unwrap(), "{report}");
    let compile = |name: &str, threads: &str| {
        let path = dir.join(name);
        let args = ["compile", DIGITS, "--shape", "n=4", "--tune-lock", text(&lock), "--threads", threads, "-o", text(&path), "--json"];
        pavage(args).exits(0);
        path
    };
    let (a, b) = (compile("a.pav", "1"), compile("b.pav", "2"));
    assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
    let inside = pavage(["inspect", text(&a), "--json"]).exits(0).json();
    assert!(inside["manifest"]["flags"].as_array().unwrap().iter().any(|f| f.as_str().unwrap().starts_with("--tune-lock=")));
    pavage(["run", text(&a), "--random"]).exits(0);
}

#[test]
fn schedules_of_a_lock_are_used_and_verified() {
    let dir = folder("tune-by-hand");
    // What a tuner would write, had it found other schedules to be faster: every product and convolution by narrow tiles.
    let model = root().join("tests/cases/optimize/cnn.ir");
    let graph = std::fs::read_to_string(&model).unwrap();
    let mut graph = pavage::ir::text::parse(&graph, &|_| None).unwrap();
    let ctx = Ctx { costs: cost::CPU_AVX2, ..Ctx::default() };
    pavage::passes::run(&mut graph, &ctx, PIPELINE).unwrap();
    let program = build::program("fused", &graph, &|g| eqsat::optimise(g, &ctx), &ctx).unwrap();
    let choices = choices(&[program], &Target::parse("x86-64-v3").unwrap(), 8);
    assert!(choices.iter().any(|c| c.schedules.len() > 1));
    let mut lines: Vec<String> = choices.iter().map(|c| format!("schedule {} {}\n", c.signature, c.schedules.last().unwrap())).collect();
    lines.sort();
    let body = format!("pavage tune.lock 1 of {}\ntarget x86-64-v3\ncpu \nfeatures \nscale 1.0000\n{}", env!("CARGO_PKG_VERSION"), lines.concat());
    let path = dir.join("tune.lock");
    std::fs::write(&path, format!("{body}end {}\n", pavage::runtime::content_hash(body.as_bytes()))).unwrap();
    let artifact = dir.join("cnn.pav");
    let args = ["compile", text(&model), "--target", "x86-64-v3", "--tune-lock", text(&path), "--plans", "fused", "--verify", "-o", text(&artifact), "--json"];
    let report = pavage(args).exits(0).json();
    let notes = report["notes"].as_array().unwrap();
    let all = format!("tune.lock decides the schedules of {0} of {0} kernels", choices.len());
    assert!(notes.iter().any(|n| n.as_str() == Some(all.as_str())), "{report}");
    let inside = pavage(["inspect", text(&artifact), "--json"]).exits(0).stdout;
    assert!(choices.iter().all(|c| inside.contains(&c.schedules.last().unwrap().to_string())), "{inside}");
}

#[test]
fn locks_that_do_not_fit_are_refused() {
    let dir = folder("tune-refused");
    let lock = dir.join("tune.lock");
    pavage(["tune", DIGITS, "--target", "x86-64-v3", "--shape", "n=4", "--duration", "0.05", "-o", text(&lock)]).exits(0);
    let good = std::fs::read_to_string(&lock).unwrap();
    let compile = |target: &str| pavage(["compile", DIGITS, "--shape", "n=4", "--target", target, "--tune-lock", text(&lock), "-o", text(&dir.join("x.pav"))]);
    compile("x86-64-v3").exits(0);
    compile("sm_80").exits(1).says(&["target x86-64-v3", "sm_80"]);
    std::fs::write(&lock, good.replace("lock 1 of", "lock 7 of")).unwrap();
    compile("x86-64-v3").exits(1).says(&["another version"]);
    std::fs::write(&lock, good.replace("target x86-64-v3", "target x86-64-v4")).unwrap();
    compile("x86-64-v3").exits(1).says(&["damaged"]);
    pavage(["compile", DIGITS, "--tune-lock", "nonesuch.lock"]).exits(1).says(&["nonesuch.lock"]);
}
