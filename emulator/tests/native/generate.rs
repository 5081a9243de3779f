//! Random instructions of a given code, and random register contents biased towards what floating point finds hard.

use iced_x86::{Code, Instruction, OpCodeOperandKind as K, OpKind, Register, RoundingControl};

/// Xorshift64*.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    pub fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }

    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

const F16: [u16; 10] = [0, 0x8000, 1, 0x03ff, 0x0400, 0x3c00, 0x7bff, 0x7c00, 0x7c01, 0x7e00];
#[rustfmt::skip]
const F32: [u32; 22] = [
    0, 0x8000_0000, 1, 0x8000_0001, 0x007f_ffff, 0x0080_0000, 0x3f80_0000, 0xbf80_0000, 0x7f7f_ffff, 0x7f80_0000, 0xff80_0000,
    0x7f80_0001, 0x7fc0_0000, 0xffc0_0001, 0x4f00_0000, 0xcf00_0000, 0x5f00_0000, 0x3f00_0000, 0x3fc0_0000, 0x4b00_0001, 0xc000_0000,
    0x3eaa_aaab,
];
#[rustfmt::skip]
const F64: [u64; 20] = [
    0, 1 << 63, 1, 0x800f_ffff_ffff_ffff, 0x0010_0000_0000_0000, 0x3ff0_0000_0000_0000, 0xbff0_0000_0000_0000,
    0x7fef_ffff_ffff_ffff, 0x7ff0_0000_0000_0000, 0xfff0_0000_0000_0000, 0x7ff0_0000_0000_0001, 0x7ff8_0000_0000_0000,
    0xfff8_0000_0000_0001, 0x41e0_0000_0000_0000, 0xc1e0_0000_0000_0000, 0x43e0_0000_0000_0000, 0x3fe0_0000_0000_0000,
    0x3ff8_0000_0000_0000, 0x4330_0000_0000_0001, 0x3fd5_5555_5555_5555,
];

/// Vector data: each 8 bytes of one kind.
pub fn vector_data(r: &mut Rng, bytes: &mut [u8]) {
    for c in bytes.chunks_mut(8) {
        let v = match r.below(8) {
            0 | 1 => r.pick(&F64),
            2 | 3 => u64::from(r.pick(&F32)) | u64::from(r.pick(&F32)) << 32,
            4 => (0..4).fold(0, |v, n| v | u64::from(r.pick(&F16)) << (16 * n)),
            5 => r.below(300),
            6 => (r.next() & 0x800f_ffff_ffff_ffff) | 0x3ff0_0000_0000_0000u64.wrapping_add(r.below(64) << 52),
            _ => r.next(),
        };
        let n = c.len();
        c.copy_from_slice(&v.to_le_bytes()[..n]);
    }
}

/// An 80-bit value: zeros, denormals, pseudo-denormals, unnormals, infinities, NaNs, integers, numbers near one.
pub fn x87_value(r: &mut Rng) -> [u8; 10] {
    let sign = (r.next() as u16) & 0x8000;
    let (exponent, significand) = match r.below(12) {
        0 => (0, 0),
        1 => (0, r.next() >> 1),
        2 => (0, r.next() | 1 << 63),
        3 => (r.next() as u16 & 0x7fff, r.next() >> 1),
        4 => (0x7fff, 1 << 63),
        5 => (0x7fff, 0xc000_0000_0000_0000),
        6 => (0x7fff, (1 << 63) | (r.next() >> 2)),
        7 => (0x3fff, 1 << 63),
        8 => (0x3fff + r.below(70) as u16, (1 << 63) | r.next()),
        9 => (0x3fff - r.below(20) as u16, (1 << 63) | r.next()),
        10 => (r.next() as u16 & 0x7fff, (1 << 63) | r.next()),
        _ => (0x3fff + 63, (1 << 63) | r.next()),
    };
    let mut v = [0; 10];
    v[..8].copy_from_slice(&significand.to_le_bytes());
    v[8..].copy_from_slice(&(exponent | sign).to_le_bytes());
    v
}

/// The register that addresses memory.
pub const BASE: Register = Register::RBX;

