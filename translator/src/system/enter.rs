//! The way into system-mode code and out of it: the general registers always, vector registers only as far as Rust code could change
//! them.
//!
//! Where the guest has nothing above XMM in use ([`at::UPPER`]) the sixteen XMM registers go to the area and the x87 state stays where it
//! is. Where it has, but the upper parts of the first sixteen registers are 0, as string functions that use ZMM16 and above leave them,
//! those and the opmask registers go there too ([`at::IS_WIDE`]): XSAVE and XRSTOR take four times as long. Otherwise, and whenever
//! somebody wants the XSAVE image of `CpuState` ([`sync`]), everything goes there. What Rust code leaves in
//! the upper parts is not seen: VEX and EVEX instructions run only in modes that were entered with the image.
//!
//! FS base is the distance of the usual slots of the mirror meanwhile ([`at::DISTANCE`]), if there is one; Rust has its own back on all
//! ways out, and in the signal handler.
//!
//! Code of a mode without vector instructions ([`at::ASLEEP`]) is entered and left without any of that: kernels hardly ever use them.
#![allow(unsafe_code)]

use crate::registers::{load_registers, store_others};
use crate::system::area::{Area, at, gs};
use bivisor_emulator::cpu::CpuState;
use bivisor_emulator::cpu::xsave::{Layout, component};
use bivisor_emulator::host::thread::ThreadBlock;
use bivisor_emulator::isa::Gpr;
use std::arch::global_asm;
use std::ffi::c_void;
use std::mem::offset_of;

/// Left because the host raised an exception; its address is in the thread block.
pub const FAULT: u32 = 0xffff_ff01;

/// Not entered: a kick came first. The state is as it was.
pub const ABORTED: u32 = 0xffff_ff02;

/// An indirect branch was done, to what [`at::TARGET`] leads to, and a kick wants the code to be left.
pub const KICKED: u32 = 0xffff_ff03;

const AVX: u64 = 1;
/// AVX-512 with byte and word instructions.
const WIDE: u64 = 2;
const RAX: usize = offset_of!(CpuState, gpr) + 8 * Gpr::Rax as usize;

/// Gives Rust its FS base back; changes RAX and EFLAGS.
macro_rules! host_fs {
    () => {
        concat!(
            "cmp dword ptr gs:[{own_fs}], 0\n",
            "je 30f\n",
            "cmp qword ptr gs:[{distance}], 0\n",
            "je 30f\n",
            "mov rax, gs:[{host_fs}]\n",
            "wrfsbase rax\n",
            "30:\n",
        )
    };
}

/// FS base for translated code; changes RAX and EFLAGS.
macro_rules! code_fs {
    () => {
        concat!(
            "cmp dword ptr gs:[{own_fs}], 0\n",
            "je 31f\n",
            "mov rax, gs:[{distance}]\n",
            "test rax, rax\n",
            "je 31f\n",
            "wrfsbase rax\n",
            "31:\n"
        )
    };
}

/// Notes what a call of Rust may change.
macro_rules! store_callers {
    () => {
        concat!(
            "mov gs:[{caller}], rax\n",
            "mov gs:[{caller} + 8], rcx\n",
            "mov gs:[{caller} + 16], rdx\n",
            "mov gs:[{caller} + 48], rsi\n",
            "mov gs:[{caller} + 56], rdi\n",
            "mov gs:[{caller} + 64], r8\n",
            "mov gs:[{caller} + 72], r9\n",
            "mov gs:[{caller} + 80], r10\n",
            "mov gs:[{caller} + 88], r11\n",
        )
    };
}

/// Loads it.
macro_rules! load_callers {
    () => {
        concat!(
            "mov rax, gs:[{caller}]\n",
            "mov rcx, gs:[{caller} + 8]\n",
            "mov rdx, gs:[{caller} + 16]\n",
            "mov rsi, gs:[{caller} + 48]\n",
            "mov rdi, gs:[{caller} + 56]\n",
            "mov r8, gs:[{caller} + 64]\n",
            "mov r9, gs:[{caller} + 72]\n",
            "mov r10, gs:[{caller} + 80]\n",
            "mov r11, gs:[{caller} + 88]\n",
        )
    };
}

