//! RDMSR WRMSR: the registers that exist, and what may be written to them (SDM 4; APM 2 appendix A). Any other number is #GP(0).

use crate::cpu::cpuid::PHYSICAL_BITS;
use crate::cpu::msr::{K7_COUNTERS, MC_BANKS, MTRR_FIXED, MTRR_RANGES, Msrs, index};
use crate::cpu::{Cr0, Efer, Fault};
use crate::interp::access::is_canonical;
use crate::interp::sensitive::time::{read_tsc, set_edx_eax};
use crate::interp::{Exec, Step, Stop};
use crate::isa::{Gpr, Insn, Seg, Width};

const GP0: Fault = Fault::Gp(0);

/// Of IA32_APIC_BASE: x2APIC mode, enabled.
const X2APIC_MODE: u64 = 1 << 10;
const APIC_ENABLED: u64 = 1 << 11;

/// Of IA32_ARCH_CAPABILITIES: no loads ahead of the check of U/S. See
/// [`CpuModel::in_software`](crate::cpu::cpuid::CpuModel::in_software).
const RDCL_NO: u64 = 1;

/// IA32_MISC_ENABLE: performance monitoring, no BTS, no PEBS cannot be written.
const MISC_ENABLE_FIXED: u64 = 0x1880;

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
    let msr = &mut x.cpu.msr;
    Some(match n {
        index::TSC => read_tsc(x),
        index::TSC_ADJUST if x.env.cpu_model.offers("tsc_adjust") => msr.tsc_adjust,
        index::APIC_BASE => msr.apic_base,
        index::BIOS_SIGN_ID => 0,
        index::SYSENTER_CS => msr.sysenter_cs,
        index::SYSENTER_ESP => msr.sysenter_esp,
        index::SYSENTER_EIP => msr.sysenter_eip,
        index::MCG_CAP => u64::from(MC_BANKS),
        index::MISC_ENABLE => msr.misc_enable,
        index::EFER => x.cpu.efer.bits(),
        index::STAR => msr.star,
        index::LSTAR => msr.lstar,
        index::CSTAR => msr.cstar,
        index::FMASK => msr.fmask,
        index::FS_BASE => x.cpu.segment(Seg::Fs).base,
        index::GS_BASE => x.cpu.segment(Seg::Gs).base,
        index::KERNEL_GS_BASE => msr.kernel_gs_base,
        index::TSC_AUX => msr.tsc_aux,
        // Fixed ranges, write combining, and so many variable ranges.
        index::MTRR_CAP => 0x500 | u64::from(MTRR_RANGES),
        index::ARCH_CAPABILITIES if x.env.cpu_model.offers("arch_capabilities") => RDCL_NO,
        index::TSC_DEADLINE if x.env.cpu_model.offers("tsc_deadline_timer") => {
            let at = x.bus.read_msr(n)?;
            if at == 0 { 0 } else { at.wrapping_add(msr.tsc_offset) }
        }
        n if is_x2apic(n) && msr.apic_base & X2APIC_MODE != 0 => x.bus.read_msr(n)?,
        n => match stored(msr, n) {
            Some(slot) => *slot,
            None => constant(n, x.env.cpu_model.is_intel())?,
        },
    })
}

/// What a CPU without power management, thermal sensors or firmware to configure says.
fn constant(n: u32, intel: bool) -> Option<u64> {
    Some(match n {
        // IA32_PLATFORM_ID, EBL_CR_POWERON, MSR_SMI_COUNT, IA32_BIOS_UPDT_TRIG, MSR_PLATFORM_INFO, last branches (AMD too).
        0x17 | 0x2a | 0x34 | 0xce if intel => 0,
        // IA32_FEATURE_CONTROL: locked, without VMX.
        0x3a if intel => 1,
        // IA32_CLOCK_MODULATION, IA32_THERM_INTERRUPT, IA32_THERM_STATUS, MSR_THERM2_CTL; IA32_ENERGY_PERF_BIAS.
        0x19a..=0x19d | 0x1b0 if intel => 0,
        // MSR_TEMPERATURE_TARGET: 100 degrees.
        0x1a2 if intel => 100 << 16,
        0x1db..=0x1de => 0,
        // VM_CR: SVM disabled and locked.
        0xc001_0114 if !intel => 0x18,
        _ => return None,
    })
}

