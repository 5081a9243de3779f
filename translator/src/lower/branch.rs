//! Control transfers. Direct ones are jumps that are patched to their target; indirect ones, returns included, look their target up
//! in a table without touching a flag.
//!
//! An indirect branch notes the target in a slot and jumps through the table entry of its low 16 bits, by R11 (see [`Home`]). What it
//! arrives at is the *landing* of some block (or the miss trampoline): code that knows its own guest address, compares by LEA and JRCXZ
//! while R11 keeps RCX, and goes on to the next landing of the same entry if it was not meant. CALL pushes the guest's return address.
//!
//! A target that is no canonical address faults at the branch, before anything has changed (SDM 2A JMP, CALL, RET): with PEXT the bits
//! that must be 0 are part of the table's index, and behind the table is nothing ([`GUARD_SIZE`]); without, a load through the target
//! finds out. After that only 47 bits of it can differ from a landing's, and the table has looked at 15 of them at least.

// dynasm's dynamic registers convert a u8 to itself.
#![allow(clippy::useless_conversion)]

use crate::block::Item;
use crate::emit::{Emitter, TABLE, gs, slot};
use crate::enter::MISS;
use crate::lower::memory::load_target;
use crate::lower::{Depends, Leave, Lowering, Use, use_of};
use crate::marks::{Home, Mark, What, homed};
use crate::route::Route;
use bivisor_emulator::host::code_space;
use bivisor_emulator::host::thread::{GUARD_SIZE, ThreadBlock};
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::isa::decode::is_amd;
use bivisor_emulator::isa::host_cpu::cpuid;
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{ConditionCode, OpKind};
use std::num::NonZeroU32;
use std::sync::OnceLock;

/// The way in for indirect branches: its offset, before which is the displacement of its jump to the next landing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Landing(NonZeroU32);

impl Landing {
    /// At `at`, where four bytes and more come before.
    fn new(at: u32) -> Landing {
        Landing(NonZeroU32::new(at).expect("something comes before"))
    }

    /// Its offset.
    pub fn at(self) -> usize {
        self.0.get() as usize
    }

    /// Offset of what comes behind the comparison.
    pub fn meant(self) -> usize {
        static LEN: OnceLock<usize> = OnceLock::new();
        self.at()
            + LEN.get_or_init(|| {
                let mut e = Emitter::new(0);
                let l = emit_landing(&mut e, &mut Vec::new(), 0x1234_5678, 0);
                e.len() - l.at()
            })
    }

    /// Offset of the displacement of its jump to the next landing.
    pub fn next(self) -> usize {
        self.at() - 4
    }

    /// The same in a piece of code that begins at `by`.
    pub fn moved(self, by: u32) -> Landing {
        Landing(self.0.saturating_add(by))
    }
}

/// JMP rel. Never falls through.
pub(crate) fn jump(l: &mut Lowering<'_>, item: &Item, to: u64) -> bool {
    l.mark(What::At(item.at));
    l.link(&[0xe9], to);
    false
}

/// Jcc. In a trace that goes on where it leads to, it leaves if it is not taken.
pub(crate) fn conditional(l: &mut Lowering<'_>, item: &Item, next: Option<u64>) {
    let to = item.iced.near_branch_target();
    let code = 0x80 | condition(item.iced.condition_code());
    l.mark(What::At(item.at));
    let after = l.block.next_rip(item);
    if next == Some(to) && to != after {
        // Of two opposite conditions the lowest bit differs (SDM 1 appendix B).
        l.link(&[0x0f, code ^ 1], after);
    } else {
        l.link(&[0x0f, code], to);
    }
}

/// The low four bits of the opcode (SDM 1 appendix B).
fn condition(cc: ConditionCode) -> u8 {
    match cc {
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        ConditionCode::g | ConditionCode::None => 15,
    }
}

