//! The reference interpreter: what a kernel means, run on the host.
//!
//! Structured code is flattened to steps with a program counter ([`flat`]), so that an *agent* can stop in the middle of
//! nested loops and go on later. An agent is up to 128 threads of one block that move in step under a mask (a warpgroup; a
//! CPU kernel is one agent of one thread). A seeded scheduler picks which agent moves next; when none can, that is a
//! deadlock and an error. So are accesses out of bounds, a barrier that only some threads of an agent reach, and two threads
//! touching the same shared byte between barriers when one of them writes, and an integer outside what [`super::range`] says of it.
//!
//! Device words go through [`Machine::word`]: they see values, memory and the blocks of the cluster, and may wait.
mod ampere;
mod exec;
mod flat;
mod memory;
mod value;
mod words;

use super::{Buf, Device, Kernel, Op, Stmt, Val, range::Ranges};
use flat::Step;
pub use memory::Memory;
pub use value::Data;

/// Threads that move in step at most: a warpgroup.
pub const GROUP: usize = 128;

/// What went wrong while interpreting.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("kernel {kernel}, {place}: {why}")]
pub struct InterpError {
    /// Kernel name.
    pub kernel: String,
    /// Block and threads, and the operation.
    pub place: String,
    /// What is wrong.
    pub why: String,
}

/// How far a device word got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Done; go on.
    Done,
    /// Not possible yet: try the same word again after other agents have moved.
    Wait,
}

/// Threads that move in step.
pub struct Agent {
    /// Block in the cluster it belongs to.
    pub block: usize,
    /// Its first thread in the block.
    pub first_thread: usize,
    /// Its threads.
    pub threads: usize,
    pc: usize,
    /// Which threads execute.
    pub mask: Vec<bool>,
    frames: Vec<exec::Frame>,
    values: Vec<Option<Data>>,
    waiting_at_barrier: bool,
    finished: bool,
}

/// One cluster of blocks (or one CPU call) under interpretation.
pub struct Machine<'k> {
    /// The kernel.
    pub kernel: &'k Kernel,
    steps: Vec<Step<'k>>,
    /// All memory it reaches.
    pub memory: Memory,
    /// Run-time sizes.
    pub dims: Vec<i64>,
    slice: (i64, i64),
    /// Blocks of the grid, per axis.
    pub grid: [u32; 3],
    /// Index in the grid of each block of the cluster.
    pub block_ids: Vec<[u32; 3]>,
    agents: Vec<Agent>,
    /// What integers may be.
    ranges: &'k Ranges,
    /// One that was something else.
    outside: Option<String>,
    /// Barriers passed, per block.
    epochs: Vec<u32>,
    words: words::State,
}

/// Run a CPU kernel on `bufs` (in argument order) for the slice `lo..hi`.
pub fn run_cpu(kernel: &Kernel, bufs: &mut [Vec<u8>], dims: &[i64], slice: (i64, i64)) -> Result<(), InterpError> {
    let scratch = kernel.scratch_bytes() as usize + (1 << 16);
    let ranges = Ranges::of(kernel);
    let mut machine = Machine::new(kernel, &ranges, bufs, dims, 1, scratch)?;
    machine.slice = slice;
    let result = machine.run(0);
    machine.memory.give_back(bufs);
    result
}

/// Run a GPU kernel on `bufs` (in argument order) over a grid of blocks. `seed` picks the order in which agents move.
pub fn run_gpu(kernel: &Kernel, bufs: &mut [Vec<u8>], dims: &[i64], grid: [u32; 3], seed: u64) -> Result<(), InterpError> {
    run_gpu_within(kernel, &Ranges::of(kernel), bufs, dims, grid, seed)
}

