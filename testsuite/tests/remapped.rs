//! Branches of user code between pages, in the mode of long-running programs, where they are taken without a look at the mapping: after each
//! kind of change of the page tables they lead to what is mapped then, as under the interpreter; and loops of nothing else can be left.

use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, Cr4, Rflags};
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::isa::{Gpr, Width};
use bivisor_emulator::mem::{GuestMemory, Ram};
use bivisor_emulator::vcpu::{Board, Exit, Vcpu};
use bivisor_translator::Translator;
use iced_x86::code_asm::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const KERNEL: u64 = 0x1_0000;
const USER: u64 = 0x2_0000;
/// The user's page that is one of several, and those.
const WINDOW: u64 = 0x3_0000;
const PIECES: [u64; 3] = [0x4_0000, 0x4_1000, 0x4_2000];
const TABLES: u64 = 0x5_0000;
const NOTES: u64 = 0x8_0000;
const STACK: u64 = 0x9_0000;
const ROUNDS: i32 = 90;
const PTE: u64 = TABLES + 0x3000 + (WINDOW >> 12) * 8;

fn assembled(at: u64, f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("64-bit code");
    f(&mut a).and_then(|()| a.assemble(at)).expect("it can be assembled")
}

/// What is mapped at the window: at 0 a function, at 0x40 a jump back, at 0x80 a function that calls one in the user's page.
fn piece(n: i32) -> Vec<u8> {
    let parts = [
        assembled(WINDOW, |a| {
            a.lea(r14, ptr(r14 * 2 + n + 1))?;
            a.ret()
        }),
        assembled(WINDOW + 0x40, |a| {
            a.add(r14, 0x100 * n)?;
            a.jmp(USER + 8)
        }),
        assembled(WINDOW + 0x80, |a| {
            a.call(USER)?;
            a.xor(r14, 0x55 + n)?;
            a.ret()
        }),
    ];
    let mut code = vec![0; 0xc0];
    for (part, at) in parts.iter().zip((0..).step_by(0x40)) {
        code[at..at + part.len()].copy_from_slice(part);
    }
    code
}

/// Calls into the window directly, through a register and through memory, and jumps there.
fn user() -> Vec<u8> {
    assembled(USER, |a| {
        let mut again = a.create_label();
        // A function of its own.
        a.add(r14, 3)?;
        a.ret()?;
        a.nops_with_size(3)?;
        // At 8: back from the window.
        a.cmp(r13, 0)?;
        a.je(again)?;
        a.mov(r10d, 40)?;
        a.set_label(&mut again)?;
        a.mov(eax, WINDOW as i32)?;
        a.call(WINDOW)?;
        a.call(rax)?;
        a.call(qword_ptr(r15))?;
        a.lea(rcx, ptr(rax + 0x80))?;
        a.push(rcx)?;
        a.cmp(r14, 7)?;
        a.call(rcx)?;
        a.adc(r14, 0)?;
        a.pop(rcx)?;
        a.xor(r13d, r13d)?;
        a.dec(r10d)?;
        let mut out = a.create_label();
        a.je(out)?;
        a.jmp(WINDOW + 0x40)?;
        a.set_label(&mut out)?;
        a.mov(r13d, 1)?;
        a.syscall()
    })
}

/// Maps another piece in each round, in one of three ways, and notes what came of it.
fn kernel() -> Vec<u8> {
    assembled(KERNEL, |a| {
        let (mut entry, mut go, mut page, mut end) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        for (number, value) in [(0xc000_0080u32, 0xd01u64), (0xc000_0081, 0x0018_0008_0000_0000), (0xc000_0084, 0)] {
            a.mov(ecx, number)?;
            a.mov(eax, value as u32)?;
            a.mov(edx, (value >> 32) as u32)?;
            a.wrmsr()?;
        }
        a.lea(rax, ptr(entry))?;
        a.xor(edx, edx)?;
        a.mov(ecx, 0xc000_0082u32)?;
        a.wrmsr()?;
        a.mov(ebx, ROUNDS)?;
        a.mov(r12, NOTES)?;
        a.set_label(&mut go)?;
        a.mov(r10d, 40)?;
        a.mov(r15d, (TABLES - 0x100) as i32)?;
        a.mov(ecx, (USER + 8) as i32)?;
        a.mov(r11d, 2)?;
        a.mov(r13d, 1)?;
        a.sysretq()?;
        a.set_label(&mut entry)?;
        a.mov(qword_ptr(r12), r14)?;
        a.add(r12, 8)?;
        a.dec(ebx)?;
        a.je(end)?;
        a.mov(eax, ebx)?;
        a.xor(edx, edx)?;
        a.mov(ecx, 3)?;
        a.div(ecx)?;
        a.shl(edx, 12)?;
        a.add(edx, (PIECES[0] | 5) as i32)?;
        a.mov(ecx, PTE as i32)?;
        a.mov(qword_ptr(rcx), rdx)?;
        a.test(ebx, 4)?;
        a.je(page)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.jmp(go)?;
        a.set_label(&mut page)?;
        a.mov(eax, WINDOW as i32)?;
        a.invlpg(byte_ptr(rax))?;
        a.jmp(go)?;
        a.set_label(&mut end)?;
        a.cli()?;
        a.hlt()
    })
}

