//! The code cache of one virtual CPU: blocks by address and mode, the links between them, what stores make stale.

mod fast;
mod hints;

use crate::code_buffer::CodeBuffer;
use crate::emit::{Emitter, slot};
use crate::route::{Policy, Routes};
use crate::system::Mode;
use crate::system::area::{self, Area, at};
use crate::system::block::{GuestBlock, MAX_INSNS, MAX_MIRRORED, Source, decode};
use crate::system::hash::Map;
use crate::system::lower::asm::{Assembler, At};
use crate::system::lower::{Around, Entries, Exit, Flags, Guess, Kind, Point, Replay, Told, Unit, lower};
use crate::system::{enter, tlb, walk, xsave};
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::isa::{Gpr, MAX_INSN_LEN};
use bivisor_emulator::mem::{PAGE_SIZE, Ram};
use dynasmrt::{DynasmApi, dynasm};
use hints::Hints;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

/// Bytes of code.
const SIZE: usize = 64 << 20;
/// More than one block can need.
const MAX_BLOCK: usize = 128 << 10;
/// Exits there can be between two flushes.
const MAX_EXITS: usize = 4 << 20;
/// Bytes of a jump.
const JUMP: u32 = 5;
/// How often a jump to another page is made anew because the mapping changed.
const MOST_LINKS: u8 = 8;

/// What a block is known by: linear address, guest-physical address, mode.
pub type Key = (u64, u64, Mode);

/// A translated block.
#[derive(Debug)]
pub struct Block {
    /// Linear address.
    pub rip: u64,
    /// Guest-physical address.
    pub gpa: u64,
    /// Mode.
    pub mode: Mode,
    /// Guest-physical pages its bytes are in.
    pub pages: [u64; 2],
    /// Bytes.
    len: u16,
    /// Code offsets.
    at: u32,
    end: u32,
    /// The ways in, as code offsets.
    pub entries: Entries,
    /// No status flag is read or shown before it is overwritten.
    pub flags_dead: bool,
    /// Guest instructions.
    pub insns: u16,
    /// Which of the map of code pages is its page's, and the number there.
    pub cell: u16,
    /// See [`Block::cell`].
    pub number: u32,
    /// The same of the page its last instruction reaches into.
    pub second: Option<(u16, u32)>,
    /// Its exits.
    first_exit: u32,
    exits: u32,
    points: Box<[Point]>,
    /// Jumps to it: place of the displacement, and where it leads when the block is no more.
    incoming: Vec<(u32, u32)>,
    /// Way in for indirect branches.
    landing: Option<u32>,
    /// The same for those that ask a fast table.
    fast_landing: Option<u32>,
    /// Place of the displacement of its indirect branch through [`at::TARGET`], if that asked a fast table.
    jump: Option<u32>,
    live: bool,
}

/// What is known of a jump to another page.
#[derive(Clone, Copy, Debug, Default)]
struct Link {
    /// How often it was made.
    made: u8,
    /// Block and way in that it was made for last.
    target: u32,
    at: u32,
}

/// Code between blocks that asks the map of code pages and then jumps to a block.
#[derive(Debug)]
struct WayIn {
    at: u32,
    end: u32,
    /// Place of the displacement of the jump, where it leads, and where if it must not.
    jump: u32,
    to: u32,
    stub: u32,
    target: u32,
}

/// A page with code.
#[derive(Debug, Default)]
struct Page {
    blocks: Vec<u32>,
    generation: u64,
    /// Stores that hit no block.
    harmless: u32,
}

/// Numbers of what the cache did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Blocks translated.
    pub blocks: u64,
    /// Guest instructions translated.
    pub insns: u64,
    /// Blocks made stale.
    pub stale: u64,
    /// Times everything was thrown away.
    pub flushes: u64,
    /// Jumps patched.
    pub links: u64,
}

