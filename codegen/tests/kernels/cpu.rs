//! Hand-built kernels, compiled for each level this machine runs, against the interpreter and plain Rust.
use crate::common::{Noise, bytes, levels, load, numbers};
use pavage_codegen::{
    compile,
    llvm::{Emit, MiddleEnd},
    targets::Target,
    tile::{Access, Buf, Builder, Device, DotKind, Kernel, ReduceFn, Space, Ty, Val, check, interp, text::assert_round_trip},
};
use pavage_ir::{DType, Scalar, ScalarFn};

/// Run compiled (at every level) and interpreted; the bytes of all must agree. The buffers after the run.
fn run(kernel: &Kernel, bufs: &[Vec<u8>], dims: &[i64], slice: (i64, i64)) -> Vec<Vec<u8>> {
    let mut expected = bufs.to_vec();
    interp::run_cpu(kernel, &mut expected, dims, slice).unwrap_or_else(|e| panic!("{e}\n{kernel}"));
    for level in levels() {
        let mut got = bufs.to_vec();
        load(std::slice::from_ref(kernel), level).call(&kernel.name, &mut got, dims, slice);
        for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
            assert!(g == e, "{} on {level}: buffer {i} differs from the interpreter's", kernel.name);
        }
    }
    expected
}

/// As [`run`] for kernels with elementary functions: floats of the last buffer may be off by a few last places.
fn run_close(kernel: &Kernel, bufs: &[Vec<u8>], dims: &[i64], slice: (i64, i64)) -> Vec<f32> {
    let mut expected = bufs.to_vec();
    interp::run_cpu(kernel, &mut expected, dims, slice).unwrap_or_else(|e| panic!("{e}\n{kernel}"));
    let want: Vec<f32> = numbers(expected.last().unwrap());
    for level in levels() {
        let mut got = bufs.to_vec();
        load(std::slice::from_ref(kernel), level).call(&kernel.name, &mut got, dims, slice);
        let got: Vec<f32> = numbers(got.last().unwrap());
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            assert!((g - w).abs() <= 2e-6 * w.abs().max(1e-30), "{} on {level}: element {i}: {g} and {w}", kernel.name);
        }
    }
    want
}

fn cpu(name: &str) -> Builder {
    Builder::new(name, Device::Cpu { lanes: 8 })
}

/// `y = 2.5 x + y` with a masked tail.
fn saxpy() -> Kernel {
    let mut b = cpu("saxpy");
    let (x, y) = (b.arg(DType::F32, Access::Read), b.arg(DType::F32, Access::ReadWrite));
    let (lo, hi) = (b.lo(), b.hi());
    let k = b.float(2.5, DType::F32);
    let span = b.sub(hi, lo);
    let rest = b.rem_i(span, 8);
    let main = b.sub(hi, rest);
    b.for_(lo, main, 8, &[], |b, i, _| {
        let (xv, yv) = (b.load(x, i, 8), b.load(y, i, 8));
        let r = b.fma(k, xv, yv);
        b.store(y, i, r);
        vec![]
    });
    let xv = b.load_upto(x, main, 8, rest);
    let yv = b.load_upto(y, main, 8, rest);
    let r = b.fma(k, xv, yv);
    b.store_upto(y, main, r, rest);
    b.finish()
}

#[test]
fn saxpy_does_its_tail() {
    let mut noise = Noise(1);
    for n in [0, 5, 6, 12, 13, 1003] {
        let (x, y) = (noise.floats(1003), noise.floats(1003));
        let out = run(&saxpy(), &[bytes(&x), bytes(&y)], &[], (n.min(5), n));
        let got: Vec<f32> = numbers(&out[1]);
        for i in 0..1003 {
            let inside = (n.min(5)..n).contains(&(i as i64));
            assert_eq!(got[i], if inside { 2.5f32.mul_add(x[i], y[i]) } else { y[i] }, "element {i} of {n}");
        }
    }
}

