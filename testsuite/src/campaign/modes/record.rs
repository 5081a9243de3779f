//! Cases of 16- and 32-bit code as text, one a line, with what the host CPU made of them: `testsuite/modes.txt`.
//!
//! ```text
//! 32 Add_rm8_r8 [00 c8] "add al,cl" at=10002400 es,cs,ss,ds,fs=2b,23,2b,2b,2b r=1,2,0,0,10012000,0,0,0 f=202 => bp r0=3 f=206
//! ```
//!
//! Numbers are hexadecimal. `at` is EIP, `r` the registers in encoding order, `f` EFLAGS, `put` bytes at a linear address. Behind the arrow
//! stand the exception that ended the case (`bp`, behind the instruction: it went well) and what changed; `rip` if it is not behind an INT3
//! that follows the instruction. Behind a second arrow, `intel=>`, stands what an Intel CPU made of it if that is something else.

use super::segments::segment;
use crate::campaign::arena::{self, DATA, DATA2};
use crate::campaign::case::{Case, Kind};
use crate::campaign::outcome::{End, Outcome};
use bivisor_emulator::cpu::Fault;
use bivisor_emulator::interp::alu::Vendor;
use bivisor_emulator::mem::Prot;
use iced_x86::Code;
use std::fmt::Write;

/// The lines on record.
pub const LINES: &str = include_str!("../../../modes.txt");

/// Memory of all cases on record: data pages with a pattern, all else INT3.
pub fn memory() -> Vec<u8> {
    let mut out = vec![0xcc; arena::SIZE as usize];
    for (page, len, _) in arena::PAGES.into_iter().filter(|p| !p.2.contains(Prot::EXEC)) {
        for at in page - arena::BASE..page - arena::BASE + len {
            out[at as usize] = ((at * 0x9d) ^ (at >> 7)) as u8;
        }
    }
    out
}

/// The windows of all cases on record.
pub fn windows() -> Vec<(u64, u16)> {
    vec![(DATA, 0x4000), (DATA2, 0x2000)]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn list<T: std::fmt::LowerHex>(values: &[T]) -> String {
    values.iter().map(|v| format!("{v:x}")).collect::<Vec<_>>().join(",")
}

fn fault(f: Fault) -> String {
    match f {
        Fault::Pf { addr, code } => format!("pf({addr:x},{code:x})"),
        Fault::Gp(c) => format!("gp({c:x})"),
        Fault::Ss(c) => format!("ss({c:x})"),
        Fault::Np(c) => format!("np({c:x})"),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// What an outcome changed, as it stands behind the arrow.
pub fn result(case: &Case, pristine: &[u8], o: &Outcome) -> String {
    let mut out = match o.end {
        End::Left => "left".into(),
        End::Fault(Fault::Db(_)) => "db".into(),
        End::Fault(f) => fault(f),
    };
    if o.rip != (case.rip + case.code.len() as u64 + 1) & 0xffff_ffff {
        let _ = write!(out, " rip={:x}", o.rip);
    }
    for i in (0..8).filter(|&i| o.gpr[i] != case.gpr[i] && case.free_gpr[i] == 0) {
        let _ = write!(out, " r{i}={:x}", o.gpr[i]);
    }
    if o.rflags != case.rflags {
        let _ = write!(out, " f={:x}", o.rflags);
    }
    // A thread switch of the host loses the RPL of a null selector.
    let plain = |s: [u16; 5]| s.map(|s| if s < 4 { 0 } else { s });
    if plain(o.selectors) != plain(case.selectors) {
        let _ = write!(out, " es,cs,ss,ds,fs={}", list(&plain(o.selectors)));
    }
    let mut at = 0;
    for &(addr, len) in &case.windows[..2] {
        let (mut before, len) =
            (pristine[(addr - arena::BASE) as usize..][..usize::from(len)].to_vec(), usize::from(len));
        for (to, bytes) in &case.puts {
            for (n, b) in bytes.iter().enumerate() {
                if let Some(old) = before.get_mut((to + n as u64).wrapping_sub(addr) as usize) {
                    *old = *b;
                }
            }
        }
        let after = &o.memory[at..at + len];
        let mut n = 0;
        while n < len {
            let run = (n..len).take_while(|&k| after[k] != before[k]).count();
            if run > 0 {
                let _ = write!(out, " {:x}={}", addr + n as u64, hex(&after[n..n + run]));
            }
            n += run.max(1);
        }
        at += len;
    }
    out
}

/// The line up to the arrow.
pub fn start(case: &Case, text: &str) -> String {
    let bytes: Vec<String> = case.code.iter().map(|b| format!("{b:02x}")).collect();
    let mut out = format!("{} {:?} [{}] \"{text}\"", case.kind.bits(), case.insn, bytes.join(" "));
    let _ = write!(out, " at={:x} es,cs,ss,ds,fs={}", case.rip, list(&case.selectors));
    let _ = write!(out, " r={} f={:x}", list(&case.gpr[..8]), case.rflags);
    for (addr, bytes) in &case.puts {
        let _ = write!(out, " put={addr:x}:{}", hex(bytes));
    }
    out
}

fn numbers<T: TryFrom<u64>>(s: &str) -> Option<Vec<T>> {
    s.split(',').map(|n| T::try_from(u64::from_str_radix(n, 16).ok()?).ok()).collect()
}

fn bytes(s: &str) -> Option<Vec<u8>> {
    (0..s.len() / 2).map(|n| u8::from_str_radix(s.get(2 * n..2 * n + 2)?, 16).ok()).collect()
}

/// What stands between the results of AMD's and Intel's CPU.
pub const INTEL: &str = " intel=> ";

/// Reads a line: the case, and what a CPU of this make did.
///
/// # Errors
/// The line, which is none.
pub fn parse(line: &str, make: Vendor) -> Result<(Case, &str), String> {
    fn read(line: &str, make: Vendor) -> Option<(Case, &str)> {
        let (head, after) = line.split_once(" => ")?;
        let (amd, intel) = after.split_once(INTEL).unwrap_or((after, after));
        let after = if make == Vendor::Amd { amd } else { intel };
        let (head, rest) = head.split_once(" [")?;
        let (code, rest) = rest.split_once("] \"")?;
        let (_, words) = rest.split_once("\" ")?;
        let (bits, name) = head.split_once(' ')?;
        let kind = if bits == "32" { Kind::Insn32 } else { Kind::Insn16 };
        let insn = Code::values().find(|c| format!("{c:?}") == name)?;
        let mut case = Case { insn, kind, code: bytes(&code.replace(' ', ""))?, windows: windows(), ..Case::default() };
        case.xsave.set_mxcsr(0x1f80);
        for word in words.split(' ') {
            let (key, value) = word.split_once('=')?;
            match key {
                "at" => case.rip = u64::from_str_radix(value, 16).ok()?,
                "es,cs,ss,ds,fs" => case.selectors = numbers(value)?.try_into().ok()?,
                "r" => case.gpr[..8].copy_from_slice(&numbers::<u64>(value)?),
                "f" => case.rflags = u64::from_str_radix(value, 16).ok()?,
                "put" => {
                    let (addr, value) = value.split_once(':')?;
                    case.puts.push((u64::from_str_radix(addr, 16).ok()?, bytes(value)?));
                }
                _ => return None,
            }
        }
        case.fs_base = segment(case.selectors[4])?.base;
        Some((case, after))
    }
    read(line, make).ok_or(format!("no case: {line}"))
}
