//! All terms of a class have one value: saturated graphs are evaluated term by term.
//!
//! Computed rules have no text to enumerate, so they are checked on random graphs made of what they look for, and all
//! rules together on the graphs of `tests/cases/optimize`, with their run-time sizes small.
use pavage_ir::{
    Binding, DType, Dim, Graph, NodeKind, Op, Scalar, ScalarFn, Tensor, TensorType, Value,
    attr::ReduceFn,
    dim::Atom,
    eval,
    op::{EvalArgs, TypeArgs},
    text,
};
use pavage_passes::{
    self as passes, Ctx, build,
    eqsat::{
        self, Head, candidates,
        cost::CPU,
        extract::{Search, extract},
        proof::Step,
    },
    rules::{
        RuleSet,
        computed::{self, Build, Computed, Egraph},
        siblings::{self, Siblings},
    },
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
    rc::Rc,
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
    // Minimal filtering in 16 bits rounds the inputs of tiles too.
    let rounding = if a.dtype().bits() == 16 { 4e-3 } else { 1e-5 };
    let close = |x: f64, y: f64| x == y || (x.is_nan() && y.is_nan()) || (x - y).abs() <= rounding * (1.0 + x.abs().max(y.abs()));
    a.ty() == b.ty() && a.to_f64().iter().zip(b.to_f64()).all(|(x, y)| close(*x, y))
}

/// Saturate by every rule for a wide device, which has the most, and compare all terms of each class. Gives the rules that fired and the terms compared.
fn check(graph: &Graph, random: &mut Random) -> (BTreeSet<String>, usize) {
    try_rules(graph, &RuleSet::all().unwrap(), random).unwrap_or_else(|e| panic!("{e}"))
}

/// The rules of either kind of device: some make work for one alone.
fn try_rules(graph: &Graph, rules: &RuleSet, random: &mut Random) -> Result<(BTreeSet<String>, usize), String> {
    let (mut fired, terms) = try_rules_on(graph, rules, &eqsat::cost::GPU, random)?;
    fired.extend(try_rules_on(graph, rules, &eqsat::cost::CPU, random)?.0);
    Ok((fired, terms))
}

