//! Programs to an artifact: kernels are built once each, compiled per target, and plans written around them.
use crate::{
    compile::{self, CompileError},
    cost,
    kernels::{self, ArgFacts, Built, KernelError, Pack},
    llvm::MiddleEnd,
    targets::{Cpu, Target},
    tile::{
        self,
        hopper::{self, TensorMap},
    },
    wire::{self, Symbols},
};
use pavage_ir::{
    Dim, Region, Requirement, Schedule, Sym, Tensor, TensorType,
    dim::Atom,
    program::{Body, BufId, BufferKind, Origin, Program, Step, Why},
};
use pavage_runtime::{self as rt, DimExpr, plan};
use std::{collections::BTreeMap, convert::Infallible};

/// Why there is no artifact.
#[derive(Debug, thiserror::Error)]
pub enum EmitError {
    /// A region that no family can run.
    #[error("{origin}: {source}")]
    Kernel {
        /// The model's nodes.
        origin: String,
        /// Why.
        source: KernelError,
    },
    /// Code generation failed.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// The artifact cannot be written.
    #[error(transparent)]
    Artifact(#[from] rt::Error),
    /// A tensor that no kernel can hold.
    #[error("{what} has dtype {dtype}, which kernels do not handle")]
    DType {
        /// Which tensor.
        what: String,
        /// Its type.
        dtype: String,
    },
}

/// A port of the model.
#[derive(Clone, Debug)]
pub struct Port {
    /// Name.
    pub name: String,
    /// Type.
    pub ty: TensorType,
}

/// What to put into an artifact.
pub struct Request<'a> {
    /// The model's inputs.
    pub inputs: Vec<Port>,
    /// The model's outputs.
    pub outputs: Vec<Port>,
    /// Every size symbol.
    pub symbols: Vec<Sym>,
    /// What must hold of the sizes of inputs, in their symbols: a run where it does not is refused.
    pub requirements: Vec<Requirement>,
    /// Targets, each with one program a plan.
    pub targets: &'a [(Target, Vec<Program>)],
    /// Flags as typed, for the manifest.
    pub flags: Vec<String>,
    /// Hash of the model file, hex.
    pub input_hash: String,
    /// Threads to compile with; the bytes do not depend on it.
    pub threads: usize,
    /// Schedules that replace the first of a kernel's family, by target and [`signature`].
    pub tuned: BTreeMap<String, Tuned>,
    /// Predicted nanoseconds of one launch of a region on a target; 0 where nothing is predicted.
    pub price: &'a dyn Fn(&Target, &Region) -> f64,
}

/// One distinct kernel of a target.
struct Unit {
    built: Built,
    name: String,
}

/// Everything compiled for one target, before linking: for `--emit`.
pub struct Kernels {
    units: Vec<Unit>,
    /// Unit of each distinct region and the constancy of its arguments.
    known: BTreeMap<(Region, Vec<bool>), usize>,
}

impl Kernels {
    /// Build the distinct kernels of `programs` on `target`.
    pub fn build(programs: &[Program], target: &Target, tuned: Option<&Tuned>) -> Result<Kernels, EmitError> {
        let mut all = Kernels { units: vec![], known: BTreeMap::new() };
        for program in programs {
            each_launch::<EmitError>(&program.body, &[], &mut |region, facts, origin| {
                let key = key(region, &facts);
                if all.known.contains_key(&key) {
                    return Ok(());
                }
                let name = symbol_name(all.units.len(), &region.name);
                let chosen = tuned.and_then(|t| t.get(&signature(region, &facts)));
                let built =
                    kernels::build(region, target, &name, &facts, chosen).map_err(|source| EmitError::Kernel { origin: origin.sources.join(", "), source })?;
                all.known.insert(key, all.units.len());
                all.units.push(Unit { built, name });
                Ok(())
            })?;
        }
        Ok(all)
    }

    /// Every kernel of `program` that `target` has no code for: the model's nodes, and why.
    pub fn missing(program: &Program, target: &Target) -> Vec<(Origin, String)> {
        let mut found = vec![];
        let Ok(()) = each_launch::<Infallible>(&program.body, &[], &mut |region, facts, origin| {
            let why = match kernels::build(region, target, &region.name, &facts, None) {
                Ok(built) => compile::refusal(&built.kernel, target).map(|e| e.to_string()),
                Err(e) => Some(e.to_string()),
            };
            found.extend(why.map(|why| (origin.clone(), why)));
            Ok(())
        });
        found
    }

