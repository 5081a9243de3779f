//! The contract of the three engines: [`Vcpu`], why it returns ([`Exit`]), and what it is told to stop at ([`Intercepts`]).

use crate::bus::Bus;
use crate::cpu::{CpuState, Fault};
pub use crate::host::kicker::Kicker;
pub use crate::host::stopwatch::Cost;
use crate::mem::GuestMemory;

/// What a virtual CPU is plugged into.
#[derive(Clone, Copy)]
pub struct Board<'a> {
    /// Guest-physical memory, or the process's address space.
    pub mem: &'a GuestMemory,
    /// Ports, memory-mapped I/O, interrupts.
    pub bus: &'a dyn Bus,
}

bitflags::bitflags! {
    /// Events that leave the engine instead of being carried out, after the VMCB's intercept vectors (APM 2 15.9).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct Intercepts: u32 {
        /// SYSCALL.
        const SYSCALL = 1;
        /// INT n, INT1, INT3, INTO.
        const INT_N = 1 << 1;
        /// HLT.
        const HLT = 1 << 2;
        /// CPUID.
        const CPUID = 1 << 3;
        /// RDTSC, RDTSCP.
        const RDTSC = 1 << 4;
        /// RDRAND, RDSEED.
        const RDRAND = 1 << 5;
        /// Any exception: it is returned, not delivered; the state is that before delivery.
        const EXCEPTIONS = 1 << 6;
        /// SYSENTER.
        const SYSENTER = 1 << 7;
    }
}

/// System calls that [`Vcpu::set_direct`] can speak of: those with smaller numbers.
pub const DIRECT_CALLS: usize = 512;

/// Why an engine returned. RIP is at the instruction unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// An intercepted instruction, not executed. For [`Intercepts::INT_N`] `vector` is the n of INT n, else 0.
    Intercept {
        /// Exactly one bit.
        what: Intercepts,
        /// Where the guest goes on if the instruction is taken as done.
        next_rip: u64,
        /// The vector of INT n.
        vector: u8,
    },
    /// An exception under [`Intercepts::EXCEPTIONS`]; for traps (#BP, #OF, single step) RIP is past the instruction.
    Exception(Fault),
    /// HLT was executed; RIP is past it.
    Halt,
    /// Triple fault.
    Shutdown,
    /// `budget` instructions were executed.
    Budget,
    /// A [`Kicker`] asked.
    Kicked,
    /// The engine cannot do the instruction at RIP.
    Unsupported,
    /// A system call that the engine has carried out as [`Vcpu::set_direct`] allows, with the result in RAX, was interrupted (EINTR) or
    /// met memory that the kernel may not write (EFAULT). RIP is past it.
    Made {
        /// The call.
        number: u32,
    },
}

/// What an engine has measured since [`Vcpu::measure`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// What leaving the guest cost, by class of reason.
    pub costs: Vec<Cost>,
    /// Accesses that found their page in the TLB, where the engine can count them.
    pub tlb_hits: Option<u64>,
    /// Accesses that did not.
    pub tlb_misses: Option<u64>,
}

/// An engine: one virtual CPU. It can be asked as [`std::any::Any`] which one it is, for counters that only that one has.
pub trait Vcpu: std::any::Any {
    /// Runs at most `budget` instructions (`u64::MAX`: no limit; an engine that cannot count exactly when the budget is large may
    /// overshoot, but `1` is always exact).
    fn run(&mut self, board: Board<'_>, budget: u64) -> Exit;
    /// Runs a stretch of at most `most` instructions as the engine runs at full speed where it can, and comes back at the end of what
    /// it takes as one: at the latest after a branch. Also how many instructions were completed; an engine that does not count takes
    /// each element of a repetition for one.
    fn run_stretch(&mut self, board: Board<'_>, most: u64) -> (Exit, u64) {
        match self.instructions() {
            Some(before) => {
                let exit = self.run(board, most);
                (exit, self.instructions().unwrap_or(before) - before)
            }
            None => {
                let exit = self.run(board, 1);
                (exit, u64::from(exit == Exit::Budget))
            }
        }
    }
    /// The state, to read and to change; `run` goes on from it.
    fn state(&mut self) -> &mut CpuState;
    /// The state without what is costly to fetch from hardware: `xsave` may be stale, and changes of it may be lost. For system
    /// calls, which need the general registers and the segments only.
    fn integer_state(&mut self) -> &mut CpuState {
        self.state()
    }
    /// What to stop at, from the next `run` on.
    fn set_intercepts(&mut self, intercepts: Intercepts);
    /// Where `calls` is 0 for its number, the engine may carry out a system call as the host's with the guest's registers, instead of
    /// stopping at it.
    fn set_direct(&mut self, _calls: &'static [u8; DIRECT_CALLS]) {}
    /// The way to stop it.
    fn kicker(&self) -> Kicker;
    /// Calls `fork`, which forks the process and comes back twice, while it holds the locks that it shares with other engines: the
    /// child shall not get a taken one.
    fn around_fork(&mut self, fork: &mut dyn FnMut()) {
        fork();
    }
    /// In the child after fork(2): does this engine go on there as it is? If not, a new one takes over its state.
    fn survives_fork(&mut self) -> bool {
        false
    }
    /// Instructions completed so far (HLT and those that trapped are, those that faulted or were intercepted are not), where the
    /// engine counts them.
    fn instructions(&self) -> Option<u64> {
        None
    }
    /// From now on measures what takes time to measure.
    fn measure(&mut self) {}
    /// What it has measured of machines.
    fn measured(&self) -> Measured {
        Measured::default()
    }
}

impl<V: Vcpu + ?Sized> Vcpu for Box<V> {
    fn run(&mut self, board: Board<'_>, budget: u64) -> Exit {
        (**self).run(board, budget)
    }
    fn run_stretch(&mut self, board: Board<'_>, most: u64) -> (Exit, u64) {
        (**self).run_stretch(board, most)
    }
    fn state(&mut self) -> &mut CpuState {
        (**self).state()
    }
    fn integer_state(&mut self) -> &mut CpuState {
        (**self).integer_state()
    }
    fn set_intercepts(&mut self, intercepts: Intercepts) {
        (**self).set_intercepts(intercepts);
    }
    fn set_direct(&mut self, calls: &'static [u8; DIRECT_CALLS]) {
        (**self).set_direct(calls);
    }
    fn kicker(&self) -> Kicker {
        (**self).kicker()
    }
    fn around_fork(&mut self, fork: &mut dyn FnMut()) {
        (**self).around_fork(fork);
    }
    fn survives_fork(&mut self) -> bool {
        (**self).survives_fork()
    }
    fn instructions(&self) -> Option<u64> {
        (**self).instructions()
    }
    fn measure(&mut self) {
        (**self).measure();
    }
    fn measured(&self) -> Measured {
        (**self).measured()
    }
}

/// How an engine carries out an instruction; each engine exports `fn how(code: iced_x86::Code) -> How`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum How {
    /// By a function of the interpreter.
    Function,
    /// Copied into the code cache as it is or with operands changed.
    Copied,
    /// Rewritten into a short in-cache sequence.
    Rewritten,
    /// On the host CPU through a thunk.
    Native,
    /// By a call-out to one interpreter step.
    ByInterpreter,
    /// By the hardware.
    Hardware,
    /// Leaves the guest for the monitor.
    Exits,
    /// Not at all: [`Exit::Unsupported`] or #UD.
    Unsupported,
}
