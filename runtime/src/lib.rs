//! Load and run Pavage artifacts: no compiler, no LLVM, no CUDA toolkit.
