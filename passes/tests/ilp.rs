//! The frontier DP finds what an integer program finds: `cargo test -p pavage-passes --features ilp --test ilp`.
use pavage_ir::text;
use pavage_passes::{self as passes, Ctx, eqsat::cost, eqsat::ilp};
use std::path::Path;

#[test]
fn the_frontier_dp_is_optimal_on_the_parts_of_real_models() {
    let (mut compared, mut timeouts, mut worse) = (0, 0, vec![]);
    for name in ["minilm", "magika", "efficientnet"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/real").join(name).with_extension("ir");
        let source = std::fs::read_to_string(&path).unwrap();
        for costs in [cost::CPU, cost::GPU] {
            let mut graph = text::parse(&source, &|_| None).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let ctx = Ctx { costs, ..Ctx::default() };
            passes::run(&mut graph, &ctx, passes::PIPELINE).unwrap();
            for [single, joint] in ilp::compare(&graph, &ctx).unwrap() {
                // Kernels of several classes are offered for what a plan holds, round by round: close to the optimum, not always there.
                for (part, close) in [(single, 1e-6), (joint, 2e-4)] {
                    match part.ilp {
                        Some(best) => {
                            if (part.dp - best).abs() > close * best {
                                worse.push(format!("{name}: {part:?}"));
                            }
                            compared += 1;
                        }
                        None => timeouts += 1,
                    }
                }
            }
        }
    }
    println!("{compared} choices compared, {timeouts} were too large for the solver");
    assert!(worse.is_empty(), "{worse:#?}");
    assert!(compared >= 10, "{compared} parts compared, {timeouts} timeouts");
}
