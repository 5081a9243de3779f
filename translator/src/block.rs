//! A guest block: a run of instructions from one entry to the first that does not fall through, conditional branches included.

use crate::route::{Route, Routes};
use bivisor_emulator::isa::MAX_INSN_LEN;
use bivisor_emulator::isa::decode::options;
use bivisor_emulator::mem::{GuestMemory, PAGE_SIZE, Prot, Vma};
use iced_x86::{Decoder, DecoderError, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register};

/// Most instructions in a block.
pub const MAX_INSNS: usize = 64;
/// Most conditional branches in a block: what follows them is translated before it is known to run.
pub const MAX_BRANCHES: usize = 4;

/// The page of an address.
pub(crate) fn page_of(address: u64) -> u64 {
    address & !(PAGE_SIZE - 1)
}

/// One instruction of a block.
#[derive(Clone, Copy, Debug)]
pub struct Item {
    /// The instruction, decoded at its address.
    pub iced: Instruction,
    /// Where its bytes start in [`GuestBlock::bytes`]; also its distance from the start of the block.
    pub at: u16,
    /// Its length.
    pub len: u8,
    /// How it is lowered.
    pub route: Route,
}

/// A stretch of a trace (`trace.rs`): its first byte, and where that is among the bytes of all stretches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Guest address.
    pub start: u64,
    /// Bytes before it.
    pub at: u16,
}

/// The guest address of what is `at` bytes into a block at `start`, or into these stretches if there are any.
pub(crate) fn address(start: u64, stretches: &[Stretch], at: u64) -> u64 {
    let i = stretches.partition_point(|s| u64::from(s.at) <= at);
    match i.checked_sub(1).map(|i| stretches[i]) {
        Some(s) => s.start.wrapping_add(at - u64::from(s.at)),
        None => start.wrapping_add(at),
    }
}

/// Decoded guest code.
#[derive(Clone, Debug, Default)]
pub struct GuestBlock {
    /// Address of the first instruction.
    pub start: u64,
    /// The instructions.
    pub items: Vec<Item>,
    /// Their bytes.
    pub bytes: Vec<u8>,
    /// Nobody tells when its bytes are written: its code must compare them whenever it is entered. It ends with the first instruction
    /// that writes memory, so that such a write is seen by the next one.
    pub compared: bool,
    /// Which of its bytes have been seen to change, if it is compared.
    pub changed: Vec<bool>,
    /// It ends with an indirect branch through memory that does not change.
    pub constant: Option<Constant>,
    /// Of a trace: where its bytes come from. Each instruction then leads to the next.
    pub stretches: Vec<Stretch>,
}

/// Where an indirect branch finds its target, and the target. Nobody may write there, and it is told when that ends: so the linker's
/// tables of functions (PLT and GOT) cost what direct branches do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Constant {
    /// The operand's address.
    pub at: u64,
    /// What is there: a canonical address.
    pub target: u64,
}

impl GuestBlock {
    /// Address of an instruction.
    pub fn rip(&self, item: &Item) -> u64 {
        address(self.start, &self.stretches, item.at.into())
    }

    /// Is it a trace?
    pub fn is_trace(&self) -> bool {
        !self.stretches.is_empty()
    }

    /// Address after an instruction.
    pub fn next_rip(&self, item: &Item) -> u64 {
        self.rip(item).wrapping_add(u64::from(item.len))
    }

    /// An instruction's bytes.
    pub fn code(&self, item: &Item) -> &[u8] {
        &self.bytes[usize::from(item.at)..][..usize::from(item.len)]
    }

    /// Address after the last instruction.
    pub fn end(&self) -> u64 {
        self.start.wrapping_add(self.bytes.len() as u64)
    }

    /// Does it jump to its own start?
    pub fn is_loop(&self) -> bool {
        self.items.iter().any(|i| {
            matches!(i.route, Route::Conditional | Route::Counted | Route::Jump)
                && i.iced.near_branch_target() == self.start
        })
    }

    /// The one or two pages it lies in.
    pub fn pages(&self) -> [u64; 2] {
        [page_of(self.start), page_of(self.end().wrapping_sub(1))]
    }
}

/// Can an instruction of this route lead from one in a trace to the next, at `to`? What comes after it is at `after`; `target` is a direct
/// branch's.
pub(crate) fn leads(route: Route, after: u64, target: Option<u64>, to: u64) -> bool {
    match route {
        Route::Copy => to == after,
        Route::Conditional => to == after || Some(to) == target,
        Route::Jump | Route::Call => Some(to) == target,
        Route::Return | Route::JumpIndirect | Route::CallIndirect => true,
        Route::CopyAndEnd | Route::Counted | Route::Syscall | Route::Step => false,
    }
}

