//! Small guest functions in the test's own address space, run by the translator.
#![allow(unsafe_code)]

use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, Fault, Rflags};
use bivisor_emulator::interp::alu::Vendor;
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::mem::{FlatSpace, GuestMemory, Prot, Vma};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use bivisor_translator::Translator;
use iced_x86::code_asm::*;
use std::sync::Arc;

#[path = "flat/homes.rs"]
mod homes;
#[path = "flat/traces.rs"]
mod traces;

const CODE: u64 = 64 << 10;

/// A guest: code, data and stack in fresh mappings.
struct Guest {
    mem: GuestMemory,
    t: Translator,
    code: u64,
    data: u64,
    stack: u64,
}

fn map(len: u64, low: bool) -> u64 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | if low { libc::MAP_32BIT } else { 0 };
    // SAFETY: a fresh mapping.
    let p = unsafe { libc::mmap(std::ptr::null_mut(), len as usize, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_ne!(p, libc::MAP_FAILED);
    p as u64
}

fn put(at: u64, bytes: &[u8]) {
    // SAFETY: `at` is in a mapping of the guest.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
}

fn get(at: u64) -> u64 {
    // SAFETY: as for `put`.
    unsafe { (at as *const u64).read_unaligned() }
}

impl Guest {
    fn new() -> Guest {
        Guest::at(false)
    }

    fn at(low: bool) -> Guest {
        let space = FlatSpace::new();
        let (code, data, stack) = (map(CODE, low), map(CODE, low), map(CODE, false));
        for (start, prot) in [(code, Prot::all()), (data, Prot::READ | Prot::WRITE), (stack, Prot::READ | Prot::WRITE)]
        {
            space.insert(Vma {
                start,
                end: start + CODE,
                prot,
                shared: false,
                name: "".into(),
                offset: 0,
                backing: None,
            });
        }
        let mut t = Translator::new(Arc::new(CpuModel::host())).expect("executable memory");
        t.set_intercepts(Intercepts::SYSCALL | Intercepts::INT_N | Intercepts::EXCEPTIONS);
        *t.state() = CpuState::long64(3);
        let s = t.state();
        s.rflags = Rflags::FIXED | Rflags::IF;
        s.gpr[Gpr::Rsp as usize] = stack + CODE - 256;
        s.rip = code;
        bivisor_emulator::host::signal::attach();
        Guest { mem: GuestMemory::Flat(space), t, code, data, stack }
    }

    fn asm(&mut self, f: impl FnOnce(&mut CodeAssembler)) {
        let mut a = CodeAssembler::new(64).expect("64-bit");
        f(&mut a);
        put(self.code, &a.assemble(self.code).expect("assembles"));
    }

    fn run(&mut self) -> Exit {
        self.t.run(Board { mem: &self.mem, bus: &EmptyBus }, u64::MAX)
    }

    fn reg(&mut self, r: Gpr) -> u64 {
        self.t.state().gpr[r as usize]
    }

    fn set(&mut self, r: Gpr, v: u64) {
        self.t.state().gpr[r as usize] = v;
    }

    /// Runs to the SYSCALL.
    fn until_syscall(&mut self) {
        match self.run() {
            Exit::Intercept { what: Intercepts::SYSCALL, next_rip, .. } => assert_eq!(next_rip, self.t.state().rip + 2),
            other => panic!("{other:?} at {:#x} (code {:#x})", self.t.state().rip, self.code),
        }
    }
}

#[test]
fn a_loop_counts() {
    let mut g = Guest::new();
    g.asm(|a| {
        let mut top = a.create_label();
        a.mov(rcx, 1000u64).unwrap();
        a.xor(eax, eax).unwrap();
        a.set_label(&mut top).unwrap();
        a.add(rax, rcx).unwrap();
        a.dec(rcx).unwrap();
        a.jnz(top).unwrap();
        a.syscall().unwrap();
    });
    g.until_syscall();
    assert_eq!(g.reg(Gpr::Rax), 500_500);
    assert!(g.t.stats().entries < 10, "{:?}", g.t.stats());
}

fn fib(a: &mut CodeAssembler) {
    let mut f = a.create_label();
    let mut small = a.create_label();
    a.call(f).unwrap();
    a.syscall().unwrap();
    a.set_label(&mut f).unwrap();
    a.cmp(rdi, 2).unwrap();
    a.jb(small).unwrap();
    a.push(rbx).unwrap();
    a.push(rdi).unwrap();
    a.dec(rdi).unwrap();
    a.call(f).unwrap();
    a.mov(rbx, rax).unwrap();
    a.pop(rdi).unwrap();
    a.sub(rdi, 2).unwrap();
    a.call(f).unwrap();
    a.add(rax, rbx).unwrap();
    a.pop(rbx).unwrap();
    a.ret().unwrap();
    a.set_label(&mut small).unwrap();
    a.mov(rax, rdi).unwrap();
    a.ret().unwrap();
}

#[test]
fn calls_and_returns() {
    for low in [false, true] {
        let mut g = Guest::at(low);
        g.asm(fib);
        g.set(Gpr::Rdi, 20);
        let stack = g.reg(Gpr::Rsp);
        g.until_syscall();
        assert_eq!(g.reg(Gpr::Rax), 6765);
        assert_eq!(g.reg(Gpr::Rsp), stack);
        // The return address on the guest's stack is the guest's.
        assert_eq!(get(stack - 8), g.code + 5);
        assert!(g.t.stats().entries < 30, "{:?}", g.t.stats());
    }
}

#[test]
fn indirect_branches_keep_flags_and_registers() {
    let mut g = Guest::new();
    let data = g.data;
    g.asm(|a| {
        let mut f = a.create_label();
        let mut out = a.create_label();
        a.lea(rax, ptr(f)).unwrap();
        a.mov(rbx, data).unwrap();
        a.mov(qword_ptr(rbx), rax).unwrap();
        a.mov(rcx, 0x1111u64).unwrap();
        a.mov(r11, 0x2222u64).unwrap();
        a.stc().unwrap();
        a.call(rax).unwrap();
        a.jnc(out).unwrap();
        a.cmc().unwrap();
        a.call(qword_ptr(rbx)).unwrap();
        a.jc(out).unwrap();
        a.lea(rax, ptr(out)).unwrap();
        a.mov(r8d, 1).unwrap();
        a.jmp(rax).unwrap();
        a.ud2().unwrap();
        a.set_label(&mut f).unwrap();
        a.inc(r9).unwrap();
        a.ret_1(16).unwrap();
        a.set_label(&mut out).unwrap();
        a.syscall().unwrap();
    });
    g.set(Gpr::R9, 5);
    let stack = g.reg(Gpr::Rsp);
    g.until_syscall();
    assert_eq!([Gpr::Rcx, Gpr::R11, Gpr::R8, Gpr::R9, Gpr::Rsp].map(|r| g.reg(r)), [0x1111, 0x2222, 1, 7, stack + 32]);
}

/// Functions and places to return to whose addresses have their low 16 bits in common: they share an entry of the table.
#[test]
fn targets_that_share_an_entry_are_told_apart() {
    const ROUNDS: u64 = 2000;
    let mut g = Guest::new();
    // Four pieces of code at one offset in pages of 64 KiB, the guest's own first.
    let far: Vec<u64> = (0..3)
        .map(|_| {
            let (at, space) = (map(2 * CODE, false), g.mem.flat().expect("a flat space"));
            let start = at.next_multiple_of(CODE) + g.code % CODE;
            let start = if start + CODE > at + 2 * CODE { start - CODE } else { start };
            let (prot, name) = (Prot::all(), "".into());
            space.insert(Vma { start: at, end: at + 2 * CODE, prot, shared: false, name, offset: 0, backing: None });
            start
        })
        .collect();
    // Each adds its number to RAX, with all flags set by what was there before, and goes back or on to the next.
    const AT: u64 = 0x100;
    for (n, start) in far.iter().enumerate() {
        let mut a = CodeAssembler::new(64).expect("64-bit");
        a.lea(rax, qword_ptr(rax + (n as i32 + 1) * 1000)).unwrap();
        a.adc(rdx, 0).unwrap();
        a.stc().unwrap();
        // Behind the call all return addresses are alike in their low 16 bits, too.
        if let Some(next) = far.get(n + 1) {
            a.mov(r8, next + AT).unwrap();
            a.call(r8).unwrap();
            a.adc(rdx, 0).unwrap();
            a.stc().unwrap();
        }
        a.ret().unwrap();
        put(start + AT, &a.assemble(start + AT).expect("assembles"));
    }
    let all = far.clone();
    g.asm(|a| {
        let mut top = a.create_label();
        a.mov(rcx, ROUNDS).unwrap();
        a.xor(eax, eax).unwrap();
        a.xor(edx, edx).unwrap();
        a.set_label(&mut top).unwrap();
        for start in &all {
            a.mov(r11, start + AT).unwrap();
            a.stc().unwrap();
            a.call(r11).unwrap();
            a.adc(rdx, 0).unwrap();
        }
        a.dec(rcx).unwrap();
        a.jnz(top).unwrap();
        a.syscall().unwrap();
    });
    g.until_syscall();
    // 6000, 5000 and 3000 a round; a carry comes through each of the six calls and returns behind them.
    assert_eq!(g.reg(Gpr::Rax), 14_000 * ROUNDS);
    assert_eq!(g.reg(Gpr::Rdx), 12 * ROUNDS);
    assert!(g.t.stats().entries < 60, "{:?}", g.t.stats());
}

#[test]
fn rip_relative_operands_near_low_and_far() {
    for low in [false, true] {
        let mut g = Guest::at(low);
        g.asm(|a| {
            let mut value = a.create_label();
            a.mov(rax, qword_ptr(value)).unwrap();
            a.add(qword_ptr(value), 1).unwrap();
            a.mov(rdx, qword_ptr(value)).unwrap();
            a.movdqu(xmm3, xmmword_ptr(value)).unwrap();
            a.cmp(byte_ptr(value), 0x11).unwrap();
            a.lea(rsi, ptr(value)).unwrap();
            a.syscall().unwrap();
            a.nops_with_size(100).unwrap();
            a.set_label(&mut value).unwrap();
            a.dq(&[0x10, 0x77]).unwrap();
        });
        g.until_syscall();
        assert_eq!(g.reg(Gpr::Rax), 0x10);
        assert_eq!(g.reg(Gpr::Rdx), 0x11);
        assert_eq!(get(g.reg(Gpr::Rsi)), 0x11);
        assert!(g.t.state().rflags.contains(Rflags::ZF));
        assert_eq!(g.t.state().xsave.zmm(3)[8], 0x77);
    }
}

#[test]
fn faults_are_exact() {
    // (what, expected fault, registers written before)
    let mut g = Guest::new();
    g.asm(|a| {
        a.mov(eax, 7).unwrap();
        a.stc().unwrap();
        a.mov(rbx, 0x1000u64).unwrap();
        a.mov(qword_ptr(rbx + 8), rax).unwrap();
        a.mov(eax, 8).unwrap();
    });
    assert_eq!(g.run(), Exit::Exception(Fault::Pf { addr: 0x1008, code: 6 }));
    let code = g.code;
    assert_eq!(g.t.state().rip, code + 5 + 1 + 10);
    assert_eq!(g.reg(Gpr::Rax), 7);
    assert!(g.t.state().rflags.contains(Rflags::CF));

    let mut g = Guest::new();
    g.asm(|a| {
        a.xor(ecx, ecx).unwrap();
        a.div(ecx).unwrap();
    });
    assert_eq!(g.run(), Exit::Exception(Fault::De));
    assert_eq!(g.t.state().rip, g.code + 2);

    let mut g = Guest::new();
    g.asm(|a| {
        a.mov(rcx, 0x8000_0000_0000_0000u64).unwrap();
        a.mov(rax, qword_ptr(rcx)).unwrap();
    });
    assert_eq!(g.run(), Exit::Exception(Fault::Gp(0)));
    assert_eq!(g.t.state().rip, g.code + 10);

    let mut g = Guest::new();
    g.asm(|a| a.ud2().unwrap());
    assert_eq!(g.run(), Exit::Exception(Fault::Ud));
    assert_eq!(g.t.state().rip, g.code);

    // A jump to nowhere faults at its target.
    let mut g = Guest::new();
    g.asm(|a| {
        a.mov(ecx, 0x2000).unwrap();
        a.jmp(rcx).unwrap();
    });
    assert!(matches!(g.run(), Exit::Exception(Fault::Pf { addr: 0x2000, code }) if code & 0x14 == 0x14));
    assert_eq!(g.t.state().rip, 0x2000);
    assert_eq!(g.reg(Gpr::Rcx), 0x2000);

    // What may be read but not executed is no code, whatever it says: CPUID, XGETBV, a NOP.
    for bytes in [&[0x0f, 0xa2][..], &[0x0f, 0x01, 0xd0], &[0x90]] {
        let mut g = Guest::new();
        let data = g.data;
        put(data, bytes);
        g.t.state().rip = data;
        assert_eq!(g.run(), Exit::Exception(Fault::Pf { addr: data, code: 0x15 }), "{bytes:x?}");
        assert_eq!(g.t.state().rip, data);
    }

    // A branch to an address that is not canonical has not happened (SDM 2A JMP, CALL; 2B RET).
    const NOWHERE: u64 = 0x1234_5678_9abc_def0;
    type Branch = fn(&mut CodeAssembler);
    let branches: [(&str, Branch); 6] = [
        ("jmp", |a| a.jmp(rcx).unwrap()),
        ("jmp m", |a| a.jmp(qword_ptr(rdx)).unwrap()),
        ("call", |a| a.call(rcx).unwrap()),
        ("call m", |a| a.call(qword_ptr(rdx)).unwrap()),
        ("ret", |a| a.ret().unwrap()),
        ("ret n", |a| a.ret_1(16).unwrap()),
    ];
    // With an address that is known but for one high bit, too.
    for ((name, branch), bit) in branches.into_iter().flat_map(|b| [None, Some(47), Some(48), Some(63)].map(|n| (b, n)))
    {
        let mut g = Guest::new();
        g.asm(|a| {
            a.nop().unwrap();
            branch(a);
            (0..24).for_each(|_| a.nop().unwrap());
            a.syscall().unwrap();
        });
        let (top, data, code) = (g.reg(Gpr::Rsp), g.data, g.code);
        let known = code + 16;
        let mut before = g.t.state().gpr;
        for target in [known, bit.map_or(NOWHERE, |n| known ^ 1 << n)] {
            before[Gpr::Rcx as usize] = target;
            before[Gpr::Rdx as usize] = data;
            before[Gpr::R11 as usize] = 0x11;
            put(data, &target.to_le_bytes());
            put(top, &target.to_le_bytes());
            put(top - 8, &0x77u64.to_le_bytes());
            g.t.state().gpr = before;
            g.t.state().rip = code;
            if target == known {
                g.until_syscall();
            }
        }
        assert_eq!(g.run(), Exit::Exception(Fault::Gp(0)), "{name} {bit:?}");
        assert_eq!(g.t.state().rip, code + 1, "{name} {bit:?}");
        assert_eq!(g.t.state().gpr, before, "{name} {bit:?}");
        // Raptor Cove has stored where a CALL would return to.
        let stored = name.starts_with("call") && Vendor::host() == Vendor::Intel;
        assert_eq!(get(top - 8), if stored { code + 3 } else { 0x77 }, "{name} {bit:?}");
    }

    // A call whose push faults has not happened.
    let mut g = Guest::new();
    g.asm(|a| {
        a.mov(rsp, 0x3000u64).unwrap();
        a.mov(ecx, 0x55).unwrap();
        a.lea(rax, ptr(0x4000)).unwrap();
        a.call(rax).unwrap();
    });
    assert!(matches!(g.run(), Exit::Exception(Fault::Pf { addr: 0x2ff8, code: 6 })));
    assert_eq!(g.reg(Gpr::Rsp), 0x3000);
    assert_eq!(g.reg(Gpr::Rcx), 0x55);
}

#[test]
fn a_borrowed_register_is_given_back_at_a_fault() {
    // Constants out of reach of the code cache: RIP-relative in a guest in the low 2 GiB is absolute, so take one in the middle.
    let at = 0x1234_5678_0000u64;
    // SAFETY: a fresh mapping at an address nobody uses.
    let p = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        libc::mmap(at as *mut _, 8192, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    assert_eq!(p as u64, at);
    let mut g = Guest::new();
    let flat = g.mem.flat().unwrap();
    flat.insert(Vma {
        start: at,
        end: at + 4096,
        prot: Prot::all(),
        shared: false,
        name: "".into(),
        offset: 0,
        backing: None,
    });
    // SAFETY: the second page is made unreadable.
    unsafe { libc::mprotect((at + 4096) as *mut _, 4096, libc::PROT_NONE) };
    let mut code = Vec::new();
    // add [value], rax; mov rdx, [value]; mov rbx, [unreadable]: all relative to RIP.
    for (opcode, modrm, target) in [(0x01u8, 0x05u8, 0x800i32), (0x8b, 0x15, 0x800), (0x8b, 0x1d, 4096)] {
        code.extend([0x48, opcode, modrm]);
        let end = code.len() as i32 + 4;
        code.extend((target - end).to_le_bytes());
    }
    put(at, &code);
    g.t.state().rip = at;
    let regs: [u64; 16] = std::array::from_fn(|i| 0x100 + i as u64);
    g.t.state().gpr = regs;
    assert_eq!(g.run(), Exit::Exception(Fault::Pf { addr: at + 4096, code: 4 }));
    let mut expect = regs;
    expect[Gpr::Rdx as usize] = 0x100;
    assert_eq!(g.t.state().gpr, expect);
}

#[test]
fn self_modifying_code() {
    let mut g = Guest::new();
    g.asm(|a| {
        let mut top = a.create_label();
        let mut target = a.create_label();
        a.lea(rbx, ptr(target)).unwrap();
        a.mov(ecx, 10).unwrap();
        a.xor(eax, eax).unwrap();
        a.set_label(&mut top).unwrap();
        // Changes the immediate of the ADD that follows.
        a.mov(byte_ptr(rbx + 1), cl).unwrap();
        a.set_label(&mut target).unwrap();
        a.add(eax, 0x7f).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(top).unwrap();
        a.syscall().unwrap();
    });
    g.until_syscall();
    assert_eq!(g.reg(Gpr::Rax), 55);
    assert!(g.t.stats().code_writes > 0);
}

/// A page that is written often is compared instead of watched, and an operand that changes is loaded where it lies. That this is a
/// misaligned place is not the guest's doing.
#[test]
fn changed_operands_do_not_count_as_misaligned() {
    const AC: i32 = 1 << 18;
    let mut g = Guest::new();
    let place = g.code + 0x801;
    // mov eax, imm32; ret
    put(place - 1, &[0xb8, 0, 0, 0, 0, 0xc3]);
    g.asm(|a| {
        let mut top = a.create_label();
        a.mov(rcx, 100u64).expect("");
        a.mov(rbx, place).expect("");
        a.set_label(&mut top).expect("");
        a.mov(dword_ptr(rbx), ecx).expect("");
        a.call(place - 1).expect("");
        a.dec(rcx).expect("");
        a.jne(top).expect("");
        a.pushfq().expect("");
        a.or(dword_ptr(rsp), AC).expect("");
        a.popfq().expect("");
        a.call(place - 1).expect("");
        a.syscall().expect("");
    });
    g.until_syscall();
    assert_eq!(g.reg(Gpr::Rax), 1);
    assert!(g.t.state().rflags.contains(Rflags::AC));
    assert!(g.t.stats().code_writes < 60, "the page is compared by now: {:?}", g.t.stats());
}

#[test]
fn another_thread_ends_a_tight_loop_by_changing_it() {
    // Loops whose jump is short, long, and behind a conditional one.
    type Fill = fn(&mut CodeAssembler);
    let fills: [Fill; 3] = [
        |_| {},
        |a| (0..60).for_each(|_| a.lea(rdx, ptr(rdx + 0x1000)).unwrap()),
        |a| {
            let mut over = a.create_label();
            a.test(rax, 1).unwrap();
            a.jz(over).unwrap();
            a.inc(rbx).unwrap();
            a.set_label(&mut over).unwrap();
        },
    ];
    for fill in fills {
        let mut g = Guest::new();
        g.asm(|a| {
            let mut top = a.create_label();
            a.set_label(&mut top).unwrap();
            a.inc(rax).unwrap();
            a.mov(ptr(rdi), rax).unwrap();
            fill(a);
            a.jmp(top).unwrap();
            a.syscall().unwrap();
        });
        let (data, code) = (g.data, g.code);
        g.set(Gpr::Rdi, data);
        let flat = g.mem.flat().expect("flat") as *const FlatSpace as usize;
        std::thread::scope(|s| {
            s.spawn(|| {
                while get(data) < 100_000 {
                    std::thread::yield_now();
                }
                // SAFETY: the guest outlives the scope.
                let flat = unsafe { &*(flat as *const FlatSpace) };
                // INC RAX becomes SYSCALL; NOP.
                flat.write(code, &[0x0f, 0x05, 0x90]).expect("written");
            });
            g.until_syscall();
        });
        assert!(g.reg(Gpr::Rax) >= 100_000);
    }
}

#[test]
fn a_kick_ends_an_endless_loop() {
    let mut g = Guest::new();
    g.asm(|a| {
        let mut top = a.create_label();
        let mut f = a.create_label();
        a.set_label(&mut top).unwrap();
        a.inc(rax).unwrap();
        a.call(f).unwrap();
        a.jmp(top).unwrap();
        a.set_label(&mut f).unwrap();
        a.mov(rcx, rax).unwrap();
        a.mov(r11, rax).unwrap();
        a.ret().unwrap();
    });
    for _ in 0..200 {
        let kicker = g.t.kicker();
        let code = g.code;
        let thread = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_micros(300));
            kicker.kick();
        });
        assert_eq!(g.run(), Exit::Kicked);
        thread.join().unwrap();
        let rip = g.t.state().rip;
        assert!((code..code + 24).contains(&rip), "{rip:#x}");
        // Between `top` and the moves the counters differ by one, elsewhere they are equal.
        let (a, c, r) = (g.reg(Gpr::Rax), g.reg(Gpr::Rcx), g.reg(Gpr::R11));
        assert!(a - c <= 1 && a - r <= 1, "{a} {c} {r} at {:#x}", rip - code);
    }
}

