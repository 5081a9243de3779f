//! The translation-lookaside buffer: direct-mapped, one array for each kind of accessor, rights as separate tags (SDM 3A 4.10).

use crate::mem::{Access, PAGE_SIZE};

const ENTRIES: usize = 1024;
/// Accessors with rights of their own: user; supervisor; supervisor with RFLAGS.AC lifting SMAP; and one unused.
pub const CONTEXTS: usize = 4;
/// A tag that no lookup asks for: generation 0 is never current.
const EMPTY: u64 = 0;

/// One page: by [`Access`] the linear page with the generation in the low 12 bits, or [`EMPTY`] where the access is not known to be
/// allowed; at [`DELTA`] guest-physical minus linear address.
type Entry = [u64; 4];
const DELTA: usize = 3;

/// What a lookup may do with a page without a new walk.
#[derive(Clone, Copy, Debug)]
pub struct Rights {
    /// Loads.
    pub read: bool,
    /// Stores: allowed, and the dirty flag is set.
    pub write: bool,
    /// Fetches.
    pub execute: bool,
}

/// Cached translations.
pub struct Tlb {
    /// None until there is one to remember: a process needs no translations.
    entries: Vec<Entry>,
    /// 1 to 0xfff: flushing is changing it.
    generation: u64,
    /// The linear range in which parts of large pages are cached: INVLPG there forgets all.
    large: (u64, u64),
    /// A bit for each entry: its page is global.
    global: Box<[u64; ENTRIES * CONTEXTS / 64]>,
    /// A bit for each entry: its page is part of a large one.
    part: Box<[u64; ENTRIES * CONTEXTS / 64]>,
    /// Entries that were filled with pages that are not since all was forgotten; at most [`MOST_LOCAL`].
    local: Vec<u16>,
}

/// So many pages are forgotten one by one.
const MOST_LOCAL: usize = 2 * ENTRIES;

impl Default for Tlb {
    fn default() -> Tlb {
        Tlb {
            entries: Vec::new(),
            generation: 1,
            large: (u64::MAX, 0),
            global: Box::new([0; ENTRIES * CONTEXTS / 64]),
            part: Box::new([0; ENTRIES * CONTEXTS / 64]),
            local: Vec::new(),
        }
    }
}

/// A kernel has much at multiples of 4 MiB: bits above those that count the pages of such a piece are part of it.
#[inline(always)]
fn slot(context: usize, laddr: u64) -> usize {
    let page = (laddr / PAGE_SIZE) as usize;
    (page ^ page >> 10) % ENTRIES + context % CONTEXTS * ENTRIES
}

impl Tlb {
    /// The guest-physical address, if the access is known to be allowed.
    #[inline(always)]
    pub fn get(&self, context: usize, laddr: u64, access: Access) -> Option<u64> {
        let entry = self.entries.get(slot(context, laddr))?;
        (entry[access as usize] == (laddr & !(PAGE_SIZE - 1)) | self.generation)
            .then(|| laddr.wrapping_add(entry[DELTA]))
    }

    /// Is the page, which is known, global?
    pub fn is_global(&self, context: usize, laddr: u64) -> bool {
        let n = slot(context, laddr);
        self.global[n / 64] >> (n % 64) & 1 != 0
    }

    /// Is the page, which is known, part of a large one?
    pub fn is_large(&self, context: usize, laddr: u64) -> bool {
        let n = slot(context, laddr);
        self.part[n / 64] >> (n % 64) & 1 != 0
    }

    /// Remembers the page of `laddr`, of `size` bytes in all.
    pub fn put(&mut self, context: usize, laddr: u64, gpa: u64, size: u64, global: bool, rights: Rights) {
        let n = slot(context, laddr);
        if self.entries.is_empty() {
            self.entries = vec![[EMPTY; 4]; ENTRIES * CONTEXTS];
        }
        if global {
            self.global[n / 64] |= 1 << (n % 64);
        } else {
            self.global[n / 64] &= !(1 << (n % 64));
            if self.local.len() < MOST_LOCAL {
                self.local.push(n as u16);
            }
        }
        let part = u64::from(size > PAGE_SIZE) << (n % 64);
        self.part[n / 64] = self.part[n / 64] & !(1 << (n % 64)) | part;
        let page = laddr & !(PAGE_SIZE - 1);
        let tag = page | self.generation;
        let tag_if = |right: bool| if right { tag } else { EMPTY };
        let delta = (gpa & !(PAGE_SIZE - 1)).wrapping_sub(page);
        self.entries[n] = [tag_if(rights.read), tag_if(rights.write), tag_if(rights.execute), delta];
        if size > PAGE_SIZE {
            let start = laddr & !(size - 1);
            self.large = (self.large.0.min(start), self.large.1.max(start + (size - 1)));
        }
    }

