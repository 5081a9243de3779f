//! Packet commands of a CD-ROM drive (ATA/ATAPI-6, T13 1410D, 9.8; MMC-3, T10 1363D; SPC-2, T10 1236D).

use super::{Drive, Phase, REASON_COMMAND, REASON_TO_HOST, status};

/// Bytes of a block of data.
const BLOCK: u64 = 2048;
/// The longest part of a transfer of many blocks that is held at once, a multiple of a block.
const PART: u64 = 32 * BLOCK;
/// READ CD's raw sector begins with these: the synchronization field.
const SYNC: usize = 12;

/// Why the last command failed: sense key and additional sense code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sense {
    key: u8,
    code: u8,
}

const MEDIUM_ERROR: Sense = Sense { key: 3, code: 0x11 };
const NO_SUCH_COMMAND: Sense = Sense { key: 5, code: 0x20 };
const OUT_OF_RANGE: Sense = Sense { key: 5, code: 0x21 };
const BAD_FIELD: Sense = Sense { key: 5, code: 0x24 };

/// What a packet command comes to.
enum Outcome {
    Done,
    /// These bytes for the host.
    Data(Vec<u8>),
    /// Blocks for the host: the first byte on the disk, and how many bytes.
    Blocks(u64, u64),
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn dword(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) << 16 | u32::from(word(bytes, at + 2))
}

/// Minutes, seconds and frames of a block address, which begin two seconds before block 0.
fn msf(block: u32) -> [u8; 4] {
    let frames = block.saturating_add(150);
    [0, (frames / 75 / 60) as u8, (frames / 75 % 60) as u8, (frames % 75) as u8]
}

impl Drive {
    /// PACKET: the drive waits for the 12 bytes.
    pub(super) fn start_packet(&mut self) {
        self.packet = [0; 12];
        self.request(Phase::Packet, false);
        self.task.count[0] = REASON_COMMAND;
    }

    fn blocks(&self) -> u32 {
        u32::try_from(self.disk().size() / BLOCK).unwrap_or(u32::MAX)
    }

    /// The packet is there.
    pub(super) fn run_packet(&mut self) {
        match self.packet_command() {
            Ok(Outcome::Done) => self.end_packet(Sense::default()),
            Ok(Outcome::Data(bytes)) if bytes.is_empty() => self.end_packet(Sense::default()),
            Ok(Outcome::Data(bytes)) => {
                self.buffer = bytes;
                self.send_packet_data(0);
            }
            Ok(Outcome::Blocks(_, 0)) => self.end_packet(Sense::default()),
            Ok(Outcome::Blocks(at, len)) => {
                self.from = at;
                self.fetch(len);
            }
            Err(sense) => self.end_packet(sense),
        }
    }

    /// Does the bus master move the data of this command?
    fn is_dma(&self) -> bool {
        self.task.features[0] & 1 != 0
    }

    /// The next blocks into the buffer: for the bus master all, at most 65,535 (128 MiB).
    fn fetch(&mut self, left: u64) {
        let len = if self.is_dma() { left } else { left.min(PART) };
        let mut buffer = vec![0; len as usize];
        let read = self.disk().read(self.from, &mut buffer);
        self.buffer = buffer;
        self.from += len;
        match read {
            Ok(()) => self.send_packet_data(left - len),
            Err(_) => self.end_packet(MEDIUM_ERROR),
        }
    }

    /// The buffer goes to the host; after it come `left` more bytes of the disk.
    fn send_packet_data(&mut self, left: u64) {
        self.task.count[0] = REASON_TO_HOST;
        if self.is_dma() {
            self.request(Phase::PacketDma, false);
        } else {
            self.request(Phase::PacketToHost { left }, false);
            self.next_burst();
        }
    }

    /// So many bytes as the host said it takes at a time.
    fn next_burst(&mut self) {
        let asked = usize::from(self.task.address[1][0]) | usize::from(self.task.address[2][0]) << 8;
        let most = match asked {
            0 | 0xffff => 0xfffe,
            n => n,
        };
        let rest = self.buffer.len() - self.next;
        // A part that is not the last has an even length.
        let burst = if rest > most { (most & !1).max(2).min(rest) } else { rest };
        self.limit = self.next + burst;
        self.task.address[1][0] = burst as u8;
        self.task.address[2][0] = (burst >> 8) as u8;
        self.task.count[0] = REASON_TO_HOST;
        self.status = status::READY | status::SEEK_COMPLETE | status::DATA_REQUEST;
        self.interrupt = true;
    }

