//! MOV to and from control and debug registers, LMSW SMSW CLTS, INVLPG INVPCID WBINVD INVD WBNOINVD, XSETBV XGETBV, STAC CLAC
//! (SDM 2A-2D; SDM 3A 2.5, 2.6, 4.10.4, 9.8.5).

use crate::cpu::cpuid::PHYSICAL_BITS;
use crate::cpu::xsave::component;
use crate::cpu::{Attr, CpuState, Cr0, Cr4, Efer, Fault, Rflags};
use crate::interp::access::{self, is_canonical, is_long64};
use crate::interp::sensitive::time::set_edx_eax;
use crate::interp::{Exec, Step, Stop, native, operand};
use crate::isa::{Gpr, Insn, Seg, Width};
use crate::mem::{Access, paging};
use iced_x86::{OpKind, Register};

const GP0: Fault = Fault::Gp(0);

/// A control or debug register operand: its number.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Special {
    Cr(u32),
    Dr(u32),
}

fn special(i: &Insn, n: u32) -> Option<Special> {
    if i.iced.op_kind(n) != OpKind::Register {
        return None;
    }
    let r = i.iced.op_register(n);
    if r.is_cr() {
        Some(Special::Cr(r as u32 - Register::CR0 as u32))
    } else if r.is_dr() {
        Some(Special::Dr(r as u32 - Register::DR0 as u32))
    } else {
        None
    }
}

/// Does MOV CR or MOV DR name a register that is not there? That is #UD, at any CPL.
pub fn names_no_register(cpu: &CpuState, i: &Insn) -> bool {
    let absent = |s| match s {
        Special::Cr(n) => !matches!(n, 0 | 2 | 3 | 4 | 8),
        Special::Dr(n) => n > 7 || (matches!(n, 4 | 5) && cpu.cr4.contains(Cr4::DE)),
    };
    i.iced.has_lock_prefix() || special(i, 0).or(special(i, 1)).is_some_and(absent)
}

/// MOV CRn, r; MOV r, CRn; MOV DRn, r; MOV r, DRn.
pub fn mov(x: &mut Exec<'_>, i: &Insn) -> Step {
    // "If the LOCK prefix is used", "If an attempt is made to access CR1, CR5, CR6, CR7 or CR9-CR15", "If CR4.DE[bit 3] = 1 and a MOV
    // instruction is executed involving DR4 or DR5": #UD. (AMD's LOCK MOV CR0 for CR8 is not offered: CPUID 0x80000001.ECX[4] is clear.)
    if names_no_register(x.cpu, i) {
        return Err(Fault::Ud.into());
    }
    match (special(i, 0), special(i, 1)) {
        (Some(Special::Cr(n)), _) => {
            let v = operand::read(x, i, 1)?;
            write_cr(x, n, v)
        }
        (_, Some(Special::Cr(n))) => {
            let v = read_cr(x, n)?;
            operand::write(x, i, 0, v)
        }
        (Some(Special::Dr(n)), _) => {
            let n = check_dr(x.cpu, n)?;
            let v = operand::read(x, i, 1)?;
            write_dr(x, n, v)
        }
        (_, Some(Special::Dr(n))) => {
            let n = check_dr(x.cpu, n)?;
            let v = match n {
                6 => x.cpu.dr6,
                7 => x.cpu.dr7,
                _ => x.cpu.dr[n as usize & 3],
            };
            operand::write(x, i, 0, v)
        }
        _ => Err(Fault::Ud.into()),
    }
}

fn read_cr(x: &Exec<'_>, n: u32) -> Result<u64, Stop> {
    let cpu = &*x.cpu;
    match n {
        0 => Ok(cpu.cr0.bits()),
        2 => Ok(cpu.cr2),
        3 => Ok(cpu.cr3),
        4 => Ok(cpu.cr4.bits()),
        // SDM 3A 10.8.6: CR8 is the class in the local APIC's task priority.
        8 if is_long64(cpu) => Ok(x.bus.task_priority().map_or(cpu.cr8, u64::from)),
        _ => Err(Fault::Ud.into()),
    }
}

