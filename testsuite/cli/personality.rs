//! Signals, restarts, threads, processes, stacks and mappings: the C programs of testsuite/programs print the same natively and under every engine.
//!
//! Native is the oracle. They are compiled when the tests run; without a C compiler they are skipped, loudly.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

const PROGRAMS: &[&str] = &[
    "signals",
    "restart",
    "threads",
    "processes",
    "execs",
    "stacks",
    "storm",
    "notify",
    "mappings",
    "self",
    "rewriting",
    "direct",
    "pointers",
    "targets",
    "limits",
];

/// Compiles a program; `None` without a compiler.
fn compile(name: &str, dir: &Path) -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("testsuite/programs").join(name).with_extension("c");
    let binary = dir.join(name);
    let done = Command::new("cc").args(["-O1", "-w", "-pthread", "-o"]).arg(&binary).arg(&source).output().ok()?;
    assert!(done.status.success(), "{}: {}", source.display(), String::from_utf8_lossy(&done.stderr));
    Some(binary)
}

/// Runs to the end; after five minutes it is killed. On a software KVM, whose exits take 0.1 ms, a storm of signals takes one of them.
fn run(command: &mut Command) -> Output {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let pid = child.id();
    let (done, timer) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        if timer.recv_timeout(Duration::from_secs(300)).is_err() {
            let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        }
    });
    let output = child.wait_with_output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let _ = done.send(());
    let _ = watch.join();
    output
}

/// Can this host have the engine? The reason if not.
fn available(engine: &str) -> Result<(), String> {
    let probe = run(Command::new(env!("CARGO_BIN_EXE_bivisor")).args(["run", "--backend", engine, "--", "true"]));
    match probe.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&probe.stderr).trim().to_owned()),
    }
}

/// What a program is started with.
fn under(before: &[&str], program: &Path) -> Command {
    let all: Vec<&OsStr> = before.iter().map(OsStr::new).chain([program.as_os_str()]).collect();
    let mut command = Command::new(all[0]);
    command.args(&all[1..]);
    command
}

fn on(engine: &str, options: &[&str]) {
    compare(engine, options, &[]);
}

/// `before`: words that come before both commands.
fn compare(engine: &str, options: &[&str], before: &[&str]) {
    // Only KVM may be missing.
    if engine == "kvm"
        && let Err(reason) = available(engine)
    {
        println!("SKIPPED: the programs on {engine}: {reason}");
        return;
    }
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!(
        "personality-{engine}{}-{}",
        options.concat(),
        before.len()
    ));
    std::fs::create_dir_all(&dir).expect("a directory for the programs");
    let mut failed = Vec::new();
    for name in PROGRAMS {
        let Some(binary) = compile(name, &dir) else {
            println!("SKIPPED: the programs on {engine}: no cc");
            return;
        };
        let native = run(&mut under(before, &binary));
        let mut command = under(before, Path::new(env!("CARGO_BIN_EXE_bivisor")));
        let ours = run(command.args(["run", "--backend", engine]).args(options).arg("--").arg(&binary));
        if ours.stdout != native.stdout || ours.status != native.status {
            let text = |o: &Output| String::from_utf8_lossy(&o.stdout).into_owned();
            let (a, b) = (text(&native), text(&ours));
            let first =
                a.lines().zip(b.lines()).position(|(x, y)| x != y).unwrap_or(a.lines().count().min(b.lines().count()));
            let tail = |s: &str| s.lines().skip(first).take(6).collect::<Vec<_>>().join("\n");
            let stderr = String::from_utf8_lossy(&ours.stderr).into_owned();
            failed.push(format!(
                "{name} on {engine}: native {}, ours {}, first different line {}:\n{}\n--- ours\n{}\n--- standard error\n{stderr}",
                native.status,
                ours.status,
                first + 1,
                tail(&a),
                tail(&b),
            ));
        }
    }
    let _ = std::fs::remove_dir_all(&dir);
    println!("{engine} {options:?} {before:?}: {} programs ran, {} differ from native", PROGRAMS.len(), failed.len());
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}

#[test]
fn interp() {
    on("interp", &[]);
}

#[test]
fn bt() {
    on("bt", &[]);
}

/// All code is thrown away time and again, while threads are in it, or in system calls.
#[test]
fn bt_in_little_memory() {
    on("bt", &["--no-cache", "--code-cache=128"]);
}

/// Where address space is short the translator has another way of finding the targets of branches, with landings as before.
#[test]
fn bt_in_little_address_space() {
    compare("bt", &["--no-cache"], &["sh", "-c", "ulimit -v 8388608; exec \"$@\"", "sh"]);
}

#[test]
fn kvm() {
    on("kvm", &[]);
}