/// The target of a direct branch.
pub(crate) fn direct_target(iced: &Instruction, route: Route) -> Option<u64> {
    matches!(route, Route::Jump | Route::Call | Route::Conditional).then(|| iced.near_branch_target())
}

/// Can code of a process be there?
pub(crate) fn is_user(target: &u64) -> bool {
    target >> 47 == 0
}

/// What became of a page that code is to be fetched from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// It must not be executed.
    No,
    /// A write to it will be told.
    Watched,
    /// It will not: see [`GuestBlock::compared`].
    Unwatched,
}

/// Where guest code is read from.
pub trait CodeSource {
    /// Prepares the page of this linear address for code to be fetched from it.
    fn open(&mut self, at: u64) -> Opened;
    /// Reads bytes of a page that was opened.
    fn read(&mut self, at: u64, to: &mut [u8]) -> bool;
    /// Raised when anything watched was written.
    fn epoch(&self) -> u64;
    /// Where the mapping of this page begins, if it is of a file or of the kernel and cannot be written.
    fn file(&self, _at: u64) -> Option<u64> {
        None
    }
    /// The eight bytes at `at` if they cannot be written; their page is watched from now on as one of code is.
    fn constant(&mut self, _at: u64) -> Option<u64> {
        None
    }
    /// A page once opened stays so until the epoch changes; then what tells this source from others.
    fn identity(&self) -> Option<usize> {
        None
    }
}

impl CodeSource for &GuestMemory {
    fn open(&mut self, at: u64) -> Opened {
        match self.may_execute(at) {
            false => Opened::No,
            true if self.watch_or_compare(at) => Opened::Watched,
            true => Opened::Unwatched,
        }
    }
    fn read(&mut self, at: u64, to: &mut [u8]) -> bool {
        GuestMemory::read(self, at, to).is_some()
    }
    fn epoch(&self) -> u64 {
        self.code_epoch()
    }
    fn file(&self, at: u64) -> Option<u64> {
        let file = |v: &Vma| v.backing.is_some() || &*v.name == "[vdso]";
        let fixed = |v: &Vma| file(v) && !v.shared && !v.prot.contains(Prot::WRITE);
        self.flat()?.find(at).filter(fixed).map(|v| v.start)
    }
    fn constant(&mut self, at: u64) -> Option<u64> {
        let fixed = |v: Vma| v.prot.contains(Prot::READ) && !v.prot.contains(Prot::WRITE) && !v.shared;
        if !at.is_multiple_of(8) || !self.flat()?.find(at).is_some_and(fixed) {
            return None;
        }
        self.watch_code(at);
        // Now that a change would be told, it is looked at again.
        let mut bytes = [0; 8];
        GuestMemory::read(self, at, &mut bytes)?;
        self.flat()?.find(at).is_some_and(fixed).then(|| u64::from_le_bytes(bytes))
    }
    fn identity(&self) -> Option<usize> {
        Some(self.id() as usize)
    }
}

/// What is decoded into, and what is known from last time; one for each virtual CPU.
#[derive(Default)]
pub struct Scratch {
    /// The block.
    pub block: GuestBlock,
    /// A page that was opened, the epoch then, and the source.
    known: Option<(u64, u64, usize)>,
    /// What became of it.
    opened: Option<Opened>,
    /// Finds out what writes memory.
    info: Option<InstructionInfoFactory>,
}

const PIECE: u64 = 128;

impl Scratch {
    /// Fetches some more bytes, not beyond the end of a page. Each page is watched before it is read.
    fn more(&mut self, source: &mut dyn CodeSource) -> bool {
        let old = self.block.bytes.len();
        let at = self.block.start.wrapping_add(old as u64);
        if old == 0 || at.is_multiple_of(PAGE_SIZE) {
            match self.look(source, at) {
                Some(Opened::No) | None => return false,
                Some(Opened::Watched) => {}
                Some(Opened::Unwatched) => self.block.compared = true,
            }
        }
        let bytes = &mut self.block.bytes;
        bytes.resize(old + PIECE.min(PAGE_SIZE - at % PAGE_SIZE) as usize, 0);
        if !source.read(at, &mut bytes[old..]) {
            bytes.truncate(old);
        }
        bytes.len() > old
    }

