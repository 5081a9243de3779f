//! The translator in the checked memory model: guest RAM behind page tables, any privilege level of 64-bit mode.
//!
//! Blocks are found by linear address, so everything is thrown away when the mapping changes ([`Mmu::generation`]); rights differ by CPL,
//! so user and kernel code have caches of their own. Interrupts are looked at whenever the code is left; whoever raises one from another
//! thread kicks.

use crate::block::CodeSource;
use crate::cache::{Cache, DEFAULT_SIZE, Entry, Member, Via};
use crate::emit::slot;
use crate::enter::{self, MISS};
use crate::lower::Leave;
use crate::lower::stack::HOST_FLAGS;
use crate::route::Setting;
use crate::run::{Act, Translator};
use crate::tlb::{self, Tlb};
use bivisor_emulator::cpu::state::xsave_components;
use bivisor_emulator::cpu::{Activity, CpuState, Cr0, Cr4, Mode, Rflags};
use bivisor_emulator::host::thread::ThreadBlock;
use bivisor_emulator::isa::{Gpr, Seg, Width};
use bivisor_emulator::mem::{Access, By, GuestMemory, Mmu, PAGE_SIZE, Ram};
use bivisor_emulator::vcpu::{Board, Exit};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What the checked model keeps from run to run.
#[derive(Default)]
pub struct Checked {
    caches: HashMap<Setting, (Arc<Cache>, Arc<Member>)>,
    current: Option<Setting>,
    tlb: Tlb,
    /// CPL and RFLAGS.AC with which the TLB was filled.
    rights: (u8, bool),
    mapping: u64,
    epoch: u64,
    /// Linear and physical page of each page with code, and its generation.
    pages: Vec<(u64, u64, u64)>,
    memory: u64,
}

/// Guest code behind the page tables.
struct Paged<'a> {
    mmu: &'a mut Mmu,
    cpu: &'a CpuState,
    mem: &'a GuestMemory,
    ram: &'a Ram,
    pages: &'a mut Vec<(u64, u64, u64)>,
    opened: (u64, u64),
    any: bool,
}

fn by(cpu: &CpuState) -> By {
    if cpu.cpl() == 3 { By::User } else { By::Supervisor }
}

impl CodeSource for Paged<'_> {
    fn open(&mut self, at: u64) -> bool {
        let (by, page) = (by(self.cpu), at & !(PAGE_SIZE - 1));
        let Ok(gpa) = self.mmu.translate(self.cpu, self.mem, page, Access::Execute, by) else { return false };
        if gpa >= self.ram.size() {
            return false;
        }
        self.ram.watch_code(gpa);
        self.any = true;
        self.opened = (page, gpa);
        if !self.pages.iter().any(|p| (p.0, p.1) == (page, gpa)) {
            self.pages.push((page, gpa, self.ram.code_generation(gpa)));
        }
        true
    }

    fn read(&mut self, at: u64, to: &mut [u8]) -> bool {
        self.ram.read(self.opened.1 + at.wrapping_sub(self.opened.0), to).is_some()
    }

    fn epoch(&self) -> u64 {
        self.ram.code_epoch()
    }
}

impl Translator {
    /// The kind of code the guest, as it is, can run; `None` if the interpreter must.
    fn setting(&self, single: bool) -> Option<Setting> {
        const NEVER: Rflags = Rflags::TF.union(Rflags::RF).union(Rflags::VM);
        let s = &*self.cpu;
        let fs = s.seg[Seg::Fs as usize].base;
        let canonical = |a: u64| ((a << 16) as i64 >> 16) as u64 == a;
        let plain = s.activity == Activity::Active
            && s.mode() == Mode::Long64
            && !s.rflags.intersects(NEVER)
            && !s.interrupt_shadow
            && s.dr7 & 0xff == 0
            && canonical(fs)
            && canonical(s.rip)
            && s.xsave.mxcsr() & !0xffff == 0
            && !(s.cr0.contains(Cr0::AM) && s.rflags.contains(Rflags::AC) && s.cpl() == 3)
            && matches!(s.cpl(), 0 | 3)
            && std::is_x86_feature_detected!("xsave");
        const NATIVE: Cr4 = Cr4::OSFXSR.union(Cr4::OSXMMEXCPT).union(Cr4::OSXSAVE);
        let native = !s.cr0.intersects(Cr0::TS | Cr0::EM)
            && s.cr0.contains(Cr0::NE)
            && s.cr4.contains(NATIVE)
            && s.xcr0 == xsave_components();
        plain.then(|| Setting::Checked { kernel: s.cpl() == 0, native, single })
    }

