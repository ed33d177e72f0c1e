//! The CPU device: code mapped by the system's loader, threads of our own.
use crate::artifact::Artifact;
use crate::backend::{Backend, Block, CpuShape, Launch, LaunchShape};
use crate::bytes::AlignedBytes;
use crate::features;
use crate::plan::{CodeEntry, Plan};
use crate::pool::{KernelFn, Pool, Region, Running};
use crate::tensor::Tensor;
use crate::value::Value;
use crate::{DType, Error};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Scratch of each thread begins at multiples of this.
const SCRATCH_ALIGN: usize = 64;

/// A session's view of the CPU.
pub(crate) struct Cpu {
    kernels: Vec<KernelFn>,
    pool: Pool,
    running: Option<Running>,
    /// A row of buffer pointers for each thread.
    rows: Vec<*mut u8>,
    row_len: usize,
    scratch: AlignedBytes,
    /// Copies of inputs that are not aligned to their elements.
    staged: Vec<AlignedBytes>,
    _code: Code,
}

// SAFETY: the pointers in `rows` are written anew for each launch and used only during it.
unsafe impl Send for Cpu {}

/// A loaded shared object.
struct Code {
    loaded: Library,
    /// The loader takes two objects of one path for the same: the file stays open as long as the
    /// object is, so that no other gets its number.
    _file: File,
}

/// The code among `codes` that this CPU runs best, or why there is none.
pub(crate) fn choose<'a>(plan: &str, candidates: &[(&'a Plan, &'a CodeEntry)]) -> Result<&'a Plan, Error> {
    let mut refused = None;
    let mut best: Option<(usize, &Plan)> = None;
    for (candidate, code) in candidates {
        let Some(level) = features::level(&code.target) else { continue };
        let missing = features::missing(code);
        if !missing.is_empty() {
            let error = Error::CpuFeatures { target: code.target.clone(), missing: missing.into_iter().collect() };
            refused.get_or_insert(error);
        } else if best.is_none_or(|(found, _)| level > found) {
            best = Some((level, candidate));
        }
    }
    match (best, refused) {
        (Some((_, plan)), _) => Ok(plan),
        (None, Some(error)) => Err(error),
        (None, None) => Err(Error::NoCode {
            plan: plan.into(),
            device: format!("cpu ({})", features::describe_host()),
            have: candidates.iter().map(|(p, _)| p.target.as_str()).collect(),
        }),
    }
}

impl Cpu {
    pub(crate) fn new(artifact: &Artifact, plan: &Plan, threads: usize, max_args: usize) -> Result<Cpu, Error> {
        let entry = &artifact.manifest().codes[plan.code as usize];
        let code = Code::load(&entry.target, artifact.code(plan.code as usize)?)?;
        let kernels = plan.kernels.iter().map(|k| code.function(&entry.target, &k.symbol)).collect::<Result<_, _>>()?;
        let pool = Pool::new(threads)?;
        let row_len = max_args + 1;
        Ok(Cpu {
            kernels,
            rows: vec![std::ptr::null_mut(); row_len * pool.threads()],
            row_len,
            pool,
            running: None,
            scratch: AlignedBytes::zeroed(0)?,
            staged: Vec::new(),
            _code: code,
        })
    }

    /// Whether a launch would use more than one thread.
    pub(crate) fn is_parallel(shape: &CpuShape) -> bool {
        crate::pool::worth(shape.extent, shape.grain, shape.unit_ps) > 1
    }
}

impl Backend for Cpu {
    fn name(&self) -> &str {
        "cpu"
    }

    fn alloc(&mut self, bytes: usize) -> Result<Block, Error> {
        let memory = AlignedBytes::zeroed(bytes)?;
        Ok(Block { address: memory.as_ptr() as u64, bytes, _owner: Box::new(memory) })
    }

    fn begin(&mut self, parallel: bool) -> Result<(), Error> {
        self.running = Some(self.pool.begin(parallel));
        Ok(())
    }

    fn input(&mut self, n: usize, value: &Value) -> Result<u64, Error> {
        let host = match value {
            Value::Host(host) => host,
            Value::Device(buffer) => {
                return Err(Error::WrongDevice { input: format!("#{n}"), found: buffer.device.clone(), session: "cpu".into() });
            }
        };
        let address = host.bytes().as_ptr() as u64;
        if address.is_multiple_of(host.dtype().align() as u64) {
            return Ok(address);
        }
        while self.staged.len() <= n {
            self.staged.push(AlignedBytes::zeroed(0)?);
        }
        self.staged[n].reset(host.bytes().len())?;
        self.staged[n].copy_from_slice(host.bytes());
        Ok(self.staged[n].as_ptr() as u64)
    }

