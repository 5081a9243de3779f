//! The private page tables of a process: guest-linear address = host address, over guest-physical chunks given out on demand.
//!
//! A chunk is 32 MiB of host addresses behind one memory slot, at the next free guest-physical address: so any host address fits
//! into few physical-address bits. Page-table entries are filled when the guest faults, a window at a time, with accessed and dirty
//! preset (a software KVM shadows such entries several at once). They say what the mapping allowed when they were filled; rights
//! that are taken away later are enforced by the host's own page tables, which KVM follows: such an access makes KVM_RUN fail with
//! EFAULT. Only the right to execute is not the host's to enforce, so losing it flushes (SDM 3A 4.10.4, paging caches).
//!
//! Where private memory without a file covers an aligned 2 MiB, the host is asked for a huge page and one entry maps it all: one fault
//! for 512 pages, and as many fewer entries in the TLB.
//!
//! Above the guest's half of the address space lie what the processor needs: descriptor tables, stubs (see [`crate::intercept`]).

use crate::intercept::{self, HOLE_GPA, KERNEL};
use crate::vm::{Vm, huge_page, populate};
use bivisor_emulator::mem::{FlatSpace, PAGE_SIZE, Prot, Vma};
use kvm_ioctls::VcpuFd;
use std::collections::HashMap;
use std::io;

const CHUNK: u64 = 32 << 20;
/// What one page table covers.
const REGION: u64 = 2 << 20;
/// Linux gives user programs the lower half.
pub const USER_END: u64 = 1 << 47;

const P: u64 = 1;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
/// In a page directory: a leaf of 2 MiB (SDM 3A table 4-18).
const PS: u64 = 1 << 7;
const NX: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What became of a page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// The entry is there now: try again.
    Now,
    /// It was there already: another thread was faster, or the host refuses what the entry allows.
    Already,
    /// The mapping does not allow it: the guest's fault.
    No,
}

/// What the guest wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// To write.
    pub write: bool,
    /// To fetch an instruction.
    pub execute: bool,
}

impl Wanted {
    fn allowed(self, prot: Prot) -> bool {
        // On x86 each right implies reading.
        !prot.is_empty() && (!self.write || prot.contains(Prot::WRITE)) && (!self.execute || prot.contains(Prot::EXEC))
    }
}

/// A place where faults go on in order: the next window may be larger.
#[derive(Clone, Copy, Default)]
struct Stream {
    start: u64,
    end: u64,
}

/// Page tables, chunks, and the vCPUs that no thread uses.
pub struct Space {
    vm: Vm,
    /// Guest-physical address and index of each 32 MiB of page tables and processor tables.
    arenas: Vec<(u64, usize)>,
    /// Next free byte in the last arena.
    next: u64,
    next_gpa: u64,
    chunks: HashMap<u64, u64>,
    root: u64,
    streams: [Stream; 8],
    turn: usize,
    exec_epoch: u64,
    vcpus: u64,
    idle: Vec<(VcpuFd, u64)>,
}

impl Space {
    /// A virtual machine with nothing mapped but the processor's own tables.
    pub fn new() -> io::Result<Space> {
        let mut s = Space {
            vm: Vm::new()?,
            arenas: Vec::new(),
            next: CHUNK,
            // The first chunk stays a hole: see HOLE_GPA.
            next_gpa: CHUNK,
            chunks: HashMap::new(),
            root: 0,
            streams: [Stream::default(); 8],
            turn: 0,
            exec_epoch: 0,
            vcpus: 0,
            idle: Vec::new(),
        };
        s.root = s.page()?;
        for table in intercept::tables() {
            let gpa = s.page()?;
            s.write(gpa, &table.bytes);
            s.set(table.address, gpa | P | if table.user { U } else { 0 })?;
        }
        s.set(intercept::HOLE, HOLE_GPA | P | W | U | A | D | NX)?;
        Ok(s)
    }

    /// For CR3.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// A vCPU, its number, and whether it is new: one that has run keeps its CPUID and MSRs.
    pub fn vcpu(&mut self) -> io::Result<(VcpuFd, u64, bool)> {
        if let Some((vcpu, id)) = self.idle.pop() {
            return Ok((vcpu, id, false));
        }
        let gpa = self.page()?;
        let vcpu = self.vm.vcpu(self.vcpus)?;
        self.set(intercept::own_page(self.vcpus), gpa | P | W | A | D | NX)?;
        self.write(gpa, &intercept::own_page_bytes(self.vcpus));
        self.vcpus += 1;
        Ok((vcpu, self.vcpus - 1, true))
    }

    /// Gives a vCPU back: KVM frees none before the whole machine goes.
    pub fn give_back(&mut self, vcpu: VcpuFd, id: u64) {
        self.idle.push((vcpu, id));
    }

