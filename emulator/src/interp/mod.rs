//! The reference engine: fetch, check privilege, execute, commit.
//!
//! A function of an instruction is `fn(&mut Exec, &Insn) -> Step`. Order inside: check, read, compute, write memory, write registers,
//! set flags. RIP is the loop's: it sets [`Exec::next_rip`] to the following instruction before the call and commits it after;
//! branches change `next_rip`. An `Err` commits nothing.

pub mod sensitive;

use crate::bus::Bus;
use crate::cpu::{CpuState, Fault};
use crate::isa::Insn;
use crate::mem::GuestMemory;
use crate::vcpu::{Exit, Intercepts};

/// What an instruction works on.
pub struct Exec<'a> {
    /// The registers.
    pub cpu: &'a mut CpuState,
    /// Guest memory.
    pub mem: &'a GuestMemory,
    /// Ports and memory-mapped I/O.
    pub bus: &'a dyn Bus,
    /// What leaves the engine.
    pub intercepts: Intercepts,
    /// Where the guest goes on after this instruction.
    pub next_rip: u64,
}

/// Why an instruction did not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// An exception.
    Fault(Fault),
    /// Somebody else must decide.
    Exit(Exit),
}

impl From<Fault> for Stop {
    fn from(f: Fault) -> Stop {
        Stop::Fault(f)
    }
}

/// The outcome of an instruction.
pub type Step = Result<(), Stop>;

/// The function of an instruction.
pub type Op = fn(&mut Exec<'_>, &Insn) -> Step;
