//! Where an instruction reaches: its memory operands led into the arena or to its edges, its branches to tails. Nothing that could reach
//! the process's own memory passes.

use super::arena::{self, DATA, DATA2, HOLE, ROM};
use super::case::Case;
use super::far::{self, Far};
use crate::random::Random;
use bivisor_emulator::cpu::xsave::Layout;
use bivisor_emulator::isa::{Gpr, Insn, StateImage, state_image};
use iced_x86::{CodeSize, FlowControl, InstructionInfoFactory, MemorySize, Mnemonic as M, OpKind, Register};

/// One access to memory.
#[derive(Clone, Debug)]
struct Access {
    base: Option<Gpr>,
    index: Option<(Gpr, u64)>,
    scale: u64,
    /// Absolute if there is neither base nor index.
    disp: u64,
    mask: u64,
    fs: bool,
    size: u64,
    /// Vector of indexes: register, bytes of an index, how many.
    vector: Option<(usize, usize, usize)>,
}

/// What must be aimed for an instruction.
#[derive(Clone, Debug)]
pub struct Plan {
    accesses: Vec<Access>,
    mnemonic: M,
    flow: FlowControl,
    /// The register or memory operand that says where to go.
    target: Option<Gpr>,
    /// A bit offset in a register reaches beyond the operand.
    bit: Option<Gpr>,
    repeats: bool,
    counter: u64,
    far: Option<Far>,
}

const NO_SEGMENT: [Register; 5] = [Register::CS, Register::DS, Register::ES, Register::SS, Register::None];

impl Plan {
    /// Of an instruction decoded at 0 that stands at `at`; `None` if it reaches where no case can follow.
    pub fn new(factory: &mut InstructionInfoFactory, i: &Insn, at: u64) -> Option<Plan> {
        let iced = &i.iced;
        let mut accesses = Vec::new();
        let reaches = !matches!(iced.mnemonic(), M::Lea | M::Nop | M::Reservednop);
        for m in factory.info(iced).used_memory().iter().filter(|_| reaches) {
            if m.segment() != Register::FS && !NO_SEGMENT.contains(&m.segment()) {
                return None;
            }
            let mask = if m.address_size() == CodeSize::Code32 { 0xffff_ffff } else { u64::MAX };
            let (mut index, mut vector) = (None, None);
            match m.index() {
                Register::None => {}
                Register::AL => index = Some((Gpr::Rax, 0xff)),
                v if v.is_vector_register() => {
                    let (register, bytes) = (v.number(), m.vsib_size().max(4) as usize);
                    vector = Some((register, bytes, v.size() / bytes));
                }
                g => index = Some((Gpr::from_iced(g)?, u64::MAX)),
            }
            let base = match m.base() {
                Register::None | Register::RIP | Register::EIP => None,
                g => Some(Gpr::from_iced(g)?),
            };
            let relative = iced.is_ip_rel_memory_operand() && base.is_none() && index.is_none();
            let disp = if relative { m.displacement().wrapping_add(at) & mask } else { m.displacement() };
            accesses.push(Access {
                base,
                index,
                scale: u64::from(m.scale()),
                disp,
                mask,
                fs: m.segment() == Register::FS,
                size: size(iced.mnemonic(), m.memory_size()),
                vector,
            });
        }
        let bit = Gpr::from_iced(iced.op1_register());
        let flow = iced.flow_control();
        let indirect = matches!(flow, FlowControl::IndirectBranch | FlowControl::IndirectCall);
        let far_bit = matches!(iced.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc);
        // The register would be address and bit offset at once.
        if far_bit && accesses.iter().any(|a| bit.is_some() && (a.base == bit || a.index.map(|i| i.0) == bit)) {
            return None;
        }
        Some(Plan {
            far: far::of(i),
            mnemonic: iced.mnemonic(),
            flow,
            target: if indirect && iced.op0_kind() == OpKind::Register {
                Gpr::from_iced(iced.op0_register())
            } else {
                None
            },
            bit: if far_bit && iced.op1_kind() == OpKind::Register && iced.op0_kind() == OpKind::Memory {
                Gpr::from_iced(iced.op1_register())
            } else {
                None
            },
            repeats: iced.is_string_instruction() || iced.has_rep_prefix() || iced.has_repne_prefix(),
            counter: if iced.memory_size().size() > 0 { iced.memory_size().size() as u64 } else { 8 },
            accesses,
        })
    }

