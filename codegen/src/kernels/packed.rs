//! Maps whose result has elements narrower than a byte: a byte of them at a time, so that no two threads write one.
use super::{
    ArgFacts, Built, CpuShape, Family, KernelError, builder, cost,
    expr::{Env, Point},
    nest::{THREADS, Walk},
};
use crate::{
    targets::Target,
    tile::{Access, Builder, Val},
};
use pavage_ir::{DType, Dim, Heart, Region, Scalar, ScalarFn, Schedule};

/// Maps to packed elements.
pub const FAMILY: Family = Family { name: "packed", about: "expressions whose results share bytes, a byte of results at a time", schedules, build };

fn schedules(region: &Region, _: &Target, _: &ArgFacts) -> Vec<Schedule> {
    let [out] = region.outputs.as_slice() else { return vec![] };
    let axes: Vec<Dim> = (0..region.space.len()).map(Dim::axis).collect();
    let in_order = Env::flat(&region.space, &axes) == Env::flat(&out.ty.shape, &out.index);
    let whole = region.space.iter().cloned().product::<Dim>() == out.ty.count();
    let fits = region.heart == Heart::Map && out.ty.dtype.is_packed() && in_order && whole;
    if fits { vec![Schedule::new("packed", &[])] } else { vec![] }
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, _: &ArgFacts) -> Result<Built, KernelError> {
    let mut b = builder(name, target);
    let out = &region.outputs[0];
    let args = region.args.iter().map(|t| b.arg(t.dtype, Access::Read)).collect();
    let to = b.arg(DType::U8, Access::Write);
    let mut env = Env::with_bufs(region, args, vec![to]);
    let dtype = out.ty.dtype;
    let per = 8 / dtype.bits() as i64;
    let code = if per == 2 { DType::U4 } else { DType::U2 };
    let count = out.ty.count();
    let sizes: Vec<Val> = region.space.iter().map(|d| env.size(&mut b, d)).collect();
    let n = env.size(&mut b, &count);
    let last = b.add_i(n, -1);
    let bytes = count.ceil_div(&Dim::from(per));
    let mut write = |b: &mut Builder, at: Val| {
        let mut byte = b.constant(Scalar::I(0), DType::U8);
        for part in 0..per {
            let k = b.index(per);
            let first = b.mul(at, k);
            let flat = b.add_i(first, part);
            // What stands after the last element is zero.
            let inside = b.map(ScalarFn::Le, &[flat, last]);
            let mut rest = b.min(flat, last);
            let mut axes = vec![];
            for size in sizes.iter().rev() {
                axes.insert(0, b.map(ScalarFn::Rem, &[rest, *size]));
                rest = b.div(rest, *size);
            }
            let v = env.expr(b, out.expr, &mut Point::new(axes));
            let v = b.cast(v, dtype);
            let v = b.bitcast(v, b.ty(v).with(code));
            let v = b.cast(v, DType::U8);
            let zero = b.constant(Scalar::I(0), DType::U8);
            let v = b.map(ScalarFn::Select, &[inside, v, zero]);
            let by = b.constant(Scalar::I(i128::from(part) * dtype.bits() as i128), DType::U8);
            let up = b.map(ScalarFn::Shl, &[v, by]);
            byte = b.map(ScalarFn::Or, &[byte, up]);
        }
        b.store(to, at, byte);
    };
    if matches!(target, Target::Gpu(_)) {
        b.launch().threads = THREADS as u32;
        let (block, thread) = (b.block_id(0), b.thread_id());
        let first = b.mul_i(block, THREADS);
        let at = b.add(first, thread);
        // The last byte is begun.
        let end = b.mul_i(at, per);
        let inside = b.map(ScalarFn::Le, &[end, last]);
        b.when(inside, |b| write(b, at));
        let grid = [bytes.ceil_div(&Dim::from(THREADS)), Dim::one(), Dim::one()];
        return Ok(Built::new(b.finish(), schedule, env.dims, Walk { cpu: None, grid: Some(grid) }));
    }
    let (lo, hi) = (b.lo(), b.hi());
    b.for_(lo, hi, 1, &[], |b, at, _| {
        write(b, at);
        vec![]
    });
    let unit_ps = Dim::from(cost::point_ps(region, &[out.expr]) * 8 * per);
    let shape = CpuShape { extent: bytes, grain: cost::grain(&unit_ps), unit_ps, scratch: Dim::ZERO };
    Ok(Built::new(b.finish(), schedule, env.dims, Walk { cpu: Some(shape), grid: None }))
}
