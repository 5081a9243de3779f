//! From guest address to block: open addressing with linear probing, one cache line a lookup, few for a function.

/// Guest address; block number and code offset. Zeros take no memory until they are written.
type Slot = [u64; 2];

const EMPTY: u64 = 0;
const GONE: u64 = u64::MAX;

/// The table. Block numbers are neither 0 nor 2^32 - 1.
pub struct Index {
    slots: Vec<Slot>,
    /// Slots not [`EMPTY`].
    used: usize,
    /// Eight bits of hashes for each slot: most addresses asked for are not there, and this stays in the host's cache.
    filter: Vec<u64>,
}

const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

/// Neighbours lie together, as they are asked for together: 256 bytes of code have 16 slots in four cache lines.
fn group(rip: u64) -> usize {
    ((rip >> 8).wrapping_mul(MIX) >> 32) as usize
}

impl Default for Index {
    fn default() -> Index {
        Index::with_slots(1024)
    }
}

impl Index {
    fn with_slots(slots: usize) -> Index {
        Index { slots: vec![[0, EMPTY]; slots], used: 0, filter: vec![0; slots / 8] }
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

    fn position(&self, rip: u64) -> Option<usize> {
        let mut i = self.start(rip);
        loop {
            match self.slots[i] {
                [_, EMPTY] => return None,
                [at, found] if at == rip && found != GONE => return Some(i),
                _ => i = (i + 1) & (self.slots.len() - 1),
            }
        }
    }

    /// The number of the block at `rip` and the code offset of its body.
    #[inline]
    pub fn get(&self, rip: u64) -> Option<(u32, u32)> {
        let (word, bit) = self.filter_bit(rip);
        if self.filter[word] & bit == 0 {
            return None;
        }
        self.position(rip).map(|i| ((self.slots[i][1] >> 32) as u32, self.slots[i][1] as u32))
    }

    /// Adds a block; there must be none at `rip`.
    pub fn insert(&mut self, rip: u64, block: u32, body: u32) {
        self.put([rip, u64::from(block) << 32 | u64::from(body)]);
    }

    fn put(&mut self, slot: Slot) {
        let rip = slot[0];
        if self.used * 3 >= self.slots.len() * 2 {
            self.grow();
        }
        let (word, bit) = self.filter_bit(rip);
        self.filter[word] |= bit;
        let mut i = self.start(rip);
        while self.slots[i][1] != EMPTY {
            i = (i + 1) & (self.slots.len() - 1);
        }
        self.slots[i] = slot;
        self.used += 1;
    }

    /// Makes an empty table large enough for so many blocks.
    pub fn reserve(&mut self, blocks: usize) {
        if self.used == 0 && blocks * 3 / 2 > self.slots.len() {
            *self = Index::with_slots((blocks * 3 / 2).next_power_of_two());
        }
    }

    /// Takes the block at `rip` out if it is this one.
    pub fn remove(&mut self, rip: u64, block: u32) {
        if let Some(i) = self.position(rip)
            && self.slots[i][1] >> 32 == u64::from(block)
        {
            self.slots[i][1] = GONE;
        }
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        if self.slots.len() > 1 << 14 {
            *self = Index::default();
            return;
        }
        for i in 0..self.slots.len() {
            if self.slots[i][1] != EMPTY {
                let (word, _) = self.filter_bit(self.slots[i][0]);
                self.filter[word] = 0;
                self.slots[i][1] = EMPTY;
            }
        }
        self.used = 0;
    }

    /// Twice the size, or the same if many were taken out.
    fn grow(&mut self) {
        let live: Vec<Slot> = self.slots.iter().filter(|s| s[1] != EMPTY && s[1] != GONE).copied().collect();
        let size = if live.len() * 4 >= self.slots.len() { self.slots.len() * 2 } else { self.slots.len() };
        *self = Index::with_slots(size);
        live.into_iter().for_each(|s| self.put(s));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn agrees_with_a_hash_map() {
        let (mut index, mut map) = (Index::default(), HashMap::new());
        let mut x = 1u64;
        for n in 1..60_000u32 {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let rip = 0x7f00_0000_0000 + (x >> 48);
            if let Some(&b) = map.get(&rip) {
                index.remove(rip, b);
                map.remove(&rip);
            } else {
                index.insert(rip, n, n * 2);
                map.insert(rip, n);
            }
        }
        for rip in 0x7f00_0000_0000..0x7f00_0001_0000u64 {
            assert_eq!(index.get(rip), map.get(&rip).map(|&n| (n, n * 2)));
        }
    }
}
