//! One decoded instruction with its operands resolved: what the interpreter caches and the translator lowers.
//!
//! Nothing in it depends on where the instruction stands: branch targets and RIP-relative addresses are kept as displacements, so
//! that one decoded copy serves every mapping of a physical page.

use crate::isa::decode::is_amd;
use crate::isa::{Facts, Gpr, Seg, Width, facts};
use iced_x86::{Code, CodeSize, Instruction, OpKind, Register};

/// What a memory operand's address starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// No base register.
    None,
    /// A general-purpose register.
    Reg(Gpr),
    /// The address of the next instruction (64-bit mode).
    Rip,
}

/// A memory operand: `seg:[base + (index << scale) + disp]`, the sum cut to `address` width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemRef {
    /// The segment, override included.
    pub seg: Seg,
    /// Base.
    pub base: Base,
    /// Index register; `None` for vector-indexed forms (gather, scatter), whose handler asks iced.
    pub index: Option<Gpr>,
    /// Log2 of the scale: 0 to 3.
    pub scale: u8,
    /// Address width: W, D or Q.
    pub address: Width,
    /// Displacement, sign-extended; relative to the next instruction if the base is RIP.
    pub disp: u64,
}

/// One operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// There is none.
    None,
    /// A general-purpose register, its low bits in the operand's width.
    Reg(Gpr),
    /// AH, CH, DH or BH: bits 15:8 of RAX, RCX, RDX, RBX.
    HighByte(Gpr),
    /// An immediate, sign- or zero-extended to 64 bits as the manual says. For near branches: the target minus the address of the
    /// next instruction.
    Imm(u64),
    /// Memory, explicit. Implicit string operands are `Other`.
    Mem(MemRef),
    /// Segment, control, debug or vector register, far pointer, implicit string operand: the handler asks iced.
    Other,
}

/// A decoded instruction.
#[derive(Clone, Copy, Debug)]
pub struct Insn {
    /// iced's view, decoded at address 0.
    pub iced: Instruction,
    /// Length in bytes.
    pub len: u8,
    /// Width of the operation: of operand 0 where it has one; of the stack slot for PUSH, POP, PUSHF ...; else the operand size.
    pub width: Width,
    /// The first three explicit operands.
    pub ops: [Operand; 3],
    /// Their widths, see [`Insn::op_width`].
    pub op_widths: [Option<Width>; 3],
    /// For the engine that keeps it: 0, or the number by which its native unit finds the thunk.
    pub hint: u16,
    /// Its row in the facts table.
    pub facts: &'static Facts,
}

impl Insn {
    /// Resolves the operands of `iced`, which must have been decoded with its address set to 0.
    pub fn new(iced: Instruction) -> Insn {
        let mut ops = [Operand::None; 3];
        for (i, op) in ops.iter_mut().enumerate().take(iced.op_count() as usize) {
            *op = operand(&iced, i as u32);
        }
        let op_widths = std::array::from_fn(|i| op_width(&iced, i as u32));
        Insn { len: iced.len() as u8, width: width(&iced), ops, op_widths, hint: 0, facts: facts(iced.code()), iced }
    }

    /// Width of operand `i`: it differs from [`Insn::width`] for MOVZX, MOVSX, shift counts and the like. `None` if it is no
    /// integer register and no memory operand of 1, 2, 4 or 8 bytes.
    #[inline(always)]
    pub fn op_width(&self, i: u32) -> Option<Width> {
        match self.op_widths.get(i as usize) {
            Some(w) => *w,
            None => op_width(&self.iced, i),
        }
    }

    /// The segment of a string instruction's source or of an implicit operand that a prefix can change: DS, but in 64-bit code only FS
    /// and GS count (SDM 1 3.7.4).
    pub fn implicit_segment(&self) -> Seg {
        match Seg::from_iced(self.iced.memory_segment()) {
            Some(seg @ (Seg::Fs | Seg::Gs)) => seg,
            Some(seg) if self.iced.code_size() != CodeSize::Code64 => seg,
            _ => Seg::Ds,
        }
    }

