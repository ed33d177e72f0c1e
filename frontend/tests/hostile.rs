//! Files that are wrong: each gives a clear error, and none a panic, a hang or an allocation.
mod common;
use common::*;
use onnx_protobuf::{FunctionProto, OperatorSetIdProto, StringStringEntryProto, TensorProto};
use pavage_frontend::{
    Error,
    onnx::{self, Options},
};
use std::{fs, path::PathBuf};

/// `y = x + w`.
fn plain() -> onnx_protobuf::ModelProto {
    let nodes = vec![node("Add", &["x", "w"], &["y"])];
    model(17, graph(nodes, vec![value("x", F32, vec![Named("n"), Is(2)])], &["y"], vec![floats("w", &[2], &[1.0, 2.0])]))
}

fn error(model: &onnx_protobuf::ModelProto) -> Error {
    import(model).expect_err("this model is wrong")
}

#[track_caller]
fn says(model: &onnx_protobuf::ModelProto, parts: &[&str]) {
    let text = error(model).to_string();
    for part in parts {
        assert!(text.contains(part), "`{text}` does not say `{part}`");
    }
}

#[test]
fn truncated_files_are_refused_at_every_length() {
    let whole = bytes(&plain());
    assert!(onnx::load_bytes(&whole, &Options::default()).is_ok());
    for end in 0..whole.len() {
        // A cut between two fields leaves a well-formed prefix, which then lacks something.
        assert!(onnx::load_bytes(&whole[..end], &Options::default()).is_err(), "cut at {end}");
    }
}

#[test]
fn other_formats_are_refused() {
    for junk in [&b""[..], b"\0", b"GGUF\x03\0\0\0", b"PK\x03\x04 not a model", b"{\"json\": true}"] {
        assert!(matches!(onnx::load_bytes(junk, &Options::default()), Err(Error::Format { .. } | Error::Opset { .. })), "{junk:?}");
    }
}

#[test]
fn flipped_bytes_never_panic() {
    let whole = bytes(&plain());
    let mut branch = plain();
    let body = |name: &str| graph(vec![node("Neg", &["x"], &[name])], vec![], &[name], vec![]);
    branch.graph.as_mut().unwrap().node.push(node("If", &["c"], &["z"]).graph("then_branch", body("a")).graph("else_branch", body("b")));
    branch.graph.as_mut().unwrap().input.push(value("c", BOOL, vec![]));
    for seed in [whole, bytes(&branch)] {
        for at in 0..seed.len() {
            for flip in [1u8, 2, 0x10, 0x80, 0xff] {
                let mut bytes = seed.clone();
                bytes[at] ^= flip;
                let _ = onnx::load_bytes(&bytes, &Options::default());
            }
        }
    }
}

#[test]
fn a_huge_tensor_in_a_small_file_is_refused() {
    let mut m = plain();
    m.graph.as_mut().unwrap().initializer[0].dims = vec![1 << 29];
    says(&m, &["tensor `w`", "2147483648 bytes", "got 8"]);
    // Its bits wrap around to those of the two elements there are.
    m.graph.as_mut().unwrap().initializer[0].dims = vec![(1 << 59) + 2];
    says(&m, &["tensor `w`", "got 8"]);
    m.graph.as_mut().unwrap().initializer[0].dims = vec![1 << 40, 1 << 40];
    says(&m, &["tensor `w`", "too many elements"]);
    m.graph.as_mut().unwrap().initializer[0].dims = vec![-2];
    says(&m, &["tensor `w`", "negative extent"]);
    let mut m = plain();
    m.graph.as_mut().unwrap().initializer[0] = TensorProto { name: "w".into(), dims: vec![1 << 29], data_type: F32, ..Default::default() };
    says(&m, &["tensor `w`", "no data"]);
}

#[test]
fn unknown_element_types_are_named() {
    let mut m = plain();
    m.graph.as_mut().unwrap().initializer[0].data_type = 77;
    says(&m, &["[w]", "unknown element type 77"]);
}

#[test]
fn huge_constants_made_from_sizes_stay_sizes() {
    // A broadcast of one element: nothing is allocated at import.
    let nodes = vec![node("ConstantOfShape", &["s"], &["y"])];
    let m = model(17, graph(nodes.clone(), vec![], &["y"], vec![ints("s", &[3], &[1 << 20, 1 << 20, 1 << 20])]));
    assert!(import(&m).is_ok() || matches!(error(&m), Error::Node { .. }));
    // Integers too, which are followed as sizes where they are few.
    let m = model(17, graph(vec![nodes[0].clone().tensor("value", ints("", &[1], &[7]))], vec![], &["y"], vec![ints("s", &[2], &[1 << 20, 1 << 19])]));
    assert!(import(&m).is_ok());
}

