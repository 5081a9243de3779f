//! Between records and the store: blocks that were made in an earlier run enter it, and those there are become records.

use crate::block::{CodeSource, Opened};
use crate::emit::Emitter;
use crate::exits::Exits;
use crate::lower::{Depends, Exit, Leave, Relocation, emit_landing, move_code, stub_before};
use crate::marks::{Home, Mark, What};
use crate::persist::Archive;
use crate::persist::hash::{Sum, sum};
use crate::persist::record::{Kept, KeptExit, Record, Recorder};
use crate::store::{Block, Store};
use crate::system::hash::Map;
use bivisor_emulator::mem::PAGE_SIZE;
use std::collections::HashSet;
use std::ops::Range;

/// What is known of a page of code.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// The sum of its content, if what is made from it is worth keeping.
    sum: Option<Sum>,
    /// The archive was asked for it.
    asked: bool,
    /// Where its record is, and the blocks there that have not been adopted.
    record: Range<usize>,
    waiting: Vec<(u16, Home, u32)>,
}

impl Page {
    /// The sum of its content, if what is made from it is worth keeping.
    pub fn sum(&self) -> Option<Sum> {
        self.sum
    }

    /// Sets it.
    pub fn set_sum(&mut self, sum: Sum) {
        self.sum = Some(sum);
    }
}

/// Pages by address.
pub type Pages = Map<u64, Page>;

fn page_of(address: u64) -> u64 {
    address & !(PAGE_SIZE - 1)
}

/// What an archive says of a page.
#[derive(Default)]
pub struct Found {
    page: Option<Sum>,
    /// Of the page after it, if it was looked at.
    next: Option<Sum>,
    record: Range<usize>,
    blocks: Vec<(u16, Home, u32)>,
}

/// The sum of a page that cannot be written and is watched from now on.
pub fn sum_of(source: &mut dyn CodeSource, page: u64) -> Option<Sum> {
    let mut bytes = [0; PAGE_SIZE as usize];
    let fit = source.is_file(page) && source.open(page) == Opened::Watched && source.read(page, &mut bytes);
    fit.then(|| sum(&bytes))
}

/// Asks for the page at `page`. No lock is held.
pub fn ask(archive: &Archive, source: &mut dyn CodeSource, page: u64) -> Found {
    let Some(now) = sum_of(source, page) else { return Found::default() };
    let record = archive.place(now).unwrap_or_default();
    let bytes = archive.record(record.clone());
    let next = Record::read(bytes).and_then(|r| r.next).and_then(|_| sum_of(source, page.wrapping_add(PAGE_SIZE)));
    Found { page: Some(now), next, record, blocks: Record::blocks(bytes) }
}

impl Store {
    /// From now on, what is made can be kept, and about so many blocks will be adopted.
    pub fn keep_pages(&mut self, blocks: usize) {
        self.pages = Some(Pages::default());
        self.index.reserve(blocks);
    }

    /// Was the archive asked for the page of this address?
    pub fn was_asked(&self, rip: u64) -> bool {
        self.pages.as_ref().is_none_or(|pages| pages.get(&page_of(rip)).is_some_and(|p| p.asked))
    }

    /// Notes what was found for the page at `page`, which has not changed since.
    pub fn note_page(&mut self, page: u64, found: Found) {
        let Some(pages) = &mut self.pages else { return };
        pages.insert(page, Page { sum: found.page, asked: true, record: found.record, waiting: found.blocks });
        if let Some(next) = found.next {
            pages.entry(page.wrapping_add(PAGE_SIZE)).or_default().sum = Some(next);
        }
    }

    /// Adopts the block at `rip` if there is one. Blocks come in the order in which they are met, as if translated now: code that is
    /// executed together lies together.
    pub fn adopt(&mut self, exits: &Exits, archive: &Archive, rip: u64, home: Home) -> bool {
        if self.is_full() {
            return false;
        }
        let page = page_of(rip);
        let Some(known) = self.pages.as_mut().and_then(|pages| pages.get_mut(&page)) else { return false };
        let start = (rip - page) as u16;
        let Some(i) = known.waiting.iter().position(|b| (b.0, b.1) == (start, home)) else { return false };
        let (_, _, at) = known.waiting.swap_remove(i);
        let bytes = archive.record(known.record.clone());
        self.adopt_at(exits, page, bytes, at);
        true
    }

