//! The host CPU as an engine for single user-mode instructions: the judge of expected values.
//!
//! A page below 2 GiB holds code that loads all registers from a data page, runs the instruction's bytes, and stores all registers
//! back. A fault inside the instruction is caught by the signal handler, which notes it and leaves through the epilogue. 32-bit code
//! runs in a compatibility-mode segment of the kernel's.
#![allow(unsafe_code)]

use bivisor_emulator::cpu::Fault;
use bivisor_emulator::host::{signal, thread::ThreadBlock};
use iced_x86::code_asm::{
    AsmRegister64, CodeAssembler, dword_ptr, eax, ebp, ebx, ecx, edi, edx, esi, esp, qword_ptr, r8, r9, r10, r11, r12,
    r13, r14, r15, rax, rbp, rbx, rcx, rdi, rdx, rsi, rsp,
};
use std::cell::Cell;
use std::sync::{Mutex, MutexGuard};

/// Registers before or after: general-purpose in encoding order, and RFLAGS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Regs {
    /// RAX to R15.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub rflags: u64,
}

/// What the data page holds.
#[repr(C)]
struct Frame {
    regs: Regs,
    saved_rsp: u64,
    far_target: u32,
    far_selector: u32,
}

/// One prepared instruction. One exists at a time.
pub struct Host {
    code: *mut u8,
    frame: *mut Frame,
    bitness: u32,
    /// Address range of the instruction itself.
    insn: (u64, u64),
    _lock: MutexGuard<'static, ()>,
}

static OWNER: Mutex<()> = Mutex::new(());
const PAGE: usize = 4096;
/// Linux's selectors for 64-bit and 32-bit user code, and for user data.
const CODE64: u32 = 0x33;
const CODE32: u32 = 0x23;
const DATA: u32 = 0x2b;

thread_local! {
    /// The instruction that runs on this thread: its range, and the address of the epilogue.
    static RUNNING: Cell<(u64, u64, u64)> = const { Cell::new((0, 0, 0)) };
    /// Where the last fault was.
    static FAULT_RIP: Cell<u64> = const { Cell::new(0) };
    /// What the handler saw.
    static CAUGHT: Cell<Option<(Fault, Regs)>> = const { Cell::new(None) };
}

const REGS64: [AsmRegister64; 16] = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];

impl Host {
    /// Prepares to run single instructions in 64-bit code (or 32-bit code, if the host's kernel has a segment for it).
    pub fn new(bitness: u32) -> Option<Host> {
        // A poisoned lock only says that another test failed.
        let lock = OWNER.lock().unwrap_or_else(|e| e.into_inner());
        if bitness != 64 && !(bitness == 32 && has_code32()) {
            return None;
        }
        Some(Host {
            code: low_page(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)?,
            frame: low_page(libc::PROT_READ | libc::PROT_WRITE)?.cast(),
            bitness,
            insn: (0, 0),
            _lock: lock,
        })
    }

    /// The address at which the instruction's bytes will lie: what RIP-relative operands see, and 15 bytes after it the latest end.
    pub fn load(&mut self, insn: &[u8]) {
        let frame = self.frame as u64;
        let base = self.code as u64;
        let (head, tail) = match self.bitness {
            64 => (prologue(frame, None), epilogue(frame, false)),
            _ => (prologue(frame, Some(base)), epilogue(frame, true)),
        };
        let mut bytes = head;
        let start = base + bytes.len() as u64;
        bytes.extend_from_slice(insn);
        let end = base + bytes.len() as u64;
        let epilogue_at = if self.bitness == 32 {
            let (store, resume) = store32(frame, end);
            bytes.extend(store);
            assert_eq!(base + bytes.len() as u64, resume);
            resume
        } else {
            end
        };
        bytes.extend(tail);
        assert!(bytes.len() < PAGE);
        // SAFETY: `code` is a private page of PAGE bytes that only this object uses; `frame` likewise holds a Frame.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.code, bytes.len());
            (*self.frame).far_target = start as u32;
            (*self.frame).far_selector = CODE32;
        }
        self.insn = (start, end);
        RUNNING.set((start, end, epilogue_at));
    }

    /// Where the loaded instruction lies.
    pub fn address(&self) -> u64 {
        self.insn.0
    }

    /// How far behind the start of the code the last fault was.
    pub fn fault_offset(&self) -> Option<u64> {
        FAULT_RIP.get().checked_sub(self.insn.0)
    }

    /// Runs the loaded instruction once: the registers after it, or at its fault.
    pub fn run(&mut self, regs: &Regs) -> (Option<Fault>, Regs) {
        CAUGHT.set(None);
        let block = signal::attach();
        let others = block.engine_hook.replace(Some(hook));
        // SAFETY: the code page holds a function of this type that saves and restores the callee-saved registers and its stack; the
        // instruction in its middle is a test's, chosen to touch nothing but registers and the test's own memory.
        unsafe {
            (*self.frame).regs = *regs;
            let entry: extern "sysv64" fn() = std::mem::transmute(self.code);
            entry();
            block.engine_hook.set(others);
            match CAUGHT.take() {
                Some((fault, regs)) => (Some(fault), regs),
                None => (None, (*self.frame).regs),
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: both pages were mapped by `low_page` and nothing refers to them any more.
        unsafe {
            libc::munmap(self.code.cast(), PAGE);
            libc::munmap(self.frame.cast(), PAGE);
        }
    }
}

/// A page below 2 GiB, so that absolute 32-bit addresses reach it.
fn low_page(prot: i32) -> Option<*mut u8> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
    // SAFETY: a fresh private mapping.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, prot, flags, -1, 0) };
    (page != libc::MAP_FAILED).then_some(page.cast())
}

