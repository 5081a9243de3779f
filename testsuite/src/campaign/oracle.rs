//! The host CPU as the judge of a campaign: registers in, the instruction at its own address, registers out; no system call between.
//!
//! The instruction's tail jumps to `bivisor_oracle_leave`. A fault is taken by the engine's hook of the one signal handler
//! ([`bivisor_emulator::host::signal`]), which notes the registers in the signal frame and goes on behind the leaving.
#![allow(unsafe_code)]

use super::arena::{EXIT, NOTE, View};
use super::case::Case;
use super::outcome::{End, NORMAL, Outcome};
use crate::host::{GPRS, fault};
use bivisor_emulator::cpu::XsaveArea;
use bivisor_emulator::cpu::xsave::Layout;
use bivisor_emulator::host::signal;
use bivisor_emulator::host::thread::{SCRATCH_OFFSET, SignalHook, ThreadBlock};
use std::arch::global_asm;
use std::mem::offset_of;

/// Slots of the thread block that no engine uses: the frame of the case that runs, one for the way in, and whether one runs.
pub(super) const FRAME: usize = 60;
pub(super) const WAY_IN: usize = 61;
const RUNNING: usize = 62;

pub(super) const fn gs(slot: usize) -> i32 {
    SCRATCH_OFFSET + 8 * slot as i32
}

/// What the assembly works on.
#[repr(C, align(64))]
pub(super) struct Frame {
    pub xsave: XsaveArea,
    pub gpr: [u64; 16],
    pub rflags: u64,
    pub fs_base: u64,
    /// The host's.
    pub rsp: u64,
    /// Where the case begins: an address, or a far pointer with a selector in bits 47:32.
    pub entry: u64,
    pub components: u64,
    /// The exception that ended the case; [`NO_TRAP`].
    pub trap: u64,
    pub error: u64,
    pub cr2: u64,
    pub rip: u64,
    /// ES, CS, SS, DS, FS.
    pub selectors: [u16; 5],
}

impl Frame {
    pub fn new(selectors: [u16; 5]) -> Box<Frame> {
        Box::new(Frame {
            xsave: XsaveArea::default(),
            gpr: [0; 16],
            rflags: 2,
            fs_base: 0,
            rsp: 0,
            entry: 0,
            components: Layout::host().components,
            trap: NO_TRAP,
            error: 0,
            cr2: 0,
            rip: 0,
            selectors,
        })
    }

    /// Enters the case with a hook of the signal handler.
    ///
    /// # Safety
    /// `enter` keeps the calling convention with this frame, and `hook` brings it back from an exception.
    pub unsafe fn enter(&mut self, enter: unsafe extern "sysv64" fn(*mut Frame), hook: SignalHook) {
        let block = signal::attach();
        let others = block.engine_hook.replace(Some(hook));
        block.scratch[RUNNING].set(1);
        // SAFETY: as the caller says.
        unsafe { enter(self) };
        block.scratch[RUNNING].set(0);
        block.engine_hook.set(others);
    }

    /// Notes the registers of an exception's signal frame and lets the handler return to `left`, with RBX and RSP set. False: no exception
    /// of a case.
    ///
    /// # Safety
    /// Called by the handler with what the kernel gave it, while a case of a frame runs.
    pub unsafe fn note(
        block: &ThreadBlock,
        info: *mut libc::siginfo_t,
        uc: *mut libc::ucontext_t,
        left: *const u8,
    ) -> bool {
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
            regs[libc::REG_RIP as usize] = left as i64;
            regs[libc::REG_RSP as usize] = frame.rsp as i64;
            regs[libc::REG_RBX as usize] = std::ptr::from_mut(frame) as i64;
            regs[libc::REG_EFL as usize] = 2;
        }
        true
    }
}

/// The host CPU.
pub struct Oracle {
    frame: Box<Frame>,
    view: View,
}

const NO_TRAP: u64 = u64::MAX;

