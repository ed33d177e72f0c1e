//! Contractions on a GPU without matrix units: against the meaning of their regions, by the interpreter.
use crate::common::Noise;
use crate::common::regions::{Case, call, check, check_gpu, load_at, output, ty};
use pavage_codegen::kernels::hopper_samples::{Tail, linear};
use pavage_codegen::kernels::{ArgFacts, build};
use pavage_codegen::targets::Target;
use pavage_codegen::tile::Kernel;
use pavage_codegen::tile::interp::run_gpu;
use pavage_codegen::tile::text::{assert_round_trip, parse};
use pavage_ir::region_eval::eval_region;
use pavage_ir::{Binding, DType, Dim, Expr, Heart, Region, Scalar, ScalarFn, Schedule, Tensor};

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
        let half = case.region.args[0].dtype.bits() == 16;
        assert_eq!(built.schedule.family, if half { "gemm_mma" } else { "gemm_gpu" });
    }
    check(&cases);
}

/// `[k, m] x [k, n]` when `turned`, else `[m, k] x [n, k]`.
fn turned(dtype: DType, [m, n, k]: [i64; 3], turned: bool) -> Region {
    let (m, n, k) = (Dim::from(m), Dim::from(n), Dim::from(k));
    let mut r = Region::new("turned", vec![m.clone(), n.clone()]);
    let order = |own: &Dim| if turned { [k.clone(), own.clone()] } else { [own.clone(), k.clone()] };
    r.args = vec![ty(dtype, &order(&m)), ty(dtype, &order(&n))];
    let at = |own: usize| if turned { vec![Dim::axis(2), Dim::axis(own)] } else { vec![Dim::axis(own), Dim::axis(2)] };
    let (lhs, rhs) = (load_at(&mut r, 0, at(0), None), load_at(&mut r, 1, at(1), None));
    r.heart = Heart::Contract { k, lhs, rhs, acc: DType::F32 };
    let v = r.push(Expr::Acc(0), DType::F32);
    output(&mut r, v);
    r
}

#[test]
fn matrix_units_multiply_operands_of_every_order_and_alignment() {
    let mut noise = Noise(78);
    let tiles: [[i64; 7]; 5] =
        [[128, 256, 64, 64, 32, 4, 1], [128, 128, 64, 64, 32, 4, 2], [128, 64, 64, 32, 32, 4, 2], [64, 64, 32, 32, 32, 4, 3], [32, 64, 16, 32, 64, 4, 3]];
    let mut cases = vec![];
    for (i, tile) in tiles.iter().enumerate() {
        let dtype = if i % 2 == 0 { DType::BF16 } else { DType::F16 };
        let mut regions = vec![linear(dtype, dtype, 136, 72, Tail::BiasGeluAdd), turned(dtype, [200, 136, 104], i % 2 == 0)];
        if i > 2 {
            // Rows that are no multiples of 16 bytes are evaluated.
            regions.extend([turned(dtype, [70, 66, 35], true), turned(dtype, [33, 70, 36], false), linear(dtype, DType::F32, 77, 50, Tail::BiasGelu)]);
        }
        for region in regions {
            let mut case = Case::new(region, bind(&[("m", 150)]), &mut noise);
            let keys = ["bm", "bn", "wm", "wn", "bk", "stages", "ctas"];
            let knobs: Vec<(&str, i64)> = keys.into_iter().zip(*tile).collect();
            case.schedule = Some(Schedule::new("gemm_mma", &knobs));
            case.tolerance = 2e-2;
            cases.push(case);
        }
    }
    check_gpu(&cases, "sm_80");
}

