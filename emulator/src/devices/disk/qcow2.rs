//! qcow2 images, versions 2 and 3 (QEMU's docs/interop/qcow2.txt): two levels of tables, compressed clusters, backing files. What is written
//! for the first time goes into a new cluster at the end of the file, counted before a table refers to it: whenever bivisor dies, the image is
//! whole but for clusters that nobody uses.

use super::counts::Counts;
use super::{Disk, Format, Options, read_padded};
use flate2::{Decompress, FlushDecompress};
use std::fs::File;
use std::io::{Error, ErrorKind, Result as IoResult};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// How an image begins.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Images that may be behind one another.
const DEEPEST: u32 = 8;
/// Bytes of a first-level table (QEMU allows as much).
const LARGEST_L1: u64 = 32 << 20;
/// Second-level tables that are kept.
const KEPT: usize = 64;

/// Bits of an entry: the host's offset; a compressed cluster; a cluster of zeros.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Of both tables: referred to once, so it may be written in place.
const COPIED: u64 = 1 << 63;

/// Incompatible features: bit 0, refcounts may be wrong, which does not matter to a reader; bit 3, the header names the compression.
const FEATURE_DIRTY: u64 = 1;
const FEATURE_CORRUPT: u64 = 1 << 1;
const FEATURE_DATA_FILE: u64 = 1 << 2;
const FEATURE_COMPRESSION: u64 = 1 << 3;
const FEATURE_EXTENDED_L2: u64 = 1 << 4;

/// The header extension that names the backing file's format.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// An image.
#[derive(Debug)]
pub struct Qcow2 {
    file: File,
    length: u64,
    version: u32,
    cluster_bits: u32,
    size: u64,
    l1: Vec<u64>,
    l1_at: u64,
    /// There if it is written.
    counts: Option<Counts>,
    /// Second-level tables by their offset, the last used first.
    l2: Vec<(u64, Box<[u64]>)>,
    /// The compressed cluster that was read last, by its entry.
    unpacked: Option<(u64, Vec<u8>)>,
    backing: Option<Box<Disk>>,
}

/// Where a cluster's bytes are.
enum Place {
    Backing,
    Zeros,
    At(u64),
    Packed(u64),
}

/// An error of an image that contradicts itself.
pub fn damaged(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("the qcow2 image is damaged: {what}"))
}

/// A big-endian word; 0 beyond the end.
pub fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
}

/// As [`be32`], of 64 bits.
pub fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

/// A table of big-endian words.
pub fn table(file: &File, at: u64, entries: usize) -> IoResult<Vec<u64>> {
    let mut bytes = vec![0; entries * 8];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes.as_chunks().0.iter().map(|b| u64::from_be_bytes(*b)).collect())
}

