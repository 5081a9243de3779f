//! A virtio device on PCI (Virtual I/O Device 1.2, 4.1): the modern interface, with MSI-X (PCI Local Bus Specification 3.0, 6.8.2) or INTA.

use super::{Broken, Device, Virtqueue};
use crate::devices::pci::{ConfigSpace, Identity};
use crate::mem::GuestMemory;
use std::sync::Arc;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;

const VENDOR: u16 = 0x1af4;
/// Device numbers of the modern interface begin here.
const DEVICE: u16 = 0x1040;

/// Base address 0: the four structures, a page each. Base address 1: the MSI-X table and its pending bits.
const STRUCTURES: u32 = 0x4000;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE_CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX: u32 = 0x1000;
const PENDING: u64 = 0x800;
/// Bytes between two queues' notification registers.
const MULTIPLIER: u32 = 4;

/// Capability numbers: vendor-specific, MSI-X.
const VENDOR_SPECIFIC: u8 = 9;
const MSIX_CAPABILITY: u8 = 0x11;
/// MSI-X message control: on, all masked. Vector control: masked.
const MSIX_ON: u16 = 1 << 15;
const MSIX_MASKED: u16 = 1 << 14;
const MASKED: u32 = 1;
/// No vector.
const NONE: u16 = 0xffff;
/// Bits of the ISR status: a queue, the configuration.
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// A message that is to be written: address and data.
pub type Msi = (u64, u32);

#[derive(Clone, Copy, Debug, Default)]
struct Vector {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

/// The transport of one device.
pub struct VirtioPci {
    space: ConfigSpace,
    device: Box<dyn Device>,
    mem: Arc<GuestMemory>,
    queues: Vec<Virtqueue>,
    /// MSI-X vector of each queue, and of the configuration.
    queue_vectors: Vec<u16>,
    config_vector: u16,
    vectors: Vec<Vector>,
    /// Where MSI-X and the configuration access capability are in the space.
    msix: usize,
    window: usize,
    feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    status: u8,
    generation: u8,
    queue_select: u16,
    isr: u8,
    messages: Vec<Msi>,
}

fn mask(bits: u32) -> u64 {
    1 << bits
}

impl VirtioPci {
    /// A device with access to a machine's RAM.
    pub fn new(device: Box<dyn Device>, mem: Arc<GuestMemory>) -> VirtioPci {
        let queues: Vec<_> = device.queues().iter().map(|size| Virtqueue::new(*size)).collect();
        let number = DEVICE + device.kind();
        let subsystem = (VENDOR, number);
        let who = Identity { vendor: VENDOR, device: number, revision: 1, class: device.class(), subsystem };
        let mut space = ConfigSpace::new(who);
        space.memory_bar(0, STRUCTURES);
        space.memory_bar(1, MSIX);
        space.use_intx();
        // Length, type, base address, id and padding, offset, size.
        let structure = |len: u8, kind: u8, offset: u64, size: u32| {
            let mut c = vec![len, kind, 0, 0, 0, 0];
            c.extend((offset as u32).to_le_bytes());
            c.extend(size.to_le_bytes());
            c
        };
        space.add_capability(VENDOR_SPECIFIC, &structure(16, 1, COMMON, 0x38));
        let mut notify = structure(20, 2, NOTIFY, MULTIPLIER * queues.len() as u32);
        notify.extend(MULTIPLIER.to_le_bytes());
        space.add_capability(VENDOR_SPECIFIC, &notify);
        space.add_capability(VENDOR_SPECIFIC, &structure(16, 3, ISR, 1));
        let config = device.config().len() as u32;
        if config > 0 {
            space.add_capability(VENDOR_SPECIFIC, &structure(16, 4, DEVICE_CONFIG, config));
        }
        let mut access = structure(20, 5, 0, 0);
        access.extend([0; 4]);
        let window = space.add_capability(VENDOR_SPECIFIC, &access);
        space.allow(window + 4, &[0xff]);
        space.allow(window + 8, &[0xff; 12]);
        let vectors = vec![Vector { control: MASKED, ..Vector::default() }; queues.len() + 1];
        let mut table = (vectors.len() as u16 - 1).to_le_bytes().to_vec();
        table.extend([1, 0, 0, 0]);
        table.extend((PENDING as u32 | 1).to_le_bytes());
        let msix = space.add_capability(MSIX_CAPABILITY, &table);
        space.allow(msix + 3, &[((MSIX_ON | MSIX_MASKED) >> 8) as u8]);
        VirtioPci {
            space,
            device,
            mem,
            queue_vectors: vec![NONE; queues.len()],
            queues,
            config_vector: NONE,
            vectors,
            msix,
            window,
            feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            generation: 0,
            queue_select: 0,
            isr: 0,
            messages: Vec::new(),
        }
    }

