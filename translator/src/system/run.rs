//! The dispatch loop of the system mode.
//!
//! Interrupts are looked at whenever the code is left; whoever raises one from another thread kicks. While an interrupt waits for IF,
//! STI and POPF leave.

mod calls;
mod gates;
mod image;
mod mirror;
mod miss;

use crate::emit::slot;
use crate::route::Policy;
use crate::run::Translator;
use crate::system::area::{Area, CELLS, at};
use crate::system::block::Access as GuestAccess;
use crate::system::cache::{Cache, cell_at, next_page};
use crate::system::enter::{self, ABORTED, FAULT, KICKED};
use crate::system::lower::{Flags, Kind};
use crate::system::tlb::Tlb;
use crate::system::{Control, Mode, handler, xsave};
use bivisor_emulator::cpu::xsave::component;
use bivisor_emulator::cpu::{CpuState, Fault, Rflags};
use bivisor_emulator::host::signal;
use bivisor_emulator::host::thread::ThreadBlock;
use bivisor_emulator::interp::sensitive::time::TimeSource;
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::mem::{Access, By, Flushed, Mmu, PAGE_SIZE, Ram};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts};
use calls::Call;
use iced_x86::Code;
use mirror::Mirroring;
use miss::Filled;
use std::collections::BTreeMap;

/// State components above x87 and XMM.
const UPPER: u64 = component::AVX | component::AVX512;
/// So many entries of the map of code pages are forgotten one by one.
const MOST_LOCAL: usize = 2 * CELLS;
/// Instructions that the interpreter does at once where nothing is translated.
const STRETCH: u64 = 64;

/// What system mode keeps from run to run.
pub struct System {
    area: Area,
    cache: Cache,
    tlb: Tlb,
    mirroring: Mirroring,
    /// [`bivisor_emulator::mem::Mmu::generation`] of what is cached of mappings.
    mapping: u64,
    epoch: u64,
    memory: u64,
    /// Is an interrupt waiting, as far as this thread knows?
    line: bool,
    /// A non-maskable one?
    nmi: bool,
    /// [`Ram::watches`] that the TLB knows of.
    watches: u64,
    /// [`Ram::tracks`] likewise.
    tracks: u64,
    /// Where the instruction that the interpreter does next stores, if that is known.
    store: Option<(u64, u64)>,
    /// What that instruction raises, if that is known.
    fault: Option<Fault>,
    /// By exit: what it calls the interpreter for.
    calls: Vec<Option<Box<Call>>>,
    /// How often, of those that were thrown away.
    called: BTreeMap<Code, u64>,
    /// IN, OUT and INVLPG done without leaving the code.
    ports: [u64; 3],
    flushes: u64,
    /// Components above XMM are in use.
    upper: bool,
    /// They are going to be.
    wants_upper: bool,
    /// Of the state, if it is known.
    control: Option<Option<Control>>,
    /// So many times code of CPL 0 is still entered with the vector registers; so many times it was the last time; how often it was
    /// entered without since.
    awake: u32,
    stays_awake: u32,
    slept: u32,
    /// Times that components above XMM were found unused since they were in use.
    unused: u32,
    /// An address in each page that the map of code pages knows.
    code_pages: Box<[u64; CELLS]>,
    /// Which of them are not global.
    local_pages: Vec<u16>,
    /// RDTSC shows the host's counter; CPUID need not leave.
    in_cache: (bool, bool),
}

/// How the block that is looked for was come by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Via {
    Start,
    Link(u32),
    Indirect,
    /// After the call of this exit.
    Call(u32),
}

/// What leaving the code means.
enum Next {
    /// Look for the block at RIP.
    Go(Via),
    /// Go on at this host address with everything as it is.
    Resume(u64),
    /// One interpreter step for this exit; may it need the vector registers?
    Step(Option<u32>, bool, Via),
    /// Leave the engine.
    Out(Exit),
}

/// RF, which the frames of faults have set, ends with the next instruction. Without breakpoints nobody sees that it ends before it: a
/// fault sets it anew, and no instruction reads it (SDM 3B 17.3.1.1).
fn resume(cpu: &mut CpuState) {
    if cpu.dr7 & 0xff == 0 && !cpu.rflags.contains(Rflags::TF) {
        cpu.rflags.remove(Rflags::RF);
    }
}

