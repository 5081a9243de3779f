//! Blocks that were executed one after another, as bytes and back: one piece of host code in which they jump to each other without
//! having to be linked, and what is known of them in the form the store has it. All numbers are little-endian.

use crate::known::Block;
use crate::lower::{Depends, Leave, Relocation, stubs_size};
use crate::marks::{Home, Packed};
use crate::persist::hash::Sum;

/// Blocks that a cluster has at most.
pub const MOST_BLOCKS: usize = 64;
/// Bytes of code with which a cluster is full.
pub const FULL: usize = 16 << 10;
/// Bytes of code and stubs that a cluster can have.
const MOST_CODE: usize = 64 << 10;

/// Bytes of each table's rows.
const HEAD: usize = 32;
const PAGE: usize = 24;
const ROW: usize = 24;
const EXIT: usize = 16;
const RELOCATION: usize = 4;

/// A block of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The address its code was made for.
    pub start: u64,
    /// Bytes of host code, which follows that of the block before: a landing if there is one, what aligns, the body.
    pub size: u16,
    /// Offset of the body.
    pub body: u16,
    /// Guest bytes it was made from.
    pub len: u16,
    /// How many marks are its.
    pub marks: u16,
    /// How many exits.
    pub exits: u16,
    /// How many relocations.
    pub relocations: u16,
    /// Where R11 is at its start.
    pub home: Home,
    /// It was the target of an indirect branch: a landing has its place before the body, and is made anew.
    pub landing: bool,
    /// It ends with a branch through memory that does not change, made a jump to where that leads: its last exit, which leads there
    /// wherever that is now.
    pub constant: bool,
}

/// An exit of a block. Offsets count from the start of the block's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptExit {
    /// Why; with the addresses the code was made for.
    pub leave: Leave,
    /// For jumps: offset of the displacement.
    pub site: u16,
    /// It has 8 bits, and leads to the block's own body.
    pub short: bool,
    /// Then: offset of the jump to the stub.
    pub step: u16,
    /// Where R11 is.
    pub home: Home,
    /// The block of the cluster that the jump leads to.
    pub inside: Option<u16>,
}

const REGISTER: u8 = 1;
const LANDING: u8 = 2;
const SHORT: u8 = 4;
const CONSTANT: u8 = 8;

fn flags<const N: usize>(all: [(bool, u8); N]) -> u8 {
    all.into_iter().filter(|(set, _)| *set).map(|(_, bit)| bit).sum()
}

fn home_in(flags: u8) -> Home {
    if flags & REGISTER == 0 { Home::Slot } else { Home::Register }
}

/// A cluster in the making.
#[derive(Debug, Default)]
pub struct Making {
    /// The host address its code was made for.
    pub host: u64,
    /// Each page that a block lies in, with its sum.
    pub pages: Vec<(u64, Sum)>,
    /// The blocks.
    pub rows: Vec<Row>,
    /// Of all blocks, one after the other.
    pub exits: Vec<KeptExit>,
    /// Offsets count from the start of the block's code, here and in relocations.
    pub marks: Vec<Packed>,
    /// See [`crate::lower::move_code`].
    pub relocations: Vec<Relocation>,
    /// Of each block that has one: where the address lies that it jumps to.
    pub constants: Vec<u64>,
    /// The code.
    pub code: Vec<u8>,
}

impl Making {
    /// As bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut all = Vec::new();
        fn put<const N: usize>(all: &mut Vec<u8>, v: [u8; N]) {
            all.extend_from_slice(&v);
        }
        put(&mut all, self.host.to_le_bytes());
        let [pages, rows, exits] = [self.pages.len(), self.rows.len(), self.exits.len()];
        let counts = [self.code.len(), pages, rows, exits, self.marks.len(), self.constants.len()];
        counts.into_iter().for_each(|n| put(&mut all, (n as u32).to_le_bytes()));
        for (page, sum) in &self.pages {
            [*page, sum[0], sum[1]].into_iter().for_each(|v| put(&mut all, v.to_le_bytes()));
        }
        for r in &self.rows {
            put(&mut all, r.start.to_le_bytes());
            let sizes = [r.size, r.body, r.len, r.marks, r.exits, r.relocations];
            sizes.into_iter().for_each(|v| put(&mut all, v.to_le_bytes()));
            let home = (r.home == Home::Register, REGISTER);
            put(&mut all, [flags([home, (r.landing, LANDING), (r.constant, CONSTANT)]), 0, 0, 0]);
        }
        for e in &self.exits {
            let (kind, rip) = e.leave.pack();
            put(&mut all, rip.to_le_bytes());
            [e.site, e.step, e.inside.map_or(0, |n| n + 1)].into_iter().for_each(|v| put(&mut all, v.to_le_bytes()));
            put(&mut all, [kind, flags([(e.home == Home::Register, REGISTER), (e.short, SHORT)])]);
        }
        self.marks.iter().for_each(|m| put(&mut all, m.bytes()));
        self.constants.iter().for_each(|c| put(&mut all, c.to_le_bytes()));
        for r in &self.relocations {
            [r.at, r.depends.pack()].into_iter().for_each(|v| put(&mut all, v.to_le_bytes()));
        }
        all.extend_from_slice(&self.code);
        all
    }
}

