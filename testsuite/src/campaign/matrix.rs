//! The fidelity matrix: a committed summary of a campaign by mnemonic, and the page made of it.

use super::case::Kind;
use super::coordinator::State;
use super::engine::Which;
use super::expected::Expected;
use super::tally::{Count, Tally};
use super::worker::codes;
use iced_x86::Code;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// The committed summary.
const SUMMARY: &str = include_str!("../../fidelity.txt");
/// Of a campaign on a CPU of the other make, whose matrix is not shown.
const OTHER: &str = include_str!("../../fidelity-intel.txt");
/// What surrounds the table: written by hand.
const TEXT: &str = include_str!("../../fidelity.head.md");

/// Results of campaigns as the lines of the summary: one `campaign` line each (seed, engines, cases, seconds, revision), which
/// instructions were met and which not, expected divergences, then `mnemonic engine forms cases equal expected unexpected`.
pub fn summary(states: &[State], revision: &str) -> String {
    let mut out = String::new();
    let mut t = Tally::default();
    for s in states {
        let (engines, cases, seconds) = (s.plan.engines.join(","), s.tally.cases, s.tally.seconds);
        let _ = writeln!(out, "campaign {} {engines} {cases} {seconds:.0} {revision}", s.plan.seed);
        t.add(&s.tally);
    }
    let vendor = std::arch::x86_64::__cpuid(0);
    let name: Vec<u8> = [vendor.ebx, vendor.edx, vendor.ecx].iter().flat_map(|w| w.to_le_bytes()).collect();
    let signature = std::arch::x86_64::__cpuid(1).eax;
    let _ = writeln!(out, "cpu {} {signature:#x}", String::from_utf8_lossy(&name));
    let c = Coverage::of(&t);
    let _ = writeln!(out, "instructions {} {} {} {}", c.met, c.thousand, c.least, c.all);
    for (why, codes) in c.without {
        let _ = writeln!(out, "without {why}: {}", codes.join(" "));
    }
    write_rows(&mut out, &t, |_| true);
    out
}

/// The lines `expected` of a summary, and a line for each mnemonic and each engine that `has`.
pub fn write_rows(out: &mut String, t: &Tally, has: impl Fn(&str) -> bool) {
    for (row, n) in &t.expected {
        let _ = writeln!(out, "expected {n} {row}");
    }
    let mut rows: BTreeMap<(String, &str), [u64; 5]> = BTreeMap::new();
    for (engine, counts) in t.counts.iter().filter(|(e, _)| has(e)) {
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
}

/// How many instructions a campaign met.
pub struct Coverage {
    /// That decode in the mode and that the offered CPU has.
    pub all: usize,
    /// Met by a case on every engine.
    pub met: usize,
    /// With a thousand cases or more on every engine.
    pub thousand: usize,
    /// The fewest cases of one that was met, on the engine that had fewest.
    pub least: u64,
    /// Those without a case, by the reason.
    pub without: BTreeMap<String, Vec<String>>,
}

impl Coverage {
    /// Of results.
    pub fn of(t: &Tally) -> Coverage {
        // Only engines that ran instructions of this kind: a comparison of its own is none.
        let engines: Vec<_> = t.counts.iter().filter(|(e, _)| Which::named(e).is_some()).map(|(_, n)| n).collect();
        Coverage::count(&engines, codes())
    }

    /// Of what engines counted, of the codes that are wanted; and those that are left out, with the reason.
    pub fn count(
        engines: &[&BTreeMap<String, Count>],
        (wanted, left_out): (Vec<Code>, Vec<(Code, &'static str)>),
    ) -> Coverage {
        let all = wanted.len() + left_out.len();
        let mut c = Coverage { all, met: 0, thousand: 0, least: u64::MAX, without: BTreeMap::new() };
        for code in wanted {
            let name = format!("{code:?}");
            match engines.iter().map(|by_code| by_code.get(&name).map_or(0, |n| n.cases)).min().unwrap_or(0) {
                0 => c.without.entry("not met".into()).or_default().push(name),
                n => {
                    (c.met, c.least) = (c.met + 1, c.least.min(n));
                    c.thousand += usize::from(n >= 1000);
                }
            }
        }
        for (code, why) in left_out {
            c.without.entry(why.into()).or_default().push(format!("{code:?}"));
        }
        if c.met == 0 {
            c.least = 0;
        }
        c
    }
}

/// A line of the matrix: engine, mnemonic, forms, cases, equal, expected, unexpected.
struct Line<'a> {
    mnemonic: &'a str,
    engine: &'a str,
    n: [u64; 5],
}

fn value<'a>(key: &str) -> &'a str {
    value_in(SUMMARY, key)
}

fn value_in(summary: &'static str, key: &str) -> &'static str {
    summary.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' ')).unwrap_or("?")
}

fn lines(summary: &'static str) -> Vec<Line<'static>> {
    let line = |l: &'static str| {
        let words: Vec<&str> = l.split(' ').collect();
        let [mnemonic, engine, numbers @ ..] = &words[..] else { return None };
        let n: Vec<u64> = numbers.iter().map(|w| w.parse().ok()).collect::<Option<_>>()?;
        Some(Line { mnemonic, engine, n: n.try_into().ok()? })
    };
    summary.lines().filter_map(line).collect()
}

/// The campaigns: seed, engines, cases, seconds, revision.
fn campaigns(summary: &'static str) -> Vec<(&'static str, &'static str, u64, u64, &'static str)> {
    let one = |l: &'static str| {
        let words: Vec<&str> = l.strip_prefix("campaign ")?.split(' ').collect();
        let [seed, engines, cases, seconds, revision] = words[..] else { return None };
        Some((seed, engines, cases.parse().ok()?, seconds.parse().ok()?, revision))
    };
    summary.lines().filter_map(one).collect()
}

