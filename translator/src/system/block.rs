//! A guest block of the system mode: a run of instructions inside one page (its last may reach into the next one), and what lowering
//! wants to know of each.

use crate::route::{Route, Routes};
pub use crate::system::access::{Access, Segment};
use crate::system::{Mode, narrow};
use bivisor_emulator::cpu::msr::{Msrs, index};
use bivisor_emulator::isa::decode::{correct, options};
use bivisor_emulator::isa::insn::memory_len;
use bivisor_emulator::isa::{Class, Gpr, MAX_INSN_LEN, Sensitivity, facts, state_image};
use bivisor_emulator::mem::{PAGE_SIZE, Ram};
use bivisor_emulator::native::{Needs, kind};
use iced_x86::{
    Code, CpuidFeature, Decoder, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register, RflagsBits,
};

/// Most instructions in a block.
pub const MAX_INSNS: usize = 48;
/// Most conditional branches in a block.
const MAX_BRANCHES: usize = 4;
/// The same of code that uses the mirror: it has run for a while, and each block borrows registers and finds distances anew.
pub const MAX_MIRRORED: usize = 96;
const MAX_MIRRORED_BRANCHES: usize = 12;

/// All status flags, as iced numbers them.
pub const STATUS: u8 =
    (RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF) as u8;

/// How an instruction is lowered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Copied.
    Plain,
    /// Copied, its memory operand through the TLB.
    Memory,
    /// LEA of a constant.
    Constant(u64),
    /// PUSH of a register or a constant.
    Push,
    /// PUSH of memory.
    PushMemory,
    /// POP of a register.
    Pop,
    /// LEAVE.
    Leave,
    /// PUSHFQ.
    PushFlags,
    /// POPFQ.
    PopFlags,
    /// CLI at CPL 0.
    Cli,
    /// STI at CPL 0.
    Sti,
    /// STAC or CLAC at CPL 0 that changes RFLAGS.AC, and with it the mode.
    ToggleAc,
    /// MOV from a control register at CPL 0.
    ReadControl,
    /// MOV from CR8 at CPL 0.
    ReadPriority,
    /// MOV to CR8 at CPL 0.
    WritePriority,
    /// RDMSR of this register at CPL 0.
    ReadMsr(u32),
    /// WRMSR of this register at CPL 0.
    WriteMsr(u32),
    /// CPUID of a leaf that never changes.
    Identify([u32; 4]),
    /// MOV of a segment selector to a 32- or 64-bit register.
    ReadSelector,
    /// RDTSCP.
    ReadTimeAndId,
    /// SWAPGS at CPL 0.
    SwapGs,
    /// VERW of memory at CPL 0.
    VerifyWrite,
    /// RDTSC.
    ReadTime,
    /// STOS of so many bytes.
    Stos(u8),
    /// LODS.
    Lods(u8),
    /// MOVS.
    Movs(u8),
    /// REP STOS.
    RepStos(u8),
    /// REP MOVS.
    RepMovs(u8),
    /// Nothing to do.
    Nop,
    /// Jcc.
    Conditional,
    /// LOOP, LOOPcc, JrCXZ.
    Counted,
    /// JMP to a constant.
    Jump,
    /// CALL of a constant.
    Call,
    /// JMP through a register or memory.
    JumpIndirect,
    /// CALL through a register or memory.
    CallIndirect,
    /// RET; bytes it drops besides.
    Return(u16),
    /// IN or OUT at CPL 0.
    Port,
    /// INVLPG at CPL 0.
    Invalidate,
    /// XSAVE64 or XRSTOR64 at CPL 0, in a mode without vector registers.
    Image,
    /// SYSCALL.
    Syscall,
    /// SYSRET to 64-bit code at CPL 0.
    Sysret,
    /// IRETQ at CPL 0.
    Iret,
    /// One step of the interpreter.
    Step,
    /// An x87 or SIMD instruction in a mode without: perhaps another mode has them.
    Asleep,
}

impl Way {
    /// Does nothing follow it in the block?
    pub fn ends(self) -> bool {
        matches!(
            self,
            Way::Jump
                | Way::Call
                | Way::JumpIndirect
                | Way::CallIndirect
                | Way::Return(_)
                | Way::Syscall
                | Way::Sysret
                | Way::Iret
                | Way::Step
                | Way::Asleep
                | Way::Counted
                | Way::ToggleAc
        )
    }

