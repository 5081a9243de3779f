//! Block translation: interpreter against translator on bytes that a mutation made of good code, at both levels.

use super::{Guided, Target, hex, mutate, quietly};
use crate::campaign::engine::Which;
use crate::campaign::group::Group;
use crate::campaign::sequence::{self, Sequence};
use crate::random::Random;

/// See [`super::target`].
pub struct Blocks {
    group: Group,
}

impl Blocks {
    /// With engines of its own.
    ///
    /// # Errors
    /// The host's.
    pub fn new() -> Result<Blocks, String> {
        Ok(Blocks { group: Group::new()? })
    }
}

impl Blocks {
    /// A sequence at CPL 3 as [`Guided::bytes`] reads it.
    pub(super) fn seed(&self, r: &mut Random) -> Vec<u8> {
        let mut out = vec![r.next() as u8; 2];
        out.extend(self.group.source().draw(r, false).code);
        out
    }

    fn compare(&mut self, s: &Sequence) -> Result<(), String> {
        if sequence::is_own(&s.code) {
            return Ok(());
        }
        match quietly(|| self.group.difference(s)) {
            Ok(None) => Ok(()),
            Ok(Some(what)) if sequence::known(s, &what).is_some() => Ok(()),
            Ok(Some(what)) => {
                let (s, what) = self.group.shrink(Which::BtPaged, s.clone(), what);
                Err(format!("{what}\n  {}\n  {s:x?}", sequence::text(&s)))
            }
            Err(why) => {
                // The engines may be anywhere.
                self.group = Group::new()?;
                Err(format!("{why}: [{}] {s:x?}", hex(&s.code)))
            }
        }
    }
}

impl Guided for Blocks {
    /// The first byte draws the registers and memory, the second says how many single steps come first; the rest is code at CPL 3.
    fn bytes(&mut self, input: &[u8]) -> Result<(), String> {
        let [seed, steps, code @ ..] = input else { return Ok(()) };
        let seed = u64::from(*seed) << 56;
        let mut budgets = vec![1; usize::from(steps % 8)];
        budgets.push(100);
        let code = code[..code.len().min(sequence::ROOM)].to_vec();
        let gpr = sequence::registers(&mut Random::new(seed));
        let rflags = 0x202 | seed >> 48 & 0x8d5;
        self.compare(&Sequence { kernel: false, code, gpr, rflags, seed, budgets, interrupt: None })
    }
}

impl Target for Blocks {
    fn one(&mut self, r: &mut Random) -> Result<(), String> {
        let kernel = r.once_in(2);
        let mut s = self.group.source().draw(r, kernel);
        // At CPL 0 a mutation may leave a page table changed and not flushed, and then both are right.
        if !kernel {
            mutate(r, &mut s.code);
        }
        s.code.truncate(sequence::ROOM);
        self.compare(&s)
    }
}
