//! Sequences and optionals.
//!
//! A sequence whose elements are known one by one is a list of values, and costs nothing. Any other is two tensors
//! ([`Packed`]): the elements of all its tensors one after another, and a row of extents for each tensor; its tensors have
//! one rank. So is a sequence that goes into or out of a graph, or is carried by control flow: the port `x` of a model is
//! `x.data` and `x.shapes` of its graph. An optional is what it may hold and whether it does, `x.present`.
use super::dynamic::{bind_one, choose, combine, count_to, element, length, vector};
use crate::onnx::{
    build::{Builder, Composite, Packed, Res, Stop, Val, invalid, missing},
    cx::Cx,
    tensors::dtype_of,
};
use onnx_protobuf::TypeProto;
use pavage_ir::{DType, Dim, Op, Scalar, ScalarFn, Sym, Tensor, TensorType, attr::ReduceFn, dim::Atom};

// Ports of a model.

/// The type of a port that is no tensor.
pub(crate) enum Declared<'m> {
    /// Of tensors of this type.
    Sequence(&'m TypeProto),
    Optional(&'m TypeProto),
}

/// What a declared type says, if it is no tensor.
pub(crate) fn declared(ty: &TypeProto) -> Option<Declared<'_>> {
    if ty.has_sequence_type() {
        Some(Declared::Sequence(&ty.sequence_type().elem_type))
    } else if ty.has_optional_type() {
        Some(Declared::Optional(&ty.optional_type().elem_type))
    } else {
        None
    }
}

/// An extent that the model's inputs decide, and that may be 0.
fn size(b: &mut Builder, name: &str) -> Dim {
    let name = b.unique_symbol(name);
    b.input_symbols.insert(name.clone());
    let dim = Dim::from(Atom::Sym(Sym { name: name.as_str().into(), min: 0, max: None }));
    b.relations.resolve(&dim)
}

/// The extents of a declared tensor type, and its dtype.
fn tensor_type(ty: &TypeProto) -> Res<(DType, Option<Vec<Option<i64>>>)> {
    if !ty.has_tensor_type() {
        return missing("sequences or optionals of anything but tensors");
    }
    let tensor = ty.tensor_type();
    let dtype = dtype_of(tensor.elem_type).map_err(Stop::Missing)?;
    if dtype == DType::Str {
        return missing("string inputs");
    }
    let extent = |d: &onnx_protobuf::tensor_shape_proto::Dimension| (d.has_dim_value() && d.dim_value() >= 0).then(|| d.dim_value());
    Ok((dtype, tensor.shape.as_ref().map(|s| s.dim.iter().map(extent).collect())))
}

/// The inputs that stand for one that is no tensor.
pub(crate) fn input(b: &mut Builder, name: &str, ty: &Declared) -> Res<Val> {
    match ty {
        Declared::Sequence(of) => {
            let (dtype, shape) = tensor_type(of)?;
            let (total, count) = (size(b, &format!("{name}_total")), size(b, &format!("{name}_count")));
            // Exporters leave the extents of a sequence's tensors out, and call them scalars then.
            let rank = match shape.map_or(0, |s| s.len()) {
                0 => {
                    let rank = size(b, &format!("{name}_rank"));
                    b.ranks.extend(rank.symbols().iter().map(|s| s.name.to_string()));
                    rank
                }
                n => Dim::from(n),
            };
            let data = b.input(&format!("{name}.data"), TensorType { dtype, shape: vec![total] });
            let shapes = b.input(&format!("{name}.shapes"), TensorType { dtype: DType::I64, shape: vec![count, rank] });
            Ok(b.compose(dtype, Composite::Packed(Packed { data, shapes })))
        }
        Declared::Optional(of) => {
            let present = b.input(&format!("{name}.present"), TensorType { dtype: DType::Bool, shape: vec![] });
            let value = match declared(of) {
                Some(inner) => input(b, name, &inner)?,
                None => {
                    let (dtype, shape) = tensor_type(of)?;
                    let Some(shape) = shape else { return missing("inputs of unknown rank") };
                    let shape = shape.into_iter().enumerate().map(|(i, d)| d.map_or_else(|| size(b, &format!("{name}_{i}")), Dim::from)).collect();
                    b.input(name, TensorType { dtype, shape })
                }
            };
            Ok(b.compose(b.dtype(value), Composite::Optional { present, value }))
        }
    }
}

