//! Device words: what they do to values, shared memory, barriers and other agents.
//!
//! Asynchronous work is done as late as the kernel allows, or at a random moment before that. A TMA load fills its destination
//! with NaN when it is issued and with data when it lands; a store and a matrix product read shared memory when they complete.
//! So a slot that is reused too early, or read too early, gives wrong results under some seed. Results of products in flight
//! are NaN whose bits name the product, and become numbers at the wait that proves it done. Shared bytes written by threads
//! are out of the asynchronous proxy's sight until the fence; to read them before is an error.
use super::{Data, GROUP, Machine, Progress};
use crate::tile::{
    Buf, Space, Stmt,
    hopper::{HopperWord as H, Major, Vary, acc_col, acc_row},
};
use pavage_ir::{DType, Dim, Scalar, dim::Atom};
use std::collections::BTreeMap;

/// An mbarrier.
#[derive(Clone, Copy, Default)]
struct Barrier {
    count: i64,
    pending: i64,
    bytes: i64,
    phase: i64,
}

impl Barrier {
    fn settle(&mut self) {
        if self.pending == 0 && self.bytes == 0 && self.count > 0 {
            self.phase += 1;
            self.pending = self.count;
        }
    }
}

/// Threads counted at a named or cluster barrier.
#[derive(Clone, Copy, Default)]
struct Meeting {
    arrived: usize,
    round: u64,
}

/// A TMA copy: to or from shared memory, at a byte offset in it.
#[derive(Clone)]
struct Copy {
    map: usize,
    coords: Vec<i64>,
    blocks: Vec<usize>,
    at: usize,
    barrier: Option<usize>,
}

/// A matrix product in flight.
struct Product {
    token: u64,
    n: usize,
    k: usize,
    major: Major,
    panels: [usize; 2],
    dtype: DType,
    /// Bytes of `a` in shared memory, or its registers.
    a: Result<usize, Data>,
    b: usize,
    acc: Option<Data>,
}

/// What words remember of one agent.
#[derive(Default)]
struct Pending {
    first_group: usize,
    products: Vec<Product>,
    /// Products in each committed group, oldest first.
    groups: Vec<usize>,
    open: usize,
    /// Round of the meeting that the agent waits at.
    meeting: Option<u64>,
    /// Stores issued and, of these, how many each committed group has.
    stores: Vec<Copy>,
    store_groups: Vec<usize>,
    store_open: usize,
}

/// What words remember of a cluster.
#[derive(Default)]
pub(super) struct State {
    barriers: BTreeMap<(usize, usize), Barrier>,
    meetings: BTreeMap<(usize, i64), Meeting>,
    loads: Vec<Copy>,
    agents: BTreeMap<usize, Pending>,
    results: BTreeMap<u64, Data>,
    next_token: u64,
    pub(super) copies: BTreeMap<usize, super::ampere::Copies>,
}

/// NaN of a product in flight: the low bits name it.
const TOKEN: u64 = 0x7ffc_0000_0000_0000;

/// Which block of a word with blocks an agent takes: the role of its warpgroup.
pub(super) fn choose(machine: &mut Machine<'_>, agent: usize, stmt: &Stmt) -> Result<usize, String> {
    let crate::tile::Op::Hopper(H::Roles(roles)) = &stmt.op else { return Err("has no blocks to choose from".to_owned()) };
    machine.whole_group(agent)?;
    let group = machine.agents[agent].first_thread / GROUP;
    let mut first = 0;
    for (i, role) in roles.iter().enumerate() {
        let end = first + usize::from(role.groups);
        if group < end {
            machine.pending(agent).first_group = first;
            return Ok(i);
        }
        first = end;
    }
    Err(format!("warpgroup {group} has no role"))
}

