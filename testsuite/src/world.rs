//! The small world a case runs in: where code, data and stack lie, what is before the instruction and what after it.
//!
//! | linear | what |
//! | --- | --- |
//! | [`DATA`] | two pages, readable and writable |
//! | [`HOLE`] | nothing mapped |
//! | [`ROM`] | one page, readable |
//! | [`CODE`] | the instruction |
//! | [`STACK`] | two pages, readable and writable; rSP is in their middle |
//!
//! 64- and 32-bit code runs at CPL 3 with flat segments and these pages mapped; 16-bit code in real mode with DS, ES, SS and CS based
//! at DATA, DATA, STACK and CODE.
#![allow(unsafe_code)]

use bivisor_emulator::cpu::{CpuState, Fault, Segment};
use bivisor_emulator::isa::{Gpr, Seg, Width};
use bivisor_emulator::mem::{FlatSpace, GuestMemory, Prot, Ram, Vma};
use std::sync::OnceLock;

/// Two pages of data.
pub const DATA: u64 = 0x1_0000;
/// Unmapped.
pub const HOLE: u64 = 0x1_2000;
/// A read-only page.
pub const ROM: u64 = 0x1_4000;
/// Where the code is.
pub const CODE: u64 = 0x2_0000;
/// Two pages of stack.
pub const STACK: u64 = 0x3_0000;
/// Page tables, in RAM only.
const TABLES: u64 = 0x4_0000;

/// Start and length of what holds data.
pub const REGIONS: [(u64, usize); 3] = [(DATA, 0x2000), (ROM, 0x1000), (STACK, 0x2000)];

/// Of its own half of the address space Linux says that a page is there; behind page tables of our own none is.
pub fn without_kernel(fault: Fault) -> Fault {
    match fault {
        Fault::Pf { addr, code } if addr >= 0x7fff_ffff_f000 => Fault::Pf { addr, code: code & !1 },
        other => other,
    }
}

/// The contents of the [`REGIONS`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image([Vec<u8>; 3]);

impl Default for Image {
    fn default() -> Image {
        // Not zero: a wrong read shows.
        Image(REGIONS.map(|(start, len)| (0..len).map(|i| (start >> 12) as u8 ^ (i as u8).wrapping_mul(7)).collect()))
    }
}

impl Image {
    fn bytes(&mut self, addr: u64, len: usize) -> Option<&mut [u8]> {
        let i = REGIONS.iter().position(|(start, size)| (*start..*start + *size as u64).contains(&addr))?;
        let at = (addr - REGIONS[i].0) as usize;
        self.0[i].get_mut(at..at + len)
    }

    /// Puts the low `len` bytes of a value; false if it does not lie inside a region.
    pub fn put(&mut self, addr: u64, len: usize, v: u64) -> bool {
        self.bytes(addr, len).map(|b| b.copy_from_slice(&v.to_le_bytes()[..len])).is_some()
    }

    /// Where two images differ: address, mine, theirs.
    pub fn difference(&self, other: &Image) -> Option<(u64, u8, u8)> {
        let pairs = self.0.iter().zip(&other.0).zip(REGIONS);
        pairs
            .flat_map(|((a, b), (start, _))| {
                a.iter()
                    .zip(b)
                    .enumerate()
                    .filter(|(_, (x, y))| x != y)
                    .map(move |(i, (x, y))| (start + i as u64, *x, *y))
            })
            .next()
    }
}

/// Before the instruction.
#[derive(Clone, Debug)]
pub struct Setup {
    /// 16, 32 or 64.
    pub bitness: u32,
    /// The instruction's bytes, or those of several.
    pub code: Vec<u8>,
    /// How many instructions.
    pub count: u64,
    /// Registers in encoding order.
    pub gpr: [u64; 16],
    /// Flags.
    pub rflags: u64,
    /// Memory.
    pub image: Image,
}

/// After it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The exception, if there was one; the rest is the state at it.
    pub fault: Option<Fault>,
    /// Registers.
    pub gpr: [u64; 16],
    /// Flags.
    pub rflags: u64,
    /// How far RIP moved; `None` if the engine cannot say.
    pub advance: Option<u64>,
    /// Memory.
    pub image: Image,
    /// What else changed, in words; empty if nothing did.
    pub other: String,
}

impl Setup {
    /// The registers for an engine.
    pub fn state(&self) -> CpuState {
        let mut s = match self.bitness {
            16 => {
                let mut s = CpuState::reset();
                s.seg = [Segment::real((DATA >> 4) as u16); 6];
                s.seg[Seg::Cs as usize] = Segment::real((CODE >> 4) as u16);
                s.seg[Seg::Ss as usize] = Segment::real((STACK >> 4) as u16);
                s.rip = 0;
                s
            }
            bitness => {
                let mut s = CpuState::long64(3);
                if bitness == 32 {
                    s.seg = [Segment::data32(0x2b, 3); 6];
                    s.seg[Seg::Cs as usize] = Segment::code32(0x23, 3);
                }
                s.cr3 = TABLES;
                s.rip = CODE;
                s
            }
        };
        s.gpr = self.gpr;
        s.rflags = bivisor_emulator::cpu::Rflags::from_bits_retain(self.rflags);
        s
    }

