//! The driver: found at run time, checked for age, its errors in words.
use super::arch::Capability;
use crate::Error;
use cudarc::driver::sys;
use std::ffi::CStr;
use std::sync::{Arc, OnceLock};

/// Oldest driver interface in use: `cuTensorMapEncodeTiled` and launch attributes came with 12.0.
const OLDEST: i32 = 12_000;
/// Since then graphs hold launches that overlap; where they do not, kernels begin one after the other.
const OVERLAPPING: i32 = 12_030;

/// A GPU.
#[derive(Clone, Copy)]
pub(crate) struct Gpu {
    handle: sys::CUdevice,
    pub(crate) capability: Capability,
    /// Largest dynamic shared memory of a block, in bytes.
    pub(crate) max_smem: u32,
}

/// The driver, initialised once, and its version; the error in words if that is not possible.
fn driver() -> Result<i32, Error> {
    static STATE: OnceLock<Result<i32, String>> = OnceLock::new();
    let state = STATE.get_or_init(|| {
        // SAFETY: tries to open the driver's library.
        if !unsafe { sys::is_culib_present() } {
            return Err("no NVIDIA driver found (libcuda.so)".into());
        }
        let mut version = 0;
        // SAFETY: plain calls that any driver has; `version` is written by the call.
        unsafe {
            plain("starting the driver", sys::cuInit(0))?;
            plain("asking for the driver's version", sys::cuDriverGetVersion(&mut version))?;
        }
        if version < OLDEST {
            let say = |v: i32| format!("CUDA {}.{}", v / 1000, v % 1000 / 10);
            return Err(format!("the driver supports {}, {} is needed", say(version), say(OLDEST)));
        }
        Ok(version)
    });
    state.clone().map_err(Error::NoGpu)
}

/// The GPU of this number.
pub(crate) fn device(ordinal: u32) -> Result<Gpu, Error> {
    driver()?;
    let mut count = 0;
    // SAFETY: `count` is written by the call.
    plain("counting GPUs", unsafe { sys::cuDeviceGetCount(&mut count) }).map_err(Error::NoGpu)?;
    if ordinal >= count as u32 {
        return Err(Error::NoGpu(format!("cuda:{ordinal} asked for, {count} found")));
    }
    use sys::CUdevice_attribute_enum::*;
    let find = || -> Result<Gpu, String> {
        let mut handle = 0;
        // SAFETY: `handle` is written by the call.
        plain("opening a GPU", unsafe { sys::cuDeviceGet(&mut handle, ordinal as i32) })?;
        let attribute = |which| -> Result<u32, String> {
            let mut value = 0;
            // SAFETY: `value` is written by the call.
            let asked = unsafe { sys::cuDeviceGetAttribute(&mut value, which, handle) };
            plain("asking a GPU", asked).map(|()| value as u32)
        };
        Ok(Gpu {
            handle,
            capability: (attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?, attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?),
            max_smem: attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        })
    };
    find().map_err(Error::NoGpu)
}

/// All GPUs in words.
pub(crate) fn list() -> Result<Vec<String>, Error> {
    driver()?;
    let mut found = Vec::new();
    while let Ok(gpu) = device(found.len() as u32) {
        let (mut name, mut bytes) = ([0u8; 128], 0usize);
        // SAFETY: the driver writes at most 127 bytes and a zero, and `bytes`.
        unsafe {
            sys::cuDeviceGetName(name.as_mut_ptr().cast(), 127, gpu.handle);
            sys::cuDeviceTotalMem_v2(&mut bytes, gpu.handle);
        }
        let name = CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy();
        let (major, minor) = gpu.capability;
        found.push(format!("{name}, sm_{major}{minor}, {} GiB", bytes >> 30));
    }
    Ok(found)
}

/// What the driver says of an error.
pub(crate) fn describe(result: sys::CUresult) -> String {
    let text = |ask: unsafe fn(sys::CUresult, *mut *const std::ffi::c_char) -> sys::CUresult| {
        let mut at = std::ptr::null();
        // SAFETY: the driver gives a text that lives for ever, or null.
        unsafe {
            ask(result, &mut at);
            if at.is_null() { String::new() } else { CStr::from_ptr(at).to_string_lossy().into() }
        }
    };
    let (name, words) = (text(sys::cuGetErrorName), text(sys::cuGetErrorString));
    if name.is_empty() { format!("error {}", result as u32) } else { format!("{words} ({name})") }
}

fn plain(what: &str, result: sys::CUresult) -> Result<(), String> {
    match result {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        other => Err(format!("{what}: {}", describe(other))),
    }
}

/// Turns a result of the driver into an error that names the GPU and what was tried.
pub(crate) fn check(context: &Context, what: &str, result: sys::CUresult) -> Result<(), Error> {
    match result {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        other => Err(Error::Device { device: context.name.clone(), what: what.into(), why: describe(other) }),
    }
}

/// A GPU's primary context, kept while this lives.
pub(crate) struct Context {
    /// `cuda:0`.
    pub(crate) name: String,
    pub(crate) capability: Capability,
    pub(crate) max_smem: u32,
    /// Whether launches may overlap in recorded graphs too.
    pub(crate) overlaps: bool,
    handle: sys::CUcontext,
    gpu: sys::CUdevice,
}

// SAFETY: a context handle may be used from any thread.
unsafe impl Send for Context {}
// SAFETY: a context handle may be used from any thread.
unsafe impl Sync for Context {}

impl Context {
    /// The context of a GPU, made current on this thread.
    pub(crate) fn retain(ordinal: u32) -> Result<Arc<Context>, Error> {
        let gpu = device(ordinal)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` is written by the call.
        let retained = unsafe { sys::cuDevicePrimaryCtxRetain(&mut handle, gpu.handle) };
        plain("opening a context", retained).map_err(Error::NoGpu)?;
        let overlaps = driver()? >= OVERLAPPING;
        let name = format!("cuda:{ordinal}");
        let context = Arc::new(Context { name, capability: gpu.capability, max_smem: gpu.max_smem, overlaps, handle, gpu: gpu.handle });
        context.make_current()?;
        Ok(context)
    }

    pub(crate) fn make_current(&self) -> Result<(), Error> {
        // SAFETY: the context is retained.
        check(self, "entering the context", unsafe { sys::cuCtxSetCurrent(self.handle) })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by `retain`.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.gpu) };
    }
}

/// Memory of a GPU.
pub(crate) struct DeviceMemory {
    pub(crate) address: u64,
    context: Arc<Context>,
}

impl DeviceMemory {
    /// Fresh memory; the context is current.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Error> {
        let mut address = 0;
        // SAFETY: `address` is written by the call.
        let made = unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(256)) };
        if made == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let (mut free, mut total) = (0, 0);
            // SAFETY: both are written by the call.
            unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) };
            let device = context.name.clone();
            return Err(Error::OutOfMemory { device, needed: bytes, free: Some(free) });
        }
        check(context, "allocating memory", made)?;
        Ok(DeviceMemory { address, context: context.clone() })
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.context.make_current().ok();
        // SAFETY: allocated by `new`, freed once; freeing waits for work that uses it.
        unsafe { sys::cuMemFree_v2(self.address) };
    }
}