/// The cache.
pub struct Cache {
    buffer: CodeBuffer,
    /// In order of code offset.
    blocks: Vec<Block>,
    by_key: Map<Key, u32>,
    pages: Map<u64, Page>,
    exits: Vec<Exit>,
    recipes: Vec<Replay>,
    /// By exit: how it was linked, for jumps to other pages; and which exit this one stands for.
    links: Map<u32, Link>,
    origins: Map<u32, u32>,
    hints: Map<Key, Hints>,
    /// Slots of the mirror in which instructions of a block found what they access.
    learned: Map<Key, Vec<(u16, Option<u8>)>>,
    /// The registers, the slots in use, the usual ones, and whether the lowest is at its own addresses, for the next block that is made.
    pub guess: ([u64; 16], u64, (u64, bool)),
    numbers: Map<(u64, u64, bool), u32>,
    /// By linear page, as code of CPL 3 or not: which of the map of code pages. Given out in turn, so that few pages share one.
    cells: Map<(u64, bool), u16>,
    /// In order of code offset.
    ways_in: Vec<WayIn>,
    /// One more than the number of the way in whose jump was taken away.
    poisoned: AtomicU32,
    /// One more than the place of the displacement of an indirect branch that leads elsewhere.
    poisoned_jump: AtomicU32,
    modes: Vec<Mode>,
    /// Modes with a fast table, and whether there is anything in one.
    fast_modes: Vec<Mode>,
    fast_used: bool,
    /// Jumps to other pages that hold only as long as mappings stay as they are: place of the displacement, and where it leads then.
    loose: Vec<(u32, u32)>,
    routes: Routes,
    leave: u64,
    keep: usize,
    /// Does new code count what its looks at the TLB find?
    pub counts_hits: bool,
    /// Counters.
    pub counts: Counts,
}

impl Cache {
    /// Empty, for code of `model`.
    ///
    /// # Errors
    /// The host's, if it gives no executable memory.
    pub fn new(model: Arc<CpuModel>, policy: Policy) -> std::io::Result<Cache> {
        let mut buffer = CodeBuffer::new(SIZE)?;
        let mut e = Emitter::new(buffer.base());
        for to in ways_out() {
            // jmp [rip + 0]
            e.bytes.extend_from_slice(&[0xff, 0x25, 0, 0, 0, 0]);
            e.push_u64(to);
        }
        debug_assert_eq!(e.len() as u64, KICKED_AT);
        let leave = buffer.base();
        e.store_u32(At::slot(at::EXIT), enter::KICKED);
        e.push(0xe9);
        let site = e.len();
        e.push_u32(0);
        e.set_rel32(site, leave);
        buffer.append(&e.bytes);
        Ok(Cache {
            keep: buffer.used(),
            buffer,
            blocks: Vec::new(),
            by_key: Map::default(),
            pages: Map::default(),
            exits: Vec::new(),
            recipes: Vec::new(),
            links: Map::default(),
            origins: Map::default(),
            hints: Map::default(),
            learned: Map::default(),
            guess: ([0; 16], 0, (0, false)),
            numbers: Map::default(),
            cells: Map::default(),
            ways_in: Vec::new(),
            poisoned: AtomicU32::new(0),
            poisoned_jump: AtomicU32::new(0),
            modes: Vec::new(),
            fast_modes: Vec::new(),
            fast_used: false,
            loose: Vec::new(),
            routes: Routes::new(model, policy),
            leave,
            counts_hits: false,
            counts: Counts::default(),
        })
    }

    /// Host addresses of the code.
    pub fn range(&self) -> (u64, u64) {
        (self.buffer.base(), self.buffer.base() + self.buffer.size() as u64)
    }

    /// Host address of a code offset.
    pub fn host(&self, offset: u32) -> u64 {
        self.buffer.base() + u64::from(offset)
    }

    /// A block by number.
    pub fn block(&self, b: u32) -> &Block {
        &self.blocks[b as usize]
    }

    /// An exit by number.
    pub fn exit(&self, id: u32) -> &Exit {
        &self.exits[id as usize]
    }

    /// The live block known by `key`.
    pub fn find(&self, key: Key) -> Option<u32> {
        self.by_key.get(&key).copied()
    }

    /// Is there room for one more block?
    pub fn is_full(&self) -> bool {
        !self.buffer.fits(MAX_BLOCK) || self.exits.len() + 4096 > MAX_EXITS
    }

    /// What code may take from the host. Everything must be flushed after a change.
    pub fn set_policy(&mut self, model: Arc<CpuModel>, policy: Policy) {
        self.routes = Routes::new(model, policy);
    }