/// What the campaigns on record are together.
pub struct Totals {
    /// Encodings of instructions that ran; blocks and bytes that are no instruction are none.
    pub forms: u64,
    /// Of each engine, in [`Which`]'s order: its name and its cases.
    pub cases: Vec<(&'static str, u64)>,
    /// Expected divergences on all engines.
    pub expected: u64,
    /// Unexpected ones.
    pub unexpected: u64,
}

impl Totals {
    /// Of the committed summary.
    pub fn on_record() -> Totals {
        Totals::of(SUMMARY)
    }

    fn of(summary: &'static str) -> Totals {
        let lines = lines(summary);
        let sum = |i: usize| lines.iter().map(|l| l.n[i]).sum::<u64>();
        let of = |e: &Which| lines.iter().filter(|l| l.engine == e.name()).map(|l| l.n[1]).sum::<u64>();
        let is_form = |l: &&Line<'_>| l.mnemonic != "invalid" && Kind::named(l.mnemonic).is_none();
        Totals {
            forms: lines.iter().filter(|l| l.engine == Which::Interp.name()).filter(is_form).map(|l| l.n[0]).sum(),
            cases: Which::ALL.iter().map(|e| (e.name(), of(e))).filter(|(_, n)| *n > 0).collect(),
            expected: sum(3),
            unexpected: sum(4),
        }
    }

