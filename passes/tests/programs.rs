//! Programs mean what their graphs mean: regions are formed right, fused or not.
use pavage_ir::{Graph, Scalar, Tensor, eval, program_eval::eval_program, text};
use pavage_passes::{
    self as passes, Ctx, build,
    eqsat::{self, cost, extract::Search},
};

fn random(graph: &Graph, seed: u64, sizes: &dyn Fn(&str) -> i64) -> Vec<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let env = |a: &pavage_ir::dim::Atom| match a {
        pavage_ir::dim::Atom::Sym(s) => Some(sizes(&s.name)),
        _ => None,
    };
    graph
        .inputs()
        .iter()
        .map(|id| {
            let ty = graph.ty((*id).into());
            let shape: Vec<usize> = ty.shape.iter().map(|d| d.eval(&env).unwrap() as usize).collect();
            let n = shape.iter().product();
            let value = |x: f64| if ty.dtype.is_float() { Scalar::F(x * 4.0 - 2.0) } else { Scalar::I((x * 4.0) as i128) };
            Tensor::from_scalars(ty.dtype, shape, (0..n).map(|_| value(next())))
        })
        .collect()
}

fn close(a: &Tensor, b: &Tensor) -> bool {
    a.shape() == b.shape()
        && a.dtype() == b.dtype()
        && a.to_f64().iter().zip(b.to_f64()).all(|(x, y)| (x - y).abs() <= tolerance(a) * (1.0 + y.abs()) || (x.is_nan() && y.is_nan()))
}

/// The dtype's own rounding, a few times over.
fn tolerance(t: &Tensor) -> f64 {
    if t.dtype().bits() == 16 { 4e-3 } else { 1e-4 }
}

/// Kernels of the fused and unfused program, after checking both against the evaluator.
fn check(source: &str) -> (Vec<String>, Vec<String>) {
    check_for(source, cost::CPU)
}

fn check_for(source: &str, costs: cost::Costs) -> (Vec<String>, Vec<String>) {
    let mut graph = text::parse(source, &|_| None).unwrap();
    let inputs = random(&graph, 7, &|_| 3);
    let want = eval::eval(&graph, &inputs).unwrap();
    let ctx = Ctx { costs: costs.clone(), ..Ctx::default() };
    passes::run(&mut graph, &ctx, passes::PIPELINE).unwrap();
    let names = |p: &pavage_ir::program::Program| p.body.regions().iter().map(|(r, _)| r.name.clone()).collect::<Vec<_>>();
    let mut kernels = vec![];
    let search = |g: &Graph| eqsat::optimise(g, &ctx);
    let greedy = |g: &Graph| build::greedy(g, &ctx.costs);
    let (narrow, dice) = (Ctx { costs: costs.clone(), search: Search::Beam(2), ..Ctx::default() }, Ctx { costs, search: Search::Random(3), ..Ctx::default() });
    let (beam, random) = (|g: &Graph| eqsat::optimise(g, &narrow), |g: &Graph| eqsat::optimise(g, &dice));
    let planners: [(&str, build::Planner); 5] = [("unfused", &build::unfused), ("greedy", &greedy), ("beam", &beam), ("random", &random), ("fused", &search)];
    for (name, planner) in planners {
        let program = build::program(name, &graph, planner, &ctx).unwrap();
        let got = eval_program(&program, &graph, &inputs).unwrap_or_else(|e| panic!("{e}\n{program}"));
        for (g, w) in got.iter().zip(&want) {
            assert!(close(g, w), "{name}: got {g:?}\nwant {w:?}\n{program}");
        }
        kernels.push(names(&program));
    }
    assert!(ctx.notes.borrow().is_empty(), "{:?}", ctx.notes);
    let fused = kernels.pop().unwrap();
    (fused, kernels.swap_remove(0))
}

