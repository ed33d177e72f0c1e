//! Writing a pass as a rebuild: visit nodes in order, emit the new graph, map old values to new ones.
use crate::{Changed, PassError};
use pavage_ir::{Graph, NodeId, NodeKind, Op, Tensor, Value};
use std::collections::BTreeMap;

/// A new graph in the making.
pub(crate) struct Rebuild<'a> {
    pass: &'static str,
    /// The old graph.
    pub(crate) old: &'a Graph,
    /// The new graph.
    pub(crate) new: Graph,
    map: BTreeMap<Value, Value>,
    source: Vec<String>,
    seen: BTreeMap<(Op, Vec<Value>), NodeId>,
    consts: BTreeMap<u64, Vec<Value>>,
}

impl<'a> Rebuild<'a> {
    /// Start; inputs are in place.
    pub(crate) fn new(pass: &'static str, old: &'a Graph) -> Self {
        let mut this =
            Self { pass, old, new: Graph::new(old.name.clone()), map: BTreeMap::new(), source: vec![], seen: BTreeMap::new(), consts: BTreeMap::new() };
        for &id in old.inputs() {
            let NodeKind::Input(name) = &old[id].kind else { continue };
            let v = this.new.input(name.clone(), old[id].types[0].clone());
            this.map.insert(id.into(), v);
        }
        this
    }

    /// Old op and constant nodes in order. Nodes added while at one of them inherit its source names.
    pub(crate) fn at(&mut self, id: NodeId) {
        self.source = self.old[id].source.clone();
    }

    /// The new value for an old one.
    pub(crate) fn value(&self, old: Value) -> Value {
        self.map[&old]
    }

    /// Say what an old value became.
    pub(crate) fn set(&mut self, old: Value, new: Value) {
        self.map.insert(old, new);
    }

    /// Add a single-result op.
    pub(crate) fn add(&mut self, op: Op, operands: &[Value]) -> Result<Value, PassError> {
        self.add_with(op, operands, vec![]).map(Value::from)
    }

    /// Add an op; an equal one that exists is used again.
    pub(crate) fn add_with(&mut self, op: Op, operands: &[Value], bodies: Vec<Graph>) -> Result<NodeId, PassError> {
        let key = (op, operands.to_vec());
        if bodies.is_empty()
            && let Some(&known) = self.seen.get(&key)
        {
            let source = self.new[known].source.iter().chain(&self.source).cloned().collect();
            self.new.set_source(known, source);
            return Ok(known);
        }
        let shareable = bodies.is_empty();
        let id = self.new.add_with(key.0.clone(), operands, bodies).map_err(|source| PassError::IllTyped { pass: self.pass, source })?;
        self.new.set_source(id, self.source.clone());
        if shareable {
            self.seen.insert(key, id);
        }
        Ok(id)
    }

    /// Add a constant; an equal one that exists is used again.
    pub(crate) fn constant(&mut self, t: Tensor) -> Value {
        let known = self.consts.entry(t.content_hash()).or_default();
        if let Some(v) = known.iter().find(|v| self.new.as_const(**v).is_some_and(|k| k.same_bits(&t))) {
            return *v;
        }
        let v = self.new.constant(t);
        known.push(v);
        v
    }

    /// Copy an old node as it is.
    pub(crate) fn copy(&mut self, id: NodeId) -> Result<(), PassError> {
        match &self.old[id].kind {
            NodeKind::Input(_) => {}
            NodeKind::Const(t) => {
                let v = self.constant(t.clone());
                self.set(id.into(), v);
            }
            NodeKind::Op(op, bodies) => {
                let operands: Vec<_> = self.old.operands(id).iter().map(|v| self.value(*v)).collect();
                let new = self.add_with(op.clone(), &operands, bodies.clone())?;
                self.set_all(id, new);
            }
        }
        Ok(())
    }

    /// Every result of old `id` is the same result of new `new`.
    pub(crate) fn set_all(&mut self, id: NodeId, new: NodeId) {
        for result in 0..self.old[id].types.len() as u32 {
            self.set(Value { node: id, result }, Value { node: new, result });
        }
    }

    /// Name the outputs and hand over the new graph.
    pub(crate) fn finish(mut self) -> (Graph, Changed) {
        for out in &self.old.outputs {
            self.new.output(out.name.clone(), self.map[&out.value]);
        }
        self.new.prune();
        let same = self.new.nodes().len() == self.old.schedule().len().max(self.old.nodes().len());
        (self.new, if same { Changed::No } else { Changed::Yes })
    }
}
