//! From one program to the next in the same host process: code made from pages of files stays, apart, until it shows whether the next
//! program has the same pages at the same addresses, as it has of the dynamic linker and the C library.
//!
//! Code of one mapping is a group, which comes back or goes as a whole: jumps lead from block to block within it without a look. Nothing
//! is done to its blocks before: a forked child shares with its parent what neither writes.

use crate::block::{CodeSource, page_of};
use crate::exits::Exits;
use crate::known::NONE;
use crate::lower::Leave;
use crate::persist::Archive;
use crate::persist::adopt::{Content, Found, Page, content_of};
use crate::persist::hash::Sum;
use crate::persist::kin::Used;
use crate::store::Store;
use bivisor_emulator::mem::PAGE_SIZE;
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

/// The code of a mapping that is gone, or is to come.
pub struct Group {
    range: Range<u64>,
    /// Address, content and first block of each page.
    pages: Vec<(u64, Sum, u32)>,
    /// It was made for programs to come.
    prepared: bool,
}

/// Is the content of these pages, watched from now on, what it was? No lock is held.
pub fn is_same(source: &mut dyn CodeSource, pages: &[(u64, Sum)]) -> bool {
    pages.iter().all(|&(page, sum)| content_of(source, page).is_some_and(|c| c.sum == sum))
}

impl Store {
    /// The blocks of a list of a page.
    fn chain(&self, head: u32) -> impl Iterator<Item = u32> {
        let some = |b: u32| Some(b).filter(|&b| b != NONE);
        std::iter::successors(some(head), move |&b| some(self.blocks[b as usize].next_in_page))
    }

    fn blocks_of(&self, group: &Group) -> Vec<u32> {
        group.pages.iter().flat_map(|&(_, _, head)| self.chain(head)).collect()
    }

    /// The blocks of all groups.
    pub fn parked_blocks(&self) -> HashSet<u32> {
        self.parked.iter().flat_map(|g| self.blocks_of(g)).collect()
    }

    /// Forgets blocks that nothing leads to.
    fn drop_blocks(&mut self, blocks: Vec<u32>) {
        blocks.into_iter().for_each(|b| {
            self.blocks[b as usize].die();
        });
    }

    /// Takes everything out of use; what was made from pages of files in `mappings` can be had back.
    pub fn park(&mut self, exits: &Exits, mappings: &[Range<u64>]) {
        self.clear_landings();
        let (kept, old): (Vec<_>, Vec<_>) = std::mem::take(&mut self.parked).into_iter().partition(|g| g.prepared);
        old.iter().for_each(|g| self.drop_blocks(self.blocks_of(g)));
        // What they know of other pages may not hold there.
        self.bound.extend(std::mem::take(&mut self.constants).into_values().flatten().map(|(b, _)| b));
        let group = |range: &Range<u64>| Group { range: range.clone(), pages: Vec::new(), prepared: false };
        let mut groups: Vec<Group> = mappings.iter().map(group).collect();
        self.index.clear();
        self.compared.clear();
        let mut pages: BTreeMap<u64, u32> =
            std::mem::take(&mut self.ending).into_keys().map(|page| (page, NONE)).collect();
        pages.extend(std::mem::take(&mut self.by_page));
        for (page, head) in pages {
            let sum = self.pages.as_ref().and_then(|pages| Some(pages.get(&page)?.content?.sum));
            match (groups.iter_mut().find(|g| g.range.contains(&page)), sum) {
                (Some(group), Some(sum)) => group.pages.push((page, sum, head)),
                // Blocks of the group may lead there.
                (Some(_), None) => self.chain(head).collect::<Vec<_>>().into_iter().for_each(|b| self.kill(exits, b)),
                (None, _) => self.drop_blocks(self.chain(head).collect()),
            }
        }
        groups.retain(|g| g.pages.iter().any(|&(_, _, head)| head != NONE));
        groups.extend(kept);
        self.parked = groups;
        self.pages.iter_mut().for_each(|pages| pages.clear());
    }