pub(super) use {code_fs, load_callers, store_callers};

/// Loads the vector registers from the area, but not MXCSR.
macro_rules! load_vectors {
    () => {
        concat!(
            "cmp dword ptr gs:[{is_wide}], 0\n",
            "je 30f\n",
            "vzeroupper\n",
            ".irp i,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n",
            "vmovups zmm\\i, gs:[{high} + 64*(\\i - 16)]\n",
            ".endr\n",
            ".irp i,0,1,2,3,4,5,6,7\n",
            "kmovq k\\i, gs:[{masks} + 8*\\i]\n",
            ".endr\n",
            "30:\n",
            ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n",
            "movups xmm\\i, gs:[{xmm} + 16*\\i]\n",
            ".endr\n",
        )
    };
}

global_asm!(
    ".globl bivisor_system_enter, bivisor_system_from, bivisor_system_to, bivisor_system_abort, bivisor_system_leave, bivisor_system_leave_light, bivisor_system_sync, bivisor_system_settle, bivisor_system_port, bivisor_system_called, bivisor_system_returned, bivisor_system_give_up, bivisor_system_wake",
    ".hidden bivisor_system_enter, bivisor_system_from, bivisor_system_to, bivisor_system_abort, bivisor_system_leave, bivisor_system_leave_light, bivisor_system_sync, bivisor_system_settle, bivisor_system_port, bivisor_system_called, bivisor_system_returned, bivisor_system_give_up, bivisor_system_wake",
    ".p2align 4",
    // fn(rdi = entry, rsi = what to call for devices) -> eax = exit
    "bivisor_system_enter:",
    "push rbx; push rbp; push r12; push r13; push r14; push r15",
    "mov gs:[{host_rsp}], rsp",
    "mov gs:[{entry}], rdi",
    "mov gs:[{call}], rsi",
    // A kick that comes from here on sends the thread to the abort label.
    "bivisor_system_from:",
    "cmp dword ptr gs:[{look}], 0",
    "jne bivisor_system_abort",
    code_fs!(),
    "mov rbx, gs:[{cpu}]",
    "cmp dword ptr gs:[{asleep}], 0",
    "jne 20f",
    "cmp dword ptr gs:[{vectors_at}], 0",
    "jne 1f",
    "mov eax, dword ptr gs:[{components}]",
    "mov edx, dword ptr gs:[{components} + 4]",
    "xrstor64 [rbx + {xsave}]",
    "jmp 2f",
    "1:",
    load_vectors!(),
    "cmp dword ptr gs:[{vectors_at}], 2",
    "je 2f",
    "ldmxcsr gs:[{guest_mxcsr}]",
    "2:",
    "mov rax, gs:[{status}]",
    "add al, 0x7f",
    "sahf",
    load_registers!(),
    "jmp qword ptr gs:[{entry}]",
    // Without the vector registers: MXCSR is Rust's.
    "20:",
    "cmp dword ptr gs:[{vectors_at}], 2",
    "jne 2b",
    "stmxcsr gs:[{guest_mxcsr}]",
    "ldmxcsr gs:[{host_mxcsr}]",
    "mov dword ptr gs:[{vectors_at}], 1",
    "jmp 2b",
    "bivisor_system_to:",
    "bivisor_system_abort:",
    "mov rsp, gs:[{host_rsp}]",
    host_fs!(),
    "mov dword ptr gs:[{exit}], {aborted}",
    "cmp dword ptr gs:[{vectors_at}], 2",
    "jne 7f",
    "stmxcsr gs:[{guest_mxcsr}]",
    "mov dword ptr gs:[{vectors_at}], 1",
    "jmp 7f",
    // From the cache, or from a signal handler: the exit number is in its slot.
    ".p2align 4",
    "bivisor_system_leave_light:",
    "mov dword ptr gs:[{light}], 1",
    "jmp 3f",
    ".p2align 4",
    "bivisor_system_leave:",
    "mov dword ptr gs:[{light}], 0",
    "3:",
    "mov gs:[{rbx}], rbx",
    "mov rbx, gs:[{cpu}]",
    "mov [rbx + {rax}], rax",
    "lahf",
    "seto al",
    "movzx eax, ax",
    "mov gs:[{exit_status}], rax",
    host_fs!(),
    store_others!(),
    "mov rsp, gs:[{host_rsp}]",
    "cmp dword ptr gs:[{asleep}], 0",
    "jne 8f",
    "cmp dword ptr gs:[{upper}], 0",
    "jne 4f",
    "mov dword ptr gs:[{is_wide}], 0",
    "10:",
    ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movups gs:[{xmm} + 16*\\i], xmm\\i",
    ".endr",
    "cmp dword ptr gs:[{light}], 0",
    "je 9f",
    "mov dword ptr gs:[{vectors_at}], 2",
    "jmp 8f",
    "9:",
    "stmxcsr gs:[{guest_mxcsr}]",
    "mov dword ptr gs:[{vectors_at}], 1",
    "jmp 7f",
    "4:",
    "test byte ptr gs:[{host_flags}], {wide}",
    "jz 6f",
    ".irp i,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovups gs:[{high} + 64*(\\i - 16)], zmm\\i",
    ".endr",
    ".irp i,0,1,2,3,4,5,6,7",
    "kmovq gs:[{masks} + 8*\\i], k\\i",
    ".endr",
    // Is anything above the XMM registers set?
    "vporq zmm16, zmm0, zmm1",
    "vpternlogq zmm16, zmm2, zmm3, 0xfe",
    "vpternlogq zmm16, zmm4, zmm5, 0xfe",
    "vpternlogq zmm16, zmm6, zmm7, 0xfe",
    "vpternlogq zmm16, zmm8, zmm9, 0xfe",
    "vpternlogq zmm16, zmm10, zmm11, 0xfe",
    "vpternlogq zmm16, zmm12, zmm13, 0xfe",
    "vpternlogq zmm16, zmm14, zmm15, 0xfe",
    "vptestmq k1, zmm16, zmm16",
    "kmovw eax, k1",
    "test eax, 0xfc",
    "jnz 5f",
    "vzeroupper",
    "mov dword ptr gs:[{is_wide}], 1",
    "jmp 10b",
    "5:",
    "vmovups zmm16, gs:[{high}]",
    "kmovq k1, gs:[{masks} + 8]",
    "6:",
    "mov eax, dword ptr gs:[{components}]",
    "mov edx, dword ptr gs:[{components} + 4]",
    // Not XSAVEOPT: docs/fidelity.md, what was found in the host.
    "xsave64 [rbx + {xsave}]",
    "mov dword ptr gs:[{vectors_at}], 0",
    "test byte ptr gs:[{host_flags}], {avx}",
    "jz 7f",
    "vzeroupper",
    "7:",
    "ldmxcsr gs:[{host_mxcsr}]",
    "8:",
    "mov eax, dword ptr gs:[{exit}]",
    "pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
    "ret",
    // From the cache: a device is called, without leaving if that is possible. Nothing is in EFLAGS.
    ".p2align 4",
    "bivisor_system_port:",
    "mov dword ptr gs:[{called}], 0",
    "cmp dword ptr gs:[{asleep}], 0",
    "je bivisor_system_leave",
    store_callers!(),
    "mov gs:[{caller} + 32], rsp",
    "mov rsp, gs:[{host_rsp}]",
    host_fs!(),
    "mov rdi, gs:[{call}]",
    "mov esi, dword ptr gs:[{exit}]",
    // Six registers and the return address are above.
    "sub rsp, 8",
    "call {device}",
    // A kick that comes from here on sends the thread to where it gives up.
    "bivisor_system_called:",
    "test rax, rax",
    "je bivisor_system_give_up",
    "cmp dword ptr gs:[{look}], 0",
    "jne bivisor_system_give_up",
    "mov gs:[{entry}], rax",
    code_fs!(),
    load_callers!(),
    "mov rsp, gs:[{caller} + 32]",
    "jmp qword ptr gs:[{entry}]",
    "bivisor_system_returned:",
    "bivisor_system_give_up:",
    "mov dword ptr gs:[{called}], 1",
    load_callers!(),
    "mov rsp, gs:[{caller} + 32]",
    "jmp bivisor_system_leave",
    // From the cache: the vector registers were left where they are and are wanted now. Goes on at the address in the slot for going in,
    // with all general registers as they were. Nothing is in EFLAGS.
    ".p2align 4",
    "bivisor_system_wake:",
    "mov gs:[{caller}], rax",
    "mov gs:[{caller} + 16], rdx",
    "mov gs:[{rbx}], rbx",
    "mov dword ptr gs:[{asleep}], 0",
    "mov dword ptr gs:[{own_fs}], 1",
    code_fs!(),
    "cmp dword ptr gs:[{vectors_at}], 0",
    "jne 11f",
    "mov rbx, gs:[{cpu}]",
    "mov eax, dword ptr gs:[{components}]",
    "mov edx, dword ptr gs:[{components} + 4]",
    "xrstor64 [rbx + {xsave}]",
    "jmp 12f",
    "11:",
    load_vectors!(),
    "cmp dword ptr gs:[{vectors_at}], 2",
    "je 12f",
    "ldmxcsr gs:[{guest_mxcsr}]",
    "12:",
    "mov rax, gs:[{caller}]",
    "mov rdx, gs:[{caller} + 16]",
    "mov rbx, gs:[{rbx}]",
    "jmp qword ptr gs:[{entry}]",
    // The XMM registers are Rust's: back to the guest's values for XSAVE. fn(rdi = image)
    ".p2align 4",
    "bivisor_system_sync:",
    load_vectors!(),
    "ldmxcsr gs:[{guest_mxcsr}]",
    "mov eax, 3",
    "xor edx, edx",
    "cmp dword ptr gs:[{is_wide}], 0",
    "je 13f",
    "mov eax, dword ptr gs:[{components}]",
    "mov edx, dword ptr gs:[{components} + 4]",
    "13:",
    "xsave64 [rdi]",
    "ldmxcsr gs:[{host_mxcsr}]",
    "mov dword ptr gs:[{vectors_at}], 0",
    "ret",
    // After the light way out: MXCSR as after the other. fn()
    ".p2align 4",
    "bivisor_system_settle:",
    "stmxcsr gs:[{guest_mxcsr}]",
    "ldmxcsr gs:[{host_mxcsr}]",
    "mov dword ptr gs:[{vectors_at}], 1",
    "ret",
    look = const crate::emit::gs(crate::emit::slot::LOOK),
    distance = const gs(at::DISTANCE),
    own_fs = const gs(at::OWN_FS),
    host_fs = const offset_of!(ThreadBlock, host_fs),
    aborted = const ABORTED,
    host_rsp = const gs(at::HOST_RSP),
    entry = const gs(at::ENTRY),
    cpu = const gs(at::CPU),
    vectors_at = const gs(at::VECTORS_AT),
    components = const gs(at::COMPONENTS),
    host_flags = const gs(at::HOST_FLAGS),
    xmm = const gs(at::VECTORS),
    guest_mxcsr = const gs(at::GUEST_MXCSR),
    host_mxcsr = const gs(at::HOST_MXCSR),
    light = const gs(at::LIGHT),
    status = const gs(at::STATUS),
    exit_status = const gs(at::EXIT_STATUS),
    exit = const gs(at::EXIT),
    rbx = const gs(at::RBX),
    rax = const RAX,
    xsave = const offset_of!(CpuState, xsave),
    caller = const gs(at::CALLER),
    call = const gs(at::CALL),
    called = const gs(at::CALLED),
    device = sym device,
    upper = const gs(at::UPPER),
    asleep = const gs(at::ASLEEP),
    is_wide = const gs(at::IS_WIDE),
    high = const gs(at::HIGH),
    masks = const gs(at::MASKS),
    avx = const AVX,
    wide = const WIDE,
);

