//! What an instruction of 16- or 32-bit code meets: segments, memory operands led to places in them or to their edges, branch targets,
//! selectors and far pointers (SDM 3A 5.3, 5.5, 5.8; SDM 2A IRET).
//!
//! Unlike in 64-bit mode nothing must be kept away from: all that compatibility mode reaches is the arena.

use super::segments::{self, ANY, segment};
use super::system;
use crate::campaign::aim::{at_pages, content, image_size, indexes};
use crate::campaign::arena::{BASE, CODE, DATA, HOLE};
use crate::campaign::case::{Case, Kind};
use crate::random::Random;
use bivisor_emulator::cpu::{Attr, Segment};
use bivisor_emulator::isa::{Gpr, Insn, Seg};
use iced_x86::{
    Code, CodeSize, FlowControl, InstructionInfoFactory, MemorySize, Mnemonic as M, OpAccess, OpKind, Register,
};

/// One access to memory.
#[derive(Clone, Debug)]
struct Access {
    base: Option<Gpr>,
    index: Option<(Gpr, u64)>,
    scale: u64,
    disp: u64,
    mask: u64,
    seg: Seg,
    size: u64,
    reads: bool,
    /// Vector of indexes: register, bytes of an index, how many.
    vector: Option<(usize, usize, usize)>,
}

/// What an instruction does with a selector.
#[derive(Clone, Copy, Debug)]
enum Far {
    /// Takes it from this register, or from memory.
    Operand(Option<Gpr>),
    /// Takes a far pointer from memory, its offset of so many bytes; into CS or another segment register.
    Pointer { offset: usize, code: bool },
    /// Takes so many words of so many bytes from the stack.
    Return(usize, usize),
}

/// What must be aimed for an instruction.
#[derive(Clone, Debug)]
pub struct Plan {
    accesses: Vec<Access>,
    insn: Code,
    flow: FlowControl,
    /// The register that says where to go.
    target: Option<Gpr>,
    repeats: bool,
    far: Option<Far>,
}

/// Where branches go: all is INT3 there, but for the case itself.
pub fn place(r: &mut Random, case_at: u64) -> u64 {
    let at = CODE + r.one_of(&[0x40, 0x140, 0x7c3, 0xffc, 0x1103, 0x1700]);
    if at.abs_diff(case_at) < 0x40 { CODE + 0x300 } else { at }
}

/// Linux and the cases' table: whose segment registers a case has. Not GS, which is the host thread's own.
fn seg(r: Register) -> Option<Seg> {
    Some(match r {
        Register::ES => Seg::Es,
        Register::CS => Seg::Cs,
        Register::SS => Seg::Ss,
        Register::DS | Register::None => Seg::Ds,
        Register::FS => Seg::Fs,
        _ => return None,
    })
}

impl Plan {
    /// Of an instruction; `None` if cases cannot follow it.
    pub fn new(factory: &mut InstructionInfoFactory, i: &Insn) -> Option<Plan> {
        let iced = &i.iced;
        let mut accesses = Vec::new();
        for m in factory.info(iced).used_memory() {
            let (mut index, mut vector) = (None, None);
            match m.index() {
                Register::None => {}
                Register::AL => index = Some((Gpr::Rax, 0xff)),
                v if v.is_vector_register() => {
                    let bytes = m.vsib_size().max(4) as usize;
                    vector = Some((v.number(), bytes, v.size() / bytes));
                }
                g => index = Some((Gpr::from_iced(g)?, u64::MAX)),
            }
            let base = match m.base() {
                Register::None => None,
                g => Some(Gpr::from_iced(g)?),
            };
            accesses.push(Access {
                base,
                index,
                scale: u64::from(m.scale()),
                disp: m.displacement(),
                mask: if m.address_size() == CodeSize::Code16 { 0xffff } else { 0xffff_ffff },
                seg: seg(m.segment())?,
                size: size(iced.mnemonic(), m.memory_size()),
                reads: !matches!(m.access(), OpAccess::Write | OpAccess::CondWrite),
                vector,
            });
        }
        let flow = iced.flow_control();
        let indirect = matches!(flow, FlowControl::IndirectBranch | FlowControl::IndirectCall);
        Some(Plan {
            far: far(i),
            insn: iced.code(),
            flow,
            target: if indirect && iced.op0_kind() == OpKind::Register {
                Gpr::from_iced(iced.op0_register())
            } else {
                None
            },
            repeats: iced.is_string_instruction() || iced.has_rep_prefix() || iced.has_repne_prefix(),
            accesses,
        })
    }

