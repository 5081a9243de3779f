//! Mappings: mmap(2), munmap(2), mprotect(2), mremap(2), brk(2), madvise(2), mlock(2), msync(2), mincore(2), shmat(2).
//!
//! Everything is done on the host at the same addresses and recorded in [`FlatSpace`]. Two things differ from a plain call: guest
//! mappings are never executable on the host, and a range of which a part is not the guest's is treated as if nothing were mapped
//! there, so that no call changes memory of bivisor itself.

use crate::linux::host::{err, host_call};
use crate::linux::syscall::{Args, Outcome, number, pass};
use crate::linux::{AddressSpace, Brk, Task};
use crate::mem::flat::Backing;
use crate::mem::{FlatSpace, GuestMemory, PAGE_SIZE, Prot, Vma};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// End of user addresses (the kernel's TASK_SIZE_MAX for four-level paging).
pub const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// The name of the vDSO's mapping; it and the variables it reads are shared with the host's C library.
const SHARED_WITH_HOST: [&str; 3] = ["[vdso]", "[vvar]", "[vvar_vclock]"];

/// Mappings of memory from this size on, in bytes, are backed with huge pages.
const LARGE: u64 = 4 << 20;

const ENOMEM: i64 = err(libc::ENOMEM);
const EINVAL: i64 = err(libc::EINVAL);
const EFAULT: i64 = err(libc::EFAULT);

/// What mmap(2) is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Mapping<'a> {
    /// Address or hint.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
    /// PROT_*.
    pub prot: u64,
    /// MAP_*.
    pub flags: u64,
    /// File, or -1.
    pub fd: i32,
    /// Offset in it.
    pub offset: u64,
    /// Name for /proc/self/maps where the host would show none.
    pub name: &'a str,
}

fn pages(addr: u64, len: u64) -> Option<Range<u64>> {
    let len = len.checked_next_multiple_of(PAGE_SIZE)?;
    let end = addr.checked_add(len)?;
    (addr.is_multiple_of(PAGE_SIZE) && end <= TASK_SIZE).then_some(addr..end)
}

fn len_of(r: &Range<u64>) -> u64 {
    r.end - r.start
}

fn failed(result: i64) -> bool {
    (-4095..0).contains(&result)
}

fn shared_with_host(v: &Vma) -> bool {
    SHARED_WITH_HOST.contains(&&*v.name)
}

impl Default for AddressSpace {
    fn default() -> AddressSpace {
        AddressSpace::new()
    }
}

/// Asks the host for huge pages where a guest maps much memory at once: a miss of the host's TLB is then as cheap as it can be, which
/// makes up for what the translator's tables take of it (transparent_hugepage(7): no difference where that is `always` or `never`). Not
/// for stacks, nor for memory that is reserved beyond need, of which few pages are ever used.
fn back_with_huge_pages(m: &Mapping<'_>, start: u64) {
    const PLAIN: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    const SPARSE: u64 = (libc::MAP_NORESERVE | libc::MAP_STACK | libc::MAP_GROWSDOWN | libc::MAP_HUGETLB) as u64;
    const WRITE: u64 = libc::PROT_WRITE as u64;
    if m.len >= LARGE && m.flags & (PLAIN | SPARSE) == PLAIN && m.prot & WRITE != 0 {
        host_call(libc::SYS_madvise as u64, [start, m.len, libc::MADV_HUGEPAGE as u64, 0, 0, 0]);
    }
}

impl AddressSpace {
    /// With nothing in it but the vDSO, which is the host's.
    pub fn new() -> AddressSpace {
        let space = FlatSpace::new();
        for line in std::fs::read_to_string("/proc/self/maps").unwrap_or_default().lines() {
            let Some(name) = SHARED_WITH_HOST.iter().find(|n| line.ends_with(*n)) else { continue };
            let mut address = line.split([' ', '-']).map(|s| u64::from_str_radix(s, 16));
            if let (Some(Ok(start)), Some(Ok(end))) = (address.next(), address.next()) {
                let prot = if *name == "[vdso]" { Prot::READ | Prot::EXEC } else { Prot::READ };
                space.insert(Vma { start, end, prot, shared: false, name: Arc::from(*name), offset: 0, backing: None });
            }
        }
        AddressSpace::of(space, Vec::new())
    }

