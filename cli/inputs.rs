//! Inputs from the command line: archives, single arrays, numbers, or random data.
use super::{Failure, npy};
use pavage::runtime::plan::Port;
use pavage::runtime::{Artifact, DType};
use pavage::{ShapeArg, Tensor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What the verbs that run something take as inputs.
#[derive(clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    /// Single inputs: NAME=@FILE.npy, or NAME=1,2,3. `bench` takes random ones when none are given.
    #[arg(value_name = "NAME=VALUE")]
    single: Vec<String>,
    /// Inputs from an archive with keys NAME or in:NAME.
    #[arg(long, value_name = "FILE.npz")]
    inputs: Option<PathBuf>,
    /// Inputs under keys in:NAME; `run` compares the outputs with keys out:NAME.
    #[arg(long, value_name = "FILE.npz", conflicts_with = "inputs")]
    case: Option<PathBuf>,
}

/// The inputs that were given, by name, and what outputs to expect.
#[derive(Default)]
pub(crate) struct Given {
    arrays: BTreeMap<String, Tensor>,
    numbers: BTreeMap<String, Vec<String>>,
    /// Expected outputs, by name.
    pub(crate) expected: BTreeMap<String, Tensor>,
}

impl Given {
    /// Reads what the command line names: `--inputs`, `--case`, `name=@x.npy`, `name=1,2`.
    pub(crate) fn read(args: &Args) -> Result<Self, Failure> {
        let mut given = Given::default();
        for path in [&args.inputs, &args.case].into_iter().flatten() {
            let mut arrays = npy::read_npz(path)?;
            let outputs: Vec<String> = arrays.keys().filter(|k| k.starts_with("out:")).cloned().collect();
            for key in outputs {
                if let Some(tensor) = arrays.remove(&key) {
                    given.expected.insert(key["out:".len()..].into(), tensor);
                }
            }
            given.arrays.extend(arrays.into_iter().map(|(k, v)| match k.strip_prefix("in:") {
                Some(name) => (name.to_string(), v),
                None => (k, v),
            }));
        }
        if let Some(case) = &args.case
            && given.expected.is_empty()
        {
            return Err(Failure::usage(format!(
                "{}: a case has expected outputs under keys `out:NAME`; this has none (--inputs takes inputs alone)",
                case.display()
            )));
        }
        for arg in &args.single {
            let (name, value) = arg.split_once('=').ok_or_else(|| Failure::usage(format!("`{arg}`: an input is NAME=@FILE.npy or NAME=1,2,3")))?;
            match value.strip_prefix('@') {
                Some(path) => {
                    given.arrays.insert(name.into(), npy::read_npy(&PathBuf::from(path))?);
                }
                None => {
                    let numbers = value.split(',').map(|n| n.trim().to_string()).collect();
                    given.numbers.insert(name.into(), numbers);
                }
            }
        }
        Ok(given)
    }

    /// Inputs and expected outputs of a case: keys `in:NAME` and `out:NAME`.
    pub(crate) fn case(path: &Path) -> Result<Self, Failure> {
        Given::read(&Args { single: Vec::new(), inputs: None, case: Some(path.into()) })
    }

    /// Inputs of an archive: keys `NAME` or `in:NAME`.
    pub(crate) fn archive(path: &Path) -> Result<Self, Failure> {
        Given::read(&Args { single: Vec::new(), inputs: Some(path.into()), case: None })
    }

    /// Whether nothing was given.
    pub(crate) fn is_empty(&self) -> bool {
        self.arrays.is_empty() && self.numbers.is_empty()
    }

    /// Shapes of the inputs given, to compile for. A single number is a scalar or a vector of one
    /// as the model wants, so it says nothing.
    pub(crate) fn shapes(&self) -> Vec<ShapeArg> {
        let arg = |(name, tensor): (&String, &Tensor)| ShapeArg::Input { name: name.clone(), dims: tensor.shape().iter().map(|d| *d as i64).collect() };
        self.arrays.iter().map(arg).collect()
    }

    /// The inputs as the model takes them, in its order.
    pub(crate) fn resolve(&self, artifact: &Artifact) -> Result<Vec<(String, Tensor)>, Failure> {
        let ports = artifact.inputs();
        for name in self.arrays.keys().chain(self.numbers.keys()) {
            if !ports.iter().any(|p| p.name == *name) {
                let have = ports.iter().map(|p| p.name.as_str()).collect();
                return Err(pavage::runtime::Error::NoSuchInput { name: name.clone(), have }.into());
            }
        }
        let mut inputs = Vec::with_capacity(ports.len());
        for port in ports {
            if let Some(tensor) = self.arrays.get(&port.name) {
                inputs.push((port.name.clone(), as_port_type(tensor, port)?));
            } else if let Some(numbers) = self.numbers.get(&port.name) {
                inputs.push((port.name.clone(), parse_numbers(numbers, port)?));
            }
        }
        Ok(inputs)
    }
}

/// Element types that numpy lacks are given as their stand-ins; all others as they are.
fn as_port_type(tensor: &Tensor, port: &Port) -> Result<Tensor, Failure> {
    let stand_in = match tensor.dtype() {
        DType::F32 => port.dtype == DType::BF16 || is_mini(port.dtype),
        DType::I8 => matches!(port.dtype, DType::I4 | DType::I2),
        DType::U8 => matches!(port.dtype, DType::U4 | DType::U2),
        _ => false,
    };
    if !stand_in {
        return Ok(Tensor::from_bytes(tensor.dtype(), tensor.shape(), tensor.bytes())?);
    }
    let values: Vec<f64> = npy::numbers(tensor).collect();
    encode(port.dtype, tensor.shape(), &values).ok_or_else(|| Failure::usage(format!("input `{}`: {} cannot be given as an array", port.name, port.dtype)))
}

