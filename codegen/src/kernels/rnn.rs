//! Recurrent layers: LSTM, GRU and plain RNN.
//!
//! A unit is one sequence in one direction. First the inputs of all steps are multiplied by the input weights, a few steps at
//! a time; then step by step the state is multiplied by the recurrent weights and the gates are applied in vectors over
//! hidden units. Constant weights are packed into panels of a vector's width. On a GPU a block takes the unit, a thread a row
//! of weights.
use super::{
    ArgFacts, Built, CpuShape, Family, KernelError, Pack, builder, cost,
    expr::{Env, Point, VectorAxis, read, write},
    native_lanes,
    nest::{THREADS, Walk, split},
};
use crate::{
    targets::Target,
    tile::{Access, Buf, Builder, Space, Ty, Val},
};
use pavage_ir::{DType, Dim, Heart, Op, Region, Scalar, ScalarFn, Schedule, activation::Activation, attr::Direction};

/// All three layers, hidden and input sizes known.
pub const FAMILY: Family = Family { name: "rnn", about: "recurrent layers: packed weights, gates in vectors over hidden units", schedules, build };

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Lstm { coupled: bool },
    Gru { linear_before_reset: bool },
    Plain,
}

struct Layer {
    kind: Kind,
    gates: i64,
    hidden: i64,
    inputs: i64,
    steps: Dim,
    batch: Dim,
    directions: Vec<bool>,
    activations: Vec<Activation>,
    clip: f64,
    dtype: DType,
}

impl Layer {
    fn of(region: &Region) -> Option<Layer> {
        let Heart::Op(op) = &region.heart else { return None };
        let (kind, gates, direction, activations, clip) = match op {
            Op::Lstm { direction, activations, clip, coupled } => (Kind::Lstm { coupled: *coupled }, 4, direction, activations, clip),
            Op::Gru { direction, activations, clip, linear_before_reset } => {
                (Kind::Gru { linear_before_reset: *linear_before_reset }, 3, direction, activations, clip)
            }
            Op::Rnn { direction, activations, clip } => (Kind::Plain, 1, direction, activations, clip),
            _ => return None,
        };
        let (x, r) = (&region.args[0], &region.args[2]);
        Some(Layer {
            kind,
            gates,
            hidden: r.shape[2].as_const()?,
            inputs: x.shape[2].as_const()?,
            steps: x.shape[0].clone(),
            batch: x.shape[1].clone(),
            directions: match direction {
                Direction::Forward => vec![false],
                Direction::Reverse => vec![true],
                Direction::Bidirectional => vec![false, true],
            },
            activations: activations.clone(),
            clip: clip.get(),
            dtype: x.dtype,
        })
    }

    fn rows(&self) -> i64 {
        self.gates * self.hidden
    }

    /// Dtype of sums and state.
    fn acc(&self) -> DType {
        if self.dtype == DType::F64 { DType::F64 } else { DType::F32 }
    }
}

