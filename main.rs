//! The `pavage` binary.
fn main() {}
