//! A program: regions in order over buffers. What the passes hand to code generation.
//!
//! Data only: no code, no addresses, no device. Buffers are dense and row-major.
use crate::{Region, Sym, Tensor, TensorType};
use std::fmt;

/// Index of a buffer in its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BufId(pub u32);

impl BufId {
    /// As an index into [`Body::buffers`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// One way to run a model.
#[derive(Clone, Debug)]
pub struct Program {
    /// `fused`, `unfused`, ...
    pub name: String,
    /// What to do.
    pub body: Body,
}

/// Steps in order over buffers of their own.
#[derive(Clone, Debug, Default)]
pub struct Body {
    /// The buffers that steps name.
    pub buffers: Vec<Buffer>,
    /// What to do.
    pub steps: Vec<Step>,
    /// Buffer of each input.
    pub inputs: Vec<BufId>,
    /// Buffer of each output.
    pub outputs: Vec<BufId>,
}

/// A tensor in memory.
#[derive(Clone, Debug)]
pub struct Buffer {
    /// Its type.
    pub ty: TensorType,
    /// Where its memory comes from.
    pub kind: BufferKind,
}

/// Where a buffer's memory comes from.
#[derive(Clone, Debug)]
pub enum BufferKind {
    /// The n-th input; read only.
    Input(u32),
    /// The n-th output.
    Output(u32),
    /// A constant; read only.
    Const(Tensor),
    /// Memory that the runtime places by live range.
    Temp,
    /// The memory of another buffer under another shape or, in place, for another value.
    View(BufId),
    /// A buffer of the body around this one; read only.
    Captured(BufId),
}

/// What a kernel is predicted to cost, in nanoseconds. Arithmetic and memory overlap: the total is less than the sum.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Price {
    /// Starting it.
    pub launch: f64,
    /// Its operations.
    pub arithmetic: f64,
    /// Moving its operands and results.
    pub memory: f64,
    /// All of it.
    pub total: f64,
}

/// Why a kernel is what it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Why {
    /// The prediction that chose it.
    pub price: Price,
    /// Passes before fusion that changed what stands for its nodes, in order, each with these nodes.
    pub passes: Vec<String>,
    /// For each op that rules made: the rules in order, the first applied to the graph that the passes left.
    pub chain: Vec<String>,
    /// The cheapest other way to the same result, the rest of the plan being as it is, and by how many nanoseconds the
    /// plan would be dearer.
    pub runner_up: Option<(String, f64)>,
    /// Kernels whose results it reads, and why they are kernels of their own.
    pub apart: Vec<(String, String)>,
}

/// Where a kernel comes from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Origin {
    /// Names of the model's nodes.
    pub sources: Vec<String>,
    /// Mnemonics of the member ops.
    pub members: Vec<String>,
    /// Names of the rules that led here.
    pub rules: Vec<String>,
    /// Why it is so.
    pub why: Why,
}

/// One thing to do.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly every step is a region, so boxing it would save nothing")]
pub enum Step {
    /// Run a region.
    Run {
        /// What it computes.
        region: Region,
        /// Buffer of each region argument.
        args: Vec<BufId>,
        /// Buffer of each region output.
        outputs: Vec<BufId>,
        /// Where it comes from.
        origin: Origin,
    },
    /// Copy a buffer to another of the same size.
    Copy {
        /// Source.
        from: BufId,
        /// Destination.
        to: BufId,
    },
    /// Define a symbol by an i64 scalar that earlier steps computed.
    Bind {
        /// One i64.
        buffer: BufId,
        /// The symbol.
        sym: Sym,
    },
    /// Run one of two bodies; they capture, and give the outputs.
    If {
        /// One bool.
        cond: BufId,
        /// Run when true.
        then_body: Box<Body>,
        /// Run when false.
        else_body: Box<Body>,
        /// Receive the outputs of the body that ran.
        outputs: Vec<BufId>,
    },
    /// Run a body repeatedly: see the op `loop`.
    Loop {
        /// Largest number of iterations (i64 scalar); negative is without limit.
        trip: BufId,
        /// First condition (bool scalar).
        cond: BufId,
        /// What is repeated: takes (iteration, condition, carried...), gives (condition, carried..., scanned...).
        body: Box<Body>,
        /// Initial carried values.
        carried: Vec<BufId>,
        /// Final carried values, then scanned values stacked.
        outputs: Vec<BufId>,
    },
}

impl Body {
    /// Append a buffer.
    pub fn push(&mut self, ty: TensorType, kind: BufferKind) -> BufId {
        self.buffers.push(Buffer { ty, kind });
        BufId(self.buffers.len() as u32 - 1)
    }

    /// Every step that runs a region, nested bodies included, in order.
    pub fn regions(&self) -> Vec<(&Region, &Origin)> {
        let mut found = vec![];
        for step in &self.steps {
            match step {
                Step::Run { region, origin, .. } => found.push((region, origin)),
                Step::If { then_body, else_body, .. } => {
                    found.extend(then_body.regions());
                    found.extend(else_body.regions());
                }
                Step::Loop { body, .. } => found.extend(body.regions()),
                Step::Copy { .. } | Step::Bind { .. } => {}
            }
        }
        found
    }

    fn print(&self, f: &mut fmt::Formatter<'_>, depth: usize) -> fmt::Result {
        let pad = "  ".repeat(depth);
        let name = |b: &BufId| match &self.buffers[b.index()].kind {
            BufferKind::Input(n) => format!("in{n}"),
            BufferKind::Output(n) => format!("out{n}"),
            BufferKind::Const(_) => format!("c{}", b.0),
            BufferKind::Temp => format!("b{}", b.0),
            BufferKind::View(of) => format!("b{}@b{}", b.0, of.0),
            BufferKind::Captured(of) => format!("outer.b{}", of.0),
        };
        let names = |bs: &[BufId]| bs.iter().map(name).collect::<Vec<_>>().join(", ");
        for step in &self.steps {
            match step {
                Step::Run { region, args, outputs, .. } => writeln!(f, "{pad}{} = run @{}({})", names(outputs), region.name, names(args))?,
                Step::Copy { from, to } => writeln!(f, "{pad}{} = copy {}", name(to), name(from))?,
                Step::Bind { buffer, sym } => writeln!(f, "{pad}bind {} = {}", sym.name, name(buffer))?,
                Step::If { cond, then_body, else_body, outputs } => {
                    writeln!(f, "{pad}{} = if {} {{", names(outputs), name(cond))?;
                    then_body.print(f, depth + 1)?;
                    writeln!(f, "{pad}}} else {{")?;
                    else_body.print(f, depth + 1)?;
                    writeln!(f, "{pad}}}")?;
                }
                Step::Loop { trip, cond, body, carried, outputs } => {
                    writeln!(f, "{pad}{} = loop {} while {} carrying ({}) {{", names(outputs), name(trip), name(cond), names(carried))?;
                    body.print(f, depth + 1)?;
                    writeln!(f, "{pad}}}")?;
                }
            }
        }
        writeln!(f, "{pad}return {}", names(&self.outputs))
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "program {} {{", self.name)?;
        self.body.print(f, 1)?;
        writeln!(f, "}}\n")?;
        for (region, _) in self.body.regions() {
            writeln!(f, "{region}")?;
        }
        Ok(())
    }
}
