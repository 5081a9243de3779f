//! The memory and the ports of a case, kept from one case to the next: only pages that were written are put back.
//!
//! Without paging an address is physical. With paging, of long mode or PAE, and no CR3 in the request, every page named in `mem` is mapped user RWX at its
//! own address, with less rights if the entry says so: identically below [`IDENTITY`] bytes, else onto a page of the pool above. Page
//! tables lie in the pool.

use super::flat::Flat;
use super::number::{Hex, Num};
use super::request::{Model, Range, Request, Rights, Unmapped};
use super::response::{Bytes, IoOut};
use bivisor_emulator::bus::Bus;
use bivisor_emulator::cpu::{CpuState, Cr0, Cr4, Efer};
use bivisor_emulator::isa::Width;
use bivisor_emulator::mem::{GuestMemory, PAGE_SIZE, Prot, Ram};
use std::collections::BTreeMap;
use std::sync::Mutex;

/// RAM that is always there, from 0.
const IDENTITY: u64 = 16 << 20;
/// Pages for tables and for addresses above RAM.
const POOL: u64 = 4 << 20;
/// The most RAM a case may ask for.
const MOST: u64 = (4 << 30) + (1 << 20);

/// Why a case cannot be set up.
pub enum Refusal {
    /// It makes no sense.
    Malformed(String),
    /// It does, but not here.
    NotHere(String),
}

impl From<String> for Refusal {
    fn from(why: String) -> Refusal {
        Refusal::Malformed(why)
    }
}

impl From<&str> for Refusal {
    fn from(why: &str) -> Refusal {
        Refusal::Malformed(why.to_owned())
    }
}

/// Memory of cases.
pub struct World {
    /// The RAM.
    mem: GuestMemory,
    /// A process's memory, and whether the case at hand has that; made when it is needed.
    flat: Option<Flat>,
    in_flat: bool,
    /// The ports.
    pub ports: Ports,
    identity: u64,
    pool_next: u64,
    fill: u8,
    /// Linear page to physical page, for pages in the pool.
    mapped: BTreeMap<u64, u64>,
    root: Option<u64>,
    /// Of the page tables.
    levels: u32,
    /// Pages written while the case was set up, as they were when it started.
    initial: BTreeMap<u64, Box<[u8; PAGE_SIZE as usize]>>,
}

/// Ports that answer a pattern and note what happens.
#[derive(Default)]
pub struct Ports {
    answer: Mutex<Vec<u8>>,
    log: Mutex<Vec<IoOut>>,
}

impl Ports {
    fn note(&self, dir: &'static str, port: u16, data: &[u8]) {
        let mut raw = [0; 8];
        raw[..data.len()].copy_from_slice(data);
        let io = IoOut { dir, port, size: data.len(), val: Num(u64::from_le_bytes(raw)) };
        self.log.lock().expect("no panic under the lock").push(io);
    }

    /// What happened, taken out.
    pub fn take(&self) -> Vec<IoOut> {
        std::mem::take(&mut self.log.lock().expect("no panic under the lock"))
    }
}

impl Bus for Ports {
    fn read_port(&self, port: u16, data: &mut [u8]) {
        let answer = self.answer.lock().expect("no panic under the lock");
        for (i, b) in data.iter_mut().enumerate() {
            *b = if answer.is_empty() { 0xff } else { answer[i % answer.len()] };
        }
        drop(answer);
        self.note("in", port, data);
    }

    fn write_port(&self, port: u16, data: &[u8]) {
        self.note("out", port, data);
    }

    fn read_mmio(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_mmio(&self, _gpa: u64, _data: &[u8]) {}

    fn take_interrupt(&self) -> Option<u8> {
        None
    }
}

/// Levels of the page tables that a case needs: 4 in long mode, 3 of PAE; those of 32-bit entries are not made here.
fn levels(s: &CpuState) -> Option<u32> {
    match s.cr0.contains(Cr0::PG) && s.cr4.contains(Cr4::PAE) {
        true if s.efer.contains(Efer::LMA) => Some(4),
        true => Some(3),
        false => None,
    }
}

impl World {
    /// RAM of at least `identity` bytes and a pool of `pool` bytes.
    fn with(identity: u64, pool: u64) -> Result<World, String> {
        // A child process may run the code: `--backend trap`.
        let ram = Ram::shared(identity + pool).map_err(|e| format!("no memory for the guest: {e}"))?;
        ram.track_dirty();
        Ok(World {
            mem: GuestMemory::Ram(ram),
            flat: None,
            in_flat: false,
            ports: Ports::default(),
            identity,
            pool_next: identity,
            fill: 0,
            mapped: BTreeMap::new(),
            root: None,
            levels: 4,
            initial: BTreeMap::new(),
        })
    }

