//! A guest in `bivisor boot` to which a test types: it waits for words, types an answer, and goes on. A kernel that says that something is
//! wrong with it ends the session at once.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// What Linux (lib/bug.c, kernel/panic.c, arch/x86/kernel/dumpstack.c and traps.c, mm/fault.c) and xv6 begin their complaints with. A
/// warning of the kernel names a processor; "WARNING:" alone is other programs' too.
const BAD: [&str; 18] = [
    "Kernel panic",
    "BUG: ",
    "Oops: ",
    "WARNING: CPU",
    "Call Trace:",
    "general protection fault",
    "invalid opcode: ",
    "double fault: ",
    "traps: ",
    " segfault at ",
    "unchecked MSR access",
    "detected stall",
    "blocked for more than",
    "Bad page state",
    "EXT4-fs error",
    "lapicid 0: panic",
    // systemd, 90 seconds of the host's time after a start: on a host as busy as that nothing can be tested.
    "Timed out waiting for device",
    "You are in emergency mode",
];

/// The line by which a kernel says that it is broken, if there is one.
fn complaint(text: &str) -> Option<&str> {
    text.lines().find(|line| BAD.iter().any(|bad| line.contains(bad)))
}

/// A running guest.
pub struct Session {
    child: Child,
    typed: ChildStdin,
    from: Receiver<Vec<u8>>,
    all: Vec<u8>,
    /// What was waited for ends here.
    seen: usize,
    /// Lines up to here say nothing bad.
    sound: usize,
    started: Instant,
    limit: Duration,
}

impl Session {
    /// Starts `bivisor boot` with these arguments; after so long it counts as stuck.
    pub fn start(args: &[String], limit: Duration) -> Session {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bivisor"));
        command.arg("boot").args(args).args(["--timeout", &limit.as_secs().to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("bivisor starts");
        let (typed, mut shown) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let (to, from) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = shown.read(&mut buffer) {
                if to.send(buffer[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        Session { child, typed, from, all: Vec::new(), seen: 0, sound: 0, started: Instant::now(), limit }
    }

    /// Seconds since the start.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Waits until these words are printed, after those waited for before. `Err`: they do not come, or the kernel complains; the end of what
    /// was printed.
    pub fn wait(&mut self, words: &str) -> Result<(), String> {
        loop {
            self.look()?;
            let found = self.all[self.seen..].windows(words.len()).position(|w| w == words.as_bytes());
            if let Some(at) = found {
                self.seen += at + words.len();
                return Ok(());
            }
            match self.from.recv_timeout(self.limit.saturating_sub(self.started.elapsed())) {
                Ok(bytes) => self.all.extend(bytes),
                Err(e) => return Err(format!("no `{words}`: {e}; its end:\n{}", self.end_of_text())),
            }
        }
    }

    /// Looks at the whole lines that have come for a kernel's complaint. `Err`: there is one, with what came within some seconds behind it.
    fn look(&mut self) -> Result<(), String> {
        let end = self.all.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        let new = String::from_utf8_lossy(&self.all[self.sound..end.max(self.sound)]).into_owned();
        let Some(bad) = complaint(&new) else {
            self.sound = end.max(self.sound);
            return Ok(());
        };
        let until = Instant::now() + Duration::from_secs(3);
        while let Ok(bytes) = self.from.recv_timeout(until.saturating_duration_since(Instant::now())) {
            self.all.extend(bytes);
        }
        let from = String::from_utf8_lossy(&self.all[self.sound..]).into_owned();
        let lines: Vec<&str> = from.lines().skip_while(|l| !l.contains(bad.trim_end())).take(40).collect();
        Err(format!("the guest's kernel complains:\n{}", lines.join("\n")))
    }

    /// Types a line.
    pub fn answer(&mut self, line: &str) -> Result<(), String> {
        self.typed.write_all(format!("{line}\n").as_bytes()).map_err(|e| format!("nobody reads `{line}`: {e}"))
    }

    /// Everything printed so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.all).into_owned()
    }

    fn end_of_text(&self) -> String {
        String::from_utf8_lossy(&self.all[self.all.len().saturating_sub(800)..]).into_owned()
    }

    /// Waits for its end by itself: the exit status. `Err`: the kernel complains before.
    pub fn status(&mut self) -> Result<Option<i32>, String> {
        while let Ok(bytes) = self.from.recv() {
            self.all.extend(bytes);
            self.look()?;
        }
        Ok(self.child.wait().map_err(|e| e.to_string())?.code())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn complaints_of_kernels_are_seen() {
    for bad in [
        "[    1.023] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)",
        "[    0.5] BUG: kernel NULL pointer dereference, address: 0000000000000008",
        "[    0.5] Oops: 0002 [#1] PREEMPT SMP NOPTI",
        "[    2.1] WARNING: CPU: 0 PID: 1 at kernel/smp.c:430 __flush_smp_call_function_queue+0xed/0x1a0",
        "[    9.9] gzip[77]: segfault at 10 ip 00000000004a1b2c sp 00007ffd9c0e3f10 error 4 in busybox[401000+16f000]",
        "lapicid 0: panic: trap",
    ] {
        assert_eq!(complaint(&format!("fine\r\n{bad}\r\nfine\r\n")).map(str::trim_end), Some(bad));
    }
    let fine = "WARNING: apt does not have a stable CLI interface.\r\nx86/fpu: x87 FPU will use FXSAVE\r\nWARNING: all is well\r\n";
    assert_eq!(complaint(fine), None);
}
