//! Lowering: a guest block becomes host code; one file a way of lowering.
//!
//! Guest registers are the host's registers, RSP and flags included, but for R11, and R10 on some CPUs, which may be in slots ([`Home`]):
//! code for a guest address comes in up to two kinds, by where they are at its start. The context is reached through GS. A piece of code has an
//! optional *landing* (the way in for indirect branches), the body, the stubs of its exits, and constants.

// dynasm's dynamic registers convert a u8 to itself.
#![allow(clippy::useless_conversion)]

mod branch;
mod bytes;
pub(crate) mod compare;
mod copy;
pub mod memory;
mod relocate;
mod stub;
mod syscall;

use crate::block::{GuestBlock, Item};
use crate::emit::{Emitter, gs};
use crate::marks::{Home, Mark, What, homed};
use crate::route::Route;
use bivisor_emulator::isa::Gpr;
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

pub use branch::{
    ADDEND, ADDRESS_BITS, JMP_R11, Landing, MISS_AT, addend, adds_up, emit_landing, emit_trampolines, finds_by_pext,
};
pub use relocate::{Depends, Relocation, move_code};
pub use stub::{emit_stubs, exit_said, nth_said, stub_at, stub_before, stubs_size};

/// Why a piece of code is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// To the block at this address; the jump can be patched to it.
    To(u64),
    /// One interpreter step at this address.
    Step(u64),
    /// SYSCALL at this address, of this length.
    Syscall(u64, u8),
    /// The block at this address was made from other bytes than are there now.
    Changed(u64),
}

impl Leave {
    /// As a kind and an address: 0, to a block; 1, step; 2, changed code; else 3 + length of SYSCALL.
    pub fn pack(self) -> (u8, u64) {
        match self {
            Leave::To(rip) => (0, rip),
            Leave::Step(rip) => (1, rip),
            Leave::Changed(rip) => (2, rip),
            Leave::Syscall(rip, len) => (3 + len, rip),
        }
    }

    /// What [`Leave::pack`] made.
    pub fn unpack(kind: u8, rip: u64) -> Leave {
        match kind {
            0 => Leave::To(rip),
            1 => Leave::Step(rip),
            2 => Leave::Changed(rip),
            n => Leave::Syscall(rip, n - 3),
        }
    }

    /// The same of a guest that lies further on.
    pub fn moved(self, by: u64) -> Leave {
        let (kind, rip) = self.pack();
        Leave::unpack(kind, rip.wrapping_add(by))
    }
}

/// One exit of a piece of code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Why.
    pub leave: Leave,
    /// Offset of the displacement of the jump, for [`Leave::To`].
    pub site: u32,
    /// The displacement has 8 bits: a jump to the start of its own block.
    pub short: bool,
    /// For a short displacement: offset of a jump to the stub.
    pub step: u32,
    /// The code the jump leads to already, if not to the stub: a code address.
    pub linked: Option<u64>,
    /// Instructions of the block that have begun when it is taken, the one that takes it included.
    pub begun: u16,
    /// Where R11 is, and what has a home with it.
    pub home: Home,
}

/// What lowering wants to know about the cache.
pub struct Surroundings<'a> {
    /// Host address the code will have.
    pub at: u64,
    /// The number the first exit will have.
    pub first_exit: u32,
    /// Host address of the end of the stubs, which lie apart.
    pub stubs: u64,
    /// Host address of the way out for indirect branches without a target.
    pub miss: u64,
    /// Where R11 is at the start.
    pub home: Home,
    /// The body of the live block at a guest address, for R11 there.
    pub known: &'a dyn Fn(u64, Home) -> Option<u64>,
    /// Jumps may lead straight to translated code; otherwise every one leaves.
    pub linked: bool,
}

/// A lowered block.
#[derive(Debug, Default)]
pub struct Unit {
    /// The host code.
    pub code: Vec<u8>,
    /// The way back.
    pub marks: Vec<Mark>,
    /// Its exits; the i-th has number `first_exit + i`.
    pub exits: Vec<Exit>,
    /// The landing, if asked for.
    pub landing: Option<Landing>,
    /// Offset of the body.
    pub body: u32,
    /// Guest bytes covered: less than decoded if the rest was translated already.
    pub guest_len: u16,
    /// Guest instructions.
    pub insns: u16,
    /// What depends on where guest and host code lie, but for the landing and the exits that are jumps.
    pub relocations: Vec<Relocation>,
    constants: Vec<(usize, u64)>,
}