unsafe extern "sysv64" {
    fn bivisor_system_enter(entry: u64, call: *mut c_void) -> u32;
    fn bivisor_system_sync(image: *mut u8);
    fn bivisor_system_settle();
    safe static bivisor_system_leave: u8;
    safe static bivisor_system_leave_light: u8;
    safe static bivisor_system_port: u8;
    safe static bivisor_system_wake: u8;
    safe static bivisor_system_called: u8;
    safe static bivisor_system_returned: u8;
    safe static bivisor_system_give_up: u8;
    safe static bivisor_system_from: u8;
    safe static bivisor_system_to: u8;
    safe static bivisor_system_abort: u8;
}

/// The host addresses at which a kick must not let the thread go in.
pub fn entering() -> std::ops::Range<u64> {
    (&raw const bivisor_system_from) as u64..(&raw const bivisor_system_to) as u64
}

/// The host addresses at which a kick must not let the thread go back in after the call of a device.
pub fn returning() -> std::ops::Range<u64> {
    (&raw const bivisor_system_called) as u64..(&raw const bivisor_system_returned) as u64
}

/// Where the signal handler sends a thread that was about to go back.
pub fn give_up() -> u64 {
    (&raw const bivisor_system_give_up) as u64
}

/// Where generated code goes to have a device called.
pub fn port() -> u64 {
    (&raw const bivisor_system_port) as u64
}

