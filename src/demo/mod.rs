//! `bivisor demo`: one ring-0 guest under trap-and-emulate and under the three engines, and the line where the first goes wrong.

mod balloon;

use crate::guest::{
    CODE, ENGINES, EXIT, Engine, GDT, Gate, Guest, IDT, KCODE, RAISE, REPORT, TSSSEL, WINDOW, WINDOW_TABLE,
};
use crate::text::{Paint, wrap};
use anyhow::Result;
use clap::{Args, ValueEnum};
use iced_x86::code_asm::*;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// Arguments of `bivisor demo`.
#[derive(Args)]
#[command(
    after_help = "Example:\n  bivisor demo popf\n\nExit status: 0 if the engines that must be right are, 1 if one is not."
)]
pub struct DemoArgs {
    /// Which.
    #[arg(value_enum)]
    demo: Demo,
    /// One JSON object (docs/json.md describes it).
    #[arg(long)]
    json: bool,
}

/// The demonstrations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Demo {
    /// POPF loses the interrupt flag under trap-and-emulate.
    Popf,
    /// A guest finds out that it is a guest: SIDT, STR, MOV from CS ...
    Redpill,
    /// Page faults that the guest sees, and those that only the monitor does.
    Pagefault,
    /// Memory that a guest gives back through a virtio balloon.
    Balloon,
}

/// One thing that the guest does and reports.
#[derive(Clone, Debug, Serialize)]
struct Step {
    code: &'static str,
    /// What the architecture demands.
    expected: u32,
    /// What each engine gave; `null`: it did not get that far.
    seen: BTreeMap<&'static str, Option<u32>>,
}

/// Intel's exit reason, what it was, how often.
type Count = (Option<u16>, String, u64);

#[derive(Debug, Serialize)]
struct Report {
    demo: String,
    steps: Vec<Step>,
    /// Engines that are not to be had here or gave up, and why.
    failed: BTreeMap<&'static str, String>,
    /// Why each engine was left, how often, and Intel's number for that.
    ledger: BTreeMap<&'static str, Vec<Count>>,
    /// The first step that trap-and-emulate gets wrong.
    wrong_under_trap: Option<usize>,
    /// What it shows.
    moral: &'static str,
    /// The limits of this host's KVM that matter here.
    kvm: String,
}

/// Code and the value it must report.
type Steps = Vec<(&'static str, u32)>;

/// Assembles steps that end with the value in EAX.
struct Script<'a> {
    a: &'a mut CodeAssembler,
    steps: Steps,
}

impl Script<'_> {
    /// Reports EAX.
    fn report(&mut self, code: &'static str, expected: u32) -> Result<()> {
        self.a.mov(dx, i32::from(REPORT) + self.steps.len() as i32)?;
        self.a.out(dx, eax)?;
        self.steps.push((code, expected));
        Ok(())
    }
}

/// Where handlers count.
const COUNT: u64 = 0x6_0000;
/// The vector of the interrupt.
const VECTOR: u8 = 0x40;

/// A handler that counts at [`COUNT`] and goes back; with `error`, over an error code.
fn counting(a: &mut CodeAssembler) -> Result<CodeLabel> {
    let mut label = a.create_label();
    a.set_label(&mut label)?;
    a.inc(dword_ptr(COUNT))?;
    a.iretq()?;
    Ok(label)
}

/// ZF, IF and so on as one bit in EAX, from RFLAGS.
fn flag(a: &mut CodeAssembler, bit: i32) -> Result<()> {
    a.pushfq()?;
    a.pop(rax)?;
    a.shr(eax, bit)?;
    a.and(eax, 1)?;
    Ok(())
}

