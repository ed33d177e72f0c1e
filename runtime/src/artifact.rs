//! `Artifact`: an opened file. `FORMAT.md` describes the bytes.
use crate::bytes::AlignedBytes;
use crate::plan::{Explanation, Manifest, Plan, Port, TensorData};
use crate::{Error, validate};
use memmap2::Mmap;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// First bytes of every artifact.
pub(crate) const MAGIC: [u8; 8] = *b"PAVAGE\0\x01";
/// Format written, and newest format read.
pub const FORMAT_VERSION: u32 = 1;
/// Oldest format read.
pub const OLDEST_FORMAT: u32 = 1;
/// Bytes before the table of contents.
pub(crate) const HEADER_LEN: usize = 64;
/// Bytes of one entry of the table of contents.
pub(crate) const ENTRY_LEN: usize = 48;
/// Segments begin at multiples of this.
pub(crate) const SEGMENT_ALIGN: usize = 4096;
/// Tensors begin at multiples of this.
pub(crate) const TENSOR_ALIGN: usize = 256;
/// A file has at most so many segments.
pub(crate) const MAX_SEGMENTS: usize = 1 << 16;

/// What a segment holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentKind {
    /// The manifest, as JSON.
    Manifest,
    /// Code for one target.
    Code,
    /// Constants.
    Weights,
    /// Why each kernel is what it is, as JSON.
    Explanations,
    /// Something a newer writer added; skipped.
    Other(u32),
}

impl SegmentKind {
    pub(crate) fn number(self) -> u32 {
        match self {
            SegmentKind::Manifest => 1,
            SegmentKind::Code => 2,
            SegmentKind::Weights => 3,
            SegmentKind::Explanations => 4,
            SegmentKind::Other(n) => n,
        }
    }

    fn from_number(n: u32) -> Self {
        match n {
            1 => SegmentKind::Manifest,
            2 => SegmentKind::Code,
            3 => SegmentKind::Weights,
            4 => SegmentKind::Explanations,
            n => SegmentKind::Other(n),
        }
    }
}

/// A row of the table of contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// What it holds.
    pub kind: SegmentKind,
    /// Bytes from the file's start.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// First 16 bytes of the blake3 hash.
    pub checksum: [u8; 16],
}

/// The first 16 bytes of the blake3 hash.
pub(crate) fn checksum(bytes: &[u8]) -> [u8; 16] {
    let mut short = [0; 16];
    short.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    short
}

