//! The pass `integer` on random quantised layers: the sums are integers, and what comes out agrees with the graph as written.
use pavage_ir::{DType, Graph, Op, Scalar, Tensor, eval, text};
use pavage_passes::{self as passes, Ctx, eqsat::cost};

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
    fn list(&mut self, n: usize, lo: i64, hi: i64) -> String {
        (0..n).map(|_| (lo + self.below((hi - lo + 1) as u64) as i64).to_string()).collect::<Vec<_>>().join(", ")
    }
}

fn transformed(source: &str) -> (Graph, Graph) {
    transformed_for(source, cost::CPU)
}

fn transformed_for(source: &str, costs: cost::Costs) -> (Graph, Graph) {
    let graph = text::parse(source, &|_| None).unwrap_or_else(|e| panic!("{e}\n{source}"));
    let mut after = graph.clone();
    passes::run(&mut after, &Ctx { costs, ..Ctx::default() }, &["integer"]).unwrap();
    (graph, after)
}

/// Evaluate both on random bytes; how many elements differ, and by how much at most.
fn differences(before: &Graph, after: &Graph, random: &mut Random) -> (usize, f64) {
    let inputs: Vec<Tensor> = before
        .inputs()
        .iter()
        .map(|id| {
            let ty = before.ty((*id).into());
            let shape = ty.const_shape().unwrap();
            let n = shape.iter().product();
            let (lo, hi) = ty.dtype.int_range();
            Tensor::from_scalars(ty.dtype, shape, (0..n).map(|_| Scalar::I(lo + i128::from(random.below((hi - lo + 1) as u64)))).collect::<Vec<_>>())
        })
        .collect();
    let (want, got) = (eval::eval(before, &inputs).unwrap(), eval::eval(after, &inputs).unwrap());
    let (mut count, mut worst) = (0, 0.0f64);
    for (w, g) in want.iter().zip(&got) {
        assert_eq!(w.ty(), g.ty());
        for i in 0..w.count() {
            let d = (w.get(i).f() - g.get(i).f()).abs();
            count += usize::from(d != 0.0);
            worst = worst.max(d);
        }
    }
    (count, worst)
}

fn integer_products(graph: &Graph) -> usize {
    let product = |op: Option<&Op>| matches!(op, Some(Op::Conv { .. } | Op::MatMul { .. }));
    graph.nodes().into_iter().filter(|id| product(graph.op(*id)) && graph.ty((*id).into()).dtype == DType::I32).count()
}

/// Whether every integer product is one of bytes on the left.
fn of_bytes(graph: &Graph) -> bool {
    let product = |id: &pavage_ir::NodeId| matches!(graph.op(*id), Some(Op::Conv { .. } | Op::MatMul { .. })) && graph.ty((*id).into()).dtype == DType::I32;
    graph.nodes().into_iter().filter(product).all(|id| graph.ty(graph.operands(id)[0]).dtype.bits() == 8)
}

