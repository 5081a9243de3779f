//! The arguments: one subcommand a file, its arguments beside its code.

use crate::run::RunArgs;
use clap::{Args, FromArgMatches, Parser, Subcommand};
use std::ffi::OsString;

/// An x86 virtual machine with three engines: interpreter, binary translator, KVM.
#[derive(Parser)]
#[command(version, arg_required_else_help = true, max_term_width = 100)]
#[command(
    after_help = "Examples:\n  bivisor run ls -l /\n  bivisor boot --kernel vmlinuz --initrd initrd.img --append console=ttyS0\n  \
                        bivisor doctor\n\n`bivisor COMMAND --help` has the options and more examples."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Subcommand)]
pub enum Command {
    /// Run a Linux program.
    Run(RunArgs),
    /// Run a machine: a kernel or a boot image.
    Boot(crate::boot::BootArgs),
    /// Tell where instructions end and whether they are valid.
    Decode(crate::decode::DecodeArgs),
    /// Run raw code from a given state: one JSON object a line in, one out.
    Exec(crate::exec::ExecArgs),
    /// Tell what this host offers for virtualization, with the evidence, and what to change.
    Doctor(crate::doctor::DoctorArgs),
    /// Classify instructions as Popek and Goldberg did, and say whether x86 is virtualizable.
    Classify(crate::classify::ClassifyArgs),
    /// See what becomes of an instruction or a block: its class, its functions, its host code.
    Explain(crate::explain::ExplainArgs),
    /// Measure operations and programs natively and on every engine, as Adams and Agesen did.
    Compare(crate::compare::CompareArgs),
    /// See trap-and-emulate fail where the three engines do not.
    Demo(crate::demo::DemoArgs),
    /// Compare engines with each other and with the host CPU.
    Diff(crate::diff::DiffArgs),
}

/// What the arguments of this process ask for; ends the process with a message if they are wrong.
pub fn command() -> Command {
    let words: Vec<OsString> = std::env::args_os().collect();
    run(&words).unwrap_or_else(|| Cli::parse_from(words).command)
}

/// `run` as it is usually written, for which the options of all the other subcommands need not be put together, a quarter of a
/// millisecond. Whatever is to be said to a user is said by the whole parser.
fn run(words: &[OsString]) -> Option<Command> {
    let (_, options) = words.split_first()?.1.split_first().filter(|(name, _)| *name == "run")?;
    let parser = RunArgs::augment_args(clap::Command::new("run").no_binary_name(true));
    let found = parser.try_get_matches_from(options).ok()?;
    RunArgs::from_arg_matches(&found).ok().map(Command::Run)
}
