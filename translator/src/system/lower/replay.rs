//! Status flags that nothing reads but the frame of an exception: worked out from what their instruction left in registers, so that
//! they need not be kept.

use super::asm::{Assembler, At};
use super::{Flags, Lower};
use crate::system::area::at;
use crate::system::block::{Item, STATUS, Way};
use bivisor_emulator::cpu::{CpuState, Rflags};
use bivisor_emulator::interp::alu;
use bivisor_emulator::isa::{Gpr, Width};
use iced_x86::{Mnemonic, OpKind, Register};

/// A register as an operand names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    gpr: Gpr,
    /// AH to BH.
    high: bool,
}

impl Part {
    fn of(r: Register) -> Option<Part> {
        let high = matches!(r, Register::AH | Register::BH | Register::CH | Register::DH);
        Some(Part { gpr: Gpr::from_iced(r)?, high })
    }

    fn value(self, cpu: &CpuState, w: Width) -> u64 {
        w.cut(cpu.gpr[self.gpr as usize] >> if self.high { 8 } else { 0 })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operand {
    Part(Part),
    Constant(i32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Add,
    Sub,
    Compare,
    Test,
    /// AND, OR and XOR, whose flags are the result's.
    Logic,
    Negate,
}

/// An instruction that set all status flags, and where its operands or its result are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replay {
    kind: Kind,
    width: Width,
    a: Part,
    b: Operand,
}

impl Replay {
    /// Of an instruction, if its flags can be told afterwards.
    fn of(item: &Item) -> Option<Replay> {
        let iced = &item.iced;
        let kind = match iced.mnemonic() {
            Mnemonic::Add => Kind::Add,
            Mnemonic::Sub => Kind::Sub,
            Mnemonic::Cmp => Kind::Compare,
            Mnemonic::Test => Kind::Test,
            Mnemonic::And | Mnemonic::Or | Mnemonic::Xor => Kind::Logic,
            Mnemonic::Neg => Kind::Negate,
            _ => return None,
        };
        if item.flags_out != STATUS || iced.op0_kind() != OpKind::Register {
            return None;
        }
        let r = iced.op0_register();
        let width = match r.size() {
            1 => Width::B,
            2 => Width::W,
            4 => Width::D,
            _ => Width::Q,
        };
        let a = Part::of(r)?;
        let b = match kind {
            // Only the result counts.
            Kind::Logic | Kind::Negate => Operand::Part(a),
            _ => match iced.op1_kind() {
                OpKind::Register => Operand::Part(Part::of(iced.op1_register())?),
                OpKind::Memory => return None,
                _ => Operand::Constant(i32::try_from(iced.immediate(1) as i64).ok().or_else(|| {
                    // 8-, 16- and 32-bit immediates are not sign-extended by iced.
                    (width != Width::Q).then_some(iced.immediate(1) as i32)
                })?),
            },
        };
        // What was added to itself cannot be told from the sum.
        let same = matches!(b, Operand::Part(b) if b.gpr == a.gpr);
        if same && matches!(kind, Kind::Add | Kind::Sub) {
            return None;
        }
        Some(Replay { kind, width, a, b })
    }

    /// The registers it needs, as bits.
    pub fn needs(&self) -> u16 {
        let b = match self.b {
            Operand::Part(p) => 1 << p.gpr as u16,
            Operand::Constant(_) => 0,
        };
        1 << self.a.gpr as u16 | b
    }

    /// The status flags.
    pub fn status(&self, cpu: &CpuState) -> Rflags {
        let w = self.width;
        let a = self.a.value(cpu, w);
        let b = match self.b {
            Operand::Part(p) => p.value(cpu, w),
            Operand::Constant(v) => w.cut(i64::from(v) as u64),
        };
        let (_, flags) = match self.kind {
            Kind::Add => alu::add(w, w.cut(a.wrapping_sub(b)), b, false),
            Kind::Sub => alu::sub(w, w.cut(a.wrapping_add(b)), b, false),
            Kind::Compare => alu::sub(w, a, b, false),
            Kind::Test => alu::and(w, a, b),
            Kind::Logic => alu::logic(w, a),
            Kind::Negate => alu::neg(w, w.cut(a.wrapping_neg())),
        };
        flags & Rflags::STATUS
    }
}

/// Where status flags that are not kept come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// An instruction of the block.
    Here(Replay),
    /// What was before the block: one of [`super::Unit::recipes`], whose number is in its slot; 0 if they are kept after all.
    Before,
}

/// The flags in EFLAGS by the instruction that set them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Producer {
    replay: Replay,
    /// Its number, if it has one.
    number: Option<u32>,
    /// Version and distance of each register it needs.
    as_of: [(u32, i64); 16],
}

