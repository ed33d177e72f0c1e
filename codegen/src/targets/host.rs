//! This machine's CPU as a target.
use super::Cpu;

/// The CPU this program runs on: the widest level it has, with its own instructions and caches.
pub(super) fn detect() -> Cpu {
    let (llvm_cpu, llvm_features) = crate::llvm::host_cpu();
    let has = |f: &str| llvm_features.split(',').any(|g| g.strip_prefix('+') == Some(f));
    let wide = ["avx512f", "avx512bw", "avx512dq", "avx512vl"].iter().all(|f| has(f));
    let base = if wide { Cpu::v4() } else { Cpu::v3() };
    let vnni = has("avx512vnni") && wide;
    Cpu {
        name: "native".to_owned(),
        vnni,
        l1_bytes: cache_bytes(1).unwrap_or(base.l1_bytes),
        l2_bytes: cache_bytes(2).unwrap_or(base.l2_bytes),
        l3_bytes: cache_bytes(3).unwrap_or(base.l3_bytes),
        llvm_cpu,
        llvm_features,
        ..base
    }
}

/// Size of the data or unified cache of this level, as Linux tells it.
fn cache_bytes(level: u32) -> Option<u64> {
    (0..8).find_map(|i| {
        let read = |what: &str| std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{i}/{what}")).ok();
        if read("level")?.trim().parse::<u32>().ok()? != level || read("type")?.trim() == "Instruction" {
            return None;
        }
        read("size")?.trim().strip_suffix('K')?.parse::<u64>().ok().map(|k| k << 10)
    })
}
