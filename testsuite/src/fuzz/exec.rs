//! The JSON of `bivisor exec`: mutated requests to the program as built. Each line must be answered, and the program must live.

use super::{Target, mutate};
use crate::random::Random;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

pub(super) const SEEDS: [&str; 6] = [
    r#"{"id":"a","mode":"long64","cpl":3,"regs":{"rax":"0x2","rip":"0x1000"},"mem":[{"addr":"0x1000","hex":"4801c0f4"}],"want":["regs","memdelta"],"stop":{"insns":2}}"#,
    r#"{"mode":"real16","regs":{"rip":0,"rsp":256},"segs":{"cs":{"sel":"0x100","base":"0x1000","limit":"0xffff","attr":"0x9b"}},"mem":[{"addr":4096,"hex":"cd10"}],"want":["regs"],"stop":{"insns":1}}"#,
    r#"{"mode":"prot32","cpl":0,"regs":{"rip":"0x1000","rflags":"0x202"},"mem":[{"addr":"0x1000","hex":"e4600fa2"}],"ports":[],"want":["regs","fpu","vec"],"stop":{"insns":9}}"#,
    r#"{"regs":{"rip":"0x1000"},"fpu":{"fcw":"0x37f","st":["0x3fff8000000000000000"]},"vec":{"zmm3":"0x1","k1":7},"mem":[{"addr":"0x1000","hex":"d9e8f4"}],"want":["fpu","vec"],"stop":{"insns":3}}"#,
    r#"{"regs":{"rip":"0x1000","cr0":"0x80050033","cr3":"0x2000"},"mem":[{"addr":"0x1000","hex":"f390ebfc"}],"want":["regs",{"mem":{"addr":0,"len":16}}],"stop":{"insns":100}}"#,
    r#"{"id":7,"model":"max","hex":"90","unmapped":"fault","stop":{"insns":1,"exceptions":true},"want":[]}"#,
];
const TOKENS: [&str; 24] = [
    "null",
    "-1",
    "1e999",
    "\"0x\"",
    "[]",
    "{}",
    "\"0xffffffffffffffffff\"",
    "18446744073709551615",
    "true",
    "\"\\u0000\"",
    ",",
    ":",
    "\"regs\"",
    "\"mem\"",
    "\"len\"",
    "\"stop\"",
    "\"insns\"",
    "\"addr\"",
    "\"hex\"",
    "\"cpl\"",
    "\"segs\"",
    "\"prot16\"",
    "9",
    "0.5",
];

/// See [`super::target`].
pub struct Requests {
    program: PathBuf,
    child: Option<(Child, ChildStdin, BufReader<ChildStdout>)>,
}

impl Requests {
    /// Starts the program at the first input.
    ///
    /// # Errors
    /// The program is not there.
    pub fn new(program: &Path) -> Result<Requests, String> {
        if !program.exists() {
            return Err(format!("{} is not there: cargo build --release", program.display()));
        }
        Ok(Requests { program: program.into(), child: None })
    }

    fn start(&mut self) -> Result<&mut (Child, ChildStdin, BufReader<ChildStdout>), String> {
        if self.child.is_none() {
            let mut child = Command::new(&self.program)
                .arg("exec")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .map_err(|e| e.to_string())?;
            let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
                return Err("no pipes".into());
            };
            self.child = Some((child, to, BufReader::new(from)));
        }
        self.child.as_mut().ok_or("no child".into())
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        if let Some((mut child, to, _)) = self.child.take() {
            drop(to);
            let _ = child.wait();
        }
    }
}

impl Target for Requests {
    /// A line for each; malformed input ends it with status 2, which is what it says it does.
    fn one(&mut self, r: &mut Random) -> Result<(), String> {
        let mut bytes = r.one_of(&SEEDS).as_bytes().to_vec();
        for _ in 0..r.below(4) {
            if r.once_in(2) {
                // A token in place of a value, or between.
                let at = r.below(bytes.len() as u64) as usize;
                let end =
                    bytes[at..].iter().position(|b| matches!(b, b',' | b'}' | b']')).map_or(bytes.len(), |n| at + n);
                let at = bytes[..at].iter().rposition(|b| matches!(b, b':' | b',' | b'[')).map_or(at, |n| n + 1);
                bytes.splice(at..end, r.one_of(&TOKENS).bytes());
            } else {
                mutate(r, &mut bytes);
            }
        }
        bytes.retain(|b| *b != b'\n' && *b != b'\r');
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if text.trim().is_empty() {
            return Ok(());
        }
        let (_, to, from) = self.start()?;
        let sent = to.write_all(&bytes).and_then(|()| to.write_all(b"\n")).and_then(|()| to.flush());
        let mut line = String::new();
        let answered = sent.is_ok() && from.read_line(&mut line).is_ok_and(|n| n > 0);
        if answered {
            return match serde_json::from_str::<serde_json::Value>(&line) {
                Ok(v) if v.is_object() => Ok(()),
                _ => Err(format!("{text}: the answer is no JSON object: {line}")),
            };
        }
        let Some((mut child, to, _)) = self.child.take() else { return Ok(()) };
        drop(to);
        let status = child.wait().map_err(|e| e.to_string())?;
        match status.code() {
            Some(2) => Ok(()),
            _ => Err(format!("{text}: it ended: {status}")),
        }
    }
}
