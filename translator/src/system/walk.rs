//! Accesses of 64-bit user code that the inline TLB does not have, without leaving the cache: a walk of the guest's page tables that changes
//! nothing in them (SDM 3A 4.5), while the vector registers stay where they are.
//!
//! What is not usual leaves as before: pages that are not small or that are global, flags of the tables that are yet to be set, stores that
//! need care, and whatever faults.
#![allow(unsafe_code)]

use crate::system::area::{Area, at, gs};
use crate::system::enter::{load_callers, store_callers};
use crate::system::tlb;
use bivisor_emulator::cpu::cpuid::PHYSICAL_BITS;
use bivisor_emulator::cpu::{CpuState, Cr0, Cr4, Efer};
use bivisor_emulator::mem::{PAGE_SIZE, Ram, paging::flag};
use std::arch::global_asm;

/// Walks before user code is left for once, so that somebody looks whether it should use the mirror.
const WALKS: u64 = 16;

/// What is looked for, as words behind the jump that leads here: the places, counted from the first of them, where the code goes on if it is
/// not found, which is behind them, and where it asks again; the length less 1; and the flags that the last entry must have.
pub fn wanted(len: u16, write: bool, retry: i32) -> [u32; 4] {
    let flags = flag::P | flag::US | flag::A | if write { flag::RW | flag::D } else { 0 };
    [size_of::<[u32; 4]>() as u32, retry as u32, u32::from(len) - 1, flags as u32]
}

/// To the next table or page, by an entry in RDX, which must have the flags in EDI and none of the others in R8D.
macro_rules! follow {
    () => {
        concat!(
            "mov ecx, edx\n",
            "and ecx, r8d\n",
            "cmp ecx, edi\n",
            "jne bivisor_system_not_walked\n",
            "and rdx, r9\n",
            "cmp rdx, gs:[{low}]\n",
            "jae bivisor_system_not_walked\n",
        )
    };
}

/// The entry of the table at RDX that bits from this one on of the address choose.
macro_rules! next {
    ($shift:literal) => {
        concat!(
            "add rdx, gs:[{ram}]\n",
            "mov rcx, rax\n",
            "shr rcx, ",
            $shift,
            "\n",
            "and ecx, 511\n",
            "mov rdx, [rdx + 8*rcx]\n",
        )
    };
}

