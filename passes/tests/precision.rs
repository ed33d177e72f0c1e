//! Precision: quantisers against independent arithmetic, and layers in fewer bits against what they were.
use pavage_ir::{DType, Graph, Op, Scalar, ScalarFn, Tensor, TensorType, Value, attr::Layout, eval};
use pavage_passes::{
    self as passes, Ctx,
    eqsat::cost,
    precision::{
        self, Precision, Storage,
        quantise::{self, Grid, Method, Observed, Scale, Symmetry},
    },
    weights::Packed,
};
use std::collections::BTreeMap;

struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
    /// About normal.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }
    fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| self.normal() as f32).collect();
        Tensor::from_f32(shape.to_vec(), &values)
    }
}

const K: usize = 96;
const N: usize = 64;

/// The numbers that packed weights stand for.
fn numbers(w: &Packed) -> Vec<f64> {
    let (q, blocks, shape) = (w.q.to_f64(), &w.blocks, w.q.shape());
    let (scale, zero) = (w.scale.as_ref().unwrap().to_f64(), w.zero.as_ref().map(|z| z.to_f64()));
    let columns = shape[1].div_ceil(blocks[1]);
    let at = |i: usize| i / shape[1] / blocks[0] * columns + i % shape[1] / blocks[1];
    (0..q.len()).map(|i| (q[i] - zero.as_ref().map_or(0.0, |z| z[at(i)])) * scale[at(i)]).collect()
}

#[test]
fn weights_lie_on_the_grid_of_their_group() {
    let w = Random(1).tensor(&[K, N]);
    let values = w.to_f64();
    for group in [None, Some(32), Some(48)] {
        let packed = quantise::weights(&w, 0, Grid { bits: 8, group, symmetry: Symmetry::Symmetric });
        let rows = group.unwrap_or(K);
        assert_eq!((packed.q.dtype(), packed.blocks.as_slice()), (DType::I8, [rows, 1].as_slice()));
        let scale = packed.scale.as_ref().unwrap();
        assert_eq!(scale.shape(), [K / rows, N]);
        for g in 0..K / rows {
            for n in 0..N {
                let column: Vec<f64> = (g * rows..(g + 1) * rows).map(|k| values[k * N + n]).collect();
                let s = (column.iter().fold(0.0f64, |m, v| m.max(v.abs())) / 127.0) as f32;
                assert_eq!(scale.get(g * N + n).f(), f64::from(s));
                for (k, v) in column.iter().enumerate() {
                    assert_eq!(packed.q.get((g * rows + k) * N + n).i(), (v / f64::from(s)).round_ties_even() as i128);
                }
            }
        }
    }
}

#[test]
fn every_grid_is_close_and_holds_zero() {
    let mut random = Random(2);
    let mut w = random.tensor(&[K, N]).to_f64();
    w.iter_mut().step_by(7).for_each(|v| *v = 0.0);
    // Columns all of one sign, where a zero point helps.
    (0..K).for_each(|k| w[k * N] = w[k * N].abs() + 3.0);
    let tensor = Tensor::from_scalars(DType::F32, vec![K, N], w.iter().map(|v| Scalar::F(*v)));
    let w = tensor.to_f64();
    let mut errors = BTreeMap::new();
    for bits in [8, 4] {
        for (symmetry, name) in [(Symmetry::Symmetric, "symmetric"), (Symmetry::Asymmetric, "asymmetric")] {
            for group in [32, 96] {
                let packed = quantise::weights(&tensor, 0, Grid { bits, group: Some(group), symmetry });
                let got = numbers(&packed);
                let scale = packed.scale.as_ref().unwrap();
                for (i, (w, g)) in w.iter().zip(&got).enumerate() {
                    let s = scale.get(i / N / group * N + i % N).f();
                    // The zero point moves the grid by half a step at most; a cut of 4 bits moves its ends.
                    let most = if bits == 8 { s * 1.01 } else { s * 4.0 };
                    assert!((w - g).abs() <= most, "{bits} {name} {group}: {w} {g} {s}");
                    assert!(*w != 0.0 || *g == 0.0);
                }
                errors.insert((bits, name, group), w.iter().zip(&got).map(|(a, b)| (a - b).powi(2)).sum::<f64>());
            }
        }
    }
    for name in ["symmetric", "asymmetric"] {
        assert!(errors[&(8, name, 96)] < errors[&(4, name, 32)] / 20.0);
        assert!(errors[&(4, name, 32)] < errors[&(4, name, 96)]);
    }
    let column = |symmetry| {
        let packed = quantise::weights(&tensor, 0, Grid { bits: 4, group: None, symmetry });
        numbers(&packed).iter().zip(&w).step_by(N).map(|(a, b)| (a - b).powi(2)).sum::<f64>()
    };
    assert!(column(Symmetry::Asymmetric) < column(Symmetry::Symmetric));
}

