//! Memory that generated code of the system mode reaches through GS: slots, the inline TLB, the map of code pages, the cache of
//! branch targets.
//!
//! It is mapped twice: once for Rust, once behind the thread block of the thread that runs the virtual CPU.
#![allow(unsafe_code)]

use crate::emit::{ALL_OF_IT, slot};
use crate::system::mirror::{SLOTS, USUAL};
use bivisor_emulator::host::thread::{ENGINE_AREA_OFFSET, ENGINE_AREA_SIZE, ENGINE_CHECKS_SIZE, ThreadBlock};
use std::io::{Error, Result};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Offsets in the area.
pub mod at {
    /// Host minus guest address by bits 39 to 46 of that: see [`super::super::mirror`].
    pub const DELTAS: usize = 0;
    /// The map of code pages: a 32-bit number each.
    pub const CELLS: usize = 0xc000;
    /// The slots.
    pub const SLOTS: usize = 0xe000;
    /// The guest's values of borrowed registers, by register.
    pub const SPILL: usize = SLOTS;
    /// The guest's status flags: AH as LAHF gives it, AL the overflow flag.
    pub const STATUS: usize = SLOTS + 0x80;
    /// Why the code was left: a number of an exit or a code of [`super::super::enter`].
    pub const EXIT: usize = SLOTS + 0x88;
    /// Where an indirect branch goes: host address.
    pub const TARGET: usize = SLOTS + 0x90;
    /// A value for one instruction.
    pub const TEMP: usize = SLOTS + 0x98;
    /// FS base.
    pub const FS_BASE: usize = SLOTS + 0xa0;
    /// GS base.
    pub const GS_BASE: usize = SLOTS + 0xa8;
    /// RFLAGS but for the status flags and IF.
    pub const FLAGS: usize = SLOTS + 0xb0;
    /// RFLAGS.IF in its place.
    pub const INTERRUPTS: usize = SLOTS + 0x118;
    /// RFLAGS.IF in its place if an interrupt waits for it, else 0.
    pub const PENDING: usize = SLOTS + 0xb8;
    /// The host's RSP.
    pub const HOST_RSP: usize = SLOTS + 0xc0;
    /// Address of the `CpuState`.
    pub const CPU: usize = SLOTS + 0xc8;
    /// The status flags on the way out.
    pub const EXIT_STATUS: usize = SLOTS + 0xd0;
    /// Where to go in.
    pub const ENTRY: usize = SLOTS + 0xd8;
    /// RBX on the way out.
    pub const RBX: usize = SLOTS + 0xe0;
    /// Where the vector registers are: 0 in the XSAVE image, 1 in [`VECTORS`] and
    /// the host's registers; 2 the same, and MXCSR is the guest's.
    pub const VECTORS_AT: usize = SLOTS + 0xe8;
    /// The guest's MXCSR, if not in the image.
    pub const GUEST_MXCSR: usize = SLOTS + 0xf0;
    /// MXCSR of Rust code.
    pub const HOST_MXCSR: usize = SLOTS + 0xf8;
    /// State components of the host.
    pub const COMPONENTS: usize = SLOTS + 0x100;
    /// What the host CPU has: see [`super::super::enter`].
    pub const HOST_FLAGS: usize = SLOTS + 0x108;
    /// The other GS base.
    pub const KERNEL_GS_BASE: usize = SLOTS + 0x120;
    /// Not 0: components above XMM may be in use.
    pub const UPPER: usize = SLOTS + 0x128;
    /// How the status flags are told if they are not in their slot: number of a recipe, or 0.
    pub const RECIPE: usize = SLOTS + 0x130;
    /// CR8, if it is known; the bus is told when the code is left.
    pub const CR8: usize = SLOTS + 0x140;
    /// What the bus was told last; all ones if that is not known.
    pub const CR8_BUS: usize = SLOTS + 0x148;
    /// Was the light way out taken?
    pub const LIGHT: usize = SLOTS + 0x138;
    /// Not 0: translated code was entered without the vector registers, which stay where they are.
    pub const ASLEEP: usize = SLOTS + 0x150;
    /// Registers that a call of Rust may change, by number, while a device is called.
    pub const CALLER: usize = SLOTS + 0x158;
    /// What is called for a device.
    pub const CALL: usize = SLOTS + 0x1b8;
    /// Linear address of the GDT.
    pub const GDT: usize = SLOTS + 0x350;
    /// The last selector that is wholly inside, or 0.
    pub const GDT_LAST: usize = SLOTS + 0x358;
    /// Was the device called, where the code was left for one?
    pub const CALLED: usize = SLOTS + 0x348;
    /// Where SYSCALL goes: host address, or 0.
    pub const SYSCALL: usize = SLOTS + 0x1c0;
    /// What it keeps of RFLAGS.
    pub const SYSCALL_KEEP: usize = SLOTS + 0x1c8;
    /// CS and SS after it.
    pub const SYSCALL_SEGMENTS: usize = SLOTS + 0x1d0;
    /// The cache of branch targets of where SYSRET goes, as an offset, or 0.
    pub const SYSRET: usize = SLOTS + 0x300;
    /// Flags that it may not set.
    pub const SYSRET_FORBIDDEN: usize = SLOTS + 0x308;
    /// What [`ASLEEP`] must be there.
    pub const SYSRET_ASLEEP: usize = SLOTS + 0x310;
    /// CS and SS after it.
    pub const SYSRET_SEGMENTS: usize = SLOTS + 0x318;
    /// The bits of an address that choose its entry in a fast table: see [`FAST`].
    pub const TARGET_BITS: usize = SLOTS + 0x3c0;
    /// Where the indirect branch of code goes that is to be left: host address.
    pub const LOOKED: usize = SLOTS + 0x3c8;
    /// The offset that the last x87 instruction of 32-bit code with a memory operand accessed since the image was up to date, or all ones.
    pub const X87_DATA: usize = SLOTS + 0x3d0;
    /// The cache of branch targets of where IRETQ goes, as an offset, or 0.
    pub const IRET: usize = SLOTS + 0x400;
    /// Flags that it may not set.
    pub const IRET_FORBIDDEN: usize = SLOTS + 0x408;
    /// The selectors of CS and SS that it must find in its frame.
    pub const IRET_CS: usize = SLOTS + 0x410;
    /// See [`IRET_CS`].
    pub const IRET_SS: usize = SLOTS + 0x418;
    /// Linear address of the two descriptors, SS's before CS's.
    pub const IRET_GDT: usize = SLOTS + 0x420;
    /// What must be there.
    pub const IRET_DESCRIPTORS: usize = SLOTS + 0x428;
    /// CS and SS after it.
    pub const IRET_SEGMENTS: usize = SLOTS + 0x438;
    /// FS base of translated code: host minus guest address of the usual slots of the mirror, or 0.
    pub const DISTANCE: usize = SLOTS + 0x3d8;
    /// Not 0: the code that runs has it. A kernel without the vector registers has no use for it, and keeps that of Rust.
    pub const OWN_FS: usize = SLOTS + 0x478;
    /// Not 0: ZMM16 to ZMM31 and the opmask registers are in [`HIGH`] and [`MASKS`] where XMM0 to XMM15 are in [`VECTORS`], and all above
    /// these is 0.
    pub const IS_WIDE: usize = SLOTS + 0x470;
    /// May XSAVE and XRSTOR be done in the cache: bits that `xsave.rs` names.
    pub const IMAGE: usize = SLOTS + 0x480;
    /// Host address of the image they are about.
    pub const IMAGE_FIRST: usize = SLOTS + 0x488;
    /// Host address of the image if all of it were where its last page is.
    pub const IMAGE_SECOND: usize = SLOTS + 0x490;
    /// Where the code goes on if they must be left to the interpreter: host address.
    pub const IMAGE_SLOW: usize = SLOTS + 0x498;
    /// Bytes of an image of all components behind its header.
    pub const IMAGE_REST: usize = SLOTS + 0x4a0;
    /// What XSAVE writes but for its header: offset and length, until a length of 0.
    pub const IMAGE_RUNS: usize = SLOTS + 0x4a8;
    /// The components that are not in use if they are all zeros: bit; offset, and that of the end.
    pub const IMAGE_PARTS: usize = SLOTS + 0x4d8;
    /// Where XSAVE writes to and XRSTOR reads from.
    pub const BOUNCE: usize = SLOTS + 0xc40;
    /// What user code asks `walk.rs` for: linear address, and the address of the rest.
    pub const WALK_ADDRESS: usize = SLOTS + 0x510;
    /// See [`WALK_ADDRESS`].
    pub const WALK_WANTED: usize = SLOTS + 0x518;
    /// Where it goes on if that is not found: host address.
    pub const WALK_SLOW: usize = SLOTS + 0x520;
    /// Guest-physical address of the highest table.
    pub const WALK_ROOT: usize = SLOTS + 0x528;
    /// Host address of guest RAM.
    pub const WALK_RAM: usize = SLOTS + 0x530;
    /// Where its part from address 0 ends.
    pub const WALK_LOW: usize = SLOTS + 0x538;
    /// Host address of [`bivisor_emulator::mem::Ram::generations`].
    pub const WALK_PAGES: usize = SLOTS + 0x540;
    /// Walks until the next time that the code is left for one; 0: it may not walk.
    pub const WALKS_LEFT: usize = SLOTS + 0x548;
    /// Walks that found what they looked for.
    pub const WALKED: usize = SLOTS + 0x550;
    /// Looks at the TLB that found the page, if they are counted.
    pub const HITS: usize = SLOTS + 0x560;
    /// Entries of the TLB that they filled: how many, and the 16-bit numbers of them.
    pub const FILLED: usize = SLOTS + 0x558;
    /// See [`FILLED`].
    pub const FILLED_LIST: usize = SLOTS + 0x1c00;
    /// ZMM16 to ZMM31.
    pub const HIGH: usize = SLOTS + 0x800;
    /// K0 to K7.
    pub const MASKS: usize = SLOTS + 0xc00;
    /// TSC offset.
    pub const TSC_OFFSET: usize = SLOTS + 0x110;
    /// XMM0 to XMM15.
    pub const VECTORS: usize = SLOTS + 0x200;
    /// Caches of branch targets, one for each mode.
    pub const TARGETS: usize = 0x10000;
    /// The inline TLBs: see [`super::super::tlb`].
    pub const TLB: usize = TARGETS + super::TABLES * super::TABLE_SIZE;
    /// Fast tables of branch targets, one for each of few modes that use the mirror. The first half of a table has 1 minus the guest
    /// address, the second the host address; all of it holds only as long as mappings stay as they are.
    pub const FAST: usize = TLB + crate::system::tlb::CONTEXTS * crate::system::tlb::TABLE;
}

