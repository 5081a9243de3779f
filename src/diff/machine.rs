//! `bivisor diff boot`: two machines, on interpreter and translator, in lockstep.

use crate::boot::{self, BootArgs};
use crate::text::Paint;
use anyhow::{Result, anyhow};
use bivisor_testsuite::lockstep::machine::{self, Outcome, Plan};
use clap::Args;
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

/// Arguments of `bivisor diff boot`.
#[derive(Args)]
#[command(
    after_help = "Example:\n  bivisor diff boot --kernel vmlinuz --initrd initrd.img --append console=ttyS0 --insns 50000000\n\n\
    Exit status: 0 if both do the same, 1 if they part."
)]
pub struct MachineArgs {
    #[command(flatten)]
    boot: BootArgs,
    /// How many instructions.
    #[arg(long, value_name = "N", default_value_t = 50_000_000)]
    insns: u64,
    /// Compare after so many instructions, at the most; the clock moves after 20000 or less.
    #[arg(long, value_name = "K", default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..))]
    every: u64,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs them; 1 if they part.
pub fn run(args: MachineArgs) -> Result<i32> {
    let plan = Plan { instructions: args.insns, every: args.every };
    let mut pair = boot::pair(args.boot)?;
    let mut make = || pair().map_err(|e| format!("{e:#}"));
    let bar = ProgressBar::new(args.insns);
    let style = "{bar:40} {percent}% {pos} instructions, {eta} left";
    bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
    let outcome = machine::run(&mut make, plan, &mut |n| bar.set_position(n)).map_err(|e| anyhow!(e))?;
    bar.finish_and_clear();
    if args.json {
        println!("{}", as_json(&outcome));
    } else {
        show(&outcome);
    }
    Ok(i32::from(outcome.parting.is_some()))
}

fn instruction(o: &Outcome) -> Option<String> {
    let p = o.parting.as_ref().filter(|p| !p.code.is_empty())?;
    let insn = Decoder::with_ip(p.before.mode().bitness(), &p.code, p.before.rip, DecoderOptions::NONE).decode();
    let mut text = String::new();
    IntelFormatter::new().format(&insn, &mut text);
    Some(text)
}

fn as_json(o: &Outcome) -> serde_json::Value {
    let parting = o.parting.as_ref().map(|p| {
        let changes: Vec<_> =
            p.changes.iter().map(|c| json!({ "what": c.what, "interp": c.reference, "bt": c.tested })).collect();
        json!({ "after": p.after, "within": p.within, "rip": format!("{:#x}", p.before.rip), "text": instruction(o),
            "mode": format!("{:?}", p.before.mode()), "cpl": p.before.cpl(), "differs": changes })
    });
    json!({ "engines": ["interp", "bt"], "instructions": o.instructions, "comparisons": o.comparisons,
        "ended": o.ended.map(|e| format!("{e:?}")), "parting": parting })
}

fn show(o: &Outcome) {
    let paint = Paint::auto();
    let ended = o.ended.map_or(String::new(), |e| format!("; both ended: {e:?}"));
    println!("{} instructions on interp and bt, compared {} times{ended}", o.instructions, o.comparisons);
    let Some(p) = &o.parting else { return };
    let text = instruction(o).unwrap_or_default();
    println!(
        "they part after {} instructions, within {}, from {:#x} on ({:?}, CPL {}):",
        p.after,
        p.within,
        p.before.rip,
        p.before.mode(),
        p.before.cpl()
    );
    println!("  {}", paint.bold(&text));
    let width =
        |f: fn(&machine::Change) -> &String| p.changes.iter().map(|c| f(c).len()).max().unwrap_or(0).clamp(6, 80);
    let (a, b) = (width(|c| &c.what), width(|c| &c.reference));
    println!("  {:a$}  {:b$}  bt", "", "interp");
    for c in &p.changes {
        println!("  {:a$}  {}  {}", c.what, paint.good(&format!("{:b$}", c.reference)), paint.bad(&c.tested));
    }
}
