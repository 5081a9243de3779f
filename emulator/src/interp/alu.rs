//! Integer arithmetic as pure functions: width, operands and old flags in, result and status flags out (SDM 1 appendix A, SDM 2).
//!
//! Operands are zero-extended values of the given width; results likewise. The flags given back are all six status flags, those
//! that the instruction leaves alone taken from the old flags.
//!
//! Flags the manual calls undefined are those of real CPUs, checked exhaustively at byte width against the host by
//! `testsuite/tests/alu.rs`. Where the vendors are known to differ, [`Vendor::host`] decides; the differences are noted at each
//! function. Everything marked AMD was measured on Zen 4, everything marked Intel on Raptor Cove.

use crate::cpu::Rflags;
use crate::isa::Width;
use crate::isa::decode::is_amd;

/// Whose undefined flags a CPU shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// AMD and Hygon.
    Amd,
    /// Intel and everybody else.
    Intel,
}

impl Vendor {
    /// The host CPU's. Instructions that other engines run on the host must not differ from ours.
    #[inline]
    pub fn host() -> Vendor {
        if is_amd() { Vendor::Amd } else { Vendor::Intel }
    }
}

const CF: u64 = Rflags::CF.bits();
const PF: u64 = Rflags::PF.bits();
const AF: u64 = Rflags::AF.bits();
const ZF: u64 = Rflags::ZF.bits();
const SF: u64 = Rflags::SF.bits();
const OF: u64 = Rflags::OF.bits();

/// Result and status flags.
pub type Out = (u64, Rflags);

#[inline(always)]
fn flags(bits: u64) -> Rflags {
    Rflags::from_bits_retain(bits)
}

/// The bits of `old` named by `mask`.
#[inline(always)]
fn keep(old: Rflags, mask: u64) -> u64 {
    old.bits() & mask
}

#[inline(always)]
fn bit_if(bit: u64, condition: bool) -> u64 {
    if condition { bit } else { 0 }
}

/// PF of each byte: set if the number of ones is even.
const PARITY: [u8; 256] = {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        table[n] = if (n as u8).count_ones() & 1 == 0 { PF as u8 } else { 0 };
        n += 1;
    }
    table
};

/// SF, ZF and PF of a result.
#[inline(always)]
fn szp(w: Width, r: u64) -> u64 {
    u64::from(PARITY[usize::from(r as u8)]) | bit_if(ZF, r == 0) | bit_if(SF, r & w.sign() != 0)
}

/// ADD, ADC.
#[inline(always)]
pub fn add(w: Width, a: u64, b: u64, carry: bool) -> Out {
    let r = w.cut(a.wrapping_add(b).wrapping_add(u64::from(carry)));
    // With a carry in, all ones are added to: then nothing changes and the carry goes on.
    let carries = r < a || carry && r == a;
    let overflow = (a ^ r) & (b ^ r);
    let f = szp(w, r) | bit_if(CF, carries) | ((a ^ b ^ r) & AF) | bit_if(OF, overflow & w.sign() != 0);
    (r, flags(f))
}

/// SUB, SBB, CMP.
#[inline(always)]
pub fn sub(w: Width, a: u64, b: u64, borrow: bool) -> Out {
    let r = w.cut(a.wrapping_sub(b).wrapping_sub(u64::from(borrow)));
    let borrows = a < b || borrow && a == b;
    let overflow = (a ^ b) & (a ^ r);
    let f = szp(w, r) | bit_if(CF, borrows) | ((a ^ b ^ r) & AF) | bit_if(OF, overflow & w.sign() != 0);
    (r, flags(f))
}

/// INC: CF stays.
#[inline(always)]
pub fn inc(w: Width, a: u64, old: Rflags) -> Out {
    let (r, f) = add(w, a, 1, false);
    (r, flags((f.bits() & !CF) | keep(old, CF)))
}

