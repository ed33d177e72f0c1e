//! Contractions on a GPU without matrix units: against the meaning of their regions, by the interpreter.
use crate::common::Noise;
use crate::common::regions::{Case, check, load_at, output, ty};
use pavage_codegen::kernels::hopper_samples::{Tail, linear};
use pavage_codegen::kernels::{ArgFacts, build};
use pavage_codegen::targets::Target;
use pavage_ir::{Binding, DType, Dim, Expr, Heart, Region};

fn bind(pairs: &[(&str, i64)]) -> Binding {
    Binding(pairs.iter().map(|(n, v)| ((*n).into(), *v)).collect())
}

/// `[b, m, k] x [b, n, k]`, the second operand's batch shared when `shared`.
fn batched(dtype: DType, acc: DType, [b, m, n, k]: [i64; 4], shared: bool) -> Region {
    let (b, m, n, k) = (Dim::from(b), Dim::from(m), Dim::from(n), Dim::from(k));
    let mut r = Region::new("batched", vec![b.clone(), m.clone(), n.clone()]);
    r.args.push(ty(dtype, &[b.clone(), m.clone(), k.clone()]));
    r.args.push(if shared { ty(dtype, &[n.clone(), k.clone()]) } else { ty(dtype, &[b, n, k.clone()]) });
    let lhs = load_at(&mut r, 0, vec![Dim::axis(0), Dim::axis(1), Dim::axis(3)], None);
    let index = if shared { vec![Dim::axis(2), Dim::axis(3)] } else { vec![Dim::axis(0), Dim::axis(2), Dim::axis(3)] };
    let rhs = load_at(&mut r, 1, index, None);
    r.heart = Heart::Contract { k, lhs, rhs, acc };
    let v = r.push(Expr::Acc(0), acc);
    output(&mut r, v);
    r
}

#[test]
fn contractions_are_right_in_every_type_and_shape() {
    let mut noise = Noise(77);
    let mut cases = vec![];
    for (dtype, out, m, n, k, tail) in [
        (DType::F32, DType::F32, 33, 70, 37, Tail::BiasGeluAdd),
        (DType::F32, DType::F32, 130, 132, 64, Tail::BiasGelu),
        (DType::BF16, DType::BF16, 40, 76, 36, Tail::None),
        (DType::F16, DType::F32, 65, 33, 20, Tail::BiasGelu),
    ] {
        let mut case = Case::new(linear(dtype, out, n, k, tail), bind(&[("m", m)]), &mut noise);
        case.tolerance = if dtype == DType::F32 { 2e-5 } else { 2e-2 };
        cases.push(case);
    }
    for (region, tolerance) in [
        (batched(DType::F32, DType::F32, [3, 20, 68, 32], false), 2e-5),
        (batched(DType::F32, DType::F32, [2, 66, 12, 19], true), 2e-5),
        (batched(DType::F64, DType::F64, [2, 5, 9, 33], false), 1e-12),
    ] {
        let mut case = Case::new(region, bind(&[]), &mut noise);
        case.tolerance = tolerance;
        cases.push(case);
    }
    let target = Target::parse("sm_80").expect("a known target");
    for case in &cases {
        let built = build(&case.region, &target, "k", &ArgFacts::default(), None).expect("builds");
        assert_eq!(built.schedule.family, "gemm_gpu");
    }
    check(&cases);
}
