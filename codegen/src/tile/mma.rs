//! Ampere matrix words (sm_80): warp matrix products, matrix loads and asynchronous copies.
use super::{BufInfo, Ty};
use std::collections::BTreeMap;

/// An operation of sm_80, with its attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MmaWord {
    /// Close the group of asynchronous copies issued so far by this thread.
    CpAsyncCommit,
    /// Wait until at most `pending` groups of this thread are in flight.
    CpAsyncWait {
        /// Groups that may still be in flight.
        pending: u8,
    },
}

impl MmaWord {
    /// The name in text.
    pub fn name(&self) -> &'static str {
        match self {
            MmaWord::CpAsyncCommit => "cp_async_commit",
            MmaWord::CpAsyncWait { .. } => "cp_async_wait",
        }
    }

    /// The attributes in text.
    pub fn attrs(&self) -> Vec<(&'static str, String)> {
        match self {
            MmaWord::CpAsyncCommit => vec![],
            MmaWord::CpAsyncWait { pending } => vec![("pending", pending.to_string())],
        }
    }

    /// The word with this name, `None` if there is none.
    pub fn parse(name: &str, attrs: &BTreeMap<String, String>) -> Result<Option<MmaWord>, String> {
        Ok(match name {
            "cp_async_commit" => Some(MmaWord::CpAsyncCommit),
            "cp_async_wait" => {
                let pending = attrs.get("pending").and_then(|t| t.parse().ok()).ok_or("needs `pending=`")?;
                Some(MmaWord::CpAsyncWait { pending })
            }
            _ => None,
        })
    }

    /// Whether the result depends on the operands alone.
    pub fn is_pure(&self) -> bool {
        false
    }

    /// Whether operands and results are of the right types.
    pub fn check(&self, args: &[Ty], bufs: &[&BufInfo], results: &[Ty]) -> Result<(), String> {
        if args.is_empty() && bufs.is_empty() && results.is_empty() { Ok(()) } else { Err("takes and gives nothing".to_owned()) }
    }
}
