//! The frame of a signal handler as the kernel lays it out on the guest's stack, and the way back (arch/x86/include/asm/sigframe.h,
//! `struct rt_sigframe`; sigreturn(2); the layout is ABI: debuggers and unwinders read it).

use crate::cpu::xsave::{Layout, component};
use crate::cpu::{CpuState, Cr4, Rflags, Segment, XsaveArea};
use crate::host::fpu::mxcsr_mask;
use crate::host::inbox::Info;
use crate::host::signal::{KernelAction, SA_RESTORER};
use crate::isa::{Gpr, Seg};
use crate::mem::GuestMemory;

/// The frame could not be written or read, or makes no sense: the guest gets SIGSEGV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadFrame;

/// The alternate signal stack (sigaltstack(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AltStack {
    /// Lowest address.
    pub sp: u64,
    /// Bytes; 0: there is none.
    pub size: u64,
    /// As the guest gave them.
    pub flags: u32,
}

/// SS_AUTODISARM.
pub const SS_AUTODISARM: u32 = 1 << 31;
/// SS_DISABLE.
pub const SS_DISABLE: u32 = 2;
/// SS_ONSTACK.
pub const SS_ONSTACK: u32 = 1;

impl AltStack {
    /// None, as a thread starts.
    pub const DISABLED: AltStack = AltStack { sp: 0, size: 0, flags: SS_DISABLE };
    /// None, as a program starts.
    pub const NONE: AltStack = AltStack { sp: 0, size: 0, flags: 0 };

    fn contains(&self, sp: u64) -> bool {
        sp > self.sp && sp - self.sp <= self.size
    }

    /// Does a thread with this stack pointer run on it? Never with SS_AUTODISARM: entering a handler has disarmed it.
    pub fn in_use(&self, sp: u64) -> bool {
        self.flags & SS_AUTODISARM == 0 && self.contains(sp)
    }

    /// The flags that sigaltstack(2) reports.
    pub fn state(&self, sp: u64) -> u32 {
        if self.size == 0 {
            SS_DISABLE
        } else if self.in_use(sp) {
            SS_ONSTACK
        } else {
            0
        }
    }
}

/// What the last fault of a thread left behind; the kernel shows it in every later frame, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastFault {
    /// The vector.
    pub trapno: u64,
    /// The error code.
    pub error: u64,
    /// The address of the last page fault.
    pub cr2: u64,
}

/// A handler to be started.
#[derive(Clone, Copy, Debug)]
pub struct Delivery<'a> {
    /// The signal.
    pub sig: i32,
    /// Its siginfo.
    pub info: &'a Info,
    /// The guest's action for it.
    pub action: &'a KernelAction,
    /// The mask that sigreturn restores.
    pub mask: u64,
    /// The alternate stack.
    pub alt: AltStack,
    /// For trapno, err and cr2.
    pub last: LastFault,
}

const UC_FP_XSTATE: u64 = 1;
const UC_SIGCONTEXT_SS: u64 = 2;
const UC_STRICT_RESTORE_SS: u64 = 4;

const MAGIC1: u32 = 0x4650_5853;
const MAGIC2: u32 = 0x4650_5845;
const LEGACY_SIZE: usize = 512;
/// Offset of `struct _fpx_sw_bytes` in the legacy region.
const SW_BYTES: usize = 464;

// Offsets in the frame: the return address, then `struct ucontext`, then `siginfo_t`.
const UC: usize = 8;
const UC_LINK: usize = UC + 8;
const UC_STACK: usize = UC_LINK + 8;
const REGS: usize = UC_STACK + 24;
const CS: usize = REGS + 18 * 8;
const SS: usize = CS + 6;
const ERR: usize = CS + 8;
const TRAPNO: usize = ERR + 8;
const OLDMASK: usize = TRAPNO + 8;
const CR2: usize = OLDMASK + 8;
const FPSTATE: usize = CR2 + 8;
const SIGMASK: usize = FPSTATE + 8 + 64;
const INFO: usize = SIGMASK + 8;
const FRAME_SIZE: usize = INFO + 128;

/// The order of `struct sigcontext`; RIP and flags follow.
const ORDER: [Gpr; 16] = {
    use Gpr::*;
    [R8, R9, R10, R11, R12, R13, R14, R15, Rdi, Rsi, Rbp, Rbx, Rdx, Rax, Rcx, Rsp]
};

/// The flags that sigreturn takes from the frame (FIX_EFLAGS).
const FIXED: Rflags = Rflags::AC
    .union(Rflags::OF)
    .union(Rflags::DF)
    .union(Rflags::TF)
    .union(Rflags::SF)
    .union(Rflags::ZF)
    .union(Rflags::AF)
    .union(Rflags::PF)
    .union(Rflags::CF)
    .union(Rflags::RF);

fn put(bytes: &mut [u8], at: usize, v: u64) {
    bytes[at..at + 8].copy_from_slice(&v.to_le_bytes());
}