impl Unit {
    /// Empties it, but for the memory it has.
    pub fn clear(&mut self) {
        self.code.clear();
        self.marks.clear();
        self.exits.clear();
        self.constants.clear();
        self.relocations.clear();
        self.landing = None;
    }
}

/// The work in progress.
pub(crate) struct Lowering<'a> {
    pub e: Emitter,
    pub marks: Vec<Mark>,
    pub exits: Vec<Exit>,
    /// 8-byte constants, and where their RIP-relative displacements are.
    pub constants: Vec<(usize, u64)>,
    pub relocations: Vec<Relocation>,
    pub block: &'a GuestBlock,
    pub around: &'a Surroundings<'a>,
    /// Host address of the body.
    pub body: u64,
    /// May the jumps that close a loop be short ones?
    pub short: bool,
    /// Instructions lowered, the one at work included.
    pub begun: u16,
    /// Where R11 is, and what has a home with it.
    pub home: Home,
    /// Where they are once the instruction at work is done.
    pub then: Home,
}

/// What an instruction does with a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    Unused,
    /// Sets all of it, whatever it was.
    Sets,
    Wanted,
}

/// See [`Use`]; of one of [`homed`]. Only SYSCALL uses them without naming them.
pub(crate) fn use_of(i: &Instruction, r: Gpr) -> Use {
    let [whole, half, word, byte] = match r {
        Gpr::R10 => [Register::R10, Register::R10D, Register::R10W, Register::R10L],
        _ => [Register::R11, Register::R11D, Register::R11W, Register::R11L],
    };
    let is = |r| r == whole || r == half || r == word || r == byte;
    if is(i.memory_base()) || is(i.memory_index()) {
        return Use::Wanted;
    }
    let named = (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register && is(i.op_register(n)));
    match named.count() {
        0 => Use::Unused,
        1 if i.op_kind(0) == OpKind::Register && (i.op0_register() == whole || i.op0_register() == half) => {
            match i.mnemonic() {
                Mnemonic::Mov
                | Mnemonic::Lea
                | Mnemonic::Movzx
                | Mnemonic::Movsx
                | Mnemonic::Movsxd
                | Mnemonic::Pop => Use::Sets,
                _ => Use::Wanted,
            }
        }
        _ => Use::Wanted,
    }
}

