//! Tree ensembles of `ai.onnx.ml`.
use super::ml::{self, Transform};
use crate::onnx::{
    build::{Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{DType, Dim, Op, Scalar, ScalarFn, Tensor, attr::Aggregate};
use std::collections::{BTreeSet, HashMap};

/// Weights of leaves: tree, node, target, weight.
type Leaves<'a> = (&'a [i64], &'a [i64], &'a [i64], Vec<f64>);

/// Attributes of the classic ensembles, as the operands of the `tree_ensemble` op.
struct Forest {
    feature: Vec<i64>,
    mode: Vec<i64>,
    threshold: Vec<f64>,
    yes: Vec<i64>,
    no: Vec<i64>,
    missing: Vec<i64>,
    roots: Vec<i64>,
    target: Vec<i64>,
    weight: Vec<f64>,
}

fn floats(cx: &Cx, name: &str) -> Res<Vec<f64>> {
    match (cx.floats(name)?, cx.tensor_attr(&format!("{name}_as_tensor"))?) {
        (Some(v), _) if !v.is_empty() => Ok(v.iter().map(|v| f64::from(*v)).collect()),
        (_, Some(t)) if t.dtype().is_float() => Ok(t.to_f64()),
        (_, Some(t)) => invalid(format!("`{name}_as_tensor` of {}", t.dtype())),
        (_, None) => Ok(vec![]),
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
    /// Fails where a walk from a root might not end.
    fn without_cycles(&self) -> Res<()> {
        // 1: on the way down from here; 2: done.
        let mut state = vec![0u8; self.mode.len()];
        let mut stack: Vec<(i64, bool)> = self.roots.iter().map(|r| (*r, false)).collect();
        while let Some((i, back)) = stack.pop() {
            let at = i as usize;
            if back {
                state[at] = 2;
            } else if state[at] == 1 {
                return invalid("nodes of a tree form a cycle");
            } else if state[at] == 0 && self.mode[at] != 6 {
                state[at] = 1;
                stack.push((i, true));
                stack.extend([self.yes[at], self.no[at]].map(|c| (c, false)));
            }
        }
        Ok(())
    }

    /// Scores `f32[n, targets]` of rows of features.
    fn emit(self, cx: &mut Cx, x: Val, targets: i64, aggregate: Aggregate) -> Res<Val> {
        // Features and thresholds are compared as they are: rounding either to the other could take another branch.
        let dtype = if cx.dtype(x) == DType::F64 { DType::F64 } else { DType::F32 };
        let x = cx.cast(x, dtype)?;
        let x = if cx.rank(x) == 1 { cx.as_row(x)? } else { x };
        let Some(columns) = cx.shape(x).get(1).cloned().filter(|_| cx.rank(x) == 2) else {
            return invalid(format!("features of type {}", cx.ty(x)));
        };
        let most = self.feature.iter().copied().max().unwrap_or(0);
        if columns.as_const().is_some_and(|c| most >= c) {
            return invalid(format!("the trees read feature {most} of {columns}"));
        }
        let real = |values: &[f64]| {
            let exact = values.iter().all(|v| v.is_nan() || f64::from(*v as f32) == *v);
            let dtype = if exact { DType::F32 } else { DType::F64 };
            Tensor::from_scalars(dtype, [values.len()], values.iter().map(|v| Scalar::F(*v)))
        };
        let narrow = |values: &[i64]| Tensor::from_scalars(DType::I32, [values.len()], values.iter().map(|v| Scalar::I((*v).into())));
        let tensors = [
            narrow(&self.feature),
            narrow(&self.mode),
            real(&self.threshold),
            narrow(&self.yes),
            narrow(&self.no),
            narrow(&self.missing),
            narrow(&self.roots),
            narrow(&self.target),
            real(&self.weight),
        ];
        let mut args = vec![x];
        args.extend(tensors.map(|t| cx.constant(t)));
        cx.emit(Op::TreeEnsemble { targets: targets as usize, aggregate }, &args)
    }
}

/// The comparison of a node of the newer form; the last is membership of a set.
const MEMBER: u8 = 6;

/// Nodes of the form that names its leaves apart: membership becomes a chain of comparisons.
fn newer_forest(cx: &Cx, targets: i64) -> Res<Forest> {
    let tensor = |name: &str| cx.tensor_attr(name);
    let (Some(modes), Some(splits)) = (tensor("nodes_modes")?, tensor("nodes_splits")?) else { return invalid("nodes_modes or nodes_splits is missing") };
    let Some(weights) = tensor("leaf_weights")? else { return invalid("leaf_weights is missing") };
    let (modes, splits, weights) = (modes.to_i64(), splits.to_f64(), weights.to_f64());
    let members = tensor("membership_values")?.map_or_else(Vec::new, |t| t.to_f64());
    let (features, roots, leaf_targets) = (ints(cx, "nodes_featureids")?, ints(cx, "tree_roots")?, ints(cx, "leaf_targetids")?);
    let (yes, no) = (ints(cx, "nodes_truenodeids")?, ints(cx, "nodes_falsenodeids")?);
    let (yes_leaf, no_leaf) = (ints(cx, "nodes_trueleafs")?, ints(cx, "nodes_falseleafs")?);
    let tracks = ints(cx, "nodes_missing_value_tracks_true")?;
    let n = modes.len();
    let even = [splits.len(), features.len(), yes.len(), no.len(), yes_leaf.len(), no_leaf.len()] == [n; 6];
    if n == 0 || !even || !(tracks.is_empty() || tracks.len() == n) || weights.len() != leaf_targets.len() || roots.is_empty() {
        return invalid("the attributes of nodes or leaves differ in length");
    }
    if leaf_targets.iter().any(|t| !(0..targets).contains(t)) || features.iter().any(|f| !(0..1 << 31).contains(f)) {
        return invalid(format!("a leaf names a target not below {targets}, or a node no feature"));
    }
    // How many comparisons each node becomes, and the first of them.
    let mut sets = members.split(|v| v.is_nan());
    let mut wanted: Vec<Vec<f64>> = vec![];
    for i in 0..n {
        wanted.push(match modes[i] {
            0..=5 => vec![splits[i]],
            m if m == i64::from(MEMBER) => match sets.next() {
                Some(set) if !set.is_empty() => set.to_vec(),
                _ => return invalid(format!("node {i} tests membership of a set that is not given")),
            },
            m => return invalid(format!("mode {m} of node {i}")),
        });
    }
    let first: Vec<i64> = wanted
        .iter()
        .scan(0, |at, w| {
            *at += w.len() as i64;
            Some(*at - w.len() as i64)
        })
        .collect();
    let inner: i64 = wanted.iter().map(|w| w.len() as i64).sum();
    let leaves = weights.len();
    let child = |id: i64, leaf: i64| -> Res<i64> {
        let (count, what) = if leaf != 0 { (leaves, "leaf") } else { (n, "node") };
        match usize::try_from(id).ok().filter(|i| *i < count) {
            Some(i) => Ok(if leaf != 0 { inner + i as i64 } else { first[i] }),
            None => invalid(format!("a child is {what} {id} of {count}")),
        }
    };
    let mut out = Forest {
        feature: vec![],
        mode: vec![],
        threshold: vec![],
        yes: vec![],
        no: vec![],
        missing: vec![],
        roots: roots.iter().map(|r| child(*r, 0)).collect::<Res<_>>()?,
        target: leaf_targets.to_vec(),
        weight: weights,
    };
    for i in 0..n {
        let (hit, other) = (child(yes[i], yes_leaf[i])?, child(no[i], no_leaf[i])?);
        for (k, value) in wanted[i].iter().enumerate() {
            let last = k + 1 == wanted[i].len();
            out.feature.push(features[i]);
            out.mode.push(if modes[i] == i64::from(MEMBER) { 4 } else { modes[i] });
            out.threshold.push(*value);
            out.yes.push(hit);
            out.no.push(if last { other } else { first[i] + k as i64 + 1 });
            out.missing.push(tracks.get(i).copied().unwrap_or(0));
        }
    }
    for leaf in 0..out.weight.len() as i64 {
        out.feature.push(0);
        out.mode.push(6);
        out.threshold.push(0.0);
        out.yes.push(leaf);
        out.no.push(leaf + 1);
        out.missing.push(0);
    }
    out.without_cycles()?;
    Ok(out)
}

/// Any number of trees whose leaves stand apart from their nodes.
pub(crate) fn ensemble(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let targets = cx.int("n_targets", 1)?;
    if !(1..=1 << 20).contains(&targets) {
        return invalid(format!("{targets} targets"));
    }
    let aggregate = match cx.int("aggregate_function", 1)? {
        0 => Aggregate::Mean,
        1 => Aggregate::Sum,
        2 => Aggregate::Min,
        3 => Aggregate::Max,
        other => return invalid(format!("aggregate_function {other}")),
    };
    let transform = match cx.int("post_transform", 0)? {
        0 => Transform::None,
        1 => Transform::Softmax,
        2 => Transform::Logistic,
        3 => Transform::SoftmaxZero,
        4 => Transform::Probit,
        other => return invalid(format!("post_transform {other}")),
    };
    let dtype = cx.dtype(x);
    let scores = newer_forest(cx, targets)?.emit(cx, x, targets, aggregate)?;
    let scores = transform.apply(cx, scores)?;
    Ok(vec![cx.cast(scores, dtype)?])
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
    let scores = cx.cast(scores, DType::F32)?;
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
    let scores = cx.cast(scores, DType::F32)?;
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
        s = cx.with_number(ScalarFn::Add, s, last)?;
    }
    let yes = cx.with_number(ScalarFn::Gt, s, if positive { 0.5 } else { 0.0 })?;
    let yes = super::reduce::drop_axes(cx, yes, &[1])?;
    let label = labels.of_two(cx, yes)?;
    let negated = cx.map(ScalarFn::Neg, &[s])?;
    let scores = if base.len() == 2 {
        let both = super::view::concat_along(cx, &[negated, s], 1)?;
        transform.apply(cx, both)?
    } else if positive && transform != Transform::Logistic {
        let other = cx.with_number(ScalarFn::Add, negated, 1.0)?;
        super::view::concat_along(cx, &[other, s], 1)?
    } else {
        let both = super::view::concat_along(cx, &[negated, s], 1)?;
        if transform == Transform::Logistic { transform.apply(cx, both)? } else { both }
    };
    Ok(vec![label, scores])
}
