//! `Session`: one plan of an artifact, loaded on a device, bound to shapes as they come.
use crate::analysis::{BodyInfo, analyse};
use crate::artifact::Artifact;
use crate::backend::{Backend, Replay};
use crate::cpu::{self, Cpu};
use crate::device::Device;
use crate::error::Shape;
use crate::exec::{LaunchTime, Observed, Run, Then, Watch};
use crate::frame::Frame;
use crate::null::Null;
use crate::plan::{BufferKind, CodeKind, Plan, Port, Step};
use crate::tensor::Tensor;
use crate::value::{DeviceBuffer, Outputs, Value};
use crate::{DimExpr, Error};
use std::sync::Arc;

/// How to make a session.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which plan: `fused`, `unfused`.
    pub plan: String,
    /// CPU threads, the caller's included; 0 for one a core.
    pub threads: usize,
    /// Code for this target only (`x86-64-v3`, `sm_80`); otherwise the best that the device runs.
    pub target: Option<String>,
    /// Whether a GPU may replay a run as one graph.
    pub graphs: Graphs,
}

/// Whether a GPU may replay a run as one graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Graphs {
    /// Where the plan has no control flow.
    Auto,
    /// Launch each kernel by itself.
    Off,
}

impl Default for Options {
    fn default() -> Self {
        Options { plan: "fused".into(), threads: 0, target: None, graphs: Graphs::Auto }
    }
}

/// A loaded plan. Runs one at a time; several sessions share the artifact and the cores.
pub struct Session {
    artifact: Artifact,
    plan: usize,
    info: BodyInfo,
    frame: Frame,
    backend: Box<dyn Backend>,
    constants: Vec<u64>,
    symbols: Vec<i64>,
    args: Vec<u64>,
    names: Arc<[String]>,
    gpu: bool,
    notes: Vec<String>,
    closed: Option<String>,
    /// Copies of constants whose place in a file is not aligned to their elements.
    _aligned: Vec<crate::bytes::AlignedBytes>,
}

impl Artifact {
    /// Loads a plan on a device.
    pub fn session(&self, device: Device, options: Options) -> Result<Session, Error> {
        Session::new(self, device, options)
    }
}

/// The plan to run: the best that the device can, among those of the name.
fn choose<'a>(artifact: &'a Artifact, device: Device, options: &Options) -> Result<&'a Plan, Error> {
    let manifest = artifact.manifest();
    let named: Vec<_> = manifest.plans.iter().filter(|p| p.name == options.plan).map(|p| (p, &manifest.codes[p.code as usize])).collect();
    if named.is_empty() {
        let mut have: Vec<&str> = manifest.plans.iter().map(|p| p.name.as_str()).collect();
        have.sort_unstable();
        have.dedup();
        let (name, have) = (options.plan.clone(), have.into_iter().collect());
        return Err(Error::NoSuchPlan { name, have });
    }
    let wanted: Vec<_> = named.iter().copied().filter(|(p, _)| options.target.as_ref().is_none_or(|t| *t == p.target)).collect();
    if wanted.is_empty() {
        return Err(Error::NoCode {
            plan: options.plan.clone(),
            device: format!("{device} and target {}", options.target.as_deref().unwrap_or("any")),
            have: named.iter().map(|(p, _)| p.target.as_str()).collect(),
        });
    }
    match device {
        Device::Cpu => cpu::choose(&options.plan, &wanted),
        Device::Null => Ok(wanted[0].0),
        #[cfg(feature = "cuda")]
        Device::Cuda(n) => crate::cuda::choose(n, &options.plan, &wanted),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(n) => Err(crate::device::no_cuda(n)),
    }
}