/// DEC: CF stays.
#[inline(always)]
pub fn dec(w: Width, a: u64, old: Rflags) -> Out {
    let (r, f) = sub(w, a, 1, false);
    (r, flags((f.bits() & !CF) | keep(old, CF)))
}

/// NEG.
#[inline(always)]
pub fn neg(w: Width, a: u64) -> Out {
    sub(w, 0, a, false)
}

/// The flags of AND, OR, XOR, TEST with result `r`. AF: zero with both vendors.
#[inline(always)]
pub fn logic(w: Width, r: u64) -> Out {
    (r, flags(szp(w, r)))
}

/// AND, TEST.
#[inline(always)]
pub fn and(w: Width, a: u64, b: u64) -> Out {
    logic(w, a & b)
}

/// OR.
#[inline(always)]
pub fn or(w: Width, a: u64, b: u64) -> Out {
    logic(w, a | b)
}

/// XOR.
#[inline(always)]
pub fn xor(w: Width, a: u64, b: u64) -> Out {
    logic(w, a ^ b)
}

/// Shift counts are taken modulo 32, modulo 64 for 64-bit operands.
#[inline(always)]
fn masked(w: Width, count: u64) -> u32 {
    (count & if w == Width::Q { 63 } else { 31 }) as u32
}

/// AF after a shift. AMD: set. Intel: cleared.
#[inline(always)]
fn shift_af() -> u64 {
    bit_if(AF, Vendor::host() == Vendor::Amd)
}

/// OF of shifts and rotations, which the manual defines for a count of 1 only. For others AMD looks at the last of the single steps,
/// Intel at the first.
#[inline(always)]
fn shift_of(last: bool, first: bool) -> u64 {
    bit_if(OF, if Vendor::host() == Vendor::Amd { last } else { first })
}

/// Does a step to the left change the sign?
#[inline(always)]
fn sign_changes(w: Width, v: u64) -> bool {
    (v ^ v << 1) & w.sign() != 0
}

/// SHL, SAL. OF: carry against sign.
#[inline(always)]
pub fn shl(w: Width, v: u64, count: u64, old: Rflags) -> Out {
    let n = masked(w, count);
    if n == 0 {
        return (v, flags(keep(old, Rflags::STATUS.bits())));
    }
    let wide = u128::from(v) << n;
    let r = w.cut(wide as u64);
    let carry = wide >> w.bits() & 1 != 0;
    let sign = r & w.sign() != 0;
    (r, flags(szp(w, r) | bit_if(CF, carry) | shift_of(carry != sign, sign_changes(w, v)) | shift_af()))
}

/// SHR. OF: the sign before the step.
#[inline(always)]
pub fn shr(w: Width, v: u64, count: u64, old: Rflags) -> Out {
    let n = masked(w, count);
    if n == 0 {
        return (v, flags(keep(old, Rflags::STATUS.bits())));
    }
    // n - 1 < 64, so neither shift overflows.
    let before = v >> (n - 1);
    let r = before >> 1;
    let of = shift_of(before & w.sign() != 0, v & w.sign() != 0);
    (r, flags(szp(w, r) | bit_if(CF, before & 1 != 0) | of | shift_af()))
}

/// SAR.
#[inline(always)]
pub fn sar(w: Width, v: u64, count: u64, old: Rflags) -> Out {
    let n = masked(w, count);
    if n == 0 {
        return (v, flags(keep(old, Rflags::STATUS.bits())));
    }
    let before = (w.sign_extend(v) as i64) >> (n - 1);
    let r = w.cut((before >> 1) as u64);
    (r, flags(szp(w, r) | bit_if(CF, before & 1 != 0) | shift_af()))
}

