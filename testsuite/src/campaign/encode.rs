//! Bytes for an instruction: what its opcode demands is set, everything else is thrown (SDM 2A 2).
//!
//! Whether the bytes are that instruction is the decoder's word: an attempt may be another one, or none, and then it is a case too.

use crate::random::Random;
use iced_x86::{Code, EncodingKind, MandatoryPrefix, OpCodeInfo, OpCodeTableKind as T};

/// One attempt at bytes for a code in 64-bit mode; they are followed by thrown ones up to 24.
pub fn attempt(r: &mut Random, op: &OpCodeInfo) -> [u8; 24] {
    attempt_in(r, op, 64)
}

/// The same in code of so many bits.
pub fn attempt_in(r: &mut Random, op: &OpCodeInfo, bits: u32) -> [u8; 24] {
    let mut out = Vec::with_capacity(40);
    match op.encoding() {
        EncodingKind::VEX => vex(r, op, bits, &mut out),
        EncodingKind::EVEX => evex(r, op, bits, &mut out),
        _ => legacy(r, op, bits, &mut out),
    }
    // SIB, displacement, immediate.
    let (a, b, c) = (r.next(), r.edgy(), r.edgy());
    out.push(a as u8);
    out.extend(b.to_le_bytes());
    out.extend(c.to_le_bytes());
    out.resize(24, 0x90);
    out[..24].try_into().expect("24 bytes")
}

/// Bytes at random with a bias to prefixes and to opcodes of two bytes.
pub fn wild(r: &mut Random) -> [u8; 24] {
    let mut out = Vec::new();
    for _ in 0..r.below(4) {
        out.push(r.one_of(&[0x66, 0xf2, 0xf3, 0xf0, 0x67, 0x2e, 0x36, 0x3e, 0x26]));
    }
    if r.once_in(3) {
        out.push(0x40 | r.below(16) as u8);
    }
    match r.below(8) {
        0 => out.push(0xc4),
        1 => out.push(0xc5),
        2 => out.push(0x62),
        3..=5 => out.push(0x0f),
        _ => {}
    }
    while out.len() < 24 {
        out.push(r.next() as u8);
    }
    if r.once_in(16) {
        // Too long.
        out[..15].fill(0x66);
    }
    out.truncate(24);
    out.try_into().expect("24 bytes")
}

fn prefixes(r: &mut Random, op: &OpCodeInfo, bits: u32, out: &mut Vec<u8>) {
    if r.once_in(if bits == 64 { 24 } else { 6 }) {
        out.push(r.one_of(&[0x2e, 0x36, 0x3e, 0x26]));
    }
    if r.once_in(12) {
        out.push(0x64);
    }
    // Opcodes with an address size of their own (JCXZ, strings) say which; else 16- and 32-bit code often has the other one.
    let other = bits != 64 && op.address_size() != 0 && op.address_size() != bits;
    if other || r.once_in(if bits == 64 { 16 } else { 4 }) {
        out.push(0x67);
    }
    if op.encoding() != EncodingKind::Legacy {
        // #UD before VEX and EVEX.
        if r.once_in(200) {
            out.push(r.one_of(&[0x66, 0xf2, 0xf3, 0xf0, 0x40]));
        }
        return;
    }
    if r.once_in(if op.can_use_lock_prefix() { 3 } else { 150 }) {
        out.push(0xf0);
    }
    if op.can_use_rep_prefix() || op.can_use_repne_prefix() {
        if r.once_in(2) {
            out.push(r.one_of(&[0xf2, 0xf3]));
        }
    } else if op.mandatory_prefix() == MandatoryPrefix::None && r.once_in(60) {
        out.push(r.one_of(&[0xf2, 0xf3]));
    }
    let p66 = op.operand_size() == if bits == 16 { 32 } else { 16 } || op.mandatory_prefix() == MandatoryPrefix::P66;
    if p66 || r.once_in(if bits == 64 { 150 } else { 12 }) {
        out.push(0x66);
    }
    match op.mandatory_prefix() {
        MandatoryPrefix::PF3 => out.push(0xf3),
        MandatoryPrefix::PF2 => out.push(0xf2),
        _ => {}
    }
    // Order and repetition mean nothing.
    if out.len() > 1 {
        let n = r.below(out.len() as u64) as usize;
        out.rotate_left(n);
    }
    if r.once_in(100) && !out.is_empty() {
        let (first, n) = (out[0], r.below(13));
        out.splice(0..0, (0..n).map(|_| first));
    }
}

fn opcode(r: &mut Random, op: &OpCodeInfo, out: &mut Vec<u8>) {
    let word = op.op_code();
    let register = op.op_kinds().iter().any(|k| format!("{k:?}").contains("_opcode"));
    let low = if register { r.below(8) as u8 } else { 0 };
    if op.op_code_len() == 2 {
        out.extend([(word >> 8) as u8, word as u8 | low]);
        return;
    }
    out.push(word as u8 | low);
    let mut modrm = r.next() as u8;
    if r.once_in(2) {
        modrm |= 0xc0;
    }
    if op.group_index() >= 0 {
        modrm = modrm & !0x38 | (op.group_index() as u8) << 3;
    }
    if op.rm_group_index() >= 0 {
        modrm = 0xc0 | modrm & 0x38 | op.rm_group_index() as u8;
    }
    out.push(modrm);
}

fn legacy(r: &mut Random, op: &OpCodeInfo, bits: u32, out: &mut Vec<u8>) {
    prefixes(r, op, bits, out);
    if bits == 64 {
        rex(r, op, out);
    }
    match op.table() {
        T::T0F => out.push(0x0f),
        T::T0F38 => out.extend([0x0f, 0x38]),
        T::T0F3A => out.extend([0x0f, 0x3a]),
        _ => {}
    }
    opcode(r, op, out);
}

