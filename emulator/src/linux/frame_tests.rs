//! Tests of the signal frame: the offsets that debuggers and unwinders know, and that what goes in comes out.

use super::*;
use crate::cpu::xsave::Layout;
use crate::host::signal::attach;
use crate::linux::fault::siginfo;
use crate::mem::FlatSpace;

/// Memory for a stack, and registers that point at its end.
fn setting() -> (Vec<u8>, GuestMemory, CpuState) {
    // Writes to guest memory go through the handler of faults.
    attach();
    let stack = vec![0u8; 1 << 16];
    let mut cpu = CpuState::long64(3);
    for (i, r) in cpu.gpr.iter_mut().enumerate() {
        *r = 0x1111_1111 * (i as u64 + 1);
    }
    cpu.gpr[Gpr::Rsp as usize] = stack.as_ptr() as u64 + stack.len() as u64 - 8;
    cpu.rip = 0x1234_5678;
    cpu.rflags = Rflags::FIXED | Rflags::IF | Rflags::DF | Rflags::CF;
    cpu.xsave.set_zmm(3, [0x5a; 64]);
    cpu.xsave.set_mxcsr(0x1fc0);
    cpu.xsave.set_fcw(0x27f);
    (stack, GuestMemory::Flat(FlatSpace::new()), cpu)
}

fn delivery<'a>(info: &'a Info, action: &'a KernelAction, alt: AltStack) -> Delivery<'a> {
    Delivery { sig: 11, info, action, mask: 0x8000_0001, alt, last: LastFault { trapno: 14, error: 6, cr2: 0xabc } }
}

const ACTION: KernelAction =
    KernelAction { handler: 0x4000, flags: SA_RESTORER | libc::SA_SIGINFO as u64, restorer: 0x5000, mask: 0 };

fn word(at: u64) -> u64 {
    crate::host::probe::load(at, crate::isa::Width::Q).expect("mapped")
}

#[test]
fn layout_is_the_kernels() {
    let (_stack, mem, mut cpu) = setting();
    let before = cpu.clone();
    let info = siginfo(11, 1, 0xabc);
    push(&mut cpu, &mem, delivery(&info, &ACTION, AltStack::NONE)).unwrap();
    let sp = cpu.gpr[Gpr::Rsp as usize];
    // As after a call: RSP + 8 is a multiple of 16 (System V ABI 3.2.2). The red zone is left alone.
    assert_eq!(sp % 16, 8);
    assert_eq!(word(sp), 0x5000, "return address");
    let (uc, si) = (cpu.gpr[Gpr::Rdx as usize], cpu.gpr[Gpr::Rsi as usize]);
    assert_eq!(
        (uc, si, cpu.gpr[Gpr::Rdi as usize], cpu.gpr[Gpr::Rax as usize], cpu.rip),
        (sp + 8, sp + 312, 11, 0, 0x4000)
    );
    // offsetof() of glibc's ucontext_t and gregs.
    let greg = |i: i32| word(uc + 40 + 8 * i as u64);
    assert_eq!(greg(libc::REG_RIP), before.rip);
    assert_eq!(greg(libc::REG_RSP), before.gpr[Gpr::Rsp as usize]);
    assert_eq!(greg(libc::REG_R8), before.gpr[Gpr::R8 as usize]);
    assert_eq!(greg(libc::REG_RCX), before.gpr[Gpr::Rcx as usize]);
    assert_eq!(greg(libc::REG_EFL), before.rflags.bits());
    assert_eq!(greg(libc::REG_CSGSFS), 0x002b_0000_0000_0033);
    assert_eq!((greg(libc::REG_ERR), greg(libc::REG_TRAPNO), greg(libc::REG_CR2)), (6, 14, 0xabc));
    assert_eq!((greg(libc::REG_OLDMASK), word(uc + 296)), (0x8000_0001, 0x8000_0001));
    assert_eq!(word(uc), UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS);
    let fp = word(uc + 224);
    assert_eq!(fp % 64, 0);
    assert!(fp + 4 <= before.gpr[Gpr::Rsp as usize] - 128);
    let size = word(fp + 480) & 0xffff_ffff;
    assert_eq!(word(fp + 464), u64::from(MAGIC1) | (size + 4) << 32);
    assert_eq!(word(fp + 472), cpu.xcr0);
    assert_eq!(word(fp + size) as u32, MAGIC2);
    assert_eq!(word(fp + 24) as u32, 0x1fc0);
    // The handler starts with DF clear and fresh floating-point state.
    assert!(!cpu.rflags.contains(Rflags::DF) && cpu.rflags.contains(Rflags::CF));
    assert_eq!((cpu.xsave.mxcsr(), cpu.xsave.fcw(), cpu.xsave.zmm(3)), (0x1f80, 0x37f, [0; 64]));
}

