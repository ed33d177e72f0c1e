//! Every loop family on random regions, compiled for this machine, against what the regions mean.
use crate::common::{
    Noise,
    regions::{Case, call, check, load_at, output, output_at, pick, size, sliced, ty},
};
use pavage_ir::{
    Binding, DType, Dim, Expr, ExprId, Heart, Region, Scalar, ScalarFn, Tensor,
    attr::{Layout, PoolFn, ReduceFn},
    region::{Stage, StageFn, Window},
};

/// A load of a new argument through a random view: some axes broadcast, the order perhaps permuted.
fn view(r: &mut Region, dtype: DType, noise: &mut Noise) -> ExprId {
    let rank = r.axes().len();
    let axes = r.axes();
    let mut order: Vec<usize> = (0..rank).collect();
    if noise.bits().is_multiple_of(4) {
        order.reverse();
    }
    let (mut shape, mut index) = (vec![], vec![]);
    for k in order {
        match noise.bits() % 6 {
            0 => {
                shape.push(Dim::one());
                index.push(Dim::ZERO);
            }
            1 => {
                // A slice: two before, one after, every element.
                shape.push(axes[k].clone() + Dim::from(3i64));
                index.push(Dim::axis(k) + Dim::from(2i64));
            }
            2 => {
                // Backwards.
                shape.push(axes[k].clone());
                index.push(axes[k].clone() - Dim::one() - Dim::axis(k));
            }
            _ => {
                shape.push(axes[k].clone());
                index.push(Dim::axis(k));
            }
        }
    }
    r.args.push(ty(dtype, &shape));
    load_at(r, r.args.len() - 1, index, None)
}

fn float_expr(r: &mut Region, dtype: DType, noise: &mut Noise) -> ExprId {
    let (x, y) = (view(r, dtype, noise), view(r, dtype, noise));
    let f = pick(noise, &[ScalarFn::Add, ScalarFn::Mul, ScalarFn::Sub, ScalarFn::Max, ScalarFn::Min]);
    let z = call(r, f, &[x, y]);
    let g = pick(noise, &[ScalarFn::Exp, ScalarFn::Tanh, ScalarFn::Abs, ScalarFn::Sigmoid, ScalarFn::Neg, ScalarFn::Floor]);
    let z = call(r, g, &[z]);
    let c = call(r, ScalarFn::Lt, &[x, z]);
    call(r, ScalarFn::Select, &[c, z, y])
}

fn int_expr(r: &mut Region, dtype: DType, noise: &mut Noise) -> ExprId {
    let (x, y) = (view(r, dtype, noise), view(r, dtype, noise));
    let f = pick(noise, &[ScalarFn::Add, ScalarFn::Mul, ScalarFn::Sub, ScalarFn::Max, ScalarFn::Div, ScalarFn::Xor]);
    let z = call(r, f, &[x, y]);
    call(r, ScalarFn::Min, &[z, x])
}

fn any_expr(r: &mut Region, noise: &mut Noise) -> ExprId {
    let dtype = pick(noise, &[DType::F32, DType::F32, DType::F32, DType::F16, DType::BF16, DType::F64, DType::I64, DType::I32, DType::U8, DType::I8]);
    if dtype.is_float() { float_expr(r, dtype, noise) } else { int_expr(r, dtype, noise) }
}

fn random_sizes(noise: &mut Noise, binding: &mut Binding, count: usize, of: &[i64]) -> Vec<Dim> {
    (0..count)
        .map(|_| {
            let n = pick(noise, of);
            size(n, noise, binding)
        })
        .collect()
}

fn random_space(noise: &mut Noise, binding: &mut Binding, least: usize) -> Vec<Dim> {
    let rank = least + (noise.bits() % 4) as usize;
    random_sizes(noise, binding, rank, &[1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 19])
}

#[test]
fn maps() {
    let mut noise = Noise(7);
    let mut cases = vec![];
    for _ in 0..60 {
        let mut binding = Binding::default();
        let space = random_space(&mut noise, &mut binding, 0);
        let mut r = Region::new("map", space);
        let v = any_expr(&mut r, &mut noise);
        output(&mut r, v);
        if noise.bits().is_multiple_of(3) {
            // A second output, written reversed into a larger tensor.
            let axes = r.space.clone();
            let shape = axes.iter().rev().map(|n| n.clone() + Dim::one()).collect();
            let index = (0..axes.len()).rev().map(|k| Dim::axis(k) + Dim::one()).collect();
            output_at(&mut r, v, shape, index);
        }
        cases.push(Case::new(r, binding, &mut noise));
    }
    check(&cases);
}