    /// The flags besides those of a case: a process has interrupts enabled and cannot do otherwise.
    pub fn default_flags(bitness: u32) -> u64 {
        use bivisor_emulator::cpu::Rflags;
        (if bitness == 16 { Rflags::FIXED } else { Rflags::FIXED | Rflags::IF }).bits()
    }

    /// The start value of a register that the case does not name: every byte is different from the other registers'.
    pub fn default_register(bitness: u32, r: Gpr) -> u64 {
        if r == Gpr::Rsp {
            return if bitness == 16 { 0x1000 } else { STACK + 0x1000 };
        }
        let v = 0x8182_8384_8586_8780 + 0x0101_0101_0101_0101 * (r as u64) * 8;
        if bitness == 64 { v } else { v & 0xffff_ffff }
    }
}

/// RAM with page tables, and the case's code and data.
pub fn ram() -> GuestMemory {
    let mem = GuestMemory::Ram(Ram::new(1 << 20).expect("a mebibyte"));
    const PRESENT: u64 = 1;
    const WRITABLE: u64 = 2;
    const USER: u64 = 4;
    // Accessed and dirty already: they are not what is tested.
    const USED: u64 = 0x60;
    for level in 0..3 {
        let table = TABLES + level * 0x1000;
        mem.store(table, Width::Q, (table + 0x1000) | PRESENT | WRITABLE | USER | USED).expect("inside RAM");
    }
    for (start, len) in pages() {
        let rights = PRESENT | USER | USED | if start == ROM { 0 } else { WRITABLE };
        for page in (start..start + len as u64).step_by(0x1000) {
            mem.store(TABLES + 0x3000 + (page >> 12) * 8, Width::Q, page | rights).expect("inside RAM");
        }
    }
    mem
}

/// The same pages at the same addresses of this process; `None` if the host has something there or refuses. They are mapped at the
/// first call and stay, the same for all: one test of a program at a time.
pub fn flat() -> Option<GuestMemory> {
    static MAPPED: OnceLock<bool> = OnceLock::new();
    let mapped = *MAPPED.get_or_init(|| pages().all(|(start, len)| map(start, len)));
    if !mapped {
        return None;
    }
    let space = FlatSpace::new();
    for (start, len) in pages() {
        let prot = match start {
            ROM => Prot::READ,
            CODE => Prot::READ | Prot::EXEC,
            _ => Prot::READ | Prot::WRITE,
        };
        let end = start + len as u64;
        space.insert(Vma { start, end, prot, shared: false, name: "".into(), offset: 0, backing: None });
    }
    Some(GuestMemory::Flat(space))
}

fn pages() -> impl Iterator<Item = (u64, usize)> {
    REGIONS.into_iter().chain([(CODE, 0x1000)])
}

fn map(start: u64, len: usize) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: MAP_FIXED_NOREPLACE takes nothing away from anybody.
    let p = unsafe { libc::mmap(start as *mut _, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    p as u64 == start
}

/// Puts code and data where the instruction will find them.
pub fn fill(mem: &GuestMemory, setup: &Setup) {
    let flat = mem.flat().is_some();
    let protect = |start: u64, len: usize, prot: i32| {
        if flat {
            // SAFETY: the range was mapped by `flat` for this.
            unsafe { libc::mprotect(start as *mut _, len, prot) };
        }
    };
    for ((start, len), bytes) in REGIONS.into_iter().zip(&setup.image.0) {
        protect(start, len, libc::PROT_READ | libc::PROT_WRITE);
        mem.write(start, bytes).expect("mapped");
        if start == ROM {
            protect(start, len, libc::PROT_READ);
        }
    }
    protect(CODE, 0x1000, libc::PROT_READ | libc::PROT_WRITE);
    let mut code = [0xcc; 0x1000];
    code[..setup.code.len()].copy_from_slice(&setup.code);
    mem.write(CODE, &code).expect("mapped");
    if let Some(space) = mem.flat() {
        // As a process's mprotect does: cached code is stale.
        space.protect(CODE..CODE + 0x1000, Prot::READ | Prot::EXEC);
    }
    protect(CODE, 0x1000, libc::PROT_READ);
}

/// What the data regions hold now.
pub fn image(mem: &GuestMemory) -> Image {
    Image(REGIONS.map(|(start, len)| {
        let mut bytes = vec![0; len];
        mem.read(start, &mut bytes).expect("mapped");
        bytes
    }))
}
