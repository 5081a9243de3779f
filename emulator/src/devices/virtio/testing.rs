//! A driver in Rust: what a guest does to a virtio device on PCI, through its registers and RAM alone.

use super::pci::{Msi, VirtioPci};
use super::{Device, LARGEST};
use crate::mem::{GuestMemory, PAGE_SIZE, Ram};
use std::sync::Arc;

/// Where the test has the device's memory, and its rings: 16 descriptors a queue.
pub const BASE: u64 = 0xfe00_0000;
pub const SIZE: u16 = 16;
const RINGS: u64 = 0x1000;
/// From here on RAM is free for buffers.
pub const FREE: u64 = 0x1_0000;
pub const RAM: u64 = 64 * PAGE_SIZE;

/// Descriptor flags.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub struct Driver {
    pub pci: VirtioPci,
    pub mem: Arc<GuestMemory>,
    /// The next index of each available ring, and of each used ring.
    avail: Vec<u16>,
    used: Vec<u16>,
}

impl Driver {
    /// A device whose memory and DMA are on, and which no driver has touched.
    pub fn cold(device: Box<dyn Device>) -> Driver {
        assert!(LARGEST as u64 > RAM, "a chain can name all RAM");
        let mem = Arc::new(GuestMemory::Ram(Ram::new(RAM).expect("memory")));
        let queues = device.queues().len();
        let mut pci = VirtioPci::new(device, mem.clone());
        pci.place(BASE as u32, 10);
        pci.write_config(4, 6);
        Driver { pci, mem, avail: vec![0; queues], used: vec![0; queues] }
    }

    /// A device after the initialisation of 3.1.1, with some features besides VERSION_1 and with MSI-X or not.
    pub fn new(device: Box<dyn Device>, features: u64, msix: bool) -> Driver {
        let mut d = Driver::cold(device);
        if msix {
            let at = d.capability(0x11);
            for n in 0..=d.avail.len() as u64 {
                d.write(BASE + 0x4000 + 16 * n, 4, 0xfee0_0000);
                d.write(BASE + 0x4008 + 16 * n, 4, 0x40 + n);
                d.write(BASE + 0x400c + 16 * n, 4, 0);
            }
            d.pci.write_config(at + 3, 0x80);
        }
        for status in [0, 1, 3] {
            d.write(BASE + 0x14, 1, status);
        }
        if msix {
            d.write(BASE + 0x10, 2, 0);
        }
        let features = features | 1 << 32;
        for half in 0..2 {
            d.write(BASE + 8, 4, half);
            d.write(BASE + 0xc, 4, features >> (32 * half) & 0xffff_ffff);
        }
        d.write(BASE + 0x14, 1, 0xb);
        assert_eq!(d.status(), 0xb, "the features are accepted");
        for n in 0..d.avail.len() as u64 {
            let (table, avail, used) = Driver::rings(n as usize);
            d.write(BASE + 0x16, 2, n);
            d.write(BASE + 0x18, 2, u64::from(SIZE));
            d.write(BASE + 0x20, 8, table);
            d.write(BASE + 0x28, 8, avail);
            d.write(BASE + 0x30, 8, used);
            d.write(BASE + 0x1a, 2, if msix { n + 1 } else { 0xffff });
            d.write(BASE + 0x1c, 2, 1);
        }
        d.write(BASE + 0x14, 1, 0xf);
        d
    }

    /// Descriptor table, available ring, used ring.
    pub fn rings(queue: usize) -> (u64, u64, u64) {
        let at = RINGS * (1 + queue as u64);
        (at, at + 0x400, at + 0x800)
    }

    fn capability(&mut self, id: u8) -> u8 {
        let mut at = self.pci.read_config(0x34);
        while self.pci.read_config(at) != id {
            at = self.pci.read_config(at + 1);
            assert_ne!(at, 0, "no capability {id:#x}");
        }
        at
    }

    pub fn read(&mut self, at: u64, len: usize) -> u64 {
        let mut b = [0; 8];
        assert!(self.pci.read_memory(at, &mut b[..len]), "{at:#x} is the device's");
        u64::from_le_bytes(b)
    }

    pub fn write(&mut self, at: u64, len: usize, v: u64) {
        assert!(self.pci.write_memory(at, &v.to_le_bytes()[..len]), "{at:#x} is the device's");
    }

    pub fn status(&mut self) -> u64 {
        self.read(BASE + 0x14, 1)
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.mem.write(at, bytes).expect("RAM");
    }

    pub fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut b = [0; N];
        self.mem.read(at, &mut b).expect("RAM");
        b
    }

    pub fn descriptor(&self, queue: usize, n: u16, (at, len, flags, next): (u64, u32, u16, u16)) {
        let bytes = [&at.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
        self.put(Driver::rings(queue).0 + 16 * u64::from(n), &bytes);
    }

    /// Makes a chain of buffers (address, length, can the device write) from descriptor 0 on available, and says so.
    pub fn offer(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) {
        for (n, (at, len, write)) in buffers.iter().enumerate() {
            let more = n + 1 < buffers.len();
            let flags = if *write { WRITE } else { 0 } | if more { NEXT } else { 0 };
            self.descriptor(queue, n as u16, (*at, *len, flags, n as u16 + 1));
        }
        self.avail(queue, 0);
        self.kick(queue);
    }

    /// Makes the chain from a descriptor on available.
    pub fn avail(&mut self, queue: usize, head: u16) {
        let ring = Driver::rings(queue).1;
        self.put(ring + 4 + 2 * u64::from(self.avail[queue] % SIZE), &head.to_le_bytes());
        self.avail[queue] = self.avail[queue].wrapping_add(1);
        self.put(ring + 2, &self.avail[queue].to_le_bytes());
    }

    pub fn kick(&mut self, queue: usize) {
        self.write(BASE + 0x3000 + 4 * queue as u64, 2, queue as u64);
    }

    /// What the device gave back since: the head, and the bytes written.
    pub fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let ring = Driver::rings(queue).2;
        if u16::from_le_bytes(self.get(ring + 2)) == self.used[queue] {
            return None;
        }
        let at = ring + 4 + 8 * u64::from(self.used[queue] % SIZE);
        self.used[queue] = self.used[queue].wrapping_add(1);
        Some((u32::from_le_bytes(self.get(at)), u32::from_le_bytes(self.get(at + 4))))
    }

    pub fn messages(&mut self) -> Vec<Msi> {
        self.pci.take_messages()
    }
}
