//! What the hardware refuses of a Hopper kernel, and what it would silently get wrong: the part of [`super::check`] that looks at
//! a kernel as a whole.
use super::hopper::{HopperWord as H, TensorMap};
use super::{Block, Kernel, Op, Space, Stmt};

/// Bytes that one copy of a box may start at a multiple of, by swizzle.
const fn alignment(swizzle: u16) -> u32 {
    match swizzle {
        128 => 1024,
        64 => 512,
        32 => 256,
        _ => 128,
    }
}

/// Check roles, tensor maps, copies and fences. The error says where and why.
pub(super) fn check(kernel: &Kernel) -> Result<(), (String, String)> {
    for (i, map) in kernel.maps.iter().enumerate() {
        tensor_map(kernel, map).map_err(|why| (format!("tensor map {i}"), why))?;
    }
    let mut words = vec![];
    kernel.walk(&mut |s| {
        if let Op::Hopper(w) = &s.op {
            words.push((w, s));
        }
    });
    for (w, s) in &words {
        word(kernel, w, s).map_err(|why| (w.name().to_owned(), why))?;
    }
    if words.iter().filter(|(w, _)| matches!(w, H::Roles(_))).count() > 1 {
        return Err(("roles".to_owned(), "a kernel parts into roles once".to_owned()));
    }
    if words.iter().any(|(w, _)| matches!(w, H::MbarInit { .. })) {
        barriers_are_seen(&kernel.body).map_err(|why| ("mbar_init".to_owned(), why))?;
    }
    let mut state = Proxy::default();
    order(&kernel.body, &mut state).map_err(|why| ("tma_store".to_owned(), why))?;
    if state.stored && !state.drained {
        return Err(("tma_store".to_owned(), "the kernel may end before its stores are done: `bulk_wait[read=false]` is missing".to_owned()));
    }
    Ok(())
}

fn tensor_map(kernel: &Kernel, map: &TensorMap) -> Result<(), String> {
    let rank = map.dims.len();
    if !(1..=5).contains(&rank) || map.strides.len() + 1 != rank || map.boxes.len() != rank {
        return Err(format!("{rank} extents, {} strides, a box of {}: rank 1 to 5, one stride fewer than extents", map.strides.len(), map.boxes.len()));
    }
    if let Some(b) = map.boxes.iter().find(|b| !(1..=256).contains(*b)) {
        return Err(format!("{b} elements of a box: 1 to 256 an axis"));
    }
    let info = kernel.bufs.get(map.arg.0 as usize).ok_or("describes no buffer")?;
    if info.space != Space::Global {
        return Err("describes a buffer that is no argument".to_owned());
    }
    let width = info.dtype.bytes(1) as u32;
    let inner = map.boxes[0] * width;
    if ![0, 32, 64, 128].contains(&map.swizzle) {
        return Err(format!("swizzle {}: 0, 32, 64 or 128", map.swizzle));
    }
    if !inner.is_multiple_of(16) || map.swizzle > 0 && inner > u32::from(map.swizzle) {
        return Err(format!("{inner} bytes of a box's row: a multiple of 16, at most the swizzle's {}", map.swizzle));
    }
    for d in map.strides.iter().chain([&map.offset]) {
        if d.as_const().is_some_and(|c| c * i64::from(width) % 16 != 0) {
            return Err(format!("a stride or offset of {d} elements is no multiple of 16 bytes"));
        }
    }
    Ok(())
}