/// Rows `lo..hi` of a matrix with `dim` columns (a multiple of 8).
fn softmax() -> Kernel {
    let mut b = cpu("softmax");
    let (x, y) = (b.arg(DType::F32, Access::Read), b.arg(DType::F32, Access::Write));
    let n = b.dim();
    let (lo, hi, zero) = (b.lo(), b.hi(), b.index(0));
    b.for_(lo, hi, 1, &[], |b, row, _| {
        let start = b.mul(row, n);
        let least = b.constant_of(Scalar::F(f64::NEG_INFINITY), Ty::Vec(DType::F32, 8));
        let top = b.for_(zero, n, 8, &[least], |b, i, c| {
            let at = b.add(start, i);
            let v = b.load(x, at, 8);
            vec![b.max(c[0], v)]
        });
        let top = b.reduce(ReduceFn::Max, top[0]);
        let none = b.constant_of(Scalar::F(0.0), Ty::Vec(DType::F32, 8));
        let sum = b.for_(zero, n, 8, &[none], |b, i, c| {
            let at = b.add(start, i);
            let v = b.load(x, at, 8);
            let top = b.splat(top, 8);
            let d = b.sub(v, top);
            let e = b.map(ScalarFn::Exp, &[d]);
            b.store(y, at, e);
            vec![b.add(c[0], e)]
        });
        let sum = b.reduce(ReduceFn::Add, sum[0]);
        let scale = b.map(ScalarFn::Recip, &[sum]);
        b.for_(zero, n, 8, &[], |b, i, _| {
            let at = b.add(start, i);
            let v = b.load(y, at, 8);
            let r = b.mul(v, scale);
            b.store(y, at, r);
            vec![]
        });
        vec![]
    });
    let mut k = b.finish();
    // Written, then read back.
    k.bufs[1].access = Access::ReadWrite;
    k
}

#[test]
fn softmax_rows_sum_to_one() {
    let mut noise = Noise(2);
    let x: Vec<f32> = noise.floats(5 * 64).iter().map(|v| v * 30.0).collect();
    let got = run_close(&softmax(), &[bytes(&x), bytes(&vec![0f32; 5 * 64])], &[64], (0, 5));
    for row in 0..5 {
        let r = &x[row * 64..][..64];
        let top = r.iter().fold(f32::MIN, |a, b| a.max(*b));
        let sum: f64 = r.iter().map(|v| f64::from(v - top).exp()).sum();
        for (i, v) in r.iter().enumerate() {
            let want = f64::from(v - top).exp() / sum;
            assert!((f64::from(got[row * 64 + i]) - want).abs() < 1e-6);
        }
    }
}

/// `mr x (nv * lanes)` tile of `c = a b`: a is `[mr][k]`, b packed `[k][nv * lanes]`.
fn gemm_tile(name: &str, lanes: usize, mr: i64, nv: i64) -> Kernel {
    let mut b = Builder::new(name, Device::Cpu { lanes: lanes as u16 });
    let (a, w) = (b.arg(DType::F32, Access::Read), b.arg(DType::F32, Access::Read));
    let c = b.arg(DType::F32, Access::Write);
    let k = b.dim();
    let zero = b.index(0);
    let none = b.constant_of(Scalar::F(0.0), Ty::Vec(DType::F32, lanes as u16));
    let width = nv * lanes as i64;
    let rows: Vec<Val> = (0..mr).map(|i| b.mul_i(k, i)).collect();
    let init = vec![none; (mr * nv) as usize];
    let acc = b.for_(zero, k, 1, &init, |b, p, acc| {
        let base = b.mul_i(p, width);
        let bv: Vec<Val> = (0..nv)
            .map(|j| {
                let at = b.add_i(base, j * lanes as i64);
                b.load(w, at, lanes)
            })
            .collect();
        let mut next = vec![];
        for (i, row) in rows.iter().enumerate() {
            let at = b.add(*row, p);
            let s = b.load(a, at, 1);
            for (j, v) in bv.iter().enumerate() {
                next.push(b.fma(s, *v, acc[i * nv as usize + j]));
            }
        }
        next
    });
    for i in 0..mr {
        for j in 0..nv {
            let at = b.index(i * width + j * lanes as i64);
            b.store(c, at, acc[(i * nv + j) as usize]);
        }
    }
    b.finish()
}