/// The same with these rules; or a term whose value is not that of its class. Inputs named `w` and a number are constants.
fn try_rules_on(graph: &Graph, rules: &RuleSet, costs: &eqsat::cost::Costs, random: &mut Random) -> Result<(BTreeSet<String>, usize), String> {
    let weight = |id: &pavage_ir::NodeId| matches!(&graph[*id].kind, NodeKind::Input(name) if name.strip_prefix('w').is_some_and(|n| n.parse::<u32>().is_ok()));
    let constants: BTreeSet<Value> = graph.inputs().iter().filter(|id| weight(id)).map(|id| Value::from(*id)).collect();
    let s = eqsat::saturate(graph, &constants, rules, costs).map_err(|e| e.to_string())?;
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
                match known.get(&id) {
                    Some(first) if near(first, &value) => {}
                    Some(first) => return Err(format!("{term} = {value:?}, but its class is {first:?}; in\n{}", text::print(graph))),
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
    Ok((s.fired, all))
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

/// A random layer: a normalisation, perhaps a reshape, and products or convolutions of it with constant weights.
fn layer(random: &mut Random) -> Graph {
    let mut g = Graph::new("layer");
    let dims = |s: &[usize]| s.iter().map(|d| Dim::from(*d)).collect::<Vec<Dim>>();
    let mut weights = 0;
    let mut weight = |g: &mut Graph, shape: &[usize]| {
        weights += 1;
        g.input(format!("w{weights}"), TensorType::new(DType::F32, shape.iter().copied()))
    };
    let (lead, k) = (*random.pick(&[&[4usize][..], &[2, 3]]), 4usize);
    let full: Vec<usize> = lead.iter().copied().chain([k]).collect();
    let (row, ones) = (lead.iter().copied().chain([1]).collect::<Vec<usize>>(), vec![1usize; full.len()]);
    let along: Vec<usize> = ones[1..].iter().copied().chain([k]).collect();
    let x = g.input("x", TensorType::new(DType::F32, full.iter().copied()));
    let map = |g: &mut Graph, f: ScalarFn, xs: &[Value]| g.add(Op::Map(f), xs).unwrap();
    let wide = |g: &mut Graph, v: Value, to: &[usize]| g.add(Op::Broadcast { shape: dims(to) }, &[v]).unwrap();
    let number = |g: &mut Graph, c: f64, to: &[usize]| {
        let c = g.constant(Tensor::full(DType::F32, ones.clone(), Scalar::F(c)));
        g.add(Op::Broadcast { shape: dims(to) }, &[c]).unwrap()
    };
    let mean = |g: &mut Graph, v: Value, inverse: bool| {
        let sum = g.add(Op::Reduce { f: pavage_ir::attr::ReduceFn::Sum, axes: vec![full.len() - 1] }, &[v]).unwrap();
        let (f, c) = if inverse { (ScalarFn::Mul, 1.0 / k as f64) } else { (ScalarFn::Div, k as f64) };
        let n = number(g, c, &row);
        let mean = map(g, f, &[sum, n]);
        wide(g, mean, &full)
    };
    let mut y = x;
    if random.below(2) == 0 {
        let m = mean(&mut g, y, random.below(2) == 0);
        y = map(&mut g, ScalarFn::Sub, &[y, m]);
    }
    let centred = y;
    let square = map(&mut g, ScalarFn::Mul, &[y, y]);
    let inverse = random.below(2) == 0;
    let sum = g.add(Op::Reduce { f: pavage_ir::attr::ReduceFn::Sum, axes: vec![full.len() - 1] }, &[square]).unwrap();
    let n = number(&mut g, if inverse { 0.25 } else { 4.0 }, &row);
    let var = map(&mut g, if inverse { ScalarFn::Mul } else { ScalarFn::Div }, &[sum, n]);
    let eps = number(&mut g, 0.01, &row);
    let var = map(&mut g, ScalarFn::Add, &[var, eps]);
    let gamma = weight(&mut g, &along);
    let gamma = wide(&mut g, gamma, &full);
    y = match random.below(3) {
        0 => {
            let sd = map(&mut g, ScalarFn::Sqrt, &[var]);
            let sd = wide(&mut g, sd, &full);
            let unit = map(&mut g, ScalarFn::Div, &[centred, sd]);
            map(&mut g, ScalarFn::Mul, &[gamma, unit])
        }
        n => {
            let r = map(&mut g, ScalarFn::Rsqrt, &[var]);
            let r = wide(&mut g, r, &full);
            if n == 1 {
                let unit = map(&mut g, ScalarFn::Mul, &[r, centred]);
                map(&mut g, ScalarFn::Mul, &[unit, gamma])
            } else {
                let scale = map(&mut g, ScalarFn::Mul, &[r, gamma]);
                map(&mut g, ScalarFn::Mul, &[centred, scale])
            }
        }
    };
    if random.below(2) == 0 {
        let beta = weight(&mut g, &along);
        let beta = wide(&mut g, beta, &full);
        y = map(&mut g, if random.below(2) == 0 { ScalarFn::Add } else { ScalarFn::Sub }, &[y, beta]);
    }
    let rows: usize = lead.iter().product();
    let spelling = random.below(3);
    let act = *random.pick(&[None, Some(ScalarFn::Abs), Some(ScalarFn::Tanh)]);
    for _ in 0..1 + random.below(3) {
        let n = *random.pick(&[4usize, 2]);
        let (mut z, shape) = match spelling {
            // Of matrices, or with the weights repeated.
            0 => {
                let flat = g.add(Op::Reshape { shape: dims(&[rows, k]) }, &[y]).unwrap();
                let w = weight(&mut g, &[k, n]);
                let z = g.add(PRODUCT, &[flat, w]).unwrap();
                let shape: Vec<usize> = lead.iter().copied().chain([n]).collect();
                (g.add(Op::Reshape { shape: dims(&shape) }, &[z]).unwrap(), shape)
            }
            1 => {
                let w = weight(&mut g, &[&ones[2..], &[k, n][..]].concat());
                let w = wide(&mut g, w, &[&lead[..lead.len() - 1], &[k, n]].concat());
                (g.add(PRODUCT, &[y, w]).unwrap(), lead.iter().copied().chain([n]).collect())
            }
            _ => {
                let image = g.add(Op::Reshape { shape: dims(&[1, rows, k]) }, &[y]).unwrap();
                let w = weight(&mut g, &[n, rows, 1]);
                let conv =
                    Op::Conv { strides: vec![1], dilations: vec![1], lo: vec![0], hi: vec![0], groups: 1, layout: pavage_ir::attr::Layout::ChannelsFirst };
                (g.add(conv, &[image, w]).unwrap(), vec![1, n, k])
            }
        };
        let across: Vec<usize> = if spelling == 2 { vec![1, n, 1] } else { [&vec![1; shape.len() - 1][..], &[n]].concat() };
        let bias = weight(&mut g, &across);
        let bias = wide(&mut g, bias, &shape);
        z = map(&mut g, ScalarFn::Add, &[z, bias]);
        if let Some(f) = act {
            z = map(&mut g, f, &[z]);
        }
        g.output(format!("z{}", g.outputs.len()), z);
    }
    g.output("y", y);
    g
}

/// Rules that fired in random graphs.
fn random_graphs(random: &mut Random) -> BTreeSet<String> {
    let (mut applied, mut terms) = (BTreeSet::new(), 0);
    for i in 0..400 {
        let graph = if i % 4 == 0 { layer(random) } else { graph(random) };
        let (rules, n) = check(&graph, random);
        applied.extend(rules);
        terms += n;
    }
    assert!(terms > 4000, "{terms} terms");
    applied
}

/// Rules that fired in the graphs of `tests/cases/optimize`, before and after the passes.
fn whole_graphs(random: &mut Random) -> BTreeSet<String> {
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
        // What pays on one core alone.
        if path.file_stem().is_some_and(|n| n.to_string_lossy().starts_with("winograd")) {
            let (rules, _) = try_rules_on(&g, &RuleSet::all().unwrap(), &eqsat::cost::CPU, random).unwrap_or_else(|e| panic!("{e}"));
            applied.extend(rules);
        }
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
    let fired: BTreeSet<String> = random_graphs(&mut random).into_iter().chain(whole_graphs(&mut random)).collect();
    let names = computed::RULES.iter().map(|r| r.name).chain(siblings::RULES.iter().map(|r| r.name));
    let missing: Vec<&str> = names.filter(|n| !fired.contains(*n)).collect();
    assert!(missing.is_empty(), "no graph triggered {missing:?}");
}

fn op(term: &eqsat::Term) -> Option<&Op> {
    match &term.head {
        Head::Op(op) => Some(op),
        Head::Leaf(_) => None,
    }
}

/// The operands of a product whose left operand is `f` of something and a broadcast: that, what is repeated, the weights,
/// and the product's shape.
fn product_of(e: &Egraph, term: &eqsat::Term, f: ScalarFn) -> Option<(Build, Build, Build, Vec<Dim>)> {
    let Some(Op::MatMul { .. }) = op(term) else { return None };
    let map = e[term.args[0]].nodes.iter().find(|t| op(t) == Some(&Op::Map(f)))?;
    let base = e[map.args[1]].nodes.iter().find(|t| matches!(op(t), Some(Op::Broadcast { .. })))?.args[0];
    let mut shape = e[term.args[0]].data.ty.shape.clone();
    *shape.last_mut()? = e[term.args[1]].data.ty.shape.last()?.clone();
    Some((Build::Class(map.args[0]), Build::Class(base), Build::Class(term.args[1]), shape))
}

const PRODUCT: Op = Op::MatMul { out: DType::F32 };

/// Mistakes that rules could have: each is right for some graphs and types.
const WRONG: &[Computed] = &[
    Computed {
        name: "functions-mixed",
        apply: |e, t| {
            let Some(Op::Reduce { axes, .. }) = op(t) else { return vec![] };
            let inner = e[t.args[0]].nodes.iter().find_map(|n| match op(n) {
                Some(Op::Reduce { f, axes: first }) if first != axes => Some((f, first, n.args[0])),
                _ => None,
            });
            let both = |(f, first, x): (&ReduceFn, &Vec<usize>, _)| {
                let all: BTreeSet<usize> = axes.iter().chain(first).copied().collect();
                Build::Op(Op::Reduce { f: *f, axes: all.into_iter().collect() }, vec![Build::Class(x)])
            };
            inner.map(both).into_iter().collect()
        },
    },
    Computed {
        name: "windows-turned",
        apply: |e, t| {
            let Some(Op::Conv { .. }) = op(t) else { return vec![] };
            let turned = |w: Build| Build::Op(Op::Transpose { perm: vec![0, 1, 3, 2] }, vec![w]);
            winograd(e, t, &|op, args| match op {
                Op::WinogradFilter { .. } => Build::Op(op.clone(), args.into_iter().map(turned).collect()),
                _ => Build::Op(op.clone(), args),
            })
        },
    },
    Computed {
        name: "padded-on-the-other-side",
        apply: |e, t| {
            winograd(e, t, &|op, args| match op {
                Op::WinogradInput { m, lo, hi } => Build::Op(Op::WinogradInput { m: *m, lo: hi.clone(), hi: lo.clone() }, args),
                _ => Build::Op(op.clone(), args),
            })
        },
    },
    Computed {
        name: "taps-across-before-down",
        apply: |e, t| {
            im2col(e, t, &|op| match op {
                Op::Transpose { perm } if perm.len() == 4 => Op::Transpose { perm: vec![perm[1], perm[0], perm[2], perm[3]] },
                op => op,
            })
        },
    },
    Computed {
        name: "patches-padded-on-the-other-side",
        apply: |e, t| {
            im2col(e, t, &|op| match op {
                Op::Patches { kernel, strides, dilations, lo, hi, width } => Op::Patches { kernel, strides, dilations, lo: hi, hi: lo, width },
                op => op,
            })
        },
    },
    Computed { name: "mean-dropped", apply: |e, t| product_of(e, t, ScalarFn::Sub).map(|(x, _, w, _)| Build::Op(PRODUCT, vec![x, w])).into_iter().collect() },
    Computed {
        name: "columns-not-summed",
        apply: |e, t| {
            let wrong = |(x, mean, w, shape)| {
                let rows = Build::Op(Op::Broadcast { shape }, vec![mean]);
                Build::Op(Op::Map(ScalarFn::Sub), vec![Build::Op(PRODUCT, vec![x, w]), rows])
            };
            product_of(e, t, ScalarFn::Sub).map(wrong).into_iter().collect()
        },
    },
    Computed {
        name: "column-scale",
        apply: |e, t| {
            let wrong = |(x, scale, w, shape)| {
                let scale = Build::Op(Op::Broadcast { shape }, vec![scale]);
                Build::Op(Op::Map(ScalarFn::Mul), vec![Build::Op(PRODUCT, vec![x, w]), scale])
            };
            product_of(e, t, ScalarFn::Mul).map(wrong).into_iter().collect()
        },
    },
    Computed {
        name: "bias-not-multiplied",
        apply: |e, t| {
            let wrong = |(x, bias, w, shape)| {
                let bias = Build::Op(Op::Broadcast { shape }, vec![bias]);
                Build::Op(Op::Map(ScalarFn::Add), vec![Build::Op(PRODUCT, vec![x, w]), bias])
            };
            product_of(e, t, ScalarFn::Add).map(wrong).into_iter().collect()
        },
    },
    Computed {
        name: "transposes-composed-backwards",
        apply: |e, t| {
            let Some(Op::Transpose { perm }) = op(t) else { return vec![] };
            let inner = e[t.args[0]].nodes.iter().filter_map(|n| match op(n) {
                Some(Op::Transpose { perm: q }) => Some((q.clone(), n.args[0])),
                _ => None,
            });
            inner.map(|(q, x)| Build::Op(Op::Transpose { perm: q.iter().map(|&i| perm[i]).collect() }, vec![Build::Class(x)])).collect()
        },
    },
    Computed {
        name: "planes-as-pixels",
        apply: |e, t| {
            let found = computed::RULES.iter().filter(|r| r.name == "pixels-as-columns").flat_map(|r| (r.apply)(e, t));
            let wrong = |b: Build| match b {
                // As if the product's rows were the pixels.
                Build::Op(Op::Transpose { .. }, operands) => Build::Op(Op::Reshape { shape: e[e.lookup(t.clone()).unwrap()].data.ty.shape.clone() }, operands),
                other => other,
            };
            found.map(wrong).collect()
        },
    },
    Computed {
        name: "mask-dropped",
        apply: |e, t| {
            let found = computed::RULES.iter().filter(|r| r.name == "attention").flat_map(|r| (r.apply)(e, t));
            found
                .filter_map(|b| match b {
                    Build::Op(attention, mut operands) if operands.len() == 4 => {
                        operands.truncate(3);
                        Some(Build::Op(attention, operands))
                    }
                    _ => None,
                })
                .collect()
        },
    },
    Computed {
        name: "mask-dropped-in-parts",
        apply: |e, t| {
            split(e, t, &|op, mut args| {
                (op, {
                    args.truncate(3);
                    args
                })
            })
        },
    },
    Computed {
        name: "maxima-taken-for-sums",
        apply: |e, t| {
            let wrong = |op: Op, args: Vec<Build>| match op {
                Op::Slice { mut starts, sizes, steps } => {
                    // The last column but one holds maxima, the last sums.
                    if let (Some(Build::Op(Op::AttentionParts { .. }, _)), Some(last)) = (args.first(), starts.last_mut())
                        && sizes.last().is_some_and(|n| n.is(1))
                    {
                        *last = Dim::from(4i64);
                    }
                    (Op::Slice { starts, sizes, steps }, args)
                }
                op => (op, args),
            };
            split(e, t, &wrong)
        },
    },
];

/// What the rule `winograd` gives, each of its terms made by `f`.
fn winograd(e: &Egraph, t: &eqsat::Term, f: &dyn Fn(&Op, Vec<Build>) -> Build) -> Vec<Build> {
    fn each(build: Build, f: &dyn Fn(&Op, Vec<Build>) -> Build) -> Build {
        match build {
            Build::Op(op, args) => f(&op, args.into_iter().map(|a| each(a, f)).collect()),
            class => class,
        }
    }
    computed::RULES.iter().filter(|r| r.name == "winograd").flat_map(|r| (r.apply)(e, t)).map(|b| each(b, f)).collect()
}

/// Windows of three channels, padded on one side alone.
const WINDOWS: &str = "graph @windows(%x: f16[2,6,7,3], %w0: f16[16,3,3,2]) {
  %0 = conv[strides=[2,1],dilations=[1,2],lo=[1,0],hi=[0,2],groups=1,layout=nhwc] %x, %w0 : f16[2,3,7,16]
  return %0 as \"y\"
}";

/// What the rule `im2col` gives, with its ops changed by `f`.
fn im2col(e: &Egraph, t: &eqsat::Term, f: &dyn Fn(Op) -> Op) -> Vec<Build> {
    fn each(build: Build, f: &dyn Fn(Op) -> Op) -> Build {
        match build {
            Build::Op(op, args) => Build::Op(f(op), args.into_iter().map(|a| each(a, f)).collect()),
            class => class,
        }
    }
    computed::RULES.iter().filter(|r| r.name == "im2col").flat_map(|r| (r.apply)(e, t)).map(|b| each(b, f)).collect()
}

/// What splitting keys gives, with its ops changed by `f`.
fn split(e: &Egraph, t: &eqsat::Term, f: &dyn Fn(Op, Vec<Build>) -> (Op, Vec<Build>)) -> Vec<Build> {
    fn changed(build: Build, f: &dyn Fn(Op, Vec<Build>) -> (Op, Vec<Build>)) -> Build {
        match build {
            Build::Op(op, args) => {
                let args = args.into_iter().map(|a| changed(a, f)).collect();
                let (op, args) = f(op, args);
                Build::Op(op, args)
            }
            class => class,
        }
    }
    let found = computed::RULES.iter().filter(|r| r.name == "split-keys").flat_map(|r| (r.apply)(e, t));
    found.map(|b| changed(b, f)).collect()
}

/// Attention of one query over 300 keys of depth 4, of which the first 200, more than one part, are hidden.
const DECODE: &str = "graph @decode(%q: f32[2,4,1,4], %k: f32[2,2,300,4], %v: f32[2,2,300,4]) {
  %c = const f32[1,1,1,1] {0.5}
  %cb = broadcast[shape=[2,4,1,4]] %c : f32[2,4,1,4]
  %scaled = mul %q, %cb : f32[2,4,1,4]
  %k1 = reshape[shape=[2,2,1,300,4]] %k : f32[2,2,1,300,4]
  %kb = broadcast[shape=[2,2,2,300,4]] %k1 : f32[2,2,2,300,4]
  %kr = reshape[shape=[2,4,300,4]] %kb : f32[2,4,300,4]
  %at = iota[dtype=i64,shape=[1,1,1,300],axis=3] : i64[1,1,1,300]
  %first = const i64[1,1,1,1] {200}
  %fb = broadcast[shape=[1,1,1,300]] %first : i64[1,1,1,300]
  %far = lt %at, %fb : bool[1,1,1,300]
  %low = const f32[1,1,1,1] {-inf}
  %lb = broadcast[shape=[1,1,1,300]] %low : f32[1,1,1,300]
  %zero = const f32[1,1,1,1] {0.0}
  %zb = broadcast[shape=[1,1,1,300]] %zero : f32[1,1,1,300]
  %m = select %far, %lb, %zb : f32[1,1,1,300]
  %mask = broadcast[shape=[2,4,1,300]] %m : f32[2,4,1,300]
  %v1 = reshape[shape=[2,2,1,300,4]] %v : f32[2,2,1,300,4]
  %vb = broadcast[shape=[2,2,2,300,4]] %v1 : f32[2,2,2,300,4]
  %vr = reshape[shape=[2,4,300,4]] %vb : f32[2,4,300,4]
  %y = attention[scale=1.0] %scaled, %kr, %vr, %mask : f32[2,4,1,4]
  return %y as \"y\"
}";