    /// Decodes the block of at most `most` instructions at `start` in 64-bit code. False if the first instruction cannot be fetched or
    /// decoded: the interpreter then finds out why.
    pub fn decode(&mut self, source: &mut dyn CodeSource, start: u64, routes: &Routes, most: usize) -> bool {
        self.block.compared = false;
        self.attempt(source, start, routes, most);
        if self.block.compared {
            // It may be the second page, and what comes before was decoded with writes in its middle.
            self.attempt(source, start, routes, most);
        }
        if let Some(Item { iced, route: Route::JumpIndirect | Route::CallIndirect, .. }) = self.block.items.last()
            && !self.block.compared
            && iced.op0_kind() == OpKind::Memory
            && iced.memory_base() == Register::RIP
            && iced.segment_prefix() != Register::FS
        {
            let at = iced.ip_rel_memory_address();
            let target = source.constant(at).filter(is_user);
            self.block.constant = target.map(|target| Constant { at, target });
        }
        !self.block.items.is_empty()
    }

    /// Looks at the page of an address, if it is not the one that was looked at last.
    fn look(&mut self, source: &mut dyn CodeSource, at: u64) -> Option<Opened> {
        let now = source.identity().map(|id| (page_of(at), source.epoch(), id));
        if now.is_none() || now != self.known {
            let opened = source.open(at);
            (self.known, self.opened) = (now, Some(opened));
        }
        self.opened
    }

    /// The instruction at an address of which writes are told, with its bytes.
    pub fn one(&mut self, source: &mut dyn CodeSource, at: u64) -> Option<(Instruction, [u8; MAX_INSN_LEN])> {
        let mut bytes = [0; MAX_INSN_LEN];
        let there = (PAGE_SIZE - at % PAGE_SIZE).min(MAX_INSN_LEN as u64) as usize;
        let mut have = 0;
        for end in [there, MAX_INSN_LEN] {
            let from = at.wrapping_add(have as u64);
            if self.look(source, from) != Some(Opened::Watched) || !source.read(from, &mut bytes[have..end]) {
                return None;
            }
            have = end;
            let iced = Decoder::with_ip(64, &bytes[..have], at, options()).decode();
            if !iced.is_invalid() {
                return Some((iced, bytes));
            }
        }
        None
    }

    /// Decodes a trace: the instructions at these addresses, each of which led to the next. False if one of them cannot be had, or does not
    /// any more.
    pub fn decode_path(&mut self, source: &mut dyn CodeSource, path: &[u64], routes: &Routes) -> bool {
        let Some(&start) = path.first() else { return false };
        self.block = GuestBlock { start, ..GuestBlock::default() };
        let mut next = None;
        for &rip in path {
            let Some((iced, bytes)) = self.one(source, rip) else { return false };
            let at = self.block.bytes.len() as u16;
            if next.replace(iced.next_ip()) != Some(rip) {
                self.block.stretches.push(Stretch { start: rip, at });
            }
            self.block.bytes.extend_from_slice(&bytes[..iced.len()]);
            self.block.items.push(Item { iced, at, len: iced.len() as u8, route: routes.of(&iced) });
        }
        let leads = |(item, &to): (&Item, &u64)| {
            leads(item.route, item.iced.next_ip(), direct_target(&item.iced, item.route), to)
        };
        self.block.items.iter().zip(&path[1..]).all(leads)
    }

    fn attempt(&mut self, source: &mut dyn CodeSource, start: u64, routes: &Routes, most: usize) {
        self.block.start = start;
        self.block.bytes.clear();
        self.block.items.clear();
        self.block.changed.clear();
        self.block.constant = None;
        self.block.stretches.clear();
        let mut at = 0;
        let mut branches = 0;
        'fetch: while self.more(source) {
            // As `isa::decode` does it; what it would refuse is left to the interpreter, which raises the fault.
            let ip = start.wrapping_add(at as u64);
            let mut decoder = Decoder::with_ip(64, &self.block.bytes[at..], ip, options());
            let items = &mut self.block.items;
            while items.len() < most && branches < MAX_BRANCHES && at < PAGE_SIZE as usize - MAX_INSN_LEN {
                let mut iced = Instruction::default();
                decoder.decode_out(&mut iced);
                if iced.is_invalid() {
                    match decoder.last_error() {
                        DecoderError::NoMoreBytes if self.block.bytes.len() - at < MAX_INSN_LEN => continue 'fetch,
                        _ => break 'fetch,
                    }
                }
                let len = iced.len();
                let route = routes.of(&iced);
                items.push(Item { iced, at: at as u16, len: len as u8, route });
                at += len;
                if route.ends_block() || self.block.compared && writes(&mut self.info, &iced) {
                    break 'fetch;
                }
                branches += usize::from(route == Route::Conditional);
            }
            break;
        }
        self.block.bytes.truncate(at);
    }
}

/// May the instruction write memory?
fn writes(info: &mut Option<InstructionInfoFactory>, iced: &Instruction) -> bool {
    let reads = |access| matches!(access, OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
    !info.get_or_insert_with(InstructionInfoFactory::new).info(iced).used_memory().iter().all(|m| reads(m.access()))
}
