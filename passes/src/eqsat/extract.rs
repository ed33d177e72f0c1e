//! Extraction: the cheapest set of kernels that computes every root.
//!
//! **Frontier DP** over the acyclic graph of classes. A state is the set of classes still to be computed; the one that
//! comes last in topological order is computed next, by each of its kernels, and the kernel's arguments join the set. A
//! class is paid for once however many kernels read it, so the cost of a plan is exact. A kernel that gives a further class is
//! chosen at the later one; the other is then given, in the states that follow, to whoever wants it. States are merged when equal, and
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

/// A class of a state, by its position.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Pending {
    at: u32,
    stands: Stands,
}

/// How a class of a state stands.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stands {
    /// To be computed.
    Wanted,
    /// Wanted, and given by a kernel that was chosen for a later class.
    Given,
    /// Given, and not wanted so far: a plan where it never is writes it for nothing.
    Unwanted,
}

/// The state after `set`, whose last class is computed: with what that needs, and with what it gives beside it, which nothing chosen
/// before gives.
fn after(set: &[Pending], args: &[u32], also: &[u32]) -> Option<Vec<Pending>> {
    let mut next = set[..set.len() - 1].to_vec();
    let place = |next: &[Pending], at: u32| next.binary_search_by_key(&at, |p| p.at);
    for &at in also {
        match place(&next, at) {
            Err(i) => next.insert(i, Pending { at, stands: Stands::Unwanted }),
            Ok(i) if next[i].stands == Stands::Wanted => next[i].stands = Stands::Given,
            Ok(_) => return None,
        }
    }
    for &at in args {
        match place(&next, at) {
            Err(i) => next.insert(i, Pending { at, stands: Stands::Wanted }),
            Ok(i) if next[i].stands == Stands::Unwanted => next[i].stands = Stands::Given,
            Ok(_) => {}
        }
    }
    Some(next)
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
    let Usable { order, ways } = usable(all, roots)?;
    let position: BTreeMap<Id, u32> = order.iter().enumerate().map(|(i, id)| (*id, i as u32)).collect();
    // What a class costs at least: its cheapest kernel alone, and with the dearest chain of what is computed before it. A kernel is
    // paid for by the class it is chosen for: what it gives beside that is free.
    let mut given: Vec<Vec<&Way>> = vec![vec![]; order.len()];
    ways.iter().flatten().for_each(|way| way.also.iter().for_each(|c| given[*c as usize].push(way)));
    let (mut least, mut chain): (Vec<f64>, Vec<f64>) = (vec![], vec![]);
    for (own, given) in ways.iter().zip(&given) {
        let cost = |way: &Way| all.kernels[way.kernel].cost;
        let before = |way: &Way| way.args.iter().map(|a| chain[*a as usize]).fold(0.0, f64::max);
        let alone = own.iter().map(cost).fold(f64::INFINITY, f64::min);
        let behind = own.iter().map(|w| cost(w) + before(w)).chain(given.iter().map(|w| before(w))).fold(f64::INFINITY, f64::min);
        least.push(if given.is_empty() { alone } else { 0.0 });
        chain.push(behind);
    }
    // A state costs what it did, and what the classes that it needs cost at least. The chain of one has nothing in common with
    // those that come after it in the order.
    let at_least = |cost: f64, set: &[Pending]| {
        let (mut after, mut most) = (0.0, 0f64);
        for c in set.iter().rev().filter(|c| c.stands == Stands::Wanted) {
            most = most.max(after + chain[c.at as usize]);
            after += least[c.at as usize];
        }
        cost + most
    };
    let bound = bound * (1.0 + 1e-9);
    let mut limits = vec![];
    let mut steps: Vec<Step> = vec![];
    let mut waiting: Vec<BTreeMap<Vec<Pending>, usize>> = vec![BTreeMap::new(); order.len()];
    let mut done: Option<usize> = None;
    let mut first: Vec<Pending> = roots.iter().filter_map(|r| position.get(r)).map(|at| Pending { at: *at, stands: Stands::Wanted }).collect();
    first.sort_unstable();
    first.dedup();
    steps.push(Step { cost: 0.0, from: None, class: 0 });
    match first.last() {
        Some(&top) => drop(waiting[top.at as usize].insert(first, 0)),
        None => return Ok(Choice::default()),
    }
    for at in (0..order.len()).rev() {
        let mut states: Vec<(Vec<Pending>, usize)> = std::mem::take(&mut waiting[at]).into_iter().collect();
        if states.len() > width {
            if search == Search::Exact && width > GLIMPSE {
                limits.push(format!("extraction kept {width} of {} states at one class", states.len()));
            }
            states.sort_by(|a, b| at_least(steps[a.1].cost, &a.0).total_cmp(&at_least(steps[b.1].cost, &b.0)));
            states.truncate(width);
        }
        for (set, step) in states {
            let nexts: Vec<(Vec<Pending>, Step)> = match set.last().map(|c| c.stands) {
                None | Some(Stands::Unwanted) => vec![],
                Some(Stands::Given) => after(&set, &[], &[]).into_iter().map(|next| (next, steps[step])).collect(),
                Some(Stands::Wanted) => {
                    let taking = |Way { kernel, args, also }: &Way| {
                        let cost = steps[step].cost + all.kernels[*kernel].cost;
                        Some((after(&set, args, also)?, Step { cost, from: Some((step, *kernel)), class: at as u32 }))
                    };
                    ways[at].iter().filter_map(taking).filter(|(next, new)| at_least(new.cost, next) <= bound).collect()
                }
            };
            for (next, new) in nexts {
                match next.last() {
                    None => {
                        if done.is_none_or(|d| new.cost < steps[d].cost) {
                            steps.push(new);
                            done = Some(steps.len() - 1);
                        }
                    }
                    Some(&top) => match waiting[top.at as usize].get(&next) {
                        Some(&known) if steps[known].cost <= new.cost => {}
                        _ => {
                            steps.push(new);
                            waiting[top.at as usize].insert(next, steps.len() - 1);
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
    let Usable { order, ways } = usable(all, roots)?;
    let position: BTreeMap<Id, usize> = order.iter().enumerate().map(|(i, id)| (*id, i)).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % n
    };
    let mut best: Option<Choice> = None;
    'tries: for _ in 0..tries.max(1) {
        let mut wanted: BTreeSet<usize> = roots.iter().filter_map(|r| position.get(r).copied()).collect();
        let mut given: BTreeSet<usize> = BTreeSet::new();
        let mut choice = Choice::default();
        while let Some(at) = wanted.pop_last() {
            if given.contains(&at) {
                continue;
            }
            // What would be written for nothing is not.
            let here: Vec<&Way> =
                ways[at].iter().filter(|way| way.also.iter().all(|c| wanted.contains(&(*c as usize)) && !given.contains(&(*c as usize)))).collect();
            if here.is_empty() {
                continue 'tries;
            }
            let Way { kernel, args, also } = here[next(here.len())];
            choice.cost += all.kernels[*kernel].cost;
            choice.chosen.push((order[at], *kernel));
            given.extend(also.iter().map(|a| *a as usize));
            wanted.extend(args.iter().map(|a| *a as usize));
        }
        if best.as_ref().is_none_or(|b| choice.cost < b.cost) {
            best = Some(choice);
        }
    }
    best.ok_or_else(|| PassError::Rules { reason: "no plan was found at random".into() })
}

/// A kernel that computes a class, by positions: what it reads, and what it gives beside it.
struct Way {
    kernel: usize,
    args: Vec<u32>,
    also: Vec<u32>,
}

/// Classes in an order, each with the kernels whose arguments come before all that they give and can be computed.
struct Usable {
    order: Vec<Id>,
    ways: Vec<Vec<Way>>,
}

/// What extraction chooses from: every root can be computed from it, wherever one turns.
fn usable(all: &Candidates, roots: &[Id]) -> Result<Usable, PassError> {
    // Where views of each other leave a root no way in the one order, the other has one if there is any.
    for order in [topological(all, roots), by_need(all)] {
        let position: BTreeMap<Id, usize> = order.iter().enumerate().map(|(i, id)| (*id, i)).collect();
        let mut ways: Vec<Vec<Way>> = vec![];
        for (i, id) in order.iter().enumerate() {
            let way = |kernel: &usize| -> Option<Way> {
                let k = &all.kernels[*kernel];
                let also = k.also.iter().map(|c| position.get(c).filter(|p| **p < i).map(|p| *p as u32)).collect::<Option<Vec<u32>>>()?;
                let first = also.iter().map(|c| *c as usize).min().unwrap_or(i);
                let needed = k.args.iter().filter(|a| !all.is_there(a));
                let args = needed.map(|a| position.get(a).filter(|p| **p < first && !ways[**p].is_empty()).map(|p| *p as u32));
                Some(Way { kernel: *kernel, args: args.collect::<Option<Vec<u32>>>()?, also })
            };
            let here = all.by_class.get(id).into_iter().flatten().filter_map(way).collect();
            ways.push(here);
        }
        if roots.iter().all(|r| all.is_there(r) || position.get(r).is_some_and(|p| !ways[*p].is_empty())) {
            return Ok(Usable { order, ways });
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
