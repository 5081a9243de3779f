//! Memory operands in the checked model: each access asks an inline TLB that holds only pages of guest RAM the guest may touch so.
//!
//! A hit gives a host address for the instruction, which then runs as it is; everything else (another page, two pages, memory-mapped
//! I/O, code pages, a fault) leaves to [`crate::tlb`], which fills the entry or lets the interpreter do the instruction. Guest
//! addresses are never used as host addresses.
//!
//! Three registers the instruction does not use are borrowed. The status flags are kept aside at every access: the comparison changes
//! them, and a fault must show them as they were.

// dynasm's dynamic registers convert a u8 to itself.
#![allow(clippy::useless_conversion)]

use crate::block::Item;
use crate::emit::{gs, slot};
use crate::lower::memory::load_constant;
use crate::lower::{Leave, Lowering};
use crate::marks::{Borrowed, What};
use crate::tlb::{self, INDEX_MASK, INDEX_SHIFT};
use bivisor_emulator::isa::Gpr;
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Code, Encoder, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register};

/// What an access is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    /// Bytes.
    pub len: u32,
    /// A store, or a load and a store.
    pub write: bool,
}

/// The explicit access of an instruction; `None` if it has none, or one that is not done here.
pub(crate) fn access(iced: &Instruction) -> Option<Access> {
    let len = iced.memory_size().size() as u32;
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(iced);
    let [only] = info.used_memory() else { return None };
    let explicit = (0..iced.op_count()).any(|i| iced.op_kind(i) == OpKind::Memory);
    let plain = !iced.is_vsib() && !iced.has_op_mask() && !iced.is_stack_instruction();
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
    (explicit && plain && !moffs && matches!(len, 1 | 2 | 4 | 8 | 16 | 32 | 64)).then_some(Access { len, write })
}

/// Registers that hold the host address and two temporaries, none of which `used` names.
pub(crate) struct Scratch {
    pub address: Gpr,
    pub a: Gpr,
    pub b: Gpr,
}

/// Registers an instruction names, read or written.
pub(crate) fn used(iced: &Instruction) -> impl Fn(Gpr) -> bool + use<> {
    let mut factory = InstructionInfoFactory::new();
    let mut mask = 0u32;
    for u in factory.info(iced).used_registers() {
        if let Some(r) = Gpr::from_iced(u.register()) {
            mask |= 1 << r as u32;
        }
    }
    move |r| mask & 1 << r as u32 != 0
}

impl Scratch {
    /// RAX is kept for the flags; RSP is the guest's. The address is in a register that AH to BH can be encoded with.
    pub fn choose(used: impl Fn(Gpr) -> bool) -> Option<Scratch> {
        let free = |r: &Gpr| !used(*r);
        let address = [Gpr::Rcx, Gpr::Rdx, Gpr::Rbx, Gpr::Rsi, Gpr::Rdi].into_iter().find(free)?;
        let mut others = [Gpr::R8, Gpr::R9, Gpr::R10, Gpr::R11, Gpr::Rcx, Gpr::Rdx, Gpr::Rbx, Gpr::Rsi, Gpr::Rdi]
            .into_iter()
            .filter(|r| free(r) && *r != address);
        Some(Scratch { address, a: others.next()?, b: others.next()? })
    }
}

/// The linear address of the operand into `s.address`. Flags stay. False if it cannot be encoded.
fn linear(l: &mut Lowering<'_>, item: &Item, s: &Scratch) -> bool {
    let (to, a) = (s.address as u8, s.a as u8);
    if item.iced.is_ip_rel_memory_operand() {
        load_constant(l, s.address, item.iced.ip_rel_memory_address());
    } else {
        let mut lea = Instruction::new();
        lea.set_code(Code::Lea_r64_m);
        lea.set_op0_kind(OpKind::Register);
        lea.set_op0_register(s.address.to_iced());
        lea.set_op1_kind(OpKind::Memory);
        let from = &item.iced;
        lea.set_memory_base(from.memory_base());
        lea.set_memory_index(from.memory_index());
        lea.set_memory_index_scale(from.memory_index_scale());
        lea.set_memory_displacement64(from.memory_displacement64());
        lea.set_memory_displ_size(from.memory_displ_size());
        let mut encoder = Encoder::new(64);
        if encoder.encode(&lea, 0).is_err() {
            return false;
        }
        l.e.bytes.extend_from_slice(&encoder.take_buffer());
    }
    match item.iced.memory_segment() {
        Register::FS => dynasm!(l.e; .arch x64; rdfsbase Rq(a); lea Rq(to), [Rq(to) + Rq(a)]),
        Register::GS => return false,
        _ => {}
    }
    true
}