/// LOOP, LOOPE, LOOPNE, JECXZ, JRCXZ: they have only an 8-bit displacement, so they jump over a jump.
pub(crate) fn counted(l: &mut Lowering<'_>, item: &Item) {
    let to = item.iced.near_branch_target();
    let block = l.block;
    let bytes = block.code(item);
    // Opcode and displacement are the last two bytes; a 67 prefix counts, others mean nothing here.
    let opcode = bytes[bytes.len() - 2];
    let narrow = bytes[..bytes.len() - 2].contains(&0x67);
    l.mark(What::At(item.at));
    let prefix: &[u8] = if narrow { &[0x67] } else { &[] };
    if l.close_loop(&[prefix, &[opcode]].concat(), to) {
        return;
    }
    l.e.align_patch(usize::from(narrow) + 5);
    l.mark(What::At(item.at));
    l.e.bytes.extend_from_slice(prefix);
    l.e.bytes.extend_from_slice(&[opcode, 2]);
    l.mark(What::At(item.at + u16::from(item.len)));
    l.e.bytes.extend_from_slice(&[0xeb, 5]);
    let id = l.around.first_exit + l.exits.len() as u32;
    l.mark(What::Exit(id));
    l.link_long(&[0xe9], to);
}

/// Pushes a guest address.
fn push_constant(l: &mut Lowering<'_>, v: u64) {
    if let Ok(v) = i32::try_from(v as i64) {
        l.e.push(0x68);
        l.e.push_i32(v);
        l.relocation(0, Depends::Fixed);
    } else {
        l.e.bytes.extend_from_slice(&[0xff, 0x35]);
        l.constants.push((l.e.len(), v));
        l.e.push_u32(0);
    }
}

/// Of a CALL, what it pushes.
fn push_return(l: &mut Lowering<'_>, item: &Item) {
    let back = l.block.next_rip(item);
    push_constant(l, back);
}

/// CALL rel in a trace that goes on at its target. Falls through.
pub(crate) fn call_inside(l: &mut Lowering<'_>, item: &Item) -> bool {
    l.put_away(item.at);
    push_return(l, item);
    true
}

/// CALL rel. The target comes after the push.
pub(crate) fn call(l: &mut Lowering<'_>, item: &Item, to: u64) -> bool {
    call_inside(l, item);
    let id = l.around.first_exit + l.exits.len() as u32;
    l.mark(What::Exit(id));
    l.link(&[0xe9], to);
    false
}

/// With the target in a register: notes it in its slot, and faults if it is no address of user code. R11 is lost, or the host address
/// to go to, and all of [`homed`] are lost with it.
fn probe(l: &mut Lowering<'_>, item: &Item, r: u8) {
    let target = gs(slot::TARGET);
    dynasm!(l.e; .arch x64; gs mov [target], Rq(r));
    l.mark(What::Probe(item.at));
    if adds_up() {
        find(&mut l.e, r);
        add_up(&mut l.e);
    } else {
        fault_unless_user(&mut l.e, r, finds_by_pext());
    }
    l.mark(What::At(item.at));
}

/// As [`probe`], of the target that a RET pops. POP leaves RSP to the host's stack engine, which a load from RSP and an LEA to it do not:
/// recursive calls took a seventh less on Raptor Cove.
fn pop_and_add_up(l: &mut Lowering<'_>, item: &Item) {
    let target = gs(slot::TARGET);
    dynasm!(l.e; .arch x64; pop r11);
    l.mark(What::ProbePopped(item.at));
    dynasm!(l.e; .arch x64; gs mov [target], r11);
    find(&mut l.e, Gpr::R11 as u8);
    add_up(&mut l.e);
}

/// With a target in a register: R11 counts half entries, or leads into the guard, and R10 has the target from bit 15 on.
fn find(e: &mut Emitter, r: u8) {
    // rorx r10, r, 15
    let rorx = [0xc4, 0x63 & !(r >> 3 << 5), 0xfb, 0xf0, 0xd0 | r & 7, 15];
    if r == Gpr::R11 as u8 {
        e.bytes.extend_from_slice(&rorx);
        pext_r11(e, r);
    } else {
        pext_r11(e, r);
        e.bytes.extend_from_slice(&rorx);
    }
    dynasm!(e; .arch x64; lea r11, [r11 + r11]);
}

