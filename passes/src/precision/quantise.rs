//! Quantisers: weights to integers in groups, and the ranges of activations from what was observed of them.
use crate::weights::Packed;
use pavage_ir::{DType, Scalar, Tensor};

/// How weights of integers are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// 8 or 4.
    pub bits: usize,
    /// Elements along the contracted axis that share a scale; none: all of a channel.
    pub group: Option<usize>,
    /// Whether 0 of the integers is 0.0.
    pub symmetry: Symmetry,
}

/// Where a grid of integers lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Symmetry {
    /// Zero points are 0.
    #[default]
    Symmetric,
    /// Each group has a zero point.
    Asymmetric,
}

/// How a range of activations is found from what was observed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// The smallest and the largest value.
    #[default]
    MinMax,
    /// What holds 99.99 % of the values.
    Percentile,
    /// The cut whose quantised distribution tells least from the true one (Kullback-Leibler divergence), as TensorRT's
    /// calibration.
    Entropy,
    /// The cut with the least squared error.
    Mse,
}

impl Method {
    /// Every method.
    pub const ALL: [Method; 4] = [Method::MinMax, Method::Percentile, Method::Entropy, Method::Mse];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Method::MinMax => "minmax",
            Method::Percentile => "percentile",
            Method::Entropy => "entropy",
            Method::Mse => "mse",
        }
    }
}

/// Bins of a histogram.
const BINS: usize = 2048;
/// Values that a distribution is told from at least: one a bin.
pub const LEAST_VALUES: f64 = BINS as f64;

/// What was observed of a tensor: its range, then how its values are spread over it.
#[derive(Clone, Debug, PartialEq)]
pub struct Observed {
    /// Smallest value; at most 0.
    pub least: f64,
    /// Largest value; at least 0.
    pub most: f64,
    counts: Vec<f64>,
}

impl Default for Observed {
    fn default() -> Self {
        Observed { least: 0.0, most: 0.0, counts: vec![0.0; BINS] }
    }
}

impl Observed {
    /// Widen the range; values that are not finite say nothing.
    pub fn widen(&mut self, values: &[f32]) {
        for v in values.iter().filter(|v| v.is_finite()) {
            self.least = self.least.min(f64::from(*v));
            self.most = self.most.max(f64::from(*v));
        }
    }

    fn width(&self) -> f64 {
        ((self.most - self.least) / BINS as f64).max(f64::MIN_POSITIVE)
    }

    /// Count values; the range is known by now.
    pub fn count(&mut self, values: &[f32]) {
        let width = self.width();
        for v in values.iter().filter(|v| v.is_finite()) {
            let bin = ((f64::from(*v) - self.least) / width) as usize;
            self.counts[bin.min(BINS - 1)] += 1.0;
        }
    }

    /// Value in the middle of a bin.
    fn middle(&self, bin: usize) -> f64 {
        self.least + (bin as f64 + 0.5) * self.width()
    }

    /// How many values were counted.
    pub fn values(&self) -> f64 {
        self.counts.iter().sum()
    }

    /// Whether `method` cannot tell a distribution from so few values, and takes the smallest and the largest of them instead.
    pub fn too_few(&self, method: Method) -> bool {
        method == Method::Entropy && self.values() < LEAST_VALUES
    }

    /// The range that `method` takes, 0 inside; see [`Observed::too_few`].
    pub fn range(&self, method: Method) -> (f64, f64) {
        // Cuts of both ends towards 0.
        let cuts = (0..64).map(|i| 1.0 - 0.0125 * f64::from(i)).map(|c| (self.least * c, self.most * c));
        let best = |cost: &dyn Fn((f64, f64)) -> f64| {
            let mut best = ((self.least, self.most), f64::INFINITY);
            for range in cuts.clone() {
                let cost = cost(range);
                if cost < best.1 {
                    best = (range, cost);
                }
            }
            best.0
        };
        match method {
            Method::MinMax => (self.least, self.most),
            Method::Percentile => self.percentile(0.9999),
            Method::Entropy if self.too_few(method) => (self.least, self.most),
            Method::Entropy => {
                let counts = self.beside_zero();
                best(&|range| self.divergence(&counts, range))
            }
            Method::Mse => best(&|range| self.squared_error(range)),
        }
    }

