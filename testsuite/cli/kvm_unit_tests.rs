//! kvm-unit-tests for x86 on `bivisor boot`: a table of what each says, and a check that those we are known to pass still do.
//!
//! The tests are fetched and built outside the tree (`./configure --arch=x86_64` or `i386`, `make`). `BIVISOR_KVM_UNIT_TESTS` names one or
//! two folders with their .flat files, separated by a colon; `BIVISOR_BACKEND` an engine (default: interp); `BIVISOR_KUT_ONLY` a part of a
//! name. Where no folder is named the test says so and passes.

use bivisor_emulator::isa::decode::is_amd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// What a test is expected to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Want {
    /// No FAIL, and a status that says passed or skipped.
    Pass,
    /// That on a CPU of AMD's, for which the collection asks: elsewhere reported only, for the reason.
    OnAmd(&'static str),
    /// Known not to, for the reason: reported only.
    Open(&'static str),
}
use Want::{OnAmd, Open, Pass};

const SYSCALL: &str = "SYSCALL of 32-bit code, which CPUs of Intel's do not have (SDM 2B SYSCALL: #UD)";

/// For which builds: 64-bit, 32-bit, both.
const L: u8 = 1;
const I: u8 = 2;
const B: u8 = 3;

/// Names, arguments and CPUs as the collection's own x86/unittests.cfg has them, those with one processor.
#[rustfmt::skip]
const TESTS: &[(&str, u8, &str, &str, &str, Want)] = &[
    // name                builds  file         arguments            CPU             expected
    ("access",              L, "access_test",   "",                  "max",          Pass),
    ("apic (x2apic)",       L, "apic",          "",                  "max",          Pass),
    ("apic (xapic)",        L, "apic",          "",                  "max,-x2apic",  Pass),
    ("cmpxchg8b",           I, "cmpxchg8b",     "",                  "max",          Pass),
    ("debug",               L, "debug",         "",                  "max",          Pass),
    ("emulator",            L, "emulator",      "",                  "max",          Open(FAR_JUMP)),
    ("emulator",            I, "emulator",      "",                  "max",          Pass),
    ("eventinj",            B, "eventinj",      "",                  "max",          Pass),
    ("idt_test",            L, "idt_test",      "",                  "max",          Pass),
    ("ioapic",              L, "ioapic",        "",                  "max",          Pass),
    ("la57",                B, "la57",          "",                  "max",          Pass),
    ("lam",                 L, "lam",           "",                  "max",          Pass),
    ("memory",              L, "memory",        "",                  "max",          Pass),
    ("msr",                 B, "msr",           "",                  "max",          Pass),
    ("pcid (enabled)",      L, "pcid",          "",                  "max",          Pass),
    ("pcid (disabled)",     L, "pcid",          "",                  "max,-pcid,-invpcid", Pass),
    ("pks",                 L, "pks",           "",                  "max",          Pass),
    ("pku",                 L, "pku",           "",                  "max",          Pass),
    ("rdpru",               L, "rdpru",         "",                  "max",          Pass),
    ("realmode",            B, "realmode",      "",                  "max",          Pass),
    ("rmap_chain",          L, "rmap_chain",    "",                  "max",          Pass),
    ("setjmp",              B, "setjmp",        "",                  "max",          Pass),
    ("smap",                B, "smap",          "",                  "max",          Pass),
    ("syscall",             L, "syscall",       "",                  "max",          OnAmd(SYSCALL)),
    ("taskswitch",          I, "taskswitch",    "",                  "max",          Pass),
    ("taskswitch2",         I, "taskswitch2",   "",                  "max",          Pass),
    ("tsc",                 B, "tsc",           "",                  "max",          Pass),
    ("tsc_adjust",          B, "tsc_adjust",    "",                  "max",          Pass),
    ("umip",                B, "umip",          "",                  "max",          Pass),
    ("vmexit_cpuid",        B, "vmexit",        "cpuid",             "max",          Pass),
    ("vmexit_mov_from_cr8", B, "vmexit",        "mov_from_cr8",      "max",          Pass),
    ("vmexit_mov_to_cr8",   B, "vmexit",        "mov_to_cr8",        "max",          Pass),
    ("vmexit_inl_pmtimer",  B, "vmexit",        "inl_from_pmtimer",  "max",          Pass),
    ("vmexit_ple",          B, "vmexit",        "ple_round_robin",   "max",          Pass),
    ("vmexit_tscdeadline",  B, "vmexit",        "tscdeadline",       "max",          Pass),
    ("vmexit_tscdeadline_immed", B, "vmexit",   "tscdeadline_immed", "max",          Pass),
    ("vmexit_cr0_wp",       B, "vmexit",        "toggle_cr0_wp",     "max",          Pass),
    ("vmexit_cr4_pge",      B, "vmexit",        "toggle_cr4_pge",    "max",          Pass),
    ("xsave",               L, "xsave",         "",                  "max",          Pass),
];

/// These make hypercalls of KVM's (VMCALL, VMMCALL), which are #UD here, unless their environment says that they do not run below QEMU.
const AS_ON_HARDWARE: [&str; 1] = ["apic"];
const FAR_JUMP: &str = "on hosts of AMD's a far JMP has no 64-bit offset, which the test takes for granted";

struct Outcome {
    status: Option<i32>,
    passes: usize,
    fails: Vec<String>,
    skips: usize,
    seconds: f64,
    last: String,
}

fn run(file: &Path, arguments: &str, cpu: &str, backend: &str) -> Outcome {
    let start = Instant::now();
    let mut command = Command::new(env!("CARGO_BIN_EXE_bivisor"));
    command.args(["boot", "--testdev", "--debug-exit", "0xf4", "--timeout", "100", "--no-reboot", "--memory", "256"]);
    command.args(["--backend", backend, "--cpu", cpu, "--append", arguments, "--kernel"]).arg(file);
    if file.file_stem().is_some_and(|stem| AS_ON_HARDWARE.iter().any(|name| *name == stem)) {
        let environment = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kvm-unit-tests-environment");
        std::fs::write(&environment, "TEST_DEVICE=0\n").expect("a temporary file");
        command.arg("--initrd").arg(environment);
    }
    let output = command.stdin(std::process::Stdio::null()).output().expect("bivisor starts");
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    let lines = |word: &str| text.lines().filter(|l| l.starts_with(word)).map(str::to_owned).collect::<Vec<_>>();
    Outcome {
        status: output.status.code(),
        passes: lines("PASS").len(),
        fails: lines("FAIL"),
        skips: lines("SKIP").len(),
        seconds: start.elapsed().as_secs_f64(),
        last: text.lines().rfind(|l| !l.trim().is_empty()).unwrap_or_default().to_owned(),
    }
}

impl Outcome {
    /// The harness writes to the exit port 0 for passed, 1 for failed, and what becomes status 77 for skipped.
    fn verdict(&self) -> &'static str {
        match self.status {
            _ if !self.fails.is_empty() => "fail",
            Some(1) => "pass",
            Some(77) => "skip",
            Some(124) => "time",
            Some(122) => "triple fault",
            _ => "fail",
        }
    }
}

