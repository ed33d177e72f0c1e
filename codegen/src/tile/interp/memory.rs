//! Memory of a machine: the arguments, shared memory per block, local memory per thread; bounds and race checks.
use crate::tile::{Access, Buf, Kernel, Op, Space};
use pavage_ir::{DType, Scalar, minifloat, scalar::wrap_int};

/// Bytes of one region. Elements narrower than a byte share bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    region: usize,
    byte: usize,
    /// Elements before it in that byte, where elements share bytes.
    part: usize,
}

/// Who last touched a shared byte.
#[derive(Clone, Copy, Default)]
struct Touch {
    write: Option<(u32, u32)>,
    read: Option<(u32, u32)>,
    /// More than one thread has read it in that epoch.
    many: bool,
}

/// All memory that a machine reaches.
pub struct Memory {
    /// Arguments in order, then shared memory per block, then local memory per block and thread.
    regions: Vec<Vec<u8>>,
    n_args: usize,
    blocks: usize,
    threads: usize,
    arg_of: Vec<Option<usize>>,
    offsets: Vec<u64>,
    touched: Vec<Vec<Touch>>,
    /// Per block and shared byte: thread + 1 that wrote it and has not fenced since, 0 for none.
    unseen: Vec<Vec<u32>>,
}

impl Place {
    /// Byte in its region.
    pub(super) fn byte(self) -> usize {
        self.byte
    }
}

impl Memory {
    pub(super) fn new(kernel: &Kernel, bufs: &mut [Vec<u8>], blocks: usize, threads: usize, scratch: usize) -> Memory {
        let mut arg_of = vec![None; kernel.bufs.len()];
        for (i, b) in kernel.args().enumerate() {
            arg_of[b.0 as usize] = Some(i);
        }
        let (shared, local) = (kernel.layout(Space::Shared), kernel.layout(Space::Local));
        let mut offsets = vec![0; kernel.bufs.len()];
        for (i, b) in kernel.bufs.iter().enumerate() {
            offsets[i] = match b.space {
                Space::Global => b.alias.map_or(0, |(_, bytes)| bytes),
                Space::Shared => shared.0[i].unwrap_or(0),
                Space::Local => local.0[i].unwrap_or(0),
            };
            if let (Some((owner, _)), Space::Global) = (b.alias, b.space) {
                arg_of[i] = arg_of[owner.0 as usize];
            }
        }
        let mut regions: Vec<Vec<u8>> = bufs.iter_mut().map(std::mem::take).collect();
        let n_args = regions.len();
        // Memory that nobody has written holds NaNs.
        regions.extend((0..blocks).map(|_| vec![0xff; shared.1 as usize]));
        let local_bytes = (local.1 as usize).max(scratch);
        regions.extend((0..blocks * threads).map(|_| if local.1 > 0 || scratch > 0 { vec![0xff; local_bytes] } else { vec![] }));
        // Asynchronous copies order themselves by barriers that the epoch check does not follow.
        let mut epochs_hold = true;
        kernel.walk(&mut |s| epochs_hold &= !matches!(s.op, Op::Hopper(_) | Op::Mma(_)));
        let touched = (0..blocks).map(|_| if epochs_hold { vec![Touch::default(); shared.1 as usize] } else { vec![] }).collect();
        let unseen = (0..blocks).map(|_| vec![0; shared.1 as usize]).collect();
        Memory { unseen, regions, n_args, blocks, threads, arg_of, offsets, touched }
    }

    pub(super) fn give_back(self, bufs: &mut [Vec<u8>]) {
        for (b, r) in bufs.iter_mut().zip(self.regions) {
            *b = r;
        }
    }

    pub(super) fn locate(&self, kernel: &Kernel, buf: Buf, index: i64, n: usize, block: usize, thread: usize) -> Result<Place, String> {
        let info = kernel.buf(buf);
        let region = match info.space {
            Space::Global => self.arg_of[buf.0 as usize].ok_or("no such argument")?,
            Space::Shared => self.n_args + block,
            Space::Local => self.n_args + self.blocks + block * self.threads + thread,
        };
        let bits = info.dtype.bits() as i128;
        let start = i128::from(index) * bits;
        let end = start + n as i128 * bits;
        let limit = match info.len {
            Some(len) => i128::from(len) * bits,
            None => (self.regions[region].len() as i128 - self.offsets[buf.0 as usize] as i128) * 8,
        };
        if start < 0 || end > limit {
            return Err(format!("elements {index}..{} of {buf}, which holds {}", index + n as i64, limit / bits));
        }
        Ok(Place { region, byte: self.offsets[buf.0 as usize] as usize + (start / 8) as usize, part: (start % 8 / bits) as usize })
    }

    /// Read element `i` from a place.
    pub fn read(&self, place: Place, dtype: DType, i: usize) -> Scalar {
        let bytes = &self.regions[place.region];
        if dtype.is_packed() {
            let at = place.byte * (8 / dtype.bits()) + place.part + i;
            return decode(&[minifloat::packed(bytes, dtype, at)], dtype);
        }
        let w = dtype.bits() / 8;
        decode(&bytes[place.byte + i * w..][..w], dtype)
    }

