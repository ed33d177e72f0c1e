//! Tree ensembles of `ai.onnx.ml`.
use super::ml::{self, Transform};
use crate::onnx::{
    build::{Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{DType, Dim, Op, Scalar, ScalarFn, Tensor, attr::Aggregate};
use std::collections::{BTreeSet, HashMap};

/// Weights of leaves: tree, node, target, weight.
type Leaves<'a> = (&'a [i64], &'a [i64], &'a [i64], Vec<f32>);

/// Attributes of the classic ensembles, as the operands of the `tree_ensemble` op.
struct Forest {
    feature: Vec<i64>,
    mode: Vec<i64>,
    threshold: Vec<f32>,
    yes: Vec<i64>,
    no: Vec<i64>,
    missing: Vec<i64>,
    roots: Vec<i64>,
    target: Vec<i64>,
    weight: Vec<f32>,
}

fn floats(cx: &Cx, name: &str) -> Res<Vec<f32>> {
    if let Some(v) = cx.floats(name)? {
        return Ok(v.to_vec());
    }
    match cx.tensor_attr(&format!("{name}_as_tensor"))? {
        Some(t) if t.dtype() == DType::F32 => Ok(t.to_f64().into_iter().map(|v| v as f32).collect()),
        Some(t) => missing(format!("trees of {}", t.dtype())),
        None => Ok(vec![]),
    }
}

fn ints<'m>(cx: &Cx<'_, 'm>, name: &str) -> Res<&'m [i64]> {
    Ok(cx.ints_opt(name)?.unwrap_or(&[]))
}

fn forest(cx: &Cx, leaves: Leaves, targets: i64) -> Res<Forest> {
    let (trees, nodes) = (ints(cx, "nodes_treeids")?, ints(cx, "nodes_nodeids")?);
    let n = trees.len();
    let (features, yes, no) = (ints(cx, "nodes_featureids")?, ints(cx, "nodes_truenodeids")?, ints(cx, "nodes_falsenodeids")?);
    let modes = cx.strings("nodes_modes")?.unwrap_or_default();
    let threshold = floats(cx, "nodes_values")?;
    let tracks = ints(cx, "nodes_missing_value_tracks_true")?;
    if n == 0 || [nodes.len(), features.len(), yes.len(), no.len(), modes.len(), threshold.len()] != [n; 6] || !(tracks.is_empty() || tracks.len() == n) {
        return invalid("the attributes of nodes differ in length");
    }
    let mut index = HashMap::new();
    for i in 0..n {
        if index.insert((trees[i], nodes[i]), i).is_some() {
            return invalid(format!("tree {} has node {} twice", trees[i], nodes[i]));
        }
    }
    let mut mode = vec![];
    for name in &modes {
        mode.push(match name.as_str() {
            "BRANCH_LEQ" => 0,
            "BRANCH_LT" => 1,
            "BRANCH_GTE" => 2,
            "BRANCH_GT" => 3,
            "BRANCH_EQ" => 4,
            "BRANCH_NEQ" => 5,
            "LEAF" => 6,
            other => return missing(format!("tree nodes of mode `{other}`")),
        });
    }
    let child = |i: usize, id: i64| match index.get(&(trees[i], id)) {
        Some(at) => Ok(*at as i64),
        None => invalid(format!("node {} of tree {} has a child {id} that does not exist", nodes[i], trees[i])),
    };
    let mut out = Forest {
        feature: features.to_vec(),
        mode,
        threshold,
        yes: vec![0; n],
        no: vec![0; n],
        missing: if tracks.is_empty() { vec![0; n] } else { tracks.to_vec() },
        roots: vec![],
        target: vec![],
        weight: vec![],
    };
    // Weights, grouped by leaf.
    let (leaf_trees, leaf_nodes, leaf_targets, leaf_weights) = leaves;
    if [leaf_nodes.len(), leaf_targets.len(), leaf_weights.len()] != [leaf_trees.len(); 3] {
        return invalid("the attributes of leaves differ in length");
    }
    let mut of_leaf: Vec<Vec<usize>> = vec![vec![]; n];
    for j in 0..leaf_trees.len() {
        let Some(at) = index.get(&(leaf_trees[j], leaf_nodes[j])) else {
            return invalid(format!("a weight names node {} of tree {}, which does not exist", leaf_nodes[j], leaf_trees[j]));
        };
        if !(0..targets).contains(&leaf_targets[j]) {
            return invalid(format!("a weight names target {} of {targets}", leaf_targets[j]));
        }
        of_leaf[*at].push(j);
    }
    let mut is_child = vec![false; n];
    for i in 0..n {
        if out.mode[i] == 6 {
            out.yes[i] = out.target.len() as i64;
            for &j in &of_leaf[i] {
                out.target.push(leaf_targets[j]);
                out.weight.push(leaf_weights[j]);
            }
            out.no[i] = out.target.len() as i64;
            out.feature[i] = 0;
        } else {
            (out.yes[i], out.no[i]) = (child(i, yes[i])?, child(i, no[i])?);
            for c in [out.yes[i], out.no[i]] {
                if std::mem::replace(&mut is_child[c as usize], true) {
                    return invalid(format!("node {} of tree {} has two parents", nodes[c as usize], trees[c as usize]));
                }
            }
            if !(0..1 << 31).contains(&features[i]) {
                return invalid(format!("feature {}", features[i]));
            }
        }
    }
    // With one parent a node at most, whatever is not a root's descendant is on a cycle.
    out.roots = (0..n).filter(|i| !is_child[*i]).map(|i| i as i64).collect();
    let rooted: BTreeSet<i64> = out.roots.iter().map(|r| trees[*r as usize]).collect();
    let all: BTreeSet<i64> = trees.iter().copied().collect();
    if rooted.len() != out.roots.len() || rooted != all {
        return invalid("a tree has no root, or several");
    }
    let mut seen = 0;
    let mut stack = out.roots.clone();
    while let Some(i) = stack.pop() {
        seen += 1;
        if out.mode[i as usize] != 6 {
            stack.extend([out.yes[i as usize], out.no[i as usize]]);
        }
    }
    if seen != n {
        return invalid("nodes of a tree form a cycle");
    }
    Ok(out)
}

impl Forest {
    /// Scores `f32[n, targets]` of rows of features.
    fn emit(self, cx: &mut Cx, x: Val, targets: i64, aggregate: Aggregate) -> Res<Val> {
        let dtype = cx.dtype(x);
        if dtype == DType::F64 {
            return missing("tree ensembles over f64 features");
        }
        let x = cx.cast(x, DType::F32)?;
        let x = if cx.rank(x) == 1 { cx.as_row(x)? } else { x };
        let Some(columns) = cx.shape(x).get(1).cloned().filter(|_| cx.rank(x) == 2) else {
            return invalid(format!("features of type {}", cx.ty(x)));
        };
        let most = self.feature.iter().copied().max().unwrap_or(0);
        if columns.as_const().is_some_and(|c| most >= c) {
            return invalid(format!("the trees read feature {most} of {columns}"));
        }
        let narrow = |values: &[i64]| Tensor::from_scalars(DType::I32, [values.len()], values.iter().map(|v| Scalar::I((*v).into())));
        let tensors = [
            narrow(&self.feature),
            narrow(&self.mode),
            Tensor::from_f32([self.threshold.len()], &self.threshold),
            narrow(&self.yes),
            narrow(&self.no),
            narrow(&self.missing),
            narrow(&self.roots),
            narrow(&self.target),
            Tensor::from_f32([self.weight.len()], &self.weight),
        ];
        let mut args = vec![x];
        args.extend(tensors.map(|t| cx.constant(t)));
        cx.emit(Op::TreeEnsemble { targets: targets as usize, aggregate }, &args)
    }
}

pub(crate) fn regressor(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let targets = cx.int("n_targets", 1)?;
    if !(1..=1 << 20).contains(&targets) {
        return invalid(format!("{targets} targets"));
    }
    let aggregate = match cx.text("aggregate_function", "SUM")?.as_str() {
        "SUM" => Aggregate::Sum,
        "AVERAGE" => Aggregate::Mean,
        "MIN" => Aggregate::Min,
        "MAX" => Aggregate::Max,
        other => return invalid(format!("aggregate_function `{other}`")),
    };
    let leaves = (ints(cx, "target_treeids")?, ints(cx, "target_nodeids")?, ints(cx, "target_ids")?, floats(cx, "target_weights")?);
    let forest = forest(cx, leaves, targets)?;
    let scores = forest.emit(cx, x, targets, aggregate)?;
    let base = floats(cx, "base_values")?;
    let scores = ml::add_base(cx, scores, &base, targets)?;
    let transform = Transform::read(cx)?;
    Ok(vec![transform.apply(cx, scores)?])
}

pub(crate) fn classifier(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let labels = ml::Labels::read(cx, "classlabels_int64s", "classlabels_strings")?;
    let classes = labels.count() as i64;
    let ids = ints(cx, "class_ids")?;
    let weights = floats(cx, "class_weights")?;
    let used: BTreeSet<i64> = ids.iter().copied().collect();
    let base = floats(cx, "base_values")?;
    let positive = weights.iter().all(|w| *w >= 0.0);
    let leaves = (ints(cx, "class_treeids")?, ints(cx, "class_nodeids")?, ids, weights);
    let forest = forest(cx, leaves, classes)?;
    let scores = forest.emit(cx, x, classes, Aggregate::Sum)?;
    let transform = Transform::read(cx)?;
    if classes != 2 || used.len() != 1 {
        // One base value for two classes is the first one's.
        let base = if classes == 2 && base.len() == 1 { vec![base[0], 0.0] } else { base };
        let scores = ml::add_base(cx, scores, &base, classes)?;
        let label = labels.of_best(cx, scores)?;
        return Ok(vec![label, transform.apply(cx, scores)?]);
    }
    // Two classes, weights of one: its score decides, and gives the other's.
    let only = *used.first().unwrap_or(&0);
    let mut s = cx.slice_axis(scores, 1, Dim::from(only), Dim::one())?;
    let last = base.last().copied().unwrap_or(0.0);
    if last != 0.0 {
        s = cx.with_number(ScalarFn::Add, s, f64::from(last))?;
    }
    let yes = cx.with_number(ScalarFn::Gt, s, if positive { 0.5 } else { 0.0 })?;
    let yes = super::reduce::drop_axes(cx, yes, &[1])?;
    let label = labels.of_two(cx, yes)?;
    let negated = cx.map(ScalarFn::Neg, &[s])?;
    let scores = if base.len() == 2 {
        let both = super::view::concat_along(cx, &[negated, s], 1)?;
        transform.apply(cx, both)?
    } else if positive {
        let other = cx.with_number(ScalarFn::Add, negated, 1.0)?;
        super::view::concat_along(cx, &[other, s], 1)?
    } else {
        let both = super::view::concat_along(cx, &[negated, s], 1)?;
        if transform == Transform::Logistic { transform.apply(cx, both)? } else { both }
    };
    Ok(vec![label, scores])
}
