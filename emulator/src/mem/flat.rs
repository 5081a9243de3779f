//! The address space of a Linux process: guest address = host address, and the list of what in it is the guest's.
//!
//! Pages the guest maps PROT_EXEC are mapped readable only: guest code is decoded or translated, never executed in place. A writable
//! page from which code was cached is write-protected; the fault of the first write ([`FlatSpace::write_fault`]) takes the
//! protection away and makes the cached code stale. A page to which that happens again and again is not worth it: who caches code from
//! it may be told to compare bytes instead ([`FlatSpace::watch_or_compare`]).
#![allow(unsafe_code)]

use crate::host::probe::{self, Reach};
use crate::isa::Width;
use crate::mem::PAGE_SIZE;
use crate::mem::guest::Id;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};

bitflags::bitflags! {
    /// Rights of a mapping, mmap(2)'s bits.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct Prot: i32 {
        /// PROT_READ.
        const READ = libc::PROT_READ;
        /// PROT_WRITE.
        const WRITE = libc::PROT_WRITE;
        /// PROT_EXEC.
        const EXEC = libc::PROT_EXEC;
    }
}

/// One mapping of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// End, exclusive.
    pub end: u64,
    /// Rights as the guest asked for them.
    pub prot: Prot,
    /// MAP_SHARED.
    pub shared: bool,
    /// What /proc/self/maps shows: file name, `[heap]`, `[stack]`, or empty.
    pub name: std::sync::Arc<str>,
    /// Offset in the file.
    pub offset: u64,
    /// What is mapped. Another mapping of the same may write the code of this one, if both are shared.
    pub backing: Option<Backing>,
}

/// A file, or a segment of shared memory: device and inode.
pub type Backing = (u64, u64);

impl Vma {
    /// The part inside `range`, which must overlap it.
    fn cut_to(&self, range: &Range<u64>) -> Vma {
        let start = self.start.max(range.start);
        Vma { start, end: self.end.min(range.end), offset: self.offset + (start - self.start), ..self.clone() }
    }
}

/// The guest's part of the host's address space.
#[derive(Default)]
pub struct FlatSpace {
    vmas: RwLock<BTreeMap<u64, Vma>>,
    watched: Mutex<HashMap<u64, Watch>>,
    epoch: AtomicU64,
    id: Id,
    listeners: Mutex<Vec<Listener>>,
    exec_epoch: AtomicU64,
}

/// Told the address of each page whose cached code became stale; false: not interested any more.
pub type Listener = Box<dyn Fn(u64) -> bool + Send + Sync>;

/// After so many faults of writes a page is not protected any more for who can compare.
const MOST_FAULTS: u32 = 32;

#[derive(Default)]
struct Watch {
    generation: u64,
    /// Faults of writes.
    faults: u32,
    /// Code was cached since the last write: the page is write-protected if the guest may write it.
    armed: bool,
    /// Other pages with the same contents from which code was cached.
    code: Vec<u64>,
}

fn page_of(addr: u64) -> u64 {
    addr & !(PAGE_SIZE - 1)
}

impl FlatSpace {
    /// Nothing mapped.
    pub fn new() -> FlatSpace {
        FlatSpace::default()
    }

