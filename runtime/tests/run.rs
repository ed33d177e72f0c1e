//! Real kernels through real artifacts on the CPU, against the same computed here.
mod common;
use common::*;
use pavage_runtime::plan::*;
use pavage_runtime::{Artifact, DType, Device, DimExpr, Observed, Options, TensorRef, Then, Value};

fn options(plan: &str, threads: usize) -> Options {
    Options { plan: plan.into(), threads, ..Options::default() }
}

fn small() -> Artifact {
    let (writer, manifest) = small_model();
    Artifact::from_bytes(&writer.to_bytes(manifest).unwrap()).unwrap()
}

#[test]
fn both_plans_give_the_right_answer_for_any_batch_and_any_threads() {
    let artifact = small();
    for plan in ["fused", "unfused"] {
        for threads in [1, 2, 4] {
            let mut session = artifact.session(Device::Cpu, options(plan, threads)).unwrap();
            let mut outputs = session.new_outputs().unwrap();
            for n in [1usize, 7, 300, 7, 1, 64, 65, 66, 67, 68, 69, 70, 71, 72, 7] {
                let (a, b) = (noise(n as u64, n * 8), noise(99 + n as u64, n * 8));
                let (x, y) = (tensor(&[n, 8], &a), tensor(&[n, 8], &b));
                session.run_into(&[("b", &y), ("a", &x)], &mut outputs).unwrap();
                assert_eq!(outputs["y"].shape(), [n, 8]);
                let got = outputs["y"].as_slice::<f32>().unwrap();
                assert_eq!(got, small_model_expects(&a, &b), "{plan} {threads} {n}");
            }
            // One arena, as large as the largest shape needed: two buffers of 300 x 8.
            let expect = if plan == "fused" { 0 } else { 2 * (300 * 8 * 4usize).next_multiple_of(256) };
            assert_eq!(session.arena_bytes(), expect);
        }
    }
}

#[repr(align(64))]
struct Aligned([u8; 97]);

#[test]
fn inputs_may_lie_anywhere_in_memory() {
    let mut session = small().session(Device::Cpu, options("fused", 1)).unwrap();
    let (a, b) = (noise(1, 24), noise(2, 24));
    let mut skewed = Aligned([0u8; 97]);
    for (to, from) in skewed.0[1..].chunks_mut(4).zip(&a) {
        to.copy_from_slice(&from.to_le_bytes());
    }
    let a_ref = TensorRef::new(DType::F32, &[3, 8], &skewed.0[1..]).unwrap();
    let b_ref = TensorRef::from_slice(&[3, 8], &b).unwrap();
    let outputs = session.run(&[("a", a_ref), ("b", b_ref)]).unwrap();
    assert_eq!(outputs[0].as_slice::<f32>().unwrap(), small_model_expects(&a, &b));
}

#[test]
fn each_launch_is_timed_in_order() {
    let mut session = small().session(Device::Cpu, options("unfused", 1)).unwrap();
    let x = tensor(&[50, 8], &noise(3, 400));
    let mut outputs = session.new_outputs().unwrap();
    let times = session.run_timed(&[("a", &x), ("b", &x)], &mut outputs).unwrap();
    let kernels: Vec<u32> = times.iter().map(|t| t.kernel.0).collect();
    assert_eq!(kernels, [0, 1, 2]);
    assert!(times.iter().all(|t| t.ns > 0.0));
    assert_eq!(session.notes(), ["plan unfused for x86-64 on cpu"]);
}

