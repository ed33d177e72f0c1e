//! Integer expressions: extents of shapes and index maps into tensors are the same type.
//!
//! A [`Dim`] is kept in canonical form, a sum of monomials with integer coefficients over atoms, so that
//! equal expressions are equal values: `2*n + n` is `3*n`, whichever way it was built. Atoms are size
//! symbols, loop axes of a region, values of a region's expression pool (data-dependent indices), and
//! floor division, remainder, maximum and minimum of further expressions.
use std::{
    cmp::Ordering,
    collections::BTreeMap,
    fmt,
    hash::{Hash, Hasher},
    sync::Arc,
};

/// A named size, unknown until a session binds it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sym {
    /// The name in text.
    pub name: Arc<str>,
    /// Smallest value it takes: 1 for sizes of inputs, 0 for sizes that data decides.
    pub min: i64,
    /// Largest value it takes, when known.
    pub max: Option<i64>,
}

/// What a monomial is a product of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Atom {
    /// A size symbol.
    Sym(Sym),
    /// A loop axis of the enclosing region.
    Axis(u32),
    /// An integer value of the enclosing region's expression pool.
    Value(u32),
    /// Quotient rounded toward minus infinity.
    Div(Arc<Dim>, Arc<Dim>),
    /// Remainder with the sign of the divisor.
    Mod(Arc<Dim>, Arc<Dim>),
    /// The larger.
    Max(Arc<Dim>, Arc<Dim>),
    /// The smaller.
    Min(Arc<Dim>, Arc<Dim>),
}

/// A product of atoms and a coefficient.
type Monomial = (Vec<Atom>, i64);

/// A canonical integer expression. Monomials are sorted, coefficients never zero. Copies are cheap: constants hold no
/// memory, other sums share theirs.
#[derive(Clone)]
pub struct Dim(Sum);

#[derive(Clone)]
enum Sum {
    Zero,
    /// One monomial without atoms.
    Const([Monomial; 1]),
    /// Anything else.
    Of(Arc<Vec<Monomial>>),
}

impl Default for Dim {
    fn default() -> Self {
        Dim::ZERO
    }
}

impl PartialEq for Dim {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Sum::Of(a), Sum::Of(b)) => Arc::ptr_eq(a, b) || a == b,
            _ => self.as_const().is_some_and(|c| other.is(c)),
        }
    }
}

impl Eq for Dim {}

impl PartialOrd for Dim {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Dim {
    fn cmp(&self, other: &Self) -> Ordering {
        self.terms().cmp(other.terms())
    }
}

impl Hash for Dim {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.terms().hash(state);
    }
}

impl fmt::Debug for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Dim").field(&self.terms()).finish()
    }
}

impl Atom {
    /// Whether this, or an atom in it, satisfies `test`.
    fn any(&self, test: &dyn Fn(&Atom) -> bool) -> bool {
        test(self)
            || match self {
                Atom::Div(a, b) | Atom::Mod(a, b) | Atom::Max(a, b) | Atom::Min(a, b) => a.any_atom(test) || b.any_atom(test),
                Atom::Sym(_) | Atom::Axis(_) | Atom::Value(_) => false,
            }
    }
}

/// Values of atoms, for [`Dim::eval`] and [`Dim::substitute`].
pub trait Env {
    /// The value of an atom, if this environment defines it.
    fn value(&self, atom: &Atom) -> Option<i64>;
}

impl<F: Fn(&Atom) -> Option<i64>> Env for F {
    fn value(&self, atom: &Atom) -> Option<i64> {
        self(atom)
    }
}

/// Symbol values by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Binding(pub BTreeMap<Arc<str>, i64>);

impl Env for Binding {
    fn value(&self, atom: &Atom) -> Option<i64> {
        match atom {
            Atom::Sym(sym) => self.0.get(&sym.name).copied(),
            _ => None,
        }
    }
}

