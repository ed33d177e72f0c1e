//! Control flow and sizes that data decides, and what the verifier rejects.
use pavage_ir::{Binding, DType, Dim, Graph, Op, Scalar, Tensor, TensorType, eval, eval_graph, text, verify};

fn parse(source: &str) -> Graph {
    let graph = text::parse(source, &|_| None).unwrap_or_else(|e| panic!("{e}\n{source}"));
    verify::verify(&graph).unwrap();
    assert_eq!(text::print(&text::parse(&text::print(&graph), &|_| None).unwrap()), text::print(&graph));
    graph
}

fn ints(v: &[i64]) -> Tensor {
    Tensor::from_i64([v.len()], v)
}

fn int(v: i64) -> Tensor {
    Tensor::from_i64([], &[v])
}

const LOOP: &str = "graph @g(%n: i64[], %x: i64[m]) where m in 1.., t in 0.. {
  %0 = const bool[] {true}
  %1:2 = loop[carried=1,trips=t] %n, %0, %x, %x {
    graph @body(%i: i64[], %go: bool[], %a: i64[m], %b: i64[m]) {
      %0 = add %a, %b : i64[m]
      %1 = const i64[] {3}
      %2 = ne %i, %1 : bool[]
      %3 = mul %i, %i : i64[]
      return %2 as \"go\", %0 as \"a\", %3 as \"square\"
    }
  } : i64[m], i64[t]
  %2 = dims[values=[t,m*t]] : i64[2]
  return %1 as \"sum\", %1#1 as \"squares\", %2 as \"sizes\"
}";

#[test]
fn loops_stop_at_the_count_or_the_condition() {
    let g = parse(LOOP);
    let x = ints(&[1, 10]);
    let run = |n| eval(&g, &[int(n), x.clone()]).unwrap();
    assert_eq!(run(2), [ints(&[3, 30]), ints(&[0, 1]), ints(&[2, 4])]);
    // Iteration 3 makes the condition false: 4 steps whatever the count.
    assert_eq!(run(100), [ints(&[5, 50]), ints(&[0, 1, 4, 9]), ints(&[4, 8])]);
    assert_eq!(run(-1), run(100));
    assert_eq!(run(0), [x, ints(&[]), ints(&[0, 0])]);
}

#[test]
fn branches_and_loops_define_the_sizes_of_what_they_give() {
    let g = parse(
        "graph @g(%c: bool[], %x: f32[2], %n: i64[]) where s in 0.., t in 0.., m in 0.., k in 0.. {
  %0 = if[sizes=[s]] %c, %x {
    graph @yes(%x: f32[2]) {
      return %x as \"y\"
    }
    graph @no(%x: f32[2]) {
      %0 = concat[axis=0] %x, %x : f32[4]
      return %0 as \"y\"
    }
  } : f32[s]
  %go = const bool[] {true}
  %1 = loop[carried=1,trips=t,sizes=[k]] %n, %go, %0, %x {
    graph @body(%i: i64[], %c: bool[], %a: f32[m], %x: f32[2]) {
      %0 = concat[axis=0] %a, %x : f32[m+2]
      return %c as \"c\", %0 as \"a\"
    }
  } : f32[k]
  return %1 as \"y\"
}",
    );
    let run = |c, n| eval(&g, &[Tensor::scalar(DType::Bool, Scalar::B(c)), Tensor::from_f32([2], &[1.0, 2.0]), int(n)]).unwrap()[0].to_f64();
    assert_eq!(run(true, 0), [1.0, 2.0]);
    assert_eq!(run(true, 1), [1.0, 2.0, 1.0, 2.0]);
    assert_eq!(run(false, 2).len(), 8);
}

#[test]
fn sizes_from_data_come_before_their_users() {
    // Nothing reads the result of `bind_size`, and its users come first in depth-first order.
    let g = parse(
        "graph @g(%k: i64[]) where k in 0..=8 {
  %0 = bind_size[sym=k] %k : i64[]
  %1 = iota[dtype=i64,shape=[2*k],axis=0] : i64[2*k]
  return %1 as \"y\"
}",
    );
    assert_eq!(eval(&g, &[int(2)]).unwrap(), [ints(&[0, 1, 2, 3])]);
    let e = eval(&g, &[int(9)]).unwrap_err().to_string();
    assert!(e.ends_with("`bind_size`: `k` is 9, outside 0..=8"), "{e}");
    let mut pruned = g.clone();
    assert_eq!(pruned.prune(), 0);
}

