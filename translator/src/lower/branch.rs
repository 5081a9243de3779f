//! Control transfers. Direct ones are jumps that are patched to their target; indirect ones, returns included, look their target up
//! in a table without touching a flag.
//!
//! An indirect branch saves RCX and R11 in slots, puts the target in RCX and jumps through the table entry of its low 16 bits. What it
//! arrives at is the *landing* of some block (or the miss trampoline): code that knows its own guest address, subtracts it by LEA, asks
//! JRCXZ, and goes on to the next landing of the same entry if it was not meant. CALL pushes the guest's return address.
//!
//! A target that is no canonical address faults at the branch, before anything has changed (SDM 2A JMP, CALL, RET). In the flat model a
//! load through it finds out: storing instead which branch it is made a recursive function 20 % slower.

use crate::block::Item;
use crate::emit::{Emitter, TABLE, gs, slot};
use crate::enter::MISS;
use crate::lower::memory::load_target;
use crate::lower::{Depends, Leave, Lowering};
use crate::marks::{Mark, Saved, What};
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::ConditionCode;

/// The way in for indirect branches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Landing {
    /// Its offset.
    pub at: u32,
    /// Offset of the displacement of its jump to the next landing.
    pub next: u32,
}

/// JMP rel. Never falls through.
pub(crate) fn jump(l: &mut Lowering<'_>, item: &Item) -> bool {
    let to = item.iced.near_branch_target();
    l.mark(What::At(item.at));
    l.link(&[0xe9], to);
    false
}

/// Jcc.
pub(crate) fn conditional(l: &mut Lowering<'_>, item: &Item) {
    let to = item.iced.near_branch_target();
    l.mark(What::At(item.at));
    l.link(&[0x0f, 0x80 | condition(item.iced.condition_code())], to);
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

/// CALL rel. The target comes after the push.
pub(crate) fn call(l: &mut Lowering<'_>, item: &Item) -> bool {
    let to = item.iced.near_branch_target();
    let back = l.block.next_rip(item);
    l.mark(What::At(item.at));
    push_constant(l, back);
    let id = l.around.first_exit + l.exits.len() as u32;
    l.mark(What::Exit(id));
    l.link(&[0xe9], to);
    false
}

/// Saves the two registers and says that the instruction has not begun.
fn begin(l: &mut Lowering<'_>, item: &Item) {
    let (s_rcx, s_r11) = (gs(slot::RCX), gs(slot::R11));
    l.mark(What::At(item.at));
    dynasm!(l.e
        ; .arch x64
        ; gs mov [s_rcx], rcx
        ; gs mov [s_r11], r11
    );
}

/// With the target in RCX, nothing else changed: faults if it is not canonical.
fn probe(l: &mut Lowering<'_>, item: &Item) {
    l.mark(What::Probe(item.at));
    dynasm!(l.e; .arch x64; movzx r11d, BYTE [rcx]);
    l.mark(What::UndoBoth(item.at));
}

/// With the target in RCX.
fn dispatch(l: &mut Lowering<'_>) {
    l.mark(What::Target);
    if !l.around.linked {
        l.e.push(0xe9);
        let site = l.e.len();
        l.e.push_u32(0);
        l.e.set_rel32(site, l.around.miss);
        return;
    }
    dynasm!(l.e
        ; .arch x64
        ; movzx r11d, cx
        ; gs jmp QWORD [r11 * 8 + TABLE]
    );
}

/// JMP or CALL through a register or memory.
pub(crate) fn indirect(l: &mut Lowering<'_>, item: &Item) -> bool {
    let start = (l.e.len(), l.marks.len());
    begin(l, item);
    if !load_target(l, item) {
        l.e.bytes.truncate(start.0);
        l.marks.truncate(start.1);
        l.leave(Leave::Step(l.block.rip(item)));
        return false;
    }
    probe(l, item);
    if item.route == crate::route::Route::CallIndirect {
        let back = l.block.next_rip(item);
        push_constant(l, back);
    }
    dispatch(l);
    false
}

/// RET, RET n.
pub(crate) fn ret(l: &mut Lowering<'_>, item: &Item) -> bool {
    begin(l, item);
    let n = if item.iced.op_count() == 0 { 8 } else { i32::from(item.iced.immediate16()) + 8 };
    dynasm!(l.e; .arch x64; mov rcx, [rsp]);
    probe(l, item);
    dynasm!(l.e; .arch x64; lea rsp, [rsp + n]);
    dispatch(l);
    false
}

/// Emits the landing of the block at `guest`, which must follow it. `next` is where a branch goes that was not meant.
pub fn emit_landing(e: &mut Emitter, marks: &mut Vec<Mark>, guest: u64, next: u64) -> Landing {
    let (s_rcx, s_r11) = (gs(slot::RCX), gs(slot::R11));
    let at = e.len() as u32;
    let mark = |e: &Emitter, marks: &mut Vec<Mark>, what| marks.push(Mark { at: e.len() as u16, what });
    mark(e, marks, What::Target);
    let minus = guest.wrapping_neg() as i64;
    if let Ok(minus) = i32::try_from(minus) {
        dynasm!(e; .arch x64; mov r11, minus);
    } else {
        dynasm!(e; .arch x64; mov r11, QWORD minus);
    }
    dynasm!(e; .arch x64; lea rcx, [rcx + r11]);
    mark(e, marks, What::TargetDifference);
    // not r11 = guest - 1.
    e.align_patch(2 + 3 + 5 + 1);
    e.bytes.extend_from_slice(&[0xe3, 3 + 5 + 5]);
    dynasm!(e
        ; .arch x64
        ; not r11
        ; lea rcx, [rcx + r11 + 1]
    );
    mark(e, marks, What::Target);
    e.push(0xe9);
    let next_at = e.len() as u32;
    e.push_u32(0);
    e.set_rel32(next_at as usize, next);
    mark(e, marks, What::TargetDifference);
    dynasm!(e; .arch x64; gs mov rcx, [s_rcx]);
    mark(e, marks, What::Undo(0, Saved::R11));
    dynasm!(e; .arch x64; gs mov r11, [s_r11]);
    mark(e, marks, What::At(0));
    Landing { at, next: next_at }
}

/// The code at the start of the cache: the way out for exits (offset 0) and for missed targets; gives the latter's offset.
pub fn emit_trampolines(e: &mut Emitter, marks: &mut Vec<Mark>) -> usize {
    let (s_rcx, s_r11, leave, target, exit) =
        (gs(slot::RCX), gs(slot::R11), gs(slot::LEAVE), gs(slot::TARGET), gs(slot::EXIT));
    marks.push(Mark { at: e.len() as u16, what: What::Exiting });
    dynasm!(e; .arch x64; gs jmp QWORD [leave]);
    e.align(16, 0xcc);
    let miss = e.len();
    marks.push(Mark { at: miss as u16, what: What::Target });
    dynasm!(e
        ; .arch x64
        ; gs mov [target], rcx
        ; gs mov rcx, [s_rcx]
    );
    marks.push(Mark { at: e.len() as u16, what: What::Missed });
    dynasm!(e
        ; .arch x64
        ; gs mov r11, [s_r11]
        ; gs mov DWORD [exit], MISS as i32
        ; gs jmp QWORD [leave]
    );
    miss
}
