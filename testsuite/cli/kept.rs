//! The persistent translation cache: it is used, and never believed when anything about it is odd. Programs give the same with and
//! without it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn directory(name: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("kept-{name}"));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).expect("a directory");
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).expect("its rights");
    dir
}

fn bivisor(cache: &Path, more: &[&str], program: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bivisor"));
    command.args(["run", "--backend", "bt", "--cache-dir"]).arg(cache).args(more).args(program);
    command.output().expect("bivisor runs")
}

/// Blocks taken over from earlier runs, and all; standard output must be as expected.
fn adopted(cache: &Path, more: &[&str], program: &[&str], output: &str) -> (u64, u64) {
    let out = bivisor(cache, &[more, &["--stats=json"]].concat(), program);
    let error = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{program:?}: {} {error}", out.status);
    assert_eq!(String::from_utf8_lossy(&out.stdout), output, "{program:?}");
    let line = error.lines().find(|l| l.starts_with('{')).unwrap_or_else(|| panic!("no statistics: {error}"));
    let stats: serde_json::Value = serde_json::from_str(line).expect("JSON");
    let number = |name: &str| stats["translated"][name].as_u64().expect("a number");
    (number("adopted"), number("blocks"))
}

/// The one file in a cache.
fn file(cache: &Path) -> PathBuf {
    let mut all: Vec<PathBuf> =
        fs::read_dir(cache).expect("a directory").map(|e| e.expect("an entry").path()).collect();
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

const ECHO: [&str; 3] = ["/bin/echo", "twice", "told"];
const TOLD: &str = "twice told\n";

#[test]
fn a_second_run_takes_over_what_the_first_has_made() {
    let cache = directory("second");
    assert_eq!(adopted(&cache, &[], &ECHO, TOLD).0, 0);
    assert_eq!(fs::metadata(file(&cache)).expect("a file").permissions().mode() & 0o7777, 0o600);
    let (old, all) = adopted(&cache, &[], &ECHO, TOLD);
    assert!(all > 500 && old * 10 > all * 9, "{old} of {all}");
    // Another CPU has other code.
    assert_eq!(adopted(&cache, &["--cpu", "x86-64-v2"], &ECHO, TOLD).0, 0);
    assert_eq!(fs::read_dir(&cache).expect("a directory").count(), 2);
}

#[test]
fn not_wanted_not_kept() {
    let cache = directory("unwanted");
    let home = directory("home");
    let out = Command::new(env!("CARGO_BIN_EXE_bivisor"))
        .args(["run", "--backend", "bt", "--no-cache"])
        .args(ECHO)
        .env("XDG_CACHE_HOME", &cache)
        .env("HOME", &home)
        .output()
        .expect("bivisor runs");
    assert_eq!(out.stdout, TOLD.as_bytes());
    assert_eq!(
        fs::read_dir(&cache).expect("a directory").count() + fs::read_dir(&home).expect("a directory").count(),
        0
    );
}

#[test]
fn damaged_files_are_not_believed() {
    let cache = directory("damaged");
    adopted(&cache, &[], &ECHO, TOLD);
    let path = file(&cache);
    let good = fs::read(&path).expect("a file");
    let (whole, all) = adopted(&cache, &[], &ECHO, TOLD);
    for part in 0..12 {
        // Somewhere in each twelfth, and half of it missing.
        let at = good.len() * part / 12 + 29 * part;
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        fs::write(&path, &bad).expect("written");
        // Around what is missing blocks may be others, and more of them: it is those made anew that count.
        let (old, now) = adopted(&cache, &[], &ECHO, TOLD);
        assert!(now - old > all - whole, "byte {at}: {old} of {now}, not {whole} of {all}");
        fs::write(&path, &good[..at]).expect("written");
        let (old, now) = adopted(&cache, &[], &ECHO, TOLD);
        assert!(now - old > all - whole, "cut at {at}: {old} of {now}, not {whole} of {all}");
    }
    fs::write(&path, &good).expect("written");
    assert_eq!(adopted(&cache, &[], &ECHO, TOLD), (whole, all));
}

/// The same path, another program.
#[test]
fn a_program_that_has_changed_is_translated_anew() {
    let cache = directory("changed");
    let dir = directory("program");
    let program = dir.join("program");
    let path = program.to_str().expect("UTF-8");
    for (tool, sum) in [
        ("/usr/bin/md5sum", "d41d8cd98f00b204e9800998ecf8427e  /dev/null\n"),
        ("/usr/bin/sha1sum", "da39a3ee5e6b4b0d3255bfef95601890afd80709  /dev/null\n"),
    ] {
        fs::copy(tool, &program).expect("a copy");
        let (first, _) = adopted(&cache, &[], &[path, "/dev/null"], sum);
        let (second, all) = adopted(&cache, &[], &[path, "/dev/null"], sum);
        // The loader and the C library are the same for both; what is little is not added to a file.
        assert!(first + 100 < all && second * 10 > all * 9, "{tool}: {first}, {second} of {all}");
    }
}

#[test]
fn what_others_may_write_is_not_used() {
    let cache = directory("others");
    adopted(&cache, &[], &ECHO, TOLD);
    let path = file(&cache);
    assert!(adopted(&cache, &[], &ECHO, TOLD).0 > 0);
    let rights = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("rights");
    rights(&path, 0o620);
    assert_eq!(adopted(&cache, &[], &ECHO, TOLD).0, 0, "a file that the group may write");
    // That run has replaced it.
    assert!(adopted(&cache, &[], &ECHO, TOLD).0 > 0);
    let elsewhere = directory("elsewhere").join("file");
    fs::rename(&path, &elsewhere).expect("moved");
    symlink(&elsewhere, &path).expect("a link");
    assert_eq!(adopted(&cache, &[], &ECHO, TOLD).0, 0, "a symbolic link");
    assert!(!fs::symlink_metadata(&path).expect("a file").is_symlink(), "replaced");
    rights(&cache, 0o777);
    let out = bivisor(&cache, &[], &ECHO);
    assert!(String::from_utf8_lossy(&out.stderr).contains("can be written by others"));
    assert_eq!(out.stdout, TOLD.as_bytes());
    rights(&cache, 0o700);
    let link = directory("link").join("cache");
    symlink(&cache, &link).expect("a link");
    let out = bivisor(&link, &[], &ECHO);
    assert!(String::from_utf8_lossy(&out.stderr).contains("no persistent cache"));
    assert_eq!(out.stdout, TOLD.as_bytes());
}

#[test]
fn several_may_write_at_once() {
    let cache = directory("several");
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..6).map(|_| scope.spawn(|| bivisor(&cache, &[], &ECHO))).collect();
        for run in runs {
            assert_eq!(run.join().expect("no panic").stdout, TOLD.as_bytes());
        }
    });
    // Nothing is left over.
    file(&cache);
    let (old, all) = adopted(&cache, &[], &ECHO, TOLD);
    assert!(old * 10 > all * 9, "{old} of {all}");
}

