//! A machine's processor on KVM: guest-physical memory is a slot, or two with a hole between them, ports and addresses without memory are the bus's.
//!
//! Told to stop at exceptions or INT n, the hardware gets an interrupt table of length zero: any event then ends in a triple fault
//! with the state as it was before, and one step of the interpreter says exactly which it was. Small budgets, and intercepts that
//! hardware has not, go one instruction at a time (KVM_GUESTDBG_SINGLESTEP).

use crate::controllers::{self, InKernel};
use crate::counts::{self, Counter, Returns};
use crate::exit::{self, Left, Wiring};
use crate::host::{Kind, host};
use crate::kick::{Alarm, Kickable};
use crate::process::EXACT_BUDGET;
use crate::regs;
use crate::run::{Extended, Hardware, KvmVcpu};
use crate::vm::{TSS_ADDRESS, Vm, host_error, immediate_exit, set_tsc_offset};
use bivisor_emulator::bus::Bus;
use bivisor_emulator::cpu::{Activity, CpuState, Cr0, Cr4, Efer, Mode, Rflags};
use bivisor_emulator::host::stopwatch::Stopwatch;
use bivisor_emulator::interp::deliver::Event;
use bivisor_emulator::isa::{Class, Insn, Seg, decode};
use bivisor_emulator::mem::{Access, GuestMemory, PAGE_SIZE, Ram};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts};
use iced_x86::Mnemonic as M;
use kvm_bindings::{
    KVM_EXIT_INTR, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS, kvm_guest_debug, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Instructions of the interpreter before it is asked again whether KVM can go on.
const STRETCH: u64 = 1000;
/// DR6: single step.
const DR6_BS: u64 = 1 << 14;

/// The hardware of one processor.
pub(crate) struct Machine {
    vm: Vm,
    fd: VcpuFd,
    /// Host address and size of the RAM.
    ram: (u64, u64),
    /// Its parts: slot, address, length.
    slots: Vec<(u32, u64, u64)>,
    /// KVM notes which pages are written.
    logs: bool,
    extended: Extended,
    /// What the hardware has of MSRs, XCR0, debug registers; `None`: it may have changed, or was never loaded.
    held: Option<Box<CpuState>>,
    loaded: bool,
    /// What [`regs::sregs`] made of the state after the last exit.
    known: kvm_sregs,
    /// KVM's pending events are to be replaced.
    events_stale: bool,
    /// An interrupt on its way into the guest.
    injecting: Option<u8>,
    /// The interrupt table is hidden: its true base and limit.
    hidden: Option<bivisor_emulator::cpu::Table>,
    stepping: bool,
    returns: Returns,
    /// Of the time between two KVM_RUNs.
    pub watch: Stopwatch,
    /// Interrupts are the kernel's.
    in_kernel: bool,
}

/// What to do where only the board's own controllers will do.
const WITHOUT: &str = "use --kernel-irqchip off";

impl Machine {
    fn new(vcpu: &KvmVcpu, ram: &Ram, bus: &dyn Bus) -> Result<Machine, String> {
        let cpuid = vcpu.vm.cpuid()?;
        let make = || -> io::Result<Machine> {
            let mut vm = Vm::new()?;
            let there = controllers::are_there(&vm);
            if vcpu.irqchip == Some(true) && !there {
                return Err(io::Error::other(format!("it has no interrupt controllers (KVM_CAP_IRQCHIP): {WITHOUT}")));
            }
            // Where KVM is software the interpreter does much for it, and has to reach the same controllers.
            let in_kernel = vcpu.irqchip.unwrap_or(there && host().kind != Kind::Software);
            if in_kernel {
                let controllers = Arc::new(InKernel::new(&mut vm)?);
                if let Some(pair) = bus.use_controllers(controllers.clone()) {
                    controllers.program(pair)?;
                }
            }
            let place = (ram.host_base() as u64, ram.size());
            if ram.low() <= TSS_ADDRESS {
                // Three pages that VT-x without "unrestricted guest" needs for real mode.
                let _ = vm.fd().set_tss_address(TSS_ADDRESS as usize);
            }
            let logs = ram.is_watched();
            let slots = ram.parts().map(|(at, len)| Ok((vm.map(at, place.0 + at, len, logs)?, at, len)));
            let slots = slots.collect::<io::Result<_>>()?;
            let fd = vm.vcpu(0)?;
            fd.set_cpuid2(&cpuid).map_err(host_error)?;
            Ok(Machine {
                vm,
                fd,
                ram: place,
                slots,
                logs,
                extended: Extended::Unknown,
                held: None,
                loaded: false,
                known: kvm_sregs::default(),
                events_stale: true,
                injecting: None,
                hidden: None,
                stepping: false,
                returns: Returns::default(),
                watch: Stopwatch::default(),
                in_kernel,
            })
        };
        make().map_err(|e| format!("KVM: no virtual machine: {e}"))
    }

    /// Makes the state complete: what an exit does not bring.
    pub fn fetch(&mut self, cpu: &mut CpuState) -> io::Result<()> {
        self.extended.fetch(&self.fd, cpu)?;
        if self.loaded && self.held.is_none() {
            let mut msrs = regs::msr_list();
            let n = self.fd.get_msrs(&mut msrs).map_err(host_error)?;
            regs::take_msrs(cpu, &msrs, n);
            regs::take_xcrs(cpu, &self.fd.get_xcrs().map_err(host_error)?);
            let dr6 = cpu.dr6;
            regs::take_debug_regs(cpu, &self.fd.get_debug_regs().map_err(host_error)?);
            if self.stepping {
                // BS is from our step.
                cpu.dr6 = cpu.dr6 & !DR6_BS | dr6 & DR6_BS;
            }
            self.held = Some(Box::new(cpu.clone()));
        }
        // Whoever looks may change RIP: an exception on its way is raised again, if the instruction still is to be executed.
        self.events_stale = true;
        Ok(())
    }

    /// Why the guest was left: returns to the monitor, then the kernel's counters, where it has some.
    pub fn counts(&self) -> Vec<(Counter, u64)> {
        self.returns.all().chain(counts::read(&self.fd).unwrap_or_default()).collect()
    }

    /// KVM_RUN, once.
    fn enter(&mut self, wiring: Wiring<'_>) -> Left {
        self.watch.back();
        let left = exit::run(&mut self.fd, wiring);
        let reason = match left {
            // EINTR leaves an older reason there.
            Left::Interrupted => KVM_EXIT_INTR,
            _ => self.fd.get_kvm_run().exit_reason,
        };
        self.returns.note(reason);
        self.watch.out(|| counts::name(reason));
        left
    }

    /// The state into the hardware.
    fn load(&mut self, cpu: &CpuState, hide: bool) -> io::Result<()> {
        let first = !self.loaded;
        let mut dirty = KVM_SYNC_X86_REGS;
        let mut sregs = regs::sregs(cpu, &kvm_sregs::default());
        if first || hide || self.hidden.is_some() || sregs != self.known {
            dirty |= KVM_SYNC_X86_SREGS;
        }
        self.hidden = hide.then_some(cpu.idtr);
        if hide {
            sregs.idt.limit = 0;
        }
        let held = self.held.take();
        let changed = |f: fn(&CpuState, &CpuState) -> bool| held.as_ref().is_none_or(|h| f(h, cpu));
        if first || held.is_some() {
            if changed(|a, b| a.msr != b.msr) {
                self.fd.set_msrs(&regs::msrs(cpu)).map_err(host_error)?;
                set_tsc_offset(&self.fd, cpu.msr.tsc_offset);
            }
            if changed(|a, b| a.xcr0 != b.xcr0) {
                self.fd.set_xcrs(&regs::xcrs(cpu)).map_err(host_error)?;
            }
            if changed(|a, b| (a.dr, a.dr6, a.dr7) != (b.dr, b.dr6, b.dr7)) {
                self.fd.set_debug_regs(&regs::debug_regs(cpu)).map_err(host_error)?;
            }
        }
        self.extended.load(&self.fd, cpu)?;
        let sync = self.fd.sync_regs_mut();
        sync.regs = regs::regs(cpu);
        sync.sregs = sregs;
        if self.events_stale || self.injecting.is_some() {
            dirty |= KVM_SYNC_X86_EVENTS;
            sync.events = regs::events(cpu);
            if let Some(vector) = self.injecting {
                sync.events.interrupt.injected = 1;
                sync.events.interrupt.nr = vector;
            }
            self.events_stale = false;
        }
        let run = self.fd.get_kvm_run();
        run.kvm_valid_regs = u64::from(KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS);
        // What an entry that did not come about left behind is still to be taken over.
        run.kvm_dirty_regs |= u64::from(dirty);
        self.loaded = true;
        Ok(())
    }

    /// The state from the hardware.
    fn store(&mut self, cpu: &mut CpuState) {
        let sync = self.fd.sync_regs_mut();
        let (r, s, e) = (sync.regs, sync.sregs, sync.events);
        regs::take_regs(cpu, &r);
        regs::take_sregs(cpu, &s);
        if let Some(true_table) = self.hidden
            && s.idt.limit == 0
            && s.idt.base == true_table.base
        {
            cpu.idtr = true_table;
        }
        self.known = regs::sregs(cpu, &kvm_sregs::default());
        regs::take_events(cpu, &e);
        self.injecting = (e.interrupt.injected != 0 && e.interrupt.soft == 0).then_some(e.interrupt.nr);
    }

    /// Notes in the RAM what the guest wrote.
    fn collect_writes(&mut self, ram: &Ram) -> io::Result<()> {
        if !self.logs {
            return Ok(());
        }
        for &(slot, at, len) in &self.slots {
            let bitmap = self.vm.fd().get_dirty_log(slot, len as usize).map_err(host_error)?;
            for (i, word) in bitmap.iter().enumerate() {
                let mut word = *word;
                while word != 0 {
                    ram.wrote(at + (i as u64 * 64 + u64::from(word.trailing_zeros())) * PAGE_SIZE);
                    word &= word - 1;
                }
            }
        }
        Ok(())
    }

    /// Makes the next entry a single step. KVM remembers for which RIP it sets the trap flag, so the registers must be there before.
    fn arm_step(&mut self) -> io::Result<()> {
        let run = self.fd.get_kvm_run();
        let dirty = std::mem::take(&mut run.kvm_dirty_regs) as u32;
        let sync = self.fd.sync_regs_mut();
        let (regs, sregs, events) = (sync.regs, sync.sregs, sync.events);
        if dirty & KVM_SYNC_X86_SREGS != 0 {
            self.fd.set_sregs(&sregs).map_err(host_error)?;
        }
        self.fd.set_regs(&regs).map_err(host_error)?;
        if dirty & KVM_SYNC_X86_EVENTS != 0 {
            self.fd.set_vcpu_events(&events).map_err(host_error)?;
        }
        self.debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP)
    }

    /// Single steps are over.
    fn disarm_step(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.stepping) { self.debug(0) } else { Ok(()) }
    }

    fn debug(&mut self, control: u32) -> io::Result<()> {
        self.fd.set_guest_debug(&kvm_guest_debug { control, ..Default::default() }).map_err(host_error)
    }
}