#[test]
fn copies_that_are_not_waited_for_are_caught() {
    let region = turned(DType::F16, [64, 64, 256], false);
    let mut case = Case::new(region, bind(&[]), &mut Noise(5));
    case.tolerance = 2e-2;
    let target = Target::parse("sm_80").expect("a known target");
    let good = build(&case.region, &target, "k", &ArgFacts::default(), None).expect("builds").kernel;
    let text = good.to_string();
    assert_round_trip(&good);
    run_on_gpu(&case, &good).expect("right as it is");
    // The wait in the loop lets one group more be in flight; the copies begin a slot too early.
    let late = text.replacen("cp_async_wait[pending=2]", "cp_async_wait[pending=3]", 2);
    let late = parse(&late).expect("a kernel");
    assert_ne!(late, good);
    let e = run_on_gpu(&case, &late).expect_err("a wait that proves too little");
    assert!(e.contains("NaN"), "{e}");
    let open = parse(&text.replace("  cp_async_wait[pending=0]\n", "")).expect("a kernel");
    let e = run_on_gpu(&case, &open).expect_err("no last wait");
    assert!(e.contains("in flight when the kernel ends"), "{e}");
}

/// Whether `kernel` computes what the case's region means, on the grid that its own schedule would use.
fn run_on_gpu(case: &Case, kernel: &Kernel) -> Result<(), String> {
    let target = Target::parse("sm_80").expect("a known target");
    let built = build(&case.region, &target, "k", &ArgFacts::default(), None).map_err(|e| e.to_string())?;
    let grid = built.grid.expect("a grid").map(|d| d.as_const().expect("fixed sizes") as u32);
    let want = eval_region(&case.region, &case.args, &case.binding, None)?;
    let mut bufs: Vec<Vec<u8>> = case.args.iter().map(|t| t.bytes().to_vec()).collect();
    bufs.push(vec![0xff; want[0].bytes().len()]);
    run_gpu(kernel, &mut bufs, &[], grid, 3).map_err(|e| e.to_string())?;
    let got = Tensor::new(want[0].dtype(), want[0].shape(), bufs.remove(2)).map_err(|e| e.to_string())?;
    for i in 0..got.count() {
        let (g, w) = (got.get(i).f(), want[0].get(i).f());
        if g.is_nan() || (g - w).abs() > case.tolerance * w.abs().max(1.0) {
            return Err(format!("element {i}: {g:?}, want {w}"));
        }
    }
    Ok(())
}

/// How the operands of a product of bytes lie.
#[derive(Clone, Copy, Debug)]
enum Lie {
    /// `[m, k] x [n, k]`.
    Rows,
    /// `[m, k] x [k, n]`.
    Plain,
    /// `[k, m] x [k, n]`.
    Turned,
    /// `[b, m, k] x [b, k, n]`.
    Batched,
}

/// Sums of products of bytes: as they are, or scaled by column, with a residual of bytes, as bytes.
fn bytewise([a, w]: [DType; 2], [m, n, k]: [i64; 3], lie: Lie, requantised: bool) -> Region {
    let batch = matches!(lie, Lie::Batched).then(|| Dim::from(3i64));
    let (m, n, k) = (Dim::from(m), Dim::from(n), Dim::from(k));
    let mut r = Region::new("bytewise", batch.iter().cloned().chain([m.clone(), n.clone()]).collect());
    let p = r.space.len();
    let orders = match lie {
        Lie::Rows => [[p - 2, p], [p - 1, p]],
        Lie::Plain | Lie::Batched => [[p - 2, p], [p, p - 1]],
        Lie::Turned => [[p, p - 2], [p, p - 1]],
    };
    let extent = |axis: usize| if axis == p { k.clone() } else { r.space[axis].clone() };
    let shapes = orders.map(|o| batch.iter().cloned().chain(o.map(extent)).collect::<Vec<_>>());
    r.args = vec![ty(a, &shapes[0]), ty(w, &shapes[1])];
    let index = |o: [usize; 2]| (0..p - 2).chain(o).map(Dim::axis).collect();
    let (lhs, rhs) = (load_at(&mut r, 0, index(orders[0]), None), load_at(&mut r, 1, index(orders[1]), None));
    r.heart = Heart::Contract { k, lhs, rhs, acc: DType::I32 };
    let mut v = r.push(Expr::Acc(0), DType::I32);
    if requantised {
        r.args.extend([ty(DType::F32, &[n]), ty(DType::U8, &r.space)]);
        let here: Vec<Dim> = (0..p).map(Dim::axis).collect();
        let (factor, other) = (load_at(&mut r, 2, vec![Dim::axis(p - 1)], None), load_at(&mut r, 3, here, None));
        v = r.push(Expr::Cast(v), DType::F32);
        let small = r.constant(Scalar::F(1.0 / 4096.0), DType::F32);
        let other = r.push(Expr::Cast(other), DType::F32);
        let factor = call(&mut r, ScalarFn::Mul, &[factor, small]);
        v = call(&mut r, ScalarFn::Fma, &[v, factor, other]);
        v = call(&mut r, ScalarFn::Round, &[v]);
        v = r.push(Expr::Cast(v), DType::U8);
    }
    output(&mut r, v);
    r
}