/// The tensors that stand for an output, with their names.
pub(crate) fn ports(b: &mut Builder, name: &str, v: Val) -> Res<Vec<(String, Val)>> {
    match b.composite(v).cloned() {
        None => Ok(vec![(name.into(), v)]),
        Some(Composite::List(_) | Composite::Packed(_)) => {
            let p = pack(b, v)?;
            Ok(vec![(format!("{name}.data"), p.data), (format!("{name}.shapes"), p.shapes)])
        }
        Some(Composite::Optional { present, value }) => {
            let mut all = vec![(format!("{name}.present"), present)];
            all.extend(ports(b, name, value)?);
            Ok(all)
        }
        Some(Composite::Nothing) => {
            let absent = truth(b, false);
            Ok(vec![(format!("{name}.present"), absent)])
        }
    }
}

// Values that are no tensors, as tensors for control flow.

/// How a value is made of tensors.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Layout {
    Tensor(DType),
    Sequence(DType),
    Optional(Box<Layout>),
    Nothing,
}

pub(crate) fn layout(b: &Builder, v: Val) -> Layout {
    match b.composite(v) {
        None => Layout::Tensor(b.dtype(v)),
        Some(Composite::List(_) | Composite::Packed(_)) => Layout::Sequence(b.dtype(v)),
        Some(Composite::Optional { value, .. }) => Layout::Optional(Box::new(layout(b, *value))),
        Some(Composite::Nothing) => Layout::Nothing,
    }
}

impl Layout {
    /// One that both values fit.
    pub(crate) fn join(&self, other: &Layout) -> Res<Layout> {
        match (self, other) {
            (a, b) if a == b => Ok(a.clone()),
            (Layout::Nothing, b) => Ok(b.clone().optional()),
            (a, Layout::Nothing) => Ok(a.clone().optional()),
            (Layout::Optional(a), b) => Ok(a.join(b)?.optional()),
            (a, Layout::Optional(b)) => Ok(a.join(b)?.optional()),
            _ => invalid("a tensor meets a sequence, or another element type"),
        }
    }

    fn optional(self) -> Layout {
        if matches!(self, Layout::Optional(_)) { self } else { Layout::Optional(Box::new(self)) }
    }
}

fn truth(b: &mut Builder, v: bool) -> Val {
    b.constant(Tensor::scalar(DType::Bool, Scalar::B(v)))
}

/// The tensors of a value under a layout that it fits.
pub(crate) fn flatten(b: &mut Builder, v: Val, layout: &Layout) -> Res<Vec<Val>> {
    match (layout, b.composite(v).cloned()) {
        (Layout::Tensor(_), None) => Ok(vec![v]),
        (Layout::Sequence(_), Some(Composite::List(_) | Composite::Packed(_))) => {
            let p = pack(b, v)?;
            Ok(vec![p.data, p.shapes])
        }
        (Layout::Optional(of), Some(Composite::Optional { present, value })) => {
            let mut all = vec![present];
            all.extend(flatten(b, value, of)?);
            Ok(all)
        }
        (Layout::Optional(of), Some(Composite::Nothing)) => {
            let Layout::Sequence(dtype) = **of else { return missing("an optional tensor without a value where control flow may give one") };
            let empty = b.compose(dtype, Composite::List(vec![]));
            let mut all = vec![truth(b, false)];
            all.extend(flatten(b, empty, of)?);
            Ok(all)
        }
        (Layout::Optional(of), _) => {
            let mut all = vec![truth(b, true)];
            all.extend(flatten(b, v, of)?);
            Ok(all)
        }
        (Layout::Nothing, Some(Composite::Nothing)) => Ok(vec![]),
        _ => invalid("a tensor meets a sequence or an optional"),
    }
}

/// A value of these tensors.
pub(crate) fn unflatten(b: &mut Builder, layout: &Layout, parts: &mut dyn Iterator<Item = Val>) -> Res<Val> {
    let mut next = || parts.next().map_or_else(|| invalid("a part is missing"), Ok);
    Ok(match layout {
        Layout::Tensor(_) => next()?,
        Layout::Sequence(dtype) => {
            let packed = Packed { data: next()?, shapes: next()? };
            b.compose(*dtype, Composite::Packed(packed))
        }
        Layout::Optional(of) => {
            let present = next()?;
            let value = unflatten(b, of, parts)?;
            b.compose(b.dtype(value), Composite::Optional { present, value })
        }
        Layout::Nothing => b.compose(DType::F32, Composite::Nothing),
    })
}