fn get(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

fn get32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

/// Bytes of the standard XSAVE format for these components.
fn xstate_size(components: u64) -> usize {
    let l = Layout::host();
    let mut size = Layout::HEADER + 64;
    for (bits, end) in [
        (component::AVX, l.avx + 256),
        (component::OPMASK, l.opmask + 64),
        (component::ZMM_HI256, l.zmm_hi256 + 512),
        (component::HI16_ZMM, l.hi16_zmm + 1024),
    ] {
        if components & bits != 0 {
            size = size.max(end);
        }
    }
    size
}

/// The floating-point part of the frame: what XSAVE writes, and the kernel's marks around it.
fn fpstate(cpu: &CpuState) -> Vec<u8> {
    let xsave = cpu.cr4.contains(Cr4::OSXSAVE);
    let components = if xsave { cpu.xcr0 } else { component::X87 | component::SSE };
    let mut area = cpu.xsave.clone();
    // XSAVE writes out components in initial configuration as such; the kernel marks x87 and SSE as used.
    let used = area.xstate_bv() & components;
    area.activate(components);
    area.set_xstate_bv(used | component::X87 | component::SSE);
    area.bytes[28..32].copy_from_slice(&mxcsr_mask().to_le_bytes());
    let size = if xsave { xstate_size(components) } else { LEGACY_SIZE };
    let mut bytes = area.bytes[..size].to_vec();
    bytes[SW_BYTES..LEGACY_SIZE].fill(0);
    if xsave {
        put(&mut bytes, SW_BYTES, u64::from(MAGIC1) | (size as u64 + 4) << 32);
        put(&mut bytes, SW_BYTES + 8, components);
        put(&mut bytes, SW_BYTES + 16, size as u64);
        bytes[LEGACY_SIZE + 8..LEGACY_SIZE + 64].fill(0);
        bytes.extend(MAGIC2.to_le_bytes());
    }
    bytes
}

/// Builds the frame and points the registers at the handler.
///
/// # Errors
/// [`BadFrame`]: the stack cannot take it; registers are unchanged.
pub fn push(cpu: &mut CpuState, mem: &GuestMemory, d: Delivery<'_>) -> Result<(), BadFrame> {
    // The kernel insists on SA_RESTORER: there is no code of its own to return to.
    if d.action.flags & SA_RESTORER == 0 {
        return Err(BadFrame);
    }
    let rsp = cpu.gpr[Gpr::Rsp as usize];
    let nested = d.alt.in_use(rsp);
    // The red zone (System V ABI 3.2.2).
    let mut sp = rsp.wrapping_sub(128);
    let mut entering = false;
    if d.action.flags & libc::SA_ONSTACK as u64 != 0 && d.alt.size != 0 && !d.alt.in_use(sp) {
        sp = d.alt.sp.wrapping_add(d.alt.size);
        entering = true;
    }
    let fp = fpstate(cpu);
    let fp_at = sp.wrapping_sub(fp.len() as u64) & !63;
    // As if called: RSP is 8 below a multiple of 16 at the handler's first instruction.
    let at = (fp_at.wrapping_sub(FRAME_SIZE as u64) & !15).wrapping_sub(8);
    if (nested || entering) && !d.alt.contains(at) {
        return Err(BadFrame);
    }

    let mut f = [0u8; FRAME_SIZE];
    put(&mut f, 0, d.action.restorer);
    let xstate = if cpu.cr4.contains(Cr4::OSXSAVE) { UC_FP_XSTATE } else { 0 };
    put(&mut f, UC, xstate | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS);
    put(&mut f, UC_STACK, d.alt.sp);
    put(&mut f, UC_STACK + 8, u64::from(d.alt.flags));
    put(&mut f, UC_STACK + 16, d.alt.size);
    for (i, r) in ORDER.into_iter().enumerate() {
        put(&mut f, REGS + 8 * i, cpu.gpr[r as usize]);
    }
    put(&mut f, REGS + 16 * 8, cpu.rip);
    put(&mut f, REGS + 17 * 8, cpu.rflags.bits());
    f[CS..CS + 2].copy_from_slice(&cpu.segment(Seg::Cs).selector.to_le_bytes());
    f[SS..SS + 2].copy_from_slice(&cpu.segment(Seg::Ss).selector.to_le_bytes());
    put(&mut f, ERR, d.last.error);
    put(&mut f, TRAPNO, d.last.trapno);
    put(&mut f, OLDMASK, d.mask);
    put(&mut f, CR2, d.last.cr2);
    put(&mut f, FPSTATE, fp_at);
    put(&mut f, SIGMASK, d.mask);
    f[INFO..].copy_from_slice(d.info);
    // Without SA_SIGINFO the kernel leaves the place of siginfo as it is.
    let len = if d.action.flags & libc::SA_SIGINFO as u64 != 0 { FRAME_SIZE } else { INFO };
    mem.write(fp_at, &fp).ok_or(BadFrame)?;
    mem.write(at, &f[..len]).ok_or(BadFrame)?;

    cpu.gpr[Gpr::Rdi as usize] = d.sig as u64;
    cpu.gpr[Gpr::Rsi as usize] = at + INFO as u64;
    cpu.gpr[Gpr::Rdx as usize] = at + UC as u64;
    cpu.gpr[Gpr::Rax as usize] = 0;
    cpu.gpr[Gpr::Rsp as usize] = at;
    cpu.rip = d.action.handler;
    cpu.rflags.remove(Rflags::DF | Rflags::RF | Rflags::TF);
    cpu.xsave = XsaveArea::default();
    Ok(())
}

/// The mask that rt_sigreturn(2) will restore, from the frame that RSP is past the return address of.
///
/// # Errors
/// [`BadFrame`]: it cannot be read.
pub fn mask(cpu: &CpuState, mem: &GuestMemory) -> Result<u64, BadFrame> {
    let mut mask = [0; 8];
    let at = cpu.gpr[Gpr::Rsp as usize].wrapping_sub(8).wrapping_add(SIGMASK as u64);
    mem.read(at, &mut mask).ok_or(BadFrame)?;
    Ok(u64::from_le_bytes(mask))
}

/// rt_sigreturn(2): takes the registers from the frame; gives the alternate stack, to be set as if by sigaltstack(2).
///
/// # Errors
/// [`BadFrame`]: it cannot be read or names a state that user code cannot have; registers may be partly restored, as the kernel has it.
pub fn pop(cpu: &mut CpuState, mem: &GuestMemory) -> Result<AltStack, BadFrame> {
    let at = cpu.gpr[Gpr::Rsp as usize].wrapping_sub(8);
    let mut f = [0u8; INFO];
    mem.read(at, &mut f).ok_or(BadFrame)?;
    let selector = |at: usize| u16::from_le_bytes(f[at..at + 2].try_into().expect("2 bytes")) | 3;
    // A 64-bit process that returns to 32-bit code would need the 32-bit half of the personality.
    if selector(CS) != cpu.segment(Seg::Cs).selector {
        return Err(BadFrame);
    }
    let user_data = cpu.segment(Seg::Ss).selector;
    if get(&f, UC) & UC_STRICT_RESTORE_SS != 0 && selector(SS) != user_data {
        return Err(BadFrame);
    }
    for (i, r) in ORDER.into_iter().enumerate() {
        cpu.gpr[r as usize] = get(&f, REGS + 8 * i);
    }
    cpu.rip = get(&f, REGS + 16 * 8);
    cpu.rflags.replace(FIXED, Rflags::from_bits_retain(get(&f, REGS + 17 * 8)));
    cpu.seg[Seg::Ss as usize] = Segment::data32(user_data, 3);
    restore_fpstate(cpu, mem, get(&f, FPSTATE))?;
    Ok(AltStack { sp: get(&f, UC_STACK), flags: get(&f, UC_STACK + 8) as u32, size: get(&f, UC_STACK + 16) })
}

fn restore_fpstate(cpu: &mut CpuState, mem: &GuestMemory, at: u64) -> Result<(), BadFrame> {
    cpu.xsave = XsaveArea::default();
    if at == 0 {
        return Ok(());
    }
    let mut legacy = [0u8; LEGACY_SIZE];
    mem.read(at, &mut legacy).ok_or(BadFrame)?;
    let fpsse = component::X87 | component::SSE;
    let (mut size, mut used) = (LEGACY_SIZE, fpsse);
    let mut area = XsaveArea::default();
    if cpu.cr4.contains(Cr4::OSXSAVE) && get32(&legacy, SW_BYTES) == MAGIC1 {
        let extended = get32(&legacy, SW_BYTES + 4) as usize;
        let told = get32(&legacy, SW_BYTES + 16) as usize;
        // Anything inconsistent: x87 and SSE only.
        if (Layout::HEADER + 64..=xstate_size(cpu.xcr0)).contains(&told)
            && told <= extended
            && mem.load_u32(at.wrapping_add(told as u64)).ok_or(BadFrame)? == MAGIC2
        {
            size = told;
            mem.read(at, &mut area.bytes[..size]).ok_or(BadFrame)?;
            // XRSTOR: #GP for components that are not enabled and for the compacted format (SDM 1 13.8.1).
            if area.xstate_bv() & !cpu.xcr0 != 0
                || area.bytes[LEGACY_SIZE + 8..LEGACY_SIZE + 64].iter().any(|b| *b != 0)
            {
                return Err(BadFrame);
            }
            used = area.xstate_bv() & get(&legacy, SW_BYTES + 8);
        }
    }
    if size == LEGACY_SIZE {
        area.bytes[..LEGACY_SIZE].copy_from_slice(&legacy);
    }
    if area.mxcsr() & !mxcsr_mask() != 0 {
        return Err(BadFrame);
    }
    area.bytes[SW_BYTES..LEGACY_SIZE].fill(0);
    area.set_xstate_bv(used);
    cpu.xsave = area;
    Ok(())
}

impl GuestMemory {
    /// Four bytes that may cross a page end.
    fn load_u32(&self, at: u64) -> Option<u32> {
        let mut v = [0; 4];
        self.read(at, &mut v)?;
        Some(u32::from_le_bytes(v))
    }
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
