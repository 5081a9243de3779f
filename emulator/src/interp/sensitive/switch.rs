//! The hardware task switch: by CALL, JMP and IRET, and by interrupts and exceptions through a task gate (SDM 3A 7.3).
//!
//! Up to the commit point (the old state is saved, TR is loaded) a fault leaves the old task as it was; later ones belong to the new task,
//! whose first instruction has then not been executed.

use crate::cpu::descriptor::{Descriptor, is_null, kind, rpl, selector_error};
use crate::cpu::{Attr, Cr0, Fault, Rflags, Segment};
use crate::interp::sensitive::selector::{self, Found, linear_in_table};
use crate::interp::sensitive::{control, far};
use crate::interp::{Exec, Step, Stop, Why, access, stack};
use crate::isa::{Gpr, Seg, Width};
use crate::mem::{Access, By};

/// Who switches: it decides about the busy bits, the link to the old task, and NT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// JMP.
    Jmp,
    /// CALL.
    Call,
    /// IRET with NT set.
    Iret,
    /// An interrupt or exception.
    Event {
        /// The EXT bit of error codes.
        ext: u16,
        /// What the handler gets on its stack.
        error: Option<u16>,
        /// The flags to save.
        flags: Rflags,
    },
}

impl Cause {
    fn ext(self) -> u16 {
        if let Cause::Event { ext, .. } = self { ext } else { 0 }
    }

    /// Is the old task to be gone back to?
    fn nests(self) -> bool {
        matches!(self, Cause::Call | Cause::Event { .. })
    }
}

/// Offsets in a TSS of 16 or 32 bits (SDM 3A figures 7-2, 7-10).
struct Shape {
    w: Width,
    /// IP; the flags, the eight general registers and the segment registers follow.
    ip: u64,
    segments: &'static [Seg],
    ldt: u64,
    /// Limit at least.
    limit: u32,
}

const SHAPE16: Shape =
    Shape { w: Width::W, ip: 0x0e, segments: &[Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds], ldt: 0x2a, limit: 0x2b };
const SHAPE32: Shape = Shape {
    w: Width::D,
    ip: 0x20,
    segments: &[Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs],
    ldt: 0x60,
    limit: 0x67,
};
const CR3: u64 = 0x1c;
const TRAP: u64 = 0x64;
/// DR6.BT.
const DR6_BT: u64 = 1 << 15;
/// The local breakpoint enables of DR7, LE too.
const DR7_LOCAL: u64 = 0x155;

impl Shape {
    fn of(kind: u8) -> &'static Shape {
        if matches!(kind, kind::TSS16_AVAILABLE | kind::TSS16_BUSY) { &SHAPE16 } else { &SHAPE32 }
    }

    /// Where a field of the saved state is: 0 IP, 1 flags, 2 to 9 general registers, from 10 on segments.
    fn slot(&self, n: usize) -> u64 {
        self.ip + n as u64 * self.w.bytes()
    }

    fn state_len(&self) -> u64 {
        (10 + self.segments.len() as u64) * self.w.bytes()
    }
}

/// IRET with NT set: back to the task that the link of the current one names.
pub fn back(x: &mut Exec<'_>) -> Step {
    let at = linear_in_table(x.cpu, x.cpu.tr.base);
    let link = access::load_system(x, at, Width::W)? as u16;
    to_tss(x, link, Cause::Iret)
}

/// To the task of a TSS selector; for CALL and JMP its privilege has been checked.
pub fn to_tss(x: &mut Exec<'_>, selector: u16, by: Cause) -> Step {
    let error = selector_error(selector) | by.ext();
    // SDM 3A table 7-1; IRET: "If the segment selector's TI flag is set, ... not within limits, ... not a busy TSS": #TS, else #GP.
    let invalid = || Stop::from(if by == Cause::Iret { Fault::Ts(error) } else { Fault::Gp(error) });
    if selector & 4 != 0 {
        return Err(invalid());
    }
    let found = selector::find(x, selector)?.ok_or_else(invalid)?;
    let d = found.descriptor;
    let right = match by {
        Cause::Iret => matches!(d.kind(), kind::TSS_BUSY | kind::TSS16_BUSY),
        _ => matches!(d.kind(), kind::TSS_AVAILABLE | kind::TSS16_AVAILABLE),
    };
    if !d.is_system() || !right {
        return Err(invalid());
    }
    if !d.present() {
        return Err(Fault::Np(error).into());
    }
    if d.limit() < Shape::of(d.kind()).limit {
        return Err(Fault::Ts(error).into());
    }
    switch(x, &found, selector, by)
}

/// The state that a TSS holds.
struct Saved {
    cr3: u64,
    /// IP, flags, general registers, segments, as [`Shape::slot`] counts.
    slots: [u64; 16],
    ldt: u16,
    trap: bool,
}

