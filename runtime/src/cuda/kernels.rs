//! The kernels of a plan on the GPU: loaded from PTX or SASS, launched with clusters, programmatic
//! dependent launch and tensor maps where the plan says so.
use super::driver::{Context, check, describe};
use crate::backend::{GpuShape, Launch, MapShape};
use crate::plan::{CodeEntry, CodeKind, Fill, GpuLaunch, L2Promotion, Plan, Swizzle, TensorMap};
use crate::{DType, Error};
use cudarc::driver::sys;
use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;

/// Bytes for what the driver's compiler has to say.
const LOG_BYTES: usize = 16 << 10;
/// Clusters up to this many blocks run on every GPU that has clusters.
const PORTABLE_CLUSTER: u32 = 8;

pub(crate) struct Kernels {
    functions: Vec<Function>,
    /// Room for pointers and sizes, tensor maps, and where each parameter is.
    words: Vec<u64>,
    maps: Vec<sys::CUtensorMap>,
    parameters: Vec<*mut c_void>,
    _module: Module,
}

struct Function {
    handle: sys::CUfunction,
    name: String,
    launch: GpuLaunch,
}

struct Module {
    handle: sys::CUmodule,
    context: Arc<Context>,
}

impl Kernels {
    /// Loads the code and finds the plan's kernels in it; the context is current.
    pub(crate) fn load(context: &Arc<Context>, plan: &Plan, entry: &CodeEntry, code: &[u8]) -> Result<Kernels, Error> {
        let module = Module::load(context, entry, code)?;
        // Kernels may share a function: it gets the most that any of them asks for.
        let mut needs: BTreeMap<&str, (u32, u32)> = BTreeMap::new();
        for kernel in &plan.kernels {
            let Some(gpu) = &kernel.gpu else { continue };
            let need = needs.entry(&kernel.symbol).or_default();
            need.0 = need.0.max(gpu.smem);
            need.1 = need.1.max(gpu.cluster.iter().product());
        }
        let mut functions = Vec::with_capacity(plan.kernels.len());
        for kernel in &plan.kernels {
            let Some(gpu) = &kernel.gpu else {
                let why = format!("kernel `{}` has no GPU launch", kernel.name);
                return Err(Error::Load { target: entry.target.clone(), why });
            };
            let handle = module.function(entry, &kernel.symbol)?;
            let (smem, cluster) = needs[kernel.symbol.as_str()];
            prepare(context, handle, &kernel.name, smem, cluster)?;
            functions.push(Function { handle, name: kernel.name.clone(), launch: gpu.clone() });
        }
        Ok(Kernels { functions, words: Vec::new(), maps: Vec::new(), parameters: Vec::new(), _module: module })
    }

    /// Launches a kernel on a stream of the context, which is current.
    pub(crate) fn launch(&mut self, context: &Context, stream: sys::CUstream, launch: &Launch, shape: &GpuShape, args: &[u64]) -> Result<(), Error> {
        let function = &self.functions[launch.kernel.index()];
        let gpu = &function.launch;
        if shape.grid.contains(&0) {
            return Ok(());
        }
        self.words.clear();
        self.words.extend_from_slice(args);
        self.words.extend(launch.dims.iter().map(|d| *d as u64));
        self.maps.clear();
        for (map, sizes) in gpu.tensor_maps.iter().zip(&shape.maps) {
            let base = args[map.arg as usize] + sizes.byte_offset;
            self.maps.push(encode(context, &function.name, map, sizes, base)?);
        }
        self.parameters.clear();
        self.parameters.extend(self.words.iter_mut().map(|w| (w as *mut u64).cast::<c_void>()));
        self.parameters.extend(self.maps.iter_mut().map(|m| (m as *mut sys::CUtensorMap).cast::<c_void>()));
        let mut attributes = attributes(gpu, context.overlaps);
        let config = sys::CUlaunchConfig {
            gridDimX: shape.grid[0],
            gridDimY: shape.grid[1],
            gridDimZ: shape.grid[2],
            blockDimX: gpu.block[0],
            blockDimY: gpu.block[1],
            blockDimZ: gpu.block[2],
            sharedMemBytes: gpu.smem,
            hStream: stream,
            attrs: attributes.list.as_mut_ptr(),
            numAttrs: attributes.count,
        };
        // SAFETY: the plan was checked: the kernel gets as many pointers, sizes and maps as it
        // takes, in its order; all of them outlive the call, which copies them.
        let launched = unsafe {
            let parameters = self.parameters.as_mut_ptr();
            sys::cuLaunchKernelEx(&config, function.handle, parameters, std::ptr::null_mut())
        };
        check(context, &function.name, launched)
    }
}

