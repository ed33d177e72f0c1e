//! The text of graphs. [`print`] and [`parse`] are inverses: what is printed parses to a graph that prints the
//! same. One node a line, operands before users, types written out and checked against what is inferred:
//!
//! ```text
//! graph @main(%x: f32[n,3], %c: bool[]) where n in 1.., m in 0..=64 {
//!   %0 = const f32[3,2] {1.0, 2.0, -inf, 0.5, nan, 0.0}
//!   %1 = matmul[out=f32] %x, %0 : f32[n,2]  ; from "dense", "dense_bias"
//!   %2 = if %c, %1 {
//!     graph @then(%a: f32[n,2]) {
//!       return %a as "out"
//!     }
//!     graph @else(%a: f32[n,2]) {
//!       %0 = neg %a : f32[n,2]
//!       return %0 as "out"
//!     }
//!   } : f32[n,2]
//!   %3:2 = topk[axis=1,k=1,largest=true] %1 : f32[n,1], i64[n,1]
//!   return %2 as "out", %3#1 as "index"
//! }
//! ```
//!
//! `where` gives the bounds of every size symbol. A constant of more than 64 elements prints as
//! `const f32[64,3] @w0 hash=...`, a reference into the table that [`constants`] gives, or with
//! [`print_full`] as `const f32[64,3] hex"..."`, its bytes. Names that are not plain words are quoted.
//! Nodes that no output needs are not printed. `;` starts a comment.
use crate::{Graph, NodeKind, Sym, Tensor, Value, tensor::show};
use std::{collections::BTreeMap, fmt, fmt::Write};

pub use crate::text_parse::{ParseError, parse};

/// Constants of at most this many elements print their values.
const INLINE: usize = 64;

/// The text of a graph; constants of more than 64 elements by reference.
pub fn print(graph: &Graph) -> String {
    let mut p = Printer { out: String::new(), full: false, table: BTreeMap::new() };
    p.graph(graph, 0, true);
    p.out
}

/// The text of a graph with every constant in it.
pub fn print_full(graph: &Graph) -> String {
    let mut p = Printer { out: String::new(), full: true, table: BTreeMap::new() };
    p.graph(graph, 0, true);
    p.out
}

/// The constants that [`print`] refers to, by the names it gives them.
pub fn constants(graph: &Graph) -> BTreeMap<String, Tensor> {
    let mut p = Printer { out: String::new(), full: false, table: BTreeMap::new() };
    p.graph(graph, 0, true);
    p.table
}

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&print(self))
    }
}

/// A text in quotes.
pub(crate) fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            c if c.is_control() => out.push_str(&format!("\\u{{{:x}}}", u32::from(c))),
            c => out.push(c),
        }
    }
    out + "\""
}

/// Whether a name prints without quotes.
pub(crate) fn is_word(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.')
}

fn name(text: &str) -> String {
    if is_word(text) { text.to_string() } else { quote(text) }
}

/// Bounds of a symbol: `1..`, `0..=64`.
pub(crate) fn bounds(sym: &Sym) -> String {
    match sym.max {
        Some(max) => format!("{}..={max}", sym.min),
        None => format!("{}..", sym.min),
    }
}

struct Printer {
    out: String,
    full: bool,
    table: BTreeMap<String, Tensor>,
}

impl Printer {
    fn line(&mut self, depth: usize, text: &str) {
        self.out.push_str(&"  ".repeat(depth));
        self.out.push_str(text);
        self.out.push('\n');
    }