/// As [`run_gpu`], its integers held to these ranges.
pub(crate) fn run_gpu_within(kernel: &Kernel, ranges: &Ranges, bufs: &mut [Vec<u8>], dims: &[i64], grid: [u32; 3], seed: u64) -> Result<(), InterpError> {
    let cluster = kernel.launch.cluster;
    if kernel.launch.grid.iter().zip(grid).any(|(fixed, n)| *fixed != 0 && n > *fixed) {
        let why = format!("takes at most {:?} blocks, got {grid:?}", kernel.launch.grid);
        return Err(InterpError { kernel: kernel.name.clone(), place: "launch".to_owned(), why });
    }
    for z in (0..grid[2]).step_by(cluster[2].max(1) as usize) {
        for y in (0..grid[1]).step_by(cluster[1].max(1) as usize) {
            for x in (0..grid[0]).step_by(cluster[0].max(1) as usize) {
                let mut ids = vec![];
                for cz in 0..cluster[2] {
                    for cy in 0..cluster[1] {
                        for cx in 0..cluster[0] {
                            ids.push([x + cx, y + cy, z + cz]);
                        }
                    }
                }
                let mut machine = Machine::new(kernel, ranges, bufs, dims, ids.len(), 0)?;
                machine.grid = grid;
                machine.block_ids = ids;
                let result = machine.run(seed);
                machine.memory.give_back(bufs);
                result?;
            }
        }
    }
    Ok(())
}

