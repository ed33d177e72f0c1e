//! Simpler index spaces for the same region: tensors flattened, axes of extent 1 dropped, axes that every access
//! walks as one merged.
use super::expr::Env;
use pavage_ir::{Dim, Expr, Heart, Region, TensorType, dim::Atom, region::StageFn};

/// The region with every tensor one-dimensional and as few axes as possible. Only hearts without coordinates of their own
/// (map, reduce) lose axes. At least one parallel axis stays, and one reduced axis where there were any.
pub fn collapse(region: &Region) -> Region {
    let mut out = flatten(region);
    if !matches!(out.heart, Heart::Map | Heart::Reduce { .. }) {
        return out;
    }
    for k in (0..out.axes().len()).rev() {
        if out.axes()[k].is(1) && may_lose(&out, k) {
            drop_unit(&mut out, k);
        }
    }
    if out.space.is_empty() {
        // A scalar: one point along one axis.
        let shift = |d: &Dim| renumber(d, &|k| Dim::axis(k + 1));
        map_dims(&mut out, &mut |d| Some(shift(d)));
        out.space.push(Dim::one());
    }
    while (0..out.axes().len().saturating_sub(1)).rev().any(|k| merge(&mut out, k)) {}
    out
}

fn flatten(region: &Region) -> Region {
    let mut out = region.clone();
    for (expr, _) in &mut out.exprs {
        if let Expr::Load { arg, index, .. } = expr {
            *index = vec![Env::flat(&region.args[*arg as usize].shape, index)];
        }
    }
    for o in &mut out.outputs {
        o.index = vec![Env::flat(&o.ty.shape, &o.index)];
    }
    let flat = |t: &TensorType| TensorType { dtype: t.dtype, shape: vec![t.shape.iter().cloned().product()] };
    out.args = region.args.iter().map(flat).collect();
    out.outputs.iter_mut().for_each(|o| o.ty = flat(&o.ty));
    out
}

/// Replace every index expression; nothing is changed where one cannot be.
fn map_dims(region: &mut Region, f: &mut dyn FnMut(&Dim) -> Option<Dim>) -> bool {
    let mut out = region.clone();
    for (expr, _) in &mut out.exprs {
        let dims: &mut [Dim] = match expr {
            Expr::Load { index, .. } => index,
            Expr::Index(d) => std::slice::from_mut(d),
            _ => continue,
        };
        for d in dims {
            let Some(new) = f(d) else { return false };
            *d = new;
        }
    }
    for d in out.outputs.iter_mut().flat_map(|o| &mut o.index) {
        let Some(new) = f(d) else { return false };
        *d = new;
    }
    *region = out;
    true
}

fn renumber(d: &Dim, f: &dyn Fn(usize) -> Dim) -> Dim {
    d.map_atoms(&|atom| match atom {
        Atom::Axis(k) => f(*k as usize),
        other => Dim::from(other.clone()),
    })
}

fn may_lose(region: &Region, k: usize) -> bool {
    match &region.heart {
        Heart::Reduce { axes, .. } if k >= region.space.len() => axes.len() > 1,
        _ => true,
    }
}

fn drop_unit(region: &mut Region, k: usize) {
    map_dims(region, &mut |d| {
        Some(renumber(d, &|j| match j.cmp(&k) {
            std::cmp::Ordering::Less => Dim::axis(j),
            std::cmp::Ordering::Equal => Dim::ZERO,
            std::cmp::Ordering::Greater => Dim::axis(j - 1),
        }))
    });
    remove_axis(region, k);
}

fn remove_axis(region: &mut Region, k: usize) -> Dim {
    let parallel = region.space.len();
    match &mut region.heart {
        Heart::Reduce { axes, .. } if k >= parallel => axes.remove(k - parallel),
        _ => region.space.remove(k),
    }
}

/// Make axes `k` and `k + 1` one, if both are parallel or both reduced and every index walks them as one.
fn merge(region: &mut Region, k: usize) -> bool {
    let parallel = region.space.len();
    if k + 1 == parallel {
        return false;
    }
    if let Heart::Reduce { stages, .. } = &region.heart
        && k >= parallel
        && stages.iter().any(|s| matches!(s.f, StageFn::Arg { .. }))
    {
        return false;
    }
    let inner = region.axes()[k + 1].clone();
    if !map_dims(region, &mut |d| merge_dim(d, k, &inner)) {
        return false;
    }
    remove_axis(region, k + 1);
    match &mut region.heart {
        Heart::Reduce { axes, .. } if k >= parallel => axes[k - parallel] = axes[k - parallel].clone() * inner,
        _ => region.space[k] = region.space[k].clone() * inner,
    }
    true
}

/// `d` over the merged axis: at every level the factor of axis `k` is that of axis `k + 1` times its extent.
fn merge_dim(d: &Dim, k: usize, inner: &Dim) -> Option<Dim> {
    let (mut outer_factor, mut inner_factor, mut rest) = (Dim::ZERO, Dim::ZERO, Dim::ZERO);
    for (atoms, c) in d.terms() {
        let mut product = Dim::from(*c);
        let mut which = None;
        for atom in atoms {
            let factor = match atom {
                Atom::Axis(j) if *j as usize == k || *j as usize == k + 1 => {
                    if which.replace(*j as usize).is_some() {
                        return None;
                    }
                    continue;
                }
                Atom::Axis(j) if *j as usize > k + 1 => Dim::axis(*j as usize - 1),
                Atom::Div(x, y) => merge_dim(x, k, inner)?.div(&merge_dim(y, k, inner)?),
                Atom::Mod(x, y) => merge_dim(x, k, inner)?.modulo(&merge_dim(y, k, inner)?),
                Atom::Max(x, y) => merge_dim(x, k, inner)?.larger(&merge_dim(y, k, inner)?),
                Atom::Min(x, y) => merge_dim(x, k, inner)?.smaller(&merge_dim(y, k, inner)?),
                leaf => Dim::from(leaf.clone()),
            };
            product = product * factor;
        }
        match which {
            Some(j) if j == k => outer_factor = outer_factor + product,
            Some(_) => inner_factor = inner_factor + product,
            None => rest = rest + product,
        }
    }
    // Extents are free of axes, so factors can be compared as they are.
    (outer_factor == inner_factor.clone() * inner.clone()).then(|| inner_factor * Dim::axis(k) + rest)
}
