//! The facts table: what iced-x86 does not know about an instruction: class, privilege, and Popek and Goldberg's sensitivity.
//!
//! Sources: SDM 2 (each instruction's "Exceptions"), SDM 3A 5.9 (privileged instructions), Popek and Goldberg 1974, Robin and Irvine
//! 2000 (the 18 sensitive, unprivileged instructions of the Pentium). No row and no feature in [`UNDEFINED`]: innocuous, anyone, and
//! [`Class::Native`] if it works on x87, MMX, SSE or AVX registers, else [`Class::Integer`].

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic as M};
use std::sync::OnceLock;

/// How an instruction is carried out; decides the handler family and the lowering.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// General-purpose registers, memory and the arithmetic flags; hints.
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
    /// CPL 0 in protected mode, else #UD: CLAC, STAC, MONITOR, MWAIT.
    Cpl0OrUd,
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

/// Which codes of a mnemonic a row is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// All that no other row of the mnemonic names.
    Any,
    /// With a segment register as operand.
    Sreg,
    /// With a control register as operand.
    Cr,
    /// With a debug register as operand.
    Dr,
    /// Through a far pointer.
    Far,
    /// The string instruction, not the SSE instruction of the same name.
    Str,
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The instruction.
    pub mnemonic: M,
    /// Which of its codes.
    pub form: Form,
    /// What holds for them.
    pub facts: Facts,
}

const fn row(mnemonic: M, form: Form, class: Class, privilege: Privilege, sensitivity: Sensitivity) -> Row {
    Row { mnemonic, form, facts: Facts { class, privilege, sensitivity } }
}

use Class::{Branch, Flags, Integer, Io, Native, Segment, String, System, Undefined};
use Form::{Any, Cr, Dr, Far, Sreg, Str};
use Privilege::{Anyone, Cpl0, Cpl0OrUd, Cr4Pce, Cr4Tsd, Cr4Umip, Iopl};
use Sensitivity::{Behaviour, Control, Innocuous};

