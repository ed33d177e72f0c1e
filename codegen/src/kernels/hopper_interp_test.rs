//! Hopper kernels run by the interpreter: right results under any scheduling, and faults found.
#![allow(clippy::neg_cmp_op_on_partial_ord, reason = "a NaN must fail")]
use super::flash::{self, Attention, FlashTiles};
use super::hopper_gemm::{Rhs, Tiles, plain};
use super::hopper_samples::{Hides, Tail, linear, self_attention};
use super::{ArgFacts, Built, build};
use crate::targets::Target;
use crate::tile::hopper::HopperWord as H;
use crate::tile::interp::run_gpu;
use crate::tile::{Block, Kernel, Op, Stmt};
use pavage_ir::{Binding, DType, Dim, Region, Scalar, Schedule};

/// Values of roughly unit size, never zero, rounded to `dtype`.
fn random(n: usize, dtype: DType, seed: u64) -> Vec<f64> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            let mut sum = 0.0;
            for _ in 0..4 {
                s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                sum += (s >> 40) as f64 / (1u64 << 24) as f64 - 0.5;
            }
            Scalar::F(sum * 1.7 + 1e-3).cast(dtype).f()
        })
        .collect()
}

fn encode(v: &[f64], dtype: DType) -> Vec<u8> {
    let mut out = vec![];
    for x in v {
        match dtype {
            DType::F16 => out.extend(half::f16::from_f64(*x).to_le_bytes()),
            DType::BF16 => out.extend(half::bf16::from_f64(*x).to_le_bytes()),
            _ => out.extend((*x as f32).to_le_bytes()),
        }
    }
    out
}

fn decode(b: &[u8], dtype: DType) -> Vec<f64> {
    let w = dtype.bytes(1);
    b.chunks(w)
        .map(|c| match dtype {
            DType::F16 => half::f16::from_le_bytes([c[0], c[1]]).to_f64(),
            DType::BF16 => half::bf16::from_le_bytes([c[0], c[1]]).to_f64(),
            _ => f64::from(f32::from_le_bytes([c[0], c[1], c[2], c[3]])),
        })
        .collect()
}

fn close(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
    let scale = (want.iter().map(|x| x * x).sum::<f64>() / want.len() as f64).sqrt();
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * (scale + w.abs()), "{what}: element {i}: {g}, want {w}");
    }
    assert_eq!(got.len(), want.len());
}

struct Gemm {
    dtype: DType,
    out: DType,
    rhs: Rhs,
    tiles: Tiles,
    sizes: [usize; 4],
    batched: bool,
}

impl Gemm {
    fn kernel(&self) -> Kernel {
        plain("gemm", self.dtype, self.out, self.rhs, self.tiles, self.batched)
    }

    /// Run `kernel` in place of the right one and compare.
    fn run(&self, kernel: &Kernel, grid: u32, seed: u64) -> Result<(), String> {
        let [m, n, k, l] = self.sizes;
        let (a, b) = (random(l * m * k, self.dtype, seed + 1), random(l * n * k, self.dtype, seed + 2));
        let mut bufs = vec![encode(&a, self.dtype), encode(&b, self.dtype), vec![0xff; l * m * n * self.out.bytes(1)]];
        let mut dims = vec![m as i64, n as i64, k as i64];
        if self.batched {
            dims.push(l as i64);
        }
        run_gpu(kernel, &mut bufs, &dims, [grid, 1, 1], seed).map_err(|e| e.to_string())?;
        let mut want = vec![];
        for z in 0..l {
            for i in 0..m {
                for j in 0..n {
                    let at = |x: usize| if self.rhs == Rhs::Kn { (z * k + x) * n + j } else { (z * n + j) * k + x };
                    want.push((0..k).map(|x| a[(z * m + i) * k + x] * b[at(x)]).sum::<f64>());
                }
            }
        }
        let got = decode(&bufs[2], self.out);
        let scale = (k as f64).sqrt();
        match got.iter().zip(&want).position(|(g, w)| !((g - w).abs() <= 0.02 * (scale + w.abs()))) {
            Some(i) => Err(format!("element {i}: {}, want {}", got[i], want[i])),
            None => Ok(()),
        }
    }
}

fn small(rhs: Rhs, cluster: u64) -> Gemm {
    Gemm { dtype: DType::BF16, out: DType::BF16, rhs, tiles: Tiles { bn: 128, stages: 2, cluster, group: 2 }, sizes: [200, 264, 200, 1], batched: false }
}

#[test]
fn products_are_right_whatever_the_schedule() {
    for rhs in [Rhs::Kn, Rhs::Nk] {
        for cluster in [1, 2] {
            for seed in 0..2 {
                let g = small(rhs, cluster);
                g.run(&g.kernel(), 2, seed).unwrap_or_else(|e| panic!("{rhs:?} cluster {cluster} seed {seed}: {e}"));
            }
        }
    }
}

