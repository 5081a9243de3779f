//! What `boot` is given: mutated kernels (bzImage, ELF, multiboot 1 and 2) into the loaders, mutated qcow2 images opened, read and written.

use super::{Target, elf, hex, mutate, quietly};
use crate::guest;
use crate::random::Random;
use bivisor_emulator::cpu::CpuState;
use bivisor_emulator::devices::disk::{Disk, Options};
use bivisor_emulator::machine::boot::{self, Payload};
use bivisor_emulator::mem::{GuestMemory, Ram};
use std::path::PathBuf;

const MEMORY: u64 = 8 << 20;

/// See [`super::target`].
pub struct Kernels {
    mem: GuestMemory,
    seeds: Vec<Vec<u8>>,
}

impl Kernels {
    /// With a small kernel of each kind.
    ///
    /// # Errors
    /// There is no memory for a guest.
    pub fn new() -> Result<Kernels, String> {
        let mem = GuestMemory::Ram(Ram::new(MEMORY).map_err(|e| e.to_string())?);
        Ok(Kernels { mem, seeds: vec![bzimage(), multiboot(), multiboot2(), elf::tiny()] })
    }
}

impl Target for Kernels {
    fn one(&mut self, r: &mut Random) -> Result<(), String> {
        let n = r.below(self.seeds.len() as u64) as usize;
        let mut kernel = self.seeds[n].clone();
        // The code does not matter: what is read of a kernel is in front.
        let mut head: Vec<u8> = kernel.drain(..kernel.len().min(0x280)).collect();
        for _ in 0..r.below(4) {
            if r.once_in(2) {
                let at = (r.below(head.len().max(1) as u64) & !3) as usize;
                let v = if r.once_in(2) { r.edgy() } else { r.below(MEMORY * 2) };
                let len = r.one_of(&[1usize, 2, 4, 8]).min(head.len() - at);
                head[at..at + len].copy_from_slice(&v.to_le_bytes()[..len]);
            } else {
                mutate(r, &mut head);
            }
        }
        head.extend(kernel);
        if r.once_in(8) {
            head.truncate(r.below(head.len() as u64 + 1) as usize);
        }
        let initrd = vec![7; r.one_of(&[0, 1, 5000, MEMORY as usize])];
        let line = "x".repeat(r.one_of(&[0, 10, 255, 2048, 70_000]));
        let payload = Payload {
            name: "kernel",
            kernel: &head,
            initrd: (!r.once_in(3)).then_some(("initrd", &initrd)),
            command_line: &line,
            unpack: r.once_in(2),
        };
        let mut cpu = CpuState::reset();
        match quietly(|| boot::load(&self.mem, &mut cpu, &payload)) {
            Ok(Err(why)) if why.is_empty() || why.contains('\n') => Err(format!("not a line: {why:?}")),
            Ok(_) => Ok(()),
            Err(why) => Err(format!("{why}: [{}]", hex(&head[..head.len().min(0x300)]))),
        }
    }
}

/// Linux's header and a page of code.
fn bzimage() -> Vec<u8> {
    guest::bzimage(0x1400, &[(0x1f4, 0x100, 4), (0x214, 0x10_0000, 4), (0x236, 3, 2), (0x260, 0x20_0000, 4)])
}

/// A multiboot 1 header with addresses (0.6.96, 3.1.3), for an image of a page at 1 MiB.
fn multiboot() -> Vec<u8> {
    let (magic, flags) = (0x1bad_b002u32, 0x1_0003u32);
    let words = [magic, flags, magic.wrapping_add(flags).wrapping_neg(), 0x10_0000, 0x10_0000, 0x10_1000, 0x10_2000];
    let mut image: Vec<u8> = words.into_iter().chain([0x10_0020]).flat_map(u32::to_le_bytes).collect();
    image.resize(0x1000, 0xf4);
    image
}

/// A multiboot 2 header with the tags of address and entry (2.0, 3.1).
fn multiboot2() -> Vec<u8> {
    let (magic, length) = (0xe852_50d6u32, 64u32);
    let sum = magic.wrapping_add(length).wrapping_neg();
    let tags = [2, 24, 0x10_0000, 0x10_0000, 0x10_1000, 0x10_2000, 3, 12, 0x10_0040, 0, 0, 8];
    let mut image: Vec<u8> = [magic, 0, length, sum].into_iter().chain(tags).flat_map(u32::to_le_bytes).collect();
    image.resize(0x1000, 0xf4);
    image
}

