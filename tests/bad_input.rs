//! Bad models, artifacts and requests: each has a clear error and the right exit code.
mod support;

use proptest::prelude::*;
use std::path::{Path, PathBuf};
use support::{Message, Model, declared, external, folder, node, pavage, port, root, tensor};

const DIGITS: &str = "examples/models/digits.onnx";

/// Writes a file into a folder.
fn put(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// `pavage check` on this model must fail as the model's fault, saying all of this.
#[track_caller]
fn refused(folder: &Path, model: &[u8], parts: &[&str]) {
    let path = put(folder, "model.onnx", model);
    let ran = pavage(["check".as_ref(), path.as_os_str()]).exits(2);
    let said = format!("{}{}", ran.stdout, ran.stderr);
    for part in parts {
        assert!(said.contains(part), "no `{part}` in:\n{said}");
    }
    pavage(["compile".as_ref(), path.as_os_str()]).exits(2);
    assert!(!folder.join("model.pav").exists());
}

#[test]
fn a_truncated_model_is_refused() {
    let dir = folder("truncated");
    let whole = std::fs::read(root().join(DIGITS)).unwrap();
    refused(&dir, &whole[..whole.len() / 2], &["error:"]);
    refused(&dir, &whole[..10], &["error:"]);
    refused(&dir, b"", &["error:"]);
    refused(&dir, b"this is no model, it is a sentence", &["ONNX"]);
}

#[test]
fn a_cycle_is_named() {
    let mut model = Model::add(tensor("w", &[4], &[1.0; 4]));
    model.nodes = vec![node("Add", "one", &["x", "b"], &["a"]), node("Add", "two", &["a", "w"], &["b"]), node("Relu", "three", &["b"], &["y"])];
    refused(&folder("cycle"), &model.encode(17), &["cycle", "`one`", "`two`"]);
}

#[test]
fn a_missing_initializer_is_named() {
    let mut model = Model::add(tensor("w", &[4], &[1.0; 4]));
    model.initializers.clear();
    refused(&folder("missing"), &model.encode(17), &["`w`", "plus"]);
}

#[test]
fn external_data_stays_in_the_models_folder() {
    let outer = folder("external");
    let dir = outer.join("models");
    std::fs::create_dir(&dir).unwrap();
    let data: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let secret = put(&outer, "secret.bin", &data);
    put(&dir, "w.bin", &data);
    let model = |location: &str, offset, length| Model::add(external("w", &[4], location, offset, length)).encode(17);

    let good = put(&dir, "good.onnx", &model("w.bin", 0, 16));
    pavage(["check".as_ref(), good.as_os_str()]).exits(0);
    refused(&dir, &model("../secret.bin", 0, 16), &["`w`", "../secret.bin"]);
    refused(&dir, &model(secret.to_str().unwrap(), 0, 16), &["`w`"]);
    refused(&dir, &model("sub/../../secret.bin", 0, 16), &["`w`"]);
    refused(&dir, &model("w.bin", 8, 16), &["`w`"]);
    refused(&dir, &model("w.bin", u64::MAX, 16), &["`w`"]);
    refused(&dir, &model("w.bin", 0, 8), &["`w`"]);
    refused(&dir, &model("absent.bin", 0, 16), &["`w`", "absent.bin"]);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(&secret, dir.join("link.bin")).unwrap();
        refused(&dir, &model("link.bin", 0, 16), &["`w`", "link.bin"]);
    }
}

#[test]
fn a_tensor_larger_than_its_file_is_refused() {
    let dir = folder("huge");
    refused(&dir, &Model::add(declared("w", &[512, 1024, 1024])).encode(17), &["`w`"]);
    refused(&dir, &Model::add(declared("w", &[i64::MAX, i64::MAX])).encode(17), &["`w`", "too many elements"]);
    refused(&dir, &Model::add(tensor("w", &[-4], &[1.0; 4])).encode(17), &["`w`"]);
}

#[test]
fn all_unsupported_ops_are_listed_at_once() {
    let dir = folder("unknown");
    let mut model = Model::add(tensor("w", &[4], &[1.0; 4]));
    model.nodes = vec![node("FooBar", "first", &["x"], &["a"]), node("FooBar", "second", &["a"], &["b"]), node("Quux", "third", &["b"], &["y"])];
    refused(&dir, &model.encode(17), &["FooBar", "Quux", "first", "second", "third", "17"]);
    let path = put(&dir, "json.onnx", &model.encode(17));
    let report = pavage(["check".as_ref(), path.as_os_str(), "--json".as_ref()]).exits(2).json();
    assert_eq!(report["problems"].as_array().unwrap().len(), 2);
    assert_eq!(report["problems"][0]["op"], "FooBar");
    assert_eq!(report["problems"][0]["count"], 2);
}