    /// Is there no cache of branch targets for code of this mode?
    pub fn is_out_of_modes(&self, mode: Mode) -> bool {
        self.modes.len() == area::TABLES && !mode.is_rare() && !self.modes.contains(&mode)
    }

    /// Throws everything away. Nobody is in the code.
    pub fn flush(&mut self, area: &Area) {
        self.buffer.reset(self.keep);
        self.blocks.clear();
        self.by_key.clear();
        self.pages.clear();
        self.exits.clear();
        self.recipes.clear();
        self.links.clear();
        self.origins.clear();
        self.numbers.clear();
        self.cells.clear();
        self.ways_in.clear();
        self.poisoned = AtomicU32::new(0);
        self.poisoned_jump = AtomicU32::new(0);
        let used = self.modes.len();
        self.modes.clear();
        self.fast_modes.clear();
        self.loose.clear();
        self.fast_used = true;
        self.forget_fast(area);
        area.set(at::TARGET_BITS, area::FAST_ENTRIES as u64 - 1);
        area.set(at::LOOKED, self.leave + KICKED_AT);
        self.hints.clear();
        self.learned.clear();
        area.fill(at::TARGETS..at::TARGETS + used * area::TABLE_SIZE, 0);
        for n in 0..area::TABLES {
            // Address 0 looks nowhere else.
            area.set(at::TARGETS + n * area::TABLE_SIZE + area::target_at(0), u64::MAX);
        }
        area.fill(at::CELLS..at::CELLS + 4 * area::CELLS, 0);
        self.counts.flushes += 1;
    }

    /// Offset of the cache of branch targets of a mode; `None` if there is none left. Rare modes do not use it.
    pub fn targets(&mut self, mode: Mode) -> Option<usize> {
        if mode.is_rare() {
            return Some(at::TARGETS);
        }
        let n = match self.modes.iter().position(|m| *m == mode) {
            Some(n) => n,
            None if self.modes.len() < area::TABLES => {
                self.modes.push(mode);
                self.modes.len() - 1
            }
            None => return None,
        };
        Some(at::TARGETS + n * area::TABLE_SIZE)
    }

    /// Translates the block known by `key`; `None` if there is no code, or no room (then [`Cache::is_full`], or too many modes).
    pub fn translate(&mut self, ram: &Ram, key: Key, next: &mut dyn FnMut() -> Option<u64>) -> Option<u32> {
        let (rip, gpa, mode) = key;
        let targets = self.targets(mode)?;
        let fast = self.fast(mode);
        let most = match () {
            () if mode.is_single() => 1,
            () if mode.is_mirrored() => MAX_MIRRORED,
            () => MAX_INSNS,
        };
        let mut second = None;
        let mut next = || {
            second = next();
            second
        };
        let met = |to: u64| self.by_key.contains_key(&(to, gpa.wrapping_add(to.wrapping_sub(rip)), mode));
        let mut source = Source { ram, gpa, next: &mut next, known: &met };
        let (block, crosses) = decode(&mut source, rip, mode, &self.routes, most)?;
        let page = |a: u64| a & !(PAGE_SIZE - 1);
        let pages = [page(gpa), if crosses { page(second?) } else { page(gpa) }];
        let hints = self.hints.get(&key).copied().unwrap_or_default();
        let way_out: [u64; WAYS_OUT] = std::array::from_fn(|n| self.leave + WAY_OUT * n as u64);
        let [leave, leave_light, port, wake, save, restore, walk] = way_out;
        let around = Around {
            at: self.buffer.base() + self.buffer.next() as u64,
            first_exit: self.exits.len() as u32,
            first_recipe: self.recipes.len() as u32,
            leave,
            leave_light,
            port,
            wake,
            save,
            restore,
            walk,
            counts: self.counts_hits,
            targets,
            fast,
            tlb: at::TLB + mode.context() * tlb::TABLE,
            share: !hints.apart,
            foresee: !hints.strict,
            divides: hints.divides,
            guess: Guess {
                gpr: self.guess.0,
                used: self.guess.1,
                usual: self.guess.2.0,
                low: self.guess.2.1,
                learned: self.learned.get(&key).cloned().unwrap_or_default(),
            },
        };
        let unit = lower(&block, &around);
        Some(self.insert(&block, gpa, pages, unit, ram))
    }