    /// The kernels' tile IR, in order.
    pub fn tiles(&self) -> Vec<tile::Kernel> {
        self.units.iter().map(|u| u.built.kernel.clone()).collect()
    }

    fn find(&self, region: &Region, facts: &ArgFacts) -> Option<&Unit> {
        self.known.get(&key(region, facts)).map(|i| &self.units[*i])
    }
}

/// Schedules by [`signature`].
pub type Tuned = BTreeMap<String, Schedule>;

/// Visit every launch of a body and of those nested in it, in order.
pub(crate) fn each_launch<E>(body: &Body, outer: &[&Body], visit: &mut dyn FnMut(&Region, ArgFacts, &Origin) -> Result<(), E>) -> Result<(), E> {
    let nested: Vec<&Body> = outer.iter().copied().chain([body]).collect();
    for step in &body.steps {
        match step {
            Step::Run { region, args, origin, .. } => visit(region, facts(&nested, args), origin)?,
            Step::If { then_body, else_body, .. } => {
                each_launch(then_body, &nested, visit)?;
                each_launch(else_body, &nested, visit)?;
            }
            Step::Loop { body, .. } => each_launch(body, &nested, visit)?,
            Step::Copy { .. } | Step::Bind { .. } => {}
        }
    }
    Ok(())
}

/// What a schedule is chosen for: the region, its name aside, and which arguments are constants. Equal on every machine.
pub fn signature(region: &Region, facts: &ArgFacts) -> String {
    let constant = |i: usize| if facts.constant(i).is_some() { 'c' } else { 'v' };
    format!("{:016x}-{}", region.signature(), (0..region.args.len()).map(constant).collect::<String>())
}

/// Kernels are shared by regions that differ in name alone.
fn key(region: &Region, facts: &ArgFacts) -> (Region, Vec<bool>) {
    let region = Region { name: String::new(), ..region.clone() };
    (region, facts.constants.iter().map(Option::is_some).collect())
}

fn symbol_name(n: usize, name: &str) -> String {
    let clean: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).take(40).collect();
    format!("k{n}_{clean}")
}

/// The constant a buffer is, looking through captures.
fn constant<'a>(bodies: &[&'a Body], buf: BufId) -> Option<&'a Tensor> {
    let (body, outer) = bodies.split_last()?;
    match &body.buffers[buf.index()].kind {
        BufferKind::Const(t) => Some(t),
        BufferKind::Captured(of) => constant(outer, *of),
        _ => None,
    }
}

fn facts(bodies: &[&Body], args: &[BufId]) -> ArgFacts {
    ArgFacts { constants: args.iter().map(|b| constant(bodies, *b).cloned()).collect() }
}

/// Compile everything and give the artifact's bytes.
pub fn artifact(request: &Request) -> Result<Vec<u8>, EmitError> {
    let symbols = Symbols(request.symbols.clone());
    let mut writer = rt::Writer::new();
    let mut manifest = plan::Manifest {
        producer: format!("pavage {}", env!("CARGO_PKG_VERSION")),
        flags: request.flags.clone(),
        input_hash: request.input_hash.clone(),
        symbols: symbols.wire(),
        inputs: ports(&request.inputs, &symbols)?,
        outputs: ports(&request.outputs, &symbols)?,
        guards: request.requirements.iter().map(|r| guard(r, &symbols)).collect(),
        ..plan::Manifest::default()
    };
    let mut tensors = Tensors::default();
    let mut explanations: Vec<Vec<plan::Explanation>> = vec![];
    for (target, programs) in request.targets {
        let kernels = Kernels::build(programs, target, request.tuned.get(target.name()))?;
        let tiles = kernels.tiles();
        let code = match target {
            Target::Cpu(cpu) => {
                let so = compile::cpu_library(&tiles, target, MiddleEnd::None, request.threads)?;
                writer.add_code(target.name(), plan::CodeKind::SharedObject, &features(cpu), so)
            }
            Target::Gpu(_) => {
                let ptx = compile::ptx(&tiles, target)?;
                writer.add_code(target.name(), plan::CodeKind::Ptx, &[], ptx.into_bytes())
            }
        };
        for program in programs {
            let mut out = PlanWriter {
                symbols: &symbols,
                all: &kernels,
                target,
                writer: &mut writer,
                tensors: &mut tensors,
                kernels: vec![],
                why: vec![],
                price: request.price,
            };
            let body = out.body(&program.body, &mut vec![])?;
            explanations.push(out.why.iter().map(explanation).collect());
            let kernels = out.kernels;
            let predicted_ns = predicted(&body, &kernels);
            manifest.plans.push(plan::Plan { name: program.name.clone(), target: target.name().into(), code, cubin: None, kernels, body, predicted_ns });
        }
    }
    writer.explain(&explanations)?;
    Ok(writer.to_bytes(manifest)?)
}