/// The shape that so many numbers have: the model's own, if a size that it leaves open can make up
/// for them; else a row.
fn shape_of(n: usize, port: &Port) -> Vec<usize> {
    let fixed: Vec<Option<usize>> = port.dims.iter().map(|d| usize::try_from(d.as_const()?).ok()).collect();
    let known: usize = fixed.iter().flatten().product();
    let mut rest = n.checked_div(known).filter(|rest| rest * known == n);
    if rest.is_none() || (rest != Some(1) && fixed.iter().all(Option::is_some)) {
        return [vec![1; port.dims.len().saturating_sub(1)], vec![n]].concat();
    }
    // The first open size takes all, further ones are 1.
    fixed.into_iter().map(|d| d.unwrap_or_else(|| rest.take().unwrap_or(1))).collect()
}

fn parse_numbers(numbers: &[String], port: &Port) -> Result<Tensor, Failure> {
    let bad = |n: &str| Failure::usage(format!("input `{}`: `{n}` is no {}", port.name, port.dtype));
    let shape = shape_of(numbers.len(), port);
    if port.dtype == DType::I64 {
        let values: Vec<i64> = numbers.iter().map(|n| n.parse().map_err(|_| bad(n))).collect::<Result<_, _>>()?;
        return Ok(Tensor::from_slice(&shape, &values)?);
    }
    let value = |n: &String| match n.as_str() {
        "true" => Ok(1.0),
        "false" => Ok(0.0),
        _ => n.parse::<f64>().map_err(|_| bad(n)),
    };
    let values = numbers.iter().map(value).collect::<Result<Vec<f64>, _>>()?;
    encode(port.dtype, &shape, &values).ok_or_else(|| bad(&numbers.join(",")))
}

/// Floats of at most 8 bits.
fn is_mini(dtype: DType) -> bool {
    dtype.name().parse().is_ok_and(pavage_ir::DType::is_mini)
}

/// A tensor with these values; none for a type that no numbers are written in.
fn encode(dtype: DType, shape: &[usize], values: &[f64]) -> Option<Tensor> {
    if is_mini(dtype) || dtype.bits() < 8 {
        let same = dtype.name().parse().ok()?;
        let mut bytes = vec![0; dtype.bytes(values.len())?];
        values.iter().enumerate().for_each(|(i, v)| pavage_ir::tensor::write(&mut bytes, same, i, pavage_ir::Scalar::F(*v)));
        return Tensor::from_bytes(dtype, shape, &bytes).ok();
    }
    let mut bytes = Vec::with_capacity(values.len() * dtype.bits().div_ceil(8));
    for &v in values {
        match dtype {
            DType::F64 => bytes.extend(v.to_le_bytes()),
            DType::F32 => bytes.extend((v as f32).to_le_bytes()),
            DType::F16 => bytes.extend(half::f16::from_f64(v).to_le_bytes()),
            DType::BF16 => bytes.extend(half::bf16::from_f64(v).to_le_bytes()),
            DType::I64 => bytes.extend((v as i64).to_le_bytes()),
            DType::I32 => bytes.extend((v as i32).to_le_bytes()),
            DType::I16 => bytes.extend((v as i16).to_le_bytes()),
            DType::I8 => bytes.extend((v as i8).to_le_bytes()),
            DType::U64 => bytes.extend((v as u64).to_le_bytes()),
            DType::U32 => bytes.extend((v as u32).to_le_bytes()),
            DType::U16 => bytes.extend((v as u16).to_le_bytes()),
            DType::U8 => bytes.push(v as u8),
            DType::Bool => bytes.push(u8::from(v != 0.0)),
            _ => return None,
        }
    }
    Tensor::from_bytes(dtype, shape, &bytes).ok()
}

/// Random inputs: floats in -1..1, integers 0 or 1 (so that they are valid indices), scalars 1.
/// The same model gets the same. Sizes left to run time are `default_size`.
pub(crate) fn random(artifact: &Artifact, default_size: usize) -> Result<Vec<(String, Tensor)>, Failure> {
    let manifest = artifact.manifest();
    let sizes: Vec<i64> = manifest.symbols.iter().map(|s| (default_size as i64).clamp(s.min.max(1), s.max.max(1))).collect();
    let mut rng = Rng(0);
    let mut inputs = Vec::with_capacity(manifest.inputs.len());
    for port in &manifest.inputs {
        let dim = |d: &pavage::runtime::DimExpr| {
            let n = d.eval(&sizes).ok().and_then(|n| usize::try_from(n).ok());
            n.ok_or_else(|| Failure::usage(format!("input `{}`: no size can be guessed; give --inputs", port.name)))
        };
        let shape = port.dims.iter().map(dim).collect::<Result<Vec<usize>, _>>()?;
        let float = matches!(port.dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16) || is_mini(port.dtype);
        let values: Vec<f64> = (0..shape.iter().product())
            .map(|_| match float {
                true => rng.unit() * 2.0 - 1.0,
                false if shape.is_empty() => 1.0,
                false => rng.unit().round(),
            })
            .collect();
        let tensor = encode(port.dtype, &shape, &values).ok_or_else(|| Failure::usage(format!("input `{}`: no random {}", port.name, port.dtype)))?;
        inputs.push((port.name.clone(), tensor));
    }
    Ok(inputs)
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    /// A number in 0..1.
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}
