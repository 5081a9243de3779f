//! x87, MMX, SSE, AVX and AVX-512: check the control registers, fetch the memory operand, run on the host CPU, write back.
//!
//! Order of faults (SDM 3A 6.9, 2A 2.4-2.8): #UD, #NM, pending #MF, then those of the memory operand, then #XM. What has no thunk
//! because its memory accesses depend on register values is in [`masked`] and [`gather`]; [`state`] is what loads and stores state.

pub mod gather;
pub mod masked;
pub mod state;

use crate::cpu::{CpuState, Cr0, Cr4, Fault, Rflags};
use crate::host::probe::Reach;
use crate::interp::alu::Vendor;
use crate::interp::operand::effective_address;
use crate::interp::{Exec, Step, Stop, Why, access};
use crate::isa::{Base, Gpr, Insn, MemRef, Seg, Width};
use crate::mem::{Access, PAGE_SIZE};
use crate::native::{Needs, Ran, Thunk};
use crate::vcpu::Exit;

/// MXCSR exception masks.
const MASKS: u32 = 0x1f80;
/// MXCSR.MM, AMD's misaligned exception mode (APM 1 4.2.2).
const MM: u32 = 1 << 17;

/// #UD and #NM by CR0, CR4 and XCR0 (SDM 3A table 2-2, 2A 2.4-2.8).
#[inline(always)]
pub fn check(cpu: &CpuState, needs: Needs) -> Step {
    let blocked = cpu.cr0 & (Cr0::EM | Cr0::TS);
    if needs.contains(Needs::AVX) {
        let state = if needs.contains(Needs::AVX512) { 0xe6 } else { 6 };
        if !cpu.cr4.contains(Cr4::OSXSAVE) || cpu.xcr0 & state != state || cpu.mode().is_real_like() {
            return Err(Fault::Ud.into());
        }
    } else if needs.contains(Needs::SSE) && !cpu.cr4.contains(Cr4::OSFXSR) {
        return Err(Fault::Ud.into());
    }
    if blocked.is_empty() {
        return Ok(());
    }
    if blocked.contains(Cr0::EM) && needs.intersects(Needs::SSE | Needs::MMX) {
        return Err(Fault::Ud.into());
    }
    if blocked.contains(Cr0::TS) || needs.contains(Needs::X87) {
        return Err(Fault::Nm.into());
    }
    Ok(())
}

/// Takes the x87 state into the host's registers and raises what is pending there.
#[inline(always)]
fn enter_x87(x: &mut Exec<'_>, needs: Needs) -> Step {
    x.env.native.enter_x87(&mut x.cpu.xsave);
    if !x.cpu.cr0.contains(Cr0::NE) {
        return enter_with_pins(x, needs);
    }
    if needs.contains(Needs::WAITING) && x.env.native.x87_pending() {
        return Err(Fault::Mf.into());
    }
    Ok(())
}

/// With CR0.NE clear an exception is told by FERR#, which is an interrupt on PCs, and the processor stops before the next instruction that
/// waits for it until then, unless IGNNE# says to ignore it (SDM 3A 2.5, 1 D.2).
#[cold]
fn enter_with_pins(x: &mut Exec<'_>, needs: Needs) -> Step {
    let pending = x.env.native.x87_pending();
    let ignored = x.bus.x87_error(pending);
    match ignored {
        _ if !(pending && needs.contains(Needs::WAITING)) => Ok(()),
        None => Err(Fault::Mf.into()),
        Some(true) => Ok(()),
        // RIP stays; the interrupt comes before it is tried again.
        Some(false) => Err(Stop::exit(Exit::Budget)),
    }
}

/// Any instruction of the class that has no function of its own.
pub fn run(x: &mut Exec<'_>, i: &Insn) -> Step {
    let Some(t) = x.env.native.thunk(i) else { return Err(Fault::Ud.into()) };
    check(x.cpu, t.needs)?;
    if t.needs.contains(Needs::X87) {
        enter_x87(x, t.needs)?;
    }
    let Some(m) = i.mem() else {
        execute(x, &t, None)?;
        if t.needs.contains(Needs::POINTERS) {
            set_pointers(x, i, &t, None);
        }
        return Ok(());
    };
    let offset = effective_address(x, i, m);
    if let Some((reach, gpa)) = direct(x, &t, m, offset)
        && execute(x, &t, Some(reach))? == Ran::Done
    {
        if t.needs.contains(Needs::STORE) {
            x.mem.wrote(gpa);
        }
        if t.needs.contains(Needs::POINTERS) {
            set_pointers(x, i, &t, Some((m, offset)));
        }
        return Ok(());
    }
    run_bounced(x, i, m, offset, &t)
}

