//! The exits of all translated code, by number: read without a lock by a thread that has just left, written under the cache's lock.

use crate::lower::Leave;
use crate::marks::Home;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

const CHUNK: usize = 256;
const CHUNKS: usize = 128;
/// Exits there can be between two flushes.
pub const MAX_EXITS: u32 = (CHUNK * CHUNKS * CHUNKS) as u32;

/// In the site: the displacement has 8 bits. Code offsets are smaller.
const SHORT: u32 = 1 << 31;
/// In the site: R11 is in the host's register.
const REGISTER: u32 = 1 << 30;

/// A jump that can be patched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Code offset of its displacement.
    pub site: usize,
    /// The displacement has 8 bits: it leads to the start of its own block or to its stub.
    pub short: bool,
    /// Code offset of its stub, or of the jump there.
    pub stub: usize,
}

#[derive(Default)]
struct Record {
    /// 56 bits of RIP, of which user code has less, and the kind of [`Leave::pack`]. Of a short displacement, which leads to a block,
    /// instead of the kind: from it to the jump to the stub. In halves: eight bytes at once would make each exit four bytes larger.
    rip_and_kind: [AtomicU32; 2],
    /// Its highest two bits are [`SHORT`] and [`REGISTER`].
    site: AtomicU32,
    /// The number of the block it is linked to, plus one.
    linked: AtomicU32,
    /// The next exit linked to the same block.
    next: AtomicU32,
}

impl Record {
    fn rip(&self) -> u64 {
        let half = |i: usize| i64::from(self.rip_and_kind[i].load(Ordering::Relaxed));
        ((half(1) << 40) >> 8 | half(0)) as u64
    }

    fn kind(&self) -> u8 {
        (self.rip_and_kind[1].load(Ordering::Relaxed) >> 24) as u8
    }

    fn is_short(&self) -> bool {
        self.site.load(Ordering::Relaxed) & SHORT != 0
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
        match self.record(id).site.load(Ordering::Relaxed) & REGISTER {
            0 => Home::Slot,
            _ => Home::Register,
        }
    }

    /// Where its jump is patched, if its stub is at `stub`.
    pub fn place(&self, id: u32, stub: usize) -> Place {
        let r = self.record(id);
        let word = r.site.load(Ordering::Relaxed);
        let (site, short) = ((word & !(SHORT | REGISTER)) as usize, r.is_short());
        Place { site, short, stub: if short { site + usize::from(r.kind()) } else { stub } }
    }

    /// The block it is linked to.
    pub fn linked(&self, id: u32) -> Option<u32> {
        self.record(id).linked.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Notes a link, and which exit comes next in the list of that block.
    pub fn set_linked(&self, id: u32, block: Option<u32>, next: u32) {
        let r = self.record(id);
        r.linked.store(block.map_or(0, |b| b + 1), Ordering::Relaxed);
        r.next.store(next, Ordering::Relaxed);
    }

    /// The exit after this one in the list of its block.
    pub fn next_linked(&self, id: u32) -> u32 {
        self.record(id).next.load(Ordering::Relaxed)
    }

    /// Defines an exit.
    pub fn set(&self, id: u32, leave: Leave, home: Home, place: Place) {
        let r = self.record(id);
        let (kind, rip) = leave.pack();
        // A displacement of 8 bits reaches it.
        let kind = if place.short { (place.stub - place.site) as u8 } else { kind };
        r.rip_and_kind[0].store(rip as u32, Ordering::Relaxed);
        r.rip_and_kind[1].store((rip >> 32) as u32 & 0xff_ffff | u32::from(kind) << 24, Ordering::Relaxed);
        let short = if place.short { SHORT } else { 0 };
        let home = if home == Home::Register { REGISTER } else { 0 };
        r.site.store(place.site as u32 | short | home, Ordering::Relaxed);
        r.linked.store(0, Ordering::Relaxed);
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
                    exits.set(id, leave, home, Place { site: 0x3fff_ff00, short: false, stub: 7 });
                    exits.set(id + 1, Leave::To(rip), home, Place { site: 77, short: true, stub: 77 + 128 });
                    for (id, leave) in [(id, leave), (id + 1, Leave::To(rip))] {
                        assert_eq!((exits.leave(id), exits.rip(id), exits.home(id)), (leave, rip, home));
                    }
                    assert_eq!(exits.place(id, 9), Place { site: 0x3fff_ff00, short: false, stub: 9 });
                    assert_eq!(exits.place(id + 1, 9), Place { site: 77, short: true, stub: 205 });
                    id += 2;
                }
            }
        }
        assert_eq!(Exits::EACH, 20);
    }
}
