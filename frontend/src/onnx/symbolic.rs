//! Sizes at import: following them through integer arithmetic, and relating symbols that must be equal.
use super::build::{Builder, DIMS_LIMIT, Res, Val};
use pavage_ir::{
    DType, Dim, Op, ScalarFn, Tensor, TensorType,
    attr::ReduceFn,
    dim::Atom,
    op::{EvalArgs, TypeArgs},
    tensor::count_of,
};

/// The result of an op over small integer tensors of which some elements are symbolic, when it can be said.
pub(crate) fn follow(b: &mut Builder, op: &Op, args: &[Val]) -> Res<Option<Val>> {
    if args.iter().all(|v| b.tensor(*v).is_some()) || args.iter().any(|v| b.dims(*v).is_none()) {
        return Ok(None);
    }
    let types: Vec<TensorType> = args.iter().map(|v| b.ty(*v).clone()).collect();
    let dims: Vec<Vec<Dim>> = args.iter().filter_map(|v| b.dims(*v)).collect();
    let results = op.infer(TypeArgs { types: &types.iter().collect::<Vec<_>>(), bodies: &[] })?;
    let [ty] = results.as_slice() else { return Ok(None) };
    let Some(shape) = ty.const_shape().filter(|s| count_of(s).is_some_and(|n| n <= DIMS_LIMIT)) else { return Ok(None) };
    let Some(values) = apply(b, op, args, &types, &dims, &results) else { return Ok(None) };
    if ty.dtype == DType::Bool && values.iter().any(|d| d.as_const().is_none()) || !(ty.dtype.is_int() || ty.dtype == DType::Bool) {
        return Ok(None);
    }
    Ok(Some(b.known_dims(ty.dtype, &shape, values)))
}

fn apply(b: &Builder, op: &Op, args: &[Val], types: &[TensorType], dims: &[Vec<Dim>], results: &[TensorType]) -> Option<Vec<Dim>> {
    match op {
        Op::Cast { to } if to.is_int() && to.bits() >= 32 && types[0].dtype != DType::Bool => Some(dims[0].clone()),
        Op::Map(f) => (0..dims[0].len()).map(|i| scalar(*f, &dims.iter().map(|d| &d[i]).collect::<Vec<_>>())).collect(),
        Op::Reshape { .. } | Op::Broadcast { .. } | Op::Transpose { .. } | Op::Slice { .. } | Op::Concat { .. } => {
            moved(op, types, dims, &vec![None; dims.len()], results)
        }
        Op::Gather { .. } | Op::GatherElements { .. } | Op::GatherNd { .. } => moved(op, types, dims, &[None, Some(b.tensor(args[1])?.clone())], results),
        Op::Pad { .. } => moved(op, types, dims, &[None, None], results),
        Op::Reduce { f, axes } if types[0].rank() == axes.len() => {
            let combine = |a: Dim, b: &Dim| match f {
                ReduceFn::Sum => a + b.clone(),
                ReduceFn::Prod => a * b.clone(),
                ReduceFn::Max => a.larger(b),
                ReduceFn::Min => a.smaller(b),
            };
            let first = dims[0].first()?.clone();
            Some(vec![dims[0][1..].iter().fold(first, combine)])
        }
        _ => None,
    }
}

/// Ops that only move elements: run the evaluator on positions, then look the elements up.
/// `fixed` operands are passed as they are.
fn moved(op: &Op, types: &[TensorType], dims: &[Vec<Dim>], fixed: &[Option<Tensor>], results: &[TensorType]) -> Option<Vec<Dim>> {
    let mut all: Vec<&Dim> = vec![];
    let mut operands = vec![];
    for ((ty, values), fixed) in types.iter().zip(dims).zip(fixed) {
        operands.push(match fixed {
            Some(t) => t.clone(),
            None => {
                let ids: Vec<i64> = (0..values.len()).map(|i| (all.len() + i) as i64).collect();
                all.extend(values);
                Tensor::from_i64(ty.const_shape()?, &ids)
            }
        });
    }
    let results: Vec<TensorType> = results.iter().map(|t| t.with_dtype(DType::I64)).collect();
    let out = op.eval(EvalArgs { tensors: &operands.iter().collect::<Vec<_>>(), bodies: &[], results: &results }).ok()?;
    out.first()?.to_i64().into_iter().map(|i| all.get(usize::try_from(i).ok()?).map(|d| (*d).clone())).collect()
}