#[test]
fn what_is_near_or_out_of_scope_is_said() {
    let dir = folder("nearest");
    let mut model = Model::add(tensor("w", &[4], &[1.0; 4]));
    model.nodes = vec![node("Sigmoyd", "first", &["x"], &["a"]), node("StringSplit", "second", &["a"], &["b"]), node("ImageDecoder", "third", &["b"], &["y"])];
    refused(&dir, &model.encode(20), &["Sigmoyd", "StringSplit", "ImageDecoder"]);
    let path = put(&dir, "json.onnx", &model.encode(20));
    let report = pavage(["check".as_ref(), path.as_os_str(), "--json".as_ref()]).exits(2).json();
    let nearest = |i: usize| report["problems"][i]["nearest"].as_str().unwrap().to_string();
    assert_eq!(nearest(0), "nearest: ai.onnx::Sigmoid");
    assert!(nearest(1).contains("out of scope: Pavage compiles no text"), "{}", nearest(1));
    assert!(nearest(2).contains("out of scope: Pavage decodes no images"), "{}", nearest(2));
}

#[test]
fn an_unknown_operator_set_is_named() {
    let dir = folder("opset");
    refused(&dir, &Model::add(tensor("w", &[4], &[1.0; 4])).encode(9999), &["9999"]);
    refused(&dir, &Model::add(tensor("w", &[4], &[1.0; 4])).encode(1), &["1"]);
}

#[test]
fn mismatched_shapes_are_both_named() {
    let dir = folder("shapes");
    let pav = dir.join("digits.pav");
    pavage(["compile".as_ref(), DIGITS.as_ref(), "-o".as_ref(), pav.as_os_str()]).exits(0);
    let run = |input: &str| pavage(["run", pav.to_str().unwrap(), input]);
    let ones = |n: usize| vec!["1"; n].join(",");
    run(&format!("image={}", ones(128))).exits(0);
    run(&format!("image={}", ones(63))).exits(1).says(&["`image`", "[n x 1 x 8 x 8]", "[1 x 1 x 1 x 63]"]);
    run("picture=1").exits(1).says(&["`picture`", "image"]);
    pavage(["run", pav.to_str().unwrap()]).exits(1).says(&["`image`"]);
    pavage(["run", pav.to_str().unwrap(), "--random", "--plan", "molten"]).exits(1).says(&["molten", "fused"]);
    pavage(["compile", DIGITS, "--shape", "nonesuch=3", "-o", dir.join("x.pav").to_str().unwrap()]).exits(1).says(&["nonesuch"]);
}

#[test]
fn nan_weights_are_weights() {
    let dir = folder("nan");
    let path = put(&dir, "nan.onnx", &Model::add(tensor("w", &[4], &[1.0, f32::NAN, f32::INFINITY, -1.0])).encode(17));
    let out = dir.join("out.npz");
    pavage(["run".as_ref(), path.as_os_str(), "x=1,2,3,4".as_ref(), "--save".as_ref(), out.as_os_str()]).exits(0);
    let mut npz = npyz::npz::NpzArchive::open(&out).unwrap();
    let y: Vec<f32> = npz.by_name("y").unwrap().unwrap().into_vec().unwrap();
    assert!(y[0] == 2.0 && y[1].is_nan() && y[2] == f32::INFINITY && y[3] == 3.0, "{y:?}");
}

#[test]
fn damaged_artifacts_are_refused() {
    let dir = folder("artifact");
    let path = dir.join("digits.pav");
    pavage(["compile".as_ref(), DIGITS.as_ref(), "-o".as_ref(), path.as_os_str()]).exits(0);
    let good = std::fs::read(&path).unwrap();
    let run = |bytes: &[u8]| pavage(["run".as_ref(), put(&dir, "bad.pav", bytes).as_os_str(), "--random".as_ref()]);

    run(&good).exits(0);
    for len in [0, 5, 20, 63, 100, good.len() / 2, good.len() - 1] {
        run(&good[..len]).exits(2);
    }
    run(b"PK\x03\x04 an archive of some other kind").exits(2).says(&["not a Pavage artifact"]);
    let mut newer = good.clone();
    newer[8..12].copy_from_slice(&99u32.to_le_bytes());
    run(&newer).exits(2).says(&["format 99", "update"]);
    let flipped = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    // The table of contents, the manifest, and every segment under --verify.
    run(&flipped(80)).exits(2).says(&["damaged"]);
    run(&flipped(4096 + 100)).exits(2).says(&["damaged"]);
    for at in [good.len() - 1, good.len() / 2] {
        let bad = put(&dir, "bad.pav", &flipped(at));
        let at_padding = pavage::Artifact::from_bytes(&flipped(at)).is_ok_and(|a| a.verify().is_ok());
        pavage(["inspect".as_ref(), bad.as_os_str(), "--verify".as_ref()]).exits(if at_padding { 0 } else { 2 });
    }
}

