//! A bug planted in the translator's results under the sentinel: a repro that `bivisor exec` and `bivisor diff replay` play, and the
//! program goes on.

#[path = "../tests/common/mod.rs"]
mod common;
mod fed;

use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::vcpu::{Board, Exit};
use bivisor_testsuite::lockstep::engine::Shared;
use bivisor_testsuite::lockstep::files;
use bivisor_testsuite::lockstep::sentinel::{Entries, Sentinel};
use bivisor_translator::Translator;
use common::planted::{Bug, Planted};
use common::small::{World, program};
use fed::bivisor;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// The bug is in stretches: only there is known which instructions were done.
impl Entries for Planted<Translator> {
    fn run_entries(&mut self, board: Board<'_>, entries: u64) -> Exit {
        self.engine.run_entries(board, entries)
    }
}

#[test]
fn a_bug_under_the_sentinel_becomes_a_repro_and_the_program_goes_on() {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sentinel");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("a directory");
    let model = Arc::new(CpuModel::host());
    let (code, xadd) = program();
    let said: Arc<Mutex<Vec<String>>> = Arc::default();
    let to = said.clone();
    let report = files::report(dir.clone(), move |text| to.lock().expect("no panic").push(text.into()));
    let bug: Bug = Box::new(move |from, s| {
        if from <= xadd && (xadd + 1..xadd + 9).contains(&s.rip) && s.gpr[Gpr::R12 as usize] == 7 {
            s.gpr[Gpr::R9 as usize] ^= 4;
        }
    });
    let end = {
        let world = World::new(&code);
        let engine = Translator::new(model.clone()).expect("executable memory");
        let shared = Shared::new(model, report);
        world.run(&mut Sentinel::new(Planted { engine, bug }, shared, 1).expect("memory"))
    };
    assert_eq!(end.gpr[Gpr::R12 as usize], 0, "it went on to its end");
    let said = said.lock().expect("no panic");
    assert!(said.len() == 1 && said[0].contains("differs in r9: see `bivisor diff replay "), "{said:?}");
    let files: Vec<_> = std::fs::read_dir(&dir).expect("the directory").map(|f| f.expect("a file").path()).collect();
    assert!(files.len() == 1 && said[0].contains(files[0].to_str().expect("a plain path")), "{files:?}");
    let text = std::fs::read_to_string(&files[0]).expect("readable");
    let request: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let differs = request["note"]["differs"].as_array().expect("what differs");
    assert_eq!((differs.len(), &differs[0]["what"]), (1, &"r9".into()));
    // The interpreter played back alone has what it had then, and the translator without the bug has the same.
    for backend in ["interp", "bt"] {
        let output = bivisor(&["exec", "--backend", backend], &text);
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(answer["regs"]["r9"], differs[0]["interp"], "{backend}: {answer}");
        assert_ne!(answer["regs"]["r9"], differs[0]["bt"], "{backend}");
    }
    let output = bivisor(&["diff", "replay", files[0].to_str().expect("a plain path")], "");
    let shown = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && shown.contains("played back alone both do the same"), "{shown}");
    assert!(shown.lines().any(|l| l.trim_start().starts_with("r9 ")), "{shown}");
    std::fs::remove_dir_all(dir).expect("removed");
}
