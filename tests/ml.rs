//! Classic machine learning, compiled and run in both plans, against onnxruntime's outputs: exports of scikit-learn
//! models and single operators, as `scripts/ml_models.py` made them.
mod support;

use support::{pavage, root};

#[test]
fn models_match_onnxruntime() {
    let folder = root().join("tests/golden/ml");
    let mut models: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "onnx")).collect();
    models.sort();
    assert!(models.len() > 60, "{} models in {}", models.len(), folder.display());
    let mut failures = vec![];
    for model in &models {
        let case = model.with_extension("npz");
        for plan in ["fused", "unfused"] {
            let args = ["run".as_ref(), model.as_os_str(), "--case".as_ref(), case.as_os_str()];
            let rest = ["--device", "cpu", "--plan", plan, "--atol", "2e-5", "--rtol", "1e-4"];
            let ran = pavage(args.into_iter().chain(rest.iter().map(|s| s.as_ref())));
            if ran.code != 0 {
                failures.push(format!("{} ({plan}): {}{}", case.file_stem().unwrap().display(), ran.stdout, ran.stderr));
            }
        }
    }
    assert!(failures.is_empty(), "{} of {} runs:\n{}", failures.len(), 2 * models.len(), failures.join("\n"));
}