    /// As most cases need it.
    pub fn new() -> Result<World, String> {
        World::with(IDENTITY, POOL)
    }

    /// What the case at hand has.
    pub fn memory(&self) -> &GuestMemory {
        self.flat.as_ref().filter(|_| self.in_flat).map_or(&self.mem, Flat::memory)
    }

    fn ram(&self) -> &Ram {
        self.mem.ram().expect("made with RAM")
    }

    /// Lays out the memory of a case and, if paging is on and the request has no CR3, makes page tables and sets CR3.
    pub fn set_up(&mut self, r: &Request, s: &mut CpuState) -> Result<(), Refusal> {
        let contents = contents(r, s)?;
        self.in_flat = r.memory == Model::Flat;
        if self.in_flat {
            *self.ports.answer.lock().expect("no panic under the lock") = r.io_in.clone().unwrap_or_default().0;
            return self.flat.get_or_insert_default().set_up(r, s, &contents);
        }
        let levels = levels(s).filter(|_| r.sys.cr3.is_none());
        let own_tables = levels.is_some();
        let highest = contents.iter().map(|c| c.addr.saturating_add(c.bytes.len() as u64)).max().unwrap_or(0);
        let needed = if own_tables { IDENTITY } else { highest };
        let pool = contents.iter().map(|c| c.bytes.len() as u64 + 4 * PAGE_SIZE).sum::<u64>() * 2 + POOL;
        if needed > MOST || pool > MOST {
            return Err(format!("mem: {highest:#x} is beyond the {MOST:#x} bytes a case may have").into());
        }
        if needed > self.identity || (own_tables && pool > POOL * 2 && pool > self.ram().size() - self.identity) {
            *self = World::with(needed.next_multiple_of(IDENTITY).max(self.identity), pool)?;
        }
        let fill = match &r.ram_fill {
            None => 0,
            Some(Hex(b)) if b.len() == 1 => b[0],
            Some(_) => return Err("ram_fill: one byte".into()),
        };
        if fill != self.fill {
            self.fill = fill;
            for page in 0..self.identity / PAGE_SIZE {
                self.clear(page);
            }
            self.ram().track_dirty();
        }
        *self.ports.answer.lock().expect("no panic under the lock") = r.io_in.clone().unwrap_or_default().0;
        if own_tables {
            let root = self.allocate(0)?;
            self.root = Some(root);
            self.levels = levels.unwrap_or(4);
            s.cr3 = root;
            if r.unmapped == Some(Unmapped::Ram) {
                for at in (0..self.identity).step_by(2 << 20) {
                    self.map(at, at, ALL | LARGE)?;
                }
            }
        }
        if contents.iter().any(|c| c.rights.is_some()) && (!own_tables || r.unmapped == Some(Unmapped::Ram)) {
            return Err(
                "mem: `rights` are for page tables made for the case: paging, no `sys.cr3`, no `unmapped: ram`".into(),
            );
        }
        for c in &contents {
            self.put(c.addr, &c.bytes, own_tables)?;
        }
        for c in &contents {
            let Some(rights) = c.rights else { continue };
            for page in c.pages() {
                let physical = self.page(page)?;
                self.map(page, physical, leaf(rights))?;
            }
        }
        for page in self.ram().take_dirty() {
            let mut copy = Box::new([0; PAGE_SIZE as usize]);
            self.mem.read(page * PAGE_SIZE, &mut copy[..]);
            self.initial.insert(page, copy);
        }
        Ok(())
    }

