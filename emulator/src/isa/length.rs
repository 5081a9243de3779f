//! How many bytes are fetched of what is no instruction: #UD comes only after them, so #PF of a page and #GP of the 15-byte limit come first
//! (SDM 3A 6.9, table 6-2: faults from fetching, then from decoding).
//!
//! Processors find the length by the opcode map, before they know whether the instruction is one: a group's member that does not exist is
//! as long as the others, and an opcode that does not exist in 64-bit code as in 32-bit code. Measured on Zen 4 for every opcode that
//! iced-x86 calls invalid, by the number of prefixes at which #UD becomes #GP and by the bytes at a page's end at which it becomes #PF: the same.
//! Measured on Raptor Cove at a page's end, for every opcode of every map.

use super::decode::{is_amd, options};
use iced_x86::{Decoder, DecoderOptions};

/// What follows an opcode.
#[derive(Clone, Copy)]
struct Shape {
    modrm: bool,
    immediate: usize,
}

/// What is known of bytes that are no instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// So many bytes, if there are as many.
    Whole(usize),
    /// There are too few to tell.
    Unknown,
    /// No opcode of its map: the bytes up to it.
    NoOpcode,
}

/// How many bytes are fetched of what the decoder calls invalid.
pub fn fetched(bytes: &[u8], bitness: u32) -> Fetched {
    let prefixes = bytes.iter().take_while(|b| is_prefix(**b, bitness)).count();
    let (before, rest) = bytes.split_at(prefixes);
    let [first, after @ ..] = rest else { return Fetched::Unknown };
    // Behind REX they are LES, LDS and BOUND on Zen 4.
    let rex = is_amd() && bitness == 64 && before.last().is_some_and(|b| b & 0xf0 == 0x40);
    let is_modrm_of_register = after.first().map(|b| b >> 6 == 3 || bitness == 64);
    let (opcode, shape) = match (first, after) {
        (0xc4 | 0xc5 | 0x62, []) => return Fetched::Unknown,
        (0xc4 | 0xc5 | 0x62, [second, ..]) if is_modrm_of_register == Some(true) && !rex => {
            let (len, map) = match first {
                0xc5 => (3, 1),
                0xc4 => (4, second & 0x1f),
                // Map 5 is as map 1 here.
                _ => (5, if second & 7 == 5 { 1 } else { second & 7 }),
            };
            // Raptor Cove looks at two bits of it.
            let map = if is_amd() { map } else { map & 3 };
            match (map, rest.get(len - 1)) {
                // There it finds LES, LDS and BOUND.
                (0, _) if !is_amd() => (1, Some(Shape { modrm: true, immediate: 0 })),
                (1, None) => return Fetched::Unknown,
                (1, Some(0xb9)) if is_amd() => return Fetched::NoOpcode,
                (1, Some(0x38..=0x3f)) => return Fetched::NoOpcode,
                (1, Some(0x20..=0x23)) => (len + 1, Some(Shape { modrm: false, immediate: 0 })),
                // Conversions that only EVEX has.
                (1, Some(0x7a | 0x7b)) if *first == 0x62 => (len, Some(Shape { modrm: true, immediate: 0 })),
                (1, Some(opcode)) => (len, legacy(&[], &[0x0f, *opcode], bitness)),
                _ => (len, Some(Shape { modrm: true, immediate: usize::from(map == 3 || *first == 0x62 && map == 7) })),
            }
        }
        // AMD's XOP, which its later processors no longer have.
        (0x8f, [second, ..]) if is_amd() && second & 0x38 != 0 => {
            (4, Some(Shape { modrm: true, immediate: if second & 0x1f == 0xa { 4 } else { 0 } }))
        }
        // Of this group only TEST has an immediate.
        (0xf6 | 0xf7, [modrm, ..]) if modrm & 0x30 != 0 => (1, Some(Shape { modrm: true, immediate: 0 })),
        (0xa0..=0xa3, _) => (1, Some(Shape { modrm: false, immediate: address_size(before, bitness) })),
        (0x0f, []) => return Fetched::Unknown,
        // MOV of control and debug registers knows no memory operand.
        (0x0f, [0x20..=0x23, ..]) => (3, Some(Shape { modrm: false, immediate: 0 })),
        (0x0f, [0x38, ..]) => (3, Some(Shape { modrm: true, immediate: 0 })),
        (0x0f, [0x3a, ..]) => (3, Some(Shape { modrm: true, immediate: 1 })),
        // Raptor Cove has more such maps, and nothing in them.
        (0x0f, [0x39 | 0x3c | 0x3d, ..]) if !is_amd() => (3, Some(Shape { modrm: true, immediate: 0 })),
        (0x0f, [0x3b | 0x3e | 0x3f, ..]) if !is_amd() => (3, Some(Shape { modrm: true, immediate: 1 })),
        // Whole ones are VIA's to the decoder.
        (0x0f, [0xa6 | 0xa7]) if is_amd() => return Fetched::Unknown,
        (0x0f, [second, ..]) => (2, legacy(before, &[0x0f, *second], bitness)),
        (first, _) => (1, legacy(before, &[*first], bitness)),
    };
    let Some(shape) = shape else { return Fetched::NoOpcode };
    let operand = match shape.modrm {
        true => match rest.get(opcode..).and_then(|operand| memory_operand(before, operand, bitness)) {
            Some(len) => len,
            None => return Fetched::Unknown,
        },
        false => 0,
    };
    Fetched::Whole(prefixes + opcode + operand + shape.immediate)
}