fn schedules(region: &Region, target: &Target, facts: &ArgFacts) -> Vec<Schedule> {
    let Some(layer) = Layer::of(region).filter(|l| l.hidden > 0 && l.inputs > 0 && l.dtype.bits() >= 16) else { return vec![] };
    let packed = i64::from(facts.constant(1).is_some() && facts.constant(2).is_some());
    match target {
        Target::Cpu(_) => vec![Schedule::new("rnn", &[("lanes", native_lanes(target, layer.acc()) as i64), ("packed", packed)])],
        Target::Gpu(_) if layer.rows() + layer.hidden * 4 <= 10_000 => vec![Schedule::new("rnn", &[("lanes", 32), ("packed", packed)])],
        Target::Gpu(_) => vec![],
    }
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, _: &ArgFacts) -> Result<Built, KernelError> {
    let layer = Layer::of(region).ok_or(KernelError::Unsupported { family: "rnn", reason: "not a recurrent layer of known sizes".into() })?;
    let mut b = builder(name, target);
    let args: Vec<Buf> = region.args.iter().map(|t| b.arg(t.dtype, Access::Read)).collect();
    let outs: Vec<Buf> = region.outputs.iter().map(|o| b.arg(o.ty.dtype, Access::Write)).collect();
    let mut env = Env::with_bufs(region, args, outs);
    let lanes = schedule.knob("lanes", 8).max(1);
    let packed = schedule.knob("packed", 0) == 1;
    let cpu = matches!(target, Target::Cpu(_));
    let space = if cpu { Space::Local } else { Space::Shared };
    let (acc, padded) = (layer.acc(), (layer.rows() as u64).next_multiple_of(lanes as u64));
    let hidden = (layer.hidden as u64).next_multiple_of(lanes as u64);
    let mut alloc = |len: u64| b.alloc(space, acc, len);
    let run = Run {
        sums: alloc(padded),
        h: alloc(hidden),
        c: alloc(hidden),
        aux: alloc(hidden),
        bias: alloc(padded),
        xw: if cpu { b.scratch(acc) } else { b.alloc(space, acc, padded) },
        padded: padded as i64,
        layer: &layer,
        lanes,
        packed,
    };
    let units = Dim::from(layer.directions.len()) * layer.batch.clone();
    let work = layer.steps.clone() * Dim::from(layer.rows() * (layer.hidden + layer.inputs));
    let walk = if cpu {
        let (lo, hi) = (b.lo(), b.hi());
        b.for_(lo, hi, 1, &[], |b, u, _| {
            run.unit(b, &mut env, u, None);
            vec![]
        });
        let unit_ps = work * Dim::from(60i64) + Dim::from(20_000i64);
        let scratch = layer.steps.clone() * Dim::from(padded as i64 * acc.bits() as i64 / 8);
        Walk { cpu: Some(CpuShape { extent: units, grain: cost::grain(&unit_ps), unit_ps, scratch }), grid: None }
    } else {
        b.launch().threads = THREADS as u32;
        let (u, me) = (b.block_id(0), b.thread_id());
        run.unit(&mut b, &mut env, u, Some(me));
        Walk { cpu: None, grid: Some([units, Dim::one(), Dim::one()]) }
    };
    let mut built = Built::new(b.finish(), schedule, env.dims, walk);
    if packed {
        let pack = Pack::Panels { width: lanes as usize, transposed: true };
        built.packs = vec![(1, pack.clone()), (2, pack)];
    }
    Ok(built)
}

/// One unit of work, as it is written.
struct Run<'a> {
    layer: &'a Layer,
    lanes: i64,
    packed: bool,
    padded: i64,
    /// Recurrent weights times the state, a row each.
    sums: Buf,
    h: Buf,
    c: Buf,
    /// State scaled by the reset gate (GRU).
    aux: Buf,
    bias: Buf,
    /// Input weights times inputs: of every step on a CPU, of this step on a GPU.
    xw: Buf,
}

/// Weights in memory: `rows` rows of `k`, from element `base` on.
#[derive(Clone, Copy)]
struct Matrix {
    buf: Buf,
    base: Val,
    k: i64,
}

