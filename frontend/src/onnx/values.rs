//! Values saved as files, as ONNX keeps those of its own tests: a `TensorProto`, `SequenceProto` or `OptionalProto` each.
use super::tensors::{Files, Unread};
use crate::{Error, files::map_bytes};
use onnx_protobuf::{ModelProto, TensorProto, TypeProto, type_proto};
use pavage_ir::Tensor;
use protobuf::{CodedInputStream, Message};

/// What a port of a model holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A tensor.
    Tensor,
    /// A list of values.
    Sequence,
    /// A value of this kind, or nothing.
    Optional(Box<Kind>),
    /// A map or a sparse tensor.
    Other,
}

/// A value from a file.
#[derive(Clone, Debug)]
pub enum Value {
    /// A tensor.
    Tensor(Tensor),
    /// The tensors of a sequence, in order.
    Sequence(Vec<Tensor>),
    /// An optional without a value.
    Nothing,
}

/// The inputs and the outputs of a model, by name, in the file's order.
#[derive(Clone, Debug)]
pub struct Ports {
    /// Inputs.
    pub inputs: Vec<(String, Kind)>,
    /// Outputs.
    pub outputs: Vec<(String, Kind)>,
}

fn bad(e: impl std::fmt::Display) -> Error {
    Error::Format { format: "ONNX", reason: e.to_string() }
}

/// What goes into a model, and what comes out.
pub fn ports(model: &[u8]) -> Result<Ports, Error> {
    let proto = ModelProto::parse_from_bytes(model).map_err(bad)?;
    let named = |list: &[onnx_protobuf::ValueInfoProto]| list.iter().map(|v| (v.name.clone(), kind(&v.type_))).collect();
    Ok(Ports { inputs: named(&proto.graph.input), outputs: named(&proto.graph.output) })
}

fn kind(ty: &TypeProto) -> Kind {
    match &ty.value {
        Some(type_proto::Value::SequenceType(_)) => Kind::Sequence,
        Some(type_proto::Value::OptionalType(of)) => Kind::Optional(Box::new(kind(&of.elem_type))),
        Some(type_proto::Value::TensorType(_)) | None => Kind::Tensor,
        Some(_) => Kind::Other,
    }
}

/// The value in a file's bytes. Tensors of strings, maps and sparse tensors are errors.
pub fn value(bytes: &[u8], kind: &Kind) -> Result<Value, Error> {
    match kind {
        Kind::Tensor => tensor(bytes).map(Value::Tensor),
        Kind::Sequence => fields(bytes, 3)?.iter().map(|t| tensor(t)).collect::<Result<_, _>>().map(Value::Sequence),
        // An optional's tensor is its field 3, its sequence field 5.
        Kind::Optional(of) => match fields(bytes, if **of == Kind::Sequence { 5 } else { 3 })?.first() {
            Some(inner) => value(inner, of),
            None => Ok(Value::Nothing),
        },
        Kind::Other => Err(bad("maps and sparse tensors are not read")),
    }
}

fn tensor(bytes: &[u8]) -> Result<Tensor, Error> {
    let proto = TensorProto::parse_from_bytes(bytes).map_err(bad)?;
    let files = Files::new(map_bytes(&[]).map_err(bad)?, None);
    files.tensor(&proto).map_err(|e| match e {
        Unread::Text => bad(format!("`{}` holds strings", proto.name)),
        Unread::Dtype(what) => bad(format!("`{}` holds {what}", proto.name)),
        Unread::Wrong(e) => e,
    })
}

/// The contents of one field of a message, wherever it occurs.
fn fields(message: &[u8], wanted: u32) -> Result<Vec<Vec<u8>>, Error> {
    let mut input = CodedInputStream::from_bytes(message);
    let mut found = vec![];
    while let Some(tag) = input.read_raw_tag_or_eof().map_err(bad)? {
        match (tag >> 3, tag & 7) {
            (field, 2) => {
                let inner = input.read_bytes().map_err(bad)?;
                if field == wanted {
                    found.push(inner);
                }
            }
            (_, 0) => drop(input.read_raw_varint64().map_err(bad)?),
            (field, wire) => return Err(bad(format!("field {field} has wire type {wire}"))),
        }
    }
    Ok(found)
}
