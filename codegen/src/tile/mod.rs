//! The tile IR: the language kernels are written in, between the kernel families and the lowerings.
//!
//! A [`Kernel`] is structured SSA: statements in blocks, blocks nested in `for`, `if` and `while`; no
//! control-flow graph, no phi. Every value has a [`Ty`]; memory is reached through [`Buf`] handles with
//! an element index, so no pointer is ever a value. Index values are `i64` scalars; a `bool` is one bit in
//! a register and one byte in memory. The same language describes a CPU kernel (vectors, one slice
//! `lo..hi` of a parallel dimension) and one thread of a GPU block (scalars, small vectors, fragments).
//!
//! Every statement has one shape, [`Stmt`]: an operation with its attributes, value operands, buffer
//! operands, nested blocks and results. Printing, parsing, checking and walking need no case per operation.
pub mod builder;
pub mod check;
pub mod hopper;
mod hopper_check;
pub mod interp;
pub mod mma;
pub mod op;
pub mod range;
pub mod text;
mod tidy;

pub use builder::Builder;
pub use op::{DotKind, Op, ReduceFn, ShflKind, VoteKind};
use pavage_ir::DType;
use std::fmt;

/// An SSA value of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Val(pub u32);

/// A memory buffer of a kernel: an index into [`Kernel::bufs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Buf(pub u32);

/// The type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ty {
    /// One element.
    Scalar(DType),
    /// A SIMD vector of 2 or more lanes in one or more vector registers.
    Vec(DType, u16),
    /// A tuple of scalar registers of one thread (GPU): accumulators and matrix operands.
    /// Which matrix element a register holds is the business of the operation that makes it.
    Frag(DType, u16),
}

impl Ty {
    /// The index type.
    pub const INDEX: Ty = Ty::Scalar(DType::I64);
    /// A condition.
    pub const BOOL: Ty = Ty::Scalar(DType::Bool);

    /// Element type.
    pub const fn dtype(self) -> DType {
        match self {
            Ty::Scalar(d) | Ty::Vec(d, _) | Ty::Frag(d, _) => d,
        }
    }

    /// Elements: 1 for a scalar.
    pub const fn lanes(self) -> usize {
        match self {
            Ty::Scalar(_) => 1,
            Ty::Vec(_, n) | Ty::Frag(_, n) => n as usize,
        }
    }

    /// The same shape with another element type.
    pub const fn with(self, dtype: DType) -> Ty {
        match self {
            Ty::Scalar(_) => Ty::Scalar(dtype),
            Ty::Vec(_, n) => Ty::Vec(dtype, n),
            Ty::Frag(_, n) => Ty::Frag(dtype, n),
        }
    }

    /// A scalar for one lane, otherwise a vector.
    pub fn of_lanes(dtype: DType, lanes: usize) -> Ty {
        if lanes == 1 { Ty::Scalar(dtype) } else { Ty::Vec(dtype, u16::try_from(lanes).expect("at most 65535 lanes")) }
    }

    /// Whether there is more than one element.
    pub const fn is_scalar(self) -> bool {
        matches!(self, Ty::Scalar(_))
    }
}

impl fmt::Display for Ty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ty::Scalar(d) => write!(f, "{d}"),
            Ty::Vec(d, n) => write!(f, "<{n} x {d}>"),
            Ty::Frag(d, n) => write!(f, "frag<{n} x {d}>"),
        }
    }
}

/// Where a buffer lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// An argument of the kernel.
    Global,
    /// Memory that the threads of one GPU block share.
    Shared,
    /// Scratch of one thread: on the CPU a part of the per-thread scratch argument, on the GPU local memory.
    Local,
}

impl Space {
    /// The name in text.
    pub const fn name(self) -> &'static str {
        match self {
            Space::Global => "global",
            Space::Shared => "shared",
            Space::Local => "local",
        }
    }
}

/// What a kernel does with an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// Only loads. No other argument that is written may overlap it.
    Read,
    /// Only stores.
    Write,
    /// Loads and stores.
    ReadWrite,
}

impl Access {
    /// The name in text.
    pub const fn name(self) -> &'static str {
        match self {
            Access::Read => "read",
            Access::Write => "write",
            Access::ReadWrite => "readwrite",
        }
    }
}

/// A buffer's declaration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BufInfo {
    /// Where it lives.
    pub space: Space,
    /// Element type. A `bool` takes one byte; nibbles are packed two to a byte.
    pub dtype: DType,
    /// Elements, when the kernel fixes them. Arguments have none; a `Local` without one is the open-ended
    /// tail of the scratch, whose bytes the launcher adds to [`Kernel::scratch_bytes`].
    pub len: Option<u64>,
    /// Alignment of the first element in bytes; 0 means that of the element type (arguments) or 64 (others).
    pub align: u32,
    /// For arguments, how it is used; `ReadWrite` for others.
    pub access: Access,
    /// This buffer is the memory of another one from a byte offset on.
    pub alias: Option<(Buf, u64)>,
}

/// The kind of device a kernel is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// A CPU whose native vector holds `lanes` `f32`.
    Cpu {
        /// `f32` lanes of the native vector.
        lanes: u16,
    },
    /// One thread of an NVIDIA GPU block.
    Gpu,
}

