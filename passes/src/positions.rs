//! Constants that say where they are read: counts along an axis, and triangles of a mask. A kernel computes them from
//! the position instead of reading memory, and sees what they mean: a causal mask is one whether it comes as a constant
//! or is computed.
use pavage_ir::{DType, Scalar, Tensor};

/// Fewer elements are a table as likely as a count.
const FEWEST: usize = 4;

/// What a constant's elements are.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Positions {
    /// `start + step * i` at index `i` of `axis`, integers.
    Count { axis: usize, start: i64, step: i64 },
    /// `below` where `col <= row + diagonal`, else `above`; `row` and `col` are axes, `row < col`.
    Triangle { row: usize, col: usize, diagonal: i64, below: Scalar, above: Scalar },
}

/// What `t` is, if it is one of these.
pub(crate) fn of(t: &Tensor) -> Option<Positions> {
    let long: Vec<usize> = (0..t.shape().len()).filter(|i| t.shape()[*i] != 1).collect();
    match long.as_slice() {
        [axis] if t.count() >= FEWEST && !t.dtype().is_float() && t.dtype().bits() >= 8 && t.dtype() != DType::Bool => count(t, *axis),
        [row, col] if t.count() >= FEWEST * FEWEST && t.dtype().bits() >= 8 => triangle(t, *row, *col),
        _ => None,
    }
}

fn count(t: &Tensor, axis: usize) -> Option<Positions> {
    let at = |i: usize| match t.get(i) {
        Scalar::I(v) => i64::try_from(v).ok(),
        _ => None,
    };
    let start = at(0)?;
    let step = at(1)?.checked_sub(start)?;
    let expected = |i: usize| start.checked_add(step.checked_mul(i as i64)?);
    (step != 0 && (2..t.count()).all(|i| expected(i).is_some() && at(i) == expected(i))).then_some(Positions::Count { axis, start, step })
}

fn triangle(t: &Tensor, row: usize, col: usize) -> Option<Positions> {
    let (rows, cols) = (t.shape()[row], t.shape()[col]);
    let (below, above) = (t.get((rows - 1) * cols), t.get(cols - 1));
    let first = (0..cols).take_while(|c| same(t.get(*c), below)).count();
    let diagonal = first as i64 - 1;
    let holds = |r: usize, c: usize| same(t.get(r * cols + c), if c as i64 <= r as i64 + diagonal { below } else { above });
    (!same(below, above) && (0..rows).all(|r| (0..cols).all(|c| holds(r, c)))).then_some(Positions::Triangle { row, col, diagonal, below, above })
}

/// Bit for bit: -0 is not 0.
fn same(a: Scalar, b: Scalar) -> bool {
    match (a, b) {
        (Scalar::F(a), Scalar::F(b)) => a.to_bits() == b.to_bits(),
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ints(shape: &[usize], values: &[i64]) -> Tensor {
        Tensor::from_scalars(DType::I64, shape.to_vec(), values.iter().map(|v| Scalar::I(i128::from(*v))))
    }

    #[test]
    fn counts_and_what_is_none() {
        assert_eq!(of(&ints(&[1, 4], &[5, 3, 1, -1])), Some(Positions::Count { axis: 1, start: 5, step: -2 }));
        assert_eq!(of(&ints(&[4], &[0, 1, 2, 4])), None);
        assert_eq!(of(&ints(&[4], &[7, 7, 7, 7])), None);
        assert_eq!(of(&ints(&[3], &[0, 1, 2])), None);
    }

    #[test]
    fn triangles_of_every_diagonal() {
        for diagonal in -2..4 {
            let values: Vec<i64> = (0..16).map(|i| i64::from(i % 4 <= i / 4 + diagonal)).collect();
            let found = of(&ints(&[4, 1, 4], &values));
            match diagonal {
                -1..3 => assert_eq!(found, Some(Positions::Triangle { row: 0, col: 2, diagonal, below: Scalar::I(1), above: Scalar::I(0) })),
                _ => assert_eq!(found, None, "{diagonal}"),
            }
        }
        let mut values = [1; 16];
        values[1] = 0;
        assert_eq!(of(&ints(&[4, 4], &values)), None);
        let zeros = (0..16).map(|i| Scalar::F(if i % 4 <= i / 4 { if i == 0 { -0.0 } else { 0.0 } } else { 1.0 }));
        assert_eq!(of(&Tensor::from_scalars(DType::F32, [4, 4], zeros)), None);
    }
}