#[test]
fn convolutions_take_their_epilogue() {
    let (fused, unfused) = check(
        "graph @net(%x: f32[n,3,6,5], %w: f32[4,3,3,3], %b: f32[1,4,1,1], %r: f32[n,4,6,5]) where n in 1.. {
  %0 = conv[strides=[1,1],dilations=[1,1],lo=[1,1],hi=[1,1],groups=1,layout=nchw] %x, %w : f32[n,4,6,5]
  %1 = broadcast[shape=[n,4,6,5]] %b : f32[n,4,6,5]
  %2 = add %0, %1 : f32[n,4,6,5]
  %3 = add %2, %r : f32[n,4,6,5]
  %4 = sigmoid %3 : f32[n,4,6,5]
  return %4 as \"y\"
}",
    );
    assert!(fused.len() < unfused.len(), "{fused:?} {unfused:?}");
    assert!(fused.iter().any(|k| k == "conv_add_add_sigmoid"), "{fused:?}");
}

#[test]
fn softmax_is_one_kernel() {
    let (fused, unfused) = check(
        "graph @softmax(%x: f32[n,7]) where n in 1.. {
  %0 = reduce[f=max,axes=[1]] %x : f32[n,1]
  %1 = broadcast[shape=[n,7]] %0 : f32[n,7]
  %2 = sub %x, %1 : f32[n,7]
  %3 = exp %2 : f32[n,7]
  %4 = reduce[f=sum,axes=[1]] %3 : f32[n,1]
  %5 = broadcast[shape=[n,7]] %4 : f32[n,7]
  %6 = div %3, %5 : f32[n,7]
  return %6 as \"y\"
}",
    );
    assert_eq!((fused.len(), unfused.len()), (1, 5));
}

#[test]
fn layer_norm_of_a_sum_is_one_kernel() {
    let (fused, _) = check(
        "graph @norm(%a: f32[2,n,8], %b: f32[2,n,8], %g: f32[1,1,8]) where n in 1.. {
  %0 = add %a, %b : f32[2,n,8]
  %c = const f32[1,1,1] {0.125}
  %s = reduce[f=sum,axes=[2]] %0 : f32[2,n,1]
  %cb = broadcast[shape=[2,n,1]] %c : f32[2,n,1]
  %m = mul %s, %cb : f32[2,n,1]
  %mb = broadcast[shape=[2,n,8]] %m : f32[2,n,8]
  %d = sub %0, %mb : f32[2,n,8]
  %q = mul %d, %d : f32[2,n,8]
  %v = reduce[f=sum,axes=[2]] %q : f32[2,n,1]
  %r = rsqrt %v : f32[2,n,1]
  %rb = broadcast[shape=[2,n,8]] %r : f32[2,n,8]
  %y = mul %d, %rb : f32[2,n,8]
  %gb = broadcast[shape=[2,n,8]] %g : f32[2,n,8]
  %z = mul %y, %gb : f32[2,n,8]
  return %z as \"z\", %0 as \"sum\"
}",
    );
    assert_eq!(fused.len(), 1, "{fused:?}");
}

#[test]
fn heads_are_split_by_index_maps() {
    let (fused, _) = check(
        "graph @heads(%x: f32[n,4,6], %w: f32[6,6], %k: f32[n,2,3,4]) where n in 1.. {
  %f = reshape[shape=[4*n,6]] %x : f32[4*n,6]
  %0 = matmul[out=f32] %f, %w : f32[4*n,6]
  %1 = reshape[shape=[n,4,2,3]] %0 : f32[n,4,2,3]
  %2 = transpose[perm=[0,2,1,3]] %1 : f32[n,2,4,3]
  %3 = matmul[out=f32] %2, %k : f32[n,2,4,4]
  %4 = exp %3 : f32[n,2,4,4]
  return %4 as \"y\"
}",
    );
    assert!(fused.len() <= 3, "{fused:?}");
}

