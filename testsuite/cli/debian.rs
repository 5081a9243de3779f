//! Debian's root file system on a virtio disk: systemd up to the login prompt, a session, power off. Long, so only where BIVISOR_DEBIAN names
//! a directory that testsuite/debian-root.sh has made, or several with `:` between them:
//! `BIVISOR_DEBIAN=DIRECTORY cargo test --release --test debian -- --nocapture`.

mod session;

use session::Session;
use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

/// What to wait for, and what to type then. Words that the guest prints are computed there, so that the echo of a command is none of them.
/// PORT is that of a server on the host.
const SESSION: [(&str, &str); 8] = [
    ("login: ", "root"),
    ("# ", "echo state $(systemctl is-system-running --wait)"),
    ("state running", "apt list 2>/dev/null | grep -c installed"),
    ("# ", "head -c 20000000 /dev/urandom >/file; sync; echo 3 >/proc/sys/vm/drop_caches"),
    ("# ", "cat /file | md5sum; md5sum </file; grep -c . /proc/interrupts; echo done$((6*7))"),
    (
        "done42",
        "d=$(ls /sys/class/net | grep -v lo); ip addr add 10.0.2.15/24 dev $d; ip link set $d up; cat </dev/tcp/10.0.2.2/PORT",
    ),
    ("sent by the host", "systemctl poweroff"),
    ("reboot: Power down", ""),
];
/// On a busy machine; a quiet one needs a tenth.
const LIMIT: Duration = Duration::from_secs(1800);

#[test]
fn debian_boots_logs_in_and_powers_off() {
    let Some(directories) = std::env::var_os("BIVISOR_DEBIAN") else {
        eprintln!("skipped: BIVISOR_DEBIAN names no directory made by testsuite/debian-root.sh");
        return;
    };
    for directory in std::env::split_paths(&directories) {
        eprintln!("{}:", directory.display());
        boot(&directory);
    }
}

fn boot(directory: &Path) {
    let path = |name: &str| directory.join(name).to_str().expect("a plain path").to_owned();
    let drive = format!("file={},format=raw,snapshot=on", path("root.img"));
    let (kernel, initrd) = (path("vmlinuz"), path("initrd.img"));
    let machine =
        ["--backend", "bt", "--memory", "1024", "--rng", "--balloon", "64", "--net", "user", "--drive", &drive];
    // What the guest reaches as 10.0.2.2.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port().to_string();
    std::thread::spawn(move || listener.accept().map(|(mut to, _)| to.write_all(b"sent by the host\n")));
    // systemd gives up on a device after 90 seconds, which on a busy machine may not be enough.
    let line = "root=/dev/vda console=ttyS0 quiet systemd.default_device_timeout_sec=900";
    let linux = ["--kernel", &kernel, "--initrd", &initrd, "--append", line];
    let args: Vec<String> = machine.into_iter().chain(linux).map(str::to_owned).collect();
    let mut guest = Session::start(&args, LIMIT);
    for (wanted, answer) in SESSION {
        guest.wait(wanted).expect("the session goes on");
        eprintln!("{:6.1} s: `{wanted}`", guest.seconds());
        if !answer.is_empty() {
            guest.answer(&answer.replace("PORT", &port)).expect("the guest reads");
        }
    }
    assert_eq!(guest.status(), Ok(Some(0)));
    let all = guest.text();
    // The shell's bracketed-paste sequence stands before the first line of what a command prints.
    let sum =
        |l: &str| l.trim_end().strip_suffix("  -").and_then(|l| l.get(l.len().checked_sub(32)?..)).map(str::to_owned);
    let sums: Vec<String> = all.lines().filter_map(sum).collect();
    assert!(sums.len() == 2 && sums[0] == sums[1], "the file is the same twice: {sums:?}\n{all}");
    let packages = all.lines().find_map(|l| l.rsplit(['\r', 'l']).find_map(|w| w.trim().parse::<u32>().ok()));
    assert!(packages.is_some_and(|n| n > 50), "apt lists packages: {packages:?}\n{all}");
}
