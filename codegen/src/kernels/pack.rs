//! Constants rearranged for kernels: strided walks over a tensor into column panels.
use pavage_ir::{DType, Tensor};

/// How elements lie in a panel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cells {
    /// Each for itself.
    #[default]
    Whole,
    /// Elements of 4 bits, those of an even step and of the one after it in one byte, the first in its low half.
    Nibbles,
}

/// How to read a constant into panels `[batch..., ceil(n / width), steps, width, group]`, where the contracted positions
/// are walked `group` at a time; what lies beyond `n` or the last position is zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Extents and element strides of the batch axes, outermost first.
    pub batch: Vec<(usize, i64)>,
    /// Extent and element stride of the columns.
    pub n: (usize, i64),
    /// Extents and element strides of the contracted axes, outermost first. Each run of the last one is padded to whole groups.
    pub k: Vec<(usize, i64)>,
    /// Element the walk starts from.
    pub start: i64,
    /// Columns of a panel.
    pub width: usize,
    /// Contracted positions kept side by side.
    pub group: usize,
    /// Dtype of the panels; values are converted as `Scalar::cast` does. Of nibbles it is `u8`.
    pub dtype: DType,
    /// How elements lie in a panel; nibbles come in groups of 2.
    pub cells: Cells,
}

impl Walk {
    /// Steps of a panel.
    pub fn steps(&self) -> usize {
        let (last, outer) = self.k.split_last().map_or((1, 1), |((n, _), outer)| (*n, outer.iter().map(|(n, _)| n).product()));
        outer * last.div_ceil(self.group)
    }

    /// Elements of a panel; of nibbles, bytes.
    pub fn panel(&self) -> usize {
        self.steps() * self.width * if self.cells == Cells::Nibbles { 1 } else { self.group }
    }

    /// Panels of one batch.
    pub fn panels(&self) -> usize {
        self.n.0.div_ceil(self.width)
    }

    /// The panels of `x`.
    pub fn apply(&self, x: &Tensor) -> Tensor {
        let batches: usize = self.batch.iter().map(|(n, _)| n).product();
        let count = batches * self.panels() * self.panel();
        let size = self.dtype.bits() / 8;
        let mut bytes = vec![0u8; count * size];
        let bits = x.dtype().bits() / 8;
        let same = x.dtype() == self.dtype;
        if self.cells == Cells::Nibbles {
            return self.nibbles(x, bytes);
        }
        let mut put = |to: usize, from: i64| {
            let from = from as usize;
            if same {
                bytes[to * size..][..size].copy_from_slice(&x.bytes()[from * bits..][..bits]);
            } else {
                pavage_ir::tensor::write(&mut bytes, self.dtype, to, x.get(from).cast(self.dtype));
            }
        };
        let positions = self.positions();
        let mut at = 0;
        for batch in 0..batches {
            let base = self.start + place(&self.batch, batch);
            for panel in 0..self.panels() {
                for group in positions.chunks(self.group) {
                    for lane in 0..self.width {
                        let j = panel * self.width + lane;
                        for (g, k) in group.iter().enumerate() {
                            if let (Some(k), true) = (k, j < self.n.0) {
                                put(at + lane * self.group + g, base + j as i64 * self.n.1 + k);
                            }
                        }
                    }
                    at += self.width * self.group;
                }
            }
        }
        Tensor::new(self.dtype, vec![count], bytes).expect("bytes of the panels")
    }

    /// The panels of elements of 4 bits, written to `bytes`.
    fn nibbles(&self, x: &Tensor, mut bytes: Vec<u8>) -> Tensor {
        let positions = self.positions();
        let batches: usize = self.batch.iter().map(|(n, _)| n).product();
        let mut at = 0;
        for batch in 0..batches {
            let base = self.start + place(&self.batch, batch);
            for panel in 0..self.panels() {
                for pair in positions.chunks(2) {
                    for j in panel * self.width..(panel + 1) * self.width {
                        for (half, k) in pair.iter().enumerate() {
                            if let (Some(k), true) = (k, j < self.n.0) {
                                let v = x.get((base + j as i64 * self.n.1 + k) as usize).i() & 15;
                                bytes[at] |= (v as u8) << (4 * half);
                            }
                        }
                        at += 1;
                    }
                }
            }
        }
        let count = bytes.len();
        Tensor::new(self.dtype, vec![count], bytes).expect("bytes of the panels")
    }

    /// Offset of every contracted position in order, `None` for padding.
    fn positions(&self) -> Vec<Option<i64>> {
        let Some((last, outer)) = self.k.split_last() else { return vec![Some(0); self.group] };
        let runs: usize = outer.iter().map(|(n, _)| n).product();
        let mut all = vec![];
        for run in 0..runs {
            let base = place(outer, run);
            let padded = last.0.next_multiple_of(self.group);
            all.extend((0..padded).map(|i| (i < last.0).then_some(base + i as i64 * last.1)));
        }
        all
    }
}

/// Element offset of the `flat`-th point of a box.
fn place(axes: &[(usize, i64)], mut flat: usize) -> i64 {
    axes.iter().rev().fold(0, |at, (n, stride)| {
        let i = flat % n;
        flat /= n;
        at + i as i64 * stride
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_hold_every_element_once_and_zeros_elsewhere() {
        let (n, k) = (5, 3);
        let x: Vec<f32> = (0..n * k).map(|i| i as f32 + 1.0).collect();
        let bytes = x.iter().flat_map(|v| v.to_le_bytes()).collect();
        let x = Tensor::new(DType::F32, vec![n, k], bytes).unwrap();
        let walk = Walk { batch: vec![], n: (n, k as i64), k: vec![(k, 1)], start: 0, width: 4, group: 2, dtype: DType::F32, cells: Cells::Whole };
        let p = walk.apply(&x);
        assert_eq!(p.count(), 2 * 2 * 4 * 2);
        for panel in 0..2 {
            for step in 0..2 {
                for lane in 0..4 {
                    for g in 0..2 {
                        let v = p.get(((panel * 2 + step) * 4 + lane) * 2 + g);
                        let (j, i) = (panel * 4 + lane, step * 2 + g);
                        if j < n && i < k { assert_eq!(v.f(), (j * k + i) as f64 + 1.0) } else { assert_eq!(v.f(), 0.0) }
                    }
                }
            }
        }
    }
}