fn is_prefix(b: u8, bitness: u32) -> bool {
    matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3) || bitness == 64 && b & 0xf0 == 0x40
}

/// Bytes of an address.
fn address_size(before: &[u8], bitness: u32) -> usize {
    match (bitness, before.contains(&0x67)) {
        (64, false) => 8,
        (64, true) | (32, false) | (16, true) => 4,
        _ => 2,
    }
}

/// The shape of an opcode without VEX or EVEX: of the first instruction that exists, with any mandatory prefix, in code of this kind, else in
/// 32-bit code.
fn legacy(before: &[u8], opcode: &[u8], bitness: u32) -> Option<Shape> {
    match opcode {
        // 3DNow! has its opcode behind all else; Raptor Cove does not know it.
        [0x0f, 0x0f] => return is_amd().then_some(Shape { modrm: true, immediate: 1 }),
        // Without AMD's EXTRQ; what Cyrix had; MOVNTI with 66; without VIA's PadLock.
        [0x0f, 0x78 | 0x7a | 0x7b | 0xa6 | 0xa7 | 0xc3] if !is_amd() => {
            return Some(Shape { modrm: true, immediate: 0 });
        }
        // EXTRQ, INSERTQ, and as long as these without a prefix.
        [0x0f, 0x78] if is_amd() => return Some(Shape { modrm: true, immediate: 2 }),
        // VIA's PadLock, which iced knows.
        [0x0f, 0xa6 | 0xa7] => return None,
        _ => {}
    }
    // What changes an immediate's size: 66, and REX.W of the last prefix.
    let wide = before.contains(&0x66).then_some(0x66);
    let rex = before.last().copied().filter(|b| bitness == 64 && b & 0xf0 == 0x40);
    let given = before.iter().rev().copied().find(|b| matches!(b, 0xf2 | 0xf3));
    let mandatory = [given, None, Some(0x66), Some(0xf3), Some(0xf2)];
    let head = |m, rex| -> Vec<u8> { wide.into_iter().chain(m).chain(rex).chain(opcode.iter().copied()).collect() };
    let mut heads =
        [(bitness, rex), (32, None)].into_iter().flat_map(|(bits, rex)| mandatory.map(|m| (bits, head(m, rex))));
    heads.find_map(|(bits, head)| {
        (0xc0..=0xff).step_by(8).chain((0..0x40).step_by(8)).find_map(|modrm| {
            let bytes = [&head[..], &[modrm], &[0; 10]].concat();
            let mut decoder = Decoder::new(bits, &bytes, options() | DecoderOptions::NO_INVALID_CHECK);
            let insn = decoder.decode();
            let at = decoder.get_constant_offsets(&insn);
            let immediate = at.immediate_size() + at.immediate_size2();
            let modrm = insn.len() > head.len() + immediate;
            (!insn.is_invalid()).then_some(Shape { modrm, immediate })
        })
    })
}

