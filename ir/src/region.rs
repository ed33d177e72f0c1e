//! A fused kernel as plain data: what it reads, what it computes at each point, what it writes.
//!
//! A region has one **heart**, the computation that fixes its loop structure, and scalar expressions around
//! it. All expressions of a region live in one pool, [`Region::exprs`]; an expression is evaluated at a point
//! of an index space, its axes numbered from 0. Views (transpose, reshape, slice, broadcast, pad, gather)
//! do not appear: they are index maps inside [`Expr::Load`].
//!
//! Index spaces, with `P = space.len()`:
//! - outputs: axes `0..P` are the parallel axes; for [`Heart::Reduce`], axes `P..P+R` are the reduced ones;
//! - a stage of a reduction: axes `0..P+R`;
//! - operands of [`Heart::Contract`]: axes `0..P` (batch..., m, n) and axis `P`, the contracted one;
//! - operands of [`Heart::Conv`], [`Heart::Pool`], [`Heart::WinogradOutput`], [`Heart::Attention`]: their own coordinates, axis `i` being the
//!   operand's axis `i`; a point outside the operand's extents is never asked for;
//! - operands of [`Heart::Separable`]: likewise, and what its product reads is over the depthwise result's coordinates.
use crate::{
    DType, Dim, Op, Real, Scalar, ScalarFn, TensorType,
    attr::{Layout, PoolFn, ReduceFn},
    dim::Atom,
};
use std::fmt;

/// An expression of a region's pool. Operands precede their users.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExprId(pub u32);

/// A scalar computed at a point.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Expr {
    /// A float constant.
    Float(Real),
    /// An integer or bool constant (wrapped to the dtype).
    Int(i64),
    /// An integer expression of axes, symbols and earlier integer expressions, as i64.
    Index(Dim),
    /// An element of an argument. Where `guard` is given and false nothing is read and the value is 0;
    /// otherwise the index lies within the argument's extents.
    Load {
        /// Which argument.
        arg: u32,
        /// One coordinate an axis of the argument.
        index: Vec<Dim>,
        /// Whether to read at all.
        guard: Option<ExprId>,
    },
    /// Result `i` of the heart: of stage `i` of a reduction, else of the heart at this output point.
    Acc(u32),
    /// A scalar function.
    Call(ScalarFn, Vec<ExprId>),
    /// A conversion, as the op `cast`.
    Cast(ExprId),
    /// The bits as another dtype, as the op `bitcast`.
    Bits(ExprId),
}

/// One stage of a row program: combine `expr` over the reduced axes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stage {
    /// How.
    pub f: StageFn,
    /// What; may use [`Expr::Acc`] of earlier stages.
    pub expr: ExprId,
}

/// How a stage combines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StageFn {
    /// A monoid.
    Fold(ReduceFn),
    /// The position (i64, along the single reduced axis) of the largest or smallest; see op `arg_reduce`.
    Arg {
        /// `Max` or `Min`.
        f: ReduceFn,
        /// The last of equals instead of the first.
        last: bool,
    },
}

/// Geometry of a convolution or pool; see the ops of those names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Window {
    /// Step of the window, one a spatial axis.
    pub strides: Vec<usize>,
    /// Step between taps.
    pub dilations: Vec<usize>,
    /// Padding before.
    pub lo: Vec<i64>,
    /// Padding after.
    pub hi: Vec<i64>,
    /// Where channels stand in input and output.
    pub layout: Layout,
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "strides {:?} dilations {:?} pads {:?} {:?}", self.strides, self.dilations, self.lo, self.hi)
    }
}

