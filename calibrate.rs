//! `--precision`: which layers run in fewer bits. What a layer changes is measured, on samples, by running the model with each
//! variant of each layer beside the layer itself; what it saves, the search of the kernels says, which has variants to choose from.
//! Then the whole model is run as chosen, and errors are given a smaller budget until its outputs stay within the one asked for.
use crate::{
    Artifact, Device, Error, Options, Tensor, compile,
    precision::{LayerReport, MaxError, Moved, PrecisionOptions, PrecisionReport, Sample, Wanted},
};
use pavage_ir::{Graph, NodeKind, Requirement, Value};
use pavage_passes::{
    self as passes, Ctx,
    eqsat::{
        self,
        rounding::{Offers, Taken},
    },
    fuse::Cluster,
    precision::{
        self, Layer, Precision, choice,
        quantise::{LEAST_VALUES, Observed, Scale},
    },
};
use pavage_runtime::DType;
use std::collections::{BTreeMap, BTreeSet};

/// Choices that are run to find the best within a budget.
const TRIES: usize = 8;

/// The rest of what a model is, beside its graph.
pub(crate) struct Around<'a> {
    /// See `Planned::requirements`.
    pub(crate) requirements: &'a [Requirement],
    /// Threads of the compiler.
    pub(crate) threads: usize,
    /// `cpu` or `gpu`.
    pub(crate) device: &'static str,
}

/// A graph and its kernels, as the search chose them.
pub(crate) type Plan = (Graph, Vec<Cluster>);

/// Bring the layers of `graph`, which the passes have been over, to the precision asked for. The plan of the search comes with the
/// report; `graph` has its choice of precision, for other plans.
pub(crate) fn apply(graph: &mut Graph, options: &PrecisionOptions, ctx: &Ctx, around: &Around) -> Result<(PrecisionReport, Option<Plan>), Error> {
    if options.wanted == Wanted::Model {
        return Ok((PrecisionReport::default(), None));
    }
    let integers = matches!(options.wanted, Wanted::Auto | Wanted::Fixed(Precision::Int8));
    if options.samples.is_empty() && (integers || options.max_error.is_some()) {
        let what = if integers { format!("--precision {}", options.wanted) } else { "--max-error".into() };
        return Err(Error::Request(format!("{what} needs --calib FOLDER, with npz files of the model's inputs")));
    }
    options.samples.iter().try_for_each(|s| check(graph, s))?;
    let prepared = eqsat::prepare(graph, ctx)?;
    let layers = precision::layers(&prepared, &options.wanted.precisions(), options.storage, &ctx.costs)?;
    let mut search = Search { graph: &prepared, layers, options, around, ranges: BTreeMap::new(), errors: vec![], truth: vec![], notes: vec![] };
    if !options.samples.is_empty() {
        search.observe()?;
        search.measure()?;
    }
    let variants = precision::variants(&prepared, &search.layers, &search.errors, &search.ranges, &ctx.costs)?;
    let mut offers = Offers::new(&prepared, &variants, ctx)?;
    let (picks, moved) = search.choose(&mut offers)?;
    let taken = offers.gains(&picks)?;
    let mut chosen = vec![None; search.layers.len()];
    taken.iter().for_each(|t| chosen[t.layer] = Some(t.index));
    let report = PrecisionReport {
        layers: search.report(&taken, &offers.tried()),
        moved: moved.map(|m| (around.device, m)).into_iter().collect(),
        notes: search.notes.clone(),
    };
    let plan = offers.build(&picks)?;
    *graph = precision::apply(&prepared, &search.layers, &chosen, &search.ranges)?;
    Ok((report, Some(plan)))
}

/// A sample must have every input, of its type.
fn check(graph: &Graph, sample: &Sample) -> Result<(), Error> {
    let bad = |why: String| Err(Error::Request(format!("{}: {why}", sample.name)));
    for id in graph.inputs() {
        let NodeKind::Input(name) = &graph[*id].kind else { continue };
        let ty = graph.ty((*id).into());
        let Some(tensor) = sample.inputs.get(name) else {
            let have: Vec<&str> = sample.inputs.keys().map(String::as_str).collect();
            return bad(format!("no array for input `{name}`; it has {}", if have.is_empty() { "none".into() } else { have.join(", ") }));
        };
        let fits = ty.rank() == tensor.shape().len() && ty.shape.iter().zip(tensor.shape()).all(|(d, n)| d.as_const().is_none_or(|d| d == *n as i64));
        if !fits || tensor.dtype().to_string() != ty.dtype.to_string() {
            return bad(format!("input `{name}` is {}{:?}, the model takes {ty}", tensor.dtype(), tensor.shape()));
        }
    }
    Ok(())
}

/// Float outputs of one run: name, elements of a row, values.
type Floats = Vec<(String, usize, Vec<f32>)>;

struct Search<'a> {
    graph: &'a Graph,
    layers: Vec<Layer>,
    options: &'a PrecisionOptions,
    around: &'a Around<'a>,
    ranges: BTreeMap<Value, Scale>,
    /// Of each variant of each layer: squared error, relative.
    errors: Vec<Vec<f64>>,
    /// The model's float outputs for each sample.
    truth: Vec<Floats>,
    notes: Vec<String>,
}

