//! Kernel candidates: for each class, the fused kernels that could compute it.
//!
//! A candidate starts from one term of the class and absorbs terms of its arguments' classes, one at a time, as long
//! as [`form`](crate::form) accepts the whole as a region. Views are always absorbed where they can be read through. A
//! pointwise argument that nobody else uses is absorbed without keeping the smaller kernel. Kernels of more than
//! one class come later, where a plan has use for them: see [`super::joint`].
use super::{
    Head, Saturated, Term, constant,
    cost::{self, Costs},
};
use crate::{
    PassError,
    form::{self, Formed},
    fuse::{self, Order},
};
use egg::{Id, Language};
use pavage_ir::{DType, Graph, Op, Value};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    rc::Rc,
};

/// Candidates kept a class, a design bound: the largest, the cheapest and the bare op.
const MAX_PER_CLASS: usize = 16;
/// Parts of a concatenation that a kernel reads at most, a design bound: at each point it asks for all but one whether they are there.
const MOST_PARTS: usize = 3;
/// Terms in the kernels that are grown from one term, all of them together, at most; reaching it is reported.
const MAX_WORK: usize = 8_192;
/// Terms in one kernel at most; reaching it is reported.
const MAX_MEMBERS: usize = 48;

/// A kernel that computes one class.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Terms inside, operands before users; the last computes the class.
    pub members: Vec<(Id, Term)>,
    /// Classes it reads from memory: sorted, distinct.
    pub args: Vec<Id>,
    /// Further classes that it gives, of those that its terms compute: sorted, distinct.
    pub also: Vec<Id>,
    /// What extraction adds up: the time, and what errors are worth.
    pub cost: f64,
    /// Predicted nanoseconds.
    pub time: f64,
    /// Whether it is computed at compile time.
    pub folded: bool,
    /// Rounded variants that it takes: sorted, distinct.
    pub rounds: Vec<usize>,
}

impl Candidate {
    /// A kernel that takes so many nanoseconds at run time.
    fn new(members: Vec<(Id, Term)>, args: Vec<Id>, time: f64) -> Self {
        Candidate { members, args, also: vec![], cost: time, time, folded: false, rounds: vec![] }
    }
}

/// Every candidate, by class.
#[derive(Clone, Debug, Default)]
pub struct Candidates {
    /// All kernels.
    pub kernels: Vec<Candidate>,
    /// Kernels that compute a class.
    pub by_class: BTreeMap<Id, Vec<usize>>,
    /// Classes that exist without a kernel.
    pub leaves: BTreeSet<Id>,
    /// Classes that are computed at compile time.
    pub folded: BTreeSet<Id>,
    /// What rounded variants are, for people.
    pub labels: Vec<String>,
    /// Limits that were hit.
    pub limits: BTreeSet<String>,
}

/// Nanoseconds that a kernel is charged for each variant that it takes: of two plans that cost the same, the one that rounds less.
const ROUNDING: f64 = 1e-3;

impl Candidates {
    /// Charge kernels for the errors of what they round, at `price` nanoseconds a unit; those that take what is not `allowed`
    /// cannot be chosen.
    pub(super) fn price(&mut self, price: f64, errors: &[f64], allowed: &dyn Fn(usize) -> bool) {
        for k in self.kernels.iter_mut().filter(|k| !k.rounds.is_empty()) {
            let charge = |r: &usize| if allowed(*r) { ROUNDING + if errors[*r] > 0.0 { price * errors[*r] } else { 0.0 } } else { f64::INFINITY };
            k.cost = k.time + k.rounds.iter().map(charge).sum::<f64>();
        }
    }

    /// Whether a class exists when the program starts.
    pub fn is_there(&self, id: &Id) -> bool {
        self.leaves.contains(id) || self.folded.contains(id)
    }
}

