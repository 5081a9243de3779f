//! `bivisor explain`: one instruction or one block: class, who carries it out where, and the host code that the translator makes.

mod cost;
mod html;
mod input;
mod show;

use crate::classify::{self, Entry};
use anyhow::{Context, Result};
use bivisor_emulator::isa::{Insn, Sensitivity, decode};
use bivisor_emulator::vcpu::How;
use bivisor_translator::explain::{Explained, HOST, Target, explain};
use clap::{Args, ValueEnum};
use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Arguments of `bivisor explain`.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  bivisor explain popf\n  bivisor explain 'mov cr8, rax'\n  bivisor explain 'add rax, [rbx]; cpuid; ret'\n  bivisor explain '9d 48 01 c8 c3'\n  bivisor explain /bin/true\n  \
    bivisor explain ./program@main --html page.html"
)]
pub struct ExplainArgs {
    /// An instruction's name (all its forms), instructions with operands, bytes in hexadecimal, or FILE, FILE@0xADDRESS, FILE@SYMBOL.
    #[arg(value_name = "INSN|HEX|FILE[@ADDR]")]
    what: String,
    /// Translated for a Linux process or for a kernel; by itself: for a kernel if something in it is sensitive.
    #[arg(long = "for", value_enum, value_name = "WHOM")]
    whom: Option<Whom>,
    /// Leave out what it costs.
    #[arg(long)]
    no_cost: bool,
    /// One JSON object (docs/json.md describes it).
    #[arg(long)]
    json: bool,
    /// Write a page without anything from elsewhere.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Whom {
    /// A Linux process: memory is the host's.
    Process,
    /// A machine at CPL 0: memory is behind page tables.
    Kernel,
}

/// One guest instruction.
#[derive(Debug, Serialize)]
struct Line {
    address: u64,
    bytes: String,
    text: String,
    /// Its name in the classes.
    name: String,
    /// "identical", "rewritten", "call-out", "leaves".
    made: &'static str,
    /// The translator's way of lowering, and where.
    way: String,
    place: String,
    /// The host's instructions.
    host: Vec<String>,
}

/// One block.
#[derive(Debug, Serialize)]
struct Block {
    title: String,
    target: &'static str,
    lines: Vec<Line>,
    /// Stubs and cold code behind it: bytes.
    rest: usize,
    /// Where it is left to, and whether the jump is patched when the target is translated.
    exits: Vec<(String, bool)>,
    guest_bytes: usize,
    host_bytes: usize,
    /// The facts of its different instructions.
    instructions: Vec<Entry>,
    /// Nanoseconds by engine, if it is one instruction that fits a loop.
    cost_ns: BTreeMap<&'static str, f64>,
}

#[derive(Debug, Serialize)]
struct Report {
    blocks: Vec<Block>,
}

fn text_of(iced: &Instruction) -> String {
    let mut out = String::new();
    IntelFormatter::new().format(iced, &mut out);
    out
}

/// Slots of the thread block, which translated code reaches through GS, and everything else as it is.
fn host_lines(code: &[u8], at: u64) -> Vec<String> {
    Decoder::with_ip(64, code, at, DecoderOptions::NONE).iter().map(|i| text_of(&i)).collect()
}

fn made(how: How) -> &'static str {
    match how {
        How::Copied => "identical",
        How::ByInterpreter => "call-out",
        How::Exits => "leaves",
        _ => "rewritten",
    }
}

fn block(subject: &input::Subject, args: &ExplainArgs) -> Result<Block> {
    let first = decode(&subject.bytes, 64).map_err(|_| anyhow::anyhow!("{}: no valid instruction", subject.title))?;
    let kernel = match args.whom {
        Some(whom) => whom == Whom::Kernel,
        None => instructions(&subject.bytes).iter().any(|i| i.facts.sensitivity != Sensitivity::Innocuous),
    };
    let target = if kernel { Target::Kernel } else { Target::Process };
    let made_of: Explained =
        explain(&subject.bytes, subject.start, target).context("the translator leaves it to the interpreter")?;
    let mut lines = Vec::new();
    let mut entries: Vec<Entry> = Vec::new();
    for p in &made_of.pieces {
        let address = made_of.start + p.guest.start as u64;
        let bytes = &made_of.bytes[p.guest.clone()];
        let iced = Decoder::with_ip(64, bytes, address, DecoderOptions::NONE).decode();
        if !entries.iter().any(|e| e.codes.contains(&iced.code())) {
            entries.push(classify::entry(iced.code()));
        }
        lines.push(Line {
            address,
            bytes: bytes.iter().map(|b| format!("{b:02x}")).collect(),
            text: text_of(&iced),
            name: classify::theorem::name(iced.code()),
            made: made(p.how),
            way: p.way.clone(),
            place: format!("{}: {}", p.place.0, p.place.1),
            host: host_lines(&made_of.code[p.host.clone()], HOST + p.host.start as u64),
        });
    }
    let alone = lines.len() == 1 && !args.no_cost;
    let cost_ns = if alone { cost::measure(&first, &subject.bytes[..usize::from(first.len)]) } else { BTreeMap::new() };
    Ok(Block {
        title: subject.title.clone(),
        target: if kernel { "kernel" } else { "process" },
        lines,
        rest: made_of.rest.len(),
        exits: made_of.exits,
        guest_bytes: made_of.bytes.len(),
        host_bytes: made_of.code.len(),
        instructions: entries,
        cost_ns,
    })
}

/// The instructions up to the first transfer of control.
fn instructions(bytes: &[u8]) -> Vec<Insn> {
    let mut out = Vec::new();
    let mut at = 0;
    while let Some(Ok(insn)) = bytes.get(at..).filter(|b| !b.is_empty()).map(|b| decode(b, 64)) {
        at += usize::from(insn.len);
        out.push(insn);
        if insn.iced.flow_control() != iced_x86::FlowControl::Next {
            break;
        }
    }
    out
}

/// Explains and prints.
pub fn run(args: &ExplainArgs) -> Result<i32> {
    let subjects = match input::subjects(&args.what) {
        Ok(subjects) => subjects,
        Err(why) => {
            eprintln!("bivisor: {why:#}");
            return Ok(2);
        }
    };
    let blocks = subjects.iter().map(|s| block(s, args)).collect::<Result<Vec<_>>>()?;
    let report = Report { blocks };
    if let Some(path) = &args.html {
        std::fs::write(path, html::page(&report, &args.what)).with_context(|| format!("{}", path.display()))?;
    }
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", show::text(&report));
    }
    Ok(0)
}
