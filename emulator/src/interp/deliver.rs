//! Delivery of exceptions and interrupts through the IDT or the interrupt vector table (SDM 3A 6).

use crate::cpu::Fault;
use crate::interp::{Exec, Stop};
use crate::vcpu::Exit;

/// What is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An exception.
    Fault(Fault),
    /// An external interrupt.
    External(u8),
    /// INT n, INT3, INTO: the gate's DPL is checked.
    Software(u8),
    /// INT1: #DB without a check of the gate's DPL.
    SoftwareIcebp,
    /// A non-maskable interrupt.
    Nmi,
}

/// Delivers `event`: the state is then at the handler. The return address is `x.cpu.rip` for faults and `x.next_rip` for the others.
///
/// # Errors
/// [`Exit::Shutdown`] on a triple fault.
pub fn deliver(x: &mut Exec<'_>, event: Event) -> Result<(), Stop> {
    let _ = (x, event);
    Err(Stop::Exit(Exit::Unsupported))
}
