//! Activations of recurrent gates, as ONNX's `RNN`, `LSTM` and `GRU` name them.
use crate::{
    attr::{Attr, Real, Symbols, split_top},
    tensor,
};
use std::fmt;

/// Activation of a recurrent gate. Text has parameters in parentheses: `leaky_relu(0.01)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Activation {
    /// Logistic function.
    Sigmoid,
    /// Hyperbolic tangent.
    Tanh,
    /// `max(x, 0)`.
    Relu,
    /// `x / (1 + |x|)`.
    Softsign,
    /// `log(1 + e^x)`.
    Softplus,
    /// `max(0, min(1, alpha x + beta))`.
    HardSigmoid(Real, Real),
    /// `alpha x + beta`.
    Affine(Real, Real),
    /// `alpha tanh(beta x)`.
    ScaledTanh(Real, Real),
    /// `x` where x >= 0, else `alpha (e^x - 1)`.
    Elu(Real),
    /// `x` where x >= 0, else `alpha x`.
    LeakyRelu(Real),
    /// `x` where x >= alpha, else 0.
    ThresholdedRelu(Real),
}

use Activation::*;

impl Activation {
    /// Every function, with the parameters that ONNX gives it where a model gives none.
    pub fn all() -> [Activation; 11] {
        let [zero, half, one] = [0.0, 0.5, 1.0].map(Real::new);
        [
            Sigmoid,
            Tanh,
            Relu,
            Softsign,
            Softplus,
            HardSigmoid(Real::new(0.2), half),
            Affine(one, zero),
            ScaledTanh(one, one),
            Elu(one),
            LeakyRelu(Real::new(0.01)),
            ThresholdedRelu(one),
        ]
    }

    /// The name in text, without parameters.
    pub const fn name(self) -> &'static str {
        match self {
            Sigmoid => "sigmoid",
            Tanh => "tanh",
            Relu => "relu",
            Softsign => "softsign",
            Softplus => "softplus",
            HardSigmoid(..) => "hard_sigmoid",
            Affine(..) => "affine",
            ScaledTanh(..) => "scaled_tanh",
            Elu(..) => "elu",
            LeakyRelu(..) => "leaky_relu",
            ThresholdedRelu(..) => "thresholded_relu",
        }
    }

    /// The parameters, alpha first.
    pub fn parameters(self) -> Vec<Real> {
        match self {
            Sigmoid | Tanh | Relu | Softsign | Softplus => vec![],
            HardSigmoid(alpha, beta) | Affine(alpha, beta) | ScaledTanh(alpha, beta) => vec![alpha, beta],
            Elu(alpha) | LeakyRelu(alpha) | ThresholdedRelu(alpha) => vec![alpha],
        }
    }

    /// The same function with other parameters, as many as it has.
    pub fn with(self, parameters: &[Real]) -> Option<Activation> {
        Some(match (self, parameters) {
            (Sigmoid | Tanh | Relu | Softsign | Softplus, []) => self,
            (HardSigmoid(..), [alpha, beta]) => HardSigmoid(*alpha, *beta),
            (Affine(..), [alpha, beta]) => Affine(*alpha, *beta),
            (ScaledTanh(..), [alpha, beta]) => ScaledTanh(*alpha, *beta),
            (Elu(_), [alpha]) => Elu(*alpha),
            (LeakyRelu(_), [alpha]) => LeakyRelu(*alpha),
            (ThresholdedRelu(_), [alpha]) => ThresholdedRelu(*alpha),
            _ => return None,
        })
    }

    /// The function of a number.
    pub fn apply(self, v: f64) -> f64 {
        match self {
            Sigmoid => 1.0 / (1.0 + libm::exp(-v)),
            Tanh => libm::tanh(v),
            Relu => v.max(0.0),
            Softsign => v / (1.0 + v.abs()),
            Softplus => v.max(0.0) + libm::log1p(libm::exp(-v.abs())),
            HardSigmoid(alpha, beta) => (alpha.get() * v + beta.get()).clamp(0.0, 1.0),
            Affine(alpha, beta) => alpha.get() * v + beta.get(),
            ScaledTanh(alpha, beta) => alpha.get() * libm::tanh(beta.get() * v),
            Elu(alpha) if v < 0.0 => alpha.get() * libm::expm1(v),
            LeakyRelu(alpha) if v < 0.0 => alpha.get() * v,
            Elu(_) | LeakyRelu(_) => v,
            ThresholdedRelu(alpha) => {
                if v >= alpha.get() {
                    v
                } else {
                    0.0
                }
            }
        }
    }
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        let parameters: Vec<String> = self.parameters().into_iter().map(|p| tensor::show(crate::Scalar::F(p.get()))).collect();
        if parameters.is_empty() { Ok(()) } else { write!(f, "({})", parameters.join(",")) }
    }
}

impl Attr for Activation {
    fn show(&self) -> String {
        self.to_string()
    }

    fn parse(text: &str, symbols: Symbols) -> Option<Self> {
        let (name, inner) = match text.split_once('(') {
            Some((name, rest)) => (name, rest.strip_suffix(')')?),
            None => (text, ""),
        };
        let parameters: Vec<Real> = split_top(inner, ',').into_iter().map(|p| Real::parse(p.trim(), symbols)).collect::<Option<_>>()?;
        Activation::all().into_iter().find(|f| f.name() == name)?.with(&parameters)
    }
}
