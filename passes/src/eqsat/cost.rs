//! What a kernel is predicted to cost: a roofline with a launch cost, in nanoseconds.
//!
//! A table of constants with a row for each kind of device. A kernel takes as long as its arithmetic or its memory does, the
//! longer of the two: arithmetic is rounded up to the vectors, tiles and, on GPUs, waves of tiles that the device runs, memory
//! is as fast as the level that what is moved fits into. Measured times stand before predictions when a plan is tuned.
use super::count::{Around, Counter, inside};
use crate::fuse::unpacked;
use pavage_ir::{DType, Dim, Expr, ExprId, Heart, Op, Region, ScalarFn, TensorType, attr::Layout, dim::Atom, program::Price, region::Window};
use std::{collections::BTreeMap, sync::Arc};

/// What a device does in a nanosecond.
#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    /// Starting a kernel, as part of its time.
    pub launch_ns: f64,
    /// Going from one kernel to the next, which is part of neither's time: threads meet, and code and data are cold. What a
    /// plan of more kernels has to gain by each.
    pub boundary_ns: f64,
    /// Starting a contraction: operands are packed, or a pipeline fills.
    pub fill_ns: f64,
    /// Bytes that a kernel moves in a nanosecond where it moves fewer than so many, ascending: the levels of the memory.
    pub levels: [(f64, f64); 4],
    /// Bytes of weights that a contraction reads in a nanosecond: other kernels ran since they were last read.
    pub weight_bytes_per_ns: f64,
    /// How many bytes read a written byte counts as: a line is fetched before it is written.
    pub write: f64,
    /// Points of pointwise code that a vector holds.
    pub lanes: f64,
    /// What contractions are rounded up to: rows and columns of a tile, and how many tiles run at a time.
    pub tile: [f64; 2],
    /// The same where operands have 16 bits.
    pub half_tile: [f64; 2],
    /// Tiles that run at a time; a kernel takes as long as if the last ones were as many.
    pub units: f64,
    /// Multiply-adds of a tiled contraction, counted as two.
    pub contract_flops_per_ns: f64,
    /// The same where operands have 16 bits.
    pub half_flops_per_ns: f64,
    /// What contractions of 16-bit operands that are copied piece by piece are rounded up to: of convolutions, and of products whose operands
    /// do not lie as copies of whole tiles want them.
    pub piece_tile: [f64; 2],
    /// Multiply-adds of these.
    pub piece_flops_per_ns: f64,
    /// Starting a product whose operands come in whole tiles takes so much longer.
    pub tiles_fill_ns: f64,
    /// The same of integers of a byte into sums of 32 bits.
    pub byte_flops_per_ns: f64,
    /// Multiply-adds of fused attention.
    pub attention_flops_per_ns: f64,
    /// Simple operations of pointwise code.
    pub map_ops_per_ns: f64,
    /// Simple operations done once for a row: those of rows side by side overlap.
    pub scalar_ops_per_ns: f64,
    /// Reading or writing one element where its neighbours lie apart, and the bytes that come along.
    pub stray: (f64, f64),
    /// Reading one element of a convolution's image that lies in memory plane by plane, channels apart, beyond what reading it
    /// otherwise takes; infinite where kernels do not.
    pub plane_ns: f64,
    /// What a depthwise convolution and the product behind it take longer in one kernel, as a share of their arithmetic; infinite
    /// where no kernel does both.
    pub separable: f64,
    /// Ending a row with a part of a vector.
    pub tail_ns: f64,
    /// Ending one reduction of one row.
    pub fold_ns: f64,
    /// Rows of a matrix product up to which packed weights pay: beyond, the arithmetic hides what they save.
    pub packed_rows: i64,
    /// Pixels of a convolution with windows up to which packed weights pay.
    pub packed_pixels: i64,
    /// Following one edge of a decision tree: it waits for the one before.
    pub edge_ns: f64,
    /// Value of a size symbol when nothing better is known.
    pub nominal_size: i64,
    /// What the user expects of size symbols, by name.
    pub expected: Option<Arc<BTreeMap<String, i64>>>,
    /// Times that a tuner measured.
    pub measured: Option<Arc<Measured>>,
}

/// Measured times, which stand before predictions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Nanoseconds of one launch, by [`Region::signature`].
    pub ns: BTreeMap<u64, f64>,
    /// What predictions are multiplied by, so that kernels that were not measured compare with those that were.
    pub scale: f64,
}

