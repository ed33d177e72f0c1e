//! Linking objects into one shared object with lld, found as `ld.lld-22` or `ld.lld`.
use std::{
    io,
    path::{Path, PathBuf},
    process::Command,
};

/// Why objects did not become a shared object.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No linker on this machine.
    #[error("no lld found: looked for {tried}; install lld 22 (`./x` does)")]
    NoLinker {
        /// Where it was looked for.
        tried: String,
    },
    /// The linker refused: an error of ours.
    #[error("lld: {0}")]
    Failed(String),
    /// A temporary file could not be written or read.
    #[error("linking: {0}")]
    Io(#[from] io::Error),
}

fn linker() -> Result<PathBuf, LinkError> {
    let mut tried = vec![];
    let on_path = std::env::var_os("PATH").map(|p| std::env::split_paths(&p).collect::<Vec<_>>()).unwrap_or_default();
    let installed = [PathBuf::from("/usr/lib/llvm-22/bin")];
    for name in ["ld.lld-22", "ld.lld"] {
        for dir in on_path.iter().chain(&installed) {
            let path = dir.join(name);
            if path.is_file() {
                return Ok(path);
            }
        }
        tried.push(format!("{name} on PATH and in {}", installed[0].display()));
    }
    Err(LinkError::NoLinker { tried: tried.join(", ") })
}

/// Link relocatable objects into a shared object that needs no other library. A symbol that none of them defines is an
/// error. The bytes depend on the objects alone.
pub fn link(objects: &[Vec<u8>]) -> Result<Vec<u8>, LinkError> {
    let linker = linker()?;
    let dir = scratch_dir()?;
    let result = link_in(&linker, dir.as_path(), objects);
    // Leftovers are harmless: the folder is the system's temporary one.
    let _ = std::fs::remove_dir_all(&dir);
    result
}

fn link_in(linker: &Path, dir: &Path, objects: &[Vec<u8>]) -> Result<Vec<u8>, LinkError> {
    let mut command = Command::new(linker);
    command.current_dir(dir).args(["-shared", "--no-undefined", "-z", "noseparate-code", "--no-rosegment", "--build-id=none", "--threads=1", "-o", "out.so"]);
    for (i, object) in objects.iter().enumerate() {
        let name = format!("{i}.o");
        std::fs::write(dir.join(&name), object)?;
        command.arg(name);
    }
    let output = command.output()?;
    if !output.status.success() {
        return Err(LinkError::Failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(std::fs::read(dir.join("out.so"))?)
}

/// A folder of our own under the system's temporary one.
fn scratch_dir() -> io::Result<PathBuf> {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let dir = std::env::temp_dir().join(format!("pavage-link-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        match std::fs::create_dir(&dir) {
            Ok(()) => return Ok(dir),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
}
