//! What was made from one page of code, as bytes and back.

use crate::lower::{Depends, Leave, Relocation};
use crate::marks::{Home, Mark, What};
use crate::persist::hash::Sum;

/// An exit of a kept block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptExit {
    /// Why; addresses are relative to the page.
    pub leave: Leave,
    /// For jumps: offset of the displacement.
    pub site: u16,
    /// It has 8 bits, and leads to the block's own start.
    pub short: bool,
    /// Then: offset of the jump to the stub.
    pub step: u16,
    /// Where R11 is.
    pub home: Home,
}

/// A block of host code without its landing, but for the code itself, which goes beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Where in its page it begins.
    pub start: u16,
    /// Guest bytes it was made from.
    pub len: u16,
    /// Where R11 is at its start.
    pub home: Home,
    /// It was the target of an indirect branch.
    pub landing: bool,
    /// Where its code lay.
    pub host: u64,
    /// Offsets count from its first instruction; exits by ordinal.
    pub marks: Vec<Mark>,
    /// In order.
    pub exits: Vec<KeptExit>,
    /// See [`crate::lower::move_code`].
    pub relocations: Vec<Relocation>,
}

#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn u8(&mut self, v: u8) {
        self.0.push(v);
    }
    fn u16(&mut self, v: u16) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
    fn u64(&mut self, v: u64) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize) -> Option<&'a [u8]> {
        let (now, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(now)
    }
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }
    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }
    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }
    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

/// Bytes of a mark, an exit, a relocation.
const MARK: usize = 7;
const EXIT: usize = 15;
const RELOCATION: usize = 4;

/// What code of a block can be; the rest is of trampolines, or of code that compares.
fn what_in(tag: u8, r: u8, d: u16) -> Option<What> {
    What::unpack(tag, r, d).filter(|what| !matches!(what, What::Exiting | What::Compare))
}

fn home_out(home: Home) -> u8 {
    u8::from(home == Home::Register)
}

fn home_in(v: u8) -> Home {
    if v == 0 { Home::Slot } else { Home::Register }
}

/// A record in the making: the blocks that begin in one page.
pub struct Recorder(Writer);

impl Recorder {
    /// For a page that is at `base`; `next` is the sum of the page after it, if a block goes on there.
    pub fn new(base: u64, next: Option<Sum>) -> Recorder {
        let mut w = Writer::default();
        w.u64(base);
        w.u8(u8::from(next.is_some()));
        next.iter().flatten().for_each(|v| w.u64(*v));
        Recorder(w)
    }

    /// Adds a block. Jumps of its exits may lead anywhere.
    pub fn add(&mut self, b: &Kept, code: &[u8]) {
        let w = &mut self.0;
        [b.start, b.len].into_iter().for_each(|v| w.u16(v));
        w.u8(home_out(b.home));
        w.u8(u8::from(b.landing));
        w.u64(b.host);
        let counts = [b.marks.len(), b.exits.len(), b.relocations.len(), code.len()];
        counts.into_iter().for_each(|n| w.u16(n as u16));
        for m in &b.marks {
            let (tag, r, d) = m.what.pack();
            w.u16(m.at);
            w.u8(tag);
            w.u8(r);
            w.u16(d);
            w.u8(home_out(m.home));
        }
        for e in &b.exits {
            let (kind, rip) = match e.leave {
                Leave::To(rip) => (0, rip),
                Leave::Step(rip) => (1, rip),
                Leave::Changed(rip) => (2, rip),
                Leave::Syscall(rip, len) => (3 + len, rip),
            };
            w.u8(kind);
            w.u8(u8::from(e.short));
            w.u8(home_out(e.home));
            w.u16(e.site);
            w.u16(e.step);
            w.u64(rip);
        }
        for r in &b.relocations {
            w.u16(r.at);
            w.u16(r.depends.pack());
        }
        w.0.extend_from_slice(code);
    }

    /// As bytes.
    pub fn bytes(self) -> Vec<u8> {
        self.0.0
    }
}

/// A record that is read.
pub struct Record<'a> {
    /// Where the page was.
    pub base: u64,
    /// The sum of the page after it, if a block goes on there.
    pub next: Option<Sum>,
    rest: Reader<'a>,
}

