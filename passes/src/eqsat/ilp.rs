//! Extraction as an integer program: what the frontier DP is checked with. Behind the feature `ilp`, which no build needs.
//!
//! A binary variable a kernel says whether it runs, one a class whether it is wanted. A root is wanted; a wanted class has
//! a kernel of its own or one that gives it; the arguments of a kernel that runs are wanted. Circles are cut off as they turn up: of the kernels of a circle at least one does
//! not run. The DP leaves out kernels that close a circle in its order of the classes; this does not.
use super::{candidates, every_rule, joint, roots, saturate, templates};
use crate::{Ctx, PassError};
use candidates::Candidates;
use egg::Id;
use microlp::{ComparisonOp, OptimizationDirection, Problem, Variable};
use pavage_ir::{Graph, text};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// What the solver may take for one program.
const LIMIT: Duration = Duration::from_secs(60);

/// What both searches say of one part of a graph.
#[derive(Clone, Copy, Debug)]
pub struct Compared {
    /// Kernels to choose from.
    pub kernels: usize,
    /// Predicted nanoseconds of the frontier DP's choice.
    pub dp: f64,
    /// The same of the integer program's; `None` if the solver ran out of time.
    pub ilp: Option<f64>,
}

/// Both searches on each distinct part of `graph`.
pub fn compare(graph: &Graph, ctx: &Ctx) -> Result<Vec<Compared>, PassError> {
    let mut seen = BTreeSet::new();
    let mut found = vec![];
    for part in templates::split(graph)? {
        if !seen.insert(text::print(&part.graph)) {
            continue;
        }
        let saturated = saturate(&part.graph, &part.constants, &every_rule()?, &ctx.costs)?;
        let mut all = candidates::form_all(&saturated, &ctx.costs)?;
        let roots = roots(&part.graph, part.graph.outputs.len(), &saturated);
        let dp = joint::choose(&saturated, &mut all, &roots, ctx.search, &ctx.costs)?.cost;
        found.push(Compared { kernels: all.kernels.len(), dp, ilp: optimum(&all, &roots)? });
    }
    Ok(found)
}

/// The least cost of kernels that compute `roots`; `None` if the solver ran out of time.
pub fn optimum(all: &Candidates, roots: &[Id]) -> Result<Option<f64>, PassError> {
    let mut circles: Vec<Vec<usize>> = vec![];
    loop {
        let Some(chosen) = solve(all, roots, &circles)? else { return Ok(None) };
        match circle(all, roots, &chosen) {
            Some(circle) => circles.push(circle),
            None => {
                let kernels: BTreeSet<usize> = chosen.values().copied().collect();
                return Ok(Some(kernels.iter().map(|k| all.kernels[*k].cost).sum()));
            }
        }
    }
}

/// The kernel of each class that the cheapest plan without these circles wants.
fn solve(all: &Candidates, roots: &[Id], circles: &[Vec<usize>]) -> Result<Option<BTreeMap<Id, usize>>, PassError> {
    let mut program = Problem::new(OptimizationDirection::Minimize);
    program.set_time_limit(LIMIT);
    let runs: Vec<Variable> = all.kernels.iter().map(|k| program.add_binary_var(k.cost)).collect();
    let least = |class: &Id| if roots.contains(class) { 1.0 } else { 0.0 };
    let wanted: BTreeMap<Id, Variable> = all.by_class.keys().map(|c| (*c, program.add_var(0.0, (least(c), 1.0)))).collect();
    for (class, kernels) in &all.by_class {
        let mut row: Vec<(Variable, f64)> = kernels.iter().map(|k| (runs[*k], 1.0)).collect();
        program.add_constraint(&row, ComparisonOp::Le, 1.0);
        row.extend((0..all.kernels.len()).filter(|k| all.kernels[*k].also.contains(class)).map(|k| (runs[k], 1.0)));
        row.push((wanted[class], -1.0));
        program.add_constraint(&row, ComparisonOp::Ge, 0.0);
        // One row an argument for all kernels of the class: tighter than one a kernel.
        let args: BTreeSet<Id> = kernels.iter().flat_map(|k| &all.kernels[*k].args).copied().collect();
        for arg in args {
            let Some(wanted) = wanted.get(&arg) else { continue };
            let readers = kernels.iter().filter(|k| all.kernels[**k].args.contains(&arg));
            let row: Vec<(Variable, f64)> = readers.map(|k| (runs[*k], -1.0)).chain([(*wanted, 1.0)]).collect();
            program.add_constraint(&row, ComparisonOp::Ge, 0.0);
        }
    }
    for circle in circles {
        let row: Vec<(Variable, f64)> = circle.iter().map(|k| (runs[*k], 1.0)).collect();
        program.add_constraint(&row, ComparisonOp::Le, circle.len() as f64 - 1.0);
    }
    let outcome = program.solve().map_err(|e| PassError::Rules { reason: format!("the integer program: {e}") })?;
    let Some(solution) = outcome.solution().filter(|_| outcome.is_optimal()) else { return Ok(None) };
    let running = |k: &usize| solution.var_value(runs[*k]) > 0.5;
    let gives = |c: &Id, kernels: &Vec<usize>| {
        let own = kernels.iter().copied().find(|k| running(k));
        own.or_else(|| (0..all.kernels.len()).find(|k| all.kernels[*k].also.contains(c) && running(k)))
    };
    Ok(Some(all.by_class.iter().filter_map(|(c, kernels)| Some((*c, gives(c, kernels)?))).collect()))
}

/// Kernels of `chosen` that wait for each other, if the roots need some.
fn circle(all: &Candidates, roots: &[Id], chosen: &BTreeMap<Id, usize>) -> Option<Vec<usize>> {
    let mut done: BTreeSet<Id> = BTreeSet::new();
    let mut path: Vec<Id> = vec![];
    let mut stack: Vec<(Id, bool)> = roots.iter().map(|r| (*r, false)).collect();
    while let Some((class, leave)) = stack.pop() {
        if leave {
            path.pop();
            done.insert(class);
            continue;
        }
        let Some(kernel) = chosen.get(&class).filter(|_| !done.contains(&class)) else { continue };
        if let Some(at) = path.iter().position(|c| *c == class) {
            return Some(path[at..].iter().map(|c| chosen[c]).collect());
        }
        path.push(class);
        stack.push((class, true));
        stack.extend(all.kernels[*kernel].args.iter().map(|a| (*a, false)));
    }
    None
}
