//! `AlignedBytes`: growable host memory at multiples of 256 bytes.
use crate::Error;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

const ALIGN: usize = align_of::<Aligned>();

#[repr(align(256))]
struct Aligned;

/// Bytes at a multiple of 256, zero when new.
pub(crate) struct AlignedBytes {
    at: NonNull<u8>,
    len: usize,
    capacity: usize,
}

// SAFETY: it owns its memory, as a Vec<u8> does.
unsafe impl Send for AlignedBytes {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    pub(crate) fn zeroed(len: usize) -> Result<Self, Error> {
        if len == 0 {
            // Non-null and aligned, as slices of no elements must be.
            let at = NonNull::<Aligned>::dangling().cast();
            return Ok(AlignedBytes { at, len, capacity: 0 });
        }
        let full = || Error::OutOfMemory { device: "cpu".into(), needed: len, free: None };
        let layout = Layout::from_size_align(len, ALIGN).map_err(|_| full())?;
        // SAFETY: the layout's size is not zero.
        let at = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(full)?;
        Ok(AlignedBytes { at, len, capacity: len })
    }

    pub(crate) fn copy_of(bytes: &[u8]) -> Result<Self, Error> {
        let mut new = AlignedBytes::zeroed(bytes.len())?;
        new.copy_from_slice(bytes);
        Ok(new)
    }

    /// Makes the length `len`; memory moves, and is zeroed, only when it has to grow.
    pub(crate) fn reset(&mut self, len: usize) -> Result<(), Error> {
        if len > self.capacity {
            *self = AlignedBytes::zeroed(len)?;
        }
        self.len = len;
        Ok(())
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        if self.capacity > 0 {
            // SAFETY: allocated with this layout, which was valid then.
            unsafe {
                let layout = Layout::from_size_align_unchecked(self.capacity, ALIGN);
                dealloc(self.at.as_ptr(), layout);
            }
        }
    }
}

impl Deref for AlignedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len <= capacity` initialised bytes are ours.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: `len <= capacity` initialised bytes are ours alone.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }
}
