//! Hopper words: what sm_90a adds to the core operations, and tensor maps.
use super::{Buf, BufInfo, Ty};
use std::collections::BTreeMap;

/// An operation of sm_90a, with its attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HopperWord {
    /// Make this thread's shared-memory writes visible to the asynchronous proxy (TMA, wgmma).
    FenceProxyAsync,
}

impl HopperWord {
    /// The name in text.
    pub fn name(&self) -> &'static str {
        match self {
            HopperWord::FenceProxyAsync => "fence_proxy_async",
        }
    }

    /// The attributes in text.
    pub fn attrs(&self) -> Vec<(&'static str, String)> {
        vec![]
    }

    /// The word with this name, `None` if there is none.
    pub fn parse(name: &str, _attrs: &BTreeMap<String, String>) -> Result<Option<HopperWord>, String> {
        Ok((name == "fence_proxy_async").then_some(HopperWord::FenceProxyAsync))
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

/// A TMA descriptor parameter: how a global argument is cut into boxes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// The argument it describes.
    pub arg: Buf,
}

impl TensorMap {
    /// The description in text, one line.
    pub fn text(&self) -> String {
        format!("@{}", self.arg.0)
    }

    /// Read what [`TensorMap::text`] writes.
    pub fn parse(text: &str) -> Result<TensorMap, String> {
        let arg = text.strip_prefix('@').and_then(|t| t.parse().ok()).ok_or_else(|| format!("bad tensor map `{text}`"))?;
        Ok(TensorMap { arg: Buf(arg) })
    }
}
