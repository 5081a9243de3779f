//! IRETQ to the user where the translator does it without leaving its cache (SDM 2A IRET): frames, flags and descriptors that change from
//! round to round leave the same in memory under the interpreter, which goes its own way each time.

#[path = "common/levels.rs"]
mod levels;
#[path = "common/rings.rs"]
mod rings;

use bivisor_emulator::bus::Bus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{Cr4, Segment};
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::isa::Seg;
use bivisor_emulator::vcpu::Vcpu;
use bivisor_translator::Translator;
use iced_x86::Code;
use iced_x86::code_asm::*;
use levels::{KERNEL, NOTES, STACK, USER, word};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const IDT: u64 = 0x4_0000;
const GDT: u64 = 0x4_1000;
const TSS: u64 = 0x4_2000;
const USER_STACK: u64 = 0x8_0000;
const ROUNDS: i32 = 1600;
const NOTE: u64 = 192;
/// Selectors; SYSRET's order, and a second segment for the stack.
const KDATA: u16 = 0x10;
const UDATA: u16 = 0x23;
const UCODE: u16 = 0x2b;
const UDATA2: u16 = 0x33;

/// Where the handler of an exception is.
fn place(vector: u8) -> u64 {
    KERNEL + 0x800 + 0x100 * u64::from(vector)
}

/// The end.
#[derive(Default)]
struct Device(AtomicU64);

impl Bus for Device {
    fn write_port(&self, _: u16, _: &[u8]) {
        self.0.store(1, Ordering::Relaxed);
    }
}

/// RBX counts rounds down, R12 is where the next note goes.
fn user(wide: bool) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut again = a.create_label();
    a.mov(ebx, ROUNDS)?;
    a.mov(r12, NOTES)?;
    a.set_label(&mut again)?;
    a.movq(xmm1, rbx)?;
    a.paddq(xmm0, xmm1)?;
    if wide {
        // String functions of C libraries use ZMM16 and above and opmask registers; in a few rounds what is above XMM too.
        a.vpaddq(zmm31, zmm31, zmm0)?;
        a.vpaddq(zmm16, zmm16, zmm31)?;
        a.vpbroadcastq(zmm17, rbx)?;
        a.vpcmpuq(k7, zmm31, zmm17, 1)?;
        sometimes(&mut a, (64, 33), |a| a.vpbroadcastq(zmm5, rbx))?;
        sometimes(&mut a, (64, 50), |a| a.vzeroupper())?;
    }
    a.syscall()?;
    a.pushfq()?;
    a.pop(qword_ptr(r12))?;
    a.mov(eax, ss)?;
    a.mov(dword_ptr(r12 + 8), eax)?;
    a.mov(eax, ds)?;
    a.mov(dword_ptr(r12 + 12), eax)?;
    a.mov(eax, cs)?;
    a.mov(dword_ptr(r12 + 16), eax)?;
    a.mov(qword_ptr(r12 + 24), rsp)?;
    a.movq(qword_ptr(r12 + 32), xmm0)?;
    if wide {
        a.kmovq(rax, k7)?;
        a.mov(dword_ptr(r12 + 20), eax)?;
        a.vpaddq(zmm18, zmm16, zmm17)?;
        a.vmovups(zmmword_ptr(r12 + 64), zmm18)?;
        a.vmovups(zmmword_ptr(r12 + 128), zmm5)?;
    }
    levels::repeat(&mut a, again, NOTE)?;
    a.assemble(USER)
}

/// In rounds whose number is `rest` modulo `modulus`.
fn sometimes(
    a: &mut CodeAssembler,
    (modulus, rest): (i32, i32),
    f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut over = a.create_label();
    a.mov(eax, ebx)?;
    a.and(eax, modulus - 1)?;
    a.cmp(eax, rest)?;
    a.jne(over)?;
    f(a)?;
    a.set_label(&mut over)
}

/// Goes to the user, and is called by it until RSI is not 0.
fn kernel() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (mut entry, mut end, mut go) = (a.create_label(), a.create_label(), a.create_label());
    levels::begin(&mut a, 0x4_4700, entry)?;
    a.mov(r10, USER_STACK)?;
    a.mov(rsp, STACK)?;
    a.mov(ebx, 1)?;
    a.mov(r12, NOTES)?;
    a.jmp(go)?;
    a.set_label(&mut entry)?;
    a.mov(r10, rsp)?;
    a.mov(rsp, STACK)?;
    a.test(esi, esi)?;
    a.jne(end)?;
    a.set_label(&mut go)?;
    // Status flags, RF and ID as the round's number has them; IF stays.
    a.imul_3(eax, ebx, 0x6d2b)?;
    a.and(eax, 0x21_08d5)?;
    a.or(eax, 0x202)?;
    a.mov(r9d, eax)?;
    sometimes(&mut a, (16, 3), |a| a.or(r9d, 0x100))?;
    sometimes(&mut a, (32, 22), |a| a.or(r9d, 0x4_0000))?;
    a.mov(r8d, UDATA as i32)?;
    sometimes(&mut a, (8, 5), |a| a.mov(r8d, UDATA2 as i32))?;
    // What only higher privilege may have is taken away from the user.
    sometimes(&mut a, (8, 6), |a| {
        a.mov(eax, KDATA as i32)?;
        a.mov(ds, eax)
    })?;
    // The present bit of the user's code segment, a bit of it that is for software, a null selector, no address: all but the second fault.
    let descriptor = |n: u64| qword_ptr(GDT + n);
    sometimes(&mut a, (32, 13), |a| a.btr(descriptor(u64::from(UCODE & !7)), 47))?;
    sometimes(&mut a, (32, 14), |a| a.btc(descriptor(u64::from(UCODE & !7)), 52))?;
    sometimes(&mut a, (32, 15), |a| a.btr(descriptor(u64::from(UDATA & !7)), 47))?;
    sometimes(&mut a, (32, 17), |a| a.xor(r8d, r8d))?;
    sometimes(&mut a, (32, 18), |a| a.bts(rcx, 63))?;
    a.push(r8)?;
    a.push(r10)?;
    a.push(r9)?;
    a.push(i32::from(UCODE))?;
    a.push(rcx)?;
    // NT in RFLAGS.
    sometimes(&mut a, (32, 20), |a| {
        a.pushfq()?;
        a.or(dword_ptr(rsp), 0x4000)?;
        a.popfq()
    })?;
    // Something else has the vector registers for a while.
    sometimes(&mut a, (1024, 21), |a| a.paddq(xmm0, xmm0))?;
    a.iretq()?;
    a.set_label(&mut end)?;
    a.out(0xf4, al)?;
    a.cli()?;
    a.hlt()?;
    a.assemble(KERNEL)
}

