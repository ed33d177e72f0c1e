//! The op table. One row says everything the rest of the compiler needs to know of an op.
//!
//! A row gives the mnemonic, operands, attributes, the type rule and the reference evaluator. From it come
//! the [`Op`] enum, printing, parsing, arity checks, shape inference, constant folding, the e-graph
//! language and `ir/OPS.md`. Pointwise ops are one row, [`Op::Map`], over the table of
//! [`ScalarFn`]s: a new scalar function is an op the moment it has a row there.
//!
//! No op broadcasts: operands of a pointwise op have equal shapes, and `broadcast` is written out.
use crate::{
    DType, Dim, Graph, ScalarFn, Tensor, TensorType,
    activation::Activation,
    attr::{Aggregate, Attr, CoordMode, Direction, Layout, NearestMode, PadMode, PoolFn, Real, ReduceFn, ResizeMode, ScatterFn, Sizes, Symbols, split_top},
    dim::{Env, Sym},
    ops,
};
use std::fmt;

/// Why an op rejects its operands.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpError {
    /// Wrong operand count.
    #[error("`{op}` takes {expected} operands, got {got}")]
    Arity {
        /// Mnemonic.
        op: &'static str,
        /// What the row says.
        expected: String,
        /// Operands given.
        got: usize,
    },
    /// The type rule says no.
    #[error("`{op}`: {reason}")]
    Type {
        /// Mnemonic.
        op: &'static str,
        /// The broken requirement, in the reader's words.
        reason: String,
    },
    /// The evaluator cannot compute this (an index out of range, say).
    #[error("`{op}`: {reason}")]
    Eval {
        /// Mnemonic.
        op: &'static str,
        /// What went wrong.
        reason: String,
    },
    /// No row has this mnemonic.
    #[error("unknown op `{0}`")]
    Unknown(String),
    /// Attribute text that does not parse.
    #[error("bad attribute `{name}` in `{text}`")]
    Attr {
        /// Attribute name.
        name: &'static str,
        /// The op's text.
        text: String,
    },
}

/// What a type rule sees: operand types, and nested graphs of control flow.
#[derive(Clone, Copy)]
pub struct TypeArgs<'a> {
    /// Operand types.
    pub types: &'a [&'a TensorType],
    /// Nested graphs.
    pub bodies: &'a [Graph],
}

/// What an evaluator sees.
#[derive(Clone, Copy)]
pub struct EvalArgs<'a> {
    /// Operands.
    pub tensors: &'a [&'a Tensor],
    /// Nested graphs.
    pub bodies: &'a [Graph],
    /// The types that the type rule gave for these operands: all extents constant, except those that
    /// this very op decides.
    pub results: &'a [TensorType],
}

/// One table row, as data.
pub struct OpInfo {
    /// Textual name.
    pub mnemonic: &'static str,
    /// Operand names in order; `x?` is optional (absent ones at the end are left out), `x...` is any number.
    pub operands: &'static [&'static str],
    /// Attribute names and types.
    pub attrs: &'static [(&'static str, &'static str)],
    /// The doc comment of the row.
    pub doc: &'static [&'static str],
}

