//! Blocks that were made in an earlier run enter the store, a cluster at a time.

use crate::block::{CodeSource, Constant, Opened, is_user, page_of};
use crate::emit::Emitter;
use crate::exits::{Exits, MAX_EXITS, Place};
use crate::known::Block;
use crate::lower::{Landing, Leave, emit_landing, move_code, stub_before, stubs_size};
use crate::marks::{Home, Packed};
use crate::persist::Archive;
use crate::persist::cluster::{Cluster, Row};
use crate::persist::hash::{Sum, sum};
use crate::persist::kin::Used;
use crate::store::Store;
use crate::system::hash::Map;
use bivisor_emulator::mem::PAGE_SIZE;
use std::ops::Range;

/// What is known of a page of code.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// Its content, if what is made from it is worth keeping.
    pub content: Option<Content>,
    /// The archive was asked for it.
    pub asked: bool,
    /// Which of its blocks the archive has.
    pub blocks: Range<u32>,
}

/// What is in a page of a file that cannot be written and is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// Its sum.
    pub sum: Sum,
    /// Where its mapping begins: pages of one mapping are at the same distances in the next run.
    pub mapping: u64,
}

/// Pages by address.
pub type Pages = Map<u64, Page>;

/// What is in a page, if it cannot be written and is watched from now on. No lock is held.
pub fn content_of(source: &mut dyn CodeSource, page: u64) -> Option<Content> {
    let mut bytes = [0; PAGE_SIZE as usize];
    let mapping = source.file(page)?;
    let fit = source.open(page) == Opened::Watched && source.read(page, &mut bytes);
    fit.then(|| Content { sum: sum(&bytes), mapping })
}

/// A cluster that has a block that is wanted.
#[derive(Clone, Debug)]
pub struct Found {
    cluster: u32,
    /// By how much its blocks lie further on than they did.
    move_by: u64,
    /// Those of its pages of which nothing is known.
    unknown: Vec<u64>,
    /// Where addresses lie that its blocks jump to, and these addresses.
    constants: Vec<(u64, Option<u64>)>,
}

impl Found {
    /// Of a cluster of which all pages are known, and that knows no others.
    pub fn known(cluster: u32, move_by: u64) -> Found {
        Found { cluster, move_by, unknown: Vec::new(), constants: Vec::new() }
    }

    /// Finds out what the store has to know before it can adopt it; no lock is held.
    pub fn look(&mut self, source: &mut dyn CodeSource) -> Vec<(u64, Content)> {
        for (at, target) in &mut self.constants {
            *target = source.constant(*at).filter(is_user);
        }
        // What is not there now may be there later, and nobody would tell.
        self.unknown.iter().filter_map(|&page| Some((page, content_of(source, page)?))).collect()
    }

    /// Need not the source be looked at?
    pub fn is_known(&self) -> bool {
        self.unknown.is_empty() && self.constants.is_empty()
    }
}

impl Store {
    /// From now on, what is made can be kept, and so many blocks may be adopted.
    pub fn keep_pages(&mut self, blocks: usize) {
        self.pages = Some(Pages::default());
        self.taken.clear();
        self.index.reserve(blocks);
    }

    /// Was the archive asked for the page of this address?
    pub fn was_asked(&self, rip: u64) -> bool {
        self.pages.as_ref().is_none_or(|pages| pages.get(&page_of(rip)).is_some_and(|p| p.asked))
    }

    /// Notes what is in the page at `page`, which has not changed since it was looked at.
    pub fn note_page(&mut self, archive: &Archive, page: u64, content: Option<Content>) {
        let Some(pages) = &mut self.pages else { return };
        let blocks = content.and_then(|c| archive.page(c.sum)).unwrap_or_default();
        pages.insert(page, Page { content, asked: true, blocks });
    }

    /// The cluster of the block at `rip`, if there is one that was not adopted already.
    pub fn find_kept(&self, archive: &Archive, rip: u64, home: Home) -> Option<Found> {
        let pages = self.pages.as_ref()?;
        let page = page_of(rip);
        let (cluster, nth) = archive.find(&pages.get(&page)?.blocks, rip, home)?;
        if self.is_full() || self.taken.contains_key(&cluster) {
            return None;
        }
        let c = archive.pages_of(cluster)?;
        let move_by = page.wrapping_sub(c.pages().nth(nth)?.0);
        let unknown = |page: &u64| pages.get(page).is_none_or(|p| !p.asked);
        let unknown = c.pages().map(|(p, _)| p.wrapping_add(move_by)).filter(unknown).collect();
        let constants = c.constants().map(|at| (at.wrapping_add(move_by), None)).collect();
        Some(Found { cluster, move_by, unknown, constants })
    }