#[test]
fn x87_and_vector_state_survives_exits() {
    let mut g = Guest::new();
    g.asm(|a| {
        a.fld1().unwrap();
        a.fldpi().unwrap();
        a.pcmpeqd(xmm5, xmm5).unwrap();
        a.syscall().unwrap();
        a.faddp(st1, st0).unwrap();
        a.paddd(xmm5, xmm5).unwrap();
        a.syscall().unwrap();
    });
    g.until_syscall();
    assert_eq!(g.t.state().xsave.zmm(5)[..16], [0xff; 16]);
    let next = g.t.state().rip + 2;
    g.t.state().rip = next;
    g.until_syscall();
    assert_eq!(g.t.state().xsave.zmm(5)[..4], [0xfe, 0xff, 0xff, 0xff]);
    // 1 + pi = 4.14159...: 0x4001 8487ED51 10B4611A.
    assert_eq!(g.t.state().xsave.st(0), [0x1a, 0x61, 0xb4, 0x10, 0x51, 0xed, 0x87, 0x84, 0x01, 0x40]);
}

#[test]
fn loop_and_jrcxz() {
    let mut g = Guest::new();
    g.asm(|a| {
        let mut top = a.create_label();
        let mut out = a.create_label();
        a.mov(ecx, 5).unwrap();
        a.set_label(&mut top).unwrap();
        a.inc(eax).unwrap();
        a.loop_(top).unwrap();
        a.jrcxz(out).unwrap();
        a.ud2().unwrap();
        a.set_label(&mut out).unwrap();
        a.syscall().unwrap();
    });
    g.until_syscall();
    assert_eq!(g.reg(Gpr::Rax), 5);
}