#[rustfmt::skip] // one instruction a line
static ROWS: &[Row] = &[
    //  mnemonic          form  class      privilege  sensitivity
    // The flags register.
    row(M::Pushf,         Any,  Flags,     Anyone,    Behaviour),  // shows the real IF, IOPL, VM (Robin-Irvine 3B)
    row(M::Pushfd,        Any,  Flags,     Anyone,    Behaviour),
    row(M::Pushfq,        Any,  Flags,     Anyone,    Behaviour),
    row(M::Popf,          Any,  Flags,     Anyone,    Control),    // IF and IOPL silently kept: SDM 2B POPF (Robin-Irvine 3B)
    row(M::Popfd,         Any,  Flags,     Anyone,    Control),
    row(M::Popfq,         Any,  Flags,     Anyone,    Control),
    row(M::Cli,           Any,  Flags,     Iopl,      Control),
    row(M::Sti,           Any,  Flags,     Iopl,      Control),
    row(M::Clac,          Any,  Flags,     Cpl0OrUd,  Control),
    row(M::Stac,          Any,  Flags,     Cpl0OrUd,  Control),
    row(M::Clc,           Any,  Flags,     Anyone,    Innocuous),
    row(M::Stc,           Any,  Flags,     Anyone,    Innocuous),
    row(M::Cmc,           Any,  Flags,     Anyone,    Innocuous),
    row(M::Cld,           Any,  Flags,     Anyone,    Innocuous),
    row(M::Std,           Any,  Flags,     Anyone,    Innocuous),
    row(M::Lahf,          Any,  Flags,     Anyone,    Innocuous),
    row(M::Sahf,          Any,  Flags,     Anyone,    Innocuous),

    // Segment registers and descriptors.
    row(M::Mov,           Sreg, Segment,   Anyone,    Control),    // to: hidden part loaded; from: shows CPL (Robin-Irvine 3C)
    row(M::Push,          Sreg, Segment,   Anyone,    Behaviour),  // shows CPL in CS, SS (Robin-Irvine 3C)
    row(M::Pop,           Sreg, Segment,   Anyone,    Control),    // (Robin-Irvine 3C)
    row(M::Lds,           Any,  Segment,   Anyone,    Control),
    row(M::Les,           Any,  Segment,   Anyone,    Control),
    row(M::Lfs,           Any,  Segment,   Anyone,    Control),
    row(M::Lgs,           Any,  Segment,   Anyone,    Control),
    row(M::Lss,           Any,  Segment,   Anyone,    Control),
    row(M::Lar,           Any,  Segment,   Anyone,    Behaviour),  // reads a descriptor, compares CPL (Robin-Irvine 3C)
    row(M::Lsl,           Any,  Segment,   Anyone,    Behaviour),
    row(M::Verr,          Any,  Segment,   Anyone,    Behaviour),
    row(M::Verw,          Any,  Segment,   Anyone,    Behaviour),
    row(M::Arpl,          Any,  Segment,   Anyone,    Behaviour),  // #UD in real and virtual-8086 mode
    row(M::Rdfsbase,      Any,  Segment,   Anyone,    Behaviour),
    row(M::Rdgsbase,      Any,  Segment,   Anyone,    Behaviour),
    row(M::Wrfsbase,      Any,  Segment,   Anyone,    Control),
    row(M::Wrgsbase,      Any,  Segment,   Anyone,    Control),
    row(M::Swapgs,        Any,  Segment,   Cpl0,      Control),

    // Far control transfer.
    row(M::Call,          Far,  Segment,   Anyone,    Control),    // gates, CPL changes, CS pushed (Robin-Irvine 3C)
    row(M::Jmp,           Far,  Segment,   Anyone,    Control),
    row(M::Retf,          Any,  Segment,   Anyone,    Control),
    row(M::Int,           Any,  Segment,   Anyone,    Control),    // gate DPL, CS and flags pushed (Robin-Irvine 3C)
    row(M::Int1,          Any,  Segment,   Anyone,    Control),
    row(M::Int3,          Any,  Segment,   Anyone,    Control),
    row(M::Into,          Any,  Segment,   Anyone,    Control),
    row(M::Iret,          Any,  Segment,   Anyone,    Control),
    row(M::Iretd,         Any,  Segment,   Anyone,    Control),
    row(M::Iretq,         Any,  Segment,   Anyone,    Control),
    row(M::Bound,         Any,  Integer,   Anyone,    Innocuous),  // a computation that may fault, like DIV

    // Descriptor tables.
    row(M::Sgdt,          Any,  System,    Cr4Umip,   Behaviour),  // (Robin-Irvine 3B)
    row(M::Sidt,          Any,  System,    Cr4Umip,   Behaviour),
    row(M::Sldt,          Any,  System,    Cr4Umip,   Behaviour),
    row(M::Str,           Any,  System,    Cr4Umip,   Behaviour),  // (Robin-Irvine 3C)
    row(M::Lgdt,          Any,  System,    Cpl0,      Control),
    row(M::Lidt,          Any,  System,    Cpl0,      Control),
    row(M::Lldt,          Any,  System,    Cpl0,      Control),
    row(M::Ltr,           Any,  System,    Cpl0,      Control),

    // Control, debug and extended control registers, caches, TLB.
    row(M::Mov,           Cr,   System,    Cpl0,      Control),
    row(M::Mov,           Dr,   System,    Cpl0,      Control),
    row(M::Smsw,          Any,  System,    Cr4Umip,   Behaviour),  // (Robin-Irvine 3B)
    row(M::Lmsw,          Any,  System,    Cpl0,      Control),
    row(M::Clts,          Any,  System,    Cpl0,      Control),
    row(M::Invd,          Any,  System,    Cpl0,      Control),
    row(M::Wbinvd,        Any,  System,    Cpl0,      Control),
    row(M::Wbnoinvd,      Any,  System,    Cpl0,      Control),
    row(M::Invlpg,        Any,  System,    Cpl0,      Control),
    row(M::Invpcid,       Any,  System,    Cpl0,      Control),
    row(M::Xgetbv,        Any,  System,    Anyone,    Behaviour),
    row(M::Xsetbv,        Any,  System,    Cpl0,      Control),

    // Model-specific registers, identity, time, chance.
    row(M::Rdmsr,         Any,  System,    Cpl0,      Behaviour),
    row(M::Wrmsr,         Any,  System,    Cpl0,      Control),
    row(M::Cpuid,         Any,  System,    Anyone,    Behaviour),
    row(M::Rdpid,         Any,  System,    Anyone,    Behaviour),
    row(M::Rdtsc,         Any,  System,    Cr4Tsd,    Behaviour),
    row(M::Rdtscp,        Any,  System,    Cr4Tsd,    Behaviour),
    row(M::Rdpmc,         Any,  System,    Cr4Pce,    Behaviour),
    row(M::Rdrand,        Any,  System,    Anyone,    Behaviour),
    row(M::Rdseed,        Any,  System,    Anyone,    Behaviour),

    // Fast system calls, halting.
    row(M::Syscall,       Any,  System,    Anyone,    Control),
    row(M::Sysenter,      Any,  System,    Anyone,    Control),
    row(M::Sysret,        Any,  System,    Cpl0,      Control),
    row(M::Sysretq,       Any,  System,    Cpl0,      Control),
    row(M::Sysexit,       Any,  System,    Cpl0,      Control),
    row(M::Sysexitq,      Any,  System,    Cpl0,      Control),
    row(M::Hlt,           Any,  System,    Cpl0,      Control),
    row(M::Monitor,       Any,  System,    Cpl0OrUd,  Control),
    row(M::Mwait,         Any,  System,    Cpl0OrUd,  Control),

    // Ports.
    row(M::In,            Any,  Io,        Iopl,      Control),
    row(M::Out,           Any,  Io,        Iopl,      Control),
    row(M::Insb,          Any,  Io,        Iopl,      Control),
    row(M::Insw,          Any,  Io,        Iopl,      Control),
    row(M::Insd,          Any,  Io,        Iopl,      Control),
    row(M::Outsb,         Any,  Io,        Iopl,      Control),
    row(M::Outsw,         Any,  Io,        Iopl,      Control),
    row(M::Outsd,         Any,  Io,        Iopl,      Control),

    // Near control transfer.
    row(M::Call,          Any,  Branch,    Anyone,    Innocuous),
    row(M::Jmp,           Any,  Branch,    Anyone,    Innocuous),
    row(M::Ret,           Any,  Branch,    Anyone,    Innocuous),
    row(M::Ja,            Any,  Branch,    Anyone,    Innocuous),
    row(M::Jae,           Any,  Branch,    Anyone,    Innocuous),
    row(M::Jb,            Any,  Branch,    Anyone,    Innocuous),
    row(M::Jbe,           Any,  Branch,    Anyone,    Innocuous),
    row(M::Je,            Any,  Branch,    Anyone,    Innocuous),
    row(M::Jg,            Any,  Branch,    Anyone,    Innocuous),
    row(M::Jge,           Any,  Branch,    Anyone,    Innocuous),
    row(M::Jl,            Any,  Branch,    Anyone,    Innocuous),
    row(M::Jle,           Any,  Branch,    Anyone,    Innocuous),
    row(M::Jne,           Any,  Branch,    Anyone,    Innocuous),
    row(M::Jno,           Any,  Branch,    Anyone,    Innocuous),
    row(M::Jnp,           Any,  Branch,    Anyone,    Innocuous),
    row(M::Jns,           Any,  Branch,    Anyone,    Innocuous),
    row(M::Jo,            Any,  Branch,    Anyone,    Innocuous),
    row(M::Jp,            Any,  Branch,    Anyone,    Innocuous),
    row(M::Js,            Any,  Branch,    Anyone,    Innocuous),
    row(M::Jcxz,          Any,  Branch,    Anyone,    Innocuous),
    row(M::Jecxz,         Any,  Branch,    Anyone,    Innocuous),
    row(M::Jrcxz,         Any,  Branch,    Anyone,    Innocuous),
    row(M::Loop,          Any,  Branch,    Anyone,    Innocuous),
    row(M::Loope,         Any,  Branch,    Anyone,    Innocuous),
    row(M::Loopne,        Any,  Branch,    Anyone,    Innocuous),

    // Strings.
    row(M::Movsb,         Any,  String,    Anyone,    Innocuous),
    row(M::Movsw,         Any,  String,    Anyone,    Innocuous),
    row(M::Movsd,         Str,  String,    Anyone,    Innocuous),
    row(M::Movsq,         Any,  String,    Anyone,    Innocuous),
    row(M::Cmpsb,         Any,  String,    Anyone,    Innocuous),
    row(M::Cmpsw,         Any,  String,    Anyone,    Innocuous),
    row(M::Cmpsd,         Str,  String,    Anyone,    Innocuous),
    row(M::Cmpsq,         Any,  String,    Anyone,    Innocuous),
    row(M::Stosb,         Any,  String,    Anyone,    Innocuous),
    row(M::Stosw,         Any,  String,    Anyone,    Innocuous),
    row(M::Stosd,         Any,  String,    Anyone,    Innocuous),
    row(M::Stosq,         Any,  String,    Anyone,    Innocuous),
    row(M::Lodsb,         Any,  String,    Anyone,    Innocuous),
    row(M::Lodsw,         Any,  String,    Anyone,    Innocuous),
    row(M::Lodsd,         Any,  String,    Anyone,    Innocuous),
    row(M::Lodsq,         Any,  String,    Anyone,    Innocuous),
    row(M::Scasb,         Any,  String,    Anyone,    Innocuous),
    row(M::Scasw,         Any,  String,    Anyone,    Innocuous),
    row(M::Scasd,         Any,  String,    Anyone,    Innocuous),
    row(M::Scasq,         Any,  String,    Anyone,    Innocuous),

    // SSE by CPUID, but no vector register and no CR0.EM or CR0.TS check.
    row(M::Movnti,        Any,  Integer,   Anyone,    Innocuous),
    row(M::Crc32,         Any,  Integer,   Anyone,    Innocuous),
    row(M::Prefetchnta,   Any,  Integer,   Anyone,    Innocuous),
    row(M::Prefetcht0,    Any,  Integer,   Anyone,    Innocuous),
    row(M::Prefetcht1,    Any,  Integer,   Anyone,    Innocuous),
    row(M::Prefetcht2,    Any,  Integer,   Anyone,    Innocuous),
    row(M::Sfence,        Any,  Integer,   Anyone,    Innocuous),
    row(M::Lfence,        Any,  Integer,   Anyone,    Innocuous),
    row(M::Mfence,        Any,  Integer,   Anyone,    Innocuous),
    row(M::Pause,         Any,  Integer,   Anyone,    Innocuous),

    // x87 and state that iced does not file under FPU. XSAVES with IA32_XSS = 0, all we offer, is XSAVEC of supervisors.
    row(M::Wait,          Any,  Native,    Anyone,    Innocuous),
    row(M::Xsaves,        Any,  Native,    Cpl0,      Innocuous),
    row(M::Xsaves64,      Any,  Native,    Cpl0,      Innocuous),
    row(M::Xrstors,       Any,  Native,    Cpl0,      Innocuous),
    row(M::Xrstors64,     Any,  Native,    Cpl0,      Innocuous),

    // Shadow stacks are not offered: RDSSP lies in the hint space and does nothing, the rest is #UD.
    row(M::Rdsspd,        Any,  Integer,   Anyone,    Innocuous),
    row(M::Rdsspq,        Any,  Integer,   Anyone,    Innocuous),
    row(M::Clrssbsy,      Any,  Undefined, Anyone,    Innocuous),
    row(M::Incsspd,       Any,  Undefined, Anyone,    Innocuous),
    row(M::Incsspq,       Any,  Undefined, Anyone,    Innocuous),
    row(M::Rstorssp,      Any,  Undefined, Anyone,    Innocuous),
    row(M::Saveprevssp,   Any,  Undefined, Anyone,    Innocuous),
    row(M::Setssbsy,      Any,  Undefined, Anyone,    Innocuous),
    row(M::Wrssd,         Any,  Undefined, Anyone,    Innocuous),
    row(M::Wrssq,         Any,  Undefined, Anyone,    Innocuous),
    row(M::Wrussd,        Any,  Undefined, Anyone,    Innocuous),
    row(M::Wrussq,        Any,  Undefined, Anyone,    Innocuous),

    // Undefined by definition; iced's pseudo-instructions.
    row(M::Ud0,           Any,  Undefined, Anyone,    Innocuous),
    row(M::Ud1,           Any,  Undefined, Anyone,    Innocuous),
    row(M::Ud2,           Any,  Undefined, Anyone,    Innocuous),
    row(M::INVALID,       Any,  Undefined, Anyone,    Innocuous),
    row(M::Db,            Any,  Undefined, Anyone,    Innocuous),
    row(M::Dw,            Any,  Undefined, Anyone,    Innocuous),
    row(M::Dd,            Any,  Undefined, Anyone,    Innocuous),
    row(M::Dq,            Any,  Undefined, Anyone,    Innocuous),
    row(M::Zero_bytes,    Any,  Undefined, Anyone,    Innocuous),
];

