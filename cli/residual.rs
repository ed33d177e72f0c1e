//! `pavage bench --residual`: what the cost model predicted, and what is measured.
use super::bench::Effort;
use super::load::ModelArgs;
use super::{Done, Failure, say, say_json, text};
use pavage::runtime::plan::Kernel;
use pavage::{Artifact, Device, Tensor};
use serde_json::json;
use std::time::Instant;

/// A launch of the plan: its kernel, its fastest run, what was predicted.
struct Row<'a> {
    kernel: &'a Kernel,
    measured_ns: f64,
    predicted_ns: f64,
}

impl Row<'_> {
    /// Predicted over measured.
    fn ratio(&self) -> f64 {
        self.predicted_ns / self.measured_ns.max(1.0)
    }
}

/// Times each launch, and shows it next to its prediction.
pub(super) fn show(artifact: &Artifact, model: &ModelArgs, plan: &str, feeds: &[(&str, &Tensor)], effort: &Effort, as_json: bool) -> Done {
    let mut options = model.session_options(plan);
    if model.device == Device::Cpu && options.threads == 0 {
        options.threads = 1;
    }
    let mut session = artifact.session(model.device, options)?;
    let mut outputs = session.new_outputs()?;
    let mut fastest: Vec<f64> = Vec::new();
    let mut ids = Vec::new();
    let start = Instant::now();
    let mut rounds = 0;
    while rounds < effort.iterations || start.elapsed() < effort.warm_up + effort.duration {
        let times = session.run_timed(feeds, &mut outputs)?;
        if ids.len() != times.len() {
            ids = times.iter().map(|t| t.kernel).collect();
            fastest = vec![f64::INFINITY; ids.len()];
        }
        fastest.iter_mut().zip(&times).for_each(|(least, t)| *least = least.min(t.ns));
        rounds += 1;
    }
    let kernels = session.plan().kernels.clone();
    let launch = |(id, ns): (&pavage::runtime::plan::KernelId, &f64)| {
        let kernel = kernels.get(id.index())?;
        Some(Row { kernel, measured_ns: *ns, predicted_ns: kernel.provenance.predicted_ns })
    };
    let mut rows: Vec<Row> = ids.iter().zip(&fastest).filter_map(launch).collect();
    let known = rows.iter().filter(|r| r.predicted_ns > 0.0);
    let mut ratios: Vec<f64> = known.map(Row::ratio).collect();
    if ratios.is_empty() {
        return Err(Failure::usage("nothing was predicted: the artifact leaves sizes open; fix them with --shape, and without --dynamic"));
    }
    ratios.sort_by(f64::total_cmp);
    let at = |share: f64| ratios[((ratios.len() - 1) as f64 * share).round() as usize];
    let sum = |f: fn(&Row) -> f64| rows.iter().map(f).sum::<f64>();
    let (measured, predicted) = (sum(|r| r.measured_ns), sum(|r| r.predicted_ns));
    if as_json {
        let row = |r: &Row| {
            let p = &r.kernel.provenance;
            json!({
                "kernel": r.kernel.name, "does": p.members, "rules": p.rules, "measured_us": r.measured_ns / 1e3,
                "predicted_us": r.predicted_ns / 1e3, "ratio": r.ratio(),
            })
        };
        say_json(&json!({
            "plan": plan, "target": session.plan().target, "runs": rounds, "median_ratio": at(0.5), "p10_ratio": at(0.1), "p90_ratio": at(0.9),
            "measured_us": measured / 1e3, "predicted_us": predicted / 1e3, "launches": rows.iter().map(row).collect::<Vec<_>>(),
        }));
        return Ok(());
    }
    rows.sort_by(|a, b| b.measured_ns.total_cmp(&a.measured_ns));
    const MOST: usize = 40;
    let cells = |r: &Row| {
        let predicted = if r.predicted_ns > 0.0 { [text::time(r.predicted_ns), format!("{:.2}", r.ratio())] } else { ["-".into(), "-".into()] };
        let [predicted, ratio] = predicted;
        vec![r.kernel.name.clone(), r.kernel.provenance.members.join(" "), text::time(r.measured_ns), predicted, ratio]
    };
    say(text::table(&["kernel", "does", "measured#", "predicted#", "ratio#"], rows.iter().take(MOST).map(cells)));
    if rows.len() > MOST {
        say(format!("and {} more", rows.len() - MOST));
    }
    say(format!("all: measured {}, predicted {} (fastest of {rounds} runs)", text::time(measured), text::time(predicted)));
    say(format!("predicted / measured: median {:.2}, from {:.2} (10%) to {:.2} (90%)", at(0.5), at(0.1), at(0.9)));
    Ok(())
}