/// A layer: convolution of dequantised bytes, bias, an activation, quantisation.
struct Layer {
    x: &'static str,
    zero: i64,
    w: &'static str,
    w_zero: i64,
    groups: usize,
    kernel: usize,
    pad: usize,
    scales: [&'static str; 3],
    relu: bool,
}

fn layer(l: &Layer, random: &mut Random) -> String {
    let (c, o, k, p) = (if l.groups == 1 { 3 } else { 4 }, 8, l.kernel, l.pad);
    let (cg, h) = (c / l.groups, 6);
    let oh = h + 2 * p - k + 1;
    let (lo, hi) = if l.w == "i8" { (-127, 127) } else { (0, 255) };
    let weights = random.list(o * cg * k * k, lo, hi);
    let bias = random.list(o, -9, 9);
    let [sx, sw, sy] = l.scales;
    let channel_scales = (0..o).map(|i| format!("{}", sw.parse::<f64>().unwrap() * [1.0, 0.5, 2.0][i % 3])).collect::<Vec<_>>().join(", ");
    let relu = if l.relu {
        format!("%zz = broadcast[shape=[2,{o},{oh},{oh}]] %z0 : f32[2,{o},{oh},{oh}]\n  %a = max %s, %zz : f32[2,{o},{oh},{oh}]")
    } else {
        String::new()
    };
    let act = if l.relu { "%a" } else { "%s" };
    let full = format!("[2,{o},{oh},{oh}]");
    format!(
        "graph @layer(%q: {x}[2,{c},{h},{h}]) {{
  %z0 = const f32[1,1,1,1] {{0.0}}
  %xf = cast[to=f32] %q : f32[2,{c},{h},{h}]
  %zx = const f32[1,1,1,1] {{{zero}.0}}
  %zxb = broadcast[shape=[2,{c},{h},{h}]] %zx : f32[2,{c},{h},{h}]
  %xc = sub %xf, %zxb : f32[2,{c},{h},{h}]
  %sx = const f32[1,1,1,1] {{{sx}}}
  %sxb = broadcast[shape=[2,{c},{h},{h}]] %sx : f32[2,{c},{h},{h}]
  %x = mul %xc, %sxb : f32[2,{c},{h},{h}]
  %wq = const {wt}[{o},{cg},{k},{k}] {{{weights}}}
  %wf = cast[to=f32] %wq : f32[{o},{cg},{k},{k}]
  %zw = const f32[1,1,1,1] {{{w_zero}.0}}
  %zwb = broadcast[shape=[{o},{cg},{k},{k}]] %zw : f32[{o},{cg},{k},{k}]
  %wc = sub %wf, %zwb : f32[{o},{cg},{k},{k}]
  %sw = const f32[{o},1,1,1] {{{channel_scales}}}
  %swb = broadcast[shape=[{o},{cg},{k},{k}]] %sw : f32[{o},{cg},{k},{k}]
  %w = mul %wc, %swb : f32[{o},{cg},{k},{k}]
  %y = conv[strides=[1,1],dilations=[1,1],lo=[{p},{p}],hi=[{p},{p}],groups={groups},layout=nchw] %x, %w : f32{full}
  %b = const f32[1,{o},1,1] {{{bias}}}
  %bb = broadcast[shape={full}] %b : f32{full}
  %s = add %y, %bb : f32{full}
  {relu}
  %sy = const f32[1,1,1,1] {{{sy}}}
  %syb = broadcast[shape={full}] %sy : f32{full}
  %d = div {act}, %syb : f32{full}
  %r = round %d : f32{full}
  %u = cast[to=u8] %r : u8{full}
  return %u as \"u\"
}}",
        x = l.x,
        wt = l.w,
        zero = l.zero,
        w_zero = l.w_zero,
        groups = l.groups,
        bias = bias.split(", ").map(|b| format!("{b}.0")).collect::<Vec<_>>().join(", "),
    )
}

#[test]
fn convolutions_sum_integers() {
    let mut random = Random(0x1234_5678_9abc_def1);
    let dyadic = ["0.0078125", "0.015625", "0.25"];
    let odd = ["0.0078", "0.0131", "0.27"];
    for scales in [dyadic, odd] {
        for (x, zero) in [("u8", 0), ("u8", 127), ("i8", 0), ("i8", -5)] {
            for (w, w_zero) in [("i8", 0), ("u8", 128), ("u8", 3)] {
                for (groups, kernel, pad) in [(1, 1, 0), (1, 3, 1), (4, 3, 1), (1, 2, 0)] {
                    let l = Layer { x, zero, w, w_zero, groups, kernel, pad, scales, relu: zero != 0 };
                    let source = layer(&l, &mut random);
                    for costs in [cost::CPU, cost::GPU] {
                        let wide = costs == cost::GPU;
                        let (before, after) = transformed_for(&source, costs);
                        assert_eq!(integer_products(&after), 1, "{}", text::print(&after));
                        assert!(!wide || of_bytes(&after), "{}", text::print(&after));
                        let (count, worst) = differences(&before, &after, &mut random);
                        // Powers of two scale exactly; otherwise a tie of two steps may fall the other way, hardly ever.
                        let most = if scales == dyadic { 0 } else { 2 };
                        assert!(count <= most && worst <= 1.0, "{count} differ, by up to {worst}\n{source}\n{}", text::print(&after));
                    }
                }
            }
        }
    }
}

#[test]
fn matrix_products_sum_integers_through_views_and_serve_several_users() {
    let mut random = Random(0xfeed_5678_9abc_def1);
    let weights = random.list(7 * 12, -127, 127);
    let (before, after) = transformed(&format!(
        "graph @dense(%q: u8[2,3,4]) {{
  %xf = cast[to=f32] %q : f32[2,3,4]
  %zx = const f32[1,1,1] {{11.0}}
  %zxb = broadcast[shape=[2,3,4]] %zx : f32[2,3,4]
  %xc = sub %xf, %zxb : f32[2,3,4]
  %sx = const f32[1,1,1] {{0.125}}
  %sxb = broadcast[shape=[2,3,4]] %sx : f32[2,3,4]
  %x = mul %xc, %sxb : f32[2,3,4]
  %flat = reshape[shape=[2,12]] %x : f32[2,12]
  %wq = const i8[7,12] {{{weights}}}
  %wf = cast[to=f32] %wq : f32[7,12]
  %sw = const f32[7,1] {{0.5, 0.25, 1.0, 2.0, 0.5, 0.25, 0.125}}
  %swb = broadcast[shape=[7,12]] %sw : f32[7,12]
  %w = mul %wf, %swb : f32[7,12]
  %wt = transpose[perm=[1,0]] %w : f32[12,7]
  %y = matmul[out=f32] %flat, %wt : f32[2,7]
  %two = add %y, %y : f32[2,7]
  %neg = neg %y : f32[2,7]
  return %two as \"two\", %neg as \"neg\"
}}"
    ));
    assert_eq!(integer_products(&after), 1, "{}", text::print(&after));
    assert_eq!(differences(&before, &after, &mut random), (0, 0.0));
}

