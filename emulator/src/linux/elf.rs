//! ELF files: what their headers say (System V ABI, chapter 4 and 5), and putting their segments into the address space.
//!
//! The headers are checked completely before anything is mapped, so that a truncated or corrupt file gives one clear line.

use crate::linux::mm::{Mapping, TASK_SIZE};
use crate::linux::{AddressSpace, LoadError, Why};
use crate::mem::PAGE_SIZE;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_PHDR: u32 = 6;
const PT_GNU_STACK: u32 = 0x6474_e551;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
const HEADER_SIZE: usize = 64;
const PHDR_SIZE: usize = 56;

/// A program header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Phdr {
    kind: u32,
    flags: u32,
    offset: u64,
    vaddr: u64,
    file_size: u64,
    mem_size: u64,
    align: u64,
}

/// A checked ELF file.
#[derive(Debug)]
pub struct Elf {
    entry: u64,
    /// ET_DYN: may be put anywhere.
    relocatable: bool,
    phdrs: Vec<Phdr>,
    phoff: u64,
    /// The program interpreter, ld.so.
    pub interpreter: Option<PathBuf>,
    /// PT_GNU_STACK asks for an executable stack.
    pub executable_stack: bool,
}

/// An ELF file in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Added to the addresses in the file.
    pub bias: u64,
    /// Where it starts.
    pub entry: u64,
    /// Address of the program headers, 0 if they are not in memory.
    pub phdr: u64,
    /// How many.
    pub phnum: u64,
    /// First address after the last segment: the heap's place.
    pub end: u64,
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from(u16_at(b, at)) | u32::from(u16_at(b, at + 2)) << 16
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

fn machine_name(machine: u16) -> String {
    match machine {
        3 => "32-bit x86 (i386)".into(),
        8 => "MIPS".into(),
        20 => "PowerPC".into(),
        21 => "64-bit PowerPC".into(),
        22 => "S/390".into(),
        40 => "32-bit ARM".into(),
        43 => "SPARC".into(),
        183 => "64-bit ARM (aarch64)".into(),
        243 => "RISC-V".into(),
        258 => "LoongArch".into(),
        n => format!("machine number {n}"),
    }
}