/// Features that native code may use beyond its baseline, as the runtime asks for them.
fn features(cpu: &Cpu) -> Vec<String> {
    let has: Vec<&str> = cpu.llvm_features.split(',').filter_map(|f| f.strip_prefix('+')).collect();
    rt::KNOWN_FEATURES.iter().filter(|f| has.contains(f)).map(|f| (*f).to_string()).collect()
}

fn ports(ports: &[Port], symbols: &Symbols) -> Result<Vec<plan::Port>, EmitError> {
    ports.iter().map(|p| Ok(plan::Port { name: p.name.clone(), dtype: wire_dtype(&p.ty, &p.name)?, dims: symbols.dims(&p.ty.shape) })).collect()
}

fn guard(needed: &Requirement, symbols: &Symbols) -> plan::Guard {
    plan::Guard { expr: symbols.dim(&needed.gap()), min: 0, max: 0, message: needed.to_string() }
}

fn wire_dtype(ty: &TensorType, what: &str) -> Result<rt::DType, EmitError> {
    wire::dtype(ty.dtype).ok_or_else(|| EmitError::DType { what: what.into(), dtype: ty.dtype.to_string() })
}

/// Constants written so far, in each of their forms. Keyed by content: packing happens once for all plans.
#[derive(Default)]
struct Tensors(BTreeMap<(u64, String), u32>);

struct PlanWriter<'a, 'w> {
    symbols: &'a Symbols,
    all: &'a Kernels,
    target: &'a Target,
    writer: &'a mut rt::Writer<'w>,
    tensors: &'a mut Tensors,
    kernels: Vec<plan::Kernel>,
    /// Of each kernel.
    why: Vec<Why>,
    price: &'a dyn Fn(&Target, &Region) -> f64,
}

/// Buffers of one body as they are written: made when first named.
struct Frame<'b> {
    body: &'b Body,
    buffers: Vec<plan::Buffer>,
    made: BTreeMap<(BufId, String), plan::BufferId>,
}

