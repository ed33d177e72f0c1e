//! The file format: what is written is read, and what is damaged is refused without a panic.
mod common;
use common::*;
use pavage_runtime::plan::*;
use pavage_runtime::{Artifact, DType, Device, DimExpr, Error, FORMAT_VERSION, Options, SegmentKind, Writer, content_hash};

fn small_bytes() -> Vec<u8> {
    let (writer, manifest) = small_model();
    writer.to_bytes(manifest).unwrap()
}

#[test]
fn what_is_written_is_read_and_always_the_same_bytes() {
    let bytes = small_bytes();
    assert_eq!(bytes, small_bytes());
    let artifact = Artifact::from_bytes(&bytes).unwrap();
    let (_, wrote) = small_model();
    assert_eq!(artifact.manifest().plans, wrote.plans);
    assert_eq!(artifact.manifest().inputs, wrote.inputs);
    assert_eq!(artifact.tensor(0), 2.5f32.to_le_bytes());
    assert_eq!(artifact.code(0).unwrap(), kernels());
    artifact.verify().unwrap();
    let kinds: Vec<SegmentKind> = artifact.segments().iter().map(|s| s.kind).collect();
    assert_eq!(kinds, [SegmentKind::Manifest, SegmentKind::Code, SegmentKind::Weights]);
    assert!(artifact.segments().iter().all(|s| s.offset % 4096 == 0));
}

#[test]
fn equal_constants_are_stored_once_and_all_lie_at_multiples_of_256() {
    let (mut writer, manifest) = small_model();
    let first = writer.add_tensor("p", DType::F32, &[75], noise_bytes(1, 75));
    let second = writer.add_tensor("q", DType::I32, &[5, 15], noise_bytes(1, 75));
    let third = writer.add_tensor("r", DType::F32, &[3], noise_bytes(2, 3));
    let bytes = writer.to_bytes(manifest).unwrap();
    let artifact = Artifact::from_bytes(&bytes).unwrap();
    assert_eq!(artifact.tensor(first as usize), noise_bytes(1, 75));
    assert_eq!(artifact.tensor(second as usize), noise_bytes(1, 75));
    assert_eq!(artifact.tensor(third as usize), noise_bytes(2, 3));
    let places: Vec<u64> = artifact
        .manifest()
        .tensors
        .iter()
        .map(|t| match &t.data {
            TensorData::Embedded { offset, .. } => *offset,
            TensorData::External { .. } => panic!("embedded"),
        })
        .collect();
    assert_eq!(places, [0, 256, 256, 768]);
    assert_eq!(artifact.tensor(0).as_ptr() as usize % 256, 0);
}

fn noise_bytes(seed: u64, n: usize) -> Vec<u8> {
    noise(seed, n).iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let bytes = small_bytes();
    for len in 0..bytes.len() {
        let error = Artifact::from_bytes(&bytes[..len]).err().unwrap();
        assert_eq!(error.exit_code(), 2);
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(matches!(Artifact::from_bytes(&longer), Err(Error::Damaged(_))));
}

#[test]
fn a_flipped_bit_is_found_or_does_not_matter() {
    let bytes = small_bytes();
    let good = Artifact::from_bytes(&bytes).unwrap();
    let mut unnoticed = 0;
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1 << (at % 8);
        match Artifact::from_bytes(&bad) {
            Err(error) => assert_eq!(error.exit_code(), if is_version(at) { error.exit_code() } else { 2 }),
            Ok(artifact) => {
                assert_eq!(artifact.manifest(), good.manifest(), "byte {at}");
                let code = artifact.code(0).is_err();
                let weights = artifact.verify().is_err();
                // Nobody reads padding.
                unnoticed += usize::from(!code && !weights);
                if weights && !code {
                    assert!(artifact.session(Device::Cpu, Options::default()).is_ok());
                } else if code {
                    assert!(artifact.session(Device::Cpu, Options::default()).is_err());
                }
            }
        }
    }
    let used: u64 = good.segments().iter().map(|s| s.len).sum();
    assert!(unnoticed as u64 <= bytes.len() as u64 - used);
}

fn is_version(at: usize) -> bool {
    (8..12).contains(&at)
}