macro_rules! ops {
    ($( $(#[doc = $doc:literal])* $mnemonic:literal = $Name:ident ( $($operand:literal),* ) { $($attr:ident : $Ty:ty),* }
        infer $infer:path, eval $eval:path; )*) => {
        /// An operation with its attributes, without its operands.
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(missing_docs)]
        pub enum Op {
            /// A scalar function applied elementwise; operand shapes equal.
            Map(ScalarFn),
            $( $(#[doc = $doc])* $Name { $($attr: $Ty),* } ),*
        }

        /// Every op but the pointwise ones, in table order.
        pub const TABLE: &[OpInfo] = &[ $( OpInfo {
            mnemonic: $mnemonic, operands: &[$($operand),*],
            attrs: &[$((stringify!($attr), stringify!($Ty))),*], doc: &[$($doc),*],
        } ),* ];

        impl Op {
            /// Textual name.
            pub fn mnemonic(&self) -> &'static str {
                match self { Op::Map(f) => f.name(), $( Op::$Name { .. } => $mnemonic ),* }
            }

            /// This op's table row; none for pointwise ops.
            pub fn info(&self) -> Option<&'static OpInfo> {
                let name = self.mnemonic();
                match self { Op::Map(_) => None, _ => TABLE.iter().find(|info| info.mnemonic == name) }
            }

            /// Result types for these operands, or the broken requirement.
            pub fn infer(&self, args: TypeArgs) -> Result<Vec<TensorType>, OpError> {
                self.check_arity(args.types.len())?;
                match self {
                    Op::Map(f) => ops::pointwise::infer(args, *f),
                    $( Op::$Name { $($attr),* } => $infer(args $(, $attr)*) ),*
                }.map_err(|reason| OpError::Type { op: self.mnemonic(), reason })
            }

            /// Reference semantics: slow, plain loops. Fails where [`Op::infer`] rejects the operands, and where an
            /// attribute holds a symbol (see [`Op::bind`]).
            pub fn eval(&self, args: EvalArgs) -> Result<Vec<Tensor>, OpError> {
                let types = ops::check(self, &args)?;
                let args = EvalArgs { results: types.as_deref().unwrap_or(args.results), ..args };
                match self {
                    Op::Map(f) => ops::pointwise::eval(args, *f),
                    $( Op::$Name { $($attr),* } => $eval(args $(, $attr)*) ),*
                }.map_err(|reason| OpError::Eval { op: self.mnemonic(), reason })
            }

            /// The op with symbols in its attributes replaced by what `env` says.
            pub fn bind(&self, env: &dyn Env) -> Op {
                let _ = env;
                match self { Op::Map(f) => Op::Map(*f), $( Op::$Name { $($attr),* } => Op::$Name { $($attr: Attr::bind($attr, env)),* } ),* }
            }

            /// Visit every size expression in the attributes.
            pub fn dims(&self, visit: &mut dyn FnMut(&Dim)) {
                let _ = &visit;
                match self { Op::Map(_) => {}, $( Op::$Name { $($attr),* } => { $( Attr::dims($attr, visit); )* } ),* }
            }

            /// Parse what `Display` prints.
            pub fn parse(text: &str, symbols: Symbols) -> Result<Op, OpError> {
                let (name, attrs) = match text.split_once('[') {
                    Some((name, rest)) => (name, rest.strip_suffix(']').unwrap_or(rest)),
                    None => (text, ""),
                };
                if let Some(f) = ScalarFn::parse(name) {
                    return Ok(Op::Map(f));
                }
                let parts = split_top(attrs, ',');
                let find = |key: &str| parts.iter().find_map(|kv| kv.split_once('=').filter(|(k, _)| k.trim() == key).map(|(_, v)| v.trim()));
                let _ = &find;
                Ok(match name {
                    $( $mnemonic => Op::$Name { $( $attr: find(stringify!($attr)).map_or_else(<$Ty as Attr>::absent, |v| <$Ty as Attr>::parse(v, symbols))
                        .ok_or_else(|| OpError::Attr { name: stringify!($attr), text: text.to_string() })? ),* }, )*
                    _ => return Err(OpError::Unknown(name.to_string())),
                })
            }
        }

        impl fmt::Display for Op {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut attrs: Vec<(&str, String)> = Vec::new();
                f.write_str(self.mnemonic())?;
                let _ = &mut attrs;
                match self { Op::Map(_) => {}, $( Op::$Name { $($attr),* } => { $( attrs.push((stringify!($attr), Attr::show($attr))); )* } ),* }
                let attrs: Vec<String> = attrs.into_iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| format!("{k}={v}")).collect();
                if attrs.is_empty() { Ok(()) } else { write!(f, "[{}]", attrs.join(",")) }
            }
        }
    };
}

impl Op {
    /// The size symbols that the op defines.
    pub fn defines(&self) -> Vec<&Sym> {
        match self {
            Op::BindSize { sym } | Op::NonZero { sym } => vec![sym],
            Op::If { sizes } => sizes.0.iter().collect(),
            Op::Loop { trips, sizes, .. } => std::iter::once(trips).chain(&sizes.0).collect(),
            _ => vec![],
        }
    }

