//! Every sensitive instruction (Popek and Goldberg 1974), and nothing else.
//!
//! Privilege and intercepts were checked before, from the facts table; what these functions check is what the manual's pseudo-code
//! has besides.

pub mod eflags;
pub mod segment;
pub mod selector;
pub mod table;
#[cfg(test)]
#[allow(dead_code)]
pub(crate) mod testing;
pub mod time;
