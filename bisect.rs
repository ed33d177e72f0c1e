//! Which kernel of a compiled plan goes wrong: each launch against the reference evaluator, then the first one that is
//! off swapped for its unfused twin to see whether that heals the outputs.
use crate::{
    Artifact, Device, Error, Options, Session, ShapeArg, Source, Tensor,
    compile::{Members, Planned, compile, content_hash, plan},
    import,
    options::CompileOptions,
    verify,
};
use pavage_codegen::{emit, targets::Target, wire};
use pavage_ir::{
    self as ir, Binding, Graph, NodeKind, Region, Value,
    program::{Body, Origin, Program, Step},
    region_eval::eval_region,
};
use pavage_passes::{Ctx, build};
use pavage_runtime::{Observed, Outputs, Then, plan as wired};
use std::collections::{BTreeMap, BTreeSet};

/// What the reference evaluator says a model gives for these inputs, by name.
pub fn reference(model: Source, shapes: &[ShapeArg], inputs: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>, Error> {
    let graph = import(model, shapes)?.graph;
    let input = |id: &ir::NodeId| -> Result<ir::Tensor, Error> {
        let NodeKind::Input(name) = &graph[*id].kind else { return Err(internal("an input is none")) };
        let given = inputs.iter().find(|(n, _)| n == name);
        ir_tensor(&given.ok_or_else(|| pavage_runtime::Error::MissingInput(name.clone()))?.1)
    };
    let inputs = graph.inputs().iter().map(input).collect::<Result<Vec<_>, _>>()?;
    let results = ir::eval(&graph, &inputs).map_err(|e| Error::Request(e.to_string()))?;
    graph.outputs.iter().zip(results).map(|(o, t)| Ok((o.name.clone(), verify::host(&t)?))).collect()
}

/// A plan of an artifact whose outputs are not as expected, and what made them.
#[derive(Clone, Copy)]
pub struct Suspect<'a> {
    /// The model that the artifact was compiled from.
    pub model: Source<'a>,
    /// The artifact.
    pub artifact: &'a Artifact,
    /// Where it runs.
    pub device: Device,
    /// Which plan, and how it runs.
    pub options: &'a Options,
    /// Inputs, by name.
    pub inputs: &'a [(String, Tensor)],
    /// Whether outputs are as expected.
    pub accepts: &'a dyn Fn(&Outputs) -> bool,
}

/// What [`bisect`] found.
#[derive(Clone, Debug)]
pub enum Finding {
    /// A kernel does not compute what its region says.
    Kernel(Box<Culprit>),
    /// Every kernel computes what its region says, and outputs are off all the same: passes, rules or the forming of
    /// regions changed what the model means.
    Plan,
    /// Every kernel is within its tolerance, and with the evaluator's results in place of each the outputs are as
    /// expected: many small differences add up.
    Rounding,
}

/// The first kernel of a run that does not compute what its region says.
#[derive(Clone, Debug)]
pub struct Culprit {
    /// Its name.
    pub kernel: String,
    /// Which launch of the plan it is, counted as the plan names them.
    pub place: usize,
    /// The model's nodes that it does the work of.
    pub sources: Vec<String>,
    /// Its member ops.
    pub members: Vec<String>,
    /// The rules and the schedule that made it.
    pub rules: Vec<String>,
    /// What is wrong with its results.
    pub difference: String,
    /// Whose results took the place of its own to prove that it is to blame.
    pub twin: Twin,
    /// Whether the outputs were as expected then.
    pub healed: bool,
    /// Names of later kernels that are off too, given right operands.
    pub others: Vec<String>,
    /// The kernel's ops as a model of their own; none for a copy, which no op stands behind.
    pub reproducer: Option<Reproducer>,
}

/// What runs in the place of a suspected kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Twin {
    /// The same ops compiled to one kernel an op.
    Unfused,
    /// The reference evaluator: the ops one by one are off too, or there is but one.
    Evaluator,
}

/// The ops of one kernel as a model, with what it was given.
#[derive(Clone, Debug)]
pub struct Reproducer {
    /// The graph as IR text, constants included.
    pub graph: String,
    /// Inputs at the launch, by name.
    pub inputs: Vec<(String, Tensor)>,
    /// What the reference evaluator says of them, by name.
    pub outputs: Vec<(String, Tensor)>,
    /// What is wrong when the graph is compiled anew and run; none if nothing is, so that the artifact is damaged or
    /// was made by another version.
    pub anew: Option<String>,
}

