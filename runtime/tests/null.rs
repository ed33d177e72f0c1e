//! The null device: what a session asks of a device, in text.
mod common;
use common::*;
use pavage_runtime::{Artifact, Device, Options};

#[test]
fn launches_and_places_are_written_down() {
    let (writer, manifest) = small_model();
    let artifact = Artifact::from_bytes(&writer.to_bytes(manifest).unwrap()).unwrap();
    let log = |plan: &str, n: usize| {
        let options = Options { plan: plan.into(), ..Options::default() };
        let mut session = artifact.session(Device::Null, options).unwrap();
        let x = tensor(&[n, 8], &noise(1, n * 8));
        let out = session.run(&[("a", &x), ("b", &x)]).unwrap();
        assert_eq!(out[0].shape(), [n, 8]);
        session.take_log().join("\n")
    };
    assert_eq!(log("fused", 3), "alloc arena0 0\nlaunch add_relu_scale [in0 in1 const0 out0] extent 24 grain 4");
    assert_eq!(
        log("unfused", 100),
        "alloc arena0 6656\n\
         launch add [in0 in1 arena0] extent 800 grain 4\n\
         launch relu [arena0 arena0+0xd00] extent 800 grain 4\n\
         launch scale [arena0+0xd00 const0 out0] extent 800 grain 4"
    );
}
