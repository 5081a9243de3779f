//! Linux kernels: bzImage by the 64-bit or 32-bit boot protocol (Documentation/arch/x86/boot.rst), ELF vmlinux by the same entry or PVH.

use crate::cpu::{Attr, CpuState, Cr0, Cr4, Efer, Segment};
use crate::isa::{Gpr, Seg, Width};
use crate::machine::boot::{Payload, elf, enter_flat32, memory_map, put, size, unpack};
use crate::mem::{GuestMemory, PAGE_SIZE};

/// Offsets in the setup header, which is also in the boot parameters.
mod field {
    pub const SETUP_SECTS: usize = 0x1f1;
    pub const SYSSIZE: usize = 0x1f4;
    pub const BOOT_FLAG: usize = 0x1fe;
    pub const JUMP: usize = 0x200;
    pub const MAGIC: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const TYPE_OF_LOADER: usize = 0x210;
    pub const LOADFLAGS: usize = 0x211;
    pub const CODE32_START: usize = 0x214;
    pub const RAMDISK_IMAGE: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const HEAP_END: usize = 0x224;
    pub const CMD_LINE: usize = 0x228;
    pub const INITRD_MAX: usize = 0x22c;
    pub const XLOADFLAGS: usize = 0x236;
    pub const CMDLINE_SIZE: usize = 0x238;
    pub const PAYLOAD_OFFSET: usize = 0x248;
    pub const PAYLOAD_LENGTH: usize = 0x24c;
    pub const PREF_ADDRESS: usize = 0x258;
    pub const INIT_SIZE: usize = 0x260;
}

/// Boot parameters: RSDP, memory map's length and place.
const ACPI_RSDP: usize = 0x70;
const E820_ENTRIES: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;

/// Where what the kernel is given lies.
const GDT: u64 = 0x500;
const PARAMS: u64 = 0x7000;
const TABLES: u64 = 0x9000;
const COMMAND_LINE: u64 = 0x2_0000;
const KERNEL: u64 = 0x10_0000;
/// PVH: start information, memory map, module list.
const PVH_INFO: u64 = 0x6000;
const PVH_MAP: u64 = 0x6100;
const PVH_MODULE: u64 = 0x6080;

/// Addresses that the kernel's first page tables map.
const MAPPED: u64 = 4 << 30;

/// Is it a bzImage (or something with its header)?
pub fn is_bzimage(image: &[u8]) -> bool {
    image.get(field::MAGIC..field::MAGIC + 4) == Some(b"HdrS") && u16_at(image, field::BOOT_FLAG) == 0xaa55
}

fn u16_at(image: &[u8], at: usize) -> u16 {
    image.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
}

fn u32_at(image: &[u8], at: usize) -> u32 {
    u32::from(u16_at(image, at)) | u32::from(u16_at(image, at + 2)) << 16
}

/// The boot parameters ("zero page").
struct Params(Vec<u8>);

