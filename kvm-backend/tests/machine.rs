//! Raw code in guest-physical memory: ports, HLT, memory-mapped I/O, modes, interrupts, steps, and what KVM leaves to the interpreter.

mod common;

use bivisor_emulator::bus::Bus;
use bivisor_emulator::cpu::{Attr, CpuState, Cr0, Cr4, Fault, Rflags, Segment, Table};
use bivisor_emulator::isa::{Gpr, Seg};
use bivisor_emulator::mem::{GuestMemory, Ram};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use bivisor_kvm_backend::{Kind, KvmVcpu, host};
use common::{process_vm, skip};
use std::sync::Mutex;

/// Notes what arrives; input is 0x5a.
#[derive(Default)]
struct Log {
    seen: Mutex<Vec<String>>,
    interrupts: Mutex<Vec<u8>>,
}

impl Bus for Log {
    fn read_port(&self, port: u16, data: &mut [u8]) {
        data.fill(0x5a);
        self.seen.lock().expect("ok").push(format!("in {port:#x} {}", data.len()));
    }
    fn write_port(&self, port: u16, data: &[u8]) {
        self.seen.lock().expect("ok").push(format!("out {port:#x} {data:x?}"));
    }
    fn read_mmio(&self, gpa: u64, data: &mut [u8]) {
        data.fill(0xa5);
        self.seen.lock().expect("ok").push(format!("load {gpa:#x} {}", data.len()));
    }
    fn write_mmio(&self, gpa: u64, data: &[u8]) {
        self.seen.lock().expect("ok").push(format!("store {gpa:#x} {data:x?}"));
    }
    fn interrupt_pending(&self) -> bool {
        !self.interrupts.lock().expect("ok").is_empty()
    }
    fn take_interrupt(&self) -> Option<u8> {
        self.interrupts.lock().expect("ok").pop()
    }
}

const CODE: u64 = 0x1_0000;
const STACK: u64 = 0x2_0000;

struct Guest {
    mem: GuestMemory,
    bus: Log,
    vcpu: KvmVcpu,
}

impl Guest {
    fn new(state: CpuState, code: &[u8]) -> Option<Guest> {
        let vcpu = process_vm()?.vcpu();
        let mem = GuestMemory::Ram(Ram::new(4 << 20).expect("4 MiB"));
        // Page tables: 1 GiB identity in 2 MiB pages, accessible to user code.
        mem.write(0x1000, &0x2007u64.to_le_bytes()).expect("RAM");
        mem.write(0x2000, &0x3007u64.to_le_bytes()).expect("RAM");
        for i in 0..512u64 {
            mem.write(0x3000 + 8 * i, &(i << 21 | 0x87).to_le_bytes()).expect("RAM");
        }
        mem.write(CODE, code).expect("RAM");
        let mut g = Guest { mem, bus: Log::default(), vcpu };
        *g.vcpu.state() = state;
        Some(g)
    }

    fn budget(&mut self, budget: u64) -> Exit {
        self.vcpu.run(Board { mem: &self.mem, bus: &self.bus }, budget)
    }

    fn run(&mut self) -> Exit {
        let exit = self.budget(u64::MAX);
        assert_ne!(exit, Exit::Unsupported, "{:?}", self.vcpu.reason());
        exit
    }

    fn gpr(&mut self, r: Gpr) -> u64 {
        self.vcpu.state().gpr[r as usize]
    }

    fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.bus.seen.lock().expect("ok"))
    }
}

fn long64(cpl: u8) -> CpuState {
    let mut s = CpuState::long64(cpl);
    s.cr3 = 0x1000;
    s.rip = CODE;
    s.gpr[Gpr::Rsp as usize] = STACK;
    s.gdtr = Table { base: 0x4000, limit: 0x3f };
    s.idtr = Table { base: 0x5000, limit: 0xfff };
    s
}

fn real16() -> CpuState {
    let mut s = CpuState::reset();
    s.seg = [Segment::real(0); 6];
    s.seg[Seg::Cs as usize] = Segment::real((CODE >> 4) as u16);
    s.rip = 0;
    s.gpr[Gpr::Rsp as usize] = 0xfff0;
    s.idtr = Table { base: 0, limit: 0x3ff };
    s.cr0 = Cr0::ET;
    s
}

fn prot32() -> CpuState {
    let mut s = CpuState::reset();
    s.cr0 = Cr0::PE | Cr0::ET | Cr0::NE;
    s.seg = [Segment::data32(0x10, 0); 6];
    s.seg[Seg::Cs as usize] = Segment::code32(8, 0);
    s.rip = CODE;
    s.gpr[Gpr::Rsp as usize] = STACK;
    s
}

