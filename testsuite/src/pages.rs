//! The generated pages of `docs/`, and the totals that the README quotes: text from the tables that the engines themselves use.

use crate::dispatch;
use bivisor_emulator::isa::facts::{Form, Row, row_of, rows};
use bivisor_emulator::isa::{Class, Facts, Privilege, Sensitivity, facts};
use bivisor_emulator::linux::table::{ROWS, Status};
use bivisor_emulator::vcpu::How;
use iced_x86::Code;
use std::fmt::Write;

/// How many rows of the table of system calls are passed through, handled, refused.
fn calls() -> [usize; 3] {
    let count = |f: fn(&Status) -> bool| ROWS.iter().filter(|r| f(&r.status)).count();
    [
        count(|s| matches!(s, Status::PassedThrough)),
        count(|s| matches!(s, Status::Handled(_))),
        count(|s| matches!(s, Status::Refused(_))),
    ]
}

/// What `errno` is called.
///
/// # Panics
/// At one that no row has used so far: add it.
fn errno(number: i32) -> &'static str {
    match number {
        libc::EPERM => "EPERM",
        libc::EINTR => "EINTR",
        libc::EINVAL => "EINVAL",
        libc::ENOSPC => "ENOSPC",
        libc::ENOSYS => "ENOSYS",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        n => panic!("errno {n} has no name here"),
    }
}

/// The same text as a cell of a Markdown table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

/// `docs/syscalls.md`.
pub fn syscalls() -> String {
    let [passed, handled, refused] = calls();
    let mut out = format!(
        "# System calls of a Linux process

Generated from `emulator/src/linux/table.rs` by `UPDATE=1 cargo test -p bivisor-testsuite --test docs`; not edited by hand.

*Passed through*: the host's kernel gets it with the same arguments. *Handled*: by a function of Bivisor, which may call the host.
*Refused*: with this errno. A number that is not listed is refused with ENOSYS.

| all | passed through | handled | refused |
| --- | --- | --- | --- |
| {} | {passed} | {handled} | {refused} |

| number | name | | note |
| --- | --- | --- | --- |
",
        ROWS.len()
    );
    for row in ROWS {
        let way = match row.status {
            Status::PassedThrough => "passed through".to_string(),
            Status::Handled(_) => "handled".to_string(),
            Status::Refused(number) => format!("refused: {}", errno(number)),
        };
        writeln!(out, "| {} | {} | {way} | {} |", row.number, row.name, cell(row.note)).expect("a string");
    }
    out
}

/// Is it more than plain computation that anyone may do?
fn is_special(f: &Facts) -> bool {
    f.class != Class::Undefined && (f.sensitivity != Sensitivity::Innocuous || f.privilege != Privilege::Anyone)
}

/// Columns and rows of the first table of `docs/instructions.md`.
const PRIVILEGES: [(Privilege, &str); 7] = [
    (Privilege::Anyone, "anyone"),
    (Privilege::Cr4Umip, "CPL 0 if CR4.UMIP"),
    (Privilege::Cr4Tsd, "CPL 0 if CR4.TSD"),
    (Privilege::Cr4Pce, "CPL 0 unless CR4.PCE"),
    (Privilege::Iopl, "CPL ≤ IOPL"),
    (Privilege::Cpl0, "CPL 0"),
    (Privilege::Cpl0OrUd, "CPL 0, else #UD"),
];

const SENSITIVITIES: [(Sensitivity, &str); 3] =
    [(Sensitivity::Innocuous, "innocuous"), (Sensitivity::Control, "control"), (Sensitivity::Behaviour, "behaviour")];

