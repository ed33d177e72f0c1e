//! Every scalar function, compiled, against `ScalarFn::eval` on dense samples and on the corners of each type.
use crate::common::{Library, Noise, load};
use pavage_codegen::tile::{Access, Builder, Device, Kernel};
use pavage_ir::{DType, Scalar, ScalarFn, dtype::Class, minifloat, scalar::Sig};

const LANES: usize = 8;
const N: usize = 4096;

/// Elementwise over `N` elements, `LANES` at a time or one at a time.
fn kernel(f: ScalarFn, dtype: DType, lanes: usize) -> Kernel {
    let mut b = Builder::new(&format!("{f}_{dtype}_{lanes}"), Device::Cpu { lanes: 8 });
    let args: Vec<_> = (0..f.arity()).map(|i| b.arg(operand(f, dtype, i), Access::Read)).collect();
    let out = b.arg(result(f, dtype), Access::Write);
    let (lo, hi) = (b.lo(), b.hi());
    b.for_(lo, hi, lanes as i64, &[], |b, i, _| {
        let vals: Vec<_> = args.iter().map(|a| b.load(*a, i, lanes)).collect();
        let r = b.map(f, &vals);
        b.store(out, i, r);
        vec![]
    });
    b.finish()
}

fn operand(f: ScalarFn, dtype: DType, i: usize) -> DType {
    if f == ScalarFn::Select && i == 0 { DType::Bool } else { dtype }
}

fn result(f: ScalarFn, dtype: DType) -> DType {
    if matches!(f.sig(), Sig::Compare | Sig::Test) { DType::Bool } else { dtype }
}

fn put(out: &mut Vec<u8>, v: Scalar, dtype: DType) {
    match dtype {
        DType::F64 => out.extend(v.f().to_le_bytes()),
        DType::F32 => out.extend((v.f() as f32).to_le_bytes()),
        DType::F16 => out.extend(half::f16::from_f64(v.f()).to_le_bytes()),
        DType::BF16 => out.extend(half::bf16::from_f64(v.f()).to_le_bytes()),
        DType::F8E4M3 | DType::F8E5M2 => out.push(minifloat::encode(v.f(), dtype)),
        DType::Bool => out.push(v.b().into()),
        _ => out.extend(&v.i().to_le_bytes()[..dtype.bits() / 8]),
    }
}

fn get(bytes: &[u8], i: usize, dtype: DType) -> Scalar {
    let w = dtype.bits() / 8;
    let b = &bytes[i * w..][..w];
    match dtype {
        DType::F64 => Scalar::F(f64::from_le_bytes(b.try_into().unwrap())),
        DType::F32 => Scalar::F(f32::from_le_bytes(b.try_into().unwrap()).into()),
        DType::F16 => Scalar::F(half::f16::from_le_bytes(b.try_into().unwrap()).to_f64()),
        DType::BF16 => Scalar::F(half::bf16::from_le_bytes(b.try_into().unwrap()).to_f64()),
        DType::F8E4M3 | DType::F8E5M2 => Scalar::F(minifloat::decode(b[0], dtype)),
        DType::Bool => Scalar::B(b[0] != 0),
        _ => {
            let mut raw = [0u8; 16];
            raw[..w].copy_from_slice(b);
            Scalar::I(pavage_ir::scalar::wrap_int(i128::from_le_bytes(raw), dtype))
        }
    }
}

/// Values in order, for counting the steps between two floats.
fn rank(v: f64, dtype: DType) -> i128 {
    let bits = match dtype {
        DType::F64 => return fold(v.to_bits() as i64 as i128, 63),
        DType::F32 => (v as f32).to_bits() as i32 as i128,
        DType::F16 => return fold(half::f16::from_f64(v).to_bits() as i16 as i128, 15),
        DType::BF16 => return fold(half::bf16::from_f64(v).to_bits() as i16 as i128, 15),
        _ => return fold(minifloat::encode(v, dtype) as i8 as i128, 7),
    };
    fold(bits, 31)
}

fn fold(bits: i128, sign: u32) -> i128 {
    if bits < 0 { -(bits + (1i128 << sign)) } else { bits }
}