/// Form the candidates of every class.
pub fn form_all(s: &Saturated, costs: &Costs) -> Result<Candidates, PassError> {
    let mut all = Candidates::default();
    let mut ids: Vec<Id> = s.egraph.classes().map(|c| c.id).collect();
    ids.sort();
    let mut formed: BTreeMap<Id, Vec<Candidate>> = BTreeMap::new();
    for id in ids {
        if s.egraph[id].nodes.iter().any(|t| matches!(t.head, Head::Leaf(_))) {
            all.leaves.insert(id);
            continue;
        }
        let mut found = match s.folded.get(&id) {
            Some(expression) => {
                all.folded.insert(id);
                vec![folded(expression)]
            }
            None => of_class(s, id, costs, &mut all.limits),
        };
        for c in &mut found {
            c.time = c.cost + folding(s, &c.args);
            c.cost = c.time;
            c.rounds = rounds(s, &c.members);
        }
        prune(&mut found, s);
        if found.is_empty() {
            let term = s.egraph[id].nodes[0].to_string();
            return Err(PassError::NoKernel { op: term, sources: s.sources.get(&id).cloned().unwrap_or_default(), reason: "no kernel can be formed".into() });
        }
        formed.insert(id, found);
    }
    for (id, found) in &formed {
        for c in few(s, found, &formed) {
            all.by_class.entry(*id).or_default().push(all.kernels.len());
            all.kernels.push(c);
        }
    }
    Ok(all)
}

/// The rounded variants among some terms: sorted, distinct.
fn rounds(s: &Saturated, members: &[(Id, Term)]) -> Vec<usize> {
    let found: BTreeSet<usize> = members.iter().filter_map(|m| s.rounds.get(m).copied()).collect();
    found.into_iter().collect()
}

/// What a kernel is charged for those of its arguments that are computed at compile time.
pub(super) fn folding(s: &Saturated, args: &[Id]) -> f64 {
    args.iter().filter(|a| s.is_folded(**a)).count() as f64 * constant::COST
}

/// What computes a folded class.
fn folded(expression: &[(Id, Term)]) -> Candidate {
    let inside: BTreeSet<Id> = expression.iter().map(|(id, _)| *id).collect();
    let args: BTreeSet<Id> = expression.iter().flat_map(|(_, t)| &t.args).copied().filter(|a| !inside.contains(a)).collect();
    Candidate { folded: true, ..Candidate::new(expression.to_vec(), args.into_iter().collect(), 0.0) }
}

/// Whether a class is an input or known when a model is compiled.
fn is_there(s: &Saturated, id: Id) -> bool {
    s.is_folded(id) || s.egraph[id].nodes.iter().any(|t| matches!(t.head, Head::Leaf(_)))
}

/// Whether `a` needs and rounds no less and costs no less than `b`.
fn is_dominated(s: &Saturated, a: &Candidate, b: &Candidate) -> bool {
    b.cost <= a.cost && rounds_within(b, a) && b.args.iter().all(|x| a.args.contains(x) || is_there(s, *x))
}

/// Whether `a` rounds nothing that `b` does not.
fn rounds_within(a: &Candidate, b: &Candidate) -> bool {
    a.rounds.iter().all(|r| b.rounds.contains(r))
}

/// Drop candidates that need and round no less and cost no less than another.
fn prune(found: &mut Vec<Candidate>, s: &Saturated) {
    let mut kept: Vec<Candidate> = vec![];
    for c in found.drain(..) {
        if kept.iter().any(|k| is_dominated(s, &c, k)) {
            continue;
        }
        kept.retain(|k| !is_dominated(s, k, &c));
        kept.push(c);
    }
    *found = kept;
}

/// Whether `b` and kernels that make what it needs beyond `a`, out of what `a` needs, cost less than `a` and round no more.
fn is_dearer(s: &Saturated, a: &Candidate, b: &Candidate, of_class: &BTreeMap<Id, Vec<Candidate>>) -> bool {
    let has = |x: &Id| a.args.contains(x) || is_there(s, *x);
    let before = |x: &Id| {
        let makes = of_class.get(x).into_iter().flatten().filter(|k| rounds_within(k, a) && k.args.iter().all(has));
        makes.map(|k| k.cost).fold(f64::INFINITY, f64::min)
    };
    b.cost < a.cost && rounds_within(b, a) && b.cost + b.args.iter().filter(|x| !has(x)).map(before).sum::<f64>() < a.cost
}

