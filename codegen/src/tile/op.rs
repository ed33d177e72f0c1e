//! The operations of the tile IR, with their attributes and their names in text.
use super::{hopper::HopperWord, mma::MmaWord};
use pavage_ir::{Scalar, ScalarFn};
use std::collections::BTreeMap;

/// How a vector collapses to one element. The order is fixed: lane `i` is combined with lane `i + n/2`,
/// halving until one is left, so every device gives the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReduceFn {
    /// Sum.
    Add,
    /// Product.
    Mul,
    /// Largest; NaN if any is.
    Max,
    /// Smallest; NaN if any is.
    Min,
    /// Conjunction (bool, integers bitwise).
    And,
    /// Disjunction (bool, integers bitwise).
    Or,
}

impl ReduceFn {
    /// The two-operand function it folds with.
    pub const fn scalar(self) -> ScalarFn {
        match self {
            ReduceFn::Add => ScalarFn::Add,
            ReduceFn::Mul => ScalarFn::Mul,
            ReduceFn::Max => ScalarFn::Max,
            ReduceFn::Min => ScalarFn::Min,
            ReduceFn::And => ScalarFn::And,
            ReduceFn::Or => ScalarFn::Or,
        }
    }

    fn parse(s: &str) -> Option<Self> {
        [ReduceFn::Add, ReduceFn::Mul, ReduceFn::Max, ReduceFn::Min, ReduceFn::And, ReduceFn::Or].into_iter().find(|r| r.scalar().name() == s)
    }
}

/// How lanes of a warp exchange values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ShflKind {
    /// From lane `self ^ operand`.
    Xor,
    /// From lane `self - operand`; lanes below keep their own.
    Up,
    /// From lane `self + operand`; lanes above keep their own.
    Down,
    /// From lane `operand`.
    Idx,
}

impl ShflKind {
    const ALL: [(ShflKind, &'static str); 4] = [(ShflKind::Xor, "xor"), (ShflKind::Up, "up"), (ShflKind::Down, "down"), (ShflKind::Idx, "idx")];

    /// The name in text.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(k, _)| *k == self).map_or("", |(_, n)| n)
    }
}

/// A question put to the 32 lanes of a warp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VoteKind {
    /// Whether any lane says so: bool.
    Any,
    /// Whether all lanes say so: bool.
    All,
    /// Which lanes say so: `u32`, bit `i` for lane `i`.
    Ballot,
}

impl VoteKind {
    const ALL: [(VoteKind, &'static str); 3] = [(VoteKind::Any, "any"), (VoteKind::All, "all"), (VoteKind::Ballot, "ballot")];

    /// The name in text.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(k, _)| *k == self).map_or("", |(_, n)| n)
    }
}

/// Integer dot products of short groups of lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DotKind {
    /// `(<2n x i16>, <2n x i16>) -> <n x i32>`: sums of two products, wrapping. One instruction on every x86-64-v3.
    I16Pairs,
    /// `(<2n x u8>, <2n x i8>) -> <n x i16>`: sums of two products, saturating. One instruction on every x86-64-v3.
    U8I8PairsSat,
    /// `(acc <n x i32>, <4n x u8>, <4n x i8>) -> <n x i32>`: acc plus sums of four products, exact, wrapping.
    /// One instruction with VNNI, otherwise a sequence of seven.
    U8I8Quads,
}

