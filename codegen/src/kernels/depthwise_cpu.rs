//! Depthwise convolutions over channels-last tensors on the CPU: vectors over channels, several pixels of one output row in
//! registers, each input vector loaded once for all the taps of a window row that use it.
//!
//! A unit of the parallel dimension is one output row. Where the width is known, pixels near the borders get tiles of their
//! own with the taps outside left out; where it is not, pixel by pixel with a counted range of taps.
use super::{
    ArgFacts, Built, CpuShape, Family, KernelError, Pack,
    conv_cpu::Conv,
    expr::{Env, Point, VectorAxis},
    gemm_cpu::quads,
    micro::{self, End, Math, Tile},
    pack::{Cells, Walk},
};
use crate::{
    targets::{Cpu, Target},
    tile::{Access, Buf, Builder, DotKind, Ty, Val},
};
use pavage_ir::{DType, Dim, Heart, Region, Schedule};

/// The family.
pub const FAMILY: Family =
    Family { name: "depthwise_cpu", about: "channels-last depthwise convolutions, vectors over channels, tiles of pixels", schedules, build };

const NAME: &str = "depthwise_cpu";

/// The region as a convolution with one input and one output channel a group.
pub(super) fn depthwise<'r>(region: &'r Region, facts: &ArgFacts) -> Option<Conv<'r>> {
    Conv::of(region, facts).filter(|c| c.c == 1 && c.o == 1 && c.groups > 1 && c.decode.is_none())
}

/// Most pixels of a tile: accumulators, one window row of weights and a few input vectors stay in registers. With 32 registers
/// a few of the inputs that the scheduler loads early are spilled, which costs less than narrower tiles would.
pub(super) fn max_pixels(cpu: &Cpu, width: usize) -> usize {
    (cpu.vector_regs as usize).saturating_sub(width + 5).clamp(1, 14)
}

fn schedules(region: &Region, target: &Target, facts: &ArgFacts) -> Vec<Schedule> {
    let (Target::Cpu(cpu), Some(conv)) = (target, depthwise(region, facts)) else { return vec![] };
    let most = max_pixels(cpu, conv.kernel[1]);
    let mut all = vec![];
    for pixels in [most, 8, 4] {
        for outer in [0, 1] {
            let s = Schedule::new(NAME, &[("pixels", pixels.min(most) as i64), ("outer", outer)]);
            if !all.contains(&s) {
                all.push(s);
            }
        }
    }
    all
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, facts: &ArgFacts) -> Result<Built, KernelError> {
    let no = |reason: &str| KernelError::Unsupported { family: NAME, reason: reason.to_owned() };
    let Target::Cpu(cpu) = target else { return Err(no("not a CPU")) };
    let conv = depthwise(region, facts).ok_or_else(|| no("not a depthwise convolution"))?;
    let lanes = usize::from(cpu.lanes);
    let product = Product::of(&conv, cpu);
    let walk = panels(&conv, product, lanes);
    let dtype = walk.dtype;
    let most = max_pixels(cpu, conv.kernel[1]);
    let pixels = usize::try_from(schedule.knob("pixels", most as i64)).unwrap_or(most).clamp(1, most);

    let mut b = super::builder(name, target);
    let args: Vec<Buf> = (0..region.args.len()).map(|i| b.arg(if i == conv.weights.0 { dtype } else { region.args[i].dtype }, Access::Read)).collect();
    let outs: Vec<Buf> = region.outputs.iter().map(|o| b.arg(o.ty.dtype, Access::Write)).collect();
    let mut env = Env::with_bufs(region, args, outs);
    let h = env.size(&mut b, &conv.h);
    let oh = env.size(&mut b, &conv.oh);
    let w = env.size(&mut b, &conv.w);
    let ow = env.size(&mut b, &conv.ow);
    let cx = Cx { conv: &conv, product, lanes, w, ow, pixels };
    let (lo, hi) = (b.lo(), b.hi());
    b.for_(lo, hi, 1, &[], |b, row, _| {
        let n = b.div(row, oh);
        let y = b.rem(row, oh);
        let (first, end) = conv.rows_inside(b, y, h);
        let at = Row { n, y, first, end, to: y };
        if schedule.knob("outer", 0) == 0 {
            cx.tiles(b, &mut |b, span| cx.channels(b, &mut |b, c, count| cx.tile(b, &mut env, at, span, c, count)));
        } else {
            cx.channels(b, &mut |b, c, count| cx.tiles(b, &mut |b, span| cx.tile(b, &mut env, at, span, c, count)));
        }
        vec![]
    });
    let dims = env.dims.clone();
    let kernel = b.finish();
    let taps = conv.kernel[0] * conv.kernel[1];
    let cpu_shape = CpuShape {
        extent: conv.n.clone() * conv.oh.clone(),
        grain: Dim::one(),
        unit_ps: conv.ow.clone() * Dim::from(walk.panels() * (taps * 150 + 600)),
        scratch: Dim::ZERO,
    };
    Ok(Built { kernel, schedule: schedule.clone(), dims, cpu: Some(cpu_shape), grid: None, packs: vec![(conv.weights.0, Pack::Walk(walk))] })
}