/// Is the selector of 32-bit user code there? LAR says so without using it.
fn has_code32() -> bool {
    let valid: u8;
    // SAFETY: LAR reads a descriptor and writes a register and ZF.
    unsafe {
        std::arch::asm!("lar {t:e}, {s:e}", "setz {v}", t = out(reg) _, s = in(reg) CODE32, v = out(reg_byte) valid)
    };
    valid != 0
}

fn slot(frame: u64, i: usize) -> u64 {
    frame + 8 * i as u64
}

/// Saves the callee-saved registers, loads everything from the frame; with `far`, goes to 32-bit code through the frame's pointer.
fn prologue(frame: u64, far: Option<u64>) -> Vec<u8> {
    let build = || -> Result<Vec<u8>, iced_x86::IcedError> {
        let mut a = CodeAssembler::new(64)?;
        for r in [rbx, rbp, r12, r13, r14, r15] {
            a.push(r)?;
        }
        a.mov(qword_ptr(frame + std::mem::offset_of!(Frame, saved_rsp) as u64), rsp)?;
        if far.is_some() {
            a.mov(eax, DATA)?;
            a.mov(iced_x86::code_asm::ds, eax)?;
            a.mov(iced_x86::code_asm::es, eax)?;
        }
        a.push(qword_ptr(slot(frame, 16)))?;
        a.popfq()?;
        for (i, r) in REGS64.into_iter().enumerate() {
            a.mov(r, qword_ptr(slot(frame, i)))?;
        }
        let mut bytes = a.assemble(far.unwrap_or(frame))?;
        if far.is_some() {
            // JMP FAR m16:32 [far_target], an absolute address.
            bytes.extend([0xff, 0x2c, 0x25]);
            bytes.extend((frame as u32 + std::mem::offset_of!(Frame, far_target) as u32).to_le_bytes());
        }
        Ok(bytes)
    };
    build().expect("fixed code assembles")
}

/// Stores everything to the frame (64-bit code did not yet), goes back to the caller.
fn epilogue(frame: u64, stored: bool) -> Vec<u8> {
    let build = || -> Result<Vec<u8>, iced_x86::IcedError> {
        let mut a = CodeAssembler::new(64)?;
        if !stored {
            for (i, r) in REGS64.into_iter().enumerate() {
                a.mov(qword_ptr(slot(frame, i)), r)?;
            }
        }
        a.mov(rsp, qword_ptr(frame + std::mem::offset_of!(Frame, saved_rsp) as u64))?;
        a.pushfq()?;
        a.pop(qword_ptr(slot(frame, 16)))?;
        a.cld()?;
        if stored {
            a.mov(eax, 0)?;
            a.mov(iced_x86::code_asm::ds, eax)?;
            a.mov(iced_x86::code_asm::es, eax)?;
        }
        for r in [r15, r14, r13, r12, rbp, rbx] {
            a.pop(r)?;
        }
        a.ret()?;
        a.assemble(frame)
    };
    build().expect("fixed code assembles")
}

/// 32-bit code that stores the eight registers and jumps to the 64-bit code right behind itself, whose address it gives.
fn store32(frame: u64, at: u64) -> (Vec<u8>, u64) {
    let build = || -> Result<Vec<u8>, iced_x86::IcedError> {
        let mut a = CodeAssembler::new(32)?;
        for (i, r) in [eax, ecx, edx, ebx, esp, ebp, esi, edi].into_iter().enumerate() {
            a.mov(dword_ptr(slot(frame, i)), r)?;
        }
        a.assemble(at)
    };
    let mut bytes = build().expect("fixed code assembles");
    let resume = at + bytes.len() as u64 + 7;
    bytes.push(0xea); // JMP FAR ptr16:32
    bytes.extend((resume as u32).to_le_bytes());
    bytes.extend((CODE64 as u16).to_le_bytes());
    (bytes, resume)
}

