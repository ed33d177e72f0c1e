//! Hopper words: what sm_90a adds to the core operations, and tensor maps.
//!
//! A *warpgroup* is 128 threads; words marked (group) are executed by all threads of one together. An
//! *accumulator* is a `Frag(f32, n / 2)`: a 64 x n tile spread over a warpgroup, one value in the program.
//! Register `i` of thread `t` (0..128) holds row `16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2)` and column
//! `8 * (i / 4) + 2 * (t % 4) + i % 2` ([`acc_row`], [`acc_col`]); a *row fragment* `Frag(_, 2)` holds one value for
//! each of a thread's two rows. `Map` works on both register by register.
//!
//! Shared tiles of 16-bit elements are stored in *panels* of 64 columns: `[rows][64]`, 128 bytes a row, 16-byte
//! chunks permuted by the 128-byte swizzle ([`swizzle128`]), panel starts 1024-byte aligned. Indices are in elements, before the swizzle.
use super::op::ReduceFn;
use super::{Buf, BufInfo, Ty};
use pavage_ir::{DType, Dim, Sym, dim::parse_dim};
use std::collections::BTreeMap;

/// A part of the block that runs its own program: whole warpgroups, with a register budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Role {
    /// Warpgroups of it.
    pub groups: u8,
    /// Registers a thread, a multiple of 8 in 24..=240; 0 leaves what the kernel started with.
    pub regs: u16,
}

/// Which way the second operand of a matrix product lies in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Major {
    /// `[n][k]`: rows of the contracted axis.
    K,
    /// `[k][n]`: rows of the output axis.
    Mn,
}

/// Which coordinates the address of a fragment element depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vary {
    /// `base + row * stride + col`.
    Both,
    /// `base + col`.
    Cols,
    /// `base + row`.
    Rows,
}

