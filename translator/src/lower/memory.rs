//! Memory operands: what becomes of them under each memory model. The only place that knows.
//!
//! In the flat model a guest address is the host's: operands stay as they are. Only RIP-relative ones (SDM 2A 2.2.1.6) must be changed,
//! because the code is elsewhere: a new displacement if the target is within reach of the code cache, an absolute one if it lies in
//! the low 2 GiB, else a register is borrowed for the address and its value kept in a slot.

// dynasm's dynamic registers convert a u8 to itself.
#![allow(clippy::useless_conversion)]

use crate::block::Item;
use crate::emit::{gs, slot};
use crate::lower::{Depends, Lowering, bytes};
use crate::marks::What;
use bivisor_emulator::isa::{Gpr, Width};
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Code, Decoder, DecoderOptions, Encoder, InstructionInfoFactory, Mnemonic, OpKind, Register};

/// May the instruction's bytes be copied as they are?
pub(crate) fn can_stay(_l: &Lowering<'_>, item: &Item) -> bool {
    !item.iced.is_ip_rel_memory_operand()
}

/// Emits an instruction whose operand is RIP-relative. False if there is no way.
pub(crate) fn rewrite(l: &mut Lowering<'_>, item: &Item) -> bool {
    let target = item.iced.ip_rel_memory_address();
    if item.iced.mnemonic() == Mnemonic::Lea {
        return lea(l, item, target);
    }
    if item.iced.memory_base() == Register::RIP && (near(l, item, target) || low(l, item, target)) {
        return true;
    }
    borrow(l, item, target)
}

/// LEA of a constant is a load of a constant.
fn lea(l: &mut Lowering<'_>, item: &Item, target: u64) -> bool {
    let target = match item.iced.code() {
        Code::Lea_r64_m => target,
        Code::Lea_r32_m => Width::D.cut(target),
        _ => return false,
    };
    let Some(r) = Gpr::from_iced(item.iced.op0_register()) else { return false };
    l.mark(What::At(item.at));
    load_constant(l, r, target);
    true
}

/// `mov r, imm` of a guest address in its shortest form; flags stay.
pub(crate) fn load_constant(l: &mut Lowering<'_>, r: Gpr, v: u64) {
    let r = r as u8;
    if let Ok(v) = u32::try_from(v) {
        dynasm!(l.e; .arch x64; mov Rd(r), v as i32);
    } else if let Ok(v) = i32::try_from(v as i64) {
        dynasm!(l.e; .arch x64; mov Rq(r), v);
    } else {
        dynasm!(l.e; .arch x64; mov Rq(r), QWORD v as i64);
        l.relocation(l.e.len() - 8, Depends::Guest);
        return;
    }
    l.relocation(0, Depends::Fixed);
}

/// Where the 32-bit displacement of the RIP-relative operand is.
fn displacement_at(bytes: &[u8]) -> Option<usize> {
    let mut d = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE);
    let i = d.decode();
    let c = d.get_constant_offsets(&i);
    (c.displacement_size() == 4).then_some(c.displacement_offset())
}

/// The same bytes with another displacement, if the target is within 2 GiB of the code.
fn near(l: &mut Lowering<'_>, item: &Item, target: u64) -> bool {
    let after = l.e.here().wrapping_add(u64::from(item.len));
    let Ok(disp) = i32::try_from(target.wrapping_sub(after) as i64) else { return false };
    let block = l.block;
    let bytes = block.code(item);
    let Some(at) = displacement_at(bytes) else { return false };
    l.mark(What::Copied(item.at));
    let start = l.e.len();
    l.e.bytes.extend_from_slice(bytes);
    l.e.set_u32(start + at, disp as u32);
    l.relocation(start + at, Depends::Distance);
    true
}

/// An absolute address in the low 2 GiB: ModRM and SIB say "no base, no index" instead of "RIP".
fn low(l: &mut Lowering<'_>, item: &Item, target: u64) -> bool {
    let Ok(disp) = i32::try_from(target as i64) else { return false };
    let block = l.block;
    let bytes = block.code(item);
    let Some(at) = displacement_at(bytes) else { return false };
    // An X bit in REX, VEX or EVEX, meaningless before, would now name an index register: compilers never set it.
    if at == 0 || bytes::has_bit(bytes, 2) || item.len >= 15 {
        return false;
    }
    l.mark(What::At(item.at));
    l.e.bytes.extend_from_slice(&bytes[..at - 1]);
    l.e.push((bytes[at - 1] & 0x38) | 4);
    l.e.push(0x25);
    l.e.push_i32(disp);
    l.relocation(0, Depends::Fixed);
    l.e.bytes.extend_from_slice(&bytes[at + 4..]);
    true
}

