//! The content of a code cache, under its lock: blocks, the links between them, the landings, what was made from which page.

use crate::astray::Budget;
use crate::block::{Constant, GuestBlock, Stretch, address, page_of};
use crate::code_buffer::CodeBuffer;
use crate::emit::{Emitter, slot};
use crate::exits::{self, Exits, MAX_EXITS, Place};
use crate::index::{Index, MOST_BLOCKS};
use crate::known::{Block, NONE, key};
use crate::lower::{
    Landing, Leave, Surroundings, Unit, emit_landing, emit_stubs, emit_trampolines, lower, nth_said, stub_at,
    stub_before, stubs_size,
};
use crate::marks::{self, Home, Mark, Packed, Registers};
use crate::persist::Archive;
use crate::persist::adopt::Pages;
use crate::persist::park::Group;
use crate::stats::CacheStats;
use crate::system::hash::Map;
use bivisor_emulator::isa::Gpr;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

/// So many jumps in code that is shared with a parent or a child stay as they are.
const MOST_REFUSED: u32 = 256;
/// More than one block can need.
pub const MAX_BLOCK: usize = 16 << 10;

/// The page of vsyscall(2) but for the bits that make it the kernel's.
const LIKE_VSYSCALL: u64 = 0x7fff_ff60_0000;

/// May a block at this address have a landing? Bit 47 is not compared there: what a call into vsyscall's page could be taken for is left
/// to the dispatcher.
fn may_land(start: u64) -> bool {
    page_of(start) != LIKE_VSYSCALL
}

/// A block that nobody else finds.
#[derive(Debug)]
pub struct Apart {
    /// Code offset of its body.
    pub body: u32,
    /// Guest instructions.
    pub insns: u16,
    first_exit: u32,
    begun: Box<[u16]>,
}

impl Apart {
    /// Instructions that have begun when this exit is taken, the one that takes it included; `None` if it is none of the block's.
    pub fn begun(&self, exit: u32) -> Option<u16> {
        self.begun.get(exit.checked_sub(self.first_exit)? as usize).copied()
    }
}

/// The content.
pub struct Store {
    pub(crate) buffer: CodeBuffer,
    /// In order of code offset; the first is the trampolines.
    pub(crate) blocks: Vec<Block>,
    /// Of each block its marks and its relocations.
    pub(crate) notes: Vec<Packed>,
    pub(crate) index: Index,
    /// The bytes of blocks that compare them, and which of them have been seen to change.
    pub(crate) compared: HashMap<u64, (Vec<u8>, Vec<bool>)>,
    /// What earlier runs have left.
    pub(crate) archive: Option<Arc<Archive>>,
    /// Its clusters that were adopted, and by how much their blocks lie further on than they did.
    pub(crate) taken: Map<u32, u64>,
    /// The number of the first block of this program; those before it are an earlier one's.
    pub(crate) began: usize,
    /// What that one has left.
    pub(crate) parked: Vec<Group>,
    /// Pages of code, if what is made from them can be kept: see [`crate::persist`].
    pub(crate) pages: Option<Pages>,
    /// The first block that begins in a page.
    pub(crate) by_page: Map<u64, u32>,
    /// Those that end in a page and begin in the one before.
    pub(crate) ending: Map<u64, Vec<u32>>,
    /// Blocks in which something of a page is a constant.
    pub(crate) constants: Map<u64, Vec<(u32, Constant)>>,
    /// Of traces, where they come from.
    traces: Map<u32, Box<[Stretch]>>,
    /// Those of earlier programs.
    pub(crate) bound: HashSet<u32>,
    /// So many jumps of shared code were not linked.
    refused: u32,
    /// For table entries the first block whose landing is tried; 0, which is the trampolines, for none.
    landings: Map<u16, u32>,
    /// Is there any landing?
    landed: bool,
    astray: Budget,
    pub(crate) exits_used: u32,
    pub(crate) miss: u32,
    keep: (usize, usize),
    /// Reused.
    pub(crate) unit: Unit,
    stubs: Vec<u8>,
    pub(crate) stats: CacheStats,
}

