//! With the shape of the run before, `run_into` allocates nothing.
mod common;
use common::*;
use pavage_runtime::{Artifact, Device, Options};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    // SAFETY: as the trait says.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    // SAFETY: as the trait says.
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_bound_shape_runs_without_allocating() {
    let (writer, manifest) = small_model();
    let artifact = Artifact::from_bytes(&writer.to_bytes(manifest).unwrap()).unwrap();
    for plan in ["fused", "unfused"] {
        let options = Options { plan: plan.into(), threads: 2, ..Options::default() };
        let mut session = artifact.session(Device::Cpu, options).unwrap();
        let mut outputs = session.new_outputs().unwrap();
        let tensors: Vec<_> = [600, 40, 200].map(|n| tensor(&[n, 8], &noise(n as u64, n * 8))).into();
        for x in &tensors {
            session.run_into(&[("a", x), ("b", x)], &mut outputs).unwrap();
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            for _ in 0..100 {
                session.run_into(&[("a", x), ("b", x)], &mut outputs).unwrap();
            }
            let after = ALLOCATIONS.load(Ordering::Relaxed);
            assert_eq!(after - before, 0, "{plan} {:?}", x.shape());
        }
    }
}
