//! `bivisor diff PROGRAM`: a Linux program on two engines in lockstep. It runs in a child process, `bivisor run --lockstep`, so that its
//! own exit status and its end are told from ours; what differed is played back afterwards, in processes of their own.

use super::replay::{self, Replayed};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is asked for.
pub struct ProgramArgs<'a> {
    /// The reference and the tested engine.
    pub engines: &'a [String],
    /// `block`, or `insn`.
    pub grain: &'a str,
    /// Where repros go.
    pub repro: Option<&'a Path>,
    /// One JSON object.
    pub json: bool,
    /// The program and its arguments.
    pub command: &'a [OsString],
}

/// Runs it; 1 if something differs.
pub fn run(args: &ProgramArgs<'_>) -> Result<i32> {
    let tested = match args.engines {
        [a, b] if a == "interp" => b.as_str(),
        [a, b] if b == "interp" => a.as_str(),
        [_, _] => bail!("--engines {}: one of the two must be interp, the reference", args.engines.join(",")),
        _ => bail!("--engines {}: two engines, as in interp,bt", args.engines.join(",")),
    };
    if !["interp", "bt", "kvm"].contains(&tested) {
        bail!("--engines: no engine of a process is called {tested}: there are interp, bt and kvm");
    }
    let dir = Scratch::new()?;
    let status = Command::new(std::env::current_exe().context("where this program is")?)
        .args(["run", "--backend", tested, "--lockstep"])
        .arg(format!("{}:{}", args.grain, dir.0.display()))
        .arg("--")
        .args(args.command)
        .status()
        .context("the child that runs the program")?;
    let (mut sums, mut found) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(&dir.0)? {
        let path = entry?.path();
        let text = std::fs::read_to_string(&path)?;
        let value: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        match path.extension().and_then(|e| e.to_str()) {
            Some("sum") => sums.push(value),
            _ => found.push(value),
        }
    }
    let total = |name: &str| sums.iter().filter_map(|s| s[name].as_u64()).sum::<u64>();
    let names = ["stretches", "instructions", "clock", "random", "shared", "large", "interrupted"];
    let counts: serde_json::Map<String, Value> = names.iter().map(|n| ((*n).into(), total(n).into())).collect();
    let mut shown = Vec::new();
    for request in found {
        shown.push(keep(replay::bisect(request, tested)?, args.repro)?);
    }
    let ended = match (status.code(), std::os::unix::process::ExitStatusExt::signal(&status)) {
        (Some(code), _) => format!("status {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or(0)),
    };
    if args.json {
        let differences: Vec<&Value> = shown.iter().map(|(r, _)| &r.request).collect();
        println!(
            "{}",
            json!({ "engines": ["interp", tested], "grain": args.grain, "processes": sums.len(), "ended": ended,
                "counts": counts, "differences": differences })
        );
    } else {
        for (replayed, path) in &shown {
            replay::show(replayed, tested);
            eprintln!("bivisor: repro: {}", path.display());
        }
        let n = |name: &str| counts[name].as_u64().unwrap_or(0);
        eprintln!(
            "bivisor: interp and {tested}: {} instructions in {} stretches compared in {} processes, {} differences; the program ended with {ended}",
            n("instructions"),
            n("stretches"),
            sums.len(),
            shown.len()
        );
        let apart: Vec<String> = [
            ("clock", "the clock"),
            ("random", "random numbers"),
            ("shared", "memory shared with others"),
            ("large", "more memory than is copied"),
        ]
        .iter()
        .filter(|(name, _)| n(name) > 0)
        .map(|(name, what)| format!("{} for {what}", n(name)))
        .collect();
        if !apart.is_empty() {
            eprintln!("bivisor: instructions that only {tested} did: {}", apart.join(", "));
        }
    }
    Ok(i32::from(!shown.is_empty()))
}

/// Writes the repro where it stays.
fn keep(replayed: Replayed, dir: Option<&Path>) -> Result<(Replayed, PathBuf)> {
    let dir = dir.map_or_else(|| PathBuf::from("."), Path::to_path_buf);
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    let rip = replayed.request["regs"]["rip"].as_str().unwrap_or("0x0").trim_start_matches("0x").to_owned();
    let path = dir.join(format!("bivisor-repro-{}-{rip}.json", std::process::id()));
    std::fs::write(&path, format!("{}\n", replayed.request)).with_context(|| path.display().to_string())?;
    Ok((replayed, path))
}

/// A directory that goes with us.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Scratch> {
        let path = std::env::temp_dir().join(format!("bivisor-diff-{}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
