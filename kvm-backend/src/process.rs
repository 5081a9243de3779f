//! A thread of a Linux process on KVM: 64-bit code at CPL 3 over the host's own address space.
//!
//! The guest leaves for system calls, exceptions and what the host refuses; see [`crate::intercept`] for how and [`crate::space`]
//! for its page tables. Code that is not 64-bit, and instructions one at a time that a single step would disturb, are the
//! interpreter's.

use crate::exit::{self, Left, Wiring};
use crate::host::{Kind, host};
use crate::intercept::{self, HOLE, HOLE_GPA, PORT};
use crate::kick::{Alarm, Kickable};
use crate::regs;
use crate::run::{Extended, Hardware, KvmVcpu, Shared};
use crate::space::{Filled, USER_END, Wanted};
use crate::vm::{host_error, immediate_exit, set_tsc_offset};
use bivisor_emulator::cpu::{Attr, CpuState, Cr0, Cr4, Efer, Fault, Mode, Rflags, Segment};
use bivisor_emulator::host::fds;
use bivisor_emulator::isa::{Class, Gpr, Insn, Seg, decode};
use bivisor_emulator::mem::{FlatSpace, PAGE_SIZE};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts};
use iced_x86::Mnemonic as M;
use kvm_bindings::{KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_msr_entry, kvm_sregs};
use kvm_ioctls::VcpuFd;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

/// Budgets up to this are counted exactly, by single steps; larger ones become a time.
pub(crate) const EXACT_BUDGET: u64 = 4096;
/// After the host refused an access: an exit costs as much as thousands of interpreted instructions, and what comes next is likely
/// to be refused as well.
const INTERPRETED_AFTER_REFUSAL: u32 = 32;

/// The hardware of one guest thread.
pub(crate) struct Process {
    shared: Arc<Shared>,
    /// Taken only to give it back.
    fd: Option<VcpuFd>,
    id: u64,
    root: u64,
    /// What KVM was given last, as far as we set it.
    loaded: Option<kvm_sregs>,
    extended: Extended,
    /// IF and IOPL as the guest was entered.
    interrupts: Rflags,
    /// Address and RIP of the last page fault that found its entry filled.
    again: Option<(u64, u64)>,
    exec_epoch: u64,
}

impl Process {
    fn new(vcpu: &KvmVcpu) -> Result<Process, String> {
        let shared = vcpu.vm.shared()?;
        let cpuid = vcpu.vm.cpuid()?;
        let (fd, id, new, root) = {
            let mut space = shared.space.lock().expect("no panic under the lock");
            let (fd, id, new) = space.vcpu().map_err(|e| format!("KVM: no more virtual CPUs: {e}"))?;
            (fd, id, new, space.root())
        };
        let p = Process {
            shared,
            fd: Some(fd),
            id,
            root,
            loaded: None,
            extended: Extended::Unknown,
            interrupts: Rflags::IF,
            again: None,
            exec_epoch: 0,
        };
        let set = || -> Result<(), kvm_ioctls::Error> {
            let fd = p.fd();
            fd.set_cpuid2(&cpuid)?;
            fd.set_xcrs(&regs::xcrs(&CpuState::long64(3)))?;
            let star = [
                (bivisor_emulator::cpu::msr::index::STAR, intercept::STAR),
                (bivisor_emulator::cpu::msr::index::LSTAR, intercept::LSTAR),
                (bivisor_emulator::cpu::msr::index::FMASK, intercept::FMASK),
            ];
            let entries = star.map(|(index, data)| kvm_msr_entry { index, data, reserved: 0 });
            fd.set_msrs(&kvm_bindings::Msrs::from_entries(&entries).expect("three entries fit"))?;
            set_tsc_offset(fd, 0);
            Ok(())
        };
        if new {
            set().map_err(|e| format!("KVM: a virtual CPU cannot be set up: {e}"))?;
        }
        Ok(p)
    }

    fn fd(&self) -> &VcpuFd {
        self.fd.as_ref().expect("taken only by drop")
    }

    fn fd_mut(&mut self) -> &mut VcpuFd {
        self.fd.as_mut().expect("taken only by drop")
    }

    /// Makes the state complete.
    pub fn fetch(&mut self, cpu: &mut CpuState) -> io::Result<()> {
        self.extended.fetch(self.fd.as_ref().expect("taken only by drop"), cpu)
    }