/// The width that the images of a folder are built for: 64-bit ones say so in their ELF notes nowhere, so a file that only that build
/// has decides.
fn build(folder: &Path) -> u8 {
    if folder.join("access_test.flat").exists() { L } else { I }
}

#[test]
fn table() {
    let Some(folders) = std::env::var_os("BIVISOR_KVM_UNIT_TESTS") else {
        println!("SKIPPED: BIVISOR_KVM_UNIT_TESTS names no folder with built kvm-unit-tests");
        return;
    };
    let backend = std::env::var("BIVISOR_BACKEND").unwrap_or_else(|_| "interp".to_owned());
    let only = std::env::var("BIVISOR_KUT_ONLY").unwrap_or_default();
    let (mut ran, mut passes, mut unexpected) = (0, 0, Vec::new());
    for folder in std::env::split_paths(&folders).collect::<Vec<PathBuf>>() {
        let build = build(&folder);
        println!("{} on {backend}", folder.display());
        println!("{:26} {:12} {:>5} {:>5} {:>5} {:>8}", "test", "outcome", "PASS", "FAIL", "SKIP", "seconds");
        for (name, builds, file, arguments, cpu, want) in TESTS {
            let path = folder.join(format!("{file}.flat"));
            if builds & build == 0 || !name.contains(&only) || !path.exists() {
                continue;
            }
            let mut o = run(&path, arguments, cpu, &backend);
            // It must be at the timer's registers within 5 ms of the host's time, which a busy host may not let it.
            for _ in 0..3 {
                if AS_ON_HARDWARE.contains(file) && o.verdict() == "fail" {
                    println!("    {name} again, after {:?}", o.fails);
                    o = run(&path, arguments, cpu, &backend);
                }
            }
            let verdict = o.verdict();
            let (fails, seconds) = (o.fails.len(), o.seconds);
            println!("{name:26} {verdict:12} {:5} {fails:5} {:5} {seconds:8.1}", o.passes, o.skips);
            ran += 1;
            passes += o.passes;
            if matches!(verdict, "pass" | "skip") {
                continue;
            }
            o.fails.iter().take(6).for_each(|l| println!("    {l}"));
            println!("    status {:?}, last: {}", o.status, o.last);
            match want {
                OnAmd(why) if !is_amd() => println!("    not an AMD CPU: {why}"),
                Pass | OnAmd(_) => unexpected.push(*name),
                Open(why) => println!("    known: {why}"),
            }
        }
    }
    println!("{ran} tests, {passes} PASS lines");
    assert!(ran > 0, "the folder has none of the .flat files");
    assert!(unexpected.is_empty(), "failed, and should not: {unexpected:?}");
}
