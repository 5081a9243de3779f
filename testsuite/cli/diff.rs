//! `bivisor diff` as built: the campaign's slice of every test run, shards, resuming, wrong use.

use std::path::Path;
use std::process::{Command, Output};

fn bivisor(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bivisor")).args(args).output().expect("bivisor runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(out: &Output) -> serde_json::Value {
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}{}", text(&out.stdout), text(&out.stderr)))
}

fn has_xsave() -> bool {
    let have = std::is_x86_feature_detected!("xsave");
    if !have {
        eprintln!("SKIPPED: the host CPU has no XSAVE");
    }
    have
}

/// A million cases of a fixed seed on the interpreter, the translator and the host CPU.
#[test]
fn a_million_cases() {
    if !has_xsave() {
        return;
    }
    let out = bivisor(&["diff", "--all", "--cases", "1000000", "--seed", "1"]);
    println!("{}", text(&out.stdout));
    assert_eq!(out.status.code(), Some(0), "{}{}", text(&out.stdout), text(&out.stderr));
}

/// Shards are parts of the whole, whatever the number of workers; a state file goes on where it was.
#[test]
fn shards_workers_and_resuming_give_the_same_results() {
    if !has_xsave() {
        return;
    }
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("shards");
    std::fs::create_dir_all(&dir).expect("a directory");
    let whole = json(&bivisor(&["diff", "--all", "--cases", "40000", "--seed", "5", "--jobs", "1", "--json"]));
    let mut files = Vec::new();
    for shard in ["0/3", "1/3", "2/3"] {
        let file = dir.join(format!("{}.json", &shard[..1]));
        let state = dir.join(format!("{}.state", &shard[..1]));
        let _ = std::fs::remove_file(&state);
        let state = state.to_str().expect("a plain path");
        let args = ["diff", "--all", "--cases", "40000", "--seed", "5", "--jobs", "2", "--shard", shard, "--json"];
        let args: Vec<&str> = args.into_iter().chain(["--state", state]).collect();
        let first = bivisor(&args);
        // Everything is done: nothing is done twice.
        assert_eq!(json(&bivisor(&args))["tally"]["cases"], json(&first)["tally"]["cases"]);
        std::fs::write(&file, &first.stdout).expect("writable");
        files.push(file.to_str().expect("a plain path").to_owned());
    }
    let mut args = vec!["diff", "merge", "--json"];
    args.extend(files.iter().map(String::as_str));
    let merged = json(&bivisor(&args));
    assert_eq!(merged["tally"]["cases"], whole["tally"]["cases"]);
    assert_eq!(merged["tally"]["counts"], whole["tally"]["counts"]);
    let twice = bivisor(&["diff", "merge", &files[0], &files[0]]);
    assert!(text(&twice.stderr).contains("given already"), "{}", text(&twice.stderr));
}

#[test]
fn wrong_use_is_told_in_a_line() {
    let rows: [(&[&str], &str); 4] = [
        (&["diff"], "nothing to do"),
        (&["diff", "--all", "--engines", "interp,qemu"], "no engine is called qemu"),
        (&["diff", "--all", "--shard", "4/4"], "from 0 to 3"),
        (&["diff", "--all", "--engines", "interp"], "needs two"),
    ];
    for (args, what) in rows {
        let out = bivisor(args);
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        assert!(text(&out.stderr).contains(what), "{args:?}: {}", text(&out.stderr));
        assert_eq!(text(&out.stderr).lines().count(), 1, "{args:?}: {}", text(&out.stderr));
    }
}
