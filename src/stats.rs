//! `bivisor run --stats` and `--perf`: what the translator did, and the names of its code for perf(1).

use bivisor_emulator::linux::LastWords;
use bivisor_translator::Cache;
use bivisor_translator::code_buffer::show_to_perf;
use clap::ValueEnum;
use serde_json::json;
use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

/// How the numbers are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One object, one line.
    Json,
}

impl Format {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::Text => "text",
            Format::Json => "json",
        }
    }
}

/// What is done and said when the process ends.
pub fn last_words(cache: &Arc<Cache>, format: Option<Format>, perf: bool) -> LastWords {
    if format.is_none() && !perf {
        return LastWords::default();
    }
    cache.count();
    let cache = cache.clone();
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let begin = Duration::new(now.tv_sec as u64, now.tv_nsec as u32);
    LastWords(Some(Arc::new(move || {
        let cache = cache.current();
        let failed = perf.then(|| for_perf(&cache, begin).err()).flatten();
        match (failed, format) {
            (Some(error), _) => format!("bivisor: --perf: {error}"),
            (_, Some(Format::Text)) => text(&cache),
            (_, Some(Format::Json)) => json(&cache),
            (_, None) => String::new(),
        }
    })))
}

/// The two files that perf knows: names alone, and names with code.
fn for_perf(cache: &Cache, begin: Duration) -> Result<(), String> {
    let pid = std::process::id();
    let write = |path: String, content: &[u8]| {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let done = file.and_then(|mut file| file.write_all(content).map(|()| file));
        done.map_err(|error| format!("{path}: {error}"))
    };
    write(format!("/tmp/perf-{pid}.map"), cache.map().as_bytes())?;
    show_to_perf(&write(format!("/tmp/jit-{pid}.dump"), &cache.jitdump(begin))?);
    Ok(())
}

fn json(cache: &Cache) -> String {
    let (c, t) = (cache.stats(), cache.totals());
    json!({
        "pid": std::process::id(),
        "translated": {
            "blocks": c.blocks, "adopted": c.adopted, "instructions": c.insns, "guest_bytes": c.guest_bytes, "host_bytes": c.host_bytes,
            "nanoseconds": c.nanoseconds,
        },
        "memory": { "bytes": c.memory, "guest_bytes": c.live_bytes },
        "system_calls_inside": t.direct,
        "links": c.links, "landings": c.landings, "traces": c.traces, "stale": c.stale, "flushes": c.flushes, "found": c.found,
        "entries": t.entries,
        "exits": {
            "unlinked": t.to_block, "indirect": t.misses, "syscall": t.syscalls, "interpreter": t.steps,
            "fault": t.faults, "code_write": t.code_writes, "changed": t.changes, "signal": t.signals,
        },
    })
    .to_string()
}

fn text(cache: &Cache) -> String {
    let (c, t) = (cache.stats(), cache.totals());
    let each = |total: u64, n: u64| total as f64 / n.max(1) as f64;
    [
        format!("bivisor: what the translator did for process {}", std::process::id()),
        format!("  translated   {} blocks, {} instructions, {} bytes", c.blocks, c.insns, c.guest_bytes),
        format!("  taken over   {} of these blocks from earlier runs", c.adopted),
        format!("  made         {} bytes of code, {:.1} for one", c.host_bytes, each(c.host_bytes, c.guest_bytes)),
        format!(
            "  took         {:.2} ms, {:.0} ns an instruction",
            c.nanoseconds as f64 / 1e6,
            each(c.nanoseconds, c.insns)
        ),
        format!(
            "  holds        {} bytes for code and what is known of it, {:.1} for one",
            c.memory,
            each(c.memory, c.live_bytes)
        ),
        format!(
            "  connected    {} jumps, {} targets of indirect branches, {} traces made",
            c.links, c.landings, c.traces
        ),
        format!("  looked up    {} blocks that were there", c.found),
        format!("  thrown away  {} blocks stale, {} times all", c.stale, c.flushes),
        format!("  carried out  {} system calls without coming out", t.direct),
        format!("  went in      {} times; came out because of", t.entries),
        format!("    {:>10}  a block not yet linked", t.to_block),
        format!("    {:>10}  an indirect branch to a new target", t.misses),
        format!("    {:>10}  a system call", t.syscalls),
        format!("    {:>10}  an instruction for the interpreter", t.steps),
        format!("    {:>10}  an exception", t.faults),
        format!("    {:>10}  a write to translated code", t.code_writes),
        format!("    {:>10}  code that has changed where writes are not watched", t.changes),
        format!("    {:>10}  a signal", t.signals),
    ]
    .join("\n")
}
