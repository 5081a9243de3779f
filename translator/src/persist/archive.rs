//! The file: magic, key, a table of records by the sums of their pages, the records. All numbers are little-endian. Nothing in it is believed before its sum is
//! right, and everything is looked at within bounds.

use crate::persist::hash::{Sum, sum};
use std::cmp::Ordering;
use std::ops::Range;

const MAGIC: &[u8; 8] = b"bivisor\x02";
/// Sum of the page, start and length of the record, its sum.
const ROW: usize = 16 + 8 + 8 + 16;
/// Bytes a file may have.
pub const MOST: usize = 64 << 20;

/// What was kept of earlier runs.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    /// Where the table is, in the order of the sums of pages.
    table: Range<usize>,
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

impl Archive {
    /// Of a file's content, if it is whole and was written for `key`.
    pub fn read(bytes: Vec<u8>, key: &[u8]) -> Option<Archive> {
        // Magic, sum of what comes after it up to the records, length of the key, key, number of rows, rows.
        let rest = bytes.strip_prefix(MAGIC)?;
        let kept = [number(rest, 0)?, number(rest, 8)?];
        let head = number(rest, 16)? as usize;
        if sum(rest.get(16..head)?) != kept {
            return None;
        }
        let len = number(rest, 24)? as usize;
        let after = 32usize.checked_add(len)?;
        if rest.get(32..after)? != key {
            return None;
        }
        let rows = number(rest, after)? as usize;
        let start = MAGIC.len() + after + 8;
        let end = start.checked_add(rows.checked_mul(ROW)?)?;
        (end <= MAGIC.len() + head).then_some(Archive { bytes, table: start..end })
    }

    /// The sum of a row's page, where its record is, the record's sum.
    fn row(&self, i: usize) -> Option<(Sum, Range<usize>, Sum)> {
        let row = self.bytes.get(self.table.clone())?.get(i * ROW..(i + 1) * ROW)?;
        let field = |n: usize| number(row, 8 * n);
        let start = field(2)? as usize;
        let end = start.checked_add(field(3)? as usize)?;
        Some(([field(0)?, field(1)?], start..end, [field(4)?, field(5)?]))
    }

    fn rows(&self) -> usize {
        self.table.len() / ROW
    }

    /// About how many blocks there are.
    pub fn blocks(&self) -> usize {
        self.bytes.len() / 256
    }

    /// Where the record of a page with this content is. A record that is not whole is none.
    pub fn place(&self, page: Sum) -> Option<Range<usize>> {
        let (mut low, mut high) = (0, self.rows());
        while low < high {
            let middle = low + (high - low) / 2;
            let (found, place, kept) = self.row(middle)?;
            match found.cmp(&page) {
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
                Ordering::Equal => return (sum(self.bytes.get(place.clone())?) == kept).then_some(place),
            }
        }
        None
    }

    /// The record at such a place.
    pub fn record(&self, place: Range<usize>) -> &[u8] {
        self.bytes.get(place).unwrap_or_default()
    }

    /// All records, whole or not.
    pub fn all(&self) -> impl Iterator<Item = (Sum, &[u8])> {
        (0..self.rows()).filter_map(|i| {
            let (page, place, _) = self.row(i)?;
            Some((page, self.bytes.get(place)?))
        })
    }

    /// The content of a file with these records.
    pub fn write<'a>(key: &[u8], records: impl Iterator<Item = (Sum, &'a [u8])>) -> Vec<u8> {
        let mut records: Vec<(Sum, &[u8])> = records.collect();
        records.sort_unstable_by_key(|(page, _)| *page);
        let mut head = Vec::with_capacity(64 + key.len() + records.len() * ROW);
        let size = 16 + 8 + 8 + key.len() + 8 + records.len() * ROW;
        let mut put = |v: u64| head.extend_from_slice(&v.to_le_bytes());
        put(size as u64);
        put(key.len() as u64);
        head.extend_from_slice(key);
        let mut put = |v: u64| head.extend_from_slice(&v.to_le_bytes());
        put(records.len() as u64);
        let mut at = MAGIC.len() + size;
        for (page, record) in &records {
            let kept = sum(record);
            [page[0], page[1], at as u64, record.len() as u64, kept[0], kept[1]].into_iter().for_each(&mut put);
            at += record.len();
        }
        let kept = sum(&head);
        let mut all = Vec::with_capacity(at);
        all.extend_from_slice(MAGIC);
        kept.iter().for_each(|v| all.extend_from_slice(&v.to_le_bytes()));
        all.extend_from_slice(&head);
        records.iter().for_each(|(_, record)| all.extend_from_slice(record));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(a: &Archive, page: Sum) -> Option<&[u8]> {
        a.place(page).map(|place| a.record(place))
    }

    fn sample() -> Vec<u8> {
        Archive::write(b"a key", [([1, 2], &b"first"[..]), ([3, 4], &b"the second"[..])].into_iter())
    }

    #[test]
    fn what_is_written_is_read() {
        let a = Archive::read(sample(), b"a key").expect("whole");
        assert_eq!(find(&a, [1, 2]), Some(&b"first"[..]));
        assert_eq!(find(&a, [3, 4]), Some(&b"the second"[..]));
        assert_eq!(find(&a, [1, 4]), None);
        assert_eq!(a.all().count(), 2);
        assert!(Archive::read(sample(), b"b key").is_none());
        assert!(Archive::read(Vec::new(), b"a key").is_none());
    }

    #[test]
    fn nothing_is_believed_that_is_not_whole() {
        let good = sample();
        for len in 0..good.len() {
            let a = Archive::read(good[..len].to_vec(), b"a key");
            assert!(a.is_none_or(|a| find(&a, [3, 4]).is_none()), "{len} bytes of {}", good.len());
        }
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let Some(a) = Archive::read(bad, b"a key") else { continue };
            let both = [find(&a, [1, 2]), find(&a, [3, 4])];
            assert!(both.contains(&None), "bit {bit}");
            assert!(both.iter().flatten().all(|r| [&b"first"[..], b"the second"].contains(r)));
        }
    }
}
