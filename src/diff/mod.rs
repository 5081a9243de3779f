//! `bivisor diff`: engines against each other and against the host CPU.

mod all;
mod machine;
mod merge;
mod program;
mod replay;

use anyhow::{Result, bail};
use bivisor_testsuite::campaign::matrix;
use clap::{Args, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;

/// Arguments of `bivisor diff`.
#[derive(Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  bivisor diff --all --cases 1000000 --seed 7\n  \
        bivisor diff --all --cases 100000000 --shard 3/16 --state shard3.json --json > shard3.result\n  \
        bivisor diff merge shard*.result\n  \
        bivisor diff --grain insn /bin/ls -l\n  \
        bivisor diff replay bivisor-repro-*.json\n\n\
        Exit status: 0 if nothing unexpected differs, 1 if something does."
)]
pub struct DiffArgs {
    #[command(subcommand)]
    command: Option<Sub>,
    /// Print the results of the campaign that is on record, by instruction.
    #[arg(long, conflicts_with = "all")]
    matrix: bool,
    /// As one HTML file.
    #[arg(long, requires = "matrix")]
    html: bool,
    #[command(flatten)]
    all: AllArgs,
    /// When the two engines that a program runs on are compared: after each block, or after each instruction.
    #[arg(long, value_name = "GRAIN", default_value = "block", value_parser = ["block", "insn"])]
    grain: String,
    /// A Linux program with its arguments: on two engines (--engines, default interp,bt) in lockstep. What differs is cut down to one
    /// instruction if it can be, and written to a file (--repro, default: the current directory).
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "PROGRAM", conflicts_with_all = ["all", "matrix"])]
    program: Vec<OsString>,
}

#[derive(Subcommand)]
enum Sub {
    /// Two machines, on interpreter and translator, with counted time: the words are those of `bivisor boot`.
    Boot(Box<machine::MachineArgs>),
    /// Run requests of `bivisor exec`, such as repros, on two engines, and show where the answers differ.
    Replay {
        /// The engine beside the interpreter.
        #[arg(long, value_name = "ENGINE", default_value = "bt", value_parser = ["bt", "kvm"])]
        engine: String,
        /// One JSON object a file.
        #[arg(long)]
        json: bool,
        /// The files.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Join results of shards (files that --json wrote).
    Merge {
        /// One JSON object.
        #[arg(long)]
        json: bool,
        /// The lines of testsuite/fidelity.txt, or of fidelity-modes.txt or fidelity-system.txt if the results are of 16- and 32-bit code, from which
        /// docs/fidelity.md is made; REVISION is what was run.
        #[arg(long, conflicts_with = "json", value_name = "REVISION")]
        summary: Option<String>,
        /// The files.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
}

/// Arguments of the campaign.
#[derive(Args, Clone)]
struct AllArgs {
    /// Every instruction of the host with random states on every engine: the campaign.
    #[arg(long)]
    all: bool,
    /// About how many cases, of all shards together.
    #[arg(long, value_name = "N", default_value = "1000000", value_parser = number)]
    cases: u64,
    /// The same seed gives the same cases.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Only this part of the cases: 0/4 to 3/4 together are all.
    #[arg(long, value_name = "I/N", default_value = "0/1", value_parser = shard)]
    shard: (u64, u64),
    /// Stop after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    time: Option<f64>,
    /// Which: interp, bt, kvm, interp-paged, bt-paged, and host, the judge.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "interp,bt,host")]
    engines: Vec<String>,
    /// What kinds of cases: insn (one instruction), block (several, with branches and loops), bytes and cpl0 (any bytes at CPL 3,
    /// sequences of a kernel at CPL 0: interpreter against translator, and kvm if it is hardware), insn32, insn16, block32 and block16 (32- and 16-bit user code
    /// behind page tables), cpl0-32, cpl0-16, real16 and v86 (one instruction of such code at CPL 0, in real and virtual-8086 mode).
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "insn,block")]
    kinds: Vec<String>,
    /// Worker processes; 0: one a CPU.
    #[arg(long, value_name = "N", default_value_t = 0)]
    jobs: usize,
    /// Keep the state in this file, and go on from it.
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Write each example of a divergence into this directory: a request for `bivisor exec` and both results.
    #[arg(long, value_name = "DIR")]
    repro: Option<PathBuf>,
    /// One JSON object with all results.
    #[arg(long)]
    json: bool,
    #[arg(long, hide = true, value_parser = shard)]
    worker: Option<(u64, u64)>,
}

fn number(s: &str) -> Result<u64, String> {
    s.replace('_', "").parse().map_err(|_| "a number".to_string())
}

/// `i/n` with i below n. A worker's step may be less than where it begins.
fn shard(s: &str) -> Result<(u64, u64), String> {
    let pair = s.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    pair.filter(|&(_, n): &(u64, u64)| n > 0).ok_or("i/n, as in 0/4".into())
}

/// Runs it; 1 if something unexpected differs.
pub fn run(args: DiffArgs) -> Result<i32> {
    match args.command {
        Some(Sub::Boot(machine)) => machine::run(*machine),
        Some(Sub::Merge { json, summary, files }) => merge::run(&files, json, summary.as_deref()),
        None if args.matrix => {
            print!("{}", if args.html { matrix::html() } else { matrix::page() });
            Ok(0)
        }
        Some(Sub::Replay { engine, json, files }) => replay::run(&files, &engine, json),
        None if args.all.all => all::run(&args.all),
        None if !args.program.is_empty() => {
            // The campaign's judge is no engine of a program.
            let engines: Vec<String> = args.all.engines.iter().filter(|e| *e != "host").cloned().collect();
            program::run(&program::ProgramArgs {
                engines: &engines,
                grain: &args.grain,
                repro: args.all.repro.as_deref(),
                json: args.all.json,
                command: &args.program,
            })
        }
        None => bail!("nothing to do: give --all, --matrix, PROGRAM, replay FILE... or merge FILE..."),
    }
}
