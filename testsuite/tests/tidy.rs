//! The rules of the source tree: who may import whom, what a file begins with, how long it may be, where `unsafe` is allowed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Inside `emulator`: a module may name these besides itself. An addition is a decision; ARCHITECTURE.md says why.
const MODULES: &[(&str, &[&str])] = &[
    ("isa", &[]),
    ("cpu", &["isa"]),
    ("host", &["isa"]),
    ("mem", &["isa", "cpu", "host"]),
    ("bus", &[]),
    ("vcpu", &["cpu", "host", "mem", "bus"]),
    ("native", &["isa", "cpu", "host"]),
    ("interp", &["isa", "cpu", "host", "mem", "bus", "vcpu", "native"]),
    ("devices", &["bus", "mem"]),
    ("machine", &["isa", "cpu", "host", "mem", "bus", "vcpu", "devices"]),
    ("linux", &["isa", "cpu", "host", "mem", "bus", "vcpu"]),
];

/// Crates of ours that a crate may depend on.
const CRATES: &[(&str, &[&str])] = &[
    ("emulator", &[]),
    ("translator", &["emulator"]),
    ("kvm-backend", &["emulator"]),
    ("testsuite", &["emulator", "translator", "kvm-backend"]),
    ("bench", &["emulator", "translator", "kvm-backend"]),
];

/// The only files with `unsafe` code.
const UNSAFE: &[&str] = &[
    "emulator/src/host/clock.rs",
    "emulator/src/host/code_space.rs",
    "emulator/src/host/fds.rs",
    "emulator/src/host/fork.rs",
    "emulator/src/host/fpu.rs",
    "emulator/src/host/inbox.rs",
    "emulator/src/host/inherited.rs",
    "emulator/src/host/probe.rs",
    "emulator/src/host/reserved.rs",
    "emulator/src/host/signal.rs",
    "emulator/src/host/syscall.rs",
    "emulator/src/host/thread.rs",
    "emulator/src/host/ticker.rs",
    "emulator/src/linux/host.rs",
    "emulator/src/mem/dma.rs",
    "emulator/src/mem/flat.rs",
    "emulator/src/mem/ram.rs",
    "emulator/src/native/code.rs",
    "emulator/src/native/x87.rs",
    "emulator/tests/native/raw.rs",
    "kvm-backend/src/counts.rs",
    "kvm-backend/src/kick.rs",
    "kvm-backend/src/vm.rs",
    "src/compare/natively.rs",
    "src/ending.rs",
    "src/vessel.rs",
    "testsuite/src/campaign/arena.rs",
    "testsuite/src/campaign/modes/oracle.rs",
    "testsuite/src/campaign/oracle.rs",
    "testsuite/src/host.rs",
    "testsuite/src/world.rs",
    "translator/src/code_buffer.rs",
    "translator/src/enter.rs",
    "translator/src/fault.rs",
    "translator/src/system/area.rs",
    "translator/src/system/enter.rs",
    "translator/src/system/handler.rs",
    "translator/src/system/mirror.rs",
    "translator/src/system/walk.rs",
    "translator/src/system/xsave.rs",
    "translator/tests/flat.rs",
    "translator/tests/threads.rs",
];

/// Flat tables may be longer.
const LONG: &[&str] = &[];
const LINES: usize = 800;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_path_buf()
}

fn walk(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("a directory") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                walk(&path, out);
            }
        } else if name.ends_with(".rs") {
            out.push(path);
        }
    }
}

/// Path relative to the workspace, and text, of every Rust file.
fn sources() -> BTreeMap<String, String> {
    let root = root();
    let mut files = Vec::new();
    walk(&root, &mut files);
    let name = |f: &PathBuf| f.strip_prefix(&root).expect("inside").to_string_lossy().into_owned();
    files.iter().map(|f| (name(f), std::fs::read_to_string(f).expect("readable"))).collect()
}

fn report(wrong: Vec<String>) {
    assert!(wrong.is_empty(), "{} wrong\n{}", wrong.len(), wrong.join("\n"));
}

/// Modules named as `crate::name` in code.
fn named(text: &str) -> BTreeSet<&str> {
    let mut out = BTreeSet::new();
    for line in text.lines().filter(|l| !l.trim_start().starts_with("//")) {
        for rest in line.split("crate::").skip(1) {
            // `use crate::{a, b}` hides names from this test.
            assert!(!rest.starts_with('{'), "one `use crate::module` a line: `{line}`");
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            out.insert(&rest[..end]);
        }
    }
    out
}

#[test]
fn modules_import_only_what_the_table_allows() {
    let mut wrong = Vec::new();
    for (file, text) in sources() {
        let Some(rest) = file.strip_prefix("emulator/src/").filter(|r| *r != "lib.rs") else { continue };
        let module = rest.split(['/', '.']).next().expect("a name");
        let Some((_, allowed)) = MODULES.iter().find(|(m, _)| *m == module) else {
            wrong.push(format!("{file}: the module is not in the table"));
            continue;
        };
        for name in named(&text) {
            let known = MODULES.iter().any(|(m, _)| *m == name);
            if known && name != module && !allowed.contains(&name) {
                wrong.push(format!("{file}: {module} must not import {name}"));
            }
        }
    }
    report(wrong);
}

#[test]
fn crates_depend_only_on_what_the_table_allows() {
    let mut wrong = Vec::new();
    for (dir, allowed) in CRATES {
        let manifest = std::fs::read_to_string(root().join(dir).join("Cargo.toml")).expect("a manifest");
        for (other, _) in CRATES {
            let named = manifest.lines().any(|l| l.starts_with(&format!("bivisor-{other}")));
            if named && !allowed.contains(other) {
                wrong.push(format!("{dir} must not depend on {other}"));
            }
        }
    }
    report(wrong);
}

#[test]
fn every_file_says_what_it_is() {
    let undocumented = sources().into_iter().filter(|(_, t)| !t.starts_with("//! "));
    report(undocumented.map(|(f, _)| format!("{f}: the first line is no `//!`")).collect());
}

#[test]
fn no_file_is_too_long() {
    let lines = |t: &String| t.lines().count();
    let long = sources().into_iter().filter(|(f, t)| lines(t) > LINES && !LONG.contains(&f.as_str()));
    report(long.map(|(f, t)| format!("{f}: {} lines", lines(&t))).collect());
}

#[test]
fn unsafe_code_is_where_the_list_says() {
    let attribute = "#![allow(unsafe_code)]";
    let mut wrong = Vec::new();
    for (file, text) in sources() {
        // Only inner attributes at the start of a line: this file quotes one.
        let allowed = text.lines().any(|l| l == attribute);
        if allowed && !UNSAFE.contains(&file.as_str()) {
            wrong.push(format!("{file} allows unsafe code and is not in the list"));
        }
        if !allowed
            && text.lines().any(|l| l.contains("allow(unsafe_code)") && !l.contains(attribute))
            && file != "testsuite/tests/tidy.rs"
        {
            wrong.push(format!("{file}: allow it for the whole file, or not at all"));
        }
    }
    for file in UNSAFE {
        let text = std::fs::read_to_string(root().join(file)).unwrap_or_default();
        if !text.lines().any(|l| l == attribute) {
            wrong.push(format!("{file} is in the list and does not allow unsafe code"));
        }
    }
    report(wrong);
}