/// After [`find`]: R11 is where to go, R10 is lost. These loads find out whether the target is one of user code.
fn add_up(e: &mut Emitter) {
    // pdep r10, r10, gs:[r11 * 8 + TABLE + 8]
    e.bytes.extend_from_slice(&[0x65, 0xc4, 0x22, 0xab, 0xf5, 0x14, 0xdd]);
    e.push_i32(TABLE + 8);
    dynasm!(e; .arch x64; gs mov r11, [r11 * 8 + TABLE]; lea r11, [r11 + r10]);
}

/// pext r11, r, gs:[ADDRESS_BITS]
fn pext_r11(e: &mut Emitter, r: u8) {
    e.bytes.extend_from_slice(&[0x65, 0xc4, 0x62, 0x82 | (!r & 15) << 3, 0xf5, 0x1c, 0x25]);
    e.push_i32(gs(slot::ADDRESS_BITS));
}

/// A load through the target takes a line of the cache for data, and a translation, from every page of code.
fn fault_unless_user(e: &mut Emitter, r: u8, pext: bool) {
    if pext {
        pext_r11(e, r);
        dynasm!(e; .arch x64; gs mov r11, [r11 * 8 + TABLE]);
        return;
    }
    // movzx r11d, byte [r + 0]
    e.bytes.extend_from_slice(&[0x44 | r >> 3, 0x0f, 0xb6, 0x58 | r & 7]);
    if r & 7 == 4 {
        e.push(0x24);
    }
    e.push(0);
}

/// What [`slot::ADDRESS_BITS`] holds: the bits of an address that are 0 in user space, and those that choose the table's entry.
pub const ADDRESS_BITS: u64 = !0 << 47 | 0xffff;
// Whatever these bits are, they lead to the table or into the guard.
const _: () = assert!(16 << ADDRESS_BITS.count_ones() <= GUARD_SIZE as u64);

/// Is the table's index made by PEXT? Not where that is slow: on AMD's CPUs before family 19h (Fog, Instruction tables).
pub fn finds_by_pext() -> bool {
    static FAST: OnceLock<bool> = OnceLock::new();
    *FAST.get_or_init(|| {
        let eax = cpuid(1, 0)[0];
        let family = (eax >> 8 & 15) + if eax >> 8 & 15 == 15 { eax >> 20 & 255 } else { 0 };
        let slow = is_amd() && family < 0x19;
        ThreadBlock::make().is_ok() && ThreadBlock::is_guarded() && has_bmi2() && !slow
    })
}

/// Do branches add what an entry gives and bits 15 to 47 of their target up to an address, so that nothing is compared at the landing?
/// There it takes a fifth to a third off programs that call much on Intel's Raptor Cove; it was never measured on AMD's CPUs.
pub fn adds_up() -> bool {
    static DOES: OnceLock<bool> = OnceLock::new();
    *DOES.get_or_init(|| finds_by_pext() && !is_amd())
}

/// The second word of an entry: where PDEP puts the bits of a target from bit 15 on, and none of it if there is more than one landing.
/// These are multiples of [`code_space::PERIOD`].
pub const ADDEND: u64 = !0 << 31;
const _: () = assert!(1 << ADDEND.trailing_zeros() == code_space::PERIOD);

/// What PDEP gives for a target.
pub fn addend(target: u64) -> u64 {
    target >> 15 << ADDEND.trailing_zeros()
}

/// JMP R11.
pub const JMP_R11: [u8; 3] = [0x41, 0xff, 0xe3];

/// Where the way out for missed targets is, from the start of the code.
pub const MISS_AT: usize = 8;