    /// Can it be kept, and do its jumps stay inside?
    fn stays(&self, exits: &Exits, b: u32, range: &Range<u64>) -> bool {
        let inside = |id: u32| match exits.leave(id) {
            Leave::To(rip) => range.contains(&rip) || exits.linked(id).is_none(),
            _ => true,
        };
        let contents = self.contents(&self.blocks[b as usize]);
        contents.is_some() && !self.bound.contains(&b) && self.exits_of(b).all(inside)
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
        let blocks = self.blocks_of(&group);
        let taken = |page: &u64| self.by_page.contains_key(page) || self.ending.contains_key(page);
        let free = group.pages.iter().all(|(page, ..)| !taken(page));
        let Some(pages) = self.pages.as_mut().filter(|_| same && free) else {
            self.drop_blocks(blocks);
            return;
        };
        for &(page, sum, head) in &group.pages {
            pages.entry(page).or_default().content = Some(Content { sum, mapping: group.range.start });
            if head != NONE {
                self.by_page.insert(page, head);
            }
        }
        let live = blocks.into_iter().filter(|&b| self.blocks[b as usize].is_live());
        // What was prepared does.
        let stays = |b: &u32| group.prepared || self.stays(exits, *b, &group.range);
        let (stay, go): (Vec<u32>, Vec<u32>) = live.partition(stays);
        for b in go {
            self.blocks[b as usize].landing = None;
            self.kill(exits, b);
        }
        for b in stay {
            self.enter_index(b);
            let block = &self.blocks[b as usize];
            let ([first, last], landing) = (block.pages(), block.landing);
            if last != first {
                self.ending.entry(last).or_default().push(b);
            }
            if let Some(landing) = landing {
                self.register(b, landing);
            }
        }
    }

    /// Takes clusters over and parks them for programs to come, where this one has nothing.
    pub fn prepare(&mut self, exits: &Exits, archive: &Archive, all: &[Used]) {
        let (before, first) = (self.stats, self.blocks.len() as u32);
        // Of each mapping the pages.
        let mut ours: BTreeMap<u64, BTreeMap<u64, Sum>> = BTreeMap::new();
        for used in all {
            let Some((c, _)) = archive.cluster(used.cluster).filter(|(c, _)| c.constants().len() == 0) else {
                continue;
            };
            let moved: Vec<(u64, Sum)> = c.pages().map(|(page, sum)| (page.wrapping_add(used.move_by), sum)).collect();
            let group = ours.entry(used.mapping).or_default();
            let fits = moved.iter().all(|(page, sum)| {
                let known = self.pages.as_ref().is_none_or(|p| p.contains_key(page)) || self.by_page.contains_key(page);
                let other =
                    known || self.ending.contains_key(page) || self.parked.iter().any(|g| g.range.contains(page));
                *page >= used.mapping && page_of(*page) == *page && group.get(page).map_or(!other, |s| s == sum)
            });
            let Some(pages) = self.pages.as_mut().filter(|_| fits) else { continue };
            for (page, sum) in moved {
                group.insert(page, sum);
                let content = Some(Content { sum, mapping: used.mapping });
                pages.insert(page, Page { content, asked: true, blocks: 0..0 });
            }
            self.adopt_cluster(exits, &c, &Found::known(used.cluster, used.move_by));
        }
        for b in first..self.blocks.len() as u32 {
            let group = |s: &Store, b: u32| Some(s.contents(&s.blocks[b as usize])?[0].mapping).filter(|_| b >= first);
            let own = group(self, b);
            // What leads elsewhere may lead to what is not there, or is not as it was.
            if self.exits_of(b).any(|exit| exits.linked(exit).is_some_and(|to| group(self, to) != own)) {
                self.kill(exits, b);
                continue;
            }
            // What was adopted first did not know what came last.
            for exit in self.exits_of(b) {
                if let Leave::To(to) = exits.leave(exit)
                    && let Some((to, _)) = self.get(to, exits.home(exit)).filter(|(to, _)| group(self, *to) == own)
                {
                    self.link(exits, exit, to);
                }
            }
        }
        for (mapping, pages) in ours {
            let Some((&last, _)) = pages.last_key_value() else { continue };
            let mut group = Group { range: mapping..last + PAGE_SIZE, pages: Vec::new(), prepared: true };
            for (page, sum) in pages {
                self.pages.iter_mut().for_each(|all| _ = all.remove(&page));
                self.ending.remove(&page);
                group.pages.push((page, sum, self.by_page.remove(&page).unwrap_or(NONE)));
            }
            for b in self.blocks_of(&group) {
                let block = &self.blocks[b as usize];
                let (key, landing) = (block.key(), block.landing);
                self.index.remove(key, b);
                if let Some(landing) = landing {
                    self.unregister(b);
                    self.set_aside(b, landing);
                }
            }
            self.parked.push(group);
        }
        self.stats = before;
    }
}
