//! What a converter sees: one node, its operands and attributes, and the builder.
use super::{
    build::{Builder, Res, Val, invalid, missing},
    import::Importer,
    tensors::Unread,
};
use onnx_protobuf::{AttributeProto, GraphProto, NodeProto};
use pavage_ir::{DType, Dim, Tensor};
use std::{
    collections::BTreeMap,
    ops::{Deref, DerefMut},
};

/// Attributes by name.
#[derive(Clone, Default)]
pub(crate) struct Attrs<'m>(pub(crate) BTreeMap<&'m str, &'m AttributeProto>);

/// One node being converted.
pub(crate) struct Cx<'c, 'm> {
    pub(crate) imp: &'c mut Importer<'m>,
    pub(crate) node: &'m NodeProto,
    pub(crate) attrs: Attrs<'m>,
    /// Operands; those left out are `None`.
    pub(crate) inputs: Vec<Option<Val>>,
    /// The operator set version that defines the operator's form here.
    pub(crate) since: i64,
    /// The node's name, made up if it has none.
    pub(crate) name: String,
}

impl Deref for Cx<'_, '_> {
    type Target = Builder;
    fn deref(&self) -> &Builder {
        &self.imp.b
    }
}

impl DerefMut for Cx<'_, '_> {
    fn deref_mut(&mut self) -> &mut Builder {
        &mut self.imp.b
    }
}