/// With the target in its slot, and in a register if one is given; after [`probe`].
fn dispatch(l: &mut Lowering<'_>, r: Option<u8>) {
    let target = gs(slot::TARGET);
    l.mark(What::Target);
    if !l.around.linked {
        l.e.push(0xe9);
        let site = l.e.len();
        l.e.push_u32(0);
        l.e.set_rel32(site, l.around.miss);
        return;
    }
    match r {
        _ if finds_by_pext() => {
            l.e.bytes.extend_from_slice(&JMP_R11);
            return;
        }
        Some(r) => dynasm!(l.e; .arch x64; movzx r11d, Rw(r)),
        None => dynasm!(l.e; .arch x64; gs movzx r11d, WORD [target]),
    }
    dynasm!(l.e; .arch x64; gs jmp QWORD [r11 * 8 + TABLE]);
}

/// JMP or CALL through a register or memory. Falls through in a trace that goes on at `next`.
pub(crate) fn indirect(l: &mut Lowering<'_>, item: &Item, next: Option<u64>) -> bool {
    let start = (l.e.len(), l.marks.len(), l.home, l.relocations.len());
    let apart = l.home == Home::Slot;
    l.put_away(item.at);
    for &(r, from) in homed().iter().filter(|(r, _)| apart && use_of(&item.iced, *r) != Use::Unused) {
        let (r, from) = (r as u8, gs(from));
        dynasm!(l.e; .arch x64; gs mov Rq(r), [from]);
    }
    let r = match Gpr::from_iced(item.iced.op0_register()) {
        Some(r) if item.iced.op0_kind() == OpKind::Register => r,
        _ if load_target(l, item) => Gpr::R11,
        _ => {
            l.e.bytes.truncate(start.0);
            l.marks.truncate(start.1);
            l.home = start.2;
            l.relocations.truncate(start.3);
            l.leave(Leave::Step(l.block.rip(item)));
            return false;
        }
    };
    // R10 keeps RCX.
    let Some(next) = next.filter(|_| r != Gpr::R10) else {
        look_up(l, item, r);
        return false;
    };
    keep_rcx(l);
    let over = jump_if_it_is(l, r, next, What::Guessing(item.at));
    fetch_rcx(l);
    l.mark(What::At(item.at));
    look_up(l, item, r);
    l.land(over);
    l.mark(What::Guessing(item.at));
    fetch_rcx(l);
    if item.route == Route::CallIndirect {
        l.mark(What::At(item.at));
        push_return(l, item);
    }
    true
}

/// JMP or CALL to what is in a register.
fn look_up(l: &mut Lowering<'_>, item: &Item, r: Gpr) {
    probe(l, item, r as u8);
    if item.route == Route::CallIndirect {
        push_return(l, item);
    }
    // The push changes RSP.
    dispatch(l, (r != Gpr::R11 && r != Gpr::Rsp).then_some(r as u8));
}

/// RET in a trace that goes on at `next` if that is what it pops: no look-up, and no indirect branch. Falls through.
pub(crate) fn ret_to(l: &mut Lowering<'_>, item: &Item, next: u64) -> bool {
    l.put_away(item.at);
    keep_rcx(l);
    dynasm!(l.e; .arch x64; pop r11);
    let over = jump_if_it_is(l, Gpr::R11, next, What::Returning(item.at));
    fetch_rcx(l);
    l.mark(What::ProbePopped(item.at));
    dynasm!(l.e; .arch x64; lea rsp, [rsp - 8]);
    ret(l, item);
    l.land(over);
    l.mark(What::Returning(item.at));
    fetch_rcx(l);
    if let 1.. = item.iced.op_count() {
        l.mark(What::ProbePopped(item.at));
        let more = i32::from(item.iced.immediate16());
        dynasm!(l.e; .arch x64; lea rsp, [rsp + more]);
    }
    true
}

