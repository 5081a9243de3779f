//! `bivisor compare`: Adams and Agesen's comparison on the reader's machine: operations and programs, natively and on every engine.

mod boot;
mod breakdown;
pub mod html;
pub mod nano;
mod natively;
mod program;
mod show;

use crate::doctor::host;
use crate::guest::ENGINES;
use anyhow::{Context, Result};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use natively::Way;
use program::PLACES;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Arguments of `bivisor compare`.
#[derive(Args)]
#[command(after_help = "Examples:\n  bivisor compare --html report.html\n  bivisor compare popf cpuid fork --json\n  \
                         bivisor compare --kernel vmlinuz --initrd initramfs.gz kernel")]
pub struct CompareArgs {
    /// Only these operations and programs, by name; without any, all.
    #[arg(value_name = "NAME")]
    only: Vec<String>,
    /// Longer and more often.
    #[arg(long)]
    full: bool,
    /// One JSON object (docs/json.md describes it).
    #[arg(long)]
    json: bool,
    /// Write the report as one HTML file without anything from elsewhere.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Boot this kernel too: bzImage, vmlinux, PVH or multiboot.
    #[arg(long, value_name = "FILE", env = "BIVISOR_KERNEL")]
    kernel: Option<PathBuf>,
    /// Its initial RAM disk.
    #[arg(long, value_name = "FILE", requires = "kernel", env = "BIVISOR_INITRD")]
    initrd: Option<PathBuf>,
    /// Its command line. It must end by itself: by turning the machine off, or by a panic that resets it.
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0 quiet panic=-1")]
    append: String,
    /// What a process can do of the operations, as JSON: for ourselves.
    #[arg(long, hide = true)]
    natively: bool,
}

/// One value.
#[derive(Clone, Debug, Serialize)]
struct Value {
    median: f64,
    /// Smallest and largest.
    spread: [f64; 2],
    /// How many times as long as natively.
    to_native: Option<f64>,
}

/// One row: an operation in nanoseconds, or a program in milliseconds.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    what: &'static str,
    /// By engine or place.
    values: BTreeMap<&'static str, Value>,
    /// Why there is no value.
    failed: BTreeMap<&'static str, String>,
    /// What the native value is of, if it is not the same code.
    natively: Option<&'static str>,
    /// Exit reason of VT-x for the operation, with the usual controls.
    vtx_reason: Option<u16>,
    /// Cycles native, translated, VT-x, in the paper.
    paper: Option<[u32; 3]>,
    /// Who wins, and why.
    sentence: String,
}

/// One line of the ledger: how often an engine was left for one operation.
#[derive(Debug, Serialize)]
struct Entry {
    operation: &'static str,
    engine: &'static str,
    vtx_reason: Option<u16>,
    reason: String,
    times: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    cpu: String,
    kvm: String,
    /// Nanoseconds.
    operations: Vec<Row>,
    /// Milliseconds.
    programs: Vec<Row>,
    /// Milliseconds from the start of the process to its end.
    machines: Vec<Row>,
    ledger: Vec<Entry>,
    /// Where the time of each operation goes.
    breakdown: Vec<breakdown::Breakdown>,
    /// What one exit of a class costs on an engine, nanoseconds.
    unit_costs: breakdown::Units,
    reference: &'static str,
}

const REFERENCE: &str = "Adams and Agesen, A Comparison of Software and Hardware Techniques for x86 Virtualization, ASPLOS 2006: cycles on a \
                         3.8 GHz Pentium 4 672 natively, under VMware Player's binary translator, under first-generation VT-x";

/// An engine, or what KVM is here.
fn called(name: &str) -> String {
    match name {
        "kvm" if !bivisor_kvm_backend::host().usable_for_machine => "kvm (software here)".to_string(),
        name => name.to_string(),
    }
}

/// The engines whose answer is right: trap-and-emulate is not in the competition.
fn winner(values: &BTreeMap<&'static str, Value>, among: &[&'static str], why: &str) -> String {
    let mut order: Vec<(&str, f64)> = among.iter().filter_map(|n| Some((*n, values.get(n)?.median))).collect();
    order.sort_by(|a, b| a.1.total_cmp(&b.1));
    match order[..] {
        [(first, a), (second, b), ..] if a > 0.0 => {
            format!("{} wins, {:.1} times as fast as {}: {why}.", called(first), b / a, called(second))
        }
        [(first, _), ..] => format!("{} wins: {why}.", called(first)),
        [] => format!("Nobody came to the end: {why}."),
    }
}

/// Where there is no engine: the host itself, and namespaces as a container has them.
const BARE: [&str; 2] = ["native", "container"];