/// One core with AVX-512, at about 4 GHz; measured there, kernel by kernel, with `pavage bench --residual`.
pub const CPU: Costs = Costs {
    launch_ns: 20.0,
    boundary_ns: 100.0,
    fill_ns: 20.0,
    levels: [(5e5, 450.0), (2e6, 200.0), (3.2e7, 130.0), (f64::INFINITY, 20.0)],
    weight_bytes_per_ns: 45.0,
    write: 2.0,
    lanes: 16.0,
    tile: [4.0, 16.0],
    half_tile: [4.0, 16.0],
    units: 1.0,
    contract_flops_per_ns: 245.0,
    half_flops_per_ns: 235.0,
    piece_tile: [4.0, 16.0],
    piece_flops_per_ns: 235.0,
    tiles_fill_ns: 0.0,
    byte_flops_per_ns: 900.0,
    attention_flops_per_ns: 24.0,
    map_ops_per_ns: 110.0,
    scalar_ops_per_ns: 16.0,
    stray: (0.15, 64.0),
    plane_ns: 0.4,
    separable: 0.03,
    tail_ns: 4.0,
    fold_ns: 8.0,
    edge_ns: 2.1,
    packed_rows: 4096,
    packed_pixels: 4,
    nominal_size: 64,
    expected: None,
    measured: None,
};

/// One core with AVX2: half the vectors, the same memory.
pub const CPU_AVX2: Costs = Costs {
    lanes: 8.0,
    tile: [4.0, 8.0],
    half_tile: [4.0, 8.0],
    contract_flops_per_ns: 0.5 * CPU.contract_flops_per_ns,
    half_flops_per_ns: 0.5 * CPU.half_flops_per_ns,
    piece_tile: [4.0, 8.0],
    piece_flops_per_ns: 0.5 * CPU.piece_flops_per_ns,
    byte_flops_per_ns: 0.5 * CPU.byte_flops_per_ns,
    map_ops_per_ns: 0.6 * CPU.map_ops_per_ns,
    ..CPU
};

/// A Hopper-class GPU, kernels launched from a graph.
pub const GPU: Costs = Costs {
    launch_ns: 1500.0,
    boundary_ns: 0.0,
    fill_ns: 500.0,
    levels: [(f64::INFINITY, 3500.0); 4],
    weight_bytes_per_ns: 3500.0,
    write: 1.0,
    lanes: 1.0,
    tile: [64.0, 64.0],
    half_tile: [128.0, 64.0],
    units: 132.0,
    contract_flops_per_ns: 25_000.0,
    half_flops_per_ns: 850_000.0,
    piece_tile: [32.0, 64.0],
    piece_flops_per_ns: 135_000.0,
    tiles_fill_ns: 1000.0,
    byte_flops_per_ns: 200_000.0,
    attention_flops_per_ns: 400_000.0,
    map_ops_per_ns: 10_000.0,
    scalar_ops_per_ns: 10_000.0,
    stray: (0.0, 32.0),
    plane_ns: f64::INFINITY,
    separable: f64::INFINITY,
    tail_ns: 0.0,
    fold_ns: 0.02,
    edge_ns: 0.02,
    packed_rows: 16,
    packed_pixels: 0,
    nominal_size: 64,
    expected: None,
    measured: None,
};

/// An Ampere-class GPU, kernels launched from a graph.
pub const SM_80: Costs = Costs {
    launch_ns: 2000.0,
    levels: [(f64::INFINITY, 1500.0); 4],
    weight_bytes_per_ns: 1500.0,
    units: 108.0,
    contract_flops_per_ns: 12_000.0,
    half_tile: [64.0, 128.0],
    half_flops_per_ns: 180_000.0,
    piece_flops_per_ns: 100_000.0,
    tiles_fill_ns: 0.0,
    byte_flops_per_ns: 150_000.0,
    attention_flops_per_ns: 120_000.0,
    map_ops_per_ns: 5_000.0,
    ..GPU
};

impl Costs {
    /// Whether a kernel must have many tiles to keep the device busy: a GPU, not a core.
    pub(crate) fn is_wide(&self) -> bool {
        self.units > 1.0
    }