    fn output(&mut self, _n: usize, dtype: DType, shape: &[i64], tensor: Option<&mut Tensor>) -> Result<u64, Error> {
        let Some(tensor) = tensor else {
            return Err(Error::Plan("an output without a place".into()));
        };
        tensor.reset_i64(dtype, shape)?;
        Ok(tensor.bytes_mut().as_mut_ptr() as u64)
    }

    fn launch(&mut self, launch: &Launch, args: &[u64]) -> Result<(), Error> {
        let LaunchShape::Cpu(shape) = launch.shape else {
            return Err(Error::Plan("a GPU launch on the CPU".into()));
        };
        let mut stride = 0;
        for (to, from) in self.rows.iter_mut().zip(args) {
            *to = *from as *mut u8;
        }
        if shape.takes_scratch {
            stride = self.row_len;
            let each = shape.scratch.next_multiple_of(SCRATCH_ALIGN);
            let all = each.saturating_mul(self.pool.threads());
            if self.scratch.len() < all {
                self.scratch.reset(all)?;
            }
            let scratch = self.scratch.as_mut_ptr();
            for (t, row) in self.rows.chunks_mut(stride).enumerate() {
                for (to, from) in row.iter_mut().zip(args) {
                    *to = *from as *mut u8;
                }
                row[args.len()] = scratch.wrapping_add(t * each);
            }
        }
        let region = Region {
            kernel: self.kernels[launch.kernel.index()],
            bufs: self.rows.as_ptr(),
            stride,
            dims: launch.dims.as_ptr(),
            extent: shape.extent,
            grain: shape.grain,
        };
        // SAFETY: the plan was checked: the kernel gets as many buffers and sizes as it takes, each
        // buffer as large as the plan says, a row and scratch for each thread. That the code does
        // with them what the plan says is the compiler's word, kept by the checksum.
        unsafe { self.pool.run(region, shape.unit_ps) };
        Ok(())
    }

    fn copy(&mut self, from: u64, to: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: both are buffers of the session, at least that long.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    fn read(&mut self, from: u64, into: &mut [u8]) -> Result<(), Error> {
        // SAFETY: a buffer of the session, at least that long.
        unsafe { std::ptr::copy(from as *const u8, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    fn write(&mut self, to: u64, bytes: &[u8]) -> Result<(), Error> {
        // SAFETY: a buffer of the session, at least that long.
        unsafe { std::ptr::copy(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    fn finish(&mut self, _outputs: &mut [Tensor]) -> Result<(), Error> {
        self.abandon();
        Ok(())
    }

    fn abandon(&mut self) {
        self.pool.end();
        self.running = None;
    }

    fn launch_timed(&mut self, launch: &Launch, args: &[u64]) -> Result<f64, Error> {
        let start = Instant::now();
        self.launch(launch, args)?;
        Ok(start.elapsed().as_nanos() as f64)
    }
}

impl Code {
    /// Loads a shared object from memory, under a name that no other has.
    fn load(target: &str, object: &[u8]) -> Result<Code, Error> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let fail = |why: String| Error::Load { target: target.into(), why };
        if !object.starts_with(b"\x7fELF") {
            return Err(fail("it is no ELF object".into()));
        }
        let name = format!("pavage-{}\0", NEXT.fetch_add(1, Ordering::Relaxed));
        // SAFETY: the name ends with a zero byte.
        let fd = unsafe { libc::memfd_create(name.as_ptr().cast(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(fail(std::io::Error::last_os_error().to_string()));
        }
        // SAFETY: a descriptor just made, owned by nobody else.
        let mut file = unsafe { File::from_raw_fd(fd) };
        file.write_all(object).map_err(|e| fail(e.to_string()))?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // SAFETY: the compiler's objects have no initialisers; they came through the checksum.
        let loaded = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| fail(e.to_string()))?;
        Ok(Code { loaded, _file: file })
    }

    fn function(&self, target: &str, symbol: &str) -> Result<KernelFn, Error> {
        // SAFETY: kernels have this signature; `self` lives as long as the session that calls it.
        let found = unsafe { self.loaded.get::<KernelFn>(symbol.as_bytes()) };
        found.map(|f| *f).map_err(|e| Error::Load { target: target.into(), why: e.to_string() })
    }
}
