//! A translator of a process that runs as it always does, and of the blocks that its dispatcher enters has one in so many run on the
//! reference too.
//!
//! Code that leads from block to block never comes to the dispatcher again. So a clock brings a thread out a hundred times a second,
//! and the block it comes to then is compared whatever the count. Other threads go on meanwhile: what they write into the same memory
//! in these microseconds can show as a difference.

use super::engine::{Lockstep, Shared};
use bivisor_emulator::cpu::CpuState;
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Kicker, Vcpu};
use bivisor_translator::Translator;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How often the clock brings a thread out.
const TICK: Duration = Duration::from_millis(10);

/// An engine that comes back after so many ways into its code.
pub trait Entries: Vcpu {
    /// Runs until it has come to its dispatcher `entries` times, or leaves for another reason.
    fn run_entries(&mut self, board: Board<'_>, entries: u64) -> Exit;
}

impl Entries for Translator {
    fn run_entries(&mut self, board: Board<'_>, entries: u64) -> Exit {
        Translator::run_entries(self, board, entries)
    }
}

/// The translator with a sentinel.
pub struct Sentinel<V = Translator> {
    pair: Lockstep<V>,
    every: u64,
    /// What the clock looks at: it ends when this is gone.
    running: Arc<AtomicBool>,
    /// The process in which the clock runs; 0: none yet.
    clock: u32,
}

/// Clocks there are in this process, for tests.
pub static CLOCKS: AtomicU32 = AtomicU32::new(0);

impl<V: Entries> Sentinel<V> {
    /// Compares one block in `every`.
    ///
    /// # Errors
    /// A sentence: no memory.
    pub fn new(translator: V, shared: Arc<Shared>, every: u64) -> Result<Sentinel<V>, String> {
        let pair = Lockstep::new(translator, shared, super::engine::BLOCK)?;
        Ok(Sentinel { pair, every: every.max(1), running: Arc::default(), clock: 0 })
    }

    /// The clock's thread, if it does not run in this process.
    fn start_clock(&mut self) {
        if self.clock == std::process::id() {
            return;
        }
        self.clock = std::process::id();
        self.running = Arc::default();
        let (running, kicker) = (Arc::downgrade(&self.running), self.pair.kicker());
        // Without it only the dispatcher's blocks are compared.
        let _ = std::thread::Builder::new().stack_size(64 << 10).spawn(move || tick(&running, &kicker));
    }
}

fn tick(running: &Weak<AtomicBool>, kicker: &Kicker) {
    // Signals are the guest's threads'.
    bivisor_emulator::host::signal::set_mask(u64::MAX);
    CLOCKS.fetch_add(1, Ordering::Relaxed);
    while let Some(running) = running.upgrade() {
        if running.load(Ordering::Relaxed) {
            kicker.kick();
        }
        drop(running);
        std::thread::sleep(TICK);
    }
    CLOCKS.fetch_sub(1, Ordering::Relaxed);
}

impl<V: Entries> Vcpu for Sentinel<V> {
    fn run(&mut self, board: Board<'_>, budget: u64) -> Exit {
        let Some(flat) = board.mem.flat().filter(|_| budget == u64::MAX) else {
            return self.pair.tested.run(board, budget);
        };
        self.start_clock();
        loop {
            self.running.store(true, Ordering::Relaxed);
            let exit = self.pair.tested.run_entries(board, self.every - 1);
            self.running.store(false, Ordering::Relaxed);
            if !matches!(exit, Exit::Budget | Exit::Kicked) {
                return exit;
            }
            self.pair.forget();
            let left = self.pair.stretch(board, flat);
            match (exit, left) {
                (_, Some(exit)) => return exit,
                // Somebody else may have kicked, too.
                (Exit::Kicked, None) => return Exit::Kicked,
                _ => {}
            }
        }
    }

    fn state(&mut self) -> &mut CpuState {
        self.pair.state()
    }

    fn set_intercepts(&mut self, intercepts: Intercepts) {
        self.pair.set_intercepts(intercepts);
    }

    fn kicker(&self) -> Kicker {
        self.pair.kicker()
    }

    fn around_fork(&mut self, fork: &mut dyn FnMut()) {
        self.pair.around_fork(fork);
    }

    fn survives_fork(&mut self) -> bool {
        self.pair.survives_fork()
    }
}
