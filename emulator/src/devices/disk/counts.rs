//! What a qcow2 image needs to be written: its reference counts, by which new clusters are taken at the file's end (QEMU's
//! docs/interop/qcow2.txt, "Host cluster management").

use super::qcow2::{be32, be64, damaged, table};
use std::fs::File;
use std::io::Result as IoResult;
use std::os::unix::fs::FileExt;

/// Counts of 16 bits, as all programs make them: their order.
const ORDER: u32 = 4;
const FEATURE_DIRTY: u64 = 1;
/// Bytes of a table of blocks (QEMU allows as much).
const LARGEST: u64 = 8 << 20;
/// Where in the header the table's place and its number of clusters are.
const IN_HEADER: u64 = 48;

/// The reference counts of an image's clusters.
#[derive(Debug)]
pub struct Counts {
    cluster_bits: u32,
    /// Where the table of blocks is in the file, and what is in it.
    at: u64,
    table: Vec<u64>,
    /// The first byte behind all clusters.
    end: u64,
}

impl Counts {
    /// From the header of an image of `length` bytes that is going to be written.
    ///
    /// # Errors
    /// A sentence: what stands against writing to it.
    pub fn open(file: &File, length: u64, header: &[u8; 112]) -> Result<Counts, String> {
        let (version, cluster_bits) = (be32(header, 4), be32(header, 20));
        let order = if version == 2 { ORDER } else { be32(header, 96) };
        let (at, clusters) = (be64(header, 48), u64::from(be32(header, 56)));
        let cluster = 1u64 << cluster_bits;
        if version >= 3 && be64(header, 72) & FEATURE_DIRTY != 0 {
            return Err("the qcow2 image was not closed: repair it first (qemu-img check -r all)".into());
        }
        if be32(header, 60) != 0 {
            return Err(
                "the qcow2 image has internal snapshots, which are not built for writing; add snapshot=on".into()
            );
        }
        if order != ORDER {
            return Err(
                "the qcow2 image's reference counts are not of 16 bits, which is not built; add snapshot=on".into()
            );
        }
        let bytes = clusters << cluster_bits;
        if !at.is_multiple_of(cluster) || at == 0 || at.checked_add(bytes).is_none_or(|end| end > length) {
            return Err("the qcow2 image is truncated or damaged: its reference counts are beyond its end".into());
        }
        let mut counts = Counts {
            cluster_bits,
            at,
            table: table(file, at, (bytes / 8) as usize).map_err(|e| e.to_string())?,
            end: length.next_multiple_of(cluster),
        };
        // Everything written once more at the end, with its tables, must be counted.
        let most = be64(header, 24).saturating_mul(2).saturating_add(counts.end).div_ceil(cluster);
        let entries = most.div_ceil(counts.in_block()) + 1;
        if entries > counts.table.len() as u64 {
            if entries * 8 > LARGEST {
                return Err("the qcow2 image is too large to be written to; add snapshot=on".into());
            }
            // Twice as long as need be: what is written now makes the file longer, and should not make the table too short again.
            counts.grow(file, 2 * entries).map_err(|e| format!("its table of reference counts does not grow: {e}"))?;
        }
        if version >= 3 && be64(header, 88) != 0 {
            // Features that whoever does not know them ends by writing (bitmaps).
            file.write_all_at(&[0; 8], 88).map_err(|e| e.to_string())?;
        }
        Ok(counts)
    }

    fn in_block(&self) -> u64 {
        1 << (self.cluster_bits - 1)
    }

    /// A longer table at the end of the file. The header names it when it is whole and all new clusters are counted; until then the old one
    /// holds, and of the new clusters nobody knows.
    fn grow(&mut self, file: &File, entries: u64) -> IoResult<()> {
        let (old, old_bytes) = (self.at, self.table.len() as u64 * 8);
        let cluster = 1u64 << self.cluster_bits;
        let bytes = (entries * 8).next_multiple_of(cluster);
        self.table.resize((bytes / 8) as usize, 0);
        self.at = self.end;
        self.end += bytes;
        let content: Vec<u8> = self.table.iter().flat_map(|e| e.to_be_bytes()).collect();
        file.write_all_at(&content, self.at)?;
        for at in (self.at..self.at + bytes).step_by(1 << self.cluster_bits) {
            self.count(file, at, 1)?;
        }
        file.sync_data()?;
        let clusters = (bytes >> self.cluster_bits) as u32;
        file.write_all_at(&[&self.at.to_be_bytes()[..], &clusters.to_be_bytes()].concat(), IN_HEADER)?;
        self.release(file, old, old_bytes)
    }

    /// A new cluster at the end, counted once. It is written by the caller, before anything refers to it.
    ///
    /// # Errors
    /// The host's, or the table is full.
    pub fn take(&mut self, file: &File) -> IoResult<u64> {
        let at = self.take_uncounted();
        self.count(file, at, 1)?;
        Ok(at)
    }

    fn take_uncounted(&mut self) -> u64 {
        let at = self.end;
        self.end += 1 << self.cluster_bits;
        at
    }

    /// The clusters of some bytes are referred to once less.
    ///
    /// # Errors
    /// The host's, or the image is damaged.
    pub fn release(&mut self, file: &File, at: u64, len: u64) -> IoResult<()> {
        let (first, last) = (at >> self.cluster_bits, (at + len.max(1) - 1) >> self.cluster_bits);
        (first..=last).try_for_each(|cluster| self.count(file, cluster << self.cluster_bits, -1))
    }

    fn count(&mut self, file: &File, cluster: u64, by: i32) -> IoResult<()> {
        let number = cluster >> self.cluster_bits;
        let (index, inside) = ((number / self.in_block()) as usize, number % self.in_block());
        let entry = *self.table.get(index).ok_or_else(|| damaged("a cluster is beyond its reference counts"))?;
        let mut block = entry & !511;
        if block == 0 {
            block = self.take_uncounted();
            file.write_all_at(&vec![0; 1 << self.cluster_bits], block)?;
            self.table[index] = block;
            // Itself: perhaps in this block, else in another, which may be new too.
            self.count(file, block, 1)?;
            file.write_all_at(&block.to_be_bytes(), self.at + 8 * index as u64)?;
        }
        let at = block + 2 * inside;
        let mut word = [0; 2];
        file.read_exact_at(&mut word, at).map_err(|_| damaged("a block of reference counts is beyond its end"))?;
        let n = i32::from(u16::from_be_bytes(word)) + by;
        let n = u16::try_from(n).map_err(|_| damaged("a reference count is wrong"))?;
        file.write_all_at(&n.to_be_bytes(), at)
    }
}
