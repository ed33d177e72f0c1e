//! Transforms of tiles: compiled for this machine and run by the GPU's interpreter, against their meaning.
use crate::common::{
    Noise,
    regions::{Case, call, check, load_at, op_region, output, pick, size, sliced, ty},
};
use pavage_ir::{Binding, DType, Dim, Expr, Heart, Op, Region, ScalarFn, Schedule};

fn dims(v: &[i64]) -> Vec<Dim> {
    v.iter().map(|n| Dim::from(*n)).collect()
}

#[test]
fn inputs_and_windows() {
    let mut noise = Noise(61);
    let mut cases = vec![];
    for i in 0..16 {
        let (mut binding, m) = (Binding::default(), [2usize, 4][i % 2]);
        // Half of them in blocks of channels, which large images come in.
        let schedule = (i % 4 < 2).then(|| Schedule::new("winograd", &[("lanes", 8), ("block", 16)]));
        let dtype = if schedule.is_some() { DType::F32 } else { pick(&mut noise, &[DType::F32, DType::F64, DType::F16]) };
        let x: Vec<Dim> = [2, pick(&mut noise, &[3, 6, 13]), pick(&mut noise, &[4, 9])].into_iter().map(|n| size(n, &mut noise, &mut binding)).collect();
        let channels = Dim::from(pick(&mut noise, &[1i64, 3, 16, 21]));
        let two = |noise: &mut Noise| vec![pick(noise, &[0i64, 1, 2]), pick(noise, &[0i64, 1])];
        let op = Op::WinogradInput { m, lo: two(&mut noise), hi: two(&mut noise) };
        let shape: Vec<Dim> = x.into_iter().chain([channels]).collect();
        cases.push(Case { tolerance: 1e-5, schedule, ..Case::new(op_region(op, vec![ty(dtype, &shape)]), binding, &mut noise) });
        let shape = dims(&[pick(&mut noise, &[1, 5]), pick(&mut noise, &[2, 7]), 3, 3]);
        cases.push(Case { tolerance: 2e-6, ..Case::new(op_region(Op::WinogradFilter { m }, vec![ty(dtype, &shape)]), Binding::default(), &mut noise) });
    }
    check(&cases);
}

#[test]
fn outputs_with_what_follows() {
    let mut noise = Noise(62);
    let mut cases = vec![];
    for i in 0..16 {
        let (mut binding, m) = (Binding::default(), [2usize, 4][i % 2]);
        let extents = [2, pick(&mut noise, &[1, 5, 8]), pick(&mut noise, &[3, 12])];
        let mut space: Vec<Dim> = extents.into_iter().map(|n| size(n, &mut noise, &mut binding)).collect();
        space.push(Dim::from(pick(&mut noise, &[2i64, 16, 19])));
        let tiles = space[0].clone() * space[1].ceil_div(&Dim::from(m)) * space[2].ceil_div(&Dim::from(m));
        let input = vec![Dim::from((m + 2) * (m + 2)), tiles, space[3].clone()];
        let mut r = Region::new("winograd", space.clone());
        r.args = vec![ty(DType::F32, &input), ty(DType::F32, &space[3..]), ty(DType::F32, &space)];
        let x = load_at(&mut r, 0, (0..3).map(Dim::axis).collect(), None);
        let bias = load_at(&mut r, 1, vec![Dim::axis(3)], None);
        let residual = load_at(&mut r, 2, (0..4).map(Dim::axis).collect(), None);
        r.heart = Heart::WinogradOutput { m, x, input };
        let acc = r.push(Expr::Acc(0), DType::F32);
        let sum = call(&mut r, ScalarFn::Add, &[acc, bias]);
        let y = call(&mut r, ScalarFn::Max, &[sum, residual]);
        output(&mut r, y);
        cases.push(Case { tolerance: 1e-5, ..Case::new(r, binding, &mut noise) });
    }
    check(&sliced(cases));
}
