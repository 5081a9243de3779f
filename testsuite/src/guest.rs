//! Guests of our own that run in ring 0: assembled by the host's `cc`, loaded at their addresses, on the [board](crate::board).

use crate::board::Ports;
pub use crate::board::{EXIT, OUTPUT, RAISE};
use bivisor_emulator::bus::Bus;
use bivisor_emulator::cpu::{CpuState, Rflags};
use bivisor_emulator::isa::{Gpr, Width};
use bivisor_emulator::mem::{GuestMemory, Ram};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// RAM of a guest.
const RAM: u64 = 16 << 20;
/// Instructions between two looks at the clock.
const SLICE: u64 = 1_000_000;
/// Level 4, 3 and 2 of the identity mapping it starts with.
const TABLES: u64 = 0x1000;
/// The stack pointer it starts with.
const STACK: u64 = 0x9_0000;

/// Assembles a guest of testsuite/guests and gives the ELF file's bytes. `work` is a directory for it.
///
/// # Errors
/// A sentence, with what the compiler said.
pub fn assemble(name: &str, work: &Path) -> Result<Vec<u8>, String> {
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("guests").join(name);
    let out = work.join(format!("{name}.{}.elf", std::process::id()));
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let flags = ["-nostdlib", "-static", "-no-pie", "-Wl,-N", "-Wl,-Ttext=0x100000", "-Wl,--build-id=none"];
    let done = Command::new(&cc).args(flags).arg("-o").arg(&out).arg(&source).output();
    let done = done.map_err(|e| format!("no assembler: {cc} cannot be run: {e}"))?;
    if !done.status.success() {
        return Err(format!("{cc} {}: {}", source.display(), String::from_utf8_lossy(&done.stderr)));
    }
    let bytes = std::fs::read(&out).map_err(|e| format!("{}: {e}", out.display()));
    // It may stay behind; nobody reads it again.
    let _ = std::fs::remove_file(&out);
    bytes
}

/// An image of so many bytes with the header of Linux's boot protocol 2.15, one sector of setup code and an entry at 64 bits; all else is NOPs.
/// `fields`: what else the header says, by offset, value and bytes.
pub fn bzimage(size: usize, fields: &[(usize, u64, usize)]) -> Vec<u8> {
    let mut image = vec![0x90; size];
    let common = [
        (0x1f1, 1, 1),
        (0x1f4, 0, 4),
        (0x1fe, 0xaa55, 2),
        (0x200, 0x6aeb, 2),
        (0x202, 0x5372_6448, 4),
        (0x206, 0x20f, 2),
        (0x211, 1, 1),
        (0x22c, 0x7fff_ffff, 4),
        (0x236, 1, 2),
        (0x238, 0x7ff, 4),
        (0x248, 0, 8),
        (0x258, 0, 8),
    ];
    for (at, v, n) in common.iter().chain(fields) {
        image[*at..at + n].copy_from_slice(&v.to_le_bytes()[..*n]);
    }
    image
}

/// What a guest did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// What it wrote.
    pub output: String,
    /// The status it ended with.
    pub status: u8,
}

/// Puts the guest's segments into RAM; gives the entry point.
fn load(mem: &GuestMemory, elf: &[u8]) -> Result<u64, String> {
    let file = goblin::elf::Elf::parse(elf).map_err(|e| e.to_string())?;
    for p in file.program_headers.iter().filter(|p| p.p_type == goblin::elf::program_header::PT_LOAD) {
        let bytes = elf.get(p.file_range()).ok_or("a segment is not in the file")?;
        mem.write(p.p_vaddr, bytes).ok_or_else(|| format!("{:#x} is no RAM", p.p_vaddr))?;
    }
    Ok(file.entry)
}

/// 64-bit mode at CPL 0, RAM mapped one to one in pages of 2 MiB that everybody may use, interrupts off.
fn start(mem: &GuestMemory, entry: u64) -> Option<CpuState> {
    let pages = (0..RAM >> 21).map(|n| (TABLES + 0x2000 + 8 * n, n << 21 | 0x87));
    for (at, v) in [(TABLES, TABLES + 0x1007), (TABLES + 0x1000, TABLES + 0x2007)].into_iter().chain(pages) {
        mem.store(at, Width::Q, v)?;
    }
    let mut s = CpuState::long64(0);
    s.cr3 = TABLES;
    s.rip = entry;
    s.gpr[Gpr::Rsp as usize] = STACK;
    Some(s)
}