impl From<i64> for Dim {
    fn from(v: i64) -> Self {
        if v == 0 { Dim::ZERO } else { Dim(Sum::Const([(vec![], v)])) }
    }
}

impl From<usize> for Dim {
    fn from(v: usize) -> Self {
        Dim::from(v as i64)
    }
}

impl From<Atom> for Dim {
    fn from(atom: Atom) -> Self {
        Dim::canonical(vec![(vec![atom], 1)])
    }
}

impl Dim {
    /// The constant 0.
    pub const ZERO: Dim = Dim(Sum::Zero);

    /// The constant 1.
    pub fn one() -> Dim {
        Dim::from(1i64)
    }

    /// A size symbol of at least 1.
    pub fn sym(name: &str) -> Dim {
        Dim::from(Atom::Sym(Sym { name: name.into(), min: 1, max: None }))
    }

    /// Loop axis `k`.
    pub fn axis(k: usize) -> Dim {
        thread_local! {
            static AXES: [Dim; 8] = std::array::from_fn(|k| Dim::from(Atom::Axis(k as u32)));
        }
        AXES.with(|axes| axes.get(k).cloned()).unwrap_or_else(|| Dim::from(Atom::Axis(k as u32)))
    }

    /// The constant this is, if it is one.
    pub fn as_const(&self) -> Option<i64> {
        match &self.0 {
            Sum::Zero => Some(0),
            Sum::Const([(_, c)]) => Some(*c),
            Sum::Of(_) => None,
        }
    }

    /// Whether this is the constant `v`.
    pub fn is(&self, v: i64) -> bool {
        self.as_const() == Some(v)
    }

    /// The monomials: atoms and coefficient.
    pub fn terms(&self) -> &[(Vec<Atom>, i64)] {
        match &self.0 {
            Sum::Zero => &[],
            Sum::Const(one) => one,
            Sum::Of(terms) => terms,
        }
    }

    fn into_terms(self) -> Vec<Monomial> {
        match self.0 {
            Sum::Zero => vec![],
            Sum::Const(one) => one.into(),
            Sum::Of(terms) => Arc::unwrap_or_clone(terms),
        }
    }

    /// Terms that are in canonical form already.
    fn canonical(terms: Vec<Monomial>) -> Dim {
        match terms.as_slice() {
            [] => Dim::ZERO,
            [(atoms, c)] if atoms.is_empty() => Dim::from(*c),
            _ => Dim(Sum::Of(Arc::new(terms))),
        }
    }

    fn from_terms(mut terms: Vec<Monomial>) -> Dim {
        terms.sort_by(|a, b| a.0.cmp(&b.0));
        terms.dedup_by(|next, sum| {
            let same = next.0 == sum.0;
            if same {
                sum.1 = sum.1.wrapping_add(next.1);
            }
            same
        });
        terms.retain(|(_, c)| *c != 0);
        Dim::canonical(terms)
    }

    fn times(self, by: i64) -> Dim {
        let mut terms = self.into_terms();
        terms.iter_mut().for_each(|(_, c)| *c = c.wrapping_mul(by));
        terms.retain(|(_, c)| *c != 0);
        Dim::canonical(terms)
    }

    /// `floor(self / by)`, simplified with what is known of symbols alone.
    pub fn div(&self, by: &Dim) -> Dim {
        self.div_in(by, &[])
    }

    /// `self - by * floor(self / by)`, simplified with what is known of symbols alone.
    pub fn modulo(&self, by: &Dim) -> Dim {
        self.mod_in(by, &[])
    }

    /// `ceil(self / by)` for positive `by`.
    pub fn ceil_div(&self, by: &Dim) -> Dim {
        (self.clone() + by.clone() - Dim::one()).div(by)
    }