#[test]
fn sigreturn_restores_everything() {
    let (_stack, mem, mut cpu) = setting();
    let before = cpu.clone();
    let info = siginfo(11, 1, 0);
    push(&mut cpu, &mem, delivery(&info, &ACTION, AltStack::NONE)).unwrap();
    cpu.gpr.iter_mut().enumerate().filter(|(i, _)| *i != Gpr::Rsp as usize).for_each(|(_, r)| *r = 0);
    cpu.xsave.set_zmm(3, [1; 64]);
    // The handler's RET.
    cpu.gpr[Gpr::Rsp as usize] += 8;
    assert_eq!(mask(&cpu, &mem), Ok(0x8000_0001));
    assert_eq!(pop(&mut cpu, &mem), Ok(AltStack::NONE));
    assert_eq!(cpu.gpr, before.gpr);
    assert_eq!((cpu.rip, cpu.rflags), (before.rip, before.rflags));
    assert_eq!(cpu.xsave, before.xsave);
}

#[test]
fn damaged_frames() {
    let damage = |offset: u64, v: u64| {
        let (_stack, mem, mut cpu) = setting();
        let info = siginfo(11, 1, 0);
        push(&mut cpu, &mem, delivery(&info, &ACTION, AltStack::NONE)).unwrap();
        cpu.gpr[Gpr::Rsp as usize] += 8;
        let uc = cpu.gpr[Gpr::Rsp as usize];
        let at = if offset >= 1000 { word(uc + 224) + offset - 1000 } else { uc + offset };
        mem.write(at, &v.to_le_bytes()).unwrap();
        (pop(&mut cpu, &mem), cpu)
    };
    // MXCSR with reserved bits, XCOMP_BV, a component that is not enabled: XRSTOR would fault (SDM 1 13.8).
    assert_eq!(damage(1024, 1 << 31).0, Err(BadFrame));
    assert_eq!(damage(1000 + 520, 1 << 63).0, Err(BadFrame));
    assert_eq!(damage(1000 + 512, 1 << 50).0, Err(BadFrame));
    // An address where nothing is.
    assert_eq!(damage(224, 0x1000).0, Err(BadFrame));
    // No floating-point state at all: the initial one.
    let (r, cpu) = damage(224, 0);
    assert_eq!((r.is_ok(), cpu.xsave.mxcsr()), (true, 0x1f80));
    // Without the first mark only x87 and SSE count.
    let (r, cpu) = damage(1464, 0);
    let mut low = [0; 64];
    low[..16].fill(0x5a);
    assert_eq!((r.is_ok(), cpu.xsave.zmm(3)), (true, low));
    assert_eq!(cpu.xsave.xstate_bv(), component::X87 | component::SSE);
    assert!(Layout::host().size >= 576);
}

#[test]
fn alternate_stack() {
    let (stack, mem, cpu) = setting();
    let info = siginfo(11, 1, 0);
    let action = KernelAction { flags: ACTION.flags | libc::SA_ONSTACK as u64, ..ACTION };
    let alt = AltStack { sp: stack.as_ptr() as u64, size: 32768, flags: 0 };
    let start = |alt: AltStack, rsp: u64| {
        let mut cpu = cpu.clone();
        cpu.gpr[Gpr::Rsp as usize] = rsp;
        push(&mut cpu, &mem, delivery(&info, &action, alt)).map(|()| cpu.gpr[Gpr::Rsp as usize])
    };
    let far = cpu.gpr[Gpr::Rsp as usize];
    let on = start(alt, far).unwrap();
    assert!(alt.in_use(on) && on > alt.sp + alt.size - 4096);
    // Already on it: further down.
    let nested = start(alt, alt.sp + 20000).unwrap();
    assert!(nested < alt.sp + 20000 && alt.in_use(nested));
    // No room.
    assert_eq!(start(AltStack { size: 600, ..alt }, far), Err(BadFrame));
    assert_eq!(start(alt, alt.sp + 500), Err(BadFrame));
    assert_eq!(alt.state(far), 0);
    assert_eq!(alt.state(alt.sp + 10), SS_ONSTACK);
    assert_eq!(AltStack { flags: SS_AUTODISARM, ..alt }.state(alt.sp + 10), 0);
    assert_eq!(AltStack::NONE.state(far), SS_DISABLE);
}

#[test]
fn no_restorer_no_frame() {
    let (_stack, mem, mut cpu) = setting();
    let info = siginfo(11, 1, 0);
    let action = KernelAction { flags: 0, ..ACTION };
    assert_eq!(push(&mut cpu, &mem, delivery(&info, &action, AltStack::NONE)), Err(BadFrame));
}