#[test]
fn every_tail_and_cast() {
    let mut noise = Noise(8);
    let mut cases = vec![];
    for n in 1..=17i64 {
        let mut binding = Binding::default();
        binding.0.insert("n".into(), n);
        let mut r = Region::new("cast", vec![Dim::from(3i64), Dim::sym("n")]);
        let from = pick(&mut noise, &[DType::F32, DType::I64, DType::Bool, DType::F16, DType::I32, DType::U8]);
        let x = view(&mut r, from, &mut noise);
        let to = pick(
            &mut noise,
            if from.is_float() {
                &[DType::F32, DType::Bool, DType::BF16][..]
            } else {
                &[DType::F32, DType::I64, DType::Bool, DType::BF16, DType::I32, DType::I8]
            },
        );
        let y = r.push(Expr::Cast(x), to);
        output(&mut r, y);
        cases.push(Case::new(r, binding, &mut noise));
    }
    check(&cases);
}

#[test]
fn indices_guards_and_reshapes() {
    let mut noise = Noise(9);
    let mut cases = vec![];
    for (rows, cols, wide) in [(5i64, 24i64, 8i64), (6, 10, 5), (4, 32, 16), (3, 7, 3)] {
        // Reshape [rows, cols] read as [.., wide]: quotient and remainder of one axis.
        let mut r = Region::new("reshape", vec![Dim::from(rows), Dim::from(cols * wide)]);
        r.args.push(ty(DType::F32, &[Dim::from(cols), Dim::from(rows), Dim::from(wide)]));
        let a1 = Dim::axis(1);
        let axes = r.axes();
        let index = vec![a1.div_in(&Dim::from(wide), &axes), Dim::axis(0), a1.mod_in(&Dim::from(wide), &axes)];
        let x = load_at(&mut r, 0, index, None);
        let y = call(&mut r, ScalarFn::Tanh, &[x]);
        output(&mut r, y);
        cases.push(Case::new(r, Binding::default(), &mut noise));
        // Pad by 2 and 3 along both axes: guarded load.
        let mut r = Region::new("pad", vec![Dim::from(rows + 5), Dim::from(cols + 5)]);
        r.args.push(ty(DType::F32, &[Dim::from(rows), Dim::from(cols)]));
        let mut guard = None;
        for (k, n) in [(0, rows), (1, cols)] {
            let at = r.push(Expr::Index(Dim::axis(k) - Dim::from(2i64)), DType::I64);
            let (zero, n) = (r.constant(Scalar::I(0), DType::I64), r.constant(Scalar::I(n.into()), DType::I64));
            let (above, below) = (call(&mut r, ScalarFn::Ge, &[at, zero]), call(&mut r, ScalarFn::Lt, &[at, n]));
            let both = call(&mut r, ScalarFn::And, &[above, below]);
            guard = Some(guard.map_or(both, |g| call(&mut r, ScalarFn::And, &[g, both])));
        }
        let index = vec![Dim::axis(0) - Dim::from(2i64), Dim::axis(1) - Dim::from(2i64)];
        let x = load_at(&mut r, 0, index, guard);
        output(&mut r, x);
        cases.push(Case::new(r, Binding::default(), &mut noise));
        // Gather rows and gather elements.
        for along_vector in [false, true] {
            let mut r = Region::new("gather", vec![Dim::from(rows), Dim::from(cols)]);
            r.args.push(ty(DType::I64, &[if along_vector { Dim::from(cols) } else { Dim::from(rows) }]));
            r.args.push(ty(DType::F32, &[Dim::from(16i64), Dim::from(cols)]));
            let i = load_at(&mut r, 0, vec![Dim::axis(usize::from(along_vector))], None);
            let at = Dim::from(pavage_ir::dim::Atom::Value(i.0)) + Dim::from(7i64);
            let at = at.larger(&Dim::ZERO).smaller(&Dim::from(15i64));
            let x = load_at(&mut r, 1, vec![at, Dim::axis(1)], None);
            output(&mut r, x);
            cases.push(Case::new(r, Binding::default(), &mut noise));
        }
    }
    check(&cases);
}

