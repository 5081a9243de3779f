//! Stack operations and the flags register in the checked model: PUSH, POP, the pushes and pops of CALL and RET, PUSHF, POPF, CLI, STI.
//!
//! IF, IOPL and the other flags a guest kernel owns are virtual: they live in [`slot::VIRTUAL_FLAGS`] while translated code runs, and
//! PUSHF and POPF join them with the host's status flags (VMware's scheme). Where an interrupt may become due, the code leaves.

// dynasm's dynamic registers convert a u8 to itself.
#![allow(clippy::useless_conversion)]

use crate::block::Item;
use crate::emit::{gs, slot};
use crate::lower::checked::{Access, Scratch, give_back, probe, used};
use crate::lower::memory::load_constant;
use crate::lower::{Leave, Lowering};
use crate::marks::{Borrowed, Saved, What};
use bivisor_emulator::cpu::Rflags;
use bivisor_emulator::isa::Gpr;
use dynasmrt::{DynasmApi, dynasm};

const PUSH: Access = Access { len: 8, write: true };
const POP: Access = Access { len: 8, write: false };
/// The flags that are the host's while translated code runs.
pub const HOST_FLAGS: Rflags = Rflags::STATUS.union(Rflags::DF);

fn stack_address(disp: i32) -> impl FnOnce(&mut Lowering<'_>, &Scratch) -> bool {
    move |l, s| {
        let to = s.address as u8;
        dynasm!(l.e; .arch x64; lea Rq(to), [rsp + disp]);
        true
    }
}

/// PUSH of a 64-bit register or a constant.
pub(crate) fn push(l: &mut Lowering<'_>, item: &Item) -> bool {
    let Some(s) = Scratch::choose(used(&item.iced)) else { return false };
    let to = s.address as u8;
    let register = Gpr::from_iced(item.iced.op0_register());
    let constant = if register.is_none() { item.iced.immediate(0) as i32 } else { 0 };
    if !probe(l, item, &s, PUSH, stack_address(-8)) {
        return false;
    }
    match register {
        Some(r) => {
            let r = r as u8;
            dynasm!(l.e; .arch x64; mov [Rq(to)], Rq(r));
        }
        None => dynasm!(l.e; .arch x64; mov QWORD [Rq(to)], constant),
    }
    dynasm!(l.e; .arch x64; lea rsp, [rsp - 8]);
    give_back(l, item, &s);
    true
}

/// POP of a 64-bit register. Until RSP moves the instruction can begin again.
pub(crate) fn pop(l: &mut Lowering<'_>, item: &Item) -> bool {
    let Some(r) = Gpr::from_iced(item.iced.op0_register()) else { return false };
    let Some(s) = Scratch::choose(used(&item.iced)) else { return false };
    let to = s.address as u8;
    if !probe(l, item, &s, POP, stack_address(0)) {
        return false;
    }
    let to_r = r as u8;
    dynasm!(l.e; .arch x64; mov Rq(to_r), [Rq(to)]);
    if r != Gpr::Rsp {
        dynasm!(l.e; .arch x64; lea rsp, [rsp + 8]);
    }
    give_back(l, item, &s);
    true
}

/// Pushes the return address of a CALL; the transfer comes next. Everything borrowed is given back.
pub(crate) fn push_return(l: &mut Lowering<'_>, item: &Item, back: u64) -> bool {
    let Some(s) = Scratch::choose(used(&item.iced)) else { return false };
    if !probe(l, item, &s, PUSH, stack_address(-8)) {
        return false;
    }
    let (to, a) = (s.address as u8, s.a as u8);
    let (s0, s1) = (gs(slot::S0), gs(slot::S1));
    match i32::try_from(back as i64) {
        Ok(back) => dynasm!(l.e; .arch x64; mov QWORD [Rq(to)], back),
        Err(_) => {
            // The second register is still in its slot.
            l.mark(What::Borrowed(Borrowed {
                at: item.at,
                regs: [Some(s.address), Some(s.a), None, None],
                flags: false,
            }));
            load_constant(l, s.a, back);
            dynasm!(l.e; .arch x64; mov [Rq(to)], Rq(a); gs mov Rq(a), [s1]);
            l.mark(What::Borrowed(Borrowed { at: item.at, regs: [Some(s.address), None, None, None], flags: false }));
        }
    }
    // Stored, but RSP has not moved: the instruction can begin again.
    dynasm!(l.e; .arch x64; gs mov Rq(to), [s0]);
    l.mark(What::At(item.at));
    true
}

/// Pops the return address of a RET into RCX, whose guest value and R11's are in their slots.
pub(crate) fn pop_return(l: &mut Lowering<'_>, item: &Item) -> bool {
    let Some(s) = Scratch::choose(|r| matches!(r, Gpr::Rcx | Gpr::R11 | Gpr::Rsp | Gpr::Rax)) else { return false };
    let to = s.address as u8;
    let [s0, s_rcx, s_r11, site] = [slot::S0, slot::RCX, slot::R11, slot::SITE].map(gs);
    if !probe(l, item, &s, POP, stack_address(0)) {
        return false;
    }
    // RCX is saved only now: the probe's way out knows nothing of it.
    let id = l.exit(Leave::Step(l.block.rip(item)), usize::MAX, None);
    dynasm!(l.e
        ; .arch x64
        ; gs mov DWORD [site], id as i32
        ; gs mov [s_rcx], rcx
        ; gs mov [s_r11], r11
        ; mov Rq(to), [Rq(to)]
        ; mov rcx, Rq(to)
    );
    l.mark(What::BorrowedAndRcx(Borrowed { at: item.at, regs: [Some(s.address), None, None, None], flags: false }));
    dynasm!(l.e; .arch x64; gs mov Rq(to), [s0]);
    l.mark(What::Undo(item.at, Saved::Rcx));
    true
}

