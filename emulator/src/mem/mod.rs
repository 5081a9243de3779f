//! Guest memory and the way to it.

pub mod flat;
pub mod guest;
pub mod mmu;
pub mod ram;

pub use flat::{FlatSpace, Prot, Vma};
pub use guest::{GuestMemory, PAGE_SIZE};
pub use mmu::Mmu;
pub use ram::Ram;

/// What a memory access is for; decides rights and error code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write (also the read of a read-modify-write).
    Write,
    /// Instruction fetch.
    Execute,
}
