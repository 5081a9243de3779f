//! The virtio console with one port (Virtual I/O Device 1.2, 5.3): /dev/hvc0 of a Linux guest.

use super::{Broken, Device, Virtqueue};
use crate::mem::Ram;
use std::collections::VecDeque;
use std::io::{Read, Write};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_queue::{Reader, Writer};

/// Communication controller, other.
const CLASS: u32 = 0x07_8000;
/// Columns and rows are in the configuration (5.3.3).
const VIRTIO_CONSOLE_F_SIZE: u64 = 1;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Bytes from outside that wait at most; what is more is lost, as on a line.
const MOST: usize = 1 << 16;
/// Bytes passed on at a time.
const PIECE: usize = 4096;

/// A console.
pub struct Console {
    to: Box<dyn Write + Send>,
    waiting: VecDeque<u8>,
    /// Columns and rows of the terminal behind it, if it is one.
    size: Option<(u16, u16)>,
}

impl Console {
    /// With a way out for what the guest writes.
    pub fn new(to: Box<dyn Write + Send>) -> Console {
        Console { to, waiting: VecDeque::new(), size: None }
    }

    /// The way out is a terminal of so many columns and rows.
    pub fn on_terminal(self, columns: u16, rows: u16) -> Console {
        Console { size: Some((columns, rows)), ..self }
    }

    fn receive(&mut self, queue: &mut Virtqueue, ram: &Ram) -> Result<(), Broken> {
        while !self.waiting.is_empty() {
            let Some(chain) = queue.take(ram)? else { break };
            let head = chain.head_index();
            let mut to = Writer::new(ram, chain).map_err(|_| Broken)?;
            let n = to.available_bytes().min(self.waiting.len());
            let bytes: Vec<u8> = self.waiting.drain(..n).collect();
            to.write_all(&bytes).map_err(|_| Broken)?;
            queue.give_back(ram, head, n as u32)?;
            // Buffers without room take nothing; they cannot keep us here.
            if n == 0 {
                break;
            }
        }
        Ok(())
    }

    fn transmit(&mut self, queue: &mut Virtqueue, ram: &Ram) -> Result<(), Broken> {
        let mut piece = [0; PIECE];
        for _ in 0..queue.turns() {
            let Some(chain) = queue.take(ram)? else { break };
            let head = chain.head_index();
            let mut from = Reader::new(ram, chain).map_err(|_| Broken)?.take(super::LARGEST as u64);
            while let Ok(n @ 1..) = from.read(&mut piece) {
                // Whoever reads it may have gone: the guest does not notice.
                let _ = self.to.write_all(&piece[..n]);
            }
            let _ = self.to.flush();
            queue.give_back(ram, head, 0)?;
        }
        Ok(())
    }
}

impl Device for Console {
    fn kind(&self) -> u16 {
        VIRTIO_ID_CONSOLE as u16
    }

    fn class(&self) -> u32 {
        CLASS
    }

    fn features(&self) -> u64 {
        if self.size.is_some() { VIRTIO_CONSOLE_F_SIZE } else { 0 }
    }

    fn queues(&self) -> &'static [u16] {
        &[64, 64]
    }

    /// Columns, rows; ports and emergency write are not offered.
    fn config(&self) -> Vec<u8> {
        let (columns, rows) = self.size.unwrap_or_default();
        [columns, rows, 0, 0, 0, 0].into_iter().flat_map(u16::to_le_bytes).collect()
    }

    fn resize(&mut self, columns: u16, rows: u16) -> bool {
        let size = self.size.map(|_| (columns, rows));
        std::mem::replace(&mut self.size, size) != size
    }

    fn notified(&mut self, n: usize, queues: &mut [Virtqueue], ram: &Ram) -> Result<(), Broken> {
        let queue = queues.get_mut(n).ok_or(Broken)?;
        match n {
            RECEIVE => self.receive(queue, ram),
            TRANSMIT => self.transmit(queue, ram),
            _ => Ok(()),
        }
    }

    fn input(&mut self, bytes: &[u8], queues: &mut [Virtqueue], ram: &Ram) -> Result<(), Broken> {
        let room = MOST - self.waiting.len();
        self.waiting.extend(bytes.iter().take(room));
        let queue = queues.get_mut(RECEIVE).ok_or(Broken)?;
        self.receive(queue, ram)
    }

    fn reset(&mut self) {
        self.waiting.clear();
    }
}