    /// Adopts what is left of the pages that were met.
    pub fn adopt_rest(&mut self, exits: &Exits, archive: &Archive) {
        let mut pages = std::mem::take(&mut self.pages);
        let rest: Vec<_> = pages
            .iter_mut()
            .flatten()
            .flat_map(|(&page, known)| {
                let record = known.record.clone();
                std::mem::take(&mut known.waiting).into_iter().map(move |(_, _, at)| (page, record.clone(), at))
            })
            .collect();
        self.pages = pages;
        for (page, record, at) in rest {
            if self.is_full() {
                break;
            }
            self.adopt_at(exits, page, archive.record(record), at);
        }
    }

    fn adopt_at(&mut self, exits: &Exits, page: u64, bytes: &[u8], at: u32) {
        let Some(record) = Record::read(bytes) else { return };
        let mut kept = std::mem::take(&mut self.kept);
        if let Some(code) = Record::block_at(bytes, at, &mut kept) {
            let crosses = u64::from(kept.start) + u64::from(kept.len) > PAGE_SIZE;
            let next = self.pages.as_ref().and_then(|pages| pages.get(&page.wrapping_add(PAGE_SIZE))?.sum);
            if !crosses || next.is_some() && next == record.next {
                let start = page.wrapping_add(u64::from(kept.start));
                self.adopt_block(exits, &kept, code, start, page.wrapping_sub(record.base));
            }
        }
        self.kept = kept;
    }

    fn adopt_block(&mut self, exits: &Exits, kept: &Kept, code: &[u8], start: u64, move_by: u64) {
        if self.get(start, kept.home).is_some() {
            return;
        }
        let base = self.buffer.base();
        let mut unit = std::mem::take(&mut self.unit);
        unit.clear();
        let mut e = Emitter { bytes: std::mem::take(&mut unit.code), base: base + self.buffer.next() as u64 };
        unit.landing = kept.landing.then(|| emit_landing(&mut e, &mut unit.marks, start, base + u64::from(self.miss)));
        e.nops(padding(kept, e.here()));
        let body = e.len();
        let place = e.here();
        let stubs = base + self.buffer.cold_end() as u64;
        e.bytes.extend_from_slice(code);
        let host = place.wrapping_sub(kept.host);
        let moved =
            move_code(&mut e.bytes[body..], &kept.relocations, (host, move_by), place, (stubs, self.exits_used));
        if moved {
            let at = |offset: u16| (body + usize::from(offset)) as u32;
            for (id, exit) in (self.exits_used..).zip(&kept.exits) {
                unit.exits.push(self.adopt_exit(exit, id, (start, kept.home), (place, move_by), &mut e, &at));
            }
            let first_exit = self.exits_used;
            unit.marks.extend(kept.marks.iter().map(|m| Mark {
                at: at(m.at) as u16,
                what: match m.what {
                    What::Exit(n) => What::Exit(first_exit + n),
                    what => what,
                },
                home: m.home,
            }));
            let moved = |r: &Relocation| Relocation { at: at(r.at) as u16, ..*r };
            unit.relocations.extend(kept.relocations.iter().map(moved));
            (unit.body, unit.guest_len, unit.insns) = (body as u32, kept.len, 0);
        }
        unit.code = e.bytes;
        if moved {
            self.enter(exits, (start, kept.home), &unit);
            self.stats.adopted += 1;
        }
        self.unit = unit;
    }

    /// An exit of a block that now begins at `start` of the guest and `place` of the host.
    fn adopt_exit(
        &self,
        exit: &KeptExit,
        id: u32,
        (start, start_home): (u64, Home),
        (place, move_by): (u64, u64),
        e: &mut Emitter,
        at: &dyn Fn(u16) -> u32,
    ) -> Exit {
        let leave = match exit.leave {
            Leave::To(rip) => Leave::To(rip.wrapping_add(move_by)),
            Leave::Step(rip) => Leave::Step(rip.wrapping_add(move_by)),
            Leave::Changed(rip) => Leave::Changed(rip.wrapping_add(move_by)),
            Leave::Syscall(rip, len) => Leave::Syscall(rip.wrapping_add(move_by), len),
        };
        let home = exit.home;
        let Leave::To(target) = leave else {
            return Exit { leave, site: u32::MAX, short: false, step: 0, linked: None, begun: 0, home };
        };
        let base = self.buffer.base();
        let linked = match target == start && home == start_home {
            true => Some(place),
            false => self.get(target, home).map(|(_, body)| base + u64::from(body)),
        };
        let site = at(exit.site);
        if exit.short {
            let back = place.wrapping_sub(e.base + u64::from(site) + 1);
            e.bytes[site as usize] = back as u8;
            return Exit { leave, site, short: true, step: at(exit.step), linked: Some(place), begun: 0, home };
        }
        let stubs = base + self.buffer.cold_end() as u64;
        e.set_rel32(site as usize, linked.unwrap_or_else(|| stub_before(stubs, id)));
        Exit { leave, site, short: false, step: 0, linked, begun: 0, home }
    }