impl Store {
    /// With the trampolines alone.
    pub fn new(mut buffer: CodeBuffer) -> Store {
        let mut e = Emitter::new(buffer.base());
        let mut marks = Vec::new();
        let miss = emit_trampolines(&mut e, &mut marks);
        buffer.append(&e.bytes);
        buffer.fill_targets(miss);
        let keep = (buffer.used(), marks.len());
        let mut store = Store {
            buffer,
            // Memory is taken when it is used; moving it costs more.
            blocks: Vec::with_capacity(1 << 15),
            notes: Vec::with_capacity(1 << 16),
            taken: Map::default(),
            archive: None,
            began: 1,
            parked: Vec::new(),
            pages: None,
            index: Index::default(),
            compared: HashMap::new(),
            by_page: Map::default(),
            ending: Map::default(),
            constants: Map::default(),
            traces: Map::default(),
            bound: HashSet::new(),
            refused: 0,
            landings: Map::default(),
            landed: false,
            astray: Budget::new(),
            exits_used: 0,
            miss: miss as u32,
            keep,
            unit: Unit::default(),
            stubs: Vec::new(),
            stats: CacheStats::default(),
        };
        store.push((0, Home::Slot), 0, keep.0, 0, 0, (&marks, 0));
        store.blocks[0].die();
        store
    }

    /// Bytes of host memory in use for what is there, and guest bytes it was made from. Code in the middle of being thrown away counts
    /// until that has been done.
    pub fn memory(&self) -> (u64, u64) {
        fn bytes<T>(all: &[T]) -> usize {
            size_of_val(all)
        }
        fn lists<T>(all: &Map<u64, Vec<T>>) -> usize {
            all.values().map(|list| size_of::<(u64, Vec<T>)>() + size_of_val(&**list)).sum()
        }
        let maps = self.by_page.len() * size_of::<(u64, u32)>()
            + lists(&self.ending)
            + lists(&self.constants)
            + self.landings.len() * size_of::<(u16, u32)>();
        let pages = self.pages.as_ref().map_or(0, |p| p.len() * size_of::<(u64, crate::persist::adopt::Page)>());
        let compared: usize = self.compared.values().map(|(then, changed)| then.len() + changed.len()).sum();
        let metadata = bytes(&self.blocks) + bytes(&self.notes) + self.index.memory();
        let exits = self.exits_used as usize * Exits::EACH;
        let total = self.buffer.memory() + metadata + exits + maps + pages + compared;
        (total as u64, self.blocks.iter().map(|b| u64::from(b.len())).sum())
    }

    fn push(
        &mut self,
        start: (u64, Home),
        at: usize,
        size: usize,
        body: u32,
        len: u16,
        (marks, first_exit): (&[Mark], u32),
    ) -> u32 {
        let block = Block::new(start, (at, size, body), marks.len(), len);
        self.blocks.push(block.knowing(self.notes.len(), first_exit));
        self.notes.extend(marks.iter().map(|m| m.pack(first_exit)));
        self.blocks.len() as u32 - 1
    }

    /// The block at `rip` and the code offset of its body.
    pub fn get(&self, rip: u64, home: Home) -> Option<(u32, u32)> {
        let b = self.index.get(key(rip, home), |b| self.blocks[b as usize].key())?;
        Some((b, self.blocks[b as usize].body()))
    }

    /// Makes a block be found by its address.
    pub(crate) fn enter_index(&mut self, b: u32) {
        let key_of = |b: u32| self.blocks[b as usize].key();
        self.index.insert(key_of(b), b, key_of);
    }

    /// Might the next block not fit?
    pub fn is_full(&self) -> bool {
        !self.buffer.fits(MAX_BLOCK)
            || self.exits_used + 256 > MAX_EXITS
            || self.blocks.len() as u32 + 256 > MOST_BLOCKS
    }

    /// Lowers a block and adds it; gives its number and the code offset of its body.
    pub fn insert(&mut self, exits: &Exits, block: &GuestBlock, home: Home, landing: bool) -> (u32, u32) {
        self.lower(block, home, landing && may_land(block.start), true);
        let unit = std::mem::take(&mut self.unit);
        let found = self.enter(exits, (block.start, home), &unit);
        self.unit = unit;
        if let Some(c) = block.constant {
            self.note_constant(found.0, c);
        }
        found
    }

    /// Is what is at this address a trace, if anything?
    pub fn is_trace(&self, rip: u64) -> bool {
        let is = |home| self.get(rip, home).is_some_and(|(b, _)| self.traces.contains_key(&b));
        is(Home::Slot) || is(Home::Register)
    }

