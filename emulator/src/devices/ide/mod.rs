//! IDE controller of two channels with two drives each: task file, data port and interrupts (ATA/ATAPI-6, T13 1410D, clauses 7 to 9).

mod ata;
mod atapi;
mod identify;
mod master;

use crate::devices::disk::Disk;
pub use master::BusMaster;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bits of the status register.
mod status {
    pub const ERROR: u8 = 1;
    pub const DATA_REQUEST: u8 = 8;
    pub const SEEK_COMPLETE: u8 = 0x10;
    pub const READY: u8 = 0x40;
}

/// Bits of the error register.
mod error {
    pub const ABORTED: u8 = 4;
    pub const NOT_FOUND: u8 = 0x10;
    pub const UNCORRECTABLE: u8 = 0x40;
}

/// Bits of the device control register.
const NO_INTERRUPT: u8 = 2;
const SOFT_RESET: u8 = 4;
const HIGH_ORDER: u8 = 0x80;

/// Bits of the device register: which drive, and block addresses instead of cylinders, heads and sectors.
const DRIVE_1: u8 = 0x10;
const LBA: u8 = 0x40;

/// Bits of the interrupt reason (the sector count register of packet commands).
const REASON_COMMAND: u8 = 1;
const REASON_TO_HOST: u8 = 2;

/// What a drive is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A hard disk.
    Disk,
    /// A CD-ROM drive, by packets.
    Cd,
}

/// Registers that software writes; each keeps the value before the last for 48-bit commands.
#[derive(Clone, Copy, Debug, Default)]
struct TaskFile {
    features: [u8; 2],
    count: [u8; 2],
    /// Low, middle and high byte of the address.
    address: [[u8; 2]; 3],
    device: u8,
}

/// What the data port is for at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    /// The buffer goes to the host; then so many more bytes from byte `at` of the disk.
    ToHost { at: u64, left: u64 },
    /// The buffer comes from the host, for byte `at` of the disk; then so many more.
    FromHost { at: u64, left: u64 },
    /// A packet comes from the host.
    Packet,
    /// Data of a packet command goes to the host, a part at a time.
    PacketToHost { left: u64 },
    /// The bus master moves `left` bytes from or to byte `at` of the disk.
    Dma { at: u64, left: u64, to_host: bool },
    /// The bus master takes the buffer.
    PacketDma,
}

/// One drive.
#[derive(Debug)]
struct Drive {
    kind: Kind,
    disk: Arc<Mutex<Disk>>,
    /// Sectors of a block of READ and WRITE MULTIPLE; 0: not set.
    multiple: u8,
    /// Heads and sectors of a track, as the host set them.
    geometry: (u16, u16),
    /// Transfer mode as SET FEATURES gave it.
    mode: u8,
    write_cache: bool,
    sense: atapi::Sense,
    packet: [u8; 12],
    task: TaskFile,
    status: u8,
    error: u8,
    phase: Phase,
    buffer: Vec<u8>,
    /// The next byte of the buffer.
    next: usize,
    /// Where the next packet data comes from, in bytes of the disk.
    from: u64,
    /// The drive wants attention.
    interrupt: bool,
    /// Bytes of a block of READ and WRITE; for packet data where in the buffer the part ends that the host was told of.
    limit: usize,
}

impl Drive {
    fn new(kind: Kind, disk: Arc<Mutex<Disk>>) -> Drive {
        let mut drive = Drive {
            kind,
            disk,
            multiple: 0,
            geometry: (16, 63),
            mode: 0,
            write_cache: true,
            sense: atapi::Sense::default(),
            packet: [0; 12],
            task: TaskFile::default(),
            status: 0,
            error: 0,
            phase: Phase::Idle,
            buffer: Vec::new(),
            next: 0,
            from: 0,
            interrupt: false,
            limit: 0,
        };
        drive.sign();
        drive
    }

    /// The disk, whatever another thread did with it: its methods leave it whole.
    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As after a reset: the signature by which its kind is told (9.12).
    fn sign(&mut self) {
        self.task = TaskFile { device: self.task.device & DRIVE_1, ..TaskFile::default() };
        self.task.count[0] = 1;
        self.task.address[0][0] = 1;
        let (middle, high) = if self.kind == Kind::Cd { (0x14, 0xeb) } else { (0, 0) };
        self.task.address[1][0] = middle;
        self.task.address[2][0] = high;
        self.stop();
        self.error = 1;
        self.status = if self.kind == Kind::Cd { 0 } else { status::READY | status::SEEK_COMPLETE };
    }

    /// No transfer.
    fn stop(&mut self) {
        self.phase = Phase::Idle;
        self.buffer = Vec::new();
        self.next = 0;
        self.interrupt = false;
    }

    /// The command is done.
    fn done(&mut self) {
        self.stop();
        self.error = 0;
        self.status = status::READY | status::SEEK_COMPLETE;
        self.interrupt = true;
    }

    /// The command is done with an error.
    fn fail(&mut self, error: u8) {
        self.done();
        self.error = error;
        self.status |= status::ERROR;
    }

    /// The host may move the buffer's bytes.
    fn request(&mut self, phase: Phase, interrupt: bool) {
        self.phase = phase;
        self.next = 0;
        self.error = 0;
        self.status = status::READY | status::SEEK_COMPLETE | status::DATA_REQUEST;
        self.interrupt |= interrupt;
    }

