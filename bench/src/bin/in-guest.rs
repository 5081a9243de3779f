//! `in-guest`: programs and system calls inside a Linux guest on Bivisor's translator and on QEMU's TCG, and natively, in alternation.

use anyhow::{Context, Result, bail};
use bivisor_bench::median;
use clap::Parser;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Boots a Linux kernel with programs of bench/programs under Bivisor and, where it is installed, under qemu-system-x86_64 without
/// hardware virtualization, and runs the same natively, in alternation. What counts is what the guest's clock shows for each program.
#[derive(Parser)]
#[command(
    after_help = "Example:\n  cargo build --release && cargo in-guest --kernel vmlinuz --runs 3 core sha256 getppid"
)]
struct Args {
    /// What to run; default all.
    names: Vec<String>,
    /// A Linux kernel for x86-64, as testsuite/fetch-guests.sh fetches one.
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Rounds; each runs everything once everywhere.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// The engine.
    #[arg(long, default_value = "bt")]
    backend: String,
    /// QEMU's CPU models.
    #[arg(long, value_delimiter = ',', default_value = "max,qemu64")]
    qemu: Vec<String>,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
    /// The bivisor binary; default: beside this program.
    #[arg(long)]
    bivisor: Option<PathBuf>,
}

const PROGRAMS: [&str; 7] = ["guest", "core", "sha256", "fib", "calls", "goto", "matrix"];
const LIMIT: &str = "600";

fn main() -> Result<()> {
    let args = Args::parse();
    let bivisor =
        args.bivisor.clone().map_or_else(|| std::env::current_exe().map(|p| p.with_file_name("bivisor")), Ok)?;
    if !bivisor.is_file() {
        bail!("no {}: build it with `cargo build --release`, or give --bivisor", bivisor.display());
    }
    let build = std::env::temp_dir().join(format!("bivisor-in-guest-{}", std::process::id()));
    std::fs::create_dir_all(&build)?;
    let outcome = prepare(&build).and_then(|initrd| measure(&args, &bivisor, &build, &initrd));
    std::fs::remove_dir_all(&build)?;
    outcome
}

/// Compiles the programs and packs them.
fn prepare(build: &Path) -> Result<PathBuf> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs");
    let mut archive = Vec::new();
    for name in PROGRAMS {
        let (source, to) = (sources.join(format!("{name}.c")), build.join(name));
        let status = Command::new("cc").args(["-O2", "-static", "-o"]).arg(&to).arg(source).status().context("cc")?;
        if !status.success() {
            bail!("cc cannot compile {name}.c");
        }
        pack(&mut archive, if name == "guest" { "init" } else { name }, 0o100_755, &std::fs::read(&to)?);
    }
    let guest = std::fs::read(build.join("guest"))?;
    pack_bzip2(&mut archive, build, &guest.repeat(2))?;
    pack(&mut archive, "TRAILER!!!", 0, &[]);
    let initrd = build.join("initrd");
    std::fs::write(&initrd, archive)?;
    Ok(initrd)
}

/// The host's bzip2 with its libraries, where there is one, and what it compresses.
fn pack_bzip2(archive: &mut Vec<u8>, build: &Path, input: &[u8]) -> Result<()> {
    let Some(bzip2) = ["/usr/bin/bzip2", "/bin/bzip2"].map(Path::new).into_iter().find(|p| p.is_file()) else {
        eprintln!("SKIPPED: bzip2 is not installed");
        return Ok(());
    };
    std::fs::copy(bzip2, build.join("bzip2")).context("bzip2")?;
    std::fs::write(build.join("input"), input)?;
    pack(archive, "bzip2", 0o100_755, &std::fs::read(bzip2)?);
    pack(archive, "input", 0o100_644, input);
    let ldd = Command::new("ldd").arg(bzip2).output().context("ldd")?;
    let text = String::from_utf8_lossy(&ldd.stdout).into_owned();
    let mut folders = std::collections::BTreeSet::new();
    for library in text.split_whitespace().filter(|w| w.starts_with('/')).map(Path::new) {
        for folder in library.ancestors().skip(1).filter(|f| f.parent().is_some()) {
            folders.insert(folder.to_owned());
        }
    }
    let name = |p: &Path| p.to_string_lossy().trim_start_matches('/').to_owned();
    // Sorted: each after the one it is in.
    for folder in folders {
        pack(archive, &name(&folder), 0o040_755, &[]);
    }
    for library in text.split_whitespace().filter(|w| w.starts_with('/')).map(Path::new) {
        pack(archive, &name(library), 0o100_755, &std::fs::read(library)?);
    }
    Ok(())
}

