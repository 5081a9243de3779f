//! The few instructions that lowering makes itself: registers are numbers, memory is base + index + displacement or a slot of the area.

use crate::emit::Emitter;
use crate::system::area;
use bivisor_emulator::isa::Gpr;
use dynasmrt::DynasmApi;

/// A memory operand.
#[derive(Clone, Copy, Debug)]
pub struct At {
    base: Option<Gpr>,
    index: Option<(Gpr, u8)>,
    disp: i32,
    gs: bool,
    fs: bool,
    narrow: bool,
}

impl At {
    /// `[base + disp]`
    pub fn base(base: Gpr, disp: i32) -> At {
        At { base: Some(base), index: None, disp, gs: false, fs: false, narrow: false }
    }

    /// `[base + index + disp]`
    pub fn sum(base: Gpr, index: Gpr, disp: i32) -> At {
        At { index: Some((index, 1)), ..At::base(base, disp) }
    }

    /// Any.
    pub fn any(base: Option<Gpr>, index: Option<(Gpr, u8)>, disp: i32, narrow: bool) -> At {
        At { base, index, disp, gs: false, fs: false, narrow }
    }

    /// A place in the area.
    pub fn slot(offset: usize) -> At {
        At { base: None, index: None, disp: area::gs(offset), gs: true, fs: false, narrow: false }
    }

    /// A place in the area, further by a register.
    pub fn table(offset: usize, by: Gpr) -> At {
        At { base: Some(by), ..At::slot(offset) }
    }

    /// A place in the area, further by eight times a register.
    pub fn row(offset: usize, by: Gpr) -> At {
        At { index: Some((by, 8)), ..At::slot(offset) }
    }

    /// The same relative to FS base.
    pub fn fs(self) -> At {
        At { fs: true, ..self }
    }

    /// The slot of a thread block.
    pub fn thread(slot: usize) -> At {
        At { disp: crate::emit::gs(slot), ..At::slot(0) }
    }
}

/// Operand widths of [`Assembler::rm`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum W {
    /// 32 bits.
    D,
    /// 64 bits.
    Q,
}

/// Assembles into an [`Emitter`].
pub trait Assembler {
    /// An instruction with a ModRM operand in memory; `tail` is an immediate.
    fn rm(&mut self, w: W, opcode: &[u8], reg: u8, at: At, tail: &[u8]);
    /// An instruction with two registers.
    fn rr(&mut self, w: W, opcode: &[u8], reg: u8, rm: Gpr, tail: &[u8]);

    /// `mov to, [at]`
    fn load(&mut self, to: Gpr, at: At) {
        self.rm(W::Q, &[0x8b], to as u8, at, &[]);
    }
    /// `mov [at], from`
    fn store(&mut self, at: At, from: Gpr) {
        self.rm(W::Q, &[0x89], from as u8, at, &[]);
    }
    /// `lea to, [at]`
    fn lea(&mut self, to: Gpr, at: At) {
        self.rm(W::Q, &[0x8d], to as u8, at, &[]);
    }
    /// `mov to, from`
    fn copy(&mut self, to: Gpr, from: Gpr) {
        self.rr(W::Q, &[0x89], from as u8, to, &[]);
    }
    /// `mov dword [at], v`
    fn store_u32(&mut self, at: At, v: u32) {
        self.rm(W::D, &[0xc7], 0, at, &v.to_le_bytes());
    }
    /// `mov qword [at], v`, sign-extended
    fn store_i32(&mut self, at: At, v: i32) {
        self.rm(W::Q, &[0xc7], 0, at, &v.to_le_bytes());
    }
    /// `cmp dword [at], v`
    fn compare_u32(&mut self, at: At, v: u32) {
        self.rm(W::D, &[0x81], 7, at, &v.to_le_bytes());
    }
    /// `cmp dword [at], 0`
    fn is_zero(&mut self, at: At) {
        self.rm(W::D, &[0x83], 7, at, &[0]);
    }
    /// `cmp r, [at]`
    fn compare(&mut self, r: Gpr, at: At) {
        self.rm(W::Q, &[0x3b], r as u8, at, &[]);
    }
    /// `add r, [at]`
    fn add(&mut self, r: Gpr, at: At) {
        self.rm(W::Q, &[0x03], r as u8, at, &[]);
    }
    /// `and r, v`, sign-extended
    fn and(&mut self, w: W, r: Gpr, v: i32) {
        match i8::try_from(v) {
            Ok(v) => self.rr(w, &[0x83], 4, r, &v.to_le_bytes()),
            Err(_) => self.rr(w, &[0x81], 4, r, &v.to_le_bytes()),
        }
    }
    /// `shl r, n`
    fn shl(&mut self, w: W, r: Gpr, n: u8) {
        self.rr(w, &[0xc1], 4, r, &[n]);
    }
    /// `shr r, n`
    fn shr(&mut self, w: W, r: Gpr, n: u8) {
        self.rr(w, &[0xc1], 5, r, &[n]);
    }
    /// `mov r, v` in its shortest form; flags stay.
    fn constant(&mut self, r: Gpr, v: u64);
}

