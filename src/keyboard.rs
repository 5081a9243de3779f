//! What a terminal sends for keys, as scan codes of a US keyboard (set 1; IBM PS/2 hardware interface reference, keyboard).

const SHIFT: u8 = 0x2a;
const CONTROL: u8 = 0x1d;
const EXTENDED: u8 = 0xe0;
/// Set in the code of a key that is let go.
const UP: u8 = 0x80;

/// The keys from code 2 on, without and with shift; a space where a key has no character.
const PLAIN: &[u8] = b"1234567890-=\x7f\tqwertyuiop[]\r asdfghjkl;'` \\zxcvbnm,./";
const SHIFTED: &[u8] = b"!@#$%^&*()_+  QWERTYUIOP{}  ASDFGHJKL:\"~ |ZXCVBNM<>?";

/// Sequences of a terminal for keys without a character, and their codes (extended ones are sent after 0xE0).
const SEQUENCES: &[(&[u8], u8, bool)] = &[
    (b"\x1b[A", 0x48, true),
    (b"\x1b[B", 0x50, true),
    (b"\x1b[C", 0x4d, true),
    (b"\x1b[D", 0x4b, true),
    (b"\x1bOA", 0x48, true),
    (b"\x1bOB", 0x50, true),
    (b"\x1bOC", 0x4d, true),
    (b"\x1bOD", 0x4b, true),
    (b"\x1b[H", 0x47, true),
    (b"\x1b[F", 0x4f, true),
    (b"\x1b[1~", 0x47, true),
    (b"\x1b[4~", 0x4f, true),
    (b"\x1b[2~", 0x52, true),
    (b"\x1b[3~", 0x53, true),
    (b"\x1b[5~", 0x49, true),
    (b"\x1b[6~", 0x51, true),
    (b"\x1bOP", 0x3b, false),
    (b"\x1bOQ", 0x3c, false),
    (b"\x1bOR", 0x3d, false),
    (b"\x1bOS", 0x3e, false),
    (b"\x1b[15~", 0x3f, false),
    (b"\x1b[17~", 0x40, false),
    (b"\x1b[18~", 0x41, false),
    (b"\x1b[19~", 0x42, false),
    (b"\x1b[20~", 0x43, false),
    (b"\x1b[21~", 0x44, false),
    (b"\x1b[23~", 0x57, false),
    (b"\x1b[24~", 0x58, false),
];

fn find(keys: &[u8], byte: u8) -> Option<u8> {
    keys.iter().position(|k| *k == byte && byte != b' ').map(|n| n as u8 + 2)
}

/// The codes of the keys that were pressed and let go to send these bytes. Bytes that no key sends are left out.
pub fn scan_codes(mut typed: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let [byte, rest @ ..] = typed {
        if let Some((sequence, code, extended)) = SEQUENCES.iter().find(|(s, ..)| typed.starts_with(s)) {
            let prefix = extended.then_some(EXTENDED);
            out.extend(prefix.into_iter().chain([*code]).chain(prefix).chain([code | UP]));
            typed = &typed[sequence.len()..];
            continue;
        }
        typed = rest;
        match byte {
            0x1b => out.extend([1, 1 | UP]),
            b' ' => out.extend([0x39, 0x39 | UP]),
            b'\n' => out.extend([0x1c, 0x1c | UP]),
            8 => out.extend([0x0e, 0x0e | UP]),
            byte => {
                if let Some(code) = find(PLAIN, *byte) {
                    out.extend([code, code | UP]);
                } else if let Some(code) = find(SHIFTED, *byte) {
                    out.extend([SHIFT, code, code | UP, SHIFT | UP]);
                } else if let Some(code) = find(PLAIN, byte | 0x60).filter(|_| *byte < 0x20) {
                    out.extend([CONTROL, code, code | UP, CONTROL | UP]);
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Make codes by the keyboard's table: 1 is 02, Q 10, Enter 1C, A 1E, \ 2B, Z 2C, / 35, space 39, Backspace 0E, Tab 0F.
    #[test]
    fn keys_have_their_codes() {
        for (typed, code) in [
            (b'1', 2),
            (b'q', 0x10),
            (b'\r', 0x1c),
            (b'a', 0x1e),
            (b'`', 0x29),
            (b'\\', 0x2b),
            (b'z', 0x2c),
            (b'/', 0x35),
            (b' ', 0x39),
            (0x7f, 0x0e),
            (b'\t', 0x0f),
            (0x1b, 1),
        ] {
            assert_eq!(scan_codes(&[typed]), [code, code | UP], "{typed:#x}");
        }
    }

    #[test]
    fn shift_control_and_sequences() {
        assert_eq!(scan_codes(b"Z"), [SHIFT, 0x2c, 0xac, 0xaa]);
        assert_eq!(scan_codes(b"?"), [SHIFT, 0x35, 0xb5, 0xaa]);
        assert_eq!(scan_codes(&[3]), [CONTROL, 0x2e, 0xae, 0x9d]);
        assert_eq!(scan_codes(b"\x1b[Bx"), [0xe0, 0x50, 0xe0, 0xd0, 0x2d, 0xad]);
        assert_eq!(scan_codes(b"\x1bOP"), [0x3b, 0xbb]);
        assert!(scan_codes("ü".as_bytes()).is_empty());
    }
}
