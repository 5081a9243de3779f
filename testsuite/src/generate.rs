//! Random instructions with a state in which they mostly work: bytes that the decoder and the facts let pass, memory operands led into
//! the test world, sometimes to its edges.

use crate::random::Random;
use crate::world::{CODE, DATA, HOLE, ROM, STACK, Setup};
use bivisor_emulator::cpu::Rflags;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::isa::{Base, Class, Gpr, Insn, MemRef, Operand, Seg, Sensitivity, Width, decode, facts};
use iced_x86::{
    Decoder, DecoderOptions, Encoder, FlowControl, Instruction, InstructionInfoFactory, Mnemonic as M, OpAccess,
    OpKind, Register,
};

/// What a byte stream must not run into: INT3.
const FILLER: u8 = 0xcc;

/// One random instruction, or none if the dice gave something that a bare user-mode instruction cannot show.
pub fn setup(r: &mut Random, bitness: u32, model: &CpuModel) -> Option<Setup> {
    let mut bytes = [FILLER; 15];
    let n = head(r, bitness, &mut bytes);
    let iced = Decoder::with_ip(bitness, &bytes, CODE, DecoderOptions::NONE).decode();
    let mut setup = Setup {
        bitness,
        code: bytes.to_vec(),
        count: 1,
        gpr: std::array::from_fn(|_| r.edgy()),
        rflags: r.next() & (Rflags::STATUS | Rflags::DF).bits() | Setup::default_flags(bitness),
        image: Default::default(),
    };
    setup.gpr[Gpr::Rsp as usize] = STACK + 0x1000 + r.below(0x100);
    if iced.is_invalid() {
        // LOCK MOV CR0 is CR8 on AMD's CPUs (AltMovCr8); system instructions may be the hypervisor's under us.
        if bytes.windows(2).any(|w| matches!(w, [0x0f, 0x00 | 0x01 | 0x20 | 0x22])) {
            return None;
        }
        // If a CPU knows it all the same, let it be no system call that exists.
        setup.gpr[Gpr::Rax as usize] = 0xdead_0000;
        if bytes[..n].contains(&0xf0) {
            // Some processors look at the memory operand before they complain about LOCK.
            setup.gpr.iter_mut().skip(1).for_each(|v| *v = DATA + 0x100);
        }
        // Cut off by the 15-byte limit rather than invalid: the filler is no operand.
        return (n < 9 && decode(&bytes, bitness).is_err()).then(|| finish(setup));
    }
    if !testable(&iced, model) {
        return None;
    }
    bytes = constants(r, bitness, &bytes);
    setup.code = bytes[..iced.len()].to_vec();
    let insn = decode(&setup.code, bitness).ok()?;
    operands(r, &insn, &mut setup)?;
    Some(finish(setup))
}

/// Registers that point to data all through a block.
const POINTERS: [Register; 4] = [Register::R12, Register::R13, Register::R14, Register::R15];

/// Several random 64-bit instructions in a row: registers, memory through `POINTERS`, now and then a fault in the middle.
pub fn block(r: &mut Random, model: &CpuModel) -> Setup {
    let mut setup = Setup {
        bitness: 64,
        code: Vec::new(),
        count: 0,
        gpr: std::array::from_fn(|_| r.edgy()),
        rflags: r.next() & (Rflags::STATUS | Rflags::DF).bits() | Setup::default_flags(64),
        image: Default::default(),
    };
    setup.gpr[Gpr::Rsp as usize] = STACK + 0x1000;
    for p in POINTERS {
        let at = if r.once_in(20) { HOLE } else { DATA + 0x80 + r.below(0x1e00) };
        setup.gpr[p.number()] = at;
        let v = r.edgy();
        setup.image.put(at, 8, v);
    }
    let wanted = 2 + r.below(7);
    while setup.count < wanted {
        if let Some(code) = member(r, model) {
            setup.code.extend(code);
            setup.count += 1;
        }
    }
    setup
}