/// Registers of which nothing is known here but what was written, with few checks: memory types, machine checks, performance counters.
fn stored(msr: &mut Msrs, n: u32) -> Option<&mut u64> {
    let within = |first: u32, count: u32| n.checked_sub(first).filter(|i| *i < count).map(|i| i as usize);
    match n {
        index::PAT => Some(&mut msr.pat),
        index::DEBUGCTL => Some(&mut msr.debugctl),
        index::MTRR_DEF_TYPE => Some(&mut msr.mtrr_def_type),
        index::MCG_STATUS => Some(&mut msr.mcg_status),
        0xc001_0010 => Some(&mut msr.amd[0]),
        0xc001_0015 => Some(&mut msr.amd[1]),
        0xc001_1029 => Some(&mut msr.amd[2]),
        // Linux sets a bit of it on every processor of AMD's (arch/x86/pci/amd_bus.c).
        0xc001_001f => Some(&mut msr.amd[3]),
        _ => {
            if let Some(i) = within(index::MTRR_VARIABLE, 2 * MTRR_RANGES) {
                msr.mtrr_variable.get_mut(i)
            } else if let Some(i) = within(index::MC_BANKS, 4 * MC_BANKS) {
                msr.mc.get_mut(i)
            } else if let Some(i) = within(0xc001_0000, 2 * K7_COUNTERS) {
                msr.k7_counters.get_mut(i)
            } else {
                let i = MTRR_FIXED.iter().position(|f| *f == n)?;
                msr.mtrr_fixed.get_mut(i)
            }
        }
    }
}

/// SDM 3A 10.12.1: the registers of a local APIC in x2APIC mode.
fn is_x2apic(n: u32) -> bool {
    (index::X2APIC..index::X2APIC + 0x100).contains(&n)
}

fn write(x: &mut Exec<'_>, n: u32, v: u64) -> Step {
    match n {
        index::TSC => {
            // The counter goes on from the written value. "IA32_TSC_ADJUST" moves by as much (SDM 3B 17.17.3).
            let moved = v.wrapping_sub(read_tsc(x));
            x.cpu.msr.tsc_offset = x.cpu.msr.tsc_offset.wrapping_add(moved);
            x.cpu.msr.tsc_adjust = x.cpu.msr.tsc_adjust.wrapping_add(moved);
        }
        index::TSC_ADJUST if x.env.cpu_model.offers("tsc_adjust") => {
            let moved = v.wrapping_sub(x.cpu.msr.tsc_adjust);
            x.cpu.msr.tsc_offset = x.cpu.msr.tsc_offset.wrapping_add(moved);
            x.cpu.msr.tsc_adjust = v;
        }
        index::APIC_BASE => {
            x.cpu.msr.apic_base = apic_base(x, v)?;
            // A board without a local APIC has nothing to do with it.
            let _ = x.bus.write_msr(n, v);
        }
        // Software writes 0 before it reads the microcode's revision. IA32_BIOS_UPDT_TRIG and AMD's patch loader: no microcode is loaded.
        index::BIOS_SIGN_ID | 0x79 => {}
        0xc001_0020 if !x.env.cpu_model.is_intel() => {}
        index::SYSENTER_CS => x.cpu.msr.sysenter_cs = Width::D.cut(v),
        index::SYSENTER_ESP => x.cpu.msr.sysenter_esp = canonical(x, v)?,
        index::SYSENTER_EIP => x.cpu.msr.sysenter_eip = canonical(x, v)?,
        index::MISC_ENABLE => {
            x.cpu.msr.misc_enable = v & !MISC_ENABLE_FIXED | x.cpu.msr.misc_enable & MISC_ENABLE_FIXED;
        }
        index::EFER => write_efer(x, v)?,
        index::STAR => x.cpu.msr.star = v,
        index::LSTAR => x.cpu.msr.lstar = canonical(x, v)?,
        index::CSTAR => x.cpu.msr.cstar = canonical(x, v)?,
        index::FMASK => x.cpu.msr.fmask = low_half(v)?,
        index::FS_BASE => x.cpu.seg[Seg::Fs as usize].base = canonical(x, v)?,
        index::GS_BASE => x.cpu.seg[Seg::Gs as usize].base = canonical(x, v)?,
        index::KERNEL_GS_BASE => x.cpu.msr.kernel_gs_base = canonical(x, v)?,
        index::TSC_AUX => x.cpu.msr.tsc_aux = low_half(v)?,
        index::TSC_DEADLINE if x.env.cpu_model.offers("tsc_deadline_timer") => {
            // 0 disarms; no other deadline may become 0 on the way to the host's counter.
            let at = if v == 0 { 0 } else { v.wrapping_sub(x.cpu.msr.tsc_offset).max(1) };
            x.bus.write_msr(n, at).ok_or(GP0)?;
        }
        n if is_x2apic(n) && x.cpu.msr.apic_base & X2APIC_MODE != 0 => x.bus.write_msr(n, v).ok_or(GP0)?,
        n => {
            let slot = stored(&mut x.cpu.msr, n).ok_or(GP0)?;
            *slot = storable(n, v)?;
        }
    }
    Ok(())
}

