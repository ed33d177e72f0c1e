//! The CUDA device: the driver alone, looked up when a session asks for it. One context, one
//! stream; weights are uploaded once, a plan without control flow is replayed as one graph.
mod arch;
mod driver;
mod kernels;
mod timer;

use crate::artifact::Artifact;
use crate::backend::{Backend, Block, Launch, LaunchShape, Replay};
use crate::plan::{CodeEntry, Plan};
use crate::tensor::{Tensor, TensorRef};
use crate::value::{DeviceBuffer, Value};
use crate::{DType, Error};
use cudarc::driver::sys;
use driver::{Context, DeviceMemory, check};
use kernels::Kernels;
use std::collections::BTreeMap;
use std::sync::Arc;
use timer::Timer;

/// So many recorded graphs are kept.
const MAX_GRAPHS: usize = 8;

/// An error unless there is such a GPU and a driver that is new enough.
pub(crate) fn probe(ordinal: u32) -> Result<(), Error> {
    driver::device(ordinal).map(|_| ())
}

/// All GPUs in words; none without a driver.
pub(crate) fn list() -> Vec<String> {
    driver::list().unwrap_or_default()
}

/// The plan whose code this GPU runs best.
pub(crate) fn choose<'a>(ordinal: u32, plan: &str, candidates: &[(&'a Plan, &'a CodeEntry)]) -> Result<&'a Plan, Error> {
    let capability = driver::device(ordinal)?.capability;
    arch::best(capability, candidates).ok_or_else(|| Error::NoCode {
        plan: plan.into(),
        device: format!("cuda:{ordinal} (sm_{}{})", capability.0, capability.1),
        have: candidates.iter().map(|(p, _)| p.target.as_str()).collect(),
    })
}

/// A session's view of a GPU. Fields are dropped in this order: graphs and modules before memory,
/// all before the stream and the context.
pub(crate) struct Cuda {
    graphs: Vec<Graph>,
    graph_uses: u64,
    use_graphs: bool,
    recording: bool,
    kernels: Kernels,
    inputs: Vec<Option<Block>>,
    outputs: Vec<Option<Output>>,
    /// Where the inputs of this run are.
    places: Vec<u64>,
    timer: Option<Timer>,
    constants: Option<Block>,
    stream: Stream,
    context: Arc<Context>,
}

/// A recorded run: of these sizes and places, with inputs at these addresses.
struct Graph {
    key: u64,
    inputs: Vec<u64>,
    /// Null after a first run, which loads what the driver loads lazily.
    exec: sys::CUgraphExec,
    last_use: u64,
    context: Arc<Context>,
}

/// An output's memory; whoever was given it keeps it alive.
struct Output {
    memory: Arc<DeviceMemory>,
    bytes: usize,
    dtype: DType,
    shape: Vec<usize>,
}

struct Stream(sys::CUstream, Arc<Context>);

// SAFETY: driver handles may be used from any thread that makes the context current, which `begin`
// and every `drop` do; a session is used by one thread at a time.
unsafe impl Send for Cuda {}

impl Cuda {
    pub(crate) fn new(ordinal: u32, artifact: &Artifact, plan: &Plan) -> Result<Cuda, Error> {
        let context = Context::retain(ordinal)?;
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; `stream` is written by the call.
        let made = unsafe { sys::cuStreamCreate(&mut stream, flags) };
        check(&context, "creating a stream", made)?;
        let stream = Stream(stream, context.clone());
        let code = arch::code_of(context.capability, plan, &artifact.manifest().codes);
        let entry = &artifact.manifest().codes[code];
        let kernels = Kernels::load(&context, plan, entry, artifact.code(code)?)?;
        Ok(Cuda {
            graphs: Vec::new(),
            graph_uses: 0,
            use_graphs: false,
            recording: false,
            kernels,
            inputs: Vec::new(),
            outputs: Vec::new(),
            places: Vec::new(),
            timer: None,
            constants: None,
            stream,
            context,
        })
    }

    /// Replays runs of one shape as a graph from now on.
    pub(crate) fn use_graphs(&mut self) {
        self.use_graphs = true;
    }