#[test]
fn fs_base_is_the_guests() {
    let mut g = Guest::new();
    let data = g.data;
    put(data + 0x28, &0xabcdu64.to_le_bytes());
    g.t.state().seg[4].base = data;
    g.asm(|a| {
        a.mov(rax, qword_ptr(0x28).fs()).unwrap();
        a.rdfsbase(rdx).unwrap();
        a.add(rdx, 8).unwrap();
        a.wrfsbase(rdx).unwrap();
        a.syscall().unwrap();
    });
    g.until_syscall();
    assert_eq!(g.reg(Gpr::Rax), 0xabcd);
    assert_eq!(g.t.state().seg[4].base, data + 8);
}

#[test]
fn a_small_cache_is_flushed() {
    let cache =
        bivisor_translator::Cache::new(Arc::new(CpuModel::host()), bivisor_translator::Policy::default(), 64 << 10)
            .unwrap();
    let mut g = Guest::new();
    let (code, stack) = (g.code, g.stack);
    let state = g.t.state().clone();
    g.t = Translator::with_cache(cache.clone());
    *g.t.state() = state;
    g.t.set_intercepts(Intercepts::SYSCALL | Intercepts::EXCEPTIONS);
    // A chain of 3000 blocks, walked twice.
    g.asm(|a| {
        for _ in 0..3000 {
            let mut next = a.create_label();
            a.inc(rax).unwrap();
            a.jmp(next).unwrap();
            a.set_label(&mut next).unwrap();
        }
        a.syscall().unwrap();
    });
    g.until_syscall();
    g.t.state().rip = code;
    g.until_syscall();
    assert_eq!(g.reg(Gpr::Rax), 6000);
    assert!(cache.stats().flushes > 0, "{:?}", cache.stats());
    assert!(g.reg(Gpr::Rsp) < stack + CODE);
}

