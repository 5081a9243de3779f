//! The ELF loader: mutated headers of a small program, read in this process and now and then loaded and run by bivisor as built.

use super::{Guided, Target, hex, mutate, quietly};
use crate::random::Random;
use bivisor_emulator::linux::elf::Elf;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Bytes of its ELF header and two program headers; the code follows.
const HEADERS: usize = 64 + 2 * 56;
/// A program that runs for so long hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// One in so many is run.
const RUN: u64 = 64;

/// See [`super::target`].
pub struct Loader {
    program: PathBuf,
    file: PathBuf,
}

impl Loader {
    /// Writes to the system's directory for such files.
    ///
    /// # Errors
    /// It cannot.
    pub fn new(program: &Path) -> Result<Loader, String> {
        let file = std::env::temp_dir().join(format!("bivisor-fuzz-{}.elf", std::process::id()));
        File::create(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        Ok(Loader { program: program.into(), file })
    }

    fn input(&self, r: &mut Random) -> Vec<u8> {
        let mut out = tiny();
        // Only headers: what runs is our own code or nothing.
        let mut head: Vec<u8> = out.drain(..HEADERS).collect();
        for _ in 0..1 + r.below(3) {
            // A field, or any bytes.
            if r.once_in(2) {
                let at = 8 * (2 + r.below(20)) as usize;
                let v = if r.once_in(2) { r.edgy() } else { r.below(0x3000) };
                let n = r.one_of(&[2usize, 4, 8]).min(head.len().saturating_sub(at));
                if n > 0 {
                    head[at..at + n].copy_from_slice(&v.to_le_bytes()[..n]);
                }
            } else {
                mutate(r, &mut head);
            }
        }
        head.extend(out);
        head
    }
}

impl Loader {
    /// Does the loader take these bytes?
    fn parse(&self, bytes: &[u8]) -> Result<bool, String> {
        let written = File::create(&self.file).and_then(|mut f| f.write_all(bytes));
        written.map_err(|e| e.to_string())?;
        let file = File::open(&self.file).map_err(|e| e.to_string())?;
        quietly(|| Elf::parse(&self.file, &file).is_ok())
    }
}

impl Guided for Loader {
    fn bytes(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.parse(bytes).map(|_| ())
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

impl Target for Loader {
    /// Neither a panic nor a hang; bivisor tells an error in a line, or runs the program.
    fn one(&mut self, r: &mut Random) -> Result<(), String> {
        let bytes = self.input(r);
        let wrong = |what: String| Err(format!("[{}]: {what}", hex(&bytes)));
        let parsed = match self.parse(&bytes) {
            Ok(parsed) => parsed,
            Err(why) => return wrong(why),
        };
        if !parsed && !r.once_in(8) || !r.once_in(RUN / 8) {
            return Ok(());
        }
        let mut child = Command::new(&self.program)
            .args(["run", "--backend", "interp"])
            .arg(&self.file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| format!("{}: {e}", self.program.display()))?;
        let start = Instant::now();
        let status = loop {
            match child.try_wait().map_err(|e| e.to_string())? {
                Some(status) => break status,
                None if start.elapsed() > PATIENCE => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return wrong("it hangs".into());
                }
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let mut text = String::new();
        if let Some(mut err) = child.stderr.take() {
            let _ = std::io::Read::read_to_string(&mut err, &mut text);
        }
        if status.code() == Some(101) || text.contains("panicked") {
            return wrong(format!("{status}: {text}"));
        }
        Ok(())
    }
}

/// An ELF file whose program exits with status 3: one segment of code, one of data.
pub(super) fn tiny() -> Vec<u8> {
    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut put = |v: u64, n: usize| out.extend_from_slice(&v.to_le_bytes()[..n]);
    let base = 0x40_0000;
    for (v, n) in [
        (2, 2),
        (62, 2),
        (1, 4),
        (base + HEADERS as u64, 8),
        (64, 8),
        (0, 8),
        (0, 4),
        (64, 2),
        (56, 2),
        (2, 2),
        (0, 2),
        (0, 2),
        (0, 2),
    ] {
        put(v, n);
    }
    for (flags, offset, at, file, memory) in [(5, 0, base, 0x200, 0x200), (6, 0x200, base + 0x1200, 0x10, 0x2000)] {
        for (v, n) in [(1, 4), (flags, 4), (offset, 8), (at, 8), (at, 8), (file, 8), (memory, 8), (0x1000, 8)] {
            put(v, n);
        }
    }
    // mov edi, 3; mov eax, 231; syscall
    out.extend([0xbf, 3, 0, 0, 0, 0xb8, 231, 0, 0, 0, 0x0f, 0x05]);
    out.resize(0x210, 0xcc);
    out
}