fn by(cpu: &CpuState) -> By {
    if cpu.cpl() == 3 { By::User } else { By::Supervisor }
}

impl System {
    fn new(t: &Translator) -> std::io::Result<System> {
        let area = Area::new()?;
        let mut cache = Cache::new(t.cache.model().clone(), t.cache.policy())?;
        cache.flush(&area);
        enter::prepare(&area);
        xsave::prepare(&area);
        area.set(at::X87_DATA, u64::MAX);
        let tlb = Tlb::new(&area);
        Ok(System {
            area,
            cache,
            tlb,
            mirroring: Mirroring::new(t.mirror_after),
            mapping: 0,
            epoch: 0,
            memory: 0,
            line: false,
            nmi: false,
            watches: 0,
            tracks: 0,
            store: None,
            fault: None,
            calls: Vec::new(),
            called: BTreeMap::new(),
            ports: [0; 3],
            flushes: 0,
            upper: false,
            wants_upper: false,
            control: None,
            awake: 0,
            stays_awake: 0,
            slept: u32::MAX,
            unused: 0,
            code_pages: Box::new([u64::MAX; CELLS]),
            local_pages: Vec::new(),
            in_cache: (true, true),
        })
    }

    /// Counters of the cache.
    pub fn counts(&self) -> crate::system::cache::Counts {
        self.cache.counts
    }

    /// How often the interpreter was called, by instruction.
    pub fn called(&self) -> BTreeMap<Code, u64> {
        let mut all = self.called.clone();
        let codes = [Code::In_AL_imm8, Code::Out_imm8_AL, Code::Invlpg_m];
        for (code, n) in codes.into_iter().zip(self.ports).filter(|(_, n)| *n > 0) {
            *all.entry(code).or_default() += n;
        }
        for c in self.calls.iter().flatten() {
            *all.entry(c.code).or_default() += c.times;
        }
        all
    }

    fn flush_mapping(&mut self) {
        self.clear_mirror();
        self.tlb.clear(&self.area);
        self.area.fill(at::CELLS..at::CELLS + 4 * CELLS, 0);
        self.local_pages.clear();
        self.cache.forget_fast(&self.area);
    }

    /// Forgets all pages but global ones.
    fn flush_local(&mut self) {
        self.clear_mirror();
        self.tlb.clear_local(&self.area);
        if self.local_pages.len() >= MOST_LOCAL {
            self.area.fill(at::CELLS..at::CELLS + 4 * CELLS, 0);
        }
        for n in self.local_pages.drain(..) {
            self.code_pages[usize::from(n)] = u64::MAX;
            self.area.set_u32(cell_at(n.into()), 0);
        }
        self.cache.forget_fast(&self.area);
    }

    /// Forgets one small page.
    fn flush_page(&mut self, laddr: u64) {
        self.tlb.clear_page(&self.area, laddr);
        self.mirroring.clear_page(laddr);
        if self.cache.cells(laddr)[1].is_some() {
            self.cache.forget_fast(&self.area);
        }
        for n in self.cache.cells(laddr).into_iter().flatten().map(usize::from) {
            if self.code_pages[n] / PAGE_SIZE == laddr / PAGE_SIZE {
                self.code_pages[n] = u64::MAX;
                self.area.set_u32(cell_at(n), 0);
            }
        }
    }

    /// Throws the code away, and what is known by the numbers of its exits.
    fn flush(&mut self) {
        self.cache.flush(&self.area);
        self.forget_calls();
    }

    /// The cache was flushed.
    fn forget_calls(&mut self) {
        self.flushes = self.cache.counts.flushes;
        self.called = self.called();
        self.ports = [0; 3];
        self.calls.clear();
        self.close_gates();
    }

