//! Small artifacts made by hand, with kernels compiled by `cc`.
#![allow(dead_code, unreachable_pub)]
use pavage_runtime::plan::*;
use pavage_runtime::{Artifact, DType, DimExpr, Tensor, Writer};
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

/// The test kernels as a shared object.
pub fn kernels() -> &'static [u8] {
    static OBJECT: OnceLock<Vec<u8>> = OnceLock::new();
    OBJECT.get_or_init(|| compile("kernels.c"))
}

/// Compiles a C file of this folder.
pub fn compile(file: &str) -> Vec<u8> {
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/common").join(file);
    let folder = folder(file);
    let object = folder.join("kernels.so");
    let status =
        Command::new("cc").args(["-O2", "-shared", "-fPIC", "-nostdlib", "-ffp-contract=off", "-o"]).args([&object, &source]).status().expect("cc runs");
    assert!(status.success());
    let bytes = std::fs::read(&object).unwrap();
    std::fs::remove_dir_all(folder).ok();
    bytes
}

/// A fresh folder for a test's files.
pub fn folder(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("pavage-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path
}

pub fn c(n: i64) -> DimExpr {
    DimExpr::Const(n)
}

pub fn s(n: u32) -> DimExpr {
    DimExpr::Sym(n)
}

pub fn id(n: u32) -> BufferId {
    BufferId(n)
}

pub fn ids(list: &[u32]) -> Vec<BufferId> {
    list.iter().map(|n| BufferId(*n)).collect()
}

pub fn symbol(name: &str, min: i64, max: i64) -> Symbol {
    Symbol { name: name.into(), min, max }
}

pub fn port(name: &str, dtype: DType, dims: &[DimExpr]) -> Port {
    Port { name: name.into(), dtype, dims: dims.to_vec() }
}

pub fn buffer(dtype: DType, dims: &[DimExpr], kind: BufferKind) -> Buffer {
    Buffer { dtype, dims: dims.to_vec(), kind }
}

pub fn floats(dims: &[DimExpr], kind: BufferKind) -> Buffer {
    buffer(DType::F32, dims, kind)
}

pub fn view(of: u32, byte_offset: DimExpr) -> BufferKind {
    BufferKind::View { of: BufferId(of), byte_offset }
}

/// A kernel of `extent` units, dear enough for several threads when there are many.
pub fn kernel(symbol: &str, n_args: u32, n_dims: u32, extent: DimExpr) -> Kernel {
    Kernel {
        name: symbol.into(),
        symbol: symbol.into(),
        n_args,
        n_dims,
        cpu: Some(CpuLaunch { extent, grain: c(4), unit_ps: c(1_000_000), scratch: c(0) }),
        gpu: None,
        provenance: Provenance::default(),
    }
}

pub fn launch(kernel: u32, args: &[u32], dims: &[DimExpr]) -> Step {
    Step::Launch { kernel: KernelId(kernel), args: ids(args), dims: dims.to_vec() }
}

pub fn plan(name: &str, kernels: Vec<Kernel>, body: Body) -> Plan {
    Plan { name: name.into(), target: "x86-64".into(), code: 0, cubin: None, kernels, body, predicted_ns: 0.0 }
}

pub fn manifest(symbols: Vec<Symbol>, inputs: Vec<Port>, outputs: Vec<Port>, plans: Vec<Plan>) -> Manifest {
    Manifest { producer: "test".into(), symbols, inputs, outputs, plans, ..Manifest::default() }
}

/// A writer that holds the test kernels as code 0.
pub fn writer() -> Writer<'static> {
    let mut writer = Writer::new();
    writer.add_code("x86-64", CodeKind::SharedObject, &[], kernels());
    writer
}

pub fn open(manifest: Manifest) -> Artifact {
    let bytes = writer().to_bytes(manifest).unwrap();
    Artifact::from_bytes(&bytes).unwrap()
}

pub fn tensor(shape: &[usize], elements: &[f32]) -> Tensor {
    Tensor::from_slice(shape, elements).unwrap()
}

/// Reproducible numbers between -1 and 1, none of them 0.
pub fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f32 + 0.5) / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// `y = relu(a + b) * w` over `[n x m]`, m = 8: fused, and one kernel an op.
pub fn small_model() -> (Writer<'static>, Manifest) {
    let shape = [s(0), c(8)];
    let all = DimExpr::Mul(vec![s(0), c(8)]);
    let mut writer = writer();
    let w = writer.add_tensor("w", DType::F32, &[1], 2.5f32.to_le_bytes().to_vec());
    let io = || {
        vec![
            floats(&shape, BufferKind::Input(0)),
            floats(&shape, BufferKind::Input(1)),
            floats(&[c(1)], BufferKind::Const(w)),
            floats(&shape, BufferKind::Output(0)),
        ]
    };
    let fused = Body { buffers: io(), steps: vec![launch(0, &[0, 1, 2, 3], &[])], inputs: ids(&[0, 1]), outputs: ids(&[3]) };
    let mut buffers = io();
    buffers.push(floats(&shape, BufferKind::Arena));
    buffers.push(floats(&shape, BufferKind::Arena));
    let unfused = Body {
        buffers,
        steps: vec![launch(0, &[0, 1, 4], &[]), launch(1, &[4, 5], &[]), launch(2, &[5, 2, 3], &[])],
        inputs: ids(&[0, 1]),
        outputs: ids(&[3]),
    };
    let plans = vec![
        plan("fused", vec![kernel("add_relu_scale", 4, 0, all.clone())], fused),
        plan("unfused", vec![kernel("add", 3, 0, all.clone()), kernel("relu", 2, 0, all.clone()), kernel("scale", 3, 0, all)], unfused),
    ];
    let manifest =
        manifest(vec![symbol("n", 1, 10_000)], vec![port("a", DType::F32, &shape), port("b", DType::F32, &shape)], vec![port("y", DType::F32, &shape)], plans);
    (writer, manifest)
}

pub fn small_model_expects(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| (a + b).max(0.0) * 2.5).collect()
}
