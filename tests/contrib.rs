//! Operators of com.microsoft against onnxruntime: each model of `tests/contrib` has one, with random inputs and onnxruntime's
//! outputs for them (`scripts/contrib_cases.py` wrote both).
mod support;

use npyz::{DType as NpyType, TypeChar, npz::NpzArchive};
use pavage::{CompileOptions, Device, Options, Source, Tensor, compile};
use std::{fs::File, io::BufReader, path::Path};
use support::root;

/// The arrays of a case by name: their element type's code, shape and elements.
struct Case(NpzArchive<BufReader<File>>);

impl Case {
    fn names(&self, prefix: &str) -> Vec<String> {
        let mut names: Vec<String> = self.0.array_names().filter_map(|n| n.strip_prefix(prefix)).map(str::to_string).collect();
        names.sort();
        names
    }

    fn kind(&mut self, name: &str) -> (TypeChar, u64, Vec<usize>) {
        let array = self.0.by_name(name).unwrap().unwrap();
        let NpyType::Plain(ty) = array.dtype() else { panic!("{name} is a record") };
        (ty.type_char(), ty.size_field(), array.shape().iter().map(|d| *d as usize).collect())
    }

    fn read<T: npyz::Deserialize>(&mut self, name: &str) -> Vec<T> {
        self.0.by_name(name).unwrap().unwrap().into_vec().unwrap()
    }

    fn tensor(&mut self, name: &str) -> Tensor {
        let (kind, size, shape) = self.kind(name);
        match (kind, size) {
            (TypeChar::Float, 4) => Tensor::from_slice(&shape, &self.read::<f32>(name)),
            (TypeChar::Int, 8) => Tensor::from_slice(&shape, &self.read::<i64>(name)),
            (TypeChar::Int, 4) => Tensor::from_slice(&shape, &self.read::<i32>(name)),
            (TypeChar::Int, 1) => Tensor::from_slice(&shape, &self.read::<i8>(name)),
            (TypeChar::Uint, 1) => Tensor::from_slice(&shape, &self.read::<u8>(name)),
            other => panic!("{name} is {other:?}"),
        }
        .unwrap()
    }
}

/// Elements as f64, and what they may differ by.
fn elements(t: &Tensor, name: &str) -> (Vec<f64>, f64) {
    let step = |values: Vec<f64>| (values, 1.0);
    match t.dtype() {
        pavage::runtime::DType::F32 => {
            // onnxruntime rounds the activations of this one to 8 bits.
            let atol = if name.starts_with("quantised_lstm") { 1e-2 } else { 2e-5 };
            (t.as_slice::<f32>().unwrap().iter().map(|v| f64::from(*v)).collect(), atol)
        }
        // A result right between two steps.
        pavage::runtime::DType::U8 => step(t.as_slice::<u8>().unwrap().iter().map(|v| f64::from(*v)).collect()),
        pavage::runtime::DType::I8 => step(t.as_slice::<i8>().unwrap().iter().map(|v| f64::from(*v)).collect()),
        other => panic!("an output of {other:?}"),
    }
}

fn check(path: &Path, name: &str) -> Result<(), String> {
    let mut case = Case(NpzArchive::open(path.with_extension("npz")).unwrap());
    let compiled = compile(Source::Path(path), &CompileOptions::default()).map_err(|e| e.to_string())?;
    let artifact = compiled.open().map_err(|e| e.to_string())?;
    let inputs: Vec<(String, Tensor)> = case.names("in:").into_iter().map(|n| (n.clone(), case.tensor(&format!("in:{n}")))).collect();
    for plan in ["fused", "unfused"] {
        let mut session = artifact.session(Device::Cpu, Options { plan: plan.into(), threads: 2, ..Options::default() }).map_err(|e| e.to_string())?;
        let given: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let got = session.run(&given).map_err(|e| format!("{plan}: {e}"))?;
        for output in case.names("out:") {
            let (want, got) = (case.tensor(&format!("out:{output}")), &got[output.as_str()]);
            if got.shape() != want.shape() || got.dtype() != want.dtype() {
                return Err(format!("{plan}: {output} is {:?} {:?}, should be {:?} {:?}", got.dtype(), got.shape(), want.dtype(), want.shape()));
            }
            let ((a, atol), (b, _)) = (elements(got, name), elements(&want, name));
            let far: Vec<usize> = (0..a.len()).filter(|i| (a[*i] - b[*i]).abs() > atol + 1e-4 * b[*i].abs() || a[*i].is_nan()).collect();
            if let Some(i) = far.first() {
                return Err(format!("{plan}: {output}[{i}] is {}, should be {} ({} of {})", a[*i], b[*i], far.len(), a.len()));
            }
        }
    }
    Ok(())
}

#[test]
fn operators_of_com_microsoft_agree_with_onnxruntime() {
    let folder = root().join("tests/contrib");
    let mut names: Vec<String> =
        std::fs::read_dir(&folder).unwrap().filter_map(|e| e.unwrap().file_name().into_string().unwrap().strip_suffix(".onnx").map(str::to_string)).collect();
    names.sort();
    assert!(names.len() > 50, "{} cases", names.len());
    let failures: Vec<String> =
        names.iter().filter_map(|name| check(&folder.join(format!("{name}.onnx")), name).err().map(|why| format!("{name}: {why}"))).collect();
    assert!(failures.is_empty(), "{} of {} fail:\n{}", failures.len(), names.len(), failures.join("\n"));
}
