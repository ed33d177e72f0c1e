//! The analysis against brute force, against the interpreter, and wrong bounds that the interpreter must find.
use super::{Interval, Ranges, apply, decided, limited};
use crate::tile::interp::{run_gpu, run_gpu_within};
use crate::tile::{Access, Builder, Device, Kernel, Op, ReduceFn, Ty, Val};
use pavage_ir::{DType, Scalar, ScalarFn};

struct Noise(u64);

impl Noise {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }

    /// A short interval around 0, or at an end of the numbers.
    fn interval(&mut self) -> Interval {
        let near = [0, 0, 0, 62, i64::from(i32::MAX), i64::from(i32::MIN), i64::MAX - 12, i64::MIN + 12][self.below(8) as usize];
        let lo = near + (self.below(19) as i64 - 9);
        Interval { lo, hi: lo.saturating_add(self.below(7) as i64) }
    }
}

fn eval(f: ScalarFn, x: i64, y: i64) -> Scalar {
    f.eval(DType::I64, &[Scalar::I(x.into()), Scalar::I(y.into())])
}

#[test]
fn every_function_of_two_intervals_holds_what_brute_force_finds() {
    use ScalarFn::*;
    let functions = [Add, Sub, Mul, Div, Rem, Mod, Min, Max, And, Or, Xor, Shl, Shr, Neg, Not, Abs, Sign, Pow];
    let exact = [Add, Sub, Mul, Div, Min, Max, Neg, Not, Abs, Sign];
    let (mut noise, mut folded) = (Noise(5), [0, 0]);
    for round in 0..40_000 {
        let (a, b) = (noise.interval(), noise.interval());
        let f = functions[round % functions.len()];
        let args = if f.arity() == 1 { vec![a] } else { vec![a, b] };
        let range = apply(f, &args);
        let values: Vec<i64> = (a.lo..=a.hi).flat_map(|x| (b.lo..=b.hi).map(move |y| eval(f, x, y).i() as i64)).collect();
        let (lo, hi) = (values.iter().min().copied().unwrap(), values.iter().max().copied().unwrap());
        assert!(range.contains(lo) && range.contains(hi), "{f} of {a:?} and {b:?}: {range:?}, but {lo} to {hi}");
        if exact.contains(&f) && range != Interval::ALL {
            assert_eq!(range, Interval { lo, hi }, "{f} of {a:?} and {b:?}");
        }
        for f in [Lt, Le, Gt, Ge, Eq, Ne] {
            let seen: Vec<bool> = (a.lo..=a.hi).flat_map(|x| (b.lo..=b.hi).map(move |y| eval(f, x, y).b())).collect();
            let want = seen.iter().all(|s| *s == seen[0]).then_some(seen[0]);
            assert_eq!(decided(f, a, b), want, "{f} of {a:?} and {b:?}");
            folded[usize::from(want.is_some())] += 1;
            let left: Vec<i64> = (a.lo..=a.hi).filter(|x| (b.lo..=b.hi).any(|y| eval(f, *x, y).b())).collect();
            let want = left.first().zip(left.last()).map_or(a, |(lo, hi)| Interval { lo: *lo, hi: *hi });
            assert_eq!(limited(f, a, b), want, "{f} of {a:?} and {b:?}");
        }
    }
    assert!(folded.iter().all(|n| *n > 10_000), "{folded:?}");
}

/// Loops that count, carry and search, over a fixed grid of 5 blocks of 64 threads.
fn sample() -> (Kernel, Vec<Val>) {
    let mut b = Builder::new("sample", Device::Gpu);
    b.launch().threads = 64;
    b.launch().grid = [5, 1, 1];
    let (x, y) = (b.arg(DType::I32, Access::Read), b.arg(DType::I64, Access::Write));
    let (block, thread) = (b.block_id(0), b.thread_id());
    let first = b.mul_i(block, 64);
    let at = b.add(first, thread);
    let given = b.load(x, at, 1);
    let given = b.cast(given, DType::I64);
    let (zero, ten) = (b.index(0), b.index(10));
    let turn = b.for_(zero, ten, 3, &[zero, zero], |b, i, carried| {
        // One goes round, one grows.
        let next = b.add_i(carried[0], 1);
        let end = b.index(4);
        let wrap = b.eq(end, next);
        let round = b.select(wrap, zero, next);
        let sum = b.add(carried[1], i);
        vec![round, sum]
    });
    // Narrower integers wrap, or do not.
    let short = b.cast(at, DType::U32);
    let (seven, big) = (b.constant(Scalar::I(7), DType::U32), b.constant(Scalar::I(1 << 24), DType::U32));
    let part = b.rem(short, seven);
    let part = b.cast(part, DType::I64);
    let wrapped = b.mul(short, big);
    let wrapped = b.cast(wrapped, DType::I64);
    let half = b.while_(
        &[at],
        |b, v| {
            let c = b.gt(v[0], ten);
            (c, v.to_vec())
        },
        |b, v| vec![b.div_i(v[0], 2)],
    )[0];
    let low = b.lt(at, ten);
    let picked = b.if_(low, |_| vec![ten], |_| vec![half])[0];
    let all = [turn[0], turn[1], half, picked, given, part, wrapped];
    let ty = Ty::of_lanes(DType::I64, 16);
    let lanes: Vec<Val> = all.iter().chain([&at, &block, &thread]).chain(&all[..6]).copied().collect();
    let packed = b.pack(&lanes, ty);
    let sum = b.reduce(ReduceFn::Add, packed);
    b.store(y, at, sum);
    let kernel = b.finish();
    // Values are numbered anew at the end: they are found again as the operands of the pack.
    let mut found = vec![];
    kernel.walk(&mut |s| {
        if s.op == Op::Pack {
            found = s.args[..10].to_vec();
        }
    });
    (kernel, found)
}

