//! Debian's root file system on a virtio disk: systemd up to the login prompt, a session, power off. Long, so only where BIVISOR_DEBIAN names
//! a directory that testsuite/debian-root.sh has made.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// What to wait for, and what to type then. Words that the guest prints are computed there, so that the echo of a command is none of them.
const SESSION: [(&str, &str); 7] = [
    ("login: ", "root"),
    ("# ", "echo state $(systemctl is-system-running --wait)"),
    ("state running", "apt list 2>/dev/null | grep -c installed"),
    ("# ", "head -c 20000000 /dev/urandom >/file; sync; echo 3 >/proc/sys/vm/drop_caches"),
    ("# ", "cat /file | md5sum; md5sum </file; grep -c . /proc/interrupts; echo done$((6*7))"),
    ("done42", "systemctl poweroff"),
    ("reboot: Power down", ""),
];
const LIMIT: Duration = Duration::from_secs(600);

#[test]
fn debian_boots_logs_in_and_powers_off() {
    let Some(dir) = std::env::var_os("BIVISOR_DEBIAN") else {
        eprintln!("skipped: BIVISOR_DEBIAN names no directory made by testsuite/debian-root.sh");
        return;
    };
    let path = |name: &str| Path::new(&dir).join(name).to_str().expect("a plain path").to_owned();
    let started = Instant::now();
    let mut guest = Command::new(env!("CARGO_BIN_EXE_bivisor"))
        .args(["boot", "--backend", "bt", "--memory", "1024", "--rng", "--balloon", "64", "--timeout", "600"])
        .args(["--kernel", &path("vmlinuz"), "--initrd", &path("initrd.img")])
        .args(["--drive", &format!("file={},format=raw,snapshot=on", path("root.img"))])
        .args(["--append", "root=/dev/vda console=ttyS0 quiet"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("bivisor starts");
    let (mut typed, mut shown) = (guest.stdin.take().expect("piped"), guest.stdout.take().expect("piped"));
    let (to, from) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = shown.read(&mut buffer) {
            if to.send(buffer[..n].to_vec()).is_err() {
                break;
            }
        }
    });
    let mut all = Vec::new();
    let mut seen = 0;
    for (wanted, answer) in SESSION {
        while !all[seen..].windows(wanted.len()).any(|w| w == wanted.as_bytes()) {
            let left = LIMIT.saturating_sub(started.elapsed());
            match from.recv_timeout(left) {
                Ok(bytes) => all.extend(bytes),
                Err(e) => {
                    let _ = guest.kill();
                    panic!("no `{wanted}`: {e}\n{}", String::from_utf8_lossy(&all));
                }
            }
        }
        eprintln!("{:6.1} s: `{wanted}`", started.elapsed().as_secs_f64());
        seen = all.len();
        if !answer.is_empty() {
            typed.write_all(format!("{answer}\n").as_bytes()).expect("the guest reads");
        }
    }
    assert_eq!(guest.wait().expect("ends").code(), Some(0));
    let all = String::from_utf8_lossy(&all);
    // The shell's bracketed-paste sequence stands before the first line of what a command prints.
    let sum =
        |l: &str| l.trim_end().strip_suffix("  -").and_then(|l| l.get(l.len().checked_sub(32)?..)).map(str::to_owned);
    let sums: Vec<String> = all.lines().filter_map(sum).collect();
    assert!(sums.len() == 2 && sums[0] == sums[1], "the file is the same twice: {sums:?}\n{all}");
    let packages = all.lines().find_map(|l| l.rsplit(['\r', 'l']).find_map(|w| w.trim().parse::<u32>().ok()));
    assert!(packages.is_some_and(|n| n > 50), "apt lists packages: {packages:?}\n{all}");
}
