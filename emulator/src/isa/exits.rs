//! What hardware virtualization makes of an instruction: the VT-x exit reason and the SVM intercept, beside `facts.rs`.
//!
//! Sources: SDM 3C 26.1.2 and 26.1.3 (instructions that cause VM exits unconditionally, conditionally), SDM 3D appendix C (exit
//! reasons), APM 2 15.9 and appendix C (SVM intercepts and their exit codes). No row: the instruction never leaves the guest by itself.

use crate::isa::facts::{Form, row_of};
use iced_x86::{Code, Mnemonic as M};

/// When an instruction leaves the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// It runs in the guest, on the guest's state.
    Never,
    /// Whatever the controls say.
    Always,
    /// If this control is set. `p` and `s` with a number: a bit of the primary, secondary processor-based controls.
    If(&'static str),
}

/// VT-x: an exit reason and when it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VtX {
    /// The basic exit reason.
    pub reason: Option<u16>,
    /// When.
    pub when: When,
}

/// SVM: the exit code of the intercept, if there is one; it is taken if its bit is set in the VMCB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Svm {
    /// The exit code; for groups (control registers, debug registers) the first.
    pub code: u16,
    /// What the APM calls the intercept.
    pub name: &'static str,
}

/// The columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// Under VT-x.
    pub vtx: VtX,
    /// Under SVM.
    pub svm: Option<Svm>,
}

struct Row {
    mnemonics: &'static [M],
    form: Form,
    hardware: Hardware,
}

const fn never() -> VtX {
    VtX { reason: None, when: When::Never }
}

const fn always(reason: u16) -> VtX {
    VtX { reason: Some(reason), when: When::Always }
}

const fn on(reason: u16, control: &'static str) -> VtX {
    VtX { reason: Some(reason), when: When::If(control) }
}

const fn svm(code: u16, name: &'static str) -> Option<Svm> {
    Some(Svm { code, name })
}

const fn row(mnemonics: &'static [M], form: Form, vtx: VtX, svm: Option<Svm>) -> Row {
    Row { mnemonics, form, hardware: Hardware { vtx, svm } }
}

use Form::{Any, Cr, Dr, Far};

const TASK: &str = "it switches tasks";
const MASKED: &str = "a bit of the CR0/CR4 mask; CR3 p15/p16; CR8 p19/p20";
const TABLES: &str = "descriptor-table exiting s2";

