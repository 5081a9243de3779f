//! Lockstep: a process's engine and the interpreter do the same stretches of code, and every register and every byte of memory that
//! the stretch touched is compared.
//!
//! A process's memory is the host's own address space, so two engines cannot both run the program. The reference runs first, on copies
//! of the pages that it touches ([`reference`](mod@reference)); then the engine under test runs for real by as many instructions. System calls happen
//! once. What differs from run to run is taken from the real run: instructions that read the clock or random numbers, and accesses to
//! memory that others write (the kernel's clock page, shared mappings), are done by the tested engine alone. Threads take turns.
//!
//! | module | holds |
//! | --- | --- |
//! | [`reference`](mod@reference) | the interpreter over copies of pages |
//! | [`state`] | comparison of two states |
//! | [`engine`] | the pair, as one engine of a process |
//! | [`sentinel`] | a translator that has one block in so many compared |
//! | [`turn`] | whose turn it is |
//! | [`machine`] | two machines with counted time |
//! | [`files`] | a repro for each difference in a process that goes on |
//! | [`repro`] | a stretch as a request of `bivisor exec` |

pub mod engine;
pub mod files;
pub mod machine;
pub mod reference;
pub mod repro;
pub mod sentinel;
pub mod state;
pub mod turn;
