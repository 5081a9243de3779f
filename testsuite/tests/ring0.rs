//! The ring-0 guest on every engine: what it writes must be the reviewed text of guests/ring0.txt.
//!
//! `UPDATE=1` writes the text anew from the interpreter; the difference is what a reviewer reads.

use bivisor_emulator::cpu::CpuModel;
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::interp::sensitive::time::TimeSource;
use bivisor_emulator::vcpu::Vcpu;
use bivisor_kvm_backend::{KvmVm, host};
use bivisor_testsuite::guest;
use bivisor_testsuite::random::Random;
use bivisor_translator::Translator;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// A thousand times what the guest needs on the interpreter.
const LIMIT: Duration = Duration::from_secs(60);

fn expected_file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("guests/ring0.txt")
}

/// The ELF file, assembled once, or `None` on a machine without a C compiler, which is said.
fn guest_file() -> Option<&'static [u8]> {
    static FILE: OnceLock<Result<Vec<u8>, String>> = OnceLock::new();
    let file = FILE.get_or_init(|| guest::assemble("ring0.S", Path::new(env!("CARGO_TARGET_TMPDIR"))));
    if let Err(why) = file {
        println!("SKIPPED: the ring-0 guest cannot be assembled: {why}");
    }
    file.as_deref().ok()
}

/// The first line that differs, with its neighbours.
fn difference(want: &str, got: &str) -> Option<String> {
    let (want, got): (Vec<&str>, Vec<&str>) = (want.lines().collect(), got.lines().collect());
    let n = (0..want.len().max(got.len())).find(|&n| want.get(n) != got.get(n))?;
    let context = want[n.saturating_sub(3).min(want.len())..n.min(want.len())].join("\n");
    let line = |of: &[&str]| of.get(n).map_or("(nothing)".to_string(), |l| format!("{l:?}"));
    Some(format!("line {}:\n{context}\n  wanted {}\n  got    {}", n + 1, line(&want), line(&got)))
}

fn check(name: &str, engine: &mut dyn Vcpu) {
    let Some(elf) = guest_file() else { return };
    let report = guest::run(engine, elf, LIMIT).unwrap_or_else(|e| panic!("{name}: {e}"));
    if std::env::var_os("UPDATE").is_some() {
        if name == "interp" {
            std::fs::write(expected_file(), &report.output).expect("the source tree is writable under UPDATE");
        }
        return;
    }
    let want = std::fs::read_to_string(expected_file()).expect("guests/ring0.txt is in the tree");
    if let Some(d) = difference(&want, &report.output) {
        panic!("{name}: {d}\n--- all of it:\n{}", report.output);
    }
    assert_eq!(report.status, 0, "{name}");
}

/// Everything we can do in software, whatever the host has.
fn model() -> Arc<CpuModel> {
    Arc::new(CpuModel::max())
}

#[test]
fn interpreter() {
    check("interp", &mut Interpreter::new(model()));
}

#[test]
fn translator() {
    check("translator", &mut Translator::new(model()).expect("executable memory"));
}

/// Without a budget, as machines run: blocks lead to each other, and kicks come at any time.
#[test]
fn translator_kicked() {
    let Some(elf) = guest_file() else { return };
    let mut engine = Translator::new(model()).expect("executable memory");
    let report = guest::run_kicked(&mut engine, elf, LIMIT).unwrap_or_else(|e| panic!("{e}"));
    let want = std::fs::read_to_string(expected_file()).expect("guests/ring0.txt is in the tree");
    assert_eq!(difference(&want, &report.output), None);
}

/// Code pages that are mapped elsewhere or overwritten, interrupts that wait, loops that are kicked.
#[test]
fn mapping() {
    let elf = match guest::assemble("mapping.S", Path::new(env!("CARGO_TARGET_TMPDIR"))) {
        Ok(elf) => elf,
        Err(why) => return println!("SKIPPED: the guest cannot be assembled: {why}"),
    };
    let lines = [
        "remapped by INVLPG",
        "remapped in an instruction",
        "remapped by CR3",
        "overwritten",
        "string ends",
        "string bytes",
        "waited for STI",
        "held by CLI",
        "taken at POPF",
        "held after STI",
        "and taken",
        "carried",
        "end",
    ];
    let good = |name: &str, report: Result<guest::Report, String>| {
        let report = report.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(report.output.lines().collect::<Vec<_>>(), lines, "{name}");
        assert_eq!(report.status, 0, "{name}");
    };
    let translator = || Translator::new(model()).expect("executable memory");
    good("interp", guest::run(&mut Interpreter::new(model()), &elf, LIMIT));
    good("counted", guest::run(&mut translator(), &elf, LIMIT));
    good("kicked", guest::run_kicked(&mut translator(), &elf, LIMIT));
}

/// Interpreter and translator side by side: by single instructions, and by stretches of random length.
#[test]
fn lockstep() {
    let Some(elf) = guest_file() else { return };
    for most in [1, 3, 40, 3000] {
        let mut random = Random::new(most);
        let (mut a, mut b) = (Interpreter::new(model()), Translator::new(model()).expect("executable memory"));
        a.env().time = TimeSource::deterministic(1);
        b.env().time = TimeSource::deterministic(1);
        let rounds = guest::lockstep(&mut a, &mut b, elf, || 1 + random.below(most));
        let rounds = rounds.unwrap_or_else(|e| panic!("at most {most} at a time: {e}"));
        println!("{rounds} rounds of at most {most} instructions");
    }
}

/// Only where the hardware virtualizes every mode. On a host whose KVM runs kernel code by other means the guest may see that host's
/// limits: then each line that is not the architecture's is shown, and nothing is demanded.
#[test]
fn kvm() {
    let host = host();
    let vm = match KvmVm::new(Arc::new(CpuModel::host())) {
        Ok(vm) => vm,
        Err(why) => {
            println!("SKIPPED on KVM: {why}");
            return;
        }
    };
    if host.usable_for_machine {
        return check("kvm", &mut vm.vcpu());
    }
    println!("SKIPPED on KVM: {}", host.reason);
    let Some(elf) = guest_file() else { return };
    let seen = match guest::run(&mut vm.vcpu(), elf, Duration::from_secs(10)) {
        Ok(report) => report.output,
        Err(why) => why,
    };
    let want = std::fs::read_to_string(expected_file()).expect("guests/ring0.txt is in the tree");
    let want: Vec<&str> = want.lines().collect();
    for line in seen.lines().filter(|line| !want.contains(line)) {
        println!("    limit of this host: {line}");
    }
}
