//! Batches: instructions put into the code pages at once, each run with many states. A batch is a function of seed and number.

use super::aim::Plan;
use super::arena::{self, BASE, BREAK, CODE, CODE_HOLE, CODE_NX, DATA, EXIT, HOLE, NOTE, ROM, STUB, View};
use super::blocks::{self, Members, POINTERS};
use super::case::{Case, Kind};
use super::values::Pool;
use super::{encode, far};
use crate::random::Random;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::interp::alu::Vendor;
use bivisor_emulator::isa::{Class, Gpr, Insn, decode, facts};
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, InstructionInfoFactory, Mnemonic as M, OpAccess, OpCodeInfo, OpKind,
};

/// States for each instruction.
pub const STATES: u64 = 32;
/// States for one that raises the same exception with every state.
const FEW: u64 = 4;
/// Instructions on the first code page, each with a tail to branch back to, at a distance.
const SLOTS: u64 = 62;
/// Those of them that take all instructions in turn, so that each has as many cases as any other; the rest are wild bytes.
const IN_TURN: u64 = 60;
const DISTANCE: u64 = 64;
/// From a slot's start to its instruction.
const HEAD: u64 = 20;
/// Bytes of a tail.
const TAIL: u64 = 18;

/// An instruction in its place.
pub struct Slot {
    /// Where it stands.
    pub at: u64,
    /// Its bytes, all of them.
    pub bytes: Vec<u8>,
    /// iced's code.
    pub code: Code,
    /// What kind of case it makes.
    pub kind: Kind,
    plan: Option<Plan>,
    native: bool,
    /// How many states.
    pub states: u64,
    free_gpr: [u64; 16],
}

impl Slot {
    /// A block in its place.
    pub fn block(at: u64, bytes: Vec<u8>) -> Slot {
        Slot {
            at,
            bytes,
            code: Code::INVALID,
            kind: Kind::Block,
            plan: None,
            native: true,
            states: STATES / 2,
            free_gpr: [0; 16],
        }
    }
}

/// A batch.
pub struct Batch {
    /// The instructions.
    pub slots: Vec<Slot>,
    /// The arena's contents.
    pub pristine: Vec<u8>,
    random: Random,
    pool: Pool,
    places: Vec<u64>,
}