    /// Moving so many bytes between kernels; written ones count [`Costs::write`] times.
    pub fn memory_ns(&self, bytes: f64) -> f64 {
        let level = self.levels.iter().find(|(most, _)| bytes <= *most);
        bytes / level.map_or(1.0, |(_, rate)| *rate)
    }

    /// Products and what is around them, which runs beside the products of the next tile.
    fn beside(&self, products: f64, around: &Around) -> f64 {
        let vectors = around.ops / self.map_ops_per_ns + around.folds * self.fold_ns + around.tails * self.tail_ns;
        let single = around.scalar_ops / self.scalar_ops_per_ns + around.strays * self.stray.0;
        let others = vectors + single;
        products.max(others) + 0.5 * products.min(others)
    }

    /// A size: symbols as they are expected, or at their nominal value.
    pub(crate) fn nominal(&self, d: &Dim) -> i64 {
        let symbol = |a: &Atom| match a {
            Atom::Sym(s) => Some(self.expected.as_ref().and_then(|e| e.get(&*s.name).copied()).unwrap_or(self.nominal_size)),
            _ => None,
        };
        d.eval(&symbol).unwrap_or(self.nominal_size)
    }

    /// [`Costs::nominal`], to calculate with.
    pub(super) fn size(&self, d: &Dim) -> f64 {
        self.nominal(d) as f64
    }

    /// Points of so many contractions of `m` by `n`, rounded up to what the device computes.
    fn tiled(&self, batch: f64, m: f64, n: f64, [rows, columns]: [f64; 2]) -> f64 {
        let tiles = batch * (m / rows).ceil() * (n / columns).ceil();
        (tiles / self.units).ceil() * self.units * rows * columns
    }
}

impl Default for Costs {
    fn default() -> Self {
        CPU
    }
}

/// What a plan pays for `region`, in nanoseconds: its time, and going on to the next kernel.
pub fn predict(region: &Region, costs: &Costs) -> f64 {
    costs.boundary_ns + time(region, costs)
}

/// Time of one run of `region` in nanoseconds: measured, or else predicted.
pub fn time(region: &Region, costs: &Costs) -> f64 {
    match &costs.measured {
        Some(m) => m.ns.get(&region.signature()).copied().unwrap_or_else(|| m.scale * price(region, costs).total),
        None => price(region, costs).total,
    }
}