#[test]
fn parts_of_the_keys_give_the_attention_over_all() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let all = RuleSet::all().unwrap();
    for source in [DECODE.to_string(), DECODE.replace("{200}", "{0}"), DECODE.replace("{200}", "{300}"), DECODE.replace("300", "257").replace("{200}", "{256}")]
    {
        let graph = text::parse(&source, &|_| None).unwrap();
        let (rules, _) = try_rules(&graph, &all, &mut random).unwrap_or_else(|e| panic!("{e}"));
        assert!(rules.contains("split-keys") && rules.contains("grouped-queries"), "{rules:?}");
    }
}

/// `joined` with its constants changed by `f`.
fn changed(build: &Build, f: &dyn Fn(usize, Vec<Build>) -> Build) -> Build {
    match build {
        Build::Op(Op::Concat { axis }, parts) => f(*axis, parts.clone()),
        Build::Op(op, args) => Build::Op(op.clone(), args.iter().map(|a| changed(a, f)).collect()),
        class => class.clone(),
    }
}

fn merges(name: &str, e: &Egraph) -> Vec<siblings::Merge> {
    siblings::RULES.iter().filter(|r| r.name == name).flat_map(|r| (r.apply)(e)).collect()
}

/// The same of merged siblings.
const WRONG_SIBLINGS: &[Siblings] = &[
    Siblings {
        name: "slices-exchanged",
        apply: |e| {
            let exchanged = |mut m: siblings::Merge| {
                let mut views: Vec<Vec<Op>> = m.parts.iter().map(|(_, _, v)| v.clone()).collect();
                views.rotate_left(1);
                m.parts.iter_mut().zip(views).for_each(|(part, v)| part.2 = v);
                m
            };
            let equal = |m: &siblings::Merge| m.parts.iter().all(|(id, ..)| e[*id].data.ty == e[m.parts[0].0].data.ty);
            merges("merge-products", e).into_iter().filter(equal).map(exchanged).collect()
        },
    },
    Siblings {
        name: "joined-along-the-summed-axis",
        apply: |e| {
            let wrong = |m: siblings::Merge| {
                let turned = |axis: usize, parts: Vec<Build>| {
                    let Some(Build::Class(first)) = parts.first() else { return Build::Op(Op::Concat { axis }, parts) };
                    let mut shape = e[*first].data.ty.shape.clone();
                    shape[axis] = shape[axis].clone() * Dim::from(parts.len());
                    Build::Op(Op::Reshape { shape }, vec![Build::Op(Op::Concat { axis: axis - 1 }, parts)])
                };
                siblings::Merge { whole: changed(&m.whole, &turned), parts: m.parts }
            };
            merges("merge-products", e).into_iter().map(wrong).collect()
        },
    },
    Siblings {
        name: "biases-exchanged",
        apply: |e| {
            let backwards = |axis: usize, parts: Vec<Build>| Build::Op(Op::Concat { axis }, parts.into_iter().rev().collect());
            let wrong = |m: siblings::Merge| siblings::Merge { whole: changed(&m.whole, &backwards), parts: m.parts };
            merges("merge-products", e).into_iter().chain(merges("merge-pointwise", e).into_iter().map(wrong)).collect()
        },
    },
    Siblings {
        name: "filters-exchanged",
        apply: |e| {
            let backwards = |axis: usize, parts: Vec<Build>| Build::Op(Op::Concat { axis }, parts.into_iter().rev().collect());
            let wrong = |m: siblings::Merge| siblings::Merge { whole: changed(&m.whole, &backwards), parts: m.parts };
            merges("merge-convolutions", e).into_iter().map(wrong).collect()
        },
    },
];

