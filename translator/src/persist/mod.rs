//! Translations that outlive the process: what was made from a page of code is found again by the content of that page.
//!
//! | module | holds |
//! | --- | --- |
//! | [`hash`] | the sum that pages are known by and records are checked with |
//! | [`archive`] | the file: a key, a table of records, the records, each with its sum |
//! | [`record`] | what was made from one page, as bytes |
//! | [`adopt`] | between records and the store |
//! | [`park`] | from one program to the next in the same process |
//!
//! Guest code says nothing of where it lies but relative to itself, so content is enough of a key: an unchanged page at another address,
//! in another file or in another program has the same translation, moved by [`crate::lower::move_code`]; a changed page has none. Only
//! code that the guest cannot write and that comes from a file is kept. Where files lie and who may write them is the caller's business:
//! what is in them will be executed.

pub mod adopt;
pub mod archive;
pub mod hash;
pub mod park;
pub mod record;

pub use archive::Archive;