/// What this host's KVM cannot run at all: a sentence.
fn refusal(cpu: &CpuState) -> Option<&'static str> {
    if host().kind != Kind::Software {
        return None;
    }
    let paging = cpu.cr0.contains(Cr0::PG);
    if paging && !cpu.efer.contains(Efer::LME) {
        Some("the software KVM of this host has paging in long mode only")
    } else if cpu.rflags.contains(Rflags::VM) {
        Some("the software KVM of this host has no virtual-8086 mode")
    } else if cpu.cr4.intersects(Cr4::LA57 | Cr4::PCIDE) {
        Some("the software KVM of this host has neither 57-bit addresses nor process-context identifiers")
    } else if matches!(cpu.mode(), Mode::Compat16 | Mode::Compat32) {
        Some("the software KVM of this host raises #UD for valid instructions in compatibility mode")
    } else {
        None
    }
}

impl KvmVcpu {
    pub(crate) fn run_machine(&mut self, board: Board<'_>, ram: &Ram, budget: u64) -> Exit {
        if self.cpu.activity == Activity::Shutdown {
            return Exit::Shutdown;
        }
        if !self.interprets
            && let Some(reason) = refusal(&self.cpu)
        {
            return self.unsupported(reason);
        }
        if let Err(reason) = self.machine(ram, board.bus) {
            return self.unsupported(reason);
        }
        if self.cpu.mode() == Mode::Real && host().kind == Kind::Software && self.told_of_events() {
            // Its real mode is interpreted in the kernel and looks at no limit of the vector table: nothing to hide there.
            return self.run_interpreted(board, ram, budget);
        }
        let kickable = match self.hw() {
            Ok((m, _)) => immediate_exit(&mut m.fd),
            Err(e) => return self.unsupported(e.to_string()),
        };
        let kickable = Kickable::new(&self.kicker, kickable);
        let exit = if budget <= EXACT_BUDGET || self.must_step() {
            self.step_machine(board, &kickable, budget)
        } else {
            self.run_freely(board, &kickable, budget)
        };
        let written = match &mut self.hardware {
            Hardware::Machine(m) => {
                m.watch.back();
                m.collect_writes(ram)
            }
            _ => Ok(()),
        };
        match exit.and_then(|e| written.map(|()| e)) {
            Ok(exit) => exit,
            Err(e) => self.unsupported(format!("KVM: {e}")),
        }
    }

