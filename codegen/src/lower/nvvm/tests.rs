//! Kernels through MLIR and LLVM to PTX, and through NVIDIA's assembler where it is to be found.
use super::assembler::{assemble, assemble_everywhere};
use crate::compile::ptx;
use crate::kernels::hopper_gemm::{Rhs, Tiles, plain};
use crate::targets::Target;
use crate::tile::{Access, Builder, Device, Kernel, ReduceFn, ShflKind, Val, VoteKind};
use pavage_ir::{DType, Scalar, ScalarFn, scalar::Sig};

/// `out[i] = f(in0[i], ...)`, four elements a thread.
fn elementwise(name: &str, dtype: DType, ins: usize, lanes: usize, f: impl Fn(&mut Builder, &[Val]) -> Val) -> Kernel {
    let mut b = Builder::new(name, Device::Gpu);
    let args: Vec<_> = (0..ins).map(|_| b.arg(dtype, Access::Read)).collect();
    let n = b.dim();
    let (block, thread) = (b.block_id(0), b.thread_id());
    let i = b.mul_i(block, 128);
    let i = b.add(i, thread);
    let i = b.mul_i(i, lanes as i64);
    // The result's type is known once the function is written.
    let inside = b.lt(i, n);
    let probe = {
        let mut b = Builder::new("probe", Device::Gpu);
        let xs: Vec<Val> = args.iter().map(|_| b.constant(Scalar::I(1), dtype)).collect();
        let v = f(&mut b, &xs);
        b.ty(v).dtype()
    };
    let out = b.arg(probe, Access::Write);
    b.when(inside, |b| {
        let xs: Vec<Val> = args.iter().map(|a| b.load(*a, i, lanes)).collect();
        let v = f(b, &xs);
        b.store(out, i, v);
    });
    b.finish()
}

#[test]
fn every_scalar_function_assembles() {
    let floats = [DType::F32, DType::F64, DType::F16, DType::BF16];
    let ints = [DType::I64, DType::I32, DType::U32, DType::I8, DType::U8, DType::I16];
    let mut kernels = vec![];
    for f in ScalarFn::ALL {
        let types: Vec<DType> = match f.sig() {
            Sig::Float | Sig::Test => floats.to_vec(),
            Sig::Number | Sig::Compare => floats.iter().chain(&ints).copied().collect(),
            Sig::Bits => ints.iter().copied().chain([DType::Bool]).collect(),
            Sig::Select => continue,
        };
        for d in types {
            let bits_only = matches!(f, ScalarFn::Shl | ScalarFn::Shr) && d == DType::Bool;
            if bits_only {
                continue;
            }
            kernels.push(elementwise(&format!("{f}_{d}"), d, f.arity(), if d.bits() == 64 { 2 } else { 4 }, |b, xs| b.map(*f, xs)));
        }
    }
    assemble_everywhere(&kernels);
}

#[test]
fn every_cast_assembles() {
    let all = [
        DType::F64,
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::I64,
        DType::I32,
        DType::I16,
        DType::I8,
        DType::U64,
        DType::U32,
        DType::U16,
        DType::U8,
        DType::Bool,
    ];
    let mut kernels = vec![];
    for from in all {
        for to in all {
            if from != to {
                kernels.push(elementwise(&format!("cast_{from}_{to}"), from, 1, 8, |b, xs| b.cast(xs[0], to)));
            }
        }
    }
    assemble_everywhere(&kernels);
}

