//! ONNX files to graphs.
//!
//! [`load`] maps the file and imports its graph: composites become core ops, sizes become symbols, `Shape`
//! arithmetic is followed at import, initializers stay in the mapped file. Where to look: [`registry`] is the
//! table of operators by version, `ops/` holds their converters by family, `build.rs` emits and folds,
//! `symbolic.rs` follows sizes, `import.rs` walks graphs, `wire.rs` and `tensors.rs` read bytes.
mod build;
mod cx;
mod import;
mod ops;
mod order;
pub mod registry;
mod scope;
mod symbolic;
mod tensors;
pub mod values;
mod wire;

use crate::{
    Error,
    files::{map_bytes, map_file},
};
use build::{Relations, Stop};
use import::{Importer, OPSETS};
use memmap2::Mmap;
use onnx_protobuf::ModelProto;
use pavage_ir::{Graph, Requirement};
use protobuf::Message;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

/// What to assume of a model's sizes.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Sizes fixed by name, as the model names them or as the graph's symbols are called: `batch` is 1.
    pub shapes: BTreeMap<String, i64>,
    /// Shapes of whole inputs: `x` is `1x3x224x224`.
    pub input_shapes: BTreeMap<String, Vec<i64>>,
    /// Folder that external data may be read from; [`load`] takes the model's own.
    pub folder: Option<PathBuf>,
}

/// What a file says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// The exporter's name and version.
    pub producer: String,
    /// Version of the file format.
    pub ir_version: i64,
    /// Operator set versions by domain (`ai.onnx` is the default one).
    pub opsets: BTreeMap<String, i64>,
    /// The model's documentation.
    pub doc: String,
    /// Key-value pairs that the exporter left.
    pub properties: BTreeMap<String, String>,
}

/// An imported model.
#[derive(Clone, Debug)]
pub struct Model {
    /// The graph; inputs and outputs are named as in the file.
    pub graph: Graph,
    /// What the file says of itself.
    pub metadata: Metadata,
    /// What must hold of the sizes of inputs for the graph to be right, in the symbols of the inputs.
    pub requirements: Vec<Requirement>,
    /// What was assumed or left out: sizes named twice, dropped `ZipMap`s.
    pub notes: Vec<String>,
}

/// Import a file. External data is read from its folder only.
///
/// The file is mapped, and the graph's constants refer to the mapping: a file that is rewritten while the graph lives
/// changes the graph.
pub fn load(path: &Path, options: &Options) -> Result<Model, Error> {
    let map = map_file(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let mut options = options.clone();
    options.folder.get_or_insert_with(|| match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.into(),
        _ => PathBuf::from("."),
    });
    let len = map.len();
    import(map, len, &options)
}

/// Import a model held in memory.
pub fn load_bytes(bytes: &[u8], options: &Options) -> Result<Model, Error> {
    let map = map_bytes(bytes).map_err(|source| Error::Read { path: "memory".into(), source })?;
    import(map, bytes.len(), options)
}

/// How often an import may start again because two sizes turned out to be related.
const MAX_ATTEMPTS: usize = 100;

fn import(map: Arc<Mmap>, len: usize, options: &Options) -> Result<Model, Error> {
    let format = |reason: String| Error::Format { format: "ONNX", reason };
    let slim = wire::without_payloads(&map[..len]).map_err(&format)?;
    let proto = ModelProto::parse_from_bytes(&slim).map_err(|e| format(e.to_string()))?;
    let graph = proto.graph.as_ref().ok_or_else(|| format("it has no graph".into()))?;
    if proto.opset_import.is_empty() {
        return Err(Error::Opset { domain: "ai.onnx".into(), version: 1, least: *OPSETS.start(), most: *OPSETS.end() });
    }
    let files = tensors::Files::new(map, options.folder.clone());
    let mut relations = Relations::default();
    for _ in 0..MAX_ATTEMPTS {
        let mut importer = Importer::new(&proto, &files, options, relations)?;
        match importer.run(graph) {
            Ok(graph) => {
                let relations = &importer.b.relations;
                let mut notes: Vec<String> = relations.equal.iter().map(|(s, d)| format!("takes `{s}` to be {d}")).collect();
                notes.extend(relations.most.iter().map(|(s, most)| format!("takes `{s}` to be at most {most}")));
                notes.extend(importer.b.notes);
                notes.extend(importer.dropped);
                return Ok(Model { graph, metadata: metadata(&proto), requirements: importer.b.requirements.into_iter().collect(), notes });
            }
            Err(Stop::Retry) => relations = importer.b.relations,
            Err(Stop::Fail(e)) => return Err(e),
            Err(Stop::Invalid(reason) | Stop::Missing(reason)) => return Err(format(reason)),
            Err(Stop::Recorded) => return Err(format("a name could not be resolved".into())),
        }
    }
    Err(Error::Limit("the model relates its sizes in too many ways".into()))
}

fn metadata(proto: &ModelProto) -> Metadata {
    let opset = |o: &onnx_protobuf::OperatorSetIdProto| (if o.domain.is_empty() { "ai.onnx".to_string() } else { o.domain.clone() }, o.version);
    Metadata {
        producer: format!("{} {}", proto.producer_name, proto.producer_version).trim().to_string(),
        ir_version: proto.ir_version,
        opsets: proto.opset_import.iter().map(opset).collect(),
        doc: proto.doc_string.clone(),
        properties: proto.metadata_props.iter().map(|p| (p.key.clone(), p.value.clone())).collect(),
    }
}