#[test]
fn each_launch_can_be_looked_at() {
    let mut session = small().session(Device::Cpu, options("unfused", 2)).unwrap();
    let (a, b) = (noise(3, 400), noise(4, 400));
    let mut outputs = session.new_outputs().unwrap();
    let mut seen = Vec::new();
    let inputs = [("a", &tensor(&[50, 8], &a)), ("b", &tensor(&[50, 8], &b))];
    let mut look = |o: &mut Observed| {
        seen.push(o.clone());
        Then::GoOn
    };
    session.run_observed(&inputs, &mut outputs, &mut look).unwrap();
    assert_eq!(seen.iter().map(|o| o.place).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(seen[0].sizes, [50]);
    assert_eq!(seen.iter().map(|o| o.kernel.0).collect::<Vec<_>>(), [0, 1, 2]);
    let sum: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
    let relu: Vec<f32> = sum.iter().map(|v| v.max(0.0)).collect();
    assert_eq!(seen[0].before[1].as_slice::<f32>().unwrap(), b);
    assert_eq!(seen[0].after[2].as_slice::<f32>().unwrap(), sum);
    assert_eq!(seen[1].before[0].as_slice::<f32>().unwrap(), sum);
    assert_eq!(seen[1].after[1].as_slice::<f32>().unwrap(), relu);
    assert_eq!(seen[2].after[2].shape(), [50, 8]);
    assert_eq!(outputs[0].as_slice::<f32>().unwrap(), small_model_expects(&a, &b));
}

#[test]
fn what_a_launch_left_can_be_replaced() {
    let mut session = small().session(Device::Cpu, options("unfused", 2)).unwrap();
    let (a, b) = (noise(3, 400), noise(4, 400));
    let mut outputs = session.new_outputs().unwrap();
    let inputs = [("a", &tensor(&[50, 8], &a)), ("b", &tensor(&[50, 8], &b))];
    let wanted: Vec<f32> = noise(5, 400);
    let mut replace = |o: &mut Observed| {
        if o.place != 1 {
            return Then::GoOn;
        }
        // What it reads stays as it was.
        o.after[0] = tensor(&[50, 8], &b);
        o.after[1] = tensor(&[50, 8], &wanted);
        Then::WriteBack
    };
    session.run_observed(&inputs, &mut outputs, &mut replace).unwrap();
    let scaled: Vec<f32> = wanted.iter().map(|v| v * 2.5).collect();
    assert_eq!(outputs[0].as_slice::<f32>().unwrap(), scaled);
    assert_eq!(inputs[0].1.as_slice::<f32>().unwrap(), a);
}

#[test]
fn requests_that_do_not_fit_are_told_why() {
    let artifact = small();
    let mut session = artifact.session(Device::Cpu, options("fused", 1)).unwrap();
    let (x, wide) = (tensor(&[2, 8], &noise(4, 16)), tensor(&[2, 9], &noise(4, 18)));
    let three = tensor(&[3, 8], &noise(4, 24));
    let whole = pavage_runtime::Tensor::from_slice(&[2, 8], &[1i32; 16]).unwrap();
    let flat = tensor(&[16], &noise(4, 16));
    let big = tensor(&[10_001, 8], &noise(4, 80_008));
    let mut fails = |inputs: &[(&str, &pavage_runtime::Tensor)]| {
        let error = session.run(inputs).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        error.to_string()
    };
    assert_eq!(fails(&[("a", &x)]), "input `b` was given no value");
    assert_eq!(fails(&[("a", &x), ("b", &x), ("a", &x)]), "input `a` was given twice");
    assert_eq!(fails(&[("a", &x), ("c", &x)]), "the model has no input `c`; its inputs are a and b");
    assert_eq!(fails(&[("a", &wide), ("b", &x)]), "input `a`: the model takes [n x 8], got [2 x 9]");
    assert_eq!(fails(&[("a", &x), ("b", &three)]), "input `b`: the model takes [n x 8], got [3 x 8] (n is 2, by input `a`)");
    assert_eq!(fails(&[("a", &x), ("b", &flat)]), "input `b`: the model takes [n x 8], got [16]");
    assert_eq!(fails(&[("a", &x), ("b", &whole)]), "input `b`: the model takes f32, got i32");
    assert_eq!(fails(&[("a", &big), ("b", &big)]), "input `a`: n is 10001, compiled for 1 to 10000");
    // And it still works.
    assert!(session.run(&[("a", &x), ("b", &x)]).is_ok());

    let error = artifact.session(Device::Cpu, options("tiled", 1)).err().unwrap();
    assert_eq!(error.to_string(), "the artifact has no plan `tiled`; it has fused and unfused");
    // SAFETY: the address is never used: the session refuses the buffer.
    let far = unsafe { pavage_runtime::DeviceBuffer::from_raw("cuda:0", 64, DType::F32, &[2, 8]) };
    let error = session.run(&[("a", Value::from(&far)), ("b", Value::from(&x))]).unwrap_err();
    assert_eq!(error.to_string(), "input `a` is in the memory of cuda:0, the session runs on cpu");
    assert_eq!(session.run_resident(&[("a", &x), ("b", &x)]).unwrap_err().to_string(), "no usable GPU: cpu keeps outputs in host memory");
}

#[test]
fn an_extent_that_is_a_multiple_decides_its_size() {
    let four_n = || DimExpr::Mul(vec![c(4), s(0)]);
    let body = Body {
        buffers: vec![floats(&[four_n()], BufferKind::Input(0)), floats(&[s(0), c(4)], BufferKind::Output(0))],
        steps: vec![launch(0, &[0, 1], &[])],
        inputs: ids(&[0]),
        outputs: ids(&[1]),
    };
    let artifact = open(manifest(
        vec![symbol("n", 1, 100)],
        vec![port("x", DType::F32, &[four_n()])],
        vec![port("y", DType::F32, &[s(0), c(4)])],
        vec![plan("fused", vec![kernel("relu", 2, 0, four_n())], body)],
    ));
    let mut session = artifact.session(Device::Cpu, options("fused", 1)).unwrap();
    let x = noise(12, 20);
    let out = session.run(&[("x", &tensor(&[20], &x))]).unwrap();
    assert_eq!(out[0].shape(), [5, 4]);
    assert_eq!(out[0].as_slice::<f32>().unwrap()[19], x[19].max(0.0));
    let odd = session.run(&[("x", &tensor(&[18], &x[..18]))]).unwrap_err();
    assert_eq!(odd.to_string(), "input `x`: the model takes [4*n], got [18] (18 is no 4*n)");
    let many = session.run(&[("x", &tensor(&[404], &noise(1, 404)))]).unwrap_err();
    assert_eq!(many.to_string(), "input `x`: n is 101, compiled for 1 to 100");
}

#[test]
fn guards_hold_before_anything_runs() {
    let (writer, mut manifest) = small_model();
    let odd = DimExpr::Mod(s(0).into(), c(2).into());
    manifest.guards.push(Guard { expr: odd, min: 0, max: 0, message: "n must be even".into() });
    let artifact = Artifact::from_bytes(&writer.to_bytes(manifest).unwrap()).unwrap();
    let mut session = artifact.session(Device::Cpu, options("fused", 1)).unwrap();
    let x = tensor(&[3, 8], &noise(5, 24));
    let error = session.run(&[("a", &x), ("b", &x)]).unwrap_err();
    assert_eq!(error.to_string(), "n must be even: 1 is not in 0 to 0");
}

#[test]
fn scratch_is_each_threads_own() {
    let (rows, width) = (500usize, 33usize);
    let mut sum = kernel("row_sum", 2, 1, s(0));
    if let Some(cpu) = &mut sum.cpu {
        cpu.scratch = DimExpr::Mul(vec![s(1), c(4)]);
        cpu.grain = c(1);
    }
    let body = Body {
        buffers: vec![floats(&[s(0), s(1)], BufferKind::Input(0)), floats(&[s(0)], BufferKind::Output(0))],
        steps: vec![launch(0, &[0, 1], &[s(1)])],
        inputs: ids(&[0]),
        outputs: ids(&[1]),
    };
    let artifact = open(manifest(
        vec![symbol("rows", 0, 1000), symbol("width", 0, 1000)],
        vec![port("x", DType::F32, &[s(0), s(1)])],
        vec![port("y", DType::F32, &[s(0)])],
        vec![plan("fused", vec![sum], body)],
    ));
    let x = noise(6, rows * width);
    let expect: Vec<f32> = x.chunks(width).map(|r| r.iter().fold(0.0, |s, v| s + v)).collect();
    for threads in [1, 2, 5] {
        let mut session = artifact.session(Device::Cpu, options("fused", threads)).unwrap();
        for _ in 0..20 {
            let y = session.run(&[("x", &tensor(&[rows, width], &x))]).unwrap();
            assert_eq!(y[0].as_slice::<f32>().unwrap(), expect);
        }
        let none = session.run(&[("x", &tensor(&[0, width], &[]))]).unwrap();
        assert_eq!(none[0].shape(), [0]);
    }
}

#[test]
fn sizes_computed_at_run_time_define_shapes() {
    // y = the positive elements of x; z = twice those.
    let body = Body {
        buffers: vec![
            floats(&[s(0)], BufferKind::Input(0)),
            buffer(DType::I64, &[], BufferKind::Arena),
            floats(&[s(1)], BufferKind::Output(0)),
            floats(&[s(1)], BufferKind::Arena),
        ],
        steps: vec![launch(0, &[0, 1], &[s(0)]), Step::Bind { buffer: id(1), symbol: 1 }, launch(1, &[0, 2], &[s(0)]), launch(2, &[2, 2, 3], &[])],
        inputs: ids(&[0]),
        outputs: ids(&[2, 3]),
    };
    let kernels = vec![kernel("count_positive", 2, 1, c(1)), kernel("take_positive", 2, 1, c(1)), kernel("add", 3, 0, s(1))];
    let artifact = open(manifest(
        vec![symbol("n", 0, 1000), symbol("positive", 0, 100)],
        vec![port("x", DType::F32, &[s(0)])],
        vec![port("y", DType::F32, &[s(1)]), port("z", DType::F32, &[s(1)])],
        vec![plan("fused", kernels, body)],
    ));
    let mut session = artifact.session(Device::Cpu, options("fused", 2)).unwrap();
    for (seed, n) in [(1, 10), (2, 10), (3, 90), (4, 10), (5, 0), (1, 10)] {
        let x = noise(seed, n);
        let expect: Vec<f32> = x.iter().copied().filter(|v| *v > 0.0).collect();
        let twice: Vec<f32> = expect.iter().map(|v| v + v).collect();
        let out = session.run(&[("x", &tensor(&[n], &x))]).unwrap();
        assert_eq!(out["y"].shape(), [expect.len()]);
        assert_eq!(out["y"].as_slice::<f32>().unwrap(), expect);
        assert_eq!(out["z"].as_slice::<f32>().unwrap(), twice);
    }
    let many = session.run(&[("x", &tensor(&[300], &[1.0; 300]))]).unwrap_err();
    assert_eq!(many.to_string(), "computed at run time: positive is 300, compiled for 0 to 100");
}

#[test]
fn views_share_memory_and_concat_without_copies() {
    // y = [a ; relu(a)] with the second half written in place, z = y seen as [2*n].
    let two_n = || DimExpr::Mul(vec![c(2), s(0)]);
    let body = Body {
        buffers: vec![
            floats(&[s(0)], BufferKind::Input(0)),
            // Views before what they look at, on purpose.
            floats(&[s(0)], view(3, c(0))),
            floats(&[s(0)], view(3, DimExpr::Mul(vec![c(4), s(0)]))),
            floats(&[c(2), s(0)], BufferKind::Output(0)),
            floats(&[two_n()], view(3, c(0))),
            floats(&[s(0)], view(2, c(0))),
        ],
        steps: vec![Step::Copy { from: id(0), to: id(1) }, launch(0, &[1, 5], &[])],
        inputs: ids(&[0]),
        outputs: ids(&[3, 4]),
    };
    let artifact = open(manifest(
        vec![symbol("n", 1, 100)],
        vec![port("a", DType::F32, &[s(0)])],
        vec![port("y", DType::F32, &[c(2), s(0)]), port("z", DType::F32, &[two_n()])],
        vec![plan("fused", vec![kernel("relu", 2, 0, s(0))], body)],
    ));
    let mut session = artifact.session(Device::Cpu, options("fused", 1)).unwrap();
    for n in [5usize, 9, 5] {
        let a = noise(8, n);
        let expect: Vec<f32> = a.iter().copied().chain(a.iter().map(|v| v.max(0.0))).collect();
        let out = session.run(&[("a", &tensor(&[n], &a))]).unwrap();
        assert_eq!(out["y"].shape(), [2, n]);
        assert_eq!(out["y"].as_slice::<f32>().unwrap(), expect);
        assert_eq!(out["z"].shape(), [2 * n]);
        assert_eq!(out["z"].as_slice::<f32>().unwrap(), expect);
    }
}

#[test]
fn a_view_beyond_its_buffer_is_an_error() {
    for kind in [BufferKind::Arena, BufferKind::Output(0)] {
        let body = Body {
            buffers: vec![floats(&[s(0)], BufferKind::Input(0)), floats(&[s(0)], kind.clone()), floats(&[s(0)], view(1, DimExpr::Add(vec![s(0), c(-4)])))],
            steps: vec![launch(0, &[0, 2], &[]), launch(0, &[0, 1], &[])],
            inputs: ids(&[0]),
            outputs: ids(&[1]),
        };
        let artifact = open(manifest(
            vec![symbol("n", 1, 100)],
            vec![port("a", DType::F32, &[s(0)])],
            vec![port("y", DType::F32, &[s(0)])],
            vec![plan("fused", vec![kernel("relu", 2, 0, s(0))], body)],
        ));
        let mut session = artifact.session(Device::Cpu, options("fused", 1)).unwrap();
        assert!(session.run(&[("a", &tensor(&[4], &noise(1, 4)))]).is_ok());
        let error = session.run(&[("a", &tensor(&[8], &noise(1, 8)))]).unwrap_err();
        assert!(error.to_string().contains("beyond the buffer"), "{error}");
        let error = session.run(&[("a", &tensor(&[1], &noise(1, 1)))]).unwrap_err();
        assert!(error.to_string().contains("an offset"), "{error}");
    }
}

#[test]
fn a_branch_is_chosen_by_data_and_may_change_the_shape() {
    // if sum(x) < limit { y = relu(x) } else { y = the positive elements of x }
    let capture = |n| floats(&[s(0)], BufferKind::Captured(id(n)));
    let then_body =
        Body { buffers: vec![capture(0), floats(&[s(0)], BufferKind::Output(0))], steps: vec![launch(1, &[0, 1], &[])], inputs: vec![], outputs: ids(&[1]) };
    let else_body = Body {
        buffers: vec![capture(0), buffer(DType::I64, &[], BufferKind::Arena), floats(&[s(2)], BufferKind::Arena)],
        steps: vec![launch(2, &[0, 1], &[s(0)]), Step::Bind { buffer: id(1), symbol: 2 }, launch(3, &[0, 2], &[s(0)])],
        inputs: vec![],
        outputs: ids(&[2]),
    };
    let body = Body {
        buffers: vec![
            floats(&[s(0)], BufferKind::Input(0)),
            floats(&[c(1)], BufferKind::Input(1)),
            buffer(DType::Bool, &[], BufferKind::Arena),
            floats(&[s(1)], BufferKind::Arena),
            floats(&[s(1)], BufferKind::Output(0)),
        ],
        steps: vec![
            launch(0, &[0, 1, 2], &[s(0)]),
            Step::If { cond: id(2), then_body: then_body.into(), else_body: else_body.into(), outputs: ids(&[3]) },
            launch(4, &[3, 3, 4], &[]),
        ],
        inputs: ids(&[0, 1]),
        outputs: ids(&[4]),
    };
    let kernels = vec![
        kernel("sum_below", 3, 1, c(1)),
        kernel("relu", 2, 0, s(0)),
        kernel("count_positive", 2, 1, c(1)),
        kernel("take_positive", 2, 1, c(1)),
        kernel("add", 3, 0, s(1)),
    ];
    let artifact = open(manifest(
        vec![symbol("n", 0, 1000), symbol("m", 0, 1000), symbol("p", 0, 1000)],
        vec![port("x", DType::F32, &[s(0)]), port("limit", DType::F32, &[c(1)])],
        vec![port("y", DType::F32, &[s(1)])],
        vec![plan("fused", kernels, body)],
    ));
    let mut session = artifact.session(Device::Cpu, options("fused", 2)).unwrap();
    for (seed, n, limit) in [(1, 20, 1e9), (1, 20, -1e9), (2, 31, -1e9), (2, 31, 1e9), (3, 20, -1e9)] {
        let x = noise(seed, n);
        let expect: Vec<f32> =
            if limit > 0.0 { x.iter().map(|v| v.max(0.0) * 2.0).collect() } else { x.iter().filter(|v| **v > 0.0).map(|v| v * 2.0).collect() };
        let (x, limit) = (tensor(&[n], &x), tensor(&[1], &[limit]));
        let out = session.run(&[("x", &x), ("limit", &limit)]).unwrap();
        assert_eq!(out["y"].as_slice::<f32>().unwrap(), expect);
    }
}

/// A loop with two carried values that change places, one that grows, and one scan output:
/// (a, b) = (b, a + b), grown = grown ++ [i], scan a. It goes on while sum(a) < limit.
fn loop_model() -> Artifact {
    let inner = Body {
        buffers: vec![
            buffer(DType::I64, &[], BufferKind::Input(0)),
            buffer(DType::Bool, &[], BufferKind::Input(1)),
            floats(&[s(0)], BufferKind::Input(2)),
            floats(&[s(0)], BufferKind::Input(3)),
            floats(&[s(2)], BufferKind::Input(4)),
            floats(&[c(1)], BufferKind::Captured(id(2))),
            buffer(DType::Bool, &[], BufferKind::Output(0)),
            floats(&[s(0)], BufferKind::Output(2)),
            floats(&[], BufferKind::Arena),
            floats(&[DimExpr::Add(vec![s(2), c(1)])], BufferKind::Output(3)),
        ],
        steps: vec![launch(0, &[2, 3, 7], &[]), launch(1, &[3, 5, 6], &[s(0)]), launch(2, &[0, 8], &[]), launch(3, &[4, 8, 9], &[s(2)])],
        inputs: ids(&[0, 1, 2, 3, 4]),
        // The first carried output is the second carried input as it stands.
        outputs: ids(&[6, 3, 7, 9, 2]),
    };
    let body = Body {
        buffers: vec![
            floats(&[s(0)], BufferKind::Input(0)),
            floats(&[s(0)], BufferKind::Input(1)),
            floats(&[c(1)], BufferKind::Input(2)),
            buffer(DType::I64, &[], BufferKind::Input(3)),
            floats(&[s(1)], BufferKind::Input(4)),
            floats(&[s(0)], BufferKind::Output(0)),
            floats(&[s(0)], BufferKind::Output(1)),
            floats(&[s(3)], BufferKind::Arena),
            floats(&[s(4), s(0)], BufferKind::Output(3)),
        ],
        steps: vec![Step::Loop { trip: Some(id(3)), cond: None, body: inner.into(), carried: ids(&[0, 1, 4]), outputs: ids(&[5, 6, 7, 8]) }],
        inputs: ids(&[0, 1, 2, 3, 4]),
        outputs: ids(&[5, 6, 7, 8]),
    };
    let kernels = vec![kernel("add", 3, 0, s(0)), kernel("sum_below", 3, 1, c(1)), kernel("index_as_float", 2, 0, c(1)), kernel("append", 3, 1, c(1))];
    let names = ["n", "start", "grown", "end", "rounds"];
    open(manifest(
        names.map(|n| symbol(n, 0, 1000)).to_vec(),
        vec![
            port("a", DType::F32, &[s(0)]),
            port("b", DType::F32, &[s(0)]),
            port("limit", DType::F32, &[c(1)]),
            port("trip", DType::I64, &[]),
            port("grown", DType::F32, &[s(1)]),
        ],
        vec![port("a", DType::F32, &[s(0)]), port("b", DType::F32, &[s(0)]), port("grown", DType::F32, &[s(3)]), port("scan", DType::F32, &[s(4), s(0)])],
        vec![plan("fused", kernels, body)],
    ))
}

#[test]
fn a_loop_carries_swaps_grows_stacks_and_stops() {
    let mut session = loop_model().session(Device::Cpu, options("fused", 2)).unwrap();
    for (n, start, trip, limit) in [(3, 2, 5, 1e9f32), (3, 2, 5, 1e9), (17, 0, 40, 9.0), (3, 4, 0, 1e9), (2, 1, 1, 1e9)] {
        let positive = |seed| noise(seed, n).iter().map(|v| v.abs()).collect::<Vec<f32>>();
        let (mut a, mut b, mut grown) = (positive(1), positive(2), noise(3, start));
        let inputs = [
            ("a", &tensor(&[n], &a)),
            ("b", &tensor(&[n], &b)),
            ("limit", &tensor(&[1], &[limit])),
            ("trip", &pavage_runtime::Tensor::from_slice(&[], &[trip as i64]).unwrap()),
            ("grown", &tensor(&[start], &grown)),
        ];
        let out = session.run(&inputs).unwrap();
        let (mut scan, mut rounds, mut go) = (Vec::new(), 0, true);
        while go && rounds < trip {
            scan.extend_from_slice(&a);
            let next: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
            go = b.iter().fold(0.0, |s, v| s + v) < limit;
            (a, b) = (b, next);
            grown.push(rounds as f32);
            rounds += 1;
        }
        if limit < 1e3 {
            assert!((2..trip).contains(&rounds), "the condition must end it: {rounds}");
        }
        assert_eq!(out["a"].as_slice::<f32>().unwrap(), a, "{n} {trip}");
        assert_eq!(out["b"].as_slice::<f32>().unwrap(), b);
        assert_eq!(out["grown"].as_slice::<f32>().unwrap(), grown);
        assert_eq!(out["scan"].shape(), [rounds, n]);
        assert_eq!(out["scan"].as_slice::<f32>().unwrap(), scan);
    }
}

#[test]
fn sessions_move_between_threads() {
    fn is_send<T: Send>() {}
    is_send::<pavage_runtime::Session>();
    fn is_sync<T: Send + Sync>() {}
    is_sync::<Artifact>();
    let mut session = small().session(Device::Cpu, options("fused", 2)).unwrap();
    let x = tensor(&[9, 8], &noise(1, 72));
    let first = session.run(&[("a", &x), ("b", &x)]).unwrap();
    let (second, x) = std::thread::spawn(move || (session.run(&[("a", &x), ("b", &x)]).unwrap(), x)).join().unwrap();
    assert_eq!(first[0].bytes(), second[0].bytes());
    drop(x);
}

#[test]
fn sessions_run_side_by_side() {
    let artifact = small();
    let x = noise(11, 8 * 2000);
    let expect = small_model_expects(&x, &x);
    std::thread::scope(|scope| {
        for plan in ["fused", "unfused", "fused"] {
            let (artifact, x, expect) = (&artifact, &x, &expect);
            scope.spawn(move || {
                let mut session = artifact.session(Device::Cpu, options(plan, 2)).unwrap();
                let x = tensor(&[2000, 8], x);
                for _ in 0..50 {
                    let out = session.run(&[("a", &x), ("b", &x)]).unwrap();
                    assert_eq!(out[0].as_slice::<f32>().unwrap(), expect);
                }
            });
        }
    });
}

#[test]
fn a_session_runs_its_own_code_though_names_are_equal() {
    let body = || Body {
        buffers: vec![floats(&[s(0)], BufferKind::Input(0)), floats(&[s(0)], BufferKind::Output(0))],
        steps: vec![launch(0, &[0, 1], &[])],
        inputs: ids(&[0]),
        outputs: ids(&[1]),
    };
    let build = |object: Vec<u8>| {
        let mut writer = pavage_runtime::Writer::new();
        writer.add_code("x86-64", CodeKind::SharedObject, &[], object);
        let manifest = manifest(
            vec![symbol("n", 1, 100)],
            vec![port("x", DType::F32, &[s(0)])],
            vec![port("y", DType::F32, &[s(0)])],
            vec![plan("fused", vec![kernel("relu", 2, 0, s(0))], body())],
        );
        Artifact::from_bytes(&writer.to_bytes(manifest).unwrap()).unwrap()
    };
    let (one, other) = (build(kernels().to_vec()), build(compile("kernels_b.c")));
    let x = tensor(&[2], &[0.5, -0.5]);
    let run = |artifact: &Artifact| {
        let mut session = artifact.session(Device::Cpu, options("fused", 1)).unwrap();
        session.run(&[("x", &x)]).unwrap()[0].as_slice::<f32>().unwrap().to_vec()
    };
    for _ in 0..3 {
        assert_eq!(run(&one), [0.5, 0.0]);
        assert_eq!(run(&other), [42.0, 42.0]);
    }
}
