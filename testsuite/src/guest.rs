//! Guests of our own that run in ring 0: assembled by the host's `cc`, loaded at their addresses, on a board of three ports.
//!
//! | port | what |
//! | --- | --- |
//! | [`OUTPUT`] | a character of the report |
//! | [`RAISE`] | raises the external interrupt whose vector is written |
//! | [`EXIT`] | the end, with a status |

use bivisor_emulator::bus::Bus;
use bivisor_emulator::cpu::{CpuState, Rflags};
use bivisor_emulator::isa::{Gpr, Width};
use bivisor_emulator::mem::{GuestMemory, Ram};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A character of the report.
pub const OUTPUT: u16 = 0xe9;
/// Raises an interrupt.
pub const RAISE: u16 = 0xe8;
/// The end.
pub const EXIT: u16 = 0xf4;

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

/// What a guest did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// What it wrote.
    pub output: String,
    /// The status it ended with.
    pub status: u8,
}

/// The chips of the board.
#[derive(Default)]
struct Ports {
    output: Mutex<Vec<u8>>,
    raised: Mutex<VecDeque<u8>>,
    status: Mutex<Option<u8>>,
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus for Ports {
    fn read_port(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_port(&self, port: u16, data: &[u8]) {
        let Some(&v) = data.first() else { return };
        match port {
            OUTPUT => lock(&self.output).push(v),
            RAISE => lock(&self.raised).push_back(v),
            EXIT => *lock(&self.status) = Some(v),
            _ => {}
        }
    }

    fn read_mmio(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_mmio(&self, _gpa: u64, _data: &[u8]) {}

    fn interrupt_pending(&self) -> bool {
        !lock(&self.raised).is_empty()
    }

    fn take_interrupt(&self) -> Option<u8> {
        lock(&self.raised).pop_front()
    }
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

/// Runs a guest to its end on an engine fresh from its constructor, at most this long.
///
/// # Errors
/// A sentence: what went wrong, where, and what the guest had written until then.
pub fn run(engine: &mut dyn Vcpu, elf: &[u8], limit: Duration) -> Result<Report, String> {
    let mem = GuestMemory::Ram(Ram::new(RAM).map_err(|e| e.to_string())?);
    let entry = load(&mem, elf)?;
    *engine.state() = start(&mem, entry).ok_or("no room for page tables")?;
    engine.set_intercepts(Intercepts::empty());
    let ports = Ports::default();
    let board = Board { mem: &mem, bus: &ports };
    // Not every engine counts instructions, so the clock says when it is enough.
    let start = Instant::now();
    loop {
        let exit = engine.run(board, SLICE);
        let output = || String::from_utf8_lossy(&lock(&ports.output)).into_owned();
        let status = *lock(&ports.status);
        if let Some(status) = status {
            return Ok(Report { output: output(), status });
        }
        let waits = engine.state().rflags.contains(Rflags::IF) && ports.interrupt_pending();
        match exit {
            Exit::Budget if start.elapsed() < limit => {}
            Exit::Halt if waits => {}
            Exit::Kicked => {}
            exit => {
                let rip = engine.state().rip;
                return Err(format!("{exit:?} at {rip:#x} after:\n{}", output()));
            }
        }
    }
}
