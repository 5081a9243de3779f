//! Single pieces of 64-bit code under this host's KVM, as it is: what arrives, what is raised, what it costs.
//!
//! The guest is the probe's ([`mod@crate::host`]): its GDT, IDT and task register are known, so a value that is not theirs is the host's.

use crate::host::{CS3, FS3, GDT, IDT, Left, Sandbox, TR, leave};
use bivisor_emulator::cpu::Rflags;
use std::io;
use std::time::Instant;

/// How a piece of code ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ran to its end, with this in RAX.
    Done(u64),
    /// This exception came.
    Exception(u8),
    /// KVM cannot emulate it: KVM_EXIT_INTERNAL_ERROR.
    NotEmulated,
    /// Something else, as KVM calls it.
    Other(String),
}

/// What the guest has, as its instructions must show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Base of the GDT, of 4 entries.
    pub gdt: u64,
    /// Base of the IDT.
    pub idt: u64,
    /// Task register.
    pub tr: u16,
    /// CS at CPL 3.
    pub cs: u16,
    /// FS at CPL 3.
    pub fs: u16,
}

/// See [`Expected`].
pub const EXPECTED: Expected = Expected { gdt: GDT, idt: IDT, tr: TR, cs: CS3, fs: FS3 };

/// A guest to try code in.
pub struct Samples {
    sandbox: Sandbox,
}

impl Samples {
    /// One virtual machine.
    ///
    /// # Errors
    /// The host's, if KVM does not work here.
    pub fn new() -> io::Result<Samples> {
        Ok(Samples { sandbox: Sandbox::new()? })
    }

    /// Runs 64-bit code once at a privilege level, with these flags at its start.
    ///
    /// # Errors
    /// The host's.
    pub fn run(&mut self, cpl: u8, code: &[u8], rflags: u64, umip: bool) -> io::Result<Outcome> {
        self.sandbox.write(&[code, &leave()].concat());
        let left = self.sandbox.run_strange(cpl, Rflags::from_bits_retain(rflags) | Rflags::FIXED, umip)?;
        Ok(match left {
            Left::Mmio => Outcome::Done(self.sandbox.registers().rax),
            Left::Vector(v) => Outcome::Exception(v),
            Left::NotEmulated => Outcome::NotEmulated,
            Left::Other(what) => Outcome::Other(what),
        })
    }

    /// Nanoseconds for one execution of `code`, which keeps R15, in a loop; `None` if it does not come to its end.
    ///
    /// # Errors
    /// The host's.
    pub fn cost(&mut self, cpl: u8, code: &[u8], turns: u32) -> io::Result<Option<f64>> {
        let mut time = |code: &[u8], turns: u32| -> io::Result<Option<f64>> {
            // mov r15d, turns; code; dec r15d; jnz code
            let mut all = vec![0x41, 0xbf];
            all.extend(turns.to_le_bytes());
            all.extend(code);
            all.extend([0x41, 0xff, 0xcf, 0x0f, 0x85]);
            all.extend((-(code.len() as i32 + 9)).to_le_bytes());
            all.extend(leave());
            self.sandbox.write(&all);
            let start = Instant::now();
            let left = self.sandbox.run(cpl, 0)?;
            Ok((left == Left::Mmio).then(|| start.elapsed().as_nanos() as f64))
        };
        let (mut one, mut many) = (f64::MAX, f64::MAX);
        for _ in 0..3 {
            let (Some(a), Some(b)) = (time(code, 1)?, time(code, turns + 1)?) else { return Ok(None) };
            (one, many) = (one.min(a), many.min(b));
        }
        Ok(Some((many - one).max(0.0) / f64::from(turns)))
    }
}