    /// Operand names, as in [`OpInfo::operands`].
    pub fn operand_names(&self) -> &'static [&'static str] {
        match self {
            Op::Map(f) => match f.arity() {
                1 => &["a"],
                2 => &["a", "b"],
                _ => &["a", "b", "c"],
            },
            _ => self.info().map_or(&[], |info| info.operands),
        }
    }

    /// Fails unless the row allows this many operands.
    pub fn check_arity(&self, got: usize) -> Result<(), OpError> {
        let names = self.operand_names();
        let least = names.iter().filter(|n| !n.ends_with('?') && !n.ends_with("...")).count();
        let most = if names.iter().any(|n| n.ends_with("...")) { usize::MAX } else { names.len() };
        if (least..=most).contains(&got) {
            return Ok(());
        }
        let expected = if least == most {
            least.to_string()
        } else if most == usize::MAX {
            format!("at least {least}")
        } else {
            format!("{least} to {most}")
        };
        Err(OpError::Arity { op: self.mnemonic(), expected, got })
    }
}

/// The op reference, as Markdown: `ir/OPS.md`.
pub fn reference() -> String {
    let mut out = String::from(
        "# Ops\n\nGenerated from the op table in `ir/src/op.rs` and the scalar table in `ir/src/scalar.rs`.\n\n## Pointwise\n\nOperand shapes are equal; nothing broadcasts.\n\n| op | operands | types | meaning |\n|---|---|---|---|\n",
    );
    for f in ScalarFn::ALL {
        out += &format!("| `{f}` | {} | {} | {} |\n", f.arity(), format!("{:?}", f.sig()).to_lowercase(), f.doc().trim());
    }
    out += "\n## Others\n";
    for info in TABLE {
        let attrs: Vec<_> = info.attrs.iter().map(|(n, t)| format!("{n}: {t}")).collect();
        out += &format!("\n### `{}({})`", info.mnemonic, info.operands.join(", "));
        if !attrs.is_empty() {
            out += &format!(" `[{}]`", attrs.join(", "));
        }
        out += &format!("\n\n{}\n", info.doc.iter().map(|l| l.trim()).collect::<Vec<_>>().join("\n"));
    }
    out
}

