//! The part of the fidelity matrix that is about 16- and 32-bit code: a committed summary of campaigns, and the section made of it.

use super::source::codes;
use crate::campaign::coordinator::State;
use crate::campaign::matrix::Coverage;
use crate::campaign::tally::Tally;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// The committed summary.
const SUMMARY: &str = include_str!("../../../fidelity-modes.txt");

/// Does an engine's column belong here? Its name is followed by the bits of the code.
pub fn is_mode(engine: &str) -> bool {
    engine.ends_with(":32") || engine.ends_with(":16")
}

/// How many instructions of 16- or 32-bit code a campaign met; `None` if its results have none.
pub fn coverage(t: &Tally, bits: u32) -> Option<Coverage> {
    let tail = format!(":{bits}");
    let engines: Vec<_> = t.counts.iter().filter(|(e, _)| e.ends_with(&tail)).map(|(_, by_code)| by_code).collect();
    (!engines.is_empty()).then(|| Coverage::count(&engines, codes(bits)))
}

/// Results of campaigns as the lines of the summary: `campaign`, `code` (bits, instructions met, with a thousand cases, fewest, all),
/// `without`, `expected`, then `mnemonic engine forms cases equal expected unexpected`.
pub fn summary(states: &[State], revision: &str) -> String {
    let mut out = String::new();
    let mut t = Tally::default();
    for s in states {
        let (cases, seconds) = (s.tally.cases, s.tally.seconds);
        let _ = writeln!(out, "campaign {} {} {cases} {seconds:.0} {revision}", s.plan.seed, s.plan.kinds.join(","));
        t.add(&s.tally);
    }
    for bits in [32, 16] {
        let Some(c) = coverage(&t, bits) else { continue };
        let _ = writeln!(out, "code {bits} {} {} {} {}", c.met, c.thousand, c.least, c.all);
        for (why, codes) in c.without {
            let _ = writeln!(out, "without {bits} {why}: {}", codes.join(" "));
        }
    }
    for (row, n) in &t.expected {
        let _ = writeln!(out, "expected {n} {row}");
    }
    let mut rows: BTreeMap<(String, &str), [u64; 5]> = BTreeMap::new();
    for (engine, counts) in t.counts.iter().filter(|(e, _)| is_mode(e)) {
        for (code, c) in counts {
            let found = iced_x86::Code::values().find(|k| format!("{k:?}") == *code);
            let mnemonic = found.map_or(code.to_lowercase(), |k| format!("{:?}", k.mnemonic()).to_lowercase());
            let sum = rows.entry((mnemonic, engine)).or_default();
            for (to, n) in sum.iter_mut().zip([1, c.cases, c.equal, c.expected, c.different()]) {
                *to += n;
            }
        }
    }
    for ((mnemonic, engine), n) in rows {
        let _ = writeln!(out, "{mnemonic} {engine} {} {} {} {} {}", n[0], n[1], n[2], n[3], n[4]);
    }
    out
}

/// Mnemonic, engine, and forms, cases, equal, expected, unexpected.
fn lines() -> Vec<(&'static str, &'static str, [u64; 5])> {
    let line = |l: &'static str| {
        let words: Vec<&str> = l.split(' ').collect();
        let [mnemonic, engine, numbers @ ..] = &words[..] else { return None };
        let n: Vec<u64> = numbers.iter().map(|w| w.parse().ok()).collect::<Option<_>>()?;
        is_mode(engine).then_some((*mnemonic, *engine, n.try_into().ok()?))
    };
    SUMMARY.lines().filter_map(line).collect()
}

const INTRODUCTION: &str = "
## 16- and 32-bit code

`insn32`, `insn16`, `block32` and `block16` are the same in 32-bit user code and in 16-bit protected-mode user code. The host CPU runs it in
compatibility mode; segments are Linux's flat ones and those of a local descriptor table (modify_ldt(2)) with bases, limits, expand-down,
read-only, execute-only and absent ones, 16-bit stacks included. The engines run it behind page tables; the translator takes 32-bit code
with flat segments, here and outside IA-32e mode (bt-pae, bt-pae-mirror), and leaves the rest to the interpreter. bt-pae and bt-pae-mirror
take the instructions that are the same outside that mode: no far transfers, no descriptors, nothing sensitive. What follows an instruction
is INT3, so every case ends with an exception, and the vector, error code, CR2, all registers, segments and memory at that moment are
compared. Not done here: loads of GS, which is the host thread's own, and FOP and the pointers where the list above says so.

    bivisor diff --all --kinds insn32,insn16,block32,block16 --cases 10000000

";