    fn put(&mut self, addr: u64, bytes: &[u8], mapped: bool) -> Result<(), String> {
        let mut done = 0usize;
        while done < bytes.len() {
            let at = addr.wrapping_add(done as u64);
            let len = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(bytes.len() - done);
            let physical = if mapped { self.page(at)? | (at % PAGE_SIZE) } else { at };
            self.mem.write(physical, &bytes[done..done + len]).ok_or_else(|| format!("mem: no RAM at {at:#x}"))?;
            done += len;
        }
        Ok(())
    }

    /// The physical page of a linear address, mapped now if it was not.
    fn page(&mut self, addr: u64) -> Result<u64, String> {
        let page = addr & !(PAGE_SIZE - 1);
        if (page as i64) << 16 >> 16 != page as i64 {
            return Err(format!("mem: {addr:#x} is not canonical"));
        }
        if let Some(&physical) = self.mapped.get(&page) {
            return Ok(physical);
        }
        let physical = if page < self.identity { page } else { self.allocate(self.fill)? };
        self.mapped.insert(page, physical);
        self.map(page, physical, ALL)?;
        Ok(physical)
    }

    /// `unmapped: ram`: a not-present fault at `addr` becomes a fresh page. False if that cannot be.
    pub fn map_on_demand(&mut self, addr: u64) -> bool {
        self.root.is_some() && self.page(addr).is_ok()
    }

    fn allocate(&mut self, fill: u8) -> Result<u64, String> {
        let at = self.pool_next;
        self.mem.write(at, &[fill; PAGE_SIZE as usize]).ok_or("mem: too many pages for one case")?;
        self.pool_next += PAGE_SIZE;
        Ok(at)
    }

    fn map(&mut self, linear: u64, physical: u64, bits: u64) -> Result<(), String> {
        let large = bits & LARGE != 0;
        let mut table = self.root.expect("only called with a root");
        for level in (if large { 2 } else { 1 }..=self.levels).rev() {
            let slot = table + (linear >> (12 + 9 * (level - 1)) & 511) * 8;
            let entry = self.mem.load(slot, Width::Q).expect("tables lie in RAM");
            if level == if large { 2 } else { 1 } {
                self.mem.store(slot, Width::Q, physical | bits);
            } else if entry & 1 == 0 {
                table = self.allocate(0)?;
                // PAE's page-directory pointers have no rights (SDM 3A 4.4.2).
                let rights = if level == self.levels && level == 3 { 1 } else { ALL };
                self.mem.store(slot, Width::Q, table | rights);
            } else if entry & LARGE != 0 && level == 2 {
                return Ok(()); // already in a large page
            } else {
                table = entry & 0x000f_ffff_ffff_f000;
            }
        }
        Ok(())
    }

    /// What changed since the case started, as runs of bytes, and everything put back for the next case.
    pub fn finish(&mut self, ranges: &[Range], want_delta: bool) -> (Vec<Bytes>, Vec<Bytes>) {
        let asked = ranges.iter().map(|r| self.range(r)).collect();
        if let Some(flat) = self.flat.as_mut().filter(|_| self.in_flat) {
            return (flat.finish(want_delta), asked);
        }
        let back: BTreeMap<u64, u64> = self.mapped.iter().map(|(l, p)| (*p, *l)).collect();
        let dirty = self.ram().take_dirty();
        let mut delta: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        for &page in &dirty {
            let at = page * PAGE_SIZE;
            let linear = back.get(&at).copied().or((at < self.identity).then_some(at));
            if let (true, Some(linear)) = (want_delta, linear) {
                let mut now = [0; PAGE_SIZE as usize];
                self.mem.read(at, &mut now);
                let fresh = [self.fill; PAGE_SIZE as usize];
                note_changes(&mut delta, linear, &now, self.initial.get(&page).map_or(&fresh[..], |b| &b[..]));
            }
        }
        for page in dirty.into_iter().chain(self.initial.keys().copied().collect::<Vec<_>>()) {
            self.clear(page);
        }
        self.ram().take_dirty();
        self.initial.clear();
        self.mapped.clear();
        self.root = None;
        self.pool_next = self.identity;
        (runs(delta), asked)
    }

    fn clear(&self, page: u64) {
        self.mem.write(page * PAGE_SIZE, &[self.fill; PAGE_SIZE as usize]);
    }

