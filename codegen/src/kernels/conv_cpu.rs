//! Dense and grouped convolutions over channels-last tensors on the CPU, directly: no im2col.
//!
//! A tile is `mr` pixels of one output row times `nv` vectors of output channels. For one row of the window, taps and
//! channels of an output pixel are contiguous in a channels-last input, so they are one contracted axis of the register tile
//! that matrix products use, and the rows of the window are a loop around it, limited to those inside the input. Padding
//! along the row is made real: input rows are copied into scratch with zeros at their ends, once for a block of output rows
//! and all output channels, where prologue expressions and conversions of narrow types happen too. Inputs without such
//! padding are read in place. Weights are packed as `[groups, o / lanes, kernel..., c, lanes]`.
//!
//! An input whose pixels lie side by side in memory and whose channels apart, such as an image as most models take it, is
//! read as it is: scratch rows are planes of one channel each, the taps of a plane's row are the contracted axis and channels a
//! loop around it. Weights are then packed with `c` before the last axis of the kernel.
//!
//! Weights of 8 or 4 bits with scales stay so in their panels and become numbers in registers, tap by tap: for windows of few
//! pixels, where reading the weights is what takes time.
use super::{
    ArgFacts, Built, CpuShape, Family, KernelError, Pack,
    expr::{Env, Point, VectorAxis},
    flat::Linear,
    gemm_cpu::{fits_i16, plain_load, quads},
    micro::{self, End, Left, Math, Right, Rows, Tile},
    pack::{Cells, Walk},
    weights::Weights,
};
use crate::{
    targets::{Cpu, Target},
    tile::{Access, Buf, Builder, Ty, Val},
};
use pavage_ir::{DType, Dim, Expr, ExprId, Heart, Region, Scalar, Schedule, attr::Layout, region::Window};

/// The family.
pub const FAMILY: Family =
    Family { name: "conv_cpu", about: "channels-last convolutions of one or two spatial axes in register tiles, weights packed", schedules, build };

const NAME: &str = "conv_cpu";

/// A convolution this family takes. One spatial axis is two, the first of extent 1.
pub(super) struct Conv<'r> {
    pub(super) region: &'r Region,
    pub(super) x: ExprId,
    /// Input extents: batch, height, width.
    pub(super) n: Dim,
    pub(super) h: Dim,
    pub(super) w: Dim,
    /// Output height and width.
    pub(super) oh: Dim,
    pub(super) ow: Dim,
    /// Window extents, strides, dilations, padding before, padding after: height, width.
    pub(super) kernel: [usize; 2],
    pub(super) strides: [usize; 2],
    pub(super) dilations: [usize; 2],
    pub(super) lo: [i64; 2],
    pub(super) hi: [i64; 2],
    pub(super) groups: usize,
    /// Input and output channels of one group.
    pub(super) c: usize,
    pub(super) o: usize,
    pub(super) math: Math,
    /// The weights: argument and address over `[o, c, kernel...]`.
    pub(super) weights: (usize, Linear),
    /// How they become numbers, where they are packed.
    pub(super) decode: Option<Weights>,
    /// Axis of the region that each of height and width is; height may have none.
    pub(super) place: [Option<usize>; 2],
}