/// The section of `docs/fidelity.md`.
pub fn section() -> String {
    let mut out = INTRODUCTION.to_string();
    out += "| kinds | seed | cases | seconds of all workers | revision |\n| --- | --- | --- | --- | --- |\n";
    for l in SUMMARY.lines().filter_map(|l| l.strip_prefix("campaign ")) {
        let words: Vec<&str> = l.split(' ').collect();
        if let [seed, kinds, cases, seconds, revision] = words[..] {
            let _ = writeln!(out, "| {kinds} | {seed} | {cases} | {seconds} | {revision} |");
        }
    }
    out += "\n| code | instructions | met | with 1,000 cases or more | fewest |\n| --- | --- | --- | --- | --- |\n";
    for l in SUMMARY.lines().filter_map(|l| l.strip_prefix("code ")) {
        let words: Vec<&str> = l.split(' ').collect();
        if let [bits, met, thousand, least, all] = words[..] {
            let _ = writeln!(out, "| {bits}-bit | {all} | {met} | {thousand} | {least} |");
        }
    }
    out += "\n| code | why there is no case | instructions |\n| --- | --- | --- |\n";
    for l in SUMMARY.lines().filter_map(|l| l.strip_prefix("without ")) {
        let (why, codes) = l.rsplit_once(": ").unwrap_or((l, ""));
        let (bits, why) = why.split_once(' ').unwrap_or((why, ""));
        let _ = writeln!(out, "| {bits}-bit | {why} | {codes} |");
    }
    let lines = lines();
    let engines: BTreeSet<&str> = lines.iter().map(|l| l.1).collect();
    let mut rows: BTreeMap<&str, BTreeMap<&str, [u64; 5]>> = BTreeMap::new();
    for (mnemonic, engine, n) in &lines {
        rows.entry(mnemonic).or_default().insert(engine, *n);
    }
    out += "\n| instruction |";
    for e in &engines {
        let _ = write!(out, " {e}-bit: cases | equal | expected | unexpected |");
    }
    let _ = writeln!(out, "\n| --- |{}", " --- | --- | --- | --- |".repeat(engines.len()));
    for (mnemonic, by_engine) in rows {
        let _ = write!(out, "| {mnemonic} |");
        for e in &engines {
            let n = by_engine.get(e).copied().unwrap_or_default();
            let _ = write!(out, " {} | {} | {} | {} |", n[1], n[2], n[3], n[4]);
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::engine::is_same_in_legacy_mode;
    use super::*;
    use iced_x86::Code;

    #[test]
    fn the_summary_adds_up_and_nothing_is_unexpected() {
        let lines = lines();
        assert!(!lines.is_empty());
        for (mnemonic, engine, n) in &lines {
            assert_eq!((n[1], n[4]), (n[2] + n[3], 0), "{mnemonic} on {engine}");
        }
        let campaigns =
            SUMMARY.lines().filter_map(|l| l.strip_prefix("campaign ")?.split(' ').nth(2)?.parse::<u64>().ok());
        let of = |engine: &str| -> u64 {
            lines.iter().filter(|l| l.1.split_once(':').is_some_and(|(e, _)| e == engine)).map(|l| l.2[1]).sum()
        };
        let all = campaigns.sum::<u64>();
        assert_eq!((of("interp-paged"), of("bt-paged")), (all, all), "each case on both");
    }

    #[test]
    fn outside_ia32e_mode_only_what_differs_there_is_left_out() {
        let lines = lines();
        let engines: BTreeSet<&str> = lines.iter().filter_map(|l| Some(l.1.split_once(':')?.0)).collect();
        assert_eq!(engines, BTreeSet::from(["interp-paged", "bt-paged", "bt-pae", "bt-pae-mirror"]), "as checked here");
        let by_mnemonic: BTreeMap<(&str, &str), [u64; 5]> = lines.iter().map(|l| ((l.0, l.1), l.2)).collect();
        for bits in [32, 16] {
            let mut forms: BTreeMap<String, [u64; 2]> = BTreeMap::new();
            let has = |c: &Code| if bits == 32 { c.op_code().mode32() } else { c.op_code().mode16() };
            for code in Code::values().filter(has) {
                let [all, same] = forms.entry(format!("{:?}", code.mnemonic()).to_lowercase()).or_default();
                *all += 1;
                *same += u64::from(is_same_in_legacy_mode(code));
            }
            let mut left_out = 0;
            for ((mnemonic, engine), n) in by_mnemonic.iter().filter(|((_, e), _)| *e == format!("interp-paged:{bits}"))
            {
                let on = |place: &str| {
                    by_mnemonic.get(&(*mnemonic, &*format!("{place}:{bits}"))).copied().unwrap_or_default()
                };
                assert_eq!(on("bt-pae"), on("bt-pae-mirror"), "{mnemonic} on {engine}");
                let legacy = on("bt-pae")[1];
                match forms.get(*mnemonic) {
                    Some([all, same]) if all == same => assert_eq!(legacy, n[1], "{mnemonic}"),
                    Some([_, 0]) => assert_eq!(legacy, 0, "{mnemonic}"),
                    Some(_) => assert!(0 < legacy && legacy < n[1], "{mnemonic}: {legacy} of {}", n[1]),
                    None if mnemonic.starts_with("block") => assert_eq!(legacy, n[1], "{mnemonic}"),
                    None => panic!("{mnemonic} is no instruction of {bits}-bit code"),
                }
                left_out += n[1] - legacy;
            }
            assert!(left_out > 0, "{bits}-bit code: far transfers and segment loads are left out");
        }
    }
}
