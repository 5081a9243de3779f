//! The explanation as text: guest on the left, host on the right.

use super::{Block, Report};
use crate::text::{Paint, duration, wrap};
use std::fmt::Write;

/// Columns of the guest's side.
const LEFT: usize = 35;
const RIGHT: usize = 41;

fn cut(text: &str, columns: usize) -> String {
    match text.chars().count() > columns {
        true => text.chars().take(columns - 1).chain(['~']).collect(),
        false => text.to_string(),
    }
}

fn sides(out: &mut String, b: &Block, paint: Paint) {
    for l in &b.lines {
        let address = format!("{:x}", l.address);
        let left = [format!("{address} {}", l.text), format!("  {}", l.bytes), format!("  {} ({})", l.made, l.way)];
        for i in 0..left.len().max(l.host.len()) {
            let left = format!("{:LEFT$}", left.get(i).map_or(String::new(), |s| cut(s, LEFT)));
            let left = match (i, l.made) {
                (0, _) => paint.bold(&left),
                (2, "identical") => paint.good(&left),
                (2, "rewritten") => paint.odd(&left),
                (2, _) => paint.bad(&left),
                _ => paint.dim(&left),
            };
            let right = l.host.get(i).map_or(String::new(), |h| cut(h, RIGHT));
            let _ = writeln!(out, "{}", format!("{left} | {right}").trim_end());
        }
    }
}

/// Lines of at most 80 columns.
pub fn text(r: &Report) -> String {
    let paint = Paint::auto();
    let mut out = String::new();
    for (i, b) in r.blocks.iter().enumerate() {
        if i > 0 {
            out.push('\n');
        }
        let _ = writeln!(out, "{}", paint.bold(&cut(&b.title, 78)));
        out += &wrap(
            "  ",
            &format!("translated for a {}: {} bytes of guest code became {}", b.target, b.guest_bytes, b.host_bytes),
        );
        sides(&mut out, b, paint);
        if b.rest > 0 {
            let _ = writeln!(out, "{:LEFT$} | {} bytes of stubs and cold code", "", b.rest);
        }
        for (to, patched) in &b.exits {
            let chained = if *patched { "patched to a direct jump when it is translated" } else { "leaves the cache" };
            out += &wrap("  exit: ", &format!("{to}; {chained}"));
        }
        for e in b.instructions.iter().filter(|e| b.instructions.len() == 1 || e.sensitivity != "innocuous") {
            out += &wrap(
                "  class: ",
                &format!("{}: {}, {}; at CPL 3: {}", e.instruction, e.class, e.sensitivity, e.at_cpl3),
            );
            out += &wrap("  interp: ", &e.engines.interp_at);
            if let Some(l) = b.lines.iter().find(|l| l.name == e.instruction) {
                out += &wrap("  bt: ", &format!("{}: {}", l.made, l.place));
            }
            let vtx = e.vtx_reason.map_or("no exit".into(), |n| format!("VT-x exit {n}, {}", e.vtx_when));
            out += &wrap("  kvm: ", &format!("{}; {vtx}: kvm-backend/src/exit.rs: run", e.engines.kvm));
        }
        if !b.cost_ns.is_empty() {
            let all: Vec<String> = b.cost_ns.iter().map(|(e, ns)| format!("{e} {}", duration(*ns))).collect();
            out += &wrap("  cost at CPL 0: ", &all.join(", "));
        }
    }
    out
}