/// Corners, then a range evenly, then every magnitude.
fn sample(f: ScalarFn, dtype: DType, which: usize, noise: &mut Noise) -> Vec<Scalar> {
    let dtype = operand(f, dtype, which);
    match dtype.class() {
        Class::Float => {
            let corners = [
                0.0,
                -0.0,
                1.0,
                -1.0,
                0.5,
                -0.5,
                2.0,
                3.0,
                -3.0,
                f64::INFINITY,
                f64::NEG_INFINITY,
                f64::NAN,
                1e-45,
                -1e-45,
                1e-40,
                3.4e38,
                -3.4e38,
                88.7,
                -87.4,
                -103.5,
                0.9999999,
                1.0000001,
                1e-8,
                709.7,
                -745.0,
            ];
            let span = match f {
                ScalarFn::Exp | ScalarFn::Sinh | ScalarFn::Cosh => 110.0,
                ScalarFn::Tanh | ScalarFn::Erf => 10.0,
                ScalarFn::Asin | ScalarFn::Acos | ScalarFn::Atanh => 1.0,
                ScalarFn::Sigmoid | ScalarFn::Softplus => 100.0,
                ScalarFn::Sin | ScalarFn::Cos | ScalarFn::Tan => 1000.0,
                _ => 20.0,
            };
            (0..N)
                .map(|i| {
                    let v = if i < 25 * 25 {
                        corners[if which == 0 { i % 25 } else { i / 25 % 25 }]
                    } else if i % 4 == 0 {
                        // Any magnitude.
                        let e = noise.unit() * if dtype == DType::F64 { 300.0 } else { 37.0 };
                        noise.unit() * 10f64.powf(if matches!(f, ScalarFn::Sin | ScalarFn::Cos | ScalarFn::Tan) { e.min(9.0) } else { e })
                    } else {
                        noise.unit() * span
                    };
                    // Beyond 2^50 a phase is not resolved, by design.
                    let phase = matches!(f, ScalarFn::Sin | ScalarFn::Cos | ScalarFn::Tan) && v.is_finite() && v.abs() > 1e15;
                    Scalar::F(if phase { 1e4 } else { v }).cast(dtype)
                })
                .collect()
        }
        Class::Bool => (0..N).map(|_| Scalar::B(noise.bits() & 1 == 1)).collect(),
        _ => {
            let (lo, hi) = dtype.int_range();
            let corners = [0, 1, 2, 3, -1, -2, lo, hi, lo + 1, hi - 1, 7, 8, 31, 32, 63, 64];
            (0..N)
                .map(|i| {
                    let v = if i < 256 {
                        corners[if which == 0 { i % 16 } else { i / 16 }]
                    } else if i % 2 == 0 {
                        i128::from(noise.bits() as i64)
                    } else {
                        i128::from(noise.bits() as i64) >> 57
                    };
                    Scalar::I(v).cast(dtype)
                })
                .collect()
        }
    }
}

/// Largest distance in last places, and where.
fn measure(lib: &Library, f: ScalarFn, dtype: DType, lanes: usize) -> (i128, String) {
    let mut noise = Noise(f as u64 * 31 + dtype as u64);
    let inputs: Vec<Vec<Scalar>> = (0..f.arity()).map(|i| sample(f, dtype, i, &mut noise)).collect();
    let mut bufs: Vec<Vec<u8>> = inputs
        .iter()
        .enumerate()
        .map(|(i, v)| {
            let mut out = vec![];
            v.iter().for_each(|x| put(&mut out, *x, operand(f, dtype, i)));
            out
        })
        .collect();
    bufs.push(vec![0; N * result(f, dtype).bits() / 8]);
    lib.call(&format!("{f}_{dtype}_{lanes}"), &mut bufs, &[], (0, N as i64));
    let mut worst = (0, String::new());
    for i in 0..N {
        let args: Vec<Scalar> = inputs.iter().map(|v| v[i]).collect();
        // The evaluator's library forgets that large negative numbers have no inverse hyperbolic cosine.
        let beyond = f == ScalarFn::Acosh && args[0].f() < 1.0;
        let want = if beyond { Scalar::F(f64::NAN) } else { f.eval(dtype, &args) };
        let got = get(bufs.last().unwrap(), i, result(f, dtype));
        let off = match (want, got) {
            (Scalar::F(w), Scalar::F(g)) if w.is_nan() && g.is_nan() => 0,
            (Scalar::F(w), Scalar::F(g)) if w.is_nan() || g.is_nan() || (w.is_infinite() != g.is_infinite()) => 1 << 90,
            (Scalar::F(w), Scalar::F(g)) => (rank(w, dtype) - rank(g, dtype)).abs(),
            (w, g) => i128::from(w != g) << 90,
        };
        if off > worst.0 {
            worst = (off, format!("{f} {dtype} of {args:?}: expected {want:?}, got {got:?}"));
        }
    }
    worst
}

fn serves(f: ScalarFn, dtype: DType) -> bool {
    f.infer(&(0..f.arity()).map(|i| operand(f, dtype, i)).collect::<Vec<_>>()).is_ok()
}

/// Last places that a function may be off. A result that both sides round to infinity or not may differ by one step.
fn allowed(f: ScalarFn, dtype: DType) -> i128 {
    use ScalarFn::*;
    match dtype {
        DType::F32 => match f {
            Exp | Log | Sin | Cos | Rsqrt | Erf => 2,
            Tanh | Sigmoid => 3,
            _ => 1,
        },
        DType::F64 => 5,
        _ if matches!(f, Fma) => 1,
        _ => 1,
    }
}

fn hold(dtypes: &[DType]) {
    let mut kernels = vec![];
    let mut rows = vec![];
    for &dtype in dtypes {
        for &f in ScalarFn::ALL {
            if !serves(f, dtype) {
                continue;
            }
            for lanes in [1, LANES] {
                kernels.push(kernel(f, dtype, lanes));
                rows.push((f, dtype, lanes));
            }
        }
    }
    let lib = load(&kernels, "native");
    let mut wrong = vec![];
    for (f, dtype, lanes) in rows {
        let (off, what) = measure(&lib, f, dtype, lanes);
        if std::env::var_os("SHOW_ULP").is_some() {
            println!("{f:>10} {dtype:>6} x{lanes}: {off} {what}");
        }
        if off > allowed(f, dtype) {
            wrong.push(format!("{off} last places: {what} ({lanes} lanes)"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn f32_functions_are_within_their_last_places() {
    hold(&[DType::F32]);
}

#[test]
fn f64_functions_are_within_their_last_places() {
    hold(&[DType::F64]);
}

#[test]
fn small_floats_are_within_one_last_place() {
    hold(&[DType::F16, DType::BF16]);
}

#[test]
fn integer_and_bool_functions_are_exact() {
    hold(&[DType::I64, DType::I32, DType::I8, DType::U8, DType::U16, DType::U64, DType::Bool]);
}
