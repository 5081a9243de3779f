//! One guest instruction becomes a host function: load the registers it uses from the state, execute it with its memory operand
//! replaced by a buffer, store what it wrote.
//!
//! Register convention inside: RDI the state, RSI the [`Bounce`] buffer, R11 the memory operand, which comes in RDX; general-purpose
//! operands live in RAX, RCX, RDX, R8 to R10. x87 and MMX registers are not loaded here: they are in the host's registers while the unit has
//! them (see [`crate::native::unit`]). Legacy SSE instructions load and store the low 128 bits only, and so keep the rest; VEX
//! instructions clear bits 511:256 of what they write in the image too.

use crate::cpu::xsave::{Layout, component};
use crate::cpu::{CpuState, XsaveArea};
use crate::isa::Gpr;
use crate::native::Bounce;
use crate::native::kind::Needs;
use iced_x86::{
    Code, CodeSize, Encoder, EncodingKind, IcedError, Instruction, InstructionInfoFactory, MemoryOperand, OpAccess,
    OpKind, Register,
};
use std::mem::offset_of;

/// The status flags a native instruction may change (SDM 1 3.4.3.1).
const STATUS: i32 = 0x8d5;

/// A general-purpose register of the instruction.
struct Use {
    guest: Gpr,
    host: Register,
    written: bool,
}

/// What the instruction uses.
struct Plan {
    insn: Instruction,
    gprs: Vec<Use>,
    /// Number of a vector register, is it written?
    vectors: Vec<(usize, bool)>,
    masks: Vec<(usize, bool)>,
    /// It has a memory operand.
    memory: bool,
}

/// What a built thunk touches in the XSAVE image.
pub struct Built {
    /// The host code.
    pub code: Vec<u8>,
    /// State components whose bytes are read or partly written.
    pub touched: u64,
    /// State components that are in use afterwards.
    pub written: u64,
}

/// Makes the thunk. `None`: it has an operand that no thunk can stand for.
pub fn build(iced: &Instruction, needs: Needs) -> Option<Built> {
    let plan = plan(iced)?;
    let mut e = Emit { encoder: Encoder::new(64), len: 0 };
    let wide = match iced.code().encoding() {
        EncodingKind::Legacy => Wide::Xmm,
        EncodingKind::EVEX => Wide::Zmm,
        _ => Wide::Ymm,
    };
    e.all(iced, &plan, needs, wide).ok()?;
    let (mut touched, mut written) = (0, 0);
    for &(n, w) in &plan.vectors {
        let bits = match (wide, n) {
            (Wide::Xmm, _) => component::SSE,
            (Wide::Ymm, _) => component::SSE | component::AVX,
            (Wide::Zmm, 0..16) => component::SSE | component::AVX | component::ZMM_HI256,
            (Wide::Zmm, _) => component::HI16_ZMM,
        };
        touched |= bits;
        written |= if w { bits } else { 0 };
    }
    for &(_, w) in &plan.masks {
        touched |= component::OPMASK;
        written |= if w { component::OPMASK } else { 0 };
    }
    Some(Built { code: e.encoder.take_buffer(), touched, written })
}

fn written(access: OpAccess) -> bool {
    !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess)
}

/// Replaces the operands and collects the registers.
fn plan(iced: &Instruction) -> Option<Plan> {
    let mut insn = *iced;
    insn.set_code_size(CodeSize::Code64);
    insn.set_has_rep_prefix(false);
    insn.set_has_repne_prefix(false);
    insn.set_segment_prefix(Register::None);
    insn.set_len(0);
    let mut memory = false;
    for n in 0..iced.op_count() {
        match iced.op_kind(n) {
            OpKind::Memory if !memory && !iced.is_vsib() => {
                memory = true;
                insn.set_memory_base(Register::None);
                insn.set_memory_index(Register::None);
                insn.set_memory_index_scale(1);
                insn.set_memory_displacement64(0);
                insn.set_memory_displ_size(0);
            }
            OpKind::Register | OpKind::Immediate8 | OpKind::Immediate8_2nd => {}
            _ => return None,
        }
    }
    let mut plan = Plan { insn, gprs: Vec::new(), vectors: Vec::new(), masks: Vec::new(), memory };
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(&insn);
    if info.used_memory().len() > usize::from(memory) {
        return None;
    }
    for used in info.used_registers() {
        let (r, w) = (used.register(), written(used.access()));
        if r.is_gpr() {
            let guest = Gpr::from_iced(r)?;
            match plan.gprs.iter_mut().find(|u| u.guest == guest) {
                Some(u) => u.written |= w,
                None => plan.gprs.push(Use { guest, host: Register::None, written: w }),
            }
        } else if r.is_vector_register() {
            add(&mut plan.vectors, r.number(), w);
        } else if r.is_k() {
            add(&mut plan.masks, r.number(), w);
        } else if !(r.is_st() || r.is_mm() || r.is_segment_register()) {
            return None;
        }
    }
    if memory {
        plan.insn.set_memory_base(Register::R11);
    }
    assign(&mut plan)?;
    Some(plan)
}