/// The host address of the memory operand, and the guest-physical one, if the thunk may access it in place: nothing about it can
/// fault, or the host's fault says that the long way must be gone.
#[inline(always)]
fn direct(x: &mut Exec<'_>, t: &Thunk, m: &MemRef, offset: u64) -> Option<(Reach, u64)> {
    if t.needs.contains(Needs::ENVIRONMENT) || x.cpu.rflags.contains(Rflags::AC) || x.watching {
        return None;
    }
    let len = u64::from(t.len);
    let access = if t.needs.contains(Needs::STORE) { Access::Write } else { Access::Read };
    let laddr = access::linear(x, m.seg, offset, len, access).ok()?;
    if t.needs.intersects(Needs::ALIGNED | Needs::ALIGNED_UNLESS_MM) && laddr & (len - 1) != 0 {
        return None;
    }
    if x.mem.flat().is_some() {
        x.env.native.announce();
        return Some((x.mem.reach(laddr, len)?, laddr));
    }
    if t.needs.contains(Needs::MASKED) || (laddr & (PAGE_SIZE - 1)) + len > PAGE_SIZE {
        return None;
    }
    let by = access::accessor(x.cpu);
    let gpa = x.mmu.translate(x.cpu, x.mem, laddr, access, by).ok()?;
    Some((x.mem.reach(gpa, len)?, gpa))
}

/// The memory operand by way of the buffer, with all the faults it can have.
#[cold]
#[inline(never)]
fn run_bounced(x: &mut Exec<'_>, i: &Insn, m: &MemRef, offset: u64, t: &Thunk) -> Step {
    if t.needs.contains(Needs::MASKED) {
        return masked::run(x, i, m, offset, t);
    }
    if t.needs.intersects(Needs::ALIGNED | Needs::ALIGNED_UNLESS_MM) {
        check_aligned(x, t, m.seg, offset)?;
    }
    if t.needs.contains(Needs::MMX | Needs::STORE) && Vendor::host() == Vendor::Intel {
        // Even if the store faults TOP is 0 then, but the tags are as before: measured on Raptor Cove.
        x.env.native.leave_x87(&mut x.cpu.xsave);
        masked::clear_top(x);
        x.env.native.enter_x87(&mut x.cpu.xsave);
    }
    if t.needs.contains(Needs::STORE | Needs::POINTERS) && x.env.native.x87_unmasked() {
        return run_unmasked_store(x, i, m, offset, t);
    }
    check_alignment(x, t, m.seg, offset)?;
    if is_environment(t) && Vendor::host() == Vendor::Intel {
        probe_environment(x, t, m.seg, offset)?;
    }
    let len = usize::from(t.len);
    if t.needs.contains(Needs::LOAD) {
        load(x, m.seg, offset, len)?;
    }
    if t.needs.contains(Needs::STORE) && (t.needs.contains(Needs::X87) || faults_before_mxcsr(t)) {
        // The instruction changes registers too: what the store can raise comes first.
        if let Err(stop) = access::check_write(x, m.seg, offset, len as u64) {
            return if in_pieces(t) { run_refused_store(x, i, m, offset, t, stop) } else { Err(stop) };
        }
    }
    execute(x, t, None)?;
    if t.needs.contains(Needs::POINTERS) {
        set_pointers(x, i, t, Some((m, offset)));
    } else if t.needs.contains(Needs::ENVIRONMENT) {
        x.env.native.patch_environment(len);
    }
    if t.needs.contains(Needs::STORE) {
        store(x, m.seg, offset, len)?;
    }
    Ok(())
}

/// May the store of an instruction that looks at MXCSR fault before its result's exceptions? Raptor Cove's VCVTPS2PH raises #XM or notes the
/// flags, and faults then.
fn faults_before_mxcsr(t: &Thunk) -> bool {
    t.needs.contains(Needs::MXCSR) && Vendor::host() == Vendor::Amd
}

/// The images of the x87 unit: FLDENV, FRSTOR and their counterparts.
fn is_environment(t: &Thunk) -> bool {
    t.needs.contains(Needs::X87) && matches!(t.len, 14 | 28 | 94 | 108)
}