#[test]
fn wrong_computed_rules_are_caught() {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let mut graphs: Vec<Graph> = (0..48).map(|i| if i % 2 == 0 { layer(&mut random) } else { graph(&mut random) }).collect();
    for name in ["attention_causal", "attention_padding", "columns_2"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/optimize").join(name).with_extension("ir");
        graphs.push(text::parse(&std::fs::read_to_string(path).unwrap(), &|_| None).unwrap());
    }
    graphs.push(text::parse(WINDOWS, &|_| None).unwrap());
    let turned = "graph @turned(%x: f32[3,3,3]) {
  %0 = transpose[perm=[1,2,0]] %x : f32[3,3,3]
  %1 = transpose[perm=[1,0,2]] %0 : f32[3,3,3]
  return %1 as \"y\"
}";
    graphs.push(text::parse(turned, &|_| None).unwrap());
    let reduced = "graph @reduced(%x: f32[3,4,5]) {
  %0 = reduce[f=sum,axes=[2]] %x : f32[3,4,1]
  %1 = reduce[f=max,axes=[1]] %0 : f32[3,1,1]
  return %1 as \"y\"
}";
    graphs.push(text::parse(reduced, &|_| None).unwrap());
    // As other rules leave it: the scale in the op, nothing repeated.
    let repeats = ["  %k1 =", "  %kb =", "  %kr =", "  %v1 =", "  %vb =", "  %vr ="];
    let lines: Vec<&str> = DECODE.lines().filter(|line| !repeats.iter().any(|r| line.starts_with(r))).collect();
    let decode = lines.join("\n").replace("[2,2,300,4]", "[2,4,300,4]").replace("[scale=1.0] %scaled, %kr, %vr", "[scale=0.5] %q, %k, %v");
    graphs.push(text::parse(&decode, &|_| None).unwrap());
    let image = "graph @image(%x: f32[1,7,8,16], %w1: f32[16,16,3,3]) {
  %0 = conv[strides=[1,1],dilations=[1,1],lo=[1,0],hi=[0,1],groups=1,layout=nhwc] %x, %w1 : f32[1,6,7,16]
  return %0 as \"y\"
}";
    graphs.push(text::parse(image, &|_| None).unwrap());
    assert!(graphs.iter().any(|g| check(g, &mut random).0.contains("attention")));
    let planted = WRONG.iter().map(|r| (r.name, Some(*r), None)).chain(WRONG_SIBLINGS.iter().map(|r| (r.name, None, Some(*r))));
    for (name, computed, sibling) in planted {
        let rules = RuleSet { text: vec![], computed: computed.into_iter().collect(), siblings: sibling.into_iter().collect() };
        let costs = [eqsat::cost::GPU, eqsat::cost::CPU];
        let found = graphs
            .iter()
            .flat_map(|g| costs.iter().map(move |c| (g, c)))
            .find_map(|(g, c)| try_rules_on(g, &rules, c, &mut random).err())
            .unwrap_or_else(|| panic!("{name} was not caught"));
        assert!(found.contains("but its class is"), "{name}: {found}");
    }
}

