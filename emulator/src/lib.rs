//! The x86 architecture in software: what the manuals say, and the reference engine that does it.
//!
//! Modules, lowest first; a module names only modules above it in this list (the table is checked by `testsuite/tests/tidy.rs`):
//!
//! | module | holds |
//! | --- | --- |
//! | [`isa`] | widths, registers, the facts table, decoded instructions |
//! | [`cpu`] | architectural state: registers, control bits, segments, faults, the offered CPUID |
//! | [`host`] | the thread and signal plumbing under engines that share the host's address space |
//! | [`mem`] | guest memory (RAM or the process's own address space), page walk, TLB |
//! | [`bus`] | the traits between engine and chips |
//! | [`vcpu`] | the contract of the three engines |
//! | [`native`] | running one instruction on the host CPU |
//! | [`interp`] | the interpreter, the reference of all engines |
//! | [`devices`] | the chips of a PC |
//! | [`machine`] | a PC: board, clock, run loop, loading of kernels |
//! | [`linux`] | the Linux process personality |

pub mod bus;
pub mod cpu;
pub mod devices;
pub mod host;
pub mod interp;
pub mod isa;
pub mod linux;
pub mod machine;
pub mod mem;
pub mod native;
pub mod vcpu;