    /// Adopts a cluster. Blocks come in the order in which they were first executed, as if translated now: code that is executed together
    /// lies together. Those of pages that have changed, or are not there, are left out.
    pub fn adopt(&mut self, exits: &Exits, archive: &Archive, found: &Found) {
        if self.taken.insert(found.cluster, found.move_by).is_some() {
            return;
        }
        if let Some((cluster, _)) = archive.cluster(found.cluster) {
            self.adopt_cluster(exits, &cluster, found);
        }
    }

    pub(crate) fn adopt_cluster(&mut self, exits: &Exits, cluster: &Cluster<'_>, found: &Found) {
        Adoption::of(self, cluster, found).run(self, exits, cluster);
    }

    /// What was adopted of an archive, for [`crate::persist::kin`].
    pub fn used(&self, archive: &Archive) -> Vec<Used> {
        let mapping = |page: u64| Some(self.pages.as_ref()?.get(&page)?.content?.mapping);
        let used = |(&cluster, &move_by): (&u32, &u64)| {
            let (page, _) = archive.pages_of(cluster)?.pages().next()?;
            Some(Used { cluster, move_by, mapping: mapping(page.wrapping_add(move_by))? })
        };
        let mut all: Vec<Used> = self.taken.iter().filter_map(used).collect();
        all.sort_by_key(|u| u.cluster);
        all
    }
}

/// A cluster on its way into a store.
struct Adoption<'a> {
    /// By how much its blocks lie further on in the guest.
    move_by: u64,
    /// And on the host.
    host_by: u64,
    /// Offset of its code, and how much is put before it, so that it lies in its cache lines as it did.
    at: usize,
    pad: usize,
    first_block: u32,
    /// Which block of the store stands for each of its blocks.
    stands: Vec<Option<u32>>,
    /// Pages that are not what they were.
    bad: Vec<u64>,
    landings: Vec<(u32, Landing)>,
    /// The blocks that jump to an address that lies in memory, and where.
    bound: Vec<(u32, Constant)>,
    /// Where they do.
    constants: std::slice::Iter<'a, (u64, Option<u64>)>,
}