impl Search<'_> {
    /// Run `graph` on every sample.
    fn run(&self, graph: &Graph, mut see: impl FnMut(usize, &str, &Tensor)) -> Result<(), Error> {
        let artifact: Artifact = compile::for_this_machine(graph, self.around.requirements, self.around.threads)?;
        let mut session = artifact.session(Device::Cpu, Options::default())?;
        for (i, sample) in self.options.samples.iter().enumerate() {
            let inputs: Vec<(&str, &Tensor)> = artifact.inputs().iter().filter_map(|p| sample.inputs.get(&p.name).map(|t| (p.name.as_str(), t))).collect();
            let outputs = session.run(&inputs).map_err(|e| Error::Request(format!("{}: {e}", sample.name)))?;
            outputs.iter().for_each(|(name, tensor)| see(i, name, tensor));
        }
        Ok(())
    }

    /// Ranges of what integer layers read, and the model's own outputs.
    fn observe(&mut self) -> Result<(), Error> {
        let values = precision::activations(self.graph, &self.layers);
        let observing = precision::observing(self.graph, &values);
        let mut seen = vec![Observed::default(); values.len()];
        let index = |name: &str| name.strip_prefix("seen:").and_then(|n| n.parse::<usize>().ok());
        let mut truth = vec![Floats::new(); self.options.samples.len()];
        self.run(&observing, |sample, name, tensor| match (index(name), tensor.as_slice::<f32>()) {
            (Some(i), Ok(values)) => seen[i].widen(values),
            _ => truth[sample].extend(floats(name, tensor)),
        })?;
        if !values.is_empty() && self.options.method != passes::precision::quantise::Method::MinMax {
            self.run(&observing, |_, name, tensor| {
                if let (Some(i), Ok(values)) = (index(name), tensor.as_slice::<f32>()) {
                    seen[i].count(values);
                }
            })?;
        }
        self.truth = truth;
        for (v, _) in values.iter().zip(&seen).filter(|(_, o)| o.too_few(self.options.method)) {
            let readers: Vec<&str> = self.layers.iter().filter(|l| self.graph.operands(l.value.node)[0] == *v).map(|l| l.name.as_str()).collect();
            self.notes.push(format!(
                "the samples have fewer than {LEAST_VALUES} values of what {} reads: its range is that of the smallest and the largest, not by {}",
                readers.join(" and "),
                self.options.method.name()
            ));
        }
        self.ranges = values.into_iter().zip(&seen).map(|(v, o)| (v, Scale::of(o.range(self.options.method)))).collect();
        Ok(())
    }

    /// The error of every variant.
    fn measure(&mut self) -> Result<(), Error> {
        let probe = precision::probe(self.graph, &self.layers, &self.ranges)?;
        let mut sums: BTreeMap<String, f64> = BTreeMap::new();
        self.run(&probe, |_, name, tensor| {
            if let (true, Ok([v])) = (name.starts_with("size:") || name.starts_with("error:"), tensor.as_slice::<f32>()) {
                *sums.entry(name.to_string()).or_default() += f64::from(*v);
            }
        })?;
        let sum = |name: String| sums.get(&name).copied().unwrap_or(f64::NAN);
        let of = |(i, layer): (usize, &Layer)| {
            let size = sum(format!("size:{i}")).max(f64::MIN_POSITIVE);
            (0..layer.variants.len()).map(|j| sum(format!("error:{i}:{j}")) / size).collect()
        };
        self.errors = self.layers.iter().enumerate().map(of).collect();
        Ok(())
    }

    /// The plans of parts that save most within the budget.
    fn choose(&self, offers: &mut Offers) -> Result<(Vec<Option<usize>>, Option<Moved>), Error> {
        let points = offers.offers();
        let all = choice::choose(&points, f64::INFINITY);
        if self.options.samples.is_empty() || all.iter().all(Option::is_none) {
            return Ok((all, None));
        }
        let auto = self.options.wanted == Wanted::Auto;
        let Some(limit) = self.options.max_error.or(auto.then_some(MaxError::Cos(1e-3))) else {
            let moved = self.moved(offers, &all)?;
            return Ok((all, Some(moved)));
        };
        let errors = |chosen: &[Option<usize>]| -> f64 { chosen.iter().zip(&points).filter_map(|(c, o)| c.map(|c| o[c].error)).sum() };
        // Budgets of the sum of the layers' errors: down by fours until one will do, then up again by halves of the way.
        let (mut chosen, mut budget, mut known_bad) = (all, f64::INFINITY, f64::INFINITY);
        let mut best: Option<(Vec<Option<usize>>, Moved, f64)> = None;
        let mut least: Option<Moved> = None;
        let mut known: Vec<(Vec<Option<usize>>, Moved)> = vec![];
        for _ in 0..TRIES {
            if chosen.iter().all(Option::is_none) {
                break;
            }
            let moved = match known.iter().find(|(c, _)| *c == chosen) {
                Some((_, moved)) => *moved,
                None => self.moved(offers, &chosen)?,
            };
            known.push((chosen.clone(), moved));
            if within(&moved, limit)? {
                let done = budget.is_infinite();
                best = Some((chosen.clone(), moved, budget));
                if done {
                    break;
                }
            } else {
                known_bad = if budget.is_infinite() { errors(&chosen) } else { budget };
                least = Some(least.filter(|l| l.cos < moved.cos).unwrap_or(moved));
            }
            budget = match &best {
                Some((_, _, good)) => (good * known_bad).sqrt(),
                None => known_bad / 4.0,
            };
            chosen = choice::choose(&points, budget);
        }
        match (best, auto) {
            (Some((chosen, moved, _)), _) => Ok((chosen, Some(moved))),
            (None, true) => Ok((vec![None; points.len()], Some(Moved::default()))),
            (None, false) => Err(Error::Request(format!(
                "--max-error {limit} cannot be met: no choice of layers in {} stays within it{}",
                self.options.wanted,
                least.map_or(String::new(), |m| format!(" (the closest has {m})"))
            ))),
        }
    }

    /// How far a choice moves the outputs.
    fn moved(&self, offers: &mut Offers, picks: &[Option<usize>]) -> Result<Moved, Error> {
        let (graph, _) = offers.build(picks)?;
        let mut got = vec![Floats::new(); self.options.samples.len()];
        self.run(&graph, |sample, name, tensor| got[sample].extend(floats(name, tensor)))?;
        let mut cos = 0.0f64;
        let (mut rows, mut changed) = (0, 0);
        for (was, is) in self.truth.iter().flatten().zip(got.iter().flatten()) {
            cos = cos.max(angle(&was.2, &is.2));
            if was.1 > 1 {
                let top = |row: &[f32]| row.iter().enumerate().fold((0, f32::NEG_INFINITY), |b, (i, v)| if *v > b.1 { (i, *v) } else { b }).0;
                for (a, b) in was.2.chunks(was.1).zip(is.2.chunks(was.1)) {
                    rows += 1;
                    changed += usize::from(top(a) != top(b));
                }
            }
        }
        Ok(Moved { cos, top1: (rows > 0).then(|| changed as f64 / rows as f64) })
    }

    /// What became of each layer: which variants are taken, and which a faster plan would have taken.
    fn report(&self, taken: &[Taken], tried: &BTreeSet<(usize, usize)>) -> Vec<LayerReport> {
        let row = |(i, layer): (usize, &Layer)| {
            let (device, name, predicted_ns) = (self.around.device, layer.name.clone(), layer.cost);
            let error = |j: usize| self.errors.get(i).map(|e| e[j].sqrt());
            if let Some(t) = taken.iter().find(|t| t.layer == i) {
                let precision = layer.variants[t.index].precision;
                return LayerReport { device, layer: name, precision, predicted_ns, gain_ns: t.gain, error: error(t.index), why: String::new() };
            }
            let mut why: Vec<String> = layer.refused.iter().map(|(p, why)| format!("{p}: {why}")).collect();
            why.extend(layer.variants.iter().enumerate().map(|(j, v)| match error(j) {
                Some(e) if tried.contains(&(i, j)) => format!("{}: its error, {e:.1e}, is not in the budget", v.precision),
                Some(e) if !e.is_finite() => format!("{}: its error is not finite", v.precision),
                _ => format!("{}: it would not be faster", v.precision),
            }));
            LayerReport { device, layer: name, precision: Precision::F32, predicted_ns, gain_ns: 0.0, error: None, why: why.join("; ") }
        };
        self.layers.iter().enumerate().map(row).collect()
    }
}

