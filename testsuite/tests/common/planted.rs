//! An engine with a bug planted in what it leaves behind.

use bivisor_emulator::cpu::CpuState;
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Kicker, Vcpu};

/// Told where a run or a stretch began and what is after it, to spoil the latter.
pub type Bug = Box<dyn FnMut(u64, &mut CpuState) + Send>;

/// The engine.
pub struct Planted<V> {
    /// Without the bug.
    pub engine: V,
    /// The bug.
    pub bug: Bug,
}

impl<V: Vcpu> Planted<V> {
    fn spoiled<T>(&mut self, run: impl FnOnce(&mut V) -> T) -> T {
        let from = self.engine.state().rip;
        let done = run(&mut self.engine);
        (self.bug)(from, self.engine.state());
        done
    }
}

impl<V: Vcpu> Vcpu for Planted<V> {
    fn run(&mut self, board: Board<'_>, budget: u64) -> Exit {
        self.spoiled(|e| e.run(board, budget))
    }
    fn run_stretch(&mut self, board: Board<'_>, most: u64) -> (Exit, u64) {
        self.spoiled(|e| e.run_stretch(board, most))
    }
    fn state(&mut self) -> &mut CpuState {
        self.engine.state()
    }
    fn set_intercepts(&mut self, intercepts: Intercepts) {
        self.engine.set_intercepts(intercepts);
    }
    fn kicker(&self) -> Kicker {
        self.engine.kicker()
    }
    fn instructions(&self) -> Option<u64> {
        self.engine.instructions()
    }
}