#[test]
fn cycles_are_named() {
    let nodes = vec![node("Add", &["x", "c"], &["a"]), node("Neg", &["a"], &["b"]), node("Exp", &["b"], &["c"])];
    let m = model(17, graph(nodes, vec![value("x", F32, vec![Is(2)])], &["c"], vec![]));
    let Error::Cycle(names) = error(&m) else { panic!("not a cycle: {}", error(&m)) };
    assert_eq!(names.len(), 4);
    assert_eq!(names[0], names[3]);
    says(&m, &["cycle", "Add_a", "Neg_b", "Exp_c"]);
    let m = model(17, graph(vec![node("Neg", &["a"], &["a"])], vec![], &["a"], vec![]));
    says(&m, &["cycle", "Neg_a"]);
}

#[test]
fn missing_and_repeated_names_are_named() {
    let mut m = plain();
    m.graph.as_mut().unwrap().initializer.clear();
    says(&m, &["Add_y", "reads `w`"]);
    let mut m = plain();
    m.graph.as_mut().unwrap().output[0].name = "z".into();
    says(&m, &["`z`"]);
    let mut m = plain();
    m.graph.as_mut().unwrap().node.push(node("Neg", &["x"], &["y"]));
    says(&m, &["`y` is defined twice"]);
    let mut m = plain();
    m.graph.as_mut().unwrap().initializer.push(floats("w", &[1], &[1.0]));
    says(&m, &["`w` is defined twice"]);
    let mut m = plain();
    let output = m.graph.output[0].clone();
    m.graph.as_mut().unwrap().output.push(output);
    says(&m, &["`y` is defined twice"]);
}

#[test]
fn opsets_outside_the_range_name_it() {
    for version in [0, 29, 9999, -1] {
        let mut m = plain();
        m.opset_import[0].version = version;
        says(&m, &[&version.to_string(), "1 to 28"]);
    }
    let mut m = plain();
    m.opset_import.clear();
    says(&m, &["operator set"]);
}

#[test]
fn everything_unsupported_is_listed_at_once() {
    let mut odd = node("Frobnicate", &["y"], &["p"]);
    odd.domain = "com.example".into();
    let nodes = vec![
        node("Add", &["x", "w"], &["y"]),
        odd,
        node("NoSuchOp", &["y"], &["q"]),
        node("NoSuchOp", &["q"], &["r"]),
        node("Einstein", &["r", "p"], &["s"]),
        node("Relu", &["s"], &["t"]),
    ];
    let m = model(17, graph(nodes, vec![value("x", F32, vec![Is(2)])], &["t"], vec![floats("w", &[2], &[1.0, 2.0])]));
    let Error::Unsupported(problems) = error(&m) else { panic!("{}", error(&m)) };
    assert_eq!(problems.len(), 3);
    assert_eq!((problems[1].op.as_str(), problems[1].count, problems[1].nodes.len()), ("NoSuchOp", 2, 2));
    says(&m, &["needs 3 things", "com.example::Frobnicate", "the operator domain", "ai.onnx::NoSuchOp (opset 17, 2x)", "Einstein_s"]);
}

#[test]
fn operators_newer_than_the_operator_set_are_refused() {
    let mut m = model(13, graph(vec![node("Gelu", &["x"], &["y"])], vec![value("x", F32, vec![Is(2)])], &["y"], vec![]));
    says(&m, &["Gelu", "before operator set 20"]);
    m.opset_import[0].version = 20;
    assert!(import(&m).is_ok());
}

#[test]
fn broken_nodes_are_named() {
    let m = model(17, graph(vec![node("Add", &["x", "w"], &["y"])], vec![value("x", F32, vec![Is(3)])], &["y"], vec![floats("w", &[2], &[1.0, 2.0])]));
    says(&m, &["Add_y", "3", "2"]);
    let m = model(17, graph(vec![node("Softmax", &["x"], &["y"]).int("axis", 5)], vec![value("x", F32, vec![Is(3)])], &["y"], vec![]));
    says(&m, &["Softmax_y", "axis 5"]);
    let m = model(17, graph(vec![node("Softmax", &["x"], &["y"]).text("axis", "one")], vec![value("x", F32, vec![Is(3)])], &["y"], vec![]));
    says(&m, &["Softmax_y", "`axis`", "wrong type"]);
    let m = model(17, graph(vec![node("Add", &["x"], &["y"])], vec![value("x", F32, vec![Is(3)])], &["y"], vec![]));
    says(&m, &["Add_y", "operand 1 is missing"]);
    let slice = node("Slice", &["x", "s", "e", "a", "t"], &["y"]);
    let extremes = |name: &str, v: i64| ints(name, &[1], &[v]);
    for (s, e, t) in [(i64::MIN, i64::MAX, 1), (i64::MAX, i64::MIN, -1), (i64::MIN, i64::MIN, i64::MIN), (0, 1, 0), (i64::MAX, i64::MAX, i64::MAX)] {
        let inits = vec![extremes("s", s), extremes("e", e), extremes("a", 0), extremes("t", t)];
        let m = model(17, graph(vec![slice.clone()], vec![value("x", F32, vec![Named("n")])], &["y"], inits));
        let _ = import(&m);
    }
}