fn switch(x: &mut Exec<'_>, new: &Found, selector: u16, by: Cause) -> Step {
    let (old_shape, shape) = (Shape::of(x.cpu.tr.attr.kind()), Shape::of(new.descriptor.kind()));
    let (old_base, base) = (x.cpu.tr.base, new.descriptor.base());
    // All that can fault on the way is asked first.
    let at = |x: &Exec<'_>, base: u64, offset: u64| linear_in_table(x.cpu, base.wrapping_add(offset));
    let to = at(x, old_base, old_shape.ip);
    access::place(x, to, old_shape.state_len(), Access::Write, By::Implicit)?;
    if by.nests() {
        let to = at(x, base, 0);
        access::place(x, to, 2, Access::Write, By::Implicit)?;
    }
    let old_descriptor = linear_in_table(x.cpu, x.cpu.gdtr.base.wrapping_add(u64::from(x.cpu.tr.selector & !7) + 5));
    if !by.nests() {
        access::place(x, old_descriptor, 1, Access::Write, By::Implicit)?;
    }
    let saved = load(x, base, shape)?;
    if by != Cause::Iret {
        let access = new.descriptor.low >> 40 & 0xff | 2;
        access::store_system(x, new.laddr.wrapping_add(Descriptor::ACCESS_BYTE), Width::B, access)?;
    }
    if !by.nests() {
        let access = access::load_system(x, old_descriptor, Width::B)?;
        access::store_system(x, old_descriptor, Width::B, access & !2)?;
    }
    save(x, old_base, old_shape, by)?;
    if by.nests() {
        let to = at(x, base, 0);
        access::store_system(x, to, Width::W, u64::from(x.cpu.tr.selector))?;
    }
    // The commit point.
    x.cpu.tr = new.descriptor.segment(selector);
    x.cpu.tr.attr |= Attr::from_bits_retain(2);
    x.cpu.cr0 |= Cr0::TS;
    x.cpu.dr7 &= !DR7_LOCAL;
    if shape.w == Width::D && x.cpu.cr0.contains(Cr0::PG) {
        control::load_cr3(x, saved.cr3)?;
    }
    take_over(x, shape, &saved, by)?;
    if let Cause::Event { error: Some(code), ext, .. } = by {
        stack::push(x, shape.w, u64::from(code)).map_err(|stop| match stop.why() {
            Why::Fault(Fault::Ss(_)) => Fault::Ss(ext).into(),
            _ => stop,
        })?;
    }
    far::check_target(x.cpu, x.cpu.segment(Seg::Cs), x.cpu.rip)?;
    x.attention();
    // "If the T flag is set in the new task's TSS": #DB, before its first instruction.
    if saved.trap { Err(Fault::Db(DR6_BT).into()) } else { Ok(()) }
}

fn load(x: &mut Exec<'_>, base: u64, shape: &Shape) -> Result<Saved, Stop> {
    let mut field = |offset: u64, w| {
        let at = linear_in_table(x.cpu, base.wrapping_add(offset));
        access::load_system(x, at, w)
    };
    let mut saved = Saved { cr3: 0, slots: [0; 16], ldt: field(shape.ldt, Width::W)? as u16, trap: false };
    for n in 0..10 + shape.segments.len() {
        saved.slots[n] = field(shape.slot(n), if n < 10 { shape.w } else { Width::W })?;
    }
    if shape.w == Width::D {
        saved.cr3 = field(CR3, Width::D)?;
        saved.trap = field(TRAP, Width::W)? & 1 != 0;
    }
    Ok(saved)
}

fn save(x: &mut Exec<'_>, base: u64, shape: &Shape, by: Cause) -> Step {
    let mut flags = if let Cause::Event { flags, .. } = by { flags } else { x.cpu.rflags };
    // A task that IRET leaves is not nested any more.
    flags.set(Rflags::NT, flags.contains(Rflags::NT) && by != Cause::Iret);
    let mut slots = [0; 16];
    (slots[0], slots[1]) = (x.next_rip, flags.bits());
    slots[2..10].copy_from_slice(&x.cpu.gpr[..8]);
    for (n, seg) in shape.segments.iter().enumerate() {
        slots[10 + n] = u64::from(x.cpu.segment(*seg).selector);
    }
    for (n, v) in slots.iter().enumerate().take(10 + shape.segments.len()) {
        let at = linear_in_table(x.cpu, base.wrapping_add(shape.slot(n)));
        // The upper halves of segment fields are reserved and stay.
        let w = if n < 10 { shape.w } else { Width::W };
        access::store_system(x, at, w, w.cut(*v))?;
    }
    Ok(())
}

