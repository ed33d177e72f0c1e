//! Text of graphs: prints and parses are inverses, and no text brings the parser down.
mod common;
use common::Rng;
use pavage_ir::{Binding, Tensor, eval, eval_graph, text, verify};

const EXAMPLE: &str = r#"graph @main(%x: f32[n,3], %c: bool[], %"odd name": f32[2]) where m in 0..=64, n in 1.. {
  %0 = const f32[3,2] {1.0, 2.0, -inf, 0.1, nan, 0.0}
  %1 = matmul[out=f32] %x, %0 : f32[n,2]  ; from "dense", "dense \"bias\""
  %2 = if %c, %1 {
    graph @then(%a: f32[n,2]) {
      return %a as "out"
    }
    graph @else(%a: f32[n,2]) {
      %0 = neg %a : f32[n,2]
      return %0 as "out"
    }
  } : f32[n,2]
  %3:2 = topk[axis=1,k=1,largest=true] %1 : f32[n,1], i64[n,1]
  %4 = nonzero[sym=m] %"odd name" : i64[1,m]
  return %2 as "out", %3#1 as "index", %4 as "found"
}
"#;

fn none(_: &str) -> Option<Tensor> {
    None
}

#[test]
fn an_example_prints_as_written_and_runs() {
    let graph = text::parse(EXAMPLE, &none).unwrap();
    assert_eq!(text::print(&graph), EXAMPLE);
    verify::verify(&graph).unwrap();
    let x = Tensor::from_f32([1, 3], &[1.0, 0.0, 0.0]);
    let yes = Tensor::scalar(pavage_ir::DType::Bool, pavage_ir::Scalar::B(false));
    let mut binding = Binding::default();
    let out = eval_graph(&graph, &[x, yes, Tensor::from_f32([2], &[0.0, 3.0])], &mut binding).unwrap();
    assert_eq!(out[2], Tensor::from_i64([1, 1], &[1]));
    assert_eq!((binding.0.get("n"), binding.0.get("m")), (Some(&1), Some(&1)));
}

#[test]
fn random_graphs_survive_the_round_trip() {
    for seed in 0..200 {
        let mut rng = Rng(seed);
        let graph = common::graph(&mut rng);
        verify::verify(&graph).unwrap();
        let full = text::print_full(&graph);
        let again = text::parse(&full, &none).unwrap_or_else(|e| panic!("{e}\n{full}"));
        assert_eq!(text::print_full(&again), full);
        let table = text::constants(&graph);
        let short = text::print(&graph);
        let again = text::parse(&short, &|name| table.get(name).cloned()).unwrap_or_else(|e| panic!("{e}\n{short}"));
        assert_eq!(text::print(&again), short);
        let x = common::tensor(&mut rng, pavage_ir::DType::F32, &[3, 4]);
        assert_eq!(eval(&graph, std::slice::from_ref(&x)).unwrap(), eval(&again, &[x]).unwrap());
    }
}

#[test]
fn no_text_brings_the_parser_down() {
    let mut rng = Rng(1);
    let mut parsed = 0;
    let texts: Vec<String> = (0..20).map(|seed| text::print_full(&common::graph(&mut Rng(seed)))).chain([EXAMPLE.to_string()]).collect();
    for _ in 0..20_000 {
        let mut bytes = rng.pick(&texts).into_bytes();
        for _ in 0..=rng.below(3) {
            let n = bytes.len().max(1);
            let (at, other) = (rng.below(n), rng.below(n));
            bytes.resize(n, b' ');
            match rng.below(5) {
                0 => drop(bytes.remove(at)),
                1 => bytes.insert(at, rng.pick(b"[](){}%#@,:;=\"0123456789-nmx \n\\")),
                2 => bytes[at] = bytes[other],
                3 => bytes.truncate(at + 1),
                _ => {
                    let part = bytes[at.min(other)..at.max(other)].to_vec();
                    bytes.splice(at..at, part);
                }
            }
        }
        if let Ok(graph) = text::parse(&String::from_utf8_lossy(&bytes), &none) {
            parsed += 1;
            assert!(text::parse(&text::print_full(&graph), &none).is_ok());
        }
    }
    assert!(parsed > 100, "only {parsed} mutants parse: the test is too harsh to mean anything");
}

#[test]
fn errors_name_the_line_and_both_types() {
    let wrong = EXAMPLE.replace("%1 : f32[n,1], i64[n,1]", "%1 : f32[n,2], i64[n,1]");
    let e = text::parse(&wrong, &none).unwrap_err();
    assert_eq!(e.to_string(), "line 13: declared f32[n,2], i64[n,1], inferred f32[n,1], i64[n,1]");
    let deep = "graph @g() {\n%0 = if %0 {".repeat(1000);
    assert!(text::parse(&deep, &none).is_err());
    let deep = format!("graph @g(%x: f32[{}1]) {{ return %x as \"x\" }}", "max(n,".repeat(5000));
    assert!(text::parse(&deep, &none).is_err());
}

#[test]
fn evaluation_errors_name_the_node() {
    let graph = text::parse(
        "graph @g(%x: f32[n], %i: i64[1]) where n in 1.. {\n %0 = gather[axis=0] %x, %i : f32[1] ; from \"Gather_7\"\n return %0 as \"y\"\n}",
        &none,
    )
    .unwrap();
    let x = Tensor::from_f32([2], &[1.0, 2.0]);
    let e = eval(&graph, &[x.clone(), Tensor::from_i64([1], &[5])]).unwrap_err();
    assert_eq!(e.to_string(), "node 2 of @g (gather[axis=0]) from Gather_7: `gather`: index 5 is out of range for extent 2");
    let e = eval(&graph, &[x, Tensor::from_i64([3], &[5, 6, 7])]).unwrap_err();
    assert_eq!(e.to_string(), "input `i` of @g: expected i64[1], got i64[3]: axis 0 must be 1, is 3");
}