    /// Lowers a trace, which takes the place of the blocks that are there. False if it is too large, or there is no room.
    pub fn insert_trace(&mut self, exits: &Exits, block: &GuestBlock) -> bool {
        let mut pages: Vec<u64> =
            block.items.iter().flat_map(|i| [block.rip(i), block.next_rip(i) - 1]).map(page_of).collect();
        pages.sort_unstable();
        pages.dedup();
        // The second may end where the first begins.
        for home in [Home::Slot, Home::Register] {
            let old = self.get(block.start, home).map(|(b, _)| b);
            if home == Home::Register && old.is_none() {
                continue;
            }
            if self.is_full() {
                return false;
            }
            // Only where it may land, the old one does.
            let landed = old.is_some_and(|b| self.blocks[b as usize].landing.is_some());
            self.lower(block, home, landed, true);
            if !Block::can_be(self.unit.code.len(), self.unit.body as usize, self.unit.marks.len(), 0) {
                return false;
            }
            if let Some(old) = old {
                self.kill(exits, old);
            }
            let unit = std::mem::take(&mut self.unit);
            let (b, _) = self.enter(exits, (block.start, home), &unit);
            self.unit = unit;
            self.traces.insert(b, block.stretches.clone().into());
            pages.iter().for_each(|&at| self.note_constant(b, Constant { at, target: 0 }));
            self.stats.traces += 1;
        }
        true
    }

    /// Notes that a block knows something of a page other than its own.
    pub(crate) fn note_constant(&mut self, b: u32, c: Constant) {
        self.constants.entry(page_of(c.at)).or_default().push((b, c));
    }

    /// Adds a lowered block; gives its number and the code offset of its body.
    pub(crate) fn enter(&mut self, exits: &Exits, (start, home): (u64, Home), unit: &Unit) -> (u32, u32) {
        let first_exit = self.exits_used;
        let b = self.append(exits, (start, home), unit);
        let body = self.blocks[b as usize].body();
        self.enter_index(b);
        self.enter_pages(b);
        for (id, exit) in (first_exit..).zip(&unit.exits) {
            if let (Leave::To(target), Some(_)) = (exit.leave, exit.linked)
                && let Some((to, _)) = self.get(target, exit.home)
            {
                self.note_link(exits, id, to);
            }
        }
        if let Some(l) = unit.landing {
            let at = self.blocks[b as usize].at;
            self.register(b, l.moved(at));
        }
        (b, body)
    }

    /// Enters a block among those of its pages.
    pub(crate) fn enter_pages(&mut self, b: u32) {
        let [first, last] = self.blocks[b as usize].pages();
        let head = self.by_page.entry(first).or_insert(NONE);
        self.blocks[b as usize].next_in_page = std::mem::replace(head, b);
        if last != first {
            self.ending.entry(last).or_default().push(b);
        }
    }

    /// Notes the bytes of a block that compares them, and tells it which have changed since it was noted last.
    pub fn note_compared(&mut self, block: &mut GuestBlock) {
        let (then, changed) = self.compared.entry(block.start).or_default();
        if then.len() == block.bytes.len() {
            for ((changed, then), now) in changed.iter_mut().zip(&*then).zip(&block.bytes) {
                *changed |= then != now;
            }
        } else {
            *changed = vec![false; block.bytes.len()];
        }
        then.clone_from(&block.bytes);
        block.changed.clone_from(changed);
    }

    /// The block at `rip` was found to be made from other bytes than are there now. Who is still in it, or knows of it, finds out the
    /// same way.
    pub fn changed(&mut self, exits: &Exits, rip: u64) {
        for home in [Home::Slot, Home::Register] {
            if let Some((b, _)) = self.get(rip, home) {
                self.kill(exits, b);
            }
        }
    }

    /// Lowers a block that is linked to nothing and found by nobody; gives the code offset of its body.
    pub fn insert_apart(&mut self, exits: &Exits, block: &GuestBlock) -> Apart {
        self.lower(block, Home::Slot, false, false);
        let unit = std::mem::take(&mut self.unit);
        let first_exit = self.exits_used;
        let b = self.append(exits, (block.start, Home::Slot), &unit) as usize;
        self.blocks[b].die();
        let begun = unit.exits.iter().map(|e| e.begun).collect();
        let insns = unit.insns;
        self.unit = unit;
        Apart { body: self.blocks[b].body(), insns, first_exit, begun }
    }

