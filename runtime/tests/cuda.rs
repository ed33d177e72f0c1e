//! The CUDA device on a real GPU, with PTX written by hand. Where there is none, the tests say so
//! and check the error instead.
#![cfg(feature = "cuda")]
mod common;
use common::*;
use pavage_runtime::plan::*;
use pavage_runtime::{Artifact, DType, Device, DimExpr, Error, Graphs, Options, Tensor, Writer};

const PTX: &str = r#"
.version 7.8
.target sm_80
.address_size 64

// o[i] = a[i] + b[i] for i < n, one thread an element.
.visible .entry add(.param .u64 a, .param .u64 b, .param .u64 o, .param .u64 n) {
    .reg .pred %p;
    .reg .b32 %r<4>;
    .reg .b64 %d<8>;
    .reg .f32 %f<3>;
    mov.u32 %r0, %ctaid.x;
    mov.u32 %r1, %ntid.x;
    mov.u32 %r2, %tid.x;
    mad.lo.u32 %r3, %r0, %r1, %r2;
    cvt.u64.u32 %d0, %r3;
    ld.param.u64 %d1, [n];
    setp.ge.u64 %p, %d0, %d1;
    @%p ret;
    shl.b64 %d2, %d0, 2;
    ld.param.u64 %d3, [a];
    ld.param.u64 %d4, [b];
    ld.param.u64 %d5, [o];
    add.u64 %d3, %d3, %d2;
    add.u64 %d4, %d4, %d2;
    add.u64 %d5, %d5, %d2;
    ld.global.f32 %f0, [%d3];
    ld.global.f32 %f1, [%d4];
    add.f32 %f2, %f0, %f1;
    st.global.f32 [%d5], %f2;
    ret;
}

// o[0] = a[0] < b[0], through dynamic shared memory.
.extern .shared .align 16 .b8 room[];
.visible .entry less(.param .u64 a, .param .u64 b, .param .u64 o) {
    .reg .pred %p;
    .reg .b32 %r<2>;
    .reg .b64 %d<3>;
    .reg .f32 %f<2>;
    ld.param.u64 %d0, [a];
    ld.param.u64 %d1, [b];
    ld.param.u64 %d2, [o];
    ld.global.f32 %f0, [%d0];
    st.shared.f32 [room+65532], %f0;
    ld.shared.f32 %f0, [room+65532];
    ld.global.f32 %f1, [%d1];
    setp.lt.f32 %p, %f0, %f1;
    selp.u32 %r0, 1, 0, %p;
    st.global.u8 [%d2], %r0;
    ret;
}
"#;

fn gpu_kernel(symbol: &str, n_args: u32, n_dims: u32, threads: DimExpr, smem: u32) -> Kernel {
    let blocks = DimExpr::FloorDiv(DimExpr::Add(vec![threads, c(127)]).into(), c(128).into());
    Kernel {
        cpu: None,
        gpu: Some(GpuLaunch {
            grid: [blocks, c(1), c(1)],
            block: [if smem > 0 { 1 } else { 128 }, 1, 1],
            cluster: [1, 1, 1],
            smem,
            tensor_maps: vec![],
            pdl: false,
        }),
        ..kernel(symbol, n_args, n_dims, c(0))
    }
}

fn gpu_plan(name: &str, kernels: Vec<Kernel>, body: Body) -> Plan {
    Plan { target: "sm_80".into(), ..plan(name, kernels, body) }
}

