//! `Frame`: a body's memory and sizes, bound to concrete symbol values.
use crate::analysis::{BodyInfo, Memory};
use crate::backend::{Block, CpuShape, GpuShape, Launch, LaunchShape, MapShape};
use crate::exec::Run;
use crate::memory::{Request, place};
use crate::plan::{Body, BufferId, BufferKind, Kernel, Step};
use crate::{DimExpr, Error};
use std::sync::atomic::{AtomicU64, Ordering};

/// So many shapes of a body are remembered.
const REMEMBERED: usize = 8;

/// A body's buffers: where they are and how large, for the shape it is bound to.
pub(crate) struct Frame {
    /// Address of each buffer.
    pub(crate) address: Vec<u64>,
    /// Bytes of each buffer.
    pub(crate) bytes: Vec<usize>,
    /// Extents of all buffers; each one's range is in the analysis.
    pub(crate) dims: Vec<i64>,
    /// State of each segment.
    segments: Vec<SegmentState>,
    /// Frames of nested bodies, in step order; taken out while they run.
    pub(crate) children: Vec<Option<Child>>,
}

/// A nested body's frame, and for a loop what lives between iterations.
pub(crate) struct Child {
    pub(crate) frame: Frame,
    pub(crate) carry: LoopState,
}

/// Values of a loop between iterations, grown as needed.
#[derive(Default)]
pub(crate) struct LoopState {
    /// Iteration number and condition.
    pub(crate) control: Option<Block>,
    /// Carried values: read from one side, written to the other.
    pub(crate) slots: [Vec<Slot>; 2],
    /// Stacked scan outputs so far.
    pub(crate) scans: Vec<Slot>,
}

#[derive(Default)]
pub(crate) struct Slot {
    pub(crate) block: Option<Block>,
    pub(crate) bytes: usize,
    pub(crate) dims: Vec<i64>,
}

impl Slot {
    /// The address of at least `bytes`; what it held is lost when it has to move.
    pub(crate) fn reserve(&mut self, run: &mut Run, bytes: usize) -> Result<u64, Error> {
        match &self.block {
            Some(block) if block.bytes >= bytes => Ok(block.address),
            _ => {
                let block = run.backend.alloc(bytes)?;
                let address = block.address;
                self.block = Some(block);
                Ok(address)
            }
        }
    }
}

struct SegmentState {
    arena: Option<Block>,
    bindings: Vec<Binding>,
    current: Option<usize>,
    uses: u64,
}

/// A segment for particular symbol values.
struct Binding {
    /// Unlike that of any other binding of this process.
    id: u64,
    /// Values of the segment's symbols.
    key: Vec<i64>,
    arena_bytes: usize,
    /// For each buffer of the segment, in its order.
    bytes: Vec<usize>,
    /// Extents of the segment's buffers, in its order.
    dims: Vec<i64>,
    /// Offset in the arena, or of a view in the buffer it looks at.
    offsets: Vec<usize>,
    /// For each step of the segment, its launch if it is one.
    launches: Vec<Option<Launch>>,
    last_use: u64,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

impl Frame {
    pub(crate) fn new(info: &BodyInfo) -> Frame {
        let child = |i: &BodyInfo| Child { frame: Frame::new(i), carry: LoopState::default() };
        let segment = |_| SegmentState { arena: None, bindings: Vec::new(), current: None, uses: 0 };
        Frame {
            address: vec![0; info.buffers.len()],
            bytes: vec![0; info.buffers.len()],
            dims: vec![0; info.dims_len],
            segments: info.segments.iter().map(segment).collect(),
            children: info.children.iter().map(|i| Some(child(i))).collect(),
        }
    }

    /// The extents of a buffer.
    pub(crate) fn shape(&self, info: &BodyInfo, id: BufferId) -> &[i64] {
        &self.dims[info.buffers[id.index()].dims.clone()]
    }

    /// Bytes of all arenas as they are now, nested bodies' included.
    pub(crate) fn arena_bytes(&self) -> usize {
        let own: usize = self.segments.iter().filter_map(|s| s.arena.as_ref()).map(|b| b.bytes).sum();
        own + self.children.iter().flatten().map(|c| c.frame.arena_bytes()).sum::<usize>()
    }

    /// Whether a launch of this frame is worth more than one thread.
    pub(crate) fn is_parallel(&self, worth: impl Fn(&CpuShape) -> bool + Copy) -> bool {
        let own = self.segments.iter().filter_map(|s| s.bindings.get(s.current?)).any(|b| {
            b.launches.iter().flatten().any(|l| match &l.shape {
                LaunchShape::Cpu(cpu) => worth(cpu),
                LaunchShape::Gpu(_) => false,
            })
        });
        own || self.children.iter().flatten().any(|c| c.frame.is_parallel(worth))
    }

    /// What a step launches.
    pub(crate) fn launch(&self, segment: usize, step_in_segment: usize) -> Option<&Launch> {
        let state = &self.segments[segment];
        state.bindings[state.current?].launches[step_in_segment].as_ref()
    }

