//! `Writer`: the same content gives the same bytes.
use crate::artifact::{ENTRY_LEN, FORMAT_VERSION, HEADER_LEN, MAGIC, SEGMENT_ALIGN, Segment, SegmentKind, TENSOR_ALIGN, checksum};
use crate::plan::{CodeEntry, CodeKind, Explanation, Manifest, TensorData, TensorEntry};
use crate::{DType, Error, validate};
use std::borrow::Cow;
use std::collections::HashMap;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Collects code and constants, then writes an artifact.
///
/// Segments are written in this order: the manifest, code in the order it was added, weights, explanations.
#[derive(Default)]
pub struct Writer<'a> {
    codes: Vec<(CodeEntry, Cow<'a, [u8]>)>,
    tensors: Vec<TensorEntry>,
    /// Distinct tensor contents, in the order they were met, with their place in the segment.
    blobs: Vec<(u64, Cow<'a, [u8]>)>,
    by_hash: HashMap<blake3::Hash, usize>,
    weights_len: u64,
    explanations: Vec<u8>,
}

impl<'a> Writer<'a> {
    /// A writer with nothing in it.
    pub fn new() -> Self {
        Writer::default()
    }

    /// Adds code; the index is what [`Plan::code`](crate::plan::Plan::code) holds. `features`:
    /// see [`CodeEntry::features`].
    pub fn add_code(&mut self, target: &str, kind: CodeKind, features: &[String], bytes: impl Into<Cow<'a, [u8]>>) -> u32 {
        let index = self.codes.len() as u32;
        let entry = CodeEntry { target: target.into(), kind, segment: 1 + index, features: features.to_vec() };
        self.codes.push((entry, bytes.into()));
        index
    }

    /// Adds a constant; the index is what `BufferKind::Const` holds. Equal bytes are stored once.
    pub fn add_tensor(&mut self, name: &str, dtype: DType, shape: &[u64], bytes: impl Into<Cow<'a, [u8]>>) -> u32 {
        let bytes = bytes.into();
        let blob = *self.by_hash.entry(blake3::hash(&bytes)).or_insert_with(|| {
            let offset = self.weights_len.next_multiple_of(TENSOR_ALIGN as u64);
            self.weights_len = offset + bytes.len() as u64;
            self.blobs.push((offset, bytes));
            self.blobs.len() - 1
        });
        let (offset, stored) = &self.blobs[blob];
        let data = TensorData::Embedded { segment: 0, offset: *offset, len: stored.len() as u64 };
        self.push_tensor(name, dtype, shape, data)
    }

    /// Adds a constant that stays in another file, in the folder of the artifact. `hash` is
    /// [`content_hash`](crate::content_hash) of its bytes.
    pub fn add_external(&mut self, name: &str, dtype: DType, shape: &[u64], data: (&str, u64, u64), hash: &str) -> u32 {
        let (path, offset, len) = data;
        let data = TensorData::External { path: path.into(), offset, len, hash: hash.into() };
        self.push_tensor(name, dtype, shape, data)
    }

    /// Adds why each kernel of each plan is what it is, in the order of the manifest. Nothing is written for no plans.
    pub fn explain(&mut self, plans: &[Vec<Explanation>]) -> Result<(), Error> {
        self.explanations = if plans.is_empty() { Vec::new() } else { serde_json::to_vec(plans).map_err(|e| Error::Damaged(e.to_string()))? };
        Ok(())
    }

    fn push_tensor(&mut self, name: &str, dtype: DType, shape: &[u64], data: TensorData) -> u32 {
        self.tensors.push(TensorEntry { name: name.into(), dtype, shape: shape.to_vec(), data });
        self.tensors.len() as u32 - 1
    }

    /// Writes the artifact. `manifest.codes` and `manifest.tensors` are replaced by what was
    /// added; a manifest that a reader would refuse is an error here.
    pub fn write(mut self, mut manifest: Manifest, to: &mut dyn Write) -> Result<(), Error> {
        let weights_segment = 1 + self.codes.len() as u32;
        for tensor in &mut self.tensors {
            if let TensorData::Embedded { segment, .. } = &mut tensor.data {
                *segment = weights_segment;
            }
        }
        manifest.tensors = self.tensors;
        manifest.codes = self.codes.iter().map(|(entry, _)| entry.clone()).collect();
        let json = serde_json::to_vec(&manifest).map_err(|e| Error::Damaged(format!("the manifest cannot be written: {e}")))?;

        let n_segments = 2 + self.codes.len() + usize::from(!self.explanations.is_empty());
        let mut at = (HEADER_LEN + n_segments * ENTRY_LEN) as u64;
        let mut segments = Vec::with_capacity(n_segments);
        let mut place = |kind, len: u64, checksum| {
            let offset = at.next_multiple_of(SEGMENT_ALIGN as u64);
            at = offset + len;
            segments.push(Segment { kind, offset, len, checksum });
        };
        place(SegmentKind::Manifest, json.len() as u64, checksum(&json));
        for (_, code) in &self.codes {
            place(SegmentKind::Code, code.len() as u64, checksum(code));
        }
        let mut hasher = blake3::Hasher::new();
        write_weights(&self.blobs, &mut |bytes| {
            hasher.update(bytes);
            Ok(())
        })
        .map_err(io_error)?;
        let mut weights_sum = [0; 16];
        weights_sum.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        place(SegmentKind::Weights, self.weights_len, weights_sum);
        if !self.explanations.is_empty() {
            place(SegmentKind::Explanations, self.explanations.len() as u64, checksum(&self.explanations));
        }
        validate::manifest(&manifest, &segments)?;

        let mut out = Counted { to, at: 0 };
        let mut emit = || -> std::io::Result<()> {
            out.put(&header(&segments, at))?;
            out.pad_to(segments[0].offset)?;
            out.put(&json)?;
            for ((_, code), segment) in self.codes.iter().zip(&segments[1..]) {
                out.pad_to(segment.offset)?;
                out.put(code)?;
            }
            out.pad_to(segments[weights_segment as usize].offset)?;
            write_weights(&self.blobs, &mut |bytes| out.put(bytes))?;
            if let Some(segment) = segments.get(weights_segment as usize + 1) {
                out.pad_to(segment.offset)?;
                out.put(&self.explanations)?;
            }
            Ok(())
        };
        emit().map_err(io_error)
    }

    /// The artifact in memory.
    pub fn to_bytes(self, manifest: Manifest) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        self.write(manifest, &mut bytes)?;
        Ok(bytes)
    }

    /// Writes the file: complete or, on an error, not at all.
    pub fn save(self, manifest: Manifest, path: &Path) -> Result<(), Error> {
        let io = |source| Error::Io { path: path.into(), source };
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}.part", std::process::id()));
        let part = path.with_file_name(name);
        let write = || -> Result<(), Error> {
            let mut file = BufWriter::new(std::fs::File::create(&part).map_err(io)?);
            self.write(manifest, &mut file)?;
            file.flush().map_err(io)?;
            drop(file);
            std::fs::rename(&part, path).map_err(io)
        };
        let done = write();
        if done.is_err() {
            std::fs::remove_file(&part).ok();
        }
        done
    }
}

