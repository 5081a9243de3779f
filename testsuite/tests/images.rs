//! XSAVE and XRSTOR where the translator does them without leaving its cache (SDM 1 13.7, 13.8): a kernel that saves what its user left in
//! the registers and gives it something else leaves the same in memory under the interpreter, which does each by itself.

#[path = "common/kicks.rs"]
mod kicks;
#[path = "common/levels.rs"]
mod levels;

use bivisor_emulator::bus::Bus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::xsave::{Layout, component};
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::isa::Width;
use bivisor_emulator::mem::PAGE_SIZE;
use bivisor_emulator::vcpu::Vcpu;
use bivisor_translator::Translator;
use iced_x86::Code;
use iced_x86::code_asm::*;
use levels::{KERNEL, NOTES, TABLES, USER};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const ROUNDS: i32 = 2000;
const NOTE: u64 = 16;
/// Pages that are next to each other for the guest, and where they are.
const IMAGES: u64 = 0x20_0000;
const AT: [u64; 4] = [0x30_3000, 0x30_1000, 0x30_7000, 0x30_2000];
/// An image of XSAVEC.
const COMPACT: u64 = 0x8_0000;
/// One of components that are all initial.
const INITIAL: u64 = 0x8_2000;

#[derive(Default)]
struct End(AtomicBool);

impl Bus for End {
    fn write_port(&self, _: u16, _: &[u8]) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn has(components: u64) -> bool {
    Layout::host().components & components == components
}

/// RBX counts rounds down, R12 is where the next note goes. In some rounds it uses YMM, ZMM and opmask registers, in some x87's, in some it
/// gives back what is above XMM.
fn user() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (mut again, mut low, mut plain, mut narrow) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.mov(ebx, ROUNDS)?;
    a.mov(r12, NOTES)?;
    a.set_label(&mut again)?;
    a.movq(xmm1, rbx)?;
    a.paddq(xmm0, xmm1)?;
    a.test(ebx, 5)?;
    a.jne(low)?;
    if has(component::AVX) {
        a.vpaddq(ymm3, ymm3, ymm0)?;
        a.vperm2f128(ymm4, ymm3, ymm3, 1)?;
    }
    if has(component::AVX512) {
        a.vpaddq(zmm20, zmm20, zmm0)?;
        a.vpbroadcastq(zmm5, rbx)?;
        a.kmovw(k3, ebx)?;
    }
    a.set_label(&mut low)?;
    a.test(ebx, 24)?;
    a.jne(plain)?;
    a.mov(dword_ptr(r12), ebx)?;
    a.fild(dword_ptr(r12))?;
    a.fstp(st1)?;
    a.set_label(&mut plain)?;
    if has(component::AVX) {
        a.test(ebx, 7)?;
        a.jne(narrow)?;
        a.vzeroupper()?;
        a.set_label(&mut narrow)?;
        a.nop()?;
    }
    a.syscall()?;
    // What the kernel gave it.
    a.movq(qword_ptr(r12), xmm0)?;
    levels::repeat(&mut a, again, NOTE)?;
    a.assemble(USER)
}

