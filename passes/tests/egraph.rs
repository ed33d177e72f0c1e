//! All terms of a class have one value: saturated graphs are evaluated term by term.
//!
//! Computed rules have no text to enumerate, so they are checked on random graphs made of what they look for, and all
//! rules together on the graphs of `tests/cases/optimize`, with their run-time sizes small.
use pavage_ir::{
    Binding, DType, Dim, Graph, NodeKind, Op, Scalar, ScalarFn, Tensor, TensorType, Value,
    dim::Atom,
    eval,
    op::{EvalArgs, TypeArgs},
    text,
};
use pavage_passes::{
    self as passes, Ctx,
    eqsat::{self, Head},
    rules::computed,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
    fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }
    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
    fn scalar(&mut self, dtype: DType) -> Scalar {
        let x = self.next() as f64 / (1u64 << 48) as f64;
        if dtype.is_float() { Scalar::F(4.0 * x - 2.0) } else { Scalar::I((6.0 * x) as i128 - 2) }
    }
}

/// The value of run-time size `name`: small, each its own.
fn size(name: &str) -> i64 {
    3 + name.bytes().map(i64::from).sum::<i64>() % 3
}

fn inputs(graph: &Graph, random: &mut Random) -> Vec<Tensor> {
    let env = |a: &Atom| match a {
        Atom::Sym(s) => Some(size(&s.name)),
        _ => None,
    };
    let tensor = |ty: &TensorType, random: &mut Random| {
        let shape: Vec<usize> = ty.shape.iter().map(|d| d.eval(&env).unwrap() as usize).collect();
        let n = shape.iter().product();
        Tensor::from_scalars(ty.dtype, shape, (0..n).map(|_| random.scalar(ty.dtype)))
    };
    graph.inputs().iter().map(|id| tensor(graph.ty((*id).into()), random)).collect()
}

fn near(a: &Tensor, b: &Tensor) -> bool {
    let rounding = if a.dtype().bits() == 16 { 2e-3 } else { 1e-5 };
    let close = |x: f64, y: f64| x == y || (x.is_nan() && y.is_nan()) || (x - y).abs() <= rounding * (1.0 + x.abs().max(y.abs()));
    a.ty() == b.ty() && a.to_f64().iter().zip(b.to_f64()).all(|(x, y)| close(*x, y))
}

/// Saturate for a wide device, which has the most rules, and compare all terms of each class. Gives the computed rules that applied and the terms compared.
fn check(graph: &Graph, random: &mut Random) -> (BTreeSet<&'static str>, usize) {
    let s = eqsat::saturate(graph, &eqsat::cost::GPU).unwrap();
    assert!(s.limits.is_empty(), "{:?}", s.limits);
    // The values of the leaves, which may be results of steps that are no terms.
    let mut leaves = graph.clone();
    leaves.outputs.clear();
    s.leaves.iter().enumerate().for_each(|(i, v)| leaves.output(format!("leaf{i}"), *v));
    let mut binding = Binding::default();
    let values = eval::eval_graph(&leaves, &inputs(graph, random), &mut binding).unwrap();
    let mut ids: Vec<_> = s.egraph.classes().map(|c| c.id).collect();
    ids.sort();
    let mut known: BTreeMap<_, Tensor> = BTreeMap::new();
    let mut compared = BTreeSet::new();
    let mut applied = BTreeSet::new();
    // A class has a value once one of its terms has: repeat until no more terms can be evaluated.
    loop {
        let before = compared.len();
        for &id in &ids {
            for (n, term) in s.egraph[id].nodes.iter().enumerate() {
                if compared.contains(&(id, n)) {
                    continue;
                }
                let value = match &term.head {
                    Head::Leaf(leaf) => values[*leaf as usize].clone(),
                    Head::Op(op) => {
                        let Some(args) = term.args.iter().map(|a| known.get(&s.egraph.find(*a))).collect::<Option<Vec<&Tensor>>>() else { continue };
                        let op = op.bind(&binding);
                        let types: Vec<TensorType> = args.iter().map(|t| t.ty()).collect();
                        let types: Vec<&TensorType> = types.iter().collect();
                        let results = op.infer(TypeArgs { types: &types, bodies: &[] }).unwrap();
                        op.eval(EvalArgs { tensors: &args, bodies: &[], results: &results }).unwrap().remove(0)
                    }
                };
                compared.insert((id, n));
                applied.extend(computed::RULES.iter().filter(|r| !(r.apply)(&s.egraph, term).is_empty()).map(|r| r.name));
                match known.get(&id) {
                    Some(first) => assert!(near(first, &value), "{term} = {value:?}, but its class is {first:?}; in\n{}", text::print(graph)),
                    None => drop(known.insert(id, value)),
                }
            }
        }
        if compared.len() == before {
            break;
        }
    }
    let all: usize = ids.iter().map(|id| s.egraph[*id].nodes.len()).sum();
    assert_eq!(compared.len(), all, "every term was evaluated");
    (applied, all)
}

