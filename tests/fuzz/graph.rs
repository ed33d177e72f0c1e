//! Random small ONNX graphs: what they are made of. `ops.rs` has the operators.
//!
//! Values are drawn so that a difference is a bug: inputs are small multiples of 1/4, and for every value it is known
//! how large it can be and whether it is computed without rounding. What jumps (comparisons, roundings, `ArgMax`) takes
//! values without rounding only; what divides takes values away from 0 only.
use super::{
    ops::OPS,
    support::{Message, node},
};
use pavage::ir::{DType, Scalar, Tensor};

/// Random numbers from a seed (splitmix64).
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// At least `lo`, at most `hi`.
    pub(crate) fn int(&mut self, lo: i64, hi: i64) -> i64 {
        lo + (self.next() % (hi - lo + 1) as u64) as i64
    }

    /// Less than `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// True once in `n` times.
    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }
}

/// A value of the graph, and what is known of its elements.
#[derive(Clone, Debug)]
pub(crate) struct Val {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    /// Elements are multiples of `2^-bits`, computed without rounding.
    pub(crate) bits: Option<u32>,
    /// No element is further from 0.
    pub(crate) most: f64,
    /// No element is less.
    pub(crate) least: f64,
}

impl Val {
    pub(crate) fn rank(&self) -> usize {
        self.shape.len()
    }
    pub(crate) fn count(&self) -> usize {
        self.shape.iter().product()
    }
    pub(crate) fn float(&self) -> bool {
        self.dtype.is_float()
    }
    pub(crate) fn exact(&self) -> bool {
        self.bits.is_some()
    }
    /// Far enough from 0 to divide by.
    pub(crate) fn positive(&self) -> bool {
        self.least >= 0.1
    }
    pub(crate) fn wide_int(&self) -> bool {
        matches!(self.dtype, DType::I32 | DType::I64)
    }
}

/// The code of an element type in ONNX files.
pub(crate) fn code(dtype: DType) -> i64 {
    match dtype {
        DType::F32 => 1,
        DType::U8 => 2,
        DType::I8 => 3,
        DType::I32 => 6,
        DType::I64 => 7,
        DType::Bool => 9,
        DType::F16 => 10,
        DType::F64 => 11,
        other => panic!("the generator has no {other}"),
    }
}

