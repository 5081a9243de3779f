//! The pages a campaign's cases live in: the same addresses for the host CPU, for engines on flat memory, and behind page tables.
//!
//! | linear | what |
//! | --- | --- |
//! | [`NOTE`], [`EXIT`] | where an instruction came out, and where it then goes: the way back of each engine |
//! | [`CODE`] | two executable pages, the last bytes a SYSCALL and an INT3 |
//! | [`CODE_HOLE`], [`CODE_NX`] | an executable page each, before nothing and before a page that is not executable |
//! | [`DATA`] | four pages readable and writable, then one only readable ([`ROM`]), then nothing ([`HOLE`]), then two pages again |
//!
//! All lies below 2 GiB, so that absolute 32-bit addresses reach it, and one shared memory object backs it: the campaign writes code
//! and read-only pages through a view of its own.
#![allow(unsafe_code)]

use bivisor_emulator::interp::sensitive::selector::linux_descriptor;
use bivisor_emulator::isa::Width;
use bivisor_emulator::mem::{FlatSpace, GuestMemory, Prot, Ram, Vma};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// First address.
pub const BASE: u64 = 0x1000_0000;
/// Bytes from [`BASE`] on in which cases live.
pub const SIZE: u64 = 0x2_0000;
/// The tail of an instruction stores its address here.
pub const NOTE: u64 = BASE;
/// Where the tails jump.
pub const EXIT: u64 = BASE + 8;
/// Code.
pub const CODE: u64 = BASE + 0x2000;
/// The SYSCALL that ends a case on an engine.
pub const STUB: u64 = CODE + 0x1ff0;
/// The INT3 that ends a case on an engine whose SYSCALL does not leave the registers alone.
pub const BREAK: u64 = STUB + 8;
/// One page of code before a hole.
pub const CODE_HOLE: u64 = BASE + 0x6000;
/// One page of code before a page of data.
pub const CODE_NX: u64 = BASE + 0x9000;
/// One page of code that can store into itself, for those who want it ([`map_own`]); not one of [`PAGES`].
pub const OWN: u64 = BASE + 0xc000;
/// Data.
pub const DATA: u64 = BASE + 0x1_0000;
/// A read-only page.
pub const ROM: u64 = DATA + 0x4000;
/// Nothing.
pub const HOLE: u64 = DATA + 0x5000;
/// Data behind nothing.
pub const DATA2: u64 = DATA + 0x6000;

const RW: Prot = Prot::READ.union(Prot::WRITE);
const RX: Prot = Prot::READ.union(Prot::EXEC);

/// What is mapped: start, length, rights.
pub const PAGES: [(u64, u64, Prot); 8] = [
    (NOTE, 0x1000, RW),
    (CODE, 0x2000, RX),
    (CODE_HOLE, 0x1000, RX),
    (CODE_NX, 0x1000, RX),
    (CODE_NX + 0x1000, 0x1000, RW),
    (DATA, 0x4000, RW),
    (ROM, 0x1000, Prot::READ),
    (DATA2, 0x2000, RW),
];

/// The host's memory behind the cases' addresses.
#[derive(Clone, Copy, Debug)]
pub struct View(*mut u8);

