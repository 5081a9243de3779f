//! RDMSR WRMSR: the registers that exist, and what may be written to them (SDM 4; APM 2 appendix A). Any other number is #GP(0).

use crate::cpu::msr::index;
use crate::cpu::{Cr0, Efer, Fault};
use crate::interp::access::is_canonical;
use crate::interp::sensitive::time::{read_tsc, set_edx_eax};
use crate::interp::{Exec, Step, Stop};
use crate::isa::{Gpr, Insn, Seg, Width};

const GP0: Stop = Stop::Fault(Fault::Gp(0));

/// IA32_BIOS_SIGN_ID, AMD's patch level: no microcode was loaded.
const BIOS_SIGN_ID: u32 = 0x8b;

/// The model-specific register that ECX names.
fn number(x: &Exec<'_>) -> u32 {
    x.cpu.read(Gpr::Rcx, Width::D) as u32
}

/// RDMSR.
pub fn rdmsr(x: &mut Exec<'_>, _: &Insn) -> Step {
    let n = number(x);
    // "If the value in ECX specifies a reserved or unimplemented MSR address": #GP(0).
    let v = read(x, n).ok_or(GP0)?;
    set_edx_eax(x, v);
    Ok(())
}

/// WRMSR.
pub fn wrmsr(x: &mut Exec<'_>, _: &Insn) -> Step {
    let n = number(x);
    let v = x.cpu.read(Gpr::Rax, Width::D) | x.cpu.read(Gpr::Rdx, Width::D) << 32;
    write(x, n, v)
}

/// The value of an MSR; `None` if there is none of that number.
fn read(x: &mut Exec<'_>, n: u32) -> Option<u64> {
    let msr = &x.cpu.msr;
    Some(match n {
        index::TSC => read_tsc(x),
        index::APIC_BASE => msr.apic_base,
        BIOS_SIGN_ID => 0,
        index::SYSENTER_CS => msr.sysenter_cs,
        index::SYSENTER_ESP => msr.sysenter_esp,
        index::SYSENTER_EIP => msr.sysenter_eip,
        index::MISC_ENABLE => msr.misc_enable,
        index::PAT => msr.pat,
        index::EFER => x.cpu.efer.bits(),
        index::STAR => msr.star,
        index::LSTAR => msr.lstar,
        index::CSTAR => msr.cstar,
        index::FMASK => msr.fmask,
        index::FS_BASE => x.cpu.segment(Seg::Fs).base,
        index::GS_BASE => x.cpu.segment(Seg::Gs).base,
        index::KERNEL_GS_BASE => msr.kernel_gs_base,
        index::TSC_AUX => msr.tsc_aux,
        _ => return None,
    })
}

fn write(x: &mut Exec<'_>, n: u32, v: u64) -> Step {
    match n {
        index::TSC => {
            // The counter goes on from the written value.
            let host = x.env.time.tsc();
            x.cpu.msr.tsc_offset = v.wrapping_sub(host);
        }
        index::APIC_BASE => x.cpu.msr.apic_base = apic_base(v)?,
        // Software writes 0 before it reads the microcode's revision.
        BIOS_SIGN_ID => {}
        index::SYSENTER_CS => x.cpu.msr.sysenter_cs = Width::D.cut(v),
        index::SYSENTER_ESP => x.cpu.msr.sysenter_esp = canonical(x, v)?,
        index::SYSENTER_EIP => x.cpu.msr.sysenter_eip = canonical(x, v)?,
        index::MISC_ENABLE => x.cpu.msr.misc_enable = v,
        index::PAT => x.cpu.msr.pat = pat(v)?,
        index::EFER => write_efer(x, v)?,
        index::STAR => x.cpu.msr.star = v,
        index::LSTAR => x.cpu.msr.lstar = canonical(x, v)?,
        index::CSTAR => x.cpu.msr.cstar = canonical(x, v)?,
        index::FMASK => x.cpu.msr.fmask = low_half(v)?,
        index::FS_BASE => x.cpu.seg[Seg::Fs as usize].base = canonical(x, v)?,
        index::GS_BASE => x.cpu.seg[Seg::Gs as usize].base = canonical(x, v)?,
        index::KERNEL_GS_BASE => x.cpu.msr.kernel_gs_base = canonical(x, v)?,
        index::TSC_AUX => x.cpu.msr.tsc_aux = low_half(v)?,
        _ => return Err(GP0),
    }
    Ok(())
}

/// "If the value ... is non-canonical (and the MSR holds a linear address)": #GP(0).
fn canonical(x: &Exec<'_>, v: u64) -> Result<u64, Stop> {
    if is_canonical(x.cpu, v) { Ok(v) } else { Err(GP0) }
}

/// Bits 63:32 are reserved: #GP(0).
fn low_half(v: u64) -> Result<u64, Stop> {
    if v >> 32 == 0 { Ok(v) } else { Err(GP0) }
}

