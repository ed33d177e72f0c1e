//! Contractions and convolutions for any GPU, to machine code; what those of a core ask ahead for.
use super::hopper_samples::{Tail, linear};
use super::{ArgFacts, FAMILIES, build};
use crate::lower::nvvm::assembler::assemble;
use crate::targets::Target;
use pavage_ir::attr::Layout;
use pavage_ir::region::{RegionOutput, Window};
use pavage_ir::{DType, Dim, Expr, Heart, Region, Scalar, ScalarFn, Tensor, TensorType};

/// A channels-last 3 x 3 convolution of `n` images with a ReLU.
fn convolution(dtype: DType, size: i64, c: i64, o: i64) -> (Region, ArgFacts) {
    let (n, size, c) = (Dim::sym("n"), Dim::from(size), Dim::from(c));
    let space = vec![n.clone(), size.clone(), size.clone(), Dim::from(o)];
    let (input, weights) = (vec![n, size.clone(), size, c.clone()], vec![Dim::from(o), c, Dim::from(3i64), Dim::from(3i64)]);
    let mut r = Region::new("conv", space.clone());
    r.args = vec![TensorType { dtype, shape: input.clone() }, TensorType { dtype, shape: weights.clone() }];
    let index: Vec<Dim> = (0..4).map(Dim::axis).collect();
    let x = r.push(Expr::Load { arg: 0, index: index.clone(), guard: None }, dtype);
    let w = r.push(Expr::Load { arg: 1, index: index.clone(), guard: None }, dtype);
    let window = Window { strides: vec![1, 1], dilations: vec![1, 1], lo: vec![1, 1], hi: vec![1, 1], layout: Layout::ChannelsLast };
    let shape: Vec<usize> = weights.iter().filter_map(Dim::as_const).map(|d| d as usize).collect();
    let count: usize = shape.iter().product();
    let constant = Tensor::from_scalars(dtype, shape, (0..count).map(|i| Scalar::F((i % 17) as f64 / 8.0 - 1.0)));
    r.heart = Heart::Conv { window, groups: 1, x, input, w, weights, acc: DType::F32 };
    let acc = r.push(Expr::Acc(0), DType::F32);
    let zero = r.constant(Scalar::F(0.0), DType::F32);
    let v = r.push(Expr::Call(ScalarFn::Max, vec![acc, zero]), DType::F32);
    let expr = if dtype == DType::F32 { v } else { r.push(Expr::Cast(v), dtype) };
    r.outputs.push(RegionOutput { ty: TensorType { dtype, shape: space }, expr, index });
    (r, ArgFacts { constants: vec![None, Some(constant)] })
}

#[test]
fn products_on_matrix_units_assemble_without_spills() {
    for arch in ["sm_80", "sm_90a"] {
        let target = Target::parse(arch).expect("a target");
        let family = FAMILIES.iter().find(|f| f.name == "gemm_mma").expect("the family");
        let mut kernels = vec![];
        for (i, (n, k, tail)) in [(3072, 768, Tail::None), (770, 776, Tail::BiasGeluAdd), (768, 768, Tail::BiasGelu)].into_iter().enumerate() {
            let dtype = if i == 1 { DType::BF16 } else { DType::F16 };
            let r = linear(dtype, dtype, n, k, tail);
            let schedules = (family.schedules)(&r, &target, &ArgFacts::default());
            assert!(schedules.len() >= 4, "{schedules:?}");
            for (j, schedule) in schedules.iter().enumerate() {
                // Rows of 770 elements are evaluated: for the smaller tiles.
                if n == 770 && schedule.knob("bn", 0) > 64 {
                    continue;
                }
                kernels.push((family.build)(&r, schedule, &target, &format!("mma_{i}_{j}"), &ArgFacts::default()).expect("builds").kernel);
            }
        }
        assemble(&kernels, arch);
    }
}