#[rustfmt::skip] // one instruction a line
const ROWS: &[Row] = &[
    //  mnemonics                                    form  VT-x                                      SVM
    row(&[M::Pushf, M::Pushfd, M::Pushfq],           Any,  never(),                                  svm(0x70, "PUSHF")),
    row(&[M::Popf, M::Popfd, M::Popfq],              Any,  never(),                                  svm(0x71, "POPF")),
    row(&[M::Iret, M::Iretd, M::Iretq],              Any,  on(9, TASK),                              svm(0x74, "IRET")),
    row(&[M::Call, M::Jmp],                          Far,  on(9, TASK),                              svm(0x7d, "TASK_SWITCH")),
    row(&[M::Int],                                   Any,  on(9, TASK),                              svm(0x75, "INTn")),
    row(&[M::Int1],                                  Any,  on(0, "exception bitmap, bit 1"),         svm(0x88, "ICEBP")),
    row(&[M::Int3],                                  Any,  on(0, "exception bitmap, bit 3"),         svm(0x43, "EXCP 3")),
    row(&[M::Into],                                  Any,  on(0, "exception bitmap, bit 4"),         svm(0x44, "EXCP 4")),
    row(&[M::Sidt],                                  Any,  on(46, TABLES),                           svm(0x66, "IDTR_READ")),
    row(&[M::Sgdt],                                  Any,  on(46, TABLES),                           svm(0x67, "GDTR_READ")),
    row(&[M::Sldt],                                  Any,  on(47, TABLES),                           svm(0x68, "LDTR_READ")),
    row(&[M::Str],                                   Any,  on(47, TABLES),                           svm(0x69, "TR_READ")),
    row(&[M::Lidt],                                  Any,  on(46, TABLES),                           svm(0x6a, "IDTR_WRITE")),
    row(&[M::Lgdt],                                  Any,  on(46, TABLES),                           svm(0x6b, "GDTR_WRITE")),
    row(&[M::Lldt],                                  Any,  on(47, TABLES),                           svm(0x6c, "LDTR_WRITE")),
    row(&[M::Ltr],                                   Any,  on(47, TABLES),                           svm(0x6d, "TR_WRITE")),
    row(&[M::Mov],                                   Cr,   on(28, MASKED),                           svm(0x00, "CRn_READ, CRn_WRITE")),
    row(&[M::Mov],                                   Dr,   on(29, "MOV-DR exiting p23"),             svm(0x20, "DRn_READ, DRn_WRITE")),
    row(&[M::Smsw],                                  Any,  never(),                                  svm(0x00, "CR0_READ")),
    row(&[M::Lmsw, M::Clts],                         Any,  on(28, "a bit of the CR0 mask"),          svm(0x10, "CR0_WRITE")),
    row(&[M::Invd],                                  Any,  always(13),                               svm(0x76, "INVD")),
    row(&[M::Wbinvd, M::Wbnoinvd],                   Any,  on(54, "WBINVD exiting s6"),              svm(0x89, "WBINVD")),
    row(&[M::Invlpg],                                Any,  on(14, "INVLPG exiting p9"),              svm(0x79, "INVLPG")),
    row(&[M::Invpcid],                               Any,  on(58, "INVLPG exiting p9, INVPCID s12"), svm(0xa2, "INVPCID")),
    row(&[M::Xsetbv],                                Any,  always(55),                               svm(0x8d, "XSETBV")),
    row(&[M::Rdmsr],                                 Any,  on(31, "no MSR bitmap p28, or its bit"),  svm(0x7c, "MSR")),
    row(&[M::Wrmsr],                                 Any,  on(32, "no MSR bitmap p28, or its bit"),  svm(0x7c, "MSR")),
    row(&[M::Cpuid],                                 Any,  always(10),                               svm(0x72, "CPUID")),
    row(&[M::Rdtsc],                                 Any,  on(16, "RDTSC exiting p12"),              svm(0x6e, "RDTSC")),
    row(&[M::Rdtscp],                                Any,  on(51, "RDTSC exiting p12"),              svm(0x87, "RDTSCP")),
    row(&[M::Rdpmc],                                 Any,  on(15, "RDPMC exiting p11"),              svm(0x6f, "RDPMC")),
    row(&[M::Rdrand],                                Any,  on(57, "RDRAND exiting s11"),             None),
    row(&[M::Rdseed],                                Any,  on(61, "RDSEED exiting s16"),             None),
    row(&[M::Hlt],                                   Any,  on(12, "HLT exiting p7"),                 svm(0x78, "HLT")),
    row(&[M::Monitor],                               Any,  on(39, "MONITOR exiting p29"),            svm(0x8a, "MONITOR")),
    row(&[M::Mwait],                                 Any,  on(36, "MWAIT exiting p10"),              svm(0x8b, "MWAIT")),
    row(&[M::Pause],                                 Any,  on(40, "PAUSE exiting p30, or a loop of them s10"), svm(0x77, "PAUSE")),
    row(&[M::In, M::Out],                            Any,  on(30, "I/O exiting p24, or I/O bitmaps p25"), svm(0x7b, "IOIO")),
    row(&[M::Insb, M::Insw, M::Insd],                Any,  on(30, "I/O exiting p24, or I/O bitmaps p25"), svm(0x7b, "IOIO")),
    row(&[M::Outsb, M::Outsw, M::Outsd],             Any,  on(30, "I/O exiting p24, or I/O bitmaps p25"), svm(0x7b, "IOIO")),
    row(&[M::Xsaves, M::Xsaves64],                   Any,  on(63, "XSAVES s20 and its bitmap"),      None),
    row(&[M::Xrstors, M::Xrstors64],                 Any,  on(64, "XSAVES s20 and its bitmap"),      None),
    row(&[M::Rsm],                                   Any,  on(17, "in system-management mode"),      svm(0x73, "RSM")),
];

/// The columns of one instruction.
pub fn hardware(code: Code) -> Hardware {
    let form = row_of(code).map_or(Any, |r| r.form);
    let found = ROWS.iter().find(|r| r.mnemonics.contains(&code.mnemonic()) && r.form == form);
    found.map_or(Hardware { vtx: never(), svm: None }, |r| r.hardware)
}

