//! Kernels that give more than one class: a softmax and its largest element, a residual sum and its norm, two sums over the same rows.
//!
//! There would be one for every two classes, and few of them are of use: those of classes that a plan has in memory anyway. So
//! extraction chooses among kernels of one class first. Then each two that its plan holds, and that one kernel could give, are offered
//! as such where that kernel is cheaper than what it stands for; and extraction chooses again, among all kernels there are,
//! until nothing more is offered. Each plan is cheaper than the one before.
//!
//! Not in a graph with ops that are no terms (branches, loops, sizes that data define): a kernel that feeds one and reads what comes of it
//! could never run, and the e-graph does not know what waits for them.
use super::{
    Head, Saturated,
    candidates::{self, Candidate, Candidates},
    cost::{self, Costs},
    extract::{self, Choice, Search},
};
use crate::{PassError, form, fuse};
use egg::Id;
use std::collections::{BTreeMap, BTreeSet};

/// Outputs of one kernel at most, a design bound: each is a stream of memory of its own.
const MOST_OUTPUTS: usize = 8;
/// Nanoseconds that a further output is charged beyond what it takes: of two plans that cost the same, the one that writes less.
const OUTPUT: f64 = 1e-3;

/// Choose kernels for `roots`, those of several classes among them; they become candidates.
pub(super) fn choose(s: &Saturated, all: &mut Candidates, roots: &[Id], search: Search, costs: &Costs) -> Result<Choice, PassError> {
    let mut best = extract::extract(all, roots, search)?;
    if s.has_steps {
        return Ok(best);
    }
    loop {
        let offers = offers(s, all, &best, costs);
        if offers.is_empty() {
            return Ok(best);
        }
        for (class, kernel) in offers {
            all.by_class.entry(class).or_default().push(all.kernels.len());
            all.kernels.push(kernel);
        }
        let states = best.states;
        let next = extract::extract(all, roots, search)?;
        if next.cost >= best.cost {
            return Ok(best);
        }
        best = Choice { states: states + next.states, ..next };
    }
}

/// Kernels that are not among `all`: for each two classes that the plan holds the best of both, if it is cheaper than what the plan has for them.
fn offers(s: &Saturated, all: &Candidates, plan: &Choice, costs: &Costs) -> Vec<(Id, Candidate)> {
    let mut readers: BTreeMap<Id, BTreeSet<Id>> = BTreeMap::new();
    let own: Vec<(Id, &Candidate)> = plan.chosen.iter().map(|(class, k)| (*class, &all.kernels[*k])).filter(|(_, k)| !k.folded).collect();
    for (class, kernel) in &own {
        for a in &kernel.args {
            readers.entry(*a).or_default().insert(*class);
        }
    }
    let held: BTreeSet<Id> = own.iter().flat_map(|(class, k)| k.also.iter().chain([class])).copied().collect();
    // What the plan does not hold has to be computed, at the least by its cheapest kernel.
    let least = |id: &Id| all.by_class.get(id).into_iter().flatten().map(|k| all.kernels[*k].cost).fold(f64::INFINITY, f64::min);
    let mut found: Vec<(Id, Candidate)> = vec![];
    for (a, of_a) in &own {
        for (b, of_b) in own.iter().filter(|(b, _)| b != a) {
            let gain = |kernel: &Candidate| {
                // What the two alone read, and one kernel does not, goes with them.
                let freed = |(c, k): &&(Id, &Candidate)| {
                    let read = readers.get(c).is_some_and(|readers| readers.iter().all(|r| r == a || r == b));
                    c != a && c != b && read && k.also.is_empty() && !kernel.args.contains(c)
                };
                let missing = kernel.args.iter().filter(|x| !all.is_there(x) && !held.contains(x)).map(least);
                of_a.cost + of_b.cost + own.iter().filter(freed).map(|(_, k)| k.cost).sum::<f64>() - kernel.cost - missing.sum::<f64>()
            };
            let known = |kernel: &Candidate| all.by_class[a].iter().any(|k| all.kernels[*k].also == kernel.also && all.kernels[*k].members == kernel.members);
            let best = both(s, all, (*a, of_a), (*b, of_b), &|k| gain(k) > 0.0, costs).into_iter().map(|k| (gain(&k), k)).max_by(|x, y| x.0.total_cmp(&y.0));
            found.extend(best.filter(|(gain, k)| *gain > 0.0 && !known(k)).map(|(_, k)| (*a, k)));
        }
    }
    found
}