#[test]
fn views_and_lookups_are_read_through() {
    check(
        "graph @views(%x: f32[5,4], %i: i64[n,2], %v: f32[]) where n in 1.. {
  %0 = gather[axis=0] %x, %i : f32[n,2,4]
  %1 = transpose[perm=[2,0,1]] %0 : f32[4,n,2]
  %2 = pad[lo=[0,1,0],hi=[1,0,2],mode=constant] %1, %v : f32[5,n+1,4]
  %3 = slice[starts=[4,0,1],sizes=[3,n+1,2],steps=[-2,1,1]] %2 : f32[3,n+1,2]
  %4 = exp %3 : f32[3,n+1,2]
  %5 = concat[axis=1] %3, %4 : f32[3,2*n+2,2]
  %6 = reshape[shape=[6,2*n+2]] %5 : f32[6,2*n+2]
  %7 = pad[lo=[2,0],hi=[1,0],mode=reflect] %6, %v : f32[9,2*n+2]
  return %7 as \"y\"
}",
    );
}

#[test]
fn squeeze_excite_keeps_its_scale_apart() {
    check(
        "graph @se(%x: f32[1,3,4,4], %w: f32[6,3,1,1], %s: f32[6,6,1,1]) {
  %0 = conv[strides=[1,1],dilations=[1,1],lo=[0,0],hi=[0,0],groups=1,layout=nchw] %x, %w : f32[1,6,4,4]
  %1 = reduce[f=sum,axes=[2,3]] %0 : f32[1,6,1,1]
  %2 = conv[strides=[1,1],dilations=[1,1],lo=[0,0],hi=[0,0],groups=1,layout=nchw] %1, %s : f32[1,6,1,1]
  %3 = sigmoid %2 : f32[1,6,1,1]
  %4 = broadcast[shape=[1,6,4,4]] %3 : f32[1,6,4,4]
  %5 = mul %0, %4 : f32[1,6,4,4]
  return %5 as \"y\"
}",
    );
}

/// Scores scaled and masked, softmax, weighted sum: one kernel where attention is fast.
#[test]
fn attention_is_found_in_its_parts() {
    let source = "graph @attention(%q: f16[n,5,64], %kt: f16[n,64,7], %v: f16[n,7,64], %m: f16[1,5,7]) where n in 1.. {
  %s = matmul[out=f16] %q, %kt : f16[n,5,7]
  %c = const f16[1,1,1] {0.125}
  %cb = broadcast[shape=[n,5,7]] %c : f16[n,5,7]
  %t = mul %s, %cb : f16[n,5,7]
  %mb = broadcast[shape=[n,5,7]] %m : f16[n,5,7]
  %u = add %t, %mb : f16[n,5,7]
  %0 = reduce[f=max,axes=[2]] %u : f16[n,5,1]
  %1 = broadcast[shape=[n,5,7]] %0 : f16[n,5,7]
  %2 = sub %u, %1 : f16[n,5,7]
  %3 = exp %2 : f16[n,5,7]
  %4 = reduce[f=sum,axes=[2]] %3 : f16[n,5,1]
  %5 = broadcast[shape=[n,5,7]] %4 : f16[n,5,7]
  %6 = div %3, %5 : f16[n,5,7]
  %7 = matmul[out=f16] %6, %v : f16[n,5,64]
  return %7 as \"y\"
}";
    let (fused, _) = check_for(source, cost::GPU);
    assert_eq!(fused, ["attention"]);
}

