//! Divides a campaign among worker processes, joins their results, survives their death, and can go on where it was.
//!
//! A worker is this program again; it writes a line of JSON when it begins a batch and one with its results now and then. What a seed
//! and a number of cases find does not depend on the number of workers or shards.

use super::case::Kind;
use super::engine::Which;
use super::tally::{Divergence, Tally};
use super::worker::Worker;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// Cases of a batch, at least, in the mean.
const CASES: u64 = 1900;
/// Batches between two results of a worker.
const REPORT: u64 = 64;
/// A worker that says nothing for so long hangs.
const SILENCE: Duration = Duration::from_secs(60);
/// Between two writings of the state file.
const SAVE: Duration = Duration::from_secs(10);

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The seed.
    pub seed: u64,
    /// Batches in all, of all shards.
    pub batches: u64,
    /// This shard, from 0, and of how many.
    pub shard: (u64, u64),
    /// The engines by name; `host` is the judge.
    pub engines: Vec<String>,
    /// The kinds of cases by name.
    #[serde(default)]
    pub kinds: Vec<String>,
}

impl Plan {
    /// The plan for about so many cases (a few more).
    pub fn new(seed: u64, cases: u64, shard: (u64, u64), engines: Vec<String>, kinds: Vec<String>) -> Plan {
        Plan { seed, batches: cases.div_ceil(CASES).max(1), shard, engines, kinds }
    }

    /// Batches of this shard.
    pub fn share(&self) -> u64 {
        let (i, n) = self.shard;
        (self.batches + n - 1 - i) / n
    }

    /// The number of the shard's `k`-th batch.
    fn batch(&self, k: u64) -> u64 {
        k * self.shard.1 + self.shard.0
    }
}

/// How far a campaign is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// What is run.
    pub plan: Plan,
    /// For each worker the next of the shard's batches.
    next: Vec<u64>,
    /// What was found.
    pub tally: Tally,
}

/// What a worker says.
#[derive(Serialize, Deserialize)]
enum Line {
    Begin(u64),
    Result { next: u64, tally: Tally },
    Failed(String),
}

/// How to run it.
pub struct Options {
    /// Worker processes.
    pub jobs: usize,
    /// Stop after that time.
    pub time: Option<Duration>,
    /// Where the state is kept.
    pub state: Option<PathBuf>,
}

/// The worker's side: the shard's batches `from`, `from + step` ... to standard output.
///
/// # Errors
/// A sentence: an engine is not to be had, or nobody reads.
pub fn work(plan: &Plan, from: u64, step: u64) -> Result<(), String> {
    let stdout = std::io::stdout();
    let say = |line: &Line| -> Result<(), String> {
        let mut text = serde_json::to_string(line).map_err(|e| e.to_string())?;
        text.push('\n');
        stdout.lock().write_all(text.as_bytes()).map_err(|e| e.to_string())
    };
    let which: Vec<Which> = plan.engines.iter().filter_map(|n| Which::named(n)).collect();
    let kinds: Vec<Kind> = plan.kinds.iter().filter_map(|n| Kind::named(n)).collect();
    let mut worker = match Worker::new(&which, plan.engines.iter().any(|n| n == "host"), &kinds, plan.seed) {
        Ok(worker) => worker,
        Err(why) => return say(&Line::Failed(why)),
    };
    let (mut k, mut n) = (from, 0);
    while k < plan.share() {
        say(&Line::Begin(k))?;
        worker.batch(plan.batch(k));
        (k, n) = (k + step, n + 1);
        if n % REPORT == 0 || k >= plan.share() {
            say(&Line::Result { next: k, tally: worker.take() })?;
        }
    }
    Ok(())
}

/// Reads a state file, if there is one.
///
/// # Errors
/// A sentence: it cannot be read, or is of another campaign.
pub fn resume(plan: &Plan, options: &Options) -> Result<State, String> {
    let jobs = options.jobs.max(1);
    let fresh = State { plan: plan.clone(), next: (0..jobs as u64).collect(), tally: Tally::default() };
    let Some(path) = options.state.as_ref().filter(|p| p.exists()) else { return Ok(fresh) };
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let state: State = serde_json::from_str(&text).map_err(|e| format!("{}: no state file: {e}", path.display()))?;
    if state.plan != *plan {
        return Err(format!("{}: the state of another campaign; give its options, or another file", path.display()));
    }
    if state.next.len() != jobs {
        return Err(format!("{}: was begun with --jobs {}; give the same", path.display(), state.next.len()));
    }
    Ok(state)
}

