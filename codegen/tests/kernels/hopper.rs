//! The Hopper product interpreted: what it computes, and that broken copies of it are caught.
use crate::common::{Noise, bytes, numbers};
use half::bf16;
use pavage_codegen::{
    kernels::hopper_gemm::{Rhs, Tiles, plain},
    tile::{Kernel, Op, interp, text::assert_round_trip},
};
use pavage_ir::DType;

const M: usize = 200;
const N: usize = 136;
const K: usize = 200;

fn inputs() -> Vec<Vec<u8>> {
    let mut noise = Noise(21);
    let mut matrix = |n: usize| -> Vec<bf16> { (0..n).map(|_| bf16::from_f64(noise.unit())).collect() };
    vec![bytes(&matrix(M * K)), bytes(&matrix(N * K)), vec![0; M * N * 2]]
}

fn run(kernel: &Kernel, rhs: Rhs, seed: u64) -> Result<(), String> {
    let mut bufs = inputs();
    interp::run_gpu(kernel, &mut bufs, &[M as i64, N as i64, K as i64], [2, 1, 1], seed).map_err(|e| e.to_string())?;
    let [a, b, c] = [0, 1, 2].map(|i| numbers::<bf16>(&bufs[i]));
    for i in 0..M {
        for j in 0..N {
            let want: f64 = (0..K).map(|k| a[i * K + k].to_f64() * if rhs == Rhs::Kn { b[k * N + j] } else { b[j * K + k] }.to_f64()).sum();
            let got = c[i * N + j].to_f64();
            if got.is_nan() || (got - want).abs() >= 0.01 * want.abs().max(4.0) {
                return Err(format!("element {i}, {j}: {got}, expected {want}"));
            }
        }
    }
    Ok(())
}

fn product(rhs: Rhs, cluster: u64) -> Kernel {
    plain("product", DType::BF16, DType::BF16, rhs, Tiles { bn: 128, stages: 2, cluster, group: 8 }, false)
}

#[test]
fn the_pipelined_product_is_the_product() {
    for (rhs, cluster) in [(Rhs::Nk, 1), (Rhs::Kn, 1), (Rhs::Nk, 2)] {
        let kernel = product(rhs, cluster);
        assert_round_trip(&kernel);
        for seed in 0..2 {
            run(&kernel, rhs, seed).unwrap_or_else(|e| panic!("{rhs:?}, cluster of {cluster}, seed {seed}: {e}"));
        }
    }
}

/// The kernel without its `n`-th word of this name.
fn without(kernel: &Kernel, name: &str, n: usize) -> Kernel {
    fn strip(block: &mut pavage_codegen::tile::Block, name: &str, n: &mut usize) {
        block.stmts.retain(|s| {
            if s.op.name() != name || !matches!(s.op, Op::Hopper(_)) || !s.results.is_empty() {
                return true;
            }
            *n = n.wrapping_sub(1);
            *n != usize::MAX
        });
        for s in &mut block.stmts {
            s.blocks.iter_mut().for_each(|b| strip(b, name, n));
        }
    }
    let mut k = kernel.clone();
    strip(&mut k.body, name, &mut { n });
    assert_ne!(k, *kernel, "{name} is not in the kernel");
    k
}

#[test]
fn broken_products_are_caught() {
    let good = product(Rhs::Nk, 1);
    for (name, n, why) in [
        // The proxy fence before the TMA store.
        ("fence_proxy_async", 0, "without a fence"),
        // The consumer's release: the producer waits for ever.
        ("mbar_arrive", 0, "no agent can move"),
        // The producer's announcement.
        ("mbar_expect", 0, ""),
        // The producer's wait for a free stage: data overwritten before use.
        ("mbar_wait", 0, ""),
        // The consumer's wait for a full stage.
        ("mbar_wait", 1, ""),
        // The last wait for stores.
        ("bulk_wait", 1, "in flight when the kernel ends"),
        ("wgmma_commit", 0, "may still be in flight"),
    ] {
        let broken = without(&good, name, n);
        let said: Vec<String> = (0..3).filter_map(|seed| run(&broken, Rhs::Nk, seed).err()).collect();
        assert!(!said.is_empty(), "the kernel without {name} {n} passes");
        assert!(said.iter().any(|s| s.contains(why)), "without {name} {n}: {said:?}");
    }
}
