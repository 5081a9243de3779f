//! The run loop: events at the instruction boundary, fetch, decode, privilege, execute, commit (SDM 3A 6.9).

use crate::bus::Bus;
use crate::cpu::{Activity, CpuState, Fault};
use crate::interp::access;
use crate::interp::check;
use crate::interp::deliver::{Event, deliver};
use crate::interp::{Core, Env, Exec, Stop, dispatch};
use crate::isa::{Class, DecodeError, Insn, MAX_INSN_LEN, Seg, Width, decode};
use crate::mem::{Access, GuestMemory, Mmu, PAGE_SIZE};
use crate::vcpu::{Board, Exit, Intercepts, Kicker};

impl Core {
    /// Runs at most `budget` instructions of `cpu`.
    pub fn run(&mut self, cpu: &mut CpuState, board: Board<'_>, budget: u64, kicker: Option<&Kicker>) -> Exit {
        let mut left = budget;
        let mut x = exec(cpu, &mut self.mmu, &mut self.env, board.mem, board.bus, self.intercepts);
        while left > 0 {
            if kicker.is_some_and(|k| k.requested() && k.take()) {
                return Exit::Kicked;
            }
            if x.cpu.activity == Activity::Shutdown {
                return Exit::Shutdown;
            }
            match one(&mut x) {
                Ok(true) => {
                    left -= 1;
                    self.instructions += 1;
                }
                // A long repetition is not done yet.
                Ok(false) => {}
                Err(exit) => {
                    self.instructions += u64::from(completed(&exit));
                    return exit;
                }
            }
        }
        Exit::Budget
    }

    /// Delivers an event through the guest's IVT or IDT, for callers that intercept exceptions and then want them delivered.
    ///
    /// # Errors
    /// [`Exit::Shutdown`] on a triple fault, [`Exit::Unsupported`] for a way of delivery that is not there.
    pub fn deliver(&mut self, cpu: &mut CpuState, board: Board<'_>, event: Event) -> Result<(), Exit> {
        self.mmu.flush();
        let mut x = exec(cpu, &mut self.mmu, &mut self.env, board.mem, board.bus, Intercepts::empty());
        deliver(&mut x, event).map_err(|stop| match stop {
            Stop::Exit(exit) => exit,
            Stop::Fault(_) => Exit::Shutdown,
        })
    }
}

/// Did the instruction that left complete? HLT and traps did.
fn completed(exit: &Exit) -> bool {
    match exit {
        Exit::Halt => true,
        Exit::Exception(fault) => fault.is_trap(),
        _ => false,
    }
}

fn exec<'a>(
    cpu: &'a mut CpuState,
    mmu: &'a mut Mmu,
    env: &'a mut Env,
    mem: &'a GuestMemory,
    bus: &'a dyn Bus,
    intercepts: Intercepts,
) -> Exec<'a> {
    let next_rip = cpu.rip;
    Exec { cpu, mmu, mem, bus, intercepts, next_rip, env, attention: false }
}

fn one(x: &mut Exec<'_>) -> Result<bool, Exit> {
    let done = fetch(x).and_then(|i| {
        if !x.env.cpu_model.supports(i.iced.code()) {
            return Err(Fault::Ud.into());
        }
        x.next_rip = next_rip(x.cpu, i.len);
        check::before(x, &i)?;
        dispatch::op(&i)(x, &i).map(|()| i.facts.class)
    });
    match done {
        Ok(class) => {
            let repeats = matches!(class, Class::String | Class::Io) && x.next_rip == x.cpu.rip;
            x.cpu.rip = x.next_rip;
            Ok(!repeats)
        }
        Err(Stop::Exit(Exit::Halt)) => {
            x.cpu.rip = x.next_rip;
            x.cpu.activity = Activity::Halted;
            Err(Exit::Halt)
        }
        Err(Stop::Exit(exit)) => Err(exit),
        Err(Stop::Fault(fault)) => raise(x, fault).map(|()| true),
    }
}

fn raise(x: &mut Exec<'_>, fault: Fault) -> Result<(), Exit> {
    if x.intercepts.contains(Intercepts::EXCEPTIONS) {
        if fault.is_trap() {
            x.cpu.rip = x.next_rip;
        }
        return Err(Exit::Exception(fault));
    }
    match deliver(x, Event::Fault(fault)) {
        Ok(()) => Ok(()),
        Err(Stop::Exit(exit)) => Err(exit),
        Err(Stop::Fault(_)) => Err(Exit::Shutdown),
    }
}

/// The address after an instruction of `len` bytes at RIP: IP and EIP wrap in their width.
fn next_rip(cpu: &CpuState, len: u8) -> u64 {
    let next = cpu.rip.wrapping_add(u64::from(len));
    match cpu.mode().bitness() {
        64 => next,
        // A real processor lets EIP run past 64K in 16-bit code and faults on the limit there.
        _ => Width::D.cut(next),
    }
}

/// Fetches and decodes the instruction at RIP.
fn fetch(x: &mut Exec<'_>) -> Result<Insn, Stop> {
    let mut bytes = [0; MAX_INSN_LEN];
    let bitness = x.cpu.mode().bitness();
    let mut n = 0;
    while n < MAX_INSN_LEN {
        let offset = x.cpu.rip.wrapping_add(n as u64);
        let laddr = match fetch_address(x, offset) {
            Ok(laddr) => laddr,
            Err(stop) => return decided(&bytes[..n], bitness).unwrap_or(Err(stop)),
        };
        let in_page = (PAGE_SIZE - laddr % PAGE_SIZE) as usize;
        let part = in_page.min(MAX_INSN_LEN - n);
        match fetch_part(x, laddr, &mut bytes[n..n + part]) {
            Ok(()) => n += part,
            Err(stop) => return decided(&bytes[..n], bitness).unwrap_or(Err(stop)),
        }
    }
    decided(&bytes, bitness).unwrap_or(Err(Fault::Gp(0).into()))
}

fn fetch_address(x: &Exec<'_>, offset: u64) -> Result<u64, Stop> {
    access::linear(x, Seg::Cs, offset, 1, Access::Execute).map_err(|_| Fault::Gp(0).into())
}

fn fetch_part(x: &mut Exec<'_>, laddr: u64, to: &mut [u8]) -> Result<(), Stop> {
    let by = access::accessor(x.cpu);
    let gpa = x.mmu.translate(x.cpu, x.mem, laddr, Access::Execute, by)?;
    if let Some(flat) = x.mem.flat()
        && !(x.mem.may_execute(gpa) && flat.read(gpa, to).is_some())
    {
        return Err(access::flat_fetch_fault(x, flat, laddr));
    }
    if x.mem.flat().is_none() && x.mem.read(gpa, to).is_none() {
        x.bus.read_mmio(gpa, to);
    }
    Ok(())
}

/// What the bytes say: an instruction, #UD, #GP for too long; `None` if more bytes are needed.
fn decided(bytes: &[u8], bitness: u32) -> Option<Result<Insn, Stop>> {
    match decode(bytes, bitness) {
        Ok(i) => Some(Ok(i)),
        Err(DecodeError::Invalid) => Some(Err(Fault::Ud.into())),
        Err(DecodeError::TooLong) => Some(Err(Fault::Gp(0).into())),
        Err(DecodeError::Truncated) => None,
    }
}
