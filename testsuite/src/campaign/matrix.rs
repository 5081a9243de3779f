//! The fidelity matrix: a committed summary of a campaign by mnemonic, and the page made of it.

use super::coordinator::State;
use super::expected::Expected;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// The committed summary.
const SUMMARY: &str = include_str!("../../fidelity.txt");
/// What surrounds the table: written by hand.
const TEXT: &str = include_str!("../../fidelity.head.md");

/// A campaign's results as the lines of the summary: `key value` pairs, then `mnemonic engine forms cases equal expected unexpected`.
pub fn summary(state: &State) -> String {
    let t = &state.tally;
    let mut out = format!("seed {}\ncases {}\nseconds {:.0}\n", state.plan.seed, t.cases, t.seconds);
    let vendor = std::arch::x86_64::__cpuid(0);
    let name: Vec<u8> = [vendor.ebx, vendor.edx, vendor.ecx].iter().flat_map(|w| w.to_le_bytes()).collect();
    let signature = std::arch::x86_64::__cpuid(1).eax;
    let _ = writeln!(out, "cpu {} {signature:#x}", String::from_utf8_lossy(&name));
    for (row, n) in &t.expected {
        let _ = writeln!(out, "expected {n} {row}");
    }
    let mut rows: BTreeMap<(String, &str), [u64; 5]> = BTreeMap::new();
    for (engine, counts) in &t.counts {
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

/// A line of the matrix: engine, mnemonic, forms, cases, equal, expected, unexpected.
struct Line<'a> {
    mnemonic: &'a str,
    engine: &'a str,
    n: [u64; 5],
}

fn value<'a>(key: &str) -> &'a str {
    SUMMARY.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' ')).unwrap_or("?")
}

fn lines() -> Vec<Line<'static>> {
    let line = |l: &'static str| {
        let words: Vec<&str> = l.split(' ').collect();
        let [mnemonic, engine, numbers @ ..] = &words[..] else { return None };
        let n: Vec<u64> = numbers.iter().map(|w| w.parse().ok()).collect::<Option<_>>()?;
        Some(Line { mnemonic, engine, n: n.try_into().ok()? })
    };
    SUMMARY.lines().filter_map(line).collect()
}

/// Cases, unexpected divergences, expected ones, instructions (forms) of the engines together: for the README.
pub fn totals() -> (u64, u64, u64, u64) {
    let lines = lines();
    let sum = |i: usize| lines.iter().map(|l| l.n[i]).sum::<u64>();
    let forms = lines.iter().filter(|l| l.engine == "interp" && l.mnemonic != "invalid").map(|l| l.n[0]).sum();
    (value("cases").parse().unwrap_or(0), sum(4), sum(3), forms)
}

/// By mnemonic, by engine.
type Rows = BTreeMap<&'static str, BTreeMap<&'static str, [u64; 5]>>;

fn pairs() -> (BTreeSet<&'static str>, Rows) {
    let (mut engines, mut rows) = (BTreeSet::new(), Rows::new());
    for l in lines() {
        engines.insert(l.engine);
        rows.entry(l.mnemonic).or_default().insert(l.engine, l.n);
    }
    (engines, rows)
}

/// `docs/fidelity.md`.
pub fn page() -> String {
    let (cases, unexpected, expected, forms) = totals();
    let seconds: u64 = value("seconds").parse().unwrap_or(1);
    let mut out = TEXT
        .replace("{cases}", &cases.to_string())
        .replace("{seconds}", &seconds.to_string())
        .replace("{rate}", &(cases / seconds.max(1)).to_string())
        .replace("{seed}", value("seed"))
        .replace("{cpu}", value("cpu"))
        .replace("{forms}", &forms.to_string())
        .replace("{unexpected}", &unexpected.to_string())
        .replace("{expected}", &expected.to_string());
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
    out
}

/// The matrix as one HTML file.
pub fn html() -> String {
    let (engines, rows) = pairs();
    let mut out = String::from(
        "<!doctype html>\n<meta charset=\"utf-8\">\n<title>Bivisor: fidelity</title>\n<style>body{font-family:sans-serif}\
         td,th{padding:2px 8px;text-align:right}td:first-child{text-align:left}.x{background:#fcc}</style>\n",
    );
    let (cases, unexpected, expected, forms) = totals();
    let _ = writeln!(
        out,
        "<h1>Fidelity</h1>\n<p>{cases} cases of {forms} instructions, seed {}, on {}: {expected} expected divergences, {unexpected} unexpected.</p>",
        value("seed"),
        value("cpu")
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
        for l in lines() {
            assert_eq!(l.n[1], l.n[2] + l.n[3] + l.n[4], "{} on {}", l.mnemonic, l.engine);
        }
        let by_engine = |e: &str| lines().iter().filter(|l| l.engine == e).map(|l| l.n[1]).sum::<u64>();
        assert_eq!((by_engine("interp"), by_engine("bt")), (totals().0, totals().0));
    }
}