#[test]
fn nesting_is_bounded() {
    let mut body = graph(vec![node("Neg", &["x"], &["y"])], vec![], &["y"], vec![]);
    for _ in 0..200 {
        let other = graph(vec![node("Exp", &["x"], &["y"])], vec![], &["y"], vec![]);
        body = graph(vec![node("If", &["c"], &["y"]).graph("then_branch", body).graph("else_branch", other)], vec![], &["y"], vec![]);
    }
    body.input = vec![value("x", F32, vec![Is(2)]), value("c", BOOL, vec![])];
    says(&model(17, body), &["deep"]);
}

#[test]
fn functions_that_call_themselves_or_explode_are_refused() {
    let function = |name: &str, nodes| FunctionProto {
        name: name.into(),
        domain: "f".into(),
        input: vec!["a".into()],
        output: vec!["z".into()],
        node: nodes,
        opset_import: vec![
            OperatorSetIdProto { version: 17, ..Default::default() },
            OperatorSetIdProto { domain: "f".into(), version: 1, ..Default::default() },
        ],
        ..Default::default()
    };
    let call = |name: &str, input: &str, output: &str| {
        let mut n = node(name, &[input], &[output]);
        n.domain = "f".into();
        n
    };
    let x = || vec![value("x", F32, vec![Is(2)])];
    let mut m = model(17, graph(vec![call("own", "x", "y")], x(), &["y"], vec![]));
    m.functions = vec![function("own", vec![call("own", "a", "z")])];
    says(&m, &["deep"]);
    // Forty functions, each calling the next twice: 2^40 nodes.
    let mut m = model(17, graph(vec![call("f0", "x", "y")], x(), &["y"], vec![]));
    m.functions = (0..40).map(|i| function(&format!("f{i}"), vec![call(&format!("f{}", i + 1), "a", "b"), call(&format!("f{}", i + 1), "b", "z")])).collect();
    m.functions.push(function("f40", vec![node("Identity", &["a"], &["z"])]));
    assert!(matches!(error(&m), Error::Limit(_)));
}

/// A folder that goes away.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("pavage-{name}-{}", std::process::id()));
        fs::create_dir_all(path.join("model")).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn external(entries: &[(&str, &str)]) -> onnx_protobuf::ModelProto {
    let mut m = plain();
    let w = &mut m.graph.as_mut().unwrap().initializer[0];
    w.raw_data.clear();
    w.data_location = protobuf::EnumOrUnknown::from_i32(1);
    w.external_data = entries.iter().map(|(k, v)| StringStringEntryProto { key: k.to_string(), value: v.to_string(), ..Default::default() }).collect();
    m
}