/// A register that the instruction does not touch holds the address while it runs.
fn borrow(l: &mut Lowering<'_>, item: &Item, target: u64) -> bool {
    let Some(r) = free_register(item) else { return false };
    let reg = r as u8;
    let save = gs(slot::TMP);
    l.mark(What::At(item.at));
    dynasm!(l.e; .arch x64; gs mov [save], Rq(reg));
    l.mark(What::Undo(item.at, r));
    load_constant(l, r, target);
    let mut iced = item.iced;
    iced.set_memory_base(r.to_iced());
    iced.set_memory_displacement64(0);
    iced.set_memory_displ_size(0);
    let by_hand = displacement_at(l.block.code(item))
        .is_some_and(|at| bytes::with_base(&mut l.e.bytes, l.block.code(item), at, r));
    if !by_hand && !encode(l, &iced) {
        return false;
    }
    // It may have set what has a home.
    l.home = l.then;
    // A load into the borrowed register itself needs no restoring.
    l.mark(What::Undo(item.at + u16::from(item.len), r));
    dynasm!(l.e; .arch x64; gs mov Rq(reg), [save]);
    true
}

fn free_register(item: &Item) -> Option<Gpr> {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(&item.iced);
    // RSP has no place in a base-only operand without SIB trouble and is the guest's stack. A register numbered 8 and up would need
    // a REX prefix, which AH to BH do not stand.
    [Gpr::Rax, Gpr::Rcx, Gpr::Rdx, Gpr::Rbx, Gpr::Rsi, Gpr::Rdi]
        .into_iter()
        .find(|r| !info.used_registers().iter().any(|u| u.register().full_register() == r.to_iced()))
}

/// Appends a re-encoded instruction.
fn encode(l: &mut Lowering<'_>, iced: &iced_x86::Instruction) -> bool {
    let mut encoder = Encoder::new(64);
    if encoder.encode(iced, 0).is_err() {
        return false;
    }
    l.e.bytes.extend_from_slice(&encoder.take_buffer());
    true
}

/// Loads the 64-bit operand of an indirect branch into R11, which is free unless the operand needs it.
pub(crate) fn load_target(l: &mut Lowering<'_>, item: &Item) -> bool {
    let mut load = item.iced;
    // The operand moves from first to second place.
    match item.iced.op0_kind() {
        OpKind::Register => {
            let r = item.iced.op0_register().number() as u8;
            dynasm!(l.e; .arch x64; mov r11, Rq(r));
            return true;
        }
        OpKind::Memory if item.iced.is_ip_rel_memory_operand() => {
            let target = item.iced.ip_rel_memory_address();
            // The load in its RIP-relative form is 7 bytes long.
            let after = l.e.here() + 7;
            if let Ok(d) = i32::try_from(target.wrapping_sub(after) as i64) {
                l.e.bytes.extend_from_slice(&[0x4c, 0x8b, 0x1d]);
                l.e.push_i32(d);
                l.relocation(l.e.len() - 4, Depends::Distance);
            } else if let Ok(d) = i32::try_from(target as i64) {
                dynasm!(l.e; .arch x64; mov r11, [d]);
                l.relocation(0, Depends::Fixed);
            } else {
                load_constant(l, Gpr::R11, target);
                dynasm!(l.e; .arch x64; mov r11, [r11]);
            }
            return true;
        }
        OpKind::Memory => {}
        _ => return false,
    }
    if bytes::load_of_branch(&mut l.e.bytes, l.block.code(item), Gpr::R11) {
        return true;
    }
    load.set_code(Code::Mov_r64_rm64);
    load.set_op0_kind(OpKind::Register);
    load.set_op0_register(Register::R11);
    load.set_op1_kind(OpKind::Memory);
    load.set_has_repne_prefix(false);
    load.set_has_repe_prefix(false);
    if load.segment_prefix() == Register::DS {
        // NOTRACK is the same byte.
        load.set_segment_prefix(Register::None);
    }
    encode(l, &load)
}