/// An operation of sm_90a, with its attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HopperWord {
    /// Warpgroups part ways: one block a role, in thread order; together all threads of the block. No results.
    Roles(Vec<Role>),
    /// Index of this warpgroup in its role: `i64`.
    GroupId,
    /// Index of this thread in its warpgroup: `i64`, 0..128.
    GroupThread,
    /// True in one thread of the warpgroup (group).
    Elect,
    /// Make this thread's shared-memory writes visible to the asynchronous proxy (TMA, wgmma).
    FenceProxyAsync,
    /// Set up barrier `i` for `count` arrivals a phase. bufs: barriers (`u64`). args: i.
    MbarInit {
        /// Arrivals that complete a phase.
        count: u32,
    },
    /// Make initialised barriers visible to the cluster and the asynchronous proxy.
    FenceMbarInit,
    /// Arrive and announce bytes that TMA will bring in this phase. bufs: barriers. args: i.
    MbarExpect {
        /// The bytes.
        bytes: u32,
    },
    /// Arrive. bufs: barriers. args: i, then optionally the rank of the block in the cluster whose barrier is meant.
    MbarArrive,
    /// Wait until the phase of this parity is over. bufs: barriers. args: i, parity (`i64` 0 or 1).
    MbarWait,
    /// Copy a box into shared memory; its bytes count on a barrier. bufs: destination, barriers. args: element index of the
    /// destination, barrier index, coordinates (innermost first).
    TmaLoad {
        /// The tensor map's number.
        map: u8,
        /// Ranks of the cluster that receive the box, as bits; 0 for this block alone.
        multicast: u16,
    },
    /// Copy a box from shared memory; out-of-bounds elements are not written. bufs: source. args: element index, coordinates.
    TmaStore {
        /// The tensor map's number.
        map: u8,
    },
    /// Close the group of bulk stores issued so far by this thread.
    BulkCommit,
    /// Wait until at most `pending` groups of this thread are in flight.
    BulkWait {
        /// Groups that may still be in flight.
        pending: u8,
        /// Only their reading of shared memory counts.
        read: bool,
    },
    /// `acc + a * b`, issued (group): `a` 64 x k, `b` k x n. bufs: [a,] b. args: `a` as element index, or as fragment of `k / 2`
    /// 16-bit registers in accumulator order when `a` is no buffer; element index of b; acc unless `zero`.
    Wgmma {
        /// Columns: a multiple of 8 up to 256.
        n: u16,
        /// Contracted extent: a multiple of 16.
        k: u16,
        /// Start from zero.
        zero: bool,
        /// How b lies.
        major: Major,
        /// Elements from one panel of a to the next.
        a_panel: u32,
        /// Elements from one panel of b to the next.
        b_panel: u32,
    },
    /// Order register and shared-memory accesses before the next `wgmma` (group).
    WgmmaFence,
    /// Close the group of products issued so far (group).
    WgmmaCommit,
    /// Wait until at most `pending` groups are in flight (group). args: the accumulators that are then complete;
    /// results: their values, of the same types.
    WgmmaWait {
        /// Groups that may still be in flight.
        pending: u8,
    },
    /// Meet at a named barrier. args: its number (0 is the block's own).
    NamedSync {
        /// Threads that take part.
        threads: u16,
    },
    /// Count at a named barrier without waiting. args: its number.
    NamedArrive {
        /// Threads that take part.
        threads: u16,
    },
    /// All threads of the cluster meet.
    ClusterSync,
    /// Rank of this block in its cluster: `i64`.
    ClusterRank,
    /// Index of this cluster in the grid: `i64`.
    ClusterId,
    /// Clusters of the grid: `i64`.
    ClusterCount,
    /// Store a 64 x n accumulator of 16-bit elements to a panelled tile (group). bufs: tile. args: element index of the tile's
    /// first panel, fragment.
    StMatrix {
        /// Elements from one panel to the next.
        panel: u32,
        /// Column of the tile where the fragment begins, a multiple of 16.
        col: u16,
    },
    /// Row of each register in the warpgroup's 64-row tile: `Frag(i32, n)`.
    AccRows,
    /// Column of each register: `Frag(i32, n)`.
    AccCols,
    /// Fold the columns a thread holds into a row fragment; with `quad`, over the whole row. args: accumulator.
    RowReduce {
        /// How.
        with: ReduceFn,
        /// Whether the four threads of a row combine what they have.
        quad: bool,
    },
    /// Each register gets its row's value: row fragment to accumulator. args: row fragment.
    RowSpread,
    /// Read a fragment; 0 where row >= rows or col >= cols. bufs: source. args: base, row, col, rows, cols, stride (`i64`),
    /// `row` and `col` those of the tile's first element.
    AccLoad {
        /// Which coordinates matter.
        vary: Vary,
        /// Two columns at a time: base, stride and cols are even and the buffer is aligned.
        pairs: bool,
    },
    /// Write a fragment where row < rows and col < cols. bufs: destination. args: fragment, then as for `acc_load`.
    AccStore {
        /// Two columns at a time.
        pairs: bool,
    },
    /// `2^x` by the special-function unit, f32. args: scalar or fragment.
    Ex2,
    /// `1 / x` by the special-function unit, f32. args: scalar or fragment.
    Rcp,
    /// Wait for the kernels before this one (programmatic dependent launch).
    PdlWait,
    /// Let the next kernel start.
    PdlTrigger,
}

use HopperWord as H;

