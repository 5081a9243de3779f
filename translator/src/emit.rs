//! What host code is assembled with: a buffer for dynasm, and the places in the thread block that generated code uses.

use bivisor_emulator::host::thread::{ENGINE_AREA_OFFSET, SCRATCH_OFFSET};
use dynasmrt::{AssemblyOffset, DynasmApi};

/// The scratch slots of the thread block (`gs:[64 + 8 * i]`) by use.
pub mod slot {
    /// Address of the guest's `CpuState`.
    pub const CPU: usize = 0;
    /// The host's RSP while guest code runs.
    pub const HOST_RSP: usize = 1;
    /// The guest's R10 where it is not in R10: see [`crate::marks::homed`].
    pub const R10: usize = 2;
    /// The guest's R11 where it is not in R11.
    pub const R11: usize = 3;
    /// The guest's value of a register used as scratch inside one instruction.
    pub const TMP: usize = 4;
    /// The guest's RBX on the way out.
    pub const RBX: usize = 5;
    /// Why the cache was left: an exit number or one of [`crate::enter`]'s codes.
    pub const EXIT: usize = 6;
    /// The target of the last indirect branch.
    pub const TARGET: usize = 7;
    /// Where to go in.
    pub const ENTRY: usize = 8;
    /// Address of the kicker's flag.
    pub const KICK: usize = 9;
    /// Address of the way out.
    pub const LEAVE: usize = 10;
    /// What the host CPU has: see [`crate::enter`].
    pub const HOST_FLAGS: usize = 11;
    /// State components to save and restore.
    pub const COMPONENTS: usize = 12;
    /// First address of the code cache this thread is in; 0 outside.
    pub const CACHE_START: usize = 13;
    /// Its end.
    pub const CACHE_END: usize = 14;
    /// Host PC at which a signal found the guest.
    pub const PC: usize = 15;
    /// Trap number of the host's exception, or [`super::NO_TRAP`] for an asynchronous signal.
    pub const TRAP: usize = 16;
    /// Its error code.
    pub const ERROR: usize = 17;
    /// Its CR2.
    pub const CR2: usize = 18;
    /// MXCSR for Rust code.
    pub const MXCSR: usize = 19;
    /// Which cache's table is mapped in the engine area.
    pub const AREA_OWNER: usize = 20;
    /// Offset of K0 in the XSAVE image.
    pub const OPMASK_AT: usize = 35;
    /// Offset of ZMM16 in the XSAVE image.
    pub const HI16_AT: usize = 34;
    /// What [`EXIT`] held when a signal found the guest.
    pub const PENDING: usize = 21;
    /// The number of the last system call tried in the cache.
    pub const NUMBER: usize = 22;
    /// Address of a table by number: 0 if that system call can be carried out in the cache.
    pub const DIRECT: usize = 23;
    /// System calls carried out in the cache.
    pub const CALLS: usize = 24;
    /// RIP after a system call carried out in the cache that ended with EINTR or EFAULT and was the last thing done; else 0.
    pub const MADE: usize = 25;
    /// [`crate::lower::ADDRESS_BITS`], for PEXT.
    pub const ADDRESS_BITS: usize = 26;
    /// Not 0 if the clock has ticked for traces.
    pub const TICK: usize = 27;
    /// System mode: not 0 if somebody wants the code to be left.
    pub const LOOK: usize = 40;
}

/// In [`slot::AREA_OWNER`]: the first of those that use all of the area.
pub const ALL_OF_IT: u64 = 1 << 63;

/// In [`slot::TRAP`]: not an exception.
pub const NO_TRAP: u64 = u64::MAX;

/// Offset of a slot from GS base.
pub const fn gs(slot: usize) -> i32 {
    SCRATCH_OFFSET + 8 * slot as i32
}

/// Offset of the branch target table from GS base.
pub const TABLE: i32 = ENGINE_AREA_OFFSET as i32;

/// A growing piece of host code that will lie at `base`.
#[derive(Debug, Default)]
pub struct Emitter {
    /// The code so far.
    pub bytes: Vec<u8>,
    /// Host address of its first byte.
    pub base: u64,
}

impl Emitter {
    /// Nothing yet, to lie at `base`.
    pub fn new(base: u64) -> Emitter {
        Emitter { bytes: Vec::with_capacity(512), base }
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Is there no code yet?
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Host address of the next byte.
    pub fn here(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    /// Puts a 32-bit displacement to `target` at `at`, relative to the byte after it.
    pub fn set_rel32(&mut self, at: usize, target: u64) {
        let from = self.base + at as u64 + 4;
        self.set_u32(at, target.wrapping_sub(from) as u32);
    }

    /// Overwrites four bytes.
    pub fn set_u32(&mut self, at: usize, v: u32) {
        self.bytes[at..at + 4].copy_from_slice(&v.to_le_bytes());
    }

    /// Pads with NOPs until a 4-byte field that comes `ahead` bytes from here does not cross a cache line: it can then be patched
    /// while other threads execute it.
    pub fn align_patch(&mut self, ahead: usize) {
        let pad = (4 - (self.here() + ahead as u64) % 64 % 4) % 4;
        if (self.here() + ahead as u64) % 64 > 60 {
            self.nops(pad as usize);
        }
    }

    /// NOPs of that many bytes together (SDM 2B NOP).
    pub fn nops(&mut self, mut n: usize) {
        const NOPS: [&[u8]; 10] = [
            &[],
            &[0x90],
            &[0x66, 0x90],
            &[0x0f, 0x1f, 0x00],
            &[0x0f, 0x1f, 0x40, 0x00],
            &[0x0f, 0x1f, 0x44, 0x00, 0x00],
            &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
            &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
            &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
            &[0x66, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
        ];
        while n > 0 {
            let now = n.min(9);
            self.bytes.extend_from_slice(NOPS[now]);
            n -= now;
        }
    }
}

impl DynasmApi for Emitter {
    fn offset(&self) -> AssemblyOffset {
        AssemblyOffset(self.bytes.len())
    }
    fn push(&mut self, byte: u8) {
        self.bytes.push(byte);
    }
    fn align(&mut self, alignment: usize, with: u8) {
        while !self.here().is_multiple_of(alignment as u64) {
            self.bytes.push(with);
        }
    }
}

impl Extend<u8> for Emitter {
    fn extend<T: IntoIterator<Item = u8>>(&mut self, iter: T) {
        self.bytes.extend(iter);
    }
}

impl<'a> Extend<&'a u8> for Emitter {
    fn extend<T: IntoIterator<Item = &'a u8>>(&mut self, iter: T) {
        self.bytes.extend(iter);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patch_fields_never_cross_a_cache_line() {
        for start in 0..64 {
            for ahead in 0..12 {
                let mut e = Emitter::new(0x1000 + start);
                e.align_patch(ahead);
                let field = e.here() + ahead as u64;
                assert_eq!(field / 64, (field + 3) / 64, "start {start}, ahead {ahead}");
            }
        }
    }
}
