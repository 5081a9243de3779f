//! RAM of a machine: one anonymous mapping from guest-physical address 0, which may have a hole for devices below 4 GiB, and a generation for
//! each page that holds cached code.
#![allow(unsafe_code)]

use crate::host::probe::Reach;
use crate::isa::Width;
use crate::mem::PAGE_SIZE;
use crate::mem::guest::Id;
use memmap2::{MmapRaw, UncheckedAdvice};
use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

const FOUR_GIB: u64 = 1 << 32;

/// Code was cached from the page: stores raise the generation.
const CODE: u32 = 1;
/// The next store sets [`DIRTY`].
const TRACK: u32 = 2;
/// Written since [`Ram::track_dirty`].
const DIRTY: u32 = 4;
/// One generation.
const GENERATION: u32 = 8;

/// Guest RAM. Guest accesses are relaxed atomics or plain byte copies through raw pointers: guest code may race with itself, and no
/// Rust reference to the bytes is ever made.
pub struct Ram {
    map: MmapRaw,
    /// Where the last of it ends.
    size: u64,
    /// Where the part from address 0 ends, and where the other begins; without a hole both are `size`.
    low: u64,
    high: u64,
    /// For each page: 0 = stores need no care; else [`CODE`], [`TRACK`], [`DIRTY`] and the generation from [`GENERATION`] on.
    pages: Vec<AtomicU32>,
    epoch: AtomicU64,
    id: Id,
    watched: AtomicBool,
    watches: AtomicU64,
    tracks: AtomicU64,
    /// What is mapped, if it can be mapped elsewhere too.
    file: Option<File>,
}

impl Ram {
    /// Bits of a word of [`Ram::generations`]: a store there must go through [`Ram::store`].
    pub const CARE: u32 = CODE | TRACK;

    /// `size` bytes, rounded up to a page, zeroed. Pages take host memory when they are touched.
    ///
    /// # Errors
    /// The host's error if it cannot map so much.
    pub fn new(size: u64) -> std::io::Result<Ram> {
        let size = size.next_multiple_of(PAGE_SIZE).max(PAGE_SIZE);
        let map = memmap2::MmapOptions::new().len(size as usize).no_reserve_swap().map_anon()?;
        Ok(Ram::over(MmapRaw::from(map), size, None))
    }

    /// `low` bytes from address 0 and `above` bytes from 4 GiB on, both rounded up to a page; what is between is no RAM.
    ///
    /// # Errors
    /// The host's error if it cannot map so much.
    pub fn with_hole(low: u64, above: u64) -> std::io::Result<Ram> {
        let low = low.next_multiple_of(PAGE_SIZE).clamp(PAGE_SIZE, FOUR_GIB);
        let mut ram = Ram::shared(FOUR_GIB.checked_add(above).ok_or(std::io::ErrorKind::InvalidInput)?)?;
        (ram.low, ram.high) = (low, FOUR_GIB);
        Ok(ram)
    }