/// What fixes a region's loops.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Heart {
    /// Nothing but the outputs' expressions at each point.
    Map,
    /// A row program: stages in order, then the outputs.
    Reduce {
        /// Extents of the reduced axes.
        axes: Vec<Dim>,
        /// The stages.
        stages: Vec<Stage>,
    },
    /// `acc0[b..., m, n] = sum_k lhs[b..., m, k] * rhs[b..., k, n]`, in `acc`.
    Contract {
        /// Extent of the contracted axis.
        k: Dim,
        /// Left operand, free of axis `P - 1` (n).
        lhs: ExprId,
        /// Right operand, free of axis `P - 2` (m).
        rhs: ExprId,
        /// Accumulator dtype.
        acc: DType,
    },
    /// Convolution; `space` is the output shape in `window.layout`.
    Conv {
        /// Geometry.
        window: Window,
        /// Groups.
        groups: usize,
        /// The input over its own coordinates, extents `input`.
        x: ExprId,
        /// Extents of the input, in `window.layout`.
        input: Vec<Dim>,
        /// The weights `[o, c / groups, kernel...]` over their own coordinates.
        w: ExprId,
        /// Extents of the weights.
        weights: Vec<Dim>,
        /// Accumulator dtype.
        acc: DType,
    },
    /// A depthwise convolution and the product of every pixel's channels after it, channels-last: `acc1` is the convolution at a
    /// point of its result, `acc0[n, p..., o] = sum_c mid[n, p..., c] * point[o, c, 0...]`.
    Separable {
        /// Geometry of the depthwise convolution.
        window: Window,
        /// The input over its own coordinates, extents `input`.
        x: ExprId,
        /// Extents of the input.
        input: Vec<Dim>,
        /// The depthwise weights `[c, 1, kernel...]` over their own coordinates.
        w: ExprId,
        /// Extents of the depthwise weights.
        weights: Vec<Dim>,
        /// What the product reads: an expression of `acc1`, over the coordinates of the depthwise result.
        mid: ExprId,
        /// The product's weights `[o, c, 1...]` over their own coordinates.
        point: ExprId,
        /// Extents of the product's weights.
        filters: Vec<Dim>,
        /// Accumulator dtype of both.
        acc: DType,
    },
    /// A pool; `space` is the output shape.
    Pool {
        /// How a window combines.
        f: PoolFn,
        /// Extents of the window.
        kernel: Vec<usize>,
        /// Geometry.
        window: Window,
        /// The input over its own coordinates.
        x: ExprId,
        /// Extents of the input.
        input: Vec<Dim>,
    },
    /// Tiles of a convolution with windows of 3x3 from transformed sums; see the op `winograd_output`. `space` is `[n, h, w, o]`.
    WinogradOutput {
        /// Results of a tile along each axis.
        m: usize,
        /// The sums over their own coordinates.
        x: ExprId,
        /// Extents of the sums.
        input: Vec<Dim>,
    },
    /// `acc0[b..., s, d] = sum_t softmax_t(scale * sum_e q[b..., s, e] * k[b..., t, e] + mask[b..., s, t]) * v[b..., t, d]`.
    Attention {
        /// Queries `[b..., s, e]`.
        q: ExprId,
        /// Keys `[b..., t, e]`.
        k: ExprId,
        /// Values `[b..., t, d]`.
        v: ExprId,
        /// Added to the scaled scores, over `[b..., s, t]`.
        mask: Option<ExprId>,
        /// Scale of the scores.
        scale: Real,
        /// Extent of `t`.
        keys: Dim,
        /// Extent of `e`.
        depth: Dim,
        /// Keys of a part, where each part is a result of its own. The space is then `[b..., p, s, d + 2]`, and results are in f32 or
        /// wider; see op `attention_parts`.
        part: Option<Dim>,
    },
    /// An op that stays one op: argument `i` is operand `i`, output `i` is `Acc(i)`.
    Op(Op),
}

/// What a region writes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionOutput {
    /// Type of the written tensor.
    pub ty: TensorType,
    /// Value at a point.
    pub expr: ExprId,
    /// Where the point lands, one coordinate an axis of `ty`. With [`Heart::Reduce`], an index free of the
    /// reduced axes is written once a row.
    pub index: Vec<Dim>,
}

impl RegionOutput {
    /// Where the point lands in memory: the row-major element index of [`RegionOutput::index`].
    pub fn address(&self) -> Dim {
        self.index.iter().zip(&self.ty.shape).fold(Dim::ZERO, |at, (i, n)| at * n.clone() + i.clone()).recombine()
    }

    /// Whether a step along an axis is a step of one width in memory: nothing divides an axis.
    pub fn is_affine(&self) -> bool {
        let axis = |a: &Atom| matches!(a, Atom::Axis(_));
        !self.address().any_atom(&|a| matches!(a, Atom::Div(x, _) | Atom::Mod(x, _) if x.any_atom(&axis)))
    }
}

/// A fused kernel.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Region {
    /// A name for people: `conv_add_relu`.
    pub name: String,
    /// Types of the tensors read.
    pub args: Vec<TensorType>,
    /// Extents of the parallel axes.
    pub space: Vec<Dim>,
    /// What fixes the loops.
    pub heart: Heart,
    /// The pool: expressions with their dtypes.
    pub exprs: Vec<(Expr, DType)>,
    /// What is written.
    pub outputs: Vec<RegionOutput>,
}