/// Borrows registers, leaves the host address of the access in `s.address` and the others and the flags as they were; the caller's
/// instruction comes next, then [`give_back`]. `address` computes the linear address into `s.address` without touching flags.
pub(crate) fn probe(
    l: &mut Lowering<'_>,
    item: &Item,
    s: &Scratch,
    access: Access,
    address: impl FnOnce(&mut Lowering<'_>, &Scratch) -> bool,
) -> bool {
    let (to, a, b) = (s.address as u8, s.a as u8, s.b as u8);
    let [s0, s1, s2, s3] = [slot::S0, slot::S1, slot::S2, slot::S3].map(gs);
    let (status, table) = (gs(slot::STATUS), gs(slot::TLB));
    let regs = [s.address, s.a, s.b];
    let undo = |rax, flags| undo(item, regs, rax, flags);
    l.mark(What::At(item.at));
    dynasm!(l.e
        ; .arch x64
        ; gs mov [s0], Rq(to)
        ; gs mov [s1], Rq(a)
        ; gs mov [s2], Rq(b)
    );
    dynasm!(l.e; .arch x64; gs mov [s3], rax);
    l.mark(undo(true, false));
    dynasm!(l.e; .arch x64; lahf; seto al; gs mov [status], rax; gs mov rax, [s3]);
    l.mark(undo(false, true));
    if !address(l, s) {
        return false;
    }
    let last = access.len as i32 - 1;
    let tag = if access.write { tlb::WRITE } else { tlb::READ };
    let (shift, mask, addend) = (INDEX_SHIFT, INDEX_MASK, tlb::ADDEND);
    dynasm!(l.e
        ; .arch x64
        ; mov Rq(b), Rq(to)
        ; shr Rq(b), shift
        ; and Rd(b), mask
        ; gs add Rq(b), [table]
        ; lea Rq(a), [Rq(to) + last]
        ; and Rq(a), -4096
        ; cmp Rq(a), [Rq(b) + tag]
        ; .u8 0x0f
        ; .u8 0x85
    );
    let site = l.e.len();
    l.e.push_u32(0);
    l.misses.push(Miss { site, item: *item, access, regs: [s.address, s.a, s.b] });
    dynasm!(l.e; .arch x64; add Rq(to), [Rq(b) + addend]);
    restore_flags(l, &undo);
    dynasm!(l.e; .arch x64; gs mov Rq(a), [s1]; gs mov Rq(b), [s2]);
    l.mark(What::Borrowed(Borrowed { at: item.at, regs: [Some(s.address), None, None, None], flags: false }));
    true
}

/// Restores the address register after the instruction.
pub(crate) fn give_back(l: &mut Lowering<'_>, item: &Item, s: &Scratch) {
    let to = s.address as u8;
    let s0 = gs(slot::S0);
    let after = item.at + u16::from(item.len);
    l.mark(What::Borrowed(Borrowed { at: after, regs: [Some(s.address), None, None, None], flags: false }));
    dynasm!(l.e; .arch x64; gs mov Rq(to), [s0]);
}

/// A probe that missed: its way out, emitted after the block.
pub(crate) struct Miss {
    site: usize,
    item: Item,
    access: Access,
    regs: [Gpr; 3],
}

/// What undoes a probe: the borrowed registers are in S0 to S2, RAX perhaps in S3, the flags perhaps in the status slot.
fn undo(item: &Item, regs: [Gpr; 3], rax: bool, flags: bool) -> What {
    let [to, a, b] = regs.map(Some);
    What::Borrowed(Borrowed { at: item.at, regs: [to, a, b, rax.then_some(Gpr::Rax)], flags })
}

/// The guest's status flags from their slot.
fn restore_flags(l: &mut Lowering<'_>, undo: &dyn Fn(bool, bool) -> What) {
    let (status, s3) = (gs(slot::STATUS), gs(slot::S3));
    l.mark(undo(true, true));
    dynasm!(l.e; .arch x64; gs mov rax, [status]; add al, 0x7f; sahf; gs mov rax, [s3]);
    l.mark(undo(false, false));
}

/// The ways out of all probes.
pub(crate) fn emit_misses(l: &mut Lowering<'_>) {
    let [s0, s1, s2] = [slot::S0, slot::S1, slot::S2].map(gs);
    let (address, kind) = (gs(slot::MISS_ADDRESS), gs(slot::MISS_KIND));
    for m in std::mem::take(&mut l.misses) {
        let here = l.e.here();
        l.e.set_rel32(m.site, here);
        let undo = |rax, flags| undo(&m.item, m.regs, rax, flags);
        l.mark(undo(false, true));
        let [to, a, b] = m.regs.map(|r| r as u8);
        let what = tlb::kind(m.access.len, m.access.write) as i32;
        dynasm!(l.e
            ; .arch x64
            ; gs mov [address], Rq(to)
            ; gs mov DWORD [kind], what
        );
        restore_flags(l, &undo);
        dynasm!(l.e; .arch x64; gs mov Rq(to), [s0]; gs mov Rq(a), [s1]; gs mov Rq(b), [s2]);
        let rip = l.block.rip(&m.item);
        l.leave(Leave::Step(rip));
    }
}

/// An instruction with one explicit memory operand. False if there is no way; the code so far is then the caller's to cut off.
pub(crate) fn rewrite(l: &mut Lowering<'_>, item: &Item) -> bool {
    let Some(access) = access(&item.iced) else { return false };
    let Some(s) = Scratch::choose(used(&item.iced)) else { return false };
    let mut iced = item.iced;
    iced.set_memory_base(s.address.to_iced());
    iced.set_memory_index(Register::None);
    iced.set_memory_displacement64(0);
    iced.set_memory_displ_size(0);
    iced.set_segment_prefix(Register::None);
    let mut encoder = Encoder::new(64);
    if encoder.encode(&iced, 0).is_err() {
        return false;
    }
    let bytes = encoder.take_buffer();
    if !probe(l, item, &s, access, |l, s| linear(l, item, s)) {
        return false;
    }
    l.e.bytes.extend_from_slice(&bytes);
    give_back(l, item, &s);
    true
}
