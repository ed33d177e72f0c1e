//! Ops that stay one op: compiled for this machine, against their evaluators.
use crate::common::{
    Noise,
    regions::{Case, check, op_region, pick, size, sliced, ty},
};
use pavage_ir::{
    Binding, DType, Dim, Op, Real, Scalar, Tensor,
    activation::Activation,
    attr::{Aggregate, CoordMode, Direction, Layout, NearestMode, ReduceFn, ResizeMode, ScatterFn},
    dim::{Atom, Sym},
};

fn dims(v: &[i64]) -> Vec<Dim> {
    v.iter().map(|n| Dim::from(*n)).collect()
}

#[test]
fn cumulative() {
    let mut noise = Noise(21);
    let mut cases = vec![];
    for axis in [0usize, 1, 2] {
        for (exclusive, reverse) in [(false, false), (true, false), (false, true), (true, true)] {
            let mut binding = Binding::default();
            let shape: Vec<Dim> = [3i64, 7, 19].into_iter().map(|n| size(n, &mut noise, &mut binding)).collect();
            let f = pick(&mut noise, &[ReduceFn::Sum, ReduceFn::Prod]);
            let dtype = pick(&mut noise, &[DType::F32, DType::I64, DType::F64, DType::I32]);
            let op = Op::Cumulative { f, axis, exclusive, reverse };
            cases.push(Case { tolerance: 1e-4, ..Case::new(op_region(op, vec![ty(dtype, &shape)]), binding, &mut noise) });
        }
    }
    check(&cases);
}

#[test]
fn topk() {
    let mut noise = Noise(22);
    let mut cases = vec![];
    for i in 0..18 {
        let mut binding = Binding::default();
        let n = pick(&mut noise, &[5i64, 16, 37, 40]);
        let shape: Vec<Dim> = [3, n, if i % 3 == 0 { 4 } else { 1 }].into_iter().map(|n| size(n, &mut noise, &mut binding)).collect();
        let dtype = pick(&mut noise, &[DType::F32, DType::F32, DType::I64, DType::F16]);
        let k = pick(&mut noise, &[1i64, 3, 5]);
        let op = Op::TopK { axis: 1, k: Dim::from(k), largest: i % 2 == 0 };
        let mut case = Case::new(op_region(op, vec![ty(dtype, &shape)]), binding, &mut noise);
        if dtype == DType::F32 {
            let of = case.args[0].shape().to_vec();
            let count = case.args[0].count();
            let values: Vec<f32> = (0..count)
                .map(|_| match noise.bits() % 9 {
                    0 => f32::NEG_INFINITY,
                    1 => f32::INFINITY,
                    2 if i > 9 => f32::NAN,
                    v => (v % 3) as f32,
                })
                .collect();
            case.args = vec![Tensor::from_f32(of, &values)];
        }
        cases.push(case);
    }
    check(&cases);
}

#[test]
fn nonzero() {
    let mut noise = Noise(23);
    let mut cases = vec![];
    for dtype in [DType::Bool, DType::F32, DType::I64] {
        let sym = Sym { name: "found".into(), min: 0, max: None };
        let mut case = Case::new(op_region(Op::NonZero { sym: sym.clone() }, vec![ty(dtype, &dims(&[3, 5, 7]))]), Binding::default(), &mut noise);
        let values = (0..105).map(|_| Scalar::I(i128::from(noise.bits().is_multiple_of(3))));
        case.args = vec![Tensor::from_scalars(dtype, [3, 5, 7], values)];
        let found = (0..105).filter(|i| case.args[0].get(*i).b()).count();
        case.binding.0.insert("found".into(), found as i64);
        assert_eq!(case.region.outputs[0].ty.shape[1], Dim::from(Atom::Sym(sym)));
        cases.push(case);
    }
    check(&cases);
}

#[test]
fn conv_transpose() {
    let mut noise = Noise(24);
    let mut cases = vec![];
    for i in 0..16 {
        let layout = pick(&mut noise, Layout::ALL);
        let groups = pick(&mut noise, &[1usize, 1, 2]);
        let (c, o) = (groups as i64 * 3, pick(&mut noise, &[1i64, 4]));
        let image = [pick(&mut noise, &[4i64, 6]), pick(&mut noise, &[3i64, 9])];
        let x = match layout {
            Layout::ChannelsFirst => dims(&[2, c, image[0], image[1]]),
            Layout::ChannelsLast => dims(&[2, image[0], image[1], c]),
        };
        let w = dims(&[c, o, pick(&mut noise, &[1, 2, 3]), pick(&mut noise, &[2, 4])]);
        let two = |noise: &mut Noise, of: &[usize]| vec![pick(noise, of), pick(noise, of)];
        let op = Op::ConvTranspose {
            strides: two(&mut noise, &[1, 2, 3]),
            dilations: two(&mut noise, if i % 4 == 0 { &[1, 2] } else { &[1] }),
            lo: vec![pick(&mut noise, &[0, 1]), 0],
            hi: vec![0, pick(&mut noise, &[0, 1])],
            extra: vec![0, pick(&mut noise, &[0, 1])],
            groups,
            layout,
        };
        let dtype = pick(&mut noise, &[DType::F32, DType::F32, DType::F16]);
        cases.push(Case { tolerance: 2e-5, ..Case::new(op_region(op, vec![ty(dtype, &x), ty(dtype, &w)]), Binding::default(), &mut noise) });
    }
    check(&sliced(cases));
}

