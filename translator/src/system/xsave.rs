//! XSAVE and XRSTOR of a kernel without leaving the cache, while the registers hold what the user's code left in them.
//!
//! Both go by way of [`at::BOUNCE`]: what is there has been looked at and cannot change any more, and an image may lie in two pages that are
//! anywhere. What is not usual leaves for the interpreter, which does the instruction from its beginning: components that were not all
//! requested, an x87 state whose pointers name translated code, and whatever faults.
#![allow(unsafe_code)]

use crate::system::area::{Area, at, gs};
use crate::system::enter::{code_fs, load_callers, store_callers};
use bivisor_emulator::cpu::xsave::{Layout, XSAVE_SIZE, component};
use std::arch::global_asm;

/// Bit 0 of [`at::IMAGE`]: the guest may, and has enabled what the host has.
pub const OPEN: u64 = 1;
/// Bit 1: its CPU has the compacted format.
pub const COMPACT: u64 = 2;
/// Bit 2: its CPU keeps no selectors with the pointers of x87.
pub const NO_SELECTORS: u64 = 4;

/// Where the header ends.
const LEGACY: usize = 576;
const XSTATE_BV: usize = 512;
const FIP: usize = 8;
const MXCSR: usize = 24;
/// The bytes of the legacy region that XSAVE writes (SDM 1 10.5.1).
const LEGACY_USED: usize = 416;

/// Room in the area for [`at::IMAGE_RUNS`] and [`at::IMAGE_PARTS`].
pub const RUNS: usize = 6;
/// See [`RUNS`].
pub const PARTS: usize = 3;
const _: () = assert!(at::IMAGE_RUNS + 8 * RUNS <= at::IMAGE_PARTS && at::IMAGE_PARTS + 16 * PARTS <= at::HIGH);
const _: () =
    assert!(at::BOUNCE.is_multiple_of(64) && at::MASKS + 64 <= at::BOUNCE && at::BOUNCE + XSAVE_SIZE <= at::TARGETS);
const _: () = assert!(gs(at::BOUNCE) % 64 == 0);

/// Puts general registers away and finds the image: R8 is the host address of its first byte, R9 what that would be if all of it were in the
/// second page, R10D the number of bytes in the first. All that is requested must be all there is.
macro_rules! begin {
    () => {
        concat!(
            store_callers!(),
            "mov gs:[{rbx}], rbx\n",
            "and eax, dword ptr gs:[{components}]\n",
            "cmp eax, dword ptr gs:[{components}]\n",
            "jne bivisor_system_left\n",
            "mov r8, gs:[{first}]\n",
            "mov r9, gs:[{second}]\n",
            "mov r10, gs:[{temp}]\n",
            "neg r10\n",
            "and r10d, 4095\n",
            "jnz 91f\n",
            "mov r10d, 4096\n",
            "91:\n",
        )
    };
}

/// The registers as they were.
macro_rules! registers {
    () => {
        concat!(load_callers!(), "mov rbx, gs:[{rbx}]\n")
    };
}

/// Bytes EAX and, if that is less, up to ECX more of the image, to the same place of the bounce buffer.
macro_rules! fetch {
    () => {
        concat!(
            "mov rdi, gs:[0]\n",
            "lea rdi, [rdi + rax + {bounce}]\n",
            "mov ebx, ecx\n",
            "mov ecx, r10d\n",
            "sub ecx, eax\n",
            "jbe 92f\n",
            "cmp ecx, ebx\n",
            "cmova ecx, ebx\n",
            "sub ebx, ecx\n",
            "lea rsi, [r8 + rax]\n",
            "rep movsb\n",
            "92:\n",
            "mov ecx, ebx\n",
            "jrcxz 93f\n",
            "mov rsi, rdi\n",
            "sub rsi, gs:[0]\n",
            "lea rsi, [rsi + r9 - {bounce}]\n",
            "rep movsb\n",
            "93:\n",
        )
    };
}

