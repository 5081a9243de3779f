//! MOVS, STOS and LODS upwards: one element through the TLB, or under REP all of them by the host's REP if both ranges lie in one page
//! each, bytes page by page; the interpreter does the rest.

use super::asm::{Assembler, At, W};
use super::memory::JNE;
use super::scratch::bit;
use super::{Kind, Lower, Walk};
use crate::system::block::{Access, Item, Way};
use crate::system::tlb;
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::mem::PAGE_SIZE;
use dynasmrt::DynasmApi;

const JA: [u8; 2] = [0x0f, 0x87];
const PAGE_MASK: i32 = -(PAGE_SIZE as i32);

impl Lower<'_> {
    /// An element at a register.
    fn at(&self, base: Gpr, len: u8, write: bool) -> Access {
        let narrow = self.block.mode.is_compat();
        Access { base: Some(base), narrow, len, ..Access::stack(0, write) }
    }

    fn advance(&mut self, r: Gpr, len: u8) {
        self.advance_word(r, r, i32::from(len));
    }

    /// MOV of an element between memory and RAX or another register.
    fn element(&mut self, store: bool, len: u8, r: Gpr, at: At) {
        let opcode = match (store, len) {
            (true, 1) => 0x88,
            (true, _) => 0x89,
            (false, 1) => 0x8a,
            (false, _) => 0x8b,
        };
        if len == 2 {
            self.e.push(0x66);
        }
        let w = if len == 8 { W::Q } else { W::D };
        self.e.rm(w, &[opcode], r as u8, at, &[]);
    }

    /// One element.
    pub(super) fn string(&mut self, item: &Item, way: Way) -> Option<bool> {
        match way {
            Way::Stos(len) => {
                let to = self.place(item, &self.at(Gpr::Rdi, len, true))?;
                self.element(true, len, Gpr::Rax, to.at());
                self.advance(Gpr::Rdi, len);
            }
            Way::Lods(len) => {
                let from = self.place(item, &self.at(Gpr::Rsi, len, false))?;
                self.element(false, len, Gpr::Rax, from.at());
                self.advance(Gpr::Rsi, len);
            }
            Way::Movs(len) => {
                let from = self.place(item, &self.at(Gpr::Rsi, len, false))?;
                // Its byte registers need no REX.
                let v = self.scratch(item, true)?;
                self.busy |= bit(v);
                let to = self.place(item, &self.at(Gpr::Rdi, len, true))?;
                if v as u8 >= 4 && len == 1 {
                    return None;
                }
                self.element(false, len, v, from.at());
                self.element(true, len, v, to.at());
                self.advance(Gpr::Rsi, len);
                self.advance(Gpr::Rdi, len);
            }
            _ => return None,
        }
        Some(true)
    }

    /// Looks the page of `base` up: `delta` is its entry in the TLB then. Destroys `t`.
    fn page(&mut self, item: &Item, (base, len, write): (Gpr, u8, bool), delta: Gpr, t: Gpr) {
        let retry = self.begin(item);
        self.index(delta, base, 0);
        self.e.copy(t, base);
        self.e.and(W::Q, t, PAGE_MASK);
        self.e.compare(t, At::table(self.tag(write), delta));
        self.miss(
            item,
            self.at(base, len, write),
            (0, i64::from(len), write),
            Walk { free: t, base: Some(base), disp: 0 },
            retry,
        );
    }

    /// Host minus guest address of the page of `base`, which holds RCX (at most a page of) elements from there on.
    fn whole(&mut self, item: &Item, base: Gpr, len: u8, write: bool) -> Option<Gpr> {
        let (delta, t) = (self.scratch(item, false)?, self.scratch(item, false)?);
        self.page(item, (base, len, write), delta, t);
        // The last byte is in the same page.
        self.e.lea(t, At::any(Some(base), Some((Gpr::Rcx, len)), -1, false));
        self.e.rr(W::Q, &[0x33], t as u8, base, &[]);
        self.e.rr(W::Q, &[0xf7], 0, t, &PAGE_MASK.to_le_bytes());
        self.leave_if(&JNE, item, Kind::Step, self.block.rip(item), self.n);
        self.e.load(delta, At::table(self.around.tlb + tlb::ADDEND, delta));
        self.busy &= !bit(t);
        Some(delta)
    }

    /// REP MOVS, REP STOS.
    pub(super) fn repeated(&mut self, item: &Item, way: Way) -> Option<bool> {
        let (len, moves) = match way {
            Way::RepMovs(len) => (len, true),
            Way::RepStos(len) => (len, false),
            _ => return None,
        };
        self.give_up_flags(item);
        // cmp rcx, 4096: no address wraps below that.
        self.e.rr(W::Q, &[0x81], 7, Gpr::Rcx, &(PAGE_SIZE as u32).to_le_bytes());
        self.leave_if(&JA, item, Kind::Step, self.block.rip(item), self.n);
        if len == 1 {
            return self.bytes(item, moves);
        }
        let to = self.whole(item, Gpr::Rdi, len, true)?;
        let from = if moves { Some(self.whole(item, Gpr::Rsi, len, false)?) } else { None };
        self.host(to, from, len, moves);
        Some(true)
    }

    /// The host's REP, with the distances of the host's addresses.
    fn host(&mut self, to: Gpr, from: Option<Gpr>, len: u8, moves: bool) {
        self.e.rr(W::Q, &[0x01], to as u8, Gpr::Rdi, &[]);
        if let Some(from) = from {
            self.e.rr(W::Q, &[0x01], from as u8, Gpr::Rsi, &[]);
        }
        if len == 2 {
            self.e.push(0x66);
        }
        self.e.push(0xf3);
        if len == 8 {
            self.e.push(0x48);
        }
        self.e.push(if moves { 0xa4 } else { 0xaa } | u8::from(len > 1));
        // At the end of the address space 32-bit sums wrap.
        self.e.rr(self.word(), &[0x29], to as u8, Gpr::Rdi, &[]);
        if let Some(from) = from {
            self.e.rr(self.word(), &[0x29], from as u8, Gpr::Rsi, &[]);
        }
    }

    /// REP MOVSB, REP STOSB: as many bytes as are left in both pages, until none is.
    fn bytes(&mut self, item: &Item, moves: bool) -> Option<bool> {
        let (to, t, n) = (self.scratch(item, false)?, self.scratch(item, false)?, self.scratch(item, false)?);
        let from = if moves { Some(self.scratch(item, false)?) } else { None };
        // All that is borrowed is put away before this.
        let again = self.e.len();
        self.page(item, (Gpr::Rdi, 1, true), to, t);
        self.e.load(to, At::table(self.around.tlb + tlb::ADDEND, to));
        if let Some(from) = from {
            self.page(item, (Gpr::Rsi, 1, false), from, t);
            self.e.load(from, At::table(self.around.tlb + tlb::ADDEND, from));
        }
        self.e.copy(n, Gpr::Rcx);
        for base in [Gpr::Rdi, Gpr::Rsi].into_iter().take(1 + usize::from(moves)) {
            // not t; and t, 4095; inc t; cmp n, t; cmova n, t
            self.e.copy(t, base);
            self.e.rr(W::Q, &[0xf7], 2, t, &[]);
            self.e.and(W::D, t, !PAGE_MASK);
            self.e.lea(t, At::base(t, 1));
            self.e.rr(W::Q, &[0x3b], n as u8, t, &[]);
            self.e.rr(W::Q, &[0x0f, 0x47], n as u8, t, &[]);
        }
        // What is left after these waits in `t`.
        self.e.copy(t, Gpr::Rcx);
        self.e.rr(W::Q, &[0x2b], t as u8, n, &[]);
        self.e.copy(Gpr::Rcx, n);
        self.host(to, from, 1, moves);
        self.e.copy(Gpr::Rcx, t);
        self.e.rr(W::Q, &[0x85], t as u8, t, &[]);
        let site = self.branch(&JNE);
        self.e.set_rel32(site, self.around.at + again as u64);
        Some(true)
    }
}
