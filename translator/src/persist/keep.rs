//! What is in the store becomes clusters.

use crate::block::{Constant, page_of};
use crate::emit::Emitter;
use crate::exits::Exits;
use crate::known::{Block, key};
use crate::lower::{Leave, Relocation, emit_landing, move_code};
use crate::marks::Mark;
use crate::persist::adopt::Content;
use crate::persist::archive::{Name, within};
use crate::persist::cluster::{FULL, KeptExit, MOST_BLOCKS, Making, Row};
use crate::store::Store;
use crate::system::hash::Map;
use std::collections::{HashMap, HashSet};

impl Store {
    fn content(&self, address: u64) -> Option<Content> {
        self.pages.as_ref()?.get(&page_of(address))?.content
    }

    /// What is in the first and in the last page of a block that can be kept.
    pub(crate) fn contents(&self, b: &Block) -> Option<[Content; 2]> {
        let [first, last] = b.pages();
        // Traces, which have no length, are not: they are made where it proves worth while.
        let content = self.content(first).filter(|_| b.is_live() && b.len() > 0)?;
        Some([content, if last == first { content } else { self.content(last)? }])
    }

    /// How many blocks were made since the program began.
    pub fn made(&self) -> u64 {
        self.blocks.len().saturating_sub(self.began) as u64
    }

    /// How many of the blocks made since the program began can be kept.
    pub fn worth_keeping(&self) -> u64 {
        let parked = self.parked_blocks();
        let kept = |(n, b): &(u32, &Block)| !parked.contains(n) && self.contents(b).is_some();
        (0..).zip(&self.blocks).skip(self.began).filter(kept).count() as u64
    }

    /// All that can be kept, in the order in which it was first executed; a cluster for each stretch of a mapping's.
    pub fn clusters(&self, exits: &Exits) -> Vec<Vec<u8>> {
        let constants: Map<u32, Constant> = self.constants.values().flatten().copied().collect();
        let parked = self.parked_blocks();
        // The same content twice: one is enough.
        let mut seen: HashSet<Name> = HashSet::new();
        // What knows constants is wanted later: when these do not change any more.
        let mut open: HashMap<(u64, bool), (Vec<usize>, usize)> = HashMap::new();
        let mut clusters = Vec::new();
        for (n, b) in self.blocks.iter().enumerate().skip(1) {
            let Some([first, last]) = self.contents(b) else { continue };
            if first.mapping != last.mapping
                || parked.contains(&(n as u32))
                || !seen.insert((first.sum, within(b.start(), b.home())))
            {
                continue;
            }
            let (blocks, size) = open.entry((first.mapping, constants.contains_key(&(n as u32)))).or_default();
            blocks.push(n);
            *size += (b.end() - b.at) as usize;
            if blocks.len() == MOST_BLOCKS || *size > FULL {
                clusters.push(self.cluster(exits, blocks, &constants).bytes());
                (*blocks, *size) = (Vec::new(), 0);
            }
        }
        let rest = open.into_values().filter(|(blocks, _)| !blocks.is_empty());
        clusters.extend(rest.map(|(blocks, _)| self.cluster(exits, &blocks, &constants).bytes()));
        clusters
    }

    /// A cluster of these blocks, but for those that cannot lie near enough.
    fn cluster(&self, exits: &Exits, blocks: &[usize], constants: &Map<u32, Constant>) -> Making {
        let mut made = Making { host: self.buffer.base(), ..Making::default() };
        let mut ordinals = Map::default();
        for &n in blocks {
            let ordinal = made.rows.len() as u16;
            if self.add(exits, n, constants.get(&(n as u32)), &mut made) {
                ordinals.insert(self.blocks[n].key(), ordinal);
            }
        }
        let mut all = made.exits.iter_mut();
        let (mut at, bodies) = (0, bodies(&made.rows));
        for row in &made.rows {
            for (i, exit) in all.by_ref().take(row.exits.into()).enumerate() {
                let Leave::To(target) = exit.leave else { continue };
                if row.constant && i + 1 == usize::from(row.exits) {
                    continue;
                }
                exit.inside = ordinals.get(&key(target, exit.home)).copied();
                let site = at + usize::from(exit.site);
                if let Some(to) = exit.inside.map(|n| bodies[usize::from(n)]) {
                    match exit.short {
                        true => made.code[site] = to.wrapping_sub(site + 1) as u8,
                        false => {
                            made.code[site..site + 4]
                                .copy_from_slice(&(to.wrapping_sub(site + 4) as u32).to_le_bytes());
                        }
                    }
                }
            }
            at += usize::from(row.size);
        }
        made
    }