impl<'m> Cx<'_, 'm> {
    /// Operand `i`, which must be given and be a tensor.
    pub(crate) fn arg(&self, i: usize) -> Res<Val> {
        let v = self.any(i)?;
        if self.composite(v).is_some() { missing("a sequence or an optional as operand") } else { Ok(v) }
    }

    /// Operand `i`, which must be given: a tensor, a sequence or an optional.
    pub(crate) fn any(&self, i: usize) -> Res<Val> {
        self.opt(i).map_or_else(|| invalid(format!("operand {i} is missing")), Ok)
    }

    /// Operand `i`, if given.
    pub(crate) fn opt(&self, i: usize) -> Option<Val> {
        self.inputs.get(i).copied().flatten()
    }

    /// All operands, which must be given.
    pub(crate) fn args(&self) -> Res<Vec<Val>> {
        (0..self.inputs.len()).map(|i| self.arg(i)).collect()
    }

    /// Whether output `i` is named, so that someone may read it.
    pub(crate) fn wants(&self, i: usize) -> bool {
        self.node.output.get(i).is_some_and(|o| !o.is_empty())
    }

    fn attr(&self, name: &str, code: i32) -> Res<Option<&'m AttributeProto>> {
        match self.attrs.0.get(name) {
            Some(a) if a.type_.value() == code || a.type_.value() == 0 => Ok(Some(a)),
            Some(_) => invalid(format!("attribute `{name}` has the wrong type")),
            None => Ok(None),
        }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.attrs.0.contains_key(name)
    }

    pub(crate) fn float(&self, name: &str, default: f64) -> Res<f64> {
        Ok(self.attr(name, 1)?.map_or(default, |a| f64::from(a.f)))
    }

    pub(crate) fn int_opt(&self, name: &str) -> Res<Option<i64>> {
        Ok(self.attr(name, 2)?.map(|a| a.i))
    }

    pub(crate) fn int(&self, name: &str, default: i64) -> Res<i64> {
        Ok(self.int_opt(name)?.unwrap_or(default))
    }

    pub(crate) fn flag(&self, name: &str, default: bool) -> Res<bool> {
        Ok(self.int(name, i64::from(default))? != 0)
    }

    pub(crate) fn text(&self, name: &str, default: &str) -> Res<String> {
        match self.attr(name, 3)? {
            Some(a) => String::from_utf8(a.s.clone()).or_else(|_| invalid(format!("attribute `{name}` is not UTF-8"))),
            None => Ok(default.into()),
        }
    }

    pub(crate) fn floats(&self, name: &str) -> Res<Option<&'m [f32]>> {
        Ok(self.attr(name, 6)?.map(|a| a.floats.as_slice()))
    }

    pub(crate) fn ints_opt(&self, name: &str) -> Res<Option<&'m [i64]>> {
        Ok(self.attr(name, 7)?.map(|a| a.ints.as_slice()))
    }

    /// Integers, each given or `default`; the count must be `n`.
    pub(crate) fn ints_of(&self, name: &str, n: usize, default: i64) -> Res<Vec<i64>> {
        match self.ints_opt(name)? {
            Some(v) if v.len() == n => Ok(v.to_vec()),
            Some(v) => invalid(format!("attribute `{name}` has {} entries, {n} are needed", v.len())),
            None => Ok(vec![default; n]),
        }
    }

    pub(crate) fn strings(&self, name: &str) -> Res<Option<Vec<String>>> {
        let strings = self.attr(name, 8)?.map(|a| a.strings.iter().map(|s| String::from_utf8_lossy(s).into_owned()).collect());
        Ok(strings)
    }

    pub(crate) fn tensor_attr(&self, name: &str) -> Res<Option<Tensor>> {
        match self.attr(name, 4)? {
            Some(a) => match self.imp.files().tensor(&a.t) {
                Ok(t) => Ok(Some(t)),
                Err(Unread::Text) => missing("string elements"),
                Err(Unread::Dtype(what)) => missing(what),
                Err(Unread::Wrong(e)) => super::import::fail(e),
            },
            None => Ok(None),
        }
    }

    pub(crate) fn graph_attr(&self, name: &str) -> Res<&'m GraphProto> {
        match self.attr(name, 5)?.and_then(|a| a.g.as_ref()) {
            Some(g) => Ok(g),
            None => invalid(format!("attribute `{name}` is missing")),
        }
    }

    /// An element type attribute.
    pub(crate) fn dtype_attr(&self, name: &str) -> Res<Option<DType>> {
        match self.int_opt(name)? {
            Some(code) => match super::tensors::dtype_of(i32::try_from(code).unwrap_or(-1)) {
                Ok(DType::Str) => missing("string elements"),
                Ok(d) => Ok(Some(d)),
                Err(what) => missing(what),
            },
            None => Ok(None),
        }
    }

    /// An axis of a value of this rank; negative ones count from the end.
    pub(crate) fn axis(&self, axis: i64, rank: usize) -> Res<usize> {
        let n = rank as i64;
        if (-n..n).contains(&axis) {
            Ok((if axis < 0 { axis + n } else { axis }) as usize)
        } else {
            invalid(format!("axis {axis} of a value with {rank} axes"))
        }
    }

    /// Axes, normalised, sorted; duplicates are an error.
    pub(crate) fn axes(&self, axes: &[i64], rank: usize) -> Res<Vec<usize>> {
        let mut out = axes.iter().map(|a| self.axis(*a, rank)).collect::<Res<Vec<_>>>()?;
        out.sort_unstable();
        if out.windows(2).any(|w| w[0] == w[1]) {
            return invalid(format!("axes {axes:?} name one twice"));
        }
        Ok(out)
    }

    /// The integers of an operand, where they are known.
    pub(crate) fn known_ints(&self, i: usize) -> Option<Vec<i64>> {
        self.opt(i).and_then(|v| self.dims(v))?.iter().map(Dim::as_const).collect()
    }

    /// Operand `i`, if it is given and its integers are computed from data.
    pub(crate) fn data(&self, i: usize) -> Option<Val> {
        self.opt(i).filter(|_| self.known_ints(i).is_none())
    }

    /// The integers of an operand that must be constant.
    pub(crate) fn const_ints(&self, i: usize, what: &str) -> Res<Option<Vec<i64>>> {
        let Some(v) = self.opt(i) else { return Ok(None) };
        match self.dims(v).map(|dims| dims.iter().map(|d| d.as_const()).collect::<Option<Vec<_>>>()) {
            Some(Some(ints)) => Ok(Some(ints)),
            _ => missing(format!("{what} that are computed from data")),
        }
    }
}