    /// Throws away what the guest's changes of mappings and code have made wrong.
    fn look_around(&mut self, board: Board<'_>, ram: &Ram) {
        let c = &mut self.checked;
        if c.memory != board.mem.id() || c.mapping != self.core.mmu.generation() {
            c.memory = board.mem.id();
            c.mapping = self.core.mmu.generation();
            for (cache, _) in c.caches.values() {
                cache.flush(cache.flushes());
            }
            c.pages.clear();
            c.tlb.clear();
            c.epoch = ram.code_epoch();
        }
        if c.epoch != ram.code_epoch() {
            c.epoch = ram.code_epoch();
            c.pages.retain(|&(linear, gpa, generation)| {
                let same = ram.code_generation(gpa) == generation;
                if !same {
                    for (cache, _) in c.caches.values() {
                        cache.stale(linear);
                    }
                }
                same
            });
        }
        let rights = (self.cpu.cpl(), self.cpu.rflags.contains(Rflags::AC));
        if c.rights != rights {
            c.rights = rights;
            c.tlb.clear();
        }
    }

    /// Makes the cache of this setting the current one. False if the host has no memory for it.
    fn take_cache(&mut self, setting: Setting) -> bool {
        if self.checked.current == Some(setting) {
            return true;
        }
        if !self.checked.caches.contains_key(&setting) {
            let size = if matches!(setting, Setting::Checked { single: true, .. }) { 4 << 20 } else { DEFAULT_SIZE };
            let (model, policy) = (self.cache.model().clone(), self.cache.policy());
            let Ok(cache) = Cache::for_setting(model, policy, size, setting) else { return false };
            let member = Arc::new(Member::default());
            cache.join(&member);
            self.checked.caches.insert(setting, (cache, member));
        }
        let (cache, member) = &self.checked.caches[&setting];
        (self.cache, self.member) = (cache.clone(), member.clone());
        self.version = 0;
        self.checked.current = Some(setting);
        true
    }

    /// Runs at most `budget` instructions.
    pub(crate) fn run_checked(&mut self, board: Board<'_>, ram: &Ram, budget: u64) -> Exit {
        let home = (self.cache.clone(), self.member.clone());
        let exit = self.dispatch_checked(board, ram, budget);
        // Another run may be of a process.
        (self.cache, self.member) = home;
        self.version = 0;
        self.checked.current = None;
        let block = ThreadBlock::current();
        block.scratch[slot::CACHE_START].set(0);
        block.scratch[slot::CACHE_END].set(0);
        self.kicker.left();
        exit
    }

    fn dispatch_checked(&mut self, board: Board<'_>, ram: &Ram, budget: u64) -> Exit {
        let single = budget != u64::MAX;
        let mut left = budget;
        let mut via = Via::Start;
        // Pages may be tracked anew since the last run.
        self.checked.tlb.clear();
        while left > 0 {
            if self.kicker.requested() && self.kicker.take() {
                return Exit::Kicked;
            }
            self.look_around(board, ram);
            let due = self.cpu.rflags.contains(Rflags::IF) && board.bus.interrupt_pending();
            let setting = if due { None } else { self.setting(single) };
            let entry = match setting {
                Some(setting) if self.take_cache(setting) => self.find_checked(board, ram, via),
                _ => None,
            };
            via = Via::Start;
            let Some(entry) = entry else {
                self.stats.steps += 1;
                match self.core.run(&mut self.cpu, board, 1, Some(&self.kicker)) {
                    Exit::Budget => left -= u64::from(single),
                    exit => return exit,
                }
                continue;
            };
            let block = self.prepare(board);
            let (exit, done) = self.once(board, ram, block, entry, &mut via, single);
            if let Some(exit) = exit {
                return exit;
            }
            left -= u64::from(single && done);
        }
        Exit::Budget
    }

    fn find_checked(&mut self, board: Board<'_>, ram: &Ram, via: Via) -> Option<Entry> {
        let rip = self.cpu.rip;
        let mut source = Paged {
            mmu: &mut self.core.mmu,
            cpu: &self.cpu,
            mem: board.mem,
            ram,
            pages: &mut self.checked.pages,
            opened: (0, 0),
            any: false,
        };
        let entry = self.cache.resolve(&mut source, rip, via, &mut self.scratch);
        if source.any {
            // Stores to that page need care from now on.
            self.checked.tlb.clear();
        }
        entry
    }

