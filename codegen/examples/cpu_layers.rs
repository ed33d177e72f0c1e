//! Speed of CPU kernels on one core: the layers of EfficientNet-Lite0 and a few matrix products, in GFLOP/s and as a share
//! of the multiply-add rate measured in the same process.
//!
//! `cargo run --release -p pavage-codegen --example cpu_layers [filter] [target] [knob=value ...]`
use pavage_codegen::{
    compile::cpu_library,
    kernels::{self, ArgFacts, Built},
    llvm::MiddleEnd,
    targets::Target,
    tile::{Access, Builder, Device, Kernel},
};
use pavage_ir::{
    Binding, DType, Dim, Expr, Heart, Region, Scalar, ScalarFn, Schedule, Tensor, TensorType,
    attr::Layout,
    region::{RegionOutput, Window},
};
use std::time::{Duration, Instant};

type Entry = unsafe extern "C" fn(*const *mut u8, *const i64, i64, i64);

struct Layer {
    name: String,
    /// How often the network has it.
    count: usize,
    flops: f64,
    region: Region,
}

fn load(r: &mut Region, arg: usize, index: Vec<Dim>) -> pavage_ir::ExprId {
    let dtype = r.args[arg].dtype;
    r.push(Expr::Load { arg: arg as u32, index, guard: None }, dtype)
}

/// Bias and clip on the accumulator, one output over the whole space.
fn finish(r: &mut Region) {
    let p = r.space.len();
    let bias = r.args.len();
    r.args.push(TensorType { dtype: DType::F32, shape: vec![r.space[p - 1].clone()] });
    let bias = load(r, bias, vec![Dim::axis(p - 1)]);
    let acc = r.push(Expr::Acc(0), DType::F32);
    let mut value = r.push(Expr::Call(ScalarFn::Add, vec![acc, bias]), DType::F32);
    for (f, limit) in [(ScalarFn::Max, 0.0), (ScalarFn::Min, 6.0)] {
        let limit = r.constant(Scalar::F(limit), DType::F32);
        value = r.push(Expr::Call(f, vec![value, limit]), DType::F32);
    }
    let ty = TensorType { dtype: DType::F32, shape: r.space.clone() };
    r.outputs.push(RegionOutput { ty, expr: value, index: (0..p).map(Dim::axis).collect() });
}

fn conv(size: usize, c: usize, o: usize, kernel: usize, stride: usize, groups: usize, count: usize) -> Layer {
    let pad = kernel / 2;
    let out = (size + 2 * pad - kernel) / stride + 1;
    // The padding of a stride of 2 stands at the end, as the model has it.
    let lo = if stride == 2 { (kernel as i64 - 2) / 2 } else { pad as i64 };
    let hi = ((out - 1) * stride + kernel) as i64 - size as i64 - lo;
    let dims = |v: &[usize]| v.iter().map(|d| Dim::from(*d)).collect::<Vec<_>>();
    let (input, space, weights) = (dims(&[1, size, size, c]), dims(&[1, out, out, o]), dims(&[o, c / groups, kernel, kernel]));
    let mut r = Region::new("conv", space);
    r.args = vec![TensorType { dtype: DType::F32, shape: input.clone() }, TensorType { dtype: DType::F32, shape: weights.clone() }];
    let x = load(&mut r, 0, (0..4).map(Dim::axis).collect());
    let w = load(&mut r, 1, (0..4).map(Dim::axis).collect());
    let window = Window { strides: vec![stride; 2], dilations: vec![1; 2], lo: vec![lo; 2], hi: vec![hi.max(0); 2], layout: Layout::ChannelsLast };
    r.heart = Heart::Conv { window, groups, x, input, w, weights, acc: DType::F32 };
    finish(&mut r);
    let kind = if groups > 1 { "dw" } else { "conv" };
    Layer {
        name: format!("{kind} {kernel}x{kernel}s{stride} {c}->{o} @{size}"),
        count,
        flops: 2.0 * (out * out * o * c / groups * kernel * kernel) as f64,
        region: r,
    }
}

