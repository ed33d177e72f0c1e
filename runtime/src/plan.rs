//! What an artifact says: ports, tensors, code and plans, as data.
//!
//! Every `DimExpr` here is over [`Manifest::symbols`], those in launches and kernels included.
//! A symbol gets its value in one of four ways, always before anything that mentions it:
//! - from the shape of a graph input: a dimension that is `a*symbol + b` defines it;
//! - from the shape of a nested body's input (a carried value of a loop), likewise;
//! - from the shape of what an `If` or `Loop` gives back, by its output buffers, likewise;
//! - from a [`Step::Bind`], which reads a scalar that a kernel computed.
//!
//! A dimension whose symbols all have values already is checked instead.
use crate::{DType, DimExpr};
use serde::{Deserialize, Serialize};

/// The whole description; the JSON segment of an artifact.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Program and version that wrote the artifact.
    pub producer: String,
    /// Flags that the artifact was compiled with, as typed.
    pub flags: Vec<String>,
    /// Hash of the model file (hex), empty when there was none.
    pub input_hash: String,
    /// The run-time sizes; `DimExpr::Sym(i)` is the i-th.
    pub symbols: Vec<Symbol>,
    /// Graph inputs, in order.
    pub inputs: Vec<Port>,
    /// Graph outputs, in order.
    pub outputs: Vec<Port>,
    /// Constants of all plans; filled in by [`Writer`](crate::Writer).
    pub tensors: Vec<TensorEntry>,
    /// Code for each target; filled in by [`Writer`](crate::Writer).
    pub codes: Vec<CodeEntry>,
    /// One plan per name and target.
    pub plans: Vec<Plan>,
    /// What input sizes must satisfy beyond the symbols' own ranges.
    pub guards: Vec<Guard>,
}

/// A size known only at run time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Symbol {
    /// Name in messages: `batch`.
    pub name: String,
    /// Smallest value the code is right for.
    pub min: i64,
    /// Largest value the code is right for.
    pub max: i64,
}

/// An input or output of the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Port {
    /// Name in the model.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Extents; those of inputs give symbols their values.
    pub dims: Vec<DimExpr>,
}

/// A condition on sizes: `min <= expr <= max`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Guard {
    /// The size in question.
    pub expr: DimExpr,
    /// Smallest allowed value.
    pub min: i64,
    /// Largest allowed value.
    pub max: i64,
    /// What to tell the user: "compiled for seq up to 512".
    pub message: String,
}

/// A constant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// Name in the model, or of the prepacked form.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Extents.
    pub shape: Vec<u64>,
    /// Where the bytes are.
    pub data: TensorData,
}

/// Where a constant's bytes are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TensorData {
    /// In a segment of this file, at a multiple of 256 bytes.
    Embedded {
        /// Index of the segment in the table of contents.
        segment: u32,
        /// Bytes from the segment's start.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// In another file.
    External {
        /// Path relative to the artifact's folder; may not leave it.
        path: String,
        /// Bytes from the file's start.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// First 16 bytes of the blake3 hash of these bytes, hex.
        hash: String,
    },
}

/// Code for one target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CodeEntry {
    /// `x86-64-v3`, `x86-64-v4`, `native:CPU`, `sm_80`, `sm_90a`.
    pub target: String,
    /// What the bytes are.
    pub kind: CodeKind,
    /// Index of the segment in the table of contents.
    pub segment: u32,
    /// CPU features that the code needs beyond those its level implies, in LLVM's names
    /// (`avx512vnni`); a CPU without one of them is refused by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<String>,
}

/// Form of code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CodeKind {
    /// An ELF shared object without undefined symbols.
    SharedObject,
    /// PTX text; the driver compiles it.
    Ptx,
    /// SASS for exactly the target.
    Cubin,
}

/// One way to run the model on one target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// `fused`, `unfused`, ...
    pub name: String,
    /// Target of the code: equal to `codes[code].target`.
    pub target: String,
    /// Index into [`Manifest::codes`]. Several plans may share code.
    pub code: u32,
    /// Cubin of the same kernels as `code` when that is PTX, if one was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cubin: Option<u32>,
    /// The kernels that steps launch, those of nested bodies included.
    pub kernels: Vec<Kernel>,
    /// What to do.
    pub body: Body,
    /// Predicted time of one run in nanoseconds, 0 when unknown.
    pub predicted_ns: f64,
}

/// Index of a buffer in its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BufferId(pub u32);

/// Index of a kernel in its plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KernelId(pub u32);

