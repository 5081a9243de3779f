//! 64-bit user code over the host's address space: system calls, exceptions with their codes, kicks, steps, rights.

mod common;

use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::Fault;
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::mem::Prot;
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use bivisor_kvm_backend::KvmVcpu;
use common::{Flat, process_vm, user};

const ALL: Intercepts = Intercepts::SYSCALL
    .union(Intercepts::INT_N)
    .union(Intercepts::EXCEPTIONS)
    .union(Intercepts::SYSENTER)
    .union(Intercepts::HLT);
const RW: Prot = Prot::READ.union(Prot::WRITE);

struct Guest {
    flat: Flat,
    vcpu: KvmVcpu,
    code: u64,
    stack: u64,
}

impl Guest {
    /// `None`: skipped.
    fn new(code: &[u8]) -> Option<Guest> {
        let vm = process_vm()?;
        let flat = Flat::new();
        let code = flat.code(code);
        let stack = flat.map(4, RW);
        let mut vcpu = vm.vcpu();
        vcpu.set_intercepts(ALL);
        *vcpu.state() = user(code, stack + 0x4000);
        Some(Guest { flat, vcpu, code, stack })
    }

    fn run(&mut self) -> Exit {
        self.budget(u64::MAX)
    }

    fn budget(&mut self, budget: u64) -> Exit {
        let exit = self.vcpu.run(Board { mem: &self.flat.mem, bus: &EmptyBus }, budget);
        if exit == Exit::Unsupported {
            panic!("unsupported: {:?}", self.vcpu.reason());
        }
        exit
    }

    fn gpr(&mut self, r: Gpr) -> u64 {
        self.vcpu.state().gpr[r as usize]
    }

    fn set(&mut self, r: Gpr, v: u64) {
        self.vcpu.state().gpr[r as usize] = v;
    }

    fn rip(&mut self) -> u64 {
        self.vcpu.state().rip
    }

    fn syscall(&self, at: u64) -> Exit {
        Exit::Intercept { what: Intercepts::SYSCALL, next_rip: self.code + at + 2, vector: 0 }
    }
}

#[test]
fn registers_go_in_and_out_and_a_system_call_leaves() {
    // 1: add rax, rbx; dec rcx; jnz 1b; syscall; then again with what the monitor answers: mov r15, rax; syscall
    let Some(mut g) =
        Guest::new(&[0x48, 0x01, 0xd8, 0x48, 0xff, 0xc9, 0x75, 0xf8, 0x0f, 0x05, 0x49, 0x89, 0xc7, 0x0f, 0x05])
    else {
        return;
    };
    for (i, r) in Gpr::ALL.iter().enumerate().filter(|(i, _)| *i != Gpr::Rsp as usize) {
        g.set(*r, 0x1111_0000_0000_0000 + i as u64);
    }
    g.set(Gpr::Rax, 5);
    g.set(Gpr::Rbx, 3);
    g.set(Gpr::Rcx, 1_000_000);
    assert_eq!(g.run(), g.syscall(8));
    assert_eq!(g.gpr(Gpr::Rax), 3_000_005);
    assert_eq!(g.gpr(Gpr::R15), 0x1111_0000_0000_000f);
    assert_eq!(g.gpr(Gpr::Rsp), g.stack + 0x4000);
    assert_eq!(g.rip(), g.code + 8);
    assert_eq!(g.vcpu.state().rflags.bits(), 0x246, "IF, ZF, PF of the last DEC");
    g.set(Gpr::Rax, 77);
    g.vcpu.state().rip = g.code + 10;
    assert_eq!(g.run(), g.syscall(13));
    assert_eq!(g.gpr(Gpr::R15), 77);
}