/// Offset of a readable page behind the area among others that are not. Generated code that takes a slot of the mirror for granted reads
/// there, further by a page for each slot that the address is away from it ([`crate::system::mirror`]).
pub const CHECKED: usize = ENGINE_AREA_SIZE + 4096 * (SLOTS - 1);
/// Offset of a page for each slot, of which those of the usual ones are readable: what else bits 32 to 47 of an address lead to is not.
pub const USUALLY: usize = CHECKED + 4096 * 2 * SLOTS;
const _: () = assert!(USUALLY + 4096 * 2 * SLOTS <= ENGINE_AREA_SIZE + ENGINE_CHECKS_SIZE);

/// Entries of the map of code pages.
pub const CELLS: usize = 2048;
/// Caches of branch targets.
pub const TABLES: usize = 12;
/// Entries of each; 16 bytes: guest address, host address. Two of a kernel's thousand usual targets in one entry cost more than the memory.
pub const TARGETS: usize = 32768;
/// Bytes of each.
pub const TABLE_SIZE: usize = TARGETS * 16;
const _: () = assert!(at::IRET_SEGMENTS + 48 <= at::IS_WIDE);
const _: () = assert!(at::CELLS + 4 * CELLS <= at::SLOTS);
const _: () = assert!(at::SYSCALL_SEGMENTS + 48 <= at::VECTORS && at::VECTORS + 256 <= at::SYSRET);
const _: () = assert!(size_of::<bivisor_emulator::cpu::Segment>() == 24);

