//! Why KVM_RUN returned: one match, and what a guest's instruction means for the monitor.
//!
//! What traps and what does not, on hardware (SDM 3C 25.1, APM 2 15.9) and on a software KVM:
//!
//! | instruction | process (CPL 3) | machine |
//! | --- | --- | --- |
//! | SYSCALL | leaves by the stub at LSTAR | goes to the guest's kernel |
//! | INT n, INT3, exceptions | leave by the stubs of the IDT; software KVM makes INT n a #UD, which is decoded | through the guest's IDT |
//! | page fault | leaves; filled if the mapping allows it | the guest's own; leaves only for addresses without memory |
//! | IN, OUT, loads and stores without memory | #GP | leave, done by the bus |
//! | CPUID | answered inside KVM from the table of the offered CPU | the same |
//! | RDTSC, RDRAND | hardware | hardware |
//! | HLT | #GP | leaves; waits in the kernel where the interrupt controllers are its |
//! | PUSHF, POPF, STI, CLI, segment loads, LGDT ..., SGDT ... | hardware; at CPL 3 of a software KVM some show the host's values | hardware |
//! | MOV CR, MOV DR, RDMSR, WRMSR | #GP | hardware or inside KVM |
//!
//! A software KVM interprets all code that is not 64-bit CPL 3 inside the kernel, with holes: what it cannot do is an internal
//! error here, and one step of the interpreter.

use crate::vm::{internal_error, port_access};
use bivisor_emulator::bus::Bus;
use bivisor_emulator::isa::{Class, facts};
use bivisor_emulator::vcpu::How;
use iced_x86::{Code, Mnemonic as M};
use kvm_ioctls::{VcpuExit, VcpuFd};

/// Who is told about ports and addresses without memory.
#[derive(Clone, Copy)]
pub enum Wiring<'a> {
    /// The stubs of [`crate::intercept`] use them to reach the monitor.
    Monitor,
    /// They are the machine's.
    Bus(&'a dyn Bus),
}

/// Why KVM_RUN returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Left {
    /// An access that the bus has done: go on.
    Served,
    /// A store to an address without memory, for the monitor.
    Store(u64),
    /// OUT, for the monitor.
    Out(u16),
    /// HLT.
    Halt,
    /// Single step or breakpoint; DR6.
    Debug(u64),
    /// An interrupt can be taken now.
    Window,
    /// A signal.
    Interrupted,
    /// The host refuses the access that the guest's page tables allow: EFAULT.
    Refused,
    /// KVM cannot do the instruction at RIP.
    CannotEmulate,
    /// Triple fault.
    Shutdown,
    /// Anything else, as a sentence.
    Failed(String),
}

/// KVM_RUN, once.
pub fn run(vcpu: &mut VcpuFd, wiring: Wiring<'_>) -> Left {
    /// What needs the vCPU again, after the borrow of its exit has ended.
    enum Then {
        Port,
        Internal,
        Is(Left),
    }
    let then = match vcpu.run() {
        Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => Then::Port,
        Ok(VcpuExit::MmioRead(gpa, data)) => match wiring {
            Wiring::Bus(bus) => {
                bus.read_mmio(gpa, data);
                Then::Is(Left::Served)
            }
            Wiring::Monitor => Then::Is(Left::Failed(format!("a load from address {gpa:#x} without memory"))),
        },
        Ok(VcpuExit::MmioWrite(gpa, data)) => match wiring {
            Wiring::Bus(bus) => {
                bus.write_mmio(gpa, data);
                Then::Is(Left::Served)
            }
            Wiring::Monitor => Then::Is(Left::Store(gpa)),
        },
        Ok(VcpuExit::Hlt) => Then::Is(Left::Halt),
        Ok(VcpuExit::Debug(d)) => Then::Is(Left::Debug(d.dr6)),
        Ok(VcpuExit::IrqWindowOpen) => Then::Is(Left::Window),
        Ok(VcpuExit::Intr) => Then::Is(Left::Interrupted),
        Ok(VcpuExit::Shutdown) => Then::Is(Left::Shutdown),
        Ok(VcpuExit::InternalError) => Then::Internal,
        Ok(VcpuExit::MemoryFault { .. }) => Then::Is(Left::Refused),
        Ok(other) => Then::Is(Left::Failed(format!("KVM stopped: {other:?}"))),
        Err(e) => Then::Is(match e.errno() {
            libc::EINTR | libc::EAGAIN => Left::Interrupted,
            libc::EFAULT => Left::Refused,
            _ => Left::Failed(format!("KVM_RUN: {e}")),
        }),
    };
    match then {
        Then::Is(left) => left,
        Then::Internal => match internal_error(vcpu) {
            // KVM_INTERNAL_ERROR_EMULATION; 3 and 4: an event could not be delivered, or an exit nobody knows.
            1 => Left::CannotEmulate,
            n => Left::Failed(format!("KVM reports internal error {n}")),
        },
        Then::Port => {
            let io = port_access(vcpu);
            match wiring {
                Wiring::Monitor => Left::Out(io.port),
                Wiring::Bus(bus) => {
                    for element in io.data.chunks_mut(io.size) {
                        if io.input { bus.read_port(io.port, element) } else { bus.write_port(io.port, element) }
                    }
                    Left::Served
                }
            }
        }
    }
}

/// How this engine carries out an instruction in hardware. (A software KVM interprets in the kernel what is not 64-bit user code; what
/// it cannot do there is one step of the interpreter.) "Exits" includes exits that the kernel's part of KVM deals with.
pub fn how(code: Code) -> How {
    let f = facts(code);
    match (f.class, code.mnemonic()) {
        (Class::Undefined, _) => How::Unsupported,
        (Class::Io, _) => How::Exits,
        // SDM 3C 25.1.2 and 25.1.3, as KVM sets the controls.
        (_, M::Cpuid | M::Hlt | M::Invd | M::Wbinvd | M::Xsetbv | M::Vmcall | M::Vmmcall | M::Rdpmc) => How::Exits,
        (_, M::Monitor | M::Mwait | M::Rdmsr | M::Wrmsr) => How::Exits,
        _ => How::Hardware,
    }
}
