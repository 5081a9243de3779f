//! What a native instruction needs from control registers and from the thunk, and how it treats its memory operand.
//!
//! SDM 2A 2.4 to 2.7 (exception types of SSE, VEX and EVEX instructions); whether masked-out elements may fault was read off a
//! processor, instruction by instruction, and agrees with the classes E4NF, E5NF, E6NF there.

use iced_x86::{Code, CodeSize, CpuidFeature as F, EncodingKind, Instruction, Mnemonic as M, OpKind};

bitflags::bitflags! {
    /// What to check and to set up.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Needs: u32 {
        /// x87 or MMX registers: in the host's registers while it runs.
        const X87 = 1;
        /// MMX: CR0.EM gives #UD instead of #NM.
        const MMX = 1 << 1;
        /// CR4.OSFXSR.
        const SSE = 1 << 2;
        /// CR4.OSXSAVE, XCR0 with SSE and AVX, no real or virtual-8086 mode.
        const AVX = 1 << 3;
        /// XCR0 with all of AVX-512.
        const AVX512 = 1 << 4;
        /// The guest's MXCSR.
        const MXCSR = 1 << 5;
        /// A pending x87 exception is raised before it.
        const WAITING = 1 << 6;
        /// It may change FCW.
        const FCW = 1 << 7;
        /// It sets the x87 instruction and operand pointers.
        const POINTERS = 1 << 8;
        /// It reads its memory operand.
        const LOAD = 1 << 9;
        /// It writes its memory operand.
        const STORE = 1 << 10;
        /// Its memory operand is accessed by active elements only.
        const MASKED = 1 << 11;
        /// Masked, and the elements in memory are packed: VEXPAND, VCOMPRESS.
        const PACKED = 1 << 12;
        /// Its memory operand must be aligned to its size.
        const ALIGNED = 1 << 13;
        /// As ALIGNED, but MXCSR.MM of AMD's misaligned mode lifts it.
        const ALIGNED_UNLESS_MM = 1 << 14;
        /// It stores the x87 environment: FNSTENV, FNSAVE.
        const ENVIRONMENT = 1 << 15;
        /// A masked store that changes active elements only, but faults for all of them.
        const WHOLE = 1 << 16;
        /// Intel's processors do not look at the alignment of its memory operand, however small it is.
        const UNCHECKED = 1 << 17;
    }
}

/// Classifies an instruction that is to run in a thunk.
pub fn needs(i: &Instruction) -> Needs {
    let code = i.code();
    let features = code.cpuid_features();
    let mut n = Needs::empty();
    let x87 = features.iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387)) || code == Code::Wait;
    // CVTPI2PS and CVTPI2PD with a memory operand have nothing to do with MMX registers.
    let mmx = features.contains(&F::MMX) || (0..i.op_count()).any(|k| i.op_register(k).is_mm());
    n.set(Needs::X87, x87 || mmx);
    n.set(Needs::MMX, mmx);
    n.set(Needs::WAITING, mmx || (x87 && !does_not_wait(i.mnemonic())));
    if x87 {
        n.set(Needs::FCW, changes_fcw(i.mnemonic()));
        n.set(Needs::POINTERS, !is_x87_control(i.mnemonic()));
        n.set(Needs::ENVIRONMENT, matches!(i.mnemonic(), M::Fnstenv | M::Fnsave));
        return n | memory(i);
    }
    match code.encoding() {
        EncodingKind::Legacy => {
            n.set(Needs::SSE, !mmx || is_mixed(i.mnemonic()));
        }
        EncodingKind::EVEX => n |= Needs::AVX | Needs::AVX512,
        _ => {
            n |= Needs::AVX;
            n.set(Needs::AVX512, (0..i.op_count()).any(|k| i.op_register(k).is_k()));
        }
    }
    n.set(Needs::MXCSR, n.intersects(Needs::SSE | Needs::AVX) && uses_mxcsr(i));
    n | memory(i)
}

