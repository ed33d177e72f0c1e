//! Times launches one by one, by events around each.
//!
//! An event that finds the stream idle is recorded at once, so that the time to the launch behind it, some four microseconds of the
//! host's, would count as the kernel's. So the stream waits at a **gate** until event, kernel and event are all in its
//! queue, and the device goes through them without a pause.
use super::driver::{Context, check};
use crate::{Error, plan::KernelId};
use cudarc::driver::sys;
use std::{
    collections::BTreeSet,
    ffi::c_void,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

pub(super) struct Timer {
    start: sys::CUevent,
    end: sys::CUevent,
    /// A word that host and device share; null before it is there.
    gate: *mut AtomicU32,
    /// Where the device sees it.
    address: sys::CUdeviceptr,
    /// How often the gate was shut.
    turn: u32,
    /// Kernels launched before: the first launch may load code, for which the driver waits until streams are idle.
    known: BTreeSet<KernelId>,
    context: Arc<Context>,
}

impl Timer {
    pub(super) fn new(context: &Arc<Context>) -> Result<Timer, Error> {
        let null = std::ptr::null_mut();
        let mut timer = Timer { start: null, end: null, gate: std::ptr::null_mut(), address: 0, turn: 0, known: BTreeSet::new(), context: context.clone() };
        for event in [&mut timer.start, &mut timer.end] {
            // SAFETY: the context is current; `event` is written by the call.
            check(context, "creating an event", unsafe { sys::cuEventCreate(event, 0) })?;
        }
        let mut gate: *mut c_void = std::ptr::null_mut();
        // SAFETY: the context is current; `gate` is written by the call.
        let made = unsafe { sys::cuMemHostAlloc(&mut gate, size_of::<AtomicU32>(), sys::CU_MEMHOSTALLOC_DEVICEMAP) };
        check(context, "making a timer", made)?;
        timer.gate = gate.cast();
        // SAFETY: page-aligned memory of ours that nobody else knows yet.
        unsafe { timer.gate.write(AtomicU32::new(0)) };
        // SAFETY: memory of the call above; `address` is written by the call.
        check(context, "making a timer", unsafe { sys::cuMemHostGetDevicePointer_v2(&mut timer.address, gate, 0) })?;
        Ok(timer)
    }

    /// Nanoseconds that what `launch` puts into `stream` takes.
    pub(super) fn time(&mut self, stream: sys::CUstream, kernel: KernelId, launch: impl FnOnce() -> Result<(), Error>) -> Result<f64, Error> {
        let shut = !self.known.insert(kernel);
        if shut {
            self.turn = self.turn.wrapping_add(1);
            let until = sys::CUstreamWaitValue_flags_enum::CU_STREAM_WAIT_VALUE_GEQ as u32;
            // SAFETY: the stream's context is current; the gate is opened below in any case, while the word is there.
            check(&self.context, "timing", unsafe { sys::cuStreamWaitValue32_v2(stream, self.address, self.turn, until) })?;
        }
        let record = |event| {
            // SAFETY: our events, the session's stream.
            check(&self.context, "timing", unsafe { sys::cuEventRecord(event, stream) })
        };
        let queued = record(self.start).and_then(|()| launch()).and_then(|()| record(self.end));
        if shut {
            // Whatever came of it, the stream must go on.
            // SAFETY: written in `new`, freed by `drop`.
            unsafe { (*self.gate).store(self.turn, Ordering::Release) };
        }
        queued?;
        let mut ms = 0f32;
        // SAFETY: both events are recorded; `ms` is written by the call.
        let timed = unsafe {
            check(&self.context, "timing", sys::cuEventSynchronize(self.end))?;
            sys::cuEventElapsedTime(&mut ms, self.start, self.end)
        };
        check(&self.context, "timing", timed)?;
        Ok(f64::from(ms) * 1e6)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.context.make_current().ok();
        for event in [self.start, self.end] {
            if !event.is_null() {
                // SAFETY: made by `new`, destroyed once.
                unsafe { sys::cuEventDestroy_v2(event) };
            }
        }
        if !self.gate.is_null() {
            // SAFETY: made by `new`, freed once; `time` leaves no wait behind that is not over.
            unsafe { sys::cuMemFreeHost(self.gate.cast()) };
        }
    }
}
