//! The segments of cases in 16- and 32-bit code: Linux's own, and a local descriptor table with limits, bases and rights of all sorts
//! (SDM 3A 3.4.5; modify_ldt(2)).

use crate::campaign::arena::{BASE, CODE, DATA};
use bivisor_emulator::cpu::Segment;
use bivisor_emulator::cpu::descriptor::Descriptor;
use bivisor_emulator::interp::sensitive::selector::linux_descriptor;

/// An entry of the local descriptor table, as modify_ldt(2) takes it. All have DPL 3 and are accessed.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Base address.
    pub base: u64,
    /// The limit's 20 bits.
    pub limit: u32,
    /// D/B: 32-bit code, big stack.
    pub big: bool,
    /// Bits 3:2 of the type: 0 data, 1 expand-down data, 2 code, 3 conforming code.
    pub contents: u32,
    /// Data that cannot be written, code that cannot be read.
    pub less: bool,
    /// The limit counts pages.
    pub pages: bool,
    /// Present.
    pub present: bool,
}

const fn entry(base: u64, limit: u32, big: bool, contents: u32) -> Entry {
    Entry { base, limit, big, contents, less: false, pages: false, present: true }
}

/// Where ordinary data segments begin: 16-bit offsets reach all data from there.
const LOW: u64 = DATA - 0x4000;
/// The first byte behind the short code segments.
pub const SHORT_END: u64 = CODE + 0x1800;

/// The table.
pub const LDT: [Entry; 19] = [
    entry(BASE, 0xffff, false, 2),
    entry(BASE, 0xffff, true, 2),
    Entry { less: true, ..entry(BASE, 0xffff, true, 2) },
    entry(BASE, (SHORT_END - BASE - 1) as u32, true, 2),
    entry(BASE, (SHORT_END - BASE - 1) as u32, false, 2),
    entry(LOW, 0xffff, false, 0),
    entry(LOW, 0xffff, true, 0),
    entry(DATA, 0x1fff, true, 0),
    Entry { less: true, ..entry(DATA, 0x3fff, true, 0) },
    entry(BASE, 0x11fff, true, 1),
    entry(LOW, 0x5fff, false, 1),
    Entry { present: false, ..entry(LOW, 0xffff, true, 0) },
    Entry { present: false, ..entry(BASE, 0xffff, true, 2) },
    Entry { pages: true, ..entry(DATA, 4, true, 0) },
    Entry { present: false, ..entry(BASE, 0xffff, true, 3) },
    entry(DATA + 0x1234, 0xfff, false, 0),
    // Its offsets wrap at 4 GiB.
    Entry { pages: true, ..entry(0xffff_f000, 0xf_ffff, true, 0) },
    Entry { less: true, ..entry(LOW, 0x4fff, true, 1) },
    Entry { less: true, ..entry(BASE, 0xffff, false, 2) },
];

/// The selector of an entry.
pub const fn selector(n: usize) -> u16 {
    (n as u16) << 3 | 7
}

/// Linux's 32-bit user code, its data.
pub const FLAT_CODE: u16 = 0x23;
/// See [`FLAT_CODE`].
pub const FLAT_DATA: u16 = 0x2b;

/// Segments that code of so many bits can run in, each with its weight by repetition.
pub fn code(bits: u32) -> &'static [u16] {
    const OF32: [u16; 8] =
        [FLAT_CODE, FLAT_CODE, FLAT_CODE, FLAT_CODE, selector(1), selector(1), selector(2), selector(3)];
    const OF16: [u16; 6] = [selector(0), selector(0), selector(0), selector(0), selector(4), selector(18)];
    if bits == 32 { &OF32 } else { &OF16 }
}

/// Segments for a stack.
pub fn stack(bits: u32) -> &'static [u16] {
    const OF32: [u16; 12] = [
        FLAT_DATA,
        FLAT_DATA,
        FLAT_DATA,
        FLAT_DATA,
        FLAT_DATA,
        selector(5),
        selector(6),
        selector(7),
        selector(9),
        selector(10),
        selector(13),
        selector(16),
    ];
    const OF16: [u16; 9] = [
        selector(5),
        selector(5),
        selector(5),
        selector(6),
        selector(10),
        selector(15),
        selector(7),
        FLAT_DATA,
        selector(16),
    ];
    if bits == 32 { &OF32 } else { &OF16 }
}

/// Segments for data.
pub fn data(bits: u32) -> &'static [u16] {
    const OF32: [u16; 18] = [
        FLAT_DATA,
        FLAT_DATA,
        FLAT_DATA,
        FLAT_DATA,
        FLAT_DATA,
        FLAT_DATA,
        selector(6),
        selector(6),
        selector(5),
        selector(7),
        selector(8),
        selector(9),
        selector(10),
        selector(13),
        selector(16),
        selector(17),
        selector(1),
        0,
    ];
    const OF16: [u16; 13] = [
        selector(5),
        selector(5),
        selector(5),
        selector(5),
        selector(6),
        selector(6),
        selector(7),
        selector(8),
        selector(10),
        selector(15),
        selector(17),
        selector(0),
        0,
    ];
    if bits == 32 { &OF32 } else { &OF16 }
}

/// Selectors for instructions that load or look at one.
pub const ANY: [u16; 46] = [
    0x2b, 0x2b, 0x2b, 0x23, 0x33, 0x28, 0x2a, 0x30, 0x31, 0x20, 0, 1, 3, 0x08, 0x10, 0x13, 0x18, 0x1b, 0x40, 0x43,
    0x50, 0x63, 0x80, 0xfff8, 0xffff, 4, 6, 7, 0x0f, 0x17, 0x1f, 0x27, 0x2f, 0x37, 0x3f, 0x47, 0x4f, 0x57, 0x5f, 0x67,
    0x6f, 0x77, 0x7f, 0x87, 0x8f, 0x9f,
];

impl Entry {
    /// As it lies in the table.
    pub fn descriptor(self) -> Descriptor {
        let kind = u64::from(self.contents) << 2 | u64::from(!self.less) << 1 | 1;
        let access = kind | 0x70 | u64::from(self.present) << 7;
        let flags = u64::from(self.pages) << 3 | u64::from(self.big) << 2;
        let limit = u64::from(self.limit);
        Descriptor::new(
            limit & 0xffff
                | (self.base & 0xff_ffff) << 16
                | access << 40
                | (limit >> 16) << 48
                | flags << 52
                | (self.base >> 24) << 56,
        )
    }
}

/// What a segment register holds after this selector was loaded; `None`: it cannot be.
pub fn segment(selector: u16) -> Option<Segment> {
    if selector < 4 {
        return Some(Segment::unusable(selector));
    }
    let found = match selector & 4 {
        0 => Descriptor::new(linux_descriptor(selector)?),
        _ => LDT.get(usize::from(selector >> 3))?.descriptor(),
    };
    Some(found.segment(selector))
}