fn popf(s: &mut Script<'_>) -> Result<Vec<Gate>> {
    let set_if = |a: &mut CodeAssembler, on: bool| -> Result<()> {
        a.pushfq()?;
        match on {
            true => a.or(dword_ptr(rsp), 0x200)?,
            false => a.and(dword_ptr(rsp), !0x200)?,
        }
        a.popfq()?;
        Ok(())
    };
    s.a.sti()?;
    flag(s.a, 9)?;
    s.report("sti; pushf: IF", 1)?;
    s.a.cli()?;
    flag(s.a, 9)?;
    s.report("cli; pushf: IF", 0)?;
    s.a.sti()?;
    set_if(s.a, false)?;
    flag(s.a, 9)?;
    s.report("popf with IF=0; pushf: IF", 0)?;
    s.a.mov(al, i32::from(VECTOR))?;
    s.a.out(i32::from(RAISE), al)?;
    s.a.nop()?;
    s.a.mov(eax, dword_ptr(COUNT))?;
    s.report("an interrupt is raised; arrived", 0)?;
    set_if(s.a, true)?;
    s.a.nop()?;
    s.a.nop()?;
    s.a.mov(eax, dword_ptr(COUNT))?;
    s.report("popf with IF=1; arrived", 1)?;
    s.a.cli()?;
    s.a.mov(al, i32::from(VECTOR))?;
    s.a.out(i32::from(RAISE), al)?;
    s.a.nop()?;
    s.a.mov(eax, dword_ptr(COUNT))?;
    s.report("cli; another is raised; arrived", 1)?;
    set_if(s.a, true)?;
    s.a.nop()?;
    s.a.nop()?;
    s.a.cli()?;
    s.a.mov(eax, dword_ptr(COUNT))?;
    s.report("popf with IF=1; arrived", 2)?;
    s.a.out(i32::from(EXIT), al)?;
    s.a.cli()?;
    s.a.hlt()?;
    let label = counting(s.a)?;
    Ok(vec![Gate { vector: VECTOR, dpl: 0, label }])
}

fn redpill(s: &mut Script<'_>) -> Result<Vec<Gate>> {
    s.a.sub(rsp, 16)?;
    s.a.sidt(ptr(rsp))?;
    s.a.mov(eax, dword_ptr(rsp + 2))?;
    s.report("sidt: base of the IDT", IDT as u32)?;
    s.a.sgdt(ptr(rsp))?;
    s.a.mov(eax, dword_ptr(rsp + 2))?;
    s.report("sgdt: base of the GDT", GDT as u32)?;
    s.a.xor(eax, eax)?;
    s.a.sldt(ax)?;
    s.report("sldt", 0)?;
    s.a.xor(eax, eax)?;
    s.a.str(ax)?;
    s.report("str: task register", u32::from(TSSSEL))?;
    s.a.xor(eax, eax)?;
    s.a.mov(eax, cs)?;
    s.report("mov eax, cs", u32::from(KCODE))?;
    s.a.xor(eax, eax)?;
    s.a.mov(ecx, 0x33)?;
    s.a.lar(ebx, ecx)?;
    s.a.setz(al)?;
    s.report("lar: is there a selector 33h", 0)?;
    s.a.xor(eax, eax)?;
    s.a.mov(ecx, i32::from(KCODE))?;
    s.a.verr(cx)?;
    s.a.setz(al)?;
    s.report("verr: may the kernel read its code", 1)?;
    flag(s.a, 9)?;
    s.report("pushf: IF", 0)?;
    s.a.out(i32::from(EXIT), al)?;
    s.a.cli()?;
    s.a.hlt()?;
    let label = counting(s.a)?;
    Ok(vec![Gate { vector: VECTOR, dpl: 0, label }])
}

/// Pages that are touched.
const PAGES: i32 = 32;