#[test]
fn vector_registers_survive_and_can_be_changed() {
    if !std::is_x86_feature_detected!("avx512f") {
        return common::skip("the host has no AVX-512");
    }
    // vpaddd zmm3, zmm3, zmm3; vpaddd zmm20, zmm20, zmm20; knotb... : kmovw k1, ecx; addps xmm1, xmm1; fld1; syscall; jmp start
    let code = [
        0x62, 0xf1, 0x65, 0x48, 0xfe, 0xdb, // vpaddd zmm3, zmm3, zmm3
        0x62, 0xa1, 0x5d, 0x40, 0xfe, 0xe4, // vpaddd zmm20, zmm20, zmm20
        0xc5, 0xf8, 0x92, 0xc9, // kmovw k1, ecx
        0xd9, 0xe8, // fld1
        0x0f, 0x05, 0xeb, 0xea,
    ];
    let Some(mut g) = Guest::new(&code) else { return };
    g.set(Gpr::Rcx, 0xa5);
    let x = &mut g.vcpu.state().xsave;
    x.set_zmm(3, std::array::from_fn(|i| u8::from(i.is_multiple_of(4)) * (i / 4 + 1) as u8));
    x.set_zmm(20, std::array::from_fn(|i| u8::from(i.is_multiple_of(4)) * (i / 4 + 30) as u8));
    for round in 1..=3u8 {
        assert!(matches!(g.run(), Exit::Intercept { what: Intercepts::SYSCALL, .. }));
        let code = g.code;
        let s = g.vcpu.state();
        assert_eq!(
            s.xsave.zmm(3),
            std::array::from_fn(|i| (u8::from(i.is_multiple_of(4)) * (i / 4 + 1) as u8) << round)
        );
        let f = |i: usize| u32::from(i.is_multiple_of(4)) * ((i as u32 / 4 + 30) << round);
        let words: [u8; 64] = std::array::from_fn(|i| f(i & !3).to_le_bytes()[i % 4]);
        assert_eq!(s.xsave.zmm(20), words);
        assert_eq!(s.xsave.st(0), [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f], "fld1");
        if round == 1 {
            assert_eq!(s.xsave.opmask(1), 0xa5);
        }
        s.rip = code;
    }
    // Changed by the monitor.
    let s = g.vcpu.state();
    s.xsave.set_zmm(3, [0; 64]);
    s.xsave.set_mxcsr(0x9fc0);
    assert!(matches!(g.run(), Exit::Intercept { .. }));
    assert_eq!(g.vcpu.state().xsave.zmm(3), [0; 64]);
    assert_eq!(g.vcpu.state().xsave.mxcsr(), 0x9fc0);
}

#[test]
fn exceptions_leave_with_vector_code_and_state() {
    let absent = 0x1234_5000u32;
    let at = absent.to_le_bytes();
    let read = [&[0x8b, 0x04, 0x25][..], &at].concat();
    let write = [&[0x89, 0x04, 0x25][..], &at].concat();
    let pf = |code| Fault::Pf { addr: u64::from(absent), code };
    let cases: &[(&str, &[u8], Exit, u64)] = &[
        ("ud2", &[0x0f, 0x0b], Exit::Exception(Fault::Ud), 0),
        ("hlt", &[0x90, 0xf4], Exit::Exception(Fault::Gp(0)), 1),
        ("cli", &[0xfa], Exit::Exception(Fault::Gp(0)), 0),
        ("in", &[0xe4, 0x10], Exit::Exception(Fault::Gp(0)), 0),
        ("div", &[0x31, 0xc9, 0xf7, 0xf1], Exit::Exception(Fault::De), 2),
        ("read of nothing", &read, Exit::Exception(pf(4)), 0),
        ("write of nothing", &write, Exit::Exception(pf(6)), 0),
        // mov rax, 0x9000000000000000; mov eax, [rax]
        ("non-canonical", &[0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0x90, 0x8b, 0], Exit::Exception(Fault::Gp(0)), 10),
        // mov rsp, 0x9000000000000000; push rax
        ("stack", &[0x48, 0xbc, 0, 0, 0, 0, 0, 0, 0, 0x90, 0x50], Exit::Exception(Fault::Ss(0)), 10),
        // mov ds, ax with a selector beyond every table: the error code is the selector.
        ("bad selector", &[0xb8, 0xf0, 0xff, 0, 0, 0x8e, 0xd8], Exit::Exception(Fault::Gp(0xfff0)), 5),
        // sub rsp, 8; movl [rsp], 0x1f80 without the zero-divide mask; ldmxcsr [rsp]; xorps, divss
        (
            "SIMD exception",
            &[
                0x48, 0x83, 0xec, 8, 0xc7, 0x04, 0x24, 0, 0x1d, 0, 0, 0x0f, 0xae, 0x14, 0x24, 0xb8, 1, 0, 0, 0, 0xf3,
                0x0f, 0x2a, 0xc0, 0x0f, 0x57, 0xc9, 0xf3, 0x0f, 0x5e, 0xc1,
            ],
            Exit::Exception(Fault::Xm),
            27,
        ),
    ];
    for (name, code, exit, at) in cases {
        let Some(mut g) = Guest::new(code) else { return };
        assert_eq!(g.run(), *exit, "{name}");
        assert_eq!(g.rip(), g.code + at, "{name}: RIP");
        assert_eq!(g.vcpu.state().cpl(), 3, "{name}");
        if *name != "stack" && *name != "SIMD exception" {
            assert_eq!(g.gpr(Gpr::Rsp), g.stack + 0x4000, "{name}: RSP");
        }
        // The guest can go on afterwards.
        let next = g.flat.code(&[0x0f, 0x05]);
        g.vcpu.state().rip = next;
        assert_eq!(
            g.run(),
            Exit::Intercept { what: Intercepts::SYSCALL, next_rip: next + 2, vector: 0 },
            "{name}: after"
        );
    }
}

