//! Runs a body: binds its segments, does its steps, nested bodies included.
use crate::analysis::BodyInfo;
use crate::backend::{Backend, Launch};
use crate::error::Shape;
use crate::frame::{Child, Frame, LoopState, Slot};
use crate::plan::{Body, BufferId, BufferKind, KernelId, Manifest, Plan, Step};
use crate::tensor::Tensor;
use crate::{DimExpr, Error};

/// Time of one launch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LaunchTime {
    /// Which kernel of the plan.
    pub kernel: KernelId,
    /// Time in nanoseconds, on the device.
    pub ns: f64,
}

/// A launch as [`Session::run_observed`](crate::Session::run_observed) shows it.
#[derive(Clone, Debug)]
pub struct Observed {
    /// Which kernel of the plan.
    pub kernel: KernelId,
    /// Which launch of the plan, counted as the plan names them: both branches of an `If`, and the
    /// body of a `Loop` once.
    pub place: usize,
    /// Its run-time sizes.
    pub dims: Vec<i64>,
    /// Values of the manifest's symbols; of use only where they are defined by now.
    pub sizes: Vec<i64>,
    /// Its buffers before the launch, in argument order.
    pub before: Vec<Tensor>,
    /// The same buffers after it.
    pub after: Vec<Tensor>,
}

/// What a run does after a launch was shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Go on with what the launch left.
    GoOn,
    /// Put [`Observed::after`] into the buffers first: for trying what another kernel would do to
    /// the rest of the run.
    WriteBack,
}

/// What all bodies of one run share.
pub(crate) struct Run<'a, 'w> {
    pub(crate) backend: &'a mut dyn Backend,
    pub(crate) manifest: &'a Manifest,
    pub(crate) plan: &'a Plan,
    /// Whether the plan is for a GPU.
    pub(crate) gpu: bool,
    /// Address of each constant.
    pub(crate) constants: &'a [u64],
    /// Value of each symbol; of use only where it is defined.
    pub(crate) symbols: &'a mut [i64],
    /// Where outputs go; none of them when they stay on the device.
    pub(crate) outputs: &'a mut [Tensor],
    /// Room for a launch's addresses.
    pub(crate) args: &'a mut Vec<u64>,
    /// What to note of each launch.
    pub(crate) watch: Watch<'w>,
}

/// What to note of each launch of a run.
pub(crate) enum Watch<'a> {
    Nothing,
    Times(&'a mut Vec<LaunchTime>),
    Values(&'a mut dyn FnMut(&mut Observed) -> Then),
}

/// A value on its way into or out of a nested body.
struct Passed<'a> {
    address: u64,
    bytes: usize,
    dims: &'a [i64],
}

