//! Real mode against vectors captured from an 80286 (`bivisor exec --moo`): all registers and memory after each instruction, exceptions
//! included; and the command itself on vectors of our own.
//!
//! The vectors are not in the tree: `BIVISOR_SST80286` names their folder. Where there are none the test says so and passes.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn moo(files: &[PathBuf], more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bivisor"));
    command.arg("exec").arg("--moo").args(files).args(more).output().expect("bivisor starts")
}

/// A chunk: type, length, payload.
fn chunk(kind: &[u8; 4], payload: &[u8]) -> Vec<u8> {
    [&kind[..], &(payload.len() as u32).to_le_bytes(), payload].concat()
}

/// Registers: AX, and all others as given by a mask in the format's order.
fn registers(values: &[(u16, u16)]) -> Vec<u8> {
    let mask = values.iter().fold(0u16, |m, (n, _)| m | 1 << n);
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let words: Vec<u8> = sorted.iter().flat_map(|(_, v)| v.to_le_bytes()).collect();
    chunk(b"REGS", &[&mask.to_le_bytes()[..], &words].concat())
}

/// INC AX; HLT at 0100:0000 with AX = 1, and what is claimed to be in AX and the flags after it.
fn vector(ax: u16, flags: u16) -> Vec<u8> {
    let all: Vec<(u16, u16)> =
        (0..14).map(|n| (n, [1, 0, 0, 0, 0x100, 0x200, 0, 0, 0x80, 0, 0, 0, 0, 2][n as usize])).collect();
    let ram: Vec<u8> = [(0x1000u32, 0x40u8), (0x1001, 0xf4)]
        .iter()
        .flat_map(|(at, v)| [&at.to_le_bytes()[..], &[*v]].concat())
        .collect();
    let ram = chunk(b"RAM ", &[&2u32.to_le_bytes()[..], &ram].concat());
    let before = chunk(b"INIT", &[registers(&all), ram].concat());
    let after = chunk(b"FINA", &registers(&[(0, ax), (12, 2), (13, flags)]));
    let test = [&7u32.to_le_bytes()[..], &chunk(b"NAME", b"\x06\0\0\0inc ax"), &before, &after].concat();
    [chunk(b"MOO ", &[1, 1, 0, 0, 1, 0, 0, 0, b'C', b'2', b'8', b'6']), chunk(b"TEST", &test)].concat()
}

fn written(name: &str, bytes: &[u8]) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&path, bytes).expect("a temporary file");
    path
}

#[test]
fn equal_and_different_vectors() {
    let (right, wrong) = (written("right.moo", &vector(2, 2)), written("wrong.moo", &vector(3, 2)));
    for backend in ["interp", "bt"] {
        let o = moo(std::slice::from_ref(&right), &["--json", "--backend", backend]);
        let r: Value = serde_json::from_slice(&o.stdout).expect("a JSON object");
        assert_eq!((o.status.code(), &r["cases"], &r["equal"]), (Some(0), &1.into(), &1.into()), "{backend}");
    }
    let o = moo(&[wrong], &[]);
    let text = String::from_utf8_lossy(&o.stdout).into_owned();
    assert!(
        o.status.code() == Some(1) && text.contains("1 different") && text.contains("ax 0x0003, here 0x0002"),
        "{text}"
    );
    // Cut off anywhere, the file is refused.
    let whole = vector(2, 2);
    for cut in [1, 30, whole.len() - 1] {
        let o = moo(&[written("cut.moo", &whole[..cut])], &[]);
        assert_eq!(o.status.code(), Some(1), "{cut}");
        assert!(String::from_utf8_lossy(&o.stderr).contains("cut.moo"), "{cut}");
    }
}

#[test]
fn vectors_of_hardware() {
    let folder = std::env::var_os("BIVISOR_SST80286").map(PathBuf::from);
    let Some(entries) = folder.as_ref().and_then(|f| std::fs::read_dir(f).ok()) else {
        println!("SKIPPED: BIVISOR_SST80286 names no folder with 80286 vectors");
        return;
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    files.retain(|p| p.to_string_lossy().ends_with(".MOO.gz"));
    files.sort();
    let o = moo(&files, &["--cpu", "80286"]);
    let text = String::from_utf8_lossy(&o.stdout).into_owned();
    println!("{}", &text[text.find("total:").unwrap_or(0)..]);
    assert_eq!(o.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&o.stderr));
}
