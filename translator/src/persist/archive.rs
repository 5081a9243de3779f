//! The file: magic, key, what blocks there are by the sums of their pages, a table of clusters, the clusters. All numbers are
//! little-endian. Nothing in it is believed before its sum is right, and everything is looked at within bounds.

use crate::block::page_of;
use crate::marks::Home;
use crate::persist::cluster::Cluster;
use crate::persist::hash::{Sum, sum};
use bivisor_emulator::mem::PAGE_SIZE;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ops::Range;

const MAGIC: &[u8; 8] = b"bivisor\x06";
/// Sum of the page, its first block and how many there are.
const PAGE: usize = 16 + 4 + 4;
/// Where in its page it begins and where R11 is, which page of its cluster that is, its cluster.
const BLOCK: usize = 2 + 2 + 4;
/// Start and length of the cluster, its sum.
const CLUSTER: usize = 8 + 8 + 16;
/// Bytes a file may have.
pub const MOST: usize = 64 << 20;

/// What was kept of earlier runs.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    /// Where the tables are: pages in the order of their sums, the blocks of each in the order of where they begin.
    pages: Range<usize>,
    blocks: Range<usize>,
    clusters: Range<usize>,
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// What blocks of a page are told apart by.
pub(crate) fn within(start: u64, home: Home) -> u16 {
    (start % PAGE_SIZE) as u16 | if home == Home::Register { 1 << 15 } else { 0 }
}

/// What a block is found by, wherever its page is.
pub type Name = (Sum, u16);

/// The blocks of a cluster: what each is found by, and which of the cluster's pages it begins in.
fn names(c: &Cluster<'_>) -> Vec<(Name, u16)> {
    let pages: Vec<(u64, Sum)> = c.pages().collect();
    let name = |(start, home): (u64, Home)| {
        let i = pages.iter().position(|(page, _)| *page == page_of(start))?;
        Some(((pages[i].1, within(start, home)), i as u16))
    };
    c.rows().filter_map(|r| name((r.start, r.home))).collect()
}

impl Archive {
    /// Of a file's content, if it is whole and was written for `key`.
    pub fn read(bytes: Vec<u8>, key: &[u8]) -> Option<Archive> {
        // Magic, sum of what comes after it up to the clusters, where that ends, length of the key, key, lengths of the tables, tables.
        let kept = [number(&bytes, 8)?, number(&bytes, 16)?];
        let end = number(&bytes, 24)? as usize;
        if !bytes.starts_with(MAGIC) || sum(bytes.get(24..end)?) != kept {
            return None;
        }
        let after = 40usize.checked_add(number(&bytes, 32)? as usize)?;
        if bytes.get(40..after)? != key {
            return None;
        }
        let mut at = after + 24;
        let mut table = |i: usize, row: usize| {
            let start = at;
            at = start.checked_add((number(&bytes, after + 8 * i)? as usize).checked_mul(row)?)?;
            (at <= end).then_some(start..at)
        };
        let (pages, blocks, clusters) = (table(0, PAGE)?, table(1, BLOCK)?, table(2, CLUSTER)?);
        Some(Archive { bytes, pages, blocks, clusters })
    }