/// SDM 3A 11.12.2: each byte a memory type, of which 2, 3 and above 7 are reserved: #GP(0).
fn pat(v: u64) -> Result<u64, Stop> {
    if v.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7)) { Ok(v) } else { Err(GP0) }
}

/// SDM 3A 10.4.4: enable (11), boot processor (8), base; no x2APIC is offered, so bit 10 is reserved too: #GP(0).
fn apic_base(v: u64) -> Result<u64, Stop> {
    let base = (1u64 << crate::cpu::cpuid::PHYSICAL_BITS) - 0x1000;
    if v & !(base | 1 << 11 | 1 << 8) == 0 { Ok(v) } else { Err(GP0) }
}

fn write_efer(x: &mut Exec<'_>, v: u64) -> Step {
    let new = Efer::from_bits_retain(v);
    // "If the source register sets bits that are reserved in the MSR": #GP(0). LMA is read-only: what is written to it is ignored.
    if !(new - (Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE)).is_empty() {
        return Err(GP0);
    }
    let old = x.cpu.efer;
    // SDM 3A 9.8.5: "If software attempts to change IA32_EFER.LME while paging is enabled": #GP(0).
    if (old ^ new).contains(Efer::LME) && x.cpu.cr0.contains(Cr0::PG) {
        return Err(GP0);
    }
    x.cpu.efer = (new - Efer::LMA) | (old & Efer::LMA);
    if (old ^ new).contains(Efer::NXE) {
        x.mmu.flush();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interp::sensitive::testing::machine;
    use crate::vcpu::Exit;

    const GP: Exit = Exit::Exception(Fault::Gp(0));

    /// WRMSR; RDMSR: what is written comes back, or the fault.
    fn write_read(n: u32, v: u64) -> Result<u64, Exit> {
        let mut m = machine(0, &[0x0f, 0x30, 0x0f, 0x32]);
        // Upper halves are ignored and cleared.
        m.cpu().gpr[Gpr::Rcx as usize] = 0xffff_ffff_0000_0000 | u64::from(n);
        m.cpu().gpr[Gpr::Rax as usize] = 0xffff_ffff_0000_0000 | v & 0xffff_ffff;
        m.cpu().gpr[Gpr::Rdx as usize] = 0xffff_ffff_0000_0000 | v >> 32;
        for _ in 0..2 {
            match m.run(1) {
                Exit::Budget => {}
                exit => return Err(exit),
            }
        }
        Ok(m.cpu().gpr[Gpr::Rax as usize] | m.cpu().gpr[Gpr::Rdx as usize] << 32)
    }

    #[test]
    fn values_and_checks() {
        const HIGH: u64 = 0xffff_8000_1234_5678;
        const BAD: u64 = 0x0000_8000_0000_0000;
        for n in [
            index::LSTAR,
            index::CSTAR,
            index::FS_BASE,
            index::GS_BASE,
            index::KERNEL_GS_BASE,
            index::SYSENTER_ESP,
            index::SYSENTER_EIP,
        ] {
            assert_eq!(write_read(n, HIGH), Ok(HIGH), "{n:#x}");
            assert_eq!(write_read(n, BAD), Err(GP), "{n:#x}");
        }
        assert_eq!(write_read(index::STAR, BAD), Ok(BAD));
        for n in [index::FMASK, index::TSC_AUX] {
            assert_eq!(write_read(n, 0xffff_ffff), Ok(0xffff_ffff), "{n:#x}");
            assert_eq!(write_read(n, 1 << 32), Err(GP), "{n:#x}");
        }
        assert_eq!(write_read(index::PAT, 0x0007_0406_0501_0000), Ok(0x0007_0406_0501_0000));
        for bad in [2, 3 << 8, 8 << 56] {
            assert_eq!(write_read(index::PAT, bad), Err(GP), "{bad:#x}");
        }
        assert_eq!(write_read(index::APIC_BASE, 0xfee0_0900), Ok(0xfee0_0900));
        assert_eq!(write_read(index::APIC_BASE, 0xfee0_0c00), Err(GP));
        assert_eq!(write_read(0xdead_beef, 0), Err(GP));
        assert_eq!(write_read(0, 0), Err(GP));
    }

    #[test]
    fn efer() {
        let now = (Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE).bits();
        assert_eq!(write_read(index::EFER, now & !1), Ok(now & !1));
        // LMA is read-only, LME is fixed while paging is on, the rest is reserved.
        assert_eq!(write_read(index::EFER, now & !Efer::LMA.bits()), Ok(now));
        assert_eq!(write_read(index::EFER, now & !Efer::LME.bits()), Err(GP));
        assert_eq!(write_read(index::EFER, now | 1 << 1), Err(GP));
        assert_eq!(write_read(index::EFER, now | 1 << 12), Err(GP));
    }

    #[test]
    fn the_counter_goes_on_from_what_is_written() {
        let v = write_read(index::TSC, 1 << 60).expect("exists");
        assert!((1 << 60..(1 << 60) + (1 << 40)).contains(&v), "{v:#x}");
    }
}
