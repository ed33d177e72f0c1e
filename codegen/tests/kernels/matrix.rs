//! Matrix products and convolutions, compiled for two vector widths, against the meaning of their regions.
use crate::common::{Library, Noise, levels, load};
use pavage_codegen::{
    compile,
    kernels::{self, ArgFacts, Built},
    llvm::{Emit, MiddleEnd},
    targets::Target,
    tile::{interp::run_gpu, text::assert_round_trip},
};
use pavage_ir::{
    Binding, DType, Dim, Expr, ExprId, Heart, Op, Region, Scalar, ScalarFn, Tensor, TensorType,
    attr::Layout,
    region::{RegionOutput, Window},
    region_eval::eval_region,
};

/// A random tensor; integers over their whole range.
fn random(noise: &mut Noise, dtype: DType, shape: &[usize]) -> Tensor {
    let n: usize = shape.iter().product();
    let one = |noise: &mut Noise| if dtype.is_float() { Scalar::F(noise.unit()).cast(dtype) } else { Scalar::I(i128::from(noise.bits())).cast(dtype) };
    let values: Vec<Scalar> = (0..n).map(|_| one(noise)).collect();
    Tensor::from_scalars(dtype, shape.to_vec(), values)
}

/// One region with its inputs: `constant[i]` says whether argument `i` is one.
struct Case {
    region: Region,
    args: Vec<Tensor>,
    constant: Vec<bool>,
    binding: Binding,
}

impl Case {
    fn facts(&self) -> ArgFacts {
        ArgFacts { constants: self.args.iter().zip(&self.constant).map(|(t, c)| c.then(|| t.clone())).collect() }
    }

    /// What results are before anything is written.
    fn before(&self) -> Vec<Tensor> {
        let before = |o: &RegionOutput| {
            let shape = o.ty.bind(&self.binding).const_shape().unwrap();
            let bytes = vec![0x5a; o.ty.dtype.bytes(shape.iter().product())];
            Tensor::new(o.ty.dtype, shape, bytes).unwrap()
        };
        self.region.outputs.iter().map(before).collect()
    }

    fn build(&self, target: &str, name: &str, family: &str) -> Built {
        let target = Target::parse(target).unwrap();
        let built = kernels::build(&self.region, &target, name, &self.facts(), None).unwrap_or_else(|e| panic!("{e}\n{}", self.region));
        assert_eq!(built.schedule.family, family, "{}", self.region);
        built
    }

    /// Run the built kernel in `slices` calls and compare all outputs.
    fn check(&self, built: &Built, library: &Library, slices: i64) {
        let size = |d: &Dim| d.eval(&self.binding).unwrap_or_else(|| panic!("{d} has no value"));
        let dims: Vec<i64> = built.dims.iter().map(size).collect();
        let cpu = built.cpu.as_ref().unwrap();
        let extent = size(&cpu.extent);
        let mut bufs: Vec<Vec<u8>> = self.args.iter().map(|t| t.bytes().to_vec()).collect();
        for (i, pack) in &built.packs {
            bufs[*i] = pack.apply(&self.args[*i]).bytes().to_vec();
        }
        let before = self.before();
        bufs.extend(before.iter().map(|t| t.bytes().to_vec()));
        let guard = 4096;
        bufs.push(vec![0x7f; size(&cpu.scratch) as usize + 64 + guard]);
        for s in 0..slices {
            library.call_with_scratch(&built.kernel.name, &mut bufs, &dims, (extent * s / slices, extent * (s + 1) / slices));
        }
        let scratch = bufs.pop().unwrap();
        assert!(scratch[scratch.len() - guard..].iter().all(|b| *b == 0x7f), "{} writes past its scratch", built.kernel.name);
        let want = eval_region(&self.region, &self.args, &self.binding, Some(&before)).unwrap();
        for (i, want) in want.iter().enumerate() {
            let got = Tensor::new(want.dtype(), want.shape().to_vec(), bufs[self.args.len() + i].clone()).unwrap();
            let tolerance = if want.dtype() == DType::F16 { 4e-3 } else { 3e-5 };
            for at in 0..want.count() {
                let (g, w) = (got.get(at), want.get(at));
                let near = if want.dtype().is_float() { (g.f() - w.f()).abs() <= tolerance * (1.0 + w.f().abs()) } else { g == w };
                assert!(near, "{} {}: output {i} element {at} of {:?} is {g:?}, not {w:?}\n{}", built.kernel.name, built.schedule, want.shape(), self.region);
            }
        }
    }
}

