//! Repros of differences in a process that goes on: a file each in a directory, and a line that says so.

use super::engine::{Difference, Report};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Repros that a process writes, at most.
const MOST: usize = 20;

/// Writes a file whole or not at all: whoever looks does not see a half.
///
/// # Errors
/// The host's.
pub fn write(path: &Path, text: &str) -> std::io::Result<()> {
    let part = path.with_extension("part");
    std::fs::write(&part, text)?;
    std::fs::rename(part, path)
}

/// The first difference at each address becomes a file in `dir`, and `say` is told.
pub fn report(dir: PathBuf, say: impl Fn(&str) + Send + Sync + 'static) -> Report {
    let seen: Mutex<HashSet<u64>> = Mutex::default();
    Box::new(move |d: &Difference| {
        let Ok(mut seen) = seen.lock() else { return };
        if seen.len() >= MOST || !seen.insert(d.start.rip) {
            return;
        }
        let path = dir.join(format!("bivisor-repro-{}-{:x}.json", std::process::id(), d.start.rip));
        let what: Vec<&str> = d.changes.iter().take(4).map(|c| c.what.as_str()).collect();
        let end = match write(&path, &format!("{}\n", d.request("bt"))) {
            Ok(()) => format!("see `bivisor diff replay {}`", path.display()),
            Err(error) => format!("{}: {error}", path.display()),
        };
        say(&format!("bivisor: sentinel: the block at {:#x} differs in {}: {end}", d.start.rip, what.join(", ")));
    })
}