impl HopperWord {
    /// The name in text.
    pub fn name(&self) -> &'static str {
        match self {
            H::Roles(_) => "roles",
            H::GroupId => "group_id",
            H::GroupThread => "group_thread",
            H::Elect => "elect",
            H::FenceProxyAsync => "fence_proxy_async",
            H::MbarInit { .. } => "mbar_init",
            H::FenceMbarInit => "fence_mbar_init",
            H::MbarExpect { .. } => "mbar_expect",
            H::MbarArrive => "mbar_arrive",
            H::MbarWait => "mbar_wait",
            H::TmaLoad { .. } => "tma_load",
            H::TmaStore { .. } => "tma_store",
            H::BulkCommit => "bulk_commit",
            H::BulkWait { .. } => "bulk_wait",
            H::Wgmma { .. } => "wgmma",
            H::WgmmaFence => "wgmma_fence",
            H::WgmmaCommit => "wgmma_commit",
            H::WgmmaWait { .. } => "wgmma_wait",
            H::NamedSync { .. } => "named_sync",
            H::NamedArrive { .. } => "named_arrive",
            H::ClusterSync => "cluster_sync",
            H::ClusterRank => "cluster_rank",
            H::ClusterId => "cluster_id",
            H::ClusterCount => "cluster_count",
            H::StMatrix { .. } => "stmatrix",
            H::AccRows => "acc_rows",
            H::AccCols => "acc_cols",
            H::RowReduce { .. } => "row_reduce",
            H::RowSpread => "row_spread",
            H::AccLoad { .. } => "acc_load",
            H::AccStore { .. } => "acc_store",
            H::Ex2 => "ex2",
            H::Rcp => "rcp_approx",
            H::PdlWait => "pdl_wait",
            H::PdlTrigger => "pdl_trigger",
        }
    }

    /// The attributes in text.
    pub fn attrs(&self) -> Vec<(&'static str, String)> {
        match self {
            H::Roles(roles) => {
                let join = |f: &dyn Fn(&Role) -> String| roles.iter().map(f).collect::<Vec<_>>().join(":");
                vec![("groups", join(&|r| r.groups.to_string())), ("regs", join(&|r| r.regs.to_string()))]
            }
            H::MbarInit { count } => vec![("count", count.to_string())],
            H::MbarExpect { bytes } => vec![("bytes", bytes.to_string())],
            H::TmaLoad { map, multicast } => vec![("map", map.to_string()), ("multicast", multicast.to_string())],
            H::TmaStore { map } => vec![("map", map.to_string())],
            H::BulkWait { pending, read } => vec![("pending", pending.to_string()), ("read", read.to_string())],
            H::Wgmma { n, k, zero, major, a_panel, b_panel } => vec![
                ("n", n.to_string()),
                ("k", k.to_string()),
                ("zero", zero.to_string()),
                ("major", if *major == Major::K { "k" } else { "mn" }.to_owned()),
                ("a_panel", a_panel.to_string()),
                ("b_panel", b_panel.to_string()),
            ],
            H::WgmmaWait { pending } => vec![("pending", pending.to_string())],
            H::NamedSync { threads } | H::NamedArrive { threads } => vec![("threads", threads.to_string())],
            H::StMatrix { panel, col } => vec![("panel", panel.to_string()), ("col", col.to_string())],
            H::RowReduce { with, quad } => vec![("with", with.scalar().name().to_owned()), ("quad", quad.to_string())],
            H::AccLoad { vary, pairs } => vec![("vary", vary.name().to_owned()), ("pairs", pairs.to_string())],
            H::AccStore { pairs } => vec![("pairs", pairs.to_string())],
            _ => vec![],
        }
    }

    /// The word with this name, `None` if there is none.
    pub fn parse(name: &str, attrs: &BTreeMap<String, String>) -> Result<Option<HopperWord>, String> {
        fn get<T: std::str::FromStr>(attrs: &BTreeMap<String, String>, key: &str) -> Result<T, String> {
            let text = attrs.get(key).ok_or_else(|| format!("needs `{key}=`"))?;
            text.parse().map_err(|_| format!("`{key}={text}` is not in range"))
        }
        let word = match name {
            "roles" => {
                let list = |key: &str| -> Result<Vec<u16>, String> {
                    get::<String>(attrs, key)?.split(':').map(|t| t.parse().map_err(|_| format!("bad `{key}`"))).collect()
                };
                let (groups, regs) = (list("groups")?, list("regs")?);
                if groups.len() != regs.len() {
                    return Err("`groups` and `regs` differ in length".to_owned());
                }
                H::Roles(groups.iter().zip(&regs).map(|(g, r)| Role { groups: (*g).min(255) as u8, regs: *r }).collect())
            }
            "group_id" => H::GroupId,
            "group_thread" => H::GroupThread,
            "elect" => H::Elect,
            "fence_proxy_async" => H::FenceProxyAsync,
            "mbar_init" => H::MbarInit { count: get(attrs, "count")? },
            "fence_mbar_init" => H::FenceMbarInit,
            "mbar_expect" => H::MbarExpect { bytes: get(attrs, "bytes")? },
            "mbar_arrive" => H::MbarArrive,
            "mbar_wait" => H::MbarWait,
            "tma_load" => H::TmaLoad { map: get(attrs, "map")?, multicast: get(attrs, "multicast")? },
            "tma_store" => H::TmaStore { map: get(attrs, "map")? },
            "bulk_commit" => H::BulkCommit,
            "bulk_wait" => H::BulkWait { pending: get(attrs, "pending")?, read: get(attrs, "read")? },
            "wgmma" => {
                let major = match get::<String>(attrs, "major")?.as_str() {
                    "k" => Major::K,
                    "mn" => Major::Mn,
                    other => return Err(format!("unknown major `{other}`")),
                };
                H::Wgmma {
                    n: get(attrs, "n")?,
                    k: get(attrs, "k")?,
                    zero: get(attrs, "zero")?,
                    major,
                    a_panel: get(attrs, "a_panel")?,
                    b_panel: get(attrs, "b_panel")?,
                }
            }
            "wgmma_fence" => H::WgmmaFence,
            "wgmma_commit" => H::WgmmaCommit,
            "wgmma_wait" => H::WgmmaWait { pending: get(attrs, "pending")? },
            "named_sync" => H::NamedSync { threads: get(attrs, "threads")? },
            "named_arrive" => H::NamedArrive { threads: get(attrs, "threads")? },
            "cluster_sync" => H::ClusterSync,
            "cluster_rank" => H::ClusterRank,
            "cluster_id" => H::ClusterId,
            "cluster_count" => H::ClusterCount,
            "stmatrix" => H::StMatrix { panel: get(attrs, "panel")?, col: get(attrs, "col")? },
            "acc_rows" => H::AccRows,
            "acc_cols" => H::AccCols,
            "row_reduce" => {
                let name = get::<String>(attrs, "with")?;
                let with = [ReduceFn::Add, ReduceFn::Max, ReduceFn::Min]
                    .into_iter()
                    .find(|r| r.scalar().name() == name)
                    .ok_or_else(|| format!("unknown reduction `{name}`"))?;
                H::RowReduce { with, quad: get(attrs, "quad")? }
            }
            "row_spread" => H::RowSpread,
            "acc_load" => {
                let name = get::<String>(attrs, "vary")?;
                let vary = [Vary::Both, Vary::Cols, Vary::Rows].into_iter().find(|v| v.name() == name).ok_or_else(|| format!("unknown vary `{name}`"))?;
                H::AccLoad { vary, pairs: get(attrs, "pairs")? }
            }
            "acc_store" => H::AccStore { pairs: get(attrs, "pairs")? },
            "ex2" => H::Ex2,
            "rcp_approx" => H::Rcp,
            "pdl_wait" => H::PdlWait,
            "pdl_trigger" => H::PdlTrigger,
            _ => return Ok(None),
        };
        Ok(Some(word))
    }

    /// Whether the result depends on the operands alone.
    pub fn is_pure(&self) -> bool {
        matches!(
            self,
            H::AccRows
                | H::AccCols
                | H::RowReduce { quad: false, .. }
                | H::RowSpread
                | H::Ex2
                | H::Rcp
                | H::GroupId
                | H::GroupThread
                | H::ClusterRank
                | H::ClusterId
                | H::ClusterCount
        )
    }

    /// Whether operands and results are of the right types.
    pub fn check(&self, args: &[Ty], bufs: &[&BufInfo], results: &[Ty]) -> Result<(), String> {
        let index = |n: std::ops::RangeInclusive<usize>| {
            if !n.contains(&args.len()) || args.iter().any(|t| *t != Ty::INDEX) {
                return Err(format!("takes {} to {} index operands", n.start(), n.end()));
            }
            Ok(())
        };
        let shape = |n_bufs: usize, n_results: usize| {
            if bufs.len() != n_bufs || results.len() != n_results {
                return Err(format!("takes {n_bufs} buffers and gives {n_results} values"));
            }
            Ok(())
        };
        let shared = |i: usize| if bufs[i].space == super::Space::Shared { Ok(()) } else { Err("buffer must be in shared memory".to_owned()) };
        let bars = |i: usize| {
            if bufs[i].space == super::Space::Shared && bufs[i].dtype == DType::U64 { Ok(()) } else { Err("barriers are `u64` in shared memory".to_owned()) }
        };
        let half = |d: DType| if matches!(d, DType::F16 | DType::BF16) { Ok(()) } else { Err(format!("elements must be f16 or bf16, not {d}")) };
        let same = |a: Ty, b: Ty| if a == b { Ok(()) } else { Err(format!("types differ: {a} and {b}")) };
        match self {
            H::Roles(_)
            | H::FenceProxyAsync
            | H::FenceMbarInit
            | H::BulkCommit
            | H::BulkWait { .. }
            | H::WgmmaFence
            | H::WgmmaCommit
            | H::ClusterSync
            | H::PdlWait
            | H::PdlTrigger => {
                shape(0, 0)?;
                index(0..=0)
            }
            H::GroupId | H::GroupThread | H::ClusterRank | H::ClusterId | H::ClusterCount => {
                shape(0, 1)?;
                index(0..=0)?;
                same(results[0], Ty::INDEX)
            }
            H::Elect => {
                shape(0, 1)?;
                index(0..=0)?;
                same(results[0], Ty::BOOL)
            }
            H::MbarInit { .. } | H::MbarExpect { .. } => {
                shape(1, 0)?;
                bars(0)?;
                index(1..=1)
            }
            H::MbarArrive => {
                shape(1, 0)?;
                bars(0)?;
                index(1..=2)
            }
            H::MbarWait => {
                shape(1, 0)?;
                bars(0)?;
                index(2..=2)
            }
            H::TmaLoad { .. } => {
                shape(2, 0)?;
                shared(0)?;
                bars(1)?;
                index(3..=7)
            }
            H::TmaStore { .. } => {
                shape(1, 0)?;
                shared(0)?;
                index(2..=6)
            }
            H::Wgmma { n, k, zero, .. } => {
                if *n == 0 || n % 8 != 0 || *n > 256 || *k == 0 || k % 16 != 0 {
                    return Err(format!("n={n} must be a multiple of 8 up to 256, k={k} one of 16"));
                }
                let from_registers = bufs.len() == 1;
                shape(if from_registers { 1 } else { 2 }, 1)?;
                for (i, b) in bufs.iter().enumerate() {
                    shared(i)?;
                    half(b.dtype)?;
                }
                if args.len() != if *zero { 2 } else { 3 } || args[1] != Ty::INDEX {
                    return Err("takes a, the index of b, and acc unless zero".to_owned());
                }
                if from_registers {
                    same(args[0], Ty::Frag(bufs[0].dtype, k / 2))?;
                } else {
                    same(args[0], Ty::INDEX)?;
                    if bufs[0].dtype != bufs[1].dtype {
                        return Err("operands differ in dtype".to_owned());
                    }
                }
                let acc = Ty::Frag(DType::F32, n / 2);
                same(results[0], acc)?;
                if *zero { Ok(()) } else { same(args[2], acc) }
            }
            H::WgmmaWait { .. } => {
                if bufs.is_empty() && args == results && args.iter().all(|t| matches!(t, Ty::Frag(DType::F32, _))) {
                    Ok(())
                } else {
                    Err("gives the accumulators it takes".to_owned())
                }
            }
            H::NamedSync { threads } | H::NamedArrive { threads } => {
                shape(0, 0)?;
                index(1..=1)?;
                if *threads == 0 || threads % 32 != 0 { Err(format!("{threads} threads are not whole warps")) } else { Ok(()) }
            }
            H::StMatrix { .. } => {
                shape(1, 0)?;
                shared(0)?;
                half(bufs[0].dtype)?;
                match args {
                    [Ty::INDEX, Ty::Frag(d, n)] if *d == bufs[0].dtype && n % 8 == 0 => Ok(()),
                    _ => Err("takes an index and a fragment of the tile's dtype, a multiple of 16 columns".to_owned()),
                }
            }
            H::AccRows | H::AccCols => {
                shape(0, 1)?;
                index(0..=0)?;
                if matches!(results[0], Ty::Frag(DType::I32, _)) { Ok(()) } else { Err("gives a fragment of i32".to_owned()) }
            }
            H::RowReduce { .. } => match (args, results) {
                ([Ty::Frag(DType::F32, n)], [Ty::Frag(DType::F32, 2)]) if n % 4 == 0 => Ok(()),
                _ => Err("takes an f32 accumulator and gives a row fragment".to_owned()),
            },
            H::RowSpread => match (args, results) {
                ([Ty::Frag(a, 2)], [Ty::Frag(b, n)]) if a == b && n % 4 == 0 => Ok(()),
                _ => Err("takes a row fragment and gives an accumulator".to_owned()),
            },
            H::AccLoad { .. } => {
                shape(1, 1)?;
                index(6..=6)?;
                same(results[0], results[0].with(bufs[0].dtype))
            }
            H::AccStore { .. } => {
                shape(1, 0)?;
                if args.len() == 7 && args[1..].iter().all(|t| *t == Ty::INDEX) {
                    same(args[0], args[0].with(bufs[0].dtype))
                } else {
                    Err("takes a fragment and six indices".to_owned())
                }
            }
            H::Ex2 | H::Rcp => {
                if args.len() == 1 && args == results && args[0].dtype() == DType::F32 {
                    Ok(())
                } else {
                    Err("takes one f32 value and gives one".to_owned())
                }
            }
        }
    }
}