#[test]
fn a_hostile_table_of_contents_never_panics() {
    // Numbers in the table changed, and its checksum made right again.
    let bytes = small_bytes();
    let rows = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let values = [0, 1, 47, 63, 64, 4095, 4096, 8192, bytes.len() as u64, u64::from(u32::MAX), u64::MAX - 4095, u64::MAX];
    for row in 0..rows {
        for field in [0, 8, 16] {
            for value in values {
                let mut bad = bytes.clone();
                let at = 64 + row * 48 + field;
                let width = if field == 0 { 4 } else { 8 };
                bad[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
                let mut hasher = blake3::Hasher::new();
                hasher.update(&bad[..24]).update(&bad[64..64 + rows * 48]);
                bad[24..40].copy_from_slice(&hasher.finalize().as_bytes()[..16]);
                if let Ok(artifact) = Artifact::from_bytes(&bad) {
                    artifact.verify().ok();
                    artifact.session(Device::Null, Options::default()).ok();
                }
            }
        }
    }
    for count in [0u32, 1, 2, 4, 5, 1 << 16, u32::MAX] {
        let mut bad = bytes.clone();
        bad[12..16].copy_from_slice(&count.to_le_bytes());
        assert!(Artifact::from_bytes(&bad).is_err());
    }
}

#[test]
fn mutated_manifests_never_panic() {
    // Changes inside the manifest with its checksum made right again: what a hostile file can do.
    let (_, manifest) = small_model();
    let mut base = manifest;
    base.plans.extend(nested_plans());
    let json = serde_json::to_string(&base).unwrap();
    let mut state = 1u64;
    let mut random = |n: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % n
    };
    let mut accepted = 0;
    for _ in 0..4000 {
        let mut text = json.clone().into_bytes();
        for _ in 0..1 + random(3) {
            let digits: Vec<usize> = (0..text.len()).filter(|i| text[*i].is_ascii_digit()).collect();
            let at = digits[random(digits.len())];
            match random(4) {
                0 => text[at] = b'0' + random(10) as u8,
                1 => text.splice(at..at + 1, *b"4294967295").for_each(drop),
                2 => text.splice(at..at + 1, *b"-9223372036854775808").for_each(drop),
                _ => text.splice(at..at + 1, *b"9223372036854775807").for_each(drop),
            }
        }
        let Ok(manifest) = serde_json::from_slice::<Manifest>(&text) else { continue };
        let (writer, _) = small_model();
        let Ok(bytes) = writer.to_bytes(manifest) else { continue };
        let artifact = Artifact::from_bytes(&bytes).unwrap();
        accepted += 1;
        // The null device goes through all sizes and places without running code.
        for plan in ["fused", "unfused", "nested"] {
            let options = Options { plan: plan.into(), ..Options::default() };
            let Ok(mut session) = artifact.session(Device::Null, options) else { continue };
            let x = tensor(&[2, 8], &noise(1, 16));
            session.run(&[("a", &x), ("b", &x)]).ok();
        }
    }
    assert!(accepted > 100, "{accepted} mutants were let through");
}

/// A plan with a branch, a loop, views and a size computed at run time.
fn nested_plans() -> Vec<Plan> {
    let shape = [s(0), c(8)];
    let branch = || Body {
        buffers: vec![floats(&shape, BufferKind::Captured(id(0))), floats(&shape, BufferKind::Output(0))],
        steps: vec![Step::Copy { from: id(0), to: id(1) }],
        inputs: vec![],
        outputs: ids(&[1]),
    };
    let inner = Body {
        buffers: vec![buffer(DType::I64, &[], BufferKind::Input(0)), buffer(DType::Bool, &[], BufferKind::Input(1)), floats(&shape, BufferKind::Input(2))],
        steps: vec![],
        inputs: ids(&[0, 1, 2]),
        outputs: ids(&[1, 2, 2]),
    };
    let body = Body {
        buffers: vec![
            floats(&shape, BufferKind::Input(0)),
            floats(&shape, BufferKind::Input(1)),
            buffer(DType::Bool, &[], BufferKind::Arena),
            buffer(DType::I64, &[], BufferKind::Arena),
            floats(&shape, BufferKind::Arena),
            floats(&[s(0), s(0), c(8)], BufferKind::Arena),
            floats(&shape, view(5, DimExpr::Mul(vec![c(0), s(0)]))),
            floats(&shape, BufferKind::Output(0)),
        ],
        steps: vec![
            launch(0, &[2], &[]),
            Step::If { cond: id(2), then_body: branch().into(), else_body: branch().into(), outputs: ids(&[4]) },
            Step::Loop { trip: Some(id(3)), cond: None, body: inner.into(), carried: ids(&[4]), outputs: ids(&[7, 5]) },
        ],
        inputs: ids(&[0, 1]),
        outputs: ids(&[7]),
    };
    vec![plan("nested", vec![kernel("always", 1, 0, c(1))], body)]
}

#[test]
fn files_that_are_no_artifacts_are_refused() {
    let folder = folder("none");
    let empty = folder.join("empty.pav");
    std::fs::write(&empty, b"").unwrap();
    for path in [folder.join("missing.pav"), folder.clone(), empty, "/dev/zero".into()] {
        let error = Artifact::open(&path).err().unwrap();
        assert_eq!(error.exit_code(), 2, "{error}");
    }
    std::fs::remove_dir_all(folder).ok();
}

