//! What a guest wrote to a disk that must not change: blocks in memory.

use std::collections::HashMap;
use std::io::Result as IoResult;

/// Bytes of a block.
const BLOCK: usize = 4096;

/// The blocks written so far.
#[derive(Debug, Default)]
pub struct Overlay {
    blocks: HashMap<u64, Box<[u8; BLOCK]>>,
}

/// The parts of `len` bytes from `at` on, a block at a time: block, offset in it, where in the bytes.
fn parts(at: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let here = at + done as u64;
        let (block, offset) = (here / BLOCK as u64, (here % BLOCK as u64) as usize);
        let n = (len - done).min(BLOCK - offset);
        let range = done..done + n;
        done += n;
        (n > 0).then_some((block, offset, range))
    })
}

impl Overlay {
    /// Reads what was written, and the rest by `below`.
    pub fn read(&self, at: u64, to: &mut [u8], below: impl FnOnce(u64, &mut [u8]) -> IoResult<()>) -> IoResult<()> {
        // Mostly nothing or everything was written; reading it all once is cheaper than asking piece by piece.
        let covered = parts(at, to.len()).all(|(block, ..)| self.blocks.contains_key(&block));
        if !covered {
            below(at, to)?;
        }
        for (block, offset, range) in parts(at, to.len()) {
            if let Some(bytes) = self.blocks.get(&block) {
                to[range.clone()].copy_from_slice(&bytes[offset..offset + range.len()]);
            }
        }
        Ok(())
    }

    /// Keeps what is written; blocks that are only partly written get their rest by `below`.
    pub fn write(
        &mut self,
        at: u64,
        from: &[u8],
        mut below: impl FnMut(u64, &mut [u8]) -> IoResult<()>,
    ) -> IoResult<()> {
        for (block, offset, range) in parts(at, from.len()) {
            let bytes = match self.blocks.entry(block) {
                std::collections::hash_map::Entry::Occupied(e) => e.into_mut(),
                std::collections::hash_map::Entry::Vacant(e) => {
                    let mut bytes = Box::new([0; BLOCK]);
                    if range.len() < BLOCK {
                        below(block * BLOCK as u64, &mut *bytes)?;
                    }
                    e.insert(bytes)
                }
            };
            bytes[offset..offset + range.len()].copy_from_slice(&from[range]);
        }
        Ok(())
    }
}
