//! The `bivisor` command line: parse the arguments, hand over to the subcommand, turn the outcome into an exit status.

mod boot;
mod cli;
mod decode;
mod engine;
mod exec;
mod run;
mod terminal;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let outcome = match cli::Cli::parse().command {
        cli::Command::Boot(args) => boot::run(&args),
        cli::Command::Decode(args) => decode::run(&args),
        cli::Command::Exec(args) => exec::run(&args),
        cli::Command::Run(args) => run::run(&args),
    };
    match outcome {
        // The shell sees eight bits, as wait(2) does.
        Ok(status) => ExitCode::from(status as u8),
        Err(error) => {
            eprintln!("bivisor: {error:#}");
            ExitCode::FAILURE
        }
    }
}
