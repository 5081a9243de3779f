//! `bivisor diff merge`: the results of shards, which ran anywhere, as one.

use super::all::{report, status};
use anyhow::{Context, Result, bail};
use bivisor_testsuite::campaign::coordinator::State;
use bivisor_testsuite::campaign::matrix;
use bivisor_testsuite::campaign::modes::matrix as modes;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Joins the files.
pub fn run(files: &[PathBuf], json: bool, summary: Option<&str>) -> Result<i32> {
    // Shards of one campaign are one; a summary may be of several campaigns.
    let mut joined: Vec<State> = Vec::new();
    let mut shards = BTreeSet::new();
    for file in files {
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let state: State = serde_json::from_str(&text)
            .with_context(|| format!("{}: no result of diff --all --json", file.display()))?;
        if !shards.insert((
            state.plan.seed,
            state.plan.batches,
            state.plan.engines.clone(),
            state.plan.kinds.clone(),
            state.plan.shard,
        )) {
            bail!("{}: this shard was given already: {}/{}", file.display(), state.plan.shard.0, state.plan.shard.1);
        }
        let same = |s: &&mut State| {
            summary.is_none() || (s.plan.seed, &s.plan.engines) == (state.plan.seed, &state.plan.engines)
        };
        match joined.iter_mut().find(same) {
            None => joined.push(state),
            Some(all) => all.tally.add(&state.tally),
        }
    }
    if let Some(revision) = summary {
        // 16- and 32-bit code has lines of its own.
        let text = match joined.iter().flat_map(|s| s.tally.counts.keys()).find_map(|e| modes::of(e)) {
            Some(record) => record.summary(&joined, revision),
            None => matrix::summary(&joined, revision),
        };
        print!("{text}");
        return Ok(joined.iter().map(|s| status(&s.tally)).max().unwrap_or(0));
    }
    let Some(all) = joined.pop() else { bail!("no file") };
    if json {
        println!("{}", serde_json::to_string(&all)?);
    } else {
        println!("{} cases of {} shards", all.tally.cases, shards.len());
        report(&all.tally);
    }
    Ok(status(&all.tally))
}