impl BufferId {
    /// As an index into [`Body::buffers`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl KernelId {
    /// As an index into [`Plan::kernels`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Steps in order over buffers of their own; If and Loop nest bodies.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Body {
    /// The buffers that steps name.
    pub buffers: Vec<Buffer>,
    /// What to do, in order.
    pub steps: Vec<Step>,
    /// The buffer of each input: `inputs[n]` has kind `Input(n)`. Top level: one a port.
    pub inputs: Vec<BufferId>,
    /// The buffer of each output. One of kind `Output(n)` is written in place; any other is
    /// copied out after the last step.
    pub outputs: Vec<BufferId>,
}

/// A tensor in memory, dense and row-major.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Buffer {
    /// Element type.
    pub dtype: DType,
    /// Extents.
    pub dims: Vec<DimExpr>,
    /// Where its memory comes from.
    pub kind: BufferKind,
}

/// Where a buffer's memory comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BufferKind {
    /// The n-th input of the body; read only.
    Input(u32),
    /// The n-th output of the body.
    Output(u32),
    /// A constant, by index into [`Manifest::tensors`]; read only.
    Const(u32),
    /// The arena: the runtime places it by its live range.
    Arena,
    /// The memory of another buffer of this body from an offset on (reshape, in-place update,
    /// a slice of a concat); it keeps that buffer alive.
    View {
        /// The buffer looked at, itself perhaps a view.
        of: BufferId,
        /// Bytes from its start.
        byte_offset: DimExpr,
    },
    /// A buffer of the body around this one; read only.
    Captured(BufferId),
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Run a kernel.
    Launch {
        /// Which one.
        kernel: KernelId,
        /// Its buffers: inputs, then outputs.
        args: Vec<BufferId>,
        /// Its run-time sizes, in the order of its parameters.
        dims: Vec<DimExpr>,
    },
    /// Copy all bytes of one buffer to another of the same size.
    Copy {
        /// Source.
        from: BufferId,
        /// Destination.
        to: BufferId,
    },
    /// Read an `i64` scalar that earlier steps computed and define a symbol by it.
    Bind {
        /// One element of dtype i64.
        buffer: BufferId,
        /// Index of the symbol.
        symbol: u32,
    },
    /// Run one of two bodies; neither has inputs, they capture.
    If {
        /// One element of dtype bool.
        cond: BufferId,
        /// Run when true.
        then_body: Box<Body>,
        /// Run when false.
        else_body: Box<Body>,
        /// Receives the outputs of the body that ran.
        outputs: Vec<BufferId>,
    },
    /// Run a body repeatedly, as ONNX `Loop` says. The body's inputs are the iteration (i64
    /// scalar), the condition (bool scalar) and the carried values; its outputs the next
    /// condition, the carried values and this iteration's scan outputs.
    Loop {
        /// Largest number of iterations (i64 scalar); negative or none: no limit.
        trip: Option<BufferId>,
        /// First condition (bool scalar); none: true.
        cond: Option<BufferId>,
        /// What is repeated.
        body: Box<Body>,
        /// Initial carried values.
        carried: Vec<BufferId>,
        /// Final carried values, then each scan output stacked along a new first axis.
        outputs: Vec<BufferId>,
    },
}

/// A compiled function and how to launch it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    /// Name for people: `conv_relu_12`.
    pub name: String,
    /// Name of the function in the code. Kernels that differ only in launch sizes may share it.
    pub symbol: String,
    /// How many buffers it takes (scratch not counted).
    pub n_args: u32,
    /// How many run-time sizes it takes.
    pub n_dims: u32,
    /// How a CPU runs it; needed by plans for CPU targets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuLaunch>,
    /// How a GPU runs it; needed by plans for GPU targets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuLaunch>,
    /// Where it comes from and what it was thought to cost.
    pub provenance: Provenance,
}

/// A CPU launch: `kernel(bufs, dims, lo, hi)` on slices of `0..extent` that begin at multiples of
/// `grain` and together cover it. The result must not depend on how it is sliced.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpuLaunch {
    /// Units of the parallel dimension.
    pub extent: DimExpr,
    /// Smallest slice worth a call, in units; at least 1.
    pub grain: DimExpr,
    /// Predicted picoseconds of one unit on one core; decides whether to go parallel at all.
    pub unit_ps: DimExpr,
    /// Bytes of scratch for each thread (64-byte aligned, not cleared), 0 for none. When not
    /// the constant 0, a scratch pointer follows the buffers.
    pub scratch: DimExpr,
}

/// A GPU launch. Parameters: buffer pointers, then i64 sizes, then tensor maps by value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuLaunch {
    /// Blocks in x, y, z.
    pub grid: [DimExpr; 3],
    /// Threads of a block in x, y, z.
    pub block: [u32; 3],
    /// Blocks of a cluster in x, y, z; `[1, 1, 1]` for none.
    pub cluster: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub smem: u32,
    /// Tensor maps, in parameter order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tensor_maps: Vec<TensorMap>,
    /// Launched with programmatic dependent launch: it begins with `griddepcontrol.wait`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub pdl: bool,
}