impl Assembler for Emitter {
    fn rm(&mut self, w: W, opcode: &[u8], reg: u8, at: At, tail: &[u8]) {
        let number = |r: Option<Gpr>| r.map_or(0, |r| r as u8);
        let index = at.index.map(|(r, _)| r);
        if at.gs {
            self.push(0x65);
        }
        if at.fs {
            self.push(0x64);
        }
        if at.narrow {
            self.push(0x67);
        }
        let rex = u8::from(w == W::Q) << 3 | reg >> 3 << 2 | number(index) >> 3 << 1 | number(at.base) >> 3;
        if rex != 0 {
            self.push(0x40 | rex);
        }
        self.bytes.extend_from_slice(opcode);
        let reg = (reg & 7) << 3;
        let scale = at.index.map_or(0, |(_, s)| s.trailing_zeros() as u8) << 6;
        let sib_index = at.index.map_or(4, |(r, _)| r as u8 & 7) << 3;
        let Some(base) = at.base else {
            self.bytes.extend_from_slice(&[reg | 4, scale | sib_index | 5]);
            self.push_i32(at.disp);
            self.bytes.extend_from_slice(tail);
            return;
        };
        let base = base as u8 & 7;
        let short = i8::try_from(at.disp).ok();
        let mode = match (at.disp, short) {
            (0, _) if base != 5 => 0,
            (_, Some(_)) => 0x40,
            _ => 0x80,
        };
        if at.index.is_some() || base == 4 {
            self.bytes.extend_from_slice(&[mode | reg | 4, scale | sib_index | base]);
        } else {
            self.push(mode | reg | base);
        }
        match (mode, short) {
            (0, _) => {}
            (0x40, Some(d)) => self.push(d as u8),
            _ => self.push_i32(at.disp),
        }
        self.bytes.extend_from_slice(tail);
    }

    fn rr(&mut self, w: W, opcode: &[u8], reg: u8, rm: Gpr, tail: &[u8]) {
        let rm = rm as u8;
        let rex = u8::from(w == W::Q) << 3 | reg >> 3 << 2 | rm >> 3;
        if rex != 0 {
            self.push(0x40 | rex);
        }
        self.bytes.extend_from_slice(opcode);
        self.push(0xc0 | (reg & 7) << 3 | rm & 7);
        self.bytes.extend_from_slice(tail);
    }

    fn constant(&mut self, r: Gpr, v: u64) {
        let n = r as u8;
        if let Ok(v) = u32::try_from(v) {
            if n >= 8 {
                self.push(0x41);
            }
            self.push(0xb8 | n & 7);
            self.push_u32(v);
        } else if let Ok(v) = i32::try_from(v as i64) {
            self.rr(W::Q, &[0xc7], 0, r, &v.to_le_bytes());
        } else {
            self.push(0x48 | n >> 3);
            self.push(0xb8 | n & 7);
            self.push_u64(v);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn text(f: impl Fn(&mut Emitter)) -> String {
        let mut e = Emitter::new(0);
        f(&mut e);
        let mut d = Decoder::new(64, &e.bytes, DecoderOptions::NONE);
        let i = d.decode();
        assert_eq!(i.len(), e.len(), "one instruction");
        let r = |r: iced_x86::Register| format!("{r:?}");
        format!(
            "{:?} {:?}:{}+{}*{}+{:x} {}",
            i.code(),
            i.memory_segment(),
            r(i.memory_base()),
            r(i.memory_index()),
            i.memory_index_scale(),
            i.memory_displacement64(),
            r(i.op0_register())
        )
    }

    #[test]
    fn every_base_and_index_is_encoded() {
        for base in Gpr::ALL {
            for disp in [0, 5, -128, 0x1234] {
                for index in Gpr::ALL.into_iter().filter(|r| *r != Gpr::Rsp) {
                    let t = text(|e| e.load(Gpr::R9, At::sum(base, index, disp)));
                    let seg = if matches!(base, Gpr::Rsp | Gpr::Rbp) { "SS" } else { "DS" };
                    let want = format!(
                        "Mov_r64_rm64 {seg}:{:?}+{:?}*1+{:x} R9",
                        base.to_iced(),
                        index.to_iced(),
                        i64::from(disp) as u64
                    );
                    assert_eq!(t, want);
                }
                let t = text(|e| e.store(At::base(base, disp), Gpr::Rdi));
                assert!(t.contains(&format!(":{:?}+None*1+{:x}", base.to_iced(), i64::from(disp) as u64)), "{t}");
            }
        }
    }

    #[test]
    fn constants_are_whole() {
        for v in [0, 1, 0xffff_ffff, 0xffff_ffff_8000_0000, 0x1234_5678_9abc_def0] {
            for r in [Gpr::Rax, Gpr::R15] {
                let mut e = Emitter::new(0);
                e.constant(r, v);
                let i = Decoder::new(64, &e.bytes, DecoderOptions::NONE).decode();
                assert_eq!((i.immediate(1), i.op0_register().full_register()), (v, r.to_iced()));
            }
        }
    }
}