/// Fast tables.
pub const FAST_TABLES: usize = 2;
/// Entries of each.
pub const FAST_ENTRIES: usize = 8192;
/// Bytes of half a table.
pub const FAST_HALF: usize = 8 * FAST_ENTRIES;
const _: () = assert!(at::FAST + FAST_TABLES * 2 * FAST_HALF <= ENGINE_AREA_SIZE);

/// Which entry of a fast table is an address's.
pub const fn fast_entry(rip: u64) -> usize {
    rip as usize % FAST_ENTRIES
}

/// Factor of the hash of branch targets, as IMUL has it, and how far the product is moved: functions begin at multiples of 16.
pub const FACTOR: i32 = 0x9e37_79b1_u32 as i32;
/// See [`FACTOR`].
pub const MOVED: u8 = 20;
/// What is left of it: the offset of an entry.
pub const TARGET_MASK: i32 = ((TARGETS - 1) * 16) as i32;

/// Offset of an address in a cache of branch targets.
pub const fn target_at(rip: u64) -> usize {
    (rip.wrapping_mul(FACTOR as u64) >> MOVED) as usize & TARGET_MASK as usize
}

/// Offset from GS base of an offset in the area.
pub const fn gs(offset: usize) -> i32 {
    (ENGINE_AREA_OFFSET + offset) as i32
}

/// The area of one virtual CPU.
pub struct Area {
    /// Unlike any other's.
    id: u64,
    own: *mut u8,
    /// Where it is accessed: behind the thread block while it is mapped there, because the processor forwards a store to a load only under the
    /// same address.
    base: *mut u8,
}

