//! Register values that find bugs: integers at their edges, floating-point numbers at theirs, x87 and SSE control words in all modes.

use crate::random::Random;
use bivisor_emulator::cpu::XsaveArea;
use bivisor_emulator::cpu::xsave::{Layout, component};

/// Lines in the pool.
const LINES: usize = 1024;

/// A pool of vector values, drawn anew for each batch: filling 32 registers is copying then.
pub struct Pool {
    lines: Vec<[u8; 64]>,
}

const SINGLE: [u32; 24] = [
    0,
    0x8000_0000,
    1,
    0x8000_0001,
    0x007f_ffff,
    0x0080_0000,
    0x3f80_0000,
    0xbf80_0000,
    0x7f7f_ffff,
    0xff7f_ffff,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0xffc0_0000,
    0x7f80_0001,
    0xffbf_ffff,
    0x7fff_ffff,
    0x4f00_0000,
    0xcf00_0000,
    0x4f7f_ffff,
    0x5f00_0000,
    0x3f00_0000,
    0x3eff_ffff,
    0x4b7f_ffff,
];

const DOUBLE: [u64; 20] = [
    0,
    1 << 63,
    1,
    0x000f_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
    0x3ff0_0000_0000_0000,
    0xbff0_0000_0000_0000,
    0x7fef_ffff_ffff_ffff,
    0xffef_ffff_ffff_ffff,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0xfff8_0000_0000_0001,
    0x7ff0_0000_0000_0001,
    0x41e0_0000_0000_0000,
    0xc1e0_0000_0020_0000,
    0x43e0_0000_0000_0000,
    0x3fe0_0000_0000_0000,
    0x36a0_0000_0000_0000,
    0x4330_0000_0000_0001,
];

/// Sign and exponent, significand.
const EXTENDED: [(u16, u64); 20] = [
    (0, 0),
    (0x8000, 0),
    (0x3fff, 1 << 63),
    (0xbfff, 1 << 63),
    (0x7fff, 1 << 63),
    (0xffff, 1 << 63),
    (0x7fff, 3 << 62),
    (0xffff, 3 << 62),
    (0x7fff, 0xa000_0000_0000_0000),
    (0, 1),
    (0, 1 << 63),
    (1, 1 << 63),
    (0x7ffe, u64::MAX),
    (0x7fff, 0),
    (0x3fff, 0),
    (0x4000, 0xc90f_daa2_2168_c235),
    (0x403e, 1 << 63),
    (0xc03e, u64::MAX),
    (0x3ffe, 1 << 63),
    (0x4005, 0xc800_0000_0000_0000),
];

fn line(r: &mut Random) -> [u8; 64] {
    let mut out = [0; 64];
    match r.below(12) {
        0..=2 => out.chunks_exact_mut(4).for_each(|c| {
            let v = if r.once_in(3) { r.next() as u32 } else { r.one_of(&SINGLE) };
            c.copy_from_slice(&v.to_le_bytes());
        }),
        3..=5 => out.chunks_exact_mut(8).for_each(|c| {
            let v = if r.once_in(3) { r.next() } else { r.one_of(&DOUBLE) };
            c.copy_from_slice(&v.to_le_bytes());
        }),
        6 | 7 => out.chunks_exact_mut(8).for_each(|c| c.copy_from_slice(&r.edgy().to_le_bytes())),
        // Numbers of ordinary size.
        8 => out.chunks_exact_mut(4).for_each(|c| {
            c.copy_from_slice(&((r.next() as i32 >> 16) as f32 / 256.0).to_le_bytes());
        }),
        9 => out.chunks_exact_mut(8).for_each(|c| {
            c.copy_from_slice(&((r.next() as i64 >> 32) as f64 / 65536.0).to_le_bytes());
        }),
        10 => out.fill(r.one_of(&[0, 0xff, 0x80, 0x7f])),
        _ => out.chunks_exact_mut(8).for_each(|c| c.copy_from_slice(&r.next().to_le_bytes())),
    }
    out
}

