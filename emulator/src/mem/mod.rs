//! Guest memory and the way to it.

pub mod dma;
pub mod flat;
pub mod guest;
pub mod mmu;
pub mod paging;
pub mod ram;
pub mod tlb;

pub use flat::{FlatSpace, Prot, Vma};
pub use guest::{GuestMemory, PAGE_SIZE};
pub use mmu::{Flushed, Mmu};
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

/// Who makes a memory access, as far as paging asks (SDM 3A 4.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum By {
    /// Code at CPL 3.
    User,
    /// Code at CPL 0 to 2.
    Supervisor,
    /// The processor itself, at any CPL: descriptor tables, TSS, IDT. SMAP cannot be lifted for it.
    Implicit,
}