/// A launch of the plan: what it computes.
pub(crate) struct Site<'a> {
    pub(crate) region: &'a Region,
    origin: &'a Origin,
    pub(crate) kernel: &'a wired::Kernel,
    /// The model's constants among the arguments, as the model has them.
    pub(crate) constants: Vec<Option<ir::Tensor>>,
}

/// A launch whose results are off: what it read, what the evaluator says, what is wrong.
struct Off {
    place: usize,
    seen: Observed,
    want: Vec<ir::Tensor>,
    why: String,
}

/// Runs the suspect with the evaluator's results in place of each kernel's, so that every kernel gets right operands,
/// and finds those that are off.
pub fn bisect(suspect: &Suspect) -> Result<Finding, Error> {
    let manifest = suspect.artifact.manifest();
    if manifest.input_hash != content_hash(suspect.model)? {
        return Err(Error::Request("the artifact was compiled from another model".into()));
    }
    let mut session = suspect.artifact.session(suspect.device, suspect.options.clone())?;
    let wired = session.plan().clone();
    let options = CompileOptions { targets: vec![wired.target.clone()], plans: vec![wired.name.clone()], ..CompileOptions::from_flags(&manifest.flags)? };
    let planned = plan(suspect.model, &options, Members::Keep)?;
    let (target, programs) = planned.targets.first().ok_or_else(|| internal("no target"))?;
    let mut sites = Vec::new();
    pair(&programs[0].body, &wired.body, &wired.kernels, &[], &mut sites)?;

    let mut found: Vec<Off> = Vec::new();
    let mut failed = None;
    let mut places = BTreeSet::new();
    let healthy = observe(&mut session, suspect, &mut |o| {
        let judged = judge(&sites, o, &manifest.symbols);
        match judged {
            Err(e) => failed = failed.take().or(Some(e)),
            Ok((want, why)) => {
                if let Some(why) = why.filter(|_| places.insert(o.place)) {
                    found.push(Off { place: o.place, seen: o.clone(), want: want.clone(), why });
                }
                match put(o, &want) {
                    Ok(()) => return Then::WriteBack,
                    Err(e) => failed = failed.take().or(Some(e)),
                }
            }
        }
        Then::GoOn
    })?;
    if let Some(e) = failed {
        return Err(e);
    }
    let Some(first) = found.first() else {
        return Ok(if healthy { Finding::Rounding } else { Finding::Plan });
    };
    let trial = Trial { suspect, planned: &planned, target, sites: &sites };
    trial.blame(first, &found[1..], &mut session).map(|c| Finding::Kernel(Box::new(c)))
}

/// One run with every launch shown; whether the outputs were accepted.
fn observe(session: &mut Session, suspect: &Suspect, show: &mut dyn FnMut(&mut Observed) -> Then) -> Result<bool, Error> {
    let feeds: Vec<(&str, &Tensor)> = suspect.inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut outputs = session.new_outputs()?;
    session.run_observed(&feeds, &mut outputs, show)?;
    Ok((suspect.accepts)(&outputs))
}

/// The launches of a program next to those of the plan that was written from it.
pub(crate) fn pair<'a>(body: &'a Body, wired: &wired::Body, kernels: &'a [wired::Kernel], outer: &[&'a Body], into: &mut Vec<Site<'a>>) -> Result<(), Error> {
    let stranger = || Error::Request("the artifact holds another plan than this version makes of the model: compile it again".into());
    let bodies: Vec<&Body> = outer.iter().copied().chain([body]).collect();
    if body.steps.len() != wired.steps.len() {
        return Err(stranger());
    }
    for (step, wire) in body.steps.iter().zip(&wired.steps) {
        match (step, wire) {
            (Step::Run { region, args, outputs, origin }, wired::Step::Launch { kernel, args: ids, .. }) => {
                let kernel = kernels.get(kernel.index()).filter(|k| k.name == region.name && ids.len() == args.len() + outputs.len());
                let kernel = kernel.ok_or_else(stranger)?;
                let constants = args.iter().map(|b| verify::constant(&bodies, *b)).collect();
                into.push(Site { region, origin, kernel, constants });
            }
            (Step::If { then_body, else_body, .. }, wired::Step::If { then_body: t, else_body: e, .. }) => {
                pair(then_body, t, kernels, &bodies, into)?;
                pair(else_body, e, kernels, &bodies, into)?;
            }
            (Step::Loop { body, .. }, wired::Step::Loop { body: b, .. }) => pair(body, b, kernels, &bodies, into)?,
            (Step::Copy { .. }, wired::Step::Copy { .. }) | (Step::Bind { .. }, wired::Step::Bind { .. }) => {}
            _ => return Err(stranger()),
        }
    }
    Ok(())
}

