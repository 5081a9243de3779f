//! Engines by name: which there are, which one `auto` takes, and making them.

use crate::trap::TrapVcpu;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::interp::sensitive::time::TimeSource;
use bivisor_emulator::linux::VcpuFactory;
use bivisor_emulator::vcpu::Vcpu;
use bivisor_kvm_backend::{HostKvm, Kind, KvmVm};
use bivisor_translator::{Cache, Policy, Translator};
use clap::ValueEnum;
use std::arch::x86_64::__cpuid;
use std::sync::Arc;

/// The engines, as `--backend` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// KVM where it is hardware virtualization and pays off, else the fastest software engine.
    Auto,
    /// The interpreter: the reference.
    Interp,
    /// The translator: x86 to x86 binary translation.
    Bt,
    /// KVM: the processor's virtualization, or what the host's KVM module is.
    Kvm,
    /// Trap-and-emulate, a demonstration (only exec, demo, compare): what is sensitive and does not trap goes wrong.
    Trap,
}

impl Backend {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Backend::Auto => "auto",
            Backend::Interp => "interp",
            Backend::Bt => "bt",
            Backend::Kvm => "kvm",
            Backend::Trap => "trap",
        }
    }
}

/// What an engine is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A Linux process.
    Process,
    /// Raw code in any mode.
    Code,
    /// A whole machine.
    Machine,
    /// A machine for a small program of its own: a boot sector, a multiboot kernel. A software KVM runs it, if slowly.
    SmallMachine,
}

/// The best engine of software.
const SOFTWARE: Backend = Backend::Bt;

/// Settles `auto`, and says why in a sentence. For an engine asked for by name, whether it is to be had here.
///
/// # Errors
/// Why it is not, and what to do.
pub fn choose(asked: Backend, purpose: Purpose) -> Result<(Backend, String), String> {
    match asked {
        Backend::Auto => Ok(automatic(purpose)),
        Backend::Kvm => {
            let kvm = bivisor_kvm_backend::host();
            match usable(kvm, purpose) {
                true => Ok((asked, format!("kvm, as asked: {}", kvm.reason))),
                false => {
                    Err(format!("--backend kvm cannot work here: {}; use --backend {}", kvm.reason, SOFTWARE.name()))
                }
            }
        }
        Backend::Trap if purpose != Purpose::Code => Err(format!(
            "--backend trap is a demonstration: it runs kernel code wrongly (see `bivisor demo popf`); use --backend {}",
            SOFTWARE.name()
        )),
        _ => Ok((asked, format!("{}, as asked", asked.name()))),
    }
}

fn usable(kvm: &HostKvm, purpose: Purpose) -> bool {
    match purpose {
        Purpose::Process => kvm.usable_for_process,
        Purpose::Machine => kvm.usable_for_machine,
        // Raw code may do with less than a machine needs: a case that cannot run says so.
        Purpose::Code | Purpose::SmallMachine => !matches!(kvm.kind, Kind::Absent | Kind::Forbidden | Kind::Broken),
    }
}

fn automatic(purpose: Purpose) -> (Backend, String) {
    let software = |why: &str| (SOFTWARE, format!("{}: {why}", SOFTWARE.name()));
    // Cheap evidence first: a probe of KVM takes milliseconds.
    if !std::path::Path::new("/dev/kvm").exists() {
        return software("there is no /dev/kvm");
    }
    let vmx = __cpuid(1).ecx & 1 << 5 != 0;
    let svm = __cpuid(0x8000_0000).eax > 0x8000_0000 && __cpuid(0x8000_0001).ecx & 1 << 2 != 0;
    if !vmx && !svm {
        return software("the processor shows neither VT-x nor AMD-V, so KVM is software here");
    }
    let kvm = bivisor_kvm_backend::host();
    match kvm.pays_off && usable(kvm, purpose) {
        true => (Backend::Kvm, format!("kvm: {}", kvm.reason)),
        false => software(&kvm.reason),
    }
}

fn no_code_memory(error: std::io::Error) -> String {
    format!("--backend bt cannot work here: no executable memory: {error}")
}

/// An engine for raw code; `backend` has been [chosen](choose).
///
/// # Errors
/// A sentence: the engine is not to be had here.
pub fn for_code(backend: Backend, model: Arc<CpuModel>) -> Result<Box<dyn Vcpu + Send>, String> {
    Ok(match backend {
        Backend::Auto | Backend::Interp => Box::new(Interpreter::new(model)),
        Backend::Bt => Box::new(Translator::new(model).map_err(no_code_memory)?),
        Backend::Kvm => Box::new(KvmVm::new(model)?.vcpu()),
        Backend::Trap => Box::new(TrapVcpu::new(model)),
    })
}

/// An engine for a machine; `backend` has been [chosen](choose). If `repeatable`, its random numbers are the same in every run. Whether KVM has
/// the interrupt controllers says `irqchip`; `None`: where it is hardware.
///
/// # Errors
/// A sentence: the engine is not to be had here.
pub fn for_machine(
    backend: Backend,
    model: Arc<CpuModel>,
    repeatable: bool,
    irqchip: Option<bool>,
) -> Result<Box<dyn Vcpu + Send>, String> {
    if !repeatable {
        return match backend {
            Backend::Kvm => Ok(Box::new(KvmVm::new(model)?.vcpu().interpreting().with_irqchip(irqchip))),
            _ => for_code(backend, model),
        };
    }
    let source = TimeSource::deterministic(0);
    Ok(match backend {
        Backend::Auto | Backend::Interp => {
            let mut engine = Interpreter::new(model);
            engine.env().time = source;
            Box::new(engine)
        }
        Backend::Bt => {
            let mut engine = Translator::new(model).map_err(no_code_memory)?;
            engine.env().time = source;
            Box::new(engine)
        }
        Backend::Kvm | Backend::Trap => {
            return Err("--deterministic needs a software engine: use --backend interp or bt".into());
        }
    })
}

/// The way to make an engine for each thread of a Linux process, and the translator's code cache if it is that; `backend` has been
/// [chosen](choose). The cache holds `code_size` bytes of code.
///
/// # Errors
/// A sentence: the engine is not to be had here.
pub fn for_process(
    backend: Backend,
    model: &Arc<CpuModel>,
    code_size: usize,
) -> Result<(VcpuFactory, Option<Arc<Cache>>), String> {
    let model = model.clone();
    let mut code = None;
    let factory: VcpuFactory = match backend {
        Backend::Auto | Backend::Interp => Arc::new(move || Ok(Box::new(Interpreter::new(model.clone())))),
        Backend::Bt => {
            let cache = Cache::new(model, Policy::default(), code_size).map_err(no_code_memory)?;
            code = Some(cache.clone());
            Arc::new(move || Ok(Box::new(Translator::with_cache(cache.clone()))))
        }
        Backend::Kvm => {
            let vm = KvmVm::new(model)?;
            Arc::new(move || Ok(Box::new(vm.vcpu())))
        }
        Backend::Trap => return Err("--backend trap is for kernel code only: see `bivisor demo`".into()),
    };
    Ok((factory, code))
}
