//! Fuzzing: mutated seeds into the decoder, the loaders, `exec`, disk images and the translator, and devices programmed at random, for as
//! long as one likes.
//!
//! `cargo run --release -p bivisor-testsuite --bin fuzz -- TARGET SECONDS [SEED]`; a finding is printed with its input, and the status is 1.
//! The mutations know no coverage; what makes up for it is that seeds are drawn by the campaign's encoder, which knows every opcode. For
//! those that gain from it there are targets for cargo-fuzz, too: `testsuite/fuzz`.

mod blocks;
mod board;
mod decoder;
mod elf;
mod exec;
mod image;

use crate::random::Random;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

/// What can be fuzzed.
pub trait Target {
    /// One input. `Err`: a finding, with its input.
    ///
    /// # Errors
    /// What is wrong, in a line.
    fn one(&mut self, r: &mut Random) -> Result<(), String>;
}

/// The targets by name, but for the devices.
pub const TARGETS: [&str; 6] = ["decoder", "elf", "exec", "blocks", "kernel", "qcow2"];

/// The targets that are devices of the PC.
pub fn devices() -> impl Iterator<Item = &'static str> {
    board::DEVICES.iter().map(|d| d.name)
}

/// A target; `program` is bivisor as built, for those that run it.
///
/// # Errors
/// There is none of that name, or it cannot be had here.
pub fn target(name: &str, program: &Path) -> Result<Box<dyn Target>, String> {
    if let Some(devices) = board::Devices::new(name) {
        return Ok(Box::new(devices?));
    }
    Ok(match name {
        "decoder" => Box::new(decoder::Decode::default()),
        "elf" => Box::new(elf::Loader::new(program)?),
        "exec" => Box::new(exec::Requests::new(program)?),
        "blocks" => Box::new(blocks::Blocks::new()?),
        "kernel" => Box::new(image::Kernels::new()?),
        "qcow2" => Box::new(image::Images::new()),
        _ => {
            let all: Vec<_> = TARGETS.into_iter().chain(devices()).collect();
            return Err(format!("no target {name}: there are {}", all.join(", ")));
        }
    })
}

/// What a coverage-guided fuzzer can drive: `testsuite/fuzz`.
pub trait Guided {
    /// Any input.
    ///
    /// # Errors
    /// What is wrong, in a line.
    fn bytes(&mut self, input: &[u8]) -> Result<(), String>;
}

/// A target for a coverage-guided fuzzer.
///
/// # Errors
/// There is none of that name, or it cannot be had here.
pub fn guided(name: &str) -> Result<Box<dyn Guided>, String> {
    Ok(match name {
        "decoder" => Box::new(decoder::Decode::default()),
        "elf" => Box::new(elf::Loader::new(Path::new(""))?),
        "blocks" => Box::new(blocks::Blocks::new()?),
        _ => return Err(format!("no target {name} for a coverage-guided fuzzer")),
    })
}

/// A target's name and its inputs.
pub type Seeds = (&'static str, Vec<Vec<u8>>);

/// Inputs that a coverage-guided fuzzer begins with.
///
/// # Errors
/// The host's.
pub fn seeds() -> Result<Vec<Seeds>, String> {
    let r = &mut Random::new(1);
    let decoder = decoder::Decode::default();
    let blocks = blocks::Blocks::new()?;
    Ok(vec![
        ("blocks", (0..2000).map(|_| blocks.seed(r)).collect()),
        ("decoder", (0..2000).map(|_| decoder.seed(r)).collect()),
        ("elf", vec![elf::tiny()]),
        ("exec", exec::SEEDS.iter().map(|s| s.as_bytes().to_vec()).collect()),
    ])
}

/// Fuzzes these inputs, or so long: how many there were, and the findings (at most ten).
pub fn run(target: &mut dyn Target, seed: u64, inputs: Range<u64>, time: Duration) -> (u64, Vec<String>) {
    let (start, mut n, mut findings) = (Instant::now(), inputs.start, Vec::new());
    while n < inputs.end && start.elapsed() < time && findings.len() < 10 {
        // Each input has a seed of its own: a finding is seen again without those before it.
        let mut r = Random::new(seed.wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        r.next();
        if let Err(what) = target.one(&mut r) {
            findings.push(format!("input {n} of seed {seed}: {what}"));
        }
        n += 1;
    }
    (n - inputs.start, findings)
}

/// Changes some bytes.
pub fn mutate(r: &mut Random, bytes: &mut Vec<u8>) {
    for _ in 0..1 + r.below(4) {
        let at = r.below(bytes.len().max(1) as u64) as usize;
        match r.below(8) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << r.below(8),
            1 if !bytes.is_empty() => bytes[at] = r.next() as u8,
            2 => bytes.insert(at, r.next() as u8),
            3 if bytes.len() > 1 => drop(bytes.remove(at)),
            4 => bytes.truncate(at.max(1)),
            5 => {
                let part: Vec<u8> = bytes[at..].iter().take(1 + r.below(16) as usize).copied().collect();
                let to = r.below(bytes.len() as u64 + 1) as usize;
                bytes.splice(to..to, part);
            }
            _ => {
                let v = r.edgy().to_le_bytes();
                let n = r.one_of(&[1usize, 2, 4, 8]).min(bytes.len() - at);
                bytes[at..at + n].copy_from_slice(&v[..n]);
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
}

/// Calls something that must not panic.
fn quietly<T>(what: impl FnOnce() -> T) -> Result<T, String> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(what)).map_err(|e| {
        let text = e.downcast_ref::<String>().cloned().or_else(|| e.downcast_ref::<&str>().map(ToString::to_string));
        format!("a panic: {}", text.unwrap_or_default())
    })
}
