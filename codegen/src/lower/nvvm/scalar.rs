//! Scalar functions and conversions on registers.
use super::math::{Arith, Bin, Cmp, Math, W};
use super::{Lower, Lowered, Reg, llty, packed};
use crate::tile::Stmt;
use pavage_ir::dtype::Class;
use pavage_ir::{DType, ScalarFn};

impl Lower<'_> {
    pub(super) fn map(&mut self, f: ScalarFn, s: &Stmt) -> Lowered {
        self.learn(f, s);
        if s.args.last().is_some_and(|a| self.ty(*a) == super::Ty::INDEX) {
            return self.index_map(f, s);
        }
        let d = self.ty(*s.args.last().expect("a function has operands")).dtype();
        let (n, out) = (self.ty(s.results[0]).lanes(), s.results[0]);
        // A divisor other than 0 and -1 needs no guard.
        let plain = s.args.get(1).is_some_and(|b| {
            let range = self.ranges.get(*b);
            !range.contains(0) && !range.contains(-1) || self.consts.get(b).is_some_and(|b| *b != 0 && *b != -1)
        });
        // A select of 16-bit floats moves bits.
        if f == ScalarFn::Select && packed(self.ty(out)) && self.ty(s.args[0]).is_scalar() {
            let (c, a, b) = (self.scalar(s.args[0]), self.raw(s.args[1]), self.raw(s.args[2]));
            let regs = a.iter().zip(&b).map(|(a, b)| self.e.select(&c, a, b)).collect();
            self.bind(out, regs);
            return Ok(());
        }
        let columns: Vec<Vec<Reg>> = s.args.iter().map(|a| self.lanes(*a)).collect();
        let mut lanes = Vec::with_capacity(n);
        for i in 0..n {
            let args: Vec<Reg> = columns.iter().map(|c| c[if c.len() == 1 { 0 } else { i }].clone()).collect();
            lanes.push(if plain && matches!(f, ScalarFn::Div | ScalarFn::Rem | ScalarFn::Mod) && d.is_int() {
                self.divide(f, d, &args[0], &args[1])
            } else {
                self.call(f, d, &args)?
            });
        }
        self.bind_lanes(out, lanes);
        Ok(())
    }

    /// A scalar function of operands of `d`; 16-bit floats are given and returned as `f32`.
    pub(super) fn call(&mut self, f: ScalarFn, d: DType, args: &[Reg]) -> Lowered<Reg> {
        use ScalarFn::*;
        let e = &mut self.e;
        let signed = d.class() == Class::Signed;
        let float = d.is_float();
        let cmp = |e: &mut super::Emit, fl: Cmp, si: &str, un: &str| {
            if float { e.cmp(fl, &args[0], &args[1]) } else { e.icmp(if signed { si } else { un }, &args[0], &args[1]) }
        };
        Ok(match f {
            Select => e.select(&args[0], &args[1], &args[2]),
            Eq => cmp(e, Cmp::FEq, "eq", "eq"),
            Ne => cmp(e, Cmp::FNe, "ne", "ne"),
            Lt => cmp(e, Cmp::FLt, "slt", "ult"),
            Le => cmp(e, Cmp::FLe, "sle", "ule"),
            Gt => cmp(e, Cmp::FGt, "sgt", "ugt"),
            Ge => cmp(e, Cmp::FGe, "sge", "uge"),
            IsNan => e.cmp(Cmp::FUno, &args[0], &args[0]),
            IsInf => {
                let a = e.un(super::math::Un::Abs, &args[0]);
                let inf = e.float(a.ty, f64::INFINITY);
                e.cmp(Cmp::FEq, &a, &inf)
            }
            _ if float => {
                if d.is_mini() {
                    return self.unsupported(f.name(), "8-bit floats");
                }
                let (w, sixteen) = if d == DType::F64 { (W::F64, false) } else { (W::F32, d != DType::F32) };
                match Math::new(e, w, sixteen).call(f, args) {
                    Some(r) => r,
                    None => return self.unsupported(f.name(), format!("on {d}")),
                }
            }
            Not if d == DType::Bool => {
                let one = e.int("i1", 1);
                e.int2("xor", &args[0], &one)
            }
            Add => e.int2("add", &args[0], &args[1]),
            Sub => e.int2("sub", &args[0], &args[1]),
            Mul => e.int2("mul", &args[0], &args[1]),
            And => e.int2("and", &args[0], &args[1]),
            Or => e.int2("or", &args[0], &args[1]),
            Xor => e.int2("xor", &args[0], &args[1]),
            Not => e.int2c("xor", &args[0], -1),
            Neg => {
                let zero = e.int(args[0].ty, 0);
                e.int2("sub", &zero, &args[0])
            }
            Max | Min => {
                let name = format!("{}{}", if signed { "s" } else { "u" }, if f == Max { "max" } else { "min" });
                e.op(args[0].ty, format!("llvm.intr.{name}({}, {}) : ({t}, {t}) -> {t}", args[0], args[1], t = args[0].ty))
            }
            Abs if signed => {
                let zero = e.int(args[0].ty, 0);
                let neg = e.int2("sub", &zero, &args[0]);
                let c = e.icmp("slt", &args[0], &zero);
                e.select(&c, &neg, &args[0])
            }
            Abs => args[0].clone(),
            Sign => {
                let (zero, one, minus) = (e.int(args[0].ty, 0), e.int(args[0].ty, 1), e.int(args[0].ty, -1));
                let c = e.icmp("ne", &args[0], &zero);
                let r = e.select(&c, &one, &zero);
                if !signed {
                    return Ok(r);
                }
                let c = e.icmp("slt", &args[0], &zero);
                e.select(&c, &minus, &r)
            }
            Div | Rem | Mod => {
                // By zero gives 0; MIN / -1 wraps, so -1 is handled as negation.
                let (zero, one) = (e.int(args[0].ty, 0), e.int(args[0].ty, 1));
                let by0 = e.icmp("eq", &args[1], &zero);
                let mut special = by0.clone();
                let mut value = zero.clone();
                if signed {
                    let minus = e.int(args[0].ty, -1);
                    let by1 = e.icmp("eq", &args[1], &minus);
                    special = e.int2("or", &by0, &by1);
                    if f == Div {
                        let neg = e.int2("sub", &zero, &args[0]);
                        value = e.select(&by1, &neg, &zero);
                    }
                }
                let safe = e.select(&special, &one, &args[1]);
                let q = self.divide(f, d, &args[0], &safe);
                self.e.select(&special, &value, &q)
            }
            Shl | Shr => {
                let bits = e.int(args[0].ty, d.bits() as i64);
                let inside = e.icmp("ult", &args[1], &bits);
                let (op, over) = match (f, signed) {
                    (Shl, _) => ("shl", e.int(args[0].ty, 0)),
                    (_, false) => ("lshr", e.int(args[0].ty, 0)),
                    (_, true) => ("ashr", e.int2c("ashr", &args[0], d.bits() as i64 - 1)),
                };
                let zero = e.int(args[0].ty, 0);
                let by = e.select(&inside, &args[1], &zero);
                let r = e.int2(op, &args[0], &by);
                e.select(&inside, &r, &over)
            }
            Pow => self.int_pow(d, &args[0], &args[1]),
            _ => return self.unsupported(f.name(), format!("on {d}")),
        })
    }

    /// Quotient or remainder by a divisor that is neither 0 nor -1.
    pub(super) fn divide(&mut self, f: ScalarFn, d: DType, a: &Reg, b: &Reg) -> Reg {
        let e = &mut self.e;
        let signed = d.class() == Class::Signed;
        let name = match (f, signed) {
            (ScalarFn::Div, true) => Bin::SDiv,
            (ScalarFn::Div, false) => Bin::UDiv,
            (_, true) => Bin::SRem,
            (_, false) => Bin::URem,
        };
        let r = e.bin(name, a, b);
        if f != ScalarFn::Mod || !signed {
            return r;
        }
        let zero = e.int(a.ty, 0);
        let nz = e.icmp("ne", &r, &zero);
        let x = e.int2("xor", &r, b);
        let differ = e.icmp("slt", &x, &zero);
        let c = e.int2("and", &nz, &differ);
        let up = e.int2("add", &r, b);
        e.select(&c, &up, &r)
    }

    /// Integer power by squaring; a negative exponent gives 0 except for bases 1 and -1.
    fn int_pow(&mut self, d: DType, a: &Reg, b: &Reg) -> Reg {
        let t = a.ty;
        let e = &mut self.e;
        let (zero, one) = (e.int(t, 0), e.int(t, 1));
        let signed = d.class() == Class::Signed;
        let (lo, hi, step) = (e.i32(0), e.i32(d.bits() as i64), e.i32(1));
        let (i, base, exp, acc) = (e.fresh(), e.fresh(), e.fresh(), e.fresh());
        let out = e.fresh();
        e.line(format!("{out}:3 = scf.for {i} = {lo} to {hi} step {step} iter_args({base} = {a}, {exp} = {b}, {acc} = {one}) -> ({t}, {t}, {t}) : i32 {{"));
        let reg = |name: &str| Reg { name: name.to_owned(), ty: t };
        let (base, exp, acc) = (reg(&base), reg(&exp), reg(&acc));
        let low = e.int2("and", &exp, &one);
        let odd = e.icmp("ne", &low, &zero);
        let times = e.int2("mul", &acc, &base);
        let acc = e.select(&odd, &times, &acc);
        let base = e.int2("mul", &base, &base);
        let exp = e.int2c("lshr", &exp, 1);
        e.line(format!("scf.yield {base}, {exp}, {acc} : {t}, {t}, {t}"));
        e.line("}");
        let r = reg(&format!("{out}#2"));
        if !signed {
            return r;
        }
        let minus = e.int(t, -1);
        let neg = e.icmp("slt", b, &zero);
        let is1 = e.icmp("eq", a, &one);
        let ism = e.icmp("eq", a, &minus);
        // For the bases 1 and -1 the squaring is right for negative exponents too: only the parity matters.
        let unit = e.int2("or", &is1, &ism);
        let tiny = e.select(&unit, &r, &zero);
        e.select(&neg, &tiny, &r)
    }

    pub(super) fn cast(&mut self, s: &Stmt) -> Lowered {
        let (from, to) = (self.ty(s.args[0]).dtype(), self.ty(s.results[0]).dtype());
        let narrow = self.is_narrow(s.args[0]);
        let lanes = if narrow { vec![self.kept(s.args[0])] } else { self.lanes(s.args[0]) };
        // What fits 32 bits is made there.
        let to = if self.is_narrow(s.results[0]) { DType::I32 } else { to };
        let lanes = lanes.iter().map(|r| self.convert(r, from, to)).collect::<Lowered<Vec<_>>>()?;
        if self.ty(s.results[0]) == super::Ty::INDEX && from.is_int() {
            let k = self.two(s.args[0]);
            self.twos.insert(s.results[0], k);
        }
        self.bind_lanes(s.results[0], lanes);
        Ok(())
    }

    /// `Scalar::cast` on a register; 16-bit floats are `f32` on both sides.
    pub(super) fn convert(&mut self, r: &Reg, from: DType, to: DType) -> Lowered<Reg> {
        let wide = |d: DType| if matches!(d, DType::F16 | DType::BF16) { "f32" } else { llty(d) };
        if from == DType::Str || to == DType::Str {
            return self.unsupported("cast", format!("{from} to {to}"));
        }
        if [from, to].iter().any(|d| d.is_mini() || d.is_packed()) {
            return self.convert_narrow(r, from, to);
        }
        let e = &mut self.e;
        let t = wide(to);
        Ok(match (from.class(), to.class()) {
            (Class::Float, Class::Float) => match (r.ty, t) {
                ("f32", "f64") => e.conv("fpext", r, t),
                ("f64", "f32") => e.conv("fptrunc", r, t),
                _ => r.clone(),
            },
            (Class::Float, Class::Bool) => {
                let zero = e.float(r.ty, 0.0);
                e.cmp(Cmp::FNe, r, &zero)
            }
            (Class::Float, class) => {
                let name = if class == Class::Signed { "fptosi" } else { "fptoui" };
                e.op(t, format!("llvm.call_intrinsic \"llvm.{name}.sat\"({r}) : ({}) -> {t}", r.ty))
            }
            (Class::Signed, Class::Float) => e.conv("sitofp", r, t),
            (Class::Unsigned | Class::Bool, Class::Float) => e.conv("uitofp", r, t),
            (_, Class::Bool) => {
                if r.ty == "i1" {
                    return Ok(r.clone());
                }
                let zero = e.int(r.ty, 0);
                e.icmp("ne", r, &zero)
            }
            (class, _) => match super::emit::width(r.ty).cmp(&super::emit::width(t)) {
                std::cmp::Ordering::Equal => r.clone(),
                std::cmp::Ordering::Greater => e.conv("trunc", r, t),
                std::cmp::Ordering::Less => e.conv(if class == Class::Signed { "sext" } else { "zext" }, r, t),
            },
        })
    }
}