fn operations(args: &CompareArgs, report: &mut Report, bar: &ProgressBar) {
    let (samples, least) = if args.full { (11, Duration::from_millis(30)) } else { (5, Duration::from_millis(8)) };
    let bare = BARE.map(|place| {
        bar.set_message(format!("operations on {place}"));
        (place, natively::measure(place == "container", &args.only, args.full).map_err(|e| format!("{e:#}")))
    });
    let empty: BTreeMap<&str, f64> = ENGINES
        .iter()
        .filter_map(|e| {
            let cost = nano::Bench::new(e, None).and_then(|mut b| b.measure(samples, least)).ok()?;
            Some((*e, cost.median))
        })
        .collect();
    for n in nano::all().iter().filter(|n| wanted(args, n.name)) {
        let mut row = row(n.name, n.what);
        (row.vtx_reason, row.paper) = (n.vtx, n.paper);
        if let Way::Instead(what) = n.native {
            row.natively = Some(what.words());
        }
        for (place, measured) in &bare {
            match measured {
                Ok(all) => match all.get(n.name) {
                    Some(Ok(v)) => {
                        let [median, low, high] = v.ns;
                        let native = row.values.get("native").map_or(median, |v: &Value| v.median);
                        let to_native = (native > 0.0).then(|| median / native);
                        row.values.insert(place, Value { median, spread: [low, high], to_native });
                    }
                    Some(Err(why)) => drop(row.failed.insert(place, why.clone())),
                    None => drop(row.failed.insert(place, "not measured".into())),
                },
                Err(why) => drop(row.failed.insert(place, why.clone())),
            }
        }
        let own = row.values.get("native").map(|v| v.median);
        for engine in ENGINES {
            bar.set_message(format!("{} on {engine}", n.name));
            match nano::Bench::new(engine, Some(n)).and_then(|mut b| b.measure(samples, least)) {
                Ok(cost) => {
                    let loop_ = empty.get(engine).copied().unwrap_or(0.0);
                    let less = |v: f64| (v - loop_).max(0.0) / f64::from(n.copies);
                    let median = less(cost.median);
                    let to_native = own.filter(|o| *o > 0.0).map(|o| median / o);
                    let value = Value { median, spread: cost.spread.map(less), to_native };
                    row.values.insert(engine, value);
                    report.ledger.extend(cost.ledger.into_iter().map(|((vtx_reason, reason), times)| Entry {
                        operation: n.name,
                        engine,
                        vtx_reason,
                        reason,
                        times,
                    }));
                }
                Err(why) => {
                    let software = engine == "kvm" && !bivisor_kvm_backend::host().usable_for_machine;
                    let because = match n.name {
                        "syscall" if software => {
                            "a software KVM enters the guest's kernel at CPL 3, where SYSRET is #GP: "
                        }
                        _ => "",
                    };
                    row.failed.insert(engine, format!("{because}{why:#}"));
                }
            }
            bar.inc(1);
        }
        row.sentence = winner(&row.values, &["interp", "bt", "kvm"], n.why);
        report.operations.push(row);
    }
}

/// A row without values.
fn row(name: &'static str, what: &'static str) -> Row {
    Row {
        name,
        what,
        values: BTreeMap::new(),
        failed: BTreeMap::new(),
        natively: None,
        vtx_reason: None,
        paper: None,
        sentence: String::new(),
    }
}

/// One cell: the median of several runs, each in milliseconds.
fn fill(row: &mut Row, place: &'static str, samples: usize, mut time: impl FnMut() -> Result<f64>) {
    let mut seen = Vec::new();
    for _ in 0..samples {
        match time() {
            Ok(ms) => seen.push(ms),
            Err(why) => {
                row.failed.insert(place, format!("{why:#}"));
                break;
            }
        }
        // What takes long has little noise.
        if seen.last().is_some_and(|ms| *ms > 1000.0) {
            break;
        }
    }
    seen.sort_by(f64::total_cmp);
    if let (Some(first), Some(last)) = (seen.first(), seen.last()) {
        let median = seen[seen.len() / 2];
        let native = if place == "native" { Some(median) } else { row.values.get("native").map(|v| v.median) };
        let to_native = native.map(|n| median / n);
        row.values.insert(place, Value { median, spread: [*first, *last], to_native });
    }
}