    /// The system registers under which `cpu` runs: its segments, our tables.
    fn sregs(&self, cpu: &CpuState) -> kvm_sregs {
        let mut own = CpuState { xsave: Default::default(), ..CpuState::long64(3) };
        own.seg = cpu.seg;
        own.cr3 = self.root;
        own.gdtr = intercept::gdtr();
        own.idtr = intercept::idtr();
        own.tr = intercept::tr(self.id);
        own.ldtr = Segment { attr: Attr::from_bits_retain(0x82), ..Segment::default() };
        own.cr0 = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::AM | Cr0::PG;
        own.cr4 |= cpu.cr4 & (Cr4::TSD | Cr4::UMIP);
        own.efer = Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE;
        regs::sregs(&own, &kvm_sregs::default())
    }

    /// The state into the hardware.
    fn load(&mut self, cpu: &CpuState) -> io::Result<()> {
        self.extended.load(self.fd.as_ref().expect("taken only by drop"), cpu)?;
        self.interrupts = cpu.rflags & (Rflags::IF | Rflags::IOPL);
        let mut dirty = KVM_SYNC_X86_REGS;
        let sregs = self.sregs(cpu);
        let keep = self.loaded.is_some_and(|old| same_segments(&old, &sregs));
        let fd = self.fd_mut();
        let run = fd.get_kvm_run();
        run.kvm_valid_regs = u64::from(KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS);
        if !keep {
            dirty |= KVM_SYNC_X86_SREGS;
        }
        run.kvm_dirty_regs = u64::from(dirty);
        let sync = fd.sync_regs_mut();
        sync.regs = regs::regs(cpu);
        if !keep {
            sync.sregs = sregs;
        }
        Ok(())
    }

    /// The state from the hardware, where it left the guest: perhaps in a stub.
    fn store(&mut self, cpu: &mut CpuState) {
        let sync = self.fd_mut().sync_regs_mut();
        let (r, s) = (sync.regs, sync.sregs);
        regs::take_regs(cpu, &r);
        if s.ss.dpl == 3 || s.cs.dpl == 3 {
            cpu.seg = [&s.es, &s.cs, &s.ss, &s.ds, &s.fs, &s.gs].map(regs::take_segment);
        } else {
            // In a stub: CS and SS are the stub's, the others the guest's still.
            for (i, x) in [(Seg::Es, &s.es), (Seg::Ds, &s.ds), (Seg::Fs, &s.fs), (Seg::Gs, &s.gs)] {
                cpu.seg[i as usize] = regs::take_segment(x);
            }
        }
        self.loaded = Some(s);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let Some(fd) = self.fd.take() else { return };
        if !self.shared.usable() {
            // In the child of a fork it is nobody's any longer, and the lock may be held for ever.
            fds::forget(fd.as_raw_fd());
        } else if let Ok(mut space) = self.shared.space.lock() {
            space.give_back(fd, self.id);
        }
    }
}

/// Equal where we set something: the rest (CR2, the accessed bit of types, what KVM makes of unusable segments) may differ.
fn same_segments(a: &kvm_sregs, b: &kvm_sregs) -> bool {
    let same = |x: &kvm_bindings::kvm_segment, y: &kvm_bindings::kvm_segment| {
        x.base == y.base && x.selector == y.selector && x.dpl == y.dpl && x.l == y.l && x.unusable == y.unusable
    };
    same(&a.cs, &b.cs)
        && same(&a.ss, &b.ss)
        && same(&a.ds, &b.ds)
        && same(&a.es, &b.es)
        && same(&a.fs, &b.fs)
        && same(&a.gs, &b.gs)
        && (a.cr3, a.cr4) == (b.cr3, b.cr4)
}

/// Where the guest left.
enum Point {
    /// In the SYSCALL stub.
    Syscall,
    /// In the stub of a vector, with what the processor pushed.
    Vector(u8, Frame),
    /// At an instruction of its own.
    Left(Left),
}

/// What the processor pushed for an exception (SDM 3A figure 6-9).
#[derive(Clone, Copy)]
struct Frame {
    error: u64,
    cr2: u64,
}

