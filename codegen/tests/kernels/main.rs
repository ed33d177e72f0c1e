//! Kernels against what they mean: one program, because each program that links LLVM is large.
mod common;
mod cpu;
mod decode;
mod families;
mod gpu;
mod hopper;
mod interpreter;
mod math;
mod matrix;
mod ops;
mod winograd;
