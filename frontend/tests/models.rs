//! Real models against their golden outputs, through the reference evaluator. Needs the models: set `PAVAGE_MODELS`
//! and `PAVAGE_GOLDEN` to their folders and run with `--ignored`.
use npyz::{NpyFile, npz::NpzArchive};
use pavage_frontend::onnx::{self, Options};
use pavage_ir::{DType, NodeKind, Tensor, eval, verify};
use std::{fs::File, io::BufReader, path::PathBuf};

/// Model file, golden file, and tolerances.
const CASES: &[(&str, &str, f64, f64)] = &[
    ("cancer_gb", "cancer_gb", 1e-3, 1e-4),
    ("digits_rf", "digits_rf", 1e-3, 1e-4),
    ("digits_mlp", "digits_mlp", 1e-3, 1e-4),
    ("magika", "magika", 1e-3, 1e-4),
    ("silero_vad", "silero", 1e-3, 1e-4),
    ("silero_vad_sequence", "silero_seq", 1e-3, 1e-4),
    ("minilm_int8", "minilm_int8", 1e-3, 1e-4),
    ("ppocr_cls", "ppocr_cls", 1e-3, 1e-4),
    ("ppocr_rec", "ppocr_rec", 1e-3, 1e-4),
    ("ppocr_det", "ppocr_det", 1e-3, 1e-4),
    ("efficientnet_lite0", "efficientnet_lite0", 1e-3, 1e-4),
    ("efficientnet_lite0_fp16", "efficientnet_lite0_fp16", 1e-2, 1e-2),
    ("efficientnet_lite0_qdq", "efficientnet_lite0_qdq", 1e-3, 1e-4),
];

fn folder(variable: &str) -> PathBuf {
    std::env::var_os(variable).unwrap_or_else(|| panic!("set {variable}")).into()
}

fn selected() -> impl Iterator<Item = &'static (&'static str, &'static str, f64, f64)> {
    let only = std::env::var("PAVAGE_ONLY").unwrap_or_default();
    CASES.iter().filter(move |c| only.is_empty() || only.split(',').any(|o| o == c.0))
}

fn load(name: &str) -> onnx::Model {
    let path = folder("PAVAGE_MODELS").join(format!("{name}.onnx"));
    onnx::load(&path, &Options::default()).unwrap_or_else(|e| panic!("{name}: {e}"))
}

#[test]
#[ignore = "needs the model files"]
fn every_model_imports() {
    let mut bad = 0;
    for (name, ..) in selected() {
        let start = std::time::Instant::now();
        let path = folder("PAVAGE_MODELS").join(format!("{name}.onnx"));
        match onnx::load(&path, &Options::default()) {
            Ok(model) => {
                let checked = verify::verify(&model.graph).map_or_else(|e| format!("does not verify: {e}"), |()| "verifies".into());
                let unattributed =
                    model.graph.nodes().iter().filter(|id| matches!(model.graph[**id].kind, NodeKind::Op(..)) && model.graph[**id].source.is_empty()).count();
                println!("{name}: {} nodes in {:?}, {checked}, {unattributed} without source", model.graph.nodes().len(), start.elapsed());
                bad += usize::from(checked != "verifies" || unattributed > 0);
                model.notes.iter().for_each(|n| println!("    {n}"));
            }
            Err(e) => {
                println!("{name}: {e}");
                bad += 1;
            }
        }
    }
    assert_eq!(bad, 0, "models that do not import or verify");
}

fn read(archive: &mut NpzArchive<BufReader<File>>, name: &str) -> Tensor {
    let npy: NpyFile<_> = archive.by_name(name).unwrap().unwrap_or_else(|| panic!("{name} is not in the archive"));
    let shape: Vec<usize> = npy.shape().iter().map(|d| *d as usize).collect();
    let text = npy.dtype().descr();
    let (dtype, bytes): (DType, Vec<u8>) = if text.contains("f4") {
        (DType::F32, npy.into_vec::<f32>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect())
    } else if text.contains("i8") {
        (DType::I64, npy.into_vec::<i64>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect())
    } else {
        (DType::I32, npy.into_vec::<i32>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect())
    };
    Tensor::new(dtype, shape, bytes).unwrap()
}

#[test]
#[ignore = "needs the model files"]
fn every_model_matches_its_golden_outputs() {
    let mut bad = 0;
    for (name, golden, rtol, atol) in selected() {
        let model = load(name);
        let mut archive = NpzArchive::open(folder("PAVAGE_GOLDEN").join(format!("dev_{golden}.npz"))).unwrap();
        let names: Vec<String> = model
            .graph
            .inputs()
            .iter()
            .map(|id| match &model.graph[*id].kind {
                NodeKind::Input(name) => name.clone(),
                _ => unreachable!("inputs are inputs"),
            })
            .collect();
        let inputs: Vec<Tensor> = names.iter().map(|n| read(&mut archive, &format!("in:{n}"))).collect();
        let start = std::time::Instant::now();
        let outputs = match eval::eval(&model.graph, &inputs) {
            Ok(outputs) => outputs,
            Err(e) => {
                println!("{name}: {e}");
                bad += 1;
                continue;
            }
        };
        for (out, got) in model.graph.outputs.iter().zip(outputs) {
            let want = read(&mut archive, &format!("out:{}", out.name));
            let (a, b) = (got.to_f64(), want.to_f64());
            let close = |(a, b): (&f64, &f64)| (a - b).abs() <= atol + rtol * b.abs();
            let far = a.iter().zip(&b).filter(|(a, b)| !close((a, b))).count();
            let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            let top = |v: &[f64]| v.iter().enumerate().max_by(|x, y| x.1.total_cmp(y.1)).map(|x| x.0);
            println!(
                "{name} {}: {} vs {}, {far} of {} too far, worst {worst:.2e}, top {:?} {:?} ({:.1?})",
                out.name,
                got.ty(),
                want.ty(),
                b.len(),
                top(&a),
                top(&b),
                start.elapsed()
            );
            bad += usize::from(far > 0 || got.shape() != want.shape());
        }
    }
    assert_eq!(bad, 0, "outputs that differ");
}