    /// [`Dim::div`] where axis `k` is known to lie in `0..axes[k]`.
    pub fn div_in(&self, by: &Dim, axes: &[Dim]) -> Dim {
        let (quotient, rest) = self.split(by);
        if rest == Dim::ZERO || rest.within(by, axes) {
            return quotient;
        }
        if let (Some(a), Some(b)) = (rest.as_const(), by.as_const())
            && b != 0
        {
            return quotient + Dim::from(floor_div(a, b));
        }
        // Nested constants: floor(floor(x / a) / b) = floor(x / (a * b)).
        if quotient == Dim::ZERO
            && let [(atoms, 1)] = rest.terms()
            && let [Atom::Div(x, a)] = atoms.as_slice()
            && let (Some(ca), Some(cb)) = (a.as_const(), by.as_const())
            && ca > 0
            && cb > 0
            && let Some(both) = ca.checked_mul(cb)
        {
            return x.div_in(&Dim::from(both), axes);
        }
        quotient + Dim::from(Atom::Div(Arc::new(rest), Arc::new(by.clone())))
    }

    /// [`Dim::modulo`] where axis `k` is known to lie in `0..axes[k]`.
    pub fn mod_in(&self, by: &Dim, axes: &[Dim]) -> Dim {
        let (_, rest) = self.split(by);
        if rest == Dim::ZERO || rest.within(by, axes) {
            return rest;
        }
        if let (Some(a), Some(b)) = (rest.as_const(), by.as_const())
            && b != 0
        {
            return Dim::from(floor_mod(a, b));
        }
        Dim::from(Atom::Mod(Arc::new(rest), Arc::new(by.clone())))
    }

    /// `self = quotient * by + rest`, taking out every term that `by` divides.
    fn split(&self, by: &Dim) -> (Dim, Dim) {
        if by.is(1) {
            return (self.clone(), Dim::ZERO);
        }
        let [(factor, coeff)] = by.terms() else {
            return if self == by { (Dim::one(), Dim::ZERO) } else { (Dim::ZERO, self.clone()) };
        };
        if let (Some(c), true) = (self.as_const(), factor.is_empty() && *coeff > 0) {
            return (Dim::from(floor_div(c, *coeff)), Dim::from(floor_mod(c, *coeff)));
        }
        let (mut quotient, mut rest) = (vec![], vec![]);
        for (atoms, c) in self.terms() {
            match remove_all(atoms, factor) {
                Some(left) if c.wrapping_rem(*coeff) == 0 => quotient.push((left, c.wrapping_div(*coeff))),
                // A constant splits into the part that divides and a non-negative remainder.
                _ if atoms.is_empty() && factor.is_empty() && *coeff > 0 => {
                    let q = floor_div(*c, *coeff);
                    quotient.push((vec![], q));
                    rest.push((vec![], floor_mod(*c, *coeff)));
                }
                _ => rest.push((atoms.clone(), *c)),
            }
        }
        (Dim::from_terms(quotient), Dim::from_terms(rest))
    }

    /// Whether `0 <= self < by` is certain, axis `k` lying in `0..axes[k]`.
    pub fn within(&self, by: &Dim, axes: &[Dim]) -> bool {
        let Some(low) = self.bound(axes, Ordering::Less) else { return false };
        let Some(high) = self.bound(axes, Ordering::Greater) else { return false };
        low.is_nonneg() && (by.clone() - Dim::one() - high).is_nonneg()
    }

