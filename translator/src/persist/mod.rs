//! Translations that outlive the process: what was made from a page of code is found again by the content of that page.
//!
//! | module | holds |
//! | --- | --- |
//! | [`hash`] | the sum that pages are known by and clusters are checked with |
//! | [`archive`] | the file: a key, tables, the clusters, each with its sum |
//! | [`cluster`] | what was executed together, as bytes |
//! | [`keep`] | from the store to clusters |
//! | [`adopt`] | from clusters to the store |
//! | [`park`] | from one program to the next in the same process |
//! | [`kin`] | from children to the parent: what the next ones will want |
//!
//! Guest code says nothing of where it lies but relative to itself, so content is enough of a key: an unchanged page at another address,
//! in another file or in another program has the same translation, moved by [`crate::lower::move_code`]; a changed page has none. Only
//! code that the guest cannot write and that comes from a file is kept. A block that is wanted brings its cluster: blocks of one mapping
//! that were first executed one after the other, as one piece of code in which they jump to each other; those of pages that have changed
//! are left out. Where files lie and who may write them is the caller's business:
//! what is in them will be executed.

pub mod adopt;
pub mod archive;
pub mod cluster;
pub mod hash;
pub mod keep;
pub mod kin;
pub mod park;

pub use archive::Archive;
