//! Clusters to a program: an order for the kernels, a buffer for each value, steps for control flow.
use crate::{
    Ctx, PASSES, PassError,
    eqsat::cost::{self, Costs},
    form::{self, form},
    fuse::{self, Cluster, Order},
    memory, slices,
};
use pavage_ir::{
    DType, Dim, Expr, Graph, Heart, NodeId, NodeKind, Op, Region, Sym, TensorType, Value,
    attr::ReduceFn,
    program::{Body, BufId, BufferKind, Origin, Program, Step, Why},
    region::RegionOutput,
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

/// How a graph is put into kernels: the graph (perhaps rewritten) and its clusters.
pub type Planner<'a> = &'a dyn Fn(&Graph) -> Result<(Graph, Vec<Cluster>), PassError>;

/// One kernel an op.
pub fn unfused(graph: &Graph) -> Result<(Graph, Vec<Cluster>), PassError> {
    Ok((graph.clone(), fuse::unfused(graph)?))
}

/// The greedy fuser's kernels.
pub fn greedy(graph: &Graph, costs: &Costs) -> Result<(Graph, Vec<Cluster>), PassError> {
    Ok((graph.clone(), fuse::greedy(graph, costs)?))
}

/// Build the program `name` of `graph`: kernels by `planner`, in nested graphs likewise.
pub fn program(name: &str, graph: &Graph, planner: Planner, ctx: &Ctx) -> Result<Program, PassError> {
    let mut body = plan(graph, planner, Outer::Top, ctx)?;
    slices::write_in_place_of_copies(&mut body, &ctx.costs);
    Ok(finish(name, body, ctx))
}

/// Build the program `name` of `graph` with one kernel an op, copies of concatenations included: what other programs are
/// compared with.
pub fn unfused_program(name: &str, graph: &Graph, ctx: &Ctx) -> Result<Program, PassError> {
    let body = plan(graph, &unfused, Outer::Top, ctx)?;
    Ok(finish(name, body, ctx))
}

fn finish(name: &str, mut body: Body, ctx: &Ctx) -> Program {
    memory::in_place(&mut body);
    let program = Program { name: name.into(), body };
    ctx.dump(name, || program.to_string());
    program
}

fn plan(graph: &Graph, planner: Planner, outer: Outer, ctx: &Ctx) -> Result<Body, PassError> {
    let (graph, mut clusters) = planner(graph)?;
    fuse::explain(&graph, &mut clusters, &ctx.costs);
    Builder { graph: &graph, planner, body: Body::default(), bufs: BTreeMap::new(), outer, ctx }.body(clusters)
}

/// What the inputs of a graph are.
#[derive(Clone, Copy)]
enum Outer<'a> {
    /// Inputs of the model.
    Top,
    /// The first are inputs of a loop body, the rest are captured buffers of the body around.
    Loop { inputs: usize, captures: &'a [BufId] },
    /// All are captured.
    Branch { captures: &'a [BufId] },
}

struct Builder<'a> {
    graph: &'a Graph,
    planner: Planner<'a>,
    body: Body,
    bufs: BTreeMap<Value, BufId>,
    outer: Outer<'a>,
    ctx: &'a Ctx,
}

/// Something to do once what it reads exists.
enum Task {
    Kernel(Box<Cluster>),
    Alias { from: Value, to: Value },
    Node(NodeId),
}

impl<'a> Builder<'a> {
    fn body(mut self, clusters: Vec<Cluster>) -> Result<Body, PassError> {
        self.inputs();
        let mut pending = self.tasks(clusters)?;
        // Sizes that a task ahead defines.
        let mut waiting: BTreeSet<Arc<str>> = pending.iter().flat_map(|t| self.defines(t)).map(|s| s.name).collect();
        while !pending.is_empty() {
            let ready =
                pending.iter().position(|t| self.reads(t).iter().all(|v| self.available(*v)) && self.sizes(t).iter().all(|s| !waiting.contains(&s.name)));
            let Some(task) = ready.and_then(|i| pending.remove(i)) else {
                return Err(PassError::NoKernel { op: "program".into(), sources: vec![], reason: "kernels depend on each other in a circle".into() });
            };
            for sym in self.defines(&task) {
                waiting.remove(&sym.name);
            }
            self.run(task)?;
        }
        self.body.outputs = self.graph.outputs.iter().map(|o| o.value).collect::<Vec<_>>().into_iter().map(|v| self.buf(v)).collect();
        Ok(self.body)
    }

    fn inputs(&mut self) {
        for (i, &id) in self.graph.inputs().iter().enumerate() {
            let ty = self.graph.ty(id.into()).clone();
            let kind = match self.outer {
                Outer::Top => BufferKind::Input(i as u32),
                Outer::Loop { inputs, .. } if i < inputs => BufferKind::Input(i as u32),
                Outer::Loop { inputs, captures } => BufferKind::Captured(captures[i - inputs]),
                Outer::Branch { captures } => BufferKind::Captured(captures[i]),
            };
            let is_input = matches!(kind, BufferKind::Input(_));
            let buf = self.body.push(ty, kind);
            if is_input {
                self.body.inputs.push(buf);
            }
            self.bufs.insert(id.into(), buf);
        }
    }

    fn available(&self, v: Value) -> bool {
        self.bufs.contains_key(&v) || matches!(self.graph[v.node].kind, NodeKind::Const(_))
    }

    fn reads(&self, task: &Task) -> Vec<Value> {
        match task {
            Task::Kernel(c) => c.formed.args.clone(),
            Task::Alias { from, .. } => vec![*from],
            Task::Node(id) => self.graph.operands(*id),
        }
    }

    /// Sizes that a task defines.
    fn defines(&self, task: &Task) -> Vec<Sym> {
        let op = match task {
            Task::Kernel(c) => match &c.formed.region.heart {
                Heart::Op(op) => Some(op),
                _ => None,
            },
            Task::Alias { .. } => None,
            Task::Node(id) => self.graph.op(*id),
        };
        op.into_iter().flat_map(Op::defines).cloned().collect()
    }

    /// Sizes that a task needs, other than those it defines.
    fn sizes(&self, task: &Task) -> Vec<Sym> {
        let mut found = match task {
            Task::Kernel(c) => c.formed.region.symbols(),
            Task::Alias { from, to } => [from, to].iter().flat_map(|v| &self.graph.ty(**v).shape).flat_map(Dim::symbols).collect(),
            Task::Node(id) => {
                let own = self.graph[*id].types.iter().flat_map(|t| &t.shape).flat_map(Dim::symbols);
                own.chain(self.graph.bodies(*id).iter().flat_map(Graph::symbols)).collect()
            }
        };
        let own = self.defines(task);
        found.retain(|s| !own.contains(s));
        found
    }

    /// Everything to do, in schedule order as far as dependences allow.
    fn tasks(&self, clusters: Vec<Cluster>) -> Result<VecDeque<Task>, PassError> {
        let order = Order::new(self.graph);
        let mut made: BTreeSet<Value> = clusters.iter().flat_map(|c| c.formed.outputs.iter().copied()).collect();
        let mut wanted: VecDeque<Value> = clusters.iter().flat_map(|c| c.formed.args.iter().copied()).collect();
        wanted.extend(self.graph.outputs.iter().map(|o| o.value));
        let mut tasks: Vec<(usize, Task)> = vec![];
        for id in self.graph.schedule() {
            // A concatenation that kernels read through need not exist.
            if self.graph.op(id).is_some_and(|op| fuse::is_control(op) && !matches!(op, Op::Concat { .. })) {
                wanted.extend(self.graph.operands(id));
                made.extend((0..self.graph[id].types.len() as u32).map(|result| Value { node: id, result }));
                tasks.push((order.of(id), Task::Node(id)));
            }
        }
        for c in clusters {
            let at = c.members.iter().map(|m| order.of(*m)).max().unwrap_or(0);
            tasks.push((at, Task::Kernel(Box::new(c))));
        }
        // Views that somebody reads as a tensor: reshapes rename memory, others copy.
        while let Some(v) = wanted.pop_front() {
            if made.contains(&v) {
                continue;
            }
            match self.graph.op(v.node) {
                Some(Op::Reshape { .. }) => {
                    let from = self.graph.operands(v.node)[0];
                    made.insert(v);
                    wanted.push_back(from);
                    tasks.push((order.of(v.node), Task::Alias { from, to: v }));
                }
                Some(Op::Concat { .. }) => {
                    made.insert(v);
                    wanted.extend(self.graph.operands(v.node));
                    tasks.push((order.of(v.node), Task::Node(v.node)));
                }
                Some(_) => {
                    let cluster = fuse::single(self.graph, &order, v.node)?;
                    made.extend(cluster.formed.outputs.iter().copied());
                    wanted.extend(cluster.formed.args.iter().copied());
                    tasks.push((order.of(v.node), Task::Kernel(Box::new(cluster))));
                }
                None => {}
            }
        }
        tasks.sort_by_key(|(at, _)| *at);
        Ok(tasks.into_iter().map(|(_, t)| t).collect())
    }

    /// The buffer of a value that exists.
    fn buf(&mut self, v: Value) -> BufId {
        if let Some(&b) = self.bufs.get(&v) {
            return b;
        }
        let kind = match self.graph.as_const(v) {
            Some(t) => BufferKind::Const(t.clone()),
            None => BufferKind::Temp,
        };
        let b = self.body.push(self.graph.ty(v).clone(), kind);
        self.bufs.insert(v, b);
        b
    }

    /// A buffer for a value about to be written: in place of the output it is, if it is one.
    fn fresh(&mut self, v: Value) -> BufId {
        let n = self.graph.outputs.iter().position(|o| o.value == v);
        let kind = n.map_or(BufferKind::Temp, |n| BufferKind::Output(n as u32));
        let b = self.body.push(self.graph.ty(v).clone(), kind);
        self.bufs.insert(v, b);
        b
    }

    fn origin(&self, members: &[NodeId], rules: &[String]) -> Origin {
        // Views of constants are shared by whoever reads such a constant: their names would say little.
        let own: Vec<NodeId> = members.iter().copied().filter(|m| !self.shows_constant(*m)).collect();
        let named = if own.is_empty() { members } else { &own };
        let mut sources: Vec<String> = named.iter().flat_map(|m| self.graph[*m].source.iter().cloned()).collect();
        sources.sort();
        sources.dedup();
        let members = members.iter().filter_map(|m| self.graph.op(*m)).map(|op| op.mnemonic().to_string()).collect();
        Origin { sources, members, rules: rules.to_vec(), why: Why::default() }
    }

    fn shows_constant(&self, mut id: NodeId) -> bool {
        while self.graph.op(id).is_some_and(form::is_view) {
            id = self.graph.operands(id)[0].node;
        }
        matches!(self.graph[id].kind, NodeKind::Const(_))
    }

    /// The passes that changed what stands for these nodes of the model, as `pass: nodes`.
    fn passes(&self, sources: &[String]) -> Vec<String> {
        let changed_by = self.ctx.changed_by.borrow();
        let by = |pass: &str| sources.iter().filter(|s| changed_by.get(*s).is_some_and(|names| names.contains(&pass))).cloned().collect::<Vec<_>>();
        let found = PASSES.iter().map(|p| (p.name, by(p.name))).filter(|(_, nodes)| !nodes.is_empty());
        found.map(|(pass, nodes)| format!("{pass}: {}", nodes.join(", "))).collect()
    }

    fn keep_members(&self, c: &Cluster) {
        if let Some(kept) = self.ctx.members.borrow_mut().as_mut() {
            let region = Region { name: String::new(), ..c.formed.region.clone() };
            if !kept.contains_key(&region)
                && let Some(graph) = fuse::member_graph(self.graph, c)
            {
                kept.insert(region, graph);
            }
        }
    }

    fn run(&mut self, task: Task) -> Result<(), PassError> {
        match task {
            Task::Alias { from, to } => {
                let of = self.buf(from);
                let b = self.body.push(self.graph.ty(to).clone(), BufferKind::View(of));
                self.bufs.insert(to, b);
            }
            Task::Kernel(c) => {
                if let Heart::Op(Op::NonZero { sym }) = &c.formed.region.heart {
                    self.count(&c, sym)?;
                }
                let args = c.formed.args.iter().map(|v| self.buf(*v)).collect();
                let outputs = c.formed.outputs.iter().map(|v| self.fresh(*v)).collect();
                let mut origin = self.origin(&c.members, &c.rules);
                self.keep_members(&c);
                origin.why = Why { price: cost::price(&c.formed.region, &self.ctx.costs), passes: self.passes(&origin.sources), ..c.why };
                self.body.steps.push(Step::Run { region: c.formed.region, args, outputs, origin });
            }
            Task::Node(id) => self.node(id)?,
        }
        Ok(())
    }

    /// Steps that define how many elements of the operand of a `nonzero` are not zero: its result has as many columns.
    fn count(&mut self, c: &Cluster, sym: &Sym) -> Result<(), PassError> {
        let x = c.formed.args[0];
        let region = count_nonzero(self.graph.ty(x))?;
        let found = self.body.push(region.outputs[0].ty.clone(), BufferKind::Temp);
        let (args, origin) = (vec![self.buf(x)], self.origin(&c.members, &[]));
        self.body.steps.push(Step::Run { region, args, outputs: vec![found], origin });
        self.body.steps.push(Step::Bind { buffer: found, sym: sym.clone() });
        Ok(())
    }

    fn node(&mut self, id: NodeId) -> Result<(), PassError> {
        let operands = self.graph.operands(id);
        let bufs: Vec<BufId> = operands.iter().map(|v| self.buf(*v)).collect();
        let results: Vec<Value> = (0..self.graph[id].types.len() as u32).map(|result| Value { node: id, result }).collect();
        match self.graph.op(id) {
            Some(Op::BindSize { sym }) => {
                self.body.steps.push(Step::Bind { buffer: bufs[0], sym: sym.clone() });
                let b = self.body.push(self.graph.ty(results[0]).clone(), BufferKind::View(bufs[0]));
                self.bufs.insert(results[0], b);
            }
            Some(Op::Concat { axis }) => self.concat(id, *axis, &operands)?,
            Some(Op::If { .. }) => {
                let bodies = self.graph.bodies(id);
                let branch = |g: &Graph| plan(g, self.planner, Outer::Branch { captures: &bufs[1..] }, self.ctx);
                let (then_body, else_body) = (Box::new(branch(&bodies[0])?), Box::new(branch(&bodies[1])?));
                let outputs = results.iter().map(|v| self.fresh(*v)).collect();
                self.body.steps.push(Step::If { cond: bufs[0], then_body, else_body, outputs });
            }
            Some(Op::Loop { carried, .. }) => {
                let (values, captures) = bufs[2..].split_at(*carried);
                let graph = &self.graph.bodies(id)[0];
                let body = plan(graph, self.planner, Outer::Loop { inputs: 2 + carried, captures }, self.ctx)?;
                let carried = values.to_vec();
                let outputs = results.iter().map(|v| self.fresh(*v)).collect();
                self.body.steps.push(Step::Loop { trip: bufs[0], cond: bufs[1], body: Box::new(body), carried, outputs });
            }
            Some(op) => {
                return Err(PassError::NoKernel {
                    op: op.mnemonic().into(),
                    sources: self.graph[id].source.clone(),
                    reason: "no kernel family computes it yet".into(),
                });
            }
            None => {}
        }
        Ok(())
    }

    /// A concatenation is one copy an operand, each into its slice of the result.
    fn concat(&mut self, id: NodeId, axis: usize, operands: &[Value]) -> Result<(), PassError> {
        let out = self.fresh(id.into());
        let ty = self.graph.ty(id.into()).clone();
        let mut start = Dim::ZERO;
        for v in operands {
            let from = self.graph.ty(*v).clone();
            let region = slice_copy(&from, &ty, axis, &start);
            start = start + from.shape[axis].clone();
            let args = vec![self.buf(*v)];
            let origin = self.origin(&[id], &[]);
            self.body.steps.push(Step::Run { region, args, outputs: vec![out], origin });
        }
        Ok(())
    }
}

/// The number of elements that are not zero, as one i64.
fn count_nonzero(ty: &TensorType) -> Result<Region, PassError> {
    let ill = |source| PassError::IllTyped { pass: "build", source };
    let mut graph = Graph::new("count");
    let x = graph.input("x", ty.clone());
    let is = graph.add(Op::Cast { to: DType::Bool }, &[x]).map_err(ill)?;
    let one = graph.add(Op::Cast { to: DType::I64 }, &[is]).map_err(ill)?;
    let sum = graph.add(Op::Reduce { f: ReduceFn::Sum, axes: (0..ty.rank()).collect() }, &[one]).map_err(ill)?;
    let formed = form(&graph, &[is.node, one.node, sum.node], &[sum]);
    formed.map(|f| f.region).map_err(|e| PassError::NoKernel { op: "nonzero".into(), sources: vec![], reason: e.to_string() })
}

/// Copy a tensor into a larger one from `start` along `axis`.
fn slice_copy(from: &TensorType, to: &TensorType, axis: usize, start: &Dim) -> Region {
    let mut region = Region::new("concat", from.shape.clone());
    region.args.push(from.clone());
    let index: Vec<Dim> = (0..from.rank()).map(Dim::axis).collect();
    let expr = region.push(Expr::Load { arg: 0, index: index.clone(), guard: None }, from.dtype);
    let mut place = index;
    place[axis] = place[axis].clone() + start.clone();
    region.outputs.push(RegionOutput { ty: to.clone(), expr, index: place });
    region
}

/// Nodes of `graph` that no kernel can compute, with reasons: what `check` reports.
pub fn missing(graph: &Graph) -> Vec<(NodeId, String)> {
    let mut found = vec![];
    for id in graph.schedule() {
        let Some(op) = graph.op(id) else { continue };
        if graph[id].types.iter().any(|t| t.dtype == DType::Str) {
            found.push((id, "strings live on the host only".to_string()));
        }
        let outputs: Vec<Value> = (0..graph[id].types.len() as u32).map(|result| Value { node: id, result }).collect();
        if !fuse::is_control(op)
            && let Err(e) = form(graph, &[id], &outputs)
        {
            found.push((id, e.to_string()));
        }
        found.extend(graph.bodies(id).iter().flat_map(missing).map(|(_, why)| (id, why)));
    }
    found
}