#[test]
fn what_is_no_product_of_bytes_stays() {
    let source =
        layer(&Layer { x: "u8", zero: 0, w: "i8", w_zero: 0, groups: 1, kernel: 1, pad: 0, scales: ["0.5", "0.5", "0.5"], relu: false }, &mut Random(0x77));
    let graph = text::parse(&source, &|_| None).unwrap();
    let on = |costs: cost::Costs| {
        let mut after = graph.clone();
        passes::run(&mut after, &Ctx { costs, ..Ctx::default() }, &["integer"]).unwrap();
        integer_products(&after)
    };
    assert_eq!([on(cost::GPU), on(cost::SM_80)], [1, 1]);
    assert_eq!(on(cost::Costs { byte_flops_per_ns: 2_000.0, ..cost::GPU }), 0, "no faster on that device");
    let fractional = source.replace("%zx = const f32[1,1,1,1] {0.0}", "%zx = const f32[1,1,1,1] {0.5}");
    assert_eq!(integer_products(&transformed(&fractional).1), 0, "a zero point that is no integer");
    let wide = source.replace("(%q: u8", "(%q: u16");
    assert_eq!(integer_products(&transformed(&wide).1), 0, "sixteen bits");
}

/// Models that multiply integers themselves, their zero points known or not.
#[test]
fn zero_points_are_taken_out_of_integer_products_for_matrix_units() {
    let mut random = Random(0xdead_5678_9abc_def1);
    for (x, zero) in [("u8", "%z"), ("u8", "%c"), ("i8", "%z")] {
        let (dense, taps) = (random.list(12 * 5, -127, 127), random.list(6 * 2 * 9, -100, 100));
        let source = format!(
            "graph @integers(%q: {x}[2,3,12], %i: {x}[1,4,5,6], %z: {x}[]) {{
  %c = const {x}[] {{77}}
  %zw = cast[to=i16] {zero} : i16[]
  %zr = reshape[shape=[1,1,1]] %zw : i16[1,1,1]
  %zb = broadcast[shape=[2,3,12]] %zr : i16[2,3,12]
  %qw = cast[to=i16] %q : i16[2,3,12]
  %a = sub %qw, %zb : i16[2,3,12]
  %f = reshape[shape=[6,12]] %a : i16[6,12]
  %wq = const u8[12,5] {{{}}}
  %ww = cast[to=i16] %wq : i16[12,5]
  %k = const i16[1,1] {{128}}
  %kb = broadcast[shape=[12,5]] %k : i16[12,5]
  %b = sub %ww, %kb : i16[12,5]
  %y = matmul[out=i32] %f, %b : i32[6,5]
  %zs = reshape[shape=[1,1,1,1]] %zw : i16[1,1,1,1]
  %ib = broadcast[shape=[1,4,5,6]] %zs : i16[1,4,5,6]
  %iw = cast[to=i16] %i : i16[1,4,5,6]
  %ic = sub %iw, %ib : i16[1,4,5,6]
  %t = const i8[6,2,3,3] {{{taps}}}
  %v = conv[strides=[1,2],dilations=[1,1],lo=[1,0],hi=[1,1],groups=2,layout=nchw] %ic, %t : i32[1,6,5,3]
  return %y as \"y\", %v as \"v\"
}}",
            dense.split(", ").map(|v| (v.parse::<i64>().unwrap() + 128).to_string()).collect::<Vec<_>>().join(", ")
        );
        let (before, after) = transformed_for(&source, cost::GPU);
        assert_eq!(integer_products(&after), 2);
        assert!(of_bytes(&after) && !of_bytes(&before), "{}", text::print(&after));
        assert_eq!(differences(&before, &after, &mut random), (0, 0.0), "{source}\n{}", text::print(&after));
        let (before, after) = transformed(&source);
        assert_eq!(text::print(&before), text::print(&after), "as it was elsewhere");
    }
}
