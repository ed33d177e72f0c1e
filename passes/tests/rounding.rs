//! Rounding as a choice of the search: offers against every combination, budgets by layer, and what only a whole plan can see.
use pavage_ir::{DType, Graph, Heart, Op, ScalarFn, Tensor, TensorType, Value, eval};
use pavage_passes::{
    self as passes, Ctx, PassError,
    eqsat::{
        self, cost,
        rounding::{Offers, Variant},
    },
    fuse::Cluster,
    precision::{
        self, Layer, Precision, Storage, choice,
        quantise::{Scale, Symmetry},
    },
};
use std::collections::{BTreeMap, BTreeSet};

struct Random(u64);

impl Random {
    /// About normal.
    fn normal(&mut self) -> f64 {
        let mut unit = || {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.0 >> 11) as f64 / (1u64 << 53) as f64
        };
        (0..12).map(|_| unit()).sum::<f64>() - 6.0
    }
    fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let n = shape.iter().product();
        Tensor::from_f32(shape.to_vec(), &(0..n).map(|_| self.normal() as f32).collect::<Vec<_>>())
    }
}

fn ctx() -> Ctx {
    Ctx { costs: cost::CPU, ..Ctx::default() }
}

/// `n` layers of `width` by `width`, one after the other, each with a bias and a ReLU.
fn chain(n: usize, rows: usize, width: usize, random: &mut Random) -> Graph {
    let mut g = Graph::new("chain");
    let mut x = g.input("x", TensorType::new(DType::F32, [rows, width]));
    let zero = g.constant(Tensor::from_f32([1, 1], &[0.0]));
    let zeros = g.add(Op::Broadcast { shape: vec![rows.into(), width.into()] }, &[zero]).unwrap();
    for i in 0..n {
        x = product(&mut g, x, width, width, random);
        g.set_source(x.node, vec![format!("layer{i}")]);
        let bias = g.constant(random.tensor(&[1, width]));
        let bias = g.add(Op::Broadcast { shape: vec![rows.into(), width.into()] }, &[bias]).unwrap();
        x = g.add(Op::Map(ScalarFn::Add), &[x, bias]).unwrap();
        x = g.add(Op::Map(ScalarFn::Max), &[x, zeros]).unwrap();
    }
    g.output("y", x);
    g
}

fn product(g: &mut Graph, x: Value, from: usize, to: usize, random: &mut Random) -> Value {
    let scale = (from as f32).sqrt().recip();
    let w = random.tensor(&[from, to]).to_f64().iter().map(|v| *v as f32 * scale).collect::<Vec<_>>();
    let w = g.constant(Tensor::from_f32([from, to], &w));
    g.add(Op::MatMul { out: DType::F32 }, &[x, w]).unwrap()
}

/// Layers, variants with the errors that `errors` says of each layer and variant, on ranges of -4 to 4.
fn variants(graph: &Graph, wanted: &[Precision], ctx: &Ctx, errors: impl Fn(usize, usize) -> f64) -> (Vec<Layer>, Vec<Variant>) {
    let layers = precision::layers(graph, wanted, Storage::default(), &ctx.costs).unwrap();
    let errors: Vec<Vec<f64>> = layers.iter().enumerate().map(|(i, l)| (0..l.variants.len()).map(|j| errors(i, j)).collect()).collect();
    let variants = precision::variants(graph, &layers, &errors, &ranges(graph, &layers), &ctx.costs).unwrap();
    (layers, variants)
}

fn ranges(graph: &Graph, layers: &[Layer]) -> BTreeMap<Value, Scale> {
    precision::activations(graph, layers).into_iter().map(|v| (v, Scale::of((-4.0, 4.0)))).collect()
}

fn time(plan: &[Cluster], costs: &cost::Costs) -> f64 {
    plan.iter().map(|c| cost::predict(&c.formed.region, costs)).sum()
}

fn relative(want: &[f64], got: &[f64]) -> f64 {
    let size: f64 = want.iter().map(|w| w * w).sum();
    (want.iter().zip(got).map(|(w, g)| (w - g).powi(2)).sum::<f64>() / size).sqrt()
}

