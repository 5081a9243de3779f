//! The virtio balloon (Virtual I/O Device 1.2, 5.5): pages that the guest gives up go back to the host.

use super::{Broken, Device, Virtqueue};
use crate::mem::{PAGE_SIZE, Ram};
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::Reader;

/// Memory controller, RAM.
const CLASS: u32 = 0x05_0000;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Page numbers of one chain that count: Linux gives 256 at a time.
const MOST: usize = 4096;
/// The feature that the guest takes pages back when it has no others.
const DEFLATE_ON_OOM: u64 = 1 << 2;

/// What is asked of a balloon and what came of it, for the machine's outside.
#[derive(Debug, Default)]
pub struct Target {
    /// Pages that the guest is asked to give up.
    pub pages: AtomicU32,
    /// Pages that it says it has given up.
    pub given: AtomicU32,
    /// Pages given back to the host since the start.
    pub freed: AtomicU64,
}

/// A balloon.
pub struct Balloon {
    target: Arc<Target>,
}

impl Balloon {
    /// With the target that somebody else sets.
    pub fn new(target: Arc<Target>) -> Balloon {
        Balloon { target }
    }
}

impl Device for Balloon {
    fn kind(&self) -> u16 {
        VIRTIO_ID_BALLOON as u16
    }

    fn class(&self) -> u32 {
        CLASS
    }

    fn features(&self) -> u64 {
        DEFLATE_ON_OOM
    }

    fn queues(&self) -> &'static [u16] {
        &[128, 128]
    }

    fn config(&self) -> Vec<u8> {
        [&self.target.pages, &self.target.given].iter().flat_map(|n| n.load(Ordering::Relaxed).to_le_bytes()).collect()
    }

    fn write_config(&mut self, at: usize, bytes: &[u8]) {
        if let (4, Ok(&given)) = (at, <&[u8; 4]>::try_from(bytes)) {
            self.target.given.store(u32::from_le_bytes(given), Ordering::Relaxed);
        }
    }

    /// Buffers are page numbers, 32 bits each. Pages taken back need nothing done: they are zeros when they are touched.
    fn notified(&mut self, n: usize, queues: &mut [Virtqueue], ram: &Ram) -> Result<(), Broken> {
        let queue = queues.get_mut(n).ok_or(Broken)?;
        if n != INFLATE && n != DEFLATE {
            return Ok(());
        }
        for _ in 0..queue.turns() {
            let Some(chain) = queue.take(ram)? else { break };
            let head = chain.head_index();
            let mut from = Reader::new(ram, chain).map_err(|_| Broken)?;
            let (mut first, mut pages) = (0, 0);
            for _ in 0..MOST {
                let mut number = [0; 4];
                if n == DEFLATE || from.read_exact(&mut number).is_err() {
                    break;
                }
                let number = u64::from(u32::from_le_bytes(number));
                if !ram.contains(number * PAGE_SIZE) {
                    return Err(Broken);
                }
                // Neighbours are given back together.
                match number {
                    _ if pages > 0 && number == first + pages => pages += 1,
                    _ if pages > 0 && number + 1 == first => (first, pages) = (number, pages + 1),
                    _ => {
                        self.give(ram, first, pages);
                        (first, pages) = (number, 1);
                    }
                }
            }
            self.give(ram, first, pages);
            queue.give_back(ram, head, 0)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.target.given.store(0, Ordering::Relaxed);
    }
}

impl Balloon {
    fn give(&self, ram: &Ram, first: u64, pages: u64) {
        if pages > 0 && ram.give_back(first * PAGE_SIZE, pages * PAGE_SIZE).is_ok() {
            self.target.freed.fetch_add(pages, Ordering::Relaxed);
        }
    }
}