fn rex(r: &mut Random, op: &OpCodeInfo, out: &mut Vec<u8>) {
    let w = match op.operand_size() {
        64 if op.default_op_size64() => r.once_in(4),
        64 => true,
        _ => op.is_wig() && r.once_in(4) || r.once_in(40),
    };
    let mut rex = 0x40 | u8::from(w) << 3;
    if r.once_in(2) {
        rex |= r.below(8) as u8;
    }
    if rex != 0x40 || r.once_in(6) {
        out.push(rex);
        if r.once_in(100) {
            // A REX that is not last is ignored.
            out.push(0x3e);
        }
    }
}

fn pp(op: &OpCodeInfo) -> u8 {
    match op.mandatory_prefix() {
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
        _ => 0,
    }
}

fn map(op: &OpCodeInfo) -> u8 {
    match op.table() {
        T::T0F => 1,
        T::T0F38 => 2,
        T::T0F3A => 3,
        T::MAP5 => 5,
        T::MAP6 => 6,
        _ => 0,
    }
}

/// The inverted second source; 15 where there is none. Outside 64-bit mode the first eight registers, mostly.
fn vvvv(r: &mut Random, op: &OpCodeInfo, bits: u32) -> u8 {
    let used = op.op_kinds().iter().any(|k| format!("{k:?}").contains("_vvvv"));
    let low = if bits == 64 || r.once_in(40) { 0 } else { 8 };
    if used || r.once_in(100) { r.below(16) as u8 | low } else { 15 }
}

fn w(r: &mut Random, op: &OpCodeInfo) -> u8 {
    if op.is_wig() || op.is_wig32() && op.w() == 0 { r.below(2) as u8 } else { op.w() as u8 }
}

fn vex(r: &mut Random, op: &OpCodeInfo, bits_of_code: u32, out: &mut Vec<u8>) {
    prefixes(r, op, bits_of_code, out);
    let w = w(r, op);
    let l = if op.is_lig() { r.below(2) as u8 } else { op.l() as u8 };
    let last = vvvv(r, op, bits_of_code) << 3 | l << 2 | pp(op);
    // R and X as in a register form of LDS and LES, which these bytes are outside 64-bit mode.
    let fixed = if bits_of_code == 64 { 0 } else { 6 };
    let bits = if r.once_in(2) { r.below(8) as u8 | fixed } else { 7 };
    if map(op) == 1 && w == 0 && bits & 3 == 3 && r.once_in(2) {
        out.extend([0xc5, bits >> 2 << 7 | last]);
    } else {
        out.extend([0xc4, bits << 5 | map(op), w << 7 | last]);
    }
    opcode(r, op, out);
}

fn evex(r: &mut Random, op: &OpCodeInfo, bits_of_code: u32, out: &mut Vec<u8>) {
    prefixes(r, op, bits_of_code, out);
    let w = w(r, op);
    let v = vvvv(r, op, bits_of_code);
    let vsib = op.op_kinds().iter().any(|k| format!("{k:?}").contains("vsib"));
    let mut high = if v != 15 || vsib { r.below(2) as u8 } else { 1 };
    let mut bits = r.below(16) as u8;
    if bits_of_code != 64 {
        // The same of BOUND; and no registers beyond the eighth, mostly.
        bits |= 12;
        if !r.once_in(40) {
            (high, bits) = (1, bits | 1);
        }
    }
    let mut b = 0;
    let mut l = if op.is_lig() { r.below(3) as u8 } else { op.l() as u8 };
    let modes = op.can_broadcast() || op.can_use_rounding_control() || op.can_suppress_all_exceptions();
    if r.once_in(if modes { 2 } else { 150 }) {
        b = 1;
        if op.can_use_rounding_control() && r.once_in(2) {
            l = r.below(4) as u8;
        }
    }
    let masked = op.can_use_op_mask_register() && (op.require_op_mask_register() || r.once_in(2));
    let aaa = if masked || r.once_in(150) { r.below(8) as u8 } else { 0 };
    let z = u8::from(if op.can_use_zeroing_masking() && aaa != 0 { r.once_in(2) } else { r.once_in(150) });
    out.extend([0x62, bits << 4 | map(op), w << 7 | v << 3 | 4 | pp(op), z << 7 | l << 5 | b << 4 | high << 3 | aaa]);
    opcode(r, op, out);
}

/// Codes that a case can show in 64-bit mode on this host, and the others with the reason.
pub fn codes(supports: impl Fn(Code) -> bool) -> (Vec<Code>, Vec<(Code, &'static str)>) {
    codes_in(64, supports)
}

/// The same in code of so many bits.
pub fn codes_in(bits: u32, supports: impl Fn(Code) -> bool) -> (Vec<Code>, Vec<(Code, &'static str)>) {
    let mut wanted = Vec::new();
    let mut without = Vec::new();
    for code in Code::values() {
        let op = code.op_code();
        let decodes = match bits {
            16 => op.mode16(),
            32 => op.mode32(),
            _ => op.mode64(),
        };
        if !decodes || !op.is_instruction() {
            continue;
        }
        let never = super::never_decodes(code) || bits == 64 && super::never_decodes_in_64_bits(code);
        if !supports(code) || never {
            continue;
        }
        match super::reason_against(code) {
            None => wanted.push(code),
            Some(why) => without.push((code, why)),
        }
    }
    (wanted, without)
}
