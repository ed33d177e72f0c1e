//! `--verify`: each fused kernel, compiled, against the reference evaluator.
//!
//! The distinct regions of a program become one program that runs them side by side, each on inputs of its own with
//! random data. What comes out is compared with what the evaluator says of the same data. Sizes that the model leaves
//! open are small here.
use crate::{Device, Error, Options, Tensor};
use pavage_codegen::{cost, emit, targets::Target};
use pavage_ir::{
    self as ir, Binding, DType, Dim, Region, Sym, TensorType,
    dim::Atom,
    program::{Body, BufId, BufferKind, Origin, Program, Step},
    region_eval::eval_region,
};
use std::collections::{BTreeMap, BTreeSet};

/// Sizes to try for all that the model leaves open: the first that suits a region is taken.
const SIZES: [i64; 9] = [3, 5, 16, 33, 64, 128, 224, 576, 1024];

/// Operations of a region beyond which it is not tried: the evaluator takes some tens of nanoseconds for each.
const MOST_WORK: i64 = 100_000_000;

/// A region, what its arguments are, and the sizes it is tried with.
struct Case<'a> {
    region: &'a Region,
    origin: &'a Origin,
    /// Constants of the model among the arguments; the others are inputs.
    constants: Vec<Option<ir::Tensor>>,
    size: i64,
}

/// Replays the regions of the fused programs on this machine's CPU. Gives what a user should know: kernels that could
/// not be tried here.
pub(crate) fn replay(programs: &[Program], symbols: &[Sym], target: &Target, threads: usize) -> Result<Vec<String>, Error> {
    if !matches!(target, Target::Cpu(_)) {
        return Ok(vec![format!("kernels for {target} are not verified: that takes the device")]);
    }
    let mut found = Vec::new();
    for program in programs.iter().filter(|p| p.name != "unfused") {
        collect(&program.body, &[], &mut found);
    }
    let mut seen = BTreeSet::new();
    found.retain(|(region, _, _)| seen.insert(Region { name: String::new(), ..(*region).clone() }));
    let mut notes = Vec::new();
    let mut by_size: BTreeMap<i64, Vec<Case>> = BTreeMap::new();
    for (region, origin, constants) in found {
        let Some(size) = SIZES.into_iter().find(|size| fits(region, &binding(symbols, *size))) else {
            notes.push(format!("kernel `{}` is not verified: no small sizes suit it", region.name));
            continue;
        };
        let work = cost::work(region).flops.eval(&binding(symbols, size));
        if work.is_some_and(|work| work <= MOST_WORK) {
            by_size.entry(size).or_default().push(Case { region, origin, constants, size });
        } else {
            notes.push(format!("kernel `{}` is not verified: too much work for the reference evaluator", region.name));
        }
    }
    for (size, cases) in by_size {
        run(&cases, symbols, &binding(symbols, size), target, threads)?;
    }
    Ok(notes)
}

/// Every open size is `size`, as far as its bounds allow.
fn binding(symbols: &[Sym], size: i64) -> Binding {
    Binding(symbols.iter().map(|s| (s.name.clone(), size.max(s.min).min(s.max.unwrap_or(i64::MAX)))).collect())
}

/// Regions of a body and those nested in it, with the constants they read.
fn collect<'a>(body: &'a Body, outer: &[&'a Body], into: &mut Vec<(&'a Region, &'a Origin, Vec<Option<ir::Tensor>>)>) {
    let bodies: Vec<&Body> = outer.iter().copied().chain([body]).collect();
    for step in &body.steps {
        match step {
            Step::Run { region, args, origin, .. } => {
                into.push((region, origin, args.iter().map(|b| constant(&bodies, *b)).collect()));
            }
            Step::If { then_body, else_body, .. } => {
                collect(then_body, &bodies, into);
                collect(else_body, &bodies, into);
            }
            Step::Loop { body, .. } => collect(body, &bodies, into),
            Step::Copy { .. } | Step::Bind { .. } => {}
        }
    }
}

pub(crate) fn constant(bodies: &[&Body], buf: BufId) -> Option<ir::Tensor> {
    let (body, outer) = bodies.split_last()?;
    match &body.buffers.get(buf.index())?.kind {
        BufferKind::Const(tensor) => Some(tensor.clone()),
        BufferKind::Captured(of) => constant(outer, *of),
        _ => None,
    }
}

fn extents(ty: &TensorType, sizes: &Binding) -> Option<Vec<usize>> {
    ty.shape.iter().map(|d| usize::try_from(d.eval(sizes)?).ok()).collect()
}

/// Whether every tensor of the region exists at these sizes, and none is empty.
fn fits(region: &Region, sizes: &Binding) -> bool {
    let tensors = region.args.iter().chain(region.outputs.iter().map(|o| &o.ty));
    let exists = |ty: &TensorType| extents(ty, sizes).is_some_and(|e| e.iter().all(|d| *d > 0));
    tensors.into_iter().all(exists) && region.space.iter().all(|d| d.eval(sizes).is_some_and(|n| n > 0))
}