/// What the evaluator says of a launch's operands, and what is wrong with its results.
fn judge(sites: &[Site], o: &Observed, symbols: &[wired::Symbol]) -> Result<(Vec<ir::Tensor>, Option<String>), Error> {
    let site = sites.get(o.place).ok_or_else(|| internal("a launch that the plan does not name"))?;
    let n = site.region.args.len();
    let args = operands(site, o)?;
    let begun = o.before[n..].iter().map(ir_tensor).collect::<Result<Vec<_>, _>>()?;
    let want = eval_region(site.region, &args, &binding(o, symbols), Some(&begun)).map_err(internal)?;
    let off = |(got, want): (&Tensor, &ir::Tensor)| verify::difference(got.bytes(), want);
    let why = o.after[n..].iter().zip(&want).find_map(off);
    Ok((want, why))
}

/// What a launch reads: the model's own constants, not what the artifact holds of them.
fn operands(site: &Site, o: &Observed) -> Result<Vec<ir::Tensor>, Error> {
    let given = |(t, constant): (&Tensor, &Option<ir::Tensor>)| constant.clone().map_or_else(|| ir_tensor(t), Ok);
    o.before.iter().zip(&site.constants).map(given).collect()
}

/// Puts tensors where the results of a launch are.
fn put(o: &mut Observed, results: &[ir::Tensor]) -> Result<(), Error> {
    let first = o.after.len().saturating_sub(results.len());
    for (to, from) in o.after[first..].iter_mut().zip(results) {
        *to = verify::host(from)?;
    }
    Ok(())
}

fn binding(o: &Observed, symbols: &[wired::Symbol]) -> Binding {
    Binding(symbols.iter().zip(&o.sizes).map(|(s, n)| (s.name.as_str().into(), *n)).collect())
}

/// What a proof needs.
struct Trial<'a> {
    suspect: &'a Suspect<'a>,
    planned: &'a Planned,
    target: &'a Target,
    sites: &'a [Site<'a>],
}

impl Trial<'_> {
    fn blame(&self, first: &Off, rest: &[Off], session: &mut Session) -> Result<Culprit, Error> {
        let site = &self.sites[first.place];
        let symbols = &self.suspect.artifact.manifest().symbols;
        let key = Region { name: String::new(), ..site.region.clone() };
        let members = self.planned.members.get(&key);
        let graph = members.and_then(|g| concrete(g, &binding(&first.seen, symbols), &site.constants).ok());
        // The ops one by one: right on what the launch read, and so in its place?
        let mut twin = None;
        if let Some(graph) = &graph {
            let mut candidate = self.compile_unfused(graph)?;
            let results = run_twin(&mut candidate, graph, &first.seen)?;
            if results.iter().zip(&first.want).all(|(got, want)| verify::difference(got.bytes(), want).is_none()) {
                twin = Some(candidate);
            }
        }
        let which = if twin.is_some() { Twin::Unfused } else { Twin::Evaluator };
        let mut failed = None;
        let healed = observe(session, self.suspect, &mut |o| {
            if o.place != first.place {
                return Then::GoOn;
            }
            let swapped = match (&mut twin, &graph) {
                (Some(twin), Some(graph)) => run_twin(twin, graph, o).map(|results| {
                    let n = o.after.len() - results.len();
                    o.after.splice(n.., results);
                }),
                _ => judge(self.sites, o, symbols).and_then(|(want, _)| put(o, &want)),
            };
            match swapped {
                Ok(()) => return Then::WriteBack,
                Err(e) => failed = failed.take().or(Some(e)),
            }
            Then::GoOn
        })?;
        if let Some(e) = failed {
            return Err(e);
        }
        Ok(Culprit {
            kernel: site.region.name.clone(),
            place: first.place,
            sources: site.origin.sources.clone(),
            members: site.origin.members.clone(),
            rules: site.kernel.provenance.rules.clone(),
            difference: first.why.clone(),
            twin: which,
            healed,
            others: rest.iter().map(|o| self.sites[o.place].region.name.clone()).collect(),
            reproducer: graph.map(|g| self.reproduce(&g, first)).transpose()?,
        })
    }

    /// The graph as a program of one kernel an op, loaded where the suspect runs.
    fn compile_unfused(&self, graph: &Graph) -> Result<Session, Error> {
        let program: Program = build::unfused_program("unfused", graph, &Ctx::default())?;
        let targets = [(self.target.clone(), vec![program])];
        let port = |name: &str, v: Value| emit::Port { name: name.into(), ty: graph.ty(v).clone() };
        let request = emit::Request {
            inputs: input_names(graph).into_iter().map(|(name, id)| port(name, id.into())).collect(),
            outputs: graph.outputs.iter().map(|o| port(&o.name, o.value)).collect(),
            symbols: graph.symbols(),
            requirements: Vec::new(),
            targets: &targets,
            flags: Vec::new(),
            input_hash: String::new(),
            threads: 0,
            tuned: BTreeMap::new(),
            price: &|_, _| 0.0,
        };
        let bytes = emit::artifact(&request).map_err(|e| internal(e.to_string()))?;
        let options = Options { plan: "unfused".into(), ..self.suspect.options.clone() };
        Ok(Artifact::from_bytes(&bytes)?.session(self.suspect.device, options)?)
    }

    /// The culprit's ops as a model, and what becomes of it when it is compiled anew.
    fn reproduce(&self, graph: &Graph, off: &Off) -> Result<Reproducer, Error> {
        let text = ir::text::print_full(graph);
        let inputs = named_inputs(graph, &off.seen);
        let options = CompileOptions { targets: vec![self.target.name().into()], plans: vec!["fused".into()], ..CompileOptions::default() };
        let artifact = compile(Source::Ir(&text), &options)?.open()?;
        let run = Options { plan: "fused".into(), ..self.suspect.options.clone() };
        let feeds: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let got = artifact.session(self.suspect.device, run)?.run(&feeds)?;
        let anew = got.iter().zip(&off.want).find_map(|((_, got), want)| verify::difference(got.bytes(), want));
        let outputs = graph.outputs.iter().zip(&off.want).map(|(o, t)| Ok((o.name.clone(), verify::host(t)?)));
        Ok(Reproducer { graph: text, inputs, outputs: outputs.collect::<Result<_, Error>>()?, anew })
    }
}

