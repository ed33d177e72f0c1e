//! From `GraphProto`s to a [`Graph`]: order, names, scopes, functions, bodies, and the list of problems.
use super::{
    Options,
    build::{Builder, Frame, Relations, Res, Stop, Val},
    cx::{Attrs, Cx},
    ops::sequence,
    order,
    registry::{self, Found},
    scope,
    tensors::{Files, Unread, dtype_of},
};
use crate::{Error, Problem};
use onnx_protobuf::{FunctionProto, GraphProto, ModelProto, NodeProto, TypeProto, ValueInfoProto};
use pavage_ir::{Dim, Graph, NodeId, NodeKind, TensorType};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Oldest and newest operator set of the default domain that is read.
pub(crate) const OPSETS: std::ops::RangeInclusive<i64> = 1..=28;
/// Deepest nesting of bodies and function calls.
const MAX_DEPTH: usize = 48;
/// Most nodes converted, counting those of functions at every call.
const MAX_NODES: usize = 1 << 21;

/// What a name stands for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Entry {
    Val(Val),
    /// An operand that a function call leaves out.
    Absent,
    /// Text, or something computed from text: left out where it is an output.
    Text,
    /// Something that could not be imported; the problem is on the list.
    Unknown,
}

struct Scope {
    names: HashMap<String, Entry>,
    /// Whether outer names are invisible: functions.
    sealed: bool,
}

/// Turns a body's results into the outputs of its graph.
pub(crate) type Finish<'a> = dyn FnMut(&mut Builder, Vec<Val>) -> Res<Vec<Val>> + 'a;

/// One import, from its inputs on.
pub(crate) struct Importer<'m> {
    pub(crate) b: Builder,
    files: &'m Files,
    options: &'m Options,
    functions: HashMap<(&'m str, &'m str, &'m str), &'m FunctionProto>,
    scopes: Vec<Scope>,
    /// Operator sets of the model or of the function being inlined, innermost last.
    opsets: Vec<BTreeMap<String, i64>>,
    /// Attributes of function calls being inlined, innermost last.
    calls: Vec<Attrs<'m>>,
    prefix: String,
    problems: Vec<Problem>,
    converted: usize,
    /// Outputs left out, and why.
    pub(crate) dropped: Vec<String>,
}

