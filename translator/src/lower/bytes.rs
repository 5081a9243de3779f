//! Changes of instructions made on their bytes (SDM 2A 2.1, 2.2): what an encoder would do, without its tables, which take longer to
//! build than a small program runs.

use bivisor_emulator::isa::Gpr;

/// Legacy prefixes in front of REX, VEX, EVEX or the opcode.
fn prefixes(bytes: &[u8]) -> usize {
    let is_prefix = |b: &&u8| matches!(b, 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65);
    bytes.iter().take_while(is_prefix).count()
}

/// May a prefix carry this bit of REX (1: B, 2: X)? Says yes when in doubt. (Of several REX only one right before the opcode counts.)
pub(crate) fn has_bit(bytes: &[u8], bit: u8) -> bool {
    let (prefixes, rest) = bytes.split_at(with_rex(bytes));
    match rest {
        // VEX3, EVEX: stored inverted. VEX2 has none.
        [0xc4 | 0x62 | 0x8f, p, ..] => p & bit << 5 == 0,
        _ => prefixes.iter().any(|p| matches!(p, 0x40..=0x4f) && p & bit != 0),
    }
}

/// How many legacy prefixes and REX there are, in whatever order.
fn with_rex(bytes: &[u8]) -> usize {
    let is_prefix =
        |b: &&u8| matches!(b, 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 | 0x40..=0x4f);
    bytes.iter().take_while(is_prefix).count()
}

/// Appends the instruction with `[base]` for its RIP-relative operand, whose displacement is at `displacement`. False if that takes
/// more than another ModRM byte.
pub(crate) fn with_base(to: &mut Vec<u8>, bytes: &[u8], displacement: usize, base: Gpr) -> bool {
    // RSP and RBP as a base mean something else, R8 and up need a prefix; 67 would cut the base to 32 bits.
    let fits = !matches!(base, Gpr::Rsp | Gpr::Rbp) && (base as u8) < 8;
    let narrow = bytes[..with_rex(bytes)].contains(&0x67);
    // A B bit, which meant nothing, would make R8 to R15 of it.
    let plain = fits && !narrow && !has_bit(bytes, 1);
    let Some(modrm) = displacement.checked_sub(1).filter(|_| plain) else { return false };
    to.extend_from_slice(&bytes[..modrm]);
    to.push((bytes[modrm] & 0x38) | base as u8);
    to.extend_from_slice(&bytes[displacement + 4..]);
    true
}

