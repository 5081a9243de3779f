//! Every sensitive instruction (Popek and Goldberg 1974), and nothing else.
//!
//! Privilege and intercepts were checked before, from the facts table; what these functions check is what the manual's pseudo-code
//! has besides.

pub mod control;
pub mod cpuid;
pub mod eflags;
pub mod far;
pub mod fast;
pub mod halt;
pub mod interrupt;
pub mod io;
pub mod iret;
#[cfg(test)]
mod legacy_tests;
pub mod msr;
pub mod segment;
pub mod selector;
pub mod switch;
pub mod table;
pub mod task;
#[cfg(test)]
pub(crate) mod testing;
pub mod time;