/// Whether outputs stayed within a limit.
fn within(moved: &Moved, limit: MaxError) -> Result<bool, Error> {
    match (limit, moved.top1) {
        (MaxError::Cos(most), _) => Ok(moved.cos <= most),
        (MaxError::Top1(most), Some(top1)) => Ok(top1 <= most),
        (MaxError::Top1(_), None) => Err(Error::Request("--max-error top1: the model has no output whose rows have a largest element".into())),
    }
}

/// One minus the cosine of the angle between two vectors; 2 where one is not finite.
fn angle(a: &[f32], b: &[f32]) -> f64 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    let (aa, bb) = (dot(a, a), dot(b, b));
    if aa == 0.0 && bb == 0.0 {
        return 0.0;
    }
    let cos = dot(a, b) / (aa * bb).sqrt();
    if cos.is_finite() { (1.0 - cos).max(0.0) } else { 2.0 }
}

/// An output of floats.
fn floats(name: &str, tensor: &Tensor) -> Option<(String, usize, Vec<f32>)> {
    let values: Vec<f32> = match tensor.dtype() {
        DType::F32 => tensor.as_slice::<f32>().ok()?.to_vec(),
        DType::F16 => tensor.bytes().chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        DType::F64 => tensor.as_slice::<f64>().ok()?.iter().map(|v| *v as f32).collect(),
        _ => return None,
    };
    Some((name.to_string(), tensor.shape().last().copied().unwrap_or(1), values))
}
