//! The report as text.

use super::Report;
use super::eighteen::{Seen, Verdict};
use crate::text::{Paint, duration, wrap};
use std::fmt::Write;

fn coloured(paint: Paint, seen: Option<&Seen>, width: usize) -> String {
    let Some(seen) = seen else { return paint.dim(&format!("{:width$}", "-")) };
    let text = format!("{:width$}", seen.verdict.words());
    match seen.verdict {
        Verdict::Right | Verdict::Traps => paint.good(&text),
        Verdict::Dummy | Verdict::NotEmulated => paint.odd(&text),
        Verdict::Leaks | Verdict::Ignored | Verdict::WrongException => paint.bad(&text),
    }
}

/// Lines of at most 80 columns.
pub fn text(r: &Report) -> String {
    let paint = Paint::auto();
    let mut out = String::new();
    let heading = |out: &mut String, text: &str| {
        let _ = writeln!(out, "\n{}", paint.bold(text));
    };
    let _ = writeln!(out, "{}", paint.bold("Processor"));
    out += &wrap("  model           ", &r.cpu.model);
    let has = match r.cpu.virtualization {
        "none" => "neither VT-x nor AMD-V".to_string(),
        name => name.to_uppercase(),
    };
    let below = r.cpu.hypervisor.as_ref().map_or(String::new(), |h| format!("; a hypervisor runs below: {h}"));
    out += &wrap("  virtualization  ", &format!("{has}{below}"));
    out += &wrap("  UMIP            ", if r.cpu.umip { "yes: SGDT SIDT SLDT SMSW STR trap at CPL 3" } else { "no" });
    out += &wrap("  features        ", &r.cpu.features.join(" "));
    heading(&mut out, "/dev/kvm");
    out += &wrap("  kind            ", &format!("{}{}", r.kvm.kind, if r.kvm.nested { ", nested" } else { "" }));
    out += &wrap("  verdict         ", &r.kvm.reason);
    for e in &r.kvm.evidence {
        out += &wrap("  - ", e);
    }
    heading(&mut out, "What `auto` takes");
    out += &wrap("  a process       ", &r.process.why);
    out += &wrap("  a machine       ", &r.machine.why);
    heading(&mut out, "Robin and Irvine's 18 at CPL 3 (natively, and in a KVM guest)");
    for t in &r.eighteen {
        let _ = write!(
            out,
            "  {:9}{} {}",
            t.instruction,
            coloured(paint, t.native.as_ref(), 12),
            coloured(paint, t.kvm.as_ref(), 12)
        );
        let detail = t.kvm.as_ref().or(t.native.as_ref()).map_or("", |s| s.what.as_str());
        let _ = writeln!(out, " {}", paint.dim(&detail.chars().take(43).collect::<String>()));
    }
    out += &wrap(
        "  ",
        "traps: a monitor can step in. leaks: shows the host. ignored: nothing happens. right: the guest's own. UMIP: dummy: it \
         traps, and the host's kernel invents a value. A monitor is possible by trap-and-emulate alone only if all 18 trap.",
    );
    if !r.kernel_code.is_empty() {
        heading(&mut out, "Kernel code at CPL 0 in a KVM guest");
        for k in &r.kernel_code {
            let word = format!("{:11}", k.outcome);
            let word = if k.outcome == "runs" { paint.good(&word) } else { paint.odd(&word) };
            let _ = writeln!(out, "  {:17}{word} {}", k.code, k.detail);
        }
    }
    heading(&mut out, "Costs (the best of several)");
    let c = &r.costs_ns;
    for (name, cost) in [
        ("system call", c.syscall),
        ("page fault", c.page_fault),
        ("CPUID", c.cpuid),
        ("RDTSC", c.rdtsc),
        ("trap to another process", c.trap),
        ("KVM: exit and back", c.kvm_exit),
        ("KVM: CPUID", c.kvm_cpuid),
        ("KVM: RDTSC", c.kvm_rdtsc),
        ("KVM: INC at CPL 3", c.kvm_cpl3),
        ("KVM: INC at CPL 0", c.kvm_cpl0),
    ] {
        let _ = writeln!(out, "  {name:25}{:>10}", cost.map_or("-".into(), duration));
    }
    heading(&mut out, "What to change for a better engine");
    for a in &r.advice {
        out += &wrap("  - ", a);
    }
    for m in &r.missing {
        out += &wrap("  - not looked at: ", m);
    }
    out
}