    /// May something else than the next instruction follow it, or read all flags?
    pub fn leaves(self) -> bool {
        !matches!(
            self,
            Way::Plain
                | Way::Memory
                | Way::Constant(_)
                | Way::Nop
                | Way::Push
                | Way::Pop
                | Way::Leave
                | Way::PushMemory
                | Way::Cli
                | Way::ReadControl
                | Way::ReadPriority
                | Way::WritePriority
                | Way::ReadMsr(_)
                | Way::WriteMsr(_)
                | Way::Identify(_)
                | Way::SwapGs
                | Way::ReadSelector
                | Way::ReadTimeAndId
                | Way::ReadTime
                | Way::Stos(_)
                | Way::Lods(_)
                | Way::Movs(_)
                | Way::RepStos(_)
                | Way::RepMovs(_)
        )
    }
}

/// One instruction.
#[derive(Clone, Copy, Debug)]
pub struct Item {
    /// As decoded at its address.
    pub iced: Instruction,
    /// Its distance from the start of the block.
    pub at: u16,
    /// Its length.
    pub len: u8,
    /// How it is lowered.
    pub way: Way,
    /// Its access, if it has exactly one that is done in the cache.
    pub access: Option<Access>,
    /// Registers it names, by number.
    pub uses: u16,
    /// Those whose value it needs.
    pub reads: u16,
    /// Those it changes.
    pub writes: u16,
    /// A register that only has a constant added.
    pub adds: Option<(Gpr, i64)>,
    /// Status flags it depends on.
    pub flags_in: u8,
    /// Status flags it sets.
    pub flags_out: u8,
    /// Does it change any?
    pub changes_flags: bool,
    /// Status flags that matter after it to what is executed.
    pub live: u8,
    /// Those that are read or shown in the frame of an exception.
    pub shown: u8,
    /// May it raise an exception?
    pub can_fault: bool,
    /// Does its encoding exclude REX (AH to BH)?
    pub high: bool,
}

/// Decoded guest code.
#[derive(Clone, Debug)]
pub struct GuestBlock {
    /// Linear address of the first instruction.
    pub start: u64,
    /// Mode it is for.
    pub mode: Mode,
    /// The instructions.
    pub items: Vec<Item>,
    /// Their bytes.
    pub bytes: Vec<u8>,
    /// No status flag is read or shown before it is overwritten.
    pub flags_dead: bool,
}

impl GuestBlock {
    /// Address of an instruction.
    pub fn rip(&self, i: &Item) -> u64 {
        self.start.wrapping_add(u64::from(i.at))
    }

    /// Address after an instruction.
    pub fn next(&self, i: &Item) -> u64 {
        self.rip(i).wrapping_add(u64::from(i.len))
    }

    /// An instruction's bytes.
    pub fn code(&self, i: &Item) -> &[u8] {
        &self.bytes[usize::from(i.at)..][..usize::from(i.len)]
    }
}

/// Where code is.
pub struct Source<'a> {
    /// Memory.
    pub ram: &'a Ram,
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Guest-physical address of the page that follows in linear memory, if it is needed and there.
    pub next: &'a mut dyn FnMut() -> Option<u64>,
    /// Is there a block at this linear address, so that one in the mirror which has branched before may end there?
    pub known: &'a dyn Fn(u64) -> bool,
}

