//! Regions built, compiled, run and compared with what they mean.
use super::{Library, Noise, load};
use pavage_codegen::{
    compile::ptx,
    kernels::{self, ArgFacts, Built},
    targets::Target,
    tile::{Kernel, interp::run_gpu},
};
use pavage_ir::{
    Binding, DType, Dim, Expr, ExprId, Heart, Op, Region, Scalar, ScalarFn, Schedule, Tensor, TensorType, op::TypeArgs, region::RegionOutput,
    region_eval::eval_region,
};

/// A region with data.
pub(crate) struct Case {
    pub region: Region,
    pub binding: Binding,
    pub args: Vec<Tensor>,
    pub facts: ArgFacts,
    pub schedule: Option<Schedule>,
    /// Allowed error relative to the larger of the result and 1.
    pub tolerance: f64,
}

impl Case {
    pub(crate) fn new(region: Region, binding: Binding, noise: &mut Noise) -> Case {
        let args = region.args.iter().map(|t| random(t, &binding, noise)).collect();
        Case { region, binding, args, facts: ArgFacts::default(), schedule: None, tolerance: 2e-6 }
    }

    fn build(&self, target: &Target, name: &str) -> Built {
        kernels::build(&self.region, target, name, &self.facts, self.schedule.as_ref()).unwrap_or_else(|e| panic!("{e}\n{}", self.region))
    }
}

pub(crate) fn sizes(dims: &[Dim], binding: &Binding) -> Vec<usize> {
    dims.iter().map(|d| usize::try_from(d.eval(binding).expect("a bound size")).expect("a size")).collect()
}

/// Noise of a type; integers are small, so that products do not only wrap.
pub(crate) fn random(t: &TensorType, binding: &Binding, noise: &mut Noise) -> Tensor {
    let shape = sizes(&t.shape, binding);
    let n: usize = shape.iter().product();
    Tensor::from_scalars(
        t.dtype,
        shape,
        (0..n).map(|_| match t.dtype {
            DType::Bool => Scalar::B(noise.bits() & 1 == 1),
            d if d.is_float() => Scalar::F(noise.unit() * 3.0),
            _ => Scalar::I(i128::from(noise.bits() % 23) - 7),
        }),
    )
}

/// The same cases, the first result of every second a slice of something larger: of another axis each time.
pub(crate) fn sliced(mut cases: Vec<Case>) -> Vec<Case> {
    for (i, case) in cases.iter_mut().step_by(2).enumerate() {
        let out = &mut case.region.outputs[0];
        if let Some(axis) = i.checked_rem(out.ty.rank()) {
            out.ty.shape[axis] = out.ty.shape[axis].clone() + Dim::from(3i64);
            out.index[axis] = out.index[axis].clone() + Dim::from(2i64);
        }
    }
    cases
}

/// Compile every case for the CPU in one library, run each on several slices, compare.
pub(crate) fn check_cpu(cases: &[Case]) {
    let target = Target::parse("native").expect("this machine");
    let built: Vec<Built> = cases.iter().enumerate().map(|(i, c)| c.build(&target, &format!("k{i}"))).collect();
    let kernels: Vec<Kernel> = built.iter().map(|b| b.kernel.clone()).collect();
    let lib = load(&kernels, "native");
    for (i, (case, built)) in cases.iter().zip(&built).enumerate() {
        let what = || format!("case {i}, {}\n{}\n{:?}\n{}", built.schedule, case.region, case.binding, built.kernel);
        let start = outputs_before(case);
        let want = eval_region(&case.region, &case.args, &case.binding, Some(&start)).unwrap_or_else(|e| panic!("{e}\n{}", what()));
        let got = run_cpu(&lib, &format!("k{i}"), case, built, &start);
        for (w, g) in want.iter().zip(&got) {
            compare(w, g, case.tolerance, &what);
        }
    }
}

/// As [`check_cpu`], and on a GPU: every kernel becomes PTX, and is run by the interpreter.
pub(crate) fn check(cases: &[Case]) {
    check_cpu(cases);
    check_gpu(cases, "sm_80");
}

/// Every kernel becomes PTX for this architecture, and is run by the interpreter.
pub(crate) fn check_gpu(cases: &[Case], arch: &str) {
    let target = Target::parse(arch).expect("a known target");
    let built: Vec<Built> = cases.iter().enumerate().map(|(i, c)| c.build(&target, &format!("k{i}"))).collect();
    let kernels: Vec<Kernel> = built.iter().map(|b| b.kernel.clone()).collect();
    for (i, (case, built)) in cases.iter().zip(&built).enumerate() {
        let what = || format!("GPU case {i}, {}\n{}\n{:?}\n{}", built.schedule, case.region, case.binding, built.kernel);
        let start = outputs_before(case);
        let want = eval_region(&case.region, &case.args, &case.binding, Some(&start)).unwrap_or_else(|e| panic!("{e}\n{}", what()));
        let mut bufs = packed_args(case, built);
        bufs.extend(start.iter().map(|t| t.bytes().to_vec()));
        let size = |d: &Dim| d.eval(&case.binding).unwrap_or_else(|| panic!("{d} has no value"));
        let dims: Vec<i64> = built.dims.iter().map(size).collect();
        let grid = built.grid.as_ref().expect("a GPU kernel").each_ref().map(|d| size(d) as u32);
        run_gpu(&built.kernel, &mut bufs, &dims, grid, i as u64).unwrap_or_else(|e| panic!("{e}\n{}", what()));
        for ((w, t), bytes) in want.iter().zip(&start).zip(bufs.split_off(case.args.len())) {
            let got = Tensor::new(t.dtype(), t.shape(), bytes).expect("the same size");
            compare(w, &got, case.tolerance, &what);
        }
    }
    ptx(&kernels, &target).unwrap_or_else(|e| panic!("{e}"));
}

