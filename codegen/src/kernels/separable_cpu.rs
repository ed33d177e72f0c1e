//! A depthwise convolution and the 1x1 convolution after it in one kernel on the CPU: the rows that a block of output rows
//! needs are computed into scratch, where the product reads them from the cache.
//!
//! The depthwise half is that of [`super::depthwise_cpu`], the product a register tile as in [`super::conv_cpu`], its pixels
//! along one row. A unit of the parallel dimension is a block of output rows.
use super::{
    ArgFacts, Built, CpuShape, Family, KernelError, Pack,
    conv_cpu::Conv,
    depthwise_cpu::{self as depthwise, Product, Row},
    expr::Env,
    flat::Linear,
    gemm_cpu::plain_load,
    micro::{self, End, Left, Math, Right, Rows, Tile},
    pack::{Cells, Walk},
};
use crate::{
    targets::{Cpu, Target},
    tile::{Access, Buf, Builder, Val},
};
use pavage_ir::{DType, Dim, Expr, Heart, Region, Schedule, TensorType, region::RegionOutput};

/// The family.
pub const FAMILY: Family = Family {
    name: "separable_cpu",
    about: "a depthwise convolution and the 1x1 convolution after it, a block of rows at a time through scratch",
    schedules,
    build,
};

const NAME: &str = "separable_cpu";

/// The depthwise half as a region of its own, whose output is scratch rows of `stride` elements a pixel.
fn first_half(region: &Region, rows: usize, stride: usize) -> Option<Region> {
    let Heart::Separable { window, x, input, w, weights, mid, acc, .. } = &region.heart else { return None };
    let rank = region.space.len();
    let mut space = region.space.clone();
    space[rank - 1] = weights[0].clone();
    let mut half = Region { space, outputs: vec![], ..region.clone() };
    for (expr, _) in &mut half.exprs {
        if *expr == Expr::Acc(1) {
            *expr = Expr::Acc(0);
        }
    }
    let groups = usize::try_from(weights[0].as_const()?).ok()?;
    half.heart = Heart::Conv { window: window.clone(), groups, x: *x, input: input.clone(), w: *w, weights: weights.clone(), acc: *acc };
    let mut shape = half.space.clone();
    shape[0] = Dim::one();
    if rank > 3 {
        shape[1] = Dim::from(rows);
    }
    shape[rank - 1] = Dim::from(stride);
    let mut index: Vec<Dim> = (0..rank).map(Dim::axis).collect();
    index[0] = Dim::ZERO;
    half.outputs = vec![RegionOutput { ty: TensorType { dtype: DType::F32, shape }, expr: *mid, index }];
    Some(half)
}

/// The product's weights: argument and address over `[o, c, 1...]`, extents of `o` and `c`.
fn filters(region: &Region, facts: &ArgFacts) -> Option<(usize, Linear, [usize; 2])> {
    let Heart::Separable { point, filters, .. } = &region.heart else { return None };
    let (arg, at) = plain_load(region, *point, filters.len())?;
    let loads = region.exprs.iter().filter(|(e, _)| matches!(e, Expr::Load { arg: a, .. } if *a as usize == arg)).count();
    facts.constant(arg)?;
    let fixed = at.strides.iter().chain([&at.rest]).all(|d| d.as_const().is_some());
    let float = matches!(region.dtype(*point), DType::F32 | DType::F16 | DType::BF16);
    let size = |i: usize| filters[i].as_const().and_then(|v| usize::try_from(v).ok());
    (loads == 1 && fixed && float).then_some((arg, at, [size(0)?, size(1)?]))
}

/// Elements between the pixels of a scratch row.
fn stride(channels: usize, lanes: usize) -> usize {
    let padded = channels.next_multiple_of(lanes);
    if padded.is_multiple_of(256) { padded + lanes } else { padded }
}

fn takes(region: &Region, facts: &ArgFacts) -> bool {
    // Rows of pixels, not a column.
    let rows = |c: &Conv<'_>| c.math == Math::F32 && matches!(c.place, [None, Some(1)] | [Some(1), Some(2)]);
    let fits = |half: &Region| depthwise::depthwise(half, facts).is_some_and(|c| rows(&c));
    matches!(&region.heart, Heart::Separable { acc: DType::F32, .. })
        && filters(region, facts).is_some()
        && first_half(region, 1, 1).is_some_and(|half| fits(&half))
}

