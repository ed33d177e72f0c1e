//! Scalar functions of the table on values of any dtype, scalar or vector: which arithmetic each becomes.
use super::{
    Mlir,
    convert::{cast, to_f32_or_f64, wrap_packed},
    float::Float,
};
use crate::tile::Ty;
use pavage_ir::{DType, Scalar, ScalarFn, dtype::Class};

/// Apply `f` to `args`, all of type `ty` (for `select`, `args[0]` is a bool scalar or of the same shape, and `ty`
/// that of the others). `consts` are the values of operands that are constants in every lane.
pub fn map(e: &mut Mlir, f: ScalarFn, ty: Ty, args: &[String], consts: &[Option<Scalar>]) -> String {
    if f == ScalarFn::Select {
        let t = e.ty(ty);
        let types = if ty.is_scalar() { t } else { format!("{}, {t}", e.ty(ty.with(DType::Bool))) };
        return e.op(&format!("arith.select {}, {}, {} : {types}", args[0], args[1], args[2]));
    }
    match ty.dtype().class() {
        Class::Float => float(e, f, ty, args, consts),
        Class::Bool => boolean(e, f, ty, args),
        _ => integer(e, f, ty, args, consts),
    }
}

fn float(e: &mut Mlir, f: ScalarFn, ty: Ty, args: &[String], consts: &[Option<Scalar>]) -> String {
    let (wide, wide_ty): (Vec<String>, Ty) = {
        let all: Vec<(String, Ty)> = args.iter().map(|a| to_f32_or_f64(e, a, ty)).collect();
        let t = all[0].1;
        (all.into_iter().map(|(v, _)| v).collect(), t)
    };
    let number = |i: usize| consts.get(i).copied().flatten().map(Scalar::f).filter(|v| !v.is_nan());
    let mut w = Float::new(e, wide_ty);
    let r = match f {
        ScalarFn::Max | ScalarFn::Min if number(0).is_some() || number(1).is_some() => {
            let (k, x) = if number(0).is_some() { (0, 1) } else { (1, 0) };
            w.max_min_constant(f == ScalarFn::Max, &wide[k], &wide[x])
        }
        ScalarFn::Pow if number(1) == Some(2.0) => w.mul(&wide[0], &wide[0]),
        ScalarFn::Pow if number(1) == Some(1.0) => wide[0].clone(),
        ScalarFn::Pow if number(1) == Some(-1.0) => {
            let one = w.c(1.0);
            w.div(&one, &wide[0])
        }
        _ => w.apply(f, &wide).unwrap_or_else(|| unreachable!("{f} takes no floats: the checker says so")),
    };
    let gives_bool = f.infer(&vec![ty.dtype(); f.arity()]) == Ok(DType::Bool);
    if gives_bool { r } else { cast(e, &r, wide_ty, ty.dtype()) }
}

fn boolean(e: &mut Mlir, f: ScalarFn, ty: Ty, args: &[String]) -> String {
    let t = e.ty(ty);
    let two = |e: &mut Mlir, op: &str| e.op(&format!("arith.{op} {}, {} : {t}", args[0], args[1]));
    match f {
        ScalarFn::And => two(e, "andi"),
        ScalarFn::Or => two(e, "ori"),
        ScalarFn::Xor => two(e, "xori"),
        ScalarFn::Not => {
            let yes = e.constant(Scalar::B(true), ty);
            e.op(&format!("arith.xori {}, {yes} : {t}", args[0]))
        }
        ScalarFn::Eq => two(e, "cmpi eq,"),
        ScalarFn::Ne => two(e, "cmpi ne,"),
        ScalarFn::Lt => two(e, "cmpi ult,"),
        ScalarFn::Le => two(e, "cmpi ule,"),
        ScalarFn::Gt => two(e, "cmpi ugt,"),
        ScalarFn::Ge => two(e, "cmpi uge,"),
        // Shifting one bit by a bit moves it nowhere that a bool would notice.
        ScalarFn::Shl => args[0].clone(),
        ScalarFn::Shr => {
            let yes = e.constant(Scalar::B(true), ty);
            let keep = e.op(&format!("arith.xori {}, {yes} : {t}", args[1]));
            e.op(&format!("arith.andi {}, {keep} : {t}", args[0]))
        }
        _ => unreachable!("{f} takes no bool: the checker says so"),
    }
}