    /// Takes notice of what the guest has changed of mappings and code.
    fn look_around(&mut self, t: &mut Translator, board: Board<'_>, ram: &Ram) {
        if self.memory != board.mem.id() {
            self.memory = board.mem.id();
            t.core.mmu.flush();
            self.flush();
            self.epoch = ram.code_epoch();
            self.mapping = t.core.mmu.generation();
            self.flush_mapping();
        }
        if self.mapping != t.core.mmu.generation() {
            let one = self.mapping.wrapping_add(1) == t.core.mmu.generation();
            self.mapping = t.core.mmu.generation();
            match t.core.mmu.flushed() {
                Flushed::Page(page) if one => self.flush_page(page),
                Flushed::Local if one => self.flush_local(),
                _ => self.flush_mapping(),
            }
        }
        if self.epoch != ram.code_epoch() {
            self.epoch = ram.code_epoch();
            for page in self.cache.look_at_pages(ram) {
                ram.unwatch_code(page);
            }
            self.epoch = ram.code_epoch();
        }
    }

    /// Is there an event to take now?
    fn due(&self, cpu: &CpuState) -> bool {
        (self.line && cpu.rflags.contains(Rflags::IF)) || (self.nmi && !cpu.nmi_blocked)
    }

    fn ask_line(&mut self, board: Board<'_>) {
        (self.line, self.nmi) = (board.bus.interrupt_pending(), board.bus.nmi_pending());
    }

    /// From now on the map of code pages knows the page of block `b`, which was just translated to its physical page.
    fn know_page(&mut self, t: &Translator, b: u32) {
        let block = self.cache.block(b);
        let (rip, first, second) = (block.rip, (block.cell, block.number), block.second);
        self.know(t, rip, first);
        if let Some(second) = second {
            self.know(t, next_page(rip), second);
        }
    }

    fn know(&mut self, t: &Translator, rip: u64, (cell, number): (u16, u32)) {
        let n = usize::from(cell);
        if self.code_pages[n] / PAGE_SIZE != rip / PAGE_SIZE || self.area.get_u32(cell_at(n)) == 0 {
            self.code_pages[n] = rip;
            let global = t.core.mmu.is_global(Mmu::context(&t.cpu, by(&t.cpu)), rip);
            if !global && self.local_pages.len() < MOST_LOCAL {
                self.local_pages.push(n as u16);
            }
        }
        self.area.set_u32(cell_at(n), number);
    }

    /// Where to go on after an exit that only asks whether a block's page is still mapped to the physical page the block is from, if it is.
    fn known_way(&mut self, t: &mut Translator, board: Board<'_>, block: &ThreadBlock, id: u32) -> Option<u64> {
        let (b, host) = self.cache.way_on(id)?;
        let (rip, gpa) = (self.cache.block(b).rip, self.cache.block(b).gpa);
        if block.scratch[slot::LOOK].get() != 0 {
            return None;
        }
        let by = by(&t.cpu);
        let found = t.core.mmu.translate(&t.cpu, board.mem, rip, Access::Execute, by).ok()?;
        (found == gpa && self.is_whole(t, board, b)).then(|| {
            t.stats.to_block += 1;
            self.know_page(t, b);
            host
        })
    }

    /// Is the page that the block's last instruction reaches into, if there is one, mapped where it was?
    fn is_whole(&self, t: &mut Translator, board: Board<'_>, b: u32) -> bool {
        let block = self.cache.block(b);
        let mut mapped = || {
            let by = by(&t.cpu);
            t.core.mmu.translate(&t.cpu, board.mem, next_page(block.rip), Access::Execute, by).ok()
        };
        block.second.is_none() || mapped() == Some(block.pages[1])
    }