    /// The host has taken what it was told of.
    pub(super) fn next_part_to_host(&mut self, left: u64) {
        if self.next < self.buffer.len() {
            self.next_burst();
        } else if left > 0 {
            self.fetch(left);
        } else {
            self.end_packet(Sense::default());
        }
    }

    /// The command is over.
    pub(super) fn end_packet(&mut self, sense: Sense) {
        self.done();
        self.task.count[0] = REASON_COMMAND | REASON_TO_HOST;
        self.sense = sense;
        if sense.key != 0 {
            self.error = sense.key << 4 | super::error::ABORTED;
            self.status |= status::ERROR;
        }
    }

    fn packet_command(&mut self) -> Result<Outcome, Sense> {
        let p = self.packet;
        let cut = |mut bytes: Vec<u8>, most: usize| {
            bytes.truncate(most);
            Ok(Outcome::Data(bytes))
        };
        match p[0] {
            // TEST UNIT READY, START STOP UNIT, PREVENT ALLOW MEDIUM REMOVAL, SEEK, SET CD SPEED.
            0x00 | 0x1b | 0x1e | 0x2b | 0xbb => Ok(Outcome::Done),
            0x03 => {
                let Sense { key, code } = std::mem::take(&mut self.sense);
                let mut bytes = vec![0; 18];
                (bytes[0], bytes[2], bytes[7], bytes[12]) = (0x70, key, 10, code);
                cut(bytes, usize::from(p[4]))
            }
            0x12 => {
                let mut bytes = vec![5, 0x80, 0, 0x21, 31, 0, 0, 0];
                bytes.extend(b"Bivisor CD-ROM          0.1 ");
                cut(bytes, usize::from(p[4]))
            }
            0x1a => cut(mode_pages(p[2] & 0x3f, 4)?, usize::from(p[4])),
            0x5a => cut(mode_pages(p[2] & 0x3f, 8)?, usize::from(word(&p, 7))),
            0x25 => {
                let mut bytes = self.blocks().saturating_sub(1).to_be_bytes().to_vec();
                bytes.extend((BLOCK as u32).to_be_bytes());
                Ok(Outcome::Data(bytes))
            }
            0x28 => self.read_blocks(dword(&p, 2), u32::from(word(&p, 7))),
            0xa8 => self.read_blocks(dword(&p, 2), dword(&p, 6)),
            0xbe => self.read_cd(),
            0x43 => cut(self.contents()?, usize::from(word(&p, 7))),
            0x46 => {
                // Profile list with CD-ROM, which is current.
                let mut bytes = vec![0, 0, 0, 0x0c, 0, 0, 0, 8];
                bytes.extend([0, 0, 3, 4, 0, 8, 1, 0]);
                cut(bytes, usize::from(word(&p, 7)))
            }
            // GET EVENT STATUS NOTIFICATION, polled: the medium is there and nothing has changed.
            0x4a if p[1] & 1 != 0 => cut(vec![0, 6, 4, 0x10, 0, 2, 0, 0], usize::from(word(&p, 7))),
            0x4a => Err(BAD_FIELD),
            // READ DISC INFORMATION: finished, one session, one track.
            0x51 => {
                let mut bytes = vec![0; 34];
                (bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]) = (32, 0x0e, 1, 1, 1, 1, 0x20);
                cut(bytes, usize::from(word(&p, 7)))
            }
            _ => Err(NO_SUCH_COMMAND),
        }
    }

    fn read_blocks(&self, first: u32, count: u32) -> Result<Outcome, Sense> {
        if u64::from(first) + u64::from(count) > u64::from(self.blocks()) {
            return Err(OUT_OF_RANGE);
        }
        if count > 0xffff {
            return Err(BAD_FIELD);
        }
        Ok(Outcome::Blocks(u64::from(first) * BLOCK, u64::from(count) * BLOCK))
    }

    /// READ CD: the user data alone, or the whole sector of 2352 bytes (MMC-3 6.1.15; ECMA-130 14).
    fn read_cd(&self) -> Result<Outcome, Sense> {
        let p = &self.packet;
        let (first, count) = (dword(p, 2), dword(p, 5) & 0xff_ffff);
        match (p[9] & 0xf8, count) {
            (0, _) | (_, 0) => Ok(Outcome::Done),
            (0x10, _) => self.read_blocks(first, count),
            (0xf8, 1..=32) => {
                let Outcome::Blocks(at, _) = self.read_blocks(first, count)? else { return Err(BAD_FIELD) };
                let mut bytes = Vec::new();
                for n in 0..count {
                    let mut sector = vec![0; 2352];
                    sector[1..SYNC - 1].fill(0xff);
                    let [_, minute, second, frame] = msf(first + n);
                    sector[SYNC..SYNC + 4].copy_from_slice(&[bcd(minute), bcd(second), bcd(frame), 1]);
                    let data =
                        self.disk().read(at + u64::from(n) * BLOCK, &mut sector[SYNC + 4..SYNC + 4 + BLOCK as usize]);
                    data.map_err(|_| MEDIUM_ERROR)?;
                    bytes.extend(sector);
                }
                Ok(Outcome::Data(bytes))
            }
            _ => Err(BAD_FIELD),
        }
    }

    /// READ TOC/PMA/ATIP: one data track.
    fn contents(&self) -> Result<Vec<u8>, Sense> {
        let p = &self.packet;
        let (in_time, from) = (p[1] & 2 != 0, p[6]);
        let address = |block: u32| if in_time { msf(block) } else { block.to_be_bytes() };
        // The format is in the low bits of byte 2, or by older drives in the top bits of byte 9.
        match if p[2] & 15 != 0 { p[2] & 15 } else { p[9] >> 6 } {
            0 => {
                if from > 1 && from != 0xaa {
                    return Err(BAD_FIELD);
                }
                let mut bytes = vec![0, 0, 1, 1];
                if from <= 1 {
                    bytes.extend([0, 0x14, 1, 0]);
                    bytes.extend(address(0));
                }
                bytes.extend([0, 0x16, 0xaa, 0]);
                bytes.extend(address(self.blocks()));
                bytes[1] = bytes.len() as u8 - 2;
                Ok(bytes)
            }
            // Sessions: one.
            1 => {
                let mut bytes = vec![0, 10, 1, 1, 0, 0x14, 1, 0];
                bytes.extend(address(0));
                Ok(bytes)
            }
            // Raw: first track, last track, lead-out, and the track itself.
            2 => {
                let mut bytes = vec![0, 0, 1, 1];
                for (point, place) in
                    [(0xa0, [0, 1, 0, 0]), (0xa1, [0, 1, 0, 0]), (0xa2, msf(self.blocks())), (1, msf(0))]
                {
                    bytes.extend([1, 0x14, 0, point, 0, 0, 0]);
                    bytes.extend(place);
                }
                bytes[1] = bytes.len() as u8 - 2;
                Ok(bytes)
            }
            _ => Err(BAD_FIELD),
        }
    }
}

fn bcd(v: u8) -> u8 {
    crate::devices::bcd(v % 100)
}

/// MODE SENSE: error recovery and capabilities, behind a header of 4 or 8 bytes.
fn mode_pages(page: u8, header: usize) -> Result<Vec<u8>, Sense> {
    let mut body = Vec::new();
    if matches!(page, 1 | 0x3f) {
        body.extend([1, 6, 0, 5, 0, 0, 0, 0]);
    }
    if matches!(page, 0x2a | 0x3f) {
        // Reads CD-R, a tray that locks and opens, 4 MB/s, no audio.
        body.extend([0x2a, 18, 3, 0, 0, 0, 0x29, 0, 0x16, 0x0c, 0, 0, 1, 0, 0x16, 0x0c, 0, 0, 0, 0]);
    }
    if body.is_empty() {
        return Err(BAD_FIELD);
    }
    let len = header + body.len();
    let mut bytes = vec![0; header];
    match header {
        4 => (bytes[0], bytes[1]) = (len as u8 - 1, 1),
        _ => (bytes[1], bytes[2]) = (len as u8 - 2, 1),
    }
    bytes.extend(body);
    Ok(bytes)
}