    /// Copies the constants in use to the GPU, each distinct one once, and notes where they are.
    pub(crate) fn upload_constants(&mut self, artifact: &Artifact, used: &[bool], addresses: &mut [u64]) -> Result<(), Error> {
        // By place in memory: entries that share bytes in the file share them on the GPU.
        let mut places: BTreeMap<(usize, usize), u64> = BTreeMap::new();
        let mut total = 0u64;
        let key = |bytes: &[u8]| (bytes.as_ptr() as usize, bytes.len());
        for n in (0..used.len()).filter(|n| used[*n]) {
            let bytes = artifact.tensor(n);
            places.entry(key(bytes)).or_insert_with(|| {
                let at = total;
                total = (at + bytes.len() as u64).next_multiple_of(256);
                at
            });
        }
        let block = self.alloc(total as usize)?;
        let mut copied = std::collections::BTreeSet::new();
        for n in (0..used.len()).filter(|n| used[*n]) {
            let bytes = artifact.tensor(n);
            addresses[n] = block.address + places[&key(bytes)];
            if copied.insert(key(bytes)) {
                self.write(addresses[n], bytes)?;
            }
        }
        self.constants = Some(block);
        self.wait()
    }

    fn wait(&self) -> Result<(), Error> {
        // SAFETY: the stream is ours.
        check(&self.context, "waiting for the GPU", unsafe { sys::cuStreamSynchronize(self.stream.0) })
    }

    /// Memory for the n-th input, large enough.
    fn stage(&mut self, n: usize, bytes: usize) -> Result<u64, Error> {
        if self.inputs.len() <= n {
            self.inputs.resize_with(n + 1, || None);
        }
        if let Some(block) = &self.inputs[n]
            && block.bytes >= bytes
        {
            return Ok(block.address);
        }
        self.inputs[n] = None;
        let block = self.alloc(bytes)?;
        let address = block.address;
        self.inputs[n] = Some(block);
        Ok(address)
    }

    /// The recorded run that this one is a repetition of.
    fn recorded_run(&mut self, key: u64) -> Option<&mut Graph> {
        let places = &self.places;
        self.graphs.iter_mut().find(|g| g.key == key && g.inputs == *places)
    }

    /// Drops the graph that was not used for longest, when there are too many.
    fn make_room(&mut self) {
        if self.graphs.len() >= MAX_GRAPHS
            && let Some(oldest) = (0..self.graphs.len()).min_by_key(|i| self.graphs[*i].last_use)
        {
            self.graphs.remove(oldest);
        }
    }

    fn launch_graph(&mut self, key: u64) -> Result<(), Error> {
        self.graph_uses += 1;
        let (uses, stream, context) = (self.graph_uses, self.stream.0, self.context.clone());
        let Some(graph) = self.recorded_run(key) else { return Ok(()) };
        graph.last_use = uses;
        // SAFETY: an instantiated graph, our stream; its addresses are alive: `alloc` drops graphs,
        // and inputs are where they were.
        check(&context, "launching a graph", unsafe { sys::cuGraphLaunch(graph.exec, stream) })
    }

    /// Leaves a capture that went wrong.
    fn end_capture(&mut self) {
        if !std::mem::take(&mut self.recording) {
            return;
        }
        let mut graph = std::ptr::null_mut();
        // SAFETY: ends the capture that `record` began; what it gives is destroyed.
        unsafe {
            sys::cuStreamEndCapture(self.stream.0, &mut graph);
            if !graph.is_null() {
                sys::cuGraphDestroy(graph);
            }
        }
    }

    fn copy_to_host(&self, from: u64, to: &mut [u8]) -> Result<(), Error> {
        if to.is_empty() {
            return Ok(());
        }
        let (at, len) = (to.as_mut_ptr().cast(), to.len());
        // SAFETY: the caller's memory, at least that long on both sides; callers wait for the copy
        // before they give `to` back.
        let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(at, from, len, self.stream.0) };
        check(&self.context, "copying to the host", copied)
    }
}

impl Backend for Cuda {
    fn name(&self) -> &str {
        &self.context.name
    }

    fn alloc(&mut self, bytes: usize) -> Result<Block, Error> {
        // Recorded graphs hold addresses that may be about to go.
        self.graphs.clear();
        let memory = DeviceMemory::new(&self.context, bytes)?;
        Ok(Block { address: memory.address, bytes, _owner: Box::new(memory) })
    }