    /// Does it reach memory at a place that its bytes say?
    pub fn absolute(&self) -> Option<u64> {
        let plain = |a: &&Access| a.base.is_none() && a.index.is_none() && a.vector.is_none();
        self.accesses.iter().find(plain).map(|a| a.disp)
    }

    /// Bytes of its largest access.
    pub fn size(&self) -> u64 {
        self.accesses.iter().map(|a| a.size).max().unwrap_or(0)
    }

    /// Sets the registers of a case so that the accesses lie where cases may look; false: not this time.
    ///
    /// `places` are addresses of tails.
    pub fn aim(&self, r: &mut Random, case: &mut Case, places: &[u64]) -> bool {
        if self.repeats {
            case.gpr[Gpr::Rcx as usize] = r.below(12);
        }
        if let Some(Far::Operand(Some(g))) = self.far {
            far::register(r, case, g);
        }
        if let Some(bit) = self.bit {
            case.gpr[bit as usize] = r.below(0x1000).wrapping_sub(0x800);
        }
        let mut aimed = [false; 16];
        for a in &self.accesses {
            if let Some((register, bytes, count)) = a.vector {
                indexes(r, case, register, bytes, count);
            }
            let (Some(base), target) = (a.base.or(a.index.map(|i| i.0)), target(r, a.size)) else { continue };
            if std::mem::replace(&mut aimed[base as usize], true) {
                continue;
            }
            let segment = if a.fs { case.fs_base } else { 0 };
            let rest = target.wrapping_sub(a.disp).wrapping_sub(segment);
            let index = |case: &Case| a.index.map_or(0, |(g, m)| (case.gpr[g as usize] & m).wrapping_mul(a.scale));
            let v = match (a.base, a.index) {
                (Some(b), Some((i, u64::MAX))) if b == i => rest / (1 + a.scale),
                (Some(_), _) => rest.wrapping_sub(index(case)),
                (None, _) => (rest & a.mask) / a.scale,
            };
            let keep = case.gpr[base as usize] & !a.mask;
            case.gpr[base as usize] = v & a.mask | keep;
        }
        if let Some(target) = self.target {
            case.gpr[target as usize] = place(r, places);
        }
        self.accesses.iter().all(|a| self.reach(r, case, a)) && self.flow(r, case, places)
    }

    /// Where an access lies: notes the window; false if it is no good place.
    fn reach(&self, r: &mut Random, case: &mut Case, a: &Access) -> bool {
        let segment = if a.fs { case.fs_base } else { 0 };
        let base = a.base.map_or(0, |g| case.gpr[g as usize]);
        let index = a.index.map_or(0, |(g, m)| (case.gpr[g as usize] & m).wrapping_mul(a.scale));
        let ea = base.wrapping_add(index).wrapping_add(a.disp) & a.mask;
        let ea = ea.wrapping_add(segment);
        let mut around = 24;
        if a.vector.is_some() {
            around = 16 * a.scale + 64;
        } else if self.bit.is_some() {
            around = 0x110;
        } else if self.repeats {
            around = 12 * self.counter.max(8) + 16;
        } else if self.mnemonic == M::Enter {
            around = 0x120;
        } else if self.mnemonic == M::Retf {
            around = 0x900;
        }
        if !is_safe(ea, a.size + around, around) {
            return false;
        }
        if (DATA - 0x1000..DATA2 + 0x4000).contains(&ea) {
            case.window(ea.saturating_sub(around), ea + a.size + around);
            content(r, self.mnemonic, case, ea);
            if let Some(far @ (Far::Operand(None) | Far::Load(_))) = self.far {
                far::content(r, far, case, ea, 0);
            }
            if is_own(self.mnemonic) {
                case.free_memory = Some((ea, a.size));
            }
        }
        true
    }

