//! Encodings of an instruction by its name: the first of each form, found by decoding what there is.

use bivisor_emulator::isa::{Insn, decode};
use iced_x86::{Code, Mnemonic};
use std::collections::BTreeMap;

/// A mnemonic by its name in any case; POPF means POPFQ's family in 64-bit code too.
pub fn mnemonic(name: &str) -> Option<Mnemonic> {
    Mnemonic::values().find(|m| *m != Mnemonic::INVALID && format!("{m:?}").eq_ignore_ascii_case(name))
}

/// One encoding of each code that `wanted` says yes to, in 16-, 32- or 64-bit code: of the legacy maps with one prefix and REX.W or
/// none. Registers are preferred to memory. VEX and EVEX are not enumerated.
pub fn encodings(bitness: u32, wanted: impl Fn(Code) -> bool) -> BTreeMap<Code, (Vec<u8>, Insn)> {
    let mut found = BTreeMap::new();
    let rexes: &[Option<u8>] = if bitness == 64 { &[None, Some(0x48)] } else { &[None] };
    for (rex, legacy) in rexes.iter().flat_map(|r| [None, Some(0x66), Some(0xf2), Some(0xf3)].map(|l| (*r, l))) {
        let prefixes: Vec<u8> = legacy.into_iter().chain(rex).collect();
        for (map, opcode) in
            [&[][..], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]].into_iter().flat_map(|m| (0..=0xff).map(move |o| (m, o)))
        {
            // Registers (all of them: 0F 01 decodes by the whole byte), then memory at [rax].
            let bytes = |modrm: u8| [&prefixes[..], map, &[opcode, modrm, 0, 0, 0, 0, 0, 0, 0, 0]].concat();
            for modrm in (0xc0..=0xffu8).chain((0..0x40).step_by(8)) {
                let bytes = bytes(modrm);
                let Ok(insn) = decode(&bytes, bitness) else { continue };
                let code = insn.iced.code();
                if wanted(code) {
                    found.entry(code).or_insert_with(|| (bytes[..usize::from(insn.len)].to_vec(), insn));
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_forms_of_some_names() {
        let count = |name: &str| {
            let m = mnemonic(name).expect("a name");
            encodings(64, |c| c.mnemonic() == m).len()
        };
        assert_eq!(count("popfq"), 1);
        // m and r16, r32, r64.
        assert_eq!(count("SLDT"), 4 - 1);
        assert_eq!(count("syscall"), 1);
        assert!(mnemonic("nonsense").is_none());
    }
}
