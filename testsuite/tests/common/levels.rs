//! A guest of two levels that notes what it sees: where it lies, how it begins, what it has noted at its end.

use bivisor_emulator::bus::Bus;
use bivisor_emulator::cpu::{CpuState, Rflags};
use bivisor_emulator::isa::{Gpr, Width};
use bivisor_emulator::mem::{GuestMemory, Ram};
use bivisor_emulator::vcpu::{Board, Vcpu};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Kernel and user in pages of their own, what is noted, page tables, the kernel's stack.
pub const KERNEL: u64 = 0x10_0000;
pub const USER: u64 = 0x11_0000;
pub const NOTES: u64 = 0x12_0000;
pub const TABLES: u64 = 0x3_0000;
pub const STACK: u64 = 0x9_0000;

fn msr(a: &mut CodeAssembler, number: u32, value: u64) -> Result<(), IcedError> {
    a.mov(ecx, number)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

/// The kernel's begin: SYSCALL leads to `entry` and clears the flags of `mask`; RCX and R11 are ready for SYSRET to the user.
pub fn begin(a: &mut CodeAssembler, mask: u64, entry: CodeLabel) -> Result<(), IcedError> {
    msr(a, 0xc000_0080, 0xd01)?;
    msr(a, 0xc000_0081, 0x0018_0008_0000_0000)?;
    msr(a, 0xc000_0084, mask)?;
    a.lea(rax, ptr(entry))?;
    a.xor(edx, edx)?;
    a.mov(ecx, 0xc000_0082u32)?;
    a.wrmsr()?;
    a.xor(esi, esi)?;
    a.mov(ecx, USER as i32)?;
    a.mov(r11d, 0x202)
}

/// The user's end: notes of `note` bytes each until RBX is 0, then a call of the kernel with RSI 1.
pub fn repeat(a: &mut CodeAssembler, again: CodeLabel, note: u64) -> Result<(), IcedError> {
    a.add(r12, note as i32)?;
    a.dec(ebx)?;
    a.jne(again)?;
    a.mov(esi, 1)?;
    a.syscall()
}

/// Memory with both, identically mapped, and the state to begin with.
pub fn machine(kernel: &[u8], user: &[u8]) -> (GuestMemory, CpuState) {
    let mem = GuestMemory::Ram(Ram::shared(4 << 20).expect("4 MiB"));
    let put = |at: u64, v: u64| mem.store(at, Width::Q, v).expect("in RAM");
    mem.write(KERNEL, kernel).expect("in RAM");
    mem.write(USER, user).expect("in RAM");
    put(TABLES, TABLES + 0x1007);
    put(TABLES + 0x1000, TABLES + 0x2007);
    put(TABLES + 0x2000, 0xe7);
    put(TABLES + 0x2008, 0x20_00e7);
    let mut s = CpuState::long64(0);
    (s.cr3, s.rip, s.rflags) = (TABLES, KERNEL, Rflags::FIXED);
    s.gpr[Gpr::Rsp as usize] = STACK;
    (mem, s)
}

/// Runs it until it has ended, at most `budget` instructions at a time; gives so many bytes of notes.
pub fn notes(
    vcpu: &mut dyn Vcpu,
    budget: u64,
    mem: &GuestMemory,
    bus: &dyn Bus,
    ended: &dyn Fn() -> bool,
    len: u64,
) -> Vec<u8> {
    for _ in 0..1_000_000 {
        vcpu.run(Board { mem, bus }, budget);
        if ended() {
            let mut notes = vec![0; len as usize];
            mem.read(NOTES, &mut notes).expect("in RAM");
            return notes;
        }
    }
    panic!("it does not come to its end: RIP {:#x}", vcpu.state().rip);
}

/// Eight bytes of them.
pub fn word(notes: &[u8], n: usize) -> u64 {
    u64::from_le_bytes(notes[8 * n..8 * n + 8].try_into().expect("8 bytes"))
}