global_asm!(
    ".globl bivisor_system_walk, bivisor_system_walked, bivisor_system_not_walked, bivisor_system_walk_ends",
    ".hidden bivisor_system_walk, bivisor_system_walked, bivisor_system_not_walked, bivisor_system_walk_ends",
    ".p2align 4",
    "bivisor_system_walk:",
    store_callers!(),
    "mov gs:[{rbx}], rbx",
    "mov rax, gs:[{address}]",
    "mov rbx, gs:[{wanted}]",
    "movsxd rcx, dword ptr [rbx]",
    "add rcx, rbx",
    "mov gs:[{slow}], rcx",
    "mov rdx, gs:[{root}]",
    "mov rdi, gs:[{left}]",
    "sub rdi, 1",
    "jb bivisor_system_not_walked",
    "mov gs:[{left}], rdi",
    // In one page of the user's half.
    "mov ecx, eax",
    "and ecx, 4095",
    "add ecx, dword ptr [rbx + 8]",
    "cmp ecx, 4095",
    "ja bivisor_system_not_walked",
    "mov rcx, rax",
    "shr rcx, 47",
    "jnz bivisor_system_not_walked",
    // The flag of a large page is reserved in the first, and must not be in the next two.
    "mov edi, dword ptr [rbx + 12]",
    "and edi, {not_dirty}",
    "mov r8d, edi",
    "or r8d, {large}",
    "mov r9, {page}",
    next!("39"),
    follow!(),
    next!("30"),
    follow!(),
    next!("21"),
    follow!(),
    next!("12"),
    "mov edi, dword ptr [rbx + 12]",
    "mov r8d, edi",
    "or r8d, {global}",
    follow!(),
    "test edi, {write}",
    "jz 60f",
    "mov rcx, gs:[{pages}]",
    "mov r8, rdx",
    "shr r8, 12",
    "test dword ptr [rcx + 4*r8], {care}",
    "jnz bivisor_system_not_walked",
    "60:",
    // As `Tlb::fill`.
    "mov r8, rax",
    "shr r8, 12",
    "and r8d, {last}",
    "mov ecx, dword ptr gs:[{filled}]",
    "cmp ecx, {most}",
    "jae bivisor_system_not_walked",
    "mov word ptr gs:[{list} + 2*rcx], r8w",
    "add ecx, 1",
    "mov dword ptr gs:[{filled}], ecx",
    "shl r8d, {entry_shift}",
    "and rax, -4096",
    "cmp gs:[{tlb} + r8 + {read_tag}], rax",
    "je 61f",
    "mov qword ptr gs:[{tlb} + r8 + {write_tag}], -1",
    "61:",
    "mov gs:[{tlb} + r8 + {read_tag}], rax",
    "test edi, {write}",
    "jz 62f",
    "mov gs:[{tlb} + r8 + {write_tag}], rax",
    "62:",
    "add rdx, gs:[{ram}]",
    "sub rdx, rax",
    "mov gs:[{tlb} + r8 + {addend}], rdx",
    "add qword ptr gs:[{walked}], 1",
    "movsxd rcx, dword ptr [rbx + 4]",
    "add rcx, rbx",
    "mov gs:[{entry}], rcx",
    load_callers!(),
    "mov rbx, gs:[{rbx}]",
    // A kick that comes from here on sends the thread to where the code is left; one that came before is seen.
    "bivisor_system_walked:",
    "cmp dword ptr gs:[{look}], 0",
    "jne bivisor_system_walk_ends",
    "jmp qword ptr gs:[{entry}]",
    "bivisor_system_not_walked:",
    load_callers!(),
    "mov rbx, gs:[{rbx}]",
    "bivisor_system_walk_ends:",
    "jmp qword ptr gs:[{slow}]",
    caller = const gs(at::CALLER),
    rbx = const gs(at::RBX),
    entry = const gs(at::ENTRY),
    look = const crate::emit::gs(crate::emit::slot::LOOK),
    address = const gs(at::WALK_ADDRESS),
    wanted = const gs(at::WALK_WANTED),
    slow = const gs(at::WALK_SLOW),
    root = const gs(at::WALK_ROOT),
    left = const gs(at::WALKS_LEFT),
    walked = const gs(at::WALKED),
    ram = const gs(at::WALK_RAM),
    low = const gs(at::WALK_LOW),
    pages = const gs(at::WALK_PAGES),
    filled = const gs(at::FILLED),
    list = const gs(at::FILLED_LIST),
    most = const tlb::MOST_LISTED,
    tlb = const gs(at::TLB),
    read_tag = const tlb::READ,
    write_tag = const tlb::WRITE,
    addend = const tlb::ADDEND,
    last = const tlb::ENTRIES - 1,
    entry_shift = const tlb::ENTRY.trailing_zeros(),
    not_dirty = const !(flag::D as u32),
    large = const flag::PS,
    global = const flag::G,
    write = const flag::RW,
    page = const 0x000f_ffff_ffff_f000_u64,
    care = const Ram::CARE,
);

unsafe extern "sysv64" {
    safe static bivisor_system_walk: u8;
    safe static bivisor_system_walked: u8;
    safe static bivisor_system_not_walked: u8;
    safe static bivisor_system_walk_ends: u8;
}

/// Where generated code goes.
pub fn walk() -> u64 {
    (&raw const bivisor_system_walk) as u64
}

/// The host addresses at which a kick must not let the thread go back.
pub fn returning() -> std::ops::Range<u64> {
    (&raw const bivisor_system_walked) as u64..(&raw const bivisor_system_not_walked) as u64
}

/// Where the signal handler sends a thread that was about to go back.
pub fn give_up() -> u64 {
    (&raw const bivisor_system_walk_ends) as u64
}

/// User code may walk the tables of this state until the TLB is cleared; and somebody has looked whether it should use the mirror.
pub fn open(area: &Area, cpu: &CpuState, ram: &Ram) {
    let long = cpu.cr0.contains(Cr0::PG) && cpu.efer.contains(Efer::LMA | Efer::NXE) && !cpu.cr4.contains(Cr4::LA57);
    let root = cpu.cr3 & ((1 << PHYSICAL_BITS) - PAGE_SIZE);
    // The RAM ends below what is reserved in entries.
    if !long || root >= ram.low() || ram.low() > 1 << PHYSICAL_BITS {
        return;
    }
    area.set(at::WALK_ROOT, root);
    area.set(at::WALK_RAM, ram.host_base() as u64);
    area.set(at::WALK_LOW, ram.low());
    area.set(at::WALK_PAGES, ram.generations() as u64);
    area.set(at::WALKS_LEFT, WALKS);
}

/// No more, until it is opened again.
pub fn close(area: &Area) {
    area.set(at::WALKS_LEFT, 0);
}
