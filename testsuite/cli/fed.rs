//! The program as built, with something to read.

use std::io::Write;
use std::process::{Command, Output, Stdio};

/// Runs it with arguments and standard input to its end.
pub fn bivisor(args: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_bivisor"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("bivisor starts");
    let mut stdin = child.stdin.take().expect("piped");
    let input = input.to_owned();
    let writer = std::thread::spawn(move || {
        // The child may stop reading at a malformed line.
        let _ = stdin.write_all(input.as_bytes());
    });
    let output = child.wait_with_output().expect("bivisor ends");
    writer.join().expect("writer");
    output
}