/// Check cases on every target, one shared object a target.
fn check(cases: &[Case], family: &str) {
    for target in levels() {
        let built: Vec<Built> = cases.iter().enumerate().map(|(i, c)| c.build(target, &format!("k{i}"), family)).collect();
        let kernels: Vec<_> = built.iter().map(|b| b.kernel.clone()).collect();
        let library = load(&kernels, target);
        for (i, (case, built)) in cases.iter().zip(&built).enumerate() {
            case.check(built, &library, 1 + (i as i64 % 3));
        }
    }
}

/// The same cases, the first result of every second a slice of something larger: of another axis each time.
fn sliced(mut cases: Vec<Case>) -> Vec<Case> {
    for (i, case) in cases.iter_mut().step_by(2).enumerate() {
        let out = &mut case.region.outputs[0];
        let axis = i % out.ty.rank();
        out.ty.shape[axis] = out.ty.shape[axis].clone() + Dim::from(3i64);
        out.index[axis] = out.index[axis].clone() + Dim::from(2i64);
    }
    cases
}

fn axes(from: usize, n: usize) -> Vec<Dim> {
    (from..from + n).map(Dim::axis).collect()
}

fn load_of(r: &mut Region, arg: usize, index: Vec<Dim>) -> ExprId {
    let dtype = r.args[arg].dtype;
    r.push(Expr::Load { arg: arg as u32, index, guard: None }, dtype)
}

fn call(r: &mut Region, f: ScalarFn, args: &[ExprId]) -> ExprId {
    let dtype = r.dtype(args[0]);
    r.push(Expr::Call(f, args.to_vec()), dtype)
}

fn cast(r: &mut Region, x: ExprId, dtype: DType) -> ExprId {
    if r.dtype(x) == dtype { x } else { r.push(Expr::Cast(x), dtype) }
}

/// The operands' and the accumulator's types: integers are u8 times i8.
fn types(dtype: DType) -> (DType, DType) {
    if dtype == DType::I8 { (DType::U8, DType::I32) } else { (dtype, DType::F32) }
}

/// Integer operands as 32-bit ones, the first less its zero point; plain bytes where that is 0, and others as they are.
fn centred(r: &mut Region, x: ExprId, w: ExprId, zero_point: i128) -> (ExprId, ExprId) {
    if r.dtype(w) != DType::I8 || zero_point == 0 {
        return (x, w);
    }
    let (x, w) = (cast(r, x, DType::I32), cast(r, w, DType::I32));
    let zero_point = r.constant(Scalar::I(zero_point), DType::I32);
    (call(r, ScalarFn::Sub, &[x, zero_point]), w)
}

/// A new argument, loaded at an index.
fn operand(r: &mut Region, dtype: DType, shape: Vec<Dim>, index: Vec<Dim>) -> ExprId {
    r.args.push(TensorType { dtype, shape });
    load_of(r, r.args.len() - 1, index)
}

/// Bias of the last axis, which is `axis`, and clip.
fn bias_and_clip(r: &mut Region, value: ExprId, n: Dim, axis: usize) -> ExprId {
    let acc = r.dtype(value);
    let bias = operand(r, acc, vec![n], vec![Dim::axis(axis)]);
    let value = call(r, ScalarFn::Add, &[value, bias]);
    let (lo, hi) = (r.constant(Scalar::F(0.0), acc), r.constant(Scalar::F(6.0), acc));
    let value = call(r, ScalarFn::Max, &[value, lo]);
    call(r, ScalarFn::Min, &[value, hi])
}

/// A product of `[batch..., m, k]` and `[k, n]` or `[n, k]`.
struct Product {
    batch: Vec<usize>,
    m: usize,
    n: usize,
    k: usize,
    dtype: DType,
    constant: bool,
    transposed: bool,
    rhs_batch: bool,
    /// 0: plain; 1: bias and clip; 2: residual, second output; 3: scale of a row, prologue.
    epilogue: usize,
    symbols: bool,
}