fn reduction(noise: &mut Noise) -> Case {
    let mut binding = Binding::default();
    let space = random_space(noise, &mut binding, 0);
    let count = 1 + (noise.bits() % 2) as usize;
    let reduced = random_sizes(noise, &mut binding, count, &[1, 2, 3, 5, 8, 9, 16, 31, 33, 70]);
    let mut r = Region::new("reduce", space);
    r.heart = Heart::Reduce { axes: reduced, stages: vec![] };
    let first = any_expr(&mut r, noise);
    let dtype = r.dtype(first);
    let fold = |f| StageFn::Fold(f);
    let mut stages = vec![];
    let sums = [fold(ReduceFn::Sum), fold(ReduceFn::Max), fold(ReduceFn::Min)];
    stages.push(Stage { f: pick(noise, &sums), expr: first });
    if count == 1 && noise.bits().is_multiple_of(3) {
        stages.push(Stage { f: StageFn::Arg { f: pick(noise, &[ReduceFn::Max, ReduceFn::Min]), last: noise.bits() & 1 == 1 }, expr: first });
    }
    let a0 = r.push(Expr::Acc(0), dtype);
    if noise.bits().is_multiple_of(2) && dtype.is_float() {
        // A second stage that reads the first.
        let d = call(&mut r, ScalarFn::Sub, &[first, a0]);
        let d = call(&mut r, ScalarFn::Tanh, &[d]);
        stages.push(Stage { f: fold(ReduceFn::Sum), expr: d });
        let a = r.push(Expr::Acc(stages.len() as u32 - 1), dtype);
        let y = call(&mut r, ScalarFn::Add, &[d, a]);
        let (axes, shape): (Vec<Dim>, Vec<Dim>) = r.axes().into_iter().enumerate().map(|(k, n)| (Dim::axis(k), n)).unzip();
        output_at(&mut r, y, shape, axes);
    }
    for (i, s) in stages.iter().enumerate() {
        let dtype = if matches!(s.f, StageFn::Arg { .. }) { DType::I64 } else { r.dtype(s.expr) };
        let a = r.push(Expr::Acc(i as u32), dtype);
        output(&mut r, a);
    }
    r.heart = match r.heart {
        Heart::Reduce { axes, .. } => Heart::Reduce { axes, stages },
        other => other,
    };
    let mut case = Case::new(r, binding, noise);
    case.tolerance = 1e-4;
    case
}

#[test]
fn reductions() {
    let mut noise = Noise(10);
    let cases: Vec<Case> = (0..60).map(|_| reduction(&mut noise)).collect();
    check(&sliced(cases));
}

#[test]
fn extremes_meet_nan() {
    let mut noise = Noise(11);
    let mut cases = vec![];
    for (n, f, last) in [(5i64, ReduceFn::Max, false), (40, ReduceFn::Min, true), (33, ReduceFn::Max, true), (70, ReduceFn::Min, false)] {
        for transposed in [false, true] {
            let mut r = Region::new("arg", vec![Dim::from(20i64)]);
            let (a, n) = (Dim::axis(0), Dim::from(n));
            let shape = if transposed { [n.clone(), Dim::from(20i64)] } else { [Dim::from(20i64), n.clone()] };
            r.args.push(ty(DType::F32, &shape));
            let index = if transposed { vec![Dim::axis(1), a] } else { vec![a, Dim::axis(1)] };
            let x = load_at(&mut r, 0, index, None);
            r.heart = Heart::Reduce { axes: vec![n], stages: vec![Stage { f: StageFn::Arg { f, last }, expr: x }, Stage { f: StageFn::Fold(f), expr: x }] };
            for (i, d) in [DType::I64, DType::F32].into_iter().enumerate() {
                let v = r.push(Expr::Acc(i as u32), d);
                output(&mut r, v);
            }
            let mut case = Case::new(r, Binding::default(), &mut noise);
            let values: Vec<f32> = (0..case.args[0].count())
                .map(|i| match noise.bits() % 12 {
                    0 if i % 3 == 0 => f32::NAN,
                    1 => f32::INFINITY,
                    2 => f32::NEG_INFINITY,
                    v => [0.0, -0.0, -1.5, 2.0][v as usize % 4],
                })
                .collect();
            case.args = vec![Tensor::from_f32(case.args[0].shape(), &values)];
            cases.push(case);
        }
    }
    check(&cases);
}

