//! Running sums and products: one pass along the axis, vectors across the axes after it.
use super::{
    ArgFacts, Built, Family, KernelError, builder,
    expr::{Env, read, reg, round, write},
    native_lanes,
    nest::Nest,
};
use crate::targets::Target;
use pavage_ir::{Dim, Heart, Op, Region, Scalar, ScalarFn, Schedule, attr::ReduceFn};

/// `cumulative` along any axis.
pub const FAMILY: Family = Family { name: "cumulative", about: "running sums and products, one pass along the axis", schedules, build };

fn schedules(region: &Region, target: &Target, _: &ArgFacts) -> Vec<Schedule> {
    let Heart::Op(Op::Cumulative { axis, .. }) = &region.heart else { return vec![] };
    let x = &region.args[0];
    if x.dtype.bits() < 8 {
        return vec![];
    }
    let inner: Dim = x.shape[axis + 1..].iter().cloned().product();
    let lanes = if inner.is(1) { 1 } else { native_lanes(target, x.dtype) };
    vec![Schedule::new("cumulative", &[("lanes", lanes as i64)])]
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, _: &ArgFacts) -> Result<Built, KernelError> {
    let Heart::Op(Op::Cumulative { f, axis, exclusive, reverse }) = &region.heart else {
        return Err(KernelError::Unsupported { family: "cumulative", reason: "not a running sum or product".into() });
    };
    let x = &region.args[0];
    let mut b = builder(name, target);
    let mut env = Env::new(&mut b, region);
    let outer: Dim = x.shape[..*axis].iter().cloned().product();
    let inner: Dim = x.shape[axis + 1..].iter().cloned().product();
    let extent = x.shape[*axis].clone();
    let nest = Nest {
        space: vec![outer, inner.clone()],
        vector: Some(1),
        lanes: schedule.knob("lanes", 1).max(1) as usize,
        unroll: 1,
        wide: 1,
        point_ps: extent.as_const().unwrap_or(256) * 1500,
    };
    let walk = nest.emit(&mut b, &mut env, &[], &mut |b, env, points| {
        let p = &points[0];
        let (n, stride) = (env.size(b, &extent), env.size(b, &inner));
        let row = b.mul(p.axes[0], n);
        let row = b.mul(row, stride);
        let first = b.add(row, p.axes[1]);
        let ty = crate::tile::Ty::of_lanes(reg(x.dtype), p.lanes());
        let start = b.constant_of(Scalar::I(i128::from(*f == ReduceFn::Prod)).cast(reg(x.dtype)), ty);
        let zero = b.index(0);
        b.for_(zero, n, 1, &[start], |b, i, acc| {
            let i = if *reverse {
                let back = b.sub(n, i);
                b.add_i(back, -1)
            } else {
                i
            };
            let at = b.mul(i, stride);
            let at = b.add(first, at);
            let v = read(b, env.args[0], at, p);
            let next = b.map(if *f == ReduceFn::Sum { ScalarFn::Add } else { ScalarFn::Mul }, &[acc[0], v]);
            let out = round(b, if *exclusive { acc[0] } else { next }, x.dtype);
            write(b, env.outs[0], at, out, p);
            vec![next]
        });
    });
    Ok(Built::new(b.finish(), schedule, env.dims, walk))
}
