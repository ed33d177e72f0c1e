//! `BodyInfo`: what holds of a body whatever its sizes, found once and checked on the way.
//!
//! A body's steps fall into segments: a step that defines symbols (Bind, or an If or Loop whose
//! outputs have sizes of their own) ends one. Within a segment all sizes are known, so its
//! buffers are placed together; a body without such steps is one segment.
use crate::DType;
use crate::DimExpr;
use crate::plan::{Body, Buffer, BufferId, BufferKind, CodeKind, Kernel, Manifest, Plan, Port, Step};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Bodies nest at most so deep.
const MAX_DEPTH: usize = 16;

pub(crate) struct BodyInfo {
    pub(crate) segments: Vec<SegmentInfo>,
    pub(crate) buffers: Vec<BufferInfo>,
    /// Length of all buffers' dims together.
    pub(crate) dims_len: usize,
    /// Symbols that the shapes of the body's inputs define.
    pub(crate) input_symbols: Vec<u32>,
    /// Nested bodies: of the then branch, the else branch, or the loop, in step order.
    pub(crate) children: Vec<BodyInfo>,
    /// Most buffers that a launch here or further in takes.
    pub(crate) max_args: usize,
    /// Of each step that is a launch: how many launches the plan names before it.
    pub(crate) places: Vec<usize>,
}

pub(crate) struct SegmentInfo {
    pub(crate) steps: Range<usize>,
    /// Buffers whose size is known from here on; views after what they look at.
    pub(crate) buffers: Vec<BufferId>,
    /// Symbols on which sizes, places and launches of this segment depend.
    pub(crate) symbols: Vec<u32>,
    /// Symbols that the last step defines.
    pub(crate) defines: Vec<u32>,
}

pub(crate) struct BufferInfo {
    /// The segment from which on its size is known.
    pub(crate) segment: usize,
    /// The buffer whose memory it is part of: itself, unless it is a view.
    pub(crate) root: BufferId,
    /// Where its root's memory comes from.
    pub(crate) memory: Memory,
    /// Its part of the flat list of dims.
    pub(crate) dims: Range<usize>,
    /// First and last step that needs its memory, if any; of roots only.
    pub(crate) live: Option<(usize, usize)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    /// Placed in the body's arena.
    Arena,
    /// A constant's.
    Const,
    /// Given from outside: inputs, captures, and outputs of the top level.
    Given,
}

/// What the analysis of a nested body needs from around it.
struct Around<'a> {
    body: &'a Body,
    levels: &'a [usize],
    /// The segment of the step that holds the nested body.
    segment: usize,
    defined: &'a BTreeSet<u32>,
    depth: usize,
}

/// Checks a plan and finds what holds of it. The message of an error names the place.
pub(crate) fn analyse(manifest: &Manifest, plan: &Plan) -> Result<BodyInfo, String> {
    let gpu = manifest.codes.get(plan.code as usize).map(|c| c.kind) != Some(CodeKind::SharedObject);
    let mut info = Analysis { manifest, plan, gpu }.body(&plan.body, None)?;
    number(&mut info, &plan.body, &mut 0);
    Ok(info)
}

/// Gives each launch its place in the plan, nested bodies where they stand.
fn number(info: &mut BodyInfo, body: &Body, next: &mut usize) {
    let mut children = info.children.iter_mut();
    for step in &body.steps {
        info.places.push(*next);
        let nested = match step {
            Step::Launch { .. } => {
                *next += 1;
                continue;
            }
            Step::Copy { .. } | Step::Bind { .. } => continue,
            Step::If { then_body, else_body, .. } => vec![then_body, else_body],
            Step::Loop { body, .. } => vec![body],
        };
        for (child, body) in children.by_ref().take(nested.len()).zip(nested) {
            number(child, body, next);
        }
    }
}

struct Analysis<'a> {
    manifest: &'a Manifest,
    plan: &'a Plan,
    gpu: bool,
}

/// Segment from which on each symbol is defined, within one body.
type Levels = BTreeMap<u32, usize>;

fn need(holds: bool, message: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(message()) }
}

/// The first level at which all symbols of the expression are defined.
fn level_of(expr: &DimExpr, levels: &Levels) -> Result<usize, String> {
    let mut level = Ok(0);
    expr.visit_symbols(&mut |s| match (levels.get(&s), &mut level) {
        (Some(found), Ok(level)) => *level = (*level).max(*found),
        (None, Ok(_)) => level = Err(format!("symbol {s} in `{expr}` is never defined")),
        (_, Err(_)) => {}
    });
    level
}

