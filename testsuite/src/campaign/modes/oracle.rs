//! The host CPU as the judge of 16- and 32-bit code: segments and registers in, a far jump to the instruction, and back by the exception
//! that every case ends with; its signal tells the registers.
//!
//! Compatibility mode reaches the low 4 GiB only, where nothing of the process is but the arena. What follows an instruction is INT3.
//! IRET to a stack segment of 16 bits keeps ESP's upper half as the kernel's espfix does; the lower 32 bits of registers are compared.
#![allow(unsafe_code)]

use super::segments::{FLAT_CODE, LDT};
use crate::campaign::case::Case;
use crate::campaign::oracle::{FRAME, Frame, WAY_IN, gs};
use crate::campaign::outcome::{End, Outcome};
use crate::host::fault;
use bivisor_emulator::host::thread::ThreadBlock;
use std::arch::global_asm;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, Ordering};

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
    "mov rax, [rbx + {entry}]",
    "mov gs:[{way_in}], rax",
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
    ".long {way_in}",
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
    way_in = const gs(WAY_IN),
    rsp = const offset_of!(Frame, rsp),
    gpr = const offset_of!(Frame, gpr),
    rflags = const offset_of!(Frame, rflags),
    fs_base = const offset_of!(Frame, fs_base),
    entry = const offset_of!(Frame, entry),
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

/// Fills the process's local descriptor table, or empties it: 64-bit code, which the engines run without one, would see it too.
///
/// # Errors
/// A sentence: the kernel does not give one.
pub fn local_table(filled: bool) -> Result<(), String> {
    static FILLED: AtomicBool = AtomicBool::new(false);
    if FILLED.swap(filled, Ordering::Relaxed) == filled {
        return Ok(());
    }
    // Neither present nor anything else: the entry is cleared.
    const EMPTY: UserDesc = UserDesc { entry_number: 0, base: 0, limit: 0, flags: 1 << 3 | 1 << 5 };
    for (n, e) in LDT.iter().enumerate() {
        let flags = u32::from(e.big)
            | e.contents << 1
            | u32::from(e.less) << 3
            | u32::from(e.pages) << 4
            | u32::from(!e.present) << 5;
        let full = UserDesc { entry_number: 0, base: e.base as u32, limit: e.limit, flags };
        let mut desc = UserDesc { entry_number: n as u32, ..if filled { full } else { EMPTY } };
        // SAFETY: the kernel reads the structure, and checks what it puts into the table.
        let r =
            unsafe { libc::syscall(libc::SYS_modify_ldt, WRITE_LDT, &raw mut desc, std::mem::size_of::<UserDesc>()) };
        // The number is an int: the upper half of the result means nothing.
        if r as i32 != 0 {
            return Err("the host's kernel gives no local descriptor table: modify_ldt(2) failed".into());
        }
    }
    Ok(())
}

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
        local_table(true)?;
        Ok(Oracle { frame: Frame::new([0; 5]) })
    }

    /// Runs a case whose memory is set up.
    pub fn run(&mut self, case: &Case, out: &mut Outcome) {
        let f = &mut *self.frame;
        f.xsave.bytes.copy_from_slice(&case.xsave.bytes);
        (f.gpr, f.rflags, f.fs_base, f.selectors) = (case.gpr, case.rflags, case.fs_base, case.selectors);
        f.entry = case.rip & 0xffff_ffff | u64::from(case.selectors[1]) << 32;
        // SAFETY: the case runs in compatibility mode, which reaches nothing of the process but the arena, and has no instruction that calls
        // the kernel; it ends with an exception, whose handler comes back.
        unsafe { f.enter(bivisor_compat_enter, hook) };
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
    // SAFETY: as the caller says; the kernel's structures are valid while the handler runs.
    unsafe {
        let noted = Frame::note(block, info, uc, &raw const bivisor_compat_left);
        if noted {
            let selectors = &mut (*uc).uc_mcontext.gregs[libc::REG_CSGSFS as usize];
            *selectors = (*selectors as u64 & 0x0000_ffff_ffff_0000 | CS_SS) as i64;
        }
        noted
    }
}