/// CPUID features that no offered CPU has: their instructions are [`Class::Undefined`], whatever the rows say.
#[rustfmt::skip]
pub const UNDEFINED: &[CpuidFeature] = {
    use CpuidFeature as F;
    &[
        // Virtualization, enclaves, encryption of memory, their kin.
        F::VMX, F::INVEPT, F::INVVPID, F::SVM, F::SKINIT, F::SKINIT_or_SVM, F::SEV_ES, F::SEV_SNP, F::RMPQUERY, F::TDX, F::SGX1,
        F::OSS, F::SMX, F::PCONFIG, F::TSE, F::KL, F::AESKLE, F::WIDE_KL,
        // Newer system instructions.
        F::UINTR, F::FRED, F::LKGS, F::MSRLIST, F::WRMSRNS, F::HRESET, F::INVLPGB, F::MCOMMIT, F::RDPRU, F::WAITPKG, F::MONITORX,
        F::ENQCMD, F::MOVDIR64B, F::MOVDIRI, F::PTWRITE, F::PCOMMIT, F::SERIALIZE, F::TSXLDTRK, F::RTM, F::HLE_or_RTM, F::UDBG,
        F::SMM, F::RAO_INT, F::CMPCCXADD, F::PKU, F::CLZERO,
        // Vector and matrix extensions without a CPU, or of CPUs that are gone.
        F::AMX_TILE, F::AMX_INT8, F::AMX_BF16, F::AMX_FP16, F::AMX_COMPLEX, F::KNC, F::AVX512ER, F::AVX512PF, F::AVX512_4FMAPS,
        F::AVX512_4VNNIW, F::XOP, F::FMA4, F::TBM, F::LWP, F::D3NOW, F::D3NOWEXT, F::MPX,
        // Other vendors and early steppings.
        F::PADLOCK_ACE, F::PADLOCK_PHE, F::PADLOCK_PMM, F::PADLOCK_RNG, F::PADLOCK_GMI, F::PADLOCK_UNDOC, F::CENTAUR_AIS,
        F::CYRIX_FPU, F::CYRIX_EMMI, F::CYRIX_D3NOW, F::CYRIX_SMM, F::CYRIX_SMINT, F::CYRIX_SMINT_0F7E, F::CYRIX_SHR, F::CYRIX_DDI,
        F::CYRIX_DMI, F::CL1INVMB, F::UMOV, F::IA64, F::MOV_TR, F::INTEL8086_ONLY, F::INTEL286_ONLY, F::INTEL386_ONLY,
        F::INTEL386_A0_ONLY, F::INTEL486_A_ONLY, F::FPU287XL_ONLY, F::FPU387SL_ONLY,
    ]
};

