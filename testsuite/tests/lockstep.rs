//! Lockstep of the engines of a process: a small program runs through without a difference, and a bug planted in the translator's
//! results is found, by the pair and by the sentinel.

use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, Rflags};
use bivisor_emulator::host::signal;
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::linux::AddressSpace;
use bivisor_emulator::linux::mm::Mapping;
use bivisor_emulator::mem::PAGE_SIZE;
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Kicker, Vcpu};
use bivisor_testsuite::lockstep::engine::{BLOCK, Difference, Lockstep, Shared};
use bivisor_testsuite::lockstep::sentinel::Sentinel;
use bivisor_translator::Translator;
use iced_x86::code_asm::*;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

const CODE: u64 = 0x2000_0000;
const DATA: u64 = 0x2001_0000;
const STACK: u64 = 0x2002_0000;
const ROUNDS: u32 = 200;

/// Integers, flags, memory, strings, calls, x87, vectors, the clock, code that changes itself; gives the address of its XADD.
fn program() -> (Vec<u8>, u64) {
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
struct World {
    space: AddressSpace,
    _one: std::sync::MutexGuard<'static, ()>,
}

impl World {
    fn new(code: &[u8]) -> World {
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
    fn run(&self, engine: &mut dyn Vcpu) -> CpuState {
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

type Found = Arc<Mutex<Vec<Difference>>>;

fn shared(model: &Arc<CpuModel>) -> (Arc<Shared>, Found) {
    let found = Found::default();
    let to = found.clone();
    (Shared::new(model.clone(), Box::new(move |d| to.lock().expect("no panic").push(d.clone()))), found)
}

fn translator(model: &Arc<CpuModel>) -> Translator {
    Translator::new(model.clone()).expect("executable memory")
}

/// An engine that gets the flags of one instruction wrong now and then.
struct Planted<V> {
    engine: V,
    at: u64,
}

impl<V: Vcpu> Vcpu for Planted<V> {
    fn run(&mut self, board: Board<'_>, budget: u64) -> Exit {
        self.engine.run(board, budget)
    }
    fn run_stretch(&mut self, board: Board<'_>, most: u64) -> (Exit, u64) {
        let before = self.engine.state().rip;
        let done = self.engine.run_stretch(board, most);
        let s = self.engine.state();
        // The instruction is in the stretch, and ADC or INC have not set the flag anew.
        if before <= self.at && s.rip > self.at && s.rip < self.at + 9 && s.gpr[Gpr::R12 as usize] == 7 {
            s.rflags.toggle(Rflags::AF);
        }
        done
    }
    fn state(&mut self) -> &mut CpuState {
        self.engine.state()
    }
    fn set_intercepts(&mut self, intercepts: Intercepts) {
        self.engine.set_intercepts(intercepts);
    }
    fn kicker(&self) -> Kicker {
        self.engine.kicker()
    }
}

#[test]
fn engines_agree_on_a_small_program() {
    let model = Arc::new(CpuModel::host());
    let (code, _) = program();
    let engines: [(&str, Box<dyn Vcpu>, usize); 4] = [
        ("bt by blocks", Box::new(translator(&model)), BLOCK),
        ("bt by instructions", Box::new(translator(&model)), 1),
        ("interp", Box::new(Interpreter::new(model.clone())), BLOCK),
        ("bt by threes", Box::new(translator(&model)), 3),
    ];
    for (name, engine, most) in engines {
        let world = World::new(&code);
        let (shared, found) = shared(&model);
        let mut pair = Lockstep::new(Boxed(engine), shared.clone(), most).expect("memory");
        world.run(&mut pair);
        let found = found.lock().expect("no panic");
        assert!(
            found.is_empty(),
            "{name}: {:#x?}",
            found.first().map(|d| (&d.changes, &d.trace, &d.ends, d.start.rip))
        );
        let n = shared.counts.instructions.load(Ordering::Relaxed);
        let clock = shared.counts.apart[0].load(Ordering::Relaxed);
        let rounds = u64::from(ROUNDS);
        assert!(n >= rounds * 24 && clock == rounds, "{name}: {n} instructions compared, {clock} of the clock");
    }
}

/// A box that is an engine.
struct Boxed(Box<dyn Vcpu>);

impl Vcpu for Boxed {
    fn run(&mut self, board: Board<'_>, budget: u64) -> Exit {
        self.0.run(board, budget)
    }
    fn run_stretch(&mut self, board: Board<'_>, most: u64) -> (Exit, u64) {
        self.0.run_stretch(board, most)
    }
    fn state(&mut self) -> &mut CpuState {
        self.0.state()
    }
    fn set_intercepts(&mut self, intercepts: Intercepts) {
        self.0.set_intercepts(intercepts);
    }
    fn kicker(&self) -> Kicker {
        self.0.kicker()
    }
    fn instructions(&self) -> Option<u64> {
        self.0.instructions()
    }
}

#[test]
fn a_planted_bug_is_found_in_the_pair() {
    let model = Arc::new(CpuModel::host());
    let (code, xadd) = program();
    let world = World::new(&code);
    let (shared, found) = shared(&model);
    let planted = Planted { engine: translator(&model), at: xadd };
    let mut pair = Lockstep::new(planted, shared, 1).expect("memory");
    world.run(&mut pair);
    let found = found.lock().expect("no panic");
    assert_eq!(found.len(), 1, "{:?}", found.iter().map(|d| &d.changes).collect::<Vec<_>>());
    let d = &found[0];
    assert_eq!((d.start.rip, d.changes.len(), d.changes[0].what.as_str()), (xadd, 1, "rflags"), "{:?}", d.changes);
    let request = d.request("bt");
    assert_eq!((&request["memory"], &request["stop"]["insns"]), (&"flat".into(), &1.into()));
    assert!(
        request["mem"].as_array().is_some_and(|m| m.iter().any(|m| m["addr"] == "0x20010000" && m["rights"] == "rw"))
    );
}

#[test]
fn the_sentinel_compares_and_the_program_goes_on() {
    let model = Arc::new(CpuModel::host());
    let (code, _) = program();
    for every in [1, 3] {
        let world = World::new(&code);
        let (shared, found) = shared(&model);
        let mut sentinel = Sentinel::new(translator(&model), shared.clone(), every).expect("memory");
        let end = world.run(&mut sentinel);
        assert!(
            found.lock().expect("no panic").is_empty(),
            "1/{every}: {:?}",
            found.lock().expect("no panic")[0].changes
        );
        assert_eq!(end.gpr[Gpr::R12 as usize], 0);
        let n = shared.counts.stretches.load(Ordering::Relaxed);
        assert!(n > 0, "1/{every}: {n} compared");
    }
}