#[test]
fn gemm_tile_is_the_product() {
    let mut noise = Noise(3);
    for (lanes, mr, nv) in [(8, 6, 2), (16, 12, 2)] {
        let width = nv * lanes;
        let (a, w) = (noise.floats(mr * 37), noise.floats(37 * width));
        let kernel = gemm_tile("gemm", lanes, mr as i64, nv as i64);
        let out = run(&kernel, &[bytes(&a), bytes(&w), bytes(&vec![0f32; mr * width])], &[37], (0, 1));
        let got: Vec<f32> = numbers(&out[2]);
        for i in 0..mr {
            for j in 0..width {
                let want = (0..37).fold(0f32, |s, p| a[i * 37 + p].mul_add(w[p * width + j], s));
                assert_eq!(got[i * width + j], want);
            }
        }
    }
}

#[test]
fn gemm_tiles_do_not_spill() {
    for (level, lanes, mr, nv) in [("x86-64-v3", 8, 6, 2), ("x86-64-v3", 8, 4, 3), ("x86-64-v4", 16, 12, 2)] {
        let target = Target::parse(level).unwrap();
        let kernel = gemm_tile("gemm", lanes, mr, nv);
        let needs = check::check(&kernel, &target.limits()).unwrap();
        assert!(needs.fits(&target.limits()), "{level}: {needs}");
        let text = compile::cpu_mlir(&[kernel], &target).unwrap();
        let assembly = String::from_utf8(compile::emit(&text, &target, MiddleEnd::None, Emit::Assembly).unwrap()).unwrap();
        let spills: Vec<&str> = assembly.lines().filter(|l| (l.contains("ymm") || l.contains("zmm")) && (l.contains("(%rsp") || l.contains("(%rbp"))).collect();
        assert!(spills.is_empty(), "{level} {mr}x{nv}: {spills:?}");
    }
    let target = Target::parse("x86-64-v3").unwrap();
    let needs = check::check(&gemm_tile("wide", 8, 8, 2), &target.limits()).unwrap();
    assert!(!needs.fits(&target.limits()), "{needs} should not fit 16 registers");
}

/// `out[i] = table[index[i]]`, zero where the index is negative.
fn gather(indices: DType) -> Kernel {
    let mut b = cpu("gather");
    let (index, table) = (b.arg(indices, Access::Read), b.arg(DType::F32, Access::Read));
    let out = b.arg(DType::F32, Access::Write);
    let (lo, hi) = (b.lo(), b.hi());
    b.for_(lo, hi, 8, &[], |b, i, _| {
        let iv = b.load(index, i, 8);
        let zero = b.constant(Scalar::I(0), indices);
        let ok = b.ge(iv, zero);
        let v = b.gather(table, iv, Some(ok));
        b.store(out, i, v);
        vec![]
    });
    b.finish()
}

#[test]
fn gather_skips_what_is_masked() {
    let mut noise = Noise(4);
    let table = noise.floats(100);
    let picks: Vec<i64> = (0..64).map(|_| (noise.bits() % 130) as i64 - 30).collect();
    let narrow: Vec<i32> = picks.iter().map(|v| *v as i32).collect();
    for (dtype, index) in [(DType::I64, bytes(&picks)), (DType::I32, bytes(&narrow))] {
        let out = run(&gather(dtype), &[index, bytes(&table), bytes(&[9f32; 64])], &[], (0, 64));
        let got: Vec<f32> = numbers(&out[2]);
        for (g, p) in got.iter().zip(&picks) {
            assert_eq!(*g, if *p < 0 { 0.0 } else { table[*p as usize] });
        }
    }
}

/// Steps of the Collatz walk of each number, by a `while` in an `if`.
fn collatz() -> Kernel {
    let mut b = cpu("collatz");
    let (x, y) = (b.arg(DType::I64, Access::Read), b.arg(DType::I64, Access::Write));
    let (lo, hi, one) = (b.lo(), b.hi(), b.index(1));
    b.for_(lo, hi, 1, &[], |b, i, _| {
        let v = b.load(x, i, 1);
        let positive = b.gt(v, one);
        let steps = b.if_(
            positive,
            |b| {
                let zero = b.index(0);
                let r = b.while_(
                    &[v, zero],
                    |b, c| {
                        let more = b.gt(c[0], one);
                        (more, c.to_vec())
                    },
                    |b, c| {
                        let odd = b.rem_i(c[0], 2);
                        let is_odd = b.eq(odd, one);
                        let half = b.div_i(c[0], 2);
                        let three = b.mul_i(c[0], 3);
                        let up = b.add_i(three, 1);
                        let next = b.select(is_odd, up, half);
                        vec![next, b.add_i(c[1], 1)]
                    },
                );
                vec![r[1]]
            },
            |b| vec![b.index(-1)],
        );
        b.store(y, i, steps[0]);
        vec![]
    });
    b.finish()
}