    fn read_data(&mut self, to: &mut [u8]) {
        let reading = matches!(self.phase, Phase::ToHost { .. } | Phase::PacketToHost { .. });
        let end = self.limit.min(self.buffer.len());
        for byte in to {
            *byte = if reading && self.next < end { self.buffer[self.next] } else { 0 };
            self.next += usize::from(reading && self.next < end);
        }
        if reading && self.next >= end {
            match self.phase {
                Phase::ToHost { at, left } => self.next_block_to_host(at, left),
                Phase::PacketToHost { left } => self.next_part_to_host(left),
                _ => {}
            }
        }
    }

    fn write_data(&mut self, from: &[u8]) {
        for byte in from {
            match self.phase {
                Phase::FromHost { at, left } => {
                    if let Some(place) = self.buffer.get_mut(self.next) {
                        *place = *byte;
                        self.next += 1;
                    }
                    if self.next >= self.buffer.len() {
                        self.block_from_host(at, left);
                    }
                }
                Phase::Packet => {
                    self.packet[self.next.min(11)] = *byte;
                    self.next += 1;
                    if self.next >= 12 {
                        self.run_packet();
                    }
                }
                _ => {}
            }
        }
    }
}

/// One channel: up to two drives that share the registers.
#[derive(Debug, Default)]
pub struct Channel {
    drives: [Option<Drive>; 2],
    selected: usize,
    control: u8,
    /// The selected drive's interrupt as the bus master was told.
    raised: bool,
    /// The bus master's registers.
    pub master: BusMaster,
}

impl Channel {
    /// Tells the bus master of an interrupt.
    fn note(&mut self) {
        let now = self.drives[self.selected].as_ref().is_some_and(|d| d.interrupt);
        if now && !self.raised {
            self.master.note_interrupt();
        }
        self.raised = now;
    }

    /// Connects a drive as the first or second one.
    pub fn attach(&mut self, second: bool, kind: Kind, disk: Arc<Mutex<Disk>>) {
        self.drives[usize::from(second)] = Some(Drive::new(kind, disk));
    }

    /// Is there any drive?
    pub fn is_empty(&self) -> bool {
        self.drives.iter().all(Option::is_none)
    }

    /// Is there room for one more? The place of the next one.
    pub fn free(&self) -> Option<bool> {
        self.drives.iter().position(Option::is_none).map(|n| n == 1)
    }

    fn drive(&mut self) -> Option<&mut Drive> {
        self.drives[self.selected].as_mut()
    }

    /// The interrupt pin.
    pub fn irq(&self) -> bool {
        self.control & NO_INTERRUPT == 0 && self.drives[self.selected].as_ref().is_some_and(|d| d.interrupt)
    }

    /// Reads the data register: 1, 2 or 4 bytes.
    pub fn read_data(&mut self, to: &mut [u8]) {
        match self.drive() {
            Some(drive) => drive.read_data(to),
            None => to.fill(0),
        }
        self.note();
    }

    /// Writes the data register.
    pub fn write_data(&mut self, from: &[u8]) {
        if let Some(drive) = self.drive() {
            drive.write_data(from);
        }
        self.note();
    }

    /// Reads register 1 to 7 of the command block. A drive that is not there gives zeros, as pull-down resistors do.
    pub fn read(&mut self, register: u8) -> u8 {
        let old = usize::from(self.control & HIGH_ORDER != 0);
        let Some(drive) = self.drive() else { return 0 };
        match register {
            1 => drive.error,
            2 => drive.task.count[old],
            3..=5 => drive.task.address[usize::from(register) - 3][old],
            6 => drive.task.device | 0xa0,
            7 => {
                drive.interrupt = false;
                self.raised = false;
                self.alternate_status()
            }
            _ => 0,
        }
    }

    /// The status without taking the interrupt back.
    pub fn alternate_status(&self) -> u8 {
        self.drives[self.selected].as_ref().map_or(0, |d| d.status)
    }

    /// Writes register 1 to 7: both drives see it, the selected one carries out commands.
    pub fn write(&mut self, register: u8, v: u8) {
        self.control &= !HIGH_ORDER;
        if register == 7 {
            return self.command(v);
        }
        if register == 6 {
            self.selected = usize::from(v & DRIVE_1 != 0);
        }
        for drive in self.drives.iter_mut().flatten() {
            let push = |place: &mut [u8; 2]| *place = [v, place[0]];
            match register {
                1 => push(&mut drive.task.features),
                2 => push(&mut drive.task.count),
                3..=5 => push(&mut drive.task.address[usize::from(register) - 3]),
                6 => drive.task.device = v & 0x5f,
                _ => {}
            }
        }
    }

    /// Writes the device control register: a soft reset ends when its bit is taken back.
    pub fn write_control(&mut self, v: u8) {
        let before = std::mem::replace(&mut self.control, v);
        if before & SOFT_RESET != 0 && v & SOFT_RESET == 0 {
            self.reset();
        }
    }

    fn reset(&mut self) {
        self.selected = 0;
        for drive in self.drives.iter_mut().flatten() {
            drive.task.device = 0;
            drive.multiple = 0;
            drive.sign();
        }
    }

    fn command(&mut self, v: u8) {
        const DIAGNOSTIC: u8 = 0x90;
        if v == DIAGNOSTIC {
            self.reset();
            if let Some(drive) = self.drive() {
                drive.interrupt = true;
            }
        } else if let Some(drive) = self.drive() {
            drive.interrupt = false;
            drive.command(v);
            self.raised = false;
        }
        self.note();
    }
}

/// Text of IDENTIFY: two characters a word, the first in the upper byte.
fn put_text(words: &mut [u16], text: &str) {
    let mut bytes = text.bytes().chain(std::iter::repeat(b' '));
    for word in words {
        let mut byte = || u16::from(bytes.next().unwrap_or(b' '));
        *word = byte() << 8 | byte();
    }
}

#[cfg(test)]
mod tests;