/// Of candidates that round the same no more than the limit: of more, those that compute in their loops what would better be computed
/// before go first.
fn few(s: &Saturated, found: &[Candidate], of_class: &BTreeMap<Id, Vec<Candidate>>) -> Vec<Candidate> {
    let mut alike: BTreeMap<&[usize], Vec<&Candidate>> = BTreeMap::new();
    found.iter().for_each(|c| alike.entry(&c.rounds).or_default().push(c));
    let mut left = vec![];
    for (_, mut kept) in alike {
        // Larger kernels save the most traffic: keep them, the bare op as a way out, and the cheapest.
        kept.sort_by_key(|c| std::cmp::Reverse(c.members.len()));
        if kept.len() > MAX_PER_CLASS {
            let last = kept.pop();
            kept.retain(|a| !found.iter().any(|b| is_dearer(s, a, b, of_class)));
            let cheapest = (0..kept.len()).min_by(|a, b| kept[*a].cost.total_cmp(&kept[*b].cost)).filter(|i| *i >= MAX_PER_CLASS - 1);
            if let Some(i) = cheapest {
                kept.swap(i, MAX_PER_CLASS - 2);
            }
            kept.truncate(MAX_PER_CLASS - 1);
            kept.extend(last);
        }
        left.extend(kept.into_iter().cloned());
    }
    left
}

/// Chosen term of each member class.
type State = BTreeMap<Id, Term>;

fn of_class(s: &Saturated, root: Id, costs: &Costs, limits: &mut BTreeSet<String>) -> Vec<Candidate> {
    let mut found = vec![];
    // Variants that round multiply what there is to try.
    let most_work = if s.rounds.is_empty() { MAX_WORK } else { 4 * MAX_WORK };
    for term in &s.egraph[root].nodes {
        let Head::Op(op) = &term.head else { continue };
        if term.args.contains(&root) {
            continue;
        }
        let start = State::from([(root, term.clone())]);
        if fuse::is_control(op) || matches!(op, Op::Reshape { .. }) {
            // Memory renamed, or copied by a step of its own.
            let mut args = term.args.clone();
            args.sort();
            args.dedup();
            let bytes = |id: &Id| cost::elements(&s.egraph[*id].data.ty, costs) * 4.0;
            let cost = if fuse::is_control(op) { costs.launch_ns * args.len() as f64 + costs.memory_ns(2.0 * bytes(&root)) } else { 0.0 };
            found.push(Candidate::new(vec![(root, term.clone())], args, cost));
            if fuse::is_control(op) {
                continue;
            }
        }
        // The deepest first: what needs the least is known soon. In the end, the shallow come first, as what is plainer.
        let mut queue = vec![(start.clone(), 0)];
        let before = found.len();
        let mut depths = vec![];
        let mut seen = BTreeSet::from([start]);
        let mut work = 0;
        let mut known = Known::default();
        while let Some((state, depth)) = queue.pop() {
            let Some((state, kernel)) = settle(s, root, state, costs, &mut known) else { continue };
            if !known.grown.insert(state.clone()) {
                // Reached on another way: what grows from it was looked at.
                continue;
            }
            work += kernel.members.len();
            let cost = cost::predict(&kernel.formed.region, costs);
            if cost.is_infinite() {
                continue;
            }
            let args = &kernel.args;
            let candidate = Candidate { rounds: rounds(s, &kernel.members), ..Candidate::new(kernel.members.clone(), args.clone(), cost) };
            // What grows from a kernel that another makes idle, that one's growth makes idle too.
            let idle = |known: &Candidate| (known.cost < cost || known.args.len() < args.len()) && is_dominated(s, &candidate, known);
            if found[before..].iter().any(idle) {
                continue;
            }
            found.push(candidate);
            depths.push(depth);
            let joint = absorb_siblings(s, &state, args);
            let others = other_ways(s, &state, &kernel.members);
            let nexts: Vec<State> = joint.into_iter().chain(args.iter().flat_map(|arg| absorb(s, &state, *arg))).chain(others).collect();
            for next in nexts.into_iter().rev() {
                if seen.contains(&next) {
                    continue;
                }
                if work < most_work {
                    seen.insert(next.clone());
                    queue.push((next, depth + 1));
                } else {
                    limits.insert(format!("kernels that end in {} have {most_work} terms together and there are more", op.mnemonic()));
                }
            }
            if state.len() >= MAX_MEMBERS && !args.is_empty() {
                limits.insert(format!("a kernel that ends in {} grew to {MAX_MEMBERS} terms and no further", op.mnemonic()));
            }
        }
        let mut order: Vec<(usize, Candidate)> = depths.into_iter().zip(found.drain(before..)).collect();
        order.sort_by_key(|(depth, _)| *depth);
        found.extend(order.into_iter().map(|(_, c)| c));
    }
    found
}