global_asm!(
    ".globl bivisor_system_save, bivisor_system_restore, bivisor_system_imaged, bivisor_system_left, bivisor_system_not_imaged",
    ".hidden bivisor_system_save, bivisor_system_restore, bivisor_system_imaged, bivisor_system_left, bivisor_system_not_imaged",
    ".p2align 4",
    "bivisor_system_save:",
    begin!(),
    // Elsewhere than in the registers, or above XMM in nobody's.
    "cmp dword ptr gs:[{asleep}], 0",
    "jne bivisor_system_left",
    "cmp dword ptr gs:[{upper}], 0",
    "je bivisor_system_left",
    "xor edx, edx",
    "xsave64 gs:[{bounce}]",
    "mov rdx, gs:[{bounce} + {bv}]",
    "and rdx, rax",
    "test dl, 1",
    "jz 40f",
    // See `System::sync`.
    "cmp qword ptr gs:[{x87_data}], -1",
    "jne bivisor_system_left",
    "mov rcx, gs:[{bounce} + {fip}]",
    "cmp rcx, gs:[{cache_start}]",
    "jb 40f",
    "cmp rcx, gs:[{cache_end}]",
    "jb bivisor_system_left",
    "40:",
    // What is all zeros is not in use.
    "xor esi, esi",
    "41:",
    "mov rcx, gs:[{parts} + rsi]",
    "test rdx, rcx",
    "jz 43f",
    "mov edi, dword ptr gs:[{parts} + rsi + 8]",
    "mov r11d, dword ptr gs:[{parts} + rsi + 12]",
    "42:",
    "cmp qword ptr gs:[{bounce} + rdi], 0",
    "jne 43f",
    "add edi, 8",
    "cmp edi, r11d",
    "jb 42b",
    "xor rdx, rcx",
    "43:",
    "add esi, 16",
    "cmp esi, {parts_size}",
    "jb 41b",
    // Of the header only what belongs to these components.
    "lea rdi, [r8 + {bv}]",
    "lea rsi, [r9 + {bv}]",
    "cmp r10d, {bv}",
    "cmovbe rdi, rsi",
    "mov rcx, [rdi]",
    "not rax",
    "and rcx, rax",
    "or rcx, rdx",
    "mov [rdi], rcx",
    "xor r11d, r11d",
    "44:",
    "mov ebx, dword ptr gs:[{runs} + r11 + 4]",
    "test ebx, ebx",
    "jz 47f",
    "mov eax, dword ptr gs:[{runs} + r11]",
    "mov rsi, gs:[0]",
    "lea rsi, [rsi + rax + {bounce}]",
    "mov ecx, r10d",
    "sub ecx, eax",
    "jbe 45f",
    "cmp ecx, ebx",
    "cmova ecx, ebx",
    "sub ebx, ecx",
    "lea rdi, [r8 + rax]",
    "rep movsb",
    "45:",
    "mov ecx, ebx",
    "jrcxz 46f",
    "mov rdi, rsi",
    "sub rdi, gs:[0]",
    "lea rdi, [rdi + r9 - {bounce}]",
    "rep movsb",
    "46:",
    "add r11d, 8",
    "jmp 44b",
    "47:",
    registers!(),
    // A kick that comes from here on sends the thread to where the instruction begins anew; one that came before is seen.
    "bivisor_system_imaged:",
    "cmp dword ptr gs:[{look}], 0",
    "jne bivisor_system_not_imaged",
    "jmp qword ptr gs:[{entry}]",
    "bivisor_system_left:",
    registers!(),
    "bivisor_system_not_imaged:",
    "jmp qword ptr gs:[{slow}]",
    ".p2align 4",
    "bivisor_system_restore:",
    begin!(),
    "xor eax, eax",
    "mov ecx, {legacy}",
    fetch!(),
    "mov eax, dword ptr gs:[{components}]",
    "mov rdx, gs:[{bounce} + {bv}]",
    "test dl, 1",
    "jz 50f",
    "test dword ptr gs:[{image}], {no_selectors}",
    "jz bivisor_system_left",
    "50:",
    "mov rcx, rax",
    "not rcx",
    "test rdx, rcx",
    "jnz bivisor_system_left",
    "test dword ptr gs:[{bounce} + {mxcsr}], 0xffff0000",
    "jnz bivisor_system_left",
    "mov rsi, gs:[{bounce} + {bv} + 8]",
    "mov rdi, gs:[{bounce} + {bv} + 16]",
    "test rsi, rsi",
    "jz 51f",
    // The compacted format: SDM 1 13.8.2.
    "jns bivisor_system_left",
    "test dword ptr gs:[{image}], {compact}",
    "jz bivisor_system_left",
    "btr rsi, 63",
    "test rsi, rcx",
    "jnz bivisor_system_left",
    "not rsi",
    "test rdx, rsi",
    "jnz bivisor_system_left",
    "or rdi, gs:[{bounce} + {bv} + 24]",
    "or rdi, gs:[{bounce} + {bv} + 32]",
    "or rdi, gs:[{bounce} + {bv} + 40]",
    "or rdi, gs:[{bounce} + {bv} + 48]",
    "or rdi, gs:[{bounce} + {bv} + 56]",
    "51:",
    "test rdi, rdi",
    "jnz bivisor_system_left",
    "test edx, {upper_components}",
    "jz 52f",
    "cmp dword ptr gs:[{upper}], 0",
    "je bivisor_system_left",
    "mov eax, {legacy}",
    "mov ecx, dword ptr gs:[{rest}]",
    fetch!(),
    "52:",
    "mov eax, dword ptr gs:[{components}]",
    "xor edx, edx",
    "xrstor64 gs:[{bounce}]",
    "mov qword ptr gs:[{x87_data}], -1",
    "cmp dword ptr gs:[{asleep}], 0",
    "je 47b",
    "mov dword ptr gs:[{asleep}], 0",
    "mov dword ptr gs:[{own_fs}], 1",
    code_fs!(),
    "jmp 47b",
    caller = const gs(at::CALLER),
    rbx = const gs(at::RBX),
    components = const gs(at::COMPONENTS),
    first = const gs(at::IMAGE_FIRST),
    second = const gs(at::IMAGE_SECOND),
    temp = const gs(at::TEMP),
    asleep = const gs(at::ASLEEP),
    upper = const gs(at::UPPER),
    bounce = const gs(at::BOUNCE),
    parts = const gs(at::IMAGE_PARTS),
    parts_size = const 16 * PARTS,
    runs = const gs(at::IMAGE_RUNS),
    rest = const gs(at::IMAGE_REST),
    image = const gs(at::IMAGE),
    slow = const gs(at::IMAGE_SLOW),
    entry = const gs(at::ENTRY),
    own_fs = const gs(at::OWN_FS),
    distance = const gs(at::DISTANCE),
    look = const crate::emit::gs(crate::emit::slot::LOOK),
    bv = const XSTATE_BV,
    mxcsr = const MXCSR,
    fip = const FIP,
    x87_data = const gs(at::X87_DATA),
    cache_start = const crate::emit::gs(crate::emit::slot::CACHE_START),
    cache_end = const crate::emit::gs(crate::emit::slot::CACHE_END),
    no_selectors = const NO_SELECTORS,
    legacy = const LEGACY,
    compact = const COMPACT,
    upper_components = const component::AVX | component::AVX512,
);