/// The first 16 bytes of the blake3 hash as the hex text that [`TensorData::External`] holds.
pub fn content_hash(bytes: &[u8]) -> String {
    checksum(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// An opened artifact; cheap to clone. Sessions keep it alive.
#[derive(Clone)]
pub struct Artifact {
    inner: Arc<Inner>,
}

struct Inner {
    storage: Storage,
    segments: Vec<Segment>,
    manifest: Manifest,
    /// Files with weights, by their path in the manifest.
    external: BTreeMap<String, Mmap>,
}

enum Storage {
    Mapped(Mmap),
    Owned(AlignedBytes),
}

impl Storage {
    fn bytes(&self) -> &[u8] {
        match self {
            Storage::Mapped(map) => map,
            Storage::Owned(bytes) => bytes,
        }
    }
}

impl Artifact {
    /// Maps the file, checks its table of contents and its manifest. The file must not change
    /// while it is open. Code is checked when a session loads it, weights by
    /// [`Artifact::verify`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let map = map_file(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let folder = path.parent().unwrap_or(Path::new(".")).to_path_buf();
        Artifact::from_storage(Storage::Mapped(map), Some(folder))
    }

    /// An artifact from its bytes; it may not refer to other files.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        // Look before copying: a file that is no artifact costs nothing.
        check_header(bytes)?;
        Artifact::from_storage(Storage::Owned(AlignedBytes::copy_of(bytes)?), None)
    }

    fn from_storage(storage: Storage, folder: Option<PathBuf>) -> Result<Self, Error> {
        let bytes = storage.bytes();
        let segments = read_contents(bytes)?;
        let of = |s: &Segment| &bytes[s.offset as usize..(s.offset + s.len) as usize];
        let mut manifests = segments.iter().filter(|s| s.kind == SegmentKind::Manifest);
        let (Some(first), None) = (manifests.next(), manifests.next()) else {
            return Err(Error::Damaged("it must have exactly one manifest".into()));
        };
        if checksum(of(first)) != first.checksum {
            return Err(Error::Checksum("the manifest".into()));
        }
        let manifest: Manifest = serde_json::from_slice(of(first)).map_err(|e| Error::Damaged(format!("its manifest does not parse: {e}")))?;
        validate::manifest(&manifest, &segments)?;
        let external = map_external(&manifest, folder.as_deref())?;
        Ok(Artifact { inner: Arc::new(Inner { storage, segments, manifest, external }) })
    }

    /// The description of the model.
    pub fn manifest(&self) -> &Manifest {
        &self.inner.manifest
    }

    /// The inputs, in order.
    pub fn inputs(&self) -> &[Port] {
        &self.inner.manifest.inputs
    }

    /// The outputs, in order.
    pub fn outputs(&self) -> &[Port] {
        &self.inner.manifest.outputs
    }

    /// The plans of this name, one a target.
    pub fn plans<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Plan> + 'a {
        self.inner.manifest.plans.iter().filter(move |p| p.name == name)
    }

    /// The table of contents.
    pub fn segments(&self) -> &[Segment] {
        &self.inner.segments
    }

    /// Length of the file in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.inner.storage.bytes().len()
    }

    /// The bytes of `manifest().tensors[index]`; empty when there is none.
    pub fn tensor(&self, index: usize) -> &[u8] {
        let Some(entry) = self.inner.manifest.tensors.get(index) else { return &[] };
        let (all, offset, len) = match &entry.data {
            TensorData::Embedded { segment, offset, len } => (self.segment(*segment as usize), *offset, *len),
            TensorData::External { path, offset, len, .. } => (self.inner.external.get(path).map_or(&[][..], |m| m), *offset, *len),
        };
        // Ranges were checked when the artifact was opened.
        all.get(offset as usize..(offset + len) as usize).unwrap_or(&[])
    }

    fn segment(&self, index: usize) -> &[u8] {
        self.inner.segments.get(index).map_or(&[][..], |s| &self.inner.storage.bytes()[s.offset as usize..(s.offset + s.len) as usize])
    }

    /// The bytes of `manifest().codes[index]`, checked against their checksum.
    pub fn code(&self, index: usize) -> Result<&[u8], Error> {
        let entry = self.inner.manifest.codes.get(index);
        let segment = entry.map_or(usize::MAX, |e| e.segment as usize);
        let bytes = self.segment(segment);
        match self.inner.segments.get(segment) {
            Some(s) if checksum(bytes) == s.checksum => Ok(bytes),
            _ => Err(Error::Checksum(format!("the code for {}", entry.map_or("no target", |e| e.target.as_str())))),
        }
    }

    /// Why each kernel is what it is: for each plan of the manifest, its kernels. Empty where the artifact does not say.
    pub fn explanations(&self) -> Result<Vec<Vec<Explanation>>, Error> {
        let Some(at) = self.inner.segments.iter().position(|s| s.kind == SegmentKind::Explanations) else { return Ok(Vec::new()) };
        let bytes = self.segment(at);
        if checksum(bytes) != self.inner.segments[at].checksum {
            return Err(Error::Checksum("the explanations".into()));
        }
        serde_json::from_slice(bytes).map_err(|e| Error::Damaged(format!("the explanations cannot be read: {e}")))
    }

    /// Checks every segment and every weight file against its checksum; reads all of them.
    pub fn verify(&self) -> Result<(), Error> {
        for (i, segment) in self.inner.segments.iter().enumerate() {
            if checksum(self.segment(i)) != segment.checksum {
                return Err(Error::Checksum(format!("segment {i} ({:?})", segment.kind)));
            }
        }
        for (i, entry) in self.inner.manifest.tensors.iter().enumerate() {
            if let TensorData::External { path, hash, .. } = &entry.data
                && content_hash(self.tensor(i)) != *hash
            {
                return Err(Error::Checksum(format!("tensor `{}` in {path}", entry.name)));
            }
        }
        Ok(())
    }
}

fn map_file(path: &Path) -> std::io::Result<Mmap> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    // SAFETY: read only; callers are told that the file must not change while it is open.
    unsafe { Mmap::map(&file) }
}

fn word<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(found) = bytes.get(at..at + N) {
        out.copy_from_slice(found);
    }
    out
}