#[test]
fn resize() {
    let mut noise = Noise(25);
    let mut cases = vec![];
    for i in 0..40 {
        let image = [pick(&mut noise, &[4i64, 7]), pick(&mut noise, &[5i64, 8])];
        let scales = [pick(&mut noise, &[2.0, 1.0, 0.5, 1.7]), pick(&mut noise, &[2.0, 3.0, 0.6, 1.3])];
        let last = i % 2 == 0;
        let first = if last { 1 } else { 2 };
        let shape = if last { dims(&[2, image[0], image[1], 5]) } else { dims(&[2, 3, image[0], image[1]]) };
        let mut sizes = shape.clone();
        let mut all = vec![Real::new(1.0); 4];
        for k in 0..2 {
            all[first + k] = Real::new(scales[k]);
            sizes[first + k] = Dim::from(((image[k] as f64) * scales[k]).floor() as i64);
        }
        let mode = pick(&mut noise, ResizeMode::ALL);
        let coord = pick(&mut noise, CoordMode::ALL);
        let op = Op::Resize {
            mode,
            coord,
            nearest: pick(&mut noise, NearestMode::ALL),
            sizes,
            scales: all,
            cubic_a: Real::new(-0.75),
            outside: Real::new(2.5),
            antialias: mode != ResizeMode::Nearest && noise.bits().is_multiple_of(3),
            exclude: noise.bits().is_multiple_of(3),
        };
        let dtype = pick(&mut noise, &[DType::F32, DType::F32, DType::F16, DType::F64]);
        let mut args = vec![ty(dtype, &shape)];
        if coord == CoordMode::TfCrop {
            args.push(ty(DType::F32, &dims(&[8])));
        }
        let mut case = Case::new(op_region(op, args), Binding::default(), &mut noise);
        if coord == CoordMode::TfCrop {
            let mut roi = vec![0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0];
            roi[first] = 0.125;
            roi[first + 5] = 1.25;
            case.args[1] = Tensor::from_f32([8], &roi);
        }
        cases.push(Case { tolerance: 1e-4, ..case });
    }
    check(&sliced(cases));
}

#[test]
fn scatters() {
    let mut noise = Noise(26);
    let mut cases = vec![];
    for i in 0..20 {
        let f = pick(&mut noise, ScatterFn::ALL);
        let dtype = pick(&mut noise, &[DType::F32, DType::F32, DType::I64, DType::F16]);
        let mut binding = Binding::default();
        let shape: Vec<Dim> = [6, 5, 19].into_iter().map(|n| size(n, &mut noise, &mut binding)).collect();
        let (op, indices, updates) = if i % 2 == 0 {
            let depth = 1 + (noise.bits() % 3) as usize;
            let updates = dims(&[4]).into_iter().chain(shape[depth..].iter().cloned()).collect::<Vec<_>>();
            (Op::ScatterNd { f }, dims(&[4, depth as i64]), updates)
        } else {
            let axis = (noise.bits() % 3) as usize;
            let at = dims(&[3, 5, 7]);
            (Op::ScatterElements { axis, f }, at.clone(), at)
        };
        let mut case = Case::new(op_region(op, vec![ty(dtype, &shape), ty(DType::I64, &indices), ty(dtype, &updates)]), binding, &mut noise);
        let at = (0..case.args[1].count()).map(|_| Scalar::I(i128::from(noise.bits() % 9) - 4));
        case.args[1] = Tensor::from_scalars(DType::I64, case.args[1].shape().to_vec(), at);
        cases.push(Case { tolerance: 1e-4, ..case });
    }
    check(&cases);
}

fn activations(noise: &mut Noise, n: usize) -> Vec<Activation> {
    // Gates that are bounded, so that no state runs away; others at the end of a cell.
    let hard = Activation::HardSigmoid(Real::new(0.25), Real::new(0.4));
    let scaled = Activation::ScaledTanh(Real::new(0.7), Real::new(1.5));
    (0..n)
        .map(|i| {
            if i % 3 == 2 {
                let f = pick(noise, &Activation::all());
                f.with(&f.parameters().iter().map(|p| Real::new(p.get() * 0.75)).collect::<Vec<_>>()).expect("as many as it has")
            } else {
                pick(noise, &[Activation::Sigmoid, hard, Activation::Tanh, Activation::Softsign, scaled])
            }
        })
        .collect()
}

