//! Small loops in 64-bit mode at CPL 0 on each engine: time per guest instruction. `cargo bench -p bivisor-bench`.

use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::CpuState;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::isa::Width;
use bivisor_emulator::mem::{GuestMemory, Ram};
use bivisor_emulator::vcpu::{Board, Exit, Vcpu};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::sync::Arc;

const CODE: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const ROOT: u64 = 0x1000;
const BUDGET: u64 = 100_000;

/// Loops that never end; RBX holds [`DATA`], RSP lies above it.
#[rustfmt::skip]
const LOOPS: &[(&str, &[u8])] = &[
    // add rax, rcx; sub rdx, rax; cmp rdx, rax; adc rsi, 3; inc rcx; jmp
    ("integer", &[0x48, 0x01, 0xc8, 0x48, 0x29, 0xc2, 0x48, 0x39, 0xc2, 0x48, 0x83, 0xd6, 0x03, 0x48, 0xff, 0xc1, 0xeb, 0xee]),
    // mov rax, [rbx]; add [rbx + 8], rax; mov [rbx + 16], eax; jmp
    ("memory", &[0x48, 0x8b, 0x03, 0x48, 0x01, 0x43, 0x08, 0x89, 0x43, 0x10, 0xeb, 0xf4]),
    // call +2; jmp start; ret
    ("call-ret", &[0xe8, 0x02, 0x00, 0x00, 0x00, 0xeb, 0xf9, 0xc3]),
    // pushfq; popfq; jmp
    ("pushf-popf", &[0x9c, 0x9d, 0xeb, 0xfc]),
    // addpd xmm0, xmm1; mulsd xmm2, xmm3; jmp
    ("sse", &[0x66, 0x0f, 0x58, 0xc1, 0xf2, 0x0f, 0x59, 0xd3, 0xeb, 0xf6]),
];

/// 16 MiB of RAM, identically mapped by 2 MiB pages, with `code` at [`CODE`].
fn guest(code: &[u8]) -> (GuestMemory, CpuState) {
    let mem = GuestMemory::Ram(Ram::new(16 << 20).expect("16 MiB"));
    mem.store(ROOT, Width::Q, (ROOT + 0x1000) | 7);
    mem.store(ROOT + 0x1000, Width::Q, (ROOT + 0x2000) | 7);
    for i in 0..8 {
        mem.store(ROOT + 0x2000 + 8 * i, Width::Q, i << 21 | 0x87);
    }
    mem.write(CODE, code).expect("inside");
    let mut cpu = CpuState::long64(0);
    cpu.cr3 = ROOT;
    cpu.rip = CODE;
    cpu.gpr[3] = DATA;
    cpu.gpr[4] = DATA + 0x1000;
    (mem, cpu)
}

fn loops(c: &mut Criterion) {
    let model = Arc::new(CpuModel::host());
    let engines: Vec<(&str, Box<dyn Vcpu>)> = vec![("interp", Box::new(Interpreter::new(model)))];
    for (engine, mut vcpu) in engines {
        let mut group = c.benchmark_group(engine);
        group.throughput(Throughput::Elements(BUDGET));
        for (name, code) in LOOPS {
            let (mem, cpu) = guest(code);
            *vcpu.state() = cpu;
            group.bench_function(*name, |b| {
                b.iter(|| {
                    let exit = vcpu.run(Board { mem: &mem, bus: &EmptyBus }, BUDGET);
                    assert_eq!(exit, Exit::Budget, "{name}");
                });
            });
        }
    }
}

criterion_group!(benches, loops);
criterion_main!(benches);