    /// In and out of the code once: why to return, and whether an instruction was completed (meant for single ones).
    fn once(
        &mut self,
        board: Board<'_>,
        ram: &Ram,
        block: &ThreadBlock,
        entry: Entry,
        via: &mut Via,
        single: bool,
    ) -> (Option<Exit>, bool) {
        let slots = &block.scratch;
        let own = self.cpu.rflags - HOST_FLAGS;
        slots[slot::VIRTUAL_FLAGS].set(own.bits());
        slots[slot::VIRTUAL_FLAGS_CLEARED].set((own - Rflags::IF).bits());
        slots[slot::TLB].set(self.checked.tlb.address());
        slots[slot::MISS_KIND].set(0);
        self.cpu.rflags = (self.cpu.rflags & HOST_FLAGS) | Rflags::FIXED;
        if !self.cache.go_in(&self.member, entry) {
            self.cpu.rflags |= own;
            std::thread::yield_now();
            return (None, false);
        }
        let below = self.cpu.gpr[Gpr::Rsp as usize].wrapping_sub(8);
        let pushed = if single {
            self.linear(board, ram, below, Access::Read).and_then(|at| ram.load(at, Width::Q))
        } else {
            None
        };
        self.stats.entries += 1;
        let exit = enter::run(block, &mut self.cpu, entry.host);
        let next = self.left(block, exit, via);
        self.member.active.store(false, Ordering::Release);
        let own = Rflags::from_bits_retain(slots[slot::VIRTUAL_FLAGS].get());
        self.cpu.rflags = (self.cpu.rflags & HOST_FLAGS) | own;
        let kind = slots[slot::MISS_KIND].replace(0);
        if kind != 0 && matches!(next, Some(Act::Step)) {
            self.stats.tlb_misses += 1;
            if self.fill(board, ram, slots[slot::MISS_ADDRESS].get(), kind) {
                return (None, false);
            }
        }
        let transfer = exit == MISS || exit < MISS && matches!(self.cache.leave(exit), Leave::To(_));
        match next {
            None => (None, transfer),
            Some(Act::Step) => match self.core.run(&mut self.cpu, board, 1, None) {
                Exit::Budget => (None, true),
                exit => (Some(exit), false),
            },
            Some(Act::Undo(rip)) => {
                self.undo_checked(board, ram, rip);
                if let (Some(old), Some(at)) = (pushed, self.linear(board, ram, below, Access::Write)) {
                    ram.store(at, Width::Q, old);
                }
                let exit = self.core.run(&mut self.cpu, board, 1, None);
                ((exit != Exit::Budget).then_some(exit), true)
            }
            Some(act) => (self.act(board, act), false),
        }
    }

    /// The place in RAM of eight bytes at a linear address, if they are in one page and may be accessed so.
    fn linear(&mut self, board: Board<'_>, ram: &Ram, laddr: u64, access: Access) -> Option<u64> {
        let inside = laddr % PAGE_SIZE <= PAGE_SIZE - 8;
        let gpa = self.core.mmu.translate(&self.cpu, board.mem, laddr, access, by(&self.cpu)).ok()?;
        (inside && gpa < ram.size()).then_some(gpa)
    }

    /// Takes an indirect branch back whose target is no canonical address: the fault is the branch's own.
    fn undo_checked(&mut self, board: Board<'_>, ram: &Ram, rip: u64) {
        let mut source = Paged {
            mmu: &mut self.core.mmu,
            cpu: &self.cpu,
            mem: board.mem,
            ram,
            pages: &mut self.checked.pages,
            opened: (0, 0),
            any: false,
        };
        let moved = match self.scratch.decode(&mut source, rip, self.cache.routes(), 1) {
            true => i64::from(self.scratch.block.items[0].iced.stack_pointer_increment()),
            false => 0,
        };
        self.cpu.rip = rip;
        let sp = &mut self.cpu.gpr[Gpr::Rsp as usize];
        *sp = sp.wrapping_sub(moved as u64);
    }

    /// Enters the page of an access that missed. False: the interpreter does the instruction.
    fn fill(&mut self, board: Board<'_>, ram: &Ram, laddr: u64, kind: u64) -> bool {
        let (len, write) = tlb::of_kind(kind);
        let canonical = ((laddr << 16) as i64 >> 16) as u64 == laddr;
        if !canonical || laddr % PAGE_SIZE + len > PAGE_SIZE {
            return false;
        }
        let access = if write { Access::Write } else { Access::Read };
        let by = by(&self.cpu);
        match self.core.mmu.translate(&self.cpu, board.mem, laddr, access, by) {
            Ok(gpa) => self.checked.tlb.fill(ram, laddr, gpa, write),
            Err(_) => false,
        }
    }
}