/// A guest on an engine.
struct Run<'a> {
    engine: &'a mut dyn Vcpu,
    mem: GuestMemory,
    ports: Ports,
}

impl<'a> Run<'a> {
    fn new(engine: &'a mut dyn Vcpu, elf: &[u8]) -> Result<Run<'a>, String> {
        let mem = GuestMemory::Ram(Ram::new(RAM).map_err(|e| e.to_string())?);
        let entry = load(&mem, elf)?;
        *engine.state() = start(&mem, entry).ok_or("no room for page tables")?;
        engine.set_intercepts(Intercepts::empty());
        Ok(Run { engine, mem, ports: Ports::default() })
    }

    fn some(&mut self, budget: u64) -> Exit {
        self.engine.run(Board { mem: &self.mem, bus: &self.ports }, budget)
    }

    fn ended(&self) -> bool {
        self.ports.status().is_some()
    }

    fn page(&self, n: u64) -> [u8; 4096] {
        let mut bytes = [0; 4096];
        // All pages below RAM's end are there.
        let _ = self.mem.read(n << 12, &mut bytes);
        bytes
    }
}

/// Runs a guest on two engines fresh from their constructors, as many instructions as `budget` says at a time, and compares the whole
/// state each time and all of memory in the end; gives how often that was. Their times must be repeatable.
///
/// # Errors
/// The first difference.
pub fn lockstep(
    a: &mut dyn Vcpu,
    b: &mut dyn Vcpu,
    elf: &[u8],
    mut budget: impl FnMut() -> u64,
) -> Result<u64, String> {
    let (mut a, mut b) = (Run::new(a, elf)?, Run::new(b, elf)?);
    let mut rounds = 0;
    while !a.ended() {
        let n = budget();
        let from = a.engine.state().rip;
        let exits = (a.some(n), b.some(n));
        let (x, y) = (a.engine.state().clone(), b.engine.state().clone());
        if exits.0 != exits.1 || x != y {
            return Err(format!(
                "{n} instructions from {from:#x}, round {rounds}: {:?} at {:#x}, {:?} at {:#x}\n{x:x?}\n{y:x?}",
                exits.0, x.rip, exits.1, y.rip
            ));
        }
        rounds += 1;
    }
    let differs = (0..RAM >> 12).find(|n| a.page(*n) != b.page(*n));
    match differs {
        Some(page) => Err(format!("the page at {:#x} differs", page << 12)),
        None if a.ports.output() != b.ports.output() => Err("what they wrote differs".into()),
        None => Ok(rounds),
    }
}

/// Runs a guest to its end on an engine fresh from its constructor, at most this long.
///
/// # Errors
/// A sentence: what went wrong, where, and what the guest had written until then.
pub fn run(engine: &mut dyn Vcpu, elf: &[u8], limit: Duration) -> Result<Report, String> {
    run_by(engine, elf, limit, SLICE)
}

/// As [`run`], without a budget: another thread kicks the engine every few milliseconds.
///
/// # Errors
/// As for [`run`].
pub fn run_kicked(engine: &mut dyn Vcpu, elf: &[u8], limit: Duration) -> Result<Report, String> {
    let kicker = engine.kicker();
    let done = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(3));
                kicker.kick();
            }
        });
        let report = run_by(engine, elf, limit, u64::MAX);
        done.store(true, Ordering::Relaxed);
        report
    })
}

fn run_by(engine: &mut dyn Vcpu, elf: &[u8], limit: Duration, slice: u64) -> Result<Report, String> {
    let mem = GuestMemory::Ram(Ram::new(RAM).map_err(|e| e.to_string())?);
    let entry = load(&mem, elf)?;
    *engine.state() = start(&mem, entry).ok_or("no room for page tables")?;
    engine.set_intercepts(Intercepts::empty());
    let ports = Ports::default();
    let board = Board { mem: &mem, bus: &ports };
    // Not every engine counts instructions, so the clock says when it is enough.
    let start = Instant::now();
    loop {
        let exit = engine.run(board, slice);
        if let Some(status) = ports.status() {
            return Ok(Report { output: ports.output(), status });
        }
        let waits = engine.state().rflags.contains(Rflags::IF) && ports.interrupt_pending();
        match exit {
            Exit::Budget if start.elapsed() < limit => {}
            Exit::Halt if waits => {}
            Exit::Kicked if start.elapsed() < limit => {}
            exit => {
                let rip = engine.state().rip;
                return Err(format!("{exit:?} at {rip:#x} after:\n{}", ports.output()));
            }
        }
    }
}
