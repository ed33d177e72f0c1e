//! Kernel families: from a region and a schedule to a kernel.
//!
//! A [`Family`] lists the schedules with which it can run a region on a target, the most promising first, and
//! builds the kernel of one. [`build`] takes the first family of [`FAMILIES`] that applies: specialised ones
//! stand before the general loops, which take everything.
pub mod attention;
pub mod attention_few;
pub mod conv_cpu;
pub mod cost;
pub mod cumulative;
pub mod depthwise_cpu;
pub mod elementwise;
pub mod expr;
pub mod flash;
mod flat;
pub mod fold;
pub mod gemm_cpu;
pub mod gemm_gpu;
pub mod gemm_mma;
#[cfg(test)]
mod gemm_test;
pub mod hopper_gemm;
#[cfg(test)]
mod hopper_interp_test;
pub mod hopper_region;
pub mod hopper_samples;
#[cfg(test)]
mod hopper_test;
pub(crate) mod hopper_words;
mod implicit;
mod micro;
pub mod naive;
pub mod nest;
pub mod pack;
pub mod packed;
pub mod reduce;
pub mod resize;
pub mod rewrite;
pub mod rnn;
pub mod scatter;
pub mod separable_cpu;
pub mod sort;
pub mod space;
pub mod transpose;
pub mod tree;
mod weights;
pub mod winograd;

use crate::{
    targets::Target,
    tile::{self, hopper::HopperWord},
};
use pavage_ir::{DType, Dim, Region, Schedule, Tensor};

/// A kernel with all that a plan needs to launch it.
#[derive(Clone, Debug)]
pub struct Built {
    /// The kernel. Buffers: the region's arguments in order, then its outputs in order.
    pub kernel: tile::Kernel,
    /// The schedule it was built with.
    pub schedule: Schedule,
    /// What each `i64` dim parameter of the kernel is, over size symbols.
    pub dims: Vec<Dim>,
    /// How a CPU runs it.
    pub cpu: Option<CpuShape>,
    /// Blocks of a GPU launch; threads, cluster and shared memory are the kernel's own.
    pub grid: Option<[Dim; 3]>,
    /// Arguments (constants) that the kernel reads in another form, and how to make it.
    pub packs: Vec<(usize, Pack)>,
}

impl Built {
    /// A kernel without packed arguments, walked as `walk` says.
    pub fn new(kernel: tile::Kernel, schedule: &Schedule, dims: Vec<Dim>, walk: nest::Walk) -> Built {
        let mut cpu = walk.cpu;
        if let Some(shape) = &mut cpu {
            shape.scratch = shape.scratch.clone() + Dim::from(kernel.scratch_bytes() as i64);
        }
        Built { kernel, schedule: schedule.clone(), dims, cpu, grid: walk.grid, packs: vec![] }
    }
}

/// A CPU launch: slices of `0..extent` that begin at multiples of `grain`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuShape {
    /// Units of the parallel dimension.
    pub extent: Dim,
    /// Smallest slice worth a call, in units; at least 1.
    pub grain: Dim,
    /// Predicted picoseconds of one unit on one core.
    pub unit_ps: Dim,
    /// Bytes of per-thread scratch, the kernel's fixed buffers included.
    pub scratch: Dim,
}

/// How a constant is rearranged for a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pack {
    /// The last two axes `[k, n]` as panels `[ceil(n / width), k, width]`, filled with zeros.
    Panels {
        /// Elements of `n` in a panel.
        width: usize,
        /// Whether the tensor has the axes as `[n, k]`.
        transposed: bool,
    },
    /// Column panels by a strided walk.
    Walk(pack::Walk),
}

impl Pack {
    /// The packed constant.
    pub fn apply(&self, x: &Tensor) -> Tensor {
        match self {
            Pack::Panels { width, transposed } => panels(x, *width, *transposed),
            Pack::Walk(walk) => walk.apply(x),
        }
    }
}

fn panels(x: &Tensor, width: usize, transposed: bool) -> Tensor {
    let rank = x.shape().len();
    let (outer, last) = x.shape().split_at(rank.saturating_sub(2));
    let (k, n) = match (last, transposed) {
        ([n, k], true) | ([k, n], false) => (*k, *n),
        _ => (1, x.count()),
    };
    let count = n.div_ceil(width);
    let batches: usize = outer.iter().product();
    let size = x.dtype().bits() / 8;
    let mut bytes = vec![0u8; batches * count * k * width * size];
    for batch in 0..batches {
        for panel in 0..count {
            for i in 0..k {
                for lane in 0..width.min(n - panel * width) {
                    let j = panel * width + lane;
                    let from = batch * k * n + if transposed { j * k + i } else { i * n + j };
                    let to = ((batch * count + panel) * k + i) * width + lane;
                    bytes[to * size..][..size].copy_from_slice(&x.bytes()[from * size..][..size]);
                }
            }
        }
    }
    let shape: Vec<usize> = outer.iter().copied().chain([count, k, width]).collect();
    Tensor::new(x.dtype(), shape, bytes).expect("bytes of the packed shape")
}

/// What is known of a region's arguments beyond their types.
#[derive(Clone, Debug, Default)]
pub struct ArgFacts {
    /// The value of each argument that is a constant; such arguments may be packed. Missing entries are unknown.
    pub constants: Vec<Option<Tensor>>,
}

impl ArgFacts {
    /// The value of argument `i`, if it is a constant.
    pub fn constant(&self, i: usize) -> Option<&Tensor> {
        self.constants.get(i)?.as_ref()
    }
}

