//! Architectural state: registers as bit fields and plain structs, faults, the offered CPU.

pub mod control;
pub mod cpuid;
pub mod descriptor;
pub mod fault;
pub mod msr;
pub mod rflags;
pub mod segment;
pub mod state;
pub mod xsave;

pub use control::{Cr0, Cr4, Efer};
pub use cpuid::CpuModel;
pub use descriptor::Descriptor;
pub use fault::Fault;
pub use msr::Msrs;
pub use rflags::Rflags;
pub use segment::{Attr, Segment, Table};
pub use state::{Activity, CpuState, Mode};
pub use xsave::XsaveArea;