    fn begin(&mut self, _parallel: bool) -> Result<(), Error> {
        self.context.make_current()
    }

    fn input(&mut self, n: usize, value: &Value) -> Result<u64, Error> {
        let place = match value {
            Value::Host(host) => {
                let to = self.stage(n, host.bytes().len())?;
                self.write(to, host.bytes())?;
                to
            }
            Value::Device(buffer) if buffer.device != self.context.name => {
                return Err(Error::WrongDevice { input: format!("#{n}"), found: buffer.device.clone(), session: self.context.name.clone() });
            }
            // What this run will overwrite is copied, all else is read where it is.
            Value::Device(buffer) if self.outputs.iter().flatten().any(|o| o.memory.address == buffer.address) => {
                let bytes = crate::tensor::byte_len(buffer.dtype, &buffer.shape)?;
                let to = self.stage(n, bytes)?;
                self.copy(buffer.address, to, bytes)?;
                to
            }
            Value::Device(buffer) => buffer.address,
        };
        if self.places.len() <= n {
            self.places.resize(n + 1, 0);
        }
        self.places[n] = place;
        Ok(place)
    }

    fn output(&mut self, n: usize, dtype: DType, shape: &[i64], tensor: Option<&mut Tensor>) -> Result<u64, Error> {
        if let Some(tensor) = tensor {
            tensor.reset_i64(dtype, shape)?;
        }
        if self.outputs.len() <= n {
            self.outputs.resize_with(n + 1, || None);
        }
        if let Some(output) = &self.outputs[n]
            && output.dtype == dtype
            && output.shape.iter().map(|d| *d as i64).eq(shape.iter().copied())
        {
            return Ok(output.memory.address);
        }
        let shape: Vec<usize> = shape.iter().map(|d| *d as usize).collect();
        let needed = crate::tensor::byte_len(dtype, &shape)?;
        let (memory, bytes) = match self.outputs[n].take() {
            Some(old) if old.bytes >= needed => (old.memory, old.bytes),
            _ => {
                self.graphs.clear();
                (Arc::new(DeviceMemory::new(&self.context, needed)?), needed)
            }
        };
        let address = memory.address;
        self.outputs[n] = Some(Output { memory, bytes, dtype, shape });
        Ok(address)
    }

    fn launch(&mut self, launch: &Launch, args: &[u64]) -> Result<(), Error> {
        let LaunchShape::Gpu(shape) = &launch.shape else {
            return Err(Error::Plan("a CPU launch on a GPU".into()));
        };
        self.kernels.launch(&self.context, self.stream.0, launch, shape, args)
    }