/// Where generated code goes to have the vector registers: see [`at::ASLEEP`].
pub fn wake() -> u64 {
    (&raw const bivisor_system_wake) as u64
}

/// What calls a device: takes an exit, gives the host address to go on at, or 0.
pub type Device<'a> = &'a mut dyn FnMut(u32) -> u64;

unsafe extern "sysv64" fn device(call: *mut c_void, exit: u32) -> u64 {
    // SAFETY: `run` has made it from one, which nobody else uses while the code runs.
    let call = unsafe { &mut *call.cast::<Device<'_>>() };
    call(exit)
}

/// Where the signal handler sends a thread that was about to go in.
pub fn abort() -> u64 {
    (&raw const bivisor_system_abort) as u64
}

/// Where generated code goes to leave.
pub fn leave() -> u64 {
    (&raw const bivisor_system_leave) as u64
}

/// As [`leave`], for code that looks at no vector register and computes with no floating-point number before it goes in again: MXCSR
/// stays as it is, because to store and to load it is dear.
pub fn leave_light() -> u64 {
    (&raw const bivisor_system_leave_light) as u64
}

/// After [`leave_light`], if something else is to come than going in again.
pub fn settle(area: &Area) {
    if area.get(at::VECTORS_AT) == 2 {
        // SAFETY: the routine clobbers nothing but MXCSR and the area, which is mapped behind this thread's block.
        unsafe { bivisor_system_settle() };
    }
}

/// Fills the slots that do not change from run to run.
pub fn prepare(area: &Area) {
    let mut flags = 0;
    if std::is_x86_feature_detected!("avx") {
        flags |= AVX;
    }
    if std::is_x86_feature_detected!("avx512bw") && Layout::host().components & component::AVX512 != 0 {
        flags |= WIDE;
    }
    area.set(at::HOST_FLAGS, flags);
    area.set(at::IS_WIDE, 0);
    area.set(at::COMPONENTS, Layout::host().components);
    area.set(at::HOST_MXCSR, 0x1f80);
    area.set(at::VECTORS_AT, 0);
    area.set(at::UPPER, 0);
}

/// Runs translated code from host address `entry` until it leaves; gives the exit. `call` does IN and OUT.
///
/// The caller has filled in the slots of the area, which is mapped behind the calling thread's block; `entry` is live code. What
/// [`at::CPU`] names is there, and its MXCSR is valid.
pub fn run(entry: u64, mut call: Device<'_>) -> u32 {
    // SAFETY: as the caller says; XRSTOR finds a valid image; the routine keeps the calling convention and touches only the state, the
    // area and guest RAM. `call` lives until it comes back.
    unsafe { bivisor_system_enter(entry, (&raw mut call).cast()) }
}

/// Puts the vector and x87 registers into the image, where they must be before anybody looks there.
pub fn sync(area: &Area, cpu: &mut CpuState) {
    settle(area);
    if area.get(at::VECTORS_AT) == 0 {
        return;
    }
    // Nothing above XMM was in use, or all of it comes.
    cpu.xsave.set_xstate_bv(0);
    // SAFETY: the image is 64-byte aligned and large enough; the routine clobbers only what a call may.
    unsafe { bivisor_system_sync(cpu.xsave.bytes.as_mut_ptr()) };
}