impl KvmVcpu {
    pub(crate) fn run_process(&mut self, board: Board<'_>, flat: &FlatSpace, budget: u64) -> Exit {
        if !host().usable_for_process {
            return self.unsupported(host().reason.clone());
        }
        let native = self.cpu.mode() == Mode::Long64 && self.cpu.cpl() == 3;
        if let Err(reason) = self.process() {
            return self.unsupported(reason);
        }
        if !native {
            // 16- and 32-bit code: a software KVM has no way for it, and the tables here are 64-bit ones.
            if let Err(e) = self.complete() {
                return self.unsupported(e.to_string());
            }
            self.core.mmu.flush();
            return self.core.run(&mut self.cpu, board, budget, Some(&self.kicker));
        }
        let kickable = match self.hardware() {
            Ok((p, _)) => immediate_exit(p.fd_mut()),
            Err(e) => return self.unsupported(e.to_string()),
        };
        let kickable = Kickable::new(&self.kicker, kickable);
        if budget <= EXACT_BUDGET || self.must_step() {
            return self.step_process(board, flat, &kickable, budget);
        }
        // At most one instruction a quarter of a nanosecond: by then the budget may be used up.
        let alarm =
            (budget < u64::MAX / 2).then(|| Alarm::after(Duration::from_nanos((budget / 4).max(1_000_000)))).flatten();
        loop {
            match self.enter(board, flat, &kickable, alarm.as_ref()) {
                Ok(None) => {}
                Ok(Some(exit)) => return exit,
                Err(e) => return self.unsupported(format!("KVM: {e}")),
            }
        }
    }

    /// The hardware of this address space; a new one after a fork.
    fn process(&mut self) -> Result<&mut Process, String> {
        let stale = match &self.hardware {
            Hardware::Process(p) => !p.shared.usable(),
            _ => true,
        };
        if stale {
            self.hardware = Hardware::None;
            self.hardware = Hardware::Process(Box::new(Process::new(self)?));
        }
        match &mut self.hardware {
            Hardware::Process(p) => Ok(p),
            _ => Err("KVM: no virtual machine".into()),
        }
    }

    fn hardware(&mut self) -> io::Result<(&mut Process, &mut CpuState)> {
        match &mut self.hardware {
            Hardware::Process(p) => Ok((p, &mut self.cpu)),
            _ => Err(io::Error::other("no virtual machine")),
        }
    }

    /// Makes `self.cpu` the whole state.
    fn complete(&mut self) -> io::Result<()> {
        let (p, cpu) = self.hardware()?;
        p.fetch(cpu)
    }

    /// In and out once; then what it means. `None`: the guest goes on.
    fn enter(
        &mut self,
        board: Board<'_>,
        flat: &FlatSpace,
        kickable: &Kickable,
        alarm: Option<&Alarm>,
    ) -> io::Result<Option<Exit>> {
        match self.once(flat, kickable)? {
            Point::Left(Left::Interrupted) => {
                if self.kicker.requested() && self.kicker.take() {
                    return Ok(Some(Exit::Kicked));
                }
                Ok(alarm.is_some_and(Alarm::over).then_some(Exit::Budget))
            }
            Point::Left(Left::Refused | Left::CannotEmulate) => self.refused(board),
            Point::Left(other) => Err(io::Error::other(format!("the guest left in an unforeseen way: {other:?}"))),
            Point::Syscall => {
                let (p, cpu) = self.hardware()?;
                let interrupts = p.interrupts;
                // The stub is behind SYSCALL: RCX is where it goes on, R11 the flags (SDM 2B SYSCALL). They are lost for the guest.
                let next_rip = cpu.gpr[Gpr::Rcx as usize];
                cpu.rip = next_rip.wrapping_sub(2);
                cpu.rflags = guest_flags(cpu.gpr[Gpr::R11 as usize], interrupts);
                if self.core.intercepts.contains(Intercepts::SYSCALL) {
                    return Ok(Some(Exit::Intercept { what: Intercepts::SYSCALL, next_rip, vector: 0 }));
                }
                self.by_interpreter(board)
            }
            Point::Vector(vector, frame) => self.vector(board, flat, vector, frame),
        }
    }

