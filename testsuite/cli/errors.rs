//! Bad input: one clear line on standard error, the right exit status, no panic, nothing left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const ENGINES: [&str; 2] = ["interp", "bt"];

fn directory(name: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("errors-{name}"));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).expect("temporary directory");
    dir
}

fn run(engine: &str, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bivisor"))
        .args(["run", "--backend", engine, "--"])
        .args(args)
        .output()
        .expect("bivisor starts")
}

fn executable(dir: &Path, name: &str, bytes: &[u8]) -> String {
    let path = dir.join(name);
    fs::write(&path, bytes).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("permissions");
    path.to_str().expect("plain path").to_owned()
}

/// Fails with status 1 and one line that holds all the words.
fn fails(engine: &str, path: &str, words: &[&str]) {
    let output = run(engine, &[path]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{path}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{path}: {stderr}");
    assert!(stderr.starts_with("bivisor: "), "{path}: {stderr}");
    assert!(!stderr.contains("panicked"), "{path}: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{path}: no `{word}` in: {stderr}");
    }
}

/// What a machine would start is not only refused: the command that starts it is named.
#[test]
fn kernels_and_images_point_to_boot() {
    let dir = directory("images");
    let mut linux = vec![0; 0x400];
    linux[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    linux[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
    let mut cd = vec![0; 0x9000];
    cd[0x8001..0x8006].copy_from_slice(b"CD001");
    let mut multiboot = vec![0; 0x100];
    multiboot[..12].copy_from_slice(&[0x02, 0xb0, 0xad, 0x1b, 0, 0, 0, 0, 0xfe, 0x4f, 0x52, 0xe4]);
    let mut sector = vec![0; 512];
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    for engine in ENGINES {
        let points = |name: &str, bytes: &[u8], words: &[&str]| {
            let path = executable(&dir, name, bytes);
            fails(engine, &path, &[words, &[&path[..], "bivisor boot"]].concat());
        };
        points("vmlinuz", &linux, &["a Linux kernel", "--kernel"]);
        points("cd.iso", &cd, &["a CD image", "--cdrom"]);
        points("kernel", &multiboot, &["a multiboot kernel", "--kernel"]);
        points("disk", &sector, &["boot sector", "--drive if=ide,file="]);
    }
}

#[test]
fn files_that_are_no_programs() {
    let dir = directory("files");
    let good = fs::read("/bin/true").expect("/bin/true");
    let patched = |offset: usize, bytes: &[u8]| {
        let mut v = good.clone();
        v[offset..offset + bytes.len()].copy_from_slice(bytes);
        v
    };
    let interp = {
        let at = good.windows(10).position(|w| w == b"/lib64/ld-").expect("a dynamic program");
        patched(at, b"/nowhere/x")
    };
    let text = executable(&dir, "text", b"echo hello\n");
    let no_right = dir.join("no-right");
    fs::write(&no_right, &good).expect("written");
    let cases: Vec<(String, &[&str])> = vec![
        ("/nonexistent/program".into(), &["/nonexistent/program", "No such file"]),
        ("no-such-program-on-the-path".into(), &["no-such-program-on-the-path"]),
        (dir.to_str().expect("plain").into(), &["directory"]),
        (no_right.to_str().expect("plain").into(), &["ermission"]),
        (executable(&dir, "empty", b""), &["empty"]),
        (text, &["text"]),
        (executable(&dir, "header-cut", &good[..40]), &["header-cut", "truncated"]),
        (executable(&dir, "tables-cut", &good[..100]), &["tables-cut", "truncated"]),
        (executable(&dir, "body-cut", &good[..good.len() / 4]), &["body-cut", "truncated"]),
        (executable(&dir, "aarch64", &patched(18, &[183, 0])), &["aarch64", "x86-64"]),
        (executable(&dir, "elf32", &patched(4, &[1])), &["elf32", "32-bit"]),
        (executable(&dir, "object", &patched(16, &[1, 0])), &["object"]),
        (executable(&dir, "no-headers", &patched(56, &[0, 0])), &["no-headers"]),
        (executable(&dir, "interpreter", &interp), &["/nowhere/x"]),
        (executable(&dir, "script", b"#!/nowhere/shell\n"), &["/nowhere/shell"]),
        (executable(&dir, "script-empty", b"#!\n"), &["script-empty"]),
    ];
    for engine in ENGINES {
        for (path, words) in &cases {
            fails(engine, path, words);
        }
    }
    fs::remove_dir_all(&dir).expect("removed");
}

/// Every single byte of the ELF header and the program headers damaged: never a panic, never a hang.
#[test]
fn damaged_headers_never_panic() {
    let dir = directory("damaged");
    let good = fs::read("/bin/true").expect("/bin/true");
    for offset in (0..64 + 56 * 6).step_by(3) {
        let mut bad = good.clone();
        bad[offset] ^= 0xff;
        let path = executable(&dir, "damaged", &bad);
        let output = Command::new("timeout")
            .args(["20", env!("CARGO_BIN_EXE_bivisor"), "run", "--backend", "interp", "--", &path])
            .output()
            .expect("timeout runs");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!stderr.contains("panicked"), "byte {offset}: {stderr}");
        assert_ne!(output.status.code(), Some(124), "byte {offset}: hangs");
    }
    fs::remove_dir_all(&dir).expect("removed");
}

#[test]
fn usage() {
    for args in
        [&["run"][..], &["run", "--backend", "magic", "true"], &["nonsense"], &["run", "--no-such-option", "true"], &[]]
    {
        let output = Command::new(env!("CARGO_BIN_EXE_bivisor")).args(args).output().expect("bivisor starts");
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(!output.stderr.is_empty(), "{args:?}");
    }
    let help = Command::new(env!("CARGO_BIN_EXE_bivisor")).args(["run", "--help"]).output().expect("bivisor starts");
    assert!(help.status.success());
    assert!(String::from_utf8_lossy(&help.stdout).contains("Example"));
}

/// A guest that crashes: one line with RIP, signal and instruction; the exit status is the shell's.
#[test]
fn guests_that_crash() {
    if Command::new("cc").arg("--version").output().is_err() {
        println!("SKIPPED: guests that crash: no C compiler");
        return;
    }
    let dir = directory("crash");
    let sources = [
        ("null", "int main(void){((void(*)(void))0)();return 0;}", libc_signal("SEGV"), &["SIGSEGV", "0x0"][..]),
        ("ud2", "int main(void){__builtin_trap();}", libc_signal("ILL"), &["SIGILL", "ud2"]),
        (
            "divide",
            "int main(int c,char**v){volatile int z=c-1,n=7;return n/z;}",
            libc_signal("FPE"),
            &["SIGFPE", "idiv"],
        ),
        ("write", "int main(void){*(volatile int*)0x10=1;return 0;}", libc_signal("SEGV"), &["SIGSEGV", "mov"]),
        ("abort", "#include <stdlib.h>\nint main(void){abort();}", libc_signal("ABRT"), &[]),
        ("hlt", "int main(void){__asm__ volatile(\"hlt\");return 0;}", libc_signal("SEGV"), &["SIGSEGV", "hlt"]),
    ];
    for (name, source, signal, words) in sources {
        let c = dir.join(format!("{name}.c"));
        fs::write(&c, source).expect("written");
        let binary = dir.join(name);
        let cc = Command::new("cc").arg("-O1").arg("-o").arg(&binary).arg(&c).status().expect("cc runs");
        assert!(cc.success(), "{name}");
        for engine in ENGINES {
            let output = run(engine, &[binary.to_str().expect("plain")]);
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.signal(), Some(signal), "{name} on {engine}: {stderr}");
            for word in words {
                assert!(stderr.contains(word), "{name} on {engine}: no `{word}` in: {stderr}");
            }
            assert!(!stderr.contains("panicked"), "{name} on {engine}: {stderr}");
        }
    }
    fs::remove_dir_all(&dir).expect("removed");
}