    /// Told to stop where the guest's interrupt table would be used?
    fn told_of_events(&self) -> bool {
        self.core.intercepts.intersects(Intercepts::EXCEPTIONS | Intercepts::INT_N)
    }

    fn run_interpreted(&mut self, board: Board<'_>, ram: &Ram, budget: u64) -> Exit {
        let complete = self.complete_in_ram().and_then(|()| match &mut self.hardware {
            Hardware::Machine(m) => m.collect_writes(ram),
            _ => Ok(()),
        });
        if let Err(e) = complete {
            return self.unsupported(format!("KVM: {e}"));
        }
        self.core.mmu.flush();
        self.core.run(&mut self.cpu, board, budget, Some(&self.kicker))
    }

    /// The hardware with this RAM in it.
    fn machine(&mut self, ram: &Ram, bus: &dyn Bus) -> Result<(), String> {
        let place = (ram.host_base() as u64, ram.size());
        let fits = matches!(&self.hardware, Hardware::Machine(m) if m.ram == place);
        if !fits {
            self.hardware = Hardware::None;
            let mut machine = Box::new(Machine::new(self, ram, bus)?);
            if self.measures {
                machine.watch.start();
            }
            self.hardware = Hardware::Machine(machine);
        }
        if let Hardware::Machine(m) = &mut self.hardware
            && ram.is_watched() != m.logs
        {
            m.logs = ram.is_watched();
            for &(slot, at, len) in &m.slots {
                m.vm.set_slot(slot, at, place.0 + at, len, m.logs).map_err(|e| format!("KVM: {e}"))?;
            }
        }
        Ok(())
    }

