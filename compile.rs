//! A model to an artifact: every stage in order. `ARCHITECTURE.md` walks one model through it.
use crate::{
    Artifact, Error, TuneLock, calibrate, gaps, import,
    options::{CompileOptions, Compiled, Emit, OptLevel, Planning, Progress, Source, Verify},
    precision::PrecisionReport,
    verify,
};
use pavage_codegen::{choices, compile as backend, emit, llvm, lower, targets::Target};
use pavage_frontend::onnx::Model;
use pavage_ir::{
    Graph, Heart, NodeKind, Region, Requirement,
    program::{Program, Step},
    text,
};
use pavage_passes::{
    self as passes, Ctx, build,
    eqsat::{
        self,
        cost::{self, Costs},
        extract::Search,
    },
};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    sync::Arc,
    time::Instant,
};

/// Compile `model` for every target of `options`, with every plan, into one artifact.
///
/// The artifact depends on the model's bytes and the options alone: not on paths, time or the number of threads.
pub fn compile(model: Source, options: &CompileOptions) -> Result<Compiled, Error> {
    let mut planned = plan(model, options, Members::Drop)?;
    let mut notes = std::mem::take(&mut planned.notes);
    let precision = std::mem::take(&mut planned.precision);
    if let Some(what) = options.emit {
        let emitted = emit_text(what, &planned.graph, &planned.targets, options)?;
        return Ok(Compiled { artifact: vec![], emitted, notes, planning: planned.planning, precision });
    }
    stage(options, "generating code", 2);
    let price = |target: &Target, region: &Region| cost::time(region, &costs(target, options));
    let request = planned.request(options, content_hash(model)?, &price);
    let artifact = code(&request)?;
    if options.verify == Verify::Replay {
        stage(options, "verifying", 3);
        for (target, programs) in request.targets {
            notes.extend(verify::replay(programs, &request.symbols, target, request.threads)?);
        }
    }
    stage(options, "done", 4);
    Ok(Compiled { artifact, emitted: String::new(), notes, planning: planned.planning, precision })
}

/// A graph compiled for the CPU at hand, quickly: to measure on.
pub(crate) fn for_this_machine(graph: &Graph, requirements: &[Requirement], threads: usize) -> Result<Artifact, Error> {
    let target = Target::parse("native").map_err(|e| Error::Request(e.to_string()))?;
    let ctx = Ctx { costs: predicted_costs(&target), ..Ctx::default() };
    let mut graph = graph.clone();
    passes::run(&mut graph, &ctx, passes::PIPELINE)?;
    let greedy = |g: &Graph| build::greedy(g, &ctx.costs);
    let program = build::program("fused", &graph, &greedy, &ctx)?;
    let planned = Planned {
        graph,
        requirements: requirements.to_vec(),
        targets: vec![(target, vec![program])],
        members: BTreeMap::new(),
        notes: vec![],
        planning: vec![],
        precision: PrecisionReport::default(),
    };
    let price = |target: &Target, region: &Region| cost::time(region, &predicted_costs(target));
    let options = CompileOptions { threads, ..CompileOptions::default() };
    let request = planned.request(&options, String::new(), &price);
    Ok(Artifact::from_bytes(&code(&request)?)?)
}

/// The artifact's bytes.
pub(crate) fn code(request: &emit::Request) -> Result<Vec<u8>, Error> {
    emit::artifact(request).map_err(|e| match e {
        emit::EmitError::Kernel { .. } | emit::EmitError::DType { .. } => Error::Unsupported(e.to_string()),
        // What the writer refuses, the code generator should not have asked for.
        emit::EmitError::Artifact(e) => Error::Internal { stage: "writing the artifact".into(), why: e.to_string() },
        emit::EmitError::Compile(e) => Error::Internal { stage: "code generation".into(), why: e.to_string() },
    })
}

/// What a target costs by its row of the table.
pub(crate) fn predicted_costs(target: &Target) -> Costs {
    match target {
        Target::Cpu(cpu) if cpu.lanes < 16 => cost::CPU_AVX2,
        Target::Cpu(_) => cost::CPU,
        Target::Gpu(gpu) if gpu.hopper => cost::GPU,
        Target::Gpu(_) => cost::SM_80,
    }
}

/// What a target costs: its row of the table, and what was measured on it.
pub(crate) fn costs(target: &Target, options: &CompileOptions) -> Costs {
    let lock = options.tune.as_ref().filter(|lock| lock.target() == target.name());
    Costs { measured: lock.and_then(TuneLock::measured), ..predicted_for(target, options) }
}