/// `ai.onnx` and the empty domain are one.
pub(crate) fn domain_of(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

fn show_domain(domain: &str) -> String {
    if domain.is_empty() { "ai.onnx".into() } else { domain.into() }
}

impl<'m> Importer<'m> {
    pub(crate) fn new(model: &'m ModelProto, files: &'m Files, options: &'m Options, relations: Relations) -> Result<Self, Error> {
        let functions = model.functions.iter().map(|f| ((domain_of(&f.domain), f.name.as_str(), f.overload.as_str()), f)).collect();
        let opsets: BTreeMap<String, i64> = model.opset_import.iter().map(|o| (domain_of(&o.domain).to_string(), o.version)).collect();
        let version = opsets.get("").copied();
        if let Some(version) = version.filter(|v| !OPSETS.contains(v)) {
            return Err(Error::Opset { domain: "ai.onnx".into(), version, least: *OPSETS.start(), most: *OPSETS.end() });
        }
        Ok(Self {
            b: Builder::new(relations),
            files,
            options,
            functions,
            scopes: vec![],
            opsets: vec![opsets],
            calls: vec![],
            prefix: String::new(),
            problems: vec![],
            converted: 0,
            dropped: vec![],
        })
    }

    /// Import the model's graph.
    pub(crate) fn run(&mut self, proto: &'m GraphProto) -> Res<Graph> {
        let name: String = proto.name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' }).collect();
        self.b.enter(Graph::new(if name.is_empty() { "main".into() } else { name }));
        self.scopes.push(Scope { names: HashMap::new(), sealed: true });
        self.inputs(proto)?;
        self.contents(proto)?;
        for output in &proto.output {
            match self.lookup(&output.name) {
                Some(Entry::Val(v)) => {
                    for (name, v) in sequence::ports(&mut self.b, &output.name, v)? {
                        let value = self.b.value(v)?;
                        self.b.frames[0].graph.output(name, value);
                    }
                }
                Some(Entry::Text) => self.dropped.push(format!("leaves out output `{}`: it holds or depends on strings", output.name)),
                Some(_) => {}
                None => return fail(Error::Undefined { reader: "the graph's output list".into(), name: output.name.clone() }),
            }
        }
        self.attribute("");
        if !self.problems.is_empty() {
            return fail(Error::Unsupported(std::mem::take(&mut self.problems)));
        }
        if self.b.frames[0].graph.outputs.is_empty() {
            return fail(Error::Format { format: "ONNX", reason: "the graph has no outputs, or only strings".into() });
        }
        let mut graph = self.b.leave().graph;
        // Sequences and optionals have ports of their own, so inputs are looked at as well.
        let named = |id: &NodeId| match &graph[*id].kind {
            NodeKind::Input(name) => Some(name),
            _ => None,
        };
        let ports: [Vec<&String>; 2] = [graph.inputs().iter().filter_map(named).collect(), graph.outputs.iter().map(|o| &o.name).collect()];
        for names in ports {
            let mut seen = BTreeSet::new();
            if let Some(twice) = names.into_iter().find(|name| !seen.insert(*name)) {
                return fail(Error::Duplicate(twice.clone()));
            }
        }
        graph.prune();
        // Nothing was ever put into a sequence whose elements have a rank that is still unknown.
        let made_up = |s: &String| self.b.ranks.contains(s) && !self.b.input_symbols.contains(s);
        let open: Vec<String> = graph.symbols().iter().map(|s| s.name.to_string()).filter(made_up).collect();
        if !open.is_empty() {
            self.b.relations.equal.extend(open.into_iter().map(|s| (s, Dim::ZERO)));
            return Err(Stop::Retry);
        }
        Ok(graph)
    }

    fn inputs(&mut self, proto: &'m GraphProto) -> Res<()> {
        let defaults: std::collections::HashSet<&str> = proto.initializer.iter().map(|t| t.name.as_str()).collect();
        let sizes =
            self.options.shapes.iter().map(|(k, v)| (k, *v)).chain(self.options.input_shapes.iter().flat_map(|(k, vs)| vs.iter().map(move |v| (k, *v))));
        if let Some((name, size)) = sizes.into_iter().find(|(_, v)| *v < 1) {
            return fail(Error::Request(format!("sizes are at least 1; the one given for `{name}` is {size}")));
        }
        let mut symbols: BTreeMap<String, String> = BTreeMap::new();
        let mut fixed: BTreeMap<String, bool> = self.options.shapes.keys().map(|k| (k.clone(), false)).collect();
        let mut known_inputs = vec![];
        for input in &proto.input {
            // Old models list initializers as inputs too: those are defaults.
            if defaults.contains(input.name.as_str()) {
                continue;
            }
            known_inputs.push(input.name.as_str());
            if let Some(composite) = sequence::declared(&input.type_) {
                match sequence::input(&mut self.b, &input.name, &composite) {
                    Ok(v) => self.define(&input.name, Entry::Val(v))?,
                    Err(Stop::Missing(what)) => {
                        self.problem("graph input", "", &input.name, what);
                        self.define(&input.name, Entry::Unknown)?;
                    }
                    Err(e) => return Err(e),
                }
                continue;
            }
            let (dtype, dims) = match self.declared(input) {
                Ok(declared) => declared,
                Err(what) => {
                    self.problem("graph input", "", &input.name, what);
                    self.define(&input.name, Entry::Unknown)?;
                    continue;
                }
            };
            let given = self.options.input_shapes.get(&input.name);
            if let Some(given) = given.filter(|g| g.len() != dims.len()) {
                return fail(Error::Request(format!("input `{}` has {} axes, the shape given for it has {}", input.name, dims.len(), given.len())));
            }
            let mut shape = vec![];
            for (axis, dim) in dims.iter().enumerate() {
                let fresh = format!("{}_{axis}", input.name);
                let dim = match dim {
                    Declared::Size(v) => Dim::from(*v),
                    Declared::Named(name) => {
                        let symbol = match symbols.get(name) {
                            Some(symbol) => symbol.clone(),
                            None => {
                                let symbol = self.b.unique_symbol(name);
                                symbols.insert(name.clone(), symbol.clone());
                                symbol
                            }
                        };
                        self.fix(&symbol, &[name, &symbol], &mut fixed);
                        Dim::sym(&symbol)
                    }
                    Declared::Free => {
                        let symbol = self.b.unique_symbol(&fresh);
                        self.fix(&symbol, &[&symbol], &mut fixed);
                        Dim::sym(&symbol)
                    }
                };
                let mut dim = self.b.relations.resolve(&dim);
                if let Some(size) = given.map(|g| g[axis]) {
                    let symbol = dim.symbols().first().map(|s| s.name.to_string());
                    match (symbol, dim.as_const()) {
                        (_, Some(v)) if v == size => {}
                        (Some(symbol), _) if dim == Dim::sym(&symbol) => {
                            self.b.relations.equal.insert(symbol, Dim::from(size));
                            dim = Dim::from(size);
                        }
                        _ => return fail(Error::Request(format!("input `{}` axis {axis} is {dim}, the shape given for it says {size}", input.name))),
                    }
                }
                shape.push(dim);
            }
            for s in shape.iter().flat_map(Dim::symbols) {
                self.b.input_symbols.insert(s.name.to_string());
            }
            let v = self.b.input(&input.name, TensorType { dtype, shape });
            self.define(&input.name, Entry::Val(v))?;
        }
        if let Some((name, _)) = fixed.iter().find(|(_, used)| !**used) {
            let known: Vec<&str> = symbols.keys().map(String::as_str).collect();
            return fail(Error::Request(format!("no size is called `{name}`; this model has: {}", known.join(", "))));
        }
        if let Some(name) = self.options.input_shapes.keys().find(|n| !known_inputs.contains(&n.as_str())) {
            return fail(Error::Request(format!("no input is called `{name}`; this model has: {}", known_inputs.join(", "))));
        }
        Ok(())
    }

    /// Apply `--shape name=v` under any of the names a symbol goes by.
    fn fix(&mut self, symbol: &str, names: &[&str], fixed: &mut BTreeMap<String, bool>) {
        for name in names {
            if let (Some(used), Some(v)) = (fixed.get_mut(*name), self.options.shapes.get(*name)) {
                *used = true;
                self.b.relations.equal.insert(symbol.to_string(), Dim::from(*v));
            }
        }
    }

    fn declared(&self, input: &ValueInfoProto) -> Result<(pavage_ir::DType, Vec<Declared>), String> {
        let ty: &TypeProto = &input.type_;
        if ty.has_sequence_type() || ty.has_map_type() || ty.has_optional_type() || ty.has_sparse_tensor_type() {
            return Err("inputs that are not tensors".into());
        }
        let tensor = ty.tensor_type();
        let dtype = dtype_of(tensor.elem_type)?;
        if dtype == pavage_ir::DType::Str {
            return Err("string inputs".into());
        }
        let Some(shape) = tensor.shape.as_ref() else {
            return match self.options.input_shapes.get(&input.name) {
                Some(given) => Ok((dtype, vec![Declared::Free; given.len()])),
                None => Err("inputs of unknown rank (give `--shape NAME=1x2x3`)".into()),
            };
        };
        let dims = shape.dim.iter().map(|d| match d.dim_param() {
            "" if d.has_dim_value() && d.dim_value() >= 0 => Declared::Size(d.dim_value()),
            "" | "?" | "None" | "unk" => Declared::Free,
            name => Declared::Named(name.to_string()),
        });
        Ok((dtype, dims.collect()))
    }

    /// Initializers, then nodes, of one graph into the innermost scope.
    pub(crate) fn contents(&mut self, proto: &'m GraphProto) -> Res<()> {
        for tensor in &proto.initializer {
            let entry = match self.files.tensor(tensor) {
                Ok(t) => Entry::Val(self.b.constant(t)),
                Err(Unread::Text) => Entry::Text,
                Err(Unread::Dtype(what)) => {
                    self.problem("initializer", "", &tensor.name, what);
                    Entry::Unknown
                }
                Err(Unread::Wrong(e)) => return fail(e),
            };
            self.define(&tensor.name, entry)?;
        }
        for sparse in &proto.sparse_initializer {
            self.problem("initializer", "", &sparse.values.name, "sparse tensors".into());
            self.define(&sparse.values.name, Entry::Unknown)?;
        }
        self.nodes(&proto.node)
    }

    fn nodes(&mut self, nodes: &'m [NodeProto]) -> Res<()> {
        for index in order::topological(nodes).map_err(Stop::Fail)? {
            self.node(&nodes[index], index)?;
        }
        Ok(())
    }

    fn node(&mut self, node: &'m NodeProto, index: usize) -> Res<()> {
        self.converted += 1;
        if self.converted > MAX_NODES {
            return fail(Error::Limit(format!("the model has more than {MAX_NODES} nodes, counting functions at every call")));
        }
        let plain = if node.name.is_empty() { format!("{}_{index}", node.op_type) } else { node.name.clone() };
        let name = format!("{}{plain}", self.prefix);
        let mut inputs = vec![];
        let (mut unknown, mut text) = (false, false);
        for input in &node.input {
            inputs.push(match self.lookup(input) {
                _ if input.is_empty() => None,
                Some(Entry::Val(v)) => Some(v),
                Some(Entry::Absent) => None,
                Some(Entry::Text) => {
                    text = true;
                    None
                }
                Some(Entry::Unknown) => {
                    unknown = true;
                    None
                }
                None => return fail(Error::Undefined { reader: format!("node `{name}` ({})", node.op_type), name: input.clone() }),
            });
        }
        if text && !unknown {
            for output in node.output.iter().filter(|o| !o.is_empty()) {
                self.define(output, Entry::Text)?;
            }
            return Ok(());
        }
        let outcome = if unknown { self.survey(node, &name) } else { self.convert(node, &name, inputs).and_then(|vals| self.b.guard(vals, &name)) };
        self.attribute(&name);
        let vals = match outcome {
            Ok(vals) => vals,
            Err(Stop::Missing(what)) => {
                self.problem(&node.op_type, domain_of(&node.domain), &name, what);
                vec![]
            }
            Err(Stop::Recorded) => vec![],
            Err(Stop::Invalid(reason)) => return fail(Error::Node { node: name, op: node.op_type.clone(), reason }),
            Err(stop) => return Err(stop),
        };
        for (i, output) in node.output.iter().enumerate().filter(|(_, o)| !o.is_empty()) {
            let entry = match vals.get(i) {
                Some(v) if self.b.dtype(*v) == pavage_ir::DType::Str => Entry::Text,
                Some(v) => Entry::Val(*v),
                None => Entry::Unknown,
            };
            self.define(output, entry)?;
            if vals.get(i).is_none() && !vals.is_empty() {
                self.problem(&node.op_type, domain_of(&node.domain), &name, format!("output {i}"));
            }
        }
        Ok(())
    }

    fn convert(&mut self, node: &'m NodeProto, name: &str, inputs: Vec<Option<Val>>) -> Res<Vec<Val>> {
        let domain = domain_of(&node.domain);
        if let Some(function) = self.functions.get(&(domain, node.op_type.as_str(), node.overload.as_str())).copied() {
            return self.inline(function, node, name, &inputs);
        }
        let (row, since) = self.find(domain, &node.op_type)?;
        let attrs = self.attrs(node)?;
        (row.convert)(&mut Cx { imp: self, node, attrs, inputs, since, name: name.to_string() })
    }

    /// A node that cannot be converted because its operands could not: is it known at all?
    fn survey(&mut self, node: &'m NodeProto, name: &str) -> Res<Vec<Val>> {
        let domain = domain_of(&node.domain);
        if !self.functions.contains_key(&(domain, node.op_type.as_str(), node.overload.as_str())) {
            self.find(domain, &node.op_type)?;
        }
        for graph in node.attribute.iter().flat_map(|a| a.g.iter().chain(&a.graphs)) {
            self.deeper(|imp| {
                for (i, inner) in graph.node.iter().enumerate() {
                    let inner_name = if inner.name.is_empty() { format!("{name}/{}_{i}", inner.op_type) } else { inner.name.clone() };
                    if let Err(Stop::Missing(what)) = imp.survey(inner, &inner_name) {
                        imp.problem(&inner.op_type, domain_of(&inner.domain), &inner_name, what);
                    }
                }
                Ok(())
            })?;
        }
        Err(Stop::Recorded)
    }

    fn find(&self, domain: &str, op: &str) -> Res<(&'static registry::Row, i64)> {
        match registry::find(domain, op, self.opset(domain)) {
            Found::Row(row, since) => Ok((row, since)),
            Found::TooOld(least) => Err(Stop::Missing(format!("the form it had before operator set {least}"))),
            Found::None if !registry::knows_domain(domain) => Err(Stop::Missing(format!("the operator domain `{domain}`"))),
            Found::None => Err(Stop::Missing("the operator".into())),
        }
    }

    pub(crate) fn opset(&self, domain: &str) -> i64 {
        self.opsets.last().and_then(|o| o.get(domain)).copied().unwrap_or(1)
    }

    /// A node's attributes, references to those of the calling function resolved.
    fn attrs(&self, node: &'m NodeProto) -> Res<Attrs<'m>> {
        let mut attrs = Attrs::default();
        for attr in &node.attribute {
            let found = if attr.ref_attr_name.is_empty() { Some(attr) } else { self.calls.last().and_then(|c| c.0.get(attr.ref_attr_name.as_str()).copied()) };
            if let Some(found) = found
                && attrs.0.insert(attr.name.as_str(), found).is_some()
            {
                return Err(Stop::Invalid(format!("attribute `{}` is given twice", attr.name)));
            }
        }
        Ok(attrs)
    }

    /// One level deeper in bodies and calls.
    fn deeper<T>(&mut self, f: impl FnOnce(&mut Self) -> Res<T>) -> Res<T> {
        if self.scopes.len() + self.calls.len() > MAX_DEPTH {
            return fail(Error::Limit(format!("bodies and functions nest more than {MAX_DEPTH} deep")));
        }
        self.scopes.push(Scope { names: HashMap::new(), sealed: false });
        let out = f(self);
        self.scopes.pop();
        out
    }

    fn inline(&mut self, function: &'m FunctionProto, node: &'m NodeProto, name: &str, inputs: &[Option<Val>]) -> Res<Vec<Val>> {
        let mut attrs = Attrs(function.attribute_proto.iter().map(|a| (a.name.as_str(), a)).collect());
        attrs.0.extend(self.attrs(node)?.0);
        let mut opsets: BTreeMap<String, i64> = function.opset_import.iter().map(|o| (domain_of(&o.domain).to_string(), o.version)).collect();
        if opsets.is_empty() {
            opsets = self.opsets.last().cloned().unwrap_or_default();
        }
        let prefix = std::mem::replace(&mut self.prefix, format!("{name}/"));
        self.calls.push(attrs);
        self.opsets.push(opsets);
        let out = self.deeper(|imp| {
            if let Some(scope) = imp.scopes.last_mut() {
                scope.sealed = true;
            }
            for (i, formal) in function.input.iter().enumerate() {
                if let Some(v) = inputs.get(i).copied().flatten() {
                    imp.define(formal, Entry::Val(v))?;
                } else if let Some(scope) = imp.scopes.last_mut() {
                    scope.names.insert(formal.clone(), Entry::Absent);
                }
            }
            imp.nodes(&function.node)?;
            imp.results(&function.output)
        });
        self.calls.pop();
        self.opsets.pop();
        self.prefix = prefix;
        out
    }

    /// The values of names, or [`Stop::Recorded`] if one could not be imported.
    fn results(&mut self, names: &[String]) -> Res<Vec<Val>> {
        names
            .iter()
            .map(|name| match self.lookup(name) {
                Some(Entry::Val(v)) => Ok(v),
                Some(_) => Err(Stop::Recorded),
                None => fail(Error::Undefined { reader: "an output list".into(), name: name.clone() }),
            })
            .collect()
    }

    /// Import a body into the innermost graph, in a scope of its own.
    pub(crate) fn inline_body(&mut self, proto: &'m GraphProto) -> Res<Vec<Val>> {
        self.inline_with(proto, &[])
    }

    /// Import a body into the innermost graph, in a scope of its own, with values for its inputs.
    pub(crate) fn inline_with(&mut self, proto: &'m GraphProto, args: &[Val]) -> Res<Vec<Val>> {
        if proto.input.len() < args.len() {
            return Err(Stop::Invalid(format!("a body with {} inputs is given {}", proto.input.len(), args.len())));
        }
        self.deeper(|imp| {
            for (input, v) in proto.input.iter().zip(args) {
                imp.define(&input.name, Entry::Val(*v))?;
            }
            imp.contents(proto)?;
            let names: Vec<String> = proto.output.iter().map(|o| o.name.clone()).collect();
            imp.results(&names)
        })
    }

    /// Import a body as a graph of its own. Its declared inputs are what `formals` makes of inputs of these types;
    /// `captures` are made inputs after those, and what else it reads of enclosing graphs after them. `finish` turns its
    /// results into outputs, whose types come along.
    pub(crate) fn body(
        &mut self,
        proto: &'m GraphProto,
        name: &str,
        (inputs, formals): (&[TensorType], &mut Finish),
        captures: &[Val],
        finish: &mut Finish,
    ) -> Res<(Frame, Vec<TensorType>)> {
        self.b.enter(Graph::new(name));
        let depth = self.b.frames.len();
        let out = self.deeper(|imp| {
            let given: Vec<Val> = inputs.iter().enumerate().map(|(i, ty)| imp.b.input(&format!("input{i}"), ty.clone())).collect();
            let given = formals(&mut imp.b, given)?;
            if proto.input.len() > given.len() {
                return Err(Stop::Invalid(format!("body `{name}` has {} inputs, the node gives {}", proto.input.len(), given.len())));
            }
            for (formal, v) in proto.input.iter().zip(given).filter(|(formal, _)| !formal.name.is_empty()) {
                imp.define(&formal.name, Entry::Val(v))?;
            }
            for v in captures {
                imp.b.capture(*v);
            }
            imp.contents(proto)?;
            let names: Vec<String> = proto.output.iter().map(|o| o.name.clone()).collect();
            let vals = imp.results(&names)?;
            let vals = finish(&mut imp.b, vals)?;
            let mut types = vec![];
            for (i, v) in vals.into_iter().enumerate() {
                let value = imp.b.value(v)?;
                types.push(imp.b.ty(v).clone());
                let graph = &mut imp.b.frames[depth - 1].graph;
                graph.output(format!("out{i}"), value);
            }
            Ok(types)
        });
        let owner = format!("{}{name}", self.prefix);
        self.attribute(&owner);
        let frame = self.b.leave();
        Ok((frame, out?))
    }

    // Names.

    fn lookup(&self, name: &str) -> Option<Entry> {
        for scope in self.scopes.iter().rev() {
            if let Some(entry) = scope.names.get(name) {
                return Some(*entry);
            }
            if scope.sealed {
                break;
            }
        }
        None
    }

    fn define(&mut self, name: &str, entry: Entry) -> Res<()> {
        let scope = self.scopes.last_mut().expect("a scope is open");
        match scope.names.insert(name.to_string(), entry) {
            Some(_) => fail(Error::Duplicate(name.to_string())),
            None => Ok(()),
        }
    }

    /// Say which node of the model the nodes emitted since the last call stand for.
    pub(crate) fn attribute(&mut self, name: &str) {
        for (frame, id) in std::mem::take(&mut self.b.fresh) {
            if let Some(frame) = self.b.frames.get_mut(frame)
                && !name.is_empty()
            {
                frame.graph.set_source(id, vec![name.to_string()]);
            }
        }
    }

    fn problem(&mut self, op: &str, domain: &str, node: &str, missing: String) {
        let opset = self.opset(domain);
        let domain = show_domain(domain);
        match self.problems.iter_mut().find(|p| p.op == op && p.domain == domain && p.missing == missing) {
            Some(p) => {
                p.count += 1;
                if p.nodes.len() < 4 {
                    p.nodes.push(node.to_string());
                }
            }
            None => {
                let nearest = scope::nearest(&domain, op);
                self.problems.push(Problem { op: op.into(), domain, opset, count: 1, nodes: vec![node.into()], missing, nearest });
            }
        }
    }

    pub(crate) fn files(&self) -> &'m Files {
        self.files
    }
}

#[derive(Clone)]
enum Declared {
    Size(i64),
    Named(String),
    Free,
}

pub(crate) fn fail<T>(e: Error) -> Res<T> {
    Err(Stop::Fail(e))
}
