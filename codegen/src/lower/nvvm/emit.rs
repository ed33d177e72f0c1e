//! Printing the llvm, nvvm and scf dialects: fresh names, constants, and the machine of [`super::math`].
use super::math::{Arith, Bin, Cmp, Un, W};
use std::fmt::Write;

/// An SSA name with its LLVM type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reg {
    /// The name, with its `%`.
    pub(super) name: String,
    /// The type as MLIR prints it.
    pub(super) ty: &'static str,
}

impl std::fmt::Display for Reg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

/// The text being written.
#[derive(Default)]
pub(super) struct Emit {
    out: String,
    next: u32,
    depth: usize,
}

impl Emit {
    /// The text so far.
    pub(super) fn finish(self) -> String {
        self.out
    }

    /// One line at the present depth.
    pub(super) fn line(&mut self, text: impl AsRef<str>) {
        let text = text.as_ref();
        if text.starts_with('}') {
            self.depth = self.depth.saturating_sub(1);
        }
        for _ in 0..self.depth {
            self.out.push_str("  ");
        }
        self.out.push_str(text);
        self.out.push('\n');
        if text.ends_with('{') {
            self.depth += 1;
        }
    }

    /// A name not used before.
    pub(super) fn fresh(&mut self) -> String {
        self.next += 1;
        format!("%v{}", self.next)
    }

    /// `%new = text`.
    pub(super) fn op(&mut self, ty: &'static str, text: impl AsRef<str>) -> Reg {
        let name = self.fresh();
        self.line(format!("{name} = {}", text.as_ref()));
        Reg { name, ty }
    }

    /// Integer constant.
    pub(super) fn int(&mut self, ty: &'static str, v: i64) -> Reg {
        if ty == "i1" {
            return self.op(ty, format!("llvm.mlir.constant({}) : i1", v != 0));
        }
        self.op(ty, format!("llvm.mlir.constant({v} : {ty}) : {ty}"))
    }

    /// `i32` constant.
    pub(super) fn i32(&mut self, v: i64) -> Reg {
        self.int("i32", v)
    }

    /// `i64` constant.
    pub(super) fn i64(&mut self, v: i64) -> Reg {
        self.int("i64", v)
    }

    /// Float constant of `f16`, `bf16`, `f32` or `f64`, rounded to the type and written as bits.
    pub(super) fn float(&mut self, ty: &'static str, v: f64) -> Reg {
        let text = match ty {
            "f64" => format!("0x{:016X}", v.to_bits()),
            "f16" => format!("0x{:04X}", half::f16::from_f64(v).to_bits()),
            "bf16" => format!("0x{:04X}", half::bf16::from_f64(v).to_bits()),
            _ => format!("0x{:08X}", (v as f32).to_bits()),
        };
        self.op(ty, format!("llvm.mlir.constant({text} : {ty}) : {ty}"))
    }

    /// `llvm.<op> a, b`.
    pub(super) fn int2(&mut self, op: &str, a: &Reg, b: &Reg) -> Reg {
        self.op(a.ty, format!("llvm.{op} {a}, {b} : {}", a.ty))
    }

    /// `llvm.<op> a, b` that does not wrap, signed, and if it is said so, unsigned.
    pub(super) fn exact(&mut self, op: &str, a: &Reg, b: &Reg, unsigned: bool) -> Reg {
        let flags = if unsigned { "nsw, nuw" } else { "nsw" };
        self.op(a.ty, format!("llvm.{op} {a}, {b} overflow<{flags}> : {}", a.ty))
    }

    /// With a constant second operand.
    pub(super) fn int2c(&mut self, op: &str, a: &Reg, b: i64) -> Reg {
        let b = self.int(a.ty, b);
        self.int2(op, a, &b)
    }

    /// An `i1`.
    pub(super) fn icmp(&mut self, pred: &str, a: &Reg, b: &Reg) -> Reg {
        self.op("i1", format!("llvm.icmp \"{pred}\" {a}, {b} : {}", a.ty))
    }