    /// KVM_RUN with the state put in and taken out; the state is the guest's own afterwards.
    fn once(&mut self, flat: &FlatSpace, kickable: &Kickable) -> io::Result<Point> {
        let (Hardware::Process(p), cpu, kicked) = (&mut self.hardware, &mut self.cpu, &self.kicker) else {
            return Err(io::Error::other("no virtual machine"));
        };
        let epoch = flat.exec_epoch();
        if epoch != p.exec_epoch {
            p.exec_epoch = epoch;
            p.shared.space.lock().expect("no panic under the lock").forget_rights(epoch)?;
        }
        p.load(cpu)?;
        if kicked.requested() {
            return Ok(Point::Left(Left::Interrupted));
        }
        let left = exit::run(p.fd_mut(), Wiring::Monitor);
        if left == Left::Interrupted {
            kickable.rearm();
        }
        p.store(cpu);
        let rip = cpu.rip;
        match left {
            Left::Store(HOLE_GPA) if (intercept::LSTAR..=intercept::LSTAR + 11).contains(&rip) => Ok(Point::Syscall),
            Left::Store(gpa) => {
                // The guest itself stored to our page; on Linux that is a fault.
                let _ = gpa;
                Ok(Point::Vector(14, Frame { error: 7, cr2: HOLE }))
            }
            Left::Out(PORT) if let Some(vector) = intercept::vector_of(rip) => {
                let cr2 = p.loaded.map_or(0, |s| s.cr2);
                let frame = p.pop_frame(cpu, vector, cr2);
                Ok(Point::Vector(vector, frame))
            }
            left => {
                cpu.rflags = guest_flags(cpu.rflags.bits(), p.interrupts);
                Ok(Point::Left(left))
            }
        }
    }

    /// An exception of the guest, or what the processor made one.
    fn vector(&mut self, board: Board<'_>, flat: &FlatSpace, vector: u8, frame: Frame) -> io::Result<Option<Exit>> {
        let fault = match vector {
            14 => match self.page_fault(board, flat, frame)? {
                Some(fault) => fault,
                None => return Ok(None),
            },
            0 => Fault::De,
            1 => return self.debug(board, flat),
            3 => return Ok(Some(self.software(3, Fault::Bp))),
            4 => return Ok(Some(self.software(4, Fault::Of))),
            5 => Fault::Br,
            6 => return self.undefined(board, flat),
            7 => Fault::Nm,
            8 => Fault::Df,
            10 => Fault::Ts(frame.error as u16),
            11 => Fault::Np(frame.error as u16),
            // A software KVM takes an SS prefix for a segment, which 64-bit code does not.
            12 if host().kind == Kind::Software => return self.by_interpreter(board),
            12 => Fault::Ss(frame.error as u16),
            13 => return self.general_protection(board, flat, frame.error as u16),
            16 => Fault::Mf,
            17 => Fault::Ac,
            19 => Fault::Xm,
            n => return Err(io::Error::other(format!("an event with vector {n}"))),
        };
        self.raise(board, fault)
    }

    fn raise(&mut self, board: Board<'_>, fault: Fault) -> io::Result<Option<Exit>> {
        if self.core.intercepts.contains(Intercepts::EXCEPTIONS) {
            return Ok(Some(Exit::Exception(fault)));
        }
        self.by_interpreter(board)
    }

    /// INT n arrived at its gate: RIP is past it. CD nn, or a one-byte form.
    fn software(&mut self, vector: u8, otherwise: Fault) -> Exit {
        if !self.core.intercepts.contains(Intercepts::INT_N) {
            return Exit::Exception(otherwise);
        }
        let next_rip = self.cpu.rip;
        let one_byte = vector == 3 && bivisor_emulator::host::probe::load(next_rip.wrapping_sub(1), BYTE) == Some(0xcc);
        self.cpu.rip = next_rip.wrapping_sub(if one_byte { 1 } else { 2 });
        Exit::Intercept { what: Intercepts::INT_N, next_rip, vector }
    }

    /// #UD: also what a software KVM makes of INT n, of any exception while RSP is not canonical, and of the #GP and #SS of instructions
    /// that it cannot emulate; and a processor of SYSENTER where it has none.
    fn undefined(&mut self, board: Board<'_>, flat: &FlatSpace) -> io::Result<Option<Exit>> {
        let software = host().kind == Kind::Software;
        match self.instruction(flat) {
            Some(i) if software || matches!(i.iced.mnemonic(), M::Int | M::Sysenter) => self.by_hand(board, &i),
            _ => self.raise(board, Fault::Ud),
        }
    }

    /// #GP: INT n through a gate that is not the guest's has the vector and the IDT bit in its error code.
    fn general_protection(&mut self, board: Board<'_>, flat: &FlatSpace, error: u16) -> io::Result<Option<Exit>> {
        if error & 2 != 0
            && let Some(i) = self.instruction(flat).filter(|i| i.iced.mnemonic() == M::Int)
        {
            return self.by_hand(board, &i);
        }
        self.raise(board, Fault::Gp(error))
    }

