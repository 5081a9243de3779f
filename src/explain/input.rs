//! What `explain` is asked about: an instruction by name, bytes, or code in a file.

use crate::decode::parse_hex;
use crate::{assemble, forms};
use anyhow::{Context, Result, anyhow, bail};
use bivisor_emulator::isa::{Class, facts};
use std::path::Path;

/// One run of bytes to explain.
pub struct Subject {
    /// What it is called.
    pub title: String,
    /// Where it is thought to lie.
    pub start: u64,
    /// Its bytes; more than one block of them may be given.
    pub bytes: Vec<u8>,
}

/// Where code without an address is thought to lie.
const START: u64 = 0x40_0000;
/// As much of a file as is looked at.
const MOST: usize = 512;

/// Understands the argument.
///
/// # Errors
/// What it is not.
pub fn subjects(what: &str) -> Result<Vec<Subject>> {
    let (path, place) = what.rsplit_once('@').map_or((what, None), |(p, a)| (p, Some(a)));
    if Path::new(path).is_file() && (place.is_some() || what.contains('/')) {
        return Ok(vec![in_file(path, place)?]);
    }
    if let Some(mnemonic) = assemble::mnemonic(what) {
        let all = forms::encodings(64, |c| c.mnemonic() == mnemonic && facts(c).class != Class::Undefined);
        if all.is_empty() {
            bail!("{what} has no legacy encoding in 64-bit code: give its bytes in hexadecimal");
        }
        return Ok(all
            .into_iter()
            .map(|(code, (bytes, _))| Subject {
                title: code.op_code().instruction_string().into(),
                start: START,
                bytes,
            })
            .collect());
    }
    let digits: String = what.split_whitespace().collect();
    match parse_hex(&digits) {
        Ok(bytes) if !bytes.is_empty() => Ok(vec![Subject { title: "the bytes".into(), start: START, bytes }]),
        _ if what.contains(char::is_whitespace) => {
            Ok(vec![Subject { title: what.into(), start: START, bytes: assemble::assemble(what, START)? }])
        }
        _ => bail!("`{what}` is no instruction, no bytes in hexadecimal and no file (FILE@ADDRESS or FILE@SYMBOL)"),
    }
}

/// Code of an ELF file, at an address, a symbol, or its entry point.
fn in_file(path: &str, place: Option<&str>) -> Result<Subject> {
    let data = std::fs::read(path).with_context(|| path.to_string())?;
    let elf = goblin::elf::Elf::parse(&data).with_context(|| format!("{path} is no ELF file"))?;
    if !elf.is_64 || elf.header.e_machine != goblin::elf::header::EM_X86_64 {
        bail!("{path} is not for x86-64");
    }
    let symbol = |name: &str| {
        let by = |syms: &goblin::elf::Symtab<'_>, strings: &goblin::strtab::Strtab<'_>| {
            syms.iter().find(|s| s.st_value != 0 && strings.get_at(s.st_name) == Some(name)).map(|s| s.st_value)
        };
        by(&elf.syms, &elf.strtab).or_else(|| by(&elf.dynsyms, &elf.dynstrtab))
    };
    let start = match place {
        None => elf.entry,
        Some(p) => p
            .strip_prefix("0x")
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .or_else(|| symbol(p))
            .ok_or_else(|| anyhow!("{path} has no symbol `{p}` (an address begins with 0x)"))?,
    };
    let found = elf.program_headers.iter().find_map(|h| {
        let inside = start.checked_sub(h.p_vaddr).filter(|d| *d < h.p_filesz)?;
        let from = (h.p_offset + inside) as usize;
        let end = (from + MOST).min((h.p_offset + h.p_filesz) as usize);
        data.get(from..end)
    });
    let bytes = found.ok_or_else(|| anyhow!("{path} has nothing at {start:#x}"))?.to_vec();
    Ok(Subject { title: format!("{path} at {start:#x}"), start, bytes })
}
