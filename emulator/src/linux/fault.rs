//! From an exception of the guest to its signal: number, siginfo, and what the frame says about it (arch/x86/kernel/traps.c and
//! arch/x86/mm/fault.c of Linux; sigaction(2)).

use crate::cpu::{CpuState, Fault};
use crate::host::inbox::Info;
use crate::linux::frame::LastFault;
use crate::mem::{FlatSpace, Prot};

/// A signal that an instruction raised.
#[derive(Clone, Copy, Debug)]
pub struct Raised {
    /// The signal.
    pub sig: i32,
    /// Its siginfo.
    pub info: Info,
    /// What the thread's frames show from now on.
    pub last: LastFault,
}

/// `si_code` values of Linux that libc does not name on every target.
mod code {
    pub const SI_KERNEL: i32 = 0x80;
    pub const ILL_ILLOPN: i32 = 2;
    pub const FPE_INTDIV: i32 = 1;
    pub const FPE_FLTDIV: i32 = 3;
    pub const FPE_FLTOVF: i32 = 4;
    pub const FPE_FLTUND: i32 = 5;
    pub const FPE_FLTRES: i32 = 6;
    pub const FPE_FLTINV: i32 = 7;
    pub const SEGV_MAPERR: i32 = 1;
    pub const SEGV_ACCERR: i32 = 2;
    pub const BUS_ADRALN: i32 = 1;
    pub const BUS_ADRERR: i32 = 2;
    pub const TRAP_BRKPT: i32 = 1;
    pub const TRAP_TRACE: i32 = 2;
    pub const TRAP_HWBKPT: i32 = 4;
}

/// A siginfo with number, code and address.
pub fn siginfo(sig: i32, code: i32, addr: u64) -> Info {
    let mut info = [0; 128];
    info[..4].copy_from_slice(&sig.to_le_bytes());
    info[8..12].copy_from_slice(&code.to_le_bytes());
    info[16..24].copy_from_slice(&addr.to_le_bytes());
    info
}

/// What the kernel forces on a thread that did something it cannot be told about otherwise.
pub fn forced(sig: i32) -> Info {
    siginfo(sig, code::SI_KERNEL, 0)
}

const PF_P: u16 = 1;
const PF_W: u16 = 2;
const PF_U: u16 = 4;
const PF_I: u16 = 16;
/// TASK_SIZE_MAX with 4-level paging.
const USER_END: u64 = 0x7fff_ffff_f000;

/// The signal of an exception; `last` is what the thread's frames showed before.
pub fn raised(fault: Fault, cpu: &CpuState, space: Option<&FlatSpace>, last: LastFault) -> Raised {
    let error = u64::from(fault.error_code().unwrap_or(0));
    let rip = cpu.rip;
    let (sig, si_code, addr) = match fault {
        Fault::De => (libc::SIGFPE, code::FPE_INTDIV, rip),
        Fault::Db(dr6) => (libc::SIGTRAP, debug_code(dr6), rip),
        Fault::Bp => (libc::SIGTRAP, code::SI_KERNEL, 0),
        Fault::Ud => (libc::SIGILL, code::ILL_ILLOPN, rip),
        Fault::Np(_) | Fault::Ss(_) => (libc::SIGBUS, code::SI_KERNEL, 0),
        Fault::Pf { addr, code } => return page_fault(addr, code, space),
        Fault::Mf => (libc::SIGFPE, float_code(u32::from(cpu.xsave.fsw() & !cpu.xsave.fcw())), rip),
        Fault::Xm => (libc::SIGFPE, float_code(cpu.xsave.mxcsr() & !(cpu.xsave.mxcsr() >> 7)), rip),
        Fault::Ac => (libc::SIGBUS, code::BUS_ADRALN, 0),
        _ => (libc::SIGSEGV, code::SI_KERNEL, 0),
    };
    let last = LastFault { trapno: u64::from(fault.vector()), error, ..last };
    Raised { sig, info: siginfo(sig, si_code, addr), last }
}

/// Bits 3:0 of DR6: breakpoints; bit 14: single step; none: INT1.
fn debug_code(dr6: u64) -> i32 {
    if dr6 & 1 << 14 != 0 {
        code::TRAP_TRACE
    } else if dr6 & 0xf != 0 {
        code::TRAP_HWBKPT
    } else {
        code::TRAP_BRKPT
    }
}

/// Of several unmasked exceptions the first in this order (fpu__exception_code).
fn float_code(flags: u32) -> i32 {
    match flags {
        f if f & 1 != 0 => code::FPE_FLTINV,
        f if f & 4 != 0 => code::FPE_FLTDIV,
        f if f & 8 != 0 => code::FPE_FLTOVF,
        f if f & 0x12 != 0 => code::FPE_FLTUND,
        f if f & 0x20 != 0 => code::FPE_FLTRES,
        _ => 0,
    }
}

