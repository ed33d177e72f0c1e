//! The node tests of the ONNX project through the reference evaluator. Needs them as files, one folder a test with
//! `model.onnx` and `test_data_set_N/{input,output}_i.pb`: set `PAVAGE_NODES` and run with `--ignored`.
use onnx_protobuf::{Message, TensorProto};
use pavage_frontend::onnx::{self, Options};
use pavage_ir::{DType, NodeKind, Tensor, eval};
use std::{
    collections::BTreeMap,
    panic::catch_unwind,
    path::{Path, PathBuf},
};

fn tensor(path: &Path) -> Option<(String, Tensor)> {
    let proto = TensorProto::parse_from_bytes(&std::fs::read(path).ok()?).ok()?;
    let dtype = match proto.data_type {
        1 => DType::F32,
        2 => DType::U8,
        3 => DType::I8,
        4 => DType::U16,
        5 => DType::I16,
        6 => DType::I32,
        7 => DType::I64,
        9 => DType::Bool,
        10 => DType::F16,
        11 => DType::F64,
        12 => DType::U32,
        13 => DType::U64,
        16 => DType::BF16,
        17 => DType::F8E4M3,
        18 => DType::F8E4M3Fnuz,
        19 => DType::F8E5M2,
        20 => DType::F8E5M2Fnuz,
        21 => DType::U4,
        22 => DType::I4,
        23 => DType::F4E2M1,
        24 => DType::F8E8M0,
        25 => DType::U2,
        26 => DType::I2,
        _ => return None,
    };
    let shape: Vec<usize> = proto.dims.iter().map(|d| *d as usize).collect();
    let mut bytes = proto.raw_data.clone();
    if bytes.is_empty() {
        let width = dtype.bits().div_ceil(8);
        bytes.extend(proto.float_data.iter().flat_map(|v| v.to_le_bytes()));
        bytes.extend(proto.double_data.iter().flat_map(|v| v.to_le_bytes()));
        bytes.extend(proto.int64_data.iter().flat_map(|v| v.to_le_bytes()));
        bytes.extend(proto.int32_data.iter().flat_map(|v| v.to_le_bytes()[..width.min(4)].to_vec()));
        bytes.extend(proto.uint64_data.iter().flat_map(|v| v.to_le_bytes()[..width].to_vec()));
    }
    Some((proto.name.clone(), Tensor::new(dtype, shape, bytes).ok()?))
}

/// `Ok`, or a class of failure and what it says.
fn run(folder: &Path) -> Result<(), (&'static str, String)> {
    let model = onnx::load(&folder.join("model.onnx"), &Options::default()).map_err(|e| match e {
        pavage_frontend::Error::Unsupported(_) => ("unsupported", e.to_string().lines().skip(1).collect::<Vec<_>>().join(";")),
        e => ("rejected", e.to_string()),
    })?;
    let meta = std::fs::read_to_string(folder.join("meta.json")).unwrap_or_default();
    let number = |key: &str, default: f64| {
        let at = meta.find(&format!("\"{key}\": ")).map(|i| &meta[i + key.len() + 4..]);
        at.and_then(|t| t[..t.find([',', '}']).unwrap_or(0)].parse().ok()).unwrap_or(default)
    };
    let (rtol, atol) = (number("rtol", 1e-3), number("atol", 1e-7));
    for set in (0..).map(|i| folder.join(format!("test_data_set_{i}"))).take_while(|p| p.exists()) {
        let mut inputs = vec![];
        let proto = onnx_protobuf::ModelProto::parse_from_bytes(&std::fs::read(folder.join("model.onnx")).unwrap()).unwrap();
        for id in model.graph.inputs() {
            let NodeKind::Input(name) = &model.graph[*id].kind else { continue };
            // Sequences and optionals are several inputs: tests/onnx.rs runs them.
            let Some(at) = proto.graph.input.iter().position(|i| &i.name == name) else { return Err(("data", format!("input {name}"))) };
            let Some((_, t)) = tensor(&set.join(format!("input_{at}.pb"))) else { return Err(("data", format!("input {at}"))) };
            inputs.push(t);
        }
        let outputs = eval::eval(&model.graph, &inputs).map_err(|e| ("evaluation", e.to_string()))?;
        for (out, got) in model.graph.outputs.iter().zip(outputs) {
            let Some(at) = proto.graph.output.iter().position(|o| o.name == out.name) else { return Err(("data", format!("output {}", out.name))) };
            let Some((_, want)) = tensor(&set.join(format!("output_{at}.pb"))) else { return Err(("data", format!("output {at}"))) };
            if got.ty() != want.ty() {
                return Err(("wrong", format!("{} is {}, should be {}", out.name, got.ty(), want.ty())));
            }
            let (a, b) = (got.to_f64(), want.to_f64());
            // As the suite's own runner has it.
            let rtol = if want.dtype() == DType::BF16 { rtol.max(1.0 / 64.0) } else { rtol };
            let close = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= atol + rtol * b.abs();
            if let Some(i) = (0..a.len()).find(|i| !close(a[*i], b[*i])) {
                let far = (0..a.len()).filter(|i| !close(a[*i], b[*i])).count();
                return Err(("wrong", format!("{}[{i}] is {}, should be {} ({far} of {})", out.name, a[i], b[i], a.len())));
            }
        }
        if model.graph.outputs.len() < proto.graph.output.len() {
            return Err(("unsupported", "an output was left out".into()));
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs the test files"]
fn node_tests() {
    let root: PathBuf = std::env::var_os("PAVAGE_NODES").expect("set PAVAGE_NODES").into();
    let only = std::env::var("PAVAGE_ONLY").unwrap_or_default();
    let mut names: Vec<_> = std::fs::read_dir(&root).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let mut failures: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut passed = 0;
    for name in names.iter().filter(|n| only.is_empty() || n.contains(&only)) {
        let outcome = catch_unwind(|| run(&root.join(name))).unwrap_or_else(|_| Err(("panic", "panicked".into())));
        match outcome {
            Ok(()) => passed += 1,
            Err((class, why)) => failures.entry(class).or_default().push(format!("{name}: {why}")),
        }
    }
    for (class, list) in &failures {
        list.iter().for_each(|line| println!("{class} {line}"));
    }
    let counts: Vec<_> = failures.iter().map(|(class, list)| format!("{} {class}", list.len())).collect();
    println!("{passed} passed, {}", counts.join(", "));
    assert!(!failures.contains_key("wrong") && !failures.contains_key("panic"), "wrong results");
}