fn run(kernel: &Kernel, ranges: &Ranges) -> Result<(), String> {
    let data: Vec<u8> = (0..320i32).flat_map(|i| (i * 7919 - 999_999).to_le_bytes()).collect();
    run_gpu_within(kernel, ranges, &mut [data, vec![0; 320 * 8]], &[], [5, 1, 1], 1).map_err(|e| e.to_string())
}

#[test]
fn loops_branches_and_casts_have_intervals_that_hold() {
    let (kernel, values) = sample();
    let ranges = Ranges::of(&kernel);
    let [round, sum, half, picked, given, part, wrapped, at, block, thread] = values[..] else { panic!("{values:?}") };
    let is = |v, lo, hi| assert_eq!(ranges.get(v), Interval { lo, hi }, "{v} of\n{kernel}");
    is(round, 0, 3);
    is(sum, i64::MIN, i64::MAX);
    is(half, 0, 319);
    is(picked, 0, 319);
    is(given, i64::from(i32::MIN), i64::from(i32::MAX));
    is(part, 0, 6);
    is(wrapped, 0, i64::from(u32::MAX));
    is(at, 0, 319);
    is(block, 0, 4);
    is(thread, 0, 63);
    run(&kernel, &ranges).unwrap();
}

#[test]
fn bounds_that_are_wrong_are_found_and_so_is_a_larger_grid() {
    let (kernel, values) = sample();
    for v in &values {
        for wrong in [|r: Interval| Interval { lo: r.lo, hi: 2 }, |r: Interval| Interval { lo: 8, hi: r.hi }] {
            let mut ranges = Ranges::of(&kernel);
            ranges.plant(*v, wrong(ranges.get(*v)));
            let e = run(&kernel, &ranges).expect_err("a wrong bound");
            assert!(e.contains("not from") && e.contains(&format!("{v} is")), "{e}");
        }
    }
    let e = run_gpu(&kernel, &mut [vec![0; 4 * 384], vec![0; 8 * 384]], &[], [6, 1, 1], 1).expect_err("six blocks");
    assert!(e.to_string().contains("at most [5, 1, 1] blocks"), "{e}");
}

#[test]
fn quotients_that_are_folded_are_those_that_division_gives() {
    let (cases, threads) = (400, 64);
    let mut noise = Noise(11);
    let mut b = Builder::new("quotients", Device::Gpu);
    b.launch().threads = threads as u32;
    let out = b.arg(DType::I64, Access::Write);
    let (block, thread) = (b.block_id(0), b.thread_id());
    let mut pool = vec![block, thread];
    let first = b.mul_i(thread, 4 * cases as i64);
    let mut divisors = vec![];
    for i in 0..cases as i64 {
        let mut pick = |of: &[i64]| of[noise.below(of.len() as u64) as usize];
        let (m, c, k) =
            (pick(&[1, 2, 3, 4, 8, 12, 64, -4]), pick(&[0, 0, 1, 2, 3, 4, 7, 16, 17, 48, 256, -1, -8]), pick(&[1, 2, 3, 4, 6, 8, 12, 16, 64, 1024, -4]));
        let from = pool[noise.below(pool.len() as u64) as usize];
        let x = b.mul_i(from, m);
        let x = b.add_i(x, c);
        let divisor = b.index(k);
        let (q, r, f) = (b.div(x, divisor), b.rem(x, divisor), b.map(ScalarFn::Mod, &[x, divisor]));
        for (j, v) in [x, q, r, f].into_iter().enumerate() {
            let at = b.add_i(first, 4 * i + j as i64);
            b.store(out, at, v);
        }
        pool.extend([x, q, r]);
        divisors.push(k);
    }
    let kernel = b.finish();
    let mut bufs = [vec![0; threads * cases * 32]];
    run_gpu(&kernel, &mut bufs, &[], [1, 1, 1], 1).unwrap();
    let numbers: Vec<i64> = bufs[0].chunks(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
    for (i, got) in numbers.chunks(4).enumerate() {
        let (x, k) = (got[0], divisors[i % cases]);
        let want = [ScalarFn::Div, ScalarFn::Rem, ScalarFn::Mod].map(|f| eval(f, x, k).i() as i64);
        assert_eq!(got[1..], want, "{x} by {k}, case {}", i % cases);
    }
    let mut divisions = 0;
    kernel.walk(&mut |s| divisions += usize::from(matches!(s.op, Op::Map(ScalarFn::Div | ScalarFn::Rem | ScalarFn::Mod))));
    assert!(divisions < 2 * cases, "{divisions} divisions are left of {}", 3 * cases);
}
