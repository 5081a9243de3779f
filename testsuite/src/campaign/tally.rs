//! Counts of a campaign by instruction and engine, and what differed; they add up over workers, runs and machines.

use super::outcome::Part;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How an engine did on one instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Cases run on it and on the judge.
    pub cases: u64,
    /// Full state equal.
    pub equal: u64,
    /// Different as the list of expected divergences says.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub expected: u64,
    /// Not done by the engine.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unsupported: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Count {
    /// Divergences nobody expected.
    pub fn different(&self) -> u64 {
        self.cases - self.equal - self.expected - self.unsupported
    }

    /// Adds another.
    pub fn add(&mut self, other: &Count) {
        self.cases += other.cases;
        self.equal += other.equal;
        self.expected += other.expected;
        self.unsupported += other.unsupported;
    }
}

/// A difference, as reports show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Divergence {
    /// The engine.
    pub engine: String,
    /// iced's name of the instruction.
    pub code: String,
    /// Its bytes in hex.
    pub bytes: String,
    /// Disassembled.
    pub text: String,
    /// Which part of the state.
    pub part: String,
    /// How.
    pub what: String,
    /// Seed and number of the batch, to run it again.
    pub seed: u64,
    /// See `seed`.
    pub batch: u64,
    /// The start state as a request of `bivisor exec`.
    #[serde(default)]
    pub repro: serde_json::Value,
}

/// The results of some batches.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    /// By engine, by iced's name of the instruction.
    pub counts: BTreeMap<String, BTreeMap<String, Count>>,
    /// Examples of what differed, a few of each kind.
    pub divergences: Vec<Divergence>,
    /// Expected divergences by the line of the list that names them.
    #[serde(default)]
    pub expected: BTreeMap<String, u64>,
    /// Cases in all, on however many engines.
    pub cases: u64,
    /// Batches in all.
    pub batches: u64,
    /// Seconds of all workers.
    pub seconds: f64,
}

/// Examples kept of each engine, instruction and part.
const KEPT: usize = 2;

impl Tally {
    /// Adds another.
    pub fn add(&mut self, other: &Tally) {
        for (engine, counts) in &other.counts {
            let mine = self.counts.entry(engine.clone()).or_default();
            for (code, count) in counts {
                mine.entry(code.clone()).or_default().add(count);
            }
        }
        for d in &other.divergences {
            self.note(d.clone());
        }
        for (row, n) in &other.expected {
            *self.expected.entry(row.clone()).or_default() += n;
        }
        self.cases += other.cases;
        self.batches += other.batches;
        self.seconds += other.seconds;
    }

    /// Is there room for another example of this kind?
    pub fn wants(&self, engine: &str, code: &str, part: Part) -> bool {
        let same = |d: &&Divergence| d.engine == engine && d.code == code && d.part == part.name();
        self.divergences.iter().filter(same).count() < KEPT
    }

    /// Keeps an example.
    pub fn note(&mut self, d: Divergence) {
        let same = |o: &&Divergence| o.engine == d.engine && o.code == d.code && o.part == d.part;
        if self.divergences.iter().filter(same).count() < KEPT {
            self.divergences.push(d);
        }
    }

    /// Counts of an engine over all instructions.
    pub fn total(&self, engine: &str) -> Count {
        let mut sum = Count::default();
        self.counts.get(engine).into_iter().flat_map(BTreeMap::values).for_each(|c| sum.add(c));
        sum
    }

    /// Unexpected divergences in all.
    pub fn different(&self) -> u64 {
        self.counts.values().flat_map(BTreeMap::values).map(Count::different).sum()
    }
}