/// Jumps if a register is `next`, without a flag; RCX, which was kept, is lost, and `what` holds all the while. Gives where its displacement is.
fn jump_if_it_is(l: &mut Lowering<'_>, r: Gpr, next: u64, what: What) -> usize {
    l.mark(what);
    let minus = (next as i64).wrapping_neg();
    let r = r as u8;
    match i32::try_from(minus) {
        Ok(minus) => dynasm!(l.e; .arch x64; lea rcx, [Rq(r) + minus]),
        Err(_) if r == Gpr::Rcx as u8 => {
            dynasm!(l.e; .arch x64; mov r11, rcx; mov rcx, QWORD minus; lea rcx, [rcx + r11])
        }
        Err(_) => dynasm!(l.e; .arch x64; mov rcx, QWORD minus; lea rcx, [rcx + Rq(r)]),
    }
    // jrcxz
    l.e.bytes.extend_from_slice(&[0xe3, 0]);
    l.e.len() - 1
}

/// Where R10 and R11 are in their slots.
fn keep_rcx(l: &mut Lowering<'_>) {
    let kept = gs(slot::TMP);
    if adds_up() {
        dynasm!(l.e; .arch x64; mov r10, rcx);
    } else {
        dynasm!(l.e; .arch x64; gs mov [kept], rcx);
    }
}

/// What [`keep_rcx`] kept.
fn fetch_rcx(l: &mut Lowering<'_>) {
    let kept = gs(slot::TMP);
    if adds_up() {
        dynasm!(l.e; .arch x64; mov rcx, r10);
    } else {
        dynasm!(l.e; .arch x64; gs mov rcx, [kept]);
    }
}

/// RET, RET n.
pub(crate) fn ret(l: &mut Lowering<'_>, item: &Item) -> bool {
    l.put_away(item.at);
    let n = if item.iced.op_count() == 0 { 8 } else { i32::from(item.iced.immediate16()) + 8 };
    if adds_up() {
        pop_and_add_up(l, item);
        if n > 8 {
            let more = n - 8;
            dynasm!(l.e; .arch x64; lea rsp, [rsp + more]);
        }
        dispatch(l, None);
        return false;
    }
    dynasm!(l.e; .arch x64; mov r11, [rsp]);
    probe(l, item, Gpr::R11 as u8);
    dynasm!(l.e; .arch x64; lea rsp, [rsp + n]);
    dispatch(l, None);
    false
}

/// Is LOOP one plain instruction? So on AMD's CPUs; on Intel's it is several times slower than JRCXZ (Fog, Instruction tables).
fn loop_is_fast() -> bool {
    is_amd()
}

/// Has the host RORX and SHRX, which move bits without touching flags?
pub(super) fn has_bmi2() -> bool {
    std::is_x86_feature_detected!("bmi2")
}

/// Bytes of a landing that compares by RORX and JRCXZ.
const LANDING_SIZE: u64 = 36;

/// Emits the landing of the block at `guest`, which must follow it. `next` is where a branch goes that was not meant.
pub fn emit_landing(e: &mut Emitter, marks: &mut Vec<Mark>, guest: u64, next: u64) -> Landing {
    if adds_up() {
        // Branches arrive behind it, in the first half of a line: late in one, there is little to fetch at once. See bench/README.md.
        e.align(4, 0xcc);
        let late = (e.here() + LANDING_SIZE) % 64;
        (late..64).filter(|_| late > 32).for_each(|_| e.push(0xcc));
    }
    landing(e, marks, guest, next, loop_is_fast(), has_bmi2())
}