/// Runs the regions side by side, and compares.
fn run(cases: &[Case], symbols: &[Sym], sizes: &Binding, target: &Target, threads: usize) -> Result<(), Error> {
    let internal = |why: String| Error::Internal { stage: "verification".into(), why };
    let mut body = Body::default();
    let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
    let mut feeds: Vec<(String, ir::Tensor)> = Vec::new();
    let mut input = |body: &mut Body, name: String, ty: TensorType, data: ir::Tensor| {
        let buf = body.push(ty.clone(), BufferKind::Input(inputs.len() as u32));
        body.inputs.push(buf);
        inputs.push(emit::Port { name: name.clone(), ty });
        feeds.push((name, data));
        buf
    };
    // An input whose only extent is a size: the runtime takes the size's value from it.
    for sym in symbols {
        let dim = Dim::from(Atom::Sym(sym.clone()));
        let n = dim.eval(sizes).and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
        input(&mut body, format!("size {}", sym.name), TensorType::new(DType::U8, [dim]), ir::Tensor::full(DType::U8, vec![n], ir::Scalar::I(1)));
    }
    let mut rng = Rng(0);
    let mut wanted = Vec::new();
    for (c, case) in cases.iter().enumerate() {
        let mut args = Vec::new();
        let mut data = Vec::new();
        for (i, ty) in case.region.args.iter().enumerate() {
            if let Some(tensor) = &case.constants[i] {
                args.push(body.push(tensor.ty(), BufferKind::Const(tensor.clone())));
                data.push(tensor.clone());
                continue;
            }
            let shape = extents(ty, sizes).unwrap_or_default();
            let tensor = rng.tensor(ty.dtype, shape);
            data.push(tensor.clone());
            args.push(input(&mut body, format!("{c} {i}"), ty.clone(), tensor));
        }
        let want = eval_region(case.region, &data, sizes, None).map_err(internal)?;
        let mut results = Vec::new();
        for (i, (out, tensor)) in case.region.outputs.iter().zip(want).enumerate() {
            let buf = body.push(out.ty.clone(), BufferKind::Output(outputs.len() as u32));
            body.outputs.push(buf);
            outputs.push(emit::Port { name: format!("{c} {i}"), ty: out.ty.clone() });
            wanted.push((c, tensor));
            results.push(buf);
        }
        body.steps.push(Step::Run { region: case.region.clone(), args, outputs: results, origin: case.origin.clone() });
    }
    let programs = vec![Program { name: "fused".into(), body }];
    let targets = [(target.clone(), programs)];
    let request = emit::Request {
        inputs,
        outputs,
        symbols: symbols.to_vec(),
        requirements: Vec::new(),
        targets: &targets,
        flags: Vec::new(),
        input_hash: String::new(),
        threads,
        tuned: BTreeMap::new(),
        price: &|_, _| 0.0,
    };
    let bytes = emit::artifact(&request).map_err(|e| internal(e.to_string()))?;
    let mut session = pavage_runtime::Artifact::from_bytes(&bytes)?.session(Device::Cpu, Options::default())?;
    let tensors = feeds.iter().map(|(name, t)| Ok((name.as_str(), host(t)?))).collect::<Result<Vec<_>, Error>>()?;
    let given: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (*n, t)).collect();
    let got = session.run(&given)?;
    for ((c, want), (_, got)) in wanted.iter().zip(got.iter()) {
        if let Some(why) = difference(got.bytes(), want) {
            let case = &cases[*c];
            let nodes = case.origin.sources.join(", ");
            return Err(Error::Verification(format!("kernel `{}` (from {nodes}), sizes {}: {why}\n{}", case.region.name, case.size, case.region)));
        }
    }
    Ok(())
}

/// The same tensor for the runtime.
pub(crate) fn host(tensor: &ir::Tensor) -> Result<Tensor, Error> {
    let dtype = pavage_codegen::wire::dtype(tensor.dtype());
    let dtype = dtype.ok_or_else(|| Error::Request(format!("{} tensors are not verified", tensor.dtype())))?;
    Ok(Tensor::from_bytes(dtype, tensor.shape(), tensor.bytes())?)
}

/// The first element that is too far off, and by how much. Sums are rounded in another order than the evaluator's;
/// a rounding to integers may go to the neighbour, once in a while.
pub(crate) fn difference(got: &[u8], want: &ir::Tensor) -> Option<String> {
    let dtype = want.dtype();
    let have = ir::Tensor::new(dtype, want.shape().to_vec(), got.to_vec()).ok()?;
    let (have, want) = (have.to_f64(), want.to_f64());
    let (rtol, rare) = match dtype {
        DType::F64 | DType::F32 => (2e-4, 0),
        DType::F16 => (4e-3, 0),
        DType::BF16 => (3e-2, 0),
        _ if dtype.is_float() => (0.15, 0),
        _ => (0.0, want.len() / 100),
    };
    // What cancels in a sum leaves an error of the size of its terms.
    let scale = want.iter().filter(|w| w.is_finite()).fold(0f64, |m, w| m.max(w.abs())).max(1e-3);
    let far = |(_, (h, w)): &(usize, (&f64, &f64))| {
        let same = h == w || (h.is_nan() && w.is_nan());
        !same && ((*h - *w).abs() > rtol * scale || (*h - *w).is_nan())
    };
    let mut off = have.iter().zip(&want).enumerate().filter(far);
    let (at, (h, w)) = off.next()?;
    let more = off.count();
    (more >= rare).then(|| format!("element {at} is {h}, should be {w}; {} of {} are off", more + 1, want.len()))
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Floats in -1..1; integers 0 or 1, so that they are valid indices wherever an axis is longer than 1.
    fn tensor(&mut self, dtype: DType, shape: Vec<usize>) -> ir::Tensor {
        let longer = shape.iter().all(|d| *d > 1);
        let n: usize = shape.iter().product();
        let values: Vec<ir::Scalar> = (0..n)
            .map(|_| match dtype.is_float() {
                true => ir::Scalar::F(self.unit() * 2.0 - 1.0),
                false if dtype == DType::Bool => ir::Scalar::B(self.unit() < 0.5),
                false => ir::Scalar::I(i128::from(longer && self.unit() < 0.5)),
            })
            .collect();
        ir::Tensor::from_scalars(dtype, shape, values)
    }
}