#[test]
fn while_loops_walk() {
    let x: Vec<i64> = (-3..60).collect();
    let out = run(&collatz(), &[bytes(&x), bytes(&vec![0i64; 63])], &[], (0, 63));
    let got: Vec<i64> = numbers(&out[1]);
    for (g, v) in got.iter().zip(x) {
        let (mut n, mut steps) = (v, if v > 1 { 0 } else { -1 });
        while n > 1 {
            n = if n % 2 == 1 { 3 * n + 1 } else { n / 2 };
            steps += 1;
        }
        assert_eq!(*g, steps);
    }
}

/// `out = (a > b) xor c` on bool bytes, and whether any is set.
fn masks() -> Kernel {
    let mut b = cpu("masks");
    let (x, y, c) = (b.arg(DType::F32, Access::Read), b.arg(DType::F32, Access::Read), b.arg(DType::Bool, Access::Read));
    let (out, any) = (b.arg(DType::Bool, Access::Write), b.arg(DType::Bool, Access::Write));
    let (lo, hi) = (b.lo(), b.hi());
    let none = b.constant(Scalar::B(false), DType::Bool);
    let seen = b.for_(lo, hi, 16, &[none], |b, i, seen| {
        let (xv, yv, cv) = (b.load(x, i, 16), b.load(y, i, 16), b.load(c, i, 16));
        let gt = b.gt(xv, yv);
        let r = b.xor(gt, cv);
        b.store(out, i, r);
        let some = b.reduce(ReduceFn::Or, r);
        vec![b.or(seen[0], some)]
    });
    let zero = b.index(0);
    b.store(any, zero, seen[0]);
    b.finish()
}

#[test]
fn bools_are_bytes_in_memory() {
    let mut noise = Noise(5);
    let (x, y) = (noise.floats(64), noise.floats(64));
    let c: Vec<u8> = (0..64).map(|_| (noise.bits() & 1) as u8).collect();
    let out = run(&masks(), &[bytes(&x), bytes(&y), c.clone(), vec![7; 64], vec![7]], &[], (0, 64));
    for i in 0..64 {
        assert_eq!(out[3][i], u8::from((x[i] > y[i]) ^ (c[i] == 1)));
    }
    assert_eq!(out[4][0], 1);
}

/// `acc + u8 . i8` in groups of four, and the other two dot words.
fn dots(lanes: usize) -> Kernel {
    let mut b = cpu("dots");
    let (u, s, w) = (b.arg(DType::U8, Access::Read), b.arg(DType::I8, Access::Read), b.arg(DType::I16, Access::Read));
    let (quads, pairs, sat) = (b.arg(DType::I32, Access::ReadWrite), b.arg(DType::I32, Access::Write), b.arg(DType::I16, Access::Write));
    let zero = b.index(0);
    let (uv, sv) = (b.load(u, zero, 4 * lanes), b.load(s, zero, 4 * lanes));
    let acc = b.load(quads, zero, lanes);
    let q = b.dot(DotKind::U8I8Quads, &[acc, uv, sv]);
    b.store(quads, zero, q);
    let wv = b.load(w, zero, 2 * lanes);
    let p = b.dot(DotKind::I16Pairs, &[wv, wv]);
    b.store(pairs, zero, p);
    let t = b.dot(DotKind::U8I8PairsSat, &[uv, sv]);
    b.store(sat, zero, t);
    b.finish()
}