fn add(list: &mut Vec<(usize, bool)>, n: usize, w: bool) {
    match list.iter_mut().find(|(m, _)| *m == n) {
        Some((_, old)) => *old |= w,
        None => list.push((n, w)),
    }
}

/// Gives each general-purpose register its place on the host: the same one if it may be used, so that implicit operands work.
fn assign(plan: &mut Plan) -> Option<()> {
    use Register::{R8, R9, R10, RAX, RCX, RDX};
    let free = [R8, R9, R10, RAX, RCX, RDX];
    let mut taken: Vec<Register> = Vec::new();
    for u in &mut plan.gprs {
        if free.contains(&u.guest.to_iced()) {
            u.host = u.guest.to_iced();
            taken.push(u.host);
        }
    }
    for u in &mut plan.gprs {
        if u.host == Register::None {
            u.host = *free.iter().find(|r| !taken.contains(r))?;
            taken.push(u.host);
        }
    }
    for n in 0..plan.insn.op_count() {
        let r = plan.insn.op_register(n);
        if plan.insn.op_kind(n) == OpKind::Register && r.is_gpr() {
            let guest = Gpr::from_iced(r)?;
            let host = plan.gprs.iter().find(|u| u.guest == guest)?.host;
            plan.insn.set_op_register(n, sized(host, r.size())?);
        }
    }
    Some(())
}

/// The part of a register that has `size` bytes.
fn sized(full: Register, size: usize) -> Option<Register> {
    let n = full.number() as u32;
    match size {
        2 => Some(Register::AX + n),
        4 => Some(Register::EAX + n),
        8 => Some(Register::RAX + n),
        _ => None,
    }
}

/// How much of a vector register the instruction's encoding reaches.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wide {
    Xmm,
    Ymm,
    Zmm,
}

struct Emit {
    encoder: Encoder,
    len: usize,
}

type Emitted = Result<(), IcedError>;

/// A field of the state.
fn state(offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(Register::RDI, offset as i64)
}

/// A field of the XSAVE image.
fn image(offset: usize) -> MemoryOperand {
    state(offset_of!(CpuState, xsave) + offset_of!(XsaveArea, bytes) + offset)
}

/// A field of the bounce buffer.
fn bounce(offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(Register::RSI, offset as i64)
}

impl Emit {
    fn put(&mut self, i: Result<Instruction, IcedError>) -> Emitted {
        self.len += self.encoder.encode(&i?, self.len as u64)?;
        Ok(())
    }

    fn load(&mut self, code: Code, r: Register, m: MemoryOperand) -> Emitted {
        self.put(Instruction::with2(code, r, m))
    }

    fn store(&mut self, code: Code, m: MemoryOperand, r: Register) -> Emitted {
        self.put(Instruction::with2(code, m, r))
    }

    fn all(&mut self, iced: &Instruction, plan: &Plan, needs: Needs, wide: Wide) -> Emitted {
        let writes_flags = iced.rflags_modified() != 0;
        if plan.memory {
            self.put(Instruction::with2(Code::Mov_r64_rm64, Register::R11, Register::RDX))?;
        }
        if iced.rflags_read() != 0 || (writes_flags && needs.contains(Needs::X87)) {
            self.load_flags()?;
        }
        for &(n, _) in &plan.vectors {
            self.load_vector(n, wide)?;
        }
        for &(n, _) in &plan.masks {
            let (load, _) = mask_codes();
            self.load(load, Register::K0 + n as u32, image(Layout::host().opmask + 8 * n))?;
        }
        if needs.contains(Needs::MXCSR) {
            self.put(Instruction::with1(Code::Ldmxcsr_m32, image(24)))?;
        }
        for u in &plan.gprs {
            self.load(Code::Mov_r64_rm64, u.host, state(offset_of!(CpuState, gpr) + 8 * u.guest as usize))?;
        }
        self.put(Ok(plan.insn))?;
        for u in plan.gprs.iter().filter(|u| u.written) {
            self.store(Code::Mov_rm64_r64, state(offset_of!(CpuState, gpr) + 8 * u.guest as usize), u.host)?;
        }
        for &(n, _) in plan.vectors.iter().filter(|(_, w)| *w) {
            self.store_vector(n, wide)?;
        }
        for &(n, _) in plan.masks.iter().filter(|(_, w)| *w) {
            let (_, store) = mask_codes();
            self.store(store, image(Layout::host().opmask + 8 * n), Register::K0 + n as u32)?;
        }
        if writes_flags {
            self.store_flags()?;
        }
        if needs.contains(Needs::MXCSR) {
            self.put(Instruction::with1(Code::Stmxcsr_m32, image(24)))?;
            self.put(Instruction::with1(Code::Ldmxcsr_m32, bounce(offset_of!(Bounce, host_mxcsr))))?;
        }
        if needs.contains(Needs::FCW) {
            self.put(Instruction::with1(Code::Fnstcw_m2byte, bounce(offset_of!(Bounce, fcw))))?;
        }
        if wide != Wide::Xmm {
            self.put(Ok(Instruction::with(Code::VEX_Vzeroupper)))?;
        }
        self.put(Instruction::with2(Code::Xor_r32_rm32, Register::EAX, Register::EAX))?;
        self.put(Ok(Instruction::with(Code::Retnq)))
    }