// Packed sequences.

/// The extents of a tensor as a row.
fn row(b: &mut Builder, v: Val) -> Val {
    let shape = b.shape(v);
    b.known_dims(DType::I64, &[1, shape.len()], shape)
}

fn flat(b: &mut Builder, v: Val) -> Res<Val> {
    let n = b.ty(v).count();
    b.reshape(v, vec![n])
}

/// A sequence in two tensors.
fn pack(b: &mut Builder, v: Val) -> Res<Packed> {
    match b.composite(v).cloned() {
        Some(Composite::Packed(p)) => Ok(p),
        Some(Composite::List(list)) => match list.first() {
            None => {
                let data = b.constant(Tensor::new(b.dtype(v), [0], vec![]).map_err(|e| Stop::Invalid(e.to_string()))?);
                let name = b.unique_symbol("rank");
                b.ranks.insert(name.clone());
                let rank = Dim::from(Atom::Sym(Sym { name: name.as_str().into(), min: 0, max: None }));
                let rank = b.relations.resolve(&rank);
                let shapes = b.emit(Op::Iota { dtype: DType::I64, shape: vec![Dim::ZERO, rank], axis: 0 }, &[])?;
                Ok(Packed { data, shapes })
            }
            Some(first) => {
                if list.iter().any(|v| b.rank(*v) != b.rank(*first)) {
                    return missing("a sequence of tensors of different ranks whose length data decides, or that leaves the graph");
                }
                let data = list.iter().map(|v| flat(b, *v)).collect::<Res<Vec<_>>>()?;
                let rows: Vec<Val> = list.iter().map(|v| row(b, *v)).collect();
                Ok(Packed { data: b.emit(Op::Concat { axis: 0 }, &data)?, shapes: b.emit(Op::Concat { axis: 0 }, &rows)? })
            }
        },
        _ => invalid("a sequence is needed"),
    }
}

fn unpack(b: &mut Builder, p: Packed) -> Val {
    let dtype = b.dtype(p.data);
    b.compose(dtype, Composite::Packed(p))
}

/// Holds the rank of a sequence's tensors against one that is known; learns it where it was not.
fn has_rank(b: &mut Builder, p: Packed, rank: usize) -> Res<()> {
    let declared = b.shape(p.shapes)[1].clone();
    match declared.as_const() {
        Some(n) if n == rank as i64 => Ok(()),
        Some(n) => missing(format!("tensors of {n} and {rank} axes in one sequence whose length data decides")),
        None => match declared.symbols().first() {
            Some(s) if b.ranks.contains(s.name.as_ref()) => {
                b.relations.equal.insert(s.name.to_string(), Dim::from(rank));
                Err(Stop::Retry)
            }
            _ => missing("tensors of unknown rank"),
        },
    }
}

/// The rank of a sequence's tensors; scalars where nothing else was ever said.
fn rank(b: &mut Builder, p: Packed) -> Res<usize> {
    let declared = b.shape(p.shapes)[1].clone();
    match declared.as_const() {
        Some(n) => Ok(n.max(0) as usize),
        None => has_rank(b, p, 0).map(|()| 0),
    }
}

/// How many tensors there are.
fn count(b: &mut Builder, p: Packed) -> Val {
    let n = b.shape(p.shapes)[0].clone();
    b.known_dims(DType::I64, &[], vec![n])
}

/// How many elements each tensor has: a vector.
fn counts(b: &mut Builder, p: Packed) -> Res<Val> {
    combine(b, ReduceFn::Prod, p.shapes, 1)
}

/// A place among `n`, counted from the end where negative, and whether there is such a place.
fn place(b: &mut Builder, at: Val, n: Val) -> Res<(Val, Val)> {
    let at = b.cast(at, DType::I64)?;
    let at = b.reshape(at, vec![])?;
    let negative = b.with_number(ScalarFn::Lt, at, 0.0)?;
    let wrapped = b.map(ScalarFn::Add, &[at, n])?;
    let at = choose(b, negative, wrapped, at)?;
    let least = b.with_number(ScalarFn::Ge, at, 0.0)?;
    let most = b.map(ScalarFn::Lt, &[at, n])?;
    Ok((at, b.map(ScalarFn::And, &[least, most])?))
}

