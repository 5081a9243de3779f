//! From selector to segment register: table lookup, checks, the accessed bit (SDM 3A 3.4.2-3.4.5, 5.5, 5.6; MOV, POP, LSS in SDM 2B).

use crate::cpu::descriptor::{Descriptor, is_null, rpl, selector_error};
use crate::cpu::{Attr, CpuState, Efer, Fault, Mode, Segment};
use crate::interp::access::{self, is_long64};
use crate::interp::{Exec, Step, Stop};
use crate::isa::{Seg, Width};

/// A descriptor and where it lies.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// The descriptor.
    pub descriptor: Descriptor,
    /// Its linear address.
    pub laddr: u64,
}

/// IA-32e mode: compatibility or 64-bit.
pub fn is_ia32e(cpu: &CpuState) -> bool {
    cpu.efer.contains(Efer::LMA)
}

/// Protected mode in the wider sense: segments have descriptors. Real and virtual-8086 mode do not.
pub fn is_protected(cpu: &CpuState) -> bool {
    !cpu.mode().is_real_like()
}

/// The first eight bytes of the descriptor; `None` if the selector is beyond the limit of its table, or there is no LDT.
///
/// # Errors
/// The page fault of the table access.
pub fn find(x: &mut Exec<'_>, selector: u16) -> Result<Option<Found>, Stop> {
    find_bytes(x, selector, 8)
}

/// The descriptor of a system segment or call gate: sixteen bytes in IA-32e mode.
///
/// # Errors
/// The page fault of the table access.
pub fn find_system(x: &mut Exec<'_>, selector: u16) -> Result<Option<Found>, Stop> {
    let wide = is_ia32e(x.cpu);
    let Some(mut found) = find_bytes(x, selector, if wide { 16 } else { 8 })? else { return Ok(None) };
    if wide && x.mem.flat().is_none() {
        found.descriptor.high = access::load_system(x, found.laddr.wrapping_add(8), Width::Q)?;
    }
    Ok(Some(found))
}

fn find_bytes(x: &mut Exec<'_>, selector: u16, bytes: u64) -> Result<Option<Found>, Stop> {
    if x.mem.flat().is_some() {
        return Ok(linux_descriptor(selector).map(|d| Found { descriptor: Descriptor::new(d), laddr: 0 }));
    }
    let (base, limit) = if selector & 4 == 0 {
        (x.cpu.gdtr.base, u64::from(x.cpu.gdtr.limit))
    } else if x.cpu.ldtr.attr.contains(Attr::UNUSABLE) {
        return Ok(None);
    } else {
        (x.cpu.ldtr.base, u64::from(x.cpu.ldtr.limit))
    };
    let offset = u64::from(selector & !7);
    if offset + bytes - 1 > limit {
        return Ok(None);
    }
    let laddr = linear_in_table(x.cpu, base.wrapping_add(offset));
    let low = access::load_system(x, laddr, Width::Q)?;
    Ok(Some(Found { descriptor: Descriptor::new(low), laddr }))
}

/// Linear addresses have 32 bits outside IA-32e mode.
pub fn linear_in_table(cpu: &CpuState, laddr: u64) -> u64 {
    if is_ia32e(cpu) { laddr } else { Width::D.cut(laddr) }
}

/// What a Linux process finds at a selector (arch/x86/include/asm/segment.h): the kernel's segments, its own, the CPU number.
/// A process has no table in its memory, so this stands for it.
pub fn linux_descriptor(selector: u16) -> Option<u64> {
    Some(match selector & !3 {
        0x08 => 0x00cf_9b00_0000_ffff, // 32-bit kernel code
        0x10 => 0x00af_9b00_0000_ffff, // kernel code
        0x18 => 0x00cf_9300_0000_ffff, // kernel data
        0x20 => 0x00cf_fb00_0000_ffff, // 32-bit user code
        0x28 => 0x00cf_f300_0000_ffff, // user data
        0x30 => 0x00af_fb00_0000_ffff, // user code
        0x40 => 0x0000_8b00_0000_206f, // TSS
        0x78 => 0x0040_f500_0000_0000, // limit: number of the CPU, here always 0
        0x48..=0x50 | 0x58..=0x70 => 0,
        _ => return None,
    })
}

/// Sets the accessed bit in memory if it is clear (SDM 3A 3.4.5.1).
///
/// # Errors
/// The page fault of the table access.
pub fn set_accessed(x: &mut Exec<'_>, found: &Found) -> Step {
    if found.descriptor.attr().contains(Attr::ACCESSED) || x.mem.flat().is_some() {
        return Ok(());
    }
    let access = found.descriptor.low >> 40 & 0xff | 1;
    access::store_system(x, found.laddr.wrapping_add(Descriptor::ACCESS_BYTE), Width::B, access)
}