    /// Sets registers and memory so that the instruction finds what it can use, mostly.
    pub fn aim(&self, r: &mut Random, case: &mut Case, at: u64) {
        if self.repeats {
            case.gpr[Gpr::Rcx as usize] = r.below(12);
        }
        if let Some(Far::Operand(Some(g))) = self.far {
            case.gpr[g as usize] = case.gpr[g as usize] & !0xffff | u64::from(any(r, case.kind));
        }
        let mut aimed = [false; 16];
        aimed[Gpr::Rsp as usize] = true;
        for a in &self.accesses {
            if let Some((register, bytes, count)) = a.vector {
                indexes(r, case, register, bytes, count);
            }
            let s = hidden(case, a.seg);
            let linear = target(r, a.size, &s);
            // BX and SI both lead: one of them is enough.
            let leader = a.base.filter(|g| !aimed[*g as usize]).or(a.index.map(|i| i.0));
            let Some(leader) = leader.filter(|g| !aimed[*g as usize]) else { continue };
            for g in [a.base, a.index.map(|i| i.0)].into_iter().flatten() {
                aimed[g as usize] = true;
            }
            let want = linear.wrapping_sub(s.base).wrapping_sub(a.disp) & a.mask;
            let keep = case.gpr[leader as usize] & !a.mask;
            case.gpr[leader as usize] = 0;
            let rest = want.wrapping_sub(a.offset(case).wrapping_sub(a.disp)) & a.mask;
            let v = match (a.base, a.index) {
                (Some(b), Some((i, _))) if b == i => rest / (1 + a.scale),
                (Some(b), _) if b == leader => rest,
                _ => rest / a.scale,
            };
            case.gpr[leader as usize] = v & a.mask | keep;
        }
        if let Some(g) = self.target {
            case.gpr[g as usize] = self.offset_of_place(r, case, at);
        }
        for a in &self.accesses {
            let linear = a.offset(case).wrapping_add(hidden(case, a.seg).base) & 0xffff_ffff;
            if a.reads {
                content(r, self.insn.mnemonic(), case, linear);
            }
            if is_own(self.insn.mnemonic()) {
                case.free_memory = Some((linear, a.size));
            }
            self.pointers(r, case, at, a, linear);
        }
        self.stack(r, case, at);
    }

    /// What a memory operand of a branch or a load of a segment register finds.
    fn pointers(&self, r: &mut Random, case: &mut Case, at: u64, a: &Access, linear: u64) {
        match self.far {
            Some(Far::Operand(None)) => case.put(linear, &any(r, case.kind).to_le_bytes()),
            Some(Far::Pointer { offset, code }) if a.reads => {
                let (to, s) = if code { far_place(r, at, case.kind) } else { (r.edgy(), any(r, case.kind)) };
                let mut bytes = to.to_le_bytes()[..offset].to_vec();
                bytes.extend(s.to_le_bytes());
                case.put(linear, &bytes);
            }
            _ if a.reads && matches!(self.flow, FlowControl::IndirectBranch | FlowControl::IndirectCall) => {
                let to = self.offset_of_place(r, case, at);
                case.put(linear, &to.to_le_bytes()[..4]);
            }
            _ => {}
        }
    }

    /// What a return finds.
    fn stack(&self, r: &mut Random, case: &mut Case, at: u64) {
        let ss = hidden(case, Seg::Ss);
        let mask = if ss.attr.contains(Attr::DB) { 0xffff_ffff } else { 0xffff };
        let top = ss.base.wrapping_add(case.gpr[Gpr::Rsp as usize] & mask) & 0xffff_ffff;
        match self.far {
            Some(Far::Return(words, n)) => {
                let (to, s) = far_place(r, at, case.kind);
                let mut bytes = to.to_le_bytes()[..n].to_vec();
                bytes.extend(&u64::from(s).to_le_bytes()[..n]);
                if words == 3 {
                    // Flags without TF, whose trap comes after the next instruction, and without VM and AC.
                    let to_v86 = if case.kind == Kind::Kernel32 && r.once_in(4) { 0x2_0000 } else { 0 };
                    bytes.extend(&(r.next() & 0x20_ced5 | 2 | to_v86).to_le_bytes()[..n]);
                }
                case.put(top, &bytes);
            }
            None if matches!(self.insn.mnemonic(), M::Popf | M::Popfd) => {
                // No TF.
                case.put(top, &(r.next() & !0x100).to_le_bytes()[..4]);
            }
            None if self.flow == FlowControl::Return => {
                let to = self.offset_of_place(r, case, at);
                case.put(top, &to.to_le_bytes()[..4]);
            }
            _ => {}
        }
    }