/// Runs the twin on what a launch read.
fn run_twin(session: &mut Session, graph: &Graph, o: &Observed) -> Result<Vec<Tensor>, Error> {
    let inputs = named_inputs(graph, o);
    let feeds: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let outputs = session.run(&feeds)?;
    Ok(outputs.iter().map(|(_, t)| t.clone()).collect())
}

/// Inputs of a member graph: `a3` is what the launch read as its fourth argument.
fn named_inputs(graph: &Graph, o: &Observed) -> Vec<(String, Tensor)> {
    let operand = |name: &str| o.before.get(name.strip_prefix('a')?.parse::<usize>().ok()?).cloned();
    input_names(graph).into_iter().filter_map(|(name, _)| Some((name.to_string(), operand(name)?))).collect()
}

fn input_names(graph: &Graph) -> Vec<(&str, ir::NodeId)> {
    let name = |id: &ir::NodeId| match &graph[*id].kind {
        NodeKind::Input(name) => Some((name.as_str(), *id)),
        _ => None,
    };
    graph.inputs().iter().filter_map(name).collect()
}

/// A member graph at the sizes of one launch, its constant arguments in place.
fn concrete(graph: &Graph, sizes: &Binding, constants: &[Option<ir::Tensor>]) -> Result<Graph, ir::OpError> {
    let mut new = Graph::new(graph.name.clone());
    let mut values: BTreeMap<Value, Value> = BTreeMap::new();
    for ((name, id), constant) in input_names(graph).into_iter().zip(constants) {
        let v = match constant {
            Some(t) => new.constant(t.clone()),
            None => new.input(name, graph.ty(id.into()).bind(sizes)),
        };
        values.insert(id.into(), v);
    }
    for id in graph.schedule() {
        let node = match &graph[id].kind {
            NodeKind::Input(_) => continue,
            NodeKind::Const(t) => new.constant(t.clone()).node,
            NodeKind::Op(op, _) => {
                let operands: Vec<Value> = graph.operands(id).iter().map(|v| values[v]).collect();
                new.add_with(op.bind(sizes), &operands, vec![])?
            }
        };
        new.set_source(node, graph[id].source.clone());
        for result in 0..graph[id].types.len() as u32 {
            values.insert(Value { node: id, result }, Value { node, result });
        }
    }
    for out in &graph.outputs {
        new.output(out.name.clone(), values[&out.value]);
    }
    Ok(new)
}

fn ir_tensor(tensor: &Tensor) -> Result<ir::Tensor, Error> {
    ir::Tensor::new(wire::ir_dtype(tensor.dtype()), tensor.shape().to_vec(), tensor.bytes().to_vec()).map_err(|e| internal(e.to_string()))
}

fn internal(why: impl Into<String>) -> Error {
    Error::Internal { stage: "the comparison".into(), why: why.into() }
}
