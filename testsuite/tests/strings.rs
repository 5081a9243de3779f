//! Repeated string instructions over pages that lie anywhere in memory, and up to one that is not there, on interpreter and translator:
//! each element is done before the next (SDM 2B REP; 1 7.3.9). What is wanted is worked out byte by byte.

use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, Fault, Rflags};
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::isa::{Gpr, Width};
use bivisor_emulator::mem::{GuestMemory, PAGE_SIZE, Ram};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use bivisor_translator::Translator;
use std::sync::Arc;

const CODE: u64 = 0x1_0000;
const TABLES: u64 = 0x5_0000;
const SIZE: u64 = 1 << 20;
/// Pages that are next to each other for the guest, and where they are; then comes one that is not there.
const PAGES: u64 = 0x4_0000;
const AT: [u64; 4] = [0x8_3000, 0x8_1000, 0x8_7000, 0x8_2000];
const END: u64 = PAGES + AT.len() as u64 * PAGE_SIZE;

fn memory(code: &[u8]) -> GuestMemory {
    let mem = GuestMemory::Ram(Ram::shared(SIZE).expect("1 MiB"));
    let put = |at: u64, v: u64| mem.store(at, Width::Q, v).expect("in RAM");
    for level in 0..3 {
        put(TABLES + 0x1000 * level, (TABLES + 0x1000 * (level + 1)) | 3);
    }
    let entry = |page: u64| TABLES + 0x3000 + page / PAGE_SIZE * 8;
    put(entry(CODE), CODE | 3);
    for (n, at) in AT.into_iter().enumerate() {
        put(entry(PAGES + n as u64 * PAGE_SIZE), at | 3);
        let bytes: Vec<u8> = (0..PAGE_SIZE).map(|i| (i * 7 + i / 251 + n as u64 * 31) as u8).collect();
        mem.write(at, &bytes).expect("in RAM");
    }
    mem.write(CODE, code).expect("in RAM");
    mem
}

fn physical(linear: u64) -> Option<usize> {
    let page = linear.checked_sub(PAGES)? / PAGE_SIZE;
    AT.get(page as usize).map(|at| (at + linear % PAGE_SIZE) as usize)
}

fn bytes(mem: &GuestMemory) -> Vec<u8> {
    let mut all = vec![0; SIZE as usize];
    mem.read(0, &mut all).expect("in RAM");
    // The processor notes accesses in the page tables.
    all[TABLES as usize..][..0x4000].fill(0);
    all
}

/// RCX, RSI, RDI.
type Registers = [u64; 3];

/// What is in memory and registers then, and where a byte is not there.
fn wanted(moves: bool, width: u64, down: bool, start: Registers) -> (Vec<u8>, Registers, Option<u64>) {
    let mut all = bytes(&memory(&[]));
    let [mut count, mut from, mut to] = start;
    let step = if down { width.wrapping_neg() } else { width };
    while count > 0 {
        let place = |base: u64| (0..width).map(|n| physical(base + n).ok_or(base + n)).collect::<Result<Vec<_>, u64>>();
        let source = if moves { place(from) } else { Ok(Vec::new()) };
        let (source, destination) = match source.and_then(|s| Ok((s, place(to)?))) {
            Ok(both) => both,
            Err(missing) => return (all, [count, from, to], Some(missing)),
        };
        let element: Vec<u8> = if moves {
            source.iter().map(|n| all[*n]).collect()
        } else {
            0x1122_3344_5566_7788u64.to_le_bytes()[..width as usize].to_vec()
        };
        destination.iter().zip(element).for_each(|(n, v)| all[*n] = v);
        count -= 1;
        from = if moves { from.wrapping_add(step) } else { from };
        to = to.wrapping_add(step);
    }
    (all, [count, from, to], None)
}

fn check(engine: &mut dyn Vcpu, moves: bool, width: u64, down: bool, start: Registers) {
    let what = format!("moves {moves} width {width} down {down} {start:x?}");
    let opcode = if moves { 0xa4 } else { 0xaa } | u8::from(width > 1);
    let code: &[u8] = if width == 8 { &[0xf3, 0x48, opcode, 0xf4] } else { &[0xf3, opcode, 0xf4] };
    let mem = memory(code);
    let mut s = CpuState::long64(0);
    (s.cr3, s.rip, s.rflags) = (TABLES, CODE, Rflags::FIXED);
    s.rflags.set(Rflags::DF, down);
    let registers = [Gpr::Rcx, Gpr::Rsi, Gpr::Rdi].map(|r| r as usize);
    s.gpr = std::array::from_fn(|n| 0x1122_3344_5566_7788 + n as u64);
    registers.iter().zip(start).for_each(|(r, v)| s.gpr[*r] = v);
    let others = s.gpr;
    *engine.state() = s;
    engine.set_intercepts(Intercepts::EXCEPTIONS);
    let exit = engine.run(Board { mem: &mem, bus: &EmptyBus }, u64::MAX);
    let (memory, after, missing) = wanted(moves, width, down, start);
    let s = engine.state();
    assert_eq!(registers.map(|r| s.gpr[r]), after, "{what}");
    for n in (0..16).filter(|n| !registers.contains(n)) {
        assert_eq!(s.gpr[n], others[n], "{what}: register {n}");
    }
    match missing {
        None => assert_eq!(exit, Exit::Halt, "{what}"),
        Some(at) => {
            assert!(matches!(exit, Exit::Exception(Fault::Pf { addr, .. }) if addr == at), "{what}: {exit:x?}, {at:x}");
            assert_eq!(s.rip, CODE, "{what}");
        }
    }
    assert!(bytes(&mem)[PAGE_SIZE as usize * 0x80..] == memory[PAGE_SIZE as usize * 0x80..], "{what}: memory");
}

fn check_all(engine: &mut dyn Vcpu) {
    for (width, down) in [(1, false), (8, false), (1, true)] {
        let counts = [0, 1, 7, 8, 255, 256, 257, 500, 511, 512, 513, 1025, 3000, 4095, 4096, 4097, 9000];
        for count in counts.map(|n| n / width) {
            for (from, to) in [
                (PAGES, PAGES + 2 * PAGE_SIZE),
                (PAGES + 0x808, PAGES + 0x1ff8),
                (PAGES + 0xff8, PAGES + 0x2010),
                (PAGES + 0x1ff0, PAGES + 0x1ff8),
                (PAGES + 0x1008, PAGES + 0x0ff0),
                (END - 0x108, PAGES + 0x800),
                (PAGES + 0x800, END - 0x10),
                (END - 8, END - 0x10),
            ] {
                let odd = if width == 1 { count % 3 } else { 0 };
                for moves in [true, false] {
                    check(engine, moves, width, down, [count, from + odd, to + odd * 2]);
                }
            }
        }
    }
}

#[test]
fn interpreter() {
    check_all(&mut Interpreter::new(Arc::new(CpuModel::host())));
}

#[test]
fn translator() {
    check_all(&mut Translator::new(Arc::new(CpuModel::host())).expect("executable memory"));
}