/// Row sums of squares through registers, shuffles, votes and shared memory, with a loop and a while.
fn row_sum() -> Kernel {
    let mut b = Builder::new("row_sum", Device::Gpu);
    let (x, y) = (b.arg(DType::F16, Access::Read), b.arg(DType::F32, Access::ReadWrite));
    let cols = b.dim();
    let part = b.shared(DType::F32, 4);
    let (row, thread, lane) = (b.block_id(0), b.thread_id(), b.lane_id());
    let base = b.mul(row, cols);
    let zero = b.float(0.0, DType::F32);
    let start = b.mul_i(thread, 8);
    let stride = 128 * 8;
    let sum = b.for_(start, cols, stride, &[zero], |b, c, acc| {
        let at = b.add(base, c);
        let left = b.sub(cols, c);
        let v = b.load_upto(x, at, 8, left);
        let v = b.cast(v, DType::F32);
        let v = b.mul(v, v);
        let s = b.reduce(ReduceFn::Add, v);
        vec![b.add(acc[0], s)]
    })[0];
    let width = b.index(16);
    let zero_i = b.index(0);
    // Halving butterfly, as a while loop.
    let folded = b.while_(
        &[width, sum],
        |b, v| {
            let go = b.gt(v[0], zero_i);
            (go, v.to_vec())
        },
        |b, v| {
            let other = b.shfl(ShflKind::Xor, v[1], v[0]);
            let s = b.add(v[1], other);
            vec![b.div_i(v[0], 2), s]
        },
    )[1];
    let first = b.eq(lane, zero_i);
    let warp = b.div_i(thread, 32);
    b.when(first, |b| b.store(part, warp, folded));
    b.barrier();
    let all = b.load(part, zero_i, 4);
    let total = b.reduce(ReduceFn::Add, all);
    let big = b.gt(total, zero);
    let any = b.vote(VoteKind::Any, big);
    let total = b.select(any, total, zero);
    let leader = b.eq(thread, zero_i);
    b.when(leader, |b| b.atomic_add(y, row, total));
    b.finish()
}

#[test]
fn control_warps_and_shared_memory_assemble() {
    assemble_everywhere(&[row_sum()]);
}

#[test]
fn aligned_vectors_load_in_one_instruction() {
    let k = elementwise("relu", DType::F16, 1, 8, |b, xs| {
        let ty = b.ty(xs[0]);
        let zero = b.constant_of(Scalar::F(0.0), ty);
        b.max(xs[0], zero)
    });
    // Alignment of the arguments is what the runtime promises.
    let mut k = k;
    k.bufs.iter_mut().for_each(|b| b.align = 256);
    let text = ptx(&[k], &Target::parse("sm_90a").expect("a target")).expect("compiles");
    assert!(text.contains("ld.global.nc.v4.b32"), "{text}");
    assert!(text.contains("st.global.v4.b32"), "{text}");
}

#[test]
fn words_of_a_newer_architecture_are_refused() {
    let t = Tiles { bn: 128, stages: 4, cluster: 1, group: 8 };
    let k = plain("gemm", DType::BF16, DType::BF16, Rhs::Kn, t, false);
    let e = ptx(&[k], &Target::parse("sm_80").expect("a target")).expect_err("wgmma is not in sm_80");
    assert!(e.to_string().contains("sm_90a"), "{e}");
}

#[test]
fn hopper_gemms_assemble_without_spills_or_serialised_products() {
    let mut kernels = vec![];
    for (i, (bn, stages, cluster)) in [(256, 3, 2), (256, 3, 1), (128, 5, 2), (128, 4, 1), (192, 3, 1), (64, 6, 1)].into_iter().enumerate() {
        for rhs in [Rhs::Kn, Rhs::Nk] {
            for (out, batched) in [(DType::BF16, false), (DType::F32, true)] {
                kernels.push(plain(&format!("gemm_{i}_{rhs:?}_{out}"), DType::BF16, out, rhs, Tiles { bn, stages, cluster, group: 8 }, batched));
            }
        }
    }
    assemble(&kernels, "sm_90a");
    let text = ptx(&kernels[..1], &Target::parse("sm_90a").expect("a target")).expect("compiles");
    assert_eq!(text.matches("wgmma.mma_async").count(), 4, "one k-step of 64 in the loop");
}

#[test]
fn flash_attention_assembles_without_spills_or_serialised_products() {
    use crate::kernels::flash::{Attention, FlashTiles, plain};
    let mut kernels = vec![];
    for depth in [64, 128] {
        for causal in [false, true] {
            for (i, pingpong) in [false, true].into_iter().enumerate() {
                let tiles = FlashTiles { pingpong, ..FlashTiles::best(depth, causal) };
                let att = Attention { depth, scale: 0.125, causal };
                kernels.push(plain(&format!("flash_{depth}_{causal}_{i}"), DType::BF16, att, tiles));
            }
        }
    }
    assemble(&kernels, "sm_90a");
}