/// Features of legacy-encoded instructions that work on x87, MMX or SSE registers or on their saved state.
#[rustfmt::skip]
const NATIVE: &[CpuidFeature] = {
    use CpuidFeature as F;
    &[
        F::FPU, F::FPU287, F::FPU387, F::MMX, F::SSE, F::SSE2, F::SSE3, F::SSSE3, F::SSE4_1, F::SSE4_2, F::SSE4A, F::AES, F::SHA,
        F::PCLMULQDQ, F::GFNI, F::FXSR, F::XSAVE, F::XSAVEOPT, F::XSAVEC, F::XSAVES,
    ]
};

/// All rows.
pub fn rows() -> &'static [Row] {
    ROWS
}

/// The row that decides about `code`, if there is one.
pub fn row_of(code: Code) -> Option<&'static Row> {
    if is_undefined(code) {
        return None;
    }
    let mnemonic = code.mnemonic();
    ROWS.iter().filter(|r| r.mnemonic == mnemonic && has_form(code, r.form)).min_by_key(|r| r.form == Any)
}

/// Does an instruction belong to a feature that no offered CPU has?
pub fn is_undefined(code: Code) -> bool {
    code.cpuid_features().iter().any(|f| UNDEFINED.contains(f))
}

/// How many [`Code`]s there are.
const CODES: usize = Code::VEX_Vsm3rnds2_xmm_xmm_xmmm128_imm8 as usize + 1;

