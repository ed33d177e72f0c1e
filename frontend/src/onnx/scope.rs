//! What is said of operators that are not read: the nearest that is, or that none will be.
use super::registry;

/// Operators that no graph of tensors holds, by what they do.
const OUT_OF_SCOPE: &[(&[&str], &str)] = &[
    (
        &["StringConcat", "StringSplit", "StringNormalizer", "RegexFullMatch", "Tokenizer", "CategoryMapper"],
        "out of scope: Pavage compiles no text; do this before the model",
    ),
    (&["ImageDecoder"], "out of scope: Pavage decodes no images; give the model pixels"),
    (&["Gradient", "Adagrad", "Adam", "Momentum"], "out of scope: Pavage compiles models to run, not to train; export the model for inference"),
];

/// The nearest thing to an operator that is not read, or to a form of it that is not; empty where nothing is near.
pub(crate) fn nearest(domain: &str, op: &str) -> String {
    if let Some((_, why)) = OUT_OF_SCOPE.iter().find(|(ops, _)| ops.contains(&op)) {
        return (*why).into();
    }
    if domain.contains("training") {
        return OUT_OF_SCOPE[2].1.into();
    }
    if let Some((_, _, since)) = registry::operators().find(|(d, o, _)| *d == domain && *o == op) {
        let sets: Vec<String> = since.iter().map(i64::to_string).collect();
        return format!("nearest: other forms of {op}, as operator sets {} define it", sets.join(", "));
    }
    // One letter in four may differ, and less is better; the same name in another domain is best.
    let best = registry::operators().map(|(d, o, _)| (distance(op, o), d, o)).min();
    match best {
        Some((n, d, o)) if n <= op.len() / 4 => format!("nearest: {d}::{o}"),
        _ => String::new(),
    }
}

/// Letters to insert, delete or replace to make one word of the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_as_far_apart_as_edits() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "Add"), 3);
        assert_eq!(nearest("com.example", "Gelu"), "nearest: ai.onnx::Gelu");
        assert_eq!(nearest("ai.onnx", "Convolution9000"), "");
        assert!(nearest("ai.onnx", "StringSplit").contains("out of scope"));
        assert!(nearest("ai.onnx.preview.training", "Adam").contains("not to train"));
        assert!(nearest("ai.onnx", "Resize").contains("other forms"));
    }
}