    /// #DB: a single step of the guest's own, or INT1.
    fn debug(&mut self, board: Board<'_>, flat: &FlatSpace) -> io::Result<Option<Exit>> {
        let (p, cpu) = self.hardware()?;
        let dr6 = p.fd().get_debug_regs().map_err(host_error)?.dr6;
        const BS: u64 = 1 << 14;
        let code = |at: u64| bivisor_emulator::host::probe::load(at, BYTE);
        if dr6 & BS == 0 && !cpu.rflags.contains(Rflags::TF) {
            // INT1: RIP is past it in hardware, at it in a software KVM.
            let rip = cpu.rip;
            let at = if code(rip) == Some(0xf1) {
                Some(rip)
            } else {
                Some(rip.wrapping_sub(1)).filter(|a| code(*a) == Some(0xf1))
            };
            if let Some(at) = at {
                cpu.rip = at;
                return match self.instruction(flat) {
                    Some(i) => self.by_hand(board, &i),
                    None => self.by_interpreter(board),
                };
            }
        }
        self.raise(board, Fault::Db(dr6 & 0xe00f | if dr6 & 0xe00f == 0 { BS } else { 0 }))
    }

    fn page_fault(&mut self, board: Board<'_>, flat: &FlatSpace, frame: Frame) -> io::Result<Option<Fault>> {
        let wanted = Wanted { write: frame.error & 2 != 0, execute: frame.error & 16 != 0 };
        let (p, cpu) = self.hardware()?;
        let filled = p.shared.space.lock().expect("no panic under the lock").fault(flat, frame.cr2, wanted)?;
        match filled {
            Filled::Now => p.again = None,
            // Another thread was faster, or KVM has not noticed: once more, then by hand.
            Filled::Already if p.again != Some((frame.cr2, cpu.rip)) => p.again = Some((frame.cr2, cpu.rip)),
            Filled::Already => {
                p.again = None;
                return self.exact_fault(board);
            }
            // The access may cross into addresses that do not exist: which fault comes first differs between page tables.
            Filled::No if (USER_END - 64..USER_END).contains(&frame.cr2) => return self.exact_fault(board),
            Filled::No => {
                // U, and W and I as they were; P as Linux would have it: is there a mapping?
                let mapped = flat.find(frame.cr2).is_some();
                let code = 4 | frame.error as u16 & 0x12 | u16::from(mapped);
                return Ok(Some(Fault::Pf { addr: frame.cr2, code }));
            }
        }
        Ok(None)
    }

    /// The interpreter's word on the instruction at RIP.
    fn exact_fault(&mut self, board: Board<'_>) -> io::Result<Option<Fault>> {
        Ok(match self.by_interpreter(board)? {
            Some(Exit::Exception(fault)) => Some(fault),
            _ => None,
        })
    }

    /// The host refused an access that the page tables allow: rights taken away, a watched page, a file that ended. The interpreter
    /// makes the exact fault of it or does it.
    fn refused(&mut self, board: Board<'_>) -> io::Result<Option<Exit>> {
        self.complete()?;
        self.core.mmu.flush();
        for _ in 0..INTERPRETED_AFTER_REFUSAL {
            match self.core.step(&mut self.cpu, board) {
                Exit::Budget => {}
                exit => return Ok(Some(exit)),
            }
            if self.kicker.requested() {
                break;
            }
        }
        Ok(None)
    }

    /// An instruction that the engine may have been told to stop at; else it is the interpreter's.
    fn by_hand(&mut self, board: Board<'_>, i: &Insn) -> io::Result<Option<Exit>> {
        let (what, vector) = match i.iced.mnemonic() {
            M::Syscall => (Intercepts::SYSCALL, 0),
            M::Sysenter => (Intercepts::SYSENTER, 0),
            M::Int => (Intercepts::INT_N, i.iced.immediate8()),
            M::Int3 => (Intercepts::INT_N, 3),
            M::Int1 => (Intercepts::INT_N, 1),
            _ => return self.by_interpreter(board),
        };
        if !self.core.intercepts.contains(what) {
            return self.by_interpreter(board);
        }
        let next_rip = self.cpu.rip.wrapping_add(u64::from(i.len));
        Ok(Some(Exit::Intercept { what, next_rip, vector }))
    }

    fn by_interpreter(&mut self, board: Board<'_>) -> io::Result<Option<Exit>> {
        self.complete()?;
        match self.assist(board) {
            Exit::Budget => Ok(None),
            exit => Ok(Some(exit)),
        }
    }

