//! The exits of all translated code, by number: read without a lock by a thread that has just left, written under the cache's lock.

use crate::lower::Leave;
use crate::marks::Home;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

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
    rip: AtomicU64,
    /// Its highest two bits are [`SHORT`] and [`REGISTER`].
    site: AtomicU32,
    /// The number of the block it is linked to, plus one.
    linked: AtomicU32,
    /// The next exit linked to the same block.
    next: AtomicU32,
    /// Of a short displacement: from it to the jump to the stub.
    step: AtomicU16,
    /// 0: to a block; 1: step; 2: changed code; else 3 + length of SYSCALL.
    kind: AtomicU8,
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
        let rip = r.rip.load(Ordering::Relaxed);
        match r.kind.load(Ordering::Relaxed) {
            0 => Leave::To(rip),
            1 => Leave::Step(rip),
            2 => Leave::Changed(rip),
            n => Leave::Syscall(rip, n - 3),
        }
    }

    /// RIP of the guest that takes it.
    pub fn rip(&self, id: u32) -> u64 {
        self.record(id).rip.load(Ordering::Relaxed)
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
        let (site, short) = ((word & !(SHORT | REGISTER)) as usize, word & SHORT != 0);
        Place { site, short, stub: if short { site + usize::from(r.step.load(Ordering::Relaxed)) } else { stub } }
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
        let (rip, kind) = match leave {
            Leave::To(rip) => (rip, 0),
            Leave::Step(rip) => (rip, 1),
            Leave::Changed(rip) => (rip, 2),
            Leave::Syscall(rip, len) => (rip, 3 + len),
        };
        r.rip.store(rip, Ordering::Relaxed);
        r.kind.store(kind, Ordering::Relaxed);
        let short = if place.short { SHORT } else { 0 };
        let home = if home == Home::Register { REGISTER } else { 0 };
        r.site.store(place.site as u32 | short | home, Ordering::Relaxed);
        if place.short {
            r.step.store((place.stub - place.site) as u16, Ordering::Relaxed);
        }
        r.linked.store(0, Ordering::Relaxed);
    }
}