#[test]
fn execution_needs_the_right_and_losing_it_counts() {
    let Some(mut g) = Guest::new(&[0xff, 0xe0]) else { return };
    let page = g.flat.map(1, RW);
    g.flat.write(page, &[0x0f, 0x05]);
    let start = g.code;
    let call = |g: &mut Guest| {
        g.set(Gpr::Rax, page);
        g.vcpu.state().rip = start;
        g.run()
    };
    let done = Exit::Intercept { what: Intercepts::SYSCALL, next_rip: page + 2, vector: 0 };
    let refused = Exit::Exception(Fault::Pf { addr: page, code: 0x15 });
    assert_eq!(call(&mut g), refused);
    g.flat.protect(page, 1, Prot::READ | Prot::EXEC);
    assert_eq!(call(&mut g), done);
    g.flat.protect(page, 1, Prot::READ);
    assert_eq!(call(&mut g), refused);
    g.flat.protect(page, 1, Prot::READ | Prot::EXEC);
    assert_eq!(call(&mut g), done);
    g.flat.unmap(page, 1);
    assert_eq!(call(&mut g), Exit::Exception(Fault::Pf { addr: page, code: 0x14 }));
}

#[test]
fn rights_taken_away_are_noticed() {
    // mov [rax], rbx; mov rbx, [rax]; syscall
    let Some(mut g) = Guest::new(&[0x48, 0x89, 0x18, 0x48, 0x8b, 0x18, 0x0f, 0x05]) else { return };
    let page = g.flat.map(16, RW);
    let start = g.code;
    let poke = |g: &mut Guest, v| {
        g.set(Gpr::Rax, page + 0x1008);
        g.set(Gpr::Rbx, v);
        g.vcpu.state().rip = start;
        g.run()
    };
    let done = g.syscall(6);
    assert_eq!(poke(&mut g, 1), done);
    g.flat.protect(page, 16, Prot::READ);
    assert_eq!(poke(&mut g, 2), Exit::Exception(Fault::Pf { addr: page + 0x1008, code: 7 }));
    assert_eq!(g.rip(), start);
    assert_eq!(g.flat.read_u64(page + 0x1008), 1);
    g.flat.protect(page, 16, RW);
    assert_eq!(poke(&mut g, 3), done);
    assert_eq!(g.flat.read_u64(page + 0x1008), 3);
    g.flat.protect(page, 16, Prot::empty());
    let exit = poke(&mut g, 4);
    assert!(matches!(exit, Exit::Exception(Fault::Pf { addr, .. }) if addr == page + 0x1008), "{exit:?}");
    g.flat.unmap(page, 16);
    assert_eq!(poke(&mut g, 4), Exit::Exception(Fault::Pf { addr: page + 0x1008, code: 6 }));
}

