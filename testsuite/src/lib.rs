//! Differential fidelity tests: cases as text, the engines they run on, the host CPU as one of them.

pub mod board;
pub mod campaign;
pub mod case;
pub mod dispatch;
pub mod engines;
pub mod fuzz;
pub mod generate;
pub mod guest;
pub mod host;
pub mod lockstep;
pub mod pages;
pub mod random;
pub mod world;