/// Elements of the tensors before the one at `at`.
fn offset(b: &mut Builder, p: Packed, at: Val) -> Res<Val> {
    let counts = counts(b, p)?;
    let n = b.shape(p.shapes)[0].clone();
    let i = count_to(b, &n)?;
    let before = b.pointwise(ScalarFn::Lt, &[i, at])?;
    let zero = b.scalar(DType::I64, 0.0);
    let counts = choose(b, before, counts, zero)?;
    combine(b, ReduceFn::Sum, counts, 0)
}

/// `x` without `size` rows from `at` on, `between` in their place.
fn splice(b: &mut Builder, x: Val, at: &Dim, size: &Dim, between: Option<Val>) -> Res<Val> {
    let n = b.shape(x)[0].clone();
    let head = b.slice_axis(x, 0, Dim::ZERO, at.clone())?;
    let rest = at.clone() + size.clone();
    let tail = b.slice_axis(x, 0, rest.clone(), n - rest)?;
    let parts: Vec<Val> = [Some(head), between, Some(tail)].into_iter().flatten().collect();
    b.emit(Op::Concat { axis: 0 }, &parts)
}

// Operators.

/// A list and a place in it, where both are known.
fn known(cx: &Cx, seq: Val, at: Option<Val>, default: i64, inclusive: bool) -> Res<Option<(Vec<Val>, usize)>> {
    let Some(Composite::List(list)) = cx.composite(seq) else { return Ok(None) };
    let at = match at {
        None => default,
        Some(v) => match cx.dims(v).as_deref().and_then(|d| d.first()).and_then(Dim::as_const) {
            Some(at) => at,
            None => return Ok(None),
        },
    };
    let n = list.len() as i64;
    let index = if at < 0 { at + n } else { at };
    if index < 0 || index > n || (index == n && !inclusive) {
        return invalid(format!("place {at} of a sequence of {n}"));
    }
    Ok(Some((list.clone(), index as usize)))
}

pub(crate) fn empty(cx: &mut Cx) -> Res<Vec<Val>> {
    let dtype = cx.dtype_attr("dtype")?.unwrap_or(DType::F32);
    Ok(vec![cx.compose(dtype, Composite::List(vec![]))])
}

pub(crate) fn construct(cx: &mut Cx) -> Res<Vec<Val>> {
    let list = cx.args()?;
    let Some(first) = list.first() else { return invalid("no operands") };
    let dtype = cx.dtype(*first);
    if list.iter().any(|v| cx.dtype(*v) != dtype) {
        return invalid("tensors of different element types");
    }
    Ok(vec![cx.compose(dtype, Composite::List(list))])
}

pub(crate) fn len(cx: &mut Cx) -> Res<Vec<Val>> {
    let seq = cx.any(0)?;
    Ok(vec![count_of(cx, seq)?])
}

pub(crate) fn at(cx: &mut Cx) -> Res<Vec<Val>> {
    let (seq, index, name) = (cx.any(0)?, cx.arg(1)?, cx.name.clone());
    match known(cx, seq, Some(index), 0, false)? {
        Some((list, i)) => Ok(vec![list[i]]),
        None => Ok(vec![element_at(cx, seq, index, &name)?]),
    }
}

/// The tensor at a place that data decides.
pub(crate) fn element_at(b: &mut Builder, seq: Val, index: Val, name: &str) -> Res<Val> {
    let p = pack(b, seq)?;
    let rank = rank(b, p)?;
    let n = count(b, p);
    let (at, valid) = place(b, index, n)?;
    let first = offset(b, p, at)?;
    let mut shape = vec![];
    if rank > 0 {
        let at = b.reshape(at, vec![Dim::one()])?;
        let row = b.emit(Op::Gather { axis: 0 }, &[p.shapes, at])?;
        let row = b.reshape(row, vec![Dim::from(rank)])?;
        shape = super::dynamic::bind(b, row, valid, name)?;
    }
    let total: Dim = shape.iter().cloned().product();
    let places = count_to(b, &total)?;
    let places = b.pointwise(ScalarFn::Add, &[places, first])?;
    let out = b.emit(Op::Gather { axis: 0 }, &[p.data, places])?;
    b.reshape(out, shape)
}