    fn percentile(&self, share: f64) -> (f64, f64) {
        let total: f64 = self.counts.iter().sum();
        let outside = total * (1.0 - share) / 2.0;
        let end = |bins: &mut dyn Iterator<Item = usize>, fallback: f64| {
            let mut seen = 0.0;
            for bin in bins {
                seen += self.counts[bin];
                if seen > outside {
                    return self.middle(bin);
                }
            }
            fallback
        };
        let (low, high) = (end(&mut (0..BINS), self.least), end(&mut (0..BINS).rev(), self.most));
        (low.min(0.0), high.max(0.0))
    }

    fn squared_error(&self, range: (f64, f64)) -> f64 {
        let scale = Scale::of(range);
        let error = |bin: usize| {
            let x = self.middle(bin);
            (scale.number(scale.step(x)) - x).powi(2)
        };
        (0..BINS).map(|bin| self.counts[bin] * error(bin)).sum()
    }

    /// What [`Method::Entropy`] looks at: the counts, but where 0 lies no more than beside it. Every grid has 0 itself, so that
    /// however many values are 0, as after a ReLU, they say nothing of how fine the steps must be.
    fn beside_zero(&self) -> Vec<f64> {
        let mut counts = self.counts.clone();
        let zero = ((-self.least / self.width()) as usize).min(BINS - 1);
        let beside: Vec<f64> = [zero.checked_sub(1), Some(zero + 1)].into_iter().flatten().filter_map(|b| counts.get(b).copied()).collect();
        counts[zero] = counts[zero].min(beside.iter().sum::<f64>() / beside.len() as f64);
        counts
    }

    /// Of the distribution `counts` clipped to `range`, against the same spread evenly over each quantisation step, as in S. Migacz,
    /// 8-bit inference with TensorRT, 2017. What chance makes of it is taken off: of `n` values each bin that shares its step adds
    /// `1 / 2n` on average (G. Miller, 1955), which of few values would speak for a short range, whose steps have fewer bins.
    fn divergence(&self, counts: &[f64], range: (f64, f64)) -> f64 {
        let scale = Scale::of(range);
        let total: f64 = counts.iter().sum();
        if total == 0.0 {
            return 0.0;
        }
        // What lies outside falls on the ends of the truth, and is missing from what stands for it.
        let mut steps: Vec<(f64, f64)> = vec![(0.0, 0.0); 256];
        for bin in 0..BINS {
            if self.inside(bin, range) && counts[bin] > 0.0 {
                let step = &mut steps[scale.step(self.middle(bin)) as usize];
                *step = (step.0 + counts[bin], step.1 + 1.0);
            }
        }
        let mut truth = counts.to_vec();
        let (first, last) = ((0..BINS).find(|b| self.inside(*b, range)), (0..BINS).rev().find(|b| self.inside(*b, range)));
        for bin in 0..BINS {
            if !self.inside(bin, range) {
                let end = if self.middle(bin) < range.0 { first } else { last };
                if let Some(end) = end {
                    truth[end] += truth[bin];
                }
                truth[bin] = 0.0;
            }
        }
        let kept: f64 = steps.iter().map(|s| s.0).sum();
        let sharing: f64 = steps.iter().map(|s| (s.1 - 1.0).max(0.0)).sum();
        let mut sum = -sharing / (2.0 * total);
        for (bin, truth) in truth.iter().enumerate().filter(|(_, t)| **t > 0.0) {
            let (count, bins) = steps[scale.step(self.middle(bin)) as usize];
            let (p, q) = (truth / total, if bins > 0.0 { count / bins / kept.max(1.0) } else { 0.0 });
            sum += p * (p / q.max(1e-9)).ln();
        }
        sum
    }

    fn inside(&self, bin: usize, range: (f64, f64)) -> bool {
        (range.0..=range.1).contains(&self.middle(bin))
    }
}

/// A scale and a zero point of bytes, 0 to 255.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// Distance of neighbours; a float of 32 bits.
    pub scale: f64,
    /// The byte that is 0.0.
    pub zero: f64,
}

impl Scale {
    /// The grid over a range that holds 0.
    pub fn of((least, most): (f64, f64)) -> Scale {
        let scale = f64::from(((most - least) / 255.0) as f32);
        if !scale.is_normal() {
            return Scale { scale: 1.0, zero: 0.0 };
        }
        Scale { scale, zero: (-least / scale).round_ties_even().clamp(0.0, 255.0) }
    }

    /// The byte of a number.
    pub fn step(self, x: f64) -> f64 {
        ((x / self.scale).round_ties_even() + self.zero).clamp(0.0, 255.0)
    }

