//! Convolutions with windows of 3x3 by minimal filtering (arXiv 1509.09308): fewer multiplications, more additions and memory.
//!
//! On a CPU it pays from 16 channels and 8 tiles on. On a GPU it is three kernels in place of one: measured on an H200 (BENCHMARKS.md), in f32 it
//! is two to five times as fast as a direct convolution but for the smallest ones; in 16 bits tiles of 2 pay where there are many images
//! of many channels, and sums in parts (`im2col`) are as fast for one image. Tiles of 4 would be a quarter faster there, at ten times the
//! error of a convolution rounded once: they are left to f32.
use super::computed::{Build, Egraph, op};
use crate::eqsat::Term;
use pavage_ir::{DType, Dim, Op, attr::Layout, winograd::WINDOW};

/// Results along each axis of a tile: larger ones multiply less, have more weights and round more.
const TILES: [usize; 2] = [4, 2];
/// With fewer channels on either side the transforms cost more than the products they save.
const LEAST: i64 = 16;

/// With fewer tiles the windows, of which there are four times as many elements, are read for too few products each.
const LEAST_TILES: i64 = 8;

/// `conv(x, w) = output(input(x) @ filter(w))`, a product for each element of a tile; the windows are constants, so that their
/// transforms are made at compile time.
pub(super) fn winograd(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::Conv { strides, dilations, lo, hi, groups: 1, layout: Layout::ChannelsLast }) = op(term) else { return vec![] };
    let (x, w) = (&e[term.args[0]].data, &e[term.args[1]].data);
    let once = [strides, dilations].iter().all(|steps| steps.as_slice() == [1, 1]);
    let wide = e.analysis.costs.is_wide();
    // In 16 bits, tiles of 4 lose three bits, tiles of 2 about one.
    let half = wide && matches!(x.ty.dtype, DType::F16 | DType::BF16);
    let fits = (x.ty.dtype == DType::F32 || half) && w.ty.dtype == x.ty.dtype && w.constant && w.ty.rank() == 4;
    if !once || !fits {
        return vec![];
    }
    let window = |n: &Dim| n.is(WINDOW as i64);
    let padded = lo.iter().chain(hi).all(|p| (0..WINDOW as i64).contains(p));
    let [filters, channels, kernel @ ..] = &w.ty.shape[..] else { return vec![] };
    if !padded || !kernel.iter().all(window) || [filters, channels].iter().any(|n| n.as_const().is_none_or(|n| n < LEAST)) {
        return vec![];
    }
    let out = |i: usize| x.ty.shape[1 + i].clone() + Dim::from(lo[i] + hi[i] + 1 - WINDOW as i64);
    let shape = vec![x.ty.shape[0].clone(), out(0), out(1), filters.clone()];
    let tiled = |m: usize| {
        let input = Build::Op(Op::WinogradInput { m, lo: lo.clone(), hi: hi.clone() }, vec![Build::Class(term.args[0])]);
        let filter = Build::Op(Op::WinogradFilter { m }, vec![Build::Class(term.args[1])]);
        let sums = Build::Op(Op::MatMul { out: DType::F32 }, vec![input, filter]);
        let out = Build::Op(Op::WinogradOutput { m, shape: shape.clone() }, vec![sums]);
        if half { Build::Op(Op::Cast { to: x.ty.dtype }, vec![out]) } else { out }
    };
    let many = |m: &usize| {
        let tiles = shape[0].clone() * shape[1].ceil_div(&Dim::from(*m)) * shape[2].ceil_div(&Dim::from(*m));
        tiles.as_const().is_none_or(|n| n >= LEAST_TILES)
    };
    TILES.into_iter().filter(|m| *m == 2 || !half).filter(many).map(tiled).collect()
}