impl Params {
    fn new() -> Params {
        Params(vec![0; PAGE_SIZE as usize])
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn finish(mut self, mem: &GuestMemory, rsdp: u64) -> Result<(), String> {
        let map = memory_map(mem);
        self.0[E820_ENTRIES] = map.len() as u8;
        for (i, (start, end, kind)) in map.into_iter().enumerate() {
            let entry = [&start.to_le_bytes()[..], &(end - start).to_le_bytes(), &kind.to_le_bytes()].concat();
            self.set(E820_TABLE + 20 * i, &entry);
        }
        self.set(ACPI_RSDP, &rsdp.to_le_bytes());
        put(mem, PARAMS, &self.0, "the boot parameters")
    }
}

/// Puts the initial RAM disk as high as it may be: address and length, 0 without one.
fn put_initrd(mem: &GuestMemory, payload: &Payload<'_>, highest: u64, kernel_end: u64) -> Result<(u32, u32), String> {
    let Some((_, bytes)) = payload.initrd else { return Ok((0, 0)) };
    let len = bytes.len() as u64;
    let top = size(mem).min(highest.saturating_add(1));
    let at = top.checked_sub(len).map(|at| at & !(PAGE_SIZE - 1)).filter(|at| *at >= kernel_end);
    let at = at.ok_or_else(|| {
        let (len, all) = (len.div_ceil(1 << 20), size(mem) >> 20);
        format!("the initrd of {len} MiB does not fit beside the kernel into the machine's {all} MiB: use --memory")
    })?;
    put(mem, at, bytes, "the initrd")?;
    Ok((at as u32, len as u32))
}

fn put_command_line(mem: &GuestMemory, line: &str, most: usize) -> Result<(), String> {
    if line.len() > most {
        return Err(format!("the command line has {} bytes and the kernel takes {most}", line.len()));
    }
    put(mem, COMMAND_LINE, &[line.as_bytes(), b"\0"].concat(), "the command line")
}

/// Loads a bzImage.
///
/// # Errors
/// A sentence.
pub fn load_bzimage(mem: &GuestMemory, cpu: &mut CpuState, payload: &Payload<'_>, rsdp: u64) -> Result<(), String> {
    let image = payload.kernel;
    let version = u16_at(image, field::VERSION);
    if image.len() <= field::LOADFLAGS {
        return Err("the kernel image is cut off in its header".into());
    }
    if version < 0x0206 || image[field::LOADFLAGS] & 1 == 0 {
        return Err(format!("a Linux kernel of boot protocol {}.{}: too old", version >> 8, version & 0xff));
    }
    let setup = match image[field::SETUP_SECTS] {
        0 => 4,
        n => usize::from(n),
    };
    let body = image.get((setup + 1) * 512..).filter(|b| !b.is_empty()).ok_or("the kernel image is cut off")?;
    // Its length in paragraphs; up to one less is rounding.
    let told = 16 * u64::from(u32_at(image, field::SYSSIZE));
    if told > body.len() as u64 + 15 {
        return Err(format!("the kernel image is cut off: {} of {told} bytes of code are there", body.len()));
    }
    let header_end = field::MAGIC + usize::from(image[field::JUMP + 1]);
    let header = image.get(field::SETUP_SECTS..header_end).ok_or("the kernel image is cut off in its header")?;
    // XLF_KERNEL_64: there is a 64-bit entry point.
    let long = version >= 0x020c && u16_at(image, field::XLOADFLAGS) & 1 != 0;
    let init_size = if version >= 0x020a { u64::from(u32_at(image, field::INIT_SIZE)) } else { 0 };
    let inside = if payload.unpack { put_inside(mem, image, body, long) } else { None };
    if inside.is_none() {
        put(mem, KERNEL, body, "the kernel")?;
    }
    let end = inside.as_ref().map_or(KERNEL + init_size.max(body.len() as u64), |inside| inside.range.1);
    if end > size(mem) {
        let (need, all) = (end.div_ceil(1 << 20), size(mem) >> 20);
        return Err(format!("the kernel needs {need} MiB and the machine has {all} MiB: use --memory"));
    }
    let (initrd, len) = put_initrd(mem, payload, u64::from(u32_at(image, field::INITRD_MAX)), end)?;
    put_command_line(mem, payload.command_line, u32_at(image, field::CMDLINE_SIZE).clamp(255, 0xffff) as usize)?;
    let mut params = Params::new();
    params.set(field::SETUP_SECTS, header);
    // A loader without a number of its own; the heap may be used.
    params.set(field::TYPE_OF_LOADER, &[0xff, image[field::LOADFLAGS] | 0x80]);
    params.set(field::CODE32_START, &(KERNEL as u32).to_le_bytes());
    params.set(field::HEAP_END, &0xfe00u16.to_le_bytes());
    params.set(field::CMD_LINE, &(COMMAND_LINE as u32).to_le_bytes());
    params.set(field::RAMDISK_IMAGE, &initrd.to_le_bytes());
    params.set(field::RAMDISK_SIZE, &len.to_le_bytes());
    params.finish(mem, rsdp)?;
    let entry = inside.map_or(KERNEL, |inside| inside.entry);
    if long {
        // In the kernel that unpacks itself it is behind the 32-bit one.
        enter_long(mem, cpu, if entry == KERNEL { KERNEL + 0x200 } else { entry })?;
    } else {
        enter_flat32(cpu, entry as u32);
        put_gdt(mem, cpu)?;
    }
    cpu.write(Gpr::Rsi, Width::Q, PARAMS);
    Ok(())
}

/// Unpacks the kernel inside a bzImage to where it was linked for, and there its own code would put it too but for the choice of another
/// address by chance (KASLR). `None`: it cannot be unpacked here, or is not as expected; the guest's own code then does it.
fn put_inside(mem: &GuestMemory, image: &[u8], body: &[u8], long: bool) -> Option<elf::Loaded> {
    if u16_at(image, field::VERSION) < 0x020a {
        return None;
    }
    let (at, length) = (u32_at(image, field::PAYLOAD_OFFSET) as usize, u32_at(image, field::PAYLOAD_LENGTH) as usize);
    let init_size = u64::from(u32_at(image, field::INIT_SIZE));
    let first = u64::from(u32_at(image, field::PREF_ADDRESS));
    let end = first + init_size;
    if first < KERNEL || end > size(mem) {
        return None;
    }
    let kernel = unpack::unpack(body.get(at..at.checked_add(length)?)?, init_size as usize)?;
    let (start, needed) = elf::extent(&kernel, long)?;
    if start < first || needed > end {
        return None;
    }
    let mut loaded = elf::load(mem, &kernel).ok().filter(|loaded| (first..end).contains(&loaded.entry))?;
    // It may use all of what it asks for before it looks at the memory map.
    loaded.range.1 = end;
    Some(loaded)
}

/// Loads an ELF vmlinux: by its PVH entry if it has one, else as after decompression, by the 64-bit or 32-bit protocol.
///
/// # Errors
/// A sentence.
pub fn load_vmlinux(mem: &GuestMemory, cpu: &mut CpuState, payload: &Payload<'_>, rsdp: u64) -> Result<(), String> {
    if elf::is_program(payload.kernel) {
        return Err("a program for Linux, no kernel: start it with `bivisor run`".into());
    }
    let loaded = elf::load(mem, payload.kernel)?;
    let (initrd, len) = put_initrd(mem, payload, 0x7fff_ffff, loaded.range.1)?;
    put_command_line(mem, payload.command_line, 0x7ff)?;
    if let Some(entry) = elf::pvh_entry(payload.kernel) {
        put_pvh(mem, (initrd, len), rsdp)?;
        enter_flat32(cpu, entry);
        cpu.write(Gpr::Rbx, Width::Q, PVH_INFO);
        return Ok(());
    }
    let mut params = Params::new();
    params.set(field::BOOT_FLAG, &0xaa55u16.to_le_bytes());
    params.set(field::MAGIC, b"HdrS");
    params.set(field::VERSION, &0x020fu16.to_le_bytes());
    params.set(field::TYPE_OF_LOADER, &[0xff, 1]);
    params.set(field::CMD_LINE, &(COMMAND_LINE as u32).to_le_bytes());
    params.set(field::CMDLINE_SIZE, &0x7ffu32.to_le_bytes());
    params.set(field::RAMDISK_IMAGE, &initrd.to_le_bytes());
    params.set(field::RAMDISK_SIZE, &len.to_le_bytes());
    params.finish(mem, rsdp)?;
    if loaded.long {
        enter_long(mem, cpu, loaded.entry)?;
    } else {
        enter_flat32(cpu, loaded.entry as u32);
        put_gdt(mem, cpu)?;
    }
    cpu.write(Gpr::Rsi, Width::Q, PARAMS);
    Ok(())
}

/// The start information of the PVH protocol (Xen's public/arch-x86/hvm/start_info.h, version 1).
fn put_pvh(mem: &GuestMemory, initrd: (u32, u32), rsdp: u64) -> Result<(), String> {
    let map = memory_map(mem);
    let modules = u32::from(initrd.1 != 0);
    let mut info = Vec::new();
    for word in [0x336e_c578, 1, 0, modules] {
        info.extend(u32::to_le_bytes(word));
    }
    for address in [PVH_MODULE, COMMAND_LINE, rsdp, PVH_MAP] {
        info.extend(address.to_le_bytes());
    }
    info.extend((map.len() as u32).to_le_bytes());
    info.extend([0; 4]);
    put(mem, PVH_INFO, &info, "the start information")?;
    let module = [u64::from(initrd.0), u64::from(initrd.1), 0, 0].map(u64::to_le_bytes).concat();
    put(mem, PVH_MODULE, &module, "the start information")?;
    let mut table = Vec::new();
    for (start, end, kind) in map {
        table.extend(start.to_le_bytes());
        table.extend((end - start).to_le_bytes());
        table.extend(kind.to_le_bytes());
        table.extend([0; 4]);
    }
    put(mem, PVH_MAP, &table, "the start information")
}

/// A table with the selectors that the protocols name: 0x10 code, 0x18 data.
pub fn put_gdt(mem: &GuestMemory, cpu: &mut CpuState) -> Result<(), String> {
    let long = cpu.efer.contains(Efer::LMA);
    let code: u64 = if long { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff };
    let table = [0, 0, code, 0x00cf_9300_0000_ffff].map(u64::to_le_bytes).concat();
    put(mem, GDT, &table, "the descriptor table")?;
    cpu.gdtr.base = GDT;
    cpu.gdtr.limit = table.len() as u16 - 1;
    Ok(())
}

/// 64-bit mode with the first 4 GiB mapped to themselves by pages of 2 MiB.
pub fn enter_long(mem: &GuestMemory, cpu: &mut CpuState, entry: u64) -> Result<(), String> {
    const PRESENT_WRITE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let (pdpt, directories) = (TABLES + PAGE_SIZE, TABLES + 2 * PAGE_SIZE);
    put(mem, TABLES, &(pdpt | PRESENT_WRITE).to_le_bytes(), "page tables")?;
    for n in 0..MAPPED >> 30 {
        let at = directories + n * PAGE_SIZE;
        put(mem, pdpt + 8 * n, &(at | PRESENT_WRITE).to_le_bytes(), "page tables")?;
        let entries: Vec<u8> =
            (0..512).flat_map(|i| ((n << 30 | i << 21) | LARGE | PRESENT_WRITE).to_le_bytes()).collect();
        put(mem, at, &entries, "page tables")?;
    }
    enter_flat32(cpu, 0);
    cpu.cr3 = TABLES;
    cpu.cr4 = Cr4::PAE;
    cpu.efer = Efer::LME | Efer::LMA;
    cpu.cr0 |= Cr0::PG;
    cpu.seg[Seg::Cs as usize] = Segment::code64(0x10, 0);
    cpu.tr.attr = Attr::from_bits_retain(0x8b);
    cpu.rip = entry;
    put_gdt(mem, cpu)
}