/// Decodes the block at `start`; `None` if its first instruction cannot be. The second value: it reaches into the next page.
pub fn decode(
    source: &mut Source<'_>,
    start: u64,
    mode: Mode,
    routes: &Routes,
    most: usize,
) -> Option<(GuestBlock, bool)> {
    let rest = (PAGE_SIZE - start % PAGE_SIZE) as usize;
    let (branches_at_most, window) =
        if mode.is_mirrored() { (MAX_MIRRORED_BRANCHES, 512) } else { (MAX_BRANCHES, 256) };
    let mut bytes = vec![0; rest.min(window)];
    source.ram.read(source.gpa, &mut bytes)?;
    let mut items: Vec<Item> = Vec::with_capacity(16);
    let mut factory = InstructionInfoFactory::new();
    let (mut at, mut branches, mut crossing) = (0, 0, false);
    let mut known = Known::default();
    while items.len() < most && branches < branches_at_most {
        let bits = if mode.is_narrow() { 32 } else { 64 };
        let mut decoder = Decoder::with_ip(bits, &bytes[at..], start.wrapping_add(at as u64), options());
        let mut iced = Instruction::default();
        decoder.decode_out(&mut iced);
        correct(&mut iced, &bytes[at..]);
        if mode.is_narrow() {
            narrow::widen(&mut iced);
        }
        if iced.is_invalid() {
            // Only a block's first instruction may cross the end of the page.
            if !items.is_empty() || crossing || bytes.len() >= MAX_INSN_LEN || bytes.len() != rest {
                break;
            }
            let next = (source.next)()?;
            let old = bytes.len();
            bytes.resize(MAX_INSN_LEN, 0);
            source.ram.read(next, &mut bytes[old..])?;
            crossing = true;
            continue;
        }
        let item = item(&iced, at, mode, routes, &mut factory, &known);
        known.after(&item);
        at += iced.len();
        items.push(item);
        branches += usize::from(item.way == Way::Conditional);
        let met = mode.is_mirrored() && branches > 0 && (source.known)(start.wrapping_add(at as u64));
        if item.way.ends() || crossing || met {
            break;
        }
    }
    bytes.truncate(at);
    let (mut live, mut shown) = (STATUS, STATUS);
    for i in items.iter_mut().rev() {
        (i.live, i.shown) = (live, shown);
        // Where instructions are counted the flags are shown after each.
        let all = i.way.leaves() || mode.is_counted();
        live = if all { STATUS } else { live & !i.flags_out | i.flags_in };
        shown = if all || i.can_fault { STATUS } else { shown & !i.flags_out | i.flags_in };
    }
    let flags_dead = shown == 0;
    (!items.is_empty()).then_some((GuestBlock { start, mode, items, bytes, flags_dead }, crossing))
}

/// What RAX and RCX hold, where the block itself says so.
#[derive(Default)]
struct Known([Option<u32>; 2]);

impl Known {
    fn after(&mut self, item: &Item) {
        let iced = &item.iced;
        for (r, known) in [Gpr::Rax, Gpr::Rcx].into_iter().zip(&mut self.0) {
            if item.writes & 1 << r as u16 == 0 && item.way != Way::Step {
                continue;
            }
            let whole = iced.op_count() > 0
                && iced.op0_kind() == OpKind::Register
                && iced.op0_register().is_gpr32()
                && Gpr::from_iced(iced.op0_register()) == Some(r);
            let zero = iced.op_count() == 2
                && iced.op1_kind() == OpKind::Register
                && iced.op1_register() == iced.op0_register();
            *known = match iced.mnemonic() {
                Mnemonic::Mov if whole && iced.op1_kind() == OpKind::Immediate32 => Some(iced.immediate32()),
                Mnemonic::Xor if whole && zero => Some(0),
                _ => None,
            };
        }
    }
}

/// Registers whose writes need only be canonical.
fn is_base(n: u32) -> bool {
    matches!(n, index::FS_BASE | index::GS_BASE | index::KERNEL_GS_BASE)
}

/// Sensitive instructions that depend on what their registers hold.
fn by_value(iced: &Instruction, mode: Mode, routes: &Routes, known: &Known) -> Option<Way> {
    let [eax, ecx] = known.0;
    match iced.code() {
        Code::Rdmsr if !mode.user() => ecx.filter(|n| is_base(*n) || Msrs::plain(*n).is_some()).map(Way::ReadMsr),
        Code::Wrmsr if !mode.user() => ecx.filter(|n| is_base(*n) || *n == index::TSC_AUX).map(Way::WriteMsr),
        Code::Cpuid => routes.cpuid(eax?).map(Way::Identify),
        _ => None,
    }
}