impl PlanWriter<'_, '_> {
    fn body<'b>(&mut self, body: &'b Body, outer: &mut Vec<Frame<'b>>) -> Result<plan::Body, EmitError> {
        outer.push(Frame { body, buffers: vec![], made: BTreeMap::new() });
        let inputs = body.inputs.iter().map(|b| self.buffer(outer, *b, None)).collect::<Result<Vec<_>, _>>()?;
        let mut steps = vec![];
        for step in &body.steps {
            steps.push(self.step(step, outer)?);
        }
        let outputs = body.outputs.iter().map(|b| self.buffer(outer, *b, None)).collect::<Result<Vec<_>, _>>()?;
        let frame = outer.pop();
        Ok(plan::Body { buffers: frame.map(|f| f.buffers).unwrap_or_default(), steps, inputs, outputs })
    }

    fn step<'b>(&mut self, step: &'b Step, frames: &mut Vec<Frame<'b>>) -> Result<plan::Step, EmitError> {
        Ok(match step {
            Step::Run { region, args, outputs, origin } => self.launch(region, args, outputs, origin, frames)?,
            Step::Copy { from, to } => plan::Step::Copy { from: self.buffer(frames, *from, None)?, to: self.buffer(frames, *to, None)? },
            Step::Bind { buffer, sym } => plan::Step::Bind { buffer: self.buffer(frames, *buffer, None)?, symbol: self.symbols.index(sym).unwrap_or(0) },
            Step::If { cond, then_body, else_body, outputs } => plan::Step::If {
                cond: self.buffer(frames, *cond, None)?,
                then_body: Box::new(self.body(then_body, frames)?),
                else_body: Box::new(self.body(else_body, frames)?),
                outputs: self.buffers(frames, outputs)?,
            },
            Step::Loop { trip, cond, body, carried, outputs } => plan::Step::Loop {
                trip: Some(self.buffer(frames, *trip, None)?),
                cond: Some(self.buffer(frames, *cond, None)?),
                carried: self.buffers(frames, carried)?,
                body: Box::new(self.body(body, frames)?),
                outputs: self.buffers(frames, outputs)?,
            },
        })
    }

    fn buffers(&mut self, frames: &mut Vec<Frame>, ids: &[BufId]) -> Result<Vec<plan::BufferId>, EmitError> {
        ids.iter().map(|b| self.buffer(frames, *b, None)).collect()
    }

    /// The written buffer of `buf` in the innermost frame; constants may be packed.
    fn buffer(&mut self, frames: &mut Vec<Frame>, buf: BufId, pack: Option<&Pack>) -> Result<plan::BufferId, EmitError> {
        let at = frames.len() - 1;
        self.buffer_in(frames, at, buf, pack)
    }

    fn buffer_in(&mut self, frames: &mut Vec<Frame>, at: usize, buf: BufId, pack: Option<&Pack>) -> Result<plan::BufferId, EmitError> {
        let form = pack.map_or(String::new(), |p| format!("{p:?}"));
        if let Some(&known) = frames[at].made.get(&(buf, form.clone())) {
            return Ok(known);
        }
        let bodies: Vec<&Body> = frames[..=at].iter().map(|f| f.body).collect();
        let declared = &frames[at].body.buffers[buf.index()];
        let ty = declared.ty.clone();
        let written = match (constant(&bodies, buf), &declared.kind) {
            (Some(tensor), _) => {
                let (index, ty) = self.tensor(tensor, pack, &form)?;
                plan::Buffer { dtype: wire_dtype(&ty, "a constant")?, dims: self.symbols.dims(&ty.shape), kind: plan::BufferKind::Const(index) }
            }
            (None, kind) => {
                let kind = match kind {
                    BufferKind::Input(n) => plan::BufferKind::Input(*n),
                    BufferKind::Output(n) => plan::BufferKind::Output(*n),
                    BufferKind::Const(_) | BufferKind::Temp => plan::BufferKind::Arena,
                    BufferKind::View(of) => plan::BufferKind::View { of: self.buffer_in(frames, at, *of, None)?, byte_offset: DimExpr::Const(0) },
                    BufferKind::Captured(of) => plan::BufferKind::Captured(self.buffer_in(frames, at - 1, *of, None)?),
                };
                plan::Buffer { dtype: wire_dtype(&ty, "a value")?, dims: self.symbols.dims(&ty.shape), kind }
            }
        };
        let frame = &mut frames[at];
        frame.buffers.push(written);
        let id = plan::BufferId(frame.buffers.len() as u32 - 1);
        frame.made.insert((buf, form), id);
        Ok(id)
    }

    fn tensor(&mut self, tensor: &Tensor, pack: Option<&Pack>, form: &str) -> Result<(u32, TensorType), EmitError> {
        let tensor = pack.map_or_else(|| tensor.clone(), |p| p.apply(tensor));
        let ty = tensor.ty();
        let key = (tensor.content_hash(), form.to_string());
        if let Some(&known) = self.tensors.0.get(&key) {
            return Ok((known, ty));
        }
        let shape: Vec<u64> = tensor.shape().iter().map(|d| *d as u64).collect();
        let name = format!("c{}", self.tensors.0.len());
        let index = self.writer.add_tensor(&name, wire_dtype(&ty, &name)?, &shape, tensor.bytes().to_vec());
        self.tensors.0.insert(key, index);
        Ok((index, ty))
    }

    fn launch(&mut self, region: &Region, args: &[BufId], outputs: &[BufId], origin: &Origin, frames: &mut Vec<Frame>) -> Result<plan::Step, EmitError> {
        let bodies: Vec<&Body> = frames.iter().map(|f| f.body).collect();
        let facts = facts(&bodies, args);
        let all = self.all;
        let unit = all.find(region, &facts).expect("every region of the programs was built");
        let built = &unit.built;
        let mut ids = vec![];
        for (i, b) in args.iter().enumerate() {
            let pack = built.packs.iter().find(|(at, _)| *at == i).map(|(_, p)| p);
            ids.push(self.buffer(frames, *b, pack)?);
        }
        ids.extend(self.buffers(frames, outputs)?);
        let dims = self.symbols.dims(&built.dims);
        let kernel = self.kernel(region, unit, origin);
        let kernel = self.kernels.iter().position(|k| *k == kernel).unwrap_or_else(|| {
            self.kernels.push(kernel);
            self.why.push(origin.why.clone());
            self.kernels.len() - 1
        });
        Ok(plan::Step::Launch { kernel: plan::KernelId(kernel as u32), args: ids, dims })
    }

    /// A tensor map over the artifact's symbols: the kernel's own sizes are replaced by what the launch passes.
    fn tensor_map(&self, map: &TensorMap, built: &Built) -> plan::TensorMap {
        let kernel = &built.kernel;
        let own: Vec<Dim> = (0..built.dims.len()).map(hopper::size).collect();
        let size = |d: &Dim| {
            let passed = |a: &Atom| own.iter().position(|o| *o == Dim::from(a.clone())).map_or_else(|| Dim::from(a.clone()), |i| built.dims[i].clone());
            self.symbols.dim(&d.map_atoms(&passed))
        };
        let element = kernel.buf(map.arg).dtype;
        let width = Dim::from(element.bits() as i64 / 8);
        plan::TensorMap {
            arg: kernel.args().position(|b| b == map.arg).unwrap_or(0) as u32,
            byte_offset: size(&(map.offset.clone() * width.clone())),
            dtype: wire::dtype(element).unwrap_or(rt::DType::U8),
            dims: map.dims.iter().map(size).collect(),
            strides: map.strides.iter().map(|s| size(&(s.clone() * width.clone()))).collect(),
            box_dims: map.boxes.clone(),
            element_strides: vec![],
            swizzle: match map.swizzle {
                32 => plan::Swizzle::B32,
                64 => plan::Swizzle::B64,
                128 => plan::Swizzle::B128,
                _ => plan::Swizzle::None,
            },
            l2_promotion: plan::L2Promotion::default(),
            fill: plan::Fill::default(),
        }
    }

    fn kernel(&self, region: &Region, unit: &Unit, origin: &Origin) -> plan::Kernel {
        let built = &unit.built;
        let dim = |d: &Dim| self.symbols.dim(d);
        let work = cost::work(region);
        let cpu =
            built.cpu.as_ref().map(|c| plan::CpuLaunch { extent: dim(&c.extent), grain: dim(&c.grain), unit_ps: dim(&c.unit_ps), scratch: dim(&c.scratch) });
        let gpu = built.grid.as_ref().map(|grid| plan::GpuLaunch {
            grid: grid.clone().map(|d| dim(&d)),
            block: [built.kernel.launch.threads, 1, 1],
            cluster: built.kernel.launch.cluster,
            smem: u32::try_from(built.kernel.shared_bytes()).unwrap_or(u32::MAX),
            tensor_maps: built.kernel.maps.iter().map(|m| self.tensor_map(m, built)).collect(),
            pdl: built.kernel.launch.pdl,
        });
        plan::Kernel {
            name: region.name.clone(),
            symbol: unit.name.clone(),
            n_args: (region.args.len() + region.outputs.len()) as u32,
            n_dims: built.dims.len() as u32,
            cpu,
            gpu,
            provenance: plan::Provenance {
                sources: origin.sources.clone(),
                members: origin.members.clone(),
                rules: origin.rules.iter().cloned().chain([format!("schedule {}", built.schedule)]).collect(),
                flops: dim(&work.flops),
                bytes_read: dim(&work.read),
                bytes_written: dim(&work.written),
                // A guess at sizes that are open would be misread.
                predicted_ns: if region.symbols().is_empty() { (self.price)(self.target, region) } else { 0.0 },
            },
        }
    }
}

