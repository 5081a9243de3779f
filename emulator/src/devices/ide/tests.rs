//! A host that programs a channel as drivers do, over a disk of 1 MiB.

use super::*;
use crate::devices::disk::Options;
use crate::mem::{GuestMemory, Ram};
use std::sync::atomic::{AtomicU32, Ordering};

const SIZE: usize = 1 << 20;

/// A channel with a drive over a file of pseudo-random bytes, which goes away with it.
struct Rig {
    channel: Channel,
    path: std::path::PathBuf,
    bytes: Vec<u8>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Rig {
    fn new(kind: Kind, read_only: bool) -> Rig {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("bivisor-ide-{}-{n}", std::process::id()));
        let mut seed = 1u32;
        let mut next = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as u8
        };
        let bytes: Vec<u8> = (0..SIZE).map(|_| next()).collect();
        std::fs::write(&path, &bytes).expect("a temporary file");
        let options = Options { format: Some(crate::devices::disk::Format::Raw), read_only, ..Options::default() };
        let disk = Disk::open(&path, options).expect("opens");
        let mut channel = Channel::default();
        channel.attach(false, kind, Arc::new(Mutex::new(disk)));
        Rig { channel, path, bytes }
    }

    fn file(&self) -> Vec<u8> {
        std::fs::read(&self.path).expect("readable")
    }

    /// Registers 2 to 6 and the command.
    fn issue(&mut self, count: u8, address: u32, device: u8, command: u8) {
        let [a, b, c, _] = address.to_le_bytes();
        for (register, v) in [(6, device), (2, count), (3, a), (4, b), (5, c), (7, command)] {
            self.channel.write(register, v);
        }
    }

    fn data(&mut self, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        out.chunks_mut(2).for_each(|word| self.channel.read_data(word));
        out
    }

    fn packet(&mut self, packet: &[u8], burst: u16) {
        let [low, high] = burst.to_le_bytes();
        for (register, v) in [(6, 0), (1, 0), (4, low), (5, high), (7, 0xa0)] {
            self.channel.write(register, v);
        }
        assert_eq!((self.channel.read(7), self.channel.read(2)), (0x58, 1), "waits for the packet");
        let mut all = packet.to_vec();
        all.resize(12, 0);
        all.chunks(2).for_each(|word| self.channel.write_data(word));
    }

    /// All data of a packet command, and how long its parts were.
    fn parts(&mut self) -> (Vec<u8>, Vec<usize>) {
        let (mut all, mut lengths) = (Vec::new(), Vec::new());
        while self.channel.alternate_status() & 8 != 0 {
            assert!(self.channel.irq(), "each part interrupts");
            assert_eq!(self.channel.read(2), 2, "to the host");
            let len = usize::from(self.channel.read(4)) | usize::from(self.channel.read(5)) << 8;
            self.channel.read(7);
            all.extend(self.data(len));
            lengths.push(len);
        }
        assert!(self.channel.irq(), "and the end");
        (all, lengths)
    }
}

fn word(bytes: &[u8], n: usize) -> u16 {
    u16::from_le_bytes([bytes[2 * n], bytes[2 * n + 1]])
}

#[test]
fn identity_of_a_disk() {
    let mut r = Rig::new(Kind::Disk, false);
    r.issue(0, 0, 0, 0xec);
    assert!(r.channel.irq());
    assert_eq!(r.channel.read(7), 0x58);
    assert!(!r.channel.irq(), "the status takes it back");
    let id = r.data(512);
    assert_eq!(r.channel.alternate_status(), 0x50);
    let sectors = (SIZE / 512) as u16;
    // General configuration, sectors in both widths, 48-bit addresses supported.
    assert_eq!((word(&id, 0), word(&id, 60), word(&id, 100), word(&id, 83) >> 10 & 1), (0x40, sectors, sectors, 1));
    assert_eq!(&id[54..66], b"iBivos ridks", "words with the first character above");
}