/// How many tensors a sequence has, as an i64 scalar.
pub(crate) fn count_of(b: &mut Builder, seq: Val) -> Res<Val> {
    if let Some(Composite::List(list)) = b.composite(seq) {
        let n = list.len() as f64;
        return Ok(b.scalar(DType::I64, n));
    }
    let p = pack(b, seq)?;
    Ok(count(b, p))
}

/// A sequence without tensors, for tensors of a declared type.
pub(crate) fn empty_like(b: &mut Builder, ty: &TypeProto) -> Res<Val> {
    let (dtype, _) = tensor_type(ty)?;
    Ok(b.compose(dtype, Composite::List(vec![])))
}

/// A sequence with one more tensor at its end.
pub(crate) fn append(b: &mut Builder, seq: Val, v: Val) -> Res<Val> {
    let p = pack(b, seq)?;
    if b.dtype(p.data) != b.dtype(v) {
        return invalid(format!("{} into a sequence of {}", b.ty(v), b.dtype(p.data)));
    }
    let own = b.rank(v);
    has_rank(b, p, own)?;
    let (elements, extents) = (flat(b, v)?, row(b, v));
    let data = b.emit(Op::Concat { axis: 0 }, &[p.data, elements])?;
    let shapes = b.emit(Op::Concat { axis: 0 }, &[p.shapes, extents])?;
    Ok(unpack(b, Packed { data, shapes }))
}

pub(crate) fn insert(cx: &mut Cx) -> Res<Vec<Val>> {
    let (seq, v, at, name) = (cx.any(0)?, cx.arg(1)?, cx.opt(2), cx.name.clone());
    let end = match cx.composite(seq) {
        Some(Composite::List(list)) => list.len() as i64,
        _ => 0,
    };
    if let Some((mut list, i)) = known(cx, seq, at, end, true)? {
        list.insert(i, v);
        let dtype = cx.dtype(v);
        return Ok(vec![cx.compose(dtype, Composite::List(list))]);
    }
    let Some(at) = at else { return Ok(vec![append(cx, seq, v)?]) };
    let p = pack(cx, seq)?;
    if cx.dtype(p.data) != cx.dtype(v) {
        return invalid(format!("{} into a sequence of {}", cx.ty(v), cx.dtype(p.data)));
    }
    let own = cx.rank(v);
    has_rank(cx, p, own)?;
    let (elements, extents) = (flat(cx, v)?, row(cx, v));
    // A new place may be the end: one more than there are.
    let n = count(cx, p);
    let at = cx.cast(at, DType::I64)?;
    let at = cx.reshape(at, vec![])?;
    let negative = cx.with_number(ScalarFn::Lt, at, 0.0)?;
    let wrapped = cx.map(ScalarFn::Add, &[at, n])?;
    let at = choose(cx, negative, wrapped, at)?;
    let least = cx.with_number(ScalarFn::Ge, at, 0.0)?;
    let most = cx.map(ScalarFn::Le, &[at, n])?;
    let valid = cx.map(ScalarFn::And, &[least, most])?;
    let first = offset(cx, p, at)?;
    let (at, first) = (bind_one(cx, at, valid, &name)?, bind_one(cx, first, valid, &name)?);
    let data = splice(cx, p.data, &first, &Dim::ZERO, Some(elements))?;
    let shapes = splice(cx, p.shapes, &at, &Dim::ZERO, Some(extents))?;
    Ok(vec![unpack(cx, Packed { data, shapes })])
}

pub(crate) fn erase(cx: &mut Cx) -> Res<Vec<Val>> {
    let (seq, at, name) = (cx.any(0)?, cx.opt(1), cx.name.clone());
    if let Some((mut list, i)) = known(cx, seq, at, -1, false)? {
        list.remove(i);
        let dtype = cx.dtype(seq);
        return Ok(vec![cx.compose(dtype, Composite::List(list))]);
    }
    let p = pack(cx, seq)?;
    let n = count(cx, p);
    let at = at.unwrap_or_else(|| cx.scalar(DType::I64, -1.0));
    let (at, valid) = place(cx, at, n)?;
    let first = offset(cx, p, at)?;
    let next = cx.with_number(ScalarFn::Add, at, 1.0)?;
    let end = offset(cx, p, next)?;
    let size = cx.map(ScalarFn::Sub, &[end, first])?;
    let [at, first, size] = [at, first, size].map(|v| bind_one(cx, v, valid, &name));
    let packed = Packed { data: splice(cx, p.data, &first?, &size?, None)?, shapes: splice(cx, p.shapes, &at?, &Dim::one(), None)? };
    Ok(vec![unpack(cx, packed)])
}

