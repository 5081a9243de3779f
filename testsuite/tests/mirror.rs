//! Loops of user code through the host's page tables, as the translator has them for long-running programs, beside the interpreter: random
//! bodies with pointers that wander over page and slot borders, into pages that may not be stored to or are not there, and back.

use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, Rflags};
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::isa::{Gpr, Width};
use bivisor_emulator::mem::{GuestMemory, Ram};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use bivisor_testsuite::random::Random;
use bivisor_translator::Translator;
use iced_x86::code_asm::*;
use std::sync::Arc;
use std::time::Duration;

/// Page tables, code, and data of 32 pages, whose first four may not be stored to.
const TABLES: u64 = 0x1000;
const CODE: u64 = 0x2_0000;
const DATA: u64 = 0x4_0000;
const PAGES: u64 = 32;
/// Where the data is seen: in the middle of a slot of 2 TiB, and around the border of two; the same in slots that share a distance, at their
/// borders with each other and with others, and in one of those and another.
const VIEWS: [[u64; 2]; 4] = [
    [0x40_0000, 0x1ff_ffff_0000],
    [0x5400_0040_0000, 0x7dff_ffff_0000],
    [0x55ff_ffff_0000, 0x57ff_ffff_0000],
    [0x40_0000, 0x7fff_0000_0000],
];
const LEN: u64 = PAGES * 0x1000;

const POINTERS: [AsmRegister64; 4] = [rbx, rcx, rsi, r12];
const VALUES: [AsmRegister64; 4] = [rax, rdx, r9, r14];

/// Maps a page for CPL 3.
fn map(mem: &GuestMemory, next: &mut u64, linear: u64, to: u64, rights: u64) {
    let mut table = TABLES;
    for shift in [39, 30, 21] {
        let at = table + (linear >> shift & 0x1ff) * 8;
        let mut entry = mem.load(at, Width::Q).expect("RAM");
        if entry == 0 {
            entry = *next | 7;
            *next += 0x1000;
            mem.store(at, Width::Q, entry).expect("RAM");
        }
        table = entry & !0xfff;
    }
    mem.store(table + (linear >> 12 & 0x1ff) * 8, Width::Q, to | rights).expect("RAM");
}

fn memory(code: &[u8], views: [u64; 2], random: &mut Random) -> GuestMemory {
    let mem = GuestMemory::Ram(Ram::shared(1 << 20).expect("1 MiB"));
    let mut next = TABLES + 0x1000;
    map(&mem, &mut next, CODE, CODE, 5);
    for view in views {
        for n in 0..PAGES {
            map(&mem, &mut next, view + n * 0x1000, DATA + n * 0x1000, if n < 4 { 5 } else { 7 });
        }
    }
    mem.write(CODE, code).expect("RAM");
    for at in (DATA..DATA + LEN).step_by(8) {
        // Now and then a pointer into one of the views.
        let v = match random.next() % 3 {
            0 => views[(random.next() % 2) as usize] + random.next() % LEN,
            _ => random.next() % 256,
        };
        mem.store(at, Width::Q, v).expect("RAM");
    }
    mem
}

fn instruction(a: &mut CodeAssembler, random: &mut Random, out: CodeLabel, other: CodeLabel) -> Result<(), IcedError> {
    let mut pick = |n: usize| (random.next() % n as u64) as usize;
    let (p, q, v) = (POINTERS[pick(4)], POINTERS[pick(4)], VALUES[pick(4)]);
    let disp = (pick(64) * 8) as i32 - 128;
    match pick(28) {
        0 => a.add(v, qword_ptr(p + disp)),
        1 => a.mov(qword_ptr(p + disp), v),
        2 => a.add(v, qword_ptr(p + r8 * 8 + disp)),
        3 => a.mov(qword_ptr(p + r8 + disp), v),
        4 => a.adc(dword_ptr(p + r8 * 4 + disp), 7),
        5 => a.add(p, disp * 4),
        6 => a.lea(q, qword_ptr(p + disp * 16)),
        7 => a.mov(p, qword_ptr(q + disp)),
        8 => a.add(r8, disp / 8),
        9 => a.push(v),
        10 => a.pop(v),
        11 => a.movzx(eax, byte_ptr(p + disp)),
        12 => a.cmp(v, qword_ptr(p + disp)),
        13 => a.jb(out),
        14 => a.mov(byte_ptr(rbx + 3), ah),
        // Short indexes, from near to as far as they reach.
        15 => a.movzx(r8d, byte_ptr(p + disp)),
        16 => a.mov(r8d, dword_ptr(p + disp)),
        17 => a.movsxd(r8, dword_ptr(p + disp)),
        18 => a.sub(r8d, disp / 8),
        // Pointers made from others, and pointers that go far in many rounds.
        19 => a.mov(p, q),
        20 => a.lea(p, qword_ptr(q + r8 * 8 + disp)),
        21 => a.add(p, r8),
        22 => a.sub(p, r8),
        23 if pick(4) == 0 => a.add(p, 0x3fff_0000),
        24 if pick(4) == 0 => a.lea(p, qword_ptr(p - 0x10_0000)),
        25 | 26 => a.jp(other),
        _ => a.movdqu(xmm0, xmmword_ptr(p + r8 * 2 + disp)),
    }
}