fn item(
    iced: &Instruction,
    at: usize,
    mode: Mode,
    routes: &Routes,
    factory: &mut InstructionInfoFactory,
    known: &Known,
) -> Item {
    let (mut uses, mut reads, mut writes, mut high) = (0u16, 0u16, 0u16, false);
    let info = factory.info(iced);
    for u in info.used_registers() {
        let r = u.register();
        let Some(g) = Gpr::from_iced(r) else { continue };
        let bit = 1 << g as u16;
        uses |= bit;
        high |= matches!(r, Register::AH | Register::BH | Register::CH | Register::DH);
        let whole = r.is_gpr64() || r.is_gpr32();
        match u.access() {
            OpAccess::Write if whole => writes |= bit,
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => {
                reads |= bit;
                writes |= bit;
            }
            _ => reads |= bit,
        }
    }
    // Without shadow stacks it does nothing (SDM 2B RDSSPD).
    if matches!(iced.mnemonic(), Mnemonic::Rdsspd | Mnemonic::Rdsspq) {
        reads |= writes;
    }
    let (mut flags_in, flags_out) = flags(iced);
    let mut way = by_value(iced, mode, routes, known).unwrap_or_else(|| way(iced, mode, routes));
    let mut access = None;
    match way {
        _ if mode.is_narrow() => (way, access) = narrow::access(iced, way, mode, factory),
        Way::Memory | Way::PushMemory | Way::VerifyWrite => {
            let explicit = operand(iced, factory);
            match explicit {
                Some(a) if way == Way::PushMemory && a.write => way = Way::Step,
                // With narrow addresses the sum would be cut.
                Some(a) if is_bit_string(iced) && a.narrow => way = Way::Step,
                Some(a) if is_bit_string(iced) => {
                    access = Some(Access { bit: Gpr::from_iced(iced.op1_register()), ..a });
                }
                Some(a) => access = Some(Access { aligned: a.len >= 16 && demands_alignment(iced), ..a }),
                None => way = Way::Step,
            }
        }
        Way::JumpIndirect | Way::CallIndirect if iced.op0_kind() == OpKind::Memory => {
            match operand_of(iced, 8, false) {
                Some(a) => access = Some(a),
                None => way = Way::Step,
            }
        }
        Way::Push | Way::PushFlags => access = Some(Access::stack(-8, true)),
        Way::Pop | Way::PopFlags | Way::Return(_) => access = Some(Access::stack(0, false)),
        Way::Iret => access = Some(Access { len: 40, ..Access::stack(0, false) }),
        Way::Leave => {
            access = Some(Access { base: Some(Gpr::Rbp), ..Access::stack(0, false) });
        }
        _ => {}
    }
    let shows_flags =
        matches!(way, Way::Step | Way::Asleep | Way::VerifyWrite | Way::Port | Way::Invalidate | Way::Image);
    if shows_flags || matches!(way, Way::Syscall | Way::Sysret | Way::Iret) {
        flags_in = STATUS;
    }
    // Division, x87 and SIMD exceptions; all others have an access.
    let plain = !matches!(iced.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) && facts(iced.code()).class != Class::Native;
    let can_fault = match way {
        Way::Plain => !plain,
        Way::Constant(_) | Way::Nop | Way::ReadControl | Way::ReadSelector | Way::ReadTime => false,
        Way::ReadTimeAndId
        | Way::SwapGs
        | Way::Cli
        | Way::ReadMsr(_)
        | Way::Identify(_)
        | Way::ToggleAc
        | Way::Jump
        | Way::Conditional => false,
        _ => true,
    };
    let adds = match way {
        _ if mode.is_narrow() => narrow::adds(iced, way),
        Way::Push | Way::PushFlags | Way::PushMemory => Some((Gpr::Rsp, -8)),
        Way::Pop if iced.op0_register() != Register::RSP => Some((Gpr::Rsp, 8)),
        Way::PopFlags => Some((Gpr::Rsp, 8)),
        Way::Plain => constant_add(iced),
        _ => None,
    };
    Item {
        iced: *iced,
        at: at as u16,
        len: iced.len() as u8,
        way,
        access,
        uses,
        reads,
        writes,
        adds,
        flags_in,
        flags_out,
        changes_flags: iced.rflags_modified() as u8 & STATUS != 0
            || matches!(iced.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr),
        live: STATUS,
        shown: STATUS,
        can_fault,
        high,
    }
}

/// ADD, SUB, LEA, INC and DEC of one 64-bit register by a constant.
fn constant_add(iced: &Instruction) -> Option<(Gpr, i64)> {
    let r = iced.op0_register();
    if iced.op_count() == 0 || iced.op0_kind() != OpKind::Register || !r.is_gpr64() {
        return None;
    }
    let g = Gpr::from_iced(r)?;
    let immediate = || {
        let kind = iced.op1_kind();
        matches!(kind, OpKind::Immediate8to64 | OpKind::Immediate32to64).then(|| iced.immediate(1) as i64)
    };
    let n = match iced.mnemonic() {
        Mnemonic::Add => immediate()?,
        Mnemonic::Sub => -immediate()?,
        Mnemonic::Inc => 1,
        Mnemonic::Dec => -1,
        Mnemonic::Lea if iced.memory_base() == r && iced.memory_index() == Register::None => {
            iced.memory_displacement64() as i64
        }
        _ => return None,
    };
    i32::try_from(n).is_ok().then_some((g, n))
}

