//! Guests that others made, by the recipes of docs/guests.md: BIVISOR_GUESTS names the folder that testsuite/fetch-guests.sh filled. Those
//! that are not there are skipped, and it is said. `BIVISOR_GUESTS=FOLDER cargo test --release --test guests -- --nocapture`.

use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A guest: its name in the README's table, the file it needs, the arguments after it, and what it must print.
struct Guest {
    name: &'static str,
    needs: &'static [&'static str],
    args: &'static [&'static str],
    /// In the arguments, the folder.
    prints: &'static [&'static str],
    /// The exit status; `None`: the guest does not turn the machine off, the time is up.
    status: Option<i32>,
    seconds: u32,
    engines: &'static [&'static str],
}

const BOTH: &[&str] = &["bt", "interp"];
const BT: &[&str] = &["bt"];
/// What init.sh prints, and that the machine was turned off.
const SCRIPT: &[&str] =
    &["init reached", "b6d81b360a5672d80c27430f39153e2c  -", "forked 50 times", "reboot: Power down"];

const GUESTS: &[Guest] = &[
    Guest {
        name: "Debian's cloud kernel",
        needs: &["vmlinuz-cloud", "initramfs.gz"],
        args: &["--kernel", "@/vmlinuz-cloud", "--initrd", "@/initramfs.gz", "--append", "console=ttyS0"],
        prints: SCRIPT,
        status: Some(0),
        seconds: 600,
        engines: BOTH,
    },
    Guest {
        name: "Debian's amd64 kernel",
        needs: &["vmlinuz-amd64", "initramfs.gz"],
        args: &["--kernel", "@/vmlinuz-amd64", "--initrd", "@/initramfs.gz", "--append", "console=ttyS0"],
        prints: SCRIPT,
        status: Some(0),
        seconds: 600,
        engines: BT,
    },
    Guest {
        name: "Debian's 686-pae kernel",
        needs: &["vmlinuz-686", "initramfs-686.gz"],
        args: &["--kernel", "@/vmlinuz-686", "--initrd", "@/initramfs-686.gz", "--append", "console=ttyS0"],
        prints: SCRIPT,
        status: Some(0),
        seconds: 900,
        engines: BT,
    },
    Guest {
        name: "SeaBIOS and GRUB",
        needs: &["bios-256k.bin", "vgabios-isavga.bin", "grub.iso"],
        args: &["--bios", "@/bios-256k.bin", "--cdrom", "@/grub.iso", "--serial", "stdio"],
        prints: &["GNU GRUB", "Booting `Linux'", "init reached", "forked 50 times", "reboot: Power down"],
        status: Some(0),
        seconds: 600,
        engines: BT,
    },
    Guest {
        name: "memtest86+",
        needs: &["memtest86+x64.bin"],
        args: &["--kernel", "@/memtest86+x64.bin", "--append", "console=ttyS0,115200", "--memory", "64"],
        prints: &["Pass:  1        Errors: 0 "],
        status: None,
        seconds: 900,
        engines: BT,
    },
    Guest {
        name: "iPXE",
        needs: &["bios-256k.bin", "vgabios-isavga.bin", "ipxe.iso"],
        args: &["--bios", "@/bios-256k.bin", "--cdrom", "@/ipxe.iso", "--display", "text"],
        prints: &["iPXE initialising devices...ok", "Open Source Network Boot Firmware", "No more network devices"],
        status: None,
        seconds: 120,
        engines: BT,
    },
];

/// Runs it until it has printed everything or has ended; gives what it printed and its exit status, if it ended by itself.
fn run(guest: &Guest, folder: &str, engine: &str) -> (String, Option<i32>) {
    let args = guest.args.iter().map(|a| a.replace('@', folder));
    let seconds = guest.seconds.to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_bivisor"));
    command.arg("boot").args(args).args(["--backend", engine, "--timeout", &seconds]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("bivisor starts");
    let mut out = child.stdout.take().expect("piped");
    let mut printed = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = std::io::Read::read(&mut out, &mut buffer) {
        printed.extend(&buffer[..n]);
        let text = String::from_utf8_lossy(&printed);
        if guest.status.is_none() && guest.prints.iter().all(|p| text.contains(p)) {
            let _ = child.kill();
            break;
        }
    }
    let status = child.wait().expect("ended");
    (String::from_utf8_lossy(&printed).into_owned(), status.code())
}

#[test]
fn guests_of_others_boot() {
    let Some(folder) = std::env::var_os("BIVISOR_GUESTS").map(PathBuf::from) else {
        println!("skipped: BIVISOR_GUESTS names no folder of guests (docs/guests.md)");
        return;
    };
    let text = folder.to_str().expect("a plain path");
    let mut failed = Vec::new();
    for guest in GUESTS {
        if let Some(missing) = guest.needs.iter().find(|f| !folder.join(f).exists()) {
            println!("{:24} skipped: there is no {missing} in {text}", guest.name);
            continue;
        }
        for engine in guest.engines {
            let began = std::time::Instant::now();
            let (printed, status) = run(guest, text, engine);
            let missing = guest.prints.iter().find(|p| !printed.contains(**p));
            let good = missing.is_none() && (guest.status.is_none() || status == guest.status);
            let seconds = began.elapsed().as_secs();
            println!("{:24} {engine:8} {} in {seconds} s", guest.name, if good { "ok" } else { "FAILED" });
            if !good {
                let end: String = printed.chars().rev().take(800).collect::<Vec<_>>().into_iter().rev().collect();
                failed.push(format!(
                    "{} on {engine}: status {status:?}, not printed: {missing:?}; its end:\n{end}",
                    guest.name
                ));
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}

/// The README's table has a row for each.
#[test]
fn the_readme_names_them_all() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).expect("there");
    for guest in GUESTS {
        assert!(readme.contains(&format!("| {} |", guest.name)), "README.md has no row for {}", guest.name);
    }
}
