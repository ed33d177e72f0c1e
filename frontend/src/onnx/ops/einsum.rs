//! `Einsum`: sums of products over named axes.
use super::reduce;
use crate::onnx::{
    build::{Builder, Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{DType, Dim, Op, ScalarFn, attr::ReduceFn};
use std::collections::BTreeMap;

/// A named axis: a letter, or one of the axes an ellipsis stands for, counted from the last.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Label {
    Ellipsis(usize),
    Letter(char),
}

/// One side of an equation: letters, `None` for the ellipsis.
fn parse_term(term: &str) -> Res<Vec<Option<char>>> {
    let mut out = vec![];
    let mut rest = term;
    while let Some(c) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix("...") {
            out.push(None);
            rest = after;
        } else if c.is_ascii_alphabetic() {
            out.push(Some(c));
            rest = &rest[1..];
        } else {
            return invalid(format!("`{term}` in the equation"));
        }
    }
    if out.iter().filter(|l| l.is_none()).count() > 1 {
        return invalid(format!("`{term}` has two ellipses"));
    }
    Ok(out)
}

fn expand(term: &[Option<char>], ellipsis: usize) -> Vec<Label> {
    let axes = |l: &Option<char>| match l {
        Some(c) => vec![Label::Letter(*c)],
        None => (0..ellipsis).rev().map(Label::Ellipsis).collect(),
    };
    term.iter().flat_map(axes).collect()
}

/// A value whose axes have names, each one once.
#[derive(Clone)]
struct Named {
    v: Val,
    axes: Vec<Label>,
}

impl Named {
    /// Repeated names become one axis, the diagonal of theirs.
    fn new(b: &mut Builder, mut v: Val, mut axes: Vec<Label>) -> Res<Self> {
        while let Some((i, j)) = (0..axes.len()).flat_map(|j| (0..j).map(move |i| (i, j))).find(|(i, j)| axes[*i] == axes[*j]) {
            let mut shape = b.shape(v);
            let n = b.same_extent(&shape[i], &shape[j])?;
            (shape[i], shape[j]) = (n.clone(), n);
            v = b.with_shape(v, shape.clone())?;
            let row = b.emit(Op::Iota { dtype: DType::I64, shape: shape.clone(), axis: i }, &[])?;
            let column = b.emit(Op::Iota { dtype: DType::I64, shape, axis: j }, &[])?;
            let on = b.map(ScalarFn::Eq, &[row, column])?;
            let zero = b.scalar_like(v, 0.0);
            v = b.pointwise(ScalarFn::Select, &[on, v, zero])?;
            v = reduce::reduce(b, ReduceFn::Sum, v, &[j])?;
            v = reduce::drop_axes(b, v, &[j])?;
            axes.remove(j);
        }
        Ok(Self { v, axes })
    }

    /// Without the axes of extent 1 that another operand has longer.
    fn without_broadcast(mut self, b: &mut Builder, extents: &BTreeMap<Label, Dim>) -> Res<Self> {
        let shape = b.shape(self.v);
        let gone: Vec<usize> = (0..self.axes.len()).filter(|i| shape[*i].is(1) && !extents[&self.axes[*i]].is(1)).collect();
        self.v = reduce::drop_axes(b, self.v, &gone)?;
        self.axes = self.axes.iter().enumerate().filter(|(i, _)| !gone.contains(i)).map(|(_, l)| *l).collect();
        let shape = self.axes.iter().map(|l| extents[l].clone()).collect();
        self.v = b.with_shape(self.v, shape)?;
        Ok(self)
    }

    /// Summed over the axes that nobody needs.
    fn sum_out(mut self, b: &mut Builder, needed: &dyn Fn(&Label) -> bool) -> Res<Self> {
        let gone: Vec<usize> = (0..self.axes.len()).filter(|i| !needed(&self.axes[*i])).collect();
        self.v = reduce::reduce(b, ReduceFn::Sum, self.v, &gone)?;
        self.v = reduce::drop_axes(b, self.v, &gone)?;
        self.axes.retain(needed);
        Ok(self)
    }

    /// The value with its axes in this order, axes it lacks with extent 1.
    fn arranged(&self, b: &mut Builder, order: &[Label]) -> Res<Val> {
        let perm: Vec<usize> = order.iter().filter_map(|l| self.axes.iter().position(|a| a == l)).collect();
        let v = b.transpose(self.v, &perm)?;
        let own = b.shape(v);
        let mut own = own.into_iter();
        let shape = order.iter().map(|l| if self.axes.contains(l) { own.next().unwrap_or(Dim::one()) } else { Dim::one() }).collect();
        b.reshape(v, shape)
    }
}

