//! A model to an artifact: every stage in order. `ARCHITECTURE.md` walks one model through it.
use crate::{
    Error, gaps, import,
    options::{CompileOptions, Compiled, Emit, OptLevel, Planning, Progress, Source, Verify},
    verify,
};
use pavage_codegen::{compile as code, emit, llvm, lower, targets::Target};
use pavage_frontend::onnx::Model;
use pavage_ir::{Graph, NodeKind, Region, Requirement, program::Program, text};
use pavage_passes::{
    self as passes, Ctx, build,
    eqsat::{self, cost, extract::Search},
};
use std::{cell::RefCell, collections::BTreeMap, time::Instant};

/// Compile `model` for every target of `options`, with every plan, into one artifact.
///
/// The artifact depends on the model's bytes and the options alone: not on paths, time or the number of threads.
pub fn compile(model: Source, options: &CompileOptions) -> Result<Compiled, Error> {
    let mut planned = plan(model, options, Members::Drop)?;
    let mut notes = std::mem::take(&mut planned.notes);
    if let Some(what) = options.emit {
        let emitted = emit_text(what, &planned.graph, &planned.targets)?;
        return Ok(Compiled { artifact: vec![], emitted, notes, planning: planned.planning });
    }
    stage(options, "generating code", 2);
    let request = planned.request(options, content_hash(model)?);
    let artifact = emit::artifact(&request).map_err(|e| match e {
        emit::EmitError::Kernel { .. } | emit::EmitError::DType { .. } => Error::Unsupported(e.to_string()),
        // What the writer refuses, the code generator should not have asked for.
        emit::EmitError::Artifact(e) => Error::Internal { stage: "writing the artifact".into(), why: e.to_string() },
        emit::EmitError::Compile(e) => Error::Internal { stage: "code generation".into(), why: e.to_string() },
    })?;
    if options.verify == Verify::Replay {
        stage(options, "verifying", 3);
        for (target, programs) in request.targets {
            notes.extend(verify::replay(programs, &request.symbols, target, request.threads)?);
        }
    }
    stage(options, "done", 4);
    Ok(Compiled { artifact, emitted: String::new(), notes, planning: planned.planning })
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
}

/// Read a model, optimise it and plan it for every target of `options`.
pub(crate) fn plan(model: Source, options: &CompileOptions, members: Members) -> Result<Planned, Error> {
    let targets = options.targets.iter().map(|t| Target::parse(t).map_err(|e| Error::Request(e.to_string()))).collect::<Result<Vec<_>, _>>()?;
    stage(options, "reading the model", 0);
    let Model { mut graph, mut notes, requirements, .. } = import(model, &options.shapes)?;
    let missing = build::missing(&graph);
    if !missing.is_empty() {
        return Err(Error::Unsupported(gaps::message(&gaps::no_kernel(&graph, &missing))));
    }
    let kept = || RefCell::new((members == Members::Keep).then(BTreeMap::new));
    let ctx = Ctx { dump_after: options.dump_after.clone(), members: kept(), ..Ctx::default() };
    ctx.dump("import", || text::print(&graph));
    stage(options, "optimising", 1);
    // Graphs and plans are chosen by what a device costs: one set for CPUs, one for GPUs.
    let cpu = Ctx { costs: cost::CPU, ..ctx };
    let gpu = Ctx { costs: cost::GPU, dump_after: options.dump_after.clone(), members: kept(), ..Ctx::default() };
    let planned = plans(&mut graph, targets, options, &cpu, &gpu);
    dump(options.progress, &cpu);
    dump(options.progress, &gpu);
    let (targets, planning) = planned?;
    notes.extend(cpu.notes.take().into_iter().chain(gpu.notes.take()));
    let members = [cpu.members.take(), gpu.members.take()].into_iter().flatten().flatten().collect();
    Ok(Planned { graph, requirements, targets, members, notes, planning })
}

impl Planned {
    /// What to put into the artifact.
    pub(crate) fn request(&self, options: &CompileOptions, input_hash: String) -> emit::Request<'_> {
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
            tuned: BTreeMap::new(),
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

/// Targets, each with its programs, and what the search for these took.
type Plans = (Vec<(Target, Vec<Program>)>, Vec<Planning>);

/// Every plan of every target; targets of one kind share theirs. `graph` becomes what the passes made of it for the first.
fn plans(graph: &mut Graph, targets: Vec<Target>, options: &CompileOptions, cpu: &Ctx, gpu: &Ctx) -> Result<Plans, Error> {
    let pipeline = if options.opt_level == OptLevel::O0 { passes::CLEANING } else { passes::PIPELINE };
    let mut made: [Option<Vec<Program>>; 2] = [None, None];
    let mut first: Option<Graph> = None;
    let (mut all, mut planning) = (vec![], vec![]);
    for target in targets {
        let (kind, ctx) = if matches!(target, Target::Cpu(_)) { (0, cpu) } else { (1, gpu) };
        if made[kind].is_none() {
            let mut optimised = graph.clone();
            passes::run(&mut optimised, ctx, pipeline)?;
            let mut programs = vec![];
            for plan in &options.plans {
                let start = Instant::now();
                programs.push(program(plan, &optimised, options.opt_level, ctx)?);
                planning.push(Planning { plan: plan.clone(), target: target.to_string(), took: start.elapsed() });
            }
            made[kind] = Some(programs);
            first.get_or_insert(optimised);
        }
        all.push((target, made[kind].clone().unwrap_or_default()));
    }
    if let Some(optimised) = first {
        *graph = optimised;
    }
    Ok((all, planning))
}

fn program(plan: &str, graph: &Graph, level: OptLevel, ctx: &Ctx) -> Result<Program, Error> {
    let search = |g: &Graph| eqsat::optimise(g, ctx);
    let greedy = |g: &Graph| build::greedy(g, &ctx.costs);
    // Other searches over the same kernels, to compare with.
    let other = |search| Ctx { search, costs: ctx.costs, ..Ctx::default() };
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

fn emit_text(what: Emit, graph: &Graph, targets: &[(Target, Vec<Program>)]) -> Result<String, Error> {
    if what == Emit::Ir {
        let programs: Vec<String> = targets.iter().flat_map(|(t, programs)| programs.iter().map(move |p| format!("; {t}\n{p}"))).collect();
        return Ok(format!("{}\n{}", text::print(graph), programs.join("\n")));
    }
    let fail = |e: &dyn std::fmt::Display| Error::Internal { stage: "code generation".into(), why: e.to_string() };
    let mut out = String::new();
    for (target, programs) in targets {
        let kernels = emit::Kernels::build(programs, target, &BTreeMap::new()).map_err(|e| Error::Unsupported(e.to_string()))?;
        let tiles = kernels.tiles();
        let mlir = match target {
            Target::Cpu(_) => code::cpu_mlir(&tiles, target).map_err(|e| fail(&e))?,
            Target::Gpu(gpu) => lower::nvvm::module(&tiles, gpu).map_err(|e| fail(&e))?,
        };
        let piece = match what {
            Emit::Ir => String::new(),
            Emit::Mlir => mlir,
            Emit::Llvm => code::llvm_ir(&mlir, target, llvm::MiddleEnd::None).map_err(|e| fail(&e))?,
            Emit::Asm | Emit::Ptx => {
                let bytes = code::emit(&mlir, target, llvm::MiddleEnd::None, llvm::Emit::Assembly).map_err(|e| fail(&e))?;
                String::from_utf8_lossy(&bytes).into_owned()
            }
        };
        out += &format!("; target {target}\n{piece}\n");
    }
    Ok(out)
}