/// The states that read as a view of another class what this one reads as a view; on wide devices, where a convolution may be a view of
/// a product, those that compute it as a convolution too.
fn other_ways(s: &Saturated, state: &State, members: &[(Id, Term)]) -> Vec<State> {
    let closed = members.iter().filter(|(id, _)| !state.contains_key(id) && s.egraph[*id].nodes.len() > 1);
    closed
        .flat_map(|(id, t)| {
            let wide = s.egraph.analysis.costs.is_wide();
            let heart = |op: &Op| wide && matches!(op, Op::Conv { .. });
            let other = |next: &State| next.get(id).is_some_and(|o| o != t && matches!(&o.head, Head::Op(op) if form::is_view(op) || heart(op)));
            absorb(s, state, *id).into_iter().filter(other).collect::<Vec<_>>()
        })
        .collect()
}

/// The states that read several arguments as slices of the same merged siblings.
fn absorb_siblings(s: &Saturated, state: &State, args: &[Id]) -> Vec<State> {
    let mut slices: BTreeMap<Id, Vec<(Id, &Term)>> = BTreeMap::new();
    for &arg in args.iter().filter(|a| s.apart.contains(a)) {
        for t in s.egraph[arg].nodes.iter().filter(|t| matches!(t.head, Head::Op(Op::Slice { .. })) && s.merged.contains(t)) {
            slices.entry(t.args[0]).or_default().push((arg, t));
        }
    }
    let joint = slices.into_values().filter(|parts| parts.len() > 1 && state.len() + parts.len() <= MAX_MEMBERS);
    joint
        .map(|parts| {
            let mut next = state.clone();
            next.extend(parts.into_iter().map(|(arg, t)| (arg, t.clone())));
            next
        })
        .collect()
}

/// Absorb pointwise arguments that only this kernel uses, or that cost nothing, for as long as that is legal. `None` if the
/// state is not legal as it stands.
fn settle(s: &Saturated, root: Id, mut state: State, costs: &Costs, known: &mut Known) -> Option<(State, Rc<Legal>)> {
    if let Some(found) = settle_at_once(s, root, &state, costs, known) {
        return Some(found);
    }
    let mut kernel = known.legal(s, root, &state)?;
    loop {
        let grown = next_pointwise(s, root, &state, &kernel.args, costs).find_map(|next| known.legal(s, root, &next).map(|kernel| (next, kernel)));
        match grown {
            Some((next, of_next)) => (state, kernel) = (next, of_next),
            None => return Some((state, kernel)),
        }
    }
}

/// [`settle`] where nothing fixes the loops: what may be absorbed does not depend on how the kernel is formed, and where the whole is
/// legal, so is every step to it.
fn settle_at_once(s: &Saturated, root: Id, state: &State, costs: &Costs, known: &mut Known) -> Option<(State, Rc<Legal>)> {
    let plain = |t: &Term| matches!(&t.head, Head::Op(op) if matches!(op, Op::Map(_) | Op::Cast { .. } | Op::BitCast { .. }) || form::is_view(op));
    if !state.values().all(plain) {
        return None;
    }
    let mut state = state.clone();
    loop {
        let args = read_by(&close(s, root, &state, Views::All)?);
        let Some(next) = next_pointwise(s, root, &state, &args, costs).next() else { break };
        state = next;
    }
    known.legal(s, root, &state).map(|kernel| (state, kernel))
}

/// The states that absorb a pointwise argument which only this kernel uses, or which costs nothing.
fn next_pointwise<'a>(s: &'a Saturated, root: Id, state: &'a State, args: &'a [Id], costs: &'a Costs) -> impl Iterator<Item = State> + 'a {
    // Beside a contraction, what is made of a folded row is no trifle: the kernel that folds it can finish it once a row.
    let contracts = |t: &Term| matches!(&t.head, Head::Op(Op::MatMul { .. } | Op::Conv { .. }));
    let in_epilogue = state.values().any(contracts) || args.iter().any(|a| s.egraph[*a].nodes.iter().any(contracts));
    let is_trifle = move |arg: Id| is_trifle(s, root, arg, costs) && !(in_epilogue && is_folded_row(s, arg));
    args.iter().filter_map(move |&arg| {
        let class = &s.egraph[arg];
        let pointwise = class.nodes.len() == 1 && class.nodes.iter().all(|t| matches!(&t.head, Head::Op(Op::Map(_) | Op::Cast { .. } | Op::BitCast { .. })));
        // What a convolution reads, it computes on the way only as a separable one: that is a choice.
        let image = state.values().any(|t| matches!(t.head, Head::Op(Op::Conv { .. })) && t.args[0] == arg);
        if !pointwise || image || !(used_once(s, arg) || is_trifle(arg)) || belongs_to_heart(s, root, arg, costs) {
            return None;
        }
        absorb(s, state, arg).pop()
    })
}