#[test]
fn an_artifact_for_another_device_says_what_it_has() {
    let dir = folder("device");
    let gpu = dir.join("gpu.pav");
    pavage(["compile".as_ref(), DIGITS.as_ref(), "--target".as_ref(), "sm_80".as_ref(), "-o".as_ref(), gpu.as_os_str()]).exits(0);
    pavage(["run".as_ref(), gpu.as_os_str(), "--random".as_ref()]).exits(4).says(&["cpu", "sm_80"]);
    let wide = dir.join("wide.pav");
    pavage(["compile".as_ref(), DIGITS.as_ref(), "--target".as_ref(), "x86-64-v4".as_ref(), "-o".as_ref(), wide.as_os_str()]).exits(0);
    let ran = pavage(["run".as_ref(), wide.as_os_str(), "--random".as_ref()]);
    if pavage::runtime::host_level() == "x86-64-v4" {
        ran.exits(0);
    } else {
        ran.exits(4).says(&["x86-64-v4"]);
    }
    if pavage::Device::gpus().is_empty() {
        pavage(["run".as_ref(), gpu.as_os_str(), "--random".as_ref(), "--device".as_ref(), "cuda:0".as_ref()]).exits(4);
    }
}

#[test]
fn requests_that_make_no_sense_are_usage_errors() {
    pavage(["run", "no_such_file.onnx"]).exits(1).says(&["no_such_file.onnx"]);
    pavage(["compile", DIGITS, "--target", "z80"]).exits(1).says(&["z80"]);
    pavage(["compile", DIGITS, "--plans", "molten"]).exits(1).says(&["molten"]);
    pavage(["run", DIGITS, "--device", "abacus"]).exits(1).says(&["abacus"]);
    pavage(["run", DIGITS, "image"]).exits(1).says(&["image"]);
    pavage(["run", DIGITS, "image=@absent.npy"]).exits(1).says(&["absent.npy"]);
    pavage(["frobnicate"]).exits(1);
    pavage::<&str>([]).exits(1);
    pavage(["--version"]).exits(0);
    pavage(["compile", "--help"]).exits(0);
}

/// A model, an artifact and IR text to be damaged.
fn samples() -> &'static (Vec<u8>, Vec<u8>, String) {
    static SAMPLES: std::sync::OnceLock<(Vec<u8>, Vec<u8>, String)> = std::sync::OnceLock::new();
    SAMPLES.get_or_init(|| {
        // Small, so that most changes hit structure and not weights.
        let mut model = Model::add(tensor("w", &[4], &[1.0, 2.0, 3.0, 4.0]));
        model.nodes.push(node("Softmax", "norm", &["y"], &["z"]).with(5, &Message::new().bytes(1, "axis").int(3, -1).int(20, 2)));
        model.outputs = vec![port("z", &["n", "4"])];
        let onnx = model.encode(17);
        let options = pavage::CompileOptions { targets: vec!["x86-64-v3".into()], ..Default::default() };
        let artifact = pavage::compile(pavage::Source::Onnx(&onnx), &options).unwrap().artifact;
        let graph = pavage::import(pavage::Source::Onnx(&onnx), &[]).unwrap().graph;
        (onnx, artifact, pavage::ir::text::print(&graph))
    })
}

/// Bytes changed, cut out and doubled.
fn damaged(bytes: &[u8], edits: &[(usize, u8, u8)]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for (at, kind, value) in edits {
        let at = at % out.len().max(1);
        match kind % 4 {
            0 if at < out.len() => out[at] = *value,
            1 if at < out.len() => drop(out.drain(at..(at + usize::from(*value)).min(out.len()))),
            2 => out.truncate(at),
            _ => {
                let end = (at + usize::from(*value)).min(out.len());
                let piece = out.get(at..end).unwrap_or_default().to_vec();
                out.splice(at.min(out.len())..at.min(out.len()), piece);
            }
        }
    }
    out
}

fn edits() -> impl Strategy<Value = Vec<(usize, u8, u8)>> {
    prop::collection::vec((any::<usize>(), any::<u8>(), any::<u8>()), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_damage_makes_the_model_reader_panic(edits in edits()) {
        pavage::import(pavage::Source::Onnx(&damaged(&samples().0, &edits)), &[]).ok();
    }

    #[test]
    fn no_damage_makes_the_artifact_reader_panic(edits in edits()) {
        if let Ok(artifact) = pavage::Artifact::from_bytes(&damaged(&samples().1, &edits)) {
            artifact.verify().ok();
            artifact.session(pavage::Device::Null, pavage::Options::default()).ok();
        }
    }

    #[test]
    fn no_damage_makes_the_text_reader_panic(edits in edits()) {
        let text = String::from_utf8_lossy(&damaged(samples().2.as_bytes(), &edits)).into_owned();
        pavage::import(pavage::Source::Ir(&text), &[]).ok();
    }
}
