//! The memory of a case of the flat model: the pages of its `mem` at their own addresses of this process, as `bivisor run` has a
//! program's, and gone afterwards.

use super::request::{ModeName, Request, Rights};
use super::response::Bytes;
use super::world::{Content, Refusal, note_changes, runs};
use bivisor_emulator::cpu::CpuState;
use bivisor_emulator::host::signal;
use bivisor_emulator::linux::AddressSpace;
use bivisor_emulator::linux::mm::Mapping;
use bivisor_emulator::mem::{GuestMemory, PAGE_SIZE, Prot};
use std::collections::BTreeMap;

/// The address space, and what a case has put there.
#[derive(Default)]
pub struct Flat {
    space: AddressSpace,
    /// Pages as they were when the case started.
    initial: BTreeMap<u64, Box<[u8; PAGE_SIZE as usize]>>,
}

impl Flat {
    /// As engines see it.
    pub fn memory(&self) -> &GuestMemory {
        &self.space.mem
    }

    /// Maps and fills the pages of a case.
    pub fn set_up(&mut self, r: &Request, s: &CpuState, contents: &[Content]) -> Result<(), Refusal> {
        if r.mode != ModeName::Long64 || s.cpl() != 3 || r.unmapped.is_some() || r.deliver {
            return Err("memory: flat is a process's: long64, cpl 3, neither `unmapped` nor `deliver`".into());
        }
        // Accesses may fault on this thread from now on.
        signal::attach();
        let mut rights: BTreeMap<u64, Prot> = BTreeMap::new();
        for c in contents {
            for page in c.pages() {
                let old = rights.get(&page).copied().unwrap_or(Prot::all());
                rights.insert(page, c.rights.map_or(old, |Rights(prot)| prot));
            }
        }
        let fill = r.ram_fill.as_ref().and_then(|f| f.0.first().copied()).unwrap_or(0);
        for &page in rights.keys() {
            let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
            let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
            let m = Mapping { addr: page, len: PAGE_SIZE, prot, flags, fd: -1, offset: 0, name: "" };
            if self.space.map(&m) as u64 != page {
                return Err(Refusal::NotHere(format!("the page at {page:#x} is not to be had in this process")));
            }
            let _ = self.space.mem.write(page, &[fill; PAGE_SIZE as usize]);
            self.initial.insert(page, Box::new([fill; PAGE_SIZE as usize]));
        }
        for c in contents {
            self.space.mem.write(c.addr, &c.bytes).ok_or("mem: not written")?;
        }
        for (page, copy) in &mut self.initial {
            let _ = self.space.mem.read(*page, &mut copy[..]);
        }
        for (page, prot) in rights {
            self.space.protect(page, PAGE_SIZE, prot.bits() as u64);
        }
        Ok(())
    }

    /// What changed since, and everything unmapped.
    pub fn finish(&mut self, want_delta: bool) -> Vec<Bytes> {
        let mut delta = BTreeMap::new();
        for (page, was) in std::mem::take(&mut self.initial) {
            let mut now = [0; PAGE_SIZE as usize];
            if want_delta && self.space.mem.read(page, &mut now).is_some() {
                note_changes(&mut delta, page, &now, &was[..]);
            }
            self.space.unmap(page, PAGE_SIZE);
        }
        runs(delta)
    }
}
