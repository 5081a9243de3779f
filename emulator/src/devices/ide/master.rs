//! The bus master of an IDE channel: moves a drive's data from and to memory by a table of regions (Programming Interface for Bus Master
//! IDE Controller, revision 1.0; Intel 82371SB data sheet, 290550, 2.7).

use super::{Channel, Drive, Phase, error};
use crate::mem::GuestMemory;

/// Bits of the command register.
const START: u8 = 1;
const TO_MEMORY: u8 = 8;
/// Bits of the status register: busy; error and interrupt, which a 1 clears; what drives are capable of, which software keeps there.
const ACTIVE: u8 = 1;
const ERROR: u8 = 2;
const INTERRUPT: u8 = 4;
const CAPABLE: u8 = 0x60;

/// The most regions of a table (it must not cross 64 KiB), of 64 KiB each.
const REGIONS: u64 = 8192;
/// Bytes moved at a time.
const PART: u64 = 0x1_0000;

/// The registers of one channel.
#[derive(Clone, Debug, Default)]
pub struct BusMaster {
    command: u8,
    status: u8,
    table: u32,
}

/// Where the table says that bytes are: its regions one after the other.
struct Regions<'a> {
    mem: &'a GuestMemory,
    at: u64,
    /// Regions that may still come.
    left: u64,
    /// Address and length of what is left of the region at hand.
    region: (u64, u64),
    is_last: bool,
}

impl Regions<'_> {
    /// The next at most `len` bytes; `None`: the table is at its end, or is not in memory.
    fn take(&mut self, len: u64) -> Option<(u64, u64)> {
        while self.region.1 == 0 {
            if self.is_last || self.left == 0 {
                return None;
            }
            let mut entry = [0; 8];
            self.mem.read(self.at, &mut entry)?;
            let word = |n: usize| u32::from_le_bytes([entry[n], entry[n + 1], entry[n + 2], entry[n + 3]]);
            let count = u64::from(word(4) & 0xfffe);
            self.region = (u64::from(word(0) & !1), if count == 0 { 0x1_0000 } else { count });
            self.is_last = word(4) >> 31 != 0;
            self.at += 8;
            self.left -= 1;
        }
        let n = len.min(self.region.1);
        let at = self.region.0;
        self.region = (at + n, self.region.1 - n);
        Some((at, n))
    }
}

impl BusMaster {
    /// Reads register 0 to 7.
    pub fn read(&self, register: u8) -> u8 {
        match register {
            0 => self.command,
            2 => self.status,
            4..=7 => self.table.to_le_bytes()[usize::from(register) - 4],
            _ => 0,
        }
    }

    /// Writes register 0 to 7.
    pub fn write(&mut self, register: u8, v: u8) {
        match register {
            0 => {
                self.command = v & (START | TO_MEMORY);
                if v & START == 0 {
                    self.status &= !ACTIVE;
                } else {
                    self.status |= ACTIVE;
                }
            }
            2 => {
                self.status &= !(v & (ERROR | INTERRUPT));
                self.status = self.status & !CAPABLE | v & CAPABLE;
            }
            4..=7 => {
                let mut bytes = self.table.to_le_bytes();
                bytes[usize::from(register) - 4] = v;
                self.table = u32::from_le_bytes(bytes) & !3;
            }
            _ => {}
        }
    }

    /// The drive has raised its interrupt.
    pub(super) fn note_interrupt(&mut self) {
        self.status |= INTERRUPT;
    }

    /// Moves data if both sides are ready.
    fn run(&mut self, drive: &mut Drive, mem: &GuestMemory) {
        if self.status & ACTIVE == 0 || !matches!(drive.phase, Phase::Dma { .. } | Phase::PacketDma) {
            return;
        }
        let at = u64::from(self.table);
        let mut regions = Regions { mem, at, left: REGIONS, region: (0, 0), is_last: false };
        let to_memory = self.command & TO_MEMORY != 0;
        let moved = match drive.phase {
            Phase::Dma { at, left, to_host } if to_host == to_memory => {
                move_sectors(drive, &mut regions, mem, (at, left), to_host)
            }
            Phase::PacketDma if to_memory => send_buffer(drive, &mut regions, mem),
            // The two sides do not agree on the direction.
            _ => None,
        };
        match moved {
            Some(()) if !matches!(drive.phase, Phase::Idle) => drive.finish_dma(),
            Some(()) => {}
            None => {
                self.status |= ERROR;
                drive.fail(error::ABORTED);
            }
        }
        // Active as long as regions are left (2.3.2 of the interface's description).
        let exhausted = regions.is_last && regions.region.1 == 0;
        if exhausted || self.status & ERROR != 0 {
            self.status &= !ACTIVE;
        }
    }
}

impl Channel {
    /// The bus master moves data if it is to and the drive wants it: to be called after each write to either.
    pub fn run_master(&mut self, mem: &GuestMemory) {
        if let Some(drive) = self.drives[self.selected].as_mut() {
            self.master.run(drive, mem);
            self.note();
        }
    }
}

fn move_sectors(
    drive: &mut Drive,
    regions: &mut Regions<'_>,
    mem: &GuestMemory,
    (mut at, mut left): (u64, u64),
    to_host: bool,
) -> Option<()> {
    let mut bytes = vec![0; left.min(PART) as usize];
    while left > 0 {
        let (gpa, n) = regions.take(left.min(PART))?;
        let part = &mut bytes[..n as usize];
        let done = if to_host {
            let read = drive.disk().read(at, part);
            if read.is_ok() {
                mem.write(gpa, part)?;
            }
            read
        } else {
            mem.read(gpa, part)?;
            drive.disk().write(at, part)
        };
        if done.is_err() {
            drive.fail(error::UNCORRECTABLE);
            return Some(());
        }
        (at, left) = (at + n, left - n);
    }
    Some(())
}

fn send_buffer(drive: &mut Drive, regions: &mut Regions<'_>, mem: &GuestMemory) -> Option<()> {
    let mut sent = 0;
    while sent < drive.buffer.len() {
        let (gpa, n) = regions.take((drive.buffer.len() - sent) as u64)?;
        mem.write(gpa, &drive.buffer[sent..sent + n as usize])?;
        sent += n as usize;
    }
    Some(())
}

impl Drive {
    /// All was moved.
    fn finish_dma(&mut self) {
        match self.phase {
            Phase::PacketDma => self.end_packet(super::atapi::Sense::default()),
            _ => self.done(),
        }
    }
}
