//! The machine of [`crate::interp::testing`] with a GDT, a TSS and an LDT, for tests of sensitive instructions.

use crate::cpu::{CpuState, Segment, Table};
use crate::interp::testing::Machine;
use crate::isa::{Seg, Width};
use crate::vcpu::Vcpu;

/// Where the GDT lies.
pub const GDT: u64 = 0x5000;
/// Where the TSS lies.
pub const TSS_BASE: u64 = 0x6000;
/// Where the IDT lies.
pub const IDT: u64 = 0x7000;
/// Where the call gate leads.
pub const GATE_TARGET: u64 = 0x9000;

pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_CODE32: u16 = 0x18;
pub const USER_DATA: u16 = 0x20;
pub const USER_CODE: u16 = 0x28;
pub const TSS: u16 = 0x30;
pub const CONFORMING: u16 = 0x40;
pub const ABSENT_DATA: u16 = 0x48;
pub const LDT: u16 = 0x50;
/// A 64-bit call gate of DPL 3 to [`KERNEL_CODE`].
pub const GATE: u16 = 0x60;
pub const EXECUTE_ONLY: u16 = 0x70;
pub const READ_ONLY: u16 = 0x78;
/// Its accessed bit is clear.
pub const FRESH_DATA: u16 = 0x80;
pub const ABSENT_TSS: u16 = 0x88;
pub const ABSENT_CODE: u16 = 0x98;
pub const KERNEL_CODE32: u16 = 0xa0;
/// L and D both set: reserved.
pub const BAD_CODE: u16 = 0xa8;

const ENTRIES: [u64; 22] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0x0000_8900_6000_0067,
    0,
    0x00af_9f00_0000_ffff,
    0x00cf_1300_0000_ffff,
    0x0000_8200_6800_000f,
    0,
    0x0000_ec00_0008_9000,
    0,
    0x00af_f900_0000_ffff,
    0x00cf_9100_0000_ffff,
    0x00cf_9200_0000_ffff,
    0x0000_0900_6000_0067,
    0,
    0x00af_1b00_0000_ffff,
    0x00cf_9b00_0000_ffff,
    0x00ef_9b00_0000_ffff,
];

/// 64-bit mode at CPL 0 or 3 with the tables in place, RFLAGS 2.
pub fn machine(cpl: u8, code: &[u8]) -> Machine {
    let mut m = Machine::long64(cpl, code);
    for (n, entry) in ENTRIES.iter().enumerate() {
        m.mem.store(GDT + 8 * n as u64, Width::Q, *entry).expect("inside RAM");
    }
    let cpu: &mut CpuState = m.vcpu.state();
    cpu.gdtr = Table { base: GDT, limit: (8 * ENTRIES.len() - 1) as u16 };
    cpu.idtr = Table { base: IDT, limit: 0xfff };
    cpu.ldtr = Segment::unusable(0);
    cpu.tr.base = TSS_BASE;
    cpu.tr.limit = 0x67;
    cpu.tr.selector = TSS;
    let (cs, ss) = if cpl == 0 { (KERNEL_CODE, KERNEL_DATA) } else { (USER_CODE | 3, USER_DATA | 3) };
    cpu.seg[Seg::Cs as usize] = Segment::code64(cs, cpl);
    cpu.seg[Seg::Ss as usize] = Segment::data32(ss, cpl);
    m
}