impl Session {
    fn new(artifact: &Artifact, device: Device, options: Options) -> Result<Session, Error> {
        let plan = choose(artifact, device, &options)?;
        let manifest = artifact.manifest();
        let index = manifest.plans.iter().position(|p| std::ptr::eq(p, plan)).unwrap_or(0);
        let info = analyse(manifest, plan).map_err(Error::Damaged)?;
        let mut notes = Vec::new();
        let mut aligned = Vec::new();
        let used = used_constants(plan, manifest.tensors.len());
        let mut constants = vec![0; manifest.tensors.len()];
        let backend: Box<dyn Backend> = match device {
            Device::Cpu => {
                let threads = match options.threads {
                    0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
                    n => n,
                };
                for (n, address) in constants.iter_mut().enumerate().filter(|(n, _)| used[*n]) {
                    let bytes = artifact.tensor(n);
                    *address = bytes.as_ptr() as u64;
                    if !address.is_multiple_of(manifest.tensors[n].dtype.align() as u64) {
                        let copy = crate::bytes::AlignedBytes::copy_of(bytes)?;
                        *address = copy.as_ptr() as u64;
                        aligned.push(copy);
                    }
                }
                Box::new(Cpu::new(artifact, plan, threads, info.max_args)?)
            }
            Device::Null => {
                constants.iter_mut().enumerate().for_each(|(n, a)| *a = Null::constant(n));
                let n = manifest.tensors.len();
                Box::new(Null::new(plan, n, manifest.inputs.len(), manifest.outputs.len()))
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(n) => {
                let mut cuda = crate::cuda::Cuda::new(n, artifact, plan)?;
                cuda.upload_constants(artifact, &used, &mut constants)?;
                if options.graphs == Graphs::Auto && is_straight(plan) {
                    cuda.use_graphs();
                } else if options.graphs == Graphs::Auto {
                    notes.push("no CUDA graph: what the plan launches depends on data".into());
                }
                Box::new(cuda)
            }
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(n) => return Err(crate::device::no_cuda(n)),
        };
        notes.insert(0, format!("plan {} for {} on {}", plan.name, plan.target, backend.name()));
        Ok(Session {
            artifact: artifact.clone(),
            plan: index,
            frame: Frame::new(&info),
            args: Vec::with_capacity(info.max_args),
            info,
            backend,
            constants,
            symbols: vec![0; manifest.symbols.len()],
            names: manifest.outputs.iter().map(|p| p.name.clone()).collect(),
            gpu: manifest.codes[plan.code as usize].kind != CodeKind::SharedObject,
            notes,
            closed: None,
            _aligned: aligned,
        })
    }

    /// The inputs, in order.
    pub fn inputs(&self) -> &[Port] {
        self.artifact.inputs()
    }

    /// The outputs, in order.
    pub fn outputs(&self) -> &[Port] {
        self.artifact.outputs()
    }

    /// The artifact it runs.
    pub fn artifact(&self) -> &Artifact {
        &self.artifact
    }

    /// The plan it runs.
    pub fn plan(&self) -> &Plan {
        &self.artifact.manifest().plans[self.plan]
    }

    /// What was decided: plan, target and device, and what was not possible.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Bytes of intermediate memory, for the shapes met so far.
    pub fn arena_bytes(&self) -> usize {
        self.frame.arena_bytes()
    }

    /// Values of the manifest's symbols in the last run; 0 where it met none.
    pub fn sizes(&self) -> &[i64] {
        &self.symbols
    }

    /// Puts a tensor in the memory of the session's GPU, to be an input as often as wanted.
    pub fn upload(&mut self, tensor: &Tensor) -> Result<DeviceBuffer, Error> {
        self.backend.upload(&tensor.view())
    }

    /// What the null device was asked to do since the last call; empty on other devices.
    pub fn take_log(&mut self) -> Vec<String> {
        self.backend.take_log()
    }

    /// Outputs for [`Session::run_into`], empty as yet.
    pub fn new_outputs(&self) -> Result<Outputs, Error> {
        Outputs::new(self.names.clone())
    }

    /// Runs the model: inputs by name, in any order.
    ///
    /// ```no_run
    /// # use pavage_runtime::{Artifact, Device, Error, Options, Tensor};
    /// # fn main() -> Result<(), Error> {
    /// let mut session = Artifact::open("model.pav")?.session(Device::Cpu, Options::default())?;
    /// let x = Tensor::from_slice(&[1, 2], &[0.5f32, -1.0])?;
    /// let y = session.run(&[("x", &x)])?;
    /// println!("{:?}", y["y"].as_slice::<f32>()?);
    /// # Ok(())
    /// # }
    /// ```
    pub fn run<'v, V>(&mut self, inputs: &[(&str, V)]) -> Result<Outputs, Error>
    where
        V: Copy + Into<Value<'v>>,
    {
        let mut outputs = self.new_outputs()?;
        self.run_into(inputs, &mut outputs)?;
        Ok(outputs)
    }

    /// Runs the model into tensors that are kept: with the shapes of the run before, nothing is
    /// allocated.
    pub fn run_into<'v, V>(&mut self, inputs: &[(&str, V)], outputs: &mut Outputs) -> Result<(), Error>
    where
        V: Copy + Into<Value<'v>>,
    {
        let by_name = |name: &str| inputs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).into());
        self.check_names(&mut inputs.iter().map(|(n, _)| *n))?;
        let outputs = self.fit(outputs)?;
        self.run_with(&by_name, outputs, Watch::Nothing)
    }

    /// Runs the model and times each launch, in order; slower than [`Session::run`].
    pub fn run_timed<'v, V>(&mut self, inputs: &[(&str, V)], outputs: &mut Outputs) -> Result<Vec<LaunchTime>, Error>
    where
        V: Copy + Into<Value<'v>>,
    {
        let by_name = |name: &str| inputs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).into());
        self.check_names(&mut inputs.iter().map(|(n, _)| *n))?;
        let mut times = Vec::new();
        let outputs = self.fit(outputs)?;
        self.run_with(&by_name, outputs, Watch::Times(&mut times))?;
        Ok(times)
    }

    /// Runs the model and shows each launch's buffers before and after it, in order: to find the
    /// first kernel that goes wrong, or to put other results in the place of its own. Slow: every
    /// buffer comes to the host.
    pub fn run_observed<'v, V>(&mut self, inputs: &[(&str, V)], outputs: &mut Outputs, show: &mut dyn FnMut(&mut Observed) -> Then) -> Result<(), Error>
    where
        V: Copy + Into<Value<'v>>,
    {
        let by_name = |name: &str| inputs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).into());
        self.check_names(&mut inputs.iter().map(|(n, _)| *n))?;
        let outputs = self.fit(outputs)?;
        self.run_with(&by_name, outputs, Watch::Values(show))
    }

    /// Runs the model on a GPU and leaves the outputs in its memory, in the model's order. The next
    /// run of the session overwrites them; as its inputs, they are copied first.
    pub fn run_resident<'v, V>(&mut self, inputs: &[(&str, V)]) -> Result<Vec<DeviceBuffer>, Error>
    where
        V: Copy + Into<Value<'v>>,
    {
        if !self.backend.keeps_outputs() {
            return Err(Error::NoGpu(format!("{} keeps outputs in host memory", self.backend.name())));
        }
        let by_name = |name: &str| inputs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).into());
        self.check_names(&mut inputs.iter().map(|(n, _)| *n))?;
        self.run_with(&by_name, &mut [], Watch::Nothing)?;
        Ok(self.backend.kept_outputs())
    }

    /// Copies a tensor from the memory of the session's GPU.
    pub fn download(&mut self, buffer: &DeviceBuffer) -> Result<Tensor, Error> {
        self.backend.download(buffer)
    }

    /// As many tensors as the model has outputs.
    fn fit<'o>(&self, outputs: &'o mut Outputs) -> Result<&'o mut [Tensor], Error> {
        if outputs.tensors.len() != self.names.len() {
            *outputs = self.new_outputs()?;
        }
        Ok(&mut outputs.tensors)
    }

    fn check_names(&self, names: &mut dyn Iterator<Item = &str>) -> Result<(), Error> {
        let ports = self.artifact.inputs();
        let mut n = 0;
        let mut last = "";
        for name in names {
            if !ports.iter().any(|p| p.name == name) {
                let have = ports.iter().map(|p| p.name.as_str()).collect();
                return Err(Error::NoSuchInput { name: name.into(), have });
            }
            (n, last) = (n + 1, name);
        }
        // Each port is looked up by name: with more names than ports, one came twice.
        if n > ports.len() { Err(Error::RepeatedInput(last.into())) } else { Ok(()) }
    }

    fn run_with<'v>(&mut self, input: &dyn Fn(&str) -> Option<Value<'v>>, outputs: &mut [Tensor], watch: Watch) -> Result<(), Error> {
        if let Some(why) = &self.closed {
            return Err(Error::Closed(why.clone()));
        }
        self.bind_inputs(input)?;
        let done = self.run_bound(input, outputs, watch);
        if let Err(error) = &done {
            self.backend.abandon();
            if matches!(error, Error::Device { .. }) {
                self.closed = Some(error.to_string());
            }
        }
        done
    }

    /// Gives symbols their values from the inputs' shapes, and checks the inputs.
    fn bind_inputs<'v>(&mut self, input: &dyn Fn(&str) -> Option<Value<'v>>) -> Result<(), Error> {
        let manifest = self.artifact.manifest();
        self.symbols.fill(0);
        for port in &manifest.inputs {
            let value = input(&port.name).ok_or_else(|| Error::MissingInput(port.name.clone()))?;
            if value.dtype() != port.dtype {
                return Err(Error::InputDType { input: port.name.clone(), expected: port.dtype, found: value.dtype() });
            }
            if value.shape().len() != port.dims.len() {
                return Err(self.shape_error(port, &value, None));
            }
        }
        let mut open = Open(&self.info.input_symbols, 0);
        for port in &manifest.inputs {
            let Some(value) = input(&port.name) else { continue };
            for (dim, extent) in port.dims.iter().zip(value.shape()) {
                let Some((s, size)) = dim.solve(*extent as i64) else { continue };
                if !open.take(s) {
                    continue;
                }
                let about = &manifest.symbols[s as usize];
                if size < about.min || size > about.max {
                    return Err(Error::SizeRange {
                        what: format!("input `{}`", port.name),
                        symbol: about.name.clone(),
                        value: size,
                        min: about.min,
                        max: about.max,
                    });
                }
                self.symbols[s as usize] = size;
            }
        }
        for port in &manifest.inputs {
            let Some(value) = input(&port.name) else { continue };
            for (dim, extent) in port.dims.iter().zip(value.shape()) {
                let expected = dim.eval(&self.symbols).map_err(|source| Error::Size { what: format!("input `{}`", port.name), source })?;
                if expected != *extent as i64 {
                    return Err(self.shape_error(port, &value, Some((dim, expected, *extent as i64))));
                }
            }
        }
        for guard in &manifest.guards {
            let value = guard.expr.eval(&self.symbols).map_err(|source| Error::Size { what: format!("guard `{}`", guard.message), source })?;
            if value < guard.min || value > guard.max {
                return Err(Error::Guard { message: guard.message.clone(), value, min: guard.min, max: guard.max });
            }
        }
        Ok(())
    }

    fn shape_error(&self, port: &Port, value: &Value, at: Option<(&DimExpr, i64, i64)>) -> Error {
        let manifest = self.artifact.manifest();
        let names: Vec<&str> = manifest.symbols.iter().map(|s| s.name.as_str()).collect();
        let dims: Vec<String> = port.dims.iter().map(|d| d.with_names(&names).to_string()).collect();
        let why = at.filter(|(dim, ..)| dim.as_const().is_none()).map(|(dim, expected, found)| {
            let text = dim.with_names(&names);
            if dim.linear().is_some() && dim.solve(found).is_none() {
                return format!("{found} is no {text}");
            }
            let other = manifest
                .inputs
                .iter()
                .find(|p| p.name != port.name && dim.symbols().iter().any(|s| p.dims.iter().any(|d| d.linear().is_some_and(|(t, ..)| t == *s))));
            let from = other.map_or(String::new(), |p| format!(", by input `{}`", p.name));
            format!("{text} is {expected}{from}")
        });
        Error::InputShape { input: port.name.clone(), expected: format!("[{}]", dims.join(" x ")), found: Shape(value.shape().to_vec()), why }
    }

    fn run_bound<'v>(&mut self, input: &dyn Fn(&str) -> Option<Value<'v>>, outputs: &mut [Tensor], watch: Watch) -> Result<(), Error> {
        let manifest = self.artifact.manifest();
        let plan = &manifest.plans[self.plan];
        let (body, info, frame) = (&plan.body, &self.info, &mut self.frame);
        let parallel = frame.is_parallel(Cpu::is_parallel);
        self.backend.begin(parallel)?;
        for (n, (port, id)) in manifest.inputs.iter().zip(&body.inputs).enumerate() {
            let value = input(&port.name).ok_or_else(|| Error::MissingInput(port.name.clone()))?;
            frame.address[id.index()] = self.backend.input(n, &value).map_err(|e| match e {
                Error::WrongDevice { found, session, .. } => Error::WrongDevice { input: port.name.clone(), found, session },
                other => other,
            })?;
        }
        let watched = !matches!(watch, Watch::Nothing);
        let mut run = Run {
            backend: self.backend.as_mut(),
            manifest,
            plan,
            gpu: self.gpu,
            constants: &self.constants,
            symbols: &mut self.symbols,
            outputs,
            args: &mut self.args,
            watch,
        };
        // Places first, so that a recording has nothing but work in it.
        frame.bind(&mut run, info, body, 0)?;
        let key = frame.binding(0);
        let recording = if watched { Replay::Off } else { run.backend.record(key)? };
        match recording {
            Replay::Done => {}
            Replay::Off => run.body(info, body, frame)?,
            Replay::Record => {
                let recorded = run.body(info, body, frame).and_then(|()| run.backend.recorded(key));
                if let Err(why) = recorded {
                    // Nothing of it was done yet: do it plainly, now and from now on.
                    run.backend.stop_recording();
                    self.notes.push(format!("no CUDA graph: {why}"));
                    run.body(info, body, frame)?;
                }
            }
        }
        // Outputs that no kernel could write where they belong.
        for (n, id) in body.outputs.iter().enumerate() {
            let buffer = &body.buffers[id.index()];
            if !matches!(buffer.kind, BufferKind::Output(k) if k as usize == n) {
                let shape = &frame.dims[info.buffers[id.index()].dims.clone()];
                let to = run.backend.output(n, buffer.dtype, shape, run.outputs.get_mut(n))?;
                run.backend.copy(frame.address[id.index()], to, frame.bytes[id.index()])?;
            }
        }
        run.backend.finish(run.outputs)
    }
}