global_asm!(
    ".globl bivisor_oracle_enter, bivisor_oracle_leave, bivisor_oracle_left",
    ".hidden bivisor_oracle_enter, bivisor_oracle_leave, bivisor_oracle_left",
    ".p2align 4",
    "bivisor_oracle_enter:",
    "push rbx; push rbp; push r12; push r13; push r14; push r15",
    "mov gs:[{frame}], rdi",
    "mov rbx, rdi",
    "mov [rbx + {rsp}], rsp",
    "mov eax, [rbx + {components}]",
    "mov edx, [rbx + {components} + 4]",
    "xrstor64 [rbx]",
    // A KVM that is software may leave its guest's FS behind.
    ".irp s,es,ds,fs",
    "mov eax, \\s",
    "test eax, eax",
    "jz 2f",
    "xor eax, eax",
    "mov \\s, eax",
    "2:",
    ".endr",
    "mov rax, [rbx + {fs_base}]",
    "wrfsbase rax",
    "mov rax, [rbx + {entry}]",
    "mov gs:[{rbx}], rax",
    "push qword ptr [rbx + {rflags}]",
    "popfq",
    "mov rax, [rbx + {gpr}]",
    "mov rcx, [rbx + {gpr} + 8]",
    "mov rdx, [rbx + {gpr} + 16]",
    "mov rbp, [rbx + {gpr} + 40]",
    "mov rsi, [rbx + {gpr} + 48]",
    "mov rdi, [rbx + {gpr} + 56]",
    "mov r8, [rbx + {gpr} + 64]",
    "mov r9, [rbx + {gpr} + 72]",
    "mov r10, [rbx + {gpr} + 80]",
    "mov r11, [rbx + {gpr} + 88]",
    "mov r12, [rbx + {gpr} + 96]",
    "mov r13, [rbx + {gpr} + 104]",
    "mov r14, [rbx + {gpr} + 112]",
    "mov r15, [rbx + {gpr} + 120]",
    "mov rsp, [rbx + {gpr} + 32]",
    "mov rbx, [rbx + {gpr} + 24]",
    "jmp qword ptr gs:[{rbx}]",
    ".p2align 4",
    "bivisor_oracle_leave:",
    "mov gs:[{rbx}], rbx",
    "mov rbx, gs:[{frame}]",
    "mov [rbx + {gpr}], rax",
    "mov [rbx + {gpr} + 8], rcx",
    "mov [rbx + {gpr} + 16], rdx",
    "mov rax, gs:[{rbx}]",
    "mov [rbx + {gpr} + 24], rax",
    "mov [rbx + {gpr} + 32], rsp",
    "mov [rbx + {gpr} + 40], rbp",
    "mov [rbx + {gpr} + 48], rsi",
    "mov [rbx + {gpr} + 56], rdi",
    "mov [rbx + {gpr} + 64], r8",
    "mov [rbx + {gpr} + 72], r9",
    "mov [rbx + {gpr} + 80], r10",
    "mov [rbx + {gpr} + 88], r11",
    "mov [rbx + {gpr} + 96], r12",
    "mov [rbx + {gpr} + 104], r13",
    "mov [rbx + {gpr} + 112], r14",
    "mov [rbx + {gpr} + 120], r15",
    "mov [rbx + {selectors} + 2], cs",
    "mov [rbx + {selectors} + 4], ss",
    "mov rsp, [rbx + {rsp}]",
    "pushfq",
    "pop qword ptr [rbx + {rflags}]",
    "push 2",
    "popfq",
    "mov eax, [rbx + {components}]",
    "mov edx, [rbx + {components} + 4]",
    "xsave64 [rbx]",
    // After a fault: RBX and RSP are set, the registers were in the signal frame.
    "bivisor_oracle_left:",
    "rdfsbase rax",
    "mov [rbx + {fs_base}], rax",
    "mov [rbx + {selectors}], es",
    "mov [rbx + {selectors} + 6], ds",
    "mov [rbx + {selectors} + 8], fs",
    // Only what a case loaded is put back. SS is always Linux's or a twin of it.
    "xor eax, eax",
    "cmp ax, [rbx + {selectors}]",
    "je 3f",
    "mov es, eax",
    "3:",
    "cmp ax, [rbx + {selectors} + 6]",
    "je 3f",
    "mov ds, eax",
    "3:",
    "cmp ax, [rbx + {selectors} + 8]",
    "je 3f",
    "mov fs, eax",
    "3:",
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
    rbx = const gs(WAY_IN),
    rsp = const offset_of!(Frame, rsp),
    gpr = const offset_of!(Frame, gpr),
    rflags = const offset_of!(Frame, rflags),
    fs_base = const offset_of!(Frame, fs_base),
    entry = const offset_of!(Frame, entry),
    components = const offset_of!(Frame, components),
    selectors = const offset_of!(Frame, selectors),
);

