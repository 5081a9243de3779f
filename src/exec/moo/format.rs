//! Single-step vectors captured from hardware, in the public MOO 1.x format: chunks of `type[4] length:u32 payload`, little-endian.
//!
//! A test names the registers and memory bytes before, and those that changed after the processor ran to its HLT.

use std::collections::BTreeMap;

/// Registers of 16-bit processors in the format's order.
pub const NAMES: [&str; 14] = ["ax", "bx", "cx", "dx", "cs", "ss", "ds", "es", "sp", "bp", "si", "di", "ip", "flags"];

/// Registers and memory bytes, those that are given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// By index in [`NAMES`].
    pub regs: [Option<u16>; 14],
    /// By physical address.
    pub ram: BTreeMap<u32, u8>,
}

/// One vector.
#[derive(Clone, Debug, Default)]
pub struct Test {
    /// Its number in the file.
    pub index: u32,
    /// Disassembly, by who made it.
    pub name: String,
    /// Before.
    pub before: State,
    /// What changed.
    pub after: State,
    /// The exception taken: vector, and physical address of the flags it pushed.
    pub exception: Option<(u8, u32)>,
}

impl Test {
    /// The bytes at CS:IP in real mode, as far as memory is given: the instruction, the HLT behind it.
    pub fn bytes(&self) -> Vec<u8> {
        let reg = |n: usize| u32::from(self.before.regs[n].unwrap_or(0));
        let at = |n| reg(4) * 16 + ((reg(12) + n) & 0xffff);
        (0..15).map_while(|n| self.before.ram.get(&at(n)).copied()).collect()
    }
}

/// Bytes with a position; everything past the end is `None`.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|b| b[0])
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn chunk(&mut self) -> Option<([u8; 4], Cursor<'a>)> {
        let kind = self.take(4)?.try_into().ok()?;
        let len = self.u32()? as usize;
        Some((kind, Cursor(self.take(len)?)))
    }
}

/// The vectors of an uncompressed file for a 16-bit processor; `None` if it is damaged.
pub fn parse(file: &[u8]) -> Option<Vec<Test>> {
    let mut file = Cursor(file);
    let mut tests = Vec::new();
    while !file.0.is_empty() {
        let (kind, chunk) = file.chunk()?;
        if &kind == b"TEST" {
            tests.push(test(chunk)?);
        }
    }
    Some(tests)
}

fn test(mut c: Cursor<'_>) -> Option<Test> {
    let mut t = Test { index: c.u32()?, ..Test::default() };
    while !c.0.is_empty() {
        let (kind, mut chunk) = c.chunk()?;
        match &kind {
            b"NAME" => {
                let n = chunk.u32()? as usize;
                t.name = String::from_utf8_lossy(chunk.take(n)?).into_owned();
            }
            b"INIT" => t.before = state(chunk)?,
            b"FINA" => t.after = state(chunk)?,
            b"EXCP" => t.exception = Some((chunk.u8()?, chunk.u32()?)),
            _ => {}
        }
    }
    Some(t)
}

fn state(mut c: Cursor<'_>) -> Option<State> {
    let mut s = State::default();
    while !c.0.is_empty() {
        let (kind, mut chunk) = c.chunk()?;
        match &kind {
            b"REGS" => {
                let given = chunk.u16()?;
                for n in (0..NAMES.len()).filter(|n| given >> n & 1 != 0) {
                    s.regs[n] = Some(chunk.u16()?);
                }
            }
            b"RAM " => {
                for _ in 0..chunk.u32()? {
                    let address = chunk.u32()?;
                    s.ram.insert(address, chunk.u8()?);
                }
            }
            _ => {}
        }
    }
    Some(s)
}
