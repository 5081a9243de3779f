//! Every integer instruction of 16- and 32-bit code has a case with the result of a real CPU (`testsuite/modes.txt`).
//!
//! `UPDATE=1` writes the lines anew from an AMD host CPU; on an Intel one it adds to them what that CPU does otherwise.

use bivisor_emulator::cpu::Fault;
use bivisor_emulator::interp::alu::Vendor;
use bivisor_emulator::isa::{Class, facts};
use bivisor_testsuite::campaign::case::{Case, Kind};
use bivisor_testsuite::campaign::engine::Which;
use bivisor_testsuite::campaign::modes::source::{self, Source, codes};
use bivisor_testsuite::campaign::modes::{Modes, record};
use bivisor_testsuite::campaign::outcome::End;
use bivisor_testsuite::campaign::values::Pool;
use bivisor_testsuite::case::disassembly;
use bivisor_testsuite::random::Random;
use iced_x86::{Code, Mnemonic};

fn modes() -> Modes {
    let modes = Modes::new(&[Which::InterpPaged, Which::BtPaged], true).expect("interpreter and translator");
    if !modes.has_host() {
        eprintln!("SKIPPED: no host CPU to compare with; interpreter and translator are compared");
    }
    modes
}

/// The integer instructions of such code.
fn integer(bits: u32) -> Vec<Code> {
    codes(bits).0.into_iter().filter(|c| !matches!(facts(*c).class, Class::Native | Class::Undefined)).collect()
}

/// A case for an instruction that goes well on the host CPU, if one is found; else one that ends as it does.
fn line(modes: &mut Modes, source: &mut Source, kind: Kind, code: Code, memory: &[u8]) -> Option<String> {
    let all = codes(kind.bits()).0;
    let index = all.iter().position(|c| *c == code)? as u64;
    let mut r = Random::new(code as u64);
    let pool = Pool::new(&mut r);
    let mut found = None;
    for _ in 0..200 {
        let Some(slot) = source.slot(&mut r, kind, 0, index).filter(|s| s.code == code && s.there == s.bytes.len())
        else {
            continue;
        };
        // LOOPE and LOOPNE with a REP prefix: see testsuite/expected.txt.
        let repeated = slot.bytes.iter().any(|b| matches!(b, 0xf2 | 0xf3));
        if repeated && matches!(code.mnemonic(), Mnemonic::Loope | Mnemonic::Loopne) {
            continue;
        }
        let mut case = Case::default();
        source::state(&mut r, &pool, &slot, &mut case);
        (case.windows, case.free_memory) = (record::windows(), None);
        case.xsave.set_xstate_bv(0);
        case.xsave.set_mxcsr(0x1f80);
        let Ok(outcomes) = modes.outcomes(&case, memory) else { continue };
        let text = disassembly(kind.bits(), &case.code);
        let line = format!("{} => {}", record::start(&case, &text), record::result(&case, memory, &outcomes[0].1));
        if outcomes[0].1.end == End::Fault(Fault::Bp) && line.len() < 400 {
            return Some(line);
        }
        found.get_or_insert(line);
    }
    found
}

fn update(modes: &mut Modes) {
    assert!(modes.has_host(), "UPDATE=1 needs the host CPU as judge");
    let memory = record::memory();
    let mut out = String::from(
        "# What an AMD EPYC (Zen 4) did in compatibility mode, and an Intel Xeon (Raptor Cove) where that is something else;\n\
         # testsuite/src/campaign/modes/record.rs says how to read it.\n",
    );
    if Vendor::host() == Vendor::Intel {
        for line in lines() {
            let line = line.split(record::INTEL).next().expect("a first piece");
            let (case, amd) = record::parse(line, Vendor::Amd).expect("a line");
            out += line;
            if !own(case.insn) {
                let outcomes = modes.outcomes(&case, &memory).expect("an end");
                let intel = record::result(&case, &memory, &outcomes[0].1);
                if intel != amd {
                    out += record::INTEL;
                    out += &intel;
                }
            }
            out.push('\n');
        }
        return write(&out);
    }
    let mut source = Source::default();
    for kind in [Kind::Insn32, Kind::Insn16] {
        for code in integer(kind.bits()) {
            if let Some(line) = line(modes, &mut source, kind, code, &memory) {
                out += &line;
                out.push('\n');
            }
        }
    }
    write(&out);
}

fn write(text: &str) {
    std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/modes.txt"), text).expect("writable");
}

fn lines() -> impl Iterator<Item = &'static str> {
    record::LINES.lines().filter(|l| !l.starts_with('#'))
}

#[test]
fn every_integer_instruction_has_a_line_and_does_what_it_says() {
    let mut modes = modes();
    if std::env::var_os("UPDATE").is_some() {
        return update(&mut modes);
    }
    let memory = record::memory();
    let (mut wrong, mut seen) = (Vec::new(), Vec::new());
    for line in lines() {
        let (case, should) = record::parse(line, Vendor::host()).expect("a line");
        seen.push((case.kind.bits(), case.insn));
        if own(case.insn) {
            continue;
        }
        for (name, is) in modes.outcomes(&case, &memory).expect("an end") {
            let is = record::result(&case, &memory, &is);
            if is != should {
                wrong.push(format!("{line}\n    on {name}: {is}"));
            }
        }
    }
    let missing: Vec<_> = [32, 16]
        .into_iter()
        .flat_map(|bits| integer(bits).into_iter().map(move |c| (bits, c)))
        .filter(|c| !seen.contains(c))
        .collect();
    println!("{} lines", seen.len());
    assert!(wrong.is_empty(), "{} wrong\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
    assert!(missing.is_empty(), "without a line: {missing:?}");
}

/// Gives what is the machine's own, or is a system call.
fn own(code: Code) -> bool {
    use Mnemonic as M;
    let call = code.mnemonic() == M::Sysenter && Vendor::host() == Vendor::Intel;
    call || matches!(code.mnemonic(), M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdrand | M::Rdseed | M::Int1)
}