fn window(noise: &mut Noise, spatial: usize, layout: Layout) -> (Window, Vec<usize>) {
    let kernel: Vec<usize> = (0..spatial).map(|_| pick(noise, &[1, 2, 3])).collect();
    let pads = |noise: &mut Noise| (0..spatial).map(|_| pick(noise, &[0i64, 0, 1, 2])).collect();
    let window = Window {
        strides: (0..spatial).map(|_| pick(noise, &[1, 1, 2])).collect(),
        dilations: (0..spatial).map(|_| pick(noise, &[1, 1, 2])).collect(),
        lo: pads(noise),
        hi: pads(noise),
        layout,
    };
    (window, kernel)
}

/// `[n, c, spatial...]` in the layout's order.
fn arranged(n: Dim, c: Dim, spatial: Vec<Dim>, layout: Layout) -> Vec<Dim> {
    match layout {
        Layout::ChannelsFirst => [n, c].into_iter().chain(spatial).collect(),
        Layout::ChannelsLast => [n].into_iter().chain(spatial).chain([c]).collect(),
    }
}

fn outputs_of(input: &[i64], kernel: &[usize], w: &Window) -> Vec<i64> {
    (0..input.len()).map(|i| (input[i] + w.lo[i] + w.hi[i] - (w.dilations[i] * (kernel[i] - 1)) as i64 - 1) / w.strides[i] as i64 + 1).collect()
}

fn own_load(r: &mut Region, dtype: DType, shape: &[Dim]) -> ExprId {
    r.args.push(ty(dtype, shape));
    load_at(r, r.args.len() - 1, (0..shape.len()).map(Dim::axis).collect(), None)
}

fn relu_of_acc(r: &mut Region, dtype: DType) {
    let acc = r.push(Expr::Acc(0), dtype);
    let zero = r.constant(Scalar::I(0), dtype);
    let y = call(r, ScalarFn::Max, &[acc, zero]);
    output(r, y);
}

#[test]
fn windows() {
    let mut noise = Noise(12);
    let mut cases = vec![];
    for i in 0..48 {
        let layout = pick(&mut noise, Layout::ALL);
        let spatial = 1 + (noise.bits() % 2) as usize;
        let (w, kernel) = window(&mut noise, spatial, layout);
        let dtype = pick(&mut noise, &[DType::F32, DType::F32, DType::F16, DType::BF16]);
        let mut binding = Binding::default();
        let extents: Vec<i64> = (0..spatial).map(|_| pick(&mut noise, &[5, 7, 9, 12, 21])).collect();
        let dims = |v: &[i64]| v.iter().map(|n| Dim::from(*n)).collect::<Vec<_>>();
        let batch = size(2, &mut noise, &mut binding);
        let out = dims(&outputs_of(&extents, &kernel, &w));
        let case = if i % 2 == 0 {
            let c = Dim::from(pick(&mut noise, &[1i64, 3, 8, 17]));
            let input = arranged(batch.clone(), c.clone(), dims(&extents), layout);
            let mut r = Region::new("pool", arranged(batch, c, out, layout));
            let x = own_load(&mut r, dtype, &input);
            let x = call(&mut r, ScalarFn::Neg, &[x]);
            let f = pick(&mut noise, PoolFn::ALL);
            r.heart = Heart::Pool { f, kernel, window: w, x, input };
            relu_of_acc(&mut r, dtype);
            Case::new(r, binding, &mut noise)
        } else {
            let groups = pick(&mut noise, &[1usize, 1, 2, 3]);
            let (o, c) = (groups * pick(&mut noise, &[1usize, 4, 6]), pick(&mut noise, &[1usize, 3]));
            let input = arranged(batch.clone(), Dim::from(c * groups), dims(&extents), layout);
            let weights: Vec<Dim> = [o, c].into_iter().chain(kernel).map(Dim::from).collect();
            let mut r = Region::new("conv", arranged(batch, Dim::from(o), out, layout));
            let x = own_load(&mut r, dtype, &input);
            let wt = own_load(&mut r, dtype, &weights);
            r.heart = Heart::Conv { window: w, groups, x, input, w: wt, weights, acc: DType::F32 };
            relu_of_acc(&mut r, DType::F32);
            Case::new(r, binding, &mut noise)
        };
        // A pooled window that lies in the padding alone is a mean of nothing.
        cases.push(Case { tolerance: 3e-5, ..case });
    }
    check(&sliced(cases));
}