/// A case of bytes of every value; the second operand constant perhaps.
fn byte_case(region: Region, constant: bool, noise: &mut Noise) -> Case {
    let mut case = Case::new(region, bind(&[]), noise);
    for t in case.args.iter_mut().filter(|t| t.dtype().bits() == 8) {
        let (lo, _) = t.dtype().int_range();
        *t = Tensor::from_scalars(t.dtype(), t.shape().to_vec(), (0..t.count()).map(|_| Scalar::I(lo + i128::from(noise.bits() % 256))).collect::<Vec<_>>());
    }
    if constant {
        case.facts.constants = vec![None, Some(case.args[1].clone())];
    }
    case.tolerance = 0.0;
    case
}

#[test]
fn matrix_units_sum_bytes_exactly() {
    let mut noise = Noise(79);
    let tiles: [[i64; 7]; 6] = [
        [128, 256, 64, 64, 128, 3, 1],
        [128, 128, 64, 64, 64, 4, 2],
        [128, 64, 64, 32, 64, 4, 2],
        [128, 32, 32, 32, 64, 4, 3],
        [64, 64, 32, 32, 64, 4, 3],
        [32, 64, 16, 32, 128, 4, 3],
    ];
    let (u, i) = (DType::U8, DType::I8);
    let mut cases = vec![];
    for (t, tile) in tiles.iter().enumerate() {
        let kinds = [[u, i], [i, i], [u, u], [i, u]][t % 4];
        let knobs: Vec<(&str, i64)> = ["bm", "bn", "wm", "wn", "bk", "stages", "ctas"].into_iter().zip(*tile).collect();
        let mut of_tile = vec![
            byte_case(bytewise(kinds, [137, 70, 208], Lie::Rows, t % 2 == 0), false, &mut noise),
            byte_case(bytewise(kinds, [40, 33, 72], Lie::Plain, t % 2 == 1), true, &mut noise),
        ];
        if t > 2 {
            // Copies of 8 and 4 bytes; nothing that is copied; what is gathered.
            of_tile.extend([
                byte_case(bytewise(kinds, [66, 24, 44], Lie::Rows, true), true, &mut noise),
                byte_case(bytewise(kinds, [35, 17, 27], Lie::Plain, true), true, &mut noise),
                byte_case(bytewise(kinds, [70, 66, 35], Lie::Turned, true), false, &mut noise),
                byte_case(bytewise(kinds, [18, 40, 64], Lie::Batched, false), t % 2 == 0, &mut noise),
            ]);
        }
        for mut case in of_tile {
            case.schedule = Some(Schedule::new("gemm_mma", &knobs));
            cases.push(case);
        }
    }
    check_gpu(&cases, "sm_80");
    // Chosen without being asked for.
    let target = Target::parse("sm_90a").expect("a known target");
    let built = build(&cases[0].region, &target, "k", &ArgFacts::default(), None).expect("builds");
    assert_eq!(built.schedule.family, "gemm_mma");
}
