//! R10 and R11, which branches put away: whoever interrupts a guest finds them.

use super::Guest;
use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::Fault;
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::vcpu::{Board, DIRECT_CALLS, Exit, Intercepts, Vcpu};
use iced_x86::code_asm::*;

/// R10 and R11 are in their registers in some code and in slots in other code: what interrupts the guest anywhere finds them right.
#[test]
fn r10_and_r11_survive_branches_and_kicks() {
    for (r, other, [reg, rest]) in [(r11, r10, [Gpr::R11, Gpr::R10]), (r10, r11, [Gpr::R10, Gpr::R11])] {
        for traces in [false, true] {
            survives_branches_and_kicks(r, other, [reg, rest], traces);
        }
    }
}

fn survives_branches_and_kicks(r: AsmRegister64, other: AsmRegister64, [reg, rest]: [Gpr; 2], traces: bool) {
    const ROUNDS: u64 = 200_000;
    let mut g = Guest::new();
    g.t.trace_every(if traces { 8 } else { 0 });
    let data = g.data;
    g.asm(|a| {
        let [mut top, mut add, mut jump, mut out, mut even, mut next] = std::array::from_fn(|_| a.create_label());
        a.mov(rbx, data).unwrap();
        a.lea(rax, ptr(add)).unwrap();
        a.mov(qword_ptr(rbx), rax).unwrap();
        a.lea(rax, ptr(jump)).unwrap();
        a.mov(qword_ptr(rbx + 8), rax).unwrap();
        a.set_label(&mut top).unwrap();
        a.call(qword_ptr(rbx)).unwrap();
        // Wanted here in one path only.
        a.test(esi, 1).unwrap();
        a.je(even).unwrap();
        a.lea(r, qword_ptr(r + r * 2)).unwrap();
        a.set_label(&mut even).unwrap();
        a.jmp(qword_ptr(rbx + 8)).unwrap();
        a.set_label(&mut jump).unwrap();
        a.push(r).unwrap();
        a.mov(r, qword_ptr(rbx + 8)).unwrap();
        a.call(add).unwrap();
        a.inc(other).unwrap();
        a.lea(r, ptr(next)).unwrap();
        a.jmp(r).unwrap();
        a.set_label(&mut next).unwrap();
        a.pop(r).unwrap();
        a.dec(rsi).unwrap();
        a.jne(top).unwrap();
        a.jmp(out).unwrap();
        a.set_label(&mut add).unwrap();
        a.add(r, rsi).unwrap();
        a.ret().unwrap();
        a.set_label(&mut out).unwrap();
        a.syscall().unwrap();
    });
    g.set(Gpr::Rsi, ROUNDS);
    g.set(reg, 5);
    g.set(rest, 7);
    let mut wanted = 5u64;
    for n in (1..=ROUNDS).rev() {
        wanted = wanted.wrapping_add(n);
        if n & 1 == 1 {
            wanted = wanted.wrapping_mul(3);
        }
    }
    let kicker = g.t.kicker();
    let done = std::sync::atomic::AtomicBool::new(false);
    let mut kicks = 0;
    std::thread::scope(|s| {
        s.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                kicker.kick();
                std::thread::sleep(std::time::Duration::from_micros(20));
            }
        });
        let exit = loop {
            match g.run() {
                Exit::Kicked => kicks += 1,
                exit => break exit,
            }
        };
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(matches!(exit, Exit::Intercept { what: Intercepts::SYSCALL, .. }), "{exit:?}");
    });
    assert_eq!((g.reg(reg), g.reg(rest)), (wanted, 7 + ROUNDS), "after {kicks} kicks");
    assert_eq!(g.t.cache().stats().traces > 0, traces);

    // A fault far from the last instruction that named them; and one of an instruction that sets one of them.
    for set in [rcx, r] {
        let mut g = Guest::new();
        g.asm(|a| {
            let mut f = a.create_label();
            a.lea(rax, ptr(f)).unwrap();
            a.mov(r, 0x2222u64).unwrap();
            a.mov(other, 0x3333u64).unwrap();
            a.call(rax).unwrap();
            a.ud2().unwrap();
            a.set_label(&mut f).unwrap();
            a.xor(ebx, ebx).unwrap();
            a.mov(set, qword_ptr(rbx)).unwrap();
        });
        g.set(Gpr::Rcx, 0x1111);
        assert_eq!(g.run(), Exit::Exception(Fault::Pf { addr: 0, code: 4 }));
        assert_eq!([Gpr::Rcx, reg, rest].map(|r| g.reg(r)), [0x1111, 0x2222, 0x3333]);
    }
}

