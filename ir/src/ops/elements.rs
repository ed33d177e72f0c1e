//! Elements of tensors as typed vectors, for evaluators.