/// What one run of `region` is predicted to cost.
pub fn price(region: &Region, costs: &Costs) -> Price {
    let size = |d: &Dim| costs.size(d);
    let product = |dims: &[Dim]| dims.iter().map(size).product::<f64>();
    let bytes = |ty: &TensorType| product(&ty.shape) * ty.dtype.bits() as f64 / 8.0;
    let counter = Counter::new(region, costs);
    let points = counter.points();
    let mut around = counter.around();
    let half = region.args.first().is_some_and(|t| t.dtype.bits() == 16);
    let whole = half && in_tiles(region);
    let matrix_bytes = costs.is_wide() && on_matrix_units(region, costs);
    let tile = if whole {
        costs.half_tile
    } else if half || matrix_bytes {
        costs.piece_tile
    } else {
        costs.tile
    };
    // Products of bytes; wider integers are multiplied as floats are.
    let bytewise = region.args.first().is_some_and(|t| t.dtype.bits() <= 8);
    let mut integers = bytewise && matches!(&region.heart, Heart::Contract { acc: DType::I32, .. } | Heart::Conv { acc: DType::I32, .. });
    let (mut contract, mut weight_bytes) = (0.0, 0.0);
    // Packed weights are read as they are stored.
    let loaded = |id: ExprId| match region.expr(unpacked(region, id)) {
        Expr::Load { arg, .. } => region.args.get(*arg as usize).map_or(0.0, bytes),
        _ => 0.0,
    };
    let streams = matches!(region.heart, Heart::Map | Heart::Reduce { .. });
    match &region.heart {
        Heart::Map | Heart::Reduce { .. } => {}
        Heart::Contract { k, lhs, rhs, .. } => {
            weight_bytes = loaded(*rhs);
            let [batch @ .., m, n] = region.space.as_slice() else { return Price::default() };
            let p = region.space.len();
            let apart =
                |axes: &[usize], run: i64| matches!(region.expr(*lhs), Expr::Load { .. }) && !axes.iter().any(|axis| counter.in_pieces(*lhs, *axis, run));
            if half && costs.is_wide() && apart(&[p, p - 2], PIECE as i64) || matrix_bytes && (apart(&[p], WORD) || k.as_const().is_some_and(|k| k % WORD != 0))
            {
                around.ops += LOOSE * product(batch) * size(m) * size(k) * (size(n) / tile[1]).ceil();
            }
            contract = 2.0 * size(k) * costs.tiled(product(batch), size(m), size(n), tile);
        }
        Heart::Conv { window, groups, x, w, weights, input, .. } => {
            weight_bytes = loaded(*w);
            around.ops += planes(region, *x, *groups, input, weights, costs) * costs.map_ops_per_ns;
            let (filters, taps) = (size(&weights[0]), product(&weights[1..]));
            let pixels = points / filters.max(1.0);
            if *groups > 1 && weights[1].is(1) {
                // Bytes are widened first.
                contract = depthwise(window, input, weights, &region.space, costs);
                integers = false;
            } else {
                // Channels that do not fill a piece come one by one, and so do bytes that are computed.
                let uneven = |run: i64| weights[1].as_const().is_some_and(|c| c % run != 0);
                if half && costs.is_wide() && uneven(PIECE as i64)
                    || matrix_bytes && (uneven(WORD) || !matches!(region.expr(unpacked(region, *x)), Expr::Load { .. }))
                {
                    around.ops += LOOSE * pixels * taps * (filters / tile[1]).ceil();
                }
                let groups = *groups as f64;
                contract = 2.0 * taps * costs.tiled(groups, pixels, filters / groups, tile);
            }
        }
        Heart::Separable { window, input, weights, filters, mid, .. } => return separable(region, (window, input, weights), filters, *mid, &around, costs),
        Heart::Pool { kernel, .. } => around.ops += points * kernel.iter().product::<usize>() as f64,
        Heart::WinogradOutput { m, input, .. } => {
            // What each result is of a sum over the tile, one axis after the other; sums of pairs are shared.
            let (side, tiles) = ((m + 2) as f64, size(&input[1]) * size(&input[2]));
            around.ops += tiles * (side * side + 0.5 * (side + *m as f64) * side * *m as f64);
        }
        Heart::Op(Op::WinogradInput { m, .. }) => {
            let (side, x) = ((m + 2) as f64, &region.space);
            around.ops += size(&x[1]) * size(&x[2]) * (side * side + side * side * side);
        }
        Heart::Attention { .. } if let Some(price) = few_queries(region, costs) => return price,
        Heart::Attention { keys, depth, q, k, v, mask, .. } => {
            // The matrix units take 16-bit heads of 64 and 128 that lie in one piece each, with masks of floats or of positions; other
            // attention runs in plain loops.
            let inner = region.space.len().saturating_sub(1);
            let heads = depth.as_const().is_some_and(|d| d == 64 || d == 128)
                && [q, k, v].into_iter().all(|x| region.dtype(*x).bits() == 16 && lies_along(region, *x, inner));
            let fast = heads && mask.is_none_or(|m| !region.loads_from(m, &|dtype| !dtype.is_float()));
            let rate = if fast { costs.attention_flops_per_ns } else { costs.attention_flops_per_ns.min(costs.map_ops_per_ns / 4.0) };
            let [batch @ .., rows, width] = region.space.as_slice() else { return Price::default() };
            let rows = costs.tiled(product(batch), size(rows), 1.0, [if fast { 64.0 } else { 1.0 }, 1.0]);
            let flops = 2.0 * size(keys) * rows * (size(depth) + size(width));
            return Price { launch: costs.launch_ns, arithmetic: flops / rate, memory: 0.0, total: costs.launch_ns + flops / rate };
        }
        Heart::Op(Op::Lstm { .. } | Op::Gru { .. } | Op::Rnn { .. }) => {
            // Products with the weights at every step, each waiting for the step before: half the rate.
            if let Some([x, w, r]) = region.args.get(..3) {
                let rows = product(&x.shape[..2.min(x.shape.len())]);
                contract = 4.0 * rows * (product(&w.shape) + product(&r.shape));
            }
        }
        Heart::Op(Op::ConvTranspose { groups, layout, .. }) => {
            // A product with the weights of every tap at each element of the input.
            if let [x, w] = &region.args[..] {
                let channels = x.shape.get(if *layout == Layout::ChannelsLast { x.shape.len().saturating_sub(1) } else { 1 }).map_or(1.0, size);
                let (filters, taps) = (w.shape.get(1).map_or(1.0, size), w.shape.get(2..).map_or(1.0, product));
                let pixels = product(&x.shape) / channels.max(1.0);
                contract = 2.0 * channels / *groups as f64 * taps * costs.tiled(*groups as f64, pixels, filters, tile);
            }
        }
        Heart::Op(Op::TreeEnsemble { .. }) => {
            // A path for each row and tree; trees are about as deep as if they were balanced.
            let count = |arg: usize, axes: usize| region.args.get(arg).map_or(1.0, |t| product(&t.shape[..axes.min(t.shape.len())]));
            let (rows, nodes, trees) = (count(0, 1), count(1, 1), count(7, 1));
            let depth = (0.5 * (nodes / trees.max(1.0) + 1.0)).max(2.0).log2();
            around.ops += rows * trees * depth * costs.edge_ns * costs.map_ops_per_ns;
        }
        Heart::Op(_) => around.ops += region.args.iter().map(|t| product(&t.shape)).sum::<f64>(),
    }
    let read = region.args.iter().zip(touched(region, costs)).map(|(t, touched)| {
        let read = bytes(t).min(touched * t.dtype.bits() as f64 / 8.0);
        if streams { read.min(points * 8.0) } else { read }
    });
    let read: f64 = read.sum();
    let written: f64 = region.outputs.iter().map(|o| bytes(&o.ty)).sum();
    let rate = match (integers, half) {
        // A multiply and an add.
        (true, _) if costs.is_wide() && !matrix_bytes => 0.5 * costs.contract_flops_per_ns,
        (true, _) => costs.byte_flops_per_ns,
        (_, true) if whole => costs.half_flops_per_ns,
        (_, true) => costs.piece_flops_per_ns,
        _ => costs.contract_flops_per_ns,
    };
    let compute = costs.beside(contract / rate, &around);
    let memory = costs.memory_ns(read - weight_bytes + costs.write * written + around.strays * costs.stray.1) + weight_bytes / costs.weight_bytes_per_ns;
    let fill = costs.fill_ns + if whole { costs.tiles_fill_ns } else { 0.0 };
    let launch = costs.launch_ns + if contract > 0.0 { fill } else { 0.0 };
    let total = launch + compute.max(memory) + 0.1 * compute.min(memory);
    Price { launch, arithmetic: compute, memory, total }
}