    /// The block at RIP, translated if it must be.
    fn find(&mut self, t: &mut Translator, board: Board<'_>, ram: &Ram, mode: Mode, mut via: Via) -> Option<u32> {
        let rip = t.cpu.rip;
        if let Via::Call(id) = via
            && let Some(Some(c)) = self.calls.get(id as usize)
            && (c.next, c.mapping) == (rip, self.mapping)
            && self.cache.is_live(c.block)
            && self.cache.block(c.block).mode == mode
        {
            return Some(c.block);
        }
        let by = by(&t.cpu);
        let gpa = t.core.mmu.translate(&t.cpu, board.mem, rip, Access::Execute, by).ok()?;
        if gpa >= ram.size() {
            return None;
        }
        let key = (rip, gpa, mode);
        let flushes = self.cache.counts.flushes;
        let mut known = self.cache.find(key);
        if let Some(b) = known
            && !self.is_whole(t, board, b)
        {
            self.cache.kill(b);
            known = None;
        }
        let b = match known {
            Some(b) => b,
            None => {
                if self.cache.is_full() {
                    self.flush();
                    // The exit it came from is gone.
                    via = Via::Start;
                }
                if rip == t.cpu.msr.lstar {
                    // The block that SYSCALL goes to is no more.
                    self.close_gates();
                }
                let watches = ram.watches();
                ram.watch_code(gpa);
                self.cache.guess = (t.cpu.gpr, self.mirroring.used(), self.mirroring.usual());
                let (cpu, core, mem) = (&t.cpu, &mut t.core, board.mem);
                let mut next = || {
                    let to = core.mmu.translate(cpu, mem, next_page(rip), Access::Execute, by).ok()?;
                    ram.watch_code(to);
                    (to < ram.size()).then_some(to)
                };
                let b = match self.cache.translate(ram, key, &mut next) {
                    None if self.cache.is_out_of_modes(mode) => {
                        self.flush();
                        via = Via::Start;
                        ram.watch_code(gpa);
                        self.cache.translate(ram, key, &mut next)
                    }
                    made => made,
                }?;
                if ram.watches() != watches && self.watches == watches {
                    // Only pages of this block are watched besides those that the TLB knows of.
                    let [first, second] = self.cache.block(b).pages;
                    for page in [Some(first), (first != second).then_some(second)].into_iter().flatten() {
                        self.tlb.forbid_stores(&self.area, ram, page);
                        self.mirroring.forbid_stores(page);
                    }
                    self.watches = ram.watches();
                }
                b
            }
        };
        self.know_page(t, b);
        // What led here may just have been thrown away.
        match if self.cache.counts.flushes == flushes { via } else { Via::Start } {
            Via::Start => {}
            Via::Link(id) => self.cache.link(id, b),
            Via::Indirect => {
                self.cache.enter_target(&self.area, b);
            }
            Via::Call(id) => {
                if let Some(Some(c)) = self.calls.get_mut(id as usize) {
                    (c.next, c.block, c.mapping) = (rip, b, self.mapping);
                }
            }
        }
        Some(b)
    }

