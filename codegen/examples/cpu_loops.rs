//! Speed of the loop families on one core: maps, transposes, row programs, pools, recurrent layers, trees; microseconds, and
//! gigabytes per second of arguments and outputs beside those of a copy.
//!
//! `cargo run --release -p pavage-codegen --example cpu_loops [filter] [target]`
use pavage_codegen::{
    compile::cpu_library,
    kernels::{self, ArgFacts, Built},
    llvm::MiddleEnd,
    targets::Target,
    tile::Kernel,
};
use pavage_ir::{
    Binding, DType, Dim, Expr, ExprId, Heart, Op, Real, Region, Scalar, ScalarFn, Tensor, TensorType,
    activation::Activation,
    attr::{Aggregate, CoordMode, Direction, Layout, NearestMode, PoolFn, ReduceFn, ResizeMode},
    op::TypeArgs,
    region::{RegionOutput, Stage, StageFn, Window},
};
use std::time::{Duration, Instant};

type Entry = unsafe extern "C" fn(*const *mut u8, *const i64, i64, i64);

fn dims(v: &[usize]) -> Vec<Dim> {
    v.iter().map(|d| Dim::from(*d)).collect()
}

fn arg(r: &mut Region, dtype: DType, shape: &[usize], index: Vec<Dim>) -> ExprId {
    r.args.push(TensorType::new(dtype, shape.iter().copied()));
    r.push(Expr::Load { arg: r.args.len() as u32 - 1, index, guard: None }, dtype)
}

fn call(r: &mut Region, f: ScalarFn, args: &[ExprId]) -> ExprId {
    let dtype = r.dtype(args[args.len() - 1]);
    r.push(Expr::Call(f, args.to_vec()), dtype)
}

fn out(r: &mut Region, expr: ExprId) {
    let shape = r.axes();
    let index = (0..shape.len()).map(Dim::axis).collect();
    let ty = TensorType { dtype: r.dtype(expr), shape };
    r.outputs.push(RegionOutput { ty, expr, index });
}

fn map(name: &str, n: usize, f: &[ScalarFn]) -> Region {
    let mut r = Region::new(name, dims(&[n]));
    let mut x = arg(&mut r, DType::F32, &[n], vec![Dim::axis(0)]);
    for f in f {
        x = call(&mut r, *f, &[x]);
    }
    out(&mut r, x);
    r
}

fn transpose(name: &str, shape: &[usize], perm: &[usize], dtype: DType) -> Region {
    let mut r = Region::new(name, perm.iter().map(|p| Dim::from(shape[*p])).collect());
    let mut index = vec![Dim::ZERO; shape.len()];
    for (i, p) in perm.iter().enumerate() {
        index[*p] = Dim::axis(i);
    }
    let x = arg(&mut r, dtype, shape, index);
    out(&mut r, x);
    r
}

fn softmax(rows: usize, n: usize) -> Region {
    let mut r = Region::new(format!("softmax {rows}x{n}"), dims(&[rows]));
    r.heart = Heart::Reduce { axes: dims(&[n]), stages: vec![] };
    let x = arg(&mut r, DType::F32, &[rows, n], vec![Dim::axis(0), Dim::axis(1)]);
    let top = r.push(Expr::Acc(0), DType::F32);
    let d = call(&mut r, ScalarFn::Sub, &[x, top]);
    let e = call(&mut r, ScalarFn::Exp, &[d]);
    let sum = r.push(Expr::Acc(1), DType::F32);
    let y = call(&mut r, ScalarFn::Div, &[e, sum]);
    let fold = |f, expr| Stage { f: StageFn::Fold(f), expr };
    r.heart = Heart::Reduce { axes: dims(&[n]), stages: vec![fold(ReduceFn::Max, x), fold(ReduceFn::Sum, e)] };
    out(&mut r, y);
    r
}