/// The basic exit reasons of VT-x by number (SDM 3D table C-1).
#[rustfmt::skip]
pub const VTX_REASONS: &[(u16, &str)] = &[
    (0, "exception or NMI"), (1, "external interrupt"), (2, "triple fault"), (3, "INIT"), (4, "SIPI"), (5, "I/O SMI"),
    (6, "other SMI"), (7, "interrupt window"), (8, "NMI window"), (9, "task switch"), (10, "CPUID"), (11, "GETSEC"), (12, "HLT"),
    (13, "INVD"), (14, "INVLPG"), (15, "RDPMC"), (16, "RDTSC"), (17, "RSM"), (18, "VMCALL"), (19, "VMCLEAR"), (20, "VMLAUNCH"),
    (21, "VMPTRLD"), (22, "VMPTRST"), (23, "VMREAD"), (24, "VMRESUME"), (25, "VMWRITE"), (26, "VMXOFF"), (27, "VMXON"),
    (28, "control-register access"), (29, "MOV DR"), (30, "I/O instruction"), (31, "RDMSR"), (32, "WRMSR"),
    (33, "entry failure: guest state"), (34, "entry failure: MSR loading"), (36, "MWAIT"), (37, "monitor trap flag"), (39, "MONITOR"),
    (40, "PAUSE"), (41, "entry failure: machine check"), (43, "TPR below threshold"), (44, "APIC access"), (45, "virtualized EOI"),
    (46, "access to GDTR or IDTR"), (47, "access to LDTR or TR"), (48, "EPT violation"), (49, "EPT misconfiguration"), (50, "INVEPT"),
    (51, "RDTSCP"), (52, "preemption timer"), (53, "INVVPID"), (54, "WBINVD or WBNOINVD"), (55, "XSETBV"), (56, "APIC write"),
    (57, "RDRAND"), (58, "INVPCID"), (59, "VMFUNC"), (60, "ENCLS"), (61, "RDSEED"), (62, "page-modification log full"), (63, "XSAVES"),
    (64, "XRSTORS"), (65, "PCONFIG"), (66, "SPP event"), (67, "UMWAIT"), (68, "TPAUSE"), (69, "LOADIWKEY"), (72, "ENQCMD"),
    (73, "ENQCMDS"), (74, "bus lock"), (75, "notify"), (76, "SEAMCALL"), (77, "TDCALL"), (78, "RDMSRLIST"), (79, "WRMSRLIST"),
];

/// What a reason is called.
pub fn reason_name(reason: u16) -> &'static str {
    VTX_REASONS.iter().find(|(n, _)| *n == reason).map_or("?", |(_, name)| name)
}

/// One of the instructions that Robin and Irvine (2000) found sensitive and unprivileged on the Pentium. The paper says 17 and lists 18.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Problem {
    /// As they name it.
    pub name: &'static str,
    /// One of its mnemonics, as 64-bit code has it where it has it.
    pub mnemonic: M,
    /// Which form.
    pub form: Form,
    /// Their requirement that it breaks: 3B sensitive registers, 3C the protection, memory or relocation system.
    pub requirement: &'static str,
    /// What goes wrong above CPL 0, where nothing traps.
    pub why: &'static str,
}

const fn problem(name: &'static str, mnemonic: M, form: Form, requirement: &'static str, why: &'static str) -> Problem {
    Problem { name, mnemonic, form, requirement, why }
}

/// Robin and Irvine's list.
#[rustfmt::skip]
pub const ROBIN_IRVINE: [Problem; 18] = [
    problem("SGDT",     M::Sgdt,   Any,        "3B", "reads the real GDTR"),
    problem("SIDT",     M::Sidt,   Any,        "3B", "reads the real IDTR"),
    problem("SLDT",     M::Sldt,   Any,        "3B", "reads the real LDTR"),
    problem("SMSW",     M::Smsw,   Any,        "3B", "reads the real CR0"),
    problem("PUSHF",    M::Pushfq, Any,        "3B", "shows the real IF and IOPL"),
    problem("POPF",     M::Popfq,  Any,        "3B", "silently keeps IF and IOPL"),
    problem("LAR",      M::Lar,    Any,        "3C", "depends on CPL and the real GDT"),
    problem("LSL",      M::Lsl,    Any,        "3C", "depends on CPL and the real GDT"),
    problem("VERR",     M::Verr,   Any,        "3C", "depends on CPL and the real GDT"),
    problem("VERW",     M::Verw,   Any,        "3C", "depends on CPL and the real GDT"),
    problem("POP seg",  M::Pop,    Form::Sreg, "3C", "checks the real CPL, loads the real descriptor"),
    problem("PUSH seg", M::Push,   Form::Sreg, "3C", "shows the real CPL in CS and SS"),
    problem("CALL far", M::Call,   Far,        "3C", "pushes the real CS; gates of the real tables"),
    problem("JMP far",  M::Jmp,    Far,        "3C", "gates and descriptors of the real tables"),
    problem("INT n",    M::Int,    Any,        "3C", "goes through the real IDT"),
    problem("RET far",  M::Retf,   Any,        "3C", "checks the real CPL"),
    problem("STR",      M::Str,    Any,        "3C", "reads the real task register"),
    problem("MOV seg",  M::Mov,    Form::Sreg, "3C", "shows the real CPL; loads the real descriptor"),
];

