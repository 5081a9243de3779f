//! `bivisor run --stats` and `--perf`.

use serde_json::Value;
use std::process::{Command, Output};

fn bivisor(options: &[&str], program: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bivisor"))
        .arg("run")
        .args(options)
        .arg("--")
        .args(program)
        .output()
        .expect("bivisor starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn numbers_for_machines_and_for_people() {
    // With kept translations there would be nothing to translate.
    let output = bivisor(&["--backend", "bt", "--no-cache", "--stats=json"], &["/bin/echo", "hello"]);
    assert!(output.status.success());
    assert_eq!(text(&output.stdout), "hello\n");
    let all: Value = serde_json::from_str(&text(&output.stderr)).expect("one object");
    let number = |path: &str| all.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path}: {all}"));
    let blocks = number("/translated/blocks");
    assert!(blocks > 100, "{all}");
    assert!(number("/translated/instructions") > blocks, "{all}");
    assert!(number("/translated/guest_bytes") > number("/translated/instructions"), "{all}");
    assert!(number("/translated/host_bytes") > number("/translated/guest_bytes"), "{all}");
    assert!(number("/translated/nanoseconds") > 0, "{all}");
    // execve's successor to exit_group: a dynamic program has at least a dozen system calls.
    assert!(number("/exits/syscall") > 5 && number("/system_calls_inside") > 2, "{all}");
    assert!(number("/exits/syscall") + number("/system_calls_inside") > 12, "{all}");
    assert!(number("/memory/bytes") > number("/translated/host_bytes"), "{all}");
    assert!(number("/memory/guest_bytes") > 1000, "{all}");
    assert!(number("/entries") >= number("/exits/syscall") + number("/exits/unlinked"), "{all}");

    let output = bivisor(&["--backend", "bt", "--stats"], &["/bin/sh", "-c", "kill -9 $$; echo unreached"]);
    assert!(text(&output.stdout).is_empty());
    let output = bivisor(&["--backend", "bt", "--stats"], &["/bin/sh", "-c", "exec /bin/echo hello 2>&-"]);
    assert_eq!(text(&output.stdout), "hello\n");
    // The shell's numbers are gone with it; the program's come though it has no standard error.
    let stderr = text(&output.stderr);
    assert_eq!(stderr.matches("bivisor: what the translator did").count(), 0, "{stderr}");
    let output = bivisor(&["--backend", "bt", "--stats"], &["/bin/sh", "-c", "exec 2>&-; true"]);
    let stderr = text(&output.stderr);
    assert_eq!(stderr.matches("bivisor: what the translator did").count(), 1, "{stderr}");
}

#[test]
fn a_map_for_perf() {
    let output = bivisor(&["--backend", "bt", "--perf", "--stats=json"], &["/bin/true"]);
    let all: Value = serde_json::from_str(&text(&output.stderr)).expect("one object");
    let path = format!("/tmp/perf-{}.map", all["pid"]);
    let map = std::fs::read_to_string(&path).expect("the map");
    std::fs::remove_file(&path).expect("removed");
    for line in map.lines() {
        let words: Vec<&str> = line.splitn(3, ' ').collect();
        let [at, size, name] = words[..] else { panic!("{line}") };
        assert!(u64::from_str_radix(at, 16).is_ok() && u64::from_str_radix(size, 16).is_ok(), "{line}");
        assert!(name.starts_with("guest:"), "{line}");
    }
    assert!(map.lines().count() as u64 >= all["translated"]["blocks"].as_u64().expect("a number"), "{all}");
    let path = format!("/tmp/jit-{}.dump", all["pid"]);
    let dump = std::fs::read(&path).expect("the map with code");
    std::fs::remove_file(&path).expect("removed");
    assert_eq!(&dump[..4], b"DTiJ");
    assert_eq!(dump.windows(6).filter(|w| w == b"guest:").count(), map.lines().count(), "{all}");
}

#[test]
fn other_engines_have_none() {
    let output = bivisor(&["--backend", "interp", "--stats"], &["/bin/true"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("use --backend bt"), "{}", text(&output.stderr));
}
