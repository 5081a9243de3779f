//! General-purpose and segment registers in encoding order (SDM 2A 3.1.1.1).

use iced_x86::Register;

/// A general-purpose register; the discriminant is its encoding and its index in [`crate::cpu::CpuState::gpr`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Gpr {
    Rax = 0,
    Rcx,
    Rdx,
    Rbx,
    Rsp,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

impl Gpr {
    /// All sixteen in encoding order.
    #[rustfmt::skip]
    pub const ALL: [Gpr; 16] = [
        Gpr::Rax, Gpr::Rcx, Gpr::Rdx, Gpr::Rbx, Gpr::Rsp, Gpr::Rbp, Gpr::Rsi, Gpr::Rdi,
        Gpr::R8, Gpr::R9, Gpr::R10, Gpr::R11, Gpr::R12, Gpr::R13, Gpr::R14, Gpr::R15,
    ];

    /// The lower-case 64-bit names in encoding order.
    #[rustfmt::skip]
    pub const NAMES: [&'static str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
        "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    ];

    /// The 64-bit name in lower case.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }

    /// The full register that iced's `r` is a part of; `None` if `r` is no general-purpose register.
    /// AH, CH, DH and BH give RAX, RCX, RDX and RBX: ask [`Register`] itself when that matters.
    pub fn from_iced(r: Register) -> Option<Gpr> {
        r.is_gpr().then(|| Gpr::ALL[r.full_register().number()])
    }

    /// iced's name for the full register.
    pub fn to_iced(self) -> Register {
        Register::RAX + self as u32
    }
}

/// A segment register; the discriminant is its encoding and its index in [`crate::cpu::CpuState::seg`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Seg {
    Es = 0,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
}

impl Seg {
    /// All six in encoding order.
    pub const ALL: [Seg; 6] = [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs];

    /// The lower-case names in encoding order.
    pub const NAMES: [&'static str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

    /// The segment register that iced's `r` names.
    pub fn from_iced(r: Register) -> Option<Seg> {
        match r {
            Register::ES => Some(Seg::Es),
            Register::CS => Some(Seg::Cs),
            Register::SS => Some(Seg::Ss),
            Register::DS => Some(Seg::Ds),
            Register::FS => Some(Seg::Fs),
            Register::GS => Some(Seg::Gs),
            _ => None,
        }
    }
}
