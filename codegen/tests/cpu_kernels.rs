//! Hand-built kernels, compiled and run, against the interpreter and plain Rust.
mod common;
use common::{Noise, bytes, load, numbers};
use pavage_codegen::tile::{Access, Builder, Device, Kernel};
use pavage_ir::DType;

fn saxpy() -> Kernel {
    let mut b = Builder::new("saxpy", Device::Cpu { lanes: 8 });
    let (x, y) = (b.arg(DType::F32, Access::Read), b.arg(DType::F32, Access::ReadWrite));
    let (lo, hi) = (b.lo(), b.hi());
    let two = b.float(2.5, DType::F32);
    let span = b.sub(hi, lo);
    let rest = b.rem_i(span, 8);
    let main = b.sub(hi, rest);
    b.for_(lo, main, 8, &[], |b, i, _| {
        let (xv, yv) = (b.load(x, i, 8), b.load(y, i, 8));
        let r = b.fma(two, xv, yv);
        b.store(y, i, r);
        vec![]
    });
    let xv = b.load_upto(x, main, 8, rest);
    let yv = b.load_upto(y, main, 8, rest);
    let r = b.fma(two, xv, yv);
    b.store_upto(y, main, r, rest);
    b.finish()
}

#[test]
fn saxpy_does_its_tail() {
    let lib = load(&[saxpy()], "native");
    let mut noise = Noise(1);
    let (x, y) = (noise.floats(1003), noise.floats(1003));
    let mut bufs = vec![bytes(&x), bytes(&y)];
    lib.call("saxpy", &mut bufs, &[], (5, 1003));
    let got: Vec<f32> = numbers(&bufs[1]);
    for i in 0..1003 {
        let want = if i < 5 { y[i] } else { 2.5f32.mul_add(x[i], y[i]) };
        assert_eq!(got[i], want, "element {i}");
    }
}