#[test]
fn a_page_with_cached_code_is_written_through_the_interpreter() {
    let Some(mut g) = Guest::new(&[0x48, 0x89, 0x18, 0x0f, 0x05]) else { return };
    let page = g.flat.map(1, RW);
    g.flat.mem_watch(page);
    let before = g.flat.mem.code_generation(page);
    g.set(Gpr::Rax, page);
    g.set(Gpr::Rbx, 99);
    assert_eq!(g.run(), g.syscall(3));
    assert_eq!(g.flat.read_u64(page), 99);
    assert_ne!(g.flat.mem.code_generation(page), before);
}

impl Flat {
    fn mem_watch(&self, page: u64) {
        self.mem.watch_code(page);
    }
}

#[test]
fn software_interrupts_leave_at_the_instruction() {
    for (code, n) in [
        (&[0xcd, 0x80][..], 0x80),
        (&[0xcc], 3),
        (&[0xcd, 3], 3),
        (&[0xcd, 4], 4),
        (&[0xcd, 0x21], 0x21),
        (&[0xcd, 13], 13),
        (&[0xcd, 14], 14),
        (&[0xf1], 1),
    ] {
        let Some(mut g) = Guest::new(code) else { return };
        let next_rip = g.code + code.len() as u64;
        assert_eq!(g.run(), Exit::Intercept { what: Intercepts::INT_N, next_rip, vector: n }, "{code:x?}");
        assert_eq!(g.rip(), g.code);
    }
}

#[test]
fn a_kick_ends_an_endless_loop() {
    let Some(mut g) = Guest::new(&[0xeb, 0xfe]) else { return };
    for _ in 0..20 {
        let kicker = g.vcpu.kicker();
        let other = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(3));
            kicker.kick();
        });
        assert_eq!(g.run(), Exit::Kicked);
        assert_eq!(g.rip(), g.code);
        other.join().expect("no panic");
    }
    // One that comes before the run ends it as well.
    g.vcpu.kicker().kick();
    assert_eq!(g.run(), Exit::Kicked);
}

#[test]
fn single_steps_are_exact() {
    // mov eax, 1; add eax, eax; push rax; pop rbx; jmp +0; nop
    let Some(mut g) = Guest::new(&[0xb8, 1, 0, 0, 0, 1, 0xc0, 0x50, 0x5b, 0xeb, 0, 0x90, 0x0f, 0x05]) else { return };
    for (at, rax) in [(5, 1), (7, 2), (8, 2), (9, 2), (11, 2), (12, 2)] {
        assert_eq!(g.budget(1), Exit::Budget);
        assert_eq!(g.rip(), g.code + at);
        assert_eq!(g.gpr(Gpr::Rax), rax);
        assert_eq!(g.vcpu.state().rflags.bits() & 0x100, 0, "no trap flag is left");
    }
    assert_eq!(g.gpr(Gpr::Rbx), 2);
    assert_eq!(g.budget(1), g.syscall(12));
    g.vcpu.state().rip = g.code;
    assert_eq!(g.budget(3), Exit::Budget);
    assert_eq!(g.rip(), g.code + 8);
}

#[test]
fn a_trap_flag_of_the_guest_s_own_traps_after_the_next_instruction() {
    // pushfq; or dword [rsp], 0x100; popfq; nop; nop
    let Some(mut g) = Guest::new(&[0x9c, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d, 0x90, 0x90]) else { return };
    for at in [10, 11] {
        let exit = g.run();
        assert!(matches!(exit, Exit::Exception(Fault::Db(causes)) if causes & 0x4000 != 0), "{exit:?}");
        assert_eq!(g.rip(), g.code + at);
        assert_eq!(g.vcpu.state().rflags.bits() & 0x100, 0x100, "the guest's trap flag stays");
    }
}

#[test]
fn a_large_budget_ends_an_endless_loop() {
    let Some(mut g) = Guest::new(&[0xeb, 0xfe]) else { return };
    assert_eq!(g.budget(10_000_000), Exit::Budget);
    assert_eq!(g.rip(), g.code);
}

