//! Masked moves whose operand runs over the end of 16- or 32-bit addresses or of a segment: every engine beside the host CPU, whichever
//! maker's it is, in code of 16, 32 and 64 bits.

use bivisor_testsuite::campaign::arena::{BASE, CODE, STUB};
use bivisor_testsuite::campaign::beside::Beside;
use bivisor_testsuite::campaign::case::{Case, Kind};
use bivisor_testsuite::campaign::modes::record;
use bivisor_testsuite::campaign::modes::segments::{FLAT_CODE, FLAT_DATA, segment, selector};
use bivisor_testsuite::campaign::outcome::NORMAL;
use bivisor_testsuite::case::disassembly;
use iced_x86::{Code, Encoder, Instruction, OpKind, Register};

/// Of vectors whose elements are selected by sign bits: bytes of an element.
const SIGNS: [(Code, usize); 8] = [
    (Code::VEX_Vmaskmovps_ymm_ymm_m256, 4),
    (Code::VEX_Vmaskmovps_m128_xmm_xmm, 4),
    (Code::VEX_Vmaskmovpd_ymm_ymm_m256, 8),
    (Code::VEX_Vmaskmovpd_m256_ymm_ymm, 8),
    (Code::VEX_Vpmaskmovd_xmm_xmm_m128, 4),
    (Code::VEX_Vpmaskmovd_m256_ymm_ymm, 4),
    (Code::VEX_Vpmaskmovq_ymm_ymm_m256, 8),
    (Code::VEX_Vpmaskmovq_m128_xmm_xmm, 8),
];

/// Of vectors whose elements an opmask selects.
const OPMASKS: [Code; 14] = [
    Code::EVEX_Vmovups_zmm_k1z_zmmm512,
    Code::EVEX_Vmovups_zmmm512_k1z_zmm,
    Code::EVEX_Vmovdqu8_xmm_k1z_xmmm128,
    Code::EVEX_Vmovdqu8_ymmm256_k1z_ymm,
    Code::EVEX_Vmovdqu16_ymm_k1z_ymmm256,
    Code::EVEX_Vmovaps_xmm_k1z_xmmm128,
    Code::EVEX_Vpmovsxbq_zmm_k1z_xmmm64,
    Code::EVEX_Vpmovqb_xmmm64_k1z_zmm,
    Code::EVEX_Vbroadcasti32x4_zmm_k1z_m128,
    Code::EVEX_Vpbroadcastd_zmm_k1z_xmmm32,
    Code::EVEX_Vpcompressd_zmmm512_k1z_zmm,
    Code::EVEX_Vmovss_xmm_k1z_m32,
    Code::EVEX_Vmovsd_m64_k1_xmm,
    Code::EVEX_Vaddps_zmm_k1z_zmm_zmmm512b32_er,
];

/// The instruction with its operand at RBX, EBX or BX; an opmask is K1.
fn encode(code: Code, bits: u32, base: Register) -> Vec<u8> {
    let mut i = Instruction::default();
    i.set_code(code);
    let info = code.op_code();
    for n in 0..info.op_count() {
        let kind = format!("{:?}", info.op_kind(n));
        if kind.contains("mem") {
            i.set_op_kind(n, OpKind::Memory);
            i.set_memory_base(base);
            continue;
        }
        let first = match &kind[..3] {
            "zmm" => Register::ZMM0,
            "ymm" => Register::YMM0,
            _ => Register::XMM0,
        };
        // The mask of sign bits, the data.
        let number = if n == 1 && info.op_count() == 3 { 1 } else { 2 };
        i.set_op_kind(n, OpKind::Register);
        i.set_op_register(n, first + number);
    }
    if info.can_use_op_mask_register() {
        i.set_op_mask(Register::K1);
    }
    let mut e = Encoder::new(bits);
    e.encode(&i, 0).expect("an instruction");
    e.take_buffer()
}