    fn insert(&mut self, block: &GuestBlock, gpa: u64, pages: [u64; 2], unit: Unit, ram: &Ram) -> u32 {
        let offset = self.buffer.append(&unit.code) as u32;
        let b = self.blocks.len() as u32;
        let first_exit = self.exits.len() as u32;
        let number = self.number(block.start, gpa, block.mode.user());
        let cell = self.cell(block.start, block.mode.user());
        let second = (pages[0] != pages[1]).then(|| {
            let (next, user) = (next_page(block.start), block.mode.user());
            (self.cell(next, user), self.number(next, pages[1], user))
        });
        self.exits.extend(unit.exits.iter().map(|e| {
            let mut e = *e;
            e.stub += offset;
            e.block = b;
            e.site = e.site.map(|s| s + offset);
            e.again = e.again.map(|a| a + offset);
            if let Kind::Miss { retry: at, .. } | Kind::Port { resume: at, .. } | Kind::Invalidate { resume: at } =
                &mut e.kind
            {
                *at += offset;
            }
            e
        }));
        let points = unit.points.iter().map(|p| Point { from: p.from + offset, to: p.to + offset, ..*p }).collect();
        self.recipes.extend_from_slice(&unit.recipes);
        let e = unit.entries;
        let word = e.word.map(|(at, registers)| (at + offset, registers));
        let sure = e.sure.map(|(at, registers)| (at + offset, registers));
        self.counts.blocks += 1;
        self.counts.insns += u64::from(unit.insns);
        self.blocks.push(Block {
            rip: block.start,
            gpa,
            mode: block.mode,
            pages,
            len: block.bytes.len() as u16,
            at: offset,
            end: offset + unit.code.len() as u32,
            entries: Entries { host: e.host + offset, slot: e.slot + offset, word, sure, ..e },
            flags_dead: block.flags_dead,
            insns: unit.insns,
            cell,
            number,
            second,
            first_exit,
            exits: unit.exits.len() as u32,
            points,
            incoming: Vec::new(),
            landing: None,
            fast_landing: None,
            jump: unit.jump.map(|j| j + offset),
            live: true,
        });
        self.by_key.insert((block.start, gpa, block.mode), b);
        for (n, page) in pages.into_iter().enumerate() {
            if n == 0 || page != pages[0] {
                let p = self.pages.entry(page).or_default();
                p.generation = ram.code_generation(page);
                p.blocks.push(b);
            }
        }
        b
    }

    /// Is code of this physical page cached?
    pub fn has_page(&self, gpa: u64) -> bool {
        self.pages.contains_key(&(gpa & !(PAGE_SIZE - 1)))
    }

    /// The number that stands for code of a linear page at a physical page.
    fn number(&mut self, rip: u64, gpa: u64, user: bool) -> u32 {
        let next = self.numbers.len() as u32 + 1;
        *self.numbers.entry((rip / PAGE_SIZE, gpa / PAGE_SIZE, user)).or_insert(next)
    }

    fn cell(&mut self, rip: u64, user: bool) -> u16 {
        let next = (self.cells.len() % area::CELLS) as u16;
        *self.cells.entry((rip / PAGE_SIZE, user)).or_insert(next)
    }

    /// Which of the map of code pages is a linear page's, as code of CPL 0 and of CPL 3, if there is some.
    pub fn cells(&self, laddr: u64) -> [Option<u16>; 2] {
        [false, true].map(|user| self.cells.get(&(laddr / PAGE_SIZE, user)).copied())
    }

    /// The block and the point of a host address at which the host faulted.
    pub fn point(&self, pc: u64) -> Option<(&Block, &Point)> {
        let at = u32::try_from(pc.checked_sub(self.buffer.base())?).ok()?;
        let block = &self.blocks[self.blocks.partition_point(|b| b.at <= at).checked_sub(1)?];
        let inside = |p: &&Point| (p.from..p.to).contains(&at);
        block.points.iter().find(inside).map(|p| (block, p))
    }