/// Adds a file to a cpio archive in the "new" format (Linux: Documentation/driver-api/early-userspace/buffer-format.rst).
fn pack(archive: &mut Vec<u8>, name: &str, mode: u32, bytes: &[u8]) {
    let links = 1;
    archive.extend(b"070701");
    for field in [0, mode, 0, 0, links, 0, bytes.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0] {
        archive.extend(format!("{field:08x}").bytes());
    }
    archive.extend(name.bytes().chain([0]));
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(bytes);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// Nanoseconds by program and by where it ran.
type Times = BTreeMap<(String, String), Vec<f64>>;

fn measure(args: &Args, bivisor: &Path, build: &Path, initrd: &Path) -> Result<()> {
    let line = format!("console=ttyS0 quiet -- / {}", args.names.join(" "));
    let qemu_there = Command::new("qemu-system-x86_64").arg("--version").output().is_ok();
    if !qemu_there {
        eprintln!("SKIPPED: qemu-system-x86_64 is not installed");
    }
    let mut places = vec!["native".to_owned(), args.backend.clone()];
    places.extend(args.qemu.iter().filter(|_| qemu_there).map(|model| format!("qemu {model}")));
    let bar = indicatif::ProgressBar::new((args.runs * places.len()) as u64);
    let (mut times, mut order) = (Times::new(), Vec::new());
    for place in (0..args.runs).flat_map(|_| &places) {
        let mut command = match place.strip_prefix("qemu ") {
            Some(model) => {
                let mut c = Command::new("qemu-system-x86_64");
                c.args(["-accel", "tcg", "-cpu", model, "-m", "512", "-nographic", "-no-reboot", "-nodefaults"]);
                c.args(["-serial", "stdio", "-append", &line, "-kernel"]).arg(&args.kernel).arg("-initrd").arg(initrd);
                c
            }
            None if place == "native" => {
                let mut c = Command::new(build.join("guest"));
                c.arg(build).args(&args.names);
                c
            }
            None => {
                let mut c = Command::new(bivisor);
                c.args([
                    "boot",
                    "--backend",
                    place,
                    "--memory",
                    "512",
                    "--timeout",
                    LIMIT,
                    "--append",
                    &line,
                    "--kernel",
                ]);
                c.arg(&args.kernel).arg("--initrd").arg(initrd);
                c
            }
        };
        let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().with_context(|| place.clone())?;
        bar.inc(1);
        let text = String::from_utf8_lossy(&output.stdout);
        let results: Vec<_> = text.lines().filter_map(result).collect();
        if results.is_empty() {
            bail!(
                "{place}: the guest printed no result; its end:\n{}",
                text.lines().rev().take(8).collect::<Vec<_>>().join("\n")
            );
        }
        for (name, ns) in results {
            if !order.contains(&name) {
                order.push(name.clone());
            }
            times.entry((name, place.clone())).or_default().push(ns);
        }
    }
    bar.finish_and_clear();
    show(args, &places, &order, &times)
}

/// `took NAME NANOSECONDS`, which a firmware's escape sequences may precede.
fn result(line: &str) -> Option<(String, f64)> {
    let mut words = line.split_once("took ")?.1.split_whitespace();
    Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
}

fn show(args: &Args, places: &[String], order: &[String], times: &Times) -> Result<()> {
    let mut header = vec![format!("{:<10}", "us"), places.iter().map(|p| format!("{p:>14}")).collect()];
    header.extend(places[1..].iter().map(|p| format!("{:>14}", format!("{p} ratio"))));
    if !args.json {
        println!("{}", header.concat());
    }
    for name in order {
        // The least disturbed run counts: the guest's clock goes on while others have the processor.
        let least =
            |place: &String| times.get(&(name.clone(), place.clone())).and_then(|t| t.iter().copied().reduce(f64::min));
        let middle = |place: &String| times.get(&(name.clone(), place.clone())).map(|t| median(t));
        let native = least(&places[0]);
        if args.json {
            let all: BTreeMap<_, _> = places.iter().map(|p| (p, (least(p), middle(p)))).collect();
            println!("{}", serde_json::json!({ "name": name, "least_and_median_ns": all }));
            continue;
        }
        let mut row = format!("{name:<10}");
        for place in places {
            row += &least(place).map_or_else(|| format!("{:>14}", "-"), |ns| format!("{:>14.2}", ns / 1e3));
        }
        for place in &places[1..] {
            let ratio = least(place).zip(native).map(|(ns, native)| ns / native);
            row += &ratio.map_or_else(|| format!("{:>14}", "-"), |r| format!("{r:>14.2}"));
        }
        println!("{row}");
    }
    Ok(())
}
