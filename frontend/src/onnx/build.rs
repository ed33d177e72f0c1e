//! Building graphs out of core ops: values that know what is known of them at import.
//!
//! A [`Val`] is a value of the model. Beside its type it may be a known constant, or a small integer tensor
//! whose elements are size expressions; such values become graph nodes only where a node reads them as
//! data. [`Builder::emit_all`] is the one place where ops are emitted: it leaves out ops that do nothing,
//! folds constants, and follows sizes through arithmetic and views.
use super::symbolic;
use pavage_ir::{
    DType, Dim, Graph, NodeId, Op, OpError, Requirement, Scalar, ScalarFn, Sym, Tensor, TensorType, Value,
    attr::PadMode,
    dim::Atom,
    op::{EvalArgs, TypeArgs},
};
use std::collections::{BTreeMap, BTreeSet};

/// Why a converter stopped.
#[derive(Debug)]
pub(crate) enum Stop {
    /// Well-formed, and beyond what Pavage does: what is missing.
    Missing(String),
    /// The node breaks its specification: how.
    Invalid(String),
    /// Two sizes turned out to be related; the import starts again knowing that.
    Retry,
    /// The cause is on the list of problems already.
    Recorded,
    /// The model is wrong beyond one node.
    Fail(crate::Error),
}

impl From<OpError> for Stop {
    fn from(e: OpError) -> Self {
        Stop::Invalid(e.to_string())
    }
}

pub(crate) type Res<T> = Result<T, Stop>;

pub(crate) fn missing<T>(what: impl Into<String>) -> Res<T> {
    Err(Stop::Missing(what.into()))
}

pub(crate) fn invalid<T>(why: impl Into<String>) -> Res<T> {
    Err(Stop::Invalid(why.into()))
}

/// A value of the model being imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Val(u32);

/// What is known of a value's elements at import.
#[derive(Clone, Debug)]
pub(crate) enum Known {
    Nothing,
    Tensor(Tensor),
    /// Integers in row-major order, some of them symbolic.
    Dims(Vec<Dim>),
    /// No tensor.
    Composite(Composite),
}

/// What is no tensor, made of tensors. Its type says the dtype of its elements, and nothing else.
#[derive(Clone, Debug)]
pub(crate) enum Composite {
    /// A sequence whose elements are known one by one.
    List(Vec<Val>),
    /// A sequence as long as data says.
    Packed(Packed),
    /// `value`, if `present` (a bool scalar).
    Optional { present: Val, value: Val },
    /// An optional without a value.
    Nothing,
}

/// A sequence in two tensors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packed {
    /// The elements of all its tensors, one tensor after another: a vector.
    pub(crate) data: Val,
    /// The extents of its tensors, a row each: i64.
    pub(crate) shapes: Val,
}

#[derive(Clone, Debug)]
struct ValData {
    ty: TensorType,
    known: Known,
    /// The frame that computes it, and its place there; known values have none until read.
    home: Option<(usize, Value)>,
}

/// A graph under construction: the model's, or a body of control flow inside it.
pub(crate) struct Frame {
    pub(crate) graph: Graph,
    /// Values of enclosing frames that this one reads, in the order of the inputs made for them.
    pub(crate) captures: Vec<Val>,
    local: BTreeMap<Val, Value>,
}

/// What earlier attempts learned of the model's size symbols.
#[derive(Clone, Debug, Default)]
pub(crate) struct Relations {
    /// What a symbol stands for.
    pub(crate) equal: BTreeMap<String, Dim>,
    /// The largest value a symbol takes.
    pub(crate) most: BTreeMap<String, i64>,
}