/// Classes that the terms of a kernel read: sorted, distinct.
fn read_by(members: &[(Id, Term)]) -> Vec<Id> {
    let inside: BTreeSet<Id> = members.iter().map(|(id, _)| *id).collect();
    let read: BTreeSet<Id> = members.iter().flat_map(|(_, t)| &t.args).copied().filter(|a| !inside.contains(a)).collect();
    read.into_iter().collect()
}

/// Whether `arg` is computed for next to nothing wherever `root` is: far fewer elements, by cheap functions.
fn is_trifle(s: &Saturated, root: Id, arg: Id, costs: &Costs) -> bool {
    let size = |id: Id| cost::elements(&s.egraph[id].data.ty, costs);
    let cheap = |t: &Term| matches!(&t.head, Head::Op(Op::Map(f)) if cost::function(*f) <= 3.0);
    s.egraph[arg].nodes.iter().all(cheap) && 4.0 * size(arg) <= size(root)
}

/// Whether `arg`, which `root` repeats, can be computed once by the kernel of a contraction or convolution before it.
fn belongs_to_heart(s: &Saturated, root: Id, arg: Id, costs: &Costs) -> bool {
    let size = |id: Id| cost::elements(&s.egraph[id].data.ty, costs);
    if size(arg) >= size(root) {
        return false;
    }
    let (mut stack, mut seen) = (vec![arg], BTreeSet::new());
    while let Some(id) = stack.pop() {
        for term in &s.egraph[id].nodes {
            match &term.head {
                Head::Op(op) if form::is_heart(op) => return true,
                Head::Op(Op::Map(_) | Op::Cast { .. } | Op::Reshape { .. } | Op::Transpose { .. }) => {
                    stack.extend(term.args.iter().filter(|a| size(**a) == size(arg) && seen.insert(**a)));
                }
                _ => {}
            }
        }
    }
    false
}

/// Whether a class is made of a reduction by pointwise functions and views.
fn is_folded_row(s: &Saturated, id: Id) -> bool {
    let (mut stack, mut seen) = (vec![id], BTreeSet::new());
    while let Some(id) = stack.pop().filter(|_| seen.len() < 16) {
        if !seen.insert(id) {
            continue;
        }
        for t in &s.egraph[id].nodes {
            match &t.head {
                Head::Op(Op::Reduce { .. }) => return true,
                Head::Op(op) if matches!(op, Op::Map(_) | Op::Cast { .. }) || form::is_view(op) => stack.extend(&t.args),
                _ => {}
            }
        }
    }
    false
}

/// Whether one class alone reads `id`, be it through views.
fn used_once(s: &Saturated, mut id: Id) -> bool {
    let mut seen = BTreeSet::new();
    loop {
        let users: BTreeSet<Id> = s.egraph[id].parents().map(|p| s.egraph.find(p)).collect();
        let [user] = users.iter().copied().collect::<Vec<_>>()[..] else { return false };
        // A view of it stands for it: whoever reads the view reads this.
        let view = s.egraph[user].nodes.iter().any(|t| t.args.contains(&id) && matches!(&t.head, Head::Op(op) if form::is_view(op)));
        if !view || !seen.insert(user) {
            return true;
        }
        id = user;
    }
}

