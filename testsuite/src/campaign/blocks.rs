//! Blocks of several instructions for the host CPU and the engines: in a row, with branches over some of them, in loops.
//!
//! R12 to R15 point to memory all through a block, RSP to the stack, RBX counts the rounds of a loop; whatever else the instructions do
//! is thrown. A fault may be in the middle.

use super::encode;
use crate::case::disassembly;
use crate::random::Random;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::isa::{Class, Sensitivity, decode, facts};
use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, FlowControl, Instruction, InstructionInfoFactory, Mnemonic as M, OpAccess,
    OpCodeInfo, OpKind, Register,
};

/// Registers that point to data.
pub const POINTERS: [Register; 4] = [Register::R12, Register::R13, Register::R14, Register::R15];
/// The same in 16- and 32-bit code.
pub const POINTERS_BELOW_8: [Register; 2] = [Register::ESI, Register::EDI];
/// Most bytes of a block.
pub const ROOM: usize = 224;

/// A part of a block.
#[derive(Clone, Debug)]
pub struct Part {
    /// An instruction.
    pub bytes: Vec<u8>,
    /// The branch before it leads over so many parts; 0: there is none.
    pub skip: usize,
    /// The branch's condition, 0 to 15.
    pub condition: u8,
}

/// What blocks are made from.
pub struct Members {
    bits: u32,
    codes: Vec<&'static OpCodeInfo>,
    factory: InstructionInfoFactory,
}

impl Members {
    /// The instructions of a CPU that can stand in a block.
    pub fn new(model: &CpuModel) -> Members {
        Members::in_code(model, 64)
    }

    /// The same in code of so many bits.
    pub fn in_code(model: &CpuModel, bits: u32) -> Members {
        let may = |c: &Code| {
            let f = facts(*c);
            let op = c.op_code();
            let decodes = match bits {
                16 => op.mode16(),
                32 => op.mode32(),
                _ => op.mode64(),
            };
            decodes
                && op.is_instruction()
                && model.supports(*c)
                && super::reason_against(*c).is_none()
                && !super::never_decodes(*c)
                && matches!(f.class, Class::Integer | Class::Flags | Class::Native)
                && f.sensitivity == Sensitivity::Innocuous
                && !is_apart(c.mnemonic())
        };
        let codes = Code::values().filter(may).map(Code::op_code).collect();
        Members { bits, codes, factory: InstructionInfoFactory::new() }
    }

    /// A block's bytes.
    pub fn draw(&mut self, r: &mut Random) -> Vec<u8> {
        let mut parts: Vec<Vec<u8>> = Vec::new();
        let wanted = 2 + r.below(9) as usize;
        let mut len = 0;
        while parts.len() < wanted && len < ROOM - 40 {
            if let Some(bytes) = self.member(r) {
                len += bytes.len();
                parts.push(bytes);
            }
        }
        let skips: Vec<usize> = parts.iter().map(|_| if r.once_in(4) { 1 + r.below(3) as usize } else { 0 }).collect();
        let parts: Vec<Part> = parts
            .into_iter()
            .zip(skips)
            .map(|(bytes, skip)| Part { bytes, skip, condition: if skip > 0 { r.below(16) as u8 } else { 0 } })
            .collect();
        self.join(&parts, r.once_in(2))
    }

    /// Parts in a row, in a loop of RBX rounds or not.
    pub fn join(&self, parts: &[Part], in_loop: bool) -> Vec<u8> {
        let mut out = Vec::new();
        let size = |p: &Part| p.bytes.len() + if p.skip > 0 { 2 } else { 0 };
        for (i, part) in parts.iter().enumerate() {
            if part.skip > 0 {
                let behind: usize = parts[i + 1..parts.len().min(i + part.skip)].iter().map(size).sum();
                out.extend([0x70 | part.condition & 15, (part.bytes.len() + behind) as u8]);
            }
            out.extend_from_slice(&part.bytes);
        }
        if in_loop {
            // dec ebx (or BX); jnz to the start
            out.extend([0xff, 0xcb]);
            let size = if self.bits == 16 { 2 } else { 4 };
            let back = -(out.len() as i64 + 2 + size as i64);
            out.extend([0x0f, 0x85]);
            out.extend(&back.to_le_bytes()[..size]);
        }
        out
    }