    /// Makes an exit lead to block `b` from now on, if that is possible.
    pub fn link(&mut self, id: u32, b: u32) {
        let id = self.origins.get(&id).copied().unwrap_or(id);
        let exit = self.exits[id as usize];
        let Some(site) = exit.site else { return };
        if let Some(again) = exit.again {
            self.buffer.patch(site as usize, again as usize);
            return;
        }
        let (source, target) = (&self.blocks[exit.block as usize], &self.blocks[b as usize]);
        let mode = if exit.toggles { source.mode.other_alignment() } else { source.mode };
        if mode != target.mode || source.mode.is_counted() || !source.live || !self.buffer.fits(MAX_BLOCK) {
            return;
        }
        let one_page = source.pages[0] == target.pages[0]
            && source.rip / PAGE_SIZE == target.rip / PAGE_SIZE
            && target.pages[0] == target.pages[1];
        // In the mirror nothing is asked: when a mapping changes the jump is taken back.
        let loose = !one_page && source.mode.is_mirrored();
        if one_page || loose {
            let e = target.entries;
            let sure = e.for_sure(exit.flags, target.flags_dead, exit.sure);
            let to = match (exit.flags, self.with_word(&exit, target)) {
                _ if sure.is_some() => sure.unwrap_or(e.host),
                (_, Some((to, _))) => to,
                (Flags::Slot, _) => e.slot,
                (Flags::Host, _) => e.host,
                (Flags::Both, _) => e.both(),
            };
            self.buffer.patch(site as usize, to as usize);
            let incoming = &mut self.blocks[b as usize].incoming;
            if !incoming.contains(&(site, exit.stub)) {
                incoming.push((site, exit.stub));
            }
            if loose {
                self.loose.push((site, exit.stub));
                self.fast_used = true;
            }
            self.counts.links += 1;
            return;
        }
        let last = self.links.entry(id).or_default();
        if last.made > 0 && last.target == b {
            // Only the map of code pages did not know the page.
            self.buffer.patch(site as usize, last.at as usize);
            return;
        }
        if last.made >= MOST_LINKS {
            return;
        }
        last.made += 1;
        last.target = b;
        let word = self.with_word(&exit, target);
        let save = exit.flags == Flags::Host && !target.flags_dead && word.is_none();
        let at = self.way_in(b, save, Some(id), word);
        if let Some(l) = self.links.get_mut(&id) {
            l.at = at;
        }
        self.buffer.patch(site as usize, at as usize);
        self.counts.links += 1;
    }

    /// The way into a block that is told how the flags are made, instead of the flags themselves, if the exit can tell.
    fn with_word(&self, exit: &Exit, target: &Block) -> Option<(u32, Replay)> {
        let replay = *self.recipes.get(exit.recipe?.checked_sub(1)? as usize)?;
        let (at, registers) = target.entries.word?;
        (exit.flags == Flags::Host && registers & replay.needs() == 0).then_some((at, replay))
    }

    /// The recipe of a number.
    pub fn recipe(&self, number: u64) -> Option<Replay> {
        self.recipes.get((number as usize).checked_sub(1)?).copied()
    }

    /// Code that asks the map of code pages and goes to block `b`; gives its offset. Without an origin it is for indirect branches, and
    /// looks whether somebody wants the code to be left.
    fn way_in(&mut self, b: u32, save: bool, origin: Option<u32>, word: Option<(u32, Replay)>) -> u32 {
        let (cell, number, second, to) = {
            let t = &self.blocks[b as usize];
            (t.cell, t.number, t.second, word.map_or(t.entries.slot, |(at, _)| at))
        };
        let told = word.map(|(_, replay)| Told::Here(replay));
        let offset = self.buffer.next() as u32;
        let mut e = Emitter::new(self.host(offset));
        if save {
            e.store(At::slot(at::TEMP), Gpr::Rax);
            dynasm!(e; .arch x64; lahf; seto al);
            e.push(0x66);
            e.rm(super::lower::asm::W::D, &[0x89], 0, At::slot(at::STATUS), &[]);
            e.load(Gpr::Rax, At::slot(at::TEMP));
        }
        e.compare_u32(At::slot(cell_at(cell.into())), number);
        e.bytes.extend_from_slice(&[0x0f, 0x85, 0, 0, 0, 0]);
        let miss = e.len() - 4;
        let second = second.map(|(cell, number)| {
            e.compare_u32(At::slot(cell_at(cell.into())), number);
            e.bytes.extend_from_slice(&[0x0f, 0x85, 0, 0, 0, 0]);
            e.len() - 4
        });
        let mut leave = None;
        if origin.is_none() {
            e.is_zero(At::thread(slot::LOOK));
            e.bytes.extend_from_slice(&[0x0f, 0x85, 0, 0, 0, 0]);
            leave = Some(e.len() - 4);
        }
        let sites = [Some(miss), second, leave];
        let id =
            self.end_way_in(e, offset, b, to, &sites.into_iter().flatten().collect::<Vec<_>>(), (Flags::Slot, told));
        if let Some(origin) = origin {
            self.origins.insert(id, origin);
        }
        offset
    }