impl View {
    fn at(self, addr: u64, len: usize) -> *mut u8 {
        let offset = addr.wrapping_sub(BASE);
        assert!(offset < SIZE && len as u64 <= SIZE - offset, "{addr:#x} is outside the arena");
        // SAFETY: inside the SIZE bytes that whoever made the view promised.
        unsafe { self.0.add(offset as usize) }
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// If they are not in the arena; so do the others.
    pub fn read(self, addr: u64, to: &mut [u8]) {
        // SAFETY: checked; nobody else runs, and `to` is Rust's.
        unsafe { std::ptr::copy_nonoverlapping(self.at(addr, to.len()), to.as_mut_ptr(), to.len()) }
    }

    /// Copies bytes in.
    pub fn write(self, addr: u64, from: &[u8]) {
        // SAFETY: as for `read`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.at(addr, from.len()), from.len()) }
    }

    /// Reads a doubleword.
    pub fn load32(self, addr: u64) -> u32 {
        let mut b = [0; 4];
        self.read(addr, &mut b);
        u32::from_le_bytes(b)
    }
}

/// Maps the arena into this process, once; gives the view of its memory and the flat space.
///
/// # Errors
/// A sentence: the host has something at those addresses, or refuses.
pub fn flat() -> Result<(View, GuestMemory), String> {
    let view = flat_view()?;
    let space = FlatSpace::new();
    for (start, len, prot) in PAGES {
        let end = start + len;
        space.insert(Vma { start, end, prot, shared: false, name: "".into(), offset: 0, backing: None });
    }
    Ok((view, GuestMemory::Flat(space)))
}

/// The view of [`flat`].
///
/// # Errors
/// As there.
pub fn flat_view() -> Result<View, String> {
    static ALIAS: OnceLock<Result<usize, String>> = OnceLock::new();
    ALIAS.get_or_init(map).clone().map(|a| View(a as *mut u8))
}

static HAS_OWN: AtomicBool = AtomicBool::new(false);

/// Does the process have the page [`OWN`]? Known when the arena is mapped.
pub fn has_own() -> bool {
    HAS_OWN.load(Ordering::Relaxed)
}

/// Gives the memory of an engine the page [`OWN`], to be read, written and executed.
pub fn map_own(mem: &GuestMemory) -> Option<()> {
    if let Some(flat) = mem.flat() {
        let prot = RW.union(Prot::EXEC);
        let (start, end) = (OWN, OWN + 0x1000);
        flat.insert(Vma { start, end, prot, shared: false, name: "".into(), offset: 0, backing: None });
        return Some(());
    }
    // Present, writable, a user's, accessed and dirty, executable.
    mem.store(TABLES + 0x3000 + (OWN >> 12 & 0x1ff) * 8, Width::Q, (OWN - BASE) | 0x67)
}

/// Gives the page [`OWN`] its rights in this process: an engine on flat memory may have taken some to see stores.
pub fn renew_own(executable: bool) {
    if has_own() {
        let exec = if executable { libc::PROT_EXEC } else { 0 };
        // SAFETY: the arena's page, which nobody in Rust refers to.
        unsafe { libc::mprotect(OWN as *mut _, 0x1000, libc::PROT_READ | libc::PROT_WRITE | exec) };
    }
}

fn map() -> Result<usize, String> {
    let failed = |what: &str| Err(format!("no memory for the cases: {what}: {}", std::io::Error::last_os_error()));
    // SAFETY: fresh mappings; MAP_FIXED_NOREPLACE takes nothing away from anybody. They stay for the life of the process.
    unsafe {
        let fd = libc::memfd_create(c"cases".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 || libc::ftruncate(fd, SIZE as i64) != 0 {
            return failed("memfd_create");
        }
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let alias = libc::mmap(std::ptr::null_mut(), SIZE as usize, rw, libc::MAP_SHARED, fd, 0);
        if alias == libc::MAP_FAILED {
            return failed("mmap");
        }
        for (start, len, prot) in PAGES {
            // Populated: a fault shall tell of rights, not of a page that Linux has not yet given.
            let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
            let at = libc::mmap(start as *mut _, len as usize, prot.bits(), flags, fd, (start - BASE) as i64);
            if at as u64 != start {
                return failed("mmap at a fixed address");
            }
        }
        // Where the host refuses pages that are writable and executable, code does not store into itself: see `has_own`.
        let (all, flags) = (rw | libc::PROT_EXEC, libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE);
        let own = libc::mmap(OWN as *mut _, 0x1000, all, flags, fd, (OWN - BASE) as i64);
        HAS_OWN.store(own as u64 == OWN, Ordering::Relaxed);
        libc::close(fd);
        Ok(alias as usize)
    }
}

/// CR3 of [`ram`].
pub const TABLES: u64 = SIZE;
/// Linear address of the GDT of [`ram`], for the kernel's eyes only: what a Linux process finds at its selectors.
pub const GDT: u64 = BASE + 0x1000;
/// Linear address of a page for an IDT, for the kernel's eyes only.
pub const IDT: u64 = BASE + 0x4000;
/// Of a page for a TSS, and the stack behind it.
pub const TSS: u64 = BASE + 0x5000;
/// Of the page tables themselves.
pub const OWN_TABLES: u64 = BASE + 0x1_c000;
/// Where in RAM the IDT is.
pub const IDT_AT: usize = SIZE as usize + 0x5000;
/// Where in RAM the TSS is.
pub const TSS_AT: usize = SIZE as usize + 0x6000;
/// The limit of the GDT.
pub const GDT_LIMIT: u16 = 0x7f;

/// RAM of a machine with the same pages behind page tables.
///
/// # Errors
/// The host's.
pub fn ram() -> Result<(View, GuestMemory), String> {
    let ram = Ram::shared(SIZE + 0xa000).map_err(|e| e.to_string())?;
    let view = View(ram.host_base());
    let mem = GuestMemory::Ram(ram);
    const PRESENT: u64 = 1;
    const WRITABLE: u64 = 2;
    const USER: u64 = 4;
    // Accessed and dirty already: they are not what is tested.
    const USED: u64 = 0x60;
    const NX: u64 = 1 << 63;
    let put = |at: u64, v: u64| mem.store(at, Width::Q, v).expect("inside RAM");
    for level in 0..3 {
        let table = TABLES + level * 0x1000;
        let index = BASE >> (39 - 9 * level) & 0x1ff;
        put(table + index * 8, (table + 0x1000) | PRESENT | WRITABLE | USER | USED);
    }
    for (start, len, prot) in PAGES {
        let writable = if prot.contains(Prot::WRITE) { WRITABLE } else { 0 };
        let nx = if prot.contains(Prot::EXEC) { 0 } else { NX };
        for page in (start..start + len).step_by(0x1000) {
            let rights = PRESENT | USER | USED | writable | nx;
            put(TABLES + 0x3000 + (page >> 12 & 0x1ff) * 8, (page - BASE) | rights);
        }
    }
    let kernel = [(GDT, TABLES + 0x4000), (IDT, IDT_AT as u64), (TSS, TSS_AT as u64)];
    let own = (0..4).map(|n| (OWN_TABLES + n * 0x1000, TABLES + n * 0x1000));
    for (page, at) in kernel.into_iter().chain(own) {
        put(TABLES + 0x3000 + (page >> 12 & 0x1ff) * 8, at | PRESENT | WRITABLE | USED | NX);
    }
    for selector in (0..=GDT_LIMIT).step_by(8) {
        put(TABLES + 0x4000 + u64::from(selector), linux_descriptor(selector).unwrap_or(0));
    }
    Ok((view, mem))
}
