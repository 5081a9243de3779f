//! The explanation as one HTML file.

use super::Report;
use crate::compare::html::head;
use crate::text::{duration, html};
use std::fmt::Write;

const COLOURS: &str = "<style>.identical{border-left:.3rem solid #30a46c}.rewritten{border-left:.3rem solid #b58900}.call-out,.leaves{border-left:.3rem solid #cf222e}\
.pair{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1.2fr);gap:.6rem;margin:.3rem 0;padding-left:.6rem}.pair pre{margin:0}\
@media(max-width:40rem){.pair{grid-template-columns:minmax(0,1fr)}}</style>\n";

/// The whole page.
pub fn page(r: &Report, what: &str) -> String {
    let mut out = head(&format!("What becomes of {what}"));
    out.push_str(COLOURS);
    out.push_str("<p class=\"note\">Guest code on the left, the translator's on the right. Green: identical. Yellow: rewritten. Red: a call-out to the interpreter.</p>\n");
    for b in &r.blocks {
        let _ = writeln!(
            out,
            "<h2>{}</h2><p class=\"note\">Translated for a {}: {} bytes became {}.</p>",
            html(&b.title),
            b.target,
            b.guest_bytes,
            b.host_bytes
        );
        for l in &b.lines {
            let host: Vec<String> = l.host.iter().map(|h| html(h)).collect();
            let _ = writeln!(
                out,
                "<div class=\"pair {0}\"><pre>{1:x}  {2}\n{3}\n{0}</pre><pre>{4}</pre></div>",
                l.made,
                l.address,
                html(&l.text),
                l.bytes,
                host.join("\n")
            );
        }
        for e in &b.instructions {
            let vtx = e.vtx_reason.map_or("no exit".into(), |n| format!("exit {n}, {}", e.vtx_when));
            let _ = writeln!(
                out,
                "<p><b>{}</b>: {}, {}; at CPL 3: {}; VT-x: {}; interpreter: <code>{}</code></p>",
                html(&e.instruction),
                e.class,
                e.sensitivity,
                e.at_cpl3,
                html(&vtx),
                html(&e.engines.interp_at)
            );
        }
        if !b.cost_ns.is_empty() {
            let all: Vec<String> = b.cost_ns.iter().map(|(e, ns)| format!("{e} {}", duration(*ns))).collect();
            let _ = writeln!(out, "<p>At CPL 0: {}.</p>", all.join(", "));
        }
    }
    out.push_str("</body></html>\n");
    out
}