    /// Identifies the sizes and places that the segment has now.
    pub(crate) fn binding(&self, segment: usize) -> u64 {
        let state = &self.segments[segment];
        state.current.map_or(u64::MAX, |i| state.bindings[i].id)
    }

    /// Sizes and places the buffers of a segment for the symbols as they are. Nothing is
    /// computed or allocated when the shape is the last one.
    pub(crate) fn bind(&mut self, run: &mut Run, info: &BodyInfo, body: &Body, segment: usize) -> Result<(), Error> {
        let about = &info.segments[segment];
        let state = &mut self.segments[segment];
        state.uses += 1;
        let holds = |b: &Binding| about.symbols.iter().zip(&b.key).all(|(s, v)| run.symbols[*s as usize] == *v);
        let found = match state.current {
            Some(i) if holds(&state.bindings[i]) => i,
            _ => {
                let i = match state.bindings.iter().position(holds) {
                    Some(i) => i,
                    None => {
                        let new = Binding::new(run, info, body, segment)?;
                        let state = &mut self.segments[segment];
                        state.insert(new)
                    }
                };
                self.adopt(run, info, body, segment, i)?;
                i
            }
        };
        self.segments[segment].bindings[found].last_use = self.segments[segment].uses;
        self.place_given(run, info, body, segment, found)
    }

    /// Makes a binding the current one: sizes, and addresses of what the runtime places.
    fn adopt(&mut self, run: &mut Run, info: &BodyInfo, body: &Body, segment: usize, index: usize) -> Result<(), Error> {
        let state = &mut self.segments[segment];
        state.current = None;
        let binding = &state.bindings[index];
        if state.arena.as_ref().is_none_or(|a| a.bytes < binding.arena_bytes) {
            // Free first: the old and the new need not fit together.
            state.arena = None;
            state.arena = Some(run.backend.alloc(binding.arena_bytes)?);
        }
        let base = state.arena.as_ref().map_or(0, |a| a.address);
        let mut at = 0;
        for (k, id) in info.segments[segment].buffers.iter().enumerate() {
            let id = id.index();
            let about = &info.buffers[id];
            self.bytes[id] = binding.bytes[k];
            let extents = &binding.dims[at..at + about.dims.len()];
            self.dims[about.dims.clone()].copy_from_slice(extents);
            at += about.dims.len();
            match &body.buffers[id].kind {
                BufferKind::Const(n) => self.address[id] = run.constants[*n as usize],
                BufferKind::View { of, .. } if about.memory != Memory::Given => {
                    self.address[id] = self.address[of.index()] + binding.offsets[k] as u64;
                    let (root, start) = (about.root.index(), self.address[id]);
                    check_view(id, start, self.bytes[id], self.address[root], self.bytes[root])?;
                }
                _ if about.memory == Memory::Arena => {
                    self.address[id] = base + binding.offsets[k] as u64;
                }
                _ => {}
            }
        }
        state.current = Some(index);
        Ok(())
    }