/// An attribute.
pub(crate) enum Attr<'a> {
    Int(i64),
    Ints(&'a [i64]),
    Float(f32),
    Text(&'a str),
    Floats(&'a [f32]),
    Texts(&'a [&'a str]),
}

fn attribute(name: &str, value: &Attr) -> Message {
    let m = Message::new().bytes(1, name);
    match value {
        Attr::Float(x) => m.fixed(2, x.to_bits()).int(20, 1),
        Attr::Int(n) => m.int(3, *n).int(20, 2),
        Attr::Text(s) => m.bytes(4, s).int(20, 3),
        Attr::Floats(list) => list.iter().fold(m, |m, x| m.fixed(7, x.to_bits())).int(20, 6),
        Attr::Ints(list) => list.iter().fold(m, |m, n| m.int(8, *n)).int(20, 7),
        Attr::Texts(list) => list.iter().fold(m, |m, s| m.bytes(9, s)).int(20, 8),
    }
}

/// A tensor as a `TensorProto`.
pub(crate) fn tensor(name: &str, t: &Tensor) -> Message {
    let m = t.shape().iter().fold(Message::new(), |m, d| m.int(1, *d as i64));
    m.int(2, code(t.dtype())).bytes(8, name).bytes(9, t.bytes())
}

/// A port; extents are numbers or names, `None` leaves the shape out.
fn port(name: &str, dtype: DType, dims: Option<&[String]>) -> Message {
    let mut ty = Message::new().int(1, code(dtype));
    if let Some(dims) = dims {
        let dim = |d: &String| d.parse().map_or_else(|_| Message::new().bytes(2, d), |n: i64| Message::new().int(1, n));
        ty = ty.with(2, &dims.iter().fold(Message::new(), |m, d| m.with(1, &dim(d))));
    }
    Message::new().bytes(1, name).with(2, &Message::new().with(1, &ty))
}

/// A graph as it grows.
pub(crate) struct Gen {
    pub(crate) rng: Rng,
    /// The operator set.
    pub(crate) opset: i64,
    pub(crate) vals: Vec<Val>,
    nodes: Vec<Message>,
    initializers: Vec<Message>,
    ports: Vec<Message>,
    inputs: Vec<(String, Tensor)>,
    /// Names of operators used, in order.
    pub(crate) used: Vec<String>,
    names: usize,
}

/// A finished graph.
pub(crate) struct Case {
    /// The model.
    pub(crate) model: Vec<u8>,
    /// The same with every value as an output.
    pub(crate) open: Vec<u8>,
    /// Inputs by name.
    pub(crate) inputs: Vec<(String, Tensor)>,
    /// Operators used.
    pub(crate) ops: Vec<String>,
    /// The least precise float type in it.
    pub(crate) coarsest: Option<DType>,
}

impl Gen {
    fn fresh(&mut self, prefix: &str) -> String {
        self.names += 1;
        format!("{prefix}{}", self.names)
    }

    /// A random tensor of small values; `positive` keeps it away from 0.
    fn random(&mut self, dtype: DType, shape: &[usize], positive: bool) -> Tensor {
        let n = shape.iter().product::<usize>();
        let scalar = |g: &mut Rng| match dtype {
            DType::Bool => Scalar::B(g.one_in(2)),
            d if d.is_float() => Scalar::F(if positive { g.int(2, 16) } else { g.int(-16, 16) } as f64 / 4.0),
            DType::U8 => Scalar::I(g.int(i64::from(positive), 9).into()),
            _ => Scalar::I(if positive { g.int(1, 8) } else { g.int(-8, 8) }.into()),
        };
        let values: Vec<Scalar> = (0..n).map(|_| scalar(&mut self.rng)).collect();
        Tensor::from_scalars(dtype, shape.to_vec(), values)
    }

    fn drawn(name: String, dtype: DType, shape: Vec<usize>, positive: bool) -> Val {
        let (bits, most) = if dtype.is_float() { (2, 4.0) } else { (0, 9.0) };
        let least = match (positive, dtype.is_float()) {
            (true, true) => 0.5,
            (true, false) => 1.0,
            _ => -most,
        };
        Val { name, dtype, shape, bits: Some(bits), most, least }
    }

    fn input(&mut self, dtype: DType, shape: Vec<usize>) -> Val {
        let name = self.fresh("x");
        let positive = self.rng.one_in(3) && dtype != DType::Bool;
        let t = self.random(dtype, &shape, positive);
        // Some extents are known at run time only; equal ones may share a name.
        let dims: Vec<String> = shape.iter().map(|d| if *d > 1 && self.rng.one_in(4) { format!("n{d}") } else { d.to_string() }).collect();
        self.ports.push(port(&name, dtype, Some(&dims)));
        self.inputs.push((name.clone(), t));
        let val = Gen::drawn(name, dtype, shape, positive);
        self.vals.push(val.clone());
        val
    }

    /// A random constant.
    pub(crate) fn constant(&mut self, dtype: DType, shape: &[usize], positive: bool) -> Val {
        let t = self.random(dtype, shape, positive);
        let name = self.initializer(&t);
        Gen::drawn(name, dtype, shape.to_vec(), positive)
    }

    /// A constant.
    pub(crate) fn initializer(&mut self, t: &Tensor) -> String {
        let name = self.fresh("c");
        self.initializers.push(tensor(&name, t));
        name
    }

    /// A vector of integers.
    pub(crate) fn ints(&mut self, values: &[i64]) -> String {
        self.initializer(&Tensor::from_i64(vec![values.len()], values))
    }

    /// A value for which `fits`; often a recent one.
    pub(crate) fn val(&mut self, fits: impl Fn(&Val) -> bool) -> Option<Val> {
        let all: Vec<Val> = self.vals.iter().filter(|v| fits(v)).cloned().collect();
        let recent = all.len().saturating_sub(2);
        if all.is_empty() {
            return None;
        }
        Some(if self.rng.one_in(3) { self.rng.pick(&all) } else { self.rng.pick(&all[recent..]) })
    }

    /// Another operand that broadcasts with `a`: a value there is, or a constant. The result's shape comes with it.
    pub(crate) fn partner(&mut self, a: &Val, dtype: DType, positive: bool) -> (Val, Vec<usize>) {
        if self.rng.one_in(2) {
            let fits = |v: &Val| v.dtype == dtype && (!positive || v.positive()) && broadcast(&a.shape, &v.shape).is_some();
            if let Some(b) = self.val(fits) {
                let shape = broadcast(&a.shape, &b.shape).unwrap_or_default();
                return (b, shape);
            }
        }
        let from = self.rng.below(a.rank() + 1);
        let shape: Vec<usize> = a.shape[from..].iter().map(|d| if self.rng.one_in(3) { 1 } else { *d }).collect();
        (self.constant(dtype, &shape, positive), a.shape.clone())
    }

    /// Adds a node; its output has this type, shape and bounds. Too large or too fine values lose what is known of them;
    /// `None` where the result could overflow.
    pub(crate) fn emit(&mut self, op: &str, inputs: &[&str], attrs: &[(&str, Attr)], mut out: Val) -> Option<Val> {
        let (limit, precision) = match out.dtype {
            DType::F16 => (2e3, 10),
            DType::F32 => (1e6, 22),
            DType::F64 => (1e6, 48),
            DType::Bool => (1e9, 64),
            DType::I8 | DType::U8 => (f64::MAX, 64),
            _ => (1e8, 64),
        };
        if out.most > limit || out.count() > 4096 || out.rank() > 5 {
            return None;
        }
        if let Some(bits) = out.bits
            && f64::from(bits) + out.most.max(1.0).log2().ceil() > f64::from(precision)
        {
            out.bits = None;
        }
        out.name = self.fresh("v");
        self.push(op, inputs, &[&out.name.clone()], attrs);
        self.vals.push(out.clone());
        Some(out)
    }

    /// Adds a node as it is.
    pub(crate) fn push(&mut self, op: &str, inputs: &[&str], outputs: &[&str], attrs: &[(&str, Attr)]) {
        let name = format!("{op}_{}", self.nodes.len());
        let message = attrs.iter().fold(node(op, &name, inputs, outputs), |m, (key, value)| m.with(5, &attribute(key, value)));
        self.nodes.push(message);
        self.used.push(op.into());
    }

    /// A name for an output of [`Gen::push`].
    pub(crate) fn output(&mut self, mut val: Val) -> Val {
        val.name = self.fresh("v");
        self.vals.push(val.clone());
        val
    }

    fn model(&self, outputs: &[Val]) -> Vec<u8> {
        let m = self.nodes.iter().fold(Message::new(), |m, n| m.with(1, n)).bytes(2, "random");
        let m = self.initializers.iter().fold(m, |m, t| m.with(5, t));
        let m = self.ports.iter().fold(m, |m, p| m.with(11, p));
        let graph = outputs.iter().fold(m, |m, v| m.with(12, &port(&v.name, v.dtype, None)));
        Message::new().int(1, 8).with(7, &graph).with(8, &Message::new().bytes(1, "").int(2, self.opset)).0
    }
}

/// The shape two shapes broadcast to.
pub(crate) fn broadcast(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let rank = a.len().max(b.len());
    let at = |s: &[usize], i: usize| (i + s.len()).checked_sub(rank).map_or(1, |i| s[i]);
    let dim = |i: usize| match (at(a, i), at(b, i)) {
        (x, y) if x == y => Some(x),
        (1, y) => Some(y),
        (x, 1) => Some(x),
        _ => None,
    };
    (0..rank).map(dim).collect()
}

/// The graph of a seed.
pub(crate) fn generate(seed: u64) -> Case {
    let mut rng = Rng::new(seed);
    let opset = rng.pick(&[13, 17, 18, 21]);
    let names = vec![];
    let mut g = Gen { rng, opset, vals: vec![], nodes: vec![], initializers: vec![], ports: vec![], inputs: vec![], used: names, names: 0 };
    let dtype = g.rng.pick(&[DType::F32, DType::F32, DType::F32, DType::F32, DType::F16, DType::F64, DType::I64, DType::I32, DType::I8, DType::U8]);
    let rank = g.rng.pick(&[0, 1, 2, 2, 3, 3, 4, 4, 4]);
    let shape: Vec<usize> = (0..rank).map(|_| g.rng.pick(&[1, 2, 3, 4, 5, 7, 8])).collect();
    g.input(dtype, shape.clone());
    if g.rng.one_in(2) {
        let other = g.rng.pick(&[dtype, dtype, DType::F32, DType::I64, DType::Bool]);
        let shape = shape.iter().map(|d| if g.rng.one_in(4) { 1 } else { *d }).collect();
        g.input(other, shape);
    }
    let inputs = g.vals.len();
    let nodes = g.rng.int(1, 7) as usize;
    for _ in 0..200 {
        if g.used.len() >= nodes {
            break;
        }
        let op = g.rng.pick(OPS);
        op(&mut g);
    }
    if g.vals.len() == inputs {
        let x = g.vals[0].clone();
        g.emit("Identity", &[&x.name], &[], x.clone());
    }
    // The last value, and sometimes another.
    let made: Vec<Val> = g.vals[inputs..].to_vec();
    let mut outputs = vec![made[made.len() - 1].clone()];
    if made.len() > 1 && g.rng.one_in(3) {
        outputs.push(g.rng.pick(&made[..made.len() - 1]));
    }
    let floats = g.vals.iter().map(|v| v.dtype).filter(|d| d.is_float());
    Case { model: g.model(&outputs), open: g.model(&made), coarsest: floats.min_by_key(|d| d.bits()), inputs: g.inputs.clone(), ops: g.used.clone() }
}