/// Kind, DS and register of the address.
fn places() -> impl Iterator<Item = (Kind, u16, Register)> {
    // 64 KiB, 8 KiB, an expand-down one, and one of 4 GiB whose base is not 0.
    let local = [6, 7, 10, 16].map(selector);
    let low = [FLAT_DATA].into_iter().chain(local);
    let narrow = low.flat_map(|s| [(Kind::Insn32, s, Register::BX), (Kind::Insn32, s, Register::EBX)]);
    let small = local.into_iter().flat_map(|s| [(Kind::Insn16, s, Register::BX), (Kind::Insn16, s, Register::EBX)]);
    narrow.chain(small).chain([(Kind::Insn, 0, Register::RBX), (Kind::Insn, 0, Register::EBX)])
}

/// The instruction with its operand so many bytes before an end, elements selected by `mask`.
fn case(code: Code, element: usize, (kind, ds, base): (Kind, u16, Register), at: u64, mask: u64) -> Case {
    let bits = kind.bits();
    let mut case =
        Case { insn: code, kind, code: encode(code, bits, base), windows: record::windows(), ..Case::default() };
    case.rip = CODE + 0x400;
    if bits != 64 {
        let cs = if bits == 32 { FLAT_CODE } else { selector(0) };
        case.selectors = [FLAT_DATA, cs, FLAT_DATA, ds, FLAT_DATA];
        case.rip -= segment(cs).expect("code").base;
    } else {
        case.selectors = NORMAL;
    }
    case.gpr[3] = at;
    case.xsave.set_mxcsr(0x1f80);
    case.xsave.set_zmm(2, std::array::from_fn(|n| n as u8 ^ 0x55));
    if element == 0 {
        case.xsave.set_opmask(1, mask);
    } else {
        let sign = |n: usize| if n % element == element - 1 && mask >> (n / element) & 1 != 0 { 0x80 } else { 0 };
        case.xsave.set_zmm(1, std::array::from_fn(sign));
    }
    case
}

#[test]
fn over_the_end() {
    let mut beside = Beside::new().expect("the engines");
    if !beside.has_host(32) || !std::is_x86_feature_detected!("avx2") {
        return eprintln!("SKIPPED: no host CPU to compare with, or it has no AVX2");
    }
    let avx512 = std::is_x86_feature_detected!("avx512bw") && std::is_x86_feature_detected!("avx512vl");
    let mut memory = record::memory();
    // What ends a case of 64-bit code.
    memory[(STUB - BASE) as usize..][..2].copy_from_slice(&[0x0f, 0x05]);
    let (mut wrong, mut all) = (Vec::new(), 0);
    let codes: Vec<_> = SIGNS.into_iter().chain(OPMASKS.into_iter().filter(|_| avx512).map(|c| (c, 0))).collect();
    for place in places() {
        let end = if place.2 == Register::BX { 1 << 16 } else { 1 << 32 };
        let limit = segment(place.1).map_or(end, |s| u64::from(s.limit) + 1);
        let before = [1, 7, 8, 15, 16, 32].into_iter().map(|n| (end - n) & 0xffff_ffff);
        // The limit of the expand-down segment is its lower end.
        let behind = [3, 12].into_iter().map(|n| limit.wrapping_sub(n) & 0xffff_ffff);
        for at in before.chain(behind) {
            for &(code, element) in &codes {
                for mask in [1, 2, 4, 5, 8, 0xe, u64::MAX] {
                    let case = case(code, element, place, at, mask);
                    let outcomes = beside.outcomes(&case, &memory).expect("an end");
                    all += outcomes.len();
                    if let Some(what) = beside.difference(&case, &outcomes) {
                        let text = disassembly(place.0.bits(), &case.code);
                        wrong.push(format!(
                            "{}: {text} ds={:x} bx={at:x} mask={mask:x}: {what}",
                            place.0.name(),
                            place.1
                        ));
                    }
                }
            }
        }
    }
    println!("{all} outcomes");
    assert!(wrong.is_empty(), "{} wrong\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
}