fn layernorm(rows: usize, n: usize) -> Region {
    let mut r = Region::new(format!("layernorm {rows}x{n}"), dims(&[rows]));
    r.heart = Heart::Reduce { axes: dims(&[n]), stages: vec![] };
    let x = arg(&mut r, DType::F32, &[rows, n], vec![Dim::axis(0), Dim::axis(1)]);
    let (g, b) = (arg(&mut r, DType::F32, &[n], vec![Dim::axis(1)]), arg(&mut r, DType::F32, &[n], vec![Dim::axis(1)]));
    let inv = r.constant(Scalar::F(1.0 / n as f64), DType::F32);
    let (s, v) = (r.push(Expr::Acc(0), DType::F32), r.push(Expr::Acc(1), DType::F32));
    let mean = call(&mut r, ScalarFn::Mul, &[s, inv]);
    let d = call(&mut r, ScalarFn::Sub, &[x, mean]);
    let q = call(&mut r, ScalarFn::Mul, &[d, d]);
    let var = call(&mut r, ScalarFn::Mul, &[v, inv]);
    let eps = r.constant(Scalar::F(1e-5), DType::F32);
    let var = call(&mut r, ScalarFn::Add, &[var, eps]);
    let k = call(&mut r, ScalarFn::Rsqrt, &[var]);
    let y = call(&mut r, ScalarFn::Mul, &[d, k]);
    let y = call(&mut r, ScalarFn::Mul, &[y, g]);
    let y = call(&mut r, ScalarFn::Add, &[y, b]);
    let fold = |expr| Stage { f: StageFn::Fold(ReduceFn::Sum), expr };
    r.heart = Heart::Reduce { axes: dims(&[n]), stages: vec![fold(x), fold(q)] };
    out(&mut r, y);
    r
}

fn sum(name: &str, shape: [usize; 3], f: ReduceFn) -> Region {
    let mut r = Region::new(name, dims(&[shape[0], shape[2]]));
    let x = arg(&mut r, DType::F32, &shape, vec![Dim::axis(0), Dim::axis(2), Dim::axis(1)]);
    let acc = r.push(Expr::Acc(0), DType::F32);
    out(&mut r, acc);
    r.heart = Heart::Reduce { axes: dims(&[shape[1]]), stages: vec![Stage { f: StageFn::Fold(f), expr: x }] };
    r
}

fn pool(layout: Layout) -> Region {
    let (input, space) = match layout {
        Layout::ChannelsLast => ([1, 112, 112, 64], [1, 56, 56, 64]),
        Layout::ChannelsFirst => ([1, 64, 112, 112], [1, 64, 56, 56]),
    };
    let mut r = Region::new(format!("maxpool 3x3s2 {layout}"), dims(&space));
    let x = arg(&mut r, DType::F32, &input, (0..4).map(Dim::axis).collect());
    let window = Window { strides: vec![2; 2], dilations: vec![1; 2], lo: vec![1; 2], hi: vec![1; 2], layout };
    let acc = r.push(Expr::Acc(0), DType::F32);
    out(&mut r, acc);
    r.heart = Heart::Pool { f: PoolFn::Max, kernel: vec![3; 2], window, x, input: dims(&input) };
    r
}

fn op(name: &str, op: Op, args: Vec<TensorType>) -> Region {
    let types: Vec<&TensorType> = args.iter().collect();
    let results = op.infer(TypeArgs { types: &types, bodies: &[] }).expect("a well-typed op");
    let mut r = Region::new(name, results[0].shape.clone());
    r.args = args;
    for (i, ty) in results.into_iter().enumerate() {
        let expr = r.push(Expr::Acc(i as u32), ty.dtype);
        let index = (0..ty.rank()).map(Dim::axis).collect();
        r.outputs.push(RegionOutput { ty, expr, index });
    }
    r.heart = Heart::Op(op);
    r
}

fn lstm(steps: usize, h: usize) -> Region {
    let f = |shape: &[usize]| TensorType::new(DType::F32, shape.iter().copied());
    let args = vec![f(&[steps, 1, h]), f(&[1, 4 * h, h]), f(&[1, 4 * h, h]), f(&[1, 8 * h]), f(&[1, 1, h]), f(&[1, 1, h]), f(&[1, 3 * h])];
    let args = args.into_iter().chain([TensorType::new(DType::I32, [1usize])]).collect();
    let activations = vec![Activation::Sigmoid, Activation::Tanh, Activation::Tanh];
    op("lstm", Op::Lstm { direction: Direction::Forward, activations, clip: Real::new(0.0), coupled: false }, args)
}

const TREES: usize = 50;
const DEPTH: u32 = 10;

fn forest(rows: usize) -> Region {
    let nodes = TREES * ((1 << (DEPTH + 1)) - 1);
    let leaves = TREES << DEPTH;
    let (ints, floats) = (|n| TensorType::new(DType::I64, [n]), |n| TensorType::new(DType::F32, [n]));
    let args = vec![
        TensorType::new(DType::F32, [rows, 64]),
        ints(nodes),
        ints(nodes),
        floats(nodes),
        ints(nodes),
        ints(nodes),
        ints(nodes),
        ints(TREES),
        ints(leaves),
        floats(leaves),
    ];
    op(&format!("trees {rows} rows"), Op::TreeEnsemble { targets: 1, aggregate: Aggregate::Sum }, args)
}

