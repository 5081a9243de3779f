//! The kernel inside a bzImage, unpacked here instead of by its own code in the guest (Documentation/arch/x86/boot.rst, `payload_offset`;
//! the .xz file format 1.2.1; LZ4's "legacy frame" and block format): a fraction of a second where the interpreter needs half a minute.

use flate2::{Crc, bufread::GzDecoder};
use lzma_rust2::Lzma2Reader;
use lzma_rust2::filter::bcj::BcjReader;
use std::io::Read;

/// What the kinds of packing begin with.
const GZIP: &[u8] = &[0x1f, 0x8b];
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
const LZ4: &[u8] = &[0x02, 0x21, 0x4c, 0x18];

/// Bytes of a whole block of LZ4's legacy frames.
const LZ4_BLOCK: usize = 8 << 20;
/// The largest history that is kept for xz.
const LARGEST_DICTIONARY: u32 = 128 << 20;

/// Unpacks what is packed by gzip, xz or LZ4 and becomes at most `most` bytes. `None`: it is packed otherwise, or damaged; then the guest's
/// own code may see what it makes of it.
pub fn unpack(packed: &[u8], most: usize) -> Option<Vec<u8>> {
    if packed.starts_with(GZIP) {
        return read(GzDecoder::new(packed), most);
    }
    // Behind the others the kernel's makers put the length of what comes out.
    let (packed, length) = packed.split_last_chunk()?;
    let length = u32::from_le_bytes(*length) as usize;
    let out = match packed {
        _ if length > most => None,
        _ if packed.starts_with(XZ) => unxz(packed, length),
        _ if packed.starts_with(LZ4) => unlz4(packed.get(LZ4.len()..)?, length),
        _ => None,
    };
    out.filter(|out| out.len() == length)
}

fn read(from: impl Read, most: usize) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    from.take(most as u64 + 1).read_to_end(&mut out).ok()?;
    (out.len() <= most).then_some(out)
}

/// The first block of an .xz file: LZMA2, with or without the filter for x86 code before it, checked by CRC32 as kernels have it.
fn unxz(packed: &[u8], length: usize) -> Option<Vec<u8>> {
    const CHECK_CRC32: [u8; 2] = [0, 1];
    const SIZES: u8 = 0xc0;
    let check = packed.get(6..8)?;
    let block = packed.get(12..)?;
    let header = block.get(..(usize::from(*block.first()?) + 1) * 4)?;
    let flags = *header.get(1)?;
    let mut filters = header.get(2..)?;
    for _ in 0..(flags & SIZES).count_ones() {
        number(&mut filters)?;
    }
    let mut x86 = false;
    let dictionary = loop {
        let (id, properties) = (number(&mut filters)?, number(&mut filters)?);
        match (id, properties) {
            (4, 0) => x86 = true,
            // 5.3.1: two bits of mantissa, and the exponent.
            (0x21, 1) => break (2 | u32::from(*filters.first()? & 1)).checked_shl(u32::from(filters[0] / 2) + 11)?,
            _ => return None,
        }
    };
    if check != CHECK_CRC32 || dictionary > LARGEST_DICTIONARY {
        return None;
    }
    let mut data = block.get(header.len()..)?;
    let before = data.len();
    let plain = Lzma2Reader::new(&mut data, dictionary, None);
    let out = if x86 { read(BcjReader::new_x86(plain, 0), length)? } else { read(plain, length)? };
    let padding = (before - data.len()).wrapping_neg() % 4;
    let told = data.get(padding..padding + 4)?;
    let mut crc = Crc::new();
    crc.update(&out);
    (told == crc.sum().to_le_bytes()).then_some(out)
}

/// A number of the .xz format (1.2): seven bits a byte, the lowest first.
fn number(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..63).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Blocks of LZ4, each behind its length.
fn unlz4(mut packed: &[u8], length: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; length];
    for block in out.chunks_mut(LZ4_BLOCK) {
        let (size, rest) = packed.split_first_chunk()?;
        let size = u32::from_le_bytes(*size) as usize;
        unlz4_block(rest.get(..size)?, block)?;
        packed = &rest[size..];
    }
    Some(out)
}

/// A length of which the token has four bits.
#[inline(always)]
fn lz4_length(packed: &[u8], at: &mut usize, four: u8) -> Option<usize> {
    let mut length = usize::from(four);
    if four == 15 {
        loop {
            let more = *packed.get(*at)?;
            *at += 1;
            length += usize::from(more);
            if more != 255 {
                break;
            }
        }
    }
    Some(length)
}