/// The same without what was measured.
pub(crate) fn predicted_for(target: &Target, options: &CompileOptions) -> Costs {
    let expected: BTreeMap<String, i64> = options.expected.iter().map(|e| (e.name.clone(), e.value)).collect();
    Costs { expected: (!expected.is_empty()).then(|| Arc::new(expected)), ..predicted_costs(target) }
}

/// Sizes that are expected to be something, but are not among those that `graph` leaves open, are the user's mistake.
fn check_expected(graph: &Graph, options: &CompileOptions) -> Result<(), Error> {
    let open: Vec<String> = graph.symbols().iter().map(|s| s.name.to_string()).collect();
    match options.expected.iter().find(|e| !open.contains(&e.name)) {
        Some(e) if open.is_empty() => Err(Error::Request(format!("--expect {e}: the model leaves no size open"))),
        Some(e) => Err(Error::Request(format!("--expect {e}: no open size is called `{}`; there are {}", e.name, open.join(", ")))),
        None => Ok(()),
    }
}

/// Schedules that were measured to be the best, by target.
fn tuned(options: &CompileOptions) -> BTreeMap<String, emit::Tuned> {
    options.tune.iter().map(|lock| (lock.target().to_string(), lock.schedules().clone())).collect()
}

/// Whether a lock says anything of these programs; how much, for people.
fn locked(lock: &TuneLock, targets: &[(Target, Vec<Program>)]) -> Result<Option<String>, Error> {
    let Some((_, programs)) = targets.iter().find(|(t, _)| t.name() == lock.target()) else { return Ok(None) };
    let all = choices::signatures(programs);
    let known = all.iter().filter(|s| lock.schedules().contains_key(*s)).count();
    if known == 0 && !lock.schedules().is_empty() {
        return Err(Error::Request("tune.lock is of another model, or of other sizes: it has none of the kernels".into()));
    }
    Ok(Some(format!("tune.lock decides the schedules of {known} of {} kernels", all.len())))
}

fn stage(options: &CompileOptions, text: &str, done: usize) {
    if let Some(p) = options.progress {
        p.stage(text, done, 4);
    }
}

/// Whether [`Planned::members`] is filled in.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Members {
    Keep,
    Drop,
}

/// A model up to its programs: all stages but code.
pub(crate) struct Planned {
    /// After the passes.
    pub(crate) graph: Graph,
    requirements: Vec<Requirement>,
    /// Targets, each with one program a plan.
    pub(crate) targets: Vec<(Target, Vec<Program>)>,
    /// The ops behind each region: see [`Ctx::members`].
    pub(crate) members: BTreeMap<Region, Graph>,
    notes: Vec<String>,
    planning: Vec<Planning>,
    precision: PrecisionReport,
}

/// Read a model, optimise it and plan it for every target of `options`.
pub(crate) fn plan(model: Source, options: &CompileOptions, members: Members) -> Result<Planned, Error> {
    let targets = options.targets.iter().map(|t| Target::parse(t).map_err(|e| Error::Request(e.to_string()))).collect::<Result<Vec<_>, _>>()?;
    if let Some(lock) = &options.tune {
        lock.fits(&targets)?;
    }
    stage(options, "reading the model", 0);
    let Model { mut graph, mut notes, requirements, .. } = import(model, &options.shapes)?;
    check_expected(&graph, options)?;
    let missing = build::missing(&graph);
    if !missing.is_empty() {
        return Err(Error::Unsupported(gaps::message(&gaps::no_kernel(&graph, &missing))));
    }
    let kept = || RefCell::new((members == Members::Keep).then(BTreeMap::new));
    let ctx = Ctx { dump_after: options.dump_after.clone(), members: kept(), ..Ctx::default() };
    ctx.dump("import", || text::print(&graph));
    stage(options, "optimising", 1);
    let mut precision = PrecisionReport::default();
    let context = |costs| Ctx { costs, dump_after: options.dump_after.clone(), members: kept(), ..Ctx::default() };
    let planned = plans(&mut graph, targets, options, &context, &requirements, &mut precision);
    dump(options.progress, &ctx);
    let Plans { targets, contexts, planning } = planned?;
    if let Some(lock) = &options.tune {
        notes.extend(locked(lock, &targets)?);
    }
    notes.extend(contexts.iter().flat_map(|ctx| ctx.notes.take()));
    let members = contexts.iter().filter_map(|ctx| ctx.members.take()).flatten().collect();
    Ok(Planned { graph, requirements, targets, members, notes, planning, precision })
}

