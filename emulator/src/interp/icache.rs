//! Decoded instructions by physical page (flat memory: by page of the address space).
//!
//! A page keeps the bytes it was decoded from. When memory says that the page was written, the bytes are compared, and only what was
//! decoded from changed ones is forgotten: data beside code costs a comparison, not a new decoding.

use crate::interp::{Exec, Op, check, dispatch};
use crate::isa::{Class, Insn, MAX_INSN_LEN, Sensitivity};
use crate::mem::{GuestMemory, PAGE_SIZE};
use iced_x86::Mnemonic;
use std::collections::HashMap;

const PAGE: usize = PAGE_SIZE as usize;
/// Slots of the small table in front of the map.
const FRONT: usize = 1024;
/// Decoded instructions before everything is forgotten: about 128 bytes each.
const MOST: usize = 1 << 20;
/// After so many the page is not watched any more.
const MOST_REFRESHES: u32 = 32;
/// After so many instructions it is watched again.
const COMPARE_AGAIN: u32 = 1 << 20;
/// The part of a context that says how bytes are decoded; the rest says who fetches.
const SIZE_BITS: u64 = 3;

bitflags::bitflags! {
    /// What the loop must know of an instruction.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Marks: u8 {
        /// [`check::before`] has something to ask.
        const CHECK = 1;
        /// May change what the loop relies on (mode, mapping, interrupt flag): look again after it.
        const LEAVES = 1 << 1;
        /// May be unfinished: RIP stays.
        const REPEATS = 1 << 2;
        /// Must be done with the event checks of a single step.
        const CAREFUL = 1 << 3;
    }
}

/// A decoded instruction and what executes it. Two lines of the host's cache, and never three.
#[derive(Clone)]
#[repr(align(128))]
pub struct Entry {
    /// The instruction.
    pub insn: Insn,
    /// Its function.
    pub op: Op,
    /// See [`Marks`].
    pub marks: Marks,
    /// May go on elsewhere than behind itself.
    pub jumps: bool,
    /// Works on registers alone, and the next number is the instruction behind it: nothing to look at between the two.
    pub hurries: bool,
    /// Where in its page it begins; [`STALE`] if the bytes have changed.
    offset: u16,
}

/// The offset of an entry that is not to be used any more.
const STALE: u16 = u16::MAX;

impl Entry {
    /// Finds the function. What the offered CPU lacks is #UD.
    pub fn new(mut insn: Insn, x: &mut Exec<'_>) -> Entry {
        let known = x.env.cpu_model.supports(insn.iced.code());
        let op = if known { dispatch::op(&insn) } else { dispatch::undefined };
        if insn.facts.class == Class::Native {
            insn.hint = x.env.native.intern(&insn.iced);
        }
        let mut marks = marks(&insn);
        // #UD comes before the question who may execute it.
        marks.set(Marks::CHECK, known && marks.contains(Marks::CHECK));
        let jumps = insn.facts.class == Class::Branch;
        Entry { insn, op, marks, jumps, hurries: false, offset: STALE }
    }
}

/// Neither touches memory nor goes elsewhere, nor changes what the loop relies on.
fn works_on_registers(entry: &Entry) -> bool {
    let i = &entry.insn;
    let touches_memory = i.mem().is_some() || i.iced.is_stack_instruction();
    i.facts.class == Class::Integer && !touches_memory && entry.marks.is_empty()
}

fn marks(i: &Insn) -> Marks {
    let mut m = Marks::empty();
    m.set(Marks::CHECK, check::needed(i));
    let class = i.facts.class;
    m.set(Marks::REPEATS, matches!(class, Class::String | Class::Io));
    let leaves = matches!(class, Class::Segment | Class::System | Class::Io);
    m.set(Marks::LEAVES, leaves || i.facts.sensitivity != Sensitivity::Innocuous);
    m.set(Marks::CAREFUL, matches!(i.iced.mnemonic(), Mnemonic::Sysret | Mnemonic::Sysretq));
    m
}

/// An instruction that begins in one page and ends in the next.
struct Crossing {
    offset: usize,
    next_gpa: u64,
    next_generation: u64,
    entry: Entry,
}

/// The decoded instructions of one page in one code size.
pub struct Page {
    gpa: u64,
    generation: u64,
    /// At this epoch of memory the page was found unchanged.
    epoch: u64,
    /// Index + 1 in `entries` of the instruction at an offset.
    table: Box<[u16; PAGE]>,
    entries: Vec<Entry>,
    crossing: Option<Box<Crossing>>,
    bytes: Box<[u8; PAGE]>,
    /// How often memory had to be asked again.
    refreshes: u32,
    /// Instructions compared one by one since the page was last watched.
    compared: u32,
}

