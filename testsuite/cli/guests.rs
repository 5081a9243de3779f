//! Guests that others made, by the recipes of docs/guests.md: BIVISOR_GUESTS names the folder that testsuite/fetch-guests.sh filled. Those
//! that are not there are skipped, and it is said. `BIVISOR_GUESTS=FOLDER cargo test --release --test guests -- --nocapture`.

mod session;

use session::Session;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A guest: its name in the README's table, the files it needs, the arguments (`@` is the folder), and what it must print.
struct Guest {
    name: &'static str,
    needs: &'static [&'static str],
    args: &'static [&'static str],
    /// What to wait for and what to type then; words that the guest prints are computed there, so that the echo of a command is none of them.
    types: &'static [(&'static str, &'static str)],
    /// Then this is printed, in this order.
    prints: &'static [&'static str],
    /// The exit status; `None`: the guest does not turn the machine off, the time is up.
    status: Option<i32>,
    /// At most, on a busy machine; a quiet one needs a tenth.
    seconds: u32,
    engines: &'static [&'static str],
}

const BOTH: &[&str] = &["bt", "interp"];
const BT: &[&str] = &["bt"];
/// What init.sh prints, and that the machine was turned off.
const SCRIPT: &[&str] =
    &["init reached", "b6d81b360a5672d80c27430f39153e2c  -", "forked 50 times", "reboot: Power down"];

/// A session at busybox's shell.
const SHELL: &[(&str, &str)] = &[
    ("# ", "awk '/MemTotal/ {print \"GiB:\", int($2 / 1048576)}' /proc/meminfo"),
    ("GiB: 5", "ls -l /init /bin/busybox | wc -l; echo listed $((6*7))"),
    ("listed 42", "umount /proc; mount -t proc none /proc; grep -c ^processor /proc/cpuinfo; echo mounted $((6*7))"),
    (
        "1\r\nmounted 42",
        "dd if=/dev/zero of=/tmp/z bs=64k count=16 2>/dev/null; gzip /tmp/z; gunzip -c /tmp/z.gz | md5sum",
    ),
    (
        "b6d81b360a5672d80c27430f39153e2c  -",
        "head -c 300000 /dev/urandom | tee /tmp/r | md5sum >/tmp/a; md5sum </tmp/r | cmp - /tmp/a && echo same $((6*7))",
    ),
    ("same 42", "n=0; for i in $(seq 100); do n=$((n + $(echo $i))); done; echo sum $n"),
    ("sum 5050", "(sleep 1; echo late $((6*7))) & wait; kill -0 $$ && echo alive $((6*7))"),
    ("late 42", ""),
    ("alive 42", "poweroff -f"),
];
/// A session at xv6's shell.
const XV6: &[(&str, &str)] = &[
    ("$ ", "ls"),
    ("console        3", ""),
    ("$ ", "echo hello > f; cat f; rm f"),
    ("rm f\nhello\n", "forktest"),
    ("fork test OK", ""),
    ("$ ", "cat README | wc"),
    (" 329 2286", ""),
    ("$ ", "echo a | cat | grep a"),
];

/// GRUB's prompt out of its menu, and the menu anew. A line that is typed ends with Return, which the prompt takes as an empty one.
const GRUB: &[(&str, &str)] = &[
    ("GNU GRUB", "c"),
    ("grub> ", "set n=4; echo read${n}2"),
    ("read42", "ls (cd)/boot/grub"),
    ("grub.cfg", "configfile (cd)/boot/grub/grub.cfg"),
];

/// A kernel of Debian's that runs init.sh.
const fn script(
    name: &'static str,
    needs: &'static [&'static str],
    args: &'static [&'static str],
    engines: &'static [&'static str],
) -> Guest {
    Guest { name, needs, args, types: &[], prints: SCRIPT, status: Some(0), seconds: 1800, engines }
}