fn scalar(f: ScalarFn, x: &[&Dim]) -> Option<Dim> {
    let truth = |v: bool| Some(Dim::from(i64::from(v)));
    let nonneg = |d: Dim| d.is_nonneg();
    let one = Dim::one;
    let (a, b) = (x[0].clone(), x.get(1).map_or(Dim::ZERO, |b| (*b).clone()));
    // `Some(true)` where a < b for every value of the symbols, `Some(false)` where never.
    let less = |a: &Dim, b: &Dim| {
        if nonneg(b.clone() - a.clone() - one()) {
            Some(true)
        } else if nonneg(a.clone() - b.clone()) {
            Some(false)
        } else {
            None
        }
    };
    let equal = |a: &Dim, b: &Dim| {
        if a == b {
            Some(true)
        } else if less(a, b) == Some(true) || less(b, a) == Some(true) {
            Some(false)
        } else {
            None
        }
    };
    match f {
        ScalarFn::Add => Some(a + b),
        ScalarFn::Sub => Some(a - b),
        ScalarFn::Mul => Some(a * b),
        ScalarFn::Neg => Some(-a),
        ScalarFn::Max => Some(a.larger(&b)),
        ScalarFn::Min => Some(a.smaller(&b)),
        // Truncating and flooring division agree on what is not negative.
        ScalarFn::Div if nonneg(a.clone()) && nonneg(b.clone() - one()) => Some(a.div(&b)),
        ScalarFn::Mod if nonneg(b.clone() - one()) => Some(a.modulo(&b)),
        ScalarFn::Abs if nonneg(a.clone()) => Some(a),
        ScalarFn::Select => match a.as_const()? {
            0 => Some(x[2].clone()),
            _ => Some(b),
        },
        ScalarFn::Lt => truth(less(&a, &b)?),
        ScalarFn::Gt => truth(less(&b, &a)?),
        ScalarFn::Ge => truth(!less(&a, &b)?),
        ScalarFn::Le => truth(!less(&b, &a)?),
        ScalarFn::Eq => truth(equal(&a, &b)?),
        ScalarFn::Ne => truth(!equal(&a, &b)?),
        ScalarFn::And => truth(a.as_const()? != 0 && b.as_const()? != 0),
        ScalarFn::Or => truth(a.as_const()? != 0 || b.as_const()? != 0),
        ScalarFn::Not => truth(a.as_const()? == 0),
        _ => None,
    }
}

/// The largest value of a size, where its symbols have bounds.
pub(crate) fn most(d: &Dim) -> Option<i64> {
    let mut sum = 0i64;
    for (atoms, c) in d.terms() {
        let mut product = *c;
        for atom in atoms {
            let Atom::Sym(s) = atom else { return None };
            if s.min < 0 {
                return None;
            }
            product = product.checked_mul(if *c > 0 { s.max? } else { s.min })?;
        }
        sum = sum.checked_add(product)?;
    }
    Some(sum)
}

/// The smaller of a size and a bound, knowing what symbols are at most.
pub(crate) fn capped(d: &Dim, bound: &Dim) -> Dim {
    match (most(d), bound.as_const()) {
        (Some(most), Some(bound)) if most <= bound => d.clone(),
        _ => d.smaller(bound),
    }
}

/// What makes two extents equal.
pub(crate) enum Relation {
    /// A symbol is another expression.
    Equal(String, Dim),
    /// A symbol is at most a number.
    AtMost(String, i64),
}

/// The symbol and number of `min(number, symbol)`.
fn capped_symbol(d: &Dim) -> Option<(Atom, i64)> {
    let [(atoms, 1)] = d.terms() else { return None };
    let [Atom::Min(a, b)] = atoms.as_slice() else { return None };
    let (number, symbol) = match (a.as_const(), b.as_const()) {
        (Some(n), None) => (n, b),
        (None, Some(n)) => (n, a),
        _ => return None,
    };
    match symbol.terms() {
        [(atoms, 1)] if atoms.len() == 1 => Some((atoms[0].clone(), number)),
        _ => None,
    }
}

/// A replacement of an input's symbol that makes two different extents equal: exporters name one size twice, and
/// models with several resolutions need inputs that are multiples of a power of two.
pub(crate) fn relate(b: &Builder, x: &Dim, y: &Dim) -> Option<Relation> {
    // `min(c, s)` is `s`: a table of c rows, cut to a length that is at most that.
    for (x, y) in [(x, y), (y, x)] {
        if let Some((Atom::Sym(s), number)) = capped_symbol(x)
            && *y == Dim::from(Atom::Sym(s.clone()))
            && b.input_symbols.contains(s.name.as_ref())
        {
            return Some(Relation::AtMost(s.name.to_string(), number));
        }
    }
    let gap = x.clone() - y.clone();
    let symbols: Vec<_> = gap.symbols().into_iter().filter(|s| b.input_symbols.contains(s.name.as_ref())).collect();
    // Linear: gap = c * s + rest.
    for s in symbols.iter().rev() {
        let atom = Atom::Sym(s.clone());
        let (mut coeff, mut rest) = (0, Dim::ZERO);
        let mut linear = true;
        for (atoms, c) in gap.terms() {
            let term = atoms.iter().fold(Dim::from(*c), |d, a| d * Dim::from(a.clone()));
            if atoms.as_slice() == [atom.clone()] {
                coeff = *c;
            } else if term.any_atom(&|a| *a == atom) {
                linear = false;
            } else {
                rest = rest + term;
            }
        }
        let only_inputs = rest.symbols().iter().all(|s| b.input_symbols.contains(s.name.as_ref()));
        let divides = coeff != 0 && rest.terms().iter().all(|(_, c)| c % coeff == 0);
        if linear && divides && only_inputs {
            let value = rest.terms().iter().fold(Dim::ZERO, |d, (atoms, c)| d + atoms.iter().fold(Dim::from(-c / coeff), |d, a| d * Dim::from(a.clone())));
            let positive = value.as_const().is_none_or(|v| v >= 1);
            if positive {
                return Some(Relation::Equal(s.name.to_string(), value));
            }
        }
    }
    for factor in [2i64, 4, 8, 16, 32, 64, 128] {
        for s in &symbols {
            let name = format!("{}_by{factor}", s.name);
            let scaled = Dim::from(factor) * Dim::sym(&name);
            let replace = |d: &Dim| {
                d.map_atoms(&|atom| match atom {
                    Atom::Sym(t) if t == s => scaled.clone(),
                    _ => Dim::from(atom.clone()),
                })
            };
            if replace(x) == replace(y) {
                return Some(Relation::Equal(s.name.to_string(), scaled));
            }
        }
    }
    None
}