/// Status flags an instruction depends on, and those it sets whatever they were. What the manual leaves undefined may be what it was
/// before.
fn flags(iced: &Instruction) -> (u8, u8) {
    use Mnemonic as M;
    let read = iced.rflags_read() as u8 & STATUS;
    let set = iced.rflags_modified() as u8 & STATUS;
    let undefined = iced.rflags_undefined() as u8 & STATUS;
    match iced.mnemonic() {
        M::Shl | M::Shr | M::Sar | M::Sal if iced.op1_kind() == OpKind::Immediate8 => {
            let mask = if iced.op0_register().is_gpr64() || iced.memory_size().size() == 8 { 0x3f } else { 0x1f };
            if iced.immediate8() & mask == 0 { (read, 0) } else { (read, set) }
        }
        // Counts beyond the width are not modelled.
        M::Rcl | M::Rcr => (STATUS, 0),
        // A count of zero changes nothing.
        M::Shl | M::Shr | M::Sar | M::Sal | M::Rol | M::Ror | M::Shld | M::Shrd => (read, 0),
        M::And | M::Or | M::Xor | M::Test => (read, set),
        _ => (read, set & !undefined),
    }
}

/// The explicit memory operand as an access of this length.
pub(super) fn operand_of(iced: &Instruction, len: u8, write: bool) -> Option<Access> {
    let gpr = |r: Register| if r == Register::None { Some(None) } else { Gpr::from_iced(r).map(Some) };
    let segment = match iced.memory_segment() {
        Register::FS => Segment::Fs,
        Register::GS => Segment::Gs,
        _ => Segment::Flat,
    };
    if iced.is_ip_rel_memory_operand() {
        let disp = iced.ip_rel_memory_address() as i64;
        let a = Access { base: None, index: None, disp, segment, narrow: false, len, write, aligned: false, bit: None };
        return Some(a);
    }
    let (base, index) = (gpr(iced.memory_base())?, gpr(iced.memory_index())?);
    let narrow = iced.memory_base().is_gpr32()
        || iced.memory_index().is_gpr32()
        || base.is_none() && index.is_none() && iced.memory_displ_size() == 4;
    let index = index.map(|r| (r, iced.memory_index_scale() as u8));
    let mut disp = iced.memory_displacement64() as i64;
    if narrow && base.is_none() && index.is_none() {
        disp &= 0xffff_ffff;
    }
    Some(Access { base, index, disp, segment, narrow, len, write, aligned: false, bit: None })
}

/// Is a misaligned operand #GP?
fn demands_alignment(iced: &Instruction) -> bool {
    kind::needs(iced).intersects(Needs::ALIGNED | Needs::ALIGNED_UNLESS_MM)
}

/// The one access of an instruction with a memory operand; `None` if there is none, or more.
pub(super) fn operand(iced: &Instruction, factory: &mut InstructionInfoFactory) -> Option<Access> {
    let len = memory_len(iced);
    let info = factory.info(iced);
    let mut explicit = info.used_memory().iter().filter(|m| {
        // PUSH has the stack besides.
        let stack = matches!(m.base(), Register::RSP | Register::ESP);
        !(iced.is_stack_instruction() && stack && m.access() == OpAccess::Write)
    });
    let only = explicit.next()?;
    if explicit.next().is_some() {
        return None;
    }
    let has = (0..iced.op_count()).any(|i| iced.op_kind(i) == OpKind::Memory);
    let write = match only.access() {
        OpAccess::Read => false,
        OpAccess::Write | OpAccess::ReadWrite | OpAccess::ReadCondWrite => true,
        _ => return None,
    };
    let moffs = matches!(
        iced.code(),
        Code::Mov_AL_moffs8
            | Code::Mov_AX_moffs16
            | Code::Mov_EAX_moffs32
            | Code::Mov_RAX_moffs64
            | Code::Mov_moffs8_AL
            | Code::Mov_moffs16_AX
            | Code::Mov_moffs32_EAX
            | Code::Mov_moffs64_RAX
    );
    let plain = has && !iced.is_vsib() && !iced.has_op_mask() && !moffs;
    if !plain || !matches!(len, 1 | 2 | 4 | 6 | 8 | 10 | 16 | 32 | 64) {
        return None;
    }
    operand_of(iced, len as u8, write)
}

