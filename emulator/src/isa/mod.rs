//! What the manuals say about instructions: no state, no engine.

pub mod decode;
pub mod exits;
pub mod facts;
pub mod host_cpu;
pub mod insn;
mod length;
pub mod reg;
pub mod width;

pub use decode::{DecodeError, MAX_INSN_LEN, decode};
pub use facts::{Class, Facts, Privilege, Sensitivity, StateImage, facts, state_image};
pub use insn::{Base, Insn, MemRef, Operand};
pub use reg::{Gpr, Seg};
pub use width::Width;