impl Region {
    /// An empty region over `space`.
    pub fn new(name: impl Into<String>, space: Vec<Dim>) -> Self {
        Self { name: name.into(), args: vec![], space, heart: Heart::Map, exprs: vec![], outputs: vec![] }
    }

    /// Add an expression, or find the equal one.
    pub fn push(&mut self, expr: Expr, dtype: DType) -> ExprId {
        let entry = (expr, dtype);
        let at = self.exprs.iter().position(|e| *e == entry).unwrap_or_else(|| {
            self.exprs.push(entry);
            self.exprs.len() - 1
        });
        ExprId(at as u32)
    }

    /// Add a constant.
    pub fn constant(&mut self, value: Scalar, dtype: DType) -> ExprId {
        match value.cast(dtype) {
            Scalar::F(v) => self.push(Expr::Float(Real::new(v)), dtype),
            v => self.push(Expr::Int(v.i() as i64), dtype),
        }
    }

    /// An expression.
    pub fn expr(&self, id: ExprId) -> &Expr {
        &self.exprs[id.0 as usize].0
    }

    /// An expression's dtype.
    pub fn dtype(&self, id: ExprId) -> DType {
        self.exprs[id.0 as usize].1
    }

    /// Whether an expression, addresses aside, is computed from an argument of such a dtype.
    pub fn loads_from(&self, id: ExprId, such: &dyn Fn(DType) -> bool) -> bool {
        match self.expr(id) {
            Expr::Load { arg, .. } => such(self.args[*arg as usize].dtype),
            Expr::Call(_, xs) => xs.iter().any(|x| self.loads_from(*x, such)),
            Expr::Cast(x) | Expr::Bits(x) => self.loads_from(*x, such),
            Expr::Float(_) | Expr::Int(_) | Expr::Index(_) | Expr::Acc(_) => false,
        }
    }

    /// Extents of the axes an output expression may use: parallel, then reduced.
    pub fn axes(&self) -> Vec<Dim> {
        let mut axes = self.space.clone();
        if let Heart::Reduce { axes: reduced, .. } = &self.heart {
            axes.extend(reduced.iter().cloned());
        }
        axes
    }

    /// Whether its kernels write outputs wherever the index says, into a slice of a larger tensor too. An op that stays one
    /// op writes each result whole, but for resizes and transposed convolutions.
    pub fn writes_anywhere(&self) -> bool {
        match &self.heart {
            Heart::Op(op) => matches!(op, Op::Resize { .. } | Op::ConvTranspose { .. }),
            Heart::Map
            | Heart::Reduce { .. }
            | Heart::Contract { .. }
            | Heart::Conv { .. }
            | Heart::Separable { .. }
            | Heart::Pool { .. }
            | Heart::WinogradOutput { .. }
            | Heart::Attention { .. } => true,
        }
    }

    /// Every size symbol, in name order.
    pub fn symbols(&self) -> Vec<crate::Sym> {
        let mut found = std::collections::BTreeSet::new();
        let mut visit = |d: &Dim| found.extend(d.symbols());
        self.args.iter().flat_map(|t| &t.shape).for_each(&mut visit);
        self.outputs.iter().flat_map(|o| o.ty.shape.iter().chain(&o.index)).for_each(&mut visit);
        self.axes().iter().for_each(&mut visit);
        for (expr, _) in &self.exprs {
            match expr {
                Expr::Index(d) => visit(d),
                Expr::Load { index, .. } => index.iter().for_each(&mut visit),
                _ => {}
            }
        }
        match &self.heart {
            Heart::Contract { k, .. } => visit(k),
            Heart::Conv { input, weights, .. } => input.iter().chain(weights).for_each(&mut visit),
            Heart::Separable { input, weights, filters, .. } => input.iter().chain(weights).chain(filters).for_each(&mut visit),
            Heart::Pool { input, .. } | Heart::WinogradOutput { input, .. } => input.iter().for_each(&mut visit),
            Heart::Attention { keys, depth, part, .. } => [keys, depth].into_iter().chain(part).for_each(&mut visit),
            Heart::Op(op) => op.dims(&mut visit),
            Heart::Map | Heart::Reduce { .. } => {}
        }
        found.into_iter().collect()
    }