/// The new task's registers. Segments count as not loaded until each has passed its checks.
fn take_over(x: &mut Exec<'_>, shape: &Shape, saved: &Saved, by: Cause) -> Step {
    x.cpu.rip = saved.slots[0];
    x.next_rip = saved.slots[0];
    let known = if shape.w == Width::D { 0x003f_7fd5 } else { 0x7fd5 };
    x.cpu.rflags = Rflags::from_bits_retain(saved.slots[1] & known) | Rflags::FIXED;
    if by.nests() {
        x.cpu.rflags |= Rflags::NT;
    }
    for (n, r) in Gpr::ALL[..8].iter().enumerate() {
        x.cpu.write(*r, shape.w, saved.slots[2 + n]);
        if shape.w == Width::W {
            // What a 16-bit TSS does not hold is ones, as on processors since the 386.
            x.cpu.gpr[*r as usize] = saved.slots[2 + n] | 0xffff_0000;
        }
    }
    let selector_of = |seg: Seg| {
        let n = shape.segments.iter().position(|s| *s == seg);
        n.map_or(0, |n| saved.slots[10 + n] as u16)
    };
    let all = [Seg::Cs, Seg::Ss, Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs];
    if x.cpu.rflags.contains(Rflags::VM) {
        for seg in all {
            x.cpu.seg[seg as usize] = selector::real_segment(x.cpu, seg, selector_of(seg));
        }
        return load_ldt(x, saved.ldt, by);
    }
    let cpl = rpl(selector_of(Seg::Cs));
    for seg in all {
        let mut s = Segment::unusable(selector_of(seg));
        s.attr |= Attr::from_bits_retain(u32::from(cpl) << 5);
        x.cpu.seg[seg as usize] = s;
    }
    load_ldt(x, saved.ldt, by)?;
    load_code(x, selector_of(Seg::Cs), by)?;
    load_stack(x, selector_of(Seg::Ss), cpl, by)?;
    for seg in [Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
        load_data(x, seg, selector_of(seg), cpl, by)?;
    }
    Ok(())
}

/// A descriptor, or `#TS(selector)`.
fn find(x: &mut Exec<'_>, selector: u16, by: Cause) -> Result<(Found, u16), Stop> {
    let error = selector_error(selector) | by.ext();
    if is_null(selector) {
        return Err(Fault::Ts(error).into());
    }
    Ok((selector::find(x, selector)?.ok_or(Fault::Ts(error))?, error))
}

/// SDM 3A table 7-1: "LDT segment selector of new task is valid", "LDT of new task is present": #TS.
fn load_ldt(x: &mut Exec<'_>, selector: u16, by: Cause) -> Step {
    x.cpu.ldtr = Segment::unusable(selector);
    if is_null(selector) {
        return Ok(());
    }
    let error = selector_error(selector) | by.ext();
    if selector & 4 != 0 {
        return Err(Fault::Ts(error).into());
    }
    let (found, _) = find(x, selector, by)?;
    let d = found.descriptor;
    if !d.is_system() || d.kind() != kind::LDT || !d.present() {
        return Err(Fault::Ts(error).into());
    }
    x.cpu.ldtr = d.segment(selector);
    Ok(())
}

/// "Code segment DPL matches segment selector RPL": #TS; "code segment of new task is present": #NP.
fn load_code(x: &mut Exec<'_>, selector: u16, by: Cause) -> Step {
    let (found, error) = find(x, selector, by)?;
    let d = found.descriptor;
    let wrong_level = if d.is_conforming() { d.dpl() > rpl(selector) } else { d.dpl() != rpl(selector) };
    if !d.is_code() || wrong_level {
        return Err(Fault::Ts(error).into());
    }
    if !d.present() {
        return Err(Fault::Np(error).into());
    }
    selector::set_accessed(x, &found)?;
    x.cpu.seg[Seg::Cs as usize] = selector::segment_of(&found, selector);
    Ok(())
}

/// "SS segment selector is valid", "stack segment DPL matches CPL, selector RPL": #TS; "stack segment of new task is present": #SS.
fn load_stack(x: &mut Exec<'_>, selector: u16, cpl: u8, by: Cause) -> Step {
    let (found, error) = find(x, selector, by)?;
    let d = found.descriptor;
    if !d.is_writable() || d.dpl() != cpl || rpl(selector) != cpl {
        return Err(Fault::Ts(error).into());
    }
    if !d.present() {
        return Err(Fault::Ss(error).into());
    }
    selector::set_accessed(x, &found)?;
    x.cpu.seg[Seg::Ss as usize] = selector::segment_of(&found, selector);
    Ok(())
}

/// "DS, ES, FS, and GS segment selectors are valid", "readable", "DPL ≥ CPL (unless conforming)": #TS; "are present": #NP.
fn load_data(x: &mut Exec<'_>, seg: Seg, selector: u16, cpl: u8, by: Cause) -> Step {
    if is_null(selector) {
        x.cpu.seg[seg as usize] = Segment::unusable(selector);
        return Ok(());
    }
    let (found, error) = find(x, selector, by)?;
    let d = found.descriptor;
    if !d.is_readable() || (!d.is_conforming() && d.dpl() < cpl.max(rpl(selector))) {
        return Err(Fault::Ts(error).into());
    }
    if !d.present() {
        return Err(Fault::Np(error).into());
    }
    selector::set_accessed(x, &found)?;
    x.cpu.seg[seg as usize] = selector::segment_of(&found, selector);
    Ok(())
}

#[cfg(test)]
#[path = "switch_tests.rs"]
mod tests;