fn name_of<T: PartialEq>(names: &[(T, &'static str)], value: &T) -> &'static str {
    names.iter().find(|(v, _)| v == value).expect("all values are listed").1
}

fn codes() -> impl Iterator<Item = Code> {
    Code::values().filter(|c| facts(*c).class != Class::Undefined)
}

fn word(how: How) -> &'static str {
    match how {
        How::Function => "function",
        How::Copied => "copied",
        How::Rewritten => "rewritten",
        How::Native => "host CPU",
        How::ByInterpreter => "interpreter step",
        How::Hardware => "hardware",
        How::Exits => "leaves",
        How::Unsupported => "#UD",
    }
}

/// The different words of some codes, in order of the codes.
fn words(codes: &[Code], word: impl Fn(Code) -> String) -> String {
    let mut out: Vec<String> = Vec::new();
    for w in codes.iter().map(|c| word(*c)) {
        if !out.contains(&w) {
            out.push(w);
        }
    }
    if out.is_empty() { "—".to_string() } else { out.join(", ") }
}

/// The instruction as a manual's heading names it.
fn title(row: &Row) -> String {
    let name = format!("{:?}", row.mnemonic).to_uppercase();
    match row.form {
        Form::Any => name,
        Form::Sreg => format!("{name} with a segment register"),
        Form::Cr => format!("{name} with a control register"),
        Form::Dr => format!("{name} with a debug register"),
        Form::Far => format!("{name}, far"),
        Form::Str => format!("{name}, string"),
    }
}

/// How many codes the translator carries out in each way: plain ones, then the others.
fn translated() -> [[usize; 4]; 2] {
    let mut counts = [[0; 4]; 2];
    for code in codes().filter(|c| c.op_code().mode64()) {
        let column = match bivisor_translator::how(code) {
            How::Copied => 0,
            How::Rewritten => 1,
            How::Exits => 2,
            How::ByInterpreter => 3,
            other => panic!("{code:?} is {other:?}"),
        };
        counts[usize::from(is_special(facts(code)))][column] += 1;
    }
    counts
}

/// `docs/instructions.md`.
pub fn instructions() -> String {
    let all: Vec<Code> = codes().collect();
    let count = |f: &dyn Fn(&Facts) -> bool| all.iter().filter(|c| f(facts(**c))).count();
    let interpreted = |how| all.iter().filter(|c| dispatch::how(**c) == how).count();
    let hardware = |how| all.iter().filter(|c| bivisor_kvm_backend::how(**c) == how).count();

    let mut out = format!(
        "# Sensitive and privileged instructions

Generated from `emulator/src/isa/facts.rs`, `emulator/src/interp/dispatch.rs` and what the engines say of themselves (`how`) by
`UPDATE=1 cargo test -p bivisor-testsuite --test docs`; not edited by hand.

Numbers are of encodings as iced-x86 counts them: {} of its {}; no offered CPU has the others, which are #UD. *Sensitive* as Popek and
Goldberg define it: *control* changes the configuration of resources or the mode, *behaviour* depends on it or shows it, *innocuous* does
neither.

## Totals

| who may | innocuous | control | behaviour |
| --- | --- | --- | --- |
",
        all.len(),
        Code::values().len(),
    );
    for (privilege, name) in PRIVILEGES {
        let n = |s| count(&|f: &Facts| f.privilege == privilege && f.sensitivity == s);
        let numbers = SENSITIVITIES.map(|(s, _)| n(s).to_string());
        writeln!(out, "| {name} | {} |", numbers.join(" | ")).expect("a string");
    }
    write!(
        out,
        "
The interpreter carries out {} by functions and {} on the host's own units. In KVM {} run on the hardware and {} leave the guest.

The translator, which runs 64-bit user code, of encodings that exist there:

| | copied | rewritten | leaves | interpreter step |
| --- | --- | --- | --- | --- |
",
        interpreted(How::Function),
        interpreted(How::Native),
        hardware(How::Hardware),
        hardware(How::Exits),
    )
    .expect("a string");
    for (name, numbers) in ["innocuous, anyone", "sensitive or privileged"].iter().zip(translated()) {
        writeln!(out, "| {name} | {} |", numbers.map(|n| n.to_string()).join(" | ")).expect("a string");
    }
    out.push_str(
        "
## One by one

*Interpreter*: file and function below `emulator/src/interp` (`sensitive/` for all that are sensitive). *Translator*: in a Linux process
that sees the host's time and random numbers; copied: the host's instruction is the guest's; interpreter step: a call out of translated
code, where most of these become the fault that user code gets; —: not in 64-bit mode. *KVM*: with hardware virtualization; leaves: to
the host's kernel or to Bivisor.

| instruction | class | who may | sensitive | interpreter | translator | KVM |
| --- | --- | --- | --- | --- | --- | --- |
",
    );
    for row in rows().iter().filter(|r| is_special(&r.facts)) {
        let here: Vec<Code> =
            Code::values().filter(|c| row_of(*c).is_some_and(|found| std::ptr::eq(found, row))).collect();
        let wide: Vec<Code> = here.iter().copied().filter(|c| c.op_code().mode64()).collect();
        writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {} |",
            title(row),
            format!("{:?}", row.facts.class).to_lowercase(),
            name_of(&PRIVILEGES, &row.facts.privilege),
            name_of(&SENSITIVITIES, &row.facts.sensitivity),
            words(&here, |c| format!("`{}`", dispatch::function_of(c).replace("r#", ""))),
            words(&wide, |c| word(bivisor_translator::how(c)).to_string()),
            words(&here, |c| word(bivisor_kvm_backend::how(c)).to_string()),
        )
        .expect("a string");
    }
    out
}

/// The totals that the README quotes, as its list.
pub fn totals() -> String {
    let [passed, handled, refused] = calls();
    let all: Vec<Code> = codes().collect();
    let number = |f: &dyn Fn(Code) -> bool| all.iter().filter(|c| f(**c)).count();
    let sensitive = number(&|c| facts(c).sensitivity != Sensitivity::Innocuous);
    let unguarded =
        number(&|c| facts(c).sensitivity != Sensitivity::Innocuous && facts(c).privilege == Privilege::Anyone);
    let missing = number(&|c| dispatch::how(c) == How::Unsupported);
    let carried_out = match missing {
        0 => "all".to_string(),
        _ => format!("all but {missing}"),
    };
    let [plain, special] = translated();
    let t = crate::campaign::matrix::Totals::on_record();
    let (forms, by_engine) = (t.forms, t.by_engine());
    let (unexpected, expected) = (t.unexpected, t.expected);
    let [copied, rewritten, leave, stepped] = std::array::from_fn(|i| plain[i] + special[i]);
    format!(
        "- [Instructions](docs/instructions.md): {} encodings, {carried_out} by a function of the interpreter or, where the host has them,
  on its own units. {sensitive} are sensitive, {unguarded} of them open to any user. Of {} in 64-bit code the translator copies {copied},
  rewrites {rewritten} and leaves {stepped} to the interpreter, {leave} to the system.
- [System calls](docs/syscalls.md): {}, of which {passed} go to the host as they are, {handled} are handled and {refused} are refused.
- [Fidelity](docs/fidelity.md): {forms} instruction forms compared with the host CPU, {by_engine}:
  {unexpected} unexpected divergences, {expected} expected.
",
        all.len(),
        copied + rewritten + leave + stepped,
        ROWS.len(),
    )
}
