//! Loading compiled kernels and calling them, for the tests of this folder.
pub(crate) mod regions;
use pavage_codegen::{
    compile::cpu_library,
    llvm::MiddleEnd,
    targets::Target,
    tile::{Kernel, text::assert_round_trip},
};
use std::sync::atomic::{AtomicU64, Ordering};

/// Levels that this machine can run.
pub(crate) fn levels() -> Vec<&'static str> {
    let wide = std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512dq")
        && std::is_x86_feature_detected!("avx512vl");
    let levels = [(true, "native"), (std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma"), "x86-64-v3"), (wide, "x86-64-v4")];
    levels.into_iter().filter_map(|(has, level)| has.then_some(level)).collect()
}

/// Kernels of one shared object, loaded.
pub(crate) struct Library {
    loaded: libloading::Library,
}

type Entry = unsafe extern "C" fn(*const *mut u8, *const i64, i64, i64);

/// Compile for this machine (every kernel must survive its text form) and load.
pub(crate) fn load(kernels: &[Kernel], target: &str) -> Library {
    for k in kernels {
        assert_round_trip(k);
    }
    let target = Target::parse(target).expect("a known target");
    let bytes = cpu_library(kernels, &target, MiddleEnd::None, 2).unwrap_or_else(|e| panic!("{e}\n{}", kernels[0]));
    static NEXT: AtomicU64 = AtomicU64::new(0);
    // A name of its own: the loader returns the first object again for a path it has seen.
    let path = std::env::temp_dir().join(format!("pavage-test-{}-{}.so", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
    std::fs::write(&path, bytes).expect("a writable temporary folder");
    // SAFETY: an object that we have just made; it has no initialisers.
    let loaded = unsafe { libloading::Library::new(&path) }.expect("the object loads");
    std::fs::remove_file(&path).expect("our own file");
    Library { loaded }
}

impl Library {
    /// Call a kernel whose scratch, 64 bytes longer than it asks for, is the last of these buffers.
    pub(crate) fn call_with_scratch(&self, name: &str, bufs: &mut [Vec<u8>], dims: &[i64], slice: (i64, i64)) {
        let mut table: Vec<*mut u8> = bufs.iter_mut().map(|b| b.as_mut_ptr()).collect();
        if let Some(last) = table.last_mut() {
            *last = last.wrapping_add(last.align_offset(64));
        }
        // SAFETY: the symbol is a kernel entry of this signature; the kernel touches the buffers within their lengths.
        unsafe {
            let entry: libloading::Symbol<Entry> = self.loaded.get(name.as_bytes()).expect("the kernel is there");
            entry(table.as_ptr(), dims.as_ptr(), slice.0, slice.1);
        }
    }

    /// Call a kernel on these buffers; a 64-byte aligned scratch follows them.
    pub(crate) fn call(&self, name: &str, bufs: &mut [Vec<u8>], dims: &[i64], slice: (i64, i64)) {
        self.call_with(name, bufs, dims, slice, 1 << 16);
    }

    /// As [`Library::call`], with this many bytes of scratch.
    pub(crate) fn call_with(&self, name: &str, bufs: &mut [Vec<u8>], dims: &[i64], slice: (i64, i64), scratch: usize) {
        let mut scratch = vec![0u128; scratch / 16 + 8];
        let mut table: Vec<*mut u8> = bufs.iter_mut().map(|b| b.as_mut_ptr()).collect();
        let base = scratch.as_mut_ptr().cast::<u8>();
        table.push(base.wrapping_add(base.align_offset(64)));
        // SAFETY: the symbol is a kernel entry of this signature; the kernel touches the buffers within their lengths.
        unsafe {
            let entry: libloading::Symbol<Entry> = self.loaded.get(name.as_bytes()).expect("the kernel is there");
            entry(table.as_ptr(), dims.as_ptr(), slice.0, slice.1);
        }
    }
}

/// Deterministic noise.
pub(crate) struct Noise(pub u64);

impl Noise {
    /// The next 64 random bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let x = self.0 ^ (self.0 >> 29);
        x.wrapping_mul(0xbf58476d1ce4e5b9) ^ (x >> 31)
    }

    /// Uniform in -1..1.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// `n` floats in -1..1.
    pub(crate) fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit() as f32).collect()
    }
}

/// Bytes of a slice of plain numbers.
pub(crate) fn bytes<T: Copy>(v: &[T]) -> Vec<u8> {
    // SAFETY: plain numbers have no padding and no invalid bytes.
    unsafe { std::slice::from_raw_parts(v.as_ptr().cast(), size_of_val(v)) }.to_vec()
}

/// Numbers of a byte buffer.
pub(crate) fn numbers<T: Copy>(v: &[u8]) -> Vec<T> {
    // SAFETY: reads stay in the buffer; every bit pattern of the number types used is a value.
    (0..v.len() / size_of::<T>()).map(|i| unsafe { v.as_ptr().cast::<T>().add(i).read_unaligned() }).collect()
}