/// A number of 80 bits.
pub fn extended(r: &mut Random) -> [u8; 10] {
    let (head, tail) = match r.below(4) {
        0 | 1 => r.one_of(&EXTENDED),
        2 => ((0x3fff - 40 + r.below(80) as u16) | if r.once_in(2) { 0x8000 } else { 0 }, r.next() | 1 << 63),
        _ => (r.next() as u16, r.next()),
    };
    let mut out = [0; 10];
    out[..8].copy_from_slice(&tail.to_le_bytes());
    out[8..].copy_from_slice(&head.to_le_bytes());
    out
}

impl Pool {
    /// Draws one.
    pub fn new(r: &mut Random) -> Pool {
        Pool { lines: (0..LINES).map(|_| line(r)).collect() }
    }

    /// One line.
    pub fn line(&self, r: &mut Random) -> &[u8; 64] {
        &self.lines[(r.next() >> 40) as usize % LINES]
    }

    /// All x87, SSE, AVX and AVX-512 registers that the host has.
    pub fn fill(&self, r: &mut Random, to: &mut XsaveArea) {
        let l = Layout::host();
        to.bytes[512..576].fill(0);
        to.set_xstate_bv(l.components);
        self.x87(r, to);
        self.control(r, to);
        let mut regions = [(160, 256, 0), (l.avx, 256, component::AVX), (0, 0, 0), (0, 0, 0)];
        if l.components & component::AVX512 == component::AVX512 {
            regions[2] = (l.zmm_hi256, 512, component::AVX512);
            regions[3] = (l.hi16_zmm, 1024, component::AVX512);
            for i in 0..8 {
                let k = r.edgy();
                to.bytes[l.opmask + 8 * i..l.opmask + 8 * i + 8].copy_from_slice(&k.to_le_bytes());
            }
        }
        for (at, len, bit) in regions {
            if l.components & bit == bit {
                for chunk in to.bytes[at..at + len].chunks_exact_mut(64) {
                    chunk.copy_from_slice(self.line(r));
                }
            }
        }
    }

    fn control(&self, r: &mut Random, to: &mut XsaveArea) {
        let dice = r.next();
        let mut mxcsr = 0x1f80;
        if dice & 3 == 0 {
            mxcsr |= (dice >> 8 & 3) << 13;
        }
        if dice >> 16 & 7 == 0 {
            mxcsr |= dice >> 20 & 0x8040;
        }
        if dice >> 24 & 15 == 0 {
            mxcsr &= !(dice >> 28 & 0x3f) << 7 | 0xe07f;
        }
        if dice >> 40 & 7 == 0 {
            mxcsr |= dice >> 44 & 0x3f;
        }
        to.bytes[24..28].copy_from_slice(&(mxcsr as u32).to_le_bytes());
    }

    fn x87(&self, r: &mut Random, to: &mut XsaveArea) {
        let dice = r.next();
        let mut fcw = 0x37f;
        if dice & 3 == 0 {
            fcw = fcw & !0xf00 | dice >> 8 & 0xf00;
        }
        if dice >> 24 & 15 == 0 {
            fcw &= !(dice >> 28 & 0x3f);
        }
        let mut fsw = dice >> 36 & 0x7f00;
        let mut tags = 0xff;
        match dice >> 52 & 7 {
            0 => tags = dice >> 56,
            1 => tags = 0,
            2 => fsw &= !0x3800,
            _ => {}
        }
        if dice >> 55 & 1 == 0 && dice >> 3 & 7 == 0 {
            // Flags that are masked; now and then one that is not, which the next waiting instruction reports.
            fsw |= dice >> 40 & 0x3f & fcw;
            if dice >> 6 & 7 == 0 {
                fsw |= 1;
                fcw &= !1;
            }
        }
        if fsw & !fcw & 0x3f != 0 {
            fsw |= 0x8080;
        }
        to.bytes[..24].fill(0);
        to.bytes[..2].copy_from_slice(&(fcw as u16).to_le_bytes());
        to.bytes[2..4].copy_from_slice(&(fsw as u16).to_le_bytes());
        to.bytes[4] = tags as u8;
        for i in 0..8 {
            let at = 32 + 16 * i;
            let v = extended(r);
            to.bytes[at..at + 10].copy_from_slice(&v);
            to.bytes[at + 10..at + 16].fill(0);
        }
    }
}