fn memory(i: &Instruction) -> Needs {
    let mut n = Needs::empty();
    if !(0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Memory) {
        return n;
    }
    let mut factory = iced_x86::InstructionInfoFactory::new();
    for m in factory.info(i).used_memory() {
        use iced_x86::OpAccess as A;
        let access = m.access();
        n.set(Needs::LOAD, matches!(access, A::Read | A::CondRead | A::ReadWrite | A::ReadCondWrite));
        n.set(Needs::STORE, matches!(access, A::Write | A::CondWrite | A::ReadWrite | A::ReadCondWrite));
    }
    if i.has_op_mask() && (suppresses_faults(i) || n.contains(Needs::STORE)) {
        n |= Needs::MASKED;
        n.set(Needs::WHOLE, !suppresses_faults(i));
        n.set(Needs::PACKED, is_packed(i.mnemonic()));
    }
    match i.code().encoding() {
        EncodingKind::Legacy if i.memory_size().size() == 16 => match i.mnemonic() {
            M::Movups | M::Movupd | M::Movdqu | M::Lddqu => {}
            M::Pcmpestri | M::Pcmpestrm | M::Pcmpistri | M::Pcmpistrm => {}
            M::Pcmpestri64 | M::Pcmpestrm64 => {}
            _ if i.code().cpuid_features().contains(&F::SHA) && is_amd() => {}
            _ if is_aligned_move(i.mnemonic()) => n |= Needs::ALIGNED,
            _ => n |= Needs::ALIGNED_UNLESS_MM,
        },
        EncodingKind::Legacy => {}
        _ => n.set(Needs::ALIGNED, is_aligned_move(i.mnemonic())),
    }
    n.set(Needs::UNCHECKED, matches!(i.mnemonic(), M::Vcvtph2ps | M::Vcvtps2ph));
    n
}

/// AMD's processors differ in a few points: they take misaligned operands of the SHA instructions, for which SDM has #GP(0), and they
/// keep x87 selectors and opcodes.
pub fn is_amd() -> bool {
    static AMD: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *AMD.get_or_init(|| crate::isa::host_cpu::cpuid(0, 0)[2] == u32::from_le_bytes(*b"cAMD"))
}

/// Bytes of the element that an EVEX instruction can broadcast, 0 if it cannot: the granularity of its mask. This asks no
/// [`iced_x86::OpCodeInfo`], whose tables take longer to build than a small program runs.
pub fn broadcast_size(code: Code) -> usize {
    if code.encoding() != EncodingKind::EVEX {
        return 0;
    }
    let mut i = Instruction::default();
    i.set_code(code);
    i.set_is_broadcast(true);
    i.memory_size().size()
}

/// Bytes of one element of the memory operand, of those that a mask selects.
pub fn element_size(i: &Instruction) -> usize {
    match i.mnemonic() {
        // Complex numbers.
        M::Vfmaddcsh | M::Vfcmaddcsh | M::Vfmulcsh | M::Vfcmulcsh => 4,
        _ => match broadcast_size(i.code()) {
            0 => i.memory_size().element_size(),
            n => n,
        },
    }
}

/// Bytes of the whole memory operand, without broadcast.
pub fn full_size(code: Code) -> usize {
    let mut i = Instruction::default();
    i.set_code(code);
    i.memory_size().size()
}

/// x87 instructions that ignore pending exceptions (SDM 1 8.3.11).
#[rustfmt::skip]
fn does_not_wait(m: M) -> bool {
    matches!(
        m,
        M::Fninit | M::Fnclex | M::Fnstcw | M::Fnstsw | M::Fnstenv | M::Fnsave | M::Fneni | M::Fndisi | M::Fnsetpm
    )
}

