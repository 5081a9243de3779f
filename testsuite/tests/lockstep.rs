//! Lockstep of the engines of a process: a small program runs through without a difference, and a bug planted in the translator's
//! results is found.

mod common;

use bivisor_emulator::cpu::Rflags;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::vcpu::Vcpu;
use bivisor_testsuite::lockstep::engine::{BLOCK, Difference, Lockstep, Shared};
use bivisor_testsuite::lockstep::sentinel::Sentinel;
use bivisor_translator::Translator;
use common::planted::{Bug, Planted};
use common::small::{ROUNDS, World, program};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

type Found = Arc<Mutex<Vec<Difference>>>;

fn shared(model: &Arc<CpuModel>) -> (Arc<Shared>, Found) {
    let found = Found::default();
    let to = found.clone();
    (Shared::new(model.clone(), Box::new(move |d| to.lock().expect("no panic").push(d.clone()))), found)
}

fn translator(model: &Arc<CpuModel>) -> Translator {
    Translator::new(model.clone()).expect("executable memory")
}

#[test]
fn engines_agree_on_a_small_program() {
    let model = Arc::new(CpuModel::host());
    let (code, _) = program();
    let engines: [(&str, Box<dyn Vcpu>, usize); 4] = [
        ("bt by blocks", Box::new(translator(&model)), BLOCK),
        ("bt by instructions", Box::new(translator(&model)), 1),
        ("interp", Box::new(Interpreter::new(model.clone())), BLOCK),
        ("bt by threes", Box::new(translator(&model)), 3),
    ];
    for (name, engine, most) in engines {
        let world = World::new(&code);
        let (shared, found) = shared(&model);
        let mut pair = Lockstep::new(engine, shared.clone(), most).expect("memory");
        world.run(&mut pair);
        let found = found.lock().expect("no panic");
        assert!(
            found.is_empty(),
            "{name}: {:#x?}",
            found.first().map(|d| (&d.changes, &d.trace, &d.ends, d.start.rip))
        );
        let n = shared.counts.instructions.load(Ordering::Relaxed);
        let clock = shared.counts.apart[0].load(Ordering::Relaxed);
        let rounds = u64::from(ROUNDS);
        assert!(n >= rounds * 24 && clock == rounds, "{name}: {n} instructions compared, {clock} of the clock");
    }
}

#[test]
fn a_planted_bug_is_found_in_the_pair() {
    let model = Arc::new(CpuModel::host());
    let (code, xadd) = program();
    let world = World::new(&code);
    let (shared, found) = shared(&model);
    // It gets the flags of one instruction wrong in one round; ADC or INC have not set them anew.
    let bug: Bug = Box::new(move |from, s| {
        if from <= xadd && (xadd + 1..xadd + 9).contains(&s.rip) && s.gpr[Gpr::R12 as usize] == 7 {
            s.rflags.toggle(Rflags::AF);
        }
    });
    let planted = Planted { engine: translator(&model), bug };
    let mut pair = Lockstep::new(planted, shared, 1).expect("memory");
    world.run(&mut pair);
    let found = found.lock().expect("no panic");
    assert_eq!(found.len(), 1, "{:?}", found.iter().map(|d| &d.changes).collect::<Vec<_>>());
    let d = &found[0];
    assert_eq!((d.start.rip, d.changes.len(), d.changes[0].what.as_str()), (xadd, 1, "rflags"), "{:?}", d.changes);
    let request = d.request("bt");
    assert_eq!((&request["memory"], &request["stop"]["insns"]), (&"flat".into(), &1.into()));
    assert!(
        request["mem"].as_array().is_some_and(|m| m.iter().any(|m| m["addr"] == "0x20010000" && m["rights"] == "rw"))
    );
}

#[test]
fn the_sentinel_compares_and_the_program_goes_on() {
    let model = Arc::new(CpuModel::host());
    let (code, _) = program();
    for every in [1, 3] {
        let world = World::new(&code);
        let (shared, found) = shared(&model);
        let mut sentinel = Sentinel::new(translator(&model), shared.clone(), every).expect("memory");
        let end = world.run(&mut sentinel);
        assert!(
            found.lock().expect("no panic").is_empty(),
            "1/{every}: {:?}",
            found.lock().expect("no panic")[0].changes
        );
        assert_eq!(end.gpr[Gpr::R12 as usize], 0);
        let n = shared.counts.stretches.load(Ordering::Relaxed);
        assert!(n > 0, "1/{every}: {n} compared");
    }
}
