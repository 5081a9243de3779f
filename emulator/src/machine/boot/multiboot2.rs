//! Multiboot 2 kernels (Multiboot2 Specification 2.0).

use crate::cpu::CpuState;
use crate::isa::{Gpr, Width};
use crate::machine::boot::{Payload, elf, enter_flat32, memory_map, put, size};
use crate::mem::{GuestMemory, PAGE_SIZE};

const HEADER_MAGIC: u32 = 0xe852_50d6;
const LOADER_MAGIC: u64 = 0x36d7_6289;
/// The header must lie in the first 32 KiB of the image, on an 8-byte boundary.
const SEARCH: usize = 32768;
/// Architecture 0: 32-bit protected mode of i386.
const I386: u32 = 0;

/// Tags of the header (3.1.3 and following); the flag says that a loader without them may go on.
mod header_tag {
    pub const END: u16 = 0;
    pub const REQUEST: u16 = 1;
    pub const ADDRESS: u16 = 2;
    pub const ENTRY: u16 = 3;
    pub const ALIGN_MODULES: u16 = 6;
    pub const OPTIONAL: u16 = 1;
}

/// Tags of the information (3.6).
mod info_tag {
    pub const COMMAND_LINE: u32 = 1;
    pub const LOADER: u32 = 2;
    pub const MODULE: u32 = 3;
    pub const MEMORY: u32 = 4;
    pub const MEMORY_MAP: u32 = 6;
    pub const ACPI_OLD: u32 = 14;
    pub const ACPI_NEW: u32 = 15;
    /// Those that a kernel may ask for.
    pub const ALL: [u32; 7] = [COMMAND_LINE, LOADER, MODULE, MEMORY, MEMORY_MAP, ACPI_OLD, ACPI_NEW];
}

/// Where the information goes, and where it must end.
const INFO: u64 = 0x9_0000;
const INFO_END: u64 = 0x9_f000;