fn write_cr(x: &mut Exec<'_>, n: u32, v: u64) -> Step {
    match n {
        0 => write_cr0(x, v),
        2 => {
            x.cpu.cr2 = v;
            Ok(())
        }
        3 => write_cr3(x, v),
        4 => write_cr4(x, v),
        8 if is_long64(x.cpu) => {
            // "If an attempt is made to write a 1 to any reserved bit in CR8": #GP(0).
            if v > 15 {
                return Err(GP0.into());
            }
            x.cpu.cr8 = v;
            x.bus.set_task_priority(v as u8);
            Ok(())
        }
        _ => Err(Fault::Ud.into()),
    }
}

/// CR0 with all checks and the entry to and exit from IA-32e mode.
fn write_cr0(x: &mut Exec<'_>, v: u64) -> Step {
    // "If an attempt is made to write a 1 to CR0[63:32]": #GP(0). Reserved bits of the low half are dropped, ET stays set.
    if v >> 32 != 0 {
        return Err(GP0.into());
    }
    let old = x.cpu.cr0;
    let new = Cr0::from_bits_truncate(v) | Cr0::ET;
    let (paged, pages) = (old.contains(Cr0::PG), new.contains(Cr0::PG));
    // "invalid bit combinations are written to CR0 (such as setting the PG flag to 1 when the PE flag is set to 0, or setting the NW flag
    // to 1 when the CD flag is set to 0)": #GP(0).
    if (pages && !new.contains(Cr0::PE)) || (new.contains(Cr0::NW) && !new.contains(Cr0::CD)) {
        return Err(GP0.into());
    }
    if pages && !paged && x.cpu.efer.contains(Efer::LME) {
        // "attempting to activate IA-32e mode ... if PAE is not enabled", "if the current CS has the L-bit set", "if the TR references a
        // 16-bit TSS": #GP(0).
        let cs_long = x.cpu.segment(Seg::Cs).attr.contains(Attr::L) && old.contains(Cr0::PE);
        let tss16 = matches!(x.cpu.tr.attr.kind(), 1 | 3) && !x.cpu.tr.attr.contains(Attr::S);
        if !x.cpu.cr4.contains(Cr4::PAE) || cs_long || tss16 {
            return Err(GP0.into());
        }
    }
    if paged && !pages {
        // "If attempting to clear CR0.PG in 64-bit mode", "... when CR4.PCIDE = 1": #GP(0).
        if is_long64(x.cpu) || x.cpu.cr4.contains(Cr4::PCIDE) {
            return Err(GP0.into());
        }
    }
    if pages && !paged {
        check_pdptes(x, new, x.cpu.cr4, x.cpu.cr3)?;
    }
    x.cpu.cr0 = new;
    x.cpu.efer.set(Efer::LMA, pages && x.cpu.efer.contains(Efer::LME));
    if new.contains(Cr0::PE) && !old.contains(Cr0::PE) {
        // Protected mode begins at CPL 0.
        x.cpu.seg[Seg::Ss as usize].attr.remove(Attr::DPL);
    }
    if (old ^ new).intersects(Cr0::PG | Cr0::PE | Cr0::WP) {
        x.mmu.flush();
    }
    Ok(())
}

/// CR3: entries of the old address space are forgotten, unless bit 63 says to keep those of its PCID.
fn write_cr3(x: &mut Exec<'_>, v: u64) -> Step {
    let pcide = x.cpu.cr4.contains(Cr4::PCIDE);
    let keep = pcide && v >> 63 != 0;
    let v = if pcide { v & !(1 << 63) } else { v };
    // "If an attempt is made to write a 1 to any reserved bit in CR3[63:MAXPHYADDR]": #GP(0).
    if v >> PHYSICAL_BITS != 0 {
        return Err(GP0.into());
    }
    let same = x.cpu.cr3 == v;
    // The TLB has no PCID tags: only a reload of the same space may keep its entries.
    if keep && same {
        return Ok(());
    }
    load_cr3(x, v)
}

