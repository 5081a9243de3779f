//! The way into the code cache and out of it: all of the guest's registers, its vector state, its FS base.
//!
//! Vector and x87 state goes through XRSTOR and XSAVE with the image of `CpuState`: components in their initial configuration
//! stay so (SDM 1 13.8, XINUSE). Loading upper halves that the guest does not use would make its SSE code slower. The common case, x87
//! and the upper halves of YMM0-15 and ZMM0-15 not in use, is done with plain loads and stores.
//!
//! The kick flag is looked at between two labels the signal handler knows: a kick that comes after the look and before the guest's
//! first instruction sends the thread to the `abort` label.
#![allow(unsafe_code)]

use crate::emit::{gs, slot};
use crate::lower::{ADDRESS_BITS, exit_said};
use crate::marks::homed;
use crate::registers::{load_registers, store_others};
use bivisor_emulator::cpu::CpuState;
use bivisor_emulator::cpu::xsave::{Layout, component};
use bivisor_emulator::host::thread::ThreadBlock;
use bivisor_emulator::isa::host_cpu::cpuid;
use bivisor_emulator::isa::{Gpr, Seg};
use std::arch::global_asm;
use std::mem::offset_of;
use std::ops::Range;
use std::sync::OnceLock;

/// Left because the target of an indirect branch was not found; it is in [`slot::TARGET`].
pub const MISS: u32 = 0xffff_ff00;
/// A signal found the guest in the cache: registers are in `CpuState` as they were, the host PC in [`slot::PC`].
pub const CAPTURED: u32 = 0xffff_ff01;
/// Not entered: a kick came first.
pub const ABORTED: u32 = 0xffff_ff02;

const AVX: u64 = 1;
const AVX512: u64 = 4;
const XGETBV1: u64 = 8;
/// Components that are saved and restored by XSAVE and XRSTOR if they are in use.
const NOT_BY_HAND: u64 = component::X87 | component::AVX | component::ZMM_HI256;
const RAX: usize = gpr(Gpr::Rax);

const fn gpr(r: Gpr) -> usize {
    offset_of!(CpuState, gpr) + 8 * r as usize
}

const FS_BASE: usize = offset_of!(CpuState, seg)
    + size_of::<bivisor_emulator::cpu::Segment>() * Seg::Fs as usize
    + offset_of!(bivisor_emulator::cpu::Segment, base);

