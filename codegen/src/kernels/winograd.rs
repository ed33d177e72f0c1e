//! The transforms of a convolution by minimal filtering (`pavage_ir::winograd`): a tile at a time, vectors along channels.
//!
//! All inputs of a tile are read, transformed along one axis and then the other, and written to a place for each element of
//! the tile; the way back ends in the region's output expressions. The products between the two are a contraction, which
//! other families run. Places of a tile's elements often lie a multiple of 4 KiB apart, where caches hold few lines: a CPU keeps
//! what is half transformed in scratch, for a block of channels, and writes a row of the tile at a time.
use super::{
    ArgFacts, Built, CpuShape, Family, KernelError, builder, cost,
    expr::{Env, Point, VectorAxis, read, reg, round, write, zero},
    native_lanes,
    nest::{Nest, Walk, split},
};
use crate::{
    targets::Target,
    tile::{Buf, Builder, Space, Ty, Val},
};
use pavage_ir::{
    Dim, Expr, ExprId, Heart, Op, Region, Scalar, Schedule,
    winograd::{Transforms, WINDOW},
};

/// Tiles to and from, and windows.
pub const FAMILY: Family =
    Family { name: NAME, about: "tiles of 3x3 convolutions transformed for minimal filtering, vectors along channels", schedules, build };

const NAME: &str = "winograd";
/// Channels that are half transformed at a time.
const BLOCK: usize = 128;
/// Elements that stay in the nearest cache wherever they lie.
const NEAR: usize = 1 << 14;

/// What a region transforms.
enum Part<'r> {
    Input {
        lo: &'r [i64],
        hi: &'r [i64],
    },
    Filter,
    /// The argument with the sums.
    Output {
        arg: usize,
    },
}

fn part(region: &Region) -> Option<(Part<'_>, &'static Transforms)> {
    let (part, m) = match &region.heart {
        Heart::Op(Op::WinogradInput { m, lo, hi }) => (Part::Input { lo, hi }, m),
        Heart::Op(Op::WinogradFilter { m }) => (Part::Filter, m),
        Heart::WinogradOutput { m, x, .. } => match region.expr(*x) {
            Expr::Load { arg, index, guard: None } if index.iter().enumerate().all(|(i, d)| *d == Dim::axis(i)) => (Part::Output { arg: *arg as usize }, m),
            _ => return None,
        },
        _ => return None,
    };
    let bytes = |t: &pavage_ir::TensorType| t.dtype.bits() >= 8;
    let whole = region.args.first().is_some_and(bytes) && region.outputs.iter().all(|o| bytes(&o.ty));
    Some((part, Transforms::of(*m).filter(|_| whole)?))
}

fn schedules(region: &Region, target: &Target, _: &ArgFacts) -> Vec<Schedule> {
    let Some((part, _)) = part(region) else { return vec![] };
    let known = |n: &Dim| n.as_const().and_then(|n| usize::try_from(n).ok());
    let channels = region.space.last().and_then(known).unwrap_or(usize::MAX >> 1).max(1);
    let lanes = if matches!(part, Part::Filter) { 1 } else { native_lanes(target, region.args[0].dtype).min(channels.next_power_of_two()) };
    let one = |block: usize| Schedule::new(NAME, &[("lanes", lanes as i64), ("block", block as i64)]);
    let far = region.outputs.first().is_none_or(|o| known(&o.ty.count()).is_none_or(|n| n > NEAR));
    match (part, target) {
        (Part::Input { .. }, Target::Cpu(_)) if lanes > 1 && far => vec![one(BLOCK), one(0)],
        (Part::Input { .. }, Target::Cpu(_)) if lanes > 1 => vec![one(0), one(BLOCK)],
        _ => vec![one(0)],
    }
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, _: &ArgFacts) -> Result<Built, KernelError> {
    let (part, t) = part(region).ok_or(KernelError::Unsupported { family: NAME, reason: "not a transform it takes".into() })?;
    let mut b = builder(name, target);
    let mut env = Env::new(&mut b, region);
    let tiled = |n: &Dim| n.ceil_div(&Dim::from(t.m));
    let space = match &part {
        Part::Input { lo, hi } => {
            let x = &region.args[0].shape;
            let out = |i: usize| tiled(&(x[1 + i].clone() + Dim::from(lo[i] + hi[i] + 1 - WINDOW as i64)));
            vec![x[0].clone(), out(0), out(1), x[3].clone()]
        }
        Part::Filter => region.space[1..].to_vec(),
        Part::Output { .. } => vec![region.space[0].clone(), tiled(&region.space[1]), tiled(&region.space[2]), region.space[3].clone()],
    };
    let nest = Nest {
        vector: Some(space.len() - 1),
        space,
        lanes: schedule.knob("lanes", 1).max(1) as usize,
        unroll: 1,
        wide: 1,
        point_ps: (t.side() * t.side()) as i64 * 60,
    };
    let tiles = Tiles { region, t, space: nest.space.clone() };
    if let (Part::Input { lo, .. }, Ok(block @ 1..), Target::Cpu(_)) = (&part, usize::try_from(schedule.knob("block", 0)), target) {
        let block = block.next_multiple_of(nest.lanes);
        let shape = tiles.in_blocks(&mut b, &mut env, lo, nest.lanes, block);
        return Ok(Built::new(b.finish(), schedule, env.dims, Walk { cpu: Some(shape), grid: None }));
    }
    let walk = nest.emit(&mut b, &mut env, &[], &mut |b, env, points| {
        for p in points {
            match &part {
                Part::Input { lo, .. } => tiles.input(b, env, p, lo),
                Part::Filter => tiles.filter(b, env, p),
                Part::Output { arg } => tiles.output(b, env, p, *arg),
            }
        }
    });
    Ok(Built::new(b.finish(), schedule, env.dims, walk))
}

