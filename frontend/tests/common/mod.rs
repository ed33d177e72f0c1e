//! Small models, built in code.
#![allow(dead_code, unreachable_pub)] // Each test program uses a part.
use onnx_protobuf::{
    AttributeProto, GraphProto, Message, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto,
    tensor_shape_proto::Dimension, type_proto,
};
use pavage_frontend::{
    Error,
    onnx::{self, Model, Options},
};
use pavage_ir::{Tensor, eval, verify};
use protobuf::MessageField;

/// An extent of a declared input.
pub enum Extent {
    Is(i64),
    Named(&'static str),
    Free,
}
pub use Extent::{Free, Is, Named};

pub const F32: i32 = 1;
pub const I64: i32 = 7;
pub const BOOL: i32 = 9;

pub fn value(name: &str, dtype: i32, shape: Vec<Extent>) -> ValueInfoProto {
    let dim = |e: Extent| {
        let mut d = Dimension::new();
        match e {
            Is(v) => d.set_dim_value(v),
            Named(n) => d.set_dim_param(n.into()),
            Free => {}
        }
        d
    };
    let shape = TensorShapeProto { dim: shape.into_iter().map(dim).collect(), ..Default::default() };
    let mut ty = TypeProto::new();
    ty.set_tensor_type(type_proto::Tensor { elem_type: dtype, shape: MessageField::some(shape), ..Default::default() });
    ValueInfoProto { name: name.into(), type_: MessageField::some(ty), ..Default::default() }
}

pub fn floats(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
    let raw_data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    TensorProto { name: name.into(), dims: dims.to_vec(), data_type: F32, raw_data, ..Default::default() }
}

pub fn ints(name: &str, dims: &[i64], values: &[i64]) -> TensorProto {
    TensorProto { name: name.into(), dims: dims.to_vec(), data_type: I64, int64_data: values.to_vec(), ..Default::default() }
}

pub fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    let strings = |names: &[&str]| names.iter().map(|n| n.to_string()).collect();
    NodeProto { op_type: op.into(), input: strings(inputs), output: strings(outputs), name: format!("{op}_{}", outputs.join("_")), ..Default::default() }
}

/// Attributes, added to a node one after another.
pub trait With: Sized {
    fn push(self, attr: AttributeProto) -> Self;
    fn int(self, name: &str, v: i64) -> Self {
        self.push(AttributeProto { name: name.into(), type_: 2.into_enum(), i: v, ..Default::default() })
    }
    fn ints(self, name: &str, v: &[i64]) -> Self {
        self.push(AttributeProto { name: name.into(), type_: 7.into_enum(), ints: v.to_vec(), ..Default::default() })
    }
    fn float(self, name: &str, v: f32) -> Self {
        self.push(AttributeProto { name: name.into(), type_: 1.into_enum(), f: v, ..Default::default() })
    }
    fn floats(self, name: &str, v: &[f32]) -> Self {
        self.push(AttributeProto { name: name.into(), type_: 6.into_enum(), floats: v.to_vec(), ..Default::default() })
    }
    fn text(self, name: &str, v: &str) -> Self {
        self.push(AttributeProto { name: name.into(), type_: 3.into_enum(), s: v.as_bytes().to_vec(), ..Default::default() })
    }
    fn strings(self, name: &str, v: &[&str]) -> Self {
        self.push(AttributeProto { name: name.into(), type_: 8.into_enum(), strings: v.iter().map(|s| s.as_bytes().to_vec()).collect(), ..Default::default() })
    }
    fn tensor(self, name: &str, v: TensorProto) -> Self {
        self.push(AttributeProto { name: name.into(), type_: 4.into_enum(), t: MessageField::some(v), ..Default::default() })
    }
    fn graph(self, name: &str, v: GraphProto) -> Self {
        self.push(AttributeProto { name: name.into(), type_: 5.into_enum(), g: MessageField::some(v), ..Default::default() })
    }
    fn refers(self, name: &str, to: &str, code: i32) -> Self {
        self.push(AttributeProto { name: name.into(), type_: code.into_enum(), ref_attr_name: to.into(), ..Default::default() })
    }
}

impl With for NodeProto {
    fn push(mut self, attr: AttributeProto) -> Self {
        self.attribute.push(attr);
        self
    }
}

trait IntoEnum<T> {
    fn into_enum(self) -> T;
}

impl<E: protobuf::Enum> IntoEnum<protobuf::EnumOrUnknown<E>> for i32 {
    fn into_enum(self) -> protobuf::EnumOrUnknown<E> {
        protobuf::EnumOrUnknown::from_i32(self)
    }
}

pub fn graph(nodes: Vec<NodeProto>, inputs: Vec<ValueInfoProto>, outputs: &[&str], initializer: Vec<TensorProto>) -> GraphProto {
    let output = outputs.iter().map(|n| ValueInfoProto { name: n.to_string(), ..Default::default() }).collect();
    GraphProto { name: "g".into(), node: nodes, input: inputs, output, initializer, ..Default::default() }
}

pub fn model(opset: i64, graph: GraphProto) -> ModelProto {
    let opset_import =
        [("", opset), ("ai.onnx.ml", 3)].map(|(domain, version)| OperatorSetIdProto { domain: domain.into(), version, ..Default::default() }).to_vec();
    ModelProto { ir_version: 8, opset_import, graph: MessageField::some(graph), ..Default::default() }
}

pub fn bytes(model: &ModelProto) -> Vec<u8> {
    model.write_to_bytes().unwrap()
}

pub fn import(model: &ModelProto) -> Result<Model, Error> {
    onnx::load_bytes(&bytes(model), &Options::default())
}

/// Import, verify, evaluate.
pub fn run(model: &ModelProto, inputs: &[Tensor]) -> Vec<Tensor> {
    let model = import(model).unwrap_or_else(|e| panic!("{e}"));
    verify::verify(&model.graph).unwrap_or_else(|e| panic!("{e}"));
    eval::eval(&model.graph, inputs).unwrap_or_else(|e| panic!("{e}"))
}

/// Numbers in -2..2, the same on every run.
pub fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..n).map(|_| (next() >> 40) as f32 / (1u64 << 22) as f32 - 2.0).collect()
}
