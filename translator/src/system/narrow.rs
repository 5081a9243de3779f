//! 32-bit code with flat segments: when it is translated, and how its instructions differ from those of 64-bit code (SDM 1 3.6, 2A 2.2.1.2).
//!
//! The guest's registers stay zero-extended, so that they are the host's: each entry into the code looks at their upper halves, and 32-bit
//! code cannot set them. An address that is one register and a small displacement is the host's 64-bit sum; where that differs from the
//! 32-bit sum no page of a guest outside IA-32e mode has its address, and the interpreter goes on. All others are cut to 32 bits.

use crate::route::{Route, Routes};
use crate::system::Mode;
use crate::system::access::{Access, Segment};
use crate::system::block::{Way, copied, is_bit_string, is_x87, native, operand, operand_of};
use bivisor_emulator::cpu::{Attr, CpuState};
use bivisor_emulator::isa::{Class, Gpr, Seg, facts};
use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

/// Displacements that are added to a register in 64 bits.
const NEAR: i32 = 1 << 20;
/// Code is left to the interpreter from here on: it could run into the end of the address space.
const END: u64 = 0xffff_f000;

/// What [`Mode`] says of 32-bit code with flat CS, SS, DS and ES and zero-extended registers; `None`: the state has no such code.
#[inline]
pub(super) fn segments(s: &CpuState) -> Option<u16> {
    let kind = match s.mode() {
        bivisor_emulator::cpu::Mode::Protected32 => Mode::NARROW,
        bivisor_emulator::cpu::Mode::Compat32 => Mode::NARROW | Mode::COMPAT,
        _ => return None,
    };
    // Data that can be written, of all offsets.
    let data = |g: Seg| {
        let asked = Attr::UNUSABLE | Attr::S | Attr::CODE | Attr::EXPAND_DOWN | Attr::WRITABLE;
        let s = s.segment(g);
        s.limit == u32::MAX && s.attr & asked == Attr::S | Attr::WRITABLE
    };
    let flat = |g: Seg| data(g) && s.segment(g).base == 0;
    let cs = s.segment(Seg::Cs);
    let plain = cs.base == 0
        && cs.limit == u32::MAX
        && flat(Seg::Ss)
        && s.segment(Seg::Ss).attr.contains(Attr::DB)
        && flat(Seg::Ds)
        && flat(Seg::Es)
        && s.gpr[..8].iter().fold(0, |all, v| all | v) >> 32 == 0
        && s.rip < END;
    let fs = if data(Seg::Fs) { Mode::FS } else { 0 };
    // Kernels keep their users' GS.
    let gs = if s.cpl() == 3 && data(Seg::Gs) { Mode::GS } else { 0 };
    plain.then_some(kind | fs | gs)
}

/// Gives an instruction that has an encoding of its own outside 64-bit mode the general one.
pub(super) fn widen(iced: &mut Instruction) {
    use Code as C;
    let code = match iced.code() {
        C::Inc_r16 => C::Inc_rm16,
        C::Inc_r32 => C::Inc_rm32,
        C::Dec_r16 => C::Dec_rm16,
        C::Dec_r32 => C::Dec_rm32,
        C::Mov_AL_moffs8 => C::Mov_r8_rm8,
        C::Mov_AX_moffs16 => C::Mov_r16_rm16,
        C::Mov_EAX_moffs32 => C::Mov_r32_rm32,
        C::Mov_moffs8_AL => C::Mov_rm8_r8,
        C::Mov_moffs16_AX => C::Mov_rm16_r16,
        C::Mov_moffs32_EAX => C::Mov_rm32_r32,
        _ => return,
    };
    iced.set_code(code);
}

fn has_memory(iced: &Instruction) -> bool {
    (0..iced.op_count()).any(|i| iced.op_kind(i) == OpKind::Memory)
}

/// Is an operand where only the interpreter gets at it: at a 16-bit address, in CS, in a segment with a limit?
fn is_elsewhere(iced: &Instruction, mode: Mode) -> bool {
    if !has_memory(iced) || iced.mnemonic() == Mnemonic::Nop {
        return false;
    }
    let small = |r: Register| r != Register::None && !r.is_gpr32();
    let segment = match iced.memory_segment() {
        Register::FS => mode.has_segment(false),
        Register::GS => mode.has_segment(true),
        Register::CS => iced.mnemonic() == Mnemonic::Lea,
        _ => true,
    };
    small(iced.memory_base()) || small(iced.memory_index()) || iced.memory_displ_size() == 2 || !segment
}