impl Lowering<'_> {
    /// From here on, `what` holds.
    pub fn mark(&mut self, what: What) {
        let at = self.e.len() as u16;
        match self.marks.last_mut() {
            Some(m) if m.at == at => *m = Mark { at, what, home: self.home },
            // Copied code goes on.
            Some(Mark { at: from, what: What::Copied(d), home })
                if *home == self.home && matches!(what, What::Copied(n) if n.wrapping_sub(*d) == at - *from) => {}
            _ => self.marks.push(Mark { at, what, home: self.home }),
        }
    }

    /// Sees to it that an instruction finds the registers that have a home where it wants them; gives where they are afterwards.
    fn fetch(&mut self, item: &Item) -> Home {
        let uses = |&(r, _): &(Gpr, usize)| use_of(&item.iced, r);
        if self.home == Home::Register || homed().iter().all(|r| uses(r) == Use::Unused) {
            return self.home;
        }
        for (r, from) in homed().iter().filter(|&r| uses(r) != Use::Sets) {
            self.mark(What::At(item.at));
            let (r, from) = (*r as u8, gs(*from));
            dynasm!(self.e; .arch x64; gs mov Rq(r), [from]);
        }
        if homed().iter().all(|r| uses(r) != Use::Sets) {
            self.home = Home::Register;
        }
        Home::Register
    }

    /// Marks the beginning of what, `at` bytes from the start of the block, needs these registers for itself.
    pub(crate) fn put_away(&mut self, at: u16) {
        self.mark(What::At(at));
        if self.home == Home::Register {
            self.store_homed();
            self.mark(What::At(at));
        }
    }

    /// From where they are registers.
    pub(crate) fn store_homed(&mut self) {
        for &(r, to) in homed() {
            let (r, to) = (r as u8, gs(to));
            dynasm!(self.e; .arch x64; gs mov [to], Rq(r));
        }
        self.home = Home::Slot;
    }

    /// Notes that the field at `at` depends on where code lies.
    pub fn relocation(&mut self, at: usize, depends: Depends) {
        self.relocations.push(Relocation { at: at as u16, depends });
    }

    /// Records an exit; gives its number.
    pub fn exit(&mut self, leave: Leave, site: usize, linked: Option<u64>) -> u32 {
        self.exits.push(Exit {
            leave,
            site: site as u32,
            short: false,
            step: 0,
            linked,
            begun: self.begun,
            home: self.home,
        });
        self.around.first_exit + self.exits.len() as u32 - 1
    }

    /// A jump with a 32-bit displacement (`opcode` before it) to the block at `target`: straight there if it is translated.
    pub fn link(&mut self, opcode: &[u8], target: u64) {
        let short = match *opcode {
            [0x0f, jcc] => jcc - 0x10,
            _ => 0xeb,
        };
        if !self.close_loop(&[short], target) {
            self.link_long(opcode, target);
        }
    }

    /// As [`Lowering::link`], never short.
    pub(crate) fn link_long(&mut self, opcode: &[u8], target: u64) {
        self.e.align_patch(opcode.len());
        self.e.bytes.extend_from_slice(opcode);
        let site = self.e.len();
        self.e.push_u32(0);
        let to = match self.around.linked {
            true if target == self.block.start && self.home == self.around.home => Some(self.body),
            true => (self.around.known)(target, self.home),
            false => None,
        };
        if let Some(to) = to {
            self.e.set_rel32(site, to);
        }
        self.exit(Leave::To(target), site, to);
    }

    /// Makes the 8-bit displacement at `site` lead here.
    pub(crate) fn land(&mut self, site: usize) {
        let by = self.e.len() - (site + 1);
        self.e.bytes[site] = i8::try_from(by).expect("what is jumped over is short") as u8;
    }

    /// A jump back to the start of this block with an 8-bit displacement, if it can be.
    pub(crate) fn close_loop(&mut self, opcode: &[u8], target: u64) -> bool {
        let back = self.body.wrapping_sub(self.e.here() + opcode.len() as u64 + 1) as i64;
        let Ok(back) = i8::try_from(back) else { return false };
        if !self.short || !self.around.linked || target != self.block.start || self.home != self.around.home {
            return false;
        }
        self.e.bytes.extend_from_slice(opcode);
        self.e.bytes.push(back as u8);
        self.exit(Leave::To(target), self.e.len() - 1, Some(self.body));
        self.exits.last_mut().expect("just pushed").short = true;
        true
    }

    /// Leaves here.
    pub(crate) fn leave(&mut self, leave: Leave) {
        let id = self.exit(leave, usize::MAX, None);
        self.mark(What::Exit(id));
        self.jump_to_stub(id);
    }

    fn jump_to_stub(&mut self, id: u32) {
        self.e.push(0xe9);
        let site = self.e.len();
        self.e.push_u32(0);
        self.e.set_rel32(site, stub_before(self.around.stubs, id));
        self.relocation(site, Depends::Stub((id - self.around.first_exit) as u16));
    }

    /// Leads all exits that are not linked to their stubs; the constants. False if a short jump does not reach.
    fn finish(&mut self) -> bool {
        for i in 0..self.exits.len() {
            let Exit { leave: Leave::To(_), site, linked, short, home, .. } = self.exits[i] else { continue };
            self.home = home;
            let id = self.around.first_exit + i as u32;
            if short {
                if self.e.len() - (site as usize + 1) > i8::MAX as usize {
                    return false;
                }
                self.exits[i].step = self.e.len() as u32;
                self.mark(What::Exit(id));
                self.jump_to_stub(id);
            } else if linked.is_none() {
                self.e.set_rel32(site as usize, stub_before(self.around.stubs, id));
            }
        }
        if !self.constants.is_empty() {
            self.e.align(8, 0xcc);
        }
        for (site, value) in self.constants.drain(..) {
            let here = self.e.here();
            self.e.set_rel32(site, here);
            self.relocations.push(Relocation { at: self.e.len() as u16, depends: Depends::Guest });
            self.e.push_u64(value);
        }
        true
    }
}