/// y = (a + b) + w, z = a + a: two intermediate buffers, one constant.
/// `branch`: y = a + b if a[0] < b[0], else b + b.
fn model(ptx: &str) -> Artifact {
    let mut writer = Writer::new();
    writer.add_code("sm_80", CodeKind::Ptx, &[], ptx.as_bytes().to_vec());
    let w: Vec<u8> = noise(77, 1000).iter().flat_map(|v| v.to_le_bytes()).collect();
    let w = writer.add_tensor("w", DType::F32, &[1000], w);
    let io = || vec![floats(&[s(0)], BufferKind::Input(0)), floats(&[s(0)], BufferKind::Input(1)), floats(&[s(0)], BufferKind::Output(0))];
    let mut buffers = io();
    buffers.push(floats(&[s(0)], BufferKind::Arena));
    buffers.push(floats(&[c(1000)], BufferKind::Const(w)));
    buffers.push(floats(&[s(0)], BufferKind::Arena));
    let straight = Body {
        buffers,
        steps: vec![launch(0, &[0, 1, 3], &[s(0)]), launch(0, &[3, 4, 2], &[s(0)]), launch(0, &[0, 0, 5], &[s(0)])],
        inputs: ids(&[0, 1]),
        // The second is no output buffer: copied at the end.
        outputs: ids(&[2, 5]),
    };
    let side = |from: [u32; 2]| Body {
        buffers: vec![floats(&[s(0)], BufferKind::Captured(id(0))), floats(&[s(0)], BufferKind::Captured(id(1))), floats(&[s(0)], BufferKind::Output(0))],
        steps: vec![launch(0, &[from[0], from[1], 2], &[s(0)])],
        inputs: vec![],
        outputs: ids(&[2]),
    };
    let mut buffers = io();
    buffers.push(buffer(DType::Bool, &[], BufferKind::Arena));
    let branch = Body {
        buffers,
        steps: vec![launch(1, &[0, 1, 3], &[]), Step::If { cond: id(3), then_body: side([0, 1]).into(), else_body: side([1, 1]).into(), outputs: ids(&[2]) }],
        inputs: ids(&[0, 1]),
        outputs: ids(&[2, 1]),
    };
    let kernels = || vec![gpu_kernel("add", 3, 1, s(0), 0), gpu_kernel("less", 3, 0, c(1), 65536)];
    let port = |name| port(name, DType::F32, &[s(0)]);
    let manifest = manifest(
        vec![symbol("n", 0, 1000)],
        vec![port("a"), port("b")],
        vec![port("y"), port("z")],
        vec![gpu_plan("fused", kernels(), straight), gpu_plan("branch", kernels(), branch)],
    );
    Artifact::from_bytes(&writer.to_bytes(manifest).unwrap()).unwrap()
}

/// The GPU, or why the test is not run.
fn gpu() -> Option<Device> {
    match Device::cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            assert_eq!(error.exit_code(), 4);
            println!("not run: {error}");
            None
        }
    }
}

fn options(plan: &str, graphs: Graphs) -> Options {
    Options { plan: plan.into(), graphs, ..Options::default() }
}

#[test]
fn kernels_run_with_and_without_graphs_for_changing_shapes() {
    let Some(device) = gpu() else { return };
    let artifact = model(PTX);
    let w = noise(77, 1000);
    for graphs in [Graphs::Auto, Graphs::Off] {
        let mut session = artifact.session(device, options("fused", graphs)).unwrap();
        assert_eq!(session.notes(), ["plan fused for sm_80 on cuda:0"]);
        let mut outputs = session.new_outputs().unwrap();
        for (seed, n) in [(1, 10), (2, 10), (3, 999), (4, 10), (5, 1), (6, 999), (7, 0), (8, 10), (9, 10), (10, 999), (11, 999), (12, 10), (13, 999)] {
            let (a, b) = (noise(seed, n), noise(seed + 50, n));
            let (x, y) = (tensor(&[n], &a), tensor(&[n], &b));
            session.run_into(&[("a", &x), ("b", &y)], &mut outputs).unwrap();
            let expect: Vec<f32> = (0..n).map(|i| (a[i] + b[i]) + w[i]).collect();
            let twice: Vec<f32> = a.iter().map(|v| v + v).collect();
            assert_eq!(outputs["y"].as_slice::<f32>().unwrap(), expect, "{n}");
            assert_eq!(outputs["z"].as_slice::<f32>().unwrap(), twice, "{n}");
        }
        let (x, y) = (tensor(&[64], &noise(1, 64)), tensor(&[64], &noise(2, 64)));
        let times = session.run_timed(&[("a", &x), ("b", &y)], &mut outputs).unwrap();
        assert_eq!(times.len(), 3);
        assert!(times.iter().all(|t| t.ns > 0.0));
    }
}

