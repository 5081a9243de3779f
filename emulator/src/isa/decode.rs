//! Bytes to [`Insn`]: bitness, the 15-byte limit, and the decoder options that make iced behave as hardware does.

use super::length::{Fetched, fetched};
use crate::isa::Insn;
use crate::isa::host_cpu::cpuid;
use iced_x86::{Code, CodeSize, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic, Register};
use std::sync::OnceLock;

/// SDM 2A 2.3.11: longer instructions give #GP(0).
pub const MAX_INSN_LEN: usize = 15;

/// AMD and Hygon differ from the others in a few encodings of 64-bit code: a 66 prefix makes near branches 16 bits wide, far pointers
/// have no 64-bit offset, UD0 has no ModRM byte. All engines follow the host, because two of them run guest code on it.
pub fn options() -> u32 {
    if is_amd() { DecoderOptions::AMD } else { DecoderOptions::NONE }
}

/// Is the host AMD's or Hygon's?
#[inline]
pub fn is_amd() -> bool {
    static HOST: OnceLock<bool> = OnceLock::new();
    // "Auth" of AuthenticAMD, "Hygo" of HygonGenuine in EBX.
    *HOST.get_or_init(|| matches!(cpuid(0, 0)[1], 0x6874_7541 | 0x6f67_7948))
}

/// Why bytes are no instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// The bytes ended first: with fewer than 15 bytes given, the fetch of the next byte decides (page fault or more bytes).
    Truncated,
    /// No instruction: #UD.
    Invalid,
    /// Longer than 15 bytes: #GP(0).
    TooLong,
}

/// Decodes the instruction at the start of `bytes` (at most 15 are looked at) in 16-, 32- or 64-bit code.
///
/// # Errors
/// See [`DecodeError`].
pub fn decode(bytes: &[u8], bitness: u32) -> Result<Insn, DecodeError> {
    if let Some(iced) = without_tables(bytes, bitness) {
        return Ok(Insn::new(iced));
    }
    let window = &bytes[..bytes.len().min(MAX_INSN_LEN)];
    // NO_INVALID_CHECK is not given: reserved encodings must be #UD. UDBG, MPX, CL1INVMB ... are other vendors' or dropped.
    let mut decoder = Decoder::with_ip(bitness, window, 0, options());
    let mut iced = Instruction::default();
    decoder.decode_out(&mut iced);
    if bitness != 64 && wide_is_none(&iced, window) {
        return Err(DecodeError::Invalid);
    }
    if !iced.is_invalid() && (is_amd() || !is_amds(&iced)) {
        correct(&mut iced, window);
        return Ok(Insn::new(iced));
    }
    if is_amd() && is_ud1(window) {
        return Err(DecodeError::Invalid);
    }
    Err(match fetched(window, bitness) {
        Fetched::NoOpcode => DecodeError::Invalid,
        Fetched::Whole(len) if len <= window.len() => DecodeError::Invalid,
        _ if window.len() == MAX_INSN_LEN => DecodeError::TooLong,
        _ => DecodeError::Truncated,
    })
}

/// The instructions that a program meets at its start and engines leave to the interpreter. iced builds tables when it is first asked,
/// which takes longer than a small program runs.
fn without_tables(bytes: &[u8], bitness: u32) -> Option<Instruction> {
    let (code, len) = match bytes {
        _ if bitness != 64 => return None,
        [0x0f, 0xa2, ..] => (Code::Cpuid, 2),
        [0x0f, 0x01, 0xd0, ..] => (Code::Xgetbv, 3),
        [0x0f, 0x05, ..] => (Code::Syscall, 2),
        _ => return None,
    };
    let mut iced = Instruction::with(code);
    iced.set_len(len);
    iced.set_code_size(CodeSize::Code64);
    iced.set_ip(0);
    Some(iced)
}

/// For those who use iced's decoder themselves: makes of an instruction what processors make of its bytes, which `window` begins with.
pub fn correct(iced: &mut Instruction, window: &[u8]) {
    if iced.code() == Code::Pause && is_amd() {
        xchg_r8_not_pause(iced, window);
    }
}

/// 3DNow!, SSE4A and XOP: to Intel's processors their bytes are no such instruction, and not as long (measured on Raptor Cove).
fn is_amds(iced: &Instruction) -> bool {
    matches!(iced.code().encoding(), EncodingKind::D3NOW | EncodingKind::XOP)
        || matches!(iced.mnemonic(), Mnemonic::Extrq | Mnemonic::Insertq)
}

/// With VEX.W Zen 4 has neither VPINSRD nor VPEXTRD in 16- and 32-bit code; Intel's manual says that W is ignored there.
fn wide_is_none(iced: &Instruction, window: &[u8]) -> bool {
    if !matches!(iced.code(), Code::VEX_Vpinsrd_xmm_xmm_rm32_imm8 | Code::VEX_Vpextrd_rm32_xmm_imm8) {
        return false;
    }
    let vex = window[..iced.len()].iter().position(|b| *b == 0xc4);
    options() == DecoderOptions::AMD && vex.and_then(|at| window.get(at + 2)).is_some_and(|b| b & 0x80 != 0)
}

