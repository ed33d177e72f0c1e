//! `compile --precision`: what it reports, what it keeps, and what it refuses.
mod support;

use std::path::{Path, PathBuf};
use support::{Ran, folder, pavage, pictures, write_npz};

const DIGITS: &str = "examples/models/digits.onnx";

/// A folder of two samples of 16 pictures.
fn samples(dir: &Path) -> PathBuf {
    let calib = dir.join("calib");
    std::fs::create_dir(&calib).unwrap();
    let (images, _) = pictures();
    for i in 0..2 {
        write_npz(&calib.join(format!("{i}.npz")), &[("in:image", &[16, 1, 8, 8], &images[i * 1024..(i + 1) * 1024])]);
    }
    calib
}

fn compile(dir: &Path, args: &[&str]) -> Ran {
    let out = dir.join("out.pav");
    let all = ["compile", DIGITS, "--plans", "fused", "--target", "x86-64-v3", "-o", out.to_str().unwrap()];
    pavage(all.into_iter().chain(args.iter().copied()))
}

/// How many of the pictures that no sample has are named right.
fn right(dir: &Path) -> (usize, usize) {
    let (images, labels) = pictures();
    let n = labels.len() - 32;
    let (inputs, outputs) = (dir.join("judge.npz"), dir.join("judged.npz"));
    write_npz(&inputs, &[("in:image", &[n as u64, 1, 8, 8], &images[32 * 64..])]);
    let artifact = dir.join("out.pav");
    pavage(["run".as_ref(), artifact.as_os_str(), "--inputs".as_ref(), inputs.as_os_str(), "--save".as_ref(), outputs.as_os_str()]).exits(0);
    let mut npz = npyz::npz::NpzArchive::open(&outputs).unwrap();
    let name = npz.array_names().next().unwrap().to_string();
    let logits: Vec<f32> = npz.by_name(&name).unwrap().unwrap().into_vec().unwrap();
    let top = |row: &[f32]| (0..10).fold(0, |b, i| if row[i] > row[b] { i } else { b });
    (logits.chunks(10).zip(&labels[32..]).filter(|(row, label)| top(row) == usize::from(**label)).count(), n)
}

#[test]
fn integers_and_bits_keep_the_digits() {
    let dir = folder("precision");
    let calib = samples(&dir);
    compile(&dir, &[]).exits(0);
    let (exact, n) = right(&dir);
    for (precision, method) in
        [("int8", "minmax"), ("int8", "percentile"), ("int8", "entropy"), ("int8", "mse"), ("w8", "minmax"), ("w4", "minmax"), ("auto", "minmax")]
    {
        let report = compile(&dir, &["--precision", precision, "--calib", calib.to_str().unwrap(), "--calib-method", method, "--json"]).exits(0).json();
        let layers = report["precision"]["layers"].as_array().unwrap();
        assert_eq!(layers.len(), 5);
        let changed: Vec<_> = layers.iter().filter(|l| l["precision"] != "f32").collect();
        assert!(!changed.is_empty(), "{precision}: {report}");
        for l in &changed {
            assert!(l["gain_ns"].as_f64().unwrap() > 0.0 && l["error"].as_f64().unwrap() > 0.0, "{l}");
        }
        for l in layers.iter().filter(|l| l["precision"] == "f32") {
            assert!(!l["why"].as_str().unwrap().is_empty(), "{l}");
        }
        let moved = &report["precision"]["outputs"][0];
        assert!(moved["cos"].as_f64().unwrap() < 1e-3, "{method} {moved}");
        let (now, _) = right(&dir);
        assert!(now + n / 100 >= exact, "{precision} {method}: {now} of {n} right, {exact} in f32");
    }
}

