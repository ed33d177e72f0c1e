//! The pass `weights`: dequantised constants, however they are spelled, become one `dequant` of the same values.
use pavage_ir::{DType, Dim, Graph, Op, Scalar, ScalarFn, Tensor, TensorType, Value, eval};
use pavage_passes::{
    self as passes, Ctx,
    eqsat::cost::{self, Costs},
};

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
    fn ints(&mut self, dtype: DType, shape: &[usize]) -> Tensor {
        let (lo, hi) = dtype.int_range();
        Tensor::from_scalars(
            dtype,
            shape.to_vec(),
            (0..shape.iter().product()).map(|_| Scalar::I(lo + i128::from(self.below((hi - lo + 1) as u64)))).collect::<Vec<_>>(),
        )
    }
    fn floats(&mut self, shape: &[usize]) -> Tensor {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| self.below(1000) as f32 / 5000.0 + 0.01).collect();
        Tensor::from_f32(shape.to_vec(), &values)
    }
}

fn dims(shape: &[usize]) -> Vec<Dim> {
    shape.iter().map(|n| Dim::from(*n)).collect()
}

/// How scales and zero points reach the shape of the weights.
#[derive(Clone, Copy)]
enum Spelling {
    Tensor,
    Channel,
    Block,
    /// Blocks, written out in full.
    Whole,
}

const K: usize = 96;
const N: usize = 64;

/// `x @ ((cast(q) - zero) * scale)`, of `n` rows, the weights perhaps transposed.
fn product(dtype: DType, spelling: Spelling, zero: bool, transposed: bool, random: &mut Random) -> Graph {
    let shape = if transposed { [N, K] } else { [K, N] };
    let k = usize::from(transposed);
    let mut g = Graph::new("product");
    let x = g.input("x", TensorType::new(DType::F32, [5, K]));
    let full = |g: &mut Graph, t: Tensor| -> Value {
        let own = t.shape().to_vec();
        let c = g.constant(t);
        match spelling {
            Spelling::Tensor | Spelling::Channel => g.add(Op::Broadcast { shape: dims(&shape) }, &[c]).unwrap(),
            Spelling::Block => {
                // (.., blocks, ..) -> (.., blocks, 1, ..) -> (.., blocks, 32, ..) -> (.., blocks * 32, ..)
                let mut wide = own.clone();
                wide.insert(k + 1, 1);
                let v = g.add(Op::Reshape { shape: dims(&wide) }, &[c]).unwrap();
                wide[k + 1] = 32;
                let v = g.add(Op::Broadcast { shape: dims(&wide) }, &[v]).unwrap();
                g.add(Op::Reshape { shape: dims(&shape) }, &[v]).unwrap()
            }
            Spelling::Whole => {
                let t = g.as_const(c).unwrap().clone();
                let source = |i: usize| {
                    let mut at = [i / shape[1], i % shape[1]];
                    at[k] /= 32;
                    at[0] * own[1] + at[1]
                };
                g.constant(Tensor::from_scalars(t.dtype(), shape.to_vec(), (0..K * N).map(|i| t.get(source(i)))))
            }
        }
    };
    let mut small = match spelling {
        Spelling::Tensor => [1, 1],
        Spelling::Channel | Spelling::Block | Spelling::Whole => [N, N],
    };
    match spelling {
        Spelling::Channel => small[k] = 1,
        Spelling::Block | Spelling::Whole => small[k] = K / 32,
        Spelling::Tensor => {}
    }
    let q = g.constant(random.ints(dtype, &shape));
    let mut w = g.add(Op::Cast { to: DType::F32 }, &[q]).unwrap();
    if zero {
        let z = random.ints(dtype, &small);
        let z = Tensor::from_scalars(DType::F32, small.to_vec(), (0..z.count()).map(|i| z.get(i)));
        let z = full(&mut g, z);
        w = g.add(Op::Map(ScalarFn::Sub), &[w, z]).unwrap();
    }
    let s = full(&mut g, random.floats(&small));
    w = g.add(Op::Map(ScalarFn::Mul), &[w, s]).unwrap();
    if transposed {
        w = g.add(Op::Transpose { perm: vec![1, 0] }, &[w]).unwrap();
    }
    let y = g.add(Op::MatMul { out: DType::F32 }, &[x, w]).unwrap();
    g.output("y", y);
    g
}

