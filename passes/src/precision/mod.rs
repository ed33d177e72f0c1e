//! Precision: layers in fewer bits.
//!
//! A **layer** is a product (convolution or matrix product) by a constant of f32. Each has **variants**: its weights stored in
//! 16, 8 or 4 bits, or the whole product in integers. A variant has an error, which somebody measures with the [`probe`] of the
//! graph: the layer with and without, side by side on the same inputs. The search ([`rounding`]) has variants among its kernels, with
//! their errors, so that they are chosen together with fusion; [`choice`] divides an error budget among the parts of the graph.
//! [`apply`] writes a choice into a graph: weights as `dequant`, integer layers as quantised and dequantised
//! again, which [`crate::integer`] makes integer products of, as it does for models that come so.
pub mod choice;
pub mod quantise;

use crate::{
    Ctx, PassError,
    eqsat::{
        cost::{self, Costs},
        rounding,
    },
    fold::broadcast_constant,
    fuse::{self, Order},
    rebuild::Rebuild,
    weights::{self, Packed},
};
use pavage_ir::{DType, Dim, Graph, NodeId, Op, Scalar, ScalarFn, Tensor, Value, attr::ReduceFn};
use quantise::{Grid, Scale, Symmetry};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// How a layer is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Precision {
    /// As the model says.
    F32,
    /// Weights stored in f16.
    F16,
    /// Weights stored in bf16.
    Bf16,
    /// A product of integers: bytes by bytes, sums exact.
    Int8,
    /// Weights stored in 8 bits.
    W8,
    /// Weights stored in 4 bits.
    W4,
}

impl Precision {
    /// Every precision that is not the model's own.
    pub const NARROW: [Precision; 5] = [Precision::Int8, Precision::W4, Precision::W8, Precision::F16, Precision::Bf16];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::F16 => "f16",
            Precision::Bf16 => "bf16",
            Precision::Int8 => "int8",
            Precision::W8 => "w8",
            Precision::W4 => "w4",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How weights are stored where a precision leaves it open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Storage {
    /// Elements along the contracted axis that share a scale; none: a channel of 8 bits, 32 of 4 bits.
    pub group: Option<usize>,
    /// Whether groups have zero points.
    pub symmetry: Symmetry,
}

/// A product that may be computed in fewer bits.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The product.
    pub value: Value,
    /// Names of the model's nodes, or of the op where it has none.
    pub name: String,
    /// What it is predicted to cost as it stands, in nanoseconds.
    pub cost: f64,
    /// What it could be, in the order asked for.
    pub variants: Vec<Variant>,
    /// What it cannot be, and why.
    pub refused: Vec<(Precision, String)>,
}

/// A layer in another precision.
#[derive(Clone, Debug)]
pub struct Variant {
    /// Which.
    pub precision: Precision,
    weights: Packed,
}

/// Every layer of a graph, with variants of the precisions wanted.
pub fn layers(graph: &Graph, wanted: &[Precision], storage: Storage, costs: &Costs) -> Result<Vec<Layer>, PassError> {
    let mut found = vec![];
    for id in graph.schedule() {
        let v = Value::from(id);
        let Some(Op::Conv { .. } | Op::MatMul { out: DType::F32 }) = graph.op(id) else { continue };
        let Some(w) = graph.as_const(graph.operands(id)[1]).filter(|w| w.dtype() == DType::F32 && w.count() > 0) else { continue };
        let name = name(graph, v).unwrap_or_else(|| format!("{}{}", graph.op(id).map_or("", Op::mnemonic), found.len()));
        let mut layer = Layer { value: v, name, cost: price(graph, v, costs)?, variants: vec![], refused: vec![] };
        for &precision in wanted.iter().filter(|p| **p != Precision::F32) {
            match variant(graph, v, w, precision, storage, costs) {
                Ok(weights) => layer.variants.push(Variant { precision, weights }),
                Err(why) => layer.refused.push((precision, why)),
            }
        }
        found.push(layer);
    }
    Ok(found)
}