/// ROL: CF and OF change if the count modulo 32 (64) is not zero, even if nothing moves.
#[inline(always)]
pub fn rol(w: Width, v: u64, count: u64, old: Rflags) -> Out {
    let n = masked(w, count);
    if n == 0 {
        return (v, flags(keep(old, Rflags::STATUS.bits())));
    }
    let r = rotate_left(w, v, n % w.bits());
    let carry = r & 1 != 0;
    let sign = r & w.sign() != 0;
    let of = shift_of(carry != sign, sign_changes(w, v));
    (r, flags(keep(old, SF | ZF | AF | PF) | bit_if(CF, carry) | of))
}

/// ROR.
#[inline(always)]
pub fn ror(w: Width, v: u64, count: u64, old: Rflags) -> Out {
    let n = masked(w, count);
    if n == 0 {
        return (v, flags(keep(old, Rflags::STATUS.bits())));
    }
    let r = rotate_left(w, v, (w.bits() - n % w.bits()) % w.bits());
    let sign = r & w.sign() != 0;
    let next = r & (w.sign() >> 1) != 0;
    let of = shift_of(sign != next, (v & w.sign() != 0) != (v & 1 != 0));
    (r, flags(keep(old, SF | ZF | AF | PF) | bit_if(CF, sign) | of))
}

/// What differs in ROL and ROR of a register by an immediate: on Intel OF stays for counts above 1.
#[inline(always)]
pub fn by_immediate(w: Width, count: u64, old: Rflags, (r, f): Out) -> Out {
    let stays = masked(w, count) != 1 && Vendor::host() == Vendor::Intel;
    (r, if stays { flags(f.bits() & !OF | keep(old, OF)) } else { f })
}

/// `n` is less than the width.
#[inline(always)]
fn rotate_left(w: Width, v: u64, n: u32) -> u64 {
    if n == 0 { v } else { w.cut(v << n | v >> (w.bits() - n)) }
}

/// RCL: a rotation of width + 1 bits. OF if the count is 9 (18, 27) or 17 and nothing moves: AMD by the rule, Intel leaves it.
pub fn rcl(w: Width, v: u64, count: u64, old: Rflags) -> Out {
    let n = masked(w, count);
    if n == 0 {
        return (v, flags(keep(old, Rflags::STATUS.bits())));
    }
    let first = sign_changes(w, v);
    rotate_carry(w, v, n % (w.bits() + 1), old, |sign, _, carry| shift_of(sign != carry, first))
}

/// RCR.
pub fn rcr(w: Width, v: u64, count: u64, old: Rflags) -> Out {
    let n = masked(w, count);
    if n == 0 {
        return (v, flags(keep(old, Rflags::STATUS.bits())));
    }
    let size = w.bits() + 1;
    let first = (v & w.sign() != 0) != old.contains(Rflags::CF);
    rotate_carry(w, v, (size - n % size) % size, old, |sign, next, _| shift_of(sign != next, first))
}

/// `overflow` tells OF by the result's sign, the bit beside it, and the carry.
fn rotate_carry(w: Width, v: u64, left: u32, old: Rflags, overflow: impl Fn(bool, bool, bool) -> u64) -> Out {
    let size = w.bits() + 1;
    let whole = u128::from(old.bits() & CF) << w.bits() | u128::from(v);
    let turned = if left == 0 { whole } else { whole << left | whole >> (size - left) };
    let r = w.cut(turned as u64);
    let carry = turned >> w.bits() & 1 != 0;
    let of = if left == 0 && Vendor::host() == Vendor::Intel {
        keep(old, OF)
    } else {
        overflow(r & w.sign() != 0, r & (w.sign() >> 1) != 0, carry)
    };
    (r, flags(keep(old, SF | ZF | AF | PF) | bit_if(CF, carry) | of))
}