struct Tiles<'r> {
    region: &'r Region,
    t: &'static Transforms,
    /// What is walked: images, tiles down, tiles across, channels.
    space: Vec<Dim>,
}

impl<'r> Tiles<'r> {
    /// Where element `e` of a tile lies in `[elements, tiles, channels]`.
    fn place(&self, b: &mut Builder, env: &mut Env<'r>, p: &Point, e: usize) -> Val {
        let [images, down, across, channels] = &self.space[..] else { return p.axes[0] };
        let first = env.size(b, &(Dim::from(e) * images.clone() * down.clone() * across.clone() * channels.clone()));
        let (down, across, channels) = (env.size(b, down), env.size(b, across), env.size(b, channels));
        let row = b.mul(p.axes[0], down);
        let row = b.add(row, p.axes[1]);
        let tile = b.mul(row, across);
        let tile = b.add(tile, p.axes[2]);
        let at = b.mul(tile, channels);
        let at = b.add(at, p.axes[3]);
        b.add(at, first)
    }

    fn input(&self, b: &mut Builder, env: &mut Env<'r>, p: &Point, lo: &[i64]) {
        let source = self.source(b, env, p, lo);
        let to: Vec<Val> = (0..self.t.side() * self.t.side()).map(|e| self.place(b, env, p, e)).collect();
        let (from, out) = (env.args[0], env.outs[0]);
        source.either(b, &|b, edge| {
            let d = source.tile(b, from, p, edge);
            for (v, at) in both_ways(b, self.t.input, along_rows, &d).into_iter().zip(&to) {
                write(b, out, *at, v, p);
            }
        });
    }