/// The same when each instruction is executed alone.
#[test]
fn every_single_step_has_all_registers() {
    let mut g = Guest::new();
    g.asm(|a| {
        let [mut f, mut h] = std::array::from_fn(|_| a.create_label());
        a.lea(rax, ptr(f)).unwrap();
        a.call(rax).unwrap();
        a.inc(r10).unwrap();
        a.lea(r10, ptr(h)).unwrap();
        a.jmp(r10).unwrap();
        a.ud2().unwrap();
        a.set_label(&mut f).unwrap();
        a.add(r10, r11).unwrap();
        a.ret().unwrap();
        a.set_label(&mut h).unwrap();
        a.syscall().unwrap();
    });
    let (mut other, code, stack) = (Guest::new(), g.code, g.reg(Gpr::Rsp));
    let begin = |g: &mut Guest| {
        let s = g.t.state();
        (s.rip, s.gpr) = (code, [0; 16]);
        (s.gpr[Gpr::R10 as usize], s.gpr[Gpr::R11 as usize], s.gpr[Gpr::Rsp as usize]) = (0x1000, 0x234, stack);
    };
    begin(&mut g);
    for done in 1..8 {
        assert_eq!(g.t.run(Board { mem: &g.mem, bus: &EmptyBus }, 1), Exit::Budget, "{done}");
        // With such a budget it is the interpreter that runs.
        begin(&mut other);
        if done > 1 {
            assert_eq!(other.t.run(Board { mem: &g.mem, bus: &EmptyBus }, done), Exit::Budget);
            assert_eq!(g.t.state().rip, other.t.state().rip, "{done}");
            assert_eq!(g.t.state().gpr, other.t.state().gpr, "{done}");
        }
    }
    g.until_syscall();
    assert_eq!([Gpr::R10, Gpr::R11].map(|r| g.reg(r)), [g.t.state().rip, 0x234]);
}

/// The fourth argument of a system call is in R10, which branches may have put away.
#[test]
fn a_system_call_made_in_the_cache_has_its_fourth_argument() {
    static DIRECT: [u8; DIRECT_CALLS] = {
        let mut all = [1; DIRECT_CALLS];
        all[libc::SYS_rt_sigprocmask as usize] = 0;
        all
    };
    const ROUNDS: u64 = 1000;
    let mut g = Guest::new();
    let data = g.data;
    g.asm(|a| {
        let [mut top, mut bare, mut here] = std::array::from_fn(|_| a.create_label());
        a.xor(ebx, ebx).unwrap();
        a.mov(r10d, 8).unwrap();
        a.set_label(&mut top).unwrap();
        // A branch before the call, so that R10 is away.
        a.call(bare).unwrap();
        a.or(rbx, rax).unwrap();
        a.inc(r9).unwrap();
        a.call(bare).unwrap();
        a.or(rbx, rax).unwrap();
        // Now it is not.
        a.mov(eax, libc::SYS_rt_sigprocmask as u32).unwrap();
        a.mov(r10d, 7).unwrap();
        a.inc(r10).unwrap();
        a.syscall().unwrap();
        a.or(rbx, rax).unwrap();
        a.dec(rbp).unwrap();
        a.jne(top).unwrap();
        a.mov(eax, 0x1fff).unwrap();
        a.syscall().unwrap();
        a.set_label(&mut bare).unwrap();
        a.lea(rax, ptr(here)).unwrap();
        a.jmp(rax).unwrap();
        a.ud2().unwrap();
        a.set_label(&mut here).unwrap();
        a.mov(eax, libc::SYS_rt_sigprocmask as u32).unwrap();
        a.syscall().unwrap();
        a.ret().unwrap();
    });
    g.t.set_direct(&DIRECT);
    // What is blocked now; the size of a set must be 8.
    for (r, v) in [(Gpr::Rdi, 0), (Gpr::Rsi, 0), (Gpr::Rdx, data), (Gpr::Rbp, ROUNDS)] {
        g.set(r, v);
    }
    g.until_syscall();
    assert_eq!([Gpr::Rbx, Gpr::R10].map(|r| g.reg(r)), [0, 8]);
    assert_eq!(g.reg(Gpr::Rax), 0x1fff);
    assert!(g.t.stats().direct >= 3 * ROUNDS - 10, "{:?}", g.t.stats());
}