impl Vary {
    /// The name in text.
    pub const fn name(self) -> &'static str {
        match self {
            Vary::Both => "both",
            Vary::Cols => "cols",
            Vary::Rows => "rows",
        }
    }
}

/// Row of accumulator register `i` of thread `t` of the warpgroup.
pub const fn acc_row(t: usize, i: usize) -> usize {
    16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2)
}

/// Column of accumulator register `i` of thread `t` of the warpgroup.
pub const fn acc_col(t: usize, i: usize) -> usize {
    8 * (i / 4) + 2 * (t % 4) + i % 2
}

/// Where byte `at` of a 1024-aligned shared tile really is, under the 128-byte swizzle.
pub const fn swizzle128(at: u64) -> u64 {
    at ^ ((at >> 7 & 7) << 4)
}

/// A TMA descriptor parameter: how a global argument is cut into boxes. Extents and strides are expressions over
/// the kernel's run-time sizes, written as symbols `d0`, `d1`, ... in the order of `Kernel::dims`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// The argument it describes.
    pub arg: Buf,
    /// Elements from the argument's start; in bytes a multiple of 16.
    pub offset: Dim,
    /// Extents in elements, innermost first, 2 to 5 of them.
    pub dims: Vec<Dim>,
    /// Strides in elements of all dimensions but the innermost; in bytes they are multiples of 16.
    pub strides: Vec<Dim>,
    /// Elements of the box in each dimension, 1 to 256.
    pub boxes: Vec<u32>,
    /// Bytes of the swizzle's span: 0, 32, 64 or 128.
    pub swizzle: u16,
}

