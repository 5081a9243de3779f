//! Putting a guest into a machine: which kind of image it is, and what each kind wants to find.

mod elf;
pub(crate) mod firmware;
mod linux;
mod multiboot;
mod multiboot2;
mod unpack;

use crate::cpu::{Attr, CpuState, Cr0, Rflags, Segment, Table};
use crate::isa::Seg;
use crate::mem::GuestMemory;

/// What is to be booted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Payload<'a> {
    /// The kernel's name, for kinds that tell it to the kernel.
    pub name: &'a str,
    /// The kernel image.
    pub kernel: &'a [u8],
    /// The initial RAM disk or first module, with its name.
    pub initrd: Option<(&'a str, &'a [u8])>,
    /// The command line.
    pub command_line: &'a str,
    /// The kernel inside a bzImage is unpacked here, if it can be, and not by its own code in the guest. It is then where it was linked for.
    pub unpack: bool,
}

/// The kinds of kernel image, as found out from their first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Multiboot 1.
    Multiboot,
    /// Multiboot 2.
    Multiboot2,
    /// A Linux bzImage.
    BzImage,
    /// An ELF file: vmlinux.
    Elf,
}

/// What kind of kernel an image is.
pub fn kind(image: &[u8]) -> Option<Kind> {
    if linux::is_bzimage(image) {
        Some(Kind::BzImage)
    } else if multiboot::header(image).is_some() {
        Some(Kind::Multiboot)
    } else if multiboot2::header(image).is_some() {
        Some(Kind::Multiboot2)
    } else {
        image.starts_with(b"\x7fELF").then_some(Kind::Elf)
    }
}

/// Loads the payload and sets the registers to start it.
///
/// # Errors
/// A sentence: what is wrong with the image, or that it does not fit.
pub fn load(mem: &GuestMemory, cpu: &mut CpuState, payload: &Payload<'_>) -> Result<Kind, String> {
    let Some(kind) = kind(payload.kernel) else {
        return Err("not a kernel image: no bzImage, no ELF file, and no multiboot header".into());
    };
    let rsdp = crate::machine::acpi::write(mem)?;
    match kind {
        Kind::Multiboot => multiboot::load(mem, cpu, payload)?,
        Kind::Multiboot2 => multiboot2::load(mem, cpu, payload, rsdp)?,
        Kind::BzImage => linux::load_bzimage(mem, cpu, payload, rsdp)?,
        Kind::Elf => linux::load_vmlinux(mem, cpu, payload, rsdp)?,
    }
    Ok(kind)
}

/// Puts bytes at an address and starts there in real mode: at 0:address below 64 KiB, else at segment:0.
///
/// # Errors
/// A sentence: it does not fit, or there is no such segment.
pub fn start_real(mem: &GuestMemory, cpu: &mut CpuState, bytes: &[u8], at: u64) -> Result<(), String> {
    put(mem, at, bytes, "the image")?;
    let (segment, offset) = match at {
        0..=0xffff => (0, at),
        _ if at <= 0xf_fff0 && at.is_multiple_of(16) => (at >> 4, 0),
        _ => return Err(format!("real mode cannot start at {at:#x}: below 1 MiB, and above 64 KiB a multiple of 16")),
    };
    let mut s = CpuState::reset();
    std::mem::swap(&mut s.xsave, &mut cpu.xsave);
    s.seg[Seg::Cs as usize] = Segment { attr: Attr::from_bits_retain(0x9b), ..Segment::real(segment as u16) };
    s.rip = offset;
    // As a BIOS leaves it.
    s.cr0 = Cr0::ET;
    s.idtr.limit = 0x3ff;
    *cpu = s;
    Ok(())
}

/// Puts bytes at an address and starts there in 32-bit protected mode, flat and without paging.
///
/// # Errors
/// A sentence: it does not fit.
pub fn start_flat32(mem: &GuestMemory, cpu: &mut CpuState, bytes: &[u8], at: u64) -> Result<(), String> {
    put(mem, at, bytes, "the image")?;
    enter_flat32(cpu, at as u32);
    linux::put_gdt(mem, cpu)
}

/// Puts bytes at an address and starts there in 64-bit mode with the first 4 GiB mapped to themselves.
///
/// # Errors
/// A sentence: it does not fit.
pub fn start_long(mem: &GuestMemory, cpu: &mut CpuState, bytes: &[u8], at: u64) -> Result<(), String> {
    put(mem, at, bytes, "the image")?;
    linux::enter_long(mem, cpu, at)
}

/// Writes bytes into RAM.
fn put(mem: &GuestMemory, at: u64, bytes: &[u8], what: &str) -> Result<(), String> {
    let end = at.checked_add(bytes.len() as u64).filter(|end| *end <= size(mem));
    end.and_then(|_| mem.write(at, bytes)).ok_or_else(|| {
        let need = (at.saturating_add(bytes.len() as u64)).div_ceil(1 << 20);
        format!("{what} does not fit: it would end at {need} MiB and the machine has {} MiB", size(mem) >> 20)
    })
}

/// Where RAM below the devices' addresses ends: all that is put into RAM here lies below.
fn size(mem: &GuestMemory) -> u64 {
    mem.ram().map_or(0, |r| r.low())
}

/// 32-bit protected mode without paging, flat segments, interrupts off.
fn enter_flat32(cpu: &mut CpuState, entry: u32) {
    let mut s = CpuState::reset();
    std::mem::swap(&mut s.xsave, &mut cpu.xsave);
    s.cr0 = Cr0::PE | Cr0::ET;
    s.seg = [Segment::data32(0x18, 0); 6];
    s.seg[Seg::Cs as usize] = Segment::code32(0x10, 0);
    s.tr = Segment { limit: 0x67, attr: Attr::from_bits_retain(0x8b), ..Segment::default() };
    s.gdtr = Table::default();
    s.idtr = Table::default();
    s.rip = u64::from(entry);
    s.rflags = Rflags::FIXED;
    *cpu = s;
}

/// The memory map, as firmware tells it: start, end, 1 for RAM and 2 for reserved.
fn memory_map(mem: &GuestMemory) -> Vec<(u64, u64, u32)> {
    let above = mem.ram().into_iter().flat_map(|r| r.parts()).filter(|(start, _)| *start > 0);
    let below = [
        (0, 0x9_fc00, 1),
        (0x9_fc00, 0xa_0000, 2),
        (0xe_0000, 0x10_0000, 2),
        (0x10_0000, size(mem), 1),
        (0xfec0_0000, 0xfec0_1000, 2),
        (0xfee0_0000, 0xfee0_1000, 2),
    ];
    below.into_iter().chain(above.map(|(start, len)| (start, start + len, 1))).collect()
}