    fn of(space: FlatSpace, places: Vec<(Backing, u64)>) -> AddressSpace {
        AddressSpace { mem: GuestMemory::Flat(space), brk: Mutex::default(), gap: Mutex::new(0..0), places }
    }

    /// Where the file was that the next mapping is about.
    pub fn place_of(&self, fd: i32) -> Option<u64> {
        if self.places.is_empty() {
            return None;
        }
        let wanted = file(fd)?;
        self.places.iter().find(|(backing, _)| *backing == wanted).map(|(_, start)| *start)
    }

    /// For another program in the same host process: unmaps everything, but for the vDSO.
    pub fn successor(&self) -> AddressSpace {
        let space = FlatSpace::new();
        let all = self.flat().all();
        // Forget first, as always.
        self.flat().remove(0..TASK_SIZE);
        let gap = std::mem::take(&mut *self.gap.lock().expect("no panic under the lock"));
        let mut gone: Vec<Range<u64>> = vec![gap];
        let mut places: Vec<(Backing, u64)> = Vec::new();
        for vma in all {
            if let Some(backing) = vma.backing.filter(|_| vma.offset == 0 && !vma.shared) {
                places.push((backing, vma.start));
            }
            if shared_with_host(&vma) {
                space.insert(vma);
            } else if gone.last().is_some_and(|last| last.end == vma.start) {
                gone.last_mut().expect("there is one").end = vma.end;
            } else {
                gone.push(vma.start..vma.end);
            }
        }
        for range in gone.into_iter().filter(|r| !r.is_empty()) {
            host_call(libc::SYS_munmap as u64, [range.start, len_of(&range), 0, 0, 0, 0]);
        }
        AddressSpace::of(space, places)
    }

    /// The list of mappings.
    pub fn flat(&self) -> &FlatSpace {
        self.mem.flat().expect("the memory of a process is flat")
    }