/// Evaluates the terms of a proof: each before and after its operands change.
struct Prover<'a> {
    leaves: &'a [Tensor],
    binding: &'a Binding,
    known: HashMap<*const Step, [Tensor; 2]>,
}

impl Prover<'_> {
    /// The term at a step, with its operands as they are first and last. All terms of a proof have one value.
    fn values(&mut self, step: &Rc<Step>) -> [Tensor; 2] {
        if let Some(known) = self.known.get(&Rc::as_ptr(step)) {
            return known.clone();
        }
        let operands: Vec<[Tensor; 2]> = step.child_proofs.iter().map(|proof| self.ends(proof)).collect();
        let at = |end: usize| match &step.node.head {
            Head::Leaf(n) => self.leaves[*n as usize].clone(),
            Head::Op(op) => {
                let args: Vec<&Tensor> = operands.iter().map(|o| &o[end]).collect();
                let types: Vec<TensorType> = args.iter().map(|t| t.ty()).collect();
                let types: Vec<&TensorType> = types.iter().collect();
                let op = op.bind(self.binding);
                let results = op.infer(TypeArgs { types: &types, bodies: &[] }).unwrap();
                op.eval(EvalArgs { tensors: &args, bodies: &[], results: &results }).unwrap().remove(0)
            }
        };
        let values = [at(0), at(1)];
        self.known.insert(Rc::as_ptr(step), values.clone());
        values
    }

    fn ends(&mut self, proof: &[Rc<Step>]) -> [Tensor; 2] {
        let values: Vec<[Tensor; 2]> = proof.iter().map(|step| self.values(step)).collect();
        for (step, value) in proof.iter().zip(&values).flat_map(|(s, v)| v.iter().map(move |v| (s, v))) {
            assert!(near(&values[0][0], value), "{:?} {:?} gives {value:?}, not {:?}", step.forward_rule, step.backward_rule, values[0][0]);
        }
        [values[0][0].clone(), values[values.len() - 1][1].clone()]
    }
}