/// Gates for all vectors: each handler is one HLT at 0x8000 + 16 * vector, at CPL 0.
fn with_gates(g: &Guest) {
    g.mem.write(0x4010, &0x00af_9b00_0000_ffffu64.to_le_bytes()).expect("RAM");
    g.mem.write(0x4018, &0x00cf_9300_0000_ffffu64.to_le_bytes()).expect("RAM");
    for v in 0..256u64 {
        let at = 0x8000 + 16 * v;
        let gate = at | 0x10 << 16 | 0x8e00 << 32;
        g.mem.write(0x5000 + 16 * v, &gate.to_le_bytes()).expect("RAM");
        g.mem.write(at, &[0xf4]).expect("RAM");
    }
}

#[test]
fn ports_and_halt_at_cpl_0() {
    // mov al, 0x42; out 0x80, al; in eax, 0x60; out 0x70, eax; hlt
    let Some(mut g) = Guest::new(long64(0), &[0xb0, 0x42, 0xe6, 0x80, 0xe5, 0x60, 0xe7, 0x70, 0xf4]) else { return };
    assert_eq!(g.run(), Exit::Halt);
    assert_eq!(g.seen(), ["out 0x80 [42]", "in 0x60 4", "out 0x70 [5a, 5a, 5a, 5a]"]);
    assert_eq!(g.gpr(Gpr::Rax), 0x5a5a_5a5a);
    assert_eq!(g.vcpu.state().rip, CODE + 9);
}

#[test]
fn halt_can_be_intercepted() {
    let Some(mut g) = Guest::new(long64(0), &[0x90, 0xf4]) else { return };
    g.vcpu.set_intercepts(Intercepts::HLT);
    let exit = Exit::Intercept { what: Intercepts::HLT, next_rip: CODE + 2, vector: 0 };
    assert_eq!(g.run(), exit);
    assert_eq!(g.vcpu.state().rip, CODE + 1);
    assert_eq!(g.budget(1), exit);
}

#[test]
fn addresses_without_memory_are_the_bus_s() {
    // mov eax, [0x1000000]; mov [0x1000004], ax; rep outsb from RAM; hlt
    let code = [
        0x8b, 0x04, 0x25, 0, 0, 0, 1, 0x66, 0x89, 0x04, 0x25, 4, 0, 0, 1, 0xbe, 0, 0, 3, 0, 0xb9, 3, 0, 0, 0, 0xba,
        0x80, 0, 0, 0, 0xf3, 0x6e, 0xf4,
    ];
    let Some(mut g) = Guest::new(long64(0), &code) else { return };
    g.mem.write(0x3_0000, b"abc").expect("RAM");
    assert_eq!(g.run(), Exit::Halt);
    assert_eq!(
        g.seen(),
        ["load 0x1000000 4", "store 0x1000004 [a5, a5]", "out 0x80 [61]", "out 0x80 [62]", "out 0x80 [63]"]
    );
    assert_eq!(g.gpr(Gpr::Rax), 0xa5a5_a5a5);
}

#[test]
fn what_kvm_cannot_emulate_is_one_step_of_the_interpreter() {
    // mov ecx, 0x18; lar eax, ecx; int 0x40 -> gate 0x40: hlt. A software KVM has neither LAR nor INT n at CPL 0.
    let Some(mut g) = Guest::new(long64(0), &[0xb9, 0x18, 0, 0, 0, 0x0f, 0x02, 0xc1, 0xcd, 0x40]) else { return };
    with_gates(&g);
    assert_eq!(g.run(), Exit::Halt);
    assert_eq!(g.gpr(Gpr::Rax), 0xcf_9300);
    assert_eq!(g.vcpu.state().rip, 0x8401);
}