    /// The lock on changes of mappings, with the program break.
    pub fn lock(&self) -> MutexGuard<'_, Brk> {
        self.brk.lock().expect("no panic under the lock")
    }

    /// Puts the heap at `start`, empty.
    pub fn set_brk(&self, start: u64) {
        *self.lock() = Brk { start, end: start };
    }

    /// mmap(2).
    pub fn map(&self, m: &Mapping<'_>) -> i64 {
        let _lock = self.lock();
        self.map_locked(m)
    }

    fn map_locked(&self, m: &Mapping<'_>) -> i64 {
        let flags = m.flags & !(libc::MAP_GROWSDOWN as u64);
        let fixed = flags & libc::MAP_FIXED as u64 != 0;
        let Some(len) = m.len.checked_next_multiple_of(PAGE_SIZE).filter(|&l| l <= TASK_SIZE) else { return ENOMEM };
        if len == 0 {
            return EINVAL;
        }
        let mut claimed = Vec::new();
        if fixed && flags & libc::MAP_FIXED_NOREPLACE as u64 == 0 {
            if !m.addr.is_multiple_of(PAGE_SIZE) {
                return EINVAL;
            }
            match pages(m.addr, len).map(|r| self.claim(r)) {
                Some(Ok(gaps)) => claimed = gaps,
                Some(Err(e)) => return e,
                None => return ENOMEM,
            }
        }
        let prot = Prot::from_bits_truncate(m.prot as i32);
        let host_prot = (m.prot as i32 & !Prot::all().bits()) | FlatSpace::host_prot(prot);
        let addr = match m.addr {
            // Only a wish: what is not free is not taken.
            0 if !fixed && m.fd >= 0 && m.offset == 0 => self.place_of(m.fd).unwrap_or(0),
            addr => addr,
        };
        let at = host_call(libc::SYS_mmap as u64, [addr, m.len, host_prot as u64, flags, m.fd as u64, m.offset]);
        if failed(at) {
            for gap in claimed {
                host_call(libc::SYS_munmap as u64, [gap.start, len_of(&gap), 0, 0, 0, 0]);
            }
            return at;
        }
        let start = at as u64;
        back_with_huge_pages(m, start);
        let kind = flags & libc::MAP_TYPE as u64;
        let shared = kind == libc::MAP_SHARED as u64 || kind == libc::MAP_SHARED_VALIDATE as u64;
        // A huge-page mapping is rounded up to its page size; the guest's munmap will name it.
        let backing = if flags & libc::MAP_ANONYMOUS as u64 == 0 { file(m.fd) } else { None };
        let name = Arc::from(m.name);
        self.flat().insert(Vma { start, end: start + len, prot, shared, name, offset: m.offset, backing });
        at
    }

    /// Reserves on the host the parts of the range that are not the guest's, so that a fixed mapping may replace all of it.
    fn claim(&self, range: Range<u64>) -> Result<Vec<Range<u64>>, i64> {
        let parts = self.flat().parts(range.clone());
        if parts.iter().any(shared_with_host) {
            return Err(ENOMEM);
        }
        let mut claimed: Vec<Range<u64>> = Vec::new();
        for gap in gaps(&parts, range) {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
            let at = host_call(libc::SYS_mmap as u64, [gap.start, len_of(&gap), 0, flags as u64, u64::MAX, 0]);
            if at as u64 != gap.start {
                if !failed(at) {
                    // A kernel before 4.17 takes the address as a hint.
                    host_call(libc::SYS_munmap as u64, [at as u64, len_of(&gap), 0, 0, 0, 0]);
                }
                for done in claimed {
                    host_call(libc::SYS_munmap as u64, [done.start, len_of(&done), 0, 0, 0, 0]);
                }
                // Something of ours lies there, or the address is below mmap_min_addr.
                return Err(if failed(at) && at != err(libc::EEXIST) { at } else { ENOMEM });
            }
            claimed.push(gap);
        }
        Ok(claimed)
    }

    /// munmap(2): what is not the guest's counts as not mapped, which is no error.
    pub fn unmap(&self, addr: u64, len: u64) -> i64 {
        let _lock = self.lock();
        self.unmap_locked(addr, len)
    }

    fn unmap_locked(&self, addr: u64, len: u64) -> i64 {
        let Some(range) = pages(addr, len).filter(|r| !r.is_empty()) else { return EINVAL };
        for part in self.flat().parts(range) {
            if !shared_with_host(&part) {
                // Forget first: once the host has unmapped it, the addresses may become ours at any time.
                self.flat().remove(part.start..part.end);
                let r = host_call(libc::SYS_munmap as u64, [part.start, part.end - part.start, 0, 0, 0, 0]);
                if failed(r) {
                    self.flat().insert(part);
                    return r;
                }
            } else {
                self.flat().remove(part.start..part.end);
            }
        }
        0
    }

    /// mprotect(2): works up to the first gap, then ENOMEM.
    pub fn protect(&self, addr: u64, len: u64, prot: u64) -> i64 {
        let _lock = self.lock();
        const GROWS: i32 = libc::PROT_GROWSDOWN | libc::PROT_GROWSUP;
        // Besides read, write and execute there is PROT_SEM, which means nothing on x86.
        const KNOWN: u64 = (GROWS | 0xf) as u32 as u64;
        let grows = prot as i32 & GROWS;
        if prot & !KNOWN != 0 || !addr.is_multiple_of(PAGE_SIZE) || grows == GROWS {
            return EINVAL;
        }
        if len == 0 {
            return 0;
        }
        let Some(mut range) = pages(addr, len) else { return ENOMEM };
        if grows == libc::PROT_GROWSDOWN {
            // Only for what grows down: the stack, which here is one mapping of its full size.
            match self.flat().find(addr).filter(|v| &*v.name == "[stack]") {
                Some(v) => range.start = v.start,
                None => return EINVAL,
            }
        }
        let prot = Prot::from_bits_truncate(prot as i32);
        let parts = self.flat().parts(range.clone());
        let first_gap = gaps(&parts, range.clone()).first().map(|g| g.start);
        for part in parts.iter().take_while(|p| first_gap.is_none_or(|g| p.start < g)) {
            if !shared_with_host(part) {
                let host = FlatSpace::host_prot(prot) as u64;
                let r = host_call(libc::SYS_mprotect as u64, [part.start, part.end - part.start, host, 0, 0, 0]);
                if failed(r) {
                    return r;
                }
            }
            self.flat().protect(part.start..part.end, prot);
        }
        if first_gap.is_some() { ENOMEM } else { 0 }
    }

    /// mremap(2).
    pub fn remap(&self, old: u64, old_len: u64, new_len: u64, flags: u64, new: u64) -> i64 {
        let _lock = self.lock();
        let fixed = flags & libc::MREMAP_FIXED as u64 != 0;
        let Some(new_size) = new_len.checked_next_multiple_of(PAGE_SIZE).filter(|&n| n != 0) else { return EINVAL };
        let Some(from) = pages(old, old_len) else { return EINVAL };
        let space = self.flat();
        let Some(vma) = space.find(old) else { return EFAULT };
        if !space.covers(from.clone()) || space.parts(from.clone()).iter().any(shared_with_host) {
            return EFAULT;
        }
        // Write protection of single pages has split the mapping on the host; the kernel moves only one mapping.
        space.expect_write(from.clone());
        let mut claimed = Vec::new();
        if fixed {
            let Some(to) = pages(new, new_size) else { return EINVAL };
            if to.start < from.end && from.start < to.end {
                return EINVAL;
            }
            match self.claim(to) {
                Ok(gaps) => claimed = gaps,
                Err(e) => return e,
            }
        }
        let at = host_call(libc::SYS_mremap as u64, [old, old_len, new_len, flags, new, 0]);
        if failed(at) {
            for gap in claimed {
                host_call(libc::SYS_munmap as u64, [gap.start, len_of(&gap), 0, 0, 0, 0]);
            }
            return at;
        }
        let keep = flags & libc::MREMAP_DONTUNMAP as u64 != 0 || from.is_empty();
        if !keep {
            space.remove(from);
        }
        let (start, offset) = (at as u64, vma.offset + (old - vma.start));
        space.insert(Vma { start, end: start + new_size, offset, ..vma });
        at
    }

    /// brk(2): the new break, or the old one if it cannot be moved.
    pub fn move_brk(&self, to: u64) -> u64 {
        let mut brk = self.lock();
        if to < brk.start || to > TASK_SIZE {
            return brk.end;
        }
        let (old, new) = (brk.end.next_multiple_of(PAGE_SIZE), to.next_multiple_of(PAGE_SIZE));
        if new > old {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
            let flags = flags as u64;
            let m = Mapping { addr: old, len: new - old, prot, flags, fd: -1, offset: 0, name: "[heap]" };
            let at = self.map_locked(&m);
            if at as u64 != old {
                if !failed(at) {
                    self.unmap_locked(at as u64, new - old);
                }
                return brk.end;
            }
        } else if new < old && failed(self.unmap_locked(new, old - new)) {
            return brk.end;
        }
        brk.end = to;
        to
    }

    /// Bytes of the range that are mapped.
    fn mapped(&self, addr: u64, len: u64) -> u64 {
        let range = pages(addr, len).unwrap_or(0..0);
        self.flat().parts(range).iter().map(|v| v.end - v.start).sum()
    }

    /// Is the range wholly the guest's own, so that a call that names it may go to the host?
    fn owns(&self, range: Range<u64>) -> bool {
        self.flat().covers(range.clone()) && !self.flat().parts(range).iter().any(shared_with_host)
    }
}

