//! Regions over flat memory: every index as one element offset, axes that memory cannot tell apart merged.
use pavage_ir::{Dim, Expr, ExprId, Region, TensorType, dim::Atom, region::RegionOutput};
use std::collections::BTreeMap;

/// The offset of `index` in a row-major tensor of `shape`.
pub(super) fn offset(index: &[Dim], shape: &[Dim]) -> Dim {
    index.iter().zip(shape).fold(Dim::ZERO, |at, (i, n)| at * n.clone() + i.clone())
}

/// `dim` as the sum of axis `k` times `strides[k]` and `rest`, the strides and the rest free of axes below
/// `strides.len()` and of data; `None` where it is not of that form.
pub(super) struct Linear {
    /// Elements one step of each axis moves.
    pub(super) strides: Vec<Dim>,
    /// What no axis moves.
    pub(super) rest: Dim,
}

/// Take `dim` apart, see [`Linear`].
pub(super) fn linear(dim: &Dim, axes: usize) -> Option<Linear> {
    let mut out = Linear { strides: vec![Dim::ZERO; axes], rest: Dim::ZERO };
    for (atoms, c) in dim.terms() {
        let mut factor = Dim::from(*c);
        let mut axis = None;
        for atom in atoms {
            match atom {
                Atom::Axis(k) if axis.is_none() && (*k as usize) < axes => axis = Some(*k as usize),
                Atom::Axis(_) | Atom::Value(_) => return None,
                other => {
                    let other = Dim::from(other.clone());
                    if other.any_atom(&|a| matches!(a, Atom::Axis(_) | Atom::Value(_))) {
                        return None;
                    }
                    factor = factor * other;
                }
            }
        }
        let place = axis.map_or(&mut out.rest, |k| &mut out.strides[k]);
        *place = place.clone() + factor;
    }
    Some(out)
}

/// Whether any index that `id` is computed from satisfies `test`.
pub(super) fn any_index(region: &Region, id: ExprId, test: &dyn Fn(&Dim) -> bool) -> bool {
    let through = |d: &Dim| {
        let mut values = vec![];
        collect_values(d, &mut values);
        test(d) || values.into_iter().any(|v| any_index(region, ExprId(v), test))
    };
    match region.expr(id) {
        Expr::Index(d) => through(d),
        Expr::Load { index, guard, .. } => index.iter().any(through) || guard.is_some_and(|g| any_index(region, g, test)),
        Expr::Call(_, xs) => xs.iter().any(|x| any_index(region, *x, test)),
        Expr::Cast(x) | Expr::Bits(x) => any_index(region, *x, test),
        Expr::Float(_) | Expr::Int(_) | Expr::Acc(_) => false,
    }
}

/// Copies expressions of one region into another, replacing axes.
pub(super) struct Rewrite<'a> {
    from: &'a Region,
    to: &'a mut Region,
    axes: Vec<Dim>,
    done: BTreeMap<ExprId, ExprId>,
}

impl<'a> Rewrite<'a> {
    /// Copy from `from` into `to`, whose arguments are those of `from` as rows of elements; axis `k` becomes `axes[k]`.
    pub(super) fn new(from: &'a Region, to: &'a mut Region, axes: Vec<Dim>) -> Self {
        Self { from, to, axes, done: BTreeMap::new() }
    }

    /// The copy of an expression.
    pub(super) fn expr(&mut self, id: ExprId) -> ExprId {
        if let Some(to) = self.done.get(&id) {
            return *to;
        }
        let (expr, dtype) = &self.from.exprs[id.0 as usize];
        let expr = match expr {
            Expr::Index(d) => Expr::Index(self.dim(d)),
            Expr::Load { arg, index, guard } => {
                let index: Vec<Dim> = index.iter().map(|d| self.dim(d)).collect();
                let guard = guard.map(|g| self.expr(g));
                Expr::Load { arg: *arg, index: vec![offset(&index, &self.from.args[*arg as usize].shape)], guard }
            }
            Expr::Call(f, args) => Expr::Call(*f, args.iter().map(|a| self.expr(*a)).collect()),
            Expr::Cast(x) => Expr::Cast(self.expr(*x)),
            Expr::Bits(x) => Expr::Bits(self.expr(*x)),
            Expr::Float(_) | Expr::Int(_) | Expr::Acc(_) => expr.clone(),
        };
        let to = self.to.push(expr, *dtype);
        self.done.insert(id, to);
        to
    }

    /// The copy of an index.
    pub(super) fn dim(&mut self, dim: &Dim) -> Dim {
        let mut values = vec![];
        collect_values(dim, &mut values);
        let values: BTreeMap<u32, u32> = values.into_iter().map(|v| (v, self.expr(ExprId(v)).0)).collect();
        let axes = &self.axes;
        dim.map_atoms_in(
            &|atom| match atom {
                Atom::Axis(k) => axes[*k as usize].clone(),
                Atom::Value(v) => Dim::from(Atom::Value(values[v])),
                other => Dim::from(other.clone()),
            },
            &self.to.space,
        )
    }
}

fn collect_values(dim: &Dim, values: &mut Vec<u32>) {
    for atom in dim.terms().iter().flat_map(|(atoms, _)| atoms) {
        match atom {
            Atom::Value(v) => values.push(*v),
            Atom::Div(a, b) | Atom::Mod(a, b) | Atom::Max(a, b) | Atom::Min(a, b) => {
                collect_values(a, values);
                collect_values(b, values);
            }
            Atom::Sym(_) | Atom::Axis(_) => {}
        }
    }
}

/// `region` with arguments and outputs as rows of elements, over axes `space`; axis `k` of the old space becomes
/// `axes[k]`. The heart is left to the caller, who gets the copier of operand expressions.
pub(super) fn flat_over(region: &Region, space: Vec<Dim>, axes: &[Dim]) -> Region {
    let mut to = Region::new(region.name.clone(), space);
    to.args = region.args.iter().map(|t| TensorType { dtype: t.dtype, shape: vec![t.count()] }).collect();
    let mut outputs = vec![];
    let mut copy = Rewrite::new(region, &mut to, axes.to_vec());
    for out in &region.outputs {
        let index: Vec<Dim> = out.index.iter().map(|d| copy.dim(d)).collect();
        outputs.push(RegionOutput {
            ty: TensorType { dtype: out.ty.dtype, shape: vec![out.ty.count()] },
            expr: copy.expr(out.expr),
            index: vec![offset(&index, &out.ty.shape)],
        });
    }
    to.outputs = outputs;
    to
}
