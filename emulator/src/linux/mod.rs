//! The Linux process personality: a process is an engine told to stop at SYSCALL.
//!
//! Guest address = host address, each guest thread is a host thread with a virtual CPU of its own, and most system calls are the
//! host's with the same arguments; [`table`] says for each which way it goes.
//!
//! | file | holds |
//! | --- | --- |
//! | [`load`] | from a path to a program ready to run; `#!` scripts |
//! | [`elf`] | ELF headers and segments |
//! | [`stack`] | argv, envp and auxv on the initial stack |
//! | [`mm`] | mmap and its kin |
//! | [`mod@file`] | calls that name files or descriptors of bivisor |
//! | [`proc`] | the files of /proc that show the guest |
//! | [`misc`] | exit, prctl, arch_prctl, personality |
//! | [`start`] | making the process |
//! | [`strace`] | what `--strace` prints |
//! | [`crash`] | what is said when the guest dies of a fault |
//! | [`run`] | the loop of a task: run the engine, act on why it returned |
//! | [`table`] | every system call: passed through, handled or refused, with a note |
//! | [`syscall`] | the way of a call through the table |
//! | [`host`] | the call into the host's kernel |
//! | [`vsyscall`] | the three functions of the vsyscall page |
//! | [`signal`] | signals: what the guest does about them, delivery |
//! | [`sigcalls`] | the system calls about signals |
//! | [`clone`] | new tasks: what is asked for |
//! | [`thread`] | guest threads |
//! | [`limits`] | the limit of the address space |
//! | [`process_control`] | guest processes: fork, vfork |
//! | [`exec`] | execve |
//! | [`in_place`] | execve without a new host process |
//! | [`fault`] | which signal an exception becomes |
//! | [`frame`] | the frame of a signal handler |

pub mod clone;
pub mod crash;
pub mod elf;
pub mod exec;
pub mod fault;
pub mod file;
pub mod frame;
pub mod host;
pub mod in_place;
pub mod limits;
pub mod load;
pub mod misc;
pub mod mm;
pub mod proc;
pub mod process_control;
pub mod run;
pub mod sigcalls;
pub mod signal;
pub mod stack;
pub mod start;
pub mod strace;
pub mod syscall;
pub mod table;
pub mod thread;
pub mod vsyscall;

pub use load::{Image, LoadError, Why};

use crate::bus::EmptyBus;
use crate::cpu::cpuid::CpuModel;
use crate::mem::flat::Backing;
use crate::mem::{FlatSpace, GuestMemory};
use crate::vcpu::{Board, Intercepts, Vcpu};
use std::ffi::OsString;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

/// Makes an engine for a new guest thread; also called in the child after fork, where the parent's engines are no longer usable.
pub type VcpuFactory = Arc<dyn Fn() -> Result<Box<dyn Vcpu>, String> + Send + Sync>;

/// What every engine of a Linux process stops at.
pub const INTERCEPTS: Intercepts = Intercepts::SYSCALL
    .union(Intercepts::INT_N)
    .union(Intercepts::EXCEPTIONS)
    .union(Intercepts::SYSENTER)
    .union(Intercepts::HLT);

/// What the user asked for.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Print each system call.
    pub strace: bool,
    /// The descriptor for bivisor's own messages, a copy of standard error out of the guest's way; else standard error itself.
    pub log: Option<i32>,
    /// Say more about what is done.
    pub verbose: bool,
    /// The arguments between `bivisor` and `--argv0 X -- PATH ARGS` with which a guest's exec starts the next program, e.g.
    /// `run --backend interp`.
    pub reexec: Vec<OsString>,
    /// Asked when the process ends; what it gives goes to the log.
    pub last_words: LastWords,
    /// See [`in_place`].
    pub successor: Successor,
}

/// Told the file of a program that is about to take the place of the one that ran, and what that one has in memory; gives its last
/// words. Without it every exec is the host's.
#[derive(Clone, Default)]
pub struct Successor(pub Option<Arc<Told>>);

/// See [`Successor`].
pub type Told = dyn Fn(&Path, &FlatSpace) -> LastWords + Send + Sync;

