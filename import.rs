//! Model files to graphs, whatever their format.
use crate::{Error, ShapeArg, Source};
use pavage_frontend::onnx::{self, Metadata, Model};
use pavage_ir::{text, verify};

/// Reads a model; its sizes are fixed where `shapes` says so. All unsupported ops are reported at
/// once.
pub fn import(model: Source<'_>, shapes: &[ShapeArg]) -> Result<Model, Error> {
    let mut options = onnx::Options::default();
    for shape in shapes {
        match shape {
            ShapeArg::Size { name, value } => {
                options.shapes.insert(name.clone(), *value);
            }
            ShapeArg::Input { name, dims } => {
                options.input_shapes.insert(name.clone(), dims.clone());
            }
        }
    }
    match model {
        Source::Path(path) if path.extension().is_some_and(|e| e == "ir") => {
            let read = |source| pavage_frontend::Error::Read { path: path.into(), source };
            import_ir(&std::fs::read_to_string(path).map_err(read)?, shapes)
        }
        Source::Path(path) => Ok(onnx::load(path, &options)?),
        Source::Onnx(bytes) => Ok(onnx::load_bytes(bytes, &options)?),
        Source::Ir(text) => import_ir(text, shapes),
    }
}

fn import_ir(source: &str, shapes: &[ShapeArg]) -> Result<Model, Error> {
    if let Some(shape) = shapes.first() {
        return Err(Error::Request(format!("--shape {shape}: IR text says its sizes itself")));
    }
    let bad = |reason: String| pavage_frontend::Error::Format { format: "IR", reason };
    let graph = text::parse(source, &|_| None).map_err(|e| bad(e.to_string()))?;
    verify(&graph).map_err(|e| bad(e.to_string()))?;
    Ok(Model { graph, metadata: Metadata::default(), requirements: Vec::new(), notes: Vec::new() })
}