    /// The instruction at RIP, if it can be read.
    fn instruction(&self, flat: &FlatSpace) -> Option<Insn> {
        let mut bytes = [0; 15];
        let in_page = (PAGE_SIZE - self.cpu.rip % PAGE_SIZE).min(15) as usize;
        flat.read(self.cpu.rip, &mut bytes[..in_page])?;
        let n = if flat.read(self.cpu.rip.wrapping_add(in_page as u64), &mut bytes[in_page..]).is_some() {
            15
        } else {
            in_page
        };
        decode(&bytes[..n], 64).ok()
    }

    /// Exactly `budget` instructions, by the trap flag where it does not disturb.
    fn step_process(&mut self, board: Board<'_>, flat: &FlatSpace, kickable: &Kickable, budget: u64) -> Exit {
        for _ in 0..budget {
            if self.kicker.requested() && self.kicker.take() {
                return Exit::Kicked;
            }
            let step = match self.instruction(flat) {
                Some(i) if !self.disturbed(&i) => self.step_native(board, flat, kickable),
                Some(i) => self.by_hand(board, &i),
                None => self.by_interpreter(board),
            };
            match step {
                Ok(None) => {}
                Ok(Some(exit)) => return exit,
                Err(e) => return self.unsupported(format!("KVM: {e}")),
            }
        }
        Exit::Budget
    }

    /// Would a single step change what the instruction does, or miss where it must stop?
    fn disturbed(&self, i: &Insn) -> bool {
        let repeats = i.iced.has_rep_prefix() || i.iced.has_repne_prefix();
        self.cpu.rflags.contains(Rflags::TF)
            || matches!(i.facts.class, Class::Flags | Class::Segment | Class::System | Class::Io | Class::Undefined)
            || i.facts.class == Class::String && repeats
            || matches!(i.iced.mnemonic(), M::Rdrand | M::Rdseed | M::Rdpid)
    }

    fn step_native(&mut self, board: Board<'_>, flat: &FlatSpace, kickable: &Kickable) -> io::Result<Option<Exit>> {
        loop {
            self.cpu.rflags |= Rflags::TF;
            let point = self.once(flat, kickable);
            self.cpu.rflags -= Rflags::TF;
            match point? {
                Point::Vector(1, _) => return Ok(None),
                Point::Vector(14, frame) => match self.page_fault(board, flat, frame)? {
                    Some(fault) => return self.raise(board, fault),
                    None => continue,
                },
                Point::Vector(vector, frame) => return self.vector(board, flat, vector, frame),
                Point::Left(Left::Interrupted) if self.kicker.requested() && self.kicker.take() => {
                    return Ok(Some(Exit::Kicked));
                }
                Point::Left(Left::Interrupted) => continue,
                Point::Left(Left::Refused | Left::CannotEmulate) => return self.by_interpreter(board),
                Point::Syscall => return Err(io::Error::other("a system call in a single step")),
                Point::Left(other) => return Err(io::Error::other(format!("a single step ended in {other:?}"))),
            }
        }
    }
}

const BYTE: bivisor_emulator::isa::Width = bivisor_emulator::isa::Width::B;

/// The flags of the guest: IF and IOPL cannot change at CPL 3 (a software KVM shows its own), RF is the processor's note for the
/// return from a fault.
fn guest_flags(bits: u64, interrupts: Rflags) -> Rflags {
    let kept = Rflags::IF | Rflags::IOPL;
    let mut flags = (Rflags::from_bits_retain(bits) | Rflags::FIXED) - Rflags::RF;
    flags.replace(kept, interrupts);
    flags
}

impl Process {
    /// The guest's RIP, CS, RFLAGS, RSP and SS from the frame that the processor pushed.
    fn pop_frame(&self, cpu: &mut CpuState, vector: u8, cr2: u64) -> Frame {
        let has_code = intercept::has_error_code(vector);
        let space = self.shared.space.lock().expect("no panic under the lock");
        let rsp = cpu.gpr[Gpr::Rsp as usize];
        let words: [u64; 6] = space.read_kernel(rsp);
        let (error, rest) = if has_code { (words[0], &words[1..6]) } else { (0, &words[0..5]) };
        cpu.rip = rest[0];
        cpu.rflags = guest_flags(rest[2], self.interrupts);
        cpu.gpr[Gpr::Rsp as usize] = rest[3];
        cpu.seg[Seg::Cs as usize] = Segment::code64(rest[1] as u16, 3);
        cpu.seg[Seg::Ss as usize] = Segment::data32(rest[4] as u16, 3);
        Frame { error, cr2 }
    }
}
