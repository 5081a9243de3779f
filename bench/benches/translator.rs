//! What the translator does apart from running translated code, in processes: ways in and out, indirect jumps, returns, system calls,
//! translation, code that is written. `cargo bench -p bivisor-bench --bench translator`.

use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, Rflags};
use bivisor_emulator::host::signal;
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::linux::table;
use bivisor_emulator::mem::{FlatSpace, GuestMemory, Prot, Vma};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use bivisor_translator::Translator;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use memmap2::MmapMut;
use std::sync::Arc;

const SIZE: usize = 256 << 10;
/// How often a loop does what is measured.
const ROUNDS: u64 = 1000;
/// A system call that there is not: the way out.
const END: u32 = 4095;

/// Code in memory of our own, which is the guest's too.
struct Guest {
    mem: GuestMemory,
    vcpu: Translator,
    code: MmapMut,
    _stack: MmapMut,
}

impl Guest {
    fn new(assemble: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Guest {
        let space = FlatSpace::new();
        let [mut code, stack] = [(); 2].map(|()| MmapMut::map_anon(SIZE).expect("memory"));
        for (map, prot) in [(&code, Prot::all()), (&stack, Prot::READ | Prot::WRITE)] {
            let start = map.as_ptr() as u64;
            let end = start + SIZE as u64;
            space.insert(Vma { start, end, prot, shared: false, name: "".into(), offset: 0, backing: None });
        }
        let start = code.as_ptr() as u64;
        let mut a = CodeAssembler::new(64).expect("64-bit code");
        assemble(&mut a).expect("encodable");
        let bytes = a.assemble(start).expect("encodable");
        code[..bytes.len()].copy_from_slice(&bytes);
        let mut vcpu = Translator::new(Arc::new(CpuModel::host())).expect("executable memory");
        vcpu.set_intercepts(Intercepts::SYSCALL | Intercepts::EXCEPTIONS);
        vcpu.set_direct(table::direct());
        *vcpu.state() = CpuState::long64(3);
        vcpu.state().rflags = Rflags::FIXED | Rflags::IF;
        vcpu.state().gpr[Gpr::Rsp as usize] = stack.as_ptr() as u64 + SIZE as u64 - 256;
        signal::attach();
        Guest { mem: GuestMemory::Flat(space), vcpu, code, _stack: stack }
    }

    /// From the start of the code to its end.
    fn run(&mut self) {
        self.vcpu.state().rip = self.code.as_ptr() as u64;
        let exit = self.vcpu.run(Board { mem: &self.mem, bus: &EmptyBus }, u64::MAX);
        assert!(matches!(exit, Exit::Intercept { what: Intercepts::SYSCALL, .. }), "{exit:?}");
    }
}

fn end(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(eax, END)?;
    a.syscall()
}

/// What `body` emits, [`ROUNDS`] times; RBX counts.
fn looped(
    a: &mut CodeAssembler,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(ebx, ROUNDS as u32)?;
    a.set_label(&mut top)?;
    body(a)?;
    a.dec(ebx)?;
    a.jne(top)?;
    end(a)
}

fn loops(c: &mut Criterion) {
    type Body = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let bodies: [(&str, Body); 5] = [
        ("jump", |a| {
            let mut next = a.create_label();
            a.jmp(next)?;
            a.set_label(&mut next)
        }),
        ("indirect jump", |a| {
            // Two targets in turn.
            let (mut even, mut odd, mut table) = (a.create_label(), a.create_label(), a.create_label());
            a.lea(rax, qword_ptr(even))?;
            a.lea(rdx, qword_ptr(odd))?;
            a.test(ebx, 1)?;
            a.cmovne(rax, rdx)?;
            a.jmp(rax)?;
            a.set_label(&mut even)?;
            a.jmp(table)?;
            a.set_label(&mut odd)?;
            a.nop()?;
            a.set_label(&mut table)?;
            a.nop()
        }),
        ("call and return", |a| {
            let (mut function, mut over) = (a.create_label(), a.create_label());
            a.call(function)?;
            a.jmp(over)?;
            a.set_label(&mut function)?;
            a.ret()?;
            a.set_label(&mut over)?;
            a.nop()
        }),
        ("system call", |a| {
            a.mov(eax, libc::SYS_getppid as u32)?;
            a.syscall()
        }),
        ("code written", |a| {
            // The immediate operand of an instruction further on in the same page.
            let (mut changed, mut over) = (a.create_label(), a.create_label());
            a.lea(rdx, qword_ptr(changed))?;
            a.mov(dword_ptr(rdx + 1), ebx)?;
            a.call(changed)?;
            a.jmp(over)?;
            a.set_label(&mut changed)?;
            a.mov(eax, 1)?;
            a.ret()?;
            a.set_label(&mut over)?;
            a.nop()
        }),
    ];
    let mut group = c.benchmark_group("translator");
    group.throughput(Throughput::Elements(ROUNDS));
    for (name, body) in bodies {
        let mut guest = Guest::new(|a| looped(a, body));
        group.bench_function(name, |b| b.iter(|| guest.run()));
    }
    group.finish();
}

/// In and out again.
fn dispatch(c: &mut Criterion) {
    let mut guest = Guest::new(end);
    c.bench_function("translator/dispatch", |b| b.iter(|| guest.run()));
}

/// Blocks of ten instructions, each run once.
fn translation(c: &mut Criterion) {
    const BLOCKS: u64 = 1000;
    let fresh = || {
        Guest::new(|a| {
            for n in 0..BLOCKS as i32 {
                let mut next = a.create_label();
                a.mov(rax, qword_ptr(rsp + 8))?;
                a.add(rax, n)?;
                a.lea(rcx, qword_ptr(rax + rax * 2))?;
                a.mov(qword_ptr(rsp + 8), rcx)?;
                a.movzx(edx, cl)?;
                a.shl(edx, 3)?;
                a.xor(esi, esi)?;
                a.test(edx, edx)?;
                a.cmp(edx, 0x1000)?;
                a.jae(next)?;
                a.set_label(&mut next)?;
            }
            end(a)
        })
    };
    let mut group = c.benchmark_group("translator");
    group.throughput(Throughput::Elements(10 * BLOCKS));
    group.bench_function("translation", |b| b.iter_batched_ref(fresh, Guest::run, BatchSize::PerIteration));
    group.finish();
}

criterion_group!(benches, loops, dispatch, translation);
criterion_main!(benches);
