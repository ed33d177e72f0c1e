//! `pavage compare` finds planted faults: damage in the constants of one kernel, and one kernel compiled from wrong ops.
mod support;

use pavage::bisect::{Finding, Suspect, Twin, bisect};
use pavage::{Artifact, CompileOptions, Device, Options, Source, Tensor, compile};
use std::path::Path;
use support::{folder, pavage, root};

const DIGITS: &str = "examples/models/digits.onnx";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A copy of an artifact in which a constant of a launch in the middle of the fused plan is damaged. Gives the kernel's name.
fn damage(artifact: &Path, copy: &Path) -> String {
    use pavage::runtime::plan::{BufferKind, Step, TensorData};
    let opened = Artifact::open(artifact).unwrap();
    let manifest = opened.manifest();
    let plan = manifest.plans.iter().find(|p| p.name == "fused").unwrap();
    let launches = plan.body.steps.iter().filter_map(|s| match s {
        Step::Launch { kernel, args, .. } => Some((*kernel, args)),
        _ => None,
    });
    let mut constants = launches.filter_map(|(kernel, args)| {
        let constant = args.iter().find_map(|a| match plan.body.buffers[a.index()].kind {
            BufferKind::Const(n) if manifest.tensors[n as usize].shape.iter().product::<u64>() > 64 => Some(n),
            _ => None,
        })?;
        Some((kernel, constant))
    });
    let (kernel, constant) = constants.nth(1).expect("a second kernel with weights");
    let TensorData::Embedded { segment, offset, len } = &manifest.tensors[constant as usize].data else { panic!("weights are embedded") };
    let start = (opened.segments()[*segment as usize].offset + offset) as usize;
    let mut bytes = std::fs::read(artifact).unwrap();
    for x in bytes[start..start + *len as usize].chunks_exact_mut(4) {
        let value = f32::from_le_bytes(x.try_into().unwrap());
        x.copy_from_slice(&(value * 1.5).to_le_bytes());
    }
    std::fs::write(copy, bytes).unwrap();
    plan.kernels[kernel.index()].name.clone()
}

#[test]
fn a_right_model_compares_equal() {
    let report = pavage(["compare", DIGITS, "--ref", "evaluator", "--bisect", "--json"]).exits(0).json();
    assert_eq!(report["ok"], true);
    assert!(report["bisect"].is_null());
    pavage(["compare", DIGITS, "--ref", "nonesuch.npz"]).exits(1).says(&["nonesuch.npz"]);
}

#[test]
fn a_damaged_constant_is_found_proved_and_reproduced() {
    let dir = folder("compare");
    let (whole, damaged, graph) = (dir.join("whole.pav"), dir.join("damaged.pav"), dir.join("culprit.ir"));
    pavage(["compile", DIGITS, "-o", text(&whole), "--shape", "n=3"]).exits(0);
    let planted = damage(&whole, &damaged);
    pavage(["compare", DIGITS, "--artifact", text(&whole), "--ref", "evaluator"]).exits(0);

    let args = ["compare", DIGITS, "--artifact", text(&damaged), "--ref", "evaluator", "--bisect", "--reproducer", text(&graph)];
    let ran = pavage(args.into_iter().chain(["--json"])).exits(3);
    let found = &ran.json()["bisect"];
    assert_eq!(found["kernel"], planted.as_str(), "{found}");
    assert_eq!((&found["healed"], &found["twin"], &found["anew"]), (&true.into(), &"unfused".into(), &"right".into()), "{found}");
    assert_eq!(found["others"].as_array().unwrap().len(), 0, "{found}");
    // The reproducer is a model of its own with its case: compiled anew, it is right.
    pavage(["compare", text(&graph), "--ref", text(&graph.with_extension("npz"))]).exits(0);
    let told = pavage(args).exits(3).stdout;
    assert!(told.contains(&planted) && told.contains("the outputs are right"), "{told}");
}

