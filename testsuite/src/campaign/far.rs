//! Selectors and far pointers: what a case gives to instructions that look into descriptor tables (SDM 3A 3.4, 5.8; SDM 2A IRET).

use super::case::Case;
use crate::random::Random;
use bivisor_emulator::isa::{Gpr, Insn};
use iced_x86::{Code, MemorySize, Mnemonic as M, OpKind, Register};

/// What Linux has in its GDT, with all levels, and what it has not. Not the segment whose limit is the number of the CPU.
const SELECTORS: [u16; 30] = [
    0x2b, 0x2b, 0x2b, 0x2b, 0x33, 0x33, 0x33, 0x23, 0x28, 0x2a, 0x30, 0x31, 0x20, 0, 1, 3, 0x08, 0x10, 0x13, 0x18,
    0x1b, 0x40, 0x43, 0x50, 0x63, 0x80, 0xfff8, 0xffff, 0x2f, 0x04,
];
/// 64-bit user code: where a far transfer may really go. (32-bit code is another kind of case.)
const CODE: u16 = 0x33;
const DATA: u16 = 0x2b;

/// What an instruction does with a selector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Far {
    /// Takes it from this register, or from memory.
    Operand(Option<Gpr>),
    /// Takes a far pointer from memory, its offset of so many bytes: into a data segment register.
    Load(usize),
    /// The same, into CS.
    Branch(usize),
    /// Takes so many words of so many bytes from the stack: offset, selector, and for IRET flags, RSP and SS.
    Return(usize, usize),
}

/// What this instruction does with one; `None`: nothing.
pub fn of(i: &Insn) -> Option<Far> {
    let iced = &i.iced;
    let operand = |n: u32| match iced.op_kind(n) {
        OpKind::Register => Far::Operand(Gpr::from_iced(iced.op_register(n))),
        _ => Far::Operand(None),
    };
    Some(match (iced.mnemonic(), iced.code()) {
        (M::Lar | M::Lsl, _) => operand(1),
        (M::Verr | M::Verw, _) => operand(0),
        (M::Mov, _) if iced.op0_register().is_segment_register() => operand(1),
        (M::Pop, _) if iced.op0_register().is_segment_register() => Far::Operand(None),
        (M::Lfs | M::Lss, _) => Far::Load(offset(iced.memory_size())?),
        (M::Jmp | M::Call, _) if iced.op0_kind() == OpKind::Memory => Far::Branch(offset(iced.memory_size())?),
        (_, Code::Retfw | Code::Retfw_imm16) => Far::Return(2, 2),
        (_, Code::Retfd | Code::Retfd_imm16) => Far::Return(2, 4),
        (_, Code::Retfq | Code::Retfq_imm16) => Far::Return(2, 8),
        (_, Code::Iretw) => Far::Return(5, 2),
        (_, Code::Iretd) => Far::Return(5, 4),
        (_, Code::Iretq) => Far::Return(5, 8),
        _ => return None,
    })
}

fn offset(size: MemorySize) -> Option<usize> {
    match size {
        MemorySize::SegPtr16 => Some(2),
        MemorySize::SegPtr32 => Some(4),
        MemorySize::SegPtr64 => Some(8),
        _ => None,
    }
}

/// Does it load GS? That is the host thread's own while a case runs.
pub fn loads_gs(i: &Insn) -> bool {
    i.iced.op0_register() == Register::GS && matches!(i.iced.mnemonic(), M::Mov | M::Pop) || i.iced.mnemonic() == M::Lgs
}

fn data(r: &mut Random) -> u16 {
    r.one_of(&SELECTORS)
}

/// Of code, never 32-bit code.
fn code(r: &mut Random) -> u16 {
    let s = if r.once_in(3) { r.one_of(&SELECTORS) } else { CODE };
    if s & !3 == 0x20 { CODE } else { s }
}

/// A register operand's selector.
pub fn register(r: &mut Random, case: &mut Case, g: Gpr) {
    let high = case.gpr[g as usize] & !0xffff;
    case.gpr[g as usize] = high | u64::from(data(r));
}

/// Puts what the instruction reads at `at`; `to` is where a transfer goes.
pub fn content(r: &mut Random, far: Far, case: &mut Case, at: u64, to: u64) {
    let mut bytes = Vec::new();
    let mut put = |v: u64, n: usize| bytes.extend_from_slice(&v.to_le_bytes()[..n]);
    match far {
        Far::Operand(_) => put(data(r).into(), 2),
        Far::Load(n) => {
            put(r.edgy(), n);
            put(data(r).into(), 2);
        }
        Far::Branch(n) => {
            put(to, n);
            put(code(r).into(), 2);
        }
        Far::Return(words, n) => {
            put(to, n);
            put(code(r).into(), n);
            if words == 5 {
                // Flags without TF, whose trap comes after the next instruction, and without what leaves 64-bit code.
                put(r.next() & 0x20_ced5 | 2, n);
                put(r.edgy(), n);
                put(if r.once_in(4) { data(r) } else { DATA }.into(), n);
            }
        }
    }
    case.put(at, &bytes);
}
