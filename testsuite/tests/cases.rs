//! Every line of `testsuite/cases/*.txt` on every engine. `UPDATE=1` rewrites the quoted disassemblies.

use bivisor_emulator::cpu::{Fault, Rflags, cpuid::CpuModel};
use bivisor_emulator::interp::alu::Vendor;
use bivisor_kvm_backend::{Kind, host};
use bivisor_testsuite::case::{Case, Trial, disassembly};
use bivisor_testsuite::engines::{Engine, engines};
use bivisor_testsuite::world::{Outcome, Setup, without_kernel};
use iced_x86::{Code, FlowControl};
use std::collections::BTreeMap;
use std::path::Path;

/// Flags an instruction can change: the rest of RFLAGS is compared too, but never undefined.
const REPORTED: usize = 40;

fn files() -> Vec<std::path::PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
    let mut files: Vec<_> = std::fs::read_dir(dir).expect("the cases").map(|e| e.expect("a file").path()).collect();
    files.sort();
    files
}

/// Reads a file; with `UPDATE=1` makes the disassemblies right first.
fn read(file: &Path, wrong: &mut Vec<String>) -> Vec<Case> {
    let name = file.file_name().expect("a file").to_string_lossy();
    let text = std::fs::read_to_string(file).expect("readable");
    let mut cases = Vec::new();
    let mut rewritten = String::new();
    for (n, line) in text.lines().enumerate() {
        let place = format!("{name}:{}", n + 1);
        let mut line = line.to_string();
        match Case::parse(&place, &line) {
            Ok(None) => {}
            Ok(Some(case)) => {
                let is = disassembly(case.bitness, &case.code);
                if is != case.text {
                    line = line.replacen(&format!("\"{}\"", case.text), &format!("\"{is}\""), 1);
                    if std::env::var_os("UPDATE").is_none() {
                        wrong.push(format!("{place}: says \"{}\", is \"{is}\"", case.text));
                    }
                }
                cases.push(case);
            }
            Err(why) => wrong.push(format!("{place}: {why}")),
        }
        rewritten += &line;
        rewritten.push('\n');
    }
    if std::env::var_os("UPDATE").is_some() && rewritten != text {
        std::fs::write(file, rewritten).expect("writable");
    }
    cases
}

/// What is wrong with an outcome; `undefined` is what the host did, where the manual leaves it open.
fn difference(trial: &Trial, after: &Setup, out: &Outcome, free: bool) -> Option<String> {
    if out.fault.map(without_kernel) != trial.fault.map(without_kernel) {
        return Some(format!("exception {:x?}, not {:x?}", out.fault, trial.fault));
    }
    for (i, (is, should)) in out.gpr.iter().zip(after.gpr).enumerate() {
        let ignored = if free { trial.undefined_registers[i] } else { 0 };
        if (is ^ should) & !ignored != 0 {
            let name = bivisor_emulator::isa::Gpr::NAMES[i];
            return Some(format!("{name} is {is:#x}, not {should:#x}"));
        }
    }
    let ignored = if free { trial.undefined_flags } else { 0 };
    if (out.rflags ^ after.rflags) & !ignored != 0 {
        let show = |f| Rflags::from_bits_retain(f & !ignored);
        return Some(format!("flags are {:?}, not {:?}", show(out.rflags), show(after.rflags)));
    }
    if let Some((addr, is, should)) = out.image.difference(&after.image) {
        return Some(format!("byte at {addr:#x} is {is:#x}, not {should:#x}"));
    }
    if out.advance.is_some_and(|a| a != trial.advance) {
        return Some(format!("RIP moved by {:?}, not {}", out.advance, trial.advance));
    }
    (!out.other.is_empty()).then(|| format!("changed besides: {}", out.other))
}

/// What an engine is known to get wrong. Nothing else may hide behind it.
fn known(engine: &str, trial: &Trial) -> Option<&'static str> {
    let flow = trial.insn.flow_control();
    let indirect = matches!(flow, FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::Return);
    match (engine, trial.fault) {
        ("bt" | "bt-flat", Some(Fault::Gp(0))) if indirect => {
            Some("a branch to an address that is not canonical is reported at its target")
        }
        ("kvm" | "kvm-flat", Some(Fault::Gp(0))) if trial.insn == Code::INVALID && host().kind == Kind::Software => {
            Some("a software KVM decodes what raised #GP, and says #UD if it is no instruction")
        }
        _ => None,
    }
}

/// One trial on all engines, the host first.
fn run(
    trial: &Trial,
    engines: &mut [Engine],
    counts: &mut BTreeMap<&str, u64>,
    skipped: &mut BTreeMap<String, u64>,
) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut after = trial.after.clone();
    // What the manual leaves open is free until the host has shown what it does.
    let mut free = true;
    for engine in engines {
        let out = match (engine.run)(&trial.setup) {
            Ok(out) => out,
            Err(why) => {
                *skipped.entry(format!("{}: {why}", engine.name)).or_default() += 1;
                continue;
            }
        };
        *counts.entry(engine.name).or_default() += 1;
        if let Some(why) = known(engine.name, trial) {
            *skipped.entry(format!("KNOWN {}: {why}", engine.name)).or_default() += 1;
            continue;
        }
        if let Some(d) = difference(trial, &after, &out, free) {
            wrong.push(format!("{} on {}: {d}", trial.what, engine.name));
        } else if engine.is_host {
            free = false;
            after.gpr = out.gpr;
            after.rflags = out.rflags;
        }
    }
    wrong
}

#[test]
fn cases() {
    let (mut engines, missing) = engines();
    for (name, why) in missing {
        println!("SKIPPED engine {name}: {why}");
    }
    let model = CpuModel::host();
    let mut wrong = Vec::new();
    let (mut counts, mut skipped) = (BTreeMap::new(), BTreeMap::new());
    let mut lines = 0;
    for file in files() {
        for case in read(&file, &mut wrong) {
            lines += 1;
            if case.vendor.is_some_and(|v| v != Vendor::host()) {
                *skipped.entry(format!("all: this host is not {:?}'s", case.vendor)).or_default() += 1;
                continue;
            }
            match case.trials() {
                Err(why) => wrong.push(format!("{}: {why}", case.place)),
                Ok(trials) => {
                    for trial in trials {
                        if trial.insn != Code::INVALID && !model.supports(trial.insn) {
                            *skipped.entry(format!("all: this host lacks {:?}", trial.insn)).or_default() += 1;
                            continue;
                        }
                        wrong.extend(run(&trial, &mut engines, &mut counts, &mut skipped));
                    }
                }
            }
        }
    }
    println!("{lines} lines");
    for (engine, n) in counts {
        println!("{n:6} trials on {engine}");
    }
    for (why, n) in skipped {
        println!("{n:6} trials skipped, {why}");
    }
    let n = wrong.len();
    wrong.truncate(REPORTED);
    assert!(wrong.is_empty(), "{n} wrong\n{}", wrong.join("\n"));
}