    /// Keeps other threads out, so that a fork does not copy a taken lock.
    pub fn lock_for_fork(&self) -> impl Sized + '_ {
        // Pages before mappings, as everywhere.
        let watched = self.watched.lock().expect("no panic under the lock");
        let vmas = self.vmas.write().expect("no panic under the lock");
        let listeners = self.listeners.lock().expect("no panic under the lock");
        (watched, vmas, listeners)
    }

    /// The mapping that holds `addr`.
    pub fn find(&self, addr: u64) -> Option<Vma> {
        let vmas = self.vmas.read().expect("no panic under the lock");
        vmas.range(..=addr).next_back().map(|(_, v)| v).filter(|v| addr < v.end).cloned()
    }

    /// All mappings in order of address.
    pub fn all(&self) -> Vec<Vma> {
        self.vmas.read().expect("no panic under the lock").values().cloned().collect()
    }

    /// Is every byte of the range in some mapping of the guest?
    pub fn covers(&self, range: Range<u64>) -> bool {
        let vmas = self.vmas.read().expect("no panic under the lock");
        let mut at = range.start;
        while at < range.end {
            match vmas.range(..=at).next_back().map(|(_, v)| v).filter(|v| at < v.end) {
                Some(v) => at = v.end,
                None => return false,
            }
        }
        true
    }

    /// Records a mapping just made on the host (replacing what was there).
    pub fn insert(&self, vma: Vma) {
        let range = vma.start..vma.end;
        let mut vmas = self.vmas.write().expect("no panic under the lock");
        self.replaced(&cut(&mut vmas, range.clone()), vma.prot);
        vmas.insert(vma.start, vma.clone());
        drop(vmas);
        self.invalidate(range);
        self.new_view(&vma);
    }

    /// Records that a range is no longer mapped.
    pub fn remove(&self, range: Range<u64>) {
        self.replaced(&cut(&mut self.vmas.write().expect("no panic under the lock"), range.clone()), Prot::empty());
        self.invalidate(range);
    }

    /// Records new rights of a range.
    pub fn protect(&self, range: Range<u64>, prot: Prot) {
        let mut vmas = self.vmas.write().expect("no panic under the lock");
        let parts = cut(&mut vmas, range.clone());
        self.replaced(&parts, prot);
        for v in &parts {
            vmas.insert(v.start, Vma { prot, ..v.clone() });
        }
        drop(vmas);
        self.invalidate(range);
        parts.into_iter().for_each(|v| self.new_view(&Vma { prot, ..v }));
    }

    fn replaced(&self, old: &[Vma], prot: Prot) {
        if !prot.contains(Prot::EXEC) && old.iter().any(|v| v.prot.contains(Prot::EXEC)) {
            self.exec_epoch.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Raised whenever something lost the right to execute, which the host does not enforce: for an engine with page tables of its
    /// own.
    #[inline(always)]
    pub fn exec_epoch(&self) -> u64 {
        self.exec_epoch.load(Ordering::Acquire)
    }

    /// The parts of `range` that are mapped, cut to it.
    pub fn parts(&self, range: Range<u64>) -> Vec<Vma> {
        let vmas = self.vmas.read().expect("no panic under the lock");
        let first = vmas.range(..range.start).next_back().filter(|(_, v)| v.end > range.start);
        first.into_iter().chain(vmas.range(range.clone())).map(|(_, v)| v.cut_to(&range)).collect()
    }

    /// The rights a guest mapping has on the host: never executable.
    pub fn host_prot(prot: Prot) -> i32 {
        let read = if prot.contains(Prot::EXEC) { Prot::READ } else { Prot::empty() };
        ((prot - Prot::EXEC) | read).bits()
    }

    /// A write to `addr` faulted. True if it was because of a watched page: the page is writable now, its code stale; retry.
    pub fn write_fault(&self, addr: u64) -> bool {
        let page = page_of(addr);
        let mut watched = self.watched.lock().expect("no panic under the lock");
        let Some(watch) = watched.get_mut(&page) else { return false };
        let Some(vma) = self.find(page).filter(|v| v.prot.contains(Prot::WRITE)) else { return false };
        // Not armed: another thread was first, the page is writable already; or a change of rights met the watching of the page half
        // way, then the rights are set right here.
        if watch.armed {
            watch.faults += 1;
            let mut pages = std::mem::take(&mut watch.code);
            pages.push(page);
            // Before the page is writable: nobody may write it and then run what was cached.
            self.stale(&mut watched, pages);
        }
        host_protect(page, FlatSpace::host_prot(vma.prot));
        true
    }

    /// Takes the write protection of all watched pages in the range away, for a system call that writes there itself.
    /// True if there was one.
    pub fn expect_write(&self, range: Range<u64>) -> bool {
        let pages: Vec<u64> = {
            let watched = self.watched.lock().expect("no panic under the lock");
            watched.iter().filter(|(p, w)| w.armed && range.contains(p)).map(|(p, _)| *p).collect()
        };
        pages.into_iter().filter(|&p| self.write_fault(p)).count() > 0
    }

    fn invalidate(&self, range: Range<u64>) {
        let mut watched = self.watched.lock().expect("no panic under the lock");
        let pages: Vec<u64> = if (range.end - range.start) / PAGE_SIZE < watched.len() as u64 {
            range.step_by(PAGE_SIZE as usize).filter(|p| watched.contains_key(p)).collect()
        } else {
            watched.keys().filter(|p| range.contains(p)).copied().collect()
        };
        self.stale(&mut watched, pages);
    }

    /// What was cached from these pages is no longer valid.
    fn stale(&self, watched: &mut HashMap<u64, Watch>, pages: Vec<u64>) {
        if pages.is_empty() {
            return;
        }
        for page in &pages {
            if let Some(w) = watched.get_mut(page) {
                w.generation += 1;
                w.armed = false;
            }
        }
        self.epoch.fetch_add(1, Ordering::SeqCst);
        pages.into_iter().for_each(|p| self.tell(p));
    }

    /// The pages of other mappings that share the contents of `page`, which is in `vma`, and may be written there.
    fn writable_views(&self, page: u64, vma: &Vma) -> Vec<(u64, Prot)> {
        if !vma.shared || vma.backing.is_none() {
            return Vec::new();
        }
        let offset = vma.offset + (page - vma.start);
        let vmas = self.vmas.read().expect("no panic under the lock");
        let others = vmas.values().filter(|v| v.shared && v.backing == vma.backing && v.prot.contains(Prot::WRITE));
        let holding = others.filter(|v| (v.offset..v.offset + (v.end - v.start)).contains(&offset));
        holding.map(|v| (v.start + (offset - v.offset), v.prot)).filter(|&(p, _)| p != page).collect()
    }

    /// A shared mapping became writable: code cached from other views of it is given up, and watched again when it runs.
    fn new_view(&self, vma: &Vma) {
        if !vma.shared || vma.backing.is_none() || !vma.prot.contains(Prot::WRITE) {
            return;
        }
        let mut watched = self.watched.lock().expect("no panic under the lock");
        let offsets = vma.offset..vma.offset + (vma.end - vma.start);
        let same = |&page: &u64| {
            let view = self.find(page).filter(|v| v.shared && v.backing == vma.backing);
            view.is_some_and(|v| offsets.contains(&(v.offset + (page - v.start))))
        };
        let pages: Vec<u64> = watched.iter().filter(|(_, w)| w.armed).map(|(p, _)| *p).filter(same).collect();
        self.stale(&mut watched, pages);
    }

    /// From now on `listener` is told of each page that became stale, after the epoch was raised and before anybody can write the
    /// page. It is called under the lock of the watched pages: it must not call back here.
    ///
    /// A listener that takes a lock of its own must never hold that lock while it calls [`FlatSpace::watch_code`].
    pub fn listen(&self, listener: Listener) {
        self.listeners.lock().expect("no panic under the lock").push(listener);
    }

    fn tell(&self, page: u64) {
        self.listeners.lock().expect("no panic under the lock").retain(|l| l(page));
    }

    /// See [`crate::mem::GuestMemory::watch_code`].
    pub fn watch_code(&self, addr: u64) {
        self.watch(addr, u32::MAX);
    }

    /// See [`crate::mem::GuestMemory::watch_or_compare`].
    pub fn watch_or_compare(&self, addr: u64) -> bool {
        self.watch(addr, MOST_FAULTS)
    }

    fn watch(&self, addr: u64, most_faults: u32) -> bool {
        let page = page_of(addr);
        let mut watched = self.watched.lock().expect("no panic under the lock");
        let watch = watched.entry(page).or_default();
        if watch.armed {
            return true;
        }
        let Some(vma) = self.find(page) else {
            watch.armed = true;
            return true;
        };
        // Another view of what is shared may be the one that is written; the faults there are not counted here.
        if watch.faults >= most_faults && vma.prot.contains(Prot::WRITE) && !vma.shared {
            return false;
        }
        watch.armed = true;
        if vma.prot.contains(Prot::WRITE) {
            host_protect(page, FlatSpace::host_prot(vma.prot - Prot::WRITE));
        }
        for (view, prot) in self.writable_views(page, &vma) {
            let watch = watched.entry(view).or_default();
            watch.armed = true;
            if !watch.code.contains(&page) {
                watch.code.push(page);
            }
            host_protect(view, FlatSpace::host_prot(prot - Prot::WRITE));
        }
        true
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

    /// See [`crate::mem::GuestMemory::code_generation`].
    pub fn code_generation(&self, addr: u64) -> u64 {
        self.watched.lock().expect("no panic under the lock").get(&page_of(addr)).map_or(0, |w| w.generation)
    }

    /// See [`crate::mem::GuestMemory::id`].
    #[inline]
    pub fn id(&self) -> u64 {
        self.id.0
    }

    /// See [`crate::mem::GuestMemory::load`].
    #[inline(always)]
    pub fn load(&self, addr: u64, width: Width) -> Option<u64> {
        probe::load(addr, width)
    }

    /// See [`crate::mem::GuestMemory::store`].
    #[inline(always)]
    pub fn store(&self, addr: u64, width: Width, v: u64) -> Option<()> {
        // SAFETY: a flat guest shares the host's address space by design (see SECURITY.md); faults are caught.
        unsafe { probe::store(addr, width, v) }.or_else(|| {
            // SAFETY: as above.
            self.write_fault(addr).then(|| unsafe { probe::store(addr, width, v) })?
        })
    }

    /// See [`crate::mem::GuestMemory::reach`].
    #[inline(always)]
    pub fn reach(&self, addr: u64) -> Reach {
        // SAFETY: as for `store`; the fault of an access is caught by whoever makes it.
        unsafe { Reach::new(addr) }
    }

    /// See [`crate::mem::GuestMemory::compare_exchange`].
    pub fn compare_exchange(&self, addr: u64, width: Width, old: u64, new: u64) -> Option<u64> {
        // SAFETY: as for `store`.
        unsafe { probe::compare_exchange(addr, width, old, new) }.or_else(|| {
            // SAFETY: as for `store`.
            self.write_fault(addr).then(|| unsafe { probe::compare_exchange(addr, width, old, new) })?
        })
    }

    /// See [`crate::mem::GuestMemory::compare_exchange_16`].
    pub fn compare_exchange_16(&self, addr: u64, old: [u64; 2], new: [u64; 2]) -> Option<Result<(), [u64; 2]>> {
        // SAFETY: as for `store`.
        unsafe { probe::compare_exchange_16(addr, old, new) }.or_else(|| {
            // SAFETY: as for `store`.
            self.write_fault(addr).then(|| unsafe { probe::compare_exchange_16(addr, old, new) })?
        })
    }

    /// See [`crate::mem::GuestMemory::read`].
    pub fn read(&self, addr: u64, to: &mut [u8]) -> Option<()> {
        probe::read(addr, to).ok()
    }

    /// See [`crate::mem::GuestMemory::write`].
    pub fn write(&self, addr: u64, from: &[u8]) -> Option<()> {
        let mut done = 0;
        // One retry for each watched page on the way.
        loop {
            // SAFETY: as for `store`.
            match unsafe { probe::write(addr + done as u64, &from[done..]) } {
                Ok(()) => return Some(()),
                Err(n) => done += n,
            }
            if !self.write_fault(addr + done as u64) {
                return None;
            }
        }
    }
}

/// Takes the range out of the map, splitting what hangs over; gives the parts that were inside.
fn cut(vmas: &mut BTreeMap<u64, Vma>, range: Range<u64>) -> Vec<Vma> {
    let first = vmas.range(..range.start).next_back().filter(|(_, v)| v.end > range.start).map(|(k, _)| *k);
    let keys: Vec<u64> = first.into_iter().chain(vmas.range(range.clone()).map(|(k, _)| *k)).collect();
    let mut inside = Vec::new();
    for key in keys {
        let v = vmas.remove(&key).expect("key was just found");
        if v.start < range.start {
            vmas.insert(v.start, v.cut_to(&(v.start..range.start)));
        }
        if v.end > range.end {
            vmas.insert(range.end, v.cut_to(&(range.end..v.end)));
        }
        inside.push(v.cut_to(&range));
    }
    inside
}

fn host_protect(page: u64, prot: i32) {
    // SAFETY: the page belongs to a guest mapping; Rust holds no reference into it.
    unsafe { libc::mprotect(page as *mut libc::c_void, PAGE_SIZE as usize, prot) };
}
