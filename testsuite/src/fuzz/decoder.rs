//! The decoder wrapper: any bytes, in 16-, 32- and 64-bit code (SDM 2A 2).

use super::{Guided, Target, hex, mutate, quietly};
use crate::campaign::encode;
use crate::random::Random;
use bivisor_emulator::isa::{DecodeError, decode};
use iced_x86::{Code, Mnemonic, OpCodeInfo};

/// See [`super::target`].
pub struct Decode {
    codes: Vec<&'static OpCodeInfo>,
}

impl Default for Decode {
    fn default() -> Decode {
        Decode { codes: Code::values().map(Code::op_code).filter(|o| o.is_instruction()).collect() }
    }
}

impl Decode {
    pub(super) fn seed(&self, r: &mut Random) -> Vec<u8> {
        if r.once_in(3) { encode::wild(r) } else { encode::attempt(r, r.clone().one_of(&self.codes)) }.to_vec()
    }
}

impl Target for Decode {
    fn one(&mut self, r: &mut Random) -> Result<(), String> {
        let mut bytes = self.seed(r);
        if !r.once_in(3) {
            mutate(r, &mut bytes);
        }
        self.bytes(&bytes)
    }
}

impl Guided for Decode {
    /// It never panics; what it takes has a length, and more bytes behind it or none change nothing.
    fn bytes(&mut self, bytes: &[u8]) -> Result<(), String> {
        for bitness in [16, 32, 64] {
            let wrong = |what: String| Err(format!("{bitness}-bit [{}]: {what}", hex(bytes)));
            let whole = match quietly(|| decode(bytes, bitness)) {
                Ok(found) => found,
                Err(why) => return wrong(why),
            };
            match &whole {
                Ok(i) if i.len == 0 || i.len > 15 || usize::from(i.len) > bytes.len() => {
                    return wrong(format!("a length of {}", i.len));
                }
                Ok(i) => {
                    let n = usize::from(i.len);
                    match decode(&bytes[..n], bitness) {
                        Ok(again) if again.iced == i.iced && again.len == i.len => {}
                        other => return wrong(format!("{:?} with all bytes, {other:?} with {n}", i.iced.code())),
                    }
                    let cut = decode(&bytes[..n - 1], bitness).err();
                    // AMD's UD1 ends, as what is invalid, at its opcode.
                    let early = i.iced.mnemonic() == Mnemonic::Ud1 && cut == Some(DecodeError::Invalid);
                    if cut != Some(DecodeError::Truncated) && !early {
                        return wrong(format!("{:?} without its last byte is not cut off", i.iced.code()));
                    }
                }
                Err(DecodeError::Truncated) if bytes.len() >= 15 => {
                    return wrong("fifteen bytes are not enough".into());
                }
                Err(_) => {}
            }
        }
        Ok(())
    }
}
