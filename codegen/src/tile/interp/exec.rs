//! Steps of an agent: core operations and control.
use super::{Data, InterpError, Machine, Progress, flat::Step};
use crate::tile::{Access, DotKind, Op, ShflKind, Stmt, Ty, Val, VoteKind};
use pavage_ir::{DType, Scalar, ScalarFn, scalar::wrap_int};

/// What an open control statement remembers.
pub(super) struct Frame {
    /// The mask to return to.
    outer: Vec<bool>,
    /// For `if`: threads of the second branch.
    other: Vec<bool>,
}

impl Machine<'_> {
    pub(super) fn step(&mut self, agent: usize, step: Step<'_>) -> Result<Progress, InterpError> {
        let wrap = |m: &Self, why| m.fail(agent, step.name(), why);
        match step {
            Step::Do(stmt) => {
                let done = self.statement(agent, stmt).map_err(|why| wrap(self, why))?;
                if done == Progress::Done {
                    self.agents[agent].pc += 1;
                }
                return Ok(done);
            }
            Step::Choose { stmt, first } => {
                let which = super::words::choose(self, agent, stmt).map_err(|why| wrap(self, why))?;
                if which >= stmt.blocks.len() {
                    return Err(wrap(self, format!("has no block {which}")));
                }
                self.agents[agent].pc = first + which;
            }
            Step::Goto(to) => self.agents[agent].pc = to,
            other => self.control(agent, other).map_err(|why| wrap(self, why))?,
        }
        Ok(Progress::Done)
    }

    fn any(&self, agent: usize) -> bool {
        self.agents[agent].mask.contains(&true)
    }

    /// Copy values into others, in the threads that execute, all at once.
    fn assign(&mut self, agent: usize, to: &[Val], from: &[Val]) -> Result<(), String> {
        let data: Vec<Data> = from.iter().map(|v| self.value(agent, *v).cloned()).collect::<Result<_, _>>()?;
        for (v, d) in to.iter().zip(data) {
            self.set(agent, *v, d);
        }
        Ok(())
    }

    fn narrow(&mut self, agent: usize, keep: impl Fn(&Data, usize) -> bool, by: Val) -> Result<(), String> {
        let data = self.value(agent, by)?.clone();
        for (t, m) in self.agents[agent].mask.iter_mut().enumerate() {
            *m &= keep(&data, t);
        }
        Ok(())
    }

    fn open(&mut self, agent: usize) {
        let outer = self.agents[agent].mask.clone();
        self.agents[agent].frames.push(Frame { outer, other: vec![] });
    }

    fn close(&mut self, agent: usize) -> Result<(), String> {
        let frame = self.agents[agent].frames.pop().ok_or("no open block")?;
        self.agents[agent].mask = frame.outer;
        Ok(())
    }

    fn control(&mut self, agent: usize, step: Step<'_>) -> Result<(), String> {
        let mut next = self.agents[agent].pc + 1;
        match step {
            Step::If { stmt, other } => {
                self.open(agent);
                let outer = self.agents[agent].mask.clone();
                self.narrow(agent, Data::bool, stmt.args[0])?;
                let rest: Vec<bool> = outer.iter().zip(&self.agents[agent].mask).map(|(o, m)| *o && !*m).collect();
                if let Some(f) = self.agents[agent].frames.last_mut() {
                    f.other = rest;
                }
                if !self.any(agent) {
                    next = other;
                }
            }
            Step::Else { stmt, end } => {
                if self.any(agent) {
                    self.assign(agent, &stmt.results, &stmt.blocks[0].yields)?;
                }
                let other = self.agents[agent].frames.last_mut().map(|f| std::mem::take(&mut f.other)).unwrap_or_default();
                self.agents[agent].mask = other;
                if !self.any(agent) {
                    next = end;
                }
            }
            Step::EndIf { stmt } => {
                if self.any(agent) {
                    self.assign(agent, &stmt.results, &stmt.blocks[1].yields)?;
                }
                self.close(agent)?;
            }
            Step::For { stmt } => {
                self.open(agent);
                if (0..self.agents[agent].threads).any(|t| self.agents[agent].mask[t] && self.value(agent, stmt.args[2]).is_ok_and(|d| d.int(t) <= 0)) {
                    return Err("a step must be above 0".to_owned());
                }
                self.assign(agent, &stmt.results, &stmt.args[3..])?;
                let first = self.value(agent, stmt.args[0])?.clone();
                self.keep(agent, stmt.blocks[0].params[0], first);
                self.assign(agent, &stmt.blocks[0].params[1..], &stmt.args[3..])?;
            }
            Step::ForTest { stmt, end } => {
                let hi = self.value(agent, stmt.args[1])?.clone();
                let i = stmt.blocks[0].params[0];
                self.narrow(agent, |i, t| i.int(t) < hi.int(t), i)?;
                let counter = self.value(agent, i)?.clone();
                self.within(agent, i, &counter);
                if !self.any(agent) {
                    next = end;
                }
            }
            Step::ForNext { stmt, test } => {
                let body = &stmt.blocks[0];
                // Results follow the carried values, so threads that have left keep their last ones.
                self.assign(agent, &stmt.results, &body.yields)?;
                let yields = body.yields.clone();
                self.assign(agent, &body.params[1..], &yields)?;
                let (step, i) = (self.value(agent, stmt.args[2])?.clone(), self.value(agent, body.params[0])?.clone());
                let threads = self.agents[agent].threads;
                self.keep(agent, body.params[0], Data::I((0..threads).map(|t| i.int(t).wrapping_add(step.int(t))).collect()));
                next = test;
            }
            Step::While { stmt } => {
                self.open(agent);
                self.assign(agent, &stmt.blocks[0].params, &stmt.args)?;
            }
            Step::WhileTest { stmt, end } => {
                let yields = &stmt.blocks[0].yields;
                self.assign(agent, &stmt.results, &yields[1..])?;
                self.narrow(agent, Data::bool, yields[0])?;
                if self.any(agent) {
                    self.assign(agent, &stmt.blocks[1].params, &yields[1..])?;
                } else {
                    next = end;
                }
            }
            Step::WhileNext { stmt, test } => {
                self.assign(agent, &stmt.blocks[0].params, &stmt.blocks[1].yields)?;
                next = test;
            }
            Step::EndLoop => self.close(agent)?,
            Step::Do(_) | Step::Choose { .. } | Step::Goto(_) => {}
        }
        self.agents[agent].pc = next;
        Ok(())
    }

    fn statement(&mut self, agent: usize, s: &Stmt) -> Result<Progress, String> {
        let threads = self.agents[agent].threads;
        let ty = s.results.first().map(|r| self.kernel.ty(*r));
        let build = |m: &Self, f: &mut dyn FnMut(usize, usize) -> Result<Scalar, String>| {
            let mask = &m.agents[agent].mask;
            let ty = ty.unwrap_or(Ty::BOOL);
            let idle = Scalar::I(0).cast(ty.dtype());
            Data::build(ty, threads, |t, l| if mask[t] { f(t, l) } else { Ok(idle) })
        };
        let same = |m: &Self, f: &dyn Fn(usize) -> i64| Ok::<Data, String>(Data::I((0..m.agents[agent].threads).map(f).collect()));
        let arg_ty = |m: &Self, i: usize| m.kernel.ty(s.args[i]);
        let data = match &s.op {
            Op::Const(c) => build(self, &mut |_, _| Ok(*c))?,
            Op::Map(f) => self.map(agent, *f, s)?,
            Op::Cast => {
                let (v, from, to) = (self.value(agent, s.args[0])?, arg_ty(self, 0), ty.unwrap_or(Ty::BOOL));
                build(self, &mut |t, l| Ok(v.get(t * from.lanes() + l, from.dtype()).cast(to.dtype())))?
            }
            Op::Bitcast => self.bitcast(agent, s)?,
            Op::Splat => {
                let (v, d) = (self.value(agent, s.args[0])?, arg_ty(self, 0).dtype());
                build(self, &mut |t, _| Ok(v.get(t, d)))?
            }
            Op::Extract(i) => {
                let (v, from) = (self.value(agent, s.args[0])?, arg_ty(self, 0));
                build(self, &mut |t, _| Ok(v.get(t * from.lanes() + usize::from(*i), from.dtype())))?
            }
            Op::Insert(i) => {
                let (v, x, to) = (self.value(agent, s.args[0])?, self.value(agent, s.args[1])?, arg_ty(self, 0));
                build(self, &mut |t, l| Ok(if l == usize::from(*i) { x.get(t, to.dtype()) } else { v.get(t * to.lanes() + l, to.dtype()) }))?
            }
            Op::Pack => {
                let parts: Vec<&Data> = s.args.iter().map(|a| self.value(agent, *a)).collect::<Result<_, _>>()?;
                let d = arg_ty(self, 0).dtype();
                build(self, &mut |t, l| Ok(parts[l].get(t, d)))?
            }
            Op::Iota => build(self, &mut |_, l| Ok(Scalar::I(l as i128)))?,
            Op::Shuffle(mask) => {
                let (a, b, from) = (self.value(agent, s.args[0])?, self.value(agent, s.args[1])?, arg_ty(self, 0));
                let n = from.lanes();
                build(self, &mut |t, l| {
                    let i = usize::from(mask[l]);
                    Ok(if i < n { a.get(t * n + i, from.dtype()) } else { b.get(t * n + i - n, from.dtype()) })
                })?
            }
            Op::Reduce(r) => {
                let (v, from) = (self.value(agent, s.args[0])?, arg_ty(self, 0));
                build(self, &mut |t, _| {
                    let mut all: Vec<Scalar> = (0..from.lanes()).map(|l| v.get(t * from.lanes() + l, from.dtype())).collect();
                    while all.len() > 1 {
                        let high = all.split_off(all.len() / 2);
                        for (a, b) in all.iter_mut().zip(high) {
                            *a = r.scalar().eval(from.dtype(), &[*a, b]);
                        }
                    }
                    Ok(all[0])
                })?
            }
            Op::LaneMask => {
                let n = self.value(agent, s.args[0])?;
                build(self, &mut |t, l| Ok(Scalar::B((l as i64) < n.int(t))))?
            }
            Op::Load { offset } => return self.load(agent, s, *offset, false),
            Op::Gather { offset } => return self.load(agent, s, *offset, true),
            Op::Store { offset } => return self.store(agent, s, *offset, false),
            Op::Scatter { offset } => return self.store(agent, s, *offset, true),
            Op::AtomicAdd { offset } => return self.atomic_add(agent, s, *offset),
            Op::Prefetch { .. } => return Ok(Progress::Done),
            Op::Dot(kind) => self.dot(agent, *kind, s)?,
            Op::Lo => same(self, &|_| self.slice.0)?,
            Op::Hi => same(self, &|_| self.slice.1)?,
            Op::BlockId(axis) => same(self, &|_| i64::from(self.block_ids[self.agents[agent].block][usize::from(*axis)]))?,
            Op::GridDim(axis) => same(self, &|_| i64::from(self.grid[usize::from(*axis)]))?,
            Op::ThreadId => same(self, &|t| (self.agents[agent].first_thread + t) as i64)?,
            Op::LaneId => same(self, &|t| ((self.agents[agent].first_thread + t) % 32) as i64)?,
            Op::Barrier => return self.barrier(agent),
            Op::Shfl(kind) => self.shfl(agent, *kind, s)?,
            Op::Vote(kind) => self.vote(agent, *kind, s)?,
            Op::Mma(_) | Op::Hopper(_) => return self.word(agent, s),
            Op::For | Op::If | Op::While => return Err("is control".to_owned()),
        };
        if let Some(r) = s.results.first() {
            self.set(agent, *r, data);
        }
        Ok(Progress::Done)
    }

    fn map(&self, agent: usize, f: ScalarFn, s: &Stmt) -> Result<Data, String> {
        let args: Vec<(&Data, Ty)> = s.args.iter().map(|a| Ok((self.value(agent, *a)?, self.kernel.ty(*a)))).collect::<Result<_, String>>()?;
        let ty = self.kernel.ty(s.results[0]);
        let dtype = args[args.len() - 1].1.dtype();
        let (mask, lanes) = (&self.agents[agent].mask, ty.lanes());
        let mut scalars = vec![Scalar::I(0); args.len()];
        let idle = Scalar::I(0).cast(ty.dtype());
        Data::build(ty, self.agents[agent].threads, |t, l| {
            if !mask[t] {
                return Ok(idle);
            }
            for ((v, from), slot) in args.iter().zip(&mut scalars) {
                // A select's condition may be one bool for all lanes.
                let i = if from.is_scalar() { t } else { t * lanes + l };
                *slot = v.get(i, from.dtype());
            }
            Ok(f.eval(dtype, &scalars))
        })
    }

    fn bitcast(&self, agent: usize, s: &Stmt) -> Result<Data, String> {
        let (from, to) = (self.kernel.ty(s.args[0]), self.kernel.ty(s.results[0]));
        let v = self.value(agent, s.args[0])?;
        let (wide, narrow) = (from.dtype().bits().max(8) / 8, to.dtype().bits().max(8) / 8);
        let mut bytes = vec![0; wide * from.lanes()];
        let mut out = Data::zeros(to.dtype(), to.lanes() * self.agents[agent].threads);
        for t in 0..self.agents[agent].threads {
            for l in 0..from.lanes() {
                super::memory::encode(v.get(t * from.lanes() + l, from.dtype()), from.dtype(), &mut bytes[l * wide..][..wide]);
            }
            for l in 0..to.lanes() {
                out.put(t * to.lanes() + l, super::memory::decode(&bytes[l * narrow..][..narrow], to.dtype()));
            }
        }
        Ok(out)
    }

    // ---- memory ----

    pub(super) fn active(&self, agent: usize) -> Vec<usize> {
        (0..self.agents[agent].threads).filter(|t| self.agents[agent].mask[*t]).collect()
    }

    fn touch(&mut self, agent: usize, place: super::memory::Place, bytes: usize, thread: usize, how: Access) -> Result<(), String> {
        let (block, first) = (self.agents[agent].block, self.agents[agent].first_thread);
        let epoch = self.epochs[block];
        self.memory.touch(place, bytes, block, first + thread, epoch, how)
    }

    fn load(&mut self, agent: usize, s: &Stmt, offset: i64, each: bool) -> Result<Progress, String> {
        let ty = self.kernel.ty(s.results[0]);
        let (lanes, dtype) = (ty.lanes(), ty.dtype());
        let index = self.value(agent, s.args[0])?.clone();
        let mask = s.args.get(1).map(|m| self.value(agent, *m).cloned()).transpose()?;
        let mut out = Data::zeros(dtype, lanes * self.agents[agent].threads);
        for t in self.active(agent) {
            for l in 0..lanes {
                if mask.as_ref().is_some_and(|m| !m.bool(t * lanes + l)) {
                    continue;
                }
                let at = if each { index.int(t * lanes + l) } else { index.int(t) + l as i64 };
                let place = self.locate(agent, s.bufs[0], at + offset, 1, t)?;
                self.touch(agent, place, dtype.bytes(1), t, Access::Read)?;
                out.put(t * lanes + l, self.memory.read(place, dtype, 0));
            }
        }
        self.set(agent, s.results[0], out);
        Ok(Progress::Done)
    }

    fn store(&mut self, agent: usize, s: &Stmt, offset: i64, each: bool) -> Result<Progress, String> {
        let ty = self.kernel.ty(s.args[1]);
        let (lanes, dtype) = (ty.lanes(), ty.dtype());
        let (index, value) = (self.value(agent, s.args[0])?.clone(), self.value(agent, s.args[1])?.clone());
        let mask = s.args.get(2).map(|m| self.value(agent, *m).cloned()).transpose()?;
        for t in self.active(agent) {
            for l in 0..lanes {
                if mask.as_ref().is_some_and(|m| !m.bool(t * lanes + l)) {
                    continue;
                }
                let at = if each { index.int(t * lanes + l) } else { index.int(t) + l as i64 };
                let place = self.locate(agent, s.bufs[0], at + offset, 1, t)?;
                self.touch(agent, place, dtype.bytes(1), t, Access::Write)?;
                self.memory.write(place, dtype, 0, value.get(t * lanes + l, dtype));
            }
        }
        Ok(Progress::Done)
    }

    fn atomic_add(&mut self, agent: usize, s: &Stmt, offset: i64) -> Result<Progress, String> {
        let dtype = self.kernel.ty(s.args[1]).dtype();
        let (index, value) = (self.value(agent, s.args[0])?.clone(), self.value(agent, s.args[1])?.clone());
        for t in self.active(agent) {
            let place = self.locate(agent, s.bufs[0], index.int(t) + offset, 1, t)?;
            let sum = ScalarFn::Add.eval(dtype, &[self.memory.read(place, dtype, 0), value.get(t, dtype)]);
            self.memory.write(place, dtype, 0, sum);
        }
        Ok(Progress::Done)
    }

    fn dot(&self, agent: usize, kind: DotKind, s: &Stmt) -> Result<Data, String> {
        let ty = self.kernel.ty(s.results[0]);
        let group = if kind == DotKind::U8I8Quads { 4 } else { 2 };
        let skip = usize::from(kind == DotKind::U8I8Quads);
        let (a, b) = (self.value(agent, s.args[skip])?, self.value(agent, s.args[skip + 1])?);
        Data::build(ty, self.agents[agent].threads, |t, l| {
            let at = (t * ty.lanes() + l) * group;
            let sum: i128 = (at..at + group).map(|i| i128::from(a.int(i)) * i128::from(b.int(i))).sum();
            Ok(Scalar::I(match kind {
                DotKind::I16Pairs => wrap_int(sum, DType::I32),
                DotKind::U8I8PairsSat => sum.clamp(-32768, 32767),
                DotKind::U8I8Quads => wrap_int(sum + i128::from(self.value(agent, s.args[0])?.int(t * ty.lanes() + l)), DType::I32),
            }))
        })
    }

    // ---- threads together ----

    fn barrier(&mut self, agent: usize) -> Result<Progress, String> {
        if self.agents[agent].mask.contains(&false) {
            return Err("only some threads reach the barrier".to_owned());
        }
        let block = self.agents[agent].block;
        self.agents[agent].waiting_at_barrier = true;
        if self.agents.iter().filter(|a| a.block == block).all(|a| a.waiting_at_barrier) {
            self.epochs[block] += 1;
            self.agents.iter_mut().filter(|a| a.block == block).for_each(|a| a.waiting_at_barrier = false);
        }
        Ok(Progress::Done)
    }

    /// The warp of each thread must be here as a whole.
    pub(super) fn whole_warps(&self, agent: usize) -> Result<(), String> {
        let a = &self.agents[agent];
        match a.mask.chunks(32).find(|w| w.contains(&true) && w.contains(&false)) {
            Some(_) => Err("only some threads of a warp take part".to_owned()),
            None => Ok(()),
        }
    }

    fn shfl(&self, agent: usize, kind: ShflKind, s: &Stmt) -> Result<Data, String> {
        self.whole_warps(agent)?;
        let (v, lane, ty) = (self.value(agent, s.args[0])?, self.value(agent, s.args[1])?, self.kernel.ty(s.args[0]));
        let threads = self.agents[agent].threads;
        Data::build(ty, threads, |t, l| {
            let (warp, me, by) = (t / 32 * 32, (t % 32) as i64, lane.int(t));
            let from = match kind {
                ShflKind::Xor => me ^ by,
                ShflKind::Up => {
                    if me - by < 0 {
                        me
                    } else {
                        me - by
                    }
                }
                ShflKind::Down => {
                    if me + by > 31 {
                        me
                    } else {
                        me + by
                    }
                }
                ShflKind::Idx => by,
            };
            let from = warp + (from & 31) as usize;
            if from >= threads {
                return Err(format!("lane {} is beyond the block", from - warp));
            }
            Ok(v.get(from * ty.lanes() + l, ty.dtype()))
        })
    }

    fn vote(&self, agent: usize, kind: VoteKind, s: &Stmt) -> Result<Data, String> {
        self.whole_warps(agent)?;
        let v = self.value(agent, s.args[0])?;
        let threads = self.agents[agent].threads;
        Data::build(self.kernel.ty(s.results[0]), threads, |t, _| {
            let warp: Vec<bool> = (t / 32 * 32..(t / 32 * 32 + 32).min(threads)).map(|i| v.bool(i)).collect();
            Ok(match kind {
                VoteKind::Any => Scalar::B(warp.contains(&true)),
                VoteKind::All => Scalar::B(!warp.contains(&false)),
                VoteKind::Ballot => Scalar::I(warp.iter().enumerate().map(|(i, b)| i128::from(*b) << i).sum()),
            })
        })
    }
}
