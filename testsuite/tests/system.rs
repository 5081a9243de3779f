//! Every integer instruction of 16- and 32-bit code at CPL 0, in real mode and in virtual-8086 mode, interpreter against translator; for what
//! is the same in user code both against the host CPU.

use bivisor_emulator::isa::{Class, facts};
use bivisor_testsuite::campaign::case::Kind;
use bivisor_testsuite::campaign::engine::Which;
use bivisor_testsuite::campaign::modes::engine::is_same_in_legacy_mode;
use bivisor_testsuite::campaign::modes::{Modes, system};
use bivisor_testsuite::campaign::reason_against;
use bivisor_testsuite::campaign::tally::{Divergence, Tally};
use iced_x86::{Code, EncodingKind, Mnemonic};
use std::sync::{Mutex, PoisonError};

/// Instructions of a batch.
const SLOTS: usize = 64;

/// The arena is one for all.
static ALONE: Mutex<()> = Mutex::new(());

fn modes() -> Modes {
    Modes::new(&[Which::InterpPaged, Which::BtPaged], true).expect("interpreter and translator")
}

/// The integer instructions of such code.
fn integer(bits: u32) -> Vec<Code> {
    let wanted = |c: &Code| !matches!(facts(*c).class, Class::Native | Class::Undefined);
    system::codes(bits).into_iter().filter(wanted).collect()
}

/// Cases of an instruction on an engine.
fn met(tally: &Tally, kind: Kind, engine: &str, code: Code) -> u64 {
    let by_code = tally.counts.get(&format!("{engine}:{}", kind.name()));
    by_code.and_then(|n| n.get(&format!("{code:?}"))).map_or(0, |n| n.cases)
}

#[test]
fn every_integer_instruction_in_every_mode() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for kind in Kind::SYSTEM {
        let codes = integer(kind.bits());
        let (mut modes, mut tally) = (modes(), Tally::default());
        modes.only(&codes);
        for n in 0..codes.len().div_ceil(SLOTS) as u64 {
            modes.batch(kind, 5, n, &mut tally);
        }
        // VEX is the host's only where it is a prefix.
        let flat = matches!(kind, Kind::Real | Kind::Virtual);
        let vex = |c: Code| flat && c.op_code().encoding() != EncodingKind::Legacy;
        let same = |c: Code| is_same_in_legacy_mode(c) && reason_against(c).is_none() && !vex(c);
        let lacking = |tally: &Tally, host: bool| -> Vec<Code> {
            let beside = |c: Code| host && same(c) && met(tally, kind, "interp", c) == 0;
            codes.iter().copied().filter(|c| met(tally, kind, "bt", *c) == 0 || beside(*c)).collect()
        };
        // Any bytes took the turn of some, others stood where a page ends.
        for n in 0..12 {
            modes.only(&lacking(&tally, modes.has_host()));
            modes.batch(kind, 6, n, &mut tally);
        }
        for d in &tally.divergences {
            println!("{} {} [{}] {}: {}", d.engine, d.code, d.bytes, d.text, d.what);
        }
        assert_eq!(tally.different(), 0, "{}", kind.name());
        let missing = lacking(&tally, false);
        assert!(missing.is_empty(), "{}: no case of {missing:?}", kind.name());
        if !modes.has_host() {
            println!("SKIPPED: no host CPU to compare with; interpreter and translator are compared");
            continue;
        }
        let unjudged = lacking(&tally, true);
        assert!(unjudged.is_empty(), "{}: not beside the host CPU: {unjudged:?}", kind.name());
        let judged = codes.iter().filter(|c| met(&tally, kind, "interp", **c) > 0).count();
        println!("{}: {} instructions, {judged} of them beside the host CPU", kind.name(), codes.len());
    }
}

/// In what the host CPU judges, and in what interpreter and translator alone do: a register, a system register, memory beside the operand.
#[test]
fn a_bug_in_every_mode_is_found() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for kind in Kind::SYSTEM {
        for mnemonic in [Mnemonic::Adc, Mnemonic::Smsw, Mnemonic::Cli, Mnemonic::Xadd] {
            let mut modes = modes();
            let codes: Vec<_> = integer(kind.bits()).into_iter().filter(|c| c.mnemonic() == mnemonic).collect();
            modes.only(&codes);
            modes.plant(kind, move |cpu| if mnemonic == Mnemonic::Cli { cpu.msr.lstar ^= 1 } else { cpu.gpr[3] ^= 4 });
            let mut tally = Tally::default();
            modes.batch(kind, 1, 0, &mut tally);
            let found = |d: &&Divergence| d.engine == format!("bt:{}", kind.name());
            assert!(tally.divergences.iter().any(|d| found(&d)), "{mnemonic:?} in {}", kind.name());
        }
    }
}
