//! Page tables that the translator walks without leaving its cache (SDM 3A 4.5 to 4.8): user code that loads and stores here and there while
//! its kernel changes the tables meets the same page faults as under the interpreter, with the same registers, and leaves the same in memory
//! and in the tables, accessed and dirty flags included.

#[path = "common/kicks.rs"]
mod kicks;
#[path = "common/levels.rs"]
mod levels;
#[path = "common/rings.rs"]
mod rings;

use bivisor_emulator::bus::Bus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::isa::Width;
use bivisor_emulator::mem::{GuestMemory, PAGE_SIZE};
use bivisor_emulator::vcpu::Vcpu;
use bivisor_translator::Translator;
use iced_x86::code_asm::*;
use levels::{KERNEL, NOTES, STACK, TABLES, USER};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const ROUNDS: i32 = 20_000;
const NOTE: u64 = 16;
/// Pages of the user's, and one more behind them that is always there.
const WINDOW: i32 = 0x20_0000;
const COUNT: i32 = 64;
/// What can be mapped there: one page after the other.
const PAGES: i32 = 0x30_0000;
/// Of each of two sets of tables: the entry of the table of these pages, and the table.
const DIRECTORY: u64 = 0x2008;
const TABLE: u64 = 0x3000;
const SET: u64 = 0x4000;
/// The table of all that lies below them, in small pages too: what is no walk would begin the walks anew.
const LOW: u64 = TABLES + 2 * SET;
/// What is noted of page faults: CR2, error code, RIP, RFLAGS.
const FAULTS: u64 = 0x18_0000;
const FAULT: u64 = 32;
const HANDLER: u64 = 0x10_8000;
const GDT: u64 = 0x4_1000;
const IDT: u64 = 0x4_0000;
const TSS: u64 = 0x4_2000;
const FLAGS: u64 = 0x4_3000;
/// Of a page's entry (SDM 3A table 4-20): all there is; no accessed or dirty flag; not to be stored to; absent; the supervisor's; global;
/// not to be executed; a reserved bit; dirty, but not accessed; PAT, PCD and PWT.
const OF_PAGE: [u64; 16] =
    [0x67, 0x07, 0x27, 0x65, 0x25, 0x66, 0x63, 0x167, 0x107, 1 << 63 | 0x67, 1 << 51 | 0x67, 0x47, 0xe7, 0x7f, 0, 0x67];
/// Of the entry above it.
const OF_TABLE: [u64; 4] = [0x27, 0x07, 0x25, 0x23];

#[derive(Default)]
struct End(AtomicBool);

