//! Block translation: interpreter against translator on bytes that a mutation made of good code, at both levels.

use super::{Target, hex, mutate, quietly};
use crate::campaign::pair::{self, Pair};
use crate::random::Random;

/// See [`super::target`].
pub struct Blocks {
    pair: Pair,
}

impl Blocks {
    /// With engines of its own.
    ///
    /// # Errors
    /// The host's.
    pub fn new() -> Result<Blocks, String> {
        Ok(Blocks { pair: Pair::new()? })
    }
}

impl Target for Blocks {
    fn one(&mut self, r: &mut Random) -> Result<(), String> {
        let kernel = r.once_in(2);
        let mut s = self.pair.draw(r, kernel);
        // At CPL 0 a mutation may leave a page table changed and not flushed, and then both are right.
        if !kernel {
            mutate(r, &mut s.code);
        }
        s.code.truncate(pair::ROOM);
        if pair::is_own(&s.code) {
            return Ok(());
        }
        match quietly(|| self.pair.run(&s)) {
            Ok(None) => Ok(()),
            Ok(Some(what)) => {
                let (s, what) = self.pair.shrink(s, what);
                Err(format!("{what}\n  {}\n  {s:x?}", pair::text(&s)))
            }
            Err(why) => {
                // The engines may be anywhere.
                self.pair = Pair::new()?;
                Err(format!("{why}: [{}] {s:x?}", hex(&s.code)))
            }
        }
    }
}