const GUESTS: &[Guest] = &[
    script(
        "Debian's cloud kernel",
        &["vmlinuz-cloud", "initramfs.gz"],
        &["--kernel", "@/vmlinuz-cloud", "--initrd", "@/initramfs.gz", "--append", "console=ttyS0"],
        BOTH,
    ),
    script(
        "Debian's amd64 kernel",
        &["vmlinuz-amd64", "initramfs.gz"],
        &["--kernel", "@/vmlinuz-amd64", "--initrd", "@/initramfs.gz", "--append", "console=ttyS0"],
        BOTH,
    ),
    Guest {
        name: "Debian's amd64 kernel, a shell",
        needs: &["vmlinuz-amd64", "initramfs.gz"],
        args: &[
            "--kernel",
            "@/vmlinuz-amd64",
            "--initrd",
            "@/initramfs.gz",
            "--memory",
            "6G",
            "--append",
            "console=ttyS0 quiet shell",
        ],
        types: SHELL,
        prints: &["reboot: Power down"],
        status: Some(0),
        seconds: 1800,
        engines: BOTH,
    },
    script(
        "Debian's 686-pae kernel",
        &["vmlinuz-686", "initramfs-686.gz"],
        &["--kernel", "@/vmlinuz-686", "--initrd", "@/initramfs-686.gz", "--append", "console=ttyS0"],
        BT,
    ),
    Guest {
        name: "SeaBIOS and GRUB",
        needs: &["bios-256k.bin", "vgabios-isavga.bin", "grub.iso"],
        args: &["--bios", "@/bios-256k.bin", "--cdrom", "@/grub.iso", "--serial", "stdio"],
        types: GRUB,
        prints: &["GNU GRUB", "Booting `Linux'", "init reached", "forked 50 times", "reboot: Power down"],
        status: Some(0),
        seconds: 1800,
        engines: BT,
    },
    Guest {
        name: "memtest86+",
        needs: &["memtest86+x64.bin"],
        args: &["--kernel", "@/memtest86+x64.bin", "--append", "console=ttyS0,115200", "--memory", "64"],
        types: &[],
        prints: &["Pass:  1        Errors: 0 "],
        status: None,
        seconds: 1800,
        engines: BT,
    },
    Guest {
        name: "iPXE",
        needs: &["bios-256k.bin", "vgabios-isavga.bin", "ipxe.iso"],
        args: &["--bios", "@/bios-256k.bin", "--cdrom", "@/ipxe.iso", "--display", "text"],
        types: &[],
        prints: &["iPXE initialising devices...ok", "Open Source Network Boot Firmware", "No more network devices"],
        status: None,
        seconds: 600,
        engines: BT,
    },
    Guest {
        name: "xv6",
        needs: &["xv6.img", "fs.img"],
        args: &[
            "--drive",
            "file=@/xv6.img,format=raw,if=ide,snapshot=on",
            "--drive",
            "file=@/fs.img,format=raw,if=ide,snapshot=on",
            "--serial",
            "stdio",
            "--bios",
            "@/bios-256k.bin",
        ],
        types: XV6,
        prints: &["grep a\na\n"],
        status: None,
        seconds: 600,
        engines: BOTH,
    },
];

/// Runs it until it has printed everything or has ended: how long it took, in seconds. `Err`: what is missing.
fn run(guest: &Guest, folder: &str, engine: &str) -> Result<f64, String> {
    let args = guest.args.iter().map(|a| a.replace('@', folder));
    let args: Vec<String> = args.chain(["--backend".to_owned(), engine.to_owned()]).collect();
    let mut session = Session::start(&args, Duration::from_secs(guest.seconds.into()));
    for (words, line) in guest.types {
        session.wait(words)?;
        if !line.is_empty() {
            session.answer(line)?;
        }
    }
    for words in guest.prints {
        session.wait(words)?;
    }
    if guest.status.is_some() && session.status()? != guest.status {
        return Err(format!("the status is not {:?}:\n{}", guest.status, session.text()));
    }
    Ok(session.seconds())
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
        let there = |file: &&&str| Path::new(&folder).join(file).exists();
        if let Some(missing) = guest.needs.iter().find(|f| !there(f)) {
            println!("{:32} skipped: there is no {missing} in {text}", guest.name);
            continue;
        }
        for engine in guest.engines {
            match run(guest, text, engine) {
                Ok(seconds) => println!("{:32} {engine:8} ok in {seconds:.0} s", guest.name),
                Err(why) => {
                    println!("{:32} {engine:8} FAILED: {why}", guest.name);
                    failed.push(format!("{} on {engine}: {why}", guest.name));
                }
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
