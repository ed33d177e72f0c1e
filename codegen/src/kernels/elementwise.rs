//! Maps: expressions at every point, nothing combined. Also copies, transposes, broadcasts, pads and gathers that no
//! other kernel took in.
use super::{
    ArgFacts, Built, Family, KernelError, builder, cost,
    expr::{Env, Lanes, Point, reg},
    native_lanes,
    nest::{Nest, Walk},
    space,
    transpose::{Tiled, turned_axis},
};
use crate::{targets::Target, tile::Builder};
use pavage_ir::{DType, Expr, ExprId, Heart, Region, Schedule, dim::Atom};

/// Any map.
pub const FAMILY: Family = Family { name: "elementwise", about: "expressions at every point, vectors along the axis that memory favours", schedules, build };

fn schedules(region: &Region, target: &Target, _: &ArgFacts) -> Vec<Schedule> {
    if region.heart != Heart::Map || !writable(region) {
        return vec![];
    }
    let flat = space::collapse(region);
    let env = Env::with_bufs(&flat, vec![], vec![]);
    let roots = env.roots();
    let lanes = vector_lanes(&flat, target);
    let (axis, lanes) = pick_axis(&env, &roots, lanes);
    let across = turned_axis(&env, axis, lanes).filter(|_| matches!(target, Target::Cpu(_)));
    let light = cost::point_ps(&flat, &roots) < 2000;
    let plain = Schedule::new("elementwise", &[("axis", axis as i64), ("lanes", lanes as i64), ("unroll", if light && lanes > 1 { 2 } else { 1 })]);
    let tiled = across.map(|k| Schedule::new("elementwise", &[("axis", axis as i64), ("lanes", lanes as i64), ("across", k as i64)]));
    tiled.into_iter().chain([plain]).collect()
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, _: &ArgFacts) -> Result<Built, KernelError> {
    let flat = space::collapse(region);
    let mut b = builder(name, target);
    let mut env = Env::new(&mut b, &flat);
    let roots = env.roots();
    let lanes = schedule.knob("lanes", 1).max(1) as usize;
    let axis = (schedule.knob("axis", 0) as usize).min(flat.space.len() - 1);
    let point_ps = cost::point_ps(&flat, &roots);
    let mut stores = |b: &mut Builder, env: &mut Env, p: &mut Point| {
        for i in 0..flat.outputs.len() {
            env.store(b, i, p);
        }
    };
    let across = schedule.knob("across", -1);
    let walk = if let (Ok(across), Target::Cpu(_)) = (usize::try_from(across), target)
        && across < flat.space.len()
        && across != axis
        && lanes.is_power_of_two()
    {
        let tiled = Tiled { space: flat.space.clone(), axis, across, lanes, point_ps };
        Walk { cpu: Some(tiled.emit(&mut b, &mut env, &mut stores)), grid: None }
    } else {
        let unroll = schedule.knob("unroll", 1).max(1) as usize;
        let nest = Nest { space: flat.space.clone(), vector: Some(axis), lanes, unroll, wide: 1, point_ps };
        nest.emit(&mut b, &mut env, &roots, &mut |b, env, p| p.iter_mut().for_each(|p| stores(b, env, p)))
    };
    Ok(Built::new(b.finish(), schedule, env.dims, walk))
}

/// Whether outputs have elements of whole bytes: points of different threads may not share a byte.
pub fn writable(region: &Region) -> bool {
    region.outputs.iter().all(|o| o.ty.dtype.bits() >= 8)
}

/// Points of a vector: as many as the widest float read or written allows; integers beside them (indices) and wider
/// intermediate values take several registers.
pub fn vector_lanes(region: &Region, target: &Target) -> usize {
    let read = region.exprs.iter().filter(|(e, _)| matches!(e, Expr::Load { .. })).map(|(_, d)| *d);
    let (mut floats, mut others) = (0, 8);
    for dtype in read.chain(region.outputs.iter().map(|o| o.ty.dtype)) {
        let bits = reg(dtype).bits();
        if dtype.is_float() { floats = floats.max(bits) } else { others = others.max(bits) }
    }
    match if floats > 0 { floats } else { others } {
        64 => native_lanes(target, DType::F64),
        32 => native_lanes(target, DType::F32),
        16 => native_lanes(target, DType::I16),
        _ => native_lanes(target, DType::I8),
    }
}

/// The axis to take vectors along, and how many points of it make one.
pub fn pick_axis(env: &Env, roots: &[ExprId], lanes: usize) -> (usize, usize) {
    let rank = env.region.space.len();
    let mut best = (i64::MAX, rank - 1, 1);
    for axis in (0..rank).rev() {
        let fit = env.region.space[axis].as_const().map_or(lanes, |n| lanes.min((n.max(1) as usize).next_power_of_two()));
        for lanes in if fit > 1 { vec![fit, 1] } else { vec![1] } {
            let cost = accesses(env, roots, axis, lanes) * waste(env, axis, lanes);
            if cost < best.0 {
                best = (cost, axis, lanes);
            }
        }
    }
    (best.1, best.2)
}

/// Vectors needed for 64 points of the axis.
fn waste(env: &Env, axis: usize, lanes: usize) -> i64 {
    match env.region.space[axis].as_const() {
        Some(n) if n > 0 && n < 64 => (n as usize).div_ceil(lanes) as i64 * 64 / n,
        _ => 64 / lanes.min(64) as i64,
    }
}

/// Cost of the memory accesses of one vector.
fn accesses(env: &Env, roots: &[ExprId], axis: usize, lanes: usize) -> i64 {
    let tile = Some(lanes as i64);
    let cost = |along: Lanes, odd: i64| match along {
        _ if lanes == 1 => {
            if along == Lanes::Step(1) || along == Lanes::Step(0) {
                8
            } else {
                10
            }
        }
        Lanes::Step(0) => 4,
        Lanes::Step(1) => 8,
        Lanes::Step(_) => odd * lanes as i64,
        Lanes::Varying => (odd + 4) * lanes as i64,
    };
    let mut sum = 4;
    for (expr, _) in &env.region.exprs {
        if let Expr::Load { index, guard, .. } = expr {
            sum += index.iter().map(|d| cost(env.lanes_along(d, axis, tile), 8)).sum::<i64>();
            sum += i64::from(guard.is_some());
        }
        if let Expr::Index(d) = expr
            && d.any_atom(&|a| matches!(a, Atom::Div(..) | Atom::Mod(..)))
        {
            sum += cost(env.lanes_along(d, axis, tile), 8);
        }
    }
    sum += (0..env.region.outputs.len()).map(|i| cost(env.lanes_along(&env.out_address(i), axis, tile), 12)).sum::<i64>();
    sum + roots.len() as i64
}
