//! Ampere words.
use super::{Lower, Lowered};
use crate::tile::Stmt;
use crate::tile::mma::MmaWord;

impl Lower<'_> {
    pub(super) fn mma(&mut self, w: &MmaWord, _s: &Stmt) -> Lowered {
        match w {
            MmaWord::CpAsyncCommit => self.e.line("nvvm.cp.async.commit.group"),
            MmaWord::CpAsyncWait { pending } => self.e.line(format!("nvvm.cp.async.wait.group {pending}")),
        }
        Ok(())
    }
}