impl<'r> Conv<'r> {
    /// The region as a convolution, if its weights are a constant and its sizes are of the kind taken.
    pub(super) fn of(region: &'r Region, facts: &ArgFacts) -> Option<Conv<'r>> {
        let Heart::Conv { window, groups, x, input, w, weights, acc } = &region.heart else { return None };
        let Window { strides, dilations, lo, hi, layout } = window;
        let spatial = input.len().checked_sub(2)?;
        if *layout != Layout::ChannelsLast || !(1..=2).contains(&spatial) || lo.iter().chain(hi).any(|p| *p < 0) {
            return None;
        }
        let math = match acc {
            DType::F32 => [*x, *w].iter().all(|e| matches!(region.dtype(*e), DType::F32 | DType::F16 | DType::BF16)).then_some(Math::F32)?,
            DType::I32 => [*x, *w].iter().all(|e| fits_i16(region, *e)).then_some(Math::I16Pairs)?,
            _ => return None,
        };
        let size = |d: &Dim| d.as_const().and_then(|v| usize::try_from(v).ok());
        let sizes: Vec<usize> = weights.iter().map(size).collect::<Option<_>>()?;
        let (arg, at, decode) = match plain_load(region, *w, weights.len()) {
            Some((arg, at)) => (arg, at, None),
            None => {
                let packed = Weights::of_filters(region, *w, &sizes).filter(|_| math == Math::F32 && *groups == 1)?;
                (packed.arg, Linear { strides: packed.at.strides.clone(), rest: packed.at.rest.clone() }, Some(packed))
            }
        };
        let loads = region.exprs.iter().filter(|(e, _)| matches!(e, Expr::Load { arg: a, .. } if *a as usize == arg)).count();
        facts.constant(arg)?;
        let fixed = at.strides.iter().chain([&at.rest]).all(|d| d.as_const().is_some());
        if loads != 1 || !fixed {
            return None;
        }
        // Pixels of a tile lie along the width: of a column of pixels, the height is taken for it.
        let column = spatial == 2 && input[2].is(1) && region.space[2].is(1);
        let place = match spatial {
            1 => [None, Some(1)],
            _ if column => [Some(2), Some(1)],
            _ => [Some(1), Some(2)],
        };
        let dim = |dims: &[Dim], i: usize| place[i].map_or(Dim::one(), |axis| dims[axis].clone());
        fn two<T: Copy>(values: &[T], place: [Option<usize>; 2], missing: T) -> [T; 2] {
            place.map(|axis| axis.map_or(missing, |axis| values[axis - 1]))
        }
        Some(Conv {
            region,
            x: *x,
            n: input[0].clone(),
            h: dim(input, 0),
            w: dim(input, 1),
            oh: dim(&region.space, 0),
            ow: dim(&region.space, 1),
            kernel: two(&sizes[2..], place, 1),
            strides: two(strides, place, 1),
            dilations: two(dilations, place, 1),
            lo: two(lo, place, 0),
            hi: two(hi, place, 0),
            groups: *groups,
            c: sizes[1],
            o: sizes[0] / groups,
            math,
            weights: (arg, at),
            decode,
            place,
        })
    }

    /// Strides of the weights: o, c, height, width.
    pub(super) fn weight_strides(&self) -> [i64; 4] {
        let stride = |axis: Option<usize>| axis.and_then(|a| self.weights.1.strides[a].as_const()).unwrap_or(0);
        let spatial = self.place.map(|axis| stride(axis.map(|a| a + 1)));
        [stride(Some(0)), stride(Some(1)), spatial[0], spatial[1]]
    }

    /// Coordinates `[n, h, w, c]` as the region's own.
    pub(super) fn axes(&self, [n, h, w, c]: [Val; 4]) -> Vec<Val> {
        let mut axes = vec![n; self.channel_axis()];
        for (axis, v) in self.place.into_iter().zip([h, w]) {
            if let Some(axis) = axis {
                axes[axis] = v;
            }
        }
        axes.push(c);
        axes
    }

    /// Coordinates `[o, c, height, width]` of a weight as the region's own.
    fn tap(&self, [o, c, h, w]: [Val; 4]) -> Vec<Val> {
        let mut axes = vec![o, c];
        axes.resize(1 + self.channel_axis(), c);
        for (axis, v) in self.place.into_iter().zip([h, w]) {
            if let Some(axis) = axis {
                axes[axis + 1] = v;
            }
        }
        axes
    }

    /// Axis of the region that the width is.
    pub(super) fn width_axis(&self) -> usize {
        self.place[1].unwrap_or(1)
    }

    /// Axis of the region that channels are.
    pub(super) fn channel_axis(&self) -> usize {
        self.region.space.len() - 1
    }

    /// The input as a load in place: argument, address, and its strides for n, height, width, channel.
    pub(super) fn plain_x(&self) -> Option<(usize, Linear, [Dim; 4])> {
        let (arg, at) = plain_load(self.region, self.x, self.channel_axis() + 1)?;
        let [h, w] = self.place.map(|axis| axis.map_or(Dim::ZERO, |a| at.strides[a].clone()));
        let strides = [at.strides[0].clone(), h, w, at.strides[self.channel_axis()].clone()];
        Some((arg, at, strides))
    }

    /// Whether pixels of a row lie side by side in memory, channels apart.
    fn is_planar(&self) -> bool {
        self.math == Math::F32 && self.groups == 1 && self.c > 1 && self.decode.is_none() && self.plain_x().is_some_and(|(.., s)| s[2].is(1) && !s[3].is(1))
    }

    /// The taps of the window's height that lie inside the input for output row `oh`: first and end.
    pub(super) fn rows_inside(&self, b: &mut Builder, oh: Val, h: Val) -> (Val, Val) {
        let (stride, dilation) = (self.strides[0] as i64, self.dilations[0] as i64);
        let (zero, all) = (b.index(0), b.index(self.kernel[0] as i64));
        let top = b.mul_i(oh, stride);
        let first = if self.lo[0] == 0 {
            zero
        } else {
            let lo = b.index(self.lo[0]);
            let above = b.sub(lo, top);
            let above = b.max(above, zero);
            let above = b.add_i(above, dilation - 1);
            b.div_i(above, dilation)
        };
        let end = if self.hi[0] == 0 {
            all
        } else {
            let below = b.sub(h, top);
            let below = b.add_i(below, self.lo[0]);
            let below = b.max(below, zero);
            let below = b.add_i(below, dilation - 1);
            let below = b.div_i(below, dilation);
            b.min(below, all)
        };
        (first, end)
    }
}

/// Everything about the loop nest that is fixed when the kernel is written.
struct Plan {
    /// Whether input rows are copied into scratch.
    staged: bool,
    /// Whether channels are planes of pixels, in memory and in scratch.
    planar: bool,
    /// Whether taps along the width and channels are one contracted axis.
    joined: bool,
    /// Channels of a scratch pixel (all groups).
    pixel: usize,
    /// Pixels of a scratch row.
    row_pixels: Dim,
    /// Scratch rows.
    slots: usize,
    /// Output rows of a block.
    block: usize,
    lanes: usize,
    unroll: usize,
}

fn plan(conv: &Conv<'_>, cpu: &Cpu, schedule: &Schedule) -> Plan {
    let lanes = usize::from(cpu.lanes);
    let group = conv.math.group();
    let channels = conv.c * conv.groups;
    // Each group's channels start at a whole pair.
    let pixel = conv.c.next_multiple_of(group) * conv.groups;
    let planar = conv.is_planar();
    let joined_shape = conv.groups == 1 && conv.dilations[1] == 1 && !planar && conv.decode.is_none();
    let side_by_side = |s: &[Dim; 4]| if planar { true } else { s[3].is(1) && s[2] == Dim::from(channels) };
    let direct = conv.math == Math::F32
        && conv.lo[1] == 0
        && conv.hi[1] == 0
        && conv.plain_x().is_some_and(|(arg, _, s)| conv.region.args[arg].dtype == DType::F32 && side_by_side(&s));
    let reach = (conv.kernel[1] - 1) * conv.dilations[1] + 1;
    let row_pixels = (conv.ow.clone() - Dim::one()) * Dim::from(conv.strides[1]) + Dim::from(reach);
    let tall = (conv.kernel[0] - 1) * conv.dilations[0] + 1;
    let ow = conv.ow.as_const().unwrap_or(64).max(1) as usize;
    let oh = conv.oh.as_const().unwrap_or(i64::MAX).max(1) as usize;
    let row_bytes = row_pixels.as_const().unwrap_or(128) as usize * pixel * conv.math.staged().bits() / 8;
    // Enough pixels to pay for reading the weights, few enough rows to stay in the second-level cache.
    let wanted = match schedule.knob("rows", 0) {
        0 => 512usize.div_ceil(ow),
        n => usize::try_from(n).unwrap_or(1),
    };
    let fits = (cpu.l2_bytes as usize / 3 / row_bytes.max(1)).saturating_sub(tall) / conv.strides[0] + 1;
    let block = wanted.min(fits).clamp(1, oh);
    let blocks = oh.div_ceil(block);
    let block = if oh == i64::MAX as usize { block } else { oh.div_ceil(blocks) };
    Plan {
        planar,
        staged: !direct,
        joined: joined_shape,
        pixel,
        row_pixels,
        slots: (block - 1) * conv.strides[0] + tall,
        block,
        lanes,
        unroll: usize::try_from(schedule.knob("unroll", 4)).unwrap_or(4).max(1),
    }
}

fn schedules(region: &Region, target: &Target, facts: &ArgFacts) -> Vec<Schedule> {
    let (Target::Cpu(cpu), Some(conv)) = (target, Conv::of(region, facts)) else { return vec![] };
    let vectors = conv.o.div_ceil(cpu.lanes.into());
    let ow = conv.ow.as_const().unwrap_or(64).max(1) as usize;
    let best = micro::cut(cpu, vectors, ow, 0, 0).classes.first().map_or(1, |c| c.0);
    let mut all = vec![];
    for nv in [best, 2, 1, 3, 4] {
        for rows in [0, 1, 4] {
            let s = Schedule::new(NAME, &[("nv", nv as i64), ("rows", rows)]);
            if nv <= vectors && !all.contains(&s) {
                all.push(s);
            }
        }
    }
    all
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, facts: &ArgFacts) -> Result<Built, KernelError> {
    let no = |reason: &str| KernelError::Unsupported { family: NAME, reason: reason.to_owned() };
    let Target::Cpu(cpu) = target else { return Err(no("not a CPU")) };
    let mut conv = Conv::of(region, facts).ok_or_else(|| no("not a convolution it takes"))?;
    if let Heart::Conv { x, w, .. } = &region.heart
        && conv.math == Math::I16Pairs
        && cpu.vnni
        && quads(region, *x, *w)
    {
        conv.math = Math::Quads;
    }
    let plan = plan(&conv, cpu, schedule);
    let knob = |name: &str| usize::try_from(schedule.knob(name, 0)).unwrap_or(0);
    let vectors = conv.o.div_ceil(plan.lanes);
    let ow_rows = conv.ow.as_const().unwrap_or(64).max(1) as usize;
    let mut columns = micro::cut(cpu, vectors, ow_rows, knob("nv"), knob("mr"));
    if conv.ow.as_const().is_none() {
        // Remainders of a counted width are covered by halves: multiples of 4 leave fewer of them.
        columns.classes.iter_mut().filter(|c| c.1 >= 8).for_each(|c| c.1 = c.1 / 4 * 4);
    }

    let [so, sc, sh, sw] = conv.weight_strides();
    let cells = conv.decode.as_ref().map_or(Cells::Whole, |w| w.cells);
    let dtype = if cells == Cells::Nibbles { DType::U8 } else { conv.math.packed(region.args[conv.weights.0].dtype) };
    let walk = Walk {
        batch: vec![(conv.groups, so * conv.o as i64)],
        n: (conv.o, so),
        k: if plan.planar {
            vec![(conv.kernel[0], sh), (conv.c, sc), (conv.kernel[1], sw)]
        } else {
            vec![(conv.kernel[0], sh), (conv.kernel[1], sw), (conv.c, sc)]
        },
        start: conv.weights.1.rest.as_const().unwrap_or(0),
        width: plan.lanes,
        group: if cells == Cells::Nibbles { 2 } else { conv.math.group() },
        dtype,
        cells,
    };

    let mut b = super::builder(name, target);
    let args: Vec<Buf> = (0..region.args.len()).map(|i| b.arg(if i == conv.weights.0 { dtype } else { region.args[i].dtype }, Access::Read)).collect();
    let outs: Vec<Buf> = region.outputs.iter().map(|o| b.arg(o.ty.dtype, Access::Write)).collect();
    let mut env = Env::with_bufs(region, args, outs);
    let scratch = plan.staged.then(|| b.scratch(conv.math.staged()));

    let per_group: usize = columns.classes.iter().map(|c| c.2).sum();
    let inner = per_group * conv.groups;
    let blocks = conv.oh.ceil_div(&Dim::from(plan.block));
    let extent = conv.n.clone() * blocks.clone() * Dim::from(inner);
    let blocks_v = env.size(&mut b, &blocks);
    let oh = env.size(&mut b, &conv.oh);
    let ow = env.size(&mut b, &conv.ow);
    let cx = Cx {
        h: env.size(&mut b, &conv.h),
        w: env.size(&mut b, &conv.w),
        row: env.size(&mut b, &(plan.row_pixels.clone() * Dim::from(plan.pixel))),
        pixels: env.size(&mut b, &plan.row_pixels),
        conv: &conv,
        plan: &plan,
        walk: &walk,
        scratch,
        ow,
    };
    let (lo, hi) = (b.lo(), b.hi());
    let first = b.div_i(lo, inner as i64);
    let last = b.add_i(hi, inner as i64 - 1);
    let last = b.div_i(last, inner as i64);
    b.for_(first, last, 1, &[], |b, outer, _| {
        let start = b.mul_i(outer, inner as i64);
        let (zero, end) = (b.index(0), b.index(inner as i64));
        let from = b.sub(lo, start);
        let from = b.max(from, zero);
        let to = b.sub(hi, start);
        let to = b.min(to, end);
        let n = b.div(outer, blocks_v);
        let block = b.rem(outer, blocks_v);
        let oh0 = b.mul_i(block, plan.block as i64);
        let oh1 = b.add_i(oh0, plan.block as i64);
        let oh1 = b.min(oh1, oh);
        if plan.staged {
            cx.stage(b, &mut env, n, oh0);
        }
        let mut offset = 0;
        let mut first_vector = 0;
        for &(nv, mr, count) in &columns.classes {
            // Column groups of this width, in every group of channels: `first..end` of each.
            let (lo, hi) = (offset * conv.groups, (offset + count) * conv.groups);
            let (lo, hi) = (b.index(lo as i64), b.index(hi as i64));
            let (from, to) = (b.max(from, lo), b.min(to, hi));
            b.for_(from, to, 1, &[], |b, unit, _| {
                let unit = b.sub(unit, lo);
                let channel_group = b.div_i(unit, count as i64);
                let j = b.rem_i(unit, count as i64);
                let v = b.mul_i(j, nv as i64);
                let v = b.add_i(v, first_vector as i64);
                b.for_(oh0, oh1, 1, &[], |b, y, _| {
                    cx.row(b, &mut env, (nv, mr), Place { n, oh0, y, group: channel_group, vector: v });
                    vec![]
                });
                vec![]
            });
            offset += count;
            first_vector += nv * count;
        }
        vec![]
    });

    let dims = env.dims.clone();
    let kernel = b.finish();
    let steps = conv.kernel[0] * conv.kernel[1] * conv.c.div_ceil(conv.math.group());
    let wide = columns.classes.first().map_or(1, |c| c.0);
    let unit = conv.math.staged().bits() / 8;
    let scratch = if plan.staged {
        (Dim::from(plan.slots) * plan.row_pixels.clone() * Dim::from(plan.pixel) + Dim::from(4 * plan.lanes)) * Dim::from(unit)
    } else {
        Dim::ZERO
    };
    let cpu_shape = CpuShape { extent, grain: Dim::one(), unit_ps: conv.ow.clone() * Dim::from(plan.block * wide * steps * 150), scratch };
    Ok(Built { kernel, schedule: schedule.clone(), dims, cpu: Some(cpu_shape), grid: None, packs: vec![(conv.weights.0, Pack::Walk(walk))] })
}

/// What the parts of the loop nest share.
struct Cx<'a> {
    conv: &'a Conv<'a>,
    plan: &'a Plan,
    walk: &'a Walk,
    scratch: Option<Buf>,
    h: Val,
    w: Val,
    ow: Val,
    /// Pixels and elements of a scratch row.
    pixels: Val,
    row: Val,
}

