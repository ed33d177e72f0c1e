//! Ampere matrix words (sm_80): warp matrix products, matrix loads and asynchronous copies.
//!
//! Words marked (warp) are executed by all 32 threads of a warp together. Fragments, with `t` the thread of the warp:
//!
//! - an *accumulator strip* is a `Frag(f32, n / 2)`: 16 rows of `n` columns; register `i` holds row `t / 4 + 8 * (i / 2 % 2)`
//!   and column `8 * (i / 4) + 2 * (t % 4) + i % 2`, as in [`super::hopper`] but for one warp ([`strip_row`], [`strip_col`]);
//! - what `ldmatrix` gives is a `Frag(_, 8)`: two registers of each of four 8 x 8 matrices, register `i` of matrix `i / 2`
//!   holding row `t / 4` and column `2 * (t % 4) + i % 2` of it, or the element across the diagonal when `trans`;
//! - what it gives of bytes is a `Frag(i32, 4)`: register `i` holds elements `4 * (t % 4)` to `+ 3` of row `t / 4` of a matrix of
//!   8 rows of 16, the first in its low bits;
//! - as first operand of `mma` the four matrices are rows 0..8 and 8..16 of k 0..8, then both of k 8..16; as second operand
//!   they are k 0..8 and 8..16 of columns 0..8, then both of columns 8..16, each matrix held as its columns. Of bytes, k
//!   counts double.
use super::{BufInfo, Space, Ty};
use pavage_ir::DType;
use std::collections::BTreeMap;

/// An operation of sm_80, with its attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MmaWord {
    /// Start copying elements from global to shared memory, or filling with zeros. bufs: destination, source. args: element
    /// index of the destination, of the source, whether to copy (bool; where false nothing is read). Both places are aligned
    /// to the bytes moved.
    CpAsync {
        /// Elements of one thread: 4, 8 or 16 bytes.
        n: u8,
        /// Constant part of the destination's element index.
        offset: i64,
    },
    /// Close the group of asynchronous copies issued so far by this thread.
    CpAsyncCommit,
    /// Wait until at most `pending` groups of this thread are in flight.
    CpAsyncWait {
        /// Groups that may still be in flight.
        pending: u8,
    },
    /// Load four 8 x 8 matrices of 16-bit elements, or of 8 rows of 16 bytes (warp). bufs: shared tile. args: element index,
    /// thread `8 * j + r` that of row `r` of matrix `j`, a multiple of a row.
    LdMatrix {
        /// Each thread gets the elements across the diagonal; not of bytes.
        trans: bool,
        /// Constant part of the element index.
        offset: i64,
    },
    /// `acc + a * b` over 16 contracted elements (warp). args: accumulator strip of `n` columns, a, then `n / 16` fragments of b.
    Mma,
    /// The same over 32 contracted bytes, sums in i32 that wrap around (warp): an i32 strip, a, then fragments of b.
    MmaBytes {
        /// `u8` or `i8`: what the bytes of a are.
        a: DType,
        /// What those of b are.
        b: DType,
    },
}

use MmaWord as M;

