//! The order of nodes: files exist that list them in any.
use crate::Error;
use onnx_protobuf::{GraphProto, NodeProto};
use std::collections::{BTreeSet, HashMap, HashSet};

/// Indices such that a node comes after those it reads, otherwise as in the file.
pub(crate) fn topological(nodes: &[NodeProto]) -> Result<Vec<usize>, Error> {
    let mut producer: HashMap<&str, usize> = HashMap::new();
    for (i, node) in nodes.iter().enumerate() {
        for output in node.output.iter().filter(|o| !o.is_empty()) {
            if producer.insert(output, i).is_some() {
                return Err(Error::Duplicate(output.clone()));
            }
        }
    }
    let needs: Vec<BTreeSet<usize>> = nodes.iter().map(|n| reads(n).into_iter().filter_map(|name| producer.get(name).copied()).collect()).collect();
    #[derive(Clone, Copy, PartialEq)]
    enum State {
        New,
        Open,
        Done,
    }
    let mut state = vec![State::New; nodes.len()];
    let mut order = Vec::with_capacity(nodes.len());
    for root in 0..nodes.len() {
        let mut stack = vec![root];
        while let Some(&i) = stack.last() {
            match state[i] {
                State::New => {
                    state[i] = State::Open;
                    for &need in needs[i].iter().rev() {
                        match state[need] {
                            State::New => stack.push(need),
                            State::Open => return Err(cycle(nodes, &needs, need)),
                            State::Done => {}
                        }
                    }
                }
                State::Open => {
                    state[i] = State::Done;
                    order.push(i);
                    stack.pop();
                }
                State::Done => {
                    stack.pop();
                }
            }
        }
    }
    Ok(order)
}

/// The names on a cycle that is known to exist below `start`'s needs.
fn cycle(nodes: &[NodeProto], needs: &[BTreeSet<usize>], start: usize) -> Error {
    // Breadth first from `start` back to itself: the shortest such cycle.
    let mut from: HashMap<usize, usize> = HashMap::new();
    let mut queue = std::collections::VecDeque::from([start]);
    'search: while let Some(i) = queue.pop_front() {
        for &need in &needs[i] {
            if from.contains_key(&need) {
                continue;
            }
            from.insert(need, i);
            if need == start {
                break 'search;
            }
            queue.push_back(need);
        }
    }
    let label = |i: usize| {
        let node: &NodeProto = &nodes[i];
        if node.name.is_empty() { format!("{}_{i}", node.op_type) } else { node.name.clone() }
    };
    let mut names = vec![label(start)];
    let mut at = start;
    while let Some(&next) = from.get(&at) {
        if next == start || names.len() > 16 {
            break;
        }
        names.push(label(next));
        at = next;
    }
    names.push(label(start));
    Error::Cycle(names)
}

/// Every name that a node reads, those its bodies take from outside included.
fn reads(node: &NodeProto) -> HashSet<&str> {
    let mut names: HashSet<&str> = node.input.iter().map(String::as_str).filter(|n| !n.is_empty()).collect();
    for graph in node.attribute.iter().flat_map(|a| a.g.iter().chain(&a.graphs)) {
        names.extend(free(graph));
    }
    names
}

fn free(graph: &GraphProto) -> HashSet<&str> {
    let mut names: HashSet<&str> = graph.node.iter().flat_map(reads).collect();
    names.extend(graph.output.iter().map(|o| o.name.as_str()));
    for own in graph.input.iter().map(|i| &i.name).chain(graph.initializer.iter().map(|t| &t.name)).chain(graph.node.iter().flat_map(|n| &n.output)) {
        names.remove(own.as_str());
    }
    names
}
