//! Repeated layers: split where nothing is lost, searched once, and the same program as without.
use pavage_ir::program::{BufId, BufferKind, Step};
use pavage_ir::{DType, Dim, Graph, Op, Scalar, ScalarFn, Tensor, TensorType, Value, attr::ReduceFn};
use pavage_passes::{
    Ctx, build,
    eqsat::{self, templates},
};
use std::collections::BTreeSet;

const TOKENS: usize = 6;
const WIDTH: usize = 8;
const HEADS: usize = 2;

/// Builds an encoder op by op.
struct Encoder {
    g: Graph,
    seed: u64,
}

impl Encoder {
    fn op(&mut self, op: Op, xs: &[Value]) -> Value {
        self.g.add(op, xs).unwrap()
    }
    fn map(&mut self, f: ScalarFn, xs: &[Value]) -> Value {
        self.op(Op::Map(f), xs)
    }
    fn weight<const N: usize>(&mut self, shape: [usize; N]) -> Value {
        let seed = &mut self.seed;
        let next = |_| {
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            Scalar::F((*seed >> 40) as f64 / (1u64 << 24) as f64 - 0.5)
        };
        let t = Tensor::from_scalars(DType::F32, shape.to_vec(), (0..shape.iter().product()).map(next));
        self.g.constant(t)
    }
    fn shape(&self, v: Value) -> Vec<Dim> {
        self.g.ty(v).shape.clone()
    }
    fn wide(&mut self, v: Value, like: Value) -> Value {
        let shape = self.shape(like);
        self.op(Op::Broadcast { shape }, &[v])
    }
    fn scalar(&mut self, c: f64, like: Value) -> Value {
        let rank = self.shape(like).len();
        let c = self.g.constant(Tensor::full(DType::F32, vec![1; rank], Scalar::F(c)));
        self.wide(c, like)
    }
    fn reshape<const N: usize>(&mut self, v: Value, to: [usize; N]) -> Value {
        self.op(Op::Reshape { shape: to.iter().map(|d| Dim::from(*d)).collect() }, &[v])
    }
    fn dense(&mut self, x: Value, from: usize, to: usize) -> Value {
        let x = self.reshape(x, [TOKENS, from]);
        let (w, b) = (self.weight([from, to]), self.weight([1, 1, to]));
        let y = self.op(Op::MatMul { out: DType::F32 }, &[x, w]);
        let y = self.reshape(y, [1, TOKENS, to]);
        let b = self.wide(b, y);
        self.map(ScalarFn::Add, &[y, b])
    }
    fn mean(&mut self, x: Value) -> Value {
        let sum = self.op(Op::Reduce { f: ReduceFn::Sum, axes: vec![2] }, &[x]);
        let n = self.scalar(WIDTH as f64, sum);
        let mean = self.map(ScalarFn::Div, &[sum, n]);
        self.wide(mean, x)
    }
    fn norm(&mut self, x: Value) -> Value {
        let mean = self.mean(x);
        let centred = self.map(ScalarFn::Sub, &[x, mean]);
        let square = self.map(ScalarFn::Mul, &[centred, centred]);
        let var = self.mean(square);
        let eps = self.scalar(1e-5, var);
        let var = self.map(ScalarFn::Add, &[var, eps]);
        let sd = self.map(ScalarFn::Sqrt, &[var]);
        let unit = self.map(ScalarFn::Div, &[centred, sd]);
        let (g, b) = (self.weight([1, 1, WIDTH]), self.weight([1, 1, WIDTH]));
        let (g, b) = (self.wide(g, x), self.wide(b, x));
        let y = self.map(ScalarFn::Mul, &[unit, g]);
        self.map(ScalarFn::Add, &[y, b])
    }
    fn heads(&mut self, x: Value, perm: [usize; 4]) -> Value {
        let x = self.reshape(x, [1, TOKENS, HEADS, WIDTH / HEADS]);
        self.op(Op::Transpose { perm: perm.to_vec() }, &[x])
    }
    fn attention(&mut self, x: Value, mask: Value) -> Value {
        let [q, k, v] = [0, 1, 2].map(|_| self.dense(x, WIDTH, WIDTH));
        let (q, k, v) = (self.heads(q, [0, 2, 1, 3]), self.heads(k, [0, 2, 3, 1]), self.heads(v, [0, 2, 1, 3]));
        let scores = self.op(Op::MatMul { out: DType::F32 }, &[q, k]);
        let scale = self.scalar(0.5, scores);
        let scores = self.map(ScalarFn::Mul, &[scores, scale]);
        let mask = self.wide(mask, scores);
        let scores = self.map(ScalarFn::Add, &[scores, mask]);
        let max = self.op(Op::Reduce { f: ReduceFn::Max, axes: vec![3] }, &[scores]);
        let max = self.wide(max, scores);
        let shifted = self.map(ScalarFn::Sub, &[scores, max]);
        let exp = self.map(ScalarFn::Exp, &[shifted]);
        let sum = self.op(Op::Reduce { f: ReduceFn::Sum, axes: vec![3] }, &[exp]);
        let sum = self.wide(sum, exp);
        let p = self.map(ScalarFn::Div, &[exp, sum]);
        let y = self.op(Op::MatMul { out: DType::F32 }, &[p, v]);
        let y = self.op(Op::Transpose { perm: vec![0, 2, 1, 3] }, &[y]);
        let y = self.reshape(y, [1, TOKENS, WIDTH]);
        self.dense(y, WIDTH, WIDTH)
    }
    fn gelu(&mut self, x: Value) -> Value {
        let (root, one, half) = (self.scalar(2f64.sqrt(), x), self.scalar(1.0, x), self.scalar(0.5, x));
        let y = self.map(ScalarFn::Div, &[x, root]);
        let y = self.map(ScalarFn::Erf, &[y]);
        let y = self.map(ScalarFn::Add, &[y, one]);
        let y = self.map(ScalarFn::Mul, &[x, y]);
        self.map(ScalarFn::Mul, &[y, half])
    }
}