#[test]
fn an_artifact_of_another_model_is_refused() {
    let dir = folder("stranger");
    let (model, artifact, case) = (dir.join("other.ir"), dir.join("digits.pav"), dir.join("case.npz"));
    std::fs::copy(root().join("tests/cases/optimize/cnn.ir"), &model).unwrap();
    pavage(["compile", DIGITS, "-o", text(&artifact)]).exits(0);
    let mut npz = npyz::npz::NpzWriter::create(&case).unwrap();
    for (name, shape, data) in [("in:image", vec![1u64, 1, 8, 8], vec![0.5f32; 64]), ("out:logits", vec![1, 10], vec![1.0; 10])] {
        use npyz::WriterBuilder;
        let mut array = npz.array(name, Default::default()).unwrap().default_dtype().shape(&shape).begin_nd().unwrap();
        array.extend(data).unwrap();
        array.finish().unwrap();
    }
    drop(npz);
    pavage(["compare", text(&model), "--artifact", text(&artifact), "--ref", text(&case), "--bisect"]).exits(1).says(&["another model"]);
}

/// One kernel's code computes something else: the artifact is compiled from a graph that differs in one op, and carries
/// the hash of the right one, as a wrong kernel would.
#[test]
fn a_wrong_kernel_is_found() {
    let right = std::fs::read_to_string(root().join("tests/cases/optimize/cnn.ir")).unwrap();
    let wrong = right.replace("%logits = add %gemm, %gbb", "%logits = sub %gemm, %gbb");
    assert_ne!(right, wrong);
    let options = CompileOptions { targets: vec!["x86-64-v3".into()], ..CompileOptions::default() };
    let good = compile(Source::Ir(&right), &options).unwrap().open().unwrap();
    let bad = compile(Source::Ir(&wrong), &options).unwrap().artifact;
    // The same plan but for that kernel's name and code.
    let hash = |a: &Artifact| a.manifest().input_hash.clone();
    let opened = Artifact::from_bytes(&bad).unwrap();
    let mut manifest = opened.manifest().clone();
    manifest.input_hash = hash(&good);
    for (plan, named) in manifest.plans.iter_mut().zip(&good.manifest().plans) {
        plan.kernels.iter_mut().zip(&named.kernels).for_each(|(k, right)| k.name = right.name.clone());
    }
    let mut writer = pavage::runtime::Writer::new();
    for (n, entry) in opened.manifest().tensors.iter().enumerate() {
        writer.add_tensor(&entry.name, entry.dtype, &entry.shape, opened.tensor(n).to_vec());
    }
    for code in &opened.manifest().codes {
        let segment = &opened.segments()[code.segment as usize];
        let bytes = bad[segment.offset as usize..(segment.offset + segment.len) as usize].to_vec();
        writer.add_code(&code.target, code.kind, &code.features, bytes);
    }
    let artifact = Artifact::from_bytes(&writer.to_bytes(manifest).unwrap()).unwrap();

    let image: Vec<f32> = (0..128).map(|i| (i * 37 % 64) as f32 / 64.0).collect();
    let inputs = [("image".to_string(), Tensor::from_slice(&[2, 1, 8, 8], &image).unwrap())];
    let expected = pavage::bisect::reference(Source::Ir(&right), &[], &inputs).unwrap();
    let want: Vec<f32> = expected[0].1.as_slice().unwrap().to_vec();
    let accepts = |outputs: &pavage::runtime::Outputs| {
        let got = outputs[0].as_slice::<f32>().unwrap();
        got.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 1e-4)
    };
    let options = Options::default();
    let suspect = Suspect { model: Source::Ir(&right), artifact: &artifact, device: Device::Cpu, options: &options, inputs: &inputs, accepts: &accepts };
    let Finding::Kernel(culprit) = bisect(&suspect).unwrap() else { panic!("no kernel was found") };
    assert_eq!(culprit.kernel, "matmul_add");
    assert!(culprit.healed && culprit.twin == Twin::Unfused);
    assert!(culprit.reproducer.unwrap().anew.is_none());
}