/// Appends a 64-bit load into `register` from the memory operand of JMP or CALL r/m64 (FF /4, FF /2). False if it is another
/// instruction.
pub(crate) fn load_of_branch(to: &mut Vec<u8>, bytes: &[u8], register: Gpr) -> bool {
    let (legacy, rest) = bytes.split_at(prefixes(bytes));
    let (rex, rest) = match rest {
        [rex @ 0x40..=0x4f, rest @ ..] => (*rex, rest),
        _ => (0x40, rest),
    };
    let [0xff, modrm, rest @ ..] = rest else { return false };
    if *modrm >= 0xc0 || !matches!(modrm >> 3 & 7, 2 | 4) {
        return false;
    }
    // F2 is BND, 3E NOTRACK, which are the branch's; 2E, 36 and 26 mean nothing.
    to.extend(legacy.iter().filter(|b| matches!(b, 0x64 | 0x65 | 0x67)));
    let r = register as u8;
    to.extend_from_slice(&[0x48 | (rex & 3) | (r >> 3) << 2, 0x8b, (modrm & 0xc7) | (r & 7) << 3]);
    to.extend_from_slice(rest);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Code, Decoder, DecoderOptions, Encoder, Instruction, OpKind, Register};

    fn decoded(bytes: &[u8]) -> Instruction {
        Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode()
    }

    /// ADD, VADDPS and an EVEX VADDPS of a RIP-relative operand, with the B bit and without: found by the campaign.
    #[test]
    fn a_bit_that_meant_nothing_before_is_not_taken_along() {
        let cases: [(&[u8], usize, bool); 5] = [
            (&[0x48, 0x03, 0x05, 1, 2, 3, 4], 3, true),
            (&[0x49, 0x03, 0x05, 1, 2, 3, 4], 3, false),
            (&[0xc4, 0xe1, 0x74, 0x58, 0x05, 1, 2, 3, 4], 5, true),
            (&[0xc4, 0xc1, 0x74, 0x58, 0x05, 1, 2, 3, 4], 5, false),
            (&[0x62, 0xd1, 0x74, 0x48, 0x58, 0x05, 1, 2, 3, 4], 6, false),
        ];
        for (bytes, displacement, can) in cases {
            let mut to = Vec::new();
            assert_eq!(with_base(&mut to, bytes, displacement, Gpr::Rdi), can, "{bytes:02x?}");
            if can {
                assert_eq!(decoded(&to).memory_base(), Register::RDI, "{to:02x?}");
            }
        }
    }

    /// What iced says of the bytes is what it would have been asked to encode.
    #[test]
    fn branches_become_loads() {
        let mut seen = 0;
        for prefix in [&[][..], &[0x64], &[0x67], &[0x3e], &[0x2e], &[0xf2], &[0x64, 0x67]] {
            for rex in [None, Some(0x41), Some(0x42), Some(0x43), Some(0x48), Some(0x4f)] {
                for modrm in 0..=255u8 {
                    let mut bytes = prefix.to_vec();
                    bytes.extend(rex);
                    bytes.extend_from_slice(&[0xff, modrm, 0x8b, 0x12, 0x34, 0x56, 0x78, 0x9a]);
                    let branch = decoded(&bytes);
                    let wanted = matches!(branch.code(), Code::Jmp_rm64 | Code::Call_rm64)
                        && branch.op0_kind() == OpKind::Memory;
                    for register in [Gpr::Rcx, Gpr::R11] {
                        let mut load = Vec::new();
                        assert_eq!(
                            load_of_branch(&mut load, &bytes[..branch.len().max(1)], register),
                            wanted,
                            "{bytes:02x?}"
                        );
                        if !wanted || branch.memory_base() == Register::RIP || branch.memory_base() == Register::EIP {
                            continue;
                        }
                        let i = decoded(&load);
                        assert_eq!((i.code(), i.len()), (Code::Mov_r64_rm64, load.len()));
                        assert_eq!(Gpr::from_iced(i.op0_register()), Some(register));
                        let operand = |i: &Instruction| {
                            let of =
                                (i.memory_base(), i.memory_index(), i.memory_index_scale(), i.memory_displacement64());
                            (of, i.memory_segment() == Register::FS)
                        };
                        assert_eq!(operand(&i), operand(&branch), "{bytes:02x?}");
                        seen += 1;
                    }
                }
            }
        }
        assert!(seen > 1000, "{seen}");
    }

    #[test]
    fn a_base_takes_the_place_of_rip() {
        // ADD r/m32, imm8; MOV AH; MOVAPS XMM9; VADDPS; VPERMQ with imm8 after the displacement.
        let rows: [&[u8]; 5] = [
            &[0x83, 0x05, 1, 2, 3, 4, 0x7f],
            &[0x8a, 0x25, 1, 2, 3, 4],
            &[0x44, 0x0f, 0x28, 0x0d, 1, 2, 3, 4],
            &[0xc5, 0xf4, 0x58, 0x05, 1, 2, 3, 4],
            &[0xc4, 0xe3, 0xfd, 0x00, 0x05, 1, 2, 3, 4, 0x1b],
        ];
        for bytes in rows {
            let mut d = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE);
            let i = d.decode();
            let at = d.get_constant_offsets(&i).displacement_offset();
            for base in [Gpr::Rax, Gpr::Rcx, Gpr::Rdx, Gpr::Rbx, Gpr::Rsi, Gpr::Rdi] {
                let mut made = Vec::new();
                assert!(with_base(&mut made, bytes, at, base));
                let mut wanted = i;
                wanted.set_memory_base(base.to_iced());
                wanted.set_memory_displacement64(0);
                wanted.set_memory_displ_size(0);
                let mut encoder = Encoder::new(64);
                encoder.encode(&wanted, 0).expect("encodable");
                let wanted = decoded(&encoder.take_buffer());
                let got = decoded(&made);
                assert_eq!((got, got.len()), (wanted, made.len()), "{bytes:02x?}");
            }
        }
        assert!(!with_base(&mut Vec::new(), rows[0], 2, Gpr::Rbp) && !with_base(&mut Vec::new(), rows[0], 2, Gpr::R9));
    }
}