/// Layers that normalise their sums (as BERT), or their operands.
#[derive(Clone, Copy, PartialEq)]
enum Norm {
    After,
    Before,
}

fn encoder(layers: usize, norm: Norm) -> Graph {
    encoder_of(&vec![4 * WIDTH; layers], norm)
}

/// A layer for each inner width.
fn encoder_of(inner: &[usize], norm: Norm) -> Graph {
    let mut e = Encoder { g: Graph::new("encoder"), seed: 7 };
    let mut x = e.g.input("x", TensorType::new(DType::F32, [1, TOKENS, WIDTH]));
    let keep = e.g.input("keep", TensorType::new(DType::F32, [1, TOKENS]));
    let one = e.scalar(1.0, keep);
    let off = e.map(ScalarFn::Sub, &[one, keep]);
    let low = e.scalar(-1e4, off);
    let mask = e.map(ScalarFn::Mul, &[off, low]);
    let mask = e.reshape(mask, [1, 1, 1, TOKENS]);
    for &inner in inner {
        let of = if norm == Norm::Before { e.norm(x) } else { x };
        let y = e.attention(of, mask);
        x = e.map(ScalarFn::Add, &[x, y]);
        x = if norm == Norm::After { e.norm(x) } else { x };
        let of = if norm == Norm::Before { e.norm(x) } else { x };
        let y = e.dense(of, WIDTH, inner);
        let y = e.gelu(y);
        let y = e.dense(y, inner, WIDTH);
        x = e.map(ScalarFn::Add, &[x, y]);
        x = if norm == Norm::After { e.norm(x) } else { x };
    }
    e.g.output("y", x);
    e.g
}

fn kernels(graph: &Graph) -> Vec<String> {
    let ctx = Ctx::default();
    let program = build::program("fused", graph, &|g: &Graph| eqsat::optimise(g, &ctx), &ctx).unwrap();
    assert!(ctx.notes.borrow().is_empty(), "{:?}", ctx.notes);
    // Nothing is computed that nobody reads.
    let mut read: BTreeSet<BufId> = program.body.outputs.iter().copied().collect();
    for (i, buffer) in program.body.buffers.iter().enumerate() {
        if let BufferKind::View(of) = buffer.kind
            && read.contains(&BufId(i as u32))
        {
            read.insert(of);
        }
    }
    for step in &program.body.steps {
        let Step::Run { args, .. } = step else { continue };
        for mut buf in args.iter().copied() {
            while read.insert(buf) {
                match program.body.buffers[buf.index()].kind {
                    BufferKind::View(of) => buf = of,
                    _ => break,
                }
            }
        }
    }
    for step in &program.body.steps {
        let Step::Run { region, outputs, .. } = step else { continue };
        assert!(outputs.iter().any(|b| read.contains(b)), "{} is not read in\n{program}", region.name);
    }
    program.body.regions().iter().map(|(region, _)| region.name.clone()).collect()
}

#[test]
fn repeated_layers_are_equal_parts() {
    for norm in [Norm::After, Norm::Before] {
        let graph = encoder(6, norm);
        let parts = templates::split(&graph).unwrap();
        let mut texts: Vec<String> = parts.iter().map(|p| p.graph.to_string()).collect();
        texts.sort();
        texts.dedup();
        assert!(parts.len() >= 6, "{} parts", parts.len());
        assert!(texts.len() <= 5, "{} of {} parts are distinct:\n{}", texts.len(), parts.len(), texts.join("\n"));
    }
}

#[test]
fn each_layer_adds_the_same_kernels() {
    for norm in [Norm::After, Norm::Before] {
        let counts: Vec<usize> = (2..5).map(|n| kernels(&encoder(n, norm)).len()).collect();
        assert_eq!(counts[1] - counts[0], counts[2] - counts[1], "{counts:?}");
        assert!(counts[2] - counts[1] <= 12, "{counts:?}");
    }
}

/// What a search of 70 layers does, so many of them distinct; 5,000 nodes and more.
fn work(distinct: usize) -> eqsat::Work {
    let inner: Vec<usize> = (0..70).map(|layer| 2 * WIDTH + layer % distinct).collect();
    let graph = encoder_of(&inner, Norm::Before);
    assert!(graph.schedule().len() >= 5000, "{} nodes", graph.schedule().len());
    let ctx = Ctx::default();
    build::program("fused", &graph, &|g: &Graph| eqsat::optimise(g, &ctx), &ctx).unwrap();
    assert!(ctx.notes.borrow().is_empty(), "{:?}", ctx.notes);
    ctx.work.into_inner()
}

#[test]
fn a_search_of_five_thousand_nodes_grows_with_distinct_layers_alone() {
    let of = [4, 8, 16].map(work);
    let counts = |count: fn(&eqsat::Work) -> usize| of.each_ref().map(count);
    for [one, two, four] in [counts(|w| w.parts), counts(|w| w.terms), counts(|w| w.kernels), counts(|w| w.states)] {
        // Four more layers cost what four cost before.
        let (first, second) = (two - one, four - two);
        assert!(first > 0 && second.abs_diff(2 * first) * 8 <= first, "{of:?}");
    }
    assert!(of[0].parts < 20 && of[0].terms < 2000, "{of:?}");
}