/// A random instruction of this code; `memory`: with its memory operand in memory, at [RBX + displacement].
pub fn instruction(r: &mut Rng, code: Code, memory: bool) -> Option<Instruction> {
    let op = code.op_code();
    let mut i = Instruction::default();
    i.set_code(code);
    let evex = op.encoding() == iced_x86::EncodingKind::EVEX;
    let vectors = if evex { 32 } else { 16 };
    let mut has_memory = false;
    let mut immediates = 0;
    for (n, kind) in op.op_kinds().iter().enumerate() {
        let n = n as u32;
        let rm = matches!(
            kind,
            K::r32_or_mem
                | K::r64_or_mem
                | K::r16_or_mem
                | K::mm_or_mem
                | K::xmm_or_mem
                | K::ymm_or_mem
                | K::zmm_or_mem
                | K::k_or_mem
        );
        if matches!(kind, K::mem) || rm && memory {
            if !memory {
                return None;
            }
            has_memory = true;
            set_memory(r, &mut i, n, Register::None);
            continue;
        }
        let vsib = match kind {
            K::mem_vsib32x | K::mem_vsib64x => Register::XMM0,
            K::mem_vsib32y | K::mem_vsib64y => Register::YMM0,
            K::mem_vsib32z | K::mem_vsib64z => Register::ZMM0,
            _ => Register::None,
        };
        if vsib != Register::None {
            if !memory {
                return None;
            }
            has_memory = true;
            let index = vsib + r.below(vectors) as u32;
            set_memory(r, &mut i, n, index);
            i.set_memory_index_scale(1 << r.below(4));
            continue;
        }
        let register = match kind {
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv => Register::XMM0 + r.below(vectors) as u32,
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv => Register::YMM0 + r.below(vectors) as u32,
            K::zmm_or_mem | K::zmm_reg | K::zmm_rm | K::zmm_vvvv => Register::ZMM0 + r.below(vectors) as u32,
            K::xmm_is4 | K::xmm_is5 => Register::XMM0 + r.below(16) as u32,
            K::ymm_is4 | K::ymm_is5 => Register::YMM0 + r.below(16) as u32,
            K::k_reg | K::k_rm | K::k_vvvv | K::k_or_mem => Register::K0 + r.below(8) as u32,
            K::mm_or_mem | K::mm_reg | K::mm_rm => Register::MM0 + r.below(8) as u32,
            K::r16_or_mem | K::r16_reg | K::r16_rm => Register::AX + r.below(16) as u32,
            K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_vvvv => Register::EAX + r.below(16) as u32,
            K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_vvvv => Register::RAX + r.below(16) as u32,
            K::st0 => Register::ST0,
            K::sti_opcode => Register::ST0 + r.below(8) as u32,
            K::ax => Register::AX,
            K::imm8 => {
                i.set_op_kind(n, if immediates == 0 { OpKind::Immediate8 } else { OpKind::Immediate8_2nd });
                if immediates == 0 {
                    i.set_immediate8(r.next() as u8);
                } else {
                    i.set_immediate8_2nd(r.next() as u8);
                }
                immediates += 1;
                continue;
            }
            K::seg_rDI => {
                i.set_op_kind(n, OpKind::MemorySegRDI);
                has_memory = true;
                continue;
            }
            _ => return None,
        };
        i.set_op_kind(n, OpKind::Register);
        i.set_op_register(n, register);
    }
    if memory && !has_memory {
        return None;
    }
    if memory && op.can_broadcast() && r.chance(3) {
        i.set_is_broadcast(true);
    }
    if op.require_op_mask_register() || op.can_use_op_mask_register() && !r.chance(4) {
        i.set_op_mask(Register::K1 + r.below(7) as u32);
        if op.can_use_zeroing_masking() && r.chance(2) {
            let stores = memory && i.op0_kind() == OpKind::Memory;
            i.set_zeroing_masking(!stores);
        }
    }
    if !memory && op.can_use_rounding_control() && r.chance(3) {
        i.set_rounding_control(r.pick(&[
            RoundingControl::RoundToNearest,
            RoundingControl::RoundDown,
            RoundingControl::RoundUp,
            RoundingControl::RoundTowardZero,
        ]));
        i.set_suppress_all_exceptions(true);
    } else if !memory && op.can_suppress_all_exceptions() && r.chance(3) {
        i.set_suppress_all_exceptions(true);
    }
    Some(i)
}

fn set_memory(r: &mut Rng, i: &mut Instruction, n: u32, index: Register) {
    i.set_op_kind(n, OpKind::Memory);
    i.set_memory_base(BASE);
    i.set_memory_index(index);
    let displacement = r.pick(&[0i64, 0, 0x40, -0x40, 0x140]);
    if displacement != 0 {
        i.set_memory_displ_size(if displacement.abs() < 0x80 { 1 } else { 8 });
        i.set_memory_displacement64(displacement as u64);
    }
}