/// Saves to an image that begins at any multiple of 64, and loads what it saved some time ago, or only some components of it, or an image in
/// the compacted format, or one of all initial components.
fn kernel() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut label = || a.create_label();
    let (mut entry, mut end, mut all, mut older, mut fresh, mut done) =
        (label(), label(), label(), label(), label(), label());
    levels::begin(&mut a, 0x4_0601, entry)?;
    a.sysretq()?;
    a.set_label(&mut entry)?;
    a.mov(r9, rcx)?;
    a.mov(qword_ptr(r12 + 8), r11)?;
    a.test(esi, esi)?;
    a.jne(end)?;
    a.imul_3(r8d, ebx, 0x9c0)?;
    a.and(r8d, 0x37c0)?;
    // What fits below the end of the fourth page.
    a.cmp(r8d, 0x3400)?;
    let mut fits = a.create_label();
    a.jb(fits)?;
    a.sub(r8d, 0x1000)?;
    a.set_label(&mut fits)?;
    a.add(r8, IMAGES as i32)?;
    // Images lie over each other: without a header of another.
    for n in 0..8 {
        a.mov(qword_ptr(r8 + 512 + 8 * n), 0)?;
    }
    a.mov(edx, -1)?;
    a.mov(eax, -1)?;
    a.test(ebx, 0x70)?;
    a.jne(all)?;
    a.mov(eax, 6)?;
    a.set_label(&mut all)?;
    a.cmp(eax, ebx)?;
    a.xsave64(ptr(r8))?;
    // Flags as they were.
    a.pushfq()?;
    a.pop(r10)?;
    a.xor(qword_ptr(r12 + 8), r10)?;
    a.add(dword_ptr(r8 + 160), 3)?;
    a.mov(eax, -1)?;
    a.test(ebx, 3)?;
    a.jne(older)?;
    a.mov(r8, INITIAL)?;
    a.xrstor64(ptr(r8))?;
    a.jmp(done)?;
    a.set_label(&mut older)?;
    a.test(ebx, 12)?;
    a.jne(fresh)?;
    a.mov(r8, COMPACT)?;
    a.xsavec64(ptr(r8))?;
    a.xrstor64(ptr(r8))?;
    a.jmp(done)?;
    a.set_label(&mut fresh)?;
    a.xrstor64(ptr(r8))?;
    a.set_label(&mut done)?;
    a.mov(rcx, r9)?;
    a.mov(r11d, 0x202)?;
    a.sysretq()?;
    a.set_label(&mut end)?;
    a.out(0xf4, al)?;
    a.cli()?;
    a.hlt()?;
    a.assemble(KERNEL)
}

/// Runs it; gives the notes, and all images.
fn run(vcpu: &mut dyn Vcpu, kicked: bool) -> (Vec<u8>, Vec<u8>) {
    let (kernel, user) = (kernel().expect("it can be assembled"), user().expect("it can be assembled"));
    let (mem, mut s) = levels::machine(&kernel, &user);
    s.xcr0 = Layout::host().components;
    let put = |at: u64, v: u64| mem.store(at, Width::Q, v).expect("in RAM");
    put(TABLES + 0x2008, TABLES + 0x3007);
    for (n, at) in AT.into_iter().enumerate() {
        put(TABLES + 0x3000 + 8 * n as u64, at | 0x67);
    }
    *vcpu.state() = s;
    let end = End::default();
    let ended = || end.0.load(Ordering::Relaxed);
    let run = |vcpu: &mut dyn Vcpu| levels::notes(vcpu, u64::MAX, &mem, &end, &ended, ROUNDS as u64 * NOTE);
    let notes = if kicked { kicks::during(vcpu, run) } else { run(vcpu) };
    let mut images = vec![0; 6 * PAGE_SIZE as usize];
    for (part, at) in images.chunks_mut(PAGE_SIZE as usize).zip(AT.into_iter().chain([COMPACT, INITIAL])) {
        mem.read(at, part).expect("in RAM");
    }
    (notes, images)
}

#[test]
fn images_in_the_cache_are_the_interpreters() {
    let model = Arc::new(CpuModel::host());
    if !model.supports(Code::Xsavec64_mem) {
        println!("skipped: the host CPU has no XSAVEC");
        return;
    }
    let (notes, images) = run(&mut Interpreter::new(model.clone()), false);
    let mut mirrored = Translator::new(model.clone()).expect("executable memory");
    mirrored.set_mirror_after(Some(Duration::ZERO));
    let mut translator = Translator::new(model.clone()).expect("executable memory");
    let mut kicked = Translator::new(model).expect("executable memory");
    for (engine, what) in [(&mut translator, "TLB"), (&mut mirrored, "mirror"), (&mut kicked, "kicked")] {
        let (seen, also) = run(engine, what == "kicked");
        for n in 0..notes.len() / 8 {
            assert_eq!(levels::word(&seen, n), levels::word(&notes, n), "{what}: round {}, word {}", n / 2, n % 2);
        }
        for n in 0..images.len() / 8 {
            assert_eq!(
                levels::word(&also, n),
                levels::word(&images, n),
                "{what}: page {}, {:#x}",
                n / 512,
                n % 512 * 8
            );
        }
        // Left to the interpreter: what asks for some components only, and an x87 state that translated code has made; at first each.
        let called = engine.called();
        println!("{what}: {called:?}");
        let calls = |code| called.get(&code).copied().unwrap_or(0);
        assert!(calls(Code::Xsave64_mem) < ROUNDS as u64 / 2, "{called:?}");
        assert!(calls(Code::Xrstor64_mem) < ROUNDS as u64 / 20, "{called:?}");
    }
}