impl<'k> Machine<'k> {
    fn new(kernel: &'k Kernel, ranges: &'k Ranges, bufs: &mut [Vec<u8>], dims: &[i64], blocks: usize, scratch: usize) -> Result<Machine<'k>, InterpError> {
        let fail = |why: String| InterpError { kernel: kernel.name.clone(), place: "launch".to_owned(), why };
        if bufs.len() != kernel.args().count() || dims.len() != kernel.dims.len() {
            return Err(fail(format!("takes {} buffers and {} sizes, got {} and {}", kernel.args().count(), kernel.dims.len(), bufs.len(), dims.len())));
        }
        let threads = if kernel.device == Device::Gpu { kernel.launch.threads as usize } else { 1 };
        let mut agents = vec![];
        for block in 0..blocks {
            for first in (0..threads).step_by(GROUP) {
                let n = (threads - first).min(GROUP);
                agents.push(Agent {
                    block,
                    first_thread: first,
                    threads: n,
                    pc: 0,
                    mask: vec![true; n],
                    frames: vec![],
                    values: vec![None; kernel.types.len()],
                    waiting_at_barrier: false,
                    finished: false,
                });
            }
        }
        let memory = Memory::new(kernel, bufs, blocks, threads, scratch);
        Ok(Machine {
            kernel,
            steps: flat::flatten(kernel),
            memory,
            dims: dims.to_vec(),
            slice: (0, 0),
            grid: [1, 1, 1],
            block_ids: vec![[0, 0, 0]; blocks],
            agents,
            ranges,
            outside: None,
            epochs: vec![0; blocks],
            words: words::State::default(),
        })
    }

    fn fail(&self, agent: usize, what: &str, why: String) -> InterpError {
        let a = &self.agents[agent];
        InterpError {
            kernel: self.kernel.name.clone(),
            place: format!("block {:?}, threads {}..{}, {what}", self.block_ids[a.block], a.first_thread, a.first_thread + a.threads),
            why,
        }
    }

    fn run(&mut self, seed: u64) -> Result<(), InterpError> {
        for agent in 0..self.agents.len() {
            let threads = self.agents[agent].threads;
            for (d, v) in self.kernel.dims.iter().zip(&self.dims) {
                self.agents[agent].values[d.0 as usize] = Some(Data::I(vec![*v; threads]));
            }
        }
        let mut state = seed.wrapping_mul(2).wrapping_add(1);
        let mut ready: Vec<usize> = (0..self.agents.len()).collect();
        loop {
            ready.retain(|a| !self.agents[*a].finished);
            if ready.is_empty() {
                return self.all_done().map_err(|why| self.fail(0, "end", why));
            }
            // A turn: every live agent once, from a random one on, each for a random number of steps.
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let start = (state >> 33) as usize % ready.len();
            let mut moved = false;
            for i in 0..ready.len() {
                let agent = ready[(start + i) % ready.len()];
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let budget = if ready.len() == 1 { usize::MAX } else { 1 + (state >> 58) as usize };
                moved |= self.advance(agent, budget)?;
                // Copies in flight land when they like, at the latest when nothing else can happen.
                if !moved && i + 1 == ready.len() || state >> 40 & 3 == 0 {
                    moved |= self.land(state >> 42).map_err(|why| self.fail(agent, "landing of a load", why))?;
                }
            }
            if !moved {
                let stuck = ready.iter().map(|a| self.agents[*a].describe(&self.steps)).collect::<Vec<_>>().join("; ");
                return Err(self.fail(ready[0], "deadlock", format!("no agent can move: {stuck}")));
            }
        }
    }

    /// Move an agent up to `budget` steps; whether it moved at all.
    fn advance(&mut self, agent: usize, budget: usize) -> Result<bool, InterpError> {
        let mut moved = false;
        for _ in 0..budget {
            if self.agents[agent].finished || self.agents[agent].waiting_at_barrier {
                break;
            }
            let Some(step) = self.steps.get(self.agents[agent].pc).copied() else {
                self.agents[agent].finished = true;
                return Ok(true);
            };
            let progress = self.step(agent, step)?;
            if let Some(why) = self.outside.take() {
                return Err(self.fail(agent, step.name(), why));
            }
            match progress {
                Progress::Done => moved = true,
                Progress::Wait => break,
            }
        }
        Ok(moved)
    }

    // ---- what device words see ----

    /// The agent.
    pub fn agent(&self, agent: usize) -> &Agent {
        &self.agents[agent]
    }

    /// The lanes of a value, thread by thread: lane `l` of thread `t` is element `t * lanes + l`.
    pub fn value(&self, agent: usize, v: Val) -> Result<&Data, String> {
        self.agents[agent].values[v.0 as usize].as_ref().ok_or_else(|| format!("{v} has no value yet"))
    }

    /// Set a value in the threads that execute; the others keep what they had.
    pub fn set(&mut self, agent: usize, v: Val, data: Data) {
        if self.kernel.ty(v).is_scalar() && self.kernel.ty(v).dtype().is_int() {
            self.within(agent, v, &data);
        }
        self.keep(agent, v, data);
    }

    /// As [`Machine::set`], for a loop counter that may have run past its end.
    fn keep(&mut self, agent: usize, v: Val, data: Data) {
        let lanes = self.kernel.ty(v).lanes();
        let a = &mut self.agents[agent];
        let slot = &mut a.values[v.0 as usize];
        match slot {
            Some(old) if a.mask.contains(&false) => old.merge(&data, &a.mask, lanes),
            _ => *slot = Some(data),
        }
    }

    /// Note an integer that the analysis rules out, in the threads that execute.
    fn within(&mut self, agent: usize, v: Val, data: &Data) {
        let (range, mask) = (self.ranges.get(v), &self.agents[agent].mask);
        if let Some(t) = (0..mask.len()).find(|t| mask[*t] && !range.contains(data.int(*t))) {
            self.outside.get_or_insert(format!("{v} is {}, not from {} to {}", data.int(t), range.lo, range.hi));
        }
    }

    /// An `i64` operand that is the same in all threads that execute.
    pub fn uniform(&self, agent: usize, v: Val) -> Result<i64, String> {
        let data = self.value(agent, v)?;
        let mut seen = None;
        for t in (0..self.agents[agent].threads).filter(|t| self.agents[agent].mask[*t]) {
            let x = data.int(t);
            if *seen.get_or_insert(x) != x {
                return Err(format!("{v} differs between threads that execute together"));
            }
        }
        Ok(seen.unwrap_or(0))
    }

    /// Run a device word.
    fn word(&mut self, agent: usize, stmt: &Stmt) -> Result<Progress, String> {
        match &stmt.op {
            Op::Mma(w) => ampere::run(self, agent, w, stmt),
            Op::Hopper(w) => words::hopper(self, agent, w, stmt),
            _ => Err("is no device word".to_owned()),
        }
    }

    /// Byte range of `n` elements of a buffer at `index` as thread `thread` of the agent sees it, bounds checked.
    pub fn locate(&self, agent: usize, buf: Buf, index: i64, n: usize, thread: usize) -> Result<memory::Place, String> {
        let a = &self.agents[agent];
        self.memory.locate(self.kernel, buf, index, n, a.block, a.first_thread + thread)
    }
}

impl Agent {
    fn describe(&self, steps: &[Step<'_>]) -> String {
        let at = match steps.get(self.pc) {
            Some(s) => s.name(),
            None => "the end",
        };
        format!("block {} threads {}.. at {}", self.block, self.first_thread, if self.waiting_at_barrier { "a barrier" } else { at })
    }
}