    fn copy(&mut self, from: u64, to: u64, bytes: usize) -> Result<(), Error> {
        if bytes == 0 || from == to {
            return Ok(());
        }
        // SAFETY: both are buffers of the session, at least that long.
        let copied = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream.0) };
        check(&self.context, "copying", copied)
    }

    fn read(&mut self, from: u64, into: &mut [u8]) -> Result<(), Error> {
        self.copy_to_host(from, into)?;
        self.wait()
    }

    fn write(&mut self, to: u64, bytes: &[u8]) -> Result<(), Error> {
        if bytes.is_empty() {
            return Ok(());
        }
        let from = bytes.as_ptr().cast();
        // SAFETY: a buffer of the session at least that long; from pageable memory the driver
        // takes its copy before it returns, or the run waits before it ends.
        let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from, bytes.len(), self.stream.0) };
        check(&self.context, "uploading", copied)
    }

    fn finish(&mut self, outputs: &mut [Tensor]) -> Result<(), Error> {
        for (tensor, output) in outputs.iter_mut().zip(&self.outputs) {
            if let Some(output) = output {
                self.copy_to_host(output.memory.address, tensor.bytes_mut())?;
            }
        }
        self.wait()
    }

    fn abandon(&mut self) {
        self.end_capture();
        // Inputs may still be on their way out of the caller's memory.
        self.wait().ok();
    }

    fn launch_timed(&mut self, launch: &Launch, args: &[u64]) -> Result<f64, Error> {
        let LaunchShape::Gpu(shape) = &launch.shape else {
            return Err(Error::Plan("a CPU launch on a GPU".into()));
        };
        let timer = match &mut self.timer {
            Some(timer) => timer,
            none => none.insert(Timer::new(&self.context)?),
        };
        timer.time(self.stream.0, launch.kernel, || self.kernels.launch(&self.context, self.stream.0, launch, shape, args))
    }

    fn record(&mut self, key: u64) -> Result<Replay, Error> {
        if !self.use_graphs {
            return Ok(Replay::Off);
        }
        match self.recorded_run(key) {
            Some(graph) if !graph.exec.is_null() => {
                self.launch_graph(key)?;
                return Ok(Replay::Done);
            }
            Some(_) => {}
            None => {
                self.make_room();
                self.graph_uses += 1;
                let (inputs, context) = (self.places.clone(), self.context.clone());
                self.graphs.push(Graph { key, inputs, exec: std::ptr::null_mut(), last_use: self.graph_uses, context });
                return Ok(Replay::Off);
            }
        }
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: our stream, not capturing.
        let began = unsafe { sys::cuStreamBeginCapture_v2(self.stream.0, mode) };
        check(&self.context, "recording a graph", began)?;
        self.recording = true;
        Ok(Replay::Record)
    }

    fn recorded(&mut self, key: u64) -> Result<(), Error> {
        self.recording = false;
        let (mut graph, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: ends the capture that `record` began.
        let ended = unsafe { sys::cuStreamEndCapture(self.stream.0, &mut graph) };
        check(&self.context, "recording a graph", ended)?;
        // SAFETY: the graph just recorded; it is not needed once instantiated.
        let made = unsafe {
            let made = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0);
            sys::cuGraphDestroy(graph);
            made
        };
        check(&self.context, "instantiating a graph", made)?;
        match self.recorded_run(key) {
            Some(graph) => graph.exec = exec,
            None => return Err(Error::Plan("a recording for no run".into())),
        }
        self.launch_graph(key)
    }

    fn stop_recording(&mut self) {
        self.end_capture();
        self.use_graphs = false;
        self.graphs.clear();
    }

    fn keeps_outputs(&self) -> bool {
        true
    }

    fn kept_outputs(&mut self) -> Vec<DeviceBuffer> {
        let buffer = |o: &Output| DeviceBuffer {
            device: self.context.name.clone(),
            address: o.memory.address,
            dtype: o.dtype,
            shape: o.shape.clone(),
            _owner: Some(Box::new(o.memory.clone())),
        };
        self.outputs.iter().flatten().map(buffer).collect()
    }

    fn download(&mut self, buffer: &DeviceBuffer) -> Result<Tensor, Error> {
        if buffer.device != self.context.name {
            return Err(Error::NoGpu(format!("{} cannot read the memory of {}", self.context.name, buffer.device)));
        }
        self.context.make_current()?;
        let mut tensor = Tensor::zeros(buffer.dtype, &buffer.shape)?;
        self.copy_to_host(buffer.address, tensor.bytes_mut())?;
        self.wait()?;
        Ok(tensor)
    }

    fn upload(&mut self, tensor: &TensorRef) -> Result<DeviceBuffer, Error> {
        self.context.make_current()?;
        let memory = DeviceMemory::new(&self.context, tensor.bytes().len())?;
        self.write(memory.address, tensor.bytes())?;
        self.wait()?;
        Ok(DeviceBuffer {
            device: self.context.name.clone(),
            address: memory.address,
            dtype: tensor.dtype(),
            shape: tensor.shape().to_vec(),
            _owner: Some(Box::new(memory)),
        })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.context.make_current().ok();
        if !self.exec.is_null() {
            // SAFETY: instantiated by `recorded`, destroyed once; the driver waits for its launches.
            unsafe { sys::cuGraphExecDestroy(self.exec) };
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.1.make_current().ok();
        // SAFETY: created by `new`, destroyed once.
        unsafe {
            sys::cuStreamSynchronize(self.0);
            sys::cuStreamDestroy_v2(self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn without_a_gpu_the_error_says_what_is_missing() {
        if let Err(error) = Device::cuda(0) {
            assert_eq!(error.exit_code(), 4);
            assert!(error.to_string().starts_with("no usable GPU: "), "{error}");
            assert!(list().is_empty());
        }
        let none = Device::cuda(4000).unwrap_err();
        assert_eq!(none.exit_code(), 4);
    }
}
