//! The host CPU as the judge of 16- and 32-bit code: segments and registers in, a far jump to the instruction, and back by the exception
//! that every case ends with; its signal tells the registers.
//!
//! Compatibility mode reaches the low 4 GiB only, where nothing of the process is but the arena. What follows an instruction is INT3.
//! IRET to a stack segment of 16 bits keeps ESP's upper half as the kernel's espfix does; the lower 32 bits of registers are compared.
#![allow(unsafe_code)]

use super::segments::{FLAT_CODE, LDT};
use crate::campaign::case::Case;
use crate::campaign::oracle::vectors;
use crate::campaign::outcome::{End, Outcome};
use crate::host::{GPRS, fault};
use bivisor_emulator::cpu::XsaveArea;
use bivisor_emulator::cpu::xsave::Layout;
use bivisor_emulator::host::signal;
use bivisor_emulator::host::thread::{SCRATCH_OFFSET, ThreadBlock};
use std::arch::global_asm;
use std::mem::offset_of;

/// Slots of the thread block that no engine uses.
const FRAME: usize = 60;
const FAR: usize = 61;
const RUNNING: usize = 62;

const fn gs(slot: usize) -> i32 {
    SCRATCH_OFFSET + 8 * slot as i32
}

/// What the assembly works on.
#[repr(C, align(64))]
struct Frame {
    xsave: XsaveArea,
    gpr: [u64; 16],
    rflags: u64,
    fs_base: u64,
    rsp: u64,
    far: u64,
    components: u64,
    trap: u64,
    error: u64,
    cr2: u64,
    rip: u64,
    /// ES, CS, SS, DS, FS.
    selectors: [u16; 5],
}

/// The host CPU in compatibility mode.
pub struct Oracle {
    frame: Box<Frame>,
}

global_asm!(
    ".globl bivisor_compat_enter, bivisor_compat_left",
    ".hidden bivisor_compat_enter, bivisor_compat_left",
    ".p2align 4",
    "bivisor_compat_enter:",
    "push rbx; push rbp; push r12; push r13; push r14; push r15",
    "mov gs:[{frame}], rdi",
    "mov rbx, rdi",
    "mov [rbx + {rsp}], rsp",
    "mov eax, [rbx + {components}]",
    "mov edx, [rbx + {components} + 4]",
    "xrstor64 [rbx]",
    "mov es, [rbx + {selectors}]",
    "mov ds, [rbx + {selectors} + 6]",
    "mov fs, [rbx + {selectors} + 8]",
    "mov rax, [rbx + {fs_base}]",
    "wrfsbase rax",
    "mov rax, [rbx + {far}]",
    "mov gs:[{far_slot}], rax",
    "mov rax, [rbx + {gpr}]",
    "mov rcx, [rbx + {gpr} + 8]",
    "mov rdx, [rbx + {gpr} + 16]",
    "mov rbp, [rbx + {gpr} + 40]",
    "mov rsi, [rbx + {gpr} + 48]",
    "mov rdi, [rbx + {gpr} + 56]",
    "xor r8d, r8d",
    "mov r9, r8",
    "mov r10, r8",
    "mov r11, r8",
    "mov r12, r8",
    "mov r13, r8",
    "mov r14, r8",
    "mov r15, r8",
    "push qword ptr [rbx + {rflags}]",
    "popfq",
    "mov ss, [rbx + {selectors} + 4]",
    "mov rsp, [rbx + {gpr} + 32]",
    "mov rbx, [rbx + {gpr} + 24]",
    // JMP FAR m16:32 at GS.
    ".byte 0x65, 0xff, 0x2c, 0x25",
    ".long {far_slot}",
    // The signal handler comes back here, with RBX and RSP set.
    ".p2align 4",
    "bivisor_compat_left:",
    "rdfsbase rax",
    "mov [rbx + {fs_base}], rax",
    "mov [rbx + {selectors}], es",
    "mov [rbx + {selectors} + 6], ds",
    "mov [rbx + {selectors} + 8], fs",
    "xor eax, eax",
    "mov es, eax",
    "mov ds, eax",
    "mov fs, eax",
    "mov rdx, gs:[8]",
    "wrfsbase rdx",
    "fninit",
    "push 0x1f80",
    "ldmxcsr [rsp]",
    "pop rax",
    "test byte ptr [rbx + {components}], 4",
    "jz 2f",
    "vzeroupper",
    "2:",
    "pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
    "ret",
    frame = const gs(FRAME),
    far_slot = const gs(FAR),
    rsp = const offset_of!(Frame, rsp),
    gpr = const offset_of!(Frame, gpr),
    rflags = const offset_of!(Frame, rflags),
    fs_base = const offset_of!(Frame, fs_base),
    far = const offset_of!(Frame, far),
    components = const offset_of!(Frame, components),
    selectors = const offset_of!(Frame, selectors),
);

unsafe extern "sysv64" {
    fn bivisor_compat_enter(frame: *mut Frame);
    safe static bivisor_compat_left: u8;
}

/// `struct user_desc` of asm/ldt.h.
#[repr(C)]
struct UserDesc {
    entry_number: u32,
    base: u32,
    limit: u32,
    flags: u32,
}

/// modify_ldt(2): write an entry.
const WRITE_LDT: i64 = 0x11;

