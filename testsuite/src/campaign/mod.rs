//! The campaign: every instruction that the host has, in 64-bit mode, with random states, on every engine and on the host CPU; full
//! state compared.
//!
//! | module | holds |
//! | --- | --- |
//! | [`arena`] | the pages of the cases (unsafe) |
//! | [`mod@case`] | a case |
//! | [`encode`] | bytes for an instruction |
//! | [`values`] | register values |
//! | [`aim`] | memory operands and branch targets |
//! | [`far`] | selectors and far pointers |
//! | [`batch`] | instructions in their places, states for them |
//! | [`beside`] | cases one by one, each on memory set up anew |
//! | [`blocks`] | several instructions with branches and loops |
//! | [`oracle`] | the host CPU (unsafe) |
//! | [`engine`] | the engines |
//! | [`outcome`] | what came out, and the comparison |
//! | [`sequence`], [`group`] | sequences at CPL 0 and any bytes, without the host CPU; the engines that run them |
//! | [`modes`] | 16- and 32-bit code |
//! | [`tally`] | counts and divergences |
//! | [`expected`] | the list of expected divergences |
//! | [`worker`] | runs batches |
//! | [`coordinator`] | divides them among processes |
//! | [`matrix`] | the page of results |
//! | [`repro`] | a case for `bivisor exec` |

pub mod aim;
pub mod arena;
pub mod batch;
pub mod beside;
pub mod blocks;
pub mod case;
pub mod coordinator;
pub mod encode;
pub mod engine;
pub mod expected;
pub mod far;
pub mod group;
pub mod matrix;
pub mod modes;
pub mod oracle;
pub mod outcome;
pub mod repro;
pub mod sequence;
pub mod tally;
pub mod values;
pub mod worker;

use bivisor_emulator::interp::alu::Vendor;
use iced_x86::{Code, Mnemonic as M};

/// Why no case of a campaign shows this instruction; `None`: cases do.
pub fn reason_against(code: Code) -> Option<&'static str> {
    match code.mnemonic() {
        M::Syscall => Some("a system call: what it does is the kernel's"),
        M::Sysenter if Vendor::host() == Vendor::Intel => Some("a system call: what it does is the kernel's"),
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw if umip() => {
            Some("the host has UMIP: its kernel carries it out for users, in a way of its own")
        }
        M::Rdgsbase | M::Wrgsbase | M::Lgs => Some("GS is the host thread's own while a case runs"),
        _ if matches!(code, Code::Popw_GS | Code::Popq_GS) => Some("GS is the host thread's own while a case runs"),
        _ => None,
    }
}

/// CPUID.(EAX=7,ECX=0).ECX.UMIP.
fn umip() -> bool {
    std::arch::x86_64::__cpuid_count(7, 0).ecx & 4 != 0
}

/// The same in 64-bit mode: on Intel's CPUs near branches ignore a 66 prefix there, so that none has an operand of 16 bits.
pub fn never_decodes_in_64_bits(code: Code) -> bool {
    let op = code.op_code();
    Vendor::host() == Vendor::Intel && op.mode64() && op.amd_decoder64() && !op.intel_decoder64()
}

/// Does this host's decoder never give this code? WAIT and another instruction are two; AMD's UD0 has no ModRM byte, and its far pointers no
/// offset of 64 bits.
pub fn never_decodes(code: Code) -> bool {
    let intel = matches!(
        code,
        Code::Call_m1664 | Code::Jmp_m1664 | Code::Lss_r64_m1664 | Code::Lfs_r64_m1664 | Code::Lgs_r64_m1664
    ) || code.mnemonic() == M::Ud0 && code != Code::Ud0;
    code.op_code().fwait() || intel && Vendor::host() == Vendor::Amd
}
