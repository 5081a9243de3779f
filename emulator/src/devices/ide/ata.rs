//! Commands of a hard disk, and those every drive has (ATA/ATAPI-6, T13 1410D, clause 8).

use super::{Drive, Kind, LBA, Phase, error};
use crate::devices::disk::SECTOR;

/// The most sectors of a block of READ and WRITE MULTIPLE.
const MOST_MULTIPLE: u8 = 16;

impl Drive {
    pub(super) fn command(&mut self, command: u8) {
        self.stop();
        let cd = self.kind == Kind::Cd;
        match command {
            // DEVICE RESET of packet devices does not interrupt.
            0x08 if cd => self.sign(),
            0xa0 if cd => self.start_packet(),
            0xa1 if cd => self.send_identity(),
            // IDENTIFY and READ by a packet device: the signature, and an abort.
            0xec | 0x20 if cd => {
                self.sign();
                self.fail(error::ABORTED);
            }
            0xef => self.set_features(),
            // IDLE and STANDBY at once or later, SLEEP; CHECK POWER MODE: active.
            0xe0..=0xe3 | 0xe6 => self.done(),
            0xe5 => {
                self.done();
                self.task.count[0] = 0xff;
            }
            _ if cd => self.fail(error::ABORTED),
            0xec => self.send_identity(),
            0x20 | 0x21 => self.read_sectors(false, 1),
            0x24 => self.read_sectors(true, 1),
            0xc4 if self.multiple != 0 => self.read_sectors(false, self.multiple),
            0x29 if self.multiple != 0 => self.read_sectors(true, self.multiple),
            0x30 | 0x31 => self.write_sectors(false, 1),
            0x34 => self.write_sectors(true, 1),
            0xc5 if self.multiple != 0 => self.write_sectors(false, self.multiple),
            0x39 if self.multiple != 0 => self.write_sectors(true, self.multiple),
            0xc8 | 0xc9 => self.dma(false, true),
            0x25 => self.dma(true, true),
            0xca | 0xcb => self.dma(false, false),
            0x35 => self.dma(true, false),
            0x40 | 0x41 => self.verify(false),
            0x42 => self.verify(true),
            // RECALIBRATE, SEEK.
            0x10..=0x1f | 0x70..=0x7f => self.done(),
            // INITIALIZE DEVICE PARAMETERS.
            0x91 => {
                self.geometry = (u16::from(self.task.device & 15) + 1, u16::from(self.task.count[0]).max(1));
                self.done();
            }
            0xc6 => self.set_multiple(),
            0xe7 | 0xea => {
                let flushed = self.disk().flush();
                if flushed.is_ok() { self.done() } else { self.fail(error::UNCORRECTABLE) }
            }
            // READ NATIVE MAX ADDRESS (EXT).
            0xf8 => self.native_max(false),
            0x27 => self.native_max(true),
            _ => self.fail(error::ABORTED),
        }
    }

    fn send_identity(&mut self) {
        self.buffer = self.identify();
        self.limit = self.buffer.len();
        self.request(Phase::ToHost { at: 0, left: 0 }, true);
    }

    fn set_multiple(&mut self) {
        match self.task.count[0] {
            n if n.is_power_of_two() && n <= MOST_MULTIPLE => {
                self.multiple = n;
                self.done();
            }
            _ => {
                self.multiple = 0;
                self.fail(error::ABORTED);
            }
        }
    }

    fn set_features(&mut self) {
        match self.task.features[0] {
            // Transfer mode: PIO, multi-word DMA 0 to 2, Ultra DMA 0 to 5.
            0x03 => match self.task.count[0] {
                mode @ (0..=1 | 0x08..=0x0c | 0x20..=0x22 | 0x40..=0x45) => {
                    self.mode = mode;
                    self.done();
                }
                _ => self.fail(error::ABORTED),
            },
            0x02 => {
                self.write_cache = true;
                self.done();
            }
            0x82 => {
                self.write_cache = false;
                self.done();
            }
            // Look-ahead, settings kept over a soft reset.
            0xaa | 0x55 | 0x66 | 0xcc => self.done(),
            _ => self.fail(error::ABORTED),
        }
    }