    /// The memory operand, if there is an explicit one.
    pub fn mem(&self) -> Option<&MemRef> {
        self.ops.iter().find_map(|o| match o {
            Operand::Mem(m) => Some(m),
            _ => None,
        })
    }

    /// For a near branch with an immediate target: target minus address of the next instruction.
    pub fn branch_displacement(&self) -> Option<u64> {
        match (self.iced.op0_kind(), self.ops[0]) {
            (OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64, Operand::Imm(d)) => Some(d),
            _ => None,
        }
    }
}

/// Bytes that the explicit memory operand has. MOVSXD of 16 bits reads two by Intel's manual, four on AMD's CPUs (measured on Zen 4).
pub fn memory_len(iced: &Instruction) -> usize {
    if iced.code() == Code::Movsxd_r16_rm16 && is_amd() { 4 } else { iced.memory_size().size() }
}

fn op_width(iced: &Instruction, i: u32) -> Option<Width> {
    if i >= iced.op_count() {
        return None;
    }
    match iced.op_kind(i) {
        OpKind::Register if iced.op_register(i).is_gpr() => Width::from_bytes(iced.op_register(i).size()),
        OpKind::Memory => Width::from_bytes(memory_len(iced)),
        _ => None,
    }
}

fn width(iced: &Instruction) -> Width {
    if let Some(w) = width_by_code(iced.code()) {
        return w;
    }
    match iced.op0_kind() {
        OpKind::NearBranch16 => return Width::W,
        OpKind::NearBranch32 => return Width::D,
        OpKind::NearBranch64 => return Width::Q,
        _ => {}
    }
    // For PUSHF, PUSH imm and the like iced has no operand to ask: the stack slot says it.
    let stack = iced.stack_pointer_increment().unsigned_abs() as usize;
    if iced.is_stack_instruction()
        && let Some(w) = Width::from_bytes(stack)
    {
        return w;
    }
    op_width(iced, 0).or_else(|| Width::from_bytes(iced.memory_size().size())).unwrap_or_else(|| code_size(iced))
}

/// Where neither an operand nor the change of RSP is one slot wide.
#[rustfmt::skip]
fn width_by_code(code: Code) -> Option<Width> {
    match code {
        Code::Retnw | Code::Retnw_imm16 | Code::Enterw_imm16_imm8 | Code::Leavew | Code::Pushaw | Code::Popaw => Some(Width::W),
        Code::Retnd | Code::Retnd_imm16 | Code::Enterd_imm16_imm8 | Code::Leaved | Code::Pushad | Code::Popad => Some(Width::D),
        Code::Retnq | Code::Retnq_imm16 | Code::Enterq_imm16_imm8 | Code::Leaveq => Some(Width::Q),
        _ => None,
    }
}

fn code_size(iced: &Instruction) -> Width {
    match iced.code_size() {
        CodeSize::Code16 => Width::W,
        CodeSize::Code64 => Width::Q,
        _ => Width::D,
    }
}

fn operand(iced: &Instruction, i: u32) -> Operand {
    match iced.op_kind(i) {
        OpKind::Register => match iced.op_register(i) {
            Register::AH => Operand::HighByte(Gpr::Rax),
            Register::CH => Operand::HighByte(Gpr::Rcx),
            Register::DH => Operand::HighByte(Gpr::Rdx),
            Register::BH => Operand::HighByte(Gpr::Rbx),
            r => Gpr::from_iced(r).map_or(Operand::Other, Operand::Reg),
        },
        OpKind::Immediate8
        | OpKind::Immediate8_2nd
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Operand::Imm(iced.immediate(i)),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => Operand::Imm(displacement(iced)),
        OpKind::Memory => Operand::Mem(mem_ref(iced)),
        _ => Operand::Other,
    }
}

/// Decoded at 0, a branch to `target` jumps `target - len` past the next instruction, in the width of the operand.
fn displacement(iced: &Instruction) -> u64 {
    let raw = iced.near_branch_target().wrapping_sub(iced.len() as u64);
    match iced.op0_kind() {
        OpKind::NearBranch16 => Width::W.sign_extend(raw),
        OpKind::NearBranch32 => Width::D.sign_extend(raw),
        _ => raw,
    }
}