/// The states that absorb one term of class `arg`.
fn absorb(s: &Saturated, state: &State, arg: Id) -> Vec<State> {
    if state.len() >= MAX_MEMBERS || s.is_folded(arg) {
        return vec![];
    }
    // Whoever reads it must be able to compute it on the way: a contraction reads through views, a window does not, but a
    // convolution reads an image in any order of its axes.
    let read_by =
        |of: &dyn Fn(&Op) -> bool| state.values().any(|t| t.args.iter().any(|a| reads(s, state, *a, arg)) && matches!(&t.head, Head::Op(op) if of(op)));
    let window = read_by(&|op| form::is_heart(op) && !matches!(op, Op::MatMul { .. } | Op::Attention { .. } | Op::AttentionParts { .. }));
    let readers = || state.values().filter(|t| t.args.iter().any(|a| reads(s, state, *a, arg)));
    if window && !readers().all(|t| matches!(t.head, Head::Op(Op::Conv { .. })) && t.args[0] == arg && t.args[1] != arg) {
        return vec![];
    }
    let joined = if window { separable(s, state, arg) } else { None };
    let views_only = !window && (read_by(&form::is_heart) || in_windows(state) && read_by(&|op| matches!(op, Op::Patches { .. })));
    let terms = s.egraph[arg].nodes.iter().filter(|t| match &t.head {
        Head::Leaf(_) => false,
        Head::Op(op) => {
            (!fuse::is_control(op) || reads_through(op, t) && used_once(s, arg))
                && !form::is_opaque(op)
                && (!window || matches!(op, Op::Transpose { .. }))
                && (!views_only || form::is_view(op) && !is_apart(s, t))
                && !t.args.contains(&arg)
                && t.args.iter().all(|a| !state.contains_key(a) || !depends(s, state, *a, arg))
        }
    });
    let grown = terms.map(|t| {
        let mut next = state.clone();
        next.insert(arg, t.clone());
        next
    });
    grown.chain(joined).chain(patches(s, state, arg)).collect()
}

/// Whether a product reads its rows window by window.
fn in_windows(state: &State) -> bool {
    let has = |of: &dyn Fn(&Op) -> bool| state.values().any(|t| matches!(&t.head, Head::Op(op) if of(op)));
    has(&|op| matches!(op, Op::MatMul { .. })) && has(&|op| matches!(op, Op::Patches { .. }))
}

/// The state whose product reads what windows see where the image lies: kernels of wide devices do, as they do for convolutions.
fn patches(s: &Saturated, state: &State, arg: Id) -> Option<State> {
    let product = state.values().any(|t| matches!(t.head, Head::Op(Op::MatMul { .. })));
    if !product || !s.egraph.analysis.costs.is_wide() {
        return None;
    }
    s.egraph[arg].nodes.iter().filter(|t| matches!(t.head, Head::Op(Op::Reshape { .. }))).find_map(|t| {
        let under = t.args[0];
        let windows = s.egraph[under].nodes.iter().find(|t| matches!(t.head, Head::Op(Op::Patches { .. })))?;
        let mut next = state.clone();
        next.extend([(arg, t.clone()), (under, windows.clone())]);
        Some(next)
    })
}

/// The state with the depthwise convolution whose result, changed point by point, is the image `arg` of its product.
fn separable(s: &Saturated, state: &State, arg: Id) -> Option<State> {
    let weights = |t: &Term| &s.egraph[t.args[1]].data.ty.shape;
    let float = |id: Id| s.egraph[id].data.ty.dtype == DType::F32;
    let mut readers = state.values().filter(|t| t.args.contains(&arg));
    let (Some(reader), None) = (readers.next(), readers.next()) else { return None };
    if !matches!(&reader.head, Head::Op(op) if form::is_point_product(op, weights(reader))) || !float(arg) {
        return None;
    }
    let mut next = state.clone();
    let (mut stack, mut depthwise) = (vec![arg], None);
    while let Some(id) = stack.pop() {
        if next.contains_key(&id) {
            continue;
        }
        let nodes = &s.egraph[id].nodes;
        let first = nodes.iter().find(|t| matches!(&t.head, Head::Op(op @ Op::Conv { .. }) if form::is_depthwise(op, weights(t))));
        if let Some(t) = first {
            if depthwise.is_some_and(|d| d != id) || !float(t.args[0]) {
                return None;
            }
            depthwise = Some(id);
            next.insert(id, t.clone());
        } else if !nodes.iter().any(|t| matches!(t.head, Head::Op(Op::Broadcast { .. }))) {
            let t = nodes.iter().find(|t| matches!(t.head, Head::Op(Op::Map(_))))?;
            stack.extend(&t.args);
            next.insert(id, t.clone());
        }
    }
    depthwise.filter(|_| next.len() <= MAX_MEMBERS).map(|_| next)
}

