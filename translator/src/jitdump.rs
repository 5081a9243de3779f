//! Translated code with its names in perf(1)'s format for `perf inject --jit` (tools/perf/Documentation/jitdump-specification.txt), which
//! makes of each block a small object with its code, so that `perf annotate` can show it.

use std::time::Duration;

const MAGIC: u32 = 0x4a69_5444;
const VERSION: u32 = 1;
const EM_X86_64: u32 = 62;
/// Bytes of the header.
const HEADER: u32 = 40;
/// Bytes of a JIT_CODE_LOAD record before the name.
const LOAD: usize = 56;

/// A file for the blocks of a process, as `(host address, guest address, code)`; all of them as if made at `when`, a time of the host's
/// monotonic clock.
pub fn content(pid: u32, when: Duration, blocks: impl Iterator<Item = (u64, u64, Vec<u8>)>) -> Vec<u8> {
    let mut all = Vec::new();
    let when = when.as_nanos() as u64;
    for v in [MAGIC, VERSION, HEADER, EM_X86_64, 0, pid] {
        all.extend_from_slice(&v.to_le_bytes());
    }
    for v in [when, 0] {
        all.extend_from_slice(&v.to_le_bytes());
    }
    for (index, (host, guest, code)) in blocks.enumerate() {
        let name = format!("guest:{guest:x}\0");
        let size = LOAD + name.len() + code.len();
        // JIT_CODE_LOAD is record 0. The thread is the process's first: code is shared.
        for v in [0, size as u32] {
            all.extend_from_slice(&v.to_le_bytes());
        }
        all.extend_from_slice(&when.to_le_bytes());
        for v in [pid, pid] {
            all.extend_from_slice(&v.to_le_bytes());
        }
        for v in [host, host, code.len() as u64, index as u64 + 1] {
            all.extend_from_slice(&v.to_le_bytes());
        }
        all.extend_from_slice(name.as_bytes());
        all.extend_from_slice(&code);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_lead_from_record_to_record() {
        let blocks = [(0x7000, 0x40_1000, vec![0x90, 0xc3]), (0x7002, 0x40_2000, vec![0xcc; 300])];
        let all = content(77, Duration::from_nanos(5), blocks.into_iter());
        let number = |at: usize| u32::from_le_bytes(all[at..at + 4].try_into().expect("four bytes")) as usize;
        assert_eq!(&all[..4], b"DTiJ");
        assert_eq!((number(8), number(20)), (HEADER as usize, 77));
        let first = HEADER as usize;
        let second = first + number(first + 4);
        assert_eq!(second + number(second + 4), all.len());
        // Code address, size; name; code.
        assert_eq!((number(second + 32), number(second + 40)), (0x7002, 300));
        assert_eq!(&all[second + LOAD..second + LOAD + 13], b"guest:402000\0");
        assert_eq!(&all[second - 2..second], &[0x90, 0xc3]);
    }
}
