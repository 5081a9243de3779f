//! What cases of 16- and 32-bit code are drawn from: instructions in their places, states for them.

use super::aim::{self, Plan};
use super::segments::{self, SHORT_END, segment};
use super::system;
use crate::campaign::arena::{self, BASE, CODE, CODE_HOLE, CODE_NX, DATA, DATA2, NOTE};
use crate::campaign::batch::harmless;
use crate::campaign::blocks::{Members, POINTERS_BELOW_8, ROOM};
use crate::campaign::case::{Case, Kind};
use crate::campaign::values::Pool;
use crate::campaign::{encode, far, reason_against};
use crate::random::Random;
use bivisor_emulator::cpu::Attr;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::isa::{Class, Gpr, Insn, decode, facts};
use bivisor_emulator::mem::Prot;
use iced_x86::{Code, Decoder, DecoderOptions, InstructionInfoFactory, Mnemonic as M, OpCodeInfo, OpKind};

/// States for each instruction.
pub const STATES: u64 = 30;
/// Instructions of a batch.
pub const SLOTS: u64 = 64;
/// Blocks of a batch, and states for each.
pub const BLOCKS: u64 = 16;

/// An instruction or block in its place.
pub struct Slot {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Of them, those that are there: the end may be where nothing is.
    pub there: usize,
    /// Linear address.
    pub at: u64,
    /// iced's code.
    pub code: Code,
    /// How many states.
    pub states: u64,
    kind: Kind,
    plan: Option<Plan>,
    native: bool,
    free_gpr: [u64; 16],
}

impl Slot {
    /// A block in its place.
    pub fn block(kind: Kind, at: u64, bytes: Vec<u8>) -> Slot {
        Slot {
            at,
            there: bytes.len(),
            bytes,
            code: Code::INVALID,
            states: STATES * 2,
            kind,
            plan: None,
            native: true,
            free_gpr: [0; 16],
        }
    }
}