    fn range(&self, r: &Range) -> Bytes {
        let len = r.len.0.min(IDENTITY);
        let byte = |i: u64| {
            let at = r.addr.0.wrapping_add(i);
            let page = at & !(PAGE_SIZE - 1);
            let mapped = self.mapped.get(&page).filter(|_| !self.in_flat);
            let physical = mapped.map_or(at, |p| p | (at % PAGE_SIZE));
            self.memory().load(physical, Width::B).unwrap_or(0xff) as u8
        };
        Bytes { addr: r.addr, hex: Hex((0..len).map(byte).collect()) }
    }
}

/// Adds what changed of a page, in order of address, to runs of bytes.
pub fn note_changes(delta: &mut BTreeMap<u64, Vec<u8>>, page: u64, now: &[u8], was: &[u8]) {
    for (i, (n, w)) in now.iter().zip(was).enumerate() {
        if n != w {
            let addr = page + i as u64;
            match delta.last_entry().filter(|e| e.key() + e.get().len() as u64 == addr) {
                Some(mut run) => run.get_mut().push(*n),
                None => _ = delta.insert(addr, vec![*n]),
            }
        }
    }
}

/// As responses show them.
pub fn runs(delta: BTreeMap<u64, Vec<u8>>) -> Vec<Bytes> {
    delta.into_iter().map(|(addr, b)| Bytes { addr: Num(addr), hex: Hex(b) }).collect()
}

/// Present, writable, user (SDM 3A 4.5).
const ALL: u64 = 7;
/// In a directory: it maps a large page.
const LARGE: u64 = 1 << 7;

/// The entry of a page with these rights.
fn leaf(Rights(prot): Rights) -> u64 {
    const WRITE: u64 = 2;
    const NO_EXECUTE: u64 = 1 << 63;
    if prot.is_empty() {
        return 0;
    }
    let write = if prot.contains(Prot::WRITE) { 0 } else { WRITE };
    let execute = if prot.contains(Prot::EXEC) { 0 } else { NO_EXECUTE };
    ALL & !write | execute
}

/// An entry of `mem`, or a segment.
pub struct Content {
    /// Its address.
    pub addr: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Of the pages that hold it, if it says.
    pub rights: Option<Rights>,
}

impl Content {
    /// The pages that hold it.
    pub fn pages(&self) -> impl Iterator<Item = u64> + use<> {
        let last = self.addr.saturating_add((self.bytes.len() as u64).max(1) - 1);
        (self.addr & !(PAGE_SIZE - 1)..=last).step_by(PAGE_SIZE as usize)
    }
}

/// What `mem` and the ELF file hold; the latter also sets RIP unless the request does.
pub fn contents(r: &Request, s: &mut CpuState) -> Result<Vec<Content>, String> {
    let mut out = Vec::new();
    if let Some(path) = &r.elf {
        let image = std::fs::read(path).map_err(|e| format!("elf: {path}: {e}"))?;
        let elf = goblin::elf::Elf::parse(&image).map_err(|e| format!("elf: {path}: {e}"))?;
        if !r.regs.contains_key("rip") {
            s.rip = elf.entry;
        }
        for p in elf.program_headers.iter().filter(|p| p.p_type == goblin::elf::program_header::PT_LOAD) {
            let end = p.p_offset.checked_add(p.p_filesz).filter(|_| p.p_memsz <= MOST);
            let file = end.and_then(|end| image.get(p.p_offset as usize..end as usize));
            let mut bytes = file.ok_or_else(|| format!("elf: {path}: a segment lies outside the file"))?.to_vec();
            bytes.resize(bytes.len().max(p.p_memsz as usize), 0);
            out.push(Content { addr: p.p_vaddr, bytes, rights: None });
        }
    }
    for m in &r.mem {
        let bytes = match (&m.hex, &m.fill, &m.len, &m.file) {
            (Some(h), None, None, None) => h.0.clone(),
            (None, Some(f), Some(len), None) if f.0.len() == 1 && len.0 <= MOST => vec![f.0[0]; len.0 as usize],
            (None, None, None, Some(path)) => std::fs::read(path).map_err(|e| format!("mem: {path}: {e}"))?,
            _ => return Err("mem: one of `hex`, `fill` (one byte) with `len`, or `file`".into()),
        };
        out.push(Content { addr: m.addr.0, bytes, rights: m.rights });
    }
    Ok(out)
}
