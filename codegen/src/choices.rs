//! What a tuner chooses from: the distinct kernels of programs, each with the schedules that it can be built with.
use crate::{emit, kernels, targets::Target, tile::check};
use pavage_ir::{Region, Schedule, program::Program};
use std::{collections::BTreeSet, convert::Infallible};

/// A distinct kernel.
#[derive(Clone, Debug)]
pub struct Choice {
    /// What its schedule is kept under: see [`emit::signature`].
    pub signature: String,
    /// What it computes.
    pub region: Region,
    /// Schedules that build, best guess first: the first is taken where nothing is chosen.
    pub schedules: Vec<Schedule>,
}

/// The distinct kernels of `programs` on `target`, with at most `most` schedules each.
pub fn choices(programs: &[Program], target: &Target, most: usize) -> Vec<Choice> {
    let mut seen = BTreeSet::new();
    let mut all = vec![];
    let Ok(()) = each(programs, &mut |region, facts, signature| {
        if !seen.insert(signature.clone()) {
            return;
        }
        let mut schedules = kernels::schedules(region, target, facts);
        schedules.retain(|s| {
            let built = kernels::build(region, target, "candidate", facts, Some(s));
            built.is_ok_and(|b| check::check(&b.kernel, &target.limits()).is_ok())
        });
        schedules.truncate(most);
        all.push(Choice { signature, region: region.clone(), schedules });
    });
    all
}

/// Signatures of the kernels of `programs`.
pub fn signatures(programs: &[Program]) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    let Ok(()) = each(programs, &mut |_, _, signature| all.extend([signature]));
    all
}

fn each(programs: &[Program], visit: &mut dyn FnMut(&Region, &kernels::ArgFacts, String)) -> Result<(), Infallible> {
    programs.iter().try_for_each(|program| {
        emit::each_launch(&program.body, &[], &mut |region, facts, _| {
            visit(region, &facts, emit::signature(region, &facts));
            Ok(())
        })
    })
}