    /// An indirect branch must find a place in its operand.
    fn flow(&self, r: &mut Random, case: &mut Case, places: &[u64]) -> bool {
        let from_memory = match self.flow {
            // SYSRET and SYSEXIT, which users may not.
            FlowControl::Return if self.accesses.is_empty() => return true,
            FlowControl::Return => true,
            FlowControl::IndirectBranch | FlowControl::IndirectCall => self.target.is_none(),
            _ => return true,
        };
        if !from_memory {
            // A base register that is the target too, or RSP moved by the push.
            let t = self.target.map_or(0, |g| case.gpr[g as usize]);
            return is_place(t, places);
        }
        // For CALL the stack is written, the operand is what is not at RSP - 8; for RET it is the stack.
        let Some(a) = self.accesses.iter().find(|a| match self.flow {
            FlowControl::IndirectCall => !(a.base == Some(Gpr::Rsp) && a.disp as i64 == -(a.size as i64)),
            _ => true,
        }) else {
            return false;
        };
        let segment = if a.fs { case.fs_base } else { 0 };
        let base = a.base.map_or(0, |g| case.gpr[g as usize]);
        let index = a.index.map_or(0, |(g, m)| (case.gpr[g as usize] & m).wrapping_mul(a.scale));
        let ea = (base.wrapping_add(index).wrapping_add(a.disp) & a.mask).wrapping_add(segment);
        let inside = (DATA..DATA + 0x4000 - 8).contains(&ea) || (DATA2..DATA2 + 0x2000 - 8).contains(&ea);
        let faults = !canonical(ea) || (HOLE..DATA2 - 8).contains(&ea) || ea > 0xffff_8000_0000_0000;
        if inside {
            let to = place(r, places);
            match self.far {
                Some(far) => far::content(r, far, case, ea, to),
                None => case.put(ea, &to.to_le_bytes()),
            }
        }
        inside || faults
    }
}

fn canonical(a: u64) -> bool {
    ((a << 16) as i64 >> 16) as u64 == a
}

/// May a case touch `size` bytes from there on, and `before` bytes before?
fn is_safe(ea: u64, size: u64, before: u64) -> bool {
    let from = ea.wrapping_sub(before);
    let inside =
        from >= DATA - 0x1000 && ea < DATA2 + 0x4000 && ea.wrapping_add(size) < arena::BASE + arena::SIZE + 0x1000;
    // No page of a process is up there, nor near the edge of its half.
    let high = (0xffff_8000_0000_0000..0xffff_f000_0000_0000).contains(&ea) && from >= 0xffff_8000_0000_0000;
    let edge = (0x7fff_ffff_f800..0x8000_0000_0000).contains(&ea);
    inside || high || edge || !canonical(ea) && !canonical(from) && !canonical(ea.wrapping_add(size))
}

/// The `n`th of seven places where pages of different rights meet, or in one without all rights.
pub(super) fn at_pages(r: &mut Random, size: u64, n: u64) -> u64 {
    match n {
        0 => DATA + 0x1000 * (1 + r.below(3)) - r.below(size + 4),
        1 => ROM - r.below(size + 1),
        2 => ROM + 0x100 + r.below(0x800),
        3 => HOLE - r.below(size + 1),
        4 => DATA2 - r.below(size + 1),
        5 => HOLE + 0x400 + r.below(0x800),
        _ => DATA2 + 0x2000 - r.below(size + 1),
    }
}