/// What cases are made from.
pub struct Source {
    codes: [Vec<(Code, &'static OpCodeInfo)>; 2],
    system: [Vec<(Code, &'static OpCodeInfo)>; 2],
    members: [Option<Members>; 2],
    model: CpuModel,
    factory: InstructionInfoFactory,
}

/// Codes of 16- or 32-bit code, and those left out with the reason.
pub fn codes(bits: u32) -> (Vec<Code>, Vec<(Code, &'static str)>) {
    let model = CpuModel::host();
    let (mut with, mut without) = encode::codes_in(bits, |c| model.supports(c));
    with.retain(|c| {
        let gs = matches!(c, Code::Pushw_GS | Code::Pushd_GS | Code::Popd_GS);
        if gs {
            without.push((*c, "GS is the host thread's own while a case runs"));
        }
        !gs
    });
    (with, without)
}

fn index(bits: u32) -> usize {
    usize::from(bits == 32)
}

impl Default for Source {
    fn default() -> Source {
        let with = |codes: Vec<Code>| codes.into_iter().map(|c| (c, c.op_code())).collect();
        Source {
            codes: [with(codes(16).0), with(codes(32).0)],
            system: [with(system::codes(16)), with(system::codes(32))],
            members: [None, None],
            model: CpuModel::host(),
            factory: InstructionInfoFactory::new(),
        }
    }
}

impl Source {
    /// Only these instructions.
    pub fn only(&mut self, codes: &[Code]) {
        self.codes.iter_mut().chain(&mut self.system).for_each(|of| of.retain(|c| codes.contains(&c.0)));
    }

    /// The arena's contents before every case of a batch.
    pub fn pristine(pool: &Pool, r: &mut Random) -> Vec<u8> {
        let mut out = vec![0xcc; arena::SIZE as usize];
        for (page, len, prot) in arena::PAGES {
            let from = (page - BASE) as usize;
            if !prot.contains(Prot::EXEC) && page != NOTE {
                for chunk in out[from..from + len as usize].chunks_exact_mut(64) {
                    chunk.copy_from_slice(pool.line(r));
                }
            }
        }
        out
    }

    /// The `i`-th slot of batch number `n`; `None`: the dice gave no instruction of that name.
    pub fn slot(&mut self, r: &mut Random, kind: Kind, n: u64, i: u64) -> Option<Slot> {
        let bits = kind.bits();
        if !kind.is_single() {
            let members = self.members[index(bits)].get_or_insert_with(|| Members::in_code(&self.model, bits));
            let bytes = members.draw(r);
            return (bytes.len() <= ROOM).then(|| Slot::block(kind, CODE + 0x800 + r.below(0x100), bytes));
        }
        let codes = if kind.is_system() { &self.system } else { &self.codes };
        let codes = &codes[index(bits)];
        let (code, op) = *codes.get(((n * SLOTS + i) % codes.len().max(1) as u64) as usize)?;
        let wild = r.once_in(24);
        for _ in 0..60 {
            let mut bytes = if wild && r.once_in(2) { encode::wild(r) } else { encode::attempt_in(r, op, bits) };
            match decode(&bytes, bits) {
                Ok(insn) if insn.iced.code() == code || wild => {
                    let found = insn.iced.code();
                    let unwanted = !kind.is_system() && reason_against(found).is_some();
                    if !self.model.supports(found) || unwanted {
                        continue;
                    }
                    if let Some(slot) = self.valid(r, &mut bytes, insn, kind) {
                        return Some(slot);
                    }
                }
                Err(_) if wild && harmless(&bytes) && !bytes.contains(&0x65) => {
                    let mut bytes = bytes[..15].to_vec();
                    stop_behind(&mut bytes, bits);
                    return Some(Slot {
                        at: CODE + 0x800,
                        there: bytes.len(),
                        bytes,
                        code: Code::INVALID,
                        states: 4,
                        kind,
                        plan: None,
                        native: false,
                        free_gpr: [0; 16],
                    });
                }
                _ => {}
            }
        }
        None
    }

    fn valid(&mut self, r: &mut Random, bytes: &mut [u8; 24], insn: Insn, kind: Kind) -> Option<Slot> {
        let bits = kind.bits();
        let len = u64::from(insn.len);
        if far::loads_gs(&insn) && !kind.is_system() {
            return None;
        }
        let at = match r.below(24) {
            0 => CODE + 0x1000 - len.div_ceil(2),
            1 => CODE_HOLE + 0x1000 - len.div_ceil(2),
            2 => CODE_NX + 0x1000 - len.div_ceil(2),
            3 => SHORT_END - len.div_ceil(2),
            4 => SHORT_END - len,
            _ => CODE + 0x400 + r.below(0x400),
        };
        let mut decoder = Decoder::with_ip(bits, &bytes[..], 0, DecoderOptions::NONE);
        let iced = decoder.decode();
        let constants = decoder.get_constant_offsets(&iced);
        let imm = constants.immediate_offset();
        match iced.mnemonic() {
            // Gates that users may go through: a system call, and others with instructions of their own.
            M::Int if matches!(iced.immediate8(), 3 | 4 | 0x80) => bytes[imm] ^= 0x40,
            M::Enter if constants.immediate_size() > 0 => bytes[imm + 1] &= 15,
            _ => {}
        }
        match iced.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 => {
                let n = constants.immediate_size();
                // Not into itself: it would never end.
                if n == 1 {
                    let into_itself = (-16..0).contains(&(bytes[imm] as i8));
                    bytes[imm] ^= u8::from(into_itself) << 6;
                } else {
                    let wild = r.once_in(12) && bytes[imm + n - 1] & 0x80 == 0;
                    let distance = aim::place(r, at).wrapping_sub(at + len);
                    if !wild {
                        bytes[imm..imm + n].copy_from_slice(&distance.to_le_bytes()[..n]);
                    }
                }
            }
            OpKind::FarBranch16 | OpKind::FarBranch32 => {
                let (to, selector) = aim::far_place(r, at, kind);
                let n = constants.immediate_size();
                bytes[imm..imm + n].copy_from_slice(&to.to_le_bytes()[..n]);
                let second = constants.immediate_offset2();
                bytes[second..second + 2].copy_from_slice(&selector.to_le_bytes());
            }
            _ => {}
        }
        let insn = decode(&bytes[..], bits).ok()?;
        let code = insn.iced.code();
        let bytes = bytes[..usize::from(insn.len)].to_vec();
        // Whatever part of it is jumped to: no system call.
        if bytes.windows(2).skip(1).any(|w| matches!(w, [0x0f, 0x05 | 0x34] | [0xcd, 0x80])) {
            return None;
        }
        let cut = |end: u64| (end.saturating_sub(at) as usize).min(bytes.len());
        let there = match at {
            a if a >= CODE_NX => cut(CODE_NX + 0x1000),
            a if a >= CODE_HOLE => cut(CODE_HOLE + 0x1000),
            _ => bytes.len(),
        };
        Some(Slot {
            at,
            there,
            code,
            states: STATES,
            kind,
            plan: Some(Plan::new(&mut self.factory, &insn)?),
            native: facts(code).class == Class::Native,
            free_gpr: crate::campaign::batch::free(&mut self.factory, &insn),
            bytes,
        })
    }
}

/// Draws a state for a slot.
pub fn state(r: &mut Random, pool: &Pool, slot: &Slot, case: &mut Case) {
    let bits = slot.kind.bits();
    (case.insn, case.kind) = (slot.code, slot.kind);
    case.code.clone_from(&slot.bytes);
    case.free_gpr = slot.free_gpr;
    case.free_memory = None;
    case.puts.clear();
    case.windows.clear();
    case.windows.extend([(DATA, 0x4000), (DATA2, 0x2000)]);
    case.gpr = [0; 16];
    case.gpr[..8].iter_mut().for_each(|v| *v = r.edgy() & 0xffff_ffff);
    let dice = r.next();
    case.rflags = 0x202 | dice & 0x8d5;
    if dice >> 20 & 31 == 0 {
        case.rflags |= 0x400;
    }
    if dice >> 30 & 63 == 0 && slot.kind.is_single() {
        // AC, ID.
        case.rflags |= 0x4_0000 | dice >> 40 & 0x20_0000;
    }
    if slot.native || dice >> 50 & 31 == 0 {
        pool.fill(r, &mut case.xsave);
    } else {
        case.xsave.set_xstate_bv(0);
        case.xsave.set_mxcsr(0x1f80);
    }
    if slot.kind.is_system() {
        // Alignment is checked at CPL 3 only.
        case.rflags &= if slot.kind == Kind::Virtual { !0 } else { !0x4_0000 };
        if !system::is_judged(case) && dice >> 45 & 1 == 0 {
            // IOPL 3.
            case.rflags |= 0x3000;
        }
    }
    let short = if bits == 32 { segments::selector(3) } else { segments::selector(4) };
    let cs = match slot.at {
        _ if matches!(slot.kind, Kind::Real | Kind::Virtual) => segments::selector(0),
        // Near the end of the short segment in it.
        a if a < SHORT_END && a + 16 >= SHORT_END && !r.once_in(3) => short,
        a if a + 16 < SHORT_END => r.one_of(segments::code(bits)),
        _ => segments::code(bits)[if r.once_in(2) { 0 } else { 4 - usize::from(bits == 16) }],
    };
    let data = segments::data(bits);
    case.selectors = if matches!(slot.kind, Kind::Real | Kind::Virtual) {
        let data = system::data(slot.kind);
        [r.one_of(data), cs, segments::selector(5), r.one_of(data), r.one_of(data)]
    } else if slot.kind.is_single() {
        [r.one_of(data), cs, r.one_of(segments::stack(bits)), r.one_of(data), r.one_of(data)]
    } else {
        // Blocks are about instructions, not segments.
        let plain = if bits == 32 { [segments::FLAT_DATA, segments::selector(6)] } else { [segments::selector(5); 2] };
        let s = r.one_of(&plain);
        [s, cs, s, s, s]
    };
    case.fs_base = segment(case.selectors[4]).map_or(0, |s| s.base);
    let base = |n: usize| segment(case.selectors[n]).map_or(0, |s| s.base);
    case.rip = slot.at.wrapping_sub(base(1)) & 0xffff_ffff;
    let stack = segment(case.selectors[2]).unwrap_or_default();
    let top =
        if slot.kind.is_single() && r.once_in(4) { aim::target(r, 4, &stack) } else { DATA + 0x2000 + 4 * r.below(64) };
    let sp = top.wrapping_sub(stack.base) & 0xffff_ffff;
    // The upper half of ESP is not SP's.
    let small = !stack.attr.contains(Attr::DB);
    let upper = if small && r.once_in(2) { r.next() & 0xffff_0000 } else { 0 };
    case.gpr[Gpr::Rsp as usize] = if small { sp & 0xffff | upper } else { sp };
    if !slot.kind.is_single() {
        let ds = base(3);
        case.gpr[Gpr::Rbx as usize] = 1 + r.below(4);
        for p in POINTERS_BELOW_8 {
            let linear = match r.below(40) {
                0 => arena::HOLE - r.below(16),
                1 => arena::ROM + r.below(0x100),
                2..=9 => DATA + 0x1000 - r.below(72),
                _ => (DATA + 0x400 + r.below(0x1800)) & !if r.once_in(4) { 0 } else { 63 },
            };
            case.gpr[p.number()] = linear.wrapping_sub(ds) & if bits == 16 { 0xffff } else { 0xffff_ffff };
        }
        return;
    }
    if let M::Div | M::Idiv = slot.code.mnemonic()
        && !r.once_in(4)
    {
        let sign = (case.gpr[Gpr::Rax as usize] as i32 >> 31) as u32;
        let idiv = slot.code.mnemonic() == M::Idiv;
        case.gpr[Gpr::Rdx as usize] = if idiv { sign.into() } else { r.below(16) };
    }
    if slot.code.mnemonic() == M::Xgetbv {
        case.gpr[Gpr::Rcx as usize] = if r.once_in(2) { 0 } else { 2 + r.below(9) };
    }
    if let Some(plan) = &slot.plan {
        plan.aim(r, case, slot.at);
    }
    if slot.kind.is_system() && !system::is_judged(case) {
        system::aim(r, case);
    }
    keep_from_hanging(case);
}

/// A far CALL to 64-bit code pushes by that code's rules: with ESP near zero at the end of the address space. Linux takes a fault there
/// for the K8's erratum 100 (`is_errata100` in arch/x86/mm/fault.c) and repeats the instruction for ever.
pub fn keep_from_hanging(case: &mut Case) {
    let sp = &mut case.gpr[Gpr::Rsp as usize];
    let calls = matches!(case.insn, Code::Call_ptr1616 | Code::Call_ptr1632 | Code::Call_m1616 | Code::Call_m1632);
    if calls && *sp < 0x20 {
        *sp += 0x20;
    }
}

/// Where a decoder that is not strict sees the end of an instruction INT3s follow.
fn stop_behind(bytes: &mut [u8], bits: u32) {
    let len = Decoder::new(bits, bytes, DecoderOptions::NO_INVALID_CHECK).decode().len();
    if len > 0 && len < bytes.len() {
        bytes[len..].fill(0xcc);
    }
}