fn packed_args(case: &Case, built: &Built) -> Vec<Vec<u8>> {
    let packed = |i: usize, t: &Tensor| built.packs.iter().find(|(k, _)| *k == i).map(|(_, p)| p.apply(t));
    case.args.iter().enumerate().map(|(i, t)| packed(i, t).as_ref().unwrap_or(t).bytes().to_vec()).collect()
}

/// Outputs hold something before: a region may write a part.
pub(crate) fn outputs_before(case: &Case) -> Vec<Tensor> {
    let mut noise = Noise(99);
    case.region.outputs.iter().map(|o| random(&o.ty, &case.binding, &mut noise)).collect()
}

const CANARY: u8 = 0xA5;

fn run_cpu(lib: &Library, name: &str, case: &Case, built: &Built, start: &[Tensor]) -> Vec<Tensor> {
    let mut bufs = packed_args(case, built);
    for t in start {
        let mut bytes = t.bytes().to_vec();
        bytes.extend([CANARY; 64]);
        bufs.push(bytes);
    }
    let size = |d: &Dim| d.eval(&case.binding).unwrap_or_else(|| panic!("{d} has no value"));
    let dims: Vec<i64> = built.dims.iter().map(size).collect();
    let shape = built.cpu.as_ref().expect("a CPU kernel");
    let (extent, grain) = (size(&shape.extent), size(&shape.grain).max(1));
    assert!(size(&shape.unit_ps) > 0);
    let middle = (extent / 2) / grain * grain;
    for slice in [(middle, extent), (0, middle)] {
        if slice.0 < slice.1 {
            lib.call_with(name, &mut bufs, &dims, slice, size(&shape.scratch) as usize);
        }
    }
    let outs = bufs.split_off(case.args.len());
    outs.into_iter()
        .zip(start)
        .map(|(mut bytes, t)| {
            let n = bytes.len() - 64;
            assert!(bytes[n..].iter().all(|b| *b == CANARY), "{name} writes past its output\n{}", built.kernel);
            bytes.truncate(n);
            Tensor::new(t.dtype(), t.shape(), bytes).expect("the same size")
        })
        .collect()
}

/// Whether two tensors agree within `tolerance`; narrow floats within a unit of their last place too.
pub(crate) fn compare(want: &Tensor, got: &Tensor, tolerance: f64, what: &dyn Fn() -> String) {
    let ulp = match want.dtype() {
        DType::F16 => 1.0 / 512.0,
        DType::BF16 => 1.0 / 64.0,
        DType::F8E4M3 | DType::F8E5M2 => 0.26,
        _ => 0.0,
    };
    for i in 0..want.count() {
        let (w, g) = (want.get(i), got.get(i));
        let same = match (w, g) {
            (Scalar::F(w), Scalar::F(g)) => (w.is_nan() && g.is_nan()) || w == g || (w - g).abs() <= (tolerance + ulp) * w.abs().max(1.0),
            _ => w == g,
        };
        assert!(same, "element {i} of {:?} is {g:?}, should be {w:?}\n{}", want.shape(), what());
    }
}

// ---- building regions ----

pub(crate) fn ty(dtype: DType, shape: &[Dim]) -> TensorType {
    TensorType { dtype, shape: shape.to_vec() }
}

pub(crate) fn load_at(r: &mut Region, arg: usize, index: Vec<Dim>, guard: Option<ExprId>) -> ExprId {
    let dtype = r.args[arg].dtype;
    r.push(Expr::Load { arg: arg as u32, index, guard }, dtype)
}

pub(crate) fn call(r: &mut Region, f: ScalarFn, args: &[ExprId]) -> ExprId {
    let dtypes: Vec<DType> = args.iter().map(|a| r.dtype(*a)).collect();
    let dtype = f.infer(&dtypes).expect("well typed");
    r.push(Expr::Call(f, args.to_vec()), dtype)
}

/// Write `expr` at every point of a tensor of the space's shape.
pub(crate) fn output(r: &mut Region, expr: ExprId) {
    let shape = r.space.clone();
    let index = (0..shape.len()).map(Dim::axis).collect();
    output_at(r, expr, shape, index);
}

pub(crate) fn output_at(r: &mut Region, expr: ExprId, shape: Vec<Dim>, index: Vec<Dim>) {
    let dtype = r.dtype(expr);
    r.outputs.push(RegionOutput { ty: ty(dtype, &shape), expr, index });
}

/// `n` as a constant, or now and then as a symbol bound to it.
pub(crate) fn size(n: i64, noise: &mut Noise, binding: &mut Binding) -> Dim {
    if !noise.bits().is_multiple_of(3) {
        return Dim::from(n);
    }
    let name = format!("s{}", binding.0.len());
    binding.0.insert(name.as_str().into(), n);
    Dim::sym(&name)
}

pub(crate) fn pick<T: Clone>(noise: &mut Noise, of: &[T]) -> T {
    of[(noise.bits() % of.len() as u64) as usize].clone()
}

/// A region of one opaque op on operands of these types.
pub(crate) fn op_region(op: Op, args: Vec<TensorType>) -> Region {
    let types: Vec<&TensorType> = args.iter().collect();
    let results = op.infer(TypeArgs { types: &types, bodies: &[] }).unwrap_or_else(|e| panic!("{op}: {e}"));
    let mut r = Region::new(op.mnemonic(), results[0].shape.clone());
    r.args = args;
    for (i, ty) in results.into_iter().enumerate() {
        let expr = r.push(Expr::Acc(i as u32), ty.dtype);
        let index = (0..ty.rank()).map(Dim::axis).collect();
        r.outputs.push(RegionOutput { ty, expr, index });
    }
    r.heart = Heart::Op(op);
    r
}