/// Checks magic, version and length; returns the number of segments.
fn check_header(bytes: &[u8]) -> Result<usize, Error> {
    if bytes.len() < MAGIC.len() || bytes[..MAGIC.len()] != MAGIC {
        return Err(Error::NotAnArtifact("it does not begin with PAVAGE"));
    }
    if bytes.len() < HEADER_LEN {
        return Err(Error::Damaged(format!("it ends after {} bytes", bytes.len())));
    }
    let version = u32::from_le_bytes(word(bytes, 8));
    if version > FORMAT_VERSION {
        return Err(Error::TooNew { found: version, oldest: OLDEST_FORMAT, newest: FORMAT_VERSION });
    }
    if version < OLDEST_FORMAT {
        return Err(Error::Damaged(format!("there never was a format {version}")));
    }
    let written = u64::from_le_bytes(word(bytes, 16));
    if written != bytes.len() as u64 {
        return Err(Error::Damaged(format!("{written} bytes were written, {} are here", bytes.len())));
    }
    let count = u32::from_le_bytes(word(bytes, 12)) as usize;
    if count > MAX_SEGMENTS || count > (bytes.len() - HEADER_LEN) / ENTRY_LEN {
        return Err(Error::Damaged(format!("no room for {count} segments")));
    }
    Ok(count)
}

fn read_contents(bytes: &[u8]) -> Result<Vec<Segment>, Error> {
    let count = check_header(bytes)?;
    let end = HEADER_LEN + count * ENTRY_LEN;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..24]).update(&bytes[HEADER_LEN..end]);
    if hasher.finalize().as_bytes()[..16] != bytes[24..40] {
        return Err(Error::Checksum("the table of contents".into()));
    }
    let mut free_from = end as u64;
    let mut segments = Vec::with_capacity(count);
    for i in 0..count {
        let at = HEADER_LEN + i * ENTRY_LEN;
        let segment = Segment {
            kind: SegmentKind::from_number(u32::from_le_bytes(word(bytes, at))),
            offset: u64::from_le_bytes(word(bytes, at + 8)),
            len: u64::from_le_bytes(word(bytes, at + 16)),
            checksum: word(bytes, at + 24),
        };
        let after = segment.offset.checked_add(segment.len);
        match after {
            Some(after) if segment.offset >= free_from && segment.offset.is_multiple_of(SEGMENT_ALIGN as u64) && after <= bytes.len() as u64 => {
                free_from = after;
            }
            _ => return Err(Error::Damaged(format!("segment {i} lies outside or overlaps"))),
        }
        segments.push(segment);
    }
    Ok(segments)
}

/// Maps each weight file once and checks that the ranges lie within.
fn map_external(manifest: &Manifest, folder: Option<&Path>) -> Result<BTreeMap<String, Mmap>, Error> {
    let mut files = BTreeMap::new();
    for entry in &manifest.tensors {
        let TensorData::External { path, offset, len, .. } = &entry.data else { continue };
        let fail = |why: String| Error::External { tensor: entry.name.clone(), path: path.clone(), why };
        if !files.contains_key(path) {
            let folder = folder.ok_or_else(|| fail("an artifact in memory has no folder".into()))?;
            let full = contained(folder, path).map_err(&fail)?;
            files.insert(path.clone(), map_file(&full).map_err(|e| fail(e.to_string()))?);
        }
        let size = files.get(path).map_or(0, |m| m.len() as u64);
        if offset.checked_add(*len).is_none_or(|end| end > size) {
            return Err(fail(format!("bytes {offset}+{len} lie beyond its {size} bytes")));
        }
    }
    Ok(files)
}

/// The file `path` in `folder`, if that is where it really is.
fn contained(folder: &Path, path: &str) -> Result<PathBuf, String> {
    let relative = Path::new(path);
    let plain = |c: Component| matches!(c, Component::Normal(_) | Component::CurDir);
    if path.is_empty() || !relative.components().all(plain) {
        return Err("the path leaves the artifact's folder".into());
    }
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let full = folder.join(relative).canonicalize().map_err(|e| e.to_string())?;
    let home = folder.canonicalize().map_err(|e| e.to_string())?;
    if full.starts_with(home) { Ok(full) } else { Err("it is a link out of the folder".into()) }
}