/// The product of two operands, summed over the axes that are not needed after it.
fn contract(b: &mut Builder, x: Named, y: Named, needed: &dyn Fn(&Label) -> bool, extents: &BTreeMap<Label, Dim>) -> Res<Named> {
    let x_keeps = |l: &Label| needed(l) || y.axes.contains(l);
    let x = x.sum_out(b, &x_keeps)?;
    let y_keeps = |l: &Label| needed(l) || x.axes.contains(l);
    let y = y.clone().sum_out(b, &y_keeps)?;
    let pick = |n: &Named, test: &dyn Fn(&Label) -> bool| n.axes.iter().copied().filter(test).collect::<Vec<_>>();
    let batch = pick(&x, &|l| y.axes.contains(l) && needed(l));
    let inner = pick(&x, &|l| y.axes.contains(l) && !needed(l));
    let rows = pick(&x, &|l| !y.axes.contains(l));
    let columns = pick(&y, &|l| !x.axes.contains(l));
    let axes = [batch.clone(), rows.clone(), columns.clone()].concat();
    if inner.is_empty() {
        let (x, y) = (x.arranged(b, &axes)?, y.arranged(b, &axes)?);
        return Ok(Named { v: b.pointwise(ScalarFn::Mul, &[x, y])?, axes });
    }
    let size = |labels: &[Label]| labels.iter().map(|l| extents[l].clone()).product::<Dim>();
    let arrange = |b: &mut Builder, n: &Named, parts: [&[Label]; 3]| {
        let v = n.arranged(b, &parts.concat())?;
        b.reshape(v, parts.iter().map(|p| size(p)).collect())
    };
    let left = arrange(b, &x, [&batch, &rows, &inner])?;
    let right = arrange(b, &y, [&batch, &inner, &columns])?;
    let dtype = b.dtype(left);
    let v = super::linear::matmul(b, left, right, dtype)?;
    let shape = axes.iter().map(|l| extents[l].clone()).collect();
    Ok(Named { v: b.reshape(v, shape)?, axes })
}

pub(crate) fn convert(cx: &mut Cx) -> Res<Vec<Val>> {
    let equation: String = cx.text("equation", "")?.chars().filter(|c| !c.is_whitespace()).collect();
    let (left, right) = match equation.split_once("->") {
        Some((left, right)) => (left, Some(right)),
        None => (equation.as_str(), None),
    };
    let terms = left.split(',').map(parse_term).collect::<Res<Vec<_>>>()?;
    let args = cx.args()?;
    if terms.len() != args.len() {
        return invalid(format!("{} operands for the equation `{equation}`", args.len()));
    }
    let dtype = cx.dtype(args[0]);
    if args.iter().any(|v| cx.dtype(*v) != dtype) {
        return invalid("operands of different types");
    }
    let work = match dtype {
        d if d.is_float() && d.bits() < 32 => DType::F32,
        d if d.is_int() && d.bits() < 32 => DType::I32,
        DType::U32 | DType::U64 => return missing(format!("Einsum of {dtype}")),
        d => d,
    };
    // The longest ellipsis decides how many axes the output's stands for.
    let (mut operands, mut extents, mut longest) = (vec![], BTreeMap::<Label, Dim>::new(), 0);
    for (term, v) in terms.iter().zip(args) {
        let letters = term.iter().flatten().count();
        let rest = cx.rank(v).checked_sub(letters).filter(|rest| *rest == 0 || letters < term.len());
        let Some(rest) = rest else { return invalid(format!("the equation `{equation}` and an operand of type {}", cx.ty(v))) };
        longest = longest.max(rest);
        let v = cx.cast(v, work)?;
        let named = Named::new(cx, v, expand(term, rest))?;
        for (label, d) in named.axes.iter().zip(cx.shape(named.v)) {
            let known = extents.get(label).cloned().unwrap_or(Dim::one());
            let both = if known.is(1) {
                d
            } else if d.is(1) {
                known
            } else {
                cx.same_extent(&known, &d)?
            };
            extents.insert(*label, both);
        }
        operands.push(named);
    }
    let output = match right {
        Some(right) => expand(&parse_term(right)?, longest),
        None => {
            // All axes of the ellipsis, then the letters that occur once, in order.
            let mut counts = BTreeMap::<char, usize>::new();
            terms.iter().flatten().flatten().for_each(|c| *counts.entry(*c).or_default() += 1);
            let once = counts.iter().filter(|(_, n)| **n == 1).map(|(c, _)| Label::Letter(*c));
            (0..longest).rev().map(Label::Ellipsis).chain(once).collect()
        }
    };
    if let Some(i) = (0..output.len()).find(|i| output[..*i].contains(&output[*i]) || !extents.contains_key(&output[*i])) {
        return invalid(format!("axis {i} of the output of `{equation}` is there twice or in no operand"));
    }
    let mut operands = operands.into_iter().map(|n| n.without_broadcast(cx, &extents)).collect::<Res<Vec<_>>>()?;
    operands.reverse();
    let Some(mut acc) = operands.pop() else { return invalid("no operands") };
    while let Some(next) = operands.pop() {
        let needed = |l: &Label| output.contains(l) || operands.iter().any(|n| n.axes.contains(l));
        acc = contract(cx, acc, next, &needed, &extents)?;
    }
    let acc = acc.sum_out(cx, &|l| output.contains(l))?;
    let v = acc.arranged(cx, &output)?;
    let shape: Vec<Dim> = output.iter().map(|l| extents[l].clone()).collect();
    let v = cx.broadcast_to(v, &shape)?;
    Ok(vec![cx.cast(v, dtype)?])
}