#[test]
fn sectors_are_read_and_written_by_block_address() {
    let mut r = Rig::new(Kind::Disk, false);
    r.issue(3, 5, 0x40, 0x20);
    for sector in 5..8 {
        assert!(r.channel.irq(), "each sector interrupts");
        assert_eq!(r.channel.read(7) & 0x89, 8);
        assert_eq!(r.data(512), r.bytes[sector * 512..][..512]);
    }
    assert_eq!((r.channel.irq(), r.channel.read(7)), (false, 0x50));
    r.issue(2, 9, 0x40, 0x30);
    assert_eq!((r.channel.irq(), r.channel.alternate_status()), (false, 0x58), "the first is asked for without");
    for sector in 0..2u8 {
        (0..128).for_each(|_| r.channel.write_data(&[sector + 1; 4]));
        assert!(r.channel.irq());
        r.channel.read(7);
    }
    let file = r.file();
    assert_eq!((&file[9 * 512..10 * 512], &file[10 * 512..11 * 512]), (&[1; 512][..], &[2; 512][..]));
    assert_eq!(file[11 * 512..], r.bytes[11 * 512..]);
}

#[test]
fn cylinders_heads_and_sectors() {
    let mut r = Rig::new(Kind::Disk, false);
    // Sector 2 of head 3 of cylinder 1: with 16 heads of 63 sectors.
    r.issue(1, 0x0102, 3, 0x20);
    let at = ((16 + 3) * 63 + 1) * 512;
    assert_eq!(r.data(512), r.bytes[at..at + 512]);
    // Sector 0 does not exist.
    r.issue(1, 0x0100, 3, 0x20);
    assert_eq!((r.channel.read(7) & 1, r.channel.read(1)), (1, 0x10));
}

#[test]
fn wide_addresses_and_blocks() {
    let mut r = Rig::new(Kind::Disk, false);
    r.issue(4, 0, 0x40, 0xc6);
    assert_eq!(r.channel.read(7), 0x50);
    // Count 0x0006 and address 7, high-order bytes first: READ MULTIPLE EXT in blocks of 4.
    for (register, v) in [(2, 0), (3, 0), (4, 0), (5, 0), (6, 0x40)] {
        r.channel.write(register, v);
    }
    r.issue(6, 7, 0x40, 0x29);
    assert_eq!(r.data(2048), r.bytes[7 * 512..][..2048]);
    assert!(r.channel.irq());
    assert_eq!(r.data(1024), r.bytes[11 * 512..][..1024]);
    // The last sector and one more.
    r.issue(2, (SIZE / 512 - 1) as u32, 0x40, 0x20);
    assert_eq!((r.channel.read(7) & 9, r.channel.read(1)), (1, 0x10));
    // READ NATIVE MAX ADDRESS.
    r.issue(0, 0, 0x40, 0xf8);
    assert_eq!([3, 4, 5].map(|n| r.channel.read(n)), [0xff, 0x07, 0]);
}

#[test]
fn reset_signs_and_nobody_is_zero() {
    let mut cd = Rig::new(Kind::Cd, true);
    cd.channel.write_control(4);
    cd.channel.write_control(0);
    assert_eq!([2, 3, 4, 5, 7].map(|n| cd.channel.read(n)), [1, 1, 0x14, 0xeb, 0]);
    cd.issue(0, 0, 0, 0xec);
    assert_eq!((cd.channel.read(7) & 1, cd.channel.read(1), cd.channel.read(4)), (1, 4, 0x14));
    cd.channel.write(6, 0x10);
    assert_eq!((1..8).map(|n| cd.channel.read(n)).collect::<Vec<_>>(), [0; 7]);
}

#[test]
fn no_interrupt_while_the_host_wants_none() {
    let mut r = Rig::new(Kind::Disk, true);
    r.channel.write_control(2);
    r.issue(0, 0, 0, 0xec);
    assert!(!r.channel.irq());
    r.channel.write_control(0);
    assert!(r.channel.irq());
    // And a write-protected disk takes no data.
    r.issue(1, 0, 0x40, 0x30);
    assert_eq!((r.channel.read(7) & 9, r.channel.read(1)), (1, 4));
}

