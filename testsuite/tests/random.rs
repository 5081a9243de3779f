//! Random instructions on the host CPU and on every engine. `RANDOM=n` sets how many, `SEED=n` where they start.

use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::interp::alu::Vendor;
use bivisor_testsuite::campaign::expected::has_reserved_bits;
use bivisor_testsuite::case::disassembly;
use bivisor_testsuite::engines::engines;
use bivisor_testsuite::generate;
use bivisor_testsuite::random::Random;
use bivisor_testsuite::world::{Outcome, Setup, without_kernel};
use iced_x86::{Decoder, DecoderOptions};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

const REPORTED: usize = 30;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn difference(host: &Outcome, out: &Outcome) -> Option<String> {
    if host.fault.map(without_kernel) != out.fault.map(without_kernel) {
        return Some(format!("exception {:x?}, CPU {:x?}", out.fault, host.fault));
    }
    for (i, (is, should)) in out.gpr.iter().zip(host.gpr).enumerate() {
        if *is != should {
            return Some(format!("{} is {is:#x}, CPU {should:#x}", bivisor_emulator::isa::Gpr::NAMES[i]));
        }
    }
    if out.rflags != host.rflags {
        return Some(format!("flags {:#x}, CPU {:#x}", out.rflags, host.rflags));
    }
    if let (Some(is), Some(should)) = (out.advance, host.advance)
        && is != should
    {
        return Some(format!("RIP moved by {is}, CPU by {should}"));
    }
    if let Some((addr, is, should)) = out.image.difference(&host.image) {
        return Some(format!("byte at {addr:#x} is {is:#x}, CPU {should:#x}"));
    }
    (!out.other.is_empty()).then(|| format!("changed besides: {}", out.other))
}

fn text(setup: &Setup) -> String {
    let mut decoder = Decoder::with_ip(setup.bitness, &setup.code, 0, DecoderOptions::NONE);
    let mut out = Vec::new();
    while decoder.can_decode() && (out.len() as u64) < setup.count {
        let at = decoder.position();
        let insn = decoder.decode();
        out.push(disassembly(setup.bitness, &setup.code[at..at + insn.len()]));
    }
    out.join("; ")
}

/// Runs what `next` makes on the host CPU and on all engines that can be exact.
fn compare(name: &str, n: u64, mut next: impl FnMut(&mut Random) -> Option<Setup>) {
    // The engines of all threads share the pages of the world.
    static WORLD: Mutex<()> = Mutex::new(());
    let _alone = WORLD.lock().unwrap_or_else(|e| e.into_inner());
    let (mut engines, missing) = engines();
    for (name, why) in missing {
        println!("SKIPPED engine {name}: {why}");
    }
    engines.retain(|e| {
        e.inexact.iter().for_each(|why| println!("SKIPPED engine {}: {why}", e.name));
        e.inexact.is_none()
    });
    if !engines.iter().any(|e| e.is_host) {
        println!("SKIPPED: without the host CPU there is nothing to compare with");
        return;
    }
    let mut random = Random::new(number("SEED", 0));
    let mut wrong: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    let mut mnemonics = BTreeSet::new();
    let mut done = 0;
    while done < n {
        let Some(setup) = next(&mut random) else { continue };
        done += 1;
        // Zen 4 carries some out that manuals call invalid: testsuite/expected.txt.
        let invalid = Decoder::new(setup.bitness, &setup.code, DecoderOptions::NONE).decode().is_invalid();
        if invalid && Vendor::host() == Vendor::Amd && has_reserved_bits(&setup.code, setup.bitness) {
            continue;
        }
        let mnemonic = Decoder::new(setup.bitness, &setup.code, DecoderOptions::NONE).decode().mnemonic();
        mnemonics.insert(format!("{mnemonic:?}"));
        let mut host = None;
        for engine in &mut engines {
            let Ok(out) = (engine.run)(&setup) else { continue };
            *counts.entry(engine.name).or_default() += 1;
            if engine.is_host {
                host = Some(out);
            } else if let Some(d) = host.as_ref().and_then(|h| difference(h, &out)) {
                let key = if setup.count > 1 { String::new() } else { format!("{mnemonic:?} ").to_lowercase() };
                let gpr: Vec<String> = setup.gpr.iter().map(|g| format!("{g:x}")).collect();
                let (bits, code, text) = (setup.bitness, &setup.code, text(&setup));
                let state = format!("gpr {} flags {:x}", gpr.join(" "), setup.rflags);
                wrong
                    .entry(format!("{key}on {}", engine.name))
                    .or_default()
                    .push(format!("{bits} {code:02x?} {text}: {d}\n    {state}"));
            }
        }
    }
    println!("{name}: {} first mnemonics", mnemonics.len());
    for (engine, n) in counts {
        println!("{n:6} on {engine}");
    }
    let total: usize = wrong.values().map(Vec::len).sum();
    // The shortest of each kind says most.
    let shortest = |v: &[String]| v.iter().min_by_key(|s| s.len()).cloned().unwrap_or_default();
    let shown = wrong.iter().map(|(k, v)| format!("{k}, {} times: {}", v.len(), shortest(v))).take(REPORTED);
    assert!(wrong.is_empty(), "{total} wrong\n{}", shown.collect::<Vec<_>>().join("\n"));
}

#[test]
fn random_instructions() {
    let model = CpuModel::host();
    compare("instructions", number("RANDOM", 10_000), |random| {
        let bitness = random.one_of(&[64, 64, 64, 32]);
        generate::setup(random, bitness, &model)
    });
}

#[test]
fn random_blocks() {
    let model = CpuModel::host();
    compare("blocks", number("RANDOM", 10_000) / 2, |random| Some(generate::block(random, &model)));
}