/// Lowers `block`; with a landing if it is the target of an indirect branch. The vectors of `old` are used again.
pub fn lower(block: &GuestBlock, around: &Surroundings<'_>, landing: bool, old: Unit) -> Unit {
    let (unit, done) = attempt_lower(block, around, landing, true, old);
    if done { unit } else { attempt_lower(block, around, landing, false, unit).0 }
}

/// Also whether all short jumps reach; without short jumps they do.
fn attempt_lower(
    block: &GuestBlock,
    around: &Surroundings<'_>,
    landing: bool,
    short: bool,
    mut old: Unit,
) -> (Unit, bool) {
    old.clear();
    let mut l = Lowering {
        e: Emitter { bytes: old.code, base: around.at },
        marks: old.marks,
        exits: old.exits,
        constants: old.constants,
        relocations: old.relocations,
        block,
        around,
        body: around.at,
        short,
        begun: 0,
        home: around.home,
        then: around.home,
    };
    let failure = block.compared.then(|| compare::emit_failure(&mut l));
    let landing = landing.then(|| emit_landing(&mut l.e, &mut l.marks, block.start, around.miss));
    if around.linked && block.is_loop() {
        // As the compiler has laid it out with regard to the lines of the host's caches.
        let pad = block.start.wrapping_sub(l.e.here()) % 64;
        l.e.nops(pad as usize);
    }
    let body = l.e.len() as u32;
    l.body = l.e.here();
    if let Some(failure) = failure {
        compare::emit(&mut l, failure);
    }
    let mut end = 0;
    let mut insns = 0;
    let mut open = true;
    for item in &block.items {
        // What follows a conditional branch may be there already.
        if insns > 0
            && !block.is_trace()
            && block.items[insns - 1].route == Route::Conditional
            && (around.known)(block.rip(item), l.home).is_some()
        {
            break;
        }
        insns += 1;
        l.begun = insns as u16;
        end = usize::from(item.at) + usize::from(item.len);
        let next = block.items.get(insns).filter(|_| block.is_trace()).map(|next| block.rip(next));
        open = match item.route {
            Route::Copy | Route::CopyAndEnd => {
                l.then = l.fetch(item);
                let copied = compare::load_immediate(&mut l, item) || copy::copy(&mut l, item);
                if copied {
                    l.home = l.then;
                } else {
                    l.leave(Leave::Step(block.rip(item)));
                }
                copied
            }
            Route::Conditional => {
                branch::conditional(&mut l, item, next);
                true
            }
            Route::Counted => {
                branch::counted(&mut l, item);
                true
            }
            // What it leads to follows.
            Route::Jump if next.is_some() => true,
            Route::Call if next.is_some() => branch::call_inside(&mut l, item),
            Route::Jump => branch::jump(&mut l, item, item.iced.near_branch_target()),
            Route::Call => branch::call(&mut l, item, item.iced.near_branch_target()),
            Route::JumpIndirect | Route::CallIndirect => match (block.constant, item.route) {
                (Some(c), Route::JumpIndirect) => branch::jump(&mut l, item, c.target),
                (Some(c), _) => branch::call(&mut l, item, c.target),
                (None, _) => branch::indirect(&mut l, item, next),
            },
            Route::Return => match next {
                Some(next) => branch::ret_to(&mut l, item, next),
                None => branch::ret(&mut l, item),
            },
            Route::Syscall => {
                syscall::syscall(&mut l, item);
                false
            }
            Route::Step => {
                l.leave(Leave::Step(block.rip(item)));
                false
            }
        };
        if !open {
            break;
        }
    }
    if open {
        let next = block.items.get(insns.wrapping_sub(1)).map_or(block.start, |last| block.next_rip(last));
        l.mark(What::At(end as u16));
        l.link(&[0xe9], next);
    }
    let done = l.finish();
    let unit = Unit {
        code: l.e.bytes,
        marks: l.marks,
        exits: l.exits,
        landing,
        body,
        // A trace is made from what blocks are there for.
        guest_len: if block.is_trace() { 0 } else { end as u16 },
        insns: insns as u16,
        constants: l.constants,
        relocations: l.relocations,
    };
    (unit, done)
}
