//! Type rules and reference evaluators, by op family.
pub(crate) mod control;
pub(crate) mod conv;
pub(crate) mod gather;
pub(crate) mod matmul;
pub(crate) mod pointwise;
pub(crate) mod pool;
pub(crate) mod reduce;
pub(crate) mod resize;
pub(crate) mod rnn;
pub(crate) mod sort;
pub(crate) mod tree;
pub(crate) mod view;