/// What batches are made from.
pub struct Source {
    codes: Vec<(Code, &'static OpCodeInfo)>,
    model: CpuModel,
    factory: InstructionInfoFactory,
    amd: bool,
    members: Option<Members>,
}

/// Blocks of a batch, and the room each has.
const BLOCKS: u64 = 14;
const BLOCK: u64 = 256;

/// A good seed of seed and number.
pub(super) fn mixed(seed: u64, n: u64) -> u64 {
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ n.wrapping_mul(0xd1b5_4a32_d192_ed03);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

impl Source {
    /// For these codes.
    pub fn new(codes: &[Code]) -> Source {
        Source {
            codes: codes.iter().map(|c| (*c, c.op_code())).collect(),
            model: CpuModel::host(),
            factory: InstructionInfoFactory::new(),
            amd: Vendor::host() == Vendor::Amd,
            members: None,
        }
    }

    /// Batch number `n` of blocks.
    pub fn blocks(&mut self, seed: u64, n: u64) -> Batch {
        let mut batch = self.fresh(mixed(!seed, n));
        let members = self.members.get_or_insert_with(|| Members::new(&self.model));
        for i in 0..BLOCKS {
            let at = CODE + 0x1000 + BLOCK * i;
            let bytes = members.draw(&mut batch.random);
            if bytes.len() > blocks::ROOM {
                continue;
            }
            batch.put(at, &bytes);
            let end = at + bytes.len() as u64;
            batch.put(end, &tail(end));
            batch.slots.push(Slot::block(at, bytes));
        }
        batch
    }

    /// Memory with tails only, for instructions and blocks one at a time: see [`Batch::take`].
    pub fn ground(&self, seed: u64) -> Batch {
        let mut batch = self.fresh(mixed(seed, 0));
        batch.places.clone().into_iter().for_each(|head| batch.put(head, &tail(head)));
        batch
    }

    /// The `index`-th instruction, or bytes that may be none, in a place behind a tail.
    pub fn instruction(&mut self, r: &mut Random, index: u64, wild: bool) -> Option<Slot> {
        let places: Vec<u64> = (0..SLOTS).map(|i| CODE + DISTANCE * i).collect();
        let head = r.one_of(&places);
        let next = self.codes[(index % self.codes.len() as u64) as usize];
        self.slot(r, next, &places, |_| head + HEAD, wild)
    }

    /// Memory without instructions.
    fn fresh(&self, seed: u64) -> Batch {
        let mut r = Random::new(seed);
        let pool = Pool::new(&mut r);
        let mut pristine = vec![0xcc; arena::SIZE as usize];
        for (page, len, prot) in arena::PAGES {
            let from = (page - BASE) as usize;
            if !prot.contains(bivisor_emulator::mem::Prot::EXEC) && page != NOTE {
                for chunk in pristine[from..from + len as usize].chunks_exact_mut(64) {
                    chunk.copy_from_slice(pool.line(&mut r));
                }
            }
        }
        let places = (0..SLOTS).map(|i| CODE + DISTANCE * i).collect();
        let mut batch = Batch { slots: Vec::new(), pristine, random: r, pool, places };
        batch.put(STUB, &[0x0f, 0x05]);
        batch.put(BREAK, &[0xcc]);
        batch
    }

    /// Batch number `n`.
    pub fn batch(&mut self, seed: u64, n: u64) -> Batch {
        let Batch { mut pristine, random: mut r, pool, places, .. } = self.fresh(mixed(seed, n));
        let mut put = |at: u64, bytes: &[u8]| {
            let from = (at - BASE) as usize;
            pristine[from..from + bytes.len()].copy_from_slice(bytes);
        };
        let mut slots = Vec::new();
        for i in 0..SLOTS + 3 {
            let turn = if i < IN_TURN { n * IN_TURN + i } else { r.next() >> 8 };
            let next = self.codes[(turn % self.codes.len() as u64) as usize];
            let slot = match i {
                _ if i < SLOTS => {
                    let head = CODE + DISTANCE * i;
                    put(head, &tail(head));
                    self.slot(&mut r, next, &places, |_| head + HEAD, i >= IN_TURN)
                }
                SLOTS => self.slot(&mut r, next, &places, |len| CODE + 0x1000 - len.div_ceil(2), false),
                n if n == SLOTS + 1 => {
                    self.slot(&mut r, next, &places, |len| CODE_HOLE + 0x1000 - len.div_ceil(2), false)
                }
                _ => self.slot(&mut r, next, &places, |len| CODE_NX + 0x1000 - len.div_ceil(2), false),
            };
            let Some(mut slot) = slot else { continue };
            let end = slot.at + slot.bytes.len() as u64;
            match i {
                _ if i <= SLOTS => {
                    put(slot.at, &slot.bytes);
                    if slot.code != Code::INVALID {
                        put(end, &tail(end));
                    }
                }
                _ => {
                    // It goes on where it may not, or with nothing.
                    slot.states = FEW;
                    let room = (0x1000 - slot.at % 0x1000) as usize;
                    let there = if i == SLOTS + 1 { room } else { slot.bytes.len() };
                    if room == slot.bytes.len() {
                        continue;
                    }
                    put(slot.at, &slot.bytes[..there]);
                }
            }
            slots.push(slot);
        }
        Batch { slots, pristine, random: r, pool, places }
    }

    fn slot(
        &mut self,
        r: &mut Random,
        (code, op): (Code, &OpCodeInfo),
        places: &[u64],
        at: impl Fn(u64) -> u64,
        wild: bool,
    ) -> Option<Slot> {
        for _ in 0..400 {
            let mut bytes = if wild && r.once_in(2) { encode::wild(r) } else { encode::attempt(r, op) };
            match decode(&bytes, 64) {
                Ok(insn) if insn.iced.code() == code || wild => {
                    let found = insn.iced.code();
                    if !self.model.supports(found) || super::reason_against(found).is_some() {
                        continue;
                    }
                    let at = at(u64::from(insn.len));
                    if let Some(slot) = self.valid(r, &mut bytes, insn, at, places) {
                        return Some(slot);
                    }
                }
                Err(_) if wild && harmless(&bytes) => {
                    let at = at(15);
                    let mut bytes = bytes[..15].to_vec();
                    stop_behind(&mut bytes);
                    return Some(Slot {
                        at,
                        bytes,
                        code: Code::INVALID,
                        kind: Kind::Insn,
                        plan: None,
                        native: false,
                        states: FEW,
                        free_gpr: [0; 16],
                    });
                }
                _ => {}
            }
        }
        None
    }

    fn valid(&mut self, r: &mut Random, bytes: &mut [u8; 24], insn: Insn, at: u64, places: &[u64]) -> Option<Slot> {
        let end = at + u64::from(insn.len);
        let options = if self.amd { DecoderOptions::AMD } else { DecoderOptions::NONE };
        let mut decoder = Decoder::with_ip(64, &bytes[..], 0, options);
        let iced = decoder.decode();
        let constants = decoder.get_constant_offsets(&iced);
        let near = matches!(
            iced.flow_control(),
            FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch | FlowControl::Call
        );
        let mut insn = insn;
        if far::loads_gs(&insn) {
            return None;
        }
        if iced.mnemonic() == M::Int && matches!(iced.immediate8(), 3 | 4 | 0x80) {
            // Gates that users may go through: a system call, and others with instructions of their own.
            bytes[constants.immediate_offset()] ^= 0x40;
            insn = decode(&bytes[..], 64).ok()?;
        }
        if matches!(iced.mnemonic(), M::Enter | M::Retf) && constants.immediate_size() > 0 {
            // Its frame ends inside the arena, or just beside the data.
            bytes[constants.immediate_offset() + 1] &= if iced.mnemonic() == M::Retf { 7 } else { 15 };
            insn = decode(&bytes[..], 64).ok()?;
        }
        if near && iced.op0_kind() == OpKind::NearBranch64 {
            let (offset, n) = (constants.immediate_offset(), constants.immediate_size());
            // Eight bits reach back to the own head.
            let to = if n == 1 { at - at % DISTANCE } else { r.one_of(places) };
            let distance = to.wrapping_sub(end);
            if n == 1 && !(-128..128).contains(&(distance as i64)) || !places.contains(&to) {
                return None;
            }
            bytes[offset..offset + n].copy_from_slice(&distance.to_le_bytes()[..n]);
            insn = decode(&bytes[..], 64).ok()?;
        }
        let mut plan = Plan::new(&mut self.factory, &insn, at)?;
        if plan.absolute().is_some() {
            let target = DATA + 0x400 + if r.once_in(2) { 64 * r.below(0x90) } else { r.below(0x2400) };
            let (offset, n) = (constants.displacement_offset(), constants.displacement_size());
            let v = if iced.is_ip_rel_memory_operand() { target.wrapping_sub(end) } else { target };
            if n < 4 {
                return None;
            }
            bytes[offset..offset + n].copy_from_slice(&v.to_le_bytes()[..n]);
            insn = decode(&bytes[..], 64).ok()?;
            plan = Plan::new(&mut self.factory, &insn, at)?;
        }
        let code = insn.iced.code();
        Some(Slot {
            at,
            bytes: bytes[..usize::from(insn.len)].to_vec(),
            code,
            kind: Kind::Insn,
            plan: Some(plan),
            native: facts(code).class == Class::Native,
            states: STATES,
            free_gpr: free(&mut self.factory, &insn),
        })
    }
}

/// Bits of registers that get what is the machine's own, or differs from run to run.
pub(super) fn free(factory: &mut InstructionInfoFactory, insn: &Insn) -> [u64; 16] {
    let mut out = [0; 16];
    if matches!(
        insn.iced.mnemonic(),
        M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdrand | M::Rdseed | M::Smsw | M::Sldt | M::Str
    ) {
        for u in factory.info(&insn.iced).used_registers() {
            let writes = matches!(u.access(), OpAccess::Write | OpAccess::ReadWrite);
            if let Some(g) = Gpr::from_iced(u.register()).filter(|_| writes) {
                out[g as usize] |= match u.register().size() {
                    2 => 0xffff,
                    4 => 0xffff_ffff,
                    // Where the result is narrower the rest is zero.
                    _ if matches!(insn.iced.mnemonic(), M::Rdrand | M::Rdseed) => u64::MAX,
                    _ => 0xffff_ffff,
                };
            }
        }
    }
    out
}

/// Could the host not take these bytes for something that leaves the process? They are no instruction by our decoder.
pub(super) fn harmless(bytes: &[u8]) -> bool {
    !bytes.windows(2).any(|w| matches!(w, [0x0f, 0x00 | 0x01 | 0x05 | 0x07 | 0x20 | 0x22 | 0x34 | 0x35] | [0xcd, _]))
}

/// Where a decoder that is not strict sees the end of an instruction INT3s follow: a processor that is not strict runs into them.
fn stop_behind(bytes: &mut [u8]) {
    let len = Decoder::new(64, bytes, DecoderOptions::NO_INVALID_CHECK).decode().len();
    if len > 0 && len < bytes.len() {
        bytes[len..].fill(0xcc);
    }
}

/// What follows an instruction: MOV DWORD [NOTE], its own address; JMP [EXIT].
pub(super) fn tail(at: u64) -> [u8; TAIL as usize] {
    let mut out = [0; TAIL as usize];
    out[..3].copy_from_slice(&[0xc7, 0x04, 0x25]);
    out[3..7].copy_from_slice(&(NOTE as u32).to_le_bytes());
    out[7..11].copy_from_slice(&(at as u32).to_le_bytes());
    out[11..14].copy_from_slice(&[0xff, 0x24, 0x25]);
    out[14..].copy_from_slice(&(EXIT as u32).to_le_bytes());
    out
}

impl Batch {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        let from = (at - BASE) as usize;
        self.pristine[from..from + bytes.len()].copy_from_slice(bytes);
    }

    /// Has this slot alone from now on, and draws its states from `seed`.
    pub fn take(&mut self, slot: Slot, seed: u64) {
        (self.slots, self.random) = (vec![slot], Random::new(seed));
    }

    /// Puts the contents into an engine's memory.
    pub fn load(&self, view: View) {
        view.write(BASE, &self.pristine);
    }

    /// Is the memory of data as it was?
    pub fn is_pristine(&self, view: View, buffer: &mut Vec<u8>) -> Option<u64> {
        buffer.resize((BASE + arena::SIZE - DATA) as usize, 0);
        view.read(DATA, buffer);
        let at = (DATA - BASE) as usize;
        if buffer[..] == self.pristine[at..] {
            return None;
        }
        buffer.iter().zip(&self.pristine[at..]).position(|(a, b)| a != b).map(|n| DATA + n as u64)
    }

    /// Draws the next state for a slot. False if the dice gave none that is safe.
    pub fn state(&mut self, slot: usize, case: &mut Case) -> bool {
        let (slot, r) = (&self.slots[slot], &mut self.random);
        (case.insn, case.kind) = (slot.code, slot.kind);
        case.code.clone_from(&slot.bytes);
        case.rip = slot.at;
        case.free_gpr = slot.free_gpr;
        case.free_memory = None;
        case.windows.clear();
        case.puts.clear();
        for v in &mut case.gpr {
            *v = r.edgy();
        }
        let dice = r.next();
        case.rflags = 0x202 | dice & 0x8d5;
        if dice >> 20 & 31 == 0 {
            case.rflags |= 0x400;
        }
        if dice >> 30 & 63 == 0 {
            // AC, ID.
            case.rflags |= 0x4_0000 | dice >> 40 & 0x20_0000;
        }
        case.fs_base = DATA + 0x1000;
        if slot.native || dice >> 50 & 31 == 0 {
            self.pool.fill(r, &mut case.xsave);
        } else {
            case.xsave.set_xstate_bv(0);
            case.xsave.set_mxcsr(0x1f80);
        }
        case.gpr[Gpr::Rsp as usize] = DATA + 0x2000 + 8 * r.below(64);
        if slot.kind == Kind::Block {
            // No alignment check: the list of what is expected is by instruction.
            case.rflags &= !0x4_0000;
            case.gpr[Gpr::Rbx as usize] = 1 + r.below(4);
            for p in POINTERS {
                case.gpr[p.number()] = match r.below(40) {
                    0 => HOLE - r.below(16),
                    1 => ROM + r.below(0x100),
                    2..=9 => DATA + 0x1000 - r.below(72),
                    _ => (DATA + 0x400 + r.below(0x1800)) & !if r.once_in(4) { 0 } else { 63 },
                };
            }
            case.window(DATA, ROM);
            return true;
        }
        let Some(plan) = &slot.plan else {
            // If a CPU knows it all the same: some look at memory before they complain.
            case.gpr.iter_mut().for_each(|v| *v = DATA + 0x1800);
            case.gpr[Gpr::Rax as usize] = 0xdead_0000;
            case.window(DATA + 0x800, DATA + 0x2800);
            return true;
        };
        special(r, slot.code.mnemonic(), case);
        plan.aim(r, case, &self.places)
    }
}

/// Registers that an instruction looks at in a way of its own.
fn special(r: &mut Random, m: M, case: &mut Case) {
    match m {
        M::Div | M::Idiv if !r.once_in(4) => {
            let rax = case.gpr[Gpr::Rax as usize];
            case.gpr[Gpr::Rdx as usize] = if m == M::Idiv { (rax as i64 >> 63) as u64 } else { r.below(16) };
        }
        // XCR0; XINUSE is the processor's own.
        M::Xgetbv => case.gpr[Gpr::Rcx as usize] = if r.once_in(2) { 0 } else { 2 + r.below(9) },
        M::Wrfsbase if !r.once_in(3) => {
            case.gpr.iter_mut().for_each(|v| *v = DATA + r.below(0x1000));
        }
        _ => {}
    }
}