fn page_fault(addr: u64, pf: u16, space: Option<&FlatSpace>) -> Raised {
    let vma = space.and_then(|s| s.find(addr));
    let (sig, si_code, present) = match vma {
        None => (libc::SIGSEGV, code::SEGV_MAPERR, addr >= USER_END),
        Some(v) => {
            let needed = if pf & PF_I != 0 {
                Prot::EXEC
            } else if pf & PF_W != 0 {
                Prot::WRITE
            } else {
                // Any right makes a page readable on x86.
                v.prot & Prot::all()
            };
            if needed.is_empty() || !v.prot.contains(needed) {
                // A page without rights is not present for the processor.
                (libc::SIGSEGV, code::SEGV_ACCERR, !v.prot.is_empty())
            } else {
                // Allowed and yet not there: past the end of the file.
                (libc::SIGBUS, code::BUS_ADRERR, false)
            }
        }
    };
    let error = pf & !PF_P | PF_U | if present { PF_P } else { 0 };
    Raised {
        sig,
        info: siginfo(sig, si_code, addr),
        last: LastFault { trapno: 14, error: u64::from(error), cr2: addr },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::Vma;

    fn signal_of(fault: Fault, cpu: &CpuState) -> (i32, i32, u64, LastFault) {
        let space = FlatSpace::new();
        for (start, prot) in [(0x1000, Prot::READ), (0x2000, Prot::empty()), (0x3000, Prot::READ | Prot::WRITE)] {
            space.insert(Vma {
                start,
                end: start + 0x1000,
                prot,
                shared: false,
                name: "".into(),
                offset: 0,
                backing: None,
            });
        }
        let r = raised(fault, cpu, Some(&space), LastFault { cr2: 7, ..LastFault::default() });
        let word = |at: usize| i32::from_le_bytes(r.info[at..at + 4].try_into().expect("4 bytes"));
        assert_eq!(word(0), r.sig);
        (r.sig, word(8), u64::from_le_bytes(r.info[16..24].try_into().expect("8 bytes")), r.last)
    }

    /// Signal, code, address, error code, CR2: seen on the real kernel.
    #[test]
    fn exceptions() {
        let mut cpu = CpuState::long64(3);
        cpu.rip = 0x99;
        let pf = |addr: u64, code: u16| Fault::Pf { addr, code };
        for (fault, sig, code, addr, error, cr2) in [
            (Fault::De, libc::SIGFPE, 1, 0x99, 0, 7),
            (Fault::Ud, libc::SIGILL, 2, 0x99, 0, 7),
            (Fault::Bp, libc::SIGTRAP, 0x80, 0, 0, 7),
            (Fault::Db(1 << 14), libc::SIGTRAP, 2, 0x99, 0, 7),
            (Fault::Db(0), libc::SIGTRAP, 1, 0x99, 0, 7),
            (Fault::Gp(0x40a), libc::SIGSEGV, 0x80, 0, 0x40a, 7),
            (Fault::Ss(0), libc::SIGBUS, 0x80, 0, 0, 7),
            (Fault::Ac, libc::SIGBUS, 1, 0, 0, 7),
            (pf(0x10, 4), libc::SIGSEGV, 1, 0x10, 4, 0x10),
            (pf(0x1010, 7), libc::SIGSEGV, 2, 0x1010, 7, 0x1010),
            (pf(0x1020, 0x15), libc::SIGSEGV, 2, 0x1020, 0x15, 0x1020),
            (pf(0x2000, 5), libc::SIGSEGV, 2, 0x2000, 4, 0x2000),
            (pf(0x3000, 5), libc::SIGBUS, 2, 0x3000, 4, 0x3000),
            (pf(0x7fff_ffff_f000, 4), libc::SIGSEGV, 1, 0x7fff_ffff_f000, 5, 0x7fff_ffff_f000),
        ] {
            let last = LastFault { trapno: u64::from(fault.vector()), error, cr2 };
            assert_eq!(signal_of(fault, &cpu), (sig, code, addr, last), "{fault:?}");
        }
    }

    /// The code of a floating-point signal is that of the first unmasked exception.
    #[test]
    fn floating_point_codes() {
        let mut cpu = CpuState::long64(3);
        for (flags, code) in [(1, 7), (4, 3), (8, 4), (0x10, 5), (2, 5), (0x20, 6), (0x25, 7)] {
            cpu.xsave.set_mxcsr(flags);
            assert_eq!(signal_of(Fault::Xm, &cpu).1, code);
            cpu.xsave.set_fcw(0x340);
            cpu.xsave.set_fsw(flags as u16);
            assert_eq!(signal_of(Fault::Mf, &cpu).1, code);
        }
    }
}
