//! A guest in `bivisor boot` to which a test types: it waits for words, types an answer, and goes on.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// A running guest.
pub struct Session {
    child: Child,
    typed: ChildStdin,
    from: Receiver<Vec<u8>>,
    all: Vec<u8>,
    /// What was waited for ends here.
    seen: usize,
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
        Session { child, typed, from, all: Vec::new(), seen: 0, started: Instant::now(), limit }
    }

    /// Seconds since the start.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Waits until these words are printed, after those waited for before. `Err`: they do not come; all that was printed.
    pub fn wait(&mut self, words: &str) -> Result<(), String> {
        loop {
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

    /// Waits for its end by itself: the exit status.
    pub fn status(&mut self) -> Option<i32> {
        while let Ok(bytes) = self.from.recv() {
            self.all.extend(bytes);
        }
        self.child.wait().expect("ended").code()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