    fn hw(&mut self) -> io::Result<(&mut Machine, &mut CpuState)> {
        match &mut self.hardware {
            Hardware::Machine(m) => Ok((m, &mut self.cpu)),
            _ => Err(io::Error::other("no virtual machine")),
        }
    }

    /// KVM_RUN with the state put in and taken out.
    fn go(&mut self, board: Board<'_>, kickable: &Kickable, window: bool) -> io::Result<Left> {
        let told = self.told_of_events();
        let (Hardware::Machine(m), cpu, kicker) = (&mut self.hardware, &mut self.cpu, &self.kicker) else {
            return Err(io::Error::other("no virtual machine"));
        };
        m.load(cpu, told || m.stepping)?;
        if m.stepping {
            m.arm_step()?;
        }
        m.fd.get_kvm_run().request_interrupt_window = u8::from(window);
        if kicker.requested() {
            return Ok(Left::Interrupted);
        }
        let wiring = Wiring::Bus(board.bus);
        let mut left = m.enter(wiring);
        // I/O needs nothing of the state: straight back, unless somebody wants something.
        while left == Left::Served && !m.stepping && !kicker.requested() && !board.bus.interrupt_pending() {
            left = m.enter(wiring);
        }
        if left == Left::Interrupted {
            kickable.rearm();
        }
        // The instruction is complete only when KVM has been entered again: do that without running the guest further. A signal
        // meanwhile asks for the same, and is not lost: it leaves its request with the kicker, or the budget's time is over.
        while left == Left::Served {
            m.fd.set_kvm_immediate_exit(1);
            match exit::run(&mut m.fd, wiring) {
                Left::Interrupted => {
                    kickable.rearm();
                    break;
                }
                other => left = other,
            }
            kickable.rearm();
        }
        m.store(cpu);
        Ok(left)
    }