struct Attributes {
    list: [sys::CUlaunchAttribute; 2],
    count: u32,
}

/// Cluster and programmatic dependent launch, where the plan and the driver have them.
fn attributes(gpu: &GpuLaunch, overlaps: bool) -> Attributes {
    // SAFETY: plain numbers; all zero is a value of it.
    let mut list: [sys::CUlaunchAttribute; 2] = unsafe { std::mem::zeroed() };
    let mut count = 0;
    if gpu.cluster.iter().product::<u32>() > 1 {
        let [x, y, z] = gpu.cluster;
        list[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        list[count].value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z };
        count += 1;
    }
    if gpu.pdl && overlaps {
        list[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        list[count].value.programmaticStreamSerializationAllowed = 1;
        count += 1;
    }
    Attributes { list, count: count as u32 }
}

/// Asks for the shared memory and the cluster size that a kernel needs.
fn prepare(context: &Context, function: sys::CUfunction, name: &str, smem: u32, cluster: u32) -> Result<(), Error> {
    use sys::CUfunction_attribute_enum::*;
    if smem > context.max_smem {
        return Err(Error::Device {
            device: context.name.clone(),
            what: name.into(),
            why: format!("needs {smem} bytes of shared memory, a block has {}", context.max_smem),
        });
    }
    let set = |attribute, value: u32| {
        // SAFETY: a function of a loaded module.
        let set = unsafe { sys::cuFuncSetAttribute(function, attribute, value as i32) };
        check(context, name, set)
    };
    if smem > 0 {
        set(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, smem)?;
    }
    if cluster > PORTABLE_CLUSTER {
        set(CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)?;
    }
    Ok(())
}

impl Module {
    fn load(context: &Arc<Context>, entry: &CodeEntry, code: &[u8]) -> Result<Module, Error> {
        // PTX is text and must end with a zero byte; to SASS it does no harm.
        let mut image = code.to_vec();
        image.push(0);
        let mut log = vec![0u8; LOG_BYTES];
        let mut options = [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
        let mut values = [log.as_mut_ptr().cast::<c_void>(), std::ptr::without_provenance_mut(LOG_BYTES)];
        let mut handle = std::ptr::null_mut();
        let count = if entry.kind == CodeKind::Ptx { options.len() as u32 } else { 0 };
        // SAFETY: the image ends with a zero byte; options and values go in pairs; the log has
        // the length that is told; `handle` is written by the call.
        let loaded = unsafe { sys::cuModuleLoadDataEx(&mut handle, image.as_ptr().cast(), count, options.as_mut_ptr(), values.as_mut_ptr()) };
        if loaded == sys::CUresult::CUDA_SUCCESS {
            return Ok(Module { handle, context: context.clone() });
        }
        let end = log.iter().position(|b| *b == 0).unwrap_or(log.len());
        let log = String::from_utf8_lossy(&log[..end]);
        let mut why = describe(loaded);
        if loaded == sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION {
            why.push_str("; the driver is older than the PTX: update the driver");
        }
        if !log.trim().is_empty() {
            why.push('\n');
            why.push_str(log.trim());
        }
        Err(Error::Load { target: entry.target.clone(), why })
    }

    fn function(&self, entry: &CodeEntry, symbol: &str) -> Result<sys::CUfunction, Error> {
        let fail = |why: String| Error::Load { target: entry.target.clone(), why };
        let name = CString::new(symbol).map_err(|e| fail(e.to_string()))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: a loaded module, a text with a zero byte; `function` is written by the call.
        let found = unsafe { sys::cuModuleGetFunction(&mut function, self.handle, name.as_ptr()) };
        match found {
            sys::CUresult::CUDA_SUCCESS => Ok(function),
            other => Err(fail(format!("kernel `{symbol}`: {}", describe(other)))),
        }
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        self.context.make_current().ok();
        // SAFETY: loaded by `load`, unloaded once.
        unsafe { sys::cuModuleUnload(self.handle) };
    }
}

/// What the driver is asked for a tensor map.
#[derive(Debug, PartialEq)]
struct MapRequest {
    dtype: sys::CUtensorMapDataType,
    dims: Vec<u64>,
    strides: Vec<u64>,
    boxes: Vec<u32>,
    element_strides: Vec<u32>,
    swizzle: sys::CUtensorMapSwizzle,
    promotion: sys::CUtensorMapL2promotion,
    fill: sys::CUtensorMapFloatOOBfill,
}

/// A tensor map in the driver's words; an error where the hardware would refuse it.
fn request(map: &TensorMap, sizes: &MapShape, base: u64) -> Result<MapRequest, String> {
    use sys::CUtensorMapDataType_enum::*;
    let dtype = match map.dtype {
        DType::F64 => CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
        DType::F32 => CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        DType::F16 => CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType::BF16 => CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        DType::I64 => CU_TENSOR_MAP_DATA_TYPE_INT64,
        DType::U64 => CU_TENSOR_MAP_DATA_TYPE_UINT64,
        DType::I32 => CU_TENSOR_MAP_DATA_TYPE_INT32,
        DType::U32 => CU_TENSOR_MAP_DATA_TYPE_UINT32,
        DType::I16 | DType::U16 => CU_TENSOR_MAP_DATA_TYPE_UINT16,
        DType::I8 | DType::U8 | DType::Bool | DType::F8E4M3 | DType::F8E5M2 | DType::F8E4M3Fnuz | DType::F8E5M2Fnuz | DType::F8E8M0 => {
            CU_TENSOR_MAP_DATA_TYPE_UINT8
        }
        DType::I4 | DType::U4 | DType::I2 | DType::U2 | DType::F4E2M1 => return Err("elements of less than a byte have no tensor maps".into()),
    };
    let rank = sizes.dims.len();
    let limit = match map.swizzle {
        Swizzle::None => u64::MAX,
        Swizzle::B32 => 32,
        Swizzle::B64 => 64,
        Swizzle::B128 => 128,
    };
    let inner = u64::from(map.box_dims[0]) * map.dtype.align() as u64;
    if !base.is_multiple_of(16) {
        return Err(format!("its memory begins at {base:#x}, no multiple of 16"));
    }
    if let Some(bad) = sizes.dims.iter().find(|d| !(1..=1 << 32).contains(*d)) {
        return Err(format!("an extent of {bad}"));
    }
    if let Some(bad) = sizes.strides.iter().find(|s| !s.is_multiple_of(16) || **s >= 1 << 40) {
        return Err(format!("a stride of {bad} bytes, no multiple of 16 below 2^40"));
    }
    if !inner.is_multiple_of(16) || inner > limit {
        return Err(format!("a box of {inner} bytes inside, with swizzle {:?}", map.swizzle));
    }
    Ok(MapRequest {
        dtype,
        dims: sizes.dims.clone(),
        strides: sizes.strides.clone(),
        boxes: map.box_dims.clone(),
        element_strides: match map.element_strides.is_empty() {
            true => vec![1; rank],
            false => map.element_strides.clone(),
        },
        swizzle: match map.swizzle {
            Swizzle::None => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::B32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::B64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::B128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        },
        promotion: match map.l2_promotion {
            L2Promotion::None => sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            L2Promotion::B64 => sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
            L2Promotion::B128 => sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            L2Promotion::B256 => sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        },
        fill: match map.fill {
            Fill::Zero => sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            Fill::Nan => sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA,
        },
    })
}

fn encode(context: &Context, kernel: &str, map: &TensorMap, sizes: &MapShape, base: u64) -> Result<sys::CUtensorMap, Error> {
    let r = request(map, sizes, base).map_err(|why| Error::Plan(format!("kernel `{kernel}`, tensor map of argument {}: {why}", map.arg)))?;
    let mut encoded = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: as many extents, boxes and element strides as the rank says, one stride less; the
    // map is written by the call, which does not touch the memory it describes.
    let made = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut encoded,
            r.dtype,
            r.dims.len() as u32,
            std::ptr::with_exposed_provenance_mut(base as usize),
            r.dims.as_ptr(),
            r.strides.as_ptr(),
            r.boxes.as_ptr(),
            r.element_strides.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            r.swizzle,
            r.promotion,
            r.fill,
        )
    };
    check(context, &format!("{kernel}: tensor map of argument {}", map.arg), made)?;
    Ok(encoded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DimExpr;

    fn map() -> (TensorMap, MapShape) {
        let map = TensorMap {
            arg: 0,
            byte_offset: DimExpr::Const(0),
            dtype: DType::BF16,
            dims: vec![],
            strides: vec![],
            box_dims: vec![64, 128],
            element_strides: vec![],
            swizzle: Swizzle::B128,
            l2_promotion: L2Promotion::default(),
            fill: Fill::default(),
        };
        (map, MapShape { byte_offset: 0, dims: vec![4096, 1000], strides: vec![8192] })
    }

    #[test]
    fn tensor_maps_say_what_the_hardware_wants() {
        let (map, sizes) = map();
        let r = request(&map, &sizes, 0x7000_0000).unwrap();
        assert_eq!(r.dtype as u32, 9);
        assert_eq!((r.dims, r.strides), (vec![4096, 1000], vec![8192]));
        assert_eq!((r.boxes, r.element_strides), (vec![64, 128], vec![1, 1]));
        assert_eq!((r.swizzle as u32, r.promotion as u32, r.fill as u32), (3, 3, 0));
    }

    #[test]
    fn tensor_maps_that_the_hardware_refuses_are_refused_in_words() {
        let refuse = |change: &dyn Fn(&mut TensorMap, &mut MapShape), base: u64| {
            let (mut map, mut sizes) = map();
            change(&mut map, &mut sizes);
            request(&map, &sizes, base).unwrap_err()
        };
        assert!(refuse(&|_, _| {}, 0x7000_0008).contains("no multiple of 16"));
        assert!(refuse(&|_, s| s.strides[0] = 8200, 0).contains("a stride of 8200"));
        assert!(refuse(&|_, s| s.dims[1] = 0, 0).contains("an extent of 0"));
        assert!(refuse(&|m, _| m.box_dims[0] = 128, 0).contains("256 bytes inside"));
        assert!(refuse(&|m, _| m.box_dims[0] = 12, 0).contains("24 bytes inside"));
        assert!(refuse(&|m, _| m.dtype = DType::I4, 0).contains("less than a byte"));
    }

    #[test]
    fn launch_attributes_follow_the_plan() {
        let mut gpu = GpuLaunch { grid: [1.into(), 1.into(), 1.into()], block: [384, 1, 1], cluster: [1, 1, 1], smem: 0, tensor_maps: vec![], pdl: false };
        assert_eq!(attributes(&gpu, true).count, 0);
        gpu.pdl = true;
        gpu.cluster = [2, 1, 1];
        assert_eq!(attributes(&gpu, false).count, 1, "an older driver begins kernels one after the other");
        let both = attributes(&gpu, true);
        assert_eq!(both.count, 2);
        assert_eq!((both.list[0].id as u32, both.list[1].id as u32), (4, 6));
        // SAFETY: the field that was written.
        assert_eq!(unsafe { both.list[0].value.clusterDim }.x, 2);
    }
}