/// Why there is no kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// No family takes the region.
    #[error("no kernel family runs `{region}` ({kind}) on {target}; tried {tried}")]
    NoFamily {
        /// Name of the region.
        region: String,
        /// Its heart.
        kind: &'static str,
        /// The target.
        target: String,
        /// The families.
        tried: String,
    },
    /// A schedule names a family that does not exist or does not take the region.
    #[error("schedule `{schedule}` does not fit `{region}`")]
    Schedule {
        /// The schedule.
        schedule: String,
        /// Name of the region.
        region: String,
    },
    /// A family cannot build this after all.
    #[error("{family}: {reason}")]
    Unsupported {
        /// The family.
        family: &'static str,
        /// What it lacks.
        reason: String,
    },
}

/// A way to write kernels.
pub struct Family {
    /// Name, as in [`Schedule::family`].
    pub name: &'static str,
    /// What it covers, for `explain`.
    pub about: &'static str,
    /// Schedules that apply, best guess first; none where the family does not.
    pub schedules: fn(&Region, &Target, &ArgFacts) -> Vec<Schedule>,
    /// Build the kernel of one schedule.
    pub build: fn(&Region, &Schedule, &Target, &str, &ArgFacts) -> Result<Built, KernelError>,
}

/// Every family, in order of preference.
#[rustfmt::skip] // One a line: families come and go.
pub const FAMILIES: &[Family] = &[
    hopper_region::GEMM,
    attention_few::FAMILY,
    hopper_region::FLASH,
    gemm_mma::FAMILY,
    gemm_gpu::FAMILY,
    elementwise::FAMILY,
    packed::FAMILY,
    reduce::FAMILY,
    gemm_cpu::FAMILY,
    depthwise_cpu::FAMILY,
    separable_cpu::FAMILY,
    conv_cpu::FAMILY,
    winograd::FAMILY,
    attention::FAMILY,
    naive::POOL,
    naive::FAMILY,
    resize::FAMILY,
    cumulative::FAMILY,
    sort::TOPK,
    sort::NONZERO,
    rnn::FAMILY,
    scatter::FAMILY,
    tree::FAMILY,
];

/// The schedules of the first family that applies, best guess first.
pub fn schedules(region: &Region, target: &Target, facts: &ArgFacts) -> Vec<Schedule> {
    FAMILIES.iter().map(|f| (f.schedules)(region, target, facts)).find(|s| !s.is_empty()).unwrap_or_default()
}

/// The kernel of a region on a target, named `name` (a C identifier): with the schedule `chosen`, or with the first one
/// of the first family that applies.
pub fn build(region: &Region, target: &Target, name: &str, facts: &ArgFacts, chosen: Option<&Schedule>) -> Result<Built, KernelError> {
    if let Some(schedule) = chosen {
        let family = FAMILIES.iter().find(|f| f.name == schedule.family && !(f.schedules)(region, target, facts).is_empty());
        let family = family.ok_or_else(|| KernelError::Schedule { schedule: schedule.to_string(), region: region.name.clone() })?;
        return (family.build)(region, schedule, target, name, facts).map(|built| launched(built, target));
    }
    for family in FAMILIES {
        if let Some(schedule) = (family.schedules)(region, target, facts).first() {
            return (family.build)(region, schedule, target, name, facts).map(|built| launched(built, target));
        }
    }
    Err(KernelError::NoFamily {
        region: region.name.clone(),
        kind: region.kind(),
        target: target.name().to_owned(),
        tried: FAMILIES.iter().map(|f| f.name).collect::<Vec<_>>().join(", "),
    })
}

/// The kernel with what is known of its launch.
fn launched(mut built: Built, target: &Target) -> Built {
    if let Some(grid) = &built.grid {
        built.kernel.launch.grid = grid.each_ref().map(|d| d.as_const().and_then(|n| u32::try_from(n).ok()).unwrap_or(0));
    }
    overlapped(built, target)
}

/// Blocks up to which a kernel lets the next one come while it runs.
const FEW_BLOCKS: u32 = 8;

/// The kernel with its launch under the end of the one before, where GPUs can (programmatic dependent launch, CUDA programming guide): it is brought onto
/// the device as the blocks of that end, and waits for all that was written before it touches memory.
///
/// One of few blocks leaves the multiprocessors to the next kernel at once. Others do not: blocks that come before multiprocessors are free crowd on those
/// that are, and compute there at half the pace while others idle.
fn overlapped(mut built: Built, target: &Target) -> Built {
    if matches!(target, Target::Gpu(gpu) if gpu.sm >= 90) {
        let word = |w| tile::Stmt { op: tile::Op::Hopper(w), args: vec![], bufs: vec![], blocks: vec![], results: vec![] };
        // Of sizes that are open nothing is known.
        let few = (1..=FEW_BLOCKS).contains(&built.kernel.launch.grid.iter().product());
        let words = [Some(HopperWord::PdlWait), few.then_some(HopperWord::PdlTrigger)];
        built.kernel.body.stmts.splice(0..0, words.into_iter().flatten().map(word));
        built.kernel.launch.pdl = true;
    }
    built
}

/// A builder for `target`.
pub fn builder(name: &str, target: &Target) -> tile::Builder {
    let device = match target {
        Target::Cpu(c) => tile::Device::Cpu { lanes: c.lanes },
        Target::Gpu(_) => tile::Device::Gpu,
    };
    tile::Builder::new(name, device)
}

/// Elements of a native vector of `dtype` (as registers hold it) on a CPU; 1 on a GPU.
pub fn native_lanes(target: &Target, dtype: DType) -> usize {
    match target {
        Target::Cpu(c) => usize::from(c.lanes) * 32 / expr::reg(dtype).bits().max(8),
        Target::Gpu(_) => 1,
    }
}