#[test]
fn vector_instructions_at_cpl_0_are_steps_of_the_interpreter() {
    // popcnt eax, ecx; movd xmm1, eax; paddd xmm1, xmm1; movd ebx, xmm1; fld1; hlt: on hardware there is nothing special about it.
    let code = [
        0xf3, 0x0f, 0xb8, 0xc1, 0x66, 0x0f, 0x6e, 0xc8, 0x66, 0x0f, 0xfe, 0xc9, 0x66, 0x0f, 0x7e, 0xcb, 0xd9, 0xe8,
        0xf4,
    ];
    let mut s = long64(0);
    s.gpr[Gpr::Rcx as usize] = 0xff01;
    let Some(mut g) = Guest::new(s, &code) else { return };
    assert_eq!(g.run(), Exit::Halt);
    assert_eq!(g.gpr(Gpr::Rax), 9);
    assert_eq!(g.gpr(Gpr::Rbx), 18);
    assert_eq!(g.vcpu.state().xsave.st(0), [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
}

#[test]
fn real_mode_runs() {
    // mov ax, 0x1234; mov ds, ax; mov [0x10], ax; add ax, ax; int 0x21 -> handler: out 0x80, al; hlt
    let Some(mut g) = Guest::new(real16(), &[0xb8, 0x34, 0x12, 0x8e, 0xd8, 0xa3, 0x10, 0, 1, 0xc0, 0xcd, 0x21]) else {
        return;
    };
    g.mem.write(0x21 * 4, &[0, 0x40, 0, 0]).expect("RAM");
    g.mem.write(0x4000, &[0xe6, 0x80, 0xf4]).expect("RAM");
    assert_eq!(g.run(), Exit::Halt);
    assert_eq!(g.seen(), ["out 0x80 [68]"]);
    let mut word = [0; 2];
    g.mem.read(0x12350, &mut word).expect("RAM");
    assert_eq!(word, [0x34, 0x12]);
    let s = g.vcpu.state();
    assert_eq!((s.gpr[0], s.seg[Seg::Ds as usize].base, s.gpr[Gpr::Rsp as usize]), (0x2468, 0x12340, 0xffea));
}

#[test]
fn protected_mode_runs() {
    // mov eax, 5; mul dword [0x30000]; hlt
    let Some(mut g) = Guest::new(prot32(), &[0xb8, 5, 0, 0, 0, 0xf7, 0x25, 0, 0, 3, 0, 0xf4]) else { return };
    g.mem.write(0x3_0000, &7u32.to_le_bytes()).expect("RAM");
    assert_eq!(g.run(), Exit::Halt);
    assert_eq!(g.gpr(Gpr::Rax), 35);
}

#[test]
fn user_code_runs_and_its_exceptions_reach_the_guest_s_kernel() {
    let mut s = long64(3);
    s.tr = Segment { base: 0x6000, limit: 0x67, attr: Attr::from_bits_retain(0x8b), selector: 0x30 };
    // 1: dec rcx; jnz 1b; ud2
    s.gpr[Gpr::Rcx as usize] = 10_000_000;
    let Some(mut g) = Guest::new(s, &[0x48, 0xff, 0xc9, 0x75, 0xfb, 0x0f, 0x0b]) else { return };
    with_gates(&g);
    g.mem.write(0x6004, &STACK.to_le_bytes()).expect("RAM");
    assert_eq!(g.run(), Exit::Halt);
    let s = g.vcpu.state();
    assert_eq!((s.rip, s.cpl()), (0x8061, 0));
    let mut frame = [0; 8];
    g.mem.read(STACK - 40, &mut frame).expect("RAM");
    assert_eq!(u64::from_le_bytes(frame), CODE + 5);
}

#[test]
fn exceptions_can_be_intercepted_in_every_mode() {
    let div = [0x31, 0xc9, 0xf7, 0xf1];
    for (name, state) in [("long", long64(0)), ("user", long64(3)), ("real", real16()), ("protected", prot32())] {
        for budget in [u64::MAX, 1, 10] {
            let Some(mut g) = Guest::new(state.clone(), &div) else { return };
            g.vcpu.set_intercepts(Intercepts::EXCEPTIONS | Intercepts::INT_N);
            if budget == 1 {
                assert_eq!(g.budget(1), Exit::Budget, "{name}");
            }
            let start = state.rip;
            let exit = g.budget(budget);
            assert_eq!(exit, Exit::Exception(Fault::De), "{name} {budget} {:?}", g.vcpu.reason());
            assert_eq!(g.vcpu.state().rip, start + 2, "{name}");
            assert_eq!(g.vcpu.state().idtr.limit, state.idtr.limit, "{name}: the hidden table does not show");
            assert_eq!(g.vcpu.state().rflags.bits() & 0x1_0100, 0, "{name}: RF and TF");
            // mov ah... INT 0x31 is told apart.
            let Some(mut g) = Guest::new(state.clone(), &[0xcd, 0x31]) else { return };
            g.vcpu.set_intercepts(Intercepts::EXCEPTIONS | Intercepts::INT_N);
            let next_rip = start + 2;
            assert_eq!(g.budget(budget), Exit::Intercept { what: Intercepts::INT_N, next_rip, vector: 0x31 }, "{name}");
        }
    }
}

#[test]
fn interrupts_wait_for_the_window() {
    // nop; sti; nop; 1: inc rax; jmp 1b
    let Some(mut g) = Guest::new(long64(0), &[0x90, 0xfb, 0x90, 0x48, 0xff, 0xc0, 0xeb, 0xfb]) else { return };
    with_gates(&g);
    g.bus.interrupts.lock().expect("ok").push(0x31);
    assert_eq!(g.run(), Exit::Halt);
    assert_eq!(g.vcpu.state().rip, 0x8311);
    assert!(!g.vcpu.state().rflags.contains(Rflags::IF), "an interrupt gate");
    let mut frame = [0; 8];
    let rsp = g.gpr(Gpr::Rsp);
    g.mem.read(rsp, &mut frame).expect("RAM");
    let rip = u64::from_le_bytes(frame);
    assert!((CODE + 3..=CODE + 6).contains(&rip), "not before the instruction after STI: {rip:#x}");
    // HLT again, with interrupts off: nothing wakes it.
    assert_eq!(g.run(), Exit::Halt);
}

#[test]
fn steps_are_exact_at_cpl_0() {
    // mov eax, 5; push rax; pop rbx; jmp +0; stosq; mov [0x1000000], eax
    let code = [0xb8, 5, 0, 0, 0, 0x50, 0x5b, 0xeb, 0, 0x48, 0xab, 0x89, 0x04, 0x25, 0, 0, 0, 1, 0xeb, 0xfe];
    let mut s = long64(0);
    s.gpr[Gpr::Rdi as usize] = 0x3_0000;
    let Some(mut g) = Guest::new(s, &code) else { return };
    for at in [5, 6, 7, 9, 11, 18, 18, 18] {
        assert_eq!(g.budget(1), Exit::Budget, "{:?}", g.vcpu.reason());
        assert_eq!(g.vcpu.state().rip, CODE + at);
        assert_eq!(g.vcpu.state().rflags.bits(), 2, "no trap flag");
    }
    assert_eq!(g.gpr(Gpr::Rbx), 5);
    assert_eq!(g.gpr(Gpr::Rdi), 0x3_0008);
    assert_eq!(g.seen(), ["store 0x1000000 [5, 0, 0, 0]"]);
}

#[test]
fn a_kick_ends_a_loop_at_cpl_0() {
    let Some(mut g) = Guest::new(long64(0), &[0xeb, 0xfe]) else { return };
    let kicker = g.vcpu.kicker();
    let other = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(5));
        kicker.kick();
    });
    assert_eq!(g.run(), Exit::Kicked);
    other.join().expect("no panic");
    assert_eq!(g.budget(1_000_000), Exit::Budget);
}