fn word(kernel: &Kernel, w: &H, s: &Stmt) -> Result<(), String> {
    let threads = kernel.launch.threads;
    let buf = |i: usize| kernel.buf(s.bufs[i]);
    let aligned = |i: usize, to: u32| {
        let have = if buf(i).align == 0 { 64 } else { buf(i).align };
        if have >= to { Ok(()) } else { Err(format!("{} is aligned to {have} bytes, {to} are needed", s.bufs[i])) }
    };
    let boxed = |number: u8, coords: usize| {
        let map = kernel.maps.get(usize::from(number)).ok_or_else(|| format!("there is no tensor map {number}"))?;
        if coords != map.dims.len() {
            return Err(format!("{coords} coordinates of a tensor of rank {}", map.dims.len()));
        }
        if kernel.buf(map.arg).dtype != buf(0).dtype {
            return Err("tensor and tile differ in dtype".to_owned());
        }
        if buf(0).len.is_some_and(|n| n < map.box_len()) {
            return Err(format!("a box of {} elements does not fit", map.box_len()));
        }
        aligned(0, alignment(map.swizzle))
    };
    match w {
        H::Roles(roles) => {
            let groups: u32 = roles.iter().map(|r| u32::from(r.groups)).sum();
            if groups * 128 != threads {
                return Err(format!("{groups} warpgroups in roles, {threads} threads in the block"));
            }
            let asked: u32 = roles.iter().map(|r| u32::from(r.groups) * 128 * u32::from(r.regs)).sum();
            if asked > 65536 {
                return Err(format!("{asked} registers, a multiprocessor has 65536"));
            }
            for r in roles.iter().filter(|r| r.regs > 0) {
                if r.regs % 8 != 0 || !(24..=256).contains(&r.regs) {
                    return Err(format!("{} registers a thread: a multiple of 8 from 24 to 256", r.regs));
                }
                // Without a known count at entry the assembler ignores the change.
                if kernel.launch.min_ctas != 1 && kernel.launch.max_regs == 0 {
                    return Err("registers are moved between roles, but the kernel does not fix how many it starts with".to_owned());
                }
            }
            Ok(())
        }
        H::TmaLoad { map, multicast } => {
            let blocks: u32 = kernel.launch.cluster.iter().product();
            if blocks < 16 && u32::from(*multicast) >> blocks != 0 {
                return Err(format!("multicast to {multicast:#b} in a cluster of {blocks}"));
            }
            boxed(*map, s.args.len() - 2)
        }
        H::TmaStore { map } => boxed(*map, s.args.len() - 1),
        H::Wgmma { .. } => (0..s.bufs.len()).try_for_each(|i| aligned(i, 1024)),
        H::StMatrix { col, .. } => {
            if col % 16 != 0 {
                return Err(format!("begins at column {col}, which is no multiple of 16"));
            }
            aligned(0, 1024)
        }
        H::NamedSync { threads: n } | H::NamedArrive { threads: n } if u32::from(*n) > threads => {
            Err(format!("{n} threads at a barrier, {threads} in the block"))
        }
        H::ClusterSync | H::ClusterRank if kernel.launch.cluster == [1, 1, 1] => Err("the kernel is launched without clusters".to_owned()),
        _ => Ok(()),
    }
}

/// Barriers are set up, made visible, and all threads have met, before the roles part.
fn barriers_are_seen(body: &Block) -> Result<(), String> {
    let (mut fenced, mut met) = (false, false);
    let contains = |s: &Stmt, f: &dyn Fn(&Op) -> bool| {
        fn any(s: &Stmt, f: &dyn Fn(&Op) -> bool) -> bool {
            f(&s.op) || s.blocks.iter().flat_map(|b| &b.stmts).any(|s| any(s, f))
        }
        any(s, f)
    };
    for s in &body.stmts {
        if matches!(&s.op, Op::Hopper(H::Roles(_))) {
            break;
        }
        if contains(s, &|op| matches!(op, Op::Hopper(H::MbarInit { .. }))) {
            (fenced, met) = (false, false);
        }
        if contains(s, &|op| matches!(op, Op::Hopper(H::FenceMbarInit))) {
            fenced = true;
        }
        if fenced && matches!(&s.op, Op::Barrier | Op::Hopper(H::ClusterSync)) {
            met = true;
        }
    }
    match (fenced, met) {
        (false, _) => Err("`fence_mbar_init` is missing".to_owned()),
        (_, false) => Err("the threads do not meet between setting barriers up and using them".to_owned()),
        _ => Ok(()),
    }
}

/// What is known of stores to shared memory, in text order.
#[derive(Default)]
struct Proxy {
    /// Threads have written since the last fence.
    dirty: bool,
    /// There are bulk stores, and a wait for their end after the last of them.
    stored: bool,
    drained: bool,
}