/// Run a Hopper word.
pub(super) fn hopper(m: &mut Machine<'_>, agent: usize, word: &H, s: &Stmt) -> Result<Progress, String> {
    let threads = m.agents[agent].threads;
    let block = m.agents[agent].block;
    let result = s.results.first().map(|r| m.kernel.ty(*r));
    let ints = |f: &dyn Fn(usize) -> i64| Data::I((0..threads).map(f).collect());
    let data = match word {
        H::Roles(_) => return Err("is chosen, not run".to_owned()),
        H::FenceMbarInit | H::WgmmaFence | H::PdlWait | H::PdlTrigger => return Ok(Progress::Done),
        H::FenceProxyAsync => {
            let first = m.agents[agent].first_thread;
            let active = m.active(agent);
            m.memory.fence(block, |t| t >= first && active.contains(&(t - first)));
            return Ok(Progress::Done);
        }
        H::GroupId => {
            let id = m.agents[agent].first_thread / GROUP - m.pending(agent).first_group;
            ints(&|_| id as i64)
        }
        H::GroupThread => ints(&|t| t as i64),
        H::Elect => Data::B((0..threads).map(|t| t == 0).collect()),
        H::ClusterRank => ints(&|_| block as i64),
        H::ClusterId => {
            let id = m.block_ids[block][0] / m.kernel.launch.cluster[0];
            ints(&|_| i64::from(id))
        }
        H::ClusterCount => {
            let n = m.grid[0] / m.kernel.launch.cluster[0];
            ints(&|_| i64::from(n))
        }
        H::MbarInit { .. } | H::MbarExpect { .. } | H::MbarArrive | H::MbarWait => return barrier(m, agent, word, s),
        H::TmaLoad { map, multicast } => {
            let blocks: Vec<usize> = if *multicast == 0 { vec![block] } else { (0..16).filter(|r| multicast >> r & 1 == 1).collect() };
            let thread = m.only_thread(agent)?;
            let coords = m.thread_values(agent, &s.args[2..], thread)?;
            let at = m.shared_byte(agent, s.bufs[0], m.value(agent, s.args[0])?.int(thread), 0)?;
            let barrier = m.shared_byte(agent, s.bufs[1], m.value(agent, s.args[1])?.int(thread), 1)?;
            let copy = Copy { map: usize::from(*map), coords, blocks, at, barrier: Some(barrier) };
            m.tma(&copy, Direction::Spoil)?;
            m.words.loads.push(copy);
            return Ok(Progress::Done);
        }
        H::TmaStore { map } => {
            let thread = m.only_thread(agent)?;
            let coords = m.thread_values(agent, &s.args[1..], thread)?;
            let at = m.shared_byte(agent, s.bufs[0], m.value(agent, s.args[0])?.int(thread), 0)?;
            let p = m.pending(agent);
            p.stores.push(Copy { map: usize::from(*map), coords, blocks: vec![block], at, barrier: None });
            p.store_open += 1;
            return Ok(Progress::Done);
        }
        H::BulkCommit => {
            let p = m.pending(agent);
            let n = std::mem::take(&mut p.store_open);
            p.store_groups.push(n);
            return Ok(Progress::Done);
        }
        H::BulkWait { pending, .. } => {
            while m.pending(agent).store_groups.len() > usize::from(*pending) {
                let n = m.pending(agent).store_groups.remove(0);
                for _ in 0..n {
                    m.finish_store(agent)?;
                }
            }
            return Ok(Progress::Done);
        }
        H::Wgmma { n, k, zero, major, a_panel, b_panel } => {
            m.whole_group(agent)?;
            let from_registers = s.bufs.len() == 1;
            let dtype = m.kernel.buf(s.bufs[0]).dtype;
            let a =
                if from_registers { Err(m.value(agent, s.args[0])?.clone()) } else { Ok(m.shared_byte(agent, s.bufs[0], m.uniform(agent, s.args[0])?, 0)?) };
            let b = m.shared_byte(agent, s.bufs[s.bufs.len() - 1], m.uniform(agent, s.args[1])?, 0)?;
            let acc = if *zero { None } else { Some(m.value(agent, s.args[2])?.clone()) };
            let token = m.words.next_token;
            m.words.next_token += 1;
            let panels = [*a_panel as usize * 2, *b_panel as usize * 2];
            let p = m.pending(agent);
            p.products.push(Product { token, n: usize::from(*n), k: usize::from(*k), major: *major, panels, dtype, a, b, acc });
            p.open += 1;
            Data::F(vec![f64::from_bits(TOKEN | token); threads * usize::from(*n) / 2])
        }
        H::WgmmaCommit => {
            let p = m.pending(agent);
            let n = std::mem::take(&mut p.open);
            p.groups.push(n);
            return Ok(Progress::Done);
        }
        H::WgmmaWait { pending } => {
            m.whole_group(agent)?;
            while m.pending(agent).groups.len() > usize::from(*pending) {
                let n = m.pending(agent).groups.remove(0);
                for _ in 0..n {
                    let product = m.pending(agent).products.remove(0);
                    let done = m.multiply(block, &product)?;
                    m.words.results.insert(product.token, done);
                }
            }
            for (r, a) in s.results.iter().zip(&s.args) {
                let v = m.value(agent, *a)?.clone();
                let v = m.resolved(&v)?;
                m.set(agent, *r, v);
            }
            return Ok(Progress::Done);
        }
        H::NamedSync { threads } => return meet(m, agent, block, m.uniform(agent, s.args[0])?, usize::from(*threads), true),
        H::NamedArrive { threads } => return meet(m, agent, block, m.uniform(agent, s.args[0])?, usize::from(*threads), false),
        H::ClusterSync => {
            let all = m.agents.iter().map(|a| a.threads).sum();
            return meet(m, agent, usize::MAX, 0, all, true);
        }
        H::StMatrix { panel, col } => {
            m.whole_group(agent)?;
            let ty = m.kernel.ty(s.args[1]);
            let (v, base) = (m.value(agent, s.args[1])?.clone(), m.shared_byte(agent, s.bufs[0], m.uniform(agent, s.args[0])?, 0)?);
            for t in 0..threads {
                for i in 0..ty.lanes() {
                    let c = usize::from(*col) + acc_col(t, i);
                    let at = swizzle(base + c / 64 * *panel as usize * 2 + acc_row(t, i) * 128 + c % 64 * 2, 128);
                    m.memory.write_shared(block, at, ty.dtype(), v.get(t * ty.lanes() + i, ty.dtype()), Some(m.agents[agent].first_thread + t))?;
                }
            }
            return Ok(Progress::Done);
        }
        H::AccRows | H::AccCols => {
            let ty = result.ok_or("needs a result")?;
            let place = if matches!(word, H::AccRows) { acc_row } else { acc_col };
            Data::build(ty, threads, |t, i| Ok(Scalar::I(place(t, i) as i128)))?
        }
        H::RowReduce { with, quad } => {
            let (v, lanes) = (m.value(agent, s.args[0])?.clone(), m.kernel.ty(s.args[0]).lanes());
            let fold = |a: f64, b: f64| with.scalar().eval(DType::F32, &[Scalar::F(a), Scalar::F(b)]).f();
            let mut rows: Vec<f64> = vec![];
            for t in 0..threads {
                for h in 0..2 {
                    let mine = (0..lanes).filter(|i| i / 2 % 2 == h).map(|i| v.float(t * lanes + i));
                    rows.push(mine.reduce(fold).ok_or("of no registers")?);
                }
            }
            for lane in if *quad { &[1usize, 2][..] } else { &[] } {
                rows = (0..rows.len()).map(|i| fold(rows[i], rows[((i / 2) ^ lane) * 2 + i % 2])).collect();
            }
            Data::F(rows)
        }
        H::RowSpread => {
            let (v, d, ty) = (m.value(agent, s.args[0])?, m.kernel.ty(s.args[0]).dtype(), result.ok_or("needs a result")?);
            Data::build(ty, threads, |t, i| Ok(v.get(t * 2 + i / 2 % 2, d)))?
        }
        H::AccLoad { vary, .. } => {
            let ty = result.ok_or("needs a result")?;
            let at: Vec<Data> = s.args.iter().map(|a| m.value(agent, *a).cloned()).collect::<Result<_, _>>()?;
            let mut out = Data::zeros(ty.dtype(), threads * ty.lanes());
            for t in m.active(agent) {
                for i in 0..ty.lanes() {
                    if let Some(index) = element(&at, t, i, *vary) {
                        let place = m.locate(agent, s.bufs[0], index, 1, t)?;
                        out.put(t * ty.lanes() + i, m.memory.read(place, ty.dtype(), 0));
                    }
                }
            }
            out
        }
        H::AccStore { .. } => {
            let ty = m.kernel.ty(s.args[0]);
            let v = m.value(agent, s.args[0])?.clone();
            let at: Vec<Data> = s.args[1..].iter().map(|a| m.value(agent, *a).cloned()).collect::<Result<_, _>>()?;
            for t in m.active(agent) {
                for i in 0..ty.lanes() {
                    if let Some(index) = element(&at, t, i, Vary::Both) {
                        let place = m.locate(agent, s.bufs[0], index, 1, t)?;
                        m.memory.write(place, ty.dtype(), 0, v.get(t * ty.lanes() + i, ty.dtype()));
                    }
                }
            }
            return Ok(Progress::Done);
        }
        H::Ex2 | H::Rcp => {
            let v = m.value(agent, s.args[0])?;
            let n = threads * m.kernel.ty(s.args[0]).lanes();
            let f = |x: f64| if matches!(word, H::Ex2) { x.exp2() } else { 1.0 / x };
            Data::F((0..n).map(|i| f64::from(f(v.float(i)) as f32)).collect())
        }
    };
    if let Some(r) = s.results.first() {
        m.set(agent, *r, data);
    }
    Ok(Progress::Done)
}