    fn offered(&self) -> u64 {
        let transport = mask(VIRTIO_F_VERSION_1) | mask(VIRTIO_RING_F_EVENT_IDX) | mask(VIRTIO_RING_F_INDIRECT_DESC);
        transport | self.device.features()
    }

    /// Reads a byte of the configuration space.
    pub fn read_config(&mut self, at: u8) -> u8 {
        // The first byte of the window brings in what it shows.
        if usize::from(at) == self.window + 16
            && let Some((offset, len)) = self.window()
        {
            let mut data = [0; 4];
            self.read_structures(offset, &mut data[..len]);
            self.space.put(self.window + 16, &data);
        }
        self.space.read(at)
    }

    /// Writes a byte of the configuration space.
    pub fn write_config(&mut self, at: u8, v: u8) {
        self.space.write(at, v);
        if usize::from(at) == self.msix + 3 {
            self.send_pending();
        }
        // The last byte of the window writes what it shows.
        if let Some((offset, len)) = self.window()
            && usize::from(at) == self.window + 15 + len
        {
            let data = self.space.dword(self.window + 16).to_le_bytes();
            self.write_structures(offset, &data[..len]);
        }
    }

    /// What the configuration access capability points at (4.1.4.9): offset in base address 0, and 1, 2 or 4 bytes.
    fn window(&self) -> Option<(u64, usize)> {
        let (bar, at) = (self.space.read(self.window as u8 + 4), self.space.dword(self.window + 8));
        let len = self.space.dword(self.window + 12);
        (bar == 0 && matches!(len, 1 | 2 | 4) && at.is_multiple_of(len) && at < STRUCTURES)
            .then_some((u64::from(at), len as usize))
    }

    /// Where this device is in memory: the base address's number, and the offset behind it.
    fn find(&self, gpa: u64) -> Option<(usize, u64)> {
        [(0, STRUCTURES), (1, MSIX)].into_iter().find_map(|(n, size)| {
            let offset = gpa.checked_sub(self.space.memory_base(n)?)?;
            (offset < u64::from(size)).then_some((n, offset))
        })
    }

    /// Reads memory, if it is the device's.
    pub fn read_memory(&mut self, gpa: u64, data: &mut [u8]) -> bool {
        match self.find(gpa) {
            Some((0, offset)) => self.read_structures(offset, data),
            Some((_, offset)) => self.read_msix(offset, data),
            None => return false,
        }
        true
    }

    /// Writes memory, if it is the device's.
    pub fn write_memory(&mut self, gpa: u64, data: &[u8]) -> bool {
        match self.find(gpa) {
            Some((0, offset)) => self.write_structures(offset, data),
            Some((_, offset)) => self.write_msix(offset, data),
            None => return false,
        }
        true
    }

    /// The level of INTA.
    pub fn intx(&mut self) -> bool {
        let wanted = self.isr != 0 && !self.msix_on();
        self.space.intx(wanted)
    }

    /// Messages that are to be delivered.
    pub fn take_messages(&mut self) -> Vec<Msi> {
        std::mem::take(&mut self.messages)
    }