impl Run<'_, '_> {
    /// Does all steps. Inputs and captures of the frame have their addresses.
    pub(crate) fn body(&mut self, info: &BodyInfo, body: &Body, frame: &mut Frame) -> Result<(), Error> {
        let mut next_child = 0;
        for segment in 0..info.segments.len() {
            frame.bind(self, info, body, segment)?;
            let steps = info.segments[segment].steps.clone();
            let (first, end) = (steps.start, steps.end);
            for i in steps {
                // Only the last step of a segment defines symbols.
                let defines: &[u32] = if i + 1 == end { &info.segments[segment].defines } else { &[] };
                match &body.steps[i] {
                    Step::Launch { args, .. } => {
                        self.args.clear();
                        self.args.extend(args.iter().map(|a| frame.address[a.index()]));
                        let Some(launch) = frame.launch(segment, i - first) else { continue };
                        match &mut self.watch {
                            Watch::Nothing => self.backend.launch(launch, self.args)?,
                            Watch::Times(times) => {
                                let ns = self.backend.launch_timed(launch, self.args)?;
                                times.push(LaunchTime { kernel: launch.kernel, ns });
                            }
                            Watch::Values(_) => self.launch_observed(info, body, frame, launch, i)?,
                        }
                    }
                    Step::Copy { from, to } => {
                        let (from, to) = (from.index(), to.index());
                        let (have, room) = (frame.bytes[from], frame.bytes[to]);
                        if have != room {
                            let why = format!("step {i} copies {have} bytes to {room}");
                            return Err(Error::Plan(why));
                        }
                        self.backend.copy(frame.address[from], frame.address[to], have)?;
                    }
                    Step::Bind { buffer, symbol } => {
                        let value = self.read_i64(frame.address[buffer.index()])?;
                        self.define(*symbol, value, || "computed at run time".into())?;
                    }
                    Step::If { cond, then_body, else_body, outputs } => {
                        let truth = self.read_bool(frame.address[cond.index()])?;
                        let (which, branch) = if truth { (0, then_body) } else { (1, else_body) };
                        let k = next_child + which;
                        let inner = &info.children[k];
                        next_child += 2;
                        let at = Nested { info, body, segment, outputs, defines };
                        self.with_child(frame, k, |run, frame, child| {
                            child.frame.capture(branch, frame);
                            run.body(inner, branch, &mut child.frame)?;
                            run.leave_branch(frame, &at, inner, branch, child)
                        })?;
                    }
                    Step::Loop { trip, cond, body: inner_body, carried, outputs } => {
                        let trip = match trip {
                            Some(id) => Some(self.read_i64(frame.address[id.index()])?).filter(|n| *n >= 0).unwrap_or(i64::MAX),
                            None => i64::MAX,
                        };
                        let go = match cond {
                            Some(id) => self.read_bool(frame.address[id.index()])?,
                            None => true,
                        };
                        let trip = trip.min(self.backend.max_trips());
                        let inner = &info.children[next_child];
                        let k = next_child;
                        next_child += 1;
                        let at = Nested { info, body, segment, outputs, defines };
                        self.with_child(frame, k, |run, frame, child| {
                            child.frame.capture(inner_body, frame);
                            let start = Start { trip, go, carried };
                            let n = run.iterate(frame, info, &start, inner, inner_body, child)?;
                            run.leave_loop(frame, &at, carried, n, child)
                        })?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Launches, and shows the buffers before and after.
    fn launch_observed(&mut self, info: &BodyInfo, body: &Body, frame: &Frame, launch: &Launch, step: usize) -> Result<(), Error> {
        let Step::Launch { args, .. } = &body.steps[step] else { return Ok(()) };
        let values = |backend: &mut dyn Backend| -> Result<Vec<Tensor>, Error> {
            let mut tensors = Vec::with_capacity(args.len());
            for id in args {
                let shape: Vec<usize> = frame.shape(info, *id).iter().map(|d| *d as usize).collect();
                let mut tensor = Tensor::zeros(body.buffers[id.index()].dtype, &shape)?;
                backend.read(frame.address[id.index()], tensor.bytes_mut())?;
                tensors.push(tensor);
            }
            Ok(tensors)
        };
        let before = values(self.backend)?;
        self.backend.launch(launch, self.args)?;
        let after = values(self.backend)?;
        let (dims, sizes) = (launch.dims.clone(), self.symbols.to_vec());
        let mut observed = Observed { kernel: launch.kernel, place: info.places[step], dims, sizes, before, after };
        let Watch::Values(show) = &mut self.watch else { return Ok(()) };
        if show(&mut observed) == Then::WriteBack {
            for (id, tensor) in args.iter().zip(&observed.after) {
                // Constants, inputs and what is captured are never written.
                let root = &body.buffers[info.buffers[id.index()].root.index()];
                let writable = matches!(root.kind, BufferKind::Arena | BufferKind::Output(_));
                if writable && tensor.bytes().len() == frame.bytes[id.index()] {
                    self.backend.write(frame.address[id.index()], tensor.bytes())?;
                }
            }
        }
        Ok(())
    }

    /// Gives a child to `f` together with its parent, and puts it back whatever happens.
    fn with_child(&mut self, frame: &mut Frame, k: usize, f: impl FnOnce(&mut Self, &mut Frame, &mut Child) -> Result<(), Error>) -> Result<(), Error> {
        let Some(mut child) = frame.children[k].take() else {
            return Err(Error::Plan("a nested body runs within itself".into()));
        };
        let done = f(self, frame, &mut child);
        frame.children[k] = Some(child);
        done
    }

    /// Hands a branch's outputs to the buffers outside.
    fn leave_branch(&mut self, frame: &mut Frame, at: &Nested, inner: &BodyInfo, branch: &Body, child: &Child) -> Result<(), Error> {
        for (id, from) in at.outputs.iter().zip(&branch.outputs) {
            let dims = child.frame.shape(inner, *from);
            self.take_shape(&at.body.buffers[id.index()].dims, dims, at.defines)?;
        }
        self.bind_outputs(frame, at)?;
        for (id, from) in at.outputs.iter().zip(&branch.outputs) {
            let value = Passed { address: child.frame.address[from.index()], bytes: child.frame.bytes[from.index()], dims: child.frame.shape(inner, *from) };
            self.hand_out(frame, *id, &value)?;
        }
        Ok(())
    }

    /// Runs the loop's body until it ends; returns the number of iterations. The carried values
    /// are then in `carry.slots[n % 2]`, unless there was no iteration.
    fn iterate(&mut self, frame: &Frame, info: &BodyInfo, start: &Start, inner: &BodyInfo, body: &Body, child: &mut Child) -> Result<i64, Error> {
        let Child { frame: own, carry } = child;
        let n_carried = start.carried.len();
        carry.prepare(self, n_carried, body.outputs.len() - 1 - n_carried)?;
        let control = carry.control.as_ref().map_or(0, |b| b.address);
        let (mut n, mut go) = (0i64, start.go);
        while go && n < start.trip {
            self.backend.write(control, &n.to_le_bytes())?;
            self.backend.write(control + 8, &[1])?;
            own.address[body.inputs[0].index()] = control;
            own.address[body.inputs[1].index()] = control + 8;
            let read = (n % 2) as usize;
            for k in 0..n_carried {
                let id = body.inputs[k + 2];
                let dims = &body.buffers[id.index()].dims;
                if n == 0 {
                    let outer = start.carried[k];
                    own.address[id.index()] = frame.address[outer.index()];
                    self.take_shape(dims, frame.shape(info, outer), &inner.input_symbols)?;
                } else {
                    let slot = &carry.slots[read][k];
                    own.address[id.index()] = slot.block.as_ref().map_or(0, |b| b.address);
                    self.take_shape(dims, &slot.dims, &inner.input_symbols)?;
                }
            }
            self.body(inner, body, own)?;
            go = self.read_bool(own.address[body.outputs[0].index()])?;
            for k in 0..n_carried {
                let id = body.outputs[k + 1];
                let slot = &mut carry.slots[1 - read][k];
                let bytes = own.bytes[id.index()];
                let to = slot.reserve(self, bytes)?;
                self.backend.copy(own.address[id.index()], to, bytes)?;
                slot.set(bytes, own.shape(inner, id));
            }
            for (k, id) in body.outputs[1 + n_carried..].iter().enumerate() {
                let (from, bytes) = (own.address[id.index()], own.bytes[id.index()]);
                carry.scans[k].append(self, n, from, bytes, own.shape(inner, *id))?;
            }
            n += 1;
        }
        Ok(n)
    }

    /// Hands a loop's results to the buffers outside.
    fn leave_loop(&mut self, frame: &mut Frame, at: &Nested, carried: &[BufferId], n: i64, child: &mut Child) -> Result<(), Error> {
        let slots = &child.carry.slots[(n % 2) as usize];
        for (k, id) in at.outputs.iter().enumerate() {
            let dims = &at.body.buffers[id.index()].dims;
            if let Some(initial) = carried.get(k) {
                let shape = if n == 0 { frame.shape(at.info, *initial) } else { &slots[k].dims };
                self.take_shape(dims, shape, at.defines)?;
                continue;
            }
            let scan = &mut child.carry.scans[k - carried.len()];
            if n == 0 {
                // No slice was made: a size that only slices would tell is 0.
                for dim in dims {
                    if let Some((s, ..)) = dim.linear()
                        && at.defines.contains(&s)
                    {
                        self.define(s, 0, || "a loop without iterations".into())?;
                    }
                }
                scan.bytes = 0;
                scan.dims.clear();
                for dim in dims {
                    let extent = self.eval(dim)?;
                    scan.dims.push(extent);
                }
            } else {
                scan.dims[0] = n;
            }
            self.take_shape(dims, &scan.dims, at.defines)?;
        }
        self.bind_outputs(frame, at)?;
        let slots = &child.carry.slots[(n % 2) as usize];
        for (k, id) in at.outputs.iter().enumerate() {
            let address = |slot: &Slot| slot.block.as_ref().map_or(0, |b| b.address);
            match carried.get(k) {
                Some(initial) if n == 0 => {
                    let (from, bytes) = (frame.address[initial.index()], frame.bytes[initial.index()]);
                    self.backend.copy(from, frame.address[id.index()], bytes)?;
                }
                _ => {
                    let slot = match k.checked_sub(carried.len()) {
                        Some(scan) => &child.carry.scans[scan],
                        None => &slots[k],
                    };
                    let value = Passed { address: address(slot), bytes: slot.bytes, dims: &slot.dims };
                    self.hand_out(frame, *id, &value)?;
                }
            }
        }
        Ok(())
    }

    /// Where a step defined symbols, what they size can be placed now.
    fn bind_outputs(&mut self, frame: &mut Frame, at: &Nested) -> Result<(), Error> {
        if at.defines.is_empty() {
            return Ok(());
        }
        frame.bind(self, at.info, at.body, at.segment + 1)
    }

    fn hand_out(&mut self, frame: &Frame, to: BufferId, value: &Passed) -> Result<(), Error> {
        if frame.bytes[to.index()] != value.bytes {
            let shape = Shape(value.dims.iter().map(|d| *d as usize).collect());
            return Err(Error::Plan(format!("buffer {} cannot take {shape}", to.0)));
        }
        self.backend.copy(value.address, frame.address[to.index()], value.bytes)
    }

    /// Defines the fresh symbols among `dims` from a shape, and checks all others against it.
    pub(crate) fn take_shape(&mut self, dims: &[DimExpr], shape: &[i64], fresh: &[u32]) -> Result<(), Error> {
        for (dim, extent) in dims.iter().zip(shape) {
            if let Some((s, value)) = dim.solve(*extent)
                && fresh.contains(&s)
            {
                self.define(s, value, || "a size computed at run time".into())?;
            }
        }
        for (dim, extent) in dims.iter().zip(shape) {
            let expected = self.eval(dim)?;
            if expected != *extent {
                let why = format!("a nested body passes {extent} where `{dim}` is {expected}");
                return Err(Error::Plan(why));
            }
        }
        Ok(())
    }

    /// Gives a symbol its value, within its range.
    pub(crate) fn define(&mut self, symbol: u32, value: i64, what: impl FnOnce() -> String) -> Result<(), Error> {
        let about = &self.manifest.symbols[symbol as usize];
        if value < about.min || value > about.max || value < 0 {
            return Err(Error::SizeRange { what: what(), symbol: about.name.clone(), value, min: about.min.max(0), max: about.max });
        }
        self.symbols[symbol as usize] = value;
        Ok(())
    }

    pub(crate) fn eval(&self, dim: &DimExpr) -> Result<i64, Error> {
        dim.eval(self.symbols).map_err(|source| Error::Size { what: format!("`{dim}`"), source })
    }

    fn read_i64(&mut self, from: u64) -> Result<i64, Error> {
        let mut bytes = [0; 8];
        self.backend.read(from, &mut bytes)?;
        Ok(i64::from_le_bytes(bytes))
    }

    fn read_bool(&mut self, from: u64) -> Result<bool, Error> {
        let mut byte = [0];
        self.backend.read(from, &mut byte)?;
        Ok(byte[0] != 0)
    }
}

/// Where an If or Loop stands, and what receives its results.
struct Nested<'a> {
    info: &'a BodyInfo,
    body: &'a Body,
    segment: usize,
    outputs: &'a [BufferId],
    defines: &'a [u32],
}

/// How a loop starts.
struct Start<'a> {
    trip: i64,
    go: bool,
    carried: &'a [BufferId],
}

impl Frame {
    /// Addresses of what a nested body sees of the body around it.
    fn capture(&mut self, body: &Body, around: &Frame) {
        for (n, buffer) in body.buffers.iter().enumerate() {
            if let BufferKind::Captured(outer) = buffer.kind {
                self.address[n] = around.address[outer.index()];
            }
        }
    }
}

impl LoopState {
    fn prepare(&mut self, run: &mut Run, carried: usize, scans: usize) -> Result<(), Error> {
        if self.control.is_none() {
            self.control = Some(run.backend.alloc(16)?);
        }
        for side in &mut self.slots {
            side.resize_with(carried, Slot::default);
        }
        self.scans.resize_with(scans, Slot::default);
        Ok(())
    }
}

impl Slot {
    fn set(&mut self, bytes: usize, dims: &[i64]) {
        self.bytes = bytes;
        self.dims.clear();
        self.dims.extend_from_slice(dims);
    }

    /// Adds the slice of iteration `n`; all slices have one shape.
    fn append(&mut self, run: &mut Run, n: i64, from: u64, bytes: usize, dims: &[i64]) -> Result<(), Error> {
        if n == 0 {
            self.bytes = 0;
            self.dims.clear();
            self.dims.push(0);
            self.dims.extend_from_slice(dims);
        } else if self.dims[1..] != *dims {
            return Err(Error::Plan("the slices of a loop's output differ in shape".into()));
        }
        let end = self.bytes + bytes;
        if self.block.as_ref().is_none_or(|b| b.bytes < end) {
            // Double, so that copying stays linear in the end.
            let bigger = run.backend.alloc(end.max(self.bytes * 2))?;
            if let Some(old) = &self.block {
                run.backend.copy(old.address, bigger.address, self.bytes)?;
            }
            self.block = Some(bigger);
        }
        let to = self.block.as_ref().map_or(0, |b| b.address) + self.bytes as u64;
        run.backend.copy(from, to, bytes)?;
        self.bytes = end;
        Ok(())
    }
}