fn is_scalar(buffer: &Buffer) -> bool {
    buffer.dims.iter().all(|d| d.as_const() == Some(1))
}

impl Analysis<'_> {
    fn body(&self, body: &Body, around: Option<Around>) -> Result<BodyInfo, String> {
        let depth = around.as_ref().map_or(0, |a| a.depth);
        need(depth < MAX_DEPTH, || format!("bodies nest deeper than {MAX_DEPTH}"))?;
        self.check_buffers(body, around.as_ref())?;

        // Symbols known on entry, then those that each step defines.
        let mut levels: Levels = match &around {
            Some(a) => a.defined.iter().map(|s| (*s, 0)).collect(),
            None => Levels::new(),
        };
        let mut input_symbols = Vec::new();
        let input_dims: Vec<&DimExpr> = match &around {
            None => self.manifest.inputs.iter().flat_map(|p| &p.dims).collect(),
            Some(_) => body.inputs.iter().flat_map(|b| &body.buffers[b.index()].dims).collect(),
        };
        for dim in input_dims {
            if let Some((s, ..)) = dim.linear()
                && !levels.contains_key(&s)
            {
                levels.insert(s, 0);
                input_symbols.push(s);
            }
        }
        let mut segments = Vec::new();
        let mut first = 0;
        for (i, step) in body.steps.iter().enumerate() {
            let defines = self.defined_by(body, step, &levels).map_err(|e| format!("step {i}: {e}"))?;
            if !defines.is_empty() {
                levels.extend(defines.iter().map(|s| (*s, segments.len() + 1)));
                segments.push((first..i + 1, defines));
                first = i + 1;
            }
        }
        segments.push((first..body.steps.len(), Vec::new()));
        for &s in levels.keys() {
            need((s as usize) < self.manifest.symbols.len(), || format!("no symbol {s}"))?;
        }

        let mut buffers = self.buffer_infos(body, &levels, around.is_none())?;
        for id in &body.inputs {
            let late = buffers[id.index()].segment > 0;
            need(!late, || format!("the size of input buffer {} is not known on entry", id.0))?;
        }
        if around.is_none() {
            for dim in self.manifest.inputs.iter().flat_map(|p| &p.dims) {
                let known = level_of(dim, &levels)? == 0;
                need(known, || format!("no input defines the size `{dim}`"))?;
            }
        }
        let mut info_segments: Vec<SegmentInfo> =
            segments.into_iter().map(|(steps, defines)| SegmentInfo { steps, buffers: Vec::new(), symbols: Vec::new(), defines }).collect();
        for id in views_last(body)? {
            info_segments[buffers[id.index()].segment].buffers.push(id);
        }
        let mut children = Vec::new();
        let mut max_args = 1;
        for (k, about) in info_segments.iter_mut().enumerate() {
            let mut exprs: BTreeSet<u32> = BTreeSet::new();
            let mut mention = |e: &DimExpr| {
                e.visit_symbols(&mut |s| {
                    exprs.insert(s);
                })
            };
            for id in &about.buffers {
                let buffer = &body.buffers[id.index()];
                buffer.dims.iter().for_each(&mut mention);
                if let BufferKind::View { byte_offset, .. } = &buffer.kind {
                    mention(byte_offset);
                }
            }
            for i in about.steps.clone() {
                let at = Place { body, buffers: &buffers, levels: &levels, segment: k, depth };
                let found = self.step(&at, &body.steps[i]).map_err(|e| format!("step {i}: {e}"))?;
                max_args = max_args.max(found.max_args);
                children.extend(found.children);
                if let Step::Launch { kernel, dims, .. } = &body.steps[i] {
                    dims.iter().for_each(&mut mention);
                    launch_exprs(&self.plan.kernels[kernel.index()], self.gpu).into_iter().for_each(&mut mention);
                }
                for id in mentioned(&body.steps[i]) {
                    touch(&mut buffers, id, i);
                }
            }
            about.symbols = exprs.into_iter().collect();
        }
        for id in &body.outputs {
            touch(&mut buffers, *id, body.steps.len());
        }
        let dims_len = buffers.last().map_or(0, |b| b.dims.end);
        Ok(BodyInfo { segments: info_segments, buffers, dims_len, input_symbols, children, max_args, places: Vec::new() })
    }

    /// Indices and dtypes of the buffers, inputs and outputs.
    fn check_buffers(&self, body: &Body, around: Option<&Around>) -> Result<(), String> {
        let has = |id: &BufferId| id.index() < body.buffers.len();
        need(body.inputs.iter().chain(&body.outputs).all(has), || "no such input or output".into())?;
        for (n, buffer) in body.buffers.iter().enumerate() {
            let id = BufferId(n as u32);
            let fits = match &buffer.kind {
                BufferKind::Input(k) => body.inputs.get(*k as usize) == Some(&id),
                BufferKind::Output(k) => body.outputs.get(*k as usize) == Some(&id),
                BufferKind::Const(k) => {
                    let Some(tensor) = self.manifest.tensors.get(*k as usize) else {
                        return Err(format!("buffer {n}: no tensor {k}"));
                    };
                    // In any shape of as many elements.
                    let count = buffer.dims.iter().try_fold(1i64, |n, d| n.checked_mul(d.as_const()?));
                    let stored = tensor.shape.iter().try_fold(1u64, |n, s| n.checked_mul(*s));
                    tensor.dtype == buffer.dtype && count.is_some() && count.and_then(|n| u64::try_from(n).ok()) == stored
                }
                BufferKind::Arena => true,
                BufferKind::View { of, .. } => has(of),
                BufferKind::Captured(outer) => around.is_some_and(|a| {
                    a.body.buffers.get(outer.index()).is_some_and(|b| b.dtype == buffer.dtype && b.dims == buffer.dims) && a.levels[outer.index()] <= a.segment
                }),
            };
            need(fits, || format!("buffer {n}: {:?} does not fit", buffer.kind))?;
        }
        for (k, id) in body.inputs.iter().enumerate() {
            let kind = &body.buffers[id.index()].kind;
            need(*kind == BufferKind::Input(k as u32), || format!("input {k} is {kind:?}"))?;
        }
        if around.is_none() {
            let ports = |ids: &[BufferId], ports: &[Port]| {
                ids.len() == ports.len()
                    && ids.iter().zip(ports).all(|(id, port)| {
                        let buffer = &body.buffers[id.index()];
                        buffer.dtype == port.dtype && buffer.dims == port.dims
                    })
            };
            need(ports(&body.inputs, &self.manifest.inputs), || "inputs are not the model's".into())?;
            need(ports(&body.outputs, &self.manifest.outputs), || "outputs are not the model's".into())?;
        }
        Ok(())
    }

    fn buffer_infos(&self, body: &Body, levels: &Levels, top: bool) -> Result<Vec<BufferInfo>, String> {
        let mut infos: Vec<BufferInfo> = Vec::with_capacity(body.buffers.len());
        let mut at = 0;
        for (n, buffer) in body.buffers.iter().enumerate() {
            let mut segment = 0;
            for dim in &buffer.dims {
                segment = segment.max(level_of(dim, levels).map_err(|e| format!("buffer {n}: {e}"))?);
            }
            let dims = at..at + buffer.dims.len();
            at = dims.end;
            let memory = match buffer.kind {
                BufferKind::Arena | BufferKind::View { .. } => Memory::Arena,
                BufferKind::Const(_) => Memory::Const,
                BufferKind::Output(_) if !top => Memory::Arena,
                _ => Memory::Given,
            };
            infos.push(BufferInfo { segment, root: BufferId(n as u32), memory, dims, live: None });
        }
        for id in views_last(body)? {
            if let BufferKind::View { of, byte_offset } = &body.buffers[id.index()].kind {
                let offset = level_of(byte_offset, levels)?;
                let (root, memory) = (infos[of.index()].root, infos[of.index()].memory);
                let below = infos[of.index()].segment;
                let info = &mut infos[id.index()];
                (info.root, info.memory) = (root, memory);
                info.segment = info.segment.max(offset).max(below);
            }
        }
        Ok(infos)
    }

    /// Symbols that a step defines, given what is defined before it.
    fn defined_by(&self, body: &Body, step: &Step, levels: &Levels) -> Result<Vec<u32>, String> {
        let mut found = Vec::new();
        match step {
            Step::Launch { .. } | Step::Copy { .. } => {}
            Step::Bind { symbol, .. } => {
                need(!levels.contains_key(symbol), || format!("symbol {symbol} defined twice"))?;
                found.push(*symbol);
            }
            Step::If { outputs, .. } | Step::Loop { outputs, .. } => {
                for id in outputs {
                    let buffer = body.buffers.get(id.index()).ok_or("no such buffer")?;
                    for dim in &buffer.dims {
                        if let Some((s, ..)) = dim.linear()
                            && !levels.contains_key(&s)
                            && !found.contains(&s)
                        {
                            found.push(s);
                        }
                    }
                }
            }
        }
        Ok(found)
    }

    /// Checks one step: indices, counts, dtypes, and that all sizes it needs are known.
    fn step(&self, at: &Place, step: &Step) -> Result<Found, String> {
        let mut found = Found { children: Vec::new(), max_args: 0 };
        match step {
            Step::Launch { kernel, args, dims } => {
                let n = kernel.index();
                let kernel = self.plan.kernels.get(n).ok_or_else(|| format!("no kernel {n}"))?;
                let fits = args.len() == kernel.n_args as usize && dims.len() == kernel.n_dims as usize;
                need(fits, || {
                    format!("kernel `{}` takes {} buffers and {} sizes, given {} and {}", kernel.name, kernel.n_args, kernel.n_dims, args.len(), dims.len())
                })?;
                found.max_args = args.len();
                for arg in args {
                    at.readable(*arg)?;
                }
                let has = if self.gpu { kernel.gpu.is_some() } else { kernel.cpu.is_some() };
                need(has, || format!("kernel `{}` has no launch for this target", kernel.name))?;
                for expr in dims.iter().chain(launch_exprs(kernel, self.gpu)) {
                    let level = level_of(expr, at.levels)?;
                    need(level <= at.segment, || format!("`{expr}` is not known yet"))?;
                }
            }
            Step::Copy { from, to } => {
                at.readable(*from)?;
                at.writable(*to, at.segment)?;
            }
            Step::Bind { buffer, .. } => at.scalar(*buffer, DType::I64)?,
            Step::If { cond, then_body, else_body, outputs } => {
                at.scalar(*cond, DType::Bool)?;
                for body in [then_body, else_body] {
                    need(body.inputs.is_empty(), || "a branch has inputs".into())?;
                    need(body.outputs.len() == outputs.len(), || "a branch has another number of outputs".into())?;
                    found.child(self.body(body, Some(at.around()?.as_ref()))?);
                    for (inner, outer) in body.outputs.iter().zip(outputs) {
                        at.writable(*outer, at.segment + 1)?;
                        same(at.buffer(*outer)?, &body.buffers[inner.index()], 0)?;
                    }
                }
            }
            Step::Loop { trip, cond, body, carried, outputs } => {
                if let Some(trip) = trip {
                    at.scalar(*trip, DType::I64)?;
                }
                if let Some(cond) = cond {
                    at.scalar(*cond, DType::Bool)?;
                }
                let n_scans = outputs.len().checked_sub(carried.len());
                let fits = body.inputs.len() == carried.len() + 2 && n_scans.is_some_and(|n| body.outputs.len() == 1 + carried.len() + n);
                need(fits, || "the loop's body has another number of inputs or outputs".into())?;
                found.child(self.body(body, Some(at.around()?.as_ref()))?);
                let inner = |id: BufferId| &body.buffers[id.index()];
                let counter = inner(body.inputs[0]);
                let flags = [inner(body.inputs[1]), inner(body.outputs[0])];
                let plain = counter.dtype == DType::I64 && is_scalar(counter) && flags.iter().all(|b| b.dtype == DType::Bool && is_scalar(b));
                need(plain, || "iteration or condition of the loop is no scalar".into())?;
                for (k, id) in carried.iter().enumerate() {
                    at.readable(*id)?;
                    same(at.buffer(*id)?, inner(body.inputs[k + 2]), 0)?;
                    same(at.buffer(*id)?, inner(body.outputs[k + 1]), 0)?;
                    same(at.buffer(outputs[k])?, at.buffer(*id)?, 0)?;
                }
                for (outer, scan) in outputs.iter().zip(&body.outputs[1..]).skip(carried.len()) {
                    same(at.buffer(*outer)?, inner(*scan), 1)?;
                }
                for id in outputs {
                    at.writable(*id, at.segment + 1)?;
                }
            }
        }
        Ok(found)
    }
}

