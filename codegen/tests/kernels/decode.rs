//! Attention of few queries, and over parts of the keys, on a GPU: against the meaning of their regions, by the interpreter.
use crate::common::Noise;
use crate::common::regions::{Case, check_gpu, load_at, output, ty};
use pavage_codegen::kernels::{ArgFacts, build};
use pavage_codegen::targets::Target;
use pavage_ir::{Binding, DType, Dim, Expr, Heart, Real, Region, Scalar, Schedule, Tensor};

/// What is asked of a kernel.
struct Decode {
    dtype: DType,
    /// Batch entries, queries, keys, depth and width.
    sizes: [i64; 5],
    /// Keys of a part.
    part: Option<i64>,
    masked: bool,
    /// Queries share keys and values in pairs of batch entries.
    shared: bool,
}

impl Decode {
    fn case(&self, noise: &mut Noise) -> Case {
        let [b, s, t, e, d] = self.sizes;
        let binding = Binding([("n".into(), b), ("t".into(), t)].into_iter().collect());
        let (b, s, t, e, d) = (Dim::sym("n"), Dim::from(s), Dim::sym("t"), Dim::from(e), Dim::from(d));
        let part = self.part.map(Dim::from);
        let mut r = Region::new("decode", vec![b.clone()]);
        r.space.extend(part.iter().map(|n| t.ceil_div(n)));
        r.space.extend([s.clone(), if part.is_some() { d.clone() + Dim::from(2i64) } else { d.clone() }]);
        let entry = if self.shared { Dim::axis(0).div(&Dim::from(2i64)) } else { Dim::axis(0) };
        r.args = vec![
            ty(self.dtype, &[b.clone(), s.clone(), e.clone()]),
            ty(self.dtype, &[b.clone(), t.clone(), e.clone()]),
            ty(self.dtype, &[b.clone(), t.clone(), d]),
        ];
        let q = load_at(&mut r, 0, (0..3).map(Dim::axis).collect(), None);
        let k = load_at(&mut r, 1, vec![entry.clone(), Dim::axis(1), Dim::axis(2)], None);
        let v = load_at(&mut r, 2, vec![entry, Dim::axis(1), Dim::axis(2)], None);
        let mask = self.masked.then(|| {
            r.args.push(ty(DType::F32, &[b, s, t.clone()]));
            load_at(&mut r, 3, (0..3).map(Dim::axis).collect(), None)
        });
        r.heart = Heart::Attention { q, k, v, mask, scale: Real::new(0.2), keys: t, depth: e, part };
        let dtype = if self.part.is_some() { DType::F32 } else { self.dtype };
        let acc = r.push(Expr::Acc(0), dtype);
        output(&mut r, acc);
        let mut case = Case::new(r, binding, noise);
        if self.masked {
            // The first keys are hidden from all queries, the first query sees no key at all; others here and there.
            let (m, keys) = (&case.args[3], self.sizes[2] as usize);
            let hidden = |i: usize| i < keys || i % keys < keys / 3;
            let values = m.to_f64().iter().enumerate().map(|(i, v)| Scalar::F(if hidden(i) || *v > 1.5 { f64::NEG_INFINITY } else { *v })).collect::<Vec<_>>();
            case.args[3] = Tensor::from_scalars(DType::F32, m.shape().to_vec(), values);
        }
        Case { tolerance: 1e-4, ..case }
    }
}

#[test]
fn few_queries_read_each_key_once() {
    let mut noise = Noise(21);
    let mut cases = vec![];
    for (dtype, sizes, part, masked, shared) in [
        (DType::F32, [2, 1, 37, 64, 64], None, false, false),
        (DType::F16, [2, 4, 150, 64, 64], None, true, true),
        (DType::BF16, [1, 8, 70, 128, 128], None, false, false),
        (DType::F16, [2, 3, 33, 96, 40], None, true, false),
        (DType::F32, [1, 16, 20, 7, 35], None, true, false),
        (DType::F16, [2, 4, 150, 64, 64], Some(32), true, true),
        (DType::F32, [3, 1, 131, 128, 128], Some(64), false, false),
        (DType::BF16, [2, 5, 65, 80, 256], Some(16), true, false),
        (DType::F16, [1, 11, 40, 20, 20], Some(13), true, false),
        (DType::F32, [2, 2, 9, 64, 64], Some(128), true, true),
    ] {
        cases.push(Decode { dtype, sizes, part, masked, shared }.case(&mut noise));
    }
    let target = Target::parse("sm_80").expect("a known target");
    for case in &cases {
        let built = build(&case.region, &target, "k", &ArgFacts::default(), None).expect("builds");
        assert_eq!(built.schedule.family, "attention_few");
    }
    check_gpu(&cases, "sm_80");
}

#[test]
fn schedules_of_few_queries_agree() {
    let mut noise = Noise(22);
    let mut cases = vec![];
    for [warps, rows, keys] in [[1, 8, 1], [8, 4, 4], [2, 3, 8], [4, 1, 2]] {
        let asked = Decode { dtype: DType::F16, sizes: [2, 6, 100, 64, 64], part: Some(50), masked: true, shared: true };
        let schedule = Some(Schedule::new("attention_few", &[("warps", warps), ("rows", rows), ("keys", keys)]));
        cases.push(Case { schedule, ..asked.case(&mut noise) });
    }
    check_gpu(&cases, "sm_90a");
}
