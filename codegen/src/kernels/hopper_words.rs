//! Writing Hopper words: the vocabulary that `hopper_gemm` and `flash` share.
use crate::tile::hopper::{HopperWord as H, Major, Vary};
use crate::tile::op::ReduceFn;
use crate::tile::{Block, Buf, Builder, Op, Ty, Val};
use pavage_ir::{DType, Scalar};

/// Elements of a panel row: 128 bytes of 16-bit elements.
pub(crate) const PANEL: u64 = 64;

pub(crate) fn does(b: &mut Builder, w: H, args: &[Val], bufs: &[Buf]) {
    b.word(Op::Hopper(w), args, bufs, vec![], &[]);
}

pub(crate) fn gives(b: &mut Builder, w: H, args: &[Val], bufs: &[Buf], ty: Ty) -> Val {
    b.word(Op::Hopper(w), args, bufs, vec![], &[ty])[0]
}

/// A stage of a ring of buffers: index and parity of the round.
#[derive(Clone, Copy)]
pub(crate) struct Stage {
    pub(crate) index: Val,
    pub(crate) parity: Val,
}

impl Stage {
    /// The first stage of the first round.
    pub(crate) fn start(b: &mut Builder) -> Stage {
        let zero = b.index(0);
        Stage { index: zero, parity: zero }
    }

    pub(crate) fn of(v: &[Val]) -> Stage {
        Stage { index: v[0], parity: v[1] }
    }

    pub(crate) fn vals(self) -> [Val; 2] {
        [self.index, self.parity]
    }

    /// The stage after this one in a ring of `count`.
    pub(crate) fn next(self, b: &mut Builder, count: i64) -> Stage {
        let one = b.add_i(self.index, 1);
        let end = b.index(count);
        let wrap = b.eq(one, end);
        let zero = b.index(0);
        let flipped = self.flipped(b);
        Stage { index: b.select(wrap, zero, one), parity: b.select(wrap, flipped, self.parity) }
    }

    /// The other parity.
    pub(crate) fn flipped(self, b: &mut Builder) -> Val {
        flip(b, self.parity)
    }
}

/// The other parity.
pub(crate) fn flip(b: &mut Builder, parity: Val) -> Val {
    let one = b.index(1);
    b.xor(parity, one)
}

pub(crate) fn wait(b: &mut Builder, bars: Buf, i: Val, parity: Val) {
    does(b, H::MbarWait, &[i, parity], &[bars]);
}

pub(crate) fn expect(b: &mut Builder, bars: Buf, i: Val, bytes: u64) {
    does(b, H::MbarExpect { bytes: bytes as u32 }, &[i], &[bars]);
}

/// Set up barriers `0..n`, each for `count` arrivals a phase. One thread does it.
pub(crate) fn init(b: &mut Builder, bars: Buf, n: i64, count: u32) {
    for i in 0..n {
        let i = b.index(i);
        does(b, H::MbarInit { count }, &[i], &[bars]);
    }
}

/// One role's block.
pub(crate) fn role(b: &mut Builder, body: impl FnOnce(&mut Builder)) -> Block {
    b.block(&[], |b, _| {
        body(b);
        vec![]
    })
}

pub(crate) fn named_sync(b: &mut Builder, id: Val, threads: u16) {
    does(b, H::NamedSync { threads }, &[id], &[]);
}

/// A 64 x n accumulator's type.
pub(crate) fn acc_ty(n: u64) -> Ty {
    Ty::Frag(DType::F32, (n / 2) as u16)
}

pub(crate) fn zeros(b: &mut Builder, ty: Ty) -> Val {
    b.constant_of(Scalar::F(0.0), ty)
}

/// Wait for all but `pending` groups of products; `accs` are then complete.
pub(crate) fn wgmma_wait(b: &mut Builder, pending: u8, accs: &[Val]) -> Vec<Val> {
    let types: Vec<Ty> = accs.iter().map(|a| b.ty(*a)).collect();
    b.word(Op::Hopper(H::WgmmaWait { pending }), accs, &[], vec![], &types)
}

/// How the second operand lies.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub(crate) buf: Buf,
    pub(crate) index: Val,
    /// Elements from panel to panel.
    pub(crate) panel: u64,
}

/// `acc + a * b` with both operands in shared memory.
pub(crate) fn wgmma(b: &mut Builder, a: Operand, rhs: Operand, major: Major, k: u64, n: u64, acc: Option<Val>) -> Val {
    let word = H::Wgmma { n: n as u16, k: k as u16, zero: acc.is_none(), major, a_panel: a.panel as u32, b_panel: rhs.panel as u32 };
    let args: Vec<Val> = [a.index, rhs.index].into_iter().chain(acc).collect();
    gives(b, word, &args, &[a.buf, rhs.buf], acc_ty(n))
}

/// `acc + a * b` with `a` a fragment of 16-bit elements.
pub(crate) fn wgmma_frag(b: &mut Builder, a: Val, rhs: Operand, major: Major, k: u64, n: u64, acc: Val) -> Val {
    let word = H::Wgmma { n: n as u16, k: k as u16, zero: false, major, a_panel: 0, b_panel: rhs.panel as u32 };
    gives(b, word, &[a, rhs.index, acc], &[rhs.buf], acc_ty(n))
}

/// Columns `from..from + len` of an accumulator.
pub(crate) fn columns(b: &mut Builder, acc: Val, from: u64, len: u64) -> Val {
    let d = b.ty(acc).dtype();
    let lanes: Vec<Val> = (from / 2..(from + len) / 2).map(|i| b.extract(acc, i as usize)).collect();
    b.pack(&lanes, Ty::Frag(d, (len / 2) as u16))
}

pub(crate) fn row_reduce(b: &mut Builder, with: ReduceFn, quad: bool, acc: Val) -> Val {
    gives(b, H::RowReduce { with, quad }, &[acc], &[], Ty::Frag(DType::F32, 2))
}

/// A row fragment's values in every column of `like`.
pub(crate) fn spread(b: &mut Builder, rows: Val, like: Ty) -> Val {
    let d = b.ty(rows).dtype();
    gives(b, H::RowSpread, &[rows], &[], like.with(d))
}

pub(crate) fn ex2(b: &mut Builder, x: Val) -> Val {
    let ty = b.ty(x);
    gives(b, H::Ex2, &[x], &[], ty)
}

/// Where a fragment lies in a matrix in global memory.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// Element index of the matrix.
    pub(crate) base: Val,
    /// Row of the fragment's first element.
    pub(crate) row: Val,
    /// Its column.
    pub(crate) col: Val,
    /// Rows of the matrix.
    pub(crate) rows: Val,
    /// Columns of the matrix.
    pub(crate) cols: Val,
    /// Elements from row to row.
    pub(crate) stride: Val,
}

impl Place {
    fn args(self) -> [Val; 6] {
        [self.base, self.row, self.col, self.rows, self.cols, self.stride]
    }
}

pub(crate) fn acc_load(b: &mut Builder, buf: Buf, place: Place, vary: Vary, pairs: bool, lanes: u16) -> Val {
    let d = b.dtype(buf);
    gives(b, H::AccLoad { vary, pairs }, &place.args(), &[buf], Ty::Frag(d, lanes))
}

pub(crate) fn acc_store(b: &mut Builder, buf: Buf, v: Val, place: Place, pairs: bool) {
    let args: Vec<Val> = [v].into_iter().chain(place.args()).collect();
    does(b, H::AccStore { pairs }, &args, &[buf]);
}