    fn run_freely(&mut self, board: Board<'_>, kickable: &Kickable, budget: u64) -> io::Result<Exit> {
        let (m, _) = self.hw()?;
        m.disarm_step()?;
        let alarm = match budget {
            u64::MAX => None,
            _ => Alarm::after(Duration::from_nanos((budget / 4).max(1_000_000))),
        };
        loop {
            if self.kicker.requested() && self.kicker.take() {
                return Ok(Exit::Kicked);
            }
            if alarm.as_ref().is_some_and(Alarm::over) {
                return Ok(Exit::Budget);
            }
            let mut window = false;
            if board.bus.interrupt_pending() {
                let free = matches!(&self.hardware, Hardware::Machine(m) if m.injecting.is_none());
                if free && self.interruptible() {
                    self.take_interrupt(board, true)?;
                } else {
                    window = true;
                }
            }
            if self.cpu.activity == Activity::Halted {
                return Ok(Exit::Halt);
            }
            match self.assist_refused(board, STRETCH)? {
                None => {}
                Some(Exit::Budget) => continue,
                Some(exit) => return Ok(exit),
            }
            match self.go(board, kickable, window)? {
                Left::Served | Left::Window | Left::Interrupted | Left::Debug(_) => {}
                Left::Halt => return Ok(self.halted()),
                Left::CannotEmulate | Left::Refused => match self.by_interpreter_in_ram(board)? {
                    Exit::Budget => {}
                    exit => return Ok(exit),
                },
                Left::Shutdown => match self.shut_down(board)? {
                    Exit::Budget => {}
                    exit => return Ok(exit),
                },
                other => return Ok(self.unsupported(format!("KVM: the guest left in an unforeseen way: {other:?}"))),
            }
        }
    }

    /// `Some` if this host's KVM cannot run the guest as it is: what came of the interpreter, for at most so many instructions, or that
    /// it cannot be run.
    fn assist_refused(&mut self, board: Board<'_>, most: u64) -> io::Result<Option<Exit>> {
        let Some(reason) = refusal(&self.cpu) else { return Ok(None) };
        if !self.interprets {
            return Ok(Some(self.unsupported(reason)));
        }
        if self.hw()?.0.in_kernel {
            return Ok(Some(self.unsupported(format!("{reason}, and interrupts are the kernel's: {WITHOUT}"))));
        }
        if let Some(vector) = self.hw()?.0.injecting.take() {
            self.deliver_in_ram(board, vector)?;
        }
        self.complete_in_ram()?;
        self.core.mmu.flush();
        Ok(Some(self.core.run(&mut self.cpu, board, most, Some(&self.kicker))))
    }

    fn interruptible(&self) -> bool {
        self.cpu.rflags.contains(Rflags::IF) && !self.cpu.interrupt_shadow
    }

