//! Code of pages that are written so often that nobody watches them: on its way in a block compares the bytes it was made from.
//!
//! Bytes that were found changed before and are immediate operands are not compared: the instruction loads them when it is executed
//! (Dehnert et al., CGO 2003, call this stylized self-modifying code). No flag is touched: LEA subtracts, JRCXZ asks.

// dynasm's dynamic registers convert a u8 to itself.
#![allow(clippy::useless_conversion)]

use crate::block::{GuestBlock, Item};
use crate::emit::{gs, slot};
use crate::lower::memory::load_constant;
use crate::lower::{Leave, Lowering};
use crate::marks::{Home, What};
use bivisor_emulator::isa::Gpr;
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Code, Instruction, OpKind};
use std::ops::Range;

/// The way out for a block that is no longer what it was made from; gives its host address. RCX is in its slot, and so is what has a home.
pub(crate) fn emit_failure(l: &mut Lowering<'_>) -> u64 {
    let save = gs(slot::TMP);
    let at = l.e.here();
    let home = std::mem::replace(&mut l.home, Home::Slot);
    l.mark(What::Undo(0, Gpr::Rcx));
    dynasm!(l.e; .arch x64; gs mov rcx, [save]);
    l.leave(Leave::Changed(l.block.start));
    l.home = home;
    at
}

/// The comparison, which comes before the block's first instruction.
pub(crate) fn emit(l: &mut Lowering<'_>, failure: u64) {
    let save = gs(slot::TMP);
    let block = l.block;
    l.put_away(0);
    dynasm!(l.e; .arch x64; gs mov [save], rcx);
    l.mark(What::Compare);
    load_constant(l, Gpr::R11, block.start);
    for run in compared(block) {
        for (at, size) in pieces(run) {
            word(l, at, size, failure);
        }
    }
    l.mark(What::Undo(0, Gpr::Rcx));
    dynasm!(l.e; .arch x64; gs mov rcx, [save]);
}

/// The bytes that must be as they were.
fn compared(block: &GuestBlock) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let mut from = 0;
    for item in &block.items {
        if let Some(loose) = loose(block, item) {
            runs.push(from..loose.start);
            from = loose.end;
        }
    }
    runs.push(from..block.bytes.len());
    runs
}

/// Pieces of 4, 2 and 1 bytes that together are the range.
fn pieces(run: Range<usize>) -> Vec<(usize, usize)> {
    let mut all: Vec<(usize, usize)> = run.clone().step_by(4).map(|at| (at, 4)).collect();
    let Some((last, _)) = all.pop() else { return all };
    match run.end - last {
        // They may overlap.
        n if n < 4 && run.len() >= 4 => all.push((run.end - 4, 4)),
        3 => all.extend([(last, 2), (last + 2, 1)]),
        n => all.push((last, n)),
    }
    all
}

/// Goes to `failure` unless the bytes are there. R11 is the block's start; RCX is lost.
fn word(l: &mut Lowering<'_>, at: usize, size: usize, failure: u64) {
    let mut bytes = [0; 4];
    bytes[..size].copy_from_slice(&l.block.bytes[at..at + size]);
    let disp = at as i32;
    let value = i32::from_le_bytes(bytes);
    match size {
        1 => dynasm!(l.e; .arch x64; movzx ecx, BYTE [r11 + disp]),
        2 => dynasm!(l.e; .arch x64; movzx ecx, WORD [r11 + disp]),
        // The difference must be a displacement: 32 bits, signed.
        _ if value == i32::MIN => dynasm!(l.e; .arch x64; mov ecx, [r11 + disp]),
        _ => dynasm!(l.e; .arch x64; movsxd rcx, DWORD [r11 + disp]),
    }
    let minus = value.wrapping_neg();
    // lea rcx, [rcx - value] with 32 bits of displacement; jrcxz over the jump.
    l.e.bytes.extend_from_slice(&[0x48, 0x8d, 0x89]);
    l.e.push_i32(minus);
    l.e.bytes.extend_from_slice(&[0xe3, 5, 0xe9]);
    let site = l.e.len();
    l.e.push_u32(0);
    l.e.set_rel32(site, failure);
}

