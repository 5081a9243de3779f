//! What a store knows of a block.

use crate::block::page_of;
use crate::exits;
use crate::lower::Landing;
use crate::marks::Home;

/// End of a list.
pub(crate) const NONE: u32 = u32::MAX;

/// What is known of a piece of code: 40 bytes, as there are many.
pub(crate) struct Block {
    /// Where it begins in the guest, 48 bits; how many guest bytes it was made from, 10; [`LIVE`], [`REGISTER`].
    head: u64,
    /// Code offset.
    pub(crate) at: u32,
    /// Bytes of code, 14 bits; how many marks are its, 10; offset of its body, 8.
    sizes: u32,
    /// Where its marks start, and after them its relocations, which end where those of the next block start.
    pub(crate) notes: u32,
    /// The same for its exits.
    pub(crate) first_exit: u32,
    pub(crate) landing: Option<Landing>,
    /// The next block whose landing has the same table entry.
    pub(crate) next_landing: u32,
    /// The first exit linked to it; the table of exits holds the rest of the list.
    pub(crate) incoming: u32,
    /// The next block that begins in its first page.
    pub(crate) next_in_page: u32,
}

const _: () = assert!(size_of::<Block>() == 40);
const LEN_AT: u32 = 48;
/// In the head: in use; R11 is in the host's register at its start.
const LIVE: u64 = 1 << 58;
const REGISTER: u64 = 1 << 59;
const MARKS_AT: u32 = 14;
const BODY_AT: u32 = 24;

/// What a block is found by: its address and where R11 is at its start. No code has an address with only the highest bit changed.
pub(crate) fn key(rip: u64, home: Home) -> u64 {
    match home {
        Home::Slot => rip,
        Home::Register => rip ^ 1 << 63,
    }
}

impl Block {
    /// Can there be one of so many bytes of code, with its body so far on, so many marks, of so many guest bytes?
    pub(crate) fn can_be(size: usize, body: usize, marks: usize, len: usize) -> bool {
        size < 1 << MARKS_AT && marks < 1 << (BODY_AT - MARKS_AT) && body < 1 << (32 - BODY_AT) && len < 1 << 10
    }

    /// With its notes and its exits.
    pub(crate) fn knowing(self, notes: usize, first_exit: u32) -> Block {
        Block { notes: notes as u32, first_exit, ..self }
    }

    /// A block at code offset `at`, the body of which is `body` bytes further on, with so many marks; of its guest nothing is known but
    /// where it begins and what it was made from.
    pub(crate) fn new(
        (start, home): (u64, Home),
        (at, size, body): (usize, usize, u32),
        marks: usize,
        len: u16,
    ) -> Block {
        assert!(Block::can_be(size, body as usize, marks, len.into()), "a block is small");
        let home = if home == Home::Register { REGISTER } else { 0 };
        Block {
            head: start & ((1 << LEN_AT) - 1) | u64::from(len) << LEN_AT | LIVE | home,
            at: at as u32,
            sizes: size as u32 | (marks as u32) << MARKS_AT | body << BODY_AT,
            notes: 0,
            first_exit: 0,
            landing: None,
            next_landing: 0,
            incoming: exits::NONE,
            next_in_page: NONE,
        }
    }

    /// Where it begins in the guest.
    pub(crate) fn start(&self) -> u64 {
        ((self.head << (64 - LEN_AT)) as i64 >> (64 - LEN_AT)) as u64
    }

    /// Guest bytes it was made from.
    pub(crate) fn len(&self) -> u16 {
        (self.head >> LEN_AT) as u16 & 0x3ff
    }

    pub(crate) fn is_live(&self) -> bool {
        self.head & LIVE != 0
    }

    /// Takes it out of use. Was it in use?
    pub(crate) fn die(&mut self) -> bool {
        let lived = self.is_live();
        self.head &= !LIVE;
        lived
    }

    pub(crate) fn home(&self) -> Home {
        if self.head & REGISTER == 0 { Home::Slot } else { Home::Register }
    }

    /// Code offset of its end.
    pub(crate) fn end(&self) -> u32 {
        self.at + (self.sizes & ((1 << MARKS_AT) - 1))
    }

    /// Code offset of its body.
    pub(crate) fn body(&self) -> u32 {
        self.at + (self.sizes >> BODY_AT)
    }

    /// How many marks it has.
    pub(crate) fn marks(&self) -> u32 {
        self.sizes >> MARKS_AT & ((1 << (BODY_AT - MARKS_AT)) - 1)
    }

    /// See [`key`].
    pub(crate) fn key(&self) -> u64 {
        key(self.start(), self.home())
    }

    pub(crate) fn pages(&self) -> [u64; 2] {
        [page_of(self.start()), page_of(self.start().wrapping_add(u64::from(self.len().max(1)) - 1))]
    }
}
