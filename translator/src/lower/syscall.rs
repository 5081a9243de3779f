//! SYSCALL carried out in the cache: the guest's registers are the host's, so a call that is the host's with the same arguments needs
//! no way out.
//!
//! Which numbers these are is a table behind [`slot::DIRECT`], set for each run; all others leave. SYSCALL keeps the flags (R11 gets
//! them, SDM 2B), so they are left alone here: comparisons are by SHRX and JRCXZ, in RCX and R11, which SYSCALL overwrites.
//!
//! A signal that comes before the host has executed its SYSCALL, or that makes the kernel wind back to it (SA_RESTART), finds the guest
//! before its own; one that comes afterwards finds it behind. Nothing is to be looked at before: whoever wants the thread out of the
//! cache interrupts it. What EINTR and EFAULT mean is for others to say ([`slot::MADE`]): it may be our doing.

use crate::block::Item;
use crate::emit::{gs, slot};
use crate::lower::branch::has_bmi2;
use crate::lower::{Depends, Leave, Lowering};
use crate::marks::{Home, What, homed};
use bivisor_emulator::isa::Gpr;
use dynasmrt::{DynasmApi, dynasm};

/// Numbers that the table behind [`slot::DIRECT`] has an entry for, as a power of two.
const NUMBERS: u32 = bivisor_emulator::vcpu::DIRECT_CALLS.trailing_zeros();

/// SYSCALL. Never falls through.
pub(crate) fn syscall(l: &mut Lowering<'_>, item: &Item) {
    let rip = l.block.rip(item);
    if !l.around.linked || !has_bmi2() {
        l.leave(Leave::Syscall(rip, item.len));
        return;
    }
    let [s_r10, s_r11, s_tmp, s_number, s_direct, s_calls, s_made] =
        [slot::R10, slot::R11, slot::TMP, slot::NUMBER, slot::DIRECT, slot::CALLS, slot::MADE].map(gs);
    let before = What::Undo(item.at, Gpr::Rcx);
    let next_at = item.at + u16::from(item.len);
    let after = What::Called(next_at);

    l.mark(What::At(item.at));
    dynasm!(l.e; .arch x64; gs mov [s_tmp], rcx);
    if l.home == Home::Register {
        l.store_homed();
    }
    l.mark(before);
    dynasm!(l.e; .arch x64
        ; mov ecx, eax
        ; gs mov [s_number], rcx
        ; mov r11d, NUMBERS as i32
        ; shrx ecx, ecx, r11d
    );
    let known = jrcxz(l);
    let other = l.e.len();
    dynasm!(l.e; .arch x64; gs mov rcx, [s_tmp]);
    l.leave(Leave::Syscall(rip, item.len));

    here(l, known);
    l.mark(before);
    dynasm!(l.e; .arch x64
        ; gs mov r11, [s_direct]
        ; mov ecx, eax
        ; movzx ecx, BYTE [r11 + rcx]
    );
    let direct = jrcxz(l);
    let back = other as i64 - (l.e.len() as i64 + 2);
    l.e.bytes.extend_from_slice(&[0xeb, back as u8]);

    here(l, direct);
    if homed().contains(&(Gpr::R10, slot::R10)) {
        // An argument, which the kernel leaves as it is.
        dynasm!(l.e; .arch x64; gs mov r10, [s_r10]);
    }
    dynasm!(l.e; .arch x64; syscall);
    l.home = Home::Register;
    l.mark(after);
    let odd = [libc::EINTR, libc::EFAULT].map(|errno| {
        dynasm!(l.e; .arch x64; lea rcx, [rax + errno]);
        jrcxz(l)
    });
    dynasm!(l.e; .arch x64
        ; gs mov rcx, [s_calls]
        ; lea rcx, [rcx + 1]
        ; gs mov [s_calls], rcx
        ; gs mov [s_r11], r11
    );
    load_next(l, item);
    l.home = Home::Slot;
    l.mark(What::At(next_at));
    let next = l.block.next_rip(item);
    l.link(&[0xe9], next);

    l.home = Home::Register;
    odd.into_iter().for_each(|from| here(l, from));
    l.mark(after);
    dynasm!(l.e; .arch x64; gs mov [s_r11], r11);
    load_next(l, item);
    dynasm!(l.e; .arch x64; gs mov [s_made], rcx);
    l.home = Home::Slot;
    l.leave(Leave::Syscall(rip, item.len));
}

/// RCX becomes the guest's address after the instruction.
fn load_next(l: &mut Lowering<'_>, item: &Item) {
    let next = l.block.next_rip(item);
    dynasm!(l.e; .arch x64; mov rcx, QWORD next as i64);
    l.relocation(l.e.len() - 8, Depends::Guest);
}

/// JRCXZ to what comes later; gives what [`here`] wants.
fn jrcxz(l: &mut Lowering<'_>) -> usize {
    l.e.bytes.extend_from_slice(&[0xe3, 0]);
    l.e.len()
}

/// A jump leads here.
fn here(l: &mut Lowering<'_>, from: usize) {
    l.e.bytes[from - 1] = i8::try_from(l.e.len() - from).expect("a short sequence") as u8;
}