#[test]
fn bodies_see_the_sizes_around_them() {
    let g = parse(
        "graph @g(%c: bool[], %x: f32[n]) where n in 1.. {
  %0 = if %c, %x {
    graph @yes(%x: f32[n]) {
      %0 = const f32[1] {5.0}
      %1 = broadcast[shape=[n]] %0 : f32[n]
      return %1 as \"y\"
    }
    graph @no(%x: f32[n]) {
      return %x as \"y\"
    }
  } : f32[n]
  return %0 as \"y\"
}",
    );
    let x = Tensor::from_f32([2], &[1.0, 2.0]);
    let run = |c| eval(&g, &[Tensor::scalar(DType::Bool, Scalar::B(c)), x.clone()]).unwrap();
    assert_eq!(run(true), [Tensor::from_f32([2], &[5.0, 5.0])]);
    assert_eq!(run(false), [x]);
}

#[test]
fn the_verifier_names_what_is_broken() {
    let input = |g: &mut Graph, name: &str, shape: &[Dim]| g.input(name, TensorType { dtype: DType::F32, shape: shape.to_vec() });
    let reason = |g: &Graph| verify::verify(g).unwrap_err().to_string();
    let n = Dim::sym("n");
    let bounded = Dim::from(pavage_ir::dim::Atom::Sym(pavage_ir::Sym { name: "n".into(), min: 1, max: Some(4) }));

    let mut g = Graph::new("g");
    let x = input(&mut g, "x", std::slice::from_ref(&n));
    assert_eq!(reason(&g), "@g: there are no outputs");
    g.output("y", x);
    verify::verify(&g).unwrap();
    g.output("y", x);
    assert_eq!(reason(&g), "@g: two outputs are named `y`");

    let mut g = Graph::new("g");
    let x = input(&mut g, "x", std::slice::from_ref(&n));
    let y = input(&mut g, "y", &[bounded]);
    g.output("x", x);
    g.output("y", y);
    assert_eq!(reason(&g), "@g: size `n` has two pairs of bounds");

    let mut g = Graph::new("g");
    let x = input(&mut g, "x", &[Dim::one()]);
    let y = g.add(Op::Broadcast { shape: vec![n.clone()] }, &[x]).unwrap();
    g.output("y", y);
    assert_eq!(reason(&g), "@g, node 1: size `n` is defined nowhere");
    let e = eval_graph(&g, &[Tensor::from_f32([1], &[1.0])], &mut Binding::default()).unwrap_err();
    assert_eq!(e.to_string(), "node 1 of @g (broadcast[shape=[n]]): `broadcast`: the result type f32[n] is not bound");

    let mut g = Graph::new("g");
    let (x, _) = (input(&mut g, "x", std::slice::from_ref(&n)), input(&mut g, "x", &[n]));
    g.output("y", x);
    assert_eq!(reason(&g), "@g, node 1: two inputs are named `x`");
}

#[test]
fn a_convolution_of_a_real_model_takes_seconds_at_most() {
    let image = Tensor::from_f32([1, 32, 112, 112], &(0..32 * 112 * 112).map(|i| (i % 37) as f32).collect::<Vec<_>>());
    let w = Tensor::from_f32([64, 32, 3, 3], &(0..64 * 32 * 9).map(|i| (i % 11) as f32 - 5.0).collect::<Vec<_>>());
    let mut g = Graph::new("g");
    let x = g.input("x", image.ty());
    let w = g.constant(w);
    let op = Op::parse("conv[strides=[1,1],dilations=[1,1],lo=[1,1],hi=[1,1],groups=1,layout=nchw]", &|_| None).unwrap();
    let y = g.add(op, &[x, w]).unwrap();
    g.output("y", y);
    let start = std::time::Instant::now();
    eval(&g, &[image]).unwrap();
    // 0.23 GMAC; generous, for slow machines.
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}