#[test]
fn external_data_stays_in_the_models_folder() {
    let folder = Folder::new("external");
    let inside = folder.0.join("model");
    let data: Vec<u8> = [0.0f32, 3.0, 4.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    fs::write(inside.join("w.bin"), &data).unwrap();
    fs::write(folder.0.join("secret.bin"), &data).unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink(folder.0.join("secret.bin"), inside.join("link.bin")).unwrap();
    let load = |entries: &[(&str, &str)]| {
        let path = inside.join("m.onnx");
        fs::write(&path, bytes(&external(entries))).unwrap();
        onnx::load(&path, &Options::default())
    };
    let good = load(&[("location", "w.bin"), ("offset", "4"), ("length", "8")]).unwrap();
    let x = pavage_ir::Tensor::from_f32([1, 2], &[10.0, 20.0]);
    assert_eq!(pavage_ir::eval::eval(&good.graph, &[x]).unwrap()[0].to_f64(), [13.0, 24.0]);
    let absolute = folder.0.join("secret.bin");
    for (entries, reason) in [
        (vec![("location", absolute.to_str().unwrap())], "absolute path"),
        (vec![("location", "../secret.bin")], "leaves the model's folder"),
        (vec![("location", "a/../../secret.bin")], "leaves the model's folder"),
        #[cfg(unix)]
        (vec![("location", "link.bin")], "symlink"),
        (vec![("location", "none.bin")], "cannot be read"),
        (vec![("location", ".")], "cannot be read"),
        (vec![("location", "")], "no location"),
        (vec![], "no location"),
        (vec![("location", "w.bin"), ("offset", "8"), ("length", "8")], "12 bytes"),
        (vec![("location", "w.bin"), ("offset", "18446744073709551615")], "12 bytes"),
        (vec![("location", "w.bin"), ("length", "4")], "does not fit"),
        (vec![("location", "w.bin"), ("offset", "-4")], "not a byte count"),
    ] {
        let error = load(&entries).err().unwrap_or_else(|| panic!("{entries:?} was read"));
        assert!(matches!(error, Error::ExternalData { .. }), "{entries:?}: {error}");
        assert!(error.to_string().contains(reason), "{entries:?}: {error}");
    }
    // From memory there is no folder to read from.
    let error = import(&external(&[("location", "w.bin")])).err().unwrap();
    assert!(matches!(error, Error::ExternalData { .. }), "{error}");
}

#[test]
fn requests_that_do_not_fit_are_refused() {
    let load = |options: Options| onnx::load_bytes(&bytes(&plain()), &options);
    let shapes = |name: &str, v| Options { shapes: [(name.to_string(), v)].into(), ..Default::default() };
    let input = |name: &str, v: &[i64]| Options { input_shapes: [(name.to_string(), v.to_vec())].into(), ..Default::default() };
    assert_eq!(load(shapes("n", 5)).unwrap().graph.symbols(), []);
    assert_eq!(load(input("x", &[5, 2])).unwrap().graph.symbols(), []);
    for (options, part) in [
        (shapes("m", 5), "no size is called `m`; this model has: n"),
        (shapes("n", 0), "at least 1"),
        (input("y", &[5, 2]), "no input is called `y`; this model has: x"),
        (input("x", &[5]), "2 axes"),
        (input("x", &[5, 3]), "axis 1 is 2"),
        (input("x", &[-1, 2]), "at least 1"),
    ] {
        let error = load(options).expect_err("does not fit");
        assert!(matches!(error, Error::Request(_)), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

/// Longer than a unit test: every node test of the ONNX project (see `nodes.rs`) with bytes changed at random, for
/// `PAVAGE_SECONDS`. A file that panics is kept; `PAVAGE_LAST` names where each is kept before it is tried.
#[test]
#[ignore = "needs the test files"]
fn mutated_node_tests_never_panic() {
    let root: PathBuf = std::env::var_os("PAVAGE_NODES").expect("set PAVAGE_NODES").into();
    let seconds: u64 = std::env::var("PAVAGE_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    let mut names: Vec<_> = fs::read_dir(root).unwrap().map(|e| e.unwrap().path().join("model.onnx")).collect();
    names.sort();
    let (start, mut state, mut runs) = (std::time::Instant::now(), 0x1234_5678_9abc_def1u64, 0usize);
    let mut next = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as usize % n.max(1)
    };
    while start.elapsed().as_secs() < seconds {
        let path = &names[next(names.len())];
        let seed = fs::read(path).unwrap();
        for _ in 0..20 {
            let mut bytes = seed.clone();
            for _ in 0..=next(4) {
                let at = next(bytes.len());
                match next(4) {
                    0 => bytes[at] = next(256) as u8,
                    1 => bytes[at] ^= 1 << next(8),
                    2 => {
                        bytes.remove(at);
                    }
                    _ => bytes.insert(at, [0, 1, 0x7f, 0x80, 0xff][next(5)]),
                }
            }
            let before = std::time::Instant::now();
            if let Some(last) = std::env::var_os("PAVAGE_LAST") {
                fs::write(last, &bytes).unwrap();
            }
            let outcome = std::panic::catch_unwind(|| onnx::load_bytes(&bytes, &Options::default()).is_ok());
            if outcome.is_err() || before.elapsed().as_secs() > 5 {
                let kept = std::env::temp_dir().join(format!("pavage-crash-{runs}.onnx"));
                fs::write(&kept, &bytes).unwrap();
                panic!("{} mutated: {}, after {:?}", path.display(), kept.display(), before.elapsed());
            }
            runs += 1;
        }
    }
    println!("{runs} mutated models");
}
