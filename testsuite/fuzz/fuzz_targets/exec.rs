//! The JSON of `bivisor exec`: any text as a request, read and set up; some instructions on the interpreter; the answer.
//!
//! The command's own files are parts of this program, so that libFuzzer sees their branches.
#![no_main]
#![allow(dead_code)]

use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::vcpu::{Board, Intercepts, Vcpu};
use std::cell::RefCell;

#[path = "../../../src/decode.rs"]
mod decode;

#[path = "."]
mod exec {
    #[path = "../../../src/exec/flat.rs"]
    pub mod flat;
    #[path = "../../../src/exec/number.rs"]
    pub mod number;
    #[path = "../../../src/exec/request.rs"]
    pub mod request;
    #[path = "../../../src/exec/response.rs"]
    pub mod response;
    #[path = "../../../src/exec/setup.rs"]
    pub mod setup;
    #[path = "../../../src/exec/world.rs"]
    pub mod world;
}

use exec::request::{Model, Request};
use exec::{response, setup, world::World};

thread_local! {
    static WORLD: RefCell<(World, Interpreter)> =
        RefCell::new((World::new().expect("memory"), Interpreter::default()));
}

fn one(input: &[u8]) {
    let Ok(r) = serde_json::from_slice::<Request>(input) else { return };
    // It names a file of the host.
    if r.elf.is_some() {
        return;
    }
    let Ok(mut state) = setup::state(&r) else { return };
    WORLD.with_borrow_mut(|(world, engine)| {
        if world.set_up(&r, &mut state).is_ok() {
            *engine.state() = state;
            engine.set_intercepts(Intercepts::EXCEPTIONS | Intercepts::SYSCALL | Intercepts::SYSENTER);
            // In flat memory the code could reach this process's own.
            if matches!(r.memory, Model::Ram) {
                engine.run(Board { mem: world.memory(), bus: &world.ports }, 50);
            }
            let s = engine.state();
            let answer = (response::regs(s), response::segs(s), response::sys(s), response::fpu(s), response::vec(s));
            serde_json::to_string(&answer).expect("responses are plain data");
        }
        world.ports.take();
        world.finish(&[], true);
    });
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| one(input));