impl Lower<'_> {
    /// After an instruction that changed flags.
    pub(super) fn produced(&mut self, item: &Item) {
        self.producer = None;
        self.told = None;
        if matches!(item.way, Way::Plain | Way::Memory)
            && let Some(replay) = Replay::of(item)
        {
            let as_of = std::array::from_fn(|r| (self.version[r], self.moved[r]));
            self.producer = Some(Producer { replay, number: None, as_of });
        }
    }

    /// What set the flags, if that can still be told.
    fn still(&self) -> Option<Replay> {
        let p = self.producer?;
        let needs = p.replay.needs();
        let same = |r: usize| needs & 1 << r == 0 || (self.version[r], self.moved[r]) == p.as_of[r];
        (0..16).all(same).then_some(p.replay)
    }

    /// A way to tell the flags wherever they may be asked for, from the instruction at hand until they are overwritten.
    pub(super) fn replayable(&self) -> Option<Replay> {
        let replay = self.still()?;
        (changed(&self.block.items[self.n..])? & replay.needs() == 0).then_some(replay)
    }

    /// Leaves word, for the block that is jumped to, of how the flags are told: the number of the recipe.
    pub(super) fn leave_word(&mut self) -> Option<u32> {
        // In the mirror blocks take the flags in EFLAGS.
        if self.flags != Flags::Host || self.block.mode.is_counted() || self.block.mode.is_mirrored() {
            return None;
        }
        let replay = self.still()?;
        let number = match self.producer?.number {
            Some(n) => n,
            None => {
                self.recipes.push(replay);
                let n = self.around.first_recipe + self.recipes.len() as u32;
                self.e.store_u32(At::slot(at::RECIPE), n);
                self.producer.as_mut()?.number = Some(n);
                n
            }
        };
        Some(number)
    }
}