fn order(block: &Block, state: &mut Proxy) -> Result<(), String> {
    for s in &block.stmts {
        match &s.op {
            Op::Hopper(H::StMatrix { .. }) => state.dirty = true,
            Op::Hopper(H::FenceProxyAsync) => state.dirty = false,
            Op::Hopper(H::TmaStore { .. }) => {
                if state.dirty {
                    return Err("reads what threads have written without `fence_proxy_async` in between".to_owned());
                }
                (state.stored, state.drained) = (true, false);
            }
            Op::Hopper(H::BulkWait { read: false, .. }) => state.drained = true,
            // What the end of a loop's body leaves is there at its start.
            Op::For | Op::While => s.blocks.iter().chain(&s.blocks).try_for_each(|b| order(b, state))?,
            _ => s.blocks.iter().try_for_each(|b| order(b, state))?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::hopper_gemm::{Rhs, Tiles, plain};
    use crate::targets::Target;
    use pavage_ir::{DType, Dim};

    fn gemm() -> Kernel {
        plain("gemm", DType::BF16, DType::BF16, Rhs::Kn, Tiles { bn: 256, stages: 3, cluster: 2, group: 8 }, false)
    }

    /// The whole checker refuses, for a reason with these words.
    fn refused(k: &Kernel, words: &str) {
        let limits = Target::parse("sm_90a").expect("a target").limits();
        let e = crate::tile::check::check(k, &limits).expect_err(words);
        assert!(e.to_string().contains(words), "{e}, not {words}");
    }

    fn edit(k: &mut Kernel, f: &mut dyn FnMut(&mut Vec<Stmt>, usize) -> bool) {
        fn walk(b: &mut Block, f: &mut dyn FnMut(&mut Vec<Stmt>, usize) -> bool) -> bool {
            for i in 0..b.stmts.len() {
                if f(&mut b.stmts, i) || b.stmts[i].blocks.iter_mut().any(|b| walk(b, f)) {
                    return true;
                }
            }
            false
        }
        assert!(walk(&mut k.body, f), "nothing to edit");
    }

    fn without(name: &str) -> Kernel {
        let mut k = gemm();
        edit(&mut k, &mut |stmts, i| {
            let hit = stmts[i].op.name() == name;
            if hit {
                stmts.remove(i);
            }
            hit
        });
        k
    }

    #[test]
    fn the_gemm_is_accepted() {
        let limits = Target::parse("sm_90a").expect("a target").limits();
        crate::tile::check::check(&gemm(), &limits).expect("a right kernel");
    }

    #[test]
    fn what_the_hardware_refuses_is_refused() {
        let mut k = gemm();
        k.maps[0].boxes = vec![128, 64];
        refused(&k, "at most the swizzle's 128");
        let mut k = gemm();
        k.maps[0].boxes = vec![64, 512];
        refused(&k, "1 to 256 an axis");
        let mut k = gemm();
        k.maps[1].strides[0] = Dim::from(100i64);
        refused(&k, "no multiple of 16 bytes");
        let mut k = gemm();
        k.launch.min_ctas = 0;
        k.launch.max_regs = 0;
        refused(&k, "does not fix how many it starts with");
        let mut k = gemm();
        k.launch.threads = 256;
        refused(&k, "warpgroups in roles");
        let mut k = gemm();
        k.launch.cluster = [1, 1, 1];
        refused(&k, "cluster");
        let mut k = gemm();
        k.bufs.iter_mut().filter(|b| b.space == Space::Shared).for_each(|b| b.align = 64);
        refused(&k, "1024 are needed");
        let mut k = gemm();
        edit(&mut k, &mut |stmts, i| {
            let Op::Hopper(H::Roles(roles)) = &mut stmts[i].op else { return false };
            roles[1].regs = 256;
            true
        });
        refused(&k, "a multiprocessor has 65536");
        // Four stages beside the staged result do not fit.
        let k = plain("gemm", DType::BF16, DType::BF16, Rhs::Kn, Tiles { bn: 256, stages: 4, cluster: 2, group: 8 }, false);
        refused(&k, "shared bytes");
    }

    #[test]
    fn what_the_hardware_gets_wrong_is_refused() {
        refused(&without("fence_proxy_async"), "without `fence_proxy_async`");
        refused(&without("fence_mbar_init"), "`fence_mbar_init` is missing");
        refused(&without("cluster_sync"), "do not meet");
        let mut k = gemm();
        let mut nth = 0;
        edit(&mut k, &mut |stmts, i| {
            let hit = stmts[i].op.name() == "bulk_wait";
            nth += u32::from(hit);
            if hit && nth == 2 {
                stmts.remove(i);
                return true;
            }
            false
        });
        refused(&k, "may end before its stores are done");
    }
}
