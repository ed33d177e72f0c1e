//! No rule is trusted: both sides of every text rule are evaluated, over all small shapes and dtypes that type-check.
//!
//! `=>` must give equal bits (any NaN equals any NaN) on values that include NaN, infinities, -0, the ends of the
//! range and, for integers, what overflows. `~>` applies to floats alone and is held to eight units in the last
//! place on moderate values; to the same results on 0, -0, 1, -1, infinities and NaN; and on values from the whole
//! range wherever no step of the left side leaves it, so that no right side overflows or vanishes on its own account.
use pavage_ir::{
    DType, Op, Scalar, Tensor, TensorType,
    dtype::Class,
    op::{EvalArgs, TypeArgs},
};
use pavage_passes::rules::{self, Promise, Rule, computed, promises};
use std::collections::BTreeMap;

const DTYPES: [DType; 6] = [DType::F32, DType::F16, DType::I32, DType::I64, DType::Bool, DType::U8];
const SHAPES: [&[usize]; 6] = [&[], &[3], &[1, 3], &[2, 2], &[2, 3], &[2, 1, 3]];
/// Elements that each rule sees at each choice of types.
const ELEMENTS: usize = 4096;

/// One side of a rule.
enum Side {
    Var(String),
    Op(Op, Vec<Side>),
}

impl Side {
    /// Read what a pattern prints: `(add ?x (neg ?y))`.
    fn parse(text: &str) -> Side {
        let spaced = text.replace('(', " ( ").replace(')', " ) ");
        let mut words = spaced.split_whitespace().peekable();
        let side = Side::words(&mut words);
        assert_eq!(words.next(), None, "{text}");
        side
    }

    fn words<'a>(words: &mut std::iter::Peekable<impl Iterator<Item = &'a str>>) -> Side {
        match words.next() {
            Some("(") => {
                let op = Op::parse(words.next().unwrap(), &|_| None).unwrap();
                let mut args = vec![];
                while words.peek() != Some(&")") {
                    args.push(Side::words(words));
                }
                words.next();
                Side::Op(op, args)
            }
            Some(var) if var.starts_with('?') => Side::Var(var.into()),
            Some(op) => Side::Op(Op::parse(op, &|_| None).unwrap(), vec![]),
            None => panic!("the pattern ends early"),
        }
    }

    fn vars(&self, into: &mut Vec<String>) {
        match self {
            Side::Var(v) if into.contains(v) => {}
            Side::Var(v) => into.push(v.clone()),
            Side::Op(_, args) => args.iter().for_each(|a| a.vars(into)),
        }
    }

    /// The type of this side; `None` where it is ill typed.
    fn ty(&self, vars: &BTreeMap<String, TensorType>) -> Option<TensorType> {
        match self {
            Side::Var(v) => Some(vars[v].clone()),
            Side::Op(op, args) => {
                let types = args.iter().map(|a| a.ty(vars)).collect::<Option<Vec<_>>>()?;
                let types: Vec<&TensorType> = types.iter().collect();
                op.infer(TypeArgs { types: &types, bodies: &[] }).ok().map(|mut t| t.remove(0))
            }
        }
    }

    /// The value of this side; each value on the way is shown to `step`.
    fn eval(&self, vars: &BTreeMap<String, Tensor>, step: &mut dyn FnMut(&Tensor)) -> Tensor {
        match self {
            Side::Var(v) => vars[v].clone(),
            Side::Op(op, args) => {
                let args: Vec<Tensor> = args.iter().map(|a| a.eval(vars, step)).collect();
                let types: Vec<TensorType> = args.iter().map(Tensor::ty).collect();
                let types: Vec<&TensorType> = types.iter().collect();
                let results = op.infer(TypeArgs { types: &types, bodies: &[] }).unwrap();
                let tensors: Vec<&Tensor> = args.iter().collect();
                let value = op.eval(EvalArgs { tensors: &tensors, bodies: &[], results: &results }).unwrap().remove(0);
                step(&value);
                value
            }
        }
    }
}

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
    /// In 0..1.
    fn unit(&mut self) -> f64 {
        self.next() as f64 / (1u64 << 48) as f64
    }
    fn sign(&mut self) -> f64 {
        if self.next() & 1 == 0 { 1.0 } else { -1.0 }
    }
}

/// Smallest normal and largest finite value.
fn range(dtype: DType) -> (f64, f64) {
    if dtype == DType::F16 { (2f64.powi(-14), 65504.0) } else { (f64::from(f32::MIN_POSITIVE), f64::from(f32::MAX)) }
}

