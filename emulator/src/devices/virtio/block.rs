//! The virtio block device (Virtual I/O Device 1.2, 5.2).

use super::{Broken, Chain, Device, LARGEST, Virtqueue};
use crate::devices::disk::{Disk, SECTOR};
use crate::mem::Ram;
use std::io::{Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Reader, Writer};

/// Mass storage, other.
const CLASS: u32 = 0x01_8000;
const QUEUE: u16 = 256;
/// Bytes moved at a time.
const PIECE: usize = 1 << 16;

/// A disk.
pub struct Block {
    disk: Arc<Mutex<Disk>>,
    /// What the driver reads as the disk's serial number.
    serial: String,
    piece: Vec<u8>,
}

impl Block {
    /// For a disk that is known by a name (at most 20 bytes of it).
    pub fn new(disk: Arc<Mutex<Disk>>, serial: &str) -> Block {
        Block { disk, serial: serial.to_owned(), piece: vec![0; PIECE] }
    }

    fn disk(disk: &Mutex<Disk>) -> std::sync::MutexGuard<'_, Disk> {
        disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries out one request: header (type, reserved, sector), data, a byte for the status. Gives the bytes written to the buffers.
    fn request(&mut self, chain: Chain<'_>, ram: &Ram) -> Result<u32, Broken> {
        let mut from = Reader::new(ram, chain.clone()).map_err(|_| Broken)?;
        let mut to = Writer::new(ram, chain).map_err(|_| Broken)?;
        let mut header = [0; 16];
        from.read_exact(&mut header).map_err(|_| Broken)?;
        // The status is the last byte that can be written.
        let room = to.available_bytes().checked_sub(1).ok_or(Broken)?;
        let mut status = to.split_at(room).map_err(|_| Broken)?;
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = header[8..].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let mut disk = Block::disk(&self.disk);
        let outcome = match kind {
            VIRTIO_BLK_T_IN => read(&mut disk, &mut self.piece, sector, &mut to, room),
            VIRTIO_BLK_T_OUT => {
                let n = from.available_bytes();
                write(&mut disk, &mut self.piece, sector, &mut from, n)
            }
            VIRTIO_BLK_T_FLUSH => disk.flush().map_err(|_| VIRTIO_BLK_S_IOERR),
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                self.serial.bytes().zip(&mut id).for_each(|(b, to)| *to = b);
                to.write_all(&id[..room.min(id.len())]).map_err(|_| VIRTIO_BLK_S_IOERR)
            }
            _ => Err(VIRTIO_BLK_S_UNSUPP),
        };
        let code = outcome.map_or_else(|code| code, |()| VIRTIO_BLK_S_OK);
        status.write_all(&[code as u8]).map_err(|_| Broken)?;
        Ok(to.bytes_written() as u32 + 1)
    }
}

/// The place on the disk, if the request is whole sectors of it and not too many.
fn place(sector: u64, len: usize) -> Result<u64, u32> {
    let at = sector.checked_mul(SECTOR).ok_or(VIRTIO_BLK_S_IOERR)?;
    if len > LARGEST || !len.is_multiple_of(SECTOR as usize) { Err(VIRTIO_BLK_S_IOERR) } else { Ok(at) }
}

fn read(disk: &mut Disk, piece: &mut [u8], sector: u64, to: &mut impl Write, mut len: usize) -> Result<(), u32> {
    let mut at = place(sector, len)?;
    while len > 0 {
        let n = len.min(piece.len());
        disk.read(at, &mut piece[..n]).map_err(|_| VIRTIO_BLK_S_IOERR)?;
        to.write_all(&piece[..n]).map_err(|_| VIRTIO_BLK_S_IOERR)?;
        at += n as u64;
        len -= n;
    }
    Ok(())
}

fn write(disk: &mut Disk, piece: &mut [u8], sector: u64, from: &mut impl Read, mut len: usize) -> Result<(), u32> {
    let mut at = place(sector, len)?;
    while len > 0 {
        let n = len.min(piece.len());
        from.read_exact(&mut piece[..n]).map_err(|_| VIRTIO_BLK_S_IOERR)?;
        disk.write(at, &piece[..n]).map_err(|_| VIRTIO_BLK_S_IOERR)?;
        at += n as u64;
        len -= n;
    }
    Ok(())
}

impl Device for Block {
    fn kind(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn class(&self) -> u32 {
        CLASS
    }

    fn features(&self) -> u64 {
        let read_only = u64::from(Block::disk(&self.disk).is_read_only());
        1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH | read_only << VIRTIO_BLK_F_RO
    }

    fn queues(&self) -> &'static [u16] {
        &[QUEUE]
    }

    /// Capacity in sectors; the largest segment, which is not offered; segments in a request (header and status take two); geometry, which is
    /// not offered; the size of a block.
    fn config(&self) -> Vec<u8> {
        let mut c = (Block::disk(&self.disk).size() / SECTOR).to_le_bytes().to_vec();
        c.extend([0; 4]);
        c.extend((u32::from(QUEUE) - 2).to_le_bytes());
        c.extend([0; 4]);
        c.extend((SECTOR as u32).to_le_bytes());
        c
    }

    fn notified(&mut self, n: usize, queues: &mut [Virtqueue], ram: &Ram) -> Result<(), Broken> {
        let queue = queues.get_mut(n).ok_or(Broken)?;
        for _ in 0..queue.turns() {
            let Some(chain) = queue.take(ram)? else { break };
            let head = chain.head_index();
            let written = self.request(chain, ram)?;
            queue.give_back(ram, head, written)?;
        }
        Ok(())
    }
}
