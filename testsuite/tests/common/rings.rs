//! Segments of a kernel and its user, and gates for exceptions, of a guest in 64-bit mode.

use bivisor_emulator::cpu::{CpuState, Segment};
use bivisor_emulator::isa::Width;
use bivisor_emulator::mem::GuestMemory;

/// Null; the kernel's code and data; null; the user's data, code, and other data.
const SEGMENTS: [u64; 7] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
];

/// Writes GDT, IDT and TSS to these addresses, with handlers for vectors, which begin with that stack pointer; and loads their registers.
pub fn prepare(
    mem: &GuestMemory,
    s: &mut CpuState,
    [gdt, idt, tss]: [u64; 3],
    stack: u64,
    handlers: impl IntoIterator<Item = (u8, u64)>,
) {
    let put = |at: u64, v: u64| mem.store(at, Width::Q, v).expect("in RAM");
    for (vector, at) in handlers {
        let gate = idt + 16 * u64::from(vector);
        put(gate, at & 0xffff | 8 << 16 | 0x8e00 << 32 | (at >> 16 & 0xffff) << 48);
        put(gate + 8, at >> 32);
    }
    for (n, d) in SEGMENTS.into_iter().enumerate() {
        put(gdt + 8 * n as u64, d);
    }
    put(tss + 4, stack);
    (s.gdtr.base, s.gdtr.limit) = (gdt, 8 * SEGMENTS.len() as u16 - 1);
    (s.idtr.base, s.idtr.limit) = (idt, 0xfff);
    s.tr = Segment { base: tss, limit: 0x67, ..s.tr };
}