/// SHLD. A 16-bit count above 16 is undefined. AMD: the bits of `a:b:b` move, CF and OF are those of `a` shifted alone. Intel: those of
/// `a:b:a`, CF is the last bit that left.
pub fn shld(w: Width, a: u64, b: u64, count: u64, old: Rflags) -> Out {
    let n = masked(w, count);
    if n == 0 {
        return (a, flags(keep(old, Rflags::STATUS.bits())));
    }
    if w != Width::W {
        // n < width: the sign of the result comes from `a`.
        let r = w.cut(a << n | b >> (w.bits() - n));
        let f = szp(w, r) | shl(w, a, count, old).1.bits() & (CF | OF) | shift_af();
        return (r, flags(f));
    }
    let (behind, carry) = match Vendor::host() {
        Vendor::Amd => (b, a << n >> 16 & 1),
        Vendor::Intel => (a, (a << 16 | b) << n >> 32 & 1),
    };
    let r = w.cut((a << 32 | b << 16 | behind) << n >> 32);
    let of = shift_of(carry != a << n >> 15 & 1, sign_changes(w, a));
    (r, flags(szp(w, r) | carry | of | shift_af()))
}

/// SHRD. A 16-bit count above 16 is undefined. AMD: the bits of `b:b:a` move, CF is 0. Intel: those of `a:b:a`, CF is the last bit
/// that left.
pub fn shrd(w: Width, a: u64, b: u64, count: u64, old: Rflags) -> Out {
    let n = masked(w, count);
    if n == 0 {
        return (a, flags(keep(old, Rflags::STATUS.bits())));
    }
    let (r, carry) = match (w, Vendor::host()) {
        (Width::W, Vendor::Amd) => ((b << 32 | b << 16 | a) >> n, a >> (n - 1) & 1),
        (Width::W, Vendor::Intel) => ((a << 32 | b << 16 | a) >> n, (b << 16 | a) >> (n - 1) & 1),
        _ => (a >> n | b << (w.bits() - n), a >> (n - 1) & 1),
    };
    let r = w.cut(r);
    let of = shift_of(sign_changes(w, r), (a & w.sign() != 0) != (b & 1 != 0));
    (r, flags(szp(w, r) | carry | of | shift_af()))
}

/// MUL: low half, high half, flags. SF, ZF, AF, PF: AMD keeps them; Intel sets SF and PF by the low half and clears ZF and AF.
#[inline(always)]
pub fn mul(w: Width, a: u64, b: u64, old: Rflags) -> (u64, u64, Rflags) {
    let wide = u128::from(a) * u128::from(b);
    let low = w.cut(wide as u64);
    let high = (wide >> w.bits()) as u64;
    (low, high, flags(product_flags(w, low, high != 0, old)))
}

/// IMUL, all forms: low half, high half, flags. Undefined flags as with [`mul`].
#[inline(always)]
pub fn imul(w: Width, a: u64, b: u64, old: Rflags) -> (u64, u64, Rflags) {
    let wide = i128::from(w.sign_extend(a) as i64) * i128::from(w.sign_extend(b) as i64);
    let low = w.cut(wide as u64);
    let high = w.cut((wide >> w.bits()) as u64);
    let lost = i128::from(w.sign_extend(low) as i64) != wide;
    (low, high, flags(product_flags(w, low, lost, old)))
}

#[inline(always)]
fn product_flags(w: Width, low: u64, lost: bool, old: Rflags) -> u64 {
    let undefined = match Vendor::host() {
        Vendor::Amd => keep(old, SF | ZF | AF | PF),
        Vendor::Intel => szp(w, low) & (SF | PF),
    };
    undefined | bit_if(CF | OF, lost)
}

/// The flags after DIV and IDIV, all undefined. AMD keeps CF and OF, clears SF, ZF, PF and sets AF; Intel keeps all.
#[inline(always)]
fn quotient_flags(old: Rflags) -> Rflags {
    match Vendor::host() {
        Vendor::Amd => flags(keep(old, CF | OF) | AF),
        Vendor::Intel => flags(keep(old, Rflags::STATUS.bits())),
    }
}