fn mem_ref(iced: &Instruction) -> MemRef {
    let base = iced.memory_base();
    let seg = match Seg::from_iced(iced.memory_segment()).expect("iced names a segment for every memory operand") {
        // SDM 1 3.7.4: in 64-bit code the prefixes of ES, CS, SS and DS do nothing: #SS or #GP goes by the base register.
        Seg::Fs => Seg::Fs,
        Seg::Gs => Seg::Gs,
        _ if iced.code_size() == CodeSize::Code64 => match base.full_register() {
            Register::RSP | Register::RBP => Seg::Ss,
            _ => Seg::Ds,
        },
        seg => seg,
    };
    let index = Gpr::from_iced(iced.memory_index());
    let scale = iced.memory_index_scale().trailing_zeros() as u8;
    let mut disp = iced.memory_displacement64();
    let (base, address) = match base {
        Register::RIP | Register::EIP => {
            disp = disp.wrapping_sub(iced.len() as u64);
            (Base::Rip, if base == Register::RIP { Width::Q } else { Width::D })
        }
        r if r.is_gpr() => {
            (Base::Reg(Gpr::from_iced(r).expect("is_gpr")), Width::from_bytes(r.size()).expect("a register"))
        }
        _ => (Base::None, address_width(iced)),
    };
    MemRef { seg, base, index, scale, address, disp }
}

/// Without a base register the index or the displacement says the address size.
fn address_width(iced: &Instruction) -> Width {
    if iced.memory_index().is_gpr() {
        return Width::from_bytes(iced.memory_index().size()).expect("a register");
    }
    match (iced.memory_displ_size(), iced.code_size()) {
        (2, _) => Width::W,
        (8, _) => Width::Q,
        (4, CodeSize::Code64) if iced.memory_displacement64() > u64::from(u32::MAX) => Width::Q,
        (4, _) => Width::D,
        (_, CodeSize::Code16) => Width::W,
        (_, CodeSize::Code64) => Width::Q,
        _ => Width::D,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::decode;

    /// #SS or #GP for a non-canonical address in 64-bit code, as measured on Zen 4.
    #[test]
    fn segments_of_memory_operands() {
        let rows: [(&[u8], Seg); 8] = [
            (&[0x36, 0x8b, 0x00], Seg::Ds),       // ss:[rax]
            (&[0x3e, 0x8b, 0x45, 0x00], Seg::Ss), // ds:[rbp]
            (&[0x26, 0x8b, 0x04, 0x24], Seg::Ss), // es:[rsp]
            (&[0x8b, 0x44, 0x05, 0x00], Seg::Ss), // [rbp + rax]
            (&[0x8b, 0x04, 0x28], Seg::Ds),       // [rax + rbp]
            (&[0x64, 0x8b, 0x45, 0x00], Seg::Fs), // fs:[rbp]
            (&[0x8b, 0x05, 0, 0, 0, 0], Seg::Ds), // [rip]
            (&[0x41, 0x8b, 0x45, 0x00], Seg::Ds), // [r13]
        ];
        for (bytes, seg) in rows {
            assert_eq!(decode(bytes, 64).expect("MOV").mem().expect("memory").seg, seg, "{bytes:02x?}");
        }
        assert_eq!(decode(&[0x3e, 0x8b, 0x45, 0x00], 32).expect("MOV").mem().expect("memory").seg, Seg::Ds);
    }

    /// MOVSB with a prefix of SS, and of FS: measured on Zen 4 by which exception an address that is not canonical raises.
    #[test]
    fn segments_of_string_sources() {
        let rows: [(&[u8], u32, Seg); 3] =
            [(&[0x36, 0xa4], 64, Seg::Ds), (&[0x36, 0xa4], 32, Seg::Ss), (&[0x64, 0xa4], 64, Seg::Fs)];
        for (bytes, bitness, seg) in rows {
            assert_eq!(decode(bytes, bitness).expect("MOVSB").implicit_segment(), seg, "{bytes:02x?}");
        }
    }
}