/// Element index of register `i` of thread `t`, `None` outside the matrix. `at`: base, row, col, rows, cols, stride.
fn element(at: &[Data], t: usize, i: usize, vary: Vary) -> Option<i64> {
    let [base, row, col, rows, cols, stride] = [0, 1, 2, 3, 4, 5].map(|k| at[k].int(t));
    let (r, c) = (row + acc_row(t, i) as i64, col + acc_col(t, i) as i64);
    let inside = match vary {
        Vary::Both => r < rows && c < cols,
        Vary::Cols => c < cols,
        Vary::Rows => r < rows,
    };
    inside.then_some(match vary {
        Vary::Both => base + r * stride + c,
        Vary::Cols => base + c,
        Vary::Rows => base + r,
    })
}

/// Where a byte of a tile is under a swizzle of this span.
fn swizzle(at: usize, span: u16) -> usize {
    match span {
        128 => at ^ (at >> 7 & 7) << 4,
        64 => at ^ (at >> 7 & 3) << 4,
        32 => at ^ (at >> 7 & 1) << 4,
        _ => at,
    }
}

fn barrier(m: &mut Machine<'_>, agent: usize, word: &H, s: &Stmt) -> Result<Progress, String> {
    let block = m.agents[agent].block;
    let index = m.value(agent, s.args[0])?.clone();
    let other = s.args.get(1).map(|a| m.value(agent, *a).cloned()).transpose()?;
    let active = m.active(agent);
    if matches!(word, H::MbarWait) {
        // All or none: the threads move in step.
        for t in &active {
            let at = m.shared_byte(agent, s.bufs[0], index.int(*t), 1)?;
            let b = m.words.barriers.get(&(block, at)).ok_or("the barrier is not set up")?;
            if b.phase % 2 == other.as_ref().map_or(0, |p| p.int(*t)) {
                return Ok(Progress::Wait);
            }
        }
        return Ok(Progress::Done);
    }
    for t in active {
        let at = m.shared_byte(agent, s.bufs[0], index.int(t), 1)?;
        let target = match (&other, word) {
            (Some(rank), H::MbarArrive) => rank.int(t) as usize,
            _ => block,
        };
        if let H::MbarInit { count } = word {
            m.words.barriers.insert((target, at), Barrier { count: i64::from(*count), pending: i64::from(*count), bytes: 0, phase: 0 });
            continue;
        }
        let b = m.words.barriers.get_mut(&(target, at)).ok_or("the barrier is not set up")?;
        if let H::MbarExpect { bytes } = word {
            b.bytes += i64::from(*bytes);
        }
        b.pending -= 1;
        if b.pending < 0 {
            return Err("more arrivals than the barrier counts in a phase".to_owned());
        }
        b.settle();
    }
    Ok(Progress::Done)
}