/// The same of an image whose channels are planes.
fn planes(size: usize, c: usize, o: usize, kernel: usize, stride: usize, count: usize) -> Layer {
    let Layer { name, flops, mut region, .. } = conv(size, c, o, kernel, stride, 1, count);
    region.args[0] = TensorType::new(DType::F32, [1, c, size, size]);
    region.exprs[0].0 = Expr::Load { arg: 0, index: [0, 3, 1, 2].map(Dim::axis).to_vec(), guard: None };
    Layer { name: name.replace("conv", "planes"), count, flops, region }
}

fn product(m: usize, n: usize, k: usize, count: usize) -> Layer {
    let mut r = Region::new("product", vec![Dim::from(m), Dim::from(n)]);
    r.args = vec![TensorType::new(DType::F32, [m, k]), TensorType::new(DType::F32, [k, n])];
    let lhs = load(&mut r, 0, vec![Dim::axis(0), Dim::axis(2)]);
    let rhs = load(&mut r, 1, vec![Dim::axis(2), Dim::axis(1)]);
    r.heart = Heart::Contract { k: Dim::from(k), lhs, rhs, acc: DType::F32 };
    finish(&mut r);
    Layer { name: format!("gemm {m}x{n}x{k}"), count, flops: 2.0 * (m * n * k) as f64, region: r }
}

fn layers() -> Vec<Layer> {
    let mut all = vec![conv(224, 3, 32, 3, 2, 1, 1), conv(112, 32, 32, 3, 1, 32, 1), conv(112, 32, 16, 1, 1, 1, 1)];
    // Blocks of the network: size, input, expanded, output channels, kernel, stride, how often.
    for (size, c, e, o, kernel, stride, count) in [
        (112, 16, 96, 24, 3, 2, 1),
        (56, 24, 144, 24, 3, 1, 1),
        (56, 24, 144, 40, 5, 2, 1),
        (28, 40, 240, 40, 5, 1, 1),
        (28, 40, 240, 80, 3, 2, 1),
        (14, 80, 480, 80, 3, 1, 2),
        (14, 80, 480, 112, 5, 1, 1),
        (14, 112, 672, 112, 5, 1, 2),
        (14, 112, 672, 192, 5, 2, 1),
        (7, 192, 1152, 192, 5, 1, 3),
        (7, 192, 1152, 320, 3, 1, 1),
    ] {
        all.push(conv(size, c, e, 1, 1, 1, count));
        all.push(conv(size, e, e, kernel, stride, e, count));
        all.push(conv(size / stride, e, o, 1, 1, 1, count));
    }
    all.push(conv(7, 320, 1280, 1, 1, 1, 1));
    all.push(product(1, 1000, 1280, 1));
    all.extend([(512, 512, 512), (1024, 1024, 1024), (128, 3072, 768), (128, 768, 3072), (197, 768, 768), (8, 1152, 576)].map(|(m, n, k)| product(m, n, k, 0)));
    all.extend(
        [(224, 3, 32, 3, 2), (224, 1, 32, 3, 1), (112, 16, 32, 3, 1), (56, 64, 64, 3, 1), (56, 64, 64, 1, 1), (14, 256, 256, 1, 1)]
            .map(|(size, c, o, k, s)| planes(size, c, o, k, s, 0)),
    );
    all.extend([(112, 16, 32, 3), (56, 64, 64, 1), (14, 256, 256, 1)].map(|(size, c, o, k)| conv(size, c, o, k, 1, 1, 0)));
    all.extend([(56, 64), (28, 128), (14, 256), (7, 512)].map(|(size, c)| conv(size, c, c, 3, 1, 1, 0)));
    all
}