/// MMX instructions with an XMM operand.
#[rustfmt::skip]
fn is_mixed(m: M) -> bool {
    matches!(
        m,
        M::Cvtpi2ps | M::Cvtps2pi | M::Cvttps2pi | M::Cvtpi2pd | M::Cvtpd2pi | M::Cvttpd2pi | M::Movq2dq | M::Movdq2q
    )
}

/// Moves that demand alignment by themselves.
#[rustfmt::skip]
fn is_aligned_move(m: M) -> bool {
    matches!(
        m,
        M::Movaps | M::Movapd | M::Movdqa | M::Movntps | M::Movntpd | M::Movntdq | M::Movntdqa
        | M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovdqa32 | M::Vmovdqa64
        | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa
    )
}

/// The x87 opcode as FOP has it: the low three bits of the first byte, and ModRM but for an addressing form (SDM 1 8.1.9).
pub fn x87_opcode(i: &Instruction) -> u16 {
    // 64-bit code has no 16-bit addresses.
    let bits = match i.code_size() {
        CodeSize::Code16 => 16,
        CodeSize::Code32 => 32,
        _ => 64,
    };
    let mut encoder = iced_x86::Encoder::new(bits);
    // The address does not matter: a RIP-relative operand is within reach of the instruction's own.
    if encoder.encode(i, i.ip()).is_err() {
        return 0;
    }
    let bytes = encoder.take_buffer();
    // No prefix has such a value.
    let Some(at) = bytes.iter().position(|b| matches!(b, 0xd8..=0xdf)) else { return 0 };
    let modrm = bytes.get(at + 1).copied().unwrap_or(0);
    u16::from(bytes[at] & 7) << 8 | u16::from(if modrm >= 0xc0 { modrm } else { modrm & 0x38 })
}

/// Control instructions leave the x87 instruction and data pointers alone (SDM 1 8.1.8).
#[rustfmt::skip]
fn is_x87_control(m: M) -> bool {
    matches!(
        m,
        M::Fninit | M::Fnclex | M::Fldcw | M::Fnstcw | M::Fnstsw | M::Fnstenv | M::Fldenv | M::Fnsave | M::Frstor | M::Wait
        | M::Fneni | M::Fndisi | M::Fnsetpm
    )
}

fn changes_fcw(m: M) -> bool {
    matches!(m, M::Fldcw | M::Fldenv | M::Frstor | M::Fninit | M::Fnsave | M::Fnstenv)
}

/// Elements in memory lie without gaps.
#[rustfmt::skip]
fn is_packed(m: M) -> bool {
    matches!(
        m,
        M::Vexpandps | M::Vexpandpd | M::Vpexpandb | M::Vpexpandw | M::Vpexpandd | M::Vpexpandq
        | M::Vcompressps | M::Vcompresspd | M::Vpcompressb | M::Vpcompressw | M::Vpcompressd | M::Vpcompressq
    )
}

