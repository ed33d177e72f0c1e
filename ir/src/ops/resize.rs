//! Resampling of images and volumes, as ONNX `Resize` defines it.
use super::{demand, float, length_is, number, result, shape_is};
use crate::{
    Dim, Real, Tensor, TensorType,
    attr::{CoordMode, NearestMode, ResizeMode},
    op::{EvalArgs, TypeArgs},
};

#[allow(clippy::too_many_arguments)] // One parameter an attribute of the row.
pub(crate) fn infer(
    args: TypeArgs,
    mode: &ResizeMode,
    coord: &CoordMode,
    _nearest: &NearestMode,
    sizes: &[Dim],
    scales: &[Real],
    _cubic_a: &Real,
    _outside: &Real,
    _antialias: &bool,
    _exclude: &bool,
) -> Result<Vec<TensorType>, String> {
    let x = args.types[0];
    if *mode != ResizeMode::Nearest {
        number("x", x)?;
    }
    length_is("sizes", sizes.len(), x.rank())?;
    length_is("scales", scales.len(), x.rank())?;
    demand(scales.iter().all(|s| s.get() > 0.0 && s.get().is_finite()), || "scales must be positive".to_string())?;
    match (args.types.get(1), coord) {
        (Some(roi), _) => {
            float("roi", roi)?;
            shape_is("roi", roi, &[Dim::from(2 * x.rank())])?;
        }
        (None, CoordMode::TfCrop) => return Err(format!("`{coord}` needs a region of interest")),
        (None, _) => {}
    }
    for (i, (from, to)) in x.shape.iter().zip(sizes).enumerate() {
        demand(!from.is(0) || to.is(0), || format!("axis {i} is empty, cannot become {to}"))?;
    }
    Ok(vec![result(x.dtype, sizes.to_vec())?])
}

#[allow(clippy::too_many_arguments)] // One parameter an attribute of the row.
pub(crate) fn eval(
    _args: EvalArgs,
    _mode: &ResizeMode,
    _coord: &CoordMode,
    _nearest: &NearestMode,
    _sizes: &[Dim],
    _scales: &[Real],
    _cubic_a: &Real,
    _outside: &Real,
    _antialias: &bool,
    _exclude: &bool,
) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
