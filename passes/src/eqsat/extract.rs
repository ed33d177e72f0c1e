//! Extraction: the cheapest set of kernels that computes every root.
//!
//! **Frontier DP** over the acyclic graph of classes. A state is the set of classes still to be computed; the one that
//! comes last in topological order is computed next, by each of its kernels, and the kernel's arguments join the set. A
//! class is paid for once however many kernels read it, so the cost of a plan is exact. States are merged when equal, and
//! dropped when what they still need would, at the least, make a plan dearer than one that is known;
//! where more than [`MAX_STATES`] wait at one class only the cheapest go on, and that is reported. [`Search`] has what it is
//! compared with.
use super::candidates::Candidates;
use crate::PassError;
use egg::Id;
use std::collections::{BTreeMap, BTreeSet};

/// States kept at one class.
pub const MAX_STATES: usize = 32_768;
/// States at one class of the first, quick search, whose plan bounds the second.
const GLIMPSE: usize = 64;

/// How kernels are looked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Search {
    /// The frontier DP, exact unless a limit is reported.
    #[default]
    Exact,
    /// The same with this many states at a class: a beam search over the same kernels.
    Beam(usize),
    /// The cheapest of so many plans picked at random, each kernel with equal chance.
    Random(usize),
}

/// The chosen kernels.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// Class and kernel, in the order they were decided (roots first).
    pub chosen: Vec<(Id, usize)>,
    /// Predicted nanoseconds of the whole plan.
    pub cost: f64,
    /// Limits that were hit.
    pub limits: Vec<String>,
    /// Partial plans that were looked at.
    pub states: usize,
}

/// A partial plan: what it cost, how it came about.
#[derive(Clone, Copy)]
struct Step {
    cost: f64,
    /// Index of the step before, and the kernel that led here.
    from: Option<(usize, usize)>,
    class: u32,
}

/// Choose kernels for `roots`.
pub fn extract(all: &Candidates, roots: &[Id], search: Search) -> Result<Choice, PassError> {
    let mut choice = match search {
        Search::Exact => {
            let bound = frontier(all, roots, search, GLIMPSE, f64::INFINITY)?;
            let mut best = frontier(all, roots, search, MAX_STATES, bound.cost)?;
            if best.cost > bound.cost {
                best = Choice { limits: best.limits, ..bound };
            }
            best
        }
        Search::Beam(width) => frontier(all, roots, search, width.max(1), f64::INFINITY)?,
        Search::Random(tries) => random(all, roots, tries)?,
    };
    // Constants that the chosen kernels read, and those that are results.
    let read = choice.chosen.iter().flat_map(|(_, k)| &all.kernels[*k].args).chain(roots);
    let folded: BTreeSet<Id> = read.copied().filter(|id| all.folded.contains(id)).collect();
    choice.chosen.extend(folded.into_iter().flat_map(|id| Some((id, *all.by_class.get(&id)?.first()?))));
    Ok(choice)
}

/// The frontier DP with at most `width` states at a class, of plans that cost no more than `bound`.
fn frontier(all: &Candidates, roots: &[Id], search: Search, width: usize, bound: f64) -> Result<Choice, PassError> {
    let Usable { order, kernels: usable } = usable(all, roots)?;
    let position: BTreeMap<Id, u32> = order.iter().enumerate().map(|(i, id)| (*id, i as u32)).collect();
    // What a class costs at least: its cheapest kernel alone, and with the dearest chain of what is computed before it.
    let least: Vec<f64> = usable.iter().map(|kernels| kernels.iter().map(|(k, _)| all.kernels[*k].cost).fold(f64::INFINITY, f64::min)).collect();
    let mut chain: Vec<f64> = vec![];
    for kernels in &usable {
        let cost = |(k, args): &(usize, Vec<u32>)| all.kernels[*k].cost + args.iter().map(|a| chain[*a as usize]).fold(0.0, f64::max);
        chain.push(kernels.iter().map(cost).fold(f64::INFINITY, f64::min));
    }
    // A state costs what it did, and what the classes that it needs cost at least. The chain of one has nothing in common with
    // those that come after it in the order.
    let at_least = |cost: f64, needed: &[u32]| {
        let (mut after, mut most) = (0.0, 0f64);
        for c in needed.iter().rev() {
            most = most.max(after + chain[*c as usize]);
            after += least[*c as usize];
        }
        cost + most
    };
    let bound = bound * (1.0 + 1e-9);
    let mut limits = vec![];
    let mut steps: Vec<Step> = vec![];
    let mut waiting: Vec<BTreeMap<Vec<u32>, usize>> = vec![BTreeMap::new(); order.len()];
    let mut done: Option<usize> = None;
    let mut first: Vec<u32> = roots.iter().filter_map(|r| position.get(r).copied()).collect();
    first.sort_unstable();
    first.dedup();
    steps.push(Step { cost: 0.0, from: None, class: 0 });
    match first.last() {
        Some(&top) => drop(waiting[top as usize].insert(first, 0)),
        None => return Ok(Choice::default()),
    }
    for at in (0..order.len()).rev() {
        let mut states: Vec<(Vec<u32>, usize)> = std::mem::take(&mut waiting[at]).into_iter().collect();
        if states.len() > width {
            if search == Search::Exact && width > GLIMPSE {
                limits.push(format!("extraction kept {width} of {} states at one class", states.len()));
            }
            states.sort_by(|a, b| at_least(steps[a.1].cost, &a.0).total_cmp(&at_least(steps[b.1].cost, &b.0)));
            states.truncate(width);
        }
        for (set, step) in states {
            for (kernel, args) in &usable[at] {
                let cost = steps[step].cost + all.kernels[*kernel].cost;
                let next: BTreeSet<u32> = set.iter().copied().filter(|c| *c as usize != at).chain(args.iter().copied()).collect();
                let next: Vec<u32> = next.into_iter().collect();
                if at_least(cost, &next) > bound {
                    continue;
                }
                let new = Step { cost, from: Some((step, *kernel)), class: at as u32 };
                match next.last() {
                    None => {
                        if done.is_none_or(|d| cost < steps[d].cost) {
                            steps.push(new);
                            done = Some(steps.len() - 1);
                        }
                    }
                    Some(&top) => match waiting[top as usize].get(&next) {
                        Some(&known) if steps[known].cost <= cost => {}
                        _ => {
                            steps.push(new);
                            waiting[top as usize].insert(next, steps.len() - 1);
                        }
                    },
                }
            }
        }
    }
    let Some(mut at) = done else { return Err(PassError::Rules { reason: "no set of kernels computes every output".into() }) };
    let mut choice = Choice { cost: steps[at].cost, limits, states: steps.len(), ..Choice::default() };
    while let Some((before, kernel)) = steps[at].from {
        choice.chosen.push((order[steps[at].class as usize], kernel));
        at = before;
    }
    choice.chosen.reverse();
    Ok(choice)
}