/// Raptor Cove touches the first field of an image of the x87 unit first, then its last byte.
fn probe_environment(x: &mut Exec<'_>, t: &Thunk, seg: Seg, offset: u64) -> Step {
    let access = if t.needs.contains(Needs::STORE) { Access::Write } else { Access::Read };
    access::check(x, seg, offset, if matches!(t.len, 14 | 94) { 2 } else { 4 }, access)?;
    access::check(x, seg, behind(offset, usize::from(t.len) - 1), 1, access)
}

/// An x87 store with an exception unmasked: if the exception comes, nothing is stored (SDM 1 8.5). What was there before tells.
#[cold]
fn run_unmasked_store(x: &mut Exec<'_>, i: &Insn, m: &MemRef, offset: u64, t: &Thunk) -> Step {
    let len = usize::from(t.len);
    let allowed =
        check_alignment(x, t, m.seg, offset).and_then(|()| access::check_write(x, m.seg, offset, u64::from(t.len)));
    if let Err(stop) = allowed {
        return match Vendor::host() {
            Vendor::Amd => Err(stop),
            Vendor::Intel => run_refused_store(x, i, m, offset, t, stop),
        };
    }
    load(x, m.seg, offset, len)?;
    let old = *x.env.native.operand();
    execute(x, t, None)?;
    set_pointers(x, i, t, Some((m, offset)));
    if x.env.native.operand()[..len] == old[..len] { Ok(()) } else { store(x, m.seg, offset, len) }
}

/// Raptor Cove stores what has 80 bits as eight bytes and two; where the two cannot be stored, the eight are.
fn in_pieces(t: &Thunk) -> bool {
    t.needs.contains(Needs::X87) && t.len == 10 && Vendor::host() == Vendor::Intel
}

/// An x87 store that cannot be done: what is not stored for an exception does not fault (Raptor Cove).
#[cold]
fn run_refused_store(x: &mut Exec<'_>, i: &Insn, m: &MemRef, offset: u64, t: &Thunk, stop: Stop) -> Step {
    /// FSW and FCW: every exception but precision, with which the result is stored.
    const SUPPRESSES: u16 = 0x1f;
    x.env.native.leave_x87(&mut x.cpu.xsave);
    let before = x.cpu.xsave.clone();
    x.env.native.enter_x87(&mut x.cpu.xsave);
    execute(x, t, None)?;
    x.env.native.sync_x87(&mut x.cpu.xsave);
    if x.cpu.xsave.fsw() & !x.cpu.xsave.fcw() & SUPPRESSES != 0 {
        set_pointers(x, i, t, Some((m, offset)));
        return Ok(());
    }
    x.env.native.leave_x87(&mut x.cpu.xsave);
    x.cpu.xsave = before;
    // Alignment is asked of the whole.
    let aligned = stop.why() != Why::Fault(Fault::Ac);
    if aligned && in_pieces(t) && access::check_write(x, m.seg, offset, 8).is_ok() {
        store(x, m.seg, offset, 8)?;
    }
    Err(stop)
}

/// Runs the thunk: [`Ran::Done`], or [`Ran::Fault`] of an operand in place. An unmasked SIMD exception is #XM, or #UD without
/// CR4.OSXMMEXCPT.
#[inline(always)]
fn execute(x: &mut Exec<'_>, t: &Thunk, operand: Option<Reach>) -> Result<Ran, Stop> {
    if t.needs.contains(Needs::MXCSR) && x.cpu.xsave.mxcsr() & (MASKS | 0xffff_0000) != MASKS {
        return execute_unmasked(x, t, operand);
    }
    Ok(x.env.native.run(t, x.cpu, operand))
}

/// With an exception unmasked the host CPU raises it too.
#[cold]
fn execute_unmasked(x: &mut Exec<'_>, t: &Thunk, operand: Option<Reach>) -> Result<Ran, Stop> {
    // Reserved bits can only come from outside; loading them would fault.
    let mxcsr = x.cpu.xsave.mxcsr() & state::mxcsr_mask();
    x.cpu.xsave.set_mxcsr(mxcsr);
    x.env.native.announce();
    match x.env.native.run(t, x.cpu, operand) {
        Ran::Exception if x.cpu.cr4.contains(Cr4::OSXMMEXCPT) => Err(Fault::Xm.into()),
        Ran::Exception => Err(Fault::Ud.into()),
        ran => Ok(ran),
    }
}

