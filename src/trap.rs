//! Trap-and-emulate without hardware's help, to see why it fails: kernel code of the guest runs at CPL 3 on the host, what traps is done
//! by one step of the interpreter, and the sensitive instructions that do not trap go wrong.
//!
//! The guest's linear addresses are mapped in a [`Vessel`] page by page as they fault (a shadow of the guest's page tables, thrown away
//! when the guest flushes its TLB): hidden faults; faults that the guest's own tables ask for are true ones. Not for real work.

use crate::guest::reason_of;
use crate::vessel::{LOWEST, Registers, STUB, Stop, Vessel};
use anyhow::Result;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, Mode, Rflags};
use bivisor_emulator::interp::{Core, Env};
use bivisor_emulator::isa::{Class, Gpr, Seg, decode, facts};
use bivisor_emulator::mem::paging::{allowed, peek, walk};
use bivisor_emulator::mem::{Access, By, GuestMemory, PAGE_SIZE};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Kicker, Vcpu};
use iced_x86::Instruction;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// SI_KERNEL: a signal for an exception that is no page fault.
const SI_KERNEL: i32 = 0x80;
/// Linux's selectors for 64-bit users.
const USER_CS: u64 = 0x33;
const USER_SS: u64 = 0x2b;
/// Flags that user code may have as it likes.
const FREE: Rflags = Rflags::STATUS.union(Rflags::DF).union(Rflags::AC).union(Rflags::ID);

/// Why the guest was left: Intel's exit reason, if there is one for it, and a name.
pub type Reason = (Option<u16>, String);

/// The engine.
pub struct TrapVcpu {
    cpu: Box<CpuState>,
    core: Core,
    kicker: Kicker,
    vessel: Option<Vessel>,
    /// Pages that are mapped in the vessel, with their protection.
    shadow: HashMap<u64, i32>,
    /// The memory, mapping and privilege level that the shadow is of.
    shadow_of: (u64, u64, u8),
    /// The vessel has the newer x87 and SIMD registers.
    extended_there: bool,
    /// How often, and why, it was left.
    pub ledger: BTreeMap<Reason, u64>,
}

/// What to do after a stop.
enum Next {
    /// Go on natively.
    Resume,
    /// The instruction at RIP is to be emulated.
    Emulate,
    /// Look around.
    Tick,
}

impl TrapVcpu {
    /// Offers `model`, though CPUID does not trap and shows the host's.
    pub fn new(model: Arc<CpuModel>) -> TrapVcpu {
        TrapVcpu {
            cpu: Box::new(CpuState::reset()),
            core: Core::new(Env::new(model)),
            kicker: Kicker::default(),
            vessel: None,
            shadow: HashMap::new(),
            shadow_of: (0, 0, 0),
            extended_there: false,
            ledger: BTreeMap::new(),
        }
    }

    fn count(&mut self, reason: Option<u16>, name: impl Into<String>) {
        *self.ledger.entry((reason, name.into())).or_default() += 1;
    }

    /// Can the host run it? 64-bit code in the lower half, without single-stepping.
    fn runs_natively(&self) -> bool {
        let s = &*self.cpu;
        s.mode() == Mode::Long64
            && (LOWEST..STUB).contains(&s.rip)
            && !s.rflags.contains(Rflags::TF)
            && !s.interrupt_shadow
            && s.activity == bivisor_emulator::cpu::Activity::Active
            && s.dr7 & 0xff == 0
    }

    fn by(&self) -> By {
        if self.cpu.cpl() == 3 { By::User } else { By::Supervisor }
    }

    /// Makes the vessel one that shows the guest's present mapping, if only a bit of it.
    fn prepare(&mut self, mem: &GuestMemory) -> Result<()> {
        if self.vessel.as_ref().is_none_or(|v| !v.is_ours()) {
            // A file that is opened later would not be there.
            self.vessel = None;
            self.vessel = Some(Vessel::new()?);
            self.shadow.clear();
            self.shadow_of = (mem.id(), self.core.mmu.generation(), self.cpu.cpl());
        }
        let now = (mem.id(), self.core.mmu.generation(), self.cpu.cpl());
        if now.0 != self.shadow_of.0 {
            // Another guest: its memory is another file.
            self.vessel = Some(Vessel::new()?);
            self.shadow.clear();
        } else if now != self.shadow_of && !self.shadow.is_empty() {
            self.vessel.as_mut().expect("it was made").unmap_all()?;
            self.shadow.clear();
            self.count(None, "shadow thrown away");
        }
        self.shadow_of = now;
        Ok(())
    }

