//! The classes as text and as Markdown.

use super::{Entry, Report};
use crate::text::{Paint, wrap};
use bivisor_emulator::isa::exits::reason_name;
use std::fmt::Write;

fn vtx(e: &Entry) -> String {
    match (e.vtx_reason, e.vtx_when) {
        (None, _) => "never".into(),
        (Some(n), "always") => format!("{n} always"),
        (Some(n), _) => format!("{n} if"),
    }
}

fn svm(e: &Entry) -> String {
    e.svm.map_or("-".into(), |(code, _)| format!("{code:#x}"))
}

/// May any user execute it, though it is sensitive?
fn is_problem(e: &Entry) -> bool {
    e.sensitivity != "innocuous" && e.at_cpl3 == "runs"
}

/// A table, or a paragraph each if few were asked for.
pub fn text(r: &Report, each: bool) -> String {
    let paint = Paint::auto();
    let mut out = String::new();
    if each {
        for e in &r.instructions {
            out += &paragraph(e, paint);
        }
    } else {
        let columns = |e: [&str; 6]| format!("{:10} {:9} {:32}", e[0], e[1], e[2..].join(" ")).trim_end().to_string();
        let engines = if r.probed { "at CPL 3 here" } else { "interp   bt        kvm" };
        let head = columns(["", "sensitive", "CPL 3 ", "VT-x exit ", "SVM   ", engines]);
        let _ = writeln!(out, "{}", paint.bold(&head));
        for e in &r.instructions {
            let cpl3 = format!("{:6}", e.at_cpl3);
            let cpl3 = if is_problem(e) { paint.bad(&cpl3) } else { paint.good(&cpl3) };
            let last = match &e.measured {
                Some(measured) => measured.clone(),
                None => format!("{:8} {:9} {}", e.engines.interp, e.engines.bt_kernel, e.engines.kvm),
            };
            let (vtx, svm) = (format!("{:10}", vtx(e)), format!("{:6}", svm(e)));
            let _ = writeln!(out, "{}", columns([&e.instruction, e.sensitivity, &cpl3, &vtx, &svm, &last]));
        }
        out += &wrap(
            "",
            "CPL 3: by the manual at IOPL 0; * a bit of CR4 decides (UMIP, TSD, PCE). `if`: a control decides; name the instruction to see which. bt: in a kernel.",
        );
    }
    out.push('\n');
    for v in &r.verdicts {
        out += &wrap("- ", &v.sentence());
        if !each {
            out += &wrap("  ", &v.silent.join(", "));
        }
    }
    out
}

fn paragraph(e: &Entry, paint: Paint) -> String {
    let mut out = format!("{}\n", paint.bold(&e.instruction));
    let sensitive = match e.sensitivity {
        "control" => "control-sensitive: changes the configuration of resources, or the mode",
        "behaviour" => "behaviour-sensitive: its result depends on the mode or shows the configuration",
        _ => "innocuous",
    };
    out += &wrap("  class        ", &format!("{}; {sensitive}", e.class));
    out += &wrap("  who may      ", e.privilege);
    let trap = e.made_to_trap.map_or(String::new(), |m| format!("; can be made to trap: {m}"));
    let silent = if is_problem(e) { paint.bad(" (sensitive, and does not trap)") } else { String::new() };
    out += &wrap("  at CPL 3     ", &format!("{}{trap}{silent}", e.at_cpl3));
    if let Some(m) = &e.measured {
        out += &wrap("  measured     ", m);
    }
    if let Some(name) = e.robin_irvine {
        out += &wrap("  Robin-Irvine ", &format!("{name} is one of their 18"));
    }
    let vtx = match e.vtx_reason {
        None => "does not leave the guest".to_string(),
        Some(n) => format!("exit reason {n} ({}): {}", reason_name(n), e.vtx_when),
    };
    out += &wrap("  VT-x         ", &vtx);
    out += &wrap(
        "  SVM          ",
        &e.svm.map_or("no intercept".into(), |(c, n)| format!("exit code {c:#x}, intercept {n}")),
    );
    out += &wrap("  interp       ", &format!("{}: {}", e.engines.interp, e.engines.interp_at));
    out += &wrap("  bt           ", &format!("in a process: {}; in a kernel: {}", e.engines.bt, e.engines.bt_kernel));
    out += &wrap("  kvm          ", e.engines.kvm);
    out
}

/// The same as Markdown.
pub fn markdown(r: &Report) -> String {
    let mut out = String::from(
        "| instruction | sensitive | who may | at CPL 3 | here | VT-x exit | SVM intercept | interp | bt, process | bt, kernel | kvm |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for e in &r.instructions {
        let vtx = match e.vtx_reason {
            None => "never".to_string(),
            Some(n) => format!("{n} {}: {}", reason_name(n), e.vtx_when),
        };
        let svm = e.svm.map_or("-".into(), |(c, n)| format!("{c:#x} {n}"));
        let here = e.measured.as_deref().unwrap_or("-");
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {here} | {vtx} | {svm} | `{}` | {} | {} | {} |",
            e.instruction,
            e.sensitivity,
            e.privilege,
            e.at_cpl3,
            e.engines.interp_at,
            e.engines.bt,
            e.engines.bt_kernel,
            e.engines.kvm
        );
    }
    out.push('\n');
    for v in &r.verdicts {
        let _ = writeln!(out, "- {} They are {}.", v.sentence(), v.silent.join(", "));
    }
    out
}