#[test]
fn integer_dots_are_exact() {
    let mut noise = Noise(6);
    for lanes in [8usize, 16, 32] {
        let u: Vec<u8> = (0..4 * lanes).map(|i| if i < 8 { 255 } else { noise.bits() as u8 }).collect();
        let s: Vec<i8> = (0..4 * lanes).map(|i| if i < 8 { -128 } else { noise.bits() as i8 }).collect();
        let w: Vec<i16> = (0..2 * lanes).map(|i| if i < 2 { -32768 } else { noise.bits() as i16 }).collect();
        let acc: Vec<i32> = (0..lanes).map(|_| noise.bits() as i32).collect();
        let bufs = [u.clone(), bytes(&s), bytes(&w), bytes(&acc), vec![0; 4 * lanes], vec![0; 4 * lanes]];
        let out = run(&dots(lanes), &bufs, &[], (0, 1));
        let got: Vec<i32> = numbers(&out[3]);
        for i in 0..lanes {
            let sum: i32 = (4 * i..4 * i + 4).map(|j| i32::from(u[j]) * i32::from(s[j])).sum();
            assert_eq!(got[i], acc[i].wrapping_add(sum));
        }
    }
}

/// `out = a * b + c` of 16-bit floats, computed in `f32`.
fn half(dtype: DType) -> Kernel {
    let mut b = cpu("half");
    let (x, y) = (b.arg(dtype, Access::Read), b.arg(dtype, Access::Read));
    let out = b.arg(dtype, Access::Write);
    let (lo, hi) = (b.lo(), b.hi());
    b.for_(lo, hi, 16, &[], |b, i, _| {
        let (xv, yv) = (b.load(x, i, 16), b.load(y, i, 16));
        let (xw, yw) = (b.cast(xv, DType::F32), b.cast(yv, DType::F32));
        let r = b.fma(xw, yw, xw);
        let r = b.cast(r, dtype);
        b.store(out, i, r);
        vec![]
    });
    b.finish()
}

#[test]
fn half_floats_round_to_even() {
    let mut noise = Noise(7);
    // Every kind of bits: infinities, NaN-free, subnormals.
    let f16: Vec<half::f16> = (0..1024).map(|_| half::f16::from_bits(noise.bits() as u16)).map(|v| if v.is_nan() { half::f16::ONE } else { v }).collect();
    let bf16: Vec<half::bf16> = (0..1024).map(|_| half::bf16::from_bits(noise.bits() as u16)).map(|v| if v.is_nan() { half::bf16::ONE } else { v }).collect();
    for (dtype, data) in [(DType::F16, bytes(&f16)), (DType::BF16, bytes(&bf16))] {
        let (x, y) = (data[..1024].to_vec(), data[1024..].to_vec());
        let mut expected = vec![x.clone(), y.clone(), vec![0; 1024]];
        interp::run_cpu(&half(dtype), &mut expected, &[], (0, 512)).unwrap();
        for level in levels() {
            let mut got = vec![x.clone(), y.clone(), vec![0; 1024]];
            load(&[half(dtype)], level).call("half", &mut got, &[], (0, 512));
            for i in 0..512 {
                let (g, w) = (u16::from_le_bytes([got[2][2 * i], got[2][2 * i + 1]]), u16::from_le_bytes([expected[2][2 * i], expected[2][2 * i + 1]]));
                let nan = |v: u16| if dtype == DType::F16 { half::f16::from_bits(v).is_nan() } else { half::bf16::from_bits(v).is_nan() };
                assert!(g == w || (nan(g) && nan(w)), "{dtype} {level} element {i}: {g:04x} and {w:04x}");
            }
        }
    }
}

/// Convert and convert back, through every pair of the listed types.
fn conversions(from: DType, to: DType) -> Kernel {
    let mut b = cpu("convert");
    let (x, y) = (b.arg(from, Access::Read), b.arg(to, Access::Write));
    let (lo, hi) = (b.lo(), b.hi());
    b.for_(lo, hi, 8, &[], |b, i, _| {
        let v = b.load(x, i, 8);
        let r = b.cast(v, to);
        b.store(y, i, r);
        vec![]
    });
    b.finish()
}