/// Every step of the proofs of a plan's kernels, evaluated. How many proofs there are, and the rules in them.
fn proofs(graph: &Graph, random: &mut Random) -> (usize, BTreeSet<String>) {
    let mut s = eqsat::saturate(graph, &BTreeSet::new(), &RuleSet::all().unwrap(), &CPU).unwrap();
    let mut leaves = graph.clone();
    leaves.outputs.clear();
    s.leaves.iter().enumerate().for_each(|(i, v)| leaves.output(format!("leaf{i}"), *v));
    let mut binding = Binding::default();
    let values = eval::eval_graph(&leaves, &inputs(graph, random), &mut binding).unwrap();
    let kernels = candidates::form_all(&s, &CPU).unwrap();
    let roots: BTreeSet<_> = graph.outputs.iter().map(|o| s.class[&o.value]).collect();
    let choice = extract(&kernels, &roots.into_iter().collect::<Vec<_>>(), Search::Exact).unwrap();
    let mut prover = Prover { leaves: &values, binding: &binding, known: HashMap::new() };
    let found = s.proofs(&kernels, &choice);
    let mut rules = BTreeSet::new();
    for (_, proof) in &found {
        prover.ends(&proof.explanation_trees);
        let mut stack: Vec<&Rc<Step>> = proof.explanation_trees.iter().collect();
        while let Some(step) = stack.pop() {
            rules.extend(step.forward_rule.iter().chain(&step.backward_rule).map(ToString::to_string));
            stack.extend(step.child_proofs.iter().flatten());
        }
    }
    (found.len(), rules)
}