/// The cheapest of `tries` random plans.
fn random(all: &Candidates, roots: &[Id], tries: usize) -> Result<Choice, PassError> {
    let Usable { order, kernels: usable } = usable(all, roots)?;
    let position: BTreeMap<Id, usize> = order.iter().enumerate().map(|(i, id)| (*id, i)).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % n
    };
    let mut best: Option<Choice> = None;
    for _ in 0..tries.max(1) {
        let mut wanted: BTreeSet<usize> = roots.iter().filter_map(|r| position.get(r).copied()).collect();
        let mut choice = Choice::default();
        while let Some(at) = wanted.pop_last() {
            let (k, args) = &usable[at][next(usable[at].len())];
            choice.cost += all.kernels[*k].cost;
            choice.chosen.push((order[at], *k));
            wanted.extend(args.iter().map(|a| *a as usize));
        }
        if best.as_ref().is_none_or(|b| choice.cost < b.cost) {
            best = Some(choice);
        }
    }
    Ok(best.unwrap_or_default())
}

/// Classes in an order, each with the kernels whose arguments come before it (by position) and can be computed.
struct Usable {
    order: Vec<Id>,
    kernels: Vec<Vec<(usize, Vec<u32>)>>,
}

/// What extraction chooses from: every root can be computed from it, wherever one turns.
fn usable(all: &Candidates, roots: &[Id]) -> Result<Usable, PassError> {
    // Where views of each other leave a root no way in the one order, the other has one if there is any.
    for order in [topological(all, roots), by_need(all)] {
        let position: BTreeMap<Id, usize> = order.iter().enumerate().map(|(i, id)| (*id, i)).collect();
        let mut kernels: Vec<Vec<(usize, Vec<u32>)>> = vec![];
        for (i, id) in order.iter().enumerate() {
            let args = |k: &usize| -> Option<Vec<u32>> {
                let needed = all.kernels[*k].args.iter().filter(|a| !all.is_there(a));
                needed.map(|a| position.get(a).filter(|p| **p < i && !kernels[**p].is_empty()).map(|p| *p as u32)).collect()
            };
            let here = all.by_class.get(id).into_iter().flatten().filter_map(|k| args(k).map(|a| (*k, a))).collect();
            kernels.push(here);
        }
        if roots.iter().all(|r| all.is_there(r) || position.get(r).is_some_and(|p| !kernels[*p].is_empty())) {
            return Ok(Usable { order, kernels });
        }
    }
    Err(PassError::Rules { reason: "no set of kernels computes every output".into() })
}

/// Classes in rounds: those that can be computed from the ones before.
fn by_need(all: &Candidates) -> Vec<Id> {
    let mut order: Vec<Id> = vec![];
    let mut known: BTreeSet<Id> = all.leaves.iter().chain(&all.folded).copied().collect();
    loop {
        let next = |(id, kernels): (&Id, &Vec<usize>)| {
            (!known.contains(id) && kernels.iter().any(|k| all.kernels[*k].args.iter().all(|a| known.contains(a)))).then_some(*id)
        };
        let found: Vec<Id> = all.by_class.iter().filter_map(next).collect();
        if found.is_empty() {
            return order;
        }
        known.extend(&found);
        order.extend(found);
    }
}

/// Classes that roots may need, arguments before users; edges that close a circle are ignored.
fn topological(all: &Candidates, roots: &[Id]) -> Vec<Id> {
    let mut order = vec![];
    let mut seen: BTreeSet<Id> = BTreeSet::new();
    let mut stack: Vec<(Id, bool)> = roots.iter().rev().map(|r| (*r, false)).collect();
    while let Some((id, leave)) = stack.pop() {
        if leave {
            order.push(id);
        } else if !all.is_there(&id) && seen.insert(id) {
            stack.push((id, true));
            let kernels = all.by_class.get(&id).into_iter().flatten();
            let args: BTreeSet<Id> = kernels.flat_map(|k| all.kernels[*k].args.iter().copied()).collect();
            stack.extend(args.into_iter().filter(|a| !seen.contains(a)).map(|a| (a, false)));
        }
    }
    order
}