    /// A hash of all but the name (FNV-1a over the text), equal on every machine: what measured times are kept under.
    pub fn signature(&self) -> u64 {
        let text = Self { name: String::new(), ..self.clone() }.to_string();
        text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
    }

    /// Short name of the heart.
    pub fn kind(&self) -> &'static str {
        match &self.heart {
            Heart::Map => "map",
            Heart::Reduce { .. } => "reduce",
            Heart::Contract { .. } => "contract",
            Heart::Conv { .. } => "conv",
            Heart::Separable { .. } => "separable",
            Heart::Pool { .. } => "pool",
            Heart::WinogradOutput { .. } => "winograd_output",
            Heart::Attention { .. } => "attention",
            Heart::Op(op) => op.mnemonic(),
        }
    }
}

fn list<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

impl fmt::Display for ExprId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}", self.0)
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let args: Vec<_> = self.args.iter().enumerate().map(|(i, t)| format!("%{i}: {t}")).collect();
        writeln!(f, "region @{}({}) over [{}] {{", self.name, args.join(", "), list(&self.space))?;
        for (i, (expr, dtype)) in self.exprs.iter().enumerate() {
            write!(f, "  v{i} = ")?;
            match expr {
                Expr::Float(v) => write!(f, "const {}", crate::tensor::show(Scalar::F(v.get())))?,
                Expr::Int(v) => write!(f, "const {v}")?,
                Expr::Index(d) => write!(f, "index {d}")?,
                Expr::Load { arg, index, guard } => {
                    write!(f, "load %{arg}[{}]", list(index))?;
                    if let Some(g) = guard {
                        write!(f, " if {g}")?;
                    }
                }
                Expr::Acc(i) => write!(f, "acc{i}")?,
                Expr::Call(g, args) => write!(f, "{g} {}", list(args))?,
                Expr::Cast(x) => write!(f, "cast {x}")?,
                Expr::Bits(x) => write!(f, "bitcast {x}")?,
            }
            writeln!(f, " : {dtype}")?;
        }
        match &self.heart {
            Heart::Map => {}
            Heart::Reduce { axes, stages } => {
                for (i, s) in stages.iter().enumerate() {
                    match s.f {
                        StageFn::Fold(g) => writeln!(f, "  acc{i} = {g} over [{}] of {}", list(axes), s.expr)?,
                        StageFn::Arg { f: g, last } => writeln!(f, "  acc{i} = arg{g}{} over [{}] of {}", if last { "_last" } else { "" }, list(axes), s.expr)?,
                    }
                }
            }
            Heart::Contract { k, lhs, rhs, acc } => writeln!(f, "  acc0 = contract over {k} of {lhs}, {rhs} in {acc}")?,
            Heart::Conv { window, groups, x, input, w, weights, acc } => {
                writeln!(f, "  acc0 = conv {x}[{}], {w}[{}] {window} groups {groups} {} in {acc}", list(input), list(weights), window.layout)?
            }
            Heart::Separable { window, x, input, w, weights, mid, point, filters, acc } => {
                writeln!(f, "  acc1 = depthwise {x}[{}], {w}[{}] {window} {} in {acc}", list(input), list(weights), window.layout)?;
                writeln!(f, "  acc0 = product {mid}, {point}[{}] in {acc}", list(filters))?;
            }
            Heart::Pool { f: g, kernel, window, x, input } => {
                writeln!(f, "  acc0 = pool {g} {x}[{}] kernel {kernel:?} {window} {}", list(input), window.layout)?
            }
            Heart::WinogradOutput { m, x, input } => writeln!(f, "  acc0 = winograd_output {m} {x}[{}]", list(input))?,
            Heart::Attention { q, k, v, mask, scale, keys, depth, part } => writeln!(
                f,
                "  acc0 = attention {q}, {k}, {v}{} scale {} keys {keys} depth {depth}{}",
                mask.map_or(String::new(), |m| format!(" mask {m}")),
                scale.get(),
                part.as_ref().map_or(String::new(), |n| format!(" in parts of {n}"))
            )?,
            Heart::Op(op) => writeln!(f, "  acc = {op}")?,
        }
        for (i, o) in self.outputs.iter().enumerate() {
            writeln!(f, "  out{i}[{}] = {} : {}", list(&o.index), o.expr, o.ty)?;
        }
        writeln!(f, "}}")
    }
}