/// The facts of one instruction; derived when first asked for, because starting a short program must not cost 5,000 lookups.
pub fn facts(code: Code) -> &'static Facts {
    static TABLE: [OnceLock<Facts>; CODES] = [const { OnceLock::new() }; CODES];
    TABLE[code as usize].get_or_init(|| derive(code))
}

fn derive(code: Code) -> Facts {
    if let Some(row) = row_of(code) {
        return row.facts;
    }
    let class = if is_undefined(code) {
        Undefined
    } else if is_native(code) {
        Native
    } else {
        Integer
    };
    Facts { class, privilege: Anyone, sensitivity: Innocuous }
}

fn is_native(code: Code) -> bool {
    use CpuidFeature::{BMI1, BMI2};
    let features = code.cpuid_features();
    match code.encoding() {
        EncodingKind::Legacy => features.iter().any(|f| NATIVE.contains(f)),
        _ => !features.iter().any(|f| matches!(f, &BMI1 | &BMI2)),
    }
}

/// Without iced's `op_code`, whose first use builds the texts of all instructions.
#[rustfmt::skip]
fn has_form(code: Code, form: Form) -> bool {
    use Code as C;
    match form {
        Any => true,
        Sreg => matches!(
            code,
            C::Mov_rm16_Sreg | C::Mov_r32m16_Sreg | C::Mov_r64m16_Sreg | C::Mov_Sreg_rm16 | C::Mov_Sreg_r32m16 | C::Mov_Sreg_r64m16
            | C::Pushw_ES | C::Pushw_CS | C::Pushw_SS | C::Pushw_DS | C::Pushw_FS | C::Pushw_GS
            | C::Pushd_ES | C::Pushd_CS | C::Pushd_SS | C::Pushd_DS | C::Pushd_FS | C::Pushd_GS | C::Pushq_FS | C::Pushq_GS
            | C::Popw_ES | C::Popw_CS | C::Popw_SS | C::Popw_DS | C::Popw_FS | C::Popw_GS
            | C::Popd_ES | C::Popd_SS | C::Popd_DS | C::Popd_FS | C::Popd_GS | C::Popq_FS | C::Popq_GS
        ),
        Cr => matches!(code, C::Mov_r32_cr | C::Mov_r64_cr | C::Mov_cr_r32 | C::Mov_cr_r64),
        Dr => matches!(code, C::Mov_r32_dr | C::Mov_r64_dr | C::Mov_dr_r32 | C::Mov_dr_r64),
        Far => code.is_jmp_far() || code.is_jmp_far_indirect() || code.is_call_far() || code.is_call_far_indirect(),
        Str => matches!(code, C::Movsd_m32_m32 | C::Cmpsd_m32_m32),
    }
}

