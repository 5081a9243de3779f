//! Each fuzz target for some inputs of a fixed seed, and that a target sees what is wrong.

use bivisor_testsuite::fuzz::{self, TARGETS, Target};
use bivisor_testsuite::random::Random;
use std::path::Path;
use std::time::Duration;

#[test]
fn no_target_finds_anything_in_a_slice() {
    slices(TARGETS.into_iter().zip([20_000, 3000, 300, 200, 4000, 1000]));
}

/// Devices programmed at random, each for some inputs of up to 300 accesses.
#[test]
fn no_device_can_be_programmed_to_death() {
    slices(fuzz::devices().map(|name| (name, 150)));
}

/// So many inputs of each target.
fn slices(targets: impl Iterator<Item = (&'static str, u64)>) {
    for (name, inputs) in targets {
        let mut target = match fuzz::target(name, Path::new(env!("CARGO_BIN_EXE_bivisor"))) {
            Ok(target) => target,
            Err(why) => panic!("{name}: {why}"),
        };
        let (n, findings) = fuzz::run(&mut *target, 5, 0..inputs, Duration::from_secs(60));
        println!("{name}: {n} inputs");
        assert!(findings.is_empty(), "{name}: {}", findings.join("\n"));
        assert!(n > 0, "{name}");
    }
}

/// A target that is wrong about one input in a hundred.
struct Wrong;

impl Target for Wrong {
    fn one(&mut self, r: &mut Random) -> Result<(), String> {
        if r.once_in(100) { Err("wrong".into()) } else { Ok(()) }
    }
}

#[test]
fn findings_are_seen_again_by_their_number() {
    let (_, findings) = fuzz::run(&mut Wrong, 7, 0..2000, Duration::from_secs(60));
    assert!(!findings.is_empty());
    let number: u64 = findings[0].split(' ').nth(1).and_then(|n| n.parse().ok()).expect("its number");
    assert_eq!(fuzz::run(&mut Wrong, 7, number..number + 1, Duration::from_secs(60)).1, findings[..1]);
}

/// What is no UTF-8 is malformed input, status 2, as other input that is no JSON. Found by fuzzing.
#[test]
fn exec_takes_what_is_no_utf_8_for_malformed() {
    use std::io::Write;
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_bivisor"))
        .arg("exec")
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("bivisor runs");
    child.stdin.take().expect("a pipe").write_all(b"{\"regs\":{\"r\xffx\":1}}\n").expect("it reads");
    let out = child.wait_with_output().expect("it ends");
    assert_eq!(out.status.code(), Some(2), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(String::from_utf8_lossy(&out.stderr).lines().count(), 1);
}