fn is_false(b: &bool) -> bool {
    !b
}

/// What TMA needs to know of a tensor; innermost dimension first, as the driver wants it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorMap {
    /// Index of the argument whose memory it describes.
    pub arg: u32,
    /// Bytes from that argument's start.
    #[serde(default = "zero", skip_serializing_if = "is_zero")]
    pub byte_offset: DimExpr,
    /// Element type.
    pub dtype: DType,
    /// Extents in elements, 1 to 5 of them.
    pub dims: Vec<DimExpr>,
    /// Strides in bytes of all dimensions but the innermost, multiples of 16.
    pub strides: Vec<DimExpr>,
    /// Elements of the box in each dimension, 1 to 256.
    #[serde(rename = "box")]
    pub box_dims: Vec<u32>,
    /// Steps between elements of the box; empty: all 1.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub element_strides: Vec<u32>,
    /// How shared memory is permuted.
    pub swizzle: Swizzle,
    /// How far L2 fetches ahead.
    #[serde(default)]
    pub l2_promotion: L2Promotion,
    /// What reads out of bounds give.
    #[serde(default)]
    pub fill: Fill,
}

fn zero() -> DimExpr {
    DimExpr::Const(0)
}

fn is_zero(e: &DimExpr) -> bool {
    *e == DimExpr::Const(0)
}

/// Shared-memory swizzle of a tensor map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Swizzle {
    /// As in memory.
    #[default]
    #[serde(rename = "none")]
    None,
    /// 32-byte atoms.
    #[serde(rename = "32")]
    B32,
    /// 64-byte atoms.
    #[serde(rename = "64")]
    B64,
    /// 128-byte atoms.
    #[serde(rename = "128")]
    B128,
}

/// L2 promotion of a tensor map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum L2Promotion {
    /// No promotion.
    #[serde(rename = "none")]
    None,
    /// 64 bytes.
    #[serde(rename = "64")]
    B64,
    /// 128 bytes.
    #[serde(rename = "128")]
    B128,
    /// 256 bytes.
    #[default]
    #[serde(rename = "256")]
    B256,
}

/// Value of out-of-bounds elements of a tensor map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fill {
    /// Zero.
    #[default]
    #[serde(rename = "zero")]
    Zero,
    /// A NaN that matrix instructions treat as zero.
    #[serde(rename = "nan")]
    Nan,
}

/// Where a kernel comes from and what it was thought to cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Nodes of the model that it does the work of.
    pub sources: Vec<String>,
    /// Graph ops in it, in order: `conv`, `add`, `relu`.
    pub members: Vec<String>,
    /// Rules that made it.
    pub rules: Vec<String>,
    /// Arithmetic operations of one launch.
    pub flops: DimExpr,
    /// Bytes it reads from memory.
    pub bytes_read: DimExpr,
    /// Bytes it writes to memory.
    pub bytes_written: DimExpr,
    /// Predicted time of one launch in nanoseconds, 0 when unknown.
    pub predicted_ns: f64,
}

/// Why a kernel is what it is, for people. Times are predictions in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// Starting it.
    pub launch_ns: f64,
    /// Its operations.
    pub arithmetic_ns: f64,
    /// Moving its operands and results.
    pub memory_ns: f64,
    /// All of it; arithmetic and memory overlap.
    pub total_ns: f64,
    /// Passes before fusion that changed what stands for its nodes, in order, each with these nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub passes: Vec<String>,
    /// For each op that rules made: the rules in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chain: Vec<String>,
    /// The cheapest other way to the same result, and by how much the plan would be dearer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runner_up: Option<(String, f64)>,
    /// Kernels whose results it reads, and why they are kernels of their own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub apart: Vec<(String, String)>,
}

impl Body {
    /// The kernels in the order they are launched, nested bodies once.
    pub fn launched(&self) -> Vec<KernelId> {
        let of = |step: &Step| match step {
            Step::Launch { kernel, .. } => vec![*kernel],
            Step::Copy { .. } | Step::Bind { .. } => vec![],
            Step::If { then_body, else_body, .. } => [then_body.launched(), else_body.launched()].concat(),
            Step::Loop { body, .. } => body.launched(),
        };
        self.steps.iter().flat_map(of).collect()
    }
}

impl Default for Provenance {
    fn default() -> Self {
        Provenance { sources: Vec::new(), members: Vec::new(), rules: Vec::new(), flops: zero(), bytes_read: zero(), bytes_written: zero(), predicted_ns: 0.0 }
    }
}