/// The model's nodes that a product is of; not those whose scale was folded into its weights, and whose bias comes after it.
fn name(graph: &Graph, v: Value) -> Option<String> {
    let after: Vec<&String> = match graph.users(v)[..] {
        [(user, _)] if graph.op(user) == Some(&Op::Map(ScalarFn::Add)) => graph[user].source.iter().collect(),
        _ => vec![],
    };
    let all = &graph[v.node].source;
    let own: Vec<&str> = all.iter().filter(|s| !after.contains(s)).map(String::as_str).collect();
    match (own.is_empty(), all.is_empty()) {
        (_, true) => None,
        (true, _) => Some(all.join(", ")),
        _ => Some(own.join(", ")),
    }
}

/// Number of products that a sum of the layer has, and the axis of the weights that runs over them where it is one.
fn contracted(graph: &Graph, v: Value, w: &Tensor) -> (usize, usize) {
    match graph.op(v.node) {
        Some(Op::Conv { .. }) => (w.shape()[1..].iter().product(), 1),
        _ => (w.shape()[w.shape().len() - 2], w.shape().len() - 2),
    }
}

/// The weights of a layer in a precision, or why it cannot have it.
fn variant(graph: &Graph, v: Value, w: &Tensor, precision: Precision, storage: Storage, costs: &Costs) -> Result<Packed, String> {
    if w.to_f64().iter().any(|x| !x.is_finite()) {
        return Err("its weights are not all finite".into());
    }
    let (products, axis) = contracted(graph, v, w);
    if precision == Precision::Int8 {
        if costs.byte_flops_per_ns <= costs.contract_flops_per_ns {
            return Err("the target multiplies bytes no faster than floats".into());
        }
        // As the pass that makes integer products demands.
        if products as f64 * 127.0 * 511.0 > f64::from(i32::MAX) {
            return Err(format!("sums of {products} products of bytes leave 31 bits"));
        }
        if matches!(graph.op(v.node), Some(Op::MatMul { .. })) && w.shape().len() > 2 {
            return Err("its weights have batches".into());
        }
        return Ok(bytes(graph, v, w));
    }
    if w.count() < weights::LEAST {
        return Err(format!("{} weights are too few to gain", w.count()));
    }
    if weights::operand(graph, v, costs) != Some(1) {
        return Err("no kernel keeps its weights packed without losing time".into());
    }
    let grid = |bits: usize, group: Option<usize>| {
        // A group that does not divide the channel gives way to the whole of it.
        let group = storage.group.or(group).filter(|g| w.shape()[axis].is_multiple_of(*g));
        quantise::weights(w, axis, Grid { bits, group, symmetry: storage.symmetry })
    };
    match precision {
        Precision::F16 => quantise::narrow(w, DType::F16).ok_or("its weights leave the range of f16".into()),
        Precision::Bf16 => quantise::narrow(w, DType::BF16).ok_or("its weights leave the range of bf16".into()),
        Precision::W4 => Ok(grid(4, Some(32))),
        _ => Ok(grid(8, None)),
    }
}

/// Weights as bytes, a scale an output channel.
fn bytes(graph: &Graph, v: Value, w: &Tensor) -> Packed {
    let grid = Grid { bits: 8, group: None, symmetry: Symmetry::Symmetric };
    let shape = w.shape().to_vec();
    if !matches!(graph.op(v.node), Some(Op::Conv { .. })) {
        return quantise::weights(w, shape.len() - 2, grid);
    }
    let flat = w.reshaped(vec![shape[0], shape[1..].iter().product()]).expect("as many elements");
    let packed = quantise::weights(&flat, 1, grid);
    let mut small = vec![1; shape.len()];
    small[0] = shape[0];
    let scale = packed.scale.map(|s| s.reshaped(small).expect("one a channel"));
    Packed { q: packed.q.reshaped(shape).expect("as many elements"), scale, ..packed }
}