/// The layout of an image of x87 and vector registers in memory (SDM 1 10.5, 13.4), and which way it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateImage {
    /// FXSAVE.
    Fxsave,
    /// FXRSTOR.
    Fxrstor,
    /// XSAVE, XSAVEC, XSAVEOPT.
    Xsave,
    /// XRSTOR.
    Xrstor,
}

/// Which image of registers an instruction stores or loads at CPL 3 too.
pub fn state_image(mnemonic: M) -> Option<StateImage> {
    Some(match mnemonic {
        M::Fxsave | M::Fxsave64 => StateImage::Fxsave,
        M::Fxrstor | M::Fxrstor64 => StateImage::Fxrstor,
        M::Xsave | M::Xsave64 | M::Xsavec | M::Xsavec64 | M::Xsaveopt | M::Xsaveopt64 => StateImage::Xsave,
        M::Xrstor | M::Xrstor64 => StateImage::Xrstor,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{MemorySize, OpCodeOperandKind as K};

    #[test]
    fn every_instruction_has_a_place() {
        assert_eq!(Code::values().count(), CODES);
    }

    /// What the operands say.
    fn form_by_operands(code: Code, form: Form) -> bool {
        let op = code.op_code();
        let any = |kinds: &[K]| op.op_kinds().iter().any(|k| kinds.contains(k));
        match form {
            Any => true,
            Sreg => any(&[K::seg_reg, K::es, K::cs, K::ss, K::ds, K::fs, K::gs]),
            Cr => any(&[K::cr_reg]),
            Dr => any(&[K::dr_reg]),
            Far => {
                any(&[K::farbr2_2, K::farbr4_2])
                    || matches!(op.memory_size(), MemorySize::SegPtr16 | MemorySize::SegPtr32 | MemorySize::SegPtr64)
            }
            Str => any(&[K::es_rDI, K::seg_rSI]),
        }
    }

    #[test]
    fn the_lists_of_forms_are_complete() {
        for row in ROWS {
            for code in Code::values().filter(|c| c.mnemonic() == row.mnemonic) {
                assert_eq!(has_form(code, row.form), form_by_operands(code, row.form), "{code:?} {:?}", row.form);
            }
        }
    }

    #[test]
    fn forms_are_told_apart() {
        let class = |c| facts(c).class;
        assert_eq!(class(Code::Mov_r32_rm32), Integer);
        assert_eq!(class(Code::Mov_rm16_Sreg), Segment);
        assert_eq!(class(Code::Mov_r64_cr), System);
        assert_eq!(class(Code::Mov_dr_r64), System);
        assert_eq!(class(Code::Mov_r32_tr), Undefined);
        assert_eq!(class(Code::Popw_CS), Undefined);
        assert_eq!(class(Code::Popq_FS), Segment);
        assert_eq!(class(Code::Pop_r64), Integer);
        assert_eq!(class(Code::Call_m1664), Segment);
        assert_eq!(class(Code::Call_ptr1632), Segment);
        assert_eq!(class(Code::Call_rm64), Branch);
        assert_eq!(class(Code::Movsd_m32_m32), String);
        assert_eq!(class(Code::Movsd_xmm_xmmm64), Native);
    }

    #[test]
    fn registers_decide_between_integer_and_native() {
        let class = |c| facts(c).class;
        for c in [
            Code::VEX_Andn_r32_r32_rm32,
            Code::VEX_Pdep_r64_r64_rm64,
            Code::Popcnt_r32_rm32,
            Code::Crc32_r32_rm8,
            Code::Movnti_m32_r32,
            Code::Lfence,
            Code::Prefetcht0_m8,
            Code::Cmove_r32_rm32,
            Code::Cmpxchg16b_m128,
            Code::Rdsspq_r64,
            Code::Endbr64,
        ] {
            assert_eq!(class(c), Integer, "{c:?}");
        }
        for c in [
            Code::Fcmove_st0_sti,
            Code::Wait,
            Code::Emms,
            Code::Fxsave_m512byte,
            Code::Ldmxcsr_m32,
            Code::VEX_Kmovw_kr_r32,
            Code::EVEX_Vaddps_zmm_k1z_zmm_zmmm512b32_er,
            Code::Xsave_mem,
        ] {
            assert_eq!(class(c), Native, "{c:?}");
        }
    }
}
