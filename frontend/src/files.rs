//! Mapped files.
use memmap2::{Mmap, MmapMut};
use std::{
    fs::File,
    io::{Error, ErrorKind, Result},
    path::Path,
    sync::Arc,
};

/// Map a regular file for reading.
pub(crate) fn map_file(path: &Path) -> Result<Arc<Mmap>> {
    // Asked before opening: opening a pipe would wait for its other end.
    if !std::fs::metadata(path)?.is_file() {
        return Err(Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    let file = File::open(path)?;
    // SAFETY: the mapping is read-only. Should another process truncate or rewrite the file meanwhile, contents change or
    // the process is signalled, as with every mapped model; `onnx::load` says so.
    Ok(Arc::new(unsafe { Mmap::map(&file)? }))
}

/// Bytes as a read-only anonymous mapping, so that tensors can refer to them.
pub(crate) fn map_bytes(bytes: &[u8]) -> Result<Arc<Mmap>> {
    let mut map = MmapMut::map_anon(bytes.len().max(1))?;
    map[..bytes.len()].copy_from_slice(bytes);
    map.make_read_only().map(Arc::new)
}