#[test]
fn ranges_cut_what_is_rare_and_far() {
    let mut random = Random(3);
    let mut values: Vec<f32> = (0..200_000).map(|_| random.normal().abs() as f32).collect();
    values[77] = 200.0;
    let mut seen = Observed::default();
    seen.widen(&values);
    seen.count(&values);
    assert_eq!(seen.range(Method::MinMax), (0.0, 200.0));
    let error = |(least, most)| {
        let grid = Scale::of((least, most));
        values.iter().map(|v| (grid.number(grid.step(f64::from(*v))) - f64::from(*v)).powi(2)).sum::<f64>()
    };
    for method in [Method::Percentile, Method::Entropy, Method::Mse] {
        let (least, most) = seen.range(method);
        assert!(least == 0.0 && most > 2.0 && most < 200.0, "{method:?} {least} {most}");
    }
    assert!(error(seen.range(Method::Mse)) <= error(seen.range(Method::MinMax)));
    let (_, most) = seen.range(Method::Percentile);
    let beyond = values.iter().filter(|v| f64::from(**v) > most).count();
    assert!(beyond <= values.len() / 5_000, "{beyond}");
    // A range that is symmetric about 0 has 0 on the grid.
    let grid = Scale::of((-1.3, 2.9));
    assert_eq!(grid.number(grid.step(0.0)), 0.0);
}

/// Half of what a ReLU leaves is 0: that, and the chance of few values, must not cut the range.
#[test]
fn entropy_keeps_what_a_relu_leaves_however_few_the_values() {
    for (n, symmetric) in [(3_000, false), (3_000, true), (30_000, false), (300_000, false), (300_000, true)] {
        let mut random = Random(n as u64);
        let values: Vec<f32> = (0..n).map(|_| random.normal() as f32).map(|v| if symmetric { v } else { v.max(0.0) }).collect();
        let mut seen = Observed::default();
        seen.widen(&values);
        seen.count(&values);
        let error = |range| {
            let grid = Scale::of(range);
            values.iter().map(|v| (grid.number(grid.step(f64::from(*v))) - f64::from(*v)).powi(2)).sum::<f64>()
        };
        assert!(!seen.too_few(Method::Entropy));
        let (cut, whole) = (error(seen.range(Method::Entropy)), error(seen.range(Method::MinMax)));
        assert!(cut < 1.5 * whole, "{n} {symmetric}: {cut} against {whole}, {:?}", seen.range(Method::Entropy));
    }
    let mut few = Observed::default();
    let values: Vec<f32> = (0..500).map(|i| i as f32).collect();
    few.widen(&values);
    few.count(&values);
    assert!(few.too_few(Method::Entropy) && !few.too_few(Method::Mse));
    assert_eq!(few.range(Method::Entropy), (0.0, 499.0));
}

/// `relu(x @ a) @ b`.
fn two_layers(random: &mut Random) -> (Graph, Vec<Value>) {
    let mut g = Graph::new("two");
    let x = g.input("x", TensorType::new(DType::F32, [7usize, K]));
    let a = g.constant(random.tensor(&[K, N]));
    let b = g.constant(random.tensor(&[N, K]));
    let y = g.add(Op::MatMul { out: DType::F32 }, &[x, a]).unwrap();
    let zero = g.constant(Tensor::from_f32([1, 1], &[0.0]));
    let zeros = g.add(Op::Broadcast { shape: vec![7usize.into(), N.into()] }, &[zero]).unwrap();
    let r = g.add(Op::Map(ScalarFn::Max), &[y, zeros]).unwrap();
    let z = g.add(Op::MatMul { out: DType::F32 }, &[r, b]).unwrap();
    g.output("z", z);
    (g, vec![x, r])
}

fn relative(want: &[f64], got: &[f64]) -> f64 {
    let size: f64 = want.iter().map(|w| w * w).sum();
    (want.iter().zip(got).map(|(w, g)| (w - g).powi(2)).sum::<f64>() / size).sqrt()
}