    /// The same for all channels, `block` at a time: along columns into scratch, then along rows.
    fn in_blocks(&self, b: &mut Builder, env: &mut Env<'r>, lo: &[i64], lanes: usize, block: usize) -> CpuShape {
        let (side, channels) = (self.t.side(), self.space[3].clone());
        let dtype = self.region.args[0].dtype;
        let scratch = b.alloc(Space::Local, reg(dtype), (side * side * block) as u64);
        let c = env.size(b, &channels);
        let (start, end) = (b.lo(), b.hi());
        b.for_(start, end, 1, &[], |b, tile, _| {
            let mut axes = split(b, env, tile, &self.space[..3]);
            let zero = b.index(0);
            axes.push(zero);
            let corner = Point::new(axes);
            let source = self.source(b, env, &corner, lo);
            let to: Vec<Val> = (0..side * side).map(|e| self.place(b, env, &corner, e)).collect();
            let (from, out) = (env.args[0], env.outs[0]);
            b.for_(zero, c, block as i64, &[], |b, first, _| {
                let last = b.add_i(first, block as i64);
                let last = b.min(last, c);
                // Vectors of the block, at the point and in scratch.
                let each = |b: &mut Builder, body: &dyn Fn(&mut Builder, &Point, Val)| {
                    let here = b.sub(last, first);
                    let rest = b.rem_i(here, lanes as i64);
                    let whole = b.sub(here, rest);
                    let at = |b: &mut Builder, i: Val, count: Option<Val>| {
                        let mut axes = corner.axes.clone();
                        axes[3] = b.add(first, i);
                        body(b, &Point::vector(axes, VectorAxis { axis: 3, lanes, count, aligned: true }), i);
                    };
                    b.for_(zero, whole, lanes as i64, &[], |b, i, _| {
                        at(b, i, None);
                        vec![]
                    });
                    let some = b.gt(rest, zero);
                    b.when(some, |b| at(b, whole, Some(rest)));
                };
                source.either(b, &|b, edge| {
                    each(b, &|b, p, i| {
                        let d = source.tile(b, from, p, edge);
                        for j in 0..side {
                            let column: Vec<Val> = (0..side).map(|i| d[i * side + j]).collect();
                            for (r, v) in along_rows(b, self.t.input, &column).into_iter().enumerate() {
                                let at = b.add_i(i, ((r * side + j) * block) as i64);
                                b.store(scratch, at, v);
                            }
                        }
                    });
                });
                for r in 0..side {
                    each(b, &|b, p, i| {
                        let load = |b: &mut Builder, j: usize| {
                            let at = b.add_i(i, ((r * side + j) * block) as i64);
                            b.load(scratch, at, lanes)
                        };
                        let row: Vec<Val> = (0..side).map(|j| load(b, j)).collect();
                        for (j, v) in along_rows(b, self.t.input, &row).into_iter().enumerate() {
                            let at = b.add(to[r * side + j], p.axes[3]);
                            write(b, out, at, v, p);
                        }
                    });
                }
                vec![]
            });
            vec![]
        });
        let unit_ps = channels * Dim::from((side * side * 60) as i64) + Dim::from(20_000i64);
        CpuShape { extent: self.space[..3].iter().cloned().product(), grain: cost::grain(&unit_ps), unit_ps, scratch: Dim::ZERO }
    }

    /// The inputs of the tile of `p`.
    fn source(&self, b: &mut Builder, env: &mut Env<'r>, p: &Point, lo: &[i64]) -> Source {
        let (x, side) = (&self.region.args[0], self.t.side());
        let extents = [env.size(b, &x.shape[1]), env.size(b, &x.shape[2])];
        let first = [0, 1].map(|i| {
            let at = b.mul_i(p.axes[1 + i], self.t.m as i64);
            b.add_i(at, -lo[i])
        });
        let (pixel, row) = (x.shape[3].clone(), x.shape[3].clone() * x.shape[2].clone());
        let (pixels, rows) = (env.size(b, &pixel), env.size(b, &row));
        let image = b.mul(p.axes[0], extents[0]);
        let base = b.add(image, first[0]);
        let base = b.mul(base, rows);
        let column = b.mul(first[1], pixels);
        let base = b.add(base, column);
        let step = |e: usize| Dim::from(e / side) * row.clone() + Dim::from(e % side) * pixel.clone();
        let places = (0..side * side)
            .map(|e| {
                let step = env.size(b, &step(e));
                b.add(base, step)
            })
            .collect();
        Source { side, first, extents, places }
    }

    fn filter(&self, b: &mut Builder, env: &mut Env<'r>, p: &Point) {
        let (channels, filters) = (&self.space[0], &self.space[1]);
        let (c, o) = (env.size(b, channels), env.size(b, filters));
        let window = b.mul(p.axes[1], c);
        let window = b.add(window, p.axes[0]);
        let window = b.mul_i(window, (WINDOW * WINDOW) as i64);
        let g: Vec<Val> = (0..WINDOW * WINDOW)
            .map(|k| {
                let at = b.add_i(window, k as i64);
                read(b, env.args[0], at, p)
            })
            .collect();
        let at = b.mul(p.axes[0], o);
        let at = b.add(at, p.axes[1]);
        let all = both_ways(b, self.t.filter, plainly, &g);
        for (e, v) in all.into_iter().enumerate() {
            let first = env.size(b, &(Dim::from(e) * channels.clone() * filters.clone()));
            let at = b.add(at, first);
            write(b, env.outs[0], at, v, p);
        }
    }

