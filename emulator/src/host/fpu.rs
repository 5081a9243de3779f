//! What only the host's floating-point unit can tell.
#![allow(unsafe_code)]

use std::sync::OnceLock;

/// MXCSR_MASK: which MXCSR bits may be set (SDM 1 11.6.6).
pub fn mxcsr_mask() -> u32 {
    #[repr(C, align(16))]
    struct Area([u8; 512]);
    static MASK: OnceLock<u32> = OnceLock::new();
    *MASK.get_or_init(|| {
        let mut area = Area([0; 512]);
        // SAFETY: FXSAVE is part of x86-64; it writes 512 bytes, 16-byte aligned.
        unsafe { std::arch::x86_64::_fxsave64(area.0.as_mut_ptr()) };
        match u32::from_le_bytes(area.0[28..32].try_into().expect("4 bytes")) {
            0 => 0xffbf,
            mask => mask,
        }
    })
}