/// What is kept of a value written to one of the [`stored`] registers: "If the value ... sets bits that are reserved": #GP(0).
fn storable(n: u32, v: u64) -> Result<u64, Stop> {
    let physical = (1u64 << PHYSICAL_BITS) - 1;
    let types = |v: u64| v.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4 | 5 | 6));
    let ok = match n {
        index::PAT => return pat(v),
        // LBR and BTF; the rest needs a performance monitor.
        index::DEBUGCTL => v & !3 == 0,
        // SDM 3A 11.11.2.1: type, FE, E.
        index::MTRR_DEF_TYPE => v & !0xcff == 0 && types(v & 0xff),
        index::MCG_STATUS => v & !7 == 0,
        n if MTRR_FIXED.contains(&n) => types(v),
        // SDM 3A 11.11.2.3: base and type; mask and valid.
        n if n & !0xf == index::MTRR_VARIABLE => {
            let allowed = physical & !0xfff | if n & 1 == 0 { 0xff } else { 0x800 };
            v & !allowed == 0 && (n & 1 != 0 || types(v & 0xff))
        }
        n if (index::MC_BANKS..index::MC_BANKS + 4 * MC_BANKS).contains(&n) => match n & 3 {
            // SDM 3B 15.3.2: all ones or all zeros; a status can only be cleared.
            0 => v == 0 || v == u64::MAX,
            1 => v == 0,
            _ => true,
        },
        _ => true,
    };
    if ok { Ok(v) } else { Err(GP0.into()) }
}

/// "If the value ... is non-canonical (and the MSR holds a linear address)": #GP(0).
fn canonical(x: &Exec<'_>, v: u64) -> Result<u64, Stop> {
    if is_canonical(x.cpu, v) { Ok(v) } else { Err(GP0.into()) }
}

/// Bits 63:32 are reserved: #GP(0).
fn low_half(v: u64) -> Result<u64, Stop> {
    if v >> 32 == 0 { Ok(v) } else { Err(GP0.into()) }
}

/// SDM 3A 11.12.2: each byte a memory type, of which 2, 3 and above 7 are reserved: #GP(0).
fn pat(v: u64) -> Result<u64, Stop> {
    if v.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7)) { Ok(v) } else { Err(GP0.into()) }
}

/// SDM 3A 10.4.4, 10.12.5: base, enabled (11), x2APIC mode (10) if there is one, boot processor (8). From xAPIC mode there are ways to
/// x2APIC mode and to disabled, from there only to disabled, and from disabled only to xAPIC mode: else #GP(0).
fn apic_base(x: &Exec<'_>, v: u64) -> Result<u64, Stop> {
    let base = (1u64 << PHYSICAL_BITS) - 0x1000;
    let mode = X2APIC_MODE | APIC_ENABLED;
    let both = if x.env.cpu_model.offers("x2apic") { mode } else { APIC_ENABLED };
    let (from, to) = (x.cpu.msr.apic_base & mode, v & mode);
    let allowed = to != X2APIC_MODE && !(from == mode && to == APIC_ENABLED) && !(from == 0 && to == mode);
    if v & !(base | both | 1 << 8) == 0 && allowed { Ok(v) } else { Err(GP0.into()) }
}