#[test]
fn every_step_of_the_proof_of_a_kernel_holds() {
    let mut random = Random(0xd1b5_4a32_d192_ed03);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/optimize");
    let (mut count, mut named) = (0, BTreeSet::new());
    for name in ["algebra", "attention_padding", "attention_causal_2", "grouped_queries", "rms_norm", "layer_norm_product", "qkv", "transposes", "views"] {
        let Ok(source) = std::fs::read_to_string(folder.join(name).with_extension("ir")) else { panic!("no {name}") };
        let g = text::parse(&source, &|_| None).unwrap();
        let (n, rules) = proofs(&g, &mut random);
        count += n;
        named.extend(rules);
    }
    assert!(count > 4 && named.len() > 4, "{count} {named:?}");
}

#[test]
fn a_rule_that_only_unites_two_terms_is_in_the_chain() {
    // The reshape changes nothing: the rule adds no term, and what was made of it is made of the input.
    let mut g = Graph::new("unites");
    let x = g.input("x", TensorType::new(DType::F32, [2usize, 3]));
    let same = g.add(Op::Reshape { shape: vec![Dim::from(2usize), Dim::from(3usize)] }, &[x]).unwrap();
    let y = g.add(Op::Map(ScalarFn::Exp), &[same]).unwrap();
    g.output("y", y);
    let (count, rules) = proofs(&g, &mut Random(7));
    assert_eq!((count, rules), (1, BTreeSet::from(["view-nothing".to_string()])));
    let ctx = Ctx::default();
    let program = build::program("fused", &g, &|g| eqsat::optimise(g, &ctx), &ctx).unwrap();
    let chains: Vec<String> = program
        .body
        .steps
        .iter()
        .flat_map(|step| match step {
            pavage_ir::program::Step::Run { origin, .. } => origin.why.chain.clone(),
            _ => vec![],
        })
        .collect();
    assert!(chains.iter().any(|c| c.contains("view-nothing (exact)")), "{chains:?}");
}
