//! Differential fidelity tests: cases as text, the engines they run on, the host CPU as one of them.

pub mod case;
pub mod engines;
pub mod guest;
pub mod host;
pub mod world;