    /// Ends a way into block `b` that begins at `offset`, with the jump to `to` and what leaves for the block instead, which the jumps at
    /// `sites` lead to; gives the number of that exit.
    fn end_way_in(
        &mut self,
        mut e: Emitter,
        offset: u32,
        b: u32,
        to: u32,
        sites: &[usize],
        (flags, told): (Flags, Option<Told>),
    ) -> u32 {
        let (rip, resident) = (self.blocks[b as usize].rip, self.blocks[b as usize].mode.resident());
        e.align_patch(1);
        e.push(0xe9);
        let jump = e.len();
        e.push_u32(0);
        e.set_rel32(jump, self.host(to));
        let stub = e.len();
        let here = e.here();
        for site in sites {
            e.set_rel32(*site, here);
        }
        let id = self.exits.len() as u32;
        e.store_u32(At::slot(at::EXIT), id);
        e.push(0xe9);
        let site = e.len();
        e.push_u32(0);
        // Nobody looks at vector registers to find out whether the page is still the same.
        e.set_rel32(site, self.leave + 14);
        self.buffer.append(&e.bytes);
        let (stub, jump) = (offset + stub as u32, offset + jump as u32);
        self.exits.push(Exit { told, stub, block: b, ..Exit::new(Kind::To, rip, resident, flags) });
        self.blocks[b as usize].incoming.push((jump, stub));
        self.ways_in.push(WayIn { at: offset, end: offset + e.len() as u32, jump, to, stub, target: b });
        id
    }

    /// Enters block `b` in the cache of branch targets; gives the host address of its way in, if it can have one.
    pub fn enter_target(&mut self, area: &Area, b: u32) -> Option<u64> {
        let target = &self.blocks[b as usize];
        if target.mode.is_counted() || target.mode.is_rare() || !self.buffer.fits(MAX_BLOCK) {
            return None;
        }
        let (rip, mode) = (target.rip, target.mode);
        let landing = match target.landing {
            Some(l) => l,
            None => self.way_in(b, false, None, None),
        };
        self.blocks[b as usize].landing = Some(landing);
        let entry = self.targets(mode)? + area::target_at(rip);
        area.set(entry, rip);
        area.set(entry + 8, self.host(landing));
        self.enter_fast(area, b);
        Some(self.host(landing))
    }

    /// Does the cache of branch targets lead to this exit? Then what it has there is to be replaced.
    pub fn is_landing(&self, id: u32) -> bool {
        self.exits[id as usize].site.is_none() && !self.origins.contains_key(&id)
    }

    /// Of an exit that a way into a block took, because the map of code pages did not know the page: the block, and the host address
    /// of the way's last jump, if the block is live.
    pub fn way_on(&self, id: u32) -> Option<(u32, u64)> {
        let exit = self.exits.get(id as usize)?;
        let on = exit.kind == Kind::To && exit.site.is_none() && self.blocks[exit.block as usize].live;
        on.then(|| (exit.block, self.host(exit.stub - JUMP)))
    }

    /// Is the block as it was translated?
    pub fn is_live(&self, b: u32) -> bool {
        self.blocks.get(b as usize).is_some_and(|b| b.live)
    }