    /// Adds a block; false if it cannot be.
    fn add(&self, exits: &Exits, n: usize, constant: Option<&Constant>, made: &mut Making) -> bool {
        let b = &self.blocks[n];
        let Some(contents) = self.contents(b) else { return false };
        let (marks, relocations) = self.notes_of(n as u32);
        let old = (b.body() - b.at) as u16;
        let base = self.buffer.base();
        let mut e = Emitter::new(made.host + made.code.len() as u64);
        let mut landing_marks: Vec<Mark> = Vec::new();
        if b.landing.is_some() {
            emit_landing(&mut e, &mut landing_marks, b.start(), base + u64::from(self.miss));
        }
        let inside = |at: usize| (at - b.body() as usize) as u16;
        let mut kept: Vec<KeptExit> = self.exits_of(n as u32).map(|id| self.kept(exits, id, &inside)).collect();
        // A block that ends before the branch does not know where it leads.
        let last = kept.last().copied();
        let constant = constant.filter(|c| last.is_some_and(|e| e.leave == Leave::To(c.target)));
        if constant.is_some_and(|_| last.is_some_and(|e| e.short)) {
            return false;
        }
        e.nops(padding(&kept, base + u64::from(b.body()), e.here()));
        let body = e.len() as u16;
        let place = e.here();
        e.bytes.extend_from_slice(&self.buffer.code(b.body() as usize..b.end() as usize));
        let relocations: Vec<Relocation> = relocations
            .iter()
            .map(|r| r.as_relocation())
            .map(|r| Relocation { at: r.at.saturating_sub(old), ..r })
            .collect();
        let host = place.wrapping_sub(base + u64::from(b.body()));
        let stubs = base + self.buffer.cold_end() as u64;
        if !move_code(&mut e.bytes[body.into()..], &relocations, (host, 0), place, (stubs, 0)) {
            return false;
        }
        for exit in kept.iter_mut().filter(|exit| matches!(exit.leave, Leave::To(_))) {
            exit.site += body;
            exit.step += body;
        }
        let of_body = marks.iter().map(|m| m.unpack(0)).filter(|m| m.at >= old);
        let marks: Vec<Mark> =
            landing_marks.into_iter().chain(of_body.map(|m| Mark { at: m.at - old + body, ..m })).collect();
        made.constants.extend(constant.map(|c| c.at));
        made.rows.push(Row {
            start: b.start(),
            size: e.len() as u16,
            body,
            len: b.len(),
            marks: marks.len() as u16,
            exits: kept.len() as u16,
            relocations: relocations.len() as u16,
            home: b.home(),
            landing: b.landing.is_some(),
            constant: constant.is_some(),
        });
        for (page, content) in b.pages().into_iter().zip(contents) {
            if !made.pages.iter().any(|(known, _)| *known == page) {
                made.pages.push((page, content.sum));
            }
        }
        made.exits.extend(kept);
        made.marks.extend(marks.iter().map(|m| m.pack(0)));
        made.relocations.extend(relocations.iter().map(|r| Relocation { at: r.at + body, ..*r }));
        made.code.extend_from_slice(&e.bytes);
        true
    }

    /// An exit; offsets count from the body.
    fn kept(&self, exits: &Exits, id: u32, inside: &dyn Fn(usize) -> u16) -> KeptExit {
        let (leave, place, home) = (exits.leave(id), self.place(exits, id), exits.home(id));
        let exit = KeptExit { leave, site: 0, short: false, step: 0, home, inside: None };
        match leave {
            Leave::To(_) if place.short => {
                KeptExit { site: inside(place.site), short: true, step: inside(place.stub), ..exit }
            }
            Leave::To(_) => KeptExit { site: inside(place.site), ..exit },
            _ => exit,
        }
    }
}

/// Where the bodies of blocks lie.
fn bodies(rows: &[Row]) -> Vec<usize> {
    let mut at = 0;
    let body = |r: &Row| {
        at += usize::from(r.size);
        at - usize::from(r.size) + usize::from(r.body)
    };
    rows.iter().map(body).collect()
}

/// How many bytes further on than `here` the code that lay at `host` may lie so that no displacement that is patched crosses a cache line.
fn padding(exits: &[KeptExit], host: u64, here: u64) -> usize {
    let sites = || exits.iter().filter(|e| matches!(e.leave, Leave::To(_)) && !e.short);
    let fits = |pad: &u64| sites().all(|e| (here + pad + u64::from(e.site)) % 64 <= 60);
    // A loop lies in its lines as it did.
    let looped = exits.iter().any(|e| e.short);
    let same = host.wrapping_sub(here) % 64;
    match looped {
        true => same as usize,
        false => (0..64).find(fits).unwrap_or(same) as usize,
    }
}
