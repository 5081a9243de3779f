//! `bivisor diff replay`: a request of `bivisor exec` on two engines, their answers side by side; and the search for the instruction
//! after which they differ first.

use crate::text::Paint;
use anyhow::{Context, Result, bail};
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// A program's own addresses may be taken in one process and free in the next.
const ATTEMPTS: usize = 8;

/// What differs: where in the answers, the interpreter's and the other's.
type Differences = Vec<(String, String, String)>;

/// A request that was played back.
pub struct Replayed {
    /// The request, smaller if that shows it too; both answers are in its note.
    pub request: Value,
    /// What differs.
    pub differs: Differences,
    /// Why there is no answer, or that there is no difference.
    pub remark: Option<String>,
}

/// The answer of an engine.
fn exec(request: &Value, backend: &str) -> Result<Value> {
    let mut answer = Value::Null;
    for _ in 0..ATTEMPTS {
        let mut child = Command::new(std::env::current_exe().context("where this program is")?)
            .args(["exec", "--backend", backend])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("bivisor exec")?;
        let mut stdin = child.stdin.take().context("a pipe")?;
        // A request that it does not like ends it early.
        let _ = stdin.write_all(format!("{request}\n").as_bytes());
        drop(stdin);
        let output = child.wait_with_output().context("bivisor exec")?;
        if !output.status.success() {
            bail!("bivisor exec --backend {backend}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        answer = serde_json::from_slice(&output.stdout).context("the answer of bivisor exec")?;
        if answer["stop"] != "unsupported" {
            break;
        }
    }
    Ok(answer)
}

/// Where two answers differ.
fn differences(a: &Value, b: &Value, at: &str, out: &mut Differences) {
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            let mut names: Vec<&String> = x.keys().chain(y.keys()).collect();
            names.sort();
            names.dedup();
            for name in names {
                let inner = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
                differences(&a[name.as_str()], &b[name.as_str()], &inner, out);
            }
        }
        (Value::Array(x), Value::Array(y)) if x.len() == y.len() => {
            for (n, (a, b)) in x.iter().zip(y).enumerate() {
                differences(a, b, &format!("{at}[{n}]"), out);
            }
        }
        _ if a != b => out.push((at.to_owned(), plain(a), plain(b))),
        _ => {}
    }
}

fn plain(v: &Value) -> String {
    v.as_str().map_or_else(|| v.to_string(), str::to_owned)
}

/// Both answers to a request for so many instructions.
fn both(request: &Value, instructions: u64, engine: &str) -> Result<(Value, Value, Differences)> {
    let mut request = request.clone();
    request["stop"]["insns"] = instructions.into();
    let (a, b) = (exec(&request, "interp")?, exec(&request, engine)?);
    let mut out = Vec::new();
    differences(&a, &b, "", &mut out);
    Ok((a, b, out))
}

/// Plays a request back on the interpreter and on `engine`, cut down to the first instruction after which they differ.
pub fn bisect(request: Value, engine: &str) -> Result<Replayed> {
    let most = request["stop"]["insns"].as_u64().unwrap_or(1);
    let mut before = None;
    let mut last = Vec::new();
    for n in 1..=most {
        let (a, b, differs) = both(&request, n, engine)?;
        for (answer, name) in [(&a, "interp"), (&b, engine)] {
            if answer["stop"] == "unsupported" {
                let why = format!("not played back: {name}: {}", plain(&answer["reason"]));
                return Ok(Replayed { request, differs, remark: Some(why) });
            }
        }
        if !differs.is_empty() {
            // With the instruction alone, from what the others before it have left?
            if let Some(start) = before.as_ref().and_then(|before| alone(&request, before)) {
                let (a, b, differs) = both(&start, 1, engine)?;
                if !differs.is_empty() {
                    return Ok(told(start, 1, engine, (&a, &b), differs));
                }
            }
            return Ok(told(request, n, engine, (&a, &b), differs));
        }
        if a["insns"].as_u64().is_some_and(|done| done < n) {
            break;
        }
        before = Some(a);
        last = differs;
    }
    let remark =
        Some("played back alone both do the same: it depends on what was before, or others wrote there".into());
    Ok(Replayed { request, differs: last, remark })
}

/// The request that begins where an answer ends.
fn alone(request: &Value, before: &Value) -> Option<Value> {
    let mut start = request.clone();
    for part in ["regs", "segs", "fpu", "vec"] {
        start[part] = before.get(part)?.clone();
    }
    start["mem"].as_array_mut()?.extend(before["memdelta"].as_array()?.iter().cloned());
    Some(start)
}

fn told(mut request: Value, n: u64, engine: &str, answers: (&Value, &Value), differs: Differences) -> Replayed {
    request["stop"] = json!({ "insns": n });
    let side = |d: &(String, String, String)| json!({ "what": d.0, "interp": d.1, engine: d.2 });
    // What people wrote is text.
    let mut note = match request["note"].take() {
        note @ (Value::Object(_) | Value::Null) => note,
        said => json!({ "said": said }),
    };
    note["engines"] = json!(["interp", engine]);
    note["text"] = text_of(&request, n).into();
    note["differs"] = differs.iter().map(side).collect::<Vec<_>>().into();
    note["results"] = json!({ "interp": answers.0, engine: answers.1 });
    request["note"] = note;
    Replayed { request, differs, remark: None }
}

