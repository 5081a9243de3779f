//! The plumbing under engines that share the host's address space: fault-tolerant access, the signal handler, per-thread blocks.

pub mod probe;
pub mod signal;
pub mod thread;