fn resize(mode: ResizeMode, shape: [usize; 4], axes: [usize; 2]) -> Region {
    let mut sizes = dims(&shape);
    let mut scales = vec![Real::new(1.0); 4];
    for k in axes {
        sizes[k] = Dim::from(shape[k] * 2);
        scales[k] = Real::new(2.0);
    }
    let (cubic_a, outside) = (Real::new(-0.75), Real::new(0.0));
    let nearest = NearestMode::RoundPreferFloor;
    let resize = Op::Resize { mode, coord: CoordMode::HalfPixel, nearest, sizes, scales, cubic_a, outside, antialias: false, exclude: false };
    op(&format!("resize {mode} {shape:?}"), resize, vec![TensorType::new(DType::F32, shape)])
}

fn regions() -> Vec<Region> {
    let topk = Op::TopK { axis: 1, k: Dim::from(5usize), largest: true };
    vec![
        map("copy 64MB", 16 << 20, &[]),
        map("relu 64MB", 16 << 20, &[ScalarFn::Abs]),
        map("copy 64KB", 16 << 10, &[]),
        map("exp 64KB", 16 << 10, &[ScalarFn::Exp]),
        map("tanh 64KB", 16 << 10, &[ScalarFn::Tanh]),
        map("erf 64KB", 16 << 10, &[ScalarFn::Erf]),
        map("sigmoid 64KB", 16 << 10, &[ScalarFn::Sigmoid]),
        transpose("transpose 2048x2048", &[2048, 2048], &[1, 0], DType::F32),
        transpose("transpose 128x128", &[128, 128], &[1, 0], DType::F32),
        transpose("nchw->nhwc 1x64x56x56", &[1, 64, 56, 56], &[0, 2, 3, 1], DType::F32),
        transpose("nchw->nhwc 1x3x224x224", &[1, 3, 224, 224], &[0, 2, 3, 1], DType::F32),
        transpose("nhwc->nchw 1x56x56x64", &[1, 56, 56, 64], &[0, 3, 1, 2], DType::F32),
        transpose("heads 128x12x32", &[128, 12, 32], &[1, 0, 2], DType::F32),
        transpose("f16 transpose 1024", &[1024, 1024], &[1, 0], DType::F16),
        softmax(1536, 128),
        softmax(64, 30000),
        layernorm(128, 384),
        layernorm(4096, 1024),
        sum("mean 49x1280 over 49", [1, 49, 1280], ReduceFn::Sum),
        sum("sum of rows 4096x1024", [4096, 1024, 1], ReduceFn::Sum),
        sum("sum of columns 4096x1024", [1, 4096, 1024], ReduceFn::Sum),
        pool(Layout::ChannelsLast),
        pool(Layout::ChannelsFirst),
        lstm(85, 128),
        forest(64),
        forest(1),
        resize(ResizeMode::Nearest, [1, 64, 40, 40], [2, 3]),
        resize(ResizeMode::Nearest, [1, 40, 40, 64], [1, 2]),
        resize(ResizeMode::Linear, [1, 64, 40, 40], [2, 3]),
        resize(ResizeMode::Linear, [1, 40, 40, 64], [1, 2]),
        op("topk 5 of 64x1000", topk, vec![TensorType::new(DType::F32, [64usize, 1000])]),
    ]
}

fn noise(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    *state >> 33
}

fn values(t: &TensorType, which: usize, tree: bool, state: &mut u64) -> Tensor {
    let shape: Vec<usize> = t.shape.iter().map(|d| d.as_const().expect("a known size") as usize).collect();
    let n: usize = shape.iter().product();
    let (per_tree, inner) = ((1i128 << (DEPTH + 1)) - 1, (1i128 << DEPTH) - 1);
    let scalar = |i: usize| {
        let (tree_at, node) = (i as i128 / per_tree, i as i128 % per_tree);
        let leaf = tree_at * (1 << DEPTH) + node - inner;
        let random = noise(state);
        Scalar::I(match which {
            1 => i128::from(random % 64),
            2 => i128::from(node >= inner) * 6,
            4 => {
                if node >= inner {
                    leaf
                } else {
                    tree_at * per_tree + 2 * node + 1
                }
            }
            5 => {
                if node >= inner {
                    leaf + 1
                } else {
                    tree_at * per_tree + 2 * node + 2
                }
            }
            7 => i as i128 * per_tree,
            _ => 0,
        })
    };
    if tree && t.dtype == DType::I64 {
        return Tensor::from_scalars(DType::I64, shape, (0..n).map(scalar));
    }
    let scalars: Vec<Scalar> = (0..n)
        .map(|_| {
            let v = noise(state);
            if t.dtype.is_float() { Scalar::F(v as f64 / (1u64 << 31) as f64 - 0.5) } else { Scalar::I(i128::from(v % 97)) }
        })
        .collect();
    Tensor::from_scalars(t.dtype, shape, scalars)
}