    fn load(&mut self) -> Result<()> {
        let vessel = self.vessel.as_mut().expect("it was made");
        let c = &*self.cpu;
        let g = |r: Gpr| c.gpr[r as usize];
        let mut r: Registers = vessel.registers()?;
        (r.rax, r.rbx, r.rcx, r.rdx) = (g(Gpr::Rax), g(Gpr::Rbx), g(Gpr::Rcx), g(Gpr::Rdx));
        (r.rsi, r.rdi, r.rbp, r.rsp) = (g(Gpr::Rsi), g(Gpr::Rdi), g(Gpr::Rbp), g(Gpr::Rsp));
        (r.r8, r.r9, r.r10, r.r11) = (g(Gpr::R8), g(Gpr::R9), g(Gpr::R10), g(Gpr::R11));
        (r.r12, r.r13, r.r14, r.r15) = (g(Gpr::R12), g(Gpr::R13), g(Gpr::R14), g(Gpr::R15));
        (r.rip, r.orig_rax) = (c.rip, u64::MAX);
        r.eflags = ((c.rflags & FREE) | Rflags::IF | Rflags::FIXED).bits();
        (r.cs, r.ss, r.ds, r.es, r.fs, r.gs) = (USER_CS, USER_SS, 0, 0, 0, 0);
        r.fs_base = c.seg[Seg::Fs as usize].base;
        r.gs_base = c.seg[Seg::Gs as usize].base;
        vessel.set_registers(&r)?;
        if !self.extended_there {
            let mut image = vessel.extended()?;
            let len = image.len().min(c.xsave.bytes.len());
            // The bytes from 464 on are the kernel's own.
            image[..464].copy_from_slice(&c.xsave.bytes[..464]);
            image[512..len].copy_from_slice(&c.xsave.bytes[512..len]);
            vessel.set_extended(&mut image)?;
            self.extended_there = true;
        }
        Ok(())
    }

    fn store(&mut self) -> Result<()> {
        let r = self.vessel.as_ref().expect("it was made").registers()?;
        let c = &mut *self.cpu;
        c.gpr = [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
            r.r15,
        ];
        c.rip = r.rip;
        c.rflags.replace(FREE, Rflags::from_bits_retain(r.eflags));
        // What code at CPL 3 may change without a trap.
        c.seg[Seg::Fs as usize].base = r.fs_base;
        c.seg[Seg::Gs as usize].base = r.gs_base;
        Ok(())
    }

    /// Takes the extended registers back from the vessel.
    fn fetch_extended(&mut self) {
        if !std::mem::replace(&mut self.extended_there, false) {
            return;
        }
        let Some(Ok(image)) = self.vessel.as_ref().map(Vessel::extended) else { return };
        let len = image.len().min(self.cpu.xsave.bytes.len());
        self.cpu.xsave.bytes[..464].copy_from_slice(&image[..464]);
        self.cpu.xsave.bytes[512..len].copy_from_slice(&image[512..len]);
    }

    /// The instruction at RIP, as far as it can be read.
    fn instruction(&self, mem: &GuestMemory) -> Option<Instruction> {
        let rip = self.cpu.rip;
        let mut bytes = Vec::new();
        for at in rip..rip.wrapping_add(15) {
            let Some(page) = peek(&self.cpu, mem, at) else { break };
            let mut byte = [0];
            if mem.read(page.gpa | at & (PAGE_SIZE - 1), &mut byte).is_none() {
                break;
            }
            bytes.push(byte[0]);
        }
        decode(&bytes, self.cpu.mode().bitness()).ok().map(|i| i.iced)
    }

    /// A page fault: hidden, if the guest's tables allow more at that page than is mapped.
    fn page_fault(&mut self, mem: &GuestMemory, address: u64) -> Result<Next> {
        let page = address & !(PAGE_SIZE - 1);
        let Some(ram) = mem.ram() else { return Ok(Next::Emulate) };
        let (by, known) = (self.by(), self.shadow.get(&page).copied());
        let found = [Access::Read, Access::Execute].iter().find_map(|a| walk(&self.cpu, mem, page, *a, by).ok());
        let Some(found) = found else { return Ok(self.true_fault()) };
        if found.gpa >= ram.size() || !(LOWEST..STUB).contains(&page) {
            return Ok(Next::Emulate);
        }
        let mut wanted = libc::PROT_READ;
        if allowed(&self.cpu, &found, Access::Execute, by) {
            wanted |= libc::PROT_EXEC;
        }
        // Writable only when the guest's dirty flag is set; the second fault at a page must be a write.
        let second = known.is_some_and(|k| k & libc::PROT_WRITE == 0);
        if allowed(&self.cpu, &found, Access::Write, by)
            && (found.dirty || second && walk(&self.cpu, mem, page, Access::Write, by).is_ok())
        {
            wanted |= libc::PROT_WRITE;
        }
        if known == Some(wanted) {
            return Ok(self.true_fault());
        }
        let file = ram.file().expect("looked at before");
        let mapped = self.vessel.as_mut().expect("it was made").map_file(page, PAGE_SIZE, wanted, file, found.gpa);
        if mapped.is_err() {
            // The host keeps that address for itself.
            return Ok(Next::Emulate);
        }
        self.shadow.insert(page, wanted);
        self.count(Some(48), "hidden page fault");
        Ok(Next::Resume)
    }