/// Kernels that compute `a` and give `b` too: those of `a` that compute `b` on their way, if they pay before they write it; or the
/// two in one, if they read the same or `a` reads `b`.
fn both(
    s: &Saturated,
    all: &Candidates,
    (a, of_a): (Id, &Candidate),
    (b, of_b): (Id, &Candidate),
    pays: &dyn Fn(&Candidate) -> bool,
    costs: &Costs,
) -> Vec<Candidate> {
    let computes = |k: &&Candidate| k.members.iter().any(|(id, t)| *id == b && matches!(&t.head, Head::Op(op) if !fuse::is_free(op)));
    let of_class = all.by_class[&a].iter().map(|k| &all.kernels[*k]).filter(|k| of_b.also.is_empty() && !k.also.contains(&b) && pays(k));
    let mut found: Vec<Candidate> = of_class.filter(computes).filter_map(|k| with(s, k, &[b], costs)).collect();
    let inside = |k: &Candidate, id: &Id| k.members.iter().any(|(m, _)| m == id);
    // Loops that nothing fixes can be shared.
    let free = |k: &Candidate| k.members.iter().all(|(_, t)| !matches!(&t.head, Head::Op(op) if form::is_heart(op)));
    let near = of_a.args.iter().any(|x| *x == b || of_b.args.contains(x));
    if near && free(of_a) && free(of_b) && !inside(of_a, &b) && !inside(of_b, &a) {
        let before = of_b.args.iter().all(|x| !inside(of_a, x));
        let agree = of_b.members.iter().all(|(id, t)| of_a.members.iter().all(|(m, u)| m != id || u == t));
        if before && agree {
            let shared: BTreeSet<Id> = of_b.members.iter().map(|(id, _)| *id).collect();
            let members = of_b.members.iter().chain(of_a.members.iter().filter(|(id, _)| !shared.contains(id))).cloned().collect();
            let mut rounds: Vec<usize> = of_a.rounds.iter().chain(&of_b.rounds).copied().collect();
            rounds.sort_unstable();
            rounds.dedup();
            let charges = of_a.cost - of_a.time + of_b.cost - of_b.time;
            let sum = Candidate { members, args: vec![], also: of_a.also.clone(), cost: charges, time: 0.0, folded: false, rounds };
            let gives: Vec<Id> = [b].into_iter().chain(of_b.also.iter().copied()).collect();
            found.extend(with(s, &sum, &gives, costs));
        }
    }
    found
}

/// The kernel with these classes, which it computes, as further outputs.
fn with(s: &Saturated, kernel: &Candidate, gives: &[Id], costs: &Costs) -> Option<Candidate> {
    let mut also: Vec<Id> = kernel.also.iter().chain(gives).copied().collect();
    also.sort();
    also.dedup();
    let steps = |op: &pavage_ir::Op| form::is_opaque(op) || fuse::is_control(op);
    if kernel.members.iter().any(|(_, t)| matches!(&t.head, Head::Op(op) if steps(op))) || also.len() >= MOST_OUTPUTS {
        return None;
    }
    let (root, _) = kernel.members.last()?;
    let outputs: Vec<Id> = [*root].into_iter().chain(also.iter().copied()).collect();
    let (args, formed) = candidates::form_members(s, &kernel.members, &outputs)?;
    let time = cost::predict(&formed.region, costs) + OUTPUT * also.len() as f64 + candidates::folding(s, &args);
    time.is_finite().then(|| Candidate { args, also, cost: time + kernel.cost - kernel.time, time, ..kernel.clone() })
}
