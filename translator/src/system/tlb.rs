//! The inline TLB: what generated code asks before an access.
//!
//! Direct-mapped by linear page, one table for each kind of accessor, because their rights differ (SDM 3A 4.6): user, supervisor, and
//! supervisor with SMAP lifted by RFLAGS.AC. A tag is the page's address if loads, or stores, there need no care; the addend turns a guest address into the host address of the byte in guest RAM. A page from which code was cached, or
//! whose writes are tracked, has no write tag.

use crate::system::area::{Area, at};
use crate::system::walk;
use bivisor_emulator::host::thread::ENGINE_AREA_SIZE;
use bivisor_emulator::mem::{PAGE_SIZE, Ram};

/// Entries of a table: so many that a kernel's data of one CPU and its entry code, both at multiples of 4 MiB, have places of their own.
pub const ENTRIES: usize = 8192;
/// Bytes of an entry: read tag, write tag, addend, unused.
pub const ENTRY: usize = 32;
/// Bytes of a table.
pub const TABLE: usize = ENTRIES * ENTRY;
/// Kinds of accessors.
pub const CONTEXTS: usize = 3;
/// Offset of the read tag.
pub const READ: usize = 0;
/// Offset of the write tag.
pub const WRITE: usize = 8;
/// Offset of the addend.
pub const ADDEND: usize = 16;
/// Entries that generated code may list as filled by itself.
pub const MOST_LISTED: usize = 512;
const _: () = assert!(at::FILLED_LIST + 2 * MOST_LISTED <= at::TARGETS);
const _: () = assert!(at::TLB + CONTEXTS * TABLE <= ENGINE_AREA_SIZE && CONTEXTS * ENTRIES <= 1 << 16);

/// Offset of the entry of a page in its table.
pub const fn entry(laddr: u64) -> usize {
    (laddr / PAGE_SIZE) as usize % ENTRIES * ENTRY
}

/// No page has this address.
const NONE: u64 = u64::MAX;

/// A page and who accesses it.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// Whose table.
    pub context: usize,
    /// Linear address.
    pub laddr: u64,
    /// Guest-physical address.
    pub gpa: u64,
    /// Global?
    pub global: bool,
}

/// In a list of filled entries: of pages that are not global, and of those that are.
const LISTED: [u8; 2] = [1, 2];

/// The tables, which lie in the area.
#[derive(Debug)]
pub struct Tlb {
    /// By entry: which lists it is in.
    listed: Box<[u8]>,
    /// Entries that were filled with pages that are not global, and with those that are.
    filled: [Vec<u16>; 2],
}

impl Tlb {
    /// Empty.
    pub fn new(area: &Area) -> Tlb {
        area.fill(at::TLB..at::TLB + CONTEXTS * TABLE, 0xff);
        area.set(at::FILLED, 0);
        Tlb { listed: vec![0; CONTEXTS * ENTRIES].into(), filled: [Vec::new(), Vec::new()] }
    }

    /// Generated code has filled entries of the first table, with pages that are not global: into the lists.
    fn take_filled(&mut self, area: &Area) {
        for i in 0..(area.get(at::FILLED) as usize).min(MOST_LISTED) {
            let n = area.get_u16(at::FILLED_LIST + 2 * i) as usize % ENTRIES;
            self.list(n, 0);
        }
        area.set(at::FILLED, 0);
    }

    fn list(&mut self, n: usize, list: usize) {
        if self.listed[n] & LISTED[list] == 0 {
            self.listed[n] |= LISTED[list];
            self.filled[list].push(n as u16);
        }
    }

