//! Kernels as text: printing and parsing. What prints parses back to the same print.
//!
//! ```text
//! kernel scale cpu lanes=8 {
//!   @0: global read f32
//!   @1: global write f32
//!   dim %0
//!   %1: i64 = lo
//!   %2: i64 = hi
//!   %3: i64 = const[value=1]
//!   for %1, %2, %3 { (%4: i64)
//!     %5: f32 = load %4, @0
//!     %6: f32 = add %5, %5
//!     store %4, %6, @1
//!   }
//! }
//! ```
//! One statement a line: results with their types, the operation with its attributes, value operands,
//! buffer operands, nested blocks. A block opens with its parameters and ends with what it yields.
use super::{Access, Block, Buf, BufInfo, Device, Kernel, Launch, Op, Space, Stmt, Ty, Val, hopper};
use pavage_ir::DType;
use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

impl fmt::Display for Val {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

impl fmt::Display for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "@{}", self.0)
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.device {
            Device::Cpu { lanes } => writeln!(f, "kernel {} cpu lanes={lanes} {{", self.name)?,
            Device::Gpu => {
                let l = &self.launch;
                let ([x, y, z], [gx, gy, gz]) = (l.cluster, l.grid);
                writeln!(
                    f,
                    "kernel {} gpu threads={} grid={gx}x{gy}x{gz} cluster={x}x{y}x{z} min_ctas={} max_regs={} pdl={} {{",
                    self.name, l.threads, l.min_ctas, l.max_regs, l.pdl
                )?;
            }
        }
        for (i, b) in self.bufs.iter().enumerate() {
            write!(f, "  @{i}: {} ", b.space.name())?;
            if b.space == Space::Global {
                write!(f, "{} ", b.access.name())?;
            }
            write!(f, "{}", b.dtype)?;
            if let Some(len) = b.len {
                write!(f, " len={len}")?;
            }
            if b.align != 0 {
                write!(f, " align={}", b.align)?;
            }
            if let Some((of, bytes)) = b.alias {
                write!(f, " alias={of}+{bytes}")?;
            }
            writeln!(f)?;
        }
        for d in &self.dims {
            writeln!(f, "  dim {d}")?;
        }
        for m in &self.maps {
            writeln!(f, "  map {}", m.text())?;
        }
        let mut out = String::new();
        self.print_stmts(&self.body, 1, &mut out);
        write!(f, "{out}}}")
    }
}

fn join<T>(items: impl IntoIterator<Item = T>, each: impl Fn(T) -> String) -> String {
    items.into_iter().map(each).collect::<Vec<_>>().join(", ")
}

impl Kernel {
    fn typed(&self, vals: &[Val]) -> String {
        join(vals, |v| format!("{v}: {}", self.ty(*v)))
    }

    fn print_stmts(&self, block: &Block, depth: usize, out: &mut String) {
        let pad = "  ".repeat(depth);
        for s in &block.stmts {
            out.push_str(&pad);
            if !s.results.is_empty() {
                let _ = write!(out, "{} = ", self.typed(&s.results));
            }
            out.push_str(s.op.name());
            let attrs = s.op.attrs();
            if !attrs.is_empty() {
                let _ = write!(out, "[{}]", join(attrs, |(k, v)| format!("{k}={v}")));
            }
            let operands: Vec<String> = s.args.iter().map(Val::to_string).chain(s.bufs.iter().map(Buf::to_string)).collect();
            if !operands.is_empty() {
                let _ = write!(out, " {}", operands.join(", "));
            }
            for (i, b) in s.blocks.iter().enumerate() {
                if i > 0 {
                    let _ = write!(out, "{pad}}}");
                }
                out.push_str(" {");
                if !b.params.is_empty() {
                    let _ = write!(out, " ({})", self.typed(&b.params));
                }
                out.push('\n');
                self.print_stmts(b, depth + 1, out);
            }
            if !s.blocks.is_empty() {
                let _ = write!(out, "{pad}}}");
            }
            out.push('\n');
        }
        if !block.yields.is_empty() {
            let _ = writeln!(out, "{pad}yield {}", join(&block.yields, Val::to_string));
        }
    }
}

/// Where and why text is not a kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {why}")]
pub struct ParseError {
    /// Line, from 1.
    pub line: usize,
    /// What is wrong.
    pub why: String,
}

/// Deepest nesting of blocks that [`parse`] reads.
const MAX_DEPTH: usize = 64;

/// Read one kernel. Types, scopes and limits are [`super::check`]'s business.
pub fn parse(text: &str) -> Result<Kernel, ParseError> {
    let mut p = Parser { lines: text.lines().enumerate().map(|(i, l)| (i + 1, l.trim())).collect(), at: 0, types: BTreeMap::new(), limit: text.len() as u32 };
    p.lines.retain(|(_, l)| !l.is_empty() && !l.starts_with("//"));
    let line = p.lines.get(p.at).map_or(1, |(n, _)| *n);
    p.kernel().map_err(|why| ParseError { line: p.lines.get(p.at).map_or(line, |(n, _)| *n), why })
}

