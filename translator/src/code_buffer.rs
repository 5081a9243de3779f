//! Memory for translated code: one memfd mapped twice, once to write and once to execute, so that nothing is ever both.
//!
//! The code lies in the host's huge pages where it gives them: a compiler's code, translated, is thousands of small ones, more than a
//! CPU has TLB entries for.
//!
//! In front of the code lies the table of branch targets: a code address for each value of the low 16 bits of a guest address, or, where
//! branches add to it what says that they are foreseen ([`adds_up`]), a number and which bits of the target are added to it.
//! Every thread maps it read-only behind its thread block, so that generated code reaches it through GS. At first the table is half as
//! large and mapped twice, so that the highest of these bits does not count: most programs need no more, and its pages are a good part
//! of what starting one costs.
//!
//! A forked child goes on sharing the code that was complete at the fork with its parent ([`CodeBuffer::freeze`]): neither writes there
//! any more, and who has to takes a copy of that piece first.
#![allow(unsafe_code)]

use crate::lower::{ADDEND, addend, adds_up};
use bivisor_emulator::host::code_space::{self, Claim};
use bivisor_emulator::host::reserved::Reserved;
use bivisor_emulator::host::thread::{ENGINE_AREA_OFFSET, ENGINE_AREA_SIZE, ThreadBlock};
use std::cell::Cell;
use std::fs::File;
use std::io::{Error, IoSlice, Result, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

/// Entries of the table of branch targets: at first, at last.
const FEW_ENTRIES: usize = 1 << 15;
const MOST_ENTRIES: usize = 1 << 16;
/// Where the code begins in the memory, which is where a huge page may begin.
const CODE_AT: usize = HUGE;
/// A huge page.
const HUGE: usize = 2 << 20;
/// Memory is asked for in pieces of this size, of the smaller one after a fork.
const PIECE: usize = 64 << 10;
const SMALL_PIECE: usize = 16 << 10;
/// What is shared over a fork is copied in pieces of this size.
const SHARED_PIECE: usize = 16 << 10;
const _: () = assert!(16 * MOST_ENTRIES <= ENGINE_AREA_SIZE && 16 * MOST_ENTRIES <= CODE_AT);

/// The two views. Offsets count from the start of the code.
pub struct CodeBuffer {
    /// Writable view of table and code.
    rw: *mut u8,
    /// Executable view of the code.
    rx: *mut u8,
    size: usize,
    used: usize,
    /// Of the table.
    entries: usize,
    /// Bytes of one.
    entry_size: usize,
    /// That no executable memory lies where a branch may go astray; there may be no such place.
    place: Option<Claim>,
    /// Rarely executed code lies from here on to the end, put downwards, so that it does not lie between what is executed often.
    cold: usize,
    /// The memory, as long as nothing was written to the table.
    fresh: Option<OwnedFd>,
    /// The host has given memory up to here, and from there on for the cold part.
    ready: usize,
    cold_ready: usize,
    /// The host was asked to make one of so many of the first huge pages.
    huge: usize,
    /// In what pieces it is asked.
    piece: usize,
    /// Which pieces are shared with a parent or a child.
    shared: Vec<Cell<bool>>,
}

// SAFETY: the views are plain memory owned by this value; all writes to code that other threads may execute are single aligned-enough
// stores.
unsafe impl Send for CodeBuffer {}

impl CodeBuffer {
    /// Room for `size` bytes of code; pages take memory when they are written.
    ///
    /// # Errors
    /// The host's, e.g. if it allows no executable mappings.
    pub fn new(size: usize) -> Result<CodeBuffer> {
        let size = size.next_multiple_of(4096).min(1 << 30);
        // The descriptor is closed with the first filling of the table: the guest never sees it.
        let fd = memfd(CODE_AT + size)?;
        // SAFETY: fresh mappings of our own file over addresses reserved for them; failure of the second unmaps the first by `Drop`.
        unsafe {
            let rw = Reserved::anywhere(CODE_AT + size, HUGE)?.keep();
            map(rw, CODE_AT + size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_FIXED, &fd, 0)?;
            let mut buffer = CodeBuffer {
                rw,
                rx: std::ptr::null_mut(),
                size,
                used: 0,
                entries: FEW_ENTRIES,
                entry_size: if adds_up() { 16 } else { 8 },
                place: None,
                cold: size - 64,
                fresh: None,
                ready: 0,
                cold_ready: size,
                huge: 0,
                piece: PIECE,
                shared: vec![Cell::new(false); size.div_ceil(SHARED_PIECE)],
            };
            let prot = libc::PROT_READ | libc::PROT_EXEC;
            let apart = if adds_up() { code_space::reserve(size, HUGE).ok() } else { None };
            let (rx, place) = match apart {
                Some((rx, place)) => (rx, Some(place)),
                None => (Reserved::anywhere(size, HUGE)?.keep(), None),
            };
            buffer.place = place;
            buffer.rx = map(rx, size, prot, libc::MAP_FIXED, &fd, CODE_AT)?;
            buffer.fresh = Some(fd);
            Ok(buffer)
        }
    }

    /// Asks for the memory of a range of the writable view at once, which costs a fraction of a fault for each page. It need not succeed.
    fn populate(&self, range: Range<usize>) {
        // SAFETY: our own mapping; the content does not change.
        unsafe { libc::madvise(self.rw.add(range.start).cast(), range.len(), libc::MADV_POPULATE_WRITE) };
    }

    /// Host address of code offset 0.
    pub fn base(&self) -> u64 {
        self.rx as u64
    }

    /// Bytes there are.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Bytes of memory in use: table, code, rarely executed code.
    pub fn memory(&self) -> usize {
        self.entries * self.entry_size + self.used + self.size - self.cold
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Where the next piece of code will start. It is not aligned: branch predictors (seen on Zen) tell targets apart by their low
    /// bits, and a threaded interpreter ran four times slower with aligned ones.
    pub fn next(&self) -> usize {
        self.used
    }

    /// Is there room for `len` more bytes?
    pub fn fits(&self, len: usize) -> bool {
        self.next() + len <= self.cold
    }

    /// End of the rarely executed code.
    pub fn cold_end(&self) -> usize {
        self.size - 64
    }

    /// Puts rarely executed code below what is there. The caller has asked [`CodeBuffer::fits`].
    pub fn append_cold(&mut self, code: &[u8]) {
        let at = self.cold - code.len();
        assert!(at >= self.used, "the code buffer is full");
        if at < self.cold_ready {
            let start = (at / self.piece * self.piece).max(self.ready);
            if start < self.cold_ready {
                self.populate(CODE_AT + start..CODE_AT + self.cold_ready);
            }
            self.cold_ready = start;
        }
        // SAFETY: in range of the writable view; nobody executes there yet.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.rw.add(CODE_AT + at), code.len()) };
        self.cold = at;
    }

    /// Puts `code` at [`CodeBuffer::next`]; gives its offset. The caller has asked [`CodeBuffer::fits`].
    pub fn append(&mut self, code: &[u8]) -> usize {
        let at = self.next();
        assert!(at + code.len() <= self.cold, "the code buffer is full");
        if at + code.len() > self.ready {
            let end = (at + code.len()).next_multiple_of(self.piece).min(self.size);
            self.populate(CODE_AT + self.ready..CODE_AT + end);
            self.ready = end;
        }
        // SAFETY: in range of the writable view; nobody executes beyond `used`.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.rw.add(CODE_AT + at), code.len()) };
        self.used = at + code.len();
        let start = self.huge * HUGE;
        if self.used > start + HUGE / 4 && start + HUGE <= self.size {
            // What is still free of it comes along. It need not succeed: there may be none, or a kernel before 6.1.
            // SAFETY: our own mapping; the content does not change.
            unsafe { libc::madvise(self.rx.add(start).cast(), HUGE, libc::MADV_COLLAPSE) };
            self.huge += 1;
        }
        at
    }

    /// Forgets everything from offset `keep` on. No thread may execute there any more.
    pub fn reset(&mut self, keep: usize) {
        if self.shared.iter().any(Cell::get) {
            self.renew(0..self.size, keep);
            self.shared.iter().for_each(|s| s.set(false));
            (self.ready, self.cold_ready, self.huge) = (0, self.size, 0);
        }
        self.used = self.used.min(keep);
        self.cold = self.cold_end();
    }

    /// Replaces the 32-bit displacement at `at`, which does not cross a cache line, so that it leads to code offset `target`.
    pub fn patch(&self, at: usize, target: usize) {
        assert!(at + 4 <= self.used && at % 64 <= 60, "no patchable field");
        self.unshare(at / SHARED_PIECE);
        let displacement = (target as i64 - (at as i64 + 4)) as i32;
        // SAFETY: in range; x86 executes either the old or the new displacement, both lead to live code: the field lies in one cache
        // line, where one store instruction is atomic.
        unsafe {
            let field = self.rw.add(CODE_AT + at);
            std::arch::asm!("mov dword ptr [{}], {:e}", in(reg) field, in(reg) displacement, options(nostack, preserves_flags));
        }
    }

    /// The same for an 8-bit displacement, which must reach.
    pub fn patch_short(&self, at: usize, target: usize) {
        assert!(at < self.used, "no patchable field");
        self.unshare(at / SHARED_PIECE);
        let displacement =
            i8::try_from(target as i64 - (at as i64 + 1)).expect("a short jump reaches its block and its stub");
        // SAFETY: in range; a byte is written at once.
        unsafe { self.rw.add(CODE_AT + at).cast::<i8>().write_volatile(displacement) };
    }

    /// Does the 32-bit displacement at `at` lead to code offset `target`?
    pub fn leads(&self, at: usize, target: usize) -> bool {
        assert!(at + 4 <= self.used, "no code");
        // SAFETY: in range; only who holds this value writes there.
        let displacement = unsafe { self.rx.add(at).cast::<i32>().read_unaligned() };
        i64::from(displacement) == target as i64 - (at as i64 + 4)
    }

    /// Is the byte at `at` shared with a parent or a child, so that a patch there costs more?
    pub fn is_shared(&self, at: usize) -> bool {
        self.shared[at / SHARED_PIECE].get()
    }

    fn piece(&self, piece: usize) -> Range<usize> {
        piece * SHARED_PIECE..((piece + 1) * SHARED_PIECE).min(self.size)
    }

    /// From now on, a child that is about to be forked has what is complete in common with us.
    pub fn freeze(&self) {
        // The last one holds the generation.
        let cold = self.cold.div_ceil(SHARED_PIECE)..self.shared.len() - 1;
        (0..self.used / SHARED_PIECE).chain(cold).for_each(|piece| self.shared[piece].set(true));
    }

    /// Makes a shared piece ours, with what is in it.
    fn unshare(&self, piece: usize) {
        if self.shared[piece].replace(false) {
            let range = self.piece(piece);
            self.renew(range.clone(), range.len());
        }
    }

    /// Other memory for a part of both views, with so many of the bytes in it. It is executable all the while, and no mapping is ever
    /// writable and executable.
    fn renew(&self, part: Range<usize>, keep: usize) {
        let len = part.len();
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let to = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: a fresh mapping, of which a second one and then itself take the place of our own views. No descriptor is needed, of
        // which the guest may have left none.
        let done = unsafe {
            let (rw, rx) = (self.rw.add(CODE_AT + part.start), self.rx.add(part.start));
            let p = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            p != libc::MAP_FAILED && {
                std::ptr::copy_nonoverlapping(rx, p.cast::<u8>(), keep);
                libc::mprotect(p, len, libc::PROT_READ | libc::PROT_EXEC) == 0
                    && libc::mremap(p, 0, len, to, rx) != libc::MAP_FAILED
                    && libc::mprotect(p, len, libc::PROT_READ | libc::PROT_WRITE) == 0
                    && libc::mremap(p, len, len, to, rw) != libc::MAP_FAILED
            }
        };
        assert!(done, "memory for the code cache");
    }

    /// The table entry of a guest address.
    pub fn index(&self, guest: u64) -> u16 {
        guest as u16 & (self.entries - 1) as u16
    }

    fn word(&self, index: usize, word: usize) -> &AtomicU64 {
        assert!(index < self.entries && word < self.entry_size / 8, "no entry");
        // SAFETY: in range of the table; it is only accessed as atomics.
        unsafe { &*self.rw.cast::<AtomicU64>().add(index * self.entry_size / 8 + word) }
    }

    /// Sets a branch target, which [`CodeBuffer::index`] gave, to code offset `target`.
    ///
    /// A thread that reads one word before this and the other after it goes astray.
    pub fn set_target(&self, index: u16, target: usize) {
        if self.entry_size > 8 {
            self.word(index.into(), 1).store(0, Ordering::Release);
        }
        self.word(index.into(), 0).store(self.base() + target as u64, Ordering::Release);
    }

    /// Sets it to code offset `target` for branches to `guest`; others go astray.
    pub fn set_only_target(&self, index: u16, target: usize, guest: u64) {
        assert!(self.is_alone());
        let to = (self.base() + target as u64).wrapping_sub(addend(guest));
        self.word(index.into(), 0).store(to, Ordering::Release);
        self.word(index.into(), 1).store(ADDEND, Ordering::Release);
    }

    /// Is nothing executable where a branch may go astray?
    pub fn is_alone(&self) -> bool {
        self.place.is_some()
    }

    /// Would so many targets be better off with a larger table?
    pub fn is_narrow(&self, targets: usize) -> bool {
        self.entries < MOST_ENTRIES && targets > FEW_ENTRIES / 4
    }

    /// Makes the table as large as it can be. All branch targets are `target` then. Threads that have mapped it as it was see the first
    /// half of it twice until they map it again, and miss what is in the other.
    pub fn widen(&mut self, target: usize) {
        self.entries = MOST_ENTRIES;
        self.set_targets(0..MOST_ENTRIES, target);
    }

    fn set_targets(&self, range: Range<usize>, target: usize) {
        range.for_each(|i| self.set_target(i as u16, target));
    }

    /// Sets all branch targets.
    pub fn fill_targets(&mut self, target: usize) {
        // Written by the kernel, fresh memory costs half of what it does through the mapping.
        let size = self.entries * self.entry_size;
        if let Some(fd) = self.fresh.take() {
            let entry = [self.base() + target as u64, 0].map(u64::to_ne_bytes).concat();
            let page = entry[..self.entry_size].repeat(4096 / self.entry_size);
            let pages = vec![IoSlice::new(&page); size / page.len()];
            if File::from(fd).write_vectored(&pages).is_ok_and(|n| n == size) {
                // Faults would come one by one. It need not succeed.
                // SAFETY: our own mapping; the content does not change.
                unsafe { libc::madvise(self.rw.cast(), size, libc::MADV_POPULATE_READ) };
                return;
            }
        }
        self.set_targets(0..self.entries, target);
    }

    fn generation_cell(&self) -> &AtomicU64 {
        // SAFETY: the last eight bytes are never code: see `fits`.
        unsafe { &*self.rw.add(CODE_AT + self.size - 8).cast::<AtomicU64>() }
    }

    /// A number kept in the memory itself: a forked child sees there what the parent has set since.
    pub fn generation(&self) -> u64 {
        self.generation_cell().load(Ordering::SeqCst)
    }

    /// Sets it.
    pub fn set_generation(&self, v: u64) {
        self.generation_cell().store(v, Ordering::SeqCst);
    }

    /// Maps the table behind the calling thread's block, and nothing behind it; `all`: another engine may have something there.
    ///
    /// # Errors
    /// The host's.
    pub fn map_table(&self, block: &ThreadBlock, all: bool) -> Result<()> {
        let area = block.this as usize + ENGINE_AREA_OFFSET;
        if all {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
            // SAFETY: the area behind the block is reserved for the engine that runs.
            let p = unsafe { libc::mmap(area as *mut libc::c_void, ENGINE_AREA_SIZE, libc::PROT_NONE, flags, -1, 0) };
            if p == libc::MAP_FAILED {
                return Err(Error::last_os_error());
            }
        }
        let size = self.entries * self.entry_size;
        for at in (area..area + MOST_ENTRIES * self.entry_size).step_by(size) {
            // SAFETY: as above. An old size of 0 makes a second mapping of a shared one (mremap(2)).
            unsafe {
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let p = libc::mremap(self.rw.cast(), 0, size, flags, at as *mut libc::c_void);
                if p == libc::MAP_FAILED {
                    return Err(Error::last_os_error());
                }
            }
        }
        // SAFETY: the mappings just made.
        unsafe {
            if libc::mprotect(area as *mut libc::c_void, MOST_ENTRIES * self.entry_size, libc::PROT_READ) != 0 {
                return Err(Error::last_os_error());
            }
        }
        Ok(())
    }

    /// After fork, in the child: memory of its own with the same code at the same addresses, but for what was frozen; until then the
    /// views are shared with the parent. All branch targets are `target` then; the table behind the thread block must be mapped again.
    ///
    /// # Errors
    /// The host's.
    pub fn after_fork(&mut self, target: usize) -> Result<()> {
        let fd = memfd(CODE_AT + self.size)?;
        let own: Vec<Range<usize>> =
            runs(&self.shared).map(|r| self.piece(r.start).start..self.piece(r.end - 1).end).collect();
        for run in &own {
            for part in [run.start..run.end.min(self.used), run.start.max(self.cold)..run.end] {
                let (from, len) = (CODE_AT + part.start, part.len());
                // SAFETY: reads our own mapping; the file is new.
                let written =
                    unsafe { libc::pwrite(fd.as_raw_fd(), self.rw.add(from).cast(), len, from as libc::off_t) };
                if written != len as isize {
                    return Err(Error::last_os_error());
                }
            }
        }
        // After the copy: a flush that was under way meanwhile shows here.
        let generation = self.generation();
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let rx = libc::PROT_READ | libc::PROT_EXEC;
        // SAFETY: replaces our own mappings, while no thread but this one exists.
        unsafe {
            map(self.rw, CODE_AT, rw, libc::MAP_FIXED, &fd, 0)?;
            for run in own {
                let at = CODE_AT + run.start;
                map(self.rw.add(at), run.len(), rw, libc::MAP_FIXED, &fd, at)?;
                map(self.rx.add(run.start), run.len(), rx, libc::MAP_FIXED, &fd, at)?;
            }
        }
        self.piece = SMALL_PIECE;
        self.ready = self.used.next_multiple_of(4096);
        self.cold_ready = self.cold / 4096 * 4096;
        self.set_generation(generation);
        self.fresh = Some(fd);
        self.fill_targets(target);
        Ok(())
    }

    /// The code in use, for tests and `explain`.
    pub fn code(&self, range: Range<usize>) -> Vec<u8> {
        assert!(range.start <= range.end && range.end <= self.used, "not code");
        // SAFETY: in range; bytes are copied at once.
        unsafe { std::slice::from_raw_parts(self.rx.add(range.start), range.len()).to_vec() }
    }
}

impl Drop for CodeBuffer {
    fn drop(&mut self) {
        // SAFETY: our own mappings; no thread is inside when the last owner goes.
        unsafe {
            libc::munmap(self.rw.cast(), CODE_AT + self.size);
            if !self.rx.is_null() {
                libc::munmap(self.rx.cast(), self.size);
            }
        }
    }
}

/// Maps a file that [`crate::jitdump`] made as perf(1) wants it: an executable mapping is what it notes while it records. Nothing is ever
/// executed there. If it cannot be, perf does not find the file.
pub fn show_to_perf(file: &File) {
    let prot = libc::PROT_READ | libc::PROT_EXEC;
    // SAFETY: a fresh mapping that nobody uses.
    unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, libc::MAP_PRIVATE, file.as_raw_fd(), 0) };
}

