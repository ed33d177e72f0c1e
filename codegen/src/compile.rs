//! Kernels to code: lowering, object emission over threads, linking.
use crate::{
    link::{self, LinkError},
    llvm::{self, Emit, LlvmError, MiddleEnd},
    lower::{self, LowerError},
    mlir::{self, MlirError, Pipeline},
    targets::Target,
    tile::{
        Kernel,
        check::{self, CheckError},
    },
};
use std::sync::{
    Mutex,
    atomic::{AtomicUsize, Ordering},
};

/// Why kernels did not become code. All but `Link(NoLinker)` are errors of ours.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// A kernel breaks the rules of the tile IR.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// A kernel uses what the target has no form for.
    #[error(transparent)]
    Lower(#[from] LowerError),
    /// MLIR refused what we wrote.
    #[error(transparent)]
    Mlir(#[from] MlirError),
    /// LLVM refused it.
    #[error(transparent)]
    Llvm(#[from] LlvmError),
    /// No shared object.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The target is not of the kind this function serves.
    #[error("{0} is not a CPU target")]
    NotCpu(String),
    /// The target is not of the kind this function serves.
    #[error("{0} is not a GPU target")]
    NotGpu(String),
}

/// One PTX module with the entry of every kernel.
pub fn ptx(kernels: &[Kernel], target: &Target) -> Result<String, CompileError> {
    let Target::Gpu(gpu) = target else {
        return Err(CompileError::NotGpu(target.name().to_owned()));
    };
    for kernel in kernels {
        check::check(kernel, &target.limits())?;
    }
    let text = lower::nvvm::module(kernels, gpu)?;
    let bytes = emit(&text, target, MiddleEnd::None, Emit::Assembly)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Lines of MLIR that one module holds at most, unless one kernel alone has more: modules are compiled in parallel, and
/// where they are cut depends on the kernels only, so the bytes do not depend on the thread count.
const MODULE_LINES: usize = 6000;

/// The MLIR module of CPU kernels, as text.
pub fn cpu_mlir(kernels: &[Kernel], target: &Target) -> Result<String, CompileError> {
    Ok(lower::module(&cpu_functions(kernels, target)?))
}

/// Why `target` has no code for a kernel, where it has none.
pub(crate) fn refusal(kernel: &Kernel, target: &Target) -> Option<CompileError> {
    if let Err(e) = check::check(kernel, &target.limits()) {
        return Some(e.into());
    }
    match target {
        Target::Cpu(cpu) => lower::cpu::function(kernel, cpu).err().map(Into::into),
        Target::Gpu(gpu) => lower::nvvm::module(std::slice::from_ref(kernel), gpu).err().map(Into::into),
    }
}

fn cpu_functions(kernels: &[Kernel], target: &Target) -> Result<Vec<String>, CompileError> {
    let Target::Cpu(cpu) = target else {
        return Err(CompileError::NotCpu(target.name().to_owned()));
    };
    let mut functions = vec![];
    for kernel in kernels {
        check::check(kernel, &target.limits())?;
        functions.push(lower::cpu::function(kernel, cpu)?);
    }
    Ok(functions)
}

/// One shared object with the entry of every kernel. `threads` is how many to compile with.
pub fn cpu_library(kernels: &[Kernel], target: &Target, middle: MiddleEnd, threads: usize) -> Result<Vec<u8>, CompileError> {
    let functions = cpu_functions(kernels, target)?;
    let mut modules: Vec<String> = vec![];
    let mut open: Vec<String> = vec![];
    let mut lines = 0;
    for f in functions {
        let n = f.lines().count();
        if lines + n > MODULE_LINES && !open.is_empty() {
            modules.push(lower::module(&std::mem::take(&mut open)));
            lines = 0;
        }
        lines += n;
        open.push(f);
    }
    modules.push(lower::module(&open));
    let objects = in_parallel(&modules, threads, |text| emit(text, target, middle, Emit::Object))?;
    Ok(link::link(&objects)?)
}

/// Lower MLIR text to code for `target`.
pub fn emit(mlir_text: &str, target: &Target, middle: MiddleEnd, what: Emit) -> Result<Vec<u8>, CompileError> {
    let pipeline = if matches!(target, Target::Cpu(_)) { Pipeline::Cpu } else { Pipeline::Gpu };
    let context = llvm::Context::new();
    let module = mlir::translate(mlir_text, pipeline, &context)?;
    Ok(module.emit(target, middle, what)?)
}

/// Assembly (or PTX) and LLVM IR texts of MLIR text, for people.
pub fn llvm_ir(mlir_text: &str, target: &Target, middle: MiddleEnd) -> Result<String, CompileError> {
    let pipeline = if matches!(target, Target::Cpu(_)) { Pipeline::Cpu } else { Pipeline::Gpu };
    let context = llvm::Context::new();
    let module = mlir::translate(mlir_text, pipeline, &context)?;
    Ok(module.ir(target, middle)?)
}

/// `f` of every item, in order, on up to `threads` threads; the first error in item order.
pub fn in_parallel<T: Sync, R: Send>(items: &[T], threads: usize, f: impl Fn(&T) -> Result<R, CompileError> + Sync) -> Result<Vec<R>, CompileError> {
    let threads = threads.clamp(1, items.len().max(1));
    if threads == 1 {
        return items.iter().map(f).collect();
    }
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<Option<Result<R, CompileError>>>> = Mutex::new(items.iter().map(|_| None).collect());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(i) else { return };
                    let r = f(item);
                    if let Ok(mut done) = done.lock() {
                        done[i] = Some(r);
                    }
                }
            });
        }
    });
    let done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    done.into_iter().flatten().collect()
}