    fn lower(&mut self, block: &GuestBlock, home: Home, landing: bool, linked: bool) {
        let base = self.buffer.base();
        let unit = std::mem::take(&mut self.unit);
        let known = |g, home| self.get(g, home).map(|(_, body)| base + u64::from(body));
        let around = Surroundings {
            at: base + self.buffer.next() as u64,
            first_exit: self.exits_used,
            stubs: base + self.buffer.cold_end() as u64,
            miss: base + u64::from(self.miss),
            home,
            known: &known,
            linked,
        };
        self.unit = lower(block, &around, landing, unit);
    }

    fn append(&mut self, exits: &Exits, start: (u64, Home), unit: &Unit) -> u32 {
        let at = self.buffer.append(&unit.code);
        let first_exit = self.exits_used;
        self.exits_used += unit.exits.len() as u32;
        for (id, exit) in (first_exit..).zip(&unit.exits) {
            let site = if exit.site == u32::MAX { 0 } else { exit.site as usize };
            exits.set(id, exit.leave, exit.home, Place { site, short: exit.short, stub: exit.step as usize });
        }
        let stubs = self.append_stubs(first_exit);
        self.stats.blocks += 1;
        self.stats.insns += u64::from(unit.insns);
        self.stats.guest_bytes += u64::from(unit.guest_len);
        self.stats.host_bytes += (unit.code.len() + stubs) as u64;
        let b = self.push(start, at, unit.code.len(), unit.body, unit.guest_len, (&unit.marks, first_exit));
        if self.pages.is_some() {
            self.notes.extend(unit.relocations.iter().map(|r| Packed::relocation(*r)));
        }
        b
    }

    /// Makes the stubs of all exits from this one on; gives how many bytes they are.
    pub(crate) fn append_stubs(&mut self, first: u32) -> usize {
        let base = self.buffer.base();
        let end = base + self.buffer.cold_end() as u64;
        self.stubs.clear();
        emit_stubs(&mut self.stubs, end, first..self.exits_used, base);
        self.buffer.append_cold(&self.stubs);
        self.stubs.len()
    }

    /// The exits of a block.
    pub(crate) fn exits_of(&self, b: u32) -> Range<u32> {
        let end = self.blocks.get(b as usize + 1).map_or(self.exits_used, |next| next.first_exit);
        self.blocks[b as usize].first_exit..end
    }

    /// The marks and the relocations of a block.
    pub(crate) fn notes_of(&self, b: u32) -> (&[Packed], &[Packed]) {
        let block = &self.blocks[b as usize];
        let end = self.blocks.get(b as usize + 1).map_or(self.notes.len(), |next| next.notes as usize);
        self.notes[block.notes as usize..end].split_at(block.marks() as usize)
    }

    pub(crate) fn note_link(&mut self, exits: &Exits, exit: u32, to: u32) {
        let block = &mut self.blocks[to as usize];
        exits.set_linked(exit, Some(to), std::mem::replace(&mut block.incoming, exit));
    }

    /// Where the jump of an exit is patched.
    pub(crate) fn place(&self, exits: &Exits, exit: u32) -> Place {
        // Of blocks without exits and the first after them with some it is the last.
        let block = self.blocks.partition_point(|b| b.first_exit <= exit) - 1;
        self.place_in(exits, block as u32, exit)
    }

    /// The same for an exit of this block.
    fn place_in(&self, exits: &Exits, block: u32, exit: u32) -> Place {
        let stub = stub_before(self.buffer.cold_end() as u64, exit) as usize;
        exits.place(exit, self.blocks[block as usize].at as usize, stub)
    }

    /// Patches a jump: to a block or to its stub.
    fn lead(&self, place: Place, to: Option<u32>) {
        let to = to.map_or(place.stub, |b| self.blocks[b as usize].body() as usize);
        if place.short { self.buffer.patch_short(place.site, to) } else { self.buffer.patch(place.site, to) }
    }

    /// Makes the jump of an exit lead to a block.
    pub fn link(&mut self, exits: &Exits, exit: u32, to: u32) {
        // A short jump is one of a block that is gone.
        let place = self.place(exits, exit);
        if exits.linked(exit).is_none() && !place.short {
            // For what is soon over it is cheaper to come here again than to copy what a parent has.
            if self.buffer.is_shared(place.site) && self.refused < MOST_REFUSED {
                self.refused += 1;
                return;
            }
            self.lead(place, Some(to));
            self.note_link(exits, exit, to);
            self.stats.links += 1;
        }
    }