#[test]
fn a_triple_fault_shuts_down() {
    let mut s = long64(0);
    s.idtr.limit = 0;
    let Some(mut g) = Guest::new(s, &[0x0f, 0x0b]) else { return };
    assert_eq!(g.run(), Exit::Shutdown);
    assert_eq!(g.run(), Exit::Shutdown);
}

#[test]
fn msrs_and_control_registers_go_both_ways() {
    // mov ecx, 0xc0000082 (LSTAR); rdmsr; inc eax; wrmsr; mov rbx, cr4; mov rdx, dr0; hlt
    let code = [0xb9, 0x82, 0, 0, 0xc0, 0x0f, 0x32, 0xff, 0xc0, 0x0f, 0x30, 0x0f, 0x20, 0xe3, 0x0f, 0x21, 0xc2, 0xf4];
    let mut s = long64(0);
    s.msr.lstar = 0x1234_5678;
    s.dr[0] = 0xabcd;
    let Some(mut g) = Guest::new(s, &code) else { return };
    assert_eq!(g.run(), Exit::Halt);
    let s = g.vcpu.state();
    assert_eq!(s.msr.lstar, 0x1234_5679);
    assert_eq!(s.gpr[Gpr::Rbx as usize], s.cr4.bits());
    assert_eq!(s.gpr[Gpr::Rdx as usize], 0xabcd);
}

#[test]
fn written_pages_are_noted() {
    // mov [0x30000], al; hlt
    let Some(mut g) = Guest::new(long64(0), &[0x88, 0x04, 0x25, 0, 0, 3, 0, 0xf4]) else { return };
    g.mem.ram().expect("RAM").track_dirty();
    assert_eq!(g.run(), Exit::Halt);
    let dirty = g.mem.ram().expect("RAM").take_dirty();
    assert!(dirty.contains(&0x30), "{dirty:?}");
    assert!(!dirty.contains(&0x31), "{dirty:?}");
}

#[test]
fn what_the_host_cannot_do_is_refused_with_a_reason() {
    let mut legacy = prot32();
    legacy.cr0 |= Cr0::PG;
    let mut v86 = prot32();
    v86.rflags |= Rflags::VM;
    let mut wide = long64(0);
    wide.cr4 |= Cr4::LA57;
    if host().kind != Kind::Software {
        return skip("only a software KVM has modes to refuse");
    }
    for s in [legacy, v86, wide] {
        let Some(mut g) = Guest::new(s, &[0xf4]) else { return };
        assert_eq!(g.budget(u64::MAX), Exit::Unsupported);
        assert!(g.vcpu.reason().is_some_and(|r| r.contains("software KVM")), "{:?}", g.vcpu.reason());
    }
}