pub(crate) fn split(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, given, name) = (cx.arg(0)?, cx.opt(1), cx.name.clone());
    let (shape, dtype) = (cx.shape(x), cx.dtype(x));
    let axis = cx.axis(cx.int("axis", 0)?, shape.len())?;
    let extent = shape[axis].clone();
    let keep = given.is_some() || cx.flag("keepdims", true)?;
    // Sizes that are known make a list.
    let sizes: Option<Vec<i64>> = match (given, extent.as_const()) {
        (None, Some(n)) => Some(vec![1; n.max(0) as usize]),
        (Some(v), Some(n)) => match cx.known_ints(1) {
            Some(sizes) if cx.rank(v) == 0 && sizes[0] > 0 => Some((0..n).step_by(sizes[0] as usize).map(|at| sizes[0].min(n - at)).collect()),
            Some(sizes) if cx.rank(v) == 1 => Some(sizes),
            Some(_) => return invalid("parts of no element"),
            None => None,
        },
        _ => None,
    };
    if let Some(sizes) = sizes.filter(|s| s.len() <= 1 << 12) {
        if sizes.iter().any(|s| *s < 0) || sizes.iter().sum::<i64>() != extent.as_const().unwrap_or(-1) {
            return invalid(format!("parts of {sizes:?} elements of {extent}"));
        }
        let mut list = vec![];
        let mut start = 0;
        for size in sizes {
            let part = cx.slice_axis(x, axis, Dim::from(start), Dim::from(size))?;
            list.push(if keep { part } else { super::reduce::drop_axes(cx, part, &[axis])? });
            start += size;
        }
        return Ok(vec![cx.compose(dtype, Composite::List(list))]);
    }
    let total = cx.known_dims(DType::I64, &[], vec![extent.clone()]);
    // First and size of each part.
    let sizes = match given {
        Some(v) if cx.rank(v) == 1 => {
            length(cx, v, "part sizes")?;
            let v = vector(cx, v)?;
            let sum = combine(cx, ReduceFn::Sum, v, 0)?;
            let all = cx.map(ScalarFn::Eq, &[sum, total])?;
            let n = cx.shape(v)[0].clone();
            let n = cx.known_dims(DType::I64, &[], vec![n]);
            let n = bind_one(cx, n, all, &name)?;
            let i = count_to(cx, &n)?;
            cx.emit(Op::Gather { axis: 0 }, &[v, i])?
        }
        given => {
            let each = match given {
                Some(v) => {
                    let v = cx.cast(v, DType::I64)?;
                    cx.reshape(v, vec![])?
                }
                None => cx.scalar(DType::I64, 1.0),
            };
            let some = cx.with_number(ScalarFn::Gt, each, 0.0)?;
            let safe = cx.with_number(ScalarFn::Max, each, 1.0)?;
            let up = cx.map(ScalarFn::Add, &[total, safe])?;
            let up = cx.with_number(ScalarFn::Sub, up, 1.0)?;
            let n = cx.map(ScalarFn::Div, &[up, safe])?;
            let n = bind_one(cx, n, some, &name)?;
            let i = count_to(cx, &n)?;
            let first = cx.pointwise(ScalarFn::Mul, &[i, safe])?;
            let left = cx.pointwise(ScalarFn::Sub, &[total, first])?;
            cx.pointwise(ScalarFn::Min, &[left, safe])?
        }
    };
    let parts = cx.shape(sizes)[0].clone();
    // A row of extents a part.
    let mut rows = vec![];
    for (a, d) in shape.iter().enumerate() {
        if a == axis && !keep {
            continue;
        }
        let column = if a == axis { sizes } else { cx.known_dims(DType::I64, &[1], vec![d.clone()]) };
        let column = cx.broadcast_to(column, std::slice::from_ref(&parts))?;
        rows.push(cx.reshape(column, vec![parts.clone(), Dim::one()])?);
    }
    let shapes = if rows.is_empty() {
        cx.emit(Op::Iota { dtype: DType::I64, shape: vec![parts, Dim::ZERO], axis: 0 }, &[])?
    } else {
        cx.emit(Op::Concat { axis: 1 }, &rows)?
    };
    let data = if axis == 0 {
        flat(cx, x)?
    } else {
        let outer: Dim = shape[..axis].iter().cloned().product();
        let inner: Dim = shape[axis + 1..].iter().cloned().product();
        let at = regroup(cx, sizes, [&outer, &extent, &inner])?;
        let x = flat(cx, x)?;
        cx.emit(Op::Gather { axis: 0 }, &[x, at])?
    };
    Ok(vec![unpack(cx, Packed { data, shapes })])
}