    /// A lower (`Less`) or upper (`Greater`) bound free of axes; `None` where products or data hide it.
    pub fn bound(&self, axes: &[Dim], side: Ordering) -> Option<Dim> {
        let mut out = Dim::ZERO;
        for (atoms, c) in self.terms() {
            let upper = (*c > 0) == (side == Ordering::Greater);
            let mut product = Dim::from(*c);
            for atom in atoms {
                let factor = match atom {
                    Atom::Axis(k) => {
                        let extent = axes.get(*k as usize)?;
                        if upper { extent.clone() - Dim::one() } else { Dim::ZERO }
                    }
                    Atom::Mod(_, by) => {
                        if upper {
                            by.bound(axes, Ordering::Greater)? - Dim::one()
                        } else {
                            Dim::ZERO
                        }
                    }
                    Atom::Div(x, by) if by.as_const().is_some_and(|b| b > 0) => {
                        let x = x.bound(axes, if upper { Ordering::Greater } else { Ordering::Less })?;
                        if !upper && !x.is_nonneg() {
                            return None;
                        }
                        x.div(by)
                    }
                    Atom::Value(_) => return None,
                    Atom::Div(..) | Atom::Max(..) | Atom::Min(..) if self.has_axes() => return None,
                    other => Dim::from(other.clone()),
                };
                if atoms.len() > 1 && !factor.is_nonneg() {
                    return None;
                }
                product = product * factor;
            }
            out = out + product;
        }
        Some(out)
    }

    /// Whether no value of the symbols within their bounds makes this negative (false when unsure).
    pub fn is_nonneg(&self) -> bool {
        if !self.terms().iter().any(|(atoms, _)| atoms.iter().any(|a| matches!(a, Atom::Sym(_)))) {
            return self.terms().iter().all(|(atoms, c)| *c >= 0 && atoms.iter().all(atom_nonneg));
        }
        // Shift every symbol by its minimum: then all-positive coefficients prove it. What stands inside
        // quotients and the like keeps its form, or this would redo all simplification at every level.
        let mut shifted = Dim::ZERO;
        for (atoms, c) in self.terms() {
            let factor = |atom: &Atom| match atom {
                Atom::Sym(s) => Dim::from(atom.clone()) + Dim::from(s.min),
                _ => Dim::from(atom.clone()),
            };
            shifted = shifted + atoms.iter().fold(Dim::from(*c), |product, atom| product * factor(atom));
        }
        shifted.terms().iter().all(|(atoms, c)| *c >= 0 && atoms.iter().all(shifted_nonneg))
    }

    fn has_axes(&self) -> bool {
        self.any_atom(&|a| matches!(a, Atom::Axis(_)))
    }

    /// Whether any atom, nested ones included, satisfies `test`.
    pub fn any_atom(&self, test: &dyn Fn(&Atom) -> bool) -> bool {
        self.terms().iter().flat_map(|(atoms, _)| atoms).any(|atom| atom.any(test))
    }

    /// Every symbol, each once, in name order.
    pub fn symbols(&self) -> Vec<Sym> {
        let mut found = std::collections::BTreeSet::new();
        self.collect_symbols(&mut found);
        found.into_iter().collect()
    }

    fn collect_symbols(&self, found: &mut std::collections::BTreeSet<Sym>) {
        for atom in self.terms().iter().flat_map(|(atoms, _)| atoms) {
            match atom {
                Atom::Sym(s) => {
                    found.insert(s.clone());
                }
                Atom::Div(a, b) | Atom::Mod(a, b) | Atom::Max(a, b) | Atom::Min(a, b) => {
                    a.collect_symbols(found);
                    b.collect_symbols(found);
                }
                Atom::Axis(_) | Atom::Value(_) => {}
            }
        }
    }

    /// The larger of the two.
    pub fn larger(&self, other: &Dim) -> Dim {
        if (self.clone() - other.clone()).is_nonneg() {
            return self.clone();
        }
        if (other.clone() - self.clone()).is_nonneg() {
            return other.clone();
        }
        let (a, b) = if self <= other { (self, other) } else { (other, self) };
        Dim::from(Atom::Max(Arc::new(a.clone()), Arc::new(b.clone())))
    }

    /// The smaller of the two.
    pub fn smaller(&self, other: &Dim) -> Dim {
        if (self.clone() - other.clone()).is_nonneg() {
            return other.clone();
        }
        if (other.clone() - self.clone()).is_nonneg() {
            return self.clone();
        }
        let (a, b) = if self <= other { (self, other) } else { (other, self) };
        Dim::from(Atom::Min(Arc::new(a.clone()), Arc::new(b.clone())))
    }

