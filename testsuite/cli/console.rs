//! The consoles of `bivisor boot` on real pseudoterminals: the menu behind Ctrl-A, raw mode and its end, the text screen, `--serial pty`.

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// What a file gives, from a thread of its own.
struct Reader {
    from: Receiver<Vec<u8>>,
    seen: String,
}

impl Reader {
    fn new(mut file: File) -> Reader {
        let (to, from) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = file.read(&mut buffer) {
                if to.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Reader { from, seen: String::new() }
    }

    /// Waits until these words have come; what came before and with them is forgotten.
    fn wait(&mut self, words: &str) {
        let end = Instant::now() + PATIENCE;
        while !self.seen.contains(words) {
            let more = self.from.recv_timeout(end.saturating_duration_since(Instant::now()));
            let more = more.unwrap_or_else(|_| panic!("`{words}` did not come; there is: {:?}", self.seen));
            self.seen.push_str(&String::from_utf8_lossy(&more));
        }
        let at = self.seen.find(words).expect("there") + words.len();
        self.seen.drain(..at);
    }
}

/// A pseudoterminal: our end, and the other to give to a child.
fn pair() -> (File, File) {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudoterminal");
    grantpt(&ours).and_then(|()| unlockpt(&ours)).expect("unlocked");
    let name = ptsname(&ours, Vec::new()).expect("a name").into_string().expect("plain");
    let theirs = File::options().read(true).write(true).open(name).expect("opens");
    (File::from(ours), theirs)
}

fn program(name: &str, bytes: &[u8]) -> String {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("console-{name}"));
    std::fs::write(&path, bytes).expect("written");
    format!("{}@0x7c00", path.to_str().expect("plain path"))
}

/// Bivisor on a terminal: the child, our end, and the terminal itself.
fn on_terminal(args: &[&str]) -> (Child, File, Reader, File) {
    on_terminal_of((80, 25), args)
}

/// Its size is so many columns and rows.
fn on_terminal_of((columns, rows): (u16, u16), args: &[&str]) -> (Child, File, Reader, File) {
    let (ours, theirs) = pair();
    resized(&theirs, columns, rows);
    let end = || Stdio::from(theirs.try_clone().expect("cloned"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_bivisor"));
    command.args(["boot", "--timeout", "60"]).args(args);
    let child = command.stdin(end()).stdout(end()).stderr(Stdio::inherit()).spawn().expect("bivisor starts");
    let reader = Reader::new(ours.try_clone().expect("cloned"));
    (child, ours, reader, theirs)
}

/// The parts of a terminal's state that raw mode changes.
fn modes(t: &Termios) -> String {
    format!("{:?} {:?} {:?} {:?}", t.input_modes, t.output_modes, t.control_modes, t.local_modes)
}

/// A loop with interrupts off that sends back on the serial line what comes: mov dx, 3fd; in al, dx; test al, 1; jz; mov dx, 3f8; in al, dx;
/// out dx, al; jmp. Before it, `>` is sent.
const ECHO: &[u8] = &[
    0xfa, 0xba, 0xf8, 3, 0xb0, b'>', 0xee, 0xba, 0xfd, 3, 0xec, 0xa8, 1, 0x74, 0xf8, 0xba, 0xf8, 3, 0xec, 0xee, 0xeb,
    0xf1,
];

#[test]
fn the_menu_and_the_end_of_raw_mode() {
    let flat = program("echo", ECHO);
    for engine in ["interp", "bt"] {
        let (mut child, mut keys, mut seen, theirs) = on_terminal(&["--backend", engine, "--flat", &flat]);
        seen.wait(">");
        let raw = modes(&tcgetattr(&theirs).expect("a terminal"));
        // Ctrl-C is a byte for the guest; Ctrl-A twice is one Ctrl-A.
        keys.write_all(b"ab\x03\x01\x01c").expect("typed");
        seen.wait("ab\x03\x01c");
        keys.write_all(b"\x01h").expect("typed");
        seen.wait("Ctrl-A x  quit\r\n");
        keys.write_all(b"\x01t").expect("typed");
        seen.wait("\r\n");
        keys.write_all(b"\x01x").expect("typed");
        let status = child.wait().expect("ended");
        assert_eq!(status.code(), Some(0), "{engine}");
        let (_other, fresh) = pair();
        let plain = modes(&tcgetattr(&fresh).expect("a terminal"));
        assert_eq!(modes(&tcgetattr(&theirs).expect("a terminal")), plain, "{engine}: as before");
        assert_ne!(raw, plain, "{engine}: it was raw");
    }
}

/// Is the signal ignored here, as in what a shell runs in the background, and so in what this program starts (signal(7))?
fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc(5)");
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:")).expect("SigIgn");
    u64::from_str_radix(mask.trim(), 16).expect("a mask") >> (signal.as_raw() - 1) & 1 != 0
}

/// The program dies of the signal, but the terminal is as before, and what the guest had sent without an end of line is there.
#[test]
fn a_signal_ends_raw_mode_too() {
    let flat = program("signals", ECHO);
    for (engine, signal) in [("interp", Signal::TERM), ("bt", Signal::HUP), ("bt", Signal::INT)] {
        if is_ignored(signal) {
            println!("SKIPPED {signal:?}: it is ignored where this test was started");
            continue;
        }
        let (mut child, mut keys, mut seen, theirs) = on_terminal(&["--backend", engine, "--flat", &flat]);
        seen.wait(">");
        keys.write_all(b"end").expect("typed");
        seen.wait("end");
        let raw = modes(&tcgetattr(&theirs).expect("a terminal"));
        kill_process(Pid::from_child(&child), signal).expect("sent");
        assert_eq!(child.wait().expect("ended").signal(), Some(signal.as_raw()), "{engine}");
        let (_other, fresh) = pair();
        let plain = modes(&tcgetattr(&fresh).expect("a terminal"));
        assert_eq!(modes(&tcgetattr(&theirs).expect("a terminal")), plain, "{engine}: as before");
        assert_ne!(raw, plain, "{engine}: it was raw");
    }
}

/// A guest that does nothing but loop with interrupts off (mov dx, 3f8; mov al, >; out dx, al; cli; jmp $) cannot keep the user in.
#[test]
fn a_guest_that_loops_for_ever_can_be_left() {
    let flat = program("loop", &[0xba, 0xf8, 3, 0xb0, b'>', 0xee, 0xfa, 0xeb, 0xfe]);
    for engine in ["interp", "bt"] {
        for by_key in [true, false] {
            let (mut child, mut keys, mut seen, _theirs) = on_terminal(&["--backend", engine, "--flat", &flat]);
            seen.wait(">");
            if by_key {
                keys.write_all(b"\x01x").expect("typed");
                assert_eq!(child.wait().expect("ended").code(), Some(0), "{engine}");
            } else {
                kill_process(Pid::from_child(&child), Signal::TERM).expect("sent");
                assert_eq!(child.wait().expect("ended").signal(), Some(Signal::TERM.as_raw()), "{engine}");
            }
        }
    }
}

fn resized(terminal: &File, columns: u16, rows: u16) {
    let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).expect("a terminal");
}

