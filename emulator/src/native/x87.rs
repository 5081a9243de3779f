//! The guest's x87 state in the host's registers: load, save, leave clean.
//!
//! Rust code on x86-64 does not use x87 or MMX registers, so a guest's state may stay in them between two instructions of one run.
#![allow(unsafe_code)]

use crate::cpu::XsaveArea;
use crate::cpu::xsave::component;
use std::arch::asm;

#[repr(C, align(16))]
struct Fx([u8; 512]);

/// Bytes of the legacy region that are x87's: control to data pointer, and the registers.
const CONTROL: std::ops::Range<usize> = 0..24;
const REGISTERS: std::ops::Range<usize> = 32..160;

/// From the image to the registers.
pub fn load(image: &mut XsaveArea) {
    image.materialize(component::X87);
    let mut fx = Fx([0; 512]);
    fx.0[CONTROL].copy_from_slice(&image.bytes[CONTROL]);
    fx.0[REGISTERS].copy_from_slice(&image.bytes[REGISTERS]);
    // SAFETY: a 512-byte aligned area; MXCSR stays what it was; all XMM registers are declared as changed.
    unsafe {
        asm!("stmxcsr [{0} + 24]", "fxrstor64 [{0}]", in(reg) &mut fx, clobber_abi("sysv64"), options(nostack));
    }
}

/// From the registers to the image; they keep their content.
pub fn save(image: &mut XsaveArea) {
    let mut fx = Fx([0; 512]);
    // SAFETY: a 512-byte aligned area.
    unsafe { asm!("fxsave64 [{0}]", in(reg) &mut fx, options(nostack, preserves_flags)) };
    image.activate(component::X87);
    image.bytes[CONTROL].copy_from_slice(&fx.0[CONTROL]);
    image.bytes[REGISTERS].copy_from_slice(&fx.0[REGISTERS]);
}

/// Leaves the registers as the ABI wants them.
pub fn clean() {
    // SAFETY: FNINIT does not wait; it gives the control word of the ABI and an empty stack.
    unsafe { asm!("fninit", options(nomem, nostack, preserves_flags)) };
}

/// FSW in the registers.
#[inline(always)]
pub fn status() -> u16 {
    let fsw: u16;
    // SAFETY: FNSTSW does not wait and changes AX only.
    unsafe { asm!("fnstsw ax", out("ax") fsw, options(nomem, nostack, preserves_flags)) };
    fsw
}