/// An address worth using.
fn target(r: &mut Random, size: u64) -> u64 {
    match r.below(96) {
        n @ 0..=6 => at_pages(r, size, n),
        7 => (0x8000_0000_0000 - 8 + r.below(16)) ^ if r.once_in(2) { 0 } else { u64::MAX },
        8 => 0xffff_9000_0000_0000 + r.below(1 << 40),
        9 => 0x8001_0000_0000 + r.below(1 << 46),
        10..=11 => DATA + 0x1000 * (1 + r.below(3)) - r.below(size + 4),
        12..=29 => DATA + 0x400 + r.below(0x2400),
        _ => DATA + 0x400 + 64 * r.below(0x90),
    }
}

/// Where a branch may go: a tail, or an address that is not canonical, not mapped, not executable.
fn place(r: &mut Random, places: &[u64]) -> u64 {
    match r.below(24) {
        0 => 0x8000_0000_0000 + r.below(16),
        1 => HOLE + r.below(0x1000),
        2 => DATA + r.below(0x1000),
        3 => 0xffff_9000_0000_0000 + r.below(1 << 40),
        _ => r.one_of(places),
    }
}

fn is_place(a: u64, places: &[u64]) -> bool {
    places.contains(&a)
        || a < 0x1_0000
        || !canonical(a)
        || (HOLE..DATA2).contains(&a)
        || a >= 0xffff_8000_0000_0000
        || (DATA..DATA + 0x4000).contains(&a)
}

/// Does it store what is the machine's own, or the processor's choice?
fn is_own(m: M) -> bool {
    matches!(m, M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Xsaveopt | M::Xsaveopt64)
}

/// Small indexes in a vector register.
pub(super) fn indexes(r: &mut Random, case: &mut Case, register: usize, bytes: usize, count: usize) {
    let mut line = case.xsave.zmm(register);
    for n in 0..count {
        let v = r.below(32).wrapping_sub(16).to_le_bytes();
        line[n * bytes..(n + 1) * bytes].copy_from_slice(&v[..bytes]);
    }
    case.xsave.set_zmm(register, line);
}

/// Bytes of an image of registers.
pub(super) fn image_size(m: M) -> Option<u64> {
    state_image(m).map(|image| match image {
        StateImage::Xsave | StateImage::Xrstor => Layout::host().size as u64,
        StateImage::Fxsave | StateImage::Fxrstor => 512,
    })
}

/// Bytes of an access; for what iced does not say, what is enough.
fn size(m: M, size: MemorySize) -> u64 {
    if let Some(bytes) = image_size(m) {
        return bytes;
    }
    match m {
        M::Sgdt | M::Sidt => 10,
        M::Iret | M::Iretd | M::Iretq => 40,
        M::Retf => 16,
        _ => (size.size() as u64).max(1),
    }
}

/// What an instruction wants to find: images and control words with no reserved bit set, mostly.
pub(super) fn content(r: &mut Random, m: M, case: &mut Case, at: u64) {
    match m {
        M::Ldmxcsr | M::Vldmxcsr if !r.once_in(4) => {
            let v = (r.next() as u32 & 0xffff).to_le_bytes();
            case.put(at, &v);
        }
        M::Fldcw if !r.once_in(4) => {
            let v = (0x37f ^ (r.next() as u16 & 0xf00)).to_le_bytes();
            case.put(at, &v);
        }
        M::Xrstor | M::Xrstor64 | M::Fxrstor | M::Fxrstor64 if !r.once_in(8) => {
            let mut image = case.xsave.bytes[..Layout::host().size].to_vec();
            image[160..416].rotate_left(32);
            image[24..28].copy_from_slice(&(r.next() as u32 & 0xffff).to_le_bytes());
            let bv = u64::from_le_bytes(image[512..520].try_into().expect("8 bytes")) & r.next();
            image[512..520].copy_from_slice(&bv.to_le_bytes());
            if matches!(m, M::Fxrstor | M::Fxrstor64) {
                image.truncate(512);
            }
            case.put(at, &image);
        }
        // The flags: not TF, whose trap comes after the next instruction.
        M::Popf | M::Popfd | M::Popfq => {
            let v = (r.next() & !0x100).to_le_bytes();
            case.put(at, &v);
        }
        _ => {}
    }
}
