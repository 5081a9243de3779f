//! The virtio network device (Virtual I/O Device 1.2, 5.1), without offloads: whole frames, one queue each way.

use super::{Broken, Device, Virtqueue};
use crate::mem::Ram;
use std::io::{Read, Write};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;
use virtio_queue::{Reader, Writer};

/// Network controller, Ethernet.
const CLASS: u32 = 0x02_0000;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Bytes before each frame; the last two of them count the buffers that a frame takes, which is one.
const HEADER: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
/// The largest frame: no offloads, so an Ethernet frame with a tag.
const LARGEST: usize = 1522;

/// What is at the other end of the cable.
pub trait Wire: Send {
    /// A frame from the guest.
    fn send(&mut self, frame: &[u8]);
    /// The next frame for the guest.
    fn receive(&mut self) -> Option<Vec<u8>>;
}

/// A network card.
pub struct Net {
    mac: [u8; 6],
    wire: Box<dyn Wire>,
}

impl Net {
    /// With its address and what it is connected to.
    pub fn new(mac: [u8; 6], wire: Box<dyn Wire>) -> Net {
        Net { mac, wire }
    }

    fn receive(&mut self, queue: &mut Virtqueue, ram: &Ram) -> Result<(), Broken> {
        for _ in 0..queue.turns() {
            let Some(chain) = queue.take(ram)? else { break };
            let Some(frame) = self.wire.receive() else {
                queue.untake();
                break;
            };
            let head = chain.head_index();
            let mut to = Writer::new(ram, chain).map_err(|_| Broken)?;
            // "The driver ... SHOULD populate the receive queue with buffers of at least 1526 bytes" (5.1.6.3.1); what does not fit is lost.
            let len = HEADER.len() + frame.len();
            if len <= to.available_bytes() {
                to.write_all(&HEADER).and_then(|()| to.write_all(&frame)).map_err(|_| Broken)?;
                queue.give_back(ram, head, len as u32)?;
            } else {
                queue.untake();
            }
        }
        Ok(())
    }

    fn transmit(&mut self, queue: &mut Virtqueue, ram: &Ram) -> Result<(), Broken> {
        for _ in 0..queue.turns() {
            let Some(chain) = queue.take(ram)? else { break };
            let head = chain.head_index();
            let mut from = Reader::new(ram, chain).map_err(|_| Broken)?;
            let len = from.available_bytes().checked_sub(HEADER.len()).ok_or(Broken)?;
            if len <= LARGEST {
                let mut frame = vec![0; HEADER.len() + len];
                from.read_exact(&mut frame).map_err(|_| Broken)?;
                self.wire.send(&frame[HEADER.len()..]);
            }
            queue.give_back(ram, head, 0)?;
        }
        Ok(())
    }
}

impl Device for Net {
    fn kind(&self) -> u16 {
        VIRTIO_ID_NET as u16
    }

    fn class(&self) -> u32 {
        CLASS
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC
    }

    fn queues(&self) -> &'static [u16] {
        &[256, 256]
    }

    /// The address; status and others, which are not offered.
    fn config(&self) -> Vec<u8> {
        [&self.mac[..], &[0; 6]].concat()
    }

    fn notified(&mut self, n: usize, queues: &mut [Virtqueue], ram: &Ram) -> Result<(), Broken> {
        if n == TRANSMIT {
            self.transmit(queues.get_mut(TRANSMIT).ok_or(Broken)?, ram)?;
        }
        self.receive(queues.get_mut(RECEIVE).ok_or(Broken)?, ram)
    }

    /// There may be frames for the guest.
    fn input(&mut self, _bytes: &[u8], queues: &mut [Virtqueue], ram: &Ram) -> Result<(), Broken> {
        self.receive(queues.get_mut(RECEIVE).ok_or(Broken)?, ram)
    }
}
