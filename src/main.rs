//! The `bivisor` command line.
fn main() {}
