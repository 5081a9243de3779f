//! Delivery of exceptions and interrupts through the IDT or the interrupt vector table (SDM 3A 6).
//!
//! An attempt changes no register before all it has to write can be written, so that a fault on the way (a bad gate, a stack without
//! room) is delivered instead from the same state, or makes a double fault (SDM 3A table 6-5).

mod legacy;
mod long;
mod real;

use crate::cpu::{Activity, CpuState, Efer, Fault, Rflags, Segment};
use crate::interp::{Exec, Step, Stop, Why, access};
use crate::isa::{Seg, Width};
use crate::mem::{Access, By, GuestMemory, PAGE_SIZE};
use crate::vcpu::{Exit, Intercepts};

/// What is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An exception. #BP and #OF are those of INT3 and INTO: the gate's DPL is checked.
    Fault(Fault),
    /// An external interrupt.
    External(u8),
    /// INT n: the gate's DPL is checked.
    Software(u8),
    /// INT1: #DB without a check of the gate's DPL.
    SoftwareIcebp,
    /// A non-maskable interrupt.
    Nmi,
}

impl Event {
    fn vector(self) -> u8 {
        match self {
            Event::Fault(f) => f.vector(),
            Event::External(v) | Event::Software(v) => v,
            Event::SoftwareIcebp => 1,
            Event::Nmi => 2,
        }
    }

    fn error_code(self) -> Option<u16> {
        match self {
            Event::Fault(f) => f.error_code(),
            _ => None,
        }
    }

    /// Raised by INT n, INT3, INTO: DPL of the gate is checked, and EXT is clear in error codes (SDM 3A 6.12.1.2, 6.13).
    fn is_software(self) -> bool {
        matches!(self, Event::Software(_) | Event::Fault(Fault::Bp | Fault::Of))
    }

    /// The EXT bit of error codes that faults during delivery have.
    fn ext(self) -> u16 {
        u16::from(!self.is_software())
    }

    /// The address the handler returns to: faults go back to the instruction, software interrupts behind it.
    fn return_rip(self, x: &Exec<'_>) -> u64 {
        if self.is_software() || self == Event::SoftwareIcebp { x.next_rip } else { x.cpu.rip }
    }

    /// The flags to push: RF is set for faults but #DB (SDM 3A 6.12.1, 3B 17.3.1.1).
    fn pushed_flags(self, cpu: &CpuState) -> u64 {
        let restarts = matches!(self, Event::Fault(f) if !f.is_trap() && !matches!(f, Fault::Db(_)));
        let rf = if restarts { Rflags::RF } else { Rflags::empty() };
        (cpu.rflags | rf).bits()
    }
}

/// Delivers `event`: RIP (and `x.next_rip`) is then at the handler. The return address is `x.cpu.rip`, for software interrupts
/// `x.next_rip`.
///
/// # Errors
/// [`Exit::Shutdown`] on a triple fault.
pub fn deliver(x: &mut Exec<'_>, event: Event) -> Result<(), Stop> {
    let mut event = event;
    loop {
        note(x, event);
        match attempt(x, event) {
            Ok(()) => {
                x.next_rip = x.cpu.rip;
                x.cpu.interrupt_shadow = false;
                x.cpu.activity = Activity::Active;
                x.attention();
                return Ok(());
            }
            Err(stop) => match stop.why() {
                // Nothing but an instruction was under way: its fault is intercepted like any other's.
                Why::Fault(_)
                    if matches!(event, Event::Software(_)) && x.intercepts.contains(Intercepts::EXCEPTIONS) =>
                {
                    return Err(stop);
                }
                Why::Fault(second) => {
                    // SDM 3A 6.15 of #PF: the second one's address is in CR2, also where it becomes a double fault.
                    if let Fault::Pf { addr, .. } = second {
                        x.cpu.cr2 = addr;
                    }
                    let Some(fault) = combine(event, second) else {
                        x.cpu.activity = Activity::Shutdown;
                        return Err(Stop::exit(Exit::Shutdown));
                    };
                    event = Event::Fault(fault);
                }
                Why::Exit(_) => return Err(stop),
            },
        }
    }
}

/// What an exception leaves in registers whether or not it can be delivered: CR2, DR6 (SDM 3A 6.15, 3B 17.2.3).
fn note(x: &mut Exec<'_>, event: Event) {
    match event {
        Event::Fault(Fault::Pf { addr, .. }) => x.cpu.cr2 = addr,
        Event::Fault(Fault::Db(causes)) => {
            // SDM 3B 17.2.3: B0 to B3 say what was hit now; the other bits stay set until software clears them.
            x.cpu.dr6 = x.cpu.dr6 & !0xf | causes;
            // DR7.GD is cleared on entry to the handler, BTF by every debug exception (17.4.4).
            x.cpu.dr7 &= !(1 << 13);
            x.cpu.msr.debugctl &= !2;
        }
        Event::Nmi => x.cpu.nmi_blocked = true,
        _ => {}
    }
}

