//! The reference of lockstep: the interpreter over copies of a process's pages, behind page tables with the rights of its mappings.
//!
//! A page is copied when it is touched first; what is written stays in the copy. The accessed bits of the page tables tell which pages
//! a stretch has touched.

use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, Fault};
use bivisor_emulator::interp::{Core, Env};
use bivisor_emulator::isa::Width;
use bivisor_emulator::mem::{FlatSpace, GuestMemory, PAGE_SIZE, Prot, Ram};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts};
use std::collections::HashMap;
use std::sync::Arc;

/// Memory for copies and page tables; host memory is taken as it is touched.
const SIZE: u64 = 64 << 20;
/// Copies that are kept from stretch to stretch.
const KEPT: usize = 48;
const PAGE: usize = PAGE_SIZE as usize;
const ROOT: u64 = 0;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Why the next instruction is left to the engine that runs for real.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apart {
    /// It reads the clock, or the kernel's page with the clock.
    Clock,
    /// It reads random numbers.
    Random,
    /// It reads or writes a shared mapping, which others may write.
    Shared,
    /// It touches more pages than there is room for copies.
    Large,
}

/// Why the reference stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The stretch is over.
    End,
    /// As an engine stops, at RIP.
    Exit(Exit),
    /// The instruction at RIP is not done here; true: a part of it was.
    Apart(Apart, bool),
}

/// A page that the stretch touched.
#[derive(Clone, Debug)]
pub struct Touched {
    /// Its address.
    pub addr: u64,
    /// Rights of its mapping.
    pub prot: Prot,
    /// It may have been written.
    pub written: bool,
    gpa: u64,
}

/// The reference.
pub struct Reference {
    core: Core,
    /// Its registers.
    pub cpu: Box<CpuState>,
    mem: GuestMemory,
    /// By page: the entry of its page table, and its copy.
    copies: HashMap<u64, (u64, u64)>,
    next: u64,
    /// Pages that are mapped.
    active: Vec<(u64, Prot)>,
    /// RIP after each instruction of the stretch.
    pub trace: Vec<u64>,
}

impl Reference {
    /// Offers `model`.
    ///
    /// # Errors
    /// A sentence: the host has no memory for it.
    pub fn new(model: Arc<CpuModel>) -> Result<Reference, String> {
        let ram = Ram::new(SIZE).map_err(|e| format!("no memory for copies of pages: {e}"))?;
        let mut core = Core::new(Env::new(model));
        core.intercepts = Intercepts::all();
        Ok(Reference {
            core,
            cpu: Box::new(CpuState::reset()),
            mem: GuestMemory::Ram(ram),
            copies: HashMap::new(),
            next: PAGE_SIZE,
            active: Vec::new(),
            trace: Vec::new(),
        })
    }

    /// The same interceptions as the tested engine's, and those of what differs from run to run.
    pub fn set_intercepts(&mut self, intercepts: Intercepts) {
        self.core.intercepts = intercepts | Intercepts::RDTSC | Intercepts::RDRAND | Intercepts::EXCEPTIONS;
    }

    /// What was copied may have changed: all is copied anew when it is touched.
    pub fn forget(&mut self) {
        for (page, _) in std::mem::take(&mut self.active) {
            if let Some((slot, _)) = self.copies.get(&page) {
                self.mem.store(*slot, Width::Q, 0);
            }
        }
        if self.next > SIZE / 2 {
            self.copies.clear();
            self.next = PAGE_SIZE;
            let _ = self.mem.write(ROOT, &[0; PAGE]);
            self.core.forget();
        }
    }

