//! Convolutions as products over patches: what a window sees is a row, the filters are columns.
//!
//! Kernels of convolutions read their image in place, so this is no gain by itself. It is one where being a product opens a way that a
//! convolution has not: sums in parts side by side (the rule `split-k`) for an image of few pixels, rows that lie in memory as matrix
//! units are fed where a pixel has one channel or three, or the bulk copies of 16-bit matrices for windows of one pixel.
use super::computed::{Build, Egraph, op};
use crate::{
    eqsat::{Term, cost::PIECE},
    form,
};
use pavage_ir::{DType, Dim, Op, attr::Layout};

/// Sums shorter than this are not worth splitting.
const LONG: usize = 512;
/// Pixels from which on minimal filtering (the rule `winograd`) has tiles enough: in f32 it does better than sums in parts.
const TILED: i64 = 512;

/// `conv(x, w) = patches(x) @ w^T`, on wide devices; of windows of one pixel the patches are the image itself.
pub(super) fn im2col(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(operation @ Op::Conv { strides, dilations, lo, hi, groups: 1, layout: Layout::ChannelsLast }) = op(term) else { return vec![] };
    let [image, weights] = term.args[..] else { return vec![] };
    let (x, w) = (&e[image].data.ty, &e[weights].data.ty);
    let Some(shape) = e.lookup(term.clone()).map(|c| e[c].data.ty.shape.clone()) else { return vec![] };
    let Some(sizes) = w.const_shape() else { return vec![] };
    let [filters, channels, kernel @ ..] = &sizes[..] else { return vec![] };
    let floats = matches!(x.dtype, DType::F32 | DType::F16 | DType::BF16);
    let spatial = kernel.len();
    let costs = &e.analysis.costs;
    if !costs.is_wide() || !floats || x.dtype != w.dtype || sizes.contains(&0) {
        return vec![];
    }
    let one_pixel = form::is_point_product(operation, &w.shape);
    let taps: usize = kernel.iter().product();
    let (half, sum) = (x.dtype.bits() == 16, channels * taps);
    let [rows, columns] = if half { costs.half_tile } else { costs.tile };
    let pixels: Dim = shape[..=spatial].iter().cloned().product();
    let tiles = pixels.as_const().map(|m| (m as f64 / rows).ceil() * (*filters as f64 / columns).ceil());
    let once = [strides, dilations].iter().all(|steps| steps.as_slice() == [1, 1]);
    let filtered = !half && once && kernel == [3, 3] && e[weights].data.constant && pixels.as_const().is_none_or(|n| n >= TILED);
    let few = sum >= LONG && !filtered && tiles.is_some_and(|t| 2.0 * t <= costs.units);
    let fed = half && *filters % PIECE == 0;
    if !few && !(fed && (one_pixel || channels % PIECE != 0)) {
        return vec![];
    }
    let width = if half { sum.next_multiple_of(PIECE) } else { sum };
    let patches = if one_pixel {
        Build::Class(image)
    } else {
        let kernel = kernel.to_vec();
        Build::Op(
            Op::Patches { kernel, strides: strides.clone(), dilations: dilations.clone(), lo: lo.clone(), hi: hi.clone(), width },
            vec![Build::Class(image)],
        )
    };
    let width = if one_pixel { sum } else { width };
    let matrix = Build::Op(Op::Reshape { shape: vec![pixels, Dim::from(width)] }, vec![patches]);
    // Filters as columns; what lies behind the last tap is multiplied by nothing.
    let perm: Vec<usize> = (2..2 + spatial).chain([1, 0]).collect();
    let of = |rows: usize| vec![Dim::from(rows), Dim::from(*filters)];
    let mut columns = Build::Op(Op::Reshape { shape: of(sum) }, vec![Build::Op(Op::Transpose { perm }, vec![Build::Class(weights)])]);
    if width > sum {
        let zero = Build::Op(Op::Cast { to: w.dtype }, vec![Build::Op(Op::Dims { values: vec![Dim::ZERO] }, vec![])]);
        let zero = Build::Op(Op::Reshape { shape: vec![Dim::one(), Dim::one()] }, vec![zero]);
        columns = Build::Op(Op::Concat { axis: 0 }, vec![columns, Build::Op(Op::Broadcast { shape: of(width - sum) }, vec![zero])]);
    }
    let product = Build::Op(Op::MatMul { out: x.dtype }, vec![matrix, columns]);
    vec![Build::Op(Op::Reshape { shape }, vec![product])]
}