/// Same dtype, and rank larger by so many.
fn same(outer: &Buffer, inner: &Buffer, more: usize) -> Result<(), String> {
    need(outer.dtype == inner.dtype && outer.dims.len() == inner.dims.len() + more, || "a value goes in or out of a body with another dtype or rank".into())
}

struct Found {
    children: Vec<BodyInfo>,
    max_args: usize,
}

impl Found {
    fn child(&mut self, info: BodyInfo) {
        self.max_args = self.max_args.max(info.max_args);
        self.children.push(info);
    }
}

/// Where a step stands.
struct Place<'a> {
    body: &'a Body,
    buffers: &'a [BufferInfo],
    levels: &'a Levels,
    segment: usize,
    depth: usize,
}

/// What a nested body sees, owned for the time of its analysis.
struct Outside<'a> {
    body: &'a Body,
    levels: Vec<usize>,
    segment: usize,
    defined: BTreeSet<u32>,
    depth: usize,
}

impl Outside<'_> {
    fn as_ref(&self) -> Around<'_> {
        Around { body: self.body, levels: &self.levels, segment: self.segment, defined: &self.defined, depth: self.depth }
    }
}

impl<'a> Place<'a> {
    fn buffer(&self, id: BufferId) -> Result<&'a Buffer, String> {
        self.body.buffers.get(id.index()).ok_or_else(|| format!("no buffer {}", id.0))
    }

    fn readable(&self, id: BufferId) -> Result<(), String> {
        self.buffer(id)?;
        let known = self.buffers[id.index()].segment <= self.segment;
        need(known, || format!("the size of buffer {} is not known yet", id.0))
    }

    fn writable(&self, id: BufferId, by: usize) -> Result<(), String> {
        self.buffer(id)?;
        let info = &self.buffers[id.index()];
        need(info.segment <= by, || format!("the size of buffer {} is not known yet", id.0))?;
        let root = &self.body.buffers[info.root.index()].kind;
        need(matches!(root, BufferKind::Arena | BufferKind::Output(_)), || format!("buffer {} is read only", id.0))
    }

    fn scalar(&self, id: BufferId, dtype: DType) -> Result<(), String> {
        self.readable(id)?;
        let buffer = self.buffer(id)?;
        need(buffer.dtype == dtype && is_scalar(buffer), || format!("buffer {} is no {dtype} scalar", id.0))
    }

    fn around(&self) -> Result<Outside<'a>, String> {
        Ok(Outside {
            body: self.body,
            levels: self.buffers.iter().map(|b| b.segment).collect(),
            segment: self.segment,
            defined: self.levels.iter().filter(|(_, level)| **level <= self.segment).map(|(s, _)| *s).collect(),
            depth: self.depth + 1,
        })
    }
}