// SAFETY: plain memory owned by this value, accessed as atomics.
unsafe impl Send for Area {}

impl Area {
    /// All zeros.
    ///
    /// # Errors
    /// The host's, if it has no memory.
    pub fn new() -> Result<Area> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), ENGINE_AREA_SIZE, prot, flags, -1, 0) };
        static AREAS: AtomicU64 = AtomicU64::new(ALL_OF_IT);
        if p == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        Ok(Area { id: AREAS.fetch_add(1, Ordering::Relaxed), own: p.cast(), base: p.cast() })
    }

    /// Maps it behind the calling thread's block.
    ///
    /// # Errors
    /// The host's.
    pub fn map(&mut self, block: &ThreadBlock) -> Result<()> {
        let to = (block.this as usize + ENGINE_AREA_OFFSET) as *mut libc::c_void;
        if block.scratch[slot::AREA_OWNER].get() == self.id {
            self.base = to.cast();
            return Ok(());
        }
        block.scratch[slot::AREA_OWNER].set(0);
        // SAFETY: the area behind the block is reserved for this. An old size of 0 makes a second mapping of a shared one (mremap(2)).
        let p = unsafe {
            libc::mremap(self.own.cast(), 0, ENGINE_AREA_SIZE, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to)
        };
        if p == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        self.base = p.cast();
        let usual = (0..SLOTS).filter(|n| USUAL >> n & 1 != 0).map(|n| USUALLY + 4096 * n);
        for page in usual.chain([CHECKED]) {
            let page = (block.this as usize + ENGINE_AREA_OFFSET + page) as *mut libc::c_void;
            // SAFETY: a page of the block's own mapping, in which there is nothing.
            if unsafe { libc::mprotect(page, 4096, libc::PROT_READ) } != 0 {
                return Err(Error::last_os_error());
            }
        }
        block.scratch[slot::AREA_OWNER].set(self.id);
        Ok(())
    }

    /// The thread may end, or another engine map its own there.
    pub fn unmap(&mut self) {
        self.base = self.own;
    }

    #[inline(always)]
    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset < ENGINE_AREA_SIZE, "no such word");
        // SAFETY: in range and aligned; the memory is only accessed as atomics and by generated code of the same thread.
        unsafe { &*self.base.add(offset).cast::<AtomicU64>() }
    }

    /// Reads eight bytes.
    #[inline(always)]
    pub fn get(&self, offset: usize) -> u64 {
        self.word(offset).load(Ordering::Relaxed)
    }

    /// Reads eight bytes and leaves 0 there.
    pub fn take(&self, offset: usize) -> u64 {
        let v = self.get(offset);
        self.set(offset, 0);
        v
    }

    /// Reads two bytes: generated code stores no more of the status flags.
    #[inline(always)]
    pub fn get_u16(&self, offset: usize) -> u64 {
        assert!(offset.is_multiple_of(2) && offset < ENGINE_AREA_SIZE, "no such word");
        // SAFETY: as for `word`.
        u64::from(unsafe { &*self.base.add(offset).cast::<AtomicU16>() }.load(Ordering::Relaxed))
    }

    /// Reads four bytes.
    #[inline(always)]
    pub fn get_u32(&self, offset: usize) -> u32 {
        assert!(offset.is_multiple_of(4) && offset < ENGINE_AREA_SIZE, "no such word");
        // SAFETY: as for `word`.
        unsafe { &*self.base.add(offset).cast::<AtomicU32>() }.load(Ordering::Relaxed)
    }

    /// Writes eight bytes.
    #[inline(always)]
    pub fn set(&self, offset: usize, v: u64) {
        self.word(offset).store(v, Ordering::Relaxed);
    }

    /// Writes four bytes.
    #[inline(always)]
    pub fn set_u32(&self, offset: usize, v: u32) {
        assert!(offset.is_multiple_of(4) && offset < ENGINE_AREA_SIZE, "no such word");
        // SAFETY: as for `word`.
        unsafe { &*self.base.add(offset).cast::<AtomicU32>() }.store(v, Ordering::Relaxed);
    }

    /// Fills a range of whole words with a byte.
    pub fn fill(&self, range: std::ops::Range<usize>, byte: u8) {
        assert!(range.start <= range.end && range.end <= ENGINE_AREA_SIZE, "outside of the area");
        // SAFETY: in range; no reference to it exists, and the thread that runs generated code is this one.
        unsafe { self.base.add(range.start).write_bytes(byte, range.len()) };
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the other one is the thread block's.
        unsafe { libc::munmap(self.own.cast(), ENGINE_AREA_SIZE) };
    }
}