    /// The value, once `env` defines every atom; `None` if it does not, on overflow, or on division by 0.
    pub fn eval(&self, env: &dyn Env) -> Option<i64> {
        let mut sum = 0i64;
        for (atoms, c) in self.terms() {
            let mut product = *c;
            for atom in atoms {
                let value = match env.value(atom) {
                    Some(v) => v,
                    None => match atom {
                        Atom::Div(a, b) => {
                            let (a, b) = (a.eval(env)?, b.eval(env)?);
                            if b == 0 {
                                return None;
                            }
                            floor_div(a, b)
                        }
                        Atom::Mod(a, b) => {
                            let (a, b) = (a.eval(env)?, b.eval(env)?);
                            if b == 0 {
                                return None;
                            }
                            floor_mod(a, b)
                        }
                        Atom::Max(a, b) => a.eval(env)?.max(b.eval(env)?),
                        Atom::Min(a, b) => a.eval(env)?.min(b.eval(env)?),
                        Atom::Sym(_) | Atom::Axis(_) | Atom::Value(_) => return None,
                    },
                };
                product = product.checked_mul(value)?;
            }
            sum = sum.checked_add(product)?;
        }
        Some(sum)
    }

    /// Replace atoms that `env` defines by their values.
    pub fn bind(&self, env: &dyn Env) -> Dim {
        self.map_atoms(&|atom| match env.value(atom) {
            Some(v) => Dim::from(v),
            None => Dim::from(atom.clone()),
        })
    }

    /// Replace every leaf atom (symbol, axis, value) by an expression, re-simplifying.
    pub fn map_atoms(&self, f: &dyn Fn(&Atom) -> Dim) -> Dim {
        self.map_atoms_in(f, &[])
    }

    /// [`Dim::map_atoms`] simplifying with the extents of the *resulting* axes.
    pub fn map_atoms_in(&self, f: &dyn Fn(&Atom) -> Dim, axes: &[Dim]) -> Dim {
        let mut out = Dim::ZERO;
        for (atoms, c) in self.terms() {
            let mut product = Dim::from(*c);
            for atom in atoms {
                let value = match atom {
                    Atom::Div(a, b) => a.map_atoms_in(f, axes).div_in(&b.map_atoms_in(f, axes), axes),
                    Atom::Mod(a, b) => a.map_atoms_in(f, axes).mod_in(&b.map_atoms_in(f, axes), axes),
                    Atom::Max(a, b) => a.map_atoms_in(f, axes).larger(&b.map_atoms_in(f, axes)),
                    Atom::Min(a, b) => a.map_atoms_in(f, axes).smaller(&b.map_atoms_in(f, axes)),
                    leaf => f(leaf),
                };
                product = product * value;
            }
            out = out + product;
        }
        out
    }

    /// Put split coordinates together again: `c*k*div(x,c) + k*mod(x,c)` is `k*x`.
    pub fn recombine(&self) -> Dim {
        for (atoms, k) in self.terms() {
            for (at, atom) in atoms.iter().enumerate() {
                let Atom::Mod(x, by) = atom else { continue };
                let mut others = atoms.clone();
                others.remove(at);
                let rest = Dim::canonical(vec![(others, *k)]);
                let high = rest.clone() * (**by).clone() * Dim::from(Atom::Div(x.clone(), by.clone()));
                // The quotient may have been simplified further (a quotient of a quotient).
                let simpler = rest.clone() * (**by).clone() * x.div(by);
                for high in [high, simpler] {
                    if high.terms().iter().all(|(a, c)| self.terms().iter().any(|(b, d)| a == b && c == d)) {
                        let low = Dim::canonical(vec![(atoms.clone(), *k)]);
                        return (self.clone() - low - high + rest * (**x).clone()).recombine();
                    }
                }
            }
        }
        self.clone()
    }