    fn forget(&mut self, area: &Area, list: usize) {
        self.take_filled(area);
        for n in self.filled[list].drain(..) {
            let e = at::TLB + usize::from(n) * ENTRY;
            area.set(e + READ, NONE);
            area.set(e + WRITE, NONE);
            self.listed[usize::from(n)] &= !LISTED[list];
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self, area: &Area) {
        self.clear_local(area);
        self.forget(area, 1);
    }

    /// Forgets all pages but global ones. The tables that they were found in may not be those any more.
    pub fn clear_local(&mut self, area: &Area) {
        walk::close(area);
        self.forget(area, 0);
    }

    /// Forgets one small page.
    pub fn clear_page(&mut self, area: &Area, laddr: u64) {
        for n in 0..CONTEXTS {
            let e = at::TLB + n * TABLE + entry(laddr);
            if area.get(e + READ) / PAGE_SIZE == laddr / PAGE_SIZE {
                area.set(e + READ, NONE);
                area.set(e + WRITE, NONE);
            }
        }
    }

    /// From now on stores to the physical page of `gpa` need care.
    pub fn forbid_stores(&mut self, area: &Area, ram: &Ram, gpa: u64) {
        self.take_filled(area);
        let host = (ram.host_base() as u64).wrapping_add(gpa & !(PAGE_SIZE - 1));
        for e in self.filled.iter().flatten().map(|n| at::TLB + usize::from(*n) * ENTRY) {
            if area.get(e + READ).wrapping_add(area.get(e + ADDEND)) == host {
                area.set(e + WRITE, NONE);
            }
        }
    }

    /// Enters the page of `laddr`, which is guest-physical `gpa`, for loads or (also) for stores. False if it is no RAM or a store there
    /// needs care.
    pub fn fill(&mut self, area: &Area, ram: &Ram, page: Found, write: bool) -> bool {
        let Found { context, laddr, gpa, global } = page;
        let (page, to) = (laddr & !(PAGE_SIZE - 1), gpa & !(PAGE_SIZE - 1));
        if !ram.contains(to) || write && ram.store_needs_care(to) {
            return false;
        }
        let n = context * ENTRIES + (laddr / PAGE_SIZE) as usize % ENTRIES;
        self.take_filled(area);
        self.list(n, global.into());
        let e = at::TLB + context * TABLE + entry(laddr);
        if area.get(e + READ) != page {
            area.set(e + WRITE, NONE);
        }
        area.set(e + READ, page);
        if write {
            area.set(e + WRITE, page);
        }
        area.set(e + ADDEND, (ram.host_base() as u64).wrapping_add(to).wrapping_sub(page));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ram_and_only_careless_stores() {
        let ram = Ram::new(2 * PAGE_SIZE).expect("8 KiB");
        let area = Area::new().expect("memory");
        ram.watch_code(PAGE_SIZE);
        let mut tlb = Tlb::new(&area);
        let page = |laddr, gpa| Found { context: 1, laddr, gpa, global: false };
        let at = |n: usize, offset| area.get(at::TLB + TABLE + n * ENTRY + offset);
        assert!(tlb.fill(&area, &ram, page(0x5123, 0x123), true));
        assert_eq!((at(5, READ), at(5, WRITE)), (0x5000, 0x5000));
        assert_eq!(at(5, ADDEND).wrapping_add(0x5000), ram.host_base() as u64);
        assert!(tlb.fill(&area, &ram, page(0x6000, PAGE_SIZE), false), "code may be read");
        assert!(!tlb.fill(&area, &ram, page(0x6000, PAGE_SIZE), true), "a store would make code stale");
        assert!(!tlb.fill(&area, &ram, page(0x7000, 2 * PAGE_SIZE), false), "no RAM");
        assert!(tlb.fill(&area, &ram, page(0x200_5000, 0), false));
        assert_eq!((at(5, READ), at(5, WRITE)), (0x200_5000, NONE), "the same slot, another page");
        assert!(tlb.fill(&area, &ram, page(0xa000, 0), true));
        tlb.clear_page(&area, 0x200_afff);
        assert_eq!(at(10, READ), 0xa000, "another page in the same slot");
        tlb.clear_page(&area, 0xafff);
        assert_eq!((at(10, READ), at(10, WRITE)), (NONE, NONE));
        assert_eq!(at(6, READ), 0x6000);
        assert!(tlb.fill(&area, &ram, Found { global: true, ..page(0x7000, 0) }, false));
        assert!(tlb.fill(&area, &ram, page(0x8000, 0), true));
        ram.watch_code(0);
        tlb.forbid_stores(&area, &ram, 0x123);
        assert_eq!((at(8, READ), at(8, WRITE)), (0x8000, NONE), "may still be read");
        tlb.clear_local(&area);
        assert_eq!((at(6, READ), at(7, READ)), (NONE, 0x7000), "a global page stays");
        tlb.clear(&area);
        assert_eq!(at(7, READ), NONE);
    }
}