fn attempt(x: &mut Exec<'_>, event: Event) -> Step {
    if x.cpu.efer.contains(Efer::LMA) {
        long::deliver(x, event)
    } else if x.cpu.cr0.contains(crate::cpu::Cr0::PE) {
        legacy::deliver(x, event)
    } else {
        real::deliver(x, event)
    }
}

/// SDM 3A table 6-5: what a second fault during the delivery of the first becomes; `None` is a triple fault.
fn combine(first: Event, second: Fault) -> Option<Fault> {
    let contributory = |f: Fault| matches!(f, Fault::De | Fault::Ts(_) | Fault::Np(_) | Fault::Ss(_) | Fault::Gp(_));
    let page_fault = |f: Fault| matches!(f, Fault::Pf { .. });
    let Event::Fault(first) = first else { return Some(second) };
    match first {
        Fault::Df if contributory(second) || page_fault(second) => None,
        f if contributory(f) && contributory(second) => Some(Fault::Df),
        f if page_fault(f) && (contributory(second) || page_fault(second)) => Some(Fault::Df),
        _ => Some(second),
    }
}

/// The stack that a frame is pushed on: not yet in the registers.
struct NewStack {
    base: u64,
    /// Checked outside 64-bit mode.
    segment: Option<Segment>,
    address: Width,
    pointer: u64,
    by: By,
    /// When there is no room.
    fault: Fault,
}

/// Pushes `values`, the first one first; all or nothing. Gives the new stack pointer.
fn push_frame(x: &mut Exec<'_>, stack: &NewStack, w: Width, values: &[u64]) -> Result<u64, Stop> {
    let slot = |n: usize| stack.address.cut(stack.pointer.wrapping_sub((n as u64 + 1) * w.bytes()));
    if let Some(top) = push_in_page(x, stack, w, values)? {
        return Ok(top);
    }
    let mut places = [None; 12];
    for (n, place) in places.iter_mut().enumerate().take(values.len()) {
        let laddr = match &stack.segment {
            None if access::is_canonical(x.cpu, slot(n)) => slot(n),
            Some(s) if access::limit_allows(s, slot(n), w.bytes()) => Width::D.cut(stack.base.wrapping_add(slot(n))),
            _ => return Err(stack.fault.into()),
        };
        *place = Some(access::place(x, laddr, w.bytes(), Access::Write, stack.by)?);
    }
    for (place, v) in places.iter().flatten().zip(values) {
        access::store_at(x, place, w, *v)?;
    }
    Ok(slot(values.len().wrapping_sub(1)))
}

/// The usual frame: of 64-bit mode, in one page of RAM, which is looked up once. `None`: nothing was done.
fn push_in_page(x: &mut Exec<'_>, stack: &NewStack, w: Width, values: &[u64]) -> Result<Option<u64>, Stop> {
    let first = stack.pointer.wrapping_sub(8);
    let below = (values.len() as u64).wrapping_sub(1).wrapping_mul(8);
    let usual = stack.segment.is_none()
        && matches!(x.mem, GuestMemory::Ram(_))
        && !x.watching
        && (stack.address, w) == (Width::Q, Width::Q)
        && stack.pointer.is_multiple_of(8)
        && access::is_canonical(x.cpu, first)
        && (below..PAGE_SIZE).contains(&(first % PAGE_SIZE));
    if !usual {
        return Ok(None);
    }
    let gpa = x.mmu.translate(x.cpu, x.mem, first, Access::Write, stack.by)?;
    for (n, v) in (0..).zip(values) {
        // RAM begins and ends with a page: all of it is there, or nothing.
        if x.mem.store(gpa.wrapping_sub(8 * n), w, *v).is_none() {
            return Ok(None);
        }
    }
    Ok(Some(first.wrapping_sub(below)))
}

/// Sets RIP and clears the flags that every handler starts without (SDM 3A 6.12.1.3).
fn enter(x: &mut Exec<'_>, rip: u64, interrupt_gate: bool) {
    x.cpu.rip = rip;
    x.cpu.rflags.remove(Rflags::TF | Rflags::NT | Rflags::RF | Rflags::VM);
    if interrupt_gate {
        x.cpu.rflags.remove(Rflags::IF);
    }
}

fn set_segment(x: &mut Exec<'_>, seg: Seg, s: Segment) {
    x.cpu.seg[seg as usize] = s;
}

#[cfg(test)]
mod tests;