/// Symbols that are still to be defined, at most 64 of them remembered; the others are defined
/// by whichever input comes last and then checked, as all are.
struct Open<'a>(&'a [u32], u64);

impl Open<'_> {
    fn take(&mut self, symbol: u32) -> bool {
        match self.0.iter().position(|s| *s == symbol) {
            Some(at @ 0..64) => {
                let fresh = self.1 & (1 << at) == 0;
                self.1 |= 1 << at;
                fresh
            }
            Some(_) => true,
            None => false,
        }
    }
}

/// Which constants a plan mentions, nested bodies included.
fn used_constants(plan: &Plan, count: usize) -> Vec<bool> {
    fn mark(body: &crate::plan::Body, used: &mut [bool]) {
        for buffer in &body.buffers {
            if let BufferKind::Const(n) = buffer.kind {
                used[n as usize] = true;
            }
        }
        for step in &body.steps {
            match step {
                Step::If { then_body, else_body, .. } => {
                    mark(then_body, used);
                    mark(else_body, used);
                }
                Step::Loop { body, .. } => mark(body, used),
                Step::Launch { .. } | Step::Copy { .. } | Step::Bind { .. } => {}
            }
        }
    }
    let mut used = vec![false; count];
    mark(&plan.body, &mut used);
    used
}

/// Whether a plan is the same launches whatever the data.
#[cfg(feature = "cuda")]
fn is_straight(plan: &Plan) -> bool {
    plan.body.steps.iter().all(|s| matches!(s, Step::Launch { .. } | Step::Copy { .. }))
}