/// For a kernel alone: at 0 a word, at 0x40 a function, at 0x100 one that maps what RSI says in its own place, of which the rest is another.
fn own_piece(n: i32) -> Vec<u8> {
    let parts = [
        (
            0x40,
            assembled(WINDOW + 0x40, |a| {
                a.lea(r14, ptr(r14 * 2 + n + 1))?;
                a.ret()
            }),
        ),
        (
            0x100,
            assembled(WINDOW + 0x100, |a| {
                a.cmp(ebx, 50)?;
                a.mov(qword_ptr(rcx), rsi)?;
                a.invlpg(byte_ptr(WINDOW + 0x123))?;
                a.adc(r14, 0x100 * n)?;
                a.ret()
            }),
        ),
    ];
    let mut code = vec![0x11 * (n as u8 + 1); 0x200];
    for (at, part) in parts {
        code[at..at + part.len()].copy_from_slice(&part);
    }
    code
}

/// EDX becomes the page-table entry of piece EBX + `more` modulo 3, global in every other eight rounds.
fn choose(a: &mut CodeAssembler, more: i32) -> Result<(), IcedError> {
    a.lea(eax, ptr(rbx + more))?;
    a.xor(edx, edx)?;
    a.mov(ecx, 3)?;
    a.div(ecx)?;
    a.shl(edx, 12)?;
    a.mov(ecx, ebx)?;
    a.and(ecx, 8)?;
    a.shl(ecx, 5)?;
    a.lea(edx, ptr(rdx + rcx + (PIECES[0] | 3) as i32))
}

/// A kernel that maps another piece at the window and uses it at once, in the same block: data, code, the code it is in.
fn kernel_alone() -> Vec<u8> {
    assembled(KERNEL, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 0xc000_0101u32)?;
        a.mov(eax, 0x1000)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(ebx, ROUNDS)?;
        a.mov(r12, NOTES)?;
        a.xor(r14d, r14d)?;
        a.set_label(&mut again)?;
        choose(a, 2)?;
        a.mov(rsi, rdx)?;
        choose(a, 1)?;
        a.mov(r10, rdx)?;
        choose(a, 0)?;
        a.mov(ecx, PTE as i32)?;
        a.mov(eax, WINDOW as i32)?;
        // Flags and what is known of the page meet each INVLPG.
        a.mov(r8, qword_ptr(rax))?;
        a.cmp(ebx, 40)?;
        a.mov(qword_ptr(rcx), rdx)?;
        a.invlpg(byte_ptr(rax))?;
        a.adc(r14, qword_ptr(rax))?;
        a.mov(qword_ptr(rax + 0x800), r14)?;
        a.mov(qword_ptr(rcx), r10)?;
        a.invlpg(byte_ptr(rax + r8 * 8 - 0x1000).gs())?;
        a.invlpg(byte_ptr(rax - 0x1000).gs())?;
        a.add(r14, qword_ptr(rax + 0x800))?;
        a.xor(r14, qword_ptr(rax + 8))?;
        a.lea(r11, ptr(rax + 0x40))?;
        a.call(r11)?;
        a.call(WINDOW + 0x40)?;
        a.lea(r11, ptr(rax + 0x100))?;
        a.call(r11)?;
        a.mov(qword_ptr(r12), r14)?;
        a.add(r12, 8)?;
        a.dec(ebx)?;
        a.jne(again)?;
        a.cli()?;
        a.hlt()
    })
}

fn memory() -> GuestMemory {
    let mem = GuestMemory::Ram(Ram::shared(1 << 20).expect("1 MiB"));
    let put = |at: u64, v: u64| mem.store(at, Width::Q, v).expect("in RAM");
    mem.write(KERNEL, &kernel()).expect("in RAM");
    mem.write(USER, &user()).expect("in RAM");
    for (n, at) in PIECES.into_iter().enumerate() {
        mem.write(at, &piece(n as i32)).expect("in RAM");
    }
    for level in 0..3 {
        put(TABLES + 0x1000 * level, (TABLES + 0x1000 * (level + 1)) | 7);
    }
    for page in 0..256 {
        put(TABLES + 0x3000 + page * 8, page << 12 | 7);
    }
    put(PTE, PIECES[0] | 5);
    put(TABLES - 0x100, WINDOW);
    mem
}