/// Count the agent's threads at a barrier of `expect` threads; wait for the others if it is to.
fn meet(m: &mut Machine<'_>, agent: usize, block: usize, id: i64, expect: usize, wait: bool) -> Result<Progress, String> {
    m.whole_warps(agent)?;
    let waits_since = m.pending(agent).meeting;
    let threads = m.active(agent).len();
    let meeting = m.words.meetings.entry((block, id)).or_default();
    if let Some(round) = waits_since {
        if meeting.round == round {
            return Ok(Progress::Wait);
        }
        m.pending(agent).meeting = None;
        return Ok(Progress::Done);
    }
    meeting.arrived += threads;
    let round = meeting.round;
    if meeting.arrived > expect {
        return Err(format!("{} threads at barrier {id}, which is for {expect}", meeting.arrived));
    }
    if meeting.arrived == expect {
        *meeting = Meeting { arrived: 0, round: round + 1 };
        return Ok(Progress::Done);
    }
    if !wait {
        return Ok(Progress::Done);
    }
    m.pending(agent).meeting = Some(round);
    Ok(Progress::Wait)
}

/// What a TMA copy does to shared memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    /// Fill the destination with NaN.
    Spoil,
    /// Global to shared.
    Load,
    /// Shared to global.
    Store,
}

