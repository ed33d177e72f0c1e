//! The interpreter on GPU kernels: what threads do together, and the mistakes it finds.
use crate::common::{Noise, bytes, numbers};
use pavage_codegen::{
    targets::Target,
    tile::{Access, Builder, Device, Kernel, ShflKind, VoteKind, check, interp, text::assert_round_trip},
};
use pavage_ir::DType;

fn gpu(name: &str, threads: u32) -> Builder {
    let mut b = Builder::new(name, Device::Gpu);
    b.launch().threads = threads;
    b
}

fn run(kernel: &Kernel, bufs: &mut [Vec<u8>], dims: &[i64], grid: u32) -> Result<(), String> {
    assert_round_trip(kernel);
    check::check(kernel, &Target::parse("sm_80").unwrap().limits()).unwrap();
    let before = bufs.to_vec();
    for seed in 0..4 {
        bufs.clone_from_slice(&before);
        interp::run_gpu(kernel, bufs, dims, [grid, 1, 1], seed).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// Sum of each row of `dim` columns by one block of 256 threads: warp shuffles, then shared memory.
fn row_sums(with_barrier: bool) -> Kernel {
    let mut b = gpu("row_sums", 256);
    let (x, y) = (b.arg(DType::F32, Access::Read), b.arg(DType::F32, Access::Write));
    let parts = b.shared(DType::F32, 8);
    let n = b.dim();
    let (row, t, lane) = (b.block_id(0), b.thread_id(), b.lane_id());
    let start = b.mul(row, n);
    let none = b.float(0.0, DType::F32);
    let mut sum = b.for_(t, n, 256, &[none], |b, i, c| {
        let at = b.add(start, i);
        let v = b.load(x, at, 1);
        vec![b.add(c[0], v)]
    })[0];
    for step in [16, 8, 4, 2, 1] {
        let by = b.index(step);
        let other = b.shfl(ShflKind::Xor, sum, by);
        sum = b.add(sum, other);
    }
    let zero = b.index(0);
    let first = b.eq(lane, zero);
    let warp = b.div_i(t, 32);
    b.when(first, |b| b.store(parts, warp, sum));
    if with_barrier {
        b.barrier();
    }
    let lead = b.eq(t, zero);
    b.when(lead, |b| {
        let all = b.load(parts, zero, 8);
        let total = b.reduce(pavage_codegen::tile::ReduceFn::Add, all);
        b.store(y, row, total);
    });
    b.finish()
}

#[test]
fn blocks_sum_rows() {
    let mut noise = Noise(11);
    let x = noise.floats(3 * 700);
    let mut bufs = vec![bytes(&x), bytes(&[0f32; 3])];
    run(&row_sums(true), &mut bufs, &[700], 3).unwrap();
    let got: Vec<f32> = numbers(&bufs[1]);
    for r in 0..3 {
        let want: f64 = x[r * 700..][..700].iter().map(|v| f64::from(*v)).sum();
        assert!((f64::from(got[r]) - want).abs() < 1e-4);
    }
}

#[test]
fn a_missing_barrier_is_a_race() {
    let mut bufs = vec![bytes(&[1f32; 700]), bytes(&[0f32; 1])];
    let said = run(&row_sums(false), &mut bufs, &[700], 1).unwrap_err();
    assert!(said.contains("race: thread"), "{said}");
}

#[test]
fn a_barrier_for_some_is_an_error() {
    for (threads, why) in [(64, "only some threads reach the barrier"), (256, "no agent can move")] {
        let mut b = gpu("part", threads);
        let t = b.thread_id();
        let half = b.index(i64::from(threads) / 2);
        let low = b.lt(t, half);
        b.when(low, |b| b.barrier());
        let said = run(&b.finish(), &mut [], &[], 1).unwrap_err();
        assert!(said.contains(why), "{said}");
    }
}

#[test]
fn stray_accesses_are_errors() {
    let mut b = gpu("stray", 64);
    let x = b.arg(DType::F32, Access::Write);
    let t = b.thread_id();
    let v = b.float(1.0, DType::F32);
    b.store(x, t, v);
    let said = run(&b.finish(), &mut [bytes(&[0f32; 63])], &[], 1).unwrap_err();
    assert!(said.contains("elements 63..64 of @0, which holds 63"), "{said}");
}

#[test]
fn threads_part_and_meet() {
    // Each thread loops as often as its index says, odd ones count double; a vote and a shuffle follow.
    let mut b = gpu("part", 64);
    let (counts, votes) = (b.arg(DType::I64, Access::Write), b.arg(DType::U32, Access::Write));
    let (t, zero, one) = (b.thread_id(), b.index(0), b.index(1));
    let odd = b.rem_i(t, 2);
    let is_odd = b.eq(odd, one);
    let n = b.for_(zero, t, 1, &[zero], |b, _, c| {
        b.if_(
            is_odd,
            |b| vec![b.add_i(c[0], 2)],
            |b| {
                let r = b.while_(
                    &[zero],
                    |b, c| {
                        let more = b.lt(c[0], one);
                        (more, c.to_vec())
                    },
                    |b, c| vec![b.add_i(c[0], 1)],
                );
                vec![b.add(c[0], r[0])]
            },
        )
    });
    b.store(counts, t, n[0]);
    let ballot = b.vote(VoteKind::Ballot, is_odd);
    b.store(votes, t, ballot);
    let mut bufs = [bytes(&[0i64; 64]), bytes(&[0u32; 64])];
    run(&b.finish(), &mut bufs, &[], 1).unwrap();
    let counts: Vec<i64> = numbers(&bufs[0]);
    for (t, c) in counts.iter().enumerate() {
        assert_eq!(*c, if t % 2 == 1 { 2 * t as i64 } else { t as i64 });
    }
    assert!(numbers::<u32>(&bufs[1]).iter().all(|v| *v == 0xaaaa_aaaa));
}

#[test]
fn blocks_add_atomically() {
    let mut b = gpu("histogram", 128);
    let (x, y) = (b.arg(DType::I32, Access::Read), b.arg(DType::I32, Access::ReadWrite));
    let (block, t) = (b.block_id(0), b.thread_id());
    let start = b.mul_i(block, 128);
    let at = b.add(start, t);
    let v = b.load(x, at, 1);
    let bin = b.cast(v, DType::I64);
    let one = b.constant(pavage_ir::Scalar::I(1), DType::I32);
    b.atomic_add(y, bin, one);
    let mut noise = Noise(12);
    let x: Vec<i32> = (0..512).map(|_| (noise.bits() % 10) as i32).collect();
    let mut bufs = [bytes(&x), bytes(&[0i32; 10])];
    run(&b.finish(), &mut bufs, &[], 4).unwrap();
    let got: Vec<i32> = numbers(&bufs[1]);
    for (bin, n) in got.iter().enumerate() {
        assert_eq!(*n as usize, x.iter().filter(|v| **v as usize == bin).count());
    }
}