#[test]
fn conversions_are_those_of_scalar() {
    use DType::*;
    let types = [F64, F32, F16, BF16, F8E4M3, F8E5M2, F8E4M3Fnuz, F8E5M2Fnuz, F8E8M0, F4E2M1, I64, I32, I8, U64, U8, U4, I4, I2, U2, Bool];
    let mut noise = Noise(8);
    for from in types {
        let mut kernels = vec![];
        for to in types.into_iter().filter(|t| *t != from) {
            let mut k = conversions(from, to);
            k.name = format!("convert_{from}_{to}");
            kernels.push((k, to));
        }
        let all: Vec<Kernel> = kernels.iter().map(|(k, _)| k.clone()).collect();
        let lib = load(&all, "native");
        let n = 512;
        // Plain numbers and arbitrary bits alike; NaN payloads may differ.
        let values = (0..n).map(|i| {
            let s = Scalar::F(if i % 2 == 0 { noise.unit() * 300.0 } else { noise.unit() * 10f64.powf(noise.unit() * 12.0) });
            if from.is_float() { s } else { Scalar::I(i128::from(noise.bits() as i64) >> (i % 60)).cast(from) }
        });
        let data = pavage_ir::Tensor::from_scalars(from, [n], values.collect::<Vec<_>>()).bytes().to_vec();
        for (k, to) in kernels {
            let bufs = vec![data.clone(), vec![0; to.bytes(n)]];
            let (mut got, mut want) = (bufs.clone(), bufs);
            interp::run_cpu(&k, &mut want, &[], (0, n as i64)).unwrap();
            lib.call(&k.name, &mut got, &[], (0, n as i64));
            let w = to.bits().max(8) / 8;
            let nan = |bytes: &[u8]| to.is_float() && to.bits() >= 8 && pavage_ir::Tensor::new(to, [1], bytes.to_vec()).unwrap().get(0).f().is_nan();
            let same = |g: &[u8], w: &[u8]| g == w || nan(g) && nan(w);
            let off: Vec<usize> = (0..got[1].len() / w).filter(|i| !same(&got[1][i * w..][..w], &want[1][i * w..][..w])).collect();
            // f64 to 16 bits goes through f32: a tie may fall the other way once in a thousand times.
            let twice = from == F64 && to.is_float() && to.bits() <= 16 || from.is_int() && from.bits() == 64 && matches!(to, F16 | BF16);
            assert!(
                off.is_empty() || twice && off.len() < 4,
                "{}: {} elements differ, first {:?}",
                k.name,
                off.len(),
                off.first().map(|i| (&got[1][i * w..][..w], &want[1][i * w..][..w]))
            );
        }
    }
}

/// Shuffles, packs and inserts: reverse pairs, then put lane 3 first.
fn lanes_about() -> Kernel {
    let mut b = cpu("lanes_about");
    let (x, y) = (b.arg(DType::I32, Access::Read), b.arg(DType::I32, Access::Write));
    let zero = b.index(0);
    let at = b.index(8);
    let (v, w) = (b.load(x, zero, 8), b.load(x, at, 8));
    let s = b.shuffle(v, w, &[1, 0, 11, 10, 5, 4, 15, 14]);
    let three = b.extract(s, 3);
    let s = b.insert(s, 0, three);
    let i = b.iota(DType::I32, 8);
    let r = b.add(s, i);
    let all = b.reduce(ReduceFn::Add, r);
    let least = b.reduce(ReduceFn::Min, r);
    b.store(y, zero, r);
    b.store(y, at, all);
    let next = b.index(9);
    let p = b.pack(&[least, all], Ty::Vec(DType::I32, 2));
    b.store(y, next, p);
    b.finish()
}

#[test]
fn lanes_go_where_they_are_sent() {
    let x: Vec<i32> = (0..16).map(|i| i * i - 20).collect();
    let out = run(&lanes_about(), &[bytes(&x), bytes(&[0i32; 11])], &[], (0, 1));
    let got: Vec<i32> = numbers(&out[1]);
    let mut want: Vec<i32> = [1, 0, 11, 10, 5, 4, 15, 14].iter().map(|i| x[*i]).collect();
    want[0] = want[3];
    for (i, w) in want.iter_mut().enumerate() {
        *w += i as i32;
    }
    assert_eq!(&got[..8], &want[..]);
    assert_eq!(got[8], want.iter().sum::<i32>());
    assert_eq!(got[9], *want.iter().min().unwrap());
}