/// A random graph of views, pointwise ops and constants that are the same everywhere.
fn graph(random: &mut Random) -> Graph {
    let mut g = Graph::new("random");
    let mut values = vec![
        g.input("a", TensorType::new(DType::F32, [2usize, 3])),
        g.input("b", TensorType::new(DType::F32, [1usize, 3])),
        g.input("c", TensorType::new(DType::F32, [1usize, 1])),
        g.constant(Tensor::full(DType::F32, [1, 3], Scalar::F(1.0))),
        g.constant(Tensor::full(DType::F32, [1, 1], Scalar::F(0.0))),
        g.constant(Tensor::full(DType::F32, [1, 1], Scalar::F(-0.0))),
    ];
    let binary = [ScalarFn::Add, ScalarFn::Sub, ScalarFn::Mul, ScalarFn::Div, ScalarFn::Max, ScalarFn::Min];
    let unary = [ScalarFn::Neg, ScalarFn::Abs, ScalarFn::Exp, ScalarFn::Floor, ScalarFn::Recip];
    for _ in 0..14 {
        let x = *random.pick(&values);
        let shape = g.ty(x).const_shape().unwrap();
        let dims = |s: &[usize]| s.iter().map(|d| Dim::from(*d)).collect::<Vec<Dim>>();
        let new = match random.below(7) {
            0 => g.add(Op::Transpose { perm: if random.below(4) == 0 { vec![0, 1] } else { vec![1, 0] } }, &[x]),
            1 => {
                let n: usize = shape.iter().product();
                let to = *random.pick(&[[n, 1], [1, n], [2, n / 2], [3, n / 3]]);
                g.add(Op::Reshape { shape: dims(&to) }, &[x])
            }
            2 | 3 => g.add(Op::Broadcast { shape: dims(&random.pick(&[[2, 3], [1, 3], [3, 2], [2, 1]])[..]) }, &[x]),
            4 => g.add(Op::Map(*random.pick(&unary)), &[x]),
            _ => {
                let same: Vec<Value> = values.iter().copied().filter(|v| g.ty(*v) == g.ty(x)).collect();
                let y = *random.pick(&same);
                g.add(Op::Map(*random.pick(&binary)), &[x, y])
            }
        };
        // What does not type-check here is not added.
        values.extend(new.ok());
    }
    values.into_iter().enumerate().for_each(|(i, v)| g.output(format!("v{i}"), v));
    g
}

/// Computed rules that applied in random graphs.
fn random_graphs(random: &mut Random) -> BTreeSet<&'static str> {
    let (mut applied, mut terms) = (BTreeSet::new(), 0);
    for _ in 0..300 {
        let (rules, n) = check(&graph(random), random);
        applied.extend(rules);
        terms += n;
    }
    assert!(terms > 4000, "{terms} terms");
    applied
}

/// Computed rules that applied in the graphs of `tests/cases/optimize`, before and after the passes.
fn whole_graphs(random: &mut Random) -> BTreeSet<&'static str> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/optimize");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "ir")).collect();
    files.sort();
    assert!(files.len() >= 12);
    let mut applied = BTreeSet::new();
    for path in files {
        let mut g = text::parse(&std::fs::read_to_string(&path).unwrap(), &|_| None).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        applied.extend(check(&g, random).0);
        passes::run(&mut g, &Ctx::default(), passes::PIPELINE).unwrap();
        applied.extend(check(&g, random).0);
        // Nested graphs are saturated by themselves.
        for id in g.schedule() {
            if let NodeKind::Op(_, bodies) = &g[id].kind {
                bodies.iter().for_each(|body| applied.extend(check(body, random).0));
            }
        }
    }
    applied
}

#[test]
fn terms_of_real_graphs_agree() {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for (name, least) in [("minilm", 300), ("magika", 100), ("efficientnet", 300)] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/real").join(name).with_extension("ir");
        // A real model's graph with small extents; weights are inputs.
        let mut g = text::parse(&std::fs::read_to_string(&path).unwrap(), &|_| None).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(check(&g, &mut random).1 > least, "{name}");
        passes::run(&mut g, &Ctx::default(), passes::PIPELINE).unwrap();
        assert!(check(&g, &mut random).1 > 60, "{name}");
    }
}

#[test]
fn terms_of_a_class_agree_and_every_computed_rule_has_fired() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let applied: BTreeSet<&str> = random_graphs(&mut random).into_iter().chain(whole_graphs(&mut random)).collect();
    let missing: Vec<&str> = computed::RULES.iter().map(|r| r.name).filter(|n| !applied.contains(n)).collect();
    assert!(missing.is_empty(), "no graph triggered {missing:?}");
}