impl<'a> Record<'a> {
    /// From bytes; `None` if they are none.
    pub fn read(bytes: &'a [u8]) -> Option<Record<'a>> {
        let mut r = Reader(bytes);
        let base = r.u64()?;
        let next = if r.u8()? != 0 { Some([r.u64()?, r.u64()?]) } else { None };
        Some(Record { base, next, rest: r })
    }

    /// Where the blocks of a record begin: address in the page, where R11 is, offset in `bytes`.
    pub fn blocks(bytes: &'a [u8]) -> Vec<(u16, Home, u32)> {
        let mut all = Vec::new();
        let Some(mut record) = Record::read(bytes) else { return all };
        let r = &mut record.rest;
        let mut next = || {
            let at = (bytes.len() - r.0.len()) as u32;
            let (start, _len, home, _landing, _host) = (r.u16()?, r.u16()?, r.u8()?, r.u8()?, r.u64()?);
            let [marks, exits, relocations, code] = [r.u16()?, r.u16()?, r.u16()?, r.u16()?].map(usize::from);
            r.bytes(marks * MARK + exits * EXIT + relocations * RELOCATION + code)?;
            Some((start, home_in(home), at))
        };
        while let Some(block) = next() {
            all.push(block);
        }
        all
    }

    /// Reads the block at an offset that [`Record::blocks`] gave, as [`Record::block`] does.
    pub fn block_at(bytes: &'a [u8], at: u32, b: &mut Kept) -> Option<&'a [u8]> {
        Record { base: 0, next: None, rest: Reader(bytes.get(at as usize..)?) }.block(b)
    }

    /// Reads the next block, all offsets of which lie inside its code; gives the code.
    pub fn block(&mut self, b: &mut Kept) -> Option<&'a [u8]> {
        let r = &mut self.rest;
        (b.start, b.len) = (r.u16()?, r.u16()?);
        b.home = home_in(r.u8()?);
        b.landing = r.u8()? != 0;
        b.host = r.u64()?;
        let [marks, exits, relocations, code] = [r.u16()?, r.u16()?, r.u16()?, r.u16()?];
        b.marks.clear();
        for _ in 0..marks {
            let (at, tag, register, d, home) = (r.u16()?, r.u8()?, r.u8()?, r.u16()?, home_in(r.u8()?));
            b.marks.push(Mark { at, what: what_in(tag, register, d)?, home });
        }
        b.exits.clear();
        for _ in 0..exits {
            let (kind, short, home) = (r.u8()?, r.u8()? != 0, home_in(r.u8()?));
            let (site, step, rip) = (r.u16()?, r.u16()?, r.u64()?);
            let leave = match kind {
                0 => Leave::To(rip),
                1 => Leave::Step(rip),
                2 => return None,
                n => Leave::Syscall(rip, n - 3),
            };
            b.exits.push(KeptExit { leave, site, short, step, home });
        }
        b.relocations.clear();
        for _ in 0..relocations {
            b.relocations.push(Relocation { at: r.u16()?, depends: Depends::unpack(r.u16()?) });
        }
        let code = r.bytes(usize::from(code))?;
        is_sound(b, code.len()).then_some(code)
    }
}

/// Do all offsets lie inside the code, and all ordinals name an exit?
fn is_sound(b: &Kept, code: usize) -> bool {
    let inside = |at: u16, size: usize| usize::from(at) + size <= code;
    let exits = b.exits.iter().all(|e| match e.leave {
        Leave::To(_) if e.short => inside(e.site, 1) && inside(e.step, 1),
        Leave::To(_) => inside(e.site, 4),
        _ => true,
    });
    let marks = b.marks.iter().all(|m| match m.what {
        What::Exit(n) => (n as usize) < b.exits.len(),
        _ => true,
    });
    let relocations = b.relocations.iter().all(|r| match r.depends {
        Depends::Fixed => true,
        Depends::Guest => inside(r.at, 8),
        Depends::Distance => inside(r.at, 4),
        Depends::Stub(n) => inside(r.at, 4) && usize::from(n) < b.exits.len(),
    });
    exits && marks && relocations && b.start < 4096 && b.len > 0
}
