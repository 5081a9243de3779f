//! Engines by name: which there are, which one `auto` takes, and making them.

use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::linux::VcpuFactory;
use bivisor_emulator::vcpu::Vcpu;
use clap::ValueEnum;
use std::sync::Arc;

/// The engines, as `--backend` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// KVM where it is hardware virtualization and pays off, else the translator.
    Auto,
    /// The interpreter: the reference.
    Interp,
}

/// An engine for raw code.
///
/// # Errors
/// A sentence: no such CPU model, or the engine is not to be had here.
pub fn for_code(backend: Backend, cpu: &str) -> Result<Box<dyn Vcpu + Send>, String> {
    let model = Arc::new(CpuModel::from_name(cpu)?);
    match backend {
        Backend::Auto | Backend::Interp => Ok(Box::new(Interpreter::new(model))),
    }
}

impl Backend {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Backend::Auto => "auto",
            Backend::Interp => "interp",
        }
    }
}

/// Engines for a Linux process: which one it is and why, and the way to make one for each of its threads.
///
/// # Errors
/// A sentence: the engine is not to be had here.
pub fn for_process(backend: Backend, model: &Arc<CpuModel>) -> Result<(String, VcpuFactory), String> {
    let model = model.clone();
    match backend {
        Backend::Auto | Backend::Interp => {
            let why =
                if backend == Backend::Auto { "interp: there is no faster engine yet" } else { "interp: as asked" };
            Ok((why.into(), Arc::new(move || Ok(Box::new(Interpreter::new(model.clone()))))))
        }
    }
}
