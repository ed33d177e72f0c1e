//! `pavage demo`: a real model from ONNX to answers, and what fusion bought.
use super::bench::{self, Effort, Keep};
use super::progress::{Bar, Dumps};
use super::{Done, Failure, npy, say, say_json, text};
use pavage::runtime::host_level;
use pavage::{CompileOptions, Device, Options, Source, Tensor, compile};
use serde_json::json;
use std::time::{Duration, Instant};

/// Trained by `scripts/train_digits.py`.
const MODEL: &[u8] = include_bytes!("../examples/models/digits.onnx");
/// Pictures that it was not trained on: `image16` in sixteenths, `label`.
const PICTURES: &[u8] = include_bytes!("../examples/models/digits_test.npz");

/// `pavage demo`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where to run: cpu, cuda:N.
    #[arg(long)]
    device: Option<Device>,
    /// CPU threads; 0 for one a core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Measure for this long (seconds).
    #[arg(long, default_value_t = 2.0)]
    duration: f64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The test pictures: pixels in 0..1, and what they show.
fn pictures() -> Result<(Tensor, Vec<usize>), Failure> {
    let arrays = npy::parse_npz(PICTURES).map_err(Failure::usage)?;
    let (Some(images), Some(labels)) = (arrays.get("image16"), arrays.get("label")) else {
        return Err(Failure::usage("the test pictures are not what they should be"));
    };
    let pixels: Vec<f32> = npy::numbers(images).map(|p| p as f32 / 16.0).collect();
    let images = Tensor::from_slice(images.shape(), &pixels)?;
    Ok((images, npy::numbers(labels).map(|x| x as usize).collect()))
}

/// The device, and why this one.
fn choose(device: Option<Device>) -> (Device, String) {
    match (device, Device::gpus().as_slice()) {
        (Some(device), _) => (device, "as asked for".into()),
        (None, []) => (Device::Cpu, "no NVIDIA GPU or driver was found".into()),
        (None, [gpu, ..]) => (Device::Cpu, format!("the demo's model is small; {gpu} is here too: --device cuda:0")),
    }
}

/// `pavage demo`
pub(crate) fn main(args: &Args) -> Done {
    let (device, why) = choose(args.device);
    let (images, labels) = pictures()?;
    let targets = match device {
        Device::Cuda(n) => vec![super::load::gpu_target(n)?],
        _ => vec!["native".to_string()],
    };
    let bar = Bar::new(Dumps::Stderr);
    let start = Instant::now();
    let options = CompileOptions { targets, progress: Some(&bar), ..CompileOptions::default() };
    let compiled = compile(Source::Onnx(MODEL), &options);
    bar.finish();
    let artifact = compiled?.open()?;
    let compile_time = start.elapsed();

    let mut sessions = ["fused", "unfused"]
        .iter()
        .map(|plan| {
            let options = Options { plan: (*plan).into(), threads: args.threads, ..Options::default() };
            artifact.session(device, options)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let feeds = [("image", &images)];
    let mut right = Vec::new();
    let mut guesses = Vec::new();
    for session in &mut sessions {
        guesses = argmax(&session.run(&feeds)?[0])?;
        right.push(guesses.iter().zip(&labels).filter(|(g, l)| g == l).count());
    }
    let accuracy = right[0] as f64 / labels.len() as f64;
    let effort = Effort { warm_up: Duration::from_millis(200), duration: Duration::from_secs_f64(args.duration.clamp(0.0, 3600.0)), iterations: 10 };
    let times = bench::measure(&mut sessions, &feeds, &effort, Keep::OnDevice)?;
    let savings = bench::savings(&mut sessions, &feeds)?;

    if args.json {
        say_json(&json!({
            "device": device.to_string(), "why": why, "compile_seconds": compile_time.as_secs_f64(),
            "pictures": labels.len(), "right": {"fused": right[0], "unfused": right[1]}, "accuracy": accuracy,
            "median_ms": {"fused": times[0].median() / 1e6, "unfused": times[1].median() / 1e6},
        }));
    } else {
        let style = text::BOLD;
        say(format!("{style}Device{style:#}    {device} ({}): {why}", description(device)));
        say(format!(
            "{style}Model{style:#}     a CNN on 8x8 digits, {} of ONNX, compiled in {}",
            text::bytes(MODEL.len() as f64),
            text::time(compile_time.as_nanos() as f64)
        ));
        say(format!("{style}Accuracy{style:#}  {:.1} % ({} of {} pictures that it was not trained on)\n", accuracy * 100.0, right[0], labels.len()));
        say(gallery(&images, &guesses, &labels)?);
        let rows = [("fused", &times[0]), ("unfused", &times[1])];
        say(format!("{style}All {} pictures in one run, both plans in turn{style:#}", labels.len()));
        say(bench::times_table(&rows));
        say(bench::savings_table(&savings, 20));
        say(format!("fused is {:.2}x as fast as unfused", times[1].median() / times[0].median()));
    }
    if right[0] != right[1] || accuracy < 0.97 {
        return Err(Failure::verification(format!("fused got {} and unfused {} of {} right; both should get at least 97 %", right[0], right[1], labels.len())));
    }
    Ok(())
}

fn description(device: Device) -> String {
    match device {
        Device::Cuda(n) => Device::gpus().get(n as usize).cloned().unwrap_or_default(),
        Device::Null => "computes nothing".into(),
        Device::Cpu => format!("{}, {}", super::cache::cpu_name(), host_level()),
    }
}

/// The largest of each row.
fn argmax(logits: &Tensor) -> Result<Vec<usize>, Failure> {
    let classes = logits.shape().last().copied().unwrap_or(1).max(1);
    let best = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(class, _)| class);
    Ok(logits.as_slice::<f32>()?.chunks(classes).map(best).collect())
}

/// A few pictures side by side, with what the model took them for; mistakes first.
fn gallery(images: &Tensor, guesses: &[usize], labels: &[usize]) -> Result<String, Failure> {
    const SHADES: &[u8] = b" .:-=+*#%@";
    let pixels = images.as_slice::<f32>()?;
    let mut order: Vec<usize> = (0..labels.len()).collect();
    order.sort_by_key(|i| guesses[*i] == labels[*i]);
    let shown = &order[..order.len().min(5)];
    let mut out = String::new();
    for y in 0..8 {
        for i in shown {
            for x in 0..8 {
                let shade = (pixels[i * 64 + y * 8 + x] * 9.0).round().clamp(0.0, 9.0);
                let c = SHADES[shade as usize] as char;
                out.extend([c, c]);
            }
            out.push_str("   ");
        }
        out.push('\n');
    }
    for i in shown {
        let caption = match guesses[*i] == labels[*i] {
            true => format!("a {}", guesses[*i]),
            false => format!("a {}? it is a {}", guesses[*i], labels[*i]),
        };
        out.push_str(&format!("{caption:<19}"));
    }
    out.push('\n');
    Ok(out)
}
