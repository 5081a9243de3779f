//! A small program in memory of its own, for engines of a process.

use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, Rflags};
use bivisor_emulator::host::signal;
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::linux::AddressSpace;
use bivisor_emulator::linux::mm::Mapping;
use bivisor_emulator::mem::PAGE_SIZE;
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use iced_x86::code_asm::*;
use std::sync::Mutex;

/// Where the program is, its data and its stack.
pub const CODE: u64 = 0x2000_0000;
const DATA: u64 = 0x2001_0000;
const STACK: u64 = 0x2002_0000;
/// Of its loop.
pub const ROUNDS: u32 = 200;

/// Integers, flags, memory, strings, calls, x87, vectors, the clock, code that changes itself; gives the address of its XADD.
pub fn program() -> (Vec<u8>, u64) {
    let assemble = || -> Result<(Vec<u8>, u64), IcedError> {
        let mut a = CodeAssembler::new(64)?;
        let (mut again, mut callee, mut over) = (a.create_label(), a.create_label(), a.create_label());
        let mut patched = a.create_label();
        let mut here = a.create_label();
        a.mov(r12d, ROUNDS)?;
        a.mov(rbx, DATA)?;
        a.finit()?;
        a.set_label(&mut again)?;
        a.call(callee)?;
        a.mov(rcx, 700u64)?;
        a.lea(rsi, ptr(rbx))?;
        a.lea(rdi, ptr(rbx + 0xf00))?;
        a.rep().movsb()?;
        a.mov(eax, dword_ptr(rbx + 16))?;
        a.set_label(&mut here)?;
        a.xadd(dword_ptr(rbx + 32), eax)?;
        a.nop()?;
        a.adc(edx, eax)?;
        a.rdtsc()?;
        a.test(r12d, 3)?;
        a.jne(over)?;
        a.lea(rdi, ptr(patched))?;
        a.inc(byte_ptr(rdi + 1))?;
        a.set_label(&mut over)?;
        a.nop()?;
        a.set_label(&mut patched)?;
        a.mov(eax, 0x100)?;
        a.add(dword_ptr(rbx), eax)?;
        a.dec(r12d)?;
        a.jne(again)?;
        a.syscall()?;
        a.set_label(&mut callee)?;
        a.movd(xmm3, r12d)?;
        a.pshufd(xmm4, xmm3, 0x1b)?;
        a.paddd(xmm4, xmmword_ptr(rbx + 64))?;
        a.movdqu(xmmword_ptr(rbx + 73), xmm4)?;
        a.fild(dword_ptr(rbx))?;
        a.fsqrt()?;
        a.fstp(qword_ptr(rbx + 128))?;
        a.shl(dword_ptr(rbx + 4), cl)?;
        a.ret()?;
        let done = a.assemble_options(CODE, iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
        let xadd = done.label_ip(&here)?;
        Ok((done.inner.code_buffer, xadd))
    };
    assemble().expect("it can be assembled")
}

/// The program's memory; one test at a time has it.
pub struct World {
    space: AddressSpace,
    _one: std::sync::MutexGuard<'static, ()>,
}

impl World {
    /// With the program at its place.
    pub fn new(code: &[u8]) -> World {
        static ONE: Mutex<()> = Mutex::new(());
        let one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        signal::attach();
        let space = AddressSpace::new();
        for (addr, len) in [(CODE, PAGE_SIZE), (DATA, 2 * PAGE_SIZE), (STACK, PAGE_SIZE)] {
            let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
            let mut prot = libc::PROT_READ | libc::PROT_WRITE;
            if addr == CODE {
                prot |= libc::PROT_EXEC;
            }
            let m = Mapping { addr, len, prot: prot as u64, flags, fd: -1, offset: 0, name: "" };
            assert_eq!(space.map(&m) as u64, addr, "room at the addresses of the test");
        }
        space.mem.write(CODE, code).expect("mapped");
        let data: Vec<u8> = (0..2 * PAGE_SIZE).map(|i| (i * 7) as u8).collect();
        space.mem.write(DATA, &data).expect("mapped");
        World { space, _one: one }
    }

    /// To the system call at the end.
    pub fn run(&self, engine: &mut dyn Vcpu) -> CpuState {
        let mut start = CpuState::long64(3);
        let model = CpuModel::host();
        start.cr4 &= model.cr4();
        start.xcr0 &= model.xcr0();
        start.rip = CODE;
        start.rflags = Rflags::FIXED | Rflags::IF;
        start.gpr[Gpr::Rsp as usize] = STACK + 0x800;
        *engine.state() = start;
        engine.set_intercepts(Intercepts::SYSCALL | Intercepts::EXCEPTIONS);
        loop {
            match engine.run(Board { mem: &self.space.mem, bus: &EmptyBus }, u64::MAX) {
                Exit::Kicked => {}
                Exit::Intercept { what: Intercepts::SYSCALL, .. } => return engine.state().clone(),
                other => panic!("left with {other:x?} at {:#x}", engine.state().rip),
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for (addr, len) in [(CODE, PAGE_SIZE), (DATA, 2 * PAGE_SIZE), (STACK, PAGE_SIZE)] {
            self.space.unmap(addr, len);
        }
    }
}