impl MmaWord {
    /// The name in text.
    pub fn name(&self) -> &'static str {
        match self {
            M::CpAsync { .. } => "cp_async",
            M::CpAsyncCommit => "cp_async_commit",
            M::CpAsyncWait { .. } => "cp_async_wait",
            M::LdMatrix { .. } => "ldmatrix",
            M::Mma => "mma",
            M::MmaBytes { .. } => "mma_bytes",
        }
    }

    /// The attributes in text.
    pub fn attrs(&self) -> Vec<(&'static str, String)> {
        match self {
            M::CpAsync { n, offset } => vec![("n", n.to_string()), ("offset", offset.to_string())],
            M::CpAsyncWait { pending } => vec![("pending", pending.to_string())],
            M::LdMatrix { trans, offset } => vec![("trans", trans.to_string()), ("offset", offset.to_string())],
            M::MmaBytes { a, b } => vec![("a", a.to_string()), ("b", b.to_string())],
            M::CpAsyncCommit | M::Mma => vec![],
        }
    }

    /// The word with this name, `None` if there is none.
    pub fn parse(name: &str, attrs: &BTreeMap<String, String>) -> Result<Option<MmaWord>, String> {
        fn get<T: std::str::FromStr>(attrs: &BTreeMap<String, String>, key: &str) -> Result<T, String> {
            let text = attrs.get(key).ok_or_else(|| format!("needs `{key}=`"))?;
            text.parse().map_err(|_| format!("`{key}={text}` is not in range"))
        }
        Ok(Some(match name {
            "cp_async" => M::CpAsync { n: get(attrs, "n")?, offset: get(attrs, "offset")? },
            "cp_async_commit" => M::CpAsyncCommit,
            "cp_async_wait" => M::CpAsyncWait { pending: get(attrs, "pending")? },
            "ldmatrix" => M::LdMatrix { trans: get(attrs, "trans")?, offset: get(attrs, "offset")? },
            "mma" => M::Mma,
            "mma_bytes" => M::MmaBytes { a: get(attrs, "a")?, b: get(attrs, "b")? },
            _ => return Ok(None),
        }))
    }

    /// Whether the result depends on the operands alone.
    pub fn is_pure(&self) -> bool {
        matches!(self, M::Mma | M::MmaBytes { .. })
    }

    /// Whether operands and results are of the right types.
    pub fn check(&self, args: &[Ty], bufs: &[&BufInfo], results: &[Ty]) -> Result<(), String> {
        let half = |d: DType| if matches!(d, DType::F16 | DType::BF16) { Ok(()) } else { Err(format!("elements must be f16 or bf16, not {d}")) };
        match self {
            M::CpAsync { n, .. } => {
                let ([to, from], []) = (bufs, results) else { return Err("takes two buffers and gives nothing".to_owned()) };
                if to.space != Space::Shared || from.space != Space::Global || to.dtype != from.dtype {
                    return Err("copies from global to shared memory, elements of one dtype".to_owned());
                }
                if args != [Ty::INDEX, Ty::INDEX, Ty::BOOL] {
                    return Err("takes two indices and a bool".to_owned());
                }
                let bytes = to.dtype.bits() * usize::from(*n) / 8;
                if to.dtype.bits() < 8 || ![4, 8, 16].contains(&bytes) {
                    return Err(format!("{n} elements of {} are no 4, 8 or 16 bytes", to.dtype));
                }
                Ok(())
            }
            M::CpAsyncCommit | M::CpAsyncWait { .. } => {
                if args.is_empty() && bufs.is_empty() && results.is_empty() {
                    Ok(())
                } else {
                    Err("takes and gives nothing".to_owned())
                }
            }
            M::LdMatrix { trans, .. } => {
                let ([tile], [Ty::INDEX], [out]) = (bufs, args, results) else { return Err("takes a buffer and an index, gives a fragment".to_owned()) };
                let want = if byte(tile.dtype) && !trans { BYTES } else { half(tile.dtype).map(|()| Ty::Frag(tile.dtype, 8))? };
                if tile.space != Space::Shared {
                    return Err("buffer must be in shared memory".to_owned());
                }
                if *out == want { Ok(()) } else { Err(format!("gives {want}, not {out}")) }
            }
            M::Mma => {
                let ([Ty::Frag(DType::F32, n), a @ Ty::Frag(d, 8), b @ ..], [], [out]) = (args, bufs, results) else {
                    return Err("takes an f32 strip, a fragment of 8 and fragments of 8".to_owned());
                };
                half(*d)?;
                if b.is_empty() || b.iter().any(|t| t != a) || usize::from(*n) != 8 * b.len() {
                    return Err(format!("{} fragments of b beside {n} accumulators", b.len()));
                }
                if *out == args[0] { Ok(()) } else { Err("gives what it accumulates into".to_owned()) }
            }
            M::MmaBytes { a: lhs, b: rhs } => {
                let ([Ty::Frag(DType::I32, n), a, b @ ..], [], [out]) = (args, bufs, results) else {
                    return Err("takes an i32 strip and fragments of bytes".to_owned());
                };
                if !byte(*lhs) || !byte(*rhs) {
                    return Err(format!("elements must be u8 or i8, not {lhs} and {rhs}"));
                }
                if *a != BYTES || b.is_empty() || b.iter().any(|t| *t != BYTES) || usize::from(*n) != 8 * b.len() {
                    return Err(format!("{} fragments of b beside {n} accumulators", b.len()));
                }
                if *out == args[0] { Ok(()) } else { Err("gives what it accumulates into".to_owned()) }
            }
        }
    }
}

/// A fragment of bytes.
const BYTES: Ty = Ty::Frag(DType::I32, 4);

const fn byte(d: DType) -> bool {
    matches!(d, DType::U8 | DType::I8)
}

/// Row of register `i` of a strip in thread `t` of the warp.
pub const fn strip_row(t: usize, i: usize) -> usize {
    t / 4 + 8 * (i / 2 % 2)
}

/// Column of register `i` of a strip in thread `t` of the warp.
pub const fn strip_col(t: usize, i: usize) -> usize {
    8 * (i / 4) + 2 * (t % 4) + i % 2
}