/// What data is drawn from.
#[derive(Clone, Copy, PartialEq)]
enum Draw {
    /// Everything: specials, ends of the range, and numbers between.
    Any,
    /// 0, -0, 1, -1, infinities, NaN.
    Special,
    /// Magnitudes of 1/4 to 4.
    Moderate,
    /// Magnitudes over the whole normal range.
    Wide,
}

fn draw(dtype: DType, from: Draw, random: &mut Random) -> Scalar {
    let special = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0, 1.0, -1.0];
    match dtype.class() {
        Class::Bool => Scalar::B(random.next() & 1 == 1),
        Class::Float => {
            let (least, most) = range(dtype);
            Scalar::F(match from {
                Draw::Special => special[random.below(special.len())],
                Draw::Moderate => random.sign() * 4f64.powf(2.0 * random.unit() - 1.0),
                Draw::Wide => random.sign() * least * (most / least).powf(random.unit()),
                Draw::Any => match random.below(4) {
                    0 => special[random.below(special.len())],
                    1 => random.sign() * [least, most, least / 8.0, 0.5, 2.5, 3.0][random.below(6)],
                    2 => random.sign() * random.below(5) as f64,
                    _ => random.sign() * least * (most / least).powf(random.unit()),
                },
            })
        }
        _ => {
            let (lo, hi) = dtype.int_range();
            Scalar::I(match random.below(3) {
                0 => [lo, lo + 1, hi, hi - 1, 0, 1][random.below(6)],
                1 => random.below(9) as i128 - 4,
                _ => (i128::from(random.next()) << 32 | i128::from(random.next())).rem_euclid(hi - lo + 1) + lo,
            })
        }
    }
}

/// Whether both hold the same bits, any NaN being equal to any NaN.
fn same(a: &Tensor, b: &Tensor) -> bool {
    let nan = |v: Scalar| matches!(v, Scalar::F(v) if v.is_nan());
    let bits = |v: Scalar| match v {
        Scalar::F(v) => i128::from(v.to_bits()),
        v => v.i(),
    };
    (0..a.count()).all(|i| (nan(a.get(i)) && nan(b.get(i))) || bits(a.get(i)) == bits(b.get(i)))
}

/// Whether floats are equal but for some rounding: NaN equals NaN, 0 equals -0.
fn near(a: &Tensor, b: &Tensor) -> bool {
    let ulp = if a.dtype() == DType::F16 { 2f64.powi(-10) } else { 2f64.powi(-23) };
    a.to_f64().iter().zip(b.to_f64()).all(|(&x, y)| x == y || (x.is_nan() && y.is_nan()) || (x - y).abs() <= 8.0 * ulp * x.abs().max(y.abs()))
}

/// How many choices of types the rule holds for; or where it does not.
fn check(rule: &Rule) -> Result<usize, String> {
    let (lhs, rhs) = (Side::parse(&rule.lhs.to_string()), Side::parse(&rule.rhs.to_string()));
    let mut vars = vec![];
    lhs.vars(&mut vars);
    let choices: Vec<TensorType> = DTYPES.iter().flat_map(|d| SHAPES.iter().map(|s| TensorType::new(*d, s.iter().copied()))).collect();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut held = 0;
    for n in 0..choices.len().pow(vars.len() as u32) {
        let pick = |i: usize| choices[n / choices.len().pow(i as u32) % choices.len()].clone();
        let types: BTreeMap<String, TensorType> = vars.iter().enumerate().map(|(i, v)| (v.clone(), pick(i))).collect();
        // Where one side is ill typed the rule does not apply; no more does `~>` to anything but floats.
        let (Some(left), Some(right)) = (lhs.ty(&types), rhs.ty(&types)) else { continue };
        let real = rule.promise == Promise::Real;
        if real && !left.dtype.is_float() {
            continue;
        }
        if left != right {
            return Err(format!("`{}` equates {left} and {right} for {types:?}", rule.name));
        }
        held += 1;
        let draws: &[Draw] = if real { &[Draw::Special, Draw::Moderate, Draw::Wide] } else { &[Draw::Any] };
        for &from in draws {
            one_choice(rule, &lhs, &rhs, &types, from, &mut random)?;
        }
    }
    if held == 0 { Err(format!("`{}` never type-checks", rule.name)) } else { Ok(held) }
}

