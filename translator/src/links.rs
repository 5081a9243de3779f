//! The blocks of a running cache and the links between them, for people to read.

use crate::exits::Exits;
use crate::lower::Leave;
use crate::marks::Home;
use crate::store::{NONE, Store};
use std::ops::Range;

/// A way out of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Why it is taken.
    pub leave: Leave,
    /// The host address its jump leads to if that is translated code; else it leaves the cache.
    pub chained: Option<u64>,
}

/// A block as it lies in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Live {
    /// Its guest address.
    pub start: u64,
    /// Guest bytes it was made from.
    pub len: u16,
    /// Where R11 is at its start.
    pub home: Home,
    /// Its code, the landing included: host addresses.
    pub host: Range<u64>,
    /// Where jumps enter it.
    pub body: u64,
    /// Indirect branches find it in the table.
    pub landing: bool,
    /// Jumps of other blocks, or its own, that lead to it.
    pub incoming: usize,
    /// In the order of its code.
    pub ways: Vec<Way>,
}

impl Store {
    /// The blocks at a guest address: at most one for each place R11 can be in.
    pub fn live(&self, exits: &Exits, rip: u64) -> Vec<Live> {
        let found = [Home::Slot, Home::Register].into_iter().filter_map(|home| self.get(rip, home));
        found.map(|(b, _)| self.live_block(exits, b as usize)).collect()
    }

    fn live_block(&self, exits: &Exits, n: usize) -> Live {
        let (b, base) = (&self.blocks[n], self.buffer.base());
        let host = |offset: u32| base + u64::from(offset);
        let ids = b.first_exit..self.blocks.get(n + 1).map_or(self.exits_used, |next| next.first_exit);
        let way = |id| Way {
            leave: exits.leave(id),
            chained: exits.linked(id).map(|to| host(self.blocks[to as usize].body)),
        };
        let next = |&id: &u32| Some(exits.next_linked(id)).filter(|&id| id != NONE);
        Live {
            start: b.start,
            len: b.len,
            home: b.home,
            host: host(b.at)..host(b.end),
            body: host(b.body),
            landing: b.landing.is_some(),
            incoming: std::iter::successors(Some(b.incoming).filter(|&id| id != NONE), next).count(),
            ways: ids.map(way).collect(),
        }
    }
}
