//! From the compiler's types to the runtime's: what crosses into an artifact is converted here, by hand.
use pavage_ir::{DType, Dim, Sym, dim::Atom};
use pavage_runtime::{self as rt, DimExpr};

/// The runtime's dtype; strings have none.
pub fn dtype(d: DType) -> Option<rt::DType> {
    Some(match d {
        DType::F64 => rt::DType::F64,
        DType::F32 => rt::DType::F32,
        DType::F16 => rt::DType::F16,
        DType::BF16 => rt::DType::BF16,
        DType::F8E4M3 => rt::DType::F8E4M3,
        DType::F8E5M2 => rt::DType::F8E5M2,
        DType::F8E4M3Fnuz => rt::DType::F8E4M3Fnuz,
        DType::F8E5M2Fnuz => rt::DType::F8E5M2Fnuz,
        DType::F8E8M0 => rt::DType::F8E8M0,
        DType::F4E2M1 => rt::DType::F4E2M1,
        DType::I64 => rt::DType::I64,
        DType::I32 => rt::DType::I32,
        DType::I16 => rt::DType::I16,
        DType::I8 => rt::DType::I8,
        DType::I4 => rt::DType::I4,
        DType::I2 => rt::DType::I2,
        DType::U64 => rt::DType::U64,
        DType::U32 => rt::DType::U32,
        DType::U16 => rt::DType::U16,
        DType::U8 => rt::DType::U8,
        DType::U4 => rt::DType::U4,
        DType::U2 => rt::DType::U2,
        DType::Bool => rt::DType::Bool,
        DType::Str => return None,
    })
}

/// The compiler's dtype of a runtime's.
pub fn ir_dtype(d: rt::DType) -> DType {
    match d {
        rt::DType::F64 => DType::F64,
        rt::DType::F32 => DType::F32,
        rt::DType::F16 => DType::F16,
        rt::DType::BF16 => DType::BF16,
        rt::DType::F8E4M3 => DType::F8E4M3,
        rt::DType::F8E5M2 => DType::F8E5M2,
        rt::DType::F8E4M3Fnuz => DType::F8E4M3Fnuz,
        rt::DType::F8E5M2Fnuz => DType::F8E5M2Fnuz,
        rt::DType::F8E8M0 => DType::F8E8M0,
        rt::DType::F4E2M1 => DType::F4E2M1,
        rt::DType::I64 => DType::I64,
        rt::DType::I32 => DType::I32,
        rt::DType::I16 => DType::I16,
        rt::DType::I8 => DType::I8,
        rt::DType::I4 => DType::I4,
        rt::DType::I2 => DType::I2,
        rt::DType::U64 => DType::U64,
        rt::DType::U32 => DType::U32,
        rt::DType::U16 => DType::U16,
        rt::DType::U8 => DType::U8,
        rt::DType::U4 => DType::U4,
        rt::DType::U2 => DType::U2,
        rt::DType::Bool => DType::Bool,
    }
}

/// The symbols of an artifact, in the order of its manifest.
#[derive(Clone, Debug)]
pub struct Symbols(pub Vec<Sym>);

impl Symbols {
    /// Index of a symbol in the manifest.
    pub fn index(&self, sym: &Sym) -> Option<u32> {
        self.0.iter().position(|s| s.name == sym.name).map(|i| i as u32)
    }

    /// The manifest's entries.
    pub fn wire(&self) -> Vec<rt::plan::Symbol> {
        self.0.iter().map(|s| rt::plan::Symbol { name: s.name.to_string(), min: s.min, max: s.max.unwrap_or(i64::from(i32::MAX)) }).collect()
    }

    /// A size as the runtime evaluates it.
    ///
    /// # Panics
    /// If it mentions loop axes or symbols that the program does not declare: a bug in a pass.
    pub fn dim(&self, d: &Dim) -> DimExpr {
        let mut terms: Vec<DimExpr> = d
            .terms()
            .iter()
            .map(|(atoms, c)| {
                let mut factors: Vec<DimExpr> = atoms.iter().map(|a| self.atom(a)).collect();
                if *c != 1 || factors.is_empty() {
                    factors.insert(0, DimExpr::Const(*c));
                }
                if factors.len() == 1 { factors.remove(0) } else { DimExpr::Mul(factors) }
            })
            .collect();
        match terms.len() {
            0 => DimExpr::Const(0),
            1 => terms.remove(0),
            _ => DimExpr::Add(terms),
        }
    }

    /// Sizes.
    pub fn dims(&self, dims: &[Dim]) -> Vec<DimExpr> {
        dims.iter().map(|d| self.dim(d)).collect()
    }

    fn atom(&self, atom: &Atom) -> DimExpr {
        let two = |a: &Dim, b: &Dim| (Box::new(self.dim(a)), Box::new(self.dim(b)));
        match atom {
            Atom::Sym(s) => DimExpr::Sym(self.index(s).unwrap_or_else(|| panic!("size symbol `{}` is not declared", s.name))),
            Atom::Div(a, b) => {
                let (a, b) = two(a, b);
                DimExpr::FloorDiv(a, b)
            }
            Atom::Mod(a, b) => {
                let (a, b) = two(a, b);
                DimExpr::Mod(a, b)
            }
            Atom::Max(a, b) => {
                let (a, b) = two(a, b);
                DimExpr::Max(a, b)
            }
            Atom::Min(a, b) => {
                let (a, b) = two(a, b);
                DimExpr::Min(a, b)
            }
            Atom::Axis(_) | Atom::Value(_) => panic!("`{atom}` is not a size"),
        }
    }
}
