//! Stubs: where the jumps of exits lead that are not linked. Each says which it is and goes to the way out, by way of a tail that it
//! shares with its neighbours, so that it is 12.4 bytes and not 17.
//!
//! They lie one below the other, that of exit 0 highest, so that an exit's number says where its stub is and the other way round.

use crate::emit::{gs, slot};
use std::ops::Range;

/// Stubs that share a tail: as many as reach it by a short jump.
const SHARING: u32 = 12;
/// Bytes of a stub without its tail, and of a tail.
const STUB: u32 = 11;
const TAIL: u32 = 17;
/// Both together.
const GROUP: u32 = SHARING * STUB + TAIL;
const _: () = assert!((SHARING - 1) * STUB <= i8::MAX as u32);

/// Bytes of the stubs of the first so many exits.
pub fn stubs_size(exits: u32) -> usize {
    let (groups, more) = (exits / SHARING, exits % SHARING);
    let more = if more > 0 { TAIL + more * STUB } else { 0 };
    groups as usize * GROUP as usize + more as usize
}

/// Where the stub of an exit lies in a space for stubs that ends at `end`.
pub fn stub_before(end: u64, exit: u32) -> u64 {
    end - stubs_size(exit + 1) as u64
}

/// What is so many bytes before the end of the stubs: of a stub its exit; of a tail the first of its exits and `true`, since the fifth
/// byte of [`slot::EXIT`] says there which of them is meant.
pub fn stub_at(before: u64) -> (u32, bool) {
    let at = before.saturating_sub(1);
    let (group, within) = ((at / u64::from(GROUP)) as u32, (at % u64::from(GROUP)) as u32);
    match within.checked_sub(TAIL) {
        Some(within) => (group * SHARING + within / STUB, false),
        None => (group * SHARING, true),
    }
}

/// Which exit [`slot::EXIT`] means where a stub and its tail have put there what they say: the tail, which of its kind it is, in the
/// lower half; the stub, which of the tail's, in the byte above. No store is misaligned: the guest may have such stores fault.
pub fn exit_said(said: u64) -> u32 {
    said as u32 * SHARING + nth_said(said)
}

/// Which of its tail's a stub has said it is.
pub fn nth_said(said: u64) -> u32 {
    u32::from((said >> 32) as u8)
}

/// Emits the stubs of some exits, the last first, in a space for stubs that ends at `end`.
pub fn emit_stubs(code: &mut Vec<u8>, end: u64, exits: Range<u32>, way_out: u64) {
    for exit in exits.rev() {
        let (group, nth) = (exit / SHARING, exit % SHARING);
        // mov byte gs:[EXIT + 4], nth; jmp tail
        code.extend_from_slice(&[0x65, 0xc6, 0x04, 0x25]);
        code.extend_from_slice(&(gs(slot::EXIT) + 4).to_le_bytes());
        code.extend_from_slice(&[nth as u8, 0xeb, (nth * STUB) as u8]);
        if nth == 0 {
            let after = end - u64::from(group) * u64::from(GROUP);
            // mov dword gs:[EXIT], group; jmp way_out
            code.extend_from_slice(&[0x65, 0xc7, 0x04, 0x25]);
            code.extend_from_slice(&gs(slot::EXIT).to_le_bytes());
            code.extend_from_slice(&group.to_le_bytes());
            code.push(0xe9);
            code.extend_from_slice(&(way_out.wrapping_sub(after) as u32).to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    #[test]
    fn every_stub_says_its_exit_and_goes_out() {
        const END: u64 = 0x10_0000;
        const WAY_OUT: u64 = 0x2_0000;
        let (mut code, mut first) = (Vec::new(), 0);
        // As blocks come, whose exits end anywhere in a group.
        for more in [1, 3, 12, 7, 1, 1, 30, 5, 600] {
            let mut stubs = Vec::new();
            emit_stubs(&mut stubs, END, first..first + more, WAY_OUT);
            first += more;
            code.splice(0..0, stubs);
            assert_eq!(code.len(), stubs_size(first));
        }
        let start = END - code.len() as u64;
        for exit in 0..first {
            let (mut at, mut said) = (stub_before(END, exit), [0xa5u8; 8]);
            assert_eq!(stub_at(END - at), (exit, false));
            assert_eq!(stub_at(END - at - u64::from(STUB) + 1), (exit, false));
            while at != WAY_OUT {
                let mut d = Decoder::with_ip(64, &code[(at - start) as usize..], at, DecoderOptions::NONE);
                let i = d.decode();
                let to = (i.memory_displacement64() as i64 - i64::from(gs(slot::EXIT))) as usize;
                match i.op1_kind() {
                    iced_x86::OpKind::Immediate8 => said[to] = i.immediate8(),
                    iced_x86::OpKind::Immediate32 => said[to..to + 4].copy_from_slice(&i.immediate32().to_le_bytes()),
                    _ => at = i.near_branch_target(),
                }
                if !i.is_jmp_short_or_near() {
                    assert!(
                        stub_at(END - at) == (exit, false) || stub_at(END - at) == (exit / SHARING * SHARING, true)
                    );
                    at = i.next_ip();
                }
            }
            assert_eq!(exit_said(u64::from_le_bytes(said)), exit);
        }
    }
}
