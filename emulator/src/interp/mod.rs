//! The reference engine: fetch, check privilege, execute, commit.
//!
//! A function of an instruction is `fn(&mut Exec, &Insn) -> Step`. Order inside: check, read, compute, write memory, write registers,
//! set flags. RIP is the loop's: it sets [`Exec::next_rip`] to the following instruction before the call and commits it after;
//! branches change `next_rip`. An `Err` commits nothing.
//!
//! The loop checks, before it calls the function, the privilege of the facts table and the [`Intercepts`]; the functions do not.

pub mod access;
pub mod alu;
pub mod arith;
pub mod atomic;
pub mod bcd;
pub mod bit;
pub mod branch;
pub mod check;
pub mod condition;
pub mod deliver;
pub mod dispatch;
mod fetch;
pub mod flags;
pub mod hint;
mod icache;
pub mod logic;
pub mod mov;
pub mod muldiv;
pub mod names;
pub mod native;
pub mod operand;
mod run;
pub mod sensitive;
mod shape;
pub mod shift;
pub mod stack;
pub mod string;
#[cfg(test)]
pub mod testing;
mod watch;

pub use run::Prepared;

use crate::bus::Bus;
use crate::cpu::cpuid::CpuModel;
use crate::cpu::{CpuState, Fault};
use crate::isa::Insn;
use crate::mem::{GuestMemory, Mmu};
use crate::native::NativeUnit;
use crate::vcpu::{Board, Exit, Intercepts, Kicker, Measured, Vcpu};
use sensitive::time::TimeSource;
use std::sync::{Arc, OnceLock};

/// What an engine has besides the architecture.
pub struct Env {
    /// The CPU we offer: CPUID, and which instructions exist.
    pub cpu_model: Arc<CpuModel>,
    /// Where RDTSC, RDRAND and RDSEED get their numbers.
    pub time: TimeSource,
    /// Runs x87 and SIMD instructions on the host CPU.
    pub native: NativeUnit,
}

impl Env {
    /// With the given CPU.
    pub fn new(cpu_model: Arc<CpuModel>) -> Env {
        Env { cpu_model, time: TimeSource::default(), native: NativeUnit::default() }
    }
}

impl Default for Env {
    /// Offers what the host has.
    fn default() -> Env {
        static HOST: OnceLock<Arc<CpuModel>> = OnceLock::new();
        Env::new(HOST.get_or_init(|| Arc::new(CpuModel::host())).clone())
    }
}

/// What an instruction works on.
pub struct Exec<'a> {
    /// The registers.
    pub cpu: &'a mut CpuState,
    /// TLB and page walk.
    pub mmu: &'a mut Mmu,
    /// Guest memory.
    pub mem: &'a GuestMemory,
    /// Ports and memory-mapped I/O.
    pub bus: &'a dyn Bus,
    /// What leaves the engine.
    pub intercepts: Intercepts,
    /// Where the guest goes on after this instruction.
    pub next_rip: u64,
    /// What the engine has besides.
    pub env: &'a mut Env,
    /// Set when the loop must look at events after this instruction: see [`Exec::attention`].
    pub attention: bool,
    /// Breakpoints on data or ports may be hit: accesses ask.
    pub(crate) watching: bool,
    /// Those that the instruction has hit, as bits of DR6.
    pub(crate) hits: u64,
    /// What the loop knows of the state.
    pub(crate) lane: access::Lane,
}

impl Exec<'_> {
    /// Makes the loop look at events (interrupts, single step, mode) before the next instruction. Sensitive instructions have that by
    /// their facts; it is for effects that come by other ways, such as memory-mapped I/O.
    #[inline(always)]
    pub fn attention(&mut self) {
        self.attention = true;
    }
}

/// Why an instruction did not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// An exception.
    Fault(Fault),
    /// Somebody else must decide.
    Exit(Exit),
}

/// [`Why`], in one word: every function of an instruction gives it back in a register, and nearly always it is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stop(Box<Why>);

impl Stop {
    /// Leaves the engine.
    #[cold]
    pub fn exit(exit: Exit) -> Stop {
        Stop(Box::new(Why::Exit(exit)))
    }

    /// What it is.
    pub fn why(&self) -> Why {
        *self.0
    }
}

impl From<Fault> for Stop {
    #[cold]
    fn from(f: Fault) -> Stop {
        Stop(Box::new(Why::Fault(f)))
    }
}

/// The outcome of an instruction.
pub type Step = Result<(), Stop>;

/// The function of an instruction.
pub type Op = fn(&mut Exec<'_>, &Insn) -> Step;

/// The interpreter without registers: works on any [`CpuState`], so that another engine can use it for single instructions.
#[derive(Default)]
pub struct Core {
    /// TLB and page walk; flush it when the state was changed from outside.
    pub mmu: Mmu,
    /// What the engine has besides the architecture.
    pub env: Env,
    /// What leaves the engine.
    pub intercepts: Intercepts,
    icache: icache::ICache,
    /// The memory that the caches are about.
    memory: u64,
    instructions: u64,
}

impl Core {
    /// With an environment.
    pub fn new(env: Env) -> Core {
        Core { env, ..Core::default() }
    }

    /// Forgets everything cached: after a change of the offered CPU.
    pub fn forget(&mut self) {
        self.icache.clear();
        self.mmu.flush();
    }

    /// Instructions completed so far.
    pub fn instructions(&self) -> u64 {
        self.instructions
    }

    /// Exactly one instruction of `cpu`, its exception delivered if it has one: [`Exit::Budget`] if the guest goes on. Neither
    /// interrupts nor kicks are looked at.
    pub fn step(&mut self, cpu: &mut CpuState, board: Board<'_>) -> Exit {
        self.run(cpu, board, 1, None)
    }
}

/// The reference engine.
#[derive(Default)]
pub struct Interpreter {
    cpu: Box<CpuState>,
    core: Core,
    kicker: Kicker,
}

impl Interpreter {
    /// Offers `cpu_model`; in the state after RESET.
    pub fn new(cpu_model: Arc<CpuModel>) -> Interpreter {
        Interpreter { core: Core::new(Env::new(cpu_model)), ..Interpreter::default() }
    }

    /// What the engine has besides the architecture.
    pub fn env(&mut self) -> &mut Env {
        self.core.forget();
        &mut self.core.env
    }

    /// Exactly one instruction: see [`Core::step`].
    pub fn step(&mut self, board: Board<'_>) -> Exit {
        self.core.mmu.flush();
        self.core.step(&mut self.cpu, board)
    }
}

impl Vcpu for Interpreter {
    fn run(&mut self, board: Board<'_>, budget: u64) -> Exit {
        self.core.run(&mut self.cpu, board, budget, Some(&self.kicker))
    }

    fn state(&mut self) -> &mut CpuState {
        // The caller may change control registers.
        self.core.mmu.flush();
        &mut self.cpu
    }

    fn set_intercepts(&mut self, intercepts: Intercepts) {
        self.core.intercepts = intercepts;
    }

    fn kicker(&self) -> Kicker {
        self.kicker.clone()
    }

    fn instructions(&self) -> Option<u64> {
        Some(self.core.instructions)
    }

    fn measure(&mut self) {
        self.core.mmu.count();
    }

    fn measured(&self) -> Measured {
        let (tlb_hits, tlb_misses) = self.core.mmu.lookups().unzip();
        Measured { costs: Vec::new(), tlb_hits, tlb_misses }
    }

    fn survives_fork(&mut self) -> bool {
        true
    }
}
