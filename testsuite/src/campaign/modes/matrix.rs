//! The part of the fidelity matrix that is about 16- and 32-bit code: a committed summary of campaigns, and the section made of it.

use super::{source, system};
use crate::campaign::case::Kind;
use crate::campaign::coordinator::State;
use crate::campaign::matrix::{Coverage, write_rows};
use crate::campaign::tally::Tally;
use iced_x86::Code;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// Campaigns of one sort.
pub struct Record {
    /// The committed summary.
    text: &'static str,
    /// What stands behind the engine's name in its columns.
    tails: &'static [&'static str],
}

/// Of user code: the tails are its bits.
pub static USER: Record = Record { text: include_str!("../../../fidelity-modes.txt"), tails: &["32", "16"] };
/// Of code at CPL 0, in real and virtual-8086 mode: the tails are the kinds' names.
pub static SYSTEM: Record =
    Record { text: include_str!("../../../fidelity-system.txt"), tails: &["cpl0-32", "cpl0-16", "real16", "v86"] };

/// The record to which an engine's column belongs.
pub fn of(engine: &str) -> Option<&'static Record> {
    let (_, tail) = engine.split_once(':')?;
    [&USER, &SYSTEM].into_iter().find(|r| r.tails.contains(&tail))
}

/// The instructions of a tail, and those left out.
fn codes(tail: &str) -> (Vec<Code>, Vec<(Code, &'static str)>) {
    match Kind::named(tail) {
        Some(kind) => (system::codes(kind.bits()), Vec::new()),
        None => source::codes(if tail == "32" { 32 } else { 16 }),
    }
}

impl Record {
    /// How many instructions a campaign met, by tail; only those of which its results have any.
    pub fn coverage(&self, t: &Tally) -> Vec<(&'static str, Coverage)> {
        let one = |tail: &&'static str| {
            // Beside the host CPU the interpreter runs what that can judge; the translator runs all.
            let all = |e: &str| e.split_once(':').is_some_and(|(e, of)| of == *tail && e != "interp");
            let engines: Vec<_> = t.counts.iter().filter(|(e, _)| all(e)).map(|(_, n)| n).collect();
            (!engines.is_empty()).then(|| (*tail, Coverage::count(&engines, codes(tail))))
        };
        self.tails.iter().filter_map(one).collect()
    }

    /// Results of campaigns as the lines of the summary: `campaign`, `code` (tail, instructions met, with a thousand cases, fewest, all),
    /// `without`, `expected`, then `mnemonic engine forms cases equal expected unexpected`.
    pub fn summary(&self, states: &[State], revision: &str) -> String {
        let mut out = String::new();
        let mut t = Tally::default();
        for s in states {
            let (cases, seconds) = (s.tally.cases, s.tally.seconds);
            let _ =
                writeln!(out, "campaign {} {} {cases} {seconds:.0} {revision}", s.plan.seed, s.plan.kinds.join(","));
            t.add(&s.tally);
        }
        for (tail, c) in self.coverage(&t) {
            let _ = writeln!(out, "code {tail} {} {} {} {}", c.met, c.thousand, c.least, c.all);
            for (why, codes) in c.without {
                let _ = writeln!(out, "without {tail} {why}: {}", codes.join(" "));
            }
        }
        write_rows(&mut out, &t, |e| self.has(e));
        out
    }

    /// Is an engine's column of this record?
    fn has(&self, engine: &str) -> bool {
        engine.split_once(':').is_some_and(|(_, tail)| self.tails.contains(&tail))
    }

    /// Mnemonic, engine, and forms, cases, equal, expected, unexpected.
    fn lines(&self) -> Vec<(&'static str, &'static str, [u64; 5])> {
        let line = |l: &'static str| {
            let words: Vec<&str> = l.split(' ').collect();
            let [mnemonic, engine, numbers @ ..] = &words[..] else { return None };
            let n: Vec<u64> = numbers.iter().map(|w| w.parse().ok()).collect::<Option<_>>()?;
            self.has(engine).then_some((*mnemonic, *engine, n.try_into().ok()?))
        };
        self.text.lines().filter_map(line).collect()
    }
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

const ELSEWHERE: &str = "
### At CPL 0, in real and virtual-8086 mode

`cpl0-32`, `cpl0-16`, `real16` and `v86` are every instruction of such code, sensitive ones and those of GS too, on interpreter and translator,
each state at the end compared with all system registers and the whole of RAM. What is the same in user code (no sensitive instruction, no
selector, no far transfer, and in the modes with real-mode addresses neither VEX nor EVEX nor an operand in CS) runs on the host CPU too, in
16- and 32-bit segments of the same kind whose bases lie higher by the arena's address: columns `host`. At CPL 0 the segments have DPL 0; in
real mode some have limits below 64 KiB; in virtual-8086 mode the arena is mapped from 0 on. Sensitive instructions have no judge but the
interpreter; real mode has the 80286's recorded cases besides, and ports, kvm-unit-tests and the manual's cases in `emulator` the others.

    bivisor diff --all --kinds cpl0-32,cpl0-16,real16,v86 --cases 1000000

";

