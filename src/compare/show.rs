//! The comparison as text.

use super::program::PLACES;
use super::{BARE, Report, Row, boot};
use crate::guest::ENGINES;
use crate::text::{Paint, duration, wrap};
use std::fmt::Write;

fn table(out: &mut String, rows: &[Row], columns: &[&'static str], unit: f64) {
    let paint = Paint::auto();
    let head: String = columns.iter().map(|c| format!("{c:>11}")).collect();
    let _ = writeln!(out, "{}", paint.bold(&format!("{:11}{head}", "")));
    for r in rows {
        let cells: String = columns
            .iter()
            .map(|c| match r.values.get(c) {
                Some(v) => format!("{:>11}", duration(v.median * unit)),
                None if BARE.contains(c) => format!("{:>11}", "n/a"),
                None if r.failed.contains_key(c) => format!("{:>11}", "fails"),
                None => format!("{:>11}", "-"),
            })
            .collect();
        let _ = writeln!(out, "{:11}{cells}", r.name);
        let spread: String = columns
            .iter()
            .map(|c| match r.values.get(c) {
                Some(v) if v.median > 0.0 => {
                    let around = (v.spread[1] - v.spread[0]) / v.median * 50.0;
                    let ratio = match v.to_native {
                        Some(n) if n < 10.0 => format!("{n:.1}x "),
                        Some(n) => format!("{n:.0}x "),
                        None => String::new(),
                    };
                    format!("{:>11}", format!("{ratio}±{:.0}%", around.min(99.0)))
                }
                _ => format!("{:11}", ""),
            })
            .collect();
        let _ = writeln!(out, "{}", paint.dim(format!("{:11}{spread}", "").trim_end()));
    }
}

/// Lines of at most 80 columns.
pub fn text(r: &Report) -> String {
    let paint = Paint::auto();
    let mut out = wrap("", &format!("{}. {}.", r.cpu, r.kvm));
    if !r.operations.is_empty() {
        let _ = writeln!(out, "\n{}", paint.bold("Operations of a ring-0 guest: median, times native, spread"));
        let columns: Vec<&'static str> = BARE.into_iter().chain(ENGINES).collect();
        table(&mut out, &r.operations, &columns, 1.0);
    }
    if !r.programs.is_empty() {
        let _ = writeln!(out, "\n{}", paint.bold("Programs, engines in process mode"));
        table(&mut out, &r.programs, &PLACES, 1e6);
    }
    if !r.machines.is_empty() {
        let _ = writeln!(out, "\n{}", paint.bold("Machines, from the start of the process to its end"));
        table(&mut out, &r.machines, &boot::ENGINES, 1e6);
    }
    let _ = writeln!(out, "\n{}", paint.bold("Who wins, and why (trap-and-emulate is wrong, so it does not count)"));
    for row in r.operations.iter().chain(&r.programs).chain(&r.machines) {
        out += &wrap(&format!("  {:10} ", row.name), &row.sentence);
    }
    if !r.ledger.is_empty() {
        let _ = writeln!(out, "\n{}", paint.bold("Ledger: times that an engine was left for one operation"));
        for e in &r.ledger {
            let number = e.vtx_reason.map_or("-".into(), |n| n.to_string());
            out +=
                &wrap(&format!("  {:10} {:6} {:>7.2}  VT-x {number:>2}  ", e.operation, e.engine, e.times), &e.reason);
        }
        out += &wrap(
            "  ",
            "VT-x is Intel's basic exit reason for it, - where there is none. interp: sensitive instructions and events, each a function; \
             bt: exits of translated code; trap: signals; kvm: returns of KVM_RUN and, with their kernel names, KVM's own counters.",
        );
    }
    if !r.unit_costs.is_empty() {
        let _ = writeln!(out, "\n{}", paint.bold("What one exit costs: fitted to all operations above, by class"));
        for (engine, costs) in &r.unit_costs {
            let all: Vec<String> = costs.iter().map(|(class, ns)| format!("{class} {}", duration(*ns))).collect();
            out += &wrap(&format!("  {engine:10} "), &format!("{}.", all.join(", ")));
        }
    }
    let papers: Vec<&Row> = r.operations.iter().filter(|o| o.paper.is_some()).collect();
    if !papers.is_empty() {
        let _ = writeln!(out, "\n{}", paint.bold("For reference, not measured here"));
        out += &wrap("  ", &format!("{}.", r.reference));
        for row in papers {
            let [native, bt, vt] = row.paper.expect("filtered");
            let _ = writeln!(out, "  {:10} native {native:>6}  translated {bt:>6}  VT-x {vt:>6}", row.name);
        }
    }
    let mut notes: Vec<(&str, &str, &str)> = Vec::new();
    for row in r.operations.iter().chain(&r.programs).chain(&r.machines) {
        notes.extend(row.natively.map(|what| (row.name, "natively", what)));
        for (place, why) in &row.failed {
            match *place {
                // For the same reason: not said twice.
                "container" if row.failed.get("native") == Some(why) => {}
                "native" => notes.push((row.name, "natively", why)),
                place => notes.push((row.name, place, why)),
            }
        }
    }
    if !notes.is_empty() {
        let _ = writeln!(out, "\n{}", paint.bold("What is something else natively, or not to be had"));
        for (name, place, what) in notes {
            out += &wrap(&format!("  {name:10} {place:10} "), what);
        }
    }
    out
}
