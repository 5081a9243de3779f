//! Traces: what is guessed there may be wrong, and whoever interrupts a guest in one finds its state.

use super::Guest;
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::vcpu::{Exit, Intercepts, Vcpu};
use bivisor_translator::block::Scratch;
use iced_x86::code_asm::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const ROUNDS: u64 = 60_000;

/// A loop of calls: one that returns with a flag, one that takes its arguments from the stack, one through a table, a jump through
/// RCX, and one that returns elsewhere in every 64th round. RCX, R10 and R11 are used all the while. Ends with SYSCALL.
fn write(g: &mut Guest) {
    let table = g.data;
    g.asm(|a| {
        let [mut top, mut flag, mut clean, mut first, mut second, mut astray, mut usual] =
            std::array::from_fn(|_| a.create_label());
        let [mut back, mut other, mut next, mut jump] = std::array::from_fn(|_| a.create_label());
        a.mov(rbx, table).unwrap();
        for (i, at) in [first, second].into_iter().enumerate() {
            a.lea(rax, ptr(at)).unwrap();
            a.mov(qword_ptr(rbx + 8 * i), rax).unwrap();
        }
        a.xor(eax, eax).unwrap();
        a.set_label(&mut top).unwrap();
        // RAX takes the flag that comes back, which is bit 0 of the round.
        a.call(flag).unwrap();
        a.adc(rax, 0).unwrap();
        a.push(rsi).unwrap();
        a.push(3).unwrap();
        a.call(clean).unwrap();
        // The other function in every fourth stretch of 32 rounds.
        a.mov(r10, rsi).unwrap();
        a.and(r10d, 0x60).unwrap();
        a.sub(r10d, 0x60).unwrap();
        a.shr(r10d, 31).unwrap();
        a.xor(r10d, 1).unwrap();
        a.call(qword_ptr(rbx + r10 * 8)).unwrap();
        a.lea(rcx, ptr(jump)).unwrap();
        a.jmp(rcx).unwrap();
        a.ud2().unwrap();
        a.set_label(&mut jump).unwrap();
        a.lea(rcx, qword_ptr(rcx * 2)).unwrap();
        a.call(astray).unwrap();
        a.set_label(&mut back).unwrap();
        a.add(r11, 1).unwrap();
        a.jmp(next).unwrap();
        a.set_label(&mut other).unwrap();
        a.add(r11, 1000).unwrap();
        a.set_label(&mut next).unwrap();
        a.dec(rsi).unwrap();
        a.jne(top).unwrap();
        a.syscall().unwrap();

        a.set_label(&mut flag).unwrap();
        a.bt(esi, 0).unwrap();
        a.ret().unwrap();
        a.set_label(&mut clean).unwrap();
        a.mov(rcx, qword_ptr(rsp + 8)).unwrap();
        a.imul_2(rcx, qword_ptr(rsp + 16)).unwrap();
        a.add(rdx, rcx).unwrap();
        a.ret_1(16).unwrap();
        a.set_label(&mut first).unwrap();
        a.add(r8, 1).unwrap();
        a.ret().unwrap();
        a.set_label(&mut second).unwrap();
        a.add(r9, 1).unwrap();
        a.ret().unwrap();
        a.set_label(&mut astray).unwrap();
        a.test(esi, 63).unwrap();
        a.jne(usual).unwrap();
        a.lea(r10, ptr(other)).unwrap();
        a.mov(qword_ptr(rsp), r10).unwrap();
        a.set_label(&mut usual).unwrap();
        a.ret().unwrap();
    });
}

fn begin(g: &mut Guest) {
    for r in [Gpr::Rax, Gpr::Rdx, Gpr::R8, Gpr::R9, Gpr::R11] {
        g.set(r, 0);
    }
    g.set(Gpr::Rsi, ROUNDS);
    g.t.state().rip = g.code;
}

/// What the loop leaves in RAX, RDX, R8, R9 and R11.
fn wanted() -> [u64; 5] {
    let mut all = [0u64; 5];
    for round in (1..=ROUNDS).rev() {
        all[0] += round & 1;
        all[1] += 3 * round;
        all[if round & 0x60 == 0x60 { 3 } else { 2 }] += 1;
        all[4] += if round.is_multiple_of(64) { 1000 } else { 1 };
    }
    all
}

fn found(g: &mut Guest) -> [u64; 5] {
    [Gpr::Rax, Gpr::Rdx, Gpr::R8, Gpr::R9, Gpr::R11].map(|r| g.reg(r))
}