/// A program that writes the console's columns and rows to a port whenever they change sees each size of the terminal.
#[test]
fn the_size_of_the_terminal_is_the_consoles() {
    // PCI function 0:4.0, BAR 0: mov eax, 80002010; mov edx, cf8; out dx, eax; mov eax, fe000000; mov dl, fc; out dx, eax
    let bar = [0xb8, 0x10, 0x20, 0, 0x80, 0xba, 0xf8, 0x0c, 0, 0, 0xef, 0xb8, 0, 0, 0, 0xfe, 0xb2, 0xfc, 0xef];
    // Its command register: mov eax, 80002004; mov dl, f8; out dx, eax; mov eax, 2; mov dl, fc; out dx, eax
    let command = [0xb8, 0x04, 0x20, 0, 0x80, 0xb2, 0xf8, 0xef, 0xb8, 2, 0, 0, 0, 0xb2, 0xfc, 0xef];
    // mov ebp, fe002000; xor ebx, ebx; mov eax, [ebp]; cmp eax, ebx; je -7
    let see = [0xbd, 0, 0x20, 0, 0xfe, 0x31, 0xdb, 0x8b, 0x45, 0, 0x39, 0xd8, 0x74, 0xf9];
    // mov ebx, eax; out e9, al; shr eax, 16; out e9, al; mov al, a; out e9, al; jmp -22
    let say = [0x89, 0xc3, 0xe6, 0xe9, 0xc1, 0xe8, 16, 0xe6, 0xe9, 0xb0, 0x0a, 0xe6, 0xe9, 0xeb, 0xea];
    let flat = program("size", &[&bar[..], &command, &see, &say].concat()).replace("@0x7c00", "@0x10000");
    for engine in ["interp", "bt"] {
        let args = ["--backend", engine, "--mode", "prot", "--flat", &flat, "--debugcon", "0xe9=stdio"];
        let console = ["--virtio-console", "stdio", "--serial", "none"];
        let (mut child, mut keys, mut seen, theirs) = on_terminal_of((65, 66), &[&args[..], &console].concat());
        seen.wait("AB");
        resized(&theirs, 67, 68);
        kill_process(Pid::from_child(&child), Signal::WINCH).expect("sent");
        seen.wait("CD");
        keys.write_all(b"\x01x").expect("typed");
        assert_eq!(child.wait().expect("ended").code(), Some(0), "{engine}");
    }
}

/// mov ax, b800; mov es, ax; mov es:[0], 'H' on blue; cli; jmp $
#[test]
fn the_text_screen_is_drawn() {
    let code = [0xb8, 0, 0xb8, 0x8e, 0xc0, 0x26, 0xc7, 6, 0, 0, b'H', 0x1f, 0xfa, 0xeb, 0xfe];
    let flat = program("screen", &code);
    let (mut child, mut keys, mut seen, theirs) = on_terminal(&["--flat", &flat, "--display", "text"]);
    seen.wait("97;44mH");
    // Anew, when the terminal has another size.
    resized(&theirs, 100, 40);
    seen.wait("97;44mH");
    keys.write_all(b"\x01x").expect("typed");
    assert_eq!(child.wait().expect("ended").code(), Some(0));
}

#[test]
fn the_serial_port_on_a_terminal_of_its_own() {
    let flat = program("pty", ECHO);
    let mut command = Command::new(env!("CARGO_BIN_EXE_bivisor"));
    command.args(["boot", "--flat", &flat, "--serial", "pty", "--timeout", "60"]).stdin(Stdio::null());
    let mut child = command.stderr(Stdio::piped()).spawn().expect("bivisor starts");
    let mut line = String::new();
    BufReader::new(child.stderr.take().expect("piped")).read_line(&mut line).expect("said");
    let name = line.trim().strip_prefix("bivisor: the serial port is on ").expect("its name");
    let mut serial = File::options().read(true).write(true).open(name).expect("opens");
    let mut seen = Reader::new(serial.try_clone().expect("cloned"));
    serial.write_all(b"serial").expect("written");
    seen.wait("serial");
    child.kill().expect("killed");
    child.wait().expect("ended");
}