impl Product {
    fn case(&self, noise: &mut Noise) -> Case {
        let mut binding = Binding::default();
        let mut dim = |name: &str, v: usize| {
            if self.symbols {
                binding.0.insert(name.into(), v as i64);
                Dim::sym(name)
            } else {
                Dim::from(v)
            }
        };
        let batch: Vec<Dim> = self.batch.iter().enumerate().map(|(i, b)| dim(&format!("b{i}"), *b)).collect();
        let m = dim("m", self.m);
        let (n, k) = if self.constant { (Dim::from(self.n), Dim::from(self.k)) } else { (dim("n", self.n), dim("k", self.k)) };
        let p = batch.len() + 2;
        let space: Vec<Dim> = batch.iter().cloned().chain([m.clone(), n.clone()]).collect();
        let mut r = Region::new("product", space.clone());
        let lhs_shape: Vec<Dim> = batch.iter().cloned().chain([m.clone(), k.clone()]).collect();
        let own: Vec<Dim> = if self.rhs_batch { batch.clone() } else { vec![] };
        let last = if self.transposed { [n.clone(), k.clone()] } else { [k.clone(), n.clone()] };
        let rhs_shape: Vec<Dim> = own.iter().cloned().chain(last).collect();
        let (first, acc) = types(self.dtype);
        let mut index = axes(0, p - 1);
        index.push(Dim::axis(p));
        let lhs = operand(&mut r, first, lhs_shape, index);
        let mut index = if self.rhs_batch { axes(0, p - 2) } else { vec![] };
        index.extend(if self.transposed { [Dim::axis(p - 1), Dim::axis(p)] } else { [Dim::axis(p), Dim::axis(p - 1)] });
        let rhs = operand(&mut r, self.dtype, rhs_shape, index);
        let (mut lhs, rhs) = centred(&mut r, lhs, rhs, if self.k.is_multiple_of(2) { 0 } else { 113 });
        let mut value = r.push(Expr::Acc(0), acc);
        let out_dtype = if self.dtype == DType::F16 { DType::F16 } else { acc };
        let mut outputs = vec![];
        match self.epilogue {
            1 => value = bias_and_clip(&mut r, value, n.clone(), p - 1),
            2 => {
                let residual = operand(&mut r, acc, space.clone(), axes(0, p));
                let sum = call(&mut r, ScalarFn::Add, &[value, residual]);
                outputs.push((sum, acc));
                value = call(&mut r, ScalarFn::Neg, &[sum]);
            }
            3 => {
                let scale = operand(&mut r, acc, vec![m.clone()], vec![Dim::axis(p - 2)]);
                value = call(&mut r, ScalarFn::Mul, &[value, scale]);
                let half = r.constant(Scalar::F(0.5), self.dtype);
                lhs = call(&mut r, ScalarFn::Mul, &[lhs, half]);
                lhs = call(&mut r, ScalarFn::Max, &[lhs, half]);
            }
            _ => {}
        }
        outputs.push((value, out_dtype));
        r.heart = Heart::Contract { k, lhs, rhs, acc };
        for (value, dtype) in outputs {
            let expr = cast(&mut r, value, dtype);
            r.outputs.push(RegionOutput { ty: TensorType { dtype, shape: space.clone() }, expr, index: axes(0, p) });
        }
        let args: Vec<Tensor> = r.args.iter().map(|t| random(noise, t.dtype, &t.bind(&binding).const_shape().unwrap())).collect();
        let constant = (0..args.len()).map(|i| i == 1 && self.constant).collect();
        Case { region: r, args, constant, binding }
    }
}

#[test]
fn products_of_random_sizes_are_right() {
    let mut noise = Noise(7);
    let mut cases = vec![];
    for i in 0..60 {
        let mut size = |most: u64| 1 + (noise.bits() % most) as usize;
        let (m, n, k) = (size(40), size(70), size(45));
        let batch = match i % 4 {
            0 => vec![],
            1 | 2 => vec![size(3)],
            _ => vec![size(2), size(3)],
        };
        let dtype = [DType::F32, DType::F32, DType::F16, DType::I8][i / 3 % 4];
        let constant = i % 3 != 0;
        let epilogue = if dtype == DType::I8 { i % 3 % 2 * 2 } else { i / 2 % 4 };
        let product = Product {
            rhs_batch: !batch.is_empty() && i % 5 == 0,
            batch,
            m: if i % 7 == 0 { 1 } else { m },
            n,
            k,
            dtype,
            constant,
            transposed: i % 2 == 0,
            epilogue: if epilogue == 3 && i % 4 != 0 { 1 } else { epilogue },
            symbols: i % 5 > 2,
        };
        cases.push(product.case(&mut noise));
    }
    check(&sliced(cases), "gemm_cpu");
}

/// A channels-last convolution.
struct Convolution {
    n: usize,
    size: Vec<usize>,
    c: usize,
    o: usize,
    groups: usize,
    kernel: Vec<usize>,
    strides: Vec<usize>,
    dilations: Vec<usize>,
    lo: Vec<i64>,
    hi: Vec<i64>,
    dtype: DType,
    /// 0: plain; 1: bias and clip; 2: scale of a channel and residual; 3: prologue.
    fused: usize,
    symbols: bool,
    /// Whether channels are planes in memory.
    planes: bool,
}

