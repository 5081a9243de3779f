//! Bugs planted in an engine's results, and in the comparison itself: the campaign finds each in well under a minute.

use bivisor_emulator::cpu::Rflags;
use bivisor_testsuite::campaign::case::Kind;
use bivisor_testsuite::campaign::engine::Which;
use bivisor_testsuite::campaign::outcome::{self, Part};
use bivisor_testsuite::campaign::tally::Tally;
use bivisor_testsuite::campaign::worker::Worker;
use iced_x86::Mnemonic;
use std::time::{Duration, Instant};

/// A worker with this engine, or the reason why not.
fn worker(which: Which) -> Option<Worker> {
    match Worker::new(&[which], true, &[Kind::Insn], 11) {
        Ok(worker) => Some(worker),
        Err(why) => {
            eprintln!("SKIPPED: {why}");
            None
        }
    }
}

/// Runs batches of all instructions until something unexpected of this kind is found.
fn hunt(worker: &mut Worker, engine: &str, code: &str) -> Tally {
    let start = Instant::now();
    let mut found = Tally::default();
    for n in 0.. {
        worker.batch(n);
        found.add(&worker.take());
        if found.divergences.iter().any(|d| d.engine == engine && d.code.starts_with(code)) {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "a minute, and {} cases", found.cases);
    }
    println!("{engine} {code}: {} cases, {:?}", found.cases, start.elapsed());
    found
}

/// The smallest bug: one flag of one instruction for one value.
#[test]
fn a_wrong_flag_is_found_in_the_interpreter_and_the_translator() {
    for which in [Which::Interp, Which::Bt] {
        let Some(mut worker) = worker(which) else { return };
        worker.engine(which).expect("just made").plant(Box::new(|case, cpu| {
            if case.insn.mnemonic() == Mnemonic::Xadd && cpu.rflags.contains(Rflags::ZF) {
                cpu.rflags.toggle(Rflags::AF);
            }
        }));
        let found = hunt(&mut worker, which.name(), "Xadd");
        let example = found.divergences.iter().find(|d| d.code.starts_with("Xadd")).expect("found");
        assert_eq!(example.part, "flags", "{example:?}");
        assert!(example.repro["request"]["regs"]["rax"].is_string(), "{example:?}");
    }
}

/// One bit of one vector register's upper half.
#[test]
fn a_wrong_bit_of_a_vector_is_found() {
    for which in [Which::Interp, Which::Bt] {
        let Some(mut worker) = worker(which) else { return };
        worker.engine(which).expect("just made").plant(Box::new(|case, cpu| {
            if case.insn.mnemonic() == Mnemonic::Pshufb {
                let mut z = cpu.xsave.zmm(3);
                z[9] ^= 4;
                cpu.xsave.set_zmm(3, z);
            }
        }));
        let found = hunt(&mut worker, which.name(), "Pshufb");
        assert!(found.divergences.iter().any(|d| d.code.starts_with("Pshufb") && d.part == "vector"));
    }
}

/// Comparisons that overlook a part are found by the outcomes that the campaign spoils itself.
#[test]
fn a_blind_comparison_is_found() {
    let blind: [(Part, outcome::Compare); 3] = [
        (Part::Gpr, |case, is, should| {
            let mut is = is.clone();
            is.gpr[11] = should.gpr[11];
            outcome::compare(case, &is, should)
        }),
        (Part::Flags, |case, is, should| {
            let mut is = is.clone();
            is.rflags = should.rflags;
            outcome::compare(case, &is, should)
        }),
        (Part::X87, |case, is, should| outcome::compare(case, is, should).filter(|(part, _)| *part != Part::X87)),
    ];
    for (part, compare) in blind {
        let Some(mut worker) = worker(Which::Interp) else { return };
        worker.compare_with(compare);
        let found = hunt(&mut worker, "comparison", "the comparison itself");
        assert!(found.divergences.iter().any(|d| d.engine == "comparison" && d.part == part.name()));
    }
}