fn integer(e: &mut Mlir, f: ScalarFn, ty: Ty, args: &[String], consts: &[Option<Scalar>]) -> String {
    let t = e.ty(ty);
    let signed = ty.dtype().class() == Class::Signed;
    let s = if signed { "s" } else { "u" };
    let packed = ty.dtype().is_packed();
    let (a, b) = (&args[0], args.get(1).unwrap_or(&args[0]));
    let two = |e: &mut Mlir, op: &str, a: &str, b: &str| e.op(&format!("arith.{op} {a}, {b} : {t}"));
    let compare = |e: &mut Mlir, p: &str, sign: bool| e.op(&format!("arith.cmpi {}{p}, {a}, {b} : {t}", if sign { s } else { "" }));
    let k = |e: &mut Mlir, v: i128| e.constant(Scalar::I(v), ty);
    let pick = |e: &mut Mlir, c: &str, yes: &str, no: &str| {
        let types = if ty.is_scalar() { t.clone() } else { format!("{}, {t}", e.ty(ty.with(DType::Bool))) };
        e.op(&format!("arith.select {c}, {yes}, {no} : {types}"))
    };
    let r = match f {
        ScalarFn::Add => two(e, "addi", a, b),
        ScalarFn::Sub => two(e, "subi", a, b),
        ScalarFn::Mul => two(e, "muli", a, b),
        ScalarFn::Max => two(e, &format!("max{s}i"), a, b),
        ScalarFn::Min => two(e, &format!("min{s}i"), a, b),
        ScalarFn::And => two(e, "andi", a, b),
        ScalarFn::Or => two(e, "ori", a, b),
        ScalarFn::Xor => two(e, "xori", a, b),
        ScalarFn::Not => {
            let ones = k(e, if signed { -1 } else { ty.dtype().int_range().1 });
            two(e, "xori", a, &ones)
        }
        ScalarFn::Neg => {
            let zero = k(e, 0);
            two(e, "subi", &zero, a)
        }
        ScalarFn::Abs if !signed => a.clone(),
        ScalarFn::Abs => {
            let zero = k(e, 0);
            let minus = two(e, "subi", &zero, a);
            two(e, "maxsi", a, &minus)
        }
        ScalarFn::Sign => {
            let (zero, one) = (k(e, 0), k(e, 1));
            let above = two(e, if signed { "cmpi sgt," } else { "cmpi ugt," }, a, &zero);
            let r = pick(e, &above, &one, &zero);
            if signed {
                let minus = k(e, -1);
                let below = two(e, "cmpi slt,", a, &zero);
                pick(e, &below, &minus, &r)
            } else {
                r
            }
        }
        ScalarFn::Div => divide(e, ty, a, b, consts.get(1).copied().flatten()).0,
        ScalarFn::Rem => divide(e, ty, a, b, consts.get(1).copied().flatten()).1,
        ScalarFn::Mod => {
            let r = divide(e, ty, a, b, consts.get(1).copied().flatten()).1;
            if !signed {
                return r;
            }
            let zero = k(e, 0);
            let sign = two(e, "xori", &r, b);
            let differ = two(e, "cmpi slt,", &sign, &zero);
            let moved = two(e, "addi", &r, b);
            let some = two(e, "cmpi ne,", &r, &zero);
            let fixed = pick(e, &differ, &moved, &r);
            pick(e, &some, &fixed, &r)
        }
        ScalarFn::Shl | ScalarFn::Shr => {
            let bits = ty.dtype().bits() as i128;
            if f == ScalarFn::Shr && signed {
                let last = k(e, bits - 1);
                let amount = two(e, "minui", b, &last);
                two(e, "shrsi", a, &amount)
            } else {
                let (width, zero) = (k(e, bits), k(e, 0));
                let ok = two(e, "cmpi ult,", b, &width);
                let amount = pick(e, &ok, b, &zero);
                let r = two(e, if f == ScalarFn::Shl { "shli" } else { "shrui" }, a, &amount);
                pick(e, &ok, &r, &zero)
            }
        }
        ScalarFn::Pow => power(e, ty, a, b),
        ScalarFn::Eq => return compare(e, "eq", false),
        ScalarFn::Ne => return compare(e, "ne", false),
        ScalarFn::Lt => return compare(e, "lt", true),
        ScalarFn::Le => return compare(e, "le", true),
        ScalarFn::Gt => return compare(e, "gt", true),
        ScalarFn::Ge => return compare(e, "ge", true),
        _ => unreachable!("{f} takes no integers: the checker says so"),
    };
    if packed { wrap_packed(e, &r, ty) } else { r }
}

