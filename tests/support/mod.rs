//! What the tests of the program share: running it, a folder of their own, ONNX files by hand.
#![allow(dead_code, unreachable_pub, reason = "each test binary has its own copy and uses some of it")]
use npyz::WriterBuilder;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// An empty folder of this test's own.
pub fn folder(test: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{test}-{}", std::process::id()));
    std::fs::remove_dir_all(&path).ok();
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// Writes an archive of f32 arrays.
pub fn write_npz(path: &Path, arrays: &[(&str, &[u64], &[f32])]) {
    let mut npz = npyz::npz::NpzWriter::create(path).unwrap();
    for (name, shape, data) in arrays {
        let mut array = npz.array(name, Default::default()).unwrap().default_dtype().shape(shape).begin_nd().unwrap();
        array.extend(data.iter().copied()).unwrap();
        array.finish().unwrap();
    }
}

/// The test pictures of digits, as the model takes them, and what they show.
pub fn pictures() -> (Vec<f32>, Vec<u8>) {
    let mut npz = npyz::npz::NpzArchive::open(root().join("examples/models/digits_test.npz")).unwrap();
    let images: Vec<u8> = npz.by_name("image16").unwrap().unwrap().into_vec().unwrap();
    let labels = npz.by_name("label").unwrap().unwrap().into_vec().unwrap();
    (images.iter().map(|p| f32::from(*p) / 16.0).collect(), labels)
}

/// What a run of the program gave.
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Insists on an exit code.
    #[track_caller]
    pub fn exits(self, code: i32) -> Ran {
        assert_eq!(self.code, code, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// Insists that standard error says all of this.
    #[track_caller]
    pub fn says(self, parts: &[&str]) -> Ran {
        for part in parts {
            assert!(self.stderr.contains(part), "no `{part}` in:\n{}", self.stderr);
        }
        self
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}", self.stdout))
    }
}

/// Runs the program. Its cache is a folder of the build.
pub fn pavage<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
    let Output { status, stdout, stderr } =
        Command::new(env!("CARGO_BIN_EXE_pavage")).args(args).env("PAVAGE_CACHE", cache).current_dir(root()).output().unwrap();
    Ran { code: status.code().unwrap_or(-1), stdout: String::from_utf8(stdout).unwrap(), stderr: String::from_utf8_lossy(&stderr).into_owned() }
}

/// Notes for `x` that something could not be run.
pub fn not_run(what: &str) {
    use std::io::Write;
    eprintln!("not run: {what}");
    if let Some(path) = std::env::var_os("PAVAGE_NOT_RUN") {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
        writeln!(file, "{what}").unwrap();
    }
}

/// A protocol buffer message, by hand.
#[derive(Clone, Default)]
pub struct Message(pub Vec<u8>);

impl Message {
    pub fn new() -> Self {
        Message::default()
    }

    fn varint(&mut self, mut n: u64) {
        while n >= 0x80 {
            self.0.push(n as u8 | 0x80);
            n >>= 7;
        }
        self.0.push(n as u8);
    }

    /// An integer field.
    pub fn int(mut self, field: u64, value: i64) -> Self {
        self.varint(field << 3);
        self.varint(value as u64);
        self
    }

    /// A field of four bytes.
    pub fn fixed(mut self, field: u64, value: u32) -> Self {
        self.varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    /// A field of bytes or text.
    pub fn bytes(mut self, field: u64, value: impl AsRef<[u8]>) -> Self {
        self.varint(field << 3 | 2);
        self.varint(value.as_ref().len() as u64);
        self.0.extend(value.as_ref());
        self
    }

    /// A message in a field.
    pub fn with(self, field: u64, value: &Message) -> Self {
        self.bytes(field, &value.0)
    }
}

/// `NodeProto`.
pub fn node(op: &str, name: &str, inputs: &[&str], outputs: &[&str]) -> Message {
    let m = inputs.iter().fold(Message::new(), |m, i| m.bytes(1, i));
    let m = outputs.iter().fold(m, |m, o| m.bytes(2, o));
    m.bytes(3, name).bytes(4, op)
}

/// `ValueInfoProto` of an f32 tensor; a dimension is a number or a name.
pub fn port(name: &str, dims: &[&str]) -> Message {
    let shape = dims.iter().fold(Message::new(), |m, d| {
        let dim = d.parse().map_or_else(|_| Message::new().bytes(2, d), |n| Message::new().int(1, n));
        m.with(1, &dim)
    });
    let tensor = Message::new().int(1, 1).with(2, &shape);
    Message::new().bytes(1, name).with(2, &Message::new().with(1, &tensor))
}

/// `TensorProto` of f32 with its data in place.
pub fn tensor(name: &str, dims: &[i64], data: &[f32]) -> Message {
    let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
    declared(name, dims).bytes(9, bytes)
}

/// `TensorProto` of f32 without data.
pub fn declared(name: &str, dims: &[i64]) -> Message {
    dims.iter().fold(Message::new(), |m, d| m.int(1, *d)).int(2, 1).bytes(8, name)
}

/// `TensorProto` of f32 with its data in another file.
pub fn external(name: &str, dims: &[i64], location: &str, offset: u64, length: u64) -> Message {
    let entry = |key: &str, value: &str| Message::new().bytes(1, key).bytes(2, value);
    declared(name, dims)
        .with(13, &entry("location", location))
        .with(13, &entry("offset", &offset.to_string()))
        .with(13, &entry("length", &length.to_string()))
        .int(14, 1)
}

/// A model with one graph.
#[derive(Default)]
pub struct Model {
    pub nodes: Vec<Message>,
    pub inputs: Vec<Message>,
    pub outputs: Vec<Message>,
    pub initializers: Vec<Message>,
}

impl Model {
    /// `ModelProto`, for this operator set.
    pub fn encode(&self, opset: i64) -> Vec<u8> {
        let m = self.nodes.iter().fold(Message::new(), |m, n| m.with(1, n)).bytes(2, "g");
        let m = self.initializers.iter().fold(m, |m, t| m.with(5, t));
        let m = self.inputs.iter().fold(m, |m, p| m.with(11, p));
        let graph = self.outputs.iter().fold(m, |m, p| m.with(12, p));
        Message::new().int(1, 8).with(7, &graph).with(8, &Message::new().bytes(1, "").int(2, opset)).0
    }

    /// `y = x + w`, with `w` as given.
    pub fn add(w: Message) -> Model {
        Model {
            nodes: vec![node("Add", "plus", &["x", "w"], &["y"])],
            inputs: vec![port("x", &["n", "4"])],
            outputs: vec![port("y", &["n", "4"])],
            initializers: vec![w],
        }
    }
}
