//! Every text in `tests/cases` is a graph whose outputs come in pairs: `x` and what it must be, `expected x`,
//! a constant that another implementation computed. Integers must be equal, floats close.
use pavage_ir::{eval, text, verify};
use std::path::Path;

#[test]
fn evaluators_agree_with_other_implementations() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let mut files: Vec<_> = std::fs::read_dir(folder).expect("the folder of cases").map(|f| f.expect("a file").path()).collect();
    files.sort();
    assert!(!files.is_empty());
    let wrong: Vec<String> = files.iter().filter_map(|file| check(file).err().map(|e| format!("{}: {e}", file.display()))).collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), files.len(), wrong.join("\n"));
}

fn check(file: &Path) -> Result<(), String> {
    let source = std::fs::read_to_string(file).map_err(|e| e.to_string())?;
    let graph = text::parse(&source, &|_| None).map_err(|e| e.to_string())?;
    verify::verify(&graph).map_err(|e| e.to_string())?;
    let full = text::print_full(&graph);
    let again = text::parse(&full, &|_| None).map_err(|e| e.to_string())?;
    if text::print_full(&again) != full {
        return Err("prints differently after a round trip".into());
    }
    let values = eval(&graph, &[]).map_err(|e| e.to_string())?;
    let named: std::collections::BTreeMap<&str, _> = graph.outputs.iter().map(|o| o.name.as_str()).zip(&values).collect();
    for (name, got) in &named {
        let Some(expected) = named.get(format!("expected {name}").as_str()) else { continue };
        if got.dtype() != expected.dtype() || got.shape() != expected.shape() {
            return Err(format!("{name} is {}, expected {}", got.ty(), expected.ty()));
        }
        let largest = expected.to_f64().iter().filter(|v| v.is_finite()).fold(1.0, |m: f64, v| m.max(v.abs()));
        for (i, (a, b)) in got.to_f64().into_iter().zip(expected.to_f64()).enumerate() {
            let close = if got.dtype().is_float() { (a - b).abs() <= 2e-6 * largest } else { a == b };
            if !(close || a == b || a.is_nan() && b.is_nan()) {
                return Err(format!("{name}[{i}] is {a}, expected {b}"));
            }
        }
    }
    Ok(())
}