    /// Forgets everything.
    pub fn flush(&mut self) {
        self.large = (u64::MAX, 0);
        self.local.clear();
        self.generation += 1;
        if self.generation == PAGE_SIZE {
            self.generation = 1;
            self.entries.fill([EMPTY; 4]);
        }
    }

    /// Forgets all pages but global ones. False if there are too many: flush all.
    pub fn flush_local(&mut self) -> bool {
        if self.local.len() >= MOST_LOCAL {
            return false;
        }
        for n in self.local.drain(..) {
            let n = usize::from(n);
            if self.global[n / 64] >> (n % 64) & 1 == 0 {
                self.entries[n] = [EMPTY; 4];
            }
        }
        true
    }

    /// Forgets one page. False if it may be part of a large page: flush all.
    pub fn flush_page(&mut self, laddr: u64) -> bool {
        if (self.large.0..=self.large.1).contains(&laddr) {
            return false;
        }
        for context in 0..CONTEXTS {
            if let Some(entry) = self.entries.get_mut(slot(context, laddr)) {
                *entry = [EMPTY; 4];
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Rights = Rights { read: true, write: true, execute: true };

    /// The next address of which the page has the same slot.
    fn rival(laddr: u64) -> u64 {
        let mut pages = (1..).map(|n| laddr + n * PAGE_SIZE);
        pages.find(|other| slot(0, *other) == slot(0, laddr)).expect("there are fewer slots than pages")
    }

    #[test]
    fn a_page_is_found_by_address_context_and_right() {
        let mut tlb = Tlb::default();
        tlb.put(0, 0x7fff_1234_5678, 0x9000, PAGE_SIZE, false, Rights { write: false, ..ALL });
        assert_eq!(tlb.get(0, 0x7fff_1234_5abc, Access::Read), Some(0x9abc));
        assert_eq!(tlb.get(0, 0x7fff_1234_5abc, Access::Execute), Some(0x9abc));
        assert_eq!(tlb.get(0, 0x7fff_1234_5abc, Access::Write), None);
        assert_eq!(tlb.get(1, 0x7fff_1234_5abc, Access::Read), None);
        assert_eq!(tlb.get(0, 0x7fff_1234_6abc, Access::Read), None);
        assert_eq!(tlb.get(0, rival(0x7fff_1234_5abc), Access::Read), None);
    }

    #[test]
    fn flushes_forget_even_when_the_generation_wraps() {
        let mut tlb = Tlb::default();
        for _ in 0..10_000 {
            tlb.put(1, 0x5000, 0x9000, PAGE_SIZE, false, ALL);
            assert_eq!(tlb.get(1, 0x5000, Access::Read), Some(0x9000));
            tlb.flush();
            assert_eq!(tlb.get(1, 0x5000, Access::Read), None);
        }
        assert_eq!(tlb.get(1, 0, Access::Read), None, "an empty slot is no page 0");
    }

    #[test]
    fn one_page_of_a_large_one_cannot_be_forgotten_alone() {
        let mut tlb = Tlb::default();
        tlb.put(0, 0x5000, 0x9000, PAGE_SIZE, false, ALL);
        assert!(tlb.flush_page(0x5fff));
        assert_eq!(tlb.get(0, 0x5000, Access::Read), None);
        tlb.put(0, 0x40_5000, 0x9000, 2 << 20, false, ALL);
        assert!(!tlb.flush_page(0x40_0000));
        assert!(tlb.flush_page(0x60_0000));
    }

    /// MOV to CR3 keeps global pages (SDM 3A 4.10.4.1).
    #[test]
    fn global_pages_outlive_the_others() {
        let mut tlb = Tlb::default();
        for n in 0..10u64 {
            tlb.put(1, n << 12, n << 12, PAGE_SIZE, n % 2 == 0, ALL);
        }
        // A global page where another was.
        tlb.put(1, rival(1 << 12), 0x9000, PAGE_SIZE, true, ALL);
        assert!(tlb.is_global(1, 0x4000) && !tlb.is_global(1, 0x5000));
        assert!(tlb.flush_local());
        let left: Vec<u64> = (0..10).filter(|n| tlb.get(1, n << 12, Access::Read).is_some()).collect();
        assert_eq!(left, [0, 2, 4, 6, 8]);
        assert_eq!(tlb.get(1, rival(1 << 12), Access::Read), Some(0x9000));
        for n in 0..MOST_LOCAL as u64 {
            tlb.put(0, n << 12, n << 12, PAGE_SIZE, false, ALL);
        }
        assert!(!tlb.flush_local(), "too many");
        tlb.flush();
        assert!(tlb.flush_local());
        assert_eq!(tlb.get(1, 0, Access::Read), None);
    }
}
