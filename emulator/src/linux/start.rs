//! A program's start: address space, engine, registers, and what the host shows of it.

use crate::cpu::cpuid::CpuModel;
use crate::host::{inherited, signal as host_signal};
use crate::linux::limits::AddressLimit;
use crate::linux::{
    AddressSpace, Image, LoadError, Options, Process, Task, VcpuFactory, Why, exec, host, proc, signal,
};
use std::ffi::OsString;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Makes the process for a checked program on the calling thread, which becomes its first task.
///
/// # Errors
/// It cannot be mapped, or there is no engine.
pub fn start(
    image: Image,
    env: Vec<OsString>,
    options: Options,
    cpu: &Arc<CpuModel>,
    factory: VcpuFactory,
) -> Result<Task, LoadError> {
    // The loader writes to guest memory, which needs the handler of faults.
    host_signal::attach();
    let space = AddressSpace::new();
    let (mut state, placed) = image.load(&space, &env, cpu)?;
    state.cr4 &= cpu.cr4();
    state.xcr0 &= cpu.xcr0();
    let shown_by_kernel = proc::tell_kernel(&placed);
    proc::set_name(image.name.as_os_str());
    let name = image.name.clone();
    exec::prepare();
    let process = Process {
        space: Arc::new(space),
        factory,
        options,
        exe: image.real_path(),
        args: image.args,
        env,
        shown_by_kernel,
        first: host::gettid(),
        signals: signal::Dispositions::default(),
        cpu: cpu.clone(),
        host_exec: AtomicBool::new(false),
        address_limit: AddressLimit::default(),
    };
    let mut task = Task::new(Arc::new(process)).map_err(|e| LoadError::new(&name, Why::NoEngine(e)))?;
    *task.vcpu.state() = state;
    inherited::restore();
    Ok(task)
}