/// SDM 2A table 2-21 and following: explicitly aligned operands give #GP(0) if they are not.
fn check_aligned(x: &Exec<'_>, t: &Thunk, seg: Seg, offset: u64) -> Step {
    let len = u64::from(t.len);
    // Looked at before the address is known to be canonical, as measured on Zen 4; segment bases are aligned in other modes, or not.
    let laddr = x.cpu.segment(seg).base.wrapping_add(offset);
    if laddr & (len - 1) == 0 || t.needs.contains(Needs::ALIGNED_UNLESS_MM) && x.cpu.xsave.mxcsr() & MM != 0 {
        return Ok(());
    }
    Err(Fault::Gp(0).into())
}

/// SDM 3A 6.15, interrupt 17: with RFLAGS.AC and CR0.AM user code has its operands aligned to their size, at most 16; images of the x87 unit to
/// that of their fields.
pub(super) fn check_alignment(x: &Exec<'_>, t: &Thunk, seg: Seg, offset: u64) -> Step {
    if !access::checks_alignment(x.cpu) {
        return Ok(());
    }
    let access = if t.needs.contains(Needs::STORE) { Access::Write } else { Access::Read };
    let len = u64::from(t.len);
    match Vendor::host() {
        Vendor::Amd => alignment_of(t, access::linear(x, seg, offset, len, access)?),
        Vendor::Intel => access::linear_aligned(x, seg, offset, len, alignment(t), access).map(|_| ()),
    }
}

/// The same of an operand some of whose elements are not accessed: they may lie behind the segment's limit.
pub(super) fn check_alignment_of_some(x: &Exec<'_>, t: &Thunk, seg: Seg, offset: u64) -> Step {
    match access::checks_alignment(x.cpu) {
        true => alignment_of(t, x.cpu.segment(seg).base.wrapping_add(offset)),
        false => Ok(()),
    }
}

fn alignment_of(t: &Thunk, laddr: u64) -> Step {
    if laddr & (alignment(t) - 1) != 0 { Err(Fault::Ac.into()) } else { Ok(()) }
}

/// To what the operand has to be aligned.
fn alignment(t: &Thunk) -> u64 {
    match (u64::from(t.len), Vendor::host()) {
        (10, _) => 8,
        (14 | 94, _) => 2,
        (28 | 108, _) => 4,
        // Wider vectors need no more than those of 16 bytes: measured on an AMD EPYC.
        (len, Vendor::Amd) => len.min(16),
        // No operand of 16 bytes or more is looked at, and no packed half precision of VCVTPH2PS and VCVTPS2PH: measured on Raptor Cove.
        (16.., Vendor::Intel) => 1,
        (_, Vendor::Intel) if t.needs.contains(Needs::UNCHECKED) => 1,
        (len, Vendor::Intel) => len,
    }
}

/// May 16 bytes be accessed as two halves: nothing can go wrong with the second that does not with the first.
#[inline(always)]
fn in_one_page(x: &Exec<'_>, seg: Seg, offset: u64) -> bool {
    if !access::is_long64(x.cpu) {
        return false;
    }
    let base = match seg {
        Seg::Fs | Seg::Gs => x.cpu.seg[seg as usize].base,
        _ => 0,
    };
    base.wrapping_add(offset) & (PAGE_SIZE - 1) <= PAGE_SIZE - 16
}

/// The memory operand into the buffer; its alignment was looked at.
#[inline(always)]
fn load(x: &mut Exec<'_>, seg: Seg, offset: u64, len: usize) -> Step {
    match len {
        _ if x.cpu.rflags.contains(Rflags::AC) => load_bytes(x, seg, offset, len)?,
        4 => {
            let v = access::load(x, seg, offset, Width::D)?;
            x.env.native.operand()[..4].copy_from_slice(&(v as u32).to_le_bytes());
        }
        8 => {
            let v = access::load(x, seg, offset, Width::Q)?;
            x.env.native.operand()[..8].copy_from_slice(&v.to_le_bytes());
        }
        16 if in_one_page(x, seg, offset) => {
            let a = access::load(x, seg, offset, Width::Q)?;
            let b = access::load(x, seg, offset.wrapping_add(8), Width::Q)?;
            let to = x.env.native.operand();
            to[..8].copy_from_slice(&a.to_le_bytes());
            to[8..16].copy_from_slice(&b.to_le_bytes());
        }
        _ => load_bytes(x, seg, offset, len)?,
    }
    Ok(())
}