/// "If ... loading the PDPTEs ... and a reserved bit is set in any present PDPTE": #GP(0). AMD's processors look at them only in a walk.
fn check_pdptes(x: &Exec<'_>, cr0: Cr0, cr4: Cr4, cr3: u64) -> Step {
    let pae = cr0.contains(Cr0::PG) && cr4.contains(Cr4::PAE) && !x.cpu.efer.contains(Efer::LME);
    if pae && x.env.cpu_model.is_intel() && paging::bad_pdpte(x.cpu, x.mem, cr3) { Err(GP0.into()) } else { Ok(()) }
}

/// Makes `v` the root of the page tables: MOV to CR3 and task switches.
///
/// # Errors
/// #GP(0).
pub fn load_cr3(x: &mut Exec<'_>, v: u64) -> Step {
    check_pdptes(x, x.cpu.cr0, x.cpu.cr4, v)?;
    x.cpu.cr3 = v;
    x.mmu.flush_non_global();
    Ok(())
}

/// The bits of CR4 whose change makes cached translations wrong.
const CR4_PAGING: Cr4 = Cr4::PSE
    .union(Cr4::PAE)
    .union(Cr4::PGE)
    .union(Cr4::LA57)
    .union(Cr4::PCIDE)
    .union(Cr4::SMEP)
    .union(Cr4::SMAP)
    .union(Cr4::PKE);

fn write_cr4(x: &mut Exec<'_>, v: u64) -> Step {
    let old = x.cpu.cr4;
    let new = Cr4::from_bits_retain(v);
    // "If an attempt is made to write a 1 to any reserved bit in CR4": #GP(0).
    if !(new - x.env.cpu_model.cr4()).is_empty() {
        return Err(GP0.into());
    }
    if x.cpu.efer.contains(Efer::LMA) {
        // "If an attempt is made to clear CR4.PAE while IA-32e mode is active", "to change CR4.LA57": #GP(0).
        if !new.contains(Cr4::PAE) || (old ^ new).contains(Cr4::LA57) {
            return Err(GP0.into());
        }
    }
    if new.contains(Cr4::PCIDE) && !old.contains(Cr4::PCIDE) {
        // "If an attempt is made to change CR4.PCIDE from 0 to 1 while IA32_EFER.LMA = 0 or CR3[11:0] ≠ 000H": #GP(0).
        if !x.cpu.efer.contains(Efer::LMA) || x.cpu.cr3 & 0xfff != 0 {
            return Err(GP0.into());
        }
    }
    if (old ^ new).intersects(CR4_PAGING) {
        check_pdptes(x, x.cpu.cr0, new, x.cpu.cr3)?;
    }
    x.cpu.cr4 = new;
    if (old ^ new).intersects(CR4_PAGING) {
        x.mmu.flush();
    }
    Ok(())
}

/// DR4 and DR5 are DR6 and DR7; general detect makes every access #DB.
fn check_dr(cpu: &CpuState, n: u32) -> Result<u32, Fault> {
    const GD: u64 = 1 << 13;
    const BD: u64 = 1 << 13;
    // "If any debug register is accessed while the DR7.GD[bit 13] = 1": #DB.
    if cpu.dr7 & GD != 0 {
        return Err(Fault::Db(BD));
    }
    Ok(if matches!(n, 4 | 5) { n + 2 } else { n })
}

fn write_dr(x: &mut Exec<'_>, n: u32, v: u64) -> Step {
    if n < 4 {
        x.cpu.dr[n as usize] = v;
        return Ok(());
    }
    // "If an attempt is made to write a 1 to any of bits 63:32 in DR6 (DR7)": #GP(0).
    if v >> 32 != 0 {
        return Err(GP0.into());
    }
    // SDM 3B 17.2: the fixed bits of both.
    if n == 6 {
        x.cpu.dr6 = v & 0xe00f | 0xffff_0ff0;
    } else {
        x.cpu.dr7 = v & 0xffff_23ff | 0x400;
    }
    Ok(())
}

/// SMSW: a 16-bit register or memory gets CR0\[15:0\], a wider register as much of CR0 as fits.
pub fn smsw(x: &mut Exec<'_>, i: &Insn) -> Step {
    operand::write(x, i, 0, x.cpu.cr0.bits())
}