#[test]
fn the_artifact_says_what_a_layer_is_in() {
    let dir = folder("precision_why");
    let calib = samples(&dir);
    let said = compile(&dir, &["--precision", "int8", "--calib", calib.to_str().unwrap()]).exits(0).stdout;
    for part in ["predicted to save", "int8", "conv2", "outputs for cpu on the samples, against f32: cos="] {
        assert!(said.contains(part), "no `{part}` in:\n{said}");
    }
    let artifact = dir.join("out.pav");
    let why = pavage(["explain".as_ref(), artifact.as_os_str()]).exits(0).stdout;
    assert!(why.contains("precision int8: predicted to save") && why.contains("measured error"), "{why}");
    let layers = said.matches(" int8 ").count();
    assert!(layers > 1 && why.matches("precision int8").count() == layers, "{said}\n{why}");
    let inside = pavage(["inspect".as_ref(), artifact.as_os_str(), "--json".as_ref()]).exits(0).json();
    assert!(inside["manifest"]["flags"].as_array().unwrap().iter().any(|f| f == "--precision=int8"));
    // Groups and zero points are kept in the flags too.
    compile(&dir, &["--precision", "w4", "--group", "64", "--asymmetric"]).exits(0);
    let inside = pavage(["inspect".as_ref(), artifact.as_os_str(), "--json".as_ref()]).exits(0).json();
    for flag in ["--precision=w4", "--group=64", "--asymmetric"] {
        assert!(inside["manifest"]["flags"].as_array().unwrap().iter().any(|f| f == flag));
    }
}

#[test]
fn bad_requests_are_refused() {
    let dir = folder("precision_bad");
    let calib = samples(&dir);
    let calib = calib.to_str().unwrap();
    let sub = |name: &str| {
        let path = dir.join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let (empty, nameless, misshapen) = (sub("empty"), sub("nameless"), sub("misshapen"));
    write_npz(&nameless.join("a.npz"), &[("in:picture", &[1, 1, 8, 8], &[0.0; 64])]);
    write_npz(&misshapen.join("b.npz"), &[("in:image", &[1, 1, 9, 8], &[0.0; 72])]);
    let garbage = sub("garbage");
    std::fs::write(garbage.join("c.npz"), b"no archive").unwrap();
    let on = |folder: &Path| compile(&dir, &["--precision", "int8", "--calib", folder.to_str().unwrap()]).exits(1);
    on(&empty).says(&["empty", "no npz files", "in:NAME"]);
    on(&dir.join("nowhere")).says(&["--calib", "nowhere"]);
    on(&nameless).says(&["a.npz", "no array for input `image`", "picture"]);
    on(&misshapen).says(&["b.npz", "`image`", "[1, 1, 9, 8]", "[n,1,8,8]"]);
    on(&garbage).says(&["c.npz"]);
    compile(&dir, &["--precision", "int8"]).exits(1).says(&["--precision int8 needs --calib"]);
    compile(&dir, &["--precision", "auto"]).exits(1).says(&["--precision auto needs --calib"]);
    compile(&dir, &["--precision", "w8", "--max-error", "cos=1e-3"]).exits(1).says(&["--max-error needs --calib"]);
    compile(&dir, &["--max-error", "cos=1e-3"]).exits(1).says(&["without --precision"]);
    for bad in ["cos", "cos=many", "cos=-1", "top1=200%", "angle=1"] {
        compile(&dir, &["--precision", "w8", "--max-error", bad]).exits(1).says(&["cos=1e-3", "top1=0.5%"]);
    }
    compile(&dir, &["--precision", "int3"]).exits(1).says(&["f32, f16, bf16, int8, w8, w4 or auto"]);
    compile(&dir, &["--precision", "w4", "--group", "48"]).exits(1).says(&["32, 64 or 128"]);
    compile(&dir, &["--precision", "int8", "--calib", calib, "--calib-method", "guess"]).exits(1).says(&["minmax"]);
    compile(&dir, &["--precision", "int8", "--calib", calib, "--max-error", "cos=0"]).exits(1).says(&["--max-error cos=0 cannot be met", "int8"]);
    assert!(!dir.join("out.pav").exists());
}
