//! Attributes of ops: typed values that print and parse inside `op[name=value]`.
use crate::{
    DType, Dim,
    dim::{Atom, Env, Sym, parse_dim},
};
use std::fmt;

/// The symbols that a text declares, for parsing sizes.
pub type Symbols<'a> = &'a dyn Fn(&str) -> Option<Sym>;

/// An attribute type.
pub trait Attr: Sized + Clone {
    /// Print.
    fn show(&self) -> String;
    /// Parse what [`Attr::show`] prints.
    fn parse(text: &str, symbols: Symbols) -> Option<Self>;
    /// What an attribute that is not written is, where that is allowed; such a value shows as the empty text.
    fn absent() -> Option<Self> {
        None
    }
    /// Replace symbols by what `env` says.
    fn bind(&self, _env: &dyn Env) -> Self {
        self.clone()
    }
    /// Visit every size expression.
    fn dims(&self, _visit: &mut dyn FnMut(&Dim)) {}
}

macro_rules! plain_attr {
    ($($t:ty),*) => { $( impl Attr for $t {
        fn show(&self) -> String { self.to_string() }
        fn parse(text: &str, _: Symbols) -> Option<Self> { text.parse().ok() }
    } )* };
}
plain_attr!(bool, i64, usize, DType);

/// A float attribute: compared and hashed by its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Real(u64);

impl Real {
    /// From a float.
    pub fn new(v: f64) -> Self {
        Real(v.to_bits())
    }
    /// The float.
    pub fn get(self) -> f64 {
        f64::from_bits(self.0)
    }
}

impl Attr for Real {
    fn show(&self) -> String {
        crate::tensor::show(crate::Scalar::F(self.get()))
    }
    fn parse(text: &str, _: Symbols) -> Option<Self> {
        text.parse().ok().map(Real::new)
    }
}

impl Attr for Dim {
    fn show(&self) -> String {
        self.to_string()
    }
    fn parse(text: &str, symbols: Symbols) -> Option<Self> {
        parse_dim(text, symbols).ok()
    }
    fn bind(&self, env: &dyn Env) -> Self {
        Dim::bind(self, env)
    }
    fn dims(&self, visit: &mut dyn FnMut(&Dim)) {
        visit(self);
    }
}

impl Attr for Sym {
    fn show(&self) -> String {
        self.name.to_string()
    }
    fn parse(text: &str, symbols: Symbols) -> Option<Self> {
        symbols(text)
    }
    fn dims(&self, visit: &mut dyn FnMut(&Dim)) {
        visit(&Dim::from(Atom::Sym(self.clone())));
    }
}

/// Sizes that a control flow op defines; nothing is written where there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sizes(pub Vec<Sym>);

impl Attr for Sizes {
    fn show(&self) -> String {
        if self.0.is_empty() { String::new() } else { self.0.show() }
    }
    fn parse(text: &str, symbols: Symbols) -> Option<Self> {
        Vec::parse(text, symbols).map(Sizes)
    }
    fn absent() -> Option<Self> {
        Some(Sizes::default())
    }
    fn dims(&self, visit: &mut dyn FnMut(&Dim)) {
        self.0.dims(visit);
    }
}

impl<T: Attr> Attr for Vec<T> {
    fn show(&self) -> String {
        format!("[{}]", self.iter().map(Attr::show).collect::<Vec<_>>().join(","))
    }
    fn parse(text: &str, symbols: Symbols) -> Option<Self> {
        let inner = text.strip_prefix('[')?.strip_suffix(']')?;
        split_top(inner, ',').into_iter().map(|item| T::parse(item.trim(), symbols)).collect()
    }
    fn bind(&self, env: &dyn Env) -> Self {
        self.iter().map(|v| v.bind(env)).collect()
    }
    fn dims(&self, visit: &mut dyn FnMut(&Dim)) {
        self.iter().for_each(|v| v.dims(visit));
    }
}