    /// The first byte and the number of bytes that the task file names; `None`: beyond the end.
    fn range(&self, wide: bool) -> Option<(u64, u64)> {
        let t = &self.task;
        let bytes = |old: usize| (0..3).rev().fold(0u64, |v, n| v << 8 | u64::from(t.address[n][old]));
        let count = if wide { u64::from(t.count[1]) << 8 } else { 0 } | u64::from(t.count[0]);
        let count = match (count, wide) {
            (0, false) => 0x100,
            (0, true) => 0x1_0000,
            (n, _) => n,
        };
        let first = if wide {
            bytes(1) << 24 | bytes(0)
        } else if t.device & LBA != 0 {
            u64::from(t.device & 15) << 24 | bytes(0)
        } else {
            let (heads, sectors) = self.geometry;
            let (cylinder, sector) = (bytes(0) >> 8, u64::from(t.address[0][0]));
            let head = u64::from(t.device & 15);
            (cylinder * u64::from(heads) + head) * u64::from(sectors) + sector.checked_sub(1)?
        };
        (first + count <= self.sectors()).then_some((first * SECTOR, count * SECTOR))
    }

    fn read_sectors(&mut self, wide: bool, block: u8) {
        match self.range(wide) {
            Some((at, len)) => {
                self.limit = usize::from(block) * SECTOR as usize;
                self.next_block_to_host(at, len);
            }
            None => self.fail(error::NOT_FOUND),
        }
    }

    /// A block is there to be read, or all have been.
    pub(super) fn next_block_to_host(&mut self, at: u64, left: u64) {
        if left == 0 {
            // The last block has been read: no interrupt follows.
            self.done();
            self.interrupt = false;
            return;
        }
        let len = left.min(self.limit as u64);
        let mut buffer = vec![0; len as usize];
        let read = self.disk().read(at, &mut buffer);
        self.buffer = buffer;
        match read {
            Ok(()) => self.request(Phase::ToHost { at: at + len, left: left - len }, true),
            Err(_) => self.fail(error::UNCORRECTABLE),
        }
    }

    fn write_sectors(&mut self, wide: bool, block: u8) {
        if self.disk().is_read_only() {
            return self.fail(error::ABORTED);
        }
        match self.range(wide) {
            Some((at, len)) => {
                self.limit = usize::from(block) * SECTOR as usize;
                self.next_block_from_host(at, len, false);
            }
            None => self.fail(error::NOT_FOUND),
        }
    }

    /// The first block is asked for without an interrupt.
    fn next_block_from_host(&mut self, at: u64, left: u64, interrupt: bool) {
        let len = left.min(self.limit as u64);
        self.buffer = vec![0; len as usize];
        self.request(Phase::FromHost { at, left: left - len }, interrupt);
    }

    /// A block has come.
    pub(super) fn block_from_host(&mut self, at: u64, left: u64) {
        let written = self.disk().write(at, &self.buffer);
        match written {
            Err(_) => self.fail(error::UNCORRECTABLE),
            Ok(()) if left == 0 => self.done(),
            Ok(()) => self.next_block_from_host(at + self.buffer.len() as u64, left, true),
        }
    }

    fn dma(&mut self, wide: bool, to_host: bool) {
        if !to_host && self.disk().is_read_only() {
            return self.fail(error::ABORTED);
        }
        match self.range(wide) {
            Some((at, left)) => {
                self.request(Phase::Dma { at, left, to_host }, false);
            }
            None => self.fail(error::NOT_FOUND),
        }
    }

    fn verify(&mut self, wide: bool) {
        match self.range(wide) {
            Some(_) => self.done(),
            None => self.fail(error::NOT_FOUND),
        }
    }

    fn native_max(&mut self, wide: bool) {
        let last = self.sectors().saturating_sub(1);
        let last = if wide { last } else { last.min(0x0fff_ffff) };
        self.done();
        let t = &mut self.task;
        for (n, place) in t.address.iter_mut().enumerate() {
            *place = [(last >> (8 * n)) as u8, (last >> (24 + 8 * n)) as u8];
        }
        if !wide {
            t.device = t.device & 0xf0 | (last >> 24) as u8 & 15;
        }
    }
}