impl Planned {
    /// What to put into the artifact.
    pub(crate) fn request<'a>(&'a self, options: &CompileOptions, input_hash: String, price: &'a dyn Fn(&Target, &Region) -> f64) -> emit::Request<'a> {
        let graph = &self.graph;
        let inputs = graph.inputs().iter().filter_map(|id| match &graph[*id].kind {
            NodeKind::Input(name) => Some(emit::Port { name: name.clone(), ty: graph.ty((*id).into()).clone() }),
            _ => None,
        });
        emit::Request {
            inputs: inputs.collect(),
            outputs: graph.outputs.iter().map(|o| emit::Port { name: o.name.clone(), ty: graph.ty(o.value).clone() }).collect(),
            symbols: graph.symbols(),
            requirements: self.requirements.clone(),
            targets: &self.targets,
            flags: options.flags(),
            input_hash,
            threads: if options.threads == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { options.threads },
            tuned: tuned(options),
            price,
        }
    }
}

/// Hash of what the artifact is made from, hex.
pub(crate) fn content_hash(model: Source) -> Result<String, Error> {
    let of = pavage_runtime::content_hash;
    Ok(match model {
        Source::Path(path) => of(&std::fs::read(path).map_err(|source| pavage_runtime::Error::Io { path: path.into(), source })?),
        Source::Onnx(bytes) => of(bytes),
        Source::Ir(text) => of(text.as_bytes()),
    })
}

/// Targets with their programs, and what there is to say of the planning.
struct Plans {
    targets: Vec<(Target, Vec<Program>)>,
    contexts: Vec<Ctx>,
    planning: Vec<Planning>,
}

/// Every plan of every target, by what the target costs; those of equal costs share theirs. `graph` becomes what the passes
/// made of it for the first.
fn plans(
    graph: &mut Graph,
    targets: Vec<Target>,
    options: &CompileOptions,
    ctx: &dyn Fn(Costs) -> Ctx,
    requirements: &[Requirement],
    precision: &mut PrecisionReport,
) -> Result<Plans, Error> {
    let pipeline = if options.opt_level == OptLevel::O0 { passes::CLEANING } else { passes::PIPELINE };
    let mut made: Vec<(Ctx, Vec<Program>)> = vec![];
    let mut first: Option<Graph> = None;
    let (mut all, mut planning) = (vec![], vec![]);
    for target in targets {
        let costs = costs(&target, options);
        let known = match made.iter().position(|(ctx, _)| ctx.costs == costs) {
            Some(known) => known,
            None => {
                let ctx = ctx(costs);
                let mut optimised = graph.clone();
                let around = calibrate::Around { requirements, threads: options.threads, device: if matches!(target, Target::Cpu(_)) { "cpu" } else { "gpu" } };
                let mut chosen = None;
                let mut report = PrecisionReport::default();
                let mut prepare = || -> Result<(), Error> {
                    passes::run(&mut optimised, &ctx, pipeline)?;
                    (report, chosen) = calibrate::apply(&mut optimised, &options.precision, &ctx, &around)?;
                    // Layers that are written in integers meet the passes that those of quantised models do.
                    if chosen.is_some() {
                        passes::run(&mut optimised, &ctx, pipeline)?;
                    }
                    Ok(())
                };
                let done = prepare();
                let mut search = |plan: &String| {
                    let start = Instant::now();
                    let program = program(plan, &optimised, chosen.as_ref(), options.opt_level, &ctx);
                    planning.push(Planning { plan: plan.clone(), target: target.to_string(), took: start.elapsed() });
                    program
                };
                let programs = done.and_then(|()| options.plans.iter().map(&mut search).collect());
                dump(options.progress, &ctx);
                let mut programs: Vec<Program> = programs?;
                programs.iter_mut().for_each(|p| remember(p, &report));
                precision.layers.extend(report.layers);
                precision.moved.extend(report.moved);
                precision.notes.extend(report.notes);
                made.push((ctx, programs));
                first.get_or_insert(optimised);
                made.len() - 1
            }
        };
        all.push((target, made[known].1.clone()));
    }
    if let Some(optimised) = first {
        *graph = optimised;
    }
    Ok(Plans { targets: all, contexts: made.into_iter().map(|(ctx, _)| ctx).collect(), planning })
}

