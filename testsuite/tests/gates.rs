//! SYSCALL, SYSRET, IN and OUT where the translator does them without leaving its cache (SDM 2B SYSCALL, SYSRET): a guest of two levels that
//! notes flags, selectors and vector registers leaves the same in memory under the interpreter, which goes its own way each time.

#[path = "common/levels.rs"]
mod levels;

use bivisor_emulator::bus::Bus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::vcpu::Vcpu;
use bivisor_translator::Translator;
use iced_x86::code_asm::*;
use levels::{KERNEL, NOTES, USER, word};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// XSAVE's image.
const IMAGE: u64 = 0x8_0000;
const ROUNDS: i32 = 600;
const NOTE: u64 = 64;

/// A counter, and the end.
#[derive(Default)]
struct Device {
    count: AtomicU64,
    end: AtomicU64,
}

impl Bus for Device {
    fn read_port(&self, port: u16, data: &mut [u8]) {
        let v = self.count.fetch_add(7, Ordering::Relaxed).wrapping_mul(u64::from(port) | 1);
        data.copy_from_slice(&v.to_le_bytes()[..data.len()]);
    }
    fn write_port(&self, port: u16, data: &[u8]) {
        if port == 0xf4 {
            self.end.store(1, Ordering::Relaxed);
        }
        self.count.fetch_add(u64::from(data[0]) + data.len() as u64, Ordering::Relaxed);
    }
}

/// RBX counts rounds down, R12 is where the next note goes.
fn user() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut again = a.create_label();
    a.mov(ebx, ROUNDS)?;
    a.mov(r12, NOTES)?;
    a.set_label(&mut again)?;
    // Any status flags; AC in four of eight rounds.
    a.mov(eax, ebx)?;
    a.imul_3(eax, eax, 0x6d2b)?;
    a.and(eax, 0x8d5)?;
    a.mov(ecx, ebx)?;
    a.and(ecx, 4)?;
    a.shl(ecx, 16)?;
    a.or(eax, ecx)?;
    a.or(eax, 0x202)?;
    a.movq(xmm1, rbx)?;
    a.paddq(xmm0, xmm1)?;
    a.push(rax)?;
    a.popfq()?;
    a.syscall()?;
    a.pushfq()?;
    a.pop(qword_ptr(r12 + 32))?;
    a.mov(qword_ptr(r12 + 40), r11)?;
    a.movq(qword_ptr(r12 + 48), xmm0)?;
    levels::repeat(&mut a, again, NOTE)?;
    a.assemble(USER)
}

/// Goes to the user, and is called by it until RSI is not 0.
fn kernel() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (mut entry, mut plain, mut end, mut quiet, mut quick) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label(), a.create_label());
    levels::begin(&mut a, 0x4_0601, entry)?;
    a.sysretq()?;
    a.set_label(&mut entry)?;
    a.pushfq()?;
    a.pop(qword_ptr(r12))?;
    a.mov(qword_ptr(r12 + 8), r11)?;
    a.mov(qword_ptr(r12 + 16), rcx)?;
    a.mov(r8d, cs)?;
    a.mov(r9d, ss)?;
    a.shl(r9, 16)?;
    a.or(r8, r9)?;
    a.mov(qword_ptr(r12 + 24), r8)?;
    // IA32_TSC_AUX by WRMSR, seen by RDTSCP and RDMSR.
    a.mov(r8, rcx)?;
    a.mov(ecx, 0xc000_0103u32)?;
    a.lea(eax, ptr(rbx * 4 + 5))?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.rdtscp()?;
    a.mov(edi, ecx)?;
    a.mov(ecx, 0xc000_0103u32)?;
    a.rdmsr()?;
    a.add(rdi, rax)?;
    a.shl(rdi, 32)?;
    a.add(qword_ptr(r12 + 24), rdi)?;
    a.mov(rcx, r8)?;
    a.test(esi, esi)?;
    a.jne(end)?;
    // In every second round ports in all widths; RAX keeps what is above.
    a.test(ebx, 1)?;
    a.jne(quiet)?;
    a.mov(rax, -1i64)?;
    a.in_(al, 0x80)?;
    a.mov(edx, 0x1234)?;
    a.in_(ax, dx)?;
    a.add(qword_ptr(r12 + 24), rax)?;
    a.in_(eax, dx)?;
    a.out(0x80, al)?;
    a.out(dx, ax)?;
    a.out(dx, eax)?;
    a.mov(qword_ptr(r12 + 56), rax)?;
    a.set_label(&mut quiet)?;
    // In every 64th something that modes depend on, and the vector registers.
    a.test(ebx, 63)?;
    a.jne(plain)?;
    a.mov(rax, cr4)?;
    a.mov(cr4, rax)?;
    a.paddq(xmm0, xmm1)?;
    a.set_label(&mut plain)?;
    // In every fourth a call of the interpreter, in every 32nd one that takes the vector registers from memory.
    a.test(ebx, 3)?;
    a.jne(quick)?;
    a.xor(r8d, r8d)?;
    a.verr(r8w)?;
    a.test(ebx, 31)?;
    a.jne(quick)?;
    a.mov(eax, 7)?;
    a.xor(edx, edx)?;
    a.mov(r8, IMAGE)?;
    a.xsave(ptr(r8))?;
    a.add(dword_ptr(r8 + 160), 3)?;
    a.xrstor(ptr(r8))?;
    a.set_label(&mut quick)?;
    // Other flags for the user.
    a.mov(eax, ebx)?;
    a.imul_3(eax, eax, 0x51)?;
    a.and(eax, 0xd5)?;
    a.xor(r11, rax)?;
    a.sysretq()?;
    a.set_label(&mut end)?;
    a.out(0xf4, al)?;
    a.cli()?;
    a.hlt()?;
    a.assemble(KERNEL)
}

/// Runs it; gives the notes and the registers at the end.
fn run(vcpu: &mut dyn Vcpu) -> (Vec<u8>, [u64; 16]) {
    let (kernel, user) = (kernel().expect("it can be assembled"), user().expect("it can be assembled"));
    let (mem, s) = levels::machine(&kernel, &user);
    *vcpu.state() = s;
    let device = Device::default();
    let ended = || device.end.load(Ordering::Relaxed) != 0;
    (levels::notes(vcpu, u64::MAX, &mem, &device, &ended, ROUNDS as u64 * NOTE + NOTE), vcpu.state().gpr)
}

#[test]
fn calls_of_the_kernel_and_of_devices_are_the_interpreters() {
    let model = Arc::new(CpuModel::host());
    let (wanted, registers) = run(&mut Interpreter::new(model.clone()));
    let mut mirrored = Translator::new(model.clone()).expect("executable memory");
    mirrored.set_mirror_after(Some(Duration::ZERO));
    assert!(run(&mut mirrored) == (wanted.clone(), registers), "through the host's page tables");
    let mut translator = Translator::new(model).expect("executable memory");
    let (seen, also) = run(&mut translator);
    for n in 0..wanted.len() / 8 {
        assert_eq!(word(&seen, n), word(&wanted, n), "round {}, word {} of the note", n / 8, n % 8);
    }
    assert_eq!(also, registers);
    // SYSCALL cleared what FMASK says and kept the rest; R11 has all of them.
    let (flags, noted) = (word(&wanted, 0), word(&wanted, 1));
    assert_eq!(flags, noted & !0x4_0601 | 2);
    // Six ports in half of the rounds; of SYSCALL and SYSRET by far most are not among the calls.
    let steps = translator.stats().steps;
    println!("{steps} calls");
    assert!(steps < 3 * ROUNDS as u64 + 800, "{steps} calls");
}