/// With LOOP, which jumps unless RCX was 1, the way to the block is straight. A taken jump there, as with JRCXZ, would fill the history
/// by which the host CPU foretells indirect branches: objects with virtual methods were 1.8 times slower on Zen 4. The slot is read
/// aligned: RFLAGS.AC is the guest's.
fn landing(e: &mut Emitter, marks: &mut Vec<Mark>, guest: u64, next: u64, straight: bool, rorx: bool) -> Landing {
    let target = gs(slot::TARGET);
    let mark = |e: &Emitter, marks: &mut Vec<Mark>, what| {
        marks.push(Mark { at: e.len() as u16, what, home: Home::Slot });
    };
    // The field that is patched then never crosses a line, and Zen 4 tells the targets apart better: see bench/README.md.
    e.align(4, 0xcc);
    let not_meant = e.len();
    mark(e, marks, What::Comparing);
    dynasm!(e; .arch x64; mov rcx, r11);
    mark(e, marks, What::Target);
    e.push(0xe9);
    let next_at = e.len();
    e.push_u32(0);
    e.set_rel32(next_at, next);
    let at = Landing::new(e.len() as u32);
    dynasm!(e; .arch x64; mov r11, rcx);
    mark(e, marks, What::Comparing);
    if rorx {
        // rorx rcx, gs:[target], 15
        e.bytes.extend_from_slice(&[0x65, 0xc4, 0xe3, 0xfb, 0xf0, 0x0c, 0x25]);
        e.push_i32(target);
        e.push(15);
        compare_ecx(e, (guest >> 15) as i32, not_meant, straight);
    } else {
        let high = target + 4;
        dynasm!(e; .arch x64; gs mov ecx, [high]);
        compare_ecx(e, (guest >> 32) as i32, not_meant, straight);
        dynasm!(e; .arch x64; gs mov ecx, [target]);
        compare_ecx(e, guest as i32, not_meant, straight);
    }
    dynasm!(e; .arch x64; mov rcx, r11);
    mark(e, marks, What::At(0));
    at
}

/// Goes on if ECX is `wanted`, else back; without flags.
fn compare_ecx(e: &mut Emitter, wanted: i32, back: usize, straight: bool) {
    let minus = wanted.wrapping_neg().wrapping_add(i32::from(straight));
    dynasm!(e; .arch x64; lea ecx, [rcx + minus]);
    if !straight {
        // jrcxz over the jump back
        e.bytes.extend_from_slice(&[0xe3, 2]);
    }
    let back = back as i64 - (e.len() as i64 + 2);
    e.bytes.extend_from_slice(&[if straight { 0xe2 } else { 0xeb }, back as u8]);
}

/// The code at the start of the cache: the way out for exits (offset 0) and for missed targets; gives the latter's offset.
pub fn emit_trampolines(e: &mut Emitter, marks: &mut Vec<Mark>) -> usize {
    let (leave, exit) = (gs(slot::LEAVE), gs(slot::EXIT));
    marks.push(Mark { at: e.len() as u16, what: What::Exiting, home: Home::Register });
    dynasm!(e; .arch x64; gs jmp QWORD [leave]);
    e.align(4, 0xcc);
    let miss = e.len();
    assert_eq!(miss, MISS_AT);
    marks.push(Mark { at: miss as u16, what: What::Target, home: Home::Slot });
    dynasm!(e
        ; .arch x64
        ; gs mov DWORD [exit], MISS as i32
        ; gs jmp QWORD [leave]
    );
    miss
}

