//! Artifacts that were compiled on the fly, kept in the user's cache folder.
use pavage::runtime::{content_hash, host_level};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Where artifacts are kept: `$PAVAGE_CACHE`, else `pavage` in `$XDG_CACHE_HOME` or `~/.cache`.
/// None when there is no home.
pub(crate) fn folder() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v: &OsString| !v.is_empty());
    if let Some(path) = var("PAVAGE_CACHE") {
        return Some(path.into());
    }
    let base = var("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(var("HOME")?).join(".cache")));
    base.map(|b| b.join("pavage"))
}

/// The file of a model compiled with these flags by this program, for this CPU.
pub(crate) fn place(model: &Path, flags: &[String]) -> Option<PathBuf> {
    let mut key = Vec::new();
    let mut add = |text: &str| {
        key.extend(text.as_bytes());
        key.push(0);
    };
    add(env!("CARGO_PKG_VERSION"));
    add(&stamp(&std::env::current_exe().ok()?)?);
    add(host_level());
    add(&cpu_name());
    flags.iter().for_each(|f| add(f));
    let bytes = std::fs::read(model).ok()?;
    add(&content_hash(&bytes));
    if refers_to_other_files(&bytes) {
        for (path, stamp) in neighbours(model) {
            add(&path);
            add(&stamp);
        }
    }
    Some(folder()?.join(format!("{}.pav", content_hash(&key))))
}

/// Length and time of change: enough to see that a file is another.
fn stamp(path: &Path) -> Option<String> {
    let meta = path.metadata().ok()?;
    let changed = meta.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(format!("{} {}", meta.len(), changed.as_nanos()))
}

/// Whether a model may keep weights in other files: it says `location` as a key.
fn refers_to_other_files(bytes: &[u8]) -> bool {
    const KEY: &[u8] = b"\x0a\x08location";
    bytes.windows(KEY.len()).any(|w| w == KEY)
}

fn neighbours(model: &Path) -> BTreeMap<String, String> {
    let folder = match model.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|e| Some((e.path().to_string_lossy().into_owned(), stamp(&e.path())?))).collect()
}

/// The CPU's name, so that code for one is not found by another that shares the folder.
pub(crate) fn cpu_name() -> String {
    let mut info = String::new();
    if let Ok(mut file) = std::fs::File::open("/proc/cpuinfo") {
        file.read_to_string(&mut info).ok();
    }
    let field = |key: &str| {
        let line = info.lines().find(|l| l.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_string())
    };
    field("model name").unwrap_or_else(|| std::env::consts::ARCH.into())
}