/// Split at `sep` outside brackets and parentheses; an empty text has no parts.
pub fn split_top(text: &str, sep: char) -> Vec<&str> {
    if text.trim().is_empty() {
        return vec![];
    }
    let (mut depth, mut start, mut parts) = (0i32, 0, vec![]);
    for (i, c) in text.char_indices() {
        match c {
            '[' | '(' | '{' => depth += 1,
            ']' | ')' | '}' => depth -= 1,
            c if c == sep && depth == 0 => {
                parts.push(&text[start..i]);
                start = i + c.len_utf8();
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

macro_rules! enum_attr {
    ($( $(#[doc = $doc:literal])* $Name:ident { $( $(#[doc = $vdoc:literal])* $Variant:ident = $text:literal ),* $(,)? } )*) => { $(
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $Name { $( $(#[doc = $vdoc])* $Variant ),* }

        impl $Name {
            /// Every value.
            pub const ALL: &[$Name] = &[$($Name::$Variant),*];
            /// The name in text.
            pub const fn name(self) -> &'static str { match self { $($Name::$Variant => $text),* } }
        }

        impl fmt::Display for $Name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(self.name()) }
        }

        impl Attr for $Name {
            fn show(&self) -> String { self.name().into() }
            fn parse(text: &str, _: Symbols) -> Option<Self> { match text { $($text => Some($Name::$Variant),)* _ => None } }
        }
    )* };
}

enum_attr! {
    /// How a reduction combines elements. The neutral element is the result of an empty reduction.
    ReduceFn {
        /// Sum; 0 when empty. Floats accumulate in f64 in the evaluator, in f32 in kernels for f32 and narrower.
        Sum = "sum",
        /// Product; 1 when empty.
        Prod = "prod",
        /// Maximum, NaN if any is NaN; the least value of the dtype when empty.
        Max = "max",
        /// Minimum, NaN if any is NaN; the greatest value of the dtype when empty.
        Min = "min",
    }
    /// How `scatter_*` combines an update with what is there.
    ScatterFn {
        /// The update replaces it; of several updates to one place the last in row-major order wins.
        Replace = "replace",
        /// Sum.
        Add = "add",
        /// Product.
        Mul = "mul",
        /// Maximum.
        Max = "max",
        /// Minimum.
        Min = "min",
    }
    /// What a window of a pool yields.
    PoolFn {
        /// Maximum over the elements inside the input; NaN if any is NaN.
        Max = "max",
        /// Mean over the elements inside the input.
        Mean = "mean",
        /// Sum over the elements inside the input divided by how many positions of the window lie inside the
        /// padded input: all of them, but for a last window of `ceil`.
        MeanPadded = "mean_padded",
        /// Sum over the elements inside the input.
        Sum = "sum",
    }
    /// Where the channel axis of an image stands.
    Layout {
        /// `[n, c, spatial...]`.
        ChannelsFirst = "nchw",
        /// `[n, spatial..., c]`.
        ChannelsLast = "nhwc",
    }
    /// What stands outside a padded tensor.
    PadMode {
        /// The pad value.
        Constant = "constant",
        /// The nearest edge element.
        Edge = "edge",
        /// Mirrored without repeating the edge.
        Reflect = "reflect",
        /// From the other side.
        Wrap = "wrap",
    }
    /// How `resize` interpolates.
    ResizeMode {
        /// The nearest input element.
        Nearest = "nearest",
        /// Linear along each axis.
        Linear = "linear",
        /// Cubic convolution along each axis (Keys 1981).
        Cubic = "cubic",
    }
    /// How `resize` maps an output coordinate `i` to the input (ONNX `coordinate_transformation_mode`).
    CoordMode {
        /// `(i + 0.5) / scale - 0.5`.
        HalfPixel = "half_pixel",
        /// As half_pixel, symmetric about the centre when the output size is rounded.
        HalfPixelSymmetric = "half_pixel_symmetric",
        /// As half_pixel, but 0 where the output extent is 1.
        PytorchHalfPixel = "pytorch_half_pixel",
        /// `i * (in - 1) / (out - 1)`.
        AlignCorners = "align_corners",
        /// `i / scale`.
        Asymmetric = "asymmetric",
        /// Through the region of interest operand.
        TfCrop = "tf_crop_and_resize",
    }
    /// How `resize` nearest rounds a coordinate.
    NearestMode {
        /// Halves go down.
        RoundPreferFloor = "round_prefer_floor",
        /// Halves go up.
        RoundPreferCeil = "round_prefer_ceil",
        /// Down.
        Floor = "floor",
        /// Up.
        Ceil = "ceil",
    }
    /// Which way a recurrence runs.
    Direction {
        /// First step first.
        Forward = "forward",
        /// Last step first.
        Reverse = "reverse",
        /// Both, results stacked on the direction axis.
        Bidirectional = "bidirectional",
    }
    /// How the trees of an ensemble are combined.
    Aggregate {
        /// Sum of the leaves' weights.
        Sum = "sum",
        /// Sum divided by the number of trees.
        Mean = "mean",
        /// Minimum.
        Min = "min",
        /// Maximum.
        Max = "max",
    }
}