    fn attach(&mut self, t: &mut Translator) -> &'static ThreadBlock {
        let block = signal::attach();
        block.note_tid();
        // Another engine may have mapped its own there.
        self.area.map(block).expect("the area can be mapped behind the thread block");
        let (start, end) = self.cache.range();
        block.engine_hook.set(Some(handler::hook));
        block.scratch[slot::LOOK].set(0);
        block.scratch[slot::CACHE_START].set(start);
        block.scratch[slot::CACHE_END].set(end);
        if std::mem::replace(&mut self.cache.counts_hits, t.watch.is_on()) != t.watch.is_on() {
            self.cache.flush(&self.area);
        }
        let time = t.core.env.time == TimeSource::Host && !t.core.intercepts.contains(Intercepts::RDTSC);
        let cpuid = !t.core.intercepts.contains(Intercepts::CPUID);
        if std::mem::replace(&mut self.in_cache, (time, cpuid)) != (time, cpuid) {
            self.cache.set_policy(t.cache.model().clone(), Policy { host_time: time, cpuid, ..t.cache.policy() });
            self.cache.flush(&self.area);
        }
        self.forget_control();
        t.kicker.entered(block.tid.get());
        self.area.set(at::CPU, &raw mut *t.cpu as u64);
        self.area.set(at::VECTORS_AT, 0);
        self.forget_priority();
        block
    }

    /// Runs at most `left` instructions, and counts them off.
    fn dispatch(
        &mut self,
        t: &mut Translator,
        board: Board<'_>,
        ram: &Ram,
        block: &ThreadBlock,
        left: &mut u64,
    ) -> Exit {
        let counted = *left != u64::MAX;
        let mut via = Via::Start;
        if self.tracks != ram.tracks() {
            self.tracks = ram.tracks();
            self.tlb.clear(&self.area);
            self.clear_mirror();
        }
        self.mirroring.prepare(&self.area, ram);
        self.ask_line(board);
        while *left > 0 {
            if block.scratch[slot::LOOK].replace(0) != 0 {
                self.cache.heal();
                self.ask_line(board);
            }
            if self.flushes != self.cache.counts.flushes {
                self.forget_calls();
                via = Via::Start;
            }
            if t.kicker.requested() && t.kicker.take() {
                return Exit::Kicked;
            }
            self.look_around(t, board, ram);
            if self.area.get(at::VECTORS_AT) == 0 {
                let wanted = std::mem::take(&mut self.wants_upper);
                self.follow_upper(wanted || t.cpu.xsave.xstate_bv() & UPPER != 0);
            }
            let due = self.due(&t.cpu);
            if !due && !counted {
                resume(&mut t.cpu);
            }
            self.awake = if t.cpu.cpl() == 3 { 0 } else { self.awake.saturating_sub(1) };
            self.slept = self.slept.saturating_add(u32::from(self.awake == 0));
            let mode = if due { None } else { self.mode(&t.cpu) };
            let Some(mode) = mode else {
                self.sync(t);
                let most = if due || t.cpu.interrupt_shadow { 1 } else { STRETCH.min(*left) };
                let before = t.core.instructions();
                t.stats.steps += 1;
                let exit = t.core.run(&mut t.cpu, board, most, Some(&t.kicker));
                self.forget_control();
                self.forget_priority();
                *left = left.saturating_sub(if counted { t.core.instructions() - before } else { 0 });
                self.ask_line(board);
                via = Via::Start;
                match exit {
                    Exit::Budget => continue,
                    exit => return exit,
                }
            };
            let mode = match counted {
                false => mode,
                true if *left == 1 => mode.single(),
                true => mode.counted(),
            };
            if mode.is_mirrored() {
                self.map_wanted(t, board, ram);
            }
            let mut found = self.find(t, board, ram, mode, via);
            if let Some(b) = found
                && counted
                && u64::from(self.cache.block(b).insns) > *left
            {
                found = self.find(t, board, ram, mode.single(), Via::Start);
            }
            let Some(b) = found else {
                via = Via::Start;
                if let Some(exit) = self.step(t, board, ram, None, true, counted.then_some(&mut *left)) {
                    return exit;
                }
                continue;
            };
            block.engine_data.set((&raw const self.cache).cast_mut().cast());
            let (next, done) = self.once(t, board, ram, block, b);
            enter::settle(&self.area);
            *left = left.saturating_sub(if counted { u64::from(done) } else { 0 });
            match next {
                Next::Go(how) => via = how,
                Next::Step(_, true, _) if self.take_upper(t) => via = Via::Start,
                Next::Step(id, native, how) => {
                    via = how;
                    if let Some(exit) = self.step(t, board, ram, id, native, counted.then_some(&mut *left)) {
                        return exit;
                    }
                }
                Next::Resume(_) => via = Via::Start,
                Next::Out(exit) => return exit,
            }
        }
        Exit::Budget
    }

    /// One instruction by the interpreter.
    fn step(
        &mut self,
        t: &mut Translator,
        board: Board<'_>,
        ram: &Ram,
        id: Option<u32>,
        native: bool,
        counted: Option<&mut u64>,
    ) -> Option<Exit> {
        if native {
            self.sync(t);
        }
        t.stats.steps += 1;
        let (before, instructions) = (ram.code_epoch(), t.core.instructions());
        let exit = match id {
            Some(id) => self.call(t, board, ram, id),
            None => {
                self.forget_control();
                t.core.run(&mut t.cpu, board, 1, None)
            }
        };
        self.follow_priority(&t.cpu, board, id);
        self.ask_line(board);
        if let Some((gpa, len)) = self.store.take()
            && ram.code_epoch() == before.wrapping_add(1)
            && self.epoch == before
        {
            if self.cache.wrote(ram, gpa, len) {
                ram.unwatch_code(gpa);
            }
            self.epoch = ram.code_epoch();
        }
        if let Some(left) = counted {
            // A repetition that is not done yet does not count.
            *left -= (t.core.instructions() - instructions).min(*left);
        }
        if exit != Exit::Budget {
            self.sync(t);
            return Some(exit);
        }
        None
    }

    /// Into the code at block `b` and out again, with all misses of the TLB in between: what to do next, and how many instructions of
    /// a counted block were done.
    fn once(&mut self, t: &mut Translator, board: Board<'_>, ram: &Ram, block: &ThreadBlock, b: u32) -> (Next, u16) {
        let counted = self.cache.block(b).mode.is_counted();
        let entries = self.cache.block(b).entries;
        let mut host = self.cache.host(entries.both());
        self.load(&t.cpu);
        let mode = self.cache.block(b).mode;
        self.sleep(mode);
        self.load_resident(&t.cpu, mode);
        if self.watches != ram.watches() {
            self.watches = ram.watches();
            self.tlb.clear(&self.area);
            self.clear_mirror();
        }
        t.stats.entries += 1;
        let mut resumed = None;
        loop {
            t.watch.back();
            let id = enter::run(host, &mut |id| self.device(t, board, ram, block, id));
            t.watch.out(|| self.class(id));
            if id == ABORTED {
                if resumed == Some(FAULT) {
                    let pc = block.scratch[slot::PC].get();
                    let done = self.cache.point(pc).map_or(0, |(_, point)| point.done);
                    return (self.again(t, board, pc), done);
                }
                if let Some(exit) = resumed {
                    let exit = *self.cache.exit(exit);
                    t.cpu.rip = exit.rip;
                    self.mend(&mut t.cpu, board, exit.spilled, exit.flags, exit.told);
                    return (Next::Go(Via::Start), exit.done);
                }
                return (Next::Go(Via::Start), 0);
            }
            if id == KICKED {
                let to = self.cache.fast_target(self.area.get(at::TARGET)).expect("fast tables lead to ways in");
                t.cpu.rip = to;
                let resident = Mode::of(&t.cpu, 0).map_or(0, Mode::resident);
                self.mend(&mut t.cpu, board, resident, Flags::Host, None);
                return (Next::Go(Via::Start), 0);
            }
            if !counted && let Some(next) = self.quick(t, board, ram, block, id) {
                match next {
                    Next::Resume(at) => (host, resumed) = (at, None),
                    next => return (next, 0),
                }
                continue;
            }
            if let Some(at) = self.known_way(t, board, block, id) {
                (host, resumed) = (at, Some(id));
                continue;
            }
            resumed = Some(id);
            let (next, done) = self.left(t, board, ram, id);
            match next {
                Next::Resume(at) => host = at,
                Next::Step(Some(id), false, via) if !counted && self.store.is_none() => {
                    match self.call_out(t, board, ram, block, id, via) {
                        Next::Resume(at) => (host, resumed) = (at, None),
                        next => return (next, done),
                    }
                }
                next => return (next, done),
            }
        }
    }

    /// What an exit is counted as where costs are measured.
    fn class(&self, id: u32) -> &'static str {
        match id {
            FAULT => "exception in translated code",
            ABORTED | KICKED => "event taken",
            _ => match self.cache.exit(id).kind {
                Kind::To | Kind::Indirect => "block looked up or translated",
                Kind::Look | Kind::Shadow => "event looked for",
                Kind::Step | Kind::Asleep | Kind::Port { .. } | Kind::Invalidate { .. } => "call-out",
                Kind::Miss { .. } => "TLB miss",
            },
        }
    }

    fn left(&mut self, t: &mut Translator, board: Board<'_>, ram: &Ram, id: u32) -> (Next, u16) {
        if id == FAULT {
            let pc = ThreadBlock::current().scratch[slot::PC].get();
            let (block, point) = self.cache.point(pc).expect("the host faults only where it may");
            let (rip, point) = (block.rip.wrapping_add(u64::from(point.at)), *point);
            if let Some(access) = point.access
                && let Some(next) = self.fill_mirror(t, board, ram, pc, &access)
            {
                let done = if matches!(next, Next::Resume(_)) { 0 } else { point.done };
                return (next, done);
            }
            t.cpu.rip = rip;
            self.mend(&mut t.cpu, board, point.spilled, point.flags, point.told);
            t.stats.faults += 1;
            if let Some(access) = point.access {
                self.store_carefully(t, board, &access);
            }
            if point.divides {
                self.cache.divided(pc);
            }
            return (Next::Step(None, true, Via::Start), point.done);
        }
        let exit = *self.cache.exit(id);
        let mut faults = false;
        if let Kind::Miss { access, low, len, write, alone, retry } = exit.kind {
            t.stats.tlb_misses += 1;
            let range = GuestAccess { disp: low, write, ..access };
            let filled = self.fill(t, board, ram, &range, len);
            if let Filled::Fault(fault) = filled {
                faults = true;
                self.fault = alone.then_some(fault);
            }
            if filled == Filled::Yes {
                if !self.is_overtaken(t, exit.block) {
                    return (Next::Resume(self.cache.host(retry)), 0);
                }
                t.cpu.rip = exit.rip;
                self.mend(&mut t.cpu, board, exit.spilled, exit.flags, exit.told);
                return (Next::Go(Via::Start), exit.done);
            }
            // Asked for too much at once: not again.
            let apart = self.address(&t.cpu, &range) % PAGE_SIZE + u64::from(len) > PAGE_SIZE;
            if apart && len != u16::from(access.len) || write != access.write {
                self.cache.learn(id, apart);
            }
        }
        t.cpu.rip = exit.rip;
        self.mend(&mut t.cpu, board, exit.spilled, exit.flags, exit.told);
        let next = match exit.kind {
            Kind::To => {
                t.stats.to_block += 1;
                Next::Go(if self.cache.is_landing(id) { Via::Indirect } else { Via::Link(id) })
            }
            Kind::Port { port, width, write, .. } => {
                if self.area.get(at::CALLED) == 0 {
                    let port = port.unwrap_or(t.cpu.gpr[Gpr::Rdx as usize] as u16);
                    self.access_port(t, board, port, width, write);
                }
                Next::Go(Via::Start)
            }
            Kind::Invalidate { .. } => {
                if self.area.get(at::CALLED) == 0 {
                    self.invalidate(t, ram, exit.block);
                }
                Next::Go(Via::Start)
            }
            Kind::Look => Next::Go(Via::Start),
            Kind::Shadow => {
                t.cpu.interrupt_shadow = true;
                Next::Go(Via::Start)
            }
            Kind::Asleep if self.wake(&t.cpu) => Next::Go(Via::Start),
            Kind::Step | Kind::Asleep => Next::Step(Some(id), exit.native, Via::Call(id)),
            Kind::Indirect => {
                t.stats.misses += 1;
                Next::Step(Some(id), false, Via::Indirect)
            }
            Kind::Miss { access, .. } => {
                if !faults {
                    self.store_carefully(t, board, &access);
                }
                Next::Step(Some(id), exit.native, Via::Call(id))
            }
        };
        (next, exit.done)
    }
}

