//! What is decided about an instruction before its function is called: privilege and intercepts, each in this one place
//! (SDM 2, "Exceptions" of each instruction; APM 2 15.9).

use crate::cpu::{CpuState, Cr0, Cr4, Efer, Fault, Rflags};
use crate::interp::access::is_long64;
use crate::interp::{Exec, Step, Stop};
use crate::isa::{Facts, Insn, Privilege};
use crate::vcpu::{Exit, Intercepts};
use iced_x86::Mnemonic as M;

/// Does [`before`] have anything to ask about the instruction? Known once it is decoded.
pub fn needed(i: &Insn) -> bool {
    !matches!(i.facts.privilege, Privilege::Anyone | Privilege::Iopl) || intercept_of(i.iced.mnemonic()).is_some()
}

/// Privilege first, then the intercept.
///
/// # Errors
/// #GP(0) or #UD; [`Exit::Intercept`].
pub fn before(x: &Exec<'_>, i: &Insn) -> Step {
    privilege(x, i)?;
    intercept(x, i)
}

fn privilege(x: &Exec<'_>, i: &Insn) -> Result<(), Fault> {
    let cpu: &CpuState = x.cpu;
    let Facts { privilege, .. } = *i.facts;
    let cpl = cpu.cpl();
    // In real and virtual-8086 mode these are not recognized, whatever the privilege: their functions say so.
    if cpu.mode().is_real_like() && matches!(i.iced.mnemonic(), M::Lldt | M::Ltr | M::Sldt | M::Str) {
        return Ok(());
    }
    let allowed = match privilege {
        Privilege::Anyone => true,
        // VME, PVI and the I/O permission map may still allow it: the functions decide.
        Privilege::Iopl => true,
        Privilege::Cpl0 => cpl == 0,
        Privilege::Cpl0OrUd if cpl != 0 => return Err(Fault::Ud),
        Privilege::Cpl0OrUd => true,
        Privilege::Cr4Umip => cpl == 0 || !cpu.cr4.contains(Cr4::UMIP),
        Privilege::Cr4Tsd => cpl == 0 || !cpu.cr4.contains(Cr4::TSD),
        Privilege::Cr4Pce => cpl == 0 || cpu.cr4.contains(Cr4::PCE) || !cpu.cr0.contains(Cr0::PE),
    };
    match allowed {
        true => Ok(()),
        false if is_undefined(x, i) => Err(Fault::Ud),
        false => Err(Fault::Gp(0)),
    }
}

/// Is a privileged instruction #UD before its privilege is looked at? Its function says so too, for CPL 0.
#[cold]
fn is_undefined(x: &Exec<'_>, i: &Insn) -> bool {
    let cpu: &CpuState = x.cpu;
    match i.iced.mnemonic() {
        // Intel's processors know it in 64-bit code only, whatever the CPL (seen on Raptor Cove).
        M::Sysret | M::Sysretq if x.env.cpu_model.is_intel() && !is_long64(cpu) => true,
        M::Sysret | M::Sysretq => !cpu.efer.contains(Efer::SCE),
        M::Xsetbv => !cpu.cr4.contains(Cr4::OSXSAVE),
        M::Mov => crate::interp::sensitive::control::names_no_register(cpu, i),
        _ => false,
    }
}

fn intercept_of(m: M) -> Option<Intercepts> {
    Some(match m {
        M::Syscall => Intercepts::SYSCALL,
        M::Sysenter => Intercepts::SYSENTER,
        M::Int | M::Int1 | M::Int3 | M::Into => Intercepts::INT_N,
        M::Hlt => Intercepts::HLT,
        M::Cpuid => Intercepts::CPUID,
        M::Rdtsc | M::Rdtscp => Intercepts::RDTSC,
        M::Rdrand | M::Rdseed => Intercepts::RDRAND,
        _ => return None,
    })
}

fn intercept(x: &Exec<'_>, i: &Insn) -> Step {
    let m = i.iced.mnemonic();
    let Some(what) = intercept_of(m).filter(|w| x.intercepts.contains(*w)) else { return Ok(()) };
    let vector = match m {
        M::Int => i.iced.immediate8(),
        M::Int1 => 1,
        M::Int3 => 3,
        M::Into if !x.cpu.rflags.contains(Rflags::OF) => return Ok(()),
        M::Into => 4,
        // Not enabled: the function raises #UD.
        M::Syscall if !x.cpu.efer.contains(Efer::SCE) => return Ok(()),
        _ => 0,
    };
    Err(Stop::exit(Exit::Intercept { what, next_rip: x.next_rip, vector }))
}

#[cfg(test)]
mod tests {
    use crate::cpu::Fault;
    use crate::interp::testing::{CODE, Machine};
    use crate::vcpu::{Exit, Intercepts, Vcpu};

    #[test]
    fn privilege_before_intercept() {
        let mut m = Machine::long64(3, &[0xf4]);
        m.vcpu.set_intercepts(Intercepts::EXCEPTIONS | Intercepts::HLT);
        assert_eq!(m.run(1), Exit::Exception(Fault::Gp(0)));
        let mut m = Machine::long64(0, &[0xf4]);
        m.vcpu.set_intercepts(Intercepts::EXCEPTIONS | Intercepts::HLT);
        assert_eq!(m.run(1), Exit::Intercept { what: Intercepts::HLT, next_rip: CODE + 1, vector: 0 });
        assert_eq!(m.cpu().rip, CODE);
    }

    #[test]
    fn intercepts_tell_the_vector() {
        for (code, what, len, vector) in [
            (&[0xcd, 0x80][..], Intercepts::INT_N, 2, 0x80),
            (&[0xcc], Intercepts::INT_N, 1, 3),
            (&[0xf1], Intercepts::INT_N, 1, 1),
            (&[0x0f, 0x05], Intercepts::SYSCALL, 2, 0),
            (&[0x0f, 0xa2], Intercepts::CPUID, 2, 0),
            (&[0x0f, 0x31], Intercepts::RDTSC, 2, 0),
        ] {
            let mut m = Machine::long64(3, code);
            m.vcpu.set_intercepts(Intercepts::EXCEPTIONS | what);
            assert_eq!(m.run(1), Exit::Intercept { what, next_rip: CODE + len, vector }, "{code:x?}");
        }
    }

    #[test]
    fn the_rights_that_cr4_gives() {
        use crate::cpu::Cr4;
        // smsw eax; rdtsc; rdpmc at CPL 3: the bit and the value of it that refuses
        for (code, bit, refused) in [
            (&[0x0f, 0x01, 0xe0][..], Cr4::UMIP, true),
            (&[0x0f, 0x31], Cr4::TSD, true),
            (&[0x0f, 0x33], Cr4::PCE, false),
        ] {
            let mut m = Machine::long64(3, code);
            m.cpu().cr4.set(bit, refused);
            assert_eq!(m.run(1), Exit::Exception(Fault::Gp(0)), "{code:x?}");
        }
    }
}