fn word(image: &[u8], at: usize) -> Option<u32> {
    let bytes = image.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// Offset of the header.
pub fn header(image: &[u8]) -> Option<usize> {
    let end = image.len().min(SEARCH);
    (0..end.saturating_sub(15)).step_by(8).find(|&at| {
        let sum = [0, 4, 8, 12].iter().try_fold(0u32, |sum, n| Some(sum.wrapping_add(word(image, at + n)?)));
        word(image, at) == Some(HEADER_MAGIC) && sum == Some(0)
    })
}

/// What the header's tags say.
#[derive(Debug, Default)]
struct Wishes {
    /// header_addr, load_addr, load_end_addr, bss_end_addr.
    addresses: Option<[u32; 4]>,
    entry: Option<u32>,
}

fn wishes(image: &[u8], at: usize) -> Result<Wishes, String> {
    let cut = || "the kernel image is cut off in its multiboot header".to_owned();
    let architecture = word(image, at + 4).ok_or_else(cut)?;
    if architecture != I386 {
        return Err(format!("the multiboot header is for architecture {architecture}, not for i386"));
    }
    let end = at.saturating_add(word(image, at + 8).ok_or_else(cut)? as usize);
    let mut out = Wishes::default();
    let mut tag = at + 16;
    while tag < end {
        let (first, len) = (word(image, tag).ok_or_else(cut)?, word(image, tag + 4).ok_or_else(cut)? as usize);
        let (kind, flags) = (first as u16, (first >> 16) as u16);
        let field = |n: usize| word(image, tag + 8 + 4 * n).ok_or_else(cut);
        match kind {
            header_tag::END => break,
            header_tag::REQUEST => {
                for n in 0..len.saturating_sub(8) / 4 {
                    let wanted = field(n)?;
                    if flags & header_tag::OPTIONAL == 0 && !info_tag::ALL.contains(&wanted) {
                        return Err(format!(
                            "the multiboot header asks for information that is not there: tag {wanted}"
                        ));
                    }
                }
            }
            header_tag::ADDRESS => out.addresses = Some([field(0)?, field(1)?, field(2)?, field(3)?]),
            header_tag::ENTRY => out.entry = Some(field(0)?),
            header_tag::ALIGN_MODULES => {}
            _ if flags & header_tag::OPTIONAL != 0 => {}
            _ => return Err(format!("the multiboot header asks for what is not there: tag {kind}")),
        }
        tag = tag.saturating_add(len.max(8)).next_multiple_of(8);
    }
    Ok(out)
}

/// Puts an image where its header's addresses say; gives the first free address.
fn place(mem: &GuestMemory, image: &[u8], at: usize, addresses: [u32; 4]) -> Result<u64, String> {
    let [header_addr, load_addr, load_end, bss_end] = addresses;
    let wrong = || "the multiboot header's addresses make no sense".to_owned();
    let (load, start) = match load_addr {
        // From the file's beginning.
        u32::MAX => (header_addr.checked_sub(at as u32).ok_or_else(wrong)?, 0),
        load => {
            let before = header_addr.checked_sub(load).ok_or_else(wrong)? as usize;
            (load, at.checked_sub(before).ok_or_else(wrong)?)
        }
    };
    let len = match load_end {
        0 => image.len() - start,
        end => end.checked_sub(load).ok_or_else(wrong)? as usize,
    };
    let body = start.checked_add(len).and_then(|end| image.get(start..end)).ok_or("the kernel image is cut off")?;
    let end = u64::from(load) + len as u64;
    put(mem, u64::from(load), body, "the kernel")?;
    elf::zero(mem, end, u64::from(bss_end).saturating_sub(end))?;
    Ok(end.max(u64::from(bss_end)))
}

/// Loads kernel and module, writes the information, sets the registers.
///
/// # Errors
/// A sentence.
pub fn load(mem: &GuestMemory, cpu: &mut CpuState, payload: &Payload<'_>, rsdp: u64) -> Result<(), String> {
    let image = payload.kernel;
    let at = header(image).ok_or("no multiboot header")?;
    let wishes = wishes(image, at)?;
    let (entry, end) = match wishes.addresses {
        Some(addresses) => {
            let end = place(mem, image, at, addresses)?;
            (u64::from(wishes.entry.ok_or("the multiboot header has addresses and no entry point")?), end)
        }
        None => {
            let loaded = elf::load(mem, image)?;
            (wishes.entry.map_or(loaded.entry, u64::from), loaded.range.1)
        }
    };
    let entry = u32::try_from(entry).map_err(|_| "the kernel's entry point is not below 4 GiB")?;
    let mut module = None;
    if let Some((name, bytes)) = payload.initrd {
        let at = end.next_multiple_of(PAGE_SIZE).max(1 << 20);
        put(mem, at, bytes, "the module")?;
        module = Some((at, at + bytes.len() as u64, name));
    }
    let info = information(mem, payload, module, rsdp)?;
    if INFO + info.len() as u64 > INFO_END {
        return Err("the command line is too long".into());
    }
    put(mem, INFO, &info, "the multiboot information")?;
    enter_flat32(cpu, entry);
    cpu.write(Gpr::Rax, Width::Q, LOADER_MAGIC);
    cpu.write(Gpr::Rbx, Width::Q, INFO);
    Ok(())
}

/// Appends a tag: its kind, its length, what is in it, and up to 8 bytes' alignment.
fn tag(info: &mut Vec<u8>, kind: u32, body: &[u8]) {
    info.extend(kind.to_le_bytes());
    info.extend((body.len() as u32 + 8).to_le_bytes());
    info.extend(body);
    info.resize(info.len().next_multiple_of(8), 0);
}

fn information(
    mem: &GuestMemory,
    payload: &Payload<'_>,
    module: Option<(u64, u64, &str)>,
    rsdp: u64,
) -> Result<Vec<u8>, String> {
    let words = |words: &[u32]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let text = |s: &str| [s.as_bytes(), b"\0"].concat();
    let top = size(mem);
    let mut info = vec![0; 8];
    // Unlike in version 1, the kernel's name is not part of its command line.
    tag(&mut info, info_tag::COMMAND_LINE, &text(payload.command_line));
    tag(&mut info, info_tag::LOADER, &text("bivisor"));
    if let Some((start, end, name)) = module {
        tag(&mut info, info_tag::MODULE, &[words(&[start as u32, end as u32]), text(name)].concat());
    }
    tag(&mut info, info_tag::MEMORY, &words(&[640, ((top >> 10) as u32).saturating_sub(1024)]));
    // Entries of 24 bytes, version 0.
    let mut map = words(&[24, 0]);
    for (start, end, kind) in memory_map(mem) {
        map.extend(start.to_le_bytes());
        map.extend((end - start).to_le_bytes());
        map.extend(words(&[kind, 0]));
    }
    tag(&mut info, info_tag::MEMORY_MAP, &map);
    let mut root = [0; 36];
    mem.read(rsdp, &mut root).ok_or("there is no room for the ACPI tables")?;
    tag(&mut info, info_tag::ACPI_OLD, &root[..20]);
    tag(&mut info, info_tag::ACPI_NEW, &root);
    tag(&mut info, 0, &[]);
    let len = info.len() as u32;
    info[..4].copy_from_slice(&len.to_le_bytes());
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::Ram;

    /// A header of tags at offset 0x40 of an image that is loaded at 1 MiB.
    fn image(tags: &[(u16, u16, &[u32])]) -> Vec<u8> {
        let mut body = Vec::new();
        for (kind, flags, words) in tags {
            body.extend([kind.to_le_bytes(), flags.to_le_bytes()].concat());
            body.extend((8 + 4 * words.len() as u32).to_le_bytes());
            body.extend(words.iter().flat_map(|w| w.to_le_bytes()));
            body.resize(body.len().next_multiple_of(8), 0);
        }
        body.extend([0, 0, 0, 0, 8, 0, 0, 0]);
        let len = 16 + body.len() as u32;
        let mut out = vec![0x90; 0x40];
        let sum = 0u32.wrapping_sub(HEADER_MAGIC.wrapping_add(len));
        out.extend([HEADER_MAGIC, 0, len, sum].iter().flat_map(|w| w.to_le_bytes()));
        out.extend(body);
        out
    }

    fn load_it(image: &[u8]) -> Result<(GuestMemory, CpuState), String> {
        let mem = GuestMemory::Ram(Ram::new(4 << 20).expect("RAM"));
        let mut cpu = CpuState::reset();
        let payload =
            Payload { kernel: image, command_line: "a b", initrd: Some(("m", b"module")), ..Payload::default() };
        load(&mem, &mut cpu, &payload, 0xe_0000)?;
        Ok((mem, cpu))
    }

    const PLACE: &[u32] = &[0x10_0040, 0x10_0000, 0, 0x10_3000];

    #[test]
    fn an_image_by_its_addresses() {
        let image = image(&[(2, 0, PLACE), (3, 0, &[0x10_0010]), (1, 0, &[1, 3, 6, 15]), (5, 1, &[80, 25, 0])]);
        let (mem, cpu) = load_it(&image).expect("loads");
        assert_eq!((cpu.rip, cpu.gpr[0], cpu.gpr[3]), (0x10_0010, LOADER_MAGIC, INFO));
        let mut there = vec![0; image.len()];
        mem.read(0x10_0000, &mut there).expect("RAM");
        assert_eq!(there, image);
        let mut info = vec![0; 0x200];
        mem.read(INFO, &mut info).expect("RAM");
        // The first tag is the command line of 4 bytes; the third the module at the first page after the zeroed memory.
        assert_eq!(info[8..20], [1, 0, 0, 0, 12, 0, 0, 0, b'a', b' ', b'b', 0]);
        assert_eq!(info[40..58], [3, 0, 0, 0, 18, 0, 0, 0, 0, 0x30, 0x10, 0, 6, 0x30, 0x10, 0, b'm', 0]);
        let mut module = [0; 6];
        mem.read(0x10_3000, &mut module).expect("RAM");
        assert_eq!(&module, b"module");
    }

    #[test]
    fn wishes_that_cannot_be_met_are_said() {
        let fails = |tags: &[(u16, u16, &[u32])], words: &str| {
            let error = load_it(&image(tags)).err().expect("fails");
            assert!(error.contains(words), "{error}");
        };
        fails(&[(1, 0, &[8])], "information that is not there: tag 8");
        fails(&[(5, 0, &[80, 25, 0])], "what is not there: tag 5");
        fails(&[(2, 0, PLACE)], "no entry point");
        fails(&[(2, 0, &[0x10_0000, 0x10_0040, 0, 0]), (3, 0, &[0])], "make no sense");
        fails(&[(2, 0, &[0x10_0040, 0x10_0000, 0x20_0000, 0]), (3, 0, &[0])], "cut off");
        fails(&[], "ELF");
    }
}