/// A loop, and another around it.
fn program(random: &mut Random) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (mut top, mut out, mut other) = (a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut top)?;
    for _ in 0..2 + random.next() % 7 {
        instruction(&mut a, random, out, other)?;
    }
    if random.next().is_multiple_of(2) {
        a.dec(r15)?;
        a.jne(top)?;
    } else {
        a.sub(r15, 1)?;
        a.lea(r8, qword_ptr(r8 + 8))?;
        a.ja(top)?;
    }
    a.jmp(out)?;
    a.set_label(&mut other)?;
    a.dec(r15)?;
    a.jle(out)?;
    for _ in 0..random.next() % 5 {
        instruction(&mut a, random, out, top)?;
    }
    a.jmp(top)?;
    a.set_label(&mut out)?;
    a.lahf()?;
    a.syscall()?;
    a.assemble(CODE)
}

#[test]
fn loops_do_the_same_through_the_hosts_page_tables() {
    let model = Arc::new(CpuModel::host());
    let mut interpreter = Interpreter::new(model.clone());
    let mut translator = Translator::new(model).expect("executable memory");
    translator.set_mirror_after(Some(Duration::ZERO));
    let (mut faults, mut ends) = (0, 0);
    for seed in 0..2400 {
        let mut random = Random::new(seed);
        let views = VIEWS[seed as usize % VIEWS.len()];
        let code = program(&mut random).expect("it can be assembled");
        let mut s = CpuState::long64(3);
        (s.cr3, s.rip, s.rflags) = (TABLES, CODE, Rflags::FIXED);
        for r in POINTERS {
            let view = views[(random.next() % 2) as usize];
            s.gpr[Gpr::from_iced(r.into()).expect("one") as usize] = view + 0x4000 + random.next() % (LEN - 0x5000);
        }
        s.gpr[Gpr::Rsp as usize] = views[1] + LEN / 2;
        s.gpr[Gpr::R8 as usize] = random.next() % 64;
        s.gpr[Gpr::R15 as usize] = 1 + random.next() % 3000;
        let of_memory = random.next();
        let run = |vcpu: &mut dyn Vcpu| {
            let mem = memory(&code, views, &mut Random::new(of_memory));
            *vcpu.state() = s.clone();
            vcpu.set_intercepts(Intercepts::EXCEPTIONS | Intercepts::SYSCALL);
            let exit = vcpu.run(Board { mem: &mem, bus: &EmptyBus }, u64::MAX);
            let mut data = vec![0; LEN as usize];
            mem.read(DATA, &mut data).expect("RAM");
            let c = vcpu.state();
            (exit, c.gpr, c.rip, c.rflags, c.cr2, data)
        };
        let (wanted, seen) = (run(&mut interpreter), run(&mut translator));
        assert_eq!(
            (wanted.0, wanted.1, wanted.2, wanted.3, wanted.4),
            (seen.0, seen.1, seen.2, seen.3, seen.4),
            "{seed}: {code:02x?}"
        );
        assert!(wanted.5 == seen.5, "{seed}: memory differs: {code:02x?}");
        match wanted.0 {
            Exit::Exception(_) => faults += 1,
            Exit::Intercept { .. } => ends += 1,
            exit => panic!("{seed}: {exit:?}"),
        }
    }
    println!("{faults} faults, {ends} ends");
    assert!(faults > 50 && ends > 50, "both are met: {faults} {ends}");
}
