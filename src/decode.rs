//! `bivisor decode`: bytes in, length and validity out.

use anyhow::{Context, Result, bail};
use bivisor_emulator::isa;
use clap::Args;
use iced_x86::{Formatter, IntelFormatter};
use serde::Serialize;
use std::io::{BufRead, Write};

/// Arguments of `bivisor decode`.
#[derive(Args)]
#[command(
    after_help = "Example:\n  echo 0fa2 | bivisor decode --mode 64\n  {\"hex\":\"0fa2\",\"len\":2,\"valid\":true,\"text\":\"cpuid\"}"
)]
pub struct DecodeArgs {
    /// Width of the code: 16, 32 or 64.
    #[arg(long, default_value_t = 64, value_parser = mode)]
    mode: u32,
}

fn mode(s: &str) -> Result<u32, String> {
    match s {
        "16" => Ok(16),
        "32" => Ok(32),
        "64" => Ok(64),
        _ => Err("one of 16, 32, 64".into()),
    }
}

#[derive(Serialize)]
struct Decoded<'a> {
    hex: &'a str,
    len: usize,
    valid: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
}

/// Reads a line of hex digits at a time from standard input and prints one JSON object for each.
pub fn run(args: &DecodeArgs) -> Result<i32> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let mut formatter = IntelFormatter::new();
    for (number, line) in std::io::stdin().lock().lines().enumerate() {
        let line = line.context("standard input")?;
        let hex = line.trim();
        if hex.is_empty() {
            continue;
        }
        let bytes = match parse_hex(hex) {
            Ok(bytes) => bytes,
            Err(why) => {
                out.flush()?;
                eprintln!("bivisor: line {}: {why}: give an even number of hex digits", number + 1);
                return Ok(2);
            }
        };
        let decoded = match isa::decode(&bytes, args.mode) {
            Ok(insn) => {
                let mut text = String::new();
                formatter.format(&insn.iced, &mut text);
                Decoded { hex, len: usize::from(insn.len), valid: true, text: Some(text) }
            }
            Err(_) => Decoded { hex, len: 0, valid: false, text: None },
        };
        serde_json::to_writer(&mut out, &decoded)?;
        out.write_all(b"\n")?;
    }
    out.flush()?;
    Ok(0)
}

/// Hex digits to bytes, in memory order.
pub fn parse_hex(hex: &str) -> Result<Vec<u8>> {
    let digits = hex.as_bytes();
    if !digits.len().is_multiple_of(2) {
        bail!("odd number of hex digits");
    }
    let nibble = |c: u8| (c as char).to_digit(16).with_context(|| format!("`{}` is no hex digit", c as char));
    digits.chunks(2).map(|p| Ok((nibble(p[0])? << 4 | nibble(p[1])?) as u8)).collect()
}
