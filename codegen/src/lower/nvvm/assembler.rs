//! NVIDIA's assembler as a test: what it says about our PTX.
use crate::compile::ptx;
use crate::targets::Target;
use crate::tile::Kernel;
use std::path::PathBuf;
use std::process::Command;

/// `ptxas`: named by `PAVAGE_PTXAS`, on the path, or where `x` caches it.
fn ptxas() -> Option<PathBuf> {
    if let Some(p) = std::env::var_os("PAVAGE_PTXAS") {
        return Some(p.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let cache = [concat!(env!("CARGO_MANIFEST_DIR"), "/../.cache/nvcc/nvidia/cu13/bin")].map(PathBuf::from);
    std::env::split_paths(&path).chain(cache).map(|d| d.join("ptxas")).find(|p| p.is_file())
}

/// Assemble and hold the result to: no spills, no stack, no remark about serialised or ignored instructions.
pub(crate) fn assemble(kernels: &[Kernel], arch: &str) {
    let target = Target::parse(arch).expect("a target");
    let text = ptx(kernels, &target).unwrap_or_else(|e| panic!("{arch}: {e}"));
    let Some(ptxas) = ptxas() else {
        assert!(std::env::var_os("PAVAGE_REQUIRE_PTXAS").is_none(), "ptxas not found");
        println!("SKIPPED: no ptxas (set PAVAGE_PTXAS); PTX for {arch} was made but not assembled");
        return;
    };
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let stem = std::env::temp_dir().join(format!("pavage-ptx-{}-{n}", std::process::id()));
    let (source, object) = (stem.with_extension("ptx"), stem.with_extension("cubin"));
    std::fs::write(&source, &text).expect("a temporary file");
    let out = Command::new(ptxas).arg("-v").arg(format!("-arch={arch}")).arg(&source).arg("-o").arg(&object).output().expect("ptxas runs");
    let said = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
    let keep = !out.status.success();
    if !keep {
        let _ = std::fs::remove_file(&source);
    }
    let _ = std::fs::remove_file(&object);
    assert!(out.status.success(), "{}: {said}", source.display());
    for line in said.lines() {
        assert!(!line.contains("C75"), "{line}");
        if line.contains("stack frame") {
            assert!(line.contains("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"), "{line}\n{said}");
        }
    }
}

/// On the baseline and on Hopper.
pub(crate) fn assemble_everywhere(kernels: &[Kernel]) {
    assemble(kernels, "sm_80");
    assemble(kernels, "sm_90a");
}
