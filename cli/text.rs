//! Tables, numbers and colours for people.
use anstyle::{AnsiColor, Style};
use comfy_table::{Cell, CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};
use pavage::runtime::plan::{Port, Symbol};

/// Remarks.
pub(crate) const DIM: Style = Style::new().dimmed();
/// The word before an error.
pub(crate) const ERROR: Style = AnsiColor::Red.on_default().bold();
/// Headings.
pub(crate) const BOLD: Style = Style::new().bold();

/// A table with a head; columns whose name ends in a space-free `#` are numbers: right-aligned.
pub(crate) fn table(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let numeric: Vec<bool> = head.iter().map(|h| h.ends_with('#')).collect();
    let cell = |(i, text): (usize, &str)| {
        let align = if numeric.get(i) == Some(&true) { CellAlignment::Right } else { CellAlignment::Left };
        Cell::new(text).set_alignment(align)
    };
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'))).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(head.iter().map(|h| h.trim_end_matches('#')).enumerate().map(cell));
    for row in rows {
        table.add_row(row.iter().map(String::as_str).enumerate().map(cell));
    }
    table.to_string()
}

/// Bytes with three digits: `18.8 MB`.
pub(crate) fn bytes(n: f64) -> String {
    scaled(n, 1000.0, &["B", "kB", "MB", "GB", "TB"])
}

/// Nanoseconds with three digits: `1.25 ms`.
pub(crate) fn time(ns: f64) -> String {
    scaled(ns, 1000.0, &["ns", "us", "ms", "s"])
}

fn scaled(n: f64, base: f64, units: &[&str]) -> String {
    let mut n = n;
    let mut unit = 0;
    while n.abs() >= 999.5 && unit + 1 < units.len() {
        n /= base;
        unit += 1;
    }
    let digits = match n.abs() {
        _ if unit == 0 && n.fract() == 0.0 => 0,
        a if a < 9.995 => 2,
        a if a < 99.95 => 1,
        _ => 0,
    };
    format!("{n:.digits$} {}", units[unit])
}

/// A port as a signature: `image: f32[n x 1 x 8 x 8]`.
pub(crate) fn port(port: &Port, symbols: &[Symbol]) -> String {
    let names: Vec<&str> = symbols.iter().map(|s| s.name.as_str()).collect();
    let dims: Vec<String> = port.dims.iter().map(|d| d.with_names(&names).to_string()).collect();
    format!("{}: {}[{}]", port.name, port.dtype, dims.join(" x "))
}

/// Extents: `[1 x 3 x 224]`.
pub(crate) fn shape(dims: &[usize]) -> String {
    let dims: Vec<String> = dims.iter().map(|d| d.to_string()).collect();
    format!("[{}]", dims.join(" x "))
}

/// `1 kernel`, `2 kernels`.
pub(crate) fn count(n: usize, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(bytes(0.0), "0 B");
        assert_eq!(bytes(999.0), "999 B");
        assert_eq!(bytes(18_805_419.0), "18.8 MB");
        assert_eq!(bytes(-1500.0), "-1.50 kB");
        assert_eq!(time(1_254_000.0), "1.25 ms");
        assert_eq!(time(12.5), "12.5 ns");
        assert_eq!(time(999_900.0), "1.00 ms");
    }
}
