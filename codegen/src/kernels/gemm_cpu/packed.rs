//! Packed weights in matrix products: blocks walked, panels made numbers in scratch, sums scaled.
use super::{Block, Cx, Panel};
use crate::{
    kernels::{
        expr::{Env, Point, VectorAxis},
        micro::Right,
        pack::Cells,
        weights::{Decode, Weights},
    },
    tile::{Buf, Builder, Val},
};
use pavage_ir::ExprId;

impl Cx<'_> {
    /// Sums times the scale of their columns, which begin at the last of `axes`.
    pub(super) fn scaled(&self, b: &mut Builder, env: &mut Env<'_>, mut acc: Vec<Val>, nv: usize, factor: Option<ExprId>, axes: &[Val]) -> Vec<Val> {
        let Some(factor) = factor else { return acc };
        let column = axes.len() - 1;
        let partial = self.gemm.n().as_const().is_none_or(|n| n % self.lanes as i64 != 0);
        for j in 0..nv {
            let mut axes = axes.to_vec();
            axes[column] = b.add_i(axes[column], (j * self.lanes) as i64);
            let count = partial.then(|| b.sub(self.n, axes[column]));
            axes.push(b.index(0));
            let mut p = Point::vector(axes, VectorAxis { axis: column, lanes: self.lanes, count, aligned: true });
            let scale = env.expr_lanes(b, factor, &mut p);
            for sum in acc.iter_mut().skip(j).step_by(nv) {
                *sum = b.mul(*sum, scale);
            }
        }
        acc
    }

    /// Walk the blocks of packed weights: `step` gets how to make numbers of them, where the block begins (in contracted
    /// elements, and in steps of the panel), its length and what is carried.
    pub(super) fn blocks_of(
        &self,
        b: &mut Builder,
        env: &mut Env<'_>,
        block: &Block<'_>,
        weights: &Weights,
        carried: &[Val],
        mut step: impl FnMut(&mut Builder, &Decode, (Val, Val, Val), Vec<Val>) -> Vec<Val>,
    ) -> Vec<Val> {
        let k_axis = self.gemm.k_axis();
        // Panels are made of constants: the extent is known.
        let k = self.gemm.k.as_const().unwrap_or(0);
        let len = weights.block.map_or(k, |n| n as i64);
        let partial = (self.gemm.n().as_const().is_none_or(|n| n % self.lanes as i64 != 0)).then_some(self.n);
        let vector = VectorAxis { axis: k_axis - 1, lanes: self.lanes, count: None, aligned: true };
        let mut one = |b: &mut Builder, k0: Val, acc: Vec<Val>| {
            let mut axes = block.batch.to_vec();
            axes.extend([b.index(0), block.column, k0]);
            let decode = weights.decode(b, env, &axes, vector, block.class.nv, partial);
            let pairs = if weights.cells == Cells::Nibbles { b.div_i(k0, 2) } else { k0 };
            let n = b.index(len);
            step(b, &decode, (k0, pairs, n), acc)
        };
        let zero = b.index(0);
        if len == k {
            return one(b, zero, carried.to_vec());
        }
        b.for_(zero, self.k, len, carried, |b, k0, acc| one(b, k0, acc.to_vec()))
    }

    /// A block of packed weights as f32 in a scratch panel `[k, nv, lanes]`.
    pub(super) fn unpacked(&self, b: &mut Builder, env: &mut Env<'_>, block: &Block<'_>, from: Right, weights: &Weights) -> Right {
        let (nv, lanes) = (block.class.nv, self.lanes);
        let panel = Panel { buf: self.scratch.unwrap_or(Buf(0)), base: env.size(b, &self.staged_len), width: nv * lanes };
        self.blocks_of(b, env, block, weights, &[], |b, decode, (k0, pairs, len), _| {
            let start = b.mul(pairs, from.step);
            let start = b.add(from.base, start);
            let to = b.mul_i(k0, panel.width as i64);
            let to = b.add(panel.base, to);
            let some = |b: &mut Builder, s: Val, count: i64| {
                for j in 0..nv {
                    let vector = b.mul_i(from.vector, j as i64);
                    let vector = b.add(start, vector);
                    let mut loaded = None;
                    for u in 0..count as usize {
                        let both = decode.cells == Cells::Nibbles;
                        let v = match loaded.filter(|_| both && u % 2 == 1) {
                            Some(v) => v,
                            None => {
                                let at = b.add_i(s, u as i64);
                                let at = if both { b.div_i(at, 2) } else { at };
                                let at = b.mul(at, from.step);
                                let at = b.add(vector, at);
                                b.load(from.buf, at, lanes)
                            }
                        };
                        loaded = Some(v);
                        let v = decode.value(b, v, u, j);
                        let at = b.add_i(s, u as i64);
                        let at = b.mul_i(at, panel.width as i64);
                        let at = b.add(to, at);
                        let at = b.add_i(at, (j * lanes) as i64);
                        b.store(panel.buf, at, v);
                    }
                }
            };
            let n = b.as_index(len).unwrap_or(0);
            let (zero, whole) = (b.index(0), b.index(n / 4 * 4));
            b.for_(zero, whole, 4, &[], |b, s, _| {
                some(b, s, 4);
                vec![]
            });
            some(b, whole, n % 4);
            vec![]
        });
        let (vector, step) = (b.index(lanes as i64), b.index(panel.width as i64));
        Right { buf: panel.buf, base: panel.base, vector, step, count: None, ahead: None }
    }
}
