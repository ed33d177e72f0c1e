//! Real models, from ONNX to outputs, against onnxruntime's outputs without graph optimisation.
//!
//! `x test` fetches the models by pinned hash and says where they are (`PAVAGE_MODELS`). Without
//! them these tests fail, unless `PAVAGE_OFFLINE` is set; then what could not run is listed.
mod support;

use std::path::{Path, PathBuf};
use support::{folder, not_run, pavage, root};

/// What an output may differ by.
#[derive(Clone, Copy)]
struct Tolerance {
    atol: &'static str,
    rtol: &'static str,
}

const F32: Tolerance = Tolerance { atol: "1e-4", rtol: "1e-3" };
const F16: Tolerance = Tolerance { atol: "1e-2", rtol: "1e-2" };
/// Of 8-bit activations: sums in another order round to another step now and then, and a step of
/// an early layer reaches the logits (which span -2 to 10) as some tenths.
const QDQ: Tolerance = Tolerance { atol: "0.5", rtol: "5e-2" };

/// The model's file; none when it may be missing.
fn model(name: &str) -> Option<PathBuf> {
    let models = std::env::var_os("PAVAGE_MODELS").map_or_else(|| root().join("target/models"), PathBuf::from);
    let path = models.join(format!("{name}.onnx"));
    if path.exists() {
        return Some(path);
    }
    assert!(std::env::var_os("PAVAGE_OFFLINE").is_some(), "{} is missing: run ./x models, or ./x test --offline", path.display());
    not_run(&format!("model {name}: not fetched"));
    None
}

/// Runs a compiled or uncompiled model on the golden inputs and compares. Gives the saved outputs.
fn run(file: &Path, golden: &str, tolerance: Tolerance, more: &[&str]) -> PathBuf {
    let case = root().join(format!("tests/golden/dev_{golden}.npz"));
    let saved = folder(&format!("{golden}-{}", more.join(""))).join("out.npz");
    let fixed = ["run".as_ref(), file.as_os_str(), "--case".as_ref(), case.as_os_str(), "--save".as_ref(), saved.as_os_str()];
    let tolerances = ["--atol", tolerance.atol, "--rtol", tolerance.rtol, "--device", "cpu"];
    let rest = tolerances.iter().chain(more).map(|s| s.as_ref());
    pavage(fixed.into_iter().chain(rest)).exits(0);
    saved
}

/// Both plans of one artifact with run-time sizes, then one compiled for the golden shapes. Kernels for a GPU, which may not be here, are
/// made for the same sizes.
fn check(name: &str, golden: &str, tolerance: Tolerance) -> Option<PathBuf> {
    let file = model(name)?;
    let artifact = folder(&format!("model-{name}")).join("model.pav");
    for target in ["sm_90a", "native"] {
        let notes = pavage(["compile".as_ref(), file.as_os_str(), "--target".as_ref(), target.as_ref(), "-o".as_ref(), artifact.as_os_str()]).exits(0).stderr;
        assert!(!notes.contains("limit of the search"), "{name} for {target}: {notes}");
    }
    run(&artifact, golden, tolerance, &["--plan", "unfused"]);
    let saved = run(&artifact, golden, tolerance, &["--plan", "fused", "--threads", "2"]);
    run(&file, golden, tolerance, &["--plan", "fused", "--threads", "1"]);
    Some(saved)
}

macro_rules! models {
    ($($name:ident: $golden:literal, $tolerance:expr;)*) => { $(
        #[test]
        fn $name() {
            check(stringify!($name), $golden, $tolerance);
        }
    )* };
}

models! {
    ppocr_det: "ppocr_det", F32;
    ppocr_rec: "ppocr_rec", F32;
    ppocr_cls: "ppocr_cls", F32;
    magika: "magika", F32;
    silero_vad: "silero", F32;
    silero_vad_sequence: "silero_seq", F32;
    minilm_int8: "minilm_int8", F32;
    efficientnet_lite0: "efficientnet_lite0", F32;
    efficientnet_lite0_fp16: "efficientnet_lite0_fp16", F16;
    digits_rf: "digits_rf", F32;
    digits_mlp: "digits_mlp", F32;
    cancer_gb: "cancer_gb", F32;
}

#[test]
fn efficientnet_lite0_qdq() {
    let Some(saved) = check("efficientnet_lite0_qdq", "efficientnet_lite0_qdq", QDQ) else { return };
    let top = |path: &Path, key: &str| -> usize {
        let mut npz = npyz::npz::NpzArchive::open(path).unwrap();
        let logits: Vec<f32> = npz.by_name(key).unwrap().unwrap().into_vec().unwrap();
        logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0
    };
    let golden = root().join("tests/golden/dev_efficientnet_lite0_qdq.npz");
    assert_eq!(top(&saved, "logits"), top(&golden, "out:logits"));
}