/// For each element of the parts of `[outer, extent, inner]` along its middle axis, one part after another: its place in
/// the whole.
fn regroup(b: &mut Builder, sizes: Val, [outer, extent, inner]: [&Dim; 3]) -> Res<Val> {
    let scalar = |b: &mut Builder, d: Dim| b.known_dims(DType::I64, &[], vec![d]);
    let slab = scalar(b, outer.clone() * inner.clone());
    let lengths = b.pointwise(ScalarFn::Mul, &[sizes, slab])?;
    let sum = |b: &mut Builder, v: Val, exclusive: bool| b.emit(Op::Cumulative { f: ReduceFn::Sum, axis: 0, exclusive, reverse: false }, &[v]);
    let (ends, starts, first) = (sum(b, lengths, false)?, sum(b, lengths, true)?, sum(b, sizes, true)?);
    let t = count_to(b, &(outer.clone() * extent.clone() * inner.clone()))?;
    // The part of an element: as many as end at or before it.
    let n = b.ty(t).count();
    let column = b.reshape(t, vec![n, Dim::one()])?;
    let row = b.as_row(ends)?;
    let done = b.pointwise(ScalarFn::Le, &[row, column])?;
    let done = b.cast(done, DType::I64)?;
    let part = combine(b, ReduceFn::Sum, done, 1)?;
    let pick = |b: &mut Builder, v: Val| b.emit(Op::Gather { axis: 0 }, &[v, part]);
    let (start, size, first) = (pick(b, starts)?, pick(b, sizes)?, pick(b, first)?);
    let inner = scalar(b, inner.clone());
    let line = b.pointwise(ScalarFn::Mul, &[size, inner])?;
    let local = b.map(ScalarFn::Sub, &[t, start])?;
    let o = b.map(ScalarFn::Div, &[local, line])?;
    let done = b.map(ScalarFn::Mul, &[o, line])?;
    let rest = b.map(ScalarFn::Sub, &[local, done])?;
    let extent = scalar(b, extent.clone());
    let row = b.pointwise(ScalarFn::Mul, &[o, extent])?;
    let row = b.map(ScalarFn::Add, &[row, first])?;
    let row = b.pointwise(ScalarFn::Mul, &[row, inner])?;
    b.map(ScalarFn::Add, &[row, rest])
}