fn schedules(region: &Region, target: &Target, facts: &ArgFacts) -> Vec<Schedule> {
    if !matches!(target, Target::Cpu(_)) || !takes(region, facts) {
        return vec![];
    }
    [0, 1, 4, 16].iter().map(|rows| Schedule::new(NAME, &[("rows", *rows)])).collect()
}

/// Output rows of a block: as many as a part of the second-level cache holds.
fn block(conv: &Conv<'_>, cpu: &Cpu, stride: usize, wanted: i64) -> usize {
    let (Some(ow), Some(oh)) = (conv.ow.as_const(), conv.oh.as_const()) else { return 1 };
    let row = (ow.max(1) as usize) * stride * 4;
    let rows = if wanted > 0 { wanted as usize } else { cpu.l2_bytes as usize / 16 / row };
    rows.clamp(1, oh.max(1) as usize)
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, facts: &ArgFacts) -> Result<Built, KernelError> {
    let no = |reason: &str| KernelError::Unsupported { family: NAME, reason: reason.to_owned() };
    let Target::Cpu(cpu) = target else { return Err(no("not a CPU")) };
    let lanes = usize::from(cpu.lanes);
    let (point_arg, at, [outputs, channels]) = filters(region, facts).ok_or_else(|| no("not constant filters"))?;
    let stride = stride(channels, lanes);
    let sized = first_half(region, 1, stride).ok_or_else(|| no("not a separable convolution"))?;
    let rows = {
        let conv = depthwise::depthwise(&sized, facts).ok_or_else(|| no("not a depthwise convolution"))?;
        block(&conv, cpu, stride, schedule.knob("rows", 0))
    };
    let half = first_half(region, rows, stride).ok_or_else(|| no("not a separable convolution"))?;
    let conv = depthwise::depthwise(&half, facts).ok_or_else(|| no("not a depthwise convolution"))?;
    let window = depthwise::panels(&conv, Product::Float, lanes);
    let own = |i: usize| at.strides[i].as_const().unwrap_or(0);
    let walk = Walk {
        batch: vec![],
        n: (outputs, own(0)),
        k: vec![(channels, own(1))],
        start: at.rest.as_const().unwrap_or(0),
        width: lanes,
        group: 1,
        dtype: region.args[point_arg].dtype,
        cells: Cells::Whole,
    };

    let mut b = super::builder(name, target);
    let args: Vec<Buf> = region.args.iter().map(|t| b.arg(t.dtype, Access::Read)).collect();
    let outs: Vec<Buf> = region.outputs.iter().map(|o| b.arg(o.ty.dtype, Access::Write)).collect();
    let scratch = b.scratch(DType::F32);
    let mut env = Env::with_bufs(region, args, outs);
    for sym in region.symbols() {
        env.sym(&mut b, &sym);
    }
    let blocks = conv.oh.ceil_div(&Dim::from(rows));
    let extent = conv.n.clone() * blocks.clone();
    let (h, oh, w, ow) = (env.size(&mut b, &conv.h), env.size(&mut b, &conv.oh), env.size(&mut b, &conv.w), env.size(&mut b, &conv.ow));
    let blocks_v = env.size(&mut b, &blocks);
    let mut first = env.beside(&half, vec![scratch]);
    let most = depthwise::max_pixels(cpu, conv.kernel[1]);
    let cx = depthwise::Cx { conv: &conv, product: Product::Float, lanes, w, ow, pixels: most };
    let second = Second { conv: &conv, walk: &walk, weights: env.args[point_arg], scratch, ow, stride, lanes, outputs };
    let ow_rows = conv.ow.as_const().unwrap_or(64).max(1) as usize;
    let mut columns = micro::cut(cpu, outputs.div_ceil(lanes), ow_rows, 0, 0);
    if conv.ow.as_const().is_none() {
        // Remainders of a counted width are covered by halves: multiples of 4 leave fewer of them.
        columns.classes.iter_mut().filter(|c| c.1 >= 8).for_each(|c| c.1 = c.1 / 4 * 4);
    }
    let (lo, hi) = (b.lo(), b.hi());
    b.for_(lo, hi, 1, &[], |b, unit, _| {
        let n = b.div(unit, blocks_v);
        let block = b.rem(unit, blocks_v);
        let y0 = b.mul_i(block, rows as i64);
        let y1 = b.add_i(y0, rows as i64);
        let y1 = b.min(y1, oh);
        b.for_(y0, y1, 1, &[], |b, y, _| {
            let (tap, end) = conv.rows_inside(b, y, h);
            let to = b.sub(y, y0);
            let at = Row { n, y, first: tap, end, to };
            cx.tiles(b, &mut |b, span| cx.channels(b, &mut |b, c, count| cx.tile(b, &mut first, at, span, c, count)));
            vec![]
        });
        let mut vector = 0;
        for &(nv, mr, count) in &columns.classes {
            let (zero, count_v) = (b.index(0), b.index(count as i64));
            b.for_(zero, count_v, 1, &[], |b, g, _| {
                let v = b.mul_i(g, nv as i64);
                let v = b.add_i(v, vector as i64);
                b.for_(y0, y1, 1, &[], |b, y, _| {
                    second.row(b, &mut env, (nv, mr), [n, y0, y, v]);
                    vec![]
                });
                vec![]
            });
            vector += nv * count;
        }
        vec![]
    });

    let dims = env.dims.clone();
    let kernel = b.finish();
    let scratch = Dim::from(rows) * conv.ow.clone() * Dim::from(stride * 4) + Dim::from(4 * lanes);
    let taps = conv.kernel[0] * conv.kernel[1];
    let vectors = channels.div_ceil(lanes) * (taps * 150 + 600) + outputs.div_ceil(lanes) * channels * 150;
    let cpu_shape = CpuShape { extent, grain: Dim::one(), unit_ps: conv.ow.clone() * Dim::from(rows * vectors), scratch };
    let packs = vec![(conv.weights.0, Pack::Walk(window)), (point_arg, Pack::Walk(walk))];
    Ok(Built { kernel, schedule: schedule.clone(), dims, cpu: Some(cpu_shape), grid: None, packs })
}