    /// Makes a landing for a block that has none, apart from its body.
    pub fn add_landing(&mut self, b: u32) {
        let block = &self.blocks[b as usize];
        if block.landing.is_some() || !may_land(block.start()) || !self.buffer.fits(MAX_BLOCK) {
            return;
        }
        let at = self.buffer.next();
        let base = self.buffer.base();
        let (start, body) = (block.start(), base + u64::from(block.body()));
        let mut e = Emitter::new(base + at as u64);
        let mut marks = Vec::new();
        let l = emit_landing(&mut e, &mut marks, start, base + u64::from(self.miss));
        e.bytes.extend_from_slice(&[0xe9, 0, 0, 0, 0]);
        let site = e.len() - 4;
        e.set_rel32(site, body);
        self.buffer.append(&e.bytes);
        self.stats.host_bytes += e.len() as u64;
        // It has marks of its own, and is found by host address only.
        let thunk = self.push((start, Home::Slot), at, e.len(), 0, 0, (&marks, self.exits_used));
        self.blocks[thunk as usize].die();
        self.register(b, l.moved(at as u32));
    }

    /// Enters the landing of a block in the table, before the others of the same entry.
    pub(crate) fn register(&mut self, b: u32, l: Landing) {
        let entry = self.buffer.index(self.blocks[b as usize].start());
        let after = self.landings.get(&entry).copied().unwrap_or(0);
        let next = self.landing_at(after);
        let leads = self.buffer.leads(l.next(), next);
        let block = &mut self.blocks[b as usize];
        if !leads && self.buffer.is_shared(l.next()) {
            // Another one is made when it is wanted.
            block.landing = None;
            return;
        }
        // What is shared with a parent is not written if it is right.
        if block.landing != Some(l) || block.next_landing != after {
            (block.landing, block.next_landing) = (Some(l), after);
        }
        self.landings.insert(entry, b);
        self.stats.landings += 1;
        self.landed = true;
        if !leads {
            self.buffer.patch(l.next(), next);
        }
        self.aim(entry, b);
        self.aim_waiting();
    }

    /// Makes a table entry lead to a block's landing, or past it if it is the only one.
    fn aim(&mut self, entry: u16, b: u32) {
        match self.only(b) {
            Some((to, start)) if self.astray.may_be_more() => self.buffer.set_only_target(entry, to, start),
            only => {
                self.buffer.set_target(entry, self.landing_at(b));
                self.astray.waiting.extend(only.map(|_| entry));
            }
        }
    }

    /// Of a block whose landing is the only one of its entry: what comes behind the comparison, and the guest's address.
    fn only(&self, b: u32) -> Option<(usize, u64)> {
        let block = self.blocks.get(b as usize).filter(|_| self.buffer.is_alone())?;
        let l = block.landing.filter(|_| self.landing_at(block.next_landing) == self.miss as usize)?;
        Some((l.meant(), block.start()))
    }

    /// Entries that were to wait, if they need not any more.
    fn aim_waiting(&mut self) {
        while self.astray.may_be_more()
            && let Some(entry) = self.astray.waiting.pop()
        {
            let b = self.landings.get(&entry).copied().unwrap_or(0);
            if let Some((to, start)) = self.only(b) {
                self.buffer.set_only_target(entry, to, start);
            }
        }
    }

    /// Takes all landings out of the table. Nobody is in the code, and no block is found before its landing is entered again.
    pub(crate) fn clear_landings(&mut self) {
        for entry in std::mem::take(&mut self.landings).into_keys() {
            self.buffer.set_target(entry, self.miss as usize);
        }
    }

    /// Keeps a landing that is not in the table as one that is first in its entry.
    pub(crate) fn set_aside(&mut self, b: u32, l: Landing) {
        let block = &mut self.blocks[b as usize];
        (block.landing, block.next_landing) = (Some(l), 0);
        self.buffer.patch(l.next(), self.miss as usize);
    }

    /// Makes the table larger if there are many landings in a small one. Was it?
    pub fn widen(&mut self) -> bool {
        if !self.buffer.is_narrow(self.landings.len()) {
            return false;
        }
        let mut all = Vec::new();
        for mut b in std::mem::take(&mut self.landings).into_values() {
            while let Some(Block { landing: Some(l), next_landing, .. }) = self.blocks.get(b as usize) {
                all.push((b, *l));
                b = *next_landing;
            }
        }
        self.buffer.widen(self.miss as usize);
        self.stats.landings -= all.len() as u64;
        // Who is on the way from landing to landing comes to its end: each leads to one entered before, or to where it led.
        all.into_iter().for_each(|(b, l)| self.register(b, l));
        true
    }