impl Qcow2 {
    /// Reads header and first table, to `write` also the reference counts. `path` is where the backing file is looked for; `depth` is how many
    /// images are in front.
    pub fn open(file: File, length: u64, path: &Path, depth: u32, write: bool) -> Result<Qcow2, String> {
        let mut header = [0; 112];
        read_padded(&file, 0, &mut header).map_err(|e| e.to_string())?;
        if header[..4] != MAGIC {
            return Err("not a qcow2 image: it does not begin with QFI\\xfb".into());
        }
        let version = be32(&header, 4);
        if !matches!(version, 2 | 3) {
            return Err(format!("a qcow2 image of version {version}; 2 and 3 can be read"));
        }
        let header_length = if version == 2 { 72 } else { be32(&header, 100).max(104) };
        if length < u64::from(header_length) {
            return Err(format!("the qcow2 image is truncated: {length} bytes are less than its header"));
        }
        if version == 3 {
            check_features(be64(&header, 72), header[104])?;
        }
        if be32(&header, 32) != 0 {
            return Err("the qcow2 image is encrypted, which is not built".into());
        }
        let cluster_bits = be32(&header, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(format!("the qcow2 image is damaged: clusters of 2^{cluster_bits} bytes"));
        }
        let size = be64(&header, 24);
        let (l1_entries, l1_at) = (u64::from(be32(&header, 36)), be64(&header, 40));
        // An entry of the first table stands for a table of one cluster.
        let needed = size.div_ceil(1 << (2 * cluster_bits - 3));
        if l1_entries < needed || l1_entries * 8 > LARGEST_L1 {
            return Err(format!("the qcow2 image is damaged: {l1_entries} first-level entries for {size} bytes"));
        }
        if l1_at.checked_add(l1_entries * 8).is_none_or(|end| end > length) {
            return Err(format!("the qcow2 image is truncated: its first table is beyond the file's {length} bytes"));
        }
        let l1 = table(&file, l1_at, l1_entries as usize).map_err(|e| e.to_string())?;
        let backing = backing_file(&file, &header, u64::from(header_length), 1 << cluster_bits)?;
        let backing = match backing {
            None => None,
            Some(_) if depth >= DEEPEST => return Err(format!("more than {DEEPEST} images are behind one another")),
            Some((name, None)) => {
                let advice = format!("say it with `qemu-img rebase -u -b {name} -F raw` (or qcow2)");
                return Err(format!("the qcow2 image does not say its backing file's format; {advice}"));
            }
            Some((name, format)) => {
                let place = path.parent().unwrap_or(Path::new("")).join(&name);
                let options = Options { format, read_only: true, ..Options::default() };
                let disk = Disk::open_backed(&place, options, depth + 1);
                Some(Box::new(disk.map_err(|e| format!("its backing file {}: {e}", place.display()))?))
            }
        };
        let counts = if write { Some(Counts::open(&file, length, &header)?) } else { None };
        let (l2, unpacked) = (Vec::new(), None);
        Ok(Qcow2 { file, length, version, cluster_bits, size, l1, l1_at, counts, l2, unpacked, backing })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The second-level table at a place.
    fn second(&mut self, at: u64) -> IoResult<&mut [u64]> {
        if let Some(i) = self.l2.iter().position(|(place, _)| *place == at) {
            self.l2[..=i].rotate_right(1);
        } else {
            if at.checked_add(self.cluster()).is_none_or(|end| end > self.length) || !at.is_multiple_of(self.cluster())
            {
                return Err(damaged("a second-level table is beyond its end or misplaced"));
            }
            let entries = table(&self.file, at, self.cluster() as usize / 8)?;
            self.l2.truncate(KEPT - 1);
            self.l2.insert(0, (at, entries.into()));
        }
        Ok(&mut self.l2[0].1)
    }

    /// Writes bytes inside the disk.
    pub fn write(&mut self, mut at: u64, mut from: &[u8]) -> IoResult<()> {
        while !from.is_empty() {
            let inside = at & (self.cluster() - 1);
            let (here, rest) = from.split_at(from.len().min((self.cluster() - inside) as usize));
            self.write_cluster(at - inside, inside as usize, here)?;
            from = rest;
            at += here.len() as u64;
        }
        Ok(())
    }

    /// Writes bytes into the cluster of the disk that begins at `at`.
    fn write_cluster(&mut self, at: u64, inside: usize, bytes: &[u8]) -> IoResult<()> {
        let second = self.own_second(at)?;
        let index = ((at >> self.cluster_bits) & (self.cluster() / 8 - 1)) as usize;
        let entry = self.second(second)?[index];
        let zero = self.version >= 3 && entry & ZERO != 0;
        let own = entry & (COPIED | COMPRESSED) == COPIED && entry & OFFSET != 0;
        if own && !zero {
            let place = entry & OFFSET;
            if place >= self.length {
                return Err(damaged("a cluster is beyond its end"));
            }
            return self.file.write_all_at(bytes, place + inside as u64);
        }
        // What is not written of a new cluster is as before.
        let mut whole = vec![0; self.cluster() as usize];
        if bytes.len() < whole.len() {
            self.read(at, &mut whole)?;
        }
        whole[inside..inside + bytes.len()].copy_from_slice(bytes);
        let place = if own { entry & OFFSET } else { self.take()? };
        self.file.write_all_at(&whole, place)?;
        let new = place | COPIED;
        self.file.write_all_at(&new.to_be_bytes(), second + 8 * index as u64)?;
        self.second(second)?[index] = new;
        if entry & COMPRESSED != 0 {
            let (at, len) = self.packed(entry & (COMPRESSED - 1));
            let Some(counts) = &mut self.counts else { return Ok(()) };
            counts.release(&self.file, at, len)?;
        }
        Ok(())
    }

    /// The place of the second-level table for an address, which is nobody else's; a new one if there is none yet.
    fn own_second(&mut self, at: u64) -> IoResult<u64> {
        let index = (at >> (2 * self.cluster_bits - 3)) as usize;
        let entry = *self.l1.get(index).ok_or(ErrorKind::InvalidInput)?;
        if entry & OFFSET != 0 && entry & COPIED != 0 {
            return Ok(entry & OFFSET);
        }
        let content = match entry & OFFSET {
            0 => vec![0; self.cluster() as usize / 8],
            shared => self.second(shared)?.to_vec(),
        };
        let place = self.take()?;
        let bytes: Vec<u8> = content.iter().flat_map(|e| e.to_be_bytes()).collect();
        self.file.write_all_at(&bytes, place)?;
        let new = place | COPIED;
        self.file.write_all_at(&new.to_be_bytes(), self.l1_at + 8 * index as u64)?;
        self.l1[index] = new;
        Ok(place)
    }

    fn take(&mut self) -> IoResult<u64> {
        let counts = self.counts.as_mut().ok_or(ErrorKind::ReadOnlyFilesystem)?;
        let place = counts.take(&self.file)?;
        self.length = self.length.max(place + self.cluster());
        Ok(place)
    }

    /// What was written so far reaches the host's disk.
    pub fn flush(&self) -> IoResult<()> {
        self.file.sync_data()
    }

    /// Place and length of a compressed cluster: the place in the lower bits of its entry, above them the number of further sectors that it
    /// reaches into.
    fn packed(&self, entry: u64) -> (u64, u64) {
        let bits = 62 - (self.cluster_bits - 8);
        let at = entry & ((1 << bits) - 1);
        (at, ((entry >> bits) + 1) * 512 - (at & 511))
    }

    fn place(&mut self, at: u64) -> IoResult<Place> {
        let number = at >> self.cluster_bits;
        let bits = self.cluster_bits - 3;
        let first = self.l1.get((number >> bits) as usize).map_or(0, |e| e & OFFSET);
        if first == 0 {
            return Ok(Place::Backing);
        }
        let index = (number & ((1 << bits) - 1)) as usize;
        let entry = self.second(first)?.get(index).copied().unwrap_or(0);
        if entry & COMPRESSED != 0 {
            return Ok(Place::Packed(entry & (COMPRESSED - 1)));
        }
        if self.version >= 3 && entry & ZERO != 0 {
            return Ok(Place::Zeros);
        }
        match entry & OFFSET {
            0 => Ok(Place::Backing),
            at if at < self.length => Ok(Place::At(at)),
            _ => Err(damaged("a cluster is beyond its end")),
        }
    }

    /// Reads bytes inside the disk; what is beyond its size (the rest of the last sector) is zeros.
    pub fn read(&mut self, mut at: u64, mut to: &mut [u8]) -> IoResult<()> {
        while !to.is_empty() {
            let inside = at & (self.cluster() - 1);
            let n = to.len().min((self.cluster() - inside) as usize);
            let (here, rest) = to.split_at_mut(n);
            match self.place(at)? {
                Place::Zeros => here.fill(0),
                Place::At(place) => read_padded(&self.file, place + inside, here)?,
                Place::Packed(entry) => {
                    let cluster = self.unpack(entry)?;
                    here.copy_from_slice(&cluster[inside as usize..inside as usize + n]);
                }
                Place::Backing => self.read_backing(at, here)?,
            }
            to = rest;
            at += n as u64;
        }
        Ok(())
    }

    /// What is behind; it may be shorter.
    fn read_backing(&mut self, at: u64, to: &mut [u8]) -> IoResult<()> {
        let Some(disk) = &mut self.backing else {
            to.fill(0);
            return Ok(());
        };
        let there = disk.size().saturating_sub(at).min(to.len() as u64) as usize;
        to[there..].fill(0);
        if there == 0 { Ok(()) } else { disk.read(at, &mut to[..there]) }
    }

    /// A compressed cluster.
    fn unpack(&mut self, entry: u64) -> IoResult<&[u8]> {
        if self.unpacked.as_ref().is_none_or(|(e, _)| *e != entry) {
            let (at, len) = self.packed(entry);
            if at >= self.length {
                return Err(damaged("a compressed cluster is beyond its end"));
            }
            let mut packed = vec![0; len as usize];
            read_padded(&self.file, at, &mut packed)?;
            let mut bytes = vec![0; self.cluster() as usize];
            let mut inflate = Decompress::new(false);
            // The padding after the data may look like more: what counts is that the cluster became full.
            let done = inflate.decompress(&packed, &mut bytes, FlushDecompress::Finish);
            if done.is_err() || inflate.total_out() != self.cluster() {
                return Err(damaged("a compressed cluster does not unpack"));
            }
            self.unpacked = Some((entry, bytes));
        }
        Ok(self.unpacked.as_ref().map_or(&[], |(_, bytes)| bytes))
    }
}

fn check_features(incompatible: u64, compression: u8) -> Result<(), String> {
    let known = FEATURE_DIRTY | FEATURE_COMPRESSION;
    let what = match incompatible {
        n if n & FEATURE_CORRUPT != 0 => "says that it is corrupt; repair it first",
        n if n & FEATURE_DATA_FILE != 0 => "keeps its data in another file, which is not built",
        n if n & FEATURE_EXTENDED_L2 != 0 => "has subclusters, which are not built",
        n if n & !known != 0 => return Err(format!("the qcow2 image wants unknown features {:#x}", n & !known)),
        n if n & FEATURE_COMPRESSION != 0 && compression != 0 => {
            "is compressed otherwise than by zlib, which is not built"
        }
        _ => return Ok(()),
    };
    Err(format!("the qcow2 image {what}"))
}

/// Name and format of the backing file.
fn backing_file(
    file: &File,
    header: &[u8],
    header_length: u64,
    cluster: u64,
) -> Result<Option<(String, Option<Format>)>, String> {
    let (at, len) = (be64(header, 8), be32(header, 16));
    if at == 0 {
        return Ok(None);
    }
    if len > 1023 {
        return Err("the qcow2 image is damaged: the name of its backing file is too long".into());
    }
    let mut name = vec![0; len as usize];
    file.read_exact_at(&mut name, at).map_err(|_| "the qcow2 image is truncated: its backing file has no name")?;
    let name = String::from_utf8(name).map_err(|_| "the name of the qcow2 image's backing file is no UTF-8")?;
    // Extensions lie between the header and the end of the first cluster: type, length, data to a multiple of 8.
    let mut format = None;
    let mut here = header_length;
    while here + 8 <= cluster {
        let mut word = [0; 8];
        read_padded(file, here, &mut word).map_err(|e| e.to_string())?;
        let (kind, len) = (be32(&word, 0), be32(&word, 4));
        if kind == 0 {
            break;
        }
        if kind == BACKING_FORMAT {
            let mut text = vec![0; len.min(16) as usize];
            read_padded(file, here + 8, &mut text).map_err(|e| e.to_string())?;
            format = Some(match &text[..] {
                b"raw" => Format::Raw,
                b"qcow2" => Format::Qcow2,
                _ => return Err(format!("its backing file's format `{}` is not built", text.escape_ascii())),
            });
        }
        here += 8 + u64::from(len).next_multiple_of(8);
    }
    Ok(Some((name, format)))
}