/// Say of each kernel that is a layer in another precision what that gains and what it costs.
fn remember(program: &mut Program, report: &PrecisionReport) {
    for layer in report.layers.iter().filter(|l| l.gain_ns > 0.0) {
        for step in &mut program.body.steps {
            let Step::Run { region, origin, .. } = step else { continue };
            let product = matches!(region.heart, Heart::Contract { .. } | Heart::Conv { .. });
            if product && layer.layer.split(", ").all(|s| origin.sources.iter().any(|o| o == s)) {
                let error = layer.error.map_or("error not measured".into(), |e| format!("measured error {e:.1e}"));
                origin
                    .why
                    .chain
                    .push(format!("precision {}: predicted to save {:.0} ns of {:.0}, {error}", layer.precision, layer.gain_ns, layer.predicted_ns));
            }
        }
    }
}

/// One plan of `graph`. What the search chose where precision was part of it stands for searching again; nested graphs have none.
fn program(plan: &str, graph: &Graph, chosen: Option<&calibrate::Plan>, level: OptLevel, ctx: &Ctx) -> Result<Program, Error> {
    let chosen = Cell::new(chosen);
    let search = |g: &Graph| chosen.take().map_or_else(|| eqsat::optimise(g, ctx), |known| Ok(known.clone()));
    let greedy = |g: &Graph| build::greedy(g, &ctx.costs);
    // Other searches over the same kernels, to compare with.
    let other = |search| Ctx { search, costs: ctx.costs.clone(), ..Ctx::default() };
    let (narrow, dice) = (other(Search::Beam(32)), other(Search::Random(1000)));
    let (beam, random) = (|g: &Graph| eqsat::optimise(g, &narrow), |g: &Graph| eqsat::optimise(g, &dice));
    let planner: build::Planner = match plan {
        "unfused" => return Ok(build::unfused_program(plan, graph, ctx)?),
        "fused" if level == OptLevel::O0 => return Ok(build::unfused_program(plan, graph, ctx)?),
        "fused" if level == OptLevel::O1 => &greedy,
        "fused" => &search,
        "greedy" => &greedy,
        "beam" => &beam,
        "random" => &random,
        other => return Err(Error::Request(format!("no plan is named `{other}`; there are fused, greedy, beam, random and unfused"))),
    };
    Ok(build::program(plan, graph, planner, ctx)?)
}

fn dump(progress: Option<&dyn Progress>, ctx: &Ctx) {
    if let Some(p) = progress {
        ctx.dumps.borrow().iter().for_each(|(pass, text)| p.dump(pass, text));
    }
}

fn emit_text(what: Emit, graph: &Graph, targets: &[(Target, Vec<Program>)], options: &CompileOptions) -> Result<String, Error> {
    if what == Emit::Ir {
        let programs: Vec<String> = targets.iter().flat_map(|(t, programs)| programs.iter().map(move |p| format!("; {t}\n{p}"))).collect();
        return Ok(format!("{}\n{}", text::print(graph), programs.join("\n")));
    }
    let fail = |e: &dyn std::fmt::Display| Error::Internal { stage: "code generation".into(), why: e.to_string() };
    let mut out = String::new();
    let tuned = tuned(options);
    for (target, programs) in targets {
        let kernels = emit::Kernels::build(programs, target, tuned.get(target.name())).map_err(|e| Error::Unsupported(e.to_string()))?;
        let tiles = kernels.tiles();
        let mlir = match target {
            Target::Cpu(_) => backend::cpu_mlir(&tiles, target).map_err(|e| fail(&e))?,
            Target::Gpu(gpu) => lower::nvvm::module(&tiles, gpu).map_err(|e| fail(&e))?,
        };
        let piece = match what {
            Emit::Ir => String::new(),
            Emit::Mlir => mlir,
            Emit::Llvm => backend::llvm_ir(&mlir, target, llvm::MiddleEnd::None).map_err(|e| fail(&e))?,
            Emit::Asm | Emit::Ptx => {
                let bytes = backend::emit(&mlir, target, llvm::MiddleEnd::None, llvm::Emit::Assembly).map_err(|e| fail(&e))?;
                String::from_utf8_lossy(&bytes).into_owned()
            }
        };
        out += &format!("; target {target}\n{piece}\n");
    }
    Ok(out)
}