/// The registers that change before the last place where flags from before `items` may be asked for; `None` if something keeps some of
/// the flags, or the flags are needed.
pub(super) fn changed(items: &[Item]) -> Option<u16> {
    let (mut written, mut matters) = (0, 0);
    for i in items {
        if i.can_fault {
            matters = written;
        }
        if i.flags_in != 0 {
            return None;
        }
        if i.changes_flags {
            // What it keeps is overwritten unseen, or is wanted in EFLAGS.
            return (i.shown & !i.flags_out == 0).then_some(matters);
        }
        if i.way.leaves() {
            return None;
        }
        written |= i.writes;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::{Policy, Routes};
    use crate::system::Mode;
    use crate::system::block::{Source, decode};
    use bivisor_emulator::cpu::cpuid::CpuModel;
    use bivisor_emulator::mem::Ram;
    use std::sync::Arc;

    fn replay(code: &[u8]) -> Option<Replay> {
        let ram = Ram::new(1 << 16).expect("RAM");
        ram.write(0x1000, code).expect("RAM");
        let routes = Routes::new(Arc::new(CpuModel::host()), Policy::default());
        let mode = Mode::of(&CpuState::long64(3), 1).expect("64-bit mode");
        let mut none = || None;
        let mut source = Source { ram: &ram, gpa: 0x1000, next: &mut none, known: &|_| false };
        let (block, _) = decode(&mut source, 0x1000, mode, &routes, 1).expect("an instruction");
        Replay::of(&block.items[0])
    }

    /// The flags told from what is in the registers afterwards are those that the instruction set.
    #[test]
    fn flags_are_told_from_the_result() {
        type Forward = fn(u64, u64) -> (u64, u64, Rflags);
        fn low(old: u64, w: Width, new: u64) -> u64 {
            if w == Width::D { new } else { old & !w.cut(u64::MAX) | new }
        }
        let cases: [(&str, &[u8], Forward); 13] = [
            ("add rax, rcx", &[0x48, 0x01, 0xc8], |a, c| {
                let (r, f) = alu::add(Width::Q, a, c, false);
                (r, c, f)
            }),
            ("add cl, 0x81", &[0x80, 0xc1, 0x81], |a, c| {
                let (r, f) = alu::add(Width::B, c & 0xff, 0x81, false);
                (a, low(c, Width::B, r), f)
            }),
            ("add rax, -128", &[0x48, 0x83, 0xc0, 0x80], |a, c| {
                let (r, f) = alu::add(Width::Q, a, -128i64 as u64, false);
                (r, c, f)
            }),
            ("sub eax, ecx", &[0x29, 0xc8], |a, c| {
                let (r, f) = alu::sub(Width::D, Width::D.cut(a), Width::D.cut(c), false);
                (r, c, f)
            }),
            ("sub ax, 0x8000", &[0x66, 0x2d, 0x00, 0x80], |a, c| {
                let (r, f) = alu::sub(Width::W, Width::W.cut(a), 0x8000, false);
                (low(a, Width::W, r), c, f)
            }),
            ("sub ah, cl", &[0x28, 0xcc], |a, c| {
                let (r, f) = alu::sub(Width::B, a >> 8 & 0xff, c & 0xff, false);
                (a & !0xff00 | r << 8, c, f)
            }),
            ("cmp rax, rcx", &[0x48, 0x39, 0xc8], |a, c| (a, c, alu::sub(Width::Q, a, c, false).1)),
            ("cmp al, ah", &[0x38, 0xe0], |a, c| (a, c, alu::sub(Width::B, a & 0xff, a >> 8 & 0xff, false).1)),
            ("cmp eax, 0xfedcba98", &[0x3d, 0x98, 0xba, 0xdc, 0xfe], |a, c| {
                (a, c, alu::sub(Width::D, Width::D.cut(a), 0xfedc_ba98, false).1)
            }),
            ("test al, 0xf0", &[0xa8, 0xf0], |a, c| (a, c, alu::and(Width::B, a & 0xff, 0xf0).1)),
            ("xor eax, ecx", &[0x31, 0xc8], |a, c| {
                let (r, f) = alu::xor(Width::D, Width::D.cut(a), Width::D.cut(c));
                (r, c, f)
            }),
            ("or ch, al", &[0x08, 0xc5], |a, c| {
                let (r, f) = alu::or(Width::B, c >> 8 & 0xff, a & 0xff);
                (a, c & !0xff00 | r << 8, f)
            }),
            ("neg rax", &[0x48, 0xf7, 0xd8], |a, c| {
                let (r, f) = alu::neg(Width::Q, a);
                (r, c, f)
            }),
        ];
        const EDGES: [u64; 10] =
            [0, 1, 0x7f, 0x80, 0x8000, 0xffff_ffff, 0x8000_0000, u64::MAX, 1 << 63, 0x1234_5678_9abc_de0f];
        for (text, code, forward) in cases {
            let r = replay(code).expect(text);
            for (a, c) in EDGES.iter().flat_map(|a| EDGES.map(|c| (*a, c))) {
                let mut cpu = CpuState::long64(3);
                let flags;
                (cpu.gpr[0], cpu.gpr[1], flags) = forward(a, c);
                assert_eq!(r.status(&cpu), flags, "{text} of {a:x} {c:x}");
            }
        }
        assert_eq!(replay(&[0x48, 0x01, 0xc0]), None, "add rax, rax");
        assert_eq!(replay(&[0x48, 0x03, 0x01]), None, "add rax, [rcx]");
        assert_eq!(replay(&[0xff, 0xc0]), None, "inc eax keeps CF");
    }
}
