//! The hardware-assisted engine over KVM.

mod controllers;
mod counts;
mod exit;
pub mod host;
mod intercept;
mod kick;
mod machine;
mod process;

mod regs;
mod run;
pub mod sample;
mod space;
mod vm;

pub use counts::{Counter, number, returned};
pub use exit::how;
pub use host::{HostKvm, Kind, host};
pub use run::{KvmVcpu, KvmVm};
