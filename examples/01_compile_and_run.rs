//! An ONNX file to an artifact to an answer, in one program.
//!
//!     cargo run --release --example 01_compile_and_run
use pavage::{CompileOptions, Device, Options, Source, Tensor, compile};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let compiled = compile(Source::Path("examples/models/digits.onnx".as_ref()), &CompileOptions::default())?;
    println!("the artifact has {} bytes", compiled.artifact.len());

    let artifact = compiled.open()?;
    for port in artifact.inputs() {
        println!("input {}: {}, rank {}", port.name, port.dtype, port.dims.len());
    }

    // The batch size was left to run time: any will do.
    let mut session = artifact.session(Device::Cpu, Options::default())?;
    for batch in [1, 3] {
        let pixels: Vec<f32> = (0..batch * 64).map(|i| if i % 8 == 4 { 1.0 } else { 0.0 }).collect();
        let outputs = session.run(&[("image", &Tensor::from_slice(&[batch, 1, 8, 8], &pixels)?)])?;
        let logits = &outputs["logits"];
        let row = &logits.as_slice::<f32>()?[..10];
        let digit = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(digit, _)| digit);
        println!("{:?} logits; a vertical stroke is a {digit}", logits.shape());
    }
    Ok(())
}