struct Parser<'t> {
    lines: Vec<(usize, &'t str)>,
    at: usize,
    types: BTreeMap<u32, Ty>,
    /// No value number reaches this: every value is named in the text at least once.
    limit: u32,
}

impl<'t> Parser<'t> {
    fn line(&self) -> Result<&'t str, String> {
        self.lines.get(self.at).map(|(_, l)| *l).ok_or_else(|| "the text ends early".to_owned())
    }

    fn kernel(&mut self) -> Result<Kernel, String> {
        let head: Vec<&str> = self.line()?.split_whitespace().collect();
        let ["kernel", name, device, facts @ .., "{"] = head.as_slice() else {
            return Err("expected `kernel NAME cpu|gpu FACTS {`".to_owned());
        };
        let mut launch = Launch::default();
        let mut lanes = None;
        for fact in facts {
            let (key, value) = fact.split_once('=').ok_or_else(|| format!("expected KEY=VALUE, got `{fact}`"))?;
            match key {
                "lanes" => lanes = Some(number(value)?),
                "threads" => launch.threads = number(value)?,
                "min_ctas" => launch.min_ctas = number(value)?,
                "max_regs" => launch.max_regs = number(value)?,
                "pdl" => launch.pdl = number(value)?,
                "cluster" | "grid" => {
                    let axes: Vec<u32> = value.split('x').map(number).collect::<Result<_, _>>()?;
                    let axes = axes.try_into().map_err(|_| format!("a {key} has three axes"))?;
                    *if *key == *"grid" { &mut launch.grid } else { &mut launch.cluster } = axes;
                }
                _ => return Err(format!("unknown launch fact `{key}`")),
            }
        }
        let device = match *device {
            "cpu" => Device::Cpu { lanes: lanes.ok_or("a cpu kernel needs `lanes=`")? },
            "gpu" => Device::Gpu,
            other => return Err(format!("unknown device `{other}`")),
        };
        let (mut bufs, mut dims, mut maps) = (vec![], vec![], vec![]);
        self.at += 1;
        loop {
            let line = self.line()?;
            if let Some(rest) = line.strip_prefix("dim ") {
                let v = self.val(rest)?;
                self.define(v, Ty::INDEX)?;
                dims.push(v);
            } else if let Some(rest) = line.strip_prefix("map ") {
                maps.push(hopper::TensorMap::parse(rest)?);
            } else if line.starts_with('@') {
                let (id, rest) = line.split_once(':').ok_or("expected `@N: ...`")?;
                if buf(id)? != Buf(bufs.len() as u32) {
                    return Err(format!("buffers are numbered in order, got {id}"));
                }
                bufs.push(buf_info(rest)?);
            } else {
                break;
            }
            self.at += 1;
        }
        let mut body = self.block(vec![], 0)?;
        if self.line()? != "}" {
            return Err("expected `}`".to_owned());
        }
        self.at += 1;
        if self.at < self.lines.len() {
            return Err("text after the kernel".to_owned());
        }
        body.params.clear();
        let count = self.types.len() as u32;
        if self.types.keys().next_back().is_some_and(|last| *last + 1 != count) {
            return Err("values are not numbered without gaps".to_owned());
        }
        let types = std::mem::take(&mut self.types).into_values().collect();
        Ok(Kernel { name: (*name).to_owned(), device, launch, bufs, dims, maps, types, body })
    }

    fn val(&self, s: &str) -> Result<Val, String> {
        let n: u32 = s.trim().strip_prefix('%').ok_or_else(|| format!("expected a value, got `{s}`")).and_then(number)?;
        if n < self.limit { Ok(Val(n)) } else { Err(format!("value number {n} is too large")) }
    }

    fn define(&mut self, v: Val, ty: Ty) -> Result<(), String> {
        match self.types.insert(v.0, ty) {
            None => Ok(()),
            Some(_) => Err(format!("{v} is defined twice")),
        }
    }

    fn definitions(&mut self, text: &str) -> Result<Vec<Val>, String> {
        let mut vals = vec![];
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let (v, ty) = part.split_once(':').ok_or_else(|| format!("expected `%N: TYPE`, got `{part}`"))?;
            let v = self.val(v)?;
            self.define(v, parse_ty(ty.trim())?)?;
            vals.push(v);
        }
        Ok(vals)
    }

    fn operands(&self, text: &str) -> Result<(Vec<Val>, Vec<Buf>), String> {
        let (mut vals, mut bufs) = (vec![], vec![]);
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            if part.starts_with('@') {
                bufs.push(buf(part)?);
            } else {
                vals.push(self.val(part)?);
            }
        }
        Ok((vals, bufs))
    }

    /// Statements up to the line that starts with `}`, which is left.
    fn block(&mut self, params: Vec<Val>, depth: usize) -> Result<Block, String> {
        if depth > MAX_DEPTH {
            return Err(format!("blocks nest deeper than {MAX_DEPTH}"));
        }
        let mut block = Block { params, ..Block::default() };
        loop {
            let line = self.line()?;
            if line.starts_with('}') {
                return Ok(block);
            }
            if let Some(rest) = line.strip_prefix("yield ") {
                block.yields = self.operands(rest)?.0;
                self.at += 1;
                if !self.line()?.starts_with('}') {
                    return Err("`yield` ends its block".to_owned());
                }
                return Ok(block);
            }
            let stmt = self.stmt(line, depth)?;
            block.stmts.push(stmt);
        }
    }

    fn stmt(&mut self, line: &'t str, depth: usize) -> Result<Stmt, String> {
        let (line, opens) = match line.split_once(" {") {
            Some((l, params)) => (l, Some(params.trim())),
            None => (line, None),
        };
        // Attributes hold `=` too, but only after the operation's name.
        let (defs, rest) = match line.split_once(" = ") {
            Some((d, r)) if line.starts_with('%') => (d, r),
            _ => ("", line),
        };
        let results = self.definitions(defs)?;
        let (name, rest) = match rest.find([' ', '[']) {
            Some(i) => rest.split_at(i),
            None => (rest, ""),
        };
        let (attrs, rest) = match rest.strip_prefix('[') {
            Some(r) => r.split_once(']').ok_or("`[` is not closed")?,
            None => ("", rest),
        };
        let mut table = BTreeMap::new();
        for attr in attrs.split(',').map(str::trim).filter(|a| !a.is_empty()) {
            let (k, v) = attr.split_once('=').ok_or_else(|| format!("expected KEY=VALUE, got `{attr}`"))?;
            table.insert(k.to_owned(), v.to_owned());
        }
        let op = Op::parse(name, &table).map_err(|e| format!("{name}: {e}"))?;
        let (args, bufs) = self.operands(rest)?;
        let mut blocks = vec![];
        let mut opens = opens;
        self.at += 1;
        while let Some(params) = opens {
            let params = params.trim_start_matches('(').trim_end_matches(')');
            let params = self.definitions(params)?;
            blocks.push(self.block(params, depth + 1)?);
            let end = self.line()?;
            opens = match end.strip_prefix('}').map(str::trim) {
                Some("") => None,
                Some(more) => Some(more.strip_prefix('{').ok_or("expected `} {` or `}`")?.trim()),
                None => return Err("expected `}`".to_owned()),
            };
            self.at += 1;
        }
        Ok(Stmt { op, args, bufs, blocks, results })
    }
}

