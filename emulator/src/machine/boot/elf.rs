//! ELF kernels: segments by physical address.

use crate::machine::boot::put;
use crate::mem::GuestMemory;
use goblin::elf::Elf;
use goblin::elf::program_header::{PT_DYNAMIC, PT_INTERP, PT_LOAD, PT_TLS};

/// What was loaded.
pub struct Loaded {
    /// The entry point.
    pub entry: u64,
    /// The lowest and the first free physical address.
    pub range: (u64, u64),
    /// Is it a file of 64 bits?
    pub long: bool,
}

/// Loads the segments of an x86 ELF file.
///
/// # Errors
/// A sentence: what is wrong with the file, or that it does not fit.
pub fn load(mem: &GuestMemory, image: &[u8]) -> Result<Loaded, String> {
    let elf = Elf::parse(image).map_err(|e| format!("not a usable ELF file: {e}"))?;
    if !matches!(elf.header.e_machine, 3 | 62) {
        return Err("an ELF file for another processor than x86".into());
    }
    let mut range = (u64::MAX, 0);
    for p in elf.program_headers.iter().filter(|p| p.p_type == PT_LOAD && p.p_memsz != 0) {
        let end = p.p_offset.checked_add(p.p_filesz);
        let file = end.and_then(|end| image.get(p.p_offset as usize..end as usize));
        let file = file.ok_or("the kernel image is cut off: a segment lies outside the file")?;
        put(mem, p.p_paddr, file, "the kernel")?;
        zero(mem, p.p_paddr + p.p_filesz, p.p_memsz.saturating_sub(p.p_filesz))?;
        range = (range.0.min(p.p_paddr), range.1.max(p.p_paddr.saturating_add(p.p_memsz)));
    }
    if range.1 == 0 {
        return Err("an ELF file without loadable segments".into());
    }
    Ok(Loaded { entry: elf.entry, range, long: elf.is_64 })
}

/// Is it a program for a kernel to start, with a dynamic linker or a thread's storage?
pub fn is_program(image: &[u8]) -> bool {
    let of_programs = |kind: u32| matches!(kind, PT_INTERP | PT_DYNAMIC | PT_TLS);
    Elf::parse(image).is_ok_and(|elf| elf.program_headers.iter().any(|p| of_programs(p.p_type)))
}

/// The lowest and the first free physical address of an x86 ELF file of 64 bits or of 32, if it is one.
pub fn extent(image: &[u8], long: bool) -> Option<(u64, u64)> {
    let elf = Elf::parse(image).ok().filter(|elf| elf.is_64 == long)?;
    let loaded = elf.program_headers.iter().filter(|p| p.p_type == PT_LOAD && p.p_memsz != 0);
    let ends: Option<Vec<_>> = loaded.clone().map(|p| p.p_paddr.checked_add(p.p_memsz.max(p.p_filesz))).collect();
    Some((loaded.map(|p| p.p_paddr).min()?, ends?.into_iter().max()?))
}

/// The PVH entry point: ELF note 18 of Xen.
pub fn pvh_entry(image: &[u8]) -> Option<u32> {
    const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
    let elf = Elf::parse(image).ok()?;
    let mut notes = elf.iter_note_headers(image)?.flatten();
    let note = notes.find(|n| n.name == "Xen" && n.n_type == XEN_ELFNOTE_PHYS32_ENTRY)?;
    note.desc.get(..4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// Zeroes memory, a piece at a time.
pub fn zero(mem: &GuestMemory, mut at: u64, mut len: u64) -> Result<(), String> {
    static PIECE: [u8; 65_536] = [0; 65_536];
    while len != 0 {
        let n = len.min(PIECE.len() as u64);
        put(mem, at, &PIECE[..n as usize], "the kernel's zeroed memory")?;
        at += n;
        len -= n;
    }
    Ok(())
}
