//! A walk over the raw protobuf of a model that takes tensor payloads out.
//!
//! onnx-protobuf copies every `raw_data` field. This walk rewrites a model without them: in place of the
//! bytes each `TensorProto` gets two fields of ours with the payload's offset and length in the mapped file,
//! which the parser keeps as unknown fields. What is left is small, and is parsed as usual.
use onnx_protobuf::TensorProto;
use protobuf::{Message, UnknownValueRef};
use std::ops::Range;

/// Field numbers that no version of ONNX uses.
const OFFSET: u64 = 100_001;
const LENGTH: u64 = 100_002;
/// Deepest nesting of messages followed: real models nest a graph a dozen deep at most, four messages each.
const MAX_DEPTH: usize = 90;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Model,
    Graph,
    Node,
    Attribute,
    Tensor,
    SparseTensor,
    Function,
}

impl Kind {
    /// The message type of a field that may hold tensors.
    fn child(self, field: u64) -> Option<Kind> {
        Some(match (self, field) {
            (Kind::Model, 7) => Kind::Graph,
            (Kind::Model, 25) => Kind::Function,
            (Kind::Graph, 1) | (Kind::Function, 7) => Kind::Node,
            (Kind::Graph, 5) => Kind::Tensor,
            (Kind::Graph, 15) => Kind::SparseTensor,
            (Kind::Node, 5) | (Kind::Function, 11) => Kind::Attribute,
            (Kind::Attribute, 5 | 10) => Kind::Tensor,
            (Kind::Attribute, 6 | 11) => Kind::Graph,
            (Kind::Attribute, 22 | 23) => Kind::SparseTensor,
            (Kind::SparseTensor, 1 | 2) => Kind::Tensor,
            _ => return None,
        })
    }
}

/// A serialized model without the payloads of its tensors; [`payload`] says where they are.
pub(crate) fn without_payloads(model: &[u8]) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    Walk { file: model }.message(Kind::Model, 0..model.len(), 0, &mut out)?;
    Ok(out)
}

/// Where in the file the `raw_data` of a tensor is, if it has any.
pub(crate) fn payload(tensor: &TensorProto) -> Option<Range<usize>> {
    let field = |number: u64| match tensor.special_fields().unknown_fields().get(number as u32) {
        Some(UnknownValueRef::Varint(v)) => usize::try_from(v).ok(),
        _ => None,
    };
    let start = field(OFFSET)?;
    Some(start..start.checked_add(field(LENGTH)?)?)
}

struct Walk<'a> {
    file: &'a [u8],
}

impl Walk<'_> {
    fn message(&self, kind: Kind, range: Range<usize>, depth: usize, out: &mut Vec<u8>) -> Result<(), String> {
        if depth > MAX_DEPTH {
            return Err(format!("messages nest more than {MAX_DEPTH} deep at byte {}", range.start));
        }
        let end = range.end;
        let mut at = range.start;
        let mut raw = None;
        while at < end {
            let start = at;
            let tag = self.varint(&mut at, end)?;
            let (field, wire) = (tag >> 3, tag & 7);
            if field == 0 {
                return Err(format!("field number 0 at byte {start}"));
            }
            let payload = match wire {
                0 => {
                    self.varint(&mut at, end)?;
                    None
                }
                1 | 5 => {
                    at += if wire == 1 { 8 } else { 4 };
                    None
                }
                2 => {
                    let len = self.varint(&mut at, end)?;
                    let stop = usize::try_from(len).ok().and_then(|len| at.checked_add(len)).filter(|stop| *stop <= end);
                    let stop = stop.ok_or_else(|| format!("field {field} at byte {start} says {len} bytes, {} are left", end - at))?;
                    Some(std::mem::replace(&mut at, stop)..stop)
                }
                _ => return Err(format!("wire type {wire} at byte {start}")),
            };
            if at > end {
                return Err(format!("truncated field {field} at byte {start}"));
            }
            match payload {
                Some(range) if kind == Kind::Tensor && field == 9 => raw = Some(range),
                _ if kind == Kind::Tensor && (field == OFFSET || field == LENGTH) => {}
                Some(range) => match kind.child(field) {
                    Some(child) => {
                        let mut inner = Vec::new();
                        self.message(child, range, depth + 1, &mut inner)?;
                        put(out, tag);
                        put(out, inner.len() as u64);
                        out.extend(inner);
                    }
                    None => out.extend(&self.file[start..at]),
                },
                None => out.extend(&self.file[start..at]),
            }
        }
        if let Some(range) = raw {
            put(out, OFFSET << 3);
            put(out, range.start as u64);
            put(out, LENGTH << 3);
            put(out, range.len() as u64);
        }
        Ok(())
    }

    fn varint(&self, at: &mut usize, end: usize) -> Result<u64, String> {
        let start = *at;
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = *self.file[..end].get(*at).ok_or_else(|| format!("truncated at byte {start}"))?;
            *at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(format!("overlong number at byte {start}"))
    }
}

fn put(out: &mut Vec<u8>, mut v: u64) {
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}