impl std::fmt::Debug for Successor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Successor({})", self.0.is_some())
    }
}

/// What is to be said when a process ends, by exit_group(2), by a signal or with its first thread.
#[derive(Clone, Default)]
pub struct LastWords(pub Option<Arc<dyn Fn() -> String + Send + Sync>>);

impl std::fmt::Debug for LastWords {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LastWords({})", self.0.is_some())
    }
}

/// The guest's address space, shared by tasks with CLONE_VM.
pub struct AddressSpace {
    /// The guest's memory, always [`GuestMemory::Flat`].
    pub mem: GuestMemory,
    /// The program break; also the lock that serializes changes of mappings.
    pub brk: Mutex<Brk>,
    /// Below the stack, where nothing is the guest's and nothing else shall lie.
    pub gap: Mutex<Range<u64>>,
    /// Where the program before this one in the same host process had its files: with them there again, code made from them is good.
    pub places: Vec<(Backing, u64)>,
}

/// The heap that brk(2) moves the end of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Brk {
    /// First address.
    pub start: u64,
    /// The break, as the guest set it.
    pub end: u64,
}

/// One guest process (a thread group).
pub struct Process {
    /// The address space.
    pub space: Arc<AddressSpace>,
    /// Makes engines.
    pub factory: VcpuFactory,
    /// What the user asked for.
    pub options: Options,
    /// The program that runs, as /proc/self/exe shows it.
    pub exe: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Its environment at the start.
    pub env: Vec<OsString>,
    /// The host's kernel shows arguments and environment of the guest in /proc.
    pub shown_by_kernel: bool,
    /// The task that bivisor was started for: its lines of `--strace` go without a number.
    pub first: i32,
    /// What the guest does about signals.
    pub signals: signal::Dispositions,
    /// The CPU that programs are told of.
    pub cpu: Arc<CpuModel>,
    /// Something was done that only the host's exec undoes.
    pub host_exec: AtomicBool,
    /// How much it may map.
    pub address_limit: limits::AddressLimit,
}

impl Process {
    /// The guest's memory.
    pub fn mem(&self) -> &GuestMemory {
        &self.space.mem
    }

    /// Before the host process ends without coming back: what is left to say.
    pub fn finish(&self) {
        if let Some(words) = &self.options.last_words.0 {
            let words = words();
            if !words.is_empty() {
                strace::say(self, &words);
            }
        }
    }

    /// What an engine of this process is plugged into.
    pub fn board(&self) -> Board<'_> {
        Board { mem: self.mem(), bus: &EmptyBus }
    }
}

/// One guest thread; lives on the host thread that runs it.
pub struct Task {
    /// What it belongs to.
    pub process: Arc<Process>,
    /// Its processor, told to stop at [`INTERCEPTS`].
    pub vcpu: Box<dyn Vcpu>,
    /// Its thread id, the host's.
    pub tid: i32,
    /// Signals queued, blocked and being handled.
    pub signals: signal::TaskSignals,
    /// Where its end is told: 0 is stored there and a waiter woken (set_tid_address(2)); 0: nowhere.
    pub clear_child_tid: u64,
    /// What an exec under way gives to the host.
    pub exec: exec::Arguments,
}

impl Task {
    /// A task for the calling thread with a fresh engine; the registers are the caller's business.
    ///
    /// # Errors
    /// What the factory says.
    pub fn new(process: Arc<Process>) -> Result<Task, String> {
        let mut vcpu = (process.factory)()?;
        vcpu.set_intercepts(INTERCEPTS);
        if !process.options.strace {
            vcpu.set_direct(table::direct());
        }
        let signals = signal::TaskSignals::new(vcpu.kicker());
        Ok(Task { process, vcpu, tid: host::gettid(), signals, clear_child_tid: 0, exec: exec::Arguments::default() })
    }
}

/// How a task or process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// exit(2): the low 8 bits are what the parent sees.
    Code(i32),
    /// Death by this signal.
    Signal(i32),
}

/// What the loop of a task does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Run the guest.
    Continue,
    /// The task ends.
    Exit(ExitStatus),
}