#[test]
fn products_in_f32_in_batches_and_in_wide_tiles() {
    let g = Gemm { dtype: DType::F16, out: DType::F32, batched: true, sizes: [70, 72, 136, 3], ..small(Rhs::Kn, 1) };
    g.run(&g.kernel(), 2, 5).expect("batched f32");
    let g = Gemm { tiles: Tiles { bn: 256, stages: 3, cluster: 2, group: 8 }, sizes: [256, 512, 320, 1], ..small(Rhs::Kn, 2) };
    g.run(&g.kernel(), 2, 6).expect("wide");
    let g = Gemm { tiles: Tiles { bn: 192, stages: 2, cluster: 1, group: 8 }, sizes: [64, 200, 64, 1], ..small(Rhs::Nk, 1) };
    g.run(&g.kernel(), 1, 7).expect("192 columns");
}

// ---- faults ----

/// Change the `nth` statement (in text order) for which `pick` holds.
fn alter(kernel: &Kernel, nth: usize, pick: impl Fn(&Stmt) -> bool, change: impl Fn(&mut Vec<Stmt>, usize)) -> Kernel {
    fn walk(b: &mut Block, left: &mut usize, pick: &dyn Fn(&Stmt) -> bool, change: &dyn Fn(&mut Vec<Stmt>, usize)) -> bool {
        for i in 0..b.stmts.len() {
            if pick(&b.stmts[i]) {
                if *left == 0 {
                    change(&mut b.stmts, i);
                    return true;
                }
                *left -= 1;
            }
            for inner in &mut b.stmts[i].blocks {
                if walk(inner, left, pick, change) {
                    return true;
                }
            }
        }
        false
    }
    let mut k = kernel.clone();
    let mut left = nth;
    assert!(walk(&mut k.body, &mut left, &pick, &change), "nothing to alter");
    k
}

fn word(s: &Stmt, f: impl Fn(&H) -> bool) -> bool {
    matches!(&s.op, Op::Hopper(w) if f(w))
}

fn without(kernel: &Kernel, nth: usize, f: impl Fn(&H) -> bool + Copy) -> Kernel {
    alter(
        kernel,
        nth,
        |s| word(s, f),
        |stmts, i| {
            stmts.remove(i);
        },
    )
}

/// Some schedule must run into the fault, with one of these words in what it says.
fn caught(kernel: &Kernel, words: &[&str]) {
    let g = small(Rhs::Kn, 2);
    let mut said = vec![];
    for seed in 0..4 {
        match g.run(kernel, 2, seed) {
            Ok(()) => said.push("right".to_owned()),
            Err(e) if words.iter().any(|w| e.contains(w)) => return,
            Err(e) => said.push(e),
        }
    }
    panic!("not caught as {words:?}: {said:#?}");
}

#[test]
fn missing_waits_are_caught() {
    let k = small(Rhs::Kn, 2).kernel();
    // The producer's wait for a free stage, then the consumer's for a full one.
    caught(&without(&k, 0, |w| matches!(w, H::MbarWait)), &["reused", "not waited for", "more arrivals"]);
    caught(&without(&k, 1, |w| matches!(w, H::MbarWait)), &["more arrivals", "NaN"]);
}

#[test]
fn early_releases_are_caught() {
    let k = small(Rhs::Kn, 2).kernel();
    // The release (an `if` around the arrival) moves in front of the wait for the products.
    let early = alter(
        &k,
        0,
        |s| word(s, |w| matches!(w, H::WgmmaWait { .. })),
        |stmts, i| {
            let at = (i + 1..stmts.len()).find(|j| matches!(stmts[*j].op, Op::If)).expect("the release follows");
            let release = stmts.remove(at);
            stmts.insert(i, release);
        },
    );
    caught(&early, &["NaN", "in flight"]);
}

#[test]
fn deadlocks_are_caught() {
    let k = small(Rhs::Kn, 2).kernel();
    let more = alter(
        &k,
        0,
        |s| word(s, |w| matches!(w, H::MbarExpect { .. })),
        |stmts, i| {
            if let Op::Hopper(H::MbarExpect { bytes }) = &mut stmts[i].op {
                *bytes += 16;
            }
        },
    );
    caught(&more, &["deadlock"]);
    caught(&without(&k, 0, |w| matches!(w, H::MbarArrive)), &["deadlock"]);
    // Set up for one arrival more than there are.
    let count = alter(
        &k,
        2,
        |s| word(s, |w| matches!(w, H::MbarInit { .. })),
        |stmts, i| {
            if let Op::Hopper(H::MbarInit { count }) = &mut stmts[i].op {
                *count += 1;
            }
        },
    );
    caught(&count, &["deadlock"]);
}