/// Bytes of a ModRM byte, SIB and displacement: as MOV has them. `None`: there are too few to tell.
fn memory_operand(before: &[u8], operand: &[u8], bitness: u32) -> Option<usize> {
    let modrm = operand.first()?;
    let sib = operand.get(1).copied();
    let address = before.contains(&0x67).then_some(0x67);
    let prefixes = usize::from(address.is_some());
    // Only mod, rm and SIB decide.
    let bytes: Vec<u8> = address.into_iter().chain([0x8b, *modrm, sib.unwrap_or(0)]).chain([0; 10]).collect();
    let len = Decoder::new(bitness, &bytes, DecoderOptions::NONE).decode().len() - prefixes - 1;
    // Without the SIB byte in sight another one could be longer, but it is to be fetched first anyway.
    (len > 0).then_some(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each measured on Zen 4, twice: by prefixes before it, and at the end of a page; and on Raptor Cove at the end of a page.
    #[test]
    fn as_measured() {
        let hex = |s: &str| -> Vec<u8> {
            s.split(' ').map(|b| u8::from_str_radix(b, 16).expect("hex")).chain([0; 12]).collect()
        };
        let rows = [
            ("06", 1),
            ("d6", 1),
            ("d4", 2),
            ("9a", 7),
            ("66 9a", 6),
            ("82 87", 7),
            ("8c bf", 6),
            ("8c ff", 2),
            ("8d c0", 2),
            ("c6 9f", 7),
            ("c7 bf", 10),
            ("66 c7 bf", 9),
            ("48 c7 bf", 11),
            ("fe bf", 6),
            ("fe bc", 7),
            ("d9 8f", 6),
            ("0f 20 8f", 3),
            ("0f 71 87", 8),
            ("0f 71 c7", 4),
            ("0f ba 87", 8),
            ("0f c5 87", 8),
            ("0f d6 87", 7),
            ("0f 38 ff 87", 8),
            ("0f 3a ff 87", 9),
            ("c5 f8 71 87", 9),
            ("a1", 9),
            ("67 a1", 6),
            ("f7 a7", 6),
            ("f7 87", 10),
            ("62 81 d7 08 7b ba", 10),
            ("c4 e1 78 c2 87", 10),
            ("c4 e2 78 04 87", 9),
            ("c4 e3 78 04 c7", 6),
            ("62 f1 7c 48 71 87", 11),
            ("62 f2 7c 48 ff c7", 6),
            ("62 f3 7c 48 ff 87", 11),
            ("62 bf f7 df 5e a4", 12),
        ];
        let zen: (&[_], &[_]) = (
            &[
                ("0f 0f 87", 8),
                ("c5 f8 ff", 3),
                ("c5 f8 0f c7", 5),
                ("43 62 bf f7 df 5e a4", 7),
                ("66 43 62 bf f7 df 5e a4", 8),
                ("c4 e7 78 04 87", 9),
                ("c4 eb 78 04 87", 9),
                ("43 c4 e3 78 04 87", 3),
                ("48 c5 f8 71 87", 3),
            ],
            &["0f 39", "0f 7a", "0f a6"],
        );
        let raptor: (&[_], &[_]) = (
            &[
                ("0f 39 00 87", 8),
                ("0f 3b 00 87", 9),
                ("0f 7a 87", 7),
                ("0f a6 87", 7),
                ("66 0f 78 87", 8),
                ("66 0f c3 87", 8),
                ("c5 f8 ff", 4),
                ("43 62 bf f7 df 5e a4", 13),
                ("66 43 62 bf f7 df 5e a4", 14),
                ("36 3e 67 4c 62 bf ee d1 c3 ac", 16),
                ("c4 e0 78 04", 2),
                ("c4 a4 14 ae", 7),
                ("62 f4 7c 48", 2),
                ("c4 e7 78 04 87", 10),
                ("c4 eb 78 04 87", 10),
                ("43 c4 e3 78 04 87", 11),
                ("48 c5 f8 71 87", 10),
            ],
            &["0f 0f", "c5 f8 0f"],
        );
        let (own, without) = if is_amd() { zen } else { raptor };
        for (bytes, len) in rows.iter().chain(own) {
            assert_eq!(fetched(&hex(bytes), 64), Fetched::Whole(*len), "{bytes}");
        }
        for bytes in ["0f 04", "0f 24", "0f 36", "c4 e1 78 04", "c5 44 38", "62 f1 7c 48 36"].iter().chain(without) {
            assert_eq!(fetched(&hex(bytes), 64), Fetched::NoOpcode, "{bytes}");
        }
        for (bytes, bits) in [(&[][..], 64), (&[0x66, 0x48], 64), (&[0x0f], 32), (&[0xc7], 16), (&[0x62, 0xf1], 64)] {
            assert_eq!(fetched(bytes, bits), Fetched::Unknown, "{bytes:02x?}");
        }
    }
}