    /// `c ? a : b`.
    pub(super) fn select(&mut self, c: &Reg, a: &Reg, b: &Reg) -> Reg {
        self.op(a.ty, format!("llvm.select {c}, {a}, {b} : i1, {}", a.ty))
    }

    /// A conversion `llvm.<op> a : from to to`.
    pub(super) fn conv(&mut self, op: &str, a: &Reg, to: &'static str) -> Reg {
        if a.ty == to {
            return a.clone();
        }
        self.op(to, format!("llvm.{op} {a} : {} to {to}", a.ty))
    }

    /// Sign-extend or truncate an integer.
    pub(super) fn int_to(&mut self, a: &Reg, to: &'static str) -> Reg {
        let (from, want) = (width(a.ty), width(to));
        match from.cmp(&want) {
            std::cmp::Ordering::Equal => a.clone(),
            std::cmp::Ordering::Less => self.conv("sext", a, to),
            std::cmp::Ordering::Greater => self.conv("trunc", a, to),
        }
    }

    /// Two `f32` rounded to one register of two 16-bit floats, the first low.
    pub(super) fn pack16(&mut self, a: &Reg, b: &Reg, ty: &'static str) -> Reg {
        let (z, one) = (self.i32(0), self.i32(1));
        let v = self.op("vector<2xf32>", "llvm.mlir.undef : vector<2xf32>");
        let v = self.op("vector<2xf32>", format!("llvm.insertelement {a}, {v}[{z} : i32] : vector<2xf32>"));
        let v = self.op("vector<2xf32>", format!("llvm.insertelement {b}, {v}[{one} : i32] : vector<2xf32>"));
        let h = self.op(ty, format!("llvm.fptrunc {v} : vector<2xf32> to vector<2x{ty}>"));
        self.op("i32", format!("llvm.bitcast {h} : vector<2x{ty}> to i32"))
    }

    /// Both halves of such a register, as `f32`.
    pub(super) fn unpack16(&mut self, r: &Reg, ty: &'static str) -> [Reg; 2] {
        let h = self.op(ty, format!("llvm.bitcast {r} : i32 to vector<2x{ty}>"));
        [0, 1].map(|i| {
            let at = self.i32(i);
            let e = self.op(ty, format!("llvm.extractelement {h}[{at} : i32] : vector<2x{ty}>"));
            self.conv("fpext", &e, "f32")
        })
    }

    /// A comma-separated list.
    pub(super) fn list(regs: &[Reg]) -> String {
        let mut s = String::new();
        for (i, r) in regs.iter().enumerate() {
            let _ = write!(s, "{}{r}", if i == 0 { "" } else { ", " });
        }
        s
    }

    /// Their types, comma-separated.
    pub(super) fn types(regs: &[Reg]) -> String {
        regs.iter().map(|r| r.ty).collect::<Vec<_>>().join(", ")
    }
}

/// Bits of an integer type name.
pub(super) fn width(ty: &str) -> u32 {
    ty.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0)
}

const fn name_of(w: W) -> &'static str {
    match w {
        W::F32 => "f32",
        W::F64 => "f64",
        W::I32 => "i32",
        W::I64 => "i64",
    }
}

impl Arith for Emit {
    type V = Reg;

    fn cf(&mut self, w: W, v: f64) -> Reg {
        self.float(name_of(w), v)
    }

    fn ci(&mut self, w: W, v: i64) -> Reg {
        self.int(name_of(w), v)
    }