pub(crate) fn concat(cx: &mut Cx) -> Res<Vec<Val>> {
    let (seq, name) = (cx.any(0)?, cx.name.clone());
    let (stack, axis) = (cx.flag("new_axis", false)?, cx.int("axis", 0)?);
    if let Some(Composite::List(list)) = cx.composite(seq).cloned() {
        let Some(first) = list.first() else { return invalid("an empty sequence") };
        let axis = cx.axis(axis, cx.rank(*first) + usize::from(stack))?;
        let mut parts = vec![];
        for v in &list {
            let mut shape = cx.shape(*v);
            if stack {
                shape.insert(axis, Dim::one());
            }
            parts.push(cx.reshape(*v, shape)?);
        }
        return Ok(vec![super::view::concat_along(cx, &parts, axis)?]);
    }
    let p = pack(cx, seq)?;
    let rank = rank(cx, p)?;
    let axis = cx.axis(axis, rank + usize::from(stack))?;
    let n = cx.shape(p.shapes)[0].clone();
    // All tensors are as large as the first, but along the axis.
    let zero = cx.ints(&[0]);
    let some = count(cx, p);
    let some = cx.with_number(ScalarFn::Gt, some, 0.0)?;
    let first = cx.emit(Op::Gather { axis: 0 }, &[p.shapes, zero])?;
    let same = cx.pointwise(ScalarFn::Eq, &[p.shapes, first])?;
    let mut free = vec![0; rank];
    if !stack {
        free[axis] = 1;
    }
    let free = cx.ints(&free);
    let free = cx.with_number(ScalarFn::Gt, free, 0.0)?;
    let same = cx.pointwise(ScalarFn::Or, &[same, free])?;
    let same = cx.cast(same, DType::I64)?;
    let same = super::reduce::reduce(cx, ReduceFn::Min, same, &[0, 1])?;
    let same = cx.reshape(same, vec![])?;
    let same = cx.with_number(ScalarFn::Gt, same, 0.0)?;
    let valid = cx.map(ScalarFn::And, &[some, same])?;
    let first = cx.reshape(first, vec![Dim::from(rank)])?;
    if stack {
        let mut shape = super::dynamic::bind(cx, first, valid, &name)?;
        shape.insert(0, n);
        let whole = cx.reshape(p.data, shape)?;
        let mut perm: Vec<usize> = (1..=rank).collect();
        perm.insert(axis, 0);
        return Ok(vec![cx.transpose(whole, &perm)?]);
    }
    let along = cx.slice_axis(p.shapes, 1, Dim::from(axis), Dim::one())?;
    let along = cx.reshape(along, vec![n])?;
    let total = combine(cx, ReduceFn::Sum, along, 0)?;
    let mut shape = vec![];
    for a in 0..rank {
        let v = if a == axis { total } else { element(cx, first, a)? };
        shape.push(bind_one(cx, v, valid, &name)?);
    }
    if axis == 0 {
        return Ok(vec![cx.reshape(p.data, shape)?]);
    }
    let outer: Dim = shape[..axis].iter().cloned().product();
    let inner: Dim = shape[axis + 1..].iter().cloned().product();
    // Where each element of the parts belongs: scattered there.
    let at = regroup(cx, along, [&outer, &shape[axis], &inner])?;
    let whole: Dim = shape.iter().cloned().product();
    let data = cx.reshape(p.data, vec![whole])?;
    let out = cx.emit(Op::ScatterElements { axis: 0, f: pavage_ir::attr::ScatterFn::Replace }, &[data, at, data])?;
    Ok(vec![cx.reshape(out, shape)?])
}

pub(crate) fn optional(cx: &mut Cx) -> Res<Vec<Val>> {
    let Some(value) = cx.opt(0) else { return Ok(vec![cx.compose(DType::F32, Composite::Nothing)]) };
    let present = truth(cx, true);
    let dtype = cx.dtype(value);
    Ok(vec![cx.compose(dtype, Composite::Optional { present, value })])
}

pub(crate) fn has_element(cx: &mut Cx) -> Res<Vec<Val>> {
    let Some(v) = cx.opt(0) else { return Ok(vec![truth(cx, false)]) };
    Ok(vec![match cx.composite(v) {
        Some(Composite::Optional { present, .. }) => *present,
        Some(Composite::Nothing) => truth(cx, false),
        _ => truth(cx, true),
    }])
}

pub(crate) fn get_element(cx: &mut Cx) -> Res<Vec<Val>> {
    let v = cx.any(0)?;
    let (present, value) = match cx.composite(v) {
        Some(Composite::Optional { present, value }) => (*present, *value),
        Some(Composite::Nothing) => return invalid("the optional has no value"),
        _ => return Ok(vec![v]),
    };
    if cx.tensor(present).is_some_and(|t| t.get(0).b()) {
        return Ok(vec![value]);
    }
    // A run in which there is no value fails: the elements are read from a place that must be 0.
    let absent = cx.map(ScalarFn::Not, &[present])?;
    let none = super::signal::bounded_size(cx, absent, 0, Some(0))?;
    let checked = |cx: &mut Cx, v: Val| {
        let (shape, count) = (cx.shape(v), cx.ty(v).count());
        let flat = cx.reshape(v, vec![count.clone()])?;
        let flat = cx.slice_axis(flat, 0, none.clone(), count)?;
        cx.reshape(flat, shape)
    };
    let dtype = cx.dtype(value);
    Ok(vec![match cx.composite(value).cloned() {
        None => checked(cx, value)?,
        Some(Composite::Packed(p)) => {
            let shapes = checked(cx, p.shapes)?;
            cx.compose(dtype, Composite::Packed(Packed { shapes, ..p }))
        }
        Some(Composite::List(parts)) => {
            let parts = parts.into_iter().map(|v| checked(cx, v)).collect::<Res<Vec<_>>>()?;
            cx.compose(dtype, Composite::List(parts))
        }
        Some(Composite::Optional { .. } | Composite::Nothing) => return missing("an optional inside an optional"),
    }])
}