/// LMSW: PE MP EM TS; it can set PE and not clear it.
pub fn lmsw(x: &mut Exec<'_>, i: &Insn) -> Step {
    let v = operand::read(x, i, 0)?;
    let old = x.cpu.cr0.bits();
    write_cr0(x, (old & !0xe) | (v & 0xf))
}

/// CLTS.
pub fn clts(x: &mut Exec<'_>, _: &Insn) -> Step {
    x.cpu.cr0.remove(Cr0::TS);
    Ok(())
}

/// INVLPG: the address is not accessed and not checked; a non-canonical one has no page.
pub fn invlpg(x: &mut Exec<'_>, i: &Insn) -> Step {
    let m = i.mem().copied().ok_or(Fault::Ud)?;
    let offset = operand::effective_address(x, i, &m);
    let laddr = if is_long64(x.cpu) {
        let base = if matches!(m.seg, Seg::Fs | Seg::Gs) { x.cpu.segment(m.seg).base } else { 0 };
        base.wrapping_add(offset)
    } else {
        Width::D.cut(x.cpu.segment(m.seg).base.wrapping_add(offset))
    };
    x.mmu.flush_page(laddr);
    Ok(())
}

/// INVPCID (SDM 2A INVPCID, table of types).
pub fn invpcid(x: &mut Exec<'_>, i: &Insn) -> Step {
    let kind = operand::read(x, i, 0)?;
    let m = i.mem().copied().ok_or(Fault::Ud)?;
    let offset = operand::effective_address(x, i, &m);
    access::linear(x, m.seg, offset, 16, Access::Read)?;
    let mut descriptor = [0; 16];
    access::read_bytes(x, m.seg, offset, &mut descriptor)?;
    let (pcid, laddr) = descriptor.split_at(8);
    let word = |b: &[u8]| b.iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b));
    let (pcid, laddr) = (word(pcid), word(laddr));
    // "If an invalid type is specified (i.e., > 3)", "If bits 63:12 of INVPCID_DESC are not all zero": #GP(0).
    if kind > 3 || pcid >> 12 != 0 {
        return Err(GP0.into());
    }
    // "If INVPCID_TYPE is either 0 or 1, CR4.PCIDE = 0, and INVPCID_DESC[11:0] is not zero": #GP(0).
    if kind < 2 && !x.cpu.cr4.contains(Cr4::PCIDE) && pcid != 0 {
        return Err(GP0.into());
    }
    // "If INVPCID_TYPE is 0 and the linear address in INVPCID_DESC[127:64] is not canonical": #GP(0).
    if kind == 0 && !is_canonical(x.cpu, laddr) {
        return Err(GP0.into());
    }
    match kind {
        0 => x.mmu.flush_page(laddr),
        2 => x.mmu.flush(),
        _ => x.mmu.flush_non_global(),
    }
    Ok(())
}

/// WBINVD, INVD, WBNOINVD: memory is always coherent here.
pub fn wbinvd(_: &mut Exec<'_>, _: &Insn) -> Step {
    Ok(())
}

/// The extended control register that ECX names, its use allowed by CR4.OSXSAVE.
fn xcr(x: &Exec<'_>) -> Result<u64, Fault> {
    // "If CR4.OSXSAVE[bit 18] = 0": #UD.
    if !x.cpu.cr4.contains(Cr4::OSXSAVE) {
        return Err(Fault::Ud);
    }
    Ok(x.cpu.read(Gpr::Rcx, Width::D))
}

/// XGETBV: XCR0, and with ECX = 1 XCR0 AND XINUSE where CPUID offers that.
pub fn xgetbv(x: &mut Exec<'_>, _: &Insn) -> Step {
    const XGETBV_ECX1: u32 = 1 << 2;
    // The x87 part of XINUSE may still be in the host's registers.
    x.env.native.leave_x87(&mut x.cpu.xsave);
    let v = match xcr(x)? {
        0 => x.cpu.xcr0,
        1 if x.env.cpu_model.cpuid(x.cpu, 0xd, 1)[0] & XGETBV_ECX1 != 0 => x.cpu.xcr0 & native::state::in_use(x),
        // "If an invalid XCR is specified in ECX": #GP(0).
        _ => return Err(GP0.into()),
    };
    set_edx_eax(x, v);
    Ok(())
}

