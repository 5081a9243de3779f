//! The facts table: what iced-x86 does not know about an instruction: class, privilege, and Popek and Goldberg's sensitivity.

use iced_x86::Code;

/// How an instruction is carried out; decides the handler family and the lowering.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// General-purpose registers, memory and the arithmetic flags.
    Integer,
    /// MOVS, STOS, LODS, CMPS, SCAS.
    String,
    /// Near control transfer: Jcc, JMP, CALL, RET, LOOP, JrCXZ.
    Branch,
    /// Reads or writes RFLAGS as a whole: PUSHF, POPF, CLI, STI, CLD, STD, LAHF, SAHF, CLC ...
    Flags,
    /// Loads, stores or inspects segment registers and descriptors; far control transfer, INT n, IRET.
    Segment,
    /// Control, debug and model-specific registers, tables, caches, time, CPUID, SYSCALL.
    System,
    /// IN, OUT, INS, OUTS.
    Io,
    /// x87, MMX, SSE, AVX and their state instructions: runs on the host CPU.
    Native,
    /// Exists in the decoder, but no CPU we offer has it: #UD.
    Undefined,
}

/// Who may execute an instruction; checked in one place before dispatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Privilege {
    /// Any privilege level.
    Anyone,
    /// CPL 0 in protected mode, else #GP(0).
    Cpl0,
    /// CPL <= IOPL in protected mode, else #GP(0) (CLI, STI; for ports the I/O permission map may still allow it).
    Iopl,
    /// CPL 0 if CR4.UMIP, else anyone (SGDT SIDT SLDT SMSW STR).
    Cr4Umip,
    /// CPL 0 if CR4.TSD, else anyone (RDTSC, RDTSCP).
    Cr4Tsd,
    /// CPL 0 unless CR4.PCE (RDPMC).
    Cr4Pce,
}

/// Popek and Goldberg 1974: does the instruction change or reveal the configuration of resources?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sensitivity {
    /// Neither.
    Innocuous,
    /// Changes the configuration of resources, or the mode, or would if it were allowed to.
    Control,
    /// Its result depends on mode or location of resources.
    Behaviour,
}

/// The three columns iced lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// How it is carried out.
    pub class: Class,
    /// Who may execute it.
    pub privilege: Privilege,
    /// Popek and Goldberg's class.
    pub sensitivity: Sensitivity,
}

/// The facts of one instruction.
pub fn facts(_code: Code) -> &'static Facts {
    &Facts { class: Class::Integer, privilege: Privilege::Anyone, sensitivity: Sensitivity::Innocuous }
}