    /// Addresses of outputs that the caller receives, and of views of what is given from outside.
    fn place_given(&mut self, run: &mut Run, info: &BodyInfo, body: &Body, segment: usize, index: usize) -> Result<(), Error> {
        for (k, id) in info.segments[segment].buffers.iter().enumerate() {
            let about = &info.buffers[id.index()];
            if about.memory != Memory::Given {
                continue;
            }
            let buffer = &body.buffers[id.index()];
            match &buffer.kind {
                BufferKind::Output(n) => {
                    let n = *n as usize;
                    let shape = &self.dims[about.dims.clone()];
                    self.address[id.index()] = run.backend.output(n, buffer.dtype, shape, run.outputs.get_mut(n))?;
                }
                BufferKind::View { of, .. } => {
                    let offset = self.segments[segment].bindings[index].offsets[k];
                    let (id, root) = (id.index(), about.root.index());
                    let start = self.address[of.index()] + offset as u64;
                    self.address[id] = start;
                    check_view(id, start, self.bytes[id], self.address[root], self.bytes[root])?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A view may not reach beyond the buffer it is part of.
fn check_view(id: usize, start: u64, bytes: usize, root: u64, root_bytes: usize) -> Result<(), Error> {
    let end = ((start - root) as usize).checked_add(bytes);
    if end.is_some_and(|end| end <= root_bytes) {
        return Ok(());
    }
    Err(Error::Plan(format!("buffer {id} reaches beyond the buffer it is a view of")))
}

impl SegmentState {
    fn insert(&mut self, new: Binding) -> usize {
        if self.bindings.len() < REMEMBERED {
            self.bindings.push(new);
            return self.bindings.len() - 1;
        }
        let by_age = |i: &usize| self.bindings[*i].last_use;
        let oldest = (0..self.bindings.len()).min_by_key(by_age).unwrap_or(0);
        self.bindings[oldest] = new;
        oldest
    }
}

fn eval(run: &Run, expr: &DimExpr, what: &str) -> Result<i64, Error> {
    expr.eval(run.symbols).map_err(|source| Error::Size { what: format!("{what} `{expr}`"), source })
}

fn eval_size(run: &Run, expr: &DimExpr, what: &str) -> Result<usize, Error> {
    let value = eval(run, expr, what)?;
    usize::try_from(value).map_err(|_| Error::Plan(format!("{what} `{expr}` is {value}")))
}

impl Binding {
    fn new(run: &Run, info: &BodyInfo, body: &Body, segment: usize) -> Result<Self, Error> {
        let about = &info.segments[segment];
        let mut binding = Binding {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            key: about.symbols.iter().map(|s| run.symbols[*s as usize]).collect(),
            arena_bytes: 0,
            bytes: Vec::with_capacity(about.buffers.len()),
            dims: Vec::new(),
            offsets: vec![0; about.buffers.len()],
            launches: Vec::with_capacity(about.steps.len()),
            last_use: 0,
        };
        let (mut wanting, mut requests) = (Vec::new(), Vec::new());
        for (k, id) in about.buffers.iter().enumerate() {
            let buffer = &body.buffers[id.index()];
            let mut count = Some(1usize);
            for dim in &buffer.dims {
                let extent = eval_size(run, dim, "a size")?;
                count = count.and_then(|c| c.checked_mul(extent));
                binding.dims.push(extent as i64);
            }
            let bytes = count
                .and_then(|c| buffer.dtype.bytes(c))
                .filter(|b| isize::try_from(*b).is_ok())
                .ok_or_else(|| Error::Plan(format!("buffer {} is too large", id.0)))?;
            binding.bytes.push(bytes);
            if let BufferKind::View { byte_offset, .. } = &buffer.kind {
                binding.offsets[k] = eval_size(run, byte_offset, "an offset")?;
            } else if info.buffers[id.index()].memory == Memory::Arena
                && let Some((first, last)) = info.buffers[id.index()].live
            {
                wanting.push(k);
                requests.push(Request { bytes, first, last });
            }
        }
        let layout = place(&requests).ok_or_else(|| Error::Plan("its buffers exceed the address space".into()))?;
        binding.arena_bytes = layout.bytes;
        for (k, offset) in wanting.into_iter().zip(layout.offsets) {
            binding.offsets[k] = offset;
        }
        for i in about.steps.clone() {
            let launch = match &body.steps[i] {
                Step::Launch { kernel, dims, .. } => {
                    let evaluated: Result<_, _> = dims.iter().map(|d| eval(run, d, "a size")).collect();
                    let about = &run.plan.kernels[kernel.index()];
                    let shape = launch_shape(run, about)?;
                    Some(Launch { kernel: *kernel, dims: evaluated?, shape })
                }
                _ => None,
            };
            binding.launches.push(launch);
        }
        Ok(binding)
    }
}

fn launch_shape(run: &Run, kernel: &Kernel) -> Result<LaunchShape, Error> {
    let fail = |e: Error| match e {
        Error::Plan(why) => Error::Plan(format!("kernel `{}`: {why}", kernel.name)),
        other => other,
    };
    match (&kernel.cpu, &kernel.gpu) {
        (Some(cpu), _) if !run.gpu => Ok(LaunchShape::Cpu(CpuShape {
            extent: eval_size(run, &cpu.extent, "the extent").map_err(fail)? as i64,
            grain: eval(run, &cpu.grain, "the grain").map_err(fail)?.max(1),
            unit_ps: eval(run, &cpu.unit_ps, "the cost").map_err(fail)?.max(0),
            scratch: eval_size(run, &cpu.scratch, "the scratch").map_err(fail)?,
            takes_scratch: cpu.scratch.as_const() != Some(0),
        })),
        (_, Some(gpu)) => {
            let mut grid = [0; 3];
            for (to, expr) in grid.iter_mut().zip(&gpu.grid) {
                let value = eval(run, expr, "the grid").map_err(fail)?;
                *to = u32::try_from(value).map_err(|_| fail(Error::Plan(format!("a grid of {value} blocks"))))?;
            }
            let sizes = |list: &[DimExpr]| -> Result<Vec<u64>, Error> { list.iter().map(|e| Ok(eval_size(run, e, "a tensor map")? as u64)).collect() };
            let maps = gpu.tensor_maps.iter().map(|m| {
                Ok(MapShape { byte_offset: eval_size(run, &m.byte_offset, "a tensor map")? as u64, dims: sizes(&m.dims)?, strides: sizes(&m.strides)? })
            });
            let maps = maps.collect::<Result<_, _>>().map_err(fail)?;
            Ok(LaunchShape::Gpu(GpuShape { grid, maps }))
        }
        _ => Err(Error::Plan(format!("kernel `{}` cannot run here", kernel.name))),
    }
}
