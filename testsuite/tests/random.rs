//! Random instructions on the host CPU and on every engine. `RANDOM=n` sets how many, `SEED=n` where they start.

use bivisor_emulator::cpu::{Fault, cpuid::CpuModel};
use bivisor_emulator::interp::alu::Vendor;
use bivisor_testsuite::case::disassembly;
use bivisor_testsuite::engines::engines;
use bivisor_testsuite::generate;
use bivisor_testsuite::random::Random;
use bivisor_testsuite::world::{Outcome, Setup};
use iced_x86::{Decoder, DecoderOptions};
use std::collections::BTreeMap;

const REPORTED: usize = 30;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// RFLAGS bits that must agree. Undefined ones of Intel are not all modelled.
fn compared(setup: &Setup) -> u64 {
    if Vendor::host() == Vendor::Amd {
        return u64::MAX;
    }
    use iced_x86::RflagsBits as B;
    let insn = Decoder::new(setup.bitness, &setup.code, DecoderOptions::NONE).decode();
    let undefined = insn.rflags_undefined();
    let bits = [(B::CF, 1), (B::PF, 4), (B::AF, 0x10), (B::ZF, 0x40), (B::SF, 0x80), (B::OF, 0x800)];
    !bits.iter().filter(|(b, _)| undefined & b != 0).map(|(_, f)| *f).sum::<u64>()
}

/// Of its own half Linux says that a page is there; in RAM of our own none is.
fn without_kernel(fault: Option<Fault>) -> Option<Fault> {
    match fault {
        Some(Fault::Pf { addr, code }) if addr >= 0x7fff_ffff_f000 => Some(Fault::Pf { addr, code: code & !1 }),
        other => other,
    }
}

fn difference(host: &Outcome, out: &Outcome, mask: u64) -> Option<String> {
    if without_kernel(host.fault) != without_kernel(out.fault) {
        return Some(format!("exception {:x?}, CPU {:x?}", out.fault, host.fault));
    }
    for (i, (is, should)) in out.gpr.iter().zip(host.gpr).enumerate() {
        if *is != should {
            return Some(format!("{} is {is:#x}, CPU {should:#x}", bivisor_emulator::isa::Gpr::NAMES[i]));
        }
    }
    if (out.rflags ^ host.rflags) & mask != 0 {
        return Some(format!("flags {:#x}, CPU {:#x}", out.rflags, host.rflags));
    }
    if let Some((addr, is, should)) = out.image.difference(&host.image) {
        return Some(format!("byte at {addr:#x} is {is:#x}, CPU {should:#x}"));
    }
    (!out.other.is_empty()).then(|| format!("changed besides: {}", out.other))
}

#[test]
fn random_instructions() {
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
    let model = CpuModel::host();
    let mut random = Random::new(number("SEED", 0));
    let mut wrong: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    let mut mnemonics = BTreeMap::new();
    let n = number("RANDOM", 10_000);
    let mut done = 0;
    while done < n {
        let bitness = random.one_of(&[64, 64, 64, 32]);
        let Some(setup) = generate::setup(&mut random, bitness, &model) else { continue };
        done += 1;
        let text = disassembly(bitness, &setup.code);
        let mnemonic = Decoder::new(bitness, &setup.code, DecoderOptions::NONE).decode().mnemonic();
        *mnemonics.entry(format!("{mnemonic:?}")).or_insert(0u64) += 1;
        let mut host = None;
        for engine in &mut engines {
            let Ok(out) = (engine.run)(&setup) else { continue };
            *counts.entry(engine.name).or_default() += 1;
            if engine.is_host {
                host = Some(out);
            } else if let Some(d) = host.as_ref().and_then(|h| difference(h, &out, compared(&setup))) {
                let place = format!("{} on {}", format!("{mnemonic:?}").to_lowercase(), engine.name);
                let gpr: Vec<String> = setup.gpr.iter().map(|g| format!("{g:x}")).collect();
                let says = format!(
                    "{bitness} {:02x?} {text}: {d}\n    gpr {} flags {:x}",
                    setup.code,
                    gpr.join(" "),
                    setup.rflags
                );
                wrong.entry(place).or_default().push(says);
            }
        }
    }
    println!("{} mnemonics", mnemonics.len());
    for (engine, n) in counts {
        println!("{n:6} instructions on {engine}");
    }
    let total: usize = wrong.values().map(Vec::len).sum();
    let shown = wrong.iter().map(|(k, v)| format!("{k}, {} times: {}", v.len(), v[0])).take(REPORTED);
    assert!(wrong.is_empty(), "{total} wrong\n{}", shown.collect::<Vec<_>>().join("\n"));
}