/// DIV of `high:low`: quotient, remainder, flags; `None` is #DE: division by zero or quotient too big.
pub fn div(w: Width, high: u64, low: u64, divisor: u64, old: Rflags) -> Option<(u64, u64, Rflags)> {
    // The usual case first: a division of 64 bits is much cheaper than one of 128.
    let (q, r) = if high == 0 {
        (low.checked_div(divisor)?, low % divisor)
    } else {
        let dividend = u128::from(high) << w.bits() | u128::from(low);
        let q = dividend.checked_div(u128::from(divisor))?;
        (u64::try_from(q).ok()?, (dividend % u128::from(divisor)) as u64)
    };
    (q <= w.mask()).then_some((q, r, quotient_flags(old)))
}

/// IDIV of `high:low`: truncates towards zero, the remainder has the dividend's sign; `None` is #DE.
pub fn idiv(w: Width, high: u64, low: u64, divisor: u64, old: Rflags) -> Option<(u64, u64, Rflags)> {
    let divisor = i128::from(w.sign_extend(divisor) as i64);
    let dividend = i128::from(w.sign_extend(high) as i64) << w.bits() | i128::from(low);
    // The most negative dividend over -1 overflows even 128 bits.
    let q = dividend.checked_div(divisor)?;
    let r = dividend.wrapping_rem(divisor);
    let fits = i128::from(w.sign_extend(w.cut(q as u64)) as i64) == q;
    fits.then_some((w.cut(q as u64), w.cut(r as u64), quotient_flags(old)))
}

/// BT and, for BTS, BTR and BTC, the flags: CF is the bit, the rest stays (the manual leaves OF, SF, AF, PF undefined).
#[inline(always)]
pub fn bt(w: Width, v: u64, bit: u64, old: Rflags) -> Rflags {
    let n = bit & u64::from(w.bits() - 1);
    flags(keep(old, Rflags::STATUS.bits() & !CF) | bit_if(CF, v >> n & 1 != 0))
}

/// The one-bit mask of BTS, BTR, BTC.
#[inline(always)]
pub fn bit_mask(w: Width, bit: u64) -> u64 {
    1 << (bit & u64::from(w.bits() - 1))
}

/// BSF: `None` for the result if the source is zero and the destination stays. PF is by the result, set with a zero source; CF, OF, SF and
/// AF are cleared. So with both vendors.
pub fn bsf(w: Width, v: u64) -> (Option<u64>, Rflags) {
    scan(w, v, u64::from(v.trailing_zeros()))
}

/// BSR: as [`bsf`].
pub fn bsr(w: Width, v: u64) -> (Option<u64>, Rflags) {
    scan(w, v, u64::from(63 - v.leading_zeros().min(63)))
}

fn scan(w: Width, v: u64, index: u64) -> (Option<u64>, Rflags) {
    if v == 0 {
        return (None, flags(ZF | PF));
    }
    (Some(index), flags(szp(w, index) & PF))
}

/// TZCNT: CF for a zero source, ZF for a zero result. SF, AF, PF cleared; OF: AMD keeps it, Intel clears it.
pub fn tzcnt(w: Width, v: u64, old: Rflags) -> Out {
    count_flags(u64::from(v.trailing_zeros().min(w.bits())), v, old)
}

/// LZCNT: as [`tzcnt`].
pub fn lzcnt(w: Width, v: u64, old: Rflags) -> Out {
    count_flags(u64::from(v.leading_zeros() - (64 - w.bits())), v, old)
}

fn count_flags(r: u64, v: u64, old: Rflags) -> Out {
    let overflow = if Vendor::host() == Vendor::Amd { keep(old, OF) } else { 0 };
    (r, flags(overflow | bit_if(CF, v == 0) | bit_if(ZF, r == 0)))
}

/// POPCNT: ZF for a zero source, the others cleared (defined so).
pub fn popcnt(v: u64) -> Out {
    (u64::from(v.count_ones()), flags(bit_if(ZF, v == 0)))
}