    fn true_fault(&mut self) -> Next {
        self.count(Some(0), "true page fault");
        Next::Emulate
    }

    fn stopped(&mut self, mem: &GuestMemory, stop: Stop) -> Result<Next> {
        if stop.syscall {
            // RIP is past SYSCALL or INT 80h, and RAX holds an error.
            let r = self.vessel.as_ref().expect("it was made").registers()?;
            self.cpu.gpr[Gpr::Rax as usize] = r.orig_rax;
            self.cpu.rip = self.cpu.rip.wrapping_sub(2);
            return Ok(Next::Emulate);
        }
        match stop.signal {
            libc::SIGALRM => return Ok(Next::Tick),
            libc::SIGSEGV if stop.code != SI_KERNEL => return self.page_fault(mem, stop.address),
            // INT3 and INT1 are traps: RIP is past them.
            libc::SIGTRAP => self.cpu.rip = self.cpu.rip.wrapping_sub(1),
            libc::SIGSEGV | libc::SIGILL | libc::SIGFPE | libc::SIGBUS => {}
            _ => return Ok(Next::Resume),
        }
        Ok(Next::Emulate)
    }

    /// Tells the memory's watchers which pages the guest may have written.
    fn tell_writes(&self, mem: &GuestMemory) {
        let Some(ram) = mem.ram().filter(|r| r.is_watched()) else { return };
        for page in self.shadow.iter().filter(|(_, p)| **p & libc::PROT_WRITE != 0).map(|(page, _)| *page) {
            if let Some(found) = peek(&self.cpu, mem, page).filter(|f| f.gpa < ram.size()) {
                ram.wrote(found.gpa);
            }
        }
    }

    /// One instruction by the interpreter.
    fn emulate(&mut self, board: Board<'_>, trapped: bool) -> Exit {
        let iced = self.instruction(board.mem);
        if let (Some(i), true) = (iced, trapped) {
            let (reason, name) = reason_of(i.code());
            self.count(reason, name);
        }
        if iced.is_none_or(|i| facts(i.code()).class == Class::Native) {
            self.fetch_extended();
        }
        if let Some(ram) = board.mem.ram()
            && let Some(page) = peek(&self.cpu, board.mem, self.cpu.rip)
            && page.gpa < ram.size()
        {
            // The guest may have written its code without our knowing.
            ram.wrote(page.gpa);
        }
        self.core.run(&mut self.cpu, board, 1, Some(&self.kicker))
    }

    /// Natively until something stops it. `None`: look around and go on.
    fn natively(&mut self, board: Board<'_>) -> Result<Option<Exit>> {
        self.prepare(board.mem)?;
        self.load()?;
        loop {
            let stop = self.vessel.as_mut().expect("it was made").run(false)?;
            self.store()?;
            match self.stopped(board.mem, stop)? {
                // The registers are where they were.
                Next::Resume => {}
                Next::Tick => return Ok(None),
                Next::Emulate => {
                    let exit = self.emulate(board, stop.signal != libc::SIGSEGV || stop.code == SI_KERNEL);
                    return Ok((exit != Exit::Budget).then_some(exit));
                }
            }
        }
    }
}

impl Vcpu for TrapVcpu {
    fn run(&mut self, board: Board<'_>, budget: u64) -> Exit {
        if board.mem.ram().is_none_or(|r| r.file().is_none()) {
            // Only memory that a child process can share.
            return Exit::Unsupported;
        }
        // Natively run instructions are not counted.
        let mut left = budget;
        while left > 0 {
            if self.kicker.requested() && self.kicker.take() {
                return Exit::Kicked;
            }
            left -= 1;
            let interrupt = self.cpu.rflags.contains(Rflags::IF) && board.bus.interrupt_pending();
            if budget == 1 || interrupt || !self.runs_natively() {
                match self.emulate(board, false) {
                    Exit::Budget => continue,
                    exit => return exit,
                }
            }
            let ran = self.natively(board);
            self.tell_writes(board.mem);
            match ran {
                Ok(None) => {}
                Ok(Some(exit)) => return exit,
                Err(e) => {
                    eprintln!("bivisor: trap-and-emulate: {e:#}");
                    self.vessel = None;
                    return Exit::Unsupported;
                }
            }
        }
        Exit::Budget
    }

    fn state(&mut self) -> &mut CpuState {
        self.fetch_extended();
        self.core.mmu.flush();
        &mut self.cpu
    }

    fn set_intercepts(&mut self, intercepts: Intercepts) {
        self.core.intercepts = intercepts;
    }

    fn kicker(&self) -> Kicker {
        self.kicker.clone()
    }
}