impl Page {
    /// `None` if there is no memory to read.
    fn new(mem: &GuestMemory, gpa: u64) -> Option<Page> {
        let mut page = Page {
            gpa,
            generation: 0,
            epoch: 0,
            table: Box::new([0; PAGE]),
            entries: Vec::new(),
            crossing: None,
            bytes: Box::new([0; PAGE]),
            refreshes: 0,
            compared: 0,
        };
        page.refresh(mem)?;
        Some(page)
    }

    /// Is the page written so often that to watch it costs more than to compare each instruction? In a flat space the watch is a write
    /// protection, and each round of it a signal and two system calls.
    #[inline(always)]
    pub fn is_unwatched(&self) -> bool {
        self.refreshes > MOST_REFRESHES
    }

    /// Are the bytes of an instruction still those that it was decoded from? Asked for unwatched pages.
    pub fn is_same(&mut self, mem: &GuestMemory, offset: usize, len: usize) -> bool {
        self.compared += 1;
        if self.compared > COMPARE_AGAIN {
            (self.refreshes, self.compared) = (0, 0);
            return self.refresh(mem).is_some() && self.entry(self.find(offset)).is_some();
        }
        let mut now = [0; MAX_INSN_LEN];
        let (Some(now), Some(then)) = (now.get_mut(..len), self.bytes.get(offset..offset + len)) else { return false };
        mem.read(self.gpa + offset as u64, now).is_some() && now == then
    }

    /// Makes the page agree with memory. `None` if there is none any more.
    pub fn refresh(&mut self, mem: &GuestMemory) -> Option<()> {
        let mut now = [0; PAGE];
        // In this order: what is written after the watch is seen by the generation or in the bytes.
        let epoch = mem.code_epoch();
        self.refreshes += u32::from(mem.flat().is_some());
        if !self.is_unwatched() {
            mem.watch_code(self.gpa);
        }
        let generation = mem.code_generation(self.gpa);
        mem.read(self.gpa, &mut now)?;
        if now != *self.bytes {
            let first = now.iter().zip(&*self.bytes).position(|(a, b)| a != b).unwrap_or(0);
            let last = now.iter().zip(&*self.bytes).rposition(|(a, b)| a != b).unwrap_or(PAGE - 1);
            let first = first.saturating_sub(MAX_INSN_LEN - 1);
            self.table[first..=last].fill(0);
            for entry in &mut self.entries {
                if (first..=last).contains(&usize::from(entry.offset)) {
                    entry.offset = STALE;
                }
            }
            let mut next_is_stale = false;
            for entry in self.entries.iter_mut().rev() {
                entry.hurries &= !next_is_stale;
                next_is_stale = entry.offset == STALE;
            }
            self.crossing = None;
            *self.bytes = now;
        }
        (self.generation, self.epoch) = (generation, epoch);
        Some(())
    }

    /// Is the page as memory has it at this epoch? Asks memory only when something changed since it was asked last.
    #[inline(always)]
    fn is_fresh(&mut self, mem: &GuestMemory, epoch: u64) -> bool {
        if self.epoch == epoch {
            return true;
        }
        let fresh = mem.code_generation(self.gpa) == self.generation;
        if fresh {
            self.epoch = epoch;
        }
        fresh
    }

    /// The epoch of memory at which the page was last known to be unchanged.
    #[inline(always)]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The number of the instruction at an offset; [`Page::entry`] gives none for it if it was not decoded.
    #[inline(always)]
    pub fn find(&self, offset: usize) -> usize {
        usize::from(self.table[offset % PAGE]).wrapping_sub(1)
    }

    /// The instruction with a number.
    #[inline(always)]
    pub fn entry(&self, n: usize) -> Option<&Entry> {
        self.entries.get(n)
    }

    /// The number of the instruction at `offset`, which was reached from number `n` by going on. Code is decoded in the order of
    /// its execution, so the next number is a good guess, and faster than to ask the table.
    #[inline(always)]
    pub fn after(&self, n: usize, offset: usize) -> usize {
        match self.entries.get(n + 1) {
            Some(entry) if usize::from(entry.offset) == offset => n + 1,
            _ => self.find(offset),
        }
    }

