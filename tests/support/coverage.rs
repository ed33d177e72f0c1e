//! The table of operators, docs/ops.md: what the registry reads, and how ONNX's node tests of each go.
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

const HEAD: &str = "\
# Operators

Which operators of ONNX Pavage compiles. `BLESS=1 cargo test --test onnx` writes this table, and that test keeps it true.

- **Operator sets**: those that changed the operator and whose form is read; a model of a later set uses the last before it.
- **Element types**: of inputs and outputs in the node tests that pass.
- **CPU**: how many of ONNX's own node tests of the operator pass, compiled, fused and unfused (`tests/onnx_excluded.txt` says
  why others do not). Tests of its function body are not counted; `-` stands where the suite has no test.
- **GPU**: how many pass on a GPU, in the fused plan (`tests/onnx_excluded_cuda.txt` has the others).
";

/// What a test's model is made of.
struct Outline {
    operators: BTreeSet<(String, String)>,
    types: BTreeSet<&'static str>,
}

/// Fields of a protocol buffer message: number, and its bytes or its integer.
fn fields(mut message: &[u8]) -> Vec<(u64, Result<&[u8], u64>)> {
    fn varint(from: &mut &[u8]) -> u64 {
        let mut n = 0;
        for shift in (0..64).step_by(7) {
            let Some((first, rest)) = from.split_first() else { break };
            *from = rest;
            n |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                break;
            }
        }
        n
    }
    let mut found = vec![];
    while !message.is_empty() {
        let tag = varint(&mut message);
        let skip = match tag & 7 {
            0 => {
                found.push((tag >> 3, Err(varint(&mut message))));
                continue;
            }
            1 => 8,
            2 => varint(&mut message) as usize,
            _ => 4,
        };
        let (inner, rest) = message.split_at(skip.min(message.len()));
        found.push((tag >> 3, Ok(inner)));
        message = rest;
    }
    found
}

fn inside(message: &[u8], number: u64) -> impl Iterator<Item = &[u8]> {
    fields(message).into_iter().filter_map(move |(n, value)| value.ok().filter(|_| n == number))
}

fn text(message: &[u8], number: u64) -> String {
    inside(message, number).map(|b| String::from_utf8_lossy(b).into_owned()).next().unwrap_or_default()
}

/// Names of ONNX's element types, by code.
const TYPES: [&str; 27] = [
    "",
    "f32",
    "u8",
    "i8",
    "u16",
    "i16",
    "i32",
    "i64",
    "str",
    "bool",
    "f16",
    "f64",
    "u32",
    "u64",
    "c64",
    "c128",
    "bf16",
    "f8e4m3",
    "f8e4m3fnuz",
    "f8e5m2",
    "f8e5m2fnuz",
    "u4",
    "i4",
    "f4e2m1",
    "f8e8m0",
    "u2",
    "i2",
];

/// Element types in a `TypeProto`, those of sequences and optionals included.
fn types(ty: &[u8], into: &mut BTreeSet<&'static str>) {
    for (number, value) in fields(ty) {
        match (number, value) {
            (1, Ok(tensor)) => into.extend(fields(tensor).iter().filter_map(|f| TYPES.get(f.1.err().filter(|_| f.0 == 1)? as usize))),
            (4 | 9, Ok(of)) => inside(of, 1).for_each(|t| types(t, into)),
            _ => {}
        }
    }
}

fn outline(model: &[u8]) -> Outline {
    let mut found = Outline { operators: BTreeSet::new(), types: BTreeSet::new() };
    for graph in inside(model, 7) {
        for node in inside(graph, 1) {
            let domain = text(node, 7);
            found.operators.insert((if domain.is_empty() { "ai.onnx".into() } else { domain }, text(node, 4)));
        }
        let ports = inside(graph, 11).chain(inside(graph, 12)).map(<[u8]>::to_vec).collect::<Vec<_>>();
        ports.iter().flat_map(|port| inside(port, 2)).for_each(|ty| types(ty, &mut found.types));
    }
    found
}

/// What is known of one operator.
#[derive(Default)]
struct Row {
    sets: Vec<i64>,
    types: BTreeSet<&'static str>,
    tests: usize,
    passing: usize,
    gpu: usize,
}

/// Domain, name, and operator sets of a table's rows that name any.
pub(crate) fn registered(table: &str) -> Vec<(String, String, String)> {
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        (cells.len() > 4 && cells[3].starts_with(|c: char| c.is_ascii_digit())).then(|| (cells[2].to_string(), cells[1].to_string(), cells[3].to_string()))
    };
    table.lines().filter_map(row).collect()
}

/// What the registry reads, in the table's order.
pub(crate) fn registry() -> Vec<(String, String, String)> {
    let mut all: Vec<_> = pavage::frontend::onnx::registry::operators().map(|(d, o, s)| (d.to_string(), o.to_string(), sets(s))).collect();
    all.sort();
    all
}

fn sets(since: &[i64]) -> String {
    since.iter().map(i64::to_string).collect::<Vec<_>>().join(" ")
}

/// The table, from the tests in a folder, and the names of those that do not pass on a CPU and on a GPU.
pub(crate) fn table(folder: &Path, failing: &BTreeSet<String>, failing_on_gpu: &BTreeSet<String>) -> String {
    let mut rows: BTreeMap<(String, String), Row> = BTreeMap::new();
    for (domain, op, since) in pavage::frontend::onnx::registry::operators() {
        rows.entry((domain.into(), op.into())).or_default().sets = since.to_vec();
    }
    let (mut tests, mut passing, mut gpu) = (0, 0, 0);
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let Ok(model) = std::fs::read(entry.path().join("model.onnx")) else { continue };
        let passes = !failing.contains(&name);
        tests += 1;
        passing += usize::from(passes);
        gpu += usize::from(!failing_on_gpu.contains(&name));
        if name.contains("_expanded") {
            continue;
        }
        let Outline { operators, types } = outline(&model);
        for op in operators {
            let row = rows.entry(op).or_default();
            row.tests += 1;
            row.gpu += usize::from(!failing_on_gpu.contains(&name));
            if passes {
                row.passing += 1;
                row.types.extend(&types);
            }
        }
    }
    let mut out = format!(
        "{HEAD}\nOf all {tests} node tests {passing} pass on a CPU and {gpu} on a GPU.\n\n| Operator | Domain | Operator sets | Element types | CPU | GPU |\n|---|---|---|---|---|---|\n"
    );
    for ((domain, op), row) in rows {
        let sets = if row.sets.is_empty() { "not read".into() } else { sets(&row.sets) };
        let types: Vec<&str> = row.types.into_iter().collect();
        let of = |n: usize| if row.tests == 0 { "-".into() } else { format!("{n} of {}", row.tests) };
        out += &format!("| {op} | {domain} | {sets} | {} | {} | {} |\n", types.join(" "), of(row.passing), of(row.gpu));
    }
    out
}