/// What the kernel of a layer alone is predicted to cost as it stands.
fn price(graph: &Graph, v: Value, costs: &Costs) -> Result<f64, PassError> {
    let operands = graph.operands(v.node);
    let Some(op) = graph.op(v.node) else { return Ok(0.0) };
    let mut alone = Graph::new("layer");
    let (x, w) = (alone.input("x", graph.ty(operands[0]).clone()), alone.input("w", graph.ty(operands[1]).clone()));
    let out = alone.add(op.clone(), &[x, w]).map_err(|source| PassError::IllTyped { pass: "precision", source })?;
    alone.output("y", out);
    let cluster = fuse::single(&alone, &Order::new(&alone), out.node)?;
    Ok(cost::predict(&cluster.formed.region, costs))
}

/// Every variant of every layer as the search takes it, with its measured error: `errors[layer][variant]`, or none at all where nothing
/// was measured. Integer layers take along what follows them as far as it is one multiply-add of their sum and clamps.
pub fn variants(
    graph: &Graph,
    layers: &[Layer],
    errors: &[Vec<f64>],
    ranges: &BTreeMap<Value, Scale>,
    costs: &Costs,
) -> Result<Vec<rounding::Variant>, PassError> {
    let mut found = vec![];
    for (layer, l) in layers.iter().enumerate() {
        for (index, variant) in l.variants.iter().enumerate() {
            let error = errors.get(layer).map_or(0.0, |e| e[index]);
            if !error.is_finite() {
                continue;
            }
            let integer = variant.precision == Precision::Int8;
            let tail = if integer { tail(graph, l.value) } else { vec![] };
            let (alone, layer_alone) = alone(graph, l, variant, &tail)?;
            let operand = graph.operands(l.value.node)[0];
            let range = ranges.get(&operand).map(|range| (alone.inputs()[0].into(), *range)).into_iter().collect();
            let mut alone = apply(&alone, &[layer_alone], &[Some(0)], &range)?;
            if integer {
                crate::run(&mut alone, &Ctx { costs: costs.clone(), ..Ctx::default() }, &["integer", "fold", "canon"])?;
                let sums =
                    |id: &NodeId| alone[*id].types.iter().any(|t| t.dtype == DType::I32) && matches!(alone.op(*id), Some(Op::Conv { .. } | Op::MatMul { .. }));
                if !alone.schedule().iter().any(sums) {
                    continue;
                }
            }
            let value = tail.last().copied().unwrap_or(l.value);
            let covers = std::iter::once(l.value).chain(tail).collect();
            found.push(rounding::Variant { value, covers, operand, graph: alone, label: variant.precision.name().into(), error, layer, index });
        }
    }
    Ok(found)
}

/// The values after a layer, each of the one before and a constant, that nobody else reads.
fn tail(graph: &Graph, layer: Value) -> Vec<Value> {
    let mut found = vec![];
    let mut at = layer;
    loop {
        let [(user, place)] = graph.users(at)[..] else { return found };
        let steps = matches!(graph.op(user), Some(Op::Map(ScalarFn::Add | ScalarFn::Sub | ScalarFn::Mul | ScalarFn::Max | ScalarFn::Min)));
        let other = graph.operands(user).get(1 - place.min(1)).copied();
        if graph.n_uses(at) != 1 || !steps || other.is_none_or(|o| broadcast_constant(graph, o).is_none()) {
            return found;
        }
        at = user.into();
        found.push(at);
    }
}