fn pagefault(s: &mut Script<'_>) -> Result<Vec<Gate>> {
    let count = |s: &mut Script<'_>, text, expected| -> Result<()> {
        s.a.mov(eax, dword_ptr(COUNT))?;
        s.report(text, expected)
    };
    let touch = |s: &mut Script<'_>| -> Result<()> {
        s.a.mov(rdi, WINDOW)?;
        s.a.mov(ecx, PAGES)?;
        let mut again = s.a.create_label();
        s.a.set_label(&mut again)?;
        s.a.inc(dword_ptr(rdi))?;
        s.a.add(rdi, 4096)?;
        s.a.dec(ecx)?;
        s.a.jnz(again)?;
        Ok(())
    };
    touch(s)?;
    count(s, "32 pages written; #PF so far", 0)?;
    touch(s)?;
    count(s, "again; #PF so far", 0)?;
    // Not present, and flushed.
    s.a.and(qword_ptr(WINDOW_TABLE), !1)?;
    s.a.mov(rdi, WINDOW)?;
    s.a.invlpg(ptr(rdi))?;
    touch(s)?;
    count(s, "one made absent, all written; #PF so far", 1)?;
    s.a.and(qword_ptr(WINDOW_TABLE), !2)?;
    s.a.mov(rdi, WINDOW)?;
    s.a.invlpg(ptr(rdi))?;
    s.a.mov(eax, dword_ptr(rdi))?;
    count(s, "one made read-only, read; #PF so far", 1)?;
    touch(s)?;
    count(s, "written; #PF so far", 2)?;
    s.a.out(i32::from(EXIT), al)?;
    s.a.cli()?;
    s.a.hlt()?;
    // The handler: counts, makes the page present and writable.
    let mut label = s.a.create_label();
    s.a.set_label(&mut label)?;
    s.a.push(rax)?;
    s.a.inc(dword_ptr(COUNT))?;
    s.a.or(qword_ptr(WINDOW_TABLE), 3)?;
    s.a.mov(rax, cr2)?;
    s.a.invlpg(ptr(rax))?;
    s.a.pop(rax)?;
    s.a.add(rsp, 8)?;
    s.a.iretq()?;
    Ok(vec![Gate { vector: 14, dpl: 0, label }])
}

