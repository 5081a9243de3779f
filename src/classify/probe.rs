//! What instructions do at CPL 3 on this host: each is executed once in a confined child, and the signal says what it raised.

use super::Entry;
use crate::doctor::eighteen;
use crate::forms;
use crate::native::{Native, Outcome};
use anyhow::Result;
use bivisor_emulator::isa::facts::row_of;
use iced_x86::{Code, Mnemonic as M};

/// Code that gives the instruction what it needs; `None`: any encoding will do.
fn prepared(entry: &Entry) -> Option<Vec<u8>> {
    if let Some(name) = entry.robin_irvine {
        return Some(eighteen::code(name));
    }
    // A frame for the very next instruction, with Linux's selectors: push ss, rsp, flags, cs, rip.
    if entry.instruction == "IRET" {
        #[rustfmt::skip]
        let code = vec![
            0x48, 0x89, 0xe0,             // mov rax, rsp
            0x6a, 0x2b, 0x50,             // push 0x2b; push rax
            0x9c, 0x6a, 0x33,             // pushfq; push 0x33
            0x48, 0x8d, 0x05, 3, 0, 0, 0, // lea rax, [rip + 3]
            0x50, 0x48, 0xcf,             // push rax; iretq
        ];
        return Some(code);
    }
    // mov word ptr [rbx+4], 0x2b; lss eax, [rbx]: a stack segment that Linux has.
    if entry.instruction == "LSS" {
        return Some(vec![0x66, 0xc7, 0x43, 0x04, 0x2b, 0x00, 0x0f, 0xb2, 0x03]);
    }
    None
}

/// Fills in what is measured.
///
/// # Errors
/// There can be no confined child.
pub fn measure(entries: &mut [Entry]) -> Result<()> {
    let mut native = Native::new()?;
    let encodings = forms::encodings(64, |c| row_of(c).is_some());
    for entry in entries {
        let first = entry.codes.iter().find_map(|c: &Code| encodings.get(c)).map(|(bytes, _)| bytes.clone());
        let Some(code) = prepared(entry).or(first) else {
            entry.measured = Some("not in 64-bit code".into());
            continue;
        };
        let out = native.run(&code)?;
        let dummy = entry.privilege == "CPL 0 if CR4.UMIP" && eighteen::has_umip();
        entry.measured = Some(match out {
            Outcome::Exception(e) => e.to_string(),
            Outcome::SystemCall => "enters the host's kernel".into(),
            Outcome::Done(rax) if entry.codes[0].mnemonic() == M::Popf && rax & 0x200 != 0 => "runs; IF is kept".into(),
            Outcome::Done(_) if dummy => "traps (UMIP); the kernel answers".into(),
            Outcome::Done(_) => "runs".into(),
        });
    }
    Ok(())
}