impl Translator {
    /// How often a machine's guest called the interpreter, by instruction; steps in what is not translated are not among them.
    pub fn called(&self) -> BTreeMap<Code, u64> {
        self.system.as_ref().map(|s| s.called()).unwrap_or_default()
    }

    /// What became of a machine's code; none has run: `None`. Bytes and time are not counted there.
    pub fn machine_cache(&self) -> Option<crate::CacheStats> {
        let c = self.system.as_ref()?.counts();
        let (blocks, insns, stale, flushes, links) = (c.blocks, c.insns, c.stale, c.flushes, c.links);
        Some(crate::CacheStats { blocks, insns, stale, flushes, links, ..Default::default() })
    }

    /// Runs at most `budget` instructions on guest RAM.
    pub(crate) fn run_system(&mut self, board: Board<'_>, ram: &Ram, budget: u64) -> Exit {
        let mut system = match self.system.take() {
            Some(s) => s,
            None => match System::new(self) {
                Ok(s) => Box::new(s),
                // Without executable memory everything is interpreted.
                Err(_) => {
                    let before = self.core.instructions();
                    let exit = self.core.run(&mut self.cpu, board, budget, Some(&self.kicker));
                    self.counted = Some(self.counted.unwrap_or(0) + self.core.instructions() - before);
                    return exit;
                }
            },
        };
        let block = system.attach(self);
        let mut left = budget;
        let exit = system.dispatch(self, board, ram, block, &mut left);
        self.watch.back();
        if budget != u64::MAX {
            self.counted = Some(self.counted.unwrap_or(0) + (budget - left));
        }
        system.sync(self);
        self.stats.walks += system.area.take(at::WALKED);
        self.stats.tlb_hits += system.area.take(at::HITS);
        block.scratch[slot::CACHE_START].set(0);
        block.scratch[slot::CACHE_END].set(0);
        self.kicker.left();
        system.area.unmap();
        self.system = Some(system);
        exit
    }
}