impl Relations {
    /// The expression that a symbol stands for.
    pub(crate) fn resolve(&self, dim: &Dim) -> Dim {
        let mut dim = dim.clone();
        // Substitutions never mention what they replace, so this ends; the bound is for safety.
        for _ in 0..=self.equal.len() {
            let next = dim.map_atoms(&|atom| match atom {
                Atom::Sym(s) => match self.equal.get(s.name.as_ref()) {
                    Some(to) => to.clone(),
                    None => Dim::from(Atom::Sym(Sym { max: self.most.get(s.name.as_ref()).copied().or(s.max), ..s.clone() })),
                },
                _ => Dim::from(atom.clone()),
            });
            if next == dim {
                break;
            }
            dim = next;
        }
        dim
    }
}

/// Ops of at most this many elements are folded at import.
const FOLD_LIMIT: usize = 1 << 16;
/// Integer tensors of at most this many elements are followed as sizes.
pub(crate) const DIMS_LIMIT: usize = 1 << 10;
/// Most nodes of a graph: beyond any real model, and reached by functions that call each other twice.
const NODE_LIMIT: usize = 1 << 20;

pub(crate) struct Builder {
    vals: Vec<ValData>,
    pub(crate) frames: Vec<Frame>,
    pub(crate) relations: Relations,
    /// Symbols that inputs define: the others are decided by data and cannot be replaced.
    pub(crate) input_symbols: BTreeSet<String>,
    symbols: BTreeSet<String>,
    pub(crate) notes: BTreeSet<String>,
    /// Symbols that stand for the rank of a sequence's elements.
    pub(crate) ranks: BTreeSet<String>,
    /// What must hold of the sizes of inputs for the graph to be right.
    pub(crate) requirements: BTreeSet<Requirement>,
    /// Nodes emitted and not yet attributed to a node of the model, with their frames.
    pub(crate) fresh: Vec<(usize, NodeId)>,
    emitted: usize,
    strings: Option<Val>,
    /// Run-time truth values that say whether two sizes are equal.
    equations: BTreeMap<Val, (Dim, Dim)>,
    /// What the node being imported takes to hold, of sizes that inputs alone do not decide.
    assumed: BTreeSet<Requirement>,
}

impl Builder {
    pub(crate) fn new(relations: Relations) -> Self {
        Self {
            vals: vec![],
            frames: vec![],
            relations,
            input_symbols: BTreeSet::new(),
            symbols: BTreeSet::new(),
            notes: BTreeSet::new(),
            ranks: BTreeSet::new(),
            requirements: BTreeSet::new(),
            fresh: vec![],
            emitted: 0,
            strings: None,
            equations: BTreeMap::new(),
            assumed: BTreeSet::new(),
        }
    }