    /// Runs a stretch from `start`: at most `most` instructions, up to one that does not go on behind itself.
    pub fn run(&mut self, flat: &FlatSpace, start: &CpuState, most: usize) -> Stop {
        if self.active.len() > KEPT {
            self.forget();
        }
        for (page, _) in &self.active {
            if let Some((slot, _)) = self.copies.get(page) {
                let entry = self.mem.load(*slot, Width::Q).unwrap_or(0);
                self.mem.store(*slot, Width::Q, entry & !(ACCESSED | DIRTY));
            }
        }
        self.core.mmu.flush();
        (*self.cpu).clone_from(start);
        self.cpu.cr3 = ROOT;
        self.trace.clear();
        while self.trace.len() < most {
            let (rip, before) = (self.cpu.rip, self.core.instructions());
            let gpr = self.cpu.gpr;
            let stop = loop {
                let exit = self.core.run(&mut self.cpu, Board { mem: &self.mem, bus: &EmptyBus }, 1, None);
                match exit {
                    Exit::Budget if self.core.instructions() > before => break None,
                    // A long repetition goes on.
                    Exit::Budget => {}
                    Exit::Exception(Fault::Pf { addr, code }) => match self.supply(flat, addr, code) {
                        Ok(true) => {}
                        Ok(false) => break Some(Stop::Exit(exit)),
                        Err(why) => break Some(Stop::Apart(why, self.cpu.gpr != gpr)),
                    },
                    Exit::Intercept { what: Intercepts::RDTSC, .. } => break Some(Stop::Apart(Apart::Clock, false)),
                    Exit::Intercept { what: Intercepts::RDRAND, .. } => break Some(Stop::Apart(Apart::Random, false)),
                    exit => break Some(Stop::Exit(exit)),
                }
            };
            if let Some(stop) = stop {
                return stop;
            }
            self.trace.push(self.cpu.rip);
            if !(1..=15).contains(&self.cpu.rip.wrapping_sub(rip)) {
                break;
            }
        }
        Stop::End
    }

    /// A page fault at `addr`: the page is copied if it is only not here yet. False: the fault is the program's.
    fn supply(&mut self, flat: &FlatSpace, addr: u64, code: u16) -> Result<bool, Apart> {
        const BY_WRITE: u16 = 2;
        const BY_FETCH: u16 = 16;
        let page = addr & !(PAGE_SIZE - 1);
        if self.active.iter().any(|(p, _)| *p == page) {
            return Ok(false);
        }
        let Some(vma) = flat.find(page) else { return Ok(false) };
        let wanted = match code {
            c if c & BY_WRITE != 0 => vma.prot.contains(Prot::WRITE),
            c if c & BY_FETCH != 0 => vma.prot.contains(Prot::EXEC),
            _ => !vma.prot.is_empty(),
        };
        if !wanted {
            return Ok(false);
        }
        if vma.name.starts_with("[vvar") {
            return Err(Apart::Clock);
        }
        if vma.shared && vma.prot.contains(Prot::WRITE) {
            return Err(Apart::Shared);
        }
        let mut bytes = [0; PAGE];
        if flat.read(page, &mut bytes).is_none() {
            // Behind the end of its file.
            return Ok(false);
        }
        let (slot, gpa) = match self.copies.get(&page) {
            Some(known) => *known,
            None => {
                let made = (self.slot(page)?, self.allocate()?);
                self.copies.insert(page, made);
                made
            }
        };
        let mut old = [0; PAGE];
        let _ = self.mem.read(gpa, &mut old);
        if old != bytes {
            let _ = self.mem.write(gpa, &bytes);
        }
        let write = if vma.prot.contains(Prot::WRITE) { WRITE } else { 0 };
        let no_execute = if vma.prot.contains(Prot::EXEC) { 0 } else { NO_EXECUTE };
        self.mem.store(slot, Width::Q, gpa | PRESENT | USER | write | no_execute);
        self.active.push((page, vma.prot));
        Ok(true)
    }

    fn allocate(&mut self) -> Result<u64, Apart> {
        let at = self.next;
        self.mem.write(at, &[0; PAGE]).ok_or(Apart::Large)?;
        self.next += PAGE_SIZE;
        Ok(at)
    }

    /// The guest-physical address of the page-table entry of a page.
    fn slot(&mut self, page: u64) -> Result<u64, Apart> {
        let mut table = ROOT;
        for level in [39, 30, 21] {
            let slot = table + (page >> level & 511) * 8;
            let entry = self.mem.load(slot, Width::Q).ok_or(Apart::Large)?;
            table = if entry & PRESENT == 0 {
                let made = self.allocate()?;
                self.mem.store(slot, Width::Q, made | PRESENT | WRITE | USER);
                made
            } else {
                entry & ADDRESS
            };
        }
        Ok(table + (page >> 12 & 511) * 8)
    }

    /// The pages that the last stretch touched.
    pub fn touched(&self) -> Vec<Touched> {
        let mut out = Vec::with_capacity(8);
        for &(addr, prot) in &self.active {
            let Some(&(slot, gpa)) = self.copies.get(&addr) else { continue };
            let entry = self.mem.load(slot, Width::Q).unwrap_or(0);
            if entry & ACCESSED != 0 {
                out.push(Touched { addr, prot, written: entry & DIRTY != 0, gpa });
            }
        }
        out
    }

    /// The copy of a touched page.
    pub fn copy(&self, page: &Touched, to: &mut [u8; PAGE]) {
        let _ = self.mem.read(page.gpa, to);
    }
}