fn number<T: std::str::FromStr>(s: &str) -> Result<T, String> {
    s.parse().map_err(|_| format!("`{s}` is not a number in range"))
}

fn buf(s: &str) -> Result<Buf, String> {
    s.trim().strip_prefix('@').ok_or_else(|| format!("expected a buffer, got `{s}`")).and_then(number).map(Buf)
}

fn buf_info(text: &str) -> Result<BufInfo, String> {
    let mut words = text.split_whitespace();
    let mut next = || words.next().ok_or_else(|| "a buffer needs a space and an element type".to_owned());
    let space = match next()? {
        "global" => Space::Global,
        "shared" => Space::Shared,
        "local" => Space::Local,
        other => return Err(format!("unknown space `{other}`")),
    };
    let access = match space {
        Space::Global => match next()? {
            "read" => Access::Read,
            "write" => Access::Write,
            "readwrite" => Access::ReadWrite,
            other => return Err(format!("unknown access `{other}`")),
        },
        _ => Access::ReadWrite,
    };
    let dtype: DType = next()?.parse()?;
    let mut info = BufInfo { space, dtype, len: None, align: 0, access, alias: None };
    for word in words {
        let (key, value) = word.split_once('=').ok_or_else(|| format!("expected KEY=VALUE, got `{word}`"))?;
        match key {
            "len" => info.len = Some(number(value)?),
            "align" => info.align = number(value)?,
            "alias" => {
                let (of, bytes) = value.split_once('+').ok_or("expected `alias=@N+BYTES`")?;
                info.alias = Some((buf(of)?, number(bytes)?));
            }
            _ => return Err(format!("unknown buffer fact `{key}`")),
        }
    }
    Ok(info)
}

fn parse_ty(s: &str) -> Result<Ty, String> {
    let many = |s: &str| -> Result<(DType, u16), String> {
        let (n, d) = s.strip_suffix('>').and_then(|s| s.split_once(" x ")).ok_or_else(|| format!("bad type `{s}`"))?;
        Ok((d.parse()?, number(n)?))
    };
    if let Some(rest) = s.strip_prefix("frag<") {
        many(rest).map(|(d, n)| Ty::Frag(d, n))
    } else if let Some(rest) = s.strip_prefix('<') {
        many(rest).map(|(d, n)| Ty::Vec(d, n))
    } else {
        s.parse().map(Ty::Scalar)
    }
}

/// Panics unless `kernel` prints, parses back and prints the same; for tests.
pub fn assert_round_trip(kernel: &Kernel) {
    let text = kernel.to_string();
    let again = parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}")).to_string();
    assert_eq!(text, again, "the print of {} does not survive parsing", kernel.name);
}
