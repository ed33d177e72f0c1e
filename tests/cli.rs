//! Every verb, as a user runs it.
mod support;

use serde_json::Value;
use std::path::{Path, PathBuf};
use support::{folder, pavage, pictures, root, write_npz};

const DIGITS: &str = "examples/models/digits.onnx";

fn compiled(dir: &Path) -> PathBuf {
    let path = dir.join("digits.pav");
    pavage(["compile".as_ref(), DIGITS.as_ref(), "-o".as_ref(), path.as_os_str()]).exits(0);
    path
}

#[test]
fn compile_reports_and_inspect_shows_what_is_inside() {
    let dir = folder("inspect");
    let path = dir.join("fat.pav");
    let args = ["compile", DIGITS, "-o", path.to_str().unwrap(), "--target", "x86-64-v3", "--target", "sm_80", "--json"];
    let report = pavage(args).exits(0).json();
    assert_eq!(report["bytes"], std::fs::metadata(&path).unwrap().len());
    let plans = report["plans"].as_array().unwrap();
    assert_eq!(plans.len(), 4, "two plans for two targets");

    let inside = pavage(["inspect", path.to_str().unwrap(), "--json", "--verify"]).exits(0).json();
    let manifest = &inside["manifest"];
    assert_eq!(manifest["inputs"][0]["name"], "image");
    assert_eq!(manifest["outputs"][0]["name"], "logits");
    assert!(!manifest["input_hash"].as_str().unwrap().is_empty());
    assert!(manifest["flags"].as_array().unwrap().iter().any(|f| f == "--target=sm_80"));
    let kernels = |plan: &str| {
        let plans = manifest["plans"].as_array().unwrap();
        let found = plans.iter().find(|p| p["name"] == plan && p["target"] == "x86-64-v3").unwrap();
        found["kernels"].as_array().unwrap().len()
    };
    assert!(kernels("fused") < kernels("unfused"));
    let text = pavage(["inspect", path.to_str().unwrap(), "--kernels"]).exits(0).stdout;
    for part in ["image: f32[n x 1 x 8 x 8]", "fused", "unfused", "conv", "sm_80"] {
        assert!(text.contains(part), "no `{part}` in:\n{text}");
    }
    assert!(pavage(["inspect", DIGITS]).exits(0).stdout.contains("image"));
}

#[test]
fn what_sizes_are_expected_to_be_decides_plans() {
    let dir = folder("expect");
    let model = dir.join("decode.ir");
    std::fs::write(
        &model,
        "graph @decode(%q: f16[4,1,64], %k: f16[4,past + 1,64], %v: f16[4,past + 1,64]) where past in 1.. {
  %kt = transpose[perm=[0,2,1]] %k : f16[4,64,past + 1]
  %s = matmul[out=f16] %q, %kt : f16[4,1,past + 1]
  %top = reduce[f=max,axes=[2]] %s : f16[4,1,1]
  %tb = broadcast[shape=[4,1,past + 1]] %top : f16[4,1,past + 1]
  %below = sub %s, %tb : f16[4,1,past + 1]
  %e = exp %below : f16[4,1,past + 1]
  %sum = reduce[f=sum,axes=[2]] %e : f16[4,1,1]
  %sb = broadcast[shape=[4,1,past + 1]] %sum : f16[4,1,past + 1]
  %p = div %e, %sb : f16[4,1,past + 1]
  %y = matmul[out=f16] %p, %v : f16[4,1,64]
  return %y as \"y\"
}
",
    )
    .unwrap();
    let (model, artifact) = (model.to_str().unwrap(), dir.join("decode.pav"));
    let artifact = artifact.to_str().unwrap();
    let explained = |more: &[&str]| {
        pavage(["compile", model, "--target", "sm_90a", "--plans", "fused", "-o", artifact].into_iter().chain(more.iter().copied())).exits(0);
        pavage(["explain", artifact]).exits(0).stdout
    };
    assert!(!explained(&[]).contains("attention_parts (k"));
    let many = explained(&["--expect", "past=4095"]);
    assert!(many.contains("attention_parts (k") && many.contains("at past=4095"), "{many}");
    assert!(pavage(["inspect", artifact]).exits(0).stdout.contains("--expect=past=4095"));
    pavage(["compile", model, "--expect", "keys=4095", "-o", artifact]).exits(1).says(&["keys", "past"]);
    pavage(["compile", DIGITS, "--shape", "n=1", "--expect", "n=4", "-o", artifact]).exits(1).says(&["no size open"]);
    pavage(["compile", model, "--expect", "past", "-o", artifact]).exits(1).says(&["NAME=512"]);
}