/// Has 64-bit code no such instruction?
fn is_gone(iced: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        iced.mnemonic(),
        M::Aaa
            | M::Aad
            | M::Aam
            | M::Aas
            | M::Daa
            | M::Das
            | M::Salc
            | M::Into
            | M::Bound
            | M::Arpl
            | M::Les
            | M::Lds
            | M::Lss
            | M::Lfs
            | M::Lgs
            | M::Xlatb
            // There they clear sixteen registers.
            | M::Vzeroall
            | M::Vzeroupper
            // Zen 4 has no form with W, which iced does not tell apart.
            | M::Vpinsrd
            | M::Vpextrd
    ) || matches!(
        iced.code(),
        Code::Add_rm8_imm8_82
            | Code::Or_rm8_imm8_82
            | Code::Adc_rm8_imm8_82
            | Code::Sbb_rm8_imm8_82
            | Code::And_rm8_imm8_82
            | Code::Sub_rm8_imm8_82
            | Code::Xor_rm8_imm8_82
            | Code::Cmp_rm8_imm8_82
    )
}

/// Can 64-bit code do what the instruction does, with operands that are not the interpreter's?
pub(super) fn has(iced: &Instruction, mode: Mode) -> bool {
    !is_elsewhere(iced, mode) && !is_gone(iced)
}

/// How an instruction is lowered that only 32-bit code has, or that is another in 64-bit code.
pub(super) fn way(iced: &Instruction, mode: Mode, routes: &Routes) -> Way {
    let code = iced.code();
    let kernel = !mode.user();
    match code {
        Code::Pushfd => return Way::PushFlags,
        Code::Popfd => return Way::PopFlags,
        Code::Push_r32 | Code::Pushd_imm8 | Code::Pushd_imm32 => return Way::Push,
        Code::Push_rm32 if iced.op0_kind() == OpKind::Memory => return Way::PushMemory,
        Code::Pop_r32 => return Way::Pop,
        Code::Leaved => return Way::Leave,
        Code::Retnd | Code::Retnd_imm16 => {
            return Way::Return(if iced.op_count() == 0 { 0 } else { iced.immediate16() });
        }
        Code::Lea_r32_m if iced.memory_base() == Register::None && iced.memory_index() == Register::None => {
            return Way::Constant(iced.memory_displacement64() & 0xffff_ffff);
        }
        _ => {}
    }
    let port = matches!(iced.mnemonic(), Mnemonic::In | Mnemonic::Out);
    if port && kernel && !mode.is_counted() && mode.vectors() == 0 {
        return Way::Port;
    }
    let near = |w| if iced.op0_kind() == OpKind::NearBranch32 { w } else { Way::Step };
    match routes.base(code) {
        Route::Conditional => near(Way::Conditional),
        Route::Counted if counts_in_ecx(code) => near(Way::Counted),
        Route::Jump => near(Way::Jump),
        Route::Call => near(Way::Call),
        Route::JumpIndirect if code == Code::Jmp_rm32 => Way::JumpIndirect,
        Route::CallIndirect if code == Code::Call_rm32 && iced.op0_register() != Register::ESP => Way::CallIndirect,
        Route::Copy if facts(code).class == Class::String => string(iced, mode),
        // 64-bit code has SSE instead.
        Route::Copy if is_x87(iced) && has_memory(iced) && has_own_data(iced) => {
            if native(iced, mode) {
                Way::Memory
            } else {
                Way::Asleep
            }
        }
        Route::Copy => copied(iced, facts(code).class, mode),
        _ => Way::Step,
    }
}

/// An x87 instruction that loads, stores or computes with its operand in memory, or a control word.
fn has_own_data(iced: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        iced.mnemonic(),
        M::Fld
            | M::Fst
            | M::Fstp
            | M::Fild
            | M::Fist
            | M::Fistp
            | M::Fisttp
            | M::Fadd
            | M::Fsub
            | M::Fsubr
            | M::Fmul
            | M::Fdiv
            | M::Fdivr
            | M::Fcom
            | M::Fcomp
            | M::Fiadd
            | M::Fisub
            | M::Fisubr
            | M::Fimul
            | M::Fidiv
            | M::Fidivr
            | M::Ficom
            | M::Ficomp
            | M::Fldcw
            | M::Fnstcw
            | M::Fnstsw
    )
}

fn counts_in_ecx(code: Code) -> bool {
    matches!(code, Code::Loop_rel8_32_ECX | Code::Loope_rel8_32_ECX | Code::Loopne_rel8_32_ECX | Code::Jecxz_rel8_32)
}

