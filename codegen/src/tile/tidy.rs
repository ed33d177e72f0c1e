//! Dropping unused statements and numbering values in text order.
use super::{Block, Kernel, Val};
use std::collections::{BTreeMap, BTreeSet};

/// Drop statements that nothing needs and renumber what is left.
pub(super) fn tidy(kernel: &mut Kernel) {
    let mut used = BTreeSet::new();
    drop_unused(&mut kernel.body, &mut used);
    let mut names = BTreeMap::new();
    let mut types = vec![];
    let dims = std::mem::take(&mut kernel.dims);
    kernel.dims = dims.iter().map(|v| define(*v, &kernel.types, &mut names, &mut types)).collect();
    renumber(&mut kernel.body, &kernel.types, &mut names, &mut types);
    kernel.types = types;
}

fn drop_unused(block: &mut Block, used: &mut BTreeSet<Val>) {
    used.extend(block.yields.iter().copied());
    let mut kept = vec![];
    for mut stmt in std::mem::take(&mut block.stmts).into_iter().rev() {
        if stmt.op.is_removable() && !stmt.results.iter().any(|r| used.contains(r)) {
            continue;
        }
        // Carried values stay as they are: what flows into them counts as used.
        for inner in stmt.blocks.iter_mut().rev() {
            drop_unused(inner, used);
        }
        used.extend(stmt.args.iter().copied());
        kept.push(stmt);
    }
    kept.reverse();
    block.stmts = kept;
}

fn define(v: Val, old: &[super::Ty], names: &mut BTreeMap<Val, Val>, types: &mut Vec<super::Ty>) -> Val {
    let new = Val(types.len() as u32);
    types.push(old[v.0 as usize]);
    names.insert(v, new);
    new
}

fn renumber(block: &mut Block, old: &[super::Ty], names: &mut BTreeMap<Val, Val>, types: &mut Vec<super::Ty>) {
    for p in &mut block.params {
        *p = define(*p, old, names, types);
    }
    for stmt in &mut block.stmts {
        for a in &mut stmt.args {
            *a = names[a];
        }
        for inner in &mut stmt.blocks {
            renumber(inner, old, names, types);
        }
        for r in &mut stmt.results {
            *r = define(*r, old, names, types);
        }
    }
    for y in &mut block.yields {
        *y = names[y];
    }
}
