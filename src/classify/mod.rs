//! `bivisor classify`: Popek and Goldberg's classes from the facts table, the hardware's exits beside them, and the theorem's verdict.

mod probe;
mod show;
pub mod theorem;

use crate::forms;
use anyhow::Result;
use bivisor_emulator::interp::names;
use bivisor_emulator::isa::exits::{self, When};
use bivisor_emulator::isa::facts::row_of;
use bivisor_emulator::isa::{Class, Facts, Insn, Privilege, Sensitivity, facts};
use bivisor_emulator::vcpu::How;
use bivisor_translator::explain::{Target, explain};
use clap::Args;
use iced_x86::Code;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::LazyLock;

/// Arguments of `bivisor classify`.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  bivisor classify popf sidt cpuid\n  bivisor classify --probe --markdown > classes.md"
)]
pub struct ClassifyArgs {
    /// Instructions by name; without any, all that are sensitive or privileged.
    #[arg(value_name = "INSN")]
    instructions: Vec<String>,
    /// Execute each at CPL 3 on this host, in a confined child process.
    #[arg(long)]
    probe: bool,
    /// A Markdown table.
    #[arg(long, conflicts_with = "json")]
    markdown: bool,
    /// One JSON object (docs/json.md describes it).
    #[arg(long)]
    json: bool,
}

/// An instruction: forms of it that have the same facts.
#[derive(Debug, Serialize)]
pub struct Entry {
    /// Its name; with a word behind it if only one form is meant.
    pub instruction: String,
    /// How it is carried out.
    pub class: String,
    /// "innocuous", "control" or "behaviour".
    pub sensitivity: &'static str,
    /// Who may execute it.
    pub privilege: &'static str,
    /// What happens at CPL 3, IOPL 0, by the manual; `*` where a bit of CR4 decides.
    pub at_cpl3: &'static str,
    /// How an operating system can make it trap though any user may execute it.
    pub made_to_trap: Option<&'static str>,
    /// What happened on this host.
    pub measured: Option<String>,
    /// In code of 64 bits, of 32 bits.
    pub exists: [bool; 2],
    /// Robin and Irvine's name for it.
    pub robin_irvine: Option<&'static str>,
    /// VT-x exit reason.
    pub vtx_reason: Option<u16>,
    /// When it comes: "never", "always", or the control.
    pub vtx_when: &'static str,
    /// SVM exit code and the intercept's name.
    pub svm: Option<(u16, &'static str)>,
    /// Each engine, and how it carries out the instruction.
    pub engines: Engines,
    /// The encodings.
    #[serde(skip)]
    pub codes: Vec<Code>,
}

/// How each engine does it.
#[derive(Debug, PartialEq, Serialize)]
pub struct Engines {
    /// The interpreter.
    pub interp: &'static str,
    /// Where, for the interpreter.
    pub interp_at: String,
    /// The translator, in a process.
    pub bt: &'static str,
    /// The translator, in a machine at CPL 0: the form that it does best (PUSHFQ is rewritten, PUSHF with 66 is a step).
    pub bt_kernel: &'static str,
    /// KVM, on hardware.
    pub kvm: &'static str,
}

/// A way in one or two words.
pub fn word(how: How) -> &'static str {
    match how {
        How::Function => "function",
        How::Copied => "copied",
        How::Rewritten => "rewritten",
        How::Native => "host CPU",
        How::ByInterpreter => "step",
        How::Hardware => "hardware",
        How::Exits => "leaves",
        How::Unsupported => "#UD",
    }
}

/// Who may, in words.
pub fn privilege(p: Privilege) -> &'static str {
    match p {
        Privilege::Anyone => "anyone",
        Privilege::Cpl0 => "CPL 0",
        Privilege::Cpl0OrUd => "CPL 0, else #UD",
        Privilege::Iopl => "CPL <= IOPL",
        Privilege::Cr4Umip => "CPL 0 if CR4.UMIP",
        Privilege::Cr4Tsd => "CPL 0 if CR4.TSD",
        Privilege::Cr4Pce => "CPL 0 unless CR4.PCE",
    }
}

/// Popek and Goldberg's class, in a word.
pub fn sensitivity(s: Sensitivity) -> &'static str {
    match s {
        Sensitivity::Innocuous => "innocuous",
        Sensitivity::Control => "control",
        Sensitivity::Behaviour => "behaviour",
    }
}

fn at_cpl3(p: Privilege) -> &'static str {
    match p {
        Privilege::Anyone => "runs",
        Privilege::Cpl0 | Privilege::Iopl => "#GP",
        Privilege::Cpl0OrUd => "#UD",
        Privilege::Cr4Umip | Privilege::Cr4Tsd | Privilege::Cr4Pce => "#GP*",
    }
}