/// The flags of ANDN, BEXTR, BLSI, BLSMSK, BLSR and BZHI but for CF. AF and PF are undefined. AMD: as the logic operations have them.
/// Intel: cleared.
#[inline(always)]
fn bmi(w: Width, r: u64) -> u64 {
    szp(w, r) & if Vendor::host() == Vendor::Amd { SF | ZF | PF } else { SF | ZF }
}

/// ANDN.
pub fn andn(w: Width, a: u64, b: u64) -> Out {
    let r = w.cut(!a & b);
    (r, flags(bmi(w, r)))
}

/// BEXTR: `control` bits 7:0 are the start, 15:8 the length. SF is undefined too: cleared. AMD: AF set.
pub fn bextr(w: Width, v: u64, control: u64) -> Out {
    let start = (control & 0xff) as u32;
    let length = (control >> 8 & 0xff) as u32;
    let shifted = v.checked_shr(start).unwrap_or(0);
    let r = if length < 64 { shifted & ((1 << length) - 1) } else { shifted };
    (r, flags(bmi(w, r) & !SF | shift_af()))
}

/// BLSI: the lowest set bit; CF unless the source is zero.
pub fn blsi(w: Width, v: u64) -> Out {
    let r = v & w.cut(v.wrapping_neg());
    (r, flags(bmi(w, r) | bit_if(CF, v != 0)))
}

/// BLSMSK: ones up to and including the lowest set bit; CF if the source is zero.
pub fn blsmsk(w: Width, v: u64) -> Out {
    let r = w.cut(v ^ v.wrapping_sub(1));
    (r, flags(bmi(w, r) | bit_if(CF, v == 0)))
}

/// BLSR: the source without its lowest set bit; CF if the source is zero.
pub fn blsr(w: Width, v: u64) -> Out {
    let r = v & w.cut(v.wrapping_sub(1));
    (r, flags(bmi(w, r) | bit_if(CF, v == 0)))
}

/// BZHI: zero from bit `index` (7:0) on; CF if the index is beyond the operand.
pub fn bzhi(w: Width, v: u64, index: u64) -> Out {
    let n = index & 0xff;
    let beyond = n >= u64::from(w.bits());
    let r = if beyond { v } else { v & ((1 << n) - 1) };
    (r, flags(bmi(w, r) | bit_if(CF, beyond)))
}

/// PDEP: low bits of `v` go to the places of the set bits of `mask`.
pub fn pdep(v: u64, mut mask: u64) -> u64 {
    let mut r = 0;
    let mut bit = 0;
    while mask != 0 {
        let place = mask & mask.wrapping_neg();
        r |= bit_if(place, v >> bit & 1 != 0);
        mask ^= place;
        bit += 1;
    }
    r
}

/// PEXT: the bits of `v` at the set bits of `mask` gather at the low end.
pub fn pext(v: u64, mut mask: u64) -> u64 {
    let mut r = 0;
    let mut bit = 0;
    while mask != 0 {
        let place = mask & mask.wrapping_neg();
        r |= u64::from(v & place != 0) << bit;
        mask ^= place;
        bit += 1;
    }
    r
}

/// RORX, SARX, SHLX, SHRX count modulo the width and leave the flags alone.
pub fn rorx(w: Width, v: u64, count: u64) -> u64 {
    let n = masked(w, count);
    rotate_left(w, v, (w.bits() - n) % w.bits())
}

/// SARX.
pub fn sarx(w: Width, v: u64, count: u64) -> u64 {
    w.cut(((w.sign_extend(v) as i64) >> masked(w, count)) as u64)
}

/// SHLX.
pub fn shlx(w: Width, v: u64, count: u64) -> u64 {
    w.cut(v << masked(w, count))
}

/// SHRX.
pub fn shrx(w: Width, v: u64, count: u64) -> u64 {
    v >> masked(w, count)
}

