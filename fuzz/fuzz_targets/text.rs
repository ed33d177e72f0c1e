//! The reader of IR text: whatever is read prints to a text that reads back to the same text.
#![no_main]
use libfuzzer_sys::fuzz_target;
use pavage_ir::text;

fuzz_target!(|source: &str| {
    let Ok(graph) = text::parse(source, &|_| None) else { return };
    let printed = text::print_full(&graph);
    let again = text::parse(&printed, &|_| None).expect("what is printed is read");
    assert_eq!(text::print_full(&again), printed);
});
