//! Converters, by family: each takes a node and emits core ops.
pub(crate) mod activation;
pub(crate) mod control;
pub(crate) mod conv;
pub(crate) mod gather;
pub(crate) mod linear;
pub(crate) mod math;
pub(crate) mod ml;
pub(crate) mod norm;
pub(crate) mod quant;
pub(crate) mod reduce;
pub(crate) mod resize;
pub(crate) mod rnn;
pub(crate) mod shape;
pub(crate) mod trees;
pub(crate) mod view;
