//! A graph written as IR text, compiled and run. `pavage opt` and `pavage compile` read the same text from files.
//!
//!     cargo run --release --example 03_ir_text
use pavage::{CompileOptions, Device, Emit, Options, Source, Tensor, compile};

const GRAPH: &str = r#"
graph @gate(%x: f32[n,4], %y: f32[n,4]) where n in 1.. {
  %0 = mul %x, %y : f32[n,4]
  %1 = tanh %0 : f32[n,4]
  %2 = add %1, %x : f32[n,4]
  return %2 as "z"
}
"#;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let emit = CompileOptions { emit: Some(Emit::Ir), plans: vec!["fused".into()], ..CompileOptions::default() };
    println!("{}", compile(Source::Ir(GRAPH), &emit)?.emitted);

    let artifact = compile(Source::Ir(GRAPH), &CompileOptions::default())?.open()?;
    let mut session = artifact.session(Device::Cpu, Options::default())?;
    let x = Tensor::from_slice(&[1, 4], &[1.0f32, 2.0, 3.0, 4.0])?;
    let y = Tensor::from_slice(&[1, 4], &[0.5f32, -0.5, 0.25, 0.0])?;
    let z = session.run(&[("x", &x), ("y", &y)])?;
    println!("tanh(x * y) + x = {:?}", z["z"].as_slice::<f32>()?);
    Ok(())
}