#[test]
fn a_newer_format_says_what_to_do() {
    let mut bytes = small_bytes();
    bytes[8..12].copy_from_slice(&(FORMAT_VERSION + 2).to_le_bytes());
    let error = Artifact::from_bytes(&bytes).err().unwrap();
    assert_eq!(error.to_string(), "this artifact is format 3, this runtime reads 1..=1: update pavage-runtime");
    let error = Artifact::from_bytes(b"\x7fELF and so on").err().unwrap();
    assert_eq!(error.to_string(), "not a Pavage artifact: it does not begin with PAVAGE");
}

#[test]
fn code_for_another_cpu_is_refused_by_the_feature_it_lacks() {
    let build = |target: &str, features: &[&str]| {
        let mut writer = Writer::new();
        let features: Vec<String> = features.iter().map(|f| f.to_string()).collect();
        writer.add_code(target, CodeKind::SharedObject, &features, kernels());
        writer.add_tensor("w", DType::F32, &[1], vec![0; 4]);
        let (_, mut manifest) = small_model();
        manifest.plans.iter_mut().for_each(|p| p.target = target.into());
        let artifact = Artifact::from_bytes(&writer.to_bytes(manifest).unwrap()).unwrap();
        artifact.session(Device::Cpu, Options::default()).err()
    };
    assert!(build(pavage_runtime::host_level(), &[]).is_none());
    let error = build("native:venus", &["avx2", "avx9000"]).unwrap();
    assert_eq!(error.exit_code(), 4);
    let text = error.to_string();
    assert!(text.starts_with("the artifact is compiled for native:venus: this CPU lacks"), "{text}");
    assert!(text.contains("avx9000"), "{text}");
    if pavage_runtime::has_feature("avx512f") == Some(false) {
        assert!(build("x86-64-v4", &[]).unwrap().to_string().contains("avx512f"));
    }
    let error = build("sm_90a", &[]).unwrap();
    assert!(error.to_string().contains("no plan `fused` for cpu"), "{error}");
    assert!(error.to_string().contains("it has sm_90a"), "{error}");
}

#[test]
fn the_best_code_for_this_cpu_is_taken() {
    let (mut writer, mut manifest) = small_model();
    let mut plans = manifest.plans.clone();
    for target in ["x86-64-v2", "native:here", "sm_80"] {
        let code = writer.add_code(target, CodeKind::SharedObject, &[], kernels());
        for plan in &mut plans {
            (plan.target, plan.code) = (target.into(), code);
        }
        manifest.plans.extend(plans.clone());
    }
    let artifact = Artifact::from_bytes(&writer.to_bytes(manifest).unwrap()).unwrap();
    let best = artifact.session(Device::Cpu, Options::default()).unwrap();
    assert_eq!(best.plan().target, "native:here");
    let options = Options { target: Some("x86-64-v2".into()), ..Options::default() };
    let asked = artifact.session(Device::Cpu, options).unwrap();
    assert_eq!(asked.plan().target, "x86-64-v2");
}

#[test]
fn weights_in_other_files_stay_in_the_folder() {
    let folder = folder("external");
    let bytes = [vec![9u8; 3], noise_bytes(3, 1)].concat();
    std::fs::write(folder.join("weights.bin"), &bytes).unwrap();
    std::fs::write(folder.join("..").join(format!("pavage-out-{}", std::process::id())), b"0123456").unwrap();
    let outside = format!("pavage-out-{}", std::process::id());
    std::os::unix::fs::symlink(folder.join("..").join(&outside), folder.join("link")).unwrap();
    let save = |path: &str, offset: u64, hash: &str| {
        let mut writer = Writer::new();
        writer.add_code("x86-64", CodeKind::SharedObject, &[], kernels());
        writer.add_external("w", DType::F32, &[1], (path, offset, 4), hash);
        let file = folder.join("model.pav");
        writer.save(small_model().1, &file)?;
        Artifact::open(&file)
    };
    let hash = content_hash(&noise_bytes(3, 1));
    let good = save("./weights.bin", 3, &hash).unwrap();
    good.verify().unwrap();
    // At an odd place in the file, and still right.
    let mut session = good.session(Device::Cpu, Options::default()).unwrap();
    let x = tensor(&[1, 8], &[1.0; 8]);
    let out = session.run(&[("a", &x), ("b", &x)]).unwrap();
    assert_eq!(out[0].as_slice::<f32>().unwrap(), [2.0 * noise(3, 1)[0]; 8]);

    let changed = save("weights.bin", 3, &content_hash(b"else")).unwrap();
    assert!(changed.verify().unwrap_err().to_string().contains("tensor `w` in weights.bin"));
    for (path, offset, why) in [
        ("weights.bin", 4, "lie beyond its 7 bytes"),
        ("weights.bin", u64::MAX - 2, "overflows"),
        (&format!("../{outside}"), 0, "leaves the artifact's folder"),
        ("/etc/passwd", 0, "leaves the artifact's folder"),
        ("link", 0, "link out of the folder"),
        ("missing.bin", 0, "No such file"),
        ("", 0, "leaves the artifact's folder"),
    ] {
        let error = save(path, offset, &hash).err().unwrap();
        assert!(error.to_string().contains(why), "{path}: {error}");
        assert_eq!(error.exit_code(), 2);
    }
    std::fs::remove_file(folder.join("..").join(outside)).ok();
    std::fs::remove_dir_all(folder).ok();
}