    fn landing_at(&self, b: u32) -> usize {
        self.blocks.get(b as usize).and_then(|b| b.landing).map_or(self.miss as usize, Landing::at)
    }

    pub(crate) fn unregister(&mut self, b: u32) {
        let entry = self.buffer.index(self.blocks[b as usize].start());
        let next = self.blocks[b as usize].next_landing;
        let head = self.landings.get(&entry).copied().unwrap_or(0);
        if head == b {
            self.landings.insert(entry, next);
            self.aim(entry, next);
        } else {
            let mut before = head;
            while before != 0 && self.blocks[before as usize].next_landing != b {
                before = self.blocks[before as usize].next_landing;
            }
            if let Some(Block { landing: Some(l), next_landing, .. }) = self.blocks.get_mut(before as usize) {
                *next_landing = next;
                let site = l.next();
                self.buffer.patch(site, self.landing_at(next));
                if before == head {
                    self.aim(entry, head);
                }
            }
        }
        self.blocks[b as usize].landing = None;
    }

    /// A page was written, unmapped or changed its rights: what was made from it is no more. False if nothing was.
    pub fn stale(&mut self, exits: &Exits, page: u64) -> bool {
        if let Some(pages) = &mut self.pages {
            pages.remove(&page);
        }
        let constants = self.constants.remove(&page);
        for &(b, _) in constants.iter().flatten() {
            self.kill(exits, b);
        }
        let ending = self.ending.remove(&page);
        for &b in ending.iter().flatten() {
            self.kill(exits, b);
        }
        let first = self.by_page.remove(&page);
        let mut b = first.unwrap_or(NONE);
        while b != NONE {
            self.kill(exits, b);
            b = self.blocks[b as usize].next_in_page;
        }
        constants.is_some() || ending.is_some() || first.is_some()
    }

    pub(crate) fn kill(&mut self, exits: &Exits, b: u32) {
        let block = &mut self.blocks[b as usize];
        if !block.die() {
            return;
        }
        let key = block.key();
        let mut exit = std::mem::replace(&mut block.incoming, exits::NONE);
        self.stats.stale += 1;
        self.index.remove(key, b);
        while exit != exits::NONE {
            self.lead(self.place(exits, exit), None);
            let next = exits.next_linked(exit);
            exits.set_linked(exit, None, exits::NONE);
            exit = next;
        }
        if self.blocks[b as usize].landing.is_some() {
            self.unregister(b);
        }
    }

    /// Empties it. No thread is in the code.
    pub fn forget(&mut self) {
        self.buffer.reset(self.keep.0);
        // A guest that changes its page tables has this done often.
        if std::mem::take(&mut self.landed) {
            self.buffer.fill_targets(self.miss as usize);
            self.landings.clear();
            self.astray.waiting.clear();
        }
        self.blocks.truncate(1);
        self.notes.truncate(self.keep.1);
        self.index.clear();
        self.by_page.clear();
        self.ending.clear();
        self.constants.clear();
        self.traces.clear();
        self.bound.clear();
        self.pages.iter_mut().for_each(Pages::clear);
        self.taken.clear();
        self.compared.clear();
        self.parked.clear();
        self.began = 1;
        self.exits_used = 0;
    }

    /// Before a fork, see [`CodeBuffer::freeze`].
    pub fn freeze(&mut self) {
        self.buffer.freeze();
        self.refused = 0;
    }

    /// In a forked child: memory of its own, see [`CodeBuffer::after_fork`].
    ///
    /// # Errors
    /// The host's.
    pub fn after_fork(&mut self) -> std::io::Result<()> {
        self.buffer.after_fork(self.miss as usize)
    }