fn programs(args: &CompareArgs, report: &mut Report, bar: &ProgressBar) -> Result<()> {
    let (samples, factor, limit) = if args.full { (5, 8, 60) } else { (3, 1, 4) };
    let file = program::File::new(factor).context("a file to work on")?;
    for p in program::ALL.iter().filter(|p| wanted(args, p.name)) {
        let mut row = row(p.name, p.what);
        for place in PLACES {
            bar.set_message(format!("{} on {place}", p.name));
            fill(&mut row, place, samples, || program::time(p, place, &file, factor, Duration::from_secs(limit)));
            bar.inc(1);
        }
        row.sentence = winner(&row.values, &["container", "bt", "kvm", "interp"], p.why);
        report.programs.push(row);
    }
    Ok(())
}

fn machines(args: &CompareArgs, report: &mut Report, bar: &ProgressBar) -> Result<()> {
    let small = wanted(args, boot::SMALL).then(boot::small).transpose().context("a kernel to boot")?;
    let kernel = args.kernel.as_ref().map(|k| boot::kernel(k, args.initrd.as_deref(), &args.append));
    for m in small.iter().chain(kernel.iter().filter(|_| wanted(args, boot::KERNEL))) {
        // A whole kernel is booted once.
        let (samples, limit) = match (m.name, args.full) {
            (boot::KERNEL, full) => (1, if full { 300 } else { 20 }),
            (_, full) => (if full { 5 } else { 3 }, 20),
        };
        let mut row = row(m.name, m.what);
        for engine in boot::ENGINES {
            bar.set_message(format!("{} on {engine}", m.name));
            fill(&mut row, engine, samples, || boot::time(m, engine, Duration::from_secs(limit)));
            bar.inc(1);
        }
        row.sentence = winner(&row.values, &boot::ENGINES, m.why);
        report.machines.push(row);
    }
    Ok(())
}

fn wanted(args: &CompareArgs, name: &str) -> bool {
    args.only.is_empty() || args.only.iter().any(|o| o == name)
}

/// Measures, prints, writes.
pub fn run(args: &CompareArgs) -> Result<i32> {
    let operations_all: Vec<&'static str> = nano::all().iter().map(|n| n.name).collect();
    let names = operations_all.iter().copied().chain(program::ALL.iter().map(|p| p.name));
    let names: Vec<&str> = names.chain([boot::SMALL, boot::KERNEL]).collect();
    if let Some(name) = args.only.iter().find(|o| !names.contains(&o.as_str())) {
        eprintln!("bivisor: there is nothing to compare called `{name}`: give some of {}", names.join(", "));
        return Ok(2);
    }
    if args.kernel.is_none() && args.only.iter().any(|o| o == boot::KERNEL) {
        eprintln!(
            "bivisor: `{}` is the kernel that --kernel FILE (or BIVISOR_KERNEL) names, and none is named",
            boot::KERNEL
        );
        return Ok(2);
    }
    for file in [&args.kernel, &args.initrd].into_iter().flatten() {
        std::fs::File::open(file).with_context(|| format!("{}", file.display()))?;
    }
    // What takes a minute is not lost because of a wrong path.
    if let Some(path) = &args.html {
        std::fs::write(path, "").with_context(|| format!("{}", path.display()))?;
    }
    if args.natively {
        let operations = nano::all().into_iter().filter(|n| wanted(args, n.name));
        let ways: Vec<_> = operations.map(|n| (n.name, n.native)).collect();
        return natively::run(&ways, if args.full { 11 } else { 5 });
    }
    let kvm = bivisor_kvm_backend::host();
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        cpu: host::cpu().model,
        kvm: kvm.reason.clone(),
        operations: Vec::new(),
        programs: Vec::new(),
        machines: Vec::new(),
        ledger: Vec::new(),
        breakdown: Vec::new(),
        unit_costs: breakdown::Units::new(),
        reference: REFERENCE,
    };
    let count = |all: &[&str], n: usize| all.iter().filter(|x| wanted(args, x)).count() * n;
    let programs_all = program::ALL.map(|p| p.name);
    let booted: &[&str] = if args.kernel.is_some() { &[boot::SMALL, boot::KERNEL] } else { &[boot::SMALL] };
    let steps =
        count(&operations_all, ENGINES.len()) + count(&programs_all, PLACES.len()) + count(booted, boot::ENGINES.len());
    // Drawn on a terminal only.
    let bar = ProgressBar::new(steps as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").expect("a template"));
    operations(args, &mut report, &bar);
    programs(args, &mut report, &bar)?;
    machines(args, &mut report, &bar)?;
    (report.breakdown, report.unit_costs) = breakdown::all(&report.operations, &report.ledger, &ENGINES);
    bar.finish_and_clear();
    if let Some(path) = &args.html {
        std::fs::write(path, html::page(&report)).with_context(|| format!("{}", path.display()))?;
    }
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", show::text(&report));
        if let Some(path) = &args.html {
            println!("\nThe report: {}", path.display());
        }
    }
    Ok(0)
}
