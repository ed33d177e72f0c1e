//! Extraction as an integer program: what the frontier DP is checked with. Behind the feature `ilp`, which no build needs; the
//! feature `highs` solves it with HiGHS, which takes all parts of real models that are too large for the solver in plain Rust.
//!
//! A binary variable a kernel says whether it runs, one a class whether it is wanted. A root is wanted; a wanted class has
//! a kernel of its own or one that gives it; the arguments of a kernel that runs are wanted. Circles are cut off as they turn up: of the kernels of a circle at least one does
//! not run. The DP leaves out kernels that close a circle in its order of the classes; this does not.
use super::{candidates, every_rule, extract, joint, roots, saturate, templates};
use crate::{Ctx, PassError};
use candidates::Candidates;
use egg::Id;
use good_lp::{
    Expression, ProblemVariables, ResolutionError, Solution, SolverModel, Variable, WithMipGap, WithTimeLimit, constraint, solvers::SolutionStatus, variable,
};
use pavage_ir::{Graph, text};
use std::collections::{BTreeMap, BTreeSet};

/// Seconds that the solver may take for one program.
const LIMIT: f64 = 60.0;

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

/// Both searches on each distinct part of `graph`: among kernels of one class, and with those of several that extraction came to offer.
pub fn compare(graph: &Graph, ctx: &Ctx) -> Result<Vec<[Compared; 2]>, PassError> {
    let mut seen = BTreeSet::new();
    let mut found = vec![];
    for part in templates::split(graph)? {
        if !seen.insert(text::print(&part.graph)) {
            continue;
        }
        let saturated = saturate(&part.graph, &part.constants, &every_rule()?, &ctx.costs)?;
        let mut all = candidates::form_all(&saturated, &ctx.costs)?;
        let roots = roots(&part.graph, part.graph.outputs.len(), &saturated);
        let compared = |all: &Candidates, dp: f64| Ok::<_, PassError>(Compared { kernels: all.kernels.len(), dp, ilp: optimum(all, &roots)? });
        let single = compared(&all, extract::extract(&all, &roots, ctx.search)?.cost)?;
        let dp = joint::choose(&saturated, &mut all, &roots, ctx.search, &ctx.costs)?.cost;
        found.push([single, compared(&all, dp)?]);
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

#[cfg(feature = "highs")]
fn solver(program: good_lp::variable::UnsolvedProblem) -> impl SolverModel<Error = ResolutionError> + WithTimeLimit + WithMipGap {
    good_lp::highs(program)
}

#[cfg(not(feature = "highs"))]
fn solver(program: good_lp::variable::UnsolvedProblem) -> impl SolverModel<Error = ResolutionError> + WithTimeLimit + WithMipGap {
    good_lp::microlp(program)
}

/// The kernel of each class that the cheapest plan without these circles wants.
fn solve(all: &Candidates, roots: &[Id], circles: &[Vec<usize>]) -> Result<Option<BTreeMap<Id, usize>>, PassError> {
    let mut variables = ProblemVariables::new();
    let runs: Vec<Variable> = all.kernels.iter().map(|_| variables.add(variable().binary())).collect();
    let least = |class: &Id| if roots.contains(class) { 1.0 } else { 0.0 };
    let wanted: BTreeMap<Id, Variable> = all.by_class.keys().map(|c| (*c, variables.add(variable().min(least(c)).max(1.0)))).collect();
    let cost: Expression = all.kernels.iter().zip(&runs).map(|(k, runs)| k.cost * *runs).sum();
    let mut program = solver(variables.minimise(cost)).with_time_limit(LIMIT);
    for (class, kernels) in &all.by_class {
        let own: Expression = kernels.iter().map(|k| Expression::from(runs[*k])).sum();
        let given: Expression = (0..all.kernels.len()).filter(|k| all.kernels[*k].also.contains(class)).map(|k| Expression::from(runs[k])).sum();
        program.add_constraint(constraint!(own.clone() <= 1.0));
        program.add_constraint(constraint!(own + given >= wanted[class]));
        // One row an argument for all kernels of the class: tighter than one a kernel.
        let args: BTreeSet<Id> = kernels.iter().flat_map(|k| &all.kernels[*k].args).copied().collect();
        for arg in args {
            let Some(wanted) = wanted.get(&arg) else { continue };
            let readers: Expression = kernels.iter().filter(|k| all.kernels[**k].args.contains(&arg)).map(|k| Expression::from(runs[*k])).sum();
            program.add_constraint(constraint!(readers <= *wanted));
        }
    }
    // What a kernel gives beside its own class is for another: as in the DP, no output is written that nobody reads.
    let readers =
        |class: &Id| all.kernels.iter().zip(&runs).filter(|(k, _)| k.args.contains(class)).map(|(_, runs)| Expression::from(*runs)).sum::<Expression>();
    for (kernel, runs) in all.kernels.iter().zip(&runs) {
        for class in kernel.also.iter().filter(|c| !roots.contains(c)) {
            program.add_constraint(constraint!(readers(class) >= *runs));
        }
    }
    for circle in circles {
        let together: Expression = circle.iter().map(|k| Expression::from(runs[*k])).sum();
        program.add_constraint(constraint!(together <= circle.len() as f64 - 1.0));
    }
    let failed = |e: &dyn std::fmt::Display| PassError::Rules { reason: format!("the integer program: {e}") };
    let solution = match program.with_mip_gap(0.0).map_err(|e| failed(&e))?.solve() {
        // HiGHS calls it a gap where bounds of the optimum differ in their last bits.
        Ok(solution) if matches!(solution.status(), SolutionStatus::Optimal | SolutionStatus::GapLimit) => solution,
        // Out of time, with a plan or without one.
        Ok(_) | Err(ResolutionError::Other(_)) => return Ok(None),
        Err(e) => return Err(failed(&e)),
    };
    let running = |k: &usize| solution.value(runs[*k]) > 0.5;
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