/// Signal numbers of x86-64 Linux (signal(7)).
fn libc_signal(name: &str) -> i32 {
    match name {
        "ILL" => 4,
        "ABRT" => 6,
        "FPE" => 8,
        _ => 11,
    }
}

/// `bivisor ... | head`: a reader that closes its end ends the program quietly, with a shell's status of death by SIGPIPE.
#[test]
fn a_closed_pipe_is_no_panic() {
    let commands: [&[&str]; 15] = [
        &["diff", "--all", "--cases", "4000", "--jobs", "1"],
        &["diff", "--all", "--cases", "4000", "--jobs", "1", "--json"],
        &["diff", "--matrix"],
        &["diff", "--matrix", "--html"],
        &["diff", "replay", "--json", concat!(env!("CARGO_MANIFEST_DIR"), "/testsuite/repros/rip-relative-b-bit.json")],
        &["explain", "popf"],
        &["explain", "--json", "popf"],
        &["classify"],
        &["classify", "--json"],
        &["doctor"],
        &["doctor", "--json"],
        &["demo", "popf"],
        &["exec", "--schema"],
        &["exec", "--hex", "90f4"],
        &["decode"],
    ];
    for args in commands {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut child = Command::new(env!("CARGO_BIN_EXE_bivisor"))
            .args(args)
            .stdin(std::process::Stdio::piped())
            .stdout(writer)
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("bivisor starts");
        // For those that read; the others do not wait for it.
        let _ = std::io::Write::write_all(&mut child.stdin.take().expect("a pipe"), b"90\n");
        let output = child.wait_with_output().expect("it ends");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(141), "{args:?}: {stderr}");
        assert_eq!(stderr, "", "{args:?}");
    }
}

/// Messages that nobody can read are no panic either.
#[test]
fn a_closed_standard_error_is_no_panic() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let status = Command::new(env!("CARGO_BIN_EXE_bivisor")).args(["exec", "--cpu", "no such"]).stderr(writer).status();
    assert_eq!(status.expect("bivisor starts").code(), Some(1));
}