/// A layer with one variant and what follows it, as a graph of its own.
fn alone(graph: &Graph, layer: &Layer, variant: &Variant, tail: &[Value]) -> Result<(Graph, Layer), PassError> {
    let ill = |source| PassError::IllTyped { pass: "precision", source };
    let mut new = Graph::new("layer");
    let operand = graph.operands(layer.value.node)[0];
    let mut values = BTreeMap::from([(operand, new.input("x", graph.ty(operand).clone()))]);
    for v in std::iter::once(&layer.value).chain(tail) {
        let Some(op) = graph.op(v.node) else { continue };
        for o in graph.operands(v.node) {
            // Constants behind broadcasts, or as they are.
            let base = match graph.op(o.node) {
                Some(Op::Broadcast { .. }) => graph.operands(o.node)[0],
                _ => o,
            };
            if let (None, Some(t)) = (values.get(&o), graph.as_const(base)) {
                let mut c = new.constant(t.clone());
                if let Some(broadcast @ Op::Broadcast { .. }) = graph.op(o.node) {
                    c = new.add(broadcast.clone(), &[c]).map_err(ill)?;
                }
                values.insert(o, c);
            }
        }
        let operands: Vec<Value> = graph.operands(v.node).iter().map(|o| values[o]).collect();
        values.insert(*v, new.add(op.clone(), &operands).map_err(ill)?);
    }
    new.output("y", values[tail.last().unwrap_or(&layer.value)]);
    let here = Layer { value: values[&layer.value], variants: vec![variant.clone()], refused: vec![], ..layer.clone() };
    Ok((new, here))
}

/// The tensors that integer layers read: their ranges must be known before [`apply`] and [`probe`].
pub fn activations(graph: &Graph, layers: &[Layer]) -> Vec<Value> {
    let integer = |l: &&Layer| l.variants.iter().any(|v| v.precision == Precision::Int8);
    let all: BTreeSet<Value> = layers.iter().filter(integer).map(|l| graph.operands(l.value.node)[0]).collect();
    all.into_iter().collect()
}

/// The graph with further outputs: `values`, named `seen:0` and so on.
pub fn observing(graph: &Graph, values: &[Value]) -> Graph {
    let mut graph = graph.clone();
    for (i, v) in values.iter().enumerate() {
        graph.output(format!("seen:{i}"), *v);
    }
    graph
}

/// The graph with, for each variant of each layer, an output `error:LAYER:VARIANT`, the sum of the squares of what it changes, and
/// for each layer `size:LAYER`, the sum of the squares of its result. Every variant reads what the model itself computes.
pub fn probe(graph: &Graph, layers: &[Layer], ranges: &BTreeMap<Value, Scale>) -> Result<Graph, PassError> {
    let mut writer = Writer { r: Rebuild::new("precision", graph), ranges, quantised: BTreeMap::new() };
    for id in graph.schedule() {
        writer.r.at(id);
        writer.r.copy(id)?;
        let Some(i) = layers.iter().position(|l| l.value.node == id) else { continue };
        let y = writer.r.value(id.into());
        let size = writer.squares(y, None)?;
        writer.r.new.output(format!("size:{i}"), size);
        for (j, variant) in layers[i].variants.iter().enumerate() {
            let other = writer.layer(&layers[i], variant)?;
            let error = writer.squares(other, Some(y))?;
            writer.r.new.output(format!("error:{i}:{j}"), error);
        }
    }
    Ok(writer.r.finish().0)
}

/// The graph with the chosen variants.
pub fn apply(graph: &Graph, layers: &[Layer], chosen: &[Option<usize>], ranges: &BTreeMap<Value, Scale>) -> Result<Graph, PassError> {
    let picked = |id| layers.iter().zip(chosen).find(|(l, _)| l.value.node == id).and_then(|(l, c)| c.map(|c| (l, &l.variants[c])));
    let mut writer = Writer { r: Rebuild::new("precision", graph), ranges, quantised: BTreeMap::new() };
    for id in graph.schedule() {
        writer.r.at(id);
        if let Some((layer, variant)) = picked(id) {
            let new = writer.layer(layer, variant)?;
            writer.r.set(id.into(), new);
            continue;
        }
        writer.r.copy(id)?;
    }
    Ok(writer.r.finish().0)
}