#[test]
fn contractions() {
    let mut noise = Noise(13);
    let mut cases = vec![];
    for i in 0..24 {
        let mut binding = Binding::default();
        let space = random_sizes(&mut noise, &mut binding, 2 + i % 3, if i % 3 == 0 { &[1, 3, 8, 17, 20] } else { &[1, 3, 5, 9] });
        let k = random_sizes(&mut noise, &mut binding, 1, &[1, 5, 16, 40]).remove(0);
        let (p, transposed) = (space.len(), i % 2 == 0);
        let mut r = Region::new("contract", space.clone());
        let dtype = pick(&mut noise, &[DType::F32, DType::F16, DType::I8, DType::F64]);
        let acc = match dtype {
            DType::I8 => DType::I32,
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let batch = |r: &Region| (r.space[..p - 2].to_vec(), (0..p - 2).map(Dim::axis).collect::<Vec<_>>());
        let (mut shape, mut index) = batch(&r);
        shape.extend([space[p - 2].clone(), k.clone()]);
        index.extend([Dim::axis(p - 2), Dim::axis(p)]);
        r.args.push(ty(dtype, &shape));
        let lhs = load_at(&mut r, 0, index, None);
        let (mut shape, mut index) = batch(&r);
        let (mut last, mut at) = ([k.clone(), space[p - 1].clone()], [Dim::axis(p), Dim::axis(p - 1)]);
        if transposed {
            last.reverse();
            at.reverse();
        }
        shape.extend(last);
        index.extend(at);
        r.args.push(ty(dtype, &shape));
        let rhs = load_at(&mut r, 1, index, None);
        r.heart = Heart::Contract { k, lhs, rhs, acc };
        relu_of_acc(&mut r, acc);
        cases.push(Case { tolerance: 3e-5, ..Case::new(r, binding, &mut noise) });
    }
    check(&sliced(cases));
}

#[test]
fn attention() {
    let mut noise = Noise(14);
    let mut cases = vec![];
    for i in 0..16 {
        let mut binding = Binding::default();
        let batch = random_sizes(&mut noise, &mut binding, i % 3, &[1, 2, 3]);
        let [s, t, e, d] = [&[1i64, 5, 9][..], &[3, 16, 37], &[4, 8, 20], &[4, 16, 24, 35]].map(|of| pick(&mut noise, of));
        let (s, t, e) = (size(s, &mut noise, &mut binding), size(t, &mut noise, &mut binding), size(e, &mut noise, &mut binding));
        let d = Dim::from(d);
        let of = |x: &Dim, y: &Dim| batch.iter().cloned().chain([x.clone(), y.clone()]).collect::<Vec<_>>();
        let mut r = Region::new("attention", of(&s, &d));
        let dtype = pick(&mut noise, &[DType::F32, DType::F32, DType::F16]);
        let p = batch.len();
        let q = own_load(&mut r, dtype, &of(&s, &e));
        let k = if i % 2 == 0 {
            own_load(&mut r, dtype, &of(&t, &e))
        } else {
            // Keys stored transposed.
            r.args.push(ty(dtype, &of(&e, &t)));
            let index = (0..p).chain([p + 1, p]).map(Dim::axis).collect();
            load_at(&mut r, 1, index, None)
        };
        let v = own_load(&mut r, dtype, &of(&t, &d));
        let mask = (i % 4 == 3).then(|| own_load(&mut r, DType::F32, &of(&s, &t)));
        r.heart = Heart::Attention { q, k, v, mask, scale: pavage_ir::Real::new(0.3), keys: t, depth: e, part: None };
        let acc = r.push(Expr::Acc(0), dtype);
        let y = call(&mut r, ScalarFn::Neg, &[acc]);
        output(&mut r, y);
        let mut case = Case::new(r, binding, &mut noise);
        if mask.is_some() {
            let m = &case.args[3];
            let values = m.to_f64().iter().map(|v| Scalar::F(if *v > 1.5 { f64::NEG_INFINITY } else { *v })).collect::<Vec<_>>();
            case.args[3] = Tensor::from_scalars(DType::F32, m.shape().to_vec(), values);
        }
        cases.push(Case { tolerance: 1e-4, ..case });
    }
    check(&sliced(cases));
}
