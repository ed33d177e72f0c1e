//! What each target offers: vector width, registers, instructions, caches, limits. A row per target.
use crate::tile::check::Limits;
use std::fmt;

mod host;

/// A machine that code is made for.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// An x86-64 CPU.
    Cpu(Cpu),
    /// An NVIDIA GPU.
    Gpu(Gpu),
}

/// A CPU level.
#[derive(Clone, Debug, PartialEq)]
pub struct Cpu {
    /// Name as given on the command line.
    pub name: String,
    /// `f32` lanes of a native vector.
    pub lanes: u16,
    /// Vector registers.
    pub vector_regs: u32,
    /// Bytes of the first-level data cache, per core.
    pub l1_bytes: u64,
    /// Bytes of the second-level cache, per core.
    pub l2_bytes: u64,
    /// Bytes of the last-level cache that a core can count on.
    pub l3_bytes: u64,
    /// Whether `u8 x i8` dot products of four are one instruction at native width.
    pub vnni: bool,
    /// Whether every vector operation can be masked (AVX-512).
    pub masks: bool,
    /// CPU name for LLVM.
    pub llvm_cpu: String,
    /// Feature string for LLVM.
    pub llvm_features: String,
}

/// A GPU architecture.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpu {
    /// `sm_80`.
    pub arch: &'static str,
    /// Compute capability times ten.
    pub sm: u32,
    /// PTX version times ten.
    pub ptx: u32,
    /// Whether TMA, wgmma and clusters are there.
    pub hopper: bool,
    /// Shared bytes that one block may take.
    pub shared_bytes: u64,
    /// Multiprocessors of the usual part.
    pub sms: u32,
    /// Bytes of the level-2 cache.
    pub l2_bytes: u64,
}

const GPUS: [Gpu; 3] = [
    Gpu { arch: "sm_80", sm: 80, ptx: 70, hopper: false, shared_bytes: 163 << 10, sms: 108, l2_bytes: 40 << 20 },
    Gpu { arch: "sm_89", sm: 89, ptx: 78, hopper: false, shared_bytes: 99 << 10, sms: 128, l2_bytes: 72 << 20 },
    Gpu { arch: "sm_90a", sm: 90, ptx: 83, hopper: true, shared_bytes: 227 << 10, sms: 132, l2_bytes: 50 << 20 },
];

/// No such target.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no target `{name}`; there are {known}")]
pub struct UnknownTarget {
    /// What was asked for.
    pub name: String,
    /// What there is.
    pub known: String,
}

impl Target {
    /// Names that [`Target::parse`] takes.
    pub const NAMES: [&str; 6] = ["x86-64-v3", "x86-64-v4", "native", "sm_80", "sm_89", "sm_90a"];

    /// The target with this name. `native` is this machine's CPU.
    pub fn parse(name: &str) -> Result<Target, UnknownTarget> {
        match name {
            "x86-64-v3" => Ok(Target::Cpu(Cpu::v3())),
            "x86-64-v4" => Ok(Target::Cpu(Cpu::v4())),
            "native" => Ok(Target::Cpu(host::detect())),
            _ => match GPUS.iter().find(|g| g.arch == name) {
                Some(g) => Ok(Target::Gpu(g.clone())),
                None => Err(UnknownTarget { name: name.to_owned(), known: Target::NAMES.join(", ") }),
            },
        }
    }

    /// The name on the command line and in artifacts.
    pub fn name(&self) -> &str {
        match self {
            Target::Cpu(c) => &c.name,
            Target::Gpu(g) => g.arch,
        }
    }

    /// Limits that `tile::check` holds kernels to.
    pub fn limits(&self) -> Limits {
        match self {
            Target::Cpu(c) => Limits { shared_bytes: 0, threads: 1, vector_regs: c.vector_regs, vector_bytes: 4 * u32::from(c.lanes) },
            Target::Gpu(g) => Limits { shared_bytes: g.shared_bytes, threads: 1024, vector_regs: 255, vector_bytes: 4 },
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Cpu {
    /// AVX2 and FMA: 8 lanes, 16 registers.
    pub fn v3() -> Cpu {
        Cpu {
            name: "x86-64-v3".to_owned(),
            lanes: 8,
            vector_regs: 16,
            l1_bytes: 32 << 10,
            l2_bytes: 512 << 10,
            l3_bytes: 16 << 20,
            vnni: false,
            masks: false,
            llvm_cpu: "x86-64-v3".to_owned(),
            llvm_features: String::new(),
        }
    }

    /// AVX-512 F, BW, CD, DQ, VL: 16 lanes, 32 registers.
    pub fn v4() -> Cpu {
        Cpu { name: "x86-64-v4".to_owned(), lanes: 16, vector_regs: 32, l2_bytes: 1 << 20, masks: true, llvm_cpu: "x86-64-v4".to_owned(), ..Cpu::v3() }
    }
}