    fn output(&self, b: &mut Builder, env: &mut Env<'r>, p: &Point, arg: usize) {
        let (side, m) = (self.t.side(), self.t.m);
        let products: Vec<Val> = (0..side * side)
            .map(|e| {
                let at = self.place(b, env, p, e);
                read(b, env.args[arg], at, p)
            })
            .collect();
        let results = both_ways(b, self.t.output, along_columns, &products);
        let (top, left) = (b.mul_i(p.axes[1], m as i64), b.mul_i(p.axes[2], m as i64));
        let roots: Vec<ExprId> = self.region.outputs.iter().map(|o| o.expr).collect();
        // What is the same for the whole tile is computed once.
        let mut whole = Point::new(vec![p.axes[0], top, left, p.axes[3]]).along(p.vector);
        env.hoist(b, &roots, &mut whole, 0b110);
        let dtype = self.region.args[arg].dtype;
        for i in 0..m {
            let y = b.add_i(top, i as i64);
            self.when_inside(b, env, y, 1, i, |b, env| {
                for j in 0..m {
                    let x = b.add_i(left, j as i64);
                    self.when_inside(b, env, x, 2, j, |b, env| {
                        let mut at = whole.clone();
                        (at.axes[1], at.axes[2]) = (y, x);
                        at.accs = vec![round(b, results[i * m + j], dtype)];
                        for k in 0..self.region.outputs.len() {
                            env.store(b, k, &mut at);
                        }
                    });
                }
            });
        }
    }

    /// `body` where coordinate `at`, result `i` of a tile, lies inside the image.
    fn when_inside(&self, b: &mut Builder, env: &mut Env<'r>, at: Val, axis: usize, i: usize, body: impl FnOnce(&mut Builder, &mut Env<'r>)) {
        let extent = &self.region.space[axis];
        // The first result of a tile always does, and all do of whole tiles.
        if i == 0 || extent.as_const().is_some_and(|n| n % self.t.m as i64 == 0) {
            return body(b, env);
        }
        let n = env.size(b, extent);
        let inside = b.lt(at, n);
        b.when(inside, |b| body(b, env));
    }
}

/// Where the inputs of a tile are.
struct Source {
    side: usize,
    /// Coordinates of the first, which may lie outside the image.
    first: [Val; 2],
    /// Extents of the image.
    extents: [Val; 2],
    /// Address of each input, the channel left out.
    places: Vec<Val>,
}

impl Source {
    /// `body` for a tile inside the image, and for one at its edge.
    fn either(&self, b: &mut Builder, body: &dyn Fn(&mut Builder, bool)) {
        let [down, across] = [0, 1].map(|i| within(b, self.first[i], self.extents[i], self.side));
        let inside = b.and(down, across);
        let run = |b: &mut Builder, edge: bool| {
            body(b, edge);
            vec![]
        };
        b.if_(inside, |b| run(b, false), |b| run(b, true));
    }

    /// The inputs at the channels of `p`: zeros outside the image, where the tile is at its `edge`.
    fn tile(&self, b: &mut Builder, buf: Buf, p: &Point, edge: bool) -> Vec<Val> {
        let there = [0, 1].map(|i| -> Vec<Val> {
            let at = |b: &mut Builder, k: usize| {
                let at = b.add_i(self.first[i], k as i64);
                within(b, at, self.extents[i], 1)
            };
            if edge { (0..self.side).map(|k| at(b, k)).collect() } else { vec![] }
        });
        let [down, across] = there;
        let mut tile = vec![];
        for (e, place) in self.places.iter().enumerate() {
            let at = b.add(*place, p.axes[3]);
            tile.push(if edge {
                let there = b.and(down[e / self.side], across[e % self.side]);
                read_if(b, there, buf, at, p)
            } else {
                read(b, buf, at, p)
            });
        }
        tile
    }
}

/// Whether `n` coordinates from `first` on all lie inside `extent`.
fn within(b: &mut Builder, first: Val, extent: Val, n: usize) -> Val {
    let zero = b.index(0);
    let (low, end) = (b.ge(first, zero), b.add_i(first, n as i64));
    let high = b.le(end, extent);
    b.and(low, high)
}

/// What [`read`] reads if `there`, else zeros; nothing is touched then.
fn read_if(b: &mut Builder, there: Val, buf: Buf, at: Val, p: &Point) -> Val {
    let dtype = b.dtype(buf);
    let Some(VectorAxis { lanes, count, .. }) = p.vector else {
        let v = b.if_(there, |b| vec![b.load(buf, at, 1)], |b| vec![zero(b, Ty::Scalar(dtype))])[0];
        return b.cast(v, reg(dtype));
    };
    let all = count.unwrap_or_else(|| b.index(lanes as i64));
    let none = b.index(0);
    let count = b.select(there, all, none);
    // A masked load of memory that is not there takes hundreds of cycles: it is asked for where the first channel is.
    let at = b.select(there, at, p.axes[3]);
    let v = b.load_upto(buf, at, lanes, count);
    b.cast(v, reg(dtype))
}

