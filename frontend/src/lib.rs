//! Model files to graphs: ONNX and safetensors.