/// Whether a kernel may choose between the parts of a concatenation, point by point, instead of reading it.
fn reads_through(op: &Op, term: &Term) -> bool {
    matches!(op, Op::Concat { .. }) && term.args.len() <= MOST_PARTS
}

/// Whether a term exists without merged siblings.
fn is_apart(s: &Saturated, t: &Term) -> bool {
    t.args.iter().all(|a| s.apart.contains(a))
}

/// Whether operand `a` is `arg`, directly or through views that the state absorbed.
fn reads(_: &Saturated, state: &State, a: Id, arg: Id) -> bool {
    let mut at = a;
    loop {
        if at == arg {
            return true;
        }
        match state.get(&at) {
            Some(t) if matches!(&t.head, Head::Op(op) if form::is_view(op)) => at = t.args[0],
            _ => return false,
        }
    }
}

/// Whether member class `a` reaches class `on` inside the state.
fn depends(_: &Saturated, state: &State, a: Id, on: Id) -> bool {
    let mut stack = vec![a];
    let mut seen = BTreeSet::new();
    while let Some(id) = stack.pop() {
        if id == on {
            return true;
        }
        if seen.insert(id)
            && let Some(t) = state.get(&id)
        {
            stack.extend(t.args.iter().copied());
        }
    }
    false
}

/// A state that one kernel can compute.
struct Legal {
    /// Terms inside, operands before users.
    members: Vec<(Id, Term)>,
    /// Classes it reads: sorted, distinct.
    args: Vec<Id>,
    formed: Formed,
}

/// What was found out of the states that begin at one term.
#[derive(Default)]
struct Known {
    legal: HashMap<State, Option<Rc<Legal>>>,
    /// States that were grown.
    grown: HashSet<State>,
}

impl Known {
    /// [`legal`], once for each state.
    fn legal(&mut self, s: &Saturated, root: Id, state: &State) -> Option<Rc<Legal>> {
        if let Some(known) = self.legal.get(state) {
            return known.clone();
        }
        let found = legal(s, root, state).map(Rc::new);
        self.legal.insert(state.clone(), found.clone());
        found
    }
}

/// The kernel of a state; `None` where it is illegal.
fn legal(s: &Saturated, root: Id, state: &State) -> Option<Legal> {
    let mut tried: Vec<Vec<(Id, Term)>> = vec![];
    for views in [Views::All, Views::NoReshape, Views::Weights, Views::None] {
        let members = close(s, root, state, views)?;
        if tried.contains(&members) {
            continue;
        }
        if let Some((args, formed)) = form_members(s, &members, &[root]) {
            return Some(Legal { members, args, formed });
        }
        tried.push(members);
    }
    None
}

/// The kernel of exactly these terms, operands before users, that gives these classes: what it reads, sorted, and itself. `None` where
/// that is illegal.
pub(super) fn form_members(s: &Saturated, members: &[(Id, Term)], outputs: &[Id]) -> Option<(Vec<Id>, Formed)> {
    let mut graph = Graph::new("kernel");
    let mut values: BTreeMap<Id, Value> = BTreeMap::new();
    let mut args: Vec<Id> = vec![];
    let inside: BTreeSet<Id> = members.iter().map(|(id, _)| *id).collect();
    for &a in members.iter().flat_map(|(_, term)| &term.args) {
        if !inside.contains(&a) && !values.contains_key(&a) {
            let fact = &s.egraph[a].data;
            // Scalars that are constants are written into the kernel.
            let v = match (fact.uniform, fact.ty.const_shape()) {
                (Some(bits), Some(shape)) if shape.iter().product::<usize>() == 1 => {
                    graph.constant(pavage_ir::Tensor::full(fact.ty.dtype, shape, pavage_ir::Scalar::F(f64::from_bits(bits))))
                }
                _ => graph.input(format!("a{}", args.len()), fact.ty.clone()),
            };
            values.insert(a, v);
            args.push(a);
        }
    }
    let mut nodes = vec![];
    for (id, term) in members {
        let Head::Op(op) = &term.head else { return None };
        let operands: Vec<Value> = term.args.iter().map(|a| values[a]).collect();
        let v = graph.add(op.clone(), &operands).ok()?;
        values.insert(*id, v);
        nodes.push(v.node);
    }
    let outputs: Vec<Value> = outputs.iter().map(|id| values[id]).collect();
    outputs.iter().enumerate().for_each(|(i, v)| graph.output(format!("out{i}"), *v));
    let order = Order::new(&graph);
    let (used, formed) = fuse::assemble_exact(&graph, &order, &nodes, &outputs).ok()?;
    debug_assert_eq!(used.len(), nodes.len());
    args.sort();
    Some((args, formed))
}

