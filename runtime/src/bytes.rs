//! `AlignedBytes`: growable host memory at multiples of 256 bytes, large ones on large pages.
use crate::Error;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

const ALIGN: usize = align_of::<Aligned>();
/// Memory from this size on comes as pages of this size, where the system has them: kernels walk
/// through megabytes, and each 4 KiB page costs an entry of the processor's page cache.
const HUGE: usize = 2 << 20;

#[repr(align(256))]
struct Aligned;

/// Bytes at a multiple of 256, zero when new.
pub(crate) struct AlignedBytes {
    at: NonNull<u8>,
    len: usize,
    capacity: usize,
    from: Source,
}

/// Where memory came from and goes back to.
enum Source {
    Nowhere,
    Heap,
    /// A mapping, larger than what is used of it.
    Map {
        start: *mut libc::c_void,
        len: usize,
    },
}

// SAFETY: it owns its memory, as a Vec<u8> does.
unsafe impl Send for AlignedBytes {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    pub(crate) fn zeroed(len: usize) -> Result<Self, Error> {
        let full = || Error::OutOfMemory { device: "cpu".into(), needed: len, free: None };
        if len == 0 {
            // Non-null and aligned, as slices of no elements must be.
            let at = NonNull::<Aligned>::dangling().cast();
            return Ok(AlignedBytes { at, len, capacity: 0, from: Source::Nowhere });
        }
        if len >= HUGE {
            return Self::mapped(len).ok_or_else(full);
        }
        let layout = Layout::from_size_align(len, ALIGN).map_err(|_| full())?;
        // SAFETY: the layout's size is not zero.
        let at = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(full)?;
        Ok(AlignedBytes { at, len, capacity: len, from: Source::Heap })
    }

    /// Pages that cost nothing until they are touched.
    fn mapped(len: usize) -> Option<Self> {
        let capacity = len.checked_next_multiple_of(HUGE)?;
        let whole = capacity.checked_add(HUGE)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping, anywhere.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), whole, protection, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        let at = start.map_addr(|a| a.next_multiple_of(HUGE));
        // SAFETY: within the mapping, which is larger by one large page. A system without large
        // pages refuses, which changes nothing.
        unsafe { libc::madvise(at, capacity, libc::MADV_HUGEPAGE) };
        let at = NonNull::new(at.cast())?;
        Some(AlignedBytes { at, len, capacity, from: Source::Map { start, len: whole } })
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
        match self.from {
            Source::Nowhere => {}
            // SAFETY: allocated with this layout, which was valid then.
            Source::Heap => unsafe {
                let layout = Layout::from_size_align_unchecked(self.capacity, ALIGN);
                dealloc(self.at.as_ptr(), layout);
            },
            // SAFETY: the whole of the mapping made for it.
            Source::Map { start, len } => unsafe {
                libc::munmap(start, len);
            },
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zero_and_kept_while_it_suffices() {
        for len in [0, 1, 300, HUGE - 1, HUGE, HUGE + 1, 3 * HUGE] {
            let mut bytes = AlignedBytes::zeroed(len).unwrap();
            assert_eq!(bytes.as_ptr() as usize % ALIGN, 0);
            assert!(bytes.iter().all(|b| *b == 0));
            bytes.fill(7);
            let at = bytes.as_ptr();
            bytes.reset(len / 2).unwrap();
            assert_eq!((bytes.as_ptr(), bytes.len()), (at, len / 2));
            bytes.reset(len * 2 + 1).unwrap();
            assert_eq!(bytes.len(), len * 2 + 1);
        }
        assert!(AlignedBytes::zeroed(usize::MAX - 5).is_err());
        assert!(AlignedBytes::zeroed(1 << 60).is_err());
    }
}