/// Sixteen chains of multiply-adds in registers.
fn peak_kernel(lanes: u16) -> (Kernel, f64) {
    let mut b = Builder::new("peak", Device::Cpu { lanes });
    let out = b.arg(DType::F32, Access::ReadWrite);
    let (lo, hi) = (b.lo(), b.hi());
    let chains = if lanes == 16 { 24 } else { 12 };
    let zero = b.index(0);
    let init: Vec<_> = (0..chains).map(|_| b.load(out, zero, lanes.into())).collect();
    let x = b.load(out, zero, lanes.into());
    let sums = b.for_(lo, hi, 1, &init, |b, _, acc| acc.iter().map(|a| b.fma(x, x, *a)).collect());
    let mut total = sums[0];
    for s in &sums[1..] {
        total = b.add(total, *s);
    }
    b.store(out, zero, total);
    (b.finish(), 2.0 * f64::from(chains) * f64::from(lanes))
}

/// Median and least seconds of a call.
fn time(mut run: impl FnMut()) -> (f64, f64) {
    run();
    let mut times = vec![];
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(200) || times.len() < 9 {
        let t = Instant::now();
        run();
        times.push(t.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[0])
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (knobs, names): (Vec<String>, Vec<String>) = words.into_iter().partition(|a| a.contains('='));
    let filter = names.first().cloned().unwrap_or_default();
    let target = Target::parse(names.get(1).map_or("native", String::as_str))?;
    let Target::Cpu(cpu) = &target else { return Err("not a CPU".into()) };
    let mut built: Vec<(Layer, Built, Vec<Tensor>)> = vec![];
    for (i, layer) in layers().into_iter().enumerate().filter(|(_, l)| l.name.contains(&filter)) {
        let args: Vec<Tensor> = layer
            .region
            .args
            .iter()
            .map(|t| {
                let shape = t.const_shape().ok_or("a symbolic size")?;
                let n: usize = shape.iter().product();
                Ok(Tensor::from_f32(shape, &(0..n).map(|i| ((i * 7919) % 1000) as f32 / 1000.0 - 0.5).collect::<Vec<_>>()))
            })
            .collect::<Result<_, &str>>()?;
        let facts = ArgFacts { constants: args.iter().enumerate().map(|(i, t)| (i > 0).then(|| t.clone())).collect() };
        let mut schedule: Option<Schedule> = None;
        if !knobs.is_empty() {
            let first = kernels::build(&layer.region, &target, "first", &facts, None)?.schedule;
            schedule = Some(format!("{first} {}", knobs.join(" ")).parse()?);
        }
        let kernel = kernels::build(&layer.region, &target, &format!("layer{i}"), &facts, schedule.as_ref())?;
        let mut args = args;
        for (at, pack) in &kernel.packs {
            args[*at] = pack.apply(&args[*at]);
        }
        built.push((layer, kernel, args));
    }
    let (peak, peak_flops) = peak_kernel(cpu.lanes);
    let mut kernels: Vec<Kernel> = built.iter().map(|(_, b, _)| b.kernel.clone()).collect();
    kernels.push(peak);
    let start = Instant::now();
    let object = cpu_library(&kernels, &target, MiddleEnd::None, 2)?;
    println!("{} kernels, {} KB, compiled in {:.1} s", kernels.len(), object.len() >> 10, start.elapsed().as_secs_f64());
    let path = std::env::temp_dir().join(format!("pavage-layers-{}.so", std::process::id()));
    std::fs::write(&path, object)?;
    // SAFETY: an object that we have just made; it has no initialisers.
    let library = unsafe { libloading::Library::new(&path)? };
    if std::env::var_os("KEEP").is_none() {
        std::fs::remove_file(&path)?;
    } else {
        println!("{}", path.display());
    }
    let entry = |name: &str| -> Result<Entry, libloading::Error> {
        // SAFETY: every symbol of the object is a kernel entry of this signature.
        unsafe { library.get::<Entry>(name.as_bytes()).map(|s| *s) }
    };
    let run = entry("peak")?;
    let mut buffer = vec![1e-3f32; 64];
    let table = [buffer.as_mut_ptr().cast::<u8>()];
    // SAFETY: the kernel touches the first vector of the buffer.
    let (_, least) = time(|| unsafe { run(table.as_ptr(), std::ptr::null(), 0, 200_000) });
    let peak = peak_flops * 200_000.0 / least / 1e9;
    println!("peak {peak:.1} GFLOP/s");
    let (mut sum, mut sum_least) = (0.0, 0.0);
    for (layer, kernel, args) in &built {
        let run = entry(&kernel.kernel.name)?;
        let shape = kernel.cpu.as_ref().ok_or("no CPU shape")?;
        let none = Binding::default();
        let size = |d: &Dim| d.eval(&none).ok_or_else(|| format!("{d} has no value"));
        let outputs: usize = layer.region.outputs.iter().map(|o| o.ty.const_shape().map_or(0, |s| s.iter().product::<usize>())).sum();
        let mut bufs: Vec<Vec<u8>> = args.iter().map(|t| t.bytes().to_vec()).collect();
        bufs.push(vec![0; 4 * outputs]);
        bufs.push(vec![0; size(&shape.scratch)? as usize + 64]);
        let mut table: Vec<*mut u8> = bufs.iter_mut().map(|b| b.as_mut_ptr()).collect();
        if let Some(last) = table.last_mut() {
            *last = last.wrapping_add(last.align_offset(64));
        }
        let extent = size(&shape.extent)?;
        // SAFETY: the table has the buffers that the kernel was built for, and no dims are symbolic.
        let (median, least) = time(|| unsafe { run(table.as_ptr(), std::ptr::null(), 0, extent) });
        sum += median * layer.count as f64;
        sum_least += least * layer.count as f64;
        let rate = layer.flops / least / 1e9;
        println!(
            "{:28} x{} median {:8.1} us  least {:8.1} us  {rate:6.1} GFLOP/s {:4.0}%  {}",
            layer.name,
            layer.count,
            median * 1e6,
            least * 1e6,
            100.0 * rate / peak,
            kernel.schedule
        );
    }
    // The layers one after another, each with weights of its own that come from memory, each reading what the last one wrote.
    let elements = |t: &TensorType| t.const_shape().map_or(0, |s| s.iter().product::<usize>());
    let most = built.iter().map(|(l, _, _)| elements(&l.region.args[0]).max(elements(&l.region.outputs[0].ty))).max().unwrap_or(0);
    let mut images = [vec![0.5f32; most], vec![0.5f32; most]];
    let images = images.each_mut().map(|v| v.as_mut_ptr().cast::<u8>());
    let mut calls = vec![];
    for (layer, kernel, args) in &built {
        let shape = kernel.cpu.as_ref().ok_or("no CPU shape")?;
        let scratch = shape.scratch.as_const().unwrap_or(0) as usize + 64;
        for _ in 0..layer.count {
            let mut bufs: Vec<Vec<u8>> = args.iter().skip(1).map(|t| t.bytes().to_vec()).collect();
            bufs.push(vec![0; scratch]);
            calls.push((entry(&kernel.kernel.name)?, bufs, shape.extent.as_const().unwrap_or(0)));
        }
    }
    let tables: Vec<Vec<*mut u8>> = calls
        .iter_mut()
        .enumerate()
        .map(|(i, (_, bufs, _))| {
            let scratch = bufs.last_mut().map(|b| b.as_mut_ptr());
            let constants = bufs.len() - 1;
            let mut table: Vec<*mut u8> = vec![images[i % 2]];
            table.extend(bufs[..constants].iter_mut().map(|b| b.as_mut_ptr()));
            table.push(images[(i + 1) % 2]);
            table.extend(scratch.map(|s| s.wrapping_add(s.align_offset(64))));
            table
        })
        .collect();
    let (median, least) = time(|| {
        for ((run, _, extent), table) in calls.iter().zip(&tables) {
            // SAFETY: as above.
            unsafe { run(table.as_ptr(), std::ptr::null(), 0, *extent) }
        }
    });
    println!("in a row: median {:.2} ms, least {:.2} ms", median * 1e3, least * 1e3);
    println!("network: median {:.2} ms, least {:.2} ms", sum * 1e3, sum_least * 1e3);
    Ok(())
}