/// Coordinates of one output row of one column group.
#[derive(Clone, Copy)]
struct Place {
    n: Val,
    oh0: Val,
    y: Val,
    group: Val,
    vector: Val,
}

impl Cx<'_> {
    /// Copy the input rows of a block of output rows into scratch, zeros at both ends. Stores may run over the end of what
    /// they write, into what is written next.
    fn stage(&self, b: &mut Builder, env: &mut Env<'_>, n: Val, oh0: Val) {
        let (conv, plan) = (self.conv, self.plan);
        let Some(scratch) = self.scratch else { return };
        let dtype = conv.math.staged();
        let zero = b.index(0);
        let top = b.mul_i(oh0, conv.strides[0] as i64);
        let top = b.add_i(top, -conv.lo[0]);
        let bottom = b.add_i(top, plan.slots as i64);
        let bottom = b.min(bottom, self.h);
        let from = b.max(top, zero);
        let lead = conv.lo[1] * plan.pixel as i64;
        let room = b.add_i(self.pixels, -conv.lo[1]);
        let valid = b.min(room, self.w);
        let width = plan.lanes;
        let zeros = b.constant_of(Scalar::I(0).cast(dtype), Ty::of_lanes(dtype, width));
        let fill = |b: &mut Builder, from: Val, to: Val| {
            b.for_(from, to, width as i64, &[], |b, at, _| {
                b.store(scratch, at, zeros);
                vec![]
            });
        };
        b.for_(from, bottom, 1, &[], |b, ih, _| {
            let slot = b.sub(ih, top);
            let row = b.mul(slot, self.row);
            if plan.planar {
                self.planes(b, env, scratch, [n, ih], valid, row, &fill);
                return vec![];
            }
            let content = b.add_i(row, lead);
            fill(b, row, content);
            self.copy(b, env, scratch, [n, ih], valid, content);
            let used = b.mul_i(valid, plan.pixel as i64);
            let used = b.add(content, used);
            let end = b.add(row, self.row);
            fill(b, used, end);
            vec![]
        });
    }

    /// Copy `valid` pixels of input row `(n, h)` of every channel to `to` in scratch, one channel after the other, with zeros before
    /// and after.
    #[expect(clippy::too_many_arguments, reason = "the coordinates of one row")]
    fn planes(&self, b: &mut Builder, env: &mut Env<'_>, scratch: Buf, [n, h]: [Val; 2], valid: Val, to: Val, fill: &dyn Fn(&mut Builder, Val, Val)) {
        let (conv, lanes) = (self.conv, self.plan.lanes);
        let Some((arg, at, s)) = conv.plain_x() else { return };
        let base = origin(b, env, &at, &[(n, &s[0]), (h, &s[1])]);
        let (buf, plane) = (env.args[arg], env.size(b, &s[3]));
        let (zero, channels) = (b.index(0), b.index(conv.c as i64));
        let whole = b.div_i(valid, lanes as i64);
        let whole = b.mul_i(whole, lanes as i64);
        let left = b.sub(valid, whole);
        let some = b.gt(left, zero);
        b.for_(zero, channels, 1, &[], |b, c, _| {
            let from = b.mul(c, plane);
            let from = b.add(base, from);
            let row = b.mul(c, self.pixels);
            let row = b.add(to, row);
            let content = b.add_i(row, conv.lo[1]);
            fill(b, row, content);
            let put = |b: &mut Builder, i: Val, v: Val| {
                let v = b.cast(v, conv.math.staged());
                let at = b.add(content, i);
                b.store(scratch, at, v);
            };
            b.for_(zero, whole, lanes as i64, &[], |b, i, _| {
                let at = b.add(from, i);
                let v = b.load(buf, at, lanes);
                put(b, i, v);
                vec![]
            });
            b.when(some, |b| {
                let at = b.add(from, whole);
                let v = b.load_upto(buf, at, lanes, left);
                put(b, whole, v);
            });
            let used = b.add(content, valid);
            let end = b.add(row, self.pixels);
            fill(b, used, end);
            vec![]
        });
    }

    /// Copy `valid` pixels of input row `(n, h)` to `to` in scratch.
    fn copy(&self, b: &mut Builder, env: &mut Env<'_>, scratch: Buf, [n, h]: [Val; 2], valid: Val, to: Val) {
        let (conv, plan) = (self.conv, self.plan);
        let (dtype, lanes) = (conv.math.staged(), plan.lanes);
        let zero = b.index(0);
        let channels = conv.c * conv.groups;
        if let Some((arg, at, s)) = conv.plain_x().filter(|(_, _, s)| s[3].is(1) && s[2] == Dim::from(channels) && plan.pixel == channels) {
            // The whole row is contiguous.
            let base = origin(b, env, &at, &[(n, &s[0]), (h, &s[1])]);
            let buf = env.args[arg];
            let count = b.mul_i(valid, channels as i64);
            let whole = b.div_i(count, lanes as i64);
            let whole = b.mul_i(whole, lanes as i64);
            let put = |b: &mut Builder, i: Val, v: Val| {
                let v = b.cast(v, dtype);
                let at = b.add(to, i);
                b.store(scratch, at, v);
            };
            b.for_(zero, whole, lanes as i64, &[], |b, i, _| {
                let from = b.add(base, i);
                let v = b.load(buf, from, lanes);
                put(b, i, v);
                vec![]
            });
            let left = b.sub(count, whole);
            let some = b.gt(left, zero);
            b.when(some, |b| {
                let from = b.add(base, whole);
                let v = b.load_upto(buf, from, lanes, left);
                put(b, whole, v);
            });
            return;
        }
        let padded = plan.pixel / conv.groups;
        let axis = conv.channel_axis();
        let small = channels < lanes / 2 || conv.plain_x().is_some_and(|(_, _, s)| !s[3].is(1));
        let width = if small { 1 } else { lanes };
        b.for_(zero, valid, 1, &[], |b, w, _| {
            let pixel = b.mul_i(w, plan.pixel as i64);
            let pixel = b.add(to, pixel);
            for g in 0..conv.groups {
                let mut one = |b: &mut Builder, c: Val, count: Option<usize>| {
                    let count = count.map(|n| b.index(n as i64));
                    let channel = b.add_i(c, (g * conv.c) as i64);
                    let axes = conv.axes([n, h, w, channel]);
                    let mut p = if width == 1 { Point::new(axes) } else { Point::vector(axes, VectorAxis { axis, lanes, count, aligned: false }) };
                    let v = env.expr_lanes(b, conv.x, &mut p);
                    let v = b.cast(v, dtype);
                    let at = b.add_i(pixel, (g * padded) as i64);
                    let at = b.add(at, c);
                    b.store(scratch, at, v);
                };
                let whole = conv.c / width * width;
                let end = b.index(whole as i64);
                if whole / width <= 4 {
                    for c in (0..whole).step_by(width) {
                        let c = b.index(c as i64);
                        one(b, c, None);
                    }
                } else {
                    b.for_(zero, end, width as i64, &[], |b, c, _| {
                        one(b, c, None);
                        vec![]
                    });
                }
                if conv.c > whole {
                    one(b, end, Some(conv.c - whole));
                }
                for c in if width == 1 { conv.c..padded } else { 0..0 } {
                    let at = b.add_i(pixel, (g * padded + c) as i64);
                    let v = b.constant(Scalar::I(0).cast(dtype), dtype);
                    b.store(scratch, at, v);
                }
            }
            vec![]
        });
    }

    /// One output row of one column group of `nv` vectors, in tiles of `mr` pixels.
    fn row(&self, b: &mut Builder, env: &mut Env<'_>, (nv, mr): (usize, usize), at: Place) {
        let (conv, plan) = (self.conv, self.plan);
        let (lanes, group) = (plan.lanes, conv.math.group());
        let (first, end) = conv.rows_inside(b, at.y, self.h);
        let padded = plan.pixel / conv.groups;
        // The left operand: where row 0 of the window starts, elements between its rows, its memory.
        let one = b.index(1);
        let channel = b.mul_i(at.group, padded as i64);
        // Elements between channels where they are planes.
        let plane = match conv.plain_x() {
            Some((.., s)) if self.scratch.is_none() => env.size(b, &s[3]),
            _ => self.pixels,
        };
        let (buf, base, tap_row) = match (self.scratch, conv.plain_x()) {
            (Some(scratch), _) => {
                let slot = b.sub(at.y, at.oh0);
                let slot = b.mul_i(slot, conv.strides[0] as i64);
                let base = b.mul(slot, self.row);
                (scratch, base, self.row)
            }
            (None, Some((arg, linear, s))) => {
                let h = b.mul_i(at.y, conv.strides[0] as i64);
                let h = b.add_i(h, -conv.lo[0]);
                let base = origin(b, env, &linear, &[(at.n, &s[0]), (h, &s[1])]);
                (env.args[arg], base, env.size(b, &s[1]))
            }
            (None, None) => return,
        };
        let base = b.add(base, channel);
        let buf = if group == 1 { buf } else { b.alias(buf, DType::I32, 0) };
        let pixel = if plan.planar { 1 } else { (plan.pixel / group) as i64 };
        let panel = b.mul_i(at.group, self.walk.panels() as i64);
        let panel = b.add(panel, at.vector);
        let panel = b.mul_i(panel, self.walk.panel() as i64);
        let (vector, step) = (b.index(self.walk.panel() as i64), b.index((lanes * group) as i64));
        let tap_steps = padded / group;
        let row_steps = tap_steps * conv.kernel[1];
        // Cells of a panel that a step takes: of nibbles, one for two steps.
        let halves = if self.walk.cells == Cells::Nibbles { 2 } else { 1 };
        let column = b.mul_i(at.vector, lanes as i64);
        let group_start = b.mul_i(at.group, conv.o as i64);
        let column = b.add(column, group_start);
        let columns =
            End { at: b.add_i(group_start, conv.o as i64), aligned: conv.groups == 1 || conv.o.is_multiple_of(lanes), partial: !conv.o.is_multiple_of(lanes) };
        let rows = match conv.ow.as_const() {
            Some(n) => Rows::Fixed(n as usize),
            None => Rows::Counted(self.ow),
        };
        micro::cover(b, rows, mr, &mut |b, mr, x0| {
            let tile = Tile { mr, nv, lanes, math: conv.math, unroll: plan.unroll };
            let zeros = micro::zeros(b, tile);
            let across = b.mul_i(x0, conv.strides[1] as i64 * pixel * group as i64);
            let base = b.add(base, across);
            let row = b.index(conv.strides[1] as i64 * pixel);
            let acc = b.for_(first, end, 1, &zeros, |b, kh, acc| {
                let d = b.mul_i(kh, conv.dilations[0] as i64);
                let d = b.mul(d, tap_row);
                let left = b.add(base, d);
                let left = b.div_i(left, group as i64);
                let d = b.mul_i(kh, (row_steps / halves * lanes * group) as i64);
                let right = b.add(panel, d);
                let left = Left { buf, base: left, row, step: one };
                let right = Right { buf: env.args[conv.weights.0], base: right, vector, step, count: None, ahead: None };
                if plan.joined {
                    let steps = b.index(row_steps as i64);
                    return micro::accumulate(b, tile, left, right, None, steps, acc.to_vec());
                }
                if plan.planar {
                    return self.plane_taps(b, (tile, left, right), plane, acc);
                }
                let (zero, taps) = (b.index(0), b.index(conv.kernel[1] as i64));
                b.for_(zero, taps, 1, acc, |b, kw, acc| {
                    let d = b.mul_i(kw, conv.dilations[1] as i64 * pixel);
                    let left = Left { base: b.add(left.base, d), ..left };
                    let d = b.mul_i(kw, (tap_steps / halves * lanes * group) as i64);
                    let right = Right { base: b.add(right.base, d), ..right };
                    if let Some(weights) = &conv.decode {
                        let tap = conv.tap([column, zero, kh, kw]);
                        return self.packed_tap(b, env, weights, (tile, left, right), (&tap, columns), acc);
                    }
                    let steps = b.index(tap_steps as i64);
                    micro::accumulate(b, tile, left, right, None, steps, acc.to_vec())
                })
            });
            let axes = conv.axes([at.n, at.y, x0, column]);
            micro::write(b, env, tile, &acc, &axes, conv.width_axis(), columns);
        });
    }
}