#[test]
fn wrong_phases_are_caught() {
    let k = small(Rhs::Kn, 2).kernel();
    // The consumer waits with the producer's parity.
    let producer = {
        let mut found = None;
        k.walk(&mut |s| {
            if found.is_none() && word(s, |w| matches!(w, H::MbarWait)) {
                found = Some(s.clone());
            }
        });
        found.expect("a wait")
    };
    let swapped = alter(
        &k,
        0,
        |s| word(s, |w| matches!(w, H::MbarWait)) && s.args[1] == producer.args[1],
        |stmts, i| {
            // The parity before it was flipped.
            let flip = stmts.iter().find(|s| s.results.contains(&stmts[i].args[1])).map(|s| s.args[0]);
            if let Some(parity) = flip {
                stmts[i].args[1] = parity;
            }
        },
    );
    caught(&swapped, &["deadlock", "reused", "not waited for"]);
}

#[test]
fn missing_fences_and_store_waits_are_caught() {
    let k = small(Rhs::Kn, 2).kernel();
    caught(&without(&k, 0, |w| matches!(w, H::FenceProxyAsync)), &["without a fence"]);
    // The staging reused under a store; the end not waited for.
    caught(&without(&k, 0, |w| matches!(w, H::BulkWait { .. })), &["want"]);
    caught(&without(&k, 1, |w| matches!(w, H::BulkWait { .. })), &["in flight when the kernel ends"]);
}

// ---- attention ----

fn softmax(q: &[f64], k: &[f64], v: &[f64], d: usize, scale: f64, bias: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let (s, t) = (q.len() / d, k.len() / d);
    let mut out = vec![];
    for i in 0..s {
        let x: Vec<f64> = (0..t).map(|j| scale * (0..d).map(|e| q[i * d + e] * k[j * d + e]).sum::<f64>() + bias(i, j)).collect();
        let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let p: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
        let sum: f64 = p.iter().sum();
        out.extend((0..d).map(|e| p.iter().enumerate().map(|(j, p)| p * v[j * d + e]).sum::<f64>() / sum));
    }
    out
}

fn attention(depth: usize, causal: bool, tiles: FlashTiles, heads: usize, s: usize, t: usize, seed: u64) {
    let dtype = DType::F16;
    let att = Attention { depth: depth as u64, scale: 1.0 / (depth as f64).sqrt(), causal };
    let kernel = flash::plain("flash", dtype, att, tiles);
    let (mut q, k, v) = (random(heads * s * depth, dtype, seed + 1), random(heads * t * depth, dtype, seed + 2), random(heads * t * depth, dtype, seed + 3));
    // Large scores, so that maxima grow and results are rescaled.
    q.iter_mut().for_each(|x| *x = Scalar::F(*x * 6.0).cast(dtype).f());
    let mut bufs = vec![encode(&q, dtype), encode(&k, dtype), encode(&v, dtype), vec![0xff; heads * s * depth * 2]];
    run_gpu(&kernel, &mut bufs, &[heads as i64, s as i64, t as i64], [2, 1, 1], seed).unwrap_or_else(|e| panic!("{e}"));
    let got = decode(&bufs[3], dtype);
    for h in 0..heads {
        let part = |x: &[f64], n: usize| x[h * n * depth..(h + 1) * n * depth].to_vec();
        let want = softmax(&part(&q, s), &part(&k, t), &part(&v, t), depth, att.scale, |i, j| if causal && j > i { f64::NEG_INFINITY } else { 0.0 });
        close(&got[h * s * depth..(h + 1) * s * depth], &want, 0.01, &format!("depth {depth} causal {causal} head {h}"));
    }
}

#[test]
fn attention_is_right_on_ragged_sizes() {
    let turns = FlashTiles { pingpong: true, ..FlashTiles::best(128, false) };
    attention(128, false, turns, 2, 150, 300, 1);
    attention(64, false, FlashTiles::best(64, false), 2, 200, 333, 2);
    attention(64, true, FlashTiles::best(64, true), 3, 300, 300, 3);
}

// ---- regions ----

fn hopper() -> Target {
    Target::parse("sm_90a").expect("a target")
}