/// Operands that are scaled themselves, and a softmax in f32 of 16-bit products.
#[test]
fn attention_is_found_behind_conversions() {
    let source = "graph @attention(%q: f16[n,5,64], %kt: f16[n,64,7], %v: f16[n,7,64], %m: f16[n,5,7]) where n in 1.. {
  %c = const f16[1,1,1] {0.5}
  %cq = broadcast[shape=[n,5,64]] %c : f16[n,5,64]
  %qs = mul %q, %cq : f16[n,5,64]
  %ck = broadcast[shape=[n,64,7]] %c : f16[n,64,7]
  %ks = mul %kt, %ck : f16[n,64,7]
  %s = matmul[out=f32] %qs, %ks : f32[n,5,7]
  %mf = cast[to=f32] %m : f32[n,5,7]
  %u = add %s, %mf : f32[n,5,7]
  %0 = reduce[f=max,axes=[2]] %u : f32[n,5,1]
  %1 = broadcast[shape=[n,5,7]] %0 : f32[n,5,7]
  %2 = sub %u, %1 : f32[n,5,7]
  %3 = exp %2 : f32[n,5,7]
  %4 = reduce[f=sum,axes=[2]] %3 : f32[n,5,1]
  %5 = broadcast[shape=[n,5,7]] %4 : f32[n,5,7]
  %6 = div %3, %5 : f32[n,5,7]
  %p = cast[to=f16] %6 : f16[n,5,7]
  %7 = matmul[out=f16] %p, %v : f16[n,5,64]
  return %7 as \"y\"
}";
    let (fused, _) = check_for(source, cost::GPU);
    assert_eq!(fused, ["attention"]);
}

/// The fused kernels of a case in `tests/cases/optimize`, for a CPU and for a GPU.
fn planted(case: &str) -> [Vec<String>; 2] {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/optimize").join(case).with_extension("ir");
    let source = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    [cost::CPU, cost::GPU].map(|costs| check_for(&source, costs).0)
}

#[test]
fn long_sums_for_few_results_are_split_on_a_wide_device() {
    for case in ["split_k", "split_k_2", "split_k_3"] {
        let [cpu, gpu] = planted(case);
        assert_eq!(cpu.len(), 1, "{case}: {cpu:?}");
        assert!(gpu.len() == 2 && gpu[0].starts_with("matmul") && gpu[1].starts_with("reduce"), "{case}: {gpu:?}");
    }
}

#[test]
fn sums_are_not_split_where_that_gains_nothing() {
    // Too short for a second kernel to pay, too short for parts, and enough tiles to keep the device busy.
    for (m, k, n) in [(8, 512, 64), (8, 256, 64), (2, 1024, 8960)] {
        let source = format!("graph @product(%x: f16[{m},{k}], %w: f16[{k},{n}]) {{\n  %0 = matmul[out=f16] %x, %w : f16[{m},{n}]\n  return %0 as \"y\"\n}}");
        let (fused, _) = check_for(&source, cost::GPU);
        assert_eq!(fused, ["matmul"], "{m} {k} {n}");
    }
}

/// The fused kernels of a graph for a wide device.
fn on_a_wide_device(source: &str) -> Vec<String> {
    let mut graph = text::parse(source, &|_| None).unwrap();
    let ctx = Ctx { costs: cost::GPU, ..Ctx::default() };
    passes::run(&mut graph, &ctx, passes::PIPELINE).unwrap();
    let program = build::program("fused", &graph, &|g: &Graph| eqsat::optimise(g, &ctx), &ctx).unwrap();
    program.body.regions().iter().map(|(r, _)| r.name.clone()).collect()
}

#[test]
fn convolutions_of_few_pixels_are_sums_in_parts_on_a_wide_device() {
    for case in ["im2col", "im2col_2", "im2col_3"] {
        let [cpu, gpu] = planted(case);
        assert!(!cpu.iter().any(|k| k.contains("matmul")), "{case}: {cpu:?}");
        assert!(
            !gpu.iter().any(|k| k.contains("conv")) && gpu.iter().any(|k| k == "patches_matmul") && gpu.iter().any(|k| k.starts_with("reduce")),
            "{case}: {gpu:?}"
        );
    }
    let [cpu, gpu] = planted("im2col_kept");
    assert!([&cpu, &gpu].iter().all(|k| k.iter().any(|k| k.starts_with("conv")) && !k.iter().any(|k| k.contains("matmul"))), "{cpu:?} {gpu:?}");
}