    /// The coefficient of axis `k`, when this is affine in it with a constant factor, and what is left.
    pub fn affine_in(&self, k: usize) -> Option<(i64, Dim)> {
        let axis = Atom::Axis(k as u32);
        let (mut coeff, mut rest) = (0, vec![]);
        for (atoms, c) in self.terms() {
            if atoms.as_slice() == std::slice::from_ref(&axis) {
                coeff = *c;
            } else if atoms.iter().any(|a| a.any(&|a| *a == axis)) {
                return None;
            } else {
                rest.push((atoms.clone(), *c));
            }
        }
        Some((coeff, Dim::canonical(rest)))
    }
}

fn floor_div(a: i64, b: i64) -> i64 {
    let q = a.wrapping_div(b);
    if (a.wrapping_rem(b) != 0) && ((a < 0) != (b < 0)) { q - 1 } else { q }
}

fn floor_mod(a: i64, b: i64) -> i64 {
    a.wrapping_sub(b.wrapping_mul(floor_div(a, b)))
}

fn remove_all(from: &[Atom], what: &[Atom]) -> Option<Vec<Atom>> {
    let mut left = from.to_vec();
    for atom in what {
        let at = left.iter().position(|a| a == atom)?;
        left.remove(at);
    }
    Some(left)
}

/// [`atom_nonneg`] where a symbol stands for what exceeds its minimum.
fn shifted_nonneg(atom: &Atom) -> bool {
    matches!(atom, Atom::Sym(_)) || atom_nonneg(atom)
}

fn atom_nonneg(atom: &Atom) -> bool {
    match atom {
        Atom::Sym(s) => s.min >= 0,
        Atom::Axis(_) => true,
        Atom::Value(_) => false,
        Atom::Div(a, b) => a.is_nonneg() && b.is_nonneg(),
        Atom::Mod(_, b) => b.is_nonneg(),
        Atom::Max(a, b) => a.is_nonneg() || b.is_nonneg(),
        Atom::Min(a, b) => a.is_nonneg() && b.is_nonneg(),
    }
}

impl std::ops::Add for Dim {
    type Output = Dim;
    fn add(self, other: Dim) -> Dim {
        match (&self.0, &other.0) {
            (_, Sum::Zero) => self,
            (Sum::Zero, _) => other,
            (Sum::Const([(_, a)]), Sum::Const([(_, b)])) => Dim::from(a.wrapping_add(*b)),
            _ => {
                let mut terms = self.into_terms();
                terms.extend(other.into_terms());
                Dim::from_terms(terms)
            }
        }
    }
}

impl std::ops::Neg for Dim {
    type Output = Dim;
    fn neg(self) -> Dim {
        if let Some(c) = self.as_const() {
            return Dim::from(c.wrapping_neg());
        }
        Dim::canonical(self.into_terms().into_iter().map(|(a, c)| (a, c.wrapping_neg())).collect())
    }
}

impl std::ops::Sub for Dim {
    type Output = Dim;
    fn sub(self, other: Dim) -> Dim {
        self + -other
    }
}

impl std::ops::Mul for Dim {
    type Output = Dim;
    fn mul(self, other: Dim) -> Dim {
        match (self.as_const(), other.as_const()) {
            (Some(0), _) | (_, Some(0)) => return Dim::ZERO,
            (Some(1), _) => return other,
            (_, Some(1)) => return self,
            (Some(a), Some(b)) => return Dim::from(a.wrapping_mul(b)),
            (Some(c), None) => return other.times(c),
            (None, Some(c)) => return self.times(c),
            (None, None) => {}
        }
        let mut terms = vec![];
        for (a, x) in self.terms() {
            for (b, y) in other.terms() {
                let mut atoms: Vec<Atom> = a.iter().chain(b).cloned().collect();
                atoms.sort();
                terms.push((atoms, x.wrapping_mul(*y)));
            }
        }
        Dim::from_terms(terms)
    }
}

