//! The transforms of minimal filtering, `F(m x m, 3 x 3)`: Lavin and Gray, Fast Algorithms for Convolutional Neural
//! Networks, 2015 (arXiv 1509.09308).
//!
//! A convolution with windows of 3x3 is computed by tiles of `m` x `m` outputs, which see `m + 2` x `m + 2` inputs: with `d` the
//! inputs of a tile and `g` the window, the tile is `A^T [(G g G^T) * (B^T d B)] A`, where `*` multiplies element by element. The products
//! are summed over channels before the last transform, so for each of the `(m + 2)^2` elements they are a matrix product.

/// Extent of the window.
pub const WINDOW: usize = 3;

/// The three matrices of one tile size.
#[derive(Clone, Copy, Debug)]
pub struct Transforms {
    /// Outputs of a tile along each axis.
    pub m: usize,
    /// `B^T`, `m + 2` by `m + 2`: of a tile's inputs.
    pub input: &'static [&'static [f64]],
    /// `G`, `m + 2` by 3: of the window.
    pub filter: &'static [&'static [f64]],
    /// `A^T`, `m` by `m + 2`: to a tile's outputs.
    pub output: &'static [&'static [f64]],
}

const TWO: Transforms = Transforms {
    m: 2,
    input: &[&[1.0, 0.0, -1.0, 0.0], &[0.0, 1.0, 1.0, 0.0], &[0.0, -1.0, 1.0, 0.0], &[0.0, 1.0, 0.0, -1.0]],
    filter: &[&[1.0, 0.0, 0.0], &[0.5, 0.5, 0.5], &[0.5, -0.5, 0.5], &[0.0, 0.0, 1.0]],
    output: &[&[1.0, 1.0, 1.0, 0.0], &[0.0, 1.0, -1.0, -1.0]],
};

/// The points that tiles of 4 interpolate at, beside 0 and infinity: `A`, `-A`, `B` and `-B`. Multiples of them are exact in f32, and
/// results are within a quarter of the error that the points 1 and 2 of the paper lead to.
const A: f64 = 5.0 / 8.0;
const B: f64 = 3.0 / 2.0;
const AA: f64 = A * A;
const BB: f64 = B * B;
/// What the rows of `filter` for `A` and for `B` are divided by.
const BY_A: f64 = 2.0 * AA * (AA - BB);
const BY_B: f64 = 2.0 * BB * (BB - AA);

const FOUR: Transforms = Transforms {
    m: 4,
    input: &[
        &[AA * BB, 0.0, -AA - BB, 0.0, 1.0, 0.0],
        &[0.0, -A * BB, -BB, A, 1.0, 0.0],
        &[0.0, A * BB, -BB, -A, 1.0, 0.0],
        &[0.0, -B * AA, -AA, B, 1.0, 0.0],
        &[0.0, B * AA, -AA, -B, 1.0, 0.0],
        &[0.0, AA * BB, 0.0, -AA - BB, 0.0, 1.0],
    ],
    filter: &[
        &[1.0 / (AA * BB), 0.0, 0.0],
        &[1.0 / BY_A, A / BY_A, AA / BY_A],
        &[1.0 / BY_A, -A / BY_A, AA / BY_A],
        &[1.0 / BY_B, B / BY_B, BB / BY_B],
        &[1.0 / BY_B, -B / BY_B, BB / BY_B],
        &[0.0, 0.0, 1.0],
    ],
    output: &[&[1.0, 1.0, 1.0, 1.0, 1.0, 0.0], &[0.0, A, -A, B, -B, 0.0], &[0.0, AA, AA, BB, BB, 0.0], &[0.0, A * AA, -A * AA, B * BB, -B * BB, 1.0]],
};

impl Transforms {
    /// Those of tiles of `m` by `m` outputs; there are some for 2 and 4.
    pub fn of(m: usize) -> Option<&'static Transforms> {
        [&TWO, &FOUR].into_iter().find(|t| t.m == m)
    }

    /// Inputs that a tile sees along each axis.
    pub fn side(&self) -> usize {
        self.m + WINDOW - 1
    }
}

/// `matrix x matrix^T` of a square `x`, row by row.
pub fn both_ways(matrix: &[&[f64]], x: &[f64]) -> Vec<f64> {
    let n = matrix.first().map_or(0, |row| row.len());
    let rows: Vec<Vec<f64>> = matrix.iter().map(|row| (0..n).map(|j| (0..n).map(|i| row[i] * x[i * n + j]).sum()).collect()).collect();
    rows.iter().flat_map(|r| matrix.iter().map(move |column| column.iter().zip(r).map(|(a, b)| a * b).sum())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_is_the_convolution_of_its_inputs() {
        for m in [2, 4] {
            let t = Transforms::of(m).unwrap();
            let n = t.side();
            let d: Vec<f64> = (0..n * n).map(|i| ((i * 37 + 11) % 17) as f64 - 8.0).collect();
            let g: Vec<f64> = (0..9).map(|i| ((i * 5 + 3) % 7) as f64 - 3.0).collect();
            let products: Vec<f64> = both_ways(t.filter, &g).iter().zip(both_ways(t.input, &d)).map(|(a, b)| a * b).collect();
            let tile = both_ways(t.output, &products);
            for (at, got) in tile.iter().enumerate() {
                let (y, x) = (at / m, at % m);
                let want: f64 = (0..9).map(|k| g[k] * d[(y + k / 3) * n + x + k % 3]).sum();
                assert!((got - want).abs() < 1e-9, "F({m}): {got} is not {want}");
            }
        }
    }
}
