//! The ONNX reader: whatever is read has a text that reads back to the same text.
#![no_main]
use libfuzzer_sys::fuzz_target;
use pavage_frontend::onnx::{Options, load_bytes};
use pavage_ir::{text, verify};

fuzz_target!(|data: &[u8]| {
    let Ok(model) = load_bytes(data, &Options::default()) else { return };
    verify(&model.graph).expect("an imported graph verifies");
    let printed = text::print(&model.graph);
    let constants = text::constants(&model.graph);
    let again = text::parse(&printed, &|name| constants.get(name).cloned()).expect("what is printed is read");
    assert_eq!(text::print(&again), printed);
});