/// The product of scratch rows.
struct Second<'a> {
    conv: &'a Conv<'a>,
    walk: &'a Walk,
    weights: Buf,
    scratch: Buf,
    ow: Val,
    stride: usize,
    lanes: usize,
    outputs: usize,
}

impl Second<'_> {
    /// Output row `y` of the block that begins at `y0`, `nv` vectors of columns from `v` on, in tiles of `mr` pixels.
    fn row(&self, b: &mut Builder, env: &mut Env<'_>, (nv, mr): (usize, usize), [n, y0, y, v]: [Val; 4]) {
        let (lanes, panel) = (self.lanes, self.walk.panel() as i64);
        let (pixel, one) = (b.index(self.stride as i64), b.index(1));
        let row = b.sub(y, y0);
        let row = b.mul(row, self.ow);
        let base = b.mul(row, pixel);
        let right = b.mul_i(v, panel);
        let (vector, step) = (b.index(panel), b.index(lanes as i64));
        let right = Right { buf: self.weights, base: right, vector, step, count: None, ahead: None };
        let column = b.mul_i(v, lanes as i64);
        let columns = End { at: b.index(self.outputs as i64), aligned: true, partial: !self.outputs.is_multiple_of(lanes) };
        let steps = b.index(self.walk.steps() as i64);
        let rows = match self.conv.ow.as_const() {
            Some(n) => Rows::Fixed(n as usize),
            None => Rows::Counted(self.ow),
        };
        micro::cover(b, rows, mr, &mut |b, mr, x0| {
            let tile = Tile { mr, nv, lanes, math: Math::F32, unroll: 4 };
            let across = b.mul(x0, pixel);
            let left = Left { buf: self.scratch, base: b.add(base, across), row: pixel, step: one };
            let zeros = micro::zeros(b, tile);
            let acc = micro::accumulate(b, tile, left, right, None, steps, zeros);
            let axes = self.conv.axes([n, y, x0, column]);
            micro::write(b, env, tile, &acc, &axes, self.conv.width_axis(), columns);
        });
    }
}