    /// Words of the processor's or a vCPU's own page.
    pub fn read_kernel<const N: usize>(&self, address: u64) -> [u64; N] {
        let Some((gpa, _)) = self.entry(address).map(|e| (e & ADDRESS, e)).filter(|(_, e)| e & P != 0) else {
            return [0; N];
        };
        std::array::from_fn(|i| {
            let at = (address & (PAGE_SIZE - 1)) + 8 * i as u64;
            if at + 8 <= PAGE_SIZE { self.load(gpa + (at & !7)) } else { 0 }
        })
    }

    /// The guest faulted at `addr`: fills the entries round it if its mapping allows what it wanted.
    pub fn fault(&mut self, flat: &FlatSpace, addr: u64, wanted: Wanted) -> io::Result<Filled> {
        let page = addr & !(PAGE_SIZE - 1);
        let Some(vma) = flat.find(page).filter(|v| addr < USER_END && wanted.allowed(v.prot)) else {
            return Ok(Filled::No);
        };
        let want = P | if wanted.write { W } else { 0 };
        if let Some(e) = self.entry(page)
            && e & want == want
            && !(wanted.execute && e & NX != 0)
        {
            return Ok(Filled::Already);
        }
        let rights = P
            | U
            | A
            | if vma.prot.contains(Prot::WRITE) { W | D } else { 0 }
            | if vma.prot.contains(Prot::EXEC) { 0 } else { NX };
        if self.huge(&vma, page, rights)? {
            return Ok(Filled::Now);
        }
        let (start, end) = self.window(&vma, page);
        let (start, end) = (start.max(vma.start), end.min(vma.end));
        if end - start > PAGE_SIZE {
            // Private memory without a file behind it has no pages before it is written.
            populate(start, end - start, vma.prot.contains(Prot::WRITE) && anonymous(&vma));
        }
        let mut at = start;
        while at < end {
            let gpa = self.guest_physical(at)?;
            let table = self.table(at)?;
            let stop = end.min((at & !(REGION - 1)) + REGION);
            for (i, offset) in (at..stop).step_by(PAGE_SIZE as usize).zip(0..) {
                self.store(table + (i / PAGE_SIZE % 512) * 8, (gpa + offset * PAGE_SIZE) | rights);
            }
            at = stop;
        }
        Ok(Filled::Now)
    }

    /// Maps the 2 MiB round `page` by one entry, if its mapping has all of them and nothing is mapped there yet.
    fn huge(&mut self, vma: &Vma, page: u64, rights: u64) -> io::Result<bool> {
        let region = page & !(REGION - 1);
        let whole = vma.start <= region && region + REGION <= vma.end;
        if !whole || !anonymous(vma) || !vma.prot.contains(Prot::WRITE) {
            return Ok(false);
        }
        let directory = self.directory_entry(region)?;
        if self.load(directory) & P != 0 || !huge_page(region, REGION) {
            return Ok(false);
        }
        let gpa = self.guest_physical(region)?;
        self.store(directory, gpa | rights | PS);
        Ok(true)
    }

    /// Mappings lost the right to execute, see [`FlatSpace::exec_epoch`]: no entry may allow it any longer.
    pub fn forget_rights(&mut self, epoch: u64) -> io::Result<()> {
        if std::mem::replace(&mut self.exec_epoch, epoch) == epoch || self.chunks.is_empty() {
            return Ok(());
        }
        let chunks: Vec<u64> = self.chunks.keys().copied().collect();
        for chunk in chunks {
            for region in (chunk * CHUNK..(chunk + 1) * CHUNK).step_by(REGION as usize) {
                match self.walk(region) {
                    Some(Covers::Table(table)) => (0..512).for_each(|i| self.store(table + 8 * i, 0)),
                    Some(Covers::Leaf(at)) => self.store(at, 0),
                    None => {}
                }
            }
        }
        self.vm.flush()
    }

    /// What to fill at a fault: all of a file's mapping in the region, since its pages exist anyway; of other memory as much as
    /// recent faults in order make likely to be used.
    fn window(&mut self, vma: &Vma, page: u64) -> (u64, u64) {
        let region = page & !(REGION - 1);
        if !anonymous(vma) || !vma.prot.contains(Prot::WRITE) {
            return (region, region + REGION);
        }
        const FIRST: u64 = 16 * PAGE_SIZE;
        let n = self.streams.len();
        let known = self.streams.iter_mut().find(|s| s.end == page || s.start == page + PAGE_SIZE);
        let slot = match known {
            Some(s) => s,
            None => {
                self.turn = (self.turn + 1) % n;
                let s = &mut self.streams[self.turn];
                *s = Stream { start: page, end: page };
                s
            }
        };
        let size = (2 * (slot.end - slot.start)).clamp(FIRST, REGION);
        *slot = if slot.start == page + PAGE_SIZE {
            Stream { start: (page + PAGE_SIZE).saturating_sub(size).max(region), end: page + PAGE_SIZE }
        } else {
            Stream { start: page, end: (page + size).min(region + REGION) }
        };
        (slot.start, slot.end)
    }

