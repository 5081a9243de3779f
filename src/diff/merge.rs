//! `bivisor diff merge`: the results of shards, which ran anywhere, as one.

use super::all::{report, status};
use anyhow::{Context, Result, bail};
use bivisor_testsuite::campaign::coordinator::State;
use bivisor_testsuite::campaign::matrix;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Joins the files.
pub fn run(files: &[PathBuf], json: bool, summary: bool) -> Result<i32> {
    let mut joined: Option<State> = None;
    let mut shards = BTreeSet::new();
    for file in files {
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let state: State = serde_json::from_str(&text)
            .with_context(|| format!("{}: no result of diff --all --json", file.display()))?;
        if !shards.insert((state.plan.seed, state.plan.batches, state.plan.shard)) {
            bail!("{}: this shard was given already: {}/{}", file.display(), state.plan.shard.0, state.plan.shard.1);
        }
        match &mut joined {
            None => joined = Some(state),
            Some(all) => all.tally.add(&state.tally),
        }
    }
    let Some(all) = joined else { bail!("no file") };
    if json {
        println!("{}", serde_json::to_string(&all)?);
    } else if summary {
        print!("{}", matrix::summary(&all));
    } else {
        println!("{} cases of {} shards", all.tally.cases, shards.len());
        report(&all.tally);
    }
    Ok(status(&all.tally))
}
