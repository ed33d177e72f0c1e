//! Reading the windows of an image (the op `patches`) where the image lies.
use super::{Former, Illegal};
use pavage_ir::{Dim, Expr, ExprId, Scalar, ScalarFn, TensorType, Value};

impl Former<'_> {
    /// An element of a window, 0 outside of the image and behind the last tap.
    pub(super) fn pull_patches(
        &mut self,
        image: Value,
        index: &[Dim],
        guard: Option<ExprId>,
        (kernel, strides, dilations, lo): (&[usize], &[usize], &[usize], &[i64]),
    ) -> Result<ExprId, Illegal> {
        let TensorType { dtype, shape } = self.graph.ty(image).clone();
        let (spatial, channels) = (kernel.len(), shape[kernel.len() + 1].clone());
        let axes = self.axes.clone();
        let last = &index[spatial + 1];
        let mut at = index.to_vec();
        at[spatial + 1] = last.mod_in(&channels, &axes);
        let mut tap = last.div_in(&channels, &axes);
        let mut inside = None;
        for i in (0..spatial).rev() {
            let n = Dim::from(kernel[i]);
            // Behind the last tap the first one is too large.
            let k = if i == 0 { tap.clone() } else { tap.mod_in(&n, &axes) };
            tap = tap.div_in(&n, &axes);
            let place = index[1 + i].clone() * Dim::from(strides[i]) + k.clone() * Dim::from(dilations[i]) - Dim::from(lo[i]);
            if i == 0 && !k.within(&n, &axes) {
                let c = self.compare(ScalarFn::Lt, k, n);
                inside = Some(self.both(inside, c));
            }
            if !place.within(&shape[1 + i], &axes) {
                let above = self.compare(ScalarFn::Ge, place.clone(), Dim::ZERO);
                inside = Some(self.both(inside, above));
                let below = self.compare(ScalarFn::Lt, place.clone(), shape[1 + i].clone());
                inside = Some(self.both(inside, below));
            }
            at[1 + i] = place;
        }
        let Some(inside) = inside else { return self.pull(image, at, guard) };
        let all = self.both(guard, inside);
        let x = self.pull(image, at, Some(all))?;
        // What is not read is 0 already.
        if matches!(self.region.expr(x), Expr::Load { guard: Some(g), .. } if *g == all) {
            return Ok(x);
        }
        let zero = self.region.constant(Scalar::I(0), dtype);
        Ok(self.region.push(Expr::Call(ScalarFn::Select, vec![inside, x, zero]), dtype))
    }
}
