//! Classifies a picture with an artifact, on the device that is named.
//!
//!     pavage compile examples/models/digits.onnx -o digits.pav
//!     cargo run --release -p pavage-example-deploy -- digits.pav cpu
use pavage_runtime::{Artifact, Device, Options, Tensor};
use std::process::ExitCode;

/// A seven.
const PICTURE: [&str; 8] = ["..####..", ".#####..", "....##..", "..####..", "..####..", "...##...", "..##....", "..##...."];

fn classify(path: &str, device: &str) -> Result<usize, pavage_runtime::Error> {
    let mut session = Artifact::open(path)?.session(device.parse::<Device>()?, Options::default())?;
    let pixels: Vec<f32> = PICTURE.concat().bytes().map(|b| if b == b'#' { 1.0 } else { 0.0 }).collect();
    let image = Tensor::from_slice(&[1, 1, 8, 8], &pixels)?;
    let outputs = session.run(&[("image", &image)])?;
    let logits = outputs[0].as_slice::<f32>()?;
    Ok(logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(digit, _)| digit))
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let [_, path, rest @ ..] = args.as_slice() else {
        eprintln!("usage: {} ARTIFACT [cpu|cuda:0]", args.first().map_or("deploy", String::as_str));
        return ExitCode::from(1);
    };
    match classify(path, rest.first().map_or("cpu", String::as_str)) {
        Ok(digit) => {
            println!("{}\nis a {digit}", PICTURE.join("\n"));
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("{e}");
            ExitCode::from(e.exit_code() as u8)
        }
    }
}