#[test]
fn convolutions_are_plain_products_where_whole_tiles_pay() {
    // Windows of one pixel: of many pixels, a matrix that is copied in whole tiles; of few, the kernel of convolutions begins sooner.
    for (pixels, channels, filters, product) in [(100_352, 64, 256, true), (6272, 1024, 256, true), (784, 128, 512, false), (196, 256, 1024, false)] {
        let source = format!(
            "graph @point(%x: f16[1,{pixels},1,{channels}], %w: f16[{filters},{channels},1,1]) {{
  %0 = conv[strides=[1,1],dilations=[1,1],lo=[0,0],hi=[0,0],groups=1,layout=nhwc] %x, %w : f16[1,{pixels},1,{filters}]
  %1 = tanh %0 : f16[1,{pixels},1,{filters}]
  return %1 as \"y\"
}}"
        );
        assert_eq!(on_a_wide_device(&source), [if product { "matmul_tanh" } else { "conv_tanh" }], "{pixels} {channels} {filters}");
    }
    // An image of three channels is no matter of copies until a kernel has laid out what windows see.
    for (size, laid_out) in [(224, true), (16, false)] {
        let half = size / 2;
        let source = format!(
            "graph @stem(%x: f16[1,{size},{size},3], %w: f16[64,3,7,7]) {{
  %0 = conv[strides=[2,2],dilations=[1,1],lo=[3,3],hi=[3,3],groups=1,layout=nhwc] %x, %w : f16[1,{half},{half},64]
  return %0 as \"y\"
}}"
        );
        let kernels = on_a_wide_device(&source);
        assert_eq!(kernels.iter().any(|k| k == "patches") && kernels.iter().any(|k| k == "matmul"), laid_out, "{size}: {kernels:?}");
    }
}

#[test]
fn minimal_filtering_pays_on_a_wide_device_where_there_is_enough_of_it() {
    let source = |dtype: &str, images: usize, size: usize, channels: usize| {
        let image = format!("{dtype}[{images},{size},{size},{channels}]");
        let weights = vec!["0.5, -0.25, 0.75"; 3 * channels * channels].join(", ");
        format!(
            "graph @windows(%x: {image}) {{
  %w = const {dtype}[{channels},{channels},3,3] {{{weights}}}
  %0 = conv[strides=[1,1],dilations=[1,1],lo=[1,1],hi=[1,1],groups=1,layout=nhwc] %x, %w : {image}
  return %0 as \"y\"
}}"
        )
    };
    for (dtype, images, size, channels, wanted) in
        [("f32", 1, 28, 128, true), ("f32", 32, 56, 64, true), ("f16", 32, 7, 256, true), ("f16", 1, 28, 128, false), ("f16", 32, 56, 64, false)]
    {
        let kernels = on_a_wide_device(&source(dtype, images, size, channels));
        assert_eq!(kernels.iter().any(|k| k.starts_with("winograd")), wanted, "{dtype} {images} {size} {channels}: {kernels:?}");
    }
}

#[test]
fn attention_reads_shared_keys_where_they_lie_on_a_wide_device() {
    for case in ["grouped_attention", "grouped_attention_2", "grouped_attention_3"] {
        let [cpu, gpu] = planted(case);
        assert_eq!(gpu, ["attention"], "{case}");
        assert!(!cpu.iter().any(|k| k.contains("broadcast")), "{case}: {cpu:?}");
    }
}

#[test]
fn attention_of_few_queries_is_split_over_the_keys_on_a_wide_device() {
    for case in ["decode", "decode_2", "decode_3"] {
        let [cpu, gpu] = planted(case);
        assert!(!cpu.iter().any(|k| k.contains("attention_parts")), "{case}: {cpu:?}");
        assert_eq!(gpu.iter().filter(|k| k.contains("attention_parts")).count(), 1, "{case}: {gpu:?}");
        assert!(gpu.len() == 2, "{case}: {gpu:?}");
    }
}