/// Transposes 8x8 through scratch, and scatters the diagonal.
fn scratch() -> Kernel {
    let mut b = cpu("scratch");
    let (x, y, d) = (b.arg(DType::F32, Access::Read), b.arg(DType::F32, Access::Write), b.arg(DType::F32, Access::Write));
    let _pad = b.alloc(Space::Local, DType::U8, 3);
    let tile = b.alloc(Space::Local, DType::F32, 64);
    let (zero, eight) = (b.index(0), b.index(8));
    let copy = |b: &mut Builder, from: Buf, to: Buf| {
        b.for_(zero, eight, 1, &[], |b, i, _| {
            let row = b.mul_i(i, 8);
            for j in 0..8 {
                let at = b.add_i(row, j);
                let v = b.load(from, at, 1);
                let to_at = b.add_i(i, 8 * j);
                b.store(to, to_at, v);
            }
            vec![]
        });
    };
    copy(&mut b, x, tile);
    b.for_(zero, eight, 1, &[], |b, i, _| {
        let row = b.mul_i(i, 8);
        let v = b.load(tile, row, 8);
        b.store(y, row, v);
        vec![]
    });
    let v = b.load(x, zero, 8);
    let i = b.iota(DType::I64, 8);
    let nine = b.index(9);
    let at = b.mul(i, nine);
    b.scatter(d, at, v, None);
    b.finish()
}

#[test]
fn scratch_is_the_threads_own() {
    let x = Noise(9).floats(64);
    let kernel = scratch();
    assert!(kernel.needs_scratch() && kernel.scratch_bytes() == 64 + 256);
    let out = run(&kernel, &[bytes(&x), bytes(&[0f32; 64]), bytes(&[0f32; 64])], &[], (0, 1));
    let (y, d): (Vec<f32>, Vec<f32>) = (numbers(&out[1]), numbers(&out[2]));
    for i in 0..64 {
        assert_eq!(y[i], x[i % 8 * 8 + i / 8]);
        assert_eq!(d[i], if i % 9 == 0 { x[i / 9] } else { 0.0 });
    }
}

#[test]
fn code_does_not_depend_on_the_thread_count() {
    let kernels: Vec<Kernel> = (0..6)
        .map(|i| {
            let mut k = softmax();
            k.name = format!("softmax_{i}");
            k
        })
        .collect();
    let target = Target::parse("x86-64-v3").unwrap();
    let one = compile::cpu_library(&kernels, &target, MiddleEnd::None, 1).unwrap();
    assert_eq!(one, compile::cpu_library(&kernels, &target, MiddleEnd::None, 3).unwrap());
    assert_eq!(one, compile::cpu_library(&kernels, &target, MiddleEnd::None, 1).unwrap());
}

#[test]
fn wrong_kernels_are_refused() {
    let target = Target::parse("x86-64-v3").unwrap();
    let good = saxpy().to_string();
    let refuse = |from: &str, to: &str, why: &str| {
        let text = good.replacen(from, to, 1);
        assert_ne!(text, good, "{from} is not in the text");
        let said = match pavage_codegen::tile::text::parse(&text) {
            Err(e) => e.to_string(),
            Ok(k) => check::check(&k, &target.limits()).expect_err(&text).to_string(),
        };
        assert!(said.contains(why), "{said}");
    };
    refuse("global read f32", "global write f32", "declared `write`");
    refuse("<8 x f32> = load", "<8 x f16> = load", "beside a buffer of f32");
    refuse("= fma", "= fmaa", "unknown operation");
    refuse("const[value=2.5]", "const[value=2]", "is no f32");
    refuse("@1: global readwrite", "@1: shared", "no shared memory on the CPU");
    refuse("= lo", "= thread_id", "is for GPU kernels");
    refuse("lanes=8", "threads=8", "needs `lanes=`");
    assert_round_trip(&saxpy());
}

/// Copies `count` of 16 elements, one lane or all at a time, and adds 1 to a counter for each.
fn tails(dtype: DType, lanes: usize) -> Kernel {
    let mut b = cpu("tails");
    let (x, y, n) = (b.arg(dtype, Access::Read), b.arg(dtype, Access::Write), b.arg(DType::I32, Access::ReadWrite));
    let count = b.dim();
    let (zero, end) = (b.index(0), b.index(16));
    let one = b.constant(Scalar::I(1), DType::I32);
    b.for_(zero, end, lanes as i64, &[], |b, i, _| {
        let rest = b.sub(count, i);
        let v = b.load_upto(x, i, lanes, rest);
        b.store_upto(y, i, v, rest);
        let (at, some) = (b.index(0), b.gt(rest, zero));
        b.when(some, |b| b.atomic_add(n, at, one));
        vec![]
    });
    b.finish()
}