    /// The sums of the first and the last page of a block that can be kept.
    pub(crate) fn sums(&self, b: &Block) -> Option<(Sum, Sum)> {
        let pages = self.pages.as_ref().filter(|_| b.live)?;
        let known = |address: u64| pages.get(&page_of(address)).and_then(|p| p.sum);
        let [first, last] = b.pages();
        let sum = known(first)?;
        Some((sum, if last == first { sum } else { known(last)? }))
    }

    /// How many blocks were made since the program began.
    pub fn made(&self) -> u64 {
        self.blocks.len().saturating_sub(self.began) as u64
    }

    /// How many of the blocks made since the program began can be kept.
    pub fn worth_keeping(&self) -> u64 {
        let others = self.with_constants();
        let kept = |(n, b): &(usize, &Block)| self.sums(b).is_some() && !others.contains(&(*n as u32));
        self.blocks.iter().enumerate().skip(self.began).filter(kept).count() as u64
    }

    /// All that can be kept, by the sums of its pages.
    pub fn records(&self, exits: &Exits) -> Vec<(Sum, Vec<u8>)> {
        let mut pages: Map<u64, Vec<usize>> = Map::default();
        let others = self.with_constants();
        for n in 1..self.blocks.len() {
            if self.sums(&self.blocks[n]).is_some() && !others.contains(&(n as u32)) {
                pages.entry(self.blocks[n].pages()[0]).or_default().push(n);
            }
        }
        let mut seen = HashSet::new();
        let mut records = Vec::new();
        for (base, blocks) in pages {
            let Some((sum, _)) = self.sums(&self.blocks[blocks[0]]) else { continue };
            // The same content twice: one is enough.
            if !seen.insert(sum) {
                continue;
            }
            let crossing = blocks.iter().find(|&&n| self.blocks[n].pages()[1] != base);
            let next = crossing.and_then(|&n| self.sums(&self.blocks[n])).map(|(_, next)| next);
            let mut record = Recorder::new(base, next);
            for n in blocks {
                let b = &self.blocks[n];
                record.add(&self.kept(exits, n), &self.buffer.code(b.body as usize..b.end as usize));
            }
            records.push((sum, record.bytes()));
        }
        records
    }

    fn kept(&self, exits: &Exits, n: usize) -> Kept {
        let b = &self.blocks[n];
        let after = self.blocks.get(n + 1);
        let marks = &self.marks[b.marks as usize..after.map_or(self.marks.len(), |a| a.marks as usize)];
        let relocations =
            &self.relocations[b.relocations as usize..after.map_or(self.relocations.len(), |a| a.relocations as usize)];
        let ids = b.first_exit..after.map_or(self.exits_used, |a| a.first_exit);
        let body = (b.body - b.at) as u16;
        let exit = |id| {
            let (leave, place, home) = (exits.leave(id), self.place(exits, id), exits.home(id));
            let inside = |at: usize| (at as u64).wrapping_sub(u64::from(b.body)) as u16;
            match leave {
                Leave::To(_) if place.short => {
                    KeptExit { leave, site: inside(place.site), short: true, step: inside(place.stub), home }
                }
                Leave::To(_) => KeptExit { leave, site: inside(place.site), short: false, step: 0, home },
                _ => KeptExit { leave, site: 0, short: false, step: 0, home },
            }
        };
        Kept {
            start: (b.start % PAGE_SIZE) as u16,
            len: b.len,
            home: b.home,
            landing: b.landing.is_some(),
            host: self.buffer.base() + u64::from(b.body),
            marks: marks
                .iter()
                .map(|m| m.unpack(0))
                .filter(|m| m.at >= body)
                .map(|m| Mark { at: m.at - body, ..m })
                .collect(),
            exits: ids.map(exit).collect(),
            relocations: relocations
                .iter()
                .map(|&(at, depends)| Relocation { at: at.saturating_sub(body), depends: Depends::unpack(depends) })
                .collect(),
        }
    }
}

/// How many bytes further on than `here` the code may lie so that no displacement that is patched crosses a cache line.
fn padding(kept: &Kept, here: u64) -> usize {
    let sites = || kept.exits.iter().filter(|e| matches!(e.leave, Leave::To(_)) && !e.short);
    let fits = |pad: &u64| sites().all(|e| (here + pad + u64::from(e.site)) % 64 <= 60);
    // A loop lies in its lines as it did.
    let looped = kept.exits.iter().any(|e| e.short);
    let same = (kept.host.wrapping_sub(here)) % 64;
    match looped {
        true => same as usize,
        false => (0..64).find(fits).unwrap_or(same) as usize,
    }
}
