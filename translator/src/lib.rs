//! The translator: x86-64 code becomes x86-64 code with the same registers, in a code cache (VMware's scheme: Bugnion et al., TOCS
//! 2012; Adams and Agesen, ASPLOS 2006).
//!
//! | module | holds |
//! | --- | --- |
//! | [`route`] | which way each instruction is lowered |
//! | [`block`] | guest code, decoded up to a branch |
//! | [`lower`] | guest block to host code, one file a way |
//! | [`marks`] | host PC back to guest state |
//! | [`emit`] | the assembler's buffer; slots of the thread block |
//! | [`cache`] | the code cache as threads share it: locking, flushing, fork |
//! | [`store`] | its content: blocks, links, landings, pages |
//! | [`index`] | guest address to block |
//! | [`exits`] | why translated code is left, by number |
//! | [`code_buffer`] | executable memory (unsafe) |
//! | [`enter`] | the way in and out (unsafe) |
//! | [`system`] | guest RAM behind page tables, all privilege levels |
//! | [`persist`] | translations that outlive the process |
//! | [`explain`] | one block for people to read |
//! | `trace` | hot paths through several blocks as one |
//! | [`fault`] | signals that arrive in the cache (unsafe) |
//!
//! Processes (flat memory, guest address = host address) and machines ([`system`]) have translators of their own: the former copies
//! memory operands as they are and shares its cache among threads, the latter checks every access. 64-bit code is translated, by the latter
//! 32-bit code with flat segments too; everything else, and every instruction that cannot be copied or rewritten, is done by the interpreter.

mod astray;
pub mod block;
pub mod cache;
pub mod code_buffer;
pub mod emit;
pub mod enter;
pub mod exits;
pub mod explain;
pub mod fault;
pub mod index;
pub mod jitdump;
mod known;
pub mod lower;
pub mod marks;
pub mod persist;
mod registers;
pub mod route;
mod run;
pub mod stats;
pub mod store;
pub mod system;
mod trace;

pub use cache::Cache;
pub use route::{Policy, how};
pub use run::Translator;
pub use stats::{CacheStats, Stats};