fn run(vcpu: &mut dyn Vcpu) -> (Vec<u8>, [u64; 16]) {
    run_on(vcpu, &memory())
}

fn run_on(vcpu: &mut dyn Vcpu, mem: &GuestMemory) -> (Vec<u8>, [u64; 16]) {
    let mut s = CpuState::long64(0);
    s.cr4 |= Cr4::PGE;
    (s.cr3, s.rip, s.rflags) = (TABLES, KERNEL, Rflags::FIXED);
    s.gpr[Gpr::Rsp as usize] = STACK;
    *vcpu.state() = s;
    assert_eq!(vcpu.run(Board { mem, bus: &EmptyBus }, u64::MAX), Exit::Halt, "RIP {:#x}", vcpu.state().rip);
    let mut notes = vec![0; 8 * ROUNDS as usize];
    mem.read(NOTES, &mut notes).expect("in RAM");
    (notes, vcpu.state().gpr)
}

fn translator() -> Translator {
    let mut t = Translator::new(Arc::new(CpuModel::host())).expect("executable memory");
    t.set_mirror_after(Some(Duration::ZERO));
    t
}

#[test]
fn branches_between_pages_follow_the_page_tables() {
    let wanted = run(&mut Interpreter::new(Arc::new(CpuModel::host())));
    let seen = run(&mut translator());
    for (n, (w, s)) in wanted.0.chunks(8).zip(seen.0.chunks(8)).enumerate() {
        assert_eq!(w, s, "round {n}");
    }
    assert_eq!(wanted.1, seen.1);
}

/// SDM 2A INVLPG: what is used next, by the same block, is what is mapped then; and its own code.
#[test]
fn a_kernel_sees_what_it_maps_at_once() {
    let alone = || {
        let mem = memory();
        mem.write(KERNEL, &kernel_alone()).expect("in RAM");
        for (n, at) in PIECES.into_iter().enumerate() {
            mem.write(at, &own_piece(n as i32)).expect("in RAM");
        }
        mem
    };
    let wanted = run_on(&mut Interpreter::new(Arc::new(CpuModel::host())), &alone());
    let seen = run_on(&mut translator(), &alone());
    for (n, (w, s)) in wanted.0.chunks(8).zip(seen.0.chunks(8)).enumerate() {
        assert_eq!(w, s, "round {n}");
    }
    assert_eq!(wanted.1, seen.1);
}

/// Jumps through registers, calls and returns, and nothing that a kick could take away.
#[test]
fn loops_of_indirect_branches_are_left() {
    let mut t = translator();
    let kicker = t.kicker();
    let done = Arc::new(AtomicBool::new(false));
    let thread = std::thread::spawn({
        let done = done.clone();
        move || {
            while !done.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_micros(300));
                kicker.kick();
            }
        }
    });
    let code = assembled(USER, |a| {
        a.push(rbx)?;
        a.lea(r14, ptr(r14 + 1))?;
        a.ret()
    });
    let other = assembled(WINDOW, |a| {
        a.call(rdi)?;
        a.jmp(rsi)?;
        // To 0x20.
        a.nops_with_size(0x20 - 4)?;
        a.lea(r13, ptr(r13 + 1))?;
        a.ret()
    });
    let mem = memory();
    mem.write(USER, &code).expect("in RAM");
    mem.write(PIECES[0], &other).expect("in RAM");
    let mut s = CpuState::long64(3);
    (s.cr3, s.rip, s.rflags) = (TABLES, USER, Rflags::FIXED);
    for (r, v) in [(Gpr::Rsp, STACK), (Gpr::Rbx, WINDOW), (Gpr::Rdi, WINDOW + 0x20), (Gpr::Rsi, USER)] {
        s.gpr[r as usize] = v;
    }
    *t.state() = s;
    let mut last = 0;
    for _ in 0..300 {
        assert_eq!(t.run(Board { mem: &mem, bus: &EmptyBus }, u64::MAX), Exit::Kicked);
        let s = t.state().clone();
        // Whatever was interrupted, all rounds but one are whole.
        let (rounds, calls) = (s.gpr[Gpr::R14 as usize], s.gpr[Gpr::R13 as usize]);
        assert!(rounds - calls <= 1, "{rounds} {calls}");
        assert!(rounds >= last);
        last = rounds;
    }
    assert!(last > 1000, "{last} rounds");
    done.store(true, Ordering::Relaxed);
    thread.join().expect("the kicker ends");
}