fn main() {
    let filter = std::env::args().nth(1).unwrap_or_default();
    let target = Target::parse(&std::env::args().nth(2).unwrap_or("native".into())).expect("a known target");
    let regions: Vec<Region> = regions().into_iter().filter(|r| r.name.contains(&filter)).collect();
    let mut state = 5;
    let mut data = vec![];
    for r in &regions {
        let tree = r.kind() == "tree_ensemble";
        data.push(r.args.iter().enumerate().map(|(i, t)| values(t, i, tree, &mut state)).collect::<Vec<_>>());
    }
    let build = |(i, r): (usize, &Region)| -> Built {
        let constants = data[i].iter().enumerate().map(|(k, t)| (k == 1 || k == 2).then(|| t.clone())).collect();
        kernels::build(r, &target, &format!("k{i}"), &ArgFacts { constants }, None).unwrap_or_else(|e| panic!("{e}"))
    };
    let built: Vec<Built> = regions.iter().enumerate().map(build).collect();
    let tiles: Vec<Kernel> = built.iter().map(|b| b.kernel.clone()).collect();
    let bytes = cpu_library(&tiles, &target, MiddleEnd::None, 2).unwrap_or_else(|e| panic!("{e}"));
    let path = std::env::temp_dir().join(format!("pavage-loops-{}.so", std::process::id()));
    std::fs::write(&path, bytes).expect("a writable temporary folder");
    // SAFETY: an object that we have just made; it has no initialisers.
    let library = unsafe { libloading::Library::new(&path) }.expect("the object loads");
    std::fs::remove_file(&path).expect("our own file");
    println!("{:28} {:>10} {:>8}  schedule", "region", "us", "GB/s");
    for (i, (r, built)) in regions.iter().zip(&built).enumerate() {
        let size = |d: &Dim| d.eval(&Binding::default()).expect("a known size");
        let shape = built.cpu.as_ref().expect("a CPU kernel");
        let mut bufs: Vec<Vec<u8>> = vec![];
        for (k, t) in data[i].iter().enumerate() {
            let packed = built.packs.iter().find(|(p, _)| *p == k).map(|(_, p)| p.apply(t));
            bufs.push(packed.as_ref().unwrap_or(t).bytes().to_vec());
        }
        for o in &r.outputs {
            bufs.push(vec![0; o.ty.dtype.bytes(o.ty.shape.iter().map(size).product::<i64>() as usize)]);
        }
        let moved: usize = if r.kind() == "tree_ensemble" { 0 } else { bufs.iter().map(Vec::len).sum() };
        let mut scratch = vec![0u128; size(&shape.scratch) as usize / 16 + 8];
        let mut table: Vec<*mut u8> = bufs.iter_mut().map(|b| b.as_mut_ptr()).collect();
        let base = scratch.as_mut_ptr().cast::<u8>();
        table.push(base.wrapping_add(base.align_offset(64)));
        // SAFETY: the symbol is a kernel entry of this signature; the kernel touches the buffers within their lengths.
        let entry: libloading::Symbol<Entry> = unsafe { library.get(format!("k{i}").as_bytes()) }.expect("the kernel is there");
        let extent = size(&shape.extent);
        let mut best = Duration::MAX;
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(300) {
            let t = Instant::now();
            // SAFETY: as above.
            unsafe { entry(table.as_ptr(), [].as_ptr(), 0, extent) };
            best = best.min(t.elapsed());
        }
        let us = best.as_secs_f64() * 1e6;
        println!("{:28} {us:10.2} {:8.2}  {} (predicted {:.1})", r.name, moved as f64 / us / 1e3, built.schedule, (extent * size(&shape.unit_ps)) as f64 / 1e6);
    }
}