/// See [`super::target`].
pub struct Images {
    file: PathBuf,
}

impl Images {
    /// Writes to the system's directory for such files.
    pub fn new() -> Images {
        Images { file: std::env::temp_dir().join(format!("bivisor-fuzz-{}.qcow2", std::process::id())) }
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

impl Target for Images {
    fn one(&mut self, r: &mut Random) -> Result<(), String> {
        let mut bytes = qcow2();
        for _ in 0..r.below(4) {
            // A word of the header or of a table.
            let room = if r.once_in(2) { 0x70 } else { bytes.len() as u64 - 8 };
            let at = (r.below(room) & !3) as usize;
            let v = match r.below(3) {
                0 => r.edgy(),
                1 => r.below(16) << 9 | r.below(4) << 62,
                _ => r.below(0x1000),
            };
            let len = r.one_of(&[4usize, 8]);
            bytes[at..at + len].copy_from_slice(&v.to_be_bytes()[8 - len..]);
        }
        if r.once_in(8) {
            bytes.truncate(r.below(bytes.len() as u64 + 1) as usize);
        }
        std::fs::write(&self.file, &bytes).map_err(|e| e.to_string())?;
        let options = Options { read_only: r.once_in(4), snapshot: r.once_in(4), no_flush: true, ..Options::default() };
        let used = quietly(|| {
            let Ok(mut disk) = Disk::open(&self.file, options) else { return };
            let mut buffer = [0x33; 2000];
            for _ in 0..r.below(20) {
                let at = if r.once_in(8) { r.edgy() } else { r.below(0x2400) };
                let part = &mut buffer[..r.one_of(&[0usize, 1, 512, 1024, 2000])];
                // An error is an answer too.
                let _ = if r.once_in(2) { disk.read(at, part) } else { disk.write(at, part) };
            }
            let _ = disk.flush();
        });
        used.map_err(|why| format!("{why}: [{}]", hex(&bytes)))
    }
}

/// A version-3 image of 16 clusters of 512 bytes, of which two are there: header, tables of the first and second level, counts.
fn qcow2() -> Vec<u8> {
    const CLUSTER: u64 = 512;
    let mut b = vec![0; 7 * CLUSTER as usize];
    let mut put =
        |at: u64, v: u64, n: usize| b[at as usize..at as usize + n].copy_from_slice(&v.to_be_bytes()[8 - n..]);
    for (at, v, n) in [
        (0, 0x5146_49fb, 4),
        (4, 3, 4),
        (20, 9, 4),
        (24, 16 * CLUSTER, 8),
        (36, 1, 4),
        (40, CLUSTER, 8),
        (48, 3 * CLUSTER, 8),
        (56, 1, 4),
        (96, 4, 4),
        (100, 104, 4),
        (CLUSTER, (1 << 63) | (2 * CLUSTER), 8),
        (2 * CLUSTER, (1 << 63) | (5 * CLUSTER), 8),
        (2 * CLUSTER + 8, (1 << 63) | (6 * CLUSTER), 8),
        (3 * CLUSTER, 4 * CLUSTER, 8),
    ] {
        put(at, v, n);
    }
    (0..7).for_each(|n| put(4 * CLUSTER + 2 * n, 1, 2));
    b
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is mutated is whole before: else no mutation would come far.
    #[test]
    fn the_seeds_are_what_they_say() {
        let kernels = Kernels::new().expect("memory");
        for (n, kernel) in kernels.seeds.iter().enumerate() {
            let payload = Payload { kernel, ..Payload::default() };
            boot::load(&kernels.mem, &mut CpuState::reset(), &payload).unwrap_or_else(|e| panic!("seed {n}: {e}"));
        }
        let images = Images::new();
        std::fs::write(&images.file, qcow2()).expect("written");
        let mut disk = Disk::open(&images.file, Options::default()).expect("an image");
        disk.write(100, &[1; 3000]).expect("written");
        let mut back = [0; 3000];
        disk.read(100, &mut back).expect("read");
        assert_eq!(back, [1; 3000]);
    }
}