/// BT, BTS, BTR or BTC of memory whose bit offset in a register may lead beyond the operand?
pub(super) fn is_bit_string(iced: &Instruction) -> bool {
    matches!(iced.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && iced.op0_kind() == OpKind::Memory
        && iced.op1_kind() == OpKind::Register
}

pub(super) fn is_x87(iced: &Instruction) -> bool {
    let x87 = |f: &CpuidFeature| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387);
    iced.cpuid_features().iter().any(x87)
}

/// May x87 and SIMD instructions of this encoding run as the mode is?
pub(super) fn native(iced: &Instruction, mode: Mode) -> bool {
    let level = match iced.encoding() {
        EncodingKind::VEX | EncodingKind::XOP => 2,
        EncodingKind::EVEX => 3,
        _ => 1,
    };
    // Mask registers have VEX encodings.
    let mask = |i| iced.op_kind(i) == OpKind::Register && iced.op_register(i).is_k();
    let level = if (0..iced.op_count()).any(mask) { 3 } else { level };
    mode.vectors() >= level
}

/// How instructions are lowered that code of both widths has.
fn of_both(iced: &Instruction, mode: Mode, routes: &Routes) -> Option<Way> {
    let code = iced.code();
    let (kernel, copied) = (!mode.user(), routes.base(code) == Route::Copy);
    let from_register = |rs: &[Register]| rs.contains(&iced.op1_register()) && !iced.has_lock_prefix();
    Some(match code {
        Code::Cli if kernel => Way::Cli,
        Code::Sti if kernel => Way::Sti,
        Code::Stac | Code::Clac if kernel && !mode.is_counted() => match mode.alignment() {
            Some(ac) if ac == (code == Code::Stac) => Way::Nop,
            Some(_) => Way::ToggleAc,
            None => Way::Step,
        },
        Code::Mov_r32_cr | Code::Mov_r64_cr
            if kernel && from_register(&[Register::CR0, Register::CR2, Register::CR3, Register::CR4]) =>
        {
            Way::ReadControl
        }
        Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg if iced.op0_kind() == OpKind::Register => Way::ReadSelector,
        Code::Rdtscp if mode.time() && copied => Way::ReadTimeAndId,
        Code::Rdtsc if mode.time() && copied => Way::ReadTime,
        Code::Cld if !mode.down() => Way::Nop,
        Code::Endbr32 | Code::Endbr64 => Way::Nop,
        // PREFETCHW of a register: AMD has #UD.
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D => {
            Way::Step
        }
        _ => return None,
    })
}

fn way(iced: &Instruction, mode: Mode, routes: &Routes) -> Way {
    if !routes.supports(iced.code()) || mode.is_narrow() && !narrow::has(iced, mode) {
        return Way::Step;
    }
    match of_both(iced, mode, routes) {
        Some(way) => way,
        None if mode.is_narrow() => narrow::way(iced, mode, routes),
        None => wide(iced, mode, routes),
    }
}

/// How an instruction of 64-bit code is lowered.
fn wide(iced: &Instruction, mode: Mode, routes: &Routes) -> Way {
    let code = iced.code();
    let kernel = !mode.user();
    match code {
        Code::Verw_rm16 | Code::Verw_r32m16 | Code::Verw_r64m16
            if kernel && !mode.is_counted() && iced.op0_kind() == OpKind::Memory =>
        {
            return Way::VerifyWrite;
        }
        Code::Pushfq => return Way::PushFlags,
        Code::Popfq => return Way::PopFlags,
        Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32 => return Way::Push,
        Code::Push_rm64 if iced.op0_kind() == OpKind::Memory => return Way::PushMemory,
        Code::Pop_r64 => return Way::Pop,
        Code::Leaveq => return Way::Leave,
        Code::Mov_r64_cr if kernel && iced.op1_register() == Register::CR8 && !iced.has_lock_prefix() => {
            return Way::ReadPriority;
        }
        Code::Mov_cr_r64 if kernel && iced.op0_register() == Register::CR8 && !iced.has_lock_prefix() => {
            return Way::WritePriority;
        }
        Code::Swapgs if kernel => return Way::SwapGs,
        Code::Syscall if !mode.is_counted() => return Way::Syscall,
        _ if !kernel || mode.is_counted() || mode.vectors() != 0 => {}
        Code::Sysretq => return Way::Sysret,
        // The processor's own loads of descriptors know no RFLAGS.AC.
        Code::Iretq if mode.alignment() != Some(true) => return Way::Iret,
        Code::Invlpg_m => return Way::Invalidate,
        Code::Xsave64_mem | Code::Xrstor64_mem if !mode.down() => return Way::Image,
        _ if matches!(iced.mnemonic(), Mnemonic::In | Mnemonic::Out) => return Way::Port,
        _ => {}
    }
    let near = |w| if iced.op0_kind() == OpKind::NearBranch64 { w } else { Way::Step };
    match routes.base(code) {
        Route::Conditional => near(Way::Conditional),
        Route::Counted => near(Way::Counted),
        Route::Jump => near(Way::Jump),
        Route::Call => near(Way::Call),
        Route::JumpIndirect if code == Code::Jmp_rm64 => Way::JumpIndirect,
        Route::CallIndirect if code == Code::Call_rm64 && iced.op0_register() != Register::RSP => Way::CallIndirect,
        Route::Return => Way::Return(if iced.op_count() == 0 { 0 } else { iced.immediate16() }),
        Route::Copy => copied(iced, facts(code).class, mode),
        _ => Way::Step,
    }
}