/// How weights are packed: a panel of every vector of channels.
pub(super) fn panels(conv: &Conv<'_>, product: Product, lanes: usize) -> Walk {
    let [so, _, sh, sw] = conv.weight_strides();
    let dtype = match product {
        Product::Float => conv.region.args[conv.weights.0].dtype,
        Product::Integer => DType::I16,
        Product::Pair | Product::Quad => DType::I32,
    };
    Walk {
        batch: vec![],
        n: (conv.groups, so),
        k: vec![(conv.kernel[0], sh), (conv.kernel[1], sw)],
        start: conv.weights.1.rest.as_const().unwrap_or(0),
        width: lanes,
        group: 1,
        dtype,
        cells: Cells::Whole,
    }
}

/// How an input vector is multiplied and added.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Product {
    /// Floats.
    Float,
    /// 32-bit integers.
    Integer,
    /// A `u8` by a word, each alone in its 32 bits: the pair product whose other half is 0, where a 32-bit product is slow.
    Pair,
    /// A `u8` by an `i8`, each alone in its 32 bits: the sum of four products of which three are 0.
    Quad,
}

impl Product {
    fn of(conv: &Conv<'_>, cpu: &Cpu) -> Product {
        let Heart::Conv { x, w, .. } = &conv.region.heart else { return Product::Float };
        match conv.math {
            Math::F32 => Product::Float,
            _ if quads(conv.region, *x, *w) => {
                if cpu.vnni {
                    Product::Quad
                } else {
                    Product::Pair
                }
            }
            _ => Product::Integer,
        }
    }
}

/// What the parts of the loop nest share.
pub(super) struct Cx<'a> {
    pub(super) conv: &'a Conv<'a>,
    pub(super) product: Product,
    pub(super) lanes: usize,
    /// Width of the input and of the output.
    pub(super) w: Val,
    pub(super) ow: Val,
    /// Most pixels of a tile.
    pub(super) pixels: usize,
}

/// An output row and the window rows inside the input.
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub(super) n: Val,
    pub(super) y: Val,
    pub(super) first: Val,
    pub(super) end: Val,
    /// Where it is written, as a row of the output.
    pub(super) to: Val,
}

/// Pixels of a tile.
#[derive(Clone, Copy)]
pub(super) enum Span {
    /// `count` pixels from `x` on; `known` is `x` where it is known, taps outside are then left out.
    Pixels { x: Val, count: usize, known: Option<usize> },
    /// One pixel, any taps of which may be outside.
    One { x: Val },
}

