//! `bench`: whole programs native and under each engine, in alternation.

use anyhow::{Context, Result, bail};
use bivisor_bench::Ratios;
use clap::Parser;
use std::io::IsTerminal;
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
    /// Engines, and `qemu` for qemu-x86_64 where it is installed.
    #[arg(long, value_delimiter = ',', default_value = "interp,bt,kvm")]
    backends: Vec<String>,
    /// Counted pairs of runs; one more is run first and not counted.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
    /// The bivisor binary; default: beside this program.
    #[arg(long)]
    bivisor: Option<PathBuf>,
}

/// Name, arguments for a native run of about half a second, arguments where the interpreter needs about as long.
#[rustfmt::skip]
const COMPILED: &[(&str, &str, &str)] = &[
    ("core",    "20000",     "400"),
    ("sha256",  "50",        "1"),
    ("matrix",  "150",       "3"),
    ("fib",     "41",        "30"),
    ("goto",    "600000000", "10000000"),
    ("memory",  "4000000",   "400000"),
    ("getppid", "2000000",   "100000"),
];

/// Name and command of programs that the machine may have.
#[rustfmt::skip]
const INSTALLED: &[(&str, &[&str])] = &[
    ("true",   &["true"]),
    ("bzip2",  &["sh", "-c", "seq 400000 | bzip2 -9 | cksum"]),
    ("python", &["python3", "-c", "d={}\nfor i in range(400000): d[i%1000]=d.get(i%1000,0)+i*i\nprint(sum(d.values()))"]),
    ("sqlite", &["sqlite3", ":memory:", "with recursive n(i) as (select 1 union all select i+1 from n where i<300000) select sum(i*i%7), count(distinct i%1000) from n;"]),
    ("forkexec", &["sh", "-c", "i=0; while [ $i -lt 200 ]; do /bin/true; i=$((i+1)); done"]),
];

fn main() -> Result<()> {
    let args = Args::parse();
    let here = std::env::current_exe()?;
    let bivisor = args.bivisor.clone().unwrap_or_else(|| here.with_file_name("bivisor"));
    if !bivisor.is_file() {
        bail!("no {}: build it with `cargo build --release`, or give --bivisor", bivisor.display());
    }
    let build = std::env::temp_dir().join(format!("bivisor-bench-{}", std::process::id()));
    std::fs::create_dir_all(&build)?;
    let outcome = measure(&args, &bivisor, &build);
    std::fs::remove_dir_all(&build)?;
    outcome
}

fn measure(args: &Args, bivisor: &Path, build: &Path) -> Result<()> {
    let wanted = |name: &str| args.programs.is_empty() || args.programs.iter().any(|p| p == name);
    if let Some(p) =
        args.programs.iter().find(|p| !COMPILED.iter().any(|c| c.0 == **p) && !INSTALLED.iter().any(|i| i.0 == **p))
    {
        bail!("no program `{p}`: one of {}", names().collect::<Vec<_>>().join(", "));
    }
    if !args.json {
        println!(
            "{:<10} {:<8} {:>9}  {:>7} {:>7} {:>7}  runs",
            "program", "engine", "native s", "median", "min", "max"
        );
    }
    for (name, large, small) in COMPILED.iter().filter(|p| wanted(p.0)) {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(format!("{name}.c"));
        let binary = build.join(name);
        let cc = Command::new("cc").args(["-O2", "-static", "-o"]).arg(&binary).arg(&source).status().context("cc")?;
        if !cc.success() {
            bail!("cc could not compile {}", source.display());
        }
        for backend in &args.backends {
            let argument = if backend == "interp" { small } else { large };
            report(args, bivisor, name, backend, &[binary.to_str().context("path")?, argument])?;
        }
    }
    for (name, command) in INSTALLED.iter().filter(|p| wanted(p.0)) {
        for backend in &args.backends {
            report(args, bivisor, name, backend, command)?;
        }
    }
    Ok(())
}

fn names() -> impl Iterator<Item = &'static str> {
    COMPILED.iter().map(|c| c.0).chain(INSTALLED.iter().map(|i| i.0))
}

fn report(args: &Args, bivisor: &Path, name: &str, backend: &str, command: &[&str]) -> Result<()> {
    let bar = std::io::stderr().is_terminal();
    let mut pairs = Vec::new();
    for round in 0..=args.runs {
        if bar {
            eprint!("\r{name} {backend} {round}/{} \x1b[K", args.runs);
        }
        let mut native = Command::new(command[0]);
        native.args(&command[1..]);
        let mut engine = if backend == "qemu" {
            let mut c = Command::new("qemu-x86_64");
            c.arg(which(command[0]));
            c
        } else {
            let mut c = Command::new(bivisor);
            c.args(["run", "--backend", backend, "--", command[0]]);
            c
        };
        engine.args(&command[1..]);
        match (cpu_seconds(&mut native), cpu_seconds(&mut engine)) {
            (Ok(n), Ok(e)) if round > 0 => pairs.push((n.max(1e-4), e)),
            (Ok(_), Ok(_)) => {}
            (Err(e), _) | (_, Err(e)) => {
                eprintln!("{}SKIPPED: {name} {backend}: {e:#}", if bar { "\r\x1b[K" } else { "" });
                return Ok(());
            }
        }
    }
    if bar {
        eprint!("\r\x1b[K");
    }
    let r = Ratios::new(name, backend, &pairs);
    if args.json {
        println!("{}", serde_json::to_string(&r)?);
    } else {
        println!(
            "{:<10} {:<8} {:>9.3}  {:>7.2} {:>7.2} {:>7.2}  {}",
            r.program, r.backend, r.native_seconds, r.median, r.min, r.max, r.runs
        );
    }
    Ok(())
}

fn which(program: &str) -> PathBuf {
    let found =
        std::env::var_os("PATH").and_then(|p| std::env::split_paths(&p).map(|d| d.join(program)).find(|f| f.is_file()));
    if program.contains('/') { program.into() } else { found.unwrap_or_else(|| program.into()) }
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