impl DotKind {
    const ALL: [(DotKind, &'static str); 3] = [(DotKind::I16Pairs, "i16x2"), (DotKind::U8I8PairsSat, "u8i8x2sat"), (DotKind::U8I8Quads, "u8i8x4")];

    /// The name in text.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(k, _)| *k == self).map_or("", |(_, n)| n)
    }
}

/// What a statement does. Each variant says its value operands (`args`), buffers (`bufs`), blocks and results.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// A constant of the result's dtype, in every lane.
    Const(Scalar),
    /// A scalar function, lane by lane. args: operands of one shape (a `select` condition may be a scalar).
    Map(ScalarFn),
    /// Convert to the result's dtype, as `Scalar::cast` does. args: value.
    Cast,
    /// Reinterpret the bits; total width is kept. args: value (scalar or vector).
    Bitcast,
    /// Every lane the same. args: scalar.
    Splat,
    /// One lane, fixed. args: vector or fragment.
    Extract(u16),
    /// Replace one lane, fixed. args: vector or fragment, scalar.
    Insert(u16),
    /// A vector or fragment from its elements. args: one scalar per lane.
    Pack,
    /// 0, 1, 2, ... of the result's integer dtype.
    Iota,
    /// Lanes picked from the concatenation of two vectors. args: a, b of one type.
    Shuffle(Vec<u16>),
    /// All lanes into one. args: vector or fragment.
    Reduce(ReduceFn),
    /// Whether lane `i` is below a count. args: `i64` count. Result: bool vector.
    LaneMask,
    /// Contiguous elements at `index + offset`. bufs: buffer. args: index, then optionally a bool vector:
    /// lanes where it is false are not touched and give 0.
    Load {
        /// Constant part of the element index.
        offset: i64,
    },
    /// Store contiguous elements at `index + offset`. bufs: buffer. args: index, value, optionally mask.
    Store {
        /// Constant part of the element index.
        offset: i64,
    },
    /// Elements at a vector of indices (`i32` or `i64`). bufs: buffer. args: indices, optionally mask (false gives 0).
    Gather {
        /// Constant added to every index.
        offset: i64,
    },
    /// Store elements at a vector of indices; of equal indices the highest lane wins. bufs: buffer. args: indices,
    /// value, optionally mask.
    Scatter {
        /// Constant added to every index.
        offset: i64,
    },
    /// `memory += value`, atomically; the order is not fixed. bufs: buffer. args: index, scalar value.
    AtomicAdd {
        /// Constant part of the element index.
        offset: i64,
    },
    /// A hint that the cache line at `index + offset` is soon read; the place may lie outside the buffer. bufs: buffer. args: index.
    Prefetch {
        /// Constant part of the element index.
        offset: i64,
        /// Into the nearest cache, not the next one.
        near: bool,
    },
    /// Integer dot products. args: see [`DotKind`].
    Dot(DotKind),
    /// Counted loop `for (i = lo; i < hi; i += step)`, step above 0. args: lo, hi, step, initial carried values. One block:
    /// params i and the carried values, yields the next carried values. Results: the last carried values.
    For,
    /// args: condition. Two blocks without params; their yields are the results.
    If,
    /// args: initial values. Block 0: params the carried values, yields a condition and values; block 1: params
    /// those values, yields the next carried values. Results: the values block 0 yielded with a false condition.
    While,
    /// First index of this call's slice (CPU).
    Lo,
    /// End of this call's slice (CPU).
    Hi,
    /// Index of this block on grid axis 0..3 (GPU).
    BlockId(u8),
    /// Blocks of the grid on an axis (GPU).
    GridDim(u8),
    /// Index of this thread in its block (GPU).
    ThreadId,
    /// Index of this thread in its warp, 0..32 (GPU).
    LaneId,
    /// All threads of the block meet, and see each other's shared memory (GPU).
    Barrier,
    /// Exchange within the warp. args: value (scalar or fragment), `i64` lane operand.
    Shfl(ShflKind),
    /// Ask the warp. args: bool.
    Vote(VoteKind),
    /// Ampere matrix words.
    Mma(MmaWord),
    /// Hopper words.
    Hopper(HopperWord),
}

impl Op {
    /// Whether a statement may be dropped when its results are unused.
    pub fn is_removable(&self) -> bool {
        match self {
            Op::Store { .. }
            | Op::Scatter { .. }
            | Op::AtomicAdd { .. }
            | Op::Prefetch { .. }
            | Op::For
            | Op::If
            | Op::While
            | Op::Barrier
            | Op::Shfl(_)
            | Op::Vote(_) => false,
            Op::Mma(w) => w.is_pure(),
            Op::Hopper(w) => w.is_pure(),
            _ => true,
        }
    }