fn one_choice(rule: &Rule, lhs: &Side, rhs: &Side, types: &BTreeMap<String, TensorType>, from: Draw, random: &mut Random) -> Result<(), String> {
    let shapes: BTreeMap<&String, Vec<usize>> = types.iter().map(|(v, t)| (v, t.const_shape().unwrap())).collect();
    let elements = shapes.values().map(|s| s.iter().product::<usize>()).max().unwrap_or(1);
    for _ in 0..ELEMENTS.div_ceil(elements) {
        let mut values = BTreeMap::new();
        for (v, shape) in &shapes {
            let dtype = types[*v].dtype;
            let n = shape.iter().product();
            values.insert((*v).clone(), Tensor::from_scalars(dtype, shape.clone(), (0..n).map(|_| draw(dtype, from, random))));
        }
        let mut within = true;
        let want = lhs.eval(&values, &mut |t| {
            let (least, most) = if t.dtype().is_float() { range(t.dtype()) } else { (0.0, f64::MAX) };
            within &= t.to_f64().iter().all(|v| (least..=most).contains(&v.abs()));
        });
        if from == Draw::Wide && !within {
            continue;
        }
        let got = rhs.eval(&values, &mut |_| {});
        if !(if from == Draw::Any { same(&want, &got) } else { near(&want, &got) }) {
            return Err(format!("`{}` is unsound: {} = {want:?}, {} = {got:?} where {values:?}", rule.name, rule.lhs, rule.rhs));
        }
    }
    Ok(())
}

#[test]
fn every_rule_holds_on_small_tensors() {
    let rules = rules::all().unwrap();
    assert!(rules.len() >= 20, "{} rules", rules.len());
    let wrong: Vec<String> = rules.iter().filter_map(|r| check(r).err()).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let names: std::collections::BTreeSet<&str> = rules.iter().map(|r| r.name.as_str()).chain(rules::computed::RULES.iter().map(|r| r.name)).collect();
    assert_eq!(names.len(), rules.len() + rules::computed::RULES.len(), "rule names are unique");
}

#[test]
fn wrong_rules_are_caught() {
    let planted = [
        ("nan", "(not (lt ?x ?y)) => (ge ?x ?y)", "unsound"),
        ("nan-select", "(select (lt ?x ?y) ?x ?y) => (min ?x ?y)", "unsound"),
        ("infinity", "(sub ?x (sub ?x ?y)) => ?y", "unsound"),
        ("negative-zero", "(add ?x (abs (sub ?y ?y))) => ?x", "unsound"),
        ("smallest-integer", "(not (lt (abs ?x) (sub ?x ?x))) => (eq ?x ?x)", "unsound"),
        ("wrap", "(div (mul ?x ?y) ?y) => ?x", "unsound"),
        ("unsigned", "(abs (neg ?x)) => (abs ?x)", "unsound"),
        ("truncation", "(mul ?x (div ?y ?z)) => (div (mul ?x ?y) ?z)", "unsound"),
        ("rounding", "(add (add ?x ?y) ?z) => (add ?x (add ?y ?z))", "unsound"),
        ("rank", "(reduce[f=max,axes=[1]] ?x) => (reduce[f=max,axes=[0]] ?x)", "equates"),
        ("square-only", "(transpose[perm=[1,0]] ?x) => (transpose[perm=[0,1]] ?x)", "equates"),
        ("formula", "(recip (exp ?x)) ~> (exp ?x)", "unsound"),
        ("special", "(mul ?x (recip ?x)) ~> (exp (sub ?x ?x))", "unsound"),
        ("overflow", "(mul ?x (div ?y ?z)) ~> (div (mul ?x ?y) ?z)", "unsound"),
        ("underflow", "(div (div ?x ?y) ?z) ~> (div ?x (mul ?y ?z))", "unsound"),
        ("nowhere", "(not (exp ?x)) => (exp ?x)", "never type-checks"),
        ("integers-only", "(and ?x ?x) ~> ?x", "never type-checks"),
    ];
    for (name, text, says) in planted {
        let rules = rules::parse("planted", &format!("{name}: {text}")).unwrap();
        let found = check(&rules[0]).expect_err(name);
        assert!(found.contains(says), "{name}: {found}");
    }
}

#[test]
fn lines_that_are_no_rules_are_named() {
    for (text, says) in [
        ("(neg ?x) => ?x", "x.rules:1: expected `name: `"),
        ("a: (neg ?x)", "expected one `=>` or `~>`"),
        ("# fine\n\nb: (neg ?x) => ?y", "x.rules:3: ?y is unbound on the left"),
        ("c: (frob ?x) => ?x", "frob"),
        ("d: (add ?x) => ?x", "add"),
    ] {
        let e = rules::parse("x.rules", text).expect_err(text);
        assert!(e.contains(says), "{text}: {e}");
    }
}

#[test]
fn every_rule_has_a_class() {
    let computed = computed::RULES.iter().map(|r| r.name.to_string());
    for name in computed.chain(rules::all().unwrap().into_iter().map(|r| r.name)) {
        assert!(promises::class(&name).is_some(), "{name}");
    }
    // What holds only where something else does says so.
    assert_eq!(promises::class("attention").unwrap().to_string(), "real, since what a condition masks is minus infinity");
    assert_eq!(promises::class("no-such-rule"), None);
}