/// Regions of 100 and 924 bytes, the second the last; from disk to memory and back to another place.
#[test]
fn the_bus_master_follows_its_table() {
    let mut r = Rig::new(Kind::Disk, false);
    let mem = GuestMemory::Ram(Ram::new(1 << 20).expect("a MiB"));
    let table: Vec<u8> = [0x5000u32, 100, 0x6000, 0x8000_0000 | 924].iter().flat_map(|v| v.to_le_bytes()).collect();
    mem.write(0x1000, &table).expect("RAM");
    let start = |r: &mut Rig, command: u8| {
        for (n, byte) in 0x1000u32.to_le_bytes().into_iter().enumerate() {
            r.channel.master.write(4 + n as u8, byte);
        }
        r.channel.master.write(2, 6);
        r.channel.master.write(0, command);
        r.channel.run_master(&mem);
    };
    r.issue(2, 20, 0x40, 0xc8);
    assert_eq!(r.channel.alternate_status(), 0x58);
    start(&mut r, 9);
    let mut got = vec![0; 1024];
    mem.read(0x5000, &mut got[..100]).expect("RAM");
    mem.read(0x6000, &mut got[100..]).expect("RAM");
    assert_eq!(got, r.bytes[20 * 512..22 * 512]);
    assert_eq!((r.channel.master.read(2), r.channel.irq(), r.channel.read(7)), (4, true, 0x50));
    // Started before the command is given.
    start(&mut r, 1);
    assert_eq!(r.channel.master.read(2), 1);
    r.issue(2, 40, 0x40, 0xca);
    r.channel.run_master(&mem);
    assert_eq!(r.file()[40 * 512..42 * 512], r.bytes[20 * 512..22 * 512]);
    // A table that is shorter than the transfer.
    r.issue(3, 20, 0x40, 0xc8);
    start(&mut r, 9);
    assert_eq!((r.channel.master.read(2) & 7, r.channel.read(7) & 1), (6, 1));
}

#[test]
fn packets_of_a_cd() {
    let mut r = Rig::new(Kind::Cd, true);
    r.issue(0, 0, 0, 0xa1);
    assert_eq!(word(&r.data(512), 0), 0x85c0);
    // READ CAPACITY: 512 blocks of 2048.
    r.packet(&[0x25], 8);
    assert_eq!(r.parts().0, [0, 0, 1, 0xff, 0, 0, 8, 0]);
    // READ(10) of blocks 3 and 4, at most 1000 bytes a time.
    r.packet(&[0x28, 0, 0, 0, 0, 3, 0, 0, 2], 1000);
    let (data, lengths) = r.parts();
    assert_eq!(data, r.bytes[3 * 2048..5 * 2048]);
    assert_eq!(lengths, [1000, 1000, 1000, 1000, 96]);
    assert_eq!((r.channel.read(7), r.channel.read(2)), (0x50, 3));
    // 100 blocks: more than are held at once.
    r.packet(&[0x28, 0, 0, 0, 0, 1, 0, 0, 100], 0xf800);
    assert_eq!(r.parts().0, r.bytes[2048..101 * 2048]);
    // Table of contents: one data track and the lead-out.
    r.packet(&[0x43, 0, 0, 0, 0, 0, 0, 0, 20], 20);
    assert_eq!(r.parts().0, [0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x16, 0xaa, 0, 0, 0, 2, 0]);
}

#[test]
fn sense_says_why() {
    let mut r = Rig::new(Kind::Cd, true);
    r.packet(&[0x28, 0, 0, 0, 2, 0, 0, 0, 1], 2048);
    assert_eq!((r.channel.irq(), r.channel.read(7), r.channel.read(1) >> 4), (true, 0x51, 5));
    r.packet(&[0x03, 0, 0, 0, 18], 18);
    let sense = r.parts().0;
    assert_eq!((sense[0], sense[2], sense[12]), (0x70, 5, 0x21));
    r.packet(&[0xff], 0);
    assert_eq!(r.channel.read(7), 0x51);
    r.packet(&[0x03, 0, 0, 0, 18], 18);
    assert_eq!(r.parts().0[12], 0x20);
}