    /// The guest-physical address of a host address; the chunk gets its slot if it has none.
    fn guest_physical(&mut self, addr: u64) -> io::Result<u64> {
        let chunk = addr / CHUNK;
        let base = match self.chunks.get(&chunk) {
            Some(base) => *base,
            None => {
                let base = self.take_gpa();
                self.vm.map(base, chunk * CHUNK, CHUNK, false)?;
                self.chunks.insert(chunk, base);
                base
            }
        };
        Ok(base + addr % CHUNK)
    }

    fn take_gpa(&mut self) -> u64 {
        // The last chunk below 4 GiB holds the local APIC's page and what KVM itself puts there.
        if self.next_gpa == (4 << 30) - CHUNK {
            self.next_gpa += CHUNK;
        }
        self.next_gpa += CHUNK;
        self.next_gpa - CHUNK
    }

    /// A zeroed page for tables.
    fn page(&mut self) -> io::Result<u64> {
        if self.next == CHUNK {
            let gpa = self.take_gpa();
            let index = self.vm.map_new(gpa, CHUNK as usize)?;
            self.arenas.push((gpa, index));
            self.next = 0;
        }
        self.next += PAGE_SIZE;
        let (gpa, _) = self.arenas.last().expect("one was just made");
        Ok(gpa + self.next - PAGE_SIZE)
    }

    fn arena(&self, gpa: u64) -> (usize, u64) {
        let (base, index) =
            self.arenas.iter().find(|(a, _)| gpa.wrapping_sub(*a) < CHUNK).expect("tables lie in arenas");
        (*index, gpa - base)
    }

    fn load(&self, gpa: u64) -> u64 {
        let (index, offset) = self.arena(gpa);
        self.vm.pages(index).load(offset)
    }

    fn store(&self, gpa: u64, v: u64) {
        let (index, offset) = self.arena(gpa);
        self.vm.pages(index).store(offset, v);
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        let (index, offset) = self.arena(gpa);
        self.vm.pages(index).write(offset, bytes);
    }

    /// What covers the 2 MiB round `addr`, if anything does.
    fn walk(&self, addr: u64) -> Option<Covers> {
        let mut table = self.root;
        for shift in [39, 30, 21] {
            let at = table + 8 * (addr >> shift & 511);
            let e = self.load(at);
            if e & P == 0 {
                return None;
            }
            if shift == 21 && e & PS != 0 {
                return Some(Covers::Leaf(at));
            }
            table = e & ADDRESS;
        }
        Some(Covers::Table(table))
    }

    fn entry(&self, addr: u64) -> Option<u64> {
        Some(match self.walk(addr)? {
            Covers::Table(table) => self.load(table + 8 * (addr >> 12 & 511)),
            Covers::Leaf(at) => self.load(at),
        })
    }

    /// Where the page-directory entry for `addr` lies; its tables are made.
    fn directory_entry(&mut self, addr: u64) -> io::Result<u64> {
        let mut table = self.root;
        for shift in [39, 30] {
            let at = table + 8 * (addr >> shift & 511);
            table = match self.load(at) {
                e if e & P != 0 => e & ADDRESS,
                _ => self.lower(at)?,
            };
        }
        Ok(table + 8 * (addr >> 21 & 511))
    }

    /// The page table that covers `addr`, made if there is none. A leaf goes: what lies there has changed.
    fn table(&mut self, addr: u64) -> io::Result<u64> {
        let at = self.directory_entry(addr)?;
        match self.load(at) {
            e if e & P == 0 => self.lower(at),
            e if e & PS == 0 => Ok(e & ADDRESS),
            _ => {
                let table = self.lower(at)?;
                self.vm.flush()?;
                Ok(table)
            }
        }
    }

    /// A new table below the entry at `at`.
    fn lower(&mut self, at: u64) -> io::Result<u64> {
        let page = self.page()?;
        self.store(at, page | P | W | U | A);
        Ok(page)
    }

    fn set(&mut self, addr: u64, entry: u64) -> io::Result<()> {
        let table = self.table(addr)?;
        self.store(table + 8 * (addr >> 12 & 511), entry);
        Ok(())
    }
}

/// What a page-directory entry leads to, by guest-physical address.
enum Covers {
    /// A page table.
    Table(u64),
    /// The entry itself maps 2 MiB.
    Leaf(u64),
}

/// Private memory without a file: heap, stack, anonymous mappings.
fn anonymous(vma: &Vma) -> bool {
    !vma.shared && (vma.name.is_empty() || vma.name.starts_with('['))
}

// A chunk of user addresses never reaches into the kernel's tables.
const _: () = assert!(KERNEL > USER_END);