/// The views that a contraction's operands are read through.
#[derive(Clone, Copy, PartialEq)]
enum Views {
    All,
    NoReshape,
    /// Nothing but packed weights.
    Weights,
    None,
}

/// The state's terms and the views they read through, operands first. `None` if they form a circle.
fn close(s: &Saturated, root: Id, state: &State, views: Views) -> Option<Vec<(Id, Term)>> {
    let mut chosen = state.clone();
    // A convolution reads an image in another order, but through nothing else.
    let turned = |id: &Id| state.get(id).is_some_and(|t| matches!(t.head, Head::Op(Op::Transpose { .. })));
    let images: Vec<Id> = state.values().filter(|t| matches!(t.head, Head::Op(Op::Conv { .. }))).map(|t| t.args[0]).filter(turned).collect();
    let mut stack: Vec<(Id, Views)> = state.keys().map(|id| (*id, if images.contains(id) { Views::None } else { Views::All })).collect();
    while let Some((id, level)) = stack.pop() {
        let term = chosen[&id].clone();
        let Head::Op(op) = &term.head else { continue };
        let level = match op {
            Op::Conv { .. } | Op::MatMul { .. } if matches!(op, Op::Conv { .. }) || views == Views::Weights => {
                // Windows read whole tensors, but weights may be packed.
                let w = term.args[1];
                let packed = s.egraph[w].nodes.iter().find(|t| matches!(t.head, Head::Op(Op::Dequant { .. })));
                if let Some(t) = packed.filter(|_| views != Views::None) {
                    chosen.entry(w).or_insert_with(|| t.clone());
                }
                continue;
            }
            Op::Pool { .. } | Op::WinogradOutput { .. } => continue,
            op if form::is_opaque(op) => continue,
            Op::MatMul { .. } | Op::Attention { .. } | Op::AttentionParts { .. } => views,
            _ => level,
        };
        let takes = |op: &Op| match level {
            Views::All => fuse::is_free(op),
            Views::NoReshape => fuse::is_free(op) && !matches!(op, Op::Reshape { .. }),
            Views::Weights | Views::None => false,
        };
        for &a in term.children() {
            if chosen.contains_key(&a) {
                continue;
            }
            // Not a view of what is read through it: a transpose and the one that undoes it are in each other's classes.
            // Nor a slice of merged siblings where there is another way: that is a choice, made by absorbing it. Another shape of
            // merged siblings is a name for the same memory: read as such, its slices keep the parts' coordinates.
            let free = s.egraph[a].nodes.iter().find(|t| {
                matches!(&t.head, Head::Op(op) if takes(op) && !(matches!(op, Op::Reshape { .. }) && s.merged.contains(t)))
                    && (is_apart(s, t) || !s.apart.contains(&a))
                    && (s.rounds.is_empty() || !s.rounds.contains_key(&(a, (*t).clone())))
                    && !t.args.contains(&a)
                    && !t.args.iter().any(|x| depends(s, &chosen, *x, a))
            });
            let leaf = s.egraph[a].nodes.iter().any(|t| matches!(t.head, Head::Leaf(_)));
            if let Some(t) = free.filter(|_| !leaf) {
                chosen.insert(a, t.clone());
                stack.push((a, level));
            }
        }
    }
    // Operands before users, from the root.
    let mut out: Vec<(Id, Term)> = vec![];
    let mut done: BTreeSet<Id> = BTreeSet::new();
    let mut open: BTreeSet<Id> = BTreeSet::new();
    let mut stack = vec![(root, false)];
    while let Some((id, leave)) = stack.pop() {
        if leave {
            open.remove(&id);
            done.insert(id);
            out.push((id, chosen[&id].clone()));
            continue;
        }
        if done.contains(&id) || !chosen.contains_key(&id) {
            continue;
        }
        if !open.insert(id) {
            return None;
        }
        stack.push((id, true));
        for &a in &chosen[&id].args {
            if open.contains(&a) {
                return None;
            }
            if !done.contains(&a) {
                stack.push((a, false));
            }
        }
    }
    Some(out)
}