    /// What tells it from others.
    pub fn stamp(&self) -> u64 {
        number(&self.bytes, 8).unwrap_or(0)
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> usize {
        self.blocks.len() / BLOCK
    }

    /// How many clusters there are.
    pub fn clusters(&self) -> u32 {
        (self.clusters.len() / CLUSTER) as u32
    }

    fn row<const N: usize>(&self, table: &Range<usize>, i: usize) -> Option<&[u8; N]> {
        self.bytes.get(table.clone())?.get(i * N..)?.first_chunk()
    }

    /// The blocks of a page with this content.
    pub fn page(&self, page: Sum) -> Option<Range<u32>> {
        let (mut low, mut high) = (0, self.pages.len() / PAGE);
        while low < high {
            let middle = low + (high - low) / 2;
            let row = self.row::<PAGE>(&self.pages, middle)?;
            let place = number(row, 16)?;
            match [number(row, 0)?, number(row, 8)?].cmp(&page) {
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
                Ordering::Equal => return Some(place as u32..(place as u32).checked_add((place >> 32) as u32)?),
            }
        }
        None
    }

    /// Which cluster the block at `start` is in, of the blocks that [`Archive::page`] gave, and which page of the cluster is its.
    pub fn find(&self, page: &Range<u32>, start: u64, home: Home) -> Option<(u32, usize)> {
        let (mut low, mut high) = (page.start, page.end);
        while low < high {
            let middle = low + (high - low) / 2;
            let [a, b, c, d, rest @ ..] = *self.row::<BLOCK>(&self.blocks, middle as usize)?;
            match u16::from_le_bytes([a, b]).cmp(&within(start, home)) {
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
                Ordering::Equal => return Some((u32::from_le_bytes(rest), u16::from_le_bytes([c, d]).into())),
            }
        }
        None
    }

    fn place(&self, cluster: u32) -> Option<(&[u8], Sum)> {
        let row = self.row::<CLUSTER>(&self.clusters, cluster as usize)?;
        let start = number(row, 0)? as usize;
        let bytes = self.bytes.get(start..start.checked_add(number(row, 8)? as usize)?)?;
        Some((bytes, [number(row, 16)?, number(row, 24)?]))
    }

    /// What a cluster says of its pages, which is not to be believed.
    pub fn pages_of(&self, cluster: u32) -> Option<Cluster<'_>> {
        Cluster::read(self.place(cluster)?.0)
    }

    /// A cluster, if it is whole.
    pub fn cluster(&self, cluster: u32) -> Option<(Cluster<'_>, &[u8])> {
        let (bytes, kept) = self.place(cluster)?;
        let c = Cluster::read(bytes).filter(|c| sum(bytes) == kept && c.is_sound())?;
        Some((c, bytes))
    }