impl Convolution {
    fn case(&self, noise: &mut Noise) -> Case {
        let mut binding = Binding::default();
        let mut dim = |name: &str, v: usize| {
            if self.symbols {
                binding.0.insert(name.into(), v as i64);
                Dim::sym(name)
            } else {
                Dim::from(v)
            }
        };
        let spatial = self.size.len();
        let n = dim("n", self.n);
        let size: Vec<Dim> = self.size.iter().enumerate().map(|(i, s)| dim(&format!("s{i}"), *s)).collect();
        let input: Vec<Dim> = [n.clone()].into_iter().chain(size.iter().cloned()).chain([Dim::from(self.c * self.groups)]).collect();
        let mut space = vec![n.clone()];
        for (i, extent) in size.iter().enumerate() {
            let reach = (self.kernel[i] - 1) * self.dilations[i] + 1;
            let room = extent.clone() + Dim::from(self.lo[i] + self.hi[i] - reach as i64);
            space.push(room.div(&Dim::from(self.strides[i])) + Dim::one());
        }
        let channels = self.o * self.groups;
        space.push(Dim::from(channels));
        let weights: Vec<Dim> = [channels, self.c].iter().chain(&self.kernel).map(|v| Dim::from(*v)).collect();
        let mut r = Region::new("conv", space.clone());
        let (first, acc) = types(self.dtype);
        let x = if self.planes {
            let order = || [0, spatial + 1].into_iter().chain(1..=spatial);
            operand(&mut r, first, order().map(|axis| input[axis].clone()).collect(), order().map(Dim::axis).collect())
        } else {
            operand(&mut r, first, input.clone(), axes(0, spatial + 2))
        };
        let w = operand(&mut r, self.dtype, weights.clone(), axes(0, spatial + 2));
        let (mut x, w) = centred(&mut r, x, w, if self.size[0].is_multiple_of(2) { 0 } else { 7 });
        let mut value = r.push(Expr::Acc(0), acc);
        match self.fused {
            1 => value = bias_and_clip(&mut r, value, Dim::from(channels), spatial + 1),
            2 => {
                let scale = operand(&mut r, acc, vec![n.clone(), Dim::from(channels)], vec![Dim::axis(0), Dim::axis(spatial + 1)]);
                let residual = operand(&mut r, acc, space.clone(), axes(0, spatial + 2));
                value = call(&mut r, ScalarFn::Mul, &[value, scale]);
                value = call(&mut r, ScalarFn::Add, &[value, residual]);
            }
            3 if self.dtype != DType::I8 => {
                let half = r.constant(Scalar::F(0.5), self.dtype);
                x = call(&mut r, ScalarFn::Add, &[x, half]);
            }
            _ => {}
        }
        let window =
            Window { strides: self.strides.clone(), dilations: self.dilations.clone(), lo: self.lo.clone(), hi: self.hi.clone(), layout: Layout::ChannelsLast };
        r.heart = Heart::Conv { window, groups: self.groups, x, input, w, weights, acc };
        r.outputs.push(RegionOutput { ty: TensorType { dtype: acc, shape: space }, expr: value, index: axes(0, spatial + 2) });
        let args: Vec<Tensor> = r.args.iter().map(|t| random(noise, t.dtype, &t.bind(&binding).const_shape().unwrap())).collect();
        let constant = (0..args.len()).map(|i| i == 1).collect();
        Case { region: r, args, constant, binding }
    }
}

#[test]
fn larger_products_of_two_activations_are_right() {
    let mut noise = Noise(29);
    let mut cases = vec![];
    for (i, (m, n, k)) in [(33, 50, 64), (13, 32, 37), (100, 16, 16), (7, 48, 80)].into_iter().enumerate() {
        for symbols in [false, true] {
            let product =
                Product { batch: vec![2, 2], m, n, k, dtype: DType::F32, constant: false, transposed: i % 4 != 3, rhs_batch: true, epilogue: i % 3, symbols };
            cases.push(product.case(&mut noise));
        }
    }
    check(&cases, "gemm_cpu");
}