/// The expressions that a launch evaluates.
fn launch_exprs(kernel: &Kernel, gpu: bool) -> Vec<&DimExpr> {
    let mut exprs = Vec::new();
    if let (false, Some(cpu)) = (gpu, &kernel.cpu) {
        exprs.extend([&cpu.extent, &cpu.grain, &cpu.unit_ps, &cpu.scratch]);
    }
    if let (true, Some(gpu)) = (gpu, &kernel.gpu) {
        exprs.extend(&gpu.grid);
        for map in &gpu.tensor_maps {
            exprs.push(&map.byte_offset);
            exprs.extend(map.dims.iter().chain(&map.strides));
        }
    }
    exprs
}

/// Buffers of this body that a step needs, what its nested bodies capture included.
fn mentioned(step: &Step) -> Vec<BufferId> {
    let captures = |body: &Body| -> Vec<BufferId> {
        body.buffers
            .iter()
            .filter_map(|b| match b.kind {
                BufferKind::Captured(outer) => Some(outer),
                _ => None,
            })
            .collect()
    };
    match step {
        Step::Launch { args, .. } => args.clone(),
        Step::Copy { from, to } => vec![*from, *to],
        Step::Bind { buffer, .. } => vec![*buffer],
        Step::If { cond, then_body, else_body, outputs } => {
            let mut ids = vec![*cond];
            ids.extend(outputs);
            ids.extend(captures(then_body));
            ids.extend(captures(else_body));
            ids
        }
        Step::Loop { trip, cond, body, carried, outputs } => {
            let mut ids: Vec<BufferId> = trip.iter().chain(cond).copied().collect();
            ids.extend(carried.iter().chain(outputs));
            ids.extend(captures(body));
            ids
        }
    }
}

fn touch(buffers: &mut [BufferInfo], id: BufferId, step: usize) {
    let root = buffers[id.index()].root;
    let live = &mut buffers[root.index()].live;
    *live = Some(live.map_or((step, step), |(first, last)| (first.min(step), last.max(step))));
}

/// All buffers, each view after the buffer it looks at; an error when views go in a circle.
fn views_last(body: &Body) -> Result<Vec<BufferId>, String> {
    let mut order = Vec::with_capacity(body.buffers.len());
    let mut placed = vec![false; body.buffers.len()];
    let mut chain = Vec::new();
    for n in 0..body.buffers.len() {
        let mut at = n;
        while !placed[at] {
            chain.push(at);
            need(chain.len() <= body.buffers.len(), || format!("buffer {n} is a view of itself"))?;
            match &body.buffers[at].kind {
                BufferKind::View { of, .. } => at = of.index(),
                _ => break,
            }
        }
        while let Some(id) = chain.pop() {
            if !placed[id] {
                placed[id] = true;
                order.push(BufferId(id as u32));
            }
        }
    }
    Ok(order)
}
