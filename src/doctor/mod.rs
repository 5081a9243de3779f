//! `bivisor doctor`: what this host offers for virtualization, with the evidence, and what Bivisor makes of it.

mod advice;
pub mod costs;
pub mod eighteen;
pub mod host;
mod show;

use crate::engine::{self, Backend, Purpose};
use crate::native::Native;
use anyhow::Result;
use bivisor_kvm_backend::sample::{Outcome, Samples};
use bivisor_kvm_backend::{HostKvm, Kind};
use clap::{Args, ValueEnum};
use serde::Serialize;

/// Arguments of `bivisor doctor`.
#[derive(Args)]
#[command(
    after_help = "Example:\n  bivisor doctor --require hardware || echo \"software engines only: status $?\"\n\n\
    Exit status with --require: 0 the host has it; 10 there is no /dev/kvm; 11 it may not be opened;\n\
    12 it does not work; 13 it is a software module. Without --require always 0."
)]
pub struct DoctorArgs {
    /// One JSON object (docs/json.md describes it).
    #[arg(long)]
    json: bool,
    /// Ask for something, and answer by the exit status.
    #[arg(long, value_enum)]
    require: Option<Requirement>,
}

/// What a script can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Requirement {
    /// Any KVM that runs user code.
    Kvm,
    /// VT-x or AMD-V.
    Hardware,
}

/// The state of /dev/kvm.
#[derive(Debug, Serialize)]
pub struct Kvm {
    /// "absent", "forbidden", "broken", "vt-x", "svm" or "software".
    kind: &'static str,
    /// The status that `--require hardware` gives.
    status: i32,
    /// The host is a virtual machine itself.
    nested: bool,
    usable_for_process: bool,
    usable_for_machine: bool,
    /// One sentence.
    reason: String,
    evidence: Vec<String>,
}

/// What `auto` takes.
#[derive(Debug, Serialize)]
pub struct Choice {
    engine: &'static str,
    why: String,
}

/// A piece of kernel code in a KVM guest at CPL 0.
#[derive(Debug, Serialize)]
pub struct Kernel {
    code: &'static str,
    /// "runs", "needs help" or "fails".
    outcome: &'static str,
    detail: String,
}

/// Everything.
#[derive(Debug, Serialize)]
pub struct Report {
    version: &'static str,
    cpu: host::Cpu,
    kvm: Kvm,
    process: Choice,
    machine: Choice,
    /// Robin and Irvine's 18 at CPL 3.
    eighteen: Vec<eighteen::Tried>,
    kernel_code: Vec<Kernel>,
    /// Nanoseconds.
    costs_ns: costs::Costs,
    advice: Vec<String>,
    /// What could not be looked at, and why.
    missing: Vec<String>,
}

/// The name of a kind, and the exit status that stands for it.
fn kind(k: Kind) -> (&'static str, i32) {
    match k {
        Kind::VtX => ("vt-x", 0),
        Kind::Svm => ("svm", 0),
        Kind::Absent => ("absent", 10),
        Kind::Forbidden => ("forbidden", 11),
        Kind::Broken => ("broken", 12),
        Kind::Software => ("software", 13),
    }
}

fn choice(purpose: Purpose) -> Choice {
    match engine::choose(Backend::Auto, purpose) {
        Ok((engine, why)) => Choice { engine: engine.name(), why },
        Err(why) => Choice { engine: "none", why },
    }
}

/// What kernels do all the time, at CPL 0.
fn kernel_code(kvm: &mut Samples) -> Vec<Kernel> {
    const CODE: &[(&str, &[u8])] = &[
        ("CLI, STI", &[0xfa, 0xfb]),
        ("MOV RAX, CR0", &[0x0f, 0x20, 0xc0]),
        ("MOV CR3", &[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]),
        ("RDMSR EFER", &[0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32]),
        ("SWAPGS", &[0x0f, 0x01, 0xf8]),
        ("LAR EAX, CX", &[0xb9, 0x10, 0, 0, 0, 0x0f, 0x02, 0xc1]),
        ("POPCNT EAX, ECX", &[0xf3, 0x0f, 0xb8, 0xc1]),
        ("PXOR XMM0, XMM0", &[0x66, 0x0f, 0xef, 0xc0]),
        ("FLD1", &[0xd9, 0xe8]),
        ("INT 21h", &[0xcd, 0x21]),
    ];
    let run = |(code, bytes): &(&'static str, &[u8])| {
        let right = if bytes[0] == 0xcd { Some(0x21) } else { None };
        let (outcome, detail) = match kvm.run(0, bytes, 0, false) {
            Ok(Outcome::Done(_)) => ("runs", String::new()),
            Ok(Outcome::Exception(v)) if Some(v) == right => ("runs", format!("vector {v:#x}")),
            Ok(Outcome::Exception(v)) => ("fails", format!("exception {v}")),
            Ok(Outcome::NotEmulated) => ("needs help", "not emulated: the interpreter does that step".into()),
            Ok(Outcome::Other(what)) => ("fails", what),
            Err(e) => ("fails", e.to_string()),
        };
        Kernel { code, outcome, detail }
    };
    CODE.iter().map(run).collect()
}

fn report(found: &HostKvm) -> Report {
    let mut missing = Vec::new();
    let mut native = Native::new().map_err(|e| missing.push(format!("the 18 natively: {e:#}"))).ok();
    let works = !matches!(found.kind, Kind::Absent | Kind::Forbidden | Kind::Broken);
    let mut samples = None;
    match works.then(Samples::new) {
        Some(Ok(s)) => samples = Some(s),
        Some(Err(e)) => missing.push(format!("the 18 under KVM: {e}")),
        None => missing.push(format!("everything under KVM: {}", found.reason)),
    }
    let (name, status) = kind(found.kind);
    let eighteen = eighteen::all(native.as_mut(), samples.as_mut());
    let costs_ns = costs::measure(native.as_mut(), samples.as_mut(), found.exit_ns);
    let cpu = host::cpu();
    Report {
        version: env!("CARGO_PKG_VERSION"),
        kvm: Kvm {
            kind: name,
            status,
            nested: found.nested || cpu.hypervisor.is_some(),
            usable_for_process: found.usable_for_process,
            usable_for_machine: found.usable_for_machine,
            reason: found.reason.clone(),
            evidence: found.evidence.clone(),
        },
        advice: advice::advice(found.kind, &cpu),
        cpu,
        process: choice(Purpose::Process),
        machine: choice(Purpose::Machine),
        eighteen,
        kernel_code: samples.as_mut().map(kernel_code).unwrap_or_default(),
        costs_ns,
        missing,
    }
}

/// Looks, prints, answers.
pub fn run(args: &DoctorArgs) -> Result<i32> {
    let found = bivisor_kvm_backend::host();
    let report = report(found);
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", show::text(&report));
    }
    Ok(match args.require {
        None => 0,
        Some(Requirement::Kvm) if found.usable_for_process => 0,
        Some(_) => report.kvm.status,
    })
}
