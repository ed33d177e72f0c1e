//! The artifact reader: bytes as a whole file, and bytes as the manifest of a file whose checksums
//! are right, opened and run on the null device, which goes through all sizes and places.
#![no_main]
use libfuzzer_sys::fuzz_target;
use pavage_runtime::plan::{CodeKind, Manifest, Port};
use pavage_runtime::{Artifact, DType, Device, DimExpr, Options, Tensor, Value, Writer};

fuzz_target!(|data: &[u8]| {
    if let Ok(artifact) = Artifact::from_bytes(data) {
        artifact.verify().ok();
    }
    let Ok(manifest) = serde_json::from_slice::<Manifest>(data) else { return };
    let mut writer = Writer::new();
    writer.add_code("x86-64", CodeKind::SharedObject, &[], &b"\x7fELF"[..]);
    writer.add_code("sm_80", CodeKind::Ptx, &[], &b".version 7.8"[..]);
    writer.add_tensor("w", DType::F32, &[1], vec![0; 4]);
    writer.add_tensor("v", DType::I64, &[2, 3], vec![1; 48]);
    let Ok(bytes) = writer.to_bytes(manifest) else { return };
    let artifact = Artifact::from_bytes(&bytes).expect("what is written is read");
    for plan in &artifact.manifest().plans {
        let options = Options { plan: plan.name.clone(), target: Some(plan.target.clone()), ..Options::default() };
        let Ok(mut session) = artifact.session(Device::Null, options) else { continue };
        for extent in [1usize, 2] {
            let inputs: Vec<Tensor> = artifact
                .inputs()
                .iter()
                .map(|p| {
                    let shape: Vec<usize> = p.dims.iter().map(|d| d.as_const().map_or(extent, |c| c.clamp(0, 8) as usize)).collect();
                    Tensor::zeros(p.dtype, &shape[..shape.len().min(6)])
                })
                .collect::<Result<_, _>>()
                .unwrap_or_default();
            let named: Vec<(&str, Value)> = artifact.inputs().iter().zip(&inputs).map(|(p, t)| (p.name.as_str(), Value::from(t))).collect();
            // Outputs of a hostile plan may be as large as they like: only places are of interest.
            let small = |p: &Port| p.dims.len() < 4 && p.dims.iter().all(|d| matches!(d, DimExpr::Sym(_) | DimExpr::Const(..100)));
            if artifact.outputs().iter().all(small) {
                session.run(&named).ok();
            }
        }
    }
});