/// The handler of an exception: notes that it came and with what, repairs what is the matter, and returns.
fn handler(vector: u8) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let with_code = vector >= 10;
    a.add(qword_ptr(r12 + 40), 1)?;
    if with_code {
        a.pop(rax)?;
        a.mov(dword_ptr(r12 + 48), eax)?;
    }
    a.mov(byte_ptr(r12 + 56), i32::from(vector))?;
    a.and(dword_ptr(rsp + 16), !0x4100)?;
    let mut user = a.create_label();
    if with_code {
        // The frame that was not taken lies above ours.
        a.mov(rax, qword_ptr(rsp + 24))?;
        a.btr(qword_ptr(rax), 63)?;
        a.cmp(dword_ptr(rax + 32), 0)?;
        a.jne(user)?;
        a.mov(qword_ptr(rax + 32), i32::from(UDATA))?;
        a.set_label(&mut user)?;
        for s in [UCODE, UDATA] {
            a.bts(qword_ptr(GDT + u64::from(s & !7)), 47)?;
        }
    }
    a.iretq()?;
    a.assemble(place(vector))
}

/// Runs it, with the registers of AVX-512 if they are there; gives the notes.
fn run(vcpu: &mut dyn Vcpu, wide: bool) -> Vec<u8> {
    let (kernel, user) = (kernel().expect("it can be assembled"), user(wide).expect("it can be assembled"));
    let (mem, mut s) = levels::machine(&kernel, &user);
    let handlers = [1u8, 11, 12, 13].map(|vector| (vector, place(vector)));
    for (vector, at) in handlers {
        mem.write(at, &handler(vector).expect("it can be assembled")).expect("in RAM");
    }
    rings::prepare(&mem, &mut s, [GDT, IDT, TSS], STACK - 0x100, handlers);
    s.seg[Seg::Ds as usize] = Segment::unusable(0);
    if wide {
        s.cr4 |= Cr4::OSXSAVE;
        s.xcr0 = 0xe7;
    }
    *vcpu.state() = s;
    let device = Device::default();
    let ended = || device.0.load(Ordering::Relaxed) != 0;
    levels::notes(vcpu, u64::MAX, &mem, &device, &ended, ROUNDS as u64 * NOTE + NOTE)
}

fn compare(wide: bool) {
    let model = Arc::new(CpuModel::host());
    let wanted = run(&mut Interpreter::new(model.clone()), wide);
    let mut mirrored = Translator::new(model.clone()).expect("executable memory");
    mirrored.set_mirror_after(Some(Duration::ZERO));
    assert!(run(&mut mirrored, wide) == wanted, "through the host's page tables");
    let mut translator = Translator::new(model).expect("executable memory");
    let seen = run(&mut translator, wide);
    let words = NOTE as usize / 8;
    for n in 0..wanted.len() / 8 {
        assert_eq!(word(&seen, n), word(&wanted, n), "round {}, word {} of the note", n / words, n % words);
    }
    // Of 32 rounds five meet an exception at IRETQ, and two more one behind it.
    let count = |vector: u64| (0..ROUNDS as usize).filter(|r| word(&wanted, words * r + 7) == vector).count();
    let counts = [1, 11, 12, 13].map(count);
    let rounds = ROUNDS as usize / 32;
    assert_eq!(counts, [2, 1, 1, 3].map(|n| n * rounds), "#DB, #NP, #SS, #GP");
    let calls = translator.called().get(&Code::Iretq).copied().unwrap_or_default();
    println!("{calls} of {ROUNDS} by the interpreter");
    assert!(calls > 0 && calls < ROUNDS as u64 * 7 / 8, "{calls} calls");
}

#[test]
fn returns_to_the_user_are_the_interpreters() {
    compare(false);
}

#[test]
fn all_vector_registers_are_the_users() {
    if !std::is_x86_feature_detected!("avx512bw") {
        println!("SKIPPED: the host has no AVX-512");
        return;
    }
    compare(true);
}
