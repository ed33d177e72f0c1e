//! Why a kernel computes what the model asked for: egg's proof that the kernel's term equals the model's, as a list of rules.
//!
//! Every union has two terms and the name of a rule. A proof is the way from one term to the other over such unions and over
//! terms that are equal because their operands are. The operands of a kernel are the model's own terms where it has them, so
//! that a proof says nothing of the kernels before.
use super::{Head, Saturated, Term, candidates::Candidates, extract::Choice};
use crate::rules::promises;
use egg::{Explanation, Id, TreeTerm};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    rc::Rc,
};

/// Steps that a chain has at most.
const MOST: usize = 24;

/// A step of a proof: a term, the rule that gave it from the one before (none if operands changed), and proofs of what its
/// operands become.
pub type Step = TreeTerm<Term>;

/// Where the kernels of a plan come from.
struct Plan<'a> {
    candidates: &'a Candidates,
    /// The kernel chosen for a class.
    kernel: BTreeMap<Id, usize>,
    /// The model's terms of a class.
    origins: BTreeMap<Id, BTreeSet<Id>>,
    /// The term of a class and, apart from it, that of its kernel.
    terms: BTreeMap<Id, Id>,
    computed: BTreeMap<Id, Id>,
}

impl Saturated {
    /// Remember, for each class that a kernel of the plan computes, the rules on the way from the model's terms to the kernel's.
    /// What the model has no term for is part of the chains of those that read it.
    pub(super) fn prove(&mut self, candidates: &Candidates, choice: &Choice) {
        let mut chains: BTreeMap<Id, Vec<String>> = BTreeMap::new();
        for (class, proof) in self.proofs(candidates, choice) {
            walk(&proof.explanation_trees, &mut HashSet::new(), chains.entry(class).or_default());
        }
        // Roots come first: a reader's chain is complete before what it reads asks for it.
        let of_model: BTreeSet<Id> = self.origin.values().map(|id| self.egraph.find(*id)).collect();
        for &(class, k) in &choice.chosen {
            let Some(chain) = chains.get(&class).cloned() else { continue };
            for arg in candidates.kernels[k].args.iter().filter(|a| !of_model.contains(a)) {
                let of = chains.entry(*arg).or_default();
                of.extend(chain.iter().filter(|step| !of.contains(step)).cloned().collect::<Vec<_>>());
            }
        }
        self.chains = chains;
    }

    /// Proofs that the kernels of a plan compute terms of the model, by class: one for each of the model's terms that is not the
    /// kernel's as it stands.
    pub fn proofs(&mut self, candidates: &Candidates, choice: &Choice) -> Vec<(Id, Explanation<Term>)> {
        let mut origins: BTreeMap<Id, BTreeSet<Id>> = BTreeMap::new();
        for id in self.origin.values() {
            origins.entry(self.egraph.find(*id)).or_default().insert(*id);
        }
        let kernel: BTreeMap<Id, usize> = choice.chosen.iter().copied().collect();
        let mut plan = Plan { candidates, kernel, origins, terms: BTreeMap::new(), computed: BTreeMap::new() };
        let mut proofs = vec![];
        for &(class, _) in &choice.chosen {
            let made = self.term_of_kernel(&mut plan, class);
            for from in plan.origins.get(&class).into_iter().flatten().filter(|from| **from != made) {
                proofs.push((class, self.egraph.explain_id_equivalence(*from, made)));
            }
        }
        proofs
    }

    /// The term of a class as kernels read it: the model's, or else its kernel's.
    fn term_of(&mut self, plan: &mut Plan, class: Id) -> Id {
        if let Some(known) = plan.terms.get(&class) {
            return *known;
        }
        let found = match plan.origins.get(&class).and_then(|of| of.first()) {
            Some(origin) => *origin,
            None if plan.kernel.contains_key(&class) => self.term_of_kernel(plan, class),
            None => self.egraph[class].data.oldest,
        };
        plan.terms.insert(class, found);
        found
    }

    /// The term that the kernel chosen for a class computes.
    fn term_of_kernel(&mut self, plan: &mut Plan, class: Id) -> Id {
        if let Some(known) = plan.computed.get(&class) {
            return *known;
        }
        let members = plan.kernel.get(&class).map(|k| &plan.candidates.kernels[*k].members);
        let mut inside: BTreeMap<Id, Id> = BTreeMap::new();
        let mut last = self.egraph[class].data.oldest;
        for (id, term) in members.into_iter().flatten() {
            let args = term.args.iter().map(|a| inside.get(a).copied().unwrap_or_else(|| self.term_of(plan, *a))).collect();
            last = self.egraph.add_uncanonical(Term { head: term.head.clone(), args });
            inside.insert(*id, last);
        }
        plan.computed.insert(class, last);
        last
    }
}

/// The rules of a proof in order, each with the op that it gave, once; shared parts are read once.
fn walk(proof: &[Rc<Step>], seen: &mut HashSet<*const Step>, steps: &mut Vec<String>) {
    for tree in proof {
        if steps.len() >= MOST || !seen.insert(Rc::as_ptr(tree)) {
            continue;
        }
        let backward = tree.backward_rule.map(|rule| (rule, ", read backwards"));
        for (rule, how) in tree.forward_rule.map(|rule| (rule, "")).into_iter().chain(backward) {
            let of = match &tree.node.head {
                Head::Op(op) => op.mnemonic(),
                Head::Leaf(_) => "input",
            };
            let class = promises::class(rule.as_str()).map_or_else(String::new, |class| format!(" ({class})"));
            let step = format!("{of}: {rule}{class}{how}");
            if !steps.contains(&step) {
                steps.push(step);
            }
        }
        tree.child_proofs.iter().for_each(|child| walk(child, seen, steps));
    }
}