#[test]
fn a_plan_that_does_not_hold_together_is_refused_when_written() {
    let refuse = |change: &dyn Fn(&mut Manifest)| {
        let (writer, mut manifest) = small_model();
        manifest.plans.extend(nested_plans());
        change(&mut manifest);
        match writer.to_bytes(manifest) {
            Err(Error::Damaged(why)) => why,
            other => panic!("{:?}", other.map(|b| b.len())),
        }
    };
    type Case<'a> = (&'a dyn Fn(&mut Manifest), &'a str);
    let cases: [Case; 16] = [
        (&|m| m.plans[0].code = 9, "no code 9"),
        (&|m| m.plans[0].target = "sm_80".into(), "its code is for x86-64"),
        (&|m| m.plans[0].body.inputs.truncate(1), "Input(1) does not fit"),
        (&|m| m.plans[0].body.outputs[0] = id(0), "Output(0) does not fit"),
        (&|m| m.plans[0].body.steps[0] = launch(7, &[], &[]), "no kernel 7"),
        (&|m| m.plans[0].body.steps[0] = launch(0, &[0, 1, 2], &[]), "takes 4 buffers and 0 sizes"),
        (&|m| m.plans[0].body.steps[0] = launch(0, &[0, 1, 2, 77], &[]), "no buffer 77"),
        (&|m| m.plans[1].body.buffers[4].dims[0] = s(5), "symbol 5 in `s5` is never defined"),
        (&|m| m.plans[1].body.buffers[4].kind = view(4, c(0)), "is a view of itself"),
        (&|m| m.plans[0].kernels[0].cpu = None, "has no launch for this target"),
        (&|m| m.plans[0].body.buffers[2].dims[0] = c(2), "Const(0) does not fit"),
        (&|m| m.outputs[0].dims[0] = s(9), "no symbol 9"),
        (&|m| m.inputs[1].name = "a".into(), "two inputs are called `a`"),
        (&|m| m.plans[2].body.buffers[3].dtype = DType::I32, "is no i64 scalar"),
        (&|m| m.plans[2].body.steps[0] = Step::Copy { from: id(1), to: id(0) }, "buffer 0 is read only"),
        (&|m| m.plans[2].body.steps[0] = Step::Bind { buffer: id(3), symbol: 0 }, "symbol 0 defined twice"),
    ];
    for (change, expect) in cases {
        let why = refuse(change);
        assert!(why.contains(expect), "{why}\nis not: {expect}");
    }
    let deep = refuse(&|m| {
        for _ in 0..20 {
            let around = m.plans[2].body.clone();
            let Step::If { then_body, .. } = &mut m.plans[2].body.steps[1] else { return };
            *then_body = Body { inputs: vec![], ..around }.into();
        }
    });
    assert!(deep.contains("nest deeper") || deep.contains("does not fit"), "{deep}");
}

#[test]
fn a_large_artifact_opens_in_milliseconds() {
    let folder = folder("large");
    let file = folder.join("large.pav");
    let (mut writer, mut manifest) = small_model();
    for seed in 0..20 {
        writer.add_tensor("big", DType::F32, &[1 << 18], noise_bytes(seed, 1 << 18));
    }
    // Three hundred kernels, as a network has.
    let (kernel, plan) = (manifest.plans[1].kernels[0].clone(), &mut manifest.plans[1]);
    plan.kernels.extend(std::iter::repeat_n(kernel, 300));
    for k in 0..300 {
        plan.body.steps.insert(1, launch(3 + k, &[0, 1, 4], &[]));
    }
    writer.save(manifest, &file).unwrap();
    let mut best = f64::MAX;
    for _ in 0..5 {
        let start = std::time::Instant::now();
        let artifact = Artifact::open(&file).unwrap();
        best = best.min(start.elapsed().as_secs_f64());
        assert!(artifact.len() > 20_000_000);
        assert_eq!(artifact.tensor(20).len(), 1 << 20);
    }
    std::fs::remove_dir_all(folder).ok();
    assert!(best < 0.010, "opening took {best} s");
}
