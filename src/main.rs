//! The `bivisor` command line: parse the arguments, hand over to the subcommand, turn the outcome into an exit status.

#[macro_use]
mod output;

mod assemble;
mod beside;
mod boot;
mod classify;
mod cli;
mod compare;
mod decode;
mod demo;
mod diff;
mod display;
mod doctor;
mod drive;
mod ending;
mod engine;
mod exec;
mod explain;
mod forms;
mod guest;
mod image;
mod kept;
mod keyboard;
mod machine_stats;
mod native;
mod net;
mod pty;
mod run;
mod stats;
mod terminal;
mod text;
mod trap;
mod vessel;

use std::process::ExitCode;

fn main() -> ExitCode {
    let outcome = match cli::command() {
        cli::Command::Boot(args) => boot::run(&args),
        cli::Command::Classify(args) => classify::run(&args),
        cli::Command::Compare(args) => compare::run(&args),
        cli::Command::Decode(args) => decode::run(&args),
        cli::Command::Demo(args) => demo::run(&args),
        cli::Command::Doctor(args) => doctor::run(&args),
        cli::Command::Diff(args) => diff::run(args),
        cli::Command::Exec(args) => exec::run(&args),
        cli::Command::Explain(args) => explain::run(&args),
        cli::Command::Run(args) => run::run(&args),
    };
    // The shell sees eight bits, as wait(2) does.
    ExitCode::from(outcome.unwrap_or_else(|why| output::status(&why)) as u8)
}