    /// Write element `i` of a place.
    pub fn write(&mut self, place: Place, dtype: DType, i: usize, v: Scalar) {
        let bytes = &mut self.regions[place.region];
        if dtype.is_packed() {
            let at = place.byte * (8 / dtype.bits()) + place.part + i;
            let mut code = [0];
            encode(v, dtype, &mut code);
            minifloat::pack(bytes, dtype, at, code[0]);
            return;
        }
        let w = dtype.bits() / 8;
        encode(v, dtype, &mut bytes[place.byte + i * w..][..w]);
    }

    /// Write an element at a byte of shared memory, by a thread or (`None`) by the asynchronous proxy.
    pub(super) fn write_shared(&mut self, block: usize, at: usize, dtype: DType, v: Scalar, thread: Option<usize>) -> Result<(), String> {
        let w = dtype.bytes(1);
        let bytes = self.regions[self.n_args + block].get_mut(at..at + w).ok_or_else(|| format!("shared byte {at} is out of bounds"))?;
        encode(v, dtype, bytes);
        self.unseen[block][at..at + w].fill(thread.map_or(0, |t| t as u32 + 1));
        Ok(())
    }

    /// Read an element at a byte of shared memory as the asynchronous proxy sees it.
    pub(super) fn read_async(&self, block: usize, at: usize, dtype: DType) -> Result<Scalar, String> {
        let w = dtype.bytes(1);
        let bytes = self.regions[self.n_args + block].get(at..at + w).ok_or_else(|| format!("shared byte {at} is out of bounds"))?;
        match self.unseen[block][at..at + w].iter().find(|t| **t != 0) {
            Some(t) => Err(format!("shared byte {at}, written by thread {}, is read by the asynchronous proxy without a fence", t - 1)),
            None => Ok(decode(bytes, dtype)),
        }
    }

    /// What these threads have written becomes visible to the asynchronous proxy.
    pub(super) fn fence(&mut self, block: usize, by: impl Fn(usize) -> bool) {
        for t in &mut self.unseen[block] {
            if *t != 0 && by(*t as usize - 1) {
                *t = 0;
            }
        }
    }

    /// Note that `thread` of `block` touches `bytes` bytes of a place; an error if that races. Only shared memory is watched.
    pub(super) fn touch(&mut self, place: Place, bytes: usize, block: usize, thread: usize, epoch: u32, how: Access) -> Result<(), String> {
        if place.region < self.n_args || place.region >= self.n_args + self.blocks {
            return Ok(());
        }
        if how != Access::Read {
            self.unseen[block][place.byte..place.byte + bytes].fill(thread as u32 + 1);
        }
        if self.touched[block].is_empty() {
            return Ok(());
        }
        let me = thread as u32;
        for b in place.byte..place.byte + bytes {
            let t = &mut self.touched[block][b];
            let race = |other: u32, what: &str| Err(format!("race: thread {thread} {what} shared byte {b} that thread {other} touched since the last barrier"));
            if let Some((e, w)) = t.write
                && e == epoch
                && w != me
            {
                return race(w, if how == Access::Read { "reads" } else { "writes" });
            }
            if how == Access::Read {
                t.many = matches!(t.read, Some((e, r)) if e == epoch && (r != me || t.many));
                t.read = Some((epoch, me));
            } else {
                if let Some((e, r)) = t.read
                    && e == epoch
                    && (r != me || t.many)
                {
                    return race(r, "writes");
                }
                t.write = Some((epoch, me));
            }
        }
        Ok(())
    }
}

/// The element whose little-endian bytes these are.
pub(super) fn decode(b: &[u8], dtype: DType) -> Scalar {
    let mut raw = [0u8; 16];
    raw[..b.len()].copy_from_slice(b);
    let bits = u128::from_le_bytes(raw);
    match dtype {
        DType::F64 => Scalar::F(f64::from_bits(bits as u64)),
        DType::F32 => Scalar::F(f64::from(f32::from_bits(bits as u32))),
        DType::F16 => Scalar::F(half::f16::from_bits(bits as u16).to_f64()),
        DType::BF16 => Scalar::F(half::bf16::from_bits(bits as u16).to_f64()),
        _ if dtype.is_mini() => Scalar::F(minifloat::decode(bits as u8, dtype)),
        DType::Bool => Scalar::B(bits != 0),
        _ => Scalar::I(wrap_int(bits as i128, dtype)),
    }
}

/// Write an element as little-endian bytes.
pub(super) fn encode(v: Scalar, dtype: DType, out: &mut [u8]) {
    let bits: u128 = match dtype {
        DType::F64 => v.f().to_bits().into(),
        DType::F32 => (v.f() as f32).to_bits().into(),
        DType::F16 => half::f16::from_f64(v.f()).to_bits().into(),
        DType::BF16 => half::bf16::from_f64(v.f()).to_bits().into(),
        _ if dtype.is_mini() => minifloat::encode(v.f(), dtype).into(),
        DType::Bool => u128::from(v.b()),
        _ => v.i() as u128,
    };
    out.copy_from_slice(&bits.to_le_bytes()[..out.len()]);
}