/// XSETBV.
pub fn xsetbv(x: &mut Exec<'_>, _: &Insn) -> Step {
    let n = xcr(x)?;
    let v = x.cpu.read(Gpr::Rax, Width::D) | x.cpu.read(Gpr::Rdx, Width::D) << 32;
    // "If an invalid XCR is specified in ECX; if the value in EDX:EAX sets bits that are reserved; if an attempt is made to clear bit 0
    // of XCR0; if an attempt is made to set XCR0[2:1] to the value 10b": #GP(0).
    let reserved = v & !x.env.cpu_model.xcr0() != 0;
    let avx_alone = v & component::AVX != 0 && v & component::SSE == 0;
    // SDM 1 13.3: "XCR0[7:5] can be set to 000b or 111b", and AVX-512 needs AVX.
    let some512 = v & component::AVX512 != 0;
    let bad512 = some512 && (v & component::AVX512 != component::AVX512 || v & component::AVX == 0);
    if n != 0 || reserved || v & component::X87 == 0 || avx_alone || bad512 {
        return Err(GP0.into());
    }
    x.cpu.xcr0 = v;
    Ok(())
}

/// STAC.
pub fn stac(x: &mut Exec<'_>, _: &Insn) -> Step {
    x.cpu.rflags.insert(Rflags::AC);
    Ok(())
}