impl Adoption<'_> {
    fn of<'a>(store: &Store, c: &Cluster<'_>, found: &'a Found) -> Adoption<'a> {
        let move_by = found.move_by;
        let next = store.buffer.base() + store.buffer.next() as u64;
        let pad = (c.host.wrapping_sub(next) % 64) as usize;
        let known = |page: u64| store.pages.as_ref()?.get(&page)?.content.map(|c| c.sum);
        let moved = c.pages().map(|(page, sum)| (page.wrapping_add(move_by), sum));
        Adoption {
            move_by,
            host_by: (next + pad as u64).wrapping_sub(c.host),
            at: store.buffer.next() + pad,
            pad,
            first_block: store.blocks.len() as u32,
            stands: Vec::with_capacity(c.rows().len()),
            bad: moved.filter(|(page, sum)| known(*page) != Some(*sum)).map(|(page, _)| page).collect(),
            landings: Vec::new(),
            bound: Vec::new(),
            constants: found.constants.iter(),
        }
    }

    fn run(mut self, store: &mut Store, exits: &Exits, c: &Cluster<'_>) {
        // One tail more than they need.
        let stubs = stubs_size(c.exits().len() as u32 + 12);
        let fits = store.buffer.fits(self.pad + c.code.len() + stubs);
        if !fits || store.exits_used as usize + c.exits().len() > MAX_EXITS as usize {
            return;
        }
        let mut e = Emitter { bytes: std::mem::take(&mut store.unit.code), base: 0 };
        e.bytes.clear();
        e.nops(self.pad);
        e.bytes.extend_from_slice(c.code);
        self.blocks(store, c, &mut e.bytes);
        self.exits(store, exits, c, &mut e.bytes);
        store.buffer.append(&e.bytes);
        let first = store.exits_used;
        store.exits_used += c.exits().len() as u32;
        store.stats.host_bytes += (e.len() + store.append_stubs(first)) as u64;
        store.unit.code = e.bytes;
        for (b, landing) in self.landings {
            store.register(b, landing);
        }
        for (b, constant) in self.bound {
            store.note_constant(b, constant);
        }
    }

    /// Moves the code of all blocks and enters those that are good.
    fn blocks(&mut self, store: &mut Store, c: &Cluster<'_>, code: &mut [u8]) {
        let base = store.buffer.base();
        let stubs = base + store.buffer.cold_end() as u64;
        let mut relocations = std::mem::take(&mut store.unit.relocations);
        let mut landing = Emitter::new(0);
        let mut all = c.relocations();
        let mut marks = c.marks();
        let (mut at, mut first_exit) = (self.at, store.exits_used);
        for row in c.rows() {
            relocations.clear();
            relocations.extend(all.by_ref().take(row.relocations.into()));
            let start = row.start.wrapping_add(self.move_by);
            let b = store.blocks.len() as u32;
            let sizes = (at, row.size.into(), row.body.into());
            let block = Block::new((start, row.home), sizes, row.marks.into(), row.len);
            let block = block.knowing(store.notes.len(), first_exit);
            store.notes.extend(marks.by_ref().take(row.marks.into()));
            store.notes.extend(relocations.iter().map(|r| Packed::relocation(*r)));
            let pages = block.pages();
            store.blocks.push(block);
            let bytes = &mut code[self.pad + at - self.at..][..row.size.into()];
            let (place, moves) = (base + at as u64, (self.host_by, self.move_by));
            let constant = if row.constant { self.constants.next() } else { None };
            let constant = constant.and_then(|&(at, target)| Some(Constant { at, target: target? }));
            let stands = if pages.iter().any(|p| self.bad.contains(p)) || row.constant && constant.is_none() {
                None
            } else if let Some((old, _)) = store.get(start, row.home) {
                Some(old)
            } else if move_code(bytes, &relocations, moves, place, (stubs, first_exit)) {
                if row.landing {
                    self.land(store, (b, &row), (start, place), bytes, &mut landing);
                }
                store.enter_index(b);
                store.enter_pages(b);
                self.bound.extend(constant.map(|c| (b, c)));
                Some(b)
            } else {
                None
            };
            self.stands.push(stands);
            if stands == Some(b) {
                store.stats.blocks += 1;
                store.stats.adopted += 1;
                store.stats.guest_bytes += u64::from(row.len);
            } else {
                store.blocks[b as usize].die();
            }
            at += usize::from(row.size);
            first_exit += u32::from(row.exits);
        }
        store.unit.relocations = relocations;
    }

    /// Makes the landing of a block anew, where it was.
    fn land(
        &mut self,
        store: &mut Store,
        (b, row): (u32, &Row),
        (start, place): (u64, u64),
        code: &mut [u8],
        e: &mut Emitter,
    ) {
        e.base = place;
        e.bytes.clear();
        store.unit.marks.clear();
        let miss = store.buffer.base() + u64::from(store.miss);
        let landing = emit_landing(e, &mut store.unit.marks, start, miss);
        if e.len() <= row.body.into() {
            code[..e.len()].copy_from_slice(&e.bytes);
            self.landings.push((b, landing.moved((place - store.buffer.base()) as u32)));
        }
    }

    /// Defines the exits of all blocks, links them and makes their stubs.
    fn exits(&self, store: &mut Store, exits: &Exits, c: &Cluster<'_>, code: &mut [u8]) {
        let end = store.buffer.cold_end() as u64;
        let mut all = (store.exits_used..).zip(c.exits());
        let mut bound = self.bound.iter().peekable();
        for (b, row) in (self.first_block..).zip(c.rows()) {
            let (at, live) = (store.blocks[b as usize].at as usize, store.blocks[b as usize].is_live());
            let end_of_block = store.blocks[b as usize].first_exit + u32::from(row.exits);
            let constant = bound.next_if(|(with, _)| *with == b).map(|(_, c)| Leave::To(c.target));
            for (id, exit) in all.by_ref().take(row.exits.into()) {
                let stub = stub_before(end, id);
                let leave = constant.filter(|_| id + 1 == end_of_block).unwrap_or(exit.leave.moved(self.move_by));
                let Leave::To(target) = leave else {
                    exits.set(id, leave, exit.home, Place { site: 0, short: false, stub: 0 });
                    continue;
                };
                let site = at + usize::from(exit.site);
                let place = Place { site: exit.site.into(), short: exit.short, stub: exit.step.into() };
                exits.set(id, leave, exit.home, place);
                let to = match exit.inside {
                    _ if !live => None,
                    _ if exit.short => Some(b),
                    Some(n) => self.stands[usize::from(n)],
                    None => store.get(target, exit.home).map(|(to, _)| to),
                };
                // What leads to a block of the cluster does so already.
                let leads = to.is_some() && to == exit.inside.map(|n| self.first_block + u32::from(n));
                if !leads && !exit.short {
                    let to = to.map_or(stub, |to| store.blocks[to as usize].body().into());
                    let field = &mut code[self.pad + site - self.at..][..4];
                    field.copy_from_slice(&(to.wrapping_sub(site as u64 + 4) as u32).to_le_bytes());
                }
                if let Some(to) = to {
                    store.note_link(exits, id, to);
                }
            }
        }
    }
}