struct Running {
    child: Child,
    /// The batch it is at.
    at: u64,
    heard: Instant,
}

/// Runs a campaign; `command` makes the command line of a worker, `progress` is told batches done and the results so far.
///
/// # Errors
/// A sentence: no worker can be started, or an engine is not to be had.
pub fn run(
    mut state: State,
    options: &Options,
    command: &dyn Fn(u64, u64) -> Command,
    progress: &mut dyn FnMut(u64, &Tally),
) -> Result<State, String> {
    let start = Instant::now();
    let step = state.next.len() as u64;
    let (say, hear) = channel();
    let mut running = Vec::new();
    for job in 0..state.next.len() {
        running.push(spawn(job, command(state.next[job], step), &say, &state)?);
    }
    let mut saved = Instant::now();
    let failed = loop {
        if running.iter().all(Option::is_none) || options.time.is_some_and(|t| start.elapsed() >= t) {
            break None;
        }
        match receive(&hear) {
            Some((job, Some(Line::Begin(k)))) => {
                if let Some(r) = &mut running[job] {
                    (r.at, r.heard) = (k, Instant::now());
                }
            }
            Some((job, Some(Line::Result { next, tally }))) => {
                state.next[job] = next;
                state.tally.add(&tally);
            }
            Some((_, Some(Line::Failed(why)))) => break Some(why),
            // The end of a worker.
            Some((job, None)) => running[job] = ended(job, running[job].take(), &mut state, command, &say)?,
            None => {
                for r in running.iter_mut().flatten().filter(|r| r.heard.elapsed() > SILENCE) {
                    // Its end is heard then.
                    let _ = r.child.kill();
                }
            }
        }
        progress(state.tally.batches, &state.tally);
        if saved.elapsed() > SAVE {
            save(&state, options)?;
            saved = Instant::now();
        }
    };
    for r in running.iter_mut().flatten() {
        let _ = r.child.kill();
        let _ = r.child.wait();
    }
    save(&state, options)?;
    match failed {
        Some(why) => Err(why),
        None => Ok(state),
    }
}

fn receive(hear: &Receiver<(usize, Option<Line>)>) -> Option<(usize, Option<Line>)> {
    hear.recv_timeout(Duration::from_millis(200)).ok()
}

fn save(state: &State, options: &Options) -> Result<(), String> {
    let Some(path) = &options.state else { return Ok(()) };
    let text = serde_json::to_string(state).map_err(|e| e.to_string())?;
    let new = path.with_extension("new");
    let done = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, path));
    done.map_err(|e| format!("{}: {e}", path.display()))
}

fn spawn(
    job: usize,
    mut command: Command,
    say: &Sender<(usize, Option<Line>)>,
    state: &State,
) -> Result<Option<Running>, String> {
    if state.next[job] >= state.plan.share() {
        return Ok(None);
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| format!("no worker can be started: {e}"))?;
    let out = child.stdout.take().ok_or("a worker without output")?;
    let say = say.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            let Ok(line) = serde_json::from_str(&line) else { continue };
            if say.send((job, Some(line))).is_err() {
                return;
            }
        }
        // Nobody listens any more at the end of the campaign.
        let _ = say.send((job, None));
    });
    Ok(Some(Running { child, at: state.next[job], heard: Instant::now() }))
}

/// A worker came to its end: well, or it died; then another goes on behind the batch that killed it.
fn ended(
    job: usize,
    was: Option<Running>,
    state: &mut State,
    command: &dyn Fn(u64, u64) -> Command,
    say: &Sender<(usize, Option<Line>)>,
) -> Result<Option<Running>, String> {
    let Some(mut was) = was else { return Ok(None) };
    let status = was.child.wait().map_err(|e| e.to_string())?;
    if status.success() {
        return Ok(None);
    }
    let step = state.next.len() as u64;
    let batch = state.plan.batch(was.at);
    state.tally.counts.entry("worker".into()).or_default().entry("died".into()).or_default().cases += 1;
    state.tally.divergences.push(Divergence {
        engine: "worker".into(),
        code: "died".into(),
        bytes: String::new(),
        text: String::new(),
        part: "other".into(),
        what: format!("a worker died or hung in batch {batch}: {status}"),
        seed: state.plan.seed,
        batch,
        repro: serde_json::Value::Null,
    });
    // What it had done since its last result is not counted.
    state.next[job] = was.at + step;
    spawn(job, command(state.next[job], step), say, state)
}