/// An instruction that can stand in a block.
fn member(r: &mut Random, model: &CpuModel) -> Option<Vec<u8>> {
    let mut bytes = [FILLER; 15];
    head(r, 64, &mut bytes);
    let mut iced = Decoder::with_ip(64, &bytes, CODE, DecoderOptions::NONE).decode();
    if iced.is_invalid() || !testable(&iced, model) || facts(iced.code()).class == Class::String {
        return None;
    }
    bytes = constants(r, 64, &bytes);
    iced = Decoder::with_ip(64, &bytes, CODE, DecoderOptions::NONE).decode();
    let memory = (0..iced.op_count()).any(|k| iced.op_kind(k) == OpKind::Memory);
    let far_bit = matches!(iced.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc) && iced.op1_kind() == OpKind::Register;
    if memory && (far_bit || matches!(iced.mnemonic(), M::Xlatb)) {
        return None;
    }
    let stack = matches!(iced.mnemonic(), M::Push | M::Pop);
    if matches!(iced.mnemonic(), M::Enter | M::Leave) {
        return None;
    }
    if memory {
        iced.set_memory_base(r.one_of(&POINTERS));
        iced.set_memory_index(Register::None);
        iced.set_memory_displacement64((r.below(0x80)).wrapping_sub(0x40));
        iced.set_memory_displ_size(8);
    }
    let mut factory = InstructionInfoFactory::new();
    let written = factory.info(&iced).used_registers().iter().any(|u| {
        let full = u.register().full_register();
        let kept = POINTERS.contains(&full) || (full == Register::RSP && !stack);
        kept && !matches!(u.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess)
    });
    if written || (stack && iced.op0_register().full_register() == Register::RSP) {
        return None;
    }
    if !memory {
        return Some(bytes[..iced.len()].to_vec());
    }
    let mut encoder = Encoder::new(64);
    encoder.encode(&iced, CODE).ok()?;
    Some(encoder.take_buffer())
}

/// Outside 64-bit code there are no other registers and no other halves.
fn finish(mut setup: Setup) -> Setup {
    if setup.bitness != 64 {
        setup.gpr.iter_mut().for_each(|v| *v &= 0xffff_ffff);
        setup.gpr[8..].fill(0);
    }
    setup
}

/// Prefixes, opcode, ModRM and SIB; gives their number.
fn head(r: &mut Random, bitness: u32, bytes: &mut [u8]) -> usize {
    let mut out = Vec::new();
    for (prefix, once_in) in [(0x66, 5), (0xf2, 12), (0xf3, 8), (0xf0, 12), (0x67, 16), (0x2e, 40), (0x3e, 40)] {
        if r.once_in(once_in) {
            out.push(prefix);
        }
    }
    let rex = bitness == 64 && r.once_in(2);
    let any = |r: &mut Random| r.next() as u8;
    match r.below(16) {
        // VEX.LZ.0F38: BMI; a W and vvvv at random.
        0 => out.extend([
            0xc4,
            any(r) & 0xe0 | r.one_of(&[2, 2, 2, 3]),
            any(r) & 0xfb,
            r.one_of(&[0xf2, 0xf3, 0xf5, 0xf6, 0xf7, 0xf0]),
        ]),
        kind => {
            if rex {
                out.push(0x40 | any(r) & 15);
            }
            match kind {
                1..=5 => out.extend([0x0f, any(r)]),
                6 => out.extend([0x0f, 0x38, 0xf0 | any(r) & 15]),
                _ => out.push(any(r)),
            }
        }
    }
    // A memory operand half of the time.
    let modrm = any(r);
    out.push(if r.once_in(2) { modrm | 0xc0 } else { modrm });
    out.push(any(r));
    bytes[..out.len()].copy_from_slice(&out);
    out.len()
}

/// Does it show all it does in general registers, flags and memory, wherever it stands?
fn testable(i: &Instruction, model: &CpuModel) -> bool {
    let f = facts(i.code());
    let segment = matches!(i.segment_prefix(), Register::FS | Register::GS);
    matches!(f.class, Class::Integer | Class::Flags | Class::String)
        && f.sensitivity == Sensitivity::Innocuous
        && i.flow_control() == FlowControl::Next
        && model.supports(i.code())
        && !i.is_ip_rel_memory_operand()
        && !segment
}

