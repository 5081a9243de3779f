//! Control transfers.

use super::asm::{Assembler, At, W};
use super::scratch::bit;
use super::{Cold, Kind, Lower};
use crate::system::area::{FACTOR, FAST_HALF, MOVED, TARGET_MASK, at, gs};
use crate::system::block::{Access, Item, Way};
use bivisor_emulator::isa::Gpr;
use dynasmrt::DynasmApi;
use iced_x86::ConditionCode;

const LOOP: u8 = 0xe2;

/// Where a look at a fast table leaves if the target is not there.
struct Miss {
    /// After the 8-bit displacement that leads to its stub, if the stub is to follow.
    short: Option<usize>,
    exit: usize,
}

/// The low four bits of the opcode (SDM 1 appendix B).
pub(super) fn condition(cc: ConditionCode) -> u8 {
    use ConditionCode as C;
    match cc {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g | C::None => 15,
    }
}

impl Lower<'_> {
    /// Jcc.
    pub(super) fn conditional(&mut self, item: &Item) -> Option<bool> {
        self.restore_flags();
        if self.round == Some(self.n) {
            self.meet_round(item);
            return Some(true);
        }
        let recipe = self.leave_word();
        let opcode = [0x0f, 0x80 | condition(item.iced.condition_code())];
        self.side_exit(&opcode, item, recipe);
        Some(true)
    }

    /// A jump out of the block that may be taken, with everything home when it is.
    pub(super) fn side_exit(&mut self, opcode: &[u8], item: &Item, recipe: Option<u32>) {
        self.e.align_patch(opcode.len());
        let site = self.branch(opcode);
        let exit = self.exit(Kind::To, item.iced.near_branch_target(), self.flags, self.n + 1);
        self.exits[exit].recipe = recipe;
        let reload = self.spilled & !self.block.mode.resident();
        if reload == 0 {
            self.exits[exit].site = Some(site as u32);
        }
        self.cold.push(Cold { site, reload, exit, walk: None });
    }

    /// LOOP, LOOPE, LOOPNE, JECXZ, JRCXZ: they have only an 8-bit displacement, so they jump over a jump.
    pub(super) fn counted(&mut self, item: &Item) -> Option<bool> {
        self.home();
        self.restore_flags();
        let bytes = self.block.code(item);
        // Opcode and displacement are the last two bytes; a 67 prefix counts, others mean nothing here.
        let opcode = bytes[bytes.len() - 2];
        let narrow = self.block.mode.is_narrow() || bytes[..bytes.len() - 2].contains(&0x67);
        self.e.align_patch(usize::from(narrow) + 5);
        if narrow {
            self.e.push(0x67);
        }
        self.e.bytes.extend_from_slice(&[opcode, 2, 0xeb, 5]);
        let site = self.branch(&[0xe9]);
        let exit = self.exit(Kind::To, item.iced.near_branch_target(), self.flags, self.n + 1);
        self.exits[exit].site = Some(site as u32);
        self.cold.push(Cold { site, reload: 0, exit, walk: None });
        self.n += 1;
        self.go_to(self.block.next(item));
        self.n -= 1;
        Some(false)
    }

    /// Pushes the address after a CALL.
    fn push_return(&mut self, item: &Item) -> Option<()> {
        let back = self.block.next(item);
        let pushed = self.pushed();
        let host = self.reach(item, &pushed)?;
        let constant = match self.word() {
            W::D => Some(back as i32),
            W::Q => i32::try_from(back as i64).ok(),
        };
        let from = match constant {
            Some(back) => {
                let from = self.e.len();
                self.store_constant(host.at(), back);
                from
            }
            None => {
                let v = self.scratch(item, false)?;
                self.e.constant(v, back);
                let from = self.e.len();
                self.e.store(host.at(), v);
                from
            }
        };
        self.touched(item, from, host, &pushed);
        self.move_stack(-self.word_len());
        Some(())
    }

    /// CALL of a constant.
    pub(super) fn call(&mut self, item: &Item) -> Option<bool> {
        self.push_return(item)?;
        self.n += 1;
        self.go_to(item.iced.near_branch_target());
        self.n -= 1;
        Some(false)
    }

    /// Makes the offset of `target` in a cache of branch targets.
    pub(super) fn hash(&mut self, to: Gpr, target: Gpr) {
        // imul to, target, FACTOR
        self.e.rr(W::Q, &[0x69], to as u8, target, &FACTOR.to_le_bytes());
        self.e.shr(W::Q, to, MOVED);
        self.e.and(W::D, to, TARGET_MASK);
    }

    /// Finds the code at `target`; its address goes to a slot. Nothing has happened yet if it is not found.
    fn look_up(&mut self, item: &Item, target: Gpr) -> Option<()> {
        let s = self.scratch(item, false)?;
        self.give_up_flags(item);
        self.hash(s, target);
        self.e.compare(target, At::table(self.around.targets, s));
        self.leave_if(&[0x0f, 0x85], item, Kind::Indirect, self.block.rip(item), self.n);
        self.e.load(s, At::table(self.around.targets + 8, s));
        self.e.store(At::slot(at::TARGET), s);
        self.busy &= !bit(s);
        Some(())
    }

    /// To the code that was found.
    fn dispatch(&mut self) {
        self.home();
        self.e.rm(W::D, &[0xff], 4, At::slot(at::TARGET), &[]);
    }

    /// As [`Lower::look_up`] in a fast table, whose entries hold as long as mappings stay as they are: flags stay in EFLAGS, and the
    /// place where a target that is not there leaves is given back.
    fn look_up_fast(&mut self, item: &Item, mut target: Gpr, table: usize) -> Option<Miss> {
        self.restore_flags();
        let c = Gpr::Rcx;
        if target == c {
            target = self.scratch(item, false)?;
            self.e.copy(target, c);
        }
        self.windows.retain(|w| w.delta != c);
        if self.spilled & bit(c) == 0 {
            self.e.store(At::slot(at::SPILL + 8 * c as usize), c);
            self.spilled |= bit(c);
        }
        self.busy |= bit(c) | bit(target);
        let s = self.scratch(item, false)?;
        self.pick(s, target);
        self.e.load(c, At::row(table, s));
        // 1 if it is the target.
        self.e.lea(c, At::sum(c, target, 0));
        let exit = self.exit(Kind::Indirect, self.block.rip(item), self.flags, self.n);
        self.exits[exit].spilled = self.spilled;
        let calls = item.way == Way::CallIndirect;
        // LOOP has only an 8-bit displacement, and a branch that is not taken is best.
        let far = 9 * (self.spilled & !self.block.mode.resident()).count_ones() + if calls { 100 } else { 40 } > 120;
        let short = if far {
            self.e.bytes.extend_from_slice(&[LOOP, 2, 0xeb, 5]);
            let site = self.branch(&[0xe9]);
            self.cold.push(Cold { site, reload: 0, exit, walk: None });
            None
        } else {
            self.e.bytes.extend_from_slice(&[LOOP, 0]);
            Some(self.e.len())
        };
        self.e.load(s, At::row(table + FAST_HALF, s));
        self.e.store(At::slot(at::TARGET), s);
        self.busy &= !(bit(s) | bit(c));
        Some(Miss { short, exit })
    }

    /// `to = bits of from that choose an entry of a fast table`, by PEXT.
    fn pick(&mut self, to: Gpr, from: Gpr) {
        let (r, v) = (to as u8, from as u8);
        let prefix = [0x65, 0xc4, (r >> 3 ^ 1) << 7 | 0x62, 0x80 | (v ^ 15) << 3 | 2, 0xf5];
        self.e.bytes.extend_from_slice(&prefix);
        self.e.bytes.extend_from_slice(&[(r & 7) << 3 | 4, 0x25]);
        self.e.push_i32(gs(at::TARGET_BITS));
    }

    /// To the code that was found in a fast table.
    fn dispatch_fast(&mut self, miss: &Miss) -> Option<()> {
        self.home();
        self.e.align_patch(4);
        self.e.rm(W::D, &[0xff], 4, At::slot(at::TARGET), &[]);
        self.jump = Some(self.e.len() as u32 - 4);
        if let Some(from) = miss.short {
            self.e.bytes[from - 1] = i8::try_from(self.e.len() - from).ok()? as u8;
            self.stub(miss.exit);
        }
        Some(())
    }

    fn load_target(&mut self, item: &Item, a: &Access) -> Option<Gpr> {
        let host = self.reach(item, a)?;
        let t = self.scratch(item, false)?;
        let from = self.e.len();
        self.load_word(t, host.at());
        self.touched(item, from, host, a);
        Some(t)
    }

    /// JMP and CALL through a register or memory.
    pub(super) fn indirect(&mut self, item: &Item) -> Option<bool> {
        if self.block.mode.is_counted() || self.block.mode.is_rare() {
            return Some(self.leave_here(item, Kind::Indirect));
        }
        let target = match item.access {
            Some(a) => self.load_target(item, &a)?,
            None => Gpr::from_iced(item.iced.op0_register())?,
        };
        if let Some(table) = self.around.fast {
            let miss = self.look_up_fast(item, target, table)?;
            if item.way == Way::CallIndirect {
                self.push_return(item)?;
            }
            self.dispatch_fast(&miss)?;
            return Some(false);
        }
        self.look_up(item, target)?;
        if item.way == Way::CallIndirect {
            self.push_return(item)?;
        }
        self.dispatch();
        Some(false)
    }

    /// RET.
    pub(super) fn ret(&mut self, item: &Item, more: u16) -> Option<bool> {
        if self.block.mode.is_counted() || self.block.mode.is_rare() {
            return Some(self.leave_here(item, Kind::Indirect));
        }
        let target = self.load_target(item, &item.access?)?;
        if let Some(table) = self.around.fast {
            let miss = self.look_up_fast(item, target, table)?;
            self.move_stack(self.word_len() + i32::from(more));
            self.dispatch_fast(&miss)?;
            return Some(false);
        }
        self.look_up(item, target)?;
        self.move_stack(self.word_len() + i32::from(more));
        self.dispatch();
        Some(false)
    }
}
