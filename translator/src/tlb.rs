//! The inline TLB of the checked memory model: what generated code asks before each access.
//!
//! Direct-mapped by linear page. A tag is the page's address if loads, or stores, there need no care; the addend turns a guest address into
//! the host address of the byte in guest RAM. A page from which code was cached, or whose writes are tracked, has no write tag.

use bivisor_emulator::mem::{PAGE_SIZE, Ram};

/// Entries.
pub const ENTRIES: usize = 256;
/// A page number moved to the offset of its entry.
pub const INDEX_SHIFT: i8 = 12 - 5;
/// Mask of that offset.
pub const INDEX_MASK: i32 = ((ENTRIES - 1) << 5) as i32;
/// Offset of the read tag.
pub const READ: i32 = 0;
/// Offset of the write tag.
pub const WRITE: i32 = 8;
/// Offset of the addend.
pub const ADDEND: i32 = 16;
/// No page has this address.
const NONE: u64 = 1;

/// One entry; 32 bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
struct Entry {
    read: u64,
    write: u64,
    addend: u64,
    unused: u64,
}

/// The table.
pub struct Tlb {
    entries: Box<[Entry; ENTRIES]>,
    empty: bool,
}

impl Default for Tlb {
    fn default() -> Tlb {
        const EMPTY: Entry = Entry { read: NONE, write: NONE, addend: 0, unused: 0 };
        Tlb { entries: Box::new([EMPTY; ENTRIES]), empty: true }
    }
}

/// What a miss says of the access, for [`crate::emit::slot::MISS_KIND`]; never 0.
pub const fn kind(len: u32, write: bool) -> u32 {
    len << 1 | write as u32
}

/// Length and direction from [`kind`].
pub const fn of_kind(kind: u64) -> (u64, bool) {
    (kind >> 1, kind & 1 != 0)
}

impl Tlb {
    /// Where generated code finds it.
    pub fn address(&self) -> u64 {
        self.entries.as_ptr() as u64
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        if !std::mem::replace(&mut self.empty, true) {
            self.entries.fill(Entry { read: NONE, write: NONE, addend: 0, unused: 0 });
        }
    }

    /// Enters the page of `laddr`, which is guest-physical `gpa`, for loads or (also) for stores. False if it is no RAM or a store there
    /// needs care.
    pub fn fill(&mut self, ram: &Ram, laddr: u64, gpa: u64, write: bool) -> bool {
        let (page, at) = (laddr & !(PAGE_SIZE - 1), gpa & !(PAGE_SIZE - 1));
        if at >= ram.size() || write && ram.store_needs_care(at) {
            return false;
        }
        self.empty = false;
        let entry = &mut self.entries[(page / PAGE_SIZE) as usize % ENTRIES];
        if entry.read != page {
            entry.write = NONE;
        }
        entry.read = page;
        if write {
            entry.write = page;
        }
        entry.addend = (ram.host_base() as u64).wrapping_add(at).wrapping_sub(page);
        true
    }
}

const _: () = assert!(size_of::<Entry>() == 32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ram_and_only_careless_stores() {
        let ram = Ram::new(2 * PAGE_SIZE).expect("8 KiB");
        ram.watch_code(PAGE_SIZE);
        let mut tlb = Tlb::default();
        assert!(tlb.fill(&ram, 0x5123, 0x123, true));
        let e = tlb.entries[5];
        assert_eq!((e.read, e.write, e.addend.wrapping_add(0x5000)), (0x5000, 0x5000, ram.host_base() as u64));
        assert!(tlb.fill(&ram, 0x6000, PAGE_SIZE, false), "code may be read");
        assert!(!tlb.fill(&ram, 0x6000, PAGE_SIZE, true), "a store would make code stale");
        assert!(!tlb.fill(&ram, 0x7000, 2 * PAGE_SIZE, false), "no RAM");
        assert!(tlb.fill(&ram, 0x10_5000, 0, false));
        assert_eq!((tlb.entries[5].read, tlb.entries[5].write), (0x10_5000, NONE), "the same slot, another page");
        tlb.clear();
        assert!(tlb.entries.iter().all(|e| e.read == NONE && e.write == NONE));
    }

    #[test]
    fn kinds() {
        for len in [1, 2, 4, 8, 16, 32, 64] {
            for write in [false, true] {
                assert_ne!(kind(len, write), 0);
                assert_eq!(of_kind(u64::from(kind(len, write))), (u64::from(len), write));
            }
        }
    }
}
