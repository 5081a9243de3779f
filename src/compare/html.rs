//! The comparison as one HTML file: bars on a logarithmic scale, the ledger, the reference; nothing from elsewhere.

use super::program::PLACES;
use super::{BARE, Report, Row, boot};
use crate::guest::ENGINES;
use crate::text::{duration, html};
use std::fmt::Write;

/// One style for all pages of ours.
pub const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem;color:#1c1c1e;background:#fff}\
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2rem}h3{font-size:1rem;margin:1.4rem 0 .2rem}p{margin:.3rem 0}\
.bar{display:flex;align-items:center;gap:.5rem;margin:.15rem 0}.bar b{flex:0 0 5.5rem;font-weight:400;text-align:right}\
.track{flex:1;min-width:0;background:#f0f0f3;border-radius:3px}.cut{background:#d8d8de}.fill{height:1.1rem;border-radius:3px}.cut{display:flex;overflow:hidden;min-height:1.1rem}.cut .fill{border-radius:0}\
.key{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.9rem}.key i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;margin-right:.3rem}.key .rest{background:#d8d8de}\
.bar span{flex:0 0 8.5rem;font-variant-numeric:tabular-nums}.note{color:#5a5a60;font-size:.9rem}\
.native{background:#8e8e93}.container{background:#30a46c}.interp{background:#b58900}.bt{background:#0969da}.trap{background:#cf222e}.kvm{background:#8250df}\
table{border-collapse:collapse;font-size:.9rem;display:block;overflow-x:auto}td,th{padding:.15rem .6rem;border-bottom:1px solid #e0e0e4;text-align:left}\
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}pre{overflow-x:auto;background:#f6f6f8;padding:.5rem;font-size:.85rem}\
@media(prefers-color-scheme:dark){body{color:#e6e6ea;background:#16161a}.track,pre{background:#26262c}.cut,.key .rest{background:#4a4a52}.note{color:#a0a0a8}td,th{border-color:#33333a}}\
@media(max-width:30rem){.bar b{flex-basis:4.3rem;font-size:.85rem}.bar span{flex-basis:6.8rem;font-size:.85rem}}";

/// The start of a page.
pub fn head(title: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width,initial-scale=1\"><title>{0}</title><link rel=\"icon\" href=\"data:,\"><style>{STYLE}</style></head>\
         <body>\n<h1>{0}</h1>\n",
        html(title)
    )
}

/// Bars from the smallest power of ten below all values to the largest.
fn chart(out: &mut String, row: &Row, columns: &[&'static str], unit: f64) {
    let _ = writeln!(out, "<h3>{} <span class=\"note\">{}</span></h3>", html(row.name), html(row.what));
    for c in columns {
        let Some(v) = row.values.get(c) else {
            // What a container cannot do for the same reason is not said twice.
            let again = *c == "container" && row.failed.get(c) == row.failed.get("native");
            if let Some(why) = row.failed.get(c).filter(|_| !again) {
                let fails = if BARE.contains(c) { "n/a" } else { "fails" };
                let _ = writeln!(
                    out,
                    "<div class=\"bar\"><b>{c}</b><div class=\"note\">{fails}: {}</div></div>",
                    html(why)
                );
            }
            continue;
        };
        let ns = v.median * unit;
        // From 1 ns to 10 s.
        let width = (ns.max(1.0).log10() * 10.0).clamp(0.5, 100.0);
        let ratio = v
            .to_native
            .filter(|_| *c != "native")
            .map_or(String::new(), |n| if n < 100.0 { format!(" · {n:.1}×") } else { format!(" · {n:.0}×") });
        let spread = format!("{} to {}", duration(v.spread[0] * unit), duration(v.spread[1] * unit));
        let _ = writeln!(
            out,
            "<div class=\"bar\" title=\"{spread}\"><b>{c}</b><div class=\"track\"><div class=\"fill {c}\" \
             style=\"width:{width:.1}%\"></div></div><span>{}{ratio}</span></div>",
            duration(ns)
        );
    }
    let paper = row.paper.map_or(String::new(), |[n, b, v]| {
        format!("<p class=\"note\">Pentium 4, 2006, cycles: native {n}, translated {b}, VT-x {v}.</p>")
    });
    let natively =
        row.natively.map_or(String::new(), |what| format!("<p class=\"note\">Natively: {}.</p>", html(what)));
    let _ = writeln!(out, "<p>{}</p>{natively}{paper}", html(&row.sentence));
}

/// The ledger as a histogram: times an engine was left for one operation, by reason.
fn ledger(out: &mut String, r: &Report) {
    let most = r.ledger.iter().map(|e| e.times).fold(1.0, f64::max);
    out.push_str("<table><tr><th>operation<th>engine<th class=\"n\">VT-x<th>reason<th class=\"n\">times<th>\n");
    for e in &r.ledger {
        let number = e.vtx_reason.map_or("–".into(), |n| n.to_string());
        let _ = writeln!(
            out,
            "<tr><td>{}<td>{}<td class=\"n\">{number}<td>{}<td class=\"n\">{:.2}<td><div class=\"fill {}\" style=\"width:{:.1}rem\"></div>",
            html(e.operation),
            e.engine,
            html(&e.reason),
            e.times,
            e.engine,
            e.times / most * 8.0
        );
    }
    out.push_str("</table>\n");
}

/// Colours of the classes of exits, in the order in which an engine has them.
const SHADES: [&str; 6] = ["#0969da", "#bf8700", "#8250df", "#1a7f37", "#bc4c00", "#0550ae"];

/// Where the time goes: for each engine a bar an operation, all as long, cut into classes of exits.
fn breakdown(out: &mut String, r: &Report) {
    for (engine, costs) in &r.unit_costs {
        let _ = writeln!(out, "<h3>{engine}</h3>\n<p class=\"key\">");
        let shade = |class: &str| SHADES[costs.keys().position(|k| *k == class).unwrap_or(0) % SHADES.len()];
        for (class, ns) in costs {
            let _ = writeln!(
                out,
                "<span><i style=\"background:{}\"></i>{}: {} each</span>",
                shade(class),
                html(class),
                duration(*ns)
            );
        }
        out.push_str("<span><i class=\"rest\"></i>the rest: the guest's own instructions, and error</span></p>\n");
        for b in r.breakdown.iter().filter(|b| b.engine == *engine && b.total > 0.0) {
            let said: Vec<String> =
                b.parts.iter().map(|p| format!("{:.2} × {}: {}", p.times, p.class, duration(p.ns))).collect();
            let said = format!("{}; the rest: {}", said.join("; "), duration(b.rest));
            let _ = write!(
                out,
                "<div class=\"bar\" title=\"{}\"><b>{}</b><div class=\"track cut\">",
                html(&said),
                html(b.operation)
            );
            for p in &b.parts {
                let share = p.ns / b.total * 100.0;
                let _ =
                    write!(out, "<div class=\"fill\" style=\"width:{share:.1}%;background:{}\"></div>", shade(p.class));
            }
            let _ = writeln!(out, "</div><span>{}</span></div>", duration(b.total));
        }
    }
}

/// The whole page.
pub(super) fn page(r: &Report) -> String {
    let mut out = head("Software and hardware virtualization on this machine");
    let _ = writeln!(out, "<p>{}. {}.</p>", html(&r.cpu), html(&r.kvm));
    let _ = writeln!(
        out,
        "<p class=\"note\">Bivisor {}. Bars are logarithmic, from 1 ns to 10 s; a tenth of the width is a factor of ten. Medians; the \
         spread is the tooltip. Trap-and-emulate gives wrong results and is shown for its cost only.</p>",
        r.version
    );
    if !r.operations.is_empty() {
        out.push_str("<h2>Operations of a ring-0 guest</h2>\n");
        let columns: Vec<&'static str> = BARE.into_iter().chain(ENGINES).collect();
        for row in &r.operations {
            chart(&mut out, row, &columns, 1.0);
        }
    }
    if !r.programs.is_empty() {
        out.push_str("<h2>Programs</h2>\n");
        for row in &r.programs {
            chart(&mut out, row, &PLACES, 1e6);
        }
    }
    if !r.machines.is_empty() {
        out.push_str("<h2>Machines that boot</h2>\n");
        for row in &r.machines {
            chart(&mut out, row, &boot::ENGINES, 1e6);
        }
    }
    if !r.ledger.is_empty() {
        out.push_str("<h2>Why the engines were left</h2>\n<p class=\"note\">For one operation, by reason, with Intel's exit-reason number.</p>\n");
        ledger(&mut out, r);
    }
    if !r.unit_costs.is_empty() {
        out.push_str(
            "<h2>Where the time goes</h2>\n<p class=\"note\">Each bar is all the time of an operation, cut into classes of exits: how often × \
             what one costs. What one costs is fitted to all operations of the engine.</p>\n",
        );
        breakdown(&mut out, r);
    }
    let _ = writeln!(out, "<h2>Reference</h2>\n<p>{}.</p>\n</body></html>", html(r.reference));
    out
}