/// Does a masked memory operand fault for active elements only? Those of exception types with NF in their name access all of it.
#[rustfmt::skip]
fn suppresses_faults(i: &Instruction) -> bool {
    match i.mnemonic() {
        M::Valignd | M::Valignq | M::Vcvtne2ps2bf16 | M::Vdbpsadbw
        | M::Vextractf32x4 | M::Vextractf32x8 | M::Vextractf64x2 | M::Vextractf64x4
        | M::Vextracti32x4 | M::Vextracti32x8 | M::Vextracti64x2 | M::Vextracti64x4
        | M::Vgf2p8affineinvqb | M::Vgf2p8affineqb
        | M::Vinsertf32x4 | M::Vinsertf32x8 | M::Vinsertf64x2 | M::Vinsertf64x4
        | M::Vinserti32x4 | M::Vinserti32x8 | M::Vinserti64x2 | M::Vinserti64x4
        | M::Vmovddup | M::Vmovshdup | M::Vmovsldup
        | M::Vpackssdw | M::Vpacksswb | M::Vpackusdw | M::Vpackuswb | M::Vpalignr | M::Vpconflictd | M::Vpconflictq
        | M::Vpermb | M::Vpermd | M::Vpermw | M::Vpermpd | M::Vpermps | M::Vpermq | M::Vpermilpd | M::Vpermilps
        | M::Vpermi2b | M::Vpermi2d | M::Vpermi2pd | M::Vpermi2ps | M::Vpermi2q | M::Vpermi2w
        | M::Vpermt2b | M::Vpermt2d | M::Vpermt2pd | M::Vpermt2ps | M::Vpermt2q | M::Vpermt2w
        | M::Vpmaddubsw | M::Vpmaddwd | M::Vpmultishiftqb | M::Vpshufb | M::Vpshufd | M::Vpshufhw | M::Vpshuflw
        | M::Vpunpckhbw | M::Vpunpckhdq | M::Vpunpckhqdq | M::Vpunpckhwd
        | M::Vpunpcklbw | M::Vpunpckldq | M::Vpunpcklqdq | M::Vpunpcklwd
        | M::Vshuff32x4 | M::Vshuff64x2 | M::Vshufi32x4 | M::Vshufi64x2 | M::Vshufpd | M::Vshufps
        | M::Vunpckhpd | M::Vunpckhps | M::Vunpcklpd | M::Vunpcklps => false,
        // With the count in memory; with an immediate count the memory operand is the shifted one.
        M::Vpslld | M::Vpsllq | M::Vpsllw | M::Vpsrad | M::Vpsraq | M::Vpsraw | M::Vpsrld | M::Vpsrlq | M::Vpsrlw => {
            i.op2_kind() != OpKind::Memory
        }
        _ => true,
    }
}

/// Does it look at or change MXCSR? What is not known to be free of it is said to.
#[rustfmt::skip]
fn uses_mxcsr(i: &Instruction) -> bool {
    const FREE: &[&str] = &[
        "aes", "align", "and", "blend", "broadcast", "compress", "dbpsadbw", "dpbf16", "expand", "extract", "extrq",
        "gather", "gf2p8", "insert", "lddqu", "maskmov", "mov", "mpsadbw", "or", "p", "scatter", "sha", "sha1", "sha256", "shuf",
        "sm3", "sm4", "testp", "unpck", "xor", "zero",
    ];
    let name = format!("{:?}", i.mnemonic()).to_lowercase();
    if i.code().encoding() == EncodingKind::Legacy {
        return !FREE.iter().any(|f| name.starts_with(f));
    }
    let name = name.strip_prefix('v').unwrap_or(&name);
    !(name.starts_with('k') || FREE.iter().any(|f| name.starts_with(f)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::OpCodeOperandKind as K;

    /// What is said here without iced's big table agrees with it, for every instruction there is.
    #[test]
    fn agrees_with_the_opcode_table() {
        let mut seen = [0; 4];
        for code in Code::values() {
            let op = code.op_code();
            let features = code.cpuid_features();
            if features.iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387)) || code == Code::Wait {
                assert_eq!(does_not_wait(code.mnemonic()), op.is_fpu_no_wait(), "{code:?}");
                seen[0] += 1;
            }
            let mm = op.op_kinds().iter().any(|k| matches!(k, K::mm_or_mem | K::mm_reg | K::mm_rm));
            if code.encoding() == EncodingKind::Legacy && mm {
                let xmm = op.op_kinds().iter().any(|k| matches!(k, K::xmm_or_mem | K::xmm_reg | K::xmm_rm));
                assert_eq!(is_mixed(code.mnemonic()), xmm, "{code:?}");
                seen[1] += 1;
            }
            if code.encoding() == EncodingKind::EVEX {
                assert_eq!(broadcast_size(code), op.broadcast_memory_size().size(), "{code:?}");
                seen[2] += 1;
            }
            assert_eq!(full_size(code), op.memory_size().size(), "{code:?}");
            seen[3] += 1;
        }
        assert!(seen.iter().all(|&n| n > 50), "{seen:?}");
    }
}