    fn graph(&mut self, graph: &Graph, depth: usize, outermost: bool) {
        let mut names: BTreeMap<Value, String> = BTreeMap::new();
        let mut inputs = vec![];
        for id in graph.inputs() {
            if let NodeKind::Input(input) = &graph[*id].kind {
                let value = format!("%{}", name(input));
                inputs.push(format!("{value}: {}", graph[*id].types[0]));
                names.insert((*id).into(), value);
            }
        }
        let mut header = format!("graph @{}({})", name(&graph.name), inputs.join(", "));
        let symbols = if outermost { graph.symbols() } else { vec![] };
        for (i, sym) in symbols.iter().enumerate() {
            let _ = write!(header, "{}{} in {}", if i == 0 { " where " } else { ", " }, sym.name, bounds(sym));
        }
        self.line(depth, &(header + " {"));
        let mut next = 0;
        for id in graph.schedule() {
            let node = &graph[id];
            let source = match node.source.as_slice() {
                [] => String::new(),
                names => format!("  ; from {}", names.iter().map(|n| quote(n)).collect::<Vec<_>>().join(", ")),
            };
            let results = node.types.len();
            match &node.kind {
                NodeKind::Input(_) => continue,
                NodeKind::Const(tensor) => {
                    let value = self.constant(tensor);
                    self.line(depth + 1, &format!("%{next} = const {} {value}{source}", node.types[0]));
                }
                NodeKind::Op(op, bodies) => {
                    let operands: Vec<&str> = graph.operands(id).iter().map(|v| names.get(v).map_or("?", String::as_str)).collect();
                    let types: Vec<String> = node.types.iter().map(ToString::to_string).collect();
                    let many = if results == 1 { String::new() } else { format!(":{results}") };
                    let space = if operands.is_empty() { "" } else { " " };
                    let call = format!("%{next}{many} = {op}{space}{}", operands.join(", "));
                    let tail = format!(" : {}{source}", types.join(", "));
                    if bodies.is_empty() {
                        self.line(depth + 1, &(call + &tail));
                    } else {
                        self.line(depth + 1, &(call + " {"));
                        bodies.iter().for_each(|body| self.graph(body, depth + 2, false));
                        self.line(depth + 1, &format!("}}{tail}"));
                    }
                }
            }
            for result in 0..results as u32 {
                let suffix = if result == 0 { String::new() } else { format!("#{result}") };
                names.insert(Value { node: id, result }, format!("%{next}{suffix}"));
            }
            next += 1;
        }
        let outputs: Vec<String> = graph.outputs.iter().map(|o| format!("{} as {}", names.get(&o.value).map_or("?", String::as_str), quote(&o.name))).collect();
        self.line(depth + 1, format!("return {}", outputs.join(", ")).trim_end());
        self.line(depth, "}");
    }

    fn constant(&mut self, tensor: &Tensor) -> String {
        if tensor.count() <= INLINE
            && let Some(values) = inline(tensor)
        {
            return values;
        }
        if self.full || tensor.count() <= INLINE {
            let mut hex = String::with_capacity(2 * tensor.bytes().len() + 5);
            tensor.bytes().iter().for_each(|b| {
                let _ = write!(hex, "{b:02x}");
            });
            return format!("hex\"{hex}\"");
        }
        let key = format!("w{}", self.table.len());
        self.table.insert(key.clone(), tensor.clone());
        format!("@{key} hash={:016x}", tensor.content_hash())
    }
}

/// Values in braces, if they parse back to the same bits (a NaN with a payload does not).
fn inline(tensor: &Tensor) -> Option<String> {
    let mut shown = vec![];
    let mut values = vec![];
    for i in 0..tensor.count() {
        let v = tensor.get(i);
        let short = |v: f64| (f64::from(v as f32) == v).then(|| format!("{:?}", v as f32));
        let text = match v {
            crate::Scalar::F(v) if v.is_finite() => short(v).unwrap_or_else(|| format!("{v:?}")),
            v => show(v),
        };
        values.push(crate::tensor::parse_scalar(&text, tensor.dtype()).ok()?);
        shown.push(text);
    }
    let back = Tensor::from_scalars(tensor.dtype(), tensor.shape(), values);
    back.same_bits(tensor).then(|| format!("{{{}}}", shown.join(", ")))
}