/// MOVS, STOS and LODS upwards, with 32-bit addresses.
fn string(iced: &Instruction, mode: Mode) -> Way {
    let wide = (0..iced.op_count()).any(|i| matches!(iced.op_kind(i), OpKind::MemorySegESI | OpKind::MemoryESEDI));
    let based = matches!(iced.memory_segment(), Register::FS | Register::GS | Register::CS);
    if mode.down() || !wide || based || iced.has_repne_prefix() {
        return Way::Step;
    }
    let len = iced.memory_size().size() as u8;
    match (iced.mnemonic(), iced.has_rep_prefix()) {
        (Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd, false) => Way::Stos(len),
        (Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd, true) => Way::RepStos(len),
        (Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd, false) => Way::Lods(len),
        (Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd, false) => Way::Movs(len),
        (Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd, true) => Way::RepMovs(len),
        _ => Way::Step,
    }
}

/// Four bytes of the stack, or of what another register points to.
pub(super) fn word(mode: Mode, base: Gpr, disp: i64, write: bool) -> Access {
    Access { base: Some(base), len: 4, narrow: mode.is_compat(), ..Access::stack(disp, write) }
}

/// Its segment, and its address as a sum that is right: see the module.
fn flat(iced: &Instruction, mode: Mode, a: Access) -> Access {
    let segment = match iced.memory_segment() {
        Register::FS => Segment::Fs32,
        Register::GS => Segment::Gs32,
        _ => Segment::Flat,
    };
    let disp = a.disp as u32;
    let near = disp as i32;
    let bit = if is_bit_string(iced) { Gpr::from_iced(iced.op1_register()) } else { None };
    let a = Access { segment, bit, ..a };
    let one = a.base.is_some() && a.index.is_none() && segment == Segment::Flat && bit.is_none();
    if one && !mode.is_compat() && (-NEAR..=NEAR).contains(&near) {
        Access { disp: near.into(), narrow: false, ..a }
    } else {
        Access { disp: disp.into(), narrow: true, ..a }
    }
}

/// The access of an instruction, and how it is lowered if that cannot be done.
pub(super) fn access(
    iced: &Instruction,
    way: Way,
    mode: Mode,
    factory: &mut InstructionInfoFactory,
) -> (Way, Option<Access>) {
    let found = match way {
        Way::Memory | Way::PushMemory => operand(iced, factory).map(|a| flat(iced, mode, a)),
        Way::JumpIndirect | Way::CallIndirect if iced.op0_kind() == OpKind::Memory => {
            operand_of(iced, 4, false).map(|a| flat(iced, mode, a))
        }
        Way::Push | Way::PushFlags => Some(word(mode, Gpr::Rsp, -4, true)),
        Way::Pop | Way::PopFlags | Way::Return(_) => Some(word(mode, Gpr::Rsp, 0, false)),
        Way::Leave => Some(word(mode, Gpr::Rbp, 0, false)),
        way => return (way, None),
    };
    match found {
        Some(a) if way == Way::PushMemory && a.write => (Way::Step, None),
        Some(a) => (way, Some(a)),
        None => (Way::Step, None),
    }
}

/// A register that only has a constant added.
pub(super) fn adds(iced: &Instruction, way: Way) -> Option<(Gpr, i64)> {
    match way {
        Way::Push | Way::PushFlags | Way::PushMemory => Some((Gpr::Rsp, -4)),
        Way::Pop if iced.op0_register() != Register::ESP => Some((Gpr::Rsp, 4)),
        Way::PopFlags => Some((Gpr::Rsp, 4)),
        Way::Plain => constant_add(iced),
        _ => None,
    }
}

/// ADD, SUB, LEA, INC and DEC of one 32-bit register by a constant.
fn constant_add(iced: &Instruction) -> Option<(Gpr, i64)> {
    let r = iced.op0_register();
    if iced.op_count() == 0 || iced.op0_kind() != OpKind::Register || !r.is_gpr32() {
        return None;
    }
    let immediate = || {
        let kind = iced.op1_kind();
        matches!(kind, OpKind::Immediate8to32 | OpKind::Immediate32).then(|| i64::from(iced.immediate(1) as i32))
    };
    let n = match iced.mnemonic() {
        Mnemonic::Add => immediate()?,
        Mnemonic::Sub => -immediate()?,
        Mnemonic::Inc => 1,
        Mnemonic::Dec => -1,
        Mnemonic::Lea if iced.memory_base() == r && iced.memory_index() == Register::None => {
            i64::from(iced.memory_displacement64() as i32)
        }
        _ => return None,
    };
    Gpr::from_iced(r).map(|g| (g, n))
}