#[test]
fn pointwise_convolutions_are_products() {
    let mut noise = Noise(11);
    let mut cases = vec![];
    for i in 0..16 {
        let mut size = |most: u64| 1 + (noise.bits() % most) as usize;
        let stride = 1 + i / 3 % 2;
        let conv = Convolution {
            n: 1 + i % 2,
            size: vec![size(7), size(9)],
            c: size(40),
            o: size(50),
            groups: 1,
            kernel: vec![1, 1],
            strides: vec![stride, stride],
            dilations: vec![1, 1],
            lo: vec![0, 0],
            hi: vec![0, 0],
            dtype: [DType::F32, DType::F32, DType::F16, DType::I8][i % 4],
            fused: if i % 4 == 3 { i / 4 % 2 * 2 } else { i / 4 },
            symbols: i % 3 == 2,
            planes: false,
        };
        cases.push(conv.case(&mut noise));
    }
    check(&sliced(cases), "gemm_cpu");
}

#[test]
fn convolutions_of_every_shape_are_right() {
    let mut noise = Noise(13);
    let mut cases = vec![];
    for i in 0..60 {
        let mut size = |from: u64, to: u64| (from + noise.bits() % (to - from + 1)) as usize;
        let spatial = if i % 6 == 5 { 1 } else { 2 };
        let groups = if i % 4 == 3 { size(2, 3) } else { 1 };
        let mut list = |from: u64, to: u64| -> Vec<usize> { (0..spatial).map(|_| size(from, to)).collect() };
        let kernel = if i % 3 == 0 { vec![3; spatial] } else { list(1, 5) };
        let strides = if i % 3 == 0 { vec![1 + i % 2; spatial] } else { list(1, 3) };
        let dilations = if i % 5 == 4 { list(1, 3) } else { vec![1; spatial] };
        let pads: Vec<usize> = if i % 7 == 6 { vec![0; 2 * spatial] } else { list(0, 3).into_iter().chain(list(0, 3)).collect() };
        let sizes: Vec<usize> = (0..spatial).map(|a| (kernel[a] - 1) * dilations[a] + 1).zip(list(0, 9)).map(|(reach, more)| reach + more).collect();
        if kernel.iter().all(|k| *k == 1) {
            continue;
        }
        let dtype = [DType::F32, DType::F32, DType::F16, DType::I8][i / 2 % 4];
        let conv = Convolution {
            n: 1 + i % 2,
            size: sizes,
            c: if i % 8 == 0 { 3 } else { size(2, 19) },
            o: size(2, 37),
            groups,
            kernel,
            strides,
            dilations,
            lo: pads[..spatial].iter().map(|p| *p as i64).collect(),
            hi: pads[spatial..].iter().map(|p| *p as i64).collect(),
            dtype,
            fused: if dtype == DType::I8 { i % 2 * 2 } else { i % 4 },
            symbols: i % 5 == 1,
            planes: i % 3 == 2,
        };
        cases.push(conv.case(&mut noise));
    }
    // A column of pixels.
    for (stride, pad) in [(1, 2), (2, 0)] {
        let conv = Convolution {
            n: 2,
            size: vec![23, 1],
            c: 9,
            o: 20,
            groups: 1,
            kernel: vec![5, 1],
            strides: vec![stride, 1],
            dilations: vec![1; 2],
            lo: vec![pad, 0],
            hi: vec![pad, 0],
            dtype: DType::F32,
            fused: 2,
            symbols: false,
            planes: false,
        };
        cases.push(conv.case(&mut noise));
    }
    check(&sliced(cases), "conv_cpu");
}

#[test]
fn depthwise_convolutions_are_right() {
    let mut noise = Noise(17);
    let mut cases = vec![];
    for i in 0..48 {
        let mut size = |from: u64, to: u64| (from + noise.bits() % (to - from + 1)) as usize;
        let spatial = if i % 6 == 5 { 1 } else { 2 };
        let mut list = |from: u64, to: u64| -> Vec<usize> { (0..spatial).map(|_| size(from, to)).collect() };
        let kernel = if i % 3 == 0 { vec![3 + 2 * (i / 3 % 2); spatial] } else { list(1, 5) };
        let strides = if i % 3 == 0 { vec![1 + i % 2; spatial] } else { list(1, 3) };
        let dilations = if i % 5 == 4 { list(1, 3) } else { vec![1; spatial] };
        let pads: Vec<usize> = if i % 7 == 6 { vec![0; 2 * spatial] } else { list(0, 3).into_iter().chain(list(0, 3)).collect() };
        let sizes: Vec<usize> = (0..spatial).map(|a| (kernel[a] - 1) * dilations[a] + 1).zip(list(0, 24)).map(|(reach, more)| reach + more).collect();
        let dtype = [DType::F32, DType::F32, DType::F16, DType::I8][i / 2 % 4];
        let conv = Convolution {
            n: 1 + i % 2,
            size: sizes,
            c: 1,
            o: 1,
            groups: size(2, 40),
            kernel,
            strides,
            dilations,
            lo: pads[..spatial].iter().map(|p| *p as i64).collect(),
            hi: pads[spatial..].iter().map(|p| *p as i64).collect(),
            dtype,
            fused: if dtype == DType::I8 { i % 2 * 2 } else { i % 4 },
            symbols: i % 4 == 1,
            planes: false,
        };
        cases.push(conv.case(&mut noise));
    }
    check(&sliced(cases), "depthwise_cpu");
}