/// A block, which becomes all of `out`.
fn unlz4_block(packed: &[u8], out: &mut [u8]) -> Option<()> {
    /// Most pieces are shorter, and so many bytes are copied faster than a number that has to be looked at.
    const PIECE: usize = 32;
    let (mut at, mut to) = (0, 0);
    while at < packed.len() {
        let token = packed[at];
        at += 1;
        let literals = lz4_length(packed, &mut at, token >> 4)?;
        match (packed.get(at..)?.first_chunk::<PIECE>(), out.get_mut(to..)?.first_chunk_mut::<PIECE>()) {
            (Some(from), Some(to)) if literals <= PIECE => *to = *from,
            _ => out.get_mut(to..to + literals)?.copy_from_slice(packed.get(at..at + literals)?),
        }
        (at, to) = (at + literals, to + literals);
        if at == packed.len() {
            break;
        }
        let back = usize::from(u16::from_le_bytes([*packed.get(at)?, *packed.get(at + 1)?]));
        at += 2;
        let length = lz4_length(packed, &mut at, token & 15)? + 4;
        let from = to.checked_sub(back).filter(|from| *from < to)?;
        let end = (to + length <= out.len()).then_some(to + length)?;
        let (done, rest) = out.split_at_mut(to);
        match (done[from..].first_chunk::<PIECE>(), rest.first_chunk_mut::<PIECE>()) {
            (Some(from), Some(to)) if length <= PIECE => *to = *from,
            _ => {
                // What is copied may be what was just written: what there is of it, which doubles each time.
                while to < end {
                    let n = (end - to).min(to - from);
                    out.copy_within(from..from + n, to);
                    to += n;
                }
            }
        }
        to = end;
    }
    (to == out.len()).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    /// Calls, which the filter for x86 code changes, and words that repeat.
    fn text() -> Vec<u8> {
        let calls = (1..9).flat_map(|n| [0x90, 0x90, 0x90, 0xe8, n, 0, 0, 0]);
        calls.chain(*b"hello hello hello").collect()
    }

    /// `text` through `xz --check=crc32 --x86 --lzma2=dict=1MiB`, and its length.
    const PACKED: [u8; 96] = [
        0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x01, 0x69, 0x22, 0xde, 0x36, 0x02, 0x01, 0x04, 0x00, 0x21, 0x01,
        0x10, 0x00, 0x8b, 0x21, 0x6f, 0x49, 0xe0, 0x00, 0x50, 0x00, 0x22, 0x5d, 0x00, 0x48, 0x68, 0x36, 0x01, 0x20,
        0x0c, 0x91, 0xc9, 0xc9, 0x00, 0xb3, 0xb7, 0xbb, 0x25, 0x25, 0x46, 0xb1, 0x9c, 0xa5, 0xaf, 0x53, 0x12, 0xf2,
        0x91, 0x10, 0x05, 0xd4, 0x9a, 0x83, 0x0a, 0xbc, 0x9e, 0x00, 0x00, 0x00, 0x00, 0x00, 0x40, 0x1b, 0xee, 0x4c,
        0x00, 0x01, 0x3a, 0x51, 0x30, 0x0a, 0x43, 0x19, 0x90, 0x42, 0x99, 0x0d, 0x01, 0x00, 0x00, 0x00, 0x00, 0x01,
        0x59, 0x5a, 81, 0, 0, 0,
    ];

    #[test]
    fn xz_with_the_filter_for_code() {
        assert_eq!(unpack(&PACKED, 81).as_deref(), Some(&text()[..]));
        assert_eq!(unpack(&PACKED, 80), None, "more than it may be");
        // The check tells what is damaged, wherever it is.
        for at in 24..72 {
            let mut damaged = PACKED;
            damaged[at] ^= 0x10;
            assert_ne!(unpack(&damaged, 1000).as_deref(), Some(&text()[..10]), "byte {at}");
            assert!(unpack(&damaged, 1000).is_none_or(|out| out == text()), "byte {at}");
        }
        for length in 0..PACKED.len() {
            assert_eq!(unpack(&PACKED[..length], 1000), None, "{length} bytes of it");
        }
    }

    /// Literals and a match that overlaps itself, literals with a long length, a match from far away; and a second block behind a whole one.
    #[test]
    fn lz4_in_legacy_frames() {
        let last = [&[0xf0, 35][..], &[b'z'; 50]].concat();
        let first = [&[0x32][..], b"abc", &[3, 0], &[0xf4, 24], &[b'y'; 39], &[40, 0], &last].concat();
        let block = |bytes: &[u8]| [&(bytes.len() as u32).to_le_bytes()[..], bytes].concat();
        let whole = [&b"abcabcabc"[..], &[b'y'; 39], b"c", &[b'y'; 7], &[b'z'; 50]].concat();
        let length = (whole.len() as u32).to_le_bytes();
        let packed = [LZ4, &block(&first), &length].concat();
        let out = unpack(&packed, 200).expect("unpacked");
        assert_eq!(String::from_utf8_lossy(&out), String::from_utf8_lossy(&whole));
        // A block of one byte over and over: a match of 8 MiB less one and the last literal.
        let mut same = vec![0x1f, b'a', 1, 0];
        same.extend(vec![255; (LZ4_BLOCK - 2 - 19) / 255]);
        same.extend([((LZ4_BLOCK - 2 - 19) % 255) as u8, 0x10, b'a']);
        let length = ((LZ4_BLOCK + whole.len()) as u32).to_le_bytes();
        let two = [LZ4, &block(&same), &block(&first), &length].concat();
        let out = unpack(&two, LZ4_BLOCK + 200).expect("unpacked");
        assert!(out[..LZ4_BLOCK].iter().all(|b| *b == b'a') && out[LZ4_BLOCK..] == whole);
        // A match that begins before the block, one of distance 0, and one that goes on too far.
        for (at, v) in [(8 + 4, 4), (8 + 4, 0), (8, 0x3f)] {
            let mut wrong = packed.clone();
            wrong[at] = v;
            assert_eq!(unpack(&wrong, 100), None, "{at}: {v}");
        }
    }

    #[test]
    fn gzip_and_what_is_not_known() {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
        gzip.write_all(&text()).expect("memory");
        let packed = gzip.finish().expect("memory");
        assert_eq!(unpack(&packed, 81), Some(text()));
        assert_eq!(unpack(&packed, 80), None);
        assert_eq!(unpack(&[b"BZh9"[..].to_vec(), vec![0; 100]].concat(), 100), None);
        assert_eq!(unpack(&[], 100), None);
    }
}