/// Where the immediate operand of an instruction is, if it was found changed before and can be loaded when it is needed.
fn loose(block: &GuestBlock, item: &Item) -> Option<Range<usize>> {
    let size = match way(item.iced.code())? {
        Way::Load(size) => size,
        Way::Operate(_) => 4,
    };
    let register = item.iced.op0_kind() == OpKind::Register && item.iced.op_count() == 2;
    // It comes last (SDM 2A 2.1).
    let end = usize::from(item.at) + usize::from(item.len);
    let changed = block.changed.get(end - size..end).is_some_and(|c| c.contains(&true));
    (register && changed).then_some(end - size..end)
}

enum Way {
    /// MOV of that many bytes.
    Load(usize),
    /// Another operation; its opcode with the operand in memory.
    Operate(u8),
}

#[rustfmt::skip]
fn way(code: Code) -> Option<Way> {
    use Code as C;
    Some(match code {
        C::Mov_r32_imm32 | C::Mov_rm32_imm32 => Way::Load(4),
        C::Mov_r64_imm64 => Way::Load(8),
        C::Add_EAX_imm32 | C::Add_rm32_imm32 => Way::Operate(0x03),
        C::Or_EAX_imm32  | C::Or_rm32_imm32  => Way::Operate(0x0b),
        C::Adc_EAX_imm32 | C::Adc_rm32_imm32 => Way::Operate(0x13),
        C::Sbb_EAX_imm32 | C::Sbb_rm32_imm32 => Way::Operate(0x1b),
        C::And_EAX_imm32 | C::And_rm32_imm32 => Way::Operate(0x23),
        C::Sub_EAX_imm32 | C::Sub_rm32_imm32 => Way::Operate(0x2b),
        C::Xor_EAX_imm32 | C::Xor_rm32_imm32 => Way::Operate(0x33),
        C::Cmp_EAX_imm32 | C::Cmp_rm32_imm32 => Way::Operate(0x3b),
        _ => return None,
    })
}

/// Is it one for which [`load_immediate`] may say yes?
pub(crate) fn may_load_immediate(iced: &Instruction) -> bool {
    way(iced.code()).is_some() && iced.op0_kind() == OpKind::Register
}

/// An instruction whose immediate operand is not what it will be: loads it. False if it is to be copied like any other.
pub(crate) fn load_immediate(l: &mut Lowering<'_>, item: &Item) -> bool {
    let Some(place) = l.block.compared.then(|| loose(l.block, item)).flatten() else { return false };
    let Some(r) = Gpr::from_iced(item.iced.op0_register()) else { return false };
    let address = l.block.start.wrapping_add(place.start as u64);
    let operate = match way(item.iced.code()) {
        Some(Way::Operate(opcode)) => Some(opcode),
        _ => None,
    };
    // The register itself may hold the address where it is only written.
    let scratch = match operate {
        _ if l.home == Home::Slot => Gpr::R11,
        None => r,
        Some(_) if r == Gpr::Rcx => Gpr::Rdx,
        Some(_) => Gpr::Rcx,
    };
    let kept = l.home == Home::Register;
    let save = gs(slot::TMP);
    let (r, s) = (r as u8, scratch as u8);
    l.mark(What::At(item.at));
    if kept {
        dynasm!(l.e; .arch x64; gs mov [save], Rq(s));
        l.mark(What::Undo(item.at, scratch));
    }
    load_constant(l, scratch, address);
    match operate {
        None if place.len() == 8 => dynasm!(l.e; .arch x64; mov Rq(r), [Rq(s)]),
        None => dynasm!(l.e; .arch x64; mov Rd(r), [Rq(s)]),
        // REX.R and REX.B for R8 to R15; ModRM with a base register that needs neither SIB nor displacement.
        Some(opcode) => l.e.bytes.extend_from_slice(&[0x40 | (r >> 3) << 2 | s >> 3, opcode, (r & 7) << 3 | s & 7]),
    }
    if kept && operate.is_some() {
        l.mark(What::Undo(item.at + u16::from(item.len), scratch));
        dynasm!(l.e; .arch x64; gs mov Rq(s), [save]);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_the_range_and_no_more() {
        for start in 0..3 {
            for len in 0..40 {
                let mut seen = vec![false; len];
                for (at, size) in pieces(start..start + len) {
                    assert!(matches!(size, 1 | 2 | 4) && at >= start);
                    seen[at - start..][..size].fill(true);
                }
                assert!(seen.iter().all(|s| *s), "{start} {len}");
            }
        }
    }
}