/// A depthwise convolution with bias and ReLU, and a product of its channels with bias and clip.
fn separable(first: &Convolution, filters: usize, noise: &mut Noise) -> Case {
    let Case { region: mut r, mut args, mut constant, binding } = first.case(noise);
    let Heart::Conv { window, x, input, w, weights, acc, .. } = r.heart.clone() else { panic!("a convolution") };
    let (rank, channels) = (input.len(), Dim::from(first.groups));
    r.outputs.clear();
    r.space[rank - 1] = Dim::from(filters);
    let bias = operand(&mut r, acc, vec![channels.clone()], vec![Dim::axis(rank - 1)]);
    let mid = r.push(Expr::Acc(1), acc);
    let mid = call(&mut r, ScalarFn::Add, &[mid, bias]);
    let zero = r.constant(Scalar::F(0.0), acc);
    let mid = call(&mut r, ScalarFn::Max, &[mid, zero]);
    let shape: Vec<Dim> = [Dim::from(filters), channels].into_iter().chain((2..rank).map(|_| Dim::one())).collect();
    let point = operand(&mut r, acc, shape.clone(), axes(0, rank));
    let value = r.push(Expr::Acc(0), acc);
    let value = bias_and_clip(&mut r, value, Dim::from(filters), rank - 1);
    r.heart = Heart::Separable { window, x, input, w, weights, mid, point, filters: shape, acc };
    r.outputs.push(RegionOutput { ty: TensorType { dtype: acc, shape: r.space.clone() }, expr: value, index: axes(0, rank) });
    for t in &r.args[args.len()..] {
        constant.push(t.shape.len() == rank);
        args.push(random(noise, t.dtype, &t.bind(&binding).const_shape().unwrap()));
    }
    Case { region: r, args, constant, binding }
}

#[test]
fn separable_convolutions_are_right() {
    let mut noise = Noise(41);
    let mut cases = vec![];
    for i in 0..24 {
        let mut size = |from: u64, to: u64| (from + noise.bits() % (to - from + 1)) as usize;
        let spatial = if i % 6 == 5 { 1 } else { 2 };
        let kernel = vec![3 + 2 * (i % 2); spatial];
        let pads: Vec<i64> = (0..2 * spatial).map(|_| size(0, 2) as i64).collect();
        let conv = Convolution {
            n: 1 + i % 2,
            size: kernel.iter().map(|k| k + size(0, 30)).collect(),
            c: 1,
            o: 1,
            groups: size(2, 40),
            strides: vec![1 + i / 2 % 2; spatial],
            dilations: vec![if i % 5 == 4 { 2 } else { 1 }; spatial],
            lo: pads[..spatial].iter().map(|p| p + if i % 5 == 4 { 4 } else { 0 }).collect(),
            hi: pads[spatial..].to_vec(),
            kernel,
            dtype: DType::F32,
            fused: 0,
            symbols: i % 4 == 1,
            planes: false,
        };
        let filters = size(1, 70);
        cases.push(separable(&conv, filters, &mut noise));
    }
    check(&sliced(cases), "separable_cpu");
}

/// Vector registers that the loops of multiply-adds of a kernel spill to or reload from the stack.
fn spills(case: &Case, target: &str, family: &str) -> usize {
    let built = case.build(target, "spills", family);
    let target = Target::parse(target).unwrap();
    let text = compile::cpu_mlir(std::slice::from_ref(&built.kernel), &target).unwrap();
    let assembly = compile::emit(&text, &target, MiddleEnd::None, Emit::Assembly).unwrap();
    let assembly = String::from_utf8(assembly).unwrap();
    let stack = |l: &str| (l.contains("(%rsp)") || l.contains("(%rbp)")) && (l.contains("%zmm") || l.contains("%ymm"));
    let (mut found, mut here, mut products) = (0, 0, 0);
    for line in assembly.lines().chain([".L"]) {
        // A label ends a block of straight code.
        if line.starts_with(".L") || line.starts_with("# %bb") {
            found += if products >= 8 { here } else { 0 };
            (here, products) = (0, 0);
        }
        here += usize::from(stack(line));
        products += usize::from(line.contains("vfmadd"));
    }
    found
}