fn explanation(why: &Why) -> plan::Explanation {
    // Whole nanoseconds: these are predictions.
    let price = &why.price;
    plan::Explanation {
        launch_ns: price.launch.round(),
        arithmetic_ns: price.arithmetic.round(),
        memory_ns: price.memory.round(),
        total_ns: price.total.round(),
        passes: why.passes.clone(),
        chain: why.chain.clone(),
        runner_up: why.runner_up.as_ref().map(|(what, ns)| (what.clone(), ns.round())),
        apart: why.apart.clone(),
    }
}

/// Predicted time of one run, every nested body counted once; 0 if that of a launch is not known.
fn predicted(body: &plan::Body, kernels: &[plan::Kernel]) -> f64 {
    fn launches(body: &plan::Body, kernels: &[plan::Kernel], into: &mut Vec<f64>) {
        for step in &body.steps {
            match step {
                plan::Step::Launch { kernel, .. } => into.extend(kernels.get(kernel.index()).map(|k| k.provenance.predicted_ns)),
                plan::Step::Copy { .. } | plan::Step::Bind { .. } => {}
                plan::Step::If { then_body, else_body, .. } => {
                    launches(then_body, kernels, into);
                    launches(else_body, kernels, into);
                }
                plan::Step::Loop { body, .. } => launches(body, kernels, into),
            }
        }
    }
    let mut all = vec![];
    launches(body, kernels, &mut all);
    if all.contains(&0.0) { 0.0 } else { all.iter().sum() }
}