    /// As firmware does it: where memory is decoded from, and which interrupt the guest is told.
    pub fn place(&mut self, base: u32, irq: u8) {
        self.space.put(crate::devices::pci::reg::BARS, &base.to_le_bytes());
        self.space.put(crate::devices::pci::reg::BARS + 4, &(base + STRUCTURES).to_le_bytes());
        self.space.put(crate::devices::pci::reg::LINE, &[irq]);
    }

    fn msix_on(&self) -> bool {
        self.space.word(self.msix + 2) & MSIX_ON != 0
    }

    /// Sends the message of a vector, or keeps it for when it is not masked any more.
    fn signal(&mut self, vector: u16) {
        let all_masked = self.space.word(self.msix + 2) & MSIX_MASKED != 0;
        let Some(v) = self.vectors.get_mut(usize::from(vector)) else { return };
        if all_masked || v.control & MASKED != 0 {
            v.pending = true;
        } else {
            v.pending = false;
            self.messages.push((v.address, v.data));
        }
    }

    fn send_pending(&mut self) {
        if self.msix_on() {
            for n in 0..self.vectors.len() {
                if self.vectors[n].pending {
                    self.signal(n as u16);
                }
            }
        }
    }

    fn interrupt(&mut self, vector: u16, isr: u8) {
        if self.msix_on() {
            self.signal(vector);
        } else {
            self.isr |= isr;
        }
    }