    /// Takes the waiting interrupt: by the hardware at the next entry, or at once.
    fn take_interrupt(&mut self, board: Board<'_>, by_hardware: bool) -> io::Result<()> {
        let Some(vector) = board.bus.take_interrupt() else { return Ok(()) };
        self.cpu.activity = Activity::Active;
        if by_hardware && !self.told_of_events() {
            self.hw()?.0.injecting = Some(vector);
            return Ok(());
        }
        self.deliver_in_ram(board, vector)
    }

    /// An interrupt by the interpreter.
    fn deliver_in_ram(&mut self, board: Board<'_>, vector: u8) -> io::Result<()> {
        self.complete_in_ram()?;
        let mut cpu = std::mem::take(&mut self.cpu);
        let done = self.core.deliver(&mut cpu, board, Event::External(vector));
        self.cpu = cpu;
        done.map_err(|e| io::Error::other(format!("an interrupt cannot be delivered: {e:?}")))
    }

    /// HLT was executed; RIP is past it.
    fn halted(&mut self) -> Exit {
        if self.core.intercepts.contains(Intercepts::HLT) {
            let next_rip = self.cpu.rip;
            self.cpu.rip = next_rip.wrapping_sub(1);
            return Exit::Intercept { what: Intercepts::HLT, next_rip, vector: 0 };
        }
        self.cpu.activity = Activity::Halted;
        Exit::Halt
    }

    /// A triple fault: the guest's own, or any event under a hidden interrupt table.
    fn shut_down(&mut self, board: Board<'_>) -> io::Result<Exit> {
        if self.told_of_events() {
            // RF was set for the return from a fault that has not been delivered.
            self.cpu.rflags -= Rflags::RF;
            return self.by_interpreter_in_ram(board);
        }
        self.cpu.activity = Activity::Shutdown;
        Ok(Exit::Shutdown)
    }

    fn complete_in_ram(&mut self) -> io::Result<()> {
        let (m, cpu) = self.hw()?;
        m.fetch(cpu)
    }

    fn by_interpreter_in_ram(&mut self, board: Board<'_>) -> io::Result<Exit> {
        self.complete_in_ram()?;
        if let (GuestMemory::Ram(ram), Ok((m, _))) = (board.mem, self.hw()) {
            m.collect_writes(ram)?;
        }
        let exit = self.assist(board);
        if self.hw()?.0.in_kernel && (exit == Exit::Halt || board.bus.has_strayed()) {
            let what = "the interpreter had to do an instruction that waits for an interrupt or accesses a controller";
            return Ok(self.unsupported(format!("KVM: {what}, and these are the kernel's: {WITHOUT}")));
        }
        Ok(exit)
    }

    /// Exactly `budget` instructions.
    fn step_machine(&mut self, board: Board<'_>, kickable: &Kickable, budget: u64) -> io::Result<Exit> {
        for _ in 0..budget {
            if self.kicker.requested() && self.kicker.take() {
                return Ok(Exit::Kicked);
            }
            if board.bus.interrupt_pending() && self.interruptible() {
                self.take_interrupt(board, false)?;
            }
            if self.cpu.activity == Activity::Halted {
                return Ok(Exit::Halt);
            }
            match self.assist_refused(board, 1)? {
                None => {}
                Some(Exit::Budget) => continue,
                Some(exit) => return Ok(exit),
            }
            let exit = match self.insn_in_ram(board) {
                Some(i) if !disturbed(&self.cpu, &i) => self.step_hardware(board, kickable)?,
                _ => self.by_interpreter_in_ram(board)?,
            };
            if exit != Exit::Budget {
                return Ok(exit);
            }
        }
        Ok(Exit::Budget)
    }