impl Machine<'_> {
    fn pending(&mut self, agent: usize) -> &mut Pending {
        self.words.agents.entry(agent).or_default()
    }

    fn whole_group(&self, agent: usize) -> Result<(), String> {
        let a = &self.agents[agent];
        if a.threads == GROUP && !a.mask.contains(&false) { Ok(()) } else { Err("needs all threads of a warpgroup".to_owned()) }
    }

    fn only_thread(&self, agent: usize) -> Result<usize, String> {
        match self.active(agent)[..] {
            [t] => Ok(t),
            ref many => Err(format!("is for one thread, {} execute it", many.len())),
        }
    }

    fn thread_values(&self, agent: usize, vals: &[crate::tile::Val], thread: usize) -> Result<Vec<i64>, String> {
        vals.iter().map(|v| Ok(self.value(agent, *v)?.int(thread))).collect()
    }

    /// Byte in shared memory of an element; `n` elements of it must be inside the buffer.
    fn shared_byte(&self, agent: usize, buf: Buf, index: i64, n: usize) -> Result<usize, String> {
        if self.kernel.buf(buf).space != Space::Shared {
            return Err(format!("{buf} is not in shared memory"));
        }
        Ok(self.locate(agent, buf, index, n, 0)?.byte())
    }

    /// Land a random load, if one is in flight; whether there was one.
    pub(super) fn land(&mut self, random: u64) -> Result<bool, String> {
        if self.words.loads.is_empty() {
            return Ok(false);
        }
        let copy = self.words.loads.swap_remove(random as usize % self.words.loads.len());
        self.tma(&copy, Direction::Load)?;
        let bytes = self.box_bytes(copy.map)?;
        for block in &copy.blocks {
            let at = copy.barrier.ok_or("a load has a barrier")?;
            let b = self.words.barriers.get_mut(&(*block, at)).ok_or("the barrier of a load is not set up")?;
            b.bytes -= bytes as i64;
            b.settle();
        }
        Ok(true)
    }

    /// At the end of the kernel: what was begun is done.
    pub(super) fn all_done(&self) -> Result<(), String> {
        if !self.words.loads.is_empty() {
            return Err("loads are in flight when the kernel ends".to_owned());
        }
        if self.copies_pending() {
            return Err("asynchronous copies are in flight when the kernel ends".to_owned());
        }
        match self.words.agents.values().find(|p| !p.stores.is_empty() || !p.products.is_empty()) {
            Some(p) => Err(format!("{} stores and {} products are in flight when the kernel ends", p.stores.len(), p.products.len())),
            None => Ok(()),
        }
    }

    fn finish_store(&mut self, agent: usize) -> Result<(), String> {
        let copy = self.pending(agent).stores.remove(0);
        self.tma(&copy, Direction::Store)
    }

    fn tensor_map(&self, i: usize) -> Result<&crate::tile::hopper::TensorMap, String> {
        self.kernel.maps.get(i).ok_or_else(|| format!("there is no tensor map {i}"))
    }

    fn box_bytes(&self, map: usize) -> Result<usize, String> {
        let map = self.tensor_map(map)?;
        Ok(map.box_len() as usize * self.kernel.buf(map.arg).dtype.bytes(1))
    }

    fn tma(&mut self, copy: &Copy, direction: Direction) -> Result<(), String> {
        let map = self.tensor_map(copy.map)?.clone();
        let dtype = self.kernel.buf(map.arg).dtype;
        let sizes = |atom: &Atom| match atom {
            Atom::Sym(s) => s.name.strip_prefix('d').and_then(|n| n.parse::<usize>().ok()).and_then(|i| self.dims.get(i).copied()),
            _ => None,
        };
        let size = |d: &Dim| d.eval(&sizes).ok_or_else(|| format!("{d} has no value"));
        let dims: Vec<i64> = map.dims.iter().map(size).collect::<Result<_, _>>()?;
        let strides: Vec<i64> = map.strides.iter().map(size).collect::<Result<_, _>>()?;
        let first = size(&map.offset)?;
        if copy.coords.len() != dims.len() {
            return Err(format!("{} coordinates for a map of {} dimensions", copy.coords.len(), dims.len()));
        }
        let width = dtype.bytes(1);
        for i in 0..map.box_len() as usize {
            let (mut rest, mut global, mut inside) = (i, first, true);
            for (axis, len) in map.boxes.iter().enumerate() {
                let c = copy.coords[axis] + (rest % *len as usize) as i64;
                rest /= *len as usize;
                inside &= c >= 0 && c < dims[axis];
                global += c * if axis == 0 { 1 } else { strides[axis - 1] };
            }
            let at = swizzle(copy.at + i * width, map.swizzle);
            match direction {
                Direction::Store => {
                    let v = self.memory.read_async(copy.blocks[0], at, dtype)?;
                    if inside {
                        let place = self.memory.locate(self.kernel, map.arg, global, 1, copy.blocks[0], 0)?;
                        self.memory.write(place, dtype, 0, v);
                    }
                }
                Direction::Spoil | Direction::Load => {
                    let v = if direction == Direction::Spoil {
                        Scalar::F(f64::NAN)
                    } else if inside {
                        let place = self.memory.locate(self.kernel, map.arg, global, 1, copy.blocks[0], 0)?;
                        self.memory.read(place, dtype, 0)
                    } else {
                        Scalar::F(0.0).cast(dtype)
                    };
                    for block in &copy.blocks {
                        self.memory.write_shared(*block, at, dtype, v, None)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A value whose product, if it is one in flight, is done.
    fn resolved(&self, v: &Data) -> Result<Data, String> {
        let Data::F(lanes) = v else { return Ok(v.clone()) };
        match lanes.first().map(|x| x.to_bits()) {
            Some(bits) if bits & TOKEN == TOKEN && bits >> 48 == TOKEN >> 48 => {
                self.words.results.get(&(bits & !TOKEN)).cloned().ok_or_else(|| "the accumulator is of a product that may still be in flight".to_owned())
            }
            _ => Ok(v.clone()),
        }
    }

    fn multiply(&self, block: usize, p: &Product) -> Result<Data, String> {
        let mut a = vec![0f64; 64 * p.k];
        match &p.a {
            Ok(base) => {
                for r in 0..64 {
                    for c in 0..p.k {
                        let at = swizzle(base + c / 64 * p.panels[0] + r * 128 + c % 64 * 2, 128);
                        a[r * p.k + c] = self.memory.read_async(block, at, p.dtype)?.f();
                    }
                }
            }
            Err(regs) => {
                for t in 0..GROUP {
                    for i in 0..p.k / 2 {
                        a[acc_row(t, i) * p.k + acc_col(t, i)] = regs.float(t * p.k / 2 + i);
                    }
                }
            }
        }
        let mut b = vec![0f64; p.k * p.n];
        for kk in 0..p.k {
            for c in 0..p.n {
                let at = match p.major {
                    Major::K => p.b + kk / 64 * p.panels[1] + c * 128 + kk % 64 * 2,
                    Major::Mn => p.b + c / 64 * p.panels[1] + kk * 128 + c % 64 * 2,
                };
                b[kk * p.n + c] = self.memory.read_async(block, swizzle(at, 128), p.dtype)?.f();
            }
        }
        let regs = p.n / 2;
        let mut acc = match &p.acc {
            Some(v) => self.resolved(v)?,
            None => Data::zeros(DType::F32, GROUP * regs),
        };
        let Data::F(acc_lanes) = &mut acc else { return Err("accumulates floats".to_owned()) };
        for t in 0..GROUP {
            for i in 0..regs {
                let (r, c) = (acc_row(t, i), acc_col(t, i));
                let sum = &mut acc_lanes[t * regs + i];
                // Sixteen products at a time are summed exactly enough, then rounded with the accumulator.
                for from in (0..p.k).step_by(16) {
                    let part: f64 = (from..from + 16).map(|kk| a[r * p.k + kk] * b[kk * p.n + c]).sum();
                    *sum = f64::from((*sum + part) as f32);
                }
            }
        }
        Ok(acc)
    }
}