    /// Where a near branch goes, now and then where nothing is, or beyond the segment.
    fn offset_of_place(&self, r: &mut Random, case: &Case, at: u64) -> u64 {
        let base = hidden(case, Seg::Cs).base;
        let linear = match r.below(24) {
            0 => HOLE + r.below(0x1000),
            1 => DATA + r.below(0x1000),
            2 => BASE + 0x1_0000 + r.below(0x1000),
            3 => 0xffff_fff0 + r.below(16),
            4 => segments::SHORT_END - 2 + r.below(4),
            _ => place(r, at),
        };
        // To itself it would go on for ever.
        let linear = if linear.abs_diff(at) < 16 { place(r, at) } else { linear };
        linear.wrapping_sub(base) & 0xffff_ffff
    }
}

/// Where a far transfer goes: a code segment and an offset in it, or any selector.
pub fn far_place(r: &mut Random, at: u64, kind: Kind) -> (u64, u16) {
    const CODES: [u16; 9] = [0x23, 0x23, 0x33, 7, 0x0f, 0x17, 0x1f, 0x27, 0x97];
    let selector = if r.once_in(3) { r.one_of(&ANY) } else { r.one_of(&CODES) };
    let base = segment(selector).map_or(0, |s| s.base);
    let offset = place(r, at).wrapping_sub(base) & 0xffff_ffff;
    (offset, system::selector(r, kind, selector))
}

/// Any selector.
fn any(r: &mut Random, kind: Kind) -> u16 {
    let selector = r.one_of(&ANY);
    system::selector(r, kind, selector)
}

impl Access {
    /// The offset in the segment.
    fn offset(&self, case: &Case) -> u64 {
        let base = self.base.map_or(0, |g| case.gpr[g as usize]);
        let index = self.index.map_or(0, |(g, m)| (case.gpr[g as usize] & m).wrapping_mul(self.scale));
        base.wrapping_add(index).wrapping_add(self.disp) & self.mask
    }
}

/// A segment register of the case.
fn hidden(case: &Case, s: Seg) -> Segment {
    let order = [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs];
    let n = order.iter().position(|o| *o == s).unwrap_or(3);
    segment(case.selectors[n]).unwrap_or_default()
}

/// What this instruction does with a selector.
fn far(i: &Insn) -> Option<Far> {
    let iced = &i.iced;
    let operand = |n: u32| match iced.op_kind(n) {
        OpKind::Register => Far::Operand(Gpr::from_iced(iced.op_register(n))),
        _ => Far::Operand(None),
    };
    let offset = match iced.memory_size() {
        MemorySize::SegPtr16 => Some(2),
        MemorySize::SegPtr32 => Some(4),
        _ => None,
    };
    Some(match (iced.mnemonic(), iced.code()) {
        (M::Lar | M::Lsl, _) => operand(1),
        (M::Verr | M::Verw | M::Lldt | M::Ltr, _) => operand(0),
        (M::Mov, _) if iced.op0_register().is_segment_register() => operand(1),
        (M::Pop, _) if iced.op0_register().is_segment_register() => Far::Operand(None),
        (M::Lds | M::Les | M::Lfs | M::Lss, _) => Far::Pointer { offset: offset?, code: false },
        (M::Jmp | M::Call, _) if offset.is_some() => Far::Pointer { offset: offset?, code: true },
        (_, Code::Retfw | Code::Retfw_imm16) => Far::Return(2, 2),
        (_, Code::Retfd | Code::Retfd_imm16) => Far::Return(2, 4),
        (_, Code::Iretw) => Far::Return(3, 2),
        (_, Code::Iretd) => Far::Return(3, 4),
        _ => return None,
    })
}

/// A linear address worth using in a segment.
pub fn target(r: &mut Random, size: u64, s: &Segment) -> u64 {
    let end = s.base.wrapping_add(u64::from(s.limit)).wrapping_add(1);
    match r.below(64) {
        n @ 0..=6 => at_pages(r, size, n),
        // The segment's edges.
        7..=12 => end.wrapping_sub(r.below(size + 4)) & 0xffff_ffff,
        13 => s.base.wrapping_add(r.below(size + 2)).wrapping_sub(2) & 0xffff_ffff,
        14 => s.base.wrapping_add(0x1_0000).wrapping_sub(r.below(size + 2)) & 0xffff_ffff,
        15..=24 => DATA + 0x400 + r.below(0x2400),
        _ => DATA + 0x400 + 64 * r.below(0x90),
    }
}

/// Does it store what is the machine's own, or the processor's choice?
fn is_own(m: M) -> bool {
    matches!(m, M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Xsaveopt)
}

/// Bytes of an access; for what iced does not say, what is enough.
fn size(m: M, size: MemorySize) -> u64 {
    if let Some(bytes) = image_size(m) {
        return bytes;
    }
    match m {
        M::Sgdt | M::Sidt => 6,
        _ => (size.size() as u64).max(1),
    }
}