/// The third of several children has what the first two have used, and so has one that executes another program.
#[test]
fn children_one_after_the_other_do_the_same() {
    let cache = directory("siblings");
    let script = ["/bin/sh", "-c", "for i in 1 2 3 4 5 6 7; do /bin/echo $i; /bin/cat </dev/null; done; /bin/ls -d /"];
    for _ in 0..3 {
        let out = bivisor(&cache, &[], &script);
        let said = String::from_utf8_lossy(&out.stdout);
        assert_eq!(said, "1\n2\n3\n4\n5\n6\n7\n/\n", "{}", String::from_utf8_lossy(&out.stderr));
    }
}

/// A child that is forked, and a program started by a program.
#[test]
fn children_use_it_too() {
    let cache = directory("children");
    let script = ["/bin/sh", "-c", "echo one; (echo two; echo three) | cat; /bin/echo twice told"];
    let expected = "one\ntwo\nthree\ntwice told\n";
    for _ in 0..2 {
        let out = bivisor(&cache, &[], &script);
        assert_eq!(String::from_utf8_lossy(&out.stdout), expected, "{}", String::from_utf8_lossy(&out.stderr));
    }
    let names: Vec<String> = fs::read_dir(&cache)
        .expect("a directory")
        .map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    assert!(names.iter().any(|n| n.starts_with("echo-")), "{names:?}");
    assert!(names.iter().any(|n| n.starts_with("cat-")), "{names:?}");
}