impl Run<'_> {
    fn unit(&self, b: &mut Builder, env: &mut Env, unit: Val, me: Option<Val>) {
        let l = self.layer;
        let parts = [Dim::from(l.directions.len()), l.batch.clone()];
        let at = split(b, env, unit, &parts);
        if let [only] = l.directions[..] {
            return self.sequence(b, env, 0, only, at[1], me);
        }
        let zero = b.index(0);
        let first = b.eq(at[0], zero);
        // The direction decides branches and activations, so each has its own code.
        b.when(first, |b| self.sequence(b, env, 0, l.directions[0], at[1], me));
        let second = b.ne(at[0], zero);
        b.when(second, |b| self.sequence(b, env, 1, l.directions[1], at[1], me));
    }

    fn sequence(&self, b: &mut Builder, env: &mut Env, d: usize, reverse: bool, n: Val, me: Option<Val>) {
        let l = self.layer;
        let (rows, hidden, d_n) = (l.rows(), l.hidden, l.directions.len() as i64);
        let (steps, batch) = (env.size(b, &l.steps), env.size(b, &l.batch));
        let matrix = |b: &mut Builder, arg: usize, k: i64| {
            let per_direction = if self.packed { self.padded * k } else { rows * k };
            Matrix { buf: env.args[arg], base: b.index(d as i64 * per_direction), k }
        };
        let (w, r) = (matrix(b, 1, l.inputs), matrix(b, 2, hidden));
        let zero = b.index(0);
        // State and bias.
        let base = b.mul_i(batch, d as i64);
        let base = b.add(base, n);
        let state = b.mul_i(base, hidden);
        self.each(b, hidden, me, &mut |b, p| {
            let at = b.add(state, p.axes[0]);
            let v = read(b, env.args[4], at, p);
            write(b, self.h, p.axes[0], v, p);
            if let Kind::Lstm { .. } = l.kind {
                let v = read(b, env.args[5], at, p);
                write(b, self.c, p.axes[0], v, p);
            }
        });
        let separate = matches!(l.kind, Kind::Gru { linear_before_reset: true });
        let bias = |b: &mut Builder, from: i64, to: i64, both: bool| {
            self.each(b, to - from, me, &mut |b, p| {
                let at = b.add_i(p.axes[0], d as i64 * 2 * rows + from);
                let mut v = read(b, env.args[3], at, p);
                if both {
                    let at = b.add_i(at, rows);
                    let other = read(b, env.args[3], at, p);
                    v = b.add(v, other);
                }
                let to = b.add_i(p.axes[0], from);
                write(b, self.bias, to, v, p);
            });
        };
        let joint = if separate { 2 * hidden } else { rows };
        bias(b, 0, joint, true);
        if separate {
            bias(b, joint, rows, false);
        }
        self.sync(b, me);
        let x = env.args[0];
        if me.is_none() {
            self.project(b, w, x, n, batch, steps);
        }
        let last = env.args.len() - 1;
        let len = b.load(env.args[last], n, 1);
        let len = b.cast(len, DType::I64);
        let len = b.max(len, zero);
        let len = b.min(len, steps);
        b.for_(zero, len, 1, &[], |b, step, _| {
            let t = if reverse {
                let back = b.sub(len, step);
                b.add_i(back, -1)
            } else {
                step
            };
            let xw = match me {
                None => b.mul_i(t, self.padded),
                Some(me) => {
                    let row = b.mul(t, batch);
                    let row = b.add(row, n);
                    let from = b.mul_i(row, l.inputs);
                    self.rows_of(b, w, x, from, me, 0, rows, self.xw, Some(self.bias));
                    zero
                }
            };
            self.product(b, r, self.h, zero, me, 0, rows);
            self.sync(b, me);
            self.step(b, env, d, r, xw, me);
            self.sync(b, me);
            let y = b.mul_i(t, d_n);
            let y = b.add_i(y, d as i64);
            let y = b.mul(y, batch);
            let y = b.add(y, n);
            let y = b.mul_i(y, hidden);
            self.each(b, hidden, me, &mut |b, p| {
                let v = read(b, self.h, p.axes[0], p);
                let to = b.add(y, p.axes[0]);
                write(b, env.outs[0], to, v, p);
            });
            vec![]
        });
        // Steps beyond the sequence are zero.
        b.for_(len, steps, 1, &[], |b, t, _| {
            let y = b.mul_i(t, d_n);
            let y = b.add_i(y, d as i64);
            let y = b.mul(y, batch);
            let y = b.add(y, n);
            let y = b.mul_i(y, hidden);
            let nothing = b.float(0.0, l.acc());
            self.each(b, hidden, me, &mut |b, p| {
                let to = b.add(y, p.axes[0]);
                write(b, env.outs[0], to, nothing, p);
            });
            vec![]
        });
        self.each(b, hidden, me, &mut |b, p| {
            let to = b.add(state, p.axes[0]);
            let v = read(b, self.h, p.axes[0], p);
            write(b, env.outs[1], to, v, p);
            if let Kind::Lstm { .. } = l.kind {
                let v = read(b, self.c, p.axes[0], p);
                write(b, env.outs[2], to, v, p);
            }
        });
    }

    /// Vectors of `0..n` (CPU), or this thread's share of them (GPU).
    fn each(&self, b: &mut Builder, n: i64, me: Option<Val>, body: &mut dyn FnMut(&mut Builder, &Point)) {
        let (zero, end) = (b.index(0), b.index(n));
        if let Some(me) = me {
            b.for_(me, end, THREADS, &[], |b, i, _| {
                body(b, &Point::new(vec![i]));
                vec![]
            });
            return;
        }
        let full = n - n % self.lanes;
        let vector = |count| VectorAxis { axis: 0, lanes: self.lanes as usize, count, aligned: true };
        let stop = b.index(full);
        b.for_(zero, stop, self.lanes, &[], |b, i, _| {
            body(b, &Point::vector(vec![i], vector(None)));
            vec![]
        });
        if full < n {
            let rest = b.index(n - full);
            body(b, &Point::vector(vec![stop], vector(Some(rest))));
        }
    }

    fn sync(&self, b: &mut Builder, me: Option<Val>) {
        if me.is_some() {
            b.barrier();
        }
    }

    /// One vector of weights: rows `panel * lanes ..` at `k`.
    fn weights(&self, b: &mut Builder, m: Matrix, panel: Val, k: Val) -> Val {
        let lanes = self.lanes as usize;
        let v = if self.packed {
            let at = b.mul_i(panel, m.k);
            let at = b.add(at, k);
            let at = b.mul_i(at, self.lanes);
            let at = b.add(at, m.base);
            b.load(m.buf, at, lanes)
        } else {
            let row = b.mul_i(panel, self.lanes);
            let left = b.index(self.layer.rows());
            let left = b.sub(left, row);
            let mask = b.lane_mask(left, lanes);
            let iota = b.iota(DType::I64, lanes);
            let rows = b.map(ScalarFn::Add, &[iota, row]);
            let stride = b.index(m.k);
            let at = b.map(ScalarFn::Mul, &[rows, stride]);
            let first = b.add(m.base, k);
            let at = b.map(ScalarFn::Add, &[at, first]);
            b.gather(m.buf, at, Some(mask))
        };
        b.cast(v, self.layer.acc())
    }

    /// `mr` vectors times all rows of a matrix (CPU): `x` gives the scalar of vector `i` at `k`, `out` takes sums by vector and first row.
    #[allow(clippy::too_many_arguments)] // A product has many sides.
    fn multiply(
        &self,
        b: &mut Builder,
        m: Matrix,
        mr: usize,
        nv: i64,
        (from, to): (i64, i64),
        start: &dyn Fn(&mut Builder, Val) -> Val,
        x: &dyn Fn(&mut Builder, usize, Val) -> Val,
        out: &dyn Fn(&mut Builder, usize, Val, Val),
    ) {
        let panels = |b: &mut Builder, first: Val, nv: i64| {
            let mut init = vec![];
            for j in 0..nv {
                let panel = b.add_i(first, j);
                let row = b.mul_i(panel, self.lanes);
                let v = start(b, row);
                init.extend(std::iter::repeat_n(v, mr));
            }
            let (zero, k) = (b.index(0), b.index(m.k));
            let unroll = if m.k % 4 == 0 { 4 } else { 1 };
            let sums = b.for_(zero, k, unroll, &init, |b, k, sums| {
                let mut sums = sums.to_vec();
                for u in 0..unroll {
                    let k = b.add_i(k, u);
                    let xs: Vec<Val> = (0..mr).map(|i| x(b, i, k)).collect();
                    for j in 0..nv as usize {
                        let panel = b.add_i(first, j as i64);
                        let w = self.weights(b, m, panel, k);
                        for i in 0..mr {
                            sums[j * mr + i] = b.fma(w, xs[i], sums[j * mr + i]);
                        }
                    }
                }
                sums
            });
            for j in 0..nv {
                let panel = b.add_i(first, j);
                let row = b.mul_i(panel, self.lanes);
                for i in 0..mr {
                    out(b, i, row, sums[j as usize * mr + i]);
                }
            }
        };
        let (lo, hi) = (from / self.lanes, (to + self.lanes - 1) / self.lanes);
        let wide = lo + (hi - lo) / nv * nv;
        let (lo, mid, hi) = (b.index(lo), b.index(wide), b.index(hi));
        b.for_(lo, mid, nv, &[], |b, p, _| {
            panels(b, p, nv);
            vec![]
        });
        b.for_(mid, hi, 1, &[], |b, p, _| {
            panels(b, p, 1);
            vec![]
        });
    }

    /// Inputs of every step times the input weights plus bias, into `xw` (CPU).
    fn project(&self, b: &mut Builder, w: Matrix, x: Buf, n: Val, batch: Val, steps: Val) {
        let l = self.layer;
        let block = |b: &mut Builder, t: Val, mr: usize| {
            let from: Vec<Val> = (0..mr)
                .map(|i| {
                    let row = b.add_i(t, i as i64);
                    let row = b.mul(row, batch);
                    let row = b.add(row, n);
                    b.mul_i(row, l.inputs)
                })
                .collect();
            self.multiply(
                b,
                w,
                mr,
                2,
                (0, l.rows()),
                &|b, row| b.load(self.bias, row, self.lanes as usize),
                &|b, i, k| {
                    let at = b.add(from[i], k);
                    let v = b.load(x, at, 1);
                    b.cast(v, l.acc())
                },
                &|b, i, row, v| {
                    let to = b.add_i(t, i as i64);
                    let to = b.mul_i(to, self.padded);
                    let to = b.add(to, row);
                    b.store(self.xw, to, v);
                },
            );
        };
        let zero = b.index(0);
        let rest = b.rem_i(steps, 4);
        let full = b.sub(steps, rest);
        b.for_(zero, full, 4, &[], |b, t, _| {
            block(b, t, 4);
            vec![]
        });
        b.for_(full, steps, 1, &[], |b, t, _| {
            block(b, t, 1);
            vec![]
        });
    }

    /// Rows `from..to` of the recurrent weights times `x`, into `sums`.
    #[allow(clippy::too_many_arguments)]
    fn product(&self, b: &mut Builder, m: Matrix, x: Buf, at: Val, me: Option<Val>, from: i64, to: i64) {
        if let Some(me) = me {
            return self.rows_of(b, m, x, at, me, from, to, self.sums, None);
        }
        let ty = Ty::of_lanes(self.layer.acc(), self.lanes as usize);
        self.multiply(
            b,
            m,
            1,
            8,
            (from, to),
            &|b, _| b.constant_of(Scalar::F(0.0), ty),
            &|b, _, k| {
                let at = b.add(at, k);
                b.load(x, at, 1)
            },
            &|b, _, row, v| b.store(self.sums, row, v),
        );
    }

    /// As [`Run::product`] with a thread a row (GPU), into `out`.
    #[allow(clippy::too_many_arguments)]
    fn rows_of(&self, b: &mut Builder, m: Matrix, x: Buf, at: Val, me: Val, from: i64, to: i64, out: Buf, bias: Option<Buf>) {
        let acc = self.layer.acc();
        let (first, end) = (b.add_i(me, from), b.index(to));
        b.for_(first, end, THREADS, &[], |b, row, _| {
            let (base, stride) = if self.packed {
                let panel = b.div_i(row, self.lanes);
                let lane = b.rem_i(row, self.lanes);
                let base = b.mul_i(panel, m.k * self.lanes);
                (b.add(base, lane), self.lanes)
            } else {
                (b.mul_i(row, m.k), 1)
            };
            let base = b.add(base, m.base);
            let init = match bias {
                Some(bias) => b.load(bias, row, 1),
                None => b.float(0.0, acc),
            };
            let (zero, k) = (b.index(0), b.index(m.k));
            let sum = b.for_(zero, k, 1, &[init], |b, k, sum| {
                let w = b.mul_i(k, stride);
                let w = b.add(base, w);
                let w = b.load(m.buf, w, 1);
                let w = b.cast(w, acc);
                let from = b.add(at, k);
                let v = b.load(x, from, 1);
                let v = b.cast(v, acc);
                vec![b.fma(w, v, sum[0])]
            });
            b.store(out, row, sum[0]);
            vec![]
        });
    }

    fn clip(&self, b: &mut Builder, v: Val) -> Val {
        let l = self.layer;
        if l.clip <= 0.0 {
            return v;
        }
        let (lo, hi) = (b.float(-l.clip, l.acc()), b.float(l.clip, l.acc()));
        let v = b.map(ScalarFn::Max, &[v, lo]);
        b.map(ScalarFn::Min, &[v, hi])
    }

    fn activate(&self, b: &mut Builder, f: Activation, v: Val) -> Val {
        let acc = self.layer.acc();
        let with = |b: &mut Builder, f: ScalarFn, v: Val, x: f64| {
            let x = b.float(x, acc);
            b.map(f, &[v, x])
        };
        // `below` where v is less than a number, else v.
        let unless_less = |b: &mut Builder, v: Val, than: f64, below: Val| {
            let less = with(b, ScalarFn::Lt, v, than);
            b.map(ScalarFn::Select, &[less, below, v])
        };
        match f {
            Activation::Sigmoid => b.map(ScalarFn::Sigmoid, &[v]),
            Activation::Tanh => b.map(ScalarFn::Tanh, &[v]),
            Activation::Softplus => b.map(ScalarFn::Softplus, &[v]),
            Activation::Relu => with(b, ScalarFn::Max, v, 0.0),
            Activation::Softsign => {
                let size = b.map(ScalarFn::Abs, &[v]);
                let size = with(b, ScalarFn::Add, size, 1.0);
                b.map(ScalarFn::Div, &[v, size])
            }
            Activation::Affine(alpha, beta) | Activation::HardSigmoid(alpha, beta) => {
                let v = with(b, ScalarFn::Mul, v, alpha.get());
                let v = with(b, ScalarFn::Add, v, beta.get());
                if matches!(f, Activation::Affine(..)) {
                    return v;
                }
                let v = with(b, ScalarFn::Max, v, 0.0);
                with(b, ScalarFn::Min, v, 1.0)
            }
            Activation::ScaledTanh(alpha, beta) => {
                let v = with(b, ScalarFn::Mul, v, beta.get());
                let v = b.map(ScalarFn::Tanh, &[v]);
                with(b, ScalarFn::Mul, v, alpha.get())
            }
            Activation::Elu(alpha) => {
                let below = b.map(ScalarFn::Exp, &[v]);
                let below = with(b, ScalarFn::Sub, below, 1.0);
                let below = with(b, ScalarFn::Mul, below, alpha.get());
                unless_less(b, v, 0.0, below)
            }
            Activation::LeakyRelu(alpha) => {
                let below = with(b, ScalarFn::Mul, v, alpha.get());
                unless_less(b, v, 0.0, below)
            }
            Activation::ThresholdedRelu(alpha) => {
                let zero = b.float(0.0, acc);
                unless_less(b, v, alpha.get(), zero)
            }
        }
    }

    /// The sum of gate `k` at a point: inputs, bias and state.
    fn gate(&self, b: &mut Builder, p: &Point, xw: Val, k: i64) -> Val {
        let at = b.add_i(p.axes[0], k * self.layer.hidden);
        let state = read(b, self.sums, at, p);
        let at = b.add(at, xw);
        let input = read(b, self.xw, at, p);
        b.add(input, state)
    }

    /// New state from the sums of one step.
    fn step(&self, b: &mut Builder, env: &Env, d: usize, r: Matrix, xw: Val, me: Option<Val>) {
        let l = self.layer;
        match l.kind {
            Kind::Plain => self.each(b, l.hidden, me, &mut |b, p| {
                let v = self.gate(b, p, xw, 0);
                let v = self.clip(b, v);
                let v = self.activate(b, l.activations[d], v);
                write(b, self.h, p.axes[0], v, p);
            }),
            Kind::Lstm { coupled } => {
                let [f, g, last] = [l.activations[3 * d], l.activations[3 * d + 1], l.activations[3 * d + 2]];
                self.each(b, l.hidden, me, &mut |b, p| {
                    let c = read(b, self.c, p.axes[0], p);
                    let gate = |b: &mut Builder, k: i64, peep: Option<(i64, Val)>, f: Activation| {
                        let mut v = self.gate(b, p, xw, k);
                        if let Some((k, c)) = peep {
                            let at = b.add_i(p.axes[0], (d as i64 * 3 + k) * l.hidden);
                            let w = read(b, env.args[6], at, p);
                            v = b.fma(w, c, v);
                        }
                        let v = self.clip(b, v);
                        self.activate(b, f, v)
                    };
                    let i = gate(b, 0, Some((0, c)), f);
                    let keep = if coupled {
                        let one = b.float(1.0, l.acc());
                        b.map(ScalarFn::Sub, &[one, i])
                    } else {
                        gate(b, 2, Some((2, c)), f)
                    };
                    let new = gate(b, 3, None, g);
                    let new = b.mul(i, new);
                    let c = b.fma(keep, c, new);
                    let o = gate(b, 1, Some((1, c)), f);
                    let seen = self.activate(b, last, c);
                    let h = b.mul(o, seen);
                    write(b, self.c, p.axes[0], c, p);
                    write(b, self.h, p.axes[0], h, p);
                });
            }
            Kind::Gru { linear_before_reset } => {
                let [f, g] = [l.activations[2 * d], l.activations[2 * d + 1]];
                if !linear_before_reset {
                    self.each(b, l.hidden, me, &mut |b, p| {
                        let v = self.gate(b, p, xw, 1);
                        let v = self.clip(b, v);
                        let reset = self.activate(b, f, v);
                        let h = read(b, self.h, p.axes[0], p);
                        let v = b.mul(reset, h);
                        write(b, self.aux, p.axes[0], v, p);
                        // The update gate, before its sum is overwritten.
                        let v = self.gate(b, p, xw, 0);
                        let v = self.clip(b, v);
                        let update = self.activate(b, f, v);
                        write(b, self.c, p.axes[0], update, p);
                    });
                    self.sync(b, me);
                    let zero = b.index(0);
                    self.product(b, r, self.aux, zero, me, 2 * l.hidden, 3 * l.hidden);
                    self.sync(b, me);
                }
                self.each(b, l.hidden, me, &mut |b, p| {
                    let h = read(b, self.h, p.axes[0], p);
                    let (update, sum) = if linear_before_reset {
                        let v = self.gate(b, p, xw, 0);
                        let v = self.clip(b, v);
                        let update = self.activate(b, f, v);
                        let v = self.gate(b, p, xw, 1);
                        let v = self.clip(b, v);
                        let reset = self.activate(b, f, v);
                        let at = b.add_i(p.axes[0], 2 * l.hidden);
                        let state = read(b, self.sums, at, p);
                        let bias = b.add_i(p.axes[0], d as i64 * 6 * l.hidden + 5 * l.hidden);
                        let bias = read(b, env.args[3], bias, p);
                        let state = b.add(state, bias);
                        let at = b.add(at, xw);
                        let input = read(b, self.xw, at, p);
                        (update, b.fma(reset, state, input))
                    } else {
                        (read(b, self.c, p.axes[0], p), self.gate(b, p, xw, 2))
                    };
                    let v = self.clip(b, sum);
                    let new = self.activate(b, g, v);
                    // (1 - z) * new + z * h
                    let change = b.sub(h, new);
                    let h = b.fma(update, change, new);
                    write(b, self.h, p.axes[0], h, p);
                });
            }
        }
    }
}
