//! The same model and flags give the same bytes, whatever the number of threads.
mod support;

use support::{folder, pavage};

#[test]
fn threads_do_not_show_in_the_artifact() {
    let dir = folder("determinism");
    let compile = |name: &str, threads: &str| {
        let path = dir.join(name);
        let target = ["--target", "native,x86-64-v3,sm_80"];
        pavage(["compile", "examples/models/digits.onnx", "--threads", threads, "-o", path.to_str().unwrap()].into_iter().chain(target)).exits(0);
        std::fs::read(path).unwrap()
    };
    let one = compile("one.pav", "1");
    assert!(one.len() > 10_000);
    for (name, threads) in [("again.pav", "1"), ("two.pav", "2"), ("seven.pav", "7")] {
        assert!(compile(name, threads) == one, "{name} differs from one.pav");
    }
}