/// The entry of the list for an instruction.
pub fn problem_of(code: Code) -> Option<&'static Problem> {
    let row = row_of(code)?;
    // PUSHF stands for PUSHFD and PUSHFQ, and so on.
    let family = |m: M| match m {
        M::Pushf | M::Pushfd => M::Pushfq,
        M::Popf | M::Popfd => M::Popfq,
        m => m,
    };
    ROBIN_IRVINE.iter().find(|p| p.mnemonic == family(row.mnemonic) && p.form == row.form)
}

/// Instructions that any user may execute, but that an operating system can make trap by other means than a ring: `(mnemonic, how)`.
pub const MADE_TO_TRAP: &[(M, &str)] = &[
    (M::Cpuid, "CPUID faulting, where the processor has it"),
    (M::Syscall, "EFER.SCE = 0: #UD"),
    (M::Sysenter, "SYSENTER_CS = 0: #GP"),
    (M::Rdfsbase, "CR4.FSGSBASE = 0: #UD"),
    (M::Rdgsbase, "CR4.FSGSBASE = 0: #UD"),
    (M::Wrfsbase, "CR4.FSGSBASE = 0: #UD"),
    (M::Wrgsbase, "CR4.FSGSBASE = 0: #UD"),
    (M::Xgetbv, "CR4.OSXSAVE = 0: #UD"),
    (M::Int, "a gate of DPL 0: #GP"),
    (M::Int3, "a gate of DPL 0: #GP"),
    (M::Into, "a gate of DPL 0: #GP"),
    (M::Int1, "debug exceptions go to the operating system anyway"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::facts::is_undefined;

    /// Not exits of the instruction's own: the exception they raise may be in the exception bitmap. And SMSW, which shows the read
    /// shadow and does not leave (SDM 3C 26.3).
    fn is_apart(code: Code) -> bool {
        matches!(code.mnemonic(), M::Bound | M::Ud0 | M::Ud1 | M::Ud2 | M::Smsw)
    }

    /// iced-x86 has the same two properties from its own reading of the manuals.
    #[test]
    fn vt_x_agrees_with_iced() {
        let mut wrong = Vec::new();
        for code in Code::values().filter(|c| !is_undefined(*c) && !is_apart(*c)) {
            let op = code.op_code();
            let ours = hardware(code).vtx.when;
            // An exception bitmap can be set for any exception, and any far transfer can be a task switch: not the instruction's own.
            let own = !matches!(hardware(code).vtx.reason, Some(0 | 9));
            let agree = match ours {
                When::Always => op.intel_vm_exit(),
                When::If(_) if own => op.intel_may_vm_exit(),
                When::If(_) => true,
                When::Never => !op.intel_vm_exit() && !op.intel_may_vm_exit(),
            };
            if !agree {
                wrong.push(format!(
                    "{code:?}: {ours:?}, iced: always {}, may {}",
                    op.intel_vm_exit(),
                    op.intel_may_vm_exit()
                ));
            }
        }
        assert!(wrong.is_empty(), "{} wrong\n{}", wrong.len(), wrong.join("\n"));
    }

    #[test]
    fn svm_agrees_with_iced() {
        let mut wrong = Vec::new();
        for code in Code::values().filter(|c| !is_undefined(*c) && c.mnemonic() != M::Bound) {
            let op = code.op_code();
            let iced = op.amd_vm_exit() || op.amd_may_vm_exit();
            let ours = hardware(code).svm.is_some();
            let exception = matches!(hardware(code).svm, Some(Svm { code: 0x40..=0x5f | 0x7d, .. }));
            if iced != ours && !exception {
                wrong.push(format!("{code:?}: {ours}, iced: {iced}"));
            }
        }
        assert!(wrong.is_empty(), "{} wrong\n{}", wrong.len(), wrong.join("\n"));
    }

    #[test]
    fn reasons_have_names_in_order() {
        assert!(VTX_REASONS.windows(2).all(|w| w[0].0 < w[1].0));
        for row in ROWS {
            assert!(row.hardware.vtx.reason.is_none_or(|r| reason_name(r) != "?"), "{:?}", row.mnemonics);
        }
    }

    #[test]
    fn every_row_and_every_problem_is_some_instruction_s() {
        for row in ROWS {
            for m in row.mnemonics {
                let some = Code::values().any(|c| c.mnemonic() == *m && hardware(c) == row.hardware);
                assert!(some, "{m:?} {:?}", row.form);
            }
        }
        for p in &ROBIN_IRVINE {
            assert!(Code::values().any(|c| problem_of(c) == Some(p)), "{}", p.name);
        }
    }
}
