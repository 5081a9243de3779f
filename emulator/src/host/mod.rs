//! The plumbing under engines that share the host's address space: fault-tolerant access, the signal handler, per-thread blocks, the clock.

pub mod clock;
pub mod code_space;
pub mod fds;
pub mod fork;
pub mod fpu;
pub mod inbox;
pub mod inherited;
pub mod kicker;
pub mod probe;
pub mod reserved;
pub mod signal;
pub mod stopwatch;
pub mod syscall;
pub mod thread;
pub mod ticker;
