//! From one program to the next in the same host process: code made from pages of files stays, apart, until it shows whether the next
//! program has the same pages at the same addresses, as it has of the dynamic linker and the C library.
//!
//! Code of one mapping is a group, which comes back or goes as a whole: jumps lead from block to block within it without a look.

use crate::block::CodeSource;
use crate::exits::Exits;
use crate::known::{Block, NONE};
use crate::lower::{Landing, Leave};
use crate::persist::adopt::{Content, content_of};
use crate::persist::hash::Sum;
use crate::store::Store;
use std::ops::Range;

/// The code of a mapping that is gone.
pub struct Group {
    range: Range<u64>,
    /// Address, content and first block of each page.
    pages: Vec<(u64, Sum, u32)>,
    blocks: Vec<u32>,
    landings: Vec<(u32, Landing)>,
}

/// Is the content of these pages, watched from now on, what it was? No lock is held.
pub fn is_same(source: &mut dyn CodeSource, pages: &[(u64, Sum)]) -> bool {
    pages.iter().all(|&(page, sum)| content_of(source, page).is_some_and(|c| c.sum == sum))
}

impl Store {
    /// Takes everything out of use; what was made from pages of files in `mappings` can be had back.
    pub fn park(&mut self, exits: &Exits, mappings: &[Range<u64>]) {
        for old in std::mem::take(&mut self.parked) {
            old.blocks.into_iter().for_each(|b| self.kill(exits, b));
        }
        // What they know of other pages may not hold there.
        for (b, _) in std::mem::take(&mut self.constants).into_values().flatten() {
            self.kill(exits, b);
        }
        let group = |range: &Range<u64>| Group {
            range: range.clone(),
            pages: Vec::new(),
            blocks: Vec::new(),
            landings: Vec::new(),
        };
        let mut groups: Vec<Group> = mappings.iter().map(group).collect();
        self.index.clear();
        self.compared.clear();
        for (page, head) in std::mem::take(&mut self.by_page) {
            let sum = self.pages.as_ref().and_then(|pages| Some(pages.get(&page)?.content?.sum));
            let mut group = groups.iter_mut().find(|g| g.range.contains(&page)).filter(|_| sum.is_some());
            if let (Some(g), Some(sum)) = (&mut group, sum) {
                g.pages.push((page, sum, head));
            }
            let mut b = head;
            while b != NONE {
                let block = &self.blocks[b as usize];
                let [_, last] = block.pages();
                let (landing, next) = (block.landing, block.next_in_page);
                if let Some(g) = group.as_mut().filter(|g| g.range.contains(&last) && self.stays(exits, b, &g.range)) {
                    g.blocks.push(b);
                    g.landings.extend(landing.map(|l| (b, l)));
                } else {
                    self.kill(exits, b);
                }
                b = next;
            }
        }
        for g in &mut groups {
            g.landings.iter().for_each(|&(b, _)| self.unregister(b));
        }
        groups.retain(|g| !g.blocks.is_empty());
        self.parked = groups;
        self.pages.iter_mut().for_each(|pages| pages.clear());
    }

    /// Can it be kept, and do its jumps stay inside?
    fn stays(&self, exits: &Exits, b: u32, range: &Range<u64>) -> bool {
        let block: &Block = &self.blocks[b as usize];
        let inside = |id: u32| match exits.leave(id) {
            Leave::To(rip) => range.contains(&rip) || exits.linked(id).is_none(),
            _ => true,
        };
        self.contents(block).is_some() && self.exits_of(b).all(inside)
    }

    /// The pages of the group at an address, if there is one.
    pub fn parked_at(&self, rip: u64) -> Option<Vec<(u64, Sum)>> {
        let group = self.parked.iter().find(|g| g.range.contains(&rip))?;
        Some(group.pages.iter().map(|&(page, sum, _)| (page, sum)).collect())
    }

    /// Puts the group at an address into use again, or gives it up.
    pub fn settle(&mut self, exits: &Exits, rip: u64, same: bool) {
        let Some(i) = self.parked.iter().position(|g| g.range.contains(&rip)) else { return };
        let group = self.parked.swap_remove(i);
        let free = group.pages.iter().all(|(page, ..)| !self.by_page.contains_key(page));
        let Some(pages) = self.pages.as_mut().filter(|_| same && free) else {
            group.blocks.into_iter().for_each(|b| self.kill(exits, b));
            return;
        };
        for (page, sum, head) in group.pages {
            pages.entry(page).or_default().content = Some(Content { sum, mapping: group.range.start });
            self.by_page.insert(page, head);
        }
        for b in group.blocks {
            self.enter_index(b);
            if let [first, last] = self.blocks[b as usize].pages()
                && last != first
            {
                self.ending.entry(last).or_default().push(b);
            }
        }
        for (b, landing) in group.landings {
            self.register(b, landing);
        }
    }
}