impl Oracle {
    /// The host CPU on the arena mapped by [`super::super::arena::flat`]; its process gets the local descriptor table.
    ///
    /// # Errors
    /// A sentence: what this host lacks.
    pub fn new() -> Result<Oracle, String> {
        if !std::is_x86_feature_detected!("xsave") {
            return Err("the host CPU has no XSAVE".into());
        }
        let valid: u8;
        // SAFETY: LAR reads a descriptor and writes a register and ZF.
        unsafe {
            std::arch::asm!("lar {t:e}, {s:e}", "setz {v}", t = out(reg) _, s = in(reg) u32::from(FLAT_CODE), v = out(reg_byte) valid)
        };
        if valid == 0 {
            return Err("the host's kernel has no segment for 32-bit code (CONFIG_IA32_EMULATION)".into());
        }
        for (n, e) in LDT.iter().enumerate() {
            let flags = u32::from(e.big)
                | e.contents << 1
                | u32::from(e.less) << 3
                | u32::from(e.pages) << 4
                | u32::from(!e.present) << 5;
            let mut desc = UserDesc { entry_number: n as u32, base: e.base as u32, limit: e.limit, flags };
            // SAFETY: the kernel reads the structure, and checks what it puts into the table.
            let r = unsafe {
                libc::syscall(libc::SYS_modify_ldt, WRITE_LDT, &raw mut desc, std::mem::size_of::<UserDesc>())
            };
            // The number is an int: the upper half of the result means nothing.
            if r as i32 != 0 {
                return Err("the host's kernel gives no local descriptor table: modify_ldt(2) failed".into());
            }
        }
        let frame = Box::new(Frame {
            xsave: XsaveArea::default(),
            gpr: [0; 16],
            rflags: 2,
            fs_base: 0,
            rsp: 0,
            far: 0,
            components: Layout::host().components,
            trap: 0,
            error: 0,
            cr2: 0,
            rip: 0,
            selectors: [0; 5],
        });
        Ok(Oracle { frame })
    }

    /// Runs a case whose memory is set up.
    pub fn run(&mut self, case: &Case, out: &mut Outcome) {
        let f = &mut *self.frame;
        f.xsave.bytes.copy_from_slice(&case.xsave.bytes);
        (f.gpr, f.rflags, f.fs_base, f.selectors) = (case.gpr, case.rflags, case.fs_base, case.selectors);
        f.far = case.rip & 0xffff_ffff | u64::from(case.selectors[1]) << 32;
        let block = signal::attach();
        let others = block.engine_hook.replace(Some(hook));
        block.scratch[RUNNING].set(1);
        // SAFETY: the routine keeps the calling convention. The case runs in compatibility mode, which reaches nothing of the process
        // but the arena, and has no instruction that calls the kernel; it ends with an exception, whose handler comes back.
        unsafe { bivisor_compat_enter(f) };
        block.scratch[RUNNING].set(0);
        block.engine_hook.set(others);
        out.gpr = f.gpr.map(|v| v & 0xffff_ffff);
        out.rflags = (f.rflags & !0x1_0000) | case.rflags & 0x1_0000;
        out.fs_base = f.fs_base;
        out.selectors = f.selectors;
        out.xsave.bytes.copy_from_slice(&f.xsave.bytes);
        (out.end, out.rip) = (End::Fault(fault(f.trap, f.error, f.cr2)), f.rip);
        out.other.clear();
    }
}

/// The hook of the signal handler while a case runs.
///
/// # Safety
/// Called by the handler with what the kernel gave it.
unsafe fn hook(block: &ThreadBlock, _sig: i32, info: *mut libc::siginfo_t, uc: *mut libc::ucontext_t) -> bool {
    /// Linux's selectors of 64-bit code.
    const CS_SS: u64 = 0x002b_0000_0000_0033;
    // SAFETY: the kernel's structures are valid while the handler runs; the slot names the frame of the case that runs.
    unsafe {
        if block.scratch[RUNNING].get() == 0 || (*info).si_code <= 0 {
            return false;
        }
        let frame = &mut *(block.scratch[FRAME].get() as *mut Frame);
        let regs = &mut (*uc).uc_mcontext.gregs;
        frame.gpr = GPRS.map(|i| regs[i as usize] as u64);
        frame.rflags = regs[libc::REG_EFL as usize] as u64;
        frame.trap = regs[libc::REG_TRAPNO as usize] as u64;
        frame.error = regs[libc::REG_ERR as usize] as u64;
        frame.cr2 = regs[libc::REG_CR2 as usize] as u64;
        frame.rip = regs[libc::REG_RIP as usize] as u64;
        // CS, GS, FS, SS (asm/sigcontext.h).
        let selectors = regs[libc::REG_CSGSFS as usize] as u64;
        (frame.selectors[1], frame.selectors[2]) = (selectors as u16, (selectors >> 48) as u16);
        vectors(&mut frame.xsave, (*uc).uc_mcontext.fpregs.cast());
        regs[libc::REG_RIP as usize] = (&raw const bivisor_compat_left) as i64;
        regs[libc::REG_RSP as usize] = frame.rsp as i64;
        regs[libc::REG_RBX as usize] = std::ptr::from_mut(frame) as i64;
        regs[libc::REG_EFL as usize] = 2;
        regs[libc::REG_CSGSFS as usize] = (selectors & 0x0000_ffff_ffff_0000 | CS_SS) as i64;
    }
    true
}