ops! {
    /// Convert elements: floats round to nearest even, integers wrap, floats to integers truncate toward
    /// zero and saturate (NaN gives 0), anything to bool is `x != 0`. Floats beyond the largest become infinity, or NaN where
    /// the dtype has none, or the largest where it has neither; `f8e8m0` takes the nearest power of two, ties up.
    "cast" = Cast("x") { to: DType } infer ops::pointwise::infer_cast, eval ops::pointwise::eval_cast;
    /// The same bits as another dtype of the same width; not for bool.
    "bitcast" = BitCast("x") { to: DType } infer ops::pointwise::infer_bitcast, eval ops::pointwise::eval_bitcast;
    /// Integers of up to 8 bits, or floats of up to 16, as f32: `(x - zero) * scale`, rounded at each step. Along axis `a` a scale and
    /// a zero point hold for `blocks[a]` elements; without a scale the values are those of `x`. Contractions and gathers read
    /// through it, so that `x` stays packed in memory.
    "dequant" = Dequant("x", "scale?", "zero?") { blocks: Vec<usize> } infer ops::quant::infer, eval ops::quant::eval;
    /// Repeat axes of extent 1 to the extents of `shape`; ranks are equal, other extents too.
    "broadcast" = Broadcast("x") { shape: Vec<Dim> } infer ops::view::infer_broadcast, eval ops::view::eval_broadcast;
    /// The same elements in row-major order under another shape; element counts are equal.
    "reshape" = Reshape("x") { shape: Vec<Dim> } infer ops::view::infer_reshape, eval ops::view::eval_reshape;
    /// Axis `i` of the result is axis `perm[i]` of `x`.
    "transpose" = Transpose("x") { perm: Vec<usize> } infer ops::view::infer_transpose, eval ops::view::eval_transpose;
    /// `out[i...] = x[starts + i * steps]`, extents `sizes`, one entry an axis; steps are not 0, may be negative.
    "slice" = Slice("x") { starts: Vec<Dim>, sizes: Vec<Dim>, steps: Vec<i64> } infer ops::view::infer_slice, eval ops::view::eval_slice;
    /// Add `lo` elements before and `hi` after each axis (negative amounts cut). `value` is a scalar of x's
    /// dtype, used by mode `constant`.
    "pad" = Pad("x", "value") { lo: Vec<Dim>, hi: Vec<Dim>, mode: PadMode } infer ops::view::infer_pad, eval ops::view::eval_pad;
    /// The operands one after another along `axis`; other extents equal.
    "concat" = Concat("x...") { axis: usize } infer ops::view::infer_concat, eval ops::view::eval_concat;
    /// `out[i...] = i[axis]` as `dtype`.
    "iota" = Iota() { dtype: DType, shape: Vec<Dim>, axis: usize } infer ops::view::infer_iota, eval ops::view::eval_iota;
    /// Sizes as data: an i64 vector of the values of `values`.
    "dims" = Dims() { values: Vec<Dim> } infer ops::view::infer_dims, eval ops::view::eval_dims;
    /// Data as a size: `x`, an i64 scalar, defines the symbol `sym` from here on; the result is `x`.
    /// Evaluation fails where x lies outside the symbol's bounds.
    "bind_size" = BindSize("x") { sym: Sym } infer ops::view::infer_bind_size, eval ops::view::eval_bind_size;
    /// Combine along `axes` (sorted, distinct), which stay with extent 1.
    "reduce" = Reduce("x") { f: ReduceFn, axes: Vec<usize> } infer ops::reduce::infer, eval ops::reduce::eval;
    /// Position (i64) of the largest (`max`) or smallest (`min`) element along `axis`, which stays with extent 1;
    /// of equals the first, or with `last` the last. NaN compares greater than everything for `max`, less for `min`.
    "arg_reduce" = ArgReduce("x") { f: ReduceFn, axis: usize, last: bool } infer ops::reduce::infer_arg, eval ops::reduce::eval_arg;
    /// Running sum or product along `axis`; `exclusive` leaves the element itself out, `reverse` runs from the end.
    "cumulative" = Cumulative("x") { f: ReduceFn, axis: usize, exclusive: bool, reverse: bool } infer ops::reduce::infer_cumulative, eval ops::reduce::eval_cumulative;
    /// `out[b..., m, n] = sum_k a[b..., m, k] * b[b..., k, n]`; batch extents equal, operand dtypes equal or integers
    /// of up to 16 bits.
    /// The result has dtype `out`: f16 and bf16 products accumulate in f32, integers in i32 or wider (wrapping).
    "matmul" = MatMul("a", "b") { out: DType } infer ops::matmul::infer, eval ops::matmul::eval;
    /// `softmax(scale * q k^T + mask) v` over the last two axes: `q[b..., s, e]`, `k[b..., t, e]`, `v[b..., t, d]`, `mask[b..., s, t]` added to
    /// the scaled scores. Scores and sums are f32 or wider. No importer makes it: rules find it.
    "attention" = Attention("q", "k", "v", "mask?") { scale: Real } infer ops::attention::infer, eval ops::attention::eval;
    /// What `attention` sums over each run of `part` keys, the last one shorter: `out[b..., p, s, ..d]` are the values of part `p` weighted by the
    /// exponentials of how far scores are below the largest, `out[b..., p, s, d]` the largest, `out[b..., p, s, d + 1]` the sum of the weights;
    /// of a part masked throughout 0, minus infinity and 0. The result is f32 or wider. No importer makes it: rules find it.
    "attention_parts" = AttentionParts("q", "k", "v", "mask?") { scale: Real, part: Dim } infer ops::attention::infer_parts, eval ops::attention::eval_parts;
    /// Cross-correlation of `x` (`[n, c, spatial...]` or `[n, spatial..., c]` by `layout`) with
    /// `w` (`[o, c / groups, kernel...]` in either layout); accumulates as `matmul` does. The result has the
    /// operands' dtype, i32 for narrower integers.
    "conv" = Conv("x", "w") { strides: Vec<usize>, dilations: Vec<usize>, lo: Vec<i64>, hi: Vec<i64>, groups: usize, layout: Layout } infer ops::conv::infer, eval ops::conv::eval;
    /// What each window of a convolution sees, side by side: `x[n, spatial..., c]` gives `[n, out..., width]`, element `tap * c + channel` (taps of
    /// `kernel` in row-major order) being `x` there, 0 in the padding and from `taps * c` on. No importer makes it: rules find it.
    "patches" = Patches("x") { kernel: Vec<usize>, strides: Vec<usize>, dilations: Vec<usize>, lo: Vec<i64>, hi: Vec<i64>, width: usize } infer ops::patches::infer, eval ops::patches::eval;
    /// The gradient of `conv` by its input: `w` is `[c, o / groups, kernel...]`; `extra` elements are added at
    /// the end of each spatial axis. Result dtype as for `conv`.
    "conv_transpose" = ConvTranspose("x", "w") { strides: Vec<usize>, dilations: Vec<usize>, lo: Vec<i64>, hi: Vec<i64>, extra: Vec<usize>, groups: usize, layout: Layout } infer ops::conv::infer_transpose, eval ops::conv::eval_transpose;
    /// The inputs of all tiles of `m` x `m` results of a convolution with windows of 3x3, transformed for `F(m x m, 3 x 3)` (arXiv
    /// 1509.09308; `m` is 2 or 4): `x[n, h, w, c]`, padded by `lo` and `hi`, gives `[(m + 2)^2, n * tiles down * tiles across, c]`. No importer
    /// makes it: rules find it.
    "winograd_input" = WinogradInput("x") { m: usize, lo: Vec<i64>, hi: Vec<i64> } infer ops::winograd::infer_input, eval ops::winograd::eval_input;
    /// Windows `w[o, c, 3, 3]` transformed for the same: `[(m + 2)^2, c, o]`.
    "winograd_filter" = WinogradFilter("w") { m: usize } infer ops::winograd::infer_filter, eval ops::winograd::eval_filter;
    /// Tiles of `m` x `m` results `[n, h, w, o]` (`shape`) from the sums over channels `x[(m + 2)^2, n * tiles down * tiles across, o]` of products of
    /// the two.
    "winograd_output" = WinogradOutput("x") { m: usize, shape: Vec<Dim> } infer ops::winograd::infer_output, eval ops::winograd::eval_output;
    /// Combine the elements of sliding windows over the spatial axes. `ceil` rounds the output extent up,
    /// dropping windows that would start in the padding at the end.
    "pool" = Pool("x") { f: PoolFn, kernel: Vec<usize>, strides: Vec<usize>, dilations: Vec<usize>, lo: Vec<i64>, hi: Vec<i64>, ceil: bool, layout: Layout } infer ops::pool::infer, eval ops::pool::eval;
    /// `out[a..., i..., b...] = data[a..., indices[i...], b...]` with `indices` in place of `axis`; negative
    /// indices count from the end; an index out of range is an evaluation error, and clamped by kernels.
    "gather" = Gather("data", "indices") { axis: usize } infer ops::gather::infer, eval ops::gather::eval;
    /// `out[i...] = data[i... with i[axis] = indices[i...]]`; indices as for `gather`.
    "gather_elements" = GatherElements("data", "indices") { axis: usize } infer ops::gather::infer_elements, eval ops::gather::eval_elements;
    /// `out[b..., i..., s...] = data[b..., indices[b..., i..., :], s...]`, the last axis of `indices` indexing
    /// the axes of `data` after the first `batch`.
    "gather_nd" = GatherNd("data", "indices") { batch: usize } infer ops::gather::infer_nd, eval ops::gather::eval_nd;
    /// A copy of `data` with `updates[i...]` combined into `data[i... with i[axis] = indices[i...]]`.
    "scatter_elements" = ScatterElements("data", "indices", "updates") { axis: usize, f: ScatterFn } infer ops::gather::infer_scatter_elements, eval ops::gather::eval_scatter_elements;
    /// A copy of `data` with `updates[i..., s...]` combined into `data[indices[i..., :], s...]`.
    "scatter_nd" = ScatterNd("data", "indices", "updates") { f: ScatterFn } infer ops::gather::infer_scatter_nd, eval ops::gather::eval_scatter_nd;
    /// Resample every axis to `sizes` by `scales` (out / in, as given by the model, one an axis). Coordinates outside the
    /// input clamp to its edge; `tf_crop_and_resize` reads `roi` and gives `outside` beyond the input.
    /// `antialias` widens the filter when downsampling; `exclude` drops weights outside the input and renormalises.
    "resize" = Resize("x", "roi?") { mode: ResizeMode, coord: CoordMode, nearest: NearestMode, sizes: Vec<Dim>, scales: Vec<Real>, cubic_a: Real, outside: Real, antialias: bool, exclude: bool } infer ops::resize::infer, eval ops::resize::eval;
    /// The `k` largest (or smallest) elements along `axis`, in order, and their positions (i64). Equals are taken first position first.
    "topk" = TopK("x") { axis: usize, k: Dim, largest: bool } infer ops::sort::infer_topk, eval ops::sort::eval_topk;
    /// Positions of the non-zero elements, `i64[rank, sym]` in row-major order; defines the symbol `sym`.
    "nonzero" = NonZero("x") { sym: Sym } infer ops::sort::infer_nonzero, eval ops::sort::eval_nonzero;
    /// Long short-term memory over `x[t, n, i]` (ONNX `LSTM`, gates in order i, o, f, c): `w[d, 4h, i]`, `r[d, 4h, h]`, `b[d, 8h]`,
    /// `h0[d, n, h]`, `c0[d, n, h]`, peepholes `p[d, 3h]` (i, o, f), `lens[n]` i32 (steps at and after a length give 0 and keep the state).
    /// Results `y[t, d, n, h]`, `h[d, n, h]`, `c[d, n, h]`. `activations` has f, g, h for each direction; a positive `clip` bounds gate inputs.
    "lstm" = Lstm("x", "w", "r", "b", "h0", "c0", "p", "lens") { direction: Direction, activations: Vec<Activation>, clip: Real, coupled: bool } infer ops::rnn::infer_lstm, eval ops::rnn::eval_lstm;
    /// Gated recurrent unit (ONNX `GRU`, gates z, r, h): `w[d, 3h, i]`, `r[d, 3h, h]`, `b[d, 6h]`, `h0[d, n, h]`, `lens[n]`; results `y[t, d, n, h]`, `h[d, n, h]`.
    "gru" = Gru("x", "w", "r", "b", "h0", "lens") { direction: Direction, activations: Vec<Activation>, clip: Real, linear_before_reset: bool } infer ops::rnn::infer_gru, eval ops::rnn::eval_gru;
    /// Plain recurrence (ONNX `RNN`): `w[d, h, i]`, `r[d, h, h]`, `b[d, 2h]`, `h0[d, n, h]`, `lens[n]`; results `y[t, d, n, h]`, `h[d, n, h]`.
    "rnn" = Rnn("x", "w", "r", "b", "h0", "lens") { direction: Direction, activations: Vec<Activation>, clip: Real } infer ops::rnn::infer_rnn, eval ops::rnn::eval_rnn;
    /// Decision trees over rows of `x[n, features]` (f32 or f64): node `i` goes to `yes[i]` where `x[feature[i]] MODE threshold[i]` holds, else to
    /// `no[i]`; MODE is `mode[i]`: 0 `<=`, 1 `<`, 2 `>=`, 3 `>`, 4 `==`, 5 `!=`, 6 leaf; NaN goes to `yes` where `missing[i]` is 1.
    /// Leaf `i` adds `weight[j]` to target `target[j]` for `yes[i] <= j < no[i]`. `roots` are the trees. Result `[n, targets]` of x's dtype.
    /// Of an aggregate of min or max, a target that no leaf names is 0.
    "tree_ensemble" = TreeEnsemble("x", "feature", "mode", "threshold", "yes", "no", "missing", "roots", "target", "weight") { targets: usize, aggregate: Aggregate } infer ops::tree::infer, eval ops::tree::eval;
    /// `cond` (bool scalar) picks the first or the second body; each takes `captures` and gives as many results of equal dtypes and ranks.
    /// Where their extents differ, the result's is the next symbol of `sizes`, which the op defines.
    "if" = If("cond", "captures...") { sizes: Sizes } infer ops::control::infer_if, eval ops::control::eval_if;
    /// ONNX `Loop`: operands are the trip count (i64 scalar; negative is without limit), the first condition (bool scalar), `carried` values, then captures.
    /// The body takes (iteration i64, condition, carried..., captures...) and gives (condition, carried..., scanned...).
    /// Results: the carried values, then the scanned values stacked on a new first axis of extent `trips`, a symbol the loop defines.
    /// A carried extent stays as it is, or the body declares it as a symbol of its own, bound in each iteration: then, and where a
    /// scanned extent depends on what only the body knows (all slices must agree; it is 0 where there are none), the result's is the next symbol of `sizes`.
    "loop" = Loop("trip", "cond", "values...") { carried: usize, trips: Sym, sizes: Sizes } infer ops::control::infer_loop, eval ops::control::eval_loop;
}