impl std::iter::Product for Dim {
    fn product<I: Iterator<Item = Dim>>(iter: I) -> Dim {
        iter.fold(Dim::one(), |a, b| a * b)
    }
}

impl std::iter::Sum for Dim {
    fn sum<I: Iterator<Item = Dim>>(iter: I) -> Dim {
        iter.fold(Dim::ZERO, |a, b| a + b)
    }
}

impl fmt::Display for Atom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Atom::Sym(s) => f.write_str(&s.name),
            Atom::Axis(k) => write!(f, "a{k}"),
            Atom::Value(v) => write!(f, "v{v}"),
            Atom::Div(a, b) => write!(f, "div({a},{b})"),
            Atom::Mod(a, b) => write!(f, "mod({a},{b})"),
            Atom::Max(a, b) => write!(f, "max({a},{b})"),
            Atom::Min(a, b) => write!(f, "min({a},{b})"),
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.terms().is_empty() {
            return f.write_str("0");
        }
        // Constants last reads best: `2*n+1`.
        let order = self.terms().iter().filter(|(a, _)| !a.is_empty()).chain(self.terms().iter().filter(|(a, _)| a.is_empty()));
        for (i, (atoms, c)) in order.enumerate() {
            if i > 0 && *c >= 0 {
                f.write_str("+")?;
            }
            match (atoms.as_slice(), *c) {
                ([], c) => write!(f, "{c}")?,
                (_, 1) => {}
                (_, -1) => f.write_str("-")?,
                (_, c) => write!(f, "{c}*")?,
            }
            for (j, atom) in atoms.iter().enumerate() {
                if j > 0 {
                    f.write_str("*")?;
                }
                write!(f, "{atom}")?;
            }
        }
        Ok(())
    }
}

/// Deepest nesting of `div`, `mod`, `max`, `min` and parentheses that the parser follows.
const MAX_DEPTH: usize = 64;

/// Parse what `Display` prints. `symbol` gives the symbol of a name (its bounds are declared elsewhere).
pub fn parse_dim(text: &str, symbol: &dyn Fn(&str) -> Option<Sym>) -> Result<Dim, String> {
    let mut p = Parser { rest: text.trim(), symbol, depth: 0 };
    let dim = p.sum()?;
    if p.rest.trim().is_empty() { Ok(dim) } else { Err(format!("unexpected `{}` in size `{text}`", p.rest.trim())) }
}

struct Parser<'a> {
    rest: &'a str,
    symbol: &'a dyn Fn(&str) -> Option<Sym>,
    depth: usize,
}