unsafe extern "sysv64" {
    fn bivisor_oracle_enter(frame: *mut Frame);
    safe static bivisor_oracle_leave: u8;
    safe static bivisor_oracle_left: u8;
}

impl Oracle {
    /// The host CPU on the arena mapped by [`super::arena::flat`], whose view this is. `None`: it has no XSAVE or no FSGSBASE.
    pub fn new(view: View) -> Option<Oracle> {
        if !std::is_x86_feature_detected!("xsave") {
            return None;
        }
        Some(Oracle { frame: Frame::new(NORMAL), view })
    }

    /// Runs a case whose memory is set up.
    pub fn run(&mut self, case: &Case, out: &mut Outcome) {
        let leave = (&raw const bivisor_oracle_leave) as u64;
        self.view.write(EXIT, &leave.to_le_bytes());
        self.view.write(NOTE, &[0; 4]);
        let f = &mut *self.frame;
        f.xsave.bytes.copy_from_slice(&case.xsave.bytes);
        (f.gpr, f.rflags, f.fs_base, f.entry, f.trap) = (case.gpr, case.rflags, case.fs_base, case.rip, NO_TRAP);
        // SAFETY: the instruction is a case's: it touches registers and the arena only, or faults, and goes on to a tail that comes back.
        unsafe { f.enter(bivisor_oracle_enter, hook) };
        out.gpr = f.gpr;
        out.rflags = f.rflags;
        out.fs_base = f.fs_base;
        out.selectors = f.selectors;
        out.xsave.bytes.copy_from_slice(&f.xsave.bytes);
        (out.end, out.rip) = match f.trap {
            NO_TRAP => (End::Left, u64::from(self.view.load32(NOTE))),
            _ => (End::Fault(fault(f.trap, f.error, f.cr2)), f.rip),
        };
        if f.trap != NO_TRAP {
            // RF is what the processor pushes at a fault, not the program's.
            out.rflags = (out.rflags & !0x1_0000) | case.rflags & 0x1_0000;
        }
    }
}

/// The hook of the signal handler while a case runs.
///
/// # Safety
/// Called by the handler with what the kernel gave it.
unsafe fn hook(block: &ThreadBlock, _sig: i32, info: *mut libc::siginfo_t, uc: *mut libc::ucontext_t) -> bool {
    // SAFETY: as the caller says.
    unsafe { Frame::note(block, info, uc, &raw const bivisor_oracle_left) }
}

/// x87 and vector registers of a signal frame.
///
/// # Safety
/// The kernel's pointer.
unsafe fn vectors(to: &mut XsaveArea, from: *const u8) {
    const SW_RESERVED: usize = 464;
    const MAGIC: u32 = 0x4650_5853;
    if from.is_null() {
        return;
    }
    let l = Layout::host();
    // SAFETY: at least FXSAVE's 512 bytes; with the magic number an XSAVE image of the size given next to it (asm/sigcontext.h).
    unsafe {
        std::ptr::copy_nonoverlapping(from, to.bytes.as_mut_ptr(), 416);
        let magic = from.add(SW_RESERVED).cast::<u32>().read_unaligned();
        let size = from.add(SW_RESERVED + 16).cast::<u32>().read_unaligned() as usize;
        if magic == MAGIC && size >= l.size {
            let bv = from.add(Layout::HEADER).cast::<u64>().read_unaligned();
            std::ptr::copy_nonoverlapping(from.add(576), to.bytes.as_mut_ptr().add(576), l.size - 576);
            to.set_xstate_bv(bv & l.components);
        } else {
            to.set_xstate_bv(3);
        }
    }
}