unsafe extern "sysv64" {
    safe static bivisor_system_save: u8;
    safe static bivisor_system_restore: u8;
    safe static bivisor_system_imaged: u8;
    safe static bivisor_system_left: u8;
    safe static bivisor_system_not_imaged: u8;
}

/// Where generated code goes for XSAVE64.
pub fn save() -> u64 {
    (&raw const bivisor_system_save) as u64
}

/// Where generated code goes for XRSTOR64.
pub fn restore() -> u64 {
    (&raw const bivisor_system_restore) as u64
}

/// The host addresses at which a kick must not let the thread go back.
pub fn returning() -> std::ops::Range<u64> {
    (&raw const bivisor_system_imaged) as u64..(&raw const bivisor_system_left) as u64
}

/// Where the signal handler sends a thread that was about to go back: the same instruction once more does the same.
pub fn again() -> u64 {
    (&raw const bivisor_system_not_imaged) as u64
}

/// Fills the slots that do not change from run to run.
pub fn prepare(area: &Area) {
    let l = Layout::host();
    let has = |c: u64| l.components & c == c;
    let pair = |at: usize, end: usize| at as u64 | (end as u64) << 32;
    let extended = [
        (component::AVX, l.avx, 256),
        (component::OPMASK, l.opmask, 64),
        (component::ZMM_HI256, l.zmm_hi256, 512),
        (component::HI16_ZMM, l.hi16_zmm, 1024),
    ];
    let present = extended.iter().filter(|(c, ..)| has(*c)).map(|(_, at, len)| *at..at + len);
    let mut runs: Vec<_> = std::iter::once(0..LEGACY_USED).chain(present).collect();
    runs.sort_by_key(|r| r.start);
    runs.dedup_by(|next, last| {
        let touches = last.end == next.start;
        if touches {
            last.end = next.end;
        }
        touches
    });
    assert!(runs.len() < RUNS, "room for the end of the list");
    for (n, r) in runs.iter().enumerate() {
        area.set(at::IMAGE_RUNS + 8 * n, pair(r.start, r.len()));
    }
    let seen = [(component::SSE, Layout::XMM, 256), extended[0], extended[2]];
    for (n, (c, at, len)) in seen.into_iter().enumerate() {
        let place = at::IMAGE_PARTS + 16 * n;
        area.set(place, if has(c) { c } else { 0 });
        area.set(place + 8, pair(at, at + len));
    }
    area.set(at::IMAGE_REST, (l.size - LEGACY) as u64);
    area.set(at::IMAGE, 0);
}