/// Flops of a depthwise convolution: a vector of channels at a time, and no products with padding.
fn depthwise(window: &Window, input: &[Dim], weights: &[Dim], space: &[Dim], costs: &Costs) -> f64 {
    let kernel: Vec<f64> = weights[2..].iter().map(|d| costs.size(d)).collect();
    let taps = kernel.iter().product::<f64>() * inside(window, input, space, &kernel);
    let pixels: f64 = space[..space.len() - 1].iter().map(|d| costs.size(d)).product();
    2.0 * taps * costs.tiled(1.0, pixels, costs.size(&weights[0]), [1.0, costs.tile[1]])
}

/// A depthwise convolution and the product behind it, one after the other: what is between them is written and read where it
/// fits, not where all of it would.
fn separable(region: &Region, (window, input, weights): (&Window, &[Dim], &[Dim]), filters: &[Dim], mid: ExprId, around: &Around, costs: &Costs) -> Price {
    if costs.separable.is_infinite() {
        return Price { total: f64::INFINITY, ..Price::default() };
    }
    let size = |dims: &[Dim]| dims.iter().map(|d| costs.size(d)).product::<f64>();
    let (pixels, channels) = (size(&region.space[..region.space.len() - 1]), costs.size(&filters[1]));
    let first = depthwise(window, input, weights, &region.space, costs) / costs.contract_flops_per_ns;
    let second = 2.0 * channels * costs.tiled(1.0, pixels, costs.size(&filters[0]), costs.tile) / costs.contract_flops_per_ns;
    let first = costs.beside(first, &Counter::new(region, costs).of(mid, pixels * channels));
    let second = costs.beside(second, around);
    let between = 4.0 * pixels * channels;
    // As slow as the caches are, not as memory.
    let cached = |bytes: f64| costs.memory_ns(bytes).min(bytes / costs.levels[2].1);
    let weight_bytes = 4.0 * (size(weights) + size(filters));
    let bytes = |ty: &TensorType| size(&ty.shape) * ty.dtype.bits() as f64 / 8.0;
    let written: f64 = region.outputs.iter().map(|o| bytes(&o.ty)).sum();
    let others = region.args.iter().map(bytes).sum::<f64>() - 4.0 * size(input) - weight_bytes;
    // Both parts of the traffic go to one level.
    let moved = 4.0 * size(input) + others + costs.write * written;
    let rate = moved / costs.memory_ns(moved).max(1e-9);
    let read = 4.0 * size(input) / rate + cached(costs.write * between);
    let write = (others + costs.write * written) / rate + cached(between) + weight_bytes / costs.weight_bytes_per_ns;
    let phase = |compute: f64, memory: f64| compute.max(memory) + 0.1 * compute.min(memory);
    let launch = costs.launch_ns + 2.0 * costs.fill_ns;
    let total = launch + phase(first, read) + phase(second, write) + costs.separable * (first + second);
    Price { launch, arithmetic: first + second, memory: read + write, total }
}