/// Run a region's kernel; arguments are random; the result as numbers.
fn run_region(region: &Region, built: &Built, args: &[Vec<f64>], symbols: &Binding, grid: u32) -> Vec<f64> {
    let size = |d: &Dim| d.eval(symbols).expect("a size") as usize;
    let count = |shape: &[Dim]| shape.iter().map(size).product::<usize>();
    let mut bufs: Vec<Vec<u8>> = region.args.iter().zip(args).map(|(t, a)| encode(a, t.dtype)).collect();
    let out = &region.outputs[0].ty;
    bufs.push(vec![0xff; count(&out.shape) * out.dtype.bytes(1)]);
    let dims: Vec<i64> = built.dims.iter().map(|d| d.eval(symbols).expect("a size")).collect();
    run_gpu(&built.kernel, &mut bufs, &dims, [grid, 1, 1], 11).unwrap_or_else(|e| panic!("{e}"));
    decode(&bufs[region.args.len()], out.dtype)
}

fn bind(pairs: &[(&str, i64)]) -> Binding {
    Binding(pairs.iter().map(|(n, v)| ((*n).into(), *v)).collect())
}

#[test]
fn epilogues_run_on_fragments() {
    let (m, n, k) = (150usize, 200usize, 136usize);
    for (dtype, out) in [(DType::F16, DType::F16), (DType::BF16, DType::F32)] {
        let mut region = linear(dtype, out, n as i64, k as i64, Tail::BiasGeluAdd);
        for split in [false, true] {
            if split {
                // The same numbers as [n / 8, m, 8]: no matrix any more.
                let eight = Dim::from(8i64);
                region.outputs[0].ty.shape = vec![Dim::from(n as i64 / 8), Dim::sym("m"), eight.clone()];
                region.outputs[0].index = vec![Dim::axis(1).div(&eight), Dim::axis(0), Dim::axis(1).modulo(&eight)];
            }
            let schedule: Schedule = "hopper_gemm bn=128 cluster=1 stages=2 group=8".parse().expect("a schedule");
            let built = build(&region, &hopper(), "k", &ArgFacts::default(), Some(&schedule)).expect("builds");
            let args: Vec<Vec<f64>> = [m * k, k * n, n, m * n].iter().enumerate().map(|(i, c)| random(*c, dtype, 40 + i as u64)).collect();
            let got = run_region(&region, &built, &args, &bind(&[("m", m as i64)]), 2);
            let mut want = vec![0.0; m * n];
            for i in 0..m {
                for j in 0..n {
                    let x = (0..k).map(|e| args[0][i * k + e] * args[1][e * n + j]).sum::<f64>() + args[2][j];
                    let erf = pavage_ir::ScalarFn::Erf.eval(DType::F64, &[Scalar::F(x * std::f64::consts::FRAC_1_SQRT_2)]).f();
                    let v = x * 0.5 * (1.0 + erf) + args[3][i * n + j];
                    want[if split { (j / 8 * m + i) * 8 + j % 8 } else { i * n + j }] = v;
                }
            }
            close(&got, &want, 0.01, &format!("{dtype} to {out}, split {split}"));
        }
    }
}

#[test]
fn masked_attention_reads_heads_side_by_side() {
    let (b, s, heads, d) = (2usize, 150usize, 2usize, 64usize);
    for hides in [Hides::Padding, Hides::Future, Hides::Outside(40)] {
        let region = self_attention(DType::F16, heads as i64, d as i64, hides);
        let built = build(&region, &hopper(), "k", &ArgFacts::default(), None).expect("builds");
        assert_eq!(built.schedule.family, "flash");
        let mut args: Vec<Vec<f64>> = (0..3).map(|i| random(b * s * heads * d, DType::F16, 60 + i)).collect();
        if hides == Hides::Padding {
            // The last keys of the second sentence are padding.
            args.push((0..b * s).map(|i| if i >= s + 77 { -1e4 } else { (i % 7) as f64 * 0.25 }).collect());
        }
        let mask = |x: usize, i: usize, j: usize| match hides {
            Hides::Padding => args[3][x * s + j],
            Hides::Future if j > i => f64::NEG_INFINITY,
            Hides::Outside(n) if j > i || i >= j + n as usize => f64::NEG_INFINITY,
            _ => 0.0,
        };
        let got = run_region(&region, &built, &args, &bind(&[("b", b as i64), ("s", s as i64)]), 2);
        let mut want = vec![0.0; got.len()];
        for x in 0..b {
            for h in 0..heads {
                let row = |i: usize, e: usize| ((x * s + i) * heads + h) * d + e;
                let part = |v: &[f64]| -> Vec<f64> { (0..s * d).map(|n| v[row(n / d, n % d)]).collect() };
                let o = softmax(&part(&args[0]), &part(&args[1]), &part(&args[2]), d, 0.125, |i, j| mask(x, i, j));
                for (n, v) in o.iter().enumerate() {
                    want[row(n / d, n % d)] = *v;
                }
            }
        }
        close(&got, &want, 0.01, &format!("{hides:?}"));
    }
}