global_asm!(
    ".globl bivisor_bt_enter, bivisor_bt_enter_from, bivisor_bt_enter_to, bivisor_bt_leave, bivisor_bt_leave_captured, bivisor_bt_abort",
    ".hidden bivisor_bt_enter, bivisor_bt_enter_from, bivisor_bt_enter_to, bivisor_bt_leave, bivisor_bt_leave_captured, bivisor_bt_abort",
    ".p2align 4",
    // fn(rdi = entry) -> eax = exit
    "bivisor_bt_enter:",
    "push rbx; push rbp; push r12; push r13; push r14; push r15",
    "mov gs:[{host_rsp}], rsp",
    "mov gs:[{entry}], rdi",
    "bivisor_bt_enter_from:",
    "mov rax, gs:[{kick}]",
    "cmp byte ptr [rax], 0",
    "jne bivisor_bt_abort",
    "mov rbx, gs:[{cpu}]",
    // Vector state by hand where that is enough: XRSTOR takes 100 ns on Zen 4, this 20.
    "mov r8, [rbx + {xstate_bv}]",
    "mov r9d, dword ptr gs:[{host_flags}]",
    "test r9d, {xgetbv1}",
    "jz 4f",
    "mov eax, r8d",
    "and eax, {by_hand}",
    "cmp eax, {sse}",
    "jne 4f",
    "mov ecx, 1",
    "xgetbv",
    // Somebody, such as a thunk of the interpreter, has left x87 registers in use.
    "test al, {x87}",
    "jnz 4f",
    "vzeroupper",
    "ldmxcsr [rbx + {mxcsr_image}]",
    ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movaps xmm\\i, [rbx + {xmm} + 16*\\i]",
    ".endr",
    "test r9d, {avx512}",
    "jz 5f",
    "mov rdx, gs:[{opmask_at}]",
    "test r8d, {opmask}",
    "jz 2f",
    ".irp i,0,1,2,3,4,5,6,7",
    "kmovq k\\i, [rbx + rdx + {xsave} + 8*\\i]",
    ".endr",
    "jmp 3f",
    "2:",
    ".irp i,0,1,2,3,4,5,6,7",
    "kxorq k\\i, k\\i, k\\i",
    ".endr",
    "3:",
    "mov rdx, gs:[{hi16_at}]",
    "test r8d, {hi16}",
    "jz 3f",
    ".irp i,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovups zmm\\i, [rbx + rdx + {xsave} + 64*\\i - 1024]",
    ".endr",
    "jmp 5f",
    "3:",
    ".irp i,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vpxord zmm\\i, zmm\\i, zmm\\i",
    ".endr",
    "jmp 5f",
    "4:",
    "mov eax, dword ptr gs:[{components}]",
    "mov edx, dword ptr gs:[{components} + 4]",
    "xrstor64 [rbx + {xsave}]",
    "5:",
    "push qword ptr [rbx + {rflags}]",
    "mov rax, [rbx + {fs_base}]",
    "wrfsbase rax",
    "popfq",
    load_registers!(),
    "jmp qword ptr gs:[{entry}]",
    "bivisor_bt_enter_to:",
    // From the cache: all registers are the guest's, the exit number is in its slot.
    ".p2align 4",
    "bivisor_bt_leave:",
    "mov gs:[{rbx}], rbx",
    "mov rbx, gs:[{cpu}]",
    "mov [rbx + {rax}], rax",
    store_others!(),
    "mov rsp, gs:[{host_rsp}]",
    "pushfq",
    "pop rcx",
    "mov [rbx + {rflags}], rcx",
    "cld",
    // AC would make misaligned accesses of Rust code fault.
    "test ecx, 0x40000",
    "jz 2f",
    "push 2",
    "popfq",
    "2:",
    "mov r9d, dword ptr gs:[{host_flags}]",
    "test r9d, {xgetbv1}",
    "jz 2f",
    "mov ecx, 1",
    "xgetbv",
    "test al, {not_by_hand}",
    "jnz 2f",
    "and eax, dword ptr gs:[{components}]",
    "mov [rbx + {xstate_bv}], rax",
    "stmxcsr [rbx + {mxcsr_image}]",
    ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movaps [rbx + {xmm} + 16*\\i], xmm\\i",
    ".endr",
    "test al, {opmask}",
    "jz 3f",
    "mov rdx, gs:[{opmask_at}]",
    ".irp i,0,1,2,3,4,5,6,7",
    "kmovq [rbx + rdx + {xsave} + 8*\\i], k\\i",
    ".endr",
    "3:",
    "test al, {hi16}",
    "jz 4f",
    "mov rdx, gs:[{hi16_at}]",
    ".irp i,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovups [rbx + rdx + {xsave} + 64*\\i - 1024], zmm\\i",
    ".endr",
    "jmp 4f",
    "2:",
    "mov eax, dword ptr gs:[{components}]",
    "mov edx, dword ptr gs:[{components} + 4]",
    // Not XSAVEOPT: docs/fidelity.md, what was found in the host.
    "xsave64 [rbx + {xsave}]",
    "4:",
    // From the signal handler, which has put all registers into the state.
    "bivisor_bt_leave_captured:",
    "mov rbx, gs:[{cpu}]",
    "rdfsbase rax",
    "mov [rbx + {fs_base}], rax",
    "mov rax, gs:[{exit}]",
    "5:",
    "mov rdx, gs:[8]",
    "wrfsbase rdx",
    "test byte ptr gs:[{host_flags}], {avx}",
    "jz 6f",
    "vzeroupper",
    "6:",
    "ldmxcsr gs:[{mxcsr}]",
    "pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
    "ret",
    // RSP is the host's as after the pushes of enter.
    "bivisor_bt_abort:",
    "mov eax, {aborted}",
    "jmp 5b",
    host_rsp = const gs(slot::HOST_RSP),
    entry = const gs(slot::ENTRY),
    kick = const gs(slot::KICK),
    cpu = const gs(slot::CPU),
    rbx = const gs(slot::RBX),
    exit = const gs(slot::EXIT),
    components = const gs(slot::COMPONENTS),
    host_flags = const gs(slot::HOST_FLAGS),
    mxcsr = const gs(slot::MXCSR),
    rax = const RAX,
    rflags = const offset_of!(CpuState, rflags),
    fs_base = const FS_BASE,
    xsave = const offset_of!(CpuState, xsave),
    xstate_bv = const offset_of!(CpuState, xsave) + Layout::HEADER,
    mxcsr_image = const offset_of!(CpuState, xsave) + 24,
    xmm = const offset_of!(CpuState, xsave) + Layout::XMM,
    opmask_at = const gs(slot::OPMASK_AT),
    hi16_at = const gs(slot::HI16_AT),
    x87 = const component::X87,
    sse = const component::SSE,
    opmask = const component::OPMASK,
    hi16 = const component::HI16_ZMM,
    by_hand = const NOT_BY_HAND | component::SSE,
    not_by_hand = const NOT_BY_HAND,
    avx = const AVX,
    avx512 = const AVX512,
    xgetbv1 = const XGETBV1,
    aborted = const ABORTED,
);