/// Attention of so many queries over so many keys.
fn attention_of(heads: &str, queries: &str, keys: &str, depth: i64) -> String {
    let (of_q, of_k, scores) = (format!("f16[{heads},{queries},{depth}]"), format!("f16[{heads},{keys},{depth}]"), format!("[{heads},{queries},{keys}]"));
    let symbols = if keys.starts_with('n') { " where n in 1.." } else { "" };
    format!(
        "graph @attention(%q: {of_q}, %k: {of_k}, %v: {of_k}){symbols} {{
  %kt = transpose[perm=[0,2,1]] %k : f16[{heads},{depth},{keys}]
  %s = matmul[out=f16] %q, %kt : f16{scores}
  %top = reduce[f=max,axes=[2]] %s : f16[{heads},{queries},1]
  %tb = broadcast[shape={scores}] %top : f16{scores}
  %below = sub %s, %tb : f16{scores}
  %e = exp %below : f16{scores}
  %sum = reduce[f=sum,axes=[2]] %e : f16[{heads},{queries},1]
  %sb = broadcast[shape={scores}] %sum : f16{scores}
  %p = div %e, %sb : f16{scores}
  %y = matmul[out=f16] %p, %v : {of_q}
  return %y as \"y\"
}}"
    )
}

#[test]
fn attention_is_not_split_where_that_gains_nothing() {
    // Many queries, few keys, heads enough to keep the device busy, and sizes that are not known to be large.
    for (heads, queries, keys, depth) in [("1", "512", "4096", 64), ("4", "1", "192", 64), ("512", "1", "1024", 64), ("4", "1", "n + 1", 64)] {
        let kernels = planned(&attention_of(heads, queries, keys, depth), cost::GPU);
        assert!(!kernels.iter().any(|k| k.contains("attention_parts")), "{heads} {queries} {keys}: {kernels:?}");
    }
    let kernels = planned(&attention_of("4", "1", "4096", 64), cost::GPU);
    assert_eq!(kernels.len(), 2, "{kernels:?}");
    let kernels = planned(&attention_of("4", "1", "4096", 64), cost::CPU);
    assert!(!kernels.iter().any(|k| k.contains("attention_parts")), "{kernels:?}");
}

#[test]
fn attention_over_an_open_number_of_keys_is_split_where_many_are_expected() {
    let source = attention_of("4", "1", "n + 1", 64);
    let expecting = |n: i64| {
        let expected = std::collections::BTreeMap::from([("n".to_string(), n)]);
        planned(&source, cost::Costs { expected: Some(std::sync::Arc::new(expected)), ..cost::GPU })
    };
    assert!(!expecting(63).iter().any(|k| k.contains("attention_parts")));
    assert!(expecting(4095).iter().any(|k| k.contains("attention_parts")));
}

#[test]
fn the_most_probable_need_no_softmax() {
    for case in ["softmax_topk", "softmax_topk_2", "softmax_topk_3"] {
        let [cpu, _] = planted(case);
        assert_eq!(cpu, ["topk", "sub_exp_reduce", "sub_exp_div"], "{case}");
    }
    let [cpu, gpu] = planted("softmax_topk_few");
    assert_eq!((cpu.len(), gpu.len()), (2, 2), "{cpu:?} {gpu:?}");
}

#[test]
fn attention_is_found_however_it_is_spelled_and_masked() {
    for case in ["attention_causal", "attention_causal_2", "attention_causal_3", "attention_padding", "attention_padding_2", "attention_padding_3"] {
        let [_, gpu] = planted(case);
        assert_eq!(gpu.iter().filter(|k| k.contains("attention")).count(), 1, "{case}: {gpu:?}");
        assert!(!gpu.iter().any(|k| k.contains("matmul") || k.contains("reduce")), "{case}: {gpu:?}");
    }
}

