//! The table of ONNX operators: domain, name, the operator sets that changed it, and its converter.
use super::{
    build::{Res, Val},
    cx::Cx,
    import::domain_of,
    ops::{
        activation, attention, cache, cast, control, conv, gather, linear, linear_attention, math, ml, norm, quant, reduce, resize, rnn, rotary, select,
        sequence, shape, trees, view,
    },
    ops::{contrib, contrib_attention, contrib_quant},
    ops::{det, einsum, loss, sample, signal, svm, tfidf, unpool},
};
use contrib::By;
use pavage_ir::{ScalarFn, attr::ReduceFn};
use reduce::Kind;

/// One operator.
pub(crate) struct Row {
    pub(crate) domain: &'static str,
    pub(crate) op: &'static str,
    /// Operator sets with a form of their own; converters are told which one applies.
    since: &'static [i64],
    pub(crate) convert: fn(&mut Cx) -> Res<Vec<Val>>,
}

/// What the table says of an operator.
pub(crate) enum Found {
    /// Its row and the operator set that defines its form.
    Row(&'static Row, i64),
    /// Known, and first defined in a later operator set, or its form before this one is not read.
    TooOld(i64),
    None,
}

const ML: &str = "ai.onnx.ml";

const fn row(op: &'static str, since: &'static [i64], convert: fn(&mut Cx) -> Res<Vec<Val>>) -> Row {
    Row { domain: "", op, since, convert }
}

const fn ml_row(op: &'static str, since: &'static [i64], convert: fn(&mut Cx) -> Res<Vec<Val>>) -> Row {
    Row { domain: ML, op, since, convert }
}

const fn ms_row(op: &'static str, convert: fn(&mut Cx) -> Res<Vec<Val>>) -> Row {
    Row { domain: "com.microsoft", op, since: &[1], convert }
}

const PREVIEW: &str = "ai.onnx.preview";

const ROWS: &[Row] = &[
    // Arithmetic.
    row("Abs", &[6, 13], |cx| math::unary(cx, ScalarFn::Abs)),
    row("Add", &[7, 13, 14], |cx| math::binary(cx, ScalarFn::Add)),
    row("Sub", &[7, 13, 14], |cx| math::binary(cx, ScalarFn::Sub)),
    row("Mul", &[7, 13, 14], |cx| math::binary(cx, ScalarFn::Mul)),
    row("Div", &[7, 13, 14], |cx| math::binary(cx, ScalarFn::Div)),
    row("Mod", &[10, 13, 28], math::modulo),
    row("Pow", &[7, 12, 13, 15], math::pow),
    row("Neg", &[6, 13], |cx| math::unary(cx, ScalarFn::Neg)),
    row("Sign", &[9, 13], |cx| math::unary(cx, ScalarFn::Sign)),
    row("Exp", &[6, 13], |cx| math::unary(cx, ScalarFn::Exp)),
    row("Log", &[6, 13], |cx| math::unary(cx, ScalarFn::Log)),
    row("Sqrt", &[6, 13], |cx| math::unary(cx, ScalarFn::Sqrt)),
    row("Reciprocal", &[6, 13], |cx| math::unary(cx, ScalarFn::Recip)),
    row("Sin", &[7, 22], |cx| math::unary(cx, ScalarFn::Sin)),
    row("Cos", &[7, 22], |cx| math::unary(cx, ScalarFn::Cos)),
    row("Tan", &[7, 22], |cx| math::unary(cx, ScalarFn::Tan)),
    row("Asin", &[7, 22], |cx| math::unary(cx, ScalarFn::Asin)),
    row("Acos", &[7, 22], |cx| math::unary(cx, ScalarFn::Acos)),
    row("Atan", &[7, 22], |cx| math::unary(cx, ScalarFn::Atan)),
    row("Sinh", &[9, 22], |cx| math::unary(cx, ScalarFn::Sinh)),
    row("Cosh", &[9, 22], |cx| math::unary(cx, ScalarFn::Cosh)),
    row("Tanh", &[6, 13], |cx| math::unary(cx, ScalarFn::Tanh)),
    row("Asinh", &[9, 22], |cx| math::unary(cx, ScalarFn::Asinh)),
    row("Acosh", &[9, 22], |cx| math::unary(cx, ScalarFn::Acosh)),
    row("Atanh", &[9, 22], |cx| math::unary(cx, ScalarFn::Atanh)),
    row("Erf", &[9, 13], |cx| math::unary(cx, ScalarFn::Erf)),
    row("Floor", &[6, 13], |cx| math::unary(cx, ScalarFn::Floor)),
    row("Ceil", &[6, 13], |cx| math::unary(cx, ScalarFn::Ceil)),
    row("Round", &[11, 22], |cx| math::unary(cx, ScalarFn::Round)),
    row("Sum", &[6, 8, 13], |cx| math::variadic(cx, ScalarFn::Add)),
    row("Max", &[6, 8, 12, 13], |cx| math::variadic(cx, ScalarFn::Max)),
    row("Min", &[6, 8, 12, 13], |cx| math::variadic(cx, ScalarFn::Min)),
    row("Mean", &[6, 8, 13], math::mean),
    row("Clip", &[6, 11, 12, 13], math::clip),
    // Comparison and logic.
    row("Equal", &[7, 11, 13, 19], |cx| math::binary(cx, ScalarFn::Eq)),
    row("Less", &[7, 9, 13], |cx| math::binary(cx, ScalarFn::Lt)),
    row("LessOrEqual", &[12, 16], |cx| math::binary(cx, ScalarFn::Le)),
    row("Greater", &[7, 9, 13], |cx| math::binary(cx, ScalarFn::Gt)),
    row("GreaterOrEqual", &[12, 16], |cx| math::binary(cx, ScalarFn::Ge)),
    row("And", &[7], |cx| math::binary(cx, ScalarFn::And)),
    row("Or", &[7], |cx| math::binary(cx, ScalarFn::Or)),
    row("Xor", &[7], |cx| math::binary(cx, ScalarFn::Xor)),
    row("Not", &[1], |cx| math::unary(cx, ScalarFn::Not)),
    row("BitwiseAnd", &[18], |cx| math::binary(cx, ScalarFn::And)),
    row("BitwiseOr", &[18], |cx| math::binary(cx, ScalarFn::Or)),
    row("BitwiseXor", &[18], |cx| math::binary(cx, ScalarFn::Xor)),
    row("BitwiseNot", &[18], |cx| math::unary(cx, ScalarFn::Not)),
    row("BitShift", &[11, 28], math::bit_shift),
    row("Where", &[9, 16], math::select),
    row("IsNaN", &[9, 13, 20], |cx| math::unary(cx, ScalarFn::IsNan)),
    row("IsInf", &[10, 20], math::is_inf),
    // Activations.
    row("Relu", &[6, 13, 14], activation::relu),
    row("LeakyRelu", &[6, 16], |cx| activation::composite(cx, activation::leaky_relu)),
    row("PRelu", &[7, 9, 16], activation::prelu),
    row("Elu", &[6, 22], |cx| activation::composite(cx, activation::elu)),
    row("Selu", &[6, 22], |cx| activation::composite(cx, activation::selu)),
    row("Celu", &[12, 28], |cx| activation::composite(cx, activation::celu)),
    row("ThresholdedRelu", &[10, 22], |cx| activation::composite(cx, activation::thresholded_relu)),
    row("HardSigmoid", &[6, 22], |cx| activation::composite(cx, activation::hard_sigmoid)),
    row("HardSwish", &[14, 22], |cx| activation::composite(cx, activation::hard_swish)),
    row("Sigmoid", &[6, 13], |cx| math::unary(cx, ScalarFn::Sigmoid)),
    row("Softplus", &[1, 22], |cx| math::unary(cx, ScalarFn::Softplus)),
    row("Softsign", &[1, 22], |cx| activation::composite(cx, activation::softsign)),
    row("Mish", &[18, 22], |cx| activation::composite(cx, activation::mish)),
    row("Swish", &[24], |cx| activation::composite(cx, activation::swish)),
    row("Gelu", &[20], |cx| activation::composite(cx, activation::gelu)),
    row("Shrink", &[9], |cx| activation::composite(cx, activation::shrink)),
    row("Softmax", &[1, 11, 13], norm::softmax),
    row("LogSoftmax", &[1, 11, 13], norm::log_softmax),
    row("Hardmax", &[1, 11, 13], norm::hardmax),
    // Reductions.
    row("ReduceSum", &[1, 11, 13], |cx| reduce::convert(cx, Kind::Plain(ReduceFn::Sum))),
    row("ReduceProd", &[1, 11, 13, 18], |cx| reduce::convert(cx, Kind::Plain(ReduceFn::Prod))),
    row("ReduceMax", &[1, 11, 12, 13, 18, 20], |cx| reduce::convert(cx, Kind::Plain(ReduceFn::Max))),
    row("ReduceMin", &[1, 11, 12, 13, 18, 20], |cx| reduce::convert(cx, Kind::Plain(ReduceFn::Min))),
    row("ReduceMean", &[1, 11, 13, 18], |cx| reduce::convert(cx, Kind::Mean)),
    row("ReduceL1", &[1, 11, 13, 18], |cx| reduce::convert(cx, Kind::L1)),
    row("ReduceL2", &[1, 11, 13, 18], |cx| reduce::convert(cx, Kind::L2)),
    row("ReduceLogSum", &[1, 11, 13, 18, 28], |cx| reduce::convert(cx, Kind::LogSum)),
    row("ReduceLogSumExp", &[1, 11, 13, 18, 28], |cx| reduce::convert(cx, Kind::LogSumExp)),
    row("ReduceSumSquare", &[1, 11, 13, 18], |cx| reduce::convert(cx, Kind::SumSquare)),
    row("ArgMax", &[1, 11, 12, 13], |cx| reduce::arg(cx, ReduceFn::Max)),
    row("ArgMin", &[1, 11, 12, 13], |cx| reduce::arg(cx, ReduceFn::Min)),
    row("CumSum", &[11, 14], |cx| reduce::cumulative(cx, ReduceFn::Sum)),
    row("CumProd", &[26], |cx| reduce::cumulative(cx, ReduceFn::Prod)),
    row("TopK", &[1, 10, 11, 24], reduce::top_k),
    // Losses.
    row("NegativeLogLikelihoodLoss", &[12, 13, 22], loss::nll),
    row("SoftmaxCrossEntropyLoss", &[12, 13], loss::softmax_cross_entropy),
    // Products, convolutions, pools.
    row("Einsum", &[12, 28], einsum::convert),
    row("Det", &[11, 22], det::det),
    row("MatMul", &[1, 9, 13], linear::convert),
    row("Gemm", &[7, 9, 11, 13], linear::gemm),
    row("Conv", &[1, 11, 22], conv::conv),
    row("ConvTranspose", &[1, 11, 22], conv::conv_transpose),
    row("MaxPool", &[1, 8, 10, 11, 12, 22], conv::max_pool),
    row("AveragePool", &[7, 10, 11, 19, 22], conv::average_pool),
    row("MaxUnpool", &[9, 11, 22], unpool::max_unpool),
    row("Col2Im", &[18], unpool::col2im),
    row("LpPool", &[2, 11, 18, 22], conv::lp_pool),
    row("GlobalAveragePool", &[1, 22], conv::global_average_pool),
    row("GlobalMaxPool", &[1, 22], conv::global_max_pool),
    row("GlobalLpPool", &[2, 22], conv::global_lp_pool),
    row("LRN", &[1, 13], conv::lrn),
    row("Dropout", &[7, 10, 12, 13, 22], conv::dropout),
    // Normalisations.
    row("BatchNormalization", &[7, 9, 14, 15], norm::batch),
    row("LayerNormalization", &[1, 17], norm::layer),
    row("RMSNormalization", &[23], norm::rms),
    row("InstanceNormalization", &[6, 22], norm::instance),
    row("GroupNormalization", &[18, 21], norm::group),
    row("MeanVarianceNormalization", &[9, 13], norm::mean_variance),
    row("LpNormalization", &[1, 22], norm::lp),
    // Views and copies.
    row("Identity", &[1, 13, 14, 16, 19, 21, 23, 24, 25], view::identity),
    row("Cast", &[6, 9, 13, 19, 21, 23, 24, 25, 28], cast::cast),
    row("CastLike", &[15, 19, 21, 23, 24, 25], cast::cast_like),
    row("BitCast", &[26], cast::bitcast),
    row("Reshape", &[5, 13, 14, 19, 21, 23, 24, 25], view::reshape),
    row("Flatten", &[1, 9, 11, 13, 21, 23, 24, 25], view::flatten),
    row("Squeeze", &[1, 11, 13, 21, 23, 24, 25], view::squeeze),
    row("Unsqueeze", &[1, 11, 13, 21, 23, 24, 25], view::unsqueeze),
    row("Transpose", &[1, 13, 21, 23, 24, 25], view::transpose),
    row("Expand", &[8, 13], view::expand),
    row("Concat", &[4, 11, 13], view::concat),
    row("Split", &[2, 11, 13, 18], view::split),
    row("Slice", &[1, 10, 11, 13], view::slice),
    row("Pad", &[2, 11, 13, 18, 19, 21, 23, 24, 25], view::pad),
    row("Tile", &[6, 13], view::tile),
    row("CenterCropPad", &[18], view::center_crop_pad),
    row("DepthToSpace", &[1, 11, 13, 28], view::depth_to_space),
    row("SpaceToDepth", &[1, 13, 28], view::space_to_depth),
    // Sizes and tensors made from sizes.
    row("Shape", &[1, 13, 15, 19, 21, 23, 24, 25], shape::shape),
    row("Size", &[1, 13, 19, 21, 23, 24, 25], shape::size),
    row("Constant", &[1, 9, 11, 12, 13, 19, 21, 23, 24, 25], shape::constant),
    row("ConstantOfShape", &[9, 20, 21, 23, 24, 25], shape::constant_of_shape),
    row("Range", &[11, 27], shape::range),
    row("EyeLike", &[9, 22], shape::eye_like),
    row("Trilu", &[14], shape::trilu),
    row("OneHot", &[9, 11, 28], shape::one_hot),
    row("NonZero", &[9, 13], shape::non_zero),
    row("Compress", &[9, 11, 28], select::compress),
    row("Unique", &[11, 28], select::unique),
    row("ReverseSequence", &[10, 28], select::reverse_sequence),
    row("NonMaxSuppression", &[10, 11], select::non_max_suppression),
    // Gathers and scatters.
    row("Gather", &[1, 11, 13], gather::gather),
    row("GatherElements", &[11, 13], gather::gather_elements),
    row("GatherND", &[11, 12, 13], gather::gather_nd),
    row("Scatter", &[9, 11], gather::scatter_elements),
    row("ScatterElements", &[11, 13, 16, 18], gather::scatter_elements),
    row("ScatterND", &[11, 13, 16, 18], gather::scatter_nd),
    // Resampling.
    row("Resize", &[10, 11, 13, 18, 19], resize::resize),
    row("Upsample", &[7, 9], resize::upsample),
    row("GridSample", &[16, 20, 22], sample::grid_sample),
    row("AffineGrid", &[20], sample::affine_grid),
    row("RoiAlign", &[10, 16, 22], sample::roi_align),
    row("DeformConv", &[19, 22], sample::deform_conv),
    // Signals.
    row("DFT", &[17, 20], signal::dft),
    row("STFT", &[17], signal::stft),
    row("HannWindow", &[17], |cx| signal::window(cx, [0.5, 0.5, 0.0])),
    row("HammingWindow", &[17], |cx| signal::window(cx, [25.0 / 46.0, 21.0 / 46.0, 0.0])),
    row("BlackmanWindow", &[17], |cx| signal::window(cx, [0.42, 0.5, 0.08])),
    row("TfIdfVectorizer", &[9], tfidf::convert),
    row("MelWeightMatrix", &[17], signal::mel_weight_matrix),
    // Quantisation.
    row("QuantizeLinear", &[10, 13, 19, 21, 23, 24, 25, 28], quant::quantize),
    row("DequantizeLinear", &[10, 13, 19, 21, 23, 24, 25, 28], quant::dequantize),
    row("DynamicQuantizeLinear", &[11], quant::dynamic),
    row("MatMulInteger", &[10], quant::matmul_integer),
    row("ConvInteger", &[10], conv::conv_integer),
    row("QLinearMatMul", &[10, 21], quant::qlinear_matmul),
    row("QLinearConv", &[10], conv::qlinear_conv),
    // Recurrence and control flow.
    row("LSTM", &[7, 14, 22], rnn::lstm),
    row("GRU", &[7, 14, 22], rnn::gru),
    row("RNN", &[7, 14, 22], rnn::rnn),
    row("If", &[1, 11, 13, 16, 19, 21, 23, 24, 25], control::branch),
    row("SequenceMap", &[17], control::sequence_map),
    row("Loop", &[1, 11, 13, 16, 19, 21, 23, 24, 25], control::repeat),
    row("Scan", &[8, 9, 11, 16, 19, 21, 23, 24, 25], control::scan),
    // Sequence models.
    row("Attention", &[23, 24, 25], attention::attention),
    Row { domain: PREVIEW, op: "FlexAttention", since: &[1], convert: attention::flex_attention },
    row("LinearAttention", &[27], linear_attention::linear_attention),
    row("RotaryEmbedding", &[23], rotary::rotary_embedding),
    row("CausalConvWithState", &[27], cache::causal_conv),
    row("TensorScatter", &[24], cache::tensor_scatter),
    row("SwiGLU", &[28], activation::swiglu),
    // com.microsoft. onnxruntime also writes two of its operators into the default domain.
    row("SimplifiedLayerNormalization", &[1], norm::rms),
    ms_row("LayerNormalization", norm::layer),
    ms_row("SimplifiedLayerNormalization", norm::rms),
    ms_row("SkipLayerNormalization", |cx| contrib::skip_norm(cx, By::Deviation)),
    ms_row("SkipSimplifiedLayerNormalization", |cx| contrib::skip_norm(cx, By::RootMeanSquare)),
    ms_row("FusedMatMul", contrib::fused_matmul),
    ms_row("Gelu", contrib::gelu),
    ms_row("BiasGelu", contrib::gelu),
    ms_row("FastGelu", contrib::fast_gelu),
    ms_row("QuickGelu", contrib::quick_gelu),
    ms_row("Attention", contrib_attention::attention),
    ms_row("MultiHeadAttention", contrib_attention::multi_head_attention),
    ms_row("GroupQueryAttention", contrib_attention::group_query_attention),
    ms_row("RotaryEmbedding", contrib_attention::rotary_embedding),
    ms_row("MatMulNBits", contrib_quant::matmul_nbits),
    ms_row("QLinearAdd", |cx| contrib_quant::binary(cx, ScalarFn::Add)),
    ms_row("QLinearMul", |cx| contrib_quant::binary(cx, ScalarFn::Mul)),
    ms_row("QLinearSigmoid", contrib_quant::sigmoid),
    ms_row("QLinearLeakyRelu", contrib_quant::leaky_relu),
    ms_row("QLinearConcat", contrib_quant::concat),
    ms_row("QLinearGlobalAveragePool", contrib_quant::global_average_pool),
    ms_row("DynamicQuantizeLSTM", contrib_quant::lstm),
    ms_row("NhwcMaxPool", contrib_quant::nhwc_max_pool),
    // Sequences and optionals.
    row("SequenceEmpty", &[11], sequence::empty),
    row("SequenceConstruct", &[11], sequence::construct),
    row("SequenceLength", &[11], sequence::len),
    row("SequenceAt", &[11], sequence::at),
    row("SequenceInsert", &[11], sequence::insert),
    row("SequenceErase", &[11], sequence::erase),
    row("SplitToSequence", &[11, 24], sequence::split),
    row("ConcatFromSequence", &[11], sequence::concat),
    row("Optional", &[15], sequence::optional),
    row("OptionalHasElement", &[15, 18, 28], sequence::has_element),
    row("OptionalGetElement", &[15, 18, 28], sequence::get_element),
    // Classic machine learning.
    ml_row("TreeEnsemble", &[5], trees::ensemble),
    ml_row("TreeEnsembleClassifier", &[1, 3, 5], trees::classifier),
    ml_row("TreeEnsembleRegressor", &[1, 3, 5], trees::regressor),
    ml_row("LinearClassifier", &[1], ml::linear_classifier),
    ml_row("LinearRegressor", &[1], ml::linear_regressor),
    ml_row("SVMClassifier", &[1], svm::classifier),
    ml_row("SVMRegressor", &[1], svm::regressor),
    ml_row("Scaler", &[1], ml::scaler),
    ml_row("Normalizer", &[1], ml::normalizer),
    ml_row("Binarizer", &[1], ml::binarizer),
    ml_row("Imputer", &[1], ml::imputer),
    ml_row("FeatureVectorizer", &[1], ml::feature_vectorizer),
    ml_row("OneHotEncoder", &[1], ml::one_hot_encoder),
    ml_row("LabelEncoder", &[2, 4], ml::label_encoder),
    ml_row("ArrayFeatureExtractor", &[1], ml::array_feature_extractor),
    ml_row("ZipMap", &[1], ml::zip_map),
];

/// The row of an operator under an operator set version of its domain.
pub(crate) fn find(domain: &str, op: &str, opset: i64) -> Found {
    match ROWS.iter().find(|r| r.domain == domain && r.op == op) {
        Some(row) => match row.since.iter().rev().find(|s| **s <= opset) {
            Some(since) => Found::Row(row, *since),
            None => Found::TooOld(row.since[0]),
        },
        None => Found::None,
    }
}

/// Whether any operator of a domain is known.
pub(crate) fn knows_domain(domain: &str) -> bool {
    ROWS.iter().any(|r| r.domain == domain)
}

/// Every operator that is read: domain (`ai.onnx` is the default one), name, and the operator sets whose forms are.
pub fn operators() -> impl Iterator<Item = (&'static str, &'static str, &'static [i64])> {
    ROWS.iter().map(|r| (if domain_of(r.domain).is_empty() { "ai.onnx" } else { r.domain }, r.op, r.since))
}