/// A cluster that is read.
#[derive(Clone, Copy, Debug)]
pub struct Cluster<'a> {
    /// The host address its code was made for.
    pub host: u64,
    /// The code of all blocks.
    pub code: &'a [u8],
    pages: &'a [[u8; PAGE]],
    rows: &'a [[u8; ROW]],
    exits: &'a [[u8; EXIT]],
    marks: &'a [[u8; Packed::SIZE]],
    constants: &'a [[u8; 8]],
    relocations: &'a [[u8; RELOCATION]],
}

/// A number among bytes.
fn u16_at(row: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([row[at], row[at + 1]])
}

fn u64_at(row: &[u8], at: usize) -> u64 {
    row[at..at + 8].try_into().map_or(0, u64::from_le_bytes)
}

/// Takes so many rows.
fn take<'a, const N: usize>(rest: &mut &'a [u8], n: usize) -> Option<&'a [[u8; N]]> {
    let (now, after) = rest.split_at_checked(n.checked_mul(N)?)?;
    *rest = after;
    Some(now.as_chunks().0)
}

impl<'a> Cluster<'a> {
    /// From bytes; `None` if they are none. Nothing is said of what offsets lead to: see [`Cluster::is_sound`].
    pub fn read(bytes: &'a [u8]) -> Option<Cluster<'a>> {
        let (head, mut rest) = bytes.split_at_checked(HEAD)?;
        let count = |i: usize| u16_at(head, 8 + 4 * i) as usize | (u16_at(head, 10 + 4 * i) as usize) << 16;
        let host = u64_at(head, 0);
        let (pages, rows) = (take(&mut rest, count(1))?, take(&mut rest, count(2))?);
        let (exits, marks) = (take(&mut rest, count(3))?, take(&mut rest, count(4))?);
        let constants = take(&mut rest, count(5))?;
        let tables = rest.len().checked_sub(count(0))?;
        let relocations = take(&mut rest, tables / RELOCATION)?;
        let all = Cluster { host, code: rest, pages, rows, exits, marks, constants, relocations };
        (tables % RELOCATION == 0).then_some(all)
    }

    /// The pages that its blocks lie in, with the addresses and the sums they had.
    pub fn pages(&self) -> impl Iterator<Item = (u64, Sum)> + 'a {
        self.pages.iter().map(|p| (u64_at(p, 0), [u64_at(p, 8), u64_at(p, 16)]))
    }