impl Cx<'_> {
    /// First input column and reach of one window row.
    fn reach(&self) -> usize {
        (self.conv.kernel[1] - 1) * self.conv.dilations[1]
    }

    /// Every tile of a row.
    pub(super) fn tiles(&self, b: &mut Builder, tile: &mut dyn FnMut(&mut Builder, Span)) {
        let (conv, stride) = (self.conv, self.conv.strides[1]);
        let (Some(ow), Some(w)) = (conv.ow.as_const(), conv.w.as_const()) else { return self.counted_tiles(b, tile) };
        let (ow, w) = (ow as usize, w);
        let inside = |x: usize, count: usize| {
            let first = (x * stride) as i64 - conv.lo[1];
            first >= 0 && (first + ((count - 1) * stride + self.reach()) as i64) < w
        };
        // Tiles of two sizes that differ by one; runs of equal inner tiles are loops.
        let tiles = ow.div_ceil(self.pixels);
        let (small, more) = (ow / tiles, ow % tiles);
        let mut x = 0;
        let mut at = 0;
        while at < tiles {
            let count = small + usize::from(at < more);
            let same = |t: usize| count == small + usize::from(t < more);
            let run = (at..tiles).take_while(|t| same(*t) && inside(x + (t - at) * count, count)).count();
            if run > 1 {
                let (lo, hi) = (b.index(0), b.index(run as i64));
                b.for_(lo, hi, 1, &[], |b, i, _| {
                    let i = b.mul_i(i, count as i64);
                    let x = b.add_i(i, x as i64);
                    tile(b, Span::Pixels { x, count, known: None });
                    vec![]
                });
            } else {
                let known = b.index(x as i64);
                tile(b, Span::Pixels { x: known, count, known: Some(x) });
            }
            x += count * run.max(1);
            at += run.max(1);
        }
    }

    /// Tiles of a row whose width is known at run time.
    fn counted_tiles(&self, b: &mut Builder, tile: &mut dyn FnMut(&mut Builder, Span)) {
        let (conv, stride) = (self.conv, self.conv.strides[1] as i64);
        let zero = b.index(0);
        let first = b.index((conv.lo[1] + stride - 1) / stride);
        let first = b.min(first, self.ow);
        let room = b.add_i(self.w, conv.lo[1] - self.reach() as i64 + stride - 1);
        let room = b.max(room, zero);
        let end = b.div_i(room, stride);
        let end = b.min(end, self.ow);
        let inner = b.sub(end, first);
        let inner = b.max(inner, zero);
        let whole = b.div_i(inner, self.pixels as i64);
        let whole = b.mul_i(whole, self.pixels as i64);
        let after = b.add(first, whole);
        b.for_(first, after, self.pixels as i64, &[], |b, x, _| {
            tile(b, Span::Pixels { x, count: self.pixels, known: None });
            vec![]
        });
        // What is left stands before and after the tiles.
        let single = b.sub(self.ow, whole);
        b.for_(zero, single, 1, &[], |b, i, _| {
            let before = b.lt(i, first);
            let later = b.add(i, whole);
            let x = b.select(before, i, later);
            tile(b, Span::One { x });
            vec![]
        });
    }

    /// Every vector of channels; the last one may be partial.
    pub(super) fn channels(&self, b: &mut Builder, vector: &mut dyn FnMut(&mut Builder, Val, Option<usize>)) {
        let whole = self.conv.groups / self.lanes * self.lanes;
        let (lo, hi) = (b.index(0), b.index(whole as i64));
        b.for_(lo, hi, self.lanes as i64, &[], |b, c, _| {
            vector(b, c, None);
            vec![]
        });
        if self.conv.groups > whole {
            vector(b, hi, Some(self.conv.groups - whole));
        }
    }

    pub(super) fn tile(&self, b: &mut Builder, env: &mut Env<'_>, row: Row, span: Span, c: Val, count: Option<usize>) {
        let conv = self.conv;
        let (x0, pixels) = match span {
            Span::Pixels { x, count, .. } => (x, count),
            Span::One { x } => (x, 1),
        };
        let tile = Tile { mr: pixels, nv: 1, lanes: self.lanes, math: conv.math, unroll: 1 };
        let zeros = micro::zeros(b, tile);
        let left = b.mul_i(x0, conv.strides[1] as i64);
        let left = b.add_i(left, -conv.lo[1]);
        let top = b.mul_i(row.y, conv.strides[0] as i64);
        let top = b.add_i(top, -conv.lo[0]);
        let panel = b.mul_i(c, (conv.kernel[0] * conv.kernel[1]) as i64);
        let acc = b.for_(row.first, row.end, 1, &zeros, |b, kh, acc| {
            let ih = b.mul_i(kh, conv.dilations[0] as i64);
            let ih = b.add(top, ih);
            let weights = b.mul_i(kh, (conv.kernel[1] * self.lanes) as i64);
            let weights = b.add(panel, weights);
            let mut p = Point::vector(conv.axes([row.n, ih, left, c]), self.vector(b, count));
            env.hoist(b, &[conv.x], &mut p, 1 << conv.width_axis());
            match span {
                Span::Pixels { known, .. } => self.window_row(b, env, &p, known, weights, acc),
                Span::One { .. } => self.counted_row(b, env, &p, weights, acc),
            }
        });
        let end = match count {
            None => b.add_i(c, self.lanes as i64),
            Some(n) => b.add_i(c, n as i64),
        };
        let axes = conv.axes([row.n, row.to, x0, c]);
        micro::write(b, env, tile, &acc, &axes, conv.width_axis(), End { at: end, aligned: true, partial: count.is_some() });
    }

    fn vector(&self, b: &mut Builder, count: Option<usize>) -> VectorAxis {
        let count = count.map(|n| b.index(n as i64));
        VectorAxis { axis: self.conv.channel_axis(), lanes: self.lanes, count, aligned: true }
    }

    /// One row of the window for a tile: every input vector once. `p` is at the tile's first input column.
    fn window_row(&self, b: &mut Builder, env: &mut Env<'_>, p: &Point, known: Option<usize>, weights: Val, acc: &[Val]) -> Vec<Val> {
        let (conv, mut acc) = (self.conv, acc.to_vec());
        let taps: Vec<Val> = (0..conv.kernel[1]).map(|kw| self.weight(b, env, weights, kw)).collect();
        let (stride, dilation) = (conv.strides[1], conv.dilations[1]);
        for x in 0..=(acc.len() - 1) * stride + self.reach() {
            let users: Vec<(usize, usize)> = (0..acc.len())
                .filter_map(|o| {
                    let d = x.checked_sub(o * stride)?;
                    (d % dilation == 0 && d / dilation < conv.kernel[1]).then_some((o, d / dilation))
                })
                .collect();
            let outside = known.is_some_and(|from| {
                let at = (from * stride + x) as i64 - conv.lo[1];
                at < 0 || conv.w.as_const().is_some_and(|w| at >= w)
            });
            if users.is_empty() || outside {
                continue;
            }
            let v = self.input(b, env, p, x);
            for (o, kw) in users {
                acc[o] = self.step(b, v, taps[kw], acc[o]);
            }
        }
        acc
    }

    /// One row of the window for one pixel, the taps inside counted at run time.
    fn counted_row(&self, b: &mut Builder, env: &mut Env<'_>, p: &Point, weights: Val, acc: &[Val]) -> Vec<Val> {
        let conv = self.conv;
        let dilation = conv.dilations[1] as i64;
        let left = p.axes[conv.width_axis()];
        let (zero, taps) = (b.index(0), b.index(conv.kernel[1] as i64));
        let up = |b: &mut Builder, v: Val| {
            let v = b.max(v, zero);
            let v = b.add_i(v, dilation - 1);
            b.div_i(v, dilation)
        };
        let before = b.sub(zero, left);
        let first = up(b, before);
        let after = b.sub(self.w, left);
        let end = up(b, after);
        let end = b.min(end, taps);
        b.for_(first, end, 1, acc, |b, kw, acc| {
            let mut p = p.clone();
            let d = b.mul_i(kw, dilation);
            p.axes[conv.width_axis()] = b.add(left, d);
            let v = self.input(b, env, &p, 0);
            let at = b.mul_i(kw, self.lanes as i64);
            let at = b.add(weights, at);
            let w = self.weight(b, env, at, 0);
            vec![self.step(b, v, w, acc[0])]
        })
    }

    fn weight(&self, b: &mut Builder, env: &Env<'_>, at: Val, kw: usize) -> Val {
        let at = b.add_i(at, (kw * self.lanes) as i64);
        let v = b.load(env.args[self.conv.weights.0], at, self.lanes);
        b.cast(v, self.conv.math.acc())
    }

    fn input(&self, b: &mut Builder, env: &mut Env<'_>, p: &Point, x: usize) -> Val {
        let mut p = p.clone();
        p.axes[self.conv.width_axis()] = b.add_i(p.axes[self.conv.width_axis()], x as i64);
        let v = env.expr_lanes(b, self.conv.x, &mut p);
        b.cast(v, self.conv.math.acc())
    }

    fn step(&self, b: &mut Builder, x: Val, w: Val, acc: Val) -> Val {
        match self.product {
            Product::Float => b.fma(x, w, acc),
            Product::Integer => {
                let product = b.mul(x, w);
                b.add(acc, product)
            }
            Product::Pair => {
                let [x, w] = [x, w].map(|v| b.bitcast(v, Ty::of_lanes(DType::I16, 2 * self.lanes)));
                let product = b.dot(DotKind::I16Pairs, &[x, w]);
                b.add(acc, product)
            }
            Product::Quad => {
                let x = b.bitcast(x, Ty::of_lanes(DType::U8, 4 * self.lanes));
                let w = b.bitcast(w, Ty::of_lanes(DType::I8, 4 * self.lanes));
                b.dot(DotKind::U8I8Quads, &[acc, x, w])
            }
        }
    }
}