/// Where pieces that are not shared follow each other.
fn runs(shared: &[Cell<bool>]) -> impl Iterator<Item = Range<usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at + shared[at..].iter().position(|s| !s.get())?;
        at = start + shared[start..].iter().position(Cell::get).unwrap_or(shared.len() - start);
        Some(start..at)
    })
}

fn memfd(size: usize) -> Result<OwnedFd> {
    // SAFETY: a fresh descriptor, owned from here on.
    let fd = unsafe {
        let fd = libc::memfd_create(c"bivisor-code".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: plain call.
    if unsafe { libc::ftruncate(fd.as_raw_fd(), size as i64) } < 0 {
        return Err(Error::last_os_error());
    }
    Ok(fd)
}

/// # Safety
/// With MAP_FIXED, `at` must be the caller's to replace.
unsafe fn map(at: *mut u8, len: usize, prot: i32, flags: i32, fd: &OwnedFd, offset: usize) -> Result<*mut u8> {
    // SAFETY: the caller's promise.
    let p = unsafe { libc::mmap(at.cast(), len, prot, libc::MAP_SHARED | flags, fd.as_raw_fd(), offset as i64) };
    if p == libc::MAP_FAILED { Err(Error::last_os_error()) } else { Ok(p.cast()) }
}

/// One page that a fork wipes in the child: says whether we are in a copy of the address space (not so after vfork).
pub struct ForkMark {
    page: *const AtomicI32,
}

// SAFETY: an atomic in memory that lives as long as the value.
unsafe impl Send for ForkMark {}
// SAFETY: as above.
unsafe impl Sync for ForkMark {}

impl ForkMark {
    /// Not forked.
    ///
    /// # Errors
    /// The host's (Linux before 4.14).
    pub fn new() -> Result<ForkMark> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh page.
        let page = unsafe {
            let p = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            if p == libc::MAP_FAILED || libc::madvise(p, 4096, libc::MADV_WIPEONFORK) != 0 {
                return Err(Error::last_os_error());
            }
            p
        };
        let mark = ForkMark { page: page.cast_const().cast() };
        mark.set();
        Ok(mark)
    }

    fn cell(&self) -> &AtomicI32 {
        // SAFETY: mapped as long as self lives.
        unsafe { &*self.page }
    }

    /// Is this a forked child in which [`ForkMark::set`] was not called?
    #[inline]
    pub fn forked(&self) -> bool {
        self.cell().load(Ordering::Relaxed) == 0
    }

    /// The child has done what it must.
    pub fn set(&self) {
        self.cell().store(1, Ordering::Relaxed);
    }
}

impl Drop for ForkMark {
    fn drop(&mut self) {
        // SAFETY: our own page.
        unsafe { libc::munmap(self.page as *mut libc::c_void, 4096) };
    }
}

/// Numbers that a process has in common with the children it forks.
pub struct SharedWords(*const AtomicU64, usize);

// SAFETY: atomics in memory that lives as long as the value.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// So many zeros.
    ///
    /// # Errors
    /// The host's.
    pub fn new(words: usize) -> Result<SharedWords> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh mapping.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), words * 8, prot, flags, -1, 0) };
        if p == libc::MAP_FAILED { Err(Error::last_os_error()) } else { Ok(SharedWords(p.cast(), words)) }
    }

    /// The numbers.
    pub fn all(&self) -> &[AtomicU64] {
        // SAFETY: mapped as long as self lives, and only accessed as atomics.
        unsafe { std::slice::from_raw_parts(self.0, self.1) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.0 as *mut libc::c_void, self.1 * 8) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_executed_and_nothing_is_both() {
        let mut b = CodeBuffer::new(8192).expect("a code buffer");
        let at = b.append(&[0xb8, 42, 0, 0, 0, 0xc3]);
        // SAFETY: `mov eax, 42; ret`.
        let f: extern "sysv64" fn() -> u32 = unsafe { std::mem::transmute((b.base() + at as u64) as *const ()) };
        assert_eq!(f(), 42);
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        let ours: Vec<&str> = maps.lines().filter(|l| l.contains("bivisor-code")).collect();
        assert!(ours.len() >= 2);
        assert!(ours.iter().all(|l| !l.contains("rwx")), "{ours:?}");
    }

    #[test]
    fn a_fork_is_noticed() {
        let mark = ForkMark::new().expect("a page");
        assert!(!mark.forked());
        // SAFETY: the child only looks and exits.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::_exit(i32::from(mark.forked()));
            }
            let mut status = 0;
            libc::waitpid(child, &mut status, 0);
            assert_eq!(libc::WEXITSTATUS(status), 1);
        }
    }
}