/// Nanoseconds that a channels-last convolution of `groups` takes longer because its image lies in memory in another order.
fn planes(region: &Region, x: ExprId, groups: usize, input: &[Dim], weights: &[Dim], costs: &Costs) -> f64 {
    let Expr::Load { arg, index, .. } = region.expr(x) else { return 0.0 };
    if index.iter().enumerate().all(|(i, d)| *d == Dim::axis(i)) {
        return 0.0;
    }
    let pixels_last = index.last().is_some_and(|d| *d == Dim::axis(input.len().saturating_sub(2)));
    let float = region.args[*arg as usize].dtype == DType::F32;
    match weights[2..].iter().all(|d| d.is(1)) {
        // A vector of channels at a time, or planes of columns.
        _ if groups > 1 || !pixels_last || !float || costs.plane_ns.is_infinite() => f64::INFINITY,
        // As in a matrix product whose left operand is transposed.
        true => 0.0,
        false => costs.plane_ns * input.iter().map(|d| costs.size(d)).product::<f64>(),
    }
}

/// Whether a product is one of bytes that matrix units of wide devices take: of `u8` or `i8` as they are, and more than a few.
fn on_matrix_units(region: &Region, costs: &Costs) -> bool {
    let bytes = |id: &ExprId| {
        let mut id = *id;
        while let Expr::Cast(x) = region.expr(id) {
            id = *x;
        }
        matches!(region.dtype(id), DType::U8 | DType::I8)
    };
    match &region.heart {
        Heart::Contract { lhs, rhs, acc: DType::I32, .. } => bytes(lhs) && bytes(rhs),
        Heart::Conv { groups, x, w, weights, acc: DType::I32, .. } => {
            let (o, taps) = (costs.size(&weights[0]) / *groups as f64, weights[1..].iter().map(|d| costs.size(d)).product::<f64>());
            bytes(x) && bytes(w) && o >= 8.0 && taps >= 16.0
        }
        _ => false,
    }
}

/// Elements of a byte that the shortest copy moves.
pub(crate) const WORD: i64 = 4;
/// Elements of 16 bits that one copy moves.
pub(crate) const PIECE: usize = 8;
/// Simple operations that an element of an image costs which comes to a contraction by itself.
const LOOSE: f64 = 80.0;

/// Whether the operands of a contraction can be copied in whole tiles: each along one of its axes, in steps of whole pieces along the others, and
/// not just a few rows or columns.
fn in_tiles(region: &Region) -> bool {
    let (Heart::Contract { lhs, rhs, .. }, p) = (&region.heart, region.space.len()) else { return false };
    let few = |n: &Dim| n.as_const().is_some_and(|n| n < 16);
    let whole = |id: ExprId, axis: usize| {
        let Expr::Load { arg, index, guard: None } = region.expr(id) else { return false };
        let at = region.args[*arg as usize].shape.iter().zip(index).fold(Dim::ZERO, |at, (n, i)| at * n.clone() + i.clone());
        lies_along(region, id, axis) && (at - Dim::axis(axis)).terms().iter().all(|(_, c)| c % PIECE as i64 == 0)
    };
    p >= 2 && !region.space[p - 2..].iter().any(few) && whole(*lhs, p) && (whole(*rhs, p - 1) || whole(*rhs, p))
}