/// Which file a descriptor stands for.
fn file(fd: i32) -> Option<Backing> {
    // struct stat begins with device and inode.
    let mut stat = [0u64; 18];
    let r = host_call(libc::SYS_fstat as u64, [fd as u64, stat.as_mut_ptr() as u64, 0, 0, 0, 0]);
    (r == 0).then_some((stat[0], stat[1]))
}

/// What of `range` is in none of the parts (which are in order).
fn gaps(parts: &[Vma], range: Range<u64>) -> Vec<Range<u64>> {
    let mut at = range.start;
    let mut gaps = Vec::new();
    for p in parts {
        if p.start > at {
            gaps.push(at..p.start);
        }
        at = p.end;
    }
    if at < range.end {
        gaps.push(at..range.end);
    }
    gaps
}

/// mmap(2).
pub fn mmap(task: &mut Task, [addr, len, prot, flags, fd, offset]: Args) -> Outcome {
    let space = &task.process.space;
    let replaced = if flags & libc::MAP_FIXED as u64 != 0 { space.mapped(addr, len) } else { 0 };
    if !task.process.may_map(len.saturating_sub(replaced)) {
        return ENOMEM.into();
    }
    space.map(&Mapping { addr, len, prot, flags, fd: fd as i32, offset, name: "" }).into()
}