    /// The content of a file with clusters of `new` and as many of `old` as there is room for, but for those most of which `new` has.
    pub fn write(key: &[u8], new: &[Vec<u8>], old: &Archive) -> Option<Vec<u8>> {
        let mut blocks: BTreeMap<Name, (u16, u32)> = BTreeMap::new();
        let mut clusters: Vec<&[u8]> = Vec::new();
        let mut room = MOST;
        let all = new.iter().filter_map(|bytes| Some((Cluster::read(bytes)?, &bytes[..])));
        for (c, bytes) in all.chain((0..old.clusters()).filter_map(|i| old.cluster(i))) {
            let names = names(&c);
            let more = bytes.len() + CLUSTER + names.len() * (BLOCK + PAGE);
            let known = names.iter().filter(|(name, _)| blocks.contains_key(name)).count();
            if more > room || 2 * known > names.len() {
                continue;
            }
            room -= more;
            for (name, page) in names {
                blocks.entry(name).or_insert((page, clusters.len() as u32));
            }
            clusters.push(bytes);
        }
        let mut pages: Vec<(Sum, u32, u32)> = Vec::new();
        let mut table = Vec::with_capacity(blocks.len() * BLOCK);
        for (n, ((page, within), (of_cluster, cluster))) in (0..).zip(&blocks) {
            match pages.last_mut() {
                Some((last, _, count)) if last == page => *count += 1,
                _ => pages.push((*page, n, 1)),
            }
            [within, of_cluster].into_iter().for_each(|v| table.extend_from_slice(&v.to_le_bytes()));
            table.extend_from_slice(&cluster.to_le_bytes());
        }
        let end = 40 + key.len() + 24 + pages.len() * PAGE + table.len() + clusters.len() * CLUSTER;
        let mut head = Vec::with_capacity(end - 24);
        fn put(head: &mut Vec<u8>, v: u64) {
            head.extend_from_slice(&v.to_le_bytes());
        }
        put(&mut head, end as u64);
        put(&mut head, key.len() as u64);
        head.extend_from_slice(key);
        [pages.len(), blocks.len(), clusters.len()].into_iter().for_each(|n| put(&mut head, n as u64));
        for (page, first, count) in &pages {
            page.iter().for_each(|v| put(&mut head, *v));
            put(&mut head, u64::from(*first) | u64::from(*count) << 32);
        }
        head.extend_from_slice(&table);
        let mut at = end;
        for cluster in &clusters {
            let kept = sum(cluster);
            [at as u64, cluster.len() as u64, kept[0], kept[1]].into_iter().for_each(|v| put(&mut head, v));
            at += cluster.len();
        }
        let mut all = Vec::with_capacity(at);
        all.extend_from_slice(MAGIC);
        sum(&head).iter().for_each(|v| put(&mut all, *v));
        all.extend_from_slice(&head);
        clusters.iter().for_each(|cluster| all.extend_from_slice(cluster));
        (all.len() <= MOST).then_some(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::persist::cluster::{Making, Row};

    const BASE: u64 = 0x5555_0000_0000;

    /// One block at each address, all in the page at [`BASE`], the content of which has this sum.
    fn cluster(page: Sum, starts: &[u64]) -> Vec<u8> {
        let row = |&start: &u64| Row {
            start: BASE + start,
            size: 4,
            body: 0,
            len: 1,
            marks: 0,
            exits: 0,
            relocations: 0,
            home: Home::Slot,
            landing: false,
            constant: false,
        };
        let rows: Vec<Row> = starts.iter().map(row).collect();
        let code = vec![0xcc; 4 * rows.len()];
        Making { host: 0x1000, pages: vec![(BASE, page)], rows, code, ..Making::default() }.bytes()
    }

    /// The start of the first block of the cluster in which the block at `start` is.
    fn find(a: &Archive, page: Sum, start: u64) -> Option<u64> {
        let (cluster, page) = a.find(&a.page(page)?, start, Home::Slot)?;
        let (c, _) = a.cluster(cluster)?;
        assert_eq!(page, 0);
        Some(c.rows().next()?.start - BASE)
    }

    fn sample() -> Vec<u8> {
        let all = [cluster([1, 2], &[7, 3]), cluster([3, 4], &[9, 3, 20]), cluster([1, 2], &[5])];
        Archive::write(b"a key", &all, &Archive::default()).expect("room")
    }

    #[test]
    fn what_is_written_is_read() {
        let a = Archive::read(sample(), b"a key").expect("whole");
        assert_eq!([3, 7, 5, 9].map(|start| find(&a, [1, 2], start)), [Some(7), Some(7), Some(5), None]);
        assert_eq!([3, 20, 9, 7].map(|start| find(&a, [3, 4], start)), [Some(9), Some(9), Some(9), None]);
        assert_eq!(find(&a, [1, 4], 3), None);
        assert_eq!((a.blocks(), a.clusters()), (6, 3));
        assert!(Archive::read(sample(), b"b key").is_none());
        assert!(Archive::read(Vec::new(), b"a key").is_none());
    }

    #[test]
    fn what_is_not_made_again_stays() {
        let old = Archive::read(sample(), b"a key").expect("whole");
        let new = Archive::write(b"a key", &[cluster([3, 4], &[30, 3, 9])], &old).expect("room");
        let new = Archive::read(new, b"a key").expect("whole");
        assert_eq!([3, 9, 20].map(|start| find(&new, [3, 4], start)), [Some(30), Some(30), None]);
        assert_eq!([3, 5].map(|start| find(&new, [1, 2], start)), [Some(7), Some(5)]);
    }

    #[test]
    fn nothing_is_believed_that_is_not_whole() {
        let good = sample();
        for len in 0..good.len() {
            let a = Archive::read(good[..len].to_vec(), b"a key");
            assert!(a.is_none_or(|a| find(&a, [1, 2], 5).is_none()), "{len} bytes of {}", good.len());
        }
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let Some(a) = Archive::read(bad, b"a key") else { continue };
            let all = [find(&a, [1, 2], 3), find(&a, [1, 2], 5), find(&a, [3, 4], 3)];
            assert_eq!(all.iter().filter(|found| found.is_none()).count(), 1, "bit {bit}");
            assert!(all.iter().zip([7, 5, 9]).all(|(found, right)| found.is_none_or(|f| f == right)), "bit {bit}");
        }
    }
}