#[test]
fn explain_says_why() {
    let dir = folder("explain");
    let path = compiled(&dir);
    let file = path.to_str().unwrap();
    let all = pavage(["explain", file, "--json"]).exits(0).json();
    let kernels = all.as_array().unwrap();
    assert!(kernels.iter().all(|k| k["why"]["total_ns"].as_f64().unwrap() > 0.0), "{all}");
    assert!(kernels.iter().any(|k| !k["why"]["runner_up"].is_null()), "{all}");
    assert!(kernels.iter().all(|k| k["launches"].as_u64() >= Some(1)), "{all}");
    // Images become channels-last: a pass says so of the convolutions.
    let passes = |k: &Value| k["why"]["passes"].as_array().into_iter().flatten().any(|p| p.as_str().unwrap().starts_with("layout: "));
    assert!(kernels.iter().any(passes), "{all}");
    let one = pavage(["explain", file, "--kernel", "0"]).exits(0).stdout;
    for part in ["nodes", "predicted", "runner-up", "launch"] {
        assert!(one.contains(part), "no `{part}` in:\n{one}");
    }
    // Two nodes of different kernels, one of which reads the other.
    let reader = kernels.iter().find(|k| k["why"]["apart"].is_array()).unwrap();
    let producer = kernels.iter().find(|k| k["kernel"] == reader["why"]["apart"][0][0]).unwrap();
    let (a, b) = (producer["nodes"][0].as_str().unwrap(), reader["nodes"][0].as_str().unwrap());
    let why = pavage(["explain", file, "--why-not", a, b]).exits(0).stdout;
    assert!(why.contains("reads") || why.contains("one kernel"), "{why}");
    pavage(["explain", file, "--why-not", a, "no such node"]).exits(1);
    let stderr = pavage(["explain", file, "--kernel", "no such kernel"]).exits(1).stderr;
    assert!(stderr.contains("there are 0 "), "{stderr}");
    pavage(["explain", DIGITS]).exits(1);
    assert!(pavage(["explain", file, "--diff", file]).exits(0).stdout.contains("the same kernels"));
}

#[test]
fn verify_replays_each_fused_kernel() {
    let dir = folder("verify");
    let path = dir.join("digits.pav");
    let ran = pavage(["compile", DIGITS, "-o", path.to_str().unwrap(), "--verify", "--json"]).exits(0).json();
    assert_eq!(ran["verified"], true);
    let skipped = ran["notes"].as_array().unwrap().iter().filter(|n| n.as_str().unwrap().contains("not verified"));
    assert_eq!(skipped.count(), 0, "{ran}");

    let (images, _) = pictures();
    let inputs = dir.join("in.npz");
    write_npz(&inputs, &[("image", &[450, 1, 8, 8], &images)]);
    let on = |inputs: &Path| pavage(["compile", DIGITS, "-o", path.to_str().unwrap(), "--verify", "--verify-inputs", inputs.to_str().unwrap()]);
    on(&inputs).exits(0);
    let other = dir.join("other.npz");
    write_npz(&other, &[("picture", &[450, 1, 8, 8], &images)]);
    assert!(on(&other).exits(1).stderr.contains("picture"));
}