/// munmap(2).
pub fn munmap(task: &mut Task, a: Args) -> Outcome {
    task.process.space.unmap(a[0], a[1]).into()
}

/// mprotect(2).
pub fn mprotect(task: &mut Task, a: Args) -> Outcome {
    task.process.space.protect(a[0], a[1], a[2]).into()
}

/// pkey_mprotect(2): only the key -1, which means none; there are no protection keys in the offered CPU.
pub fn pkey_mprotect(task: &mut Task, a: Args) -> Outcome {
    if a[3] as i32 == -1 { mprotect(task, a) } else { EINVAL.into() }
}

/// mremap(2).
pub fn mremap(task: &mut Task, a: Args) -> Outcome {
    if !task.process.may_map(a[2].saturating_sub(a[1])) {
        return ENOMEM.into();
    }
    task.process.space.remap(a[0], a[1], a[2], a[3], a[4]).into()
}

/// brk(2).
pub fn brk(task: &mut Task, a: Args) -> Outcome {
    let space = &task.process.space;
    let end = space.lock().end;
    let to = if task.process.may_map(a[0].saturating_sub(end)) { a[0] } else { end };
    (space.move_brk(to) as i64).into()
}

/// madvise(2): on the guest's parts; a gap gives ENOMEM after the rest is done, as in the kernel.
pub fn madvise(task: &mut Task, [addr, len, advice, ..]: Args) -> Outcome {
    let space = task.process.space.clone();
    let _lock = space.lock();
    let Some(range) = pages(addr, len) else { return EINVAL.into() };
    if range.is_empty() {
        return host_call(libc::SYS_madvise as u64, [addr, len, advice, 0, 0, 0]).into();
    }
    let parts = space.flat().parts(range.clone());
    let mut result = if gaps(&parts, range).is_empty() { 0 } else { ENOMEM };
    for part in parts.iter().filter(|p| !shared_with_host(p)) {
        let r = host_call(libc::SYS_madvise as u64, [part.start, part.end - part.start, advice, 0, 0, 0]);
        // The contents may have changed under cached code.
        space.flat().protect(part.start..part.end, part.prot);
        if failed(r) {
            result = r;
            break;
        }
    }
    result.into()
}

/// mlock(2), mlock2(2), munlock(2), msync(2), mincore(2), mbind(2): to the host if the range is the guest's, ENOMEM if not.
pub fn on_own_range(task: &mut Task, a: Args) -> Outcome {
    let number = number(task);
    let start = a[0] & !(PAGE_SIZE - 1);
    let Some(end) = a[0].checked_add(a[1]).and_then(|e| e.checked_next_multiple_of(PAGE_SIZE)) else {
        return EINVAL.into();
    };
    if !task.process.space.owns(start..end) {
        return ENOMEM.into();
    }
    pass(task, number, a).into()
}

/// shmat(2).
pub fn shmat(task: &mut Task, [id, addr, flags, ..]: Args) -> Outcome {
    let space = task.process.space.clone();
    let _lock = space.lock();
    let Some(size) = segment_size(id as i32) else { return EINVAL.into() };
    let flags = flags as i32;
    // SHMLBA is the page size.
    let at = if flags & libc::SHM_RND != 0 { addr & !(PAGE_SIZE - 1) } else { addr };
    let mut claimed = Vec::new();
    if flags & libc::SHM_REMAP != 0 {
        match pages(at, size).filter(|_| at != 0).map(|r| space.claim(r)) {
            Some(Ok(gaps)) => claimed = gaps,
            _ => return EINVAL.into(),
        }
    }
    let result = host_call(libc::SYS_shmat as u64, [id, addr, (flags & !libc::SHM_EXEC) as u64, 0, 0, 0]);
    if failed(result) {
        for gap in claimed {
            host_call(libc::SYS_munmap as u64, [gap.start, len_of(&gap), 0, 0, 0, 0]);
        }
        return result.into();
    }
    let mut prot = Prot::READ;
    prot.set(Prot::WRITE, flags & libc::SHM_RDONLY == 0);
    prot.set(Prot::EXEC, flags & libc::SHM_EXEC != 0);
    let (start, end) = (result as u64, result as u64 + size.next_multiple_of(PAGE_SIZE));
    let name = Arc::from(format!("/SYSV{id}"));
    let backing = Some((u64::MAX, id));
    space.flat().insert(Vma { start, end, prot, shared: true, name, offset: 0, backing });
    result.into()
}

