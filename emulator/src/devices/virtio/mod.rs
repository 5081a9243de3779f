//! Virtio devices (Virtual I/O Device 1.2): what is common to all kinds, over the split virtqueues of the virtio-queue crate.
//!
//! A device reads and writes nothing but guest RAM, range by range checked; a driver that breaks the rules gets a device that needs a reset.

pub mod balloon;
pub mod block;
pub mod console;
pub mod net;
pub mod pci;
pub mod rng;

use crate::mem::Ram;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

/// The driver broke the rules: the device stops until it is reset (2.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

/// Buffers that the driver made available.
pub type Chain<'a> = DescriptorChain<&'a Ram>;

/// The most bytes that one chain may ask to move: what a driver asks at once costs bounded time.
pub const LARGEST: usize = 32 << 20;

/// What a device is to the transport.
pub trait Device: Send {
    /// The device type (5): 1 network, 2 block, and so on.
    fn kind(&self) -> u16;
    /// The class code of such a function on PCI.
    fn class(&self) -> u32;
    /// Feature bits of the type; the transport adds its own.
    fn features(&self) -> u64;
    /// The largest size of each queue.
    fn queues(&self) -> &'static [u16];
    /// The configuration, as the driver reads it now.
    fn config(&self) -> Vec<u8>;
    /// The driver writes to the configuration.
    fn write_config(&mut self, _at: usize, _bytes: &[u8]) {}
    /// The driver is ready and has accepted these features.
    fn start(&mut self, _features: u64) {}
    /// The driver says that queue `n` has new buffers.
    ///
    /// # Errors
    /// The driver broke the rules.
    fn notified(&mut self, n: usize, queues: &mut [Virtqueue], ram: &Ram) -> Result<(), Broken>;
    /// Bytes come from outside, for kinds that take any.
    ///
    /// # Errors
    /// The driver broke the rules.
    fn input(&mut self, _bytes: &[u8], _queues: &mut [Virtqueue], _ram: &Ram) -> Result<(), Broken> {
        Ok(())
    }
    /// The terminal behind it has so many columns and rows now: did that change the configuration?
    fn resize(&mut self, _columns: u16, _rows: u16) -> bool {
        false
    }
    /// The device is reset.
    fn reset(&mut self) {}
}

/// One queue.
#[derive(Debug)]
pub struct Virtqueue {
    ring: Queue,
    /// Used buffers since the driver was last told.
    news: bool,
}

impl Virtqueue {
    fn new(size: u16) -> Virtqueue {
        let ring = Queue::new(size).expect("the sizes that devices name are powers of two");
        Virtqueue { ring, news: false }
    }

    /// The next buffers, if any are available.
    ///
    /// # Errors
    /// The rings are outside RAM, misaligned, or claim what cannot be.
    pub fn take<'a>(&mut self, ram: &'a Ram) -> Result<Option<Chain<'a>>, Broken> {
        if !self.ring.ready() {
            return Ok(None);
        }
        Ok(self.ring.iter(ram).map_err(|_| Broken)?.next())
    }

    /// How many buffers are served at one notification: no more can be waiting, unless they are put there by the device itself.
    pub fn turns(&self) -> u16 {
        self.ring.size()
    }

    /// Puts back what was taken last.
    pub fn untake(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Gives buffers back; `len` bytes of them were written.
    ///
    /// # Errors
    /// The ring is outside RAM.
    pub fn give_back(&mut self, ram: &Ram, head: u16, len: u32) -> Result<(), Broken> {
        self.news = true;
        self.ring.add_used(ram, head, len).map_err(|_| Broken)
    }

    /// Is the driver to be told, and wants it to be?
    fn take_news(&mut self, ram: &Ram) -> Result<bool, Broken> {
        if !std::mem::take(&mut self.news) {
            return Ok(false);
        }
        let wanted = self.ring.needs_notification(ram).map_err(|_| Broken)?;
        // The driver may wait with the next notification until this far.
        if self.ring.event_idx_enabled() {
            self.ring.enable_notification(ram).map_err(|_| Broken)?;
        }
        Ok(wanted)
    }

    fn reset(&mut self) {
        self.ring.reset();
        self.news = false;
    }
}
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