#[cfg(test)]
mod tests {
    use super::*;
    use bivisor_emulator::host::thread::SCRATCH_OFFSET;
    use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Register};

    /// Follows a landing with a target: gives where it leads, RCX then, and the guest's RCX.
    fn follow(code: &[u8], from: u32, target: u64) -> (u64, u64) {
        const GUEST_RCX: u64 = 0x1234_5678_9abc_def0;
        let (mut rcx, mut r11) = (GUEST_RCX, 0);
        let mut at = u64::from(from);
        while at < code.len() as u64 {
            let mut d = Decoder::with_ip(64, &code[at as usize..], at, DecoderOptions::NONE);
            let i: Instruction = d.decode();
            at = i.next_ip();
            match i.code() {
                Code::Mov_rm64_r64 | Code::Mov_r64_rm64 if i.op0_register() == Register::R11 => r11 = rcx,
                Code::Mov_rm64_r64 | Code::Mov_r64_rm64 => rcx = r11,
                Code::Mov_r32_rm32 => {
                    let byte = i.memory_displacement64() - (SCRATCH_OFFSET as u64 + 8 * slot::TARGET as u64);
                    rcx = u64::from((target >> (8 * byte)) as u32);
                }
                Code::VEX_Rorx_r64_rm64_imm8 => rcx = target.rotate_right(u32::from(i.immediate8())),
                Code::Lea_r32_m => rcx = u64::from((rcx as u32).wrapping_add(i.memory_displacement64() as u32)),
                Code::Jrcxz_rel8_64 if rcx == 0 => at = i.near_branch_target(),
                Code::Jrcxz_rel8_64 => {}
                Code::Loop_rel8_64_RCX => {
                    rcx = rcx.wrapping_sub(1);
                    if rcx != 0 {
                        at = i.near_branch_target();
                    }
                }
                Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => at = i.near_branch_target(),
                code => panic!("{code:?}"),
            }
        }
        (at, rcx ^ GUEST_RCX)
    }

    /// One of each register; what an address comes to is taken from the decoder.
    #[test]
    fn the_bits_of_a_target_choose_the_entry_or_lead_into_the_guard() {
        for r in 0..16u8 {
            let mut e = Emitter::new(0);
            fault_unless_user(&mut e, r, true);
            let mut d = Decoder::new(64, &e.bytes, DecoderOptions::NONE);
            let (pext, load): (Instruction, Instruction) = (d.decode(), d.decode());
            assert_eq!(pext.code(), Code::VEX_Pext_r64_r64_rm64);
            assert_eq!((pext.op0_register(), pext.op1_register().number()), (Register::R11, usize::from(r)));
            assert_eq!(
                (pext.segment_prefix(), pext.memory_displacement64()),
                (Register::GS, gs(slot::ADDRESS_BITS) as u64)
            );
            assert_eq!(load.code(), Code::Mov_r64_rm64);
            assert_eq!(
                (load.segment_prefix(), load.memory_base(), load.memory_index(), load.memory_index_scale()),
                (Register::GS, Register::None, Register::R11, 8)
            );
            assert_eq!(load.memory_displacement64(), TABLE as u64);
            e.bytes.clear();
            fault_unless_user(&mut e, r, false);
            let load: Instruction = Decoder::new(64, &e.bytes, DecoderOptions::NONE).decode();
            assert_eq!((load.memory_base().number(), load.memory_displacement64()), (usize::from(r), 0));
        }
        // PEXT, as the manual has it (SDM 2B).
        let pext = |v: u64| {
            let bits = (0..64).filter(|i| ADDRESS_BITS >> i & 1 != 0);
            bits.enumerate().fold(0u64, |all, (to, from)| all | (v >> from & 1) << to)
        };
        let entries = 1 << 16;
        for target in [0u64, 0x7fff_ffff_ffff, 0x7f12_3456_789a] {
            assert_eq!(pext(target), target & 0xffff);
            for bit in 47..64 {
                let to = pext(target | 1 << bit);
                assert!((entries..1 << 33).contains(&to), "{target:#x} {bit}");
            }
        }
        assert!(pext(u64::MAX) < GUARD_SIZE as u64 / 8);
    }

    fn bits(mask: u64) -> impl Iterator<Item = u32> {
        (0..64).filter(move |i| mask >> i & 1 != 0)
    }

    /// What R11 is after the instructions that find an entry and add up, with a table of one entry: its index and two words. `None`:
    /// the entry is not read, but another or the guard.
    fn sum(code: &[u8], target: u64, (index, words): (u64, [u64; 2])) -> Option<u64> {
        let (mut r10, mut r11) = (target, target);
        let read = |i: &Instruction, r11: u64| {
            assert_eq!(
                (i.segment_prefix(), i.memory_index(), i.memory_index_scale()),
                (Register::GS, Register::R11, 8)
            );
            let at = (r11 * 8).wrapping_add(i.memory_displacement64()).wrapping_sub(TABLE as u64);
            (at / 16 == index).then(|| words[at as usize % 16 / 8])
        };
        for i in Decoder::new(64, code, DecoderOptions::NONE) {
            let from = match i.op1_register() {
                Register::R11 => r11,
                Register::R10 => r10,
                _ => target,
            };
            match i.code() {
                Code::VEX_Rorx_r64_rm64_imm8 => r10 = from.rotate_right(u32::from(i.immediate8())),
                Code::VEX_Pext_r64_r64_rm64 => {
                    assert_eq!(i.memory_displacement64(), gs(slot::ADDRESS_BITS) as u64);
                    r11 = bits(ADDRESS_BITS).enumerate().fold(0, |all, (to, bit)| all | (from >> bit & 1) << to);
                }
                Code::VEX_Pdep_r64_r64_rm64 => {
                    assert_eq!([0, 1].map(|n| i.op_register(n)), [Register::R10; 2]);
                    r10 = bits(read(&i, r11)?).enumerate().fold(0, |all, (from, to)| all | (r10 >> from & 1) << to);
                }
                Code::Mov_r64_rm64 => r11 = read(&i, r11)?,
                Code::Lea_r64_m if i.memory_index() == Register::R11 => r11 *= 2,
                Code::Lea_r64_m => r11 = r11.wrapping_add(r10),
                code => panic!("{code:?}"),
            }
        }
        Some(r11)
    }

    #[test]
    fn a_sum_is_the_code_for_its_own_target_alone() {
        const BODY: u64 = 0x7f00_4010_1234;
        for r in 0..16u8 {
            let mut e = Emitter::new(0);
            find(&mut e, r);
            add_up(&mut e);
            for i in Decoder::new(64, &e.bytes, DecoderOptions::NONE).into_iter().take(2) {
                assert_eq!(i.op1_register().number(), usize::from(r), "{i}");
            }
            for guest in [0x40_1234u64, 0xffff, 0x7fff_dead_beef, 0x8000_1234, 0x1_8000_1234] {
                let entry = (guest & 0xffff, [BODY.wrapping_sub(addend(guest)), ADDEND]);
                assert_eq!(sum(&e.bytes, guest, entry), Some(BODY), "{guest:x}");
                for bit in 0..64 {
                    match sum(&e.bytes, guest ^ 1 << bit, entry) {
                        Some(to) => {
                            assert!((15..47).contains(&bit), "{bit}");
                            let distance = to.wrapping_sub(BODY);
                            assert!(distance != 0 && distance % code_space::PERIOD == 0, "{guest:x} {bit}");
                        }
                        None => assert!(!(16..47).contains(&bit), "{bit}"),
                    }
                }
                // An entry of several adds nothing.
                let entry = (guest & 0xffff, [BODY, 0]);
                assert_eq!(sum(&e.bytes, guest ^ 0x7ff_1234_0000, entry), Some(BODY));
            }
        }
    }

    #[test]
    fn every_kind_of_landing_takes_its_own_target_alone() {
        for (straight, rorx) in [(false, false), (false, true), (true, false), (true, true)] {
            for guest in [0x40_1234u64, 0xffff, 0x7fff_dead_beef, 0x8000_1234, 0x1_8000_1234] {
                let mut e = Emitter::new(0);
                let l = landing(&mut e, &mut Vec::new(), guest, 0x10_0000, straight, rorx);
                assert_eq!(follow(&e.bytes, l.at() as u32, guest), (e.len() as u64, 0), "{guest:x}");
                assert!((straight, rorx) != (false, true) || e.len() as u64 == LANDING_SIZE);
                for bit in 15..47 {
                    assert_eq!(
                        follow(&e.bytes, l.at() as u32, guest ^ 1 << bit),
                        (0x10_0000, 0),
                        "{guest:x} bit {bit}"
                    );
                }
            }
        }
    }
}