#[test]
fn run_answers_and_both_plans_agree() {
    let dir = folder("run");
    let path = compiled(&dir);
    let (images, labels) = pictures();
    let inputs = dir.join("in.npz");
    write_npz(&inputs, &[("image", &[450, 1, 8, 8], &images)]);
    let answers = |plan: &str| -> Vec<f32> {
        let out = dir.join(format!("{plan}.npz"));
        let files = [path.as_os_str(), "--inputs".as_ref(), inputs.as_os_str(), "--save".as_ref(), out.as_os_str()];
        pavage(["run".as_ref(), "--plan".as_ref(), plan.as_ref()].into_iter().chain(files)).exits(0);
        let mut npz = npyz::npz::NpzArchive::open(&out).unwrap();
        npz.by_name("logits").unwrap().unwrap().into_vec().unwrap()
    };
    let (fused, unfused) = (answers("fused"), answers("unfused"));
    assert_eq!(fused.len(), 4500);
    for (a, b) in fused.iter().zip(&unfused) {
        assert!((a - b).abs() <= 1e-4 + 1e-3 * b.abs(), "{a} and {b}");
    }
    let class = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
    let right = fused.chunks(10).zip(&labels).filter(|(row, label)| class(row) == usize::from(**label)).count();
    assert!(right >= 437, "{right} of 450");
}

#[test]
fn a_case_is_compared_within_its_tolerance() {
    let dir = folder("case");
    let (images, _) = pictures();
    let (inputs, out) = (dir.join("in.npz"), dir.join("out.npz"));
    write_npz(&inputs, &[("in:image", &[2, 1, 8, 8], &images[..128])]);
    let p = |path: &Path| path.to_str().unwrap().to_string();
    pavage(["run", DIGITS, "--inputs", &p(&inputs), "--save", &p(&out)]).exits(0);
    let mut npz = npyz::npz::NpzArchive::open(&out).unwrap();
    let logits: Vec<f32> = npz.by_name("logits").unwrap().unwrap().into_vec().unwrap();
    let case = |name: &str, change: f32, shape: &[u64]| {
        let path = dir.join(name);
        let mut wanted = logits.clone();
        wanted[3] += change;
        write_npz(&path, &[("in:image", &[2, 1, 8, 8], &images[..128]), ("out:logits", shape, &wanted)]);
        p(&path)
    };
    pavage(["run", DIGITS, "--case", &case("good.npz", 0.0, &[2, 10])]).exits(0);
    let off = case("off.npz", 0.5, &[2, 10]);
    let report = pavage(["run", DIGITS, "--case", &off, "--json"]).exits(3);
    assert_eq!(report.json()["compared"][0]["beyond"], 1);
    pavage(["run", DIGITS, "--case", &off, "--atol", "1"]).exits(0);
    let shape = pavage(["run", DIGITS, "--case", &case("shape.npz", 0.0, &[20])]).exits(3);
    assert!(shape.stdout.contains("[2 x 10]") && shape.stdout.contains("[20]"), "{}", shape.stdout);
    pavage(["run", DIGITS, "--case", &p(&inputs)]).exits(1).says(&["out:NAME"]);
}

#[test]
fn bench_ends_with_the_median() {
    let dir = folder("bench");
    let path = compiled(&dir);
    let path = path.to_str().unwrap();
    let quick = ["--duration", "0.05", "--warm-up", "10"];
    let quiet = pavage(["bench", path, "--quiet"].into_iter().chain(quick)).exits(0);
    let median: f64 = quiet.stdout.lines().last().unwrap().parse().unwrap();
    assert!(median > 0.0 && median < 1000.0);

    let report = pavage(["bench", path, "--ab", "fused,unfused", "--json"].into_iter().chain(quick)).exits(0).json();
    let plans = report["plans"].as_array().unwrap();
    assert_eq!(plans.len(), 2);
    for plan in plans {
        assert!(plan["runs"].as_u64().unwrap() >= 10);
        assert!(plan["p50_ms"].as_f64().unwrap() <= plan["p99_ms"].as_f64().unwrap());
    }
    let sum = |key: &str| report["kernels"].as_array().unwrap().iter().map(|k| k[key].as_f64().unwrap()).sum::<f64>();
    // A kernel may move more bytes to multiply less, so of all together only the launches are sure to be fewer.
    assert!(sum("launches_removed") > 0.0 && sum("bytes_removed") != 0.0, "{report}");
    let text = pavage(["bench", path, "--ab", "fused,unfused"].into_iter().chain(quick)).exits(0).stdout;
    for part in ["p50", "runs/s", "launches removed", "fused is"] {
        assert!(text.contains(part), "no `{part}` in:\n{text}");
    }
}