    /// The bytes of the instruction at `rip`, of which `id` is an exit of its block, if they are all in the block's page.
    pub fn bytes(&self, ram: &Ram, id: u32, rip: u64) -> Option<[u8; MAX_INSN_LEN]> {
        let stub = self.exits[id as usize].stub;
        let b = &self.blocks[self.blocks.partition_point(|x| x.at <= stub).checked_sub(1)?];
        let gpa = b.gpa.wrapping_add(rip.wrapping_sub(b.rip));
        let mut bytes = [0; MAX_INSN_LEN];
        let inside = b.live
            && stub < b.end
            && gpa % PAGE_SIZE + MAX_INSN_LEN as u64 <= PAGE_SIZE
            && gpa & !(PAGE_SIZE - 1) == b.pages[0];
        inside.then_some(())?;
        ram.read(gpa, &mut bytes)?;
        Some(bytes)
    }

    /// Makes a block stale.
    pub fn kill(&mut self, b: u32) {
        let block = &mut self.blocks[b as usize];
        if !std::mem::replace(&mut block.live, false) {
            return;
        }
        self.counts.stale += 1;
        let (key, pages, incoming) =
            ((block.rip, block.gpa, block.mode), block.pages, std::mem::take(&mut block.incoming));
        // The way in for indirect branches leads to its stub now, and is not entered again.
        (block.landing, block.fast_landing) = (None, None);
        if self.by_key.get(&key) == Some(&b) {
            self.by_key.remove(&key);
        }
        for (site, stub) in incoming {
            self.buffer.patch(site as usize, stub as usize);
        }
        for page in pages {
            if let Some(p) = self.pages.get_mut(&page) {
                p.blocks.retain(|x| *x != b);
            }
        }
    }

    /// `len` bytes at `gpa` were written. True if the page shall no longer be watched.
    pub fn wrote(&mut self, ram: &Ram, gpa: u64, len: u64) -> bool {
        let page = gpa & !(PAGE_SIZE - 1);
        // Its code was thrown away with everything else, or it never had some.
        let Some(p) = self.pages.get_mut(&page) else { return true };
        p.generation = ram.code_generation(page);
        let hit: Vec<u32> = p
            .blocks
            .iter()
            .copied()
            .filter(|b| {
                let b = &self.blocks[*b as usize];
                b.pages[0] != b.pages[1] || b.gpa < gpa + len && gpa < b.gpa + u64::from(b.len)
            })
            .collect();
        p.harmless += u32::from(hit.is_empty());
        let tired = p.harmless > HARMLESS;
        for b in hit {
            self.kill(b);
        }
        match self.pages.get(&page) {
            Some(p) if p.blocks.is_empty() || tired => {
                self.drop_page(page);
                true
            }
            _ => false,
        }
    }

    fn drop_page(&mut self, page: u64) {
        if let Some(p) = self.pages.remove(&page) {
            for b in p.blocks {
                self.kill(b);
            }
        }
    }

    /// Throws away the blocks of all pages that were written; gives those pages.
    pub fn look_at_pages(&mut self, ram: &Ram) -> Vec<u64> {
        let stale: Vec<u64> = self
            .pages
            .iter()
            .filter(|(page, p)| ram.code_generation(**page) != p.generation)
            .map(|(page, _)| *page)
            .collect();
        for page in &stale {
            self.drop_page(*page);
        }
        stale
    }

    /// Bytes of host code of a block, with its host address: for tests and `explain`.
    pub fn code(&self, b: u32) -> (u64, Vec<u8>) {
        let b = &self.blocks[b as usize];
        (self.host(b.at), self.buffer.code(b.at as usize..b.end as usize))
    }
}

/// The jumps that the code begins with, as [`Around`] has them, and the bytes of each.
const WAYS_OUT: usize = 7;
const WAY_OUT: u64 = 14;
/// Where the code for [`enter::KICKED`] is, behind them.
const KICKED_AT: u64 = WAY_OUT * WAYS_OUT as u64;

/// Where they lead.
fn ways_out() -> [u64; WAYS_OUT] {
    let [save, restore] = [xsave::save(), xsave::restore()];
    [enter::leave(), enter::leave_light(), enter::port(), enter::wake(), save, restore, walk::walk()]
}

/// Stores to a code page that hit no code, before its blocks give way.
const HARMLESS: u32 = 256;

/// The first address of the page after that of `rip`.
pub fn next_page(rip: u64) -> u64 {
    (rip | (PAGE_SIZE - 1)).wrapping_add(1)
}

/// Where one of the map of code pages is.
pub fn cell_at(n: usize) -> usize {
    at::CELLS + 4 * n
}