    /// The blocks.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = Row> + 'a {
        self.rows.iter().map(|r| Row {
            start: u64_at(r, 0),
            size: u16_at(r, 8),
            body: u16_at(r, 10),
            len: u16_at(r, 12),
            marks: u16_at(r, 14),
            exits: u16_at(r, 16),
            relocations: u16_at(r, 18),
            home: home_in(r[20]),
            landing: r[20] & LANDING != 0,
            constant: r[20] & CONSTANT != 0,
        })
    }

    /// The exits of all blocks.
    pub fn exits(&self) -> impl ExactSizeIterator<Item = KeptExit> + 'a {
        self.exits.iter().map(|e| KeptExit {
            leave: Leave::unpack(e[14], u64_at(e, 0)),
            site: u16_at(e, 8),
            step: u16_at(e, 10),
            inside: u16_at(e, 12).checked_sub(1),
            home: home_in(e[15]),
            short: e[15] & SHORT != 0,
        })
    }

    /// The marks of all blocks, if it is sound.
    pub fn marks(&self) -> impl ExactSizeIterator<Item = Packed> + 'a {
        self.marks.iter().map(|m| Packed::read(*m))
    }

    /// Where the addresses lie that blocks with [`Row::constant`] jump to.
    pub fn constants(&self) -> impl ExactSizeIterator<Item = u64> + 'a {
        self.constants.iter().map(|c| u64::from_le_bytes(*c))
    }

    /// The relocations of all blocks.
    pub fn relocations(&self) -> impl Iterator<Item = Relocation> + 'a {
        let relocation = |r: &[u8; 4]| Relocation { at: u16_at(r, 0), depends: Depends::unpack(u16_at(r, 2)) };
        self.relocations.iter().map(relocation)
    }

    /// Do all offsets lie inside the code of their block, where a jump can be patched, and all ordinals name what there is?
    pub fn is_sound(&self) -> bool {
        let (mut exits, mut marks, mut relocations) = (self.exits(), self.marks, self.relocations());
        let (mut at, mut constants) = (0, 0);
        let rows = self.rows().all(|r| {
            let inside = |offset: u16, size: usize| usize::from(offset) + size <= usize::from(r.size);
            let place = self.host.wrapping_add(at);
            at += u64::from(r.size);
            constants += usize::from(r.constant);
            let mut last = None;
            let exits = (0..r.exits).all(|_| {
                last = exits.next();
                match last {
                    Some(KeptExit { leave: Leave::To(_), short: true, site, step, .. }) => {
                        site <= step && inside(step, 1)
                    }
                    Some(KeptExit { leave: Leave::To(_), site, inside: to, .. }) => {
                        let crosses = place.wrapping_add(u64::from(site)) % 64 > 60;
                        inside(site, 4) && !crosses && to.is_none_or(|n| usize::from(n) < self.rows.len())
                    }
                    Some(KeptExit { leave: Leave::Changed(_), .. }) | None => false,
                    Some(_) => true,
                }
            });
            let bound = matches!(last, Some(KeptExit { leave: Leave::To(_), short: false, inside: None, .. }));
            let Some((now, rest)) = marks.split_at_checked(r.marks.into()) else { return false };
            marks = rest;
            let marks = now.iter().all(|m| Packed::read(*m).is_of_block(r.exits));
            let relocations = (0..r.relocations).all(|_| match relocations.next() {
                Some(Relocation { depends: Depends::Stub(n), .. }) => n < r.exits,
                found => found.is_some(),
            });
            let small = Block::can_be(r.size.into(), r.body.into(), r.marks.into(), r.len.into());
            exits && marks && relocations && small && (bound || !r.constant) && r.body <= r.size && r.len > 0
        });
        let whole = exits.len() == 0 && marks.is_empty() && relocations.next().is_none();
        rows && whole
            && constants == self.constants.len()
            && at == self.code.len() as u64
            && self.code.len() + stubs_size(self.exits.len() as u32) <= MOST_CODE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::marks::{Mark, What};

    fn sample() -> Making {
        let row = |start, size, exits, landing| Row {
            start,
            size,
            body: 2,
            len: 5,
            marks: 1,
            exits,
            relocations: exits,
            home: Home::Register,
            landing,
            constant: !landing,
        };
        let exit = |leave, site, short, inside| KeptExit { leave, site, short, step: 9, home: Home::Slot, inside };
        Making {
            host: 0x7000_0000,
            pages: vec![(0x40_0000, [1, 2]), (0x40_3000, [3, 4])],
            rows: vec![row(0x40_0123, 16, 3, true), row(0x40_3fff, 12, 1, false)],
            exits: vec![
                exit(Leave::To(0x40_3fff), 4, false, Some(1)),
                exit(Leave::To(0x40_0123), 8, true, Some(0)),
                exit(Leave::Syscall(0x40_4003, 2), 0, false, None),
                exit(Leave::To(0x50_0000), 4, false, None),
            ],
            marks: [What::Exit(1), What::Copied(3)].map(|what| Mark { at: 3, what, home: Home::Slot }.pack(0)).to_vec(),
            constants: vec![0x40_8010],
            relocations: [Depends::Guest, Depends::Stub(2), Depends::Distance, Depends::Fixed]
                .map(|depends| Relocation { at: 4, depends })
                .to_vec(),
            code: (0..28).collect(),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let (made, bytes) = (sample(), sample().bytes());
        let c = Cluster::read(&bytes).expect("a cluster");
        assert!(c.is_sound());
        assert_eq!((c.host, c.code), (made.host, &made.code[..]));
        assert_eq!(c.pages().collect::<Vec<_>>(), made.pages);
        assert_eq!(c.rows().collect::<Vec<_>>(), made.rows);
        assert_eq!(c.exits().collect::<Vec<_>>(), made.exits);
        assert_eq!(c.marks().collect::<Vec<_>>(), made.marks);
        assert_eq!(c.constants().collect::<Vec<_>>(), made.constants);
        assert_eq!(c.relocations().collect::<Vec<_>>(), made.relocations);
    }

    #[test]
    fn offsets_and_ordinals_that_lead_outside_are_seen() {
        let bad: [fn(&mut Making); 16] = [
            |m| m.code.truncate(27),
            |m| m.rows[0].size = 17,
            |m| m.rows[1].body = 13,
            |m| m.rows[1].exits = 2,
            |m| m.rows[0].marks = 2,
            |m| m.rows[0].len = 0,
            |m| m.exits[0].site = 13,
            |m| m.host += 57,
            |m| m.exits[0].inside = Some(2),
            |m| m.exits[1].step = 16,
            |m| m.relocations[1].depends = Depends::Stub(3),
            |m| m.marks[0] = Mark { at: 3, what: What::Exit(3), home: Home::Slot }.pack(0),
            |m| m.marks[1] = Mark { at: 3, what: What::Compare, home: Home::Slot }.pack(0),
            |m| m.constants.clear(),
            |m| m.rows[0].constant = true,
            |m| m.exits[3].inside = Some(0),
        ];
        for (i, change) in bad.iter().enumerate() {
            let mut made = sample();
            change(&mut made);
            let bytes = made.bytes();
            assert!(!Cluster::read(&bytes).is_some_and(|c| c.is_sound()), "change {i}");
        }
        let good = sample().bytes();
        for len in 0..good.len() {
            assert!(!Cluster::read(&good[..len]).is_some_and(|c| c.is_sound()), "{len} bytes of {}", good.len());
        }
    }
}