/// PUSHFQ: the host's status flags joined with the virtual ones, among which RF and VM never are (SDM 2B PUSHF).
pub(crate) fn push_flags(l: &mut Lowering<'_>, item: &Item) -> bool {
    let Some(s) = Scratch::choose(used(&item.iced)) else { return false };
    let (to, a, b) = (s.address as u8, s.a as u8, s.b as u8);
    let [s1, s2, guest, host, virtual_flags] =
        [slot::S1, slot::S2, slot::RSP, slot::HOST_RSP, slot::VIRTUAL_FLAGS].map(gs);
    let host_bits = HOST_FLAGS.bits() as i32;
    if !probe(l, item, &s, PUSH, stack_address(-8)) {
        return false;
    }
    let borrowed = Borrowed { at: item.at, regs: [Some(s.address), Some(s.a), Some(s.b), None], flags: true };
    // The probe has given these two back; their slots still hold them, and the status flags.
    l.mark(What::Borrowed(borrowed));
    dynasm!(l.e; .arch x64; gs mov [guest], rsp);
    l.mark(What::OnHostStack(borrowed));
    dynasm!(l.e
        ; .arch x64
        ; gs mov rsp, [host]
        ; pushfq
        ; mov Rq(a), [rsp]
        ; and Rd(a), host_bits
        ; gs mov Rq(b), [virtual_flags]
        ; lea Rq(a), [Rq(a) + Rq(b)]
        ; mov [Rq(to)], Rq(a)
        ; popfq
        ; gs mov Rq(a), [s1]
        ; gs mov Rq(b), [s2]
        ; gs mov rsp, [guest]
        ; lea rsp, [rsp - 8]
    );
    give_back(l, item, &s);
    true
}

/// POPFQ: if no virtual flag changes, the status flags are loaded and that is all; else one interpreter step.
pub(crate) fn pop_flags(l: &mut Lowering<'_>, item: &Item) -> bool {
    let Some(s) = Scratch::choose(used(&item.iced)) else { return false };
    let (to, a) = (s.address as u8, s.a as u8);
    let [s0, s1, guest, host, virtual_flags] =
        [slot::S0, slot::S1, slot::RSP, slot::HOST_RSP, slot::VIRTUAL_FLAGS].map(gs);
    let host_bits = HOST_FLAGS.bits() as i32;
    if !probe(l, item, &s, POP, stack_address(0)) {
        return false;
    }
    let borrowed = Borrowed { at: item.at, regs: [Some(s.address), Some(s.a), None, None], flags: true };
    l.mark(What::Borrowed(borrowed));
    dynasm!(l.e
        ; .arch x64
        ; mov Rq(to), [Rq(to)]
        ; gs mov Rq(a), [virtual_flags]
        ; xor Rq(a), Rq(to)
        ; test Rq(a), !host_bits
        ; .u8 0x0f
        ; .u8 0x85
    );
    let site = l.e.len();
    l.e.push_u32(0);
    l.declined.push((site, *item, s.address, s.a));
    dynasm!(l.e; .arch x64; gs mov [guest], rsp);
    l.mark(What::OnHostStack(borrowed));
    dynasm!(l.e
        ; .arch x64
        ; gs mov rsp, [host]
        ; and Rd(to), host_bits
        ; push Rq(to)
        ; popfq
        ; gs mov Rq(a), [s1]
        ; gs mov Rq(to), [s0]
        ; gs mov rsp, [guest]
        ; lea rsp, [rsp + 8]
    );
    l.mark(What::At(item.at + u16::from(item.len)));
    true
}

/// The ways out of POPF that the interpreter must do.
pub(crate) fn emit_declined(l: &mut Lowering<'_>) {
    let [s0, s1, s3, status] = [slot::S0, slot::S1, slot::S3, slot::STATUS].map(gs);
    for (site, item, address, other) in std::mem::take(&mut l.declined) {
        let here = l.e.here();
        l.e.set_rel32(site, here);
        let (to, a) = (address as u8, other as u8);
        let at = |rax: bool| {
            let rax = rax.then_some(Gpr::Rax);
            What::Borrowed(Borrowed { at: item.at, regs: [Some(address), Some(other), None, rax], flags: true })
        };
        l.mark(at(false));
        dynasm!(l.e; .arch x64; gs mov [s3], rax);
        l.mark(at(true));
        dynasm!(l.e; .arch x64; gs mov rax, [status]; add al, 0x7f; sahf; gs mov rax, [s3]);
        l.mark(at(false));
        dynasm!(l.e; .arch x64; gs mov Rq(to), [s0]; gs mov Rq(a), [s1]);
        let rip = l.block.rip(&item);
        l.leave(Leave::Step(rip));
    }
}

/// CLI at CPL 0: the virtual flags become those without IF, which the way in has put beside them (VMware's CLI was one AND; a move
/// leaves the status flags alone).
pub(crate) fn clear_interrupts(l: &mut Lowering<'_>, item: &Item) -> bool {
    let (s0, virtual_flags, cleared) = (gs(slot::S0), gs(slot::VIRTUAL_FLAGS), gs(slot::VIRTUAL_FLAGS_CLEARED));
    l.mark(What::At(item.at));
    dynasm!(l.e; .arch x64; gs mov [s0], rcx);
    l.mark(What::Borrowed(Borrowed { at: item.at, regs: [Some(Gpr::Rcx), None, None, None], flags: false }));
    dynasm!(l.e
        ; .arch x64
        ; gs mov rcx, [cleared]
        ; gs mov [virtual_flags], rcx
        ; gs mov rcx, [s0]
    );
    l.mark(What::At(item.at + u16::from(item.len)));
    true
}