/// What a GPU kernel fixes about its launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Threads of a block, at most 1024, one-dimensional.
    pub threads: u32,
    /// Blocks of the grid, per axis, where the kernel is for so many; 0 where sizes that are open decide.
    pub grid: [u32; 3],
    /// Blocks of a cluster, per axis; `[1, 1, 1]` launches without clusters.
    pub cluster: [u32; 3],
    /// Blocks that must fit on one multiprocessor, 0 to leave it open.
    pub min_ctas: u32,
    /// Register limit of a thread, 0 to leave it open.
    pub max_regs: u32,
    /// Whether the kernel overlaps its start with the end of the one before (programmatic dependent launch).
    pub pdl: bool,
}

impl Default for Launch {
    fn default() -> Self {
        Launch { threads: 128, grid: [0; 3], cluster: [1, 1, 1], min_ctas: 0, max_regs: 0, pdl: false }
    }
}

/// Statements in order, with the values they bind on entry and the values they hand out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Block {
    /// Values bound on entry: loop counter and carried values.
    pub params: Vec<Val>,
    /// The statements.
    pub stmts: Vec<Stmt>,
    /// Values handed to the enclosing statement.
    pub yields: Vec<Val>,
}

/// One operation applied.
#[derive(Clone, Debug, PartialEq)]
pub struct Stmt {
    /// What is done, with its attributes.
    pub op: Op,
    /// Value operands; each operation says their order.
    pub args: Vec<Val>,
    /// Buffer operands.
    pub bufs: Vec<Buf>,
    /// Nested blocks.
    pub blocks: Vec<Block>,
    /// Values it defines.
    pub results: Vec<Val>,
}

/// A kernel.
///
/// CPU entry: `extern "C" fn(bufs: *const *mut u8, dims: *const i64, lo: i64, hi: i64)`, `bufs` in the order
/// of [`Kernel::args`] and, when [`Kernel::needs_scratch`], one per-thread scratch pointer (64-byte aligned) last.
/// GPU parameters: the pointers in the order of `args`, the dims as `i64`, then the tensor maps by value.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// Symbol name: a C identifier.
    pub name: String,
    /// What it runs on.
    pub device: Device,
    /// Launch facts; meaningful for GPU kernels only.
    pub launch: Launch,
    /// Every buffer; those of `Space::Global` are the arguments.
    pub bufs: Vec<BufInfo>,
    /// Run-time sizes, in parameter order.
    pub dims: Vec<Val>,
    /// Tensor maps, in parameter order (Hopper).
    pub maps: Vec<hopper::TensorMap>,
    /// Type of every value, by [`Val`].
    pub types: Vec<Ty>,
    /// The body: no parameters, no yields.
    pub body: Block,
}

impl Kernel {
    /// Type of a value.
    pub fn ty(&self, v: Val) -> Ty {
        self.types[v.0 as usize]
    }

    /// Declaration of a buffer.
    pub fn buf(&self, b: Buf) -> &BufInfo {
        &self.bufs[b.0 as usize]
    }

    /// The arguments, in parameter order.
    pub fn args(&self) -> impl Iterator<Item = Buf> + '_ {
        (0..self.bufs.len() as u32).map(Buf).filter(|b| self.buf(*b).space == Space::Global && self.buf(*b).alias.is_none())
    }

    /// Byte offset of every fixed buffer of `space` when they are laid one after another, by buffer index
    /// (`None` for buffers elsewhere), and the bytes they take together. Aliases follow their owner.
    pub fn layout(&self, space: Space) -> (Vec<Option<u64>>, u64) {
        let mut at = 0u64;
        let mut offsets = vec![None; self.bufs.len()];
        // The open-ended buffer comes after all others, whatever its place in the list.
        for open in [false, true] {
            for (i, b) in self.bufs.iter().enumerate() {
                if b.space != space || b.alias.is_some() || space == Space::Global || b.len.is_none() != open {
                    continue;
                }
                let align = if b.align == 0 { 64 } else { u64::from(b.align) };
                at = at.next_multiple_of(align);
                offsets[i] = Some(at);
                at += b.dtype.bytes(b.len.unwrap_or(0) as usize) as u64;
            }
        }
        for (i, b) in self.bufs.iter().enumerate() {
            if let (Some((owner, bytes)), true) = (b.alias, b.space == space) {
                offsets[i] = offsets[owner.0 as usize].map(|o| o + bytes);
            }
        }
        (offsets, at)
    }

    /// Bytes of shared memory that one block takes.
    pub fn shared_bytes(&self) -> u64 {
        self.layout(Space::Shared).1
    }

    /// Bytes of per-thread scratch that a CPU kernel's fixed local buffers take.
    pub fn scratch_bytes(&self) -> u64 {
        self.layout(Space::Local).1
    }

    /// Whether the CPU entry takes a scratch pointer after the arguments.
    pub fn needs_scratch(&self) -> bool {
        matches!(self.device, Device::Cpu { .. }) && self.bufs.iter().any(|b| b.space == Space::Local)
    }

    /// Visit every statement, outer before inner, in text order.
    pub fn walk<'k>(&'k self, f: &mut impl FnMut(&'k Stmt)) {
        fn block<'k>(b: &'k Block, f: &mut impl FnMut(&'k Stmt)) {
            for s in &b.stmts {
                f(s);
                for inner in &s.blocks {
                    block(inner, f);
                }
            }
        }
        block(&self.body, f);
    }
}