/// Without anything to round the plan is that of the search; with everything it is faster, and computes what the layers in fewer bits do.
#[test]
fn the_fastest_plan_computes_the_variants_and_the_exact_one_is_the_search_s() -> Result<(), PassError> {
    let ctx = ctx();
    let mut random = Random(1);
    let graph = chain(3, 4, 256, &mut random);
    let x = random.tensor(&[4, 256]);
    let run = |g: &Graph| eval::eval(g, std::slice::from_ref(&x)).unwrap()[0].to_f64();
    let (_, plain) = eqsat::optimise(&graph, &ctx)?;
    for (wanted, most) in [(Precision::W8, 2e-2), (Precision::W4, 0.2), (Precision::F16, 1e-3), (Precision::Int8, 0.1)] {
        let (layers, variants) = variants(&graph, &[wanted], &ctx, |_, _| 0.0);
        assert_eq!(variants.len(), 3, "{wanted}");
        let mut offers = Offers::new(&graph, &variants, &ctx)?;
        let exact = offers.build(&vec![None; offers.offers().len()])?;
        assert!((time(&exact.1, &ctx.costs) - time(&plain, &ctx.costs)).abs() < 1e-6);
        assert_eq!(run(&exact.0), run(&graph));
        let picks = choice::choose(&offers.offers(), f64::INFINITY);
        assert_eq!(offers.chosen(&picks), BTreeMap::from([(0, 0), (1, 0), (2, 0)]), "{wanted}");
        let (fast, clusters) = offers.build(&picks)?;
        assert!(time(&clusters, &ctx.costs) < time(&plain, &ctx.costs));
        let error = relative(&run(&graph), &run(&fast));
        assert!(error > 0.0 && error < most, "{wanted} {error}");
        // The same as the layers written into the graph.
        let mut applied = precision::apply(&graph, &layers, &[Some(0); 3], &ranges(&graph, &layers))?;
        passes::run(&mut applied, &ctx, passes::PIPELINE)?;
        assert!(relative(&run(&applied), &run(&fast)) < 1e-2 * error.max(1e-3), "{wanted}");
        assert!(offers.gains(&picks)?.iter().all(|t| t.gain > 0.0));
    }
    Ok(())
}

/// Integer layers in a row hand on bytes: quantisation is in the epilogue of the kernel before.
#[test]
fn integer_layers_in_a_row_hand_on_bytes() -> Result<(), PassError> {
    let ctx = ctx();
    let graph = chain(3, 64, 256, &mut Random(2));
    let (_, variants) = variants(&graph, &[Precision::Int8], &ctx, |_, _| 0.0);
    let mut offers = Offers::new(&graph, &variants, &ctx)?;
    let picks = choice::choose(&offers.offers(), f64::INFINITY);
    let (_, clusters) = offers.build(&picks)?;
    let products: Vec<&Cluster> = clusters.iter().filter(|c| matches!(c.formed.region.heart, Heart::Contract { acc: DType::I32, .. })).collect();
    let bytes = products.iter().filter(|c| c.formed.region.outputs.iter().all(|o| o.ty.dtype == DType::U8)).count();
    assert_eq!((products.len(), bytes, clusters.len()), (3, 2, 4), "{:?}", clusters.iter().map(|c| &c.formed.region.name).collect::<Vec<_>>());
    Ok(())
}

/// Every plan offered is as good as any choice of variants: none is faster with no more error.
#[test]
fn no_choice_of_variants_beats_a_plan_that_is_offered() -> Result<(), PassError> {
    let ctx = ctx();
    let mut random = Random(3);
    let graph = chain(3, 8, 128, &mut random);
    let wanted = [Precision::W8, Precision::Int8];
    // Each layer has errors of its own.
    let error = |layer: usize, variant: usize| [[3.0, 1.0], [0.5, 7.0], [2.0, 2.5]][layer][variant] * 1e-4;
    let (_, all) = variants(&graph, &wanted, &ctx, error);
    assert_eq!(all.len(), 6);
    let offers = Offers::new(&graph, &all, &ctx)?;
    let exact = offers.exact_ns();
    let offered: Vec<(f64, f64)> = offers.offers().concat().iter().map(|o| (exact - o.gain, o.error)).collect();
    assert!(offered.len() >= 3, "{offered:?}");
    for code in 0..27usize {
        let picks: Vec<usize> = (0..3).map(|i| code / 3usize.pow(i) % 3).collect();
        let some: Vec<Variant> = all.iter().filter(|v| picks[v.layer] == v.index + 1).map(|v| Variant { error: 0.0, ..v.clone() }).collect();
        let sum: f64 = all.iter().filter(|v| picks[v.layer] == v.index + 1).map(|v| v.error).sum();
        let forced = Offers::new(&graph, &some, &ctx)?;
        let fastest = forced.exact_ns() - forced.offers().concat().iter().map(|o| o.gain).fold(0.0, f64::max);
        for (time, error) in &offered {
            assert!(fastest >= time - 1e-6 || sum > error - 1e-12, "{picks:?} takes {fastest} with {sum}, against {time} with {error}");
        }
    }
    Ok(())
}