    /// `1 case on interp, 2 on bt`.
    pub fn by_engine(&self) -> String {
        let words = self.cases.iter().enumerate();
        let words = words.map(|(i, (e, n))| format!("{n}{} on {e}", if i == 0 { " cases" } else { "" }));
        words.collect::<Vec<_>>().join(", ")
    }
}

/// By mnemonic, by engine.
type Rows = BTreeMap<&'static str, BTreeMap<&'static str, [u64; 5]>>;

fn pairs() -> (BTreeSet<&'static str>, Rows) {
    let (mut engines, mut rows) = (BTreeSet::new(), Rows::new());
    for l in lines(SUMMARY) {
        engines.insert(l.engine);
        rows.entry(l.mnemonic).or_default().insert(l.engine, l.n);
    }
    (engines, rows)
}

/// The text with those of its parts, from a line `{if CONDITION}` to a line `{end}`, whose conditions hold.
fn parts(conditions: &[(&str, bool)]) -> String {
    let (mut out, mut shown) = (String::new(), true);
    for line in TEXT.lines() {
        let wanted = line.strip_prefix("{if ").and_then(|l| l.strip_suffix('}'));
        match (wanted, line) {
            (Some(name), _) => shown = conditions.contains(&(name, true)),
            (None, "{end}") => shown = true,
            _ if shown => out += &format!("{line}\n"),
            _ => {}
        }
    }
    out
}

/// What the other make's campaign came to.
fn other() -> String {
    let (t, cpu) = (Totals::of(OTHER), value_in(OTHER, "cpu"));
    let seeds: Vec<&str> = campaigns(OTHER).iter().map(|c| c.0).collect();
    format!(
        "On {cpu} (seed {}), {} instruction forms, {}: {} expected divergences, {} unexpected.",
        seeds.join(", "),
        t.forms,
        t.by_engine(),
        t.expected,
        t.unexpected
    )
}

/// `docs/fidelity.md`.
pub fn page() -> String {
    let totals = Totals::on_record();
    let mut table = String::new();
    for (seed, engines, cases, seconds, revision) in campaigns(SUMMARY).into_iter().chain(campaigns(OTHER)) {
        let rate = cases / seconds.max(1);
        let _ = writeln!(table, "| {engines} | {seed} | {cases} | {seconds} | {rate} | {revision} |");
    }
    let covered: Vec<u64> = value("instructions").split(' ').filter_map(|w| w.parse().ok()).collect();
    let covered: [u64; 4] = covered.try_into().unwrap_or([0, 0, 0, 1]);
    let [met, thousand, least, all] = covered;
    let share = format!("{:.1}", 100.0 * met as f64 / all.max(1) as f64);
    let mut without = String::new();
    for l in SUMMARY.lines().filter_map(|l| l.strip_prefix("without ")) {
        let (why, codes) = l.rsplit_once(": ").unwrap_or((l, ""));
        let _ = writeln!(without, "| {why} | {} | {codes} |", codes.split(' ').count());
    }
    let has_kvm = campaigns(SUMMARY).iter().any(|c| c.1.split(',').any(|e| e == Which::Kvm.name()));
    let mut out = parts(&[("unexpected", totals.unexpected > 0), ("kvm", has_kvm), ("no kvm", !has_kvm)]);
    for (key, text) in [
        ("{campaigns}\n", table),
        ("{without}\n", without),
        ("{cases}", totals.by_engine()),
        ("{other}", other()),
        ("{cpu}", value("cpu").into()),
        ("{forms}", totals.forms.to_string()),
        ("{unexpected}", totals.unexpected.to_string()),
        ("{expected}", totals.expected.to_string()),
        ("{met}", met.to_string()),
        ("{all}", all.to_string()),
        ("{share}", share),
        ("{thousand}", thousand.to_string()),
        ("{least}", least.to_string()),
    ] {
        out = out.replace(key, &text);
    }
    out += "\n## What may differ from the host CPU, and why\n\n| instructions, engines, part, when | why |\n| --- | --- |\n";
    for row in Expected::default().0 {
        let _ = writeln!(out, "| {} | {} |", row.what().replace('*', "all"), row.reason);
    }
    let (engines, rows) = pairs();
    out += "\n## The matrix\n\nEach engine against the host CPU, 64-bit mode: cases, of them equal, expected divergences, unexpected ones.\n\n";
    out += "| instruction | forms |";
    engines.iter().for_each(|e| {
        let _ = write!(out, " {e}: cases | equal | expected | unexpected |");
    });
    let _ = writeln!(out, "\n| --- | --- |{}", " --- | --- | --- | --- |".repeat(engines.len()));
    for (mnemonic, by_engine) in &rows {
        let forms = by_engine.values().map(|n| n[0]).max().unwrap_or(0);
        let _ = write!(out, "| {mnemonic} | {forms} |");
        for e in &engines {
            let n = by_engine.get(e).copied().unwrap_or_default();
            let _ = write!(out, " {} | {} | {} | {} |", n[1], n[2], n[3], n[4]);
        }
        out.push('\n');
    }
    out + &super::modes::matrix::section()
}

/// The matrix as one HTML file.
pub fn html() -> String {
    let (engines, rows) = pairs();
    let mut out = String::from(
        "<!doctype html>\n<meta charset=\"utf-8\">\n<title>Bivisor: fidelity</title>\n<style>body{font-family:sans-serif}\
         td,th{padding:2px 8px;text-align:right}td:first-child{text-align:left}.x{background:#fcc}</style>\n",
    );
    let t = Totals::on_record();
    let _ = writeln!(
        out,
        "<h1>Fidelity</h1>\n<p>{} instruction forms beside {}: {}; {} expected divergences, {} unexpected.</p>",
        t.forms,
        value("cpu"),
        t.by_engine(),
        t.expected,
        t.unexpected
    );
    out += "<table>\n<tr><th>instruction<th>forms";
    engines.iter().for_each(|e| {
        let _ = write!(out, "<th>{e}: cases<th>equal<th>expected<th>unexpected");
    });
    out.push('\n');
    for (mnemonic, by_engine) in &rows {
        let forms = by_engine.values().map(|n| n[0]).max().unwrap_or(0);
        let _ = write!(out, "<tr><td>{mnemonic}<td>{forms}");
        for e in &engines {
            let n = by_engine.get(e).copied().unwrap_or_default();
            let class = if n[4] > 0 { " class=x" } else { "" };
            let _ = write!(out, "<td>{}<td>{}<td>{}<td{class}>{}", n[1], n[2], n[3], n[4]);
        }
        out.push('\n');
    }
    out + "</table>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_adds_up() {
        for l in lines(SUMMARY) {
            assert_eq!(l.n[1], l.n[2] + l.n[3] + l.n[4], "{} on {}", l.mnemonic, l.engine);
        }
        for e in ["interp", "bt"] {
            let by_engine: u64 = lines(SUMMARY).iter().filter(|l| l.engine == e).map(|l| l.n[1]).sum();
            let runs = campaigns(SUMMARY).into_iter().filter(|c| c.1.split(',').any(|name| name == e));
            assert_eq!(by_engine, runs.map(|c| c.2).sum::<u64>(), "{e}");
        }
    }
}
