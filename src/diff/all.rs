//! `bivisor diff --all`: the campaign, divided among worker processes.

use super::AllArgs;
use anyhow::{Context, Result, anyhow, bail};
use bivisor_testsuite::campaign::case::Kind;
use bivisor_testsuite::campaign::coordinator::{self, Options, Plan};
use bivisor_testsuite::campaign::engine::Which;
use bivisor_testsuite::campaign::group::kvm_for_kernels;
use bivisor_testsuite::campaign::matrix::Coverage;
use bivisor_testsuite::campaign::modes::matrix as modes;
use bivisor_testsuite::campaign::tally::Tally;
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Runs the campaign, or a worker's part of it.
pub fn run(args: &AllArgs) -> Result<i32> {
    if args.shard.0 >= args.shard.1 {
        bail!("--shard {}/{}: the first number is from 0 to {}", args.shard.0, args.shard.1, args.shard.1 - 1);
    }
    for name in &args.engines {
        if name != "host" && Which::named(name).is_none() {
            bail!("no engine is called {name}: there are interp, bt, kvm, interp-paged, bt-paged and host");
        }
    }
    for name in &args.kinds {
        if Kind::named(name).is_none() {
            bail!("no kind of case is called {name}: there are {}", Kind::ALL.map(Kind::name).join(", "));
        }
    }
    let plan = Plan::new(args.seed, args.cases, args.shard, args.engines.clone(), args.kinds.clone());
    if let Some((from, step)) = args.worker {
        coordinator::work(&plan, from, step).map_err(|e| anyhow!(e))?;
        return Ok(0);
    }
    if args.engines.iter().any(|e| e == "kvm")
        && args.kinds.iter().any(|k| k == "cpl0")
        && let Err(why) = kvm_for_kernels()
    {
        eprintln!("SKIPPED: KVM is no engine of cpl0 here: {why}");
    }
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let options = Options {
        jobs: if args.jobs == 0 { cpus } else { args.jobs },
        time: args.time.map(Duration::from_secs_f64),
        state: args.state.clone(),
    };
    let program = std::env::current_exe().context("where this program is")?;
    let command = |from: u64, step: u64| {
        let mut c = Command::new(&program);
        c.args(["diff", "--all", "--worker", &format!("{from}/{step}"), "--seed", &args.seed.to_string()]);
        c.args(["--cases", &args.cases.to_string(), "--shard", &format!("{}/{}", args.shard.0, args.shard.1)]);
        c.args(["--engines", &args.engines.join(","), "--kinds", &args.kinds.join(",")]);
        c
    };
    // It shows itself on a terminal only.
    let bar = ProgressBar::new(plan.share());
    let style = "{bar:40} {percent}% {msg}, {eta} left";
    bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
    let start = Instant::now();
    let state = coordinator::resume(&plan, &options).map_err(|e| anyhow!(e))?;
    let before = state.tally.cases;
    let mut progress = |batches: u64, tally: &Tally| {
        bar.set_position(batches);
        bar.set_message(format!("{} cases, {} different", tally.cases, tally.different()));
    };
    let state = coordinator::run(state, &options, &command, &mut progress).map_err(|e| anyhow!(e))?;
    bar.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    if let Some(dir) = &args.repro {
        write_repros(dir, &state.tally)?;
    }
    if args.json {
        println!("{}", serde_json::to_string(&state)?);
        return Ok(status(&state.tally));
    }
    let rate = (state.tally.cases - before) as f64 / seconds;
    println!(
        "{} cases in {seconds:.1} s with {} workers: {rate:.0} a second",
        state.tally.cases - before,
        options.jobs
    );
    report(&state.tally);
    coverage(&state.tally);
    Ok(status(&state.tally))
}

/// 1 if something unexpected differs.
pub fn status(tally: &Tally) -> i32 {
    i32::from(tally.different() > 0)
}

/// What was found, for people.
pub fn report(tally: &Tally) {
    for engine in tally.counts.keys() {
        let t = tally.total(engine);
        println!(
            "{engine:>12}: {} cases, {} equal, {} expected divergences, {} unexpected",
            t.cases,
            t.equal,
            t.expected,
            t.different()
        );
    }
    for (row, n) in &tally.expected {
        println!("    expected {n}: {row}");
    }
    for d in &tally.divergences {
        println!(
            "DIFFERS {} {} [{}] {}: {} (seed {}, batch {})",
            d.engine, d.code, d.bytes, d.text, d.what, d.seed, d.batch
        );
    }
}

/// How many instructions were met, and which were not.
fn coverage(tally: &Tally) {
    let user = modes::USER.coverage(tally).into_iter().map(|(bits, c)| (format!("{bits}-bit instructions"), c));
    let system = modes::SYSTEM.coverage(tally).into_iter().map(|(kind, c)| (format!("instructions of {kind}"), c));
    let modes: Vec<_> = user.chain(system).collect();
    let only = !modes.is_empty();
    for (what, c) in modes {
        say(&what, (c.met, c.all, c.thousand), c.without);
    }
    let c = Coverage::of(tally);
    if c.met > 0 || !only {
        say("instructions", (c.met, c.all, c.thousand), c.without);
    }
}

fn say(what: &str, (met, all, thousand): (usize, usize, usize), without: BTreeMap<String, Vec<String>>) {
    let share = 100.0 * met as f64 / all.max(1) as f64;
    println!("{what}: {met} of {all} ({share:.1} %), {thousand} with 1000 cases or more");
    for (why, codes) in without {
        let more = if codes.len() > 8 { " ..." } else { "" };
        println!("    {}: {why} ({}{more})", codes.len(), codes[..codes.len().min(8)].join(" "));
    }
}

fn write_repros(dir: &Path, tally: &Tally) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    for (n, d) in tally.divergences.iter().enumerate() {
        let path = dir.join(format!("{:03}-{}-{}.json", n, d.engine, d.code));
        std::fs::write(&path, serde_json::to_string_pretty(d)?).with_context(|| path.display().to_string())?;
    }
    Ok(())
}
