//! The examples run, and a deployed program needs neither a compiler nor much room.
mod support;

use std::path::PathBuf;
use std::process::Command;
use support::{folder, pavage, root};

/// Where cargo put the examples: beside the program.
fn example(name: &str) -> String {
    let folder = PathBuf::from(env!("CARGO_BIN_EXE_pavage")).with_file_name("examples");
    let out = Command::new(folder.join(name)).current_dir(root()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn examples_run() {
    assert!(example("01_compile_and_run").contains("[3, 10] logits"));
    let plans = example("02_fused_and_unfused");
    assert!(plans.contains("unfused: ") && plans.contains("conv"), "{plans}");
    let text = example("03_ir_text");
    let z = text.lines().last().unwrap();
    // tanh(0.5) + 1, tanh(-1) + 2, tanh(0.75) + 3, 4
    for part in ["1.4621", "1.2384", "3.6351", "4.0"] {
        assert!(z.contains(part), "{z}");
    }
}

/// Builds the deployed program as if LLVM were nowhere, strips it, weighs it and runs it.
#[test]
fn a_deployed_program_is_small_and_needs_no_compiler() {
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--release", "--locked", "-p", "pavage-example-deploy"]).current_dir(root());
    for variable in ["MLIR_SYS_220_PREFIX", "TABLEGEN_220_PREFIX", "LLVM_SYS_221_PREFIX", "LIBCLANG_PATH"] {
        build.env(variable, "/nonexistent");
    }
    let built = build.output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("release");
    let dir = folder("deploy");
    let program = dir.join("deploy");
    let stripped = Command::new("strip").arg("-o").arg(&program).arg(target.join("pavage-example-deploy")).status().unwrap();
    assert!(stripped.success());
    let size = std::fs::metadata(&program).unwrap().len();
    assert!(size < 5_000_000, "{size} bytes");

    let artifact = dir.join("digits.pav");
    pavage(["compile", "examples/models/digits.onnx", "-o", artifact.to_str().unwrap()]).exits(0);
    let ran = Command::new(&program).arg(&artifact).env_clear().output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    assert!(String::from_utf8(ran.stdout).unwrap().ends_with("is a 7\n"));
}
