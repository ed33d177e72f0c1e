//! Both plans of one artifact: the same answers, fewer kernels, less memory traffic.
//!
//!     cargo run --release --example 02_fused_and_unfused
use pavage::{CompileOptions, Device, Options, ShapeArg, Source, Tensor, compile};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Fixed sizes make faster code; leave them out and one artifact serves every batch size.
    let batch = ShapeArg::Size { name: "n".into(), value: 16 };
    let options = CompileOptions { shapes: vec![batch], ..CompileOptions::default() };
    let artifact = compile(Source::Path("examples/models/digits.onnx".as_ref()), &options)?.open()?;

    let pixels: Vec<f32> = (0..16 * 64).map(|i| (i * i % 17) as f32 / 17.0).collect();
    let image = Tensor::from_slice(&[16, 1, 8, 8], &pixels)?;
    let mut answers = Vec::new();
    for plan in ["unfused", "fused"] {
        let mut session = artifact.session(Device::Cpu, Options { plan: plan.into(), ..Options::default() })?;
        let outputs = session.run(&[("image", &image)])?;
        let kernels = &session.plan().kernels;
        let sizes = session.sizes();
        let moved: i64 = kernels.iter().flat_map(|k| [&k.provenance.bytes_read, &k.provenance.bytes_written]).filter_map(|b| b.eval(sizes).ok()).sum();
        println!("{plan}: {} kernels, {moved} bytes read and written", kernels.len());
        for kernel in kernels {
            println!("    {} does {}", kernel.name, kernel.provenance.members.join(", "));
        }
        answers.push(outputs[0].as_slice::<f32>()?.to_vec());
    }
    let furthest = answers[0].iter().zip(&answers[1]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("the answers differ by at most {furthest:e}");
    Ok(())
}