fn io_error(source: std::io::Error) -> Error {
    Error::Io { path: "artifact".into(), source }
}

fn write_weights(blobs: &[(u64, Cow<'_, [u8]>)], put: &mut dyn FnMut(&[u8]) -> std::io::Result<()>) -> std::io::Result<()> {
    let mut at = 0;
    for (offset, bytes) in blobs {
        put(&[0; TENSOR_ALIGN][..(offset - at) as usize])?;
        put(bytes)?;
        at = offset + bytes.len() as u64;
    }
    Ok(())
}

fn header(segments: &[Segment], file_len: u64) -> Vec<u8> {
    let mut head = MAGIC.to_vec();
    head.extend(FORMAT_VERSION.to_le_bytes());
    head.extend((segments.len() as u32).to_le_bytes());
    head.extend(file_len.to_le_bytes());
    let mut contents = Vec::with_capacity(segments.len() * ENTRY_LEN);
    for s in segments {
        contents.extend(s.kind.number().to_le_bytes());
        contents.extend([0; 4]);
        contents.extend(s.offset.to_le_bytes());
        contents.extend(s.len.to_le_bytes());
        contents.extend(s.checksum);
        contents.extend([0; 8]);
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&head).update(&contents);
    head.extend(&hasher.finalize().as_bytes()[..16]);
    head.resize(HEADER_LEN, 0);
    head.extend(contents);
    head
}

struct Counted<'a> {
    to: &'a mut dyn Write,
    at: u64,
}

impl Counted<'_> {
    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.at += bytes.len() as u64;
        self.to.write_all(bytes)
    }

    fn pad_to(&mut self, offset: u64) -> std::io::Result<()> {
        let zeros = [0; SEGMENT_ALIGN];
        self.put(&zeros[..(offset - self.at) as usize])
    }
}