/// The register contents for a code or data descriptor; the accessed bit is set in them.
pub fn segment_of(found: &Found, selector: u16) -> Segment {
    let mut s = found.descriptor.segment(selector);
    s.attr |= Attr::ACCESSED;
    s
}

/// SS with a null selector, legal in 64-bit mode below CPL 3. SS.DPL keeps the CPL.
pub fn null_stack(selector: u16, cpl: u8) -> Segment {
    let mut s = Segment::unusable(selector);
    s.attr |= Attr::from_bits_retain(u32::from(cpl) << 5);
    s
}

/// As real and virtual-8086 mode load a segment register: base 16 times the selector (SDM 3B 20.1.1, 20.2.4).
pub fn real_segment(cpu: &CpuState, seg: Seg, selector: u16) -> Segment {
    if cpu.mode() == Mode::Virtual8086 {
        let attr = Attr::from_bits_retain(0xf3);
        return Segment { base: u64::from(selector) << 4, limit: 0xffff, attr, selector };
    }
    // Real mode does not touch the limit: what protected mode left there stays ("unreal mode").
    let old = &cpu.seg[seg as usize];
    let attr = Attr::from_bits_retain(old.attr.bits() & 0xf000 | 0x93);
    Segment { base: u64::from(selector) << 4, limit: old.limit, attr, selector }
}

/// Loads a data or stack segment register with all checks. CS is loaded by far transfers only.
///
/// # Errors
/// #GP, #NP, #SS as MOV gives them; #PF of the table.
pub fn load(x: &mut Exec<'_>, seg: Seg, selector: u16) -> Step {
    x.cpu.seg[seg as usize] = match seg {
        _ if !is_protected(x.cpu) => real_segment(x.cpu, seg, selector),
        Seg::Ss => stack_segment(x, selector)?,
        _ => data_segment(x, selector)?,
    };
    Ok(())
}

fn stack_segment(x: &mut Exec<'_>, selector: u16) -> Result<Segment, Stop> {
    let cpl = x.cpu.cpl();
    if is_null(selector) {
        // "If an attempt is made to load SS register with NULL segment selector when CPL = 3; ... when CPL < 3 and CPL ≠ RPL",
        // and always outside 64-bit mode: #GP(0).
        if !is_long64(x.cpu) || cpl == 3 || rpl(selector) != cpl {
            return Err(Fault::Gp(0).into());
        }
        return Ok(null_stack(selector, cpl));
    }
    let error = selector_error(selector);
    // "segment selector index is outside descriptor table limits, RPL ≠ CPL, not a writable data segment, DPL ≠ CPL": #GP(selector).
    let found = find(x, selector)?.ok_or(Fault::Gp(error))?;
    let d = found.descriptor;
    if rpl(selector) != cpl || !d.is_writable() || d.dpl() != cpl {
        return Err(Fault::Gp(error).into());
    }
    // "segment not marked present": #SS(selector).
    if !d.present() {
        return Err(Fault::Ss(error).into());
    }
    set_accessed(x, &found)?;
    Ok(segment_of(&found, selector))
}

fn data_segment(x: &mut Exec<'_>, selector: u16) -> Result<Segment, Stop> {
    if is_null(selector) {
        return Ok(Segment::unusable(selector));
    }
    let error = selector_error(selector);
    // "segment selector index is outside descriptor table limits", "not a data or readable code segment": #GP(selector).
    let found = find(x, selector)?.ok_or(Fault::Gp(error))?;
    let d = found.descriptor;
    if !d.is_readable() {
        return Err(Fault::Gp(error).into());
    }
    // "data or nonconforming code segment, and RPL > DPL or CPL > DPL": #GP(selector).
    if !d.is_conforming() && (rpl(selector) > d.dpl() || x.cpu.cpl() > d.dpl()) {
        return Err(Fault::Gp(error).into());
    }
    // "segment not marked present": #NP(selector).
    if !d.present() {
        return Err(Fault::Np(error).into());
    }
    set_accessed(x, &found)?;
    Ok(segment_of(&found, selector))
}

/// On a return to a less privileged level, data segments that are too privileged for it become null (SDM 3A 5.8.6).
pub fn drop_privileged_segments(cpu: &mut CpuState, cpl: u8) {
    for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
        let s = &mut cpu.seg[seg as usize];
        let conforming = s.attr.contains(Attr::S | Attr::CODE | Attr::EXPAND_DOWN);
        // Null selectors become 0; bases stay, which 64-bit code can tell of FS and GS.
        if !s.attr.contains(Attr::UNUSABLE) && !conforming && s.attr.dpl() < cpl {
            *s = Segment { base: s.base, ..Segment::unusable(0) };
        }
    }
}
