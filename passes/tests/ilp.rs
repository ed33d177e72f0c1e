//! The frontier DP finds what an integer program finds: `cargo test -p pavage-passes --features ilp --test ilp`.
use pavage_ir::text;
use pavage_passes::{self as passes, Ctx, eqsat::cost, eqsat::ilp};
use std::path::Path;

#[test]
fn the_frontier_dp_is_optimal_on_the_parts_of_real_models() {
    let (mut compared, mut timeouts) = (0, 0);
    for name in ["minilm", "magika", "efficientnet"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/real").join(name).with_extension("ir");
        let source = std::fs::read_to_string(&path).unwrap();
        for costs in [cost::CPU, cost::GPU] {
            let mut graph = text::parse(&source, &|_| None).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let ctx = Ctx { costs, ..Ctx::default() };
            passes::run(&mut graph, &ctx, passes::PIPELINE).unwrap();
            for part in ilp::compare(&graph, &ctx).unwrap() {
                match part.ilp {
                    Some(best) => {
                        assert!((part.dp - best).abs() <= 1e-6 * best, "{name}: {part:?}");
                        compared += 1;
                    }
                    None => timeouts += 1,
                }
            }
        }
    }
    println!("{compared} parts agree, {timeouts} were too large for the solver");
    assert!(compared >= 10, "{compared} parts compared, {timeouts} timeouts");
}