    /// The configuration changed, or the device needs a reset.
    fn config_changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        if u32::from(self.status) & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.interrupt(self.config_vector, ISR_CONFIG);
        }
    }

    fn alive(&self) -> bool {
        let s = u32::from(self.status);
        s & VIRTIO_CONFIG_S_DRIVER_OK != 0 && s & VIRTIO_CONFIG_S_NEEDS_RESET == 0 && self.space.is_master()
    }

    /// Lets the device work on its queues and tells the driver what was used.
    fn work(&mut self, what: impl FnOnce(&mut dyn Device, &mut [Virtqueue], &crate::mem::Ram) -> Result<(), Broken>) {
        let mem = self.mem.clone();
        let Some(ram) = mem.ram().filter(|_| self.alive()) else { return };
        let mut outcome = what(&mut *self.device, &mut self.queues, ram);
        for n in 0..self.queues.len() {
            match self.queues[n].take_news(ram) {
                Ok(true) => self.interrupt(self.queue_vectors[n], ISR_QUEUE),
                Ok(false) => {}
                Err(broken) => outcome = Err(broken),
            }
        }
        if outcome.is_err() {
            self.status |= VIRTIO_CONFIG_S_NEEDS_RESET as u8;
            self.config_changed();
        }
    }

    /// The device type.
    pub fn kind(&self) -> u16 {
        self.device.kind()
    }

    /// Bytes from outside; lost before a driver is ready.
    pub fn input(&mut self, bytes: &[u8]) {
        self.work(|device, queues, ram| device.input(bytes, queues, ram));
    }

    /// The terminal behind it has another size.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        if self.device.resize(columns, rows) {
            self.config_changed();
        }
    }

    fn read_structures(&mut self, offset: u64, data: &mut [u8]) {
        match offset & !0xfff {
            COMMON => {
                for (i, b) in data.iter_mut().enumerate() {
                    *b = self.common_byte(offset as usize + i);
                }
            }
            ISR => {
                data.fill(0);
                if offset == ISR
                    && let Some(first) = data.first_mut()
                {
                    // "Reading this register resets it" (4.1.4.5).
                    *first = std::mem::take(&mut self.isr);
                }
            }
            DEVICE_CONFIG => {
                let config = self.device.config();
                let at = (offset - DEVICE_CONFIG) as usize;
                for (i, b) in data.iter_mut().enumerate() {
                    *b = config.get(at + i).copied().unwrap_or(0);
                }
            }
            _ => data.fill(0),
        }
    }

    fn queue(&mut self) -> Option<&mut Virtqueue> {
        self.queues.get_mut(usize::from(self.queue_select))
    }

    /// A byte of the common configuration (4.1.4.3).
    fn common_byte(&self, at: usize) -> u8 {
        let n = usize::from(self.queue_select);
        let ring = self.queues.get(n).map(|q| &q.ring);
        let vector = self.queue_vectors.get(n).copied().unwrap_or(NONE);
        let feature = |features: u64, select: u32| if select < 2 { features >> (32 * select) } else { 0 } & 0xffff_ffff;
        let (start, value) = match at {
            0x00..0x04 => (0x00, u64::from(self.feature_select)),
            0x04..0x08 => (0x04, feature(self.offered(), self.feature_select)),
            0x08..0x0c => (0x08, u64::from(self.driver_feature_select)),
            0x0c..0x10 => (0x0c, feature(self.driver_features, self.driver_feature_select)),
            0x10..0x12 => (0x10, u64::from(self.config_vector)),
            0x12..0x14 => (0x12, self.queues.len() as u64),
            0x14 => (0x14, u64::from(self.status)),
            0x15 => (0x15, u64::from(self.generation)),
            0x16..0x18 => (0x16, u64::from(self.queue_select)),
            0x18..0x1a => (0x18, ring.map_or(0, |r| u64::from(r.size()))),
            0x1a..0x1c => (0x1a, u64::from(vector)),
            0x1c..0x1e => (0x1c, u64::from(ring.is_some_and(|r| r.ready()))),
            0x1e..0x20 => (0x1e, n as u64),
            0x20..0x28 => (0x20, ring.map_or(0, |r| r.desc_table())),
            0x28..0x30 => (0x28, ring.map_or(0, |r| r.avail_ring())),
            0x30..0x38 => (0x30, ring.map_or(0, |r| r.used_ring())),
            _ => return 0,
        };
        value.to_le_bytes()[at - start]
    }

    fn write_structures(&mut self, offset: u64, data: &[u8]) {
        match offset & !0xfff {
            COMMON if data.len() == 8 => {
                let (low, high) = data.split_at(4);
                self.write_common(offset, low);
                self.write_common(offset + 4, high);
            }
            COMMON => self.write_common(offset, data),
            DEVICE_CONFIG => self.device.write_config((offset - DEVICE_CONFIG) as usize, data),
            NOTIFY => {
                let n = (offset - NOTIFY) as usize / MULTIPLIER as usize;
                if n < self.queues.len() {
                    self.work(|device, queues, ram| device.notified(n, queues, ram));
                }
            }
            _ => {}
        }
    }

    /// The vector if there is such a one, else none, by which the driver sees that it is not to be had (4.1.5.1.2).
    fn checked(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.vectors.len() { vector } else { NONE }
    }

    /// "The driver MUST access each field using the natural access method, i.e. 32-bit accesses for 32-bit fields" (4.1.3.1).
    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let v = data.iter().take(4).rev().fold(0u32, |n, b| n << 8 | u32::from(*b));
        match (offset, data.len()) {
            (0x00, 4) => self.feature_select = v,
            (0x08, 4) => self.driver_feature_select = v,
            (0x0c, 4)
                if self.driver_feature_select < 2 && u32::from(self.status) & VIRTIO_CONFIG_S_FEATURES_OK == 0 =>
            {
                let shift = 32 * self.driver_feature_select;
                self.driver_features = self.driver_features & !(0xffff_ffff << shift) | u64::from(v) << shift;
            }
            (0x10, 2) => self.config_vector = self.checked(v as u16),
            (0x14, 1) => self.set_status(v as u8),
            (0x16, 2) => self.queue_select = v as u16,
            (0x1a, 2) => {
                let vector = self.checked(v as u16);
                if let Some(to) = self.queue_vectors.get_mut(usize::from(self.queue_select)) {
                    *to = vector;
                }
            }
            (0x1c, 2) => {
                let event_idx = self.driver_features & mask(VIRTIO_RING_F_EVENT_IDX) != 0;
                // "The driver MUST NOT write a 0 to queue_enable" (4.1.4.3.2).
                if let Some(q) = self.queue().filter(|_| v == 1) {
                    q.ring.set_event_idx(event_idx);
                    q.ring.set_ready(true);
                }
            }
            // A queue that is in use stays where it is.
            (0x18 | 0x20..0x38, _) => {
                if let Some(q) = self.queue().filter(|q| !q.ring.ready()) {
                    match (offset, data.len()) {
                        (0x18, 2) => q.ring.set_size(v as u16),
                        (0x20, 4) => q.ring.set_desc_table_address(Some(v), None),
                        (0x24, 4) => q.ring.set_desc_table_address(None, Some(v)),
                        (0x28, 4) => q.ring.set_avail_ring_address(Some(v), None),
                        (0x2c, 4) => q.ring.set_avail_ring_address(None, Some(v)),
                        (0x30, 4) => q.ring.set_used_ring_address(Some(v), None),
                        (0x34, 4) => q.ring.set_used_ring_address(None, Some(v)),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }

    fn set_status(&mut self, v: u8) {
        if v == 0 {
            return self.reset();
        }
        let (old, mut new) = (u32::from(self.status), u32::from(v));
        // Only the device says that it needs a reset; bits are set and never cleared.
        new = new & !VIRTIO_CONFIG_S_NEEDS_RESET | old;
        if new & !old & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            let known = self.driver_features & !self.offered() == 0;
            if !known || self.driver_features & mask(VIRTIO_F_VERSION_1) == 0 {
                new &= !VIRTIO_CONFIG_S_FEATURES_OK;
            }
        }
        if new & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            new &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.status = new as u8;
        if new & !old & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.device.start(self.driver_features);
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues.iter_mut().for_each(Virtqueue::reset);
        self.queue_vectors.fill(NONE);
        self.config_vector = NONE;
        self.vectors.iter_mut().for_each(|v| v.pending = false);
        (self.feature_select, self.driver_feature_select, self.driver_features) = (0, 0, 0);
        (self.status, self.isr, self.queue_select) = (0, 0, 0);
    }

    fn read_msix(&self, offset: u64, data: &mut [u8]) {
        for (i, b) in data.iter_mut().enumerate() {
            let at = offset + i as u64;
            *b = match self.vectors.get((at / 16) as usize) {
                Some(v) => match at % 16 {
                    n @ 0..8 => v.address.to_le_bytes()[n as usize],
                    n @ 8..12 => v.data.to_le_bytes()[n as usize - 8],
                    n => v.control.to_le_bytes()[n as usize - 12],
                },
                None if at >= PENDING => {
                    let first = (at - PENDING) as usize * 8;
                    let bits = self.vectors.iter().skip(first).take(8).enumerate();
                    bits.fold(0, |byte, (n, v)| byte | u8::from(v.pending) << n)
                }
                None => 0,
            };
        }
    }

    /// "Software must always access the table with DWORD or QWORD accesses" (6.8.2).
    fn write_msix(&mut self, offset: u64, data: &[u8]) {
        if data.len() == 8 {
            let (low, high) = data.split_at(4);
            self.write_msix(offset, low);
            return self.write_msix(offset + 4, high);
        }
        let Ok(&word) = <&[u8; 4]>::try_from(data) else { return };
        let word = u32::from_le_bytes(word);
        let Some(v) = self.vectors.get_mut((offset / 16) as usize) else { return };
        match offset % 16 {
            0 => v.address = v.address & !0xffff_ffff | u64::from(word & !3),
            4 => v.address = v.address & 0xffff_ffff | u64::from(word) << 32,
            8 => v.data = word,
            12 => v.control = word & MASKED,
            _ => {}
        }
        self.send_pending();
    }
}