fn load_bytes(x: &mut Exec<'_>, seg: Seg, offset: u64, len: usize) -> Step {
    let mut bytes = [0; 128];
    access::read_bytes(x, seg, offset, &mut bytes[..len])?;
    x.env.native.operand()[..len].copy_from_slice(&bytes[..len]);
    Ok(())
}

/// The buffer into the memory operand; its alignment was looked at.
#[inline(always)]
fn store(x: &mut Exec<'_>, seg: Seg, offset: u64, len: usize) -> Step {
    let from = *x.env.native.operand();
    let word = |n: usize| u64::from_le_bytes(from[n..n + 8].try_into().expect("eight bytes"));
    match len {
        _ if x.cpu.rflags.contains(Rflags::AC) => access::write_bytes(x, seg, offset, &from[..len]),
        4 => access::store(x, seg, offset, Width::D, word(0)),
        8 => access::store(x, seg, offset, Width::Q, word(0)),
        16 if in_one_page(x, seg, offset) => {
            access::store(x, seg, offset, Width::Q, word(0))?;
            access::store(x, seg, offset.wrapping_add(8), Width::Q, word(8))
        }
        _ => access::write_bytes(x, seg, offset, &from[..len]),
    }
}

/// SDM 1 8.1.8: the last non-control instruction, its opcode and its memory operand.
#[inline(always)]
fn set_pointers(x: &mut Exec<'_>, i: &Insn, t: &Thunk, memory: Option<(&MemRef, u64)>) {
    let (rip, cs) = (x.cpu.rip, x.cpu.segment(Seg::Cs).selector);
    match memory {
        Some((m, offset)) => {
            let opcode = t.opcode | mod_rm(i, m);
            x.env.native.set_pointers(rip, cs, opcode, Some((offset, x.cpu.segment(m.seg).selector)));
        }
        None => x.env.native.set_pointers(rip, cs, t.opcode, None),
    }
}

/// ModRM's addressing form. The decoder does not keep it: of several encodings of the same address the usual one is taken.
fn mod_rm(i: &Insn, m: &MemRef) -> u16 {
    let size = match i.iced.memory_displ_size() {
        0 => 0,
        1 => 0x40,
        _ => 0x80,
    };
    if m.address == Width::W {
        return match (m.base, m.index) {
            (Base::None, None) => 6,
            (Base::Reg(Gpr::Rbx), Some(r)) => size | u16::from(r == Gpr::Rdi),
            (Base::Reg(Gpr::Rbp), Some(r)) => size | 2 | u16::from(r == Gpr::Rdi),
            (Base::Reg(Gpr::Rsi), _) => size | 4,
            (Base::Reg(Gpr::Rdi), _) => size | 5,
            (Base::Reg(Gpr::Rbp), _) => size | 6,
            _ => size | 7,
        };
    }
    match (m.base, m.index) {
        (Base::Rip, _) => 5,
        (Base::None, None) if i.iced.code_size() != iced_x86::CodeSize::Code64 => 5,
        (Base::None, _) => 4,
        (Base::Reg(_), Some(_)) | (Base::Reg(Gpr::Rsp | Gpr::R12), None) => size | 4,
        (Base::Reg(r), None) => size | (r as u16 & 7),
    }
}

/// WAIT: CR0.MP with CR0.TS gives #NM, then a pending exception #MF.
pub fn wait(x: &mut Exec<'_>, _: &Insn) -> Step {
    if x.cpu.cr0.contains(Cr0::MP | Cr0::TS) {
        return Err(Fault::Nm.into());
    }
    enter_x87(x, Needs::WAITING)
}

/// The offset of a part of an operand that begins at `offset`: past the end of 16- or 32-bit addresses it does not wrap, but meets the limit.
fn behind(offset: u64, delta: usize) -> u64 {
    offset.wrapping_add(delta as u64)
}

/// The sum of a memory operand's offset and `delta`, in its address width.
fn at(m: &MemRef, offset: u64, delta: u64) -> u64 {
    m.address.cut(offset.wrapping_add(delta))
}

/// Reads one element of at most 8 bytes; its alignment is not checked.
fn element(x: &mut Exec<'_>, seg: Seg, offset: u64, size: u64) -> Result<u64, Stop> {
    let mut bytes = [0; 8];
    access::read_bytes(x, seg, offset, &mut bytes[..size as usize & 15])?;
    Ok(u64::from_le_bytes(bytes))
}