/// Quotient toward zero and remainder; by zero both are 0, and the smallest integer by -1 wraps, without trapping.
fn divide(e: &mut Mlir, ty: Ty, a: &str, b: &str, known: Option<Scalar>) -> (String, String) {
    let t = e.ty(ty);
    let signed = ty.dtype().class() == Class::Signed;
    let s = if signed { "s" } else { "u" };
    if known.is_some_and(|k| k.i() != 0 && k.i() != -1) {
        let q = e.op(&format!("arith.div{s}i {a}, {b} : {t}"));
        let r = e.op(&format!("arith.rem{s}i {a}, {b} : {t}"));
        return (q, r);
    }
    let pick_types = if ty.is_scalar() { t.clone() } else { format!("{}, {t}", e.ty(ty.with(DType::Bool))) };
    let (zero, one) = (e.constant(Scalar::I(0), ty), e.constant(Scalar::I(1), ty));
    let by_zero = e.op(&format!("arith.cmpi eq, {b}, {zero} : {t}"));
    let mut safe = e.op(&format!("arith.select {by_zero}, {one}, {b} : {pick_types}"));
    let by_minus = signed.then(|| {
        let minus = e.constant(Scalar::I(-1), ty);
        let c = e.op(&format!("arith.cmpi eq, {b}, {minus} : {t}"));
        safe = e.op(&format!("arith.select {c}, {one}, {safe} : {pick_types}"));
        c
    });
    let mut q = e.op(&format!("arith.div{s}i {a}, {safe} : {t}"));
    let r = e.op(&format!("arith.rem{s}i {a}, {safe} : {t}"));
    if let Some(c) = by_minus {
        let minus = e.op(&format!("arith.subi {zero}, {a} : {t}"));
        q = e.op(&format!("arith.select {c}, {minus}, {q} : {pick_types}"));
    }
    // The remainder by the stand-in divisor 1 is 0 already.
    (e.op(&format!("arith.select {by_zero}, {zero}, {q} : {pick_types}")), r)
}

/// Integer power by squaring; negative exponents give 0 but for bases 1 and -1.
fn power(e: &mut Mlir, ty: Ty, a: &str, b: &str) -> String {
    let t = e.ty(ty);
    let bits = ty.dtype().bits() as i64;
    let pick_types = if ty.is_scalar() { t.clone() } else { format!("{}, {t}", e.ty(ty.with(DType::Bool))) };
    let (zero, one) = (e.constant(Scalar::I(0), ty), e.constant(Scalar::I(1), ty));
    let (lo, hi, step) = (e.index(0), e.index(bits), e.index(1));
    let (r, i, acc, base, exp) = (e.fresh(), e.fresh(), e.fresh(), e.fresh(), e.fresh());
    e.open(&format!("{r}:3 = scf.for {i} = {lo} to {hi} step {step} iter_args({acc} = {one}, {base} = {a}, {exp} = {b}) -> ({t}, {t}, {t}) : i64 {{"));
    let low = e.op(&format!("arith.andi {exp}, {one} : {t}"));
    let odd = e.op(&format!("arith.cmpi ne, {low}, {zero} : {t}"));
    let more = e.op(&format!("arith.muli {acc}, {base} : {t}"));
    let acc = e.op(&format!("arith.select {odd}, {more}, {acc} : {pick_types}"));
    let base = e.op(&format!("arith.muli {base}, {base} : {t}"));
    let exp = e.op(&format!("arith.shrui {exp}, {one} : {t}"));
    e.line(&format!("scf.yield {acc}, {base}, {exp} : {t}, {t}, {t}"));
    e.close("}");
    let r = format!("{r}#0");
    if ty.dtype().class() != Class::Signed {
        return r;
    }
    let minus = e.constant(Scalar::I(-1), ty);
    let below = e.op(&format!("arith.cmpi slt, {b}, {zero} : {t}"));
    let is_one = e.op(&format!("arith.cmpi eq, {a}, {one} : {t}"));
    let is_minus = e.op(&format!("arith.cmpi eq, {a}, {minus} : {t}"));
    let unit = e.op(&format!("arith.ori {is_one}, {is_minus} : {}", e.ty(ty.with(DType::Bool))));
    // For 1 and -1 the squaring is right even with the exponent's bits read as unsigned: parity is what counts.
    let inverse = e.op(&format!("arith.select {unit}, {r}, {zero} : {pick_types}"));
    e.op(&format!("arith.select {below}, {inverse}, {r} : {pick_types}"))
}
