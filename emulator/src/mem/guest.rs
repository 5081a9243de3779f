//! Guest-physical memory: either RAM of a machine, or the host process's own address space for a Linux process.

use crate::host::probe::Reach;
use crate::isa::Width;
use crate::mem::{FlatSpace, Ram};
use std::sync::atomic::{AtomicU64, Ordering};

/// 4 KiB.
pub const PAGE_SIZE: u64 = 4096;

/// What guest-physical addresses mean. All methods take `&self`: several vCPUs share it.
///
/// Engines that cache decoded or translated code call [`GuestMemory::watch_code`] for each page they cache from and compare
/// [`GuestMemory::code_epoch`] (cheap) and then [`GuestMemory::code_generation`] (per page) before they use what they cached.
// One exists per guest; its size does not matter.
#[allow(clippy::large_enum_variant)]
pub enum GuestMemory {
    /// RAM of a machine, from guest-physical address 0.
    Ram(Ram),
    /// The host's address space: guest address = host address. No isolation boundary.
    Flat(FlatSpace),
}

macro_rules! each {
    ($self:ident, $m:ident => $e:expr) => {
        match $self {
            GuestMemory::Ram($m) => $e,
            GuestMemory::Flat($m) => $e,
        }
    };
}

/// A number that no other memory of this program has or had: what is cached of one must not be used with another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Id(pub u64);

impl Default for Id {
    fn default() -> Id {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Id(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl GuestMemory {
    /// Different for every memory of this program.
    #[inline]
    pub fn id(&self) -> u64 {
        each!(self, m => m.id())
    }

    /// The flat space, if it is one.
    pub fn flat(&self) -> Option<&FlatSpace> {
        match self {
            GuestMemory::Flat(f) => Some(f),
            GuestMemory::Ram(_) => None,
        }
    }

    /// The RAM, if it is one.
    pub fn ram(&self) -> Option<&Ram> {
        match self {
            GuestMemory::Ram(r) => Some(r),
            GuestMemory::Flat(_) => None,
        }
    }

    /// Loads a value that does not cross a page end. `None`: nothing there (memory-mapped I/O or a fault).
    #[inline]
    pub fn load(&self, gpa: u64, width: Width) -> Option<u64> {
        each!(self, m => m.load(gpa, width))
    }

    /// Stores a value that does not cross a page end; code cached from the page becomes stale.
    #[inline]
    pub fn store(&self, gpa: u64, width: Width, v: u64) -> Option<()> {
        each!(self, m => m.store(gpa, width, v))
    }

    /// The host address of `len` bytes inside one page, to access them while this memory is borrowed; whoever writes there calls
    /// [`GuestMemory::wrote`] after it. `None`: nothing there. An access to a flat space may fault.
    #[inline(always)]
    pub fn reach(&self, gpa: u64, len: u64) -> Option<Reach> {
        match self {
            GuestMemory::Ram(r) => r.reach(gpa, len),
            GuestMemory::Flat(f) => Some(f.reach(gpa)),
        }
    }

    /// Tells that bytes of the page of `gpa` were written by way of [`GuestMemory::reach`]. A flat space sees it by itself.
    #[inline(always)]
    pub fn wrote(&self, gpa: u64) {
        if let GuestMemory::Ram(r) = self {
            r.wrote(gpa);
        }
    }

    /// Atomic compare-and-exchange inside one page: gives what was found (equal to `old`: exchanged).
    #[inline]
    pub fn compare_exchange(&self, gpa: u64, width: Width, old: u64, new: u64) -> Option<u64> {
        each!(self, m => m.compare_exchange(gpa, width, old, new))
    }

    /// Atomic 16-byte compare-and-exchange at an aligned address: `Ok` if exchanged, else what was found.
    pub fn compare_exchange_16(&self, gpa: u64, old: [u64; 2], new: [u64; 2]) -> Option<Result<(), [u64; 2]>> {
        each!(self, m => m.compare_exchange_16(gpa, old, new))
    }

    /// Reads bytes; `None` if any of them is not there (then `to` may be partly filled).
    pub fn read(&self, gpa: u64, to: &mut [u8]) -> Option<()> {
        each!(self, m => m.read(gpa, to))
    }

    /// Writes bytes; `None` if any of them cannot be written (then some may have been).
    pub fn write(&self, gpa: u64, from: &[u8]) -> Option<()> {
        each!(self, m => m.write(gpa, from))
    }

    /// Copies up to a page of bytes as if through a buffer; `None` if any of them is not there or cannot be written (then some may have
    /// been).
    pub fn copy(&self, from: u64, to: u64, len: u64) -> Option<()> {
        match self {
            GuestMemory::Ram(m) => m.copy(from, to, len),
            GuestMemory::Flat(m) => {
                let mut buffer = [0; PAGE_SIZE as usize];
                let bytes = buffer.get_mut(..len as usize)?;
                m.read(from, bytes)?;
                m.write(to, bytes)
            }
        }
    }

    /// May instructions be fetched from this page, as far as memory itself decides? Always for RAM (paging decides); by the
    /// mapping's PROT_EXEC for a flat space.
    pub fn may_execute(&self, gpa: u64) -> bool {
        match self {
            GuestMemory::Ram(_) => true,
            GuestMemory::Flat(f) => f.find(gpa).is_some_and(|v| v.prot.contains(crate::mem::Prot::EXEC)),
        }
    }

    /// From now on, writes to the page that holds `gpa` raise its generation and the epoch.
    pub fn watch_code(&self, gpa: u64) {
        each!(self, m => m.watch_code(gpa))
    }

    /// As [`GuestMemory::watch_code`], for who can also compare code with what it was before it is executed: false if that is asked for,
    /// because the page is written too often. Writes to it then go unnoticed; its end and changes of its rights do not.
    pub fn watch_or_compare(&self, gpa: u64) -> bool {
        match self {
            GuestMemory::Ram(ram) => {
                ram.watch_code(gpa);
                true
            }
            GuestMemory::Flat(flat) => flat.watch_or_compare(gpa),
        }
    }

    /// Raised whenever any watched page was written, unmapped or changed rights.
    #[inline(always)]
    pub fn code_epoch(&self) -> u64 {
        each!(self, m => m.code_epoch())
    }

    /// Where [`GuestMemory::code_epoch`] is read from.
    #[inline(always)]
    pub fn epoch_cell(&self) -> &AtomicU64 {
        each!(self, m => m.epoch_cell())
    }

    /// Raised whenever the page that holds `gpa` was written, unmapped or changed rights while watched.
    pub fn code_generation(&self, gpa: u64) -> u64 {
        each!(self, m => m.code_generation(gpa))
    }
}
