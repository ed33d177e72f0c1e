//! Which variant each layer takes: the most time saved within an error budget, as a multiple-choice knapsack.

/// What a variant of a layer saves and what it costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Offer {
    /// Predicted nanoseconds saved.
    pub gain: f64,
    /// Squared error of the layer's result, relative to its square.
    pub error: f64,
}

/// Parts that the budget is cut into: errors are rounded up to whole ones.
const PARTS: usize = 2000;

/// For each layer the offer it takes, if any: the largest sum of gains whose errors add up to at most `budget`. Offers that
/// gain nothing are never taken. An infinite budget takes the largest gain of each layer.
pub fn choose(layers: &[Vec<Offer>], budget: f64) -> Vec<Option<usize>> {
    let worth = |o: &&Offer| o.gain > 0.0 && o.error.is_finite();
    if budget.is_infinite() {
        let best = |offers: &Vec<Offer>| {
            let mut best: Option<usize> = None;
            for (i, o) in offers.iter().enumerate().filter(|(_, o)| worth(o)) {
                if best.is_none_or(|b| offers[b].gain < o.gain) {
                    best = Some(i);
                }
            }
            best
        };
        return layers.iter().map(best).collect();
    }
    let part = budget.max(f64::MIN_POSITIVE) / PARTS as f64;
    // `gains[b]`: the most that the layers so far save with `b` parts; `taken[layer][b]`: by which offer.
    let mut gains = vec![0.0f64; PARTS + 1];
    let mut taken: Vec<Vec<Option<usize>>> = vec![];
    for offers in layers {
        let mut next = gains.clone();
        let mut by = vec![None; PARTS + 1];
        for (i, offer) in offers.iter().enumerate().filter(|(_, o)| worth(o)) {
            let parts = (offer.error / part).ceil();
            if parts > PARTS as f64 {
                continue;
            }
            for b in parts as usize..=PARTS {
                let gain = gains[b - parts as usize] + offer.gain;
                if gain > next[b] {
                    (next[b], by[b]) = (gain, Some(i));
                }
            }
        }
        gains = next;
        taken.push(by);
    }
    let mut left = PARTS;
    let mut chosen = vec![None; layers.len()];
    for layer in (0..layers.len()).rev() {
        chosen[layer] = taken[layer][left];
        if let Some(i) = chosen[layer] {
            left -= (layers[layer][i].error / part).ceil() as usize;
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every combination.
    fn exhaustive(layers: &[Vec<Offer>], budget: f64) -> f64 {
        let Some((first, rest)) = layers.split_first() else { return 0.0 };
        let taken = first.iter().filter(|o| o.gain > 0.0 && o.error <= budget).map(|o| o.gain + exhaustive(rest, budget - o.error));
        taken.fold(exhaustive(rest, budget), f64::max)
    }

    #[test]
    fn the_choice_is_the_best_within_the_budget() {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f64
        };
        for _ in 0..200 {
            // Errors are whole parts of the budget, so that nothing is lost by rounding.
            let layers: Vec<Vec<Offer>> =
                (0..5).map(|_| (0..3).map(|_| Offer { gain: next() % 50.0 - 10.0, error: (next() % 900.0).max(1.0) }).collect()).collect();
            let chosen = choose(&layers, PARTS as f64);
            let picked: Vec<Offer> = chosen.iter().zip(&layers).filter_map(|(c, l)| c.map(|c| l[c])).collect();
            assert!(picked.iter().map(|o| o.error).sum::<f64>() <= PARTS as f64);
            assert_eq!(picked.iter().map(|o| o.gain).sum::<f64>(), exhaustive(&layers, PARTS as f64));
        }
    }

    #[test]
    fn nothing_is_taken_that_gains_nothing() {
        let layers = [vec![Offer { gain: 0.0, error: 0.0 }, Offer { gain: -1.0, error: 0.0 }], vec![Offer { gain: 5.0, error: f64::NAN }]];
        assert_eq!(choose(&layers, f64::INFINITY), [None, None]);
        assert_eq!(choose(&layers, 1.0), [None, None]);
    }
}