    /// Sets all jumps, and the table, of which all is the way out, as this store knows them, in memory that somebody else may have
    /// changed.
    pub fn restore(&mut self, exits: &Exits) {
        // Of what is shared, nobody has changed anything.
        let ours = |b: &u32| {
            let block = &self.blocks[*b as usize];
            !self.buffer.is_shared(block.at as usize) || !self.buffer.is_shared(block.end() as usize)
        };
        for b in (0..self.blocks.len() as u32).filter(ours) {
            for id in self.exits_of(b).filter(|&id| matches!(exits.leave(id), Leave::To(_))) {
                let place = self.place_in(exits, b, id);
                if !self.buffer.is_shared(place.site) {
                    self.lead(place, exits.linked(id));
                }
            }
        }
        let entries: Vec<(u16, u32)> = self.landings.iter().map(|(&entry, &first)| (entry, first)).collect();
        for (entry, first) in entries {
            let mut b = first;
            if b != 0 {
                self.aim(entry, b);
            }
            while let Some(Block { landing: Some(l), next_landing, .. }) = self.blocks.get(b as usize) {
                if !self.buffer.is_shared(l.next()) {
                    self.buffer.patch(l.next(), self.landing_at(*next_landing));
                }
                b = *next_landing;
            }
        }
    }

    /// The block whose code is at an offset, its number and its marks.
    fn at(&self, offset: u32) -> Option<(u32, &Block, &[Packed])> {
        let i = self.blocks.partition_point(|b| b.at <= offset).checked_sub(1)?;
        Some((i as u32, &self.blocks[i], self.notes_of(i as u32).0))
    }

    /// The exit whose stub is at a code offset.
    fn stub(&self, offset: u32, regs: &dyn Registers) -> Option<u32> {
        let before = (self.buffer.cold_end() as u64).checked_sub(u64::from(offset))?;
        let inside = (1..=stubs_size(self.exits_used) as u64).contains(&before);
        let (first, shared) = inside.then(|| stub_at(before))?;
        let nth = if shared { nth_said(regs.slot(slot::PENDING)) } else { 0 };
        Some(first + nth).filter(|&id| id < self.exits_used)
    }

    /// See [`marks::probes`].
    pub fn probes(&self, offset: u32) -> bool {
        self.at(offset).is_some_and(|(_, block, marks)| marks::probes(marks, (offset - block.at) as usize))
    }

    /// Mends the registers of a thread stopped at a code offset; gives RIP.
    pub fn recover(&self, offset: u32, regs: &mut dyn Registers, exits: &Exits) -> u64 {
        if let Some(id) = self.stub(offset, regs) {
            if exits.home(id) == Home::Slot {
                marks::fetch_homed(regs);
            }
            return exits.rip(id);
        }
        let Some((b, block, marks)) = self.at(offset) else { return 0 };
        let stretches = self.traces.get(&b).map_or(&[][..], |all| all);
        let guest = |at| address(block.start(), stretches, at);
        marks::recover(marks, (&guest, block.first_exit), (offset - block.at) as usize, regs, &|id| {
            (exits.rip(id), exits.home(id))
        })
    }

    /// The guest instruction at a code offset.
    pub fn guest_address(&self, offset: u32, exits: &Exits) -> Option<u64> {
        let (_, block, _) = self.at(offset)?;
        (offset < block.end()).then(|| self.recover(offset, &mut NoRegisters, exits))
    }

    /// See [`crate::Cache::map`].
    pub fn map(&self, base: u64) -> String {
        let line = |b: &Block| format!("{:x} {:x} guest:{:x}\n", base + u64::from(b.at), b.end() - b.at, b.start());
        self.blocks.iter().skip(1).map(line).collect()
    }

    /// See [`crate::jitdump`]: host address, guest address and code of each block.
    pub fn all_code(&self, base: u64) -> impl Iterator<Item = (u64, u64, Vec<u8>)> {
        let blocks = self.blocks.iter().skip(1);
        blocks.map(move |b| (base + u64::from(b.at), b.start(), self.buffer.code(b.at as usize..b.end() as usize)))
    }

    /// The code of the block at a guest address, with its code offset.
    pub fn code(&self, rip: u64) -> Option<(u32, Vec<u8>)> {
        let b = &self.blocks[self.get(rip, Home::Slot)?.0 as usize];
        Some((b.at, self.buffer.code(b.at as usize..b.end() as usize)))
    }
}

/// For places where no register is in a slot.
struct NoRegisters;

impl Registers for NoRegisters {
    fn gpr(&self, _r: Gpr) -> u64 {
        0
    }
    fn set_gpr(&mut self, _r: Gpr, _v: u64) {}
    fn slot(&self, _i: usize) -> u64 {
        0
    }
}
