//! `TfIdfVectorizer` over numbers: how often each listed n-gram occurs.
use super::{linear, reduce};
use crate::onnx::{
    build::{Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{DType, Dim, ScalarFn, Tensor, attr::ReduceFn};

/// N-grams of one length and, of each, its place in the output.
struct Grams<'a> {
    length: usize,
    grams: Vec<(&'a [i64], usize)>,
}

/// The listed n-grams by length; of equal ones the last counts.
fn read<'m>(cx: &Cx<'_, 'm>) -> Res<(Vec<Grams<'m>>, usize)> {
    let Some(pool) = cx.ints_opt("pool_int64s")?.filter(|p| !p.is_empty()) else { return missing("n-grams of strings") };
    let (counts, indexes) = (cx.ints_opt("ngram_counts")?.unwrap_or(&[]), cx.ints_opt("ngram_indexes")?.unwrap_or(&[]));
    let bounds: Vec<i64> = counts.iter().copied().chain([pool.len() as i64]).collect();
    if bounds.windows(2).any(|w| w[0] < 0 || w[0] > w[1]) || indexes.iter().any(|i| !(0..1 << 24).contains(i)) {
        return invalid(format!("ngram_counts {counts:?}"));
    }
    let Some(most) = indexes.iter().max() else { return invalid("no ngram_indexes") };
    let (shortest, longest) = (cx.int("min_gram_length", 1)?, cx.int("max_gram_length", 1)?);
    let (mut out, mut next) = (vec![], 0);
    for (i, w) in bounds.windows(2).enumerate() {
        let length = i + 1;
        let part = &pool[w[0] as usize..w[1] as usize];
        let mut grams: Vec<(&[i64], usize)> = vec![];
        for gram in part.chunks_exact(length) {
            let Some(at) = indexes.get(next) else { return invalid(format!("{} ngram_indexes", indexes.len())) };
            next += 1;
            match grams.iter_mut().find(|(g, _)| *g == gram) {
                Some(same) => same.1 = *at as usize,
                None => grams.push((gram, *at as usize)),
            }
        }
        if (shortest..=longest).contains(&(length as i64)) && !grams.is_empty() {
            out.push(Grams { length, grams });
        }
    }
    Ok((out, *most as usize + 1))
}

pub(crate) fn convert(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let dtype = cx.dtype(x);
    if dtype == DType::Str {
        return missing("n-grams of strings");
    }
    let (all, size) = read(cx)?;
    let skips = cx.int("max_skip_count", 0)?;
    let shape = cx.shape(x);
    let Some(words) = shape.last().and_then(Dim::as_const) else { return missing("n-grams of rows whose length is not known") };
    if shape.len() > 2 || !dtype.is_int() || !(0..=1 << 10).contains(&skips) {
        return invalid(format!("words of type {}, {skips} skips", cx.ty(x)));
    }
    let rows = if shape.len() == 2 { shape[0].clone() } else { Dim::one() };
    let x = cx.cast(x, DType::I64)?;
    let x = cx.reshape(x, vec![rows.clone(), Dim::from(words), Dim::one()])?;
    let zero = cx.scalar(DType::F32, 0.0);
    let mut y = cx.broadcast_to(zero, &[rows.clone(), Dim::from(size)])?;
    for Grams { length, grams } in all {
        let mut count: Option<Val> = None;
        // One word has nothing to skip.
        for step in 1..=if length == 1 { 1 } else { skips + 1 } {
            let starts = words - step * (length as i64 - 1);
            if starts < 1 {
                break;
            }
            let mut hit: Option<Val> = None;
            for j in 0..length {
                let word = cx.slice_axis(x, 1, Dim::from(step * j as i64), Dim::from(starts))?;
                let wanted: Vec<i64> = grams.iter().map(|(g, _)| g[j]).collect();
                let wanted = cx.ints(&wanted);
                let same = cx.pointwise(ScalarFn::Eq, &[word, wanted])?;
                hit = Some(match hit {
                    Some(hit) => cx.map(ScalarFn::And, &[hit, same])?,
                    None => same,
                });
            }
            let Some(hit) = hit else { continue };
            let hit = cx.cast(hit, DType::F32)?;
            let sum = reduce::reduce(cx, ReduceFn::Sum, hit, &[1])?;
            let sum = reduce::drop_axes(cx, sum, &[1])?;
            count = Some(match count {
                Some(count) => cx.map(ScalarFn::Add, &[count, sum])?,
                None => sum,
            });
        }
        if let Some(count) = count {
            let mut place = vec![0.0f32; grams.len() * size];
            grams.iter().enumerate().for_each(|(i, (_, at))| place[i * size + at] = 1.0);
            let place = cx.constant(Tensor::from_f32([grams.len(), size], &place));
            let part = linear::matmul(cx, count, place, DType::F32)?;
            y = cx.map(ScalarFn::Add, &[y, part])?;
        }
    }
    let weights = match cx.floats("weights")? {
        Some(w) if w.len() < size => return invalid(format!("{} weights for {size} places", w.len())),
        Some(w) => Some(cx.constant(Tensor::from_f32([size], &w[..size]))),
        None => None,
    };
    y = match (cx.text("mode", "TF")?.as_str(), weights) {
        ("TF", _) | ("TFIDF", None) => y,
        ("TFIDF", Some(w)) => cx.pointwise(ScalarFn::Mul, &[y, w])?,
        ("IDF", w) => {
            let some = cx.with_number(ScalarFn::Gt, y, 0.0)?;
            let one = cx.scalar(DType::F32, 1.0);
            cx.pointwise(ScalarFn::Select, &[some, w.unwrap_or(one), zero])?
        }
        (other, _) => return invalid(format!("mode `{other}`")),
    };
    let mut out = vec![Dim::from(size)];
    if shape.len() == 2 {
        out.insert(0, rows);
    }
    Ok(vec![cx.reshape(y, out)?])
}
