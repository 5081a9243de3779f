//! Whole programs: natively, under each engine as a Linux process, and in fresh namespaces as a container has them.

use anyhow::{Result, bail};
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A program and what it is bound by.
pub struct Program {
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub what: &'static str,
    /// What decides.
    pub why: &'static str,
    /// For `sh -c`; `$F` is a file of random bytes, `$N` a number of turns.
    script: &'static str,
    turns: u32,
}

/// Programs of any Linux.
pub const ALL: [Program; 4] = [
    Program {
        name: "cpu",
        what: "SHA-256 of a file",
        why: "innocuous instructions: hardware and containers run them as they are, a translator adds the looking up of branches",
        script: "sha256sum $F",
        turns: 1,
    },
    Program {
        name: "memory",
        what: "od and sort of a file",
        why: "loads and stores: nested paging costs TLB misses, a flat translator nothing",
        script: "od -v -w8 $F | LC_ALL=C sort -S 64M",
        turns: 1,
    },
    Program {
        name: "syscalls",
        what: "reads and writes of one byte",
        why: "each system call leaves an engine in process mode; a container's goes straight to the kernel",
        script: "dd if=/dev/zero of=/dev/null bs=1 count=$N 2>/dev/null",
        turns: 5_000,
    },
    Program {
        name: "fork",
        what: "fork, exec and wait",
        why: "a new process starts an engine anew; in namespaces it is a process like any other",
        script: "i=0; while [ $i -lt $N ]; do /bin/true; i=$((i+1)); done",
        turns: 10,
    },
];

/// Where a program runs.
pub const PLACES: [&str; 5] = ["native", "container", "interp", "bt", "kvm"];

/// Of unshare(1): user, mount, UTS, IPC, process and network namespaces of its own.
pub const NAMESPACES: [&str; 3] = ["-rmuipn", "--fork", "--"];

/// Bytes of the file.
const FILE: usize = 1 << 17;

/// A file for the programs, gone when this is.
pub struct File(PathBuf);

impl File {
    /// Its bytes are the same every time.
    ///
    /// # Errors
    /// No place for it.
    pub fn new(factor: u32) -> Result<File> {
        let path = std::env::temp_dir().join(format!("bivisor-compare-{}", std::process::id()));
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        let bytes: Vec<u8> = (0..FILE * factor as usize)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x as u8
            })
            .collect();
        std::fs::write(&path, bytes)?;
        Ok(File(path))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // Nobody can do anything about it.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The command for a place.
fn command(place: &str) -> Result<Command> {
    Ok(match place {
        "native" => Command::new("/bin/sh"),
        "container" => {
            let mut c = Command::new("unshare");
            c.args(NAMESPACES).arg("/bin/sh");
            c
        }
        engine => {
            let mut c = Command::new(std::env::current_exe()?);
            c.args(["run", "--backend", engine, "--", "/bin/sh"]);
            c
        }
    })
}

/// Milliseconds of one run.
///
/// # Errors
/// It does not run there, or not to its end.
pub fn time(program: &Program, place: &str, file: &File, factor: u32, limit: Duration) -> Result<f64> {
    let mut command = command(place)?;
    command.arg("-c").arg(program.script).env("F", &file.0).env("N", (program.turns * factor).to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let (status, ms, _) = wait(command, limit)?;
    if !status.success() {
        bail!("{place}: {status}");
    }
    Ok(ms)
}

/// Starts it and waits for its end: how it ended, after how many milliseconds, and what it said on standard error, if that is a pipe.
///
/// # Errors
/// It cannot be started, or is not done in time.
pub fn wait(mut command: Command, limit: Duration) -> Result<(ExitStatus, f64, String)> {
    let start = Instant::now();
    let mut child = command.spawn()?;
    loop {
        if let Some(status) = child.try_wait()? {
            let ms = start.elapsed().as_secs_f64() * 1e3;
            let mut said = String::new();
            if let Some(mut pipe) = child.stderr.take() {
                pipe.read_to_string(&mut said)?;
            }
            return Ok((status, ms, said));
        }
        if start.elapsed() > limit {
            // Its children end with the pipe or the loop.
            let _ = child.kill();
            let _ = child.wait();
            bail!("not done after {} s", limit.as_secs());
        }
        std::thread::sleep(Duration::from_micros(300));
    }
}