/// One axis of a transform: a matrix times a vector.
type Along = fn(&mut Builder, &[&[f64]], &[Val]) -> Vec<Val>;

/// `matrix x matrix^T` of a square `x`, row by row.
fn both_ways(b: &mut Builder, matrix: &[&[f64]], along: Along, x: &[Val]) -> Vec<Val> {
    let n = matrix.first().map_or(0, |row| row.len());
    let columns: Vec<Vec<Val>> = (0..n).map(|j| along(b, matrix, &(0..n).map(|i| x[i * n + j]).collect::<Vec<_>>())).collect();
    let row = |r: usize| columns.iter().map(|c| c[r]).collect::<Vec<Val>>();
    (0..matrix.len()).flat_map(|r| along(b, matrix, &row(r))).collect()
}

/// Each row for itself.
fn plainly(b: &mut Builder, matrix: &[&[f64]], x: &[Val]) -> Vec<Val> {
    matrix.iter().map(|row| sum(b, &row.iter().copied().zip(x.iter().copied()).collect::<Vec<_>>())).collect()
}

/// Two rows that differ in signs alone are a sum and a difference of what they have alike and what not.
fn along_rows(b: &mut Builder, matrix: &[&[f64]], x: &[Val]) -> Vec<Val> {
    let mut out = vec![];
    while let Some(row) = matrix.get(out.len()) {
        let mirrored = matrix.get(out.len() + 1).filter(|next| row.iter().zip(next.iter()).all(|(a, b)| a.abs() == b.abs()));
        let terms = |keep: &dyn Fn(usize) -> bool| (0..row.len()).filter(|j| row[*j] != 0.0 && keep(*j)).map(|j| (row[j], x[j])).collect::<Vec<_>>();
        match mirrored {
            Some(next) => {
                let (alike, opposite) = (sum(b, &terms(&|j| row[j] == next[j])), sum(b, &terms(&|j| row[j] != next[j])));
                out.extend([b.add(alike, opposite), b.sub(alike, opposite)]);
            }
            None => out.push(sum(b, &terms(&|_| true))),
        }
    }
    out
}

/// Where two columns differ in signs alone, rows are made of the sum and the difference of their elements.
fn along_columns(b: &mut Builder, matrix: &[&[f64]], x: &[Val]) -> Vec<Val> {
    let mut terms: Vec<Vec<(f64, Val)>> = vec![vec![]; matrix.len()];
    let mut j = 0;
    while j < x.len() {
        let paired = j + 1 < x.len() && matrix.iter().all(|row| row[j].abs() == row[j + 1].abs());
        let (both, apart) = if paired { (b.add(x[j], x[j + 1]), b.sub(x[j], x[j + 1])) } else { (x[j], x[j]) };
        for (terms, row) in terms.iter_mut().zip(matrix) {
            terms.push((row[j], if paired && row[j] != row[j + 1] { apart } else { both }));
        }
        j += if paired { 2 } else { 1 };
    }
    terms.iter().map(|terms| sum(b, terms)).collect()
}

/// A sum of multiples.
fn sum(b: &mut Builder, terms: &[(f64, Val)]) -> Val {
    let mut terms: Vec<(f64, Val)> = terms.iter().copied().filter(|(c, _)| *c != 0.0).collect();
    // What is not multiplied comes first, what is multiplied is added to it.
    terms.sort_by_key(|(c, _)| (*c != 1.0, c.abs() != 1.0));
    let mut total: Option<Val> = None;
    for (c, x) in terms {
        let ty = b.ty(x);
        total = Some(match total {
            None if c == 1.0 => x,
            Some(sum) if c == 1.0 => b.add(sum, x),
            Some(sum) if c == -1.0 => b.sub(sum, x),
            None => {
                let c = b.constant_of(Scalar::F(c), ty);
                b.mul(x, c)
            }
            Some(sum) => {
                let c = b.constant_of(Scalar::F(c), ty);
                b.fma(x, c, sum)
            }
        });
    }
    total.unwrap_or_else(|| b.index(0))
}