    fn bin(&mut self, op: Bin, a: &Reg, b: &Reg) -> Reg {
        let name = match op {
            Bin::FAdd => "fadd",
            Bin::FSub => "fsub",
            Bin::FMul => "fmul",
            Bin::FDiv => "fdiv",
            Bin::Add => "add",
            Bin::Sub => "sub",
            Bin::SDiv => "sdiv",
            Bin::UDiv => "udiv",
            Bin::SRem => "srem",
            Bin::URem => "urem",
            Bin::And => "and",
            Bin::Or => "or",
            Bin::Xor => "xor",
            Bin::Shl => "shl",
            Bin::AShr => "ashr",
            Bin::FMax | Bin::FMin | Bin::CopySign => {
                // f64 has no NaN-propagating instruction; the backend spells it out.
                let name = match op {
                    Bin::FMax => "maximum",
                    Bin::FMin => "minimum",
                    _ => "copysign",
                };
                return self.op(a.ty, format!("llvm.intr.{name}({a}, {b}) : ({0}, {0}) -> {0}", a.ty));
            }
        };
        self.int2(name, a, b)
    }

    fn un(&mut self, op: Un, a: &Reg) -> Reg {
        let t = a.ty;
        match op {
            Un::Neg => self.op(t, format!("llvm.fneg {a} : {t}")),
            Un::Abs => self.op(t, format!("llvm.intr.fabs({a}) : ({t}) -> {t}")),
            Un::Sqrt => self.op(t, format!("llvm.intr.sqrt({a}) : ({t}) -> {t}")),
            Un::Floor => self.op(t, format!("llvm.intr.floor({a}) : ({t}) -> {t}")),
            Un::Ceil => self.op(t, format!("llvm.intr.ceil({a}) : ({t}) -> {t}")),
            Un::Rint => self.op(t, format!("llvm.intr.rint({a}) : ({t}) -> {t}")),
            Un::Trunc => self.op(t, format!("llvm.intr.trunc({a}) : ({t}) -> {t}")),
            Un::Ex2 => self.op(t, format!("llvm.call_intrinsic \"llvm.nvvm.ex2.approx.ftz.f\"({a}) : ({t}) -> {t}")),
            Un::Rsqrt => self.op(t, format!("llvm.call_intrinsic \"llvm.nvvm.rsqrt.approx.f\"({a}) : ({t}) -> {t}")),
            Un::Rcp => self.op(t, format!("llvm.call_intrinsic \"llvm.nvvm.rcp.approx.ftz.f\"({a}) : ({t}) -> {t}")),
        }
    }

    fn fma(&mut self, a: &Reg, b: &Reg, c: &Reg) -> Reg {
        let t = a.ty;
        self.op(t, format!("llvm.intr.fma({a}, {b}, {c}) : ({t}, {t}, {t}) -> {t}"))
    }

    fn cmp(&mut self, op: Cmp, a: &Reg, b: &Reg) -> Reg {
        let (kind, pred) = match op {
            Cmp::FEq => ("fcmp", "oeq"),
            // Unordered, so that NaN differs from everything.
            Cmp::FNe => ("fcmp", "une"),
            Cmp::FLt => ("fcmp", "olt"),
            Cmp::FLe => ("fcmp", "ole"),
            Cmp::FGt => ("fcmp", "ogt"),
            Cmp::FGe => ("fcmp", "oge"),
            Cmp::FUno => ("fcmp", "uno"),
            Cmp::Ne => ("icmp", "ne"),
        };
        self.op("i1", format!("llvm.{kind} \"{pred}\" {a}, {b} : {}", a.ty))
    }

    fn sel(&mut self, c: &Reg, a: &Reg, b: &Reg) -> Reg {
        self.select(c, a, b)
    }

    fn fcast(&mut self, a: &Reg, to: W) -> Reg {
        let to = name_of(to);
        if a.ty == to {
            return a.clone();
        }
        self.conv(if to == "f64" { "fpext" } else { "fptrunc" }, a, to)
    }

    fn f2i(&mut self, a: &Reg, to: W) -> Reg {
        self.conv("fptosi", a, name_of(to))
    }

    fn i2f(&mut self, a: &Reg, to: W) -> Reg {
        self.conv("sitofp", a, name_of(to))
    }

    fn bits(&mut self, a: &Reg, to: W) -> Reg {
        self.conv("bitcast", a, name_of(to))
    }
}