#[test]
fn register_tiles_stay_in_registers() {
    let mut noise = Noise(23);
    let conv = |size: usize, c: usize, o: usize, kernel: usize, groups: usize, fused: usize| Convolution {
        n: 1,
        size: vec![size; 2],
        c: c / groups,
        o: o / groups,
        groups,
        kernel: vec![kernel; 2],
        strides: vec![1; 2],
        dilations: vec![1; 2],
        lo: vec![kernel as i64 / 2; 2],
        hi: vec![kernel as i64 / 2; 2],
        dtype: DType::F32,
        fused,
        symbols: false,
        planes: false,
    };
    let cases = [
        (conv(14, 80, 480, 1, 1, 1), "gemm_cpu"),
        (conv(28, 240, 40, 1, 1, 1), "gemm_cpu"),
        (conv(28, 32, 192, 1, 1, 2), "gemm_cpu"),
        (Convolution { size: vec![508, 1], kernel: vec![5, 1], lo: vec![0; 2], hi: vec![0; 2], ..conv(0, 256, 512, 1, 1, 0) }, "conv_cpu"),
        (conv(7, 64, 96, 3, 1, 1), "conv_cpu"),
        (conv(14, 64, 64, 3, 1, 1), "conv_cpu"),
        (conv(28, 48, 48, 3, 48, 1), "depthwise_cpu"),
        (conv(14, 96, 96, 5, 96, 1), "depthwise_cpu"),
    ];
    for (conv, family) in cases {
        let case = conv.case(&mut noise);
        // LLVM schedules for the very processor.
        for target in ["x86-64-v3", "x86-64-v4", "native"] {
            let n = spills(&case, target, family);
            // A window row of a depthwise tile may shuffle some inputs.
            let most = if family == "depthwise_cpu" { 16 } else { 0 };
            assert!(n <= most, "{n} vector spills in {family} for {target}\n{}", case.region);
        }
    }
}

#[test]
fn transposed_convolutions_without_overlap_are_products() {
    let mut noise = Noise(31);
    let mut cases = vec![];
    for (size, c, o, strides, symbols) in [([5, 7], 24, 24, [2, 2], false), ([4, 40], 5, 1, [2, 2], true), ([3, 3], 17, 35, [3, 1], false)] {
        let mut binding = Binding::default();
        let n = if symbols { Dim::sym("n") } else { Dim::from(2usize) };
        binding.0.insert("n".into(), 2);
        let x = TensorType { dtype: DType::F32, shape: vec![n, Dim::from(size[0]), Dim::from(size[1]), Dim::from(c)] };
        let w = TensorType::new(DType::F32, [c, o, strides[0], strides[1]]);
        let op = Op::ConvTranspose {
            strides: strides.to_vec(),
            dilations: vec![1; 2],
            lo: vec![0; 2],
            hi: vec![0; 2],
            extra: vec![0; 2],
            groups: 1,
            layout: Layout::ChannelsLast,
        };
        let shape: Vec<Dim> = vec![x.shape[0].clone(), Dim::from(size[0] * strides[0]), Dim::from(size[1] * strides[1]), Dim::from(o)];
        let mut r = Region::new("spread", shape.clone());
        r.args = vec![x, w];
        r.heart = Heart::Op(op);
        let expr = r.push(Expr::Acc(0), DType::F32);
        r.outputs.push(RegionOutput { ty: TensorType { dtype: DType::F32, shape }, expr, index: axes(0, 4) });
        let args: Vec<Tensor> = r.args.iter().map(|t| random(&mut noise, t.dtype, &t.bind(&binding).const_shape().unwrap())).collect();
        cases.push(Case { region: r, args, constant: vec![false, true], binding });
    }
    check(&sliced(cases), "gemm_cpu");
}