/// The instructions from RIP on, as far as they follow each other.
fn text_of(request: &Value, n: u64) -> Vec<String> {
    let number = |v: &Value| v.as_u64().or_else(|| u64::from_str_radix(v.as_str()?.trim_start_matches("0x"), 16).ok());
    let bits = match request["mode"].as_str() {
        Some("real16" | "prot16" | "compat16") => 16,
        Some("prot32" | "compat32") => 32,
        _ => 64,
    };
    let Some(ip) = number(&request["regs"]["rip"]) else { return Vec::new() };
    // Only 64-bit code has no base; of a selector alone it is that of real mode.
    let cs = &request["segs"]["cs"];
    let real = || number(cs).filter(|_| request["mode"] == "real16").map(|sel| sel << 4);
    let base = number(&cs["base"]).filter(|_| bits != 64).or_else(real).unwrap_or(0);
    let rip = ip.wrapping_add(base);
    let holds = |m: &&Value| {
        let len = m["hex"].as_str().map_or(0, |h| h.len() as u64 / 2);
        number(&m["addr"]).is_some_and(|a| (a..a + len).contains(&rip))
    };
    let Some(chunk) = request["mem"].as_array().and_then(|m| m.iter().rev().find(holds)) else { return Vec::new() };
    let at = number(&chunk["addr"]).map_or(0, |a| (rip - a) as usize);
    let Ok(code) = crate::decode::parse_hex(chunk["hex"].as_str().unwrap_or_default()) else { return Vec::new() };
    let mut decoder = Decoder::with_ip(bits, &code[at..], ip, DecoderOptions::NONE);
    let mut formatter = IntelFormatter::new();
    let mut out = Vec::new();
    while decoder.can_decode() && (out.len() as u64) < n {
        let insn = decoder.decode();
        let mut line = format!("{:#x}  ", insn.ip());
        formatter.format(&insn, &mut line);
        out.push(line);
    }
    out
}

/// Prints both sides; colours on a terminal only.
pub fn show(r: &Replayed, engine: &str) {
    let colour = Paint::of_stderr();
    if let Some(lines) = r.request["note"]["text"].as_array() {
        let n = lines.len();
        for (i, line) in lines.iter().enumerate() {
            let line = plain(line);
            eprintln!("  {}", if i + 1 == n { colour.bold(&line) } else { line });
        }
    }
    if let Some(remark) = &r.remark {
        eprintln!("bivisor: {remark}");
    }
    let seen: Differences = if r.differs.is_empty() {
        let live = r.request["note"]["differs"].as_array().cloned().unwrap_or_default();
        live.iter().map(|d| (plain(&d["what"]), plain(&d["interp"]), plain(&d[engine]))).collect()
    } else {
        r.differs.clone()
    };
    let width = |i: usize| seen.iter().map(|d| [&d.0, &d.1, &d.2][i].len().min(80)).max().unwrap_or(0).max(6);
    let (a, b) = (width(0), width(1));
    eprintln!("  {:a$}  {:b$}  {engine}", "", "interp");
    for (what, left, right) in &seen {
        eprintln!("  {what:a$}  {}  {}", colour.good(&format!("{left:b$}")), colour.bad(right));
    }
}

/// Plays files back; 1 if something differs.
pub fn run(files: &[std::path::PathBuf], engine: &str, json: bool) -> Result<i32> {
    let mut status = 0;
    for file in files {
        let request = read(file)?;
        let replayed = bisect(request, engine)?;
        if replayed.remark.is_none() {
            status = 1;
        }
        if json {
            println!("{}", json!({ "file": file, "remark": replayed.remark, "request": replayed.request }));
        } else {
            eprintln!("{}", file.display());
            show(&replayed, engine);
        }
    }
    Ok(status)
}

fn read(file: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let value: Value = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
    // As the campaign writes them.
    let inner = value.get("repro").and_then(|r| r.get("request")).or_else(|| value.get("request"));
    if inner.is_none()
        && let (Some(kind), Some(seed)) = (value["code"].as_str(), value.get("seed").and_then(Value::as_u64))
    {
        bail!(
            "{}: what differs is no single request but a sequence of kind {kind}: run bivisor diff --all --kinds {kind} --seed {seed} again",
            file.display()
        );
    }
    Ok(inner.cloned().unwrap_or(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests are written by people, too.
    #[test]
    fn a_note_may_be_text() {
        let request = json!({"note": "in words", "stop": {"insns": 9}, "regs": {"rip": "0x10"}, "mem": [{"addr": "0x10", "hex": "90f4"}]});
        let differs = vec![("rax".to_owned(), "0x1".to_owned(), "0x2".to_owned())];
        let told = told(request, 1, "bt", (&json!({"stop": "insns"}), &json!({"stop": "insns"})), differs);
        let note = &told.request["note"];
        assert_eq!(
            (&note["said"], &note["differs"][0]["bt"], &told.request["stop"]["insns"]),
            (&json!("in words"), &json!("0x2"), &json!(1))
        );
    }
}