/// Equal layers in different parts share a search, but not their choice: the budget goes where errors are small.
#[test]
fn equal_layers_are_chosen_by_their_own_errors() -> Result<(), PassError> {
    let ctx = ctx();
    let graph = chain(36, 4, 128, &mut Random(4));
    let even = |layer: usize, _: usize| if layer.is_multiple_of(2) { 1e-4 } else { 1e-2 };
    let (layers, variants) = variants(&graph, &[Precision::W8], &ctx, even);
    assert_eq!(layers.len(), 36);
    let offers = Offers::new(&graph, &variants, &ctx)?;
    let work = *ctx.work.borrow();
    assert!(work.parts < offers.offers().len(), "{} of {}", work.parts, offers.offers().len());
    let picks = choice::choose(&offers.offers(), 18.5e-4);
    let chosen: BTreeSet<usize> = offers.chosen(&picks).into_keys().collect();
    assert!(chosen.len() >= 16 && chosen.iter().all(|l| l % 2 == 0), "{chosen:?}");
    Ok(())
}

/// Bringing a tensor onto its grid costs more than one narrow product saves, and less than eight do: that only a whole plan can see.
#[test]
fn what_one_layer_does_not_pay_for_several_do() -> Result<(), PassError> {
    let ctx = Ctx { costs: cost::Costs { byte_flops_per_ns: 255.0, ..cost::CPU }, ..Ctx::default() };
    let heads = |n: usize| {
        let mut random = Random(5);
        let mut g = Graph::new("heads");
        let x = g.input("x", TensorType::new(DType::F32, [256usize, 512]));
        for i in 0..n {
            let y = product(&mut g, x, 512, 64, &mut random);
            g.output(format!("y{i}"), y);
        }
        g
    };
    let taken = |graph: &Graph| -> Result<usize, PassError> {
        let (_, variants) = variants(graph, &[Precision::Int8], &ctx, |_, _| 0.0);
        let offers = Offers::new(graph, &variants, &ctx)?;
        Ok(offers.chosen(&choice::choose(&offers.offers(), f64::INFINITY)).len())
    };
    assert_eq!((taken(&heads(1))?, taken(&heads(8))?), (0, 8));
    Ok(())
}

/// Products of one row by packed weights are one product of weights packed side by side, as those in f32 are.
#[test]
fn packed_siblings_are_one_product() -> Result<(), PassError> {
    let ctx = ctx();
    for (wanted, storage) in [
        (Precision::W8, Storage::default()),
        (Precision::W4, Storage { group: Some(32), symmetry: Symmetry::Asymmetric }),
        (Precision::F16, Storage::default()),
    ] {
        let mut random = Random(7);
        let mut graph = Graph::new("siblings");
        let x = graph.input("x", TensorType::new(DType::F32, [1usize, 512]));
        let [a, b, c] = [(); 3].map(|()| product(&mut graph, x, 512, 512, &mut random));
        let y = graph.add(Op::Map(ScalarFn::Mul), &[a, b]).unwrap();
        let y = graph.add(Op::Map(ScalarFn::Add), &[y, c]).unwrap();
        graph.output("y", y);
        let layers = precision::layers(&graph, &[wanted], storage, &ctx.costs).unwrap();
        let variants = precision::variants(&graph, &layers, &[], &BTreeMap::new(), &ctx.costs).unwrap();
        let mut offers = Offers::new(&graph, &variants, &ctx)?;
        let picks = choice::choose(&offers.offers(), f64::INFINITY);
        assert_eq!(offers.chosen(&picks).len(), 3, "{wanted}");
        let (merged, clusters) = offers.build(&picks)?;
        let products = clusters.iter().filter(|c| matches!(c.formed.region.heart, Heart::Contract { .. })).count();
        assert_eq!(products, 1, "{wanted}: {:?}", clusters.iter().map(|c| &c.formed.region.name).collect::<Vec<_>>());
        let apart = precision::apply(&graph, &layers, &[Some(0); 3], &BTreeMap::new())?;
        let x = random.tensor(&[1, 512]);
        for (a, b) in eval::eval(&merged, std::slice::from_ref(&x)).unwrap().iter().zip(eval::eval(&apart, std::slice::from_ref(&x)).unwrap()) {
            assert!(relative(&b.to_f64(), &a.to_f64()) < 1e-6, "{wanted}");
        }
    }
    Ok(())
}

/// A variant whose error leaves the budget, or is not finite, is in no plan that is taken.
#[test]
fn what_is_too_far_off_is_left_out() -> Result<(), PassError> {
    let ctx = ctx();
    let graph = chain(2, 4, 128, &mut Random(6));
    let (_, variants) = variants(&graph, &[Precision::W8], &ctx, |_, _| 1.0);
    let offers = Offers::new(&graph, &variants, &ctx)?;
    let picks = choice::choose(&offers.offers(), 0.5);
    assert!(picks.iter().all(Option::is_none));
    let (_, nothing) = self::variants(&graph, &[Precision::W8], &ctx, |_, _| f64::NAN);
    assert!(nothing.is_empty());
    Ok(())
}