/// The engine's hook. A fault in the instruction: note it and the registers, go to the epilogue. Elsewhere, or sent by somebody (the
/// tick of a translator on this thread, which comes where the epilogue begins if it was due while the fault was noted): not ours.
///
/// # Safety
/// Called by the signal handler with its arguments.
unsafe fn hook(_: &ThreadBlock, _: i32, info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) -> bool {
    // SAFETY: the kernel gave valid structures.
    let (gregs, raised) = unsafe { (&mut (*context).uc_mcontext.gregs, (*info).si_code > 0) };
    if !raised {
        return false;
    }
    let reg = |i: i32| gregs[i as usize] as u64;
    let (start, end, out) = RUNNING.get();
    if !(start..=end).contains(&reg(libc::REG_RIP)) {
        return false;
    }
    let regs = Regs { gpr: GPRS.map(reg), rflags: reg(libc::REG_EFL) };
    let fault = fault(reg(libc::REG_TRAPNO), reg(libc::REG_ERR), reg(libc::REG_CR2));
    CAUGHT.set(Some((fault, regs)));
    FAULT_RIP.set(reg(libc::REG_RIP));
    gregs[libc::REG_RIP as usize] = out as i64;
    gregs[libc::REG_CSGSFS as usize] = (gregs[libc::REG_CSGSFS as usize] & !0xffff) | i64::from(CODE64);
    gregs[libc::REG_EFL as usize] &= !0x4_0500; // TF, DF, AC
    true
}

/// Where a signal's frame has the general registers, in the order of their numbers.
#[rustfmt::skip]
pub(crate) const GPRS: [i32; 16] = [
    libc::REG_RAX, libc::REG_RCX, libc::REG_RDX, libc::REG_RBX, libc::REG_RSP, libc::REG_RBP, libc::REG_RSI, libc::REG_RDI,
    libc::REG_R8, libc::REG_R9, libc::REG_R10, libc::REG_R11, libc::REG_R12, libc::REG_R13, libc::REG_R14, libc::REG_R15,
];

/// The exception that the kernel's trap number, error code and CR2 in a signal's frame tell of.
pub(crate) fn fault(trap: u64, error: u64, cr2: u64) -> Fault {
    let code = error as u16;
    match trap {
        0 => Fault::De,
        1 => Fault::Db(0),
        3 => Fault::Bp,
        4 => Fault::Of,
        5 => Fault::Br,
        6 => Fault::Ud,
        7 => Fault::Nm,
        11 => Fault::Np(code),
        12 => Fault::Ss(code),
        14 => Fault::Pf { addr: cr2, code },
        16 => Fault::Mf,
        17 => Fault::Ac,
        19 => Fault::Xm,
        _ => Fault::Gp(code),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bivisor_emulator::host::kicker::Kicker;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    #[test]
    fn runs_and_catches_in_both_modes() {
        for bitness in [64, 32] {
            let Some(mut host) = Host::new(bitness) else {
                eprintln!("SKIPPED: this host has no {bitness}-bit user code");
                continue;
            };
            let mut regs = Regs { rflags: 0x203, ..Regs::default() };
            (regs.gpr[0], regs.gpr[1]) = (5, 7);
            host.load(&[0x11, 0xc8]); // adc eax, ecx
            let (fault, after) = host.run(&regs);
            assert_eq!((fault, after.gpr[0], after.rflags & 0x8d5), (None, 13, 0));
            host.load(&[0xf7, 0xf2]); // div edx
            let (fault, after) = host.run(&regs); // EDX is 0
            assert_eq!((fault, after.gpr[0]), (Some(Fault::De), 5));
        }
    }

    #[test]
    fn what_is_sent_to_the_thread_is_no_fault() {
        let mut host = Host::new(64).expect("64-bit code runs");
        host.load(&[0x0f, 0x0b]); // ud2
        let regs = Regs { rflags: 0x603, ..Regs::default() }; // DF, CF
        let block = signal::attach();
        block.note_tid();
        let thread = block.tid.get();
        let done = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    signal::send_to_thread(thread, Kicker::SIGNAL);
                    // What comes without a pause keeps the thread from its work.
                    std::thread::sleep(Duration::from_micros(20));
                }
            });
            let outcomes: Vec<_> = (0..20_000)
                .map(|_| {
                    let (fault, after) = host.run(&regs);
                    (fault, after.rflags & 0xcd5, host.fault_offset())
                })
                .collect();
            done.store(true, Ordering::Relaxed);
            let other = outcomes.iter().find(|o| **o != (Some(Fault::Ud), 0x401, Some(0)));
            assert_eq!(other, None);
        });
    }
}
