//! Multiboot 1 kernels (Multiboot Specification 0.6.96).

use crate::cpu::CpuState;
use crate::isa::{Gpr, Width};
use crate::machine::boot::{Payload, elf, enter_flat32, put, size};
use crate::mem::{GuestMemory, PAGE_SIZE};

const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// The header must lie in the first 8 KiB of the image.
const SEARCH: usize = 8192;

/// Header flags: there are address fields; flags 0 to 15 must be understood, of which 0 (aligned modules) and 1 (memory map) are; 2
/// (video) is not.
const ADDRESSES: u32 = 1 << 16;
const MUST_KNOW: u32 = 0xfffc & !4;

/// Where the information goes: above what kernels of real mode are linked to.
const INFO: u64 = 0x9_0000;
const TEXT: u64 = 0x9_0200;
const TEXT_END: u64 = 0x9f000;

/// Offset of the header.
pub fn header(image: &[u8]) -> Option<usize> {
    let word = |at: usize| image.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let end = image.len().min(SEARCH);
    (0..end.saturating_sub(11)).step_by(4).find(|&at| {
        let sum = word(at + 4).zip(word(at + 8)).map(|(f, c)| HEADER_MAGIC.wrapping_add(f).wrapping_add(c));
        word(at) == Some(HEADER_MAGIC) && sum == Some(0)
    })
}

/// Loads kernel and module, writes the information, sets the registers.
///
/// # Errors
/// A sentence.
pub fn load(mem: &GuestMemory, cpu: &mut CpuState, payload: &Payload<'_>) -> Result<(), String> {
    let image = payload.kernel;
    let at = header(image).ok_or("no multiboot header")?;
    let field = |n: usize| {
        let at = at + 4 * n;
        let bytes = image.get(at..at + 4).ok_or("the kernel image is cut off in its multiboot header")?;
        Ok::<u32, String>(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    let flags = field(1)?;
    if flags & MUST_KNOW != 0 {
        return Err(format!("the multiboot header asks for features that are not there: flags {flags:#x}"));
    }
    let (entry, end) = if flags & ADDRESSES != 0 {
        let [header_addr, load_addr, load_end, bss_end, entry] =
            [field(3)?, field(4)?, field(5)?, field(6)?, field(7)?];
        let before = header_addr.checked_sub(load_addr).ok_or("the multiboot header's addresses make no sense")?;
        let start = at.checked_sub(before as usize).ok_or("the multiboot header's addresses lie before the image")?;
        let len = match load_end {
            0 => image.len() - start,
            end => end.checked_sub(load_addr).ok_or("the multiboot header's addresses make no sense")? as usize,
        };
        let body = image.get(start..start + len).ok_or("the kernel image is cut off")?;
        let loaded_end = u64::from(load_addr) + len as u64;
        put(mem, u64::from(load_addr), body, "the kernel")?;
        elf::zero(mem, loaded_end, u64::from(bss_end).saturating_sub(loaded_end))?;
        (u64::from(entry), loaded_end.max(u64::from(bss_end)))
    } else {
        let loaded = elf::load(mem, image)?;
        (loaded.entry, loaded.range.1)
    };
    let entry = u32::try_from(entry).map_err(|_| "the kernel's entry point is not below 4 GiB")?;
    let mut module = None;
    if let Some((name, bytes)) = payload.initrd {
        let at = end.next_multiple_of(PAGE_SIZE).max(1 << 20);
        put(mem, at, bytes, "the module")?;
        module = Some((at, at + bytes.len() as u64, name));
    }
    write_info(mem, payload, module)?;
    enter_flat32(cpu, entry);
    cpu.write(Gpr::Rax, Width::Q, LOADER_MAGIC);
    cpu.write(Gpr::Rbx, Width::Q, INFO);
    Ok(())
}

/// Texts and tables behind the information, one after the other.
struct Area<'a> {
    mem: &'a GuestMemory,
    at: u64,
}

impl Area<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<u32, String> {
        let at = self.at;
        self.at += bytes.len() as u64;
        if self.at > TEXT_END {
            return Err("the command line is too long".into());
        }
        put(self.mem, at, bytes, "the multiboot information")?;
        Ok(at as u32)
    }

    fn text(&mut self, s: &str) -> Result<u32, String> {
        self.put(&[s.as_bytes(), b"\0"].concat())
    }
}

fn write_info(mem: &GuestMemory, payload: &Payload<'_>, module: Option<(u64, u64, &str)>) -> Result<(), String> {
    let top = size(mem);
    let mut area = Area { mem, at: TEXT };
    let mut info = [0u32; 29];
    // Memory sizes, command line, modules, memory map, loader's name.
    info[0] = 1 | 1 << 2 | 1 << 6 | 1 << 9;
    info[1] = 640;
    info[2] = ((top >> 10) as u32).saturating_sub(1024);
    let line = [payload.name, payload.command_line].join(" ");
    info[4] = area.text(line.trim_end())?;
    if let Some((start, end, name)) = module {
        let name = area.text(name)?;
        area.at = area.at.next_multiple_of(4);
        let words = [start as u32, end as u32, name, 0];
        info[0] |= 1 << 3;
        info[5] = 1;
        info[6] = area.put(&words.map(u32::to_le_bytes).concat())?;
    }
    area.at = area.at.next_multiple_of(4);
    let mut map = Vec::new();
    for (start, end, kind) in crate::machine::boot::memory_map(mem) {
        map.extend(20u32.to_le_bytes());
        map.extend(start.to_le_bytes());
        map.extend((end - start).to_le_bytes());
        map.extend(kind.to_le_bytes());
    }
    info[11] = map.len() as u32;
    info[12] = area.put(&map)?;
    info[16] = area.text("bivisor")?;
    put(mem, INFO, &info.map(u32::to_le_bytes).concat(), "the multiboot information")
}
