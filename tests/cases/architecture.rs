//! The texts in ARCHITECTURE.md are what the compiler gives today.
//!
//! A code block after `<!-- stage: NAME -->` holds that stage of `optimize/cnn.ir`, one after
//! `<!-- stage: NAME, N lines -->` its first N lines. `BLESS=1` rewrites them.
use super::{optimize, read, root};
use pavage::{
    CompileOptions, Device, Options, Source, Tensor, compile,
    ir::{Graph, text},
    passes::{self, Ctx, build, eqsat},
};
use pavage_codegen::{compile as code, emit::Kernels, targets::Target};
use std::{collections::BTreeMap, fmt::Write, path::PathBuf};

const TARGET: &str = "x86-64-v3";

fn case() -> PathBuf {
    root().join("tests/cases/optimize/cnn.ir")
}

/// The tile IR and the MLIR of the first kernel.
fn first_kernel() -> (String, String) {
    let (_, mut graph) = read(&case());
    let ctx = Ctx::default();
    passes::run(&mut graph, &ctx, passes::PIPELINE).unwrap();
    let search = |g: &Graph| eqsat::optimise(g, &ctx);
    let program = build::program("fused", &graph, &search, &ctx).unwrap();
    let target = Target::parse(TARGET).unwrap();
    let tiles = Kernels::build(&[program], &target, None).unwrap().tiles();
    (tiles[0].to_string(), code::cpu_mlir(&tiles[..1], &target).unwrap())
}

/// The kernels of the artifact's plan, and what a run of two images launches.
fn plan() -> (String, String) {
    let (_, graph) = read(&case());
    let options = CompileOptions { targets: vec![TARGET.into()], ..CompileOptions::default() };
    let compiled = compile(Source::Ir(&text::print_full(&graph)), &options).unwrap();
    let mut session = compiled.open().unwrap().session(Device::Null, Options::default()).unwrap();
    let mut kernels = String::new();
    for k in &session.plan().kernels {
        let p = &k.provenance;
        writeln!(kernels, "{} = {} from {}; {}", k.symbol, p.members.join(" "), p.sources.join(" "), p.rules.join(", ")).unwrap();
    }
    let images = Tensor::from_slice(&[2, 1, 8, 8], &[0.5f32; 128]).unwrap();
    session.run(&[("image", &images)]).unwrap();
    (kernels, session.take_log().join("\n"))
}

#[test]
fn the_stages_in_architecture_md_are_those_of_today() {
    let (tile, mlir) = first_kernel();
    let (kernels, launches) = plan();
    let mut stages: BTreeMap<&str, String> = optimize::stages(&case()).into_iter().collect();
    stages.extend([("tile", tile), ("mlir", mlir), ("plan", kernels), ("launches", launches)]);
    let path = root().join("ARCHITECTURE.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let mut fresh = String::new();
    let mut shown = BTreeMap::new();
    let mut rest = page.as_str();
    while let Some((before, after)) = rest.split_once("<!-- stage: ") {
        let (marker, after) = after.split_once(" -->\n```").expect("a marker is followed by a code block");
        let (language, after) = after.split_once('\n').expect("a code block begins with a line");
        let (_, after) = after.split_once("\n```\n").expect("a code block ends");
        let (name, lines) = match marker.split_once(", ") {
            Some((name, n)) => (name, n.split(' ').next().unwrap().parse().expect("a number of lines")),
            None => (marker, usize::MAX),
        };
        let text: Vec<&str> = stages.get(name).unwrap_or_else(|| panic!("no stage is named `{name}`")).trim_end().lines().take(lines).collect();
        write!(fresh, "{before}<!-- stage: {marker} -->\n```{language}\n{}\n```\n", text.join("\n")).unwrap();
        *shown.entry(name).or_insert(0) += 1;
        rest = after;
    }
    fresh += rest;
    assert_eq!(shown.len(), stages.len(), "every stage is shown: {shown:?}");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &fresh).unwrap();
    } else {
        assert!(fresh == page, "ARCHITECTURE.md is stale: BLESS=1 cargo test --test cases rewrites it");
    }
}

#[test]
fn the_files_that_the_pages_name_exist() {
    for page in ["ARCHITECTURE.md", "CONTRIBUTING.md", "passes/src/rules/README.md"] {
        let text = std::fs::read_to_string(root().join(page)).unwrap();
        for word in text.split('`').skip(1).step_by(2) {
            let is_path = word.contains('/') || word.ends_with(".rs") || word.ends_with(".md");
            if is_path && !word.contains(['*', '<', ' ', '{', '\n']) {
                let found = [root().to_path_buf(), root().join(page).parent().unwrap().to_path_buf()].iter().any(|base| base.join(word).exists());
                assert!(found || word == "./x", "{page} names `{word}`, which does not exist");
            }
        }
    }
}