/// MOVS, STOS and LODS upwards, with 64-bit addresses.
fn string(iced: &Instruction, mode: Mode) -> Way {
    let wide = (0..iced.op_count()).any(|i| matches!(iced.op_kind(i), OpKind::MemorySegRSI | OpKind::MemoryESRDI));
    let based = matches!(iced.memory_segment(), Register::FS | Register::GS);
    if mode.down() || !wide || based || iced.has_repne_prefix() {
        return Way::Step;
    }
    let len = iced.memory_size().size() as u8;
    match (iced.mnemonic(), iced.has_rep_prefix()) {
        (Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq, false) => Way::Stos(len),
        (Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq, true) => Way::RepStos(len),
        (Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq, false) => Way::Lods(len),
        (Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq, false) => Way::Movs(len),
        (Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq, true) => Way::RepMovs(len),
        _ => Way::Step,
    }
}

pub(super) fn copied(iced: &Instruction, class: Class, mode: Mode) -> Way {
    match copied_awake(iced, class, mode) {
        // The interpreter does these in any case: the kernel need not have the vector registers for it.
        Way::Memory if state_image(iced.mnemonic()).is_some() => Way::Step,
        Way::Plain | Way::Memory if class == Class::Native && !native(iced, mode) => Way::Asleep,
        way => way,
    }
}

/// As [`copied`] where x87 and SIMD instructions may run.
fn copied_awake(iced: &Instruction, class: Class, mode: Mode) -> Way {
    if class == Class::String {
        return string(iced, mode);
    }
    if iced.is_stack_instruction() || facts(iced.code()).sensitivity != Sensitivity::Innocuous {
        return Way::Step;
    }
    let memory = (0..iced.op_count()).any(|i| iced.op_kind(i) == OpKind::Memory);
    match iced.mnemonic() {
        Mnemonic::Rdfsbase
        | Mnemonic::Wrfsbase
        | Mnemonic::Rdtsc
        | Mnemonic::Rdtscp
        | Mnemonic::Std
        | Mnemonic::Cld => {
            return Way::Step;
        }
        Mnemonic::Lea if iced.is_ip_rel_memory_operand() => {
            return match iced.code() {
                Code::Lea_r64_m => Way::Constant(iced.ip_rel_memory_address()),
                Code::Lea_r32_m => Way::Constant(iced.ip_rel_memory_address() & 0xffff_ffff),
                _ => Way::Step,
            };
        }
        Mnemonic::Lea => return Way::Plain,
        // No access, but an operand.
        Mnemonic::Nop
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetchw
            if memory =>
        {
            return Way::Nop;
        }
        _ => {}
    }
    let implicit = (0..iced.op_count()).any(|i| {
        matches!(
            iced.op_kind(i),
            OpKind::MemorySegSI
                | OpKind::MemorySegESI
                | OpKind::MemorySegRSI
                | OpKind::MemorySegDI
                | OpKind::MemorySegEDI
                | OpKind::MemorySegRDI
                | OpKind::MemoryESDI
                | OpKind::MemoryESEDI
                | OpKind::MemoryESRDI
        )
    });
    if implicit || memory && is_x87(iced) {
        return Way::Step;
    }
    if memory { Way::Memory } else { Way::Plain }
}