/// ADCX: adds with CF, changes CF only.
pub fn adcx(w: Width, a: u64, b: u64, old: Rflags) -> Out {
    let (r, f) = add(w, a, b, old.contains(Rflags::CF));
    (r, flags(keep(old, Rflags::STATUS.bits() & !CF) | (f.bits() & CF)))
}

/// ADOX: adds with OF as the carry, changes OF only.
pub fn adox(w: Width, a: u64, b: u64, old: Rflags) -> Out {
    let (r, f) = add(w, a, b, old.contains(Rflags::OF));
    (r, flags(keep(old, Rflags::STATUS.bits() & !OF) | bit_if(OF, f.contains(Rflags::CF))))
}

/// CRC32 (Castagnoli, reflected): `crc` takes in the bytes of `v`, lowest first.
pub fn crc32(w: Width, crc: u64, v: u64) -> u64 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut crc = crc as u32;
    for byte in v.to_le_bytes().into_iter().take(w.bytes() as usize) {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { POLYNOMIAL } else { 0 };
        }
    }
    u64::from(crc)
}

/// DAA on AL. OF is undefined. AMD: that of the addition. Intel: cleared.
pub fn daa(al: u64, old: Rflags) -> Out {
    let low = al & 15 > 9 || old.contains(Rflags::AF);
    let high = al > 0x99 || old.contains(Rflags::CF);
    let correction = bit_if(6, low) | bit_if(0x60, high);
    decimal(add(Width::B, al, correction, false), low, high)
}

/// DAS on AL. OF is undefined: as with [`daa`].
pub fn das(al: u64, old: Rflags) -> Out {
    let low = al & 15 > 9 || old.contains(Rflags::AF);
    let high = al > 0x99 || old.contains(Rflags::CF);
    let correction = bit_if(6, low) | bit_if(0x60, high);
    let (r, f) = sub(Width::B, al, correction, false);
    // The low correction may borrow by itself (SDM 2A DAS: CF is old CF or borrow).
    decimal((r, f), low, high || low && al < 6)
}

fn decimal((r, f): Out, low: bool, high: bool) -> Out {
    let kept = if Vendor::host() == Vendor::Amd { OF | SF | ZF | PF } else { SF | ZF | PF };
    (r, flags(f.bits() & kept | bit_if(AF, low) | bit_if(CF, high)))
}

/// AAA on AX. OF, SF, ZF, PF are undefined. AMD: those of AX + 106h before AL is cut. Intel: those of AL when it is cut.
pub fn aaa(ax: u64, old: Rflags) -> Out {
    let adjust = ax & 15 > 9 || old.contains(Rflags::AF);
    unpacked(add(Width::W, ax, bit_if(0x106, adjust), false), adjust)
}

/// AAS on AX. OF, SF, ZF, PF are undefined: as with [`aaa`].
pub fn aas(ax: u64, old: Rflags) -> Out {
    let adjust = ax & 15 > 9 || old.contains(Rflags::AF);
    unpacked(sub(Width::W, ax, bit_if(0x106, adjust), false), adjust)
}

fn unpacked((r, f): Out, adjust: bool) -> Out {
    let r = r & 0xff0f;
    let undefined = match Vendor::host() {
        Vendor::Amd => f.bits() & !(AF | CF),
        Vendor::Intel => szp(Width::B, r & 0xff),
    };
    (r, flags(undefined | bit_if(AF | CF, adjust)))
}

/// AAM: AH and AL are quotient and remainder of AL by `base`; `None` is #DE. OF, AF, CF are undefined: cleared.
pub fn aam(al: u64, base: u64) -> Option<Out> {
    let r = (al.checked_div(base)? << 8) | (al % base);
    Some((r, flags(szp(Width::B, r & 0xff))))
}

/// AAD: AL = AL + AH * `base`, AH = 0. OF, AF, CF are undefined.
pub fn aad(ax: u64, base: u64) -> Out {
    let product = Width::B.cut((ax >> 8).wrapping_mul(base));
    add(Width::B, ax & 0xff, product, false)
}
