//! Reading the text of graphs: the grammar is in [`crate::text`].
use crate::{
    DType, Dim, Graph, Op, Sym, Tensor, TensorType, Value,
    attr::split_top,
    dim::parse_dim,
    tensor::{count_of, parse_scalar},
    text::is_word,
};
use std::collections::BTreeMap;

/// A text that is no graph.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct ParseError {
    /// Line, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

/// Constants that a text refers to, by name.
type Constants<'a> = &'a dyn Fn(&str) -> Option<Tensor>;

/// Most graphs inside one another.
const MAX_DEPTH: usize = 32;
/// Longest op with its attributes, and longest type.
const MAX_TEXT: usize = 1 << 14;

/// The graph that a text describes. `constants` gives the tensors that it refers to by name; a text of
/// [`crate::text::print_full`] needs none.
pub fn parse(text: &str, constants: &dyn Fn(&str) -> Option<Tensor>) -> Result<Graph, ParseError> {
    let mut p = Parser { text, at: 0, symbols: BTreeMap::new(), constants };
    let graph = p.graph(0).and_then(|g| {
        p.space();
        if p.rest().is_empty() { Ok(g) } else { Err("text after the graph".to_string()) }
    });
    graph.map_err(|reason| ParseError { line: 1 + text[..p.at].matches('\n').count(), reason })
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    symbols: BTreeMap<String, Sym>,
    constants: Constants<'a>,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    /// Skips white space and comments.
    fn space(&mut self) {
        loop {
            let rest = self.rest();
            self.at += rest.len() - rest.trim_start().len();
            if !self.rest().starts_with(';') {
                return;
            }
            self.at += self.rest().find('\n').unwrap_or(self.rest().len());
        }
    }

    fn eat(&mut self, token: &str) -> bool {
        self.space();
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    /// A comma on this line, before any comment.
    fn comma(&mut self) -> bool {
        let found = self.rest().trim_start_matches(' ').starts_with(',');
        found && self.eat(",")
    }

    fn expect(&mut self, token: &str) -> Result<(), String> {
        if self.eat(token) {
            return Ok(());
        }
        let found: String = self.rest().chars().take(20).take_while(|c| *c != '\n').collect();
        Err(format!("expected `{token}` at `{found}`"))
    }

    /// The longest prefix of characters that `test` holds for.
    fn take(&mut self, test: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c| !test(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn word(&mut self, what: &str) -> Result<&'a str, String> {
        self.space();
        let word = self.take(|c| c.is_ascii_alphanumeric() || "_.:".contains(c));
        if word.is_empty() { Err(format!("expected {what}")) } else { Ok(word) }
    }

    /// A word, or any text in quotes.
    fn name(&mut self, what: &str) -> Result<String, String> {
        if self.rest().starts_with('"') {
            return self.quoted();
        }
        let word = self.take(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.');
        if is_word(word) { Ok(word.to_string()) } else { Err(format!("expected {what}, got `{word}`")) }
    }

    fn quoted(&mut self) -> Result<String, String> {
        self.expect("\"")?;
        let mut out = String::new();
        let mut chars = self.rest().char_indices();
        while let Some((i, c)) = chars.next() {
            match c {
                '"' => {
                    self.at += i + 1;
                    return Ok(out);
                }
                '\n' => break,
                '\\' => match chars.next().map(|(_, c)| c) {
                    Some('n') => out.push('\n'),
                    Some('u') => {
                        let hex: String = chars.by_ref().map(|(_, c)| c).skip_while(|c| *c == '{').take_while(|c| *c != '}').take(8).collect();
                        let c = u32::from_str_radix(&hex, 16).ok().and_then(char::from_u32);
                        out.push(c.ok_or_else(|| format!("`{hex}` is no character"))?);
                    }
                    Some(c) => out.push(c),
                    None => break,
                },
                c => out.push(c),
            }
        }
        Err("a quoted text without end".into())
    }

    /// From `[` to the `]` that closes it, both included; empty if there is no `[`.
    fn bracketed(&mut self) -> Result<&'a str, String> {
        let rest = self.rest();
        if !rest.starts_with('[') {
            return Ok("");
        }
        let mut depth = 0usize;
        for (i, c) in rest.char_indices().take(MAX_TEXT) {
            match c {
                '[' => depth += 1,
                ']' => depth -= 1,
                '\n' => break,
                _ => {}
            }
            if depth == 0 {
                self.at += i + 1;
                return Ok(&rest[..=i]);
            }
        }
        Err("a bracket without end, or too far from it".into())
    }

    fn ty(&mut self) -> Result<TensorType, String> {
        let dtype: DType = self.word("a dtype")?.parse()?;
        let dims = self.bracketed()?;
        let dims = dims.strip_prefix('[').and_then(|d| d.strip_suffix(']')).ok_or_else(|| format!("expected the extents of {dtype}[...]"))?;
        let symbol = |name: &str| self.symbols.get(name).cloned();
        let shape: Result<Vec<Dim>, String> = split_top(dims, ',').into_iter().map(|d| parse_dim(d, &symbol)).collect();
        Ok(TensorType { dtype, shape: shape? })
    }

    /// `n in 1.., m in 0..=64`.
    fn symbol_bounds(&mut self) -> Result<(), String> {
        loop {
            self.space();
            let name = self.take(|c| c.is_alphanumeric() || "_.:#".contains(c)).to_string();
            if !is_symbol(&name) {
                return Err(format!("`{name}` cannot name a size"));
            }
            self.expect("in")?;
            let min = self.integer()?;
            self.expect("..")?;
            let max = if self.eat("=") { Some(self.integer()?) } else { None };
            let sym = Sym { name: name.as_str().into(), min, max };
            if self.symbols.insert(name.clone(), sym).is_some() {
                return Err(format!("`{name}` is bounded twice"));
            }
            if !self.eat(",") {
                return Ok(());
            }
        }
    }

    fn integer(&mut self) -> Result<i64, String> {
        self.space();
        let digits = self.take(|c| c.is_ascii_digit() || c == '-');
        digits.parse().map_err(|_| format!("`{digits}` is not a 64-bit integer"))
    }

    fn graph(&mut self, depth: usize) -> Result<Graph, String> {
        if depth > MAX_DEPTH {
            return Err(format!("more than {MAX_DEPTH} graphs inside one another"));
        }
        self.expect("graph")?;
        self.expect("@")?;
        let mut graph = Graph::new(self.name("the name of the graph")?);
        let mut values: BTreeMap<String, Value> = BTreeMap::new();
        // Inputs may use symbols whose bounds come after them.
        if depth == 0 {
            let start = self.at;
            self.skip_inputs()?;
            if self.eat("where") {
                self.symbol_bounds()?;
            }
            self.at = start;
        }
        self.expect("(")?;
        while !self.eat(")") {
            self.expect("%")?;
            let name = self.name("the name of an input")?;
            self.expect(":")?;
            let ty = self.ty()?;
            let value = graph.input(name.clone(), ty);
            if values.insert(input_key(&name), value).is_some() {
                return Err(format!("two inputs are named `{name}`"));
            }
            if !self.eat(",") {
                self.expect(")")?;
                break;
            }
        }
        if depth == 0 && self.eat("where") {
            self.symbols.clear();
            self.symbol_bounds()?;
        }
        self.expect("{")?;
        while !self.eat("return") {
            self.node(&mut graph, &mut values, depth)?;
        }
        while self.eat("%") {
            let value = self.value(&graph, &values)?;
            self.expect("as")?;
            self.space();
            let name = self.quoted()?;
            graph.output(name, value);
            if !self.eat(",") {
                break;
            }
        }
        self.expect("}")?;
        Ok(graph)
    }

    /// Moves past `(...)`, quoted names and all.
    fn skip_inputs(&mut self) -> Result<(), String> {
        self.expect("(")?;
        let mut depth = 1usize;
        while depth > 0 {
            self.space();
            match self.rest().chars().next() {
                Some('"') => drop(self.quoted()?),
                Some(c) => {
                    depth = if c == '(' { depth + 1 } else { depth - usize::from(c == ')') };
                    self.at += c.len_utf8();
                }
                None => return Err("the inputs have no end".into()),
            }
        }
        Ok(())
    }

    /// A value, after its `%`.
    fn value(&mut self, graph: &Graph, values: &BTreeMap<String, Value>) -> Result<Value, String> {
        let name =
            if self.rest().starts_with('"') { input_key(&self.quoted()?) } else { key(self.take(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.')) };
        let value = *values.get(&name).ok_or_else(|| format!("%{} is not defined before its use", name.trim_start_matches('%')))?;
        if !self.rest().starts_with('#') {
            return Ok(value);
        }
        self.at += 1;
        let digits = self.take(|c| c.is_ascii_digit());
        let result = digits.parse().ok().filter(|r: &u32| (*r as usize) < graph[value.node].types.len());
        result.map(|result| Value { result, ..value }).ok_or_else(|| format!("%{} has no result {digits}", name.trim_start_matches('%')))
    }

    fn node(&mut self, graph: &mut Graph, values: &mut BTreeMap<String, Value>, depth: usize) -> Result<(), String> {
        self.expect("%")?;
        let number = key(self.take(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.'));
        if number == input_key("") || values.contains_key(&number) {
            return Err(format!("expected a new number or name after `%`, got `{number}`"));
        }
        let results = if self.eat(":") { self.integer()? } else { 1 };
        self.expect("=")?;
        self.space();
        let start = self.at;
        let mnemonic = self.word("an op")?;
        let node = if mnemonic == "const" {
            let ty = self.ty()?;
            graph.constant(self.constant(&ty)?).node
        } else {
            self.bracketed()?;
            let op = Op::parse(&self.text[start..self.at], &|name| self.symbols.get(name).cloned()).map_err(|e| e.to_string())?;
            let mut operands = vec![];
            while self.eat("%") {
                operands.push(self.value(graph, values)?);
                if !self.eat(",") {
                    break;
                }
            }
            let mut bodies = vec![];
            if self.eat("{") {
                while !self.eat("}") {
                    bodies.push(self.graph(depth + 1)?);
                }
            }
            self.expect(":")?;
            // A node without results has no types either.
            let mut declared = vec![];
            while declared.is_empty() && results > 0 || self.comma() {
                declared.push(self.ty()?);
            }
            let node = graph.add_with(op, &operands, bodies).map_err(|e| e.to_string())?;
            let inferred = &graph[node].types;
            if declared != *inferred {
                let list = |types: &[TensorType]| types.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                return Err(format!("declared {}, inferred {}", list(&declared), list(inferred)));
            }
            node
        };
        if usize::try_from(results) != Ok(graph[node].types.len()) {
            return Err(format!("%{number} has {} results, not {results}", graph[node].types.len()));
        }
        values.insert(number, node.into());
        let source = self.source()?;
        graph.set_source(node, source);
        Ok(())
    }

    /// The names after `; from`, on this line.
    fn source(&mut self) -> Result<Vec<String>, String> {
        let mut names = vec![];
        let line = self.rest().split('\n').next().unwrap_or_default();
        if let Some(rest) = line.trim_start().strip_prefix(';').and_then(|l| l.trim_start().strip_prefix("from \"")) {
            self.at += line.len() - rest.len() - 1;
            names.push(self.quoted()?);
            while self.rest().starts_with(',') {
                self.at += 1;
                names.push(self.quoted()?);
            }
        }
        Ok(names)
    }

    fn constant(&mut self, ty: &TensorType) -> Result<Tensor, String> {
        let shape = ty.const_shape().ok_or_else(|| format!("a constant of unknown shape: {ty}"))?;
        let count = count_of(&shape).ok_or_else(|| format!("{ty} has too many elements"))?;
        if self.eat("{") {
            let mut values = vec![];
            while !self.eat("}") {
                let value = self.take(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
                values.push(parse_scalar(value, ty.dtype)?);
                if !self.eat(",") {
                    self.expect("}")?;
                    break;
                }
            }
            if values.len() != count {
                return Err(format!("{ty} has {count} elements, got {}", values.len()));
            }
            return Ok(Tensor::from_scalars(ty.dtype, shape, values));
        }
        if self.eat("hex\"") {
            let digits = self.take(|c| c.is_ascii_hexdigit());
            self.expect("\"")?;
            let bytes: Vec<u8> = digits.as_bytes().chunks_exact(2).filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect();
            let whole = if digits.len().is_multiple_of(2) { Ok(()) } else { Err("an odd number of hexadecimal digits".to_string()) };
            return whole.and_then(|()| Tensor::new(ty.dtype, shape, bytes).map_err(|e| e.to_string()));
        }
        self.expect("@")?;
        let key = self.name("the name of a constant")?;
        self.expect("hash=")?;
        let hash = self.take(|c| c.is_ascii_hexdigit());
        let tensor = (self.constants)(&key).ok_or_else(|| format!("there is no constant @{key}"))?;
        if tensor.ty() != *ty || format!("{:016x}", tensor.content_hash()) != hash {
            return Err(format!("constant @{key} is another: {} with hash {:016x}", tensor.ty(), tensor.content_hash()));
        }
        Ok(tensor)
    }
}

/// What a value is called in the table: numbers are nodes, words are inputs or, in text written by hand, nodes.
fn key(name: &str) -> String {
    if !name.is_empty() && name.chars().all(|c| c.is_ascii_digit()) { name.to_string() } else { input_key(name) }
}

/// Inputs and numbered nodes share one table.
fn input_key(name: &str) -> String {
    format!("%{name}")
}

/// Whether a name can stand in a size expression.
pub(crate) fn is_symbol(name: &str) -> bool {
    !name.is_empty() && !name.starts_with(|c: char| c.is_ascii_digit()) && name.chars().all(|c| c.is_alphanumeric() || "_.:#".contains(c))
}