/// F3 41 90 is XCHG with R8 on AMD's CPUs: with REX.B 90 is no NOP, and F3 does not make it PAUSE (measured on Zen 4). On Intel's it is
/// PAUSE (measured on Raptor Cove), as iced has it.
fn xchg_r8_not_pause(iced: &mut Instruction, window: &[u8]) {
    let [.., rex, 0x90] = window[..iced.len()] else { return };
    if rex & 0xf1 != 0x41 || iced.code_size() != CodeSize::Code64 {
        return;
    }
    let (code, r8, rax) = if rex & 8 != 0 {
        (Code::Xchg_r64_RAX, Register::R8, Register::RAX)
    } else if window[..iced.len()].contains(&0x66) {
        (Code::Xchg_r16_AX, Register::R8W, Register::AX)
    } else {
        (Code::Xchg_r32_EAX, Register::R8D, Register::EAX)
    };
    iced.set_code(code);
    iced.set_op0_register(r8);
    iced.set_op1_register(rax);
}

/// UD1: AMD's CPUs raise #UD before they fetch its ModRM byte (measured on Zen 4), Intel's after (SDM 2B UD).
fn is_ud1(window: &[u8]) -> bool {
    let is_prefix = |b: u8| matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3);
    let opcode = window.iter().position(|&b| !is_prefix(b)).map(|n| &window[n..]);
    matches!(opcode, Some([0x0f, 0xb9, ..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// JMP with a 66 prefix: 16-bit displacement and target on AMD (measured on Zen 4), prefix ignored on Intel (SDM 2A JMP).
    #[test]
    fn branches_with_an_operand_size_prefix_follow_the_host() {
        let i = decode(&[0x66, 0xe9, 0x10, 0, 0, 0], 64).expect("JMP");
        let amd = options() == DecoderOptions::AMD;
        assert_eq!((i.len, i.width), if amd { (4, crate::isa::Width::W) } else { (6, crate::isa::Width::Q) });
    }

    /// AltMovCr8 (AMD64 APM 3 MOV CRn): on AMD's CPUs LOCK MOV of CR0 is MOV of CR8, at CPL 3 #GP, not #UD, as natively; elsewhere LOCK stays.
    #[test]
    fn lock_mov_cr0_is_cr8_on_amd() {
        for (bytes, operand) in [(&[0xf0, 0x0f, 0x20, 0xc2][..], 1), (&[0xf0, 0x0f, 0x22, 0xc2], 0)] {
            let found =
                decode(bytes, 64).ok().filter(|i| !i.iced.has_lock_prefix()).map(|i| i.iced.op_register(operand));
            assert_eq!(found, is_amd().then_some(Register::CR8), "{bytes:02x?}");
        }
    }

    #[test]
    fn without_tables_as_with_them() {
        for bytes in [&[0x0f, 0xa2, 0][..], &[0x0f, 0x01, 0xd0, 0], &[0x0f, 0x05, 0]] {
            let iced = Decoder::with_ip(64, bytes, 0, options()).decode();
            assert!(without_tables(bytes, 64).expect("known").eq_all_bits(&iced), "{bytes:02x?}");
            assert!(without_tables(bytes, 32).is_none());
        }
    }

    #[test]
    fn errors() {
        let prefixes = |n: usize, rest: &[u8]| [&vec![0x66; n][..], rest].concat();
        let rows = [
            (prefixes(0, &[0x90]), None),
            (prefixes(14, &[0x90]), None),
            (prefixes(14, &[]), Some(DecodeError::Truncated)),
            (prefixes(15, &[]), Some(DecodeError::TooLong)),
            (prefixes(15, &[0x90]), Some(DecodeError::TooLong)),
            (prefixes(14, &[0x0f, 0xa2]), Some(DecodeError::TooLong)),
            // No such instruction, whatever follows: PUSH ES and LOCK NOP in 64-bit code.
            (vec![0x06], Some(DecodeError::Invalid)),
            (prefixes(14, &[0x06]), Some(DecodeError::Invalid)),
            (prefixes(13, &[0xf0, 0x90]), Some(DecodeError::Invalid)),
            (prefixes(1, &[0x06]), Some(DecodeError::Invalid)),
            (vec![0x41, 0x0f, 0xb9], Some(if is_amd() { DecodeError::Invalid } else { DecodeError::Truncated })),
            (vec![0x48], Some(DecodeError::Truncated)),
            (vec![], Some(DecodeError::Truncated)),
        ];
        for (bytes, error) in rows {
            assert_eq!(decode(&bytes, 64).err(), error, "{bytes:02x?}");
        }
    }
}