    /// Whether the result depends on the operands alone.
    pub fn is_pure(&self) -> bool {
        self.is_removable() && !matches!(self, Op::Load { .. } | Op::Gather { .. })
    }

    /// The name in text.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Const(_) => "const",
            Op::Map(f) => f.name(),
            Op::Cast => "cast",
            Op::Bitcast => "bitcast",
            Op::Splat => "splat",
            Op::Extract(_) => "extract",
            Op::Insert(_) => "insert",
            Op::Pack => "pack",
            Op::Iota => "iota",
            Op::Shuffle(_) => "shuffle",
            Op::Reduce(_) => "reduce",
            Op::LaneMask => "lane_mask",
            Op::Load { .. } => "load",
            Op::Store { .. } => "store",
            Op::Gather { .. } => "gather",
            Op::Scatter { .. } => "scatter",
            Op::AtomicAdd { .. } => "atomic_add",
            Op::Prefetch { .. } => "prefetch",
            Op::Dot(_) => "dot",
            Op::For => "for",
            Op::If => "if",
            Op::While => "while",
            Op::Lo => "lo",
            Op::Hi => "hi",
            Op::BlockId(_) => "block_id",
            Op::GridDim(_) => "grid_dim",
            Op::ThreadId => "thread_id",
            Op::LaneId => "lane_id",
            Op::Barrier => "barrier",
            Op::Shfl(_) => "shfl",
            Op::Vote(_) => "vote",
            Op::Mma(w) => w.name(),
            Op::Hopper(w) => w.name(),
        }
    }

    /// The attributes in text, in order: `name[key=value, ...]`. A value has no comma, bracket or space.
    pub fn attrs(&self) -> Vec<(&'static str, String)> {
        match self {
            Op::Const(c) => vec![("value", scalar_text(*c))],
            Op::Extract(i) | Op::Insert(i) => vec![("lane", i.to_string())],
            Op::Shuffle(mask) => vec![("mask", mask.iter().map(u16::to_string).collect::<Vec<_>>().join(":"))],
            Op::Reduce(r) => vec![("with", r.scalar().name().to_owned())],
            Op::Load { offset }
            | Op::Store { offset }
            | Op::Gather { offset }
            | Op::Scatter { offset }
            | Op::AtomicAdd { offset }
            | Op::Prefetch { offset, .. } => {
                let mut attrs = vec![];
                if *offset != 0 {
                    attrs.push(("offset", offset.to_string()));
                }
                if matches!(self, Op::Prefetch { near: true, .. }) {
                    attrs.push(("near", "1".to_owned()));
                }
                attrs
            }
            Op::Dot(k) => vec![("kind", k.name().to_owned())],
            Op::BlockId(a) | Op::GridDim(a) => vec![("axis", a.to_string())],
            Op::Shfl(k) => vec![("kind", k.name().to_owned())],
            Op::Vote(k) => vec![("kind", k.name().to_owned())],
            Op::Mma(w) => w.attrs(),
            Op::Hopper(w) => w.attrs(),
            _ => vec![],
        }
    }

    /// The operation with this name and these attributes, or what is wrong.
    pub fn parse(name: &str, attrs: &BTreeMap<String, String>) -> Result<Op, String> {
        fn number<T: std::str::FromStr>(attrs: &BTreeMap<String, String>, key: &str) -> Result<T, String> {
            let text = attrs.get(key).ok_or_else(|| format!("needs `{key}=`"))?;
            text.parse().map_err(|_| format!("`{key}={text}` is not a number in range"))
        }
        let text = |key: &str| attrs.get(key).map(String::as_str).ok_or_else(|| format!("needs `{key}=`"));
        let offset = || {
            if attrs.contains_key("offset") { number(attrs, "offset") } else { Ok(0i64) }
        };
        let pick = |table: &[(&str, Op)]| {
            let want = text("kind")?;
            table.iter().find(|(n, _)| *n == want).map(|(_, op)| op.clone()).ok_or_else(|| format!("unknown kind `{want}`"))
        };
        Ok(match name {
            "const" => Op::Const(parse_scalar(text("value")?)?),
            "cast" => Op::Cast,
            "bitcast" => Op::Bitcast,
            "splat" => Op::Splat,
            "extract" => Op::Extract(number(attrs, "lane")?),
            "insert" => Op::Insert(number(attrs, "lane")?),
            "pack" => Op::Pack,
            "iota" => Op::Iota,
            "shuffle" => Op::Shuffle(text("mask")?.split(':').map(|s| s.parse().map_err(|_| format!("bad lane `{s}` in mask"))).collect::<Result<_, _>>()?),
            "reduce" => Op::Reduce(ReduceFn::parse(text("with")?).ok_or("unknown reduction")?),
            "lane_mask" => Op::LaneMask,
            "load" => Op::Load { offset: offset()? },
            "store" => Op::Store { offset: offset()? },
            "gather" => Op::Gather { offset: offset()? },
            "scatter" => Op::Scatter { offset: offset()? },
            "atomic_add" => Op::AtomicAdd { offset: offset()? },
            "prefetch" => Op::Prefetch { offset: offset()?, near: attrs.contains_key("near") },
            "dot" => pick(&DotKind::ALL.map(|(k, n)| (n, Op::Dot(k))))?,
            "for" => Op::For,
            "if" => Op::If,
            "while" => Op::While,
            "lo" => Op::Lo,
            "hi" => Op::Hi,
            "block_id" => Op::BlockId(number(attrs, "axis")?),
            "grid_dim" => Op::GridDim(number(attrs, "axis")?),
            "thread_id" => Op::ThreadId,
            "lane_id" => Op::LaneId,
            "barrier" => Op::Barrier,
            "shfl" => pick(&ShflKind::ALL.map(|(k, n)| (n, Op::Shfl(k))))?,
            "vote" => pick(&VoteKind::ALL.map(|(k, n)| (n, Op::Vote(k))))?,
            _ => {
                if let Some(f) = ScalarFn::parse(name) {
                    Op::Map(f)
                } else if let Some(w) = MmaWord::parse(name, attrs)? {
                    Op::Mma(w)
                } else if let Some(w) = HopperWord::parse(name, attrs)? {
                    Op::Hopper(w)
                } else {
                    return Err(format!("unknown operation `{name}`"));
                }
            }
        })
    }
}

/// A constant in text: integers plain, floats with a point or exponent, `true` and `false`.
pub fn scalar_text(c: Scalar) -> String {
    match c {
        Scalar::F(v) if v.is_nan() => "nan".to_owned(),
        Scalar::F(v) if v.is_infinite() => if v > 0.0 { "inf" } else { "-inf" }.to_owned(),
        Scalar::F(v) => format!("{v:?}"),
        Scalar::I(v) => v.to_string(),
        Scalar::B(v) => v.to_string(),
    }
}

/// Read what [`scalar_text`] writes.
pub fn parse_scalar(s: &str) -> Result<Scalar, String> {
    match s {
        "true" => return Ok(Scalar::B(true)),
        "false" => return Ok(Scalar::B(false)),
        "nan" => return Ok(Scalar::F(f64::NAN)),
        "inf" => return Ok(Scalar::F(f64::INFINITY)),
        "-inf" => return Ok(Scalar::F(f64::NEG_INFINITY)),
        _ => {}
    }
    if let Ok(v) = s.parse::<i128>() {
        return Ok(Scalar::I(v));
    }
    s.parse::<f64>().map(Scalar::F).map_err(|_| format!("bad constant `{s}`"))
}
