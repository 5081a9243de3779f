//! The exits of all translated code, by number: read without a lock by a thread that has just left, written under the cache's lock.

use crate::index::MOST_BLOCKS;
use crate::lower::Leave;
use crate::marks::Home;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

const CHUNK: usize = 256;
const CHUNKS: usize = 128;
/// Exits there can be between two flushes.
pub const MAX_EXITS: u32 = (CHUNK * CHUNKS * CHUNKS) as u32 - 1;

/// In the last word: the displacement has 8 bits.
const SHORT: u64 = 1 << 63;
/// There: R11 is in the host's register.
const REGISTER: u64 = 1 << 62;
/// Bits of a link, of what is next in a list, of a site. The highest number of an exit is none.
const LINK: u32 = 24;
const NEXT: u32 = 22;
const SITE: u32 = 16;
const _: () = assert!(LINK + NEXT + SITE == 62 && MOST_BLOCKS < 1 << LINK && MAX_EXITS < 1 << NEXT);

/// End of a list.
pub const NONE: u32 = (1 << NEXT) - 1;

/// A jump that can be patched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Offset of its displacement, in the code of its block or in all code.
    pub site: usize,
    /// The displacement has 8 bits: it leads to the start of its own block or to its stub.
    pub short: bool,
    /// The same of its stub, or of the jump there.
    pub stub: usize,
}

#[derive(Default)]
struct Record {
    /// 56 bits of RIP, of which user code has less, and the kind of [`Leave::pack`]. Of a short displacement, which leads to a block,
    /// instead of the kind: from it to the jump to the stub.
    rip_and_kind: AtomicU64,
    /// From the lowest bits on: the number of the block it is linked to plus one, the next exit linked to the same block, the offset of
    /// the displacement in the code of its block, [`REGISTER`], [`SHORT`].
    links: AtomicU64,
}

impl Record {
    fn rip(&self) -> u64 {
        ((self.rip_and_kind.load(Ordering::Relaxed) as i64) << 8 >> 8) as u64
    }

    fn kind(&self) -> u8 {
        (self.rip_and_kind.load(Ordering::Relaxed) >> 56) as u8
    }

    fn links(&self) -> u64 {
        self.links.load(Ordering::Relaxed)
    }

    fn set_links(&self, v: u64) {
        self.links.store(v, Ordering::Relaxed);
    }

    fn is_short(&self) -> bool {
        self.links() & SHORT != 0
    }
}

/// Parts of the table that exist when they are needed.
type Lazy<T> = Box<[OnceLock<T>]>;

fn lazy<T>() -> Lazy<T> {
    (0..CHUNKS).map(|_| OnceLock::new()).collect()
}

/// The table.
pub struct Exits {
    chunks: Lazy<Lazy<Box<[Record]>>>,
}

impl Default for Exits {
    fn default() -> Exits {
        Exits { chunks: lazy() }
    }
}

impl Exits {
    /// Bytes that an exit takes.
    pub const EACH: usize = size_of::<Record>();

    fn record(&self, id: u32) -> &Record {
        let id = id as usize;
        let chunks = self.chunks[id / CHUNK / CHUNKS].get_or_init(lazy);
        let chunk = chunks[id / CHUNK % CHUNKS].get_or_init(|| (0..CHUNK).map(|_| Record::default()).collect());
        &chunk[id % CHUNK]
    }

    /// Why this exit is taken.
    pub fn leave(&self, id: u32) -> Leave {
        let r = self.record(id);
        let rip = r.rip();
        if r.is_short() { Leave::To(rip) } else { Leave::unpack(r.kind(), rip) }
    }

    /// RIP of the guest that takes it.
    pub fn rip(&self, id: u32) -> u64 {
        self.record(id).rip()
    }

    /// Where R11 is when it is taken.
    pub fn home(&self, id: u32) -> Home {
        match self.record(id).links() & REGISTER {
            0 => Home::Slot,
            _ => Home::Register,
        }
    }

    /// Where its jump is patched, if the code of its block is at `block` and its stub at `stub`.
    pub fn place(&self, id: u32, block: usize, stub: usize) -> Place {
        let r = self.record(id);
        let word = r.links();
        let (site, short) = (block + (word >> (LINK + NEXT)) as u16 as usize, word & SHORT != 0);
        Place { site, short, stub: if short { site + usize::from(r.kind()) } else { stub } }
    }

    /// The block it is linked to.
    pub fn linked(&self, id: u32) -> Option<u32> {
        (self.record(id).links() as u32 & ((1 << LINK) - 1)).checked_sub(1)
    }

    /// Notes a link, and which exit comes next in the list of that block.
    pub fn set_linked(&self, id: u32, block: Option<u32>, next: u32) {
        let r = self.record(id);
        let rest = r.links() & !0 << (LINK + NEXT);
        r.set_links(rest | u64::from(block.map_or(0, |b| b + 1)) | u64::from(next & NONE) << LINK);
    }

    /// The exit after this one in the list of its block.
    pub fn next_linked(&self, id: u32) -> u32 {
        (self.record(id).links() >> LINK) as u32 & NONE
    }

    /// Defines an exit, the place of which is one in the code of its block.
    pub fn set(&self, id: u32, leave: Leave, home: Home, place: Place) {
        let r = self.record(id);
        let (kind, rip) = leave.pack();
        // A displacement of 8 bits reaches it.
        let kind = if place.short { (place.stub - place.site) as u8 } else { kind };
        r.rip_and_kind.store(rip & !0 >> 8 | u64::from(kind) << 56, Ordering::Relaxed);
        let short = if place.short { SHORT } else { 0 };
        let home = if home == Home::Register { REGISTER } else { 0 };
        r.set_links(u64::from(place.site as u16) << (LINK + NEXT) | short | home);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_there_whatever_the_address() {
        let exits = Exits::default();
        let mut id = 0;
        for rip in [0, 0x40_1000, 0x7fff_ffff_f000, 0x8000_7fff_f123, u64::MAX - 0x7fff_ffff, u64::MAX] {
            for leave in
                [Leave::To(rip), Leave::Step(rip), Leave::Changed(rip), Leave::Syscall(rip, 2), Leave::Syscall(rip, 15)]
            {
                for home in [Home::Slot, Home::Register] {
                    exits.set(id, leave, home, Place { site: 0xff00, short: false, stub: 7 });
                    exits.set(id + 1, Leave::To(rip), home, Place { site: 77, short: true, stub: 77 + 128 });
                    for (id, leave) in [(id, leave), (id + 1, Leave::To(rip))] {
                        assert_eq!((exits.leave(id), exits.rip(id), exits.home(id)), (leave, rip, home));
                    }
                    exits.set_linked(id, Some(MOST_BLOCKS - 1), MAX_EXITS - 1);
                    exits.set_linked(id + 1, None, NONE);
                    assert_eq!((exits.linked(id), exits.next_linked(id)), (Some(MOST_BLOCKS - 1), MAX_EXITS - 1));
                    assert_eq!((exits.linked(id + 1), exits.next_linked(id + 1)), (None, NONE));
                    let far = 0x3fff_0000;
                    assert_eq!(exits.place(id, far, 9), Place { site: far + 0xff00, short: false, stub: 9 });
                    assert_eq!(exits.place(id + 1, 1, 9), Place { site: 78, short: true, stub: 206 });
                    assert_eq!((exits.leave(id), exits.home(id)), (leave, home));
                    id += 2;
                }
            }
        }
        assert_eq!(Exits::EACH, 16);
    }
}
