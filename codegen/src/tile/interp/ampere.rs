//! Ampere words. An asynchronous copy fills its destination with NaN (integers with ones) when it is issued and with data at the
//! wait that proves it done, so that what is read too early, or written over too early, gives wrong results.
use super::memory::Place;
use super::{Data, Machine, Progress};
use crate::tile::mma::{MmaWord as M, strip_col, strip_row};
use crate::tile::{Buf, Space, Stmt, Val};
use pavage_ir::{DType, Scalar};

/// One thread's copy of a few elements.
struct Copy {
    to: Place,
    from: Option<Place>,
    n: usize,
    dtype: DType,
}

/// Copies of one agent that are in flight.
#[derive(Default)]
pub(super) struct Copies {
    issued: Vec<Copy>,
    /// Copies in each committed group, oldest first.
    groups: Vec<usize>,
    open: usize,
}

/// Run an Ampere word.
pub(super) fn run(m: &mut Machine<'_>, agent: usize, word: &M, s: &Stmt) -> Result<Progress, String> {
    let threads = m.agents[agent].threads;
    let data = match word {
        M::CpAsync { n, offset } => {
            let n = usize::from(*n);
            let dtype = m.kernel.buf(s.bufs[0]).dtype;
            let [to, from, inside] = [0, 1, 2].map(|i| m.value(agent, s.args[i]).cloned());
            let (to, from, inside) = (to?, from?, inside?);
            for t in m.active(agent) {
                let to = aligned(m, agent, s.bufs[0], to.int(t) + offset, n, t)?;
                let from = if inside.bool(t) { Some(aligned(m, agent, s.bufs[1], from.int(t), n, t)?) } else { None };
                for i in 0..n {
                    m.memory.write(to, dtype, i, if dtype.is_float() { Scalar::F(f64::NAN).cast(dtype) } else { Scalar::I(1) });
                }
                let c = m.copies(agent);
                c.issued.push(Copy { to, from, n, dtype });
                c.open += 1;
            }
            return Ok(Progress::Done);
        }
        M::CpAsyncCommit => {
            whole(m, agent)?;
            let c = m.copies(agent);
            let n = std::mem::take(&mut c.open);
            c.groups.push(n);
            return Ok(Progress::Done);
        }
        M::CpAsyncWait { pending } => {
            whole(m, agent)?;
            while m.copies(agent).groups.len() > usize::from(*pending) {
                let n = m.copies(agent).groups.remove(0);
                let done: Vec<Copy> = m.copies(agent).issued.drain(..n).collect();
                for c in done {
                    for i in 0..c.n {
                        let v = c.from.map_or(Scalar::F(0.0).cast(c.dtype), |p| m.memory.read(p, c.dtype, i));
                        m.memory.write(c.to, c.dtype, i, v);
                    }
                }
            }
            return Ok(Progress::Done);
        }
        M::LdMatrix { trans, offset } => {
            m.whole_warps(agent)?;
            let dtype = m.kernel.buf(s.bufs[0]).dtype;
            let index = m.value(agent, s.args[0])?.clone();
            if dtype.bits() == 8 {
                let mut out = Data::zeros(DType::I32, threads * 4);
                for t in m.active(agent) {
                    for i in 0..4 {
                        let holder = t / 32 * 32 + 8 * i + t % 32 / 4;
                        let place = aligned(m, agent, s.bufs[0], index.int(holder) + offset, 16, t)?;
                        let bytes = [0, 1, 2, 3].map(|k| m.memory.read(place, dtype, 4 * (t % 4) + k).i() as u8);
                        out.put(t * 4 + i, Scalar::I(i128::from(i32::from_le_bytes(bytes))));
                    }
                }
                m.set(agent, s.results[0], out);
                return Ok(Progress::Done);
            }
            let mut out = Data::zeros(dtype, threads * 8);
            for t in m.active(agent) {
                for i in 0..8 {
                    let (row, col) = (t % 32 / 4, 2 * (t % 4) + i % 2);
                    let (row, col) = if *trans { (col, row) } else { (row, col) };
                    let holder = t / 32 * 32 + 8 * (i / 2) + row;
                    let place = aligned(m, agent, s.bufs[0], index.int(holder) + offset, 8, t)?;
                    out.put(t * 8 + i, m.memory.read(place, dtype, col));
                }
            }
            out
        }
        M::Mma => {
            m.whole_warps(agent)?;
            multiply(m, agent, &s.args)?
        }
        M::MmaBytes { a, b } => {
            m.whole_warps(agent)?;
            multiply_bytes(m, agent, &s.args, [*a, *b])?
        }
    };
    if let Some(r) = s.results.first() {
        m.set(agent, *r, data);
    }
    Ok(Progress::Done)
}

