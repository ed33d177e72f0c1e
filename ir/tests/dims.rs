//! Size expressions mean what they say: canonical forms agree with evaluating the text as written.
mod common;
use common::Rng;
use pavage_ir::{Binding, Dim, Sym, dim::parse_dim};

/// An expression as written, and its value.
fn expression(rng: &mut Rng, depth: usize, values: &[(&str, i128)], constants: &[i64]) -> (String, Option<i128>) {
    if depth == 0 || rng.below(4) == 0 {
        if rng.below(2) == 0 {
            let c = rng.pick(constants);
            return (c.to_string(), Some(c.into()));
        }
        let (name, value) = rng.pick(values);
        return (name.into(), Some(value));
    }
    let (a, x) = expression(rng, depth - 1, values, constants);
    let (b, y) = expression(rng, depth - 1, values, constants);
    let floor = |x: i128, y: i128| (y != 0).then(|| x.div_euclid(y) - i128::from(y < 0 && x.rem_euclid(y) != 0));
    let both = x.zip(y);
    match rng.below(7) {
        0 => (format!("{a}+{b}"), both.map(|(x, y)| x + y)),
        1 => (format!("max({a},{b})"), both.map(|(x, y)| x.max(y))),
        2 => (format!("min({a},{b})"), both.map(|(x, y)| x.min(y))),
        3 => (format!("div({a},{b})"), both.and_then(|(x, y)| floor(x, y))),
        4 => (format!("mod({a},{b})"), both.and_then(|(x, y)| Some(x - y * floor(x, y)?))),
        5 => (format!("3*max({a},0)"), x.map(|x| 3 * x.max(0))),
        _ => (format!("max({a},1)*min({b},7)"), both.map(|(x, y)| x.max(1) * y.min(7))),
    }
}

fn symbol(name: &str) -> Option<Sym> {
    Some(Sym { name: name.into(), min: if name == "z" { 0 } else { 1 }, max: None })
}

#[test]
fn canonical_forms_keep_their_value() {
    let mut rng = Rng(5);
    let mut checked = 0;
    for _ in 0..100_000 {
        let values = [("n", rng.range(1, 9)), ("m", rng.range(1, 9)), ("z", rng.range(0, 3))];
        let wide: Vec<(&str, i128)> = values.iter().map(|(k, v)| (*k, i128::from(*v))).collect();
        let depth = rng.below(4);
        let (text, expected) = expression(&mut rng, depth, &wide, &[0, 1, 2, 3, 5, 8]);
        let Ok(dim) = parse_dim(&text, &symbol) else { continue };
        let binding = Binding(values.iter().map(|(k, v)| ((*k).into(), *v)).collect());
        let Some(expected) = expected else { continue };
        assert_eq!(dim.eval(&binding).map(i128::from), Some(expected), "{text} = {dim} with {values:?}");
        assert_eq!(dim.bind(&binding), Dim::from(expected as i64), "{text} = {dim} bound with {values:?}");
        assert_eq!(parse_dim(&dim.to_string(), &symbol).as_ref(), Ok(&dim), "{text}");
        checked += 1;
    }
    assert!(checked > 50_000, "only {checked} expressions were defined");
}

#[test]
fn huge_constants_do_not_panic() {
    let mut rng = Rng(6);
    for _ in 0..100_000 {
        let constants = [i64::MAX, i64::MAX - 1, 1 << 62, 1 << 32, 3, 1, 0];
        let depth = rng.below(5);
        let (text, _) = expression(&mut rng, depth, &[("n", 0), ("m", 0)], &constants);
        let minus = if rng.below(2) == 0 { "-" } else { "" };
        if let Ok(dim) = parse_dim(&format!("{minus}{text}"), &symbol) {
            let binding = Binding([("n".into(), i64::MAX), ("m".into(), 1)].into());
            let _ = (dim.bind(&binding), dim.eval(&binding), dim.is_nonneg(), -dim.clone() * dim);
        }
    }
}
