//! Outputs against expected outputs.
use super::{npy, text};
use pavage::Tensor;
use serde_json::{Value, json};

/// How one output differs from what was expected.
pub(crate) struct Difference {
    name: String,
    /// Why they cannot be compared at all.
    incomparable: Option<String>,
    /// Largest absolute difference.
    max_abs: f64,
    /// Largest difference relative to the expected value, where that is not 0.
    max_rel: f64,
    /// Elements beyond `atol + rtol * |expected|`.
    beyond: usize,
    elements: usize,
    /// The worst element: where, what came out, what was expected.
    worst: Option<(usize, f64, f64)>,
}

impl Difference {
    /// Compares an output with what was expected of it. NaN equals NaN, an infinity itself.
    pub(crate) fn of(name: &str, got: Option<&Tensor>, want: &Tensor, atol: f64, rtol: f64) -> Self {
        let mut d =
            Difference { name: name.into(), incomparable: None, max_abs: 0.0, max_rel: 0.0, beyond: 0, elements: want.shape().iter().product(), worst: None };
        let Some(got) = got else {
            d.incomparable = Some("the model has no such output".into());
            return d;
        };
        if got.shape() != want.shape() {
            d.incomparable = Some(format!("the shape is {}, expected {}", text::shape(got.shape()), text::shape(want.shape())));
            return d;
        }
        let mut worst_excess = 0.0;
        for (i, (g, w)) in npy::numbers(got).zip(npy::numbers(want)).enumerate() {
            if g == w || (g.is_nan() && w.is_nan()) {
                continue;
            }
            let error = if (g - w).is_nan() { f64::INFINITY } else { (g - w).abs() };
            d.max_abs = d.max_abs.max(error);
            if w != 0.0 {
                d.max_rel = d.max_rel.max(error / w.abs());
            }
            // An expected infinity allows nothing but itself.
            let allowed = if w.is_finite() { atol + rtol * w.abs() } else { 0.0 };
            if error > allowed {
                d.beyond += 1;
                if error - allowed > worst_excess {
                    (worst_excess, d.worst) = (error - allowed, Some((i, g, w)));
                }
            }
        }
        d
    }

    /// Whether the output is what was expected.
    pub(crate) fn ok(&self) -> bool {
        self.incomparable.is_none() && self.beyond == 0
    }

    /// For programs.
    pub(crate) fn to_json(&self) -> Value {
        let finite = |x: f64| if x.is_finite() { json!(x) } else { json!(x.to_string()) };
        json!({
            "output": self.name, "ok": self.ok(), "elements": self.elements, "beyond": self.beyond,
            "max_abs": finite(self.max_abs), "max_rel": finite(self.max_rel), "problem": self.incomparable,
        })
    }

    fn row(&self) -> Vec<String> {
        let verdict = match (&self.incomparable, self.worst) {
            (Some(why), _) => why.clone(),
            (None, Some((at, got, want))) => format!("element {at} is {got:.6}, expected {want:.6}"),
            _ if self.beyond > 0 => "infinitely far".into(),
            _ => "ok".into(),
        };
        let numbers = [format!("{:.3e}", self.max_abs), format!("{:.3e}", self.max_rel)];
        let [abs, rel] = if self.incomparable.is_some() { ["-".into(), "-".into()] } else { numbers };
        vec![self.name.clone(), self.elements.to_string(), abs, rel, self.beyond.to_string(), verdict]
    }
}

/// The differences as a table.
pub(crate) fn table(differences: &[Difference]) -> String {
    let head = ["output", "elements#", "max abs#", "max rel#", "beyond#", ""];
    text::table(&head, differences.iter().map(Difference::row))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn difference(got: &[f32], want: &[f32]) -> Difference {
        let tensor = |v: &[f32]| Tensor::from_slice(&[v.len()], v).unwrap();
        Difference::of("y", Some(&tensor(got)), &tensor(want), 1e-4, 1e-3)
    }

    #[test]
    fn tolerance_is_absolute_plus_relative() {
        assert!(difference(&[1.0, 100.05], &[1.0, 100.0]).ok());
        assert_eq!(difference(&[1.0, 100.2], &[1.0, 100.0]).beyond, 1);
        assert!(!difference(&[0.001], &[0.0]).ok());
    }

    #[test]
    fn what_is_not_finite_must_be_the_same() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        assert!(difference(&[nan, inf, -inf], &[nan, inf, -inf]).ok());
        for (got, want) in [(1.0, nan), (nan, 1.0), (1.0, inf), (inf, 1.0), (inf, -inf)] {
            assert!(!difference(&[got], &[want]).ok(), "{got} for {want}");
        }
    }

    #[test]
    fn shapes_must_agree() {
        assert!(!difference(&[1.0, 2.0], &[1.0]).ok());
        let want = Tensor::from_slice(&[1], &[1.0f32]).unwrap();
        assert!(!Difference::of("y", None, &want, 1.0, 1.0).ok());
    }
}