    /// A symbol name not used before, made of characters that the text form takes.
    pub(crate) fn unique_symbol(&mut self, name: &str) -> String {
        let mut base: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).take(60).collect();
        let reserved = matches!(base.as_str(), "div" | "mod" | "max" | "min");
        if reserved || base.trim_start_matches(['a', 'v']).chars().all(|c| c.is_ascii_digit()) || base.starts_with(|c: char| c.is_ascii_digit()) {
            base.insert_str(0, "s_");
        }
        let mut unique = base.clone();
        for i in 2.. {
            if self.symbols.insert(unique.clone()) {
                break;
            }
            unique = format!("{base}_{i}");
        }
        unique
    }

    /// A fresh symbol for a size that data decides.
    pub(crate) fn data_symbol(&mut self, name: &str, max: Option<i64>) -> Sym {
        let name = self.unique_symbol(name);
        Sym { name: name.as_str().into(), min: 0, max }
    }

    fn push(&mut self, ty: TensorType, known: Known, home: Option<(usize, Value)>) -> Val {
        self.vals.push(ValData { ty, known, home });
        Val((self.vals.len() - 1) as u32)
    }

    pub(crate) fn ty(&self, v: Val) -> &TensorType {
        &self.vals[v.0 as usize].ty
    }

    pub(crate) fn dtype(&self, v: Val) -> DType {
        self.ty(v).dtype
    }

    pub(crate) fn shape(&self, v: Val) -> Vec<Dim> {
        self.ty(v).shape.clone()
    }

    pub(crate) fn rank(&self, v: Val) -> usize {
        self.ty(v).rank()
    }

    /// What a value that is no tensor is made of.
    pub(crate) fn composite(&self, v: Val) -> Option<&Composite> {
        match &self.vals[v.0 as usize].known {
            Known::Composite(c) => Some(c),
            _ => None,
        }
    }

    /// A value that is no tensor, of elements of a dtype.
    pub(crate) fn compose(&mut self, dtype: DType, composite: Composite) -> Val {
        self.push(TensorType { dtype, shape: vec![] }, Known::Composite(composite), None)
    }

    /// The constant that a value is.
    pub(crate) fn tensor(&self, v: Val) -> Option<&Tensor> {
        match &self.vals[v.0 as usize].known {
            Known::Tensor(t) => Some(t),
            _ => None,
        }
    }

    /// The elements of a small integer tensor as sizes.
    pub(crate) fn dims(&self, v: Val) -> Option<Vec<Dim>> {
        match &self.vals[v.0 as usize].known {
            Known::Tensor(t) if (t.dtype().is_int() || t.dtype() == DType::Bool) && t.count() <= DIMS_LIMIT => {
                Some(t.to_i64().into_iter().map(Dim::from).collect())
            }
            Known::Dims(dims) => Some(dims.clone()),
            // No element: nothing to be known.
            Known::Nothing if self.dtype(v).is_int() && self.ty(v).count().is(0) && self.ty(v).const_shape().is_some() => Some(vec![]),
            _ => None,
        }
    }

    pub(crate) fn constant(&mut self, tensor: Tensor) -> Val {
        self.push(tensor.ty(), Known::Tensor(tensor), None)
    }

    pub(crate) fn scalar(&mut self, dtype: DType, v: f64) -> Val {
        let v = if dtype.is_float() { Scalar::F(v) } else { Scalar::I(v as i128) };
        self.constant(Tensor::scalar(dtype, v))
    }

    /// A number of the dtype of `v`.
    pub(crate) fn scalar_like(&mut self, v: Val, number: f64) -> Val {
        self.scalar(self.dtype(v), number)
    }

    pub(crate) fn ints(&mut self, values: &[i64]) -> Val {
        self.constant(Tensor::from_i64([values.len()], values))
    }

    /// What stands for a result that holds text: whatever reads it is left out.
    pub(crate) fn strings_value(&mut self) -> Val {
        if let Some(v) = self.strings {
            return v;
        }
        let v = self.push(TensorType { dtype: DType::Str, shape: vec![] }, Known::Nothing, None);
        self.strings = Some(v);
        v
    }

    /// Sizes as an integer tensor of a shape.
    pub(crate) fn known_dims(&mut self, dtype: DType, shape: &[usize], dims: Vec<Dim>) -> Val {
        match dims.iter().map(Dim::as_const).collect::<Option<Vec<_>>>() {
            Some(ints) => self.constant(Tensor::from_scalars(dtype, shape, ints.into_iter().map(|i| Scalar::I(i.into())))),
            None => self.push(TensorType::new(dtype, shape.iter().copied()), Known::Dims(dims), None),
        }
    }

    // Frames.

    pub(crate) fn enter(&mut self, graph: Graph) {
        self.frames.push(Frame { graph, captures: vec![], local: BTreeMap::new() });
    }

    pub(crate) fn leave(&mut self) -> Frame {
        self.frames.pop().expect("a frame was entered")
    }

    /// A graph of its own, whose results `f` computes from inputs of these types. Its nodes stand for the model's node `owner`.
    pub(crate) fn nested(&mut self, name: &str, owner: &str, inputs: &[TensorType], f: impl FnOnce(&mut Builder, &[Val]) -> Res<Vec<Val>>) -> Res<Frame> {
        let at = self.frames.len();
        self.enter(Graph::new(name));
        let fill = || -> Res<()> {
            let args: Vec<Val> = inputs.iter().enumerate().map(|(i, ty)| self.input(&format!("x{i}"), ty.clone())).collect();
            for (i, v) in f(self, &args)?.into_iter().enumerate() {
                let value = self.value(v)?;
                self.frame().graph.output(format!("out{i}"), value);
            }
            Ok(())
        };
        let filled = fill();
        let mut frame = self.leave();
        let (inner, outer) = std::mem::take(&mut self.fresh).into_iter().partition(|(frame, _)| *frame == at);
        self.fresh = outer;
        let inner: Vec<(usize, NodeId)> = inner;
        inner.into_iter().for_each(|(_, id)| frame.graph.set_source(id, vec![owner.to_string()]));
        filled.map(|()| frame)
    }

    fn frame(&mut self) -> &mut Frame {
        self.frames.last_mut().expect("a frame was entered")
    }

    /// A new input of the innermost graph.
    pub(crate) fn input(&mut self, name: &str, ty: TensorType) -> Val {
        let at = self.frames.len() - 1;
        let value = self.frame().graph.input(name, ty.clone());
        self.push(ty, Known::Nothing, Some((at, value)))
    }

    /// Make a value readable in the innermost graph, as an input of its own at the end of the inputs.
    pub(crate) fn capture(&mut self, v: Val) -> Value {
        let at = self.frames.len() - 1;
        self.capture_at(at, v)
    }

    fn capture_at(&mut self, at: usize, v: Val) -> Value {
        if let Some(value) = self.frames[at].local.get(&v) {
            return *value;
        }
        let ty = self.ty(v).clone();
        let frame = &mut self.frames[at];
        let name = format!("capture{}", frame.captures.len());
        let value = frame.graph.input(name, ty);
        frame.captures.push(v);
        frame.local.insert(v, value);
        value
    }

    /// The value in the innermost graph: known ones are emitted, outer ones captured.
    pub(crate) fn value(&mut self, v: Val) -> Res<Value> {
        let at = self.frames.len() - 1;
        let data = &self.vals[v.0 as usize];
        if let Some((home, value)) = data.home {
            return Ok(if home == at { value } else { self.capture_at(at, v) });
        }
        if let Some(value) = self.frames[at].local.get(&v) {
            return Ok(*value);
        }
        let (ty, known) = (data.ty.clone(), data.known.clone());
        let value = match known {
            Known::Tensor(t) => {
                let value = self.frame().graph.constant(t);
                self.fresh.push((at, value.node));
                value
            }
            Known::Dims(values) => {
                let mut value = self.add(Op::Dims { values }, &[], vec![])?.into();
                if ty.dtype != DType::I64 {
                    value = self.add(Op::Cast { to: ty.dtype }, &[value], vec![])?.into();
                }
                if ty.rank() != 1 {
                    value = self.add(Op::Reshape { shape: ty.shape }, &[value], vec![])?.into();
                }
                value
            }
            Known::Nothing => return invalid("a value has no home"),
            Known::Composite(_) => return missing("a sequence or an optional where a tensor is needed"),
        };
        self.frames[at].local.insert(v, value);
        Ok(value)
    }

    fn add(&mut self, op: Op, operands: &[Value], bodies: Vec<Graph>) -> Res<NodeId> {
        self.emitted += 1;
        if self.emitted > NODE_LIMIT {
            return missing(format!("graphs of more than {NODE_LIMIT} nodes"));
        }
        let at = self.frames.len() - 1;
        let id = self.frame().graph.add_with(op, operands, bodies)?;
        self.fresh.push((at, id));
        Ok(id)
    }

    // Emission.

    /// Emit an op of one result.
    pub(crate) fn emit(&mut self, op: Op, args: &[Val]) -> Res<Val> {
        self.emit_all(op, args, vec![]).map(|vs| vs[0])
    }

    /// Emit an op: simplified, folded or followed as sizes where possible.
    pub(crate) fn emit_all(&mut self, op: Op, args: &[Val], bodies: Vec<Graph>) -> Res<Vec<Val>> {
        if let [x] = args
            && self.does_nothing(&op, *x)
        {
            return Ok(vec![*x]);
        }
        if let Some(vals) = self.fold(&op, args)? {
            return Ok(vals);
        }
        if let Some(val) = symbolic::follow(self, &op, args)? {
            return Ok(vec![val]);
        }
        self.emit_node(op, args, bodies)
    }

    /// Convert elements at run time, constants too: passes look for what integers are made into.
    pub(crate) fn cast_kept(&mut self, v: Val, to: DType) -> Res<Val> {
        if self.dtype(v) == to { Ok(v) } else { self.emit_node(Op::Cast { to }, &[v], vec![]).map(|vs| vs[0]) }
    }

    fn emit_node(&mut self, op: Op, args: &[Val], bodies: Vec<Graph>) -> Res<Vec<Val>> {
        let equation = self.equation(&op, args);
        let operands: Vec<Value> = args.iter().map(|v| self.value(*v)).collect::<Res<_>>()?;
        let id = self.add(op, &operands, bodies)?;
        let at = self.frames.len() - 1;
        let types = self.frame().graph[id].types.clone();
        if let Some(equation) = equation {
            self.equations.insert(Val(self.vals.len() as u32), equation);
        }
        Ok(types.into_iter().enumerate().map(|(i, ty)| self.push(ty, Known::Nothing, Some((at, Value { node: id, result: i as u32 })))).collect())
    }

    /// The equality of sizes that a run-time truth value stands for.
    pub(crate) fn equation_of(&self, v: Val) -> Option<(Dim, Dim)> {
        self.equations.get(&v).cloned()
    }

    fn equation(&self, op: &Op, args: &[Val]) -> Option<(Dim, Dim)> {
        match (op, args) {
            (Op::Map(ScalarFn::Eq), [a, b]) => match (self.dims(*a)?.as_slice(), self.dims(*b)?.as_slice()) {
                ([a], [b]) => Some((a.clone(), b.clone())),
                _ => None,
            },
            (Op::Reshape { .. } | Op::Cast { to: DType::Bool }, [v]) => self.equation_of(*v),
            _ => None,
        }
    }

    fn does_nothing(&self, op: &Op, x: Val) -> bool {
        let ty = self.ty(x);
        match op {
            Op::Cast { to } => *to == ty.dtype,
            Op::Reshape { shape } | Op::Broadcast { shape } => *shape == ty.shape,
            Op::Transpose { perm } => perm.iter().enumerate().all(|(i, p)| i == *p),
            Op::Slice { starts, sizes, steps } => *sizes == ty.shape && starts.iter().all(|s| s.is(0)) && steps.iter().all(|s| *s == 1),
            Op::Concat { .. } => true,
            Op::Reduce { axes, .. } => axes.is_empty(),
            _ => false,
        }
    }

    fn fold(&mut self, op: &Op, args: &[Val]) -> Res<Option<Vec<Val>>> {
        if matches!(op, Op::BindSize { .. } | Op::NonZero { .. } | Op::Dims { .. } | Op::If { .. } | Op::Loop { .. } | Op::Iota { .. }) {
            return Ok(None);
        }
        let Some(tensors) = args.iter().map(|v| self.tensor(*v).cloned()).collect::<Option<Vec<_>>>() else { return Ok(None) };
        let tensors: Vec<&Tensor> = tensors.iter().collect();
        if tensors.is_empty() || tensors.iter().any(|t| t.count() > FOLD_LIMIT) {
            return Ok(None);
        }
        let types: Vec<TensorType> = tensors.iter().map(|t| t.ty()).collect();
        let results = op.infer(TypeArgs { types: &types.iter().collect::<Vec<_>>(), bodies: &[] })?;
        let counts: Option<Vec<usize>> = results.iter().map(|t| t.const_shape().and_then(|s| pavage_ir::tensor::count_of(&s))).collect();
        // A broadcast written out would be read back element by element where one value does.
        let most = if matches!(op, Op::Broadcast { .. }) { DIMS_LIMIT } else { FOLD_LIMIT };
        if counts.is_none_or(|c| c.iter().any(|n| *n > most)) {
            return Ok(None);
        }
        let folded = op.eval(EvalArgs { tensors: &tensors, bodies: &[], results: &results })?;
        Ok(Some(folded.into_iter().map(|t| self.constant(t)).collect()))
    }

    // Shorthands for core ops.

    pub(crate) fn map(&mut self, f: ScalarFn, args: &[Val]) -> Res<Val> {
        self.emit(Op::Map(f), args)
    }

    pub(crate) fn cast(&mut self, v: Val, to: DType) -> Res<Val> {
        self.emit(Op::Cast { to }, &[v])
    }

    pub(crate) fn reshape(&mut self, v: Val, shape: Vec<Dim>) -> Res<Val> {
        self.emit(Op::Reshape { shape }, &[v])
    }

    /// A vector as a matrix of one row.
    pub(crate) fn as_row(&mut self, v: Val) -> Res<Val> {
        let n = self.ty(v).count();
        self.reshape(v, vec![Dim::one(), n])
    }

    pub(crate) fn transpose(&mut self, v: Val, perm: &[usize]) -> Res<Val> {
        self.emit(Op::Transpose { perm: perm.to_vec() }, &[v])
    }

    /// Elements `start..start + size` along one axis.
    pub(crate) fn slice_axis(&mut self, v: Val, axis: usize, start: Dim, size: Dim) -> Res<Val> {
        let mut sizes = self.shape(v);
        if axis >= sizes.len() {
            return invalid(format!("{} has no axis {axis}", self.ty(v)));
        }
        let mut starts = vec![Dim::ZERO; sizes.len()];
        starts[axis] = start;
        sizes[axis] = size;
        let steps = vec![1; sizes.len()];
        self.emit(Op::Slice { starts, sizes, steps }, &[v])
    }

    /// A value broadcast to a shape by the multidirectional rule (its own extents are 1 or equal to the shape's).
    pub(crate) fn broadcast_to(&mut self, v: Val, shape: &[Dim]) -> Res<Val> {
        let own = self.shape(v);
        if own.len() > shape.len() {
            return invalid(format!("{} does not broadcast to rank {}", self.ty(v), shape.len()));
        }
        let mut full = vec![Dim::one(); shape.len() - own.len()];
        full.extend(own);
        // What is repeated at the end of each axis, where the run decides whether its extent is 1.
        let mut more = vec![Dim::ZERO; shape.len()];
        for ((mine, theirs), more) in full.iter_mut().zip(shape).zip(&mut more) {
            if *mine == *theirs || mine.is(1) {
                continue;
            }
            if self.may_be_one(mine, theirs) {
                *more = theirs.clone() - mine.clone();
                self.require(Requirement::Broadcasts(mine.clone(), theirs.clone()));
            } else {
                // Equal by assumption, or an error now.
                self.same_extent(mine, theirs)?;
                *mine = theirs.clone();
            }
        }
        let mut v = self.reshape(v, full)?;
        if more.iter().any(|d| !d.is(0)) {
            let value = self.scalar_like(v, 0.0);
            let lo = vec![Dim::ZERO; shape.len()];
            v = self.emit(Op::Pad { lo, hi: more, mode: PadMode::Edge }, &[v, value])?;
        }
        self.emit(Op::Broadcast { shape: shape.to_vec() }, &[v])
    }

    /// Whether data decides an extent, rather than the model's inputs by their shapes.
    fn by_data(&self, d: &Dim) -> bool {
        d.symbols().iter().any(|s| !self.input_symbols.contains(s.name.as_ref()))
    }

    /// Whether the run decides if an extent that meets another is 1 and broadcasts. Two that inputs decide are taken to be
    /// equal instead where one symbol can stand for both, as exporters name one size twice; not where that would leave the
    /// model one size of several.
    fn may_be_one(&self, mine: &Dim, theirs: &Dim) -> bool {
        if self.by_data(mine) {
            return true;
        }
        if self.by_data(theirs) || mine.as_const().is_some() || (mine.clone() - Dim::from(2usize)).is_nonneg() {
            return false;
        }
        match symbolic::relate(self, mine, theirs) {
            Some(symbolic::Relation::Equal(name, to)) => to.as_const().is_some() && *mine != Dim::sym(&name),
            Some(symbolic::Relation::AtMost(..)) => false,
            None => true,
        }
    }

    /// The common shape of operands under the multidirectional rule.
    pub(crate) fn common_shape(&mut self, shapes: &[Vec<Dim>]) -> Res<Vec<Dim>> {
        let rank = shapes.iter().map(Vec::len).max().unwrap_or(0);
        let mut out = vec![Dim::one(); rank];
        for shape in shapes {
            for (at, dim) in out[rank - shape.len()..].iter_mut().zip(shape) {
                if at.is(1) {
                    *at = dim.clone();
                } else if !dim.is(1) && at != dim {
                    *at = match (self.may_be_one(at, dim), self.may_be_one(dim, at)) {
                        (false, false) => self.same_extent(at, dim)?,
                        (false, true) => at.clone(),
                        (true, false) => dim.clone(),
                        (true, true) if self.by_data(at) || self.by_data(dim) => self.wider(at, dim)?,
                        (true, true) => at.larger(dim),
                    };
                }
            }
        }
        Ok(out)
    }

    /// The extent that two broadcast to where data decides both.
    fn wider(&mut self, a: &Dim, b: &Dim) -> Res<Dim> {
        let both = self.known_dims(DType::I64, &[2], vec![a.clone(), b.clone()]);
        let (a, b) = (self.slice_axis(both, 0, Dim::ZERO, Dim::one())?, self.slice_axis(both, 0, Dim::one(), Dim::one())?);
        let one = self.ints(&[1]);
        let single = self.map(ScalarFn::Eq, &[a, one])?;
        let wide = self.map(ScalarFn::Select, &[single, b, a])?;
        self.size(wide, "common")
    }

    /// All operands at their common shape.
    pub(crate) fn broadcast_all(&mut self, args: &[Val]) -> Res<Vec<Val>> {
        let shapes: Vec<_> = args.iter().map(|v| self.shape(*v)).collect();
        let shape = self.common_shape(&shapes)?;
        args.iter().map(|v| self.broadcast_to(*v, &shape)).collect()
    }

    /// A pointwise function after broadcasting.
    pub(crate) fn pointwise(&mut self, f: ScalarFn, args: &[Val]) -> Res<Val> {
        let args = self.broadcast_all(args)?;
        self.map(f, &args)
    }

    /// A pointwise function of a value and a number of its dtype.
    pub(crate) fn with_number(&mut self, f: ScalarFn, v: Val, number: f64) -> Res<Val> {
        let c = self.scalar_like(v, number);
        self.pointwise(f, &[v, c])
    }

    /// Say what a run needs to be right. Of the sizes of the model's inputs that is checked before a run; inside
    /// a body that need not run, and of sizes that data decides, by [`Builder::guard`].
    pub(crate) fn require(&mut self, needed: Requirement) {
        let inputs_decide = needed.gap().symbols().iter().all(|s| self.input_symbols.contains(s.name.as_ref()));
        if self.frames.len() == 1 && inputs_decide {
            self.requirements.insert(needed);
        } else {
            self.assumed.insert(needed);
        }
    }

    /// Say that a run is right only where two sizes are equal.
    pub(crate) fn must_be_equal(&mut self, a: Dim, b: Dim) {
        self.require(Requirement::Equal(a, b));
    }

    /// The results of a node of the model, which are refused when run where what the node assumed does not hold: one of
    /// them is read through a slice whose start, a size that must be 0, says so.
    pub(crate) fn guard(&mut self, mut vals: Vec<Val>, name: &str) -> Res<Vec<Val>> {
        let assumed = std::mem::take(&mut self.assumed);
        if assumed.is_empty() {
            return Ok(vals);
        }
        let computed = |v: &Val| matches!(self.vals[v.0 as usize].known, Known::Nothing) && self.rank(*v) > 0 && self.dtype(*v) != DType::Str;
        let Some(at) = vals.iter().position(computed) else {
            self.notes.extend(assumed.iter().map(|needed| format!("assumed, not checked: {needed}")));
            return Ok(vals);
        };
        let mut start = Dim::ZERO;
        for needed in assumed {
            let gap = self.known_dims(DType::I64, &[], vec![needed.gap()]);
            let zero = self.scalar(DType::I64, 0.0);
            let differ = self.map(ScalarFn::Ne, &[gap, zero])?;
            let differ = self.cast(differ, DType::I64)?;
            let sym = self.data_symbol(&format!("{name}_extents_differ"), Some(0));
            self.emit(Op::BindSize { sym: sym.clone() }, &[differ])?;
            start = start + Dim::from(Atom::Sym(sym));
        }
        let sizes = self.shape(vals[at]);
        let mut starts = vec![Dim::ZERO; sizes.len()];
        starts[0] = start;
        let steps = vec![1; sizes.len()];
        vals[at] = self.emit(Op::Slice { starts, sizes, steps }, &[vals[at]])?;
        Ok(vals)
    }

    /// Two extents that the model needs to be equal: decided, related through a symbol, or assumed and checked at run time.
    pub(crate) fn same_extent(&mut self, a: &Dim, b: &Dim) -> Res<Dim> {
        if a == b {
            return Ok(a.clone());
        }
        if let (Some(x), Some(y)) = (a.as_const(), b.as_const()) {
            return invalid(format!("extents {x} and {y} differ"));
        }
        match symbolic::relate(self, a, b) {
            Some(symbolic::Relation::Equal(name, to)) => {
                self.relations.equal.insert(name, to);
                return Err(Stop::Retry);
            }
            Some(symbolic::Relation::AtMost(name, most)) => {
                self.relations.most.insert(name, most);
                return Err(Stop::Retry);
            }
            None => {}
        }
        self.must_be_equal(a.clone(), b.clone());
        Ok(if a.as_const().is_some() {
            a.clone()
        } else if b.as_const().is_some() {
            b.clone()
        } else {
            a.clone()
        })
    }

    /// A value whose extents are exactly these, known or assumed to be equal to its own.
    pub(crate) fn with_shape(&mut self, v: Val, shape: Vec<Dim>) -> Res<Val> {
        self.reshape(v, shape)
    }

    /// An integer scalar as a size; data defines a new symbol.
    pub(crate) fn size(&mut self, v: Val, name: &str) -> Res<Dim> {
        if let Some(dims) = self.dims(v) {
            return match dims.as_slice() {
                [d] => Ok(d.clone()),
                _ => invalid(format!("one size expected, got {}", dims.len())),
            };
        }
        let v = self.cast(v, DType::I64)?;
        let v = self.reshape(v, vec![])?;
        let sym = self.data_symbol(name, None);
        self.emit(Op::BindSize { sym: sym.clone() }, &[v])?;
        Ok(Dim::from(Atom::Sym(sym)))
    }

    /// The elements of an integer vector as sizes; data defines new symbols.
    pub(crate) fn sizes(&mut self, v: Val, name: &str) -> Res<Vec<Dim>> {
        if let Some(dims) = self.dims(v) {
            return Ok(dims);
        }
        let Some(n) = self.shape(v).first().and_then(Dim::as_const).filter(|n| self.rank(v) == 1 && (0..=64).contains(n)) else {
            return missing(format!("sizes from a tensor of type {}", self.ty(v)));
        };
        (0..n)
            .map(|i| {
                let one = self.slice_axis(v, 0, Dim::from(i), Dim::one())?;
                self.size(one, &format!("{name}_{i}"))
            })
            .collect()
    }
}
