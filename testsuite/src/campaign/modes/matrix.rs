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

`insn32`, `insn16`, `block32` and `block16` are the same in 32-bit user code and in 16-bit protected-mode user code. The host CPU runs it
in compatibility mode; segments are Linux's flat ones and those of a local descriptor table (modify_ldt(2)) with bases, limits, expand-down,
read-only, execute-only and absent ones, 16-bit stacks included. The engines run it behind page tables; the translator takes 32-bit code with
flat segments, here and outside IA-32e mode (bt-pae, bt-pae-mirror), and leaves the rest to the interpreter. What follows an instruction is INT3, so every case ends with an exception, and the vector, error code, CR2, all registers,
segments and memory at that moment are compared. Not done here: loads of GS, which is the host thread's own, and FOP and the pointers where
the list above says so. Code at CPL 0, real mode and virtual-8086 mode have no such judge; real mode has the 80286's recorded cases.

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
    use super::*;

    #[test]
    fn the_summary_adds_up_and_nothing_is_unexpected() {
        let lines = lines();
        assert!(!lines.is_empty());
        for (mnemonic, engine, n) in &lines {
            assert_eq!((n[1], n[4]), (n[2] + n[3], 0), "{mnemonic} on {engine}");
        }
        let campaigns =
            SUMMARY.lines().filter_map(|l| l.strip_prefix("campaign ")?.split(' ').nth(2)?.parse::<u64>().ok());
        let of = |prefix: &str| lines.iter().filter(|l| l.1.starts_with(prefix)).map(|l| l.2[1]).sum::<u64>();
        assert_eq!(of("interp"), campaigns.sum::<u64>());
        assert_eq!(of("interp"), of("bt"));
    }
}