    /// Remembers an instruction that lies in this page as a whole.
    pub fn put(&mut self, offset: usize, mut entry: Entry) {
        entry.offset = (offset % PAGE) as u16;
        if self.entries.len() >= usize::from(u16::MAX) {
            self.entries.clear();
            self.table.fill(0);
        }
        if let Some(last) = self.entries.last_mut() {
            last.hurries = usize::from(last.offset) + usize::from(last.insn.len) == offset && works_on_registers(last);
        }
        self.entries.push(entry);
        self.table[offset % PAGE] = self.entries.len() as u16;
    }

    /// The bytes from an offset on.
    pub fn bytes(&self, offset: usize) -> &[u8] {
        &self.bytes[offset % PAGE..]
    }

    /// An instruction that ends in the next page, if that page is where it was and unchanged.
    pub fn get_crossing(&self, mem: &GuestMemory, offset: usize, next_gpa: u64) -> Option<&Entry> {
        let c = self.crossing.as_ref().filter(|c| c.offset == offset && c.next_gpa == next_gpa)?;
        (mem.code_generation(next_gpa) == c.next_generation).then_some(&c.entry)
    }

    /// Remembers an instruction that ends in the next page, of which `next_generation` was asked before its bytes were read.
    pub fn put_crossing(&mut self, offset: usize, next_gpa: u64, next_generation: u64, entry: Entry) {
        self.crossing = Some(Box::new(Crossing { offset, next_gpa, next_generation, entry }));
    }
}

#[derive(Clone, Copy, Debug)]
struct Front {
    /// Linear page and context.
    key: u64,
    /// Of the [`crate::mem::Mmu`].
    generation: u64,
    page: u32,
}

/// All pages.
pub struct ICache {
    pages: Vec<Page>,
    by_key: HashMap<u64, u32>,
    front: Box<[Front; FRONT]>,
}

impl Default for ICache {
    fn default() -> ICache {
        ICache {
            pages: Vec::new(),
            by_key: HashMap::new(),
            front: vec![Front { key: u64::MAX, generation: 0, page: 0 }; FRONT].try_into().expect("that many"),
        }
    }
}

impl ICache {
    /// The page last found at a linear page in a context (code size and privilege, below 4096), if the translation cannot have changed
    /// since. It is brought up to date; `None` also if it cannot be.
    #[inline(always)]
    pub fn at_linear(&mut self, mem: &GuestMemory, linear_page: u64, context: u64, generation: u64) -> Option<u32> {
        let front = self.front[front_slot(linear_page)];
        if front.key != linear_page | context || front.generation != generation {
            return None;
        }
        let page = self.pages.get_mut(front.page as usize)?;
        if !page.is_fresh(mem, mem.code_epoch()) {
            // A flat page may have lost its right to be executed: the long way asks.
            if mem.flat().is_some() {
                return None;
            }
            page.refresh(mem)?;
        }
        Some(front.page)
    }

    /// A page by its number.
    #[inline(always)]
    pub fn page(&mut self, n: u32) -> Option<&mut Page> {
        self.pages.get_mut(n as usize)
    }

    /// The page of a translated address: found, or made. `None` if no memory is there.
    pub fn at_physical(
        &mut self,
        mem: &GuestMemory,
        gpa: u64,
        linear_page: u64,
        context: u64,
        generation: u64,
    ) -> Option<u32> {
        let gpa = gpa & !(PAGE_SIZE - 1);
        let key = gpa | context & SIZE_BITS;
        let n = match self.by_key.get(&key) {
            Some(&n) => {
                let page = &mut self.pages[n as usize];
                if !page.is_fresh(mem, mem.code_epoch()) {
                    page.refresh(mem)?;
                }
                n
            }
            None => {
                if self.pages.len() % 64 == 63 && self.weight() > MOST {
                    self.clear();
                }
                let n = self.pages.len() as u32;
                self.pages.push(Page::new(mem, gpa)?);
                self.by_key.insert(key, n);
                n
            }
        };
        self.front[front_slot(linear_page)] = Front { key: linear_page | context, generation, page: n };
        Some(n)
    }

    /// Memory in use, counted in instructions: tables weigh as much as a hundred.
    fn weight(&self) -> usize {
        self.pages.iter().map(|p| p.entries.len() + 100).sum()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = ICache::default();
    }
}

fn front_slot(linear_page: u64) -> usize {
    (linear_page / PAGE_SIZE) as usize % FRONT
}
