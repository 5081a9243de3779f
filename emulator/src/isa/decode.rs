//! Bytes to [`Insn`]: bitness, the 15-byte limit, and the decoder options that make iced behave as hardware does.

use crate::isa::Insn;
use iced_x86::{Decoder, DecoderOptions, Instruction};

/// SDM 2A 2.3.11: longer instructions give #GP(0).
pub const MAX_INSN_LEN: usize = 15;

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
    let window = &bytes[..bytes.len().min(MAX_INSN_LEN)];
    // NO_INVALID_CHECK is not given: reserved encodings must be #UD. UDBG, MPX, CL1INVMB ... are other vendors' or dropped.
    let mut decoder = Decoder::with_ip(bitness, window, 0, DecoderOptions::NONE);
    let mut iced = Instruction::default();
    decoder.decode_out(&mut iced);
    if !iced.is_invalid() {
        return Ok(Insn::new(iced));
    }
    match decoder.last_error() {
        iced_x86::DecoderError::NoMoreBytes if bytes.len() >= MAX_INSN_LEN => Err(DecodeError::TooLong),
        iced_x86::DecoderError::NoMoreBytes => Err(DecodeError::Truncated),
        _ => Err(DecodeError::Invalid),
    }
}
