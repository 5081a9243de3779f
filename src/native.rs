//! Pieces of 64-bit code on the host itself, at CPL 3 in a [`Vessel`]: what arrives, which signal comes, what it costs.

use crate::vessel::{Registers, Vessel};
use anyhow::Result;
use std::time::{Duration, Instant};

/// Where the code lies: below 4 GiB, for far pointers of 32 bits.
pub const CODE: u64 = 0x4000_0000;
/// Two pages that it may write; RSI, RDI and RBX point to the second.
pub const SCRATCH: u64 = 0x4100_0000;
const STACK: u64 = 0x4200_0000;
const PAGE: u64 = 4096;
const LIMIT: Duration = Duration::from_secs(5);
/// SI_KERNEL: a fault that is no page fault.
const SI_KERNEL: i32 = 0x80;
/// Linux's selectors for 64-bit users.
const USER_CS: u64 = 0x33;
const USER_SS: u64 = 0x2b;

/// How a piece of code ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ran to its end, with this in RAX.
    Done(u64),
    /// An exception that the host's kernel turned into a signal.
    Exception(&'static str),
    /// It got as far as a system call of the host (which was not carried out).
    SystemCall,
}

/// A place to try code in.
pub struct Native {
    vessel: Vessel,
}

impl Native {
    /// One child process.
    ///
    /// # Errors
    /// The host refuses ptrace(2).
    pub fn new() -> Result<Native> {
        let mut vessel = Vessel::new()?;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        vessel.map(CODE, 2 * PAGE, libc::PROT_READ | libc::PROT_EXEC)?;
        vessel.map(SCRATCH, 2 * PAGE, rw)?;
        vessel.map(STACK, 4 * PAGE, rw)?;
        Ok(Native { vessel })
    }

    fn start(&mut self, code: &[u8]) -> Result<()> {
        self.vessel.write(CODE, code)?;
        let mut r: Registers = self.vessel.registers()?;
        let at = SCRATCH + PAGE;
        (r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp) = (at, at, 0, 0, at, at, at);
        (r.rsp, r.rip, r.eflags, r.orig_rax) = (STACK + 2 * PAGE, CODE, 0x202, u64::MAX);
        (r.cs, r.ss) = (USER_CS, USER_SS);
        (r.ds, r.es, r.fs, r.gs, r.fs_base, r.gs_base) = (0, 0, 0, 0, 0, 0);
        self.vessel.set_registers(&r)
    }

    /// Runs code once. It ends where HLT follows it.
    ///
    /// # Errors
    /// The child is gone or hangs.
    pub fn run(&mut self, code: &[u8]) -> Result<Outcome> {
        self.start(&[code, &[0xf4]].concat())?;
        let stop = self.vessel.run_for(LIMIT)?;
        let r = self.vessel.registers()?;
        Ok(match stop.signal {
            _ if stop.syscall => Outcome::SystemCall,
            libc::SIGSEGV if stop.code == SI_KERNEL && r.rip == CODE + code.len() as u64 => Outcome::Done(r.rax),
            libc::SIGSEGV if stop.code == SI_KERNEL => Outcome::Exception("#GP"),
            libc::SIGSEGV => Outcome::Exception("#PF"),
            libc::SIGILL => Outcome::Exception("#UD"),
            libc::SIGTRAP if stop.code == SI_KERNEL => Outcome::Exception("#BP"),
            libc::SIGTRAP => Outcome::Exception("#DB"),
            libc::SIGFPE => Outcome::Exception("#DE"),
            libc::SIGBUS => Outcome::Exception("#AC"),
            _ => Outcome::Exception("another"),
        })
    }

    /// Nanoseconds of a processor for one execution of `code`, which keeps R15, in a loop; the cheapest of several. `None` if it does not come to its
    /// end.
    ///
    /// # Errors
    /// The child is gone or hangs.
    pub fn cost(&mut self, code: &[u8], turns: u32) -> Result<Option<f64>> {
        let (mut one, mut many) = (f64::MAX, f64::MAX);
        for _ in 0..3 {
            let (Some(a), Some(b)) = (self.time(code, 1)?, self.time(code, turns + 1)?) else { return Ok(None) };
            (one, many) = (one.min(a), many.min(b));
        }
        Ok(Some((many - one).max(0.0) / f64::from(turns)))
    }

    fn time(&mut self, code: &[u8], turns: u32) -> Result<Option<f64>> {
        // mov r15d, turns; code; dec r15d; jnz code; hlt
        let mut all = vec![0x41, 0xbf];
        all.extend(turns.to_le_bytes());
        all.extend(code);
        all.extend([0x41, 0xff, 0xcf, 0x0f, 0x85]);
        all.extend((-(code.len() as i32 + 9)).to_le_bytes());
        let end = CODE + all.len() as u64;
        all.push(0xf4);
        self.start(&all)?;
        // The other programs of a busy host do not count.
        let start = self.vessel.processor_time();
        let stop = self.vessel.run_for(LIMIT)?;
        let elapsed = self.vessel.processor_time() - start;
        let done = stop.signal == libc::SIGSEGV && self.vessel.registers()?.rip == end;
        Ok(done.then_some(elapsed))
    }

    /// Nanoseconds from a faulting instruction to us and back: what trap-and-emulate pays before it emulates.
    ///
    /// # Errors
    /// The child is gone.
    pub fn trap_cost(&mut self) -> Result<f64> {
        let mut best = f64::MAX;
        for _ in 0..200 {
            self.start(&[0xf4])?;
            let start = Instant::now();
            self.vessel.run(false)?;
            let r = self.vessel.registers()?;
            self.vessel.set_registers(&r)?;
            best = best.min(start.elapsed().as_nanos() as f64);
        }
        Ok(best)
    }
}