fn dequants(graph: &Graph) -> Vec<Vec<usize>> {
    graph.nodes().into_iter().filter_map(|id| if let Some(Op::Dequant { blocks }) = graph.op(id) { Some(blocks.clone()) } else { None }).collect()
}

#[test]
fn every_spelling_stays_packed_and_means_the_same() {
    let mut random = Random(3);
    for dtype in [DType::I8, DType::U8, DType::I4, DType::U4] {
        for (spelling, block) in [(Spelling::Tensor, K), (Spelling::Channel, K), (Spelling::Block, 32), (Spelling::Whole, 32)] {
            for (zero, transposed) in [(false, false), (true, false), (true, true), (false, true)] {
                let before = product(dtype, spelling, zero, transposed, &mut random);
                let mut after = before.clone();
                passes::run(&mut after, &Ctx { costs: cost::CPU, ..Ctx::default() }, passes::PIPELINE).unwrap();
                let found = dequants(&after);
                assert_eq!(found.len(), 1, "{}", pavage_ir::text::print(&after));
                assert_eq!(found[0][0], block);
                let x = random.floats(&[5, K]);
                let (want, got) = (eval::eval(&before, std::slice::from_ref(&x)).unwrap(), eval::eval(&after, &[x]).unwrap());
                let (want, got) = (want[0].to_f64(), got[0].to_f64());
                for (w, g) in want.iter().zip(&got) {
                    assert!((w - g).abs() <= 1e-5 * (1.0 + w.abs()), "{w} {g}");
                }
            }
        }
    }
}

#[test]
fn the_product_reads_packed_weights_in_one_kernel() {
    let mut graph = product(DType::U4, Spelling::Block, true, false, &mut Random(11));
    let ctx = Ctx { costs: cost::CPU, ..Ctx::default() };
    passes::run(&mut graph, &ctx, passes::PIPELINE).unwrap();
    for fused in [true, false] {
        let search = |g: &Graph| passes::eqsat::optimise(g, &ctx);
        let planner: passes::build::Planner = if fused { &search } else { &passes::build::unfused };
        let program = passes::build::program("p", &graph, planner, &ctx).unwrap();
        let regions = program.body.regions();
        assert_eq!(regions.len(), 1, "{program}");
        assert_eq!(regions[0].0.args[1].dtype, DType::U4);
        // They are read at the rate of weights, at the size they are stored in.
        let weights = |costs: &Costs| cost::price(regions[0].0, costs).memory;
        let slower = Costs { weight_bytes_per_ns: cost::CPU.weight_bytes_per_ns / 2.0, ..cost::CPU };
        let bytes = regions[0].0.args[1].shape.iter().map(|d| d.as_const().unwrap() as f64).product::<f64>() / 2.0;
        let added = weights(&slower) - weights(&cost::CPU);
        assert!((added - bytes / cost::CPU.weight_bytes_per_ns).abs() < 1e-9, "{added} ns for {bytes} bytes");
    }
}

#[test]
fn many_rows_and_other_uses_leave_floats() {
    let mut many = Graph::new("many");
    let x = many.input("x", TensorType::new(DType::F32, [100_000, K]));
    let q = many.constant(Random(5).ints(DType::I8, &[K, N]));
    let w = many.add(Op::Cast { to: DType::F32 }, &[q]).unwrap();
    let s = many.constant(Tensor::from_f32([1, 1], &[0.5]));
    let s = many.add(Op::Broadcast { shape: dims(&[K, N]) }, &[s]).unwrap();
    let w = many.add(Op::Map(ScalarFn::Mul), &[w, s]).unwrap();
    let y = many.add(Op::MatMul { out: DType::F32 }, &[x, w]).unwrap();
    many.output("y", y);
    passes::run(&mut many, &Ctx { costs: cost::CPU, ..Ctx::default() }, passes::PIPELINE).unwrap();
    assert!(dequants(&many).is_empty());
}