    /// The number of a byte.
    pub fn number(self, step: f64) -> f64 {
        (step - self.zero) * self.scale
    }
}

/// Weights on a grid of integers. `contracted` is the axis that a product sums over; every other axis has a scale an index.
pub fn weights(w: &Tensor, contracted: usize, grid: Grid) -> Packed {
    let shape = w.shape();
    let n = shape[contracted];
    let group = grid.group.unwrap_or(n).min(n).max(1);
    let mut blocks = vec![1; shape.len()];
    blocks[contracted] = group;
    let values = w.to_f64();
    let (outer, inner): (usize, usize) = (shape[..contracted].iter().product(), shape[contracted + 1..].iter().product());
    let groups = n.div_ceil(group);
    let mut q = vec![0i128; values.len()];
    let (mut scales, mut zeros) = (vec![0.0; outer * groups * inner], vec![0.0; outer * groups * inner]);
    let symmetric = grid.symmetry == Symmetry::Symmetric;
    let (least, most) = if symmetric { (-(1i128 << (grid.bits - 1)), (1i128 << (grid.bits - 1)) - 1) } else { (0, (1i128 << grid.bits) - 1) };
    for o in 0..outer {
        for g in 0..groups {
            for i in 0..inner {
                let places: Vec<usize> = (g * group..((g + 1) * group).min(n)).map(|k| (o * n + k) * inner + i).collect();
                let (scale, zero) = fit(places.iter().map(|p| values[*p]), grid.bits, symmetric);
                let at = (o * groups + g) * inner + i;
                (scales[at], zeros[at]) = (scale, zero);
                for p in places {
                    q[p] = ((values[p] / scale).round_ties_even() + zero).clamp(least as f64, most as f64) as i128;
                }
            }
        }
    }
    let dtype = match (grid.bits, symmetric) {
        (4, true) => DType::I4,
        (4, false) => DType::U4,
        (_, true) => DType::I8,
        (_, false) => DType::U8,
    };
    let mut small = shape.to_vec();
    small[contracted] = groups;
    let scale = Tensor::from_scalars(DType::F32, small.clone(), scales.into_iter().map(Scalar::F));
    let zero = (!symmetric).then(|| Tensor::from_scalars(DType::U8, small, zeros.iter().map(|z| Scalar::I(*z as i128))));
    Packed { q: Tensor::from_scalars(dtype, shape.to_vec(), q.into_iter().map(Scalar::I)), scale: Some(scale), zero, blocks }
}

/// Scale and zero point of one group. Of 4 bits, the cut of the range with the least squared error is taken.
fn fit(values: impl Iterator<Item = f64> + Clone, bits: usize, symmetric: bool) -> (f64, f64) {
    let (low, high) = values.clone().fold((0.0f64, 0.0f64), |(l, h), v| (l.min(v), h.max(v)));
    let steps = ((1u32 << bits) - 1) as f64;
    let half = (1u32 << (bits - 1)) as f64;
    let grid = |cut: f64| {
        let scale = if symmetric { low.abs().max(high) * cut / (half - 1.0) } else { (high - low) * cut / steps };
        let scale = f64::from(scale as f32);
        if !scale.is_normal() {
            return (1.0, 0.0);
        }
        (scale, if symmetric { 0.0 } else { (-low * cut / scale).round_ties_even().clamp(0.0, steps) })
    };
    if bits > 4 {
        return grid(1.0);
    }
    let (least, most) = if symmetric { (-half, half - 1.0) } else { (0.0, steps) };
    let error = |(scale, zero): (f64, f64)| -> f64 {
        values.clone().map(|v| (((v / scale).round_ties_even() + zero).clamp(least, most) - zero) * scale - v).map(|e| e * e).sum()
    };
    let mut best = (grid(1.0), f64::INFINITY);
    for i in 0..12 {
        let grid = grid(1.0 - 0.03 * f64::from(i));
        let error = error(grid);
        if error < best.1 {
            best = (grid, error);
        }
    }
    best.0
}

/// Weights as floats of 16 bits; `None` where a finite one would become infinite.
pub fn narrow(w: &Tensor, to: DType) -> Option<Packed> {
    let q = Tensor::from_scalars(to, w.shape().to_vec(), (0..w.count()).map(|i| w.get(i)));
    let lost = (0..w.count()).any(|i| w.get(i).f().is_finite() && !q.get(i).f().is_finite());
    (!lost).then_some(Packed { q, scale: None, zero: None, blocks: vec![] })
}