impl Parser<'_> {
    fn eat(&mut self, c: char) -> bool {
        self.rest = self.rest.trim_start();
        match self.rest.strip_prefix(c) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn sum(&mut self) -> Result<Dim, String> {
        let mut out = if self.eat('-') { -self.product()? } else { self.product()? };
        loop {
            if self.eat('+') {
                out = out + self.product()?;
            } else if self.eat('-') {
                out = out - self.product()?;
            } else {
                return Ok(out);
            }
        }
    }

    fn product(&mut self) -> Result<Dim, String> {
        let mut out = self.atom()?;
        while self.eat('*') {
            out = out * self.atom()?;
        }
        Ok(out)
    }

    fn atom(&mut self) -> Result<Dim, String> {
        self.rest = self.rest.trim_start();
        let end = self.rest.find(|c: char| !(c.is_alphanumeric() || "_.:#".contains(c))).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        if word.is_empty() {
            return Err(format!("expected a number or name at `{}`", self.rest));
        }
        self.rest = rest;
        if word.starts_with(|c: char| c.is_ascii_digit()) {
            return word.parse::<i64>().map(Dim::from).map_err(|_| format!("`{word}` is not a 64-bit integer"));
        }
        if matches!(word, "div" | "mod" | "max" | "min") && self.eat('(') {
            self.depth += 1;
            if self.depth > MAX_DEPTH {
                return Err("size nests too deeply".into());
            }
            let a = self.sum()?;
            let comma = self.eat(',');
            let b = self.sum()?;
            if !comma || !self.eat(')') {
                return Err(format!("expected `{word}(a,b)`"));
            }
            self.depth -= 1;
            if matches!(word, "div" | "mod") && b.is(0) {
                return Err("division by zero in a size".into());
            }
            return Ok(match word {
                "div" => a.div(&b),
                "mod" => a.modulo(&b),
                "max" => a.larger(&b),
                _ => a.smaller(&b),
            });
        }
        let indexed = |prefix: char| word.strip_prefix(prefix).and_then(|n| n.parse::<u32>().ok());
        match (self.symbol)(word) {
            Some(sym) => Ok(Dim::from(Atom::Sym(sym))),
            None => match (indexed('a'), indexed('v')) {
                (Some(k), _) => Ok(Dim::from(Atom::Axis(k))),
                (_, Some(v)) => Ok(Dim::from(Atom::Value(v))),
                _ => Err(format!("unknown size `{word}`")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_expressions_are_equal_values() {
        let (n, m) = (Dim::sym("n"), Dim::sym("m"));
        assert_eq!((n.clone() + m.clone()) * Dim::from(2i64) - m.clone(), Dim::from(2i64) * n.clone() + m.clone());
        assert_eq!((n.clone() - n.clone()), Dim::ZERO);
    }

    #[test]
    fn reshapes_of_reshapes_leave_no_division() {
        // Linear index of (h, w) in [.., H, W] split again into (h, w).
        let (h, w, big_w) = (Dim::axis(0), Dim::axis(1), Dim::sym("W"));
        let axes = [Dim::sym("H"), big_w.clone()];
        let linear = h.clone() * big_w.clone() + w.clone();
        assert_eq!(linear.div_in(&big_w, &axes), h);
        assert_eq!(linear.mod_in(&big_w, &axes), w);
        let axes = [Dim::from(6i64), Dim::from(8i64)];
        let linear = h.clone() * Dim::from(8i64) + w.clone();
        assert_eq!(linear.div_in(&Dim::from(8i64), &axes), h);
        assert_eq!(linear.div_in(&Dim::from(16i64), &axes).to_string(), "div(8*a0+a1,16)");
    }

    #[test]
    fn split_coordinates_recombine() {
        let x = Dim::axis(2);
        let (c, d) = (Dim::from(64i64), Dim::from(4i64));
        let linear = Dim::axis(0) * Dim::from(100i64) + x.div(&c).div(&d) * Dim::from(256i64) + x.div(&c).modulo(&d) * c.clone() + x.modulo(&c);
        assert_eq!(linear.recombine(), Dim::axis(0) * Dim::from(100i64) + x);
    }

    #[test]
    fn text_parses_back() {
        let (n, m) = (Dim::sym("n"), Dim::sym("m"));
        let x = (Dim::from(3i64) * n.clone() * m.clone() - Dim::from(1i64)).div(&Dim::from(2i64)) + n.larger(&m);
        let table = |name: &str| Some(Sym { name: name.into(), min: 1, max: None });
        assert_eq!(parse_dim(&x.to_string(), &table).unwrap(), x);
    }

    #[test]
    fn evaluation_agrees_with_simplification() {
        let env = |a: &Atom| match a {
            Atom::Axis(0) => Some(5),
            Atom::Axis(1) => Some(7),
            _ => None,
        };
        let axes = [Dim::from(6i64), Dim::from(8i64)];
        for by in 1..20i64 {
            let x = Dim::from(8i64) * Dim::axis(0) + Dim::axis(1);
            assert_eq!(x.div_in(&Dim::from(by), &axes).eval(&env), Some(47 / by));
            assert_eq!(x.mod_in(&Dim::from(by), &axes).eval(&env), Some(47 % by));
        }
    }
}