fn whole(m: &Machine<'_>, agent: usize) -> Result<(), String> {
    if m.agents[agent].mask.contains(&false) { Err("only some threads take part".to_owned()) } else { Ok(()) }
}

/// The place of `n` elements, which must lie at a multiple of their bytes.
fn aligned(m: &Machine<'_>, agent: usize, buf: Buf, index: i64, n: usize, thread: usize) -> Result<Place, String> {
    let place = m.locate(agent, buf, index, n, thread)?;
    let bytes = m.kernel.buf(buf).dtype.bytes(n);
    // Arguments begin at multiples of 256 bytes.
    let at = if m.kernel.buf(buf).space == Space::Global { m.kernel.buf(buf).dtype.bytes(1) * index as usize } else { place.byte() };
    if at.is_multiple_of(bytes) { Ok(place) } else { Err(format!("element {index} of {buf} is not at a multiple of {bytes} bytes")) }
}

/// Element `(row, col)` of the 8 x 8 matrix `matrix` of a fragment of 8, for the warp that begins at thread `first`.
fn element(frag: &Data, first: usize, matrix: usize, row: usize, col: usize) -> f64 {
    frag.float((first + 4 * row + col / 2) * 8 + 2 * matrix + col % 2)
}

fn multiply(m: &Machine<'_>, agent: usize, args: &[Val]) -> Result<Data, String> {
    let regs = m.kernel.ty(args[0]).lanes();
    let (mut acc, a) = (m.value(agent, args[0])?.clone(), m.value(agent, args[1])?);
    let b: Vec<&Data> = args[2..].iter().map(|b| m.value(agent, *b)).collect::<Result<_, _>>()?;
    let Data::F(sums) = &mut acc else { return Err("accumulates floats".to_owned()) };
    for t in m.active(agent) {
        let first = t / 32 * 32;
        for i in 0..regs {
            let (row, col) = (strip_row(t % 32, i), strip_col(t % 32, i));
            let part: f64 = (0..16)
                .map(|k| {
                    let x = element(a, first, row / 8 + 2 * (k / 8), row % 8, k % 8);
                    x * element(b[col / 16], first, k / 8 + 2 * (col / 8 % 2), col % 8, k % 8)
                })
                .sum();
            let sum = &mut sums[t * regs + i];
            *sum = f64::from((*sum + part) as f32);
        }
    }
    Ok(acc)
}

/// Element `k` of row `row` of the matrices `matrix` and, from 16 on, `matrix + apart` of a fragment of bytes.
fn byte(frag: &Data, dtype: DType, first: usize, matrix: usize, apart: usize, row: usize, k: usize) -> i64 {
    let word = frag.int((first + 4 * row + k % 16 / 4) * 4 + matrix + k / 16 * apart) as i32;
    let byte = word.to_le_bytes()[k % 4];
    if dtype == DType::I8 { i64::from(byte.cast_signed()) } else { i64::from(byte) }
}

fn multiply_bytes(m: &Machine<'_>, agent: usize, args: &[Val], [of_a, of_b]: [DType; 2]) -> Result<Data, String> {
    let regs = m.kernel.ty(args[0]).lanes();
    let (mut acc, a) = (m.value(agent, args[0])?.clone(), m.value(agent, args[1])?);
    let b: Vec<&Data> = args[2..].iter().map(|b| m.value(agent, *b)).collect::<Result<_, _>>()?;
    let Data::I(sums) = &mut acc else { return Err("accumulates integers".to_owned()) };
    for t in m.active(agent) {
        let first = t / 32 * 32;
        for i in 0..regs {
            let (row, col) = (strip_row(t % 32, i), strip_col(t % 32, i));
            let part: i64 =
                (0..32).map(|k| byte(a, of_a, first, row / 8, 2, row % 8, k) * byte(b[col / 16], of_b, first, 2 * (col / 8 % 2), 1, col % 8, k)).sum();
            let sum = &mut sums[t * regs + i];
            *sum = i64::from((*sum + part) as i32);
        }
    }
    Ok(acc)
}

impl Machine<'_> {
    fn copies(&mut self, agent: usize) -> &mut Copies {
        self.words.copies.entry(agent).or_default()
    }

    /// Whether copies are in flight.
    pub(super) fn copies_pending(&self) -> bool {
        self.words.copies.values().any(|c| !c.issued.is_empty())
    }
}