#[test]
fn layers_in_every_precision_stay_close_and_the_probe_says_how_close() {
    let mut random = Random(4);
    let (graph, activations) = two_layers(&mut random);
    let x = random.tensor(&[7, K]);
    let want = eval::eval(&graph, std::slice::from_ref(&x)).unwrap()[0].to_f64();
    let ctx = Ctx { costs: cost::CPU, ..Ctx::default() };
    // What the inputs of the layers are.
    let seen = eval::eval(&precision::observing(&graph, &activations), std::slice::from_ref(&x)).unwrap();
    let ranges: BTreeMap<Value, Scale> = activations
        .iter()
        .zip(&seen[1..])
        .map(|(v, t)| {
            let mut o = Observed::default();
            o.widen(&t.to_f64().iter().map(|v| *v as f32).collect::<Vec<_>>());
            (*v, Scale::of(o.range(Method::MinMax)))
        })
        .collect();
    for (wanted, most) in [(Precision::F16, 1e-3), (Precision::Bf16, 5e-3), (Precision::W8, 1e-2), (Precision::W4, 0.15), (Precision::Int8, 3e-2)] {
        for symmetry in [Symmetry::Symmetric, Symmetry::Asymmetric] {
            let storage = Storage { group: None, symmetry };
            let layers = precision::layers(&graph, &[wanted], storage, &ctx.costs).unwrap();
            assert!(layers.len() == 2 && layers.iter().all(|l| l.variants.len() == 1), "{wanted}: {layers:?}");
            let mut after = precision::apply(&graph, &layers, &[Some(0), Some(0)], &ranges).unwrap();
            passes::run(&mut after, &ctx, passes::PIPELINE).unwrap();
            let got = eval::eval(&after, std::slice::from_ref(&x)).unwrap()[0].to_f64();
            let error = relative(&want, &got);
            assert!(error > 0.0 && error < most, "{wanted} {error}");
            let integers = after.nodes().into_iter().filter(|id| matches!(after.op(*id), Some(Op::MatMul { out: DType::I32 }))).count();
            assert_eq!(integers, if wanted == Precision::Int8 { 2 } else { 0 });
            // The second layer alone, as the probe has it.
            let only = precision::apply(&graph, &layers, &[None, Some(0)], &ranges).unwrap();
            let got = eval::eval(&only, std::slice::from_ref(&x)).unwrap()[0].to_f64();
            let probe = precision::probe(&graph, &layers, &ranges).unwrap();
            let said: BTreeMap<String, f64> =
                probe.outputs.iter().map(|o| o.name.clone()).zip(eval::eval(&probe, std::slice::from_ref(&x)).unwrap().iter().map(|t| t.get(0).f())).collect();
            let measured = (said["error:1:0"] / said["size:1"]).sqrt();
            assert!((measured - relative(&want, &got)).abs() <= 1e-3 * measured, "{wanted}");
        }
    }
}

/// A batch norm after a convolution goes into its weights; the layer is the convolution all the same.
#[test]
fn layers_go_by_the_name_of_their_product() {
    let mut random = Random(8);
    let mut graph = Graph::new("named");
    let x = graph.input("x", TensorType::new(DType::F32, [1usize, 8, 6, 6]));
    let w = graph.constant(random.tensor(&[8, 8, 1, 1]));
    let window = Op::Conv { strides: vec![1, 1], dilations: vec![1, 1], lo: vec![0, 0], hi: vec![0, 0], groups: 1, layout: Layout::ChannelsFirst };
    let mut y = graph.add(window, &[x, w]).unwrap();
    graph.set_source(y.node, vec!["stem/conv".into()]);
    for f in [ScalarFn::Mul, ScalarFn::Add] {
        let k = graph.constant(random.tensor(&[1, 8, 1, 1]));
        let k = graph.add(Op::Broadcast { shape: graph.ty(y).shape.clone() }, &[k]).unwrap();
        y = graph.add(Op::Map(f), &[y, k]).unwrap();
        graph.set_source(y.node, vec!["stem/bn".into()]);
    }
    graph.output("y", y);
    let ctx = Ctx { costs: cost::CPU, ..Ctx::default() };
    passes::run(&mut graph, &ctx, passes::PIPELINE).unwrap();
    let layers = precision::layers(&graph, &[Precision::W8], Storage::default(), &ctx.costs).unwrap();
    assert_eq!(layers.iter().map(|l| l.name.as_str()).collect::<Vec<_>>(), ["stem/conv"]);
    let product = graph[layers[0].value.node].source.clone();
    assert_eq!(product, ["stem/bn", "stem/conv"]);
}

#[test]
fn what_cannot_be_narrowed_says_why() {
    let (graph, _) = two_layers(&mut Random(5));
    let slow = cost::Costs { byte_flops_per_ns: 2_000.0, ..cost::GPU };
    let layers = precision::layers(&graph, &[Precision::Int8, Precision::W8], Storage::default(), &slow).unwrap();
    assert!(layers[0].refused.iter().any(|(p, why)| *p == Precision::Int8 && why.contains("no faster")));
    let mut large = Graph::new("large");
    let x = large.input("x", TensorType::new(DType::F32, [1usize, 4096]));
    let mut w = Random(6).tensor(&[4096, 4]).to_f64();
    w[0] = 1e6;
    let w = large.constant(Tensor::from_scalars(DType::F32, vec![4096, 4], w.into_iter().map(Scalar::F)));
    let y = large.add(Op::MatMul { out: DType::F32 }, &[x, w]).unwrap();
    large.output("y", y);
    let layers = precision::layers(&large, &[Precision::F16], Storage::default(), &cost::CPU).unwrap();
    assert!(layers[0].variants.is_empty() && layers[0].refused[0].1.contains("range of f16"));
}