/// Check cases on a GPU, by the interpreter; each is of one of these families.
fn check_gpu(cases: &[Case], families: &[&str]) {
    let target = Target::parse("sm_80").unwrap();
    let mut kernels = vec![];
    for (i, case) in cases.iter().enumerate() {
        let built = kernels::build(&case.region, &target, &format!("k{i}"), &case.facts(), None).unwrap_or_else(|e| panic!("{e}\n{}", case.region));
        assert!(families.contains(&built.schedule.family.as_str()), "{}: {}", built.schedule, case.region);
        assert_round_trip(&built.kernel);
        let size = |d: &Dim| d.eval(&case.binding).unwrap_or_else(|| panic!("{d} has no value"));
        let dims: Vec<i64> = built.dims.iter().map(size).collect();
        let mut bufs: Vec<Vec<u8>> = case.args.iter().map(|t| t.bytes().to_vec()).collect();
        for (i, pack) in &built.packs {
            bufs[*i] = pack.apply(&case.args[*i]).bytes().to_vec();
        }
        let before = case.before();
        bufs.extend(before.iter().map(|t| t.bytes().to_vec()));
        let grid = built.grid.as_ref().unwrap().each_ref().map(|d| size(d) as u32);
        run_gpu(&built.kernel, &mut bufs, &dims, grid, i as u64).unwrap_or_else(|e| panic!("{e}\n{}\n{}", case.region, built.kernel));
        let want = eval_region(&case.region, &case.args, &case.binding, Some(&before)).unwrap();
        for (o, want) in want.iter().enumerate() {
            let got = Tensor::new(want.dtype(), want.shape().to_vec(), bufs[case.args.len() + o].clone()).unwrap();
            let half = case.region.args[1].dtype.bits() == 16;
            for at in 0..want.count() {
                let (g, w) = (got.get(at), want.get(at));
                let tolerance = if half { 4e-3 } else { 3e-5 };
                let near = if want.dtype().is_float() { (g.f() - w.f()).abs() <= tolerance * (1.0 + w.f().abs()) } else { g == w };
                assert!(near, "{}: output {o} element {at} of {:?} is {g:?}, not {w:?}\n{}", built.schedule, want.shape(), case.region);
            }
        }
        kernels.push(built.kernel);
    }
    compile::ptx(&kernels, &target).unwrap();
}

#[test]
fn convolutions_run_as_products_on_a_gpu() {
    let mut noise = Noise(43);
    let mut cases = vec![];
    for i in 0..24 {
        let mut size = |from: u64, to: u64| (from + noise.bits() % (to - from + 1)) as usize;
        let spatial = if i % 6 == 5 { 1 } else { 2 };
        let groups = if i % 4 == 3 { 2 } else { 1 };
        let mut list = |from: u64, to: u64| -> Vec<usize> { (0..spatial).map(|_| size(from, to)).collect() };
        let (kernel, strides) = (list(1, 4), list(1, 2));
        let dilations = if i % 5 == 4 { list(1, 3) } else { vec![1; spatial] };
        let pads = [list(0, 2), list(0, 2)];
        let sizes: Vec<usize> = (0..spatial).map(|a| (kernel[a] - 1) * dilations[a] + 1).zip(list(0, 6)).map(|(reach, more)| reach + more).collect();
        let conv = Convolution {
            n: 1 + i % 2,
            size: sizes,
            c: [3, 8, 16, 20][i % 4],
            o: [16, 24, 33, 8][i / 2 % 4],
            groups,
            kernel,
            strides,
            dilations,
            lo: pads[0].iter().map(|p| *p as i64).collect(),
            hi: pads[1].iter().map(|p| *p as i64).collect(),
            dtype: [DType::F32, DType::F16, DType::F16][i % 3],
            fused: i / 3 % 4,
            symbols: i % 5 == 1,
            planes: false,
        };
        cases.push(conv.case(&mut noise));
    }
    check_gpu(&sliced(cases), &["gemm_mma", "gemm_gpu"]);
}

#[test]
fn convolutions_of_bytes_run_on_matrix_units() {
    let mut noise = Noise(44);
    let mut cases = vec![];
    for i in 0..16 {
        let mut size = |from: u64, to: u64| (from + noise.bits() % (to - from + 1)) as usize;
        let kernel = if i % 3 == 0 { vec![1, 1] } else { vec![size(1, 3), size(2, 4)] };
        let pads = [0, 1].map(|_| if i % 3 == 0 { 0 } else { size(0, 2) as i64 });
        let conv = Convolution {
            n: 1 + i % 2,
            // An even number of rows: bytes without a zero point.
            size: vec![2 * size(2, 4), size(4, 7)],
            c: [24, 16, 12, 3, 32][i % 5].max(16 / kernel.iter().product::<usize>()),
            o: [16, 24, 33, 8][i / 2 % 4],
            groups: if i % 4 == 3 { 2 } else { 1 },
            kernel,
            strides: vec![1 + i % 2; 2],
            dilations: vec![1; 2],
            lo: vec![pads[0]; 2],
            hi: vec![pads[1]; 2],
            dtype: DType::I8,
            fused: i / 3 % 2 * 2,
            symbols: i % 5 == 1,
            planes: false,
        };
        cases.push(conv.case(&mut noise));
    }
    check_gpu(&sliced(cases), &["gemm_mma"]);
}