    fn load_flags(&mut self) -> Emitted {
        self.load(Code::Mov_r32_rm32, Register::EAX, state(offset_of!(CpuState, rflags)))?;
        self.put(Instruction::with2(Code::And_rm32_imm32, Register::EAX, STATUS))?;
        self.put(Instruction::with2(Code::Or_rm32_imm32, Register::EAX, 0x202))?;
        self.put(Instruction::with1(Code::Push_r64, Register::RAX))?;
        self.put(Ok(Instruction::with(Code::Popfq)))
    }

    fn store_flags(&mut self) -> Emitted {
        let rflags = state(offset_of!(CpuState, rflags));
        self.put(Ok(Instruction::with(Code::Pushfq)))?;
        self.put(Instruction::with1(Code::Pop_r64, Register::RAX))?;
        self.put(Instruction::with2(Code::And_rm32_imm32, Register::EAX, STATUS))?;
        self.put(Instruction::with2(Code::And_rm32_imm32, rflags, !STATUS))?;
        self.store(Code::Or_rm32_r32, rflags, Register::EAX)
    }

    fn load_vector(&mut self, n: usize, wide: Wide) -> Emitted {
        let l = Layout::host();
        let (xmm, ymm, zmm) = names(n);
        let low = image(Layout::XMM + 16 * n);
        match wide {
            Wide::Xmm => self.load(Code::Movups_xmm_xmmm128, xmm, low),
            Wide::Zmm if n >= 16 => {
                self.load(Code::EVEX_Vmovups_zmm_k1z_zmmm512, zmm, image(l.hi16_zmm + 64 * (n - 16)))
            }
            _ => {
                self.load(Code::VEX_Vmovups_xmm_xmmm128, xmm, low)?;
                let high = image(l.avx + 16 * n);
                self.put(Instruction::with4(Code::VEX_Vinsertf128_ymm_ymm_xmmm128_imm8, ymm, ymm, high, 1))?;
                if wide == Wide::Zmm {
                    let high = image(l.zmm_hi256 + 32 * n);
                    self.put(Instruction::with4(Code::EVEX_Vinsertf64x4_zmm_k1z_zmm_ymmm256_imm8, zmm, zmm, high, 1))?;
                }
                Ok(())
            }
        }
    }

    fn store_vector(&mut self, n: usize, wide: Wide) -> Emitted {
        let l = Layout::host();
        let (xmm, ymm, zmm) = names(n);
        let low = image(Layout::XMM + 16 * n);
        match wide {
            Wide::Xmm => self.store(Code::Movups_xmmm128_xmm, low, xmm),
            Wide::Zmm if n >= 16 => {
                self.store(Code::EVEX_Vmovups_zmmm512_k1z_zmm, image(l.hi16_zmm + 64 * (n - 16)), zmm)
            }
            _ => {
                self.store(Code::VEX_Vmovups_xmmm128_xmm, low, xmm)?;
                let high = image(l.avx + 16 * n);
                self.put(Instruction::with3(Code::VEX_Vextractf128_xmmm128_ymm_imm8, high, ymm, 1))?;
                if l.components & component::ZMM_HI256 != 0 {
                    let high = image(l.zmm_hi256 + 32 * n);
                    self.put(Instruction::with3(Code::EVEX_Vextractf64x4_ymmm256_k1z_zmm_imm8, high, zmm, 1))?;
                }
                Ok(())
            }
        }
    }
}

fn names(n: usize) -> (Register, Register, Register) {
    let n = n as u32;
    (Register::XMM0 + n, Register::YMM0 + n, Register::ZMM0 + n)
}

/// Load and store of a whole opmask register; without AVX512BW it has 16 bits.
fn mask_codes() -> (Code, Code) {
    if std::is_x86_feature_detected!("avx512bw") {
        (Code::VEX_Kmovq_kr_km64, Code::VEX_Kmovq_m64_kr)
    } else {
        (Code::VEX_Kmovw_kr_km16, Code::VEX_Kmovw_m16_kr)
    }
}