#[test]
fn inputs_may_stay_on_the_gpu() {
    let Some(device) = gpu() else { return };
    let mut session = model(PTX).session(device, options("fused", Graphs::Auto)).unwrap();
    let x = tensor(&[100], &noise(5, 100));
    let there = session.upload(&x).unwrap();
    assert_eq!(there.device(), "cuda:0");
    let out = session.run(&[("a", &there), ("b", &there)]).unwrap();
    let twice: Vec<f32> = noise(5, 100).iter().map(|v| v + v).collect();
    assert_eq!(out["z"].as_slice::<f32>().unwrap(), twice);

    // Outputs stay there too, and may be the next inputs: z doubles each time.
    let mut now = session.run_resident(&[("a", &there), ("b", &there)]).unwrap().remove(1);
    for power in 2..8 {
        let before = session.download(&now).unwrap();
        now = session.run_resident(&[("a", &now), ("b", &there)]).unwrap().remove(1);
        let after = session.download(&now).unwrap();
        let doubled: Vec<f32> = before.as_slice::<f32>().unwrap().iter().map(|v| v * 2.0).collect();
        assert_eq!(after.as_slice::<f32>().unwrap(), doubled, "{power}");
    }
}

#[test]
fn a_branch_reads_its_condition_back() {
    let Some(device) = gpu() else { return };
    let mut session = model(PTX).session(device, options("branch", Graphs::Auto)).unwrap();
    assert_eq!(session.notes()[1], "no CUDA graph: what the plan launches depends on data");
    for (a, b) in [(1.0f32, 2.0), (2.0, 1.0), (1.0, 3.0)] {
        let (x, y) = (tensor(&[3], &[a; 3]), tensor(&[3], &[b; 3]));
        let out = session.run(&[("a", &x), ("b", &y)]).unwrap();
        let expect = if a < b { a + b } else { b + b };
        assert_eq!(out["y"].as_slice::<f32>().unwrap(), [expect; 3]);
        assert_eq!(out["z"].as_slice::<f32>().unwrap(), [b; 3]);
    }
}

#[test]
fn what_the_driver_refuses_is_told_in_words() {
    let Some(device) = gpu() else { return };
    let broken = PTX.replace("add.f32 %f2, %f0, %f1;", "add.f33 %f2, %f0, %f1;");
    let error = model(&broken).session(device, options("fused", Graphs::Auto)).err().unwrap();
    assert!(matches!(error, Error::Load { .. }));
    assert!(error.to_string().contains("add.f33") || error.to_string().contains("line"), "{error}");
    let missing = PTX.replace("entry less", "entry fewer");
    let error = model(&missing).session(device, options("fused", Graphs::Auto)).err().unwrap();
    assert!(error.to_string().contains("kernel `less`"), "{error}");

    let mut manifest = model(PTX).manifest().clone();
    manifest.plans.iter_mut().for_each(|p| p.target = "sm_999".into());
    let mut writer = Writer::new();
    writer.add_code("sm_999", CodeKind::Ptx, &[], PTX.as_bytes().to_vec());
    writer.add_tensor("w", DType::F32, &[1000], vec![0; 4000]);
    let artifact = Artifact::from_bytes(&writer.to_bytes(manifest).unwrap()).unwrap();
    let error = artifact.session(device, Options::default()).err().unwrap();
    assert!(error.to_string().contains("it has sm_999"), "{error}");
    assert_eq!(error.exit_code(), 4);
}

#[test]
fn too_much_memory_is_told_with_both_numbers() {
    let Some(device) = gpu() else { return };
    let huge = DimExpr::Mul(vec![s(0), c(1 << 40)]);
    let body = Body {
        buffers: vec![floats(&[s(0)], BufferKind::Input(0)), floats(std::slice::from_ref(&huge), BufferKind::Arena), floats(&[s(0)], BufferKind::Output(0))],
        steps: vec![launch(0, &[0, 1, 2], &[s(0)])],
        inputs: ids(&[0]),
        outputs: ids(&[2]),
    };
    let mut writer = Writer::new();
    writer.add_code("sm_80", CodeKind::Ptx, &[], PTX.as_bytes().to_vec());
    let manifest = manifest(
        vec![symbol("n", 0, 1000)],
        vec![port("a", DType::F32, &[s(0)])],
        vec![port("y", DType::F32, &[s(0)])],
        vec![gpu_plan("fused", vec![gpu_kernel("add", 3, 1, s(0), 0)], body)],
    );
    let artifact = Artifact::from_bytes(&writer.to_bytes(manifest).unwrap()).unwrap();
    let mut session = artifact.session(device, Options::default()).unwrap();
    let x: Tensor = tensor(&[2], &[1.0, 2.0]);
    let error = session.run(&[("a", &x)]).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { free: Some(_), .. }), "{error}");
    assert!(error.to_string().contains("8796093022208 bytes needed"), "{error}");
}