#[test]
fn segment_bases_go_both_ways() {
    // mov rax, fs:[0]; mov rbx, gs:[8]; wrfsbase rcx; syscall
    let code = [
        0x64, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0, 0x65, 0x48, 0x8b, 0x1c, 0x25, 8, 0, 0, 0, 0xf3, 0x48, 0x0f, 0xae,
        0xd1, 0x0f, 0x05,
    ];
    let Some(mut g) = Guest::new(&code) else { return };
    let data = g.flat.map(1, RW);
    g.flat.write(data, &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3]);
    g.vcpu.state().seg[4].base = data;
    g.vcpu.state().seg[5].base = data + 8;
    g.set(Gpr::Rcx, 0x7000_1234);
    assert_eq!(g.run(), g.syscall(23));
    assert_eq!((g.gpr(Gpr::Rax), g.gpr(Gpr::Rbx)), (1, 3));
    assert_eq!(g.vcpu.state().seg[4].base, 0x7000_1234);
    assert_eq!(g.vcpu.state().seg[5].base, data + 8);
}

#[test]
fn large_memory_is_filled_in_windows() {
    // 1: mov [rdi], rdi; add rdi, 4096; dec rcx; jnz 1b; syscall
    let Some(mut g) =
        Guest::new(&[0x48, 0x89, 0x3f, 0x48, 0x81, 0xc7, 0, 0x10, 0, 0, 0x48, 0xff, 0xc9, 0x75, 0xf1, 0x0f, 0x05])
    else {
        return;
    };
    let pages = 40 << 8;
    let at = g.flat.map(pages, RW);
    g.set(Gpr::Rdi, at);
    g.set(Gpr::Rcx, pages);
    let start = std::time::Instant::now();
    assert_eq!(g.run(), g.syscall(15));
    println!("{} us a page", start.elapsed().as_micros() as f64 / pages as f64);
    for i in (0..pages).step_by(97) {
        assert_eq!(g.flat.read_u64(at + i * 4096), at + i * 4096);
    }
}

#[test]
fn the_child_of_a_fork_gets_a_machine_of_its_own() {
    // inc rax; syscall
    let Some(mut g) = Guest::new(&[0x48, 0xff, 0xc0, 0x0f, 0x05]) else { return };
    assert_eq!(g.run(), g.syscall(3));
    let start = g.code;
    g.vcpu.state().rip = start;
    g.set(Gpr::Rax, 41);
    assert_eq!(
        common::in_child(|| {
            for i in 0..3u64 {
                let exit = g.vcpu.run(Board { mem: &g.flat.mem, bus: &EmptyBus }, u64::MAX);
                if exit != g.syscall(3) || g.gpr(Gpr::Rax) != 42 + i {
                    return 1;
                }
                g.vcpu.state().rip = start;
            }
            // And the grandchild another one.
            common::in_child(|| {
                let exit = g.vcpu.run(Board { mem: &g.flat.mem, bus: &EmptyBus }, u64::MAX);
                if exit == g.syscall(3) && g.gpr(Gpr::Rax) == 45 { 7 } else { 2 }
            })
        }),
        7
    );
    // The parent's goes on working.
    assert_eq!(g.run(), g.syscall(3));
    assert_eq!(g.gpr(Gpr::Rax), 42);
}

#[test]
fn threads_share_the_page_tables_and_reuse_vcpus() {
    let Some(vm) = process_vm() else { return };
    let flat = Flat::new();
    // lock inc qword [rdi]; dec rcx; jnz; syscall
    let code = flat.code(&[0xf0, 0x48, 0xff, 0x07, 0x48, 0xff, 0xc9, 0x75, 0xf7, 0x0f, 0x05]);
    let counter = flat.map(1, RW);
    for _ in 0..3 {
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    let mut vcpu = vm.vcpu();
                    vcpu.set_intercepts(ALL);
                    *vcpu.state() = user(code, 0);
                    vcpu.state().gpr[Gpr::Rdi as usize] = counter;
                    vcpu.state().gpr[Gpr::Rcx as usize] = 10_000;
                    let exit = vcpu.run(Board { mem: &flat.mem, bus: &EmptyBus }, u64::MAX);
                    assert!(
                        matches!(exit, Exit::Intercept { what: Intercepts::SYSCALL, .. }),
                        "{exit:?} {:?}",
                        vcpu.reason()
                    );
                });
            }
        });
    }
    assert_eq!(flat.read_u64(counter), 120_000);
}