fn segment_size(id: i32) -> Option<u64> {
    // struct shmid64_ds: struct ipc64_perm is 48 bytes, then shm_segsz.
    let mut ds = [0u64; 32];
    let r = host_call(libc::SYS_shmctl as u64, [id as u64, libc::IPC_STAT as u64, ds.as_mut_ptr() as u64, 0, 0, 0]);
    (r == 0).then_some(ds[6])
}

/// shmdt(2).
pub fn shmdt(task: &mut Task, [addr, ..]: Args) -> Outcome {
    let space = task.process.space.clone();
    let _lock = space.lock();
    let Some(vma) = space.flat().find(addr).filter(|v| v.start == addr && v.name.starts_with("/SYSV")) else {
        return EINVAL.into();
    };
    let result = host_call(libc::SYS_shmdt as u64, [addr, 0, 0, 0, 0, 0]);
    if result == 0 {
        for part in space.flat().parts(addr..TASK_SIZE) {
            if part.name != vma.name || part.start - addr != part.offset {
                break;
            }
            space.flat().remove(part.start..part.end);
        }
    }
    result.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RW: u64 = 3;
    const ANON: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    const FIXED: u64 = libc::MAP_FIXED as u64;

    /// Far from where the host puts mappings of other threads.
    fn place(test: u64) -> u64 {
        0x2000_0000_0000 + test * 0x1_0000_0000
    }

    fn anon(space: &AddressSpace, addr: u64, pages: u64, prot: u64, more: u64) -> i64 {
        let m = Mapping { addr, len: pages * PAGE_SIZE, prot, flags: ANON | more, fd: -1, offset: 0, name: "" };
        space.map(&m)
    }

    fn host_rights(addr: u64) -> String {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let hex = |s: &str| u64::from_str_radix(s, 16).unwrap();
        let line = maps.lines().find(|l| {
            let (from, to) = l.split(' ').next().unwrap().split_once('-').unwrap();
            (hex(from)..hex(to)).contains(&addr)
        });
        line.map_or_else(|| "none".into(), |l| l.split(' ').nth(1).unwrap().to_string())
    }

    /// Is the mapping advised to lie in huge pages (proc_pid_smaps(5), VmFlags)? `None` if the host tells no flags.
    fn advised_huge(addr: u64) -> Option<bool> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let of = smaps.split_once(&format!("{addr:x}-")).expect("a mapping starts there").1;
        let flags = of.lines().find_map(|l| l.strip_prefix("VmFlags:"))?;
        Some(flags.split_whitespace().any(|f| f == "hg"))
    }

    #[test]
    fn much_memory_lies_in_huge_pages_but_what_is_sparse_does_not() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            eprintln!("SKIPPED: the host's kernel has no transparent huge pages");
            return;
        }
        let space = AddressSpace::new();
        let pages = LARGE / PAGE_SIZE;
        let reserved = libc::MAP_NORESERVE as u64;
        let cases =
            [(pages, RW, 0, true), (pages - 1, RW, 0, false), (pages, RW, reserved, false), (pages, 1, 0, false)];
        // Far from each other, so that the host joins no two of them.
        for (n, (pages, prot, more, huge)) in cases.into_iter().enumerate() {
            let at = anon(&space, place(40 + n as u64), pages, prot, more) as u64;
            let Some(is) = advised_huge(at) else {
                eprintln!("SKIPPED: /proc/self/smaps has no VmFlags");
                return;
            };
            assert_eq!(is, huge, "{pages} pages, rights {prot}, flags {more:#x}");
            assert_eq!(space.unmap(at, pages * PAGE_SIZE), 0);
        }
    }

    #[test]
    fn guest_code_is_not_executable_on_the_host() {
        let space = AddressSpace::new();
        let at = anon(&space, place(0), 2, 7, 0) as u64;
        assert_eq!(host_rights(at), "rw-p");
        assert_eq!(space.flat().find(at).unwrap().prot, Prot::all());
        assert_eq!(space.protect(at, PAGE_SIZE, 4), 0);
        assert_eq!(host_rights(at), "r--p", "PROT_EXEC alone is readable on x86");
        assert_eq!(space.unmap(at, 2 * PAGE_SIZE), 0);
        assert_eq!((host_rights(at).as_str(), space.flat().find(at)), ("none", None));
    }

    #[test]
    fn memory_of_bivisor_cannot_be_changed() {
        let space = AddressSpace::new();
        let ours = vec![7u8; 16 * PAGE_SIZE as usize];
        let page = (ours.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
        assert_eq!(anon(&space, page, 1, RW, FIXED), ENOMEM);
        assert_eq!(space.protect(page, PAGE_SIZE, 0), ENOMEM);
        assert_eq!(space.unmap(page, PAGE_SIZE), 0, "as if nothing were there");
        assert_eq!(space.remap(page, PAGE_SIZE, 2 * PAGE_SIZE, 1, 0), EFAULT);
        let mine = anon(&space, 0, 1, RW, 0) as u64;
        let fixed = (libc::MREMAP_FIXED | libc::MREMAP_MAYMOVE) as u64;
        assert_eq!(space.remap(mine, PAGE_SIZE, PAGE_SIZE, fixed, page), ENOMEM);
        assert!(ours.iter().all(|&b| b == 7));
        space.unmap(mine, PAGE_SIZE);
    }

    #[test]
    fn a_fixed_mapping_may_cover_mapped_and_free_pages() {
        let space = AddressSpace::new();
        let at = anon(&space, place(1), 8, RW, 0) as u64;
        assert_eq!(space.unmap(at + 2 * PAGE_SIZE, 3 * PAGE_SIZE), 0);
        assert!(!space.flat().covers(at..at + 8 * PAGE_SIZE));
        assert_eq!(space.protect(at, 8 * PAGE_SIZE, 1), ENOMEM, "a gap after two pages");
        assert_eq!([host_rights(at), host_rights(at + 5 * PAGE_SIZE)], ["r--p", "rw-p"]);
        assert_eq!(anon(&space, at, 8, RW, FIXED) as u64, at);
        assert!(space.flat().covers(at..at + 8 * PAGE_SIZE));
        assert_eq!(space.mem.write(at + 3 * PAGE_SIZE, &[1]), Some(()));
        assert_eq!(anon(&space, at, 1, RW, libc::MAP_FIXED_NOREPLACE as u64), err(libc::EEXIST));
        space.unmap(at, 8 * PAGE_SIZE);
    }

    #[test]
    fn remap_moves_what_is_recorded() {
        let space = AddressSpace::new();
        let at = anon(&space, place(2), 4, RW, 0) as u64;
        space.mem.write(at, b"abc").unwrap();
        let flags = libc::MREMAP_MAYMOVE as u64;
        let new = space.remap(at, 4 * PAGE_SIZE, 64 * PAGE_SIZE, flags, 0) as u64;
        assert!(space.flat().covers(new..new + 64 * PAGE_SIZE));
        let mut text = [0; 3];
        space.mem.read(new, &mut text).unwrap();
        assert_eq!(&text, b"abc");
        assert_eq!(space.remap(new, 64 * PAGE_SIZE, PAGE_SIZE, flags, 0) as u64, new);
        assert!(!space.flat().covers(new..new + 2 * PAGE_SIZE));
        space.unmap(new, PAGE_SIZE);
    }

    #[test]
    fn the_break_moves() {
        let space = AddressSpace::new();
        let at = anon(&space, place(3), 16, 0, 0) as u64;
        space.unmap(at, 15 * PAGE_SIZE);
        space.set_brk(at);
        assert_eq!(space.move_brk(0), at);
        assert_eq!(space.move_brk(at + 100), at + 100);
        assert_eq!(space.mem.write(at + 4095, &[1]), Some(()));
        assert_eq!(space.move_brk(at + 3 * PAGE_SIZE + 1), at + 3 * PAGE_SIZE + 1);
        assert_eq!(&*space.flat().find(at + 3 * PAGE_SIZE).unwrap().name, "[heap]");
        assert_eq!(space.move_brk(at + 20 * PAGE_SIZE), at + 3 * PAGE_SIZE + 1, "something is in the way");
        assert_eq!(space.move_brk(at), at);
        assert_eq!(space.flat().find(at), None);
        space.unmap(at + 15 * PAGE_SIZE, PAGE_SIZE);
    }
}