/// `[m, k] x [n, k]` of bytes, scaled by column, as bytes.
fn bytes(n: i64, k: i64) -> Region {
    let (m, n, k) = (Dim::sym("m"), Dim::from(n), Dim::from(k));
    let mut r = Region::new("bytes", vec![m.clone(), n.clone()]);
    let ty = |dtype: DType, shape: &[&Dim]| TensorType { dtype, shape: shape.iter().map(|d| (*d).clone()).collect() };
    r.args = vec![ty(DType::U8, &[&m, &k]), ty(DType::I8, &[&n, &k]), ty(DType::F32, &[&n])];
    let mut load = |arg: u32, index: Vec<Dim>, dtype: DType| r.push(Expr::Load { arg, index, guard: None }, dtype);
    let lhs = load(0, vec![Dim::axis(0), Dim::axis(2)], DType::U8);
    let rhs = load(1, vec![Dim::axis(1), Dim::axis(2)], DType::I8);
    let factor = load(2, vec![Dim::axis(1)], DType::F32);
    r.heart = Heart::Contract { k, lhs, rhs, acc: DType::I32 };
    let acc = r.push(Expr::Acc(0), DType::I32);
    let v = r.push(Expr::Cast(acc), DType::F32);
    let v = r.push(Expr::Call(ScalarFn::Mul, vec![v, factor]), DType::F32);
    let v = r.push(Expr::Call(ScalarFn::Round, vec![v]), DType::F32);
    let expr = r.push(Expr::Cast(v), DType::U8);
    r.outputs.push(RegionOutput { ty: ty(DType::U8, &[&m, &n]), expr, index: vec![Dim::axis(0), Dim::axis(1)] });
    r
}

#[test]
fn products_of_bytes_assemble_without_spills() {
    for arch in ["sm_80", "sm_90a"] {
        let target = Target::parse(arch).expect("a target");
        let family = FAMILIES.iter().find(|f| f.name == "gemm_mma").expect("the family");
        let mut kernels = vec![];
        for (i, (n, k)) in [(1024, 1024), (24, 144), (240, 40)].into_iter().enumerate() {
            let r = bytes(n, k);
            let schedules = (family.schedules)(&r, &target, &ArgFacts::default());
            assert!(schedules.len() >= 4, "{schedules:?}");
            for (j, schedule) in schedules.iter().enumerate() {
                kernels.push((family.build)(&r, schedule, &target, &format!("bytes_{i}_{j}"), &ArgFacts::default()).expect("builds").kernel);
            }
        }
        assemble(&kernels, arch);
    }
}

#[test]
fn convolutions_assemble_without_spills() {
    for arch in ["sm_80", "sm_90a"] {
        let target = Target::parse(arch).expect("a target");
        let mut kernels = vec![];
        for (i, (dtype, size, c, o)) in
            [(DType::F16, 56, 64, 64), (DType::F16, 14, 256, 256), (DType::F32, 56, 64, 64), (DType::F32, 112, 3, 32)].into_iter().enumerate()
        {
            let (r, facts) = convolution(dtype, size, c, o);
            let built = build(&r, &target, &format!("conv_{i}"), &facts, None).expect("builds");
            assert_eq!(built.schedule.family, if dtype == DType::F16 { "gemm_mma" } else { "gemm_gpu" });
            assert_eq!(built.packs.len(), 1, "weights are laid out for the kernel");
            kernels.push(built.kernel);
        }
        assemble(&kernels, arch);
    }
}

#[test]
fn long_products_of_a_core_ask_ahead_for_what_their_epilogue_reads() {
    let target = Target::parse("x86-64-v4").expect("a target");
    let asks = |k: i64, tail: Tail| {
        let r = linear(DType::F32, DType::F32, 768, k, tail);
        let built = build(&r, &target, "linear", &ArgFacts::default(), None).expect("builds");
        assert_eq!(built.schedule.family, "gemm_cpu");
        built.kernel.to_string().contains("near=1")
    };
    assert!(asks(1024, Tail::BiasGeluAdd));
    // Nothing of its size to read; over before memory answers.
    assert!(!asks(1024, Tail::BiasGelu) && !asks(64, Tail::BiasGeluAdd));
}