impl Bus for End {
    fn write_port(&self, _: u16, _: &[u8]) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn assembled(at: u64, f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("64-bit code");
    f(&mut a).and_then(|()| a.assemble(at)).expect("it can be assembled")
}

type Access = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// What is done at RDI.
const ACCESSES: [Access; 16] = [
    |a| a.mov(byte_ptr(rdi), bl),
    |a| a.add(rax, qword_ptr(rdi)),
    |a| a.add(dword_ptr(rdi + 4), eax),
    |a| {
        a.movups(xmm0, xmmword_ptr(rdi))?;
        a.paddq(xmm1, xmm0)
    },
    |a| {
        a.mov(qword_ptr(rdi + 8), rbx)?;
        a.add(rax, qword_ptr(rdi))
    },
    |a| a.xchg(qword_ptr(rdi), rax),
    |a| a.inc(byte_ptr(WINDOW + 0x5123)),
    |a| {
        a.mov(r10, rsp)?;
        a.mov(rsp, rdi)?;
        a.push(rax)?;
        a.push(7)?;
        a.pop(rdx)?;
        a.mov(rsp, r10)
    },
    |a| {
        a.mov(edx, 24)?;
        a.mov(r8w, word_ptr(rdi + rdx * 4 - 96))?;
        a.add(ax, r8w)
    },
    |a| a.bts(dword_ptr(rdi), ebx),
    |a| a.lock().cmpxchg(dword_ptr(rdi), ebx),
    |a| a.push(qword_ptr(rdi)).and_then(|()| a.pop(rdx)),
    |a| a.movups(xmmword_ptr(rdi), xmm1),
    |a| {
        a.mov(rsi, rdi)?;
        a.xor(rdi, 0x5000)?;
        a.movsq()?;
        a.xor(esi, esi)
    },
    |a| {
        a.mov(ecx, 40)?;
        a.rep().stosb()
    },
    |a| a.adc(rax, qword_ptr(rdi)),
];

/// RBX counts rounds down, R12 is where the next note goes, R13 is random, R15 is where the next page fault goes.
fn user() -> Vec<u8> {
    assembled(USER, |a| {
        let (mut again, mut done, mut stay) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(ebx, ROUNDS)?;
        a.mov(r12, NOTES)?;
        a.mov(r13, 0x1234_5678_9abc_def1u64)?;
        a.mov(r15, FAULTS)?;
        a.set_label(&mut again)?;
        a.mov(rcx, 0x5851_f42d_4c95_7f2du64)?;
        a.imul_2(r13, rcx)?;
        a.add(r13, 0x3c6e)?;
        a.mov(rdi, r13)?;
        a.shr(rdi, 20)?;
        a.and(edi, COUNT * PAGE_SIZE as i32 - 1)?;
        a.add(edi, WINDOW)?;
        // Over the end of a page, a quarter of them.
        a.bt(r13, 60)?;
        a.sbb(ecx, ecx)?;
        a.bt(r13, 61)?;
        a.sbb(edx, edx)?;
        a.and(ecx, edx)?;
        a.and(ecx, PAGE_SIZE as i32 - 8)?;
        a.or(edi, ecx)?;
        a.mov(ecx, r13d)?;
        a.shr(ecx, 12)?;
        a.and(ecx, 15)?;
        for (n, access) in (0i32..).zip(ACCESSES) {
            let mut other = a.create_label();
            a.cmp(ecx, n)?;
            a.jne(other)?;
            // Flags that the access has to leave alone, or needs.
            a.cmp(r13b, bl)?;
            access(a)?;
            a.jmp(done)?;
            a.set_label(&mut other)?;
        }
        a.nop()?;
        a.set_label(&mut done)?;
        a.pushfq()?;
        a.pop(rdx)?;
        a.mov(qword_ptr(r12), rax)?;
        a.mov(qword_ptr(r12 + 8), rdx)?;
        a.test(ebx, 3)?;
        a.jne(stay)?;
        a.syscall()?;
        a.set_label(&mut stay)?;
        levels::repeat(a, again, NOTE)
    })
}

/// Changes the entry of a page, and sometimes that of the table.
fn kernel() -> Vec<u8> {
    assembled(KERNEL, |a| {
        let (mut entry, mut end, mut back) = (a.create_label(), a.create_label(), a.create_label());
        levels::begin(a, 0x4_4700, entry)?;
        a.sysretq()?;
        a.set_label(&mut entry)?;
        a.mov(r9, rcx)?;
        a.test(esi, esi)?;
        a.jne(end)?;
        let mut field = |r: AsmRegister64, shift: u32, count: i32| {
            a.mov(r, r13)?;
            a.shr(r, shift)?;
            a.and(r, count - 1)
        };
        field(rdx, 40, COUNT)?;
        field(rcx, 46, 16)?;
        field(r8, 50, 8)?;
        field(r10, 53, 4)?;
        a.shl(r8, 12)?;
        a.add(r8, PAGES)?;
        a.or(r8, qword_ptr(FLAGS + rcx * 8))?;
        a.mov(rdi, cr3)?;
        a.mov(qword_ptr(rdi + rdx * 8 + TABLE as i32), r8)?;
        a.shl(rdx, 12)?;
        a.invlpg(byte_ptr(rdx + WINDOW))?;
        a.test(ebx, 63)?;
        a.jne(back)?;
        a.mov(r8, qword_ptr(FLAGS + 128 + r10 * 8))?;
        a.lea(r8, ptr(rdi + r8 + TABLE as i32))?;
        a.mov(qword_ptr(rdi + DIRECTORY as i32), r8)?;
        a.xor(rdi, (TABLES ^ (TABLES + SET)) as i32)?;
        a.mov(cr3, rdi)?;
        a.set_label(&mut back)?;
        a.mov(rcx, r9)?;
        a.sysretq()?;
        a.set_label(&mut end)?;
        a.out(0xf4, al)?;
        a.cli()?;
        a.hlt()
    })
}

/// Notes the page fault and makes the page one that may be accessed.
fn handler() -> Vec<u8> {
    assembled(HANDLER, |a| {
        let mut fresh = a.create_label();
        for r in [rax, rcx, rdx, rdi] {
            a.push(r)?;
        }
        a.mov(rax, cr2)?;
        a.mov(qword_ptr(r15), rax)?;
        for (to, from) in [(8, 32), (16, 40), (24, 56)] {
            a.mov(rcx, qword_ptr(rsp + from))?;
            a.mov(qword_ptr(r15 + to), rcx)?;
        }
        a.add(r15, FAULT as i32)?;
        a.mov(rdi, cr3)?;
        a.lea(rcx, ptr(rdi + TABLE as i32 + 7))?;
        a.mov(qword_ptr(rdi + DIRECTORY as i32), rcx)?;
        a.lea(rcx, ptr(rax - WINDOW))?;
        a.shr(rcx, 12)?;
        a.and(ecx, COUNT - 1)?;
        a.mov(edx, ecx)?;
        a.and(edx, 7)?;
        a.shl(edx, 12)?;
        a.add(edx, PAGES + 7)?;
        a.test(r15d, FAULT as i32)?;
        a.je(fresh)?;
        a.or(edx, 0x60)?;
        a.set_label(&mut fresh)?;
        a.mov(qword_ptr(rdi + rcx * 8 + TABLE as i32), rdx)?;
        a.invlpg(byte_ptr(rax))?;
        for r in [rdi, rdx, rcx, rax] {
            a.pop(r)?;
        }
        a.add(rsp, 8)?;
        a.iretq()
    })
}

/// How an engine is run.
#[derive(Clone, Copy, Debug)]
enum By {
    /// Until it ends.
    Itself,
    /// In so many instructions at a time.
    Budget(u64),
    /// While another thread kicks it.
    Kicks,
}

/// What is left: notes, page faults, the tables, the pages.
fn run(vcpu: &mut dyn Vcpu, by: By) -> [Vec<u8>; 4] {
    let (mem, mut s) = levels::machine(&kernel(), &user());
    let put = |at: u64, v: u64| mem.store(at, Width::Q, v).expect("in RAM");
    mem.write(HANDLER, &handler()).expect("in RAM");
    for n in 0..512 {
        put(LOW + 8 * n, n * PAGE_SIZE + 0x67);
    }
    for set in [TABLES, TABLES + SET] {
        put(set, set + 0x1007);
        put(set + 0x1000, set + 0x2007);
        put(set + 0x2000, LOW + 0x67);
        put(set + DIRECTORY, set + TABLE + 7);
        put(set + TABLE + 8 * COUNT as u64, PAGES as u64 + 0x67);
    }
    for (at, flags) in (FLAGS..).step_by(8).zip(OF_PAGE.into_iter().chain(OF_TABLE)) {
        put(at, flags);
    }
    rings::prepare(&mem, &mut s, [GDT, IDT, TSS], STACK - 0x100, [(14, HANDLER)]);
    *vcpu.state() = s;
    let end = End::default();
    let budget = if let By::Budget(n) = by { n } else { u64::MAX };
    let ended = || end.0.load(Ordering::Relaxed);
    let run = |vcpu: &mut dyn Vcpu| levels::notes(vcpu, budget, &mem, &end, &ended, ROUNDS as u64 * NOTE);
    let notes = if matches!(by, By::Kicks) { kicks::during(vcpu, run) } else { run(vcpu) };
    let bytes = |at: u64, len: u64| read(&mem, at, len);
    [notes, bytes(FAULTS, 0x20_0000 - FAULTS), bytes(TABLES, 2 * SET), bytes(PAGES as u64, 8 * PAGE_SIZE)]
}

fn read(mem: &GuestMemory, at: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    mem.read(at, &mut bytes).expect("in RAM");
    bytes
}

#[test]
fn walks_in_the_cache_are_the_interpreters() {
    const PARTS: [&str; 4] = ["notes", "page faults", "tables", "pages"];
    let model = Arc::new(CpuModel::host());
    let wanted = run(&mut Interpreter::new(model.clone()), By::Itself);
    let faults: Vec<u64> = (0..wanted[1].len() / 8).map(|n| levels::word(&wanted[1], n)).collect();
    let codes: Vec<u64> = faults.chunks(4).take_while(|f| f[0] != 0).map(|f| f[1]).collect();
    println!("{} page faults", codes.len());
    // Absent, forbidden and reserved, by loads and by stores: SDM 3A 4.7.
    for code in [4, 6, 5, 7, 13, 15] {
        assert!(codes.iter().filter(|c| **c == code).count() > 20, "{code}");
    }
    assert!(codes.len() < faults.len() / 4, "room for all");
    let mut walks = 0;
    for (by, mirror) in [
        (By::Itself, None),
        (By::Itself, Some(Duration::ZERO)),
        (By::Itself, Some(Duration::from_micros(50))),
        (By::Budget(7), None),
        (By::Budget(100_000), None),
        (By::Kicks, None),
    ] {
        let mut translator = Translator::new(model.clone()).expect("executable memory");
        translator.set_mirror_after(mirror);
        let seen = run(&mut translator, by);
        for ((seen, wanted), part) in seen.iter().zip(&wanted).zip(PARTS) {
            for n in 0..wanted.len() / 8 {
                let (seen, wanted) = (levels::word(seen, n), levels::word(wanted, n));
                assert_eq!(seen, wanted, "{by:?}, {mirror:?}: {part}, word {n}: {seen:#x}, {wanted:#x}");
            }
        }
        println!("{by:?}, {mirror:?}: {} of {} misses", translator.stats().walks, translator.stats().tlb_misses);
        walks = walks.max(translator.stats().walks);
    }
    assert!(walks > ROUNDS as u64 / 8, "{walks} walks");
}