/// Whether an expression is an argument whose elements along `axis` are neighbours, at steps along the other axes that do not change.
fn lies_along(region: &Region, id: ExprId, axis: usize) -> bool {
    let Expr::Load { arg, index, guard: None } = region.expr(id) else { return false };
    let at = region.args[*arg as usize].shape.iter().zip(index).fold(Dim::ZERO, |at, (n, i)| at * n.clone() + i.clone());
    let others = at - Dim::axis(axis);
    !others.any_atom(&|a| !matches!(a, Atom::Axis(k) if *k as usize != axis) && !matches!(a, Atom::Sym(_)))
}

/// What attention of few queries costs a wide device, or attention over parts of the keys: each key and value is read once for up to
/// eight queries of a block. Many blocks reach three quarters of the memory's rate, one by itself six tenths of its unit's share: it waits
/// for what it reads at each step.
fn few_queries(region: &Region, costs: &Costs) -> Option<Price> {
    let Heart::Attention { keys, depth, part, v, .. } = &region.heart else { return None };
    let [outer @ .., rows, width] = region.space.as_slice() else { return None };
    let few = part.is_some() || rows.as_const().is_some_and(|n| n <= 16);
    if !few || !costs.is_wide() || region.dtype(*v).bits() > 32 {
        return None;
    }
    let size = |d: &Dim| costs.size(d);
    let rows = size(rows);
    let blocks = outer.iter().map(size).product::<f64>() * (rows / 8.0).ceil();
    let keys = part.iter().map(size).fold(size(keys), f64::min);
    let elements = keys * (size(depth) + size(width));
    let bytes = elements * region.dtype(*v).bits() as f64 / 8.0;
    let alone = costs.memory_ns(bytes * costs.units) / 0.6;
    let written: f64 = region.outputs.iter().map(|o| self::elements(&o.ty, costs) * o.ty.dtype.bits() as f64 / 8.0).sum();
    let memory = alone.max(costs.memory_ns(blocks * bytes + written) / 0.75);
    let rounds = (blocks / costs.units).ceil();
    let arithmetic = rounds * 2.0 * elements * rows.min(8.0) * costs.units / costs.contract_flops_per_ns;
    let launch = costs.launch_ns + costs.fill_ns;
    Some(Price { launch, arithmetic, memory, total: launch + arithmetic.max(memory) + 0.1 * arithmetic.min(memory) })
}

/// Elements of each argument that a kernel can touch: of a slice no more than the slice. Infinity where that is not known.
fn touched(region: &Region, costs: &Costs) -> Vec<f64> {
    let mut axes = region.axes();
    match &region.heart {
        Heart::Map | Heart::Reduce { .. } => {}
        Heart::Contract { k, .. } => axes.push(k.clone()),
        // Operands of other hearts have axes of their own.
        _ => return vec![f64::INFINITY; region.args.len()],
    }
    let sizes: Vec<f64> = axes.iter().map(|d| costs.size(d)).collect();
    let mut touched = vec![0.0; region.args.len()];
    for (expr, _) in &region.exprs {
        let Expr::Load { arg, index, .. } = expr else { continue };
        let any = |f: &dyn Fn(&Atom) -> bool| index.iter().any(|d| d.any_atom(&|a| f(a)));
        let runs = |axis: usize| any(&|a| matches!(a, Atom::Axis(x) if *x as usize == axis));
        let by_data = any(&|a| matches!(a, Atom::Value(_)));
        touched[*arg as usize] += if by_data { f64::INFINITY } else { (0..sizes.len()).filter(|x| runs(*x)).map(|x| sizes[x]).product() };
    }
    touched
}

/// Elements of a tensor, size symbols at their nominal value.
pub(crate) fn elements(ty: &TensorType, costs: &Costs) -> f64 {
    ty.shape.iter().map(|d| costs.size(d)).product()
}

/// Simple operations that a function is worth.
pub(super) fn function(f: ScalarFn) -> f64 {
    use ScalarFn::*;
    match f {
        Exp | Log | Tanh | Sigmoid | Sin | Cos => 16.0,
        Erf | Pow | Tan | Asin | Acos | Atan | Sinh | Cosh | Asinh | Acosh | Atanh | Softplus => 40.0,
        Div | Sqrt | Rsqrt | Recip | Mod | Rem => 3.0,
        _ => 1.0,
    }
}
