//! MLIR: parsing what the lowerings print, running their pass pipelines, translating to LLVM IR. The only user of
//! melior. Only the dialects, passes and translations in use are registered.
use crate::llvm;
use melior::{
    Context,
    dialect::{DialectHandle, DialectRegistry},
    ir::Module,
    pass::{Pass, PassManager, conversion},
};
use std::{cell::RefCell, rc::Rc};

/// Which device's pass pipeline lowers the text to the LLVM dialect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pipeline {
    /// scf, vector, math, arith, ub, cf to llvm.
    Cpu,
    /// As `Cpu`, and nvvm operations that stand for inline PTX are expanded.
    Gpu,
}

/// MLIR refused the text: an error of ours, never of the model's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("MLIR: {stage} failed: {diagnostics}")]
pub struct MlirError {
    /// `parse`, `verify`, `passes` or `translate`.
    pub stage: &'static str,
    /// What MLIR said, a line each.
    pub diagnostics: String,
}

unsafe extern "C" {
    // mlir::register{Builtin,LLVM,NVVM}DialectTranslation(mlir::MLIRContext &). The C API registers all dialects'
    // translations or none, which would link every dialect.
    #[link_name = "_ZN4mlir33registerBuiltinDialectTranslationERNS_11MLIRContextE"]
    fn register_builtin_translation(context: *mut std::ffi::c_void);
    #[link_name = "_ZN4mlir30registerLLVMDialectTranslationERNS_11MLIRContextE"]
    fn register_llvm_translation(context: *mut std::ffi::c_void);
    #[link_name = "_ZN4mlir30registerNVVMDialectTranslationERNS_11MLIRContextE"]
    fn register_nvvm_translation(context: *mut std::ffi::c_void);
}

fn context() -> Context {
    let registry = DialectRegistry::new();
    // SAFETY: the handles are static objects of the linked MLIR.
    let handles = unsafe {
        [
            mlir_sys::mlirGetDialectHandle__math__(),
            mlir_sys::mlirGetDialectHandle__vector__(),
            mlir_sys::mlirGetDialectHandle__ub__(),
            mlir_sys::mlirGetDialectHandle__nvvm__(),
        ]
        .map(|h| DialectHandle::from_raw(h))
    };
    for handle in [DialectHandle::arith(), DialectHandle::cf(), DialectHandle::scf(), DialectHandle::llvm()].into_iter().chain(handles) {
        handle.insert_dialect(&registry);
    }
    let context = Context::new_with_registry(&registry, false);
    context.load_all_available_dialects();
    // SAFETY: an MlirContext holds the address of an mlir::MLIRContext, which is what the C++ functions take.
    unsafe {
        let raw = context.to_raw().ptr;
        register_builtin_translation(raw);
        register_llvm_translation(raw);
        register_nvvm_translation(raw);
    }
    context
}

fn passes(pipeline: Pipeline) -> Vec<Pass> {
    let mut passes = vec![
        conversion::create_scf_to_control_flow(),
        conversion::create_vector_to_llvm(),
        conversion::create_math_to_llvm(),
        conversion::create_ub_to_llvm(),
        conversion::create_arith_to_llvm(),
        conversion::create_control_flow_to_llvm(),
    ];
    if pipeline == Pipeline::Gpu {
        passes.push(conversion::create_nvvm_to_llvm());
    }
    passes.push(conversion::create_reconcile_unrealized_casts());
    passes
}

/// Parse `text` (a module of `llvm.func`s with scf, vector, math, arith inside), lower it by `pipeline` and
/// translate it into an LLVM module of `llvm`.
pub fn translate<'c>(text: &str, pipeline: Pipeline, llvm: &'c llvm::Context) -> Result<llvm::Module<'c>, MlirError> {
    let context = context();
    let said = Rc::new(RefCell::new(String::new()));
    let sink = said.clone();
    let handler = context.attach_diagnostic_handler(move |d| {
        let mut sink = sink.borrow_mut();
        // Enough to understand; a bad module can repeat itself a thousand times.
        if sink.len() < 4000 {
            sink.push_str(&format!("{}: {d}\n", d.location()));
        }
        true
    });
    let fail = |stage| MlirError { stage, diagnostics: said.borrow().trim_end().to_owned() };
    let result = (|| {
        let mut module = Module::parse(&context, text).ok_or_else(|| fail("parse"))?;
        let manager = PassManager::new(&context);
        manager.enable_verifier(cfg!(debug_assertions));
        for pass in passes(pipeline) {
            manager.add_pass(pass);
        }
        manager.run(&mut module).map_err(|_| fail("passes"))?;
        // SAFETY: the module is alive, the LLVM context outlives the result by its lifetime, and the two bindings name the
        // same opaque LLVM types.
        let raw = unsafe { mlir_sys::mlirTranslateModuleToLLVMIR(module.as_operation().to_raw(), llvm.raw().cast()) };
        if raw.is_null() {
            return Err(fail("translate"));
        }
        // SAFETY: a fresh module that nobody else owns.
        Ok(unsafe { llvm.adopt(raw.cast()) })
    })();
    context.detach_diagnostic_handler(handler);
    result
}
