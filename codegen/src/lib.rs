//! Regions to code: the tile IR, kernel families, and the lowerings to CPU objects and PTX.
pub mod choices;
pub mod compile;
pub mod cost;
pub mod emit;
pub mod kernels;
pub mod link;
pub mod llvm;
pub mod lower;
pub mod mlir;
pub mod targets;
pub mod tile;
pub mod wire;