fn is_special(f: &Facts) -> bool {
    f.class != Class::Undefined && (f.sensitivity != Sensitivity::Innocuous || f.privilege != Privilege::Anyone)
}

/// How the translator carries out the best of these forms in a kernel, by what it makes of an encoding. Those that only VEX and EVEX encode
/// are as in a process.
fn in_a_kernel(codes: &[Code]) -> &'static str {
    static LEGACY: LazyLock<BTreeMap<Code, (Vec<u8>, Insn)>> = LazyLock::new(|| forms::encodings(64, |_| true));
    let one = |code: Code| {
        let Some((bytes, _)) = LEGACY.get(&code) else { return bivisor_translator::how(code) };
        let made = explain(bytes, 0x40_0000, Target::Kernel);
        made.and_then(|e| e.pieces.first().map(|p| p.how)).unwrap_or(How::ByInterpreter)
    };
    let mut all = codes.iter().copied().filter(|c| theorem::exists(*c, 64)).map(one).peekable();
    let Some(&first) = all.peek() else { return "-" };
    word(all.find(|how| matches!(how, How::Copied | How::Rewritten)).unwrap_or(first))
}

/// The entry for a code and all that share its name and facts.
pub fn entry(code: Code) -> Entry {
    let f = facts(code);
    let name = theorem::name(code);
    let hardware = exits::hardware(code);
    let same = |c: &Code| facts(*c) == f && exits::hardware(*c) == hardware && theorem::name(*c) == name;
    let codes: Vec<Code> = match row_of(code) {
        Some(_) => Code::values().filter(|c| row_of(*c).is_some() && same(c)).collect(),
        None => Code::values().filter(|c| c.mnemonic() == code.mnemonic() && same(c)).collect(),
    };
    let wide = codes.iter().copied().find(|c| theorem::exists(*c, 64)).unwrap_or(code);
    let (file, function) = names::place(wide);
    Entry {
        instruction: name,
        class: format!("{:?}", f.class).to_lowercase(),
        sensitivity: sensitivity(f.sensitivity),
        privilege: privilege(f.privilege),
        at_cpl3: at_cpl3(f.privilege),
        made_to_trap: exits::MADE_TO_TRAP.iter().find(|(m, _)| *m == code.mnemonic()).map(|(_, how)| *how),
        measured: None,
        exists: [64, 32].map(|bits| codes.iter().any(|c| theorem::exists(*c, bits))),
        robin_irvine: exits::problem_of(code).map(|p| p.name),
        vtx_reason: hardware.vtx.reason,
        vtx_when: match hardware.vtx.when {
            When::Never => "never",
            When::Always => "always",
            When::If(control) => control,
        },
        svm: hardware.svm.map(|s| (s.code, s.name)),
        engines: Engines {
            interp: word(names::how(wide)),
            interp_at: format!("{file}: {function}"),
            bt: if theorem::exists(wide, 64) { word(bivisor_translator::how(wide)) } else { "-" },
            bt_kernel: in_a_kernel(&codes),
            kvm: word(bivisor_kvm_backend::how(wide)),
        },
        codes,
    }
}

fn entries(wanted: impl Fn(Code) -> bool) -> Vec<Entry> {
    let mut out: Vec<Entry> = Vec::new();
    for code in Code::values().filter(|c| facts(*c).class != Class::Undefined && wanted(*c)) {
        if !out.iter().any(|e| e.codes.contains(&code)) {
            out.push(entry(code));
        }
    }
    out
}

#[derive(Serialize)]
struct Report {
    instructions: Vec<Entry>,
    verdicts: Vec<theorem::Verdict>,
    probed: bool,
}

/// Classifies and prints.
pub fn run(args: &ClassifyArgs) -> Result<i32> {
    let mut found = Vec::new();
    for name in &args.instructions {
        // POPF and the like: the name stands for all widths.
        let by_name = |c: Code| {
            let short = theorem::name(c);
            short.eq_ignore_ascii_case(name) || forms::mnemonic(name) == Some(c.mnemonic())
        };
        let some = entries(by_name);
        if some.is_empty() {
            eprintln!("bivisor: `{name}` is no instruction of an offered CPU: give a mnemonic, as POPF or \"MOV seg\"");
            return Ok(2);
        }
        found.extend(some);
    }
    if args.instructions.is_empty() {
        found = entries(|c| is_special(facts(c)));
    }
    if args.probe {
        probe::measure(&mut found)?;
    }
    let verdicts = theorem::CASES.map(theorem::verdict).to_vec();
    let report = Report { instructions: found, verdicts, probed: args.probe };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else if args.markdown {
        print!("{}", show::markdown(&report));
    } else {
        print!("{}", show::text(&report, !args.instructions.is_empty()));
    }
    Ok(0)
}
