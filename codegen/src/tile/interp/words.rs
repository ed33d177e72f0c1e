//! Device words: what they do to values, shared memory and other agents.
use super::{Machine, Progress};
use crate::tile::{Stmt, hopper::HopperWord, mma::MmaWord};

/// Run an Ampere word. Asynchronous copies are done when they are issued, so there is nothing to wait for.
pub(super) fn mma(_machine: &mut Machine<'_>, _agent: usize, word: &MmaWord, _stmt: &Stmt) -> Result<Progress, String> {
    match word {
        MmaWord::CpAsyncCommit | MmaWord::CpAsyncWait { .. } => Ok(Progress::Done),
    }
}

/// Run a Hopper word.
pub(super) fn hopper(_machine: &mut Machine<'_>, _agent: usize, word: &HopperWord, _stmt: &Stmt) -> Result<Progress, String> {
    match word {
        // Order is what the interpreter has anyway.
        HopperWord::FenceProxyAsync | HopperWord::PdlWait | HopperWord::PdlTrigger => Ok(Progress::Done),
        _ => Err("has no meaning to the interpreter".to_owned()),
    }
}

/// Which block of a word with blocks an agent takes.
pub(super) fn choose(_machine: &mut Machine<'_>, _agent: usize, stmt: &Stmt) -> Result<usize, String> {
    Err(format!("{} has no blocks to choose from", stmt.op.name()))
}