impl Cx<'_> {
    /// One tap of a window with packed weights: a block of channels after the other, each with its zero points and scales.
    fn packed_tap(
        &self,
        b: &mut Builder,
        env: &mut Env<'_>,
        weights: &Weights,
        (tile, left, right): (Tile, Left, Right),
        (tap, columns): (&[Val], End),
        acc: &[Val],
    ) -> Vec<Val> {
        let channels = self.conv.c;
        let block = weights.block.unwrap_or(channels);
        let tile = Tile { unroll: tile.unroll.next_multiple_of(2), ..tile };
        let halves = if weights.cells == Cells::Nibbles { 2 } else { 1 };
        let vector = VectorAxis { axis: 0, lanes: tile.lanes, count: None, aligned: true };
        let (zero, blocks) = (b.index(0), b.index((channels / block) as i64));
        b.for_(zero, blocks, 1, acc, |b, k, acc| {
            let first = b.mul_i(k, block as i64);
            let mut axes = tap.to_vec();
            axes[1] = first;
            let decode = weights.decode(b, env, &axes, vector, tile.nv, columns.partial.then_some(columns.at));
            let d = b.mul(first, left.step);
            let left = Left { base: b.add(left.base, d), ..left };
            let d = b.mul_i(k, (block / halves * tile.lanes) as i64);
            let right = Right { base: b.add(right.base, d), ..right };
            let steps = b.index(block as i64);
            micro::accumulate(b, tile, left, right, Some(&decode), steps, acc.to_vec())
        })
    }

    /// One row of the window where channels are planes: a few channels are written out, more are a loop.
    fn plane_taps(&self, b: &mut Builder, (tile, left, right): (Tile, Left, Right), plane: Val, acc: &[Val]) -> Vec<Val> {
        let conv = self.conv;
        let taps = conv.kernel[1];
        let (steps, dilation) = (b.index(taps as i64), b.index(conv.dilations[1] as i64));
        let one = |b: &mut Builder, c: Val, acc: &[Val]| {
            let d = b.mul(c, plane);
            let left = Left { base: b.add(left.base, d), step: dilation, ..left };
            let d = b.mul_i(c, (taps * tile.lanes) as i64);
            let right = Right { base: b.add(right.base, d), ..right };
            micro::accumulate(b, Tile { unroll: 1, ..tile }, left, right, None, steps, acc.to_vec())
        };
        let (zero, channels) = (b.index(0), b.index(conv.c as i64));
        b.for_(zero, channels, 1, acc, |b, c, acc| one(b, c, acc))
    }
}

/// The address of an operand at some coordinates, the others being 0.
pub(super) fn origin(b: &mut Builder, env: &mut Env<'_>, at: &Linear, coordinates: &[(Val, &Dim)]) -> Val {
    let mut sum = env.size(b, &at.rest);
    for (x, stride) in coordinates {
        let stride = env.size(b, stride);
        let d = b.mul(*x, stride);
        sum = b.add(sum, d);
    }
    sum
}
