//! Numbers and byte strings of the exec contract: `"0x…"` strings or JSON integers; hex in memory order for bytes.

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// A 64-bit number, written `"0x…"` or as an integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Num(pub u64);

impl Serialize for Num {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&format_args!("{:#x}", self.0))
    }
}

struct NumVisitor;

impl Visitor<'_> for NumVisitor {
    type Value = Num;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an integer or a \"0x…\" string of at most 64 bits")
    }

    fn visit_u64<E: Error>(self, v: u64) -> Result<Num, E> {
        Ok(Num(v))
    }

    fn visit_i64<E: Error>(self, v: i64) -> Result<Num, E> {
        Ok(Num(v as u64))
    }

    fn visit_str<E: Error>(self, v: &str) -> Result<Num, E> {
        let parsed = match v.strip_prefix("0x").or_else(|| v.strip_prefix("0X")) {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => v.parse(),
        };
        parsed.map(Num).map_err(|_| E::custom(format!("`{v}` is no number of 64 bits")))
    }
}

impl<'de> Deserialize<'de> for Num {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Num, D::Error> {
        d.deserialize_any(NumVisitor)
    }
}

/// A number of up to 512 bits, little-endian in `.0`: vector registers, x87 registers.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Wide(pub Vec<u8>);

impl Wide {
    /// The low `N` bytes; `None` if the number needs more.
    pub fn bytes<const N: usize>(&self) -> Option<[u8; N]> {
        let mut out = [0; N];
        let used = self.0.iter().rposition(|b| *b != 0).map_or(0, |i| i + 1);
        (used <= N).then(|| {
            out[..used].copy_from_slice(&self.0[..used]);
            out
        })
    }
}

impl Serialize for Wide {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(2 + 2 * self.0.len());
        text.push_str("0x");
        push_hex(&mut text, self.0.iter().rev());
        s.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Wide {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Wide, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = Wide;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an integer or a \"0x…\" string of at most 512 bits")
            }
            fn visit_u64<E: Error>(self, v: u64) -> Result<Wide, E> {
                Ok(Wide(v.to_le_bytes().to_vec()))
            }
            fn visit_str<E: Error>(self, v: &str) -> Result<Wide, E> {
                let hex = v.strip_prefix("0x").unwrap_or(v);
                let padded = if hex.len().is_multiple_of(2) { hex.to_owned() } else { format!("0{hex}") };
                let mut bytes = crate::decode::parse_hex(&padded).map_err(E::custom)?;
                bytes.reverse();
                Ok(Wide(bytes))
            }
        }
        d.deserialize_any(V)
    }
}

/// Bytes as hex in memory order.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Hex(pub Vec<u8>);

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(2 * self.0.len());
        push_hex(&mut text, self.0.iter());
        s.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Hex, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(d)?;
        crate::decode::parse_hex(&text).map(Hex).map_err(D::Error::custom)
    }
}

fn push_hex<'a>(text: &mut String, bytes: impl Iterator<Item = &'a u8>) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for b in bytes {
        text.push(DIGITS[usize::from(b >> 4)] as char);
        text.push(DIGITS[usize::from(b & 15)] as char);
    }
}