/// The `i`-th run-time size of a kernel, in the expressions of a [`TensorMap`].
pub fn size(i: usize) -> Dim {
    Dim::sym(&format!("d{i}"))
}

fn sized(name: &str) -> Option<Sym> {
    name.strip_prefix('d').filter(|n| n.parse::<u32>().is_ok()).map(|_| Sym { name: name.into(), min: 1, max: None })
}

impl TensorMap {
    /// Elements of the box.
    pub fn box_len(&self) -> u64 {
        self.boxes.iter().map(|b| u64::from(*b)).product()
    }

    /// The description in text, one line: `@0 offset[0] dims[d0;d1] strides[d0] box[64;128] swizzle 128`.
    pub fn text(&self) -> String {
        fn list<T: ToString>(items: &[T]) -> String {
            items.iter().map(ToString::to_string).collect::<Vec<_>>().join(";")
        }
        format!(
            "@{} offset[{}] dims[{}] strides[{}] box[{}] swizzle {}",
            self.arg.0,
            self.offset,
            list(&self.dims),
            list(&self.strides),
            list(&self.boxes),
            self.swizzle
        )
    }

    /// Read what [`TensorMap::text`] writes.
    pub fn parse(text: &str) -> Result<TensorMap, String> {
        let bad = || format!("bad tensor map `{text}`");
        let arg = text.strip_prefix('@').and_then(|t| t.split(' ').next()).and_then(|t| t.parse().ok()).ok_or_else(bad)?;
        let list = |key: &str| -> Result<Vec<String>, String> {
            let rest = text.split_once(&format!(" {key}[")).ok_or_else(bad)?.1;
            let body = rest.split_once(']').ok_or_else(bad)?.0;
            Ok(body.split(';').filter(|t| !t.is_empty()).map(|t| t.trim().to_owned()).collect())
        };
        let dims = |key: &str| -> Result<Vec<Dim>, String> { list(key)?.iter().map(|t| parse_dim(t, &sized).map_err(|e| format!("{e}: {}", bad()))).collect() };
        let boxes = list("box")?.iter().map(|t| t.parse().map_err(|_| bad())).collect::<Result<_, _>>()?;
        let swizzle = text.rsplit(' ').next().and_then(|t| t.parse().ok()).ok_or_else(bad)?;
        let offset = dims("offset")?.pop().ok_or_else(bad)?;
        Ok(TensorMap { arg: Buf(arg), offset, dims: dims("dims")?, strides: dims("strides")?, boxes, swizzle })
    }
}
