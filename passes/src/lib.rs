//! Graph to graph to regions: folding, e-graph rewriting, fusion, memory planning.
//!
//! A pass is a function with a row in [`PASSES`]; the driver verifies after each. This crate sees no file and
//! no target name, only the facts in [`Ctx`].
pub mod build;
pub mod canon;
pub mod eqsat;
pub mod fold;
pub mod form;
pub mod fuse;
pub mod integer;
pub mod layout;
pub mod memory;
mod positions;
pub mod precision;
mod rebuild;
pub mod rules;
pub mod slices;
pub mod weights;

use pavage_ir::{Graph, NodeKind, Region, verify};
use std::{
    cell::RefCell,
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
};

/// Did a pass do anything?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// The graph differs.
    Yes,
    /// The graph is as it was.
    No,
}

/// What a pass may read besides the graph, and where it leaves dumps.
#[derive(Default)]
pub struct Ctx {
    /// What the device that the plan is for costs.
    pub costs: eqsat::cost::Costs,
    /// How the e-graph's kernels are chosen.
    pub search: eqsat::extract::Search,
    /// Passes after which the graph is dumped; `all` means every one.
    pub dump_after: Vec<String>,
    /// Dumps so far: pass name and text.
    pub dumps: RefCell<Vec<(String, String)>>,
    /// What the user should know: limits that were hit.
    pub notes: RefCell<Vec<String>>,
    /// The passes that changed what stands for a node of the model, in order, by the node's name.
    pub changed_by: RefCell<BTreeMap<String, Vec<&'static str>>>,
    /// What the searches did so far.
    pub work: RefCell<eqsat::Work>,
    /// The member ops of each region as a graph (inputs are the region's arguments, outputs its outputs), by the
    /// region without its name; kept only if this is `Some`. Kernels that no ops stand behind (copies into a
    /// concatenation) have none.
    pub members: RefCell<Option<BTreeMap<Region, Graph>>>,
}

impl Ctx {
    /// Tell the user something, once.
    pub fn note(&self, text: String) {
        let mut notes = self.notes.borrow_mut();
        if !notes.contains(&text) {
            notes.push(text);
        }
    }

    /// Tell the user that the search hit a limit, so that a better plan may exist.
    pub fn limit(&self, text: &str) {
        self.note(format!("limit of the search: {text}"));
    }

    /// Remember which nodes of the model have other ops after pass `name` than before.
    fn note_changes(&self, name: &'static str, before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) {
        let mut all = self.changed_by.borrow_mut();
        for (node, ops) in before {
            let of = all.get(node).map_or(&[][..], |names| names);
            if after.get(node) != Some(ops) && !of.contains(&name) {
                all.entry(node.clone()).or_default().push(name);
            }
        }
    }

    /// Keep `text` as what pass `name` left, if asked for.
    pub fn dump(&self, name: &str, text: impl FnOnce() -> String) {
        if self.dump_after.iter().any(|n| n == name || n == "all") {
            self.dumps.borrow_mut().push((name.into(), text()));
        }
    }
}

/// A failed pass.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The pass left a graph that does not verify: a bug in the pass.
    #[error("after pass `{pass}` the graph does not verify: {why}\n{dump}")]
    Invalid {
        /// Registry name.
        pass: &'static str,
        /// What the verifier found.
        why: String,
        /// The graph.
        dump: String,
    },
    /// An op that the pass built is ill typed: a bug in the pass.
    #[error("pass `{pass}` built an ill-typed node: {source}")]
    IllTyped {
        /// Registry name.
        pass: &'static str,
        /// What the type rule said.
        source: pavage_ir::OpError,
    },
    /// A rule file or rule that is wrong, or a plan that cannot be built from what rules found: a bug.
    #[error("eqsat: {reason}")]
    Rules {
        /// What is wrong.
        reason: String,
    },
    /// No pass has this name.
    #[error("no pass is named `{0}`; `pavage opt --list` prints them")]
    Unknown(String),
    /// An op that no kernel can compute.
    #[error("{op} (from {}): {reason}", .sources.join(", "))]
    NoKernel {
        /// Mnemonic.
        op: String,
        /// Source nodes.
        sources: Vec<String>,
        /// Why.
        reason: String,
    },
}

/// One registry row.
pub struct Pass {
    /// Command-line and test name.
    pub name: &'static str,
    /// One sentence for `--help`.
    pub about: &'static str,
    /// The pass.
    pub run: fn(&mut Graph, &Ctx) -> Result<Changed, PassError>,
}

/// Every pass, in pipeline order.
pub const PASSES: &[Pass] = &[
    Pass { name: "integer", about: "Products of dequantised tensors become products of their integers.", run: integer::run },
    Pass { name: "weights", about: "Dequantised weights stay packed.", run: weights::run },
    Pass { name: "fold", about: "Compute what constants decide.", run: fold::run },
    Pass { name: "canon", about: "One form for each view; equal nodes become one.", run: canon::run },
    Pass { name: "layout", about: "Images become channels-last; transposes move to where they cancel.", run: layout::run },
    Pass { name: "scale", about: "Scales and biases fold into the weights of convolutions and matrix products.", run: fold::run_scale },
];

/// The passes before fusion, in order; some run more than once.
pub const PIPELINE: &[&str] = &["integer", "weights", "fold", "canon", "layout", "fold", "canon", "scale", "fold", "canon"];

/// The passes of a graph that stays as it was written.
pub const CLEANING: &[&str] = &["fold", "canon"];

/// Run a pass on a graph and, innermost first, on the graphs nested in it.
fn apply(pass: &Pass, graph: &mut Graph, ctx: &Ctx) -> Result<(), PassError> {
    for id in graph.nodes() {
        for body in graph.bodies_mut(id) {
            apply(pass, body, ctx)?;
        }
    }
    (pass.run)(graph, ctx)?;
    graph.prune();
    Ok(())
}

/// For each node of the model the ops that stand for it, as a hash that does not depend on their order.
fn by_source(graph: &Graph) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    for id in graph.schedule() {
        let NodeKind::Op(op, bodies) = &graph[id].kind else { continue };
        let mut hasher = DefaultHasher::new();
        (op, &graph[id].types).hash(&mut hasher);
        for name in &graph[id].source {
            let of: &mut u64 = found.entry(name.clone()).or_default();
            *of = of.wrapping_add(hasher.finish());
        }
        for (name, hash) in bodies.iter().flat_map(by_source) {
            let of: &mut u64 = found.entry(name).or_default();
            *of = of.wrapping_add(hash);
        }
    }
    found
}

/// Run the named passes in the given order, verifying after each.
pub fn run(graph: &mut Graph, ctx: &Ctx, names: &[&str]) -> Result<(), PassError> {
    for name in names {
        let pass = PASSES.iter().find(|p| p.name == *name).ok_or_else(|| PassError::Unknown((*name).to_string()))?;
        let before = by_source(graph);
        apply(pass, graph, ctx)?;
        ctx.note_changes(pass.name, &before, &by_source(graph));
        if let Err(e) = verify::verify(graph) {
            return Err(PassError::Invalid { pass: pass.name, why: e.to_string(), dump: pavage_ir::text::print(graph) });
        }
        ctx.dump(pass.name, || pavage_ir::text::print(graph));
    }
    Ok(())
}