/// Random displacement and immediate in place of the filler.
fn constants(r: &mut Random, bitness: u32, bytes: &[u8; 15]) -> [u8; 15] {
    let mut decoder = Decoder::with_ip(bitness, bytes, CODE, DecoderOptions::NONE);
    let insn = decoder.decode();
    let at = decoder.get_constant_offsets(&insn);
    let mut out = *bytes;
    let parts = [
        (at.displacement_offset(), at.displacement_size()),
        (at.immediate_offset(), at.immediate_size()),
        (at.immediate_offset2(), at.immediate_size2()),
    ];
    for (offset, size) in parts {
        let v = r.edgy().to_le_bytes();
        out[offset..offset + size].copy_from_slice(&v[..size]);
    }
    out
}

/// An address worth using, and a value put there.
fn address(r: &mut Random, setup: &mut Setup) -> u64 {
    let at = match r.below(32) {
        0 => HOLE - r.below(9),
        1 => ROM + r.below(0x100),
        2 => ROM + 0x1000 - r.below(9),
        3 => DATA - r.below(9),
        4 if setup.bitness == 64 => (0x8000_0000_0000 - 4 + r.below(8)) ^ if r.once_in(2) { 0 } else { u64::MAX },
        5..=8 => DATA + 0x1000 - r.below(9),
        _ => DATA + 0x100 + r.below(0xe00) * if r.once_in(2) { 1 } else { 8 } % 0x1e00,
    };
    let v = r.edgy();
    setup.image.put(at, 8, v);
    at
}

/// Leads the memory operands into the world.
fn operands(r: &mut Random, i: &Insn, setup: &mut Setup) -> Option<()> {
    if i.facts.class == Class::String {
        for register in [Gpr::Rsi, Gpr::Rdi] {
            let at = address(r, setup);
            setup.gpr[register as usize] = at;
        }
        setup.gpr[Gpr::Rcx as usize] = r.below(6);
        return Some(());
    }
    if i.iced.is_stack_instruction() && r.once_in(8) {
        let at = address(r, setup);
        setup.gpr[Gpr::Rsp as usize] = at;
    }
    if i.iced.mnemonic() == M::Leave {
        let at = address(r, setup);
        setup.gpr[Gpr::Rbp as usize] = at;
    }
    let Some(m) = i.ops.iter().find_map(|o| if let Operand::Mem(m) = o { Some(*m) } else { None }) else {
        return Some(());
    };
    // Hints do not touch what they name.
    if matches!(i.iced.mnemonic(), M::Lea | M::Nop | M::Reservednop) {
        return Some(());
    }
    if matches!(m.seg, Seg::Fs | Seg::Gs) {
        return None;
    }
    if i.iced.mnemonic() == M::Xlatb {
        let at = address(r, setup);
        setup.gpr[Gpr::Rbx as usize] = at.wrapping_sub(setup.gpr[Gpr::Rax as usize] & 0xff);
        return Some(());
    }
    if let (M::Bt | M::Bts | M::Btr | M::Btc, Operand::Reg(bit), OpKind::Register) =
        (i.iced.mnemonic(), i.ops[1], i.iced.op1_kind())
    {
        setup.gpr[bit as usize] = r.below(0x1000).wrapping_sub(0x800);
    }
    let at = address(r, setup);
    aim(&m, at, setup)
}

/// Sets the base or index register so that the operand lies at `at`.
fn aim(m: &MemRef, at: u64, setup: &mut Setup) -> Option<()> {
    let index = m.index.map_or(0, |r| setup.gpr[r as usize] << m.scale);
    match (m.base, m.index) {
        (Base::Reg(base), index_register) if index_register != Some(base) => {
            let v = at.wrapping_sub(index).wrapping_sub(m.disp);
            // Above the address width anything may stand.
            let keep = setup.gpr[base as usize] & !m.address.mask();
            setup.gpr[base as usize] = m.address.cut(v) | keep;
        }
        (Base::None, Some(register)) => {
            setup.gpr[register as usize] = m.address.cut(at.wrapping_sub(m.disp)) >> m.scale;
        }
        _ => return None,
    }
    // 16-bit addresses do not reach the world, scaled ones may miss it: it must not be the host's own memory that is hit.
    let base = if let Base::Reg(base) = m.base { setup.gpr[base as usize] } else { 0 };
    let index = m.index.map_or(0, |r| setup.gpr[r as usize] << m.scale);
    let reached = m.address.cut(base.wrapping_add(index).wrapping_add(m.disp));
    (reached.wrapping_sub(at) < 8 && m.address != Width::W).then_some(())
}
