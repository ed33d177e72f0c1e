//! Regions through the Hopper families to machine code.
use super::hopper_samples::{Hides, Tail, decode, linear, self_attention};
use super::{ArgFacts, build};
use crate::lower::nvvm::assembler::assemble;
use crate::targets::Target;
use crate::tile::Kernel;
use pavage_ir::{DType, Dim, Expr, Region, ScalarFn, TensorType, region::RegionOutput};

fn hopper() -> Target {
    Target::parse("sm_90a").expect("a target")
}

fn built(region: &Region, name: &str) -> super::Built {
    build(region, &hopper(), name, &ArgFacts::default(), None).expect("a family takes it")
}

#[test]
fn contractions_with_epilogues_run_on_the_tensor_cores() {
    let mut kernels = vec![];
    for (i, tail) in [Tail::None, Tail::BiasGelu, Tail::BiasGeluAdd].into_iter().enumerate() {
        for (dtype, out) in [(DType::BF16, DType::BF16), (DType::F16, DType::F16), (DType::F16, DType::F32)] {
            let b = built(&linear(dtype, out, 3072, 768, tail), &format!("linear_{i}_{out}_{dtype}"));
            assert_eq!(b.schedule.family, "hopper_gemm");
            kernels.push(b.kernel);
        }
    }
    assemble(&kernels, "sm_90a");
}

#[test]
fn outputs_that_are_no_matrix_are_written_one_by_one() {
    // [m, n] to [n / 64, m, 64]: the heads of an attention.
    let mut r = linear(DType::F16, DType::F16, 768, 768, Tail::BiasGelu);
    let (heads, depth) = (Dim::axis(1).div(&Dim::from(64i64)), Dim::axis(1).modulo(&Dim::from(64i64)));
    r.outputs[0].ty.shape = vec![Dim::from(12i64), Dim::sym("m"), Dim::from(64i64)];
    r.outputs[0].index = vec![heads, Dim::axis(0), depth];
    let b = built(&r, "split_heads");
    assert_eq!(b.schedule.family, "hopper_gemm");
    assemble(&[b.kernel], "sm_90a");
}

#[test]
fn attention_takes_heads_side_by_side_and_masks() {
    let mut kernels = vec![];
    for depth in [64, 128] {
        for (i, hides) in [Hides::Nothing, Hides::Padding, Hides::Future, Hides::Outside(100)].into_iter().enumerate() {
            let b = built(&self_attention(DType::F16, 12, depth, hides), &format!("attention_{depth}_{i}"));
            assert_eq!(b.schedule.family, "flash");
            kernels.push(b.kernel);
        }
    }
    assemble(&kernels, "sm_90a");
}

#[test]
fn odd_rows_and_wide_types_go_to_other_families() {
    let facts = ArgFacts::default();
    let family = |r: &Region| build(r, &hopper(), "k", &facts, None).map(|b| b.schedule.family);
    // Rows of 770 elements are no multiple of 16 bytes.
    assert_ne!(family(&linear(DType::F16, DType::F16, 770, 768, Tail::None)).ok().as_deref(), Some("hopper_gemm"));
    assert_ne!(family(&linear(DType::F32, DType::F32, 768, 768, Tail::None)).ok().as_deref(), Some("hopper_gemm"));
    let mut r = linear(DType::F16, DType::F16, 768, 768, Tail::None);
    // An operand that is computed, not loaded.
    let lhs = match r.heart.clone() {
        pavage_ir::Heart::Contract { lhs, .. } => lhs,
        _ => unreachable!("linear is a contraction"),
    };
    let twice = r.push(Expr::Call(ScalarFn::Add, vec![lhs, lhs]), DType::F16);
    if let pavage_ir::Heart::Contract { lhs, .. } = &mut r.heart {
        *lhs = twice;
    }
    assert_ne!(family(&r).ok().as_deref(), Some("hopper_gemm"));
}

#[test]
fn attention_of_few_queries_assembles() {
    for arch in ["sm_80", "sm_90a"] {
        let kernels = few_queries(&Target::parse(arch).expect("a target"));
        // They are brought onto the device under the end of the kernel before, where GPUs can.
        assert!(kernels.iter().all(|k| k.launch.pdl == (arch == "sm_90a")), "{arch}");
        assemble(&kernels, arch);
    }
}

fn few_queries(target: &Target) -> Vec<Kernel> {
    let mut kernels = vec![];
    for (i, (dtype, depth, rows)) in [
        (DType::F16, 64, 4),
        (DType::BF16, 128, 8),
        (DType::F16, 128, 4),
        (DType::F32, 64, 1),
        (DType::F32, 128, 8),
        (DType::BF16, 96, 16),
        (DType::F16, 256, 4),
    ]
    .into_iter()
    .enumerate()
    {
        for part in [None, Some(Dim::from(256i64))] {
            let r = decode(dtype, rows, depth, part);
            let b = build(&r, target, &format!("decode_{i}_{}", kernels.len()), &ArgFacts::default(), None).expect("a family takes it");
            assert_eq!(b.schedule.family, "attention_few");
            kernels.push(b.kernel);
        }
    }
    kernels
}

#[test]
fn contractions_without_matrix_units_assemble() {
    let mut kernels = vec![];
    for arch in ["sm_80", "sm_90a"] {
        let target = Target::parse(arch).expect("a target");
        kernels.clear();
        for (i, (n, k)) in [(768, 3072), (770, 770), (64, 64)].into_iter().enumerate() {
            for (rows, cols) in [(2, 2), (1, 2), (1, 1)] {
                let schedule = pavage_ir::Schedule::new("gemm_gpu", &[("rows", rows), ("cols", cols)]);
                let r = linear(DType::F32, DType::F32, n, k, Tail::BiasGelu);
                let b = build(&r, &target, &format!("sgemm_{i}_{rows}_{cols}"), &ArgFacts::default(), Some(&schedule)).expect("builds");
                kernels.push(b.kernel);
            }
        }
        assemble(&kernels, arch);
    }
}

#[test]
fn kernels_of_few_blocks_let_the_next_one_come_at_once() {
    let early = |n: i64, arch: &str| {
        let ty = TensorType { dtype: DType::F32, shape: vec![Dim::from(n)] };
        let mut r = Region::new("twice", ty.shape.clone());
        r.args.push(ty.clone());
        let x = r.push(Expr::Load { arg: 0, index: vec![Dim::axis(0)], guard: None }, DType::F32);
        let expr = r.push(Expr::Call(ScalarFn::Add, vec![x, x]), DType::F32);
        r.outputs.push(RegionOutput { ty, expr, index: vec![Dim::axis(0)] });
        let text = build(&r, &Target::parse(arch).expect("a target"), "twice", &ArgFacts::default(), None).expect("builds").kernel.to_string();
        (text.contains("pdl_wait"), text.contains("pdl_trigger"))
    };
    assert_eq!(early(256, "sm_90a"), (true, true));
    assert_eq!(early(1 << 20, "sm_90a"), (true, false));
    assert_eq!(early(256, "sm_80"), (false, false));
}