#[test]
fn nothing_is_coloured_when_nobody_watches() {
    for args in [vec!["doctor"], vec!["inspect", DIGITS], vec!["run", DIGITS, "--random"], vec!["run", "absent.onnx"]] {
        let ran = pavage(args);
        assert!(!ran.stdout.contains('\x1b') && !ran.stderr.contains('\x1b'));
    }
}

#[test]
fn opt_runs_passes_on_text() {
    let dir = folder("opt");
    let listed = pavage(["opt", "--list", "--json"]).exits(0).json();
    assert!(!listed["passes"].as_array().unwrap().is_empty());
    let text = pavage(["compile", DIGITS, "--emit", "ir", "-O", "0"]).exits(0).stdout;
    assert!(text.contains("conv"), "{text}");
    let before = pavage(["opt", DIGITS, "--passes", "", "--full"]).exits(0).stdout;
    let file = dir.join("digits.ir");
    std::fs::write(&file, &before).unwrap();
    let again = pavage(["opt", file.to_str().unwrap(), "--passes", "", "--full"]).exits(0).stdout;
    assert_eq!(again, before, "text reads back to itself");
    let after = pavage(["opt", file.to_str().unwrap(), "--dump-after", "all"]).exits(0);
    assert!(after.stdout.len() < before.len(), "large constants are references");
    assert!(after.stderr.contains("// after fold"));
    pavage(["opt", file.to_str().unwrap(), "--passes", "nonesuch"]).exits(1).says(&["nonesuch"]);
}

#[test]
fn doctor_and_check_report_for_programs() {
    let report = pavage(["doctor", "--json"]).exits(0).json();
    assert!(report["cpu"]["level"].as_str().unwrap().starts_with("x86-64"));
    assert!(report["tools"]["ld.lld"].is_string());
    let report = pavage(["check", DIGITS, "--json"]).exits(0).json();
    assert_eq!(report["ok"], true);
    assert_eq!(report["inputs"][0]["name"], "image");
    assert!(report["ops"].as_object().unwrap().len() > 3);
}

#[test]
fn the_demo_recognises_digits() {
    let report = pavage(["demo", "--json", "--duration", "0.1"]).exits(0).json();
    assert!(report["accuracy"].as_f64().unwrap() >= 0.97);
    assert_eq!(report["right"]["fused"], report["right"]["unfused"]);
    assert_eq!(report["device"], "cpu");
}

#[test]
fn the_null_device_tells_what_it_was_asked() {
    let log = pavage(["run", DIGITS, "--random", "--device", "null"]).exits(0).stderr;
    assert!(log.contains("conv") || log.contains("k0"), "{log}");
}

#[test]
fn a_compiled_model_is_kept_in_the_cache() {
    let dir = folder("cache");
    let model = dir.join("model.onnx");
    std::fs::copy(root().join(DIGITS), &model).unwrap();
    let cache = dir.join("cache");
    let run = |more: &[&str]| {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_pavage"))
            .args(["run", model.to_str().unwrap(), "--random"])
            .args(more)
            .env("PAVAGE_CACHE", &cache)
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        std::fs::read_dir(&cache).map_or(0, |entries| entries.count())
    };
    assert_eq!(run(&["--no-cache"]), 0);
    assert_eq!(run(&[]), 1);
    assert_eq!(run(&[]), 1);
    assert_eq!(run(&["--shape", "n=2"]), 2, "other flags, another artifact");
}
