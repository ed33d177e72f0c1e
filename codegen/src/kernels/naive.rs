//! Contractions, convolutions and pools of any layout, dtype and size, as plain reductions.
use super::{ArgFacts, Built, Family, KernelError, reduce, rewrite::as_reduce};
use crate::targets::Target;
use pavage_ir::{Heart, Op, Region, Schedule};

/// Contractions and convolutions that no tuned family takes.
pub const FAMILY: Family = Family { name: "naive", about: "contractions and convolutions as plain reductions", schedules, build };

/// Pools.
pub const POOL: Family = Family { name: "pool", about: "windows folded with vectors along channels or width", schedules: pool_schedules, build: pool_build };

fn schedules(region: &Region, target: &Target, facts: &ArgFacts) -> Vec<Schedule> {
    match &region.heart {
        Heart::Contract { .. } | Heart::Conv { .. } | Heart::Op(Op::ConvTranspose { .. }) => reduced("naive", region, target, facts),
        _ => vec![],
    }
}

fn pool_schedules(region: &Region, target: &Target, facts: &ArgFacts) -> Vec<Schedule> {
    if matches!(region.heart, Heart::Pool { .. }) { reduced("pool", region, target, facts) } else { vec![] }
}

fn reduced(family: &str, region: &Region, target: &Target, facts: &ArgFacts) -> Vec<Schedule> {
    let Some(region) = as_reduce(region) else { return vec![] };
    let mut schedules = (reduce::FAMILY.schedules)(&region, target, facts);
    schedules.iter_mut().for_each(|s| s.family = family.to_owned());
    schedules
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, facts: &ArgFacts) -> Result<Built, KernelError> {
    let region = as_reduce(region).ok_or(KernelError::Unsupported { family: "naive", reason: "not a contraction or convolution".into() })?;
    (reduce::FAMILY.build)(&region, schedule, target, name, facts)
}

fn pool_build(region: &Region, schedule: &Schedule, target: &Target, name: &str, facts: &ArgFacts) -> Result<Built, KernelError> {
    let region = as_reduce(region).ok_or(KernelError::Unsupported { family: "pool", reason: "not a pool".into() })?;
    (reduce::FAMILY.build)(&region, schedule, target, name, facts)
}
