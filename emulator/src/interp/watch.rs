//! Breakpoints of the debug registers: instructions, data and I/O ports (SDM 3B 17.2).
//!
//! Data and I/O breakpoints are traps: what an instruction hits is noted while it runs, and the loop looks afterwards. While any
//! breakpoint is enabled every instruction goes the careful way, so the accesses of the hot loop need not ask.

use crate::cpu::{CpuState, Cr4, Rflags};
use crate::interp::Exec;
use crate::isa::Seg;
use crate::mem::Access;

/// DR7: a breakpoint is enabled, locally or globally.
const ENABLES: u64 = 0xff;

/// What a breakpoint is about: the R/W field of DR7.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Execute,
    Write,
    Io,
    ReadWrite,
}

/// An enabled breakpoint.
struct Breakpoint {
    kind: Kind,
    start: u64,
    len: u64,
    /// Its bit in DR6.
    bit: u64,
}

/// Is any breakpoint enabled?
#[inline(always)]
pub fn enabled(cpu: &CpuState) -> bool {
    cpu.dr7 & ENABLES != 0
}

fn breakpoints(cpu: &CpuState) -> impl Iterator<Item = Breakpoint> {
    let (dr, dr7, io) = (cpu.dr, cpu.dr7, cpu.cr4.contains(Cr4::DE));
    (0..4).filter(move |n| dr7 >> (2 * n) & 3 != 0).filter_map(move |n: usize| {
        let field = dr7 >> (16 + 4 * n) & 0xf;
        let kind = match field & 3 {
            0 => Kind::Execute,
            1 => Kind::Write,
            // "When the DE flag is clear": undefined.
            2 if io => Kind::Io,
            2 => return None,
            _ => Kind::ReadWrite,
        };
        let len = [1, 2, 8, 4][(field >> 2) as usize];
        // Low bits of the address that the length covers are ignored.
        Some(Breakpoint { kind, start: dr[n] & !(len - 1), len, bit: 1 << n })
    })
}

fn overlaps(b: &Breakpoint, start: u64, len: u64) -> bool {
    start <= b.start.wrapping_add(b.len - 1) && b.start <= start.wrapping_add(len - 1)
}

/// The instruction breakpoints that RIP hits, as bits of DR6. RF holds them for one instruction, and so does a load of SS on Intel's
/// processors (SDM 3A 6.8.3); AMD's hold only traps then.
pub fn at_rip(x: &Exec<'_>) -> u64 {
    let cpu = &*x.cpu;
    let held = cpu.interrupt_shadow && cpu.ss_shadow && x.env.cpu_model.is_intel();
    if !enabled(cpu) || cpu.rflags.contains(Rflags::RF) || held {
        return 0;
    }
    let laddr = if cpu.mode().bitness() == 64 {
        cpu.rip
    } else {
        cpu.segment(Seg::Cs).base.wrapping_add(cpu.rip) & 0xffff_ffff
    };
    breakpoints(cpu).filter(|b| b.kind == Kind::Execute && b.start == laddr).fold(0, |bits, b| bits | b.bit)
}

/// Notes the data breakpoints that an access hits.
#[cold]
pub fn data(x: &mut Exec<'_>, laddr: u64, len: u64, access: Access) {
    let matters = |k| k == Kind::ReadWrite || (k == Kind::Write && access == Access::Write);
    x.hits |= breakpoints(x.cpu)
        .filter(|b| matters(b.kind) && access != Access::Execute && overlaps(b, laddr, len))
        .fold(0, |bits, b| bits | b.bit);
}

/// Notes the I/O breakpoints that an access hits.
pub fn port(x: &mut Exec<'_>, port: u16, len: u64) {
    if x.watching {
        let (cpu, port) = (&*x.cpu, u64::from(port));
        x.hits |=
            breakpoints(cpu).filter(|b| b.kind == Kind::Io && overlaps(b, port, len)).fold(0, |bits, b| bits | b.bit);
    }
}