#[test]
fn recurrences() {
    let mut noise = Noise(27);
    let mut cases = vec![];
    for i in 0..24 {
        let mut binding = Binding::default();
        let direction = pick(&mut noise, Direction::ALL);
        let d = if direction == Direction::Bidirectional { 2 } else { 1 };
        let (h, inputs) = (pick(&mut noise, &[1i64, 5, 16, 20, 32]), pick(&mut noise, &[1i64, 4, 7, 16]));
        let (t, n) = (size(pick(&mut noise, &[1, 6, 9]), &mut noise, &mut binding), size(pick(&mut noise, &[1, 3]), &mut noise, &mut binding));
        let clip = Real::new(if noise.bits().is_multiple_of(4) { 0.7 } else { 0.0 });
        let (gates, op) = match i % 3 {
            0 => (4, Op::Lstm { direction, activations: activations(&mut noise, 3 * d), clip, coupled: noise.bits().is_multiple_of(3) }),
            1 => (3, Op::Gru { direction, activations: activations(&mut noise, 2 * d), clip, linear_before_reset: noise.bits().is_multiple_of(2) }),
            _ => (1, Op::Rnn { direction, activations: activations(&mut noise, d), clip }),
        };
        let dtype = pick(&mut noise, &[DType::F32, DType::F32, DType::F64, DType::F16]);
        let d = Dim::from(d);
        let of = |shape: &[Dim]| ty(dtype, shape);
        let state = [d.clone(), n.clone(), Dim::from(h)];
        let mut args = vec![
            of(&[t, n.clone(), Dim::from(inputs)]),
            of(&[d.clone(), Dim::from(gates * h), Dim::from(inputs)]),
            of(&[d.clone(), Dim::from(gates * h), Dim::from(h)]),
            of(&[d.clone(), Dim::from(2 * gates * h)]),
            of(&state),
        ];
        if gates == 4 {
            args.extend([of(&state), of(&[d, Dim::from(3 * h)])]);
        }
        args.push(ty(DType::I32, &[n]));
        let mut case = Case::new(op_region(op, args), binding, &mut noise);
        for k in 1..3 {
            // Weights small enough that the recurrence does not amplify rounding.
            let w = &case.args[k];
            let scaled: Vec<Scalar> = w.to_f64().iter().map(|v| Scalar::F(v * 0.1)).collect();
            case.args[k] = Tensor::from_scalars(dtype, w.shape().to_vec(), scaled);
        }
        let last = case.args.len() - 1;
        let lens = (0..case.args[last].count()).map(|_| Scalar::I(i128::from(noise.bits() % 9)));
        case.args[last] = Tensor::from_scalars(DType::I32, case.args[last].shape().to_vec(), lens);
        if i % 4 != 0 {
            case.facts.constants = case.args.iter().enumerate().map(|(k, t)| (k == 1 || k == 2).then(|| t.clone())).collect();
        }
        case.tolerance = if dtype == DType::F16 { 2e-2 } else { 1e-4 };
        cases.push(case);
    }
    check(&cases);
}

/// Complete trees of a depth with random tests; leaves of random length.
fn forest(noise: &mut Noise, trees: usize, depth: u32, features: u64, targets: u64) -> Vec<Tensor> {
    let (mut feature, mut mode, mut threshold, mut yes, mut no, mut missing, mut roots) = (vec![], vec![], vec![], vec![], vec![], vec![], vec![]);
    let (mut target, mut weight) = (vec![], vec![]);
    for _ in 0..trees {
        let base = feature.len() as i64;
        roots.push(base);
        for node in 0..(1i64 << (depth + 1)) - 1 {
            let inner = node < (1 << depth) - 1;
            feature.push((noise.bits() % features) as i64);
            threshold.push((noise.bits() % 5) as f32 - 2.0);
            missing.push((noise.bits() & 1) as i64);
            if inner {
                mode.push((noise.bits() % 6) as i64);
                yes.push(base + 2 * node + 1);
                no.push(base + 2 * node + 2);
            } else {
                mode.push(6);
                yes.push(weight.len() as i64);
                for _ in 0..noise.bits() % 3 {
                    target.push((noise.bits() % targets) as i64);
                    weight.push(noise.unit() as f32);
                }
                no.push(weight.len() as i64);
            }
        }
    }
    let ints = |v: &Vec<i64>| Tensor::from_i64([v.len()], v);
    let floats = |v: &Vec<f32>| Tensor::from_f32([v.len()], v);
    vec![ints(&feature), ints(&mode), floats(&threshold), ints(&yes), ints(&no), ints(&missing), ints(&roots), ints(&target), floats(&weight)]
}

#[test]
fn trees() {
    let mut noise = Noise(28);
    let mut cases = vec![];
    for aggregate in Aggregate::ALL {
        for rows in [1i64, 7, 20] {
            let mut binding = Binding::default();
            let parts = forest(&mut noise, 5, 4, 6, 3);
            let mut args = vec![ty(DType::F32, &[size(rows, &mut noise, &mut binding), Dim::from(6i64)])];
            args.extend(parts.iter().map(Tensor::ty));
            let mut case = Case::new(op_region(Op::TreeEnsemble { targets: 3, aggregate: *aggregate }, args), binding, &mut noise);
            let values: Vec<f32> = (0..rows * 6)
                .map(|_| match noise.bits() % 7 {
                    0 => f32::NAN,
                    v => v as f32 - 3.0,
                })
                .collect();
            case.args = [Tensor::from_f32([rows as usize, 6], &values)].into_iter().chain(parts).collect();
            cases.push(case);
        }
    }
    check(&cases);
}
