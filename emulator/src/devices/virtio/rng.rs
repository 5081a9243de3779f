//! The virtio entropy device (Virtual I/O Device 1.2, 5.4).

use super::{Broken, Device, LARGEST, Virtqueue};
use crate::mem::Ram;
use std::io::{Read, Write};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::Writer;

/// The most bytes that one chain gets: a driver that wants more asks again.
const MOST: usize = 4096;

/// Random bytes from a source.
pub struct Rng {
    source: Box<dyn Read + Send>,
}

impl Rng {
    /// From a source that never ends: the host's generator, or one that repeats.
    pub fn new(source: Box<dyn Read + Send>) -> Rng {
        Rng { source }
    }
}

impl Device for Rng {
    fn kind(&self) -> u16 {
        VIRTIO_ID_RNG as u16
    }

    fn class(&self) -> u32 {
        0xff_0000
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &'static [u16] {
        &[64]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn notified(&mut self, n: usize, queues: &mut [Virtqueue], ram: &Ram) -> Result<(), Broken> {
        let queue = queues.get_mut(n).ok_or(Broken)?;
        for _ in 0..queue.turns() {
            let Some(chain) = queue.take(ram)? else { break };
            let head = chain.head_index();
            let mut to = Writer::new(ram, chain).map_err(|_| Broken)?;
            let mut bytes = vec![0; to.available_bytes().min(MOST).min(LARGEST)];
            // A source that fails gives nothing: the driver asks again.
            let len = if self.source.read_exact(&mut bytes).is_ok() { bytes.len() } else { 0 };
            to.write_all(&bytes[..len]).map_err(|_| Broken)?;
            queue.give_back(ram, head, len as u32)?;
        }
        Ok(())
    }
}