/// A packet command by the bus master.
#[test]
fn packets_by_the_bus_master() {
    let mut r = Rig::new(Kind::Cd, true);
    let mem = GuestMemory::Ram(Ram::new(1 << 20).expect("a MiB"));
    mem.write(0x1000, &[0x8000u32, 0x8000_1000].map(u32::to_le_bytes).concat()).expect("RAM");
    r.channel.master.write(5, 0x10);
    for (register, v) in [(6, 0), (1, 1), (7, 0xa0)] {
        r.channel.write(register, v);
    }
    [0x28, 0, 0, 0, 0, 9, 0, 0, 2, 0, 0, 0].iter().for_each(|b| r.channel.write_data(&[*b]));
    r.channel.master.write(0, 9);
    r.channel.run_master(&mem);
    let mut got = vec![0; 4096];
    mem.read(0x8000, &mut got).expect("RAM");
    assert_eq!(got, r.bytes[9 * 2048..11 * 2048]);
    assert_eq!((r.channel.irq(), r.channel.master.read(2), r.channel.read(7)), (true, 4, 0x50));
}

/// A host's file that cannot be read or written any more, in the middle: the guest gets the medium's error, and what it asked for comes when
/// the file is there again.
#[test]
fn a_file_that_fails_in_mid_run_is_an_error_of_the_medium() {
    let mut r = Rig::new(Kind::Disk, false);
    let disk = r.channel.drives[0].as_ref().expect("a drive").disk.clone();
    let disk = || disk.lock().expect("no panic under the lock");
    let failed = |r: &mut Rig| (r.channel.read(7) & 0x89, r.channel.read(1));
    // The second of three sectors.
    r.issue(3, 5, 0x40, 0x20);
    let file = disk().fail(true);
    assert_eq!(r.data(512), r.bytes[5 * 512..6 * 512], "it was there already");
    assert_eq!(failed(&mut r), (1, 0x40), "uncorrectable data");
    // By DMA.
    let mem = GuestMemory::Ram(Ram::new(1 << 20).expect("a MiB"));
    let table: Vec<u8> = [0x5000u32, 0x8000_0000 | 512].iter().flat_map(|v| v.to_le_bytes()).collect();
    mem.write(0x1000, &table).expect("RAM");
    let dma = |r: &mut Rig, command: u8, direction: u8| {
        r.issue(1, 20, 0x40, command);
        for (n, byte) in 0x1000u32.to_le_bytes().into_iter().enumerate() {
            r.channel.master.write(4 + n as u8, byte);
        }
        r.channel.master.write(2, 6);
        r.channel.master.write(0, direction);
        r.channel.run_master(&mem);
        failed(r)
    };
    assert_eq!(dma(&mut r, 0xc8, 9), (1, 0x40));
    disk().mend(file);
    assert_eq!(dma(&mut r, 0xc8, 9).0, 0);
    r.issue(1, 6, 0x40, 0x20);
    assert_eq!(r.data(512), r.bytes[6 * 512..7 * 512]);
    // Writes: the last word of a sector, DMA, a flush.
    let file = disk().fail(false);
    r.issue(1, 9, 0x40, 0x30);
    (0..128).for_each(|_| r.channel.write_data(&[1; 4]));
    assert_eq!(failed(&mut r), (1, 0x40));
    assert_eq!(dma(&mut r, 0xca, 1), (1, 0x40));
    r.issue(0, 0, 0x40, 0xe7);
    assert_eq!(failed(&mut r), (1, 0x40), "what cannot be flushed");
    disk().mend(file);
    r.issue(0, 0, 0x40, 0xe7);
    assert_eq!(failed(&mut r).0, 0);
    assert_eq!(r.file(), r.bytes, "nothing was written");

    let mut r = Rig::new(Kind::Cd, true);
    let disk = r.channel.drives[0].as_ref().expect("a drive").disk.clone();
    disk.lock().expect("no panic under the lock").fail(true);
    r.packet(&[0x28, 0, 0, 0, 0, 3, 0, 0, 1], 2048);
    assert_eq!(failed(&mut r).0, 1);
    r.packet(&[0x03, 0, 0, 0, 18], 18);
    let (sense, _) = r.parts();
    assert_eq!((sense[2], sense[12]), (3, 0x11), "medium error: unrecovered read error");
}