/// CLAC.
pub fn clac(x: &mut Exec<'_>, _: &Insn) -> Step {
    x.cpu.rflags.remove(Rflags::AC);
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::cpu::cpuid::CpuModel;
    use crate::cpu::{Attr, Cr0, Cr4, Efer, Fault, Mode, Rflags};
    use crate::interp::sensitive::testing::machine;
    use crate::interp::testing::{CODE, DATA, Machine, TABLES};
    use crate::isa::{Gpr, Seg, Width};
    use crate::vcpu::Exit;

    const GP: Exit = Exit::Exception(Fault::Gp(0));
    const UD: Exit = Exit::Exception(Fault::Ud);

    /// MOV CRn, RAX.
    fn mov_cr(n: u8) -> [u8; 4] {
        [0x44, 0x0f, 0x22, 0xc0 | (n & 7) << 3].map(|b| if b == 0x44 && n < 8 { 0x40 } else { b })
    }

    fn write(setup: impl Fn(&mut Machine), code: &[u8], v: u64) -> (Exit, Machine) {
        let mut m = machine(0, code);
        setup(&mut m);
        m.cpu().gpr[Gpr::Rax as usize] = v;
        let exit = m.run(1);
        (exit, m)
    }

    #[test]
    fn cr0() {
        let now = machine(0, &[]).cpu().cr0.bits();
        let write0 = |v| write(|_| {}, &mov_cr(0), v).0;
        assert_eq!(write0(now | 1 << 32), GP);
        assert_eq!(write0(now & !Cr0::PE.bits()), GP);
        assert_eq!(write0(now | Cr0::NW.bits()), GP);
        // PG cleared in 64-bit code.
        assert_eq!(write0(now & !Cr0::PG.bits()), GP);
        let (exit, mut m) = write(|_| {}, &mov_cr(0), (now | Cr0::TS.bits() | 1 << 6) & !Cr0::ET.bits());
        assert_eq!(exit, Exit::Budget);
        assert_eq!(m.cpu().cr0.bits(), now | Cr0::TS.bits());
    }

    #[test]
    fn cr3() {
        let write3 = |v, pcide| {
            let (exit, mut m) = write(|m| m.cpu().cr4.set(Cr4::PCIDE, pcide), &mov_cr(3), v);
            (exit, m.cpu().cr3)
        };
        assert_eq!(write3(TABLES | 0x18, false), (Exit::Budget, TABLES | 0x18));
        assert_eq!(write3(TABLES | 1 << 52, false).0, GP);
        assert_eq!(write3(TABLES | 1 << 63, false).0, GP);
        assert_eq!(write3(TABLES | 1 << 63, true), (Exit::Budget, TABLES));
        assert_eq!(write3(TABLES | 1 << 62, true).0, GP);
    }

    #[test]
    fn cr4() {
        let now = machine(0, &[]).cpu().cr4.bits();
        let write4 = |v, cr3| write(|m| m.cpu().cr3 = cr3, &mov_cr(4), v).0;
        assert_eq!(write4(now | 1 << 15, TABLES), GP);
        assert_eq!(write4(now | 1 << 40, TABLES), GP);
        assert_eq!(write4(now & !Cr4::PAE.bits(), TABLES), GP);
        assert_eq!(write4(now | Cr4::PCIDE.bits(), TABLES | 8), GP);
        assert_eq!(write4(now | Cr4::PGE.bits(), TABLES), Exit::Budget);
    }

    #[test]
    fn cr8_and_those_that_do_not_exist() {
        assert_eq!(write(|_| {}, &mov_cr(8), 0x10).0, GP);
        let (exit, mut m) = write(|_| {}, &mov_cr(8), 0xf);
        assert_eq!((exit, m.cpu().cr8), (Exit::Budget, 0xf));
        for n in [1, 5, 6, 7, 9, 15] {
            assert_eq!(write(|_| {}, &mov_cr(n), 0).0, UD, "CR{n}");
        }
    }

    /// Real mode to protected mode to IA-32e mode, each step by MOV CR0.
    #[test]
    fn long_mode_switch() {
        // MOV EAX, CR0; OR ...; here only MOV CR0, EAX (0F 22 C0), four times.
        let code = [0x0f, 0x22, 0xc0].repeat(4);
        let mut m = Machine::real(&code);
        m.cpu().cr4 |= Cr4::PAE;
        m.cpu().cr3 = TABLES;
        m.cpu().efer |= Efer::LME;
        m.cpu().gpr[0] = (Cr0::PE | Cr0::ET).bits();
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().mode(), m.cpu().cpl()), (Mode::Protected16, 0));
        m.cpu().gpr[0] = (Cr0::PE | Cr0::ET | Cr0::PG).bits();
        assert_eq!(m.run(1), Exit::Budget);
        assert!(m.cpu().efer.contains(Efer::LMA));
        assert_eq!(m.cpu().mode(), Mode::Compat16);
        // PG off leaves IA-32e mode; with PAE off it cannot be entered again.
        m.cpu().gpr[0] = (Cr0::PE | Cr0::ET).bits();
        assert_eq!(m.run(1), Exit::Budget);
        assert!(!m.cpu().efer.contains(Efer::LMA));
        m.cpu().cr4.remove(Cr4::PAE);
        m.cpu().gpr[0] = (Cr0::PE | Cr0::ET | Cr0::PG).bits();
        assert_eq!(m.run(1), GP);
    }

    #[test]
    fn long_mode_needs_a_short_code_segment() {
        let mut m = Machine::real(&[0x0f, 0x22, 0xc0]);
        m.cpu().cr0 |= Cr0::PE;
        m.cpu().cr4 |= Cr4::PAE;
        m.cpu().cr3 = TABLES;
        m.cpu().efer |= Efer::LME;
        m.cpu().seg[Seg::Cs as usize].attr |= Attr::L | Attr::CODE;
        m.cpu().gpr[0] = (Cr0::PE | Cr0::ET | Cr0::PG).bits();
        assert_eq!(m.run(1), GP);
    }

    /// MOV DRn, RAX and back.
    #[test]
    fn debug_registers() {
        let to = |n: u8| [0x0f, 0x23, 0xc0 | n << 3];
        let (exit, mut m) = write(|_| {}, &to(6), u64::from(u32::MAX));
        assert_eq!((exit, m.cpu().dr6), (Exit::Budget, 0xffff_efff));
        let (exit, mut m) = write(|_| {}, &to(7), 0xffff_dfff);
        assert_eq!((exit, m.cpu().dr7), (Exit::Budget, 0xffff_07ff));
        assert_eq!(write(|_| {}, &to(6), 1 << 32).0, GP);
        assert_eq!(write(|_| {}, &to(7), 1 << 63).0, GP);
        let (exit, mut m) = write(|_| {}, &to(0), 0xdead_beef_dead_beef);
        assert_eq!((exit, m.cpu().dr[0]), (Exit::Budget, 0xdead_beef_dead_beef));
        // DR4 is DR6 without CR4.DE, #UD with it.
        let (exit, mut m) = write(|_| {}, &to(4), 0);
        assert_eq!((exit, m.cpu().dr6), (Exit::Budget, 0xffff_0ff0));
        assert_eq!(write(|m| m.cpu().cr4 |= Cr4::DE, &to(4), 0).0, UD);
        // General detect.
        assert_eq!(write(|m| m.cpu().dr7 |= 1 << 13, &to(0), 0).0, Exit::Exception(Fault::Db(1 << 13)));
    }

    /// LMSW AX sets PE MP EM TS and cannot clear PE; SMSW EAX shows all of CR0; CLTS.
    #[test]
    fn machine_status_word() {
        let (exit, mut m) = write(|_| {}, &[0x0f, 0x01, 0xf0, 0x0f, 0x01, 0xe0, 0x0f, 0x06], 0xfff8);
        assert_eq!(exit, Exit::Budget);
        assert!(m.cpu().cr0.contains(Cr0::PE | Cr0::TS) && !m.cpu().cr0.intersects(Cr0::MP | Cr0::EM));
        assert_eq!(m.run(1), Exit::Budget);
        let cr0 = m.cpu().cr0.bits();
        assert_eq!(m.cpu().gpr[0], cr0);
        assert_eq!(m.run(1), Exit::Budget);
        assert!(!m.cpu().cr0.contains(Cr0::TS));
    }

    /// INVLPG takes any address, also one that is not mapped and one that is not canonical.
    #[test]
    fn invlpg_never_faults() {
        for address in [0xdead_0000u64, 0x8000_0000_0000] {
            assert_eq!(write(|_| {}, &[0x0f, 0x01, 0x38], address).0, Exit::Budget);
        }
    }

    /// SDM 3A 4.10.4.1: a load through a page, its entry changed, this instruction, the load again: what is mapped then is seen.
    #[test]
    fn what_forgets_translations() {
        let pcide = CpuModel::host().cr4().contains(Cr4::PCIDE);
        let invpcid: &[u8] = &[0x66, 0x0f, 0x38, 0x82, 0x04, 0x25, 0, 0, 1, 0];
        let pge = (machine(0, &[]).cpu().cr4 | Cr4::PGE).bits();
        for (code, rax, global, with_pcid) in [
            (&[0x0f, 0x01, 0x3b][..], 0, true, false), // invlpg [rbx]
            (&mov_cr(3), TABLES, false, false),
            (&mov_cr(3), TABLES | 5, false, true),
            (&mov_cr(4), pge - Cr4::PGE.bits(), true, false),
            (invpcid, 0, false, true),
            (invpcid, 1, false, true),
            (invpcid, 2, true, true),
            (invpcid, 3, false, true),
        ] {
            if with_pcid && !pcide {
                println!("SKIPPED: {code:x?}: the host has no PCID");
                continue;
            }
            const LOAD: [u8; 3] = [0x48, 0x8b, 0x0b];
            let mut m = machine(0, &[&LOAD, code, &LOAD].concat());
            // A 4 KiB page at 1 GiB: its own level-2 and level-1 tables.
            let page = if global { 0x103 } else { 3 };
            for (at, entry) in [(TABLES + 0x1008, 0x1_2003u64), (0x1_2000, 0x1_3003), (0x1_3000, 0x1_4000 | page)] {
                m.mem.store(at, Width::Q, entry).expect("RAM");
            }
            m.mem.store(0x1_4000, Width::Q, 0x1111).expect("RAM");
            m.mem.store(0x1_5000, Width::Q, 0x2222).expect("RAM");
            m.cpu().cr4 |= Cr4::PGE;
            if with_pcid {
                m.cpu().cr4 |= Cr4::PCIDE;
                m.cpu().cr3 |= 5;
            }
            // The descriptor of INVPCID: the address space in use, the page.
            m.mem.store(DATA, Width::Q, 5).expect("RAM");
            m.mem.store(DATA + 8, Width::Q, 0x4000_0000).expect("RAM");
            (m.cpu().gpr[Gpr::Rbx as usize], m.cpu().gpr[Gpr::Rax as usize]) = (0x4000_0000, rax);
            assert_eq!((m.run(1), m.cpu().gpr[Gpr::Rcx as usize]), (Exit::Budget, 0x1111));
            m.mem.store(0x1_3000, Width::Q, 0x1_5000 | page).expect("RAM");
            assert_eq!(m.run(2), Exit::Budget, "{code:x?}");
            assert_eq!(m.cpu().gpr[Gpr::Rcx as usize], 0x2222, "{code:x?} {rax:x}");
        }
    }

    /// INVPCID RAX, [DATA].
    #[test]
    fn invpcid_types() {
        let code = [0x66, 0x0f, 0x38, 0x82, 0x04, 0x25, 0, 0, 1, 0];
        let run = |kind, pcid: u64, laddr: u64| {
            write(
                |m| {
                    m.mem.store(DATA, Width::Q, pcid).expect("RAM");
                    m.mem.store(DATA + 8, Width::Q, laddr).expect("RAM");
                },
                &code,
                kind,
            )
            .0
        };
        if run(0, 0, 0) == UD {
            return println!("SKIPPED: the host has no INVPCID");
        }
        assert_eq!(run(0, 0, 0x1000), Exit::Budget);
        assert_eq!(run(3, 0, 0), Exit::Budget);
        assert_eq!(run(4, 0, 0), GP);
        assert_eq!(run(2, 0x1000, 0), GP);
        assert_eq!(run(0, 1, 0), GP); // CR4.PCIDE is clear
        assert_eq!(run(0, 0, 0x8000_0000_0000), GP);
    }

    /// XSETBV with EDX = 0; XGETBV.
    #[test]
    fn xcr0() {
        let run = |ecx: u64, v: u64| {
            let (exit, mut m) = write(|m| m.cpu().gpr[Gpr::Rcx as usize] = ecx, &[0x0f, 0x01, 0xd1], v);
            (exit, m.cpu().xcr0)
        };
        assert_eq!(run(0, 3), (Exit::Budget, 3));
        assert_eq!(run(0, 1), (Exit::Budget, 1));
        for bad in [0, 2, 5, 1 << 20, 3 | 1 << 5, 3 | 0xe0] {
            assert_eq!(run(0, bad).0, GP, "{bad:#x}");
        }
        assert_eq!(run(1, 3).0, GP);
        let (exit, mut m) = write(|m| m.cpu().gpr[Gpr::Rcx as usize] = 0, &[0x0f, 0x01, 0xd0], 0);
        let xcr0 = m.cpu().xcr0;
        assert_eq!((exit, m.cpu().gpr[0]), (Exit::Budget, xcr0));
        assert_eq!(write(|m| m.cpu().gpr[Gpr::Rcx as usize] = 2, &[0x0f, 0x01, 0xd0], 0).0, GP);
        assert_eq!(write(|m| m.cpu().cr4.remove(Cr4::OSXSAVE), &[0x0f, 0x01, 0xd0], 0).0, UD);
        assert_eq!(m.cpu().rip, CODE + 3);
    }

    #[test]
    fn stac_clac() {
        let mut m = machine(0, &[0x0f, 0x01, 0xcb, 0x0f, 0x01, 0xca]);
        if m.run(1) == UD {
            return; // the host model lacks SMAP
        }
        assert!(m.cpu().rflags.contains(Rflags::AC));
        assert_eq!(m.run(1), Exit::Budget);
        assert!(!m.cpu().rflags.contains(Rflags::AC));
    }
}
