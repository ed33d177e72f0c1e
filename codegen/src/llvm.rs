//! LLVM: target machines, object code, assembly and PTX text. The only user of inkwell.
use crate::targets::{Cpu, Gpu, Target};
use inkwell::{
    OptimizationLevel,
    passes::PassBuilderOptions,
    targets::{CodeModel, FileType, InitializationConfig, RelocMode, Target as Backend, TargetMachine, TargetTriple},
};
use std::sync::Once;

/// LLVM could not make code: an error of ours or of the installation, never of the model's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("LLVM: {0}")]
pub struct LlvmError(pub String);

/// Owns the types and constants of the modules made in it. One thread at a time.
pub struct Context(inkwell::context::Context);

/// An LLVM module.
pub struct Module<'c>(inkwell::module::Module<'c>);

/// How much LLVM's middle end does before code generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum MiddleEnd {
    /// Nothing: right for kernels that are written unrolled and vectorised.
    #[default]
    None,
    /// Scalar cleanup: for kernels written plainly.
    Light,
}

/// What is emitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emit {
    /// Relocatable object (CPU).
    Object,
    /// Assembly, or PTX for a GPU.
    Assembly,
}

impl Default for Context {
    fn default() -> Self {
        Context(inkwell::context::Context::create())
    }
}

impl Context {
    /// A fresh context.
    pub fn new() -> Context {
        Context::default()
    }

    pub(crate) fn raw(&self) -> *mut std::ffi::c_void {
        self.0.raw().cast()
    }

    /// # Safety
    /// `module` is an LLVM module of this context that nobody else owns.
    pub(crate) unsafe fn adopt(&self, module: *mut std::ffi::c_void) -> Module<'_> {
        // SAFETY: what this function demands.
        Module(unsafe { inkwell::module::Module::new(module.cast()) })
    }
}

fn initialize() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let config = InitializationConfig { asm_parser: false, disassembler: false, ..InitializationConfig::default() };
        Backend::initialize_x86(&InitializationConfig::default());
        Backend::initialize_nvptx(&config);
    });
}

fn machine(target: &Target) -> Result<TargetMachine, LlvmError> {
    initialize();
    let (triple, cpu, features) = match target {
        Target::Cpu(Cpu { llvm_cpu, llvm_features, .. }) => ("x86_64-unknown-linux-gnu", llvm_cpu.clone(), llvm_features.clone()),
        Target::Gpu(Gpu { arch, ptx, .. }) => ("nvptx64-nvidia-cuda", (*arch).to_owned(), format!("+ptx{ptx}")),
    };
    let triple = TargetTriple::create(triple);
    let backend = Backend::from_triple(&triple).map_err(|e| LlvmError(e.to_string()))?;
    backend
        .create_target_machine(&triple, &cpu, &features, OptimizationLevel::Default, RelocMode::PIC, CodeModel::Default)
        .ok_or_else(|| LlvmError(format!("no code generator for {cpu} with `{features}`")))
}

/// Name and features of this machine's CPU, as LLVM spells them.
pub fn host_cpu() -> (String, String) {
    (TargetMachine::get_host_cpu_name().to_string(), TargetMachine::get_host_cpu_features().to_string())
}

impl Module<'_> {
    /// Verify, run the middle end, and emit code for `target`.
    pub fn emit(&self, target: &Target, middle: MiddleEnd, what: Emit) -> Result<Vec<u8>, LlvmError> {
        let machine = machine(target)?;
        self.prepare(&machine, middle)?;
        let file = match what {
            Emit::Object => FileType::Object,
            Emit::Assembly => FileType::Assembly,
        };
        let buffer = machine.write_to_memory_buffer(&self.0, file).map_err(|e| LlvmError(e.to_string()))?;
        let bytes = buffer.as_slice();
        // A text buffer ends in a NUL that is not part of the text.
        Ok(bytes.strip_suffix(&[0]).filter(|_| what == Emit::Assembly).unwrap_or(bytes).to_vec())
    }

    /// LLVM IR text, after the middle end.
    pub fn ir(&self, target: &Target, middle: MiddleEnd) -> Result<String, LlvmError> {
        self.prepare(&machine(target)?, middle)?;
        Ok(self.0.print_to_string().to_string())
    }

    fn prepare(&self, machine: &TargetMachine, middle: MiddleEnd) -> Result<(), LlvmError> {
        self.0.set_triple(&machine.get_triple());
        self.0.set_data_layout(&machine.get_target_data().get_data_layout());
        self.0.verify().map_err(|e| LlvmError(e.to_string()))?;
        if middle == MiddleEnd::Light {
            self.0
                .run_passes("function(sroa,early-cse,instcombine,loop-mssa(licm))", machine, PassBuilderOptions::create())
                .map_err(|e| LlvmError(e.to_string()))?;
        }
        Ok(())
    }
}