fn write_efer(x: &mut Exec<'_>, v: u64) -> Step {
    let new = Efer::from_bits_retain(v);
    // "If the source register sets bits that are reserved in the MSR": #GP(0). LMA is read-only: what is written to it is ignored.
    if !(new - (Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE)).is_empty() {
        return Err(GP0.into());
    }
    let old = x.cpu.efer;
    // SDM 3A 9.8.5: "If software attempts to change IA32_EFER.LME while paging is enabled": #GP(0).
    if (old ^ new).contains(Efer::LME) && x.cpu.cr0.contains(Cr0::PG) {
        return Err(GP0.into());
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
    use crate::cpu::cpuid::CpuModel;
    use crate::interp::Interpreter;
    use crate::interp::sensitive::testing::machine;
    use crate::vcpu::{Exit, Intercepts, Vcpu};
    use std::sync::Arc;

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
        // x2APIC mode only from xAPIC mode.
        assert_eq!(write_read(index::APIC_BASE, 0xfee0_0400), Err(GP));
        assert_eq!(write_read(0xdead_beef, 0), Err(GP));
        // MTRRs: reserved types and bits; the capabilities cannot be written.
        assert_eq!(write_read(0x250, 0x0606_0606_0606_0606), Ok(0x0606_0606_0606_0606));
        assert_eq!(write_read(0x250, 0x0206_0606_0606_0606), Err(GP));
        assert_eq!(write_read(index::MTRR_DEF_TYPE, 0xc06), Ok(0xc06));
        assert_eq!(write_read(index::MTRR_DEF_TYPE, 0x1c06), Err(GP));
        assert_eq!(write_read(index::MTRR_VARIABLE, 0xc000_0000), Ok(0xc000_0000));
        assert_eq!(write_read(index::MTRR_VARIABLE + 1, 0xffff_c000_0800), Ok(0xffff_c000_0800));
        assert_eq!(write_read(index::MTRR_VARIABLE + 1, 0xffff_c000_0801), Err(GP));
        assert_eq!(write_read(index::MTRR_VARIABLE + 16, 0), Err(GP));
        assert_eq!(write_read(index::MTRR_CAP, 0), Err(GP));
        // Machine-check banks: all ones or zeros, a status is only cleared, and there are four.
        assert_eq!(write_read(index::MC_BANKS, u64::MAX), Ok(u64::MAX));
        assert_eq!(write_read(index::MC_BANKS, 1), Err(GP));
        assert_eq!(write_read(index::MC_BANKS + 1, 1), Err(GP));
        assert_eq!(write_read(index::MC_BANKS + 2, 1), Ok(1));
        assert_eq!(write_read(index::MC_BANKS + 16, 0), Err(GP));
        assert_eq!(write_read(index::MISC_ENABLE, 0x4_00c5_1889), Ok(0x4_00c5_0009));
        assert_eq!(write_read(0, 0), Err(GP));
        // What AMD's processors have and Linux writes: kept.
        for n in [0xc001_0010, 0xc001_0015, 0xc001_1029, 0xc001_001f] {
            assert_eq!(write_read(n, 1 << 46), Ok(1 << 46), "{n:#x}");
        }
    }

    /// SDM 4: only to be read, and only where CPUID says so.
    #[test]
    fn architectural_capabilities_follow_the_model() {
        for model in [CpuModel::host(), CpuModel::host().in_software()] {
            let offered = model.offers("arch_capabilities");
            for (write, exit) in [(false, if offered { Exit::Budget } else { GP }), (true, GP)] {
                let mut m = machine(0, &[0x0f, if write { 0x30 } else { 0x32 }]);
                m.vcpu = Interpreter::new(Arc::new(model.clone()));
                m.vcpu.set_intercepts(Intercepts::EXCEPTIONS);
                *m.vcpu.state() = machine(0, &[]).cpu().clone();
                m.cpu().gpr[Gpr::Rcx as usize] = u64::from(index::ARCH_CAPABILITIES);
                assert_eq!(m.run(1), exit, "{offered} {write}");
                if exit == Exit::Budget {
                    assert_eq!(m.cpu().gpr[Gpr::Rax as usize], RDCL_NO);
                    assert_eq!(m.cpu().gpr[Gpr::Rdx as usize], 0);
                }
            }
        }
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
