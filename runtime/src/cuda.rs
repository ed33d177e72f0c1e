//! The CUDA device: the driver alone, looked up when a session asks for it. One context, one
//! stream; weights are uploaded once, a plan without control flow is replayed as one graph.
mod arch;
mod driver;
mod kernels;

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
    /// By the sizes and places they are for; `None` after a first run, which loads what is lazily loaded.
    graphs: BTreeMap<u64, Option<Graph>>,
    graph_uses: u64,
    use_graphs: bool,
    recording: bool,
    kernels: Kernels,
    inputs: Vec<Option<Block>>,
    outputs: Vec<Option<Block>>,
    timer: Option<Timer>,
    constants: Option<Block>,
    stream: Stream,
    context: Arc<Context>,
}

struct Graph {
    exec: sys::CUgraphExec,
    last_use: u64,
    context: Arc<Context>,
}

struct Stream(sys::CUstream, Arc<Context>);

struct Timer {
    start: sys::CUevent,
    end: sys::CUevent,
    context: Arc<Context>,
}

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
            graphs: BTreeMap::new(),
            graph_uses: 0,
            use_graphs: false,
            recording: false,
            kernels,
            inputs: Vec::new(),
            outputs: Vec::new(),
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

    /// The n-th block of a list, made large enough.
    fn reserve(&mut self, output: bool, n: usize, bytes: usize) -> Result<u64, Error> {
        let list = if output { &mut self.outputs } else { &mut self.inputs };
        if list.len() <= n {
            list.resize_with(n + 1, || None);
        }
        if let Some(block) = &list[n]
            && block.bytes >= bytes
        {
            return Ok(block.address);
        }
        list[n] = None;
        let block = self.alloc(bytes)?;
        let address = block.address;
        let list = if output { &mut self.outputs } else { &mut self.inputs };
        list[n] = Some(block);
        Ok(address)
    }

    /// Drops the graph that was not used for longest, when there are too many.
    fn make_room(&mut self) {
        if self.graphs.len() < MAX_GRAPHS {
            return;
        }
        let age = |graph: &Option<Graph>| graph.as_ref().map_or(0, |g| g.last_use);
        if let Some(oldest) = self.graphs.iter().min_by_key(|(_, g)| age(g)).map(|(k, _)| *k) {
            self.graphs.remove(&oldest);
        }
    }

    fn launch_graph(&mut self, key: u64) -> Result<(), Error> {
        self.graph_uses += 1;
        let Some(Some(graph)) = self.graphs.get_mut(&key) else { return Ok(()) };
        graph.last_use = self.graph_uses;
        // SAFETY: an instantiated graph, our stream; its addresses are alive: `alloc` drops graphs.
        let launched = unsafe { sys::cuGraphLaunch(graph.exec, self.stream.0) };
        check(&self.context, "launching a graph", launched)
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
        match value {
            Value::Host(host) => {
                let to = self.reserve(false, n, host.bytes().len())?;
                self.write(to, host.bytes())?;
                Ok(to)
            }
            Value::Device(buffer) if buffer.device == self.context.name => {
                // Copied, so that recorded graphs find inputs where they were.
                let bytes = crate::tensor::byte_len(buffer.dtype, &buffer.shape)?;
                let to = self.reserve(false, n, bytes)?;
                self.copy(buffer.address, to, bytes)?;
                Ok(to)
            }
            Value::Device(buffer) => Err(Error::WrongDevice { input: format!("#{n}"), found: buffer.device.clone(), session: self.context.name.clone() }),
        }
    }

    fn output(&mut self, n: usize, dtype: DType, shape: &[i64], tensor: &mut Tensor) -> Result<u64, Error> {
        tensor.reset_i64(dtype, shape)?;
        self.reserve(true, n, tensor.bytes().len())
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
        if into.is_empty() {
            return Ok(());
        }
        let to = into.as_mut_ptr().cast();
        // SAFETY: a buffer of the session at least that long; `into` outlives the wait below.
        let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(to, from, into.len(), self.stream.0) };
        check(&self.context, "reading back", copied)?;
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
        for (tensor, block) in outputs.iter_mut().zip(&self.outputs) {
            let (Some(block), false) = (block, tensor.bytes().is_empty()) else { continue };
            let to = tensor.bytes_mut();
            let (at, len) = (to.as_mut_ptr().cast(), to.len());
            // SAFETY: the block was reserved for this tensor; the wait below ends the copy.
            let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(at, block.address, len, self.stream.0) };
            check(&self.context, "downloading an output", copied)?;
        }
        self.wait()
    }

    fn abandon(&mut self) {
        if self.recording {
            self.recording = false;
            let mut graph = std::ptr::null_mut();
            // SAFETY: ends the capture that `record` began; what it gives is destroyed.
            unsafe {
                sys::cuStreamEndCapture(self.stream.0, &mut graph);
                if !graph.is_null() {
                    sys::cuGraphDestroy(graph);
                }
            }
        }
        // Inputs may still be on their way out of the caller's memory.
        self.wait().ok();
    }

    fn launch_timed(&mut self, launch: &Launch, args: &[u64]) -> Result<f64, Error> {
        if self.timer.is_none() {
            self.timer = Some(Timer::new(&self.context)?);
        }
        let Some(Timer { start, end, .. }) = self.timer else { return Ok(0.0) };
        let (stream, context) = (self.stream.0, self.context.clone());
        let record = |event| {
            // SAFETY: our events, our stream.
            check(&context, "timing", unsafe { sys::cuEventRecord(event, stream) })
        };
        record(start)?;
        self.launch(launch, args)?;
        record(end)?;
        let mut ms = 0f32;
        // SAFETY: both events are recorded; `ms` is written by the call.
        let timed = unsafe {
            check(&self.context, "timing", sys::cuEventSynchronize(end))?;
            sys::cuEventElapsedTime(&mut ms, start, end)
        };
        check(&self.context, "timing", timed)?;
        Ok(f64::from(ms) * 1e6)
    }

    fn record(&mut self, key: u64) -> Result<Replay, Error> {
        if !self.use_graphs {
            return Ok(Replay::Off);
        }
        match self.graphs.get(&key) {
            Some(Some(_)) => {
                self.launch_graph(key)?;
                return Ok(Replay::Done);
            }
            Some(None) => {}
            None => {
                self.make_room();
                self.graphs.insert(key, None);
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
        let context = self.context.clone();
        self.graphs.insert(key, Some(Graph { exec, last_use: 0, context }));
        self.launch_graph(key)
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

impl Timer {
    fn new(context: &Arc<Context>) -> Result<Timer, Error> {
        let mut timer = Timer { start: std::ptr::null_mut(), end: std::ptr::null_mut(), context: context.clone() };
        for event in [&mut timer.start, &mut timer.end] {
            // SAFETY: the context is current; `event` is written by the call.
            check(context, "creating an event", unsafe { sys::cuEventCreate(event, 0) })?;
        }
        Ok(timer)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.context.make_current().ok();
        for event in [self.start, self.end] {
            if !event.is_null() {
                // SAFETY: made by `new`, destroyed once.
                unsafe { sys::cuEventDestroy_v2(event) };
            }
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.context.make_current().ok();
        // SAFETY: instantiated by `recorded`, destroyed once; the driver waits for its launches.
        unsafe { sys::cuGraphExecDestroy(self.exec) };
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