    /// As [`Ram::new`], in a file without a name ([`Ram::file`]) that another process can map as well.
    ///
    /// # Errors
    /// The host's.
    pub fn shared(size: u64) -> std::io::Result<Ram> {
        let size = size.next_multiple_of(PAGE_SIZE).max(PAGE_SIZE);
        // SAFETY: a constant name; the descriptor is fresh and becomes the file's.
        let file = unsafe {
            let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(std::io::Error::last_os_error());
            }
            File::from_raw_fd(fd)
        };
        file.set_len(size)?;
        let map = memmap2::MmapOptions::new().len(size as usize).map_raw(&file)?;
        Ok(Ram::over(map, size, Some(file)))
    }

    fn over(map: MmapRaw, size: u64, file: Option<File>) -> Ram {
        Ram {
            map,
            size,
            low: size,
            high: size,
            file,
            pages: (0..size / PAGE_SIZE).map(|_| AtomicU32::new(0)).collect(),
            epoch: AtomicU64::new(0),
            id: Id::default(),
            watched: AtomicBool::new(false),
            watches: AtomicU64::new(0),
            tracks: AtomicU64::new(0),
        }
    }

    /// The file behind [`Ram::shared`].
    pub fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// Where it ends: its size in bytes, with the hole if there is one.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the part from address 0 ends.
    pub fn low(&self) -> u64 {
        self.low
    }

    /// Its parts: address and length.
    pub fn parts(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        [(0, self.low), (self.high, self.size - self.high)].into_iter().filter(|(_, len)| *len > 0)
    }

    /// Is there RAM at this address?
    #[inline(always)]
    pub fn contains(&self, gpa: u64) -> bool {
        gpa < self.low || (self.high..self.size).contains(&gpa)
    }

    /// Host address of guest-physical 0, for generated code and KVM memory slots. Whoever writes through it calls
    /// [`Ram::wrote`] for watched pages.
    pub fn host_base(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// The table of page generations, for generated code that checks it before a store: one 32-bit word a page; if it is not
    /// 0, [`Ram::wrote`] must be called.
    pub fn generations(&self) -> *const AtomicU32 {
        self.pages.as_ptr()
    }

    #[inline(always)]
    fn at(&self, gpa: u64, len: u64) -> Option<*mut u8> {
        let inside = gpa < self.low && len <= self.low - gpa || self.is_above(gpa, len);
        // SAFETY: the sum is inside the mapping.
        inside.then(|| unsafe { self.map.as_mut_ptr().add(gpa as usize) })
    }

    /// Is it RAM behind the hole?
    fn is_above(&self, gpa: u64, len: u64) -> bool {
        (self.high..self.size).contains(&gpa) && len <= self.size - gpa
    }

    /// See [`crate::mem::GuestMemory::id`].
    #[inline]
    pub fn id(&self) -> u64 {
        self.id.0
    }

    /// See [`crate::mem::GuestMemory::load`].
    #[inline(always)]
    pub fn load(&self, gpa: u64, width: Width) -> Option<u64> {
        let p = self.at(gpa, width.bytes())?;
        // SAFETY: `at` checked the range; unaligned volatile-like reads of plain bytes.
        Some(unsafe {
            match width {
                Width::B => u64::from(p.read_volatile()),
                Width::W => u64::from(p.cast::<u16>().read_unaligned()),
                Width::D => u64::from(p.cast::<u32>().read_unaligned()),
                Width::Q => p.cast::<u64>().read_unaligned(),
            }
        })
    }

    /// See [`crate::mem::GuestMemory::store`].
    #[inline(always)]
    pub fn store(&self, gpa: u64, width: Width, v: u64) -> Option<()> {
        let p = self.at(gpa, width.bytes())?;
        // SAFETY: as for `load`.
        unsafe {
            match width {
                Width::B => p.write_volatile(v as u8),
                Width::W => p.cast::<u16>().write_unaligned(v as u16),
                Width::D => p.cast::<u32>().write_unaligned(v as u32),
                Width::Q => p.cast::<u64>().write_unaligned(v),
            }
        }
        self.wrote(gpa);
        Some(())
    }

    /// Must a store to the page of `gpa` go through [`Ram::store`], because somebody wants to know?
    pub fn store_needs_care(&self, gpa: u64) -> bool {
        self.pages.get((gpa / PAGE_SIZE) as usize).is_none_or(|p| p.load(Ordering::Relaxed) & Ram::CARE != 0)
    }

    /// Tells that the page of `gpa` was written: cached code of it is stale.
    #[inline(always)]
    pub fn wrote(&self, gpa: u64) {
        let page = &self.pages[(gpa / PAGE_SIZE) as usize];
        if page.load(Ordering::Relaxed) & Ram::CARE != 0 {
            self.wrote_marked(page);
        }
    }

    #[cold]
    fn wrote_marked(&self, page: &AtomicU32) {
        let old = page.fetch_and(!TRACK, Ordering::Relaxed);
        if old & TRACK != 0 {
            page.fetch_or(DIRTY, Ordering::Relaxed);
        }
        if old & CODE != 0 {
            page.fetch_add(GENERATION, Ordering::Relaxed);
            self.epoch.fetch_add(1, Ordering::Release);
        }
    }

    /// Raised whenever stores to pages begin to need care because somebody notes which are written.
    pub fn tracks(&self) -> u64 {
        self.tracks.load(Ordering::Acquire)
    }

    /// Starts (or starts anew) to note which pages are written.
    pub fn track_dirty(&self) {
        self.tracks.fetch_add(1, Ordering::Release);
        self.watched.store(true, Ordering::Relaxed);
        for page in &self.pages {
            page.fetch_or(TRACK, Ordering::Relaxed);
            page.fetch_and(!DIRTY, Ordering::Relaxed);
        }
    }

    /// Must somebody who writes without our help (hardware) tell us where, by [`Ram::wrote`]?
    pub fn is_watched(&self) -> bool {
        self.watched.load(Ordering::Relaxed)
    }

    /// The page numbers written since [`Ram::track_dirty`] or the last call, which are tracked anew.
    pub fn take_dirty(&self) -> Vec<u64> {
        self.tracks.fetch_add(1, Ordering::Release);
        let mut dirty = Vec::new();
        for (number, page) in self.pages.iter().enumerate() {
            if page.load(Ordering::Relaxed) & DIRTY != 0 {
                page.fetch_and(!DIRTY, Ordering::Relaxed);
                page.fetch_or(TRACK, Ordering::Relaxed);
                dirty.push(number as u64);
            }
        }
        dirty
    }

    /// See [`crate::mem::GuestMemory::reach`].
    #[inline(always)]
    pub fn reach(&self, gpa: u64, len: u64) -> Option<Reach> {
        // SAFETY: `at` checked the range; RAM is mapped as long as it lives, and it is the guest's.
        self.at(gpa, len).map(|p| unsafe { Reach::new(p as u64) })
    }

    /// See [`crate::mem::GuestMemory::compare_exchange`]. Misaligned operands are done in two plain halves: on one vCPU that is
    /// indistinguishable, and split locks between vCPUs are not offered.
    pub fn compare_exchange(&self, gpa: u64, width: Width, old: u64, new: u64) -> Option<u64> {
        let p = self.at(gpa, width.bytes())?;
        if !gpa.is_multiple_of(width.bytes()) {
            let found = self.load(gpa, width)?;
            if found == width.cut(old) {
                self.store(gpa, width, new)?;
            }
            return Some(found);
        }
        macro_rules! cas {
            ($atomic:ty, $int:ty) => {{
                // SAFETY: in range, aligned, and only ever accessed as raw memory.
                let cell = unsafe { <$atomic>::from_ptr(p.cast()) };
                match cell.compare_exchange(old as $int, new as $int, Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(v) | Err(v) => u64::from(v),
                }
            }};
        }
        let found = match width {
            Width::B => cas!(AtomicU8, u8),
            Width::W => cas!(AtomicU16, u16),
            Width::D => cas!(AtomicU32, u32),
            Width::Q => cas!(AtomicU64, u64),
        };
        self.wrote(gpa);
        Some(found)
    }

    /// See [`crate::mem::GuestMemory::compare_exchange_16`].
    pub fn compare_exchange_16(&self, gpa: u64, old: [u64; 2], new: [u64; 2]) -> Option<Result<(), [u64; 2]>> {
        let p = self.at(gpa, 16)?;
        // SAFETY: in range; the caller checked alignment; mapped, so it cannot fault.
        let done = unsafe { crate::host::probe::compare_exchange_16(p as u64, old, new) };
        self.wrote(gpa);
        done
    }

    /// See [`crate::mem::GuestMemory::read`].
    #[inline]
    pub fn read(&self, gpa: u64, to: &mut [u8]) -> Option<()> {
        let p = self.at(gpa, to.len() as u64)?;
        // SAFETY: in range; no Rust reference to guest bytes exists, so `to` cannot overlap them.
        unsafe { std::ptr::copy_nonoverlapping(p, to.as_mut_ptr(), to.len()) };
        Some(())
    }

    /// See [`crate::mem::GuestMemory::write`].
    #[inline]
    pub fn write(&self, gpa: u64, from: &[u8]) -> Option<()> {
        let p = self.at(gpa, from.len() as u64)?;
        // SAFETY: as for `read`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), p, from.len()) };
        self.wrote_all(gpa, from.len() as u64);
        Some(())
    }

    /// See [`crate::mem::GuestMemory::copy`].
    pub fn copy(&self, from: u64, to: u64, len: u64) -> Option<()> {
        let (source, destination) = (self.at(from, len)?, self.at(to, len)?);
        // SAFETY: both in range; they may overlap; no Rust reference to guest bytes exists.
        unsafe { std::ptr::copy(source, destination, len as usize) };
        self.wrote_all(to, len);
        Some(())
    }

    /// Stores have gone there.
    fn wrote_all(&self, gpa: u64, len: u64) {
        let mut page = gpa & !(PAGE_SIZE - 1);
        while page < gpa + len {
            self.wrote(page);
            page += PAGE_SIZE;
        }
    }

    /// Gives the host back the memory of whole pages: they are zeros from now on.
    ///
    /// # Errors
    /// Not whole pages of this RAM, or the host's.
    pub fn give_back(&self, gpa: u64, len: u64) -> std::io::Result<()> {
        let whole = gpa.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE);
        if !whole || self.at(gpa, len).is_none() {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        let advice = if self.file.is_some() { UncheckedAdvice::Remove } else { UncheckedAdvice::DontNeed };
        // SAFETY: the range is inside the mapping; nothing in Rust refers to its bytes, which become zeros as by a guest's stores.
        unsafe { self.map.unchecked_advise_range(advice, gpa as usize, len as usize)? };
        (gpa..gpa + len).step_by(PAGE_SIZE as usize).for_each(|page| self.wrote(page));
        Ok(())
    }

    /// See [`crate::mem::GuestMemory::watch_code`].
    pub fn watch_code(&self, gpa: u64) {
        if let Some(page) = self.pages.get((gpa / PAGE_SIZE) as usize)
            && page.load(Ordering::Relaxed) & CODE == 0
        {
            page.fetch_or(CODE, Ordering::Relaxed);
            self.watched.store(true, Ordering::Relaxed);
            self.watches.fetch_add(1, Ordering::Release);
        }
    }

    /// Nobody wants to hear of writes to the page any more; whoever still has code of it finds it stale.
    pub fn unwatch_code(&self, gpa: u64) {
        if let Some(page) = self.pages.get((gpa / PAGE_SIZE) as usize)
            && page.fetch_and(!CODE, Ordering::Relaxed) & CODE != 0
        {
            page.fetch_add(GENERATION, Ordering::Relaxed);
            self.epoch.fetch_add(1, Ordering::Release);
        }
    }

    /// Raised whenever stores to another page begin to need care because code was cached from it.
    #[inline]
    pub fn watches(&self) -> u64 {
        self.watches.load(Ordering::Acquire)
    }

    /// See [`crate::mem::GuestMemory::epoch_cell`].
    #[inline(always)]
    pub fn epoch_cell(&self) -> &AtomicU64 {
        &self.epoch
    }

    /// See [`crate::mem::GuestMemory::code_epoch`].
    #[inline(always)]
    pub fn code_epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Address of the epoch counter, for generated code.
    pub fn epoch_address(&self) -> *const AtomicU64 {
        &raw const self.epoch
    }

    /// See [`crate::mem::GuestMemory::code_generation`].
    pub fn code_generation(&self, gpa: u64) -> u64 {
        self.pages.get((gpa / PAGE_SIZE) as usize).map_or(0, |p| u64::from(p.load(Ordering::Relaxed) / GENERATION))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hole_below_4_gib_is_no_ram() {
        let (low, four) = (3 << 20, FOUR_GIB);
        let ram = Ram::with_hole(low, 2 * PAGE_SIZE).expect("sparse");
        assert_eq!((ram.low(), ram.size()), (low, four + 2 * PAGE_SIZE));
        assert_eq!(ram.parts().collect::<Vec<_>>(), [(0, low), (four, 2 * PAGE_SIZE)]);
        for (at, there) in [
            (low - 8, true),
            (low - 4, false),
            (low, false),
            (four - 8, false),
            (four - 4, false),
            (four, true),
            (four + 2 * PAGE_SIZE - 8, true),
            (four + 2 * PAGE_SIZE - 4, false),
            (u64::MAX - 3, false),
        ] {
            assert_eq!(ram.store(at, Width::Q, at).is_some(), there, "{at:#x}");
            assert_eq!(ram.load(at, Width::Q), there.then_some(at), "{at:#x}");
        }
        assert_eq!(
            [low - 1, low, four - 1, four, ram.size()].map(|at| ram.contains(at)),
            [true, false, false, true, false]
        );
        ram.watch_code(four + PAGE_SIZE);
        ram.store(four + PAGE_SIZE, Width::B, 1).expect("RAM");
        assert_eq!(ram.code_generation(four + PAGE_SIZE), 1);
        assert!(ram.give_back(low, PAGE_SIZE).is_err() && ram.give_back(four, PAGE_SIZE).is_ok());
        assert_eq!(Ram::new(low).expect("memory").parts().collect::<Vec<_>>(), [(0, low)]);
    }

    #[test]
    fn dirty_pages_are_those_written() {
        let ram = Ram::new(4 * PAGE_SIZE).expect("16 KiB");
        ram.store(0, Width::D, 1);
        ram.track_dirty();
        assert!(ram.take_dirty().is_empty());
        ram.store(2 * PAGE_SIZE + 8, Width::Q, 1);
        ram.write(PAGE_SIZE - 1, &[1, 2]).expect("inside");
        assert_eq!(ram.take_dirty(), [0, 1, 2]);
        assert!(ram.take_dirty().is_empty());
        ram.compare_exchange(3 * PAGE_SIZE, Width::W, 0, 7);
        assert_eq!(ram.take_dirty(), [3]);
    }

    #[test]
    fn only_writes_to_watched_pages_raise_generation_and_epoch() {
        let ram = Ram::new(2 * PAGE_SIZE).expect("8 KiB");
        ram.track_dirty();
        ram.watch_code(0);
        let epoch = ram.code_epoch();
        ram.store(PAGE_SIZE, Width::B, 1);
        assert_eq!((ram.code_epoch(), ram.code_generation(0)), (epoch, 0));
        ram.store(4, Width::B, 1);
        ram.store(4, Width::B, 1);
        assert_eq!((ram.code_epoch(), ram.code_generation(0), ram.code_generation(PAGE_SIZE)), (epoch + 2, 2, 0));
    }

    #[test]
    fn a_page_can_be_watched_no_more() {
        let ram = Ram::new(2 * PAGE_SIZE).expect("8 KiB");
        ram.watch_code(PAGE_SIZE);
        ram.watch_code(PAGE_SIZE + 8);
        assert_eq!(ram.watches(), 1, "once for a page");
        let (epoch, generation) = (ram.code_epoch(), ram.code_generation(PAGE_SIZE));
        ram.unwatch_code(PAGE_SIZE);
        assert!(ram.code_epoch() != epoch && ram.code_generation(PAGE_SIZE) != generation);
        assert!(!ram.store_needs_care(PAGE_SIZE));
        ram.watch_code(PAGE_SIZE);
        assert_eq!(ram.watches(), 2);
    }

    #[test]
    fn pages_given_back_are_zeros_and_their_code_is_stale() {
        for ram in [Ram::new(4 * PAGE_SIZE), Ram::shared(4 * PAGE_SIZE)].map(|r| r.expect("16 KiB")) {
            ram.write(0, &[7; 4 * PAGE_SIZE as usize]).expect("inside");
            ram.watch_code(PAGE_SIZE);
            ram.give_back(PAGE_SIZE, 2 * PAGE_SIZE).expect("whole pages");
            let seen = [0, PAGE_SIZE, 3 * PAGE_SIZE - 1, 3 * PAGE_SIZE].map(|at| ram.load(at, Width::B));
            assert_eq!(seen, [7, 0, 0, 7].map(Some));
            assert_eq!(ram.code_generation(PAGE_SIZE), 1);
            for (at, len) in [(1, PAGE_SIZE), (0, 1), (PAGE_SIZE, 4 * PAGE_SIZE), (u64::MAX - PAGE_SIZE + 1, PAGE_SIZE)]
            {
                assert!(ram.give_back(at, len).is_err());
            }
        }
    }

    #[test]
    fn outside_is_nothing() {
        let ram = Ram::new(PAGE_SIZE).expect("4 KiB");
        assert_eq!(ram.load(PAGE_SIZE - 1, Width::W), None);
        assert_eq!(ram.load(u64::MAX, Width::B), None);
        assert_eq!(ram.store(PAGE_SIZE, Width::B, 0), None);
        assert_eq!(ram.load(PAGE_SIZE - 1, Width::B), Some(0));
    }
}
