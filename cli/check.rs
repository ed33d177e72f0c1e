//! `pavage check`: everything a model needs that Pavage lacks, all at once. Also how a model is
//! described, which `inspect` shares.
use super::{Done, Failure, remark, say, say_json, text};
use pavage::frontend::{Error as ImportError, Problem, onnx::Model};
use pavage::ir::{Graph, NodeKind, TensorType};
use pavage::{Error, Gap, ShapeArg, Source};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// `pavage check`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The model.
    model: PathBuf,
    /// Fix a size (batch=1) or an input's shape (x=1x3x224x224).
    #[arg(long = "shape", value_name = "NAME=SIZE")]
    shapes: Vec<ShapeArg>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Reads a model.
pub(crate) fn import(path: &Path, shapes: &[ShapeArg]) -> Result<Model, Failure> {
    Ok(pavage::import(Source::Path(path), shapes)?)
}

/// Names and types of a graph's inputs.
pub(crate) fn inputs(graph: &Graph) -> Vec<(&str, &TensorType)> {
    let input = |id| match &graph[id].kind {
        NodeKind::Input(name) => Some((name.as_str(), graph[id].types.first()?)),
        _ => None,
    };
    graph.inputs().iter().filter_map(|id| input(*id)).collect()
}

/// One thing that is missing.
struct Missing {
    op: String,
    domain: String,
    opset: Option<i64>,
    count: usize,
    nodes: Vec<String>,
    missing: String,
    nearest: String,
}

impl From<&Problem> for Missing {
    fn from(p: &Problem) -> Self {
        let Problem { op, domain, opset, count, nodes, missing, nearest } = p.clone();
        Missing { op, domain, opset: Some(opset), count, nodes, missing, nearest }
    }
}

impl From<Gap> for Missing {
    fn from(g: Gap) -> Self {
        let Gap { op, missing, mut nodes } = g;
        let count = nodes.len();
        nodes.truncate(4);
        Missing { op, domain: "kernel".into(), opset: None, count, nodes, missing, nearest: String::new() }
    }
}

/// `pavage check`
pub(crate) fn main(args: &Args) -> Done {
    let done = pavage::import(Source::Path(&args.model), &args.shapes);
    let missing: Vec<Missing> = match &done {
        Err(Error::Model(ImportError::Unsupported(problems))) => problems.iter().map(Missing::from).collect(),
        Ok(model) => pavage::gaps(&model.graph, "native")?.into_iter().map(Missing::from).collect(),
        Err(_) => vec![],
    };
    if missing.is_empty() {
        return print(&args.model, &done?, args.json);
    }
    if args.json {
        let problem = |m: &Missing| {
            json!({
                "op": m.op, "domain": m.domain, "opset": m.opset, "count": m.count, "nodes": m.nodes,
                "missing": m.missing, "nearest": m.nearest,
            })
        };
        say_json(&json!({"ok": false, "problems": missing.iter().map(problem).collect::<Vec<_>>()}));
    } else {
        let rows = missing.iter().map(|m| {
            let more = if m.count > m.nodes.len() { ", ..." } else { "" };
            let opset = m.opset.map_or(String::new(), |v| v.to_string());
            let name = format!("{}::{}", m.domain, m.op);
            vec![name, opset, m.count.to_string(), m.missing.clone(), m.nearest.clone(), format!("{}{more}", m.nodes.join(", "))]
        });
        say(text::table(&["op", "opset#", "times#", "what is missing", "nearest", "nodes"], rows));
    }
    Err(Failure::model(format!("{}: {} that Pavage lacks", args.model.display(), text::count(missing.len(), "thing"))))
}

/// Describes a model file.
pub(crate) fn describe(path: &Path, json: bool) -> Done {
    print(path, &import(path, &[])?, json)
}

fn print(path: &Path, model: &Model, json: bool) -> Done {
    let graph = &model.graph;
    let mut ops = BTreeMap::new();
    count_ops(graph, &mut ops);
    let total: usize = ops.values().sum();
    if json {
        let port = |(name, ty): (&str, &TensorType)| json!({"name": name, "type": ty.to_string()});
        let outputs = graph.outputs.iter().map(|o| port((&o.name, graph.ty(o.value))));
        say_json(&json!({
            "ok": true, "file": path.display().to_string(), "producer": model.metadata.producer,
            "opsets": model.metadata.opsets, "ops": ops, "notes": model.notes,
            "inputs": inputs(graph).into_iter().map(port).collect::<Vec<_>>(),
            "outputs": outputs.collect::<Vec<Value>>(),
        }));
        return Ok(());
    }
    let style = text::BOLD;
    let opsets: Vec<String> = model.metadata.opsets.iter().map(|(d, v)| format!("{d} {v}")).collect();
    let by = if model.metadata.producer.is_empty() { "unknown" } else { &model.metadata.producer };
    say(format!("{style}{}{style:#}: by {by}, operator sets {}", path.display(), opsets.join(", ")));
    for (name, ty) in inputs(graph) {
        say(format!("input  {name}: {ty}"));
    }
    for output in &graph.outputs {
        say(format!("output {}: {}", output.name, graph.ty(output.value)));
    }
    let mut by_count: Vec<_> = ops.iter().collect();
    by_count.sort_by_key(|(name, n)| (std::cmp::Reverse(**n), *name));
    let ops: Vec<String> = by_count.iter().map(|(name, n)| format!("{name} {n}")).collect();
    say(format!("{} after import: {}", text::count(total, "op"), ops.join(", ")));
    model.notes.iter().for_each(remark);
    Ok(())
}

/// Ops by mnemonic, those of nested graphs included.
fn count_ops(graph: &Graph, into: &mut BTreeMap<String, usize>) {
    for id in graph.nodes() {
        if let NodeKind::Op(op, bodies) = &graph[id].kind {
            *into.entry(op.mnemonic().to_string()).or_default() += 1;
            bodies.iter().for_each(|body| count_ops(body, into));
        }
    }
}
