//! What a model needs that no kernel covers.
use crate::Error;
use pavage_codegen::{emit, targets::Target};
use pavage_ir::{Graph, NodeId};
use pavage_passes::{self as passes, Ctx, build};
use std::collections::BTreeMap;

/// Something that a model needs and no kernel covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The op of the graph, or the ops of the kernel.
    pub op: String,
    /// What is missing.
    pub missing: String,
    /// Names of the model's nodes that need it.
    pub nodes: Vec<String>,
}

/// Everything in a graph that `target` has no kernel for.
///
/// What the passes cannot put into kernels is listed first; only without any of that are kernels made, one an op, and those
/// listed that the target has no code for.
pub fn gaps(graph: &Graph, target: &str) -> Result<Vec<Gap>, Error> {
    let target = Target::parse(target).map_err(|e| Error::Request(e.to_string()))?;
    let whole = no_kernel(graph, &build::missing(graph));
    if !whole.is_empty() {
        return Ok(whole);
    }
    let (mut graph, ctx) = (graph.clone(), Ctx::default());
    passes::run(&mut graph, &ctx, passes::PIPELINE)?;
    let program = build::unfused_program("unfused", &graph, &ctx)?;
    let mut found: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    for (origin, why) in emit::Kernels::missing(&program, &target) {
        found.entry((origin.members.join(" "), why)).or_default().extend(origin.sources);
    }
    Ok(listed(found))
}

fn listed(found: BTreeMap<(String, String), Vec<String>>) -> Vec<Gap> {
    found.into_iter().map(|((op, missing), nodes)| Gap { op, missing, nodes }).collect()
}

pub(crate) fn no_kernel(graph: &Graph, missing: &[(NodeId, String)]) -> Vec<Gap> {
    let mut found: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    for (id, why) in missing {
        let op = graph.op(*id).map_or("value", |op| op.mnemonic()).to_string();
        found.entry((op, why.clone())).or_default().extend(graph[*id].source.iter().cloned());
    }
    listed(found)
}

/// The same as one message.
pub(crate) fn message(gaps: &[Gap]) -> String {
    let line = |g: &Gap| format!("  {}: {} ({} nodes: {})", g.op, g.missing, g.nodes.len(), g.nodes.iter().take(4).cloned().collect::<Vec<_>>().join(", "));
    let lines: Vec<String> = gaps.iter().map(line).collect();
    format!("this model needs {} things no kernel covers:\n{}", lines.len(), lines.join("\n"))
}