#[test]
fn all_vector_registers_survive_exits() {
    if !std::is_x86_feature_detected!("avx512bw") {
        println!("SKIPPED: no AVX-512 here");
        return;
    }
    let mut g = Guest::new();
    let data = g.data;
    // Each register in turn is read, changed and written; every SYSCALL is a way out and in.
    g.asm(|a| {
        a.mov(rbx, data).unwrap();
        a.vmovups(zmmword_ptr(rbx), zmm20).unwrap();
        a.kmovq(qword_ptr(rbx + 64), k3).unwrap();
        a.vmovups(ymmword_ptr(rbx + 128), ymm7).unwrap();
        a.vpaddd(zmm20, zmm20, zmm20).unwrap();
        a.syscall().unwrap();
        a.kaddq(k3, k3, k3).unwrap();
        a.syscall().unwrap();
        a.vpaddd(ymm7, ymm7, ymm7).unwrap();
        a.syscall().unwrap();
        a.vpaddd(xmm7, xmm7, xmm7).unwrap();
        a.syscall().unwrap();
    });
    let pattern: [u8; 64] = std::array::from_fn(|i| i as u8);
    let double = |b: &[u8]| -> Vec<u8> {
        b.chunks(4).flat_map(|c| (u32::from_le_bytes(c.try_into().unwrap()).wrapping_mul(2)).to_le_bytes()).collect()
    };
    let s = g.t.state();
    s.xsave.set_zmm(20, pattern);
    s.xsave.set_zmm(7, pattern);
    s.xsave.set_opmask(3, 0x1234_5678_9abc_def0);
    let mut seven: Vec<u8> = pattern.to_vec();
    for step in 0..4 {
        g.until_syscall();
        let s = g.t.state();
        assert_eq!(s.xsave.zmm(20)[..], double(&pattern)[..], "{step}");
        assert_eq!(s.xsave.opmask(3), 0x1234_5678_9abc_def0 << u32::from(step > 0), "{step}");
        match step {
            2 => seven = [double(&seven[..32]), vec![0; 32]].concat(),
            3 => seven = [double(&seven[..16]), vec![0; 48]].concat(),
            _ => {}
        }
        assert_eq!(s.xsave.zmm(7)[..], seven[..], "{step}");
        s.rip += 2;
    }
    assert_eq!(get(data), 0x0706_0504_0302_0100);
    assert_eq!(get(data + 64), 0x1234_5678_9abc_def0);
    assert_eq!(get(data + 152), 0x1f1e_1d1c_1b1a_1918);
    // What the state says is initial is initial in the guest.
    g.t.state().xsave = Default::default();
    g.t.state().rip = g.code;
    put(data, &[0xff; 192]);
    g.until_syscall();
    assert_eq!([get(data), get(data + 56), get(data + 64), get(data + 128), get(data + 152)], [0; 5]);
}