#[test]
fn activations_of_many_ops_are_one_epilogue() {
    for case in ["activations", "activations_2", "activations_3"] {
        for kernels in planted(case) {
            // Where the products before them are merged, they are one kernel behind them, or one each.
            let activations = kernels.iter().filter(|k| *k != "matmul_add").count();
            assert!([1, 5].contains(&activations), "{case}: {kernels:?}");
        }
    }
}

#[test]
fn norms_join_what_they_norm() {
    for case in ["embedding_norm", "embedding_norm_2", "embedding_norm_3", "residual_norm", "residual_norm_2", "residual_norm_3"] {
        for kernels in planted(case) {
            assert_eq!(kernels.len(), 1, "{case}: {kernels:?}");
        }
    }
}

#[test]
fn quantised_islands_are_integer_kernels_on_a_cpu() {
    for (case, kernels) in [
        ("qdq", ["div_round_cast", "matmul_cast_mul_round"]),
        ("qdq_2", ["mul_round_add_cast", "matmul_add_cast_mul"]),
        ("qdq_3", ["transpose", "conv_add_cast_fma"]),
    ] {
        let [cpu, _] = planted(case);
        assert_eq!(cpu, kernels, "{case}");
    }
}

#[test]
fn weights_stay_packed_in_the_product_that_reads_them() {
    for case in ["packed", "packed_2", "packed_3"] {
        for kernels in planted(case) {
            assert_eq!(kernels, ["dequant_matmul"], "{case}");
        }
    }
}

#[test]
fn a_sum_of_what_was_mapped_and_a_map_of_the_sum_are_one_pass() {
    for case in ["one_pass", "one_pass_2", "one_pass_3"] {
        for kernels in planted(case) {
            assert_eq!(kernels.len(), 1, "{case}: {kernels:?}");
        }
    }
}

#[test]
fn what_others_want_of_a_kernel_it_gives_too() {
    for (case, kernels) in [("softmax_argmax", 1), ("softmax_argmax_2", 3), ("softmax_argmax_3", 1), ("siblings", 2)] {
        for found in planted(case) {
            assert_eq!(found.len(), kernels, "{case}: {found:?}");
        }
    }
    // Three results of one pass over the rows, one after the other, where a launch is dear.
    let source = "graph @three(%x: f32[n,10]) where n in 1.. {
  %top = reduce[f=max,axes=[1]] %x : f32[n,1]
  %tb = broadcast[shape=[n,10]] %top : f32[n,10]
  %below = sub %x, %tb : f32[n,10]
  %e = exp %below : f32[n,10]
  %sum = reduce[f=sum,axes=[1]] %e : f32[n,1]
  %sb = broadcast[shape=[n,10]] %sum : f32[n,10]
  %p = div %e, %sb : f32[n,10]
  %best = arg_reduce[f=max,axis=1,last=false] %p : i64[n,1]
  %most = reduce[f=max,axes=[1]] %p : f32[n,1]
  return %best as \"best\", %p as \"p\", %most as \"most\"
}";
    assert_eq!(check_for(source, cost::GPU).0.len(), 1);
    // Bytes that elements share are written by one kernel each.
    let source = "graph @packed(%x: f32[n,8], %y: f32[n,8]) where n in 1.. {
  %a = add %x, %y : f32[n,8]
  %b = mul %x, %y : f32[n,8]
  %c = cast[to=i4] %b : i4[n,8]
  return %a as \"a\", %c as \"c\"
}";
    assert_eq!(planned(source, cost::GPU).len(), 2);
}

/// Kernels of the fused program.
fn planned(source: &str, costs: cost::Costs) -> Vec<String> {
    let graph = text::parse(source, &|_| None).unwrap();
    let ctx = Ctx { costs, ..Ctx::default() };
    let program = build::program("fused", &graph, &|g: &Graph| eqsat::optimise(g, &ctx), &ctx).unwrap();
    program.body.regions().iter().map(|(r, _)| r.name.clone()).collect()
}

