//! Engines by name: which there are, which one `auto` takes, and making them.

use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::interp::Interpreter;
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
