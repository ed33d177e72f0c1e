//! Packed weights of a matrix product or a convolution: `(cast(x) - zero) * scale` with a constant `x` of 4, 8 or 16 bits, in panels as narrow as
//! in the model.
//!
//! A product of a few rows reads the panels themselves and makes numbers of them in registers: what it costs is what is read
//! from memory. For more rows a panel is made into f32 in scratch once a row block, and multiplied from there.
use super::{
    expr::{Env, Lanes, Point, VectorAxis},
    flat::{self, Linear},
    pack::Cells,
};
use crate::tile::{Builder, Val};
use pavage_ir::{DType, Dim, Expr, ExprId, Region, Scalar, ScalarFn};

/// A right operand that is packed weights.
pub(super) struct Weights {
    /// The argument that holds them.
    pub(super) arg: usize,
    /// Where an element is.
    pub(super) at: Linear,
    /// Whether elements have a sign.
    signed: bool,
    /// How panels hold them.
    pub(super) cells: Cells,
    zero: Option<ExprId>,
    scale: Option<ExprId>,
    /// Steps along the contracted axis for which a zero point and a scale hold; none: all.
    pub(super) block: Option<usize>,
}

impl Weights {
    /// The right operand `id` of a contraction over axis `k_axis` of extent `k`, as packed weights.
    pub(super) fn of(region: &Region, id: ExprId, k_axis: usize, k: &Dim) -> Option<Weights> {
        Weights::along(region, id, (k_axis, k_axis + 1), usize::try_from(k.as_const()?).ok()?)
    }

    /// The filters `id` of a convolution, of this shape (outputs, channels, window), as packed weights: blocks are of channels, and
    /// each tap may have its own.
    pub(super) fn of_filters(region: &Region, id: ExprId, shape: &[usize]) -> Option<Weights> {
        let channels = shape[1];
        let weights = Weights::along(region, id, (1, shape.len()), channels)?;
        let pairs = weights.cells == Cells::Whole || channels.is_multiple_of(2);
        pairs.then(|| Weights { block: Some(weights.block.unwrap_or(channels)), ..weights })
    }

    /// Packed weights over so many axes, one of which is contracted and has extent `n`.
    fn along(region: &Region, id: ExprId, (axis, axes): (usize, usize), n: usize) -> Option<Weights> {
        let part = |id: ExprId, f: ScalarFn| match region.expr(id) {
            Expr::Call(g, xs) if *g == f => (xs[0], Some(xs[1])),
            _ => (id, None),
        };
        let (rest, scale) = part(id, ScalarFn::Mul);
        let (cast, zero) = part(rest, ScalarFn::Sub);
        let Expr::Cast(x) = region.expr(cast) else { return None };
        let (dtype, all) = (region.dtype(*x), [Some(id), Some(cast), zero, scale]);
        let narrow = dtype.is_int() && matches!(dtype.bits(), 4 | 8) || matches!(dtype, DType::F16 | DType::BF16);
        if !narrow || all.into_iter().flatten().any(|e| region.dtype(e) != DType::F32) {
            return None;
        }
        let Expr::Load { arg, index, guard: None } = region.expr(*x) else { return None };
        let at = flat::linear(&flat::offset(index, &region.args[*arg as usize].shape), axes)?;
        let cells = if dtype.bits() == 4 { Cells::Nibbles } else { Cells::Whole };
        let env = Env::with_bufs(region, vec![], vec![]);
        let varies = |tile: Option<i64>| {
            let test = |d: &Dim| env.lanes_along(d, axis, tile) != Lanes::Step(0);
            [zero, scale].into_iter().flatten().any(|e| flat::any_index(region, e, &test))
        };
        let block = match varies(None) {
            false => None,
            // Nibbles of two steps share a byte.
            true => Some((2..=n / 2).rev().find(|b| n.is_multiple_of(*b) && (cells == Cells::Whole || b % 2 == 0) && !varies(Some(*b as i64)))?),
        };
        Some(Weights { arg: *arg as usize, at, signed: dtype.is_int() && dtype.int_range().0 < 0, cells, zero, scale, block })
    }

    /// What makes numbers of `nv` vectors of columns from the point on, along `axis`, where `count` columns exist.
    pub(super) fn decode(&self, b: &mut Builder, env: &mut Env<'_>, axes: &[Val], vector: VectorAxis, nv: usize, partial: Option<Val>) -> Decode {
        let mut each = |b: &mut Builder, id: Option<ExprId>| -> Vec<Val> {
            let Some(id) = id else { return vec![] };
            (0..nv)
                .map(|j| {
                    let mut axes = axes.to_vec();
                    axes[vector.axis] = b.add_i(axes[vector.axis], (j * vector.lanes) as i64);
                    let count = partial.map(|n| b.sub(n, axes[vector.axis]));
                    let mut p = Point::vector(axes, VectorAxis { count, ..vector });
                    env.expr_lanes(b, id, &mut p)
                })
                .collect()
        };
        let scale = self.scale.filter(|_| self.block.is_some());
        Decode { cells: self.cells, signed: self.signed, zero: each(b, self.zero), scale: each(b, scale) }
    }

    /// The scale of a column, where one holds for all of it: sums are multiplied by it, not their parts.
    pub(super) fn factor(&self) -> Option<ExprId> {
        self.scale.filter(|_| self.block.is_none())
    }

    /// Rows up to which weights become numbers in registers, each time they are read: bytes and halves are made so
    /// beside the arithmetic of a tile or two, nibbles and blocks take longer than that.
    pub(super) fn few_rows(&self) -> usize {
        if self.cells == Cells::Whole && self.block.is_none() { 24 } else { 4 }
    }
}

/// How loaded weights become f32, for the steps of one block.
#[derive(Clone, Debug)]
pub(super) struct Decode {
    pub(super) cells: Cells,
    signed: bool,
    /// Zero points and scales of each vector of columns; empty where there are none.
    zero: Vec<Val>,
    scale: Vec<Val>,
}

impl Decode {
    /// Vector `j` of step `step` (its parity counts) from what lies in the panel.
    pub(super) fn value(&self, b: &mut Builder, loaded: Val, step: usize, j: usize) -> Val {
        let mut v = loaded;
        if self.cells == Cells::Nibbles {
            let wide = b.cast(v, DType::I32);
            let number = |b: &mut Builder, n: i128| b.constant(Scalar::I(n), DType::I32);
            v = match (self.signed, step % 2) {
                (true, odd) => {
                    let (up, down) = (number(b, if odd == 1 { 24 } else { 28 }), number(b, 28));
                    let high = b.map(ScalarFn::Shl, &[wide, up]);
                    b.map(ScalarFn::Shr, &[high, down])
                }
                (false, 0) => {
                    let mask = number(b, 15);
                    b.map(ScalarFn::And, &[wide, mask])
                }
                (false, _) => {
                    let four = number(b, 4);
                    b.map(ScalarFn::Shr, &[wide, four])
                }
            };
        }
        v = b.cast(v, DType::F32);
        if let Some(zero) = self.zero.get(j) {
            v = b.sub(v, *zero);
        }
        if let Some(scale) = self.scale.get(j) {
            v = b.mul(v, *scale);
        }
        v
    }
}
