//! What becomes of a graph: the source, the graph after the passes, the fused program.
use super::{cases, read};
use pavage::{
    ir::{Graph, text},
    passes::{self, Ctx, build, eqsat},
};
use std::path::Path;

/// The stages of one case, under headings.
pub(crate) fn stages(path: &Path) -> Vec<(&'static str, String)> {
    let (source, mut graph) = read(path);
    let ctx = Ctx::default();
    passes::run(&mut graph, &ctx, passes::PIPELINE).unwrap();
    let after = text::print(&graph);
    let search = |g: &Graph| eqsat::optimise(g, &ctx);
    let program = build::program("fused", &graph, &search, &ctx).unwrap();
    assert!(ctx.notes.borrow().is_empty(), "{:?}", ctx.notes);
    let origins: Vec<String> = program
        .body
        .regions()
        .iter()
        .filter(|(_, origin)| !origin.rules.is_empty())
        .map(|(region, origin)| format!("; @{} by {}", region.name, origin.rules.join(", ")))
        .collect();
    let program = [program.to_string().trim_end().to_string(), origins.join("\n")].join("\n\n");
    vec![("source", source), ("passes", after), ("fused", program)]
}

#[test]
fn graphs_become_the_programs_that_goldens_show() {
    let mut settings = insta::Settings::clone_current();
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.set_snapshot_path("optimize");
    let _scope = settings.bind_to_scope();
    for path in cases("optimize") {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let body: Vec<String> = stages(&path).into_iter().map(|(stage, text)| format!("; {stage}\n{}", text.trim_end())).collect();
        insta::assert_snapshot!(name, body.join("\n\n"));
    }
}

#[test]
fn the_same_graph_gives_the_same_program() {
    for path in cases("optimize") {
        assert_eq!(stages(&path), stages(&path));
    }
}