#[test]
fn tails_touch_only_what_is_there() {
    let mut noise = Noise(13);
    let dtypes = [DType::F64, DType::F32, DType::F16, DType::BF16, DType::F8E4M3, DType::I64, DType::I32, DType::I16, DType::U8, DType::Bool];
    let mut kernels = vec![];
    for dtype in dtypes {
        for lanes in [1usize, 8, 16] {
            let mut k = tails(dtype, lanes);
            k.name = format!("tails_{dtype}_{lanes}");
            kernels.push((k, dtype, lanes));
        }
    }
    let all: Vec<Kernel> = kernels.iter().map(|(k, ..)| k.clone()).collect();
    let libraries: Vec<_> = levels().into_iter().map(|l| load(&all, l)).collect();
    for (kernel, dtype, lanes) in kernels {
        for count in [-2i64, 0, 1, 7, 8, 15, 16, 90] {
            let (have, w) = (count.clamp(0, 16) as usize, dtype.bytes(1));
            let x: Vec<u8> = (0..16 * w).map(|_| noise.bits() as u8 & if dtype == DType::Bool { 1 } else { 0x3f }).collect();
            let bufs = vec![x.clone(), vec![0; x.len()], vec![0; 4]];
            let mut expected = bufs.clone();
            interp::run_cpu(&kernel, &mut expected, &[count], (0, 1)).unwrap();
            for library in &libraries {
                let mut got = bufs.clone();
                library.call(&kernel.name, &mut got, &[count], (0, 1));
                assert!(got == expected, "{} of {count}", kernel.name);
            }
            assert_eq!(expected[1][..have * w], x[..have * w]);
            assert!(expected[1][have * w..].iter().all(|b| *b == 0));
            assert_eq!(numbers::<i32>(&expected[2])[0], have.div_ceil(lanes) as i32);
        }
    }
}

#[test]
fn mangled_text_is_refused_or_meaningful_never_a_panic() {
    let mut noise = Noise(10);
    let limits = Target::parse("x86-64-v3").unwrap().limits();
    let texts: Vec<String> = [saxpy(), collatz(), softmax(), scratch(), lanes_about(), masks()].iter().map(Kernel::to_string).collect();
    let (mut parsed, mut sound) = (0, 0);
    for round in 0..6000 {
        let mut lines: Vec<String> = texts[round % texts.len()].lines().map(str::to_owned).collect();
        for _ in 0..1 + noise.bits() % 2 {
            let (i, j) = (noise.bits() as usize % lines.len(), noise.bits() as usize % lines.len());
            match noise.bits() % 5 {
                0 => drop(lines.remove(i)),
                1 => lines.swap(i, j),
                2 => lines.insert(i, lines[j].clone()),
                3 => {
                    // One word for another.
                    let words: Vec<&str> = lines[j].split(' ').collect();
                    let word = words[noise.bits() as usize % words.len()].to_owned();
                    let mut to: Vec<&str> = lines[i].split(' ').collect();
                    let at = noise.bits() as usize % to.len();
                    to[at] = &word;
                    lines[i] = to.join(" ");
                }
                _ => {
                    let mut bytes = lines[i].clone().into_bytes();
                    if !bytes.is_empty() {
                        let at = noise.bits() as usize % bytes.len();
                        bytes[at] = b' ' + (noise.bits() % 95) as u8;
                    }
                    lines[i] = String::from_utf8(bytes).unwrap();
                }
            }
        }
        let Ok(kernel) = pavage_codegen::tile::text::parse(&lines.join("\n")) else { continue };
        parsed += 1;
        if check::check(&kernel, &limits).is_err() {
            continue;
        }
        sound += 1;
        assert_round_trip(&kernel);
        compile::cpu_mlir(&[kernel], &Target::parse("x86-64-v3").unwrap()).map(drop).unwrap_or_default();
    }
    assert!(parsed > 500 && sound > 100, "the test has lost its teeth: {parsed} parsed, {sound} sound");
}