/// The section of `docs/fidelity.md`.
pub fn section() -> String {
    let mut out = INTRODUCTION.to_string();
    USER.heads(&mut out, "-bit");
    USER.without(&mut out, "-bit");
    let rows = USER.rows();
    let engines: BTreeSet<&str> = rows.values().flat_map(|by_engine| by_engine.keys().copied()).collect();
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
    out += ELSEWHERE;
    SYSTEM.heads(&mut out, "");
    SYSTEM.without(&mut out, "");
    out += "\nCases of interpreter beside translator (`bt`) and of both beside the host CPU (`host`); none differs unexpectedly.\n\n| instruction |";
    for tail in SYSTEM.tails {
        let _ = write!(out, " {tail}: bt | host |");
    }
    let _ = writeln!(out, "\n| --- |{}", " --- | --- |".repeat(SYSTEM.tails.len()));
    for (mnemonic, by_engine) in SYSTEM.rows() {
        let _ = write!(out, "| {mnemonic} |");
        for tail in SYSTEM.tails {
            let cases = |engine: &str| by_engine.get(&*format!("{engine}:{tail}")).map_or(0, |n| n[1]);
            let _ = write!(out, " {} | {} |", cases("bt"), cases("interp"));
        }
        out.push('\n');
    }
    out
}

impl Record {
    /// By mnemonic, by engine.
    fn rows(&self) -> BTreeMap<&'static str, BTreeMap<&'static str, [u64; 5]>> {
        let mut rows: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
        for (mnemonic, engine, n) in self.lines() {
            rows.entry(mnemonic).or_default().insert(engine, n);
        }
        rows
    }

    /// The lines of one sort.
    fn marked(&self, mark: &str) -> impl Iterator<Item = Vec<&'static str>> {
        self.text.lines().filter_map(move |l| Some(l.strip_prefix(mark)?.split(' ').collect()))
    }

    /// The campaigns and how many instructions they met.
    fn heads(&self, out: &mut String, bit: &str) {
        *out += "| kinds | seed | cases | seconds of all workers | revision |\n| --- | --- | --- | --- | --- |\n";
        for words in self.marked("campaign ") {
            if let [seed, kinds, cases, seconds, revision] = words[..] {
                let _ = writeln!(out, "| {kinds} | {seed} | {cases} | {seconds} | {revision} |");
            }
        }
        *out +=
            "\n| code | instructions | met | with 1,000 cases or more | fewest |\n| --- | --- | --- | --- | --- |\n";
        for words in self.marked("code ") {
            if let [tail, met, thousand, least, all] = words[..] {
                let _ = writeln!(out, "| {tail}{bit} | {all} | {met} | {thousand} | {least} |");
            }
        }
    }

    /// The instructions without a case.
    fn without(&self, out: &mut String, bit: &str) {
        *out += "\n| code | why there is no case | instructions |\n| --- | --- | --- |\n";
        for l in self.text.lines().filter_map(|l| l.strip_prefix("without ")) {
            let (why, codes) = l.rsplit_once(": ").unwrap_or((l, ""));
            let (bits, why) = why.split_once(' ').unwrap_or((why, ""));
            let _ = writeln!(out, "| {bits}{bit} | {why} | {codes} |");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::engine::is_same_in_legacy_mode;
    use super::*;

    #[test]
    fn the_summary_adds_up_and_nothing_is_unexpected() {
        let lines = USER.lines();
        assert!(!lines.is_empty());
        for (mnemonic, engine, n) in &lines {
            assert_eq!((n[1], n[4]), (n[2] + n[3], 0), "{mnemonic} on {engine}");
        }
        let campaigns =
            USER.text.lines().filter_map(|l| l.strip_prefix("campaign ")?.split(' ').nth(2)?.parse::<u64>().ok());
        let of = |engine: &str| -> u64 {
            lines.iter().filter(|l| l.1.split_once(':').is_some_and(|(e, _)| e == engine)).map(|l| l.2[1]).sum()
        };
        let all = campaigns.sum::<u64>();
        assert_eq!((of("interp-paged"), of("bt-paged")), (all, all), "each case on both");
    }

    #[test]
    fn elsewhere_every_instruction_was_met_and_nothing_is_unexpected() {
        let mut all = 0;
        for (mnemonic, engine, n) in SYSTEM.lines() {
            assert_eq!((n[1], n[4]), (n[2] + n[3], 0), "{mnemonic} on {engine}");
            all += if engine.starts_with("bt:") { n[1] } else { 0 };
        }
        let cases: u64 = SYSTEM.marked("campaign ").filter_map(|words| words[2].parse::<u64>().ok()).sum();
        // Those whose judge came to no end, or left by a page fault where there are none, are no comparisons.
        assert!(all > 0 && all <= cases && cases - all < cases / 100, "{all} of {cases}");
        assert_eq!(SYSTEM.marked("code ").map(|words| words[0]).collect::<Vec<_>>(), SYSTEM.tails);
        // The dice rarely give 16-bit code the prefixes that some gathers need.
        for words in SYSTEM.marked("without ") {
            assert!(words[3..].iter().all(|c| c.contains("gather") || c.contains("scatter")), "{words:?}");
        }
    }

    #[test]
    fn outside_ia32e_mode_only_what_differs_there_is_left_out() {
        let lines = USER.lines();
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