    /// An instruction that can stand in a block, if the dice give one.
    pub fn member(&mut self, r: &mut Random) -> Option<Vec<u8>> {
        let bytes = encode::attempt_in(r, r.clone().one_of(&self.codes), self.bits);
        let insn = decode(&bytes, self.bits).ok()?;
        let mut iced = insn.iced;
        if !self.codes.iter().any(|o| o.code() == iced.code())
            || iced.flow_control() != FlowControl::Next
            || iced.is_vsib()
        {
            return None;
        }
        let explicit = (0..iced.op_count()).any(|k| iced.op_kind(k) == OpKind::Memory);
        let stack = matches!(iced.mnemonic(), M::Push | M::Pop);
        let far_bit =
            matches!(iced.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc) && iced.op1_kind() == OpKind::Register;
        if explicit && (far_bit || stack) || iced.segment_prefix() != Register::None {
            return None;
        }
        if explicit {
            iced.set_memory_base(self.pointer(r));
            iced.set_memory_index(Register::None);
            iced.set_memory_index_scale(1);
            iced.set_memory_displacement64(r.below(0x80).wrapping_sub(0x40) & (u64::MAX >> (64 - self.bits)));
            iced.set_memory_displ_size(self.bits / 8);
        }
        if !self.keeps(&iced, stack, explicit) {
            return None;
        }
        if !explicit {
            return Some(bytes[..usize::from(insn.len)].to_vec());
        }
        let mut encoder = Encoder::new(self.bits);
        encoder.encode(&iced, 0).ok()?;
        let out = encoder.take_buffer();
        // What the encoder makes of it must be the same instruction.
        let again = Decoder::new(self.bits, &out, DecoderOptions::NONE).decode();
        (again.code() == iced.code() && decode(&out, self.bits).is_ok()).then_some(out)
    }

    fn pointer(&self, r: &mut Random) -> Register {
        match self.bits {
            16 => r.one_of(&[Register::SI, Register::DI]),
            32 => r.one_of(&POINTERS_BELOW_8),
            _ => r.one_of(&POINTERS),
        }
    }

    /// Are the pointers, the stack and the counter still what they were, and is memory reached through the operand only?
    fn keeps(&mut self, iced: &Instruction, stack: bool, explicit: bool) -> bool {
        let pointers: Vec<Register> = match self.bits {
            64 => POINTERS.to_vec(),
            _ => POINTERS_BELOW_8.iter().map(|p| p.full_register()).collect(),
        };
        let info = self.factory.info(iced);
        let only = info.used_memory().iter().all(|m| explicit && pointers.contains(&m.base().full_register()) || stack);
        only && info.used_registers().iter().all(|u| {
            let full = u.register().full_register();
            let kept = pointers.contains(&full) || full == Register::RBX || full == Register::RSP && !stack;
            let reads =
                matches!(u.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess);
            !kept || reads
        }) && !(stack && iced.op0_register().full_register() == Register::RSP)
    }
}

/// What has cases of its own and would make a block all the same: control words, whole images, hints with bases of their own.
fn is_apart(m: M) -> bool {
    let name = format!("{m:?}");
    [
        "Xsave", "Xrstor", "Fxsave", "Fxrstor", "Fldenv", "Fnstenv", "Fnsave", "Frstor", "Ldmxcsr", "Vldmxcsr",
        "Fldcw", "Cl", "Enter", "Leave",
    ]
    .iter()
    .any(|p| name.starts_with(p))
        || matches!(m, M::Lea | M::Xlatb | M::Wrfsbase | M::Rdfsbase)
}

/// The bytes of each instruction of code of so many bits.
pub fn instructions(code: &[u8], bits: u32) -> impl Iterator<Item = &[u8]> {
    let mut rest = code;
    std::iter::from_fn(move || {
        let len = decode(rest, bits).map_or(1, |i| usize::from(i.len)).min(rest.len());
        let (first, behind) = rest.split_at(len);
        rest = behind;
        (!first.is_empty()).then_some(first)
    })
}

/// Some instructions of 64-bit code, disassembled.
pub fn text(code: &[u8]) -> String {
    text_in(code, 64)
}

/// The same in code of so many bits.
pub fn text_in(code: &[u8], bits: u32) -> String {
    instructions(code, bits).map(|i| disassembly(bits, i)).collect::<Vec<_>>().join("; ")
}
