//! Run an artifact from a program that depends on `pavage-runtime` alone: no compiler, LLVM or CUDA toolkit.
//!
//! ```text
//! embed MODEL.pav CASE.npz [DEVICE [PLAN [RUNS]]]
//! ```
//!
//! The archive holds inputs as `in:NAME` and expected outputs as `out:NAME`. Printed is one line of JSON: the
//! largest absolute error of each output, whether the largest element is in the right place, the median time of a run
//! and of each launch.
use embed::{read, values};
use npyz::npz::NpzArchive;
use pavage_runtime::{Artifact, Device, Options, Tensor};
use std::{collections::BTreeMap, error::Error, time::Instant};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, case, rest @ ..] = args.as_slice() else { return Err("usage: embed MODEL.pav CASE.npz [DEVICE [PLAN [RUNS]]]".into()) };
    let device: Device = rest.first().map_or("cpu", String::as_str).parse()?;
    let plan = rest.get(1).map_or("fused", String::as_str);
    let runs: usize = rest.get(2).map_or(Ok(20), |n| n.parse())?;

    let begun = Instant::now();
    let artifact = Artifact::open(model)?;
    let open_ms = ms(begun);
    let begun = Instant::now();
    let mut session = artifact.session(device, Options { plan: plan.into(), threads: 1, ..Options::default() })?;
    let session_ms = ms(begun);

    let mut archive = NpzArchive::open(case)?;
    let mut inputs = vec![];
    for port in artifact.inputs() {
        inputs.push((port.name.clone(), read(&mut archive, &format!("in:{}", port.name))?));
    }
    let feed: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut outputs = session.run(&feed)?;

    let mut errors = serde_json::Map::new();
    for port in artifact.outputs() {
        let want = values(&read(&mut archive, &format!("out:{}", port.name))?)?;
        let got = values(&outputs[port.name.as_str()])?;
        let worst = got.iter().zip(&want).map(|(g, w)| (g - w).abs()).fold(0.0, f64::max);
        // Beyond atol 1e-4 and rtol 1e-3; NaN counts.
        let within = |(g, w): &(&f64, &f64)| (*g - *w).abs() <= 1e-4 + 1e-3 * w.abs();
        let beyond = got.iter().zip(&want).filter(|pair| !within(pair)).count() + got.len().abs_diff(want.len());
        errors.insert(port.name.clone(), serde_json::json!({ "max_abs": worst, "beyond": beyond, "top1": top(&got) == top(&want) }));
    }
    let mut times = vec![];
    for _ in 0..runs {
        let begun = Instant::now();
        session.run_into(&feed, &mut outputs)?;
        times.push(ms(begun));
    }
    times.sort_by(f64::total_cmp);
    // Each kernel's own time, apart from copies: the median of a few runs.
    let mut launches: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for _ in 0..runs.min(20) {
        for (i, t) in session.run_timed(&feed, &mut outputs)?.iter().enumerate() {
            let kernel = &session.plan().kernels[t.kernel.index()];
            launches.entry(format!("{i} {}", kernel.name)).or_default().push(t.ns / 1e3);
        }
    }
    let launch_us: BTreeMap<String, f64> = launches
        .into_iter()
        .map(|(k, mut v)| {
            v.sort_by(f64::total_cmp);
            (k, v[v.len() / 2])
        })
        .collect();
    let report = serde_json::json!({
        "model": model, "plan": plan, "device": device.to_string(), "kernels": session.plan().kernels.len(), "outputs": errors,
        "open_ms": open_ms, "session_ms": session_ms, "median_ms": times.get(times.len() / 2), "launch_us": launch_us, "notes": session.notes(),
    });
    println!("{report}");
    Ok(())
}

fn ms(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}

fn top(values: &[f64]) -> usize {
    (0..values.len()).max_by(|a, b| values[*a].total_cmp(&values[*b])).unwrap_or(0)
}
