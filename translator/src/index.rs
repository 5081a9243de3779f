//! From guest address to block: open addressing with linear probing, one cache line a lookup, few for a function.

/// Block number, and below it eight bits that the guest address gives: whether a block that has them is the one, its own address says.
/// Zeros take no memory until they are written.
type Slot = u32;

/// Bits of the number.
const NUMBER: u32 = 24;
const EMPTY: u32 = 0;
const GONE: u32 = MOST_BLOCKS;
/// Block numbers are smaller.
pub const MOST_BLOCKS: u32 = (1 << NUMBER) - 1;

/// The table. No block's number is 0. It does not hold addresses: who asks says by `rip_of` where a block begins.
pub struct Index {
    slots: Vec<Slot>,
    /// Slots not [`EMPTY`].
    used: usize,
    /// Eight bits of hashes for each slot: most addresses asked for are not there, and this stays in the host's cache.
    filter: Vec<u64>,
}

const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

/// Neighbours lie together, as they are asked for together: 256 bytes of code have 16 slots in a cache line.
fn group(rip: u64) -> usize {
    ((rip >> 8).wrapping_mul(MIX) >> 32) as usize
}

/// What a slot has for a block.
fn slot(rip: u64, block: u32) -> Slot {
    block << 8 | (rip.wrapping_mul(MIX) >> 24) as u8 as u32
}

impl Default for Index {
    fn default() -> Index {
        Index::with_slots(1024)
    }
}

impl Index {
    fn with_slots(slots: usize) -> Index {
        Index { slots: vec![EMPTY; slots], used: 0, filter: vec![0; slots / 8] }
    }

    /// Bytes it takes.
    pub fn memory(&self) -> usize {
        size_of_val(&*self.slots) + size_of_val(&*self.filter)
    }

    fn filter_bit(&self, rip: u64) -> (usize, u64) {
        let word = group(rip) << 1 | (rip >> 7 & 1) as usize;
        (word & (self.filter.len() - 1), 1 << (rip.wrapping_mul(MIX) >> 58))
    }

    fn start(&self, rip: u64) -> usize {
        (group(rip) << 4 | (rip >> 4 & 15) as usize) & (self.slots.len() - 1)
    }

    /// The slot of the address of which `is` says that it is the one.
    fn position(&self, rip: u64, is: impl Fn(u32) -> bool) -> Option<usize> {
        let mut i = self.start(rip);
        loop {
            let found = self.slots[i];
            match found >> 8 {
                EMPTY => return None,
                block if found == slot(rip, block) && block != GONE && is(block) => return Some(i),
                _ => i = (i + 1) & (self.slots.len() - 1),
            }
        }
    }

    /// The number of the block at `rip`.
    #[inline]
    pub fn get(&self, rip: u64, rip_of: impl Fn(u32) -> u64) -> Option<u32> {
        let (word, bit) = self.filter_bit(rip);
        if self.filter[word] & bit == 0 {
            return None;
        }
        self.position(rip, |b| rip_of(b) == rip).map(|i| self.slots[i] >> 8)
    }

    /// Adds a block; there must be none at `rip`.
    pub fn insert(&mut self, rip: u64, block: u32, rip_of: impl Fn(u32) -> u64) {
        if self.used * 3 >= self.slots.len() * 2 {
            self.grow(rip_of);
        }
        self.put(rip, block);
    }

    fn put(&mut self, rip: u64, block: u32) {
        let (word, bit) = self.filter_bit(rip);
        self.filter[word] |= bit;
        let mut i = self.start(rip);
        while self.slots[i] >> 8 != EMPTY {
            i = (i + 1) & (self.slots.len() - 1);
        }
        self.slots[i] = slot(rip, block);
        self.used += 1;
    }

    /// Makes an empty table large enough for so many blocks.
    pub fn reserve(&mut self, blocks: usize) {
        if self.used == 0 && blocks * 3 / 2 > self.slots.len() {
            *self = Index::with_slots((blocks * 3 / 2).next_power_of_two());
        }
    }

    /// Takes the block out that was put in for `rip`, if it is there.
    pub fn remove(&mut self, rip: u64, block: u32) {
        if let Some(i) = self.position(rip, |b| b == block) {
            self.slots[i] = GONE << 8;
        }
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        if self.slots.len() > 1 << 14 {
            *self = Index::default();
            return;
        }
        self.slots.fill(EMPTY);
        self.filter.fill(0);
        self.used = 0;
    }

    /// Twice the size, or the same if many were taken out.
    fn grow(&mut self, rip_of: impl Fn(u32) -> u64) {
        let live: Vec<u32> = self.slots.iter().map(|s| s >> 8).filter(|&b| b != EMPTY && b != GONE).collect();
        let size = if live.len() * 4 >= self.slots.len() { self.slots.len() * 2 } else { self.slots.len() };
        *self = Index::with_slots(size);
        live.into_iter().for_each(|b| self.put(rip_of(b), b));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn agrees_with_a_hash_map() {
        let (mut index, mut map, mut rips) = (Index::default(), HashMap::new(), vec![0]);
        let mut x = 1u64;
        for n in 1..60_000u32 {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // Of two addresses the low 32 bits are the same.
            let rip = 0x7f00_0000_0000 + (x >> 49) + (x & 1 << 32);
            rips.push(rip);
            let rip_of = |b: u32| rips[b as usize];
            if let Some(&b) = map.get(&rip) {
                index.remove(rip, b);
                map.remove(&rip);
            } else {
                index.insert(rip, n, rip_of);
                map.insert(rip, n);
            }
        }
        for rip in (0x7f00_0000_0000..0x7f00_0000_8000u64).flat_map(|rip| [rip, rip + (1 << 32)]) {
            assert_eq!(index.get(rip, |b| rips[b as usize]), map.get(&rip).copied());
        }
    }
}
