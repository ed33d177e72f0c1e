//! Time the plans of one artifact on a GPU, in turn on the same data. Holds no compiler.
//!
//! ```text
//! arms MODEL.pav CASE.npz DEVICE PLAN,PLAN... [ROUNDS]
//! ```
//!
//! Inputs lie on the device before the clock starts and outputs stay there, so that a time is that of the plan: the
//! host's clock from the call to the end of the last kernel. Printed is one line of JSON with, for each plan, its launches, the
//! median and least time of a run, the sum and the median of each launch's own time, and the largest difference of
//! its outputs to those of the first plan, relative to the largest element there.
use embed::{read, values};
use npyz::npz::NpzArchive;
use pavage_runtime::{Artifact, Device, DeviceBuffer, Options, Session, Tensor, Value};
use std::{error::Error, time::Instant};

struct Arm {
    plan: String,
    session: Session,
    feed: Vec<(String, DeviceBuffer)>,
    us: Vec<f64>,
}

impl Arm {
    fn run(&mut self) -> Result<(), Box<dyn Error>> {
        let feed: Vec<(&str, Value)> = self.feed.iter().map(|(n, b)| (n.as_str(), Value::from(b))).collect();
        let begun = Instant::now();
        self.session.run_resident(&feed)?;
        self.us.push(begun.elapsed().as_secs_f64() * 1e6);
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, case, device, plans, rest @ ..] = args.as_slice() else { return Err("usage: arms MODEL.pav CASE.npz DEVICE PLAN,PLAN... [ROUNDS]".into()) };
    let device: Device = device.parse()?;
    let rounds: usize = rest.first().map_or(Ok(50), |n| n.parse())?;
    let artifact = Artifact::open(model)?;
    let mut archive = NpzArchive::open(case)?;
    let mut inputs = vec![];
    for port in artifact.inputs() {
        inputs.push((port.name.clone(), read(&mut archive, &format!("in:{}", port.name))?));
    }
    let mut arms = vec![];
    for plan in plans.split(',') {
        let mut session = artifact.session(device, Options { plan: plan.into(), threads: 1, ..Options::default() })?;
        let feed = inputs.iter().map(|(n, t)| Ok((n.clone(), session.upload(t)?))).collect::<Result<Vec<_>, Box<dyn Error>>>()?;
        arms.push(Arm { plan: plan.into(), session, feed, us: vec![] });
    }
    // What each computes, and its kernels one by one.
    let feed: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let (mut first, mut reports) = (vec![], vec![]);
    for arm in &mut arms {
        let mut outputs = arm.session.run(&feed)?;
        let values = outputs.iter().map(|(_, t)| values(t)).collect::<Result<Vec<_>, _>>()?;
        if first.is_empty() {
            first.clone_from(&values);
        }
        let differs = first.iter().zip(&values).map(|(a, b)| difference(a, b)).fold(0.0, f64::max);
        let mut launches: Vec<(String, Vec<f64>)> = vec![];
        for _ in 0..rounds.clamp(1, 7) {
            let times = arm.session.run_timed(&feed, &mut outputs)?;
            launches.resize(times.len(), Default::default());
            for (of, t) in launches.iter_mut().zip(&times) {
                of.0.clone_from(&arm.session.plan().kernels[t.kernel.index()].name);
                of.1.push(t.ns / 1e3);
            }
        }
        let launches: Vec<(String, f64)> = launches.into_iter().map(|(name, mut us)| (name, median(&mut us))).collect();
        reports.push((differs, launches));
    }
    for arm in &mut arms {
        for _ in 0..5 {
            arm.run()?;
        }
        arm.us.clear();
    }
    for _ in 0..rounds {
        for arm in &mut arms {
            arm.run()?;
        }
    }
    let rows: Vec<serde_json::Value> = arms
        .iter_mut()
        .zip(reports)
        .map(|(arm, (differs, launches))| {
            let kernels_us: f64 = launches.iter().map(|(_, us)| us).sum();
            let least = arm.us.iter().copied().fold(f64::INFINITY, f64::min);
            serde_json::json!({ "plan": arm.plan, "launches": launches.len(), "median_us": median(&mut arm.us), "least_us": least,
                "kernels_us": kernels_us, "launch_us": launches, "differs": differs, "notes": arm.session.notes() })
        })
        .collect();
    println!("{}", serde_json::json!({ "model": model, "device": device.to_string(), "plans": rows }));
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The largest difference, relative to the largest element; infinite where one has a NaN and the other has not.
fn difference(a: &[f64], b: &[f64]) -> f64 {
    let scale = a.iter().copied().filter(|v| v.is_finite()).fold(f64::MIN_POSITIVE, |m, v| m.max(v.abs()));
    let of = |(x, y): (&f64, &f64)| match (x == y || x.is_nan() && y.is_nan(), (x - y).abs()) {
        (true, _) => 0.0,
        (false, d) if d.is_finite() => d / scale,
        _ => f64::INFINITY,
    };
    a.iter().zip(b).map(of).fold(if a.len() == b.len() { 0.0 } else { f64::INFINITY }, f64::max)
}
