//! Running one instruction on the host CPU: x87, MMX, SSE, AVX and AVX-512 have the same semantics here and there.
//!
//! [`thunk`] makes a host function of an instruction, [`code`] holds it, [`mod@unit`] finds and calls it. Memory operands, control
//! registers and faults are the interpreter's business ([`crate::interp`]).

pub mod code;
pub mod kind;
pub mod thunk;
pub mod unit;
pub mod x87;

pub use code::{Bounce, Ran};
pub use kind::Needs;
pub use unit::{NativeUnit, Pointers, Thunk};