impl Elf {
    /// Reads and checks the headers.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn parse(path: &Path, file: &File) -> Result<Elf, LoadError> {
        let bad = |why: String| LoadError::new(path, Why::BadElf(why));
        let size = file.metadata().map_err(|e| LoadError::io(path, &e))?.len();
        let read = |offset: u64, len: usize| {
            let mut b = vec![0; len];
            file.read_exact_at(&mut b, offset).map(|()| b)
        };
        let truncated = |what: &str, end: u64| {
            bad(format!("the file is truncated: its {what} end at byte {end}, the file has {size}"))
        };
        let h = read(0, HEADER_SIZE).map_err(|_| truncated("ELF header", HEADER_SIZE as u64))?;
        let machine = u16_at(&h, 18);
        match (h[4], h[5]) {
            (2, 1) if machine == EM_X86_64 => {}
            (1 | 2, 1 | 2) => {
                let machine = if h[5] == 2 { machine.swap_bytes() } else { machine };
                let name = if machine == EM_X86_64 {
                    "x86-64 with 32-bit pointers (x32)".into()
                } else {
                    machine_name(machine)
                };
                return Err(LoadError::new(path, Why::WrongMachine(name)));
            }
            (class, data) => return Err(bad(format!("corrupt header: class {class}, byte order {data}"))),
        }
        let kind = u16_at(&h, 16);
        match kind {
            ET_EXEC | ET_DYN => {}
            1 => return Err(bad("it is an object file (.o): link it first".into())),
            4 => return Err(bad("it is a core dump, not a program".into())),
            n => return Err(bad(format!("corrupt header: type {n} is no program"))),
        }
        let (entry, phoff) = (u64_at(&h, 24), u64_at(&h, 32));
        let (phentsize, phnum) = (usize::from(u16_at(&h, 54)), usize::from(u16_at(&h, 56)));
        if phentsize != PHDR_SIZE || phnum == 0 || phnum * PHDR_SIZE > 65536 {
            return Err(bad(format!("corrupt header: {phnum} program headers of {phentsize} bytes")));
        }
        let table_end = phoff.checked_add((phnum * PHDR_SIZE) as u64).filter(|&end| end <= size);
        if table_end.is_none() {
            return Err(truncated("program headers", phoff.saturating_add((phnum * PHDR_SIZE) as u64)));
        }
        let table = read(phoff, phnum * PHDR_SIZE).map_err(|e| LoadError::io(path, &e))?;
        let phdrs: Vec<Phdr> = table
            .chunks(PHDR_SIZE)
            .map(|p| Phdr {
                kind: u32_at(p, 0),
                flags: u32_at(p, 4),
                offset: u64_at(p, 8),
                vaddr: u64_at(p, 16),
                file_size: u64_at(p, 32),
                mem_size: u64_at(p, 40),
                align: u64_at(p, 48),
            })
            .collect();
        let mut last = 0;
        for p in phdrs.iter().filter(|p| p.kind == PT_LOAD) {
            let ends = (p.offset.checked_add(p.file_size), p.vaddr.checked_add(p.mem_size).filter(|&e| e <= TASK_SIZE));
            let (Some(file_end), Some(end)) = ends else {
                return Err(bad(format!("corrupt program header: segment at {:#x} does not fit", p.vaddr)));
            };
            if p.file_size > p.mem_size || (p.vaddr ^ p.offset) & (PAGE_SIZE - 1) != 0 || p.vaddr < last {
                return Err(bad(format!("corrupt program header: segment at {:#x} contradicts itself", p.vaddr)));
            }
            if file_end > size {
                return Err(truncated("segments", file_end));
            }
            last = end;
        }
        if last == 0 {
            return Err(bad("it has nothing to load".into()));
        }
        let mut interpreter = None;
        if let Some(p) = phdrs.iter().find(|p| p.kind == PT_INTERP) {
            let name = (2..=4096).contains(&p.file_size).then(|| read(p.offset, p.file_size as usize));
            match name.and_then(Result::ok) {
                Some(b) if b.last() == Some(&0) => {
                    use std::os::unix::ffi::OsStrExt;
                    let b = b.split(|&c| c == 0).next().unwrap_or_default();
                    interpreter = Some(PathBuf::from(std::ffi::OsStr::from_bytes(b)));
                }
                _ => return Err(bad("corrupt program header: the name of its interpreter cannot be read".into())),
            }
        }
        let executable_stack = phdrs.iter().any(|p| p.kind == PT_GNU_STACK && p.flags & 1 != 0);
        Ok(Elf { entry, relocatable: kind == ET_DYN, phdrs, phoff, interpreter, executable_stack })
    }

    fn segments(&self) -> impl Iterator<Item = &Phdr> {
        self.phdrs.iter().filter(|p| p.kind == PT_LOAD)
    }

    /// Maps the segments. A position-independent file goes to `base` if that is free, else where the host puts it.
    ///
    /// # Errors
    /// The host cannot map it, or its addresses are taken by bivisor itself.
    pub fn load(&self, path: &Path, file: &File, space: &AddressSpace, base: Option<u64>) -> Result<Loaded, LoadError> {
        let page_down = |a: u64| a & !(PAGE_SIZE - 1);
        let first = page_down(self.segments().map(|p| p.vaddr).min().unwrap_or(0));
        let last = self.segments().map(|p| p.vaddr + p.mem_size).max().unwrap_or(0).next_multiple_of(PAGE_SIZE);
        let align = self.segments().map(|p| p.align).filter(|a| a.is_power_of_two()).max().unwrap_or(0).max(PAGE_SIZE);
        let start = self.reserve(path, space, first, last - first, align, base)?;
        let bias = start.wrapping_sub(first);
        let mut at = start;
        for p in self.segments() {
            let from = bias.wrapping_add(page_down(p.vaddr));
            let end = bias.wrapping_add(p.vaddr + p.mem_size).next_multiple_of(PAGE_SIZE);
            if from > at {
                space.unmap(at, from - at);
            }
            at = end;
            self.map_segment(path, file, space, p, bias)?;
        }
        let phdr = self.phdr_address().map_or(0, |a| bias.wrapping_add(a));
        let end = bias.wrapping_add(self.segments().map(|p| p.vaddr + p.mem_size).max().unwrap_or(0));
        Ok(Loaded { bias, entry: bias.wrapping_add(self.entry), phdr, phnum: self.phdrs.len() as u64, end })
    }

    /// Takes the whole span, so that the segments of one file lie together.
    fn reserve(
        &self,
        path: &Path,
        space: &AddressSpace,
        first: u64,
        len: u64,
        align: u64,
        base: Option<u64>,
    ) -> Result<u64, LoadError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let map = |addr: u64, len: u64, more: i32| {
            space.map(&Mapping { addr, len, prot: 0, flags: (flags | more) as u64, fd: -1, offset: 0, name: "" })
        };
        if !self.relocatable {
            let at = map(first, len, libc::MAP_FIXED_NOREPLACE);
            return match at as u64 == first {
                true => Ok(first),
                false => {
                    Err(LoadError::new(path, Why::AddressTaken { start: first, end: first + len, errno: -at as i32 }))
                }
            };
        }
        if let Some(base) = base.map(|b| b.next_multiple_of(align)) {
            let at = map(base, len, libc::MAP_FIXED_NOREPLACE);
            if at as u64 == base {
                return Ok(base);
            }
        }
        let room = len + align - PAGE_SIZE;
        let at = map(0, room, 0);
        if at < 0 {
            return Err(LoadError::new(path, Why::NoMemory { bytes: room, errno: -at as i32 }));
        }
        let (at, start) = (at as u64, (at as u64).next_multiple_of(align));
        for (from, to) in [(at, start), (start + len, at + room)] {
            if to > from {
                space.unmap(from, to - from);
            }
        }
        Ok(start)
    }

    fn map_segment(
        &self,
        path: &Path,
        file: &File,
        space: &AddressSpace,
        p: &Phdr,
        bias: u64,
    ) -> Result<(), LoadError> {
        let prot = [(4, libc::PROT_READ), (2, libc::PROT_WRITE), (1, libc::PROT_EXEC)];
        let prot = prot.iter().filter(|(f, _)| p.flags & f != 0).fold(0, |all, (_, bit)| all | bit) as u64;
        let map = |start: u64, end: u64, fd: i32, offset: u64| {
            let anonymous = if fd == -1 { libc::MAP_ANONYMOUS } else { 0 };
            let flags = (libc::MAP_PRIVATE | libc::MAP_FIXED | anonymous) as u64;
            let at = space.map(&Mapping { addr: start, len: end - start, prot, flags, fd, offset, name: "" });
            match at as u64 == start {
                true => Ok(()),
                false => Err(LoadError::new(path, Why::NoMemory { bytes: end - start, errno: -at as i32 })),
            }
        };
        let page_off = p.vaddr & (PAGE_SIZE - 1);
        let start = bias.wrapping_add(p.vaddr - page_off);
        let file_end = bias.wrapping_add(p.vaddr + p.file_size);
        let end = bias.wrapping_add(p.vaddr + p.mem_size).next_multiple_of(PAGE_SIZE);
        let mut bss = start;
        if p.file_size != 0 {
            bss = file_end.next_multiple_of(PAGE_SIZE);
            map(start, bss, file.as_raw_fd(), p.offset - page_off)?;
            // The rest of the last file page belongs to the BSS; where the segment is not writable nobody can have asked for zeros.
            if p.mem_size > p.file_size && p.flags & 2 != 0 && bss > file_end {
                let zeros = vec![0; (bss - file_end) as usize];
                if space.mem.write(file_end, &zeros).is_none() {
                    return Err(LoadError::new(path, Why::BadElf("its data segment cannot be written".into())));
                }
            }
        }
        if end > bss { map(bss, end, -1, 0) } else { Ok(()) }
    }

    fn phdr_address(&self) -> Option<u64> {
        let named = self.phdrs.iter().find(|p| p.kind == PT_PHDR).map(|p| p.vaddr);
        named.or_else(|| {
            let holds = |p: &&Phdr| p.offset <= self.phoff && self.phoff < p.offset + p.file_size;
            self.segments().find(holds).map(|p| self.phoff - p.offset + p.vaddr)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A program file with one segment, and room to spoil it.
    fn small() -> Vec<u8> {
        let mut f = vec![0; 0x200];
        f[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
        f[16..18].copy_from_slice(&ET_EXEC.to_le_bytes());
        f[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
        f[24..32].copy_from_slice(&0x40_0100u64.to_le_bytes());
        f[32..40].copy_from_slice(&64u64.to_le_bytes());
        f[54..56].copy_from_slice(&56u16.to_le_bytes());
        f[56..58].copy_from_slice(&1u16.to_le_bytes());
        f[64..68].copy_from_slice(&PT_LOAD.to_le_bytes());
        f[68..72].copy_from_slice(&5u32.to_le_bytes());
        f[80..88].copy_from_slice(&0x40_0000u64.to_le_bytes());
        f[96..104].copy_from_slice(&0x200u64.to_le_bytes());
        f[104..112].copy_from_slice(&0x3000u64.to_le_bytes());
        f[112..120].copy_from_slice(&0x1000u64.to_le_bytes());
        f
    }

    fn parse(bytes: &[u8]) -> Result<Elf, String> {
        let path =
            std::env::temp_dir().join(format!("bivisor-elf-{}-{:?}", std::process::id(), std::thread::current().id()));
        File::create(&path).unwrap().write_all(bytes).unwrap();
        let file = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        Elf::parse(Path::new("x"), &file).map_err(|e| e.to_string())
    }

    #[test]
    fn headers_that_are_wrong_are_refused_in_words() {
        let elf = parse(&small()).unwrap();
        assert_eq!((elf.entry, elf.phdr_address(), elf.interpreter), (0x40_0100, Some(0x40_0040), None));
        let cases: [(&str, usize, &[u8]); 11] = [
            ("is a program for 64-bit ARM", 18, &183u16.to_le_bytes()),
            ("is a program for 32-bit x86", 18, &3u16.to_le_bytes()),
            ("32-bit pointers", 4, &[1]),
            ("byte order 7", 5, &[7]),
            ("object file", 16, &1u16.to_le_bytes()),
            ("0 program headers", 56, &[0]),
            ("of 55 bytes", 54, &[55]),
            ("program headers end at byte 18446744073709551615", 32, &u64::MAX.to_le_bytes()),
            ("does not fit", 80, &0xffff_8000_0000_0000u64.to_le_bytes()),
            ("contradicts itself", 104, &1u64.to_le_bytes()),
            ("nothing to load", 64, &[9]),
        ];
        for (what, at, bytes) in cases {
            let mut f = small();
            f[at..at + bytes.len()].copy_from_slice(bytes);
            let said = parse(&f).expect_err(what);
            assert!(said.contains(what), "{said} / {what}");
        }
        for len in [5, 63, 64, 100, 119, 120, 0x1ff] {
            let said = parse(&small()[..len]).expect_err("cut off");
            assert!(said.contains("truncated"), "{len}: {said}");
        }
    }

    #[test]
    fn no_byte_of_the_headers_makes_the_parser_panic() {
        for at in 0..120 {
            for v in [0, 1, 0x7f, 0x80, 0xff] {
                let mut f = small();
                f[at] = v;
                let _ = parse(&f);
            }
        }
    }

    #[test]
    fn segments_and_bss_are_in_place() {
        let path = Path::new("/bin/true");
        let Ok(file) = File::open(path) else { return eprintln!("skipped: no /bin/true") };
        crate::host::signal::attach();
        let elf = Elf::parse(path, &file).unwrap();
        let space = AddressSpace::new();
        let loaded = elf.load(path, &file, &space, None).unwrap();
        for p in elf.segments() {
            let start = loaded.bias + p.vaddr;
            let vma = space.flat().find(start).unwrap();
            assert_eq!(
                vma.prot.bits(),
                [(4, 1), (2, 2), (1, 4)].iter().map(|(f, b)| if p.flags & f != 0 { *b } else { 0 }).sum::<i32>()
            );
            let (mut here, mut there) = (vec![1; p.file_size as usize], vec![2; p.file_size as usize]);
            space.mem.read(start, &mut here).unwrap();
            file.read_exact_at(&mut there, p.offset).unwrap();
            assert_eq!(here, there);
            let mut bss = vec![1; (p.mem_size - p.file_size) as usize];
            space.mem.read(start + p.file_size, &mut bss).unwrap();
            assert!(bss.iter().all(|&b| b == 0));
        }
        for v in space.flat().all() {
            space.unmap(v.start, v.end - v.start);
        }
    }
}