#[test]
fn a_trace_does_what_its_blocks_do_wherever_it_is_interrupted() {
    for low in [true, false] {
        let mut g = Guest::at(low);
        g.t.trace_every(16);
        write(&mut g);
        begin(&mut g);
        let (kicker, done) = (g.t.kicker(), AtomicBool::new(false));
        let mut kicks = 0;
        std::thread::scope(|s| {
            s.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    kicker.kick();
                    std::thread::sleep(Duration::from_micros(20));
                }
            });
            let exit = loop {
                match g.run() {
                    Exit::Kicked => kicks += 1,
                    exit => break exit,
                }
            };
            done.store(true, Ordering::Relaxed);
            assert!(matches!(exit, Exit::Intercept { what: Intercepts::SYSCALL, .. }), "{exit:?}");
        });
        assert_eq!(found(&mut g), wanted(), "after {kicks} kicks");
        assert!(g.t.cache().stats().traces > 0, "{kicks} kicks");
    }
}

/// The clock finds the loop; the time a test takes says nothing, but that it ends.
#[test]
fn a_clock_finds_what_is_hot() {
    let mut g = Guest::new();
    write(&mut g);
    let since = std::time::Instant::now();
    while g.t.cache().stats().traces == 0 {
        assert!(since.elapsed() < Duration::from_secs(60), "no trace");
        begin(&mut g);
        g.until_syscall();
        assert_eq!(found(&mut g), wanted());
    }
}

/// Code that is written is no trace any more.
#[test]
fn a_trace_goes_with_its_code() {
    let mut g = Guest::new();
    g.t.trace_every(4);
    g.asm(|a| {
        let [mut top, mut f] = std::array::from_fn(|_| a.create_label());
        a.test(edx, edx).unwrap();
        a.je(top).unwrap();
        // The immediate operand of the addition.
        a.lea(rcx, ptr(f)).unwrap();
        a.mov(byte_ptr(rcx + 3), dl).unwrap();
        a.set_label(&mut top).unwrap();
        a.call(f).unwrap();
        a.dec(rsi).unwrap();
        a.jne(top).unwrap();
        a.syscall().unwrap();
        a.set_label(&mut f).unwrap();
        a.add(r8, 1).unwrap();
        a.ret().unwrap();
    });
    let mut made = 0;
    for round in 0..24 {
        let n = 1 + round / 8;
        for (r, v) in [(Gpr::R8, 0), (Gpr::Rdx, if round % 8 == 0 { n } else { 0 }), (Gpr::Rsi, 5000)] {
            g.set(r, v);
        }
        g.t.state().rip = g.code;
        g.until_syscall();
        assert_eq!(g.reg(Gpr::R8), 5000 * n);
        if round % 8 == 7 {
            let all = g.t.cache().stats().traces;
            assert!(all > made, "no new trace in the rounds up to {round}");
            made = all;
        }
    }
}

/// As many calls through a register as can be, each of another function: more than a trace can have.
#[test]
fn what_is_too_much_for_a_trace_is_blocks() {
    const CALLS: u64 = 300;
    let mut g = Guest::new();
    g.t.trace_every(8);
    g.asm(|a| {
        let [mut top, mut f] = std::array::from_fn(|_| a.create_label());
        a.lea(rdi, ptr(f)).unwrap();
        a.set_label(&mut top).unwrap();
        for _ in 0..CALLS {
            a.call(rdi).unwrap();
        }
        a.dec(rsi).unwrap();
        a.jne(top).unwrap();
        a.syscall().unwrap();
        a.set_label(&mut f).unwrap();
        a.lea(r11, qword_ptr(r11 + r10)).unwrap();
        a.ret().unwrap();
    });
    for _ in 0..4 {
        for (r, v) in [(Gpr::R10, 1), (Gpr::R11, 0), (Gpr::Rsi, 500)] {
            g.set(r, v);
        }
        g.t.state().rip = g.code;
        g.until_syscall();
        assert_eq!(g.reg(Gpr::R11), 500 * CALLS);
    }
    assert!(g.t.cache().stats().traces > 0);
}

/// A program may have changed its code since it went that way.
#[test]
fn a_way_that_the_code_does_not_go_is_no_trace() {
    let mut g = Guest::new();
    g.asm(|a| {
        let mut over = a.create_label();
        a.inc(rax).unwrap();
        a.jne(over).unwrap();
        a.inc(rcx).unwrap();
        a.set_label(&mut over).unwrap();
        a.jmp(over).unwrap();
    });
    let at = |offsets: &[u64]| offsets.iter().map(|o| g.code + o).collect::<Vec<u64>>();
    let can = |offsets| g.t.cache().add_trace(&mut { &g.mem }, &at(offsets), &mut Scratch::default());
    for ways in [&[0, 3, 5, 8][..], &[0, 3, 8, 8], &[3]] {
        assert!(can(ways), "{ways:?}");
    }
    for ways in [&[0, 5][..], &[0, 3, 0], &[0, 3, 8, 0], &[3, 6], &[]] {
        assert!(!can(ways), "{ways:?}");
    }
}