/// Writes a guest's code and says which gates it wants.
type Writer = fn(&mut Script<'_>) -> Result<Vec<Gate>>;

impl Demo {
    /// The guest and what it shows; `None` for the one that needs a machine.
    fn script(self) -> Option<(Writer, &'static str)> {
        Some(match self {
            Demo::Popf => (
                popf,
                "At CPL 3 with IOPL 0 the processor executes POPF and silently keeps IF; nothing traps, so the monitor never learns \
                 of it. PUSHF then shows the host's IF. CLI and STI do trap and are emulated, which is not enough.",
            ),
            Demo::Redpill => (
                redpill,
                "These instructions do not trap (or the host's kernel answers for them), so the guest sees the host's tables and \
                 selectors: it is not in the state it believes to be in, and can tell.",
            ),
            Demo::Pagefault => (
                pagefault,
                "The guest sees the same faults on every engine: true ones. Trap-and-emulate has many more, hidden from the guest, \
                 to fill its shadow of the guest's page tables; the translator has misses of its TLB instead, hardware walks both \
                 tables itself.",
            ),
            Demo::Balloon => return None,
        })
    }
}

fn build(write: Writer) -> Result<(Guest, Steps)> {
    let mut steps = Vec::new();
    let guest = Guest::new(|a| {
        let mut script = Script { a, steps: Vec::new() };
        let gates = write(&mut script);
        steps = script.steps;
        gates
    })?;
    Ok((guest, steps))
}

fn show(demo: Demo) -> Result<Report> {
    let Some((writer, moral)) = demo.script() else { return Ok(balloon::show()) };
    let (_, steps) = build(writer)?;
    let mut report = Report {
        demo: format!("{demo:?}").to_lowercase(),
        steps: steps.iter().map(|(code, expected)| Step { code, expected: *expected, seen: BTreeMap::new() }).collect(),
        failed: BTreeMap::new(),
        ledger: BTreeMap::new(),
        wrong_under_trap: None,
        moral,
        kvm: bivisor_kvm_backend::host().reason.clone(),
    };
    for name in ENGINES {
        // Each has memory of its own: the guest changes it.
        let (guest, _) = build(writer)?;
        let mut engine = match Engine::new(name) {
            Ok(engine) => engine,
            Err(why) => {
                report.failed.insert(name, format!("{why:#}"));
                continue;
            }
        };
        let values = match guest.run(&mut engine, Duration::from_secs(10)) {
            Ok(values) => values,
            Err(why) => {
                report.failed.insert(name, format!("{why:#}"));
                continue;
            }
        };
        for (i, step) in report.steps.iter_mut().enumerate() {
            step.seen.insert(name, values.get(&(i as u16)).copied());
        }
        let ledger = engine.ledger().into_iter().map(|((reason, name), n)| (reason, name, n)).collect();
        report.ledger.insert(name, ledger);
    }
    let wrong = |s: &Step| s.seen.get("trap").is_some_and(|v| *v != Some(s.expected));
    report.wrong_under_trap = report.steps.iter().position(wrong);
    Ok(report)
}

/// Where there must be no difference: the interpreter, the translator, and KVM if it is hardware.
fn failures(r: &Report) -> Vec<&'static str> {
    let hardware = bivisor_kvm_backend::host().usable_for_machine;
    let must: &[&'static str] = if hardware { &["interp", "bt", "kvm"] } else { &["interp", "bt"] };
    let right = |name: &str| r.steps.iter().all(|s| s.seen.get(name) == Some(&Some(s.expected)));
    must.iter().copied().filter(|name| !right(name)).collect()
}

fn text(r: &Report) -> String {
    let paint = Paint::auto();
    let mut out = String::new();
    let head = format!("{:42}{:>8}", "the guest, in ring 0", "expected");
    out += &paint.bold(&format!("{head}{}", ENGINES.map(|e| format!("{e:>7}")).concat()));
    out.push('\n');
    for (i, s) in r.steps.iter().enumerate() {
        let hex = s.expected > 0xff;
        let number = |v: u32| if hex { format!("{v:x}h") } else { v.to_string() };
        out += &format!("{:42}{:>8}", s.code, number(s.expected));
        for name in ENGINES {
            let seen = s.seen.get(name).copied().flatten();
            // The host's values are long: what matters is that they are others.
            let word = match seen {
                None => "-".to_string(),
                Some(v) if v != s.expected && number(v).len() > 6 => "other".to_string(),
                Some(v) => number(v),
            };
            let word = format!("{word:>7}");
            out += &if seen == Some(s.expected) { paint.good(&word) } else { paint.bad(&word) };
        }
        if Some(i) == r.wrong_under_trap {
            out += " <";
        }
        out.push('\n');
    }
    match r.wrong_under_trap {
        Some(i) => out += &wrap("< ", &format!("Here trap-and-emulate goes wrong first: `{}`.", r.steps[i].code)),
        None if r.failed.contains_key("trap") => {}
        None => out += &wrap("", "Trap-and-emulate gives the right values here."),
    }
    out.push('\n');
    out += &wrap("", r.moral);
    for (name, ledger) in r.ledger.iter().filter(|(_, l)| !l.is_empty()) {
        out += &paint.bold(&format!("\n{name}: why the guest was left"));
        out.push('\n');
        for (reason, what, n) in ledger {
            let number = reason.map_or("-".into(), |n| n.to_string());
            out += &wrap(&format!("{n:>8}  VT-x {number:>2}  "), what);
        }
    }
    for (name, why) in &r.failed {
        out += &wrap(&format!("{name}: "), &format!("not to be had: {why}"));
    }
    if !r.failed.contains_key("kvm") {
        out += &wrap("kvm: ", &r.kvm);
        if let Some(s) = r.steps.iter().find(|s| s.seen.get("kvm") != Some(&Some(s.expected))) {
            out += &wrap(
                "     ",
                &format!(
                    "Its limit shows at `{}`: it notices an open window for interrupts only at the next exit.",
                    s.code
                ),
            );
        }
    }
    out
}

/// Runs and prints.
pub fn run(args: &DemoArgs) -> Result<i32> {
    const { assert!(CODE > COUNT) };
    let report = show(args.demo)?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", text(&report));
    }
    let wrong = failures(&report);
    if !wrong.is_empty() {
        eprintln!("bivisor: not as the architecture demands: {}", wrong.join(", "));
    }
    Ok(i32::from(!wrong.is_empty()))
}