    /// One instruction in the hardware; whatever is not plainly that is undone and the interpreter's.
    fn step_hardware(&mut self, board: Board<'_>, kickable: &Kickable) -> io::Result<Exit> {
        let before = (self.cpu.gpr, self.cpu.rip, self.cpu.rflags);
        let (m, _) = self.hw()?;
        m.stepping = true;
        let left = self.go(board, kickable, false)?;
        match left {
            Left::Debug(_) => {}
            // At CPL 3 of a software KVM the step is a #DB for the guest's own table, which is hidden: a triple fault past the
            // instruction.
            Left::Shutdown if self.cpu.rip != before.1 => {}
            Left::Interrupted if self.cpu.rip != before.1 => {}
            Left::Interrupted => return Ok(if self.kicker.take() { Exit::Kicked } else { Exit::Budget }),
            Left::Served => {}
            Left::Failed(reason) => return Ok(self.unsupported(format!("KVM: {reason}"))),
            _ => {
                // A fault, or something KVM cannot do: nothing has been done to memory.
                (self.cpu.gpr, self.cpu.rip, self.cpu.rflags) = before;
                self.hw()?.0.injecting = None;
                return self.by_interpreter_in_ram(board);
            }
        }
        self.cpu.rflags -= Rflags::RF;
        if !before.2.contains(Rflags::TF) {
            self.cpu.rflags -= Rflags::TF;
        }
        Ok(Exit::Budget)
    }

    /// The instruction at CS:RIP, if it can be fetched.
    fn insn_in_ram(&mut self, board: Board<'_>) -> Option<Insn> {
        let cpu = &self.cpu;
        let bitness = cpu.mode().bitness();
        let base = if bitness == 64 { 0 } else { cpu.segment(Seg::Cs).base };
        self.core.mmu.flush();
        let by = bivisor_emulator::interp::access::accessor(cpu);
        let mut bytes = [0; 15];
        let mut n = 0;
        while n < bytes.len() {
            let mut laddr = base.wrapping_add(cpu.rip).wrapping_add(n as u64);
            if bitness != 64 {
                laddr &= 0xffff_ffff;
            }
            let part = ((PAGE_SIZE - laddr % PAGE_SIZE) as usize).min(bytes.len() - n);
            let Ok(gpa) = self.core.mmu.translate(cpu, board.mem, laddr, Access::Execute, by) else { break };
            if board.mem.read(gpa, &mut bytes[n..n + part]).is_none() {
                break;
            }
            n += part;
        }
        decode(&bytes[..n], bitness).ok()
    }
}

/// Would a single step change what the instruction does, miss where it must stop, or (in a software KVM) get it wrong?
fn disturbed(cpu: &CpuState, i: &Insn) -> bool {
    let repeats = i.iced.has_rep_prefix() || i.iced.has_repne_prefix();
    let to_ss = i.iced.op_count() > 0 && i.iced.op_register(0) == iced_x86::Register::SS;
    // Its kernel part interprets LZCNT as BSR and TZCNT as BSF, and VMCALL for ever.
    let wrong = host().kind == Kind::Software
        && matches!(i.iced.mnemonic(), M::Lzcnt | M::Tzcnt | M::Vmcall | M::Vmmcall)
        && !(cpu.mode() == Mode::Long64 && cpu.cpl() == 3);
    let stops = matches!(
        i.iced.mnemonic(),
        M::Syscall
            | M::Sysenter
            | M::Sysret
            | M::Sysretq
            | M::Sysexit
            | M::Sysexitq
            | M::Int
            | M::Int1
            | M::Int3
            | M::Into
    ) || matches!(
        i.iced.mnemonic(),
        M::Iret | M::Iretd | M::Iretq | M::Hlt | M::Cpuid | M::Rdtsc | M::Rdtscp
    ) || matches!(
        i.iced.mnemonic(),
        M::Rdrand | M::Rdseed | M::Pushf | M::Pushfd | M::Pushfq | M::Popf | M::Popfd | M::Popfq
    ) || matches!(i.iced.mnemonic(), M::Sti | M::Lss | M::Sgdt | M::Sidt | M::Lidt | M::Rdpid);
    let flags = cpu.rflags.contains(Rflags::TF) || cpu.interrupt_shadow || cpu.dr7 & 0xff != 0;
    flags || to_ss || wrong || stops || i.facts.class == Class::Io || i.facts.class == Class::Undefined || repeats
}