unsafe extern "sysv64" {
    fn bivisor_bt_enter(entry: u64) -> u64;
    safe static bivisor_bt_enter_from: u8;
    safe static bivisor_bt_enter_to: u8;
    safe static bivisor_bt_leave: u8;
    safe static bivisor_bt_leave_captured: u8;
    safe static bivisor_bt_abort: u8;
}

/// The host addresses from which on a kick must not let the thread go in.
pub fn entering() -> Range<u64> {
    (&raw const bivisor_bt_enter_from) as u64..(&raw const bivisor_bt_enter_to) as u64
}

/// Where generated code goes to leave.
pub fn leave() -> u64 {
    (&raw const bivisor_bt_leave) as u64
}

/// Where the signal handler sends a thread whose registers it has saved; RSP is [`slot::HOST_RSP`].
pub fn leave_captured() -> u64 {
    (&raw const bivisor_bt_leave_captured) as u64
}

/// Where the signal handler sends a thread that was about to go in; RSP is [`slot::HOST_RSP`].
pub fn abort() -> u64 {
    (&raw const bivisor_bt_abort) as u64
}

/// Fills the slots that do not change from run to run.
pub fn prepare(block: &ThreadBlock) {
    static FLAGS: OnceLock<u64> = OnceLock::new();
    let layout = Layout::host();
    let flags = FLAGS.get_or_init(|| {
        let mut flags = 0;
        if std::is_x86_feature_detected!("avx") {
            flags |= AVX;
        }
        if layout.components & component::AVX512 == component::AVX512 && std::is_x86_feature_detected!("avx512bw") {
            flags |= AVX512;
        }
        // CPUID 0xD, 1: EAX bit 2 is XGETBV with ECX = 1. With registers beyond YMM that we do not know how to move there is only XSAVE.
        let known = layout.components & component::AVX512 == 0 || flags & AVX512 != 0;
        if flags & AVX != 0 && known && cpuid(0xd, 1)[0] & 4 != 0 {
            flags |= XGETBV1;
        }
        flags
    });
    block.scratch[slot::HOST_FLAGS].set(*flags);
    block.scratch[slot::COMPONENTS].set(layout.components);
    block.scratch[slot::OPMASK_AT].set(layout.opmask as u64);
    block.scratch[slot::HI16_AT].set(layout.hi16_zmm as u64);
    block.scratch[slot::MXCSR].set(0x1f80);
    block.scratch[slot::ADDRESS_BITS].set(ADDRESS_BITS);
    block.scratch[slot::LEAVE].set(leave());
}

/// Runs translated code from host address `entry` until it leaves; gives the exit.
///
/// The caller has filled in the slots of `block`, which is the calling thread's, and has told the cache that this thread is in; `entry`
/// is the start of live code of that cache. `cpu` is what [`slot::CPU`] names; its FS base is canonical and its MXCSR valid.
pub fn run(block: &ThreadBlock, cpu: &mut CpuState, entry: u64) -> u32 {
    debug_assert_eq!(block.scratch[slot::CPU].get(), std::ptr::from_mut(cpu) as u64);
    // Some code expects them in the registers, some in the slots.
    for &(r, slot) in homed() {
        block.scratch[slot].set(cpu.gpr[r as usize]);
    }
    let bv = cpu.xsave.xstate_bv() & Layout::host().components;
    cpu.xsave.set_xstate_bv(bv);
    // SAFETY: as the caller says; XRSTOR finds a valid image; the routine keeps the calling convention and touches only `cpu`, the
    // slots and, as the guest, what a flat guest may.
    let said = unsafe { bivisor_bt_enter(entry) };
    match said as u32 {
        special @ (MISS | CAPTURED | ABORTED) => special,
        _ => exit_said(said),
    }
}
