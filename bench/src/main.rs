//! `bench`: whole programs native and under each engine, in alternation.

mod programs;

use anyhow::{Context, Result, bail};
use bivisor_bench::{Ratios, plot};
use clap::Parser;
use programs::Program;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Runs small programs natively and under Bivisor's engines in alternation and prints medians of the ratios of user+system time.
///
/// The C programs of bench/programs are compiled with `cc -O2 -static`; others are taken from the machine.
#[derive(Parser)]
#[command(
    after_help = "Example:\n  cargo build --release && cargo run --release -p bivisor-bench -- --runs 5 fib sha256"
)]
struct Args {
    /// Programs; default all.
    programs: Vec<String>,
    /// Engines, and `qemu` (qemu-x86_64) and `valgrind` (`--tool=none`) where they are installed.
    #[arg(long, value_delimiter = ',', default_value = "interp,bt,kvm")]
    backends: Vec<String>,
    /// Counted pairs of runs; one more is run first and not counted.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
    /// Write the ratios as a picture to this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// The bivisor binary; default: beside this program.
    #[arg(long)]
    bivisor: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let here = std::env::current_exe()?;
    let bivisor = args.bivisor.clone().unwrap_or_else(|| here.with_file_name("bivisor"));
    if !bivisor.is_file() {
        bail!("no {}: build it with `cargo build --release`, or give --bivisor", bivisor.display());
    }
    if let Some(p) = args.programs.iter().find(|p| !programs::ALL.iter().any(|known| known.name == **p)) {
        bail!("no program `{p}`: one of {}", programs::ALL.iter().map(|p| p.name).collect::<Vec<_>>().join(", "));
    }
    let build = std::env::temp_dir().join(format!("bivisor-bench-{}", std::process::id()));
    std::fs::create_dir_all(&build)?;
    let outcome = measure(&args, &bivisor, &build);
    std::fs::remove_dir_all(&build)?;
    let rows = outcome?;
    if let Some(file) = &args.svg {
        std::fs::write(file, plot::svg(&rows)).with_context(|| format!("{}", file.display()))?;
    }
    Ok(())
}

fn measure(args: &Args, bivisor: &Path, build: &Path) -> Result<Vec<Ratios>> {
    if !args.json {
        println!(
            "{:<13} {:<8} {:>9}  {:>7} {:>7} {:>7}  runs  target",
            "program", "engine", "native s", "median", "min", "max"
        );
    }
    let mut rows = Vec::new();
    for program in programs::ALL {
        if !args.programs.is_empty() && !args.programs.iter().any(|p| p == program.name) {
            continue;
        }
        for backend in &args.backends {
            let slow = backend != "bt" && (backend != "kvm" || program.system);
            let found = programs::command(program, slow, build)
                .and_then(|command| ratios(args, bivisor, program.name, backend, &command));
            match found {
                Ok(r) => {
                    show(args, program, &r)?;
                    rows.push(r);
                }
                Err(e) => eprintln!("SKIPPED: {} {backend}: {e:#}", program.name),
            }
        }
    }
    Ok(rows)
}

fn show(args: &Args, program: &Program, r: &Ratios) -> Result<()> {
    if args.json {
        println!("{}", serde_json::to_string(r)?);
        return Ok(());
    }
    let target = match program.target.filter(|_| r.backend == "bt") {
        Some(t) => format!("{t:.2}{}", if r.median <= t { "" } else { " missed" }),
        None => String::new(),
    };
    println!(
        "{:<13} {:<8} {:>9.4}  {:>7.2} {:>7.2} {:>7.2}  {:>4}  {target}",
        r.program, r.backend, r.native_seconds, r.median, r.min, r.max, r.runs
    );
    Ok(())
}

/// Runs it natively and under an engine in alternation.
fn ratios(args: &Args, bivisor: &Path, name: &str, backend: &str, command: &[String]) -> Result<Ratios> {
    let bar = indicatif::ProgressBar::new(args.runs as u64 + 1)
        .with_style(indicatif::ProgressStyle::with_template("{msg} {pos}/{len}")?)
        .with_message(format!("{name} {backend}"));
    let mut pairs = Vec::new();
    for round in 0..=args.runs {
        bar.set_position(round as u64);
        let mut native = Command::new(&command[0]);
        let mut engine = match backend {
            "qemu" => Command::new("qemu-x86_64"),
            "valgrind" => Command::new("valgrind"),
            _ => Command::new(bivisor),
        };
        match backend {
            "qemu" => {}
            "valgrind" => {
                engine.args(["--tool=none", "-q"]);
            }
            _ => {
                engine.args(["run", "--backend", backend, "--"]);
            }
        }
        engine.arg(&command[0]);
        for c in [&mut native, &mut engine] {
            c.args(&command[1..]);
        }
        let pair = (cpu_seconds(&mut native)?.max(1e-4), cpu_seconds(&mut engine)?);
        if round > 0 {
            pairs.push(pair);
        }
    }
    bar.finish_and_clear();
    Ok(Ratios::new(name, backend, &pairs))
}

/// User and system time of a command and its waited-for children, from wait4(2).
#[expect(unsafe_code, reason = "std has no resource usage of one child")]
fn cpu_seconds(command: &mut Command) -> Result<f64> {
    command.stdout(Stdio::null()).stderr(Stdio::null()).stdin(Stdio::null());
    let child = command.spawn().with_context(|| format!("{:?}", command.get_program()))?;
    let mut status = 0;
    // SAFETY: plain system call on our own child, with room for its results.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        if libc::wait4(child.id() as i32, &mut status, 0, &mut usage) < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        usage
    };
    if status != 0 {
        bail!("{:?} ended with wait status {status:#x}", command.get_program());
    }
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
    Ok(seconds(usage.ru_utime) + seconds(usage.ru_stime))
}