/// Writes variants into a graph in the making.
struct Writer<'a> {
    r: Rebuild<'a>,
    ranges: &'a BTreeMap<Value, Scale>,
    /// Tensors brought onto their grids and back.
    quantised: BTreeMap<Value, Value>,
}

impl Writer<'_> {
    /// A layer in a variant, over the inputs that it has.
    fn layer(&mut self, layer: &Layer, variant: &Variant) -> Result<Value, PassError> {
        let old = self.r.old;
        let operands = old.operands(layer.value.node);
        let Some(op) = old.op(layer.value.node).cloned() else { return Ok(self.r.value(layer.value)) };
        if variant.precision != Precision::Int8 {
            let (x, w) = (self.r.value(operands[0]), weights::emit(&mut self.r, &variant.weights)?);
            return self.r.add(op, &[x, w]);
        }
        let x = self.rounded(operands[0])?;
        let shape: Vec<Dim> = old.ty(operands[1]).shape.clone();
        let q = self.r.constant(variant.weights.q.clone());
        let mut w = self.r.add(Op::Cast { to: DType::F32 }, &[q])?;
        if let Some(scale) = &variant.weights.scale {
            let scale = self.r.constant(scale.clone());
            let scale = self.r.add(Op::Broadcast { shape }, &[scale])?;
            w = self.r.add(Op::Map(ScalarFn::Mul), &[w, scale])?;
        }
        self.r.add(op, &[x, w])
    }

    /// An old tensor on its grid of bytes, as floats again.
    fn rounded(&mut self, v: Value) -> Result<Value, PassError> {
        if let Some(known) = self.quantised.get(&v) {
            return Ok(*known);
        }
        let grid = self.ranges.get(&v).copied().unwrap_or(Scale { scale: 1.0, zero: 0.0 });
        let shape = self.r.old.ty(v).shape.clone();
        let number = |r: &mut Rebuild, x: f64| {
            let one = r.constant(Tensor::full(DType::F32, vec![1; shape.len()], Scalar::F(x)));
            r.add(Op::Broadcast { shape: shape.clone() }, &[one])
        };
        let (scale, finer) = (number(&mut self.r, grid.scale)?, number(&mut self.r, grid.scale.recip())?);
        let zero = number(&mut self.r, grid.zero)?;
        let (low, high) = (number(&mut self.r, 0.0)?, number(&mut self.r, 255.0)?);
        let mut q = self.r.value(v);
        for (f, with) in
            [(ScalarFn::Mul, Some(finer)), (ScalarFn::Round, None), (ScalarFn::Add, Some(zero)), (ScalarFn::Max, Some(low)), (ScalarFn::Min, Some(high))]
        {
            if f == ScalarFn::Add && grid.zero == 0.0 {
                continue;
            }
            let operands: Vec<Value> = [Some(q), with].into_iter().flatten().collect();
            q = self.r.add(Op::Map(f), &operands)?;
        }
        let q = self.r.add(Op::Cast { to: DType::U8 }, &[q])?;
        let mut back = self.r.add(Op::Cast { to: DType::F32 }, &[q])?;
        if grid.zero != 0.0 {
            back = self.r.add(Op::Map(ScalarFn::Sub), &[back, zero])?;
        }
        let back = self.r.add(Op::Map(ScalarFn::Mul), &[back, scale])?;
        self.quantised.insert(v, back);
        Ok(back)
    }

    /// The sum of the squares of `x`, or of what it differs from `y`.
    fn squares(&mut self, x: Value, y: Option<Value>) -> Result<Value, PassError> {
        let d = match y {
            Some(y) => self.r.add(Op::Map(ScalarFn::Sub), &[x, y])?,
            None => x,
        };
        let square = self.r.add(Op::Map(ScalarFn::Mul), &[d, d])?;
        let axes = (0..self.r.new.ty(square).rank()).collect();
        self.r.add(Op::Reduce { f: ReduceFn::Sum, axes }, &[square])
    }
}