/// A gated layer: `rows` rows of `k` into `n` columns, `gates` products of them, `f` of each, multiplied.
fn gated(rows: usize, k: usize, n: usize, gates: usize, f: &str) -> String {
    let mut seed = 1u32;
    let mut weights = |count: usize| {
        let next = |_| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            format!("{:.2}", f64::from(seed >> 8) / f64::from(1 << 24) - 0.5)
        };
        (0..count).map(next).collect::<Vec<String>>().join(", ")
    };
    let mut text = format!("graph @gated(%x: f32[{rows},{k}]) {{\n");
    for i in 0..gates {
        text += &format!("  %w{i} = const f32[{k},{n}] {{{}}}\n", weights(k * n));
        text += &format!("  %m{i} = matmul[out=f32] %x, %w{i} : f32[{rows},{n}]\n");
        text += &format!("  %g{i} = {f} %m{i} : f32[{rows},{n}]\n");
        if i > 0 {
            let last = if i == 1 { "g0".into() } else { format!("p{}", i - 1) };
            text += &format!("  %p{i} = mul %{last}, %g{i} : f32[{rows},{n}]\n");
        }
    }
    text + &format!("  return %p{} as \"y\"\n}}", gates - 1)
}

#[test]
fn siblings_are_merged_where_that_pays() {
    let products = |kernels: &[String]| kernels.iter().filter(|k| k.contains("matmul")).count();
    // Few columns of a long row: reading the row once more is dear. Many columns of a short one: writing them apart is.
    assert_eq!(products(&check(&gated(8, 64, 4, 2, "sigmoid")).0), 1);
    assert_eq!(products(&check(&gated(64, 8, 256, 2, "sigmoid")).0), 2);
    // Three gates: a GPU saves a launch where the rows are few, and writes too much where they are many.
    assert_eq!(products(&check_for(&gated(4, 16, 16, 3, "neg"), cost::GPU).0), 1);
    assert_eq!(products(&planned(&gated(2_000_000, 4, 16, 3, "neg"), cost::GPU)), 3);
}

#[test]
fn a_norm_moves_behind_the_product_where_that_pays() {
    let norm = |k: usize, n: usize| {
        format!(
            "graph @norm(%x: f32[64,{k}], %w: f32[{k},{n}]) {{
  %0 = mul %x, %x : f32[64,{k}]
  %1 = reduce[f=sum,axes=[1]] %0 : f32[64,1]
  %2 = rsqrt %1 : f32[64,1]
  %3 = broadcast[shape=[64,{k}]] %2 : f32[64,{k}]
  %4 = mul %x, %3 : f32[64,{k}]
  %5 = matmul[out=f32] %4, %w : f32[64,{n}]
  return %5 as \"y\"
}}"
        )
    };
    let folded = |kernels: &[String]| kernels.last().is_some_and(|k| k.starts_with("matmul_"));
    assert!(folded(&check(&norm(96, 8)).0));
    assert!(!folded(&check(&norm(8, 96)).0));
}

#[test]
fn what_loops_would_repeat_is_computed_before_them() {
    let norm = "
  %s0 = mul %x, %x : f32[256,128]
  %s1 = reduce[f=sum,axes=[1]] %s0 : f32[256,1]
  %s2 = sqrt %s1 : f32[256,1]
  %s3 = recip %s2 : f32[256,1]
  %s4 = broadcast[shape=[256,128]] %s3 : f32[256,128]
  %s5 = mul %x, %s4 : f32[256,128]
  %w0";
    // More kernels end in this layer than are kept: those that take the root for each element go before others do.
    let layer = gated(256, 128, 128, 2, "sigmoid").replace("matmul[out=f32] %x", "matmul[out=f32] %s5").replacen("\n  %w0", norm, 1);
    let kernels = planned(&layer, cost::CPU);
    assert!(kernels.iter().any(|k| k.ends_with("matmul")) && !kernels.iter().any(|k| k.contains("rsqrt_mul_sigmoid")), "{kernels:?}");
}
